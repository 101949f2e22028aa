"""The mini VGGT: what it is taught, how it is measured, and python mini_vggt.py from end to end."""
import contextlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import mini_vggt
from backbone import Views
from common import read_weights
from data import RoomPool
from mini_vggt import (MINI, Config, MiniVGGTTrainer, area_under_curve, evaluate_backbone,
                       make_batch, pose_errors)
from psfm import build_psfm
from rooms import CLASSES, SCENE_UNIT, scene_extrinsics
from test_train import losses
from test_vggt import TINY
from train import Config as TrainConfig


def options(out, *more):
    return ['--num-rooms', '8', '--val-scenes', '8', '--log-every', '1', '--device', 'cpu',
            '--dtype', 'float32', '--out', str(out), *more]


# -----------------------------------------------------------------------------
# what it is taught

def test_every_weight_learns():
    torch.manual_seed(0)
    trainer, pool = MiniVGGTTrainer(TINY), RoomPool('train', 0, 4)
    losses = trainer(**pool.batch(0, 2, 3))
    losses['loss'].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert [name for name, p in trainer.named_parameters() if p.grad is None] == []


def test_targets_agree_with_the_renderer():
    """A patch's point, in the first camera's frame, is the same from every view that sees it:
    depth, rays and cameras agree."""
    trainer, batch = MiniVGGTTrainer(TINY), RoomPool('train', 3, 4).batch(0, 4, 4)
    truth = trainer.truth(batch['depth'], batch['extrinsics'], batch['intrinsics'], (64, 64))
    camera = truth['extrinsics'][:, :, None, None]  # (B, V, 1, 1, 3, 4)
    local = (camera[..., :3] @ truth['points'][..., None])[..., 0] + camera[..., 3]
    assert torch.allclose(local[..., 2], truth['depth'], atol=1e-4)
    first = torch.eye(3, 4).expand(4, 3, 4)
    assert torch.allclose(truth['extrinsics'][:, 0], first, atol=1e-5)
    field_of_view = torch.tensor(math.radians(80))
    assert torch.allclose(truth['field_of_view'], field_of_view, atol=1e-5)


def test_matches_are_sought_between_every_two_views():
    """As one pair after the other; a patch that no other view sees counts for nothing."""
    torch.manual_seed(0)
    points = torch.rand(1, 3, 5, 3)
    points[:, 1] = points[:, 0, [2, 0, 1, 4, 3]] + 0.01
    points[:, 2] = points[:, 0] + 0.02
    points[:, :, 4] += 10 * torch.arange(3.0)[:, None]
    descriptors = F.normalize(torch.randn(1, 3, 5, 32), dim=-1)
    losses = []
    for i in range(3):
        for j in range(3):
            distance, match = torch.cdist(points[0, i], points[0, j]).min(-1)
            logits = descriptors[0, i] @ descriptors[0, j].T / 0.07
            one = F.cross_entropy(logits, match, reduction='none')[distance < 0.08]
            losses.append(one if i != j else one[:0])
    losses = torch.cat(losses)
    assert 0 < len(losses) < 30
    found = MiniVGGTTrainer.match_loss(descriptors, points)
    torch.testing.assert_close(found, losses.mean())


def test_lessons_go_from_two_views_to_six():
    pool = RoomPool('train', 0, 8)

    def views(first):
        config = Config(steps=1000)
        return {make_batch(pool, step, config)['images'].shape[1]
                for step in range(first, first + 12)}

    assert views(0) == {2} and views(120) == {2, 3, 4} and views(800) == {3, 4, 5, 6}


# -----------------------------------------------------------------------------
# how good it is

def test_pose_errors():
    truth = scene_extrinsics(RoomPool('val', 0, 4).batch(0, 2, 4)['extrinsics'])
    rotation, direction = pose_errors(truth, truth)
    assert rotation.shape == (2, 6)
    assert rotation.max() < 0.1 and direction.max() < 0.1
    # 90 degrees about the axis, after the first camera
    turned = truth.clone()
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    turned[:, 1:] = turn @ truth[:, 1:]
    rotation, direction = pose_errors(turned, truth)
    assert torch.allclose(rotation[:, :3], torch.tensor(90.0), atol=0.1)
    # every camera moved the opposite way
    away = truth.clone()
    away[..., 3] *= -1
    rotation, direction = pose_errors(away, truth)
    assert rotation.max() < 0.1 and direction[:, :3].min() > 179


def test_area_under_curve():
    rotation, direction = torch.tensor([1.5, 40.]), torch.tensor([0.5, 0.])
    assert area_under_curve(rotation, direction, 5) == pytest.approx(0.4)


class Oracle:
    """A pool, and a backbone that answers with the truth about the pool's last batch."""

    def __init__(self):
        self.pool = RoomPool('val', 0, 8)

    def batch(self, *arguments):
        self.last = self.pool.batch(*arguments)
        return self.last

    def __call__(self, images):
        return Views(None, scene_extrinsics(self.last['extrinsics']), None, None)

    def read_out(self, features, grid):
        logits = F.one_hot(self.last['classes'], len(CLASSES)).float()
        return self.last['depth'] / SCENE_UNIT, logits


def test_the_truth_scores_best_and_what_is_trivial_stands_beside_it():
    oracle = Oracle()
    metrics = evaluate_backbone(oracle, oracle, 8, contextlib.nullcontext())
    assert metrics.keys() == {'2 views', '4 views', '6 views', '8 views'}
    for m in metrics.values():
        assert m['rotation'] < 0.1 and m['direction'] < 0.1 and m['auc5'] == m['auc30'] == 1
        assert m['depth_abs_rel'] == 0 and m['class_accuracy'] == m['object_recall'] == 1
        assert m['trivial']['rotation'] > 20
        assert 0.2 < m['trivial']['depth_abs_rel'] < 1


# -----------------------------------------------------------------------------
# the script

def test_trains_and_exports(tmp_path):
    mini_vggt.main(options(tmp_path, '--steps', '2'))
    path = tmp_path / 'mini_vggt.safetensors'
    assert path.stat().st_size < 16 << 20
    _, metadata = read_weights(path)
    assert metadata['command'].startswith('python mini_vggt.py --num-rooms 8')
    assert json.loads(metadata['training'])['steps'] == 2
    assert json.loads(metadata['metrics'])['6 views']['rotation'] > 0
    assert json.loads(metadata['config'])['classes'] == CLASSES
    assert [step for step, _, _ in losses(tmp_path)] == [1, 2]
    backbone = build_psfm(TrainConfig(backbone=str(path))).backbone
    assert backbone.frozen and backbone.config == MINI
    assert backbone(torch.rand(1, 2, 3, 64, 64)).features.shape == (1, 2, 64, 256)


def test_resume_continues_with_the_same_losses(tmp_path, monkeypatch):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    more = '--steps', '2', '--eval-every', '1'
    monkeypatch.setattr(mini_vggt, 'evaluate_backbone', lambda *_: {})
    monkeypatch.setattr(mini_vggt, 'backbone_line', str)
    monkeypatch.setattr(mini_vggt, 'backbone_table', str)
    mini_vggt.main(options(whole, *more))

    # stopped after one of two steps, as if the machine had gone down
    def stop(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    write = mini_vggt.write_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(mini_vggt, 'write_checkpoint', stop)
        with pytest.raises(KeyboardInterrupt):
            mini_vggt.main(options(parts, *more))
    begun = (parts / 'log.jsonl').read_text()
    state = json.loads((parts / 'checkpoint' / 'state.json').read_text())
    state['metrics']['seconds'] += 1000
    (parts / 'checkpoint' / 'state.json').write_text(json.dumps(state))
    mini_vggt.main(options(parts, *more, '--resume'))
    assert (parts / 'log.jsonl').read_text().startswith(begun)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 2
    *_, record, _ = map(json.loads, (parts / 'log.jsonl').read_text().splitlines())
    assert 1000 < record['seconds'] < 1100               # those of both sessions
    one, two = [load_file(out / 'mini_vggt.safetensors') for out in (whole, parts)]
    assert all(torch.equal(one[name], two[name]) for name in one)
