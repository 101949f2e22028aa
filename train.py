"""
Trains PSFM (Spa3R, arXiv 2602.21186).

    python train.py --config small                        # any laptop: rooms, mini backbone
    python train.py --config small --data photos/ --out out/mini-photos    # no download
    python train.py --config photos --data photos/        # a laptop, Depth Anything 3
    python train.py --config medium --data scenes/        # one GPU, VGGT-1B
    torchrun --nproc_per_node 8 train.py --config base --data scenes/  # the paper

Every field of Config is an option (`--help`), and the presets below set
several of them. Everything goes to out/<config>/: config.json, log.jsonl,
metrics.json, field.png, curve.png and checkpoint/ (`--resume` continues from
it; on a CPU with the very same losses).
"""
import contextlib
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import (InputError, autocast_on, check_finite, command_of, count_parameters,
                    join_processes, leave_processes, load_strictly, open_run, opt, parse_options,
                    peak_flops, peak_memory, pick_dtype, quiet, read_state, run_script,
                    step_generator, write_checkpoint, write_json)
from data import RoomPool, make_source, own_cores, rendering
from draw import draw_curve, draw_field
from measure import evaluate_field, field_line, field_table, knows_rooms
from media import check_path
from model import Block, compile_if_possible
from optim import load_optimizers, make_optimizers, rate_share, set_rates, take_step
from psfm import (FROZEN, PSFMConfig, build_psfm, check_backbone, check_psfm_config,
                  random_view_mask, read_psfm, weights_of_run)
from release import load_teacher, with_licence, write_card


@dataclass(frozen=True)
class Config(PSFMConfig):
    # what is frozen
    backbone: str = opt('weights/mini_vggt.safetensors', 'VGGT or Depth Anything 3: a file, a '
                        'folder, or a hub id',
                        group='what is frozen')
    teacher: str = opt('', "a second teacher for the 'sem' head, a hub id of transformers")
    # data
    data: str = opt('rooms', 'rooms, or photographs: a folder (one sub-folder a scene, or one flat '
                    'folder = one scene), or a video', group='data')
    image_width: int = opt(64, 'pixels; a multiple of the patch size', low=8)
    min_views: int = opt(4, 'fewest views per sample; the number is drawn for each batch', low=2)
    max_views: int = opt(8, 'most views per sample', low=2)
    images_per_batch: int = opt(72, 'scenes per batch = this // views', low=1)
    min_gap: int = opt(1, 'photographs: fewest frames between neighbouring views', low=1)
    max_gap: int = opt(4, 'photographs: most frames between neighbouring views', low=1)
    workers: int = opt(2, 'photographs: processes that read them', low=0)
    num_rooms: int = opt(400, 'rooms that are kept in memory, in fours', low=1)
    new_rooms: float = opt(1.0, 'rooms that are replaced at each batch', low=0, high=10 ** 6)
    val_scenes: int = opt(96, 'held-out samples to evaluate on, in fours', low=1)
    # optimisation
    init: str = opt('', 'a run of the same sizes to start from, or its file of weights',
                    group='optimisation')
    steps: int = opt(2000, 'optimiser steps', low=1)
    accumulate: int = opt(1, 'batches per step', low=1)
    lr: float = opt(1e-3, 'peak learning rate of AdamW', low=0)
    muon_lr: float = opt(0.0, "peak rate of Muon for the blocks' matrices; 0: AdamW", low=0)
    min_lr: float = opt(0.1, 'where the cosine ends, as a share of the peak', low=0, high=1)
    warmup: int = opt(100, 'steps of linear warm-up (a tenth of all at most)', low=0)
    decay_from: float = opt(0.0, 'share of the training before the cosine begins', low=0, high=1)
    weight_decay: float = opt(1e-2, 'not of biases and norms', low=0)
    beta2: float = opt(0.98, "AdamW's second moment", low=0, high=0.99999)
    clip: float = opt(1.0, 'largest gradient norm', low=1e-9)
    # running
    eval_every: int = opt(250, 'steps between evaluations and checkpoints', low=1,
                          group='running')
    log_every: int = opt(20, 'steps between log lines', low=1)
    out: str = opt('', 'folder for everything that is written; empty: out/<config>')
    seed: int = opt(0, 'of weights, data and masks', low=0, high=10 ** 12)
    device: str = opt('auto', 'auto | cpu | cuda | mps')
    dtype: str = opt('auto', 'auto | float32 | bfloat16 (autocast)',
                     choices=('auto', 'float32', 'bfloat16'))
    checkpointing: bool = opt(False, 'compute activations twice instead of keeping them: half the '
                              'memory, a fifth more time')
    compile: bool = opt(None, 'torch.compile the blocks; None: on a CUDA GPU only')
    resume: bool = opt(False, 'continue from <out>/checkpoint')


# compile=False: a run of minutes does not win back the minute that the compiler takes
PRESETS = {
    # any laptop: procedural rooms, the mini backbone
    'small': dict(images_per_batch=24, steps=1200, lr=2e-3, muon_lr=4e-3, min_lr=0.03,
                  eval_every=400, log_every=100, compile=False),
    # photographs on a laptop: the open backbone, 34 M parameters, at 224 pixels
    'photos': dict(backbone='depth-anything/DA3-SMALL', data='', num_latents=64, image_width=224,
                   images_per_batch=16, max_gap=8, steps=400, lr=2e-3, muon_lr=4e-3, min_lr=0.03,
                   val_scenes=16, eval_every=100, log_every=10, compile=False),
    # one consumer GPU: VGGT-1B at 224 pixels
    'medium': dict(backbone='facebook/VGGT-1B', data='', width=384, encoder_depth=4,
                   decoder_depth=4, num_heads=6, num_latents=64, image_width=224,
                   images_per_batch=24, min_gap=2, max_gap=10, workers=4, steps=20_000, lr=1e-3,
                   warmup=500, eval_every=1000),
    # the paper: 8 GPUs x 24 images x 2, 80 k steps
    'base': dict(backbone='facebook/VGGT-1B', teacher='facebook/dinov3-vitl16-pretrain-lvd1689m',
                 data='', width=768, encoder_depth=6, decoder_depth=6, num_heads=12,
                 num_latents=256, depth_probe=True, image_width=518, max_views=12,
                 images_per_batch=24, min_gap=2, max_gap=6, workers=8, steps=80_000, accumulate=2,
                 lr=2e-3, warmup=0, weight_decay=1e-4, beta2=0.999, eval_every=2000, log_every=50),
}


def parse_config(argv=None):
    """Command line -> (name of the preset, Config). Checks across options are here."""
    name, config = parse_options(argv, __doc__, Config, PRESETS)
    if not config.out:
        config = dataclasses.replace(config, out=os.path.join('out', name))
    if not config.data:
        raise InputError(f'{name} trains on your own pictures: --data FOLDER (one sub-folder a '
                         'scene)')
    if config.min_gap > config.max_gap:
        raise InputError(f'--min-gap {config.min_gap} --max-gap {config.max_gap}: the wrong order')
    if config.min_views > config.max_views:
        raise InputError(f'--min-views {config.min_views} --max-views {config.max_views}: '
                         'the wrong order')
    if config.data == 'rooms' and config.max_views > RoomPool.VIEWS:
        raise InputError(f'--max-views {config.max_views}: a room has {RoomPool.VIEWS} views')
    check_psfm_config(config)
    return name, config


# -----------------------------------------------------------------------------
# speed

def flops_per_view(psfm, images, autocast):
    """Counted once, on an eager forward and backward pass, before anything is compiled."""
    with FlopCounterMode(display=False) as counter:
        with autocast:
            loss = psfm(images)['loss']
        loss.backward()
    psfm.zero_grad()
    return counter.get_total_flops() / images.shape[0] / images.shape[1]


# -----------------------------------------------------------------------------
# before the first step. `number` is that of a batch; a step takes config.accumulate of them.

# one stream of random numbers each (step_generator)
VIEWS_STREAM = 1
MASKS_STREAM = 3
STATISTICS_STREAM = 4


@torch.no_grad()
def measure_statistics(psfm, source, config, autocast):
    """Mean and deviation of every feature channel, from eight training batches. (DDP gives those of
    the first process to all.)"""
    device = psfm.geo_mean.device
    geo = []
    sem = []
    batches = Batches(source, config)
    for number in range(8):
        images = batches[number]['images'].to(device)
        B, V = images.shape[:2]
        g = step_generator(config.seed, number, STATISTICS_STREAM)
        mask, num_context = random_view_mask(B, V, config.mask_ratio, g)
        with autocast:
            _, views, _ = psfm.observe(images, mask.to(device), num_context)
            geo.append(views.features.float().flatten(0, 2))
            if psfm.teacher is not None:
                sem.append(psfm.teacher(images, views.grid).float().flatten(0, 2))
    psfm.set_statistics('geo', torch.cat(geo))
    if sem:
        psfm.set_statistics('sem', torch.cat(sem))


def views_per_scene(number, seed, low, high):
    """The number of views of every sample in batch `number`, the same on every process."""
    g = step_generator(seed, number, VIEWS_STREAM)
    return int(torch.randint(low, high + 1, (1,), generator=g))


class Batches(torch.utils.data.Dataset):
    """A source for a DataLoader: item `number` is that batch, its number of views drawn for it."""

    def __init__(self, source, config):
        self.source = source
        self.config = config

    def __getitem__(self, number):
        config = self.config
        num_views = views_per_scene(number, config.seed, config.min_views, config.max_views)
        num_scenes = max(1, config.images_per_batch // num_views)
        return self.source.batch(number, num_scenes, num_views)


def make_loader(source, config, device, first_batch):
    """Batches from `first_batch` on. Rooms are rendered here, photographs read by workers."""
    is_photos = config.data != 'rooms'
    workers = min(config.workers, own_cores()) if is_photos else 0
    numbers = range(first_batch, config.steps * config.accumulate)
    return iter(torch.utils.data.DataLoader(
        Batches(source, config), batch_size=None, sampler=numbers, num_workers=workers,
        pin_memory=is_photos and device.type == 'cuda'))


def make_inputs(batch, config, number, rank, device):
    """Batch `number` as PSFM.forward takes it: pictures, and the generator of the mask."""
    seed = step_generator(config.seed, number, rank, MASKS_STREAM).initial_seed()
    return dict(images=batch['images'].to(device, non_blocking=True),
                generator=torch.Generator(device).manual_seed(seed))


def save_checkpoint(psfm, optimizers, step, config, dtype, metrics, reserved):
    """<out>/checkpoint: what is trained, never what is frozen. `reserved`: see PhotoFolder."""
    settings = dict(dataclasses.asdict(config), kept=reserved)  # read again as options.kept
    metadata = {'config': json.dumps(settings), 'step': str(step),
                'backbone': psfm.backbone.fingerprint,
                'command': command_of(os.path.basename(sys.argv[0]))}

    def save_model(folder):
        state = {name: x.detach().cpu().contiguous() for name, x in psfm.state_dict().items()
                 if not name.startswith(FROZEN)}
        save_file(state, os.path.join(folder, 'model.safetensors'), metadata)
        write_card(folder, 'An encoder of scenes, and its field decoder',
                   "`psfm.load_psfm` opens this folder, or its name on the hub.", {
                       'frozen backbone': with_licence(config.backbone),
                       'second teacher': with_licence(config.teacher),
                       'trained on': f'{config.data}, {step} steps',
                       'latents': f'{config.num_latents} of {config.width} numbers',
                       'held out': field_line(metrics)})

    write_checkpoint(config.out, step, optimizers, config, dtype, metrics, save_model)


def banner(name, config, psfm, source, held_out, device, dtype, reason):
    """A short summary of the run; config.json has the rest."""
    trained, frozen = count_parameters(psfm)
    images = config.images_per_batch * config.accumulate
    text = (f'{name}: {config.steps} steps of {images} images per process '
            f'({config.image_width} pixels wide, {config.min_views} to {config.max_views} views '
            f'per scene) of {config.data}, seed {config.seed}\n'
            f'{trained / 1e6:.2f} M parameters to train (width {config.width}, blocks '
            f'{config.encoder_depth} + {config.decoder_depth}, {config.num_latents} latents), '
            f'{frozen / 1e6:.2f} M frozen ({config.backbone})\n'
            f'{device}, {dtype} ({reason}) | writing to {config.out}/')
    if config.data != 'rooms':
        scenes = f'{len(source.scenes)} scene{"s" * (len(source.scenes) > 1)}'
        text += f'\n{config.data}: {scenes} to train on, held out: {held_out.held_out_text}'
    return text


def log_line(record, parts, config, mfu):
    """One human-readable line. `parts`: the losses by name. R2 is of the last evaluation."""
    losses = [f'{key} {record[key]:.3f}' for key in parts if key != 'loss']
    r2 = '' if record['r2'] is None else f'last R2 {record["r2"]:.3f} | '
    speed = '' if mfu is None else f'mfu {100 * mfu:.1f}% | '
    return (f'step {record["step"]:05d}/{config.steps:05d} | loss {record["loss"]:.4f} '
            f'{" ".join(losses)} | {r2}lr {record["lr"]:.1e} | gnorm {record["grad_norm"]:.2f} | '
            f'{record["step_ms"]:.0f} ms | {record["views_per_second"]:.0f} views/s | {speed}'
            f'mem {record["memory_gb"]:.1f} GB')


# -----------------------------------------------------------------------------
# the loop

def train(name, config):
    began = time.time()

    # the machine: one process per GPU, started by torchrun
    rank, world_size, device = join_processes(config.device)
    is_main = rank == 0
    say = tqdm.write if is_main else quiet
    if config.data != 'rooms':
        check_path(config.data)  # now, not after a backbone of gigabytes was fetched
    state = read_state(config)
    first = state['step']
    began -= state['metrics'].get('seconds', 0)  # of the sessions before
    dtype, reason = pick_dtype(state['dtype'], device)
    autocast = autocast_on(device, dtype)
    torch.manual_seed(config.seed)

    # model and data
    psfm = build_psfm(config, dtype, load_teacher(config.teacher, dtype)).to(device)
    knows_rooms(psfm, config)  # other categories are refused now, not after the training
    multiple = psfm.backbone.config.patch_size
    reserved = None
    path = None
    if config.resume:
        path = os.path.join(state['folder'], 'model.safetensors')
    elif config.init:
        path = weights_of_run(config.init)
    if path:
        weights, metadata, options = read_psfm(path)
        check_backbone(psfm.backbone, metadata, path, config.backbone)
        load_strictly(psfm, weights, path, skip=FROZEN)
        # what these weights never saw stays held out
        if os.path.abspath(options.data) == os.path.abspath(config.data):
            reserved = getattr(options, 'kept', None)  # weights may be older than this setting
    source = make_source(config, 'train', multiple, device, rank, world_size, say, reserved)
    held_out = make_source(config, 'val', multiple, device, say=quiet, reserved=reserved)
    log = open_run(config, first, is_main)
    optimizers = make_optimizers(psfm, config, device, dtype)
    if config.resume:
        load_optimizers(optimizers, state['folder'])
    say(banner(name, config, psfm, source, held_out, device, dtype, reason))
    # the rooms of the first batch are rendered now (of photographs, nothing is prepared)
    source.advance(first * config.accumulate, rendering if is_main else iter)
    if not config.resume and not config.init:
        measure_statistics(psfm, source, config, autocast)
    loader = make_loader(source, config, device, first * config.accumulate)

    # speed
    peak = peak_flops(device)
    if peak:
        num_views = (config.min_views + config.max_views) // 2
        sample = source.batch(first * config.accumulate, 1, num_views)['images'].to(device)
        flops = flops_per_view(psfm, sample, autocast)
    psfm.encoder.transformer.checkpointing = config.checkpointing  # what is computed twice
    psfm.decoder.transformer.checkpointing = config.checkpointing  # does not count
    compile_if_possible(psfm, Block, config.compile, device, say)
    ddp = torch.nn.parallel.DistributedDataParallel(psfm) if world_size > 1 else psfm
    trained = [p for p in psfm.parameters() if p.requires_grad]
    psfm.train()  # not the frozen backbone: see Backbone.freeze

    metrics = state['metrics']
    busy = 0.0
    views_done = 0
    logged = first
    steps = tqdm(range(first, config.steps), name, initial=first, total=config.steps,
                 leave=False, disable=None if is_main else True)
    for step in steps:
        # this step's learning rate, as a share of the peak
        start = time.time()
        share = rate_share(step, config)
        set_rates(optimizers, share)

        # forward, backward
        for micro in range(config.accumulate):
            number = step * config.accumulate + micro
            inputs = make_inputs(next(loader), config, number, rank, device)
            is_last = micro == config.accumulate - 1
            with contextlib.nullcontext() if is_last or world_size == 1 else ddp.no_sync():
                with autocast:
                    losses = ddp(**inputs)
                (losses['loss'] / config.accumulate).backward()
            B, V = inputs['images'].shape[:2]
            views_done += B * V * world_size

        # update
        norm = take_step(optimizers, trained, config.clip)
        done = step + 1
        is_logged = step == 0 or done % config.log_every == 0
        is_evaluated = done == config.steps or done % config.eval_every == 0
        if is_logged or is_evaluated:
            # of the last batch of this process; a GPU sync
            values = check_finite(losses, norm, trained, done, config)
        busy += time.time() - start

        # log
        if is_logged:
            r2 = metrics['psfm']['r2'] if metrics else None  # before the first evaluation
            record = dict(step=done, **values, r2=r2, lr=share * config.lr,
                          grad_norm=norm.item(), step_ms=1e3 * busy / (done - logged),
                          views_per_second=views_done / busy,
                          memory_gb=peak_memory(device) / 2 ** 30, seconds=time.time() - began)
            mfu = record['views_per_second'] / world_size * flops / peak if peak else None
            say(log_line(record, values, config, mfu))
            log.write(json.dumps(record) + '\n')
            busy = 0.0
            views_done = 0
            logged = done

        # evaluate (the baselines' averages come from `source`) and save
        if is_evaluated and is_main:
            metrics = evaluate_field(psfm, source, held_out, done * config.accumulate, config,
                                     autocast)
            metrics['seconds'] = time.time() - began
            say(f'step {done:05d}/{config.steps:05d} | {field_line(metrics)}')
            log.write(json.dumps(dict(step=done, metrics=metrics)) + '\n')
            save_checkpoint(psfm, optimizers, done, config, dtype, metrics, held_out.reserved)

    # results
    if is_main:
        cost = dict(step=config.steps, seconds=time.time() - began,
                    peak_memory_gb=peak_memory(device) / 2 ** 30)
        write_json(os.path.join(config.out, 'metrics.json'), {**metrics, **cost})
        say(f'\n{name} took {cost["seconds"] / 60:.1f} minutes and '
            f'{cost["peak_memory_gb"]:.1f} GB')
        log.close()
        draw_field(psfm, held_out, config, autocast, os.path.join(config.out, 'field.png'))
        draw_curve(os.path.join(config.out, 'log.jsonl'), os.path.join(config.out, 'curve.png'))
        say(f'{field_table(metrics, held_out.held_out_text)}\nwrote {config.out}/field.png (look '
            'at it), curve.png, metrics.json, log.jsonl, checkpoint/')


def main(argv=None):
    train(*parse_config(argv))
    leave_processes()


if __name__ == '__main__':
    run_script(main)
