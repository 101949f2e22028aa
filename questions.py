"""
Questions about rooms, in VSI-Bench's schema, wording and ground-truth definitions (arXiv
2412.14171), with answers that follow from the rooms' object lists; and maps in words.

    RoomQuestions('train', seed=0, num_rooms=3000)[i]  # room i: six pictures, all it is asked

A category is asked about only if the views show every piece of it (or any piece, where its first
appearance is asked for). A new kind of question is one function and one line of KINDS.

R rooms    V views    K furniture slots    C categories    g a torch.Generator
cells (V, K) of one room: how many cells (data.CELL pixels a side) each piece fills in each view
"""
import collections
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import prompt
from common import step_generator
from data import RoomPool
from model import invert_pose, points_in_world
from rooms import CATEGORIES, CLASSES, SEEN, K, surface_classes

# -----------------------------------------------------------------------------
# geometry on the floor plan

def corners(rooms, room):
    """Corners of the furniture's outlines. -> (K, 4, 2) metres, in order around each piece"""
    unit = torch.tensor([[1., 1.], [-1., 1.], [-1., -1.], [1., -1.]])
    x, y = (unit * rooms.half[room, :, None, :2]).unbind(-1)  # (K, 4)
    cos, sin = rooms.yaw[room, :, None].cos(), rooms.yaw[room, :, None].sin()
    turned = torch.stack([cos * x - sin * y, sin * x + cos * y], -1)  # (K, 4, 2)
    return turned + rooms.center[room, :, None, :2]


def gaps(outlines):
    """Metres between the outlines of every two pieces, (K, 4, 2) -> (K, K). They never overlap,
    so the shortest way is from a corner of one to an edge of the other."""
    a = outlines[:, None, :, None]  # (K, 1, 4, 1, 2)
    b = outlines.roll(-1, dims=1)[:, None, :, None]  # edges go from a to b
    p = outlines[None, :, None]  # (1, K, 1, 4, 2)
    share = ((p - a) * (b - a)).sum(-1, keepdim=True) / (b - a).square().sum(-1, keepdim=True)
    nearest = a + share.clamp(0, 1) * (b - a)
    gap = (nearest - p).norm(dim=-1).amin((2, 3))  # (K, K)
    return torch.minimum(gap, gap.T)


def turn_angle(stand, face, point):
    """Anticlockwise degrees in [0, 360) from the direction stand -> face to stand -> point."""
    ahead = torch.atan2(face[..., 1] - stand[..., 1], face[..., 0] - stand[..., 0])
    bearing = torch.atan2(point[..., 1] - stand[..., 1], point[..., 0] - stand[..., 0])
    return torch.rad2deg(bearing - ahead) % 360


def find_sector(sectors, angle, margin=0.0):
    """-> name of the sector that holds `angle` with `margin` degrees on both sides, or None."""
    for name, low, high in sectors:
        if low + margin <= angle < high - margin:
            return name
    return None


class Triple(NamedTuple):
    """Three unique pieces: one stands at a, faces b, and is asked about c. Degrees."""
    a: str
    b: str
    c: str
    angle: float          # from b to the middle of c, seen from a
    corners: list         # ... and to the corners of c
    turn: float           # the turn towards c, at b, after walking from a to b


class Scene:
    """What can be asked about one room: the categories of which every piece is seen."""

    def __init__(self, rooms, room, cells, fewest=3):
        self.fewest = fewest  # options where the closest piece is asked for
        is_seen = cells.sum(0) >= SEEN  # (K,)
        self.longest = 2 * rooms.half[room].amax(-1)  # (K,) metres
        self.area = (rooms.size[room, 0] * rooms.size[room, 1]).item()
        self.place = rooms.center[room, :, :2]  # (K, 2)
        self.outlines = corners(rooms, room)  # (K, 4, 2)
        self.gap = gaps(self.outlines)  # (K, K)

        pieces_of = collections.defaultdict(list)
        for k in rooms.present[room].nonzero()[:, 0].tolist():
            pieces_of[CATEGORIES[rooms.category[room, k]]].append(k)
        self.members = {name: pieces for name, pieces in pieces_of.items()
                        if is_seen[pieces].all()}
        self.unique = {name: pieces[0] for name, pieces in self.members.items()
                       if len(pieces) == 1}

        self.first = {}  # view -> categories that it is the first to show, all pieces or some
        for name in CATEGORIES:
            views = (cells[:, pieces_of[name]].sum(1) >= SEEN).nonzero()[:, 0].tolist()
            if views:
                self.first.setdefault(views[0], []).append(name)

    def triples(self):
        """Every three unique pieces that are neither too close to each other nor too far."""
        near, piece = ((self.gap > 0.3) & (self.gap < 5)).tolist(), self.unique
        triples = [triple for triple in itertools.permutations(piece, 3)
                   if all(near[piece[a]][piece[b]] for a, b in itertools.combinations(triple, 2))]
        rows = [[piece[name] for name in triple] for triple in triples]
        i, j, k = torch.tensor(rows, dtype=torch.long).view(-1, 3).T
        start, face, point = self.place[i], self.place[j], self.place[k]  # (triples, 2)
        angle = turn_angle(start, face, point).tolist()
        to_corners = turn_angle(start[:, None], face[:, None], self.outlines[k]).tolist()
        turn = turn_angle(face, 2 * face - start, point).tolist()
        return [Triple(*names, *x) for names, *x in zip(triples, angle, to_corners, turn)]


# -----------------------------------------------------------------------------
# kinds of questions. Each function lists what a Scene can be asked without ambiguity.

class Candidate(NamedTuple):
    answer_class: object      # answers are balanced over these classes
    question: str
    options: list             # or None, for a number
    answer: str


def find_counts(scene):
    for name, pieces in scene.members.items():
        if len(pieces) > 1:
            question = f'How many {name}(s) are in this room?'
            yield Candidate(len(pieces), question, None, str(len(pieces)))


def find_distances(scene):
    for (a, i), (b, j) in itertools.permutations(scene.unique.items(), 2):
        gap = scene.gap[i, j]
        if gap >= 0.2:
            question = ('Measuring from the closest point of each object, what is the distance '
                        f'between the {a} and the {b} (in meters)?')
            yield Candidate(int(gap / 0.5), question, None, f'{gap:.1f}')


def find_sizes(scene):
    for name, k in scene.unique.items():
        longest = round(100 * scene.longest[k].item())
        question = ('What is the length of the longest dimension (length, width, or height) of '
                    f'the {name}, measured in centimeters?')
        yield Candidate(f'{name} {longest // 20}', question, None, str(longest))


def find_room_sizes(scene):
    question = ('What is the size of this room (in square meters)? If multiple rooms are shown, '
                'estimate the size of the combined space.')
    yield Candidate(scene.area // 6, question, None, f'{scene.area:.1f}')


def find_closest(scene):
    """Which piece is the closest? Options: up to four whose distances clearly differ."""
    clear = 0.3 if scene.area > 40 else 0.15  # metres between two distances
    for a, i in scene.unique.items():
        others = sorted((scene.gap[i, pieces].min().item(), name)
                        for name, pieces in scene.members.items() if name != a)
        if not others or others[0][0] < 0.15:
            continue
        apart = [others[0]]
        for distance, name in others[1:]:
            if distance - apart[-1][0] > clear:
                apart.append((distance, name))
        if len(apart) < scene.fewest:
            continue
        names = [name for _, name in apart[:4]]
        question = ('Measuring from the closest point of each object, which of these objects '
                    f'({{options}}) is the closest to the {a}?')
        if any(len(scene.members[name]) > 1 for name in names):
            question += (' If there are multiple instances of an object category, measure to the '
                         'closest.')
        yield Candidate(names[0], question, names, names[0])


SECTORS = {      # level: (name of a sector, from, to), degrees
    'easy': (('left', 0, 135), ('right', 225, 360)),
    'medium': (('left', 0, 135), ('back', 135, 225), ('right', 225, 360)),
    'hard': (('front-left', 0, 90), ('back-left', 90, 180), ('back-right', 180, 270),
             ('front-right', 270, 360))}
DIRECTIONS = {
    'easy': 'is the {c} to the left or the right of the {b}?',
    'medium': 'is the {c} to my left, right, or back? An object is to my back if I would have to '
              'turn at least 135 degrees in order to face it.',
    'hard': 'is the {c} to my front-left, front-right, back-left, or back-right? The directions '
            'refer to the quadrants of a Cartesian plane (if I am standing at the origin and '
            'facing along the positive y-axis).'}


def find_directions(level, scene):
    sectors = SECTORS[level]
    for triple in scene.triples():
        answer = find_sector(sectors, triple.angle, margin=10)
        if answer is None:
            continue
        # VSI-Bench lets two of a box's eight corners stray: two are above each of our four
        strays = sum(find_sector(sectors, corner) != answer for corner in triple.corners)
        if strays <= 1:
            ahead = f'If I am standing by the {triple.a} and facing the {triple.b}, '
            question = ahead + DIRECTIONS[level].format(b=triple.b, c=triple.c)
            yield Candidate(answer, question, [name for name, _, _ in sectors], answer)


TURNS = (('Turn Left', 45, 125), ('Turn Back', 145, 215), ('Turn Right', 235, 315))


def find_routes(scene):
    for a, b, c, _, _, turn in scene.triples():
        answer = find_sector(TURNS, turn)  # what lies between sectors is left out
        if answer:
            question = (
                f'You are a robot beginning at the {a} facing the {b}. You want to navigate to '
                f'the {c}. You will perform the following actions (Note: for each [please fill '
                "in], choose either 'turn back,' 'turn left,' or 'turn right.'): "
                f'1. Go forward until the {b} 2. [please fill in] 3. Go forward until the {c}. '
                'You have reached the final destination.')
            yield Candidate(answer, question, [name for name, _, _ in TURNS], answer)


def find_orders(scene):
    """In which order do categories appear? The names are drawn when it is asked (`ask_order`)."""
    if len(scene.first) >= 3:
        yield Candidate(None, None, None, None)


KINDS = {        # VSI-Bench's question_type: (column of the table of results, candidates)
    'object_counting': ('count', find_counts),
    'object_abs_distance': ('abs.dist', find_distances),
    'object_size_estimation': ('obj.size', find_sizes),
    'room_size_estimation': ('room size', find_room_sizes),
    'object_rel_distance': ('rel.dist', find_closest),
    'object_rel_direction_easy': ('rel.dir', lambda scene: find_directions('easy', scene)),
    'object_rel_direction_medium': ('rel.dir', lambda scene: find_directions('medium', scene)),
    'object_rel_direction_hard': ('rel.dir', lambda scene: find_directions('hard', scene)),
    'route_planning': ('route', find_routes),
    'obj_appearance_order': ('order', find_orders),
}
ANSWER_WORDS = ['front-left', 'front-right', 'back-left', 'back-right', 'left', 'middle', 'right',
                'back', 'yes', 'no', 'Turn Left', 'Turn Back', 'Turn Right']


# -----------------------------------------------------------------------------
# asking

def pick(items, g):
    return items[int(torch.randint(len(items), (1,), generator=g))]


def shuffled(items, g):
    return [items[i] for i in torch.randperm(len(items), generator=g)]


def as_record(kind, question, options, answer):
    """A record in VSI-Bench's schema. With options, the answer becomes the right one's letter."""
    record = dict(question_type=kind, question=question, options=None, ground_truth=answer)
    if options is not None:
        lettered = [f'{letter}. {text}' for letter, text in zip('ABCD', options)]
        letter = lettered[options.index(answer)][0]
        record.update(options=lettered, ground_truth=letter)
    return record


def in_words(record):
    """The same question without its options: the answer is the text of the right one."""
    if record['options'] is None:
        return record
    answer = record['options']['ABCD'.index(record['ground_truth'])][3:]
    kind = f'{record["question_type"]} in words'
    return dict(record, question_type=kind, options=None, ground_truth=answer)


def ask_order(first, g, used):
    """Draws names for a question of order. first: {view: categories that it is the first to show}.

    Of eight draws it takes the one whose pairs came in this order least often so far.
    -> question, options, answer
    """
    kind = 'obj_appearance_order'
    draws = []
    for _ in range(8):
        names = [pick(categories, g) for _, categories in sorted(first.items())][:4]
        pairs = [(kind, *pair) for pair in itertools.combinations(names, 2)]
        surplus = sum(used[kind, a, b] - used[kind, b, a] for _, a, b in pairs)
        draws.append((surplus, names, pairs))
    _, names, pairs = min(draws, key=lambda drawn: drawn[0])
    used.update(pairs)

    answer = ', '.join(names)
    orders = set()
    while len(orders) < 3:
        orders.add(', '.join(shuffled(names, g)))
        orders.discard(answer)
    question = ('What will be the first-time appearance order of the following categories in the '
                f'video: {", ".join(shuffled(names, g))}?')
    return question, [answer, *sorted(orders)], answer


def ask(rooms, room, cells, g, used, per_kind=1, fewest=3):
    """Questions about one room: up to `per_kind` of every kind, the rarest answers first.

    `used`: Counter of the classes of answers so far, over the whole data set, by which no answer
    becomes much commoner than another. `fewest`: as in Scene. -> records in VSI-Bench's schema
    """
    records = []
    scene = Scene(rooms, room, cells, fewest)
    for kind, (_, find) in KINDS.items():
        choices = list(find(scene))
        for _ in range(min(per_kind, len(choices))):
            # the class of answers that was used least
            least = min(used[kind, choice.answer_class] for choice in choices)
            if kind == 'object_counting':
                asked = sum(n for key, n in used.items() if key[0] == kind)
                if least > 2 + asked / 2:
                    break  # most rooms have only pairs: 'two' is at most half of all answers
            rarest = [choice for choice in choices if used[kind, choice.answer_class] == least]
            chosen = pick(rarest, g)
            choices.remove(chosen)
            answer_class, question, options, answer = chosen
            used[kind, answer_class] += 1

            # the options in random order
            if kind == 'obj_appearance_order':
                question, options, answer = ask_order(scene.first, g, used)
            if options is not None:
                options = shuffled(options, g)
                question = question.replace('{options}', ', '.join(options))
            records.append(as_record(kind, question, options, answer))
    return records


# -----------------------------------------------------------------------------
# where things are, seen from a camera: maps in words, and truths to ground words and tokens on

def in_map_frame(places, camera):
    """Places (..., n, 3) in the world -> metres right of the camera, ahead of it, above the floor.

    camera (..., 3, 4): extrinsics.
    """
    eye = invert_pose(camera)[..., :2, 3]  # (..., 2)
    x, y = F.normalize(camera[..., 2, :2], dim=-1).unbind(-1)  # ahead, on the plan
    right, ahead = torch.stack([y, -x], -1), torch.stack([x, y], -1)
    axes = torch.stack([right, ahead], -2)  # (..., 2, 2)
    plan = (places[..., :2] - eye[..., None, :]) @ axes.transpose(-1, -2)
    return torch.cat([plan, places[..., 2:]], -1)


def what_parts_show(rooms, surface, depth, extrinsics, intrinsics, size):
    """What each of 4 x 4 parts of a view (the mini VLM's image tokens) shows, and where that is.

    The place is the middle of the piece that fills most of the part (a quarter of it, at least),
    or else the mean of the points that are seen. surface, depth (R, V, h, w) of cells, extrinsics
    (R, V, 3, 4), intrinsics (R, V, 3, 3) for images of `size` = (H, W).
    -> shares of CLASSES (R, V, 16, classes), places (R, V, 16, 3) in the world
    """
    R, V, h, w = surface.shape

    def mean(x):
        """(R, V, h, w, c) -> (R, V, 16, c)"""
        x = x.flatten(0, 1).permute(0, 3, 1, 2)  # (R V, c, h, w)
        x = F.avg_pool2d(x, (h // 4, w // 4)).flatten(2)  # (R V, c, 16)
        return x.transpose(1, 2).unflatten(0, (R, V))

    points = points_in_world(depth, extrinsics, intrinsics, size)  # (R, V, h w, 3)
    shares = mean(F.one_hot(surface, 6 + K).float())[..., 6:]  # (R, V, 16, K)
    share, piece = shares.max(-1)
    middle = rooms.center[torch.arange(R)[:, None, None], piece]  # (R, V, 16, 3)
    seen = mean(points.unflatten(-2, (h, w)))
    places = torch.where(share[..., None] >= 0.25, middle, seen)
    classes = F.one_hot(surface_classes(rooms, surface), len(CLASSES)).float()
    return mean(classes), places


def where_categories_stand(rooms, room, camera):
    """Place (in_map_frame) of every category with one piece only; NaN for others. -> (C, 3)"""
    member = F.one_hot(rooms.category[room], len(CATEGORIES))  # (K, C)
    member = member * rooms.present[room, :, None]
    places = member.T.float() @ in_map_frame(rooms.center[room], camera)
    return places.masked_fill((member.sum(0) != 1)[:, None], math.nan)


def ask_map(rooms, room, cells, camera):
    """Where does everything stand that is seen? A map in words, in whole metres, not of VSI-Bench.

    camera (3, 4): extrinsics of the view whose axes the map has. -> (prompt, answer)
    """
    is_seen = rooms.present[room] & (cells.sum(0) >= SEEN)
    places = in_map_frame(rooms.center[room], camera)[:, :2].round().int().tolist()
    pieces = [(int(rooms.category[room, k]), *places[k]) for k in is_seen.nonzero()[:, 0].tolist()]
    answer = '; '.join(f'{CATEGORIES[c]} at x {x:+d}, y {y:+d}' for c, x, y in sorted(pieces))
    question = ('Where are the objects, in meters to the right (x) and ahead (y) of the first '
                'camera?')
    return as_prompt(dict(question_type='map', question=question, options=None)), answer or 'none'


def as_prompt(record):
    """The text that follows the pictures."""
    return prompt('vsibench', record)


def to_turns(before, turns):
    """[(question, answer)] -> conversations. `before` stands in front of the first question."""
    conversations = []
    for question, answer in turns:
        conversations.append({'from': 'human', 'value': before + question})
        conversations.append({'from': 'gpt', 'value': answer})
        before = ''
    return conversations


# -----------------------------------------------------------------------------
# data sets

class Block(NamedTuple):
    """A few rooms as questions need them."""
    start: int                # the number of the first room
    rooms: object             # Rooms
    images: torch.Tensor      # (R, V, H, W, 3) uint8
    surface: torch.Tensor     # (R, V, h, w) ids
    cells: torch.Tensor       # (R, V, K)
    extrinsics: torch.Tensor  # (R, V, 3, 4)
    shares: torch.Tensor      # (R, V, 16, classes) what each sixteenth of a view shows
    places: torch.Tensor      # (R, V, 16, 3) ... and where in the world


def view_rooms(split, seed, num_rooms, num_views, progress=iter):
    """-> Blocks of four rooms: up to three rooms more than `num_rooms`"""
    pool = RoomPool(split, seed, num_rooms)
    num_blocks = -(-num_rooms // pool.BLOCK)
    for index in progress(range(num_blocks)):
        rooms, views = pool.render_block(index, num_views)
        surface = views['surface'].long()
        cells = F.one_hot(surface.flatten(2), 6 + K)[..., 6:].sum(2)  # (R, V, K)
        shares, places = what_parts_show(rooms, surface, views['depth'], views['extrinsics'],
                                         views['intrinsics'], pool.size)
        images = views['images'].permute(0, 1, 3, 4, 2).contiguous()
        yield Block(index * pool.BLOCK, rooms, images, surface, cells, views['extrinsics'], shares,
                    places)


class RoomQuestions(torch.utils.data.Dataset):
    """Item i is room i, seen from VIEWS places of a walk, and everything that it is asked.

    To train on, half of the choices are asked in words, and every second room is asked for a map
    (`ask_map`) after its questions. `records`: the questions one by one, with `room`, the index
    of their room. `maps`: (prompt, answer) of every room. Items also hold `seen` (V, 16, classes
    + 3), what each sixteenth of a picture shows and where, and `stand` (C, 3), where the only
    piece of each category stands; both seen from the first camera.
    """
    VIEWS = 6

    def __init__(self, split, seed, num_rooms, progress=iter):
        self.seed, self.split = seed, split
        self.questions, self.records, self.maps = [], [], []
        images, seen, stand, used = [], [], [], collections.Counter()
        for block in view_rooms(split, seed, num_rooms, self.VIEWS, progress):
            images.append(block.images)
            places = in_map_frame(block.places, block.extrinsics[:, :1])
            seen.append(torch.cat([block.shares, places], -1))
            for room, cells in enumerate(block.cells):
                number, camera = block.start + room, block.extrinsics[room, 0]
                g = step_generator(seed, number, 5, split != 'train')
                self.questions.append(ask(block.rooms, room, cells, g, used))
                self.maps.append(ask_map(block.rooms, room, cells, camera))
                stand.append(where_categories_stand(block.rooms, room, camera))
                for record in self.questions[-1]:
                    self.records.append(dict(record, id=len(self.records), room=number))
        self.images = torch.cat(images).numpy()  # (rooms, V, H, W, 3)
        self.seen, self.stand = torch.cat(seen), torch.stack(stand)

    def __len__(self):
        return len(self.questions)

    def pictures(self, room):
        return [Image.fromarray(image) for image in self.images[room]]

    def item(self, i, turns):
        return dict(images=self.pictures(i), seen=self.seen[i], stand=self.stand[i],
                    conversations=to_turns('<image>' * self.VIEWS, turns))

    def map_of(self, i):
        """Room i's map from the first camera, and nothing else."""
        return self.item(i, [self.maps[i]])

    def __getitem__(self, i):
        g = step_generator(self.seed, i, 6)
        questions = shuffled(self.questions[i], g)
        if self.split == 'train':
            questions = [in_words(record) if pick([True, False], g) else record
                         for record in questions]
        turns = [(as_prompt(record), record['ground_truth']) for record in questions]
        if self.split == 'train' and i % 2:
            turns.append(self.maps[i])  # last: no answer can be read off it
        return self.item(i, turns)
