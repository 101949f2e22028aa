"""The commands of eval.py on a tiny PSFM and a tiny VLM: what they print, write and refuse."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import eval as evaluation
import finetune
import train
from adapter import Adapter
from backbone import fit_pictures
from benchmarks import generate
from common import InputError
from data import RoomPool
from eval import SHIPPED, load_answerer, main
from probe import FACTS, PROBED
from psfm import load_psfm
from questions import RoomQuestions
from test_data import make_folder
from tiny import TINY_PSFM, options, picture, refuse, save_tiny_vlm

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp('elsewhere')


@pytest.fixture(autouse=True)
def away_from_home(elsewhere, monkeypatch):
    """Commands run anywhere; what they write (out/) stays out of the repository."""
    monkeypatch.chdir(elsewhere)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Folder of a finished run of a tiny PSFM."""
    out = tmp_path_factory.mktemp('psfm') / 'run'
    train.main([*TINY_PSFM, '--out', str(out)])
    return str(out)


@pytest.fixture(scope='module')
def vlm(tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp('vlm') / 'tiny')


@pytest.fixture(scope='module')
def tuned(vlm, tmp_path_factory):
    """Folder of a finished run of finetune.py."""
    out = tmp_path_factory.mktemp('tuned')
    finetune.main(options(vlm, out, '--steps', '1', '--ground-steps', '0', '--map-steps', '0'))
    return str(out / 'run')


def on_cpu(*arguments):
    main([*arguments, '--device', 'cpu'])


# -----------------------------------------------------------------------------
# the field

def test_field_measures_and_draws(tiny, capsys):
    path = Path(tiny, 'metrics.json')
    before = json.loads(path.read_text())
    Path(tiny, 'field.png').unlink()
    on_cpu('field', '--run', tiny)
    after = json.loads(path.read_text())
    assert after['psfm']['r2'] == pytest.approx(before['psfm']['r2'], abs=1e-3)
    assert after['seconds'] == before['seconds']
    assert 'rooms that training never shows' in capsys.readouterr().out
    assert Path(tiny, 'field.png').is_file()


def test_a_film_of_the_field(tiny):
    on_cpu('field', '--run', tiny, '--path')
    with Image.open(Path(tiny, 'path.gif')) as film:
        assert film.n_frames == 36


def test_another_world(tmp_path, capsys):
    """The shipped encoder on scenes of a renderer that is not ours."""
    folder = ROOT / 'tests' / 'other_world'
    on_cpu('field', '--run', str(ROOT / SHIPPED), '--data', str(folder))
    said = capsys.readouterr().out
    assert f'held out: all of {folder}, none of it trained on' in said
    metrics = json.loads(Path('out/psfm_small/other_world/metrics.json').read_text())
    r2 = {name: value['r2'] for name, value in metrics.items()}
    assert r2['psfm'] > r2['camera'] + 0.05
    assert r2['camera'] > r2['shuffled']
    assert r2['context'] > r2['psfm'] > 0.3


def test_a_film_among_photographs(tmp_path):
    for i in range(16):
        picture(tmp_path / 'photos' / f'{i}.jpg', (64, 48), value=15 * i)
    out = tmp_path / 'run'
    train.main([*TINY_PSFM, '--data', str(tmp_path / 'photos'), '--min-views', '4', '--out',
                str(out), '--workers', '0', '--depth-probe'])
    on_cpu('field', '--run', str(out), '--path')
    with Image.open(out / 'path.gif') as film:
        assert film.n_frames == 2 * 36 - 2
        titles, width = 6, 154
        assert film.size[0] == titles * width     # the depth of the probe is there


@pytest.mark.slow
def test_probe_command(tiny, capsys):
    on_cpu('probe', '--run', tiny, '--rooms', '200', '--held-out', '100', '--views', '2')
    said, scores = capsys.readouterr().out, json.loads(Path(tiny, 'probe.json').read_text())
    kinds = {f'{name} {kind}' for name in PROBED for kind in ('ridge', 'attentive')}
    assert scores.keys() == {'mean'} | kinds
    assert scores['mean']['sides'][0] == pytest.approx(0, abs=1e-6)
    assert scores['tokens ridge']['sides'][0] > 0.2
    assert 'latents z of the trained encoder' in said
    assert 'side lengths' in said


def test_probe_command_writes_what_was_found(tiny, capsys, monkeypatch):
    asked = []

    def probe_latents(psfm, config, *sizes):
        asked.append(sizes[:3])
        return {'mean': {fact: [0.5, 0.4, 0.6] for fact in FACTS}}

    monkeypatch.setattr(evaluation, 'probe_latents', probe_latents)
    on_cpu('probe', '--run', tiny, '--rooms', '200', '--held-out', '100')
    assert asked == [(200, 100, 6)]
    assert json.loads(Path(tiny, 'probe.json').read_text())['mean']['sides'] == [0.5, 0.4, 0.6]
    assert '100 held-out rooms, 6 views each' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# runs side by side

def finished_run(folder, r2, **config):
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(dict(config, out=folder.name)))
    read_out = dict(psfm=dict(object_recall=0.3, depth_abs_rel=0.2))
    metrics = dict(psfm=dict(r2=r2), camera=dict(r2=0.4), read_out=read_out, seconds=60)
    (folder / 'metrics.json').write_text(json.dumps(metrics))
    return str(folder)


def test_runs_of_one_configuration_share_a_row(tmp_path, capsys):
    a = finished_run(tmp_path / 'a', 0.6, num_latents=32, seed=0)
    b = finished_run(tmp_path / 'b', 0.7, num_latents=32, seed=1)
    c = finished_run(tmp_path / 'c', 0.5, num_latents=8, seed=0)
    main(['runs', a, b, c])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and rows[3] == '±: half the range over seeds'
    assert rows[1].split()[:5] == ['(the', 'first)', '2', '0.650', '±0.050']
    assert rows[2].split()[:3] == ['num_latents=8', '1', '0.500']

    found = tmp_path / 'a' / 'metrics.json'
    whole = json.loads(found.read_text())
    for metrics in (None, [], dict(whole, read_out=None), dict(whole, psfm=dict(r2=None))):
        found.write_text(json.dumps(metrics)) if metrics is not None else found.unlink()
        main(['runs', a, b])
        rows = capsys.readouterr().out.splitlines()
        assert rows[-1] == f'left out, not a finished PSFM run: {a}'
    with pytest.raises(InputError, match='no finished PSFM run among'):
        main(['runs', a])
    with pytest.raises(InputError, match=f'{b} is named twice'):
        main(['runs', b, c, f'{b}/'])


def test_a_run_that_was_begun_anew_is_left_out(tmp_path, capsys):
    for name in ('whole', 'stale'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text('{"width": 1}')
        metrics = dict(psfm=dict(r2=0.5), camera=dict(r2=0.4), seconds=60)
        (tmp_path / name / 'metrics.json').write_text(json.dumps(metrics))
    later = os.path.getmtime(tmp_path / 'stale' / 'metrics.json') + 10
    os.utime(tmp_path / 'stale' / 'config.json', (later, later))
    main(['runs', str(tmp_path / 'whole'), str(tmp_path / 'stale')])
    said = capsys.readouterr().out
    assert said.count('(the first)') == 1
    assert f'left out, not a finished PSFM run: {tmp_path}/stale' in said


def test_backbone_command(capsys):
    on_cpu('backbone', '--rooms', '4')
    said = capsys.readouterr().out
    assert '6 views' in said and 'AUC@5' in said


# -----------------------------------------------------------------------------
# a Spa3-VLM and its answers

def test_rooms_command(tuned, capsys):
    on_cpu('rooms', '--run', tuned, '--rooms', '2')
    assert 'psfm, 1 seed' in capsys.readouterr().out
    on_cpu('rooms', '--run', tuned, '--rooms', '2', '--shuffled')
    assert 'psfm, shuffled, 1 seed' in capsys.readouterr().out


def test_runs_with_the_same_latents_count_as_seeds(tuned, tmp_path, capsys):
    other = shutil.copytree(tuned, tmp_path / 'other')
    on_cpu('rooms', '--run', tuned, str(other), '--rooms', '2', '--maps')
    assert 'psfm, 2 seeds' in capsys.readouterr().out
    with pytest.raises(InputError, match='is named twice'):
        on_cpu('rooms', '--run', tuned, f'{tuned}/', '--rooms', '2')


def test_rooms_command_asks_a_vlm_that_was_not_fine_tuned(vlm, capsys, monkeypatch):
    def few_rooms(split, seed, num_rooms, progress=iter):  # a prior would take 1000
        return RoomQuestions(split, seed, min(num_rooms, 4))

    monkeypatch.setattr(evaluation, 'RoomQuestions', few_rooms)
    on_cpu('rooms', '--run', vlm, '--rooms', '2', '--maps')
    assert 'none, 1 seed' in capsys.readouterr().out


def test_only_latents_can_be_shuffled(vlm):
    with pytest.raises(InputError, match='there is nothing to shuffle'):
        on_cpu('rooms', '--run', vlm, '--shuffled')


def test_ask_command(tuned, tmp_path, capsys, monkeypatch):
    Image.new('RGB', (80, 60), 'red').save(tmp_path / '0.png')
    Image.new('RGB', (80, 60), 'blue').save(tmp_path / '1.png')
    looked_at, answers, forward, generate = [], [], Adapter.forward, evaluation.generate

    def look(adapter, x, z):
        looked_at.append(len(x))
        return forward(adapter, x, z)

    def keep(*arguments):
        answers.extend(generate(*arguments))
        return answers[-1:]

    monkeypatch.setattr(Adapter, 'forward', look)
    monkeypatch.setattr(evaluation, 'generate', keep)
    question = ['--question', 'How many table(s) are in this room?']
    on_cpu('ask', '--run', tuned, '--images', str(tmp_path / '0.png'), *question)
    answer, = answers
    assert capsys.readouterr().out == f'{answer}\n'  # nothing else
    on_cpu('ask', '--run', tuned, '--video', str(tmp_path), *question)
    assert looked_at[1] == 2 * looked_at[0] > 0
    for text, fault in ((' ', 'question is empty'), ('gro\udcdf', 'not UTF-8')):
        with pytest.raises(InputError, match=fault):
            on_cpu('ask', '--run', tuned, '--images', 'a.jpg', '--question', text)
    with pytest.raises(InputError, match='ask takes --images'):
        on_cpu('ask', '--run', tuned, *question)


def test_an_answerer_is_what_was_trained(tuned, vlm):
    (model, _, latents), settings = load_answerer(tuned, 'cpu')
    assert not model.training
    assert settings['latents'] == latents.kind == 'psfm'

    # as on a GPU: the VLM in bf16, the adapter under autocast
    (model, chat, latents), _ = load_answerer(tuned, 'cpu', dtype=torch.bfloat16)
    assert model.vlm.dtype == torch.bfloat16 and model.adapter.gate.weight.dtype == torch.float32
    pictures = [Image.new('RGB', (64, 64), colour) for colour in ('red', 'blue')]
    turn = {'from': 'human', 'value': '<image><image>How many table(s) are in this room?'}
    item = dict(images=pictures, conversations=[turn])
    assert len(generate(model, chat, latents([pictures]), [item], 4)) == 1

    (model, _, latents), settings = load_answerer(vlm, torch.device('cpu'))
    assert model.adapter is latents is None
    assert settings['latents'] == 'none'
    with pytest.raises(InputError, match='no folder of a run at nowhere: fine-tune first'):
        load_answerer('nowhere', 'cpu')


# -----------------------------------------------------------------------------
# bad input: one clear sentence, no traceback

@pytest.mark.parametrize('arguments, message', [
    (['probe', '--views', '9'], f'argument --views: it must be at most {RoomPool.VIEWS}, not 9'),
    (['probe', '--rooms', '401'], 'multiples of 4'),
    (['probe', '--run', 'weights/none.safetensors'], 'no weights at weights/none.safetensors'),
    (['probe', '--rooms', '10'], 'argument --rooms: it must be at least 200, not 10'),
    (['probe', '--held-out', '10'], 'argument --held-out: it must be at least 100, not 10'),
    (['runs', 'nowhere'], 'no finished PSFM run among nowhere'),
    (['field', '--run', 'weights/mini_vggt.safetensors'],
     'weights/mini_vggt.safetensors does not hold a PSFM'),
    (['field', '--run', 'nowhere'], 'no checkpoint in nowhere: train first'),
    (['field', '--rnu', 'out/small'], 'no option --rnu; did you mean --run'),
    (['probe', '--views', 'x'], "argument --views: invalid int value: 'x'"),
    (['probe', '--run', 'README.md'], 'README.md is not a .safetensors file'),
    (['rooms', '--run', 'nowhere'], 'no folder of a run at nowhere: fine-tune first'),
    (['rooms', '--run', 'weights'], 'weights is no Spa3-VLM'),
])
def test_bad_input(arguments, message, capsys):
    refuse(message, main, arguments, capsys)


def test_findings_about_runs_with_dots_in_their_names_go_to_different_folders():
    names = 'x/field-0.1', 'x/field-0.2', 'x/field-0.2.safetensors'
    folders = [evaluation.folder_beside(name) for name in names]
    assert folders == ['out/field-0.1', 'out/field-0.2', 'out/field-0.2']


def test_bad_input_to_the_script():
    done = subprocess.run([sys.executable, 'eval.py', 'runs', 'nowhere'], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 1
    assert done.stderr == 'error: no finished PSFM run among nowhere\n'


def test_encode_writes_a_file_a_scene_and_resumes(tmp_path, capsys, monkeypatch):
    photos, out = make_folder(tmp_path / 'photos', scenes=2, frames=5), tmp_path / 'encoded'
    (photos / 'scene1' / '2.jpg').write_text('no picture')
    command = ['encode', str(photos), '--out', str(out), '--views', '3', '--device', 'cpu']
    main(command)
    said = capsys.readouterr().out
    assert '2 scenes, 2 of them encoded now' in said and '2.jpg cannot be read' in said
    psfm, config = load_psfm('weights/psfm_small.safetensors')
    with safe_open(out / 'scene0.safetensors', 'pt') as file:
        names = json.loads(file.metadata()['pictures'])
        z, extrinsics = file.get_tensor('z'), file.get_tensor('extrinsics')
        size = json.loads(file.metadata()['size'])
    assert [Path(name).name for name in names] == ['0.jpg', '2.jpg', '4.jpg']
    images = fit_pictures([Image.open(name) for name in names], config.image_width, 8)
    assert list(images.shape[-2:]) == size == [48, 64]
    assert torch.allclose(z, psfm.latents(images[None].float() / 255)[0], atol=1e-5)
    assert extrinsics.shape == (3, 3, 4)
    with safe_open(out / 'scene1.safetensors', 'pt') as file:
        assert len(json.loads(file.metadata()['pictures'])) == 2

    # a scene in a folder has its file in such a folder
    picture(tmp_path / 'tree' / 'a' / 'b' / '0.jpg')
    picture(tmp_path / 'tree' / 'a--b' / '0.jpg')
    main(['encode', str(tmp_path / 'tree'), '--out', str(tmp_path / 'of-tree'), '--device', 'cpu'])
    assert (tmp_path / 'of-tree' / 'a' / 'b.safetensors').is_file()
    assert (tmp_path / 'of-tree' / 'a--b.safetensors').is_file()

    # as the README says
    (tmp_path / 'latents').mkdir()
    os.link(out / 'scene0.safetensors', tmp_path / 'latents' / 'kitchen.safetensors')
    monkeypatch.chdir(tmp_path)
    blocks = (ROOT / 'README.md').read_text().split('```python')
    (code,) = [block.split('```')[0] for block in blocks if 'latents/kitchen' in block]
    found = {}
    exec(code, found)
    assert torch.equal(found['z'], z) and found['pictures'] == names

    main(command)                                           # all there
    assert '2 scenes, 0 of them encoded now' in capsys.readouterr().out
    picture(photos / 'scene0' / '4.jpg', value=7)           # another picture, a spoiled file
    (out / 'scene1.safetensors').write_bytes(b'cut')
    main(command)
    assert '2 scenes, 2 of them encoded now' in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ['scene0.safetensors',
                                                           'scene1.safetensors']


def test_ask_uses_the_words_of_training(vlm, tuned, tmp_path, capsys, monkeypatch):
    """Of rooms: VSI-Bench's wording, as in training. Of other data: the question as it is."""
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'a.png')
    asked = []

    def spy(model, chat, z, items, max_new_tokens):
        asked.append(items[0]['conversations'][0]['value'])
        return ['2']
    monkeypatch.setattr(evaluation, 'generate', spy)
    question = 'How many table(s) are in this room?'
    wording = RoomQuestions('train', 0, 4).maps[0][0].replace('Where are the objects, in meters to '
              'the right (x) and ahead (y) of the first camera?', question)
    command = ['ask', '--images', str(tmp_path / 'a.png'), '--device', 'cpu']
    main([*command, '--run', str(tuned), '--question', question])
    assert asked == ['<image>' + wording]

    path = Path(tuned) / 'checkpoint' / 'spatial_vlm.json'
    settings = json.loads(path.read_text())
    assert settings['data'] == 'rooms'
    try:
        path.write_text(json.dumps(dict(settings, data='a.json')))
        main([*command, '--run', str(tuned), '--question', question])
    finally:
        path.write_text(json.dumps(settings))
    assert asked[1] == '<image>' + question

    capsys.readouterr()
    main([*command, '--run', str(tuned), '--question', 'Who painted the Mona Lisa?'])
    assert 'knows 10 kinds of questions' in capsys.readouterr().out
