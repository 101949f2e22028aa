"""
Four spatial benchmarks, whole: their files, prompts, scores, averages, and how they are asked.

    prompt(name, doc)            the text that follows the pictures
    score(name, doc, output)     0 .. 1, the official score of one raw answer
    aggregate(name, scored)      [(doc, score)] -> percentages per task and overall

vsibench (VSI-Bench, arXiv 2412.14171), cvbench (CV-Bench, arXiv 2406.16860), sparbench (SPAR-Bench,
arXiv 2503.22976), viewspatial (ViewSpatial-Bench, arXiv 2505.21500). Prompts and scores are the
official ones, to the character and the digit. The official code has its quirks, and published
numbers rest on them, so they are kept and named. `corrected=True` mends what is plainly wrong.
Where the official code would raise an error, the score is 0.
"""
import glob
import io
import json
import os
import re

import numpy as np
import torch
from tqdm import tqdm

from chat import as_text
from common import InputError, autocast_on, first_line
from media import frames_of_video, media_fault, open_picture
from records import as_list, mend_last_line, read_records

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
WORD_PROMPT = 'Please answer the question using a single word or phrase.'


# -----------------------------------------------------------------------------
# files

def read_lines(path):
    """All records of a file, which must be objects."""
    records = []
    for number, record, fault in read_records(path):
        if fault or not isinstance(record, dict):
            raise InputError(f'{path}, record {number}: {fault or "not an object"}')
        records.append(record)
    return records


def read_parquet(root, *patterns):
    """Rows, as dicts, of the parquet files that fit the first of `patterns` that fits any."""
    folder = glob.escape(root)
    found = [sorted(glob.glob(os.path.join(folder, pattern))) for pattern in patterns]
    paths = next(filter(None, found), None)
    if paths is None:
        raise InputError(f'no {" nor ".join(patterns)} in {root}')
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f'{paths[0]}: reading parquet files needs pyarrow '
                         '(pip install pyarrow)') from error
    rows = []
    for path in paths:
        try:
            rows += pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f'{path} cannot be read as parquet: {first_line(error)}') from error
    return rows


def picture_of(cell, root):
    """A picture in a row -> its bytes, or the path of its file. The hub's own form is a dict with
    both, of which one may be empty."""
    if isinstance(cell, dict):
        cell = cell.get('bytes') or cell['path']
    return os.path.join(root, cell) if isinstance(cell, str) else cell


# -----------------------------------------------------------------------------
# scores and averages that several share

def relative_accuracy(error):
    """Mean relative accuracy: the share of thresholds 0.5, 0.45 .. 0.05 that `error` stays within.

    The thresholds are 1 - theta in float64, as in the official code: an error of exactly 0.2
    misses its own. `error` may be an array.
    """
    theta = np.linspace(0.5, 0.95, 10)
    return (np.asarray(error)[..., None] <= 1 - theta).mean(-1)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def mean_by(scored, key):
    """[(doc, score)] -> {key(doc): mean score x 100}"""
    groups = {}
    for doc, value in scored:
        groups.setdefault(key(doc), []).append(value)
    return {name: 100 * mean(values) for name, values in groups.items()}


def mean_of_groups(means, groups):
    """{group: mean of its tasks} for those groups that have any task in `means`."""
    found = {name: [means[task] for task in tasks if task in means]
             for name, tasks in groups.items()}
    return {name: mean(values) for name, values in found.items() if values}


class VSIBench:
    """Like the three below: read(root) -> docs; place(doc, i, root) adds `key` and `media` to one;
    prompt(doc), score, aggregate."""
    title = 'VSI-Bench'
    fields = 'dataset', 'scene_name', 'question_type', 'question', 'ground_truth'
    numerical = ('object_counting', 'object_abs_distance', 'object_size_estimation',
                 'room_size_estimation')
    directions = tuple(f'object_rel_direction_{level}' for level in ('easy', 'medium', 'hard'))
    choices = (*directions, 'object_rel_distance', 'route_planning', 'obj_appearance_order')
    kinds = numerical + choices
    new_tokens = 16  # as the official evaluators allow

    def read(self, root):
        path = os.path.join(root, 'test.jsonl')
        if not os.path.isfile(path):
            return read_parquet(root, 'test-*.parquet', 'test*.parquet')
        docs, pruned = read_lines(path), os.path.join(root, 'pruned_ids.txt')
        if os.path.isfile(pruned):  # (parquet files say it themselves)
            with open(pruned, encoding='utf-8-sig', errors='replace') as file:
                ids = set(file.read().split())
            docs = [{'pruned': str(doc.get('id')) in ids, **doc} for doc in docs]
        return docs

    def place(self, doc, i, root):
        doc['key'] = str(doc.get('id', i))
        doc['media'] = os.path.join(root, doc['dataset'], f'{doc["scene_name"]}.mp4')

    def prompt(self, doc):
        lines = ['These are frames of a video.', doc['question']]
        if doc['question_type'] in self.numerical or not doc['options']:
            return '\n'.join([*lines, WORD_PROMPT])
        return '\n'.join([*lines, 'Options:', *doc['options'], LETTER_PROMPT])

    def score(self, doc, output, corrected=False):
        """The first word (up to a space) without full stops: a letter, or a number for float()."""
        answer = output.split(' ')[0].rstrip('.').strip()
        truth = doc['ground_truth']
        if doc['question_type'] in self.choices:
            return float(answer.lower() == str(truth).lower())
        if doc['question_type'] not in self.numerical:
            return 0.0
        answer, truth = float(answer), float(truth)
        return relative_accuracy(abs(answer - truth) / truth)

    def aggregate(self, scored):
        """Mean per task, with the three levels of relative direction as one; mean of tasks."""
        means = mean_by(scored, lambda doc: doc['question_type'])
        levels = [means.pop(name) for name in self.directions if name in means]
        if levels:
            means['object_rel_direction'] = mean(levels)
        return dict(means, overall=mean(means.values()))


class CVBench:
    title = 'CV-Bench'
    fields = 'task', 'source', 'prompt', 'choices', 'answer'
    new_tokens = 1024

    def read(self, root):
        if glob.glob(os.path.join(glob.escape(root), 'test*.parquet')):
            docs = read_parquet(root, 'test.parquet', 'test-*.parquet', 'test_*.parquet')
        else:
            paths = [os.path.join(root, f'test_{half}.jsonl') for half in ('2d', '3d')]
            docs = [doc for path in paths if os.path.isfile(path) for doc in read_lines(path)]
        if not docs:
            raise InputError(f'neither test*.parquet nor test_2d.jsonl and test_3d.jsonl in {root}')
        return docs

    def place(self, doc, i, root):
        picture = doc.pop('image', None) or doc.get('filename', '')
        doc['key'] = f'{doc.get("type", "")}{doc.get("idx", i)}'
        doc['media'] = [picture_of(picture, root)]

    def prompt(self, doc):
        letters = ', '.join('ABCDEF'[:len(doc['choices'])])
        return (f'Note: You only need to respond with {letters} without providing any additional '
                f'information.\n\n{doc["prompt"]}')

    def score(self, doc, output, corrected=False):
        """The first letter, after brackets and blanks: 'The answer is C' counts as T."""
        found = re.match(r'[\(\s]*([A-Z])[\)\.\s]*', output.strip(), re.IGNORECASE)
        return float(found is not None and found[1].upper() == doc['answer'].strip('()').upper())

    def aggregate(self, scored):
        """2D: mean of two sources. Overall: mean of 2D and 3D. Plain: share of all answers."""
        sources = mean_by(scored, lambda doc: doc['source'])
        halves = mean_of_groups(sources, {'2D': ('ADE20K', 'COCO'), '3D': ('Omni3D',)})
        return {**mean_by(scored, lambda doc: doc['task']), **halves,
                'plain': 100 * mean(value for _, value in scored), 'overall': mean(halves.values())}


class SPARBench:
    title = 'SPAR-Bench'
    fields = 'task', 'question', 'answer'
    new_tokens = 100
    low = [f'{kind}_prediction_{pair}' for kind in ('depth', 'distance')
           for pair in ('oc', 'oo', 'oc_mv', 'oo_mv')]
    medium = ['position_matching', 'camera_motion_infer', 'view_change_infer']
    high = ['distance_infer_center_oo', 'distance_infer_center_oo_mv',
            'obj_spatial_relation_oo', 'obj_spatial_relation_oc_mv', 'obj_spatial_relation_oo_mv',
            'spatial_imagination_oc', 'spatial_imagination_oo',
            'spatial_imagination_oc_mv', 'spatial_imagination_oo_mv']
    moves = [('move_right', 'move_left'), ('move_up', 'move_down'),
             ('move_forward', 'move_backward'), ('rotate_right', 'rotate_left'),
             ('rotate_up', 'rotate_down')]

    def read(self, root):
        return read_parquet(root, 'data/test-*.parquet', 'test-*.parquet')

    def place(self, doc, i, root):
        doc['key'] = str(doc.get('id', i))
        doc['media'] = [picture_of(picture, root) for picture in doc.pop('image', None) or []]

    def prompt(self, doc):
        task, question = doc['task'], doc['question']
        if task in self.low:
            return f'\n{question}\n{WORD_PROMPT}'
        if task == 'view_change_infer':
            return f'\n{question}\n\n'
        between = ''
        if task in ('position_matching', 'camera_motion_infer'):
            between = ('The values represent the bounding box coordinates normalized to a 0-1000 '
                       'scale, with the top-left corner as the origin of the image.')
        return f'\n{question}\n{between}\n{LETTER_PROMPT}'

    def movements(self, text):
        """'move_right:0.3,rotate_up:20' -> five signed numbers."""
        pairs = [pair.split(':') for pair in text.split(',')]
        values = {key: float(value) for key, value in pairs}
        return [values.get(positive, 0) - values.get(negative, 0)
                for positive, negative in self.moves]

    def score(self, doc, output, corrected=False):
        """Letters: the whole answer is part of the gold (so an empty one is right, unless
        `corrected`), or begins with it. Numbers: the first in the text; of several views the
        last. view_change_infer: five movements, each error relative to the answer's own value.
        """
        task, truth = doc['task'], str(doc['answer'])
        is_many = task.endswith('_mv')
        if task in self.low:
            numbers = re.findall(r'(?<!\^)\d+\.\d+|(?<!\^)\d+', output)
            if not numbers and not is_many:
                return 0.0
            answer = float(numbers[-1 if is_many else 0]) if numbers else -1.0
            error = abs(answer - float(truth))
            return relative_accuracy(error / abs(float(truth)) if float(truth) else error)
        if task == 'view_change_infer':
            output = output.replace(' ', '').lower() if corrected else output
            scores = []
            for gold, answer in zip(self.movements(truth), self.movements(output)):
                error = abs(gold - answer)
                scores.append(relative_accuracy(error / abs(answer) if answer else error))
            return mean(scores)
        if task not in self.medium + self.high:
            return 0.0
        output, truth = output.lower(), truth.lower()
        if corrected and not output.strip():
            return 0.0
        return float(output in truth or output[0] == truth)

    def aggregate(self, scored):
        """Mean per task; overall: mean of all tasks. Medium has three tasks, as published; Middle
        is what the official code prints, without view_change_infer."""
        means = mean_by(scored, lambda doc: doc['task'])
        levels = {'Low': self.low, 'Medium': self.medium,
                  'Middle': self.medium[:2], 'High': self.high}
        return {**means, **mean_of_groups(means, levels), 'overall': mean(means.values())}


class ViewSpatial:
    title = 'ViewSpatial-Bench'
    fields = 'question_type', 'question', 'choices', 'answer'
    new_tokens = 128

    def read(self, root):
        return read_lines(os.path.join(root, 'ViewSpatial-Bench.json'))

    def place(self, doc, i, root):
        doc['key'] = str(i)
        doc['media'] = [os.path.join(root, path.removeprefix('ViewSpatial-Bench/'))
                        for path in as_list(doc.get('image_path'))]

    def prompt(self, doc):
        return (f'{doc["question"]}{doc["choices"]}\nReply only to the corresponding option.\n'
                'Answer:')

    def score(self, doc, output, corrected=False):
        """The first lone letter A to D of the last line ('a' counts). Corrected: of the last line
        that is not empty, where the article 'a' does not count."""
        if corrected:
            output = re.sub(r'\ba (?=[a-z])', '', output.rstrip())
        last = output.split('\n')[-1]
        found = corrected and re.search(r'\b([A-D])\b', last)
        found = found or re.search(r'\b([A-D])\b', last, re.IGNORECASE)
        truth = re.search(r'\b([A-D])\b', doc['answer'], re.IGNORECASE)
        return float(found is not None and found[1].upper() == truth[1].upper())

    def aggregate(self, scored):
        """Accuracy per question type; camera, person and overall: of all their questions."""
        result = mean_by(scored, lambda doc: doc['question_type'])
        for side in ('camera', 'person'):
            values = [value for doc, value in scored
                      if doc['question_type'].lower().startswith(side)]
            if values:
                result[side] = 100 * mean(values)
        return dict(result, overall=100 * mean(value for _, value in scored))


BENCHMARKS = dict(vsibench=VSIBench(), cvbench=CVBench(), sparbench=SPARBench(),
                  viewspatial=ViewSpatial())


def read_benchmark(name, root):
    """Questions from a folder with the hub's files: the documents' own fields, `key` (which tells
    one question from another) and `media`: the path of a video, or a list of paths or bytes."""
    docs = BENCHMARKS[name].read(root)
    if not docs:
        raise InputError(f'{root}: there are no questions in the files of {name}')
    times = {}
    for i, doc in enumerate(docs):
        lacking = [field for field in BENCHMARKS[name].fields if doc.get(field) is None]
        if lacking:
            raise InputError(f'{root}: question {i} of {name} has no {" nor ".join(lacking)}')
        try:  # all that will be done with it
            BENCHMARKS[name].place(doc, i, root)
            if not doc['media'] or not all(isinstance(x, (str, bytes)) for x in doc['media']):
                raise TypeError('it has no pictures, or what is neither bytes nor a path')
            names = [doc.get(field, '') for field in ('question_type', 'task', 'source')]
            if not all(isinstance(x, str) for x in names):
                raise TypeError('the name of a task or a source is no text')
            prompt(name, doc)
            for output in ('A', '1'):
                score(name, doc, output)
            aggregate(name, [(doc, 0.0)])
        except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
            raise InputError(f'{root}: question {i} of {name} is unusable ({error})') from error
        key = doc['key']
        times[key] = times.get(key, 0) + 1
        doc['key'] += f' ({times[key]})' * (times[key] > 1)  # not every id is one: "7", "7 (2)"
    return docs


def prompt(name, doc):
    return BENCHMARKS[name].prompt(doc)


def bare(output):
    """An answer without its thoughts and its wrapping: <think>, <answer>, \\boxed{}, bold."""
    output = re.sub(r'<think>.*?</think>', '', output, flags=re.DOTALL)
    output = re.sub(r'</?answer>|\*\*', '', output)
    return re.sub(r'\\boxed\{(?:\\text\{)?([^{}]*)\}*', r'\1', output).strip(' ')


def score(name, doc, output, corrected=False):
    """0 .. 1. `corrected`: of the bare answer, by a scorer that mends what is plainly wrong."""
    output = bare(output) if corrected else output
    try:
        return BENCHMARKS[name].score(doc, output, corrected)
    except (ValueError, ZeroDivisionError, IndexError, OverflowError):
        return 0.0  # not a number, no number, a gold of zero


def aggregate(name, scored):
    """Percentages of whichever tasks there are, and 'overall'."""
    return BENCHMARKS[name].aggregate(scored)


# -----------------------------------------------------------------------------
# asking

@torch.no_grad()
def generate(model, chat, z, items, max_new_tokens):
    """Greedy answers to items that end with a question. z: their scenes' latents, or None."""
    device = model.vlm.device
    batch = chat.batch([chat.encode(item) for item in items], left=True)
    batch = {name: x.to(device) for name, x in batch.items() if name != 'labels'}
    with autocast_on(device, model.vlm.dtype):
        ids = model.generate(latents=z, do_sample=False, max_new_tokens=max_new_tokens,
                             eos_token_id=model.ends(chat),
                             pad_token_id=chat.tokenizer.pad_token_id, **batch)
    new = ids[:, batch['input_ids'].shape[1]:]
    texts = chat.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def leave_out_lost(docs, root):
    """The questions whose pictures are there; says how many are not. InputError if none are."""
    there, lost = [], []
    for doc in docs:
        is_video = isinstance(doc['media'], str)
        faults = (media_fault(path, is_video, with_header=False)
                  for path in as_list(doc['media']) if isinstance(path, str))
        fault = next(filter(None, faults), None)
        if fault:
            lost.append(fault)
        else:
            there.append(doc)
    if lost:
        zipped = glob.glob(os.path.join(glob.escape(root), '*.zip'))
        hint = f" (in {root} lie .zip files: unpack them there, unzip '*.zip')" if zipped else ''
        if not there:
            raise InputError(f'none of the {len(docs)} questions has its pictures; the first: '
                             f'{lost[0]}{hint}')
        print(f'{len(lost)} of {len(docs)} questions are left out, because of their pictures; the '
              f'first: {lost[0]}{hint}')
    return there


def open_media(media, num_frames):
    """`media` of a question -> PIL images: all pictures, or `num_frames` of a video."""
    if isinstance(media, str):
        return frames_of_video(media, num_frames)
    return [open_picture(io.BytesIO(x) if isinstance(x, bytes) else x) for x in media]


def read_answers(path):
    """A JSONL file of answers -> {key: output}. A last line that was cut off is passed over."""
    answers, records = {}, list(read_records(path))
    for number, record, fault in records:
        if fault and number == records[-1][0]:
            continue
        if fault:
            raise InputError(f'{path}, line {number}: {fault}')
        key = record.get('key', record.get('id')) if isinstance(record, dict) else None
        if key is None or type(record.get('output')) not in (str, int, float):
            raise InputError(f'{path}, record {number}: an answer has "key" (or "id") and '
                             '"output", a text')
        key = int(key) if isinstance(key, float) and key.is_integer() else key  # pandas' 1.0
        output = str(record['output'])
        if answers.setdefault(str(key), output) != output:
            raise InputError(f'{path}, line {number}: a second, other answer to {key}')
    return answers


def ask_benchmark(name, docs, answerer, path, num_frames, batch):
    """Asks what is not answered yet in the file `path`, video by video; appends answers as they
    come. -> answers

    `answerer`: (SpatialVLM, Chat, SceneLatents or None).
    """
    model, chat, latents = answerer
    answers = read_answers(path) if os.path.isfile(path) else {}
    due = [doc for doc in docs if doc['key'] not in answers]
    due.sort(key=lambda doc: doc['media'] if isinstance(doc['media'], str) else '')
    print(f'{len(due)} questions to ask, {len(docs) - len(due)} answered before, in {path}')
    mend_last_line(path)
    with open(path, 'a') as file:
        for start in tqdm(range(0, len(due), batch), name):
            keys, items = [], []
            for doc in due[start:start + batch]:
                try:
                    images = open_media(doc['media'], num_frames)
                except InputError as error:
                    tqdm.write(f'question {doc["key"]} is left out: {error}')
                    continue
                text = '<image>' * len(images) + as_text(prompt(name, doc))
                items.append(dict(images=images, conversations=[{'from': 'human', 'value': text}]))
                keys.append(doc['key'])
            if not items:
                continue
            z = latents([item['images'] for item in items]) if latents else None
            outputs = generate(model, chat, z, items, BENCHMARKS[name].new_tokens)
            for key, output in zip(keys, outputs):
                answers[key] = output
                file.write(json.dumps(dict(key=key, output=output)) + '\n')
            file.flush()
    return answers


def results_table(name, docs, answers, published):
    """Scores of the answers, per task, and beside them what others published."""
    def results(corrected):
        scored = [(doc, score(name, doc, answers[doc['key']], corrected)) for doc in docs]
        return aggregate(name, scored)

    official, mended = results(corrected=False), results(corrected=True)
    rows = [f'{BENCHMARKS[name].title}, {len(docs)} questions']
    for task, value in official.items():
        differs = abs(mended[task] - value) > 1e-9
        note = f'  (corrected scorer: {mended[task]:.2f})' if differs else ''
        rows.append(f'  {task:58s}{value:8.2f}{note}')

    def row(model, source, values):
        cells = [f'{value:10.2f}' if value is not None else f'{"-":>10s}' for value in values]
        rows.append(f'{model:24s}{source:16s}' + ''.join(cells))

    columns = published['columns']
    rows += ['', ' ' * 40 + ''.join(f'{title:>10s}' for title in columns.values())]
    for model, source, values in published['rows']:
        row(model, source, values + [None] * (len(columns) - len(values)))
    row('this run', 'measured', [official.get(task) for task in columns])
    return '\n'.join(rows)
