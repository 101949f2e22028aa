"""
A small procedural world: furnished rooms, a walk through each, and a ray-caster.

Nothing can be assumed on a newcomer's machine, so the project carries its own data.
A room is a box with textured walls and up to ten pieces of furniture (boxes,
ellipsoids, cylinders, of eight categories); a walk is a noisy loop of views around
it. `render` casts one ray per pixel, for a batch of rooms and views at once, in
plain torch on any device, and returns what a real data set would have to measure:
colour, depth, object id, camera.

World: metres, z up, origin on the floor in the middle of the room. Cameras: OpenCV
axes, extrinsics world-to-camera, intrinsics in pixels. The same seed gives the same
rooms; training and validation seeds never meet (`room_seed`). From the same lists of objects come questions and answers
in VSI-Bench's wording (`ask`).

    python rooms.py            # draws out/rooms.png: what the world looks like

R rooms   V views   K furniture slots a room   S = 6 + K surfaces (x-, x+, y-, y+ walls, floor, ceiling, furniture)
"""
import itertools
import math
import os
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from model import camera_rays

# name: (shape, half sizes in metres (x, y, z) from .. to, colour). A range of None copies x: the piece is round.
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
CLASSES = ['floor', 'ceiling', 'wall'] + CATEGORIES                       # what a pixel can show
SLOTS = [('box', 4), ('ellipsoid', 3), ('cylinder', 3)]                   # the furniture slots of every room, by shape
K = sum(count for _, count in SLOTS)
FIELD_OF_VIEW = math.radians(80)
EYE_HEIGHT = (1.5, 1.75)                                                  # metres
FAR = 1e9


@dataclass
class Rooms:
    """R rooms as tensors; slot k of room r is there only if present[r, k]."""
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
        return Rooms(*(getattr(self, f.name).to(device) for f in fields(self)))

    def objects(self, room):
        """The furniture of one room: a list of {category, center, size, yaw} in metres and radians."""
        return [dict(category=CATEGORIES[self.category[room, k]], center=self.center[room, k].tolist(),
                     size=(2 * self.half[room, k]).tolist(), yaw=self.yaw[room, k].item())
                for k in range(K) if self.present[room, k]]


def room_seed(split, seed, index):
    """A seed for block `index` of rooms: even for training, odd for validation, so that no room is ever in both."""
    return 2 * (seed * 1_000_003 + index) + (split != 'train')


def make_rooms(num_rooms, seed):
    """`num_rooms` random rooms, a pure function of the arguments. -> Rooms on the CPU."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape, low=0.0, high=1.0: low + (high - low) * torch.rand(*shape, generator=g)
    R = num_rooms
    size = torch.stack([rand(R, low=3.5, high=8.0), rand(R, low=3.5, high=8.0), rand(R, low=2.4, high=3.2)], -1)

    # what stands in the room, and how large it is
    shape_of = [shape for shape, _, _ in FURNITURE.values()]
    choices = [torch.tensor([c for c, s in enumerate(shape_of) if s == shape]) for shape, _ in SLOTS]
    category = torch.cat([choice[torch.randint(len(choice), (R, count), generator=g)]
                          for choice, (_, count) in zip(choices, SLOTS)], 1)              # (R, K)
    ranges = torch.tensor([[extent or extents[0] for extent in extents] for _, extents, _ in FURNITURE.values()])
    is_copy = torch.tensor([[extent is None for extent in extents] for _, extents, _ in FURNITURE.values()])
    draw = rand(R, K, 3)
    draw = torch.where(is_copy[category], draw[..., :1], draw)
    half = ranges[category][..., 0] + draw * (ranges[category][..., 1] - ranges[category][..., 0])
    yaw = rand(R, K, high=math.pi)
    present = rand(R, K) < 0.7
    first = torch.tensor([0, *torch.tensor([count for _, count in SLOTS]).cumsum(0)[:-1]])
    present[:, first] = True                                                              # one of each shape, if it finds a place

    # place one piece after the other: of 24 random spots the first one clear of all earlier pieces, else none
    radius = half[..., :2].norm(dim=-1)
    center = torch.cat([torch.zeros(R, K, 2), half[..., 2:]], -1)                         # all stand on the floor
    for k in range(K):
        spot = (2 * rand(R, 24, 2) - 1) * (size[:, None, :2] / 2 - radius[:, k, None, None] - 0.05)
        gap = (spot[:, :, None] - center[:, None, :k, :2]).norm(dim=-1) - radius[:, None, :k] - radius[:, k, None, None]
        gap = gap.masked_fill(~present[:, None, :k], FAR).amin(-1) if k else torch.full((R, 24), FAR)
        best = (gap > 0.1).float().argmax(1)                                              # the first clear one
        pick = torch.arange(R), best
        present[:, k] &= gap[pick] > 0.1
        center[:, k, :2] = spot[pick]

    # paint: walls of any colour, furniture near its category's
    S = 6 + K
    base = rand(R, S, 3, low=0.2, high=0.9)
    paint = torch.tensor([colour for _, _, colour in FURNITURE.values()])
    base[:, 6:] = (paint[category] + 0.12 * torch.randn(R, K, 3, generator=g)).clamp(0.05, 1)
    second = (base + 0.7 * (rand(R, S, 3) - 0.5)).clamp(0.02, 1)
    second[:, 6:] = base[:, 6:] * rand(R, K, 1, low=0.35, high=0.8)
    frequency = rand(R, S, 2, low=2.0, high=6.0)
    frequency[:, 6:] = rand(R, K, 2, low=4.0, high=11.0)
    texture = torch.cat([frequency, rand(R, S, 2, high=2 * math.pi)], -1)
    pattern = torch.randint(0, 4, (R, S), generator=g)
    azimuth = rand(R, high=2 * math.pi)
    light = F.normalize(torch.stack([0.43 * azimuth.cos(), 0.43 * azimuth.sin(), torch.full((R,), 0.9)], -1), dim=-1)
    return Rooms(size, category, present, center, half, yaw, torch.stack([base, second], 2), texture, pattern, light)


# -----------------------------------------------------------------------------
# cameras

def make_walk(rooms, num_views, seed):
    """A walk around each room: `num_views` views in walking order. -> extrinsics (R, V, 3, 4), world-to-camera.

    A noisy loop that looks inward, a quarter of the views turned away by 30 to 100 degrees; cameras keep 0.3 m from
    furniture that reaches their height.
    """
    g = torch.Generator().manual_seed(seed + 2 ** 40)         # not the room's own draws: the walk must not tell its size
    rand = lambda *shape, low=0.0, high=1.0: low + (high - low) * torch.rand(*shape, generator=g)
    sign = lambda *shape: 1.0 - 2.0 * torch.randint(0, 2, shape, generator=g)
    R, V, tries = len(rooms.size), num_views, 8
    limit = rooms.size[:, :2] / 2 - 0.35                                                  # (R, 2)

    # where: along a loop, of a few radii the first that is clear of tall furniture
    angle = rand(R, 1, high=2 * math.pi) + sign(R, 1) * rand(R, V, low=math.radians(15), high=math.radians(60)).cumsum(1)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    spot = direction[:, :, None] * rand(R, V, tries, 1, low=0.5, high=1.0) * 1.1 * limit[:, None, None]
    spot = torch.maximum(torch.minimum(spot, limit[:, None, None]), -limit[:, None, None])  # (R, V, tries, 2)
    gap = clearance(rooms, spot)                                                          # (R, V, tries)
    best = torch.where((gap > 0.3).any(-1), (gap > 0.3).float().argmax(-1), gap.argmax(-1))
    xy = spot.gather(2, best[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    z = rand(R, 1, 1, low=EYE_HEIGHT[0], high=EYE_HEIGHT[1]) + 0.04 * torch.randn(R, V, 1, generator=g)
    position = torch.cat([xy, z], -1)                                                     # (R, V, 3)

    # whereto: a point near the middle, or away from it
    aim = 0.12 * rooms.size[:, None, :2] * torch.randn(R, V, 2, generator=g) - xy
    turn = torch.where(rand(R, V) < 0.25, sign(R, V) * rand(R, V, low=math.radians(30), high=math.radians(100)),
                       0.1 * torch.randn(R, V, generator=g))
    yaw = torch.atan2(aim[..., 1], aim[..., 0]) + turn
    pitch = rand(R, V, low=math.radians(-28), high=math.radians(-4))
    roll = math.radians(2) * torch.randn(R, V, generator=g)
    return cameras_at(position, yaw, pitch, roll)


def make_path(rooms, num_views):
    """A smooth closed path through each room, for a film: `num_views` views. -> extrinsics (R, V, 3, 4), world-to-camera.

    An ellipse at eye height that looks across the room; of a few sizes, the one that is clearest of tall furniture.
    """
    R, V = len(rooms.size), num_views
    angle = 2 * math.pi * torch.arange(V) / V
    circle = torch.stack([angle.cos(), angle.sin()], -1)                                  # (V, 2)
    shares = torch.linspace(0.8, 0.4, 9)
    xy = (rooms.size[:, None, None, :2] / 2 - 0.35) * shares[:, None, None] * circle      # (R, 9, V, 2)
    best = clearance(rooms, xy).amin(-1).argmax(-1)                                       # (R,)
    xy = xy[torch.arange(R), best]                                                        # (R, V, 2)
    position = F.pad(xy, (0, 1), value=sum(EYE_HEIGHT) / 2)
    yaw = torch.atan2(-xy[..., 1], -xy[..., 0])
    pitch = math.radians(-16) + math.radians(6) * (2 * angle).sin().expand(R, V)
    return cameras_at(position, yaw, pitch, torch.zeros(R, V))


def clearance(rooms, xy):
    """Metres between places xy (R, ..., 2) on the floor plan and the nearest furniture that reaches a camera's height. -> (R, ...)"""
    tall = rooms.present & (rooms.center[..., 2] + rooms.half[..., 2] > EYE_HEIGHT[0] - 0.4)
    flat = xy.flatten(1, -2)                                                              # (R, n, 2)
    gap = (flat[:, :, None] - rooms.center[:, None, :, :2]).norm(dim=-1) - rooms.half[:, None, :, :2].norm(dim=-1)
    return gap.masked_fill(~tall[:, None], FAR).amin(-1).view(xy.shape[:-1])


def cameras_at(position, yaw, pitch, roll):
    """Cameras at `position` (R, V, 3), turned by yaw (0 looks along x), pitch (up) and roll (R, V), radians. -> extrinsics (R, V, 3, 4)"""
    forward = torch.stack([yaw.cos() * pitch.cos(), yaw.sin() * pitch.cos(), pitch.sin()], -1)
    right = F.normalize(torch.cross(forward, torch.tensor([0., 0., 1.]).expand_as(forward), dim=-1), dim=-1)
    down = torch.cross(forward, right, dim=-1)
    cos, sin = roll.cos()[..., None], roll.sin()[..., None]
    rotation = torch.stack([cos * right + sin * down, cos * down - sin * right, forward], -2)  # (R, V, 3, 3), rows: camera axes
    return torch.cat([rotation, -rotation @ position[..., None]], -1)


def make_intrinsics(size, *batch):
    """Pinhole of FIELD_OF_VIEW across the shorter side, square pixels. -> (*batch, 3, 3) for `size` = (H, W)."""
    H, W = size
    focal = min(H, W) / 2 / math.tan(FIELD_OF_VIEW / 2)
    return torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]).expand(*batch, 3, 3).clone()


# -----------------------------------------------------------------------------
# the ray-caster. Coordinates come as three tensors (x, y, z) rather than as a last axis of three: ray-casting is
# bound by memory traffic, and this keeps every operation on long contiguous rows.

def away_from_zero(x, eps=1e-6):
    """Keeps the sign: a clamp that turned -1e-9 into +1e-6 would send a ray backwards."""
    return torch.where(x >= 0, x.clamp(min=eps), x.clamp(max=-eps))


def hit_box(o, d):
    """First hit of o + t d with the cube [-1, 1]^3, seen from outside. o: 3 x (..., 1), d: 3 x (..., n) -> t (..., n)."""
    near, far = -FAR, FAR
    for oi, di in zip(o, d):
        inverse = 1 / away_from_zero(di)
        middle, reach = -oi * inverse, inverse.abs()
        near, far = (middle - reach).clamp(min=near), (middle + reach).clamp(max=far)
    return torch.where((near < far) & (near > 0), near, FAR)


def hit_round(o, d):
    """... with the unit sphere in as many dimensions as `o` has: a sphere of three, an endless upright tube of two."""
    a, b, c = sum(di * di for di in d), sum(di * oi for di, oi in zip(d, o)), sum(oi * oi for oi in o) - 1
    root = b * b - a * c
    t = (-b - root.clamp(min=0).sqrt()) / a.clamp(min=1e-9)
    return torch.where((root > 0) & (t > 0), t, FAR)


def hit_cylinder(o, d):
    """... with the upright cylinder of radius 1 and height [-1, 1]: its side or its top (it stands on the floor)."""
    side = hit_round(o[:2], d[:2])
    side = torch.where((o[2] + side * d[2]).abs() < 1, side, FAR)
    top = (1 - o[2]) / away_from_zero(d[2])
    on_top = (o[0] + top * d[0]).square() + (o[1] + top * d[1]).square() < 1
    return torch.minimum(side, torch.where(on_top & (top > 0), top, FAR))


HIT = {'box': hit_box, 'ellipsoid': hit_round, 'cylinder': hit_cylinder}


def render(rooms, extrinsics, intrinsics, size):
    """Casts one ray per pixel. extrinsics (R, V, 3, 4), intrinsics (R, V, 3, 3), `size` = (H, W) pixels, one device.

    -> dict of image (R, V, 3, H, W) uint8; depth (R, V, H, W) metres along the optical axis;
       surface (R, V, H, W) uint8: 0-3 walls, 4 floor, 5 ceiling, 6 + k the furniture in slot k.
    """
    (H, W), (R, V) = size, extrinsics.shape[:2]
    rays = camera_rays(intrinsics, size, size).transpose(-1, -2)                          # (R, V, 3, n), n = H W
    rotation = extrinsics[..., :3].transpose(-1, -2)                                      # camera -> world
    eye = -rotation @ extrinsics[..., 3:]                                                 # (R, V, 3, 1)
    d = rotation @ rays                                                                   # (R, V, 3, n) in the world
    dx, dy, dz = d.unbind(2)                                                              # (R, V, n)
    ox, oy, oz = eye.unbind(2)                                                            # (R, V, 1)

    # the room itself: of the three planes that the ray heads for, the nearest
    hx, hy, hz = (rooms.size / rooms.size.new_tensor([2, 2, 1])).T[..., None, None]       # (R, 1, 1)
    tx = (torch.where(dx >= 0, hx, -hx) - ox) / away_from_zero(dx)
    ty = (torch.where(dy >= 0, hy, -hy) - oy) / away_from_zero(dy)
    tz = (torch.where(dz >= 0, hz, torch.zeros_like(hz)) - oz) / away_from_zero(dz)
    t = torch.minimum(torch.minimum(tx, ty), tz)
    surface = torch.where(t == tx, (dx >= 0).int(), torch.where(t == ty, 2 + (dy >= 0).int(), 4 + (dz >= 0).int()))

    # the furniture: each piece sees the rays in its own frame, where it is a unit shape; t stays the same
    cos, sin, zero, one = rooms.yaw.cos(), rooms.yaw.sin(), torch.zeros_like(rooms.yaw), torch.ones_like(rooms.yaw)
    turn = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], -1).view(R, K, 3, 3)  # world -> piece
    to_unit = (turn / rooms.half[..., None]).transpose(0, 1)                              # (K, R, 3, 3)
    start = 0
    for shape, count in SLOTS:
        for k in range(start, start + count):
            d_k = (to_unit[k, :, None] @ d).unbind(2)                                     # 3 x (R, V, n)
            o_k = (to_unit[k, :, None] @ (eye - rooms.center[:, None, k, :, None])).unbind(2)  # 3 x (R, V, 1)
            t_k = HIT[shape](o_k, d_k)
            nearer = (t_k < t) & rooms.present[:, k, None, None]
            t, surface = torch.where(nearer, t_k, t), torch.where(nearer, 6 + k, surface)
        start += count
    point = [ox + t * dx, oy + t * dy, oz + t * dz]
    image = shade(rooms, surface.flatten(1).long(), [p.flatten(1) for p in point], t.flatten(1))
    return dict(image=image.view(R, 3, V, H, W).transpose(1, 2).contiguous(), depth=t.view(R, V, H, W),
                surface=surface.view(R, V, H, W).to(torch.uint8))


def shade(rooms, surface, point, depth):
    """Colour of every hit: two colours mixed in the surface's own coordinates, lit from one side.

    surface (R, n), point 3 x (R, n), depth (R, n) -> (R, 3, n) uint8.
    """
    def of(table, index=surface):                                                         # rows of (R, S, c) per hit, c x (R, n)
        return table.transpose(1, 2).gather(2, index[:, None].expand(-1, table.shape[2], -1)).unbind(1)

    # on the room's faces: the normal points inward, the texture runs along the other two axes
    x, y, z = point
    on_x, on_y = surface < 2, surface < 4                                                 # on_y: given not on_x
    side = 1.0 - 2.0 * (surface % 2)
    none = torch.zeros_like(x)
    normal = [torch.where(on_x, side, none), torch.where(on_y & ~on_x, side, none), torch.where(on_y, none, side)]
    u, v = torch.where(on_x, y, x), torch.where(on_y, z, y)

    # on furniture: in the piece's own frame
    slot = (surface - 6).clamp(min=0)
    cos, sin = of(torch.stack([rooms.yaw.cos(), rooms.yaw.sin()], -1), slot)
    (cx, cy, cz), (hx, hy, hz) = of(rooms.center, slot), of(rooms.half, slot)
    lx, ly, lz = cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx), z - cz  # metres
    ux, uy, uz = lx / hx, ly / hy, lz / hz                                                # in units of the half size
    boxes, balls = SLOTS[0][1], SLOTS[0][1] + SLOTS[1][1]
    is_box, is_ball = slot < boxes, (slot >= boxes) & (slot < balls)
    face_x = (ux.abs() >= uy.abs()) & (ux.abs() >= uz.abs())
    face_z = (uz.abs() > uy.abs()) & ~face_x
    face_y = ~face_x & ~face_z
    top = uz > 0.999
    gx, gy, gz = ux / hx, uy / hy, uz / hz                                                # normal of an ellipsoid
    nx = torch.where(is_box, face_x * ux, torch.where(is_ball, gx, torch.where(top, none, gx)))
    ny = torch.where(is_box, face_y * uy, torch.where(is_ball, gy, torch.where(top, none, gy)))
    nz = torch.where(is_box, face_z * uz, torch.where(is_ball, gz, top.float()))
    length = (nx * nx + ny * ny + nz * nz).sqrt().clamp(min=1e-6)
    is_piece = surface >= 6
    normal = [torch.where(is_piece, a / length, b) for a, b in zip([cos * nx - sin * ny, sin * nx + cos * ny, nz], normal)]
    u = torch.where(is_piece, torch.where(is_box, torch.where(face_x, ly, lx), 0.4 * torch.atan2(uy, ux)), u)
    v = torch.where(is_piece, torch.where(is_box & face_z, ly, lz), v)

    # checks, stripes along u or v, or soft
    fu, fv, pu, pv = of(rooms.texture)
    pattern, = of(rooms.pattern[..., None])
    wave_u, wave_v = (u * fu + pu).sin(), (v * fv + pv).sin()
    stripe_u, stripe_v = (4 * wave_u).clamp(-1, 1), (4 * wave_v).clamp(-1, 1)
    mix = torch.where(pattern == 0, stripe_u * stripe_v, torch.where(pattern == 1, stripe_u,
                      torch.where(pattern == 2, stripe_v, 0.5 * (wave_u + wave_v))))
    lx, ly, lz = rooms.light.T[..., None]                                                 # (R, 1)
    light = 0.72 + 0.28 * (normal[0] * lx + normal[1] * ly + normal[2] * lz)
    light = 255 * light / (1 + 0.01 * depth.square())
    first, second = of(rooms.colors[:, :, 0]), of(rooms.colors[:, :, 1])
    mix = 0.5 + 0.5 * mix
    return torch.stack([((a + (b - a) * mix) * light).clamp(0, 255).to(torch.uint8) for a, b in zip(first, second)], 1)


def surface_classes(rooms, surface):
    """surface ids (R, ...) -> indices into CLASSES (floor, ceiling, wall, then the furniture's categories), long."""
    flat = surface.flatten(1).long()
    category = rooms.category.to(flat.device).gather(1, (flat - 6).clamp(min=0)) + 3
    room = torch.where(flat == 4, 0, torch.where(flat == 5, 1, 2))
    return torch.where(flat >= 6, category, room).view(surface.shape)


# -----------------------------------------------------------------------------
# what can be known of a room

SEEN = 4      # cells of data.CELL pixels that a piece must fill, over all views together, to count as seen


def room_facts(rooms, surface, extrinsics):
    """Numbers that a code of the scene should hold: of the room, and of the furniture that the views show.

    surface (R, V, h, w) ids as `render` gives them, at the resolution of cells, extrinsics (R, V, 3, 4) -> dict of (R, n):
    'sides' shorter and longer, metres; 'objects' how many; per category 'presence' (0 or 1) and 'count'; of categories that
    one piece alone has, 'place', its centre in the first camera's frame, and 'distance' between the centres of every two,
    metres. NaN where a fact is not defined.
    """
    C = len(CATEGORIES)
    cells = F.one_hot(surface.flatten(1).long(), 6 + K)[..., 6:].sum(1)                   # (R, K)
    seen = rooms.present & (cells >= SEEN)
    member = F.one_hot(rooms.category, C) * seen[..., None]                               # (R, K, C)
    count = member.sum(1)                                                                 # (R, C)
    center = extrinsics[:, 0, :, :3] @ rooms.center.transpose(1, 2) + extrinsics[:, 0, :, 3:]  # (R, 3, K)
    center = (center @ member.float()).transpose(1, 2)                                    # (R, C, 3), where count is 1
    place = center.masked_fill((count != 1)[..., None], math.nan)
    first, second = torch.triu_indices(C, C, offset=1)
    return dict(sides=rooms.size[:, :2].sort(1).values, objects=seen.sum(1, keepdim=True).float(), presence=(count > 0).float(),
                count=count.float(), place=place.flatten(1), distance=(place[:, first] - place[:, second]).norm(dim=-1))


# -----------------------------------------------------------------------------
# questions, in VSI-Bench's schema, wording and ground-truth definitions (arXiv 2412.14171)

TASKS = ('object_counting', 'object_abs_distance', 'object_size_estimation', 'room_size_estimation', 'object_rel_distance', 'object_rel_direction_easy',
         'object_rel_direction_medium', 'object_rel_direction_hard', 'route_planning', 'obj_appearance_order')
ANSWER_WORDS = ['front-left', 'front-right', 'back-left', 'back-right', 'left', 'middle', 'right', 'back', 'yes', 'no', 'Turn Left', 'Turn Back', 'Turn Right']
NUMERICAL = TASKS[:4]


def vsi_prompt(record):
    """The text that follows the frames, VSI-Bench's own for open models."""
    lines = ['These are frames of a video.', record['question']]
    if record.get('question_type') in NUMERICAL or not record['options']:
        return '\n'.join(lines + ['Please answer the question using a single word or phrase.'])
    return '\n'.join(lines + ['Options:', *record['options'], "Answer with the option's letter from the given choices directly."])


def corners(rooms, room):
    """Corners of the furniture's outlines on the floor. -> (K, 4, 2) metres, in order around each piece"""
    unit = torch.tensor([[1., 1.], [-1., 1.], [-1., -1.], [1., -1.]])
    x, y = (unit * rooms.half[room, :, None, :2]).unbind(-1)                              # (K, 4)
    cos, sin = rooms.yaw[room, :, None].cos(), rooms.yaw[room, :, None].sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1) + rooms.center[room, :, None, :2]


def gaps(outlines):
    """Metres between the closest points of every two pieces, (K, 4, 2) -> (K, K). All stand on the floor and none touch: the gap is that of the outlines."""
    a, b = outlines[:, None, :, None], outlines.roll(-1, dims=1)[:, None, :, None]        # (K, 1, 4, 1, 2) edges from a to b
    p = outlines[None, :, None]                                                           # (1, K, 1, 4, 2) points
    share = (((p - a) * (b - a)).sum(-1, keepdim=True) / (b - a).square().sum(-1, keepdim=True)).clamp(0, 1)
    gap = (a + share * (b - a) - p).norm(dim=-1).amin((2, 3))                             # (K, K): corners of one to edges of the other
    return torch.minimum(gap, gap.T)


def turn_angle(stand, face, point):
    """Anticlockwise degrees in [0, 360) from the direction stand -> face to stand -> point (..., 2)."""
    bearing = lambda to: torch.atan2(to[..., 1] - stand[..., 1], to[..., 0] - stand[..., 0])
    return torch.rad2deg(bearing(point) - bearing(face)) % 360


SECTORS = {      # task: (name of a sector, from, to), degrees
    'object_rel_direction_easy': (('left', 0, 135), ('right', 225, 360)),
    'object_rel_direction_medium': (('left', 0, 135), ('back', 135, 225), ('right', 225, 360)),
    'object_rel_direction_hard': (('front-left', 0, 90), ('back-left', 90, 180), ('back-right', 180, 270), ('front-right', 270, 360))}
DIRECTION_QUESTIONS = {
    'object_rel_direction_easy': 'is the {c} to the left or the right of the {b}?',
    'object_rel_direction_medium': 'is the {c} to my left, right, or back? An object is to my back if I would have to turn at least 135 degrees in order to face it.',
    'object_rel_direction_hard': 'is the {c} to my front-left, front-right, back-left, or back-right? The directions refer to the quadrants of a Cartesian plane '
                                 '(if I am standing at the origin and facing along the positive y-axis).'}
TURNS = (('Turn Left', 45, 125), ('Turn Back', 145, 215), ('Turn Right', 235, 315))      # route planning; what lies between is left out


def find_sector(sectors, angle, margin=0.0):
    """-> the sector that holds `angle` with `margin` degrees to spare on both sides, or None"""
    return next((name for name, low, high in sectors if low + margin <= angle < high - margin), None)


def candidates(rooms, room, cells):
    """Every question that the views answer without ambiguity. cells (V, K): how many cells each piece fills in each view.

    -> {question_type: [(class of answers, to balance them; question; options or None; answer)]}. A category is asked about
    only if every piece of it in the room is seen.
    """
    seen = cells.sum(0) >= SEEN
    members, outlines = {}, corners(rooms, room)
    for k in rooms.present[room].nonzero()[:, 0].tolist():
        members.setdefault(CATEGORIES[rooms.category[room, k]], []).append(k)
    members = {name: pieces for name, pieces in members.items() if seen[pieces].all()}
    unique = {name: pieces[0] for name, pieces in members.items() if len(pieces) == 1}
    gap, place = gaps(outlines), rooms.center[room, :, :2]
    area = (rooms.size[room, 0] * rooms.size[room, 1]).item()
    found = {task: [] for task in TASKS}

    # numbers: how many, how large, how far
    for name, pieces in members.items():
        if len(pieces) > 1:
            found['object_counting'].append((len(pieces), f'How many {name}(s) are in this room?', None, str(len(pieces))))
    for name, k in unique.items():
        longest = round(200 * rooms.half[room, k].max().item())
        found['object_size_estimation'].append((f'{name} {longest // 20}', f'What is the length of the longest dimension (length, width, or height) of the {name}, '
                                                'measured in centimeters?', None, str(longest)))
    found['room_size_estimation'].append((area // 6, 'What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the '
                                          'combined space.', None, f'{area:.1f}'))
    for a, i in unique.items():
        for b, j in unique.items():
            if i != j and gap[i, j] >= 0.2:
                found['object_abs_distance'].append((int(gap[i, j] / 0.5), 'Measuring from the closest point of each object, what is the distance between '
                                                     f'the {a} and the {b} (in meters)?', None, f'{gap[i, j]:.1f}'))

    # which is the closest: of all others whose distances can be told apart, up to four
    for a, i in unique.items():
        others = sorted((gap[i, pieces].min().item(), name) for name, pieces in members.items() if name != a)
        apart = [others[0]] if others and others[0][0] >= 0.15 else []
        for distance, name in others[1:] if apart else ():
            if distance - apart[-1][0] > (0.3 if area > 40 else 0.15):
                apart.append((distance, name))
        if len(apart) >= 3:
            names = [name for _, name in apart[:4]]
            question = f'Measuring from the closest point of each object, which of these objects ({{options}}) is the closest to the {a}?'
            if any(len(members[name]) > 1 for name in names):
                question += ' If there are multiple instances of an object category, measure to the closest.'
            found['object_rel_distance'].append((names[0], question, names, names[0]))

    # where is it from there: three unique pieces
    near = (gap > 0.3) & (gap < 5)
    for a, i in unique.items():
        for b, j in unique.items():
            for c, k in unique.items():
                if len({i, j, k}) < 3 or not (near[i, j] and near[i, k] and near[j, k]):
                    continue
                angle = turn_angle(place[i], place[j], place[k]).item()
                outline = turn_angle(place[i], place[j], outlines[k]).tolist()
                for task, sectors in SECTORS.items():
                    answer = find_sector(sectors, angle, 10)
                    # the release's boxes have eight corners, two of each of our outline's
                    if answer and 2 * sum(find_sector(sectors, corner) != answer for corner in outline) <= 2:
                        question = f'If I am standing by the {a} and facing the {b}, ' + DIRECTION_QUESTIONS[task].format(b=b, c=c)
                        found[task].append((answer, question, [name for name, _, _ in sectors], answer))
                turn = find_sector(TURNS, turn_angle(place[j], 2 * place[j] - place[i], place[k]).item())
                if turn:
                    question = (f"You are a robot beginning at the {a} facing the {b}. You want to navigate to the {c}. You will perform the following actions "
                                "(Note: for each [please fill in], choose either 'turn back,' 'turn left,' or 'turn right.'): "
                                f'1. Go forward until the {b} 2. [please fill in] 3. Go forward until the {c}. You have reached the final destination.')
                    found['route_planning'].append((turn, question, [name for name, _, _ in TURNS], turn))

    # in which order do categories appear: one each of views that show something for the first time
    first = {}
    for name in CATEGORIES:
        pieces = [k for k in range(K) if rooms.present[room, k] and CATEGORIES[rooms.category[room, k]] == name]
        views = (cells[:, pieces].sum(1) >= SEEN).nonzero()[:, 0].tolist()
        if views:
            first.setdefault(views[0], []).append(name)
    if len(first) >= 3:
        found['obj_appearance_order'].append((None, None, first, None))                   # drawn in `ask`
    return found


def draw(items, g):
    return items[int(torch.randint(len(items), (1,), generator=g))]


def shuffled(items, g):
    return [items[i] for i in torch.randperm(len(items), generator=g)]


def as_record(task, question, options, answer):
    """With options, the answer becomes the letter of its place among them."""
    if options is None:
        return dict(question_type=task, question=question, options=None, ground_truth=answer)
    lettered = [f'{letter}. {text}' for letter, text in zip('ABCD', options)]
    return dict(question_type=task, question=question, options=lettered, ground_truth=lettered[options.index(answer)][0])


def in_words(record):
    """The same question without its options: the answer is the text of the right one."""
    if record['options'] is None:
        return record
    answer = next(option[3:] for option in record['options'] if option[0] == record['ground_truth'])
    return dict(record, question_type=f'{record["question_type"]} in words', options=None, ground_truth=answer)


def ask_order(first, g, used):
    """In which order do categories appear? first: {view: categories that it is the first to show}. -> question, options, answer"""
    # of several draws, the one whose pairs came in this order least often so far
    pairs = lambda names: [('obj_appearance_order', *pair) for pair in itertools.combinations(names, 2)]
    names = min(([draw(names, g) for _, names in sorted(first.items())][:4] for _ in range(8)),
                key=lambda names: sum(used[task, a, b] - used[task, b, a] for task, a, b in pairs(names)))
    used.update(pairs(names))
    answer, orders = ', '.join(names), set()
    while len(orders) < 3:
        orders.add(', '.join(shuffled(names, g)))
        orders.discard(answer)
    question = f'What will be the first-time appearance order of the following categories in the video: {", ".join(shuffled(names, g))}?'
    return question, [answer, *sorted(orders)], answer


def ask(rooms, room, cells, scene, g, used, per_task=1):
    """Questions about one room: of every task up to `per_task`, the rarest answers first, so that no answer is much commoner than another.

    `used`: Counter of the classes of answers so far, over the whole set. -> list of records in VSI-Bench's schema.
    """
    records = []
    for task, choices in candidates(rooms, room, cells).items():
        for _ in range(min(per_task, len(choices))):
            fewest = min(used[task, choice[0]] for choice in choices)
            asked = sum(n for key, n in used.items() if key[0] == task)
            if task == 'object_counting' and fewest > 2 + asked / 2:
                break                                         # most rooms have nothing but pairs: 'two' may not exceed half of the answers
            chosen = draw([choice for choice in choices if used[task, choice[0]] == fewest], g)
            choices = [choice for choice in choices if choice[1] != chosen[1]]
            answer_class, question, options, answer = chosen
            used[task, answer_class] += 1
            if task == 'obj_appearance_order':
                question, options, answer = ask_order(options, g, used)
            if options is not None:
                question = question.replace('{options}', ', '.join(options := shuffled(options, g)))
            records.append(dict(dataset='rooms', scene_name=scene, **as_record(task, question, options, answer)))
    return records


def in_map_frame(places, camera):
    """Places (..., n, 3) in the world -> metres to the right of the camera, ahead of it, and above the floor. camera (..., 3, 4): extrinsics."""
    rotation = camera[..., :3]
    eye = -(rotation.transpose(-1, -2) @ camera[..., 3:])[..., :2, 0]
    x, y = F.normalize(rotation[..., 2, :2], dim=-1).unbind(-1)                           # ahead, on the floor plan
    axes = torch.stack([torch.stack([y, -x], -1), torch.stack([x, y], -1)], -2)           # rows: to the right, ahead
    return torch.cat([(places[..., :2] - eye[..., None, :]) @ axes.transpose(-1, -2), places[..., 2:]], -1)


def what_patches_show(rooms, surface, depth, extrinsics, intrinsics, size, patches=4):
    """What each of the patches x patches parts of a view shows, and where in the world that is: the middle of the piece of furniture that fills most of it
    (a quarter of it, at least), or else the mean of the points that are seen.

    surface, depth (R, V, h, w) of cells, extrinsics (R, V, 3, 4), intrinsics (R, V, 3, 3) for images of `size` = (H, W) pixels
    -> shares of CLASSES (R, V, n, 11), places (R, V, n, 3) in metres, n = patches^2
    """
    patch = surface.shape[2] // patches, surface.shape[3] // patches
    pool = lambda x: F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), patch).flatten(2).transpose(1, 2).unflatten(0, surface.shape[:2])
    points = camera_rays(intrinsics, size, depth.shape[-2:]) * depth.flatten(-2)[..., None]                       # (R, V, h w, 3) in the camera's frame
    points = (points - extrinsics[..., None, :, 3]) @ extrinsics[..., :3]                 # in the world
    share, piece = pool(F.one_hot(surface, 6 + K).float())[..., 6:].max(-1)               # (R, V, n)
    middle = rooms.center[torch.arange(len(surface))[:, None, None], piece]
    places = torch.where(share[..., None] >= 0.25, middle, pool(points.unflatten(-2, depth.shape[-2:])))
    return pool(F.one_hot(surface_classes(rooms, surface).long(), len(CLASSES)).float()), places


def where_categories_stand(rooms, room, camera):
    """Of every category that one piece alone has, its place (in_map_frame); NaN for the others. -> (C, 3)"""
    member = F.one_hot(rooms.category[room], len(CATEGORIES)) * rooms.present[room, :, None]                      # (K, C)
    places = member.T.float() @ in_map_frame(rooms.center[room], camera)
    return places.masked_fill((member.sum(0) != 1)[:, None], math.nan)


def ask_map(rooms, room, cells, camera):
    """Where does everything stand that is seen? A map in words, in whole metres: to train on, and to see what a model knows; not of VSI-Bench.

    camera (3, 4): extrinsics of the view whose axes the map has. -> (prompt, answer)
    """
    places = in_map_frame(rooms.center[room], camera)[:, :2].round().int().tolist()
    pieces = sorted((int(rooms.category[room, k]), *places[k]) for k in (rooms.present[room] & (cells.sum(0) >= SEEN)).nonzero()[:, 0].tolist())
    answer = '; '.join(f'{CATEGORIES[c]} at x {x:+d}, y {y:+d}' for c, x, y in pieces)
    return vsi_prompt(dict(question='Where are the objects, in meters to the right (x) and ahead (y) of the first camera?', options=None)), answer or 'none'


# ... and about single pictures, which need no scene: what the mini VLM is pre-trained on

def ask_2d(rooms, room, surface, g):
    """Questions about one picture: what is there, how many, where in the picture, how large in it, left or right of what; last, two about lists of options.
    surface (h, w) ids of cells.

    -> list of records as `ask` gives them
    """
    columns = torch.arange(surface.shape[1]).expand_as(surface).float() / surface.shape[1]
    members, sizes = {}, {}
    for k in range(K):
        mask = surface == 6 + k
        if mask.sum() >= SEEN:
            name, x = CATEGORIES[rooms.category[room, k]], columns[mask]
            members.setdefault(name, []).append(x.mean().item())
            sizes[name] = (x.max() - x.min()).item() + 1 / surface.shape[1], mask.float().mean().item()   # of the picture: width, area
    absent = [name for name in CATEGORIES if name not in members]
    unique = {name: x[0] for name, x in members.items() if len(x) == 1}
    there = bool(members) and (not absent or draw([True, False], g))
    found = [('presence', f'Is there a {draw(list(members) if there else absent, g)} in the picture?', None, 'yes' if there else 'no')]
    if members:
        name = draw(list(members), g)
        found.append(('count', f'How many {name}(s) are in the picture?', None, str(len(members[name]))))
        found.append(('list', 'Which objects are in the picture?', None, ', '.join(name for name in CATEGORIES if name in members)))
        if len(absent) >= 2:
            options = shuffled([name, *shuffled(absent, g)[:3]], g)
            found.append(('which', f'Which of these objects ({", ".join(options)}) is in the picture?', options, name))
    if unique:
        name = draw(list(unique), g)
        found.append(('third', f'Is the {name} on the left, in the middle or on the right of the picture?', ['left', 'middle', 'right'],
                      ('left', 'middle', 'right')[min(2, int(3 * unique[name]))]))
        name = draw(list(unique), g)
        found.append(draw([('width', f'What is the width of the {name} in the picture, measured in pixels of 640?', None, str(round(640 * sizes[name][0]))),
                           ('share', f'What share of the picture is covered by the {name} (in percent)?', None, f'{100 * sizes[name][1]:.1f}'),
                           ('from the left', f'How far from the left of the picture is the {name} (in percent)?', None, str(round(100 * unique[name])))], g))
    pairs = [(a, b) for a in unique for b in unique if a != b and abs(unique[a] - unique[b]) > 0.08]
    if pairs:
        a, b = draw(pairs, g)
        found.append(('left or right', f'In the picture, is the {a} to the left or the right of the {b}?', shuffled(['left', 'right'], g),
                      'left' if unique[a] < unique[b] else 'right'))
    # how to read a list of options: nothing to be seen in the picture, and what other language models know
    options = shuffled(draw([CATEGORIES, CATEGORIES, ANSWER_WORDS], g), g)[:4]
    word = draw(options, g)
    return [as_record(*question) for question in found] + [as_record('letter', f'Which of these is {word}?', options, word)]


def ask_slides(shown, g, used):
    """Questions about unrelated pictures in a row: what comes first, and where. shown: of every picture, the set of categories that it shows.

    -> list of records as `ask` gives them
    """
    first = {}
    for name in CATEGORIES:
        views = [i for i, names in enumerate(shown) if name in names]
        if views:
            first.setdefault(views[0], []).append(name)
    found = [('obj_appearance_order', *ask_order(first, g, used))] if len(first) >= 3 else []
    where = {name: i for i, names in first.items() for name in names}
    for name in shuffled(list(where), g)[:3]:
        found.append(('picture', f'Which picture is the first with a {name} (1 to {len(shown)})?', None, str(where[name] + 1)))
    found.append(('list', 'Which objects are in the last picture?', None, ', '.join(name for name in CATEGORIES if name in shown[-1]) or 'none'))
    return [as_record(task, question, options and shuffled(options, g), answer) for task, question, options, answer in found]


if __name__ == '__main__':
    from PIL import Image
    rooms = make_rooms(5, seed=room_seed('val', 0, 0))
    views = render(rooms, make_walk(rooms, 8, seed=1), make_intrinsics((128, 128), 5, 8), (128, 128))
    picture = views['image'].permute(0, 3, 1, 4, 2).reshape(5 * 128, 8 * 128, 3)
    os.makedirs('out', exist_ok=True)
    Image.fromarray(picture.numpy()).save('out/rooms.png')
    for item in rooms.objects(0):
        print(f"{item['category']:8s} at {item['center'][0]:5.2f} {item['center'][1]:5.2f}  size "
              + ' x '.join(f'{s:.2f}' for s in item['size']) + ' m')
    print('room 0 is the first row of out/rooms.png')
