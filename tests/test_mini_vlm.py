"""The mini VLM: its tokenizer, the pictures that it is pre-trained on, its Sight (of probe.py), its
training, and how the adapter is grounded on it."""
import contextlib
import itertools
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import finetune
import mini_vlm
from chat import lean_batch, load_vlm
from common import InputError
from eval import load_answerer
from finetune import build_model
from mini_vlm import (RoomPictures, ask_letter, build_tokenizer, build_vlm, ground,
                      learn_to_read, save_mini_vlm)
from model import has_compiler
from probe import Sight, load_sight, token_categories, truth_of
from questions import ANSWER_WORDS, RoomQuestions, as_prompt
from records import Encoded
from rooms import CATEGORIES, CLASSES
from tiny import WIDTH, losses, options, save_tiny_vlm


@pytest.fixture(scope='module')
def vlm(tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp('vlm') / 'tiny')


# -----------------------------------------------------------------------------
# files

def test_stock_phrases_are_single_tokens():
    count, side = 'How many table(s) are there?', 'Is the ball left of the table?'
    _, chat = build_vlm(build_tokenizer([count, side] * 20, ['table', 'ball']), width=64, depth=1)
    ids = chat.tokenizer(count, add_special_tokens=False).input_ids
    assert len(ids) == 3
    assert chat.tokenizer.decode(ids) == count


def test_weights_begin_large_enough_to_learn_to_read(vlm):
    embeddings = load_vlm(vlm)[0].get_input_embeddings().weight
    assert embeddings.std().item() == pytest.approx(WIDTH ** -0.5, rel=0.05)


def test_a_word_that_carries_meaning_is_one_token_wherever_it_stands(vlm):
    _, chat = load_vlm(vlm)
    for word in CATEGORIES + ANSWER_WORDS:
        token = chat.tokenizer.convert_tokens_to_ids(word)
        assert token != chat.tokenizer.unk_token_id
        for text in (word, f'Which of these is {word}?\nOptions:\nA. sofa\nB. {word}', f'{word} 3'):
            ids = chat.tokenizer(text, add_special_tokens=False).input_ids
            assert ids.count(token) == text.count(word)


def test_save_and_load(vlm, tmp_path):
    model, chat = load_vlm(vlm)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    sight = Sight(WIDTH)
    save_mini_vlm(model, chat, sight, str(tmp_path))
    again, chat2 = load_vlm(str(tmp_path))
    half = {name: x.half().float() for name, x in model.state_dict().items()}
    assert half.keys() == again.state_dict().keys()
    assert all(torch.equal(x, half[name]) for name, x in again.state_dict().items())
    assert list(again.config.classes) == CLASSES
    text = 'How many table(s) are in this room?'
    assert chat2.tokenizer(text).input_ids == chat.tokenizer(text).input_ids

    found = load_sight(str(tmp_path), WIDTH)
    half = {name: x.half().float() for name, x in sight.state_dict().items()}
    assert all(torch.equal(x, half[name]) for name, x in found.state_dict().items())


@pytest.mark.parametrize('metadata', [
    None, {}, {'classes': '["floor", "piano"]'}, {'other': 'text'}])
def test_a_sight_of_other_or_unknown_categories_is_refused(vlm, tmp_path, metadata):
    model, chat = load_vlm(vlm)
    save_mini_vlm(model, chat, Sight(WIDTH), str(tmp_path))
    path = str(tmp_path / 'sight.safetensors')
    save_file(load_file(path), path, metadata)
    with pytest.raises(InputError, match=f'{path} tells apart'):
        load_sight(str(tmp_path), WIDTH)


def test_a_vlm_without_sight_or_with_one_that_does_not_fit_grounds_nothing(vlm, tmp_path):
    model, chat = load_vlm(vlm)
    save_mini_vlm(model, chat, Sight(WIDTH // 2), str(tmp_path / 'blind'))
    with pytest.raises(InputError, match='blind/sight.safetensors does not fit this Sight'):
        finetune.main(options(tmp_path / 'blind', tmp_path))
    (tmp_path / 'blind' / 'sight.safetensors').unlink()
    with pytest.raises(InputError, match='blind has no sight.safetensors, .* or --ground-steps 0'):
        finetune.main(options(tmp_path / 'blind', tmp_path))


# -----------------------------------------------------------------------------
# what it is pre-trained on

@pytest.fixture(scope='module')
def pictures():
    return RoomPictures('train', 0, 8)


def test_pictures_to_pre_train_on(pictures):
    assert len(pictures) == 8 * 7
    single, row = pictures[0], pictures[8 * 6]
    assert len(single['images']) == 1
    assert single['kinds'][-1] == 'map'
    assert len(row['images']) == 6
    assert 'picture' in row['kinds']
    assert len({image.tobytes() for image in row['images']}) == 6
    assert row['stand'].isnan().all()


def test_pictures_teach_to_compare_distances(pictures):
    """With two options too, of which single pictures have more than of the bench's three."""
    of = [turn['value'] for item in (pictures[i] for i in range(len(pictures)))
          for turn in item['conversations'] if 'is the closest to' in turn['value']]
    pairs = [text for text in of if text.split('(')[1].split(')')[0].count(',') == 1]
    assert len(pairs) >= 5 and len(of) > len(pairs)


def test_half_of_the_choices_are_answered_in_words(pictures):
    in_words, with_options = 0, 0
    for item in pictures:
        asked, answers = item['conversations'][::2], item['conversations'][1::2]
        for kind, question, answer in zip(item['kinds'], asked, answers, strict=True):
            is_letter = answer['value'] in 'ABCD'
            assert ('Options:' in question['value']) == is_letter
            if kind.endswith('in words'):
                assert not is_letter
            in_words += kind.endswith('in words')
            with_options += is_letter and kind != 'letter'
    assert 0.4 < in_words / (in_words + with_options) < 0.6


def encoded(pictures, vlm):
    """All items in one batch. -> VLM, Chat, batch, truth"""
    model, chat = load_vlm(vlm)
    items = list(pictures)
    batch = chat.batch([chat.encode(item) for item in items])
    return model, chat, batch, truth_of(items, batch, token_categories(chat.tokenizer))


def test_truths_about_words_and_image_tokens(pictures, vlm):
    _, chat, batch, truth = encoded(pictures, vlm)
    images = len(batch['pixel_values']) // 64
    assert len(batch['input_ids']) == 56
    assert truth['seen'].shape == (images, 16, len(CLASSES) + 3)
    named = batch['input_ids'][~truth['words'].isnan().any(-1)]
    assert {chat.tokenizer.decode(token) for token in named} == set(CATEGORIES)


def test_pictures_of_other_sizes_are_refused(pictures, vlm):
    _, _, _, truth = encoded(pictures, vlm)
    tokens = torch.zeros(4 * len(truth['seen']), 128)       # as of --max-pixels 1024
    with pytest.raises(InputError, match='places are read off 16 each; give a larger --max-pix'):
        Sight(128).token_loss(tokens, truth['seen'])


def test_truths_about_answers(pictures, vlm):
    """Where the pieces of each question stand, worked out beforehand, question by question."""
    _, _, batch, truth = encoded(pictures, vlm)
    first, t = pictures[0], 0
    labels = batch['labels'][0]
    for question, kind in zip(first['conversations'][::2], first['kinds'], strict=True):
        t = next(t for t in itertools.count(t + 1) if labels[t] != -100 and labels[t - 1] == -100)
        names = re.findall('|'.join(CATEGORIES), question['value'])[:Sight.NAMES]
        expected = first['stand'][[CATEGORIES.index(name) for name in names]]
        found = truth['questions'][0, t - 1, :len(names)]
        assert torch.equal(found.nan_to_num(99), expected.nan_to_num(99)), kind


@torch.no_grad()
def test_batches_for_training_change_no_logits(pictures, vlm):
    model, _, batch, _ = encoded(pictures, vlm)
    labels = batch.pop('labels')
    assert not batch['attention_mask'].all()  # some are padded
    plain = model(use_cache=False, **batch).logits[labels != -100]
    quick = model(use_cache=False, **lean_batch(dict(batch), model, 'cpu')).logits[labels != -100]
    assert torch.equal(plain, quick)


# -----------------------------------------------------------------------------
# training

TINY = ['--val-scenes', '4', '--batch', '1', '--steps', '2', '--letter-steps', '1',
        '--device', 'cpu', '--log-every', '1']


def weight_of(folder):
    """One matrix of a Sight."""
    return load_file(f'{folder}/sight.safetensors')['tokens.1.weight'].float()


@pytest.fixture
def from_tiny(vlm, monkeypatch):
    """A new run begins with the tiny VLM, not with one of full size."""
    start = mini_vlm.start
    monkeypatch.setattr(mini_vlm, 'start', lambda folder: start(folder or vlm))


def test_training(vlm, from_tiny, tmp_path, capsys):
    mini_vlm.main([*TINY, '--out', str(tmp_path)])
    change = (weight_of(vlm) - weight_of(tmp_path / 'mini_vlm')).abs().max()
    assert 0 < change < 0.02
    model, _ = load_vlm(str(tmp_path / 'mini_vlm'))
    assert model.config.made_by.startswith('python mini_vlm.py --val-scenes 4')
    said = capsys.readouterr().out
    assert 'step 00002/00002 | held-out loss' in said
    assert '% right' in said
    assert [step for step, _ in losses(tmp_path)] == [1, 2]


def test_before_any_picture_the_language_model_alone_learns_to_answer_by_a_letter(vlm):
    model, chat = load_vlm(vlm)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = mini_vlm.Config(**dict(mini_vlm.PRESETS['mini'], letter_steps=30))
    loss = learn_to_read(model, chat, config, torch.float32, contextlib.nullcontext())
    assert loss < 1.2 * math.log(4) / 2  # the letter by chance, and the end of the answer
    changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
    assert any('layers.0' in name for name in changed)


def test_the_letter_that_is_asked_for_is_that_of_the_word():
    for seed in range(20):
        record = ask_letter(torch.Generator().manual_seed(seed))
        text = as_prompt(record)
        word, = re.findall(r'Which of these is (.*)\?', text)
        assert f'{record["ground_truth"]}. {word}' in text.split('\n')


def test_all_that_is_trained_is_clipped_and_checked(from_tiny, monkeypatch, tmp_path):
    def look(name, config, first, optimizers, parameters, *rest):
        stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups
                   for p in group['params']}
        assert stepped == {id(p) for p in parameters}
        raise StopIteration

    monkeypatch.setattr(mini_vlm, 'fit', look)
    with pytest.raises(StopIteration):
        mini_vlm.main([*TINY, '--out', str(tmp_path)])


def test_training_resumes_with_the_same_losses(from_tiny, tmp_path):
    level = ['--warmup', '0', '--min-lr', '1']
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    mini_vlm.main([*TINY, *level, '--out', str(whole)])
    mini_vlm.main([*TINY, *level, '--steps', '1', '--out', str(half)])
    begun = (half / 'log.jsonl').read_text()
    mini_vlm.main([*TINY, *level, '--out', str(half), '--resume', '--workers', '1'])
    assert (half / 'log.jsonl').read_text().startswith(begun)
    assert [step for step, _ in losses(half)] == [step for step, _ in losses(whole)] == [1, 2]
    assert [x for _, x in losses(half)] == pytest.approx([x for _, x in losses(whole)], abs=1e-4)
    assert torch.allclose(weight_of(half / 'mini_vlm'), weight_of(whole / 'mini_vlm'), atol=1e-4)
    (model, _, latents), settings = load_answerer(str(half), torch.device('cpu'))  # of a run
    assert latents is None
    assert settings['vlm'] == str(half / 'checkpoint')


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason='there is no compiler')
def test_a_compiled_run_is_the_eager_one(from_tiny, tmp_path, restored_compiler):
    eager, compiled = tmp_path / 'eager', tmp_path / 'compiled'
    counters.clear()
    mini_vlm.main([*TINY, '--dtype', 'float32', '--out', str(eager)])
    assert not counters['stats']['unique_graphs']
    mini_vlm.main([*TINY, '--dtype', 'float32', '--out', str(compiled), '--compile'])
    assert counters['stats']['unique_graphs']
    assert [x for _, x in losses(compiled)] == pytest.approx([x for _, x in losses(eager)], 1e-4)
    assert torch.allclose(weight_of(compiled / 'mini_vlm'), weight_of(eager / 'mini_vlm'),
                          atol=1e-4)


@pytest.mark.slow
def test_from_nothing_to_fine_tuning(tmp_path):
    mini_vlm.main([*TINY, '--out', str(tmp_path)])
    folder = str(tmp_path / 'mini_vlm')
    finetune.main(options(folder, tmp_path / 'next', '--steps', '1', '--map-steps', '0',
                          '--latents', 'none'))


# -----------------------------------------------------------------------------
# grounding

def test_grounding_teaches_the_adapter_alone(vlm, tmp_path):
    _, config = finetune.parse_config(options(vlm, tmp_path, '--batch', '4', '--map-steps', '0',
                                              '--ground-steps', '30', '--log-every', '29'))
    model, chat, latents = build_model(config)
    before, said = {name: x.clone() for name, x in model.state_dict().items()}, []
    data = Encoded(RoomQuestions('train', 0, 8), chat, config)
    ground(model, chat, latents, data.__getitem__, config, contextlib.nullcontext(), said.append)
    first, last = [float(re.search(r'tokens (\S+)', line)[1]) for line in (said[0], said[-1])]
    assert last < 0.8 * first
    changed = {name.split('.')[0] for name, x in model.state_dict().items()
               if not torch.equal(x, before[name])}
    assert changed == {'adapter'}

    # what fine-tuning trains afterwards
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any('language_model' in name for name in trained)
