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
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import Backbone, DPTHead, ImageNorm, patch_grid, resize_positions
from common import InputError, load_strictly
from model import MLP, Block, RoPE2D, full_precision, init_linear, pose_encoding_to_cameras


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
    global_qk_norm: str = 'layer'    # layer: VGGT's own | rms: what Spa3R's spa3r.ckpt has there
    layer_scale: float = 0.01        # 0: none
    camera_depth: int = 4
    camera_heads: int = 16
    camera_iterations: int = 4
    heads: tuple = ('camera', 'depth')    # of camera, depth (DPT), cells (the mini's)
    dpt_features: int = 256
    dpt_channels: tuple = (256, 512, 1024, 1024)
    dpt_layers: tuple = (4, 11, 17, 23)
    cells: int = 2                   # the mini's dense heads answer on cells x cells per patch
    classes: tuple = ()              # ... and these are the names of its categories


NORMS = {'layer': nn.LayerNorm, 'rms': nn.RMSNorm}    # of queries and keys in global blocks


# -----------------------------------------------------------------------------
# patch embeds: normalised images (n, 3, H, W) -> patch tokens (n, N, C)

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
        patches = patches + resize_positions(self.pos_embed[:, 1:], grid, size=grid, antialias=True)
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

        # positions begin as waves of the place in -1 .. 1: rows in one half of the channels,
        # columns in the other
        place = (torch.arange(G) + 0.5) / G * 2 - 1
        octave = 3.5 * torch.arange(C // 4) / (C // 4 - 1) - 1
        angle = place[:, None] * math.pi / 2 * 2 ** octave  # (G, C/4)
        wave = torch.cat([angle.sin(), angle.cos()], -1)  # (G, C/2)
        wave = torch.cat([wave[:, None].expand(-1, G, -1), wave.expand(G, -1, -1)], -1)
        self.pos_embed = nn.Parameter(0.7 * wave.reshape(1, G * G, C))

    def forward(self, images, grid):
        x = self.convs(images).flatten(2).transpose(1, 2)  # (n, N, C)
        return self.norm(x) + resize_positions(self.pos_embed, grid, size=grid, antialias=True)


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
        self.image_norm = ImageNorm()

    def embed(self, images):
        """Images (B, V, 3, H, W) in [0, 1] -> patch tokens (B, V, N, C), grid (h, w).

        Every view is embedded on its own.
        """
        grid = patch_grid(images, self.patch_size)
        normalised = self.image_norm(images.flatten(0, 1))  # (B V, 3, H, W)
        patches = self.patch_embed(normalised, grid)  # (B V, N, C)
        return patches.unflatten(0, images.shape[:2]), grid

    def mix(self, patches, grid, num_context, layers):
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

class VGGT(Backbone):
    """Patch embed, alternating attention, and whichever heads the config names."""

    def __init__(self, config=VGGTConfig()):
        super().__init__()
        self.config = config
        dim = 2 * config.width
        self.aggregator = Aggregator(config)
        if 'camera' in config.heads:
            self.camera_head = CameraHead(config)
        if 'depth' in config.heads:
            self.depth_head = DPTHead(config)
        if 'cells' in config.heads:
            self.depth_cells = CellHead(dim, 1, config.cells)
            self.class_cells = CellHead(dim, len(config.classes), config.cells)
        self.aggregator.apply(init_linear)

    @property
    def transformer(self):
        return self.aggregator

    @property
    def num_special(self):
        return self.aggregator.num_special

    def cameras(self, tokens, size):
        return pose_encoding_to_cameras(self.camera_head(tokens)[-1], size)

    @full_precision
    def patch_depth(self, layers, grid):
        if 'cells' not in self.config.heads:
            return super().patch_depth(layers, grid)
        depth = self.depth_cells(self.patch_features(layers[-1]).float(), grid)[..., 0].exp()
        return F.adaptive_avg_pool2d(depth, grid).flatten(2)

    def read_out(self, features, grid):
        """The mini's frozen heads on features (B, V, N, 2C), true or predicted.
        -> depth (B, V, k h, k w) in rooms.SCENE_UNITs, class logits (B, V, k h, k w, classes)"""
        return self.depth_cells(features, grid)[..., 0].exp(), self.class_cells(features, grid)

    @classmethod
    def from_state(cls, state, metadata, path):
        """A file's metadata hold its config; released weights have none, and get the defaults."""
        config = read_config(metadata['config'], path) if 'config' in metadata else VGGTConfig()
        with torch.device('meta'):  # costs nothing for weights that are replaced at once
            model = cls(config)
        model.load({name: x.float() for name, x in state.items()}, path, assign=True)
        return model

    def load(self, state, source, assign=False):
        """Strict, but for heads that this model is built without: tracks and points always."""
        skip = ['track_head.', 'point_head.']
        skip += [f'{head}_head.' for head in ('camera', 'depth') if head not in self.config.heads]
        if 'cells' not in self.config.heads:
            skip += ['depth_cells.', 'class_cells.']
        load_strictly(self, state, source, tuple(skip), assign)


def read_config(text, path):
    """VGGTConfig from the JSON in a file's metadata. InputError if it is not that of a VGGT."""
    try:
        settings = {key: tuple(value) if isinstance(value, list) else value
                    for key, value in json.loads(text).items()}
        if 'mask_ratio' in settings:
            raise InputError(f'{path} holds the checkpoint of a PSFM run, not a VGGT')
        config = VGGTConfig(**settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f'{path}: its config is not that of a VGGT ({error})') from error
    if 'cells' in config.heads and not config.classes:
        raise InputError(f'{path} does not name the categories that it tells apart; '
                         'python mini_vggt.py makes a backbone that does')
    return config
