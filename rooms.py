"""
A small procedural world: furnished rooms, a walk through each, and a ray-caster.

Nothing can be assumed on a newcomer's machine, so the project carries its own data. A room is a box
with textured walls and up to ten pieces of furniture (boxes, ellipsoids and cylinders, of eight
categories). A walk is a noisy loop of views around it. `render` casts one ray per pixel, for many
rooms and views at once, and returns what a real data set would have to measure.

World: metres, z up, the origin on the floor in the middle of the room. Cameras as in model.py. The
same seed gives the same rooms; training and validation seeds never meet (`room_seed`). A new
category is a new line of FURNITURE.

    python rooms.py            # draws out/rooms.png: what the world looks like, and one room alone

R rooms    V views    K furniture slots per room    n = H W rays per view
S = 6 + K surfaces of a room: walls at x-, x+, y-, y+, floor, ceiling, furniture
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from common import InputError, Parser, run_script
from model import camera_rays, full_precision, look_along, relative_pose

# name: (shape, half sizes in metres (x, y, z) from .. to, colour). None: as x, the piece is round.
FURNITURE = {
    'table':   ('box',       ((0.45, 0.80), (0.30, 0.50), (0.30, 0.42)), (0.55, 0.35, 0.15)),
    'cabinet': ('box',       ((0.25, 0.45), (0.20, 0.30), (0.55, 0.75)), (0.85, 0.80, 0.70)),
    'bed':     ('box',       ((0.80, 1.00), (0.45, 0.80), (0.20, 0.30)), (0.25, 0.35, 0.75)),
    'ball':    ('ellipsoid', ((0.20, 0.40), None,         None),         (0.85, 0.15, 0.15)),
    'pouf':    ('ellipsoid', ((0.35, 0.60), (0.35, 0.60), (0.20, 0.30)), (0.75, 0.30, 0.70)),
    'barrel':  ('cylinder',  ((0.25, 0.40), None,         (0.40, 0.60)), (0.20, 0.60, 0.30)),
    'lamp':    ('cylinder',  ((0.06, 0.10), None,         (0.60, 0.80)), (0.95, 0.85, 0.20)),
    'bin':     ('cylinder',  ((0.15, 0.25), None,         (0.20, 0.30)), (0.30, 0.75, 0.80)),
}
CATEGORIES = list(FURNITURE)
STRUCTURE = ['floor', 'ceiling', 'wall']
CLASSES = STRUCTURE + CATEGORIES                             # what a pixel can show
SLOTS = [('box', 4), ('ellipsoid', 3), ('cylinder', 3)]      # the furniture slots of every room
K = sum(count for _, count in SLOTS)
FIRSTS = [sum(count for _, count in SLOTS[:i]) for i in range(len(SLOTS))]  # slot of each shape
FIELD_OF_VIEW = math.radians(80)
EYE_HEIGHT = (1.5, 1.75)                                     # metres
SCENE_UNIT = 3.0      # metres; the mini VGGT's unit of length, in which distances are near 1
SEEN = 4              # cells, over all pictures in question, from which on a piece is seen
FAR = 1e9


@dataclass(frozen=True)
class Style:
    """What rooms and walks are drawn from. Any other Style is a world never trained on."""
    sides: tuple = (3.5, 8.0)               # metres, from .. to
    furnished: float = 0.7                  # share of the slots
    waves: tuple = (2.0, 6.0)               # of the patterns of walls, radians a metre
    brightness: float = 1.0
    field_of_view: float = FIELD_OF_VIEW
    eye_height: tuple = EYE_HEIGHT


@dataclass
class Rooms:
    """R rooms as tensors (rooms[:2]: two). Slot k of room r is furnished only if present[r, k]."""
    size: torch.Tensor        # (R, 3) metres: x, y, height
    category: torch.Tensor    # (R, K) index into CATEGORIES
    present: torch.Tensor     # (R, K) bool
    center: torch.Tensor      # (R, K, 3) metres
    half: torch.Tensor        # (R, K, 3) metres, along the piece's own axes
    yaw: torch.Tensor         # (R, K) radians, about z
    colors: torch.Tensor      # (R, S, 2, 3) the two colours of each surface
    texture: torch.Tensor     # (R, S, 4) frequency and phase along the surface's u and v
    pattern: torch.Tensor     # (R, S) 0 checks, 1 and 2 stripes, 3 soft
    light: torch.Tensor       # (R, 3) unit vector towards the light

    def to(self, device):
        return Rooms(**{name: x.to(device) for name, x in vars(self).items()})

    def __getitem__(self, rows):
        return Rooms(**{name: x[rows] for name, x in vars(self).items()})

    def objects(self, room):
        """The furniture of one room: a list of {category, center, size, yaw}, metres, radians."""
        pieces = []
        for k in self.present[room].nonzero()[:, 0].tolist():
            pieces.append(dict(category=CATEGORIES[self.category[room, k]],
                               center=self.center[room, k].tolist(),
                               size=(2 * self.half[room, k]).tolist(),
                               yaw=self.yaw[room, k].item()))
        return pieces


def room_seed(split, seed, index):
    """The seed for block `index` of rooms: even for training, odd for validation."""
    return (2 * (seed * 1_000_003 + index) + (split != 'train')) % 2 ** 63


class Dice:
    """Random numbers from one generator."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def integer(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def sign(self, *shape):
        return 1.0 - 2.0 * self.integer(0, 2, *shape)


def make_rooms(num_rooms, seed, style=Style()):
    """`num_rooms` random rooms, a pure function of the arguments. -> Rooms on the CPU"""
    dice = Dice(seed)
    R = num_rooms
    low, high = style.sides
    sides = [dice.uniform(R, low=low, high=high) for _ in range(2)]
    size = torch.stack([*sides, dice.uniform(R, low=2.4, high=3.2)], -1)

    # what stands in the room: every slot draws among the categories of its shape
    shape_of = [shape for shape, _, _ in FURNITURE.values()]
    category = []
    for shape, count in SLOTS:
        fitting = torch.tensor([c for c, other in enumerate(shape_of) if other == shape])
        category.append(fitting[dice.integer(0, len(fitting), R, count)])
    category = torch.cat(category, 1)  # (R, K)

    # how large it is
    extents = [extents for _, extents, _ in FURNITURE.values()]
    is_copy = torch.tensor([[extent is None for extent in row] for row in extents])
    ranges = torch.tensor([[extent or row[0] for extent in row] for row in extents])  # (C, 3, 2)
    share = dice.uniform(R, K, 3)
    share = torch.where(is_copy[category], share[..., :1], share)
    low, high = ranges[category].unbind(-1)  # (R, K, 3)
    half = low + share * (high - low)
    yaw = dice.uniform(R, K, high=math.pi)
    present = dice.uniform(R, K) < style.furnished
    present[:, FIRSTS] = True  # one of each shape, if it finds a place

    center = place_furniture(dice, size, half, present)
    colors, texture, pattern, light = paint_rooms(dice, category, style.waves)
    colors = style.brightness * colors
    return Rooms(size, category, present, center, half, yaw, colors, texture, pattern, light)


def place_furniture(dice, size, half, present):
    """Places one piece after the other. -> centers (R, K, 3); `present` loses those without room.

    Of 24 random spots, a piece takes the first one that is clear of all earlier pieces.
    """
    R = len(size)
    radius = half[..., :2].norm(dim=-1)  # (R, K)
    center = torch.cat([torch.zeros(R, K, 2), half[..., 2:]], -1)  # all stand on the floor
    for k in range(K):
        reach = size[:, None, :2] / 2 - radius[:, k, None, None] - 0.05  # (R, 1, 2)
        spot = (2 * dice.uniform(R, 24, 2) - 1) * reach  # (R, 24, 2)
        gap = torch.full((R, 24), FAR)
        if k > 0:
            gap = (spot[:, :, None] - center[:, None, :k, :2]).norm(dim=-1)
            gap = gap - radius[:, None, :k] - radius[:, k, None, None]  # (R, 24, k)
            gap = gap.masked_fill(~present[:, None, :k], FAR).amin(-1)
        first_clear = (gap > 0.1).float().argmax(1)
        pick = torch.arange(R), first_clear
        present[:, k] &= gap[pick] > 0.1
        center[:, k, :2] = spot[pick]
    return center


def paint_rooms(dice, category, waves):
    """Walls of any colour, furniture near its category's. -> colors, texture, pattern, light."""
    R, S = len(category), 6 + K
    first = dice.uniform(R, S, 3, low=0.2, high=0.9)
    paint = torch.tensor([colour for _, _, colour in FURNITURE.values()])
    first[:, 6:] = (paint[category] + 0.12 * dice.normal(R, K, 3)).clamp(0.05, 1)
    second = (first + 0.7 * (dice.uniform(R, S, 3) - 0.5)).clamp(0.02, 1)
    second[:, 6:] = first[:, 6:] * dice.uniform(R, K, 1, low=0.35, high=0.8)
    frequency = dice.uniform(R, S, 2, low=waves[0], high=waves[1])
    frequency[:, 6:] = dice.uniform(R, K, 2, low=4.0, high=11.0)
    phase = dice.uniform(R, S, 2, high=2 * math.pi)
    pattern = dice.integer(0, 4, R, S)
    azimuth = dice.uniform(R, high=2 * math.pi)
    light = [0.43 * azimuth.cos(), 0.43 * azimuth.sin(), torch.full((R,), 0.9)]
    light = F.normalize(torch.stack(light, -1), dim=-1)
    return torch.stack([first, second], 2), torch.cat([frequency, phase], -1), pattern, light


# -----------------------------------------------------------------------------
# cameras

def make_walk(rooms, num_views, seed, style=Style()):
    """A walk around each room, views in walking order. -> extrinsics (R, V, 3, 4), world-to-camera.

    A noisy loop that looks inward, with a quarter of the views turned away by
    30 to 100 degrees. Of eight places for a view it takes the first that is 0.3 m
    from tall furniture, or else the one that is farthest from it.
    """
    dice = Dice(seed + 2 ** 40)  # other numbers than those that gave the room its sides
    R, V = len(rooms.size), num_views
    tries = 8
    limit = rooms.size[:, None, None, :2] / 2 - 0.35  # (R, 1, 1, 2)

    # where: along a loop; of a few radii the first that is clear of tall furniture
    start = dice.uniform(R, 1, high=2 * math.pi)
    sign = dice.sign(R, 1)
    steps = dice.uniform(R, V, low=math.radians(15), high=math.radians(60))
    angle = start + sign * steps.cumsum(1)  # (R, V)
    direction = torch.stack([angle.cos(), angle.sin()], -1)[:, :, None]  # (R, V, 1, 2)
    radius = dice.uniform(R, V, tries, 1, low=0.5, high=1.0)
    spot = direction * radius * 1.1 * limit  # (R, V, tries, 2)
    spot = torch.maximum(torch.minimum(spot, limit), -limit)
    gap = clearance(rooms, spot, style.eye_height)  # (R, V, tries)
    is_clear = gap > 0.3
    best = torch.where(is_clear.any(-1), is_clear.float().argmax(-1), gap.argmax(-1))
    xy = spot.gather(2, best[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    low, high = style.eye_height
    z = dice.uniform(R, 1, 1, low=low, high=high) + 0.04 * dice.normal(R, V, 1)
    position = torch.cat([xy, z], -1)  # (R, V, 3)

    # whereto: a point near the middle, or away from it
    aim = 0.12 * rooms.size[:, None, :2] * dice.normal(R, V, 2) - xy
    is_away = dice.uniform(R, V) < 0.25
    sign = dice.sign(R, V)
    away = sign * dice.uniform(R, V, low=math.radians(30), high=math.radians(100))
    turn = torch.where(is_away, away, 0.1 * dice.normal(R, V))
    yaw = torch.atan2(aim[..., 1], aim[..., 0]) + turn
    pitch = dice.uniform(R, V, low=math.radians(-28), high=math.radians(-4))
    roll = math.radians(2) * dice.normal(R, V)
    return cameras_at(position, yaw, pitch, roll)


def clearance(rooms, xy, eye_height=EYE_HEIGHT):
    """Metres from places (R, ..., 2) to furniture whose top is less than 0.4 m below the lowest
    eye. -> (R, ...)"""
    tall = rooms.present & (rooms.center[..., 2] + rooms.half[..., 2] > eye_height[0] - 0.4)
    flat = xy.flatten(1, -2)  # (R, places, 2)
    gap = (flat[:, :, None] - rooms.center[:, None, :, :2]).norm(dim=-1)  # (R, places, K)
    gap = gap - rooms.half[:, None, :, :2].norm(dim=-1)
    return gap.masked_fill(~tall[:, None], FAR).amin(-1).view(xy.shape[:-1])


def cameras_at(position, yaw, pitch, roll):
    """Cameras at `position` (R, V, 3), turned by yaw (0 looks along x), pitch (up), roll (R, V).

    Angles in radians. -> extrinsics (R, V, 3, 4)
    """
    forward = torch.stack([yaw.cos() * pitch.cos(), yaw.sin() * pitch.cos(), pitch.sin()], -1)
    level = look_along(position, forward, torch.tensor([0.0, 0.0, -1.0]).expand_as(forward))
    cos, sin, zero = roll.cos(), roll.sin(), torch.zeros_like(roll)
    turn = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, zero + 1], -1)
    return turn.unflatten(-1, (3, 3)) @ level


def make_intrinsics(size, *batch, field_of_view=FIELD_OF_VIEW):
    """Pinhole, `field_of_view` across the shorter side of `size` = (H, W). -> (*batch, 3, 3)"""
    H, W = size
    focal = min(H, W) / 2 / math.tan(field_of_view / 2)
    intrinsics = torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]])
    return intrinsics.expand(*batch, 3, 3).clone()


def scene_extrinsics(extrinsics):
    """Extrinsics (B, V, 3, 4), metres, in any world -> as the mini VGGT states
    them: SCENE_UNITs, in the first camera's frame."""
    extrinsics = relative_pose(extrinsics, extrinsics[:, :1])
    return torch.cat([extrinsics[..., :3], extrinsics[..., 3:] / SCENE_UNIT], -1)


# -----------------------------------------------------------------------------
# the ray-caster. Vectors are three tensors (x, y, z), not one with a last axis
# of three: ray-casting is bound by memory traffic, and so every operation runs
# on long contiguous rows.

def away_from_zero(x, eps=1e-6):
    """Keeps the sign: a clamp of -1e-9 to +1e-6 would send a ray backwards."""
    return torch.where(x >= 0, x.clamp(min=eps), x.clamp(max=-eps))


def hit_box(o, d):
    """First hit of o + t d with the cube [-1, 1]^3, from outside. o: 3 x (..., 1), d: 3 x (..., n)

    -> t (..., n), FAR where there is none.
    """
    near, far = -FAR, FAR
    for oi, di in zip(o, d):
        inverse = 1 / away_from_zero(di)
        middle = -oi * inverse
        reach = inverse.abs()
        near = (middle - reach).clamp(min=near)
        far = (middle + reach).clamp(max=far)
    return torch.where((near < far) & (near > 0), near, FAR)


def hit_round(o, d):
    """First hit with the unit sphere (three coordinates), or an endless upright tube (two)."""
    a = sum(di * di for di in d)
    b = sum(di * oi for di, oi in zip(d, o))
    c = sum(oi * oi for oi in o) - 1
    root = b * b - a * c
    t = (-b - root.clamp(min=0).sqrt()) / a.clamp(min=1e-9)
    return torch.where((root > 0) & (t > 0), t, FAR)


def hit_cylinder(o, d):
    """First hit with the upright cylinder of radius 1 and height [-1, 1], its side or its top."""
    side = hit_round(o[:2], d[:2])
    side = torch.where((o[2] + side * d[2]).abs() < 1, side, FAR)
    top = (1 - o[2]) / away_from_zero(d[2])
    on_top = (o[0] + top * d[0]).square() + (o[1] + top * d[1]).square() < 1
    return torch.minimum(side, torch.where(on_top & (top > 0), top, FAR))


HIT = {'box': hit_box, 'ellipsoid': hit_round, 'cylinder': hit_cylinder}


@torch.no_grad()
@full_precision
def render(rooms, extrinsics, intrinsics, size):
    """Casts one ray per pixel. extrinsics (R, V, 3, 4), intrinsics (R, V, 3, 3), `size` = (H, W).

    -> dict of image (R, V, 3, H, W) uint8; depth (R, V, H, W), metres along the optical axis;
       surface (R, V, H, W) uint8: 0-3 walls, 4 floor, 5 ceiling, 6 + k the furniture in slot k.
    All on one device, and always in fp32: a caller's autocast does not reach the pixels.
    """
    (H, W), (R, V) = size, extrinsics.shape[:2]
    rays = camera_rays(intrinsics, size, size).transpose(-1, -2)  # (R, V, 3, n)
    rotation = extrinsics[..., :3].transpose(-1, -2)  # camera -> world
    eye = -rotation @ extrinsics[..., 3:]  # (R, V, 3, 1)
    d = rotation @ rays  # (R, V, 3, n) in world
    dx, dy, dz = d.unbind(2)  # (R, V, n)
    ox, oy, oz = eye.unbind(2)  # (R, V, 1)

    # the room itself: of the three planes that the ray heads for, the nearest
    walls = rooms.size / rooms.size.new_tensor([2, 2, 1])
    hx, hy, hz = walls.T[..., None, None]  # (R, 1, 1)
    tx = (torch.where(dx >= 0, hx, -hx) - ox) / away_from_zero(dx)
    ty = (torch.where(dy >= 0, hy, -hy) - oy) / away_from_zero(dy)
    tz = (torch.where(dz >= 0, hz, torch.zeros_like(hz)) - oz) / away_from_zero(dz)
    t = torch.minimum(torch.minimum(tx, ty), tz)
    on_z = 4 + (dz >= 0).int()
    on_y = 2 + (dy >= 0).int()
    on_x = (dx >= 0).int()
    surface = torch.where(t == tx, on_x, torch.where(t == ty, on_y, on_z))

    # the furniture: a piece sees the rays in its own frame, as a unit shape. t stays the same.
    cos, sin = rooms.yaw.cos(), rooms.yaw.sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], -1).view(R, K, 3, 3)
    to_unit = (turn / rooms.half[..., None]).transpose(0, 1)  # (K, R, 3, 3)
    shapes = [shape for shape, count in SLOTS for _ in range(count)]
    for k, shape in enumerate(shapes):
        origin = eye - rooms.center[:, None, k, :, None]
        d_k = (to_unit[k, :, None] @ d).unbind(2)  # 3 x (R, V, n)
        o_k = (to_unit[k, :, None] @ origin).unbind(2)  # 3 x (R, V, 1)
        t_k = HIT[shape](o_k, d_k)
        is_nearer = (t_k < t) & rooms.present[:, k, None, None]
        t = torch.where(is_nearer, t_k, t)
        surface = torch.where(is_nearer, 6 + k, surface)

    # colours, of all views of a room in one row of V n rays
    point = [(o + t * step).flatten(1) for o, step in ((ox, dx), (oy, dy), (oz, dz))]
    image = shade(rooms, surface.flatten(1).long(), point, t.flatten(1))  # (R, 3, V n)
    image = image.view(R, 3, V, H, W).transpose(1, 2).contiguous()
    return dict(image=image, depth=t.view(R, V, H, W),
                surface=surface.view(R, V, H, W).to(torch.uint8))


def look_up(table, index):
    """Rows of a table (R, S, c) by index (R, n) -> c tensors (R, n)."""
    index = index[:, None].expand(-1, table.shape[2], -1)  # (R, c, n)
    return table.transpose(1, 2).gather(2, index).unbind(1)


def shade(rooms, surface, point, depth):
    """Two colours mixed by a pattern in the surface's own coordinates u and v, lit from one side.

    surface (R, n), point 3 x (R, n), depth (R, n) -> (R, 3, n) uint8.
    """
    is_piece = surface >= 6
    wall_normal, *wall_uv = wall_coordinates(surface, point)
    piece_normal, *piece_uv = piece_coordinates(rooms, surface, point)
    nx, ny, nz = [torch.where(is_piece, a, b) for a, b in zip(piece_normal, wall_normal)]
    u, v = [torch.where(is_piece, a, b) for a, b in zip(piece_uv, wall_uv)]

    # the pattern: checks, stripes along u or v, or soft
    fu, fv, pu, pv = look_up(rooms.texture, surface)
    pattern, = look_up(rooms.pattern[..., None], surface)
    wave_u = (u * fu + pu).sin()
    wave_v = (v * fv + pv).sin()
    stripe_u = (4 * wave_u).clamp(-1, 1)
    stripe_v = (4 * wave_v).clamp(-1, 1)
    mix = 0.5 * (wave_u + wave_v)
    for kind, values in enumerate((stripe_u * stripe_v, stripe_u, stripe_v)):
        mix = torch.where(pattern == kind, values, mix)
    mix = 0.5 + 0.5 * mix

    # the light, weaker with depth
    lx, ly, lz = rooms.light.T[..., None]  # (R, 1)
    light = 0.72 + 0.28 * (nx * lx + ny * ly + nz * lz)
    light = 255 * light / (1 + 0.01 * depth.square())
    channels = []
    first, second = rooms.colors.unbind(2)  # (R, S, 3)
    for a, b in zip(look_up(first, surface), look_up(second, surface)):
        channels.append(((a + (b - a) * mix) * light).clamp(0, 255).to(torch.uint8))
    return torch.stack(channels, 1)


def wall_coordinates(surface, point):
    """Of walls, floor and ceiling: the inward normal, and the other two axes. -> normal, u, v"""
    x, y, z = point
    on_x = surface < 2
    on_xy = surface < 4
    side = 1.0 - 2.0 * (surface % 2)
    none = torch.zeros_like(x)
    normal = [torch.where(on_x, side, none), torch.where(on_xy & ~on_x, side, none),
              torch.where(on_xy, none, side)]
    return normal, torch.where(on_x, y, x), torch.where(on_xy, z, y)


def piece_coordinates(rooms, surface, point):
    """Of furniture: the normal in the world, coordinates in the piece's frame. -> normal, u, v"""
    x, y, z = point
    slot = (surface - 6).clamp(min=0)
    cos, sin = look_up(torch.stack([rooms.yaw.cos(), rooms.yaw.sin()], -1), slot)
    cx, cy, cz = look_up(rooms.center, slot)
    hx, hy, hz = look_up(rooms.half, slot)

    # in the piece's frame: in metres, and in half sizes
    lx = cos * (x - cx) + sin * (y - cy)
    ly = cos * (y - cy) - sin * (x - cx)
    lz = z - cz
    ux, uy, uz = lx / hx, ly / hy, lz / hz

    # which face of a box; which side of a cylinder
    _, first_ball, first_cylinder = FIRSTS
    is_box = slot < first_ball
    is_ball = (slot >= first_ball) & (slot < first_cylinder)
    face_x = (ux.abs() >= uy.abs()) & (ux.abs() >= uz.abs())
    face_z = (uz.abs() > uy.abs()) & ~face_x
    face_y = ~face_x & ~face_z
    is_top = uz > 0.999

    # the normal: of the face of a box, of an ellipsoid, of the top or the side of a cylinder
    gx, gy, gz = ux / hx, uy / hy, uz / hz
    none = torch.zeros_like(x)
    nx = torch.where(is_box, face_x * ux, torch.where(is_top & ~is_ball, none, gx))
    ny = torch.where(is_box, face_y * uy, torch.where(is_top & ~is_ball, none, gy))
    nz = torch.where(is_box, face_z * uz, torch.where(is_ball, gz, is_top.float()))
    length = (nx * nx + ny * ny + nz * nz).sqrt().clamp(min=1e-6)
    normal = [(cos * nx - sin * ny) / length, (sin * nx + cos * ny) / length, nz / length]

    around = 0.4 * torch.atan2(uy, ux)
    u = torch.where(is_box, torch.where(face_x, ly, lx), around)
    v = torch.where(is_box & face_z, ly, lz)
    return normal, u, v


def surface_classes(rooms, surface):
    """Surface ids (R, ...) -> indices into CLASSES, long."""
    flat = surface.flatten(1).long()
    category = rooms.category.to(flat.device).gather(1, (flat - 6).clamp(min=0))
    structure = torch.where(flat == 4, 0, torch.where(flat == 5, 1, 2))  # indices into STRUCTURE
    return torch.where(flat >= 6, category + len(STRUCTURE), structure).view(surface.shape)


def check_classes(classes, source, command='python mini_vggt.py'):
    """Raises InputError if `source` was made for other categories than those of this world."""
    if list(classes) != CLASSES:
        names = ", ".join(classes) or "nothing that it names"
        raise InputError(f'{source} tells apart {names}, but the rooms have {", ".join(CLASSES)}: '
                         f'make it anew with {command}')


def main(argv=None):
    """Draws five rooms, eight views each; of the first, six views alone, and its furniture."""
    Parser(description=__doc__).parse_args(argv)  # --help
    rooms = make_rooms(5, seed=room_seed('val', 0, 0))
    size = 128, 128
    views = render(rooms, make_walk(rooms, 8, seed=1), make_intrinsics(size, 5, 8), size)
    picture = views['image'].permute(0, 3, 1, 4, 2).reshape(5 * 128, 8 * 128, 3)
    os.makedirs('out', exist_ok=True)
    Image.fromarray(picture.numpy()).save('out/rooms.png')
    for i, view in enumerate(views['image'][0, :6].permute(0, 2, 3, 1)):
        Image.fromarray(view.numpy()).save(f'out/room-{i}.png')
    for piece in rooms.objects(0):
        x, y, _ = piece['center']
        sides = ' x '.join(f'{side:.2f}' for side in piece['size'])
        print(f'{piece["category"]:8s} at {x:5.2f} {y:5.2f}  size {sides} m')
    print('a row of out/rooms.png is a walk through one room, the first through this one; '
          'out/room-0.png to room-5.png are its views')


if __name__ == '__main__':
    run_script(main)
