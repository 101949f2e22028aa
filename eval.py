"""
What has been learned? Measures and pictures of a trained field, of the backbone under it, and of a VLM with its latents.

    python eval.py field --run out/small            # metrics.json and field.png of a run, anew
    python eval.py field --run out/small --path     # ... and path.gif: the field from cameras where no picture was taken
    python eval.py probe                            # what does z know of the room?
    python eval.py runs out/*                       # several runs side by side
    python eval.py backbone                         # how good the mini VGGT is at cameras and depth
    python eval.py rooms --run out/vlm-small        # fine-tuned VLMs on the held-out rooms' questions
    python eval.py ablate                           # do the latents help? every kind of them, three seeds
    python eval.py ask --images a.jpg --question "How many table(s) are in this room?"
    python eval.py vsibench --data VSI-Bench/ --run out/vlm-base       # cvbench, sparbench, viewspatial

The field is asked about *target views of held-out scenes*: views that the encoder did
not see, of places that training did not see. A number means something only beside
what it costs nothing to reach, so `evaluate_field` measures these too:

    mean      the training mean of all features
    position  the training mean at each place in the image
    nearest   the features of the context view whose camera is turned most alike
    shuffled  our prediction from another (training) scene's latents
    camera    our prediction from the average latents: what the camera alone tells

cos is the cosine, centred_cos the cosine after the training mean is taken off, r2 the
share of the (standardised) variance around that mean that is explained.
"""
import argparse
import dataclasses
import functools
import glob
import json
import math
import os
import sys
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from adapter import LATENTS, SceneLatents, SpatialVLM, load_spatial_vlm, load_vlm
from data import RoomPool, RoomQuestions, download_benchmark, make_source, open_media, open_picture, read_benchmark, read_records, read_video, step_generator, to_turns
from model import MLP, InputError, pick_device, take_views
from psfm import build_psfm, context_index, load_psfm, random_view_mask
from rooms import FURNITURE, make_intrinsics, make_path, render, room_facts
from scoring import BENCHMARKS, PIECE, UNTOLD, aggregate, language_prior, map_prior, map_score, prompt, results_table, rooms_table, score, solve
from vggt import SCENE_UNIT, VGGT, area_under_curve, pose_errors, scene_extrinsics

SHIPPED = 'weights/psfm_small.safetensors'      # the encoder that the repository carries


def field_batches(psfm, source, config, num_scenes, device, first=0):
    """The evaluation's samples: the same scenes, views and masks every time. Yields (batch, view_mask, num_context).

    `first`: the source's batch to begin with. Of training rooms, only those of the present step are in memory.
    """
    num_views = (config.min_views + config.max_views) // 2
    at_once = min(num_scenes, 4)                              # whatever the training batch: results must not depend on it
    for step in range(max(1, num_scenes // at_once)):
        batch = {name: x.to(device) for name, x in source.batch(first + step, at_once, num_views).items()}
        B, V = batch['images'].shape[:2]
        mask, num_context = random_view_mask(B, V, psfm.mask_ratio, step_generator(1, step))
        yield batch, mask.to(device), num_context


def look(psfm, batch, view_mask, num_context, config):
    """-> context features (B, Vc, N, 2C), all features (B, V, N, 2C), extrinsics, intrinsics, grid, as in training."""
    context, views, _ = psfm.observe(batch['images'], view_mask, num_context)
    extrinsics, intrinsics = views.extrinsics, views.intrinsics
    if config.cameras == 'given':
        extrinsics, intrinsics = scene_extrinsics(batch['extrinsics']), batch['intrinsics']
    return context, views.features, extrinsics, intrinsics, views.grid


class Score:
    """Running cosine, centred cosine and R2 of predicted features (..., 2C)."""

    def __init__(self, psfm):
        self.mean, self.std, self.sums = psfm.geo_mean, psfm.geo_std, torch.zeros(5, dtype=torch.float64)

    def add(self, predicted, target):
        predicted, target = predicted.float(), target.float()
        p, t = (predicted - self.mean) / self.std, (target - self.mean) / self.std
        centred = F.cosine_similarity(predicted - self.mean, target - self.mean, dim=-1)
        self.sums += torch.stack([F.cosine_similarity(predicted, target, dim=-1).sum(), centred.sum(), (p - t).square().sum(),
                                  t.square().sum(), torch.tensor(float(centred.numel()), device=t.device)]).cpu().double()

    def result(self):
        cos, centred, error, variance, count = self.sums.tolist()
        return dict(cos=cos / count, centred_cos=centred / count, r2=1 - error / variance)


class ReadOut:
    """Running quality of what the backbone's own frozen heads read off features: R2 alone hides forgotten furniture."""

    def __init__(self):
        self.sums = torch.zeros(5, dtype=torch.float64)

    def add(self, backbone, features, grid, batch, index):
        depth, logits = backbone.read_out(features.float(), grid)
        true_depth, classes = take_views(batch['depth'], index) / SCENE_UNIT, take_views(batch['classes'], index)
        right, furniture = logits.argmax(-1) == classes, classes >= 3
        self.sums += torch.stack([((depth - true_depth).abs() / true_depth).sum(), right.sum(), right.new_tensor(right.numel(), dtype=torch.float32),
                                  (right & furniture).sum(), furniture.sum()]).cpu().double()

    def result(self):
        depth, right, count, found, furniture = self.sums.tolist()
        return dict(depth_abs_rel=depth / count, class_accuracy=right / count, object_recall=found / max(1, furniture))


@torch.no_grad()
def evaluate_field(psfm, train_source, held_out, step, config, device, autocast):
    """-> dict name -> {cos, centred_cos, r2} for 'psfm', the baselines and 'context' (ours, on views that it did see);
    on rooms also 'read_out' -> {true, psfm, camera, shuffled} -> {depth_abs_rel, class_accuracy, object_recall}.
    """
    was_training = psfm.training
    psfm.eval()
    # from training scenes: the average latents, and the mean features at each place of the image
    latents, position = [], {}
    with autocast:
        for batch, mask, num_context in field_batches(psfm, train_source, config, config.val_scenes, device, first=step):
            context, features, _, _, grid = look(psfm, batch, mask, num_context, config)
            latents.append(psfm.encode(context, grid).float())
            total, count = position.get(grid, (0, 0))
            position[grid] = total + features.float().sum((0, 1)), count + features.shape[0] * features.shape[1]
    latents = torch.cat(latents)                                                          # (scenes, Q, D)
    commonest = max(position, key=lambda grid: position[grid][1])                         # shape of images
    position = (position[commonest][0] / position[commonest][1]).T.unflatten(1, commonest)[None]   # (1, 2C, h, w)

    names = ['psfm', 'mean', 'position', 'nearest', 'shuffled', 'camera', 'context']
    scores = {name: Score(psfm) for name in names}
    on_rooms = 'cells' in psfm.backbone.config.heads and config.data == 'rooms'
    read_outs = {name: ReadOut() for name in ('true', 'psfm', 'camera', 'shuffled')} if on_rooms else {}
    for i, (batch, mask, num_context) in enumerate(field_batches(psfm, held_out, config, config.val_scenes, device)):
        size, V = batch['images'].shape[-2:], batch['images'].shape[1]
        seen = context_index(mask, num_context)
        unseen = context_index(~mask, V - num_context)
        with autocast:
            context, features, extrinsics, intrinsics, grid = look(psfm, batch, mask, num_context, config)
            z = psfm.encode(context, grid)
            predict = lambda z, index: psfm.decode(z, take_views(extrinsics, index), take_views(intrinsics, index), size, grid)
            another = latents[(torch.arange(len(z)) + i * len(z)) % len(latents)].to(z.dtype)
            predicted = {'psfm': predict(z, unseen), 'shuffled': predict(another, unseen),
                         'camera': predict(latents.mean(0).to(z.dtype).expand_as(z), unseen)}
            of_seen = predict(z, seen)
        target = take_views(features, unseen)
        rotation = extrinsics[..., :3]
        alike = torch.einsum('bvij,bwij->bvw', take_views(rotation, unseen), take_views(rotation, seen)).argmax(-1)
        per_place = F.interpolate(position, grid, mode='bilinear').flatten(2).transpose(1, 2)
        baselines = dict(mean=psfm.geo_mean.expand_as(target), position=per_place.expand_as(target), nearest=take_views(context, alike))
        for name, prediction in {**predicted, **baselines}.items():
            scores[name].add(prediction, target)
        scores['context'].add(of_seen, take_views(features, seen))
        for name, read_out in read_outs.items():
            read_out.add(psfm.backbone, target if name == 'true' else predicted[name], grid, batch, unseen)
    psfm.train(was_training)
    metrics = {name: score.result() for name, score in scores.items()}
    if read_outs:
        metrics['read_out'] = {name: read_out.result() for name, read_out in read_outs.items()}
    return metrics


def field_line(metrics):
    """One line for the log."""
    order = ['camera', 'shuffled', 'nearest', 'position', 'mean']
    line = f"unseen views: R2 {metrics['psfm']['r2']:.3f} | " + ' '.join(f"{name} {metrics[name]['r2']:.3f}" for name in order)
    if 'read_out' in metrics:
        ours, true = metrics['read_out']['psfm'], metrics['read_out']['true']
        line += (f" | read-out: depth abs-rel {ours['depth_abs_rel']:.3f} (true features {true['depth_abs_rel']:.3f}), "
                 f"objects found {ours['object_recall']:.2f} ({true['object_recall']:.2f})")
    return line


def field_table(metrics, held_out):
    """The whole comparison, for a person; `held_out` says of what."""
    notes = dict(psfm='our prediction', context='ours, on views it saw', mean='training mean', position='training mean at each place',
                 nearest='nearest context view', shuffled="from another sample's latents", camera='from the average latents')
    rows = [f'unseen views, held out: {held_out}', f'{"":44s}{"cos":>9s}{"centred":>9s}{"R2":>9s}']
    for name in ('mean', 'position', 'nearest', 'shuffled', 'camera', 'psfm', 'context'):
        m = metrics[name]
        rows.append(f'  {name:9s} {notes[name]:32s}{m["cos"]:9.3f}{m["centred_cos"]:9.3f}{m["r2"]:9.3f}')
    if 'read_out' in metrics:
        rows.append(f'{"read off these features by the frozen heads":44s}{"abs-rel":>9s}{"classes":>9s}{"objects":>9s}')
        for name, note in (('true', "the backbone's own features"), ('psfm', notes['psfm']), ('camera', notes['camera']), ('shuffled', notes['shuffled'])):
            m = metrics['read_out'][name]
            rows.append(f'  {name:9s} {note:32s}{m["depth_abs_rel"]:9.3f}{m["class_accuracy"]:9.3f}{m["object_recall"]:9.3f}')
    return '\n'.join(rows)


# -----------------------------------------------------------------------------
# field.png

def to_colours(features, basis=None):
    """The three main directions of features (V, N, C) as red, green and blue. -> colours (V, N, 3) in [0, 1], basis."""
    x = features.float().flatten(0, 1)
    if basis is None:
        mean = x.mean(0)
        directions = torch.linalg.svd(x - mean, full_matrices=False).Vh[:3].T             # (C, 3)
        y = (x - mean) @ directions
        basis = mean, directions, torch.quantile(y, 0.02, dim=0), torch.quantile(y, 0.98, dim=0)
    mean, directions, low, high = basis
    return (((x - mean) @ directions - low) / (high - low)).clamp(0, 1).unflatten(0, features.shape[:2]), basis


def to_tile(image, size):
    """(h, w, 3) in [0, 1] -> PIL image of `size`, (width, height); each value stays a visible square."""
    return Image.fromarray((255 * image).round().byte().cpu().numpy()).resize(size, Image.Resampling.NEAREST)


@torch.no_grad()
def draw_field(psfm, source, config, device, autocast, path, num_scenes=2, tile=88):
    """Draws for a few scenes: pictures, the features that the backbone sees, those that we predict, and their error;
    of rooms also depth and categories, true and read off the prediction by the backbone's own frozen heads.

    One PCA basis a scene, made from the backbone's features; context views first, unseen views behind the bar.
    """
    was_training = psfm.training
    psfm.eval()
    batch, mask, num_context = next(iter(field_batches(psfm, source, config, num_scenes, device)))
    with autocast:
        context, features, extrinsics, intrinsics, grid = look(psfm, batch, mask, num_context, config)
        predicted = psfm.decode(psfm.encode(context, grid), extrinsics, intrinsics, batch['images'].shape[-2:], grid)
    psfm.train(was_training)
    B, V = mask.shape
    order = mask.int().argsort(dim=1, stable=True)                                        # context first
    images, features, predicted = [take_views(x, order) for x in (batch['images'], features, predicted)]
    error = ((predicted - features) / psfm.geo_std).square().mean(-1) / ((features - psfm.geo_mean) / psfm.geo_std).square().mean()
    rows = ['picture', 'features seen by\nthe backbone', 'features predicted\nfrom the context', 'error (white: as bad\nas the mean)']
    (h, w), (H, W) = grid, images.shape[-2:]
    tile_height, margin, top, gap = tile * H // W, 160, 28, 4
    on_rooms = 'depth' in batch and 'cells' in psfm.backbone.config.heads
    if on_rooms:
        rows += ['true depth', 'depth read off\nthe prediction', 'true categories', 'categories read off\nthe prediction']
        read, logits = psfm.backbone.read_out(predicted, grid)
        depth, classes = take_views(batch['depth'], order) / SCENE_UNIT, take_views(batch['classes'], order)
        paint = torch.tensor([(0.75, 0.70, 0.65), (0.95, 0.95, 0.95), (0.45, 0.45, 0.45)] + [colour for _, _, colour in FURNITURE.values()],
                             device=device)                   # floor, ceiling, wall, and the furniture as it is painted
    block = len(rows) * (tile_height + gap) + top + 8
    canvas = Image.new('RGB', (margin + V * (tile + gap) + 12, B * block), 'white')
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for b in range(B):
        seen, basis = to_colours(features[b])
        ours, _ = to_colours(predicted[b], basis)
        strips = [images[b].permute(0, 2, 3, 1), seen.unflatten(1, (h, w)), ours.unflatten(1, (h, w)), to_grey(error[b].unflatten(1, (h, w)))]
        if on_rooms:
            far = depth[b].max()
            strips += [to_grey(1 - x / far) for x in (depth[b], read[b])] + [paint[x] for x in (classes[b], logits[b].argmax(-1))]
        for v in range(V):
            x = margin + v * (tile + gap) + (12 if v >= num_context else 0)
            label = 'context' if v < num_context else 'unseen'
            draw.text((x + tile // 2, b * block + top // 2 + 2), label, 'black' if v < num_context else 'firebrick', font, anchor='mm')
            for r, strip in enumerate(strips):
                canvas.paste(to_tile(strip[v], (tile, tile_height)), (x, b * block + top + r * (tile_height + gap)))
        for r, name in enumerate(rows):
            draw.multiline_text((8, b * block + top + r * (tile_height + gap) + tile_height // 2), name, 'black', font, anchor='lm')
        x = margin + num_context * (tile + gap) + 3
        draw.line((x, b * block + 4, x, (b + 1) * block - 12), 'firebrick', 2)
    canvas.save(path)


# -----------------------------------------------------------------------------
# path.gif

FILM_CONTEXT, FILM_FRAMES = 4, 36


@torch.no_grad()
def field_along(psfm, context, frames, extrinsics, intrinsics):
    """The field from cameras that the encoder knows nothing of, and what the backbone would see there.

    context (Vc, 3, H, W) and frames (F, 3, H, W), F even, in [0, 1]; the frames' extrinsics (F, 3, 4) in the frame of the
    first context view, SCENE_UNITs, intrinsics (3, 3). -> true and predicted features (F, N, 2C), grid. The true ones come
    from passes in which two frames are the targets beside the context; the prediction never meets a frame.
    """
    pairs = frames.unflatten(0, (-1, 2))                                                  # (F/2, 2, 3, H, W)
    images = torch.cat([context.expand(len(pairs), -1, -1, -1, -1), pairs], 1)
    mask = (torch.arange(images.shape[1], device=images.device) >= len(context)).expand(len(pairs), -1)
    allowed, views, _ = psfm.observe(images, mask, len(context))
    z = psfm.encode(allowed[:1], views.grid)                                              # (1, Q, D)
    predicted = psfm.decode(z, extrinsics[None], intrinsics.expand(1, len(frames), 3, 3), frames.shape[-2:], views.grid)[0]
    return views.features[:, len(context):].flatten(0, 1), predicted, views.grid


@torch.no_grad()
def draw_film(psfm, config, device, autocast, file, num_rooms=2, tile=112):
    """A film of the field: held-out rooms from a path of cameras at which no picture was taken, beside the ray-traced truth."""
    pool = RoomPool('val', 0, num_rooms, image_size=(config.image_width,) * 2, device=device)
    rooms, block = pool.render_block(0)
    walk, size = block['extrinsics'], pool.size
    chosen = torch.arange(FILM_CONTEXT) * pool.VIEWS // FILM_CONTEXT                      # spread over the walk
    path = make_path(rooms.to('cpu'), FILM_FRAMES).to(device)                             # (R, F, 3, 4)
    seen = render(rooms, path, make_intrinsics(size, len(path), FILM_FRAMES).to(device), size)
    strips = []                                               # of each room: the context, and columns of (F, h, w, 3)
    for room in range(num_rooms):
        context, frames = [images.float() / 255 for images in (block['images'][room, chosen], seen['image'][room])]
        extrinsics = scene_extrinsics(torch.cat([walk[room, :1], path[room]])[None])[0, 1:]
        with autocast:
            features, predicted, grid = field_along(psfm, context, frames, extrinsics, block['intrinsics'][room, 0])
        colours, basis = to_colours(features)
        ours, _ = to_colours(predicted, basis)
        depth, read = seen['depth'][room] / SCENE_UNIT, psfm.backbone.read_out(predicted[None].float(), grid)[0][0]
        far = depth.max()
        strips.append((context, [frames.permute(0, 2, 3, 1), colours.unflatten(1, grid), ours.unflatten(1, grid),
                                 to_grey(1 - depth / far), to_grey(1 - read / far)]))

    titles = ['four context pictures', 'a new camera', 'backbone features', 'predicted from z', 'true depth', 'read off prediction']
    gap, top, half, font = 4, 22, tile // 2 - 1, ImageFont.load_default(11)
    film = []
    for f in range(FILM_FRAMES):
        canvas = Image.new('RGB', (len(titles) * (tile + gap), top + num_rooms * (tile + gap)), 'white')
        draw = ImageDraw.Draw(canvas)
        for column, title in enumerate(titles):
            draw.text((column * (tile + gap) + tile // 2, top // 2), title, 'firebrick' if column in (3, 5) else 'black', font, anchor='mm')
        for room, (context, columns) in enumerate(strips):
            y = top + room * (tile + gap)
            for i, picture in enumerate(context):
                canvas.paste(to_tile(picture.permute(1, 2, 0), (half, half)), (i % 2 * (half + 2), y + i // 2 * (half + 2)))
            for column, pictures in enumerate(columns, 1):
                canvas.paste(to_tile(pictures[f], (tile, tile)), (column * (tile + gap), y))
        film.append(canvas.quantize(256))
    film[0].save(file, save_all=True, append_images=film[1:], duration=120, loop=0)


def to_grey(x):
    """(V, h, w), cut to [0, 1] -> (V, h, w, 3)."""
    return x.clamp(0, 1)[..., None].expand(-1, -1, -1, 3)


# -----------------------------------------------------------------------------
# what does z know?

PROBED = {'pooled': 'backbone features, one mean a room', 'untrained': 'latents of an untrained encoder',
          'latents': 'latents z of the trained encoder', 'tokens': 'backbone features, means of 2 x 2'}
FACTS = {'sides': 'side lengths', 'objects': 'objects', 'count': 'counts', 'presence': 'presence', 'place': 'places', 'distance': 'distances'}


@torch.no_grad()
def rooms_to_probe(psfm, untrained, config, split, seed, num_rooms, num_views, device, autocast):
    """What there is to probe. -> tokens {name of PROBED: (rooms, tokens, channels)}, facts {name of FACTS: (rooms, n)}, on the CPU."""
    pool = RoomPool(split, seed, num_rooms, image_size=(config.image_width,) * 2, device=device)
    tokens, facts = {name: [] for name in PROBED}, {name: [] for name in FACTS}
    for index in tqdm(range(pool.num_blocks), f'looking at {split} rooms', leave=False):
        rooms, block = pool.render_block(index)
        with autocast:
            views = psfm.backbone(block['images'][:, :num_views].float() / 255)
            z, z0 = [model.encode(views.features, views.grid).float() for model in (psfm, untrained)]
        features = views.features.float()                                                 # (R, V, N, 2C)
        maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, views.grid)            # (R V, 2C, h, w)
        every = F.adaptive_avg_pool2d(maps, [n // 2 for n in views.grid]).flatten(2).transpose(1, 2)  # four patches, one token
        for name, x in dict(pooled=features.mean((1, 2))[:, None], untrained=z0, latents=z,
                            tokens=every.unflatten(0, (len(z), -1)).flatten(1, 2)).items():
            tokens[name].append(x.cpu())
        known = room_facts(rooms, block['surface'][:, :num_views], block['extrinsics'][:, :num_views])
        for name in FACTS:
            facts[name].append(known[name].cpu())
    return {name: torch.cat(x) for name, x in tokens.items()}, {name: torch.cat(x) for name, x in facts.items()}


def ridge_probe(x, y, x_test):
    """Ridge regression: x (n, d), y (n, facts) with NaN where a fact is not defined, x_test (m, d) -> (m, facts)."""
    x, x_test, y = x.double(), x_test.double(), y.double()
    mean, scale = x.mean(0), (x.std(0) + 1e-6) * x.shape[1] ** 0.5
    x, x_test = (x - mean) / scale, (x_test - mean) / scale
    kernel, cross, answers = x @ x.T, x_test @ x.T, torch.empty(len(x_test), y.shape[1], dtype=torch.float64)
    same = {}                                                 # facts that are defined in the same rooms are solved together
    for fact in range(y.shape[1]):
        same.setdefault(y[:, fact].isnan().numpy().tobytes(), []).append(fact)
    for facts in same.values():
        known = ~y[:, facts[0]].isnan()
        answers[:, facts] = kernel_ridge(kernel[known][:, known], cross[:, known], y[known][:, facts])
    return answers.float()


def kernel_ridge(kernel, cross, y):
    """Ridge regression with a free intercept, from products of inputs: (n, n), (m, n) and y (n, facts) -> (m, facts).

    The penalty of each fact is the one with the least leave-one-out error, which needs no second fit: with
    G = (kernel + penalty)^-1, the error at room i without room i is weights_i / (G_ii - 1 / (n penalty)), the last term
    being the intercept's.
    """
    n, mean = len(y), y.mean(0)
    cross = cross - kernel.mean(0)                            # centred on the n rooms, as the inputs themselves would be
    cross = cross - cross.mean(1, keepdim=True)
    kernel = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    values, vectors = torch.linalg.eigh(kernel)
    rotated = vectors.T @ (y - mean)
    least, best = y.new_full((y.shape[1],), math.inf), torch.zeros_like(y)
    for penalty in 10.0 ** torch.arange(-4, 3.1, 0.5):
        inverse = 1 / (values.clamp(min=0) + penalty)
        weights = vectors @ (inverse[:, None] * rotated)
        left_out = weights / (vectors.square() @ inverse - 1 / (n * penalty))[:, None]
        error = left_out.square().mean(0)
        least, best = torch.where(error < least, error, least), torch.where(error < least, weights, best)
    return cross @ best + mean


class AttentiveProbe(nn.Module):
    """Tokens (B, n, C) -> facts (B, num_facts): a learned query for each fact attends to the tokens, a small MLP reads the answer off."""

    def __init__(self, dim, num_facts, width=128, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.randn(num_facts, width))
        self.keys_values = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(0.1), nn.Linear(dim, 2 * width))
        self.mlp = nn.Sequential(nn.LayerNorm(width), MLP(width, 2 * width, width))
        self.weight, self.bias = nn.Parameter(torch.zeros(num_facts, width)), nn.Parameter(torch.zeros(num_facts))

    def forward(self, tokens):
        k, v = self.keys_values(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)      # (B, nh, n, d)
        q = self.queries.unflatten(-1, (self.num_heads, -1)).transpose(0, 1).expand(len(k), -1, -1, -1)    # (B, nh, facts, d)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)                             # (B, facts, width)
        x = x + self.mlp(x)
        return (x * self.weight).sum(-1) + self.bias


def attentive_probe(x, y, x_test, epochs=30, batch=128, lr=2e-3):
    """As ridge_probe, of tokens x (n, tokens, C). A tenth of the rooms chooses the epoch."""
    torch.manual_seed(0)
    mean, std = x.mean((0, 1)), x.std((0, 1)) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    center, spread = y.nanmean(0), (y - y.nanmean(0)).square().nanmean(0).sqrt().clamp(min=1e-6)
    y = (y - center) / spread
    fit, choose = slice(len(x) // 10, None), slice(0, len(x) // 10)
    probe = AttentiveProbe(x.shape[2], y.shape[1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr, weight_decay=0.1)
    steps = -(-len(x[fit]) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)

    def error(tokens, facts):
        known = ~facts.isnan()
        return (probe(tokens) - facts.nan_to_num()).square()[known].mean()

    least, answers = math.inf, None
    for _ in range(epochs):
        probe.train()
        for rows in torch.randperm(len(x[fit])).split(batch):
            optimizer.zero_grad()
            error(x[fit][rows], y[fit][rows]).backward()
            optimizer.step()
            schedule.step()
        probe.eval()
        with torch.no_grad():
            held_back = error(x[choose], y[choose]).item()
            if held_back < least:
                least, answers = held_back, torch.cat([probe(rows) for rows in x_test.split(500)])
    return answers * spread + center


def fact_scores(answers, truth, fitted, resamples=1000):
    """Answers and truth {fact: (rooms, n)} -> {fact: (score, low, high)} with a 95 % bootstrap interval over rooms.

    R2 around the mean of the `fitted` rooms, every number of a fact weighing alike; of presence, the share that is right.
    Numbers that fewer than ten fitted rooms have (two rare pieces, each alone of its kind) are left out.
    """
    n = len(truth['sides'])
    draws = torch.randint(n, (resamples, n), generator=step_generator(0))
    scores = {}
    for name in FACTS:
        asked = truth[name].masked_fill((~fitted[name].isnan()).sum(0) < 10, math.nan)
        if name == 'presence':
            wrong, total = ((answers[name] > 0.5) != (asked > 0.5)).float().sum(1), torch.full((n,), float(asked.shape[1]))
        else:
            mean = fitted[name].nanmean(0)
            scale = (fitted[name] - mean).square().nanmean(0)
            wrong, total = [((x - asked).square() / scale).nansum(1) for x in (answers[name], mean)]
        resampled = 1 - wrong[draws].sum(1) / total[draws].sum(1)
        scores[name] = [(1 - wrong.sum() / total.sum()).item(), *resampled.quantile(torch.tensor([0.025, 0.975])).tolist()]
    return scores


def probe_latents(psfm, config, num_rooms, num_held_out, num_views, device, autocast):
    """-> {'mean': scores, 'pooled ridge': scores, 'pooled attentive': ..., ...}, see PROBED and `fact_scores`."""
    torch.manual_seed(0)
    untrained = build_psfm(config).to(device).eval()
    untrained.load_state_dict({name: x for name, x in psfm.state_dict().items() if name.startswith('geo_')}, strict=False)
    gather = functools.partial(rooms_to_probe, psfm, untrained, config, num_views=num_views, device=device, autocast=autocast)
    fit_tokens, fit_facts = gather(split='train', seed=1_000_000, num_rooms=num_rooms)    # a seed that no encoder is trained with
    test_tokens, test_facts = gather(split='val', seed=0, num_rooms=num_held_out)
    y, widths = torch.cat([fit_facts[name] for name in FACTS], 1), [fit_facts[name].shape[1] for name in FACTS]
    score = lambda answers: fact_scores(dict(zip(FACTS, answers.split(widths, 1))), test_facts, fit_facts)
    scores = {'mean': score(y.nanmean(0).expand(len(test_facts['sides']), -1))}
    for name in tqdm(PROBED, 'fitting probes', leave=False):
        x, x_test = fit_tokens[name], test_tokens[name]
        scores[f'{name} ridge'] = score(ridge_probe(x.flatten(1), y, x_test.flatten(1)))
        scores[f'{name} attentive'] = score(attentive_probe(x, y, x_test))
    return scores


def probe_table(scores):
    rows = [' ' * 48 + ''.join(f'{title:>20s}' for title in FACTS.values())]
    for name, row in scores.items():
        what, _, kind = name.partition(' ')
        cells = [f'{round(value, 2) + 0.0:.2f}' + (f' {low:.2f}..{high:.2f}' if kind else ' ' * 11) for value, low, high in (row[fact] for fact in FACTS)]
        label = f'{PROBED[what]:36s} {kind}' if kind else 'mean of the fitted rooms'
        rows.append((f'{label:48s}' + ''.join(f'{cell:>20s}' for cell in cells)).rstrip())
    return '\n'.join(rows)


# -----------------------------------------------------------------------------
# several runs

def runs_table(folders):
    """A row for each configuration: what it changes from the first one, and means over its seeds with half the range.

    Whatever is not the folder of a finished run of PSFM is left out, by name.
    """
    groups, left_out, of_no_matter = {}, [], {'seed', 'out', 'device', 'workers', 'resume', 'log_every', 'eval_every'}
    for folder in folders:
        try:
            config, metrics = [json.load(open(os.path.join(folder, name))) for name in ('config.json', 'metrics.json')]
            read_out = metrics['read_out']['psfm'] if 'read_out' in metrics else dict(object_recall=math.nan, depth_abs_rel=math.nan)
            values = [metrics['psfm']['r2'], metrics['camera']['r2'], read_out['object_recall'], read_out['depth_abs_rel'], metrics['seconds'] / 60]
        except (OSError, ValueError, KeyError):
            left_out.append(folder)
            continue
        settings = {key: value for key, value in config.items() if key not in of_no_matter}
        groups.setdefault(json.dumps(settings), []).append(values)
    if not groups:
        raise InputError(f'no finished PSFM run among {" ".join(folders)}')
    first = json.loads(next(iter(groups)))
    rows = [f'{"":46s}{"seeds":>6s}' + ''.join(f'{title:>15s}' for title in ('R2', 'camera', 'objects', 'depth abs-rel', 'minutes'))]
    for settings, runs in groups.items():
        ours = json.loads(settings)
        changed = ' '.join(f'{name}={ours.get(name)}' for name in {**first, **ours} if first.get(name) != ours.get(name))
        row = f'{changed or "(the first)":46s}{len(runs):6d}'
        for values in zip(*runs):
            spread = f' ±{(max(values) - min(values)) / 2:.3f}' if len(runs) > 1 else ''
            row += f'{sum(values) / len(runs):.3f}{spread}'.rjust(15)
        rows.append(row)
    return '\n'.join(rows + [f'left out, not a finished PSFM run: {" ".join(left_out)}'] * bool(left_out))


# -----------------------------------------------------------------------------
# a Spa3-VLM and its answers

@torch.no_grad()
def generate(model, chat, latents, items, device, autocast, max_new_tokens=16):
    """Greedy answers to a batch of items (data.py), each ending with a question. `latents`: pictures of the scenes -> their latents, or None."""
    batch = chat.batch([chat.encode(item) for item in items], left=True, device=device)
    del batch['labels']
    with autocast:
        ids = model.generate(latents=latents([item['images'] for item in items]) if latents else None, do_sample=False, max_new_tokens=max_new_tokens, **batch)
    return [text.strip() for text in chat.tokenizer.batch_decode(ids[:, batch['input_ids'].shape[1]:], skip_special_tokens=True)]


def answer_rooms(model, chat, latents, held_out, train_data, device, autocast, shuffled=False, maps_only=False, batch=32):
    """Every question about the held-out rooms, on its own, and the map of each room.

    -> {task: percent, 'overall', 'map': percent of scoring.map_score, 'prior' and 'commonest': the same without looking (scoring.language_prior), 'scores':
    [[question_type, room, score], ...], 'maps': [(true, the model's), ...], 'solved': {'scores': of what follows from these maps by computation (scoring.solve;
    where one lacks a piece, of the prior's answer)}}. The maps are not of VSI-Bench and not in 'overall'.
    `shuffled`: each room's questions are answered with the pictures of the room and the latents of another one.
    `maps_only`: nothing but the maps is asked for, which takes a tenth of the time.
    """
    was_training = model.training
    model.eval()
    truths = held_out.maps                                    # (prompt, answer)

    def ask(questions, max_new_tokens):
        """[(room, prompt)] -> answers"""
        answers = []
        for start in tqdm(range(0, len(questions), batch), 'asking', leave=False):
            items, scenes = [], []
            for room, question in questions[start:start + batch]:
                items.append(dict(images=held_out.pictures(room), conversations=to_turns('<image>' * held_out.VIEWS, [(question, '')])[:1]))
                scenes.append(held_out.pictures((room + 1) % len(held_out)) if shuffled else items[-1]['images'])
            answers += generate(model, chat, (lambda _: latents(scenes)) if latents else None, items, device, autocast, max_new_tokens)
        return answers

    answers = [] if maps_only else ask([(record['room'], prompt('vsibench', record)) for record in held_out.records], 16)
    drawn = ask([(room, question) for room, (question, _) in enumerate(truths)], 160)
    model.train(was_training)
    scored = [(record, score('vsibench', record, answer)) for record, answer in zip(held_out.records, answers)]
    guess, usual = language_prior(train_data.records), map_prior([text for _, text in train_data.maps])
    prior, commonest = [aggregate('vsibench', [(record, score('vsibench', record, blind(record))) for record in held_out.records])
                        for blind in (guess, language_prior(train_data.records, commonest=True))]
    prior['map'] = 100 * float(np.mean([map_score(truth, usual(truth)) for _, truth in truths]))
    told = [record for record in held_out.records if record['question_type'] not in UNTOLD]
    solved = [(record, score('vsibench', record, solve(record, drawn[record['room']]) or guess(record))) for record in told]
    by_question = lambda scored: [[record['question_type'], record['room'], value] for record, value in scored]
    pairs = [(truth, answer) for (_, truth), answer in zip(truths, drawn)]
    values = [map_score(*pair) for pair in pairs]
    return dict(aggregate('vsibench', scored) if scored else {}, prior=prior, commonest=commonest, map=100 * float(np.mean(values)), maps=pairs,
                scores=by_question(scored) + [['map', room, value] for room, value in enumerate(values)], solved=dict(scores=by_question(solved)))


def draw_maps(maps, path, count=8, tile=250, metre=22):
    """Draws maps in words as seen from above, the first camera at the cross and looking up. maps: [(true, the model's)]; circles are true, squares the model's."""
    columns, font = 4, ImageFont.load_default(12)
    maps = maps[:count]
    canvas = Image.new('RGB', (columns * tile, -(-len(maps) // columns) * tile + 24), 'white')
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), 'circles: where things stand; squares: where the VLM says they stand, with map_score in percent; the cross is the first camera, looking up; a square of the grid is a metre', 'black', font)
    for i, (truth, answer) in enumerate(maps):
        left, top = i % columns * tile, i // columns * tile + 24
        panel = Image.new('RGB', (tile - 6, tile - 6), 'whitesmoke')                      # what lies outside is cut off
        pen, cx, cy = ImageDraw.Draw(panel), tile // 2, tile - 70
        for k in range(-20, 20):
            pen.line((cx + k * metre, 0, cx + k * metre, tile), 'gainsboro')
            pen.line((0, cy + k * metre, tile, cy + k * metre), 'gainsboro')
        pen.line((cx - 6, cy, cx + 6, cy), 'black', 2)
        pen.line((cx, cy - 12, cx, cy + 6), 'black', 2)
        for text, is_true in ((answer, False), (truth, True)):
            for name, x, y in PIECE.findall(text):
                if name in FURNITURE:
                    px, py, colour = cx + int(x) * metre, cy - int(y) * metre, tuple(round(255 * channel) for channel in FURNITURE[name][2])
                    if is_true:
                        pen.ellipse((px - 9, py - 9, px + 9, py + 9), None, colour, 3)
                        pen.text((px, py - 16), name, 'black', font, anchor='mm')
                    else:
                        pen.rectangle((px - 5, py - 5, px + 5, py + 5), colour)
        pen.text((6, 4), f'{100 * map_score(truth, answer):.0f}', 'black', font)
        canvas.paste(panel, (left, top))
    canvas.save(path)


def folder_beside(run):
    """Where what is found out about a run goes: into its folder; of a file of weights, into out/<its name>."""
    return run if os.path.isdir(run) else os.path.join('out', os.path.splitext(os.path.basename(run))[0])


def weights_stamp(run):
    """When each file of a checkpoint was written: tells one state of a run from another."""
    if os.path.isfile(run):
        return [(run, os.stat(run).st_mtime_ns)]
    return sorted((path, os.stat(os.path.join(folder, path)).st_mtime_ns) for folder, _, files in os.walk(run) for path in files if path.endswith('.safetensors'))


def load_answerer(run, device, max_pixels=None):
    """The folder of a run of finetune.py, or a mini VLM -> (SpatialVLM, Chat, SceneLatents or None, settings), ready to answer."""
    folder = next((path for path in (os.path.join(run, 'checkpoint'), os.path.join(run, 'checkpoint.old')) if os.path.isdir(path)), run)
    if run.endswith('.safetensors'):                          # a mini VLM that was not fine-tuned
        (vlm, chat), settings = load_vlm(run), dict(vlm=run, latents='none', num_frames=8)
        return SpatialVLM(vlm).to(device).eval(), chat, None, settings
    model, chat, settings = load_spatial_vlm(folder, max_pixels=max_pixels)
    latents = SceneLatents(settings['latents'], settings['encoder'], 'out/latents', device) if settings['latents'] != 'none' else None
    return model.to(device).eval(), chat, latents, settings


def ask(args, device, autocast):
    """Answers one question about the user's own pictures."""
    if bool(args.images) == bool(args.video):
        raise InputError('ask takes --images a.jpg b.jpg ... or --video walk.mp4')
    model, chat, latents, settings = load_answerer(args.run, device)
    pictures = [open_picture(path) for path in args.images] if args.images else read_video(args.video, args.frames or settings['num_frames'])
    conversations = [{'from': 'human', 'value': '<image>' * len(pictures) + args.question}]
    print(generate(model, chat, latents, [dict(images=pictures, conversations=conversations)], device, autocast, max_new_tokens=64)[0])


def ablate(args):
    """Fine-tunes every arm with every seed from the same initialisation, on the same data in the same order; finished runs are kept. Prints the table."""
    from finetune import make_data, parse_config, train
    from train import pick_dtype
    finished, data = {}, None
    for seed in args.seeds:
        for arm in args.arms:
            out = os.path.join(args.out, f'{arm}-{seed}')
            path = os.path.join(out, 'metrics.json')
            _, config = parse_config(['--config', args.config, '--latents', arm, '--seed', str(seed), '--out', out, *args.options])
            if config.data != 'rooms':
                raise InputError('ablate compares on rooms: leave --data out')
            if os.path.isfile(path):
                there = json.load(open(os.path.join(out, 'config.json')))
                differs = [f'{key} {there.get(key)} there, {value} here' for key, value in dataclasses.asdict(config).items()
                           if key not in ('out', 'device', 'workers', 'log_every', 'cache') and there.get(key) != value]
                if differs:
                    raise InputError(f'{out} was trained with another configuration ({"; ".join(differs[:3])}): take another --out, or delete it')
                changed = [source for source in (config.vlm, config.encoder) if os.path.isfile(source) and os.path.getmtime(source) > os.path.getmtime(path)]
                if changed:
                    raise InputError(f'{out} is older than {changed[0]}: take another --out, or delete it')
            else:
                data = data or make_data(config, lambda blocks: tqdm(blocks, 'rendering rooms', leave=False))
                train(f'{arm}, seed {seed}', config, *data)
            if arm == 'psfm' and 'shuffled' not in json.load(open(path)):
                data = data or make_data(config)
                device = pick_device(config.device)
                dtype, _ = pick_dtype(config.dtype, device)
                model, chat, latents, _ = load_answerer(out, device)
                autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
                other = answer_rooms(model, chat, latents, data[1], data[0], device, autocast, shuffled=True)
                metrics = dict(json.load(open(path)), shuffled=other)
                with open(path, 'w') as file:
                    json.dump(metrics, file, indent=1)
    for arm in args.arms:
        for seed in args.seeds:
            metrics = json.load(open(os.path.join(args.out, f'{arm}-{seed}', 'metrics.json')))
            finished.setdefault(arm, []).append(metrics)
            if 'shuffled' in metrics:
                finished.setdefault('psfm, shuffled', []).append(metrics['shuffled'])
    print(rooms_table(finished))
    minutes = [run['seconds'] / 60 for runs in finished.values() for run in runs if 'seconds' in run]
    print(f'{len(minutes)} runs of {min(minutes):.1f} to {max(minutes):.1f} minutes in {args.out}/')


# -----------------------------------------------------------------------------
# the four benchmarks

NEW_TOKENS = dict(vsibench=16, cvbench=1024, sparbench=100, viewspatial=128)      # as the official evaluators allow


def read_answers(path):
    """A JSONL file of answers -> {key: output}. A last line that was cut off is passed over."""
    answers = {}
    for number, record, fault in read_records(path):
        if isinstance(record, dict) and 'output' in record and ('key' in record or 'id' in record):
            answers[str(record.get('key', record.get('id')))] = str(record['output'])
        elif not fault:
            raise InputError(f'{path}, record {number}: an answer has "key" (or "id") and "output"')
    return answers


def benchmark(args, device, autocast):
    """Asks every question, appends the answers to a file as they come (what is there already is not asked again), prints the results."""
    if not os.path.isdir(args.data):
        args.data = download_benchmark(args.data)
    docs = read_benchmark(args.command, args.data)
    task = lambda doc: doc.get('question_type', doc.get('task'))
    if args.tasks:
        known = sorted({task(doc) for doc in docs})
        unknown = [name for name in args.tasks if name not in known]
        if unknown:
            raise InputError(f'--tasks {" ".join(unknown)}: {args.command} has {", ".join(known)}')
        docs = [doc for doc in docs if task(doc) in args.tasks]
    if args.limit:                                            # a sample, always the same; a larger one holds the smaller
        docs = [docs[i] for i in sorted(torch.randperm(len(docs), generator=step_generator(11))[:args.limit].tolist())]
    if args.predictions:
        answers = read_answers(args.predictions)
    else:
        docs, answers = ask_benchmark(docs, args, device, autocast)
    answered = [doc for doc in docs if doc['key'] in answers]
    if not answered:
        raise InputError('none of the questions has an answer')
    if len(answered) < len(docs):
        print(f'{len(docs) - len(answered)} of {len(docs)} questions have no answer and are not counted')
    scored, mended = [[(doc, score(args.command, doc, answers[doc['key']], corrected)) for doc in answered] for corrected in (False, True)]
    print(results_table(args.command, scored, mended))


def ask_benchmark(docs, args, device, autocast):
    """-> (the questions whose pictures are there, {key: output})"""
    lost = [doc for doc in docs if any(isinstance(path, str) and not os.path.exists(path) for path in ([doc['media']] if isinstance(doc['media'], str) else doc['media']))]
    if lost:
        path = lost[0]['media'] if isinstance(lost[0]['media'], str) else next(path for path in lost[0]['media'] if isinstance(path, str) and not os.path.exists(path))
        packed = f" (in {args.data} lie .zip files: unpack them there, unzip '*.zip')" if glob.glob(os.path.join(args.data, '*.zip')) else ''
        if len(lost) == len(docs):
            raise InputError(f'none of the {len(docs)} questions has its pictures; the first one looks for {path}{packed}')
        print(f'{len(lost)} of {len(docs)} questions are left out, for their pictures are missing; the first: {path}{packed}')
        gone = {doc['key'] for doc in lost}
        docs = [doc for doc in docs if doc['key'] not in gone]
    model, chat, latents, settings = load_answerer(args.run, device, args.max_pixels)
    # answers of other weights, or to other pictures, are in another file
    stamp = zlib.crc32(repr([settings, args.frames, args.max_pixels, weights_stamp(args.run)]).encode())
    path = os.path.join(args.out or folder_beside(args.run), f'{args.command}-{stamp:08x}.jsonl')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    answers = read_answers(path) if os.path.isfile(path) else {}
    due = [doc for doc in docs if doc['key'] not in answers]
    print(f'{len(due)} questions to ask, {len(docs) - len(due)} answered before, in {path}')
    with open(path, 'a') as file:
        for start in tqdm(range(0, len(due), args.batch), args.command):
            items, group = [], []
            for doc in due[start:start + args.batch]:
                try:
                    images = open_media(doc['media'], args.frames)
                except InputError as error:
                    tqdm.write(f'question {doc["key"]} is left out: {error}')
                    continue
                group.append(doc)
                items.append(dict(images=images, conversations=[{'from': 'human', 'value': '<image>' * len(images) + prompt(args.command, doc)}]))
            if items:
                for doc, output in zip(group, generate(model, chat, latents, items, device, autocast, NEW_TOKENS[args.command])):
                    answers[doc['key']] = output
                    file.write(json.dumps(dict(key=doc['key'], output=output)) + '\n')
                file.flush()
    return docs, answers


# -----------------------------------------------------------------------------
# the mini backbone

@torch.no_grad()
def evaluate_backbone(vggt, pool, num_scenes, autocast):
    """The mini VGGT on held-out rooms, 2, 4, 6 and 8 views in random order, beside the trivial answers.

    -> {'6 views': {rotation, direction: medians over all pairs, degrees; auc5, auc15, auc30; depth_abs_rel;
    class_accuracy, furniture_recall; trivial: no motion at all, one depth everywhere}, ...}
    """
    metrics = {}
    for V in (2, 4, 6, 8):
        at_once, seen = 96 // V, []
        for step in range(max(1, num_scenes // at_once)):
            batch = pool.batch(step, at_once, V)
            with autocast:
                views = vggt(batch['images'])
                depth, logits = vggt.read_out(views.features, views.grid)
            truth, true_depth = scene_extrinsics(batch['extrinsics']), batch['depth'] / SCENE_UNIT
            still = torch.eye(3, 4, device=truth.device).expand_as(truth)
            constant = true_depth.log().median().exp()
            right, furniture = logits.argmax(-1) == batch['classes'], batch['classes'] >= 3
            seen.append([*pose_errors(views.extrinsics, truth), pose_errors(still, truth)[0],
                         ((depth - true_depth).abs() / true_depth).mean(), ((constant - true_depth).abs() / true_depth).mean(),
                         right.float().mean(), right[furniture].float().mean()])
        columns = list(zip(*seen))
        rotation, direction, rotation0 = [torch.cat(column) for column in columns[:3]]
        depth, depth0, accuracy, recall = [torch.stack(column).mean().item() for column in columns[3:]]
        metrics[f'{V} views'] = dict(
            rotation=rotation.median().item(), direction=direction.median().item(),
            **{f'auc{limit}': area_under_curve(rotation, direction, limit) for limit in (5, 15, 30)},
            depth_abs_rel=depth, class_accuracy=accuracy, furniture_recall=recall,
            trivial=dict(rotation=rotation0.median().item(), direction=90.0, depth_abs_rel=depth0))
    return metrics


def backbone_line(metrics):
    m = metrics['6 views']
    return (f"6 views: rotation {m['rotation']:.1f} deg, direction {m['direction']:.1f} deg, AUC@30 {m['auc30']:.3f}, depth abs-rel "
            f"{m['depth_abs_rel']:.3f}, furniture {m['furniture_recall']:.3f} | trivial: {m['trivial']['rotation']:.1f}, 90, 0, {m['trivial']['depth_abs_rel']:.3f}, 0")


def backbone_table(metrics):
    rows = [f'{"held-out rooms":10s}{"rotation":>10s}{"(none)":>8s}{"direction":>11s}{"(none)":>8s}{"AUC@5":>8s}{"@15":>7s}{"@30":>7s}'
            f'{"abs-rel":>9s}{"(const.)":>9s}{"classes":>9s}{"furniture":>11s}']
    for name, m in metrics.items():
        t = m['trivial']
        rows.append(f'{name:14s}{m["rotation"]:6.1f}{t["rotation"]:8.1f}{m["direction"]:11.1f}{t["direction"]:8.1f}{m["auc5"]:8.3f}{m["auc15"]:7.3f}'
                    f'{m["auc30"]:7.3f}{m["depth_abs_rel"]:9.3f}{t["depth_abs_rel"]:9.3f}{m["class_accuracy"]:9.3f}{m["furniture_recall"]:11.3f}')
    return '\n'.join(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    field = commands.add_parser('field', help='measures and draws a trained field')
    field.add_argument('--path', action='store_true', help='also films it, along a path of cameras at which no picture was taken')
    probe = commands.add_parser('probe', help='reads facts of held-out rooms off the latents')
    probe.add_argument('--rooms', type=int, default=2500, help='rooms to fit the probes on (default: 2500)')
    probe.add_argument('--held-out', type=int, default=480, help='held-out rooms to ask about (default: 480)')
    probe.add_argument('--views', type=int, default=6, help='views of a room (default: 6)')
    for command, default in ((field, 'out/small'), (probe, SHIPPED)):
        command.add_argument('--run', default=default, help=f'folder of a run, or file of weights (default: {default})')
    runs = commands.add_parser('runs', help='several runs side by side; those that differ in the seed alone share a row')
    runs.add_argument('folders', nargs='+')
    backbone = commands.add_parser('backbone', help='cameras, depth and classes of the mini VGGT on held-out rooms')
    backbone.add_argument('--weights', default='weights/mini_vggt.safetensors')
    backbone.add_argument('--rooms', type=int, default=200, help='held-out rooms (default: 200)')
    rooms = commands.add_parser('rooms', help='a fine-tuned VLM on the held-out rooms')
    rooms.add_argument('--latents', default='', choices=['', 'shuffled'], help="shuffled: with another room's latents")
    rooms.add_argument('--maps', action='store_true', help='ask for the maps alone')
    rooms.add_argument('--rooms', type=int, default=96, help='held-out rooms (default: 96)')
    question = commands.add_parser('ask', help='a question about your own pictures')
    question.add_argument('--images', nargs='+', default=[])
    question.add_argument('--video', default='', help='a file (needs PyAV) or a folder of frames')
    question.add_argument('--frames', type=int, default=0, help='frames of the video (default: as in training)')
    question.add_argument('--question', required=True)
    benchmarks = [commands.add_parser(name, help=f'{title}: from a folder with the files of the hub, or from the hub') for name, title in
                  zip(BENCHMARKS, ('VSI-Bench', 'CV-Bench', 'SPAR-Bench', 'ViewSpatial-Bench'))]
    for command in benchmarks:
        command.add_argument('--data', required=True, help='the folder, or an id on the hub')
        command.add_argument('--tasks', nargs='+', default=[], help='only these')
        command.add_argument('--limit', type=int, default=0, help='only a sample of so many questions, always the same')
        command.add_argument('--frames', type=int, default=32, help='frames of a video (default: 32)')
        command.add_argument('--batch', type=int, default=1, help='questions at once (default: 1)')
        command.add_argument('--max-pixels', type=int, default=0, help='pixels of a picture, at most (default: as in training)')
        command.add_argument('--predictions', default='', help="score these answers (JSONL with key and output) without any model")
        command.add_argument('--out', default='', help='folder for the answers (default: the run)')
    rooms.add_argument('--run', nargs='+', default=['out/vlm-small'], help='folders of runs of finetune.py; those with the same latents count as seeds (default: out/vlm-small)')
    for command in (question, *benchmarks):
        command.add_argument('--run', default='out/vlm-small', help='folder of a run of finetune.py (default: out/vlm-small)')
    arms = commands.add_parser('ablate', help='do the latents help? every kind of them, fine-tuned from the same start')
    arms.add_argument('--config', default='small')
    arms.add_argument('--arms', nargs='+', default=LATENTS, choices=LATENTS)
    arms.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    arms.add_argument('--out', default='out/ablate-vlm')
    for command in (field, probe, backbone, rooms, question, *benchmarks):
        command.add_argument('--device', default='auto')
    args, options = parser.parse_known_args(argv)
    if args.command == 'ablate':
        args.options = options                                # the rest is finetune.py's
        return ablate(args)
    if options:
        parser.error(f'unrecognized arguments: {" ".join(options)}')
    if args.command == 'runs':
        print(runs_table(args.folders))
        return
    device = pick_device(args.device)
    autocast = torch.autocast(device.type, enabled=False)

    if args.command == 'ask':
        return ask(args, device, autocast)
    if args.command in BENCHMARKS:
        return benchmark(args, device, autocast)
    if args.command == 'rooms':
        loaded = [load_answerer(run, device) for run in args.run]                         # all of them before anything is asked: a wrong folder costs nothing
        for run, (_, _, latents, _) in zip(args.run, loaded):
            if args.latents and latents is None:
                raise InputError(f'{run} was trained without latents: there is nothing to shuffle')
        path = os.path.join(args.run[0], 'config.json')
        trained = json.load(open(path))['num_rooms'] if os.path.isfile(path) else 1000                           # what the prior may know
        questions = [RoomQuestions(split, 0, number, progress=lambda blocks: tqdm(blocks, 'rendering rooms', leave=False))
                     for split, number in (('val', args.rooms), ('train', trained))]
        arms = {}
        for model, chat, latents, settings in loaded:
            metrics = answer_rooms(model, chat, latents, *questions, device, autocast, bool(args.latents), args.maps)
            arms.setdefault(f'{settings["latents"]} {args.latents}'.strip(), []).append(metrics)
        print(rooms_table(arms))
        return

    if args.command == 'backbone':
        vggt = VGGT.from_pretrained(args.weights).freeze().to(device)
        if 'cells' not in vggt.config.heads:
            raise InputError(f'{args.weights} is not a mini VGGT: it has no heads for depth and classes of rooms')
        print(backbone_table(evaluate_backbone(vggt, RoomPool('val', 0, args.rooms, device=device), args.rooms, autocast)))
        return

    if args.command == 'probe':
        if not 1 <= args.views <= RoomPool.VIEWS:
            raise InputError(f'--views {args.views}: a room has {RoomPool.VIEWS} views')
        if args.rooms < 200 or args.held_out < 100 or args.rooms % RoomPool.BLOCK or args.held_out % RoomPool.BLOCK:
            raise InputError(f'--rooms {args.rooms} --held-out {args.held_out}: at least 200 and 100, for some facts are rare, and multiples of '
                             f'{RoomPool.BLOCK}, for rooms are made so many at a time')
    psfm, config = load_psfm(args.run, device)
    if config.data != 'rooms' and (args.command == 'probe' or args.path):
        raise InputError(f'{args.run} was trained on {config.data}: what is true there is not known, and this takes a run on rooms')
    out = folder_beside(args.run)

    if args.command == 'probe':
        if config.num_latents == 0:
            raise InputError(f'{args.run} has no latents (--num-latents 0): there is nothing to probe')
        scores = probe_latents(psfm, config, args.rooms, args.held_out, args.views, device, autocast)
        print(f'{args.held_out} held-out rooms, {args.views} views each; probes fitted on {args.rooms} other rooms. R2 (presence: accuracy), 95 % intervals\n{probe_table(scores)}')
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, 'probe.json'), 'w') as file:
            json.dump(scores, file, indent=1)
        print(f'wrote {out}/probe.json')
        return

    if args.path and 'cells' not in psfm.backbone.config.heads:
        raise InputError(f'--path: the backbone of {args.run}, {config.backbone}, has no head that reads depth off predicted features; it takes a run on the mini VGGT')
    multiple = psfm.backbone.config.patch_size
    train_source, held_out = [make_source(config, split, multiple, device) for split in ('train', 'val')]
    metrics = evaluate_field(psfm, train_source, held_out, config.steps * config.accumulate, config, device, autocast)
    print(field_table(metrics, held_out.held_out))
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, 'metrics.json')
    known = json.load(open(path)) if os.path.isfile(path) else {}
    with open(path, 'w') as file:
        json.dump({**known, **metrics}, file, indent=1)
    draw_field(psfm, held_out, config, device, autocast, os.path.join(out, 'field.png'))
    print(f'wrote {out}/metrics.json and {out}/field.png')
    if args.path:
        draw_film(psfm, config, device, autocast, os.path.join(out, 'path.gif'))
        print(f'wrote {out}/path.gif')


if __name__ == '__main__':
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f'error: {error}')
