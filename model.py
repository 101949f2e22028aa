"""
Spa3R's encoder: the features of a few context views -> a few latents z.

This file holds what every other file is built from: multi-head attention, the
transformer block, 2-D rotary positions and a little camera algebra; and, at the
end, the encoder of Spa3R (arXiv 2602.21186), which reads the frozen
backbone's features of the context views and keeps Q learned queries of them.

A *position* is any object with two methods: `rotate(q, k, v)`, applied before
attention, and `restore(out)`, applied after it. RoPE2D (here) says where a patch
is in its image; PRoPE (psfm.py) says where it is in space.

Shapes, in every file:
    B scenes   V views   Vc context views   h x w = N patches a view   P = N + special tokens a view
    Q latents  D width   C backbone width   H x W pixels   nh heads    d channels a head
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open


IMAGE_STATISTICS = {'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225]}      # ImageNet's: what DINO and VGGT expect


class InputError(Exception):
    """What the user gave is at fault: scripts print the sentence and stop; a traceback is for bugs only."""


def pick_device(name):
    """'auto' or any name that torch knows -> torch.device."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f'--device {name}: torch knows no such device; take auto, cpu, cuda, cuda:1, ... or mps') from error
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise InputError(f'--device {name}: torch sees no CUDA GPU here; leave the option out to run on what there is')
    return device


def full_precision(function):
    """Decorator: no autocast inside. Geometry in bf16 is wrong in the third digit."""
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.autocast('cuda', enabled=False), torch.autocast('mps', enabled=False), torch.autocast('cpu', enabled=False):
            return function(*args, **kwargs)
    return wrapped


# -----------------------------------------------------------------------------
# cameras: extrinsics (..., 3, 4) map world to camera, OpenCV axes (x right, y down, z forward);
# intrinsics (..., 3, 3) are in pixels, pixel i spanning [i, i + 1)

def to_4x4(matrix):
    """(..., 3, 4) -> (..., 4, 4): appends the row 0 0 0 1."""
    bottom = torch.zeros_like(matrix[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([matrix, bottom], dim=-2)


@full_precision
def invert_pose(extrinsics):
    """Inverse of rigid motions, (..., 3, 4) -> (..., 3, 4): [R | t] -> [R^T | -R^T t]. No linear solve."""
    Rt = extrinsics[..., :3].transpose(-1, -2)
    return torch.cat([Rt, -Rt @ extrinsics[..., 3:]], dim=-1)


@full_precision
def relative_pose(extrinsics, reference):
    """Extrinsics (..., 3, 4) in the world frame of the camera `reference` (..., 3, 4)."""
    return (to_4x4(extrinsics) @ to_4x4(invert_pose(reference)))[..., :3, :]


def camera_rays(intrinsics, size, grid):
    """Rays through the centres of a `grid` = (h, w) of cells laid over an image of `size` = (H, W) pixels.

    intrinsics (..., 3, 3) -> (..., h * w, 3) in the camera's frame, with z = 1 (so depth * ray is the point).
    """
    (H, W), (h, w) = size, grid
    x = (torch.arange(w, device=intrinsics.device) + 0.5) * (W / w)
    y = (torch.arange(h, device=intrinsics.device) + 0.5) * (H / h)
    y, x = torch.meshgrid(y, x, indexing='ij')                                            # (h, w)
    focal, centre = intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2], intrinsics[..., :2, 2]  # (..., 2)
    xy = (torch.stack([x, y], -1).flatten(0, 1) - centre[..., None, :]) / focal[..., None, :]
    return F.pad(xy, (0, 1), value=1.0)                                                   # (..., h w, 3)


# -----------------------------------------------------------------------------
# positions

class RoPE2D:
    """2-D rotary positions (RoFormer, arXiv 2104.09864): rows turn the first half of a head's channels, columns the second.

    Patches count from 1 (the release does), tokens without a place in the image sit at 0, where nothing turns.
    The tables are made once per forward, on the device, without asking the device for anything.
    """

    def __init__(self, num_special, grid, head_dim, repeats=1, base=100.0, device=None, leading_special=0):
        """For `leading_special` tokens, then `repeats` views of `num_special` + h * w tokens each; special ones are at 0.

        (VGGT has a camera token and registers in every view, Spa3R's encoder has registers and queries once, in front.)
        """
        h, w = grid
        y, x = torch.meshgrid(torch.arange(1, h + 1, device=device), torch.arange(1, w + 1, device=device), indexing='ij')
        position = torch.stack([y, x], -1).flatten(0, 1).float()                          # (N, 2)
        position = F.pad(position, (0, 0, num_special, 0)).repeat(repeats, 1)
        position = F.pad(position, (0, 0, leading_special, 0))                            # (tokens, 2)
        frequency = base ** (-torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2))
        angle = position[:, :, None] * frequency                                          # (tokens, 2, d/4)
        angle = torch.cat([angle, angle], dim=-1).flatten(1)                              # (tokens, d)
        self.cos, self.sin = angle.cos(), angle.sin()

    def turn(self, x):                                                                    # (B, nh, tokens, d), anticlockwise
        a, b, c, d = x.chunk(4, dim=-1)
        return x * self.cos + torch.cat([-b, a, -d, c], dim=-1) * self.sin

    def rotate(self, q, k, v):
        return self.turn(q), self.turn(k), v

    def restore(self, out):
        return out


# -----------------------------------------------------------------------------
# transformer

@torch.compiler.disable      # the compiler cannot size the second slice when the number of views varies; kernels stay fused
def split_attention(q, k, v, num_context):
    """Asymmetric attention without a mask: context queries meet context keys, the others meet all keys.

    q, k, v: (B, nh, tokens, d), the context's `num_context` tokens first. Two plain calls keep the fused kernels and
    allocate no (tokens x tokens) mask; the result equals that of the dense mask.
    """
    context = F.scaled_dot_product_attention(q[:, :, :num_context], k[:, :, :num_context], v[:, :, :num_context])
    rest = F.scaled_dot_product_attention(q[:, :, num_context:], k, v)
    return torch.cat([context, rest], dim=2)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys (`qk_norm`: nn.LayerNorm, nn.RMSNorm or None)."""

    def __init__(self, dim, num_heads, qk_norm=None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = qk_norm(dim // num_heads) if qk_norm else None
        self.k_norm = qk_norm(dim // num_heads) if qk_norm else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, position=None, num_context=None):
        """x (B, tokens, dim) -> the same shape. `num_context`: the first so many tokens see only each other."""
        B, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(B, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)   # 3 x (B, nh, tokens, d)
        # norms and rotations are done in fp32; the kernel gets what it is fast in: v's dtype on a GPU, fp32 on a CPU,
        # whose fused bf16 backward is up to six times slower
        dtype = torch.float32 if x.device.type == 'cpu' else v.dtype
        if self.q_norm is not None:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if position is not None:
            q, k, v = position.rotate(q, k, v)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            if num_context is None:
                out = F.scaled_dot_product_attention(q, k, v)
            else:
                out = split_attention(q, k, v, num_context)
        if position is not None:
            out = position.restore(out)
        return self.proj(out.transpose(1, 2).reshape(B, tokens, dim))


class MLP(nn.Module):
    def __init__(self, dim, hidden_dim, out_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Learned gain per channel (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim, num_heads, qk_norm=None, layer_scale=None, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 4 * dim, dim)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x, position=None, num_context=None):
        x = x + self.ls1(self.attn(self.norm1(x), position, num_context))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """A stack of blocks with register tokens in front (arXiv 2309.16588) and a final norm; the registers stay inside."""

    def __init__(self, dim, depth, num_heads, num_registers=4):
        super().__init__()
        self.register_tokens = nn.Parameter(torch.randn(1, num_registers, dim) * 1e-6)
        self.blocks = nn.ModuleList(Block(dim, num_heads, qk_norm=nn.RMSNorm) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @property
    def num_registers(self):
        return self.register_tokens.shape[1]

    def forward(self, x, position, keep=slice(None)):
        """x (B, tokens, D) -> rows `keep` of the output. `position` counts the registers (they come first), `keep` does not."""
        x = torch.cat([self.register_tokens.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x, position)
        return self.norm(x[:, self.num_registers:][:, keep])


def take_views(x, index):
    """x (B, V, ...), index (B, K) -> (B, K, ...): for each sample its own views."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def cast_matrices(model, dtype):
    """Linear and convolutional layers of a frozen model to `dtype`: what autocast would do on every call, once. Norms stay."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)


def init_linear(module):
    """ViT initialisation (timm's): small normal weights, zero biases. Use with module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def read_weights(path):
    """A .safetensors file -> its state (name -> tensor) and its metadata. Raises InputError if it is not a whole one."""
    try:
        with safe_open(path, 'pt') as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f'{path} is not a safetensors file, or not a whole one ({error})') from error
    except OSError as error:
        raise InputError(f'no weights at {path} ({error})') from error


def load_strictly(module, state, source, skip=(), assign=False):
    """Loads `state` (name -> tensor) into `module`; every name must match, but for those that begin with one of `skip`.

    Raises InputError with the names that are missing or unexpected. `source` is what the message calls the weights.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(skip))}
    own = {name for name in module.state_dict() if not name.startswith(tuple(skip))}
    some = lambda names: ', '.join(sorted(names)[:4]) + (f', ... ({len(names)} in all)' if len(names) > 4 else '') or 'none'
    missing, unexpected = own - state.keys(), state.keys() - own
    if missing or unexpected:
        raise InputError(f'{source} does not fit this {type(module).__name__}: missing {some(missing)}; unexpected {some(unexpected)}')
    shapes = {name for name in own if state[name].shape != module.state_dict()[name].shape}
    if shapes:
        raise InputError(f'{source} does not fit this {type(module).__name__}: other shapes for {some(shapes)}')
    module.load_state_dict(state, strict=False, assign=assign)


# -----------------------------------------------------------------------------
# the Spa3R encoder

class Encoder(nn.Module):
    """Features of the context views (B, Vc, N, 2C) -> latents z (B, Q, D).

    Learned queries and all context patches go through one transformer together; what the queries hold at the end is z.
    A patch knows its place in its image (RoPE), not which view it is from: views form a set, and any number of them will do.
    """

    def __init__(self, in_dim, dim, depth, num_heads, num_latents, num_registers=4):
        super().__init__()
        self.projection = nn.Linear(in_dim, dim)
        self.queries = nn.Parameter(torch.empty(num_latents, dim))
        self.transformer = Transformer(dim, depth, num_heads, num_registers)
        self.head_dim = dim // num_heads
        self.apply(init_linear)
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, features, grid):
        """`grid` = (h, w), the patches of a view, h * w = N."""
        B, Vc = features.shape[:2]
        num_latents = len(self.queries)
        x = self.projection(features).flatten(1, 2)                                       # (B, Vc N, D)
        x = torch.cat([self.queries.expand(B, -1, -1).to(x.dtype), x], dim=1)             # (B, Q + Vc N, D)
        position = RoPE2D(0, grid, self.head_dim, repeats=Vc, device=x.device,
                          leading_special=self.transformer.num_registers + num_latents)
        return self.transformer(x, position, keep=slice(0, num_latents))                  # (B, Q, D)
