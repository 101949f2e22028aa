"""
Spa3R's encoder: the features of a few context views -> a few latents z.

The first part of this file is what all other networks are built from: camera
algebra, 2-D rotary positions, multi-head attention, the transformer block. The
last part is the encoder of Spa3R (arXiv 2602.21186). It reads the frozen
backbone's features of the context views together with Q learned queries, and
keeps the queries.

A *position* is any object with two methods: `rotate(q, k, v)`, applied before
attention, and `restore(out)`, applied after it. RoPE2D (here) says where a
patch is in its image. PRoPE (psfm.py) says where it is in space. q and out may
hold only the last tokens (`num_kept`).

Shapes, in every file:
    B scenes    V views    Vc context views    H x W pixels    h x w = N patches per view
    Q latents   D width    C backbone width: its features have 2C channels (vggt.py)
    P = special tokens + N, all tokens of a view    nh heads    d channels per head
"""
import functools
import os
import shutil
import sysconfig
from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def full_precision(function):
    """Decorator: no autocast inside, so that what is given in fp32 is computed in fp32. Geometry in
    bf16 is wrong in the third digit. (A GPU's convolutions may still take TF32.)"""
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.autocast('cuda', enabled=False), torch.autocast('mps', enabled=False), \
                torch.autocast('cpu', enabled=False):
            return function(*args, **kwargs)
    return wrapped


# -----------------------------------------------------------------------------
# cameras: extrinsics (..., 3, 4) map world to camera, OpenCV axes (x right, y
# down, z forward). Intrinsics (..., 3, 3) are in pixels. Pixel i spans i .. i + 1.

def to_4x4(matrix):
    """(..., 3, 4) -> (..., 4, 4): appends the row 0 0 0 1."""
    bottom = torch.zeros_like(matrix[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([matrix, bottom], dim=-2)


@full_precision
def invert_pose(extrinsics):
    """Inverse of rigid motions (..., 3, 4): [R | t] -> [R^T | -R^T t]. No linear solve."""
    Rt = extrinsics[..., :3].transpose(-1, -2)
    t = extrinsics[..., 3:]
    return torch.cat([Rt, -Rt @ t], dim=-1)


@full_precision
def relative_pose(extrinsics, reference):
    """The same cameras (..., 3, 4), with the camera `reference` as the new world frame."""
    return (to_4x4(extrinsics) @ to_4x4(invert_pose(reference)))[..., :3, :]


@full_precision
def look_along(places, forward, down):
    """Cameras at `places` that look along the unit vectors `forward`, both (..., 3), and whose own
    down is as near to `down` (..., 3) as can be. -> extrinsics (..., 3, 4)"""
    right = F.normalize(torch.linalg.cross(down, forward), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    return torch.cat([rotation, -rotation @ places[..., None]], -1)


@full_precision
def path_through(extrinsics, num_frames):
    """Cameras (V, 3, 4), V >= 2, -> a smooth path (F, 3, 4) through all of them in their order.

    A Catmull-Rom spline through the camera-to-world matrices; each rotation on it is replaced by
    the nearest true one.
    """
    poses = invert_pose(extrinsics)
    V = len(poses)
    place = torch.linspace(0, V - 1, num_frames, device=poses.device)
    start = place.long().clamp(max=V - 2)
    t = (place - start)[:, None, None]
    a, b, c, d = [poses[(start + k).clamp(0, V - 1)] for k in (-1, 0, 1, 2)]
    poses = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    U, _, Vh = torch.linalg.svd(poses[..., :3])
    sign = torch.linalg.det(U @ Vh)[:, None, None]  # -1: the nearest is a mirror
    U = torch.cat([U[..., :2], sign * U[..., 2:]], -1)
    return invert_pose(torch.cat([U @ Vh, poses[..., 3:]], -1))


@full_precision
def points_in_world(depth, extrinsics, intrinsics, size):
    """What every cell of depth maps (..., h, w) shows, for cameras (..., 3, 4) and (..., 3, 3) of
    images of `size` = (H, W). -> (..., h w, 3)"""
    rays = camera_rays(intrinsics, size, depth.shape[-2:])
    points = rays * depth.flatten(-2)[..., None]
    return (points - extrinsics[..., None, :, 3]) @ extrinsics[..., :3]


def camera_rays(intrinsics, size, grid):
    """Rays through the centers of a `grid` = (h, w) of cells over an image of `size` = (H, W).

    intrinsics (..., 3, 3) -> (..., h w, 3) in the camera's frame, with z = 1:
    depth * ray is the point that is seen.
    """
    H, W = size
    h, w = grid
    x = (torch.arange(w, device=intrinsics.device) + 0.5) * (W / w)
    y = (torch.arange(h, device=intrinsics.device) + 0.5) * (H / h)
    pixels = torch.cartesian_prod(y, x).flip(-1)  # (h w, 2): x, y
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[..., None, :2]  # (..., 1, 2)
    center = intrinsics[..., None, :2, 2]  # (..., 1, 2)
    xy = (pixels - center) / focal
    return F.pad(xy, (0, 1), value=1.0)  # (..., h w, 3)


def quaternion_to_matrix(q):
    """Quaternions (..., 4), scalar last, of any length but zero -> rotations (..., 3, 3)."""
    x, y, z, w = F.normalize(q, dim=-1).unbind(-1)
    entries = [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
               2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
               2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def pose_encoding_to_cameras(pose, size):
    """VGGT's nine numbers -> cameras.

    pose (..., 9): translation 3, quaternion 4, vertical and horizontal field
    of view in radians. `size` = (H, W) pixels. -> extrinsics (..., 3, 4)
    world-to-camera, intrinsics (..., 3, 3).
    """
    H, W = size
    rotation = quaternion_to_matrix(pose[..., 3:7])
    extrinsics = torch.cat([rotation, pose[..., :3, None]], dim=-1)
    # differs from the release: kept off 0 and pi, where the focal length is
    # infinite or zero and everything after it is NaN
    fov = pose[..., 7:].clamp(0.02, 3.1)
    fy = (H / 2) / (fov[..., 0] / 2).tan()
    fx = (W / 2) / (fov[..., 1] / 2).tan()
    zero = torch.zeros_like(fx)
    one = torch.ones_like(fx)
    entries = [fx, zero, one * (W / 2),
               zero, fy, one * (H / 2),
               zero, zero, one]
    return extrinsics, torch.stack(entries, -1).unflatten(-1, (3, 3))


def take_views(x, index):
    """x (B, V, ...), index (B, K) -> (B, K, ...): for sample b its views index[b]."""
    sample = torch.arange(len(x), device=x.device)[:, None]  # (B, 1)
    return x[sample, index]


# -----------------------------------------------------------------------------
# positions

def turn_pairs(x, cos, sin):
    """In either half of x (..., d), channel i turns with channel i + d/4.

    `sin` (..., d) has the signs -, +, -, + by quarters to turn anticlockwise, +, -, +, - clockwise.
    """
    partner = x.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)  # torch.compile fuses flip, not cat
    return torch.addcmul(x * cos, partner, sin)


class RoPE2D:
    """2-D rotary positions (RoFormer, arXiv 2104.09864).

    The patch's row turns the first half of a head's channels, its column the
    second half. Patches count from 1. Special tokens have no place in the
    image: they sit at 0, where nothing turns. The tables are made once per
    forward pass and need no GPU sync.
    """

    def __init__(self, grid, head_dim, num_views=1, special_per_view=0, special_in_front=0,
                 special_behind=0, device=None):
        """Positions of: `special_in_front` tokens, then `num_views` views, each of
        `special_per_view` tokens and h w patches, then `special_behind` tokens.

        VGGT has a camera token and registers in every view. Spa3R's encoder
        has registers in front of all views, and its queries behind them.
        """
        # the place of every token
        h, w = grid
        rows = torch.arange(1, h + 1, device=device)
        columns = torch.arange(1, w + 1, device=device)
        place = torch.cartesian_prod(rows, columns).float()  # (N, 2)
        place = F.pad(place, (0, 0, special_per_view, 0))  # (P, 2)
        place = place.repeat(num_views, 1)  # (V P, 2)
        place = F.pad(place, (0, 0, special_in_front, special_behind))  # (tokens, 2)

        # how far each pair of channels turns
        exponent = torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2)
        frequency = 100.0 ** -exponent  # (d/4,)
        angle = place[:, :, None] * frequency  # (tokens, 2, d/4)
        self.cos = torch.cat([angle.cos(), angle.cos()], dim=-1).flatten(1)  # (tokens, d)
        self.sin = torch.cat([-angle.sin(), angle.sin()], dim=-1).flatten(1)

    def turn(self, x):
        """x (B, nh, tokens, d), anticlockwise."""
        last = x.shape[2]
        return turn_pairs(x, self.cos[-last:], self.sin[-last:])

    def rotate(self, q, k, v):
        return self.turn(q), self.turn(k), v

    def restore(self, out):
        return out


# -----------------------------------------------------------------------------
# transformer

def attend(q, k, v):
    """softmax(q k' / sqrt(d)) v: q (B, nh, n, d), k and v (B, nh, m, d) -> (B, nh, n, d).

    On a CPU in bf16, the fused kernel is several times slower backward. Where gradients are wanted
    and the scores are few, these are plain products, which round the scores to bf16.
    """
    is_plain = q.dtype == torch.bfloat16 and q.device.type == 'cpu' and q.requires_grad
    if is_plain and q.shape[2] * k.shape[2] <= 1024 ** 2:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def split_attention(q, k, v, num_context):
    """Asymmetric attention: context queries see the context's keys, the others see all keys.

    q, k, v (B, nh, tokens, d) with the context's `num_context` tokens first.
    Two plain calls give the same as a dense mask, keep the fused kernels and
    need no (tokens x tokens) mask.
    """
    c = num_context
    context = attend(q[:, :, :c], k[:, :, :c], v[:, :, :c])
    others = attend(q[:, :, c:], k, v)
    return torch.cat([context, others], dim=2)


class RMSNormInFP32(torch.autograd.Function):
    """x / rms(x) * weight of x (..., d), in fp32. For the backward pass it keeps x as it came;
    autograd by itself keeps copies in fp32 (on a CPU two: a sixth of what a step keeps)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.rms_norm(x.float(), weight.shape, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        n = x.float()
        eps = torch.finfo(n.dtype).eps  # nn.RMSNorm's own
        inverse_rms = (n.square().mean(-1, keepdim=True) + eps).rsqrt()
        n = n * inverse_rms
        grad_weight = grad * n  # of every token
        along = (grad_weight @ weight)[..., None] / len(weight)  # the length of x does not count
        grad_x = torch.addcmul(grad * weight, n, along, value=-1) * inverse_rms
        return grad_x.to(x.dtype), grad_weight.flatten(0, -2).sum(0)


def norm_in_fp32(norm, x):
    """nn.LayerNorm or nn.RMSNorm of x (..., d). -> fp32"""
    if isinstance(norm, nn.RMSNorm) and x.requires_grad and not torch.compiler.is_compiling():
        return RMSNormInFP32.apply(x, norm.weight)
    return norm(x.float())


class Attention(nn.Module):
    """Multi-head self-attention.

    `qk_norm` (nn.LayerNorm, nn.RMSNorm or None) normalises the d channels of
    each head's queries and keys; the heads share its weights.
    """

    def __init__(self, dim, num_heads, qk_norm=None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = qk_norm(dim // num_heads) if qk_norm else None
        self.k_norm = qk_norm(dim // num_heads) if qk_norm else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, position=None, num_context=None, num_kept=None):
        """x (B, tokens, dim) -> (B, tokens, dim), or its last `num_kept` tokens alone.

        The first `num_context` tokens attend only to each other (split_attention; not together
        with `num_kept`).
        """
        B, tokens, dim = x.shape
        qkv = self.qkv(x).view(B, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.unbind(2)  # 3 x (B, tokens, nh, d)
        if num_kept is not None:
            q = q[:, -num_kept:]

        # norms and rotations are done in fp32, the rest in the dtype of v
        dtype = v.dtype
        if self.q_norm is not None:
            q = norm_in_fp32(self.q_norm, q)
            k = norm_in_fp32(self.k_norm, k)
        q, k, v = [x.transpose(1, 2) for x in (q, k, v)]  # (B, nh, tokens, d)
        if position is not None:
            q, k, v = position.rotate(q, k, v)

        q, k, v = [x.to(dtype) for x in (q, k, v)]
        if num_context is None:
            out = attend(q, k, v)
        else:
            out = split_attention(q, k, v, num_context)
        if position is not None:
            out = position.restore(out)
        return self.proj(out.transpose(1, 2).flatten(2))


class GeluLinear(torch.autograd.Function):
    """linear(gelu(h)). It keeps h for the backward pass, and computes gelu(h), which is as large,
    again there: an eighth less memory for a training step."""

    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_h = torch.ops.aten.gelu_backward(grad @ weight, h)
        return grad_h, rows.T @ F.gelu(h).flatten(0, -2), rows.sum(0)


class MLP(nn.Module):
    def __init__(self, dim, hidden_dim, out_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        h = self.fc1(x)
        if torch.compiler.is_compiling() or not self.fc2.weight.requires_grad:
            return self.fc2(F.gelu(h))  # torch.compile recomputes GELU by itself
        return GeluLinear.apply(h, self.fc2.weight.to(h.dtype), self.fc2.bias.to(h.dtype))


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

    def forward(self, x, position=None, num_context=None, num_kept=None):
        attended = self.attn(self.norm1(x), position, num_context, num_kept)
        if num_kept is not None:
            x = x[:, -num_kept:]
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Blocks with register tokens in front (arXiv 2309.16588) and a final norm.

    The registers are added on entry and dropped before returning.
    """

    def __init__(self, dim, depth, num_heads, num_registers=4):
        super().__init__()
        self.num_registers = num_registers
        self.register_tokens = nn.Parameter(torch.randn(1, num_registers, dim) * 1e-6)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, qk_norm=nn.RMSNorm) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.checkpointing = False  # True: activations inside blocks are computed twice, not kept

    def forward(self, x, position, num_kept):
        """x (B, tokens, D) -> the last `num_kept` tokens of the output, (B, num_kept, D).

        `position` is of all tokens, the registers in front. The last block computes only the
        rows that are kept; the others serve as keys and values.
        """
        x = torch.cat([self.register_tokens.expand(len(x), -1, -1), x], dim=1)  # (B, R + tokens, D)
        for block in self.blocks:
            kept = num_kept if block is self.blocks[-1] else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, position, num_kept=kept, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, position, num_kept=kept)
        return self.norm(x[:, -num_kept:])  # without blocks, nothing was cut yet


def init_linear(module):
    """ViT initialisation (timm's): small normal weights, zero biases. For module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def cast_matrices(model, dtype):
    """Casts the linear and convolutional layers of a frozen model, once. Norms stay as they are.

    This is what autocast would do again on every call.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)


def has_compiler(device='cpu'):
    """torch.compile needs a C compiler and Python's headers, and for a GPU Triton."""
    compiler = any(shutil.which(name) for name in (os.environ.get('CC', 'cc'), 'gcc', 'cl'))
    headers = os.path.isfile(os.path.join(sysconfig.get_path('include'), 'Python.h'))
    return compiler and headers and (device == 'cpu' or find_spec('triton') is not None)


def compile_blocks(model, kind=Block, backend='inductor'):
    """torch.compile of every module of this kind: the blocks of a stack share the code, at any
    length of their input. Their forward alone: hooks stay around it. (A deep copy would compute
    with the weights of the original.)"""
    # several kinds of stacks share this code, with and without gradients
    torch._dynamo.config.recompile_limit = 64
    # what autocast leaves in fp32 (`full_precision`) stays so in the backward pass, as in eager
    torch._functorch.config.backward_pass_autocast = 'off'
    # DDP would cut graphs to send gradients early: with a graph a block it can anyway
    torch._dynamo.config.optimize_ddp = False
    # so that the norm and the rotation of queries and keys become one kernel of a GPU
    torch._inductor.config.realize_reads_threshold = 8
    # the compiler cannot know the size of the slice `c:`, and SDPA is fused without it. (Not as a
    # decorator: that would import the compiler, which takes a second, into every run.)
    global split_attention
    split_attention = torch.compiler.disable(split_attention)
    for module in model.modules():
        if isinstance(module, kind):
            module.forward = torch.compile(module.forward, dynamic=True, backend=backend)


def compile_if_possible(model, kind, wanted, device, say):
    """compile_blocks if it is `wanted` (None: on a CUDA GPU), and the compiler can run."""
    wanted = device.type == 'cuda' if wanted is None else wanted
    if wanted and has_compiler(device.type):
        compile_blocks(model, kind)
    elif wanted:
        say("not compiled: torch.compile needs a C compiler on the PATH and Python's headers "
            '(python3-dev), on a GPU also Triton')


# -----------------------------------------------------------------------------
# the Spa3R encoder

class Encoder(nn.Module):
    """Features of the context views (B, Vc, N, 2C) -> latents z (B, Q, D).

    Learned queries and all context patches go through one transformer
    together. What the queries hold at the end is z. A patch knows its place in
    its image (RoPE), but not which view it is from: views are an unordered set
    of any size. Cameras are not needed: the backbone's features already tell
    where their view is, in the first view's frame.
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
        """`grid` = (h, w): patches per view, h w = N."""
        B, Vc = features.shape[:2]
        Q = len(self.queries)
        patches = self.projection(features).flatten(1, 2)  # (B, Vc N, D)
        x = torch.cat([patches, self.queries.expand(B, -1, -1)], dim=1)  # (B, Vc N + Q, D)
        position = RoPE2D(grid, self.head_dim, num_views=Vc, special_behind=Q,
                          special_in_front=self.transformer.num_registers, device=x.device)
        return self.transformer(x, position, num_kept=Q)  # (B, Q, D)
