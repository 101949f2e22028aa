"""
What has been learned? Measures and pictures of a trained field, and of the backbone under it.

    python eval.py field --run out/small            # metrics.json and field.png of a run, anew
    python eval.py backbone                         # how good the mini VGGT is at cameras and depth

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
import json
import os
import sys

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import RoomPool, make_source, step_generator
from model import InputError, pick_device, take_views
from psfm import context_index, load_psfm, random_view_mask
from vggt import SCENE_UNIT, VGGT, area_under_curve, pose_errors, scene_extrinsics


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
def draw_field(psfm, source, config, device, autocast, path, num_scenes=2, tile=112):
    """Draws for a few scenes: pictures, the features that the backbone sees, those that we predict, and their error.

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
        rows += ['true depth', 'depth read off\nthe prediction']
        read, _ = psfm.backbone.read_out(predicted, grid)
        depth = take_views(batch['depth'], order) / SCENE_UNIT
    block = len(rows) * (tile_height + gap) + top + 8
    canvas = Image.new('RGB', (margin + V * (tile + gap) + 12, B * block), 'white')
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for b in range(B):
        seen, basis = to_colours(features[b])
        ours, _ = to_colours(predicted[b], basis)
        grey = lambda x, size: x.clamp(0, 1)[..., None].expand(-1, -1, 3).reshape(V, *size, 3)
        strips = [images[b].permute(0, 2, 3, 1), seen.unflatten(1, (h, w)), ours.unflatten(1, (h, w)), grey(error[b], (h, w))]
        if on_rooms:
            far = depth[b].max()
            strips += [grey((1 - x / far).flatten(1), x.shape[1:]) for x in (depth[b], read[b].clamp(max=far))]
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
    field.add_argument('--run', default='out/small', help='folder of the run (default: out/small)')
    backbone = commands.add_parser('backbone', help='cameras, depth and classes of the mini VGGT on held-out rooms')
    backbone.add_argument('--weights', default='weights/mini_vggt.safetensors')
    backbone.add_argument('--rooms', type=int, default=200, help='held-out rooms (default: 200)')
    for command in (field, backbone):
        command.add_argument('--device', default='auto')
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    autocast = torch.autocast(device.type, enabled=False)

    if args.command == 'backbone':
        vggt = VGGT.from_pretrained(args.weights).freeze().to(device)
        if 'cells' not in vggt.config.heads:
            raise InputError(f'{args.weights} is not a mini VGGT: it has no heads for depth and classes of rooms')
        print(backbone_table(evaluate_backbone(vggt, RoomPool('val', 0, args.rooms, device=device), args.rooms, autocast)))
        return

    psfm, config = load_psfm(args.run, device)
    multiple = psfm.backbone.config.patch_size
    train_source, held_out = [make_source(config, split, multiple, device) for split in ('train', 'val')]
    metrics = evaluate_field(psfm, train_source, held_out, config.steps * config.accumulate, config, device, autocast)
    print(field_table(metrics, held_out.held_out))
    path = os.path.join(args.run, 'metrics.json')
    known = json.load(open(path)) if os.path.isfile(path) else {}
    with open(path, 'w') as file:
        json.dump({**known, **metrics}, file, indent=1)
    draw_field(psfm, held_out, config, device, autocast, os.path.join(args.run, 'field.png'))
    print(f'wrote {args.run}/metrics.json and {args.run}/field.png')


if __name__ == '__main__':
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f'error: {error}')
