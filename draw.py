"""
Pictures of what was learned: field.png, curve.png, path.gif and map.png, with PIL alone.

    draw_field    pictures, the features that the backbone sees, those that we predict
    draw_curve    loss, R2 and baselines over the steps of a run
    draw_film     the field of a room along a path of cameras where no picture was taken
    draw_walk     the same among photographs, through the cameras that the backbone predicts
    draw_maps     where a VLM says that things stand, and where they stand
"""
import json
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import RoomPool
from measure import field_batches, knows_rooms, map_score, read_map
from model import invert_pose, path_through, take_views
from questions import corners
from rooms import (CLASSES, EYE_HEIGHT, FURNITURE, SCENE_UNIT, STRUCTURE, cameras_at, clearance,
                   make_intrinsics, render, scene_extrinsics)

# floor, ceiling, wall, and the furniture as it is painted
PAINT = [(0.75, 0.70, 0.65), (0.95, 0.95, 0.95), (0.45, 0.45, 0.45)]
PAINT += [colour for _, _, colour in FURNITURE.values()]
ACCENT = 'firebrick'


def rgb(colour):
    """Three numbers in [0, 1] -> three in 0 .. 255."""
    return tuple(round(255 * channel) for channel in colour)


def blank(width, height, font_size=13):
    """-> a white canvas, its pen, a font"""
    canvas = Image.new('RGB', (width, height), 'white')
    return canvas, ImageDraw.Draw(canvas), ImageFont.load_default(font_size)


def to_tile(image, size):
    """(h, w, 3) in [0, 1] -> PIL image of `size` = (width, height). A value stays a square."""
    pixels = (255 * image).round().byte().cpu().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def to_grey(x):
    """(..., h, w), cut to [0, 1] -> (..., h, w, 3)"""
    return x.clamp(0, 1)[..., None].expand(*x.shape, 3)


def color_basis(features):
    """The three main directions of features (..., C), and the range of values along them."""
    x = features.float().flatten(0, -2)
    mean = x.mean(0)
    directions = torch.linalg.svd(x - mean, full_matrices=False).Vh[:3].T  # (C, 3)
    y = (x - mean) @ directions
    return mean, directions, torch.quantile(y, 0.02, dim=0), torch.quantile(y, 0.98, dim=0)


def to_colors(features, basis, grid):
    """Features (..., N, C) -> colours (..., h, w, 3) in [0, 1]."""
    mean, directions, low, high = basis
    y = ((features.float() - mean) @ directions - low) / (high - low)
    return y.clamp(0, 1).unflatten(-2, grid)


def draw_swatches(pen, font, x, y, per_row, names=CLASSES, paint=PAINT):
    """The names of the categories beside their colours."""
    for i, (name, colour) in enumerate(zip(names, paint)):
        left = x + i % per_row * 92
        top = y + i // per_row * 20
        pen.rectangle((left, top - 6, left + 12, top + 6), rgb(colour), 'grey')
        pen.text((left + 18, top), name, 'black', font, anchor='lm')


def draw_depth_bar(canvas, pen, font, x, y, height, far, unit):
    """From near (bright) to `far` (black), with the numbers beside it."""
    bar = torch.linspace(1, 0, height)[:, None].expand(-1, 12)
    canvas.paste(to_tile(to_grey(bar), (12, height)), (x, y))
    pen.rectangle((x, y, x + 12, y + height), None, 'grey')
    pen.text((x + 16, y + 6), '0', 'black', font, anchor='lm')
    pen.text((x + 16, y + height - 6), f'{far:.1f}{unit}', 'black', font, anchor='lm')


# -----------------------------------------------------------------------------
# field.png

@torch.no_grad()
def field_rows(psfm, source, config, autocast, num_scenes):
    """-> rows [(title, tiles (B, V, h, w, 3))], R2 (B, V), number of context views, (farthest
    depth, its unit) or None.

    Context views come first. One basis of colours serves all samples: of one scene, all look alike.
    """
    was_training = psfm.training
    psfm.eval()
    batch, mask, num_context = next(iter(field_batches(psfm, source, config, num_scenes)))
    order = mask.int().argsort(dim=1, stable=True)  # context first
    size = batch['images'].shape[-2:]
    scale = None
    with autocast:
        context, views, _ = psfm.observe(batch['images'], mask, num_context)
        cameras = views.extrinsics, views.intrinsics, size, views.grid
        z = psfm.encode(context, views.grid)
        predicted = take_views(psfm.decode(z, *cameras), order)
    features = take_views(views.features, order)
    basis = color_basis(features)
    error = ((predicted - features) / psfm.geo_std).square().mean(-1)  # (B, V, N)
    variance = ((features - psfm.geo_mean) / psfm.geo_std).square().mean(-1)
    rows = [('picture', take_views(batch['images'], order).permute(0, 1, 3, 4, 2)),
            ('features seen by\nthe backbone', to_colors(features, basis, views.grid)),
            ('features predicted\nfrom the context', to_colors(predicted, basis, views.grid)),
            ('error (white: as\nbad as the mean)',
             to_grey((error / variance.mean()).unflatten(-1, views.grid)))]

    if knows_rooms(psfm, config):
        read, logits = psfm.backbone.read_out(predicted, views.grid)
        depth = take_views(batch['depth'], order) / SCENE_UNIT
        classes = take_views(batch['classes'], order)
        paint = torch.tensor(PAINT, device=depth.device)
        far = depth.max()
        scale = SCENE_UNIT * far.item(), ' m'
        rows += [('true depth', to_grey(1 - depth / far)),
                 ('depth read off\nthe prediction', to_grey(1 - read / far)),
                 ('true categories', paint[classes]),
                 ('categories read off\nthe prediction', paint[logits.argmax(-1)])]
    if psfm.depth_probe is not None:
        with autocast:
            depth = psfm.observe(batch['images'], mask, num_context, with_depth=True)[2]
            read = psfm.read_depth(z, *cameras)
        depth, read = [take_views(x, order).unflatten(-1, views.grid) for x in (depth, read)]
        if scale is None:  # of photographs
            far = depth.max()
            scale = far.item(), ''
        rows += [('depth seen by\nthe backbone', to_grey(1 - depth / far)),
                 ('depth read off the\nfield (probe)', to_grey(1 - read / far))]
    psfm.train(was_training)
    return rows, 1 - error.mean(-1) / variance.mean(-1), num_context, scale


def draw_field(psfm, source, config, autocast, path, num_scenes=2, tile=88):
    """Draws a few held-out samples: the context views, and views that the encoder did not see."""
    rows, r2, num_context, scale = field_rows(psfm, source, config, autocast, num_scenes)
    B, V = r2.shape
    H, W = rows[0][1].shape[2:4]
    height = tile * H // W
    gap = 4
    margin = 160
    top = 46
    block = top + len(rows) * (height + gap) + 24
    footer = 52 if any('categories' in title for title, _ in rows) else 0
    canvas, pen, font = blank(margin + V * (tile + gap) + 80, B * block + footer)

    def left(v):  # of view v; the unseen ones stand a little apart
        return margin + v * (tile + gap) + (12 if v >= num_context else 0)

    for b in range(B):
        y0 = b * block
        name = 'held-out room' if config.data == 'rooms' else 'held-out sample'
        pen.text((8, y0 + 14), f'{name} {b}', 'black', font, anchor='lm')
        for r, (title, tiles) in enumerate(rows):
            y = y0 + top + r * (height + gap)
            pen.multiline_text((8, y + height // 2), title, 'black', font, anchor='lm')
            for v in range(V):
                canvas.paste(to_tile(tiles[b, v], (tile, height)), (left(v), y))
            if 'depth' in title and scale:
                x = margin + V * (tile + gap) + 16
                draw_depth_bar(canvas, pen, font, x, y, height, *scale)
        for v in range(V):
            x = left(v) + tile // 2
            label, colour = ('context', 'black') if v < num_context else ('unseen', ACCENT)
            pen.text((x, y0 + 14), label, colour, font, anchor='mm')
            pen.text((x, y0 + 32), f'R2 {r2[b, v]:.2f}', 'black', font, anchor='mm')
        x = margin + num_context * (tile + gap) + 3
        pen.line((x, y0 + 4, x, y0 + block - 24), ACCENT, 2)
    if footer:
        draw_swatches(pen, font, margin, B * block + 8, per_row=6)
    canvas.save(path)


# -----------------------------------------------------------------------------
# curve.png

def draw_panel(pen, font, box, curves, title, low=None, is_log=False):
    """Curves {name: ([steps], [values], colour)}, axes (`is_log`: of the steps) and a legend."""
    left, top, right, bottom = box
    points = [(x, y) for xs, ys, _ in curves.values() for x, y in zip(xs, ys)]
    if not points:
        return
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low = min(y for _, y in points) if low is None else low
    high = max(max(y for _, y in points), low + 1e-6)

    def place(x, y):
        along = math.log(x / first, last / first) if is_log else x / last
        share = (min(max(y, low), high) - low) / (high - low)
        return left + along * (right - left), bottom - share * (bottom - top)

    pen.text(((left + right) // 2, top - 16), title, 'black', font, anchor='mm')
    for i in range(5):
        step = first * (last / first) ** (i / 4) if is_log else last * i / 4
        value = low + (high - low) * i / 4
        x, y = place(step, value)
        pen.line((left, y, right, y), 'gainsboro')
        pen.text((left - 6, y), f'{value:.2f}', 'black', font, anchor='rm')
        pen.text((x, bottom + 12), f'{step:.0f}', 'black', font, anchor='mm')
    names = [name for name in curves if name[0] != '_']  # the others stay out of the legend
    for name, (xs, ys, colour) in curves.items():
        line = [place(x, y) for x, y in zip(xs, ys)]
        pen.line(line, colour, 2, joint='curve')
        for x, y in line if len(line) < 40 else []:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        if name in names:
            x, y = left + names.index(name) * (right - left) // len(names), bottom + 32
            pen.line((x, y, x + 20, y), colour, 3)
            pen.text((x + 26, y), name, 'black', font, anchor='lm')


def draw_curve(log, path):
    """The run's log.jsonl: loss on the left, what was evaluated on the right, over the steps."""
    with open(log) as file:
        records = [json.loads(line) for line in file]
    training = [(record['step'], record['loss']) for record in records if 'loss' in record]
    measured = [(record['step'], record['metrics']) for record in records if 'metrics' in record]
    canvas, pen, font = blank(1000, 360)
    loss = [step for step, _ in training], [value for _, value in training], 'black'
    draw_panel(pen, font, (60, 40, 470, 290), {'training loss': loss}, 'loss, over steps')

    steps = [step for step, _ in measured]
    curves = {'R2, unseen views': (steps, [m['psfm']['r2'] for _, m in measured], ACCENT),
              'average latents': (steps, [m['camera']['r2'] for _, m in measured], 'grey')}
    if measured and 'read_out' in measured[0][1]:
        found = [m['read_out']['psfm']['object_recall'] for _, m in measured]
        curves['objects found'] = steps, found, 'steelblue'
    draw_panel(pen, font, (550, 40, 970, 290), curves, 'held-out scenes, over steps', low=0)
    canvas.save(path)


# -----------------------------------------------------------------------------
# path.gif

FILM_CONTEXT = 4
FILM_FRAMES = 36


def make_path(rooms, num_views):
    """A smooth closed path through each room. -> extrinsics (R, V, 3, 4), world-to-camera

    An ellipse at eye height that looks across the room; of a few sizes, the
    one that is clearest of tall furniture.
    """
    R, V = len(rooms.size), num_views
    angle = 2 * math.pi * torch.arange(V) / V
    circle = torch.stack([angle.cos(), angle.sin()], -1)  # (V, 2)
    shares = torch.linspace(0.8, 0.4, 9)[:, None, None]
    xy = (rooms.size[:, None, None, :2] / 2 - 0.35) * shares * circle  # (R, 9, V, 2)
    best = clearance(rooms, xy).amin(-1).argmax(-1)  # (R,)
    xy = xy[torch.arange(R), best]  # (R, V, 2)
    position = F.pad(xy, (0, 1), value=sum(EYE_HEIGHT) / 2)
    yaw = torch.atan2(-xy[..., 1], -xy[..., 0])
    pitch = math.radians(-16) + math.radians(6) * (2 * angle).sin().expand(R, V)
    return cameras_at(position, yaw, pitch, torch.zeros(R, V))


def field_along(psfm, context, frames, extrinsics, intrinsics):
    """The field from cameras that the encoder knows nothing of, and what the backbone sees there.

    context (Vc, 3, H, W) and frames (F, 3, H, W), F even, in [0, 1]; the frames' extrinsics
    (F, 3, 4) in the frame of the first context view, in SCENE_UNITs; intrinsics (3, 3).
    -> true and predicted features (F, N, 2C), grid. The true ones come from passes in which two
    frames are the targets beside the context. The prediction never meets a frame.
    """
    pairs = frames.unflatten(0, (-1, 2))  # (F/2, 2, 3, H, W)
    context = context.expand(len(pairs), -1, -1, -1, -1)
    images = torch.cat([context, pairs], 1)
    Vc = context.shape[1]
    mask = torch.arange(images.shape[1], device=images.device) >= Vc
    allowed, views, _ = psfm.observe(images, mask.expand(len(pairs), -1), Vc)
    z = psfm.encode(allowed[:1], views.grid)  # (1, Q, D)
    intrinsics = intrinsics.expand(1, len(frames), 3, 3)
    predicted = psfm.decode(z, extrinsics[None], intrinsics, frames.shape[-2:], views.grid)[0]
    return views.features[:, Vc:].flatten(0, 1), predicted, views.grid


def draw_plan(rooms, room, context, camera, size):
    """A room from above: furniture, context cameras (black), the camera now. -> PIL image

    context (Vc, 3, 4), camera (3, 4): extrinsics in the room's frame.
    """
    canvas, pen, _ = blank(size, size)
    sides = rooms.size[room, :2].tolist()
    scale = (size - 10) / max(sides)  # pixels a metre

    def place(x, y):
        return size / 2 + scale * x, size / 2 - scale * y

    pen.rectangle((*place(-sides[0] / 2, sides[1] / 2), *place(sides[0] / 2, -sides[1] / 2)),
                  'whitesmoke', 'grey')
    outlines = corners(rooms, room)
    for k in rooms.present[room].nonzero()[:, 0].tolist():
        colour = rgb(PAINT[len(STRUCTURE) + int(rooms.category[room, k])])
        pen.polygon([place(*corner) for corner in outlines[k].tolist()], colour, 'grey')
    for extrinsics, colour in [*((x, 'black') for x in context), (camera, ACCENT)]:
        x, y, _ = invert_pose(extrinsics)[:, 3].tolist()
        draw_cone(pen, place, x, y, extrinsics[2, :2].tolist(), 0.6, colour)
    return canvas


def draw_cone(pen, place, x, y, ahead, length, colour):
    """A camera from above: a triangle that opens in the direction `ahead` = (dx, dy)."""
    angle = math.atan2(ahead[1], ahead[0])
    ends = [(x + length * math.cos(angle + turn), y + length * math.sin(angle + turn))
            for turn in (-0.6, 0.6)]
    pen.polygon([place(x, y), *(place(*end) for end in ends)], None, colour, 2)


@torch.no_grad()
def draw_film(psfm, config, autocast, path, num_rooms=2, tile=112):
    """A film: held-out rooms from cameras where no picture was taken, beside the truth."""
    device = psfm.geo_mean.device
    size = config.image_width, config.image_width
    pool = RoomPool('val', 0, RoomPool.BLOCK, image_size=size, device=device)
    rooms, block = pool.render_block(0)
    rooms = rooms[:num_rooms]
    walk = block['extrinsics']
    chosen = torch.arange(FILM_CONTEXT) * RoomPool.VIEWS // FILM_CONTEXT  # spread over the walk
    on_cpu = rooms.to('cpu')
    cameras = make_path(on_cpu, FILM_FRAMES).to(device)  # (R, F, 3, 4)
    intrinsics = make_intrinsics(size, len(cameras), FILM_FRAMES).to(device)
    seen = render(rooms, cameras, intrinsics, size)

    strips = []  # of each room: context pictures, columns of (F, h, w, 3)
    for room in range(num_rooms):
        context = block['images'][room, chosen].float() / 255
        frames = seen['image'][room].float() / 255
        both = torch.cat([walk[room, :1], cameras[room]])[None]
        extrinsics = scene_extrinsics(both)[0, 1:]
        with autocast:
            features, predicted, grid = field_along(psfm, context, frames, extrinsics,
                                                    block['intrinsics'][room, 0])
        basis = color_basis(features)
        depth = seen['depth'][room] / SCENE_UNIT
        read = psfm.backbone.read_out(predicted[None].float(), grid)[0][0]
        far = depth.max()
        strips.append((context, [frames.permute(0, 2, 3, 1), to_colors(features, basis, grid),
                                 to_colors(predicted, basis, grid), to_grey(1 - depth / far),
                                 to_grey(1 - read / far)]))

    titles = ['four context pictures', 'from above', 'a new camera', 'backbone features',
              'predicted from z', 'true depth', 'read off prediction']
    gap, top, half = 4, 22, tile // 2 - 1
    film = []
    for f in range(FILM_FRAMES):
        canvas, pen, font = blank(len(titles) * (tile + gap), top + num_rooms * (tile + gap), 11)
        for column, title in enumerate(titles):
            colour = ACCENT if column in (4, 6) else 'black'
            x = column * (tile + gap) + tile // 2
            pen.text((x, top // 2), title, colour, font, anchor='mm')
        for room, (context, columns) in enumerate(strips):
            y = top + room * (tile + gap)
            for i, picture in enumerate(context):
                small = to_tile(picture.permute(1, 2, 0), (half, half))
                canvas.paste(small, (i % 2 * (half + 2), y + i // 2 * (half + 2)))
            plan = draw_plan(on_cpu, room, walk[room, chosen].cpu(), cameras[room, f].cpu(), tile)
            canvas.paste(plan, (tile + gap, y))
            for column, pictures in enumerate(columns, 2):
                canvas.paste(to_tile(pictures[f], (tile, tile)), (column * (tile + gap), y))
        film.append(canvas.quantize(256))
    film[0].save(path, save_all=True, append_images=film[1:], duration=120, loop=0)


def draw_cameras(views, camera, size):
    """Cameras (V, 3, 4) from above, in black, and one (3, 4) in colour. The first looks up."""
    canvas, pen, _ = blank(size, size)
    x, _, z = invert_pose(views)[..., 3].unbind(-1)  # right, down, ahead of the first camera
    spread = max((x.max() - x.min()).item(), (z.max() - z.min()).item(), 1e-6)
    middle = (x.max() + x.min()).item() / 2, (z.max() + z.min()).item() / 2

    def place(x, z):
        scale = 0.6 * size / spread
        return size / 2 + scale * (x - middle[0]), size / 2 - scale * (z - middle[1])

    for extrinsics, colour in [*((view, 'black') for view in views), (camera, ACCENT)]:
        x, _, z = invert_pose(extrinsics)[:, 3].tolist()
        draw_cone(pen, place, x, z, extrinsics[2, [0, 2]].tolist(), 0.15 * spread, colour)
    return canvas


def nearest_view(views, camera):
    """Which of the cameras (V, 3, 4) is most like one (3, 4): near it, and looking its way."""
    places = invert_pose(views)[..., 3]
    spread = (places - places.mean(0)).norm(dim=-1).mean().clamp(min=1e-6)
    distance = (places - invert_pose(camera)[:, 3]).norm(dim=-1) / spread
    return int((distance - views[:, 2, :3] @ camera[2, :3]).argmin())


@torch.no_grad()
def draw_walk(psfm, source, config, autocast, path, tile=150):
    """A film of a held-out sample of photographs: the field on a smooth path through the cameras
    that the backbone predicts, beside the nearest picture. Every other picture is context."""
    num_views = min(config.max_views, source.most_views)
    images = source.batch(0, 1, num_views)['images'].to(psfm.geo_mean.device)  # in their order
    mask = torch.arange(images.shape[1], device=images.device)[None] % 2 == 1
    with autocast:
        context, views, depth = psfm.observe(images, mask, int((~mask).sum()),
                                             psfm.backbone.has_depth)
        z = psfm.encode(context, views.grid)
        cameras = path_through(views.extrinsics[0], FILM_FRAMES)
        intrinsics = views.intrinsics.mean(1, keepdim=True).expand(-1, FILM_FRAMES, -1, -1)
        ask = z, cameras[None], intrinsics, images.shape[-2:], views.grid
        predicted = psfm.decode(*ask)[0]
        read = psfm.read_depth(*ask) if psfm.depth_probe is not None else None
    nearest = [nearest_view(views.extrinsics[0], camera) for camera in cameras]
    basis = color_basis(views.features)
    columns = {'nearest picture': images[0, nearest].permute(0, 2, 3, 1),
               'features seen there': to_colors(views.features[0, nearest], basis, views.grid),
               'predicted on the way': to_colors(predicted, basis, views.grid)}
    depths = {} if depth is None else {'depth seen there': depth[0, nearest]}
    if read is not None:
        depths['read off the field'] = read[0]
    for title, x in depths.items():
        columns[title] = to_grey(1 - x.unflatten(-1, views.grid) / depth.max())

    height = tile * images.shape[-2] // images.shape[-1]
    top = 22
    film = []
    for f, i in enumerate(nearest):
        canvas, pen, font = blank((1 + len(columns)) * (tile + 4), top + max(tile, height) + 20, 11)
        pen.text((tile // 2, top // 2), 'from above', 'black', font, anchor='mm')
        canvas.paste(draw_cameras(views.extrinsics[0].cpu(), cameras[f].cpu(), tile), (0, top))
        for column, (title, pictures) in enumerate(columns.items(), 1):
            x = column * (tile + 4)
            colour = ACCENT if title in ('predicted on the way', 'read off the field') else 'black'
            pen.text((x + tile // 2, top // 2), title, colour, font, anchor='mm')
            canvas.paste(to_tile(pictures[f], (tile, height)), (x, top))
        label = 'the encoder never saw it' if mask[0, i] else 'context'
        pen.text((tile + 4 + tile // 2, top + height + 10), label, 'black', font, anchor='mm')
        film.append(canvas.quantize(256))
    film += film[-2:0:-1]  # and back again
    film[0].save(path, save_all=True, append_images=film[1:], duration=120, loop=0)


# -----------------------------------------------------------------------------
# map.png

def draw_map(truth, answer, width):
    """One map in words, from above: circles where things stand, squares where the VLM says so."""
    canvas, pen, font = blank(width, width, 12)
    pieces = read_map(truth)
    named = [piece for piece in read_map(answer) if piece[0] in FURNITURE]

    # everything within 20 metres fits: the scale follows from the farthest place
    reach = max([abs(value) for _, *place in pieces + named for value in place] + [4])
    reach = min(reach, 20) + 1
    scale = (width - 24) / 2 / reach  # pixels a metre

    def place(x, y):
        x = max(-reach, min(reach, x))
        y = max(-reach, min(reach, y))
        return width / 2 + scale * x, width / 2 - scale * y

    pen.text((6, 9), f'{100 * map_score(truth, answer):.0f} %', 'black', font, anchor='lm')
    for k in range(-reach, reach + 1):
        pen.line((*place(k, -reach), *place(k, reach)), 'gainsboro')
        pen.line((*place(-reach, k), *place(reach, k)), 'gainsboro')
    x, y = place(0, 0)
    pen.line((x - 6, y, x + 6, y), 'black', 2)
    pen.line((x, y - 12, x, y + 6), 'black', 2)
    taken = {}  # places with several things fan out
    for shape, things in (('square', named), ('circle', pieces)):
        for name, *where in things:
            x, y = place(*where)
            x = min(width - 10, x + 11 * taken.setdefault((shape, *where), 0))
            taken[shape, *where] += 1
            colour = rgb(FURNITURE[name][2])
            if shape == 'square':
                pen.rectangle((x - 5, y - 5, x + 5, y + 5), colour, 'black')
            else:
                pen.ellipse((x - 9, y - 9, x + 9, y + 9), None, colour, 3)
    pen.rectangle((0, 0, width - 1, width - 1), None, 'grey')
    return canvas


def draw_maps(maps, path, count=8, tile=250):
    """Draws maps in words, [(true, the model's)], the first camera at the cross, looking up."""
    columns = 4
    top = 62
    maps = maps[:count]
    rows = -(-len(maps) // columns)
    canvas, pen, font = blank(columns * (tile + 6), top + rows * (tile + 6), 12)
    pen.text((8, 14), 'circle: where it stands; square: where the VLM says it stands; number: '
             'map_score; cross: the first camera, looking up; grid: one metre. What shares a '
             'place is drawn side by side.', 'black', font, anchor='lm')
    draw_swatches(pen, font, 8, 40, len(FURNITURE), FURNITURE, PAINT[len(STRUCTURE):])
    for i, (truth, answer) in enumerate(maps):
        left = i % columns * (tile + 6)
        y = top + i // columns * (tile + 6)
        canvas.paste(draw_map(truth, answer, tile), (left, y))
    canvas.save(path)
