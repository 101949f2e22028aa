"""Questions and maps: every answer again, from the object lists, by other means."""
import collections
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from measure import map_score
from model import invert_pose
from questions import ask, ask_map, in_map_frame, RoomQuestions, what_parts_show
from rooms import CATEGORIES, CLASSES, K, SEEN


NAME = re.compile(rf'\b({"|".join(CATEGORIES)})\b')
WALLS = ['wall', 'wall', 'wall', 'wall', 'floor', 'ceiling']    # by surface


def count_cells(views, room):
    """How many pixels each piece fills in each view, (V, K)."""
    surface = views['surface'][room].long().flatten(1)
    return F.one_hot(surface, 6 + K)[..., 6:].sum(1)


# -----------------------------------------------------------------------------
# what patches show

def name_of(rooms, room, surface):
    return WALLS[surface] if surface < 6 else CATEGORIES[rooms.category[room, surface - 6]]


def mean_point(depth, rows, columns, extrinsics, intrinsics):
    """Mean of the points in the world that some pixels of a view show."""
    y, x = torch.meshgrid(rows + 0.5, columns + 0.5, indexing='ij')
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1)
    points = (pixels @ intrinsics.inverse().T) * depth.flatten()[:, None]
    return ((points - extrinsics[:, 3]) @ extrinsics[:, :3]).mean(0)


def test_what_parts_show(world):
    rooms, extrinsics, intrinsics, views = world
    surface, depth = views['surface'].long(), views['depth']
    size = H, W = tuple(surface.shape[-2:])
    shares, places = what_parts_show(rooms, surface, depth, extrinsics, intrinsics, size)
    own = in_map_frame(places, extrinsics)
    pieces = 0
    for r, v, row, column in itertools.product(range(2), range(3), range(4), range(4)):
        n = 4 * row + column
        rows = torch.arange(row * H // 4, (row + 1) * H // 4)
        columns = torch.arange(column * W // 4, (column + 1) * W // 4)
        inside = r, v, rows[:, None], columns
        ids = surface[inside].flatten().tolist()
        names = [name_of(rooms, r, i) for i in ids]
        expected = [names.count(name) / len(names) for name in CLASSES]
        assert shares[r, v, n].tolist() == pytest.approx(expected, abs=1e-5)

        # where it is: the middle of the piece that fills most, or the mean of what is seen
        count, most = max((ids.count(6 + k), -k) for k in range(K))
        camera = extrinsics[r, v]
        if count >= len(ids) / 4:
            place = rooms.center[r, -most]
            pieces += 1
        else:
            place = mean_point(depth[inside], rows, columns, camera, intrinsics[r, v])
        assert torch.allclose(places[r, v, n], place, atol=1e-4)

        # its roll and pitch aside, the map's axes are the camera's
        right = (camera[:, :3] @ place + camera[:, 3])[0].item()
        distance = (place[:2] - invert_pose(camera)[:2, 3]).norm().item()
        x, y, z = own[r, v, n].tolist()
        assert x == pytest.approx(right, abs=0.3)
        assert math.hypot(x, y) == pytest.approx(distance, abs=1e-4)
        assert z == pytest.approx(place[2].item(), abs=1e-4)
    assert pieces > 10


# -----------------------------------------------------------------------------
# questions

def outline(rooms, room, k, steps=100):
    """Points along the four sides of a piece, (4 steps, 2), made without questions.corners."""
    t, one = torch.linspace(-1, 1, steps), torch.ones(steps)
    x, y, _ = rooms.half[room, k]
    sides = (x * t, y * one), (x * t, -y * one), (x * one, y * t), (-x * one, y * t)
    points = torch.cat([torch.stack(side, -1) for side in sides])
    cos, sin = rooms.yaw[room, k].cos(), rooms.yaw[room, k].sin()
    turn = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    return points @ turn.T + rooms.center[room, k, :2]


class Room:
    """What is true of a room, by other means than those of questions.py."""

    def __init__(self, rooms, room, cells):
        self.rooms, self.room, self.cells = rooms, room, cells
        self.pieces = collections.defaultdict(list)
        for k in rooms.present[room].nonzero()[:, 0].tolist():
            self.pieces[CATEGORIES[rooms.category[room, k]]].append(k)

    def gap(self, a, b):
        return min(torch.cdist(outline(self.rooms, self.room, i),
                               outline(self.rooms, self.room, j)).min().item()
                   for i in self.pieces[a] for j in self.pieces[b])

    def at(self, name):
        return complex(*self.rooms.center[self.room, self.pieces[name][0], :2].tolist())

    def longest(self, name):
        return 2 * self.rooms.half[self.room, self.pieces[name][0]].max().item()

    def turn(self, start, to, ahead, other):
        """Degrees from the way start -> ahead to the way `to` -> other; left is positive."""
        turn = (self.at(other) - self.at(to)) / (self.at(ahead) - self.at(start))
        return math.degrees(math.atan2(turn.imag, turn.real))

    def first_views(self, names):
        return [min(int((self.cells[:, k] >= SEEN).int().argmax()) for k in self.pieces[name])
                for name in names]


def direction(level, degrees):
    side = 'left' if degrees > 0 else 'right'
    if level == 'easy':
        return side
    if level == 'medium':
        return side if abs(degrees) < 135 else 'back'
    return ('front-' if abs(degrees) < 90 else 'back-') + side


def check_answer(truth, kind, names, said):
    """Asserts that the answer `said` to a question about `names` is true."""
    if kind == 'object_counting':
        assert int(said) == len(truth.pieces[names[0]]) > 1
    elif kind == 'object_abs_distance':
        assert float(said) == pytest.approx(truth.gap(*names), abs=0.06)
    elif kind == 'object_size_estimation':
        assert int(said) == pytest.approx(100 * truth.longest(names[0]), abs=1)
    elif kind == 'room_size_estimation':
        x, y, _ = truth.rooms.size[truth.room].tolist()
        assert float(said) == pytest.approx(x * y, abs=0.06)
    elif kind == 'object_rel_distance':
        *others, target = names
        assert said == min(others, key=lambda name: truth.gap(name, target))
    elif kind == 'obj_appearance_order':
        first = truth.first_views(said.split(', '))
        assert first == sorted(first) and len(set(first)) == len(first)
    elif kind.startswith('object_rel_direction'):
        stand, face, asked = names[0], names[1], names[2]
        degrees = truth.turn(stand, stand, face, asked)
        assert said == direction(kind.split('_')[-1], degrees)
    else:
        assert kind == 'route_planning'
        start, face, end = names[0], names[1], names[-1]
        degrees = truth.turn(start, face, face, end)
        side = 'Turn Left' if degrees > 0 else 'Turn Right'
        assert said == ('Turn Back' if abs(degrees) > 140 else side)


def test_answers_are_true(world):
    rooms, _, _, views = world
    kinds, used = collections.Counter(), collections.Counter()
    for room in range(6):
        cells = count_cells(views, room)
        truth = Room(rooms, room, cells)
        g = torch.Generator().manual_seed(room)
        for record in ask(rooms, room, cells, g, used, per_kind=4):
            kind, said = record['question_type'], record['ground_truth']
            kinds[kind] += 1
            if record['options']:
                said = record['options']['ABCD'.index(said)][3:]
            names = NAME.findall(record['question'])
            # only what the views show is asked about
            assert all(cells[:, k].sum() >= SEEN for name in names for k in truth.pieces[name])
            check_answer(truth, kind, names, said)
    assert len(kinds) >= 9, kinds


# -----------------------------------------------------------------------------
# maps

def test_maps_are_true(world):
    rooms, extrinsics, _, views = world
    for room in range(6):
        cells, camera = count_cells(views, room), extrinsics[room, 0]
        _, overview = ask_map(rooms, room, cells, camera)
        # by the camera's own axes: its pitch and roll are small
        level = camera[:, :3] @ rooms.center[room].T + camera[:, 3:]
        seen = [k for k in range(K) if rooms.present[room, k] and cells[:, k].sum() >= SEEN]
        rough = []
        for k in seen:
            x, y = round(level[0, k].item()), round(level[2, k].item())
            rough.append(f'{CATEGORIES[rooms.category[room, k]]} at x {x:+d}, y {y:+d}')
        assert overview.count(' at ') == len(seen)
        assert map_score(overview, overview) == 1
        assert map_score(overview, '; '.join(rough)) > 0.8


def test_maps_alone_and_after_questions():
    rooms = RoomQuestions('train', 0, 4)
    for i in range(4):
        overview = rooms.maps[i][1]
        assert rooms.map_of(i)['conversations'][1]['value'] == overview
        assert len(rooms.map_of(i)['conversations']) == 2
        # after the questions of every second room
        assert (rooms[i]['conversations'][-1]['value'] == overview) == (i % 2 == 1)


def test_held_out_rooms_are_asked_for_no_map_and_nothing_in_words():
    rooms = RoomQuestions('val', 0, 4)
    for i in range(4):
        said = [turn['value'] for turn in rooms[i]['conversations'][1::2]]
        assert rooms.maps[i][1] not in said
        assert sorted(said) == sorted(record['ground_truth'] for record in rooms.questions[i])


def test_an_item_has_six_pictures_and_what_they_show():
    rooms = RoomQuestions('train', 0, 4)
    item = rooms[0]
    assert len(item['images']) == 6
    assert item['conversations'][0]['value'].startswith('<image>' * 6)
    assert not any('<image>' in turn['value'] for turn in item['conversations'][1:])
    assert item['seen'].shape == (6, 16, len(CLASSES) + 3)
    assert item['stand'].shape == (len(CATEGORIES), 3)


def test_records_know_their_rooms():
    rooms = RoomQuestions('val', 0, 6)
    assert [record['id'] for record in rooms.records] == list(range(len(rooms.records)))
    for room, questions in enumerate(rooms.questions):
        mine = [record['question'] for record in rooms.records if record['room'] == room]
        assert mine == [record['question'] for record in questions]
