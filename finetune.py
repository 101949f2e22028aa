"""
Fine-tunes an open VLM that is given the latents of a scene: Spa3-VLM (Spa3R, arXiv 2602.21186).

    python finetune.py --config small                                 # any laptop: the mini VLM on questions about rooms
    python finetune.py --config small --encoder out/small             # with your own encoder
    torchrun --nproc_per_node 8 finetune.py --config base --data vsi_590k.jsonl --media media/ --shard     # the paper: Qwen2.5-VL-3B
    python finetune.py --config mini-vlm                              # pre-trains a mini VLM on single pictures

On rooms, the adapter is first grounded without words (`ground`); then the loss is on the answers' tokens alone. A scene's latents are computed once and kept in --cache.
Everything goes to out/vlm-<config>/: map.png (of rooms), config.json, log.jsonl, metrics.json, checkpoint/ (`--resume` continues from it).
"""
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from adapter import LATENTS, SceneLatents, SpatialVLM, add_lora, build_adapter, build_tokenizer, load_spatial_vlm, load_vlm, mini_vlm, save_mini_vlm, save_spatial_vlm
from data import Conversations, RoomPictures, RoomQuestions, step_generator, to_turns
from eval import SHIPPED, answer_rooms, draw_maps
from model import InputError, load_strictly, read_weights
from rooms import ANSWER_WORDS, CATEGORIES, CLASSES
from scoring import rooms_line, rooms_table
from train import Muon, check_finite, join_processes, learning_rate, open_log, opt, parse_options, peak_memory, pick_dtype, quiet, read_state, run_script, set_rates, write_checkpoint, write_state


@dataclass(frozen=True)
class Config:
    # what is trained
    task: str = opt('spatial', 'spatial | mini-vlm (pre-trains the mini VLM on single pictures)')
    vlm: str = opt('weights/mini_vlm.safetensors', 'the VLM: a file, a folder, or a hub id of the Qwen2-VL kind')
    latents: str = opt('psfm', 'psfm | none (no adapter) | random (untrained encoder) | backbone (its features, pooled)')
    encoder: str = opt(SHIPPED, "the trained encoder: a run's folder, or a file of weights")
    train: str = opt('adapter+llm', 'adapter | adapter+llm | lora (adapter, and low-rank updates of the language model; needs peft)')
    lora_rank: int = opt(16, 'lora: rank')
    # data
    data: str = opt('rooms', 'rooms, or files of conversations with commas between (JSON or JSONL; a.json:0.25 takes a quarter)')
    media: str = opt('.', "folder that the records' paths start from")
    num_frames: int = opt(8, 'frames of a video, at most')
    max_pixels: int = opt(518 * 518, 'pictures are scaled down to so many pixels for the VLM')
    skip_bad: bool = opt(False, 'leave faulty records out instead of stopping')
    num_rooms: int = opt(3000, 'rooms: how many to train on')
    ground_steps: int = opt(0, 'rooms: before anything else, so many steps teach the adapter where what each image token shows lies, two batches at once')
    map_steps: int = opt(0, 'rooms: so many steps first ask for the map alone, in batches of twice as many rooms')
    val_scenes: int = opt(96, 'rooms: held-out ones to be asked about; files: records held out for a loss')
    cache: str = opt('out/latents', "folder for the scenes' latents; '' computes them anew each time")
    workers: int = opt(0, 'processes that read pictures')
    # optimisation
    batch: int = opt(8, 'conversations a batch (mini-vlm: rooms, of seven conversations each)')
    accumulate: int = opt(1, 'batches a step')
    steps: int = opt(0, 'optimiser steps; 0: one epoch')
    lr: float = opt(1e-5, "peak learning rate of the language model (with muon_lr, only of what is not its blocks' matrices)")
    adapter_lr: float = opt(1e-4, 'peak learning rate of the adapter (with muon_lr, only of its biases and norms)')
    muon_lr: float = opt(0.0, "peak learning rate of Muon for the matrices of the adapter and of the VLM's blocks; 0: AdamW for them too")
    min_lr: float = opt(0.0, 'where the cosine ends, as a share of the peak')
    warmup: int = opt(100, 'steps of linear warm-up (a tenth of all at most)')
    decay_from: float = opt(0.0, 'share of the training after which the cosine begins')
    weight_decay: float = opt(0.01, 'on matrices only')
    beta2: float = opt(0.98, "Adam's second moment")
    clip: float = opt(1.0, 'largest gradient norm')
    # running
    checkpointing: bool = opt(False, 'recompute activations in the backward pass: less memory, a third more time')
    shard: bool = opt(False, 'torchrun: FSDP2 instead of DDP, for models that one GPU cannot train')
    eval_every: int = opt(500, 'steps between evaluations and checkpoints')
    log_every: int = opt(50, 'steps between log lines')
    out: str = opt('', 'folder for everything that is written (default: out/vlm-<config>)')
    seed: int = opt(0, 'of weights and of the order of the data')
    device: str = opt('auto', 'auto | cpu | cuda')
    dtype: str = opt('auto', 'auto | float32 | bfloat16 (autocast)')
    resume: bool = opt(False, 'continue from <out>/checkpoint')


PRESETS = {
    # any laptop: the mini VLM, rooms
    'small': dict(ground_steps=150, steps=300, map_steps=40, lr=7e-4, adapter_lr=2e-3, muon_lr=1.5e-3, min_lr=0.03, val_scenes=192, eval_every=300),
    # the paper: 8 GPUs x 1 x 8, one epoch
    'base': dict(vlm='Qwen/Qwen2.5-VL-3B-Instruct', encoder='out/base', data='', batch=1, accumulate=8, warmup=250, weight_decay=0.01, beta2=0.999,
                 checkpointing=True, workers=8, val_scenes=64, eval_every=1000, log_every=20),
    # weights/mini_vlm.safetensors
    'mini-vlm': dict(task='mini-vlm', vlm='', latents='none', batch=8, steps=6000, lr=2e-3, muon_lr=4e-3, min_lr=0.02, decay_from=0.5, dtype='float32',
                     val_scenes=48, eval_every=2000, log_every=100),
}
CHOICES = dict(task=('spatial', 'mini-vlm'), latents=LATENTS, train=('adapter', 'adapter+llm', 'lora'),
               dtype=('auto', 'float32', 'bfloat16'))


def parse_config(argv=None):
    """Command line -> (name of the preset, Config), checked."""
    name, config = parse_options(argv, __doc__, Config, PRESETS, CHOICES)
    config = config if config.out else dataclasses.replace(config, out=os.path.join('out', f'vlm-{name}'))
    if config.data != 'rooms' or config.task == 'mini-vlm':
        config = dataclasses.replace(config, ground_steps=0, map_steps=0)                 # only rooms have maps
    if min(config.ground_steps, config.map_steps) < 0 or 0 < config.steps <= config.map_steps:
        raise InputError(f'--map-steps {config.map_steps} of --steps {config.steps}, --ground-steps {config.ground_steps}: none may be negative, and questions need steps behind the maps')
    for key in ('batch', 'accumulate', 'eval_every', 'log_every', 'num_rooms', 'val_scenes', 'num_frames'):
        if getattr(config, key) < 1:
            raise InputError(f'--{key.replace("_", "-")} must be at least 1, not {getattr(config, key)}')
    if config.ground_steps and not config.vlm.endswith('.safetensors'):
        raise InputError(f'--ground-steps teaches the adapter what the mini VLM was pre-trained with; for {config.vlm}, --ground-steps 0')
    if not config.data:
        raise InputError(f'{name} trains on your own files: --data a.json,b.jsonl --media FOLDER')
    if config.resume and (config.shard or config.task == 'mini-vlm'):
        raise InputError('--resume: neither a sharded run nor mini-vlm keeps what it takes to continue; begin anew, or with --vlm OUT/checkpoint/vlm')
    if config.latents == 'none' and config.train == 'adapter':
        raise InputError('--latents none --train adapter: without latents there is no adapter, and nothing to train')
    return name, config


# -----------------------------------------------------------------------------
# data

class Encoded(torch.utils.data.Dataset):
    """Conversations as the VLM reads them: item `step` is batch `step`, the same whatever came before it.

    The batches of the first `map_steps` steps hold nothing but the map, of twice as many rooms: where things are comes before what follows from it.
    """

    def __init__(self, data, chat, config, rank=0, world_size=1):
        self.data, self.chat, self.config, self.rank, self.world_size = data, chat, config, rank, world_size
        self.maps = config.map_steps * config.accumulate
        self.category_of = torch.full((len(chat.tokenizer),), len(CATEGORIES))            # of every token: index of the category that it names
        for i, name in enumerate(CATEGORIES):
            self.category_of[chat.tokenizer.convert_tokens_to_ids([name, f' {name}'])] = i

    def samples(self, step):
        """Indices of batch `step`: one random order an epoch, dealt out to the processes."""
        B, n, maps = self.config.batch, len(self.data), self.maps
        if step < maps:
            B = 2 * B
        first = (step * self.world_size + self.rank) * B + (step >= maps) * maps * self.world_size * B     # behind the maps' rooms
        return [int(order(n, (first + i) // n, self.config.seed)[(first + i) % n]) for i in range(B)]

    def __getitem__(self, step):
        if self.config.task == 'mini-vlm':
            items = list(RoomPictures('train', self.config.seed * 10 ** 6 + step, self.config.batch))
        else:
            items = [self.data.map_of(i) if step < self.maps else self.data[i] for i in self.samples(step)]
        batch, truth = self.chat.batch([self.chat.encode(item) for item in items]), None
        if 'seen' in items[0]:
            truth = dict(seen=torch.cat([item['seen'] for item in items]), **self.where_words_point(batch, torch.stack([item['stand'] for item in items])))
        return batch, [item['images'] for item in items], truth

    def where_words_point(self, batch, stand):
        """The truth about words. stand (B, C, 3): where the only piece of each category stands, NaN for the others.

        -> words (B, T, 3): at every token that names a category, its place; answers (B, T, NAMES, 3): at every token that an answer follows, the places of the
        categories that the question names, in their order. NaN elsewhere.
        """
        category = self.category_of[batch['input_ids']]                                   # (B, T)
        stand = nn.functional.pad(stand, (0, 0, 0, 1), value=math.nan)                    # (B, C + 1, 3): the last for words that name none
        words = stand.gather(1, category[..., None].expand(-1, -1, 3))
        answers = words.new_full((*category.shape, Sight.NAMES, 3), math.nan)
        for i, (named, is_answer) in enumerate(zip((category < len(CATEGORIES)).tolist(), (batch['labels'] != -100).tolist())):
            names = []                                                                    # since the last answer
            for t in range(len(named) - 1):
                names = [] if is_answer[t] else names + [t] if named[t] else names
                if is_answer[t + 1] and not is_answer[t]:
                    answers[i, t, :len(names[:Sight.NAMES])] = words[i, names[:Sight.NAMES]]
        return dict(words=words, answers=answers)


@functools.lru_cache(maxsize=4)
def order(n, epoch, seed):
    return torch.randperm(n, generator=step_generator(seed, epoch, 9))


def make_data(config, progress=iter, say=print):
    """-> (training data, held-out data)"""
    if config.task == 'mini-vlm':
        return RoomPictures('train', 0, 64), RoomPictures('val', 0, config.val_scenes)     # training goes on to make its own (Encoded)
    if config.data == 'rooms':
        return RoomQuestions('train', 0, config.num_rooms, progress), RoomQuestions('val', 0, config.val_scenes)
    data = Conversations(config.data.split(','), config.media, config.num_frames, config.skip_bad, say=say)
    if len(data) <= config.val_scenes:
        raise InputError(f'{config.data}: {len(data)} records, of which --val-scenes {config.val_scenes} are to be held out: none would be left')
    lot = torch.randperm(len(data), generator=step_generator(10)).tolist()
    return torch.utils.data.Subset(data, lot[config.val_scenes:]), torch.utils.data.Subset(data, lot[:config.val_scenes])


# -----------------------------------------------------------------------------
# model

def build_model(config, data, dtype=torch.float32):
    """-> (SpatialVLM, Chat, SceneLatents or None)"""
    if config.task == 'mini-vlm' and config.vlm:
        vlm, chat = load_vlm(config.vlm)
        return SpatialVLM(vlm).requires_grad_(True), chat, None
    if config.task == 'mini-vlm':
        questions = RoomQuestions('train', 0, 400)
        words = [turn['value'].replace('<image>', '') for item in itertools.chain(data, questions) for turn in item['conversations']]
        words += [text for pair in questions.maps for text in pair]
        words += ['system\n', 'user\n', 'assistant\n'] * 400
        vlm, chat = mini_vlm(build_tokenizer(words, CATEGORIES + ANSWER_WORDS))
        return SpatialVLM(vlm).requires_grad_(True), chat, None
    vlm, chat = load_vlm(config.vlm, dtype, config.max_pixels)
    latents = adapter = None
    if config.latents != 'none':
        latents = SceneLatents(config.latents, config.encoder, config.cache or None)
        torch.manual_seed(config.seed)                        # the same adapter at the start of every arm, as far as its sizes are the same
        adapter = build_adapter(vlm, latents.width)
    if config.train == 'lora':
        add_lora(vlm.model.language_model, config.lora_rank)
    return SpatialVLM(vlm, adapter).trainable(config.train), chat, latents


def make_optimizers(model, config, device):
    """AdamW with one group of learning rates for the adapter and one for the VLM; with `muon_lr`, Muon for the matrices of the adapter and of the VLM's blocks."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    in_blocks = lambda name, p: config.muon_lr > 0 and p.ndim == 2 and ('layers.' in name or 'blocks.' in name or name.startswith('adapter.'))
    groups = []
    for part, lr in (('adapter.', config.adapter_lr), ('vlm.', config.lr)):
        mine = [p for name, p in named if name.startswith(part) and not in_blocks(name, p)]
        for params, decay in (([p for p in mine if p.ndim >= 2], config.weight_decay), ([p for p in mine if p.ndim < 2], 0.0)):
            if params:
                groups.append(dict(params=params, lr=lr, weight_decay=decay))
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=device.type in ('cuda', 'cpu') and not config.shard)]
    matrices = [p for name, p in named if in_blocks(name, p)]
    if matrices:
        optimizers.append(Muon(matrices, config.muon_lr, config.weight_decay))
    return optimizers


def shard_model(model):
    """FSDP2: every block of the language model gathered when its turn comes, the rest at the root."""
    from torch.distributed.fsdp import fully_shard
    for layer in model.vlm.model.language_model.layers:
        fully_shard(layer)
    return fully_shard(model)


def loss_of(model, batch, latents, sight=None, truth=None):
    """-> {answers: mean cross entropy over the answers' tokens of a batch}; with a Sight, what it makes of image tokens and words too (`truth` of Encoded)"""
    inputs = {name: x for name, x in batch.items() if name != 'labels'}
    outputs = model(latents=latents, use_cache=False, output_hidden_states=sight is not None, **inputs)
    losses = dict(answers=nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), batch['labels'][:, 1:].flatten(), ignore_index=-100))
    if sight is not None:
        states = outputs.hidden_states                                                    # of the embeddings, then of every block, (B, T, h)
        losses.update(tokens=sight.loss(model.image_tokens, truth['seen']), words=sight.loss_of_words(states[len(states) // 2], truth['words']),
                      questions=sight.loss_of_answers(states[2 * len(states) // 3], truth['answers']))
    return losses


def to_device(batch, vlm, device):
    """... with two things that transformers would else do there, at a cost, and to the same result:

    the positions of the tokens, which it works out sample by sample: on a GPU that takes longer than all the rest; and a mask for padding, which stands behind all
    that counts: causal attention does not look there, and has faster kernels without a mask.
    """
    if 'image_grid_thw' in batch:
        batch['position_ids'], _ = vlm.model.get_rope_index(**{name: batch[name] for name in ('input_ids', 'mm_token_type_ids', 'image_grid_thw', 'attention_mask')})
    return {name: x.to(device) for name, x in batch.items() if name != 'attention_mask'}


class Sight(nn.Module):
    """Asks a mini VLM, while it is pre-trained, for places in metres on the way to its answers. Without this it takes too long to find that there are any:

    * each image token: what it shows, and where (a stand-in for the pictures that an open VLM's tower has learned from; `ground` reads the adapter's with it too);
    * each word that names a piece, half-way up the language model: where it stands;
    * the token that an answer follows, two thirds up: where all the pieces stand that the question names, in their order. From there, which of two is on
      the left, or in which direction a third lies, is but one step.
    """
    NAMES = 5       # in a question, at most

    def __init__(self, width):
        super().__init__()
        reader = lambda outputs: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))
        self.tokens, self.words, self.answers = reader(len(CLASSES) + 3), reader(3), reader(3 * self.NAMES)

    def loss(self, tokens, seen):
        """tokens (n, h), seen (..., 11 + 3) of the same patches: cross entropy with the shares of the classes, and smooth L1 to the place in metres."""
        (said, place), (shares, true) = [x.flatten(0, -2).float().split([len(CLASSES), 3], -1) for x in (self.tokens(tokens), seen)]
        return nn.functional.cross_entropy(said, shares) + nn.functional.smooth_l1_loss(place, true)

    def loss_of_words(self, states, places):
        """states (B, T, h), places (B, T, 3), NaN where no word names a piece"""
        return self.loss_of_places(self.words(states), places)

    def loss_of_answers(self, states, places):
        """states (B, T, h), places (B, T, NAMES, 3), NaN where there is none"""
        return self.loss_of_places(self.answers(states).unflatten(-1, (self.NAMES, 3)), places)

    def loss_of_places(self, said, true):
        known = ~true.isnan()
        return nn.functional.smooth_l1_loss(said[known].float(), true[known]) if known.any() else 0 * said.sum()


def load_sight(path, width):
    """The Sight that a mini VLM's file holds."""
    sight = Sight(width)
    load_strictly(sight, {name.removeprefix('sight.'): tensor.float() for name, tensor in read_weights(path)[0].items() if name.startswith('sight.')}, path)
    return sight


def ground(model, chat, latents, data, config, device, autocast, say):
    """Before anything else: the adapter alone learns to add to every image token where what it shows lies, seen from the first camera.

    The mini VLM's own tokens say so of their own camera, in a form that its language model has learned to read and to reason with. Both, and the Sight that asks
    on the way, stay as they are here.
    """
    sight = load_sight(config.vlm, model.vlm.config.get_text_config().hidden_size).to(device).requires_grad_(False)
    model.train().trainable('adapter')
    plan = dataclasses.replace(config, steps=config.ground_steps, batch=2 * config.batch, map_steps=0, adapter_lr=2e-2, muon_lr=4e-2)   # the tokens are long, and the adapter begins at zero
    optimizers, dealt = make_optimizers(model, plan, device), Encoded(data, chat, plan)
    peaks = [group['lr'] for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(plan.steps):
        set_rates(optimizers, peaks, learning_rate(step, plan))
        batch, pictures, truth = dealt[step]
        with autocast:
            losses = loss_of(model, to_device(batch, model.vlm, device), latents(pictures), sight, {name: x.to(device) for name, x in truth.items()})
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.adapter.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % config.log_every == 0 or step == plan.steps - 1:
            say(f'grounding the adapter: step {step:05d}/{plan.steps:05d} | ' + ' '.join(f'{name} {loss.item():.3f}' for name, loss in losses.items()))
    model.trainable(config.train)


@torch.no_grad()
def held_out_loss(model, chat, latents, data, device, autocast):
    """-> {loss, accuracy, kinds}: mean over the held-out conversations, the share of the answers whose tokens are all the likeliest, and that share by kind of question."""
    losses, hits = 0.0, collections.defaultdict(list)
    for item in data:
        batch = chat.batch([chat.encode(item)], device=device)
        labels = batch.pop('labels')[0, 1:]
        with autocast:
            logits = model(latents=latents([item['images']]) if latents else None, use_cache=False, **batch).logits[0, :-1].float()
        losses += nn.functional.cross_entropy(logits, labels, ignore_index=-100).item() / len(data)
        right, is_answer = (logits.argmax(-1) == labels).tolist(), (labels != -100).tolist()
        answers = [[ok for _, ok in run] for answer, run in itertools.groupby(zip(is_answer, right), key=lambda pair: pair[0]) if answer]
        for kind, answer in zip(item.get('kinds', ['all'] * len(answers)), answers, strict=True):
            hits[kind].append(all(answer))
    share = lambda values: sum(values) / len(values)
    return dict(loss=losses, accuracy=share(sum(hits.values(), [])), kinds={kind: share(values) for kind, values in sorted(hits.items())})


def save(folder, model, chat, optimizers, step, config, dtype, metrics, is_main, sharded):
    """A checkpoint that eval.py can use (save_spatial_vlm), and what --resume needs beside it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if sharded else None             # every process takes part
    if not is_main:
        return
    settings = dict(vlm=os.path.abspath(config.vlm) if os.path.exists(config.vlm) else config.vlm, latents=config.latents,
                    encoder=os.path.abspath(config.encoder) if os.path.exists(config.encoder) else config.encoder, num_frames=config.num_frames,
                    max_pixels=None if config.vlm.endswith('.safetensors') else config.max_pixels, lora_rank=config.lora_rank if config.train == 'lora' else 0)

    def write(new):
        save_spatial_vlm(model, chat, new, settings, with_vlm=config.train == 'adapter+llm', state=state)
        if not sharded:
            torch.save([optimizer.state_dict() for optimizer in optimizers], os.path.join(new, 'optimizer.pt'))
        write_state(new, step, config, dtype, metrics)
    write_checkpoint(folder, step, write)


# -----------------------------------------------------------------------------

def train(name, config, data=None, held_out=None):
    """One run. -> metrics. `data`, `held_out`: to be shared between runs, else made as the configuration says."""
    began = time.time()

    # the machine
    rank, world_size, device = join_processes(config.device)
    is_main = rank == 0
    say = tqdm.write if is_main else quiet
    checkpoint = os.path.join(config.out, 'checkpoint')
    state = read_state(checkpoint, config) if config.resume else dict(step=0, metrics={})
    first = state['step']
    dtype, reason = pick_dtype(state.get('dtype', config.dtype), device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(config.seed)

    # data and model
    if data is None:
        data, held_out = make_data(config, lambda blocks: tqdm(blocks, 'rendering rooms', leave=False, disable=not is_main), say)
    model, chat, latents = build_model(config, data)
    if config.resume:
        model, chat, _ = load_spatial_vlm(state['folder'], max_pixels=config.max_pixels)
        model.trainable(config.train)
    model.to(device)
    if latents:
        latents.psfm.to(device)
        latents.device, latents.say = device, say
    os.makedirs(config.out, exist_ok=True)
    if is_main:
        with open(os.path.join(config.out, 'config.json'), 'w') as file:
            json.dump(dataclasses.asdict(config), file, indent=1)
    if config.checkpointing:
        model.vlm.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.vlm.enable_input_require_grads()
    if config.task == 'mini-vlm' and world_size > 1:
        raise InputError('mini-vlm trains in one process')
    sight, width = None, model.vlm.config.get_text_config().hidden_size
    if config.task == 'mini-vlm':
        sight = (load_sight(config.vlm, width) if config.vlm.endswith('.safetensors') else Sight(width)).to(device)
    if config.ground_steps and latents and not config.resume:
        ground(model, chat, latents, data, config, device, autocast, say)
    steps = config.steps or config.map_steps + math.ceil(len(data) / (config.batch * config.accumulate * world_size))
    config = dataclasses.replace(config, steps=steps)
    say(f'{name}: ' + ' '.join(f'{key}={value}' for key, value in dataclasses.asdict(config).items()))
    sharded = config.shard and world_size > 1
    if sharded:
        model = shard_model(model)
    optimizers = make_optimizers(model, config, device)
    if sight:
        optimizers[0].add_param_group(dict(params=list(sight.parameters()), lr=config.lr))
    peaks = [group['lr'] for optimizer in optimizers for group in optimizer.param_groups]
    if config.resume:
        states = torch.load(os.path.join(state['folder'], 'optimizer.pt'), map_location='cpu', weights_only=True)
        for optimizer, saved in zip(optimizers, states):
            optimizer.load_state_dict(saved)
    count = lambda grad: sum(p.numel() for p in model.parameters() if p.requires_grad == grad) / 1e6
    say(f'{count(True):.2f} M parameters to train, {count(False):.2f} M frozen | {device}, {dtype} ({reason}) | writing to {config.out}/')
    loader = iter(torch.utils.data.DataLoader(Encoded(data, chat, config, rank, world_size), batch_size=None, num_workers=config.workers,
                                              sampler=range(first * config.accumulate, steps * config.accumulate)))
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 and not sharded else model
    model.train()

    log = open_log(os.path.join(config.out, 'log.jsonl'), first) if is_main else open(os.devnull, 'w')
    metrics, busy, logged = state['metrics'], 0.0, first
    for step in range(first, steps + 1):
        # evaluate and save
        if step == steps or step > first and step % config.eval_every == 0:
            if config.data == 'rooms' and config.task == 'spatial' and not sharded:       # a sharded model does not generate
                metrics = answer_rooms(model, chat, latents, held_out, data, device, autocast) if is_main else {}
                line = rooms_line(metrics) if is_main else ''
            else:
                model.eval()
                metrics = held_out_loss(model, chat, latents, held_out, device, autocast)
                model.train()
                line = f'held-out loss {metrics["loss"]:.4f}, answers right {metrics["accuracy"]:.3f}'
            say(f'step {step:05d}/{steps:05d} | {line}')
            log.write(json.dumps(dict(step=step, metrics={key: value for key, value in metrics.items() if key not in ('scores', 'maps', 'kinds')})) + '\n')
            if step > first:
                check_finite(losses, norm, step, checkpoint)
            save(checkpoint, model, chat, optimizers, step, config, dtype, {}, is_main, sharded)
        if step == steps:
            break

        # this step's learning rate
        start, share = time.time(), learning_rate(step, config)
        set_rates(optimizers, peaks, share)

        # forward, backward, update
        for micro in range(config.accumulate):
            batch, pictures, truth = next(loader)
            truth = {name: x.to(device) for name, x in truth.items()} if sight else None
            batch, z = to_device(batch, model.vlm, device), latents(pictures) if latents else None
            last = micro == config.accumulate - 1
            with contextlib.nullcontext() if last or world_size == 1 or sharded else wrapped.no_sync():
                with autocast:
                    losses = loss_of(wrapped, batch, z, sight, truth)
                    losses['loss'] = sum(losses.values())
                (losses['loss'] / config.accumulate).backward()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        is_logged = step == first or (step + 1) % config.log_every == 0
        if is_logged:
            values = check_finite(losses, norm, step, checkpoint)
        busy += time.time() - start

        # log
        if is_logged:
            record = dict(step=step, **values, lr=share * config.lr, grad_norm=norm.item(), step_ms=1e3 * busy / (step + 1 - logged),
                          memory_gb=peak_memory(device) / 2 ** 30, seconds=time.time() - began)
            log.write(json.dumps(record) + '\n')
            log.flush()
            cached = f' | latents: {latents.found} found, {latents.computed} computed' if latents else ''
            parts = ' '.join(f'{key} {value:.3f}' for key, value in values.items() if key != 'loss') + ' ' if sight else ''
            say(f'step {step:05d}/{steps:05d} | loss {values["loss"]:.4f} {parts}| lr {record["lr"]:.1e} | gnorm {norm.item():.2f} | {record["step_ms"]:.0f} ms | '
                f'mem {record["memory_gb"]:.1f} GB{cached}')
            busy, logged = 0.0, step + 1

    # what came of it
    metrics.update(step=steps, seconds=time.time() - began, peak_memory_gb=peak_memory(device) / 2 ** 30)
    if is_main:
        with open(os.path.join(config.out, 'metrics.json'), 'w') as file:
            json.dump(metrics, file, indent=1)
        say(f'\n{name} took {metrics["seconds"] / 60:.1f} minutes and {metrics["peak_memory_gb"]:.1f} GB')
        if config.task == 'mini-vlm':
            path = os.path.join(config.out, 'mini_vlm.safetensors')
            save_mini_vlm(model.vlm, chat, path, {}, 'python finetune.py ' + ' '.join(sys.argv[1:]), sight)
            say(''.join(f'{kind:30s} {100 * share:5.1f} % right\n' for kind, share in metrics['kinds'].items()))
            say(f'wrote {path}\nnext: python finetune.py --config small --vlm {path}')
        elif 'scores' in metrics:
            draw_maps(metrics['maps'], os.path.join(config.out, 'map.png'))
            say(f'{rooms_table({config.latents: metrics})}\nwrote {config.out}/map.png (look at it), metrics.json, log.jsonl, checkpoint/')
    return metrics


def main(argv=None):
    name, config = parse_config(argv)
    train(name, config)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == '__main__':
    run_script(main)
