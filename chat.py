"""
An open vision-language model, and how it reads conversations about pictures.

    vlm, chat = load_vlm('Qwen/Qwen2.5-VL-3B-Instruct')       # a folder, or a hub id
    batch = chat.batch([chat.encode(item) for item in items])

`Chat` lays conversations out as the VLM was trained to read them: its own chat template, and in
the place of a picture what the VLM's own processor class of transformers puts there: as many
placeholder tokens as the picture (or all its tiles) will have, and what belongs around them.

B samples    T tokens of a sample    K places where an answer may stand    h width of the VLM
"""
import contextlib
import functools
import importlib
import math
import os
import re
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from common import InputError, find_file, first_line, is_hub_id, some, write_json

HOLE = '\ue000'       # where a text goes in a template
BREAK = '\ue001'      # where a text is cut before it becomes tokens
EDGE = '\ue002'       # before and after what stands for a picture


class Family(NamedTuple):
    """A kind of VLM: the names of its classes in transformers, and what these leave open."""
    image_processor: tuple  # module and class; in PIL's form, which needs no torchvision
    processor: str         # whose replace_image_token tells what stands for a picture
    system: str = ''       # the system prompt
    tile_argument: str = ''  # the processor's argument for the number of tokens of a tile


QWEN = ('qwen2_vl', 'Qwen2VLImageProcessorPil')
ASSISTANT = 'You are a helpful assistant.'
FAMILIES = {  # by the model_type in config.json
    'qwen2_vl': Family(QWEN, 'Qwen2VLProcessor', ASSISTANT),
    'qwen2_5_vl': Family(QWEN, 'Qwen2_5_VLProcessor', ASSISTANT),
    'qwen3_vl': Family(QWEN, 'Qwen3VLProcessor'),
    'internvl': Family(('got_ocr2', 'GotOcr2ImageProcessorPil'), 'InternVLProcessor',
                       tile_argument='image_seq_length'),
    # SmolVLM lays pictures out as Idefics 3 does; its own class asks for num2words, for videos
    'smolvlm': Family(('smolvlm', 'SmolVLMImageProcessorPil'), 'Idefics3Processor',
                      tile_argument='image_seq_len'),
}
NAMES = 'Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM'


def tokens_of_tile(config):
    """How many tokens a tile of a picture becomes, of VLMs whose tiles are all of one size."""
    if config.model_type == 'internvl':
        return config.image_seq_length
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side ** 2 // config.scale_factor ** 2


def load_image_processor(config, source):
    """The image processor in a folder, or on the hub, for a VLM with this configuration."""
    module, name = FAMILIES[config.model_type].image_processor
    module = importlib.import_module(f'transformers.models.{module}.image_processing_pil_{module}')
    return getattr(module, name).from_pretrained(source)


def make_processor(config, tokenizer, image_processor):
    """The VLM's own processor class, without its part for videos, which needs torchvision."""
    import transformers
    family = FAMILIES[config.model_type]
    processor = getattr(transformers, family.processor)
    without_check = dict(check_argument_for_proper_class=lambda *_: None)
    processor = type(processor.__name__, (processor,), without_check)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    parts = dict(image_processor=image_processor, tokenizer=tokenizer)
    if 'video_processor' in processor.get_attributes():
        parts['video_processor'] = None
    if family.tile_argument:
        parts[family.tile_argument] = tokens_of_tile(config)
    return processor(**parts)


def fewer_pixels(config, image_processor, max_pixels):
    """Options of an image processor that keep a picture within `max_pixels`; None: its own limit.

    A picture that is cut into tiles gets as many as fit in, and at least one. The whole picture,
    which is shown beside several tiles, is not counted.
    """
    if config.model_type == 'internvl':
        side = image_processor.size['height']
        tiles = image_processor.max_patches
        if max_pixels:
            tiles = min(tiles, max(1, max_pixels // side ** 2))
        return dict(crop_to_patches=True, max_patches=tiles)
    if config.model_type == 'smolvlm':
        side = image_processor.max_image_size['longest_edge']
        edge = image_processor.size['longest_edge']
        if max_pixels:
            edge = min(edge, side * max(1, math.isqrt(max_pixels) // side))
        return dict(size=dict(longest_edge=edge), return_row_col_info=True)
    own = image_processor.size    # Qwen2-VL's "edges" are numbers of pixels
    if not max_pixels or max_pixels >= own['longest_edge']:
        return {}
    return dict(size=dict(shortest_edge=min(max_pixels, own['shortest_edge']),
                          longest_edge=max_pixels))


def as_text(text):
    """A text in which <image> is nothing but text."""
    return text.replace('<image>', f'<{BREAK}image>')


class Chat:
    """Conversations about pictures -> token ids, labels, pixels, for the VLMs of FAMILIES.

    An item is a dict: `images`, a list of PIL images, and `conversations`, a list of {'from':
    'human' | 'gpt', 'value': text}, in which every <image> stands for the next of the images.
    The tokenizer's own chat template lays out the text. `config`: of the VLM. `max_pixels`:
    larger pictures are scaled down.
    """

    def __init__(self, config, tokenizer, image_processor, max_pixels=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.made_of = config, tokenizer, image_processor, max_pixels
        self.processor = make_processor(config, tokenizer, image_processor)
        self.image_token = self.processor.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.family = FAMILIES[config.model_type]
        self.has_token_types = config.model_type.startswith('qwen')  # for the positions
        special = [token.content for token in tokenizer.added_tokens_decoder.values()
                   if token.special]
        self.special = re.compile('|'.join(map(re.escape, special)) or '(?!)')
        self.options = fewer_pixels(config, image_processor, max_pixels)

    def __reduce__(self):
        """For worker processes: the processor's class is made here and cannot be sent."""
        return Chat, self.made_of

    @functools.cached_property
    def ending(self):
        """What the chat template puts after an answer."""
        return self.layout((('user', (True,)), ('assistant', (True,))))[-1][-1]

    @functools.cached_property
    def end_of_turn(self):
        """The token that ends an answer: the first that the chat template puts after it."""
        end = self.tokens(self.ending)
        if not end:
            raise InputError('the chat template of this VLM puts nothing after an answer: it would '
                             'never learn to end one')
        return end[0]

    def text(self, turns, add_generation_prompt):
        """[(role, text with <image>)] -> the chat template's text, the system prompt in front."""
        from jinja2 import TemplateError
        messages = []
        if self.family.system:
            content = [dict(type='text', text=self.family.system)]
            messages.append(dict(role='system', content=content))
        for role, text in turns:
            content = []
            for part in re.split('(<image>)', text):
                if part == '<image>':
                    content.append(dict(type='image'))
                elif part:
                    content.append(dict(type='text', text=part))
            messages.append(dict(role=role, content=content or [dict(type='text', text='')]))
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except (TemplateError, TypeError) as error:
            raise InputError(f'the chat template of this VLM cannot lay out a conversation '
                             f'({first_line(error)})') from error

    @functools.lru_cache(maxsize=1024)
    def layout(self, shape):
        """The chat template's text around the texts of a conversation (cached: templates are slow).

        `shape`: for each turn (role, flags), a flag for each text between its images: is there
        any? -> for each turn the k + 1 pieces that go around its k texts. A question's last piece
        ends where its answer begins, so that no token straddles the two.
        """
        chunks, done = [], ''
        turns = [(role, '<image>'.join(HOLE if is_text else '' for is_text in parts))
                 for role, parts in shape]
        for i, (role, _) in enumerate(turns):
            upto = self.text(turns[:i + 1], add_generation_prompt=role == 'user')
            if not upto.startswith(done):
                raise InputError('the chat template of this VLM rewrites earlier turns: only '
                                 'templates that append can be trained on')
            chunks.append(upto[len(done):].split(HOLE))
            done = upto
        return chunks

    def tokens(self, text):
        """Token ids of a text; cut at every BREAK, and each part becomes tokens on its own."""
        parts = self.tokenizer(text.split(BREAK), add_special_tokens=False).input_ids
        return [token for part in parts for token in part]

    def plain(self, text):
        """A text that is nothing but text: a special token's name in it is cut in two."""
        text = text.encode('utf-8', 'replace').decode()  # half characters become question marks
        text = text.replace(EDGE, '')
        return self.special.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)

    def look(self, images):
        """PIL images -> pixels as the VLM takes them, and per image the text in its place."""
        if not images:
            return {}, []
        pixels = self.image_processor(images=images, return_tensors='pt', **self.options)
        texts = [self.processor.replace_image_token(pixels, i) for i in range(len(images))]
        names = ('pixel_values', 'image_grid_thw')
        return {name: pixels[name] for name in names if name in pixels}, texts

    def encode(self, item, looked=None):
        """-> dict of input_ids and labels (lists; -100 where not an answer), and the pixels.

        A conversation that ends with a question waits for its answer. `looked`: what `look` says
        of the images, if it is known.
        """
        pixels, seen = looked or self.look(item['images'])

        turns = []
        for turn in item['conversations']:
            role = 'user' if turn['from'] == 'human' else 'assistant'
            turns.append((role, turn['value'].split('<image>')))
        places = sum(len(texts) - 1 for _, texts in turns)
        if places != len(seen):
            raise InputError(f'{places} <image> tokens for {len(seen)} images')

        layout = self.layout(tuple((role, tuple(map(bool, texts))) for role, texts in turns))
        found = sum(piece.count(self.image_token) for pieces in layout for piece in pieces)
        if found != places:
            raise InputError(f'the chat template of this VLM puts {found} {self.image_token} for '
                             f'{places} images')
        seen = iter(seen)
        ids, labels = [], []
        for (role, texts), pieces in zip(turns, layout):
            if role == 'assistant':   # of an answer, no template around a picture is learned
                ending = self.ending if pieces[-1].endswith(self.ending) else ''
                pieces = [*pieces[:-1], pieces[-1].removesuffix(ending)]
                pieces = [f'{EDGE}{piece}{EDGE}' if self.image_token in piece else piece
                          for piece in pieces]
                pieces[-1] += ending
            pieces = [re.sub(re.escape(self.image_token), lambda _: next(seen), piece)
                      for piece in pieces]
            texts = [self.plain(text) for text in texts if text]
            text = ''.join(piece + text for piece, text in zip(pieces, [*texts, '']))
            for i, part in enumerate(text.split(EDGE)):
                new = self.tokens(part)
                is_learned = role == 'assistant' and i % 2 == 0  # the answer, not its pictures
                ids += new
                labels += new if is_learned else [-100] * len(new)
            if role == 'assistant':           # what follows the end-of-turn token is template
                after = ids[::-1].index(self.end_of_turn)
                labels[len(labels) - after:] = [-100] * after
        return dict(input_ids=ids, labels=labels, **pixels)

    def batch(self, items, left=False):
        """Encoded items -> tensors, padded on the right to a multiple of 32, or for generation on
        the `left` to the longest."""
        longest = max(len(item['input_ids']) for item in items)
        if not left:  # few different lengths, so that compiled code and plans are reused
            longest = math.ceil(longest / 32) * 32

        def pad(row, value):
            padding = [value] * (longest - len(row))
            return padding + row if left else row + padding

        ids = [pad(item['input_ids'], self.tokenizer.pad_token_id) for item in items]
        ids = torch.tensor(ids)  # (B, T)
        labels = torch.tensor([pad(item['labels'], -100) for item in items])
        mask = torch.tensor([pad([1] * len(item['input_ids']), 0) for item in items])
        batch = dict(input_ids=ids, labels=labels, attention_mask=mask)
        if self.has_token_types:
            batch['mm_token_type_ids'] = (ids == self.image_token_id).int()
        for name in ('pixel_values', 'image_grid_thw'):
            parts = [item[name] for item in items if name in item]
            if parts:  # tiles of SmolVLM: (1, tiles, 3, H, W)
                batch[name] = torch.cat(parts, dim=1 if parts[0].ndim == 5 else 0)
        return batch

    def batches(self, samples, parts):
        """[(encoded, item)] -> `parts` tuples (batch, items, share of the answers' tokens), short
        samples first: less is padding, and attention's cost is quadratic."""
        samples = sorted(samples, key=lambda sample: len(sample[0]['input_ids']))
        split = []
        for numbers in np.array_split(range(len(samples)), parts):
            encoded, items = zip(*[samples[i] for i in numbers])
            split.append((self.batch(encoded), list(items)))
        answers = [(batch['labels'] != -100).sum().item() for batch, _ in split]
        return [(*part, count / max(1, sum(answers))) for part, count in zip(split, answers)]

    def save_pretrained(self, folder):
        for part in (self.tokenizer, self.image_processor):
            part.save_pretrained(folder)
        name = self.family.tile_argument
        if name:                      # what transformers' own processor would not know otherwise
            settings = {name: getattr(self.processor, name)}
            write_json(os.path.join(folder, 'processor_config.json'), settings)


def stamp_of(vlm):
    """Eight hex digits that tell VLMs apart: of a part of the word embeddings and of the last
    block, as bf16 numbers, so that a cast changes nothing."""
    stamp = 0
    for x in (vlm.get_input_embeddings().weight, *vlm.get_decoder().layers[-1].parameters()):
        numbers = x.detach().flatten()[:4096].to(torch.bfloat16).view(torch.int16)
        stamp = zlib.crc32(numbers.numpy().data, stamp)
    return f'{stamp:08x}'


def load_vlm(source, dtype=torch.float32, max_pixels=None, leave=(), stamp=None):
    """A folder or a hub id of transformers -> (vlm, Chat). Strict.

    Unexpected weights whose names contain one of `leave` are ignored; lm_head may be tied.
    `stamp`: of the VLM that a run was trained on. A VLM with another one is refused.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    source = find_file(source)
    if not os.path.isdir(source) and not is_hub_id(source):
        raise InputError(f'no VLM at {source}')
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in FAMILIES:
            raise InputError(f'{source} is a {config.model_type}, whose pictures Chat cannot lay '
                             f'out: it knows {NAMES}')
        vlm, report = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
        image_processor = load_image_processor(config, source)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f'no VLM at {source}: {first_line(error)}') from error
    missing = [name for name in report['missing_keys'] if not name.startswith('lm_head')]
    strange = [name for name in report['unexpected_keys']
               if not any(part in name for part in leave)]
    if missing or strange:
        raise InputError(f'{source} is not a whole {type(vlm).__name__}: missing {some(missing)}, '
                         f'unexpected {some(strange)}')
    vlm.stamp = stamp_of(vlm)
    if stamp not in (None, vlm.stamp):
        raise InputError(f'{source} holds another VLM now than the one that this run was trained '
                         'on: what was trained means nothing to it, fine-tune anew')
    if tokenizer.chat_template is None:  # older folders keep it beside the processor's settings
        processor = getattr(transformers, FAMILIES[config.model_type].processor)
        tokenizer.chat_template = processor.get_processor_dict(source)[0].get('chat_template')
    if not tokenizer.chat_template:
        raise InputError(f'{source} has no chat template: it was never taught to converse')
    try:
        return vlm, Chat(config, tokenizer, image_processor, max_pixels)
    except AttributeError as error:   # a special token that its processor asks for
        raise InputError(f'{source}: its tokenizer is not that of a {config.model_type} ({error})'
                         ) from error


def attend_in_fp32(vlm, device):
    """Lets a VLM on a CPU attend in fp32 under autocast too, where bf16's fused backward is several
    times slower. In place; nothing changes in fp32, or on a GPU."""
    if device.type != 'cpu':
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module, q, k, v, *args, **kwargs):
        with torch.autocast(q.device.type, enabled=False):  # it would cast them back
            q32, k32, v32 = q.float(), k.float(), v.float()
            out, weights = sdpa_attention_forward(module, q32, k32, v32, *args, **kwargs)
        return out.to(q.dtype), weights

    AttentionInterface.register('sdpa_fp32', attend)
    AttentionMaskInterface.register('sdpa_fp32', sdpa_mask)
    vlm.set_attn_implementation('sdpa_fp32')


@contextlib.contextmanager
def states_kept(vlm):
    """A list of what leaves every block of the language model in this context, (B, T, h)."""
    states = []  # (transformers' output_hidden_states leaves graph breaks in compiled blocks)
    hooks = [block.register_forward_hook(lambda block, inputs, state: states.append(state))
             for block in vlm.get_decoder().layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def lean_batch(batch, vlm, device):
    """A batch of Chat.batch -> what the VLM's forward takes, on `device`, and `labels`. Pop these
    before: they are shifted here, and transformers would shift them again.

    labels (B, K): the next token at the K places where some sample has an answer's, or -100.
    Logits are computed at these places alone (over a vocabulary of 150,000 they are gigabytes).
    Positions are computed here: transformers would do it sample by sample, on the GPU. No mask:
    padding comes last, where causal attention does not look, and kernels are faster without.
    """
    batch = dict(batch)
    if 'labels' in batch:
        following = batch['labels'][:, 1:]
        places = (following != -100).any(0).nonzero()[:, 0]
        batch.update(logits_to_keep=places, labels=following[:, places])
    if 'image_grid_thw' in batch:
        names = ('input_ids', 'mm_token_type_ids', 'image_grid_thw', 'attention_mask')
        batch['position_ids'], _ = vlm.model.get_rope_index(**{name: batch[name] for name in names})
    return {name: x.to(device) for name, x in batch.items() if name != 'attention_mask'}


def answer_loss(logits, labels):
    """Cross entropy over the answers' tokens: logits (B, K, vocabulary) of the places before them,
    labels (B, K), -100 where there is none."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
