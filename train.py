"""
Trains PSFM (Spa3R, arXiv 2602.21186), or the mini VGGT that it stands on.

    python train.py --config small                        # any laptop: procedural rooms, mini backbone, minutes
    python train.py --config small --data photos/         # the same on your own pictures
    python train.py --config medium --data scenes/        # one GPU, VGGT-1B
    torchrun --nproc_per_node 8 train.py --config base --data scenes/     # the paper
    python train.py --config mini-vggt                    # makes weights/mini_vggt.safetensors

Every field of Config is an option (`--help`), the presets below set the others.
Everything goes to out/<config>/: config.json, log.jsonl, metrics.json, field.png and
checkpoint/ (`--resume` continues from it, with the very same losses).
"""
import argparse
import contextlib
import dataclasses
import datetime
import difflib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Batches, RoomPool, make_source, step_generator
from eval import backbone_line, backbone_table, draw_field, evaluate_backbone, evaluate_field, field_line, field_table
from model import InputError, load_strictly, pick_device, read_weights
from psfm import build_psfm, compile_blocks, fingerprint, random_view_mask
from vggt import MINI, VGGT, MiniVGGTTrainer, scene_extrinsics


def opt(default, help):
    return field(default=default, metadata={'help': help})


@dataclass(frozen=True)
class Config:
    # what is trained
    task: str = opt('psfm', 'psfm | mini-vggt')
    backbone: str = opt('weights/mini_vggt.safetensors', 'the frozen VGGT: a file, a folder, or a hub id')
    # the field
    width: int = opt(128, 'D, of encoder and decoder')
    encoder_depth: int = opt(3, 'blocks')
    decoder_depth: int = opt(3, 'blocks')
    num_heads: int = opt(2, 'attention heads')
    num_latents: int = opt(32, 'Q, the size of z; 0: a decoder that knows the camera alone')
    num_registers: int = opt(4, 'register tokens')
    mask_ratio: float = opt(0.5, 'share of the views that are hidden: targets')
    context: str = opt('asymmetric', 'asymmetric (one pass, context views see only each other) | separate (two passes)')
    cameras: str = opt('predicted', "predicted by the backbone (the paper) | given by the source (rooms have them)")
    standardised: bool = opt(True, 'standardise features per channel (the release does not)')
    teacher: str = opt('', "a second teacher for the 'sem' head, a hub id of transformers (the paper: DINOv3 ViT-L)")
    depth_probe: bool = opt(False, "also train a probe that reads the backbone's depth off the field")
    # data
    data: str = opt('rooms', 'rooms, or a folder of photographs: one sub-folder a scene, or one flat folder = one scene')
    image_width: int = opt(64, 'pixels; pictures are resized to it and cropped to multiples of the patch size')
    min_views: int = opt(4, 'views a sample, drawn anew for each batch between this ..')
    max_views: int = opt(8, '.. and this')
    images_per_batch: int = opt(72, 'scenes a batch = this // views')
    min_gap: int = opt(1, 'photographs: frames between neighbouring views, at least ..')
    max_gap: int = opt(4, '.. and at most')
    workers: int = opt(2, 'photographs: processes that read them')
    num_rooms: int = opt(400, 'rooms: how many are kept in memory')
    new_rooms: float = opt(1.0, 'rooms: how many of them are replaced at each step')
    val_scenes: int = opt(96, 'held-out samples to evaluate on')
    # optimisation
    init: str = opt('', '.safetensors file with weights to begin with, of the same task and sizes; features stay standardised as they were there')
    steps: int = opt(2000, 'optimiser steps')
    accumulate: int = opt(1, 'batches a step')
    lr: float = opt(1e-3, 'peak learning rate of AdamW')
    muon_lr: float = opt(0.0, "peak learning rate of Muon for the blocks' matrices; 0: AdamW for them too")
    min_lr: float = opt(0.1, 'where the cosine ends, as a share of the peak')
    warmup: int = opt(100, 'steps of linear warm-up (a tenth of all at most)')
    decay_from: float = opt(0.0, 'share of the training after which the cosine begins')
    weight_decay: float = opt(1e-2, 'on matrices only')
    beta2: float = opt(0.98, "Adam's second moment")
    clip: float = opt(1.0, 'largest gradient norm')
    # running
    eval_every: int = opt(250, 'steps between evaluations and checkpoints')
    log_every: int = opt(20, 'steps between log lines')
    out: str = opt('', 'folder for everything that is written (default: out/<config>)')
    seed: int = opt(0, 'of weights, data and masks')
    device: str = opt('auto', 'auto | cpu | cuda | mps')
    dtype: str = opt('auto', 'auto | float32 | bfloat16 (autocast)')
    compile: bool = opt(None, 'torch.compile the blocks (default: on a CUDA GPU only)')
    resume: bool = opt(False, 'continue from <out>/checkpoint')


PRESETS = {
    # any laptop: procedural rooms, the mini backbone
    'small': dict(images_per_batch=24, steps=1200, lr=2e-3, muon_lr=4e-3, min_lr=0.03, eval_every=400, log_every=100),
    # one consumer GPU: VGGT-1B at 224 pixels
    'medium': dict(backbone='facebook/VGGT-1B', width=384, encoder_depth=4, decoder_depth=4, num_heads=6, num_latents=64,
                   image_width=224, min_views=4, max_views=8, images_per_batch=24, min_gap=2, max_gap=10, workers=4,
                   steps=20_000, lr=1e-3, warmup=500, eval_every=1000),
    # the paper: 8 GPUs x 24 images x 2, 80 k steps
    'base': dict(backbone='facebook/VGGT-1B', width=768, encoder_depth=6, decoder_depth=6, num_heads=12, num_latents=256,
                 teacher='facebook/dinov3-vitl16-pretrain-lvd1689m', depth_probe=True, data='', image_width=518, min_views=4,
                 max_views=12, images_per_batch=24, min_gap=2, max_gap=6, workers=8, steps=80_000, accumulate=2, lr=2e-3,
                 warmup=0, weight_decay=1e-4, beta2=0.999, eval_every=2000, log_every=50),
    # makes weights/mini_vggt.safetensors
    'mini-vggt': dict(task='mini-vggt', num_rooms=1600, new_rooms=2.0, val_scenes=100, steps=8000, muon_lr=2e-3, min_lr=0.02,
                      decay_from=0.55, clip=2.0, eval_every=1000, log_every=50),
}
CHOICES = dict(task=('psfm', 'mini-vggt'), context=('asymmetric', 'separate'), cameras=('predicted', 'given'),
               dtype=('auto', 'float32', 'bfloat16'))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        if message.startswith('unrecognized arguments: '):
            word = message.split()[2].split('=')[0]
            near = difflib.get_close_matches(word, self._option_string_actions, 3)
            message = f'no option {word}' + (f'; did you mean {" or ".join(near)}?' if near else '; see --help')
        self.exit(2, f'error: {message}\n')


def parse_options(argv, doc, Config, presets, choices):
    """Command line -> (name of the preset, Config): the preset's values, then the options given. Any script's dataclass will do."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--config', default='small', help=f'one of {", ".join(presets)} (default: small)')
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        parser.add_argument('--' + f.name.replace('_', '-'), dest=f.name, default=argparse.SUPPRESS,
                            help=f.metadata['help'].replace('%', '%%'), **kind)
    given = vars(parser.parse_args(argv))
    name = given.pop('config')
    if name not in presets:
        near = difflib.get_close_matches(name, presets, 1)
        raise InputError(f'no preset {name!r}' + (f', did you mean {near[0]}?' if near else '') + f'; there are {", ".join(presets)}')
    config = Config(**{**presets[name], **given})
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            raise InputError(f'--{key.replace("_", "-")} takes {" or ".join(allowed)}, not {getattr(config, key)}')
    return name, config


def parse_config(argv=None):
    """Command line -> (name of the preset, Config), checked."""
    name, config = parse_options(argv, __doc__, Config, PRESETS, CHOICES)
    config = config if config.out else dataclasses.replace(config, out=os.path.join('out', name))
    for key in ('steps', 'images_per_batch', 'accumulate', 'eval_every', 'log_every', 'val_scenes', 'num_rooms'):
        if getattr(config, key) < 1:
            raise InputError(f'--{key.replace("_", "-")} must be at least 1, not {getattr(config, key)}')
    if config.workers < 0 or not 1 <= config.min_gap <= config.max_gap:
        raise InputError(f'--workers {config.workers} --min-gap {config.min_gap} --max-gap {config.max_gap}: none may be negative, gaps in this order')
    if config.task == 'mini-vggt' and config.data != 'rooms':
        raise InputError('mini-vggt learns from rooms alone, where cameras and depth are known: leave --data out')
    if config.task == 'psfm':
        if not config.data:
            raise InputError(f'{name} trains on your own pictures: --data FOLDER (one sub-folder a scene)')
        if config.num_latents < 0:
            raise InputError(f'--num-latents {config.num_latents} must be 0 or more')
        if config.min_views > config.max_views or config.min_views < 2:
            raise InputError(f'--min-views {config.min_views} --max-views {config.max_views}: at least 2, and in this order')
        if not 0 < config.mask_ratio < 1:
            raise InputError(f'--mask-ratio {config.mask_ratio} must lie between 0 and 1: some views are context, some are targets')
        if config.width % config.num_heads or config.width // config.num_heads % 8:
            raise InputError(f'--width {config.width} over --num-heads {config.num_heads}: a head needs a multiple of 8 channels')
        if config.cameras == 'given' and config.data != 'rooms':
            raise InputError('--cameras given: only rooms come with cameras; photographs have them predicted')
        if config.data == 'rooms' and config.max_views > RoomPool.VIEWS:
            raise InputError(f'--max-views {config.max_views}: a room has {RoomPool.VIEWS} views')
    return name, config


# -----------------------------------------------------------------------------
# the machine

def pick_dtype(name, device):
    """Autocast dtype and the reason for it: bfloat16 where the hardware has it, measured on a CPU."""
    if name != 'auto':
        return getattr(torch, name), 'as asked'
    if device.type == 'cuda':
        return (torch.bfloat16, 'the GPU has it') if torch.cuda.is_bf16_supported(including_emulation=False) else (torch.float32, 'the GPU has no bf16')
    if device.type == 'mps':
        return torch.float32, 'mps'
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 128, dtype=dtype), torch.randn(128, 512, dtype=dtype)
        runs = []
        for _ in range(20):
            start = time.perf_counter()
            a @ b
            runs.append(time.perf_counter() - start)
        times[dtype] = sorted(runs)[10]
    ratio = times[torch.float32] / times[torch.bfloat16]
    return (torch.bfloat16 if ratio > 1.3 else torch.float32), f'measured: bf16 matrices are {ratio:.1f} x as fast as fp32 here'


def learning_rate(step, config):
    """Share of the peak at `step`: linear warm-up, then flat, then a cosine from `decay_from` on. A pure function."""
    warmup = min(config.warmup, config.steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, config.decay_from * config.steps)
    progress = min(1.0, max(0.0, (step - start) / max(1, config.steps - start)))
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizers, peaks, share):
    """Every group of parameters gets `share` of its peak learning rate."""
    for group, peak in zip([group for optimizer in optimizers for group in optimizer.param_groups], peaks):
        group['lr'] = share * peak


def orthogonalise(matrices):
    """Newton-Schulz (Muon's quintic, five iterations): pushes all singular values of matrices (n, r, c) towards 1."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised (arXiv 2502.16982), for matrices; the update is scaled to AdamW's size.

    torch.optim.Muon, one matrix after the other and in bf16 whatever the machine, takes three quarters of a step on a
    CPU that has no bf16. Here all matrices of one shape go together, in bf16 on a GPU and in fp32 elsewhere.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                directions = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]['momentum'] = torch.zeros_like(p)
                    momentum = self.state[p]['momentum']
                    momentum.lerp_(p.grad, 1 - group['momentum'])
                    directions.append(p.grad.lerp(momentum, group['momentum']))           # Nesterov's look ahead
                directions = torch.stack(directions)
                updates = orthogonalise(directions.bfloat16() if directions.is_cuda else directions)
                for p, update in zip(params, updates):
                    p.mul_(1 - group['lr'] * group['weight_decay']).sub_(update, alpha=group['lr'] * 0.2 * max(shape) ** 0.5)


def make_optimizers(model, config, device):
    """AdamW, fused where it exists; with `muon_lr`, Muon for the matrices inside transformer blocks."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    in_blocks = lambda name, p: config.muon_lr > 0 and p.ndim == 2 and 'blocks.' in name
    rest = [(name, p) for name, p in named if not in_blocks(name, p)]
    groups = [dict(params=[p for _, p in rest if p.ndim >= 2], weight_decay=config.weight_decay),
              dict(params=[p for _, p in rest if p.ndim < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=device.type in ('cuda', 'cpu'))]
    if config.muon_lr > 0:
        matrices = [p for name, p in named if in_blocks(name, p)]
        optimizers.append(Muon(matrices, config.muon_lr, config.weight_decay))
    return optimizers


# dense bf16 TFLOP/s by device name; the first match counts
PEAKS = [('H200', 989), ('H100 PCIe', 756), ('H100', 989), ('A100', 312), ('L40S', 362), ('4090', 165), ('3090', 71)]


def peak_flops(device):
    """FLOP/s at best, or None where they are not known."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    return next((1e12 * peak for key, peak in PEAKS if key in name), None)


def flops_per_view(model, inputs, autocast):
    """Counted once, on an eager forward and backward pass, before anything is compiled."""
    with FlopCounterMode(display=False) as counter:
        with autocast:
            loss = model(**inputs)['loss']
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / inputs['images'].shape[0] / inputs['images'].shape[1]


def peak_memory(device):
    """Bytes at most: of the GPU, or of the process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                       # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


# -----------------------------------------------------------------------------
# checkpoints: model.safetensors (what is trained), optimizer.pt, state.json

FROZEN = ('backbone.', 'teacher.')      # never in a checkpoint: loaded from where they came from


def trained_state(model):
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items() if not name.startswith(FROZEN)}


def write_checkpoint(folder, step, write):
    """`write` fills a new folder beside the old one, then they are swapped: at no moment is there no whole checkpoint."""
    new, old = folder + '.new', folder + '.old'
    try:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)
        write(new)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise InputError(f'could not write the checkpoint of step {step} to {folder} ({error}); '
                         'what was saved before is still there: make room and continue with --resume') from error
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(folder, model, optimizers, step, config, dtype, metrics):
    settings = dataclasses.asdict(config)
    metadata = {'config': json.dumps(settings), 'step': str(step)}
    if config.task == 'psfm':
        metadata['backbone'] = fingerprint(model.backbone)

    def write(new):
        save_file(trained_state(model), os.path.join(new, 'model.safetensors'), metadata)
        torch.save([optimizer.state_dict() for optimizer in optimizers], os.path.join(new, 'optimizer.pt'))
        write_state(new, step, config, dtype, metrics)
    write_checkpoint(folder, step, write)


def write_state(folder, step, config, dtype, metrics):
    """state.json, which `read_state` reads."""
    with open(os.path.join(folder, 'state.json'), 'w') as file:
        json.dump(dict(step=step, dtype=str(dtype).removeprefix('torch.'), config=dataclasses.asdict(config), metrics=metrics), file, indent=1)


def read_state(folder, config):
    """state.json of the checkpoint to resume from. Refuses one of another configuration, and says what differs."""
    if not os.path.isdir(folder) and os.path.isdir(folder + '.old'):
        folder += '.old'
    if not os.path.isdir(folder):
        raise InputError(f'--resume: no checkpoint at {folder}; leave --resume out to start from the beginning')
    with open(os.path.join(folder, 'state.json')) as file:
        state = json.load(file)
    free = {'resume', 'out', 'device', 'eval_every', 'log_every', 'compile', 'steps', 'dtype', 'workers'}
    ours = dataclasses.asdict(config)
    differs = [f'{key} {state["config"].get(key)} there, {value} here' for key, value in ours.items()
               if key not in free and state['config'].get(key) != value]
    if differs:
        raise InputError(f'--resume: {folder} was trained with another configuration ({"; ".join(differs[:4])}); '
                         'give the same options, or another --out')
    return {**state, 'folder': folder}


def load_checkpoint(state, model, optimizers):
    folder = state['folder']
    load_strictly(model, read_weights(os.path.join(folder, 'model.safetensors'))[0], folder, skip=FROZEN)
    states = torch.load(os.path.join(folder, 'optimizer.pt'), map_location='cpu', weights_only=True)
    for optimizer, saved in zip(optimizers, states):
        optimizer.load_state_dict(saved)


# -----------------------------------------------------------------------------
# the mini VGGT: a curriculum and an export

def mini_vggt_batch(pool, step, config):
    """From two views with little motion between them to six of any motion; fewer views, more scenes.

    Weights that are trained on (--init) are past the lessons with two views.
    """
    progress = step / (config.steps * config.accumulate)
    if config.init:
        progress = 0.4 + 0.6 * progress
    if progress < 0.2:
        B, V = 14, 2
    elif progress < 0.4:
        B, V = [(14, 2), (10, 3), (8, 4)][step % 3]
    else:
        B, V = [(10, 3), (8, 4), (7, 5), (6, 6)][step % 4]
    neighbours = min(1.0, max(0.0, 1.2 - 2 * progress))
    keep_closest = 1 / (3 - 2 * progress / 0.3) if V == 2 and progress < 0.3 else 1.0
    batch = pool.batch(step, B, V, neighbours, keep_closest)
    return dict(batch, match_shift=int(torch.randint(1, V, (1,), generator=step_generator(config.seed, step, 2))))


def export_mini_vggt(model, path, config, metrics, command):
    """The backbone without the heads that only trained it, fp16; how it was made goes into the file's metadata."""
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.vggt.state_dict().items()}
    save_file(state, path, {'config': json.dumps(dataclasses.asdict(model.vggt.config)), 'command': command,
                            'training': json.dumps(dataclasses.asdict(config)), 'metrics': json.dumps(metrics)})


# -----------------------------------------------------------------------------

@torch.no_grad()
def measure_statistics(psfm, source, config, device, autocast, num_batches=8):
    """Mean and deviation of every feature channel, from a few training batches, into the model's buffers."""
    geo, sem, batches = [], [], Batches(source, config)
    for step in range(num_batches):
        images = batches[step]['images'].to(device)
        mask, num_context = random_view_mask(*images.shape[:2], config.mask_ratio, step_generator(config.seed, step, 4))
        with autocast:
            views = psfm.observe(images, mask.to(device), num_context)[1]
            geo.append(views.features.float().flatten(0, 2))
            if psfm.teacher is not None:
                sem.append(psfm.teacher(images, views.grid).float().flatten(0, 2))
    psfm.set_statistics('geo', torch.cat(geo))
    if sem:
        psfm.set_statistics('sem', torch.cat(sem))


def join_processes(device):
    """This process's place among those that torchrun started, (0, 1) without it. -> rank, number of processes, device (each its own GPU)"""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(device)
    if world_size > 1:
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # one process evaluates and writes while the others wait for it
            dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=datetime.timedelta(hours=2))
    return rank, world_size, device


def quiet(text):
    pass


def open_log(path, first):
    """log.jsonl, open for writing, with only the records up to the checkpoint that is resumed."""
    lines = open(path).readlines() if first and os.path.isfile(path) else []
    log = open(path, 'w')
    log.writelines(line for line in lines if json.loads(line)['step'] < first + ('"metrics"' in line))
    return log


def check_finite(losses, norm, step, checkpoint):
    """-> the losses as numbers. Stops before broken weights could replace good ones."""
    values = {key: value.item() for key, value in losses.items()}
    if not math.isfinite(values['loss'] + norm.item()):
        raise InputError(f'the loss is {values["loss"]} and the gradient norm {norm.item()} at step {step}: try a lower --lr, or --dtype float32; '
                         f'what was saved before is in {checkpoint}')
    return values


def main(argv=None):
    name, config = parse_config(argv)
    began = time.time()

    # the machine: one process a GPU, started by torchrun
    rank, world_size, device = join_processes(config.device)
    is_main = rank == 0
    say = tqdm.write if is_main else quiet
    checkpoint = os.path.join(config.out, 'checkpoint')
    state = read_state(checkpoint, config) if config.resume else dict(step=0, metrics={})
    first = state['step']
    dtype, reason = pick_dtype(state.get('dtype', config.dtype), device)
    reason = 'as before' if config.resume else reason
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(config.seed)

    # data and model
    is_mini = config.task == 'mini-vggt'
    if is_mini:
        model, multiple = MiniVGGTTrainer(), MINI.patch_size
    else:
        model = build_psfm(config, dtype)
        multiple = model.backbone.config.patch_size
    if config.init and not config.resume:
        if is_mini:
            load_strictly(model.vggt, VGGT.from_pretrained(config.init).state_dict(), config.init)
        else:
            load_strictly(model, read_weights(config.init)[0], config.init, skip=FROZEN)
    model.to(device)
    source = make_source(config, 'train', multiple, device, rank, world_size, say)
    held_out = make_source(config, 'val', multiple, device, say=quiet)
    os.makedirs(config.out, exist_ok=True)
    if is_main:
        with open(os.path.join(config.out, 'config.json'), 'w') as file:
            json.dump(dataclasses.asdict(config), file, indent=1)
    say(f'{name}: ' + ' '.join(f'{key}={value}' for key, value in dataclasses.asdict(config).items()))
    optimizers = make_optimizers(model, config, device)
    peaks = [group['lr'] for optimizer in optimizers for group in optimizer.param_groups]
    if config.resume:
        load_checkpoint(state, model, optimizers)
    count = lambda grad: sum(p.numel() for p in model.parameters() if p.requires_grad == grad) / 1e6
    say(f'{count(True):.2f} M parameters to train, {count(False):.2f} M frozen | {device}, {dtype} ({reason}) | writing to {config.out}/')
    if config.data != 'rooms':
        say(f'{config.data}: {len(source.scenes)} scene{"s" * (len(source.scenes) > 1)} to train on, held out: {held_out.held_out}')
    source.advance(first * config.accumulate, lambda blocks: tqdm(blocks, 'rendering rooms', leave=False, disable=not is_main))
    if is_mini:
        loader = (mini_vggt_batch(source, step, config) for step in range(first * config.accumulate, config.steps * config.accumulate))
    else:
        if not config.resume and not config.init:
            measure_statistics(model, source, config, device, autocast)
        loader = iter(torch.utils.data.DataLoader(
            Batches(source, config), batch_size=None, sampler=range(first * config.accumulate, config.steps * config.accumulate),
            num_workers=0 if config.data == 'rooms' else min(config.workers, os.cpu_count()), pin_memory=device.type == 'cuda' and config.data != 'rooms'))
    ceiling = peak_flops(device) if not is_mini else None
    if ceiling:
        images = source.batch(first * config.accumulate, 1, (config.min_views + config.max_views) // 2)['images'].to(device)
        work = flops_per_view(model, dict(images=images), autocast)
    if config.compile or config.compile is None and device.type == 'cuda':
        if shutil.which(os.environ.get('CC', 'cc')) or shutil.which('gcc') or shutil.which('cl'):
            compile_blocks(model)
        else:
            say('not compiled: torch.compile needs a C compiler, and there is none on the PATH')
    ddp = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    model.train()

    log = open_log(os.path.join(config.out, 'log.jsonl'), first) if is_main else open(os.devnull, 'w')
    metrics, busy, views_done, logged = state['metrics'], 0.0, 0, first
    for step in range(first, config.steps + 1):
        # evaluate and save
        if step == config.steps or step > first and step % config.eval_every == 0:
            if is_mini:
                metrics = evaluate_backbone(model.vggt, held_out, config.val_scenes, autocast)
                line = backbone_line(metrics)
            else:
                metrics = evaluate_field(model, source, held_out, step * config.accumulate, config, device, autocast)
                line = field_line(metrics)
            say(f'step {step:05d}/{config.steps:05d} | {line}')
            log.write(json.dumps(dict(step=step, metrics=metrics)) + '\n')
            if is_main:
                if step > first:
                    check_finite(losses, norm, step, checkpoint)
                save_checkpoint(checkpoint, model, optimizers, step, config, dtype, metrics)
        if step == config.steps:
            break

        # this step's learning rate
        start, share = time.time(), learning_rate(step, config)
        set_rates(optimizers, peaks, share)

        # forward, backward, update
        for micro in range(config.accumulate):
            batch = {key: x.to(device, non_blocking=True) if torch.is_tensor(x) else x for key, x in next(loader).items()}
            if is_mini:
                inputs = batch
            else:
                seed = step_generator(config.seed, step * config.accumulate + micro, rank, 3).initial_seed()
                inputs = dict(images=batch['images'], generator=torch.Generator(device).manual_seed(seed))
                if config.cameras == 'given':
                    inputs.update(extrinsics=scene_extrinsics(batch['extrinsics']), intrinsics=batch['intrinsics'])
            last = micro == config.accumulate - 1
            with contextlib.nullcontext() if last or world_size == 1 else ddp.no_sync():
                with autocast:
                    losses = ddp(**inputs)
                (losses['loss'] / config.accumulate).backward()
            views_done += batch['images'].shape[0] * batch['images'].shape[1] * world_size
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        is_logged = step == first or (step + 1) % config.log_every == 0
        if is_logged:
            values = check_finite(losses, norm, step, checkpoint)                         # waits for the device
        busy += time.time() - start

        # log
        if is_logged:
            steps_done, r2 = step + 1 - logged, metrics.get('psfm', {}).get('r2')
            record = dict(step=step, **values, r2=r2, lr=share * config.lr, grad_norm=norm.item(), step_ms=1e3 * busy / steps_done,
                          views_per_second=views_done / busy, memory_gb=peak_memory(device) / 2 ** 30, seconds=time.time() - began)
            log.write(json.dumps(record) + '\n')
            log.flush()
            parts = ' '.join(f'{key} {value:.3f}' for key, value in values.items() if key != 'loss')
            say(f'step {step:05d}/{config.steps:05d} | loss {values["loss"]:.4f} {parts} | ' + (f'R2 {r2:.3f} | ' if r2 is not None else '')
                + f'lr {record["lr"]:.1e} | gnorm {norm:.2f} | {record["step_ms"]:.0f} ms | {record["views_per_second"]:.0f} views/s | '
                + (f'mfu {100 * record["views_per_second"] / world_size * work / ceiling:.1f}% | ' if ceiling else '')
                + f'mem {record["memory_gb"]:.1f} GB')
            busy, views_done, logged = 0.0, 0, step + 1

    # what came of it
    if is_main:
        cost = dict(step=config.steps, seconds=time.time() - began, peak_memory_gb=peak_memory(device) / 2 ** 30)
        with open(os.path.join(config.out, 'metrics.json'), 'w') as file:
            json.dump({**metrics, **cost}, file, indent=1)
        say(f'\n{name} took {cost["seconds"] / 60:.1f} minutes and {cost["peak_memory_gb"]:.1f} GB')
        if is_mini:
            path = os.path.join(config.out if config.out != 'out/mini-vggt' else 'weights', 'mini_vggt.safetensors')
            os.makedirs(os.path.dirname(path), exist_ok=True)
            export_mini_vggt(model, path, config, metrics, 'python train.py ' + ' '.join(sys.argv[1:] if argv is None else argv))
            say(f'{backbone_table(metrics)}\nwrote {path}\nnext: python train.py --config small --backbone {path}')
        else:
            draw_field(model, held_out, config, device, autocast, os.path.join(config.out, 'field.png'))
            say(f'{field_table(metrics, held_out.held_out)}\nwrote {config.out}/field.png (look at it), metrics.json, log.jsonl, checkpoint/')
    if world_size > 1:
        dist.destroy_process_group()


def run_script(main):
    """Runs a training script: what the user gave wrong becomes one sentence."""
    try:
        main()
    except (InputError, OSError) as error:
        # a data worker's error arrives with the worker's traceback in front
        sys.exit('error: ' + str(error).strip().splitlines()[-1].removeprefix('model.InputError: '))
    except KeyboardInterrupt:
        sys.exit('stopped; --resume goes on from the checkpoint of the last evaluation, if there was one')


if __name__ == '__main__':
    run_script(main)
