"""
Predictive Spatial Field Modeling: the objective of Spa3R (arXiv 2602.21186).

A scene is a field: a function from a camera to the features that the frozen
backbone would see from it. Hide some of the views. Squeeze the others into a
few latents z. From z and the camera of each view, hidden or not, predict the
features of that view. Latents that predict unseen views must describe the scene.

    mask -> backbone (frozen) -> encode the context -> cast rays -> decode every view -> compare

`PSFM.forward` is these six steps. The pose of a camera enters through
attention alone: PRoPE (arXiv 2507.10496) multiplies half of a token's channels
by its camera's projection matrix or the inverse. Latents are in the world's
frame: their matrix is the identity.

Shapes as in model.py. In a view mask (B, V), True is a target: hidden from the encoder.
"""
import contextlib
import json
import os
from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import find_weights
from common import (InputError, find_checkpoint, find_file, is_hub_id, load_strictly, opt,
                    read_weights)
from da3 import DA3
from model import (MLP, Encoder, Transformer, camera_rays, full_precision, init_linear,
                   invert_pose, take_views, to_4x4, turn_pairs)
from vggt import VGGT

FROZEN = ('backbone.', 'teacher.')    # never in a checkpoint: loaded from where they came from


@dataclass(frozen=True)
class PSFMConfig:
    width: int = opt(128, 'D, of encoder and decoder', low=8, group='the field')
    encoder_depth: int = opt(3, 'blocks', low=0)
    decoder_depth: int = opt(3, 'blocks', low=0)
    num_heads: int = opt(2, 'attention heads', low=1)
    num_latents: int = opt(32, 'Q, latents in z; 0: a decoder that knows the camera alone', low=0)
    num_registers: int = opt(4, 'register tokens', low=0)
    mask_ratio: float = opt(0.5, 'share of the views that are targets, rounded up; one is always '
                            'context', low=0.01, high=0.99)
    context: str = opt('asymmetric', 'asymmetric (one pass of the backbone: context views see only '
                       'each other, targets see all) | separate (two passes)',
                       choices=('asymmetric', 'separate'))
    standardised: bool = opt(True, 'standardise features per channel (the release does not)')
    depth_probe: bool = opt(False, "train a probe that reads the backbone's depth off the field")


def check_psfm_config(config):
    """Checks that involve several fields. Raises InputError."""
    if config.width % config.num_heads or config.width // config.num_heads % 8:
        raise InputError(f'--width {config.width} over --num-heads {config.num_heads}: '
                         'a head needs a multiple of 8 channels (PRoPE: d/2 in fours, d/4 in '
                         'pairs)')


# -----------------------------------------------------------------------------
# masks

def random_view_mask(num_scenes, num_views, mask_ratio, generator=None, device='cpu'):
    """-> view mask (B, V), and the number of context views, which is the same for every scene.

    int(V (1 - mask_ratio)) views are context, at least one. The first view
    always is: its camera is the world's frame.
    """
    # 1e-6: 10 * (1 - 0.8) is 1.9999999999999996 in floating point
    num_context = max(1, int(num_views * (1 - mask_ratio) + 1e-6))
    draw = torch.rand(num_scenes, num_views, generator=generator, device=device)
    draw[:, 0] = -1  # the lowest are context: the first view always
    context = draw.argsort(1)[:, :num_context]  # (B, Vc)
    mask = torch.ones(num_scenes, num_views, dtype=torch.bool, device=device)
    return mask.scatter_(1, context, False), num_context


def context_index(view_mask, num_context):
    """View mask (B, V) -> indices of the context views (B, Vc), in their order."""
    return view_mask.int().argsort(dim=1, stable=True)[:, :num_context]


# -----------------------------------------------------------------------------
# the field decoder

def lift(fx, fy, cx, cy):
    """Focal lengths and principal points (n,) -> (n, 4, 4), intrinsics that act on (x, y, z, 1)."""
    zero = torch.zeros_like(fx)
    one = torch.ones_like(fx)
    rows = [fx, zero, cx, zero,
            zero, fy, cy, zero,
            zero, zero, one, zero,
            zero, zero, zero, one]
    return torch.stack(rows, -1).view(-1, 4, 4)


def block_diagonal(matrices, k):
    """(n, 4, 4) -> (n, 1, 4k, 4k), k copies along the diagonal: one product for all groups of four
    channels."""
    eye = torch.eye(k, device=matrices.device)
    blocks = eye[:, None, :, None] * matrices[:, None, :, None, :]  # (n, k, 4, k, 4)
    return blocks.flatten(3).flatten(1, 2)[:, None]


class PRoPE:
    """Cameras as relative positions (arXiv 2507.10496), for world tokens and the rays of one view.

    Let P = lift(K) [R | t] be the 4 x 4 projection matrix of a token's camera.
    Of the d channels of a head,

        the first d/2, in groups of four: q is multiplied by P^T, k and v by P^-1, and the output
        by P. Two tokens meet through P_q P_k^-1, the transform between their cameras.
        the next d/4 turn with the patch's column, the last d/4 with its row: q, k and v
        one way, and the output back.

    The tokens in front of the N rays (registers and latents) are in the world's
    frame: P is the identity. All matrices are made once per forward pass, in
    fp32, and need no GPU sync.
    """

    @full_precision
    def __init__(self, extrinsics, intrinsics, size, grid, head_dim):
        """extrinsics (n, 3, 4), intrinsics (n, 3, 3) in pixels of images of `size` = (H, W)."""
        H, W = size
        h, w = grid

        # normalised intrinsics: focal length / image size, principal point from the center
        fx = intrinsics[:, 0, 0] / W
        fy = intrinsics[:, 1, 1] / H
        cx = intrinsics[:, 0, 2] / W - 0.5
        cy = intrinsics[:, 1, 2] / H - 0.5
        P = lift(fx, fy, cx, cy) @ to_4x4(extrinsics)  # (n, 4, 4)
        inverse_lift = lift(1 / fx, 1 / fy, -cx / fx, -cy / fy)
        P_inverse = to_4x4(invert_pose(extrinsics)) @ inverse_lift

        # Tokens are row vectors: to apply M, x is multiplied by M^T. For q (M = P^T) that is P,
        # for k and v (M = P^-1) it is P^-T, for the output (M = P) it is P^T.
        groups = head_dim // 8
        self.q_matrix = block_diagonal(P, groups)  # (n, 1, d/2, d/2)
        self.kv_matrix = block_diagonal(P_inverse.transpose(1, 2), groups)
        self.out_matrix = block_diagonal(P.transpose(1, 2), groups)

        # the angle of every patch, which counts from 0 here: columns, then rows
        rows = torch.arange(h, device=fx.device)
        columns = torch.arange(w, device=fx.device)
        place = torch.cartesian_prod(rows, columns).flip(-1).repeat_interleave(2, -1)  # (N, 4)
        frequency = 100.0 ** (-torch.arange(head_dim // 8, device=fx.device) / (head_dim // 8))
        angle = place[..., None] * frequency  # (N, 4, d/8)
        sin = angle.sin()
        sin[:, 1::2].neg_()  # clockwise: RoPE2D turns the other way
        self.cos = angle.cos().flatten(1)  # (N, d/2)
        self.sin = sin.flatten(1)

    def transform(self, x, matrix, sin, dtype):
        """x (n, nh, tokens, d) -> the same shape, computed in fp32 and rounded to `dtype`. World
        tokens, of which there may be none, come first and stay as they are."""
        N = len(sin)
        world = x[:, :, :-N].to(dtype)
        rays = x[:, :, -N:].float()  # (n, nh, N, d)
        projected, turned = rays.chunk(2, dim=-1)  # (n, nh, N, d/2)
        halves = [projected @ matrix, turn_pairs(turned, self.cos, sin)]
        rays = torch.cat([half.to(dtype) for half in halves], dim=-1)
        return torch.cat([world, rays], dim=2)

    @full_precision
    def rotate(self, q, k, v):
        dtype = v.dtype
        q = self.transform(q, self.q_matrix, self.sin, dtype)
        k = self.transform(k, self.kv_matrix, self.sin, dtype)
        v = self.transform(v, self.kv_matrix, self.sin, dtype)
        return q, k, v

    @full_precision
    def restore(self, out):
        return self.transform(out, self.out_matrix, -self.sin, out.dtype)


class FieldDecoder(nn.Module):
    """The field: latents z and a camera -> a vector per patch of the view from it.

    `PSFM.heads` turn these D-wide vectors into features.

    Every patch of the view is a ray token: its unit direction in the camera's
    own frame. PRoPE supplies the camera's pose. Each view is decoded on its own:
    the answer for it does not depend on the other views that are asked for.
    """

    def __init__(self, dim, depth, num_heads, num_registers=4):
        super().__init__()
        self.ray_embed = nn.Linear(3, dim)
        self.transformer = Transformer(dim, depth, num_heads, num_registers)
        self.head_dim = dim // num_heads
        self.apply(init_linear)

    def forward(self, z, extrinsics, intrinsics, size, grid):
        """z (B, Q, D), extrinsics (B, V, 3, 4), intrinsics (B, V, 3, 3) -> (B, V, N, D).

        `size` = (H, W) in pixels, `grid` = (h, w) in patches.
        """
        B, V = extrinsics.shape[:2]

        # one ray token per patch
        rays = F.normalize(camera_rays(intrinsics, size, grid), dim=-1)  # (B, V, N, 3)
        rays = self.ray_embed(rays).flatten(0, 1)  # (B V, N, D)

        # every view gets a copy of its scene's latents
        z = z.repeat_interleave(V, dim=0)  # (B V, Q, D)
        x = torch.cat([z, rays], dim=1)  # (B V, Q + N, D)

        extrinsics = extrinsics.flatten(0, 1).float()  # (B V, 3, 4)
        intrinsics = intrinsics.flatten(0, 1).float()  # (B V, 3, 3)
        position = PRoPE(extrinsics, intrinsics, size, grid, self.head_dim)
        x = self.transformer(x, position, num_kept=rays.shape[1])  # (B V, N, D)
        return x.unflatten(0, (B, V))  # (B, V, N, D)


# -----------------------------------------------------------------------------
# the whole model

class PSFM(nn.Module):
    """Encoder and field decoder around a frozen backbone.

    `context` 'asymmetric' is one pass of the backbone, 'separate' two: the
    context alone, then all views. They are different objectives: with
    'separate', a context view has other features as the encoder's input (seen
    without targets) than as a target.
    `teacher(images, grid)` -> (B, V, N, S): a second frozen network, whose features
    ('sem') are predicted as well; release.SemanticTeacher.
    `num_latents` 0: the decoder alone, a baseline that knows only the camera.
    """

    def __init__(self, backbone, config=PSFMConfig(), teacher=None):
        super().__init__()
        self.backbone = backbone
        self.teacher = teacher
        self.mask_ratio = config.mask_ratio
        self.context = config.context
        self.standardised = config.standardised
        D = config.width
        C2 = backbone.feature_dim
        self.encoder = Encoder(C2, D, config.encoder_depth, config.num_heads, config.num_latents,
                               config.num_registers)
        self.encoder.requires_grad_(config.num_latents > 0)  # else it is not used
        self.decoder = FieldDecoder(D, config.decoder_depth, config.num_heads,
                                    config.num_registers)
        dims = {'geo': C2}
        if teacher is not None:
            dims['sem'] = teacher.feature_dim
        self.heads = nn.ModuleDict({kind: MLP(D, 4 * D, dim) for kind, dim in dims.items()})
        self.heads.apply(init_linear)
        self.depth_probe = MLP(D, 4 * D, 1).apply(init_linear) if config.depth_probe else None

        # differs from the release: features are standardised per channel, on
        # the way in and as targets, because VGGT's have a large common mean
        # and a few loud channels. `set_statistics` fills these in from
        # training features.
        for kind, dim in dims.items():
            self.register_buffer(f'{kind}_mean', torch.zeros(dim))
            self.register_buffer(f'{kind}_std', torch.ones(dim))

    def forward(self, images, generator=None, view_mask=None):
        """The losses of one batch. images (B, V, 3, H, W) in [0, 1] -> dict of scalars.

        'loss' is their sum. `generator` draws the mask, unless `view_mask` is
        given. Cameras are those that the backbone predicts.
        """
        # 1. mask
        B, V = images.shape[:2]
        if view_mask is None:
            view_mask, num_context = random_view_mask(B, V, self.mask_ratio, generator,
                                                      images.device)
        else:
            num_context = int((~view_mask[0]).sum())  # every row has as many

        # 2. look with the frozen backbone
        with_depth = self.depth_probe is not None
        context, views, depth = self.observe(images, view_mask, num_context, with_depth)

        # 3. encode the context
        z = self.encode(context, views.grid)  # (B, Q, D)

        # 4. and 5. cast the rays of every view, context and target alike, and decode
        size = images.shape[-2:]
        cameras = views.extrinsics, views.intrinsics
        decoded = self.decoder(z, *cameras, size, views.grid)  # (B, V, N, D)

        # 6. compare
        losses = self.compare('geo', self.heads['geo'](decoded), views.features)
        if self.teacher is not None:
            seen = self.teacher(images, views.grid)  # (B, V, N, S)
            losses.update(self.compare('sem', self.heads['sem'](decoded), seen))
        if self.depth_probe is not None:
            # the probe watches: its gradient does not reach the field
            read = self.depth_probe(decoded.detach())[..., 0].float()  # (B, V, N)
            losses['depth_probe'] = F.smooth_l1_loss(read, depth)
        losses['loss'] = sum(losses.values())
        return losses

    @torch.no_grad()
    def observe(self, images, view_mask, num_context, with_depth=False):
        """What the frozen backbone sees. -> context features (B, Vc, N, 2C),
        for the encoder; features and cameras (Views) of all views; depth per
        patch (B, V, N) if asked for, else None.
        """
        # backbone.attend -> tokens of the given layers (-1: the last one); read: tokens -> Views,
        # features and cameras
        backbone = self.backbone
        patches, grid = backbone.embed(images)  # each view on its own
        index = context_index(view_mask, num_context)  # (B, Vc)
        layers = (*backbone.depth_layers, -1) if with_depth else (-1,)
        if self.context == 'asymmetric':
            outputs = backbone.attend(patches, grid, view_mask, num_context, layers)
            views = backbone.read(outputs[-1], grid)
            context = take_views(views.features, index)
        else:
            alone = backbone.attend(take_views(patches, index), grid)
            context = backbone.patch_features(alone[-1])
            outputs = backbone.attend(patches, grid, layers=layers)
            views = backbone.read(outputs[-1], grid)
        depth = backbone.patch_depth(outputs, grid) if with_depth else None
        return context, views, depth

    def encode(self, features, grid):
        """Features of the context views (B, Vc, N, 2C) -> z (B, Q, D)."""
        if len(self.encoder.queries) == 0:  # --num-latents 0: an empty z
            return features.new_zeros(len(features), 0, self.encoder.queries.shape[1])
        return self.encoder(self.standardise('geo', features), grid)

    def decode(self, z, extrinsics, intrinsics, size, grid):
        """Decoder and head: z and cameras (B, V, ..) -> predicted features (B, V, N, 2C), in the
        backbone's own units."""
        decoded = self.decoder(z, extrinsics, intrinsics, size, grid)
        predicted = self.heads['geo'](decoded).float()
        if self.standardised:
            predicted = predicted * self.geo_std + self.geo_mean
        return predicted

    def read_depth(self, z, extrinsics, intrinsics, size, grid):
        """As `decode`, by the depth probe: depth per patch (B, V, N) in the backbone's unit."""
        return self.depth_probe(self.decoder(z, extrinsics, intrinsics, size, grid))[..., 0].float()

    @torch.no_grad()
    def latents(self, images):
        """Images (B, V, 3, H, W) in [0, 1] -> z (B, Q, D). All views are context."""
        if images.ndim != 5 or images.amin() < 0 or images.amax() > 1:
            raise InputError('latents takes images (B, V, 3, H, W) from 0 to 1, not '
                             f'{tuple(images.shape)} from {images.amin()} to {images.amax()}')
        patches, grid = self.backbone.embed(images)
        tokens = self.backbone.attend(patches, grid)[-1]  # z needs no cameras
        return self.encode(self.backbone.patch_features(tokens), grid)

    def standardise(self, kind, features):
        """In fp32, and standardised if the option says so."""
        features = features.float()
        if self.standardised:
            features = (features - getattr(self, f'{kind}_mean')) / getattr(self, f'{kind}_std')
        return features

    def compare(self, kind, predicted, target):
        """Spa3R's loss, on standardised features: means of smooth L1, and of one minus cosine."""
        predicted = predicted.float()
        target = self.standardise(kind, target)
        l1 = F.smooth_l1_loss(predicted, target)
        cosine = F.cosine_similarity(predicted, target, dim=-1)  # (B, V, N)
        return {f'{kind}_l1': l1, f'{kind}_cos': 1 - cosine.mean()}

    def set_statistics(self, kind, features):
        """Mean and deviation per channel, from features (..., C) of training views."""
        features = features.flatten(0, -2).float()
        getattr(self, f'{kind}_mean').copy_(features.mean(0))
        getattr(self, f'{kind}_std').copy_(features.std(0).clamp(min=1e-3))


# -----------------------------------------------------------------------------
# building, loading

def open_backbone(source):
    """A .safetensors file, a folder with model.safetensors, or a hub id -> VGGT or DA3."""
    path = find_weights(source)
    state, metadata = read_weights(path)
    is_da3 = 'model.backbone.pretrained.cls_token' in state
    return (DA3 if is_da3 else VGGT).from_state(state, metadata, path)


def build_psfm(config, dtype=torch.float32, teacher=None):
    """An untrained PSFM with `config.backbone` loaded and frozen. Options as in PSFMConfig."""
    backbone = open_backbone(config.backbone).freeze(dtype)
    return PSFM(backbone, config, teacher)


def untrained_like(psfm, config):
    """A PSFM of the same sizes with the same backbone and statistics that was never trained."""
    with torch.random.fork_rng(devices=[]):  # the caller's own random numbers go on
        torch.default_generator.manual_seed(0)
        twin = PSFM(psfm.backbone, config)
    twin.geo_mean = psfm.geo_mean
    twin.geo_std = psfm.geo_std
    return twin.to(psfm.geo_mean.device).eval()


def weights_of_run(run):
    """A run's folder, a file of weights, or a hub id -> path of the file. InputError if none."""
    path = find_file(os.fspath(run))
    if os.path.isfile(path) or path.endswith('.safetensors') or is_hub_id(path):
        return find_weights(path)
    folder = find_checkpoint(path) or path
    file = os.path.join(folder, 'model.safetensors')
    if os.path.isfile(os.path.join(folder, 'spatial_vlm.json')):
        raise InputError(f'{path} is a run of finetune.py; this takes one of train.py')
    if not os.path.isfile(file):
        raise InputError(f'no checkpoint in {path}: train first (python train.py --config small)')
    return file


def read_psfm(path):
    """Weights of train.py -> state, metadata, the options of the run. InputError if not theirs."""
    state, metadata = read_weights(path)
    options = {field.name: field.default for field in fields(PSFMConfig)}  # of those added later
    with contextlib.suppress(KeyError, ValueError, TypeError):
        options.update(json.loads(metadata['config']))
    if 'encoder.queries' not in state or 'backbone' not in options:
        raise InputError(f'{path} does not hold a PSFM')
    return state, metadata, SimpleNamespace(**options)


def check_backbone(backbone, metadata, path, name):
    """Raises InputError if the weights in `path` were trained on another backbone than this one."""
    # `startswith`: older files, as the shipped one, hold eight more digits
    if not metadata.get('backbone', '').startswith(backbone.fingerprint):
        raise InputError(f'{path} was trained on another backbone than the one in {name}, or does '
                         'not say on which: its latents mean nothing there')


def load_psfm(run, device='cpu'):
    """A trained PSFM in eval mode, without a teacher, and the options it was trained with.

    `run`: a folder of train.py, a file, as weights/psfm_small.safetensors, or a hub id.
    What hustvl/Spa3R published is opened by release.open_psfm.
    """
    path = weights_of_run(run)
    state, metadata, config = read_psfm(path)
    psfm = build_psfm(config)
    check_backbone(psfm.backbone, metadata, path, config.backbone)
    load_strictly(psfm, state, path, skip=(*FROZEN, 'heads.sem.', 'sem_'))
    return psfm.to(device).eval(), config
