"""train.py as a user runs it, and that what he gives wrong is one clear sentence."""
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import finetune
import mini_vggt
import mini_vlm
import model
import train
from common import InputError, autocast_on, parse_options, read_weights
from data import RoomPool, make_source
from draw import draw_field, field_rows
from optim import rate_share
from psfm import build_psfm, load_psfm, random_view_mask, read_psfm, weights_of_run
from test_data import make_folder, picture
from tiny import TINY_PSFM, refuse
from train import main

ROOT = Path(__file__).parent.parent
TINY = [*TINY_PSFM, '--steps', '4', '--eval-every', '2', '--log-every', '1']


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


def losses(out):
    """-> [(step, loss, gradient norm)] of a run's log"""
    records = map(json.loads, (Path(out) / 'log.jsonl').read_text().splitlines())
    return [(record['step'], record['loss'], record['grad_norm'])
            for record in records if 'loss' in record]


def evaluations(out):
    """-> steps at which a run was evaluated"""
    records = map(json.loads, (Path(out) / 'log.jsonl').read_text().splitlines())
    return [record['step'] for record in records if 'metrics' in record]


def stop_at_the_first_checkpoint(*arguments):
    """A run that ends as if the machine had gone down right after its first checkpoint."""
    save = train.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'save_checkpoint', save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            main(list(arguments))


def run(*arguments, **options):
    """A script in its own process. -> (exit code, everything printed)"""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, **options)
    return done.returncode, done.stdout + done.stderr


# -----------------------------------------------------------------------------
# numbers

def test_same_seed_same_losses_and_resume_continues_them(tmp_path):
    whole, parts, other = [str(tmp_path / name) for name in ('whole', 'parts', 'other')]
    main([*TINY, '--out', whole])
    assert [step for step, *_ in losses(whole)] == [1, 2, 3, 4]

    # the cosine is that of four steps, of which two are taken
    stop_at_the_first_checkpoint(*TINY, '--out', parts)
    assert losses(parts) == losses(whole)[:2]
    with open(tmp_path / 'parts' / 'log.jsonl', 'a') as log:
        log.write('{"step": 3, "loss": 9, "grad_norm": 9}\n{"step": 4, "lo')  # lost with the power
    main([*TINY, '--out', parts, '--resume'])
    assert losses(parts) == losses(whole)
    assert evaluations(parts) == [2, 4]
    main([*TINY, '--out', other, '--seed', '1', '--steps', '1'])
    assert losses(other)[0] != losses(whole)[0]


def test_resume_in_bf16_with_a_pool_that_moves_on(tmp_path):
    """Rooms are rendered in the training, in the evaluation and after --resume: always alike."""
    options = [*TINY, '--num-rooms', '16', '--steps', '8', '--eval-every', '4',
               '--dtype', 'bfloat16']
    whole, parts = str(tmp_path / 'whole'), str(tmp_path / 'parts')
    main([*options, '--out', whole])
    stop_at_the_first_checkpoint(*options, '--out', parts)
    assert [step for step, *_ in losses(parts)] == [1, 2, 3, 4]
    main([*options, '--out', parts, '--resume'])
    assert losses(parts) == losses(whole) and evaluations(parts) == [4, 8]


def test_a_run_goes_on_in_its_dtype_or_in_the_one_that_is_asked_for(tmp_path, capsys):
    options = [x for x in TINY if x not in ('--dtype', 'float32')] + ['--out', str(tmp_path)]
    main([*options, '--steps', '1', '--dtype', 'bfloat16'])
    main([*options, '--steps', '2', '--resume'])
    assert capsys.readouterr().out.count('cpu, torch.bfloat16 (as asked') == 2
    main([*options, '--steps', '3', '--resume', '--dtype', 'float32'])
    assert 'cpu, torch.float32 (as asked' in capsys.readouterr().out


def test_every_step_has_its_learning_rate(tmp_path, monkeypatch):
    shares, take_step = [], train.take_step

    def spy(optimizers, parameters, clip):
        shares.append({group['lr'] / group['peak']
                       for optimizer in optimizers for group in optimizer.param_groups})
        return take_step(optimizers, parameters, clip)

    monkeypatch.setattr(train, 'take_step', spy)
    options = [*TINY, '--out', str(tmp_path), '--warmup', '2', '--decay-from', '0.5']
    main(options)
    _, config = train.parse_config(options)
    expected = [rate_share(step, config) for step in range(4)]
    assert len(set(expected)) > 1
    assert [min(share) for share in shares] == pytest.approx(expected)
    assert [max(share) for share in shares] == pytest.approx(expected)


def test_the_gradient_of_a_step_is_the_mean_over_its_batches(tmp_path, monkeypatch):
    """Two batches that are alike, in one step: as one."""
    first = {}

    def make_inputs(batch, config, number, rank, device):
        return original(first.setdefault('batch', batch), config, 0, rank, device)

    original = train.make_inputs
    monkeypatch.setattr(train, 'make_inputs', make_inputs)
    for count in '1', '2':
        first.clear()
        main([*TINY, '--out', str(tmp_path / count), '--accumulate', count, '--steps', '1'])
    once, twice = losses(tmp_path / '1'), losses(tmp_path / '2')
    assert twice[0] == pytest.approx(once[0], rel=1e-4)


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    main([*TINY, '--out', str(tmp_path), '--steps', '2'])
    assert {path.name for path in tmp_path.iterdir()} \
        == {'config.json', 'log.jsonl', 'metrics.json', 'field.png', 'curve.png', 'checkpoint'}
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    for name in ('psfm', 'mean', 'position', 'nearest', 'shuffled', 'camera', 'context'):
        assert metrics[name].keys() == {'cos', 'centred_cos', 'r2'}
    assert metrics['position']['r2'] > 0.05 > abs(metrics['mean']['r2'])
    read_out = metrics['read_out']
    assert read_out.keys() == {'true', 'psfm', 'camera', 'shuffled'}
    assert read_out['true']['class_accuracy'] > read_out['psfm']['class_accuracy']
    assert json.loads((tmp_path / 'config.json').read_text())['width'] == 32
    weights = load_file(tmp_path / 'checkpoint' / 'model.safetensors')
    assert not any(name.startswith('backbone.') for name in weights)
    card = (tmp_path / 'checkpoint' / 'README.md').read_text()
    assert '`weights/mini_vggt.safetensors` (MIT)' in card

    # what to look at
    field = Image.open(tmp_path / 'field.png')
    assert field.width > 500 and len(field.getcolors(1 << 24)) > 1000
    colors = {color for _, color in Image.open(tmp_path / 'curve.png').getcolors(1 << 24)}
    for curve in ('black', 'firebrick', 'grey', 'steelblue'):
        assert ImageColor.getrgb(curve) in colors, curve

    # the same, measured anew
    capsys.readouterr()
    evaluation.main(['field', '--run', str(tmp_path), '--device', 'cpu'])
    said = capsys.readouterr().out
    assert 'from the average latents' in said and 'rooms that training never shows' in said
    again = json.loads((tmp_path / 'metrics.json').read_text())
    assert again['psfm']['r2'] == pytest.approx(metrics['psfm']['r2'], abs=1e-3)
    assert 'seconds' in again


def test_separate_context_and_a_probe_train_too(tmp_path):
    main([*TINY, '--out', str(tmp_path), '--context', 'separate', '--depth-probe',
          '--no-standardised', '--steps', '1', '--accumulate', '2'])
    assert (tmp_path / 'field.png').is_file()


def test_what_is_computed_twice_does_not_count(tmp_path, monkeypatch):
    counted, recomputed = [], []
    count, checkpoint = train.flops_per_view, model.checkpoint
    monkeypatch.setattr(train, 'peak_flops', lambda device: 1e12)
    monkeypatch.setattr(train, 'flops_per_view', lambda *args: counted.append(count(*args)) or 1.0)
    monkeypatch.setattr(model, 'checkpoint',
                        lambda *args, **more: recomputed.append(0) or checkpoint(*args, **more))
    for name in ('no-checkpointing', 'checkpointing'):
        assert not recomputed
        main([*TINY, f'--{name}', '--out', str(tmp_path / name)])
    assert recomputed and counted[0] == counted[1]
    kept, again = losses(tmp_path / 'no-checkpointing'), losses(tmp_path / 'checkpointing')
    assert [loss for _, loss, _ in again] == pytest.approx([loss for _, loss, _ in kept], abs=1e-4)


def test_photographs_of_mixed_kinds_train(tmp_path, capsys):
    root = make_folder(tmp_path / 'photos', scenes=3, frames=6)
    kinds = [('6.png', 'RGBA'), ('7.png', 'I;16'), ('8.jpg', 'CMYK'), ('9.webp', 'RGB')]
    for name, mode in kinds:
        picture(root / 'scene0' / name, size=(90, 50), mode=mode)
    (root / 'scene1' / '1.jpg').write_text('no picture')
    main([*TINY, '--out', str(tmp_path / 'out'), '--data', str(root), '--workers', '0',
          '--steps', '2'])
    said = capsys.readouterr().out
    assert '2 scenes to train on' in said and 'held out: scene scene2' in said
    assert (tmp_path / 'out' / 'field.png').is_file()
    assert 'read_out' not in json.loads((tmp_path / 'out' / 'metrics.json').read_text())


def test_workers_read_photographs_and_say_in_one_sentence_what_they_cannot(
        tmp_path, monkeypatch, capsys):
    photos = make_folder(tmp_path / 'photos')
    options = [*TINY, '--data', str(photos), '--workers', '1', '--out']
    main([*options, str(tmp_path / 'whole'), '--steps', '2'])
    main([*options, str(tmp_path / 'here'), '--steps', '2', '--workers', '0'])
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'here')

    monkeypatch.setattr(data.PhotoFolder, 'CHECKED', 0)  # many pictures: none is opened before
    for path in photos.rglob('*.jpg'):
        path.write_text('no picture')
    begun = ['--init', str(tmp_path / 'whole')]  # else the statistics meet the fault first
    refuse('cannot be read', main, [*options, str(tmp_path / 'other'), *begun], capsys)


def test_of_photographs_the_depth_probe_is_drawn(tmp_path):
    root = make_folder(tmp_path / 'photos')
    main([*TINY, '--out', str(tmp_path), '--data', str(root), '--workers', '0', '--steps', '1',
          '--depth-probe'])
    psfm, config = load_psfm(tmp_path)
    held_out = make_source(config, 'val', 8)
    autocast = autocast_on(torch.device('cpu'), torch.float32)
    rows = field_rows(psfm, held_out, config, autocast, 1)[0]
    depth = [tiles for title, tiles in rows if title.startswith('depth')]
    assert len(depth) == 2 and all(tiles.std() > 0 for tiles in depth)
    psfm.depth_probe = None
    draw_field(psfm, held_out, config, autocast, tmp_path / 'without.png')
    assert Image.open(tmp_path / 'field.png').height > Image.open(tmp_path / 'without.png').height


def test_one_number_of_views_a_batch():
    _, config = train.parse_config(['--images-per-batch', '24'])
    batches = train.Batches(RoomPool('train', 0, 8), config)
    for step in range(4):
        B, V = batches[step]['images'].shape[:2]
        assert B == 24 // V
    assert {train.views_per_scene(step, 0, 4, 8) for step in range(60)} == {4, 5, 6, 7, 8}


def test_init_begins_with_the_weights_of_another_run(tmp_path, capsys):
    first, second = tmp_path / 'first', tmp_path / 'second'
    main([*TINY, '--out', str(first)])
    weights = first / 'checkpoint' / 'model.safetensors'
    main([*TINY, '--out', str(second), '--init', str(weights), '--seed', '3', '--steps', '1',
          '--lr', '0', '--muon-lr', '0'])
    before = load_file(weights)
    after = load_file(second / 'checkpoint' / 'model.safetensors')
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # options that are younger than a file have their defaults; a config of another kind is refused
    old, metadata = read_weights(weights)
    settings = json.loads(metadata['config'])
    del settings['mask_ratio']
    save_file(old, tmp_path / 'old.safetensors', {**metadata, 'config': json.dumps(settings)})
    assert load_psfm(tmp_path / 'old.safetensors')[1].mask_ratio == 0.5
    for text in ('{}', '[]', '{"size": 3}', 'no JSON'):
        other = tmp_path / 'other.safetensors'
        save_file(old, other, {'config': text})
        with pytest.raises(InputError, match='does not hold a PSFM'):
            load_psfm(other)
        refuse('other.safetensors', main, [*TINY, '--backbone', str(other)], capsys)

    # a file of weights is as good as its run's folder
    psfm, config = load_psfm(weights)
    assert config.width == 32 and torch.equal(psfm.encoder.queries, before['encoder.queries'])
    options = [*TINY, '--out', str(second)]
    refuse('README.md is not a .safetensors file', main, [*options, '--init', 'README.md'], capsys)
    refuse('holds the checkpoint of a PSFM run, not a VGGT', main,
           [*options, '--backbone', str(weights)], capsys)
    refuse('does not fit this PSFM: other shapes for', main,
           [*options, '--width', '64', '--init', str(weights)], capsys)


def test_latents_are_not_read_beside_another_backbone(tmp_path):
    main([*TINY, '--out', str(tmp_path), '--steps', '1'])
    state, metadata = read_weights(ROOT / 'weights' / 'mini_vggt.safetensors')
    state['aggregator.camera_token'] = state['aggregator.camera_token'] + 1
    other = tmp_path / 'other.safetensors'
    save_file(state, other, metadata)
    path = tmp_path / 'checkpoint' / 'model.safetensors'
    ours, settings = read_weights(path)
    changed = dict(json.loads(settings['config']), backbone=str(other))
    save_file(ours, path, dict(settings, config=json.dumps(changed)))
    with pytest.raises(InputError, match='was trained on another backbone'):
        load_psfm(tmp_path)
    with pytest.raises(InputError, match='was trained on another backbone'):
        main([*TINY, '--out', str(tmp_path / 'b'), '--backbone', str(other), '--init', str(path)])


def test_without_latents_the_decoder_knows_the_camera_alone(tmp_path):
    main([*TINY, '--out', str(tmp_path), '--num-latents', '0', '--steps', '2'])
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['psfm'] == metrics['shuffled'] == metrics['camera']
    assert load_psfm(tmp_path)[0].latents(torch.rand(1, 2, 3, 64, 64)).shape == (1, 0, 32)


def loss_of(rank, psfm):
    """The loss of one process: its own pictures, its own masks."""
    g = torch.Generator().manual_seed(rank)
    images = torch.rand(2, 4, 3, 64, 64, generator=g)
    mask, _ = random_view_mask(2, 4, 0.5, g)
    return psfm(images=images, view_mask=mask)['loss']


def tiny_psfm():
    torch.manual_seed(0)
    return build_psfm(train.parse_config(TINY)[1])


def average_gradient(rank, folder):
    """One process of two: its own pictures, one backward pass through DDP."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous',
                                         rank=rank, world_size=2, timeout=timedelta(minutes=2))
    psfm = tiny_psfm()
    ddp = torch.nn.parallel.DistributedDataParallel(psfm)
    loss_of(rank, ddp).backward()
    gradients = {name: p.grad for name, p in psfm.named_parameters() if p.requires_grad}
    torch.save(gradients, f'{folder}/{rank}.pt')
    os._exit(0)  # at once: gloo may wait for itself when it is taken down


def test_two_processes_average_their_gradients(tmp_path):
    spawn = multiprocessing.get_context('spawn')
    both = [spawn.Process(target=average_gradient, args=(rank, str(tmp_path)), daemon=True)
            for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
    assert [process.exitcode for process in both] == [0, 0]
    psfm = tiny_psfm()
    for rank in range(2):
        (loss_of(rank, psfm) / 2).backward()
    one, two = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for name, p in psfm.named_parameters():
        if p.requires_grad:
            assert torch.equal(one[name], two[name]), name
            assert torch.allclose(one[name], p.grad, rtol=1e-3, atol=1e-4), name


def test_one_process_evaluates(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'join_processes', lambda device: (1, 1, torch.device('cpu')))
    monkeypatch.setattr(train, 'evaluate_field', lambda *_: pytest.fail('the second one did'))
    main([*TINY, '--out', str(tmp_path / 'second'), '--steps', '2', '--eval-every', '1'])
    assert not (tmp_path / 'second').exists()


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    more = '--num-rooms', '4', '--new-rooms', '0', '--steps', '2'
    code, said = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                     'train.py', *TINY, *more, '--out', str(tmp_path / 'two'),
                     env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert code == 0, said
    assert said.count('step 00001/00002') == 1 and (tmp_path / 'two' / 'field.png').is_file()

    # the first one has the data of a single process; its gradient is the mean of both
    main([*TINY, *more, '--out', str(tmp_path / 'one')])
    (_, alone, norm_alone), (_, together, norm) = [
        losses(tmp_path / name)[0] for name in ('one', 'two')]
    assert together == pytest.approx(alone, abs=1e-4) and abs(norm - norm_alone) > 1e-3


# -----------------------------------------------------------------------------
# bad input: one clear sentence, no traceback

@pytest.mark.parametrize('arguments', [('train.py', '--widht', '3'),
                                       ('eval.py', 'field', '--run', 'nowhere')])
def test_a_script_stops_with_one_sentence_and_no_traceback(arguments):
    code, said = run(*arguments)
    assert code != 0 and said.startswith('error: ') and len(said.splitlines()) == 1, said


def mini(Config):
    return lambda argv: parse_options(argv, '', Config, {'mini': {}}, default='mini')


PARSERS = {
    'train': (train.Config, train.parse_config),
    'finetune': (finetune.Config, finetune.parse_config),
    'mini_vggt': (mini_vggt.Config, mini(mini_vggt.Config)),
    'mini_vlm': (mini_vlm.Config, mini(mini_vlm.Config)),
}
NUMBERS = [(script, field.name) for script, (Config, _) in PARSERS.items()
           for field in dataclasses.fields(Config) if field.type in (int, float)]


@pytest.mark.parametrize('script,name', NUMBERS)
def test_every_number_has_a_range(script, name, capsys):
    Config, parse = PARSERS[script]
    field, = [field for field in dataclasses.fields(Config) if field.name == name]
    low, high = field.metadata['low'], field.metadata['high']
    assert low is not None
    bad = [low - 1, 'nan', 'inf', '-inf'] + ([] if high is None else [high + 1])
    option = '--' + name.replace('_', '-')
    for value in bad:
        refuse(option, parse, [f'{option}={value}'], capsys)


@pytest.mark.parametrize('arguments,message', [
    (['--config', 'smal'], "no preset 'smal', did you mean small?"),
    (['--widht', '3'], 'no option --widht; did you mean --width'),
    (['--steps', 'many'], "argument --steps: invalid int value: 'many'"),
    (['--steps', '0'], '--steps must be at least 1, not 0'),
    (['--steps', '9' * 20], f'--steps must be at most 1000000000000, not {"9" * 20}'),
    (['--muon-lr', '1e300'], '--muon-lr must be at most 1e+38, not 1e+300'),
    (['--context', 'both'], '--context takes asymmetric or separate, not both'),
    (['--seed', '10000000000000'], '--seed must be at most 1000000000000, not 10000000000000'),
    (['--mask-ratio', '1'], '--mask-ratio must be at most 0.99, not 1.0'),
    (['--image-width', '60'], '--image-width 60 is not a multiple of the patch size 8: take 56 or'),
    (['--width', '100', '--num-heads', '3'], 'a head needs a multiple of 8 channels'),
    (['--num-latents', '-1'], '--num-latents must be at least 0, not -1'),
    (['--max-views', '9'], '--max-views 9: a room has 8 views'),
    (['--min-views', '6', '--max-views', '5'], '--min-views 6 --max-views 5: the wrong order'),
    (['--device', 'gpu'], '--device gpu cannot be used here; take auto, cpu'),
    (['--min-gap', '5', '--max-gap', '2'], '--min-gap 5 --max-gap 2: the wrong order'),
    (['--device', 'cuda'], '--device cuda cannot be used here; take auto, cpu'),
    (['--data', 'nowhere', '--backbone', 'weights/none.safetensors'], 'no folder nowhere'),
    (['--config', 'base'], 'base trains on your own pictures: --data FOLDER'),
    (['--init', 'out/\udce9'], 'holds bytes that are not UTF-8; write it in UTF-8'),
    (['--backbone', 'weights/none.safetensors'], 'no weights at weights/none.safetensors'),
])
def test_bad_options(arguments, message, tmp_path, capsys):
    if 'cuda' in arguments and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    refuse(message, main, [*arguments, '--out', str(tmp_path / 'out')], capsys)


def test_bad_backbone_file(tmp_path, capsys):
    options = '--out', str(tmp_path / 'out'), '--backbone'
    path = tmp_path / 'broken.safetensors'
    path.write_text('not weights')
    refuse('is not a .safetensors file', main, [*options, str(path)], capsys)
    config = dict(heads=['camera'], width=64, num_heads=2, depth=1, patch_embed='conv',
                  patch_size=8)
    save_file({'something.else': torch.zeros(1)}, path, dict(config=json.dumps(config)))
    refuse('unexpected something.else', main, [*options, str(path)], capsys)


def test_bad_checkpoints(tmp_path, capsys):
    out = tmp_path / 'out'
    resume = [*TINY, '--out', str(out), '--resume']
    refuse(f'--resume: no checkpoint in {out}', main, resume, capsys)
    refuse(f'no checkpoint in {out}: train first', evaluation.main, ['field', '--run', str(out)],
           capsys)
    main([*TINY, '--out', str(out), '--steps', '1'])
    refuse('was trained with another configuration (width 32 there, 64 here)', main,
           [*resume, '--width', '64'], capsys)
    path = out / 'checkpoint' / 'optimizer.pt'
    for content in (b'', b'no checkpoint', path.read_bytes()[:5000]):
        path.write_bytes(content)
        refuse(f'{path} does not hold the optimizers of this run', main, resume, capsys)


@pytest.mark.parametrize('scenes', [1, 3])
def test_what_is_held_out_stays_so_when_the_folder_grows(scenes, tmp_path, monkeypatch):
    photos = make_folder(tmp_path / 'photos', scenes=scenes, frames=16)
    sources = {}

    def spy(config, split, *args, **options):
        sources[split] = make_source(config, split, *args, **options)
        return sources[split]

    def names(split):
        return {path for scene in sources[split].scenes for path in scene}

    monkeypatch.setattr(train, 'make_source', spy)
    monkeypatch.setattr(data, 'make_source', spy)      # for make_sources, in eval.py
    options = [*TINY, '--data', str(photos), '--image-width', '32', '--out', str(tmp_path / 'out'),
               '--min-views', '3', '--max-views', '4', '--workers', '0']
    main([*options, '--steps', '1'])
    held_out = names('val')
    assert held_out and not held_out & names('train')
    make_folder(photos, scenes=scenes + (scenes > 1), frames=20)    # it has grown
    main([*options, '--steps', '2', '--resume'])
    assert held_out <= names('val')
    assert not held_out & names('train')
    assert len(names('train')) >= 16
    new = {str(tmp_path / 'out'): str(tmp_path / 'other'), str(photos): f'{photos}/'}
    other = [new.get(x, x) for x in options]                            # the same folder
    main([*other, '--steps', '1', '--init', str(tmp_path / 'out')])     # begins with its weights
    assert held_out <= names('val')
    assert not held_out & names('train')
    main([*options, '--steps', '3', '--resume'])
    before = names('val')
    evaluation.main(['field', '--run', str(tmp_path / 'out'), '--device', 'cpu'])
    assert names('val') == before
    photos.rename(tmp_path / 'gone')
    for scene, frame in itertools.product('xyz', range(5)):      # nothing that was held out
        picture(photos / scene / f'{frame}.jpg')
    with pytest.raises(InputError, match='lacks what this run held out'):
        main([*options, '--steps', '4', '--resume'])


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    out = tmp_path / 'out'
    hold = ('import sys; from train import *; '
            'log = open_run(Config(out=sys.argv[1]), 0, True); print(1, flush=True); input()')
    other = subprocess.Popen([sys.executable, '-c', hold, str(out)], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == '1\n'
    refuse(f'another run is writing to {out}', main, [*TINY, '--out', str(out)], capsys)
    other.kill()                        # leaves nothing behind
    other.wait()
    main([*TINY, '--out', str(out), '--steps', '1'])


def test_a_spoiled_log_does_not_stop_a_resume(tmp_path):
    out = tmp_path / 'out'
    main([*TINY, '--out', str(out), '--steps', '1'])
    with open(out / 'log.jsonl', 'ab') as log:
        log.write(b'\xff\xfe broken\n{"step": "one"}\n[]\n{"step": 2, "lo')
    main([*TINY, '--out', str(out), '--steps', '2', '--resume'])
    lines = (out / 'log.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 1, 2, 2]


@pytest.mark.parametrize('change', [
    dict(dtype='foo'), dict(step=-1), dict(metrics=dict(seconds='x'))])
def test_a_spoiled_state_is_refused(tmp_path, capsys, change):
    out = tmp_path / 'run'
    main([*TINY, '--out', str(out), '--steps', '1'])
    path = out / 'checkpoint' / 'state.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refuse(f'{out}/checkpoint/state.json is not the state of a run', main,
           [*TINY, '--out', str(out), '--steps', '2', '--resume'], capsys)


def test_optimizers_of_other_shapes_are_refused(tmp_path, capsys):
    out = tmp_path / 'run'
    main([*TINY, '--out', str(out), '--steps', '1'])
    path = out / 'checkpoint' / 'optimizer.pt'
    states = torch.load(path)
    for of_p in states[0]['state'].values():
        of_p['exp_avg'] = of_p['exp_avg'][:1]
    torch.save(states, path)
    refuse('does not hold the optimizers of this run (other shapes)', main,
           [*TINY, '--out', str(out), '--steps', '2', '--resume'], capsys)


def test_seconds_are_those_of_all_sessions(tmp_path):
    out = tmp_path / 'run'
    main([*TINY, '--out', str(out), '--steps', '1'])
    state = json.loads((out / 'checkpoint' / 'state.json').read_text())
    state['metrics']['seconds'] += 1000
    (out / 'checkpoint' / 'state.json').write_text(json.dumps(state))
    main([*TINY, '--out', str(out), '--steps', '2', '--resume'])
    assert 1000 < json.loads((out / 'metrics.json').read_text())['seconds'] < 1100
    assert 1000 < json.loads((out / 'log.jsonl').read_text().splitlines()[-2])['seconds'] < 1100


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
    """Sixteen kills a moment after a drawn step, and four while a run starts."""
    steps, out = 150, tmp_path / 'killed'
    options = [*TINY, '--steps', str(steps), '--eval-every', '3']
    main([*options, '--out', str(tmp_path / 'whole')])
    dice = random.Random(0)
    moments = sorted(dice.sample(range(1, steps - 10), 16))

    def steps_logged():
        log = out / 'log.jsonl'
        return log.read_text().count('grad_norm') if log.exists() else 0

    for kill in range(20):
        folders = out / 'checkpoint', f'{out}/checkpoint.old'
        resume = ['--resume'] * any(map(os.path.isdir, folders))
        command = [sys.executable, 'train.py', *options, '--out', str(out), *resume]
        session = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        if kill % 5 == 0:
            time.sleep(dice.uniform(0, 2))
        else:
            moment = moments.pop(0)
            while session.poll() is None and steps_logged() < moment:
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.1))
        assert session.poll() is None, f'run {kill} ended before it was killed'
        session.kill()
        session.wait()
    main([*options, '--out', str(out), '--resume'])
    states = [load_file(run / 'checkpoint' / 'model.safetensors')
              for run in (tmp_path / 'whole', out)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert losses(out) == losses(tmp_path / 'whole')
    records = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    evaluated = [record['step'] for record in records if 'metrics' in record]
    assert evaluated == [*range(3, steps + 1, 3)]


def test_another_number_of_processes_is_refused(tmp_path, capsys, monkeypatch):
    out = tmp_path / 'run'
    main([*TINY, '--out', str(out), '--steps', '1'])
    before = (out / 'log.jsonl').read_text()
    monkeypatch.setattr('common.PROCESSES', '2')
    refuse('WORLD_SIZE is 2, but torchrun did not start this', main, [*TINY, '--out', str(out)],
           capsys)
    monkeypatch.setenv('MASTER_ADDR', 'localhost')
    monkeypatch.setattr('common.dist.is_initialized', lambda: True)
    refuse(f'--resume: {out} was trained by 1 processes, these are 2', main,
           [*TINY, '--out', str(out), '--steps', '2', '--resume'], capsys)
    assert (out / 'log.jsonl').read_text() == before


def test_a_finished_run_is_not_resumed(tmp_path, capsys):
    out = tmp_path / 'out'
    main([*TINY, '--out', str(out), '--steps', '1'])
    before = (out / 'metrics.json').read_text()
    refuse(f'--resume: {out} has had all 1 steps', main,
           [*TINY, '--out', str(out), '--steps', '1', '--resume'], capsys)
    assert (out / 'metrics.json').read_text() == before


def test_a_new_run_does_not_go_on_from_an_earlier_one_in_its_folder(tmp_path, capsys, monkeypatch):
    out = tmp_path / 'out'
    main([*TINY, '--out', str(out)])
    with monkeypatch.context() as patch:
        patch.setattr(train, 'take_step', Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main([*TINY, '--out', str(out), '--steps', '40'])
    refuse(f'--resume: no checkpoint in {out}', main,
           [*TINY, '--out', str(out), '--steps', '40', '--resume'], capsys)
    assert read_psfm(weights_of_run(out / 'checkpoint.earlier'))[1]['step'] == '4'
    main([*TINY, '--out', str(out), '--steps', '1'])
    assert not (out / 'checkpoint.earlier').exists()


def test_other_categories_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr('rooms.CLASSES', ['floor', 'ceiling', 'wall', 'stool'])
    with pytest.raises(InputError, match='the rooms have .*stool: make it anew with python mini_v'):
        main([*TINY, '--out', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    refuse('Not a directory', main, [*TINY, '--out', str(tmp_path / 'file' / 'out')], capsys)


def test_broken_numbers_never_replace_a_checkpoint():
    fine = torch.tensor(1.0)
    broken = torch.tensor(float('nan'))
    config = SimpleNamespace(out='x')
    assert train.check_finite({'loss': fine}, fine, [fine], 3, config) == {'loss': 1.0}
    for loss, norm, weight in ((broken, fine, fine), (fine, broken, fine), (fine, fine, broken)):
        with pytest.raises(InputError, match='step 3: loss .*begin anew .* x/checkpoint'):
            train.check_finite({'loss': loss}, norm, [fine, weight], 3, config)


def test_an_encoder_without_latents_is_nothing_for_a_vlm(tmp_path, capsys):
    main([*TINY, '--out', str(tmp_path), '--steps', '1', '--num-latents', '0'])
    refuse('has no latents (--num-latents 0) that a VLM could be given', finetune.main,
           ['--encoder', str(tmp_path), '--num-rooms', '4', '--val-scenes', '4', '--device', 'cpu',
            '--out', str(tmp_path / 'vlm')], capsys)


def test_a_run_that_breaks_its_weights_fails_and_saves_nothing(tmp_path, capsys):
    out = tmp_path / 'out'
    broken = [*TINY, '--out', str(out), '--lr', '1e38', '--warmup', '0']
    refuse('step 1: loss ', main, broken, capsys)
    assert {path.name for path in out.iterdir()} == {'config.json', 'log.jsonl'}


def test_no_room_on_the_disk_keeps_what_was_saved(tmp_path):
    """File sizes are limited to less than a checkpoint's: from here, that is a full disk."""
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    out = tmp_path / 'out'
    main([*TINY, '--out', str(out), '--steps', '1'])
    before = (out / 'checkpoint' / 'state.json').read_text()
    command = ['train.py', *TINY, '--out', str(out), '--steps', '2', '--resume']
    code, said = run(*command, preexec_fn=limit_files)
    assert code == 1 and 'Traceback' not in said, said
    assert 'error: could not write the checkpoint of step 2' in said
    assert 'make room, then --resume' in said
    assert (out / 'checkpoint' / 'state.json').read_text() == before
    main(command[1:])
    assert '"step": 2' in (out / 'checkpoint' / 'state.json').read_text()
