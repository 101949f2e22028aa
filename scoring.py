"""
Prompts, scores and averages of four spatial benchmarks, as their official evaluators have them.

    prompt(benchmark, doc)           the text that follows the pictures
    score(benchmark, doc, output)    0 .. 1, the official score of one raw answer
    aggregate(benchmark, scored)     [(doc, score), ...] -> percentages per task and overall

vsibench (VSI-Bench, arXiv 2412.14171), cvbench (CV-Bench, arXiv 2406.16860), sparbench (SPAR-Bench, arXiv 2503.22976),
viewspatial (ViewSpatial-Bench, arXiv 2505.21500). The official code has its quirks (one split on spaces, one regular
expression more); published numbers rest on them, so they are kept and named here. `corrected=True` mends what is plainly
wrong. Where the official code would raise, the score is 0.

The last part is about the questions on rooms (rooms.py): what one gets without looking, maps in words, and the table of arms.
"""
import collections
import functools
import itertools
import re

import numpy as np
import torch

from rooms import CATEGORIES, FURNITURE, NUMERICAL, SECTORS, TURNS, turn_angle, vsi_prompt

BENCHMARKS = ('vsibench', 'cvbench', 'sparbench', 'viewspatial')
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
WORD_PROMPT = 'Please answer the question using a single word or phrase.'


def relative_accuracy(error):
    """Mean relative accuracy: the share of ten thresholds 0.5, 0.45 .. 0.05 that a relative `error` (a number, or many) stays within.

    The thresholds are 1 - theta in float64, as in the official code, so that an error of exactly 0.2 fails its own.
    """
    theta = np.linspace(0.5, 0.95, 10)
    return (np.asarray(error)[..., None] <= 1 - theta).mean(-1)


# -----------------------------------------------------------------------------
# VSI-Bench

def score_vsibench(doc, output):
    """The first word (up to a space) without its full stops: the option's letter, or a number as float() reads it."""
    answer, truth = output.split(' ')[0].rstrip('.').strip(), doc['ground_truth']
    if doc['question_type'] not in NUMERICAL:
        return float(answer.lower() == str(truth).lower())
    answer, truth = float(answer), float(truth)
    return relative_accuracy(abs(answer - truth) / truth)


def aggregate_vsibench(scored):
    """Mean per task, the three levels of relative direction as one; overall: mean of the tasks that there are."""
    means = mean_by(scored, lambda doc: doc['question_type'])
    levels = [means.pop(name) for name in [f'object_rel_direction_{level}' for level in ('easy', 'medium', 'hard')] if name in means]
    if levels:
        means['object_rel_direction'] = sum(levels) / len(levels)
    return dict(means, overall=mean(means.values()))


# -----------------------------------------------------------------------------
# CV-Bench

def prompt_cvbench(doc):
    letters = ', '.join('ABCDEF'[:len(doc['choices'])])
    return f'Note: You only need to respond with {letters} without providing any additional information.\n\n{doc["prompt"]}'


def score_cvbench(doc, output):
    """The first letter, after brackets and blanks: any letter at all, so that 'The answer is C' says T."""
    found = re.match(r'[\(\s]*([A-Z])[\)\.\s]*', output.strip(), re.IGNORECASE)
    return float(found is not None and found[1].upper() == doc['answer'].strip('()').upper())


def aggregate_cvbench(scored):
    """2D: mean of its two sources. 3D. overall: mean of 2D and 3D (the dataset's card); plain: the share of all answers that is right."""
    sources = mean_by(scored, lambda doc: doc['source'])
    halves = {'2D': [sources[name] for name in ('ADE20K', 'COCO') if name in sources], '3D': [sources[name] for name in ('Omni3D',) if name in sources]}
    halves = {name: mean(values) for name, values in halves.items() if values}
    return {**mean_by(scored, lambda doc: doc['task']), **halves, 'plain': 100 * mean(score for _, score in scored), 'overall': mean(halves.values())}


# -----------------------------------------------------------------------------
# SPAR-Bench

SPAR_LOW = [f'{kind}_prediction_{pair}' for kind in ('depth', 'distance') for pair in ('oc', 'oo', 'oc_mv', 'oo_mv')]
SPAR_MEDIUM = ['position_matching', 'camera_motion_infer', 'view_change_infer']
SPAR_HIGH = ['distance_infer_center_oo', 'distance_infer_center_oo_mv', 'obj_spatial_relation_oo', 'obj_spatial_relation_oc_mv', 'obj_spatial_relation_oo_mv',
             'spatial_imagination_oc', 'spatial_imagination_oo', 'spatial_imagination_oc_mv', 'spatial_imagination_oo_mv']
SPAR_MOVES = [('move_right', 'move_left'), ('move_up', 'move_down'), ('move_forward', 'move_backward'), ('rotate_right', 'rotate_left'), ('rotate_up', 'rotate_down')]


def prompt_sparbench(doc):
    task, question = doc['task'], doc['question']
    if task in SPAR_LOW:
        return f'\n{question}\n{WORD_PROMPT}'
    if task == 'view_change_infer':
        return f'\n{question}\n\n'
    between = 'The values represent the bounding box coordinates normalized to a 0-1000 scale, with the top-left corner as the origin of the image.'
    return f'\n{question}\n{between if task in ("position_matching", "camera_motion_infer") else ""}\n{LETTER_PROMPT}'


def spar_moves(text):
    """'move_right:0.3,rotate_up:20' -> five signed numbers."""
    values = {key: float(value) for key, value in (pair.split(':') for pair in text.split(','))}
    return [values.get(positive, 0) - values.get(negative, 0) for positive, negative in SPAR_MOVES]


def score_sparbench(doc, output, corrected=False):
    """Letters: the whole answer is in the gold (so an empty one is right, unless `corrected`), or begins with it. Numbers: the
    first in the text, of several views the last. view_change_infer: five movements, each error relative to the answer's own value.
    """
    task, truth = doc['task'], str(doc['answer'])
    if task in SPAR_LOW:
        numbers = re.findall(r'(?<!\^)\d+\.\d+|(?<!\^)\d+', output)
        if not numbers and not task.endswith('_mv'):
            return 0.0
        answer, truth = float(numbers[-1 if task.endswith('_mv') else 0]) if numbers else -1.0, float(truth)
        return relative_accuracy(abs(answer - truth) / abs(truth) if truth else abs(answer))
    if task == 'view_change_infer':
        pairs = list(zip(spar_moves(truth.lower()), spar_moves(output.lower())))
        return sum(relative_accuracy(abs(gold - answer) / abs(answer) if answer else abs(gold)) for gold, answer in pairs) / len(pairs)
    answer, truth = output.lower(), truth.lower()
    if corrected and not answer.strip():
        return 0.0
    return float(answer in truth or answer[0] == truth)


def aggregate_sparbench(scored):
    """Mean per task; overall: mean of all tasks. Medium has three tasks, as published; Middle is what the official code prints, without view_change_infer."""
    means = mean_by(scored, lambda doc: doc['task'])
    levels = {'Low': SPAR_LOW, 'Medium': SPAR_MEDIUM, 'Middle': SPAR_MEDIUM[:2], 'High': SPAR_HIGH}
    levels = {name: [means[task] for task in tasks if task in means] for name, tasks in levels.items()}
    return {**means, **{name: mean(values) for name, values in levels.items() if values}, 'overall': mean(means.values())}


# -----------------------------------------------------------------------------
# ViewSpatial-Bench

def score_viewspatial(doc, output, corrected=False):
    """The first lone letter A to D of the last line ('a' counts; `corrected`: of the last line that is not empty)."""
    letter = lambda text: re.search(r'\b([A-D])\b', text, re.IGNORECASE)
    found, truth = letter((output.rstrip() if corrected else output).split('\n')[-1]), letter(doc['answer'])
    return float(found is not None and found[1].upper() == truth[1].upper())


def aggregate_viewspatial(scored):
    """Accuracy per question type; camera, person and overall: of all their questions, each weighing alike."""
    sides = {side: [score for doc, score in scored if doc['question_type'].lower().startswith(side)] for side in ('camera', 'person')}
    return {**mean_by(scored, lambda doc: doc['question_type']), **{side: 100 * mean(scores) for side, scores in sides.items() if scores},
            'overall': 100 * mean(score for _, score in scored)}


# -----------------------------------------------------------------------------
# all four

def mean(values):
    values = list(values)
    return sum(values) / len(values)


def mean_by(scored, key):
    """[(doc, score)] -> {key(doc): mean score x 100}"""
    groups = {}
    for doc, score in scored:
        groups.setdefault(key(doc), []).append(score)
    return {name: 100 * mean(scores) for name, scores in groups.items()}


PROMPTS = dict(vsibench=vsi_prompt, cvbench=prompt_cvbench, sparbench=prompt_sparbench,
               viewspatial=lambda doc: f'{doc["question"]}{doc["choices"]}\nReply only to the corresponding option.\nAnswer:')
SCORES = dict(vsibench=score_vsibench, cvbench=score_cvbench, sparbench=score_sparbench, viewspatial=score_viewspatial)
AGGREGATES = dict(vsibench=aggregate_vsibench, cvbench=aggregate_cvbench, sparbench=aggregate_sparbench, viewspatial=aggregate_viewspatial)


def prompt(benchmark, doc):
    """The text that follows the pictures of a question, to the character."""
    return PROMPTS[benchmark](doc)


def score(benchmark, doc, output, corrected=False):
    """0 .. 1: the official score of a raw answer, or with `corrected` that of a mended scorer (sparbench, viewspatial)."""
    options = dict(corrected=corrected) if benchmark in ('sparbench', 'viewspatial') else {}
    try:
        return SCORES[benchmark](doc, output, **options)
    except (ValueError, ZeroDivisionError, IndexError, OverflowError):
        return 0.0                                            # not a number, no number, a gold of zero


def aggregate(benchmark, scored):
    """[(doc, score), ...] -> {task or group: percent, ..., 'overall': percent}, whichever tasks there are."""
    return AGGREGATES[benchmark](scored)


# -----------------------------------------------------------------------------
# results that others published, percent: columns, and (model, source, values). None of them was measured here.

REFERENCES = {
    'vsibench': (('overall', 'object_counting', 'object_abs_distance', 'object_size_estimation', 'room_size_estimation', 'object_rel_distance',
                  'object_rel_direction', 'route_planning', 'obj_appearance_order'), [
        ('chance (frequency)', 'SEE&TREK', (34.0, 62.1, 32.0, 29.9, 33.1, 25.1, 47.9, 28.4, 25.2)),
        ('human, 400 questions', 'SEE&TREK', (79.2, 94.3, 47.0, 60.4, 45.9, 94.7, 95.8, 95.8, 100.0)),
        ('GPT-4o', 'SEE&TREK', (34.0, 46.2, 5.3, 43.8, 38.2, 37.0, 41.3, 31.5, 28.5)),
        ('Gemini-1.5-Pro', 'SEE&TREK', (45.4, 56.2, 30.9, 64.1, 43.6, 51.3, 46.3, 36.0, 34.6)),
        ('Qwen2.5-VL-3B', 'GeoVR', (29.0, 24.3, 24.7, 31.7, 22.6, 38.3, 42.6, 26.3, 21.2)),
        ('Spatial-MLLM-4B', 'GeoVR', (48.4, 65.3, 34.8, 63.1, 45.1, 41.3, 46.2, 33.5, 46.3)),
        ('VLM-3R-7B', 'two papers', (60.9, 70.2, 49.4, 69.2, 67.1, 65.4, 80.5, 45.4, 40.1)),
        ('Spa3-VLM-4B', 'Spa3R', (58.6,)), ('... without geometry', 'Spa3R', (50.9,)), ('... raw VGGT features', 'Spa3R', (55.1,))]),
    'cvbench': (('overall', '2D', '3D'), [
        ('Qwen2.5-VL-3B', 'Spa3R', (70.6, 69.1, 72.2)), ('SpatialLadder-3B', 'Spa3R', (73.7, 72.4, 74.9)), ('Spa3-VLM-4B', 'Spa3R', (75.6, 72.9, 78.3))]),
    'sparbench': (('overall', 'Low', 'Medium', 'High'), [
        ('chance (frequency)', 'SPAR', (32.74, 31.19, 38.25, 32.29)), ('human, tiny set', 'SPAR', (67.27, 55.31, 72.32, 76.22)),
        ('GPT-4o, tiny set', 'SPAR', (36.39, 29.25, 24.93, 45.11)), ('Qwen2.5-VL-7B', 'SPAR', (33.07, 28.75, 22.97, 40.27)),
        ('VLM-3R-7B', 'G2VLM', (43.21, 39.78, 28.43, 51.18)), ('Spa3-VLM-4B', 'Spa3R', (58.4,))]),
    'viewspatial': (('overall', 'camera', 'person'), [
        ('chance (random)', 'ViewSpatial', (26.33, 25.50, 27.12)), ('GPT-4o', 'ViewSpatial', (34.98, 33.57, 36.29)),
        ('Qwen2.5-VL-3B', 'ViewSpatial', (35.85, 39.80, 32.14)), ('MVSM, fine-tuned 3B', 'ViewSpatial', (82.09, 85.05, 79.31)), ('Spa3-VLM-4B', 'Spa3R', (43.9,))])}


def results_table(name, scored, corrected=None):
    """[(doc, score)] -> per task, and beside what others published. `corrected`: the same answers under the mended scorer."""
    ours, mended = aggregate(name, scored), aggregate(name, corrected) if corrected else None
    rows = [f'{name}, {len(scored)} questions'] + [f'  {task:58s}{value:8.2f}' + (f'  (corrected scorer: {mended[task]:.2f})' if mended and abs(mended[task] - value) > 1e-9 else '')
                                                   for task, value in ours.items() if task != 'overall']
    columns, published = REFERENCES[name]
    short = [column if len(column) < 9 else ''.join(word[:4] for word in column.split('_'))[:9] for column in columns]
    rows.append(f'\n{"":24s}{"source":16s}' + ''.join(f'{column:>10s}' for column in short))
    number = lambda value: f'{value:10.2f}' if value is not None else f'{"-":>10s}'
    for model, source, values in published:
        rows.append(f'{model:24s}{source:16s}' + ''.join(map(number, (*values, *[None] * (len(columns) - len(values))))))
    rows.append(f'{"this run":24s}{"measured":16s}' + ''.join(number(ours.get(column)) for column in columns))
    return '\n'.join(rows)


# -----------------------------------------------------------------------------
# questions about rooms (rooms.py): what one gets without looking, maps in words, intervals, the table of arms

def language_prior(records, commonest=False):
    """What one can answer without looking: of the training answers to the very same question (or, if it was asked fewer than
    twenty times, of its task) the one that would have scored best, or the `commonest`. -> function record -> answer

    The two differ for numbers, where an answer in the middle is often nearly right.
    """
    text = lambda record, letter: record['options']['ABCD'.index(letter)][3:] if record['options'] else letter
    groups = {}
    for record in records:
        question = re.sub(r'\(.*?\)', '', record['question'])                           # the order of options is no part of it
        for key in ((record['question_type'], question), (record['question_type'], None)):
            groups.setdefault(key, []).append(text(record, record['ground_truth']))

    @functools.lru_cache(maxsize=None)
    def best_number(key):
        golds, texts = np.array([float(gold) for gold in groups[key]]), sorted(set(groups[key]), key=float)
        values = np.array([float(text) for text in texts])
        return texts[relative_accuracy(abs(values[:, None] - golds) / golds).sum(1).argmax()]

    def guess(record):
        key = record['question_type'], re.sub(r'\(.*?\)', '', record['question'])
        if len(groups.get(key, ())) < 20:
            key = record['question_type'], None
        if key not in groups:
            return 'A'
        if not record['options']:
            return collections.Counter(groups[key]).most_common(1)[0][0] if commonest else best_number(key)
        return max('ABCD'[:len(record['options'])], key=lambda letter: groups[key].count(text(record, letter)))

    return guess


PIECE = re.compile(r'([a-z]+) at x ([+-]?\d+), y ([+-]?\d+)')


def map_score(truth, answer):
    """How well a map in words (rooms.ask_map) agrees with the true one: pieces of the same kind within a metre in x and in y are
    paired, each with one at most, as many as can be; their number over that of the longer map's pieces. 1 for two empty maps.
    """
    pieces, named = [[(name, int(x), int(y)) for name, x, y in PIECE.findall(text)] for text in (truth, answer)]
    fits = [[j for j, (other, u, v) in enumerate(named) if other == name and max(abs(u - x), abs(v - y)) <= 1] for name, x, y in pieces]
    partner = {}                                              # of a named piece

    def pair(i, tried):                                       # augmenting paths
        for j in fits[i]:
            if j not in tried:
                tried.add(j)
                if j not in partner or pair(partner[j], tried):
                    partner[j] = i
                    return True
        return False
    found = sum(pair(i, set()) for i in range(len(pieces)))
    return found / max(len(pieces), len(named)) if pieces or named else 1.0


def map_prior(maps):
    """Where each kind of piece most often stands, over the training rooms. -> function true map -> a map with its pieces in those places

    It is told which pieces there are; only their places it has to guess.
    """
    places = {}
    for text in maps:
        for name, x, y in PIECE.findall(text):
            for dx, dy in itertools.product((-1, 0, 1), repeat=2):                        # wherever an answer would be right
                places.setdefault(name, collections.Counter())[int(x) + dx, int(y) + dy] += 1
    best = {name: counts.most_common(1)[0][0] for name, counts in places.items()}
    return lambda truth: '; '.join(f'{name} at x {best[name][0]:+d}, y {best[name][1]:+d}' for name, *_ in PIECE.findall(truth) if name in best)


UNTOLD = 'object_size_estimation', 'room_size_estimation', 'obj_appearance_order'        # what a map does not tell


def solve(record, overview):
    """What follows from a map in words, by computation: what a reasoner without fault would answer that knows nothing but the map.

    -> answer, or None where the map lacks a piece that is asked about. For every task but UNTOLD.
    """
    task, names = record['question_type'], re.findall(rf"\b({'|'.join(CATEGORIES)})\b", record['question'])
    places = {}
    for name, x, y in PIECE.findall(overview):
        places.setdefault(name, []).append(torch.tensor([float(x), float(y)]))
    if any(name not in places for name in names):
        return None
    if task == 'object_counting':
        return str(max(2, len(places[names[0]])))                                         # one alone is not asked about
    radius = lambda name: np.mean([half for half in FURNITURE[name][1][:2] if half])      # metres, on average
    gap = lambda a, b: max(0.2, min((p - q).norm().item() for p in places[a] for q in places[b]) - radius(a) - radius(b))
    if task == 'object_abs_distance':
        return f'{gap(*names):.1f}'
    if task == 'object_rel_distance':
        *others, target = names
        said = min(others, key=lambda name: gap(name, target))
    else:
        a, b, c = (places[name][0] for name in names[:3])
        angle = turn_angle(b, 2 * b - a, c) if task == 'route_planning' else turn_angle(a, b, c)
        said = min(SECTORS.get(task, TURNS), key=lambda sector: max(sector[1] - angle.item(), angle.item() - sector[2], 0))[0]
    return next(option[0] for option in record['options'] if option[3:] == said)


def overall_scores(runs, rival=None, draws=1000):
    """runs: metrics of `answer_rooms` of several seeds -> {task: mean, .., 'overall' and 'map': (mean, low, high)}: 95 % bootstrap over rooms and seeds.

    With `rival`, runs of another arm that answered the same questions: of the difference, question by question.
    """
    types, rooms = [[answer[i] for answer in runs[0]['scores']] for i in (0, 1)]
    scores = np.array([[value for *_, value in run['scores']] for run in runs])           # (seeds, questions)
    if rival:
        scores = scores - np.array([[value for *_, value in run['scores']] for run in rival])
    names = sorted(set(types))
    kind, room = np.array([names.index(name) for name in types]), np.unique(rooms, return_inverse=True)[1]

    def average(values, weight):                              # (questions,) -> as aggregate('vsibench')
        sums, counts = np.bincount(kind, weight * values, len(names)), np.bincount(kind, weight, len(names))
        means = {name: s / c for name, s, c in zip(names, sums, counts) if c}
        placed = {'map': 100 * means.pop('map')} if 'map' in means else {}
        return dict(aggregate('vsibench', [(dict(question_type=name), mean) for name, mean in means.items()]) if means else {}, **placed)

    result, random, drawn = average(scores.mean(0), np.ones(len(kind))), np.random.default_rng(0), []
    for _ in range(draws):
        values = scores[random.integers(len(scores), size=len(scores))].mean(0)
        times = np.bincount(random.integers(room.max() + 1, size=room.max() + 1), minlength=room.max() + 1)
        drawn.append(average(values, times[room].astype(float)))
    for name in ('overall', 'map'):
        if name in result:
            result[name] = (result[name], *np.quantile([one[name] for one in drawn], [0.025, 0.975]).tolist())
    return result


def rooms_line(metrics):
    return (f'held-out rooms: {metrics["overall"]:.1f} (without looking: {metrics["prior"]["overall"]:.1f}), '
            f'maps: {metrics["map"]:.1f} ({metrics["prior"]["map"]:.1f})')


ROOM_COLUMNS = {'object_counting': 'count', 'object_abs_distance': 'abs.dist', 'object_size_estimation': 'obj.size', 'room_size_estimation': 'room size',
                'object_rel_distance': 'rel.dist', 'object_rel_direction': 'rel.dir', 'route_planning': 'route', 'obj_appearance_order': 'order'}


def rooms_table(arms):
    """{arm: metrics of one run, or a list of those of several seeds} -> VSI-Bench's columns, with intervals; below, the same for what follows from the maps."""
    arms = {arm: runs if isinstance(runs, list) else [runs] for arm, runs in arms.items()}
    first = next(iter(arms.values()))[0]
    columns = lambda result: ''.join(f'{result[task]:10.1f}' if task in result else f'{"-":>10s}' for task in ROOM_COLUMNS)
    rows = [f'{"":28s}' + ''.join(f'{title:>10s}' for title in ROOM_COLUMNS.values()) + f'{"overall":>22s}{"map":>22s}']
    for name, prior in (('commonest answer', first['commonest']), ('best constant answer', first['prior'])):
        rows.append(f'{name:28s}{columns(prior)}{prior["overall"]:22.1f}' + (f'{prior["map"]:22.1f}' if 'map' in prior else f'{"-":>22s}'))

    def row(name, result):
        with_interval = ''.join('{:.1f} ({:.1f}..{:.1f})'.format(*result[key]).rjust(22) if key in result else '-'.rjust(22) for key in ('overall', 'map'))
        rows.append(f'{name:28s}{columns(result)}{with_interval}')

    def block(arms):
        for arm, runs in arms.items():
            row(f'{arm}, {len(runs)} seed{"s" * (len(runs) > 1)}', overall_scores(runs))
        for arm, runs in arms.items():
            if arm != 'psfm' and len(runs) == len(arms.get('psfm', ())):
                row(f'psfm minus {arm}', overall_scores(arms['psfm'], runs))

    block(arms)
    rows.append('what follows from the maps in words, by computation (scoring.solve):')
    block({arm: [run['solved'] for run in runs] for arm, runs in arms.items()})
    return '\n'.join(rows)
