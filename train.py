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
import difflib
import json
import math
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import RoomPool, step_generator, views_per_scene
from model import InputError
from vggt import MiniVGGTTrainer, area_under_curve, pose_encoding_to_cameras, pose_errors, scene_extrinsics, SCENE_UNIT


def opt(default, help):
    return field(default=default, metadata={'help': help})


@dataclass(frozen=True)
class Config:
    # what is trained
    task: str = opt('psfm', 'psfm | mini-vggt')
    # data
    data: str = opt('rooms', 'rooms, or a folder of photographs: one sub-folder a scene, or one flat folder = one scene')
    image_width: int = opt(64, 'pixels; pictures are resized to it and cropped to multiples of the patch size')
    min_views: int = opt(4, 'views a sample, drawn anew for each batch between this ..')
    max_views: int = opt(8, '.. and this')
    images_per_batch: int = opt(72, 'scenes a batch = this // views')
    num_rooms: int = opt(400, 'rooms: how many are kept in memory')
    new_rooms: float = opt(1.0, 'rooms: how many of them are replaced at each step')
    val_rooms: int = opt(96, 'rooms: held-out rooms to evaluate on')
    # optimisation
    steps: int = opt(2000, 'optimiser steps')
    accumulate: int = opt(1, 'batches a step')
    lr: float = opt(1e-3, 'peak learning rate of AdamW')
    muon_lr: float = opt(0.0, "peak learning rate of Muon for the blocks' matrices; 0: AdamW for them too")
    min_lr: float = opt(0.1, 'where the cosine ends, as a share of the peak')
    warmup: int = opt(100, 'steps of linear warm-up')
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
    'mini-vggt': dict(task='mini-vggt', num_rooms=1600, new_rooms=2.0, val_rooms=100, steps=8000, lr=1e-3, muon_lr=2e-3,
                      min_lr=0.02, decay_from=0.55, clip=2.0, eval_every=1000, log_every=50),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        if message.startswith('unrecognized arguments: '):
            word = message.split()[2].split('=')[0]
            near = difflib.get_close_matches(word, self._option_string_actions, 3)
            message = f'no option {word}' + (f'; did you mean {" or ".join(near)}?' if near else '; see --help')
        self.exit(2, f'error: {message}\n')


def parse_config(argv=None):
    """Command line -> (name of the preset, Config): the preset's values, then the options given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--config', default='small', help=f'one of {", ".join(PRESETS)} (default: small)')
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        parser.add_argument('--' + f.name.replace('_', '-'), dest=f.name, default=argparse.SUPPRESS,
                            help=f.metadata['help'].replace('%', '%%'), **kind)
    given = vars(parser.parse_args(argv))
    name = given.pop('config')
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise InputError(f'no preset {name!r}' + (f', did you mean {near[0]}?' if near else '') + f'; there are {", ".join(PRESETS)}')
    config = Config(**{'out': os.path.join('out', name), **PRESETS[name], **given})
    for key in ('steps', 'images_per_batch', 'accumulate', 'eval_every', 'log_every', 'min_views'):
        if getattr(config, key) < 1:
            raise InputError(f'--{key.replace("_", "-")} must be at least 1, not {getattr(config, key)}')
    return name, config


# -----------------------------------------------------------------------------
# the machine

def pick_device(name):
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if name.startswith('cuda') and not torch.cuda.is_available():
        raise InputError('--device cuda: torch sees no CUDA GPU here; leave the option out to run on what there is')
    return torch.device(name)


def pick_dtype(name, device):
    """Autocast dtype and the reason for it: bfloat16 where the hardware has it, measured on a CPU."""
    if name != 'auto':
        return getattr(torch, name), 'as asked'
    if device.type == 'cuda':
        return (torch.bfloat16, 'the GPU has it') if torch.cuda.is_bf16_supported() else (torch.float32, 'the GPU has no bf16')
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
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    start = max(config.warmup, config.decay_from * config.steps)
    progress = min(1.0, max(0.0, (step - start) / max(1, config.steps - start)))
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model, config, device):
    """AdamW, fused where it exists; with `muon_lr`, Muon (arXiv 2502.16982) for the matrices inside transformer blocks."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    in_blocks = lambda name, p: config.muon_lr > 0 and p.ndim == 2 and 'blocks.' in name
    rest = [(name, p) for name, p in named if not in_blocks(name, p)]
    groups = [dict(params=[p for _, p in rest if p.ndim >= 2], weight_decay=config.weight_decay),
              dict(params=[p for _, p in rest if p.ndim < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=device.type in ('cuda', 'cpu'))]
    if config.muon_lr > 0:
        matrices = [p for name, p in named if in_blocks(name, p)]
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay,
                                           momentum=0.95, adjust_lr_fn='match_rms_adamw'))
    return optimizers


def peak_memory(device):
    """Bytes at most: of the GPU, or of the process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


# -----------------------------------------------------------------------------
# checkpoints: model.safetensors (what is trained), optimizer.pt, state.json

def trained_state(model):
    """Everything but the frozen backbone."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
            if not name.startswith('backbone.')}


def save_checkpoint(folder, model, optimizers, step, config, metrics):
    """Writes a new folder beside the old one, then swaps them: at no moment is there no whole checkpoint."""
    new, old = folder + '.new', folder + '.old'
    try:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)
        settings = dataclasses.asdict(config)
        save_file(trained_state(model), os.path.join(new, 'model.safetensors'), {'config': json.dumps(settings), 'step': str(step)})
        torch.save([optimizer.state_dict() for optimizer in optimizers], os.path.join(new, 'optimizer.pt'))
        with open(os.path.join(new, 'state.json'), 'w') as file:
            json.dump(dict(step=step, config=settings, metrics=metrics), file, indent=1)
    except (OSError, RuntimeError, Exception) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise InputError(f'could not write the checkpoint of step {step} to {folder} ({error}); '
                         'what was saved before is still there: make room and continue with --resume') from error
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder, model, optimizers, config):
    """-> the step to go on from. Refuses a checkpoint of another configuration, and says what differs."""
    if not os.path.isdir(folder) and os.path.isdir(folder + '.old'):
        folder += '.old'
    if not os.path.isdir(folder):
        raise InputError(f'--resume: no checkpoint at {folder}; leave --resume out to start from the beginning')
    with open(os.path.join(folder, 'state.json')) as file:
        state = json.load(file)
    free = {'resume', 'out', 'device', 'eval_every', 'log_every', 'compile', 'steps', 'dtype'}
    ours = dataclasses.asdict(config)
    differs = [f'{key} {state["config"].get(key)} there, {value} here' for key, value in ours.items()
               if key not in free and state['config'].get(key) != value]
    if differs:
        raise InputError(f'--resume: {folder} was trained with another configuration ({"; ".join(differs[:4])}); '
                         'give the same options, or another --out')
    weights = load_file(os.path.join(folder, 'model.safetensors'))
    missing = trained_state(model).keys() ^ weights.keys()
    if missing:
        raise InputError(f'{folder} does not hold this model: {", ".join(sorted(missing)[:4])} differ')
    model.load_state_dict(weights, strict=False)
    states = torch.load(os.path.join(folder, 'optimizer.pt'), map_location='cpu', weights_only=True)
    for optimizer, saved in zip(optimizers, states):
        optimizer.load_state_dict(saved)
    return state['step']


# -----------------------------------------------------------------------------
# the mini VGGT: a curriculum, an evaluation, an export

def mini_vggt_batch(pool, step, config):
    """From two views with little motion between them to six of any motion; fewer views, more scenes."""
    progress = step / config.steps
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


@torch.no_grad()
def evaluate_mini_vggt(model, pool, autocast):
    """Cameras, depth and classes on held-out rooms, beside the trivial answers; views in any order."""
    vggt, metrics = model.vggt, {}
    for V in (2, 4, 6, 8):
        seen = []
        for step in range(6):
            batch = pool.batch(step, 96 // V, V)
            with autocast:
                views = vggt(batch['images'])
                depth, logits = vggt.read_out(views.features, views.grid)
            truth, true_depth = scene_extrinsics(batch['extrinsics']), batch['depth'] / SCENE_UNIT
            still = torch.eye(3, 4, device=truth.device).expand_as(truth)
            constant = true_depth.log().median().exp()
            right, furniture = logits.argmax(-1) == batch['classes'], batch['classes'] >= 3
            seen.append([*pose_errors(views.extrinsics, truth), *pose_errors(still, truth),
                         ((depth - true_depth).abs() / true_depth).mean(), ((constant - true_depth).abs() / true_depth).mean(),
                         right.float().mean(), right[furniture].float().mean()])
        rotation, direction, rotation0, direction0 = [torch.cat(x) for x in list(zip(*seen))[:4]]
        depth, depth0, accuracy, recall = [torch.stack(x).mean().item() for x in list(zip(*seen))[4:]]
        metrics[f'{V} views'] = dict(
            rotation=rotation.median().item(), direction=direction.median().item(),
            **{f'auc{limit}': area_under_curve(rotation, direction, limit) for limit in (5, 15, 30)},
            depth_abs_rel=depth, class_accuracy=accuracy, furniture_recall=recall,
            trivial=dict(rotation=rotation0.median().item(), direction=direction0.median().item(), depth_abs_rel=depth0))
    six = metrics['6 views']
    line = (f"6 views of held-out rooms: rotation {six['rotation']:.1f} deg, direction {six['direction']:.1f} deg, AUC@30 {six['auc30']:.3f}, "
            f"depth abs-rel {six['depth_abs_rel']:.3f}, classes {six['class_accuracy']:.3f}, on furniture {six['furniture_recall']:.3f}"
            f" | trivial: {six['trivial']['rotation']:.1f}, {six['trivial']['direction']:.1f}, 0, {six['trivial']['depth_abs_rel']:.3f}")
    return metrics, line


def export_mini_vggt(model, path, config, metrics):
    """The backbone without the heads that only trained it, fp16; how it was made goes into the file's metadata."""
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.vggt.state_dict().items()}
    changed = [f'--{f.name.replace("_", "-")} {getattr(config, f.name)}' for f in dataclasses.fields(config)
               if f.name in ('steps', 'seed', 'num_rooms', 'new_rooms', 'lr', 'muon_lr')]
    save_file(state, path, {'config': json.dumps(dataclasses.asdict(model.vggt.config)), 'metrics': json.dumps(metrics),
                            'command': 'python train.py --config mini-vggt ' + ' '.join(changed)})


# -----------------------------------------------------------------------------

def main(argv=None):
    name, config = parse_config(argv)
    # one process a GPU: torchrun sets these
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(config.device)
    if world_size > 1:
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    is_main = rank == 0
    say = tqdm.write if is_main else lambda text: None
    os.makedirs(config.out, exist_ok=True)
    torch.manual_seed(config.seed)
    dtype, reason = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    # model and data
    source = RoomPool('train', config.seed, config.num_rooms, config.new_rooms, device=device, rank=rank, world_size=world_size)
    held_out = RoomPool('val', 0, config.val_rooms, device=device)
    model = MiniVGGTTrainer().to(device)
    make_batch = lambda step: mini_vggt_batch(source, step, config)
    evaluate = lambda: evaluate_mini_vggt(model, held_out, autocast)
    optimizers = make_optimizers(model, config, device)
    peaks = [group['lr'] for optimizer in optimizers for group in optimizer.param_groups]
    checkpoint = os.path.join(config.out, 'checkpoint')
    first = load_checkpoint(checkpoint, model, optimizers, config) if config.resume else 0

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    say(f'{name}: {trainable / 1e6:.2f} M parameters to train, {frozen / 1e6:.2f} M frozen, on {device} in {dtype} ({reason}), writing to {config.out}/')
    source.advance(first, lambda blocks: tqdm(blocks, 'rendering rooms', leave=False, disable=not is_main))

    ddp = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    model.train()
    log = open(os.path.join(config.out, 'log.jsonl'), 'a' if first else 'w')
    start, views_done, metrics = time.time(), 0, {}
    for step in range(first, config.steps + 1):
        # evaluate and save
        if step % config.eval_every == 0 and step > first or step == config.steps:
            model.eval()
            metrics, line = evaluate()
            model.train()
            say(f'step {step:05d}/{config.steps:05d} | {line}')
            if is_main:
                save_checkpoint(checkpoint, model, optimizers, step, config, metrics)
        if step == config.steps:
            break

        # the learning rate of this step
        share = learning_rate(step, config)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks):
            group['lr'] = share * peak

        # forward, backward, update
        for micro in range(config.accumulate):
            batch = make_batch(step * config.accumulate + micro)
            sync = contextlib.nullcontext() if world_size == 1 or micro == config.accumulate - 1 else ddp.no_sync()
            with sync:
                with autocast:
                    losses = ddp(**batch)
                (losses['loss'] / config.accumulate).backward()
            views_done += batch['images'].shape[0] * batch['images'].shape[1] * world_size
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # log
        if step % config.log_every == 0 or step == first:
            values = {key: value.item() for key, value in losses.items()}
            if not math.isfinite(values['loss']):
                raise InputError(f'the loss is {values["loss"]} at step {step}: lower --lr, or --dtype float32')
            seconds = time.time() - start
            record = dict(step=step, **values, lr=share * config.lr, grad_norm=norm.item(), seconds=seconds, views=views_done)
            log.write(json.dumps(record) + '\n')
            log.flush()
            parts = ' '.join(f'{key} {value:.3f}' for key, value in values.items() if key != 'loss')
            say(f'step {step:05d}/{config.steps:05d} | loss {values["loss"]:.4f} {parts} | lr {share * config.lr:.1e} | gnorm {norm:.2f} | '
                f'{1e3 * seconds / (step - first + 1):.0f} ms | {views_done / seconds:.0f} views/s | mem {peak_memory(device) / 2 ** 30:.1f} GB')
    if config.task == 'mini-vggt' and is_main:
        export_mini_vggt(model, 'weights/mini_vggt.safetensors', config, metrics)


if __name__ == '__main__':
    try:
        main()
    except InputError as error:
        sys.exit(f'error: {error}')
