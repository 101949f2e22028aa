"""What must hold on a GPU. Skipped without one; GPU_TESTS_ON=cpu tries the tests themselves."""
import contextlib
import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from adapter import SpatialVLM, build_adapter
from chat import answer_loss, lean_batch, load_vlm
from common import autocast_on
from data import RoomPool
from model import compile_blocks
from optim import make_optimizers, shard_model, take_step
from psfm import PSFM, PSFMConfig, load_psfm
from questions import RoomQuestions
from test_parity import CHECKS, FILES, read
from test_train import TINY, losses, stop_at_the_first_checkpoint
from tiny import save_tiny_vlm
from vggt import VGGT

NAME = os.environ.get('GPU_TESTS_ON', 'cuda')
DEVICE = torch.device(NAME)
IS_GPU = DEVICE.type == 'cuda'
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(IS_GPU and not torch.cuda.is_available(),
                                                  reason='needs a CUDA GPU')]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """fp32 means fp32: convolutions take TF32 by default."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture(scope='module')
def field():
    """The shipped PSFM on the device, and a batch of rooms."""
    psfm, config = load_psfm('weights/psfm_small.safetensors', DEVICE)
    pool = RoomPool('val', 0, 8, device=DEVICE)
    return psfm, config, pool.batch(0, 4, 6)['images']


def loss_and_gradient(psfm, images, autocast=contextlib.nullcontext()):
    """-> loss, gradient norm, on a mask that is always the same"""
    view_mask = torch.tensor([[False, False, False, True, True, True]] * 4, device=DEVICE)
    psfm.zero_grad()
    with autocast:
        loss = psfm(images, view_mask=view_mask)['loss']
    loss.backward()
    gradients = [p.grad.float().norm() for p in psfm.parameters() if p.grad is not None]
    return loss.item(), torch.stack(gradients).norm().item()


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_parity_with_the_official_modules(path):
    kind, config, weights, given = read(path)
    weights, given = [{name: x.to(DEVICE) for name, x in tensors.items()}
                      for tensors in (weights, given)]
    with DEVICE:
        CHECKS[kind](config, weights, given)


def test_bf16_is_near_fp32(field):
    """Within a hundredth or two: bf16 has eight bits, and errors of many terms average out."""
    psfm, _, images = field
    exact = loss_and_gradient(psfm, images)
    coarse = loss_and_gradient(psfm, images, autocast_on(DEVICE, torch.bfloat16))
    assert coarse[0] == pytest.approx(exact[0], rel=0.01)
    assert coarse[1] == pytest.approx(exact[1], rel=0.02)
    z = psfm.latents(images)
    with autocast_on(DEVICE, torch.bfloat16):
        error = (psfm.latents(images).float() - z).norm() / z.norm()
    assert 0 < error < 0.03


# in bf16, what is fused is rounded elsewhere than in eager code: both are compared with fp32
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, (1e-4, 1e-4)),
                                              (torch.bfloat16, (0.01, 0.02))])
def test_compiled_equals_eager(field, restored_compiler, dtype, tolerance):
    psfm, config, images = field
    twin = PSFM(copy.deepcopy(psfm.backbone), config).to(DEVICE).eval()
    twin.load_state_dict(psfm.state_dict())
    eager = loss_and_gradient(twin, images)
    compile_blocks(twin)
    compiled = loss_and_gradient(twin, images, autocast_on(DEVICE, dtype))
    assert compiled[0] == pytest.approx(eager[0], rel=tolerance[0])  # the loss
    assert compiled[1] == pytest.approx(eager[1], rel=tolerance[1])  # the gradient's norm


def test_a_step_never_waits_for_the_gpu(field):
    psfm, config, images = field
    twin = PSFM(psfm.backbone, config).to(DEVICE).train()
    autocast = autocast_on(DEVICE, torch.bfloat16)
    optimizers = make_optimizers(twin, config, DEVICE, torch.bfloat16)
    trained = [p for p in twin.parameters() if p.requires_grad]

    def step(number):
        generator = torch.Generator(DEVICE).manual_seed(number)
        with autocast:
            loss = twin(images, generator)['loss']
        loss.backward()
        take_step(optimizers, trained, config.clip)

    step(0)  # makes the optimizers' states, and whatever is made once
    set_mode = torch.cuda.set_sync_debug_mode if IS_GPU else lambda mode: None
    set_mode('error')
    try:
        step(1)
        step(2)
    finally:
        set_mode('default')


def test_resume_is_bit_equal(tmp_path):
    options = [*TINY, '--device', NAME, '--dtype', 'bfloat16', '--no-compile']
    whole, parts = str(tmp_path / 'whole'), str(tmp_path / 'parts')
    with sdpa_kernel(SDPBackend.MATH):  # fused attention adds gradients in any order
        train.main([*options, '--out', whole])
        stop_at_the_first_checkpoint(*options, '--out', parts)
        train.main([*options, '--out', parts, '--resume'])
    assert losses(parts) == losses(whole)


@pytest.fixture
def one_process(tmp_path):
    """A process group of one: NCCL allows no second process on the same GPU."""
    dist.init_process_group('nccl' if IS_GPU else 'gloo', rank=0, world_size=1,
                            init_method=f'file://{tmp_path}/meeting')
    yield
    dist.destroy_process_group()


def test_ddp(one_process):
    torch.manual_seed(0)
    vggt = VGGT.from_pretrained('weights/mini_vggt.safetensors').freeze()
    psfm = PSFM(vggt, PSFMConfig()).to(DEVICE)
    images = RoomPool('val', 0, 8, device=DEVICE).batch(0, 4, 6)['images']
    alone = loss_and_gradient(psfm, images)
    ddp = torch.nn.parallel.DistributedDataParallel(psfm)
    assert loss_and_gradient(ddp, images) == pytest.approx(alone, rel=1e-4)


def test_fsdp_and_compiled(one_process, tmp_path, restored_compiler):
    vlm, chat = load_vlm(save_tiny_vlm(tmp_path / 'vlm'))
    model = SpatialVLM(vlm, build_adapter(vlm, 16)).train_only('adapter+llm').to(DEVICE)
    data = RoomQuestions('train', 0, 4)
    batch = chat.batch([chat.encode(data[i]) for i in range(2)])
    batch = lean_batch(batch, vlm, DEVICE)
    labels = batch.pop('labels')
    z = [torch.randn(5, 16, device=DEVICE) for _ in range(2)]

    def step():
        loss = answer_loss(model(latents=z, use_cache=False, **batch).logits, labels)
        loss.backward()
        norm = take_step([], [p for p in model.parameters() if p.requires_grad], 1e9)
        model.zero_grad()
        return loss.item(), norm.item()

    whole = step()
    shard_model(model)
    assert step() == pytest.approx(whole, rel=1e-4)
    compile_blocks(vlm, type(vlm.get_decoder().layers[0]))
    assert step() == pytest.approx(whole, rel=1e-4)
