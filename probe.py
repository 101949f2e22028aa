"""
What does z know? Simple probes that read facts of a room off the latents
of its views.

A field can be good and its z useless. For every fact there is a ridge
regression on the flattened tokens, and a small attentive probe (a learned
query per fact). Both are fitted on rooms that the encoder never met and asked
about rooms that neither met, and both are also given what z should be better
than: the backbone's features as one mean and as means over 2 x 2 patches, and
the latents of an untrained encoder.

`Sight`, at the end, reads places off the states of the mini VLM, which is trained by it.

n rooms    m held-out rooms    L tokens a room    C channels of a token, or categories
h width of the VLM    B conversations of T tokens    NAMES names in a question
"""
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import InputError, find_file, load_strictly, read_weights, step_generator
from data import RoomPool
from model import MLP
from psfm import untrained_like
from rooms import CATEGORIES, CLASSES, SEEN, K, check_classes

PROBED = {'pooled': 'backbone features, one mean a room',
          'untrained': 'latents of an untrained encoder',
          'latents': 'latents z of the trained encoder',
          'tokens': 'backbone features, means of 2 x 2'}
FACTS = {'sides': 'side lengths', 'objects': 'number of pieces', 'count': 'counts',
         'presence': 'presence', 'place': 'places', 'distance': 'distances'}


def room_facts(rooms, surface, extrinsics):
    """Numbers that a code of the scene should hold, of the room and the furniture that is seen.

    surface (R, V, h, w): ids as rooms.render gives them, of cells; extrinsics (R, V, 3, 4).
    -> dict of (R, numbers), NaN where a fact is not defined:
        sides      shorter and longer, metres       objects   how many
        presence   per category, 0 or 1             count     per category
        place      of categories with one piece only, its center in the first camera's frame
        distance   between the centers of every two of those, metres
    """
    C = len(CATEGORIES)
    surface = surface.flatten(1).long()
    cells = F.one_hot(surface, 6 + K)[..., 6:].sum(1)  # (R, K)
    is_seen = rooms.present & (cells >= SEEN)
    member = F.one_hot(rooms.category, C) * is_seen[..., None]  # (R, K, C)
    count = member.sum(1)  # (R, C)

    camera = extrinsics[:, 0]
    center = camera[..., :3] @ rooms.center.transpose(1, 2) + camera[..., 3:]  # (R, 3, K)
    place = (center @ member.float()).transpose(1, 2)  # (R, C, 3)
    place = place.masked_fill((count != 1)[..., None], math.nan)
    first, second = torch.triu_indices(C, C, offset=1)
    return dict(sides=rooms.size[:, :2].sort(1).values,
                objects=is_seen.sum(1, keepdim=True).float(),
                presence=(count > 0).float(), count=count.float(), place=place.flatten(1),
                distance=(place[:, first] - place[:, second]).norm(dim=-1))


@torch.no_grad()
def rooms_to_probe(psfm, untrained, config, split, seed, num_rooms, num_views, autocast):
    """-> tokens {PROBED: (rooms, L, C)}, facts {FACTS: (rooms, numbers)}, on the CPU."""
    size = config.image_width, config.image_width
    pool = RoomPool(split, seed, num_rooms, image_size=size, device=psfm.geo_mean.device)
    tokens = {name: [] for name in PROBED}
    facts = {name: [] for name in FACTS}
    progress = tqdm(range(pool.num_blocks), f'looking at {split} rooms', leave=False, disable=None)
    for index in progress:
        rooms, block = pool.render_block(index, num_views)
        with autocast:
            views = psfm.backbone(block['images'].float() / 255)
            z = psfm.encode(views.features, views.grid).float()
            z0 = untrained.encode(views.features, views.grid).float()
        features = views.features.float()  # (R, V, N, 2C)
        maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, views.grid)
        coarse = [side // 2 for side in views.grid]  # four patches, one token
        every = F.adaptive_avg_pool2d(maps, coarse).flatten(2).transpose(1, 2)
        every = every.unflatten(0, (len(z), -1)).flatten(1, 2)  # (R, V N/4, 2C)
        pooled = features.mean((1, 2))[:, None]  # (R, 1, 2C)
        for name, x in dict(pooled=pooled, untrained=z0, latents=z, tokens=every).items():
            tokens[name].append(x.cpu())
        known = room_facts(rooms, block['surface'], block['extrinsics'])
        for name in FACTS:
            facts[name].append(known[name].cpu())
    tokens = {name: torch.cat(x) for name, x in tokens.items()}
    facts = {name: torch.cat(x) for name, x in facts.items()}
    return tokens, facts


# -----------------------------------------------------------------------------
# ridge regression

def ridge_probe(x, y, x_test):
    """x (n, d), y (n, facts) with NaN where a fact is not defined, x_test (m, d) -> (m, facts)."""
    x = x.double()
    x_test = x_test.double()
    y = y.double()
    mean = x.mean(0)
    scale = (x.std(0) + 1e-6) * x.shape[1] ** 0.5
    x = (x - mean) / scale
    x_test = (x_test - mean) / scale
    kernel = x @ x.T  # (n, n)
    cross = x_test @ x.T
    answers = torch.empty(len(x_test), y.shape[1], dtype=torch.float64)

    # facts that are defined in the same rooms are solved together
    same = {}
    for fact in range(y.shape[1]):
        same.setdefault(y[:, fact].isnan().numpy().tobytes(), []).append(fact)
    for facts in same.values():
        known = ~y[:, facts[0]].isnan()
        answers[:, facts] = kernel_ridge(kernel[known][:, known], cross[:, known],
                                         y[known][:, facts])
    return answers.float()


def kernel_ridge(kernel, cross, y):
    """Ridge regression with a free intercept, from products of inputs.

    kernel (n, n) and cross (m, n) are products of the fitted and the asked
    rooms with the fitted ones, y (n, facts) -> (m, facts). The penalty of each
    fact is the one with the least leave-one-out error. That error needs no
    second fit: with G = (kernel + penalty)^-1 it is, at room i,
    weights_i / (G_ii - 1 / (n penalty)), the last term being the intercept's.
    """
    # centre on the n rooms, as the inputs themselves would be centred
    n = len(y)
    mean = y.mean(0)
    cross = cross - kernel.mean(0)
    cross = cross - cross.mean(1, keepdim=True)
    kernel = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()

    # in the kernel's own axes, every penalty costs one product
    values, vectors = torch.linalg.eigh(kernel)
    values = values.clamp(min=0)
    rotated = vectors.T @ (y - mean)  # (n, facts)
    least = y.new_full((y.shape[1],), math.inf)
    best = torch.zeros_like(y)
    for penalty in 10.0 ** torch.arange(-4, 3.1, 0.5):
        inverse = 1 / (values + penalty)  # (n,)
        weights = vectors @ (inverse[:, None] * rotated)  # (n, facts)
        diagonal = vectors.square() @ inverse  # (n,) G_ii
        left_out = weights / (diagonal - 1 / (n * penalty))[:, None]
        error = left_out.square().mean(0)  # (facts,)
        best = torch.where(error < least, weights, best)
        least = torch.where(error < least, error, least)
    return cross @ best + mean


# -----------------------------------------------------------------------------
# an attentive probe

class AttentiveProbe(nn.Module):
    """Tokens (B, L, C) -> facts (B, facts): a query per fact attends, a small MLP reads off."""

    def __init__(self, dim, num_facts, width=128, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.randn(num_facts, width))
        self.keys_values = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(0.1),
                                         nn.Linear(dim, 2 * width))
        self.mlp = nn.Sequential(nn.LayerNorm(width), MLP(width, 2 * width, width))
        self.weight = nn.Parameter(torch.zeros(num_facts, width))
        self.bias = nn.Parameter(torch.zeros(num_facts))

    def forward(self, tokens):
        kv = self.keys_values(tokens).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, nh, L, d)
        q = self.queries.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        q = q.expand(len(k), -1, -1, -1)  # (B, nh, facts, d)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.mlp(x)  # (B, facts, width)
        return (x * self.weight).sum(-1) + self.bias


def attentive_probe(x, y, x_test, epochs=30, batch=128, lr=2e-3):
    """As ridge_probe, for tokens x (n, L, C). A tenth of the rooms chooses the epoch."""
    torch.manual_seed(0)
    mean = x.mean((0, 1))
    std = x.std((0, 1)) + 1e-6
    x = (x - mean) / std
    x_test = (x_test - mean) / std
    center = y.nanmean(0)
    spread = (y - center).square().nanmean(0).sqrt().clamp(min=1e-6)
    y = (y - center) / spread
    tenth = len(x) // 10
    x_choose = x[:tenth]
    y_choose = y[:tenth]
    x = x[tenth:]
    y = y[tenth:]

    probe = AttentiveProbe(x.shape[2], y.shape[1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr, weight_decay=0.1)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)

    def error(tokens, facts):
        known = ~facts.isnan()
        return (probe(tokens) - facts.nan_to_num()).square()[known].mean()

    least = math.inf
    answers = None
    for _ in range(epochs):
        probe.train()
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            error(x[rows], y[rows]).backward()
            optimizer.step()
            schedule.step()
        probe.eval()
        with torch.no_grad():
            held_back = error(x_choose, y_choose).item()
            if held_back < least:
                least = held_back
                answers = torch.cat([probe(rows) for rows in x_test.split(500)])
    return answers * spread + center


# -----------------------------------------------------------------------------
# scores

def fact_scores(answers, truth, fitted, resamples=1000):
    """Answers and truth {fact: (rooms, numbers)} -> {fact: [score, low, high]}, 95 % over rooms.

    The score is R2 around the mean of the `fitted` rooms, with every number of
    a fact weighing alike; for presence it is the share that is right. Numbers
    that fewer than ten fitted rooms have (two rare pieces, each alone of its
    kind) are left out.
    """
    n = len(truth['sides'])
    draws = torch.randint(n, (resamples, n), generator=step_generator(0))
    scores = {}
    for name in FACTS:
        is_rare = (~fitted[name].isnan()).sum(0) < 10
        asked = truth[name].masked_fill(is_rare, math.nan)
        if name == 'presence':
            wrong = ((answers[name] > 0.5) != (asked > 0.5)).float().sum(1)
            total = torch.full((n,), float(asked.shape[1]))
        else:
            mean = fitted[name].nanmean(0)
            scale = (fitted[name] - mean).square().nanmean(0)
            wrong = ((answers[name] - asked).square() / scale).nansum(1)
            total = ((mean - asked).square() / scale).nansum(1)
        score = (1 - wrong.sum() / total.sum()).item()
        resampled = 1 - wrong[draws].sum(1) / total[draws].sum(1)
        interval = resampled.quantile(torch.tensor([0.025, 0.975])).tolist()
        scores[name] = [score, *interval]
    return scores


def probe_latents(psfm, config, num_rooms, num_held_out, num_views, autocast):
    """-> {'mean': fact_scores, 'pooled ridge': .., 'pooled attentive': .., ...}, see PROBED."""
    untrained = untrained_like(psfm, config)
    # a seed that no encoder is trained with, and the held-out rooms
    fit_tokens, fit_facts = rooms_to_probe(psfm, untrained, config, 'train', 1_000_000, num_rooms,
                                           num_views, autocast)
    test_tokens, test_facts = rooms_to_probe(psfm, untrained, config, 'val', 0, num_held_out,
                                             num_views, autocast)
    y = torch.cat([fit_facts[name] for name in FACTS], 1)  # (n, all numbers)
    widths = [fit_facts[name].shape[1] for name in FACTS]

    def score(answers):
        parts = dict(zip(FACTS, answers.split(widths, 1)))
        return fact_scores(parts, test_facts, fit_facts)

    scores = {'mean': score(y.nanmean(0).expand(num_held_out, -1))}
    for name in tqdm(PROBED, 'fitting probes', leave=False, disable=None):
        x = fit_tokens[name]
        x_test = test_tokens[name]
        scores[f'{name} ridge'] = score(ridge_probe(x.flatten(1), y, x_test.flatten(1)))
        scores[f'{name} attentive'] = score(attentive_probe(x, y, x_test))
    return scores


def probe_table(scores):
    rows = [' ' * 48 + ''.join(f'{title:>20s}' for title in FACTS.values())]
    for name, row in scores.items():
        what, _, kind = name.partition(' ')
        label = f'{PROBED[what]:36s} {kind}' if kind else 'mean of the fitted rooms'
        line = f'{label:48s}'
        for fact in FACTS:
            value, low, high = row[fact]
            interval = f' {low:.2f}..{high:.2f}' if kind else ' ' * 11
            line += f'{round(value, 2) + 0.0:.2f}{interval}'.rjust(20)  # + 0.0: no -0.00
        rows.append(line.rstrip())
    return '\n'.join(rows)


# -----------------------------------------------------------------------------
# Sight: what the states of the mini VLM say of places

class Sight(nn.Module):
    """Linear readers of places in metres off the VLM's states. Only training needs them.

    tokens   of each image token: what it shows, and where
    words    of each word that names a piece, half-way up the language model: where it stands
    answers  of the token before an answer, two thirds up: where all the pieces stand that the
             question names, in their order; the blocks above have only to compare them
    """
    NAMES = 5  # in a question, at most

    def __init__(self, width):
        super().__init__()
        self.tokens, self.words = self.reader(width, len(CLASSES) + 3), self.reader(width, 3)
        self.answers = self.reader(width, 3 * self.NAMES)

    @staticmethod
    def reader(width, outputs):
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def losses(self, image_tokens, states, truth):
        """image_tokens (images x 16, h); states: of every block, (B, T, h); truth: of `truth_of`"""
        half, two_thirds = states[len(states) // 2 - 1], states[2 * len(states) // 3 - 1]
        named = self.answers(two_thirds).unflatten(-1, (self.NAMES, 3))
        return dict(tokens=self.token_loss(image_tokens, truth['seen']),
                    words=self.place_loss(self.words(half), truth['words']),
                    questions=self.place_loss(named, truth['questions']))

    def token_loss(self, tokens, seen):
        """tokens (images x 16, h); seen (images, 16, classes + 3): shares of classes, place"""
        if len(tokens) != len(seen.flatten(0, 1)):
            raise InputError(f'{len(tokens)} image tokens for {len(seen)} pictures: places are '
                             'read off 16 each; give a larger --max-pixels, or --ground-steps 0')
        sizes = len(CLASSES), 3
        said, place = self.tokens(tokens).float().split(sizes, -1)
        shares, true_place = seen.flatten(0, -2).float().split(sizes, -1)
        return F.cross_entropy(said, shares) + F.smooth_l1_loss(place, true_place)

    @staticmethod
    def place_loss(said, true):
        """Smooth L1 between places (..., 3), where the true one is not NaN."""
        known = ~true.isnan()
        error = F.smooth_l1_loss(said.float(), true.nan_to_num(), reduction='none')
        return (error * known).sum() / known.sum().clamp(min=1)


def load_sight(folder, width):
    """The Sight in the folder of a mini VLM. InputError if it has none, or of other categories."""
    path = os.path.join(find_file(folder), 'sight.safetensors')
    if not os.path.isfile(path):
        raise InputError(f'{folder} has no sight.safetensors, by which the adapter is grounded: '
                         'take a mini VLM, or --ground-steps 0')
    state, metadata = read_weights(path)
    check_classes(json.loads(metadata.get('classes', '[]')), path, 'python mini_vlm.py')
    sight = Sight(width)
    load_strictly(sight, {name: x.float() for name, x in state.items()}, path)
    return sight


def token_categories(tokenizer):
    """For every token, the index of the category that it names, or C. -> (vocabulary,)"""
    category_of = torch.full((len(tokenizer),), len(CATEGORIES))
    for i, name in enumerate(CATEGORIES):
        category_of[tokenizer.convert_tokens_to_ids(name)] = i
    return category_of


def truth_of(items, batch, category_of):
    """What `Sight` is asked about a batch of items. NaN where there is nothing to say.

    -> seen (images, 16, classes + 3); words (B, T, 3): the place of the piece that a token names;
    questions (B, T, NAMES, 3): at the token before an answer, the places of the pieces that the
    question names.
    """
    category = category_of[batch['input_ids']]  # (B, T)
    stand = torch.stack([item['stand'] for item in items])  # (B, C, 3)
    stand = F.pad(stand, (0, 0, 0, 1), value=math.nan)  # words that name none
    words = stand.gather(1, category[..., None].expand(-1, -1, 3))  # (B, T, 3)
    asked = words.new_full((*category.shape, Sight.NAMES, 3), math.nan)
    is_name = (category < len(CATEGORIES)).tolist()
    is_answer = (batch['labels'] != -100).tolist()
    for i in range(len(items)):
        names = []  # tokens that name a piece, since the last answer
        for t in range(len(is_name[i]) - 1):
            if is_answer[i][t]:
                names = []
            elif is_name[i][t]:
                names.append(t)
            if is_answer[i][t + 1] and not is_answer[i][t]:
                named = names[:Sight.NAMES]
                asked[i, t, :len(named)] = words[i, named]
    return dict(seen=torch.cat([item['seen'] for item in items]), words=words, questions=asked)
