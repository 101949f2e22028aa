"""Equality with numbers measured from the official modules: relative error below 1e-4, fp32, CPU.

    PARITY=some/folder python -m pytest tests/test_parity.py  # default: tests/parity

Every file of the folder says by itself what it pins (`kind`), at which sizes (`config`), with
which weights (names and shapes; each tensor is a pure function of both: `fill`).
"""
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from adapter import Adapter
from common import InputError, load_strictly
from da3 import DA3, DA3Config, config_of
from psfm import PSFM, PSFMConfig
from release import load_released, released_adapter
from train import PRESETS, Config
from vggt import VGGT, VGGTConfig

FOLDER = Path(os.environ.get('PARITY', Path(__file__).parent / 'parity'))
FILES = sorted(FOLDER.glob('*.safetensors'))
assert FILES, f'no fixtures in {FOLDER}'


def fill(name, shape):
    """A weight as a pure function of its name and shape."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    noise = random.standard_normal(tuple(shape)).astype(np.float32)
    leaf = name.rsplit('.', 1)[-1]
    if leaf == 'gamma':
        noise = 0.5 + 0.1 * noise
    elif leaf == 'bias':
        noise = 0.05 * noise
    elif len(shape) == 1:
        noise = 1.0 + 0.1 * noise
    elif leaf == 'weight':
        noise = noise / np.sqrt(np.prod(shape[1:]))
    else:
        noise = 0.5 * noise
    if name.endswith('pose_branch.fc2.weight'):
        noise = 0.1 * noise
    if name.endswith('pose_branch.fc2.bias'):
        noise[7:] += 0.25
    if name.endswith('fc_fov.0.weight'):
        noise = 0.1 * noise
    if name.endswith('fc_fov.0.bias'):
        noise += 1
    return torch.from_numpy(np.ascontiguousarray(noise, dtype=np.float32))


def read(path):
    """-> kind, config, weights, what the official modules were given and gave"""
    with safe_open(path, 'pt') as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    shapes = json.loads(metadata['weights'])
    weights = {name: fill(name, shape) for name, shape in shapes.items()}
    return metadata['kind'], json.loads(metadata['config']), weights, tensors


def assert_close(ours, theirs, what):
    assert ours.shape == theirs.shape, what
    assert (ours - theirs).norm() / theirs.norm() < 1e-4, what


# -----------------------------------------------------------------------------
# VGGT

def build_vggt(config):
    heads = ('camera', 'depth') if 'depth_layers' in config else ('camera',)
    norm = config.get('global_qk_norm', config.get('qk_norm', 'layer'))
    return VGGT(VGGTConfig(
        patch_size=config['patch_size'], width=config['embed_dim'], depth=config['depth'],
        num_heads=config['num_heads'], num_registers=config['num_register_tokens'],
        embed_depth=config['patch_embed_depth'], embed_heads=config['patch_embed_heads'],
        position_grid=config['position_grid'], global_qk_norm=norm,
        camera_depth=config['camera_trunk_depth'], camera_heads=config['camera_num_heads'],
        camera_iterations=config['camera_iterations'], heads=heads,
        dpt_features=config.get('depth_features', 256),
        dpt_channels=tuple(config.get('depth_out_channels', (1, 1, 1, 1))),
        dpt_layers=tuple(config.get('depth_layers', (0,)))))


@torch.no_grad()
def check_vggt(config, weights, given):
    model = build_vggt(config)
    model.load(weights, 'the fixture')
    model.freeze().to(given['images'].device)
    images, mask = given.pop('images'), given.pop('view_mask', None)
    patches, grid = model.embed(images)
    layers = model.attend(patches, grid, mask, layers=(0, -1, *model.config.dpt_layers))
    camera_tokens = layers[-1][:, :, 0]
    views = model(images, mask)
    found = dict(patch_tokens_first=model.patch_features(layers[0]),
                 patch_tokens_last=views.features, camera_tokens_last=camera_tokens,
                 pose_enc=model.camera_head(camera_tokens)[-1],
                 extrinsics=views.extrinsics, intrinsics=views.intrinsics)
    if 'depth' in given:
        depth, confidence = model.depth(layers, grid)
        found.update(depth=depth[..., None], depth_conf=confidence)
    for name, value in given.items():
        assert_close(found[name], value, name)


# -----------------------------------------------------------------------------
# Depth Anything 3

@torch.no_grad()
def check_da3(config, weights, given):
    model = DA3(DA3Config(
        patch_size=config['patch_size'], width=config['embed_dim'], depth=config['depth'],
        num_heads=config['num_heads'], position_grid=config['position_grid'],
        alt_start=config['alt_start'], dpt_layers=tuple(config['out_layers']),
        dpt_features=config['depth_features'], dpt_channels=tuple(config['depth_out_channels'])))
    model.load(weights, 'the fixture')
    model.freeze().to(given['images'].device)
    images, mask = given.pop('images'), given.pop('view_mask', None)
    patches, grid = model.embed(images)
    layers = model.attend(patches, grid, mask, layers=(*model.config.dpt_layers, -1))
    views = model(images, mask)
    first, camera_tokens = layers[model.config.dpt_layers[0]], layers[-1][:, :, 0]
    found = dict(patch_tokens_first=model.patch_features(first), patch_tokens_last=views.features,
                 camera_tokens_last=camera_tokens, pose_enc=model.cam_dec(camera_tokens),
                 extrinsics=views.extrinsics, intrinsics=views.intrinsics)
    found['depth'], found['depth_conf'] = model.depth(layers, grid)
    for name, value in given.items():
        assert_close(found[name], value, name)


# -----------------------------------------------------------------------------
# Spa3R

class Features(torch.nn.Module):
    """In the backbone's place: the fixture gives its output."""

    def __init__(self, dim):
        super().__init__()
        self.feature_dim = dim
        self.config = VGGTConfig(heads=())


class Teacher(torch.nn.Linear):
    """Its weights come from elsewhere: a released checkpoint need not have them."""

    def __init__(self, dim):
        super().__init__(1, 1)
        self.feature_dim = dim


@torch.no_grad()
def check_psfm(config, weights, given):
    teacher = None
    if 'heads.sem.fc2.weight' in weights:
        teacher = Teacher(len(weights['heads.sem.fc2.weight']))
    sizes = PSFMConfig(config['width'], config['encoder_layers'], config['decoder_layers'],
                       config['num_heads'], config['num_latents'], config['num_register_tokens'],
                       depth_probe='depth_prob.fc1.weight' in weights)
    model = PSFM(Features(config['backbone_width']), sizes, teacher)
    load_released(model, weights, 'the fixture')
    size = config['image_height'], config['image_width']
    grid = size[0] // config['patch_size'], size[1] // config['patch_size']
    cameras = given['extrinsics'], given['intrinsics'], size, grid
    mask = given['view_mask']
    context = given['features'][~mask].unflatten(0, (len(mask), -1))
    z = model.encode(context, grid)
    decoded = model.decoder(z, *cameras)
    losses = model.compare('geo', model.heads['geo'](decoded), given['features'])
    assert_close(z, given['latents'], 'latents')
    assert_close(decoded, given['decoded'], 'decoded')
    assert_close(model.decode(z, *cameras), given['pred_geo'], 'pred_geo')
    assert_close(losses['geo_l1'][None], given['loss_geo_l1'], 'loss_geo_l1')
    assert_close(losses['geo_cos'][None], given['loss_geo_cos'], 'loss_geo_cos')


# -----------------------------------------------------------------------------
# the adapter

@torch.no_grad()
def check_adapter(config, weights, given):
    adapter = Adapter(config['latent_width'], config['hidden_size'], config['num_heads'])
    load_strictly(adapter, released_adapter(weights), 'the fixture')
    fused = adapter(given['image_embeds'], given['latents'][0])
    assert_close(fused, given['fused'], 'fused')


# -----------------------------------------------------------------------------
# all of them

CHECKS = {'da3': check_da3, 'da3_masked': check_da3, 'vggt': check_vggt,
          'vggt_masked': check_vggt, 'psfm': check_psfm, 'adapter': check_adapter}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_parity(path):
    kind, config, weights, given = read(path)
    CHECKS[kind](config, weights, given)


def load_vggt(state):
    VGGT().load(state, 'it', assign=True)


def load_psfm(state):
    vggt = VGGTConfig(global_qk_norm='rms')
    psfm = PSFM(VGGT(vggt), Config(**PRESETS['base']), Teacher(1024))
    state = {name.removeprefix('model.'): x for name, x in state.items()}  # as read_released
    load_released(psfm, state, 'it', assign=True)


@pytest.mark.skipif(not (FOLDER / 'released_keys.json').is_file(),
                    reason=f'no released_keys.json in {FOLDER}')
@pytest.mark.parametrize('which, load', [('facebook/VGGT-1B', load_vggt),
                                         ('spa3r.ckpt', load_psfm)])
def test_released_names_load_strictly(which, load):
    """The full-size models take every released name and shape (on 'meta': no memory)."""
    lists = json.loads((FOLDER / 'released_keys.json').read_text())
    shapes = next(shapes for name, shapes in lists.items() if which in name)
    lost = 'global_blocks.7.attn.q_norm.weight'
    with torch.device('meta'):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        load(state)
        state.pop(next(name for name in state if name.endswith(lost)))
        with pytest.raises(InputError, match=lost):
            load(state)


@pytest.mark.skipif(not (FOLDER / 'da3_keys.json').is_file(),
                    reason=f'no da3_keys.json in {FOLDER}')
@pytest.mark.parametrize('which, millions', [('DA3-SMALL', 26), ('DA3-BASE', 103)])
def test_open_names_load_strictly(which, millions):
    shapes = json.loads((FOLDER / 'da3_keys.json').read_text())[which]
    with torch.device('meta'):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = DA3(config_of(state, which))
        model.load(state, which, assign=True)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
        state.pop('model.backbone.pretrained.blocks.7.attn.q_norm.weight')
        with pytest.raises(InputError, match='blocks.7.attn.q_norm.weight'):
            model.load(state, which, assign=True)
