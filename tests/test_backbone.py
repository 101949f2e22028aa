"""What must hold of every backbone: the contract of backbone.Backbone."""
import pytest
import torch
from safetensors.torch import save_file

from backbone import Backbone
from common import InputError
from da3 import DA3, DA3Config
from psfm import PSFM, PSFMConfig, open_backbone
from test_vggt import TINY
from vggt import VGGT

TINY_DA3 = DA3Config(width=64, num_heads=1, dpt_features=16, dpt_channels=(8, 12, 16, 16))
MASK = torch.tensor([[False, True, False, True], [False, False, True, True]])
KINDS = ['vggt', 'da3']


def make(kind):
    torch.manual_seed(0)
    backbone = VGGT(TINY) if kind == 'vggt' else DA3(TINY_DA3)
    for p in backbone.parameters():  # so that every block matters
        torch.nn.init.normal_(p, std=0.3 if p.ndim < 2 else p[0].numel() ** -0.5)
    p = backbone.config.patch_size
    return backbone.freeze(), torch.rand(2, 4, 3, 2 * p, 3 * p)


def differs(a, b):
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_shapes(kind):
    backbone, images = make(kind)
    assert isinstance(backbone, Backbone)
    views = backbone(images)
    assert views.grid == (2, 3)
    assert views.features.shape == (2, 4, 6, backbone.feature_dim)
    assert views.extrinsics.shape == (2, 4, 3, 4) and views.intrinsics.shape == (2, 4, 3, 3)
    rotation = views.extrinsics[..., :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(2, 4, 3, 3), atol=1e-4)
    patches, grid = backbone.embed(images)
    layers = backbone.attend(patches, grid, layers=(*backbone.depth_layers, -1))
    assert backbone.patch_depth(layers, grid).shape == (2, 4, 6)
    with pytest.raises(InputError, match='do not divide into patches'):
        backbone(images[..., 1:])


@pytest.mark.parametrize('kind', KINDS)
def test_context_never_depends_on_targets(kind):
    """Its features, which are all that the encoder is given; VGGT's camera head sees all views."""
    backbone, images = make(kind)
    other = torch.where(MASK[:, :, None, None, None], torch.rand_like(images), images)
    a, b = backbone(images, MASK), backbone(other, MASK)
    assert torch.equal(a.features[~MASK], b.features[~MASK])
    assert differs(a.features[MASK], b.features[MASK])
    # nor do targets see nothing: they depend on the context, and the context on itself
    changed = images.clone()
    changed[:, 0] = torch.rand_like(changed[:, 0])
    c = backbone(changed, MASK)
    assert differs(a.features[MASK], c.features[MASK])
    assert differs(a.features[:, 2][~MASK[:, 2]], c.features[:, 2][~MASK[:, 2]])


@pytest.mark.parametrize('kind', KINDS)
def test_order_of_targets_only_permutes(kind):
    backbone, images = make(kind)
    order, mask = [0, 3, 2, 1], MASK[:1]  # views 1 and 3, the targets, change places
    a, b = backbone(images[:1], mask), backbone(images[:1, order], mask)
    for name in ('features', 'extrinsics', 'intrinsics'):
        assert torch.allclose(getattr(a, name)[:, order], getattr(b, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_batch_mates_change_nothing(kind):
    backbone, images = make(kind)
    both, alone = backbone(images, MASK), backbone(images[1:], MASK[1:])
    assert torch.allclose(both.features[1:], alone.features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_frozen_stays_frozen(kind):
    backbone, images = make(kind)
    config = PSFMConfig(32, 1, 1, 2, 4)
    psfm = PSFM(backbone, config).train()
    assert not any(module.training for module in backbone.modules())
    psfm(images, view_mask=MASK[1:].expand(2, -1))['loss'].backward()
    assert all(p.grad is None for p in backbone.parameters())
    assert psfm.latents(images).shape == (2, 4, 32)


@pytest.mark.parametrize('kind', KINDS)
def test_a_fingerprint_is_of_all_weights_and_of_no_dtype(kind):
    backbone, _ = make(kind)
    same, _ = make(kind)
    assert len(backbone.fingerprint) == 8
    assert same.freeze(torch.bfloat16).fingerprint == backbone.fingerprint
    changed, _ = make(kind)
    matrix = next(p for p in changed.transformer.parameters() if p.ndim == 2)
    matrix[0, 0] += 1
    assert changed.fingerprint != backbone.fingerprint


def test_files_tell_which_backbone_they_hold(tmp_path):
    backbone, images = make('da3')
    path = str(tmp_path / 'model.safetensors')
    state = {f'model.{name}': x for name, x in backbone.state_dict().items()}
    more = {f'model.{name}': torch.ones(1)
            for name in ('cam_enc.token', 'head.scratch.output_conv1_aux')}
    save_file({**state, **more}, path)
    for source in (path, str(tmp_path)):
        assert isinstance(open_backbone(source), DA3)
    mini = open_backbone('weights/mini_vggt.safetensors')
    assert isinstance(mini, VGGT)
    state.pop('model.head.norm.bias')
    save_file(state, path)
    with pytest.raises(InputError, match='missing head.norm.bias'):
        open_backbone(path)
    save_file({'model.backbone.pretrained.cls_token': torch.ones(1, 1, 64)}, path)
    with pytest.raises(InputError, match='is no any-view Depth Anything 3'):
        open_backbone(path)
