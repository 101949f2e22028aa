"""
Predictive Spatial Field Modeling: the objective of Spa3R (arXiv 2602.21186).

A scene is a field that maps a camera to the features which the frozen backbone would
see from it. Hide some of the views; squeeze the others into a few latents z; predict
from z, for the camera of every view, hidden ones included, the features seen there.
What predicts views that it never saw must hold the scene.

    mask -> backbone (frozen) -> encode the context -> cast rays -> decode every view -> compare

`PSFM.forward` is these six steps. The pose of a camera enters through attention alone:
PRoPE (arXiv 2507.10496) turns a token's channels by its camera's projection matrix, so
that a ray token and the latents, which live in the world's frame, meet in one space.

Shapes as in model.py. In a view mask (B, V), True is a target: a view to predict.
"""
import glob
import json
import math
import os
import pickle
import zlib
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (IMAGE_STATISTICS, MLP, Block, Encoder, InputError, Transformer, camera_rays, cast_matrices, full_precision, init_linear,
                   invert_pose, load_strictly, read_weights, take_views, to_4x4)
from vggt import VGGT, VGGTConfig


def random_view_mask(num_scenes, num_views, mask_ratio, generator=None, device='cpu'):
    """-> view mask (B, V), and the number of context views, the same for every scene: int(V (1 - mask_ratio)), at least 1.

    The first view is always context: its camera is the world's frame.
    """
    num_context = max(1, int(num_views * (1 - mask_ratio)))
    lot = torch.rand(num_scenes, num_views, generator=generator, device=device)
    lot[:, 0] = -1
    mask = torch.ones(num_scenes, num_views, dtype=torch.bool, device=device)
    return mask.scatter_(1, lot.argsort(1)[:, :num_context], False), num_context


def context_index(view_mask, num_context):
    """View mask (B, V) -> indices of the context views (B, Vc), in their order."""
    return view_mask.int().argsort(dim=1, stable=True)[:, :num_context]


# -----------------------------------------------------------------------------
# the field decoder

class PRoPE:
    """Cameras as relative positions (arXiv 2507.10496): a position for attention among rays of one view and world tokens.

    Of the d channels of a head, the first d/2, in groups of four, are multiplied by the 4 x 4 projection matrix
    P = lift(K) [R | t] of the token's camera: queries by P^T, keys and values by P^-1, outputs by P, so that two tokens
    meet through P_q P_k^-1. The next d/4 turn with the patch's column, the last d/4 with its row. The first
    `num_world` tokens (registers, latents) are in the world's frame: for them nothing is done.
    Matrices and tables are made once per forward, in fp32, which the products need as well.
    """

    @full_precision
    def __init__(self, extrinsics, intrinsics, size, grid, head_dim, num_world, base=100.0):
        """extrinsics (n, 3, 4), intrinsics (n, 3, 3) in pixels of images of `size` = (H, W), `grid` = (h, w) patches."""
        (H, W), (h, w) = size, grid
        self.num_world = num_world
        fx, fy = intrinsics[:, 0, 0] / W, intrinsics[:, 1, 1] / H
        cx, cy = intrinsics[:, 0, 2] / W - 0.5, intrinsics[:, 1, 2] / H - 0.5
        zero, one = torch.zeros_like(fx), torch.ones_like(fx)
        lift = lambda fx, cx, fy, cy: torch.stack([fx, zero, cx, zero, zero, fy, cy, zero, zero, zero, one, zero,
                                                   zero, zero, zero, one], -1).view(-1, 4, 4)
        projection = lift(fx, cx, fy, cy) @ to_4x4(extrinsics)                            # (n, 4, 4)
        inverse = to_4x4(invert_pose(extrinsics)) @ lift(1 / fx, -cx / fx, 1 / fy, -cy / fy)
        # tokens are rows, x M^T applies M: queries times P get P^T, keys and values times P^-T get P^-1
        self.for_q, self.for_kv, self.for_out = projection[:, None], inverse.transpose(1, 2)[:, None], projection.transpose(1, 2)[:, None]

        y, x = torch.meshgrid(torch.arange(h, device=fx.device), torch.arange(w, device=fx.device), indexing='ij')
        frequency = base ** (-torch.arange(head_dim // 8, device=fx.device) / (head_dim // 8))
        angle = torch.stack([x, x, y, y], -1).flatten(0, 1)[..., None] * frequency        # (N, 4, d/8)
        self.cos, self.sin = angle.flatten(1).cos(), angle.flatten(1).sin()               # (N, d/2)

    def transform(self, x, matrix, sin):                                                  # (n, nh, tokens, d)
        world, rays = x[:, :, :self.num_world], x[:, :, self.num_world:].float()
        n, nh, N, d = rays.shape
        projected, turned = rays.split(d // 2, dim=-1)
        projected = (projected.reshape(n, nh, -1, 4) @ matrix).view(n, nh, N, d // 2)
        a, b, c, e = turned.chunk(4, dim=-1)
        turned = turned * self.cos + torch.cat([b, -a, e, -c], dim=-1) * sin              # clockwise: RoPE2D's other way round
        return torch.cat([world.float(), torch.cat([projected, turned], dim=-1)], dim=2)

    @full_precision
    def rotate(self, q, k, v):
        return self.transform(q, self.for_q, self.sin), self.transform(k, self.for_kv, self.sin), self.transform(v, self.for_kv, self.sin)

    @full_precision
    def restore(self, out):
        return self.transform(out, self.for_out, -self.sin)


class FieldDecoder(nn.Module):
    """The field: latents z and a camera -> the features seen from it.

    Every patch of the view asked for is a ray token: its unit direction in the camera's own frame. Where the camera
    stands, PRoPE tells. Views are decoded one by one: no view's answer depends on which others are asked for.
    """

    def __init__(self, dim, depth, num_heads, num_registers=4):
        super().__init__()
        self.ray_embed = nn.Linear(3, dim)
        self.transformer = Transformer(dim, depth, num_heads, num_registers)
        self.head_dim = dim // num_heads
        self.apply(init_linear)

    def forward(self, z, extrinsics, intrinsics, size, grid):
        """z (B, Q, D), extrinsics (B, V, 3, 4), intrinsics (B, V, 3, 3), `size` in pixels, `grid` in patches -> (B, V, N, D)."""
        B, V = extrinsics.shape[:2]
        rays = F.normalize(camera_rays(intrinsics, size, grid), dim=-1)                   # (B, V, N, 3)
        rays = self.ray_embed(rays).flatten(0, 1)                                         # (B V, N, D)
        z = z.repeat_interleave(V, dim=0)                                                 # (B V, Q, D)
        num_latents = z.shape[1]
        position = PRoPE(extrinsics.flatten(0, 1).float(), intrinsics.flatten(0, 1).float(), size, grid, self.head_dim,
                         num_world=self.transformer.num_registers + num_latents)
        x = self.transformer(torch.cat([z, rays.to(z.dtype)], dim=1), position, keep=slice(num_latents, None))
        return x.unflatten(0, (B, V))                                                     # (B, V, N, D)


# -----------------------------------------------------------------------------
# the whole

class PSFM(nn.Module):
    """Encoder and field decoder around a frozen backbone.

    `context`: 'asymmetric', one pass of the backbone in which context views see each other and targets see all; or
    'separate', two passes, the context alone and then all views. They are different objectives: in the second, the
    features of one context view differ between the encoder's input and the decoder's target.
    `standardised`: features are standardised per channel before they are encoded or predicted.
    `teacher`: a second frozen network whose features are predicted as well ('sem'), images (B, V, 3, H, W) -> (B, V, N, S).
    `num_latents` 0: the decoder alone, a rival that knows cameras and nothing of the scene; the encoder is left unused.
    `depth_probe`: also train an MLP that reads the backbone's depth off the decoder's output, detached: no gradient of it reaches the field.
    """

    def __init__(self, backbone, width=768, encoder_depth=6, decoder_depth=6, num_heads=12, num_latents=256,
                 num_registers=4, mask_ratio=0.5, context='asymmetric', standardised=True, teacher=None, depth_probe=False):
        super().__init__()
        self.mask_ratio, self.context, self.standardised = mask_ratio, context, standardised
        self.backbone, self.teacher = backbone, teacher
        self.encoder = Encoder(backbone.feature_dim, width, encoder_depth, num_heads, num_latents, num_registers)
        self.encoder.requires_grad_(num_latents > 0)
        self.decoder = FieldDecoder(width, decoder_depth, num_heads, num_registers)
        dims = {'geo': backbone.feature_dim, **({'sem': teacher.feature_dim} if teacher is not None else {})}
        self.heads = nn.ModuleDict({kind: MLP(width, 4 * width, dim) for kind, dim in dims.items()}).apply(init_linear)
        self.depth_probe = MLP(width, 4 * width, 1).apply(init_linear) if depth_probe else None
        # differs from the release: features are standardised per channel, on the way in and as targets, for VGGT's
        # have a large common mean and a few loud channels. `set_statistics` fills these in from training features.
        for kind, dim in dims.items():
            self.register_buffer(f'{kind}_mean', torch.zeros(dim))
            self.register_buffer(f'{kind}_std', torch.ones(dim))

    def forward(self, images, generator=None, view_mask=None, extrinsics=None, intrinsics=None):
        """One training step's losses. images (B, V, 3, H, W) in [0, 1] -> dict of scalars, 'loss' is their sum.

        `generator` draws the mask, unless `view_mask` is given. Cameras come from the backbone, unless the source's
        are given: extrinsics (B, V, 3, 4) in the first view's frame, intrinsics (B, V, 3, 3) in pixels.
        """
        # 1 mask
        B, V = images.shape[:2]
        if view_mask is None:
            view_mask, num_context = random_view_mask(B, V, self.mask_ratio, generator, images.device)
        else:
            num_context = int((~view_mask[0]).sum())

        # 2 look, with the frozen backbone
        context, views, depth = self.observe(images, view_mask, num_context, with_depth=self.depth_probe is not None)
        if extrinsics is None:
            extrinsics, intrinsics = views.extrinsics, views.intrinsics

        # 3 encode the context
        z = self.encode(context, views.grid)                                              # (B, Q, D)

        # 4, 5 cast the rays of every view, context and target alike, and decode them
        decoded = self.decoder(z, extrinsics, intrinsics, images.shape[-2:], views.grid)  # (B, V, N, D)

        # 6 compare
        targets = {'geo': views.features}
        if self.teacher is not None:
            targets['sem'] = self.teacher(images, views.grid)
        losses = {}
        for kind, head in self.heads.items():
            losses.update(self.compare(kind, head(decoded), targets[kind]))
        if self.depth_probe is not None:
            seen = self.depth_probe(decoded.detach())[..., 0].float()
            losses['depth_probe'] = F.smooth_l1_loss(seen, depth)
        losses['loss'] = sum(losses.values())
        return losses

    @torch.no_grad()
    def observe(self, images, view_mask, num_context, with_depth=False):
        """The frozen backbone's view of the scene.

        -> context features (B, Vc, N, 2C), what the encoder may see; Views of all views, targets and cameras;
           depth (B, V, N) per patch, if asked for, else None.
        """
        backbone = self.backbone
        patches, grid = backbone.aggregator.embed(images)                                 # every view on its own
        index = context_index(view_mask, num_context)
        layers = backbone.config.dpt_layers if with_depth and 'depth' in backbone.config.heads else ()
        if self.context == 'asymmetric':
            tokens = backbone.attend(patches, grid, view_mask, num_context, layers=(*layers, -1))
            views = backbone.read(tokens[-1], grid)
            context = take_views(views.features, index)
        else:
            alone = backbone.attend(take_views(patches, index), grid)[-1]
            context = alone[:, :, backbone.aggregator.num_special:]
            tokens = backbone.attend(patches, grid, layers=(*layers, -1))
            views = backbone.read(tokens[-1], grid)
        depth = backbone.patch_depth(tokens, grid) if with_depth else None
        return context, views, depth

    def encode(self, features, grid):
        """Backbone features of the context views (B, Vc, N, 2C) -> z (B, Q, D). Without latents (Q = 0), nothing is read."""
        if len(self.encoder.queries) == 0:
            return features.new_zeros(len(features), 0, self.encoder.queries.shape[1])
        return self.encoder(self.standardise('geo', features), grid)

    def decode(self, z, extrinsics, intrinsics, size, grid):
        """z and cameras (B, V, ..) -> predicted backbone features (B, V, N, 2C), in the backbone's own units."""
        predicted = self.heads['geo'](self.decoder(z, extrinsics, intrinsics, size, grid)).float()
        return predicted * self.geo_std + self.geo_mean if self.standardised else predicted

    @torch.no_grad()
    def latents(self, images):
        """Images (B, V, 3, H, W) -> z (B, Q, D), all views being context: what a VLM is given."""
        views = self.backbone(images)
        return self.encode(views.features, views.grid)

    def standardise(self, kind, features):
        if not self.standardised:
            return features.float()
        return (features.float() - getattr(self, f'{kind}_mean')) / getattr(self, f'{kind}_std')

    def compare(self, kind, predicted, target):
        """Smooth L1 plus one minus the cosine: the loss of Spa3R, each term a mean over all views and patches."""
        predicted, target = predicted.float(), self.standardise(kind, target)
        return {f'{kind}_l1': F.smooth_l1_loss(predicted, target),
                f'{kind}_cos': 1 - F.cosine_similarity(predicted, target, dim=-1).mean()}

    def set_statistics(self, kind, features):
        """Mean and deviation per channel from features (..., C) of training views."""
        features = features.flatten(0, -2).float()
        getattr(self, f'{kind}_mean').copy_(features.mean(0))
        getattr(self, f'{kind}_std').copy_(features.std(0).clamp(min=1e-3))

    def load_released(self, state, source, assign=False):
        """Weights of the release's spa3r.ckpt (names with or without 'model.' in front) into this model, strictly.

        Only heads and teachers that this model was built without may be left over.
        """
        renamed = {}
        for name, tensor in state.items():
            name = name.removeprefix('model.')
            for theirs, ours in RELEASED_NAMES:
                if name.startswith(theirs):
                    name = ours + name.removeprefix(theirs)
                    break
            renamed[name] = tensor
        skip = ['dino.', 'teacher.', 'geo_mean', 'geo_std', 'sem_mean', 'sem_std']
        skip += ['depth_probe.'] * (self.depth_probe is None) + ['heads.sem.'] * (self.teacher is None)
        skip += [f'backbone.{head}_head.' for head in ('depth', 'point') if head not in self.backbone.config.heads]
        load_strictly(self, renamed, source, skip, assign)


RELEASED_NAMES = [('projection.', 'encoder.projection.'), ('query_embed.weight', 'encoder.queries'),
                  ('encoder.', 'encoder.transformer.'), ('pose_tokenizer.', 'decoder.ray_embed.'),
                  ('decoder.', 'decoder.transformer.'), ('depth_prob.', 'depth_probe.'),
                  ('aggregator.', 'backbone.aggregator.'), ('camera_head.', 'backbone.camera_head.'),
                  ('depth_head.', 'backbone.depth_head.'), ('point_head.', 'backbone.point_head.')]


class SemanticTeacher(nn.Module):
    """A frozen image encoder of transformers (DINOv2, DINOv3) as the teacher of the 'sem' head.

    differs from the release: images are resized with antialiasing and keep their aspect.
    """

    def __init__(self, model, width=224, dtype=torch.float32):
        super().__init__()
        self.model, self.width = model.requires_grad_(False).eval(), width
        cast_matrices(self.model, dtype)
        for name, value in IMAGE_STATISTICS.items():
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def feature_dim(self):
        return self.model.config.hidden_size

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images, grid):
        """Images (B, V, 3, H, W) in [0, 1] -> features (B, V, N, S) on the backbone's grid."""
        p, (B, V) = self.model.config.patch_size, images.shape[:2]
        w = self.width // p
        h = max(1, round(w * images.shape[-2] / images.shape[-1]))
        x = F.interpolate(images.flatten(0, 1), (h * p, w * p), mode='bilinear', antialias=True)
        tokens = self.model(((x - self.mean) / self.std)).last_hidden_state[:, -h * w:]   # class and registers come first
        x = F.interpolate(tokens.float().transpose(1, 2).unflatten(2, (h, w)), grid, mode='bilinear', antialias=True)
        return x.flatten(2).transpose(1, 2).unflatten(0, (B, V))


# -----------------------------------------------------------------------------
# building, loading

def build_psfm(config, dtype=torch.float32):
    """A PSFM as a training configuration (train.Config) says, its backbone loaded and frozen in `dtype`."""
    backbone = VGGT.from_pretrained(config.backbone).freeze(dtype)
    teacher = None
    if config.teacher:
        from transformers import AutoModel
        try:
            teacher = SemanticTeacher(AutoModel.from_pretrained(config.teacher), dtype=dtype)
        except OSError as error:
            raise InputError(f'--teacher {config.teacher} could not be loaded ({str(error).splitlines()[0]}): if it is gated, ask for '
                             'access on its page of the hub and run `hf auth login`; or take an open one (--teacher facebook/dinov2-with-registers-large), '
                             "or none (--teacher '')") from error
    return PSFM(backbone, config.width, config.encoder_depth, config.decoder_depth, config.num_heads, config.num_latents,
                config.num_registers, config.mask_ratio, config.context, config.standardised, teacher, config.depth_probe)


def fingerprint(backbone):
    """Eight hex digits that tell one set of backbone weights from another: kept with what was trained on them."""
    return f'{zlib.crc32(backbone.aggregator.camera_token.detach().cpu().float().numpy().tobytes()):08x}'


def load_psfm(run, device='cpu'):
    """A trained PSFM in eval mode, and the configuration it was trained with (a namespace).

    `run`: the folder of a run, or a file with its weights, as weights/psfm_small.safetensors; or what the release offers
    (`load_released_psfm`).
    """
    path = os.fspath(run)
    if path.endswith(('.ckpt', '.pt')) or glob.glob(os.path.join(path, '*.safetensors')) and not os.path.isdir(os.path.join(path, 'checkpoint')):
        return load_released_psfm(path, device)
    if not os.path.isfile(path):
        folders = [os.path.join(path, name) for name in ('checkpoint', 'checkpoint.old')]
        path = next((file for file in (os.path.join(folder, 'model.safetensors') for folder in folders) if os.path.isfile(file)), None)
        if path is None:
            raise InputError(f'no weights at {run}' if str(run).endswith('.safetensors') else
                             f'no checkpoint in {run}: train first (python train.py --config small)')
    state, metadata = read_weights(path)
    config = SimpleNamespace(**json.loads(metadata.get('config', '{}')))
    if getattr(config, 'task', None) != 'psfm':
        raise InputError(f'{path} does not hold a PSFM')
    psfm = build_psfm(config)
    if metadata.get('backbone') not in (None, fingerprint(psfm.backbone)):
        raise InputError(f'{path} was trained on another backbone than what is now in {config.backbone}: its latents mean nothing there')
    load_strictly(psfm, state, path, skip=('backbone.', 'teacher.'))
    return psfm.to(device).eval(), config


def read_released(path):
    """State of a released spa3r.ckpt, or of the encoder inside a released Spa3-VLM folder; names without what is in front of Spa3R's own."""
    if os.path.isdir(path):
        state = {}
        for file in sorted(name for name in os.listdir(path) if name.endswith('.safetensors')):
            state.update(read_weights(os.path.join(path, file))[0])
        prefix = 'geometry_encoder.spa3r.'
        return {name.split(prefix)[1]: tensor for name, tensor in state.items() if prefix in name}
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f'{path} cannot be read as a checkpoint of weights ({str(error).splitlines()[0]})') from error
    state = state.get('state_dict', state)
    return {name.removeprefix('model.'): tensor for name, tensor in state.items() if torch.is_tensor(tensor)}


def load_released_psfm(path, device='cpu'):
    """What the release offers, spa3r.ckpt or a Spa3-VLM folder -> PSFM in eval mode, with its own altered VGGT, and its configuration.

    Sizes follow from the shapes; heads that only trained it are left out. Features are not standardised there.
    """
    state = read_released(path)
    if 'query_embed.weight' not in state:
        raise InputError(f'{path} holds no released Spa3R (no query_embed.weight)')
    count = lambda prefix: 1 + max((int(name.removeprefix(prefix).split('.')[0]) for name in state if name.startswith(prefix)), default=-1)
    C, embed = state['aggregator.camera_token'].shape[-1], 'aggregator.patch_embed.'
    is_layer = any(name.startswith('aggregator.global_blocks.') and name.endswith('q_norm.bias') for name in state)
    vggt = VGGTConfig(patch_size=state[embed + 'patch_embed.proj.weight'].shape[-1], width=C, depth=count('aggregator.frame_blocks.'), num_heads=C // 64,
                      num_registers=state['aggregator.register_token'].shape[2], embed_depth=count(embed + 'blocks.'), embed_heads=C // 64,
                      position_grid=math.isqrt(state[embed + 'pos_embed'].shape[1] - 1), global_qk_norm='layer' if is_layer else 'rms',
                      camera_depth=count('camera_head.trunk.'), camera_heads=C // 64, heads=('camera',))
    width = state['projection.weight'].shape[0]
    config = SimpleNamespace(task='psfm', backbone=str(path), data='', width=width, num_latents=len(state['query_embed.weight']), image_width=37 * vggt.patch_size)
    with torch.device('meta'):
        psfm = PSFM(VGGT(vggt), width, count('encoder.blocks.'), count('decoder.blocks.'), width // 64, config.num_latents, standardised=False)
    keep = ('projection.', 'query_embed.', 'encoder.', 'decoder.', 'pose_tokenizer.', 'heads.geo.', 'aggregator.', 'camera_head.')
    psfm.load_released({name: tensor for name, tensor in state.items() if name.startswith(keep)}, path, assign=True)
    for kind, value in (('mean', torch.zeros), ('std', torch.ones)):
        setattr(psfm, f'geo_{kind}', value(2 * C))
    psfm.backbone.freeze()
    return psfm.to(device).eval(), config


def compile_blocks(model):
    """torch.compile, block by block: all layers of a stack share the compiled code, whatever the number of views."""
    torch._dynamo.config.recompile_limit = 64                 # one code object serves six kinds of stacks, with and without gradients
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)
