"""bench.py: what it prints, and that what it predicts from shapes is what it counts."""
import dataclasses
import itertools
import json
import os
import re
import sys

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import bench
import speed
from adapter import SpatialVLM, build_adapter
from common import InputError
from speed import TINY_QWEN
from test_train import run
from train import PRESETS, Config

SMALL = dataclasses.replace(Config(**PRESETS['small']), images_per_batch=8)


@pytest.mark.slow
def test_bench_ends_with_json():
    code, said = run('bench.py', '--images', '8', '--repeats', '1', '--device', 'cpu')
    assert code == 0, said
    report = json.loads(said.strip().splitlines()[-1])
    assert report['runs'][0]['parts'].keys() \
        == {'patch embed', 'alternating blocks', 'camera head', 'encoder', 'decoder',
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
    flops = {part: flops for part, flops, _ in predicted['parts']}
    for part in ('patch embed', 'alternating blocks', 'camera head', 'encoder', 'decoder'):
        assert flops[part] == counted[part], part
    assert predicted['trained'] == 1_427_328 - 2 * 256 and predicted['kept_gb'] > 0


@pytest.mark.parametrize('train', ['adapter', 'adapter+llm'])
def test_memory_of_a_vlm_is_what_the_tensors_hold(train):
    frozen, trained, backward = speed.count_vlm('qwen2_5_vl', TINY_QWEN, train, 300)
    vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**TINY_QWEN))
    model = SpatialVLM(vlm, build_adapter(vlm, 768)).train_only(train)
    numbers = {True: 0, False: 0}
    for p in model.parameters():
        numbers[p.requires_grad] += p.numel()
    size = 4 if train == 'adapter+llm' else 2
    assert frozen == pytest.approx(size * numbers[False] / 2 ** 30)
    assert trained == pytest.approx(16 * numbers[True] / 2 ** 30)
    inputs = 2 * 300 * 64 * size              # two layers
    logits = 100 * 151_936 * 4                # kept by the loss, in fp32
    cast = 151_936 * 64 * 2 if size == 4 else 0
    least = inputs + logits + cast
    assert least < backward * 2 ** 30 < 1.1 * least + 300 * 10_000


def test_a_dense_mask_gives_the_same():
    clock = bench.Clock(torch.device('cpu'), repeats=1)
    backbone = bench.build(SMALL, torch.float32).backbone
    images = torch.rand(bench.batch_shape(SMALL, 4))
    text, ratio = bench.compare_masks(backbone, images, clock, torch.autocast('cpu', enabled=False))
    assert float(text.split('largest difference ')[1].split()[0]) < 1e-4 and ratio > 0


def test_the_report_continues_where_it_was_cut_off(tmp_path, capsys):
    clock, done = speed.Clock(torch.device('cpu'), 1), []

    def part(name, ms):
        def measure():
            done.append(name)
            if isinstance(ms, type):
                raise ms('of the kernel')
            return dict(ms=ms, peak_gb=0.5, cold_s=1)
        return measure

    path = str(tmp_path / 'bench' / 'it.json')
    with pytest.raises(KeyboardInterrupt):
        speed.report(dict(a=part('a', 1.0), b=part('b', KeyboardInterrupt), c=part('c', 3.0)),
                     path, clock)
    results = speed.report(dict(a=part('a', 9.0), b=part('b', 2.0), x=part('x', RuntimeError),
                                y=part('y', InputError), c=part('c', 3.0)), path, clock)
    assert done == ['a', 'b', 'b', 'x', 'y', 'c'] and not {'x', 'y'} & set(results)
    said = capsys.readouterr()
    assert 'failed: RuntimeError: of the kernel\n' in said.out
    assert 'left out: of the kernel\n' in said.out and 'InputError' not in said.err
    assert [results[name]['ms'] for name in 'abc'] == [1, 2, 3]
    assert json.loads((tmp_path / 'bench' / 'it.json').read_text()) == results


@pytest.mark.parametrize('name', PRESETS)
def test_nothing_of_a_model_stays_behind_on_the_cpu(name):
    """As speed.py builds it: `meta` stands for a GPU."""
    with torch.device('meta'):
        psfm = speed.build(Config(**PRESETS[name]), torch.float32).to('meta')
    assert {x.device.type for x in (*psfm.parameters(), *psfm.buffers())} == {'meta'}


def test_parts_of_the_report():
    """Whole steps of a small PSFM, all of its changes, and of a tiny VLM."""
    clock = speed.Clock(torch.device('cpu'), 1)
    parts = speed.report_parts(dict(small=SMALL), clock, torch.float32, (4,), speed.TINY_QWEN,
                               can_compile=False)
    assert len(parts) == 11
    compiled = speed.report_parts(dict(small=SMALL), clock, torch.float32, (4,), speed.TINY_QWEN,
                                  can_compile=True)
    assert compiled.keys() - parts.keys() == {'small, 4 views, compiled',
                                              'VLM, adapter+llm, latents cached, compiled'}
    plain = parts['small, 4 views, eager']()
    assert plain['ms'] > 0 and plain['attention'] == 'flash_attention_for_cpu'
    again = parts['small, 4 views, eager, with --checkpointing']()
    flops = [x['tflops'] * x['ms'] for x in (plain, again)]     # what is computed twice counts once
    assert flops[0] == pytest.approx(flops[1])
    assert parts['VLM, adapter, latents computed']()['tokens'] == 8 * (4 + 2) + 200


def test_the_file_of_the_report_has_a_plain_name(monkeypatch):
    monkeypatch.setattr(bench, 'report', lambda parts, path, clock: path)
    path = bench.full_report(speed.Clock(torch.device('cpu'), 1), torch.bfloat16, 'A GPU (R) + 1')
    folder, file = os.path.split(path)
    assert folder == os.path.join('out', 'bench')
    assert re.fullmatch(r'A-GPU-R-1-bfloat16-[A-Za-z0-9._-]+\.json', file)


@pytest.mark.skipif('SPA3R' not in os.environ, reason='SPA3R=folder: a checkout of hustvl/Spa3R')
def test_beside_the_release():
    base = dataclasses.replace(Config(**PRESETS['base']), width=384, num_heads=6, num_latents=16,
                               image_width=112, images_per_batch=4)
    clock = speed.Clock(torch.device('cpu'), 1)
    result = speed.compare(os.environ['SPA3R'], base, 4, clock, torch.float32, full_size=False,
                           can_compile=False)
    losses = result['losses']
    assert losses['ours, separate'] == pytest.approx(losses['release, as shipped'], rel=1e-5)
    assert losses['ours, asymmetric'] == pytest.approx(losses['release, masked'], rel=1e-5)
    assert result['flops']['release, as shipped'] > result['flops']['ours, asymmetric'] > 0


def test_a_folder_that_is_not_the_release(tmp_path):
    with pytest.raises(InputError, match='is no checkout of hustvl/Spa3R'):
        bench.main(['--release', str(tmp_path), '--device', 'cpu'])
    (tmp_path / 'spa3r' / 'models').mkdir(parents=True)
    (tmp_path / 'spa3r' / 'models' / 'spa3r.py').write_text('import einops_of_nobody')
    with pytest.raises(InputError, match='cannot be imported: .*einops_of_nobody'):
        bench.main(['--release', str(tmp_path), '--device', 'cpu'])
    assert sys.modules['vggt'].__file__.endswith('vggt.py')     # ours is back


def test_predict_ends_with_json(capsys):
    bench.main(['--images', '8', '--views', '4', '8', '--predict'])
    said = capsys.readouterr().out
    report = json.loads(said.splitlines()[-1])
    few, many = report['steps']
    assert [(run['scenes'], run['views']) for run in (few, many)] == [(2, 4), (1, 8)]
    memory = {title: sum(parts) for title, parts in report['memory_gb'].items()}
    for preset in PRESETS:
        assert any(f'--config {preset},' in title for title in memory)
    sizes = [memory[title] for title in memory if '3B' in title]
    assert 7 < sizes[0] < sizes[1] < sizes[2] < 80     # adapter, lora, all


def test_what_grows_costs_more(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, 'GROWTH', {'views': (2, 4, 8), 'image_width': (32, 64),
                                          'num_latents': (8, 32)})
    bench.main(['--growth', '--device', 'cpu'])
    said = capsys.readouterr().out
    assert 'num latents     32' in said
    report = json.loads(said.splitlines()[-1])
    for what in ('image_width', 'num_latents'):      # views share the cost of their scene
        for few, many in itertools.pairwise(report[what]):
            assert few['per_view'] < many['per_view']
            assert few['kept_a_view'] < many['kept_a_view']
    shares = [x['attention'] for x in report['views']]
    assert shares == sorted(shares) and 0 < shares[0] and shares[-1] < 1
    assert (tmp_path / 'out' / 'bench' / 'growth.png').is_file()


@pytest.mark.parametrize('name', PRESETS)
def test_bench_knows_every_preset(name, monkeypatch):
    def reached(*_):
        raise InputError('reached the model')

    for backbone in ('VGGT', 'DA3'):
        monkeypatch.setattr(speed, backbone, reached)
    with pytest.raises(InputError, match='reached the model'):
        bench.main(['--config', name, '--device', 'cpu'])
