"""What training loops share: the learning rate, the optimizers, checkpoints."""
import itertools
import os
import platform
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import common
from common import InputError, fetch, find_checkpoint, is_hub_id, read_json, write_checkpoint
from eval import load_answerer
from psfm import load_psfm
from tiny import save_tiny_vlm
from optim import Muon, make_optimizers, orthogonalise, rate_share, set_rates, take_step
from psfm import build_psfm
from train import Config


def ids(parameters):
    return {id(p) for p in parameters}


def test_a_command_can_be_typed_again():
    command = common.command_of('train.py', ['--data', 'my photos/', '--resume', '--steps', '3'])
    assert command == "python train.py --data 'my photos/' --steps 3"


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA GH200 480GB', 989e12),
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA RTX A1000 Laptop GPU', None)])
def test_peaks_are_of_the_device_that_is_named(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert common.peak_flops(torch.device('cuda')) == peak


def test_gradients_are_clipped_and_cleared():
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 10.0)
    norm = take_step([torch.optim.SGD([p], lr=1.0)], [p], clip=1.0)
    assert norm.item() == 20 and p.norm().item() == pytest.approx(1) and p.grad is None


def held_by(optimizer):
    return ids(p for group in optimizer.param_groups for p in group['params'])


def test_the_learning_rate_is_a_function_of_the_step():
    config = Config(steps=100, warmup=10, min_lr=0.1, decay_from=0.5)
    assert rate_share(0, config) == pytest.approx(1 / 11)
    assert rate_share(10, config) == rate_share(50, config) == 1
    assert 0.1 < rate_share(75, config) < 1
    assert rate_share(100, config) == pytest.approx(0.1)


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    config = Config(muon_lr=1e-3)
    model = build_psfm(config)
    adamw, muon = make_optimizers(model, config, torch.device('cpu'))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert held_by(adamw) | held_by(muon) == ids(trained.values())
    assert not held_by(adamw) & held_by(muon)
    assert held_by(muon) == ids(p for name, p in trained.items()
                                if '.blocks.' in name and p.ndim == 2)


def test_muon_is_torchs_muon_but_for_its_precision():
    g = torch.Generator().manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 48), (16, 16)]
    before = [torch.randn(*shape, generator=g) for shape in shapes]
    ours, theirs = [[torch.nn.Parameter(p.clone()) for p in before] for _ in range(2)]
    settings = dict(momentum=0.95, adjust_lr_fn='match_rms_adamw')
    optimizers = [Muon(ours, lr=0.01, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, **settings)]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, start in zip(ours, theirs, before):
        assert (p - q).norm() < 0.02 * (q - start).norm()  # bf16 has three digits
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 20, 50, generator=g)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_groups_keep_their_peaks_and_vectors_do_not_decay():
    model = torch.nn.ModuleDict({'layers': torch.nn.Linear(4, 4), 'head': torch.nn.Linear(4, 4)})
    config = SimpleNamespace(lr=1e-3, muon_lr=2e-3, weight_decay=0.1, beta2=0.98)
    optimizers = make_optimizers(model, config, torch.device('cpu'),
                                 rate_of=lambda name: 5e-3 if name == 'head.weight' else 1e-3)
    set_rates(optimizers, 0.5)
    found = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for p in group['params']:
            name = next(name for name, other in model.named_parameters() if other is p)
            found[name] = group['lr'], group['weight_decay']
    assert found == {'layers.weight': (1e-3, 0.1), 'layers.bias': (5e-4, 0.0),
                     'head.weight': (2.5e-3, 0.1), 'head.bias': (5e-4, 0.0)}


# -----------------------------------------------------------------------------
# checkpoints

class Killed(BaseException):
    """As SIGKILL: nothing is tidied up."""


class Clock:
    """Kills at call `due` of what write_checkpoint does to the disk: before, halfway or after."""

    def __init__(self, monkeypatch, due):
        self.left = due
        for owner, name in ((os, 'rename'), (os, 'makedirs'), (torch, 'save'),
                            (common, 'write_json'), (common, 'flush_to_disk')):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))
        monkeypatch.setattr(shutil, 'rmtree', self.around(shutil.rmtree, self.half_removed))

    def tick(self):
        self.left -= 1
        if self.left == 0:
            raise Killed

    def around(self, function, halfway=None):
        def killable(*args, **options):
            self.tick()
            if halfway:
                halfway(*args)
            function(*args, **options)
            self.tick()
        return killable

    def half_removed(self, folder, **_):
        """Killed while a folder is being removed: it stays, without its weights."""
        if self.left == 1 and os.path.isdir(folder):
            Path(folder, 'weights').unlink(missing_ok=True)
        self.tick()


def write(run, step):
    """-> was it written to the end?"""
    def save_model(folder):
        Path(folder, 'weights').write_text(str(step))
    try:
        write_checkpoint(str(run), step, [], Config(), torch.float32, {}, save_model)
    except Killed:
        return False
    return True


def step_of(run):
    """The step of the checkpoint that --resume finds, which must be whole."""
    folder = Path(find_checkpoint(str(run)))
    step = read_json(folder / 'state.json')['step']
    assert (folder / 'weights').read_text() == str(step)
    assert (folder / 'optimizer.pt').exists()
    return step


def test_no_two_kills_lose_the_last_whole_checkpoint(tmp_path, monkeypatch):
    """Killed at any point of writing step 2, then at any point of writing step 3."""
    monkeypatch.setattr(os, 'fsync', lambda file: None)  # so many would take a minute
    pairs = 0
    for first, second in itertools.product(range(1, 40), repeat=2):
        run = tmp_path / f'{first}-{second}'
        assert write(run, 1)
        with monkeypatch.context() as patch:
            Clock(patch, first)
            if write(run, 2):
                break
        reached = step_of(run)
        assert reached in (1, 2)
        with monkeypatch.context() as patch:
            Clock(patch, second)
            is_written = write(run, 3)
        assert step_of(run) in (reached, 3)
        pairs += 1
        if is_written:
            continue
        assert write(run, 4)
        assert step_of(run) == 4
    assert pairs > 400


# -----------------------------------------------------------------------------
# the hub

@pytest.mark.parametrize('name,is_one', [
    ('user/name', True), ('Qwen/Qwen2.5-VL-3B-Instruct', True), ('out/small', False),
    ('weights/mini_vlm', False), ('./user/name', False), ('/user', False), ('~/name', False),
    ('name', False), ('a/b/c', False), ('user/name.safetensors', False), ('photos/', False),
    ('a/spa3r.ckpt', False), ('tests/photos', False)])
def test_what_may_be_a_name_on_the_hub(name, is_one):
    assert is_hub_id(name) == is_one


def test_runs_from_the_hub(tmp_path, monkeypatch):
    """A file of an encoder, and a folder of a VLM, by their names alone."""
    asked = []
    folder = save_tiny_vlm(tmp_path / 'vlm')

    def one_file(name, file, repo_type):
        asked.append((name, file, repo_type))
        return os.path.abspath('weights/psfm_small.safetensors')

    def whole(name, repo_type):
        asked.append((name, repo_type))
        return folder

    monkeypatch.setattr('huggingface_hub.hf_hub_download', one_file)
    monkeypatch.setattr('huggingface_hub.snapshot_download', whole)
    psfm, _ = load_psfm('user/encoder')
    assert len(psfm.encoder.queries) == 32
    (model, _, latents), settings = load_answerer('user/vlm', 'cpu')
    assert settings['latents'] == 'none' and latents is None
    assert fetch('user/data', kind='dataset') == folder
    assert asked == [('user/encoder', 'model.safetensors', 'model'), ('user/vlm', 'model'),
                     ('user/data', 'dataset')]

    def fails(*_, **__):
        raise ConnectionError('no network\nand more')

    monkeypatch.setattr('huggingface_hub.hf_hub_download', fails)
    with pytest.raises(InputError, match=r'user/gone is neither .* \(ConnectionError: no net'):
        load_psfm('user/gone')
    with pytest.raises(InputError, match='no checkpoint in out/gone: train first'):
        load_psfm('out/gone')


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc can be asked')
def test_freed_memory_is_kept_for_the_next_step():
    def faults_of_a_step():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(250_000) for _ in range(128)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    common.keep_freed_memory()
    faults_of_a_step()
    pages = 128 * 4 * 250_000 / resource.getpagesize()
    assert faults_of_a_step() < 0.1 * pages


def out_of_gpu_memory():
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB ...')


@pytest.mark.parametrize('ask', [lambda: torch.empty(2 ** 50), lambda: np.empty(2 ** 50),
                                 lambda: bytearray(2 ** 60), out_of_gpu_memory])
def test_too_little_memory_is_said_in_one_sentence(ask):
    with pytest.raises(SystemExit, match='error: too little memory: take a smaller batch'):
        common.run_script(ask)


@pytest.mark.parametrize('message', [
    'unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)',
    'DataLoader worker (pid 7) is killed by signal: Killed.'])
def test_workers_that_are_ended_are_said_in_one_sentence(message):
    def fail():
        raise RuntimeError(message)
    with pytest.raises(SystemExit, match='error: a process that reads pictures was killed'):
        common.run_script(fail)


def test_an_error_without_a_message_is_our_bug():
    def fail():
        raise NotImplementedError
    with pytest.raises(NotImplementedError):
        common.run_script(fail)


def test_other_errors_of_torch_are_our_bugs():
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        common.run_script(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_a_file_of_json_that_is_no_object_is_refused(tmp_path):
    for content in ('[]', 'null', '5', '"x"'):
        (tmp_path / 'metrics.json').write_text(content)
        with pytest.raises(InputError, match='metrics.json holds a .*, not an object'):
            common.read_json(tmp_path / 'metrics.json')


def test_what_cannot_be_written_is_said_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match='error: '):
        common.run_script(lambda: save_file({}, tmp_path / 'nowhere' / 'file.safetensors'))


def test_files_are_flushed_as_every_system_can(tmp_path, monkeypatch):
    """Windows flushes no file that was opened to be read."""
    flushed = []
    monkeypatch.setattr(os, 'fsync', lambda file: flushed.append(os.write(file, b'')))
    (tmp_path / 'file').write_text('whole')
    common.flush_to_disk(tmp_path)
    assert flushed == [0] and (tmp_path / 'file').read_text() == 'whole'


def test_under_torchrun_a_process_touches_no_gpu_but_its_own(monkeypatch):
    asked = []

    def pick_device(name):
        asked.append(name)
        return torch.device('cpu')

    monkeypatch.setattr(common, 'PROCESSES', 2)
    monkeypatch.setattr(common, 'pick_device', pick_device)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setenv('MASTER_ADDR', 'localhost')
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('LOCAL_RANK', '1')
    for device in ('auto', 'cuda', 'cuda:0', 'cpu'):
        common.join_processes(device)
    assert asked == ['cuda:1', 'cuda:1', 'cuda:1', 'cpu']
