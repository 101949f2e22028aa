"""
VGGT, the frozen geometry backbone (arXiv 2503.11651), in one class for all sizes.

Unposed images -> features and cameras. A patch embed (DINOv2, or a small
convolutional stem) turns each image into patch tokens; a camera token and a few
registers join every view; then `depth` pairs of attention blocks alternate between
*frame* attention (inside one view) and *global* attention (across all views). The
last pair's two outputs, concatenated, are the features (.., 2C) that Spa3R predicts.
The camera head reads the camera tokens, iteratively; the depth head is optional.

    VGGT.from_pretrained('facebook/VGGT-1B')              # 1 B parameters, patch 14
    VGGT.from_pretrained('weights/mini_vggt.safetensors') # 3.7 M parameters, patch 8, trained on rooms.py

Module names are those of the released weights, so these load without renaming. The
last part of the file holds the losses that train the mini VGGT from scratch
(`python train.py --config mini-vggt`). Shapes as in model.py; P = 1 + registers + N.
"""
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (IMAGE_STATISTICS, MLP, Block, InputError, RoPE2D, camera_rays, cast_matrices, full_precision, init_linear,
                   invert_pose, load_strictly, read_weights, relative_pose, take_views)


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
    position_grid: int = 37          # the patch embed's absolute positions, interpolated to the image
    global_qk_norm: str = 'layer'    # layer | rms: the backbone inside a released spa3r.ckpt has RMSNorm here
    layer_scale: float = 0.01        # 0: none
    camera_depth: int = 4
    camera_heads: int = 16
    camera_iterations: int = 4
    heads: tuple = ('camera', 'depth')        # of camera, depth, point (DPT); and of cells (the mini's depth and classes)
    dpt_features: int = 256
    dpt_channels: tuple = (256, 512, 1024, 1024)
    dpt_layers: tuple = (4, 11, 17, 23)
    cells: int = 2                   # the mini's per-patch heads answer on a grid of cells x cells a patch
    num_classes: int = 11


# patch 8, 64 x 64 images, 3.7 M parameters; no layer scale, because it has to learn in minutes
MINI = VGGTConfig(patch_size=8, width=128, depth=4, num_heads=4, num_registers=2, patch_embed='conv', position_grid=8,
                  layer_scale=0.0, camera_depth=2, camera_heads=4, camera_iterations=2, heads=('camera', 'cells'))
NORMS = {'layer': nn.LayerNorm, 'rms': nn.RMSNorm}


class Views(NamedTuple):
    """What the backbone says of a set of views. The world is the first view's camera frame."""
    features: torch.Tensor           # (B, V, N, 2C) patch features of the last layer
    extrinsics: torch.Tensor         # (B, V, 3, 4) world-to-camera
    intrinsics: torch.Tensor         # (B, V, 3, 3) pixels
    grid: tuple                      # (h, w)


# -----------------------------------------------------------------------------
# patch embeds: images (n, 3, H, W), normalised -> patch tokens (n, N, C)

def resize_positions(positions, grid):
    """Absolute positions (1, G * G, C), learned on a square grid, for a grid of h x w patches."""
    G = math.isqrt(positions.shape[1])
    if tuple(grid) == (G, G):
        return positions
    positions = positions.view(1, G, G, -1).permute(0, 3, 1, 2)
    positions = F.interpolate(positions.float(), size=grid, mode='bicubic', antialias=True)
    return positions.flatten(2).transpose(1, 2)


class PatchProjection(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """ViT with registers (arXiv 2304.07193, 2309.16588); only its patch tokens leave."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.patch_embed = PatchProjection(config.patch_size, C)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.position_grid ** 2, C))
        self.register_tokens = nn.Parameter(torch.zeros(1, 4, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C))      # never used; among the released weights
        self.blocks = nn.ModuleList(Block(C, config.embed_heads, layer_scale=1.0) for _ in range(config.embed_depth))
        self.norm = nn.LayerNorm(C, eps=1e-6)

    def forward(self, images, grid):
        n = len(images)
        x = self.patch_embed(images)                                                      # (n, N, C)
        x = x + resize_positions(self.pos_embed[:, 1:], grid)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1)
        x = torch.cat([cls, self.register_tokens.expand(n, -1, -1), x], dim=1)            # (n, 1 + 4 + N, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 5:])


class ConvStem(nn.Module):
    """The mini's patch embed: three strided convolutions (8 x 8 pixels a patch) and an absolute position.

    Absolute positions beside RoPE are what DINOv2 brings to the real VGGT.
    """

    def __init__(self, config):
        super().__init__()
        C, G = config.width, config.position_grid
        self.convs = nn.Sequential(nn.Conv2d(3, 48, 4, 2, 1), nn.GELU(), nn.Conv2d(48, 96, 4, 2, 1), nn.GELU(),
                                   nn.Conv2d(96, C, config.patch_size // 4, config.patch_size // 4))
        self.norm = nn.LayerNorm(C, eps=1e-6)
        place = ((torch.arange(G) + 0.5) / G * 2 - 1)[:, None] * math.pi / 2 * 2 ** (3.5 * torch.arange(C // 4) / (C // 4 - 1) - 1)
        place = torch.cat([place.sin(), place.cos()], -1)                                 # (G, C/2)
        place = torch.cat([place[:, None].expand(-1, G, -1), place.expand(G, -1, -1)], -1)
        self.pos_embed = nn.Parameter(0.7 * place.reshape(1, G * G, C))

    def forward(self, images, grid):
        x = self.convs(images).flatten(2).transpose(1, 2)                                 # (n, N, C)
        return self.norm(x) + resize_positions(self.pos_embed, grid)


# -----------------------------------------------------------------------------
# alternating attention

class Aggregator(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, scale = config.width, config.layer_scale
        self.patch_size, self.head_dim, self.num_special = config.patch_size, C // config.num_heads, 1 + config.num_registers
        self.patch_embed = DINOv2(config) if config.patch_embed == 'dinov2' else ConvStem(config)
        # index 0 for the first view, 1 for all others: the first view's camera is the world
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, C) * 1e-6)
        self.register_token = nn.Parameter(torch.randn(1, 2, config.num_registers, C) * 1e-6)
        make = lambda norm: nn.ModuleList(Block(C, config.num_heads, NORMS[norm], scale, eps=1e-5) for _ in range(config.depth))
        self.frame_blocks, self.global_blocks = make('layer'), make(config.global_qk_norm)
        for name, value in IMAGE_STATISTICS.items():
            self.register_buffer(name, torch.tensor(value, device='cpu').view(3, 1, 1), persistent=False)

    def embed(self, images):
        """Images (B, V, 3, H, W) in [0, 1] -> patch tokens (B, V, N, C), each view on its own, and the grid (h, w)."""
        H, W = images.shape[-2:]
        p = self.patch_size
        if H % p or W % p:
            raise InputError(f'images of {W}x{H} pixels do not divide into patches of {p}: crop to {W // p * p}x{H // p * p}')
        patches = self.patch_embed((images.flatten(0, 1) - self.mean) / self.std, (H // p, W // p))
        return patches.unflatten(0, images.shape[:2]), (H // p, W // p)

    def attend(self, patches, grid, num_context=None, layers=(-1,)):
        """Patch tokens (B, V, N, C) -> {layer: tokens (B, V, P, 2C)}, only for the layers asked for (-1: the last).

        With `num_context`, the first so many views see only each other, the others see all (asymmetric masking).
        """
        B, V, N, C = patches.shape
        P = self.num_special + N
        special = torch.cat([self.camera_token, self.register_token], 2)                  # (1, 2, 1 + registers, C)
        special = torch.cat([special[:, :1], special[:, 1:].expand(-1, V - 1, -1, -1)], 1).expand(B, -1, -1, -1)
        x = torch.cat([special.to(patches.dtype), patches], 2).flatten(0, 1)              # (B V, P, C)
        in_frame = RoPE2D(self.num_special, grid, self.head_dim, device=x.device)
        across = RoPE2D(self.num_special, grid, self.head_dim, repeats=V, device=x.device)
        context_tokens = None if num_context in (None, V) else num_context * P
        outputs, depth = {}, len(self.frame_blocks)
        wanted = {layer % depth for layer in layers}
        for i, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks)):
            x = frame = frame_block(x.view(B * V, P, C), in_frame)
            x = global_block(x.view(B, V * P, C), across, context_tokens)
            if i in wanted:
                outputs[i] = torch.cat([frame.view(B, V, P, C), x.view(B, V, P, C)], dim=-1)
        return {layer: outputs[layer % depth] for layer in layers}


# -----------------------------------------------------------------------------
# cameras

def quaternion_to_matrix(q):
    """Quaternions (..., 4), scalar last, of any length but zero -> rotations (..., 3, 3)."""
    x, y, z, w = F.normalize(q, dim=-1).unbind(-1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
                        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
                        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1).unflatten(-1, (3, 3))


def pose_encoding_to_cameras(pose, size):
    """VGGT's 9 numbers (translation 3, quaternion 4, vertical and horizontal field of view in radians) -> cameras.

    pose (..., 9), `size` = (H, W) pixels -> extrinsics (..., 3, 4) world-to-camera, intrinsics (..., 3, 3) in pixels.
    """
    H, W = size
    # differs from the release: kept off 0 and pi, where the focal length is infinite or zero, and all that follows is NaN
    fov = pose[..., 7:].clamp(0.02, 3.1)
    extrinsics = torch.cat([quaternion_to_matrix(pose[..., 3:7]), pose[..., :3, None]], dim=-1)
    fy, fx = (H / 2) / (fov[..., 0] / 2).tan(), (W / 2) / (fov[..., 1] / 2).tan()
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    intrinsics = torch.stack([fx, zero, one * (W / 2), zero, fy, one * (H / 2), zero, zero, one], -1)
    return extrinsics, intrinsics.unflatten(-1, (3, 3))


class CameraHead(nn.Module):
    """Camera tokens (B, V, 2C) -> pose encodings (B, V, 9), improved over a few iterations.

    Each iteration modulates the tokens by the current estimate (as DiT does) and adds a correction to it.
    """

    def __init__(self, config):
        super().__init__()
        dim = 2 * config.width
        self.iterations = config.camera_iterations
        self.token_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.trunk = nn.ModuleList(Block(dim, config.camera_heads, layer_scale=config.layer_scale, eps=1e-5)
                                   for _ in range(config.camera_depth))
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = MLP(dim, dim // 2, 9)

    @full_precision
    def forward(self, tokens):
        """-> list of pose encodings (B, V, 9), the last is the answer. Fields of view are never negative."""
        tokens, pose, poses = self.token_norm(tokens), None, []
        for _ in range(self.iterations):
            estimate = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if pose is None else pose.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(estimate)).chunk(3, dim=-1)
            x = tokens + gate * (F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            update = self.pose_branch(self.trunk_norm(x))
            pose = update if pose is None else estimate + update
            poses.append(torch.cat([pose[..., :7], pose[..., 7:].relu()], dim=-1))
        return poses


# -----------------------------------------------------------------------------
# dense heads

class ResidualConvUnit(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        x = x.relu()      # the residual starts here too: the release's in-place ReLU changes its input
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
    """Four layers' tokens -> a map at image resolution (arXiv 2103.13413), `out_channels` of them, the last a confidence."""

    def __init__(self, config, out_channels):
        super().__init__()
        dim, (c0, c1, _, c3), features = 2 * config.width, config.dpt_channels, config.dpt_features
        self.layers, self.patch_size = config.dpt_layers, config.patch_size
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in config.dpt_channels)
        self.resize_layers = nn.ModuleList([nn.ConvTranspose2d(c0, c0, 4, 4), nn.ConvTranspose2d(c1, c1, 2, 2),
                                            nn.Identity(), nn.Conv2d(c3, c3, 3, 2, 1)])
        self.scratch = nn.Module()
        for i, c in enumerate(config.dpt_channels, 1):
            self.scratch.add_module(f'layer{i}_rn', nn.Conv2d(c, features, 3, padding=1, bias=False))
            self.scratch.add_module(f'refinenet{i}', FusionBlock(features, has_skip=i < 4))
        self.scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(),
                                                  nn.Conv2d(32, out_channels, 1))

    @staticmethod
    def add_positions(x, aspect):
        """Adds a small sinusoid of the place in the image to maps (n, c, h, w); `aspect` = W / H of the image."""
        n, c, h, w = x.shape
        diagonal = math.hypot(aspect, 1)
        u = torch.linspace(-1, 1, w, device=x.device) * (w - 1) / w * aspect / diagonal
        v = torch.linspace(-1, 1, h, device=x.device) * (h - 1) / h / diagonal
        frequency = 100 ** -(torch.arange(c // 4, device=x.device) / (c / 4))
        wave = lambda a: torch.cat([(a[:, None] * frequency).sin(), (a[:, None] * frequency).cos()], -1)
        u, v = wave(u).T[:, None, :].expand(-1, h, -1), wave(v).T[:, :, None].expand(-1, -1, w)   # (c/2, h, w)
        return x + 0.1 * torch.cat([u, v]).to(x.dtype)

    def forward(self, layers, grid):
        """{layer: patch tokens (B, V, N, 2C)} -> (B, V, out_channels, H, W), before any activation."""
        (h, w), (B, V) = grid, layers[self.layers[-1]].shape[:2]
        maps = []
        for layer, project, resize in zip(self.layers, self.projects, self.resize_layers):
            x = self.norm(layers[layer].flatten(0, 1)).transpose(1, 2).unflatten(2, (h, w))  # (B V, 2C, h, w)
            maps.append(resize(self.add_positions(project(x), w / h)))
        s = self.scratch
        m1, m2, m3, m4 = s.layer1_rn(maps[0]), s.layer2_rn(maps[1]), s.layer3_rn(maps[2]), s.layer4_rn(maps[3])
        x = s.refinenet4(m4, size=m3.shape[-2:])
        x = s.refinenet3(x, m3, size=m2.shape[-2:])
        x = s.refinenet2(x, m2, size=m1.shape[-2:])
        x = s.output_conv1(s.refinenet1(x, m1))
        x = F.interpolate(x, size=(h * self.patch_size, w * self.patch_size), mode='bilinear', align_corners=True)
        return s.output_conv2(self.add_positions(x, w / h)).unflatten(0, (B, V))


class CellHead(nn.Module):
    """The mini's dense head: an MLP on each patch's features answers for `cells` x `cells` cells of the patch."""

    def __init__(self, dim, out_channels, cells):
        super().__init__()
        self.cells = cells
        self.norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dim, cells * cells * out_channels)

    def forward(self, features, grid):
        """(B, V, N, 2C) -> (B, V, cells h, cells w, out_channels)."""
        (h, w), k = grid, self.cells
        x = self.mlp(self.norm(features)).float().unflatten(2, (h, w)).unflatten(-1, (k, k, -1))  # (B, V, h, w, k, k, c)
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


# -----------------------------------------------------------------------------
# the backbone

class VGGT(nn.Module):
    def __init__(self, config=VGGTConfig()):
        super().__init__()
        self.config, self.frozen = config, False
        self.aggregator = Aggregator(config)
        if 'camera' in config.heads:
            self.camera_head = CameraHead(config)
        if 'depth' in config.heads:
            self.depth_head = DPTHead(config, 2)
        if 'point' in config.heads:
            self.point_head = DPTHead(config, 4)
        if 'cells' in config.heads:
            self.depth_cells = CellHead(2 * config.width, 1, config.cells)
            self.class_cells = CellHead(2 * config.width, config.num_classes, config.cells)
        self.aggregator.apply(init_linear)

    @property
    def feature_dim(self):
        return 2 * self.config.width

    def forward(self, images, view_mask=None, num_context=None):
        """Images (B, V, 3, H, W) in [0, 1] -> Views.

        `view_mask` (B, V), True = target: context views attend to context views only, targets to all ("asymmetric").
        Every sample has the same number of context views, the first view among them; naming it as `num_context`
        spares the device a question.
        """
        patches, grid = self.aggregator.embed(images)
        tokens = self.attend(patches, grid, view_mask, num_context)[-1]
        return self.read(tokens, grid)

    def attend(self, patches, grid, view_mask=None, num_context=None, layers=(-1,)):
        """The aggregator's `attend` in any order of views: sorted context first on the way in, unsorted on the way out."""
        if view_mask is None:
            return self.aggregator.attend(patches, grid, layers=layers)
        if num_context is None:
            num_context = int((~view_mask[0]).sum())
        order = view_mask.int().argsort(dim=1, stable=True)                               # (B, V)
        back = order.argsort(dim=1)
        outputs = self.aggregator.attend(take_views(patches, order), grid, num_context, layers)
        return {layer: take_views(tokens, back) for layer, tokens in outputs.items()}

    @full_precision
    def read(self, tokens, grid):
        """Last layer's tokens (B, V, P, 2C) -> Views. Heads run in fp32: poses are too delicate for bf16."""
        pose = self.camera_head(tokens[:, :, 0].float())[-1]
        size = grid[0] * self.config.patch_size, grid[1] * self.config.patch_size
        extrinsics, intrinsics = pose_encoding_to_cameras(pose, size)
        return Views(tokens[:, :, self.aggregator.num_special:], extrinsics, intrinsics, grid)

    @full_precision
    def depth(self, layers, grid):
        """Depth by the DPT head: {layer: tokens (B, V, P, 2C)} for the layers of config.dpt_layers -> depth, confidence.

        Both (B, V, H, W); depth is along the optical axis, in the unit of the cameras' translations.
        """
        patches = {layer: layers[layer][:, :, self.aggregator.num_special:].float() for layer in self.config.dpt_layers}
        V = patches[self.config.dpt_layers[0]].shape[1]       # four views at a time: maps of full resolution are large
        out = torch.cat([self.depth_head({layer: x[:, v:v + 4] for layer, x in patches.items()}, grid) for v in range(0, V, 4)], 1)
        return out[:, :, 0].exp(), 1 + out[:, :, 1].exp()

    def read_out(self, features, grid):
        """The mini's frozen heads on features (B, V, N, 2C), true or predicted.

        -> depth (B, V, 2h, 2w) in units of SCENE_UNIT metres, class logits (B, V, 2h, 2w, classes of rooms.CLASSES).
        """
        return self.depth_cells(features, grid)[..., 0].exp(), self.class_cells(features, grid)

    def patch_depth(self, layers, grid):
        """Mean depth of every patch, {layer: tokens (B, V, P, 2C)} -> (B, V, N), by whichever depth head there is."""
        if 'cells' in self.config.heads:
            depth = self.read_out(layers[-1][:, :, self.aggregator.num_special:], grid)[0]
        else:
            depth = self.depth(layers, grid)[0]
        return F.adaptive_avg_pool2d(depth, grid).flatten(2)

    def freeze(self, dtype=torch.float32):
        """Makes it a teacher for good: eval mode that train() cannot undo, no gradients, matrices kept in `dtype`.

        Only the aggregator's linear and convolutional layers change dtype (what autocast would cast on every call);
        norms, tokens and heads stay in fp32.
        """
        self.frozen = True
        self.requires_grad_(False).eval()
        cast_matrices(self.aggregator, dtype)
        return self

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    # -------------------------------------------------------------------------
    # weights

    @classmethod
    def from_pretrained(cls, source, heads=None):
        """Loads weights strictly. `source`: a .safetensors file, a folder with model.safetensors, or a hub id.

        `heads`: which heads to build (default: those of the file's own config, or camera and depth for the released
        weights); the weights of heads that were not asked for are skipped by name, and no others.
        """
        path = find_weights(source)
        state, metadata = read_weights(path)
        if 'config' in metadata:
            settings = json.loads(metadata['config'])
            if 'task' in settings:
                raise InputError(f'{path} holds the checkpoint of a run ({settings["task"]}), not a VGGT')
            config = VGGTConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        else:
            config = VGGTConfig()
        if heads is not None:
            config = VGGTConfig(**{**asdict(config), 'heads': tuple(heads)})
        with torch.device('meta'):                            # no memory and no time for weights that are about to be replaced
            model = cls(config)
        model.load({name: tensor.float() for name, tensor in state.items()}, path, assign=True)
        return model

    def load(self, state, source, assign=False):
        """Strict, but for the heads that this model was built without, the track head always among them."""
        names = {'camera_head.': 'camera', 'depth_head.': 'depth', 'point_head.': 'point', 'depth_cells.': 'cells', 'class_cells.': 'cells'}
        skip = ['track_head.'] + [name for name, head in names.items() if head not in self.config.heads]
        load_strictly(self, state, source, skip, assign)


def find_weights(source):
    """A .safetensors file, a folder that holds model.safetensors, or a hub id -> path of the file."""
    source = os.fspath(source)
    if os.path.isdir(source):
        source = os.path.join(source, 'model.safetensors')
    if os.path.isfile(source):
        return source
    if source.endswith('.safetensors') or source.count('/') != 1:
        raise InputError(f'no weights at {source}')
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(source, 'model.safetensors')
    except Exception as error:
        raise InputError(f'{source} is neither a file nor a folder here, and the hub did not give it '
                                f'({type(error).__name__}): check the name, the network and your access') from error


# -----------------------------------------------------------------------------
# training the mini VGGT on rooms, where cameras, depth and categories are known

SCENE_UNIT = 3.0      # metres: translations and depths are learned in this unit, so that they are near 1


def scene_extrinsics(extrinsics):
    """A source's extrinsics (B, V, 3, 4), metres, any world -> as the mini VGGT states them: first camera's frame, SCENE_UNITs."""
    extrinsics = relative_pose(extrinsics, extrinsics[:, :1])
    return torch.cat([extrinsics[..., :3], extrinsics[..., 3:] / SCENE_UNIT], -1)


class MiniVGGTTrainer(nn.Module):
    """The mini VGGT with the heads that only its training needs, and its losses.

    Cameras alone teach too little. Beside them: `match`, which makes patches of different views that see the same 3-D
    point look alike, dense targets, each camera's own stand in the room, and a curriculum from two close views to six
    of any motion (train.py). The category loss stands in for what the real VGGT inherits from DINOv2.
    """
    WEIGHTS = dict(translation=1.7, rotation=3.0, field_of_view=1.0, depth=1.0, points=2.0, classes=0.3, gravity=0.5, match=0.1)

    def __init__(self, config=MINI):
        super().__init__()
        self.vggt = VGGT(config)
        dim = 2 * config.width
        self.point_cells = CellHead(dim, 3, config.cells)
        self.match_head = CellHead(dim, 32, 1)
        self.gravity_head = nn.Sequential(nn.LayerNorm(dim), MLP(dim, config.width, 6))
        nn.init.normal_(self.vggt.aggregator.camera_token, std=0.3)
        nn.init.normal_(self.vggt.aggregator.register_token, std=0.3)
        # poses start at the identity: from a random start, the first view's quaternion can settle half a turn away for good
        last = self.vggt.camera_head.pose_branch.fc2
        nn.init.normal_(last.weight, std=0.002)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 1.4, 1.4]) / config.camera_iterations)

    def forward(self, images, depth, classes, extrinsics, intrinsics, match_shift):
        """A batch of data.RoomPool; `match_shift` in 1 .. V - 1. -> losses, unweighted, and 'loss', their weighted sum."""
        vggt, size = self.vggt, images.shape[-2:]
        truth = self.truth(depth, extrinsics, intrinsics, size)
        patches, grid = vggt.aggregator.embed(images)
        tokens = vggt.aggregator.attend(patches, grid)[-1]                                # (B, V, P, 2C)
        features, camera_tokens = tokens[:, :, vggt.aggregator.num_special:], tokens[:, :, 0]
        poses = vggt.camera_head(camera_tokens.float())
        log_depth, logits = vggt.depth_cells(features, grid)[..., 0], vggt.class_cells(features, grid)
        points = self.point_cells(features, grid)                                         # (B, V, 2h, 2w, 3)
        descriptors = F.normalize(self.match_head(features, grid), dim=-1).flatten(2, 3)  # (B, V, N, 32)
        gravity = self.gravity_head(camera_tokens).float()

        losses = dict(translation=0.0, rotation=0.0, field_of_view=0.0)
        total = sum(0.6 ** i for i in range(len(poses)))
        for i, pose in enumerate(reversed(poses)):                                        # the last iteration counts most
            predicted, _ = pose_encoding_to_cameras(pose, size)
            error = (predicted - truth['extrinsics']).abs()
            # of matrices, for q and -q are one rotation; the length of q says nothing, and is kept near 1
            losses['rotation'] += 0.6 ** i / total * (error[..., :3].mean() + 0.1 * (pose[..., 3:7].norm(dim=-1) - 1).square().mean())
            losses['translation'] += 0.6 ** i / total * error[..., 3].mean()
            losses['field_of_view'] += 0.6 ** i / total * (pose[..., 7:] - truth['field_of_view']).abs().mean()
        losses['depth'] = (log_depth - truth['depth'].log()).abs().mean()
        losses['points'] = F.smooth_l1_loss(points, truth['points'], beta=0.1)
        losses['classes'] = F.cross_entropy(logits.flatten(0, 3), classes.flatten())
        losses['gravity'] = (gravity - truth['gravity']).abs().mean()
        losses['match'] = self.match_loss(descriptors, truth['patch_points'], match_shift)
        losses['loss'] = sum(weight * losses[name] for name, weight in self.WEIGHTS.items())
        return losses

    @full_precision
    def truth(self, depth, room_extrinsics, intrinsics, size):
        """Targets in the first camera's frame and in SCENE_UNITs, from cameras and depth in the room's frame."""
        extrinsics = scene_extrinsics(room_extrinsics)
        depth = depth / SCENE_UNIT                                                        # (B, V, 2h, 2w)
        cells = depth.shape[-2:]
        rays = camera_rays(intrinsics, size, cells).unflatten(2, cells)          # (B, V, 2h, 2w, 3)
        inverse = invert_pose(extrinsics)[:, :, None, None]
        points = (inverse[..., :3] @ (depth[..., None] * rays)[..., None] + inverse[..., 3:])[..., 0]
        k = self.vggt.config.cells
        patch_points = points.unflatten(3, (-1, k)).unflatten(2, (-1, k)).mean((3, 5)).flatten(2, 3)   # (B, V, N, 3)
        focal = intrinsics[..., [1, 0], [1, 0]]
        field_of_view = 2 * torch.atan(focal.new_tensor(size) / 2 / focal)                # (B, V, 2) vertical, horizontal
        # each camera by itself: which way is up, how it stands to the walls (a room looks alike four ways), how high
        yaw = 4 * torch.atan2(room_extrinsics[..., 2, 1], room_extrinsics[..., 2, 0])
        height = invert_pose(room_extrinsics)[..., 2, 3]
        gravity = torch.cat([room_extrinsics[..., 2], torch.stack([yaw.cos(), yaw.sin(), 4 * (height - 1.6)], -1)], -1)
        return dict(extrinsics=extrinsics, depth=depth, points=points, patch_points=patch_points,
                    field_of_view=field_of_view, gravity=gravity)

    @staticmethod
    def match_loss(descriptors, points, shift, radius=0.08, temperature=0.07):
        """InfoNCE between each view and the one `shift` further: descriptors (B, V, N, 32), points (B, V, N, 3).

        A patch's positive is the other view's patch nearest in space; patches with none within `radius` are left out.
        """
        other, other_points = descriptors.roll(shift, 1), points.roll(shift, 1)
        distance, match = torch.cdist(points, other_points).min(-1)                       # (B, V, N)
        logits = descriptors @ other.transpose(-1, -2) / temperature                      # (B, V, N, N)
        loss = F.cross_entropy(logits.flatten(0, 2), match.flatten(), reduction='none').view_as(distance)
        seen = (distance < radius).float()
        return (loss * seen).sum() / seen.sum().clamp(min=1)


def pose_errors(extrinsics, truth):
    """Errors over all pairs of views (VGGT, section 4.1): (B, V, 3, 4) twice -> rotation, translation direction (B, pairs), degrees."""
    i, j = torch.triu_indices(*[extrinsics.shape[1]] * 2, offset=1, device=extrinsics.device)
    ours, theirs = relative_pose(extrinsics[:, j], extrinsics[:, i]), relative_pose(truth[:, j], truth[:, i])
    trace = (ours[..., :3] * theirs[..., :3]).sum((-1, -2))
    rotation = ((trace - 1) / 2).clamp(-1, 1).acos()
    direction = F.cosine_similarity(ours[..., 3], theirs[..., 3], dim=-1).clamp(-1, 1).acos()
    return rotation.rad2deg(), direction.rad2deg()


def area_under_curve(rotation, direction, limit):
    """AUC@limit: mean over thresholds 1 .. limit degrees of the share of pairs whose worse error is below."""
    worst = torch.maximum(rotation, direction).flatten()
    return torch.stack([(worst < k).float().mean() for k in range(1, limit + 1)]).mean().item()
