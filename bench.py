"""
Where does the time of a PSFM step go?

    python bench.py                       # the small preset on this machine
    python bench.py --config base         # the paper's sizes (on a GPU; weights are random, nothing is downloaded)
    python bench.py --views 4 8 12 --compile
    python bench.py --config base --predict    # no GPU, no computation: FLOPs and memory of a step at full size

Every part is timed alone, after a warm-up, as the median of several runs; FLOPs are
counted, not guessed (a multiply-add is two). MFU is TFLOP/s over the device's dense
bf16 peak. Below the table, ratios measured side by side in this very run: the split
attention of the asymmetric pass against one with a dense mask, rendering against the
step, and fine-tuning with and without latents on disk. The last line is JSON.
"""
import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import finetune
import model
from adapter import SceneLatents
from data import CELL, RoomPool, RoomQuestions
from model import InputError, RoPE2D, pick_device
from psfm import PSFM, compile_blocks, random_view_mask
from train import PEAKS, PRESETS, Config, peak_flops, peak_memory, pick_dtype
from vggt import MINI, VGGT, VGGTConfig


def dense_mask_attention(q, k, v, num_context):
    """What model.split_attention avoids: one call with a (tokens x tokens) mask. The reference in tests and below."""
    tokens = q.shape[2]
    is_context = torch.arange(tokens, device=q.device) < num_context
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~is_context[:, None] | is_context[None, :])


# torch counts its GPU kernels' FLOPs, not its CPU kernel's
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v),
}


class Clock:
    """Median milliseconds of a call, and its FLOPs."""

    def __init__(self, device, repeats):
        self.device, self.repeats = device, repeats

    def now(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    def once(self, call):
        start = self.now()
        call()
        return 1e3 * (self.now() - start)

    def measure(self, call, before=lambda: ()):
        times = []
        for i in range(self.repeats + 2):
            arguments = before()
            start = self.now()
            call(*arguments)
            if i >= 2:                                        # two runs to warm up
                times.append(1e3 * (self.now() - start))
        arguments = before()
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            call(*arguments)
        return statistics.median(times), counter.get_total_flops()


def bench(psfm, images, clock, autocast):
    """-> list of (part, ms, FLOPs) for one training step on images (B, V, 3, H, W)."""
    backbone, (B, V) = psfm.backbone, images.shape[:2]
    aggregator, size = backbone.aggregator, images.shape[-2:]
    mask, num_context = random_view_mask(B, V, psfm.mask_ratio, device=images.device)
    rows = []

    def part(name, call, before=lambda: ()):
        rows.append((name, *clock.measure(call, before)))

    def run(blocks, x, *arguments):
        for block in blocks:
            x = block(x, *arguments)

    with autocast:
        with torch.no_grad():
            patches, grid = aggregator.embed(images)
            P, C = aggregator.num_special + patches.shape[2], patches.shape[3]
            x = torch.randn(B * V, P, C, device=images.device)
            in_frame = RoPE2D(aggregator.num_special, grid, aggregator.head_dim, device=x.device)
            across = RoPE2D(aggregator.num_special, grid, aggregator.head_dim, repeats=V, device=x.device)
            part('patch embed', lambda: aggregator.embed(images))
            part('frame blocks', lambda: run(aggregator.frame_blocks, x, in_frame))
            y = x.view(B, V * P, C)
            part('global blocks', lambda: run(aggregator.global_blocks, y, across, num_context * P))
            tokens = backbone.attend(patches, grid, mask, num_context)[-1]
            part('camera head', lambda: backbone.read(tokens, grid))
        context, views, _ = psfm.observe(images, mask, num_context)
        part('encoder', lambda: psfm.encode(context, grid))
        z = psfm.encode(context, grid).detach()
        part('decoder', lambda: psfm.decoder(z, views.extrinsics, views.intrinsics, size, grid))
        decoded = psfm.decoder(z, views.extrinsics, views.intrinsics, size, grid).detach()
        part('head and loss', lambda: psfm.compare('geo', psfm.heads['geo'](decoded), views.features))

        def forward():
            psfm.zero_grad(set_to_none=True)
            return (psfm(images, view_mask=mask)['loss'],)
        part('backward', lambda loss: loss.backward(), forward)
    return rows


def build(config, dtype):
    """An untrained model of a preset's sizes, its backbone frozen in `dtype`."""
    heads = ('camera', 'depth') if config.depth_probe else ('camera',)
    backbone = VGGT(MINI if config.backbone.startswith('weights/') else VGGTConfig(heads=heads)).freeze(dtype)
    return PSFM(backbone, config.width, config.encoder_depth, config.decoder_depth, config.num_heads, config.num_latents, config.num_registers,
                config.mask_ratio, depth_probe=config.depth_probe)


def batch_shape(config, backbone, V):
    """(B, V, 3, H, W) of a batch with V views a scene: square pictures for the mini backbone, else 4 : 3."""
    p = backbone.config.patch_size
    width = config.image_width // p * p
    return max(1, config.images_per_batch // V), V, 3, width if backbone.config == MINI else width * 3 // 4 // p * p, width


UTILISATION = 0.25, 0.40                                      # shares of an H100's peak that such a step may reach


def predict(name, config, V):
    """FLOPs and memory of one training step at full size, part by part, from shapes alone: tensors that hold no numbers pass through the real code.

    What the backward pass needs is counted as autograd keeps it, each storage once. Attention's share is counted in fp32,
    which is what a CPU runs; on a GPU it is half of that. -> dict of the printed numbers
    """
    with torch.device('meta'):
        psfm = build(config, torch.bfloat16)
    backbone = psfm.backbone
    count = lambda module, trained: sum(p.numel() for p in module.parameters() if p.requires_grad == trained)
    frozen, trained = count(psfm, False), count(psfm, True)
    frozen_gb = sum(x.numel() * x.element_size() for x in backbone.state_dict().values()) / 2 ** 30
    B, _, _, height, width = batch_shape(config, backbone, V)
    rows, kept = [], {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    def part(label, call):
        flops, memory = counter.get_total_flops(), sum(kept.values())
        result = call()
        rows.append((label, counter.get_total_flops() - flops, sum(kept.values()) - memory))
        return result

    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, \
            torch.autocast('cpu', torch.bfloat16), saved_tensors_hooks(keep, lambda x: x):
        psfm.to_empty(device='cpu')
        images, size = torch.rand(B, V, 3, height, width), (height, width)
        num_context = max(1, int(V * (1 - config.mask_ratio)))
        with torch.no_grad():
            patches, grid = part('patch embed', lambda: backbone.aggregator.embed(images))
            layers = backbone.config.dpt_layers if config.depth_probe else ()
            tokens = part('frame and global blocks', lambda: backbone.aggregator.attend(patches, grid, num_context, (*layers, -1)))
            views = part('camera head', lambda: backbone.read(tokens[-1], grid))
            depth = part('depth head', lambda: backbone.patch_depth(tokens, grid)) if config.depth_probe else None
        z = part('encoder', lambda: psfm.encode(views.features[:, :num_context], grid))
        decoded = part('decoder', lambda: psfm.decoder(z, views.extrinsics, views.intrinsics, size, grid))

        def compare():
            losses = psfm.compare('geo', psfm.heads['geo'](decoded), views.features)
            if config.depth_probe:
                losses['depth_probe'] = F.smooth_l1_loss(psfm.depth_probe(decoded.detach())[..., 0].float(), depth)
            return sum(losses.values())
        loss = part('heads and losses', compare)
        part('backward', loss.backward)
    total, activations = sum(flops for _, flops, _ in rows), sum(memory for *_, memory in rows) / 2 ** 30
    adam_gb = 16 * trained / 2 ** 30                          # weights, gradients and two moments, fp32
    print(f'{name}, {B} scenes x {V} views of {width} x {height} a GPU, without the semantic teacher: {frozen / 1e6:.0f} M parameters frozen, {trained / 1e6:.0f} M trained\n')
    print(f'{"part":24s}{"TFLOP":>8s}{"share":>7s}{"GB kept":>9s}')
    for label, flops, memory in rows:
        print(f'{label:24s}{flops / 1e12:8.2f}{100 * flops / total:6.0f}%{memory / 2 ** 30:9.2f}')
    print(f'{"total":24s}{total / 1e12:8.2f}{100:6.0f}%{activations:9.2f}\n')
    print(f'memory of a GPU: frozen weights {frozen_gb:.1f} GB, trained weights with gradients and AdamW {adam_gb:.1f} GB, kept for the backward pass at most {activations:.1f} GB; together {frozen_gb + adam_gb + activations:.0f} GB, and what single operations need for a moment')
    for share in UTILISATION:
        seconds = total / (1e12 * dict(PEAKS)['H100']) / share
        print(f'at {100 * share:.0f}% of an H100: {1e3 * seconds:.0f} ms a batch, {B * V / seconds:.0f} views/s; {config.steps} steps of {config.accumulate} batches take '
              f'{config.steps * config.accumulate * seconds / 3600:.1f} hours on 8 GPUs, and as many views {8 * config.steps * config.accumulate * seconds / 3600:.0f} hours on one')
    print(f'8 GPUs exchange {4 * trained / 1e9:.2f} GB of gradients a step')
    return dict(config=name, scenes=B, views=V, frozen=frozen, trained=trained, flops={label: flops for label, flops, _ in rows}, total_flops=total,
                kept_gb=activations, frozen_gb=frozen_gb, adam_gb=adam_gb)


def bench_finetune(clock, device, autocast):
    """A step of finetune.py --config small with its scenes' latents from disk, and with latents computed anew, in turns."""
    _, config = finetune.parse_config(['--config', 'small', '--map-steps', '0'])
    data = RoomQuestions('train', 0, config.batch)
    with tempfile.TemporaryDirectory() as folder:
        spatial_vlm, chat, kept = finetune.build_model(dataclasses.replace(config, cache=folder), data)
        anew = SceneLatents(config.latents, config.encoder, None, device)
        spatial_vlm.to(device)
        batch, pictures, _ = finetune.Encoded(data, chat, config)[0]
        batch = finetune.to_device(batch, spatial_vlm.vlm, device)
        kept(pictures)

        def step(latents):
            z = latents(pictures)
            with autocast:
                loss = finetune.loss_of(spatial_vlm, batch, z)['answers']
            loss.backward()
        ms = {'kept': [], 'anew': []}
        for _ in range(clock.repeats):
            for name, latents in (('kept', kept), ('anew', anew)):
                ms[name].append(clock.once(lambda: step(latents)))
        kept_ms, anew_ms = [statistics.median(times) for times in ms.values()]
    print(f'fine-tuning, {config.batch} rooms a step: latents from disk {kept_ms:.0f} ms, computed anew {anew_ms:.0f} ms: {anew_ms / kept_ms:.2f} x as fast')
    return dict(kept_ms=kept_ms, anew_ms=anew_ms)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='small', choices=[name for name in PRESETS if name != 'mini-vggt'])
    parser.add_argument('--views', type=int, nargs='+', default=[6], help='view counts to measure (default: 6)')
    parser.add_argument('--images', type=int, help="images a batch (default: the preset's)")
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--dtype', default='auto', choices=['auto', 'float32', 'bfloat16'])
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--predict', action='store_true', help='FLOPs and memory from shapes alone, of --config, --views and --images; nothing is computed')
    args = parser.parse_args(argv)
    config = Config(**PRESETS[args.config])
    config = dataclasses.replace(config, images_per_batch=args.images or config.images_per_batch)
    if args.predict:
        print(json.dumps([predict(args.config, config, V) for V in args.views]))
        return
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(0)
    psfm = build(dataclasses.replace(config, depth_probe=False), dtype).to(device)
    backbone = psfm.backbone
    clock = Clock(device, args.repeats)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads'
    peak = peak_flops(device)
    report = dict(config=args.config, device=name, torch=torch.__version__, dtype=str(dtype), compile=args.compile, runs=[])
    print(f'{args.config} on {name}, torch {torch.__version__}, {dtype}{", compiled" if args.compile else ""}')
    if args.compile:
        compile_blocks(psfm)

    for V in args.views:
        B, _, _, height, width = batch_shape(config, backbone, V)
        images = torch.rand(B, V, 3, height, width, device=device)
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        start = clock.now()
        with autocast:
            psfm(images)['loss'].backward()
        first = clock.now() - start
        rows = bench(psfm, images, clock, autocast)
        total, flops, memory = sum(ms for _, ms, _ in rows), sum(f for _, _, f in rows), peak_memory(device) / 2 ** 30
        print(f'\n{B} scenes x {V} views of {width} x {height}: the first step took {first:.1f} s; after that all parts take {total:.0f} ms, '
              f'{1e3 * B * V / total:.0f} views/s, peak memory {memory:.1f} GB')
        print(f'{"part":16s}{"ms":>9s}{"share":>8s}{"GFLOP":>10s}{"TFLOP/s":>9s}{"MFU":>7s}')
        for part, ms, f in [*rows, ('total', total, flops)]:
            mfu = f'{100 * f / ms * 1e3 / peak:.0f}%' if peak else '-'
            print(f'{part:16s}{ms:9.1f}{100 * ms / total:7.0f}%{f / 1e9:10.1f}{f / ms / 1e9:9.2f}{mfu:>7s}')

        # the asymmetric pass, side by side with a dense mask
        mask, num_context = random_view_mask(B, V, 0.5, device=device)
        outputs = {}

        def attend():
            with torch.no_grad(), autocast:
                patches, grid = backbone.aggregator.embed(images)
                return backbone.attend(patches, grid, mask, num_context)[-1]

        ms, memory_of, split = {}, {}, model.split_attention
        try:
            for name_of, attention in (('split', split), ('dense', dense_mask_attention)):
                model.split_attention = attention
                if device.type == 'cuda':
                    torch.cuda.reset_peak_memory_stats(device)
                ms[name_of], _ = clock.measure(attend)
                outputs[name_of], memory_of[name_of] = attend(), peak_memory(device)
        finally:
            model.split_attention = split
        difference = (outputs['split'] - outputs['dense']).abs().max().item() / outputs['dense'].abs().max().item()
        tokens = outputs['split'].shape[1] * outputs['split'].shape[2]
        saved = f' and {(memory_of["dense"] - memory_of["split"]) / 2 ** 20:.0f} MB less at the peak' if device.type == 'cuda' else ''
        print(f'asymmetric pass: split {ms["split"]:.1f} ms, dense {tokens} x {tokens} mask {ms["dense"]:.1f} ms: {ms["dense"] / ms["split"]:.2f} x '
              f'as fast{saved}, largest difference {difference:.1e} of the largest value')
        run = dict(scenes=B, views=V, size=[height, width], first_step_s=first, step_ms=total, views_per_s=1e3 * B * V / total, flops=flops,
                   mfu=flops / total * 1e3 / peak if peak else None, peak_memory_gb=memory,
                   parts={part: dict(ms=ms, flops=f) for part, ms, f in rows}, dense_over_split=ms['dense'] / ms['split'])
        if config.data == 'rooms' and config.image_width % CELL == 0:
            pool = RoomPool('train', 0, RoomPool.BLOCK, image_size=(config.image_width, config.image_width), device=device)
            render = clock.measure(lambda: pool.render_block(0))[0] * config.new_rooms / RoomPool.BLOCK
            print(f'rendering: {render:.1f} ms a step for {config.new_rooms:g} new rooms, {100 * render / (render + total):.1f}% of the step')
            run.update(render_ms=render, render_share=render / (render + total))
        report['runs'].append(run)
    if backbone.config == MINI:
        report['finetune'] = bench_finetune(clock, device, autocast)
    print(json.dumps(report))


if __name__ == '__main__':
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f'error: {error}')
