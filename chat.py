"""
An open vision-language model, and how it reads conversations about pictures.

    vlm, chat = load_vlm('Qwen/Qwen2.5-VL-3B-Instruct')       # a folder, or a hub id
    batch = chat.batch([chat.encode(item) for item in items])

`Chat` lays conversations out as the VLM was trained to read them: its own chat template, and as
many placeholder tokens a picture as the picture has tokens. (transformers' own processors need
torchvision; tokenizer and image processor do not.)
"""
import functools
import re

import torch

from common import InputError, find_file, some


BREAK = '\ue001'      # where a text is cut before it becomes tokens


def as_text(text):
    """A text in which <image> is nothing but text."""
    return text.replace('<image>', f'<{BREAK}image>')


class Chat:
    """Conversations about pictures -> token ids, labels, pixels, for the Qwen2-VL family (2.5, 3).

    An item is a dict: `images`, a list of PIL images, and `conversations`, a list of {'from':
    'human' | 'gpt', 'value': text}, in which every <image> stands for the next of the images.
    The tokenizer's own chat template lays out the text. Every <image> becomes as many placeholder
    tokens as its picture has merged patches. `max_pixels`: larger pictures are scaled down.
    """
    SYSTEM = 'You are a helpful assistant.'

    def __init__(self, tokenizer, image_processor, max_pixels=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id = tokenizer.convert_tokens_to_ids('<|image_pad|>')
        special = [token.content for token in tokenizer.added_tokens_decoder.values()
                   if token.special]
        self.special = re.compile('|'.join(map(re.escape, special)) or '(?!)')
        self.sizes, own = {}, image_processor.size  # its "edges" are numbers of pixels
        if max_pixels and max_pixels < own['longest_edge']:
            edges = dict(shortest_edge=min(max_pixels, own['shortest_edge']),
                         longest_edge=max_pixels)
            self.sizes = dict(size=edges)

    def text(self, turns, **options):
        """[(role, text with <image>)] -> the chat template's text, the system prompt in front."""
        messages = [dict(role='system', content=[dict(type='text', text=self.SYSTEM)])]
        for role, text in turns:
            content = []
            for part in re.split('(<image>)', text):
                if part == '<image>':
                    content.append(dict(type='image'))
                elif part:
                    content.append(dict(type='text', text=part))
            messages.append(dict(role=role, content=content))
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    @functools.lru_cache(maxsize=1024)
    def layout(self, shape):
        """The chat template's text around the texts of a conversation (cached: templates are slow).

        `shape`: per turn, (role, k), where its images split its text into k parts. -> per turn, the
        k + 1 pieces that go around those k parts. A question's last piece ends where its answer
        begins, so that no token straddles the two.
        """
        mark, chunks, done = '\ue000', [], ''
        turns = [(role, '<image>'.join([mark] * parts)) for role, parts in shape]
        for i, (role, _) in enumerate(turns):
            upto = self.text(turns[:i + 1], add_generation_prompt=role == 'user')
            if not upto.startswith(done):
                raise InputError('the chat template of this VLM rewrites earlier turns: only '
                                 'templates that append can be trained on')
            chunks.append(upto[len(done):].split(mark))
            done = upto
        return chunks

    def tokens(self, text):
        """Token ids of a text; at a BREAK it is cut, and its parts do not know each other."""
        parts = self.tokenizer(text.split(BREAK), add_special_tokens=False).input_ids
        return [token for part in parts for token in part]

    def plain(self, text):
        """A text that is nothing but text: a special token's name in it is cut in two."""
        text = text.encode('utf-8', 'replace').decode()  # half characters become question marks
        return self.special.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)

    def encode(self, item):
        """-> dict of input_ids and labels (lists; -100 where not an answer), pixel_values,
        image_grid_thw. A conversation that ends with a question waits for its answer.
        """
        # the text
        turns = []
        for turn in item['conversations']:
            role = 'user' if turn['from'] == 'human' else 'assistant'
            turns.append((role, turn['value'].split('<image>')))
        layout = self.layout(tuple((role, len(texts)) for role, texts in turns))
        ids, labels = [], []
        for (role, texts), pieces in zip(turns, layout):
            texts = [*map(self.plain, texts), '']
            new = self.tokens(''.join(piece + text for piece, text in zip(pieces, texts)))
            ids += new
            end = 0
            if role == 'assistant':  # learned up to the end-of-turn token; the rest is template
                end = len(new) - new[::-1].index(self.tokenizer.eos_token_id)
            labels += new[:end] + [-100] * (len(new) - end)
        if not item['images']:
            return dict(input_ids=ids, labels=labels)
        # the pictures: every placeholder is repeated, once a merged patch
        pixels = self.image_processor(images=item['images'], return_tensors='pt', **self.sizes)
        merged = self.image_processor.merge_size ** 2
        counts = (pixels['image_grid_thw'].prod(-1) // merged).tolist()
        if ids.count(self.image_token_id) != len(counts):
            raise InputError(f'{ids.count(self.image_token_id)} <image> tokens '
                             f'for {len(counts)} images')
        all_ids, all_labels, counts = [], [], iter(counts)
        for token, label in zip(ids, labels):
            times = next(counts) if token == self.image_token_id else 1
            all_ids += [token] * times
            all_labels += [label] * times
        return dict(input_ids=all_ids, labels=all_labels, **pixels)

    def batch(self, items, left=False):
        """Encoded items -> tensors, padded on the right, or on the `left` for generation."""
        longest = max(len(item['input_ids']) for item in items)

        def pad(row, value):
            padding = [value] * (longest - len(row))
            return padding + row if left else row + padding

        ids = [pad(item['input_ids'], self.tokenizer.pad_token_id) for item in items]
        ids = torch.tensor(ids)  # (B, T)
        labels = torch.tensor([pad(item['labels'], -100) for item in items])
        mask = torch.tensor([pad([1] * len(item['input_ids']), 0) for item in items])
        batch = dict(input_ids=ids, labels=labels, attention_mask=mask,
                     mm_token_type_ids=(ids == self.image_token_id).int())
        for name in ('pixel_values', 'image_grid_thw'):
            parts = [item[name] for item in items if name in item]
            if parts:
                batch[name] = torch.cat(parts)
        return batch

    def save_pretrained(self, folder):
        for part in (self.tokenizer, self.image_processor):
            part.save_pretrained(folder)


def load_vlm(source, dtype=torch.float32, max_pixels=None, leave=()):
    """A folder or a hub id of transformers -> (vlm, Chat). Strict.

    Unexpected weights whose names contain one of `leave` are ignored; lm_head may be tied.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.utils.logging import disable_progress_bar
    source = find_file(source)
    disable_progress_bar()
    try:
        vlm, report = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f'no VLM at {source}: {str(error).strip().splitlines()[0]}') from error
    missing = [name for name in report['missing_keys'] if not name.startswith('lm_head')]
    strange = [name for name in report['unexpected_keys']
               if not any(part in name for part in leave)]
    if missing or strange:
        raise InputError(f'{source} is not a whole {type(vlm).__name__}: missing {some(missing)}, '
                         f'unexpected {some(strange)}')
    if not vlm.config.model_type.startswith(('qwen2', 'qwen3')):
        raise InputError(f'{source} is a {type(vlm).__name__}, whose pictures Chat cannot lay out: '
                         'it supports the Qwen2-VL family (Qwen2.5-VL, Qwen3-VL)')
    return vlm, Chat(tokenizer, image_processor, max_pixels)


def to_device(batch, vlm, device):
    """A batch for training, on `device`. Two things save time: positions are computed here, where
    transformers would do it sample by sample on the GPU; and the mask goes, because padding comes
    last, where causal attention does not look, and there are faster kernels without a mask.
    """
    if 'image_grid_thw' in batch:
        names = ('input_ids', 'mm_token_type_ids', 'image_grid_thw', 'attention_mask')
        batch['position_ids'], _ = vlm.model.get_rope_index(**{name: batch[name] for name in names})
    return {name: x.to(device) for name, x in batch.items() if name != 'attention_mask'}
