"""
Makes weights/mini_vggt.safetensors: the VGGT class with small numbers,
trained on procedural rooms, where cameras, depth and categories are known.

    python mini_vggt.py              # --help for the options; --resume goes on

Cameras alone teach too little. Beside them: `match`, which makes patches of
different views that see the same 3-D point look alike; dense targets; how
each camera stands in the room; and a curriculum from two close views to six of
any motion. The category loss stands in for what the real VGGT inherits from
DINOv2. Shapes as in model.py; a cell is 4 x 4 pixels, 2 x 2 per patch.
"""
import dataclasses
import itertools
import json
import os
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from common import (autocast_on, check_finite, command_of, load_strictly, open_run, opt,
                    parse_options, pick_device, pick_dtype, read_state, read_weights, run_script,
                    write_checkpoint)
from data import RoomPool, rendering
from model import (MLP, full_precision, invert_pose, points_in_world, pose_encoding_to_cameras,
                   relative_pose)
from optim import load_optimizers, make_optimizers, rate_share, set_rates, take_step
from rooms import CLASSES, SCENE_UNIT, STRUCTURE, scene_extrinsics
from vggt import VGGT, CellHead, VGGTConfig

# patch 8, 64 x 64 pixels, 3.7 M parameters. No layer scale: it has to learn in two hours.
MINI = VGGTConfig(patch_size=8, width=128, depth=4, num_heads=4, num_registers=2,
                  patch_embed='conv', position_grid=8, layer_scale=0.0, camera_depth=2,
                  camera_heads=4, camera_iterations=2, heads=('camera', 'cells'),
                  classes=tuple(CLASSES))
WEIGHTS = dict(translation=1.7, rotation=3.0, field_of_view=1.0, depth=1.0, points=2.0,
               classes=0.3, stance=0.5, match=0.1)


@dataclass(frozen=True)
class LoopConfig:
    """The options of the training loop that both minis share (`fit`)."""
    steps: int = opt(16_000, 'optimiser steps', low=1, group='training')
    lr: float = opt(1e-3, 'peak learning rate of AdamW', low=0)
    muon_lr: float = opt(2e-3, "peak rate of Muon for the blocks' matrices", low=0)
    min_lr: float = opt(0.02, 'where the cosine ends, as a share of the peak', low=0, high=1)
    warmup: int = opt(100, 'steps of linear warm-up (a tenth of all at most)', low=0)
    decay_from: float = opt(0.55, 'share of the training before the cosine', low=0, high=1)
    weight_decay: float = opt(1e-2, 'not of biases and norms', low=0)
    beta2: float = opt(0.98, "AdamW's second moment", low=0, high=0.99999)
    clip: float = opt(2.0, 'largest gradient norm', low=1e-9)
    val_scenes: int = opt(100, 'held-out rooms to evaluate on', low=1)
    eval_every: int = opt(2000, 'steps between evaluations and checkpoints', low=1)
    log_every: int = opt(50, 'steps between log lines', low=1)
    out: str = opt('out/mini-vggt', 'folder for everything that is written')
    seed: int = opt(0, 'of weights and data', low=0, high=10 ** 12)
    device: str = opt('auto', 'auto | cpu | cuda | mps')
    dtype: str = opt('auto', 'auto | float32 | bfloat16 (autocast)',
                     choices=('auto', 'float32', 'bfloat16'))
    resume: bool = opt(False, 'continue from <out>/checkpoint')


@dataclass(frozen=True)
class Config(LoopConfig):
    num_rooms: int = opt(1600, 'rooms that are kept in memory', low=1, group='mini VGGT')
    new_rooms: float = opt(2.0, 'how many of them are replaced at each step', low=0)


# -----------------------------------------------------------------------------
# losses

class MiniVGGTTrainer(nn.Module):
    """The mini VGGT with the heads that only its training needs, and its losses."""

    def __init__(self, config=MINI):
        super().__init__()
        self.vggt = VGGT(config)
        dim = 2 * config.width
        self.point_cells = CellHead(dim, 3, config.cells)
        self.match_head = CellHead(dim, 32, 1)
        self.stance_head = nn.Sequential(nn.LayerNorm(dim), MLP(dim, config.width, 6))
        nn.init.normal_(self.vggt.aggregator.camera_token, std=0.3)
        nn.init.normal_(self.vggt.aggregator.register_token, std=0.3)
        # poses start at the identity: from a random start, the first view's
        # quaternion can settle half a turn away for good
        last = self.vggt.camera_head.pose_branch.fc2
        nn.init.normal_(last.weight, std=0.002)
        identity = torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 1.4, 1.4])
        with torch.no_grad():
            last.bias.copy_(identity / config.camera_iterations)

    def forward(self, images, depth, classes, extrinsics, intrinsics):
        """A batch of data.RoomPool -> losses, and 'loss', their sum with WEIGHTS."""
        vggt = self.vggt
        size = images.shape[-2:]
        truth = self.truth(depth, extrinsics, intrinsics, size)
        patches, grid = vggt.embed(images)
        tokens = vggt.attend(patches, grid)[-1]  # (B, V, P, 2C)
        features = vggt.patch_features(tokens)
        camera_tokens = tokens[:, :, 0]

        # all heads
        poses = vggt.camera_head(camera_tokens.float())
        log_depth = vggt.depth_cells(features, grid)[..., 0]  # (B, V, 2h, 2w)
        logits = vggt.class_cells(features, grid)
        points = self.point_cells(features, grid)  # (B, V, 2h, 2w, 3)
        descriptors = self.match_head(features, grid)  # (B, V, h, w, 32)
        descriptors = F.normalize(descriptors, dim=-1).flatten(2, 3)  # (B, V, N, 32)
        stance = self.stance_head(camera_tokens).float()  # (B, V, 6)

        losses = self.pose_losses(poses, truth, size)
        losses['depth'] = (log_depth - truth['depth'].log()).abs().mean()
        losses['points'] = F.smooth_l1_loss(points, truth['points'], beta=0.1)
        losses['classes'] = F.cross_entropy(logits.flatten(0, 3), classes.flatten())
        losses['stance'] = (stance - truth['stance']).abs().mean()
        losses['match'] = self.match_loss(descriptors, truth['patch_points'])
        losses['loss'] = sum(weight * losses[name] for name, weight in WEIGHTS.items())
        return losses

    def pose_losses(self, poses, truth, size):
        """Of every iteration of the camera head; the last one counts most."""
        losses = dict(translation=0.0, rotation=0.0, field_of_view=0.0)
        total = sum(0.6 ** i for i in range(len(poses)))
        for i, pose in enumerate(reversed(poses)):
            share = 0.6 ** i / total
            predicted, _ = pose_encoding_to_cameras(pose, size)
            error = (predicted - truth['extrinsics']).abs()  # (B, V, 3, 4)
            # of matrices, because q and -q are one rotation; the length of q is kept near 1
            of_matrix = error[..., :3].mean()
            of_length = (pose[..., 3:7].norm(dim=-1) - 1).square().mean()
            losses['rotation'] += share * (of_matrix + 0.1 * of_length)
            losses['translation'] += share * error[..., 3].mean()
            field = (pose[..., 7:] - truth['field_of_view']).abs().mean()
            losses['field_of_view'] += share * field
        return losses

    @full_precision
    def truth(self, depth, room_extrinsics, intrinsics, size):
        """Targets in the first camera's frame, in SCENE_UNITs."""
        extrinsics = scene_extrinsics(room_extrinsics)  # (B, V, 3, 4)
        depth = depth / SCENE_UNIT  # (B, V, 2h, 2w)
        cells = depth.shape[-2:]
        points = points_in_world(depth, extrinsics, intrinsics, size)
        points = points.unflatten(2, cells)  # (B, V, 2h, 2w, 3)
        k = self.vggt.config.cells
        patch_points = points.unflatten(3, (-1, k)).unflatten(2, (-1, k))  # (B, V, h, k, w, k, 3)
        patch_points = patch_points.mean((3, 5)).flatten(2, 3)  # (B, V, N, 3)
        focal = intrinsics[..., [1, 0], [1, 0]]  # vertical, horizontal
        field_of_view = 2 * torch.atan(focal.new_tensor(size) / 2 / focal)

        # of each camera by itself: which way is up, how it stands to the walls
        # (a room looks alike four ways), how high it is
        up = room_extrinsics[..., 2]
        yaw = torch.atan2(room_extrinsics[..., 2, 1], room_extrinsics[..., 2, 0])
        height = invert_pose(room_extrinsics)[..., 2, 3]
        stand = torch.stack([(4 * yaw).cos(), (4 * yaw).sin(), 4 * (height - 1.6)], -1)
        return dict(extrinsics=extrinsics, depth=depth, points=points, patch_points=patch_points,
                    field_of_view=field_of_view, stance=torch.cat([up, stand], -1))

    @staticmethod
    def match_loss(descriptors, points, radius=0.08, temperature=0.07):
        """InfoNCE between every view and every other.

        descriptors (B, V, N, 32), points (B, V, N, 3). A patch's positive is
        the patch of the other view that is nearest in space; those with none
        within `radius` (SCENE_UNITs) are left out.
        """
        pairs = list(itertools.permutations(range(points.shape[1]), 2))
        i, j = torch.tensor(pairs, device=points.device).T
        distance, match = torch.cdist(points[:, i], points[:, j]).min(-1)  # (B, pairs, N)
        logits = descriptors[:, i] @ descriptors[:, j].mT / temperature  # (B, pairs, N, N)
        loss = F.cross_entropy(logits.flatten(0, 2), match.flatten(), reduction='none')
        is_seen = (distance < radius).float()
        return (loss.view_as(distance) * is_seen).sum() / is_seen.sum().clamp(min=1)


def make_batch(pool, step, config):
    """From two views with little motion between them to six of any; fewer views, more scenes."""
    progress = step / config.steps
    if progress < 0.1:
        lessons = [(14, 2)]  # (scenes, views)
    elif progress < 0.2:
        lessons = [(14, 2), (10, 3), (8, 4)]
    else:
        lessons = [(10, 3), (8, 4), (7, 5), (6, 6)]
    B, V = lessons[step % len(lessons)]
    neighbours = min(1.0, max(0.0, 1.2 - 4 * progress))
    keep_closest = 1.0
    if V == 2 and progress < 0.15:
        keep_closest = 1 / (3 - 2 * progress / 0.15)
    return pool.batch(step, B, V, neighbours, keep_closest)


# -----------------------------------------------------------------------------
# how good it is

def pose_errors(extrinsics, truth):
    """Over all pairs of views: (B, V, 3, 4) twice -> errors of rotation and
    of the direction of translation, (B, pairs) degrees. As in VGGT, section
    4.1, but stricter: to move the opposite way is an error of 180 degrees, not
    of 0."""
    V = extrinsics.shape[1]
    i, j = torch.triu_indices(V, V, offset=1, device=extrinsics.device)
    ours = relative_pose(extrinsics[:, j], extrinsics[:, i])
    theirs = relative_pose(truth[:, j], truth[:, i])
    trace = (ours[..., :3] * theirs[..., :3]).sum((-1, -2))
    rotation = ((trace - 1) / 2).clamp(-1, 1).acos()
    cosine = F.cosine_similarity(ours[..., 3], theirs[..., 3], dim=-1)
    return rotation.rad2deg(), cosine.clamp(-1, 1).acos().rad2deg()


def area_under_curve(rotation, direction, limit):
    """AUC@limit: the share of pairs whose larger error, of rotation or direction, is below k
    degrees, averaged over k = 1 .. limit."""
    worst = torch.maximum(rotation, direction).flatten()
    return torch.stack([(worst < k).float().mean() for k in range(1, limit + 1)]).mean().item()


@torch.no_grad()
def evaluate_backbone(vggt, pool, num_scenes, autocast):
    """The mini VGGT on held-out rooms, 2, 4, 6 and 8 views, beside the trivial answers.

    -> {'6 views': {rotation, direction: medians over all pairs, degrees; auc5, auc15, auc30;
    depth_abs_rel; class_accuracy, object_recall; trivial: of no motion and one depth}, ..}
    """
    metrics = {}
    for V in (2, 4, 6, 8):
        at_once = 96 // V
        angles = []
        means = []
        for number in range(max(1, num_scenes // at_once)):
            batch = pool.batch(number, at_once, V)
            with autocast:
                views = vggt(batch['images'])
                depth, logits = vggt.read_out(views.features, views.grid)
            truth = scene_extrinsics(batch['extrinsics'])
            still = torch.eye(3, 4, device=truth.device).expand_as(truth)
            rotation, direction = pose_errors(views.extrinsics, truth)
            angles.append((rotation, direction, pose_errors(still, truth)[0]))

            true_depth = batch['depth'] / SCENE_UNIT
            constant = true_depth.log().median().exp()
            is_right = logits.argmax(-1) == batch['classes']
            is_furniture = batch['classes'] >= len(STRUCTURE)
            means.append(torch.stack([((depth - true_depth).abs() / true_depth).mean(),
                                      ((constant - true_depth).abs() / true_depth).mean(),
                                      is_right.float().mean(),
                                      is_right[is_furniture].float().mean()]))
        rotation, direction, still = [torch.cat(column) for column in zip(*angles)]
        depth, constant, accuracy, recall = torch.stack(means).mean(0).tolist()
        auc = {f'auc{limit}': area_under_curve(rotation, direction, limit)
               for limit in (5, 15, 30)}
        trivial = dict(rotation=still.median().item(), direction=90.0, depth_abs_rel=constant)
        metrics[f'{V} views'] = dict(
            rotation=rotation.median().item(), direction=direction.median().item(), **auc,
            depth_abs_rel=depth, class_accuracy=accuracy, object_recall=recall, trivial=trivial)
    return metrics


def backbone_line(metrics):
    m = metrics['6 views']
    return (f'6 views: rotation {m["rotation"]:.1f} deg, direction {m["direction"]:.1f} deg, '
            f'AUC@30 {m["auc30"]:.3f}, depth abs-rel {m["depth_abs_rel"]:.3f}, '
            f'objects {m["object_recall"]:.3f} | trivial: {m["trivial"]["rotation"]:.1f}, 90, '
            f'0, {m["trivial"]["depth_abs_rel"]:.3f}, 0')


def backbone_table(metrics):
    rows = [f'{"held-out rooms":14s}{"rotation":>10s}{"(none)":>8s}{"direction":>11s}{"(none)":>8s}'
            f'{"AUC@5":>8s}{"@15":>7s}{"@30":>7s}{"abs-rel":>9s}{"(const.)":>9s}{"classes":>9s}'
            f'{"objects":>11s}']
    for name, m in metrics.items():
        t = m['trivial']
        rows.append(f'{name:14s}{m["rotation"]:10.1f}{t["rotation"]:8.1f}{m["direction"]:11.1f}'
                    f'{t["direction"]:8.1f}{m["auc5"]:8.3f}{m["auc15"]:7.3f}{m["auc30"]:7.3f}'
                    f'{m["depth_abs_rel"]:9.3f}{t["depth_abs_rel"]:9.3f}{m["class_accuracy"]:9.3f}'
                    f'{m["object_recall"]:11.3f}')
    return '\n'.join(rows)


# -----------------------------------------------------------------------------
# training

def export(vggt, path, config, metrics, command):
    """The backbone without the heads that only trained it, fp16, with how it was made."""
    state = {name: x.detach().cpu().half().contiguous() for name, x in vggt.state_dict().items()}
    settings = dict(config=dataclasses.asdict(vggt.config), training=dataclasses.asdict(config),
                    metrics=metrics)
    metadata = {name: json.dumps(value) for name, value in settings.items()}
    save_file(state, path, dict(metadata, command=command))


def fit(name, config, state, optimizers, parameters, losses_of, evaluate, save):
    """The loop that both minis share. -> metrics of the last evaluation

    `state`: where it begins (read_state); `losses_of(step)` -> losses, with 'loss'; `evaluate()`
    -> metrics, a line about them; `save(steps done, metrics)` writes a checkpoint.
    """
    first = logged = state['step']
    began = time.time() - state['metrics'].get('seconds', 0)  # of the sessions before
    busy = 0.0
    metrics = {}
    log = open_run(config, first, is_main=True)
    for step in tqdm(range(first, config.steps), name, initial=first, total=config.steps,
                     leave=False, disable=None):
        # one step
        start = time.time()
        share = rate_share(step, config)
        set_rates(optimizers, share)
        losses = losses_of(step)
        losses['loss'].backward()
        norm = take_step(optimizers, parameters, config.clip)
        done = step + 1
        progress = f'step {done:05d}/{config.steps:05d}'
        is_evaluated = done == config.steps or done % config.eval_every == 0
        is_logged = step == 0 or done % config.log_every == 0 or is_evaluated
        if is_logged:
            values = check_finite(losses, norm, parameters, done, config)  # a GPU sync
        busy += time.time() - start

        # log
        if is_logged:
            record = dict(step=done, **values, lr=share * config.lr, grad_norm=norm.item(),
                          step_ms=1e3 * busy / (done - logged), seconds=time.time() - began)
            log.write(json.dumps(record) + '\n')
            parts = ' '.join(f'{key} {x:.3f}' for key, x in values.items() if key != 'loss')
            tqdm.write(f'{progress} | loss {values["loss"]:.4f} {parts} | gnorm '
                       f'{norm.item():.2f} | {record["step_ms"]:.0f} ms')
            busy = 0.0
            logged = done

        # evaluate and save
        if is_evaluated:
            metrics, line = evaluate()
            tqdm.write(f'{progress} | {line}')
            log.write(json.dumps(dict(step=done, metrics=metrics)) + '\n')
            save(done, dict(metrics, seconds=time.time() - began))
    tqdm.write(f'\n{name} took {(time.time() - began) / 60:.1f} minutes')
    return metrics


def train(config, command):
    device = pick_device(config.device)
    state = read_state(config)
    dtype, reason = pick_dtype(state['dtype'], device)
    autocast = autocast_on(device, dtype)
    torch.manual_seed(config.seed)

    # model and data
    model = MiniVGGTTrainer().to(device).train()
    optimizers = make_optimizers(model, config, device, dtype)
    if config.resume:
        path = os.path.join(state['folder'], 'trainer.safetensors')
        load_strictly(model, read_weights(path)[0], path)
        load_optimizers(optimizers, state['folder'])
    size = 8 * MINI.patch_size, 8 * MINI.patch_size
    pool = RoomPool('train', config.seed, config.num_rooms, config.new_rooms, size, device)
    held_out = RoomPool('val', 0, config.val_scenes, 0, size, device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    tqdm.write(f'mini VGGT: {config.steps} steps, {count:.2f} M parameters | {device}, {dtype} '
               f'({reason}) | writing to {config.out}/')
    pool.advance(state['step'], rendering)

    def losses_of(step):
        with autocast:
            return model(**make_batch(pool, step, config))

    def evaluate():
        model.eval()
        metrics = evaluate_backbone(model.vggt, held_out, config.val_scenes, autocast)
        model.train()
        return metrics, backbone_line(metrics)

    def save(done, metrics):
        def save_model(folder):
            weights = {name: x.cpu().contiguous() for name, x in model.state_dict().items()}
            save_file(weights, os.path.join(folder, 'trainer.safetensors'))
        write_checkpoint(config.out, done, optimizers, config, dtype, metrics, save_model)

    metrics = fit('mini VGGT', config, state, optimizers, list(model.parameters()),
                  losses_of, evaluate, save)
    path = os.path.join(config.out, 'mini_vggt.safetensors')
    export(model.vggt, path, config, metrics, command)
    tqdm.write(f'{backbone_table(metrics)}\nwrote {path}\n'
               f'next: python train.py --config small --backbone {path}')


def main(argv=None):
    _, config = parse_options(argv, __doc__, Config, {'mini': {}}, default='mini')
    train(config, command_of('mini_vggt.py', argv))


if __name__ == '__main__':
    run_script(main)
