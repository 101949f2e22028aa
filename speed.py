"""
What whole training steps cost.

    report     `python bench.py` on a GPU: every preset, what single speed-ups are worth, `small`
               from start to finish, and a step of a 3 B VLM
    compare    `python bench.py --release FOLDER`: ours beside the release's own modules

A step is forward, backward and AdamW on one batch that stays on the device, with random weights.
Times are medians after a warm-up. FLOPs are counted once, on the eager step with split attention
and before any checkpointing: with the frozen part, without the second teacher (a multiply-add is
two). MFU is over the device's dense bf16 peak.
"""
import contextlib
import dataclasses
import gc
import os
import statistics
import time
import traceback
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import model
from adapter import SpatialVLM, add_lora, build_adapter
from chat import answer_loss, lean_batch
from common import (InputError, autocast_on, count_parameters, peak_flops, read_json,
                    write_json)
from da3 import DA3, DA3Config
from mini_vggt import MINI
from model import compile_blocks
from psfm import PSFM, random_view_mask
from release import build_release, load_released
from vggt import VGGT, VGGTConfig

GIGA = 2 ** 30


def dense_mask_attention(q, k, v, num_context):
    """What model.split_attention avoids: one call with a (tokens x tokens) mask. A reference."""
    is_context = torch.arange(q.shape[2], device=q.device) < num_context
    mask = ~is_context[:, None] | is_context[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cpu_attention_flops(q, k, v, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(q, k, v)


def cpu_attention_backward_flops(grad, q, k, v, *args, out_shape=None, **kwargs):
    return sdpa_backward_flop_count(grad, q, k, v)


# torch counts the FLOPs of its GPU kernels, not of its CPU kernel
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CPU_ATTENTION = {ATTENTION: cpu_attention_flops, ATTENTION_BACKWARD: cpu_attention_backward_flops}


class Clock:
    """Median milliseconds of a call, and its FLOPs."""

    def __init__(self, device, repeats):
        self.device = device
        self.repeats = repeats

    def now(self):
        if self.device.type != 'cpu':
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def once(self, call, *arguments):
        """-> milliseconds"""
        start = self.now()
        call(*arguments)
        return 1e3 * (self.now() - start)

    def measure(self, call, before=lambda: ()):
        """`before` prepares the arguments of each call, and is not timed. -> ms, FLOPs"""
        times = [self.once(call, *before()) for _ in range(self.repeats + 2)]
        arguments = before()
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            call(*arguments)
        return statistics.median(times[2:]), counter.get_total_flops()     # two to warm up


def build(config, dtype):
    """An untrained model of a preset's sizes, its backbone frozen in `dtype`."""
    heads = ('camera', 'depth') if config.depth_probe else ('camera',)
    if config.data == 'rooms':
        backbone = VGGT(MINI)
    elif 'DA3' in config.backbone:
        backbone = DA3(DA3Config(heads=heads))
    else:
        backbone = VGGT(VGGTConfig(heads=heads))
    return PSFM(backbone.freeze(dtype), config)


def batch_shape(config, V):
    """(B, V, 3, H, W) of a batch with V views a scene: square on rooms, else 4 : 3."""
    is_mini = config.data == 'rooms'
    p = MINI.patch_size if is_mini else VGGTConfig.patch_size
    width = config.image_width // p * p
    height = width if is_mini else width * 3 // 4 // p * p
    return max(1, config.images_per_batch // V), V, 3, height, width


# -----------------------------------------------------------------------------
# whole steps

class Step:
    """One training step of `module` as a call. `loss_of()` -> its loss."""

    def __init__(self, module, loss_of, autocast):
        self.loss_of, self.autocast = loss_of, autocast
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def forward(self):
        with self.autocast:
            return self.loss_of()

    def __call__(self):
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def count_flops(step):
    """FLOPs of a step, and the kernels that its attention ran on."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step.forward().backward()
    step.optimizer.zero_grad()
    names = [str(op) for op in counter.get_flop_counts()['Global'] if 'attention' in str(op)]
    kernels = {name.split('.')[1].removeprefix('_scaled_dot_product_') for name in names
               if 'backward' not in name}
    return counter.get_total_flops(), ' '.join(sorted(kernels))


@contextlib.contextmanager
def storages_kept(weights=()):
    """-> {storage: its bytes} of what autograd keeps for the backward pass, each storage once, as
    it grows; without those of `weights`, which are there anyway."""
    known = {p.untyped_storage()._cdata for p in weights}
    kept = {}

    def keep(x):
        if x.untyped_storage()._cdata not in known:
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        yield kept


def bytes_kept(step):
    """What one forward pass keeps for the backward pass."""
    with storages_kept(step.parameters) as kept:
        step.forward().backward()
    step.optimizer.zero_grad()
    return sum(kept.values())


def time_step(step, clock):
    """-> dict: cold_s (the first step), ms, peak_gb (of a GPU)"""
    cold = clock.once(step) / 1e3
    if clock.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(clock.device)
    times = [clock.once(step) for _ in range(clock.repeats + 2)][2:]
    peak = torch.cuda.max_memory_allocated(clock.device) if clock.device.type == 'cuda' else 0
    return dict(cold_s=cold, ms=statistics.median(times), peak_gb=peak / GIGA)


# -----------------------------------------------------------------------------
# the report

# the asymmetric pass with a (tokens x tokens) mask instead of two plain calls
dense_mask = partial(mock.patch.object, model, 'split_attention', dense_mask_attention)
# attention as a GPU computes it
fused_attention = partial(mock.patch.object, model, 'attend', F.scaled_dot_product_attention)


def step_cost(config, V, clock, dtype, compiled=False, dense=False):
    """A step of a preset with V views a scene. -> dict"""
    device = clock.device
    torch.backends.cuda.enable_cudnn_sdp(True)  # as train.py has it: a SpatialVLM switches it off
    shape = batch_shape(config, V)
    torch.manual_seed(0)
    with device:
        psfm = build(config, dtype).to(device)  # some buffers begin on the CPU
        images = torch.rand(shape)
    view_mask, _ = random_view_mask(*shape[:2], config.mask_ratio, device=device)
    autocast = autocast_on(device, dtype)
    step = Step(psfm.train(), lambda: psfm(images, view_mask=view_mask)['loss'], autocast)
    # before anything is recomputed or compiled; of one scene: more may not fit so
    one = Step(psfm, lambda: psfm(images[:1], view_mask=view_mask[:1])['loss'], autocast)
    flops, attention = count_flops(one)
    flops *= shape[0]
    psfm.encoder.transformer.checkpointing = config.checkpointing
    psfm.decoder.transformer.checkpointing = config.checkpointing
    if compiled:
        torch._dynamo.reset()  # so that the first step is cold (what lies on disk is kept)
        compile_blocks(psfm)
    if dense:
        attention = 'with a mask'
    with dense_mask() if dense else contextlib.nullcontext():
        cost = time_step(step, clock)
    seconds, peak = cost['ms'] / 1e3, peak_flops(device)
    return dict(cost, scenes=shape[0], views=V, size=list(shape[-2:]), attention=attention,
                views_per_s=shape[0] * V / seconds, tflops=flops / seconds / 1e12,
                mfu=flops / seconds / peak if peak else None)


QWEN_3B = dict(      # Qwen2.5-VL-3B's sizes
    text_config=dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                     num_attention_heads=16, num_key_value_heads=2, vocab_size=151_936,
                     rope_parameters=dict(rope_type='default', rope_theta=1e6,
                                          mrope_section=[16, 24, 24])),
    vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                       out_hidden_size=2048, window_size=112,
                       fullatt_block_indexes=[7, 15, 23, 31]),
    tie_word_embeddings=True)
SMOLVLM_256M = dict(    # SmolVLM2-256M's
    text_config=dict(model_type='llama', hidden_size=576, intermediate_size=1536,
                     num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                     vocab_size=49_280, head_dim=64),
    vision_config=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                       num_attention_heads=12, image_size=512, patch_size=16), scale_factor=4)
TINY_QWEN = dict(    # the same code on a laptop
    text_config=dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, vocab_size=151_936,
                     rope_parameters=dict(rope_type='default', rope_theta=1e6,
                                          mrope_section=[2, 3, 3])),
    vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2,
                       out_hidden_size=64, window_size=112, fullatt_block_indexes=[1]))


def vlm_cost(sizes, train, config, clock, dtype, is_cached=True, grid=(28, 36), compiled=False):
    """A step of fine-tuning with --checkpointing, on one conversation about eight pictures of
    `grid` patches. -> dict

    With `is_cached` the latents lie ready; else a PSFM of `config` computes them in every step.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    device, (h, w) = clock.device, grid
    frames, text = 8, 200         # pictures, tokens of text
    vlm_config = Qwen2_5_VLConfig(**sizes)
    torch.manual_seed(0)
    with device:
        held = torch.float32 if train == 'adapter+llm' else dtype  # as finetune.py holds it
        vlm = Qwen2_5_VLForConditionalGeneration._from_config(vlm_config, dtype=held)
        spatial_vlm = SpatialVLM(vlm, build_adapter(vlm, config.width))
        if train == 'lora':
            add_lora(vlm, 16)
        words = torch.randint(1000, (text,))
        pixels = torch.randn(frames * h * w, 3 * 2 * 14 * 14)
        psfm = None if is_cached else build(config, dtype).to(device)
        z = torch.randn(1, config.num_latents, config.width)
        images = torch.rand(1, frames, *batch_shape(config, frames)[2:])
    vlm.get_decoder().gradient_checkpointing_enable(dict(use_reentrant=False))
    spatial_vlm.train_only(train).to(device).train()
    if compiled:
        torch._dynamo.reset()
        compile_blocks(vlm, type(vlm.get_decoder().layers[0]))
    one = [vlm_config.vision_start_token_id, *[vlm_config.image_token_id] * (h * w // 4),
           vlm_config.vision_end_token_id]
    ids = torch.cat([torch.tensor(one * frames, device=device), words])[None]  # (1, T)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                 mm_token_type_ids=(ids == vlm_config.image_token_id).int(),
                 image_grid_thw=torch.tensor([[1, h, w]] * frames, device=device))
    batch['labels'] = ids.clone()
    batch['labels'][:, :-(text // 2)] = -100  # the second half of the text is the answer
    batch = lean_batch(batch, vlm, device)
    labels = batch.pop('labels')

    def loss_of():
        latents = z if psfm is None else psfm.latents(images)
        return answer_loss(spatial_vlm(latents=list(latents), use_cache=False, **batch).logits,
                           labels)

    cost = time_step(Step(spatial_vlm, loss_of, autocast_on(device, dtype)), clock)
    return dict(cost, tokens=ids.shape[1], frames=frames)


def count_vlm(kind, sizes, train, num_tokens, num_answers=100):
    """Memory of fine-tuning a VLM with --checkpointing on a GPU, one conversation at a time, from
    shapes: tensors that hold no numbers pass through its language model. -> GB: of what is frozen,
    of what is trained (with gradients and AdamW), of what the backward pass needs"""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForImageTextToText
    with torch.device('meta'):
        vlm = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **sizes))
        is_frozen = train != 'adapter+llm'
        vlm.to(torch.bfloat16 if is_frozen else torch.float32)
        if train == 'lora':
            add_lora(vlm, 16)
        spatial_vlm = SpatialVLM(vlm, build_adapter(vlm, 768)).train_only(train)
    trained, frozen = count_parameters(spatial_vlm)
    language = vlm.get_decoder()
    layers = language.config.num_hidden_layers
    with FakeTensorMode(allow_non_fake_inputs=True), autocast_on(
            torch.device('cpu'), torch.bfloat16):
        vlm.to_empty(device='cpu')
        x = torch.rand(1, num_tokens, language.config.hidden_size, dtype=vlm.dtype)
        inputs = layers * x.numel() * x.element_size()
        with storages_kept(vlm.parameters()) as kept:
            hidden = language(inputs_embeds=x.requires_grad_(), use_cache=False).last_hidden_state
        one_layer = sum(kept.values()) / layers
        with storages_kept(vlm.parameters()) as of_loss:
            answer_loss(vlm.lm_head(hidden[:, :num_answers]), torch.zeros(1, num_answers).long())
    return (frozen * (2 if is_frozen else 4) / GIGA, 16 * trained / GIGA,
            (inputs + one_layer + sum(of_loss.values())) / GIGA)


def report_parts(presets, clock, dtype, views, sizes, can_compile):
    """{name: function that measures it}, what matters most first. presets: {name: Config}

    The depth probe is not part of the method: it is off, except in the row that names it.
    """
    presets = {name: dataclasses.replace(config, depth_probe=False)
               for name, config in presets.items()}
    parts = {}

    def add(name, config, V):
        for compiled in (False, True) if can_compile else (False,):
            title = f'{name}, {V} views, {"compiled" if compiled else "eager"}'
            parts[title] = partial(step_cost, config, V, clock, dtype, compiled)

    # one preset, and what single changes cost
    name, config = next(iter(presets.items()))
    V = views[0]
    add(name, config, V)
    changes = {'with --checkpointing': dict(checkpointing=True),
               'with the depth head and probe': dict(depth_probe=True),
               'two passes (another objective)': dict(context='separate')}
    for title, change in changes.items():
        changed = dataclasses.replace(config, **change)
        parts[f'{name}, {V} views, eager, {title}'] = partial(step_cost, changed, V, clock, dtype)
    parts[f'{name}, {V} views, eager, with a dense mask'] = partial(
        step_cost, config, V, clock, dtype, dense=True)

    # the others (what is there already keeps its place)
    for other, of_other in presets.items():
        add(other, of_other, V)

    # fine-tuning
    grid = (28, 36) if sizes is QWEN_3B else (4, 4)
    for trained in ('adapter', 'lora', 'adapter+llm'):
        for is_cached in (True, False):
            title = f'VLM, {trained}, latents {"cached" if is_cached else "computed"}'
            parts[title] = partial(vlm_cost, sizes, trained, config, clock, dtype, is_cached, grid)
    if can_compile:
        parts['VLM, adapter+llm, latents cached, compiled'] = partial(
            vlm_cost, sizes, 'adapter+llm', config, clock, dtype, grid=grid, compiled=True)

    # fewer and more views
    for V in views[1:]:
        for other, of_other in presets.items():
            add(other, of_other, V)
    return parts


def report_line(name, x):
    line = f'{name:52s}{x["ms"]:9.1f} ms{x["peak_gb"]:7.1f} GB{x["cold_s"]:8.1f} s cold'
    if 'tflops' in x:
        mfu = f'{100 * x["mfu"]:.0f}% MFU' if x['mfu'] else ''
        line += f'{x["views_per_s"]:8.0f} views/s{x["tflops"]:8.2f} TFLOP/s {mfu} {x["attention"]}'
    return line


def report(parts, path, clock):
    """Measures every part that is not in the file `path` yet, and writes it there as it comes."""
    results = read_json(path) if os.path.isfile(path) else {}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for name, measure in parts.items():
        if name not in results:
            try:
                results[name] = measure()
            except torch.OutOfMemoryError:
                print(f'{name:52s}does not fit', flush=True)
                continue
            except InputError as error:  # peft is missing
                print(f'{name:52s}left out: {error}', flush=True)
                continue
            except Exception as error:  # a part less: a rerun tries it again
                print(f'{name:52s}failed: {type(error).__name__}: {error}', flush=True)
                traceback.print_exc()
                continue
            finally:
                gc.collect()  # a model that is compiled or wrapped refers to itself
                if clock.device.type == 'cuda':
                    torch.cuda.empty_cache()
            write_json(path, results)
        print(report_line(name, results[name]), flush=True)
    print(f'wrote {path}')
    return results


# -----------------------------------------------------------------------------
# beside the release

def compare(folder, config, V, clock, dtype, full_size, can_compile):
    """Ours and the release's own modules, of equal weights, in turn. Prints ratios. -> dict

    As shipped, the release runs its backbone twice; masked, once with a dense mask: like ours
    with `context` separate and asymmetric. Without teacher and depth head. With `can_compile` ours
    once more, compiled, as it is trained on a GPU.
    """
    device = clock.device
    torch.manual_seed(0)
    vggt = VGGTConfig(heads=('camera',), global_qk_norm='rms')
    if not full_size:
        vggt = dataclasses.replace(vggt, width=384, depth=4, num_heads=6, embed_depth=12,
                                   embed_heads=6, camera_heads=6)
    config = dataclasses.replace(config, depth_probe=False, standardised=False)
    with device:
        theirs = build_release(folder, vggt, config).to(device).train()
        ours = PSFM(VGGT(vggt), config)
    load_released(ours, theirs.state_dict(), folder)
    ours.backbone.freeze(dtype)
    ours.to(device).train()
    p = vggt.patch_size
    B, _, _, height, width = batch_shape(config, V)
    images = torch.rand(B, V, 3, height // p * p, width // p * p, device=device)
    view_mask, _ = random_view_mask(B, V, config.mask_ratio, device=device)
    theirs._random_masking = lambda shape, ratio: view_mask

    def of_theirs(is_masked):
        theirs.asymmetric_masking = is_masked
        return sum(theirs(dict(images=images), mode='loss').values())

    def of_ours(context, checkpointing=False):
        ours.context = context
        for part in (ours.encoder, ours.decoder):
            part.transformer.checkpointing = checkpointing
        return ours(images, view_mask=view_mask)['loss']

    autocast = autocast_on(device, dtype)
    steps = {'release, as shipped': Step(theirs, lambda: of_theirs(False), autocast),
             'release, masked': Step(theirs, lambda: of_theirs(True), autocast),
             'ours, separate': Step(ours, lambda: of_ours('separate'), autocast),
             'ours, asymmetric': Step(ours, lambda: of_ours('asymmetric'), autocast),
             'ours, checkpointing': Step(ours, lambda: of_ours('asymmetric', True), autocast)}
    if can_compile:
        compile_blocks(ours)
        steps['ours, compiled'] = steps['ours, asymmetric']

    def run(name, call):
        # all but one run as they are written
        stance = 'default' if name == 'ours, compiled' else 'force_eager'
        with torch.compiler.set_stance(stance):
            return call()

    losses = {name: run(name, step.forward).item() for name, step in steps.items()}
    for one, other in (('release, as shipped', 'ours, separate'),
                       ('release, masked', 'ours, asymmetric')):
        print(f'loss of {one} {losses[one]:.6f}, of {other} {losses[other]:.6f}')
    memory = {name: run(name, partial(bytes_kept, step)) / GIGA for name, step in steps.items()}
    with torch.compiler.set_stance('force_eager'):  # what is compiled hides its products
        flops = {name: count_flops(step)[0] for name, step in steps.items()}
    times = {name: [] for name in steps}
    for turn in range(clock.repeats + 1):
        for name, step in steps.items():
            ms = run(name, partial(clock.once, step))
            if turn:                  # the first warms up
                times[name].append(ms)
    print(f'{B} scenes x {V} views of {images.shape[-1]} x {images.shape[-2]}, {dtype}')
    for name in steps:
        print(f'{name:22s}{statistics.median(times[name]):10.1f} ms{flops[name] / 1e9:10.1f} GFLOP'
              f'{memory[name]:8.2f} GB kept')
    result = dict(views=V, losses=losses, flops=flops, kept_gb=memory, ms=times)
    for title, one, other in (('like for like', 'release, masked', 'ours, asymmetric'),
                              ('two passes each', 'release, as shipped', 'ours, separate'),
                              ('as shipped', 'release, as shipped', 'ours, asymmetric'),
                              ('less memory', 'release, masked', 'ours, checkpointing'),
                              ('one pass, ours compiled', 'release, masked', 'ours, compiled'),
                              ('as shipped, ours compiled', 'release, as shipped',
                               'ours, compiled')):
        if other not in times:
            continue
        ratios = sorted(a / b for a, b in zip(times[one], times[other]))
        print(f'{title}: {one} / {other}: time {statistics.median(ratios):.2f} '
              f'({ratios[0]:.2f}..{ratios[-1]:.2f}), FLOPs {flops[one] / flops[other]:.2f}, '
              f'memory {memory[one] / memory[other]:.2f}')
        result[title] = statistics.median(ratios)
    return result
