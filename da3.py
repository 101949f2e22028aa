"""
The open backbone: Depth Anything 3 (arXiv 2511.10647), any-view, SMALL and BASE, Apache 2.0.

One plain ViT. Its first blocks see each view alone, and are the patch embed here. From `alt_start`
on, even blocks see one view and odd blocks all views, with a camera token in the place of the
class token.

    DA3.from_pretrained('depth-anything/DA3-SMALL')     # 34 M parameters in the file, patch 14

Module names are those of the released weights without their first 'model.'. Shapes as in model.py;
P = 1 camera token + N.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from backbone import (Backbone, DPTHead, ImageNorm, count_blocks, patch_grid,
                      resize_positions)
from common import InputError, load_strictly, without_prefix
from model import Block, RoPE2D, init_linear, invert_pose, pose_encoding_to_cameras


@dataclass(frozen=True)
class DA3Config:
    """Defaults: DA3-SMALL."""
    patch_size: int = 14
    width: int = 384                 # C
    depth: int = 12
    num_heads: int = 6
    position_grid: int = 37
    alt_start: int = 4               # the first block after those that see each view alone
    dpt_layers: tuple = (5, 7, 9, 11)
    dpt_features: int = 64
    dpt_channels: tuple = (48, 96, 192, 384)
    heads: tuple = ('camera', 'depth')


def places_in_scene(num_views, num_patches, head_dim, device):
    """Positions in the blocks that see all views: every patch is at (1, 1), camera tokens at 0.

    Such a block knows which tokens are cameras, but not where a patch is.
    """
    position = RoPE2D((1, 1), head_dim, special_per_view=1, device=device)  # tables of two rows
    row = torch.ones(1 + num_patches, dtype=torch.long, device=device)
    row[:1] = 0
    row = row.repeat(num_views)
    position.cos, position.sin = position.cos[row], position.sin[row]
    return position


class ViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.width
        self.config = config
        projection = nn.Conv2d(3, C, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({'proj': projection})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.position_grid ** 2, C))
        # index 0 is for the first view, whose camera is the world, and 1 for all others
        self.camera_token = nn.Parameter(torch.randn(1, 2, C) * 1e-6)
        self.blocks = nn.ModuleList(
            Block(C, config.num_heads, nn.LayerNorm if i >= config.alt_start else None, 1.0)
            for i in range(config.depth))
        self.norm = nn.LayerNorm(C)
        self.image_norm = ImageNorm()

    def embed(self, images):
        """Images (B, V, 3, H, W) -> patch tokens (B, V, N, C) of each view alone, grid (h, w)."""
        grid = patch_grid(images, self.config.patch_size)
        x = self.image_norm(images.flatten(0, 1))  # (B V, 3, H, W)
        x = self.patch_embed['proj'](x).flatten(2).transpose(1, 2)  # (B V, N, C)
        # as DINOv2 did it first; VGGT's positions are resized to the grid itself
        factor = [(side + 0.1) / self.config.position_grid for side in grid]
        x = x + resize_positions(self.pos_embed[:, 1:], grid, scale_factor=factor)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B V, 1 + N, C)
        for block in self.blocks[:self.config.alt_start]:
            x = block(x)
        return x[:, 1:].unflatten(0, images.shape[:2]), grid

    def mix(self, patches, grid, num_context, layers):
        """-> {layer: tokens (B, V, P, 2C)}: [the last block of one view | this block], raw."""
        B, V, N, C = patches.shape
        first, other = self.camera_token[:, :1], self.camera_token[:, 1:].expand(-1, V - 1, -1)
        camera = torch.cat([first, other], 1).expand(B, -1, -1)[:, :, None]  # (B, V, 1, C)
        x = torch.cat([camera.to(patches.dtype), patches], 2)  # (B, V, P, C)
        P = 1 + N
        head_dim = C // self.config.num_heads
        in_view = RoPE2D(grid, head_dim, special_per_view=1, device=x.device)
        in_scene = places_in_scene(V, N, head_dim, x.device)
        context_tokens = None if num_context in (None, V) else num_context * P

        wanted = {layer % self.config.depth for layer in layers}
        outputs = {}
        for i in range(self.config.alt_start, self.config.depth):
            block = self.blocks[i]
            if i % 2:                 # all views together
                x = block(x.reshape(B, V * P, C), in_scene, context_tokens).view(B, V, P, C)
            else:
                x = block(x.reshape(B * V, P, C), in_view).view(B, V, P, C)
                local = x
            if i in wanted:
                outputs[i] = torch.cat([local, x], dim=-1)  # (B, V, P, 2C)
        return {layer: outputs[layer % self.config.depth] for layer in layers}


class CameraDecoder(nn.Module):
    """Camera tokens (B, V, 2C) -> pose encodings (B, V, 9) of cameras in the world."""

    def __init__(self, dim):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim),
                                      nn.ReLU())
        self.fc_t = nn.Linear(dim, 3)
        self.fc_qvec = nn.Linear(dim, 4)
        self.fc_fov = nn.Sequential(nn.Linear(dim, 2), nn.ReLU())

    def forward(self, tokens):
        x = self.backbone(tokens)
        return torch.cat([self.fc_t(x), self.fc_qvec(x), self.fc_fov(x)], dim=-1)


class DA3(Backbone):
    num_special = 1

    def __init__(self, config=DA3Config()):
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict({'pretrained': ViT(config)})
        self.cam_dec = CameraDecoder(2 * config.width)
        if 'depth' in config.heads:
            self.head = DPTHead(config, adds_relu=False)
        self.backbone.apply(init_linear)

    @property
    def transformer(self):
        return self.backbone['pretrained']

    @property
    def depth_head(self):
        return self.head

    def patch_features(self, tokens):
        """Tokens (B, V, P, 2C) -> patch features (B, V, N, 2C): the second half is normalised."""
        local, mixed = tokens[:, :, 1:].chunk(2, dim=-1)
        return torch.cat([local, self.transformer.norm(mixed).to(local.dtype)], dim=-1)

    def cameras(self, tokens, size):
        """They encode camera-to-world: the inverse of our extrinsics."""
        poses, intrinsics = pose_encoding_to_cameras(self.cam_dec(tokens), size)
        return invert_pose(poses), intrinsics

    @classmethod
    def from_state(cls, state, metadata, path):
        with torch.device('meta'):  # costs nothing for weights that are replaced at once
            model = cls(config_of(state, path))
        model.load({name: x.float() for name, x in state.items()}, path, assign=True)
        return model

    def load(self, state, source, assign=False):
        """Strict, but for the parts of the release that are not built: pose conditioning, rays."""
        state = {name: x for name, x in without_prefix(state, 'model.').items()
                 if not name.startswith('cam_enc.') and '_aux' not in name}
        skip = () if 'depth' in self.config.heads else ('head.',)
        load_strictly(self, state, source, skip, assign)


def config_of(state, path):
    """The sizes of a released network, from its names and shapes."""
    vit = 'model.backbone.pretrained.'
    try:
        width = state[vit + 'cls_token'].shape[-1]
        channels = [len(state[f'model.head.projects.{i}.weight']) for i in range(4)]
        features = len(state['model.head.scratch.layer1_rn.weight'])
    except KeyError as error:
        raise InputError(f'{path} is no any-view Depth Anything 3: no {error}') from error
    depth = count_blocks(state, vit + 'blocks.')
    if depth != 12:
        raise InputError(f'{path} has {depth} blocks: only DA3-SMALL and DA3-BASE, with 12, are '
                         'known here (the larger ones are not open)')
    return DA3Config(width=width, num_heads=width // 64, dpt_features=features,
                     dpt_channels=tuple(channels))
