"""Experiments of many runs: what is trained, what is kept, what the tables say."""
import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import ablate
import finetune
import psfm as method
import train
from ablate import STYLES, CameraToken, comparison, main
from common import InputError, find_file, read_weights
from data import RoomPool
from eval import SHIPPED
from eval import main as eval_main
from measure import field_batches
from psfm import FieldDecoder, load_psfm
from rooms import scene_extrinsics
from tiny import TINY_PSFM, losses, options, refuse, save_tiny_vlm


@pytest.fixture(scope='module')
def tiny_vlm(tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp('vlm') / 'tiny')


# -----------------------------------------------------------------------------
# the method, one decision at a time

def test_a_camera_token_decodes_each_view_on_its_own():
    torch.manual_seed(0)
    decoder = CameraToken(32, 2, 2).eval()
    z, extrinsics = torch.randn(2, 5, 32), torch.randn(2, 3, 3, 4)
    intrinsics = torch.tensor([[30.0, 0, 32], [0, 30, 24], [0, 0, 1]]).expand(2, 3, 3, 3)
    size, grid = (48, 64), (6, 8)
    with torch.no_grad():
        out = decoder(z, extrinsics, intrinsics, size, grid)
        alone = decoder(z, extrinsics[:, 1:2], intrinsics[:, 1:2], size, grid)
        turned = decoder(z, extrinsics.roll(1, 1), intrinsics, size, grid)
    assert out.shape == (2, 3, 48, 32)
    torch.testing.assert_close(out[:, 1:2], alone)
    torch.testing.assert_close(out.roll(1, 1), turned)
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3  # cameras differ, and so do their views


def test_a_decoder_can_be_replaced():
    with mock.patch.object(method, 'FieldDecoder', CameraToken):
        assert isinstance(method.build_psfm(train.Config()).decoder, CameraToken)


def run(value):
    read = dict(psfm=dict(object_recall=0.0, depth_abs_rel=0.0))
    metrics = dict(psfm=dict(r2=value), camera=dict(r2=0.0), read_out=read)
    return dict(asked=dict(asymmetric=metrics, separate=metrics), seconds=60)


def test_intervals_are_of_student_and_differences_are_paired():
    text = comparison({'a': [run(x) for x in (0.1, 0.2, 0.3)],
                       'b': [run(x) for x in (0.2, 0.3, 0.4)]}, 'a')
    rows = [line.split() for line in text.splitlines()[1:-1]]
    assert [row[0] for row in rows] == ['a', 'b', 'b']
    # standard deviation 0.1 of three: 4.30 x 0.1 / sqrt(3)
    assert rows[0][1:3] == ['0.200', '±0.248'] and rows[1][1:3] == ['0.300', '±0.248']
    assert rows[2][:5] == ['b', 'minus', 'a', '0.100', '±0.000']
    assert '±' not in comparison({'a': [run(0.1)]})


def test_field_trains_every_row_and_asks_all_the_same(tmp_path, monkeypatch, capsys):
    changes = dict(ablate.FIELD)
    chosen = 'as it is', 'camera token', 'no latents', 'mask ratio 0.75', 'two passes'
    monkeypatch.setattr(ablate, 'FIELD', {name: changes[name] for name in chosen})
    asked, ask = [], ablate.evaluate_field

    def evaluate(psfm, train_source, held_out, *rest):
        asked.append((psfm.context, psfm.mask_ratio, type(psfm.decoder)))
        return ask(psfm, train_source, held_out, *rest)

    monkeypatch.setattr(ablate, 'evaluate_field', evaluate)
    out = tmp_path / 'runs'
    arguments = ['field', '--seeds', '0', '--out', str(out), *TINY_PSFM, '--mask-ratio', '0.5']
    main(arguments)
    assert asked == [(context, mask, decoder)
                     for mask, decoder in ((0.5, FieldDecoder), (0.5, CameraToken),
                                           (0.5, FieldDecoder), (0.75, FieldDecoder),
                                           (0.5, FieldDecoder))
                     for context in ('asymmetric', 'separate')]
    configs = [json.loads((out / f'{name.replace(" ", "-")}-0' / 'config.json').read_text())
               for name in chosen]
    assert [config['context'] for config in configs] == [*['asymmetric'] * 4, 'separate']
    assert [config['mask_ratio'] for config in configs] == [0.5, 0.5, 0.5, 0.75, 0.5]
    assert [config['decoder'] for config in configs] == [
        'FieldDecoder', 'CameraToken', *['FieldDecoder'] * 3]
    assert [config['num_latents'] == 0 for config in configs] == [False, False, True, False, False]
    assert all(config['width'] == 32 for config in configs)
    shown = capsys.readouterr().out
    for words in ('R2, two passes', 'camera token minus as it is', 'two passes minus as it is'):
        assert words in shown

    # eval.py sees them as finished runs, and tells the decoders apart
    eval_main(['runs', *(str(out / f'{name.replace(" ", "-")}-0') for name in chosen)])
    shown = capsys.readouterr().out
    assert 'decoder=CameraToken' in shown and 'mask_ratio=0.75' in shown
    assert len(shown.splitlines()) == 6

    # what was trained is kept, as long as it is younger than what it was trained with
    trained = os.path.getmtime(find_file('weights/mini_vggt.safetensors')) + 0.001
    os.utime(out / 'as-it-is-0' / 'metrics.json', (trained, trained))
    main(arguments)
    assert len(asked) == 10 and 'camera token minus as it is' in capsys.readouterr().out
    with pytest.raises(InputError, match='steps 1 there, 2 here'):
        main([*arguments, '--steps', '2'])
    os.utime(out / 'as-it-is-0' / 'metrics.json', (trained - 1, trained - 1))
    with pytest.raises(InputError, match='is older than .*mini_vggt.safetensors'):
        main(arguments)


def test_a_backbone_without_heads_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, 'knows_rooms', lambda psfm, config: False)
    monkeypatch.setattr(train, 'train', lambda name, config: pytest.fail('it was trained'))
    with pytest.raises(InputError, match='has no heads that read depth'):
        main(['field', '--seeds', '0', '--out', str(tmp_path), *TINY_PSFM])


def test_weights_say_by_which_command_they_were_made(tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', ['/somewhere/train.py', '--config', 'small'])
    train.main([*TINY_PSFM, '--out', str(tmp_path)])
    _, metadata = read_weights(str(tmp_path / 'checkpoint' / 'model.safetensors'))
    assert metadata['command'] == 'python train.py --config small'


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, 'FIELD', {'as it is': ([], FieldDecoder)})
    write = train.save_checkpoint

    def stop(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    arguments = ['field', '--seeds', '0', '--out', str(tmp_path), *TINY_PSFM, '--steps', '3',
                 '--eval-every', '2', '--log-every', '1']
    with monkeypatch.context() as patch:
        patch.setattr(train, 'save_checkpoint', stop)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    log = tmp_path / 'as-it-is-0' / 'log.jsonl'
    begun = log.read_text()
    main(arguments)
    assert log.read_text().startswith(begun)  # with the seconds that it took: not made again
    assert [step for step, _ in losses(log.parent)] == [1, 2, 3]

    # and is kept, like one that was not
    monkeypatch.setattr(train, 'train', lambda name, config: pytest.fail('it was trained again'))
    main(arguments)


def test_half_of_the_views_are_shown_to_every_run():
    """The evaluation's question does not depend on the mask ratio of the training."""
    psfm, config = load_psfm(SHIPPED)
    masks = []
    for ratio in (0.5, 0.9):
        psfm.mask_ratio = ratio
        (_, mask, num_context), = field_batches(psfm, RoomPool('val', 0, 4), config, 4)
        masks.append(mask)
        assert num_context == 3
    assert torch.equal(*masks)


def test_scaling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, 'WIDTHS', (64, 128))
    monkeypatch.setattr(ablate, 'STEPS', (1, 2))
    main(['scaling', '--seeds', '0', '1', '--out', str(tmp_path / 'runs'), *TINY_PSFM[4:]])
    shown = capsys.readouterr().out
    assert '128 wide 2 steps' in shown and 'minus' not in shown
    assert (tmp_path / 'runs' / 'scaling.png').is_file()
    for width in (64, 128):
        for steps in (1, 2):
            for seed in (0, 1):  # whatever the options say, the row's own hold
                out = tmp_path / 'runs' / f'{width}-wide-{steps}-steps-{seed}'
                config = json.loads((out / 'config.json').read_text())
                assert config['width'] == width and config['num_heads'] == width // 64
                assert config['steps'] == steps and config['seed'] == seed


# -----------------------------------------------------------------------------
# other worlds

def test_worlds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*TINY_PSFM, '--out', 'run'])
    main(['worlds', '--run', 'run', '--rooms', '4', '--device', 'cpu'])
    rows = capsys.readouterr().out.splitlines()
    assert [row[:26].strip() for row in rows[-9:-1]] == ['', *STYLES]
    found = json.loads(Path('run/worlds.json').read_text())
    assert list(found) == list(STYLES)
    truths = [world['read_out']['true']['depth_abs_rel'] for world in found.values()]
    assert len(set(truths)) == len(truths)  # they are different worlds


def test_what_a_view_shows_is_shown_by_itself_and_not_from_behind():
    batch = RoomPool('val', 0, 8).batch(0, 8, 4)
    each = torch.arange(4).expand(8, 4)
    size, grid = (64, 64), (8, 8)
    assert ablate.is_shown(batch, each, each, size, grid).all()
    some = ablate.is_shown(batch, each[:, :1], each[:, 1:], size, grid)
    assert some.shape == (8, 3, 64) and 0.05 < some.float().mean() < 0.95
    back = dict(batch, extrinsics=batch['extrinsics'].clone())
    turn = torch.diag(torch.tensor([-1.0, 1, -1]))  # half a turn about the camera's own down
    back['extrinsics'][:, 1] = turn @ batch['extrinsics'][:, 0]
    back['depth'][:, 1] = batch['depth'][:, 0]
    assert not ablate.is_shown(back, each[:, 1:2], each[:, :1], size, grid).any()

    # behind what the same camera sees, nothing is shown; a little behind may be a cell's slope
    behind = dict(batch, extrinsics=batch['extrinsics'][:, :1].expand(-1, 4, -1, -1),
                  depth=batch['depth'][:, :1] * torch.tensor([1.0, 1.02, 1.3, 2])[:, None, None])
    shown = ablate.is_shown(behind, each[:, :1], each, size, grid)
    assert shown[:, :2].all() and not shown[:, 2:].any()


def test_cells_of_a_patch():
    cells = torch.arange(16).view(1, 1, 4, 4)
    assert ablate.per_patch(cells, (2, 2)).tolist() == [[[
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]]


def test_errors_of_the_cameras_to_be_looked_from():
    truth = scene_extrinsics(RoomPool('val', 0, 4).batch(0, 2, 4)['extrinsics'])
    assert ablate.camera_errors(truth, truth, 2).max() < 0.1
    wrong = truth.clone()
    wrong[:, 3] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]) @ truth[:, 3]
    errors = ablate.camera_errors(wrong, truth, 2)
    assert errors.shape == (2, 2) and errors[:, 0].max() < 0.1
    assert (errors[:, 1] > 89).all()


def test_a_room_from_its_own_cameras_is_what_the_pictures_show():
    pool = RoomPool('val', 0, 4)
    batch, rooms = pool.batch(0, 4, 6), pool.render_block(0)[0]
    mask = torch.tensor([False, True, False, True, True, False]).expand(4, -1)
    own = ablate.room_from(scene_extrinsics(batch['extrinsics']), batch, rooms, mask)
    assert (own - batch['images']).abs().mean() < 1e-3
    other = ablate.room_from(scene_extrinsics(batch['extrinsics']).roll(1, 1), batch, rooms, mask)
    assert torch.equal(other[:, 0], batch['images'][:, 0])
    assert (other[:, 1] - batch['images'][:, 1]).abs().mean() > 0.02
    assert (other[:, 1] - batch['images'][:, 0]).abs().mean() < 1e-3


def test_limits(capsys):
    main(['limits', '--rooms', '8', '--device', 'cpu'])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:5] == ['unseen', 'views', 'of', '8', 'held-out'] and len(rows) == 9
    shown, hidden = rows[-2:]
    assert int(shown[-8]) + int(hidden[-8]) == pytest.approx(100, abs=1)
    assert shown[-6:-4] == ['100', '%'] and hidden[-6:-4] == ['0', '%']
    assert float(shown[-1]) > float(hidden[-1])  # furniture is found where the context shows it


# -----------------------------------------------------------------------------
# arms of a VLM

def test_arms_of_a_vlm(tiny_vlm, tmp_path, capsys):
    out = tmp_path / 'arms'
    arguments = ['vlm', '--arms', 'psfm', 'none', '--seeds', '0',
                 *options(tiny_vlm, tmp_path, '--steps', '1', '--map-steps', '0'),
                 '--out', str(out)]
    main(arguments)
    shown = capsys.readouterr().out
    for words in ('without looking', 'commonest answer', 'best constant answer', 'psfm, 1 seed',
                  'psfm, shuffled, 1 seed', 'none, 1 seed', 'psfm minus none',
                  f'tokens of {load_psfm(SHIPPED)[1].width} numbers', 'none: 0.'):
        assert words in shown

    # finished runs are kept
    written = os.path.getmtime(out / 'psfm-0' / 'metrics.json')
    main(arguments)
    assert os.path.getmtime(out / 'psfm-0' / 'metrics.json') == written
    assert 'psfm, shuffled, 1 seed' in capsys.readouterr().out
    with pytest.raises(InputError, match='batch 2 there, 4 here'):
        main([*arguments, '--batch', '4'])


def test_every_arm_is_trained_with_every_seed(tiny_vlm, tmp_path, capsys, monkeypatch):
    """The order of things alone; nothing is trained, no room is rendered."""
    trained = []

    def answers(value):
        prior = dict(object_counting=10.0, overall=10.0)
        return dict(scores=[['object_counting', 0, value]], prior=prior, commonest=prior, maps=[],
                    step=600, seconds=60)

    def train(name, config, data, held_out):
        assert (data, held_out) == ('train', 'held out')
        trained.append((config.latents, config.seed, config.out))
        os.makedirs(config.out)
        Path(config.out, 'config.json').write_text(json.dumps(vars(config)))
        Path(config.out, 'metrics.json').write_text(json.dumps(answers(0.5)))

    shuffled = []

    def ask_shuffled(folder, config, data):
        shuffled.append(folder)
        Path(folder, 'metrics.json').write_text(json.dumps(dict(answers(0.5),
                                                                shuffled=answers(0.25))))

    monkeypatch.setattr(finetune, 'make_data', lambda config, progress: ('train', 'held out'))
    monkeypatch.setattr(finetune, 'train', train)
    monkeypatch.setattr(ablate, 'ask_shuffled', ask_shuffled)
    out = str(tmp_path / 'arms')
    arguments = ['vlm', '--arms', 'psfm', 'none', '--seeds', '0', '1', '--out', out,
                 '--vlm', tiny_vlm]
    main(arguments)
    assert trained == [(arm, seed, f'{out}/{arm}-{seed}')
                       for seed in (0, 1) for arm in ('psfm', 'none')]
    assert shuffled == [f'{out}/psfm-0', f'{out}/psfm-1']
    rows = capsys.readouterr().out.splitlines()
    assert [row.split('  ')[0] for row in rows[3:8]] == [
        'psfm, 2 seeds', 'psfm, shuffled, 2 seeds', 'none, 2 seeds',
        'psfm minus psfm, shuffled', 'psfm minus none']

    # finished runs are kept
    main(arguments)
    assert len(trained) == 4
    with pytest.raises(InputError, match='was trained with another configuration .lr'):
        main([*arguments, '--lr', '0.5'])


def test_a_run_is_as_old_as_its_weights_not_as_its_folder(tmp_path):
    encoder, out = tmp_path / 'encoder', tmp_path / 'arm'
    (encoder / 'checkpoint').mkdir(parents=True)
    out.mkdir()
    _, config = finetune.parse_config(['--encoder', str(encoder), '--out', str(out)])
    (out / 'config.json').write_text(json.dumps(vars(config)))
    (out / 'metrics.json').write_text('{}')
    finished = os.path.getmtime(out / 'metrics.json')
    os.utime(encoder / 'checkpoint', (finished - 1, finished - 1))
    os.utime(encoder, (finished + 1, finished + 1))  # `eval.py field` wrote into it
    ablate.check_finished(str(out), config)
    os.utime(encoder / 'checkpoint', (finished + 1, finished + 1))
    with pytest.raises(InputError, match='arm is older than .*encoder'):
        ablate.check_finished(str(out), config)

    # a file in a folder that was there before
    os.utime(encoder / 'checkpoint', (finished - 1, finished - 1))
    for age, error in ((-1, contextlib.nullcontext()),
                       (1, pytest.raises(InputError, match='arm is older than .*encoder'))):
        weights = encoder / 'checkpoint' / 'psfm.safetensors'
        weights.write_text('')
        os.utime(encoder / 'checkpoint', (finished - 1, finished - 1))
        os.utime(weights, (finished + age, finished + age))
        with error:
            ablate.check_finished(str(out), config)


def test_metrics_of_a_run_that_was_cut_off_do_not_make_it_a_finished_one(tmp_path):
    """`eval.py field` leaves some beside any checkpoint."""
    (tmp_path / 'metrics.json').write_text('{"psfm": {"r2": 0.5}}')
    made = []
    _, config = train.parse_config(['--out', str(tmp_path)])
    ablate.kept_or_made(config, lambda: made.append(config))
    assert made == [config]


def test_all_runs_have_the_dtype_that_is_asked_for_or_fast_on_their_device(monkeypatch):
    asked = []

    def pick_dtype(name, device):
        asked.append((name, device.type))
        return torch.bfloat16 if name == 'auto' else getattr(torch, name), ''

    monkeypatch.setattr(ablate, 'pick_dtype', pick_dtype)
    for options, dtype in (['--device', 'cpu'], 'bfloat16'), (['--dtype', 'float32'], 'float32'):
        args = SimpleNamespace(config='small', options=options)
        ablate.one_dtype(args, train.parse_config)
        assert train.parse_config(args.options)[1].dtype == dtype
    assert asked[0] == ('auto', 'cpu') and asked[1][0] == 'float32'


@pytest.mark.parametrize('arguments, message', [
    (['vlm', '--arms', 'all'], "invalid choice: 'all'"),
    (['vlm', '--data', 'a.json'], 'ablate compares on rooms'),
    (['field', '--data', 'photos'], 'ablate compares on rooms'),
    (['field', '--lrr', '1'], 'no option --lrr'),
    (['worlds', '--steps', '3'], 'no option --steps'),
    (['limits', '--run', 'nowhere'], 'no checkpoint in nowhere: train first'),
    (['field', '--seeds', '1', '1'], '1 1: each of them once'),
    (['fields'], "invalid choice: 'fields'"),
])
def test_bad_input(arguments, message, capsys):
    refuse(message, main, arguments, capsys)
