from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import model
from bench import dense_mask_attention
from model import InputError
from vggt import (MINI, VGGT, MiniVGGTTrainer, VGGTConfig, area_under_curve, pose_encoding_to_cameras, pose_errors,
                  quaternion_to_matrix, scene_extrinsics)
from data import RoomPool

TINY = replace(MINI, width=32, depth=2, num_heads=2)
DINO = VGGTConfig(width=32, depth=2, num_heads=2, embed_depth=2, embed_heads=2, position_grid=5, camera_depth=1, camera_heads=2,
                  heads=('camera', 'depth'), dpt_features=8, dpt_channels=(4, 4, 8, 8), dpt_layers=(0, 0, 1, 1))
MASK = torch.tensor([[False, True, False, True], [False, False, True, True]])


def make(config=TINY):
    torch.manual_seed(0)
    backbone = VGGT(config)
    for parameter in backbone.parameters():                   # away from the zeros and tiny numbers of the initialisation
        parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone.freeze()


@pytest.mark.parametrize('config', [TINY, DINO], ids=['mini', 'dinov2'])
def test_context_never_sees_targets(config):
    backbone, p = make(config), config.patch_size
    images = torch.rand(2, 4, 3, 2 * p, 3 * p)
    other = torch.where(MASK[:, :, None, None, None], torch.rand_like(images), images)
    a, b = backbone(images, MASK), backbone(other, MASK)
    assert torch.equal(a.features[~MASK], b.features[~MASK])
    assert not torch.allclose(a.features[MASK], b.features[MASK], atol=1e-3)
    # and targets do see the context
    other = torch.where(MASK[:, :, None, None, None], images, torch.rand_like(images))
    assert not torch.allclose(a.features[MASK], backbone(other, MASK).features[MASK], atol=1e-3)


def test_split_pass_equals_dense_mask_pass(monkeypatch):
    backbone, images = make(), torch.rand(2, 4, 3, 16, 24)
    split = backbone(images, MASK)
    monkeypatch.setattr(model, 'split_attention', dense_mask_attention)
    dense = backbone(images, MASK)
    assert torch.allclose(split.features, dense.features, atol=1e-5)
    assert torch.allclose(split.extrinsics, dense.extrinsics, atol=1e-5)


def test_the_pass_never_makes_a_mask(monkeypatch):
    attention, calls = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q, k, v, attn_mask=None):
        calls.append((q.shape[2], k.shape[2], attn_mask))
        return attention(q, k, v, attn_mask)
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', spy)
    make()(torch.rand(2, 4, 3, 16, 24), MASK)
    P = 3 + 6
    assert all(mask is None for _, _, mask in calls)
    assert calls.count((2 * P, 2 * P, None)) == calls.count((2 * P, 4 * P, None)) == 2      # both global blocks, split in two


def test_no_targets_is_the_plain_pass():
    backbone, images = make(), torch.rand(2, 3, 3, 16, 16)
    assert torch.allclose(backbone(images, torch.zeros(2, 3, dtype=torch.bool)).features, backbone(images).features, atol=1e-6)


def test_batch_mates_change_nothing():
    backbone, images = make(), torch.rand(2, 4, 3, 16, 16)
    together, alone = backbone(images, MASK), backbone(images[1:], MASK[1:])
    assert torch.allclose(together.features[1:], alone.features, atol=1e-5)


def test_frozen_means_frozen():
    backbone = make()
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone.freeze(torch.bfloat16)
    assert backbone.aggregator.frame_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert backbone.aggregator.frame_blocks[0].norm1.weight.dtype == torch.float32
    assert backbone.camera_head.pose_branch.fc1.weight.dtype == torch.float32


def test_only_wanted_layers_are_kept():
    backbone = make()
    patches, grid = backbone.aggregator.embed(torch.rand(1, 2, 3, 16, 16))
    layers = backbone.attend(patches, grid, layers=(0, -1))
    assert sorted(layers) == [-1, 0] and layers[-1].shape == (1, 2, 3 + 4, 64)


def test_loading_is_strict(tmp_path):
    backbone, path = make(DINO), str(tmp_path / 'model.safetensors')
    state = {**backbone.state_dict(), 'track_head.anything': torch.zeros(1)}
    settings = {'config': __import__('json').dumps(__import__('dataclasses').asdict(DINO))}
    save_file(state, path, settings)
    loaded = VGGT.from_pretrained(tmp_path)                   # a folder; the track head is skipped by name
    assert torch.equal(loaded.aggregator.camera_token, backbone.aggregator.camera_token)
    VGGT.from_pretrained(path, heads=('camera',))             # an unused head may be left out on request
    save_file({**state, 'aggregator.surprise': torch.zeros(1)}, path, settings)
    with pytest.raises(InputError, match='unexpected aggregator.surprise'):
        VGGT.from_pretrained(path)
    state.pop('camera_head.trunk_norm.bias')
    save_file(state, path, settings)
    with pytest.raises(InputError, match='missing camera_head.trunk_norm.bias'):
        VGGT.from_pretrained(path)
    with pytest.raises(InputError, match='no weights at nowhere.safetensors'):
        VGGT.from_pretrained('nowhere.safetensors')


def test_image_size_must_fit_the_patches():
    with pytest.raises(InputError, match='20x16 pixels do not divide into patches of 8: crop to 16x16'):
        make()(torch.rand(1, 2, 3, 16, 20))


def test_cameras_from_nine_numbers():
    half = 2 ** -0.5
    pose = torch.tensor([1., 2, 3, 0, 0, half, half, torch.pi / 2, torch.pi / 3])
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, (40, 60))
    assert torch.allclose(extrinsics, torch.tensor([[0., -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]]), atol=1e-6)
    assert torch.allclose(intrinsics, torch.tensor([[30 * 3 ** 0.5, 0, 30], [0, 20, 20], [0, 0, 1]]), atol=1e-4)
    q = torch.randn(7, 4)
    assert torch.allclose(quaternion_to_matrix(q), quaternion_to_matrix(-2 * q), atol=1e-6)


def test_pose_errors():
    pool = RoomPool('val', 0, 4)
    truth = scene_extrinsics(pool.batch(0, 2, 4)['extrinsics'])
    rotation, direction = pose_errors(truth, truth)
    assert rotation.shape == (2, 6) and rotation.max() < 0.1 and direction.max() < 0.1
    turned = truth.clone()
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])              # 90 degrees about the axis, after the first camera
    turned[:, 1:] = turn @ truth[:, 1:]
    rotation, direction = pose_errors(turned, truth)
    assert torch.allclose(rotation[:, :3], torch.tensor(90.0), atol=0.1)
    assert area_under_curve(torch.tensor([1.5, 40.]), torch.tensor([0.5, 0.]), 5) == pytest.approx(0.4)


def test_mini_vggt_learns_every_weight():
    torch.manual_seed(0)
    trainer, pool = MiniVGGTTrainer(TINY), RoomPool('train', 0, 4)
    losses = trainer(**pool.batch(0, 2, 3), match_shift=1)
    losses['loss'].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert [name for name, p in trainer.named_parameters() if p.grad is None] == []


def test_mini_vggt_targets_agree_with_the_renderer():
    """A patch's point, in the first camera's frame, is the same from every view that sees it: depth, rays and cameras agree."""
    trainer, pool = MiniVGGTTrainer(TINY), RoomPool('train', 3, 4)
    batch = pool.batch(0, 4, 4)
    truth = trainer.truth(batch['depth'], batch['extrinsics'], batch['intrinsics'], (64, 64))
    local = truth['points'] @ truth['extrinsics'][:, :, None, :, :3].transpose(-1, -2) + truth['extrinsics'][:, :, None, None, :, 3]
    assert torch.allclose(local[..., 2], truth['depth'], atol=1e-4)
    assert torch.allclose(truth['extrinsics'][:, 0], torch.eye(3, 4).expand(4, 3, 4), atol=1e-5)
    assert torch.allclose(truth['field_of_view'], torch.tensor(80 * torch.pi / 180), atol=1e-5)
