"""
What PSFM asks of a frozen geometry backbone, and what all of them share.

    views = backbone(images)    # images (B, V, 3, H, W) in [0, 1] -> Views

There are two: VGGT (vggt.py) and Depth Anything 3 (da3.py). A third is a subclass of Backbone with
the members that its docstring names, and a line in psfm.open_backbone, which tells files apart;
tests/test_backbone.py says what must hold.
"""
import functools
import math
import os
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common import InputError, fetch, find_file, is_hub_id, read_weights, without_prefix
from model import cast_matrices, full_precision, take_views


class Views(NamedTuple):
    """What the backbone says of a set of views. The world is the first view's camera frame."""
    features: torch.Tensor           # (B, V, N, 2C) patch features of the last layer
    extrinsics: torch.Tensor         # (B, V, 3, 4) world-to-camera
    intrinsics: torch.Tensor         # (B, V, 3, 3) pixels
    grid: tuple                      # (h, w)


def patch_grid(images, patch_size):
    """(h, w): how many patches an image has. InputError if they do not fill it."""
    H, W = images.shape[-2:]
    h, w = H // patch_size, W // patch_size
    if H % patch_size or W % patch_size:
        raise InputError(f'images of {W}x{H} pixels do not divide into patches of {patch_size}: '
                         f'crop to {w * patch_size}x{h * patch_size}')
    return h, w


# -----------------------------------------------------------------------------
# pictures as a backbone takes them

def fit_picture(picture, width, multiple):
    """PIL image -> uint8 array (H, W, 3), `width` pixels wide, and no higher than wide.

    H is a multiple of `multiple`; the excess is cropped evenly above and below.
    """
    excess = picture.height - 4 * picture.width
    if excess > 0:  # a strip: most of it is not even resized
        picture = picture.crop((0, excess // 2, picture.width, picture.height - excess // 2))
    height = max(multiple, round(picture.height * width / picture.width))
    keep = min(height, width) // multiple * multiple
    top = (height - keep) // 2
    picture = picture.convert('RGB').resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)[top:top + keep]


def to_one_height(arrays):
    """Arrays (h, W, 3) of any heights -> uint8 tensor (V, 3, H, W).

    All are cropped, above and below, to the height of the lowest. But one that is less than 0.6 as
    high as most (a panorama among photographs) would make strips of all others: it is enlarged to
    their height, and loses its sides.
    """
    usual = np.median([len(array) for array in arrays])
    H = min(len(array) for array in arrays if len(array) >= 0.6 * usual)
    W = arrays[0].shape[1]
    tiles = []
    for array in arrays:
        if len(array) < H:
            wide = W * H // len(array)
            array = np.asarray(Image.fromarray(array).resize((wide, H), Image.Resampling.BICUBIC))
            array = array[:, (wide - W) // 2:][:, :W]
        tiles.append(array[(len(array) - H) // 2:][:H])
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()


def fit_pictures(pictures, width, multiple):
    """PIL images of one scene -> uint8 tensor (V, 3, H, W), of one height (see to_one_height)."""
    return to_one_height([fit_picture(picture, width, multiple) for picture in pictures])


class ImageNorm(nn.Module):
    """Images in [0, 1], (..., 3, H, W), less ImageNet's mean, over its deviation: as DINO and VGGT
    expect them."""

    def __init__(self):
        super().__init__()
        statistics = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        for name, value in statistics.items():  # in no checkpoint: real even in a model on 'meta'
            value = torch.tensor(value, device='cpu').view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, images):
        return (images - self.mean) / self.std


def resize_positions(positions, grid, **how):
    """Absolute positions (1, G G, C), learned on a square grid, for a grid of h x w patches.
    `how`: the size or the scale that F.interpolate is given, and whether with antialiasing."""
    G = math.isqrt(positions.shape[1])
    if tuple(grid) == (G, G):
        return positions
    positions = positions.float().transpose(1, 2).unflatten(2, (G, G))  # (1, C, G, G)
    positions = F.interpolate(positions, mode='bicubic', **how)
    return positions.flatten(2).transpose(1, 2)  # (1, N, C)


# -----------------------------------------------------------------------------
# the depth head

class ResidualConvUnit(nn.Module):
    """`adds_relu`: the skip adds relu(x) instead of x, because VGGT's ReLU works in place."""

    def __init__(self, dim, adds_relu):
        super().__init__()
        self.adds_relu = adds_relu
        self.conv1, self.conv2 = [nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2)]

    def forward(self, x):
        change = self.conv2(self.conv1(x.relu()).relu())
        return change + (x.relu() if self.adds_relu else x)


class FusionBlock(nn.Module):
    def __init__(self, dim, has_skip, adds_relu):
        super().__init__()
        self.out_conv = nn.Conv2d(dim, dim, 1)
        if has_skip:
            self.resConfUnit1 = ResidualConvUnit(dim, adds_relu)
        self.resConfUnit2 = ResidualConvUnit(dim, adds_relu)

    def forward(self, x, skip=None, size=None):
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = self.resConfUnit2(x)
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.out_conv(F.interpolate(x, size=size, mode='bilinear', align_corners=True))


class DPTHead(nn.Module):
    """Four layers' tokens -> depth and its confidence, as large as the image (arXiv 2103.13413)."""

    def __init__(self, config, adds_relu=True):
        super().__init__()
        dim, features = 2 * config.width, config.dpt_features
        c0, c1, _, c3 = config.dpt_channels
        self.layers, self.patch_size = config.dpt_layers, config.patch_size
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in config.dpt_channels)
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(c0, c0, 4, 4), nn.ConvTranspose2d(c1, c1, 2, 2),
            nn.Identity(), nn.Conv2d(c3, c3, 3, 2, 1)])
        self.scratch = nn.Module()
        for i, c in enumerate(config.dpt_channels, 1):
            convolution = nn.Conv2d(c, features, 3, padding=1, bias=False)
            self.scratch.add_module(f'layer{i}_rn', convolution)
            self.scratch.add_module(f'refinenet{i}', FusionBlock(features, i < 4, adds_relu))
        self.scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, 1))

    @staticmethod
    def add_positions(x, aspect):
        """Adds waves of the place in the image to maps (n, c, h, w). `aspect` = W / H."""
        n, c, h, w = x.shape
        frequency = 100 ** -(torch.arange(c // 4, device=x.device) / (c / 4))
        diagonal = math.hypot(aspect, 1)
        u = torch.linspace(-1, 1, w, device=x.device) * (w - 1) / w * aspect / diagonal
        v = torch.linspace(-1, 1, h, device=x.device) * (h - 1) / h / diagonal
        u = (u * frequency[:, None])[:, None].expand(-1, h, -1)  # (c/4, h, w)
        v = (v * frequency[:, None])[:, :, None].expand(-1, -1, w)
        return x + 0.1 * torch.cat([u.sin(), u.cos(), v.sin(), v.cos()]).to(x.dtype)

    def forward(self, layers, grid):
        """{layer: patch tokens (B, V, N, 2C)} -> (B, V, 2, H, W), not activated."""
        h, w = grid
        aspect = w / h
        B, V = layers[self.layers[-1]].shape[:2]
        maps = []
        for layer, project, resize in zip(self.layers, self.projects, self.resize_layers):
            x = self.norm(layers[layer].flatten(0, 1))  # (B V, N, 2C)
            x = x.transpose(1, 2).unflatten(2, (h, w))  # (B V, 2C, h, w)
            maps.append(resize(self.add_positions(project(x), aspect)))
        s = self.scratch  # fused from the coarsest to the finest
        m1, m2 = s.layer1_rn(maps[0]), s.layer2_rn(maps[1])
        m3, m4 = s.layer3_rn(maps[2]), s.layer4_rn(maps[3])
        x = s.refinenet4(m4, size=m3.shape[-2:])
        x = s.refinenet3(x, m3, size=m2.shape[-2:])
        x = s.refinenet2(x, m2, size=m1.shape[-2:])
        x = s.output_conv1(s.refinenet1(x, m1))
        size = h * self.patch_size, w * self.patch_size
        x = F.interpolate(x, size, mode='bilinear', align_corners=True)
        return s.output_conv2(self.add_positions(x, aspect)).unflatten(0, (B, V))


def count_blocks(state, prefix):
    """The number of blocks below `prefix`, from the names of a state."""
    return len({name.split('.')[0] for name in without_prefix(state, prefix)})


# -----------------------------------------------------------------------------
# the contract

class Backbone(nn.Module):
    """Sees unposed views; never trained with PSFM. A subclass has

        config          patch_size, width C, heads (names of those that are built), dpt_layers
        transformer     embeds and mixes (see below); `freeze` casts its matrices
        num_special     tokens of a view in front of its patches; the first is its camera's
        cameras(tokens, size)  camera tokens (B, V, 2C) -> extrinsics, intrinsics
        depth_head      if 'depth' is among its heads: a DPTHead
        from_state(state, metadata, path)  -> itself, from the names and tensors of a file

    and inherits the rest.
    """
    frozen = False

    @classmethod
    def from_pretrained(cls, source):
        """Loads strictly: a .safetensors file, a folder with model.safetensors, a hub id."""
        path = find_weights(source)
        return cls.from_state(*read_weights(path), path)

    @property
    def feature_dim(self):
        return 2 * self.config.width

    def embed(self, images):
        """-> patch tokens (B, V, N, C) of each view on its own, grid (h, w)"""
        return self.transformer.embed(images)

    def mix(self, patches, grid, num_context, layers):
        """-> {layer: tokens (B, V, P, 2C)}. The first `num_context` views attend to each other
        only, the others to all."""
        return self.transformer.mix(patches, grid, num_context, layers)

    def forward(self, images, view_mask=None):
        """Images (B, V, 3, H, W) in [0, 1] -> Views. Masks as in `attend`."""
        patches, grid = self.embed(images)
        return self.read(self.attend(patches, grid, view_mask)[-1], grid)

    def attend(self, patches, grid, view_mask=None, num_context=None, layers=(-1,)):
        """Patch tokens (B, V, N, C), views in any order -> {layer: tokens (B, V, P, 2C)}.

        `view_mask` (B, V), True = target: context views attend to context views only, targets to
        all ("asymmetric"). Every sample has `num_context` context views, the first view among
        them; giving the number avoids a GPU sync.
        """
        if view_mask is None:
            return self.mix(patches, grid, None, layers)
        if num_context is None:
            num_context = int((~view_mask[0]).sum())
        order = view_mask.int().argsort(dim=1, stable=True)  # (B, V), context first
        outputs = self.mix(take_views(patches, order), grid, num_context, layers)
        back = order.argsort(dim=1)
        return {layer: take_views(tokens, back) for layer, tokens in outputs.items()}

    def patch_features(self, tokens):
        """Tokens (B, V, P, 2C) -> patch features (B, V, N, 2C)."""
        return tokens[:, :, self.num_special:]

    @full_precision
    def read(self, tokens, grid):
        """Last layer's tokens (B, V, P, 2C) -> Views. In fp32: poses are too delicate for bf16."""
        size = [n * self.config.patch_size for n in grid]
        cameras = self.cameras(tokens[:, :, 0].float(), size)
        return Views(self.patch_features(tokens), *cameras, grid)

    @full_precision
    def depth(self, layers, grid):
        """{layer of config.dpt_layers: tokens (B, V, P, 2C)} -> depth, confidence: (B, V, H, W).

        Depth is along the optical axis, in the unit of the cameras' translations.
        """
        patches = {i: self.patch_features(layers[i]).float() for i in self.config.dpt_layers}
        V = patches[self.config.dpt_layers[0]].shape[1]
        outputs = []
        for v in range(0, V, 4):  # the maps are large: four views at once
            part = {i: x[:, v:v + 4] for i, x in patches.items()}
            outputs.append(self.depth_head(part, grid))
        output = torch.cat(outputs, 1)  # (B, V, 2, H, W)
        return output[:, :, 0].exp(), 1 + output[:, :, 1].exp()

    @property
    def has_depth(self):
        return bool({'depth', 'cells'} & set(self.config.heads))

    @property
    def depth_layers(self):
        """The layers that `patch_depth` needs beside the last one."""
        return self.config.dpt_layers if 'depth' in self.config.heads else ()

    def patch_depth(self, layers, grid):
        """Mean depth of every patch, {layer: tokens} -> (B, V, N)."""
        depth, _ = self.depth(layers, grid)
        return F.adaptive_avg_pool2d(depth, grid).flatten(2)

    def freeze(self, dtype=torch.float32):
        """Makes it a teacher for good: no gradients, eval mode that train() cannot undo.

        Only the transformer's matrices are cast to `dtype`: heads compute in fp32 (differs from
        the release, which runs all of it under autocast).
        """
        self.frozen = True
        self.requires_grad_(False).eval()
        cast_matrices(self.transformer, dtype)
        return self

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    @functools.cached_property
    def fingerprint(self):
        """Eight hex digits that tell frozen backbones apart: a checksum of all weights, as bf16
        numbers, so that a cast changes nothing."""
        whole = 0
        for name, x in sorted(self.state_dict().items()):
            numbers = x.detach().to('cpu', torch.bfloat16).contiguous().view(torch.int16).numpy()
            whole = zlib.crc32(numbers.data, zlib.crc32(name.encode(), whole))
        return f'{whole:08x}'


# -----------------------------------------------------------------------------
# files

def find_weights(source):
    """A .safetensors file, a folder with model.safetensors, or a hub id -> path of the file."""
    path = find_file(os.fspath(source))
    if os.path.isdir(path):
        path = os.path.join(path, 'model.safetensors')
    if os.path.isfile(path):
        return path
    if not is_hub_id(path):
        raise InputError(f'no weights at {path}')
    return fetch(path, 'model.safetensors')
