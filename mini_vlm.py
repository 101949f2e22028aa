"""
Makes weights/mini_vlm/: a real Qwen2.5-VL with small numbers, pre-trained on pictures of rooms.

    python mini_vlm.py                    # --help for the options; --resume goes on

It stands in for an open VLM: it sees pictures, alone or unrelated ones in a row, and no scene.
Three things make so small a model reason: it learns to read lists of options before it sees a
picture, half of the choices are answered in words, and places in metres are asked for on the way
(`probe.Sight`). `ground` is how finetune.py begins with such a VLM.
"""
import collections
import dataclasses
import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from adapter import SpatialVLM
from chat import (ASSISTANT, Chat, answer_loss, attend_in_fp32, lean_batch, load_vlm,
                  states_kept)
from common import (autocast_on, command_of, opt, parse_options, pick_device, pick_dtype,
                    read_state, run_script, step_generator, write_checkpoint)
from data import own_cores
from measure import held_out_loss
from mini_vggt import LoopConfig, fit
from model import compile_if_possible
from optim import load_optimizers, make_optimizers, rate_share, set_rates, take_step
from probe import Sight, load_sight, token_categories, truth_of
from questions import (ANSWER_WORDS, RoomQuestions, as_prompt, as_record, ask, ask_map, ask_order,
                       in_map_frame, in_words, pick, shuffled, to_turns, view_rooms,
                       where_categories_stand)
from rooms import CATEGORIES, CLASSES, SEEN, K


@dataclass(frozen=True)
class Config(LoopConfig):
    batch: int = opt(4, 'rooms per batch, in fours, of seven conversations each', low=1,
                     group='mini VLM')
    letter_steps: int = opt(500, 'steps of texts alone, before any picture', low=0)
    workers: int = opt(0, 'processes that make the batches, for a GPU that would wait', low=0)
    compile: bool = opt(None, "torch.compile the language model's blocks; None: on a CUDA GPU only")


PRESETS = {'mini': dict(steps=4000, lr=2e-3, muon_lr=4e-3, decay_from=0.5, clip=1.0, val_scenes=48,
                        eval_every=1000, log_every=100, out='out/mini-vlm')}

LISTS = 48  # of options, in a step of learn_to_read


# -----------------------------------------------------------------------------
# questions about single pictures, and about pictures in a row

def list_numbers(name, middles, sizes):
    """Three questions for a number about the piece `name` in a picture."""
    width, area = sizes[name]
    return [('width', f'What is the width of the {name} in the picture, measured in pixels of 640?',
             None, str(round(640 * width))),
            ('share', f'What share of the picture is covered by the {name} (in percent)?',
             None, f'{100 * area:.1f}'),
            ('from the left', f'How far from the left of the picture is the {name} (in percent)?',
             None, str(round(100 * middles[name])))]


def ask_2d(rooms, room, surface, g):
    """What is there, how many, where in the picture, how large in it; and `ask_letter`.
    surface (h, w): ids of cells. -> list of records, as questions.as_record makes them"""
    # the pieces that are seen: middle of their columns, width and area, as shares of the picture
    w = surface.shape[1]
    columns = ((torch.arange(w) + 0.5) / w).expand_as(surface)
    members, sizes = {}, {}
    for k in range(K):
        mask = surface == 6 + k
        if mask.sum() >= SEEN:
            name, x = CATEGORIES[rooms.category[room, k]], columns[mask]
            members.setdefault(name, []).append(x.mean().item())
            sizes[name] = (x.max() - x.min()).item() + 1 / w, mask.float().mean().item()
    absent = [name for name in CATEGORIES if name not in members]
    unique = {name: x[0] for name, x in members.items() if len(x) == 1}

    there = bool(members) and (not absent or pick([True, False], g))
    name = pick(list(members) if there else absent, g)
    found = [('presence', f'Is there a {name} in the picture?', None, 'yes' if there else 'no')]
    if members:
        name = pick(list(members), g)
        count, every = len(members[name]), [name for name in CATEGORIES if name in members]
        found += [('count', f'How many {name}(s) are in the picture?', None, str(count)),
                  ('list', 'Which objects are in the picture?', None, ', '.join(every))]
        if len(absent) >= 2:
            options = shuffled([name, *shuffled(absent, g)[:3]], g)
            question = f'Which of these objects ({", ".join(options)}) is in the picture?'
            found.append(('which', question, options, name))
    if unique:
        name, thirds = pick(list(unique), g), ['left', 'middle', 'right']
        question = f'Is the {name} on the left, in the middle or on the right of the picture?'
        found.append(('third', question, thirds, thirds[min(2, int(3 * unique[name]))]))
        found.append(pick(list_numbers(pick(list(unique), g), unique, sizes), g))
    pairs = [(a, b) for a, b in itertools.permutations(unique, 2)
             if abs(unique[a] - unique[b]) > 0.08]
    if pairs:
        a, b = pick(pairs, g)
        question = f'In the picture, is the {a} to the left or the right of the {b}?'
        found.append(('left or right', question, shuffled(['left', 'right'], g),
                      'left' if unique[a] < unique[b] else 'right'))
    return [*[as_record(*question) for question in found], ask_letter(g)]


def ask_letter(g):
    """How to read a list of options: no picture is needed. Larger VLMs know it from texts."""
    options = shuffled(pick([CATEGORIES, ANSWER_WORDS], g), g)[:4]
    word = pick(options, g)
    return as_record('letter', f'Which of these is {word}?', options, word)


def ask_slides(shown, g, used):
    """About unrelated pictures in a row: what comes first, and where. -> list of records
    shown: for every picture, the set of categories that it shows."""
    first, found = {}, []
    for name in CATEGORIES:
        views = [i for i, names in enumerate(shown) if name in names]
        if views:
            first.setdefault(views[0], []).append(name)
    if len(first) >= 3:
        found.append(('obj_appearance_order', *ask_order(first, g, used)))
    where = {name: i for i, names in first.items() for name in names}
    for name in shuffled(list(where), g)[:3]:
        question = f'Which picture is the first with a {name} (1 to {len(shown)})?'
        found.append(('picture', question, None, str(where[name] + 1)))
    last = ', '.join(name for name in CATEGORIES if name in shown[-1])
    found.append(('list', 'Which objects are in the last picture?', None, last or 'none'))
    return [as_record(kind, question, options and shuffled(options, g), answer)
            for kind, question, options, answer in found]


class RoomPictures(torch.utils.data.Dataset):
    """Questions that need no scene. Of each room come six items of one picture, with up to
    QUESTIONS questions about what it alone shows (`ask_2d`, and VSI-Bench's as if it were the
    whole video) and its map, and one item of six pictures from as many rooms as there are, up to
    six (`ask_slides`).

    Items also hold `kinds`, the kind of every answer, and `seen` and `stand` as in RoomQuestions,
    but from each picture's own camera."""
    VIEWS, QUESTIONS = 6, 18

    def __init__(self, split, seed, num_rooms):
        self.split, self.seed, self.used = split, seed, collections.Counter()
        images, seen, asked, shown, stand = [], [], [], [], []
        for block in view_rooms(split, seed, num_rooms, self.VIEWS):
            images.append(block.images)
            places = in_map_frame(block.places, block.extrinsics)
            seen.append(torch.cat([block.shares, places], -1))
            for room, view in itertools.product(range(len(block.images)), range(self.VIEWS)):
                turns, only = self.ask_alone(block, room, view)
                asked.append(turns)
                there = only.present[room].nonzero()[:, 0].tolist()
                shown.append({CATEGORIES[only.category[room, k]] for k in there})
                stand.append(where_categories_stand(only, room, block.extrinsics[room, view]))
        self.images = torch.cat(images).flatten(0, 1).numpy()  # (rooms V, H, W, 3)
        self.seen, self.stand = torch.cat(seen).flatten(0, 1), torch.stack(stand)

        # the pictures of an item, and its turns; a row of slides mixes the rooms
        self.items = [([picture], turns) for picture, turns in enumerate(asked)]
        slides = torch.arange(len(asked)).view(-1, self.VIEWS)
        for view in range(self.VIEWS):
            slides[:, view] = slides[:, view].roll(view)
        for number, row in enumerate(slides.tolist()):
            g = step_generator(seed, number, 12, split != 'train')
            records = ask_slides([shown[i] for i in row], g, self.used)
            self.items.append((row, [self.as_turn(record) for record in records]))

    @staticmethod
    def as_turn(record):
        return record['question_type'], as_prompt(record), record['ground_truth']

    def ask_alone(self, block, room, view):
        """-> [(kind, prompt, answer)] about one picture, the Rooms with only what it shows."""
        g = step_generator(self.seed, block.start + room, 5, self.split != 'train', view)
        cells = block.cells[room, view:view + 1]  # (1, K)
        rooms = block.rooms
        only = dataclasses.replace(rooms, present=rooms.present & (cells >= SEEN))
        records = ask(only, room, cells, g, self.used, per_kind=4, fewest=2)
        records = [x for x in records if x['question_type'] != 'room_size_estimation']
        records = ask_2d(rooms, room, block.surface[room, view], g) + records
        records = shuffled(records, g)[:self.QUESTIONS]
        turns = []
        for record in records:
            if record['question_type'] != 'letter' and pick([True, False], g):
                record = in_words(record)
            turns.append(self.as_turn(record))
        overview = ask_map(rooms, room, cells, block.extrinsics[room, view])
        return turns + [('map', *overview)], only

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        pictures, turns = self.items[i]
        none = torch.full((len(CATEGORIES), 3), math.nan)
        stand = self.stand[pictures[0]] if len(pictures) == 1 else none
        return dict(images=[Image.fromarray(self.images[j]) for j in pictures],
                    seen=self.seen[pictures], stand=stand, kinds=[turn[0] for turn in turns],
                    conversations=to_turns('<image>' * len(pictures), [turn[1:] for turn in turns]))


# -----------------------------------------------------------------------------
# the model

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>',
           '<|image_pad|>', '<|video_pad|>', '<|unk|>']
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(texts, content, frequent=20):
    """A tokenizer of words, digits and signs, in which stock phrases are one token each. -> JSON

    Questions are made from templates. Whatever stands between two words that carry the meaning
    (those of `content`, and digits) `frequent` times in `texts` becomes one token, which makes
    the questions several times shorter. A word of `content` is the same token wherever it stands,
    in a question, a list of options or an answer, so that the VLM can compare them from the start.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    meaning = re.compile(rf'\b(?:{"|".join(content)})\b|[0-9]|\n[A-D]\. ')
    pieces = collections.Counter(piece for text in texts for piece in meaning.split(text))
    phrases = [piece for piece, count in pieces.items() if count >= frequent and len(piece) > 1]
    phrases = [re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True)]
    pattern = Regex('|'.join([*phrases, meaning.pattern, r'[A-Za-z]+|\s|.']))
    split = pre_tokenizers.Split(pattern, behavior='isolated')
    texts = [*texts, '0123456789.', 'system\n', 'user\n', 'assistant\n', '\n', ASSISTANT,
             *content, 'A', 'B', 'C', 'D']
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<|unk|>'))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    return tokenizer.to_str()


def build_vlm(tokenizer_json, width=128, depth=6, heads=4):
    """-> (an untrained Qwen2_5_VLForConditionalGeneration of 2 M parameters, Chat), 64 x 64."""
    from tokenizers import Tokenizer
    from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                              Qwen2_5_VLForConditionalGeneration)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json), pad_token='<|endoftext|>',
        eos_token='<|im_end|>', unk_token='<|unk|>', additional_special_tokens=SPECIAL[1:7],
        chat_template=CHAT_TEMPLATE)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=1, merge_size=2, min_pixels=64 * 64, max_pixels=64 * 64)
    ids = {f'{name}_token_id': tokenizer.convert_tokens_to_ids(token) for name, token in
           zip(('vision_start', 'vision_end', 'image', 'video'), SPECIAL[3:7])}
    pad, eos, d = tokenizer.pad_token_id, tokenizer.eos_token_id, width // heads
    std = width ** -0.5  # the usual 0.02 is too small here: no list of options would be learned
    rope = dict(rope_type='default', rope_theta=10000.0,
                mrope_section=[d // 8, d * 3 // 16, d * 3 // 16])
    text = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
                num_attention_heads=heads, num_key_value_heads=heads, vocab_size=len(tokenizer),
                max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=pad,
                bos_token_id=pad, eos_token_id=eos, rope_parameters=rope, initializer_range=std)
    vision = dict(depth=2, hidden_size=width, intermediate_size=2 * width, num_heads=heads,
                  patch_size=8, temporal_patch_size=1, spatial_merge_size=2, window_size=64,
                  fullatt_block_indexes=[0, 1], out_hidden_size=width, in_channels=3,
                  initializer_range=std)
    vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
    vlm.config.classes = CLASSES
    vlm.generation_config.eos_token_id, vlm.generation_config.pad_token_id = eos, pad
    return vlm, Chat(vlm.config, tokenizer, image_processor)


def save_mini_vlm(vlm, chat, sight, folder, command='', dtype=torch.float16):
    """A folder as transformers writes it, with the Sight beside."""
    state = {name: x.to(dtype) for name, x in vlm.state_dict().items() if name != 'lm_head.weight'}
    vlm.config.made_by = command
    vlm.save_pretrained(folder, state_dict=state)
    chat.save_pretrained(folder)
    sight = {name: x.cpu().to(dtype) for name, x in sight.state_dict().items()}
    save_file(sight, os.path.join(folder, 'sight.safetensors'), {'classes': json.dumps(CLASSES)})


# -----------------------------------------------------------------------------
# losses, and how fine-tuning begins

def losses_on(model, parts, latents, sight, category_of, autocast):
    """Losses of a batch in parts (Chat.batches), each by its share of the answers' tokens.
    -> {answers: the VLM's own; tokens, words, questions: those of Sight}"""
    device, total = next(model.parameters()).device, {}
    for batch, items, share in parts:
        truth = {name: x.to(device) for name, x in truth_of(items, batch, category_of).items()}
        z = latents([item['images'] for item in items]) if latents else None
        batch = lean_batch(batch, model.vlm, device)
        labels = batch.pop('labels')
        with autocast, states_kept(model.vlm) as states:
            outputs = model(latents=z, use_cache=False, **batch)
            losses = sight.losses(model.image_tokens, states, truth)
            losses = dict(answers=answer_loss(outputs.logits, labels), **losses)
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + share * loss
    return total


def ground(model, chat, latents, parts_of, config, autocast, say):
    """Before any fine-tuning: the adapter alone learns to add to every image token where what it
    shows lies, seen from the first camera.

    The mini VLM's own tokens say so of their own camera, in a form that its language model has
    learned to read. VLM and Sight stay as they are. `parts_of(step)`: its batch, in parts."""
    width = model.vlm.config.get_text_config().hidden_size
    device = next(model.parameters()).device
    sight = load_sight(config.vlm, width).to(device).requires_grad_(False)
    category_of = token_categories(chat.tokenizer)
    model.train().train_only('adapter')
    # high rates: the tokens are long vectors, and the adapter begins at zero
    plan = dataclasses.replace(config, steps=config.ground_steps, muon_lr=4e-2)
    optimizers = make_optimizers(model, plan, device, rate_of=lambda name: 2e-2)
    for done in range(1, plan.steps + 1):
        set_rates(optimizers, rate_share(done - 1, plan))
        losses = losses_on(model, parts_of(done - 1), latents, sight, category_of, autocast)
        sum(losses.values()).backward()
        take_step(optimizers, model.adapter.parameters(), config.clip)
        if done == 1 or done % config.log_every == 0 or done == plan.steps:
            parts = ' '.join(f'{name} {loss.item():.3f}' for name, loss in losses.items())
            say(f'grounding the adapter: step {done:05d}/{plan.steps:05d} | {parts}')
    model.train_only(config.train)


# -----------------------------------------------------------------------------
# training

def start(folder):
    """-> (SpatialVLM, Chat, Sight): of the checkpoint in `folder`; without one, new"""
    if folder:
        vlm, chat = load_vlm(folder)
        return SpatialVLM(vlm), chat, load_sight(folder, vlm.config.text_config.hidden_size)
    # the vocabulary: words of both kinds of questions; roles, repeated so that each is one token
    rooms = RoomQuestions('train', 0, 400)
    texts = [turn['value'].replace('<image>', '')
             for item in itertools.chain(RoomPictures('train', 0, 64), rooms)
             for turn in item['conversations']]
    texts += [*itertools.chain(*rooms.maps), *['system\n', 'user\n', 'assistant\n'] * 400]
    vlm, chat = build_vlm(build_tokenizer(texts, CATEGORIES + ANSWER_WORDS))
    return SpatialVLM(vlm), chat, Sight(vlm.config.text_config.hidden_size)


def make_batch(chat, config, step):
    """The batch of a step, of rooms that were never seen before, in four parts (Chat.batches)."""
    items = RoomPictures('train', config.seed * 10 ** 6 + step, config.batch)
    return chat.batches([(chat.encode(item), item) for item in items], 4)


def learn_to_read(vlm, chat, config, dtype, autocast):
    """Before any picture, the language model alone learns to read a list of options, one list a
    text. Beside pictures, with many questions a conversation, it would learn some by heart.
    -> loss of the last step"""
    language_model = vlm.get_decoder()
    plan = dataclasses.replace(config, steps=config.letter_steps)
    optimizers = make_optimizers(language_model, plan, vlm.device, dtype)
    for step in tqdm(range(plan.steps), 'learning to read', leave=False, disable=None):
        g = step_generator(config.seed, step, 13)
        items = []
        for record in [ask_letter(g) for _ in range(LISTS)]:
            turns = to_turns('', [(as_prompt(record), record['ground_truth'])])
            items.append(chat.encode(dict(images=[], conversations=turns)))
        batch = lean_batch(chat.batch(items), vlm, vlm.device)
        labels = batch.pop('labels')
        set_rates(optimizers, rate_share(step, plan))
        with autocast:
            loss = answer_loss(vlm(use_cache=False, **batch).logits, labels)
        loss.backward()
        take_step(optimizers, language_model.parameters(), config.clip)
    return loss.item()


def train(config, command):
    device = pick_device(config.device)
    state = read_state(config)
    dtype, reason = pick_dtype(state['dtype'], device)
    autocast = autocast_on(device, dtype)
    torch.manual_seed(config.seed)

    # model and data
    model, chat, sight = start(state['folder'])
    model.requires_grad_(True).to(device).train()
    attend_in_fp32(model.vlm, device)
    sight.to(device)
    kind = type(model.vlm.get_decoder().layers[0])
    compile_if_possible(model.vlm, kind, config.compile, device, tqdm.write)
    optimizers = make_optimizers(nn.ModuleList([model, sight]), config, device, dtype)
    if config.resume:
        load_optimizers(optimizers, state['folder'])
    held_out = RoomPictures('val', 0, config.val_scenes)
    category_of = token_categories(chat.tokenizer)
    count = sum(p.numel() for p in model.parameters()) / 1e6  # without Sight
    tqdm.write(f'mini VLM: {config.steps} steps, {count:.2f} M parameters | {device}, {dtype} '
               f'({reason}) | writing to {config.out}/')
    os.makedirs(config.out, exist_ok=True)  # an error now, not after minutes
    if config.letter_steps and not config.resume:
        loss = learn_to_read(model.vlm, chat, config, dtype, autocast)
        tqdm.write(f'{config.letter_steps} steps of {LISTS} lists of options | loss {loss:.4f}')
    batches = iter(torch.utils.data.DataLoader(
        range(state['step'], config.steps), batch_size=None,
        num_workers=min(config.workers, own_cores()),
        collate_fn=partial(make_batch, chat, config)))  # makes a step's batch out of its number

    def losses_of(step):
        losses = losses_on(model, next(batches), None, sight, category_of, autocast)
        return dict(losses, loss=sum(losses.values()))

    def evaluate():
        metrics = held_out_loss(model, chat, None, held_out, autocast)
        return metrics, f'held-out loss {metrics["loss"]:.4f}, right {metrics["accuracy"]:.3f}'

    def save(done, metrics):
        write = partial(save_mini_vlm, model.vlm, chat, sight, command=command, dtype=torch.float32)
        write_checkpoint(config.out, done, optimizers, config, dtype, metrics, write)

    parameters = [*model.parameters(), *sight.parameters()]
    metrics = fit('mini VLM', config, state, optimizers, parameters, losses_of, evaluate,
                  save)
    folder = os.path.join(config.out, 'mini_vlm')
    save_mini_vlm(model.vlm, chat, sight, folder, command)
    for kind, share in metrics['kinds'].items():
        tqdm.write(f'{kind:36s} {100 * share:5.1f} % right')
    tqdm.write(f'wrote {folder}/\nnext: python finetune.py --config small --vlm {folder}')
    return metrics


def main(argv=None):
    _, config = parse_options(argv, __doc__, Config, PRESETS, default='mini')
    train(config, command_of('mini_vlm.py', argv))


if __name__ == '__main__':
    run_script(main)
