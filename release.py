"""
What hustvl/Spa3R brings beside the method: its published files, its second
teacher, and its own modules to compare with (from the user's checkout). And how
ours are published: whole folders, model cards.

    open_psfm('spa3r.ckpt')  # or a folder of ours, or a Spa3-VLM folder of the release
    open_spatial_vlm('Spa3-VLM/')  # or a folder of ours

The release trained with RMSNorm on the queries and keys of VGGT's global
blocks, where VGGT has LayerNorm, and its checkpoints hold that altered VGGT.
Either VGGT loads strictly; its names tell which one it is.
"""
import glob
import importlib.util
import math
import os
import pickle
import shutil
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from adapter import (ENCODER, Adapter, SpatialVLM, load_spatial_vlm, merge_lora,
                     save_spatial_vlm)
from backbone import ImageNorm, count_blocks
from chat import load_vlm
from common import InputError, find_checkpoint, first_line, load_strictly, read_weights
from model import cast_matrices
from psfm import PSFM, PSFMConfig, load_psfm, weights_of_run
from vggt import VGGT, VGGTConfig

# their names -> ours: of Spa3R, and of the adapter in a Spa3-VLM
PSFM_NAMES = {'projection.': 'encoder.projection.', 'query_embed.weight': 'encoder.queries',
              'encoder.': 'encoder.transformer.', 'pose_tokenizer.': 'decoder.ray_embed.',
              'decoder.': 'decoder.transformer.', 'depth_prob.': 'depth_probe.',
              'aggregator.': 'backbone.aggregator.', 'camera_head.': 'backbone.camera_head.',
              'depth_head.': 'backbone.depth_head.'}
ADAPTER_NAMES = {'geometry_projector.0.': 'projector.fc1.',
                 'geometry_projector.2.': 'projector.fc2.',
                 'geom_cross_attention.': 'attention.', 'ln.': 'norm.',
                 'geometry_adaptor.0.': 'mlp.fc1.', 'geometry_adaptor.2.': 'mlp.fc2.',
                 'geometry_gate.0.': 'gate.'}


def rename(state, names):
    """A state with the beginnings of its names replaced; names that begin otherwise stay."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        renamed[name] = tensor
    return renamed


# -----------------------------------------------------------------------------
# Spa3R

def load_released(psfm, state, source, assign=False):
    """The release's weights into a PSFM, strictly.

    Only heads and teachers that this PSFM is built without may be left over.
    """
    skip = ['dino.', 'teacher.', 'point_head.', 'geo_mean', 'geo_std', 'sem_mean', 'sem_std']
    if psfm.depth_probe is None:
        skip.append('depth_probe.')
    if psfm.teacher is None:
        skip.append('heads.sem.')
    if 'depth' not in psfm.backbone.config.heads:
        skip.append('backbone.depth_head.')
    load_strictly(psfm, rename(state, PSFM_NAMES), source, tuple(skip), assign)


def read_folder(folder):
    """The weights of all .safetensors files of a folder."""
    state = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*.safetensors'))):
        state.update(read_weights(path)[0])
    return state


def read_released(path):
    """State of spa3r.ckpt, or of the encoder in a Spa3-VLM folder, under Spa3R's own names."""
    if os.path.isdir(path):
        prefix = 'geometry_encoder.spa3r.'
        state = read_folder(path)
        return {name.split(prefix)[1]: x for name, x in state.items() if prefix in name}
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        state = state.get('state_dict', state)
        return {name.removeprefix('model.'): x for name, x in state.items() if torch.is_tensor(x)}
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise InputError(f'{path} cannot be read as a checkpoint of weights '
                         f'({first_line(error)})') from error


def is_released(path):
    """Whether a file or a folder is of the release: train.py's weights hold their options."""
    if not os.path.isdir(path):
        return path.endswith(('.ckpt', '.pt'))
    files = glob.glob(os.path.join(glob.escape(path), '*.safetensors'))
    if not files or find_checkpoint(path):
        return False
    try:
        with safe_open(files[0], 'pt') as file:
            return 'config' not in (file.metadata() or {})
    except SafetensorError:           # whoever reads it will say so
        return True


def released_vggt_config(state):
    """The sizes of the VGGT in a released state, from the shapes."""
    C = state['aggregator.camera_token'].shape[-1]
    embed = 'aggregator.patch_embed.'
    is_layer = any(name.startswith('aggregator.global_blocks.') and name.endswith('q_norm.bias')
                   for name in state)
    return VGGTConfig(
        patch_size=state[embed + 'patch_embed.proj.weight'].shape[-1],
        width=C, depth=count_blocks(state, 'aggregator.frame_blocks.'), num_heads=C // 64,
        num_registers=state['aggregator.register_token'].shape[2],
        embed_depth=count_blocks(state, embed + 'blocks.'), embed_heads=C // 64,
        position_grid=math.isqrt(state[embed + 'pos_embed'].shape[1] - 1),
        global_qk_norm='layer' if is_layer else 'rms',
        camera_depth=count_blocks(state, 'camera_head.trunk.'), camera_heads=C // 64,
        heads=('camera',))


def open_psfm(path, device='cpu'):
    """A trained PSFM in eval mode, ours or the release's, and its options.

    `path`: what psfm.load_psfm takes, or spa3r.ckpt, or a Spa3-VLM folder of
    the release. Of the release, heads that only trained it are left out;
    features are not standardised there.
    """
    path = os.fspath(path)
    if not is_released(path):
        psfm, config = load_psfm(path, device)
        if config.num_latents == 0:
            raise InputError(f'{path} has no latents (--num-latents 0) that a VLM could be given')
        return psfm, config
    state = read_released(path)
    keep = ('projection.', 'query_embed.', 'encoder.', 'decoder.', 'pose_tokenizer.', 'heads.geo.',
            'aggregator.', 'camera_head.')
    state = {name: x.float() for name, x in state.items() if name.startswith(keep)}

    try:
        num_latents, width = state['query_embed.weight'].shape
        vggt = released_vggt_config(state)
    except KeyError as error:
        raise InputError(f'{path} holds no released Spa3R (no {error})') from error
    sizes = PSFMConfig(width, count_blocks(state, 'encoder.blocks.'),
                       count_blocks(state, 'decoder.blocks.'), width // 64, num_latents,
                       standardised=False)
    with torch.device('meta'):
        psfm = PSFM(VGGT(vggt), sizes)
    load_released(psfm, state, path, assign=True)
    psfm.geo_mean = torch.zeros(psfm.backbone.feature_dim)
    psfm.geo_std = torch.ones(psfm.backbone.feature_dim)
    psfm.backbone.freeze()
    config = SimpleNamespace(**vars(sizes), backbone=path, data='',
                             image_width=37 * vggt.patch_size)
    return psfm.to(device).eval(), config


# -----------------------------------------------------------------------------
# its own modules, to compare with

DRAWING = ('matplotlib', 'matplotlib.pyplot', 'torchvision', 'torchvision.transforms',
           'torchvision.transforms.v2')   # a training step without the teacher calls none of it


def import_release(folder):
    """-> the modules spa3r.models.spa3r, spa3r.models.masked_vggt and vggt.heads.camera_head.

    `folder`: a checkout of hustvl/Spa3R, with VGGT in submodules/vggt or beside it. The packages'
    own __init__ files are passed over: they ask for Lightning and Hydra. Raises InputError that
    names what is missing.
    """
    if not os.path.isfile(os.path.join(folder, 'spa3r', 'models', 'spa3r.py')):
        raise InputError(f'{folder} is no checkout of hustvl/Spa3R (no spa3r/models/spa3r.py)')
    missing = [name for name in DRAWING if not importlib.util.find_spec(name.split('.')[0])]
    here = os.path.dirname(os.path.abspath(__file__))  # our vggt.py has the name of their package
    places = [folder, f'{folder}/submodules/vggt', f'{folder}/../vggt']
    places += [path for path in sys.path if os.path.abspath(path) != here]
    ours = sys.modules.pop('vggt')
    sys.modules.update({name: mock.MagicMock() for name in missing})
    for name in ('spa3r', 'spa3r.models'):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [os.path.join(folder, *name.split('.'))]
    try:
        with mock.patch.object(sys, 'path', places):
            return [importlib.import_module(name) for name in (
                'spa3r.models.spa3r', 'spa3r.models.masked_vggt', 'vggt.heads.camera_head')]
    except ImportError as error:
        raise InputError(f'{folder} cannot be imported: {error} (it needs einops, and VGGT in '
                         'submodules/vggt)') from error
    finally:
        for name in list(sys.modules):
            if name.split('.')[0] in ('vggt', 'spa3r') or name in missing:
                del sys.modules[name]
        sys.modules['vggt'] = ours


def build_release(folder, vggt, config):
    """The release's Spa3R with random weights, without its teacher and its depth probe.

    vggt: a VGGTConfig, whose sizes its VGGT gets. config: sizes of ours.
    """
    theirs, masked, heads = import_release(folder)
    embeds = {384: 'dinov2_vits14_reg', 768: 'dinov2_vitb14_reg', 1024: 'dinov2_vitl14_reg'}

    backbone = nn.Module()
    backbone.aggregator = masked.MaskedAggregator(
        embed_dim=vggt.width, num_heads=vggt.num_heads, depth=vggt.depth,
        patch_embed=embeds[vggt.width])
    backbone.camera_head = heads.CameraHead(
        dim_in=2 * vggt.width, num_heads=vggt.camera_heads, trunk_depth=vggt.camera_depth)
    with torch.no_grad():
        backbone.camera_head.pose_branch.fc2.bias[7:] += 0.25  # radians: fields of view near 1
    backbone.point_head = backbone.depth_head = None
    teacher = nn.Module()
    teacher.embed_dim = 1
    masked.MaskedVGGT.from_pretrained = lambda *_: backbone
    with mock.patch.object(torch.hub, 'load', lambda *_: teacher):
        spa3r = theirs.Spa3R(config.width, config.mask_ratio, num_queries=config.num_latents,
                             num_encoder_layers=config.encoder_depth, num_heads=config.num_heads,
                             num_decoder_layers=config.decoder_depth)
    del spa3r.dino, spa3r.heads['sem'], spa3r.depth_prob
    return spa3r


# -----------------------------------------------------------------------------
# Spa3-VLM

def released_adapter(state):
    """The adapter's weights in a state of the release, under our names. Any prefix may stand before
    them, but none of another part of the VLM or of Spa3R."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in ADAPTER_NAMES.items():
            before, found, after = f'.{name}'.partition(f'.{theirs}')
            if found and not any(part in before for part in ('visual', 'layers', 'geometry_')):
                renamed[ours + after] = tensor
    return renamed


def open_spatial_vlm(folder, dtype=torch.float32, max_pixels=None):
    """-> (SpatialVLM, Chat, settings) from a folder of ours, or a Spa3-VLM folder of the release.

    The release's folder is a Qwen2.5-VL, with the adapter and Spa3R under names of their own.
    """
    if os.path.isfile(os.path.join(folder, 'spatial_vlm.json')):
        return load_spatial_vlm(folder, dtype, max_pixels)
    ours = released_adapter(read_folder(folder))
    if 'attention.q_norm.weight' not in ours:
        raise InputError(f'{folder} is no Spa3-VLM: neither a run of finetune.py '
                         '(spatial_vlm.json) nor the release (weights geom_cross_attention.*)')
    max_pixels = max_pixels or 518 * 392  # the release shows its VLM pictures 518 pixels wide
    vlm, chat = load_vlm(folder, dtype, max_pixels, leave=('geometry_', 'geom_', 'ln.'))
    hidden, latent_width = ours['projector.fc1.weight'].shape
    head_dim = len(ours['attention.q_norm.weight'])
    adapter = Adapter(latent_width, hidden, hidden // head_dim)
    load_strictly(adapter, {name: x.float() for name, x in ours.items()}, folder)
    settings = dict(vlm=folder, latents='psfm', encoder=folder, latent_width=latent_width,
                    num_frames=8, max_pixels=max_pixels)
    return SpatialVLM(vlm, adapter), chat, settings


def export_spatial_vlm(folder, out):
    """A fine-tuned VLM, ours or the release's, as one folder for others: LoRA merged into out/vlm,
    which transformers opens; the adapter; the encoder, where it is ours (the release's stays where
    it is, and the encoder's frozen backbone is loaded from where it came)."""
    if os.path.exists(os.path.join(out, 'state.json')):
        raise InputError(f'--out {out} is the checkpoint of a run: take another folder')
    if os.path.realpath(out) == os.path.realpath(folder):
        raise InputError(f'--out {out} is the folder itself: take another one')
    model, chat, settings = open_spatial_vlm(folder)
    merge_lora(model.vlm)
    settings = dict(settings, lora_rank=0)
    os.makedirs(out, exist_ok=True)
    encoder = settings['encoder']
    if is_released(encoder):
        settings['encoder'] = os.path.abspath(encoder)
    elif settings['latents'] not in ('none', 'oracle'):
        shutil.copyfile(weights_of_run(encoder), os.path.join(out, ENCODER))
        settings['encoder'] = ENCODER
    save_spatial_vlm(model, chat, out, settings, with_vlm=True)
    card = os.path.join(folder, 'README.md')
    if os.path.isfile(card):
        shutil.copyfile(card, os.path.join(out, 'README.md'))


# -----------------------------------------------------------------------------
# the second teacher

class SemanticTeacher(nn.Module):
    """A frozen image encoder of transformers (DINOv2, DINOv3), the teacher of the 'sem' head.

    differs from the release: images are resized with antialiasing and keep their aspect.
    """

    def __init__(self, model, width=224, dtype=torch.float32):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.width = width
        self.patch_size, self.feature_dim = model.config.patch_size, model.config.hidden_size
        cast_matrices(self.model, dtype)
        self.image_norm = ImageNorm()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images, grid):
        """Images (B, V, 3, H, W) in [0, 1] -> features (B, V, N, S) on the backbone's grid."""
        p = self.patch_size
        B, V = images.shape[:2]
        w = self.width // p
        h = max(1, round(w * images.shape[-2] / images.shape[-1]))
        x = F.interpolate(images.flatten(0, 1), (h * p, w * p), mode='bilinear', antialias=True)
        tokens = self.model(self.image_norm(x)).last_hidden_state
        patches = tokens[:, -h * w:].float()  # the class token and registers come first
        x = patches.transpose(1, 2).unflatten(2, (h, w))  # (B V, S, h, w)
        x = F.interpolate(x, grid, mode='bilinear', antialias=True)
        return x.flatten(2).transpose(1, 2).unflatten(0, (B, V))  # (B, V, N, S)


def load_teacher(source, dtype=torch.float32):
    """A hub id or a folder of transformers -> SemanticTeacher, or None for an empty name."""
    if not source:
        return None
    from transformers import AutoModel
    try:
        model = AutoModel.from_pretrained(source, dtype=torch.float32)  # not that of the file
        return SemanticTeacher(model, dtype=dtype)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError) as error:
        raise InputError(
            f'--teacher {source} could not be loaded ({first_line(error)}): if it is '
            'gated, ask for access on its page of the hub and run `hf auth login`; or take an '
            'open one (--teacher facebook/dinov2-with-registers-large), or none (--teacher "")'
        ) from error


# -----------------------------------------------------------------------------
# model cards

LICENCES = {'weights/mini_v': 'MIT', 'weights/psfm_small': 'MIT',
            'facebook/VGGT-1B-Commercial': 'VGGT licence, commercial use allowed',
            'facebook/VGGT': 'non-commercial', 'depth-anything/DA3-SMALL': 'Apache 2.0',
            'depth-anything/DA3-BASE': 'Apache 2.0', 'facebook/dinov3': 'DINOv3 licence',
            'facebook/dinov2': 'Apache 2.0', 'Qwen/Qwen2.5-VL-3B': 'Qwen research licence',
            'Qwen/Qwen2.5-VL-7B': 'Apache 2.0', 'HuggingFaceTB/SmolVLM': 'Apache 2.0'}


def with_licence(source):
    """A name of weights, and the licence that they came under, as far as it is known here."""
    known = [licence for name, licence in LICENCES.items() if source.startswith(name)]
    return f'`{source}` ({known[0] if known else "see there for its licence"})' if source else ''


def write_card(folder, title, usage, rows):
    """README.md beside weights, as the hub shows it. rows: {fact: text}; empty ones are left out"""
    lines = [f'# {title}', '', f'From Spa3R, arXiv 2602.21186. {usage}', '', '| | |', '|---|---|']
    lines += [f'| {fact} | {text} |' for fact, text in rows.items() if text]
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as file:
        file.write('\n'.join(lines) + '\n')
