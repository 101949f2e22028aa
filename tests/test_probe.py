"""The facts that probes are asked for, and the probes."""
import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from data import RoomPool
from probe import (attentive_probe, fact_scores, FACTS, kernel_ridge, probe_latents, probe_table,
                   PROBED, ridge_probe, room_facts, rooms_to_probe)
from psfm import PSFM, PSFMConfig
from rooms import CATEGORIES, K, SEEN
from vggt import VGGT


def test_facts_of_rooms_are_those_of_their_object_lists(world):
    rooms, extrinsics, _, views = world
    surface = views['surface'][:, :5]
    facts = room_facts(rooms, surface, extrinsics[:, :5])
    for r in range(6):
        seen = [k for k in range(K) if (surface[r] == 6 + k).sum() >= SEEN]
        kinds = [CATEGORIES[rooms.category[r, k]] for k in seen]
        assert facts['objects'][r].item() == len(seen) > 0
        assert facts['sides'][r].tolist() == sorted(rooms.size[r, :2].tolist())
        assert facts['count'][r].tolist() == [kinds.count(name) for name in CATEGORIES]
        assert facts['presence'][r].tolist() == [name in kinds for name in CATEGORIES]

        # where the only piece of a category stands, in the first camera's frame
        places = {}
        for name, place in zip(CATEGORIES, facts['place'][r].view(-1, 3), strict=True):
            if kinds.count(name) == 1:
                center = rooms.center[r, seen[kinds.index(name)]]
                places[name] = extrinsics[r, 0] @ torch.cat([center, torch.ones(1)])
                assert torch.allclose(place, places[name], atol=1e-5)
            else:
                assert place.isnan().all()
        pairs = itertools.combinations(CATEGORIES, 2)
        for (a, b), distance in zip(pairs, facts['distance'][r], strict=True):
            if a in places and b in places:
                assert torch.isclose(distance, (places[a] - places[b]).norm(), atol=1e-5)
            else:
                assert distance.isnan()


NO_AUTOCAST = contextlib.nullcontext()


def r2(answers, truth):
    return 1 - (answers - truth).square().sum() / truth.square().sum()


def test_ridge_finds_what_is_linear_and_only_that():
    g = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(300, 20, generator=g), torch.randn(200, 20, generator=g)

    def facts(x):
        return torch.stack([3 * x[:, 0] - x[:, 7] + 5, x[:, 1] * x[:, 2]], 1)

    y, truth = facts(x), facts(x_test)
    y[:200, 0] = math.nan  # not defined in most rooms
    answers = ridge_probe(x, y, x_test)
    assert torch.allclose(answers[:, 0], truth[:, 0], atol=0.02)
    assert r2(answers[:, 1], truth[:, 1]) < 0.1


def test_ridge_chooses_its_penalty_by_leaving_one_out():
    """Plain ridge regression, with the penalty that wins when every room is left out in turn."""
    g = torch.Generator().manual_seed(1)
    x, x_test = torch.randn(30, 8, generator=g).double(), torch.randn(5, 8, generator=g).double()
    y = x[:, :1] + 0.5 * torch.randn(30, 1, generator=g).double()
    scale = (x.std(0) + 1e-6) * 8 ** 0.5

    def answer(x, y, asked, penalty):
        u, v = (x - x.mean(0)) / scale, (asked - x.mean(0)) / scale
        weights = torch.linalg.solve(u.T @ u + penalty * torch.eye(8), u.T @ (y - y.mean(0)))
        return v @ weights + y.mean(0)

    errors = {}
    for penalty in (10.0 ** torch.arange(-4, 3.1, 0.5)).tolist():
        errors[penalty] = 0
        for i in range(30):
            others = [j for j in range(30) if j != i]
            error = answer(x[others], y[others], x[i], penalty) - y[i]
            errors[penalty] += error.square().item()
    best = min(errors, key=errors.get)
    assert 1e-3 < best < 1e3
    expected = answer(x, y, x_test, best)
    assert torch.allclose(ridge_probe(x, y, x_test).double(), expected, atol=1e-5)

    # the same from products alone
    u, v = x / scale, x_test / scale
    assert torch.allclose(kernel_ridge(u @ u.T, v @ u.T, y), expected, atol=1e-5)


def test_the_attentive_probe_finds_the_token_that_a_mean_hides():
    g = torch.Generator().manual_seed(0)

    def scenes(n):
        """One token of eight is marked; the facts stand in it."""
        x, place = torch.randn(n, 8, 12, generator=g), torch.randint(8, (n,), generator=g)
        x[..., 0] = -3.0
        x[torch.arange(n), place, 0] = 3.0
        return x, x[torch.arange(n), place, 1:3].clone()

    (x, y), (x_test, truth) = scenes(1200), scenes(200)
    y[::3, 1] = math.nan
    assert r2(attentive_probe(x, y, x_test), truth) > 0.7
    means = x.mean(1, keepdim=True), y, x_test.mean(1, keepdim=True)
    assert r2(attentive_probe(*means), truth) < 0.4


# -----------------------------------------------------------------------------
# scores

def some_facts(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    facts = {name: torch.randn(n, 4, generator=g) for name in FACTS}
    facts['presence'] = (facts['presence'] > 0).float()
    facts['place'][::2] = math.nan
    return facts


def test_scores_of_right_answers_of_means_and_of_what_lies_between():
    truth, fitted = some_facts(100), some_facts(500, seed=1)
    perfect = fact_scores(truth, truth, fitted)
    assert perfect.keys() == FACTS.keys()
    assert all(score == [1, 1, 1] for score in perfect.values())

    means = {name: fitted[name].nanmean(0).expand(100, -1) for name in truth}
    none = fact_scores(means, truth, fitted)
    assert all(score == [0, 0, 0] for name, score in none.items() if name != 'presence')

    half = {name: (truth[name] + means[name]) / 2 for name in truth}
    for name, (score, low, high) in fact_scores(half, truth, fitted).items():
        assert low <= score <= high
        assert name == 'presence' or score == pytest.approx(0.75)


def test_scores_of_noise_and_of_rare_numbers():
    truth, fitted = some_facts(100), some_facts(500, seed=1)
    g = torch.Generator().manual_seed(2)
    noisy = {name: truth[name] + 0.5 * torch.randn(100, 4, generator=g) for name in truth}

    # a number that nine rooms have is not asked for
    fitted['place'][9:, 0] = math.nan
    noisy['place'][:, 0] = 1e6
    scores = fact_scores(noisy, truth, fitted)
    assert scores['place'][0] > 0.5

    # a hundred rooms leave some doubt
    score, low, high = scores['sides']
    assert low < score - 0.01
    assert high > score + 0.01


# -----------------------------------------------------------------------------
# what is probed

@pytest.fixture(scope='module')
def tiny():
    """A tiny PSFM on the shipped mini VGGT, never trained, and its options."""
    torch.manual_seed(0)
    sizes = PSFMConfig(width=32, encoder_depth=1, decoder_depth=1, num_latents=4)
    backbone = VGGT.from_pretrained('weights/mini_vggt.safetensors').freeze()
    config = SimpleNamespace(**vars(sizes), image_width=64)
    return PSFM(backbone, sizes).eval(), config


def test_what_is_probed_is_what_it_is_called(tiny):
    psfm, config = tiny
    other = PSFM(psfm.backbone, config).eval()
    tokens, facts = rooms_to_probe(psfm, other, config, 'val', 0, 8, 3, NO_AUTOCAST)
    rooms, block = RoomPool('val', 0, 8).render_block(1)
    images = block['images'][:, :3].float() / 255
    with torch.no_grad():
        features = psfm.backbone(images).features
    assert torch.allclose(tokens['latents'][4:], psfm.latents(images), atol=1e-5)
    assert torch.allclose(tokens['untrained'][4:], other.latents(images), atol=1e-5)
    assert not torch.allclose(tokens['untrained'], tokens['latents'], atol=1e-2)
    assert torch.allclose(tokens['pooled'][4:, 0], features.mean((1, 2)), atol=1e-5)
    assert tokens['tokens'].shape == (8, 3 * 16, 256)
    assert torch.allclose(tokens['tokens'][4:].mean(1), features.mean((1, 2)), atol=1e-5)
    assert torch.equal(facts['sides'][4:], rooms.size[:, :2].sort(1).values)
    assert facts.keys() == FACTS.keys()


def test_all_probes_of_a_few_rooms(tiny):
    scores = probe_latents(*tiny, 24, 12, 2, NO_AUTOCAST)
    kinds = {f'{name} {kind}' for name in PROBED for kind in ('ridge', 'attentive')}
    assert scores.keys() == {'mean'} | kinds
    assert scores['mean']['sides'][0] == pytest.approx(0, abs=1e-6)
    assert all(row.keys() == FACTS.keys() for row in scores.values())
    table = probe_table(scores).splitlines()
    assert len(table) == 2 + len(kinds)
    assert 'side lengths' in table[0]
    assert any('latents z of the trained encoder' in row for row in table)
