"""The objective: masks, PRoPE, the field decoder, who sees what, and where gradients go."""
import os

import pytest
import torch

from common import InputError
from model import compile_blocks, to_4x4
from optim import make_optimizers
from psfm import (PSFM, FieldDecoder, PRoPE, PSFMConfig, context_index, load_psfm,
                  random_view_mask)
from test_model import random_extrinsics
from test_vggt import MASK, TINY, make
from train import PRESETS, Config
from vggt import VGGT, VGGTConfig

INTRINSICS = torch.tensor([[20., 0, 12], [0, 22, 8], [0, 0, 1]])
SIZE, GRID = (16, 24), (2, 3)


def make_psfm(teacher=None, **settings):
    torch.manual_seed(0)
    sizes = dict(width=32, encoder_depth=2, decoder_depth=2, num_heads=2, num_latents=6)
    return PSFM(make(TINY), PSFMConfig(**{**sizes, **settings}), teacher)


def encode(psfm, images, mask):
    """-> z, what the backbone sees of all views"""
    features, views, _ = psfm.observe(images, mask, 2)
    return psfm.encode(features, views.grid), views


# -----------------------------------------------------------------------------
# masks

def test_masks():
    for V, ratio, count in [(4, 0.5, 2), (7, 0.5, 3), (12, 0.75, 3), (2, 0.9, 1), (10, 0.8, 2)]:
        mask, num_context = random_view_mask(50, V, ratio, torch.Generator().manual_seed(0))
        again, _ = random_view_mask(50, V, ratio, torch.Generator().manual_seed(0))
        assert torch.equal(mask, again)
        assert num_context == count
        assert (~mask).sum(1).eq(num_context).all()
        assert not mask[:, 0].any()
        assert mask.float().mean(0)[1:].min() > 0  # any view but the first is hidden at times
    assert context_index(MASK, 2).tolist() == [[0, 2], [0, 1]]


# -----------------------------------------------------------------------------
# the decoder

def test_prope_is_rope_within_one_view_and_relative_across_cameras():
    q, k, v = torch.randn(3, 2, 2, 6, 16)
    extrinsics, intrinsics = random_extrinsics(2), INTRINSICS.expand(2, 3, 3)
    prope = PRoPE(extrinsics, intrinsics, SIZE, GRID, 16)
    rq, rk, rv = prope.rotate(q, k, v)
    # rays of one view share P, which cancels: q^T P P^-1 k
    scores = rq[..., :8] @ rk[..., :8].transpose(-1, -2)
    assert torch.allclose(scores, q[..., :8] @ k[..., :8].transpose(-1, -2), atol=1e-3)
    assert torch.allclose(prope.restore(rv), v, atol=1e-3)

    # moving the world moves nothing: scores between two views depend on P_q P_k^-1 alone
    def across(prope):
        rq, rk, _ = prope.rotate(q, k, v)
        return rq[0] @ rk[1].transpose(-1, -2)

    moved = (to_4x4(extrinsics) @ to_4x4(random_extrinsics(1)))[:, :3]
    moved = PRoPE(moved, intrinsics, SIZE, GRID, 16)
    assert torch.allclose(across(prope), across(moved), rtol=1e-3, atol=1e-2)


def test_prope_leaves_world_tokens_alone():
    qkv = torch.randn(3, 1, 2, 9, 16)
    prope = PRoPE(random_extrinsics(1), INTRINSICS[None], SIZE, GRID, 16)
    for before, after in zip(qkv, prope.rotate(*qkv)):
        assert torch.equal(before[:, :, :3], after[:, :, :3])
        assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])


def test_field_answers_each_view_by_itself():
    decoder = FieldDecoder(32, 2, 2)
    z, extrinsics = torch.randn(2, 5, 32), random_extrinsics(2, 4)
    intrinsics = INTRINSICS.expand(2, 4, 3, 3)
    out = decoder(z, extrinsics, intrinsics, SIZE, GRID)
    assert out.shape == (2, 4, 6, 32)
    order = [2, 0, 3, 1]
    reordered = decoder(z, extrinsics[:, order], intrinsics, SIZE, GRID)
    assert torch.allclose(reordered, out[:, order], atol=1e-4)
    alone = decoder(z[1:], extrinsics[1:, 2:3], intrinsics[1:, :1], SIZE, GRID)
    assert torch.allclose(alone, out[1:, 2:3], atol=1e-4)
    # where the camera stands matters
    moved = extrinsics.clone()
    moved[..., 3] += 1
    assert not torch.allclose(decoder(z, moved, intrinsics, SIZE, GRID), out, atol=1e-3)


@pytest.mark.slow
def test_compiled_field_has_the_gradients_of_the_eager_one_under_autocast(restored_compiler):
    """PRoPE is computed in fp32 there, forth and back (torch.compile would take bf16 for back)."""
    decoder = FieldDecoder(32, 1, 2)
    cameras = random_extrinsics(2)[:, None], INTRINSICS.expand(2, 1, 3, 3)
    z = torch.randn(2, 5, 32)

    def gradients():
        with torch.autocast('cpu', torch.bfloat16):
            out = decoder(z, *cameras, SIZE, GRID)
        return torch.autograd.grad(out.float().square().sum(), list(decoder.parameters()))

    eager = gradients()
    compile_blocks(decoder, backend='aot_eager')
    for one, other in zip(gradients(), eager):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


# -----------------------------------------------------------------------------
# who sees what

@pytest.mark.parametrize('context', ['asymmetric', 'separate'])
def test_latents_never_see_targets(context):
    psfm = make_psfm(context=context).eval()
    images = torch.rand(2, 4, 3, *SIZE)
    other = torch.where(MASK[:, :, None, None, None], torch.rand_like(images), images)
    z, _ = encode(psfm, images, MASK)
    assert torch.equal(z, encode(psfm, other, MASK)[0])
    alone, _ = encode(psfm, images[1:], MASK[1:])
    assert torch.allclose(alone, z[1:], atol=1e-5)  # nor batch-mates


def test_separate_and_asymmetric_are_two_objectives():
    """They agree on what the encoder sees, and differ in what the decoder must predict."""
    images = torch.rand(2, 4, 3, *SIZE)
    one, two = make_psfm(context='asymmetric'), make_psfm(context='separate')
    context1, views1, _ = one.observe(images, MASK, 2)
    context2, views2, _ = two.observe(images, MASK, 2)
    assert torch.allclose(context1, context2, atol=1e-5)
    assert not torch.allclose(views1.features, views2.features, atol=1e-3)
    assert torch.allclose(views2.features, two.backbone(images).features, atol=1e-5)


def test_order_of_targets_only_permutes():
    psfm = make_psfm().eval()
    images, order = torch.rand(1, 4, 3, *SIZE), [0, 3, 2, 1]
    mask = torch.tensor([[False, True, False, True]])  # views 1 and 3 change places
    results, losses = [], []
    for x in (images, images[:, order]):
        z, views = encode(psfm, x, mask)
        results.append(psfm.decode(z, views.extrinsics, views.intrinsics, SIZE, views.grid))
        losses.append(psfm(x, view_mask=mask)['loss'])
    assert torch.allclose(results[0][:, order], results[1], atol=1e-4)
    assert torch.allclose(*losses, atol=1e-5)


# -----------------------------------------------------------------------------
# losses

class Teacher(torch.nn.Module):
    feature_dim = 12

    def forward(self, images, grid):
        shade = images.mean((2, 3, 4))[:, :, None, None]
        return shade.expand(-1, -1, grid[0] * grid[1], 12)


def test_gradients_reach_what_is_trained_and_nothing_else():
    psfm = make_psfm(Teacher(), depth_probe=True).train()
    losses = psfm(torch.rand(2, 4, 3, *SIZE), torch.Generator().manual_seed(0))
    losses['loss'].backward()
    assert losses.keys() == {'geo_l1', 'geo_cos', 'sem_l1', 'sem_cos', 'depth_probe', 'loss'}
    for name, parameter in psfm.named_parameters():
        is_frozen = name.startswith('backbone.')
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name
        assert is_frozen or parameter.grad.abs().sum() > 0, name


def test_depth_probe_is_a_witness():
    """It reads the decoder's output and pushes nothing back into it."""
    psfm = make_psfm(depth_probe=True)
    psfm(torch.rand(2, 4, 3, *SIZE), view_mask=MASK)['depth_probe'].backward()
    reached = [name for name, p in psfm.named_parameters() if p.grad is not None]
    assert {name.split('.')[0] for name in reached} == {'depth_probe'}


def test_standardised_features_are_the_units_of_the_loss_only():
    psfm = make_psfm().eval()
    images = torch.rand(2, 4, 3, *SIZE)
    psfm.set_statistics('geo', psfm.backbone(images).features)
    z, views = encode(psfm, images, MASK)
    cameras = views.extrinsics, views.intrinsics, SIZE, views.grid
    decoded = psfm.heads['geo'](psfm.decoder(z, *cameras))
    predicted = psfm.decode(z, *cameras)
    assert torch.allclose(psfm.standardise('geo', predicted), decoded, atol=1e-4)
    assert psfm.standardise('geo', views.features).mean().abs() < 0.2
    raw = make_psfm(standardised=False)
    raw.set_statistics('geo', views.features)
    assert torch.equal(raw.standardise('geo', views.features), views.features)


# -----------------------------------------------------------------------------
# the paper's sizes

@pytest.mark.slow
@pytest.mark.skipif('FULL_SIZE' not in os.environ, reason='takes 8 GB and a minute: '
                    'FULL_SIZE=1 python -m pytest tests/test_psfm.py -k full_size')
def test_a_step_of_base_at_full_size():
    config = Config(**PRESETS['base'])
    torch.manual_seed(0)
    backbone = VGGT(VGGTConfig()).freeze()
    assert 909e6 < sum(p.numel() for p in backbone.aggregator.parameters()) < 910e6
    psfm = PSFM(backbone, config)
    (optimizer,) = make_optimizers(psfm, config, torch.device('cpu'))
    trained = {name: p for name, p in psfm.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    losses = psfm(torch.rand(1, 3, 3, 112, 140))
    losses['loss'].backward()
    optimizer.step()
    assert 'depth_probe' in losses and all(x.isfinite() for x in losses.values())
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize('images, wrong', [
    (torch.rand(6, 3, 64, 64), '(6, 3, 64, 64)'), (255 * torch.rand(1, 2, 3, 64, 64), 'to 25'),
    (torch.full((1, 2, 3, 64, 64), 200, dtype=torch.uint8), 'from 200 to 200')])
def test_latents_of_images_of_another_shape_or_range_are_refused(images, wrong):
    psfm, _ = load_psfm('weights/psfm_small.safetensors')
    with pytest.raises(InputError, match='images .B, V, 3, H, W. from 0 to 1') as error:
        psfm.latents(images)
    assert wrong in str(error.value)


@pytest.mark.parametrize('num_latents', [0, 6])
def test_what_is_trained_is_what_gets_a_gradient(num_latents):
    psfm = make_psfm(num_latents=num_latents)
    psfm(torch.rand(1, 4, 3, *SIZE), torch.Generator().manual_seed(0))['loss'].backward()
    trained = {name for name, p in psfm.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in psfm.named_parameters() if p.grad is not None}
    assert any(name.startswith('encoder.') for name in trained) == bool(num_latents)
