import shutil

import pytest
import torch

import model
from bench import dense_mask_attention
from model import Attention, Block, Encoder, RoPE2D, camera_rays, invert_pose, relative_pose, split_attention, to_4x4


def random_extrinsics(*shape):
    rotation = torch.linalg.qr(torch.randn(*shape, 3, 3)).Q
    rotation = rotation * rotation.det()[..., None, None]
    return torch.cat([rotation, torch.randn(*shape, 3, 1)], -1)


def test_camera_algebra():
    a, b = random_extrinsics(5), random_extrinsics(5)
    assert torch.allclose(to_4x4(invert_pose(a)), torch.linalg.inv(to_4x4(a)), atol=1e-5)
    assert torch.allclose(to_4x4(relative_pose(a, b)) @ to_4x4(b), to_4x4(a), atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):      # geometry stays in fp32 under autocast
        assert torch.equal(relative_pose(a, b), relative_pose(a, b).float())


def test_rays_project_back():
    intrinsics = torch.tensor([[50., 0, 30], [0, 60, 22], [0, 0, 1]])
    rays = camera_rays(intrinsics, (40, 56), (5, 7))
    pixels = (rays @ intrinsics.T)[:, :2].view(5, 7, 2)
    assert torch.allclose(pixels[0, 0], torch.tensor([4., 4.])) and torch.allclose(pixels[4, 6], torch.tensor([52., 36.]))


def test_rope_depends_on_relative_place_only():
    rope = RoPE2D(1, (4, 6), head_dim=16)
    q, k = torch.randn(16), torch.randn(16)
    scores = rope.turn(q.expand(1, 1, 25, 16))[0, 0] @ rope.turn(k.expand(1, 1, 25, 16))[0, 0].T
    grid = scores[1:, 1:].view(4, 6, 4, 6)
    assert torch.allclose(grid[0, 0, 2, 3], grid[1, 2, 3, 5], atol=1e-5)
    assert not torch.allclose(grid[0, 0, 2, 3], grid[0, 0, 3, 2], atol=1e-3)
    assert torch.allclose(scores[0, 0], q @ k)                            # a special token is not turned at all


def test_split_attention_equals_dense_mask():
    q, k, v = torch.randn(3, 2, 4, 30, 16)
    for num_context in (1, 12, 29):
        assert torch.allclose(split_attention(q, k, v, num_context), dense_mask_attention(q, k, v, num_context), atol=1e-6)


def test_attention_of_context_ignores_the_rest(monkeypatch):
    attention = Attention(32, 2, torch.nn.RMSNorm)
    x = torch.randn(1, 10, 32)
    y = torch.cat([x[:, :6], torch.randn(1, 4, 32)], 1)
    assert torch.equal(attention(x, num_context=6)[:, :6], attention(y, num_context=6)[:, :6])
    split = attention(x, num_context=6)
    monkeypatch.setattr(model, 'split_attention', dense_mask_attention)
    assert torch.allclose(attention(x, num_context=6), split, atol=1e-6)


def test_encoder_treats_views_as_a_set_and_samples_apart():
    encoder = Encoder(24, 32, depth=2, num_heads=2, num_latents=5).eval()
    features = torch.randn(3, 4, 6, 24)
    z = encoder(features, (2, 3))
    assert z.shape == (3, 5, 32)
    assert torch.allclose(encoder(features[:, [2, 0, 3, 1]], (2, 3)), z, atol=1e-5)       # order of context views
    assert torch.allclose(encoder(features[1:2], (2, 3)), z[1:2], atol=1e-5)              # batch-mates
    assert not torch.allclose(encoder(features[:, :, torch.randperm(6)], (2, 3)), z, atol=1e-3)   # but places matter


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a compiler')
def test_compiled_block_equals_eager():
    block, rope = Block(32, 2, torch.nn.RMSNorm), RoPE2D(2, (3, 4), 16, repeats=2)
    x = torch.randn(2, 28, 32)
    eager = [block(x, rope), block(x, rope, num_context=14)]
    block.compile(dynamic=True)
    for compiled, plain in zip([block(x, rope), block(x, rope, num_context=14)], eager):
        assert torch.allclose(compiled, plain, atol=1e-5)
