"""The path of a film's cameras; what is drawn of a field, and of maps."""
import contextlib
import json
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw
import pytest
import torch

from data import RoomPool
from draw import (draw_curve, draw_field, draw_film, draw_maps, field_along,
                  FILM_FRAMES, make_path, nearest_view, PAINT, rgb)
from model import invert_pose
from psfm import PSFM, PSFMConfig
from rooms import CATEGORIES, FURNITURE, make_intrinsics, make_rooms, render, scene_extrinsics
from vggt import VGGT


def test_a_path_stays_inside_clear_of_furniture_and_closes():
    rooms = make_rooms(40, seed=11)
    extrinsics = make_path(rooms, 36)
    eye = invert_pose(extrinsics)[..., 3]
    assert (eye[..., :2].abs() < rooms.size[:, None, :2] / 2 - 0.3).all()
    stride = (eye - eye.roll(1, 1)).norm(dim=-1)  # the last step leads back to the first
    assert 0.01 < stride.min() and stride.max() < 0.8
    is_tall = rooms.present & (rooms.center[..., 2] + rooms.half[..., 2] > 1.2)
    gap = torch.cdist(eye[..., :2], rooms.center[..., :2])
    gap = gap - rooms.half[:, None, :, :2].norm(dim=-1)
    is_blocked = (gap.masked_fill(~is_tall[:, None], 9.0) < 0).flatten(1).any(1)
    assert is_blocked.float().mean() < 0.2  # a room can be too full for any ellipse
    views = render(rooms, extrinsics, make_intrinsics((8, 8), 40, 36), (8, 8))
    assert (views['depth'] > 0.05).all()


def test_the_nearest_view_is_near_and_looks_the_same_way():
    views = torch.eye(3, 4).repeat(3, 1, 1)
    views[:, 0, 3] = torch.tensor([0.0, 1.0, 1.0])
    views[2, 0, 0] = views[2, 2, 2] = -1      # at the place of the second, looking back
    for i in range(3):
        assert nearest_view(views, views[i]) == i
    between = views[0].clone()
    between[0, 3] = 0.4
    assert nearest_view(views, between) == 0


NO_AUTOCAST = contextlib.nullcontext()


@pytest.fixture
def tiny():
    """A tiny PSFM on the shipped mini VGGT, never trained, and its options."""
    torch.manual_seed(0)
    sizes = PSFMConfig(width=32, encoder_depth=1, decoder_depth=1, num_latents=4)
    path = 'weights/mini_vggt.safetensors'
    config = SimpleNamespace(**vars(sizes), image_width=64, data='rooms', backbone=path,
                             min_views=4, max_views=8, val_scenes=4)
    return PSFM(VGGT.from_pretrained(path).freeze(), sizes).eval(), config


def is_drawn(picture, colour, box, least=20):
    """Are there at least `least` pixels of just this colour in a box (left, top, right, bottom)?"""
    pixels = np.asarray(picture.convert('RGB').crop(box))
    return (pixels == colour).all(-1).sum() >= least


def is_blank(picture, box):
    return len(picture.convert('RGB').crop(box).getcolors(1 << 16)) == 1


# -----------------------------------------------------------------------------
# field.png, curve.png

def test_a_picture_of_the_field(tiny, tmp_path):
    psfm, config = tiny
    draw_field(psfm, RoomPool('val', 0, 4), config, NO_AUTOCAST, tmp_path / 'field.png')
    with Image.open(tmp_path / 'field.png') as picture:
        assert picture.width > 500
        assert len(picture.getcolors(1 << 24)) > 1000
        for colour in PAINT:  # the legend below
            below = 0, picture.height - 52, picture.width, picture.height
            assert is_drawn(picture, rgb(colour), below)


def test_a_curve_of_the_loss_and_of_what_was_measured(tmp_path):
    measured = dict(psfm=dict(r2=0.5), camera=dict(r2=0.2),
                    read_out=dict(psfm=dict(object_recall=0.4)))
    lines = [dict(step=step, loss=1 / step) for step in range(1, 9)]
    lines += [dict(step=step, metrics=measured) for step in (4, 8)]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    draw_curve(tmp_path / 'log.jsonl', tmp_path / 'curve.png')
    with Image.open(tmp_path / 'curve.png') as picture:
        left, right = (60, 40, 470, 290), (550, 40, 970, 290)
        assert is_drawn(picture, (0, 0, 0), left, 200)
        assert is_drawn(picture, (178, 34, 34), right, 200)  # firebrick: R2
        assert is_drawn(picture, (128, 128, 128), right, 200)  # grey: the camera alone
        assert is_drawn(picture, (70, 130, 180), right, 200)  # steelblue: objects found


# -----------------------------------------------------------------------------
# path.gif

@pytest.mark.parametrize('context', ['asymmetric', 'separate'])
def test_the_film_predicts_from_the_context_alone_and_from_the_right_cameras(tiny, context):
    """With the walk's own cameras as the path: the film shows what the field says when asked."""
    psfm, _ = tiny
    psfm.context = context
    _, block = RoomPool('val', 0, 4).render_block(0)
    images = block['images'][0].float() / 255
    cameras = scene_extrinsics(block['extrinsics'][:1])[0]
    K = block['intrinsics'][0, 0]
    features, predicted, grid = field_along(psfm, images[:4], images[4:], cameras[4:], K)
    with torch.no_grad():
        seen = psfm.backbone(images[None, :4])
        z = psfm.encode(seen.features, seen.grid)
        asked = cameras[None, 4:], K.expand(1, 4, 3, 3), (64, 64), grid
        expected = psfm.decode(z, *asked)[0]
    assert torch.allclose(predicted, expected, atol=1e-4)
    assert features.shape == predicted.shape

    # other frames change what is seen there, not what is predicted
    others = torch.rand_like(images[4:])
    other_features, again, _ = field_along(psfm, images[:4], others, cameras[4:], K)
    assert torch.equal(again, predicted)
    assert not torch.allclose(other_features, features, atol=1e-2)

    # other cameras change the prediction
    moved = field_along(psfm, images[:4], images[4:], cameras[4:].roll(1, 0), K)[1]
    assert not torch.allclose(moved, predicted, atol=1e-4)


def test_a_film_of_the_field(tiny, tmp_path):
    psfm, config = tiny
    draw_film(psfm, config, NO_AUTOCAST, tmp_path / 'path.gif', num_rooms=1)
    frames = []
    with Image.open(tmp_path / 'path.gif') as film:
        assert film.n_frames == FILM_FRAMES == 36
        for i in (0, 18):
            film.seek(i)
            frames.append(np.asarray(film.convert('RGB')))
    assert (frames[0] != frames[1]).mean() > 0.1  # the camera moves


# -----------------------------------------------------------------------------
# map.png

TILE, TOP = 256, 62  # a panel and its border, what stands above the panels


def panel(i):
    """The inside of panel `i`, without its border and its number."""
    left, top = i % 4 * TILE, TOP + i // 4 * TILE
    return left + 1, top + 20, left + 249, top + 249


def test_something_is_drawn_in_every_panel(tmp_path):
    far = ['bed at x +15, y +15', 'bed at x -15, y +15', 'bed at x +15, y -15',
           'bed at x -15, y -15', 'bed at x +0, y +0', 'bed at x +4, y -4']
    answers = [text.replace('bed', 'lamp').replace('15', '14') for text in far]
    draw_maps(list(zip(far, answers)), tmp_path / 'map.png')
    with Image.open(tmp_path / 'map.png') as picture:
        assert picture.size == (4 * TILE, TOP + 2 * TILE)
        for i in range(6):
            assert is_drawn(picture, rgb(FURNITURE['bed'][2]), panel(i)), i
            assert is_drawn(picture, rgb(FURNITURE['lamp'][2]), panel(i)), i
        for i in (6, 7):  # there are no more maps
            assert is_blank(picture, panel(i))


def test_places_of_maps(tmp_path):
    """Right of the cross is right of the camera, above it is ahead."""
    truth = 'bed at x +3, y +2'
    draw_maps([(truth, 'lamp at x -3, y -2'), (truth, 'none'), ('none', truth)],
              tmp_path / 'map.png')
    bed, lamp = [rgb(FURNITURE[name][2]) for name in ('bed', 'lamp')]
    with Image.open(tmp_path / 'map.png') as picture:
        assert picture.size == (4 * TILE, TOP + TILE)
        right_above, left_below = (126, TOP + 1, 249, TOP + 124), (1, TOP + 126, 124, TOP + 249)
        assert is_drawn(picture, bed, right_above)
        assert is_drawn(picture, lamp, left_below)
        assert not is_drawn(picture, bed, left_below, 1)
        assert not is_drawn(picture, lamp, right_above, 1)
        assert is_drawn(picture, bed, panel(1))
        assert is_drawn(picture, bed, panel(2))


def test_a_place_far_beyond_any_room_takes_no_longer_to_draw(tmp_path, monkeypatch):
    lines, line = [], ImageDraw.ImageDraw.line

    def counted(pen, *arguments, **options):
        lines.append(arguments)
        return line(pen, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, 'line', counted)
    draw_maps([('bed at x +1, y +1', 'bed at x +20000, y +1')], tmp_path / 'map.png')
    assert len(lines) < 1000


def test_words_that_are_no_map_draw_no_pieces(tmp_path):
    draw_maps([('none', 'the unicorn at x +1, y +1; table')], tmp_path / 'map.png')
    with Image.open(tmp_path / 'map.png') as picture:
        for name in CATEGORIES:
            assert not is_drawn(picture, rgb(FURNITURE[name][2]), panel(0), 1)


def test_the_legend_of_maps_names_every_category(tmp_path):
    draw_maps([('bed at x +1, y +1', 'none')], tmp_path / 'map.png')
    with Image.open(tmp_path / 'map.png') as picture:
        assert not is_blank(picture, (0, 0, 1000, 28))  # what the marks mean
        for i, name in enumerate(CATEGORIES):
            left = 8 + 92 * i
            assert is_drawn(picture, rgb(FURNITURE[name][2]), (left, 30, left + 14, 50), 50)
            assert not is_blank(picture, (left + 16, 30, left + 90, 50))
