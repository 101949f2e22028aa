"""
Spa3-VLM: the latents of a scene reach an open vision-language model (Spa3R, arXiv 2602.21186, section on Spa3-VLM).

A VLM turns every picture into tokens and reads them one after the other; it holds no
scene. Before the language model sees the image tokens, each asks the scene's latents
z by cross-attention, and what comes back is added through a gate:

    g = MLP(z)                                  latents, at the VLM's width
    a = LayerNorm(attention(q=x, k=g, v=g))     x: the image tokens of one sample
    x + MLP(a) * sigmoid(Linear(a))             the last layer starts at zero: at step 0 the VLM is itself

No model file is copied: every image-text model of transformers 5 computes its image
tokens in one method, `get_image_features`; `SpatialVLM` stands behind that method.

    n image tokens of a sample   h width of the VLM   L latents of a scene, D their width
"""
import collections
import functools
import glob
import hashlib
import json
import os
import re
import tempfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import fit_picture
from model import MLP, InputError, load_strictly, read_weights
from psfm import build_psfm, load_psfm

LATENTS = ('psfm', 'none', 'random', 'backbone')      # what a VLM can be given; see SceneLatents


class CrossAttention(nn.Module):
    """Queries from x, keys and values from g, LayerNorm on every head's queries and keys."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(dim // num_heads), nn.LayerNorm(dim // num_heads)

    def forward(self, x, g):
        """x (n, h), g (L, h) -> (n, h)"""
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for y in (self.q_proj(x), self.k_proj(g), self.v_proj(g)))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)                     # (nh, n or L, d)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self.proj(out.transpose(0, 1).flatten(1))


class Adapter(nn.Module):
    """Residual gated cross-attention from the image tokens of one sample to the latents of its scene."""

    def __init__(self, latent_width, hidden_size, num_heads):
        super().__init__()
        self.projector = MLP(latent_width, hidden_size, hidden_size)
        self.attention = CrossAttention(hidden_size, num_heads)
        self.norm = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, hidden_size // 4, hidden_size)
        self.gate = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.mlp.fc2.weight)
        nn.init.zeros_(self.mlp.fc2.bias)

    def forward(self, x, z):
        """x (n, h), z (L, D) -> (n, h), in the dtype of x."""
        a = self.norm(self.attention(x.to(self.gate.weight.dtype), self.projector(z)))
        return x + (self.mlp(a) * self.gate(a).sigmoid()).to(x.dtype)


# the release's names, in a Spa3-VLM checkpoint, and ours
RELEASED_NAMES = {'geometry_projector.0': 'projector.fc1', 'geometry_projector.2': 'projector.fc2', 'geom_cross_attention': 'attention',
                  'ln': 'norm', 'geometry_adaptor.0': 'mlp.fc1', 'geometry_adaptor.2': 'mlp.fc2', 'geometry_gate.0': 'gate'}


def from_release(state):
    """Adapter weights under the release's names (or with a prefix before them) -> under ours. Other names are dropped."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in RELEASED_NAMES.items():
            found = re.fullmatch(rf'(?:.*\.)?{re.escape(theirs)}\.(.+)', name)
            if found and 'visual.' not in name and 'layers.' not in name:
                renamed[f'{ours}.{found[1]}'] = tensor
    return renamed


# -----------------------------------------------------------------------------
# the VLM

class SpatialVLM(nn.Module):
    """Any image-text-to-text model of transformers 5, and an adapter behind its `get_image_features`.

    `vlm` as transformers gives it; `adapter` None: the plain VLM. `latents`: one (L, D) tensor a sample of the batch, or None
    for a sample without any. Which image tokens are a sample's own follows from its placeholder tokens, so a batch may
    hold any number of images a sample, none included.
    """

    def __init__(self, vlm, adapter=None):
        super().__init__()
        self.vlm, self.adapter = vlm, adapter
        self.latents = self.counts = None                     # of the forward under way
        self.image_tokens = None                              # of the last one, as the language model read them: (all image tokens of the batch, h)
        plain = vlm.model.get_image_features

        @functools.wraps(plain)                               # transformers reads its signature
        def get_image_features(*args, **kwargs):
            outputs = plain(*args, **kwargs)
            tokens = outputs.pooler_output                    # (images, n, h), or a list of (n, h)
            is_tensor = torch.is_tensor(tokens)
            rows = tokens.flatten(0, -2) if is_tensor else torch.cat(list(tokens))
            if self.latents is not None:
                rows = self.fuse(rows)
                outputs.pooler_output = rows.view(tokens.shape) if is_tensor else rows.split([len(part) for part in tokens])
            self.image_tokens = rows
            return outputs
        vlm.model.get_image_features = get_image_features

    def fuse(self, rows):
        """The VLM's own image tokens (all of the batch, h), each sample's fused with its own latents. The VLM calls for them once, at prefill."""
        if len(rows) != sum(self.counts):
            raise InputError(f'{len(rows)} image tokens for {sum(self.counts)} placeholders: with latents, one sequence a sample and all its images')
        return torch.cat([self.adapter(x, z.to(x.device, self.adapter.gate.weight.dtype)) if z is not None and len(x) else x
                          for x, z in zip(rows.split(self.counts), self.latents)])

    def hold(self, input_ids, latents):
        """Remembers for the call under way whose tokens are whose."""
        if latents is None or self.adapter is None:
            self.latents = self.counts = None
            return
        if len(latents) != len(input_ids):
            raise InputError(f'latents of {len(latents)} samples for a batch of {len(input_ids)}')
        config = self.vlm.config
        token = getattr(config, 'image_token_id', None) or getattr(config, 'image_token_index')
        self.latents, self.counts = latents, (input_ids == token).sum(1).tolist()

    def forward(self, input_ids, latents=None, **inputs):
        """As the VLM's own forward, with `latents`."""
        self.hold(input_ids, latents)
        try:
            outputs = self.vlm(input_ids=input_ids, **inputs)
        finally:
            self.hold(input_ids, None)
        if self.training and self.adapter is not None:
            # a batch without pictures leaves the adapter out: a gradient of zero all the same, which backward and DDP wait for
            outputs.logits = outputs.logits + 0 * sum(p.sum() for p in self.adapter.parameters())
        return outputs

    @torch.no_grad()
    def generate(self, input_ids, latents=None, **inputs):
        """As the VLM's own generate, with `latents`; they are fused into the cache at prefill."""
        self.hold(input_ids, latents)
        try:
            return self.vlm.generate(input_ids=input_ids, **inputs)
        finally:
            self.hold(input_ids, None)

    def trainable(self, what):
        """Freezes all but `what`: 'adapter', 'adapter+llm', or 'lora' (adapter and low-rank updates). The vision tower and its projector are always frozen (the paper)."""
        self.requires_grad_(False)
        if self.adapter is not None:
            self.adapter.requires_grad_(True)
        if what == 'adapter+llm':
            self.vlm.model.language_model.requires_grad_(True)
            self.vlm.get_output_embeddings().requires_grad_(True)
        for name, p in self.vlm.named_parameters():
            p.requires_grad_(p.requires_grad or what == 'lora' and '.lora_' in name)
        return self


# -----------------------------------------------------------------------------
# pictures and words -> what the VLM reads. transformers' own processors ask for torchvision (for videos), so this takes
# the two parts that do not: the tokenizer, and the image processor in its PIL form.

class Chat:
    """Conversations about pictures -> token ids, labels and pixels, for VLMs of the Qwen2-VL kind (2.5, 3).

    The text is laid out by the tokenizer's own chat template; every <image> becomes as many placeholder tokens as the
    picture has patches after merging. `max_pixels`: pictures are scaled down to it, in steps of the merged patch.
    """
    SYSTEM = 'You are a helpful assistant.'

    def __init__(self, tokenizer, image_processor, image_token_id, max_pixels=None):
        self.tokenizer, self.image_processor, self.image_token_id = tokenizer, image_processor, image_token_id
        self.sizes = {}
        if max_pixels:
            self.sizes = dict(size=dict(shortest_edge=min(max_pixels, 56 * 56), longest_edge=max_pixels))

    def text(self, turns, **options):
        """[(role, text with <image>)] -> the chat template's text; the system prompt in front."""
        messages = [dict(role='system', content=[dict(type='text', text=self.SYSTEM)])]
        for role, text in turns:
            content = []
            for i, part in enumerate(text.split('<image>')):
                content += [dict(type='image')] * (i > 0) + [dict(type='text', text=part)] * bool(part)
            messages.append(dict(role=role, content=content))
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    @functools.lru_cache(maxsize=1024)
    def layout(self, shape):
        """What the chat template puts around the texts of a conversation. shape: of every turn its role, and how many texts its images part it into.

        -> of every turn, the pieces before, between and behind its texts; a question's last ends where its answer begins, so that tokens never straddle the two.
        """
        mark, chunks, done = '\ue000', [], ''
        turns = [(role, '<image>'.join([mark] * parts)) for role, parts in shape]
        for i, (role, _) in enumerate(turns):
            upto = self.text(turns[:i + 1], add_generation_prompt=role == 'user')
            if not upto.startswith(done):
                raise InputError('the chat template of this VLM rewrites earlier turns: only templates that append can be trained on')
            chunks.append(upto[len(done):].split(mark))
            done = upto
        return chunks

    def encode(self, item):
        """An item of data (images, conversations) -> dict of input_ids, labels (-100 wherever not an answer), pixel_values, image_grid_thw.

        A conversation that ends with a question is laid out for its answer to be generated.
        """
        turns = [('user' if turn['from'] == 'human' else 'assistant', turn['value'].split('<image>')) for turn in item['conversations']]
        ids, labels = [], []
        for (role, texts), chunk in zip(turns, self.layout(tuple((role, len(texts)) for role, texts in turns))):
            text = ''.join(piece + text for piece, text in zip(chunk, [*texts, '']))
            new = self.tokenizer(text, add_special_tokens=False).input_ids
            ids += new
            if role == 'assistant':
                end = max(j for j, token in enumerate(new) if token == self.tokenizer.eos_token_id) + 1
                labels += new[:end] + [-100] * (len(new) - end)                           # what follows the end of the turn is not the answer's
            else:
                labels += [-100] * len(new)
        encoded = {}
        if item['images']:
            encoded = dict(self.image_processor(images=item['images'], return_tensors='pt', **self.sizes))
            counts = (encoded['image_grid_thw'].prod(-1) // self.image_processor.merge_size ** 2).tolist()
            if ids.count(self.image_token_id) != len(counts):
                raise InputError(f'{ids.count(self.image_token_id)} <image> tokens for {len(counts)} images')
            counts = iter(counts)
            pairs = [(token, label) for token, label in zip(ids, labels)
                     for _ in range(next(counts) if token == self.image_token_id else 1)]
            ids, labels = [list(x) for x in zip(*pairs)]
        return dict(input_ids=ids, labels=labels, **encoded)

    def batch(self, items, left=False, device='cpu'):
        """Encoded items -> tensors for the VLM's forward, padded at the right, or at the `left` to be continued."""
        longest = max(len(item['input_ids']) for item in items)
        pad = lambda x, value: [value] * (longest - len(x)) + x if left else x + [value] * (longest - len(x))
        ids = torch.tensor([pad(item['input_ids'], self.tokenizer.pad_token_id) for item in items])
        batch = dict(input_ids=ids, labels=torch.tensor([pad(item['labels'], -100) for item in items]),
                     attention_mask=torch.tensor([pad([1] * len(item['input_ids']), 0) for item in items]),
                     mm_token_type_ids=(ids == self.image_token_id).int())
        for name in ('pixel_values', 'image_grid_thw'):
            parts = [item[name] for item in items if name in item]
            if parts:
                batch[name] = torch.cat(parts)
        return {name: x.to(device) for name, x in batch.items()}

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def load_vlm(source, dtype=torch.float32, max_pixels=None):
    """A folder or a hub id of transformers, or a mini VLM in one .safetensors file -> (vlm, Chat)."""
    from transformers import AutoModelForImageTextToText
    if str(source).endswith('.safetensors'):
        return load_mini_vlm(source)
    try:
        return chat_of(AutoModelForImageTextToText.from_pretrained(source, dtype=dtype), source, max_pixels)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f'no VLM at {source}: {str(error).strip().splitlines()[0]}') from error


def chat_of(vlm, source, max_pixels=None):
    """-> (vlm, the Chat that lays conversations out for it)"""
    from transformers import AutoImageProcessor, AutoTokenizer
    tokenizer, image_processor = AutoTokenizer.from_pretrained(source), AutoImageProcessor.from_pretrained(source, backend='pil')
    if not hasattr(image_processor, 'merge_size'):
        raise InputError(f'{source} is a {type(vlm).__name__}, whose pictures Chat cannot lay out: it speaks to the Qwen2-VL kind (Qwen2.5-VL, Qwen3-VL)')
    return vlm, Chat(tokenizer, image_processor, vlm.config.image_token_id, max_pixels)


# -----------------------------------------------------------------------------
# the mini VLM: a real Qwen2.5-VL, with small numbers and a vocabulary of whole words

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>', '<|unk|>']
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
                 "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
                 "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(texts, content, frequent=20):
    """A tokenizer of words, digits and signs, in which stock phrases are one token each. -> JSON of the tokenizers library

    Questions are made from templates: whatever stands between two words that carry the meaning (those of `content`, and
    digits) again and again, `frequent` times in `texts`, becomes one token. That makes them several times shorter.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    meaning = re.compile(rf' ?\b(?:{"|".join(content)})\b|[0-9]|\n[A-D]\. ')
    pieces = collections.Counter(piece for text in texts for piece in meaning.split(text))
    phrases = sorted((piece for piece, count in pieces.items() if count >= frequent and len(piece) > 1), key=len, reverse=True)
    split = pre_tokenizers.Split(Regex('|'.join([*map(re.escape, phrases), meaning.pattern, r' ?[A-Za-z]+|\s|.'])), behavior='isolated')
    texts = [*texts, '0123456789.', 'system\n', 'user\n', 'assistant\n', '\n', Chat.SYSTEM, *content, *(f' {word}' for word in content), 'A', 'B', 'C', 'D']
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token='<|unk|>'))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    return tokenizer.to_str()


def mini_vlm(tokenizer_json, width=128, depth=6, heads=4):
    """-> (an untrained Qwen2_5_VLForConditionalGeneration of a few million parameters, Chat), for pictures of 64 x 64 pixels."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), pad_token='<|endoftext|>', eos_token='<|im_end|>',
                                        unk_token='<|unk|>', additional_special_tokens=SPECIAL[1:7], chat_template=CHAT_TEMPLATE)
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, temporal_patch_size=1, merge_size=2, min_pixels=64 * 64, max_pixels=64 * 64)
    ids = {name: tokenizer.convert_tokens_to_ids(f'<|{name}|>') for name in ('vision_start', 'vision_end', 'image_pad', 'video_pad')}
    config = Qwen2_5_VLConfig(
        text_config=dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=heads,
                         vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
                         bos_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                         rope_parameters=dict(rope_type='default', rope_theta=10000.0, mrope_section=[width // heads // 8, width // heads * 3 // 16, width // heads * 3 // 16])),
        vision_config=dict(depth=2, hidden_size=width, intermediate_size=2 * width, num_heads=heads, patch_size=8, temporal_patch_size=1, spatial_merge_size=2,
                           window_size=64, fullatt_block_indexes=[0, 1], out_hidden_size=width, in_channels=3),
        image_token_id=ids['image_pad'], video_token_id=ids['video_pad'], vision_start_token_id=ids['vision_start'], vision_end_token_id=ids['vision_end'],
        tie_word_embeddings=True)
    vlm = Qwen2_5_VLForConditionalGeneration(config)
    vlm.generation_config.eos_token_id, vlm.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return vlm, Chat(tokenizer, image_processor, ids['image_pad'])


def save_mini_vlm(vlm, chat, path, sizes, command='', sight=None):
    """One file: fp16 weights, with the tokenizer and the sizes in its metadata; `sight`: what its pictures were asked with (finetune.Sight)."""
    state = {name: tensor for name, tensor in vlm.state_dict().items() if name != 'lm_head.weight'}
    state.update({f'sight.{name}': tensor for name, tensor in (sight.state_dict() if sight else {}).items()})
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in state.items()}
    save_file(state, path, dict(tokenizer=chat.tokenizer.backend_tokenizer.to_str(), sizes=json.dumps(sizes), command=command))


def load_mini_vlm(path):
    state, metadata = read_weights(path)
    if 'tokenizer' not in metadata:
        raise InputError(f'{path} is not a mini VLM: its metadata hold no tokenizer')
    vlm, chat = mini_vlm(metadata['tokenizer'], **json.loads(metadata['sizes']))
    load_strictly(vlm, {name: tensor.float() for name, tensor in state.items() if not name.startswith('sight.')}, path, skip=['lm_head.'])
    vlm.tie_weights()
    return vlm, chat


# -----------------------------------------------------------------------------
# save and load a Spa3-VLM

def build_adapter(vlm, latent_width):
    """An adapter as wide as the VLM, with as many heads as its language model."""
    text = vlm.config.get_text_config()
    return Adapter(latent_width, text.hidden_size, text.num_attention_heads)


def add_lora(language_model, rank):
    """Low-rank updates (LoRA, arXiv 2106.09685) beside every matrix of the blocks, in place. Needs peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError('--train lora takes peft (pip install peft)') from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']),
                            language_model)


def save_spatial_vlm(model, chat, folder, settings, with_vlm, state=None):
    """-> folder/{spatial_vlm.json, adapter.safetensors, vlm/}. settings: a dict with `vlm` (what to load when it was not trained), `latents`, `encoder`.

    `state`: the model's whole state, where the model itself is sharded.
    """
    os.makedirs(folder, exist_ok=True)
    state = model.state_dict() if state is None else state
    part = lambda prefix: {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if model.adapter is not None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in part('adapter.').items()}, os.path.join(folder, 'adapter.safetensors'))
        settings = dict(settings, latent_width=model.adapter.projector.fc1.in_features)
    if settings.get('lora_rank'):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in part('vlm.').items() if '.lora_' in name}, os.path.join(folder, 'lora.safetensors'))
    if with_vlm:
        model.vlm.save_pretrained(os.path.join(folder, 'vlm'), state_dict=part('vlm.'))
        chat.save_pretrained(os.path.join(folder, 'vlm'))
        settings = dict(settings, vlm='vlm')
    with open(os.path.join(folder, 'spatial_vlm.json'), 'w') as file:
        json.dump(settings, file, indent=1)


def load_released_spatial_vlm(folder, dtype=torch.float32, max_pixels=None):
    """A Spa3-VLM folder of the release: a Qwen2.5-VL under transformers 4.50's names, with the adapter and Spa3R inside. -> as load_spatial_vlm

    Strict: apart from what is the encoder's and the adapter's, every name must be the VLM's.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration
    state = {}
    for file in sorted(glob.glob(os.path.join(folder, '*.safetensors'))):
        state.update(read_weights(file)[0])
    ours = from_release({name: tensor for name, tensor in state.items() if 'geometry_encoder.' not in name})
    if 'attention.q_norm.weight' not in ours:
        raise InputError(f'{folder} has no adapter of a Spa3-VLM (geom_cross_attention.*) and no spatial_vlm.json')
    vlm, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    strange = [name for name in report['unexpected_keys'] if 'geometry_' not in name and 'geom_' not in name and not re.search(r'(^|\.)ln\.', name)]
    missing = [name for name in report['missing_keys'] if not name.startswith('lm_head')]
    if strange or missing:
        raise InputError(f'{folder} is not a whole Qwen2.5-VL: missing {missing[:3]}, unexpected {strange[:3]}')
    hidden, latent_width = ours['projector.fc1.weight'].shape
    adapter = Adapter(latent_width, hidden, hidden // len(ours['attention.q_norm.weight']))
    load_strictly(adapter, {name: tensor.float() for name, tensor in ours.items()}, folder)
    _, chat = chat_of(vlm, folder, max_pixels)
    return SpatialVLM(vlm, adapter), chat, dict(vlm=folder, latents='psfm', encoder=folder, latent_width=latent_width, num_frames=8)


def load_spatial_vlm(folder, dtype=torch.float32, max_pixels=None):
    """-> (SpatialVLM, Chat, settings). Strict: a checkpoint without its adapter's weights is refused. Takes the release's folders too."""
    path = os.path.join(folder, 'spatial_vlm.json')
    if not os.path.isfile(path) and glob.glob(os.path.join(folder, '*.safetensors')):
        return load_released_spatial_vlm(folder, dtype, max_pixels)
    try:
        settings = json.load(open(path))
    except (OSError, ValueError) as error:
        raise InputError(f'{folder} is not a fine-tuned Spa3-VLM ({path}: {error})') from error
    source = os.path.join(folder, 'vlm') if settings['vlm'] == 'vlm' else settings['vlm']
    vlm, chat = load_vlm(source, dtype, max_pixels or settings.get('max_pixels'))
    if settings.get('lora_rank'):
        add_lora(vlm.model.language_model, settings['lora_rank'])
        low_rank = read_weights(os.path.join(folder, 'lora.safetensors'))[0]
        load_strictly(vlm, {**vlm.state_dict(), **low_rank}, os.path.join(folder, 'lora.safetensors'))
    adapter = None
    if settings['latents'] != 'none':
        adapter = build_adapter(vlm, settings['latent_width'])                            # after the VLM: transformers initialises what its files lack anew
        load_strictly(adapter, read_weights(os.path.join(folder, 'adapter.safetensors'))[0], os.path.join(folder, 'adapter.safetensors'))
    return SpatialVLM(vlm, adapter), chat, settings


# -----------------------------------------------------------------------------
# latents, once a scene

class SceneLatents:
    """Pictures of a scene -> its latents, computed once and kept on disk.

    kind: psfm      z of the trained encoder (Q, D)
          random    z of an encoder with the same sizes that was never trained
          backbone  no encoder: the backbone's own features, standardised, mean over 2 x 2 patches of each view
    A file's name is a hash of the encoder's weights, the kind, the size of the pictures and their pixels: whatever changes,
    a stale file is never used. `folder` None keeps nothing.
    """

    def __init__(self, kind, encoder, folder=None, device='cpu', say=print):
        self.kind, self.folder, self.device, self.say = kind, folder, device, say
        self.psfm, self.config = load_psfm(encoder, device)
        self.psfm.eval().requires_grad_(False)
        if kind == 'random':
            trained = self.psfm.state_dict()
            with torch.random.fork_rng(devices=[]):           # the run's own random numbers go on as if nothing had been drawn
                torch.manual_seed(0)
                self.psfm = build_psfm(self.config).to(device).eval().requires_grad_(False)
            self.psfm.load_state_dict({name: x for name, x in trained.items() if name.startswith('geo_')}, strict=False)
        self.multiple = self.psfm.backbone.config.patch_size
        self.width = self.psfm.backbone.feature_dim if kind == 'backbone' else self.config.width
        weights = hashlib.sha256()
        parts = {**self.psfm.backbone.state_dict(), **self.psfm.encoder.state_dict(prefix='encoder.'), 'mean': self.psfm.geo_mean, 'std': self.psfm.geo_std}
        for name, tensor in parts.items():
            weights.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        self.key = f'{kind} {weights.hexdigest()} {self.config.image_width}'
        self.found = self.computed = 0

    def prepare(self, pictures):
        """PIL images -> uint8 tensor (V, 3, H, W) for the backbone, cropped to one height."""
        arrays = [fit_picture(picture, self.config.image_width, self.multiple) for picture in pictures]
        height = min(len(array) for array in arrays)
        crop = lambda array: array[(len(array) - height) // 2:][:height]
        return torch.from_numpy(np.stack([crop(array) for array in arrays])).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def compute(self, images):
        """(B, V, 3, H, W) uint8 -> (B, L, D) fp16 on the CPU"""
        images = images.to(self.device).float() / 255
        if self.kind == 'backbone':
            views = self.psfm.backbone(images)
            x = self.psfm.standardise('geo', views.features).unflatten(2, views.grid)     # (B, V, h, w, 2C)
            z = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2, ceil_mode=True).flatten(2).transpose(1, 2).unflatten(0, images.shape[:2]).flatten(1, 2)
        else:
            z = self.psfm.latents(images)
        return z.half().cpu()

    def path(self, images):
        name = hashlib.sha256(f'{self.key} {tuple(images.shape)}'.encode() + images.numpy().tobytes()).hexdigest()[:32]
        return os.path.join(self.folder, name[:2], f'{name}.safetensors')

    def __call__(self, scenes):
        """A list of scenes, each a list of PIL images (maybe empty) -> a list of (L, D) fp32 tensors (None for no images)."""
        images = [self.prepare(pictures) if pictures else None for pictures in scenes]
        latents, due = [None] * len(scenes), {}
        for i, x in enumerate(images):
            if x is None:
                continue
            path = self.path(x) if self.folder else None
            if path and os.path.isfile(path):
                try:
                    latents[i] = load_file(path)['z']
                    self.found += 1
                    continue
                except SafetensorError:
                    pass                                      # a broken file counts as none, and is written anew
            due.setdefault(tuple(x.shape), []).append((i, path))
        for group in due.values():
            for (i, path), z in zip(group, self.compute(torch.stack([images[i] for i, _ in group]))):
                latents[i] = z
                self.computed += 1
                self.keep(path, z)
        return [z.float() if z is not None else None for z in latents]

    def keep(self, path, z):
        if not path or not self.folder:
            return
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
            os.close(handle)
            save_file({'z': z.contiguous()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            self.say(f'latents can no longer be kept in {self.folder} ({error}): going on, computing them anew each time')
            self.folder = None
