"""
Fine-tunes an open VLM that is given the latents of a scene: Spa3-VLM (Spa3R, arXiv 2602.21186).

    python finetune.py --config small                          # any laptop: the mini VLM, rooms
    python finetune.py --config small --encoder out/small      # with your own encoder
    python finetune.py --config photos --data a.jsonl --media media/   # a laptop, photographs
    torchrun --nproc_per_node 8 finetune.py --config base --data a.jsonl --media media/ --shard

The last command is the paper's setup, Qwen2.5-VL-3B. The loss is on the answers' tokens alone. On
rooms the adapter alone is trained first, to tell where things are (mini_vlm.ground). Everything
goes to out/vlm-<config>/: map.png (of rooms), config.json, log.jsonl, metrics.json, checkpoint/
(`--resume` continues from it). Only the latents of scenes are kept elsewhere, in --cache.
"""
import contextlib
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from adapter import (LATENTS, SceneLatents, SpatialVLM, add_lora, build_adapter, load_spatial_vlm,
                     save_spatial_vlm)
from chat import NAMES, answer_loss, attend_in_fp32, lean_batch, load_vlm
from common import (InputError, autocast_on, check_finite, count_parameters, join_processes,
                    leave_processes, open_run, opt, parse_options, peak_memory, pick_dtype, quiet,
                    read_state, run_script, step_generator, write_checkpoint, write_json)
from data import own_cores, rendering
from draw import draw_maps
from measure import answer_rooms, held_out_loss, rooms_line, rooms_table
from mini_vlm import ground
from model import compile_if_possible
from optim import (gather, load_optimizers, load_sharded_optimizers, make_optimizers, rate_share,
                   set_rates, shard_model, take_step)
from questions import RoomQuestions, in_map_frame, view_rooms
from records import Conversations, Encoded, Part
from release import open_psfm, with_licence, write_card
from rooms import CATEGORIES, SEEN, check_classes


@dataclass(frozen=True)
class Config:
    # what is trained
    vlm: str = opt('weights/mini_vlm', f'the VLM: a folder, or a hub id; {NAMES}',
                   group='what is trained')
    latents: str = opt('psfm', 'psfm | none (no adapter) | controls: random (untrained encoder) | '
                       'backbone (its features, 2 x 2 patches as one) | pooled (about as many '
                       'tokens as z) | imagined (the field around the middle) | oracle (of rooms: '
                       'the true list of pieces)', choices=LATENTS)
    encoder: str = opt('weights/psfm_small.safetensors', 'the trained encoder: a run, or a file')
    train: str = opt('adapter+llm', 'adapter | adapter+llm | lora (adapter, and low-rank updates '
                     'of the language model; needs peft)',
                     choices=('adapter', 'adapter+llm', 'lora'))
    lora_rank: int = opt(16, 'lora: rank', low=1)
    # data
    data: str = opt('rooms', 'rooms, or comma-separated files of conversations (JSON or JSONL; '
                    'a.json:0.25 takes a quarter)', group='data')
    media: str = opt('.', "folder that the records' paths are relative to")
    num_frames: int = opt(8, 'frames of a video, at most', low=1)
    max_pixels: int = opt(518 * 518, 'larger pictures are scaled down for the VLM', low=784)
    max_length: int = opt(0, 'most tokens of a conversation, pictures included; a longer one is '
                          'replaced by the next; 0: no limit', low=0)
    skip_bad: bool = opt(False, 'leave faulty records out instead of stopping')
    num_rooms: int = opt(3000, 'rooms to train on, rounded up to fours', low=1)
    ground_steps: int = opt(0, 'rooms: first steps, of the adapter alone; twice --batch', low=0)
    map_steps: int = opt(0, 'rooms: the first steps ask only for the map; twice --batch', low=0)
    val_scenes: int = opt(96, 'held-out rooms, rounded up to fours, or records', low=1)
    cache: str = opt('out/latents', "folder for the scenes' latents; empty: computed anew")
    workers: int = opt(0, 'processes that read pictures', low=0)
    # optimisation
    batch: int = opt(8, 'conversations per batch', low=1, group='optimisation')
    accumulate: int = opt(1, 'batches per step', low=1)
    steps: int = opt(0, 'optimiser steps; 0: one epoch, after map_steps', low=0)
    lr: float = opt(1e-5, 'peak learning rate of the language model under AdamW', low=0)
    adapter_lr: float = opt(1e-4, 'peak learning rate of the adapter under AdamW', low=0)
    muon_lr: float = opt(0.0, "peak rate of Muon for the matrices of the adapter and the VLM's "
                         'blocks; 0: AdamW', low=0)
    min_lr: float = opt(0.0, 'where the cosine ends, as a share of the peak', low=0, high=1)
    warmup: int = opt(100, 'steps of linear warm-up (a tenth of all at most)', low=0)
    decay_from: float = opt(0.0, 'share of the training before the cosine', low=0, high=1)
    weight_decay: float = opt(0.01, 'not of biases and norms', low=0)
    beta2: float = opt(0.98, "AdamW's second moment", low=0, high=0.99999)
    clip: float = opt(1.0, 'largest gradient norm', low=1e-9)
    # running
    checkpointing: bool = opt(False, 'recompute activations in the backward pass: less memory, a '
                              'third more time', group='running')
    compile: bool = opt(None, "torch.compile the language model's blocks; None: on a CUDA GPU only")
    shard: bool = opt(False, 'torchrun: FSDP2 instead of DDP')
    eval_every: int = opt(500, 'steps between evaluations and checkpoints', low=1)
    log_every: int = opt(50, 'steps between log lines', low=1)
    out: str = opt('', 'folder for everything that is written; empty: out/vlm-<config>')
    seed: int = opt(0, 'of weights and of the order of the data', low=0, high=10 ** 12)
    device: str = opt('auto', 'auto | cpu | cuda | mps')
    dtype: str = opt('auto', 'auto | float32 | bfloat16 (autocast)',
                     choices=('auto', 'float32', 'bfloat16'))
    resume: bool = opt(False, 'continue from <out>/checkpoint')


PRESETS = {
    # any laptop: the mini VLM, rooms
    'small': dict(ground_steps=150, steps=300, map_steps=40, lr=7e-4, adapter_lr=2e-3,
                  muon_lr=1.5e-3, min_lr=0.03, val_scenes=192, eval_every=100, compile=False),
    # a laptop: an open VLM of 256 M parameters, an encoder of photographs, your own records
    'photos': dict(vlm='HuggingFaceTB/SmolVLM2-256M-Video-Instruct', encoder='out/photos', data='',
                   batch=1, accumulate=8, max_pixels=512 * 512, val_scenes=32, eval_every=100,
                   log_every=5),
    # the paper: 8 GPUs x 1 x 8, one epoch
    'base': dict(vlm='Qwen/Qwen2.5-VL-3B-Instruct', encoder='out/base', data='', batch=1,
                 accumulate=8, warmup=250, beta2=0.999, checkpointing=True, workers=8,
                 val_scenes=64, eval_every=1000, log_every=20),
}


def parse_config(argv=None):
    """Command line -> (name of the preset, Config). Checks across options are here."""
    name, config = parse_options(argv, __doc__, Config, PRESETS)
    if not config.out:
        config = dataclasses.replace(config, out=os.path.join('out', f'vlm-{name}'))
    if config.data != 'rooms':  # only rooms have maps and grounding
        config = dataclasses.replace(config, ground_steps=0, map_steps=0)
    if not config.data.strip(','):
        raise InputError(f'{name} trains on your own files: --data a.json,b.jsonl --media FOLDER')
    if 0 < config.steps <= config.map_steps:
        raise InputError(f'--map-steps {config.map_steps} of --steps {config.steps}: questions '
                         'need steps after the maps')
    if config.latents == 'oracle' and config.data != 'rooms':
        raise InputError('--latents oracle: only of rooms is it known what stands where')
    if config.latents == 'none' and config.train == 'adapter':
        raise InputError('--latents none --train adapter: without latents there is no adapter, and '
                         'nothing to train')
    return name, config


# -----------------------------------------------------------------------------
# data

def make_data(config, progress=iter, say=print):
    """-> (training data, held-out data)"""
    if config.data == 'rooms':
        return (RoomQuestions('train', 0, config.num_rooms, progress),
                RoomQuestions('val', 0, config.val_scenes))
    files, n = [file for file in config.data.split(',') if file], config.val_scenes
    data = Conversations(files, config.media, config.num_frames, config.skip_bad, say)
    if len(data) <= n:
        raise InputError(f'{config.data}: --val-scenes {n} holds out all {len(data)} records')
    order = torch.randperm(len(data), generator=step_generator(10)).tolist()  # whatever --seed is
    return [Part(data, part, config.skip_bad, say) for part in (order[n:], order[:n])]


class TrueList:
    """The control `oracle`: in the place of z a token for each piece of a room that is seen (what
    it is, where it stands and how large it is, in metres from the first camera), and one for the
    room's sides. It tells what geometry can give this VLM at most."""
    backbone = ''
    found = computed = 0
    width = len(CATEGORIES) + 1 + 6

    def __init__(self, num_rooms, num_held_out):
        self.tokens = {}              # by the first picture of the room
        for split, count in (('train', num_rooms), ('val', num_held_out)):
            for block in view_rooms(split, 0, count, RoomQuestions.VIEWS):
                for room, picture in enumerate(block.images[:, 0].numpy()):
                    self.tokens[picture.tobytes()] = self.list_of(block, room)

    def list_of(self, block, room):
        """-> (pieces + 1, width)"""
        rooms, camera = block.rooms, block.extrinsics[room, 0]
        is_seen = rooms.present[room] & (block.cells[room].sum(0) >= SEEN)
        names = F.one_hot(rooms.category[room], len(CATEGORIES) + 1).float()  # (K, C + 1)
        places = in_map_frame(rooms.center[room], camera)
        pieces = torch.cat([names, places, 2 * rooms.half[room]], 1)[is_seen]
        sides = F.pad(rooms.size[room], (len(CATEGORIES) + 4, 0))
        sides[len(CATEGORIES)] = 1
        return torch.cat([pieces, sides[None]])

    def to(self, device):
        return self

    def __call__(self, scenes):
        keys = [np.asarray(pictures[0]).tobytes() for pictures in scenes]
        if not all(key in self.tokens for key in keys):
            raise InputError('oracle knows the rooms that it was trained and measured on alone')
        return [self.tokens[key] for key in keys]


# -----------------------------------------------------------------------------
# model

def frozen_dtype(config, dtype):
    """A VLM that is not trained itself is held in the run's dtype (FSDP2 wants one for all)."""
    return torch.float32 if config.train == 'adapter+llm' or config.shard else dtype


def open_latents(config, dtype, origin=None):
    """-> SceneLatents, a TrueList, or None. `origin`: of those a VLM was trained with."""
    if config.latents == 'none':
        return None
    if config.latents == 'oracle':
        return TrueList(config.num_rooms, config.val_scenes)
    latents = SceneLatents(config.latents, *open_psfm(config.encoder), config.cache or None,
                           dtype=dtype)
    if origin not in (None, latents.origin):
        raise InputError(f'{config.encoder} holds other weights now than those that the VLM was '
                         'trained with: its latents would mean nothing to it, fine-tune anew')
    return latents


def build_model(config, dtype=torch.float32):
    """-> (SpatialVLM, Chat, what `open_latents` returns), all as at step 0. `dtype`: of the
    latents, and of what is frozen."""
    vlm, chat = load_vlm(config.vlm, frozen_dtype(config, dtype), config.max_pixels)
    latents = open_latents(config, dtype)
    adapter = None
    if latents:
        torch.manual_seed(config.seed)  # the same initial adapter for every kind of latents
        adapter = build_adapter(vlm, latents.width)
    if config.train == 'lora':
        add_lora(vlm, config.lora_rank)
    return SpatialVLM(vlm, adapter), chat, latents


def absolute(path):
    """A path that holds in any folder; hub ids and shipped weights stay as they are."""
    here = os.path.dirname(os.path.abspath(__file__))
    is_shipped = path.startswith('weights/') and os.path.exists(os.path.join(here, path))
    return os.path.abspath(path) if os.path.exists(path) and not is_shipped else path


def evaluate(model, chat, latents, held_out, data, config, autocast, is_main, is_final):
    """-> metrics, a line about them. Before the end: of rooms only the maps, of a quarter."""
    if config.data != 'rooms' or config.shard:  # a sharded model does not generate
        metrics = held_out_loss(model, chat, latents, held_out, autocast, config.max_length)
        return metrics, (f'held-out loss {metrics["loss"]:.4f}, answers right '
                         f'{metrics["accuracy"]:.3f}, too long {metrics["left_out"]}')
    if not is_main:
        return {}, ''
    metrics = answer_rooms(model, chat, latents, held_out, data, autocast, maps_only=not is_final,
                           num_rooms=None if is_final else len(held_out) // 4)
    return metrics, rooms_line(metrics)


def card_of(config, latents, step, line):
    """The rows of the model card. `line`: what was measured."""
    backbone = latents.backbone if latents else ''  # the true list has none either
    return {'VLM': with_licence(config.vlm), 'trained': config.train, 'latents': config.latents,
            'encoder': with_licence(config.encoder) if backbone else '',
            'frozen backbone': with_licence(backbone),
            'trained on': f'{config.data}, {step} steps', 'held out': line}


def save(model, chat, latents, optimizers, step, config, dtype, metrics, line, is_main):
    """<out>/checkpoint: what eval.py loads (save_spatial_vlm), and what --resume needs."""
    state = None
    if config.shard:  # every process takes part
        state, optimizers = gather(model, optimizers)
    if not is_main:
        return
    settings = dict(vlm=absolute(config.vlm), encoder=absolute(config.encoder), data=config.data,
                    latents=config.latents, origin=getattr(latents, 'origin', None),
                    num_frames=config.num_frames, max_pixels=config.max_pixels,
                    num_rooms=config.num_rooms, dtype=str(dtype).removeprefix('torch.'),
                    lora_rank=config.lora_rank if config.train == 'lora' else 0)

    def save_model(folder):
        save_spatial_vlm(model, chat, folder, settings, config.train == 'adapter+llm', state)
        write_card(folder, 'A VLM that is given the latents of a scene',
                   '`eval.py ask --run` takes this folder, and `eval.py export` makes one for '
                   'others out of it.', card_of(config, latents, step, line))

    write_checkpoint(config.out, step, optimizers, config, dtype, metrics, save_model)


@torch.no_grad()
def cost_of(model, z):
    """What the latents of a scene cost, in words: their size, and the adapter's time for them."""
    x = torch.randn(96, model.adapter.gate.in_features, device=z.device)  # six pictures' tokens
    times = []
    for _ in range(20):
        start = time.perf_counter()
        model.adapter(x, z).sum().item()
        times.append(time.perf_counter() - start)
    return (f'{len(z)} tokens of {z.shape[1]} numbers, adapter {1e3 * np.median(times):.1f} ms a '
            f'scene of {len(x)} image tokens')


# -----------------------------------------------------------------------------
# the loop

def check_data(config, state, data):
    """-> a checksum of the records (of rooms: None). Raises InputError if a run would go on with
    other records than it began with."""
    stamp = getattr(data, 'stamp', None)
    if state['metrics'].get('data', stamp) != stamp:
        raise InputError(f'--resume: {config.data} holds other records than when the run began: '
                         'what was held out would be trained on; use another --out')
    return stamp


def check_lengths(config, chat, held_out):
    """Raises InputError if --max-length leaves nothing to evaluate on."""
    if not config.max_length or config.data == 'rooms':
        return
    if all(len(chat.encode(item)['input_ids']) > config.max_length for item in held_out):
        raise InputError(f'--max-length {config.max_length}: all held-out records are longer')


def open_model(config, state, device, dtype, say):
    """-> (SpatialVLM, Chat, what `open_latents` returns) on `device`, as at step 0 or as in the
    checkpoint that `state` names."""
    if config.resume:
        model, chat, there = load_spatial_vlm(state['folder'], frozen_dtype(config, dtype))
        latents = open_latents(config, dtype, there.get('origin'))
    else:
        model, chat, latents = build_model(config, dtype)
    if config.data == 'rooms' and hasattr(model.vlm.config, 'classes'):
        check_classes(model.vlm.config.classes, config.vlm, 'python mini_vlm.py')
    model.train_only(config.train).to(device)
    attend_in_fp32(model.vlm, device)
    if config.checkpointing:
        # of the language model: nothing is kept of the frozen vision tower anyway
        model.vlm.get_decoder().gradient_checkpointing_enable(dict(use_reentrant=False))
    if latents:
        latents.to(device)
        latents.say = say
    return model, chat, latents


def banner(name, config, model, device, dtype, reason):
    """What is trained, on what, where."""
    trained, frozen = count_parameters(model)
    return (f'{name}: {config.steps} steps of {config.batch * config.accumulate} samples a process '
            f'of {config.data}, {config.vlm} with latents {config.latents}, seed {config.seed}\n'
            f'{trained / 1e6:.2f} M parameters to train ({config.train}), {frozen / 1e6:.2f} M '
            f'frozen\n{device}, {dtype} ({reason}) | writing to {config.out}/')


def log_line(record, config, latents):
    cached = f' | latents: {latents.found} found, {latents.computed} computed' if latents else ''
    return (f'step {record["step"]:05d}/{config.steps:05d} | loss {record["loss"]:.4f} | lr '
            f'{record["lr"]:.1e} | gnorm {record["grad_norm"]:.2f} | {record["step_ms"]:.0f} ms | '
            f'mem {record["memory_gb"]:.1f} GB{cached}')


def write_results(name, config, metrics, say):
    """metrics.json; of rooms also map.png and a table."""
    write_json(os.path.join(config.out, 'metrics.json'), metrics)
    say(f'\n{name} took {metrics["seconds"] / 60:.1f} minutes and '
        f'{metrics["peak_memory_gb"]:.1f} GB')
    if 'scores' in metrics:
        draw_maps(metrics['maps'], os.path.join(config.out, 'map.png'))
        say(f'{rooms_table({config.latents: [metrics]})}\nwrote {config.out}/map.png (look at it), '
            'metrics.json, log.jsonl, checkpoint/')


def add_gradients(model, vlm, parts, latents, accumulate, is_last, autocast):
    """Forward and backward pass of one batch, part by part (Chat.batches). -> its share of the
    loss of a step of `accumulate` batches

    `model`: the SpatialVLM around `vlm`, or DDP around it, which exchanges gradients in the last
    part of the last batch of a step.
    """
    loss = 0.0
    is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    for i, (batch, items, share) in enumerate(parts):
        batch = lean_batch(batch, vlm, vlm.device)
        labels = batch.pop('labels')  # the next tokens: lean_batch shifts them
        z = latents([item['images'] for item in items]) if latents else None
        skip_sync = is_ddp and not (is_last and i == len(parts) - 1)
        with model.no_sync() if skip_sync else contextlib.nullcontext():
            with autocast:
                outputs = model(latents=z, use_cache=False, **batch)
                of_part = share * answer_loss(outputs.logits, labels) / accumulate
            of_part.backward()
        loss = loss + of_part.detach()
    return loss


def train(name, config, data=None, held_out=None):
    """One run. -> metrics. `data` and `held_out` may be shared between runs."""
    began = time.time()

    # the machine
    rank, world_size, device = join_processes(config.device)
    config = dataclasses.replace(config, shard=config.shard and world_size > 1)
    is_main = rank == 0
    say = tqdm.write if is_main else quiet
    state = read_state(config)
    first = state['step']
    began -= state['metrics'].get('seconds', 0)  # of the sessions before
    dtype, reason = pick_dtype(state['dtype'], device)
    autocast = autocast_on(device, dtype)
    torch.manual_seed(config.seed)

    # data and model
    if data is None:
        data, held_out = make_data(config, rendering if is_main else iter, say)
    stamp = check_data(config, state, data)
    model, chat, latents = open_model(config, state, device, dtype, say)
    check_lengths(config, chat, held_out)
    log = open_run(config, first, is_main)
    epoch = math.ceil(len(data) / (config.batch * config.accumulate * world_size))
    config = dataclasses.replace(config, steps=config.steps or config.map_steps + epoch)
    say(banner(name, config, model, device, dtype, reason))

    # first the adapter alone, on every rank: where in the room is what each image token shows?
    if config.ground_steps and latents and not config.resume:
        doubled = dataclasses.replace(config, batch=2 * config.batch, map_steps=0)
        parts_of = Encoded(data, chat, doubled, say=say).__getitem__
        ground(model, chat, latents, parts_of, config, autocast, say)

    # processes, compiler, optimizers
    if config.shard:
        model = shard_model(model)
    kind = type(model.vlm.get_decoder().layers[0])
    compile_if_possible(model.vlm, kind, config.compile, device, say)
    optimizers = make_optimizers(
        model, config, device, dtype, fused=not config.shard,
        rate_of=lambda name: config.adapter_lr if name.startswith('adapter.') else config.lr)
    if config.resume and config.shard:
        set_rates(optimizers, 1)      # torch loads only keys that groups have: this adds 'peak'
        load_sharded_optimizers(model, optimizers, state['folder'])
    elif config.resume:
        load_optimizers(optimizers, state['folder'])
    numbers = range(first * config.accumulate, config.steps * config.accumulate)
    encoded = Encoded(data, chat, config, rank, world_size, say, getattr(latents, 'fit', None))
    loader = iter(torch.utils.data.DataLoader(
        encoded, batch_size=None, sampler=numbers, num_workers=min(config.workers, own_cores())))
    is_ddp = world_size > 1 and not config.shard
    wrapped = nn.parallel.DistributedDataParallel(model) if is_ddp else model
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()

    busy, logged = 0.0, first
    for step in tqdm(range(first, config.steps), name, initial=first, total=config.steps,
                     leave=False, disable=None if is_main else True):
        # this step's learning rate, as a share of the peak
        start, share = time.time(), rate_share(step, config)
        set_rates(optimizers, share)

        # forward, backward
        loss = 0.0
        for micro in range(config.accumulate):
            is_last = micro == config.accumulate - 1
            loss = loss + add_gradients(wrapped, model.vlm, next(loader), latents,
                                        config.accumulate, is_last, autocast)

        # update
        norm = take_step(optimizers, trained, config.clip)
        done = step + 1
        is_logged = step == 0 or done % config.log_every == 0
        is_evaluated = done == config.steps or done % config.eval_every == 0
        if is_logged or is_evaluated:
            values = check_finite(dict(loss=loss), norm, trained, done, config)
        busy += time.time() - start

        # log
        if is_logged:
            peak = config.adapter_lr if config.train == 'adapter' else config.lr
            record = dict(step=done, **values, lr=share * peak, grad_norm=norm.item(),
                          step_ms=1e3 * busy / (done - logged),
                          memory_gb=peak_memory(device) / 2 ** 30, seconds=time.time() - began)
            log.write(json.dumps(record) + '\n')
            say(log_line(record, config, latents))
            busy, logged = 0.0, done

        # evaluate and save
        if is_evaluated:
            with torch.compiler.set_stance('force_eager'):  # questions are too few to compile for
                metrics, line = evaluate(model, chat, latents, held_out, data, config, autocast,
                                         is_main, done == config.steps)
            say(f'step {done:05d}/{config.steps:05d} | {line}')
            brief = {key: value for key, value in metrics.items() if key not in ('scores', 'maps')}
            brief.update(seconds=time.time() - began, data=stamp)
            log.write(json.dumps(dict(step=done, metrics=brief)) + '\n')
            save(model, chat, latents, optimizers, done, config, dtype, brief, line, is_main)

    # results
    metrics.update(step=config.steps, seconds=time.time() - began,
                   peak_memory_gb=peak_memory(device) / 2 ** 30)
    if 'scores' in metrics and latents:
        metrics['cost'] = cost_of(model, latents([held_out.pictures(0)])[0].to(device))
    if is_main:
        write_results(name, config, metrics, say)
    return metrics


def main(argv=None):
    train(*parse_config(argv))
    leave_processes()


if __name__ == '__main__':
    run_script(main)
