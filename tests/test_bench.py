"""bench.py: what it prints, and that what it predicts from shapes is what it counts."""
import dataclasses
import json

import pytest
import torch

import bench
from common import InputError
from test_train import run
from train import PRESETS, Config

SMALL = dataclasses.replace(Config(**PRESETS['small']), images_per_batch=8)


@pytest.mark.slow
def test_bench_ends_with_json():
    code, said = run('bench.py', '--images', '8', '--repeats', '1', '--device', 'cpu')
    assert code == 0, said
    report = json.loads(said.strip().splitlines()[-1])
    assert report['runs'][0]['parts'].keys() \
        == {'patch embed', 'frame blocks', 'global blocks', 'camera head', 'encoder', 'decoder',
            'head and loss', 'backward'}
    assert report['runs'][0]['render_share'] < 0.5
    assert min(report['finetune']['anew_ms'], report['finetune']['kept_ms']) > 0


def test_what_is_predicted_from_shapes_is_what_was_counted():
    clock = bench.Clock(torch.device('cpu'), repeats=1)
    psfm = bench.build(SMALL, torch.float32)
    images = torch.rand(bench.batch_shape(SMALL, 6))
    with torch.autocast('cpu', enabled=False) as autocast:
        rows = bench.time_parts(psfm, images, clock, autocast)
    counted = {part: flops for part, _, flops in rows}
    assert all(ms > 0 and flops > 0 for _, ms, flops in rows)
    predicted = bench.predict('small', SMALL, 6)
    for part in ('patch embed', 'camera head', 'encoder', 'decoder'):
        assert predicted['flops'][part] == counted[part], part
    assert predicted['trained'] == 1_427_328 - 2 * 256 and predicted['kept_gb'] > 0


def test_a_dense_mask_gives_the_same():
    clock = bench.Clock(torch.device('cpu'), repeats=1)
    backbone = bench.build(SMALL, torch.float32).backbone
    images = torch.rand(bench.batch_shape(SMALL, 4))
    text, ratio = bench.compare_masks(backbone, images, clock, torch.autocast('cpu', enabled=False))
    assert float(text.split('largest difference ')[1].split()[0]) < 1e-4 and ratio > 0


def test_predict_ends_with_json(capsys):
    bench.main(['--images', '8', '--views', '4', '8', '--predict'])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(run['scenes'], run['views']) for run in report] == [(2, 4), (1, 8)]


@pytest.mark.parametrize('name', PRESETS)
def test_bench_knows_every_preset(name, monkeypatch):
    def reached(config):
        raise InputError('reached the model')

    monkeypatch.setattr(bench, 'VGGT', reached)
    with pytest.raises(InputError, match='reached the model'):
        bench.main(['--config', name, '--device', 'cpu'])
