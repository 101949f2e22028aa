"""Fine-tuning end to end with a tiny VLM, and every fault that a file of conversations can have."""
import contextlib
import dataclasses
import json
import math
import re
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import finetune
import scoring
from adapter import SpatialVLM, build_tokenizer, load_spatial_vlm, load_vlm, mini_vlm, save_mini_vlm
from data import Conversations, RoomPictures, RoomQuestions, draw_markers
from model import InputError
from rooms import ANSWER_WORDS, CATEGORIES, CLASSES

SIZES = dict(width=64, depth=1)


@pytest.fixture(scope='module')
def vlm(tmp_path_factory):
    torch.manual_seed(0)
    rooms = RoomQuestions('train', 0, 8)
    words = [turn['value'].replace('<image>', '') for i in range(8) for turn in rooms[i]['conversations']]
    words += [text for pair in rooms.maps for text in pair]
    path = str(tmp_path_factory.mktemp('vlm') / 'tiny.safetensors')
    save_mini_vlm(*mini_vlm(build_tokenizer(words * 5, CATEGORIES + ANSWER_WORDS), **SIZES), path, SIZES, sight=finetune.Sight(SIZES['width']))
    return path


def options(vlm, out, *more):
    return ['--config', 'small', '--vlm', vlm, '--num-rooms', '16', '--val-scenes', '4', '--batch', '4', '--steps', '4', '--ground-steps', '1', '--map-steps', '1', '--eval-every', '2', '--log-every', '1',
            '--cache', f'{out}/latents', '--out', f'{out}/run', '--device', 'cpu', '--dtype', 'float32', *more]


def losses(out):
    records = [json.loads(line) for line in open(f'{out}/run/log.jsonl')]
    return [record['loss'] for record in records if 'loss' in record]


def test_rooms_end_to_end(vlm, tmp_path, capsys):
    finetune.main(options(vlm, tmp_path))
    metrics = json.load(open(tmp_path / 'run' / 'metrics.json'))
    assert 0 <= metrics['overall'] <= 100 and len(metrics['scores']) == len(RoomQuestions('val', 0, 4).records) + 4          # the questions, and a map of every room
    with Image.open(tmp_path / 'run' / 'map.png') as picture:
        assert picture.size == (1000, 274)                    # four rooms in a row
    evaluation.main(['rooms', '--run', str(tmp_path / 'run'), '--rooms', '4', '--device', 'cpu'])
    evaluation.main(['rooms', '--run', str(tmp_path / 'run'), '--rooms', '4', '--latents', 'shuffled', '--device', 'cpu'])
    evaluation.main(['rooms', '--run', str(tmp_path / 'run'), str(tmp_path / 'run'), '--rooms', '4', '--maps', '--device', 'cpu'])
    shown = capsys.readouterr().out
    assert 'psfm shuffled' in shown and 'psfm, 2 seeds' in shown
    Image.new('RGB', (80, 60), 'red').save(tmp_path / 'a.png')
    evaluation.main(['ask', '--run', str(tmp_path / 'run'), '--images', str(tmp_path / 'a.png'), '--question', 'How many table(s) are in this room?', '--device', 'cpu'])

    # the same losses with latents computed anew, and from a checkpoint half way
    first = losses(tmp_path)
    finetune.main(options(vlm, tmp_path / 'anew', '--cache', ''))
    assert losses(tmp_path / 'anew') == pytest.approx(first, abs=1e-4)
    half = tmp_path / 'half'
    finetune.main(options(vlm, half, '--steps', '2', '--warmup', '0', '--min-lr', '1'))
    finetune.main(options(vlm, half, '--steps', '4', '--warmup', '0', '--min-lr', '1', '--resume'))
    finetune.main(options(vlm, tmp_path / 'whole', '--steps', '4', '--warmup', '0', '--min-lr', '1'))
    assert losses(half) == pytest.approx(losses(tmp_path / 'whole'), abs=1e-5)


def test_two_processes_whole_and_sharded(vlm, tmp_path):
    """DDP and FSDP2 on two processes take the same two steps; what a sharded run saves is whole."""
    weights = {}
    for name, more in (('ddp', ()), ('fsdp2', ('--shard',))):
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', 'finetune.py',
                               *options(vlm, tmp_path / name, '--steps', '2', '--batch', '2', *more)],
                              cwd=Path(finetune.__file__).parent, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        model, _, _ = load_spatial_vlm(str(tmp_path / name / 'run' / 'checkpoint'))
        weights[name] = torch.cat([p.flatten() for p in model.parameters()])
    start = SpatialVLM(load_vlm(vlm)[0]).state_dict()['vlm.model.language_model.layers.0.mlp.up_proj.weight']
    assert not torch.equal(start, model.state_dict()['vlm.model.language_model.layers.0.mlp.up_proj.weight'])
    assert torch.allclose(weights['ddp'], weights['fsdp2'], atol=1e-4)


@pytest.mark.parametrize('latents, train', [('none', 'adapter+llm'), ('random', 'adapter'), ('backbone', 'adapter')])
def test_arms(vlm, tmp_path, latents, train):
    finetune.main(options(vlm, tmp_path, '--steps', '1', '--map-steps', '0', '--latents', latents, '--train', train, '--checkpointing'))
    model, _, settings = load_spatial_vlm(str(tmp_path / 'run' / 'checkpoint'))
    assert settings['latents'] == latents and (model.adapter is None) == (latents == 'none')
    assert (tmp_path / 'run' / 'checkpoint' / 'vlm').exists() == (train == 'adapter+llm')


def test_mini_vlm(tmp_path, capsys):
    finetune.main(['--config', 'mini-vlm', '--val-scenes', '4', '--batch', '1', '--steps', '2', '--out', str(tmp_path), '--device', 'cpu', '--log-every', '1'])
    path = str(tmp_path / 'mini_vlm.safetensors')
    finetune.main(options(path, tmp_path / 'next', '--steps', '1', '--map-steps', '0', '--latents', 'none'))
    finetune.main(['--config', 'mini-vlm', '--vlm', path, '--val-scenes', '4', '--batch', '1', '--steps', '2', '--out', str(tmp_path / 'on'), '--device', 'cpu'])
    before, after = [finetune.load_sight(file, 128).tokens[1].weight for file in (path, tmp_path / 'on' / 'mini_vlm.safetensors')]
    assert 0 < (before - after).abs().max() < 0.02            # it went on from there


def test_ablate(vlm, tmp_path, capsys):
    arguments = ['ablate', '--arms', 'psfm', 'none', '--seeds', '0', '--out', str(tmp_path / 'arms'), *options(vlm, tmp_path, '--steps', '1', '--map-steps', '0')[2:]]
    at = arguments.index(f'{tmp_path}/run')
    del arguments[at - 1:at + 1]
    evaluation.main(arguments)
    shown = capsys.readouterr().out
    assert 'without looking' in shown and 'psfm, shuffled' in shown and 'none, 1 seed' in shown


def test_lora(vlm, tmp_path):
    pytest.importorskip('peft')
    finetune.main(options(vlm, tmp_path, '--steps', '1', '--map-steps', '0', '--train', 'lora'))
    model, _, settings = load_spatial_vlm(str(tmp_path / 'run' / 'checkpoint'))
    assert settings['lora_rank'] == 16 and any('lora_B' in name and p.abs().max() > 0 for name, p in model.named_parameters())


# -----------------------------------------------------------------------------
# scores of rooms

def test_prior_beats_nothing_and_knows_its_place():
    train, held_out = RoomQuestions('train', 0, 60), RoomQuestions('val', 0, 12)
    guess = scoring.language_prior(train.records)
    for record in held_out.records:
        answer = guess(record)
        assert answer in 'ABCD' if record['options'] else float(answer) > 0
    constant = scoring.language_prior([dict(question_type='object_counting', question='How many x(s)?', options=None, ground_truth=text) for text in '223'])
    assert constant(dict(question_type='object_counting', question='How many y(s)?', options=None)) == '2'
    # two is the commonest, but seven and eight are near to more
    numbers = [dict(question_type='object_counting', question='How many x(s)?', options=None, ground_truth=text) for text in '2226788']
    assert scoring.language_prior(numbers)(numbers[0]) in '78' and scoring.language_prior(numbers, commonest=True)(numbers[0]) == '2'


def test_what_follows_from_true_maps():
    held_out = RoomQuestions('val', 0, 40)
    scores = {}
    for record in held_out.records:
        if record['question_type'] not in scoring.UNTOLD:
            said = scoring.solve(record, held_out.maps[record['room']][1])
            scores.setdefault(record['question_type'], []).append(scoring.score('vsibench', record, said))
            assert scoring.solve(record, 'none') is None
    means = {task: sum(values) / len(values) for task, values in scores.items()}
    # whole metres blur what is near; nothing but that stands between a true map and the answers
    assert means['object_counting'] == 1 and means['object_abs_distance'] > 0.5 and len(means) == 7
    assert all(means[task] > 0.7 for task in means if task != 'object_abs_distance'), means


def answers(values):
    return dict(scores=[[('object_counting', 'route_planning')[i % 2], i // 2, value] for i, value in enumerate(values)])


def test_intervals_hold_the_mean_and_shrink():
    g = np.random.default_rng(0)
    few, many = g.random(100).round(), g.random(2000).round()
    mean, low, high = scoring.overall_scores([answers(few)])['overall']
    assert low < mean < high
    mean2, low2, high2 = scoring.overall_scores([answers(many)])['overall']
    assert high2 - low2 < (high - low) / 2
    assert scoring.overall_scores([answers(few)], [answers(few)])['overall'] == (0, 0, 0)
    assert scoring.overall_scores([answers(few)], [answers(few - 0.1)])['overall'] == pytest.approx((10, 10, 10))


# -----------------------------------------------------------------------------
# files of conversations

GOOD = dict(image='a.png', conversations=[{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'red'}])


def turns(*pairs):
    return [{'from': who, 'value': text} for who, text in pairs]


@pytest.fixture
def media(tmp_path):
    Image.new('RGB', (64, 48), 'red').save(tmp_path / 'a.png')
    (tmp_path / 'frames').mkdir()
    for i in range(12):
        Image.new('RGB', (64, 48), (20 * i, 0, 0)).save(tmp_path / 'frames' / f'{i}.png')
    return tmp_path


def write(folder, *records):
    path = folder / 'data.jsonl'
    path.write_text('\n'.join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return str(path)


@pytest.mark.parametrize('record, fault', [
    (dict(GOOD, image='gone.png'), 'missing .*gone.png'),
    (dict(GOOD, image=['a.png', 'a.png']), '1 <image> tokens for 2 images'),
    (dict(GOOD, conversations=turns(('human', '<image><image> x'), ('gpt', 'y'))), '2 <image> tokens for 1 images'),
    (dict(GOOD, conversations=turns(('human', '<image> x'), ('gpt', ' '))), 'empty answer'),
    (dict(GOOD, conversations=turns(('human', '<image> x'), ('robot', 'y'))), "'robot', not"),
    (dict(GOOD, conversations=turns(('gpt', '<image> x'), ('human', 'y'))), 'human first'),
    (dict(GOOD, conversations=turns(('human', '<image> x'), ('gpt', 'y'), ('human', 'z'))), 'without an answer'),
    (dict(image='a.png'), 'no list of at least two turns'),
    (dict(video='gone', conversations=turns(('human', '<video> x'), ('gpt', 'y'))), 'missing .*gone'),
    (dict(GOOD, conversations=turns(('human', '<video> x'), ('gpt', 'y'))), 'no "video"'),
    ('{"conversations": [', 'not JSON')])
def test_faulty_records(media, record, fault):
    path = write(media, GOOD, record, GOOD)
    with pytest.raises(InputError, match=f'data.jsonl, record 2: .*{fault}'):
        Conversations([path], str(media))
    said = []
    assert len(Conversations([path], str(media), skip_bad=True, say=said.append)) == 2
    assert '1 of 3 records left out' in said[0]


def test_no_usable_record(media):
    with pytest.raises(InputError, match='no usable record'):
        Conversations([write(media, dict(image='x'))], str(media), skip_bad=True, say=print)
    with pytest.raises(InputError, match='no file'):
        Conversations(['nowhere.json'], str(media))


def test_videos_and_their_tokens(media):
    # VSI-590K writes <image> before videos too
    for token in ('<video>', '<image>'):
        record = dict(video='frames', conversations=turns(('human', f'{token}\nHow many?'), ('gpt', '3')))
        item = Conversations([write(media, record)], str(media), num_frames=8)[0]
        assert len(item['images']) == 6                       # twelve seconds, one frame in two
        assert item['conversations'][0]['value'] == '<image>' * 6 + 'How many?'


def test_maps_alone_and_after_questions(vlm):
    pictured = RoomQuestions('train', 0, 4)
    _, chat = load_vlm(vlm)
    for i in range(4):
        overview = pictured.maps[i][1]
        assert pictured.map_of(i)['conversations'][1]['value'] == overview
        assert (pictured[i]['conversations'][-1]['value'] == overview) == (i % 2 == 1)

    # the first steps hold maps alone, of twice as many rooms, and no room comes twice before all have come
    config = dataclasses.replace(finetune.Config(), batch=2, map_steps=1)
    dealt = finetune.Encoded(RoomQuestions('train', 0, 8), chat, config)
    assert len(dealt[0][0]['input_ids']) == 4 and len(dealt[1][0]['input_ids']) == 2
    assert sorted(dealt.samples(0) + dealt.samples(1) + dealt.samples(2)) == list(range(8))


def test_pictures_to_pre_train_on(vlm):
    pictures = RoomPictures('train', 0, 8)
    model, chat = load_vlm(vlm)
    assert len(pictures) == 8 * 7
    single, row = pictures[0], pictures[8 * 6]
    assert len(single['images']) == 1 and single['kinds'][-1] == 'map' and len(row['images']) == 6 and 'picture' in row['kinds']
    assert len({image.tobytes() for image in row['images']}) == 6 and row['stand'].isnan().all()
    for item in pictures:
        asked, answers = item['conversations'][::2], item['conversations'][1::2]
        assert len(item['kinds']) == len(answers)
        for kind, question, answer in zip(item['kinds'], asked, answers):
            assert ('Options:' in question['value']) == (answer['value'] in 'ABCD') and (not kind.endswith('in words') or answer['value'] not in 'ABCD')

    # what a batch says of its words and image tokens; and where its tokens stand, worked out beforehand
    config = dataclasses.replace(finetune.Config(), **finetune.PRESETS['mini-vlm'])
    batch, shown, truth = finetune.Encoded(None, chat, config)[0]
    assert len(batch['input_ids']) == 56 and truth['seen'].shape == (len(batch['pixel_values']) // 64, 16, len(CLASSES) + 3)
    words = {chat.tokenizer.decode(token).strip() for token in batch['input_ids'][~truth['words'].isnan().any(-1)]}
    assert words == set(CATEGORIES)
    first, where = finetune.RoomPictures('train', 0, 8)[0], 0
    for question, kind in zip(first['conversations'][::2], first['kinds']):
        where = next(t for t in range(where + 1, 10 ** 6) if batch['labels'][0, t] != -100 and batch['labels'][0, t - 1] == -100)
        names = [CATEGORIES.index(name) for name in re.findall('|'.join(CATEGORIES), question['value'])][:5]
        assert torch.equal(truth['answers'][0, where - 1, :len(names)].nan_to_num(99), first['stand'][names].nan_to_num(99)), kind
    labels = batch.pop('labels')
    assert not batch['attention_mask'].all()                  # some are padded
    with torch.no_grad():
        here, there = [model(use_cache=False, **x).logits[labels != -100] for x in (batch, finetune.to_device(dict(batch), model, 'cpu'))]
    assert torch.equal(here, there)


def test_grounding(vlm, tmp_path):
    _, config = finetune.parse_config(options(vlm, tmp_path, '--ground-steps', '40', '--log-every', '39'))
    data = RoomQuestions('train', 0, 16)
    model, chat, latents = finetune.build_model(config, data)
    before, said = {name: x.clone() for name, x in model.state_dict().items()}, []
    finetune.ground(model, chat, latents, data, config, torch.device('cpu'), contextlib.nullcontext(), said.append)
    first, last = [float(re.search(r'tokens (\S+)', line)[1]) for line in (said[0], said[-1])]
    assert last < 0.8 * first
    assert {name.split('.')[0] for name, x in model.state_dict().items() if not torch.equal(x, before[name])} == {'adapter'}

    save_mini_vlm(*load_vlm(vlm), tmp_path / 'blind.safetensors', SIZES)
    with pytest.raises(InputError, match='blind.safetensors does not fit this Sight'):
        finetune.main(options(str(tmp_path / 'blind.safetensors'), tmp_path))


def test_shares_of_files(media):
    path = write(media, *[GOOD] * 20)
    assert len(Conversations([f'{path}:0.25', path], str(media))) == 25
    with pytest.raises(InputError, match='between 0 and 1'):
        Conversations([f'{path}:7'], str(media))


def test_markers_are_drawn():
    images = [Image.new('RGB', (200, 100), 'white') for _ in range(3)]
    info = json.dumps(dict(red_point=[[500, 500]], blue_point=[[250, 500]], point_img_idx=[[0, 2]], green_bbox=[[100, 100, 900, 900]], bbox_img_idx=[[1]]))
    drawn = draw_markers(images, info)
    assert drawn[0].getpixel((100, 50)) == (255, 0, 0) and drawn[2].getpixel((50, 50)) == (0, 0, 255)
    assert drawn[1].getpixel((20, 50)) == (0, 255, 0) and drawn[1].getpixel((100, 50)) == (255, 255, 255)
    assert images[0].getpixel((100, 50)) == (255, 255, 255)


def test_files_end_to_end(vlm, media, capsys):
    record = dict(GOOD, conversations=turns(('human', '<image>\nHow many table(s) are in this room?'), ('gpt', '2')))
    path = write(media, *[record] * 6)
    finetune.main(options(vlm, media, '--data', path, '--media', str(media), '--val-scenes', '2', '--steps', '2'))
    assert math.isfinite(json.load(open(media / 'run' / 'metrics.json'))['loss'])
    with pytest.raises(InputError, match='none would be left'):
        finetune.main(options(vlm, media, '--data', path, '--media', str(media), '--val-scenes', '6'))


@pytest.mark.parametrize('more, fault', [
    (['--latents', 'none', '--train', 'adapter'], 'nothing to train'), (['--batch', '0'], '--batch must be at least 1'), (['--data', ''], 'your own files'),
    (['--train', 'everything'], '--train takes'), (['--vlm', 'nowhere', '--ground-steps', '0'], 'no VLM at nowhere'),
    (['--map-steps', '4'], 'questions need steps behind the maps'), (['--vlm', 'some/where'], '--ground-steps 0')])
def test_faulty_options(vlm, tmp_path, more, fault):
    with pytest.raises(InputError, match=fault):
        finetune.main(options(vlm, tmp_path, *more))
