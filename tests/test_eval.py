"""What is measured of a field, and of its latents. The commands run on a tiny PSFM; the shipped encoder is tested as it is."""
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
from data import RoomPool, make_source
from eval import attentive_probe, fact_scores, field_along, main, ridge_probe, runs_table
from model import InputError
from psfm import build_psfm, load_psfm
from test_train import TINY, refuse
from train import main as train
from vggt import scene_extrinsics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Folder of a finished run of a tiny PSFM."""
    out = tmp_path_factory.mktemp('tiny') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(['--config', 'small', *TINY, '--out', str(out)])
    return out


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


# -----------------------------------------------------------------------------
# probes

def test_ridge_finds_what_is_linear_and_only_that():
    g = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(300, 20, generator=g), torch.randn(200, 20, generator=g)
    facts = lambda x: torch.stack([3 * x[:, 0] - x[:, 7] + 5, x[:, 1] * x[:, 2]], 1)
    y = facts(x)
    y[:200, 0] = math.nan                                         # not defined in most rooms
    answers, truth = ridge_probe(x, y, x_test), facts(x_test)
    assert torch.allclose(answers[:, 0], truth[:, 0], atol=0.02)
    assert 1 - (answers[:, 1] - truth[:, 1]).square().sum() / truth[:, 1].square().sum() < 0.1


def test_ridge_chooses_its_penalty_by_leaving_one_out():
    """The answers equal those of plain ridge regression with the penalty that wins when every room is left out in turn."""
    g = torch.Generator().manual_seed(1)
    x, x_test = torch.randn(30, 8, generator=g).double(), torch.randn(5, 8, generator=g).double()
    y = x[:, :1] + 0.5 * torch.randn(30, 1, generator=g).double()
    scale = (x.std(0) + 1e-6) * 8 ** 0.5

    def answer(x, y, asked, penalty):
        u, v = (x - x.mean(0)) / scale, (asked - x.mean(0)) / scale
        return v @ torch.linalg.solve(u.T @ u + penalty * torch.eye(8), u.T @ (y - y.mean(0))) + y.mean(0)
    errors = {}
    for penalty in (10.0 ** torch.arange(-4, 3.1, 0.5)).tolist():
        others = [[j for j in range(30) if j != i] for i in range(30)]
        errors[penalty] = sum((answer(x[others[i]], y[others[i]], x[i], penalty) - y[i]).square().item() for i in range(30))
    expected = answer(x, y, x_test, min(errors, key=errors.get))
    assert 1e-3 < min(errors, key=errors.get) < 1e3
    assert torch.allclose(ridge_probe(x, y, x_test).double(), expected, atol=1e-5)


def test_the_attentive_probe_finds_the_token_that_a_mean_hides():
    g = torch.Generator().manual_seed(0)
    def scenes(n):                                                # one token of eight is marked; the fact stands in it
        x, place = torch.randn(n, 8, 12, generator=g), torch.randint(8, (n,), generator=g)
        x[..., 0] = -3.0
        x[torch.arange(n), place, 0] = 3.0
        return x, x[torch.arange(n), place, 1:3].clone()
    (x, y), (x_test, truth) = scenes(1200), scenes(200)
    y[::3, 1] = math.nan
    r2 = lambda answers: 1 - (answers - truth).square().sum() / truth.square().sum()
    assert r2(attentive_probe(x, y, x_test)) > 0.7
    assert r2(attentive_probe(x.mean(1, keepdim=True), y, x_test.mean(1, keepdim=True))) < 0.4


def some_facts(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    facts = {name: torch.randn(n, 4, generator=g) for name in evaluation.FACTS}
    facts['presence'] = (facts['presence'] > 0).float()
    facts['place'][::2] = math.nan
    return facts


def test_scores_of_facts():
    truth, fitted = some_facts(100), some_facts(500, seed=1)
    perfect = fact_scores(truth, truth, fitted)
    assert all(score == [1, 1, 1] for score in perfect.values())
    means = {name: fitted[name].nanmean(0).expand(100, -1) for name in truth}
    none = fact_scores(means, truth, fitted)
    assert all(score == [0, 0, 0] for name, score in none.items() if name != 'presence')
    half = {name: (truth[name] + means[name]) / 2 for name in truth}
    for name, (score, low, high) in fact_scores(half, truth, fitted).items():
        assert low <= score <= high and (name == 'presence' or score == pytest.approx(0.75))
    noisy = {name: truth[name] + 0.5 * torch.randn(100, 4, generator=torch.Generator().manual_seed(2)) for name in truth}
    fitted['place'][9:, 0] = math.nan                             # a number that nine rooms have: not asked for
    noisy['place'][:, 0] = 1e6
    assert fact_scores(noisy, truth, fitted)['place'][0] > 0.5
    score, low, high = fact_scores(noisy, truth, fitted)['sides']
    assert low < score - 0.01 and high > score + 0.01             # a hundred rooms leave some doubt


def test_what_is_probed_is_what_it_is_called(tiny):
    psfm, config = load_psfm(tiny)
    other = build_psfm(config)
    tokens, facts = evaluation.rooms_to_probe(psfm, other, config, 'val', 0, 8, 3, torch.device('cpu'), torch.autocast('cpu', enabled=False))
    rooms, block = RoomPool('val', 0, 8).render_block(1)
    images = block['images'][:, :3].float() / 255
    assert torch.allclose(tokens['latents'][4:], psfm.latents(images), atol=1e-5)
    assert not torch.allclose(tokens['untrained'], tokens['latents'], atol=1e-2)
    with torch.no_grad():
        features = psfm.backbone(images).features
    assert torch.allclose(tokens['pooled'][4:, 0], features.mean((1, 2)), atol=1e-5)
    assert tokens['tokens'].shape == (8, 3 * 16, 256) and torch.allclose(tokens['tokens'][4:].mean(1), features.mean((1, 2)), atol=1e-5)
    assert torch.equal(facts['sides'][4:], rooms.size[:, :2].sort(1).values)


def test_probe_command(tiny, capsys):
    main(['probe', '--run', str(tiny), '--rooms', '200', '--held-out', '100', '--views', '2', '--device', 'cpu'])
    said, scores = capsys.readouterr().out, json.loads((tiny / 'probe.json').read_text())
    assert scores.keys() == {'mean'} | {f'{name} {kind}' for name in evaluation.PROBED for kind in ('ridge', 'attentive')}
    assert scores['mean']['sides'][0] == pytest.approx(0, abs=1e-6) and scores['tokens ridge']['sides'][0] > 0.2
    assert 'latents z of the trained encoder' in said and 'side lengths' in said


def test_the_shipped_encoder_keeps_what_the_readme_says():
    psfm, config = load_psfm(evaluation.SHIPPED)
    config.num_rooms = config.val_scenes = 24
    sources = [make_source(config, split, 8) for split in ('train', 'val')]
    metrics = evaluation.evaluate_field(psfm, *sources, 0, config, torch.device('cpu'), torch.autocast('cpu', enabled=False))
    assert metrics['psfm']['r2'] > 0.6 and metrics['psfm']['r2'] > metrics['camera']['r2'] + 0.2
    assert metrics['read_out']['psfm']['object_recall'] > 0.35 > 5 * metrics['read_out']['camera']['object_recall']


# -----------------------------------------------------------------------------
# pictures, tables

@pytest.mark.parametrize('context', ['asymmetric', 'separate'])
def test_the_film_predicts_from_the_context_alone_and_from_the_right_cameras(tiny, context):
    """With the walk's own cameras as the path: what the film shows is what the field says when it is asked directly."""
    psfm, config = load_psfm(tiny)
    psfm.context = context
    _, block = RoomPool('val', 0, 4).render_block(0)
    images, cameras = block['images'][0].float() / 255, scene_extrinsics(block['extrinsics'][:1])[0]
    intrinsics = block['intrinsics'][0, 0]
    features, predicted, grid = field_along(psfm, images[:4], images[4:], cameras[4:], intrinsics)
    with torch.no_grad():
        seen = psfm.backbone(images[None, :4])
        z = psfm.encode(seen.features, seen.grid)
        expected = psfm.decode(z, cameras[None, 4:], intrinsics.expand(1, 4, 3, 3), (64, 64), grid)[0]
    assert torch.allclose(predicted, expected, atol=1e-4) and features.shape == predicted.shape
    other_features, again, _ = field_along(psfm, images[:4], torch.rand_like(images[4:]), cameras[4:], intrinsics)
    assert torch.equal(again, predicted) and not torch.allclose(other_features, features, atol=1e-2)
    moved = field_along(psfm, images[:4], images[4:], cameras[4:].roll(1, 0), intrinsics)[1]
    assert not torch.allclose(moved, predicted, atol=1e-4)


def test_a_film_of_the_field(tiny):
    main(['field', '--run', str(tiny), '--path', '--device', 'cpu'])
    film = Image.open(tiny / 'path.gif')
    assert film.n_frames == 36
    frames = []
    for i in (0, 18):
        film.seek(i)
        frames.append(torch.tensor(list(film.convert('RGB').tobytes())))
    assert (frames[0] != frames[1]).float().mean() > 0.1          # the camera moves


def test_runs_of_one_configuration_share_a_row(tmp_path):
    for name, latents, seed, r2 in [('a', 32, 0, 0.6), ('b', 32, 1, 0.7), ('c', 8, 0, 0.5)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps(dict(num_latents=latents, seed=seed, out=name)))
        read_out = dict(psfm=dict(object_recall=0.3, depth_abs_rel=0.2))
        (tmp_path / name / 'metrics.json').write_text(json.dumps(dict(psfm=dict(r2=r2), camera=dict(r2=0.4), read_out=read_out, seconds=60)))
    rows = runs_table([str(tmp_path / name) for name in 'abc']).splitlines()
    assert len(rows) == 3 and rows[1].split()[:5] == ['(the', 'first)', '2', '0.650', '±0.050']
    assert rows[2].split()[:3] == ['num_latents=8', '1', '0.500']
    (tmp_path / 'a' / 'metrics.json').unlink()
    assert runs_table([str(tmp_path / name) for name in 'ab']).splitlines()[-1] == f'left out, not a finished PSFM run: {tmp_path}/a'
    with pytest.raises(InputError, match='no finished PSFM run among'):
        runs_table([str(tmp_path / 'a')])


@pytest.mark.parametrize('arguments,message', [
    (['probe', '--views', '9'], '--views 9: a room has 8 views'),
    (['probe', '--rooms', '401'], 'multiples of 4'),
    (['probe', '--run', 'weights/none.safetensors'], 'no weights at weights/none.safetensors'),
    (['probe', '--rooms', '10'], 'at least 200 and 100'),
    (['runs', 'nowhere'], 'no finished PSFM run among nowhere'),
    (['field', '--run', 'weights/mini_vggt.safetensors'], 'weights/mini_vggt.safetensors does not hold a PSFM'),
    (['probe', '--run', 'README.md'], 'README.md is not a safetensors file'),
])
def test_bad_input(arguments, message):
    refuse(message, *arguments, script='eval.py')
