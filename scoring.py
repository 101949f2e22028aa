"""
Prompts, scores and averages of four spatial benchmarks, as their official evaluators have them.

    prompt(benchmark, doc)           the text that follows the pictures
    score(benchmark, doc, output)    0 .. 1, the official score of one raw answer
    aggregate(benchmark, scored)     [(doc, score), ...] -> percentages per task and overall

vsibench (VSI-Bench, arXiv 2412.14171), cvbench (CV-Bench, arXiv 2406.16860), sparbench (SPAR-Bench, arXiv 2503.22976),
viewspatial (ViewSpatial-Bench, arXiv 2505.21500). The official code has its quirks (one split on spaces, one regular
expression more); published numbers rest on them, so they are kept and named here. `corrected=True` mends what is plainly
wrong. Where the official code would raise, the score is 0.
"""
import re

import numpy as np

from rooms import NUMERICAL, vsi_prompt

BENCHMARKS = ('vsibench', 'cvbench', 'sparbench', 'viewspatial')
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
WORD_PROMPT = 'Please answer the question using a single word or phrase.'


def relative_accuracy(error):
    """Mean relative accuracy: the share of ten thresholds 0.5, 0.45 .. 0.05 that a relative `error` stays within.

    The thresholds are 1 - theta in float64, as in the official code, so that an error of exactly 0.2 fails its own.
    """
    theta = np.linspace(0.5, 0.95, 10)
    return float((error <= 1 - theta).mean())


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
    values = {key.strip(): float(value) for key, value in (pair.split(':') for pair in text.split(','))}
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
