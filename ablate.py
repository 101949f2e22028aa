"""
What matters, what does it cost, how robust is it? Experiments of many runs of the scripts that
make and ask one each: train.py, finetune.py and eval.py. Rooms only.

    python ablate.py field      # the decisions of the method, one at a time
    python ablate.py scaling    # R2 and objects found against steps and width
    python ablate.py worlds     # a trained field in rooms unlike those that it was trained on
    python ablate.py limits     # where a trained field is wrong
    python ablate.py vlm        # do the latents help a VLM? all kinds of them

Every training is repeated with three seeds. The same command goes on where it was cut off: finished
runs are kept, and two commands may share the work (`--seeds 0`, `--seeds 1 2`). Options that this
script does not know are those of train.py (field, scaling) or finetune.py (vlm), for all runs.
"""
import functools
import glob
import itertools
import math
import os
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import finetune
import psfm as method
import train
from adapter import LATENTS
from chat import attend_in_fp32
from common import (FREE, InputError, Parser, autocast_on, check_same, find_checkpoint, find_file,
                    number, pick_device, pick_dtype, read_json, run_script, write_json)
from data import RoomPool, make_sources, rendering
from draw import ACCENT, blank, draw_panel
from eval import SHIPPED, folder_beside, load_answerer
from measure import Score, answer_rooms, evaluate_field, field_batches, knows_rooms, rooms_table
from mini_vggt import pose_errors
from model import (MLP, RoPE2D, camera_rays, full_precision, init_linear, points_in_world,
                   take_views, to_4x4)
from psfm import FieldDecoder, build_psfm, context_index, load_psfm
from rooms import SCENE_UNIT, STRUCTURE, Style, render, scene_extrinsics


class CameraToken(FieldDecoder):
    """The camera as one more token beside the rays, instead of PRoPE: its twelve extrinsics and its
    focal lengths as shares of the picture. Patches keep a place in it (RoPE)."""

    def __init__(self, dim, depth, num_heads, num_registers=4):
        super().__init__(dim, depth, num_heads, num_registers)
        with torch.random.fork_rng(devices=[]):  # what is made after it begins as without it
            self.camera_embed = MLP(14, dim, dim).apply(init_linear)

    @full_precision
    def embed(self, extrinsics, intrinsics, size):
        """-> (B V, 1, D)"""
        focal = intrinsics[..., [0, 1], [0, 1]] / intrinsics.new_tensor([size[1], size[0]])
        camera = torch.cat([extrinsics.flatten(2), focal], -1).float()
        return self.camera_embed(camera).flatten(0, 1)[:, None]

    def forward(self, z, extrinsics, intrinsics, size, grid):
        B, V = extrinsics.shape[:2]
        rays = F.normalize(camera_rays(intrinsics, size, grid), dim=-1)
        rays = self.ray_embed(rays).flatten(0, 1)  # (B V, N, D)
        camera = self.embed(extrinsics, intrinsics, size)
        z = z.repeat_interleave(V, dim=0)  # (B V, Q, D)
        x = torch.cat([z, camera.to(z.dtype), rays.to(z.dtype)], dim=1)
        in_front = self.transformer.num_registers + z.shape[1] + 1
        position = RoPE2D(grid, self.head_dim, special_in_front=in_front, device=x.device)
        x = self.transformer(x, position, num_kept=rays.shape[1])  # (B V, N, D)
        return x.unflatten(0, (B, V))


FIELD = {  # what is changed: options of train.py, the decoder
    'as it is': ([], FieldDecoder),
    'camera token': ([], CameraToken),
    'no latents': (['--num-latents', '0'], FieldDecoder),
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
    check_same(folder, there, config, FREE - {'steps', 'dtype'})
    finished = os.path.getmtime(os.path.join(folder, 'metrics.json'))
    sources = [getattr(config, name, '') for name in ('vlm', 'encoder', 'backbone', 'init')]
    for path in map(find_file, filter(None, sources)):
        path = find_checkpoint(path) or path  # a run's folder is written to later too
        files = filter(os.path.exists, [path, *glob.glob(os.path.join(glob.escape(path), '*'))])
        if any(os.path.getmtime(file) > finished for file in files):
            raise InputError(f'{folder} is older than {path}: take another --out, or delete it')


def kept_or_made(config, make):
    """-> path of the metrics of the run in `config.out`: of a finished one, or of make()."""
    if config.data != 'rooms':
        raise InputError('ablate compares on rooms: leave --data out')
    path = os.path.join(config.out, 'metrics.json')
    # `eval.py field` leaves metrics without a step beside a run that was cut off
    if os.path.isfile(path) and 'step' in read_json(path):
        check_finished(config.out, config)
    else:
        make()
    return path


def options_of(args, out, seed, *changes):
    """The options of a run. The row's own come last: they win over those of the command line."""
    options = ['--config', args.config, *args.options, *changes, '--seed', str(seed), '--out', out]
    return [*options, '--resume'] if find_checkpoint(out) else options


def trained(args, name, seed, changes, decoder=FieldDecoder):
    """-> metrics of a run of train.py on rooms; a finished one is kept.

    All are evaluated on features of one pass ('asymmetric') and of two ('separate'), whatever they
    were trained on. R2 is in the units of each run's own statistics (which changes it by 0.001).
    """
    out = os.path.join(args.out, f'{name.replace(" ", "-")}-{seed}')
    options = options_of(args, out, seed, *changes)
    _, config = train.parse_config(options)

    def make():
        needs_heads(build_psfm(config), config)  # now, not after the training
        train.train(f'{name}, seed {seed}', config)

    with mock.patch.object(method, 'FieldDecoder', decoder):
        path = kept_or_made(config, make)
        metrics = read_json(path)
        if 'asked' not in metrics:
            metrics['asked'] = ask(out, config)
            settings = read_json(os.path.join(out, 'config.json'))
            write_json(os.path.join(out, 'config.json'), {**settings, 'decoder': decoder.__name__})
            # after config.json: `eval.py runs` takes one that is newer for an unfinished run
            write_json(path, metrics)
    return metrics


def ask(run, config):
    """-> {context: metrics} of a finished run"""
    device = pick_device(config.device)
    psfm, _ = load_psfm(run, device)
    sources = make_sources(config, psfm.backbone.config.patch_size, device)
    asked = {}
    for context in ('asymmetric', 'separate'):
        psfm.context = context
        asked[context] = evaluate_field(psfm, *sources, config.steps * config.accumulate, config,
                                        autocast_on(device, torch.float32))
    return asked


def needs_heads(psfm, config):
    if not knows_rooms(psfm, config):
        raise InputError(f'the backbone {config.backbone} has no heads that read depth and '
                         'categories of rooms: this takes the mini VGGT')


COLUMNS = {
    'R2': lambda run: run['asked']['asymmetric']['psfm']['r2'],
    'R2, two passes': lambda run: run['asked']['separate']['psfm']['r2'],
    'camera': lambda run: run['asked']['asymmetric']['camera']['r2'],
    'objects': lambda run: run['asked']['asymmetric']['read_out']['psfm']['object_recall'],
    'depth abs-rel': lambda run: run['asked']['asymmetric']['read_out']['psfm']['depth_abs_rel'],
    'minutes': lambda run: run['seconds'] / 60,
}


def comparison(rows, first=None):
    """{row: [metrics of each seed]} -> a table of means over the seeds, then of the differences to
    the row `first`, seed by seed, each with its 95 % interval by Student's t."""
    values = {name: np.array([[of(run) for of in COLUMNS.values()] for run in runs])
              for name, runs in rows.items()}  # (seeds, columns)
    if first:
        values |= {f'{name} minus {first}': (x - values[first])[:, :-1]  # without the minutes
                   for name, x in values.items()
                   if name != first and len(x) == len(values[first])}
    longest = max(map(len, values))
    lines = [' ' * longest + ''.join(f'{title:>16s}' for title in COLUMNS)]
    for name, x in values.items():
        n = len(x)
        half = T95[min(n, len(T95) - 1)] * x.std(0, ddof=1) / n ** 0.5 if n > 1 else 0 * x[0]
        cells = [f'{mean:.3f} ±{width:.3f}' if n > 1 else f'{mean:.3f}'
                 for mean, width in zip(x.mean(0), half)]
        lines.append(name.ljust(longest) + ''.join(cell.rjust(16) for cell in cells))
    if any(len(x) > 1 for x in values.values()):
        lines.append("±: 95 % interval over seeds (Student's t)")
    return '\n'.join(lines)


def one_dtype(args, parse):
    """All runs in one dtype: as asked for, or what is fast on their device, measured once."""
    _, config = parse(['--config', args.config, *args.options])
    dtype, _ = pick_dtype(config.dtype, pick_device(config.device))
    args.options = [*args.options, '--dtype', str(dtype).removeprefix('torch.')]


def field(args):
    one_dtype(args, train.parse_config)
    rows = {}
    for seed in args.seeds:
        for name, (changes, decoder) in FIELD.items():
            rows.setdefault(name, []).append(trained(args, name, seed, changes, decoder))
    print(comparison(rows, 'as it is'))


def scaling(args):
    one_dtype(args, train.parse_config)
    rows = {}
    for seed in args.seeds:
        for width, steps in itertools.product(WIDTHS, STEPS):
            name = f'{width} wide {steps} steps'
            changes = f'--width {width} --num-heads {width // 64} --steps {steps}'.split()
            rows.setdefault(name, []).append(trained(args, name, seed, changes))
    print(comparison(rows))
    path = os.path.join(args.out, 'scaling.png')
    draw_scaling(rows, path)
    print(f'wrote {path}')


def draw_scaling(rows, path):
    """R2 and objects found over the steps, a colour a width, a curve a seed."""
    canvas, pen, font = blank(1000, 360)
    for title, low, box in (('R2', 0.5, (60, 40, 470, 290)), ('objects', 0, (550, 40, 970, 290))):
        curves = {}
        for width, colour in zip(WIDTHS, COLOURS):
            of_steps = [rows[f'{width} wide {steps} steps'] for steps in STEPS]
            for number, runs in enumerate(zip(*of_steps)):
                name = f'{width} wide' if number == 0 else f'_{width} {number}'
                curves[name] = STEPS, [COLUMNS[title](run) for run in runs], colour
        draw_panel(pen, font, box, curves, f'{title}, over steps', low, is_log=True)
    canvas.save(path)


# -----------------------------------------------------------------------------
# a trained field: other worlds, and where it is wrong

def open_field(args):
    """-> PSFM, its options with --rooms held-out rooms, training rooms, held-out rooms"""
    device = pick_device(args.device)
    psfm, config = load_psfm(args.run, device)
    if config.data != 'rooms':
        raise InputError(f'{args.run} was trained on {config.data}; this takes a run on rooms')
    needs_heads(psfm, config)
    config.val_scenes = args.rooms
    return psfm, config, *make_sources(config, psfm.backbone.config.patch_size, device)


def worlds(args):
    psfm, config, source, held_out = open_field(args)
    titles = 'R2', 'camera', 'context', 'objects', '(true)', 'abs-rel', '(true)'
    print(f'{"":26s}' + ''.join(f'{title:>9s}' for title in titles))
    found = {}
    for name, style in STYLES.items():
        pool = RoomPool('val', 0, args.rooms, 0, held_out.size, held_out.device, style=style)
        metrics = evaluate_field(psfm, source, pool, config.steps * config.accumulate, config,
                                 autocast_on(held_out.device, torch.float32))
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
    """For each view after the first `num_context`: its camera's error towards each of those (the
    larger of the errors of rotation and of translation's direction), averaged. (B, V, 3, 4) twice
    -> degrees (B, V - num_context)"""
    V = extrinsics.shape[1]
    worse = torch.maximum(*pose_errors(extrinsics, truth))  # (B, pairs)
    i, j = torch.triu_indices(V, V, offset=1)
    return torch.stack([worse[:, (i < num_context) & (j == view)].mean(1)
                        for view in range(num_context, V)], 1)


def is_shown(batch, context, index, size, grid):
    """Which patches of the views `index` (B, U) show something that a view of `context` (B, Vc)
    shows too: at least half of a patch's cells, by true depth and cameras. -> (B, U, N) bool

    Depths agree up to 0.1 m + 8 %: a cell is wide. (Against pictures four times as fine it takes a
    fifth of the hidden furniture for shown, and a tenth of the shown for hidden.)
    """
    depth = batch['depth'].flatten(2)  # (B, V, cells)
    cells = batch['depth'].shape[-2:]
    points = points_in_world(batch['depth'], batch['extrinsics'], batch['intrinsics'], size)
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
        shown |= inside & ((seen.gather(1, place) - distance).abs() < 0.1 + 0.08 * distance)
    return per_patch(shown.view(*index.shape, *cells), grid).float().mean(-1) >= 0.5


def per_patch(cells, grid):
    """(B, U, 2h, 2w) -> the four cells of each patch, (B, U, N, 4)"""
    B, U, H, W = cells.shape
    cells = cells.view(B, U, grid[0], H // grid[0], grid[1], W // grid[1])
    return cells.transpose(3, 4).flatten(4).flatten(2, 3)


def room_from(extrinsics, batch, rooms, view_mask):
    """The pictures of a batch, the targets rendered anew from these cameras (B, V, 3, 4), which are
    in the first camera's frame and in SCENE_UNITs."""
    in_metres = torch.cat([extrinsics[..., :3], SCENE_UNIT * extrinsics[..., 3:]], -1)
    in_room = (to_4x4(in_metres) @ to_4x4(batch['extrinsics'][:, :1]))[..., :3, :]
    seen = render(rooms, in_room, batch['intrinsics'], batch['images'].shape[-2:])['image']
    is_target = view_mask[..., None, None, None]
    return torch.where(is_target, seen.float() / 255, batch['images'])


@torch.no_grad()
def limits(args):
    """Is it the cameras that the backbone predicts? Is it what no context view shows?

    The field was trained with predicted cameras; it is asked with the true ones too. And the room
    itself is asked with the predicted ones: what the backbone would see from there.
    """
    psfm, config, _, held_out = open_field(args)
    kinds = 'R2', 'true cameras', 'the room'  # columns: R2 of these features
    found_of = {name: [] for name in (*kinds, 'target', 'degrees', 'shown', 'found', 'furniture')}
    batches = field_batches(psfm, held_out, config, args.rooms)
    for number, (batch, mask, num_context) in enumerate(batches):
        size, V = batch['images'].shape[-2:], mask.shape[1]
        seen, unseen = context_index(mask, num_context), context_index(~mask, V - num_context)
        context, views, _ = psfm.observe(batch['images'], mask, num_context)
        z = psfm.encode(context, views.grid)

        def ask(extrinsics, intrinsics):
            cameras = take_views(extrinsics, unseen), take_views(intrinsics, unseen)
            return psfm.decode(z, *cameras, size, views.grid)

        truth = scene_extrinsics(batch['extrinsics'])
        predicted = ask(views.extrinsics, views.intrinsics)
        rooms, _ = held_out.render_block(number)  # of this batch
        rendered = room_from(views.extrinsics, batch, rooms, mask)
        _, of_room, _ = psfm.observe(rendered, mask, num_context)
        classes = take_views(batch['classes'], unseen)
        is_furniture = classes >= len(STRUCTURE)
        is_right = psfm.backbone.read_out(predicted, views.grid)[1].argmax(-1) == classes
        order = torch.cat([seen, unseen], 1)
        of_views = [take_views(x, order) for x in (views.extrinsics, truth)]
        for name, x in {
                'R2': predicted, 'true cameras': ask(truth, batch['intrinsics']),
                'the room': take_views(of_room.features, unseen),
                'target': take_views(views.features, unseen),
                'degrees': camera_errors(*of_views, num_context),
                'shown': is_shown(batch, seen, unseen, size, views.grid),
                'found': per_patch(is_furniture & is_right, views.grid).sum(-1),
                'furniture': per_patch(is_furniture, views.grid).sum(-1)}.items():
            found_of[name].append(x)
    found_of = {name: torch.cat(x) for name, x in found_of.items()}
    degrees, shown = found_of['degrees'], found_of['shown']  # (B, U), (B, U, N)

    title = f'unseen views of {len(shown)} held-out rooms'
    print(f'{title:55s}   share  shown       R2  true cameras  the room  objects')

    def row(name, where):
        of = {name: x[where] for name, x in found_of.items() if name != 'degrees'}
        values = [100 * where.float().mean(), 100 * of['shown'].float().mean()]
        for kind in kinds:
            score = Score(psfm)
            score.add(of[kind], of['target'])
            values.append(score.result()['r2'])
        values.append(of['found'].sum() / of['furniture'].sum())
        print('{:55s}{:6.0f} %{:5.0f} %{:9.3f}{:14.3f}{:10.3f}{:9.3f}'.format(name, *values))

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
    dtype, _ = pick_dtype(config.dtype, device)
    answerer, _ = load_answerer(folder, device, dtype=finetune.frozen_dtype(config, dtype))
    attend_in_fp32(answerer[0].vlm, device)  # as finetune.py answered
    train_data, held_out = data()
    metrics['shuffled'] = answer_rooms(*answerer, held_out, train_data, autocast_on(device, dtype),
                                       shuffled=True)
    write_json(path, metrics)


def vlm(args):
    """Fine-tunes every arm with every seed: the same start, the same data in the same order."""
    one_dtype(args, finetune.parse_config)
    args.options = ['--val-scenes', '768', '--eval-every', '1000000', *args.options]
    _, shared = finetune.parse_config(['--config', args.config, *args.options])

    @functools.cache
    def data():  # the same for all arms; rendered only if something is to be trained or asked
        return finetune.make_data(shared, rendering)

    for seed in args.seeds:
        for arm in args.arms:
            out = os.path.join(args.out, f'{arm}-{seed}')
            _, config = finetune.parse_config(options_of(args, out, seed, '--latents', arm))
            kept_or_made(config, lambda: finetune.train(f'{arm}, seed {seed}', config, *data()))
            if arm == 'psfm':
                ask_shuffled(out, config, data)
    arms = {}
    for arm in args.arms:
        for seed in args.seeds:
            metrics = read_json(os.path.join(args.out, f'{arm}-{seed}', 'metrics.json'))
            arms.setdefault(arm, []).append(metrics)
            if 'shuffled' in metrics:
                arms.setdefault('psfm, shuffled', []).append(metrics['shuffled'])
    print(rooms_table(arms))
    for arm in args.arms:
        minutes = sorted(run['seconds'] / 60 for run in arms[arm])
        line = f'{arm}: {minutes[0]:.1f} to {minutes[-1]:.1f} minutes'
        if 'cost' in arms[arm][0]:  # what its latents cost
            line += f'; {arms[arm][0]["cost"]}'
        print(line)


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
    c = command(vlm, 'do the latents help? every kind, from the same start', 'out/ablate-vlm')
    c.add_argument('--arms', nargs='+', default=LATENTS, choices=LATENTS, help='(all)')
    return parser


def main(argv=None):
    parser = make_parser()
    args, options = parser.parse_known_args(argv)
    if options and args.command in ('worlds', 'limits'):
        parser.error(f'unrecognized arguments: {" ".join(options)}')
    args.options = options
    for given in (getattr(args, 'seeds', ()), getattr(args, 'arms', ())):
        if len(set(given)) < len(given):
            parser.error(f'{" ".join(map(str, given))}: each of them once')
    args.function(args)


if __name__ == '__main__':
    run_script(main)
