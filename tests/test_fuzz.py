"""Spoiled inputs at every door. There are three outcomes: success, one clear sentence (InputError,
or argparse's), or a skip that names what was skipped. Never another exception.

    python tests/test_fuzz.py 5000         # more cases
"""
import copy
import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
import mini_vggt  # noqa: E402
import mini_vlm  # noqa: E402
import train  # noqa: E402
from backbone import fit_pictures  # noqa: E402
from benchmarks import prompt, read_answers, read_benchmark, score  # noqa: E402
from common import InputError, parse_options, read_state  # noqa: E402
from data import PhotoFolder, check  # noqa: E402
from media import open_picture  # noqa: E402
from optim import load_optimizers  # noqa: E402
from records import Conversations  # noqa: E402
from psfm import load_psfm  # noqa: E402
from tiny import TINY_PSFM  # noqa: E402

ODD = [None, True, 0, -1, 1.5, 1e308, float('nan'), '', 'x', 'nan', '\ud800', '<image>', '<video>',
       '<|image_pad|>', [], {}, [[]], ['x'], [None], {'x': 1}, 'A', '0', '../..', '\0',
       'x' * 10_000]


def spoil_json(value, dice):
    """A copy in which one place, at any depth, is another value, is lost, or is there twice."""
    value = copy.deepcopy(value)
    places = []

    def visit(node):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    visit(value)
    node, key = dice.choice(places)
    kind = dice.choice(['other', 'other', 'lost', 'twice'])
    if kind == 'other':
        node[key] = dice.choice(ODD)
    elif kind == 'lost':
        del node[key]
    elif isinstance(node, list):
        node.append(node[key])
    return value


def spoil_bytes(content, dice):
    """Cut off, overwritten somewhere, with bytes in between, or something else."""
    content = bytearray(content)
    at = dice.randrange(max(1, len(content)))
    kind = dice.choice(['cut', 'overwritten', 'longer', 'other'])
    if kind == 'cut':
        return bytes(content[:at])
    if kind == 'overwritten':
        content[at:at + dice.choice([1, 8])] = dice.randbytes(dice.choice([1, 8]))
        return bytes(content)
    if kind == 'longer':
        return bytes(content[:at]) + dice.randbytes(9) + bytes(content[at:])
    return dice.choice([b'', b'[]', b'{}', b'null', b'"', b'\xff\xfe\0', b'[' * 100_000, b'\n'])


# -----------------------------------------------------------------------------
# the doors: each takes dice and an empty folder

VALUES = ['', '-1', '0', '1', '3', '1e-30', '1e30', '-1e3', 'nan', 'inf', '-inf', 'x', 'None',
          'auto', '9' * 30, '\0', 'é', '/dev/null', '0.5', 'True', 'cuda:99', 'rooms', 'bfloat16']


def options(dice, folder):
    script = dice.choice([train, finetune, mini_vggt, mini_vlm])
    names = [field.name.replace('_', '-') for field in dataclasses.fields(script.Config)]
    argv = []
    for name in dice.sample(names, dice.choice([1, 1, 2, 4])):
        argv += [f'--{name}', dice.choice(VALUES)] if dice.random() < 0.9 else [f'--no-{name}']
    if hasattr(script, 'parse_config'):
        script.parse_config(argv)
    else:
        presets = getattr(script, 'PRESETS', {'mini': {}})
        parse_options(argv, script.__doc__, script.Config, presets, default='mini')


RECORD = {'images': ['a.png', 'b.png'],
          'spar_info': {'red_point': [[1, 2]], 'point_img_idx': [[0]]},
          'conversations': [{'from': 'human', 'value': '<image><image>What is it?'},
                            {'from': 'gpt', 'value': 'red'}]}


def records(dice, folder):
    for name in ('a.png', 'b.png'):
        Image.new('RGB', (32, 24), 'red').save(folder / name)
    spoiled = spoil_json([RECORD, RECORD], dice)
    if dice.random() < 0.3:
        spoiled = spoil_json(spoiled, dice)
    path = folder / dice.choice(['a.json', 'a.jsonl'])
    lines = map(json.dumps, spoiled) if path.suffix == '.jsonl' else [json.dumps(spoiled)]
    content = '\n'.join(lines).encode()
    path.write_bytes(spoil_bytes(content, dice) if dice.random() < 0.3 else content)
    skip_bad, said = dice.random() < 0.5, []
    data = Conversations([str(path)], str(folder), 2, skip_bad, said.append)
    for i in range(len(data)):
        item = data[i]
        marks = sum(turn['value'].count('<image>') for turn in item['conversations'])
        assert marks == len(item['images'])
    if len(data) < len(spoiled) and path.read_bytes() == content:
        assert said and 'left out' in said[0]


def answers(dice, folder):
    lines = [dict(key='1', output='A'), dict(id=2, output='3.5'), dict(key='3', output='')]
    if dice.random() < 0.5:
        lines = spoil_json(lines, dice)
    content = '\n'.join(map(json.dumps, lines)).encode()
    path = folder / 'answers.jsonl'
    path.write_bytes(spoil_bytes(content, dice) if dice.random() < 0.5 else content)
    found = read_answers(str(path))
    assert all(type(text) is str for pair in found.items() for text in pair)


DOCS = {'vsibench': dict(id=1, dataset='d', scene_name='s', question_type='object_counting',
                         question='How many?', options=['A. 1', 'B. 2'], ground_truth='2'),
        'viewspatial': dict(question_type='Camera', question='Where?', choices='A. left\nB. right',
                            answer='A. left', image_path=['ViewSpatial-Bench/a.png']),
        'cvbench': dict(idx=1, type='2D', task='Count', source='COCO', filename='a.png',
                        prompt='How many?', choices=['1', '2'], answer='(A)')}
FILES = dict(vsibench='test.jsonl', viewspatial='ViewSpatial-Bench.json', cvbench='test_2d.jsonl')
OUTPUTS = ['', ' ', 'A', '(B)', '2', '1e400', 'nan', '-', 'A. left', '\n\n', '<think>', '\\boxed{A',
           'x' * 1000, '\ud800', '٣', '²']


def documents(dice, folder):
    name = dice.choice(list(DOCS))
    docs = spoil_json([DOCS[name], dict(DOCS[name], id=2, idx=2)], dice)
    lines = [json.dumps(docs)] if FILES[name].endswith('.json') else map(json.dumps, docs)
    content = '\n'.join(lines).encode()
    spoiled = spoil_bytes(content, dice) if dice.random() < 0.2 else content
    (folder / FILES[name]).write_bytes(spoiled)
    for doc in read_benchmark(name, str(folder)):
        assert type(prompt(name, doc)) is str
        for corrected in (False, True):
            value = score(name, doc, dice.choice(OUTPUTS), corrected)
            assert 0 <= value <= 1


def pictures(dice, folder):
    mode = dice.choice(['RGB', 'L', 'RGBA', 'P', 'CMYK', 'I;16', '1', 'F'])
    size = dice.choice([(1, 1), (40, 30), (1, 200), (300, 2), (30, 40)])
    picture = Image.new(mode, size)
    format = dice.choice(['png', 'jpeg', 'tiff', 'gif', 'bmp', 'webp'])
    path = folder / f'a.{format}'
    try:
        picture.save(path, format)
    except (OSError, ValueError, KeyError):     # a format that has no such mode
        path.write_bytes(b'x')
    if dice.random() < 0.8:
        path.write_bytes(spoil_bytes(path.read_bytes(), dice))
    picture = open_picture(str(path), dice.choice([None, 32]))
    assert picture.mode == 'RGB'
    images = fit_pictures([picture, Image.new('RGB', (40, 30))], 32, 8)
    assert images.shape[0] == 2 and images.shape[-1] == 32


def folders(dice, folder):
    said = []
    for scene in range(dice.randrange(4)):
        inside = dice.choice(['', f's{scene}', f's{scene}/color', f'scans/s{scene}/color',
                              '.hidden'])
        (folder / inside).mkdir(parents=True, exist_ok=True)
        for i in range(dice.randrange(7)):
            path = folder / inside / dice.choice([f'{i}.jpg', f'{i}.PNG', f'.{i}.jpg', f'{i}.txt'])
            Image.new('RGB', dice.choice([(40, 30), (30, 40), (200, 10)])).save(path, 'png')
            if dice.random() < 0.2:
                path.write_bytes(spoil_bytes(path.read_bytes(), dice))
    (folder / 'scannetv2_train.txt').write_text(dice.choice(['', 's0\n', 's1 s2', 'nowhere']))
    check(str(folder))
    source = PhotoFolder(str(folder), dice.choice(['train', 'val']), 0, 32, 8, 2, say=said.append)
    assert source.batch(0, 2, 3)['images'].shape[-1] == 32
    assert all('left out' in line or 'not used' in line for line in said)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('run') / 'tiny')


def make_run(folder):
    """A finished run of one step. -> its folder"""
    train.main([*TINY_PSFM, '--out', str(folder), '--val-scenes', '1'])
    return folder


def checkpoints(dice, folder, run):
    """One file of a checkpoint is spoiled, then put right again."""
    path = run / 'checkpoint' / dice.choice(['state.json', 'optimizer.pt', 'model.safetensors'])
    whole = path.read_bytes()
    spoiled = spoil_bytes(whole, dice)
    if path.suffix == '.json' and dice.random() < 0.7:
        spoiled = json.dumps(spoil_json(json.loads(whole), dice)).encode()
    if path.suffix == '.pt' and dice.random() < 0.3:
        torch.save(dice.choice([[], {}, None, [{}], [[1]], [{'state': 1}], 7]), path)
        spoiled = path.read_bytes()
    path.write_bytes(spoiled)
    try:
        _, config = train.parse_config([*TINY_PSFM, '--out', str(run), '--val-scenes', '1',
                                        '--steps', '2', '--resume'])
        state = read_state(config)
        psfm, _ = load_psfm(str(run))
        load_optimizers(train.make_optimizers(psfm, config, torch.device('cpu')), state['folder'])
    finally:
        path.write_bytes(whole)


DOORS = dict(options=options, records=records, answers=answers, documents=documents,
             pictures=pictures, folders=folders, checkpoints=checkpoints)


def attack(name, number, folder, run):
    """-> the sentence that case `number` at the door `name` ends with, or None"""
    dice = random.Random(f'{name} {number}')
    extra = [run] if name == 'checkpoints' else []
    try:
        DOORS[name](dice, folder, *extra)
    except InputError as error:
        assert str(error).strip()
        return str(error)
    except SystemExit as stop:
        assert stop.code == 2, stop         # argparse
        return 'usage'


CASES = dict(options=400, records=400, answers=200, documents=400, pictures=200, folders=100,
             checkpoints=100)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', DOORS)
def test_spoiled_inputs(name, tmp_path, run, monkeypatch):
    monkeypatch.chdir(ROOT)
    sentences = []
    for number in range(CASES[name]):
        folder = tmp_path / str(number)
        folder.mkdir()
        sentences.append(attack(name, number, folder, run))
    refused = sum(sentence is not None for sentence in sentences)
    assert 0.1 < refused / len(sentences) < 1     # neither all is swallowed, nor all refused


if __name__ == '__main__':
    import tempfile
    home = Path(tempfile.mkdtemp())
    tiny_run = make_run(home / 'run')
    for case in range(int(sys.argv[1])):
        for door in DOORS:
            place = home / f'{door}-{case}'
            place.mkdir()
            try:
                attack(door, case, place, tiny_run)
            except Exception as error:
                print(f'{door} {case}: {type(error).__name__}: {error}'[:300])
