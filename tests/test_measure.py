"""What is measured: of a field, of answers about rooms, of maps in words."""
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chat import load_vlm
from data import make_source
from eval import SHIPPED
import measure
from benchmarks import score
from measure import (Score, answer_rooms, evaluate_field, held_out_loss, language_prior, map_prior,
                     map_score, overall_scores, rooms_table, score_answer)
from psfm import load_psfm
from questions import as_prompt, RoomQuestions
from tiny import save_tiny_vlm


def test_maps_score_for_pieces_within_a_metre():
    truth = 'bed at x +1, y -2; lamp at x +0, y +3; lamp at x -1, y +3'
    assert map_score(truth, truth) == 1
    assert map_score(truth, 'bed at x +2, y -1; lamp at x -1, y +3') == pytest.approx(2 / 3)
    assert map_score(truth, 'bed at x +3, y -2; lamp') == 0
    assert map_score(truth, '') == 0
    assert map_score('none', 'none') == 1


def test_listing_more_than_there_is_does_not_pay():
    spot = 'bin at x +1, y +1; bin at x +1, y +1'
    crowd = 'bin at x +1, y +1; ' * 9
    assert map_score(spot, spot) == 1
    assert map_score(spot, crowd) == pytest.approx(2 / 9)


def test_the_pairing_that_pairs_most_counts():
    truth = 'bin at x +0, y +3; bin at x +1, y +2'
    assert map_score(truth, 'bin at x +0, y +2; bin at x +0, y +4') == 1


NO_AUTOCAST = contextlib.nullcontext()


# -----------------------------------------------------------------------------
# the field

def test_the_shipped_encoder_keeps_what_the_readme_says():
    psfm, config = load_psfm(SHIPPED)
    config.num_rooms = config.val_scenes = 24
    train_source, held_out = [make_source(config, split, 8) for split in ('train', 'val')]
    metrics = evaluate_field(psfm, train_source, held_out, 0, config, NO_AUTOCAST)
    assert metrics['psfm']['r2'] > 0.6
    assert metrics['psfm']['r2'] > metrics['camera']['r2'] + 0.2
    recall = {name: values['object_recall'] for name, values in metrics['read_out'].items()}
    assert recall['psfm'] > 0.5 > 3 * recall['camera']


# -----------------------------------------------------------------------------
# answers without looking

def test_a_prior_has_an_answer_to_every_question():
    train, held_out = RoomQuestions('train', 0, 60), RoomQuestions('val', 0, 12)
    guess = language_prior(train.records)
    for record in held_out.records:
        if record['options']:
            assert guess(record) in 'ABCD'[:len(record['options'])]
        else:
            assert float(guess(record)) > 0


def counted(answer, name='x'):
    return dict(question_type='object_counting', question=f'How many {name}(s)?', options=None,
                ground_truth=answer)


def test_a_prior_knows_its_place():
    assert language_prior([counted(text) for text in '223'])(counted(None, 'y')) == '2'
    # two is the commonest, but seven and eight are near to more
    records = [counted(text) for text in '2226788']
    assert language_prior(records)(records[0]) in '78'
    assert language_prior(records, commonest=True)(records[0]) == '2'
    # what was asked often enough has an answer of its own
    records = [counted('3', 'table')] * 20 + [counted('9', 'bed')] * 40 + [counted('9', 'bin')]
    guess = language_prior(records)
    assert guess(counted(None, 'table')) == '3'
    assert guess(counted(None, 'bin')) == '9'


def test_a_map_without_looking_has_the_pieces_where_they_mostly_are():
    guess = map_prior(['bed at x +2, y +3; bin at x -1, y +0', 'bed at x +2, y +3',
                       'bed at x -9, y +9'])
    answer = guess('bed at x +7, y +7; lamp at x +1, y +1')
    assert answer.startswith('bed at x ')
    assert 'lamp' not in answer
    assert map_score('bed at x +2, y +3', answer) == 1
    assert map_score('bed at x +7, y +7', answer) == 0


# -----------------------------------------------------------------------------
# a VLM's answers about rooms

@pytest.fixture(scope='module')
def rooms():
    return RoomQuestions('train', 0, 8), RoomQuestions('val', 0, 4)


def test_a_new_kind_of_question_is_scored_by_its_form():
    number = dict(question_type='object_shade', options=None, ground_truth='4')
    assert score_answer(number, '4') == 1
    assert 0 < score_answer(number, '5') < 1
    choice = dict(question_type='object_shade', options=['A. dark', 'B. light'], ground_truth='B')
    assert [score_answer(choice, answer) for answer in ('A', 'B')] == [0, 1]
    assert score('vsibench', number, '4') == 0      # the official score knows ten kinds


def test_right_answers_score_in_full_and_wrong_ones_do_not(rooms, monkeypatch):
    train, held_out = rooms
    truths = {(record['room'], as_prompt(record)): record['ground_truth']
              for record in held_out.records}
    truths.update({(room, text): answer for room, (text, answer) in enumerate(held_out.maps)})
    looked_at = [[image.tobytes() for image in held_out.pictures(room)] for room in range(4)]
    given = []  # (room that the pictures are of, room that the latents are of)

    def room_of(pictures):
        return looked_at.index([image.tobytes() for image in pictures])

    class Reading:
        """Answers with what is true of the room that the latents are of."""

        def __init__(self, model, chat, scenes, z, autocast):
            given.extend((room_of(shown), room_of(latent)) for shown, latent in zip(scenes, z))
            self.latents = z

        def answer(self, questions, max_new_tokens):
            return [truths.get((room_of(self.latents[scene]), text), '')
                    for scene, text in questions]

    monkeypatch.setattr(measure, 'Reading', Reading)
    asked = torch.nn.Linear(1, 1), None, lambda scenes: scenes, held_out, train, NO_AUTOCAST
    metrics = answer_rooms(*asked)
    assert metrics['overall'] == metrics['map'] == 100
    assert all(truth == answer for truth, answer in metrics['maps'])
    assert len(metrics['scores']) == len(held_out.records) + 4
    assert {shown == latent for shown, latent in given} == {True}
    assert metrics['prior']['overall'] < 100
    assert metrics['prior']['map'] < 100
    assert 'map' not in metrics['commonest']

    # every room with the latents of another
    given.clear()
    shuffled = answer_rooms(*asked, shuffled=True)
    assert {shown == latent for shown, latent in given} == {False}
    assert shuffled['overall'] < 60
    assert shuffled['map'] < 60

    # the maps alone, of all rooms and of the first; the questions about the first
    for num_rooms, expected in ((None, 4), (1, 1)):
        given.clear()
        maps = answer_rooms(*asked, maps_only=True, num_rooms=num_rooms)
        assert len(given) == len(maps['scores']) == expected
        assert maps['map'] == 100
        assert 'overall' not in maps
    first = answer_rooms(*asked, num_rooms=1)
    assert {room for _, room, _ in first['scores']} == {0}


def test_the_table_has_a_row_for_each_arm_and_each_difference():
    def metrics(value, overall=True):
        scores = [['object_counting', room, value] for room in range(4)] if overall else []
        prior = dict(object_counting=10.0, overall=10.0, map=5.0)
        return dict(scores=scores + [['map', room, value] for room in range(4)], prior=prior,
                    commonest=dict(object_counting=7.0, overall=7.0))

    table = rooms_table({'psfm': [metrics(0.75)] * 2, 'none': [metrics(0.5)] * 2,
                         'psfm, shuffled': [metrics(0.25)]})
    rows = {row[:28].strip(): row[28:].split() for row in table.splitlines()}
    assert list(rows) == ['', 'commonest answer', 'best constant answer', 'psfm, 2 seeds',
                          'none, 2 seeds', 'psfm, shuffled, 1 seed', 'psfm minus none',
                          '* a difference whose 95 % in']
    assert rows[''][0] == 'count'
    assert rows['commonest answer'][0] == '7.0'
    assert rows['psfm, 2 seeds'][0] == '75.0'
    assert rows['psfm minus none'][0] == '25.0*'
    assert rows['psfm minus none'][-2:] == ['25.0', '(25.0..25.0)']

    same = rooms_table({'psfm': [metrics(0.75)], 'none': [metrics(0.75)]})
    assert '0.0*' not in same and 'apart from 0' in same

    maps = rooms_table({'psfm': [metrics(0.75, overall=False)]}).splitlines()[-1].split()
    assert maps[3:] == ['-'] * 9 + ['75.0', '(75.0..75.0)']


def test_scores_are_in_the_units_of_the_statistics():
    psfm = SimpleNamespace(geo_mean=torch.ones(4), geo_std=torch.full((4,), 2.0))
    target = torch.randn(2, 3, 4) + 1
    score = Score(psfm)
    score.add(1 + 2 * (target - 1), target)  # the right directions, twice as far from the mean
    result = score.result()
    assert result['centred_cos'] == pytest.approx(1) and result['cos'] < 1
    assert result['r2'] == pytest.approx(0, abs=1e-6)


def test_the_share_of_right_answers_is_of_whole_answers(rooms, tmp_path):
    model, chat = load_vlm(save_tiny_vlm(tmp_path / 'tiny'))
    train, _ = rooms
    item = train[1]
    encoded = chat.encode(item)

    class Parrot(torch.nn.Module):
        """Says what follows; the first answer's end it gets wrong."""

        def __init__(self):
            super().__init__()
            self.vlm = model          # counts positions

        def forward(self, input_ids, logits_to_keep, **_):
            following = input_ids.roll(-1, 1)
            labels = torch.tensor(encoded['labels'])
            end = (labels == chat.tokenizer.eos_token_id).nonzero()[0, 0]
            following[0, end - 1] = 0
            logits = 50 * torch.nn.functional.one_hot(following, len(chat.tokenizer)).float()
            return type('Outputs', (), dict(logits=logits[:, logits_to_keep]))

    answers = len(item['conversations']) // 2
    kinds = ['first', *['other'] * (answers - 1)]
    held_out, length = [dict(item, kinds=kinds)], len(encoded['input_ids'])
    metrics = held_out_loss(Parrot(), chat, None, held_out, NO_AUTOCAST, max_length=length)
    assert length % 32  # a batch is padded: that is no length
    assert metrics['left_out'] == 0
    assert metrics['kinds'] == dict(first=0, other=1)
    assert metrics['accuracy'] == pytest.approx(1 - 1 / answers)
    assert metrics['loss'] > 0


# -----------------------------------------------------------------------------
# intervals

def answers(values):
    kinds = 'object_counting', 'route_planning'
    return dict(scores=[[kinds[i % 2], i // 2, value] for i, value in enumerate(values)])


def test_intervals_hold_the_mean_and_shrink():
    g = np.random.default_rng(0)
    few, many = g.random(100).round(), g.random(2000).round()
    mean, low, high = overall_scores([answers(few)])['overall']
    assert mean == pytest.approx(100 * few.mean())
    assert low < mean < high
    _, low2, high2 = overall_scores([answers(many)])['overall']
    assert high2 - low2 < (high - low) / 2


def test_intervals_of_differences():
    few = np.random.default_rng(0).random(100).round()
    same = overall_scores([answers(few)], [answers(few)])['overall']
    assert same == (0, 0, 0)
    ten = overall_scores([answers(few)], [answers(few - 0.1)])['overall']
    assert ten == pytest.approx((10, 10, 10))


def test_seeds_that_differ_widen_the_interval():
    low, high = np.full(100, 0.2), np.full(100, 0.8)
    assert overall_scores([answers(low)] * 2)['overall'] == pytest.approx((20, 20, 20))
    both = overall_scores([answers(low), answers(high)])['overall']
    assert both == pytest.approx((50, 20, 80))
