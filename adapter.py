"""
Spa3-VLM: the latents of a scene reach an open vision-language model (Spa3R, arXiv 2602.21186).

A VLM turns every picture into tokens and reads them one after the other. It holds no scene. Before
the language model sees the image tokens, each of them asks the scene's latents z by
cross-attention, and what comes back is added through a gate:

    g = MLP(z)                                  latents, at the VLM's width
    a = LayerNorm(attention(q=x, k=g, v=g))     x: the image tokens of one sample
    x + MLP(a) * sigmoid(Linear(a))             the MLP's last layer starts at 0: step 0 is the VLM

No model file is copied: every image-text model of transformers 5 computes its image tokens in one
method, `get_image_features`, and `SpatialVLM` wraps it. `SceneLatents` computes the latents of a
scene once.

    n image tokens of a sample    h width of the VLM    L latents (Q in model.py), D their width
"""
import contextlib
import copy
import functools
import hashlib
import inspect
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from backbone import fit_pictures
from chat import lean_batch, load_vlm
from common import (InputError, autocast_on, load_strictly, read_json, read_weights,
                    without_prefix, write_json)
from model import MLP, invert_pose, look_along
from psfm import untrained_like


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
    placeholder tokens, so a sample may have any number of images, or none."""

    def __init__(self, vlm, adapter=None):
        super().__init__()
        self.vlm, self.adapter = vlm, adapter
        self.latents = self.counts = None  # of the call under way: see `given`
        self.image_tokens = None  # of the last call, as the LLM read them (for mini_vlm.ground)
        vlm.model.get_image_features = self.with_latents(vlm.model.get_image_features)
        # cuDNN's attention makes a new plan for every new length: each batch, each new token
        torch.backends.cuda.enable_cudnn_sdp(False)

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
            rows = rows.to(self.vlm.get_input_embeddings().weight.dtype)  # autocast gave bf16
            lengths = [len(part) for part in tokens]
            outputs.pooler_output = rows.view(tokens.shape) if is_tensor else rows.split(lengths)
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

    @contextlib.contextmanager
    def given(self, input_ids, latents):
        """Inside, image tokens are fused with the latents of their samples, if there are any."""
        if latents is not None and self.adapter is not None:
            if len(latents) != len(input_ids):
                raise InputError(f'latents of {len(latents)} samples for a batch of '
                                 f'{len(input_ids)}')
            self.latents = latents
            self.counts = (input_ids == self.vlm.config.image_token_id).sum(1).tolist()
        try:
            yield
        finally:
            self.latents = self.counts = None

    def forward(self, input_ids, latents=None, **inputs):
        """The VLM's own forward. `latents`: a list with (L, D), or None, for every sample."""
        with self.given(input_ids, latents):
            outputs = self.vlm(input_ids=input_ids, **inputs)
        if self.training and self.adapter is not None:
            # DDP waits for every gradient: a batch without pictures gives the adapter zeros
            outputs.logits = outputs.logits + 0 * sum(p.sum() for p in self.adapter.parameters())
        return outputs

    def ends(self, chat):
        """Tokens that end an answer: what it was trained to say, and what its own folder names."""
        own = self.vlm.generation_config.eos_token_id
        return sorted({chat.end_of_turn, *(own if isinstance(own, list) else [own])} - {None})

    @torch.no_grad()
    def generate(self, input_ids, latents=None, **inputs):
        """The VLM's own generate, with `latents` as in `forward`."""
        with self.given(input_ids, latents):
            return self.vlm.generate(input_ids=input_ids, **inputs)

    def train_only(self, what):
        """Freezes all but `what`: 'adapter', 'adapter+llm', or 'lora' (adapter and low-rank parts).

        The vision tower and its projector are always frozen (the paper).
        """
        self.requires_grad_(False)
        if self.adapter is not None:
            self.adapter.requires_grad_(True)
        if what == 'adapter+llm':
            self.vlm.get_decoder().requires_grad_(True)
            self.vlm.get_output_embeddings().requires_grad_(True)
        if what == 'lora':
            for name, p in self.vlm.named_parameters():
                p.requires_grad_('.lora_' in name)
        return self


class Reading:
    """Scenes that a SpatialVLM has read once, to be asked about as often as one likes.

    All questions about a scene begin with its pictures. Their keys and values are computed once and
    shared (a KV cache): greedy answers in a fraction of the time. They equal those of `generate`,
    unless the VLM's generation config sets penalties."""

    @torch.no_grad()
    def __init__(self, model, chat, scenes, z, autocast):
        """scenes: lists of PIL images, as many of the same sizes in each; z: latents, or None."""
        from transformers import DynamicCache
        self.model, self.chat, self.autocast = model, chat, autocast
        self.device = next(model.parameters()).device
        self.images = '<image>' * len(scenes[0])
        items = []
        for pictures in scenes:
            self.looked = chat.look(pictures)  # of the last scene: the texts are alike in all
            item = self.encode('')
            ids = item['input_ids']
            end = len(ids) - ids[::-1].index(chat.image_token_id)  # after the last picture
            items.append(dict(item, input_ids=ids[:end], labels=ids[:end]))
        if len({len(item['input_ids']) for item in items}) > 1:
            raise InputError('scenes whose pictures differ in number or size are asked one by one')
        batch = chat.batch(items, left=True)  # of one length: nothing is padded
        del batch['labels']
        batch = lean_batch(batch, model.vlm, self.device)
        known = inspect.signature(model.vlm.forward).parameters
        # transformers before 5.24 calls it past_key_values
        self.argument = 'cache' if 'cache' in known else 'past_key_values'
        self.cache = DynamicCache(config=model.vlm.config.get_text_config())
        with autocast:
            cache = {self.argument: self.cache}
            model(latents=z, use_cache=True, logits_to_keep=1, **cache, **batch)
        B, self.length = batch['input_ids'].shape
        self.next_position = torch.full((B,), self.length, device=self.device)
        if 'position_ids' in batch:  # Qwen2-VL counts a picture's sides, not its tokens
            self.next_position = batch['position_ids'].amax((0, 2)) + 1

    def encode(self, question):
        turn = {'from': 'human', 'value': self.images + question}
        return self.chat.encode(dict(conversations=[turn]), self.looked)

    @torch.no_grad()
    def answer(self, questions, max_new_tokens):
        """[(number of the scene, question)] -> greedy answers."""
        rows = []
        for _, question in questions:
            ids = self.encode(question)['input_ids'][self.length:]
            rows.append(dict(input_ids=ids, labels=ids))
        batch = self.chat.batch(rows, left=True)
        ids, mask = [batch[name].to(self.device) for name in ('input_ids', 'attention_mask')]
        scene = torch.tensor([number for number, _ in questions], device=self.device)
        place = self.next_position[scene, None] + (mask.cumsum(1) - 1).clamp(min=0)
        mask = F.pad(mask, (self.length, 0), value=1)
        cache = copy.deepcopy(self.cache)
        cache.batch_select_indices(scene)

        tokenizer = self.chat.tokenizer
        ends = torch.tensor(self.model.ends(self.chat), device=self.device)
        is_done = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        answers = []
        for _ in range(max_new_tokens):
            with self.autocast:
                outputs = self.model.vlm(
                    input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True,
                    logits_to_keep=1, **{self.argument: cache})
            new = outputs.logits[:, -1].argmax(-1).masked_fill(is_done, tokenizer.pad_token_id)
            answers.append(new)
            is_done |= torch.isin(new, ends)
            if is_done.all():
                break
            ids, place, mask = new[:, None], place[:, -1:] + 1, F.pad(mask, (0, 1), value=1)
        texts = tokenizer.batch_decode(torch.stack(answers, 1), skip_special_tokens=True)
        return [text.strip() for text in texts]


def add_lora(vlm, rank):
    """Low-rank updates (LoRA, arXiv 2106.09685) beside the language model's matrices, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError('--train lora needs peft (pip install peft)') from error
    targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    inject_adapter_in_model(config, vlm.get_decoder())
    for name, p in vlm.named_parameters():
        if '.lora_' in name:          # trained in fp32, whatever the matrices are held in
            p.data = p.data.float()


def merge_lora(vlm):
    """Adds the low-rank updates to the matrices that they belong to, in place: a plain VLM."""
    for name, module in list(vlm.named_modules()):
        if hasattr(module, 'base_layer'):
            module.merge()
            vlm.set_submodule(name, module.base_layer)


# -----------------------------------------------------------------------------
# save and load

ENCODER = 'encoder.safetensors'       # where an exported folder has its own


def save_spatial_vlm(model, chat, folder, settings, with_vlm, state=None):
    """-> folder/{spatial_vlm.json, adapter.safetensors, lora.safetensors, vlm/}.

    settings: a dict with `vlm` (the base VLM; 'vlm': our sub-folder), `latents`, `encoder`,
    `lora_rank`; the base VLM's stamp is added, if it is not saved here. `state`: the model's whole
    state, where the model itself is sharded.
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
    settings['vlm_stamp'] = None if with_vlm else getattr(model.vlm, 'stamp', None)
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
    if not {'vlm', 'latents', 'encoder'} <= settings.keys():
        raise InputError(f'{path} does not say what the VLM was made of')
    if settings['encoder'] == ENCODER:    # of an exported folder
        settings['encoder'] = os.path.join(folder, ENCODER)
    source = settings['vlm'] if settings['vlm'] != 'vlm' else os.path.join(folder, 'vlm')
    vlm, chat = load_vlm(source, dtype, max_pixels or settings.get('max_pixels'),
                         stamp=settings.get('vlm_stamp'))
    if settings.get('lora_rank'):
        add_lora(vlm, settings['lora_rank'])
        path = os.path.join(folder, 'lora.safetensors')
        own = {name: x for name, x in vlm.state_dict().items() if '.lora_' not in name}
        load_strictly(vlm, {**own, **read_weights(path)[0]}, path)
    adapter = None
    if settings['latents'] != 'none':
        # differs from the release: built after the VLM, whose loading would re-initialise it
        adapter = build_adapter(vlm, settings['latent_width'])
        path = os.path.join(folder, 'adapter.safetensors')
        load_strictly(adapter, read_weights(path)[0], path)
    return SpatialVLM(vlm, adapter), chat, settings


# -----------------------------------------------------------------------------
# the latents of a scene, computed once

IMAGINED = 6          # cameras of the kind `imagined`, below


def hash_of_encoder(psfm, with_decoder=False):
    """Hex digits that tell encoders apart, by all the weights that z depends on."""
    digest = hashlib.sha256(psfm.backbone.fingerprint.encode())
    state = dict(psfm.encoder.state_dict(prefix='encoder.'), mean=psfm.geo_mean, std=psfm.geo_std)
    if with_decoder:
        state.update(psfm.decoder.state_dict(prefix='decoder.'))
        state.update(psfm.heads['geo'].state_dict(prefix='head.'))
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


# SceneLatents computes most of them; 'none' and 'oracle' are finetune.py's
LATENTS = ('psfm', 'none', 'random', 'backbone', 'pooled', 'imagined', 'oracle')


def cameras_around(extrinsics, count):
    """Cameras where nobody stood, from those of a scene, (B, V, 3, 4): in the middle of them all,
    looking round, the last one from above. -> (B, count, 3, 4)"""
    poses = invert_pose(extrinsics)
    middle = poses[..., 3].mean(1, keepdim=True)  # (B, 1, 3)
    spread = (poses[..., 3] - middle).norm(dim=-1).mean(1)[:, None, None]
    down = F.normalize(extrinsics[:, :, 1, :3].mean(1, keepdim=True), dim=-1)
    ahead = extrinsics[:, :1, 2, :3]              # of the first camera, made level
    ahead = F.normalize(ahead - (ahead * down).sum(-1, keepdim=True) * down, dim=-1)
    right = torch.linalg.cross(down, ahead)
    turn = 2 * math.pi * torch.arange(count - 1, device=down.device)[:, None] / (count - 1)
    level = turn.cos() * ahead + turn.sin() * right    # (B, count - 1, 3)
    above = middle - 1.5 * spread * down               # its picture's top is ahead
    return look_along(torch.cat([middle.expand_as(level), above], 1), torch.cat([level, down], 1),
                      torch.cat([down.expand_as(level), -ahead], 1))


class SceneLatents:
    """Pictures of a scene -> its latents, kept on disk.

    kind  psfm      z of the trained encoder, (Q, D)
          random    z of an encoder of the same sizes that was never trained
          backbone  no encoder: the backbone's features, standardised, mean over 2 x 2 patches
          pooled    the same, mean over as few tokens as z has, or a few more
          imagined  as many, of the field decoded from z at six cameras where nobody stood

    A file's name is a hash of the weights that z depends on, the kind, and the pixels: after a
    training no stale file is used. (After a change of this code, delete the folder.) `folder` None:
    nothing is kept. `dtype`: bfloat16 computes under autocast.
    """

    def __init__(self, kind, psfm, config, folder=None, say=print, dtype=torch.float32):
        self.kind, self.folder, self.say, self.dtype = kind, folder, say, dtype
        self.image_width = config.image_width
        self.backbone = config.backbone  # its name, for model cards
        self.width = config.width if kind in ('psfm', 'random') else psfm.backbone.feature_dim
        self.found = self.computed = 0
        # a scene's pictures as they are encoded: processes that read them do this ahead of time
        self.fit = functools.partial(fit_pictures, width=config.image_width,
                                     multiple=psfm.backbone.config.patch_size)
        self.device = psfm.geo_mean.device
        if kind == 'random':
            psfm = untrained_like(psfm, config)
        self.psfm = psfm.eval().requires_grad_(False)

        whole = self.kind == 'imagined'   # z, and what is decoded from it
        self.origin = f'{kind} {hash_of_encoder(psfm, whole)} {self.image_width}'

    def to(self, device):
        self.device = device
        return self

    @torch.no_grad()
    def compute(self, images):
        """(B, V, 3, H, W) uint8 -> (B, L, D) fp16, on the CPU."""
        self.psfm.to(self.device)     # not before: latents that are kept need no room on a GPU
        images = images.to(self.device).float() / 255
        with autocast_on(images.device, self.dtype):
            if self.kind in ('psfm', 'random'):
                return self.psfm.latents(images).half().cpu()
            views = self.psfm.backbone(images)
            features = views.features         # (B, V, N, 2C)
            if self.kind == 'imagined':
                z = self.psfm.encode(features, views.grid)
                cameras = cameras_around(views.extrinsics, IMAGINED)
                intrinsics = views.intrinsics.mean(1, keepdim=True).expand(-1, IMAGINED, -1, -1)
                features = self.psfm.decode(z, cameras, intrinsics, images.shape[-2:], views.grid)
        x = self.psfm.standardise('geo', features)
        x = x.flatten(0, 1).transpose(1, 2).unflatten(2, views.grid)  # (B V, 2C, rows, columns)
        if self.kind == 'backbone':
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        else:
            x = F.adaptive_avg_pool2d(x, self.few_cells(features.shape[1]))
        x = x.flatten(2).transpose(1, 2)      # (B V, tokens of a view, 2C)
        return x.unflatten(0, features.shape[:2]).flatten(1, 2).half().cpu()

    def few_cells(self, num_views):
        """(rows, columns) of a view, such that all views have as many as z, or a few more."""
        wanted = math.ceil(len(self.psfm.encoder.queries) / num_views)
        rows = max(1, math.isqrt(wanted))
        return rows, math.ceil(wanted / rows)

    def __call__(self, scenes):
        """A list of scenes, each a list of PIL images or what `fit` made of it -> a list of (L, D),
        fp32. None stands for a scene without images.
        """
        latents, due = [None] * len(scenes), {}  # due: {shape: {name: (images, places)}}
        for i, pictures in enumerate(scenes):
            if len(pictures) == 0:
                continue
            images = pictures if torch.is_tensor(pictures) else self.fit(pictures)
            content = f'{self.origin} {self.dtype} {tuple(images.shape)}'.encode()
            content += images.numpy().tobytes()
            name = hashlib.sha256(content).hexdigest()[:32]
            latents[i] = self.find(name)
            if latents[i] is None:  # scenes of one shape are computed together, equal ones once
                group = due.setdefault(images.shape, {})
                group.setdefault(name, (images, []))[1].append(i)
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
