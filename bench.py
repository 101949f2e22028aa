"""
Where does the time of a PSFM step go, and what does a whole step cost?

    python bench.py                       # on a GPU: the report of speed.py; else `small`, by parts
    python bench.py --config base         # one preset part by part (random weights)
    python bench.py --views 4 8 12 --compile
    python bench.py --config base --predict    # nothing is computed: FLOPs and memory of a step
    python bench.py --config base --growth     # the same, with more views, pixels, latents
    python bench.py --release Spa3R/      # beside the release: your checkout, with einops and VGGT

Each part of the forward and backward pass is timed alone, after a warm-up, as
the median of several runs.
FLOPs are counted, not guessed (a multiply-add is two). MFU is TFLOP/s over the
device's dense bf16 peak. Below the table of parts are ratios measured side by
side in this very run: the split attention of the asymmetric pass against a
dense mask, rendering against the step, fine-tuning with and without latents on
disk. The last line is JSON. The report writes each line to out/bench/ as it
comes, and continues where it was cut off: delete the file to measure anew.
"""
import contextlib
import dataclasses
import json
import os
import platform
import re
import statistics
import tempfile
from functools import partial

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import finetune
import train
from common import (PEAKS, InputError, Parser, autocast_on, count_parameters, number, peak_flops,
                    peak_memory, pick_device, pick_dtype, read_json, run_script)
from data import RoomPool
from draw import ACCENT, blank, draw_panel
from model import Block, compile_if_possible, has_compiler
from psfm import random_view_mask
from questions import RoomQuestions
from records import Encoded
from speed import (CPU_ATTENTION, GIGA, QWEN_3B, SMOLVLM_256M, TINY_QWEN, Clock, batch_shape, build,
                   compare, count_vlm, dense_mask, fused_attention, report, report_parts,
                   storages_kept)
from train import PRESETS, Config

# -----------------------------------------------------------------------------
# one training step, part by part

def time_parts(psfm, images, clock, autocast):
    """-> list of (part, ms, FLOPs) for one training step on images (B, V, 3, H, W)."""
    backbone = psfm.backbone
    B, V = images.shape[:2]
    size = images.shape[-2:]
    device = images.device
    mask, num_context = random_view_mask(B, V, psfm.mask_ratio, device=device)
    rows = []

    def part(name, call, before=lambda: ()):
        rows.append((name, *clock.measure(call, before)))

    with autocast, torch.no_grad():
        patches, grid = backbone.embed(images)
        tokens = backbone.attend(patches, grid, mask, num_context)[-1]
        part('patch embed', lambda: backbone.embed(images))
        part('alternating blocks', lambda: backbone.attend(patches, grid, mask, num_context))
        part('camera head', lambda: backbone.read(tokens, grid))

    with autocast:
        context, views, _ = psfm.observe(images, mask, num_context)
        cameras = views.extrinsics, views.intrinsics, size, grid
        z = psfm.encode(context, grid).detach()
        decoded = psfm.decoder(z, *cameras).detach()
        part('encoder', lambda: psfm.encode(context, grid))
        part('decoder', lambda: psfm.decoder(z, *cameras))
        part('head and loss',
             lambda: psfm.compare('geo', psfm.heads['geo'](decoded), views.features))

    def forward():
        psfm.zero_grad()
        with autocast:
            return (psfm(images, view_mask=mask)['loss'],)
    part('backward', lambda loss: loss.backward(), forward)
    return rows


def compare_masks(backbone, images, clock, autocast):
    """The asymmetric pass with split attention and with a dense mask. -> text, ratio of times"""
    device = images.device
    mask, num_context = random_view_mask(*images.shape[:2], 0.5, device=device)

    def attend():
        with torch.no_grad(), autocast:
            patches, grid = backbone.embed(images)
            return backbone.attend(patches, grid, mask, num_context)[-1]

    ms = {}
    memory = {}
    outputs = {}
    for name, around in (('split', contextlib.nullcontext), ('dense', dense_mask)):
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        with around():
            ms[name], _ = clock.measure(attend)
            outputs[name] = attend().cpu()  # not in the other one's peak
        memory[name] = peak_memory(device)
    difference = (outputs['split'] - outputs['dense']).abs().max() / outputs['dense'].abs().max()
    tokens = outputs['split'].shape[1] * outputs['split'].shape[2]
    ratio = ms['dense'] / ms['split']
    saved = ''
    if device.type == 'cuda':
        saved = f' and {(memory["dense"] - memory["split"]) / 2 ** 20:.0f} MB less at the peak'
    return (f'asymmetric pass: split {ms["split"]:.1f} ms, dense {tokens} x {tokens} mask '
            f'{ms["dense"]:.1f} ms: {ratio:.2f} x as fast{saved}, largest difference '
            f'{difference.item():.1e} of the largest value'), ratio


def bench_step(psfm, config, V, clock, autocast):
    """Prints the table for V views per scene. -> dict of its numbers"""
    device = clock.device
    peak = peak_flops(clock.device)
    B, _, _, height, width = shape = batch_shape(config, V)
    images = torch.rand(shape, device=device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)

    # the first step alone: with --compile, this is where the compiler works
    start = clock.now()
    with autocast:
        loss = psfm(images)['loss']
    loss.backward()
    first = clock.now() - start
    rows = time_parts(psfm, images, clock, autocast)
    total = sum(ms for _, ms, _ in rows)
    flops = sum(f for *_, f in rows)
    memory = peak_memory(device) / GIGA
    print(f'\n{B} scenes x {V} views of {width} x {height}: the first step took {first:.1f} s; '
          f'after that all parts take {total:.0f} ms, {1e3 * B * V / total:.0f} views/s, peak '
          f'memory {memory:.1f} GB')
    print(f'{"part":20s}{"ms":>9s}{"share":>8s}{"GFLOP":>10s}{"TFLOP/s":>9s}{"MFU":>7s}')
    for part, ms, f in [*rows, ('total', total, flops)]:
        mfu = f'{100 * f / ms * 1e3 / peak:.0f}%' if peak else '-'
        print(f'{part:20s}{ms:9.1f}{100 * ms / total:7.0f}%{f / 1e9:10.1f}{f / ms / 1e9:9.2f}'
              f'{mfu:>7s}')
    text, ratio = compare_masks(psfm.backbone, images, clock, autocast)
    print(text)
    result = dict(scenes=B, views=V, size=[height, width], first_step_s=first, step_ms=total,
                  views_per_s=1e3 * B * V / total, flops=flops, peak_memory_gb=memory,
                  mfu=flops / total * 1e3 / peak if peak else None, dense_over_split=ratio,
                  parts={part: dict(ms=ms, flops=f) for part, ms, f in rows})

    if config.data == 'rooms':
        pool = RoomPool('train', 0, RoomPool.BLOCK, image_size=(height, width), device=device)
        ms, _ = clock.measure(lambda: pool.render_block(0))
        render = ms * config.new_rooms / RoomPool.BLOCK
        share = render / (render + total)
        print(f'rendering: {render:.1f} ms a step for {config.new_rooms:g} new rooms, '
              f'{100 * share:.1f}% of the step')
        result.update(render_ms=render, render_share=share)
    return result


def bench_finetune(clock, dtype):
    """Forward and backward pass of a step of finetune.py --config small: latents from disk, and
    computed anew, in turns."""
    _, config = finetune.parse_config(['--config', 'small', '--map-steps', '0'])
    data = RoomQuestions('train', 0, config.batch)
    device = clock.device
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, cache=folder)
        spatial_vlm, chat, kept = finetune.open_model(config, {}, device, dtype, print)
        anew = finetune.open_latents(dataclasses.replace(config, cache=''), dtype).to(device)
        parts = Encoded(data, chat, config)[0]
        autocast = autocast_on(device, dtype)

        def step(latents):
            finetune.add_gradients(spatial_vlm, spatial_vlm.vlm, parts, latents, 1, True, autocast)

        step(kept)  # fills the folder
        times = {'kept': [], 'anew': []}
        for _ in range(3 * clock.repeats):        # the times of the steps differ by a fifth
            times['kept'].append(clock.once(step, kept))
            times['anew'].append(clock.once(step, anew))
    kept_ms = statistics.median(times['kept'])
    anew_ms = statistics.median(times['anew'])
    print(f'fine-tuning, {config.batch} rooms a step: latents from disk {kept_ms:.0f} ms, computed '
          f'anew {anew_ms:.0f} ms: {anew_ms / kept_ms:.2f} x as fast')
    return dict(kept_ms=kept_ms, anew_ms=anew_ms)


# -----------------------------------------------------------------------------
# what a step costs, from shapes alone

UTILISATION = 0.25, 0.40      # shares of an H100's peak that such a step may reach
GROWTH = {'views': (2, 4, 8, 16, 32), 'image_width': (224, 378, 518, 742),
          'num_latents': (64, 256, 1024)}


def count_step(psfm, config, V):
    """FLOPs and kept memory of each part of a training step, from shapes alone: tensors that hold
    no numbers pass through the real code. What the backward pass needs is counted as autograd
    keeps it, each storage once. -> list of (part, FLOPs, bytes kept), FLOPs of attention
    """
    backbone = psfm.backbone
    size = batch_shape(config, V)[-2:]
    _, num_context = random_view_mask(1, V, config.mask_ratio)
    rows = []

    def part(label, call):
        flops = counter.get_total_flops()
        memory = sum(kept.values())
        result = call()
        rows.append((label, counter.get_total_flops() - flops, sum(kept.values()) - memory))
        return result

    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with FakeTensorMode(allow_non_fake_inputs=True), counter, autocast_on(
            torch.device('cpu'), torch.bfloat16), storages_kept() as kept, fused_attention():
        psfm.to_empty(device='cpu')
        images = torch.rand(batch_shape(config, V))
        depth = None
        with torch.no_grad():
            patches, grid = part('patch embed', lambda: backbone.embed(images))
            layers = (*backbone.depth_layers, -1) if config.depth_probe else (-1,)
            tokens = part('alternating blocks', lambda: backbone.mix(
                patches, grid, num_context, layers))
            views = part('camera head', lambda: backbone.read(tokens[-1], grid))
            if config.depth_probe:
                depth = part('depth head', lambda: backbone.patch_depth(tokens, grid))
        z = part('encoder', lambda: psfm.encode(views.features[:, :num_context], grid))
        decoded = part('decoder', lambda: psfm.decoder(
            z, views.extrinsics, views.intrinsics, size, grid))

        def compare():
            losses = psfm.compare('geo', psfm.heads['geo'](decoded), views.features)
            if depth is not None:
                read = psfm.depth_probe(decoded.detach())[..., 0].float()
                losses['depth_probe'] = F.smooth_l1_loss(read, depth)
            return sum(losses.values())
        loss = part('heads and losses', compare)
        part('backward', loss.backward)
    counts = counter.get_flop_counts()['Global']
    return rows, sum(flops for op, flops in counts.items() if 'attention' in str(op))


def count(config, V):
    """FLOPs and memory of one training step at full size. -> dict of the numbers"""
    with torch.device('meta'):
        psfm = build(config, torch.bfloat16)
    trained, frozen = count_parameters(psfm)
    state = psfm.backbone.state_dict().values()
    frozen_gb = sum(x.numel() * x.element_size() for x in state) / GIGA
    adam_gb = 16 * trained / GIGA                 # weights, gradients and two moments, fp32
    rows, attention = count_step(psfm, config, V)
    total = sum(flops for _, flops, _ in rows)
    kept_gb = sum(memory for *_, memory in rows) / GIGA
    B = batch_shape(config, V)[0]
    return dict(scenes=B, views=V, frozen=frozen, trained=trained, total_flops=total,
                per_view=total / B / V, attention=attention / total, parts=rows, kept_gb=kept_gb,
                frozen_gb=frozen_gb, adam_gb=adam_gb)


def predict(name, config, V):
    """Prints what `count` says of one training step. -> dict of the numbers"""
    x = count(config, V)
    total, trained, frozen = x['total_flops'], x['trained'], x['frozen']
    frozen_gb, adam_gb, kept_gb = x['frozen_gb'], x['adam_gb'], x['kept_gb']
    B, _, _, height, width = batch_shape(config, V)
    print(f'{name}, {B} scenes x {V} views of {width} x {height} a GPU, without the semantic '
          f'teacher: {frozen / 1e6:.0f} M parameters frozen, {trained / 1e6:.0f} M trained\n')
    print(f'{"part":24s}{"TFLOP":>8s}{"share":>7s}{"GB kept":>9s}')
    for label, flops, memory in [*x['parts'], ('total', total, kept_gb * GIGA)]:
        print(f'{label:24s}{flops / 1e12:8.2f}{100 * flops / total:6.0f}%{memory / GIGA:9.2f}')
    print(f'\nmemory of a GPU: frozen weights {frozen_gb:.1f} GB, trained weights with gradients '
          f'and AdamW {adam_gb:.1f} GB, kept for the backward pass at most {kept_gb:.1f} GB; '
          f'together {frozen_gb + adam_gb + kept_gb:.0f} GB, and what single operations need for '
          'a moment')
    for share in UTILISATION:
        seconds = total / (1e12 * dict(PEAKS)['H100']) / share
        hours = config.steps * config.accumulate * seconds / 3600
        print(f'at {100 * share:.0f}% of an H100: {1e3 * seconds:.0f} ms a batch, '
              f'{B * V / seconds:.0f} views/s; {config.steps} steps of {config.accumulate} batches '
              f'take {hours:.1f} hours on 8 GPUs, and as many views {8 * hours:.0f} hours on one')
    print(f'8 GPUs exchange {4 * trained / GIGA:.2f} GB of gradients a step')
    return dict(x, config=name)


def print_memory():
    """What training needs, of every preset and of fine-tuning two VLMs. -> the rows"""
    rows = {}
    for name, preset in PRESETS.items():
        config = Config(**preset)
        views = min(8, config.images_per_batch)
        numbers = count(config, views)
        title = f'train.py --config {name}, {config.images_per_batch} images'
        rows[title] = numbers['frozen_gb'], numbers['adam_gb'], numbers['kept_gb']
    vlms = [('Qwen2.5-VL-3B', 'qwen2_5_vl', QWEN_3B, 8 * 254 + 200),  # 8 pictures of 504 x 392
            ('SmolVLM2-256M', 'smolvlm', SMOLVLM_256M, 8 * 67 + 200)]
    for name, kind, sizes, tokens in vlms:
        for trained in ('adapter', 'lora', 'adapter+llm'):
            title = f'finetune.py, {name}, {trained}, {tokens} tokens'
            try:
                rows[title] = count_vlm(kind, sizes, trained, tokens)
            except InputError as error:
                print(f'left out: {title} ({error})')
    titles = 'frozen', 'trained', 'backward', 'together'
    print(f'\n{"GB of memory, counted from shapes, bf16 autocast":58s}'
          + ''.join(f'{title:>10s}' for title in titles))
    for title, parts in rows.items():
        print(f'{title:58s}' + ''.join(f'{value:10.1f}' for value in (*parts, sum(parts))))
    return rows


def growth(config):
    """Prints what a view costs, as one thing grows beyond the preset's sizes and 8 views a scene.
    -> {what grows: [numbers of `count`, one for each of its values]}"""
    titles = 'TFLOP a view', 'in attention', 'GB kept a view'
    print(f'\n{"":18s}' + ''.join(f'{title:>15s}' for title in titles))
    results = {}
    for what, values in GROWTH.items():
        for value in values:
            if what == 'views':
                x = count(config, value)
            else:
                x = count(dataclasses.replace(config, **{what: value}), 8)
            x['kept_a_view'] = x['kept_gb'] / x['scenes'] / x['views']
            print(f'{what.replace("_", " "):13s}{value:5d}{x["per_view"] / 1e12:15.3f}'
                  f'{100 * x["attention"]:14.0f}%{x["kept_a_view"]:15.3f}')
            results.setdefault(what, []).append(x)
    return results


def draw_growth(results, path):
    """As a picture: total and attention, memory, over the views of a scene."""
    canvas, pen, font = blank(1000, 360)
    views = [x['views'] for x in results]
    total = [x['per_view'] / 1e12 for x in results]
    attention = [x['attention'] * flops for x, flops in zip(results, total)]
    kept = [x['kept_a_view'] for x in results]
    curves = {'all': (views, total, 'black'), 'attention': (views, attention, ACCENT)}
    draw_panel(pen, font, (60, 40, 470, 290), curves, 'TFLOP a view, over views a scene', low=0)
    curves = {'GB': (views, kept, 'black')}
    draw_panel(pen, font, (550, 40, 970, 290), curves, 'GB kept a view, over views a scene', low=0)
    canvas.save(path)
    print(f'wrote {path}')


# -----------------------------------------------------------------------------

def small_from_start_to_finish(device, dtype):
    """-> dict of seconds and R2 of `python train.py --config small`"""
    out = os.path.join('out', 'bench', 'small')
    torch.cuda.reset_peak_memory_stats(device)
    train.main(['--config', 'small', '--out', out, '--device', str(device),
                '--dtype', str(dtype).removeprefix('torch.')])
    metrics = read_json(os.path.join(out, 'metrics.json'))
    return dict(ms=1e3 * metrics['seconds'], peak_gb=metrics['peak_memory_gb'], cold_s=0,
                r2=metrics['psfm']['r2'])


def full_report(clock, dtype, name):
    """Of every large preset on a GPU; of `small` and tiny VLMs elsewhere, which tries the code."""
    is_gpu = clock.device.type == 'cuda'
    names = ('base', 'medium', 'photos') if is_gpu else ('small',)
    presets = {preset: Config(**PRESETS[preset]) for preset in names}
    can_compile = is_gpu and has_compiler('cuda')
    parts = report_parts(presets, clock, dtype, (8, 4, 12) if is_gpu else (4,),
                         QWEN_3B if is_gpu else TINY_QWEN, can_compile)
    if is_gpu:
        first = {title: part for title, part in parts.items() if title.startswith('base, 8 views')}
        small = partial(small_from_start_to_finish, clock.device, dtype)
        parts = {**first, 'small, from start to finish': small, **parts}
        if not can_compile:
            print('without compiled rows: torch.compile needs a C compiler, headers and Triton')
    file = f'{name}-{dtype}-{torch.__version__}'.replace('torch.', '')
    file = re.sub('[^A-Za-z0-9._-]+', '-', file) + '.json'
    return report(parts, os.path.join('out', 'bench', file), clock)


def make_parser():
    parser = Parser(description=__doc__)
    parser.add_argument('--config', choices=list(PRESETS), help='a preset, part by part')
    parser.add_argument('--views', type=number(int, 1), nargs='+',
                        help='view counts to measure (default: 6)')
    parser.add_argument('--images', type=number(int, 1), help="a batch (default: the preset's)")
    parser.add_argument('--repeats', type=number(int, 1), default=7, help='of each part (7)')
    parser.add_argument('--device', default='auto', help='auto | cpu | cuda')
    parser.add_argument('--dtype', default='auto', choices=['auto', 'float32', 'bfloat16'])
    parser.add_argument('--compile', action='store_true', help='torch.compile the blocks')
    parser.add_argument('--predict', action='store_true',
                        help='FLOPs and memory from shapes alone, of all presets where none is '
                        'named; nothing is computed')
    parser.add_argument('--growth', action='store_true',
                        help='the same for more views, wider pictures, more latents')
    parser.add_argument('--report', action='store_true',
                        help='the report, on any device (takes --device, --dtype, --repeats)')
    parser.add_argument('--release', metavar='FOLDER', help='a checkout of hustvl/Spa3R')
    parser.add_argument('--profile', metavar='FILE',
                        help='also write a trace of one step, for chrome://tracing')
    return parser


def write_trace(psfm, images, autocast, path):
    """One forward and backward pass through torch.profiler."""
    open(path, 'w').close()           # the profiler says nothing of a file that it could not write
    with torch.profiler.profile(record_shapes=True) as profile:
        with autocast:
            loss = psfm(images)['loss']
        loss.backward()
    profile.export_chrome_trace(path)
    print(f'wrote {path}')


def by_parts(args, config, clock, dtype, name):
    """The tables of one preset. -> dict"""
    device = clock.device
    autocast = autocast_on(device, dtype)
    torch.manual_seed(0)
    # without the depth probe, which is no part of the method
    psfm = build(dataclasses.replace(config, depth_probe=False), dtype).to(device)
    compile_if_possible(psfm, Block, args.compile, device, print)
    preset = args.config or 'small'
    numbers = dict(config=preset, device=name, torch=torch.__version__, dtype=str(dtype),
                   compile=args.compile and has_compiler(device.type))
    numbers['runs'] = [bench_step(psfm, config, V, clock, autocast) for V in args.views]
    if args.profile:
        images = torch.rand(batch_shape(config, args.views[0]), device=device)
        write_trace(psfm, images, autocast, args.profile)
    if preset == 'small':
        numbers['finetune'] = bench_finetune(clock, dtype)
    return numbers


def beside_the_release(args, config, clock, dtype):
    """-> list of dicts, one for each number of views"""
    is_cpu = clock.device.type == 'cpu'
    if is_cpu:  # a ViT-S as the backbone, 384 wide: minutes, not hours
        config = dataclasses.replace(config, width=384, num_heads=6, num_latents=64,
                                     image_width=min(config.image_width, 224))
    can_compile = has_compiler(clock.device.type) and (args.compile or not is_cpu)
    return [compare(args.release, config, V, clock, dtype, not is_cpu, can_compile)
            for V in args.views]


def main(argv=None):
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    clock = Clock(device, args.repeats)
    name = f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    is_plain = not any(getattr(args, option) for option in (
        'config', 'views', 'images', 'compile', 'predict', 'growth', 'release', 'profile'))
    args.views = args.views or [6]
    preset = args.config or ('base' if args.release else 'small')
    config = Config(**PRESETS[preset])
    if args.images:
        config = dataclasses.replace(config, images_per_batch=args.images)

    is_report = args.report or (is_plain and device.type == 'cuda')
    print(f'{"report" if is_report else preset} on {name}, torch {torch.__version__}, {dtype}'
          + ', compiled' * args.compile)
    if args.predict:
        numbers = dict(steps=[predict(preset, config, V) for V in args.views])
        if not args.config:
            numbers['memory_gb'] = print_memory()
    elif args.growth:
        numbers = growth(config)
        os.makedirs('out/bench', exist_ok=True)
        draw_growth(numbers['views'], 'out/bench/growth.png')
    elif args.release:
        numbers = beside_the_release(args, config, clock, dtype)
    elif is_report:
        numbers = full_report(clock, dtype, name)
    else:
        numbers = by_parts(args, config, clock, dtype, name)
    print(json.dumps(numbers))


if __name__ == '__main__':
    run_script(main)
