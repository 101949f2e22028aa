"""
VGGT, the frozen geometry backbone (arXiv 2503.11651), in one class for all sizes.

Unposed images -> features and cameras. A patch embed turns each image into patch tokens. A camera
token and a few registers join every view. Then `depth` pairs of blocks alternate between *frame*
attention (inside one view) and *global* attention (across all views). The two outputs of the last
pair, concatenated, are the features (.., 2C) that Spa3R predicts. The camera head reads the
camera tokens. Depth heads are optional.

    VGGT.from_pretrained('facebook/VGGT-1B')  # 1 B parameters, patch 14
    VGGT.from_pretrained('weights/mini_vggt.safetensors')  # 3.7 M parameters, patch 8

Module names are those of the released weights, which load without renaming. How the mini VGGT was
trained is in mini_vggt.py. Shapes as in model.py; P = 1 camera token + registers + N.
"""
import json
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import InputError, find_file, load_strictly, read_weights
from model import (IMAGE_STATISTICS, MLP, Block, RoPE2D, cast_matrices, full_precision,
                   init_linear, pose_encoding_to_cameras, take_views)


@dataclass(frozen=True)
class VGGTConfig:
    """Defaults: the released facebook/VGGT-1B."""
    patch_size: int = 14
    width: int = 1024                # C
    depth: int = 24                  # pairs of frame and global blocks
    num_heads: int = 16
    num_registers: int = 4
    patch_embed: str = 'dinov2'      # dinov2 | conv
    embed_depth: int = 24            # DINOv2 only
    embed_heads: int = 16
    position_grid: int = 37          # the patch embed's absolute positions, resized to the image
    global_qk_norm: str = 'layer'    # layer | rms (differs from the release: in its spa3r.ckpt)
    layer_scale: float = 0.01        # 0: none
    camera_depth: int = 4
    camera_heads: int = 16
    camera_iterations: int = 4
    heads: tuple = ('camera', 'depth')    # of camera, depth, point (DPT), cells (the mini's)
    dpt_features: int = 256
    dpt_channels: tuple = (256, 512, 1024, 1024)
    dpt_layers: tuple = (4, 11, 17, 23)
    cells: int = 2                   # the mini's dense heads answer on cells x cells per patch
    classes: tuple = ()              # ... and these are the names of its categories


NORMS = {'layer': nn.LayerNorm, 'rms': nn.RMSNorm}    # of queries and keys in global blocks


class Views(NamedTuple):
    """What the backbone says of a set of views. The world is the first view's camera frame."""
    features: torch.Tensor           # (B, V, N, 2C) patch features of the last layer
    extrinsics: torch.Tensor         # (B, V, 3, 4) world-to-camera
    intrinsics: torch.Tensor         # (B, V, 3, 3) pixels
    grid: tuple                      # (h, w)


# -----------------------------------------------------------------------------
# patch embeds: normalised images (n, 3, H, W) -> patch tokens (n, N, C)

def resize_positions(positions, grid):
    """Absolute positions (1, G G, C), learned on a square grid, for a grid of h x w patches."""
    G = math.isqrt(positions.shape[1])
    if tuple(grid) == (G, G):
        return positions
    positions = positions.float().transpose(1, 2).unflatten(2, (G, G))  # (1, C, G, G)
    positions = F.interpolate(positions, grid, mode='bicubic', antialias=True)
    return positions.flatten(2).transpose(1, 2)  # (1, N, C)


class DINOv2(nn.Module):
    """ViT with registers (arXiv 2304.07193, 2309.16588). Returns the patch tokens."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        projection = nn.Conv2d(3, C, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({'proj': projection})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.position_grid ** 2, C))
        self.register_tokens = nn.Parameter(torch.zeros(1, 4, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C))  # among the released weights, not used
        self.blocks = nn.ModuleList(
            Block(C, config.embed_heads, layer_scale=1.0) for _ in range(config.embed_depth))
        self.norm = nn.LayerNorm(C, eps=1e-6)

    def forward(self, images, grid):
        n = len(images)
        patches = self.patch_embed['proj'](images).flatten(2).transpose(1, 2)  # (n, N, C)
        patches = patches + resize_positions(self.pos_embed[:, 1:], grid)
        cls = self.cls_token + self.pos_embed[:, :1]
        special = torch.cat([cls, self.register_tokens], dim=1).expand(n, -1, -1)
        x = torch.cat([special, patches], dim=1)  # (n, 1 + 4 + N, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 5:])  # (n, N, C)


class ConvStem(nn.Module):
    """The mini's patch embed: three strided convolutions (8 x 8 pixels per patch), and positions.

    Absolute positions beside RoPE are what DINOv2 brings to the real VGGT.
    """

    def __init__(self, config):
        super().__init__()
        C, G = config.width, config.position_grid
        last = config.patch_size // 4
        self.convs = nn.Sequential(
            nn.Conv2d(3, 48, 4, 2, 1), nn.GELU(), nn.Conv2d(48, 96, 4, 2, 1), nn.GELU(),
            nn.Conv2d(96, C, last, last))
        self.norm = nn.LayerNorm(C, eps=1e-6)

        # positions begin as waves of the place in -1 .. 1: rows in one half of C, columns in other
        place = (torch.arange(G) + 0.5) / G * 2 - 1
        octave = 3.5 * torch.arange(C // 4) / (C // 4 - 1) - 1
        angle = place[:, None] * math.pi / 2 * 2 ** octave  # (G, C/4)
        wave = torch.cat([angle.sin(), angle.cos()], -1)  # (G, C/2)
        wave = torch.cat([wave[:, None].expand(-1, G, -1), wave.expand(G, -1, -1)], -1)
        self.pos_embed = nn.Parameter(0.7 * wave.reshape(1, G * G, C))

    def forward(self, images, grid):
        x = self.convs(images).flatten(2).transpose(1, 2)  # (n, N, C)
        return self.norm(x) + resize_positions(self.pos_embed, grid)


# -----------------------------------------------------------------------------
# alternating attention

class Aggregator(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, R = config.width, config.num_registers
        self.patch_size, self.head_dim = config.patch_size, C // config.num_heads
        self.num_special = 1 + R
        self.patch_embed = {'dinov2': DINOv2, 'conv': ConvStem}[config.patch_embed](config)
        # index 0 is for the first view, whose camera is the world, and 1 for all others
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, C) * 1e-6)
        self.register_token = nn.Parameter(torch.randn(1, 2, R, C) * 1e-6)
        self.frame_blocks, self.global_blocks = [
            nn.ModuleList(Block(C, config.num_heads, NORMS[norm], config.layer_scale, eps=1e-5)
                          for _ in range(config.depth))
            for norm in ('layer', config.global_qk_norm)]
        for name, value in IMAGE_STATISTICS.items():      # on the CPU, even of a model on 'meta'
            value = torch.tensor(value, device='cpu').view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def embed(self, images):
        """Images (B, V, 3, H, W) in [0, 1] -> patch tokens (B, V, N, C), grid (h, w).

        Every view is embedded on its own.
        """
        H, W = images.shape[-2:]
        p = self.patch_size
        if H % p or W % p:
            raise InputError(f'images of {W}x{H} pixels do not divide into patches of {p}: '
                             f'crop to {W // p * p}x{H // p * p}')
        grid = H // p, W // p
        normalised = (images.flatten(0, 1) - self.mean) / self.std  # (B V, 3, H, W)
        patches = self.patch_embed(normalised, grid)  # (B V, N, C)
        return patches.unflatten(0, images.shape[:2]), grid

    def attend(self, patches, grid, num_context=None, layers=(-1,)):
        """Patch tokens (B, V, N, C) -> {layer: tokens (B, V, P, 2C)} for the given layers.

        Only these are kept; -1 is the last. With `num_context`, the first so many views see only
        each other, and the others see all (asymmetric masking).
        """
        # the special tokens go in front of every view's patches
        B, V, N, C = patches.shape
        P = self.num_special + N
        special = torch.cat([self.camera_token, self.register_token], 2)  # (1, 2, special, C)
        first, other = special[:, :1], special[:, 1:].expand(-1, V - 1, -1, -1)
        special = torch.cat([first, other], 1).expand(B, -1, -1, -1)  # (B, V, special, C)
        x = torch.cat([special.to(patches.dtype), patches], 2).flatten(0, 1)  # (B V, P, C)

        # frame attention sees P tokens of a view, global attention V P tokens of a scene
        in_frame = RoPE2D(grid, self.head_dim, 1, self.num_special, device=x.device)
        across = RoPE2D(grid, self.head_dim, V, self.num_special, device=x.device)
        context_tokens = None if num_context in (None, V) else num_context * P

        depth = len(self.frame_blocks)
        wanted = {layer % depth for layer in layers}
        outputs = {}
        for i in range(depth):
            frame = self.frame_blocks[i](x.view(B * V, P, C), in_frame)
            x = self.global_blocks[i](frame.view(B, V * P, C), across, context_tokens)
            if i in wanted:
                pair = frame.view(B, V, P, C), x.view(B, V, P, C)
                outputs[i] = torch.cat(pair, dim=-1)  # (B, V, P, 2C)
        return {layer: outputs[layer % depth] for layer in layers}


# -----------------------------------------------------------------------------
# heads

class CameraHead(nn.Module):
    """Camera tokens (B, V, 2C) -> pose encodings (B, V, 9), improved over a few iterations.

    Each iteration modulates the tokens by the current estimate (as DiT does) and corrects it.
    """

    def __init__(self, config):
        super().__init__()
        dim = 2 * config.width
        self.iterations = config.camera_iterations
        self.token_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.trunk = nn.ModuleList(
            Block(dim, config.camera_heads, layer_scale=config.layer_scale, eps=1e-5)
            for _ in range(config.camera_depth))
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = MLP(dim, dim // 2, 9)

    @full_precision
    def forward(self, tokens):
        """-> list of pose encodings (B, V, 9). The last is the answer."""
        tokens = self.token_norm(tokens)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        nothing = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        pose, poses = None, []
        for _ in range(self.iterations):
            estimate = nothing if pose is None else pose.detach()
            modulation = self.poseLN_modulation(self.embed_pose(estimate))
            shift, scale, gate = modulation.chunk(3, dim=-1)
            x = tokens + gate * (normed * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            update = self.pose_branch(self.trunk_norm(x))
            pose = update if pose is None else estimate + update
            # fields of view are never negative
            poses.append(torch.cat([pose[..., :7], pose[..., 7:].relu()], dim=-1))
        return poses


class ResidualConvUnit(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = [nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2)]

    def forward(self, x):
        x = x.relu()  # the residual starts here too: the release's in-place ReLU changes x
        return x + self.conv2(self.conv1(x).relu())


class FusionBlock(nn.Module):
    def __init__(self, dim, has_skip=True):
        super().__init__()
        self.out_conv = nn.Conv2d(dim, dim, 1)
        if has_skip:
            self.resConfUnit1 = ResidualConvUnit(dim)
        self.resConfUnit2 = ResidualConvUnit(dim)

    def forward(self, x, skip=None, size=None):
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = self.resConfUnit2(x)
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.out_conv(F.interpolate(x, size=size, mode='bilinear', align_corners=True))


class DPTHead(nn.Module):
    """Four layers' tokens -> a map as large as the image (arXiv 2103.13413), confidence last."""

    def __init__(self, config, out_channels):
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
            self.scratch.add_module(f'refinenet{i}', FusionBlock(features, has_skip=i < 4))
        self.scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, out_channels, 1))

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
        """{layer: patch tokens (B, V, N, 2C)} -> (B, V, out_channels, H, W), not activated."""
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


class CellHead(nn.Module):
    """The mini's dense head: an MLP on a patch's features answers for k x k cells of the patch."""

    def __init__(self, dim, out_channels, cells):
        super().__init__()
        self.cells = cells
        self.norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dim, cells * cells * out_channels)

    def forward(self, features, grid):
        """(B, V, N, 2C) -> (B, V, k h, k w, out_channels)."""
        k = self.cells
        x = self.mlp(self.norm(features)).float()  # (B, V, N, k k c)
        x = x.unflatten(2, grid).unflatten(-1, (k, k, -1))  # (B, V, h, w, k, k, c)
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


# -----------------------------------------------------------------------------
# the backbone

class VGGT(nn.Module):
    def __init__(self, config=VGGTConfig()):
        super().__init__()
        self.config, self.frozen = config, False
        dim = 2 * config.width
        self.aggregator = Aggregator(config)
        if 'camera' in config.heads:
            self.camera_head = CameraHead(config)
        if 'depth' in config.heads:
            self.depth_head = DPTHead(config, 2)
        if 'point' in config.heads:
            self.point_head = DPTHead(config, 4)
        if 'cells' in config.heads:
            self.depth_cells = CellHead(dim, 1, config.cells)
            self.class_cells = CellHead(dim, len(config.classes), config.cells)
        self.aggregator.apply(init_linear)

    @property
    def feature_dim(self):
        return 2 * self.config.width

    def embed(self, images):
        return self.aggregator.embed(images)

    def forward(self, images, view_mask=None, num_context=None):
        """Images (B, V, 3, H, W) in [0, 1] -> Views. Masks as in `attend`."""
        patches, grid = self.embed(images)
        return self.read(self.attend(patches, grid, view_mask, num_context)[-1], grid)

    def attend(self, patches, grid, view_mask=None, num_context=None, layers=(-1,)):
        """Patch tokens (B, V, N, C), views in any order -> {layer: tokens (B, V, P, 2C)}.

        `view_mask` (B, V), True = target: context views attend to context views only, targets to
        all ("asymmetric"). Every sample has `num_context` context views, the first view among
        them; giving the number avoids a GPU sync.
        """
        if view_mask is None:
            return self.aggregator.attend(patches, grid, layers=layers)
        if num_context is None:
            num_context = int((~view_mask[0]).sum())
        order = view_mask.int().argsort(dim=1, stable=True)  # (B, V), context first
        outputs = self.aggregator.attend(take_views(patches, order), grid, num_context, layers)
        back = order.argsort(dim=1)
        return {layer: take_views(tokens, back) for layer, tokens in outputs.items()}

    def features(self, tokens):
        """Tokens (B, V, P, 2C) -> patch features (B, V, N, 2C)."""
        return tokens[:, :, self.aggregator.num_special:]

    @full_precision
    def read(self, tokens, grid):
        """Last layer's tokens (B, V, P, 2C) -> Views. In fp32: poses are too delicate for bf16."""
        pose = self.camera_head(tokens[:, :, 0].float())[-1]
        size = [n * self.config.patch_size for n in grid]
        return Views(self.features(tokens), *pose_encoding_to_cameras(pose, size), grid)

    @full_precision
    def depth(self, layers, grid):
        """{layer of config.dpt_layers: tokens (B, V, P, 2C)} -> depth, confidence: (B, V, H, W).

        Depth is along the optical axis, in the unit of the cameras' translations.
        """
        patches = {i: self.features(layers[i]).float() for i in self.config.dpt_layers}
        V = patches[self.config.dpt_layers[0]].shape[1]
        outputs = []
        for v in range(0, V, 4):  # the maps are large: four views at once
            part = {i: x[:, v:v + 4] for i, x in patches.items()}
            outputs.append(self.depth_head(part, grid))
        output = torch.cat(outputs, 1)  # (B, V, 2, H, W)
        return output[:, :, 0].exp(), 1 + output[:, :, 1].exp()

    def read_out(self, features, grid):
        """The mini's frozen heads on features (B, V, N, 2C), true or predicted.
        -> depth (B, V, 2h, 2w) in rooms.SCENE_UNITs, class logits (B, V, 2h, 2w, classes)"""
        return self.depth_cells(features, grid)[..., 0].exp(), self.class_cells(features, grid)

    @property
    def depth_layers(self):
        """The layers that `patch_depth` needs beside the last one."""
        return self.config.dpt_layers if 'depth' in self.config.heads else ()

    def patch_depth(self, layers, grid):
        """Mean depth of every patch, {layer: tokens} -> (B, V, N), by the depth head there is."""
        has_cells = 'cells' in self.config.heads
        features = self.features(layers[-1])
        depth, _ = self.read_out(features, grid) if has_cells else self.depth(layers, grid)
        return F.adaptive_avg_pool2d(depth, grid).flatten(2)

    def freeze(self, dtype=torch.float32):
        """Makes it a teacher for good: no gradients, eval mode that train() cannot undo.

        Only the aggregator's matrices are cast to `dtype` (differs from the release: all fp16).
        """
        self.frozen = True
        self.requires_grad_(False).eval()
        cast_matrices(self.aggregator, dtype)
        return self

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    @classmethod
    def from_pretrained(cls, source):
        """Loads weights strictly: a .safetensors file, a folder with model.safetensors, a hub id.

        The file's metadata hold its config; released weights have none, and get the defaults.
        """
        path = find_weights(source)
        state, metadata = read_weights(path)
        config = read_config(metadata['config'], path) if 'config' in metadata else VGGTConfig()
        with torch.device('meta'):  # costs nothing for weights that are replaced at once
            model = cls(config)
        model.load({name: x.float() for name, x in state.items()}, path, assign=True)
        return model

    def load(self, state, source, assign=False):
        """Strict, but for heads that this model is built without. The track head is never built."""
        skip = ['track_head.']
        skip += [f'{head}_head.' for head in ('camera', 'depth', 'point')
                 if head not in self.config.heads]
        if 'cells' not in self.config.heads:
            skip += ['depth_cells.', 'class_cells.']
        load_strictly(self, state, source, tuple(skip), assign)


def read_config(text, path):
    """VGGTConfig from the JSON in a file's metadata. InputError if it is not that of a VGGT."""
    settings = json.loads(text)
    if 'mask_ratio' in settings:
        raise InputError(f'{path} holds the checkpoint of a PSFM run, not a VGGT')
    if 'cells' in settings['heads'] and not settings.get('classes'):
        raise InputError(f'{path} does not name the categories that it tells apart; '
                         'python mini_vggt.py makes a backbone that does')
    return VGGTConfig(**{key: tuple(value) if isinstance(value, list) else value
                         for key, value in settings.items()})


def find_weights(source):
    """A .safetensors file, a folder with model.safetensors, or a hub id -> path of the file."""
    path = find_file(os.fspath(source))
    if os.path.isdir(path):
        path = os.path.join(path, 'model.safetensors')
    if os.path.isfile(path):
        return path
    if path.endswith('.safetensors') or path.count('/') != 1:
        raise InputError(f'no weights at {path}')
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(path, 'model.safetensors')
    except Exception as error:
        raise InputError(f'{path} is neither a file nor a folder here, and the hub did not give it '
                         f'({type(error).__name__}): check name, network and access') from error
