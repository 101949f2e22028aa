"""The scripts as a user runs them: in a process of their own for bad input, in this one for numbers."""
import dataclasses
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bench
import finetune
import train
from model import InputError, read_weights
from psfm import load_psfm
from test_data import make_folder, picture
from test_psfm import MASK, make_psfm
from train import PRESETS, Config, learning_rate, main, make_optimizers, parse_config

ROOT = Path(__file__).parent.parent
TINY = ['--width', '32', '--num-heads', '2', '--encoder-depth', '1', '--decoder-depth', '1', '--num-latents', '4', '--num-rooms', '8',
        '--val-scenes', '4', '--images-per-batch', '8', '--steps', '4', '--eval-every', '2', '--log-every', '1', '--device', 'cpu', '--dtype', 'float32']


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


def losses(out):
    return [(record['step'], record['loss'], record['grad_norm']) for record in map(json.loads, (Path(out) / 'log.jsonl').read_text().splitlines()) if 'loss' in record]


def run(*arguments, **options):
    """A script in its own process. -> (exit code, everything printed)"""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)
    return done.returncode, done.stdout + done.stderr


# -----------------------------------------------------------------------------
# numbers

def test_learning_rate_is_a_function_of_the_step():
    config = Config(steps=100, warmup=10, min_lr=0.1, decay_from=0.5)
    assert learning_rate(0, config) == pytest.approx(1 / 11)
    assert learning_rate(10, config) == learning_rate(50, config) == 1
    assert 0.1 < learning_rate(75, config) < 1 and learning_rate(100, config) == pytest.approx(0.1)


def test_same_seed_same_losses_and_resume_continues_them(tmp_path):
    whole, again, parts = [str(tmp_path / name) for name in ('whole', 'again', 'parts')]
    main(['--config', 'small', *TINY, '--out', whole])
    main(['--config', 'small', *TINY, '--out', again])
    assert losses(whole) == losses(again) and len(losses(whole)) == 4
    # stopped after two of four steps: the cosine is that of four, as it would be if the machine had gone down
    with pytest.MonkeyPatch.context() as patch:
        save = train.save_checkpoint

        def stop(*args):
            save(*args)
            raise KeyboardInterrupt
        patch.setattr(train, 'save_checkpoint', stop)
        with pytest.raises(KeyboardInterrupt):
            main(['--config', 'small', *TINY, '--out', parts])
    main(['--config', 'small', *TINY, '--out', parts, '--resume'])
    assert losses(parts) == losses(whole)
    evaluations = [line for line in (Path(parts) / 'log.jsonl').read_text().splitlines() if 'metrics' in line]
    assert [json.loads(line)['step'] for line in evaluations] == [2, 4]
    main(['--config', 'small', *TINY, '--out', again, '--seed', '1'])
    assert losses(again)[0] != losses(whole)[0]


def test_a_run_leaves_what_it_promises(tmp_path):
    main(['--config', 'small', *TINY, '--out', str(tmp_path), '--steps', '2'])
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    for name in ('psfm', 'mean', 'position', 'nearest', 'shuffled', 'camera', 'context'):
        assert metrics[name].keys() == {'cos', 'centred_cos', 'r2'}
    assert metrics['position']['r2'] > 0.05 > abs(metrics['mean']['r2'])
    assert json.loads((tmp_path / 'config.json').read_text())['width'] == 32
    assert metrics['read_out'].keys() == {'true', 'psfm', 'camera', 'shuffled'}
    assert metrics['read_out']['true']['class_accuracy'] > metrics['read_out']['psfm']['class_accuracy']
    picture = Image.open(tmp_path / 'field.png')
    assert picture.width > 500 and len(picture.getcolors(1 << 24)) > 1000
    assert not any(name.startswith('backbone.') for name in load_file(tmp_path / 'checkpoint' / 'model.safetensors'))
    code, said = run('eval.py', 'field', '--run', str(tmp_path), '--device', 'cpu')
    assert code == 0 and 'from the average latents' in said and 'rooms that training never shows' in said
    again = json.loads((tmp_path / 'metrics.json').read_text())
    assert again['psfm']['r2'] == pytest.approx(metrics['psfm']['r2'], abs=1e-3)
    assert 'seconds' in again


def test_given_cameras_separate_context_and_a_probe_train_too(tmp_path):
    main(['--config', 'small', *TINY, '--out', str(tmp_path), '--cameras', 'given', '--context', 'separate', '--depth-probe',
          '--no-standardised', '--steps', '1', '--accumulate', '2'])
    assert (tmp_path / 'field.png').is_file()


def test_photographs_of_mixed_kinds_train(tmp_path, capsys):
    root = make_folder(tmp_path / 'photos', scenes=3, frames=6)
    for name, mode in [('6.png', 'RGBA'), ('7.png', 'I;16'), ('8.jpg', 'CMYK'), ('9.webp', 'RGB')]:
        picture(root / 'scene0' / name, size=(90, 50), mode=mode)
    (root / 'scene1' / '1.jpg').write_text('no picture')
    main(['--config', 'small', *TINY, '--out', str(tmp_path / 'out'), '--data', str(root), '--workers', '0', '--steps', '2'])
    said = capsys.readouterr().out
    assert '2 scenes to train on' in said and 'held out: scene scene2' in said
    assert (tmp_path / 'out' / 'field.png').is_file()
    assert 'read_out' not in json.loads((tmp_path / 'out' / 'metrics.json').read_text())


def test_mini_vggt_trains_and_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir('weights')
    main(['--config', 'mini-vggt', '--num-rooms', '8', '--val-scenes', '8', '--steps', '2', '--log-every', '1', '--device', 'cpu'])
    backbone = train.build_psfm(parse_config(['--config', 'small'])[1]).backbone
    assert os.path.getsize('weights/mini_vggt.safetensors') < 16 << 20
    with safe_open('weights/mini_vggt.safetensors', 'pt') as file:
        assert file.metadata()['command'].startswith('python train.py --config mini-vggt') and 'metrics' in file.metadata()
    assert backbone.frozen and backbone(torch.rand(1, 2, 3, 64, 64)).features.shape == (1, 2, 64, 256)


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    config = Config(muon_lr=1e-3)
    model = train.build_psfm(config)
    adamw, muon = make_optimizers(model, config, torch.device('cpu'))
    ids = lambda optimizer: {id(p) for group in optimizer.param_groups for p in group['params']}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert ids(adamw) | ids(muon) == trained and not ids(adamw) & ids(muon)
    assert ids(muon) == {id(p) for name, p in model.named_parameters() if p.requires_grad and '.blocks.' in name and p.ndim == 2}


def test_muon_is_torchs_muon_but_for_its_precision():
    g = torch.Generator().manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 48), (16, 16)]
    ours, theirs = [[torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)] for _ in range(2)]
    before = [p.detach().clone() for p in ours]
    optimizers = [train.Muon(ours, lr=0.01, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn='match_rms_adamw')]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, start in zip(ours, theirs, before):
        assert (p - q).norm() < 0.02 * (q - start).norm()             # bf16 has three digits
    values = torch.linalg.svdvals(train.orthogonalise(torch.randn(3, 20, 50, generator=g)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_init_begins_with_the_weights_of_another_run(tmp_path):
    first, second = tmp_path / 'first', tmp_path / 'second'
    main(['--config', 'small', *TINY, '--out', str(first)])
    weights = first / 'checkpoint' / 'model.safetensors'
    main(['--config', 'small', *TINY, '--out', str(second), '--init', str(weights), '--seed', '3', '--steps', '1', '--lr', '0', '--muon-lr', '0'])
    before, after = load_file(weights), load_file(second / 'checkpoint' / 'model.safetensors')
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    psfm, config = load_psfm(weights)                                 # a file of weights is as good as its run's folder
    assert config.width == 32 and torch.equal(psfm.encoder.queries, before['encoder.queries'])
    refuse('README.md is not a safetensors file', *TINY, '--init', 'README.md', '--out', str(second))
    refuse('holds the checkpoint of a run (psfm), not a VGGT', *TINY, '--backbone', str(weights), '--out', str(second))
    refuse('does not fit this PSFM: other shapes for', *TINY, '--width', '64', '--init', str(weights), '--out', str(second))


def test_init_of_the_mini_vggt_skips_the_lessons_with_two_views(tmp_path):
    weights = ROOT / 'weights' / 'mini_vggt.safetensors'
    main(['--config', 'mini-vggt', '--init', str(weights), '--num-rooms', '8', '--val-scenes', '8', '--steps', '1', '--lr', '0', '--muon-lr', '0',
          '--device', 'cpu', '--out', str(tmp_path)])
    before, after = load_file(weights), load_file(tmp_path / 'mini_vggt.safetensors')
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    pool = train.RoomPool('train', 0, 8)
    views = lambda config: {train.mini_vggt_batch(pool, step, config)['images'].shape[1] for step in range(12)}
    assert views(Config(task='mini-vggt', steps=1000)) == {2}
    assert views(Config(task='mini-vggt', steps=1000, init='x')) == {3, 4, 5, 6}


def test_latents_are_not_read_beside_another_backbone(tmp_path, monkeypatch):
    main(['--config', 'small', *TINY, '--out', str(tmp_path), '--steps', '1'])
    state, metadata = read_weights(ROOT / 'weights' / 'mini_vggt.safetensors')
    save_file({**state, 'aggregator.camera_token': state['aggregator.camera_token'] + 1}, tmp_path / 'other.safetensors', metadata)
    folder = tmp_path / 'checkpoint' / 'model.safetensors'
    ours, settings = read_weights(folder)
    changed = {**json.loads(settings['config']), 'backbone': str(tmp_path / 'other.safetensors')}
    save_file(ours, folder, {**settings, 'config': json.dumps(changed)})
    with pytest.raises(InputError, match='was trained on another backbone'):
        load_psfm(tmp_path)


def test_without_latents_the_decoder_knows_the_camera_alone(tmp_path):
    main(['--config', 'small', *TINY, '--out', str(tmp_path), '--num-latents', '0', '--steps', '2'])
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['psfm'] == metrics['shuffled'] == metrics['camera']
    assert load_psfm(tmp_path)[0].latents(torch.rand(1, 2, 3, 64, 64)).shape == (1, 0, 32)


def average_gradient(rank, folder):
    """One process of two: its own rooms, one backward pass through DDP."""
    torch.manual_seed(0)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    psfm = make_psfm()
    images = torch.rand(2, 4, 3, 16, 24, generator=torch.Generator().manual_seed(rank))
    ddp = torch.nn.parallel.DistributedDataParallel(psfm)
    ddp(images=images, view_mask=MASK)['loss'].backward()
    torch.save({name: p.grad for name, p in psfm.named_parameters() if p.requires_grad}, f'{folder}/{rank}.pt')


def test_two_processes_average_their_gradients(tmp_path):
    torch.multiprocessing.spawn(average_gradient, (str(tmp_path),), nprocs=2)
    psfm = make_psfm()
    for rank in range(2):
        images = torch.rand(2, 4, 3, 16, 24, generator=torch.Generator().manual_seed(rank))
        (psfm(images=images, view_mask=MASK)['loss'] / 2).backward()
    one, two = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for name, parameter in psfm.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(one[name], two[name]) and torch.allclose(one[name], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_two_processes_train_together(tmp_path):
    code, said = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', 'train.py', '--config', 'small', *TINY,
                     '--out', str(tmp_path), '--steps', '2', env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert code == 0, said
    assert said.count('step 00000/00002') == 1 and (tmp_path / 'field.png').is_file()


def test_bench_ends_with_json():
    code, said = run('bench.py', '--images', '8', '--repeats', '1', '--device', 'cpu')
    assert code == 0, said
    report = json.loads(said.strip().splitlines()[-1])
    assert {'patch embed', 'frame blocks', 'global blocks', 'camera head', 'encoder', 'decoder', 'head and loss', 'backward'} \
        == report['runs'][0]['parts'].keys()
    assert report['runs'][0]['render_share'] < 0.5

    # what is predicted from shapes alone is what was counted while computing
    predicted = bench.predict('small', dataclasses.replace(Config(**PRESETS['small']), images_per_batch=8), 6)
    for part in ('patch embed', 'camera head', 'encoder', 'decoder'):
        assert predicted['flops'][part] == report['runs'][0]['parts'][part]['flops'], part
    assert predicted['trained'] == 1_427_328 - 2 * 256 and predicted['kept_gb'] > 0


# -----------------------------------------------------------------------------
# bad input: one clear sentence, no traceback

def test_commands_of_the_readme_are_understood(monkeypatch):
    """Every `train.py` and `finetune.py` command on that page has options that exist; every script named there is a file."""
    lines = [line.split('#')[0].strip() for block in (ROOT / 'README.md').read_text().split('```bash')[1:]
             for line in block.split('```')[0].splitlines() if line.strip()]
    commands = [command.split() for line in lines for command in line.split('&&')]
    assert len(commands) > 8
    for command in commands:
        script = next((word for word in command if word.endswith('.py')), None)
        assert script is None or (ROOT / script).is_file()
        if script == 'train.py':
            parse_config(command[command.index(script) + 1:])
        if script == 'finetune.py':
            finetune.parse_config(shlex.split(' '.join(command))[command.index(script) + 1:])


def test_line_counts_of_the_readme():
    rows = re.findall(r'^\| `(\w+\.py)` \| (\d+) \|', (ROOT / 'README.md').read_text(), re.M)
    assert len(rows) == 11
    for name, promised in rows:
        assert len((ROOT / name).read_text().splitlines()) == pytest.approx(int(promised), rel=0.05), name


def test_bench_knows_every_preset(monkeypatch):
    import bench
    for name in ('small', 'medium', 'base'):
        monkeypatch.setattr(bench, 'VGGT', lambda config: (_ for _ in ()).throw(InputError('reached the model')))
        with pytest.raises(InputError, match='reached the model'):
            bench.main(['--config', name, '--device', 'cpu'])


def refuse(message, *arguments, script='train.py', **options):
    code, said = run(script, *arguments, **options)
    assert code != 0 and 'Traceback' not in said, said
    assert message in said, said
    assert len([line for line in said.splitlines() if line.startswith('error: ')]) == 1


@pytest.mark.parametrize('arguments,message', [
    (['--config', 'smal'], "no preset 'smal', did you mean small?"),
    (['--widht', '3'], 'no option --widht; did you mean --width'),
    (['--steps', 'many'], "argument --steps: invalid int value: 'many'"),
    (['--steps', '0'], '--steps must be at least 1, not 0'),
    (['--context', 'both'], '--context takes asymmetric or separate, not both'),
    (['--mask-ratio', '1'], '--mask-ratio 1.0 must lie between 0 and 1'),
    (['--image-width', '60'], '--image-width 60 is not a multiple of the patch size 8: take 56 or 64'),
    (['--width', '100', '--num-heads', '3'], 'a head needs a multiple of 8 channels'),
    (['--num-latents', '-1'], '--num-latents -1 must be 0 or more'),
    (['--max-views', '9'], '--max-views 9: a room has 8 views'),
    (['--device', 'gpu'], '--device gpu: torch knows no such device'),
    (['--min-gap', '5', '--max-gap', '2'], 'gaps in this order'),
    (['--config', 'mini-vggt', '--data', 'photos'], 'mini-vggt learns from rooms alone'),
    (['--device', 'cuda'], '--device cuda: torch sees no CUDA GPU here'),
    (['--data', 'nowhere'], 'no folder nowhere'),
    (['--data', 'photos', '--cameras', 'given'], 'only rooms come with cameras'),
    (['--config', 'base'], 'base trains on your own pictures: --data FOLDER'),
    (['--backbone', 'weights/none.safetensors'], 'no weights at weights/none.safetensors'),
])
def test_bad_options(arguments, message, tmp_path):
    if '--device' in arguments and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    refuse(message, *arguments, '--out', str(tmp_path / 'out'))


def test_bad_backbone_file(tmp_path):
    (tmp_path / 'broken.safetensors').write_text('not weights')
    refuse('is not a safetensors file', '--backbone', str(tmp_path / 'broken.safetensors'), '--out', str(tmp_path / 'out'))
    save_file({'something.else': torch.zeros(1)}, tmp_path / 'other.safetensors', {'config': '{"heads": ["camera"], "width": 64, "num_heads": 2, "depth": 1, "patch_embed": "conv", "patch_size": 8}'})
    refuse('unexpected something.else', '--backbone', str(tmp_path / 'other.safetensors'), '--out', str(tmp_path / 'out'))


def test_bad_checkpoints(tmp_path):
    out = str(tmp_path / 'out')
    refuse(f'--resume: no checkpoint at {out}/checkpoint', *TINY, '--out', out, '--resume')
    refuse(f'no checkpoint in {out}: train first', 'field', '--run', out, script='eval.py')
    main(['--config', 'small', *TINY, '--out', out, '--steps', '1'])
    refuse('was trained with another configuration (width 32 there, 64 here)', *TINY, '--out', out, '--resume', '--width', '64')


def test_unwritable_output(tmp_path):
    (tmp_path / 'file').write_text('')
    refuse('Not a directory', *TINY, '--out', str(tmp_path / 'file' / 'out'))


def test_broken_numbers_never_replace_a_checkpoint():
    fine, broken = torch.tensor(1.0), torch.tensor(float('nan'))
    assert train.check_finite({'loss': fine}, fine, 3, 'there') == {'loss': 1.0}
    for loss, norm in ((broken, fine), (fine, broken)):
        with pytest.raises(InputError, match='at step 3'):
            train.check_finite({'loss': loss}, norm, 3, 'there')


def test_no_room_on_the_disk_keeps_what_was_saved(tmp_path):
    """File sizes are limited to less than a checkpoint's, which is what a full disk looks like from here."""
    out = tmp_path / 'out'
    main(['--config', 'small', *TINY, '--out', str(out), '--steps', '2'])
    before = (out / 'checkpoint' / 'state.json').read_text()
    command = ['train.py', *TINY, '--out', str(out), '--steps', '4', '--resume']
    code, said = run(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
    assert code == 1 and 'Traceback' not in said, said
    assert 'error: could not write the checkpoint of step 4' in said and 'make room and continue with --resume' in said
    assert (out / 'checkpoint' / 'state.json').read_text() == before
    assert run(*command)[0] == 0 and '"step": 4' in (out / 'checkpoint' / 'state.json').read_text()
