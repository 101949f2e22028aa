"""
Spa3-VLM: the latents of a scene reach an open vision-language model (Spa3R, arXiv 2602.21186).

A VLM turns every picture into tokens and reads them one after the other. It holds no scene. Before
the language model sees the image tokens, each of them asks the scene's latents z by
cross-attention, and what comes back is added through a gate:

    g = MLP(z)                                  latents, at the VLM's width
    a = LayerNorm(attention(q=x, k=g, v=g))     x: the image tokens of one sample
    x + MLP(a) * sigmoid(Linear(a))             the MLP's last layer starts at 0: step 0 is the VLM

No model file is copied: every image-text model of transformers 5 computes its image tokens in one
method, `get_image_features`, and `SpatialVLM` wraps it. `Chat` lays conversations out as
the VLM reads them; `SceneLatents` computes the latents of a scene once.

    n image tokens of a sample    h width of the VLM    L latents (Q in model.py), D their width
    T tokens of a sample          nh heads of the adapter
"""
import functools
import hashlib
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import (InputError, find_file, load_strictly, read_json, read_weights, some,
                    without_prefix, write_json)
from model import MLP
from psfm import fit_pictures, untrained_like


class CrossAttention(nn.Module):
    """Queries from x, keys and values from g; LayerNorm on the queries and keys of every head."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = [
            nn.Linear(dim, dim) for _ in range(4)]
        self.q_norm, self.k_norm = [nn.LayerNorm(dim // num_heads) for _ in range(2)]

    def split_heads(self, x):
        """(tokens, h) -> (nh, tokens, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)

    def forward(self, x, g):
        """x (n, h), g (L, h) -> (n, h)."""
        q = self.split_heads(self.q_proj(x))  # (nh, n, d)
        k = self.split_heads(self.k_proj(g))  # (nh, L, d)
        v = self.split_heads(self.v_proj(g))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self.proj(out.transpose(0, 1).flatten(1))  # (n, h)


class Adapter(nn.Module):
    """Residual gated cross-attention from one sample's image tokens to its scene's latents."""

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
        dtype = self.gate.weight.dtype
        g = self.projector(z.to(x.device, dtype))  # (L, h)
        a = self.norm(self.attention(x.to(dtype), g))  # (n, h)
        return x + (self.mlp(a) * self.gate(a).sigmoid()).to(x.dtype)


def build_adapter(vlm, latent_width):
    """An adapter as wide as the VLM, with as many heads as its language model."""
    text = vlm.config.get_text_config()
    return Adapter(latent_width, text.hidden_size, text.num_attention_heads)


# -----------------------------------------------------------------------------
# the VLM

class SpatialVLM(nn.Module):
    """Any image-text-to-text model of transformers 5, with an adapter after its image tokens.

    `adapter` None: the plain VLM. Which image tokens belong to a sample follows from its
    placeholder tokens, so a sample may have any number of images, or none.
    """

    def __init__(self, vlm, adapter=None):
        super().__init__()
        self.vlm, self.adapter = vlm, adapter
        self.latents = self.counts = None  # of the call under way: see `expect`
        self.image_tokens = None  # of the last call, as the LLM read them (for mini_vlm.ground)
        vlm.model.get_image_features = self.with_latents(vlm.model.get_image_features)

    def with_latents(self, plain):
        """The VLM's `get_image_features`, followed by the adapter."""
        @functools.wraps(plain)  # transformers reads its signature
        def get_image_features(*args, **kwargs):
            outputs = plain(*args, **kwargs)
            tokens = outputs.pooler_output  # (images, tokens, h), or a list of (tokens, h)
            is_tensor = torch.is_tensor(tokens)
            rows = tokens.flatten(0, -2) if is_tensor else torch.cat(list(tokens))
            if self.latents is not None:
                rows = self.fuse(rows)
                lengths = [len(part) for part in tokens]
                new_tokens = rows.view(tokens.shape) if is_tensor else rows.split(lengths)
                outputs.pooler_output = new_tokens
            self.image_tokens = rows
            return outputs
        return get_image_features

    def fuse(self, rows):
        """All image tokens of the batch, (all, h): a sample's tokens meet its own latents only."""
        # differs from the release, which is only correct with one sample per GPU
        if len(rows) != sum(self.counts):
            raise InputError(f'{len(rows)} image tokens for {sum(self.counts)} placeholders: with '
                             'latents, pass one sequence per sample, with all its images')
        fused = []
        for x, z in zip(rows.split(self.counts), self.latents):
            fused.append(self.adapter(x, z) if z is not None and len(x) else x)
        return torch.cat(fused)

    def expect(self, input_ids, latents):
        """Sets the latents and image-token counts of the next call; `latents` None clears them."""
        self.latents = self.counts = None
        if latents is None or self.adapter is None:
            return
        if len(latents) != len(input_ids):
            raise InputError(f'latents of {len(latents)} samples for a batch of {len(input_ids)}')
        config = self.vlm.config
        image_token = getattr(config, 'image_token_id', None) or config.image_token_index
        self.latents, self.counts = latents, (input_ids == image_token).sum(1).tolist()

    def forward(self, input_ids, latents=None, **inputs):
        """The VLM's own forward. `latents`: a list with (L, D), or None, for every sample."""
        self.expect(input_ids, latents)
        try:
            outputs = self.vlm(input_ids=input_ids, **inputs)
        finally:
            self.expect(input_ids, None)
        if self.training and self.adapter is not None:
            # DDP waits for every gradient: a batch without pictures gives the adapter zeros
            outputs.logits = outputs.logits + 0 * sum(p.sum() for p in self.adapter.parameters())
        return outputs

    @torch.no_grad()
    def generate(self, input_ids, latents=None, **inputs):
        """The VLM's own generate, with `latents` as in `forward`."""
        self.expect(input_ids, latents)
        try:
            return self.vlm.generate(input_ids=input_ids, **inputs)
        finally:
            self.expect(input_ids, None)

    def trainable(self, what):
        """Freezes all but `what`: 'adapter', 'adapter+llm', or 'lora' (adapter and low-rank parts).

        The vision tower and its projector are always frozen (the paper).
        """
        self.requires_grad_(False)
        if self.adapter is not None:
            self.adapter.requires_grad_(True)
        if what == 'adapter+llm':
            self.vlm.model.language_model.requires_grad_(True)
            self.vlm.get_output_embeddings().requires_grad_(True)
        if what == 'lora':
            for name, p in self.vlm.named_parameters():
                p.requires_grad_('.lora_' in name)
        return self


def add_lora(vlm, rank):
    """Low-rank updates (LoRA, arXiv 2106.09685) beside the language model's matrices, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError('--train lora needs peft (pip install peft)') from error
    targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    inject_adapter_in_model(config, vlm.model.language_model)


def answer_loss(logits, labels):
    """Cross entropy over the answers' tokens: logits (B, T, vocabulary), labels (B, T) or -100."""
    logits = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def to_device(batch, vlm, device):
    """A batch for training, on `device`. Two things save time: positions are computed here, where
    transformers would do it sample by sample on the GPU; and the mask goes, because padding comes
    last, where causal attention does not look, and there are faster kernels without a mask.
    """
    if 'image_grid_thw' in batch:
        names = ('input_ids', 'mm_token_type_ids', 'image_grid_thw', 'attention_mask')
        batch['position_ids'], _ = vlm.model.get_rope_index(**{name: batch[name] for name in names})
    return {name: x.to(device) for name, x in batch.items() if name != 'attention_mask'}


# -----------------------------------------------------------------------------
# conversations, as the VLM reads them

class Chat:
    """Conversations about pictures -> token ids, labels, pixels, for the Qwen2-VL family (2.5, 3).

    An item is a dict: `images`, a list of PIL images, and `conversations`, a list of {'from':
    'human' | 'gpt', 'value': text}, in which every <image> stands for the next of the images.
    The tokenizer's own chat template lays out the text. Every <image> becomes as many placeholder
    tokens as its picture has merged patches. `max_pixels`: larger pictures are scaled down.
    (transformers' own processors need torchvision; tokenizer and image processor do not.)
    """
    SYSTEM = 'You are a helpful assistant.'

    def __init__(self, tokenizer, image_processor, max_pixels=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id = tokenizer.convert_tokens_to_ids('<|image_pad|>')
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
            text = ''.join(piece + text for piece, text in zip(pieces, [*texts, '']))
            new = self.tokenizer(text, add_special_tokens=False).input_ids
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


# -----------------------------------------------------------------------------
# save and load

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


def save_spatial_vlm(model, chat, folder, settings, with_vlm, state=None):
    """-> folder/{spatial_vlm.json, adapter.safetensors, lora.safetensors, vlm/}.

    settings: a dict with `vlm` (the base VLM; 'vlm': our sub-folder), `latents`, `encoder`,
    `lora_rank`. `state`: the model's whole state, where the model itself is sharded.
    """
    os.makedirs(folder, exist_ok=True)
    state = model.state_dict() if state is None else state
    state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    of_vlm, settings = without_prefix(state, 'vlm.'), dict(settings)
    if model.adapter is not None:
        path = os.path.join(folder, 'adapter.safetensors')
        save_file(without_prefix(state, 'adapter.'), path)
        settings['latent_width'] = model.adapter.projector.fc1.in_features
    if settings.get('lora_rank'):
        lora = {name: x for name, x in of_vlm.items() if '.lora_' in name}
        save_file(lora, os.path.join(folder, 'lora.safetensors'))
    if with_vlm:
        settings['vlm'] = 'vlm'
        model.vlm.save_pretrained(os.path.join(folder, 'vlm'), state_dict=of_vlm)
        chat.save_pretrained(os.path.join(folder, 'vlm'))
    write_json(os.path.join(folder, 'spatial_vlm.json'), settings)


def load_spatial_vlm(folder, dtype=torch.float32, max_pixels=None):
    """-> (SpatialVLM, Chat, settings). Strict: without its adapter's weights, it is refused."""
    path = os.path.join(folder, 'spatial_vlm.json')
    if not os.path.isfile(path):
        raise InputError(f'{folder} is not a fine-tuned Spa3-VLM: it has no spatial_vlm.json')
    settings = read_json(path)
    source = settings['vlm'] if settings['vlm'] != 'vlm' else os.path.join(folder, 'vlm')
    vlm, chat = load_vlm(source, dtype, max_pixels or settings.get('max_pixels'))
    if settings.get('lora_rank'):
        add_lora(vlm, settings['lora_rank'])
        path = os.path.join(folder, 'lora.safetensors')
        load_strictly(vlm, {**vlm.state_dict(), **read_weights(path)[0]}, path)
    adapter = None
    if settings['latents'] != 'none':
        # differs from the release: built after the VLM, whose loading would re-initialise it
        adapter = build_adapter(vlm, settings['latent_width'])
        path = os.path.join(folder, 'adapter.safetensors')
        load_strictly(adapter, read_weights(path)[0], path)
    return SpatialVLM(vlm, adapter), chat, settings


# -----------------------------------------------------------------------------
# the latents of a scene, computed once

LATENTS = ('psfm', 'none', 'random', 'backbone')


class SceneLatents:
    """Pictures of a scene -> its latents, kept on disk.

    kind  psfm      z of the trained encoder, (Q, D)
          random    z of an encoder of the same sizes that was never trained
          backbone  no encoder: the backbone's features, standardised, mean over 2 x 2 patches

    A file's name is a hash of the weights that z depends on, the kind, and the pixels: no stale
    file is ever used. `folder` None: nothing is kept.
    """

    def __init__(self, kind, psfm, config, folder=None, say=print):
        self.kind, self.folder, self.say = kind, folder, say
        self.image_width = config.image_width
        self.width = psfm.backbone.feature_dim if kind == 'backbone' else config.width
        self.found = self.computed = 0
        if kind == 'random':
            psfm = untrained_like(psfm, config)
        self.psfm = psfm.eval().requires_grad_(False)

        weights = hashlib.sha256()
        state = dict(psfm.backbone.state_dict(), mean=psfm.geo_mean, std=psfm.geo_std)
        for name, tensor in {**state, **psfm.encoder.state_dict(prefix='encoder.')}.items():
            weights.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        self.key = f'{kind} {weights.hexdigest()} {self.image_width}'

    def to(self, device):
        self.psfm.to(device)
        return self

    @torch.no_grad()
    def compute(self, images):
        """(B, V, 3, H, W) uint8 -> (B, L, D) fp16, on the CPU."""
        images = images.to(self.psfm.geo_mean.device).float() / 255
        if self.kind != 'backbone':
            return self.psfm.latents(images).half().cpu()
        views = self.psfm.backbone(images)
        x = self.psfm.standardise('geo', views.features)  # (B, V, N, 2C)
        x = x.flatten(0, 1).transpose(1, 2).unflatten(2, views.grid)  # (B V, 2C, h, w)
        x = F.avg_pool2d(x, 2, ceil_mode=True).flatten(2).transpose(1, 2)  # (B V, N/4, 2C)
        return x.unflatten(0, images.shape[:2]).flatten(1, 2).half().cpu()

    def __call__(self, scenes):
        """A list of scenes, each a list of PIL images -> a list of (L, D), fp32.

        None stands for a scene without images.
        """
        latents, due = [None] * len(scenes), {}  # due: {shape: {name: (images, places)}}
        for i, pictures in enumerate(scenes):
            if not pictures:
                continue
            images = fit_pictures(pictures, self.image_width, self.psfm.backbone.config.patch_size)
            content = f'{self.key} {tuple(images.shape)}'.encode() + images.numpy().tobytes()
            name = hashlib.sha256(content).hexdigest()[:32]
            latents[i] = self.find(name)
            if latents[i] is None:  # scenes of one shape are computed together, equal ones once
                due.setdefault(images.shape, {}).setdefault(name, (images, []))[1].append(i)
        for group in due.values():
            computed = self.compute(torch.stack([images for images, _ in group.values()]))
            self.computed += len(computed)
            for (name, (_, places)), z in zip(group.items(), computed):
                self.keep(name, z)
                for i in places:
                    latents[i] = z
        return [z.float() if z is not None else None for z in latents]

    def path(self, name):
        return os.path.join(self.folder, name[:2], f'{name}.safetensors')

    def find(self, name):
        """The latents in a file, or None. A broken file counts as none."""
        if not self.folder or not os.path.isfile(self.path(name)):
            return None
        try:
            z = load_file(self.path(name))['z']
        except SafetensorError:
            return None
        self.found += 1
        return z

    def keep(self, name, z):
        if not self.folder:
            return
        path = self.path(name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f'{path}.{os.getpid()}'  # one per process, so writers never collide
            save_file({'z': z.contiguous()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            self.say(f'latents can no longer be cached in {self.folder} ({error}): '
                     'from here on they are computed anew each time')
            self.folder = None
