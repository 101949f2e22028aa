"""
What matters, what does it take, what does it withstand? Experiments of many runs.

    python ablate.py field      # the decisions of the method, one at a time
    python ablate.py scaling    # R2 and objects found against steps and width
    python ablate.py worlds     # a trained field in rooms unlike those that it was trained on
    python ablate.py limits     # where a trained field is wrong
    python ablate.py vlm        # do the latents help a VLM? every kind

What is trained is trained with three seeds. Finished runs are kept: a command that was cut off goes
on with the run that was cut off, and two of them may share the work (`--seeds 0`, `--seeds 1 2`).
Options that this script does not know are those of train.py (field, scaling) or finetune.py (vlm).
"""
import contextlib
import dataclasses
import itertools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

import finetune
import psfm as method
import train
from adapter import LATENTS
from common import (InputError, Parser, autocast_on, check_same, find_file, number, pick_device,
                    pick_dtype, read_json, run_script, write_json)
from data import RoomPool, make_sources
from draw import ACCENT, blank, draw_panel
from eval import SHIPPED, folder_beside, load_answerer, rendering
from measure import answer_rooms, evaluate_field, field_batches, look, rooms_table
from mini_vggt import pose_errors
from model import MLP, RoPE2D, camera_rays, invert_pose, take_views
from psfm import FieldDecoder, context_index, load_psfm
from rooms import STRUCTURE, Style, scene_extrinsics


class CameraToken(FieldDecoder):
    """The camera as one more token beside the rays, instead of PRoPE: its twelve extrinsics and its
    focal lengths as shares of the picture. Patches keep a place in it (RoPE)."""

    def __init__(self, dim, depth, num_heads, num_registers=4):
        super().__init__(dim, depth, num_heads, num_registers)
        self.camera_embed = MLP(14, dim, dim)

    def forward(self, z, extrinsics, intrinsics, size, grid):
        B, V = extrinsics.shape[:2]
        rays = F.normalize(camera_rays(intrinsics, size, grid), dim=-1)
        rays = self.ray_embed(rays).flatten(0, 1)  # (B V, N, D)
        focal = intrinsics[..., [0, 1], [0, 1]] / intrinsics.new_tensor([size[1], size[0]])
        camera = self.camera_embed(torch.cat([extrinsics.flatten(2), focal], -1).float())
        camera = camera.flatten(0, 1)[:, None]  # (B V, 1, D)
        z = z.repeat_interleave(V, dim=0)  # (B V, Q, D)
        x = torch.cat([z, camera.to(z.dtype), rays.to(z.dtype)], dim=1)
        in_front = self.transformer.num_registers + z.shape[1] + 1
        position = RoPE2D(grid, self.head_dim, special_in_front=in_front, device=x.device)
        x = self.transformer(x, position, num_kept=rays.shape[1])  # (B V, N, D)
        return x.unflatten(0, (B, V))


FIELD = {  # what is changed: options of train.py, the decoder
    'as it is': ([], FieldDecoder),
    'camera token': ([], CameraToken),
    '8 latents': (['--num-latents', '8'], FieldDecoder),
    '128 latents': (['--num-latents', '128'], FieldDecoder),
    'mask ratio 0.25': (['--mask-ratio', '0.25'], FieldDecoder),
    'mask ratio 0.75': (['--mask-ratio', '0.75'], FieldDecoder),
    'two passes': (['--context', 'separate'], FieldDecoder),
    'raw features': (['--no-standardised'], FieldDecoder),
}
WIDTHS = 64, 128, 256
STEPS = 300, 1200, 4800
COLOURS = 'grey', 'black', ACCENT
STYLES = {  # what differs from the rooms of training
    'as in training': Style(),
    'larger rooms': Style(sides=(8.0, 11.0)),
    'full of furniture': Style(furnished=1.0),
    'finer patterns': Style(waves=(8.0, 16.0)),
    'half as bright': Style(brightness=0.5),
    'field of view 60': Style(field_of_view=math.radians(60)),
    'camera at table height': Style(eye_height=(0.8, 1.0)),
}
T95 = math.nan, math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36  # Student's t, by seeds


# -----------------------------------------------------------------------------
# runs of train.py

def check_finished(folder, config):
    """Raises InputError if the run in `folder` is of another configuration or of older weights."""
    there = read_json(os.path.join(folder, 'config.json'))
    check_same(folder, there, config, free={'out', 'device', 'workers', 'log_every', 'cache'})
    finished = os.path.getmtime(os.path.join(folder, 'metrics.json'))
    for name in ('vlm', 'encoder', 'backbone', 'init'):
        path = find_file(getattr(config, name, ''))
        if os.path.exists(path) and os.path.getmtime(path) > finished:
            raise InputError(f'{folder} is older than {path}: take another --out, or delete it')


@contextlib.contextmanager
def decoder_replaced(decoder):
    """Inside, a new PSFM has this field decoder."""
    plain, method.FieldDecoder = method.FieldDecoder, decoder
    try:
        yield
    finally:
        method.FieldDecoder = plain


def trained(name, out, options, decoder=FieldDecoder):
    """-> metrics of a run of train.py on rooms; a finished one is kept.

    All are asked the same, whatever their own objective: features of one pass ('asymmetric'), and
    of two ('separate').
    """
    _, config = train.parse_config([*options, '--out', out])
    if config.data != 'rooms':
        raise InputError('ablate compares on rooms: leave --data out')
    config = dataclasses.replace(config, eval_every=config.steps)
    path = os.path.join(out, 'metrics.json')
    with decoder_replaced(decoder):
        if os.path.isfile(path):
            check_finished(out, config)
        else:
            train.train(name, config)
        metrics = read_json(path)
        if 'asked' not in metrics:
            metrics['asked'] = {kind: ask(out, config, kind) for kind in ('asymmetric', 'separate')}
            write_json(path, metrics)
    return metrics


def ask(run, config, context):
    """-> metrics of a finished run, whose features are those of one pass or of two"""
    device = pick_device(config.device)
    psfm, _ = load_psfm(run, device)
    psfm.context = context
    sources = make_sources(config, psfm.backbone.config.patch_size, device)
    return evaluate_field(psfm, *sources, config.steps * config.accumulate, config,
                          autocast_on(device, torch.float32))


COLUMNS = {
    'R2': lambda run: run['asked']['asymmetric']['psfm']['r2'],
    'R2, two passes': lambda run: run['asked']['separate']['psfm']['r2'],
    'camera': lambda run: run['asked']['asymmetric']['camera']['r2'],
    'objects': lambda run: run['asked']['asymmetric']['read_out']['psfm']['object_recall'],
    'depth abs-rel': lambda run: run['asked']['asymmetric']['read_out']['psfm']['depth_abs_rel'],
    'minutes': lambda run: run['seconds'] / 60,
}


def comparison(rows):
    """{row: [metrics of each seed]} -> a table of means over the seeds, then of the differences to
    the first row, seed by seed, each with its 95 % interval by Student's t."""
    lines = [f'{"":32s}' + ''.join(f'{title:>16s}' for title in COLUMNS)]
    values = {name: np.array([[of(run) for of in COLUMNS.values()] for run in runs])
              for name, runs in rows.items()}  # (seeds, columns)
    first = next(iter(values))
    values |= {f'{name} minus {first}': x - values[first] for name, x in values.items()
               if name != first and len(x) == len(values[first])}
    for name, x in values.items():
        n = len(x)
        half = T95[min(n, len(T95) - 1)] * x.std(0, ddof=1) / n ** 0.5 if n > 1 else 0 * x[0]
        cells = [f'{mean:.3f} ±{width:.3f}' if n > 1 else f'{mean:.3f}'
                 for mean, width in zip(x.mean(0), half)]
        lines.append(f'{name:32s}' + ''.join(cell.rjust(16) for cell in cells))
    return '\n'.join(lines)


def field(args):
    rows = {}
    for seed in args.seeds:
        for name, (options, decoder) in FIELD.items():
            out = os.path.join(args.out, f'{name.replace(" ", "-")}-{seed}')
            options = ['--config', args.config, *options, '--seed', str(seed), *args.options]
            run = trained(f'{name}, seed {seed}', out, options, decoder)
            rows.setdefault(name, []).append(run)
    print(comparison(rows))


def scaling(args):
    rows = {}
    for seed in args.seeds:
        for width in WIDTHS:
            for steps in STEPS:
                name = f'{width} wide, {steps} steps'
                out = os.path.join(args.out, f'{width}-{steps}-{seed}')
                run = trained(f'{name}, seed {seed}', out, [
                    '--config', args.config, '--width', str(width), '--num-heads',
                    str(width // 64), '--steps', str(steps), '--seed', str(seed), *args.options])
                rows.setdefault(name, []).append(run)
    print(comparison(rows))
    path = os.path.join(args.out, 'scaling.png')
    draw_scaling(rows, path)
    print(f'wrote {path}')


def draw_scaling(rows, path):
    """R2 and objects found over the steps, a curve a width; all seeds stand at each step."""
    canvas, pen, font = blank(1000, 360)
    for title, box in (('R2', (60, 40, 470, 290)), ('objects', (550, 40, 970, 290))):
        curves = {}
        for width, colour in zip(WIDTHS, COLOURS):
            points = [(steps, COLUMNS[title](run)) for steps in STEPS
                      for run in rows[f'{width} wide, {steps} steps']]
            curves[f'{width} wide'] = (*zip(*points), colour)
        draw_panel(pen, font, box, curves, f'{title}, over steps', low=0)
    canvas.save(path)


# -----------------------------------------------------------------------------
# a trained field: other worlds, and where it is wrong

def open_field(args):
    """-> PSFM, its options with --rooms held-out rooms, training rooms, held-out rooms"""
    device = pick_device(args.device)
    psfm, config = load_psfm(args.run, device)
    if config.data != 'rooms':
        raise InputError(f'{args.run} was trained on {config.data}; this takes a run on rooms')
    config.val_scenes = args.rooms
    return psfm, config, *make_sources(config, psfm.backbone.config.patch_size, device)


def worlds(args):
    psfm, config, source, held_out = open_field(args)
    device = held_out.device
    titles = 'R2', 'camera', 'context', 'objects', '(true)', 'abs-rel', '(true)'
    print(f'{"":26s}' + ''.join(f'{title:>9s}' for title in titles))
    found = {}
    for name, style in STYLES.items():
        pool = RoomPool('val', 0, args.rooms, 0, held_out.size, device, style=style)
        metrics = evaluate_field(psfm, source, pool, config.steps * config.accumulate, config,
                                 autocast_on(device, torch.float32))
        found[name] = metrics
        ours, true = metrics['read_out']['psfm'], metrics['read_out']['true']
        values = [metrics[kind]['r2'] for kind in ('psfm', 'camera', 'context')]
        values += [read[kind] for kind in ('object_recall', 'depth_abs_rel')
                   for read in (ours, true)]
        print(f'{name:26s}' + ''.join(f'{value:9.3f}' for value in values))
    path = os.path.join(folder_beside(args.run), 'worlds.json')
    write_json(path, found)
    print(f'wrote {path}')


def camera_errors(extrinsics, truth, num_context):
    """Of each view after the first `num_context`: the mean over those of the worse of two errors,
    rotation and direction of translation. (B, V, 3, 4) twice -> degrees (B, V - num_context)"""
    V = extrinsics.shape[1]
    worse = torch.maximum(*pose_errors(extrinsics, truth))  # (B, pairs)
    i, j = torch.triu_indices(V, V, offset=1)
    return torch.stack([worse[:, (i < num_context) & (j == view)].mean(1)
                        for view in range(num_context, V)], 1)


def is_shown(batch, context, index, size, grid):
    """Which patches of the views `index` (B, U) show something that a view of `context` (B, Vc)
    shows too: at least half of a patch's cells, by true depth and cameras. -> (B, U, N) bool"""
    depth = batch['depth'].flatten(2)  # (B, V, cells)
    cells = batch['depth'].shape[-2:]
    rays = camera_rays(batch['intrinsics'], size, cells)  # (B, V, cells, 3)
    pose = invert_pose(batch['extrinsics'])[:, :, None]  # camera -> world
    points = (pose[..., :3] @ (rays * depth[..., None])[..., None] + pose[..., 3:])[..., 0]
    points = take_views(points, index).flatten(1, 2)  # (B, U cells, 3)
    shown = torch.zeros(points.shape[:2], dtype=torch.bool, device=depth.device)
    for view in context.T[:, :, None]:  # (B, 1)
        E, K, seen = [take_views(x, view)[:, 0]
                      for x in (batch['extrinsics'], batch['intrinsics'], depth)]
        local = points @ E[..., :3].mT + E[:, None, :, 3]
        distance = local[..., 2]
        pixel = (local @ K.mT)[..., :2] / distance.clamp(min=1e-3)[..., None]
        cell = (pixel * pixel.new_tensor(cells[::-1]) / pixel.new_tensor(size[::-1])).floor().long()
        x, y = cell.unbind(-1)
        inside = (distance > 0) & (x >= 0) & (x < cells[1]) & (y >= 0) & (y < cells[0])
        place = (y * cells[1] + x).where(inside, 0)
        shown |= inside & ((seen.gather(1, place) - distance).abs() < 0.1 + 0.15 * distance)
    return per_patch(shown.view(*index.shape, *cells), grid).float().mean(-1) >= 0.5


def per_patch(cells, grid):
    """(B, U, 2h, 2w) -> the four cells of each patch, (B, U, N, 4)"""
    B, U, H, W = cells.shape
    cells = cells.view(B, U, grid[0], H // grid[0], grid[1], W // grid[1])
    return cells.transpose(3, 4).flatten(4).flatten(2, 3)


@torch.no_grad()
def limits(args):
    """Is it the cameras that the backbone predicts? Is it what no context view shows?"""
    psfm, config, _, held_out = open_field(args)
    errors, variances, degrees, shown, found, furniture = [], [], [], [], [], []
    for batch, mask, num_context in field_batches(psfm, held_out, config, args.rooms):
        size, V = batch['images'].shape[-2:], mask.shape[1]
        seen, unseen = context_index(mask, num_context), context_index(~mask, V - num_context)
        context, views = look(psfm, batch, mask, num_context, config)
        z = psfm.encode(context, views.grid)
        cameras = [take_views(x, unseen) for x in (views.extrinsics, views.intrinsics)]
        predicted = psfm.decode(z, *cameras, size, views.grid)
        target = take_views(views.features, unseen).float()
        p, t = [(x - psfm.geo_mean) / psfm.geo_std for x in (predicted, target)]
        errors.append((p - t).square().sum(-1))  # (B, U, N)
        variances.append(t.square().sum(-1))
        order = torch.cat([seen, unseen], 1)
        truth = scene_extrinsics(take_views(batch['extrinsics'], order))
        degrees.append(camera_errors(take_views(views.extrinsics, order), truth, num_context))
        shown.append(is_shown(batch, seen, unseen, size, views.grid))
        classes = take_views(batch['classes'], unseen)
        is_furniture = classes >= len(STRUCTURE)
        is_right = psfm.backbone.read_out(predicted, views.grid)[1].argmax(-1) == classes
        furniture.append(per_patch(is_furniture, views.grid).sum(-1))
        found.append(per_patch(is_furniture & is_right, views.grid).sum(-1))
    errors, variances, degrees, shown, found, furniture = [
        torch.cat(x) for x in (errors, variances, degrees, shown, found, furniture)]

    print(f'unseen views of {len(errors)} held-out rooms{"share":>29s}{"R2":>9s}{"objects":>9s}')

    def row(name, where):
        r2 = 1 - errors[where].sum() / variances[where].sum()
        objects = found[where].sum() / furniture[where].sum()
        share = 100 * where.float().mean()
        print(f'{name:55s}{share:6.0f} %{r2:9.3f}{objects:9.3f}')

    bounds = degrees.flatten().quantile(torch.linspace(0, 1, 7, device=degrees.device))
    for low, high in itertools.pairwise(bounds.tolist()):
        row(f'camera predicted with an error of {low:.1f} to {high:.1f} degrees',
            (degrees >= low) & (degrees <= high))
    row('patches that a context view shows', shown)
    row('patches that none shows', ~shown)


# -----------------------------------------------------------------------------
# runs of finetune.py

def ask_shuffled(folder, config, data):
    """Asks a finished run once more, with other rooms' latents; adds this to its metrics."""
    path = os.path.join(folder, 'metrics.json')
    metrics = read_json(path)
    if 'shuffled' in metrics:
        return
    device = pick_device(config.device)
    autocast = autocast_on(device, pick_dtype(config.dtype, device)[0])
    answerer, _ = load_answerer(folder, device)
    train_data, held_out = data
    metrics['shuffled'] = answer_rooms(*answerer, held_out, train_data, autocast, shuffled=True)
    write_json(path, metrics)


def vlm(args):
    """Fine-tunes every arm with every seed, from the same start, on the same data in the same
    order."""
    data = None
    arms = {}
    for seed in args.seeds:
        for arm in args.arms:
            out = os.path.join(args.out, f'{arm}-{seed}')
            options = ['--config', args.config, '--val-scenes', '768', '--latents', arm, '--seed',
                       str(seed), '--out', out]
            _, config = finetune.parse_config([*options, *args.options])
            if config.data != 'rooms':
                raise InputError('ablate compares on rooms: leave --data out')
            if os.path.isfile(os.path.join(out, 'metrics.json')):
                check_finished(out, config)
            else:
                data = data or finetune.make_data(config, rendering)
                finetune.train(f'{arm}, seed {seed}', config, *data)
            if arm == 'psfm':
                data = data or finetune.make_data(config, rendering)
                ask_shuffled(out, config, data)
    for arm in args.arms:
        for seed in args.seeds:
            metrics = read_json(os.path.join(args.out, f'{arm}-{seed}', 'metrics.json'))
            arms.setdefault(arm, []).append(metrics)
            if 'shuffled' in metrics:
                arms.setdefault('psfm, shuffled', []).append(metrics['shuffled'])
    print(rooms_table(arms))
    for arm in args.arms:
        minutes = sorted(run['seconds'] / 60 for run in arms[arm])
        print(f'{arm}: {minutes[0]:.1f} to {minutes[-1]:.1f} minutes; '
              f'{arms[arm][0].get("cost", "")}')


# -----------------------------------------------------------------------------

def make_parser():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True, parser_class=Parser)

    def command(function, help, out):
        added = commands.add_parser(function.__name__, help=help)
        added.set_defaults(function=function)
        if out:
            added.add_argument('--config', default='small', help='the preset (small)')
            added.add_argument('--seeds', nargs='+', type=number(int, 0), default=[0, 1, 2],
                               help='(0 1 2)')
            added.add_argument('--out', default=out, help=f'folder of the runs ({out})')
        return added

    command(field, 'one decision of the method at a time', 'out/ablate-field')
    command(scaling, 'R2 and objects found against steps and width', 'out/ablate-scaling')
    for c in (command(worlds, 'a trained field in rooms unlike those of its training', ''),
              command(limits, 'where a trained field is wrong', '')):
        c.add_argument('--run', default=SHIPPED, help=f'a run, or a file ({SHIPPED})')
        c.add_argument('--rooms', type=number(int, 4), default=192, help='held-out rooms (192)')
        c.add_argument('--device', default='auto', help='auto | cpu | cuda | mps (auto)')
    c = command(vlm, 'do the latents help? every kind of them, from the same start',
                'out/ablate-vlm')
    c.add_argument('--arms', nargs='+', default=LATENTS, choices=LATENTS, help='(all)')
    return parser


def main(argv=None):
    parser = make_parser()
    args, options = parser.parse_known_args(argv)
    if options and args.command in ('worlds', 'limits'):
        parser.error(f'unrecognized arguments: {" ".join(options)}')
    args.options = options
    args.function(args)


if __name__ == '__main__':
    run_script(main)
