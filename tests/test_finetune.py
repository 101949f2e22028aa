"""Fine-tuning end to end with a tiny VLM, and every fault that a file of conversations can have."""
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers import AutoModelForImageTextToText

import eval as evaluation
import finetune
from adapter import SpatialVLM, load_spatial_vlm, save_spatial_vlm
from chat import Chat, answer_loss, lean_batch, load_vlm
from common import InputError, find_file, read_json, read_weights
from eval import load_answerer
from finetune import Config, TrueList
from model import has_compiler
from optim import rate_share
from records import Conversations, Encoded
from psfm import load_psfm
from questions import RoomQuestions, view_rooms
from rooms import CATEGORIES, CLASSES
from tiny import GOOD, losses, options, save_tiny_vlm, turns, write


@pytest.fixture(scope='module')
def vlm(tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp('vlm') / 'tiny')


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
    """Options by which runs share their latents."""
    return ['--cache', str(tmp_path_factory.mktemp('latents'))]


# -----------------------------------------------------------------------------
# on rooms

def test_rooms_end_to_end(vlm, cached, tmp_path, capsys):
    more = ['--val-scenes', '4', '--eval-every', '1']
    finetune.main(options(vlm, tmp_path, *cached, *more))
    run = tmp_path / 'run'
    metrics = json.loads((run / 'metrics.json').read_text())
    assert 0 <= metrics['overall'] <= 100
    assert metrics['step'] == 2

    # the questions, and a map of every room
    assert len(metrics['scores']) == len(RoomQuestions('val', 0, 4).records) + 4
    with Image.open(run / 'map.png') as picture:
        assert picture.size == (1024, 318)  # four rooms in a row
    said = capsys.readouterr().out
    assert 'psfm, 1 seed' in said
    before_the_end, at_the_end = [line for line in said.split('\n') if 'held-out rooms' in line]
    assert 'maps' in before_the_end and "VSI-Bench's" not in before_the_end
    assert 'maps' in at_the_end and "VSI-Bench's" in at_the_end
    assert 'step 00001/00001 | answers' in said  # of grounding

    # steps are counted as they are done, with the learning rate that they had
    assert [step for step, _ in losses(run)] == [1, 2]
    lines = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    _, config = finetune.parse_config(options(vlm, tmp_path, *cached, *more))
    assert [line['lr'] for line in lines if 'lr' in line] == [
        config.lr * rate_share(step, config) for step in (0, 1)]
    assert json.loads((run / 'checkpoint' / 'state.json').read_text())['step'] == 2
    assert json.loads((run / 'config.json').read_text())['num_rooms'] == 8


def test_losses_do_not_depend_on_what_was_kept_of_latents(vlm, tmp_path):
    finetune.main(options(vlm, tmp_path / 'kept'))
    finetune.main(options(vlm, tmp_path / 'anew', '--cache', ''))
    kept, anew = losses(tmp_path / 'kept' / 'run'), losses(tmp_path / 'anew' / 'run')
    assert [step for step, _ in kept] == [step for step, _ in anew] == [1, 2]
    assert [x for _, x in kept] == pytest.approx([x for _, x in anew], abs=1e-4)
    assert any((tmp_path / 'kept' / 'latents').rglob('*.safetensors'))
    assert not (tmp_path / 'anew' / 'latents').exists()


def test_resume_continues_with_the_same_losses(vlm, cached, tmp_path):
    more = [*cached, '--warmup', '0', '--min-lr', '1', '--eval-every', '2']
    finetune.main(options(vlm, tmp_path / 'whole', '--steps', '4', *more))
    finetune.main(options(vlm, tmp_path / 'half', '--steps', '2', *more))
    finetune.main(options(vlm, tmp_path / 'half', '--steps', '4', *more, '--resume'))
    whole, half = losses(tmp_path / 'whole' / 'run'), losses(tmp_path / 'half' / 'run')
    assert [step for step, _ in half] == [step for step, _ in whole] == [1, 2, 3, 4]
    assert [x for _, x in half] == pytest.approx([x for _, x in whole], abs=1e-5)
    for run in ('whole', 'half'):  # evaluated on the way
        lines = (tmp_path / run / 'run' / 'log.jsonl').read_text().splitlines()
        assert [json.loads(line)['step'] for line in lines if 'metrics' in line] == [2, 4]

    with pytest.raises(InputError, match='batch 2 there, 4 here'):
        finetune.main(options(vlm, tmp_path / 'half', '--batch', '4', '--resume'))
    metrics = tmp_path / 'half' / 'run' / 'metrics.json'
    before = metrics.read_text()
    with pytest.raises(InputError, match='half/run has had all 4 steps'):
        finetune.main(options(vlm, tmp_path / 'half', '--steps', '4', *more, '--resume'))
    assert metrics.read_text() == before


def in_processes(arguments):
    """finetune.py under torchrun, on two processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
               '--nproc_per_node', '2', 'finetune.py', *arguments]
    done = subprocess.run(command, cwd=os.path.dirname(finetune.__file__), text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def weights_of(folder):
    model, _, _ = load_spatial_vlm(str(folder))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason='there is no compiler')
@pytest.mark.parametrize('train', ['adapter', 'adapter+llm', 'lora'])
def test_a_compiled_run_is_the_eager_one(vlm, cached, tmp_path, train, restored_compiler):
    if train == 'lora':
        pytest.importorskip('peft')
    counters.clear()
    for name in ('no-compile', 'compile'):
        assert not counters['stats']['unique_graphs']
        more = ('--train', train, '--steps', '4', '--eval-every', '2', f'--{name}')
        finetune.main(options(vlm, tmp_path / name, *cached, *more))
    assert counters['stats']['unique_graphs']
    found = [read_json(tmp_path / name / 'run' / 'metrics.json')
             for name in ('compile', 'no-compile')]
    compiled, eager = [dict(losses(tmp_path / name / 'run')) for name in ('compile', 'no-compile')]
    assert compiled == pytest.approx(eager, abs=1e-4)
    assert found[0]['maps'] == found[1]['maps']


@pytest.mark.slow
def test_two_processes_whole_and_sharded(vlm, tmp_path):
    """DDP and FSDP2 on two processes take the same two steps; a sharded run is saved whole."""
    weights, norms = {}, {}
    compiled = ['--compile'] * has_compiler()
    for name, more in (('ddp', ()), ('fsdp2', ['--shard']), ('ddp compiled', compiled),
                       ('fsdp2 compiled', ['--shard', '--checkpointing', *compiled])):
        more = ('--batch', '8', '--accumulate', '2', '--num-rooms', '32', *more)  # in two parts
        in_processes(options(vlm, tmp_path / name, *more))
        weights[name] = weights_of(tmp_path / name / 'run' / 'checkpoint')
        first, *_ = (tmp_path / name / 'run' / 'log.jsonl').read_text().splitlines()
        norms[name] = json.loads(first)['grad_norm']
    for name in weights:
        assert torch.allclose(weights['ddp'], weights[name], atol=1e-4)
        assert norms['ddp'] == pytest.approx(norms[name], rel=1e-3)  # of all shards

    # a sharded run that stopped after its first step goes on as if it had not
    def sharded(out, *more):
        more = ('--ground-steps', '0', '--map-steps', '0', '--min-lr', '1', '--warmup', '0', *more)
        in_processes(options(vlm, tmp_path / out, '--shard', *more))
        return weights_of(tmp_path / out / 'run' / 'checkpoint')

    whole = sharded('whole', '--steps', '3')
    first = sharded('half', '--steps', '1')
    again = sharded('half', '--steps', '3', '--resume')
    assert torch.allclose(again, whole, atol=1e-6)
    assert (whole - first).abs().max() > 1e-3
    half, whole = [dict(losses(tmp_path / name / 'run')) for name in ('half', 'whole')]
    assert half == pytest.approx(whole)

    name = 'vlm.model.language_model.layers.0.mlp.up_proj.weight'
    start = SpatialVLM(load_vlm(vlm)[0])
    model, _, _ = load_spatial_vlm(str(tmp_path / 'ddp' / 'run' / 'checkpoint'))
    assert not torch.equal(start.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize('latents, train', [
    ('none', 'adapter+llm'), ('random', 'adapter'), ('backbone', 'adapter'), ('pooled', 'adapter'),
    ('imagined', 'adapter'), ('oracle', 'adapter')])
def test_arms(vlm, tmp_path, latents, train):
    finetune.main(options(vlm, tmp_path, '--steps', '1', '--map-steps', '0', '--latents', latents,
                          '--train', train, '--checkpointing'))
    folder = tmp_path / 'run' / 'checkpoint'
    model, _, settings = load_spatial_vlm(str(folder))
    assert settings['latents'] == latents
    assert (model.adapter is None) == (latents == 'none')
    assert (folder / 'vlm').exists() == (train == 'adapter+llm')
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    _, config = load_psfm(finetune.Config.encoder)
    cost = dict(random=f'{config.num_latents} tokens of {config.width}',
                backbone='96 tokens of 256', pooled='36 tokens of 256',
                imagined='36 tokens of 256', oracle=f'tokens of {len(CATEGORIES) + 7}', none='')
    assert cost[latents] in metrics.get('cost', '')


def test_the_oracle_tells_what_is_true(vlm):
    truth = TrueList(4, 4)
    rooms = RoomQuestions('val', 0, 4)
    block = next(view_rooms('val', 0, 4, RoomQuestions.VIEWS))
    for room in range(4):
        tokens = truth([rooms.pictures(room)])[0]
        said = rooms.maps[room][1]            # the same pieces, in words and whole metres
        pieces = sorted([token[:len(CATEGORIES)].argmax().item(),
                         *token[-6:-4].round().int().tolist()] for token in tokens[:-1])
        words = '; '.join(f'{CATEGORIES[i]} at x {x:+d}, y {y:+d}' for i, x, y in pieces)
        assert (words or 'none') == said
        assert torch.equal(tokens[-1, -3:], block.rooms.size[room])
    with pytest.raises(InputError, match='oracle knows the rooms that it was trained'):
        truth([[Image.new('RGB', (64, 64))]])


def test_lora(vlm, cached, tmp_path):
    pytest.importorskip('peft')
    finetune.main(options(vlm, tmp_path, *cached, '--steps', '1', '--map-steps', '0',
                          '--train', 'lora', '--dtype', 'bfloat16'))
    model, _, settings = load_spatial_vlm(str(tmp_path / 'run' / 'checkpoint'))
    assert settings['lora_rank'] == 16
    assert any('lora_B' in name and p.abs().max() > 0 for name, p in model.named_parameters())

    # a file that lacks an update is refused
    path = str(tmp_path / 'run' / 'checkpoint' / 'lora.safetensors')
    whole = load_file(path)
    save_file(dict(list(whole.items())[1:]), path)
    with pytest.raises(InputError, match='does not fit this .*: missing .*lora_'):
        load_spatial_vlm(str(tmp_path / 'run' / 'checkpoint'))
    save_file(whole, path)

    # merged into a plain folder it says the same
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(p, std=0.1)
    _, chat = load_vlm(vlm)
    changed, plain = str(tmp_path / 'changed'), str(tmp_path / 'plain')
    save_spatial_vlm(model, chat, changed, settings, with_vlm=False)
    card = os.path.join(changed, 'README.md')
    with open(card, 'w', encoding='utf-8') as file:
        file.write('# its card')
    evaluation.main(['export', '--run', changed, '--out', plain])
    with open(os.path.join(plain, 'README.md'), encoding='utf-8') as file:
        assert file.read() == '# its card'
    with pytest.raises(InputError, match='is the folder itself'):
        evaluation.main(['export', '--run', plain, '--out', plain])
    batch = chat.batch([chat.encode(dict(images=[], conversations=turns(('human', 'table ball'))))])
    del batch['labels']
    expected = model.eval()(**batch).logits
    merged, _, found = load_spatial_vlm(plain)
    assert found['lora_rank'] == 0
    assert not any('lora_' in name for name, _ in merged.named_parameters())
    assert torch.allclose(merged.eval()(**batch).logits, expected, atol=1e-4)
    assert os.path.samefile(os.path.dirname(found['encoder']), plain)  # it has its own
    (_, _, latents), _ = load_answerer(plain, 'cpu')
    assert latents.dtype == torch.bfloat16  # as in training, so that what is kept is found
    assert latents.width == load_psfm(finetune.Config.encoder)[1].width
    with pytest.raises(InputError, match='is the checkpoint of a run'):
        evaluation.main(['export', '--run', changed, '--out', str(tmp_path / 'run/checkpoint')])
    whole = AutoModelForImageTextToText.from_pretrained(os.path.join(plain, 'vlm'))
    assert torch.allclose(whole.eval()(**batch).logits, expected, atol=1e-4)
    assert not torch.allclose(load_vlm(vlm)[0].eval()(**batch).logits, expected, atol=1e-2)


@pytest.mark.parametrize('train', ['adapter', 'adapter+llm', 'lora'])
def test_what_is_trained_is_fp32_and_what_is_frozen_need_not_be(vlm, cached, tmp_path, train):
    if train == 'lora':
        pytest.importorskip('peft')
    _, config = finetune.parse_config(options(vlm, tmp_path, *cached, '--train', train))
    model, chat, latents = finetune.build_model(config, torch.bfloat16)
    model.train_only(train)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    frozen = {p.dtype for p in model.vlm.parameters() if not p.requires_grad}
    assert frozen == {torch.float32 if train == 'adapter+llm' else torch.bfloat16}
    assert latents.dtype == torch.bfloat16
    data = RoomQuestions('train', 0, 4)
    (batch, items, _), = Encoded(data, chat, dataclasses.replace(config, map_steps=0))[0]
    batch = lean_batch(batch, model.vlm, 'cpu')
    labels = batch.pop('labels')
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model(latents=latents([item['images'] for item in items]), use_cache=False,
                        **batch)
    answer_loss(outputs.logits, labels).backward()
    moved = [p.grad.abs().max() for p in model.parameters() if p.grad is not None]
    assert moved and all(map(math.isfinite, moved)) and max(moved) > 0


@pytest.mark.parametrize('rates, moves', [(('0', '1e-3'), True), (('1e-3', '0'), False)])
def test_the_adapter_has_its_own_learning_rate(vlm, cached, tmp_path, rates, moves):
    more = '--steps', '1', '--ground-steps', '0', '--map-steps', '0', '--muon-lr', '0'
    finetune.main(options(vlm, tmp_path, *cached, *more, '--lr', rates[0], '--adapter-lr',
                          rates[1]))
    adapter = load_file(tmp_path / 'run' / 'checkpoint' / 'adapter.safetensors')
    assert bool(adapter['mlp.fc2.weight'].any()) == moves  # it begins at zero


def test_checkpointing_is_of_the_language_model(vlm, cached, tmp_path):
    for given in (), ('--checkpointing',):
        _, config = finetune.parse_config(options(vlm, tmp_path, *cached, *given))
        model, _, _ = finetune.open_model(config, {}, torch.device('cpu'), torch.float32, print)
        are_on = [getattr(module, 'gradient_checkpointing', False)
                  for module in model.vlm.get_decoder().modules()]
        assert any(are_on) == bool(given)


def test_checkpointing_leaves_the_frozen_vision_tower_alone(vlm, cached, tmp_path):
    _, config = finetune.parse_config(options(vlm, tmp_path, *cached))
    model, chat, latents = finetune.build_model(config)
    model.train_only('adapter+llm').train()
    model.vlm.get_decoder().gradient_checkpointing_enable(dict(use_reentrant=False))
    data = RoomQuestions('train', 0, 4)
    (batch, items, _), = Encoded(data, chat, dataclasses.replace(config, map_steps=0))[0]
    batch = lean_batch(batch, model.vlm, 'cpu')
    labels = batch.pop('labels')
    seen = []
    model.vlm.model.visual.register_forward_hook(lambda _, __, out: seen.append(out.pooler_output))
    z = latents([item['images'] for item in items])
    answer_loss(model(latents=z, use_cache=False, **batch).logits, labels).backward()
    assert not seen[0].requires_grad
    assert all(p.grad is not None for p in model.adapter.parameters())


def test_a_vlm_is_not_given_the_latents_of_another_encoder(vlm, cached, tmp_path):
    encoder = tmp_path / 'encoder.safetensors'
    shutil.copy(find_file(Config.encoder), encoder)
    more = [*cached, '--ground-steps', '0', '--map-steps', '0', '--encoder', str(encoder)]
    finetune.main(options(vlm, tmp_path, *more, '--steps', '1'))
    load_answerer(str(tmp_path / 'run'), 'cpu')
    more_steps = options(vlm, tmp_path, *more, '--resume', '--steps')
    finetune.main([*more_steps, '2', '--dtype', 'bfloat16'])  # the same encoder

    # trained again, in the same place
    state, metadata = read_weights(encoder)
    state['encoder.queries'] = state['encoder.queries'] + 1
    save_file(state, encoder, metadata)
    with pytest.raises(InputError, match='encoder.safetensors holds other weights now'):
        load_answerer(str(tmp_path / 'run'), 'cpu')
    with pytest.raises(InputError, match='encoder.safetensors holds other weights now'):
        finetune.main([*more_steps, '3'])


def test_an_older_run_that_lacks_an_option_goes_on(vlm, cached, tmp_path):
    more = [*cached, '--ground-steps', '0', '--map-steps', '0']
    finetune.main(options(vlm, tmp_path, *more, '--steps', '1'))
    path = tmp_path / 'run' / 'checkpoint' / 'state.json'
    state = json.loads(path.read_text())
    del state['config']['max_length']
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match='max_length 0 there, 9 here'):
        finetune.main(options(vlm, tmp_path, *more, '--max-length', '9', '--resume'))
    finetune.main(options(vlm, tmp_path, *more, '--resume'))


def test_the_first_steps_hold_maps_alone(vlm):
    """... of twice as many rooms, and no room comes twice before all have come."""
    _, chat = load_vlm(vlm)
    data = RoomQuestions('train', 0, 8)
    config = Config(batch=2, map_steps=1)
    dealt = Encoded(data, chat, config)
    (batch, items, _), = dealt[0]
    assert len(batch['input_ids']) == len(items) == 4
    assert all(len(item['conversations']) == 2 for item in items)
    (batch, items, _), = dealt[1]
    assert len(batch['input_ids']) == len(items) == 2
    assert all(len(item['conversations']) > 2 for item in items)
    (again, fitted, _), = Encoded(data, chat, config, fit=len)[1]
    assert torch.equal(again['pixel_values'], batch['pixel_values'])   # the VLM's are as before
    assert [item['images'] for item in fitted] == [len(item['images']) for item in items]
    assert sorted(dealt.indices(0) + dealt.indices(1) + dealt.indices(2)) == list(range(8))

    # ... nor on two processes
    both = [Encoded(data, chat, Config(batch=1, map_steps=1), rank, 2) for rank in range(2)]
    rooms = [room for dealt in both for number in range(3) for room in dealt.indices(number)]
    assert sorted(rooms) == list(range(8))


def test_a_batch_in_two_parts_teaches_the_same(vlm, tmp_path, cached):
    """... as one that is padded to its longest sample: the first step, and where it leads."""
    _, config = finetune.parse_config(options(vlm, tmp_path, *cached, '--batch', '8'))
    _, chat = load_vlm(vlm)
    parts = Encoded(RoomQuestions('train', 0, 8), chat, dataclasses.replace(config, map_steps=0))[0]
    short, long = [batch['input_ids'].shape for batch, *_ in parts]
    assert short[0] == long[0] == 4 and short[1] < long[1]

    losses_of, halves = [], chat.__class__.batches
    for number in (1, 2):
        def batches(self, samples, parts, number=number):
            return halves(self, samples, min(parts, number))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat.__class__, 'batches', batches)
            folder = tmp_path / str(number)
            finetune.main(options(vlm, folder, *cached, '--batch', '8', '--ground-steps', '0',
                                  '--map-steps', '0', '--steps', '3', '--warmup', '0'))
        losses_of.append([x for _, x in losses(folder / 'run')])
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4)
    assert losses_of[0][2] < losses_of[0][0]


def test_a_vlm_of_other_categories_is_refused(tmp_path):
    folder = tmp_path / 'other'
    save_tiny_vlm(folder)
    config = json.loads((folder / 'config.json').read_text())
    assert config['classes'] == CLASSES
    config['classes'] = [*CLASSES[:-1], 'piano']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match=f'{folder} tells apart .*piano'):
        finetune.main(options(folder, tmp_path, '--ground-steps', '0', '--latents', 'none'))
    assert not (tmp_path / 'run' / 'checkpoint').exists()


# -----------------------------------------------------------------------------
# files of conversations

@pytest.fixture
def media(tmp_path):
    Image.new('RGB', (64, 48), 'red').save(tmp_path / 'a.png')
    return tmp_path


def of_files(media, *more):
    """Options for a run on six records with the same picture."""
    question = '<image>\nHow many table(s) are in this room?'
    record = dict(GOOD, conversations=turns(('human', question), ('gpt', '2')))
    return ['--data', write(media, *[record] * 6), '--media', str(media), *more]


def test_files_end_to_end(vlm, media):
    finetune.main(options(vlm, media, *of_files(media)))
    metrics = json.loads((media / 'run' / 'metrics.json').read_text())
    assert math.isfinite(metrics['loss'])
    assert 0 <= metrics['accuracy'] <= 1
    with pytest.raises(InputError, match='holds out all '):
        finetune.main(options(vlm, media, *of_files(media, '--val-scenes', '6')))


def test_records_that_are_too_long(vlm, media, capsys):
    """... are left out, by number; the next one stands in."""
    questions = [f'<image>{"table " * count}' for count in (1, 60, 2, 60, 3, 4)]
    records = [dict(GOOD, conversations=turns(('human', question), ('gpt', '2')))
               for question in questions]
    media.joinpath('b.jsonl').write_text('\n'.join(map(json.dumps, records)))
    arguments = ['--data', str(media / 'b.jsonl'), '--media', str(media), '--steps', '3']
    finetune.main(options(vlm, media, *arguments, '--max-length', '100'))
    said = capsys.readouterr().out
    assert re.search(r'b.jsonl, record [24]: \d+ tokens, --max-length 100; the next one', said)
    assert 'too long' in said
    card = (media / 'run' / 'checkpoint' / 'README.md').read_text()
    assert 'weights/psfm_small.safetensors` (MIT)' in card and 'held-out loss' in card
    assert 'frozen backbone | `weights/mini_vggt.safetensors` (MIT)' in card
    with pytest.raises(InputError, match='--max-length 10: all held-out records are longer'):
        finetune.main(options(vlm, media / 'b', *arguments, '--max-length', '10'))
    assert not (media / 'b' / 'run').exists()             # said before anything is trained
    _, config = finetune.parse_config(options(vlm, media, *arguments, '--max-length', '10'))
    with pytest.raises(InputError, match='--max-length 10: all records are longer, the last one'):
        Encoded(finetune.make_data(config)[0], load_vlm(vlm)[1], config)[0]


def test_a_file_that_has_grown_is_not_resumed(vlm, media):
    arguments = of_files(media, '--warmup', '0')
    finetune.main(options(vlm, media, *arguments, '--steps', '1'))
    path = media / 'run' / 'checkpoint' / 'state.json'
    state = json.loads(path.read_text())
    state['metrics']['seconds'] += 1000
    path.write_text(json.dumps(state))
    finetune.main(options(vlm, media, *arguments, '--steps', '2', '--resume'))
    assert json.loads((media / 'run' / 'metrics.json').read_text())['seconds'] > 1000
    with open(media / 'data.jsonl', 'a') as file:
        file.write('\n' + json.dumps(GOOD))
    with pytest.raises(InputError, match='--resume: .* holds other records than when'):
        finetune.main(options(vlm, media, *arguments, '--steps', '3', '--resume'))


def test_own_pictures_have_as_many_tokens_after_resume_and_in_eval(vlm, media, monkeypatch):
    """The mini VLM's own processor allows 64 x 64 pixels, whatever --max-pixels says."""
    Image.new('RGB', (640, 480), 'red').save(media / 'a.png')  # a photo of a camera
    counts, encode = [], Chat.encode

    def counted(chat, item):
        encoded = encode(chat, item)
        counts.append(encoded['input_ids'].count(chat.image_token_id))
        return encoded

    monkeypatch.setattr(Chat, 'encode', counted)
    arguments = of_files(media, '--max-pixels', '100000', '--warmup', '0', '--min-lr', '1')
    finetune.main(options(vlm, media, *arguments, '--steps', '1'))
    begun = set(counts)
    assert len(begun) == 1
    assert 1 <= min(begun) <= 16

    counts.clear()
    finetune.main(options(vlm, media, *arguments, '--resume'))
    assert set(counts) == begun

    counts.clear()
    (_, chat, _), _ = load_answerer(str(media / 'run'), 'cpu')
    data = Conversations([str(media / 'data.jsonl')], str(media))
    chat.encode(data[0])
    assert set(counts) == begun


@pytest.mark.parametrize('more, fault', [
    (['--latents', 'none', '--train', 'adapter'], 'nothing to train'),
    (['--batch', '0'], '--batch must be at least 1'),
    (['--data', ''], 'your own files'), (['--data', ','], 'your own files'),
    (['--train', 'everything'], '--train takes'),
    (['--map-steps', '2'], 'questions need steps after the maps'),
    (['--resume', '--shard'], 'no checkpoint in'),
    (['--max-length', '-1'], '--max-length must be at least 0'),
    (['--resume'], 'no checkpoint in'),
    (['--vlm', 'nowhere', '--ground-steps', '0'], 'no VLM at nowhere'),
    (['--encoder', 'nowhere'], 'no checkpoint in nowhere')])
def test_faulty_options(vlm, tmp_path, monkeypatch, more, fault):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)  # no one is asked twice
    with pytest.raises(InputError, match=fault):
        finetune.main(options(vlm, tmp_path, *more))
