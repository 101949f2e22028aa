"""The backbone: asymmetric masking, freezing, heads, loading."""
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import model
from speed import dense_mask_attention
from common import InputError
from mini_vggt import MINI
from vggt import VGGT, VGGTConfig

TINY = dataclasses.replace(MINI, width=32, depth=2, num_heads=2)
DINO = VGGTConfig(width=32, depth=2, num_heads=2, embed_depth=2, embed_heads=2, position_grid=5,
                  camera_depth=1, camera_heads=2, heads=('camera', 'depth'), dpt_features=8,
                  dpt_channels=(4, 4, 8, 8), dpt_layers=(0, 0, 1, 1))
MASK = torch.tensor([[False, True, False, True], [False, False, True, True]])


def make(config=TINY):
    torch.manual_seed(0)
    backbone = VGGT(config)
    for parameter in backbone.parameters():  # away from the zeros of the initialisation
        parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone.freeze()


def save(state, path, config):
    """Weights in a file, with the config (a dict) in its metadata."""
    save_file(state, path, {'config': json.dumps(config)})


# -----------------------------------------------------------------------------
# masks

@pytest.mark.parametrize('config', [TINY, DINO], ids=['mini', 'dinov2'])
def test_context_never_sees_targets(config):
    backbone, p = make(config), config.patch_size
    images, noise = torch.rand(2, 2, 4, 3, 2 * p, 3 * p)
    is_target = MASK[:, :, None, None, None]
    other = torch.where(is_target, noise, images)
    a, b = backbone(images, MASK), backbone(other, MASK)
    assert torch.equal(a.features[~MASK], b.features[~MASK])
    assert not torch.allclose(a.features[MASK], b.features[MASK], atol=1e-3)
    # and targets do see the context
    other = torch.where(is_target, images, noise)
    c = backbone(other, MASK)
    assert not torch.allclose(a.features[MASK], c.features[MASK], atol=1e-3)


def test_split_pass_equals_dense_mask_pass(monkeypatch):
    backbone, images = make(), torch.rand(2, 4, 3, 16, 24)
    split = backbone(images, MASK)
    monkeypatch.setattr(model, 'split_attention', dense_mask_attention)
    dense = backbone(images, MASK)
    assert torch.allclose(split.features, dense.features, atol=1e-5)
    assert torch.allclose(split.extrinsics, dense.extrinsics, atol=1e-5)


def test_the_pass_never_makes_a_mask(monkeypatch):
    attention, calls = F.scaled_dot_product_attention, []

    def spy(q, k, v, attn_mask=None):
        calls.append((q.shape[2], k.shape[2], attn_mask))
        return attention(q, k, v, attn_mask)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    make()(torch.rand(2, 4, 3, 16, 24), MASK)
    P = 3 + 6
    assert all(mask is None for _, _, mask in calls)
    # both global blocks, split in two
    assert calls.count((2 * P, 2 * P, None)) == 2
    assert calls.count((2 * P, 4 * P, None)) == 2


def test_no_targets_is_the_plain_pass():
    backbone, images = make(), torch.rand(2, 3, 3, 16, 16)
    no_targets = torch.zeros(2, 3, dtype=torch.bool)
    masked, plain = backbone(images, no_targets), backbone(images)
    assert torch.allclose(masked.features, plain.features, atol=1e-6)


# -----------------------------------------------------------------------------
# frozen; its layers and heads

def test_frozen_means_frozen():
    backbone = make()
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone.freeze(torch.bfloat16)
    block = backbone.aggregator.frame_blocks[0]
    assert block.attn.qkv.weight.dtype == torch.bfloat16
    assert block.norm1.weight.dtype == torch.float32
    assert backbone.camera_head.pose_branch.fc1.weight.dtype == torch.float32


def test_only_wanted_layers_are_kept():
    backbone = make()
    patches, grid = backbone.embed(torch.rand(1, 2, 3, 16, 16))
    layers = backbone.attend(patches, grid, layers=(0, -1))
    assert sorted(layers) == [-1, 0]
    assert layers[-1].shape == (1, 2, 3 + 4, 64)
    assert backbone.patch_features(layers[-1]).shape == (1, 2, 4, 64)


@torch.no_grad()
@pytest.mark.parametrize('config', [TINY, DINO], ids=['cells', 'dpt'])
def test_depth_of_a_patch_is_the_mean_over_it(config):
    backbone, p = make(config), config.patch_size
    patches, grid = backbone.embed(torch.rand(1, 5, 3, 2 * p, 3 * p))
    layers = backbone.attend(patches, grid, layers=(*backbone.depth_layers, -1))
    if 'cells' in config.heads:
        depth, logits = backbone.read_out(backbone.patch_features(layers[-1]), grid)
        assert logits.shape == (1, 5, 4, 6, len(config.classes))
    else:
        depth, confidence = backbone.depth(layers, grid)
        assert depth.shape == (1, 5, 2 * p, 3 * p) and confidence.min() > 1
        last = {layer: tokens[:, 4:] for layer, tokens in layers.items()}
        assert torch.allclose(backbone.depth(last, grid)[0], depth[:, 4:], atol=1e-5)
    k = depth.shape[-1] // 3
    mean = depth.unflatten(3, (3, k)).unflatten(2, (2, k)).mean((3, 5)).flatten(2)
    assert depth.std() > 0 and torch.allclose(backbone.patch_depth(layers, grid), mean, atol=1e-5)


def test_image_size_must_fit_the_patches():
    message = '20x16 pixels do not divide into patches of 8: crop to 16x16'
    with pytest.raises(InputError, match=message):
        make()(torch.rand(1, 2, 3, 16, 20))


# -----------------------------------------------------------------------------
# loading

def test_loading_is_strict(tmp_path):
    backbone, path = make(DINO), str(tmp_path / 'model.safetensors')
    state = {**backbone.state_dict(), 'track_head.anything': torch.zeros(1)}
    config = dataclasses.asdict(DINO)
    save(state, path, config)
    loaded = VGGT.from_pretrained(tmp_path)  # a folder; the track head is skipped by name
    assert torch.equal(loaded.aggregator.camera_token, backbone.aggregator.camera_token)
    assert loaded.config == DINO
    save({**state, 'aggregator.surprise': torch.zeros(1)}, path, config)
    with pytest.raises(InputError, match='unexpected aggregator.surprise'):
        VGGT.from_pretrained(path)
    state.pop('camera_head.trunk_norm.bias')
    save(state, path, config)
    with pytest.raises(InputError, match='missing camera_head.trunk_norm.bias'):
        VGGT.from_pretrained(path)
    with pytest.raises(InputError, match='no weights at nowhere.safetensors'):
        VGGT.from_pretrained('nowhere.safetensors')


def test_a_head_that_is_not_built_may_be_in_the_file():
    camera_only = VGGT(dataclasses.replace(DINO, heads=('camera',)))
    camera_only.load(make(DINO).state_dict(), 'it')
    with pytest.raises(InputError, match='missing depth_head'):
        VGGT(DINO).load(camera_only.state_dict(), 'it')


@pytest.mark.parametrize('classes', [{}, {'classes': []}], ids=['none', 'empty'])
def test_cells_that_do_not_name_their_classes_are_refused(tmp_path, classes):
    backbone, path = make(TINY), tmp_path / 'old.safetensors'
    config = dataclasses.asdict(TINY)
    save(backbone.state_dict(), path, config)
    assert VGGT.from_pretrained(path).config.classes == TINY.classes
    config.pop('classes')
    save(backbone.state_dict(), path, {**config, **classes})
    with pytest.raises(InputError, match='old.safetensors .* python mini_vggt.py'):
        VGGT.from_pretrained(path)
