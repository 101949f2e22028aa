"""
What is a trained field worth, and what is a VLM worth that is given its latents? Numbers only.

The field is asked about *target views of held-out scenes*: views that the encoder did not see, of
places that training did not see. A number means something only beside its baselines:

    mean      the training mean of all features
    position  the training mean at each place in the image
    nearest   the features of the context view with the closest camera rotation
    shuffled  our prediction from another sample's latents, of a training scene
    camera    our prediction from the average latents

cos is the cosine; centred_cos is the cosine after the training mean is taken off; r2 is the share
of the (standardised) variance around that mean that is explained.

A VLM is asked VSI-Bench's questions about held-out rooms (questions.py), and for a map of each.
"""
import collections
import functools
import itertools
import re

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from adapter import Reading
from benchmarks import BENCHMARKS, aggregate, relative_accuracy, score
from chat import answer_loss, lean_batch
from common import step_generator
from model import take_views
from psfm import context_index, random_view_mask
from questions import KINDS, as_prompt
from rooms import SCENE_UNIT, STRUCTURE, check_classes

# -----------------------------------------------------------------------------
# the field

NOTES = dict(mean='training mean', position='training mean at each place',
             nearest='nearest context view', shuffled="from another sample's latents",
             camera='from the average latents', psfm='our prediction',
             context='ours, on views it saw', true="the backbone's own features")
READ = 'true', 'psfm', 'camera', 'shuffled'  # what the frozen heads read
NAMES = list(NOTES)[:-1]  # whose features are compared


def field_batches(psfm, source, config, num_scenes, first=0):
    """The evaluation's samples, from the source's batch `first` on: for every run the same scenes,
    views and masks (half is context). Yields (batch, view_mask, num_context), on its device."""
    device = psfm.geo_mean.device
    num_views = (config.min_views + config.max_views) // 2
    at_once = min(num_scenes, 4)  # whatever the training batch: results must not depend on it
    for number in range(num_scenes // at_once):
        batch = source.batch(first + number, at_once, num_views)
        batch = {name: x.to(device) for name, x in batch.items()}
        B, V = batch['images'].shape[:2]
        mask, num_context = random_view_mask(B, V, 0.5, step_generator(1, number))
        yield batch, mask.to(device), num_context


def knows_rooms(psfm, config):
    """True on rooms, if the backbone has heads that read depth and categories. InputError if these
    are not the categories of rooms.py."""
    has_heads = 'cells' in psfm.backbone.config.heads and config.data == 'rooms'
    if has_heads:
        check_classes(psfm.backbone.config.classes, config.backbone)
    return has_heads


class Score:
    """Running cosine, centred cosine and R2 of predicted features (..., 2C)."""

    def __init__(self, psfm):
        self.mean, self.std = psfm.geo_mean, psfm.geo_std
        self.sums = torch.zeros(5, dtype=torch.float64)

    def add(self, predicted, target):
        predicted, target = predicted.float(), target.float()
        p, t = (predicted - self.mean) / self.std, (target - self.mean) / self.std
        cos = F.cosine_similarity(predicted, target, dim=-1)
        centred = F.cosine_similarity(predicted - self.mean, target - self.mean, dim=-1)
        count = torch.tensor(float(cos.numel()), device=cos.device)
        error, variance = (p - t).square().sum(), t.square().sum()
        sums = [cos.sum(), centred.sum(), error, variance, count]
        self.sums += torch.stack(sums).cpu().double()

    def result(self):
        cos, centred, error, variance, count = self.sums.tolist()
        return dict(cos=cos / count, centred_cos=centred / count, r2=1 - error / variance)


class ReadOut:
    """Running quality of what the backbone's own frozen heads read off features: R2 alone hides
    forgotten furniture, which covers few patches."""

    def __init__(self):
        self.sums = torch.zeros(5, dtype=torch.float64)

    def add(self, backbone, features, grid, batch, index):
        depth, logits = backbone.read_out(features.float(), grid)
        true_depth = take_views(batch['depth'], index) / SCENE_UNIT
        classes = take_views(batch['classes'], index)
        error = (depth - true_depth).abs() / true_depth
        is_right = logits.argmax(-1) == classes
        is_furniture = classes >= len(STRUCTURE)
        count = torch.tensor(float(classes.numel()), device=classes.device)
        sums = [error.sum(), is_right.sum(), count, (is_right & is_furniture).sum(),
                is_furniture.sum()]
        self.sums += torch.stack(sums).cpu().double()

    def result(self):
        error, right, count, found, furniture = self.sums.tolist()
        return dict(depth_abs_rel=error / count, class_accuracy=right / count,
                    object_recall=found / max(1, furniture))


def training_averages(psfm, source, number, config):
    """-> latents of training scenes (scenes, Q, D), mean features at each place (1, 2C, h, w)."""
    latents, sums, counts = [], {}, collections.Counter()
    for batch, mask, num_context in field_batches(psfm, source, config, config.val_scenes, number):
        context, views, _ = psfm.observe(batch['images'], mask, num_context)
        latents.append(psfm.encode(context, views.grid).float())
        sums[views.grid] = sums.get(views.grid, 0) + views.features.float().sum((0, 1))
        counts[views.grid] += mask.numel()
    grid, count = counts.most_common(1)[0]  # of the commonest shape of images
    return torch.cat(latents), (sums[grid] / count).T.unflatten(1, grid)[None]


@torch.no_grad()
def evaluate_field(psfm, train_source, held_out, number, config, autocast):
    """-> dict name -> {cos, centred_cos, r2}, for 'psfm', the baselines, and 'context' (ours, on
    views that it did see); on rooms also 'read_out' -> {true, psfm, camera, shuffled} ->
    {depth_abs_rel, class_accuracy, object_recall}. `number`: the first training batch that the
    averages are taken from."""
    was_training = psfm.training
    psfm.eval()
    with autocast:
        latents, position = training_averages(psfm, train_source, number, config)

    scores = {name: Score(psfm) for name in NAMES}
    read_outs = {}
    if knows_rooms(psfm, config):
        read_outs = {name: ReadOut() for name in READ}
    batches = field_batches(psfm, held_out, config, config.val_scenes)
    for i, (batch, mask, num_context) in enumerate(batches):
        size, V = batch['images'].shape[-2:], batch['images'].shape[1]
        seen_index = context_index(mask, num_context)
        unseen_index = context_index(~mask, V - num_context)
        with autocast:
            context, views, _ = psfm.observe(batch['images'], mask, num_context)
            z = psfm.encode(context, views.grid)

            def predict(z, index):
                extrinsics = take_views(views.extrinsics, index)
                intrinsics = take_views(views.intrinsics, index)
                return psfm.decode(z, extrinsics, intrinsics, size, views.grid)

            other = (torch.arange(len(z)) + i * len(z)) % len(latents)
            average = latents.mean(0).to(z.dtype).expand_as(z)
            predicted = dict(psfm=predict(z, unseen_index),
                             shuffled=predict(latents[other].to(z.dtype), unseen_index),
                             camera=predict(average, unseen_index))
            of_seen = predict(z, seen_index)

        # the baselines that need no decoder
        target = take_views(views.features, unseen_index)
        rotation = views.extrinsics[..., :3]
        # the trace of R1 R2^T: largest for the view that differs least
        alike = torch.einsum('bvij,bwij->bvw', take_views(rotation, unseen_index),
                             take_views(rotation, seen_index)).argmax(-1)
        per_place = F.interpolate(position, views.grid, mode='bilinear').flatten(2).transpose(1, 2)
        baselines = dict(mean=psfm.geo_mean.expand_as(target),
                         position=per_place.expand_as(target),
                         nearest=take_views(context, alike))
        for name, prediction in {**predicted, **baselines}.items():
            scores[name].add(prediction, target)
        scores['context'].add(of_seen, take_views(views.features, seen_index))
        for name, read_out in read_outs.items():
            features = target if name == 'true' else predicted[name]
            read_out.add(psfm.backbone, features, views.grid, batch, unseen_index)
    psfm.train(was_training)

    metrics = {name: running.result() for name, running in scores.items()}
    if read_outs:
        metrics['read_out'] = {name: running.result() for name, running in read_outs.items()}
    return metrics


def field_line(metrics):
    """One line for the log."""
    baselines = [f'{name} {metrics[name]["r2"]:.3f}'
                 for name in ('camera', 'shuffled', 'nearest', 'position', 'mean')]
    line = f'unseen views: R2 {metrics["psfm"]["r2"]:.3f} | ' + ' '.join(baselines)
    if 'read_out' in metrics:
        ours, true = metrics['read_out']['psfm'], metrics['read_out']['true']
        line += (f' | read-out: depth abs-rel {ours["depth_abs_rel"]:.3f} '
                 f'(true features {true["depth_abs_rel"]:.3f}), objects found '
                 f'{ours["object_recall"]:.2f} ({true["object_recall"]:.2f})')
    return line


def field_table(metrics, of_what):
    """The whole comparison, for a person."""
    rows = [f'unseen views, held out: {of_what}', f'{"":44s}{"cos":>9s}{"centred":>9s}{"R2":>9s}']

    def row(name, values):
        rows.append(f'  {name:9s} {NOTES[name]:32s}' + ''.join(f'{x:9.3f}' for x in values))

    for name in NAMES:
        row(name, metrics[name].values())
    if 'read_out' in metrics:
        title = 'read off these features by the frozen heads'
        rows.append(f'{title:44s}{"abs-rel":>9s}{"classes":>9s}{"objects":>9s}')
        for name in READ:
            row(name, metrics['read_out'][name].values())
    if metrics['nearest']['r2'] > metrics['psfm']['r2']:
        rows.append('The nearest context view beats the prediction: these views hardly differ from '
                    'each other, or were trained on too little, and R2 says nothing of the field.')
    return '\n'.join(rows)


# -----------------------------------------------------------------------------
# answers without looking

def language_prior(records, commonest=False):
    """What one can answer without looking. -> function record -> answer

    Of the training answers to the very same question (or to its kind, if the question was asked
    fewer than twenty times): the one that would have scored best, or the `commonest`. The two
    differ for numbers, where an answer in the middle is often nearly right.
    """
    def key_of(record):
        question = re.sub(r'\(.*?\)', '', record['question'])  # without the order of options
        return record['question_type'], question

    def text_of(record, letter):
        return record['options']['ABCD'.index(letter)][3:] if record['options'] else letter

    groups = collections.defaultdict(list)
    for record in records:
        text = text_of(record, record['ground_truth'])
        groups[key_of(record)].append(text)
        groups[record['question_type'], None].append(text)

    @functools.lru_cache(maxsize=None)
    def best_number(key):
        golds = np.array([float(gold) for gold in groups[key]])
        texts = sorted(set(groups[key]), key=float)
        values = np.array([float(text) for text in texts])
        scores = relative_accuracy(abs(values[:, None] - golds) / golds)
        return texts[scores.sum(1).argmax()]

    def guess(record):
        key = key_of(record)
        if len(groups.get(key, ())) < 20:
            key = record['question_type'], None
        if key not in groups:
            return 'A'
        if record['options']:
            letters = 'ABCD'[:len(record['options'])]
            return max(letters, key=lambda letter: groups[key].count(text_of(record, letter)))
        if commonest:
            return collections.Counter(groups[key]).most_common(1)[0][0]
        return best_number(key)

    return guess


PIECE = re.compile(r'([a-z]+) at x ([+-]?\d+), y ([+-]?\d+)')


def read_map(text):
    """A map in words -> [(name, x, y)]"""
    return [(name, int(x), int(y)) for name, x, y in PIECE.findall(text)]


def map_score(truth, answer):
    """How well a map in words (questions.ask_map) agrees with the true one, 0 .. 1.

    Pieces of a kind, a metre apart at most in x and in y, are paired one to one, as many as can be;
    their number over the number of pieces of the longer map. 1 for two empty maps.
    """
    pieces, named = read_map(truth), read_map(answer)
    fits = []
    for name, x, y in pieces:
        fits.append([j for j, (other, u, v) in enumerate(named)
                     if other == name and max(abs(u - x), abs(v - y)) <= 1])
    partner = {}  # of a named piece

    def pair(i, tried):  # augmenting paths
        for j in fits[i]:
            if j not in tried:
                tried.add(j)
                if j not in partner or pair(partner[j], tried):
                    partner[j] = i
                    return True
        return False

    found = sum(pair(i, set()) for i in range(len(pieces)))
    longest = max(len(pieces), len(named))
    return found / longest if longest else 1.0


def map_prior(maps):
    """-> function true map -> a map of its pieces, each where such pieces most often stand"""
    places = collections.defaultdict(collections.Counter)
    for text in maps:
        for name, x, y in read_map(text):
            for dx, dy in itertools.product((-1, 0, 1), repeat=2):  # all that would score
                places[name][x + dx, y + dy] += 1
    best = {name: counts.most_common(1)[0][0] for name, counts in places.items()}

    def guess(truth):
        names = [name for name, _, _ in read_map(truth) if name in best]
        return '; '.join(f'{name} at x {best[name][0]:+d}, y {best[name][1]:+d}' for name in names)
    return guess


# -----------------------------------------------------------------------------
# a VLM's answers about rooms

def score_answer(record, output):
    """VSI-Bench's score; kinds that it does not have are scored as choices, or as numbers."""
    if record['question_type'] not in BENCHMARKS['vsibench'].kinds:
        kind = 'route_planning' if record['options'] else 'object_counting'
        record = dict(record, question_type=kind)
    return score('vsibench', record, output)


def answer_rooms(model, chat, latents, held_out, train_data, autocast, shuffled=False,
                 maps_only=False, num_rooms=None, batch=64):
    """Asks every question about the held-out rooms, on its own, and for the map of each room.

    -> {task: percent, 'overall', 'map': percent of map_score, 'scores': [[question_type, room,
    score]], 'maps': [(true, the model's)], 'prior' and 'commonest': {task: percent} without
    looking}. Maps are not of VSI-Bench and not in 'overall'. `shuffled`: with the pictures of the
    room and the latents of another one. `maps_only` takes a tenth of the time. `num_rooms`: of the
    first ones alone.
    """
    was_training = model.training
    model.eval()
    num_rooms = num_rooms or len(held_out)
    records = [] if maps_only else [x for x in held_out.records if x['room'] < num_rooms]
    answers, drawn = [], []
    for start in tqdm(range(0, num_rooms, batch), 'asking', leave=False, disable=None):
        rooms = range(start, min(start + batch, num_rooms))
        scenes = [held_out.pictures(room) for room in rooms]
        others = [(room + 1) % len(held_out) if shuffled else room for room in rooms]
        z = latents([held_out.pictures(room) for room in others]) if latents else None
        reading = Reading(model, chat, scenes, z, autocast)
        due = [(record['room'] - start, as_prompt(record)) for record in records
               if record['room'] in rooms]  # records are sorted by room
        for i in range(0, len(due), batch):
            answers += reading.answer(due[i:i + batch], 16)
        prompts = [held_out.maps[room][0] for room in rooms]
        drawn += reading.answer(list(enumerate(prompts)), 160)
    model.train(was_training)

    def score_all(records, answers):
        return [(record, score_answer(record, answer)) for record, answer in zip(records, answers)]

    scored = score_all(records, answers)
    maps = [(truth, answer) for (_, truth), answer in zip(held_out.maps, drawn)]
    map_scores = [map_score(truth, answer) for truth, answer in maps]
    by_question = [[record['question_type'], record['room'], value] for record, value in scored]
    by_question += [['map', room, value] for room, value in enumerate(map_scores)]
    metrics = aggregate('vsibench', scored) if scored else {}
    metrics.update(map=100 * float(np.mean(map_scores)), maps=maps, scores=by_question)

    # the same without looking
    metrics.update(prior={}, commonest={})
    if records:
        for name, commonest in (('prior', False), ('commonest', True)):
            guess = language_prior(train_data.records, commonest)
            guesses = [guess(record) for record in records]
            metrics[name] = aggregate('vsibench', score_all(records, guesses))
    usual = map_prior([text for _, text in train_data.maps])
    guessed = [map_score(truth, usual(truth)) for truth, _ in maps]
    metrics['prior']['map'] = 100 * float(np.mean(guessed))
    return metrics


def overall_scores(runs, rival=None, draws=1000):
    """Metrics of `answer_rooms` of several seeds -> {task, 'overall' or 'map': (mean, low, high)},
    with a 95 % bootstrap interval over rooms and seeds.

    With `rival`, as many runs of another arm, asked the same questions: of the difference.
    """
    types = [kind for kind, _, _ in runs[0]['scores']]
    rooms = [room for _, room, _ in runs[0]['scores']]
    scores = np.array([[value for *_, value in run['scores']] for run in runs])
    if rival:
        scores = scores - np.array([[value for *_, value in run['scores']] for run in rival])
    names, type_index = np.unique(types, return_inverse=True)  # (questions,)
    room_index = np.unique(rooms, return_inverse=True)[1]  # (questions,)
    num_rooms = room_index.max() + 1

    def average(values, weight):  # (questions,) both -> as aggregate('vsibench'), and 'map'
        sums = np.bincount(type_index, weight * values, len(names))
        counts = np.bincount(type_index, weight, len(names))
        means = {name: s / c for name, s, c in zip(names.tolist(), sums, counts) if c}
        of_maps = means.pop('map', None)
        tasks = [(dict(question_type=name), mean) for name, mean in means.items()]
        result = aggregate('vsibench', tasks) if tasks else {}
        return result if of_maps is None else dict(result, map=100 * of_maps)

    # draw seeds with replacement and average them; draw rooms with replacement, as weights
    result = average(scores.mean(0), np.ones(len(types)))
    rng, samples = np.random.default_rng(0), []
    for _ in range(draws):
        values = scores[rng.integers(len(scores), size=len(scores))].mean(0)
        copies = np.bincount(rng.integers(num_rooms, size=num_rooms), minlength=num_rooms)
        samples.append(average(values, copies[room_index].astype(float)))
    for name, mean in result.items():
        values = [sample[name] for sample in samples if name in sample]
        result[name] = mean, *np.quantile(values, [0.025, 0.975]).tolist()
    return result


def rooms_line(metrics):
    parts = [f'{name} {metrics[key]:.1f} (without looking: {metrics["prior"][key]:.1f})'
             for key, name in (('overall', "VSI-Bench's tasks"), ('map', 'maps')) if key in metrics]
    return 'held-out rooms: ' + ', '.join(parts)


def rooms_table(arms):
    """{arm: metrics of `answer_rooms` of several seeds} -> VSI-Bench's columns, with intervals."""
    columns = {'object_rel_direction' if 'direction' in kind else kind: title  # levels: one task
               for kind, (title, _) in KINDS.items()}
    rows = [f'{"":28s}' + ''.join(f'{title:>10s}' for title in columns.values())
            + f'{"overall":>22s}{"map":>22s}']

    def cell(value, width, star):
        after = ''
        if isinstance(value, tuple):
            value, low, high = value
            after = f' ({low:.1f}..{high:.1f})' if width > 10 else star * (low > 0 or high < 0)
        return ('-' if value is None else f'{value:.1f}{after}').rjust(width)

    def row(name, result, star=''):
        cells = [cell(result.get(task), 10, star) for task in columns]
        cells += [cell(result.get(task), 22, star) for task in ('overall', 'map')]
        rows.append(f'{name:28s}' + ''.join(cells))

    first = next(iter(arms.values()))[0]
    row('commonest answer', first['commonest'])
    row('best constant answer', first['prior'])
    for arm, runs in arms.items():
        row(f'{arm}, {len(runs)} seed{"s" * (len(runs) > 1)}', overall_scores(runs))
    for arm, runs in arms.items():
        if arm != 'psfm' and len(runs) == len(arms.get('psfm', ())):
            row(f'psfm minus {arm}', overall_scores(arms['psfm'], runs), star='*')
    if len(arms) > 1:
        rows.append('* a difference whose 95 % interval is apart from 0')
    return '\n'.join(rows)


@torch.no_grad()
def held_out_loss(model, chat, latents, data, autocast, max_length=0):
    """Mean loss over held-out conversations, without those of more than max_length tokens, and the
    share of answers that are right to the last token. -> {loss, accuracy, kinds: {kind of
    question: accuracy}, left_out: how many}"""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses, hits = [], collections.defaultdict(list)
    for item in data:
        encoded = chat.encode(item)
        if max_length and len(encoded['input_ids']) > max_length:
            continue
        batch = lean_batch(chat.batch([encoded]), model.vlm, device)
        labels = batch.pop('labels')
        z = latents([item['images']]) if latents else None
        with autocast:
            logits = model(latents=z, use_cache=False, **batch).logits
        losses.append(answer_loss(logits, labels).item())

        # labels are the next tokens already; an answer goes up to its end-of-turn token
        is_right = (logits[0].argmax(-1) == labels[0]).tolist()
        ends = (labels[0] == chat.end_of_turn).nonzero()[:, 0] + 1
        answers = [all(is_right[a:b]) for a, b in itertools.pairwise([0, *ends.tolist()])]
        kinds = item.get('kinds', ['all'] * len(answers))
        for kind, answer in zip(kinds, answers, strict=True):
            hits[kind].append(answer)
    model.train(was_training)
    kinds = {kind: float(np.mean(values)) for kind, values in sorted(hits.items())}
    accuracy = float(np.mean(sum(hits.values(), [])))
    return dict(loss=float(np.mean(losses)), accuracy=accuracy, kinds=kinds,
                left_out=len(data) - len(losses))
