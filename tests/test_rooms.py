"""The world: rooms, walks and the ray-caster, against the rooms' own lists of what stands where."""
import functools
import math
from dataclasses import fields

import pytest
import torch

from common import InputError
from data import RoomPool
from model import camera_rays, invert_pose
from rooms import (CATEGORIES, CLASSES, FURNITURE, K, Style, check_classes, main, make_intrinsics,
                   make_rooms, make_walk, render, room_seed, surface_classes)


def hit_points(world):
    """Where each pixel's ray ends, in the room's frame: (R, V H W, 3), from depth and camera."""
    _, extrinsics, intrinsics, views = world
    size = views['depth'].shape[-2:]
    local = views['depth'].flatten(2)[..., None] * camera_rays(intrinsics, size, size)
    inverse = invert_pose(extrinsics)
    points = local @ inverse[..., :3].transpose(-1, -2) + inverse[:, :, None, :, 3]
    return points.flatten(1, 2)


def in_piece(rooms, k, points):
    """Points (R, n, 3) in the units of piece k: its half sizes are 1."""
    x, y, z = (points - rooms.center[:, None, k]).unbind(-1)
    cos, sin = rooms.yaw[:, k, None].cos(), rooms.yaw[:, k, None].sin()
    turned = torch.stack([cos * x + sin * y, cos * y - sin * x, z], -1)
    return turned / rooms.half[:, None, k]


def size_in(shape, u):
    """Below 1 inside the unit shape, 1 on it."""
    if shape == 'box':
        return u.abs().amax(-1)
    if shape == 'ellipsoid':
        return u.norm(dim=-1)
    return torch.maximum(u[..., :2].norm(dim=-1), u[..., 2].abs())


def shape_of(rooms, k):
    """A slot has one shape in every room."""
    return list(FURNITURE.values())[rooms.category[0, k]][0]


# -----------------------------------------------------------------------------
# rooms

def test_same_seed_same_world(world):
    again = make_rooms(6, seed=5)
    assert all(torch.equal(getattr(again, f.name), getattr(world[0], f.name))
               for f in fields(again))
    size = world[3]['depth'].shape[-2:]
    views = render(again, make_walk(again, 8, seed=5), make_intrinsics(size, 6, 8), size)
    assert all(torch.equal(views[name], world[3][name]) for name in views)
    assert not torch.equal(make_rooms(6, seed=6).size, again.size)


def test_other_worlds_differ_in_what_they_say():
    plain = make_rooms(40, 5)
    larger = make_rooms(40, 5, Style(sides=(8.0, 11.0)))
    assert larger.size[:, :2].min() >= 8 and larger.size[:, :2].max() <= 11
    full = make_rooms(40, 5, Style(furnished=1.0))
    assert full.present.float().mean() > 1.1 * plain.present.float().mean()
    dark = make_rooms(40, 5, Style(brightness=0.5))
    assert torch.equal(dark.colors, plain.colors / 2) and torch.equal(dark.size, plain.size)
    fine = make_rooms(40, 5, Style(waves=(8.0, 16.0)))
    assert fine.texture[:, :6, :2].min() >= 8 and torch.equal(fine.center, plain.center)
    low = make_walk(plain, 8, 5, Style(eye_height=(0.8, 1.0)))
    assert (invert_pose(low)[..., 2, 3].mean(1) - 0.9).abs().max() < 0.2
    half = make_intrinsics((64, 64), 1, field_of_view=math.radians(60))
    assert half[0, 0, 0] == pytest.approx(32 / math.tan(math.radians(30)))


def test_options_are_not_passed_over(capsys):
    with pytest.raises(SystemExit):
        main(['--hlep'])
    assert 'no option --hlep' in capsys.readouterr().err


def test_train_and_validation_never_share_a_seed():
    train, val = [{room_seed(split, seed, index) for seed in range(5) for index in range(200)}
                  for split in ('train', 'val')]
    assert not train & val
    assert len(train) == 1000
    for split in ('train', 'val'):       # a seed that is a date, after mini_vlm.py's own factor
        torch.Generator().manual_seed(room_seed(split, 20261129 * 10 ** 6, 1))


def test_furniture_stands_apart_on_the_floor(world):
    rooms = world[0]
    assert torch.allclose(rooms.center[..., 2], rooms.half[..., 2])
    radius = rooms.half[..., :2].norm(dim=-1)
    gap = torch.cdist(rooms.center[..., :2], rooms.center[..., :2])
    gap = gap - radius[:, None] - radius[:, :, None]
    both = rooms.present[:, None] & rooms.present[:, :, None] & ~torch.eye(K, dtype=torch.bool)
    assert gap[both].min() > 0


def test_lists_of_objects(world):
    rooms = world[0]
    objects = rooms.objects(0)
    assert len(objects) == rooms.present[0].sum()
    assert objects[0].keys() == {'category', 'center', 'size', 'yaw'}


def test_cameras(world):
    rooms, extrinsics, _, views = world
    rotation = extrinsics[..., :3]
    one = torch.eye(3).expand_as(rotation)
    assert torch.allclose(rotation @ rotation.transpose(-1, -2), one, atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.tensor(1.0), atol=1e-5)
    eye = invert_pose(extrinsics)[..., 3]
    assert (eye[..., :2].abs() < rooms.size[:, None, :2] / 2 - 0.3).all()
    assert (eye[..., 2] > 1.3).all()
    assert rotation[..., 1, 2].max() < 0  # y points down
    assert views['depth'].isfinite().all() and views['depth'].min() > 0.05


# -----------------------------------------------------------------------------
# rendering

def test_every_ray_ends_on_what_it_says(world):
    rooms, _, _, views = world
    points, surface = hit_points(world), views['surface'].flatten(1)
    half = rooms.size[:, None] / 2  # (R, 1, 3)
    assert (points[..., :2].abs() <= half[..., :2] + 1e-3).all()
    assert (points[..., 2] > -1e-3).all()

    def assert_on(surface_id, axis, where):
        on = surface == surface_id
        assert torch.allclose(points[..., axis][on], where.expand_as(surface)[on], atol=1e-3)

    assert_on(4, 2, torch.zeros(6, 1))
    assert_on(5, 2, rooms.size[:, 2:])
    assert_on(0, 0, -half[..., 0])
    assert_on(1, 0, half[..., 0])
    assert_on(2, 1, -half[..., 1])
    assert_on(3, 1, half[..., 1])
    seen = 0
    for k in range(K):
        on = surface == 6 + k
        assert not on[~rooms.present[:, k]].any()
        size = size_in(shape_of(rooms, k), in_piece(rooms, k, points))
        assert torch.allclose(size[on], torch.tensor(1.0), atol=5e-3)
        seen += on.any(1).sum()
    assert seen > 20


def test_nothing_stands_before_the_hit(world):
    rooms, extrinsics, _, views = world
    points = hit_points(world)
    rays = views['depth'][0, 0].numel()
    eye = invert_pose(extrinsics)[..., 3].repeat_interleave(rays, 1)
    for share in torch.linspace(0.02, 0.99, 40):
        between = eye + share * (points - eye)
        for k in range(K):
            inside = size_in(shape_of(rooms, k), in_piece(rooms, k, between)) < 0.999
            assert not inside[rooms.present[:, k]].any()


def test_colours_differ_within_and_between_views(world):
    images = world[3]['image'].float()
    assert images.std((3, 4)).mean() > 10
    assert images.mean((2, 3, 4)).std() > 5


def test_autocast_does_not_reach_the_renderer(world):
    rooms, extrinsics, intrinsics, _ = world
    pool = RoomPool('val', 0, 4)
    calls = [lambda: pool.render_block(0)[1],
             functools.partial(render, rooms, extrinsics, intrinsics, (24, 32))]
    for call in calls:
        outside = call()
        with torch.autocast('cpu', torch.bfloat16):
            inside = call()
        assert outside.keys() == inside.keys() >= {'depth', 'surface'}
        for name in outside:
            assert outside[name].dtype == inside[name].dtype, name
            assert torch.equal(outside[name], inside[name]), name


# -----------------------------------------------------------------------------
# classes

def test_classes_of_surfaces(world):
    rooms, _, _, views = world
    surface = views['surface']
    classes = surface_classes(rooms, surface)
    assert (classes[surface == 4] == CLASSES.index('floor')).all()
    assert (classes[surface == 5] == CLASSES.index('ceiling')).all()
    assert (classes[surface < 4] == CLASSES.index('wall')).all()
    for room, k in [(0, 0), (1, 4), (2, 7)]:
        expected = CLASSES.index(CATEGORIES[rooms.category[room, k]])
        assert (classes[room][surface[room] == 6 + k] == expected).all()


def test_other_categories_are_refused_by_name():
    check_classes(tuple(CLASSES), 'ours.safetensors')
    message = 'other.safetensors tells apart floor, sofa, but the rooms have floor, ceiling, wall'
    with pytest.raises(InputError, match=message):
        check_classes(['floor', 'sofa'], 'other.safetensors')
    with pytest.raises(InputError, match='other.safetensors tells apart'):
        check_classes(CLASSES[::-1], 'other.safetensors')
