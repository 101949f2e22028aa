import os

import pytest
import torch

from model import InputError
from psfm import PSFM, FieldDecoder, PRoPE, SemanticTeacher, build_psfm, context_index, random_view_mask
from test_model import random_extrinsics
from train import PRESETS, Config, make_optimizers
from vggt import VGGT, VGGTConfig
from test_vggt import MASK, TINY, make

INTRINSICS = torch.tensor([[20., 0, 12], [0, 22, 8], [0, 0, 1]])


def make_psfm(**settings):
    torch.manual_seed(0)
    return PSFM(make(TINY), width=32, encoder_depth=2, decoder_depth=2, num_heads=2, num_latents=6, **settings)


def test_masks():
    for V, ratio in [(4, 0.5), (7, 0.5), (12, 0.75), (2, 0.9)]:
        mask, num_context = random_view_mask(50, V, ratio, torch.Generator().manual_seed(0))
        assert num_context == max(1, int(V * (1 - ratio)))
        assert (~mask).sum(1).eq(num_context).all() and not mask[:, 0].any()
        assert torch.equal(mask, random_view_mask(50, V, ratio, torch.Generator().manual_seed(0))[0])
        assert mask.float().mean(0)[1:].min() > 0                         # every view but the first is hidden at times
    assert context_index(MASK, 2).tolist() == [[0, 2], [0, 1]]


def test_prope_is_rope_within_one_view_and_relative_across_cameras():
    q, k, v = torch.randn(3, 2, 2, 6, 16)
    extrinsics, intrinsics = random_extrinsics(2), INTRINSICS.expand(2, 3, 3)
    prope = PRoPE(extrinsics, intrinsics, (16, 24), (2, 3), 16, num_world=0)
    rq, rk, rv = prope.rotate(q, k, v)
    # rays of one view share P, which cancels: q^T P P^-1 k
    assert torch.allclose(rq[..., :8] @ rk[..., :8].transpose(-1, -2), q[..., :8] @ k[..., :8].transpose(-1, -2), atol=1e-3)
    assert torch.allclose(prope.restore(rv), v, atol=1e-3)
    # moving the world moves nothing: scores between two views depend on P_q P_k^-1 alone
    move = random_extrinsics(1)
    to4 = lambda e: torch.cat([e, torch.tensor([0., 0, 0, 1]).expand(len(e), 1, 4)], 1)
    moved = PRoPE((to4(extrinsics) @ to4(move))[:, :3], intrinsics, (16, 24), (2, 3), 16, num_world=0)
    across = lambda p: p.rotate(q, k, v)[0][0] @ p.rotate(q, k, v)[1][1].transpose(-1, -2)
    assert torch.allclose(across(prope), across(moved), rtol=1e-3, atol=1e-2)


def test_prope_leaves_world_tokens_alone():
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    prope = PRoPE(random_extrinsics(1), INTRINSICS[None], (16, 24), (2, 3), 16, num_world=3)
    for before, after in zip((q, k, v), prope.rotate(q, k, v)):
        assert torch.equal(before[:, :, :3], after[:, :, :3]) and not torch.allclose(before[:, :, 3:], after[:, :, 3:])


def test_field_answers_each_view_by_itself():
    decoder = FieldDecoder(32, 2, 2)
    z, extrinsics, intrinsics = torch.randn(2, 5, 32), random_extrinsics(2, 4), INTRINSICS.expand(2, 4, 3, 3)
    out = decoder(z, extrinsics, intrinsics, (16, 24), (2, 3))
    assert out.shape == (2, 4, 6, 32)
    order = [2, 0, 3, 1]
    assert torch.allclose(decoder(z, extrinsics[:, order], intrinsics, (16, 24), (2, 3)), out[:, order], atol=1e-4)
    assert torch.allclose(decoder(z[1:], extrinsics[1:, 2:3], intrinsics[1:, :1], (16, 24), (2, 3)), out[1:, 2:3], atol=1e-4)
    moved = extrinsics.clone()
    moved[..., 3] += 1
    assert not torch.allclose(decoder(z, moved, intrinsics, (16, 24), (2, 3)), out, atol=1e-3)     # where it stands matters


@pytest.mark.parametrize('context', ['asymmetric', 'separate'])
def test_latents_never_see_targets(context):
    psfm = make_psfm(context=context).eval()
    images = torch.rand(2, 4, 3, 16, 24)
    other = torch.where(MASK[:, :, None, None, None], torch.rand_like(images), images)
    latents = []
    for x in (images, other):
        features, views, _ = psfm.observe(x, MASK, 2)
        latents.append(psfm.encode(features, views.grid))
    assert torch.equal(*latents)
    features, views, _ = psfm.observe(images[1:], MASK[1:], 2)
    assert torch.allclose(psfm.encode(features, views.grid), latents[0][1:], atol=1e-5)            # nor batch-mates


def test_separate_and_asymmetric_are_two_objectives():
    """They agree on what the encoder sees, and differ in what the decoder must predict."""
    images = torch.rand(2, 4, 3, 16, 24)
    one, two = make_psfm(context='asymmetric'), make_psfm(context='separate')
    (c1, v1, _), (c2, v2, _) = one.observe(images, MASK, 2), two.observe(images, MASK, 2)
    assert torch.allclose(c1, c2, atol=1e-5)
    assert not torch.allclose(v1.features, v2.features, atol=1e-3)
    assert torch.allclose(v2.features, two.backbone(images).features, atol=1e-5)


def test_order_of_targets_only_permutes():
    psfm = make_psfm().eval()
    images, order = torch.rand(1, 4, 3, 16, 24), [0, 3, 2, 1]
    mask = torch.tensor([[False, True, False, True]])
    results = []
    for x in (images, images[:, order]):
        features, views, _ = psfm.observe(x, mask, 2)             # views 1 and 3, the targets, change places
        z = psfm.encode(features, views.grid)
        results.append(psfm.decode(z, views.extrinsics, views.intrinsics, (16, 24), views.grid))
    assert torch.allclose(results[0][:, order], results[1], atol=1e-4)
    losses = [psfm(x, view_mask=mask)['loss'] for x in (images, images[:, order])]
    assert torch.allclose(*losses, atol=1e-5)


class Teacher(torch.nn.Module):
    feature_dim = 12

    def forward(self, images, grid):
        return images.mean((2, 3, 4))[:, :, None, None].expand(-1, -1, grid[0] * grid[1], 12)


def test_gradients_reach_what_is_trained_and_nothing_else():
    psfm = make_psfm(teacher=Teacher(), depth_probe=True).train()
    losses = psfm(torch.rand(2, 4, 3, 16, 24), torch.Generator().manual_seed(0))
    losses['loss'].backward()
    assert {'geo_l1', 'geo_cos', 'sem_l1', 'sem_cos', 'depth_probe', 'loss'} == losses.keys()
    for name, parameter in psfm.named_parameters():
        frozen = name.startswith('backbone.')
        assert parameter.requires_grad != frozen and (parameter.grad is None) == frozen, name
        assert frozen or parameter.grad.abs().sum() > 0, name


def test_depth_probe_is_a_witness():
    """It reads the decoder's output and pushes nothing back into it."""
    psfm = make_psfm(depth_probe=True)
    psfm(torch.rand(2, 4, 3, 16, 24), view_mask=MASK)['depth_probe'].backward()
    assert {name.split('.')[0] for name, p in psfm.named_parameters() if p.grad is not None} == {'depth_probe'}


def test_standardised_features_are_the_units_of_the_loss_only():
    psfm = make_psfm().eval()
    images = torch.rand(2, 4, 3, 16, 24)
    psfm.set_statistics('geo', psfm.backbone(images).features)
    features, views, _ = psfm.observe(images, MASK, 2)
    z = psfm.encode(features, views.grid)
    decoded = psfm.heads['geo'](psfm.decoder(z, views.extrinsics, views.intrinsics, (16, 24), views.grid))
    predicted = psfm.decode(z, views.extrinsics, views.intrinsics, (16, 24), views.grid)
    assert torch.allclose(psfm.standardise('geo', predicted), decoded, atol=1e-4)
    assert psfm.standardise('geo', views.features).mean().abs() < 0.2
    raw = make_psfm(standardised=False)
    raw.set_statistics('geo', views.features)
    assert torch.equal(raw.standardise('geo', features), features)


def test_given_cameras_are_used():
    psfm = make_psfm().eval()
    images, cameras = torch.rand(2, 4, 3, 16, 24), (random_extrinsics(2, 4), INTRINSICS.expand(2, 4, 3, 3))
    predicted = psfm(images, view_mask=MASK)['loss']
    given = psfm(images, view_mask=MASK, extrinsics=cameras[0], intrinsics=cameras[1])['loss']
    assert not torch.allclose(predicted, given)


def test_a_gated_teacher_says_how_to_get_it(monkeypatch):
    import transformers

    def refuse(name):
        raise OSError(f'You are trying to access a gated repo.\nAccess to model {name} is restricted')
    monkeypatch.setattr(transformers.AutoModel, 'from_pretrained', refuse)
    with pytest.raises(InputError, match='gated repo.*hf auth login.*--teacher facebook/dinov2-with-registers-large'):
        build_psfm(Config(teacher='facebook/dinov3-vitl16-pretrain-lvd1689m'))


def test_semantic_teacher_from_transformers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    config = Dinov2WithRegistersConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28)
    teacher = SemanticTeacher(Dinov2WithRegistersModel(config), width=42)
    features = teacher.train()(torch.rand(2, 3, 3, 16, 24), (2, 3))
    assert features.shape == (2, 3, 6, 24) and not features.requires_grad and not teacher.model.training


@pytest.mark.skipif('FULL_SIZE' not in os.environ, reason='takes 8 GB and a minute: FULL_SIZE=1 python -m pytest tests/test_psfm.py -k full_size')
def test_a_step_of_base_at_full_size():
    config = Config(**PRESETS['base'])
    torch.manual_seed(0)
    backbone = VGGT(VGGTConfig()).freeze()
    assert 909e6 < sum(p.numel() for p in backbone.aggregator.parameters()) < 910e6
    psfm = PSFM(backbone, config.width, config.encoder_depth, config.decoder_depth, config.num_heads, config.num_latents, config.num_registers,
                config.mask_ratio, depth_probe=True)
    (optimizer,) = make_optimizers(psfm, config, torch.device('cpu'))
    before = {name: p.detach().clone() for name, p in psfm.named_parameters() if p.requires_grad}
    losses = psfm(torch.rand(1, 3, 3, 112, 140))
    losses['loss'].backward()
    optimizer.step()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(not torch.equal(p, before[name]) for name, p in psfm.named_parameters() if name in before)      # the step reached every trained weight
    assert all(p.grad is None for p in backbone.parameters())
