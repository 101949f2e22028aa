"""What all networks are built from, and the encoder."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import model
from speed import dense_mask_attention, storages_kept
from model import (Attention, Block, Encoder, RoPE2D, Transformer, attend, camera_rays,
                   compile_blocks, invert_pose, norm_in_fp32, path_through,
                   pose_encoding_to_cameras, quaternion_to_matrix, relative_pose,
                   split_attention, to_4x4)


def random_extrinsics(*shape):
    rotation = torch.linalg.qr(torch.randn(*shape, 3, 3)).Q
    rotation = rotation * rotation.det()[..., None, None]
    return torch.cat([rotation, torch.randn(*shape, 3, 1)], -1)


# -----------------------------------------------------------------------------
# cameras

def test_camera_algebra():
    a, b = random_extrinsics(5), random_extrinsics(5)
    assert torch.allclose(to_4x4(invert_pose(a)), torch.linalg.inv(to_4x4(a)), atol=1e-5)
    assert torch.allclose(to_4x4(relative_pose(a, b)) @ to_4x4(b), to_4x4(a), atol=1e-5)


def test_a_path_goes_through_every_camera_and_is_smooth():
    cameras = random_extrinsics(5)
    path = path_through(cameras, 81)
    assert torch.allclose(path[::20], cameras, atol=1e-4)
    rotation = path[..., :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(81, 3, 3), atol=1e-4)
    assert torch.allclose(rotation.det(), torch.ones(81), atol=1e-4)
    # halfway between two views: a little to the left and to the right of the axis
    turned = torch.eye(3, 4).repeat(2, 1, 1)
    for i, angle in enumerate((-0.4, 0.4)):
        turned[i, 0, 0] = turned[i, 2, 2] = math.cos(angle)
        turned[i, 0, 2], turned[i, 2, 0] = math.sin(angle), -math.sin(angle)
    turned[:, 0, 3] = torch.tensor([1.0, 3.0])
    middle = invert_pose(path_through(turned, 3)[1])
    assert torch.allclose(middle[:, :3], torch.eye(3), atol=1e-6)
    assert torch.allclose(middle[:, 3], invert_pose(turned)[..., 3].mean(0), atol=1e-6)
    eyes = invert_pose(path)[..., 3]
    bends = (eyes[2:] - 2 * eyes[1:-1] + eyes[:-2]).norm(dim=-1)
    assert bends.max() < 0.2 * (eyes[1:] - eyes[:-1]).norm(dim=-1).max()


def test_geometry_stays_in_fp32_under_autocast():
    a, b = random_extrinsics(5), random_extrinsics(5)
    outside = relative_pose(a, b)
    with torch.autocast('cpu', torch.bfloat16):
        inside = relative_pose(a, b)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_rays_project_back():
    intrinsics = torch.tensor([[50., 0, 30], [0, 60, 22], [0, 0, 1]])
    rays = camera_rays(intrinsics, (40, 56), (5, 7))
    pixels = (rays @ intrinsics.T)[:, :2].view(5, 7, 2)
    assert torch.allclose(pixels[0, 0], torch.tensor([4., 4.]))
    assert torch.allclose(pixels[4, 6], torch.tensor([52., 36.]))


def test_cameras_from_nine_numbers():
    half = 2 ** -0.5
    pose = torch.tensor([1., 2, 3, 0, 0, half, half, math.pi / 2, math.pi / 3])
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, (40, 60))
    expected = torch.tensor([[0., -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]])
    assert torch.allclose(extrinsics, expected, atol=1e-6)
    expected = torch.tensor([[30 * 3 ** 0.5, 0, 30], [0, 20, 20], [0, 0, 1]])
    assert torch.allclose(intrinsics, expected, atol=1e-4)
    q = torch.randn(7, 4)
    assert torch.allclose(quaternion_to_matrix(q), quaternion_to_matrix(-2 * q), atol=1e-6)


# -----------------------------------------------------------------------------
# positions and attention

def test_rope_depends_on_relative_place_only():
    rope = RoPE2D((4, 6), head_dim=16, special_in_front=1)
    q, k = torch.randn(16), torch.randn(16)
    queries = rope.turn(q.expand(1, 1, 25, 16))[0, 0]
    keys = rope.turn(k.expand(1, 1, 25, 16))[0, 0]
    scores = queries @ keys.T
    grid = scores[1:, 1:].view(4, 6, 4, 6)
    assert torch.allclose(grid[0, 0, 2, 3], grid[1, 2, 3, 5], atol=1e-5)
    assert not torch.allclose(grid[0, 0, 2, 3], grid[0, 0, 3, 2], atol=1e-3)
    assert torch.allclose(scores[0, 0], q @ k)  # a special token is not turned at all


def test_rope_knows_special_tokens_in_front_and_in_every_view():
    rope = RoPE2D((2, 3), 8, num_views=2, special_per_view=3, special_in_front=2)
    x = torch.randn(1, 1, 2 + 2 * (3 + 6), 8)
    stays = (rope.turn(x) == x).all(-1)[0, 0]
    assert stays.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 11, 12, 13]
    views = rope.cos[2:].view(2, 9, 8)
    assert torch.equal(views[0], views[1])


@pytest.mark.parametrize('tokens', [33, 1100])  # the longer one takes the fused kernel
def test_attention_in_bf16_is_that_in_fp32_but_for_rounding(tokens):
    q, k, v = [torch.randn(1, 2, tokens, 32).bfloat16().requires_grad_() for _ in range(3)]
    exact = attend(q.float(), k.float(), v.float())
    out = attend(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 0.02 * exact.norm()
    gradients = [torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (out, exact)]
    for ours, expected in zip(*gradients):
        assert (ours - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_norm_of_heads_is_rms_norm_and_keeps_its_input_alone(dtype):
    norm = torch.nn.RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 3, 8).to(dtype).requires_grad_()
    expected = norm(x.float())
    with storages_kept([norm.weight, x]) as kept:
        out = norm_in_fp32(norm, x)
    assert out.dtype == torch.float32 and not kept
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    gradients = [torch.autograd.grad(y, (x, norm.weight), grad) for y in (out, expected)]
    tolerance = 1e-6 if dtype == torch.float32 else 0.01  # one bit of bf16
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=1e-5)


def test_split_attention_equals_dense_mask():
    q, k, v = torch.randn(3, 2, 4, 30, 16)
    for num_context in (1, 12, 29):
        split = split_attention(q, k, v, num_context)
        assert torch.allclose(split, dense_mask_attention(q, k, v, num_context), atol=1e-6)


def test_attention_of_context_ignores_the_rest(monkeypatch):
    attention = Attention(32, 2, torch.nn.RMSNorm)
    x = torch.randn(1, 10, 32)
    y = torch.cat([x[:, :6], torch.randn(1, 4, 32)], 1)
    split = attention(x, num_context=6)
    assert torch.equal(split[:, :6], attention(y, num_context=6)[:, :6])
    monkeypatch.setattr(model, 'split_attention', dense_mask_attention)
    assert torch.allclose(attention(x, num_context=6), split, atol=1e-6)


needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='there is no compiler')


@pytest.mark.parametrize('backend', [
    'eager', pytest.param('inductor', marks=[pytest.mark.slow, needs_compiler])])
def test_compiled_block_equals_eager(backend, restored_compiler):
    block = Block(32, 2, torch.nn.RMSNorm)
    rope = RoPE2D((3, 4), 16, num_views=2, special_per_view=2)
    x = torch.randn(2, 28, 32)
    eager = [block(x, rope), block(x, rope, num_context=14)]
    compile_blocks(block, backend=backend)
    compiled = [block(x, rope), block(x, rope, num_context=14)]
    for one, other in zip(compiled, eager):
        assert torch.allclose(one, other, atol=1e-5)


def test_rows_that_do_not_leave_are_not_needed():
    """The last block computes the rows that leave alone: they are those of the whole block."""
    block = Block(32, 2, torch.nn.RMSNorm)
    rope = RoPE2D((2, 4), 16, num_views=2, special_in_front=3, special_behind=5)
    x = torch.randn(2, 24, 32, requires_grad=True)
    whole = block(x, rope)[:, -5:]
    kept = block(x, rope, num_kept=5)
    assert kept.shape == (2, 5, 32)
    assert torch.allclose(kept, whole, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (whole, kept)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_without_blocks_only_what_is_asked_for_leaves():
    out = Transformer(32, 0, 2)(torch.randn(2, 9, 32), NoPosition(), 4)
    assert out.shape == (2, 4, 32)


def test_checkpointing_changes_memory_and_nothing_else():
    torch.manual_seed(0)
    transformer = Transformer(64, 6, 2)
    x = torch.randn(2, 40, 64)
    results = []
    for transformer.checkpointing in (False, True):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        transformer.zero_grad()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = transformer(x, NoPosition(), 7)
        out.square().sum().backward()
        gradients = [p.grad.clone() for p in transformer.parameters()]
        results.append((out, gradients, sum(kept.values())))
    (out, gradients, bytes_kept), (again, same, fewer) = results
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same))
    assert fewer < 0.5 * bytes_kept


class NoPosition:
    def rotate(self, q, k, v):
        return q, k, v

    def restore(self, out):
        return out


# -----------------------------------------------------------------------------
# MLP

def test_an_mlp_that_keeps_less_is_the_same():
    torch.manual_seed(0)
    mlp = model.MLP(8, 16, 4).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 4, dtype=torch.float64)
    plain = mlp.fc2(F.gelu(mlp.fc1(x)))
    expected = torch.autograd.grad((plain * weight).sum(), [x, *mlp.parameters()])
    found = torch.autograd.grad((mlp(x) * weight).sum(), [x, *mlp.parameters()])
    assert torch.equal(mlp(x), plain)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected))

    # under autocast too, where it keeps half of what plain operations keep
    mlp = mlp.float()
    kept = []
    for run in (mlp, lambda x: mlp.fc2(F.gelu(mlp.fc1(x)))):
        with storages_kept(mlp.parameters()) as storages, torch.autocast('cpu', torch.bfloat16):
            out = run(torch.randn(500, 8))
        out.float().sum().backward()
        assert out.dtype == torch.bfloat16
        kept.append(sum(storages.values()))
    assert kept[0] < 0.7 * kept[1]
    mlp.requires_grad_(False)
    assert not mlp(torch.randn(5, 8)).requires_grad


# -----------------------------------------------------------------------------
# the encoder

def test_encoder_treats_views_as_a_set_and_samples_apart():
    encoder = Encoder(24, 32, depth=2, num_heads=2, num_latents=5).eval()
    features = torch.randn(3, 4, 6, 24)
    z = encoder(features, (2, 3))
    assert z.shape == (3, 5, 32)
    other_order = features[:, [2, 0, 3, 1]]
    assert torch.allclose(encoder(other_order, (2, 3)), z, atol=1e-5)
    alone = features[1:2]
    assert torch.allclose(encoder(alone, (2, 3)), z[1:2], atol=1e-5)
    other_places = features[:, :, [5, 3, 4, 0, 2, 1]]
    assert not torch.allclose(encoder(other_places, (2, 3)), z, atol=1e-3)
