import collections
import itertools
import math
import re
from dataclasses import fields

import pytest
import torch

from model import camera_rays, invert_pose
from rooms import (CATEGORIES, CLASSES, FURNITURE, SEEN, K, ask, ask_map, in_map_frame, make_intrinsics, make_path, make_rooms, make_walk, render,
                   room_facts, room_seed, surface_classes, what_patches_show)
from scoring import map_score

SIZE = (24, 32)


@pytest.fixture(scope='module')
def world():
    rooms = make_rooms(6, seed=5)
    extrinsics = make_walk(rooms, 8, seed=5)
    intrinsics = make_intrinsics(SIZE, 6, 8)
    return rooms, extrinsics, intrinsics, render(rooms, extrinsics, intrinsics, SIZE)


def hit_points(world):
    """Where each pixel's ray ends, in the room's frame: (R, V * H * W, 3), from depth and camera alone."""
    rooms, extrinsics, intrinsics, views = world
    local = views['depth'].flatten(2)[..., None] * camera_rays(intrinsics, SIZE, SIZE)
    inverse = invert_pose(extrinsics)
    return (local @ inverse[..., :3].transpose(-1, -2) + inverse[:, :, None, :, 3]).flatten(1, 2)


def in_piece(rooms, k, points):
    """Points (R, n, 3) in the units of piece k: its half sizes are 1."""
    q = points - rooms.center[:, None, k]
    cos, sin = rooms.yaw[:, k, None].cos(), rooms.yaw[:, k, None].sin()
    turned = torch.stack([cos * q[..., 0] + sin * q[..., 1], cos * q[..., 1] - sin * q[..., 0], q[..., 2]], -1)
    return turned / rooms.half[:, None, k]


def size_in(shape, u):
    """Below 1 inside the unit shape, 1 on it."""
    return {'box': u.abs().amax(-1), 'ellipsoid': u.norm(dim=-1),
            'cylinder': torch.maximum(u[..., :2].norm(dim=-1), u[..., 2].abs())}[shape]


def shape_of(rooms, k):
    return list(FURNITURE.values())[rooms.category[0, k]][0]      # a slot has one shape in every room


def test_same_seed_same_world(world):
    again = make_rooms(6, seed=5)
    assert all(torch.equal(getattr(again, f.name), getattr(world[0], f.name)) for f in fields(again))
    views = render(again, make_walk(again, 8, seed=5), make_intrinsics(SIZE, 6, 8), SIZE)
    assert all(torch.equal(views[name], world[3][name]) for name in views)
    assert not torch.equal(make_rooms(6, seed=6).size, again.size)


def test_train_and_validation_never_share_a_seed():
    seeds = {split: {room_seed(split, seed, index) for seed in range(5) for index in range(200)} for split in ('train', 'val')}
    assert not seeds['train'] & seeds['val'] and len(seeds['train']) == 1000


def test_every_ray_ends_on_what_it_says(world):
    rooms, _, _, views = world
    points, surface = hit_points(world), views['surface'].flatten(1)
    half = rooms.size[:, None] / 2
    assert (points[..., :2].abs() <= half[..., :2] + 1e-3).all() and (points[..., 2] > -1e-3).all()
    assert torch.allclose(points[..., 2][surface == 4], torch.tensor(0.0), atol=1e-3)
    assert torch.allclose(points[..., 2][surface == 5], rooms.size[:, 2:].expand_as(surface)[surface == 5], atol=1e-3)
    for wall, (axis, sign) in enumerate([(0, -1), (0, 1), (1, -1), (1, 1)]):
        assert torch.allclose(points[..., axis][surface == wall], sign * half[..., axis].expand_as(surface)[surface == wall], atol=1e-3)
    seen = 0
    for k in range(K):
        on = surface == 6 + k
        assert not on[~rooms.present[:, k]].any()
        assert torch.allclose(size_in(shape_of(rooms, k), in_piece(rooms, k, points))[on], torch.tensor(1.0), atol=5e-3)
        seen += on.any(1).sum()
    assert seen > 20


def test_nothing_stands_before_the_hit(world):
    rooms, extrinsics = world[:2]
    points = hit_points(world)
    eye = invert_pose(extrinsics)[..., 3].repeat_interleave(SIZE[0] * SIZE[1], 1)
    for share in torch.linspace(0.02, 0.99, 40):
        between = eye + share * (points - eye)
        for k in range(K):
            inside = size_in(shape_of(rooms, k), in_piece(rooms, k, between)) < 0.999
            assert not inside[rooms.present[:, k]].any()


def test_cameras(world):
    rooms, extrinsics, _, views = world
    rotation = extrinsics[..., :3]
    assert torch.allclose(rotation @ rotation.transpose(-1, -2), torch.eye(3).expand_as(rotation), atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.tensor(1.0), atol=1e-5)
    eye = invert_pose(extrinsics)[..., 3]
    assert (eye[..., :2].abs() < rooms.size[:, None, :2] / 2 - 0.3).all() and (eye[..., 2] > 1.3).all()
    assert rotation[..., 1, 2].max() < 0                          # y points down
    assert views['depth'].isfinite().all() and views['depth'].min() > 0.05


def test_furniture_stands_apart_on_the_floor(world):
    rooms = world[0]
    assert torch.allclose(rooms.center[..., 2], rooms.half[..., 2])
    radius = rooms.half[..., :2].norm(dim=-1)
    gap = torch.cdist(rooms.center[..., :2], rooms.center[..., :2]) - radius[:, None] - radius[:, :, None]
    both = rooms.present[:, None] & rooms.present[:, :, None] & ~torch.eye(K, dtype=torch.bool)
    assert gap[both].min() > 0
    objects = rooms.objects(0)
    assert len(objects) == rooms.present[0].sum() and {'category', 'center', 'size', 'yaw'} == objects[0].keys()
    assert len(CATEGORIES) >= 8 and all(item['category'] in CATEGORIES for item in objects)


def test_classes_of_surfaces(world):
    rooms, _, _, views = world
    classes = surface_classes(rooms, views['surface'])
    assert (classes[views['surface'] == 4] == CLASSES.index('floor')).all()
    assert (classes[views['surface'] < 4] == CLASSES.index('wall')).all()
    for room, k in [(0, 0), (1, 4), (2, 7)]:
        expected = CLASSES.index(CATEGORIES[rooms.category[room, k]])
        assert (classes[room][views['surface'][room] == 6 + k] == expected).all()


def test_colours_differ_within_and_between_views(world):
    images = world[3]['image'].float()
    assert images.std((3, 4)).mean() > 10 and images.mean((2, 3, 4)).std() > 5


def test_a_path_stays_inside_clear_of_furniture_and_closes(world):
    rooms = make_rooms(40, seed=11)
    extrinsics = make_path(rooms, 36)
    eye = invert_pose(extrinsics)[..., 3]
    assert (eye[..., :2].abs() < rooms.size[:, None, :2] / 2 - 0.3).all()
    stride = (eye - eye.roll(1, 1)).norm(dim=-1)                  # the last step leads back to the first
    assert stride.max() < 0.8 and stride.min() > 0.01
    tall = rooms.present & (rooms.center[..., 2] + rooms.half[..., 2] > 1.2)
    gap = torch.cdist(eye[..., :2], rooms.center[..., :2]) - rooms.half[:, None, :, :2].norm(dim=-1)
    blocked = (gap.masked_fill(~tall[:, None], 9.0) < 0).flatten(1).any(1)
    assert blocked.float().mean() < 0.2                           # a room can be too full for any ellipse
    assert (render(rooms, extrinsics, make_intrinsics((8, 8), 40, 36), (8, 8))['depth'] > 0.05).all()


def test_facts_of_rooms_are_those_of_their_object_lists(world):
    rooms, extrinsics, _, views = world
    surface = views['surface'][:, :5]
    facts = room_facts(rooms, surface, extrinsics[:, :5])
    for r in range(6):
        seen = [k for k in range(K) if (surface[r] == 6 + k).sum() >= SEEN]
        kinds = [CATEGORIES[rooms.category[r, k]] for k in seen]
        assert facts['objects'][r].item() == len(seen) > 0
        assert facts['sides'][r].tolist() == sorted(rooms.size[r, :2].tolist())
        assert facts['count'][r].tolist() == [kinds.count(name) for name in CATEGORIES]
        assert facts['presence'][r].tolist() == [name in kinds for name in CATEGORIES]
        places = {}
        for c, name in enumerate(CATEGORIES):
            place = facts['place'][r, 3 * c:3 * c + 3]
            if kinds.count(name) == 1:
                world_point = torch.cat([rooms.center[r, seen[kinds.index(name)]], torch.ones(1)])
                places[c] = extrinsics[r, 0] @ world_point
                assert torch.allclose(place, places[c], atol=1e-5)
            else:
                assert place.isnan().all()
        for i, (a, b) in enumerate(torch.triu_indices(8, 8, offset=1).T.tolist()):
            distance = facts['distance'][r, i]
            assert distance.isnan() if not {a, b} <= places.keys() else torch.isclose(distance, (places[a] - places[b]).norm(), atol=1e-5)


def test_what_patches_show(world):
    rooms, extrinsics, intrinsics, views = world
    surface, depth = views['surface'].long(), views['depth']
    size = tuple(surface.shape[-2:])
    shares, places = what_patches_show(rooms, surface, depth, extrinsics, intrinsics, size)
    own = in_map_frame(places, extrinsics)
    h, w = size[0] // 4, size[1] // 4
    pieces = 0
    for r, v, row, column in itertools.product(range(2), range(3), range(4), range(4)):
        inside = (r, v, slice(row * h, (row + 1) * h), slice(column * w, (column + 1) * w))
        ids, n = surface[inside].flatten().tolist(), 4 * row + column
        names = [CATEGORIES[rooms.category[r, i - 6]] if i > 5 else ('wall', 'wall', 'wall', 'wall', 'floor', 'ceiling')[i] for i in ids]
        assert shares[r, v, n].tolist() == pytest.approx([names.count(name) / len(names) for name in CLASSES], abs=1e-5)
        count, most = max((ids.count(i), -i) for i in range(6, 6 + K))
        if count >= len(ids) / 4:
            place, pieces = rooms.center[r, -most - 6], pieces + 1
        else:
            y, x = torch.meshgrid(*(torch.arange(part.start, part.stop) + 0.5 for part in inside[2:]), indexing='ij')
            pixels = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1)
            points = (pixels @ intrinsics[r, v].inverse().T) * depth[inside].flatten()[:, None]
            place = ((points - extrinsics[r, v, :, 3]) @ extrinsics[r, v, :, :3]).mean(0)
        assert torch.allclose(places[r, v, n], place, atol=1e-4)
        camera = extrinsics[r, v] @ torch.cat([place, torch.ones(1)])                     # its roll and pitch aside, the map's axes are the camera's
        assert own[r, v, n, 0].item() == pytest.approx(camera[0].item(), abs=0.3) and own[r, v, n, 2].item() == pytest.approx(place[2].item(), abs=1e-4)
        assert own[r, v, n, :2].norm().item() == pytest.approx((place[:2] - invert_pose(extrinsics[r, v])[:2, 3]).norm().item(), abs=1e-4)
    assert pieces > 10


# -----------------------------------------------------------------------------
# questions

def outline(rooms, room, k, steps=100):
    """Points along the four sides of a piece, (4 steps, 2), made without rooms.corners."""
    t = torch.linspace(-1, 1, steps)
    x, y, one = rooms.half[room, k, 0], rooms.half[room, k, 1], torch.ones(steps)
    points = torch.cat([torch.stack(side, -1) for side in ((x * t, y * one), (x * t, -y * one), (x * one, y * t), (-x * one, y * t))])
    yaw = rooms.yaw[room, k]
    turn = torch.stack([torch.stack([yaw.cos(), -yaw.sin()]), torch.stack([yaw.sin(), yaw.cos()])])
    return points @ turn.T + rooms.center[room, k, :2]


def test_answers_are_true(world):
    rooms, extrinsics, _, views = world
    kinds, used = collections.Counter(), collections.Counter()
    for room in range(6):
        cells = torch.nn.functional.one_hot(views['surface'][room].long().flatten(1), 6 + K)[..., 6:].sum(1)         # (V, K)
        pieces = collections.defaultdict(list)
        for k in rooms.present[room].nonzero()[:, 0].tolist():
            pieces[CATEGORIES[rooms.category[room, k]]].append(k)
        gap = lambda a, b: min(torch.cdist(outline(rooms, room, i), outline(rooms, room, j)).min().item() for i in pieces[a] for j in pieces[b])
        at = lambda name: complex(*rooms.center[room, pieces[name][0], :2].tolist())
        for record in ask(rooms, room, cells, 'x', torch.Generator().manual_seed(room), used, per_task=4):
            kind, question, truth = record['question_type'], record['question'], record['ground_truth']
            kinds[kind] += 1
            said = record['options']['ABCD'.index(truth)][3:] if record['options'] else truth
            names = re.findall(rf"\b({'|'.join(CATEGORIES)})\b", question)
            assert (cells[:, sum((pieces[name] for name in names), [])].sum(0) >= SEEN).all()       # only what the views show is asked about
            if kind == 'object_counting':
                assert int(said) == len(pieces[names[0]]) > 1
            elif kind == 'object_abs_distance':
                assert float(said) == pytest.approx(gap(*names), abs=0.06)
            elif kind == 'object_size_estimation':
                assert int(said) == pytest.approx(200 * rooms.half[room, pieces[names[0]][0]].max().item(), abs=1)
            elif kind == 'room_size_estimation':
                assert float(said) == pytest.approx((rooms.size[room, 0] * rooms.size[room, 1]).item(), abs=0.06)
            elif kind == 'object_rel_distance':
                *others, target = names
                assert said == min(others, key=lambda name: gap(name, target))
            elif kind == 'obj_appearance_order':
                first = [min(int((cells[:, k] >= SEEN).int().argmax()) for k in pieces[name]) for name in said.split(', ')]
                assert first == sorted(first) and len(set(first)) == len(first)
            elif kind.startswith('object_rel_direction'):
                turn = (at(names[2]) - at(names[0])) / (at(names[1]) - at(names[0]))                # 1 is ahead, i is left
                degrees = math.degrees(math.atan2(turn.imag, turn.real))
                side, deep = 'left' if degrees > 0 else 'right', 'front' if abs(degrees) < 90 else 'back'
                assert said == dict(easy=side, medium=side if abs(degrees) < 135 else 'back', hard=f'{deep}-{side}')[kind.split('_')[-1]]
            else:
                turn = (at(names[-1]) - at(names[1])) / (at(names[1]) - at(names[0]))
                degrees = math.degrees(math.atan2(turn.imag, turn.real))
                assert said == ('Turn Back' if abs(degrees) > 140 else 'Turn Left' if degrees > 0 else 'Turn Right')
    assert len(kinds) >= 9, kinds


def test_maps_are_true(world):
    rooms, extrinsics, _, views = world
    for room in range(6):
        cells = torch.nn.functional.one_hot(views['surface'][room].long().flatten(1), 6 + K)[..., 6:].sum(1)
        _, overview = ask_map(rooms, room, cells, extrinsics[room, 0])
        level = extrinsics[room, 0, :, :3] @ rooms.center[room].T + extrinsics[room, 0, :, 3:]      # the camera's axes: its pitch and roll are small
        seen = [k for k in range(K) if rooms.present[room, k] and cells[:, k].sum() >= SEEN]
        rough = '; '.join(f'{CATEGORIES[rooms.category[room, k]]} at x {round(level[0, k].item()):+d}, y {round(level[2, k].item()):+d}' for k in seen)
        assert map_score(overview, overview) == 1 and map_score(overview, rough) > 0.8 and overview.count(' at ') == len(seen)

    truth = 'bed at x +1, y -2; lamp at x +0, y +3; lamp at x -1, y +3'
    assert map_score(truth, truth) == 1 and map_score(truth, 'bed at x +2, y -1; lamp at x -1, y +3') == pytest.approx(2 / 3)
    assert map_score(truth, 'bed at x +3, y -2; lamp') == 0 and map_score(truth, '') == 0 and map_score('none', 'none') == 1
    spot, crowd = 'bin at x +1, y +1; bin at x +1, y +1', 'bin at x +1, y +1; ' * 9
    assert map_score(spot, spot) == 1 and map_score(spot, crowd) == pytest.approx(2 / 9)                       # listing more than there is does not pay
    assert map_score('bin at x +0, y +3; bin at x +1, y +2', 'bin at x +0, y +2; bin at x +0, y +4') == 1      # the pairing that pairs most
