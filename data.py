"""
Sources of multi-view samples (the procedural rooms, folders of photographs, ScanNet, ScanNet++, videos), of conversations
about pictures, and the benchmarks' files.

    python data.py check FOLDER        # what is in a data set, and what is missing or broken

A source answers one question: what is batch number `step`? The answer depends on
nothing but the source's settings and that number, so a resumed run sees what the
uninterrupted one would have seen, and every process of a DDP run can draw its own
share without talking to the others. All samples of a batch have the same number of
views; how many scenes fit follows from a budget of images.

A batch is a dict of tensors: images (B, V, 3, H, W) in [0, 1] and, where the source
knows them (rooms do), extrinsics (B, V, 3, 4), intrinsics (B, V, 3, 3), and on a grid
of cells x cells a patch (one cell = 4 x 4 pixels): depth (B, V, h, w) in metres and
classes (B, V, h, w), indices into rooms.CLASSES.
"""
import collections
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from model import InputError
from rooms import (CATEGORIES, CLASSES, K, SEEN, ask, ask_2d, ask_map, ask_slides, draw, in_map_frame, in_words, make_intrinsics, make_rooms, make_walk, render, room_seed, shuffled,
                   surface_classes, vsi_prompt, what_patches_show, where_categories_stand)

CELL = 4      # pixels a side: depth and classes are kept at this resolution


def step_generator(*numbers):
    """A CPU generator that is a pure function of a few whole numbers (seed, step, rank, ...)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def views_per_scene(step, seed, low, high):
    """The number of views of every sample in batch `step`: uniform in low .. high, the same on every process."""
    return int(torch.randint(low, high + 1, (1,), generator=step_generator(seed, step, 1)))


class RoomPool:
    """Rooms rendered once into memory, a window that slides over an endless row of them.

    At step s the pool holds rooms `s * new_rooms` .. `+ num_rooms` of its split, eight views each: rendering stays a
    small part of a step, and no room is seen so often that it could be learned by heart.
    """
    held_out = 'rooms that training never shows'
    BLOCK = 4           # rooms are made and rendered so many at a time
    VIEWS = 8

    def __init__(self, split, seed, num_rooms, new_rooms=0.0, image_size=(64, 64), device='cpu', rank=0, world_size=1):
        self.split, self.seed, self.new_rooms, self.size, self.device = split, seed, new_rooms, image_size, device
        self.rank, self.world_size = rank, world_size
        self.num_blocks = max(1, num_rooms // self.BLOCK)
        self.blocks, self.pool = {}, None                     # slot -> index of the block in it; name -> tensor of all rooms

    def render_block(self, index, num_views=VIEWS):
        """-> the Rooms of block `index`, and what their views show: a dict as a batch's, with `surface` ids (rooms.render) for `classes`."""
        seed = room_seed(self.split, self.seed, index * self.world_size + self.rank)
        rooms = make_rooms(self.BLOCK, seed)
        extrinsics = make_walk(rooms, self.VIEWS, seed)[:, :num_views]                    # the first of the same walk
        intrinsics = make_intrinsics(self.size, self.BLOCK, num_views)
        rooms, extrinsics, intrinsics = rooms.to(self.device), extrinsics.to(self.device), intrinsics.to(self.device)
        views = render(rooms, extrinsics, intrinsics, self.size)
        # a cell's depth is that of the ray through its centre: a render of its own, at the cells' resolution
        cells = self.size[0] // CELL, self.size[1] // CELL
        shrink = intrinsics.new_tensor([[cells[1] / self.size[1]], [cells[0] / self.size[0]], [1]])
        coarse = render(rooms, extrinsics, intrinsics * shrink, cells)
        return rooms, dict(images=views['image'], depth=coarse['depth'], surface=coarse['surface'], extrinsics=extrinsics, intrinsics=intrinsics)

    def advance(self, step, progress=iter):
        """Brings the window to where `step` wants it. Block b lives in slot b % num_blocks."""
        first = int(step * self.new_rooms) // self.BLOCK
        due = [b for b in range(first, first + self.num_blocks) if self.blocks.get(b % self.num_blocks) != b]
        for index in progress(due):
            (rooms, block), slot = self.render_block(index), index % self.num_blocks
            block['classes'] = surface_classes(rooms, block.pop('surface')).to(torch.uint8)
            if self.pool is None:
                self.pool = {name: x.new_empty(self.num_blocks * self.BLOCK, *x.shape[1:]) for name, x in block.items()}
            for name, x in block.items():
                self.pool[name][slot * self.BLOCK:(slot + 1) * self.BLOCK] = x
            self.blocks[slot] = index

    def batch(self, step, num_scenes, num_views, neighbours=0.0, keep_closest=1.0):
        """Batch `step`: `num_scenes` scenes x `num_views` views, in random order.

        `neighbours`: share of the samples whose views follow each other on the walk (the others: any views).
        `keep_closest`: draw num_scenes / keep_closest samples and keep those whose first two views differ least.
        """
        self.advance(step)
        g = step_generator(self.seed, step, self.rank, self.split != 'train')
        n, V = round(num_scenes / keep_closest), num_views
        room = torch.randint(self.num_blocks * self.BLOCK, (n,), generator=g)
        if self.split != 'train':                             # held-out rooms: each in turn
            room = (step * n + torch.arange(n)) % (self.num_blocks * self.BLOCK)
        anywhere = torch.rand(n, self.VIEWS, generator=g).argsort(1)[:, :V]
        start = torch.randint(self.VIEWS - V + 1, (n, 1), generator=g)
        together = start + torch.rand(n, V, generator=g).argsort(1)
        view = torch.where(torch.rand(n, 1, generator=g) < neighbours, together, anywhere)
        room, view = room.to(self.device), view.to(self.device)
        if n > num_scenes:
            rotation = self.pool['extrinsics'][room[:, None], view[:, :2], :, :3]         # (n, 2, 3, 3)
            same = (rotation[:, 0] * rotation[:, 1]).sum((1, 2)).argsort(descending=True)[:num_scenes]
            room, view = room[same], view[same]
        batch = {name: x[room[:, None], view] for name, x in self.pool.items()}
        batch['images'] = batch['images'].float() / 255
        batch['classes'] = batch['classes'].long()
        return batch


# -----------------------------------------------------------------------------
# photographs

PICTURES = ('.jpg', '.jpeg', '.png', '.webp')


def natural_order(name):
    """Sort key with numbers as numbers: 2.jpg before 10.jpg."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r'(\d+)', name)]


def list_pictures(folder):
    """Paths of the pictures directly in `folder`, in natural order; hidden files are passed over."""
    names = [entry.name for entry in os.scandir(folder)
             if entry.name.lower().endswith(PICTURES) and not entry.name.startswith('.') and entry.is_file()]
    return [os.path.join(folder, name) for name in sorted(names, key=natural_order)]


def open_picture(path, width=None):
    """A picture file -> PIL image, upright, RGB. Any mode will do: grey, palette, alpha (on white), CMYK, 16 bits.

    `width`: what it will be resized to, so that a large JPEG need not be decoded in full. Raises InputError with the path
    if it cannot be read to its end.
    """
    try:
        with Image.open(path) as picture:
            if width:
                picture.draft('RGB', (width, width))          # JPEG: decodes at 1/2, 1/4 or 1/8 where that is enough
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith(('I', 'F')):           # 16 bits and more: stretched to 8, since the range is anyone's
                values = np.asarray(picture, dtype=np.float64)
                low, high = values.min(), values.max()
                picture = Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
            elif picture.mode in ('LA', 'PA', 'RGBA') or 'transparency' in picture.info:
                picture = picture.convert('RGBA')
                picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
            return picture.convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = 'not a picture' if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise InputError(f'{path} cannot be read: {reason}') from error


def fit_picture(picture, width, multiple):
    """PIL image -> uint8 array (H, W, 3), `width` pixels wide, H a multiple of `multiple`, at most `width`: cropped evenly above and below."""
    height = max(multiple, round(picture.height * width / picture.width))
    keep = min(height, width) // multiple * multiple
    top = (height - keep) // 2
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))[top:top + keep]


def read_picture(path, width, multiple):
    """A picture file -> uint8 array, as the backbone wants it: `open_picture`, then `fit_picture`."""
    return fit_picture(open_picture(path, width), width, multiple)


@functools.lru_cache(maxsize=None)
def reading_fault(path, changed):
    """Why the picture cannot be read, or None. Asked once of a file (until it is `changed`): both splits look at all of them."""
    try:
        read_picture(path, 32, 1)
    except InputError as error:
        return str(error)


INDEX = 'out/index'      # where lists of pictures are kept: in our own folder, never in anybody's data set


class Index:
    """Names of the pictures in each folder of a data set, kept as JSON; a folder that has changed since is listed anew."""

    def __init__(self, root):
        self.path = os.path.join(INDEX, hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:16] + '.json')
        try:
            with open(self.path) as file:
                self.known = json.load(file)
        except (OSError, ValueError):
            self.known = {}
        self.changed = False

    def pictures(self, folder):
        stamp = os.stat(folder).st_mtime_ns
        if self.known.get(folder, [None])[0] != stamp:
            self.known[folder] = [stamp, [os.path.basename(path) for path in list_pictures(folder)]]
            self.changed = True
        return [os.path.join(folder, name) for name in self.known[folder][1]]

    def save(self):
        if not self.changed:
            return
        try:
            os.makedirs(INDEX, exist_ok=True)
            with open(f'{self.path}.{os.getpid()}', 'w') as file:
                json.dump(self.known, file)
            os.replace(f'{self.path}.{os.getpid()}', self.path)
        except OSError:
            pass                                              # it only saves time


def find_scenes(root):
    """-> layout, {scene: its pictures in order}, {split: names of its scenes, as the data set's own lists have them}.

    ScanNet     <root>/[scans/]<scene>/color/<frame>.jpg, scannetv2_train.txt and scannetv2_val.txt beside them
    ScanNet++   <root>/data/<scene>/dslr/undistorted_images/, <root>/splits/nvs_sem_train.txt and nvs_sem_val.txt
    videos      <root>/*.mp4: frames are taken out once, into a folder of ours
    folders     <root>/<scene>/, and pictures in <root> itself
    """
    index = Index(root)
    subfolders = lambda path: sorted((entry.path for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith('.')), key=natural_order)
    folders, layout, lists = subfolders(root), 'folders', {}
    base = os.path.join(root, 'scans') if os.path.isdir(os.path.join(root, 'scans')) else root
    if os.path.isdir(os.path.join(root, 'data')) and any(os.path.isdir(os.path.join(folder, 'dslr')) for folder in subfolders(os.path.join(root, 'data'))):
        layout, lists = 'ScanNet++', {'train': 'splits/nvs_sem_train.txt', 'val': 'splits/nvs_sem_val.txt'}
        places = {os.path.basename(folder): os.path.join(folder, 'dslr', 'undistorted_images') for folder in subfolders(os.path.join(root, 'data'))}
    elif any(os.path.isdir(os.path.join(folder, 'color')) for folder in subfolders(base)):
        layout, lists = 'ScanNet', {'train': 'scannetv2_train.txt', 'val': 'scannetv2_val.txt'}
        places = {os.path.basename(folder): os.path.join(folder, 'color') for folder in subfolders(base)}
    else:
        places = {**{os.path.basename(folder): folder for folder in folders}, '(its own pictures)': root}
    scenes = {name: index.pictures(folder) for name, folder in places.items() if os.path.isdir(folder)}
    videos = [entry.path for entry in os.scandir(root) if entry.is_file() and entry.name.lower().endswith(VIDEOS)]
    if layout == 'folders' and videos:
        layout = 'videos'
        scenes.update({os.path.basename(path): index.pictures(extract_frames(path)) for path in sorted(videos, key=natural_order)})
    index.save()
    splits = {}
    for split, name in lists.items():
        path = next((path for path in (os.path.join(folder, name) for folder in (root, base)) if os.path.isfile(path)), None)
        if path:
            with open(path) as file:
                splits[split] = file.read().split()
    return layout, {name: pictures for name, pictures in scenes.items() if pictures}, splits


def extract_frames(path, per_second=2, height=518):
    """Frames of a video, two a second, as JPEGs in a folder of ours; done once for each state of the file. -> the folder"""
    stat = os.stat(path)
    folder = os.path.join(INDEX, hashlib.sha256(f'{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}'.encode()).hexdigest()[:16])
    if not os.path.isdir(folder):
        unfinished = f'{folder}.{os.getpid()}'
        os.makedirs(unfinished, exist_ok=True)
        try:
            for i, frame in enumerate(read_video(path, 10 ** 6, every=1 / per_second)):
                frame.resize((max(1, frame.width * height // frame.height), height)).save(os.path.join(unfinished, f'{i:06d}.jpg'), quality=92)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder


class PhotoFolder:
    """Scenes of photographs, in any layout of `find_scenes`.

    Where the data set has lists of its splits, they decide, and a scene on no list is not used. Else a tenth of the scenes
    is held out; of a single scene, the last quarter of the pictures is, if enough are left.
    Pictures that cannot be read and scenes with fewer than `min_views` pictures are left out, by name. (Beyond
    CHECKED pictures only names are looked at beforehand, and an unreadable one stops the run when its turn comes.)
    """
    CHECKED = 5000

    def __init__(self, root, split, seed, width, multiple, min_views, gap=(1, 4), rank=0, say=print):
        if not os.path.isdir(root):
            raise InputError(f'no folder {root}: --data takes a folder of pictures, of sub-folders with pictures, or of videos')
        layout, scenes, splits = find_scenes(root)
        if not scenes:
            raise InputError(f'no pictures in {root} nor in its sub-folders ({" ".join(PICTURES)})')
        if splits:
            scenes = {name: pictures for name, pictures in scenes.items() if name in set().union(*splits.values())}
            if not scenes:
                raise InputError(f'{root}: none of the scenes on the lists of {layout} is there; see python data.py check {root}')
        if sum(map(len, scenes.values())) <= self.CHECKED:
            faults = {path: reading_fault(path, os.stat(path).st_mtime_ns) for pictures in scenes.values() for path in pictures}
            scenes = {name: [path for path in pictures if not faults[path]] for name, pictures in scenes.items()}
            for fault in filter(None, faults.values()):
                say(f'{fault}; left out')
        for name, pictures in scenes.items():
            if len(pictures) < min_views:
                say(f'scene {name} of {root} is left out: {len(pictures)} picture{"s" * (len(pictures) != 1)}, --min-views asks for {min_views}')
        scenes = {name: pictures for name, pictures in scenes.items() if len(pictures) >= min_views}
        if not scenes:
            raise InputError(f'no scene of {root} has the {min_views} pictures that --min-views asks for')

        names = sorted(scenes, key=natural_order)
        if splits:
            mine = {name for name in scenes if name in splits.get(split, ())}
            if not mine:
                raise InputError(f'{root}: no scene of the {split} list of {layout} is there with {min_views} pictures or more')
            self.held_out = f'{sum(name in splits.get("val", ()) for name in names)} scenes of the val list of {layout}'
            chosen = {name: scenes[name] for name in names if name in mine}
        elif len(names) > 1:
            held_out = names[::-1][::10]                      # the last one, and every tenth before it
            self.held_out = f'scene {", ".join(held_out)}' if len(held_out) < 4 else f'{len(held_out)} scenes'
            chosen = {name: scenes[name] for name in names if (name in held_out) == (split == 'val')}
        else:
            pictures, cut = scenes[names[0]], len(scenes[names[0]]) * 3 // 4
            if len(pictures) - cut >= min_views:
                self.held_out = f'the last {len(pictures) - cut} pictures of the only scene'
                chosen = {names[0]: pictures[cut:] if split == 'val' else pictures[:cut]}
            else:
                self.held_out = f'nothing, for the one scene has fewer than {4 * min_views} pictures: this is measured on training views'
                chosen = {names[0]: pictures}
        self.scenes = list(chosen.values())
        self.most_views = max(map(len, self.scenes))
        self.split, self.seed, self.rank = split, seed, rank
        self.width, self.multiple, self.gap = width, multiple, gap

    def advance(self, step, progress=iter):
        """Nothing to prepare: pictures are read when they are asked for."""

    def batch(self, step, num_scenes, num_views):
        """Batch `step`: `num_scenes` samples x `num_views` views in the order of their names, cropped to one height."""
        g = step_generator(self.seed, step, self.rank, self.split != 'train')
        num_views = min(num_views, self.most_views)
        samples = [self.sample(num_views, g) for _ in range(num_scenes)]
        height = min(len(picture) for sample in samples for picture in sample)
        crop = lambda picture: picture[(len(picture) - height) // 2:][:height]
        images = np.stack([np.stack([crop(picture) for picture in sample]) for sample in samples])
        return dict(images=torch.from_numpy(images).permute(0, 1, 4, 2, 3).float() / 255)

    def sample(self, num_views, g):
        """Views of one scene: a random start, then random gaps, all within the scene. -> list of (H, W, 3) arrays."""
        random = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))
        usable = [scene for scene in self.scenes if len(scene) >= num_views]
        scene = usable[random(0, len(usable) - 1)]
        most = max(1, min(self.gap[1], (len(scene) - 1) // max(1, num_views - 1)))       # this sample's alone
        gaps = [random(min(self.gap[0], most), most) for _ in range(num_views - 1)]
        frame = random(0, len(scene) - 1 - sum(gaps))
        frames = [frame + sum(gaps[:i]) for i in range(num_views)]
        return [read_picture(scene[i], self.width, self.multiple) for i in frames]


class Batches(torch.utils.data.Dataset):
    """A source as PSFM trains on it, for a DataLoader: item `step` is batch `step`, its number of views drawn for it."""

    def __init__(self, source, config):
        self.source, self.config = source, config

    def __getitem__(self, step):
        config = self.config
        num_views = views_per_scene(step, config.seed, config.min_views, config.max_views)
        return self.source.batch(step, max(1, config.images_per_batch // num_views), num_views)


def make_source(config, split, multiple, device='cpu', rank=0, world_size=1, say=print):
    """The source that a configuration names, for split 'train' or 'val'. Pictures' sides are multiples of `multiple`."""
    if config.image_width < multiple or config.image_width % multiple:
        below = max(1, config.image_width // multiple) * multiple
        raise InputError(f'--image-width {config.image_width} is not a multiple of the patch size {multiple}: '
                         f'take {below} or {below + multiple}')
    if config.data == 'rooms':
        size = config.image_width, config.image_width
        if split == 'train':
            return RoomPool(split, config.seed, config.num_rooms, config.new_rooms, size, device, rank, world_size)
        return RoomPool(split, 0, config.val_scenes, 0, size, device)
    return PhotoFolder(config.data, split, config.seed, config.image_width, multiple, config.min_views,
                       (config.min_gap, config.max_gap), rank if split == 'train' else 0, say)


# -----------------------------------------------------------------------------
# videos

VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm')


def even_frames(count, num_frames):
    """Indices of `num_frames` frames spread evenly over `count`, first and last included; all, if there are no more."""
    return sorted(set(np.linspace(0, count - 1, min(num_frames, count)).astype(int).tolist()))


def read_video(path, num_frames, every=None):
    """Frames of a video file, or of a folder of frames (taken as one a second). -> list of PIL images

    `num_frames`: spread evenly over the video. With `every`: one in so many seconds, at least 4 and at most num_frames.
    Files need PyAV (pip install av). Raises InputError with the path.
    """
    def upright(frame):                                       # phones store how they were held
        return frame.to_image().rotate(getattr(frame, 'rotation', 0), expand=True)

    def choose(count, seconds):
        n = min(num_frames, max(4, round(seconds / every))) if every else num_frames
        return even_frames(count, n)

    if os.path.isdir(path):
        pictures = list_pictures(path)
        if not pictures:
            raise InputError(f'no frames in the folder {path} ({" ".join(PICTURES)})')
        return [open_picture(pictures[i]) for i in choose(len(pictures), len(pictures))]
    if not os.path.isfile(path):
        raise InputError(f'no video at {path}')
    try:
        import av
    except ImportError as error:
        raise InputError(f'{path}: reading video files takes PyAV (pip install av); a folder of frames goes without') from error
    try:
        with av.open(path) as container:                      # a first pass counts: headers are often wrong about it
            stream = container.streams.video[0]
            count = sum(1 for packet in container.demux(stream) if packet.size)
            rate = float(stream.average_rate or 30)
        wanted, frames, i = choose(count, count / rate), {}, -1
        with av.open(path) as container:
            container.streams.video[0].thread_type = 'AUTO'
            for i, frame in enumerate(container.decode(video=0)):
                last = frame
                if i in wanted:
                    frames[i] = upright(frame)
                if i >= wanted[-1]:
                    break
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise InputError(f'{path} cannot be read as a video, or not to its end: {error}') from error
    if i >= 0.9 * wanted[-1]:                                 # packets may be a few more than frames: the last frame stands in
        frames.update({j: upright(last) for j in wanted if j not in frames})
    if len(frames) < len(wanted):
        raise InputError(f'{path} ends early: {len(frames)} of {len(wanted)} frames could be read')
    return [frames[i] for i in wanted]


# -----------------------------------------------------------------------------
# conversations about pictures. An item is a dict: `images`, a list of PIL images, and `conversations`, a list of
# {'from': 'human' | 'gpt', 'value': text}, where each <image> in a text stands for the next of the images.

def view_rooms(split, seed, num_rooms, num_views, progress=iter):
    """Blocks of rooms as questions need them. -> iterator over (number of the first room, Rooms, images (R, V, H, W, 3) uint8, surface ids (R, V, h, w),
    cells (R, V, K): how many cells each piece fills, extrinsics (R, V, 3, 4), patches: what each patch shows (R, V, 16, 11) and where in the world (R, V, 16, 3))"""
    pool = RoomPool(split, seed, num_rooms)
    for index in progress(range(-(-num_rooms // pool.BLOCK))):
        rooms, views = pool.render_block(index, num_views)
        surface = views['surface'].long()
        patches = what_patches_show(rooms, surface, views['depth'], views['extrinsics'], views['intrinsics'], pool.size)
        yield (index * pool.BLOCK, rooms, views['images'].permute(0, 1, 3, 4, 2).contiguous(), surface, F.one_hot(surface.flatten(2), 6 + K)[..., 6:].sum(2),
               views['extrinsics'], patches)


class RoomQuestions(torch.utils.data.Dataset):
    """VSI-Bench's questions about rooms: item i is room i, seen from VIEWS places of a walk, and everything asked about it.

    To train on, half of the choices are asked for in words, and a map in words (`ask_map`) comes after the questions about every second room.

    `records`: the questions one by one, in VSI-Bench's schema, with `room`, the index of their room; `maps`: (prompt, answer) of every room.
    Items also hold `seen` (V, 16, 11 + 3): what each sixteenth of a picture shows, and where, and `stand` (C, 3), where the only piece of each category stands; both
    seen from the first camera (rooms.what_patches_show, in_map_frame).
    """
    VIEWS = 6

    def __init__(self, split, seed, num_rooms, progress=iter):
        self.seed, self.split = seed, split
        images, seen, stand, self.questions, self.records, self.maps, used = [], [], [], [], [], [], collections.Counter()
        for start, rooms, pictures, _, cells, cameras, (shares, places) in view_rooms(split, seed, num_rooms, self.VIEWS, progress):
            images.append(pictures)
            seen.append(torch.cat([shares, in_map_frame(places, cameras[:, :1])], -1))
            for room in range(len(pictures)):
                g = step_generator(seed, start + room, 5, split != 'train')
                self.questions.append(ask(rooms, room, cells[room], f'room-{split}-{seed}-{start + room}', g, used))
                self.maps.append(ask_map(rooms, room, cells[room], cameras[room, 0]))
                stand.append(where_categories_stand(rooms, room, cameras[room, 0]))
                self.records += [dict(record, id=len(self.records) + i, room=start + room) for i, record in enumerate(self.questions[-1])]
        self.images, self.seen, self.stand = torch.cat(images).numpy(), torch.cat(seen), torch.stack(stand)

    def __len__(self):
        return len(self.questions)

    def pictures(self, room):
        return [Image.fromarray(image) for image in self.images[room]]

    def map_of(self, i):
        """Room i's map from the first camera, and nothing else."""
        return dict(images=self.pictures(i), seen=self.seen[i], stand=self.stand[i], conversations=to_turns('<image>' * self.VIEWS, [self.maps[i]]))

    def __getitem__(self, i):
        g = step_generator(self.seed, i, 6)
        questions = shuffled(self.questions[i], g)
        if self.split == 'train':
            questions = [in_words(question) if draw([True, False], g) else question for question in questions]
        last = [self.maps[i]] if self.split == 'train' and i % 2 else []                  # last: no answer can be read off it
        turns = [(vsi_prompt(question), question['ground_truth']) for question in questions]
        return dict(images=self.pictures(i), seen=self.seen[i], stand=self.stand[i], conversations=to_turns('<image>' * self.VIEWS, turns + last))


class RoomPictures(torch.utils.data.Dataset):
    """What the mini VLM is pre-trained on: questions that need no scene. Of each room come six items of one picture, with up to eighteen questions about what it alone
    shows (`ask_2d`, and VSI-Bench's as if it were the whole video) and last its map, and one item of six pictures from six rooms (`ask_slides`).

    Items also hold `kinds`, the kind of every answer; `seen` (images, 16, 11 + 3) as in RoomQuestions, but from each picture's own camera; and `stand` (C, 3), where the
    only piece of each category stands.
    """
    VIEWS, QUESTIONS = 6, 18

    def __init__(self, split, seed, num_rooms):
        self.items, used, asked = [], collections.Counter(), []
        images, seen, shown, stand = [], [], [], []
        for start, rooms, pictures, surface, cells, cameras, (shares, places) in view_rooms(split, seed, num_rooms, self.VIEWS):
            images.append(pictures)
            seen.append(torch.cat([shares, in_map_frame(places, cameras)], -1))
            for room, view in itertools.product(range(len(pictures)), range(self.VIEWS)):
                g, alone = step_generator(seed, start + room, 5, split != 'train', view), cells[room, view:view + 1]
                only = dataclasses.replace(rooms, present=rooms.present & (alone >= SEEN))                    # the rest of the room is not asked about
                shown.append({CATEGORIES[rooms.category[room, k]] for k in only.present[room].nonzero()[:, 0].tolist()})
                stand.append(where_categories_stand(only, room, cameras[room, view]))
                questions = [record for record in ask(only, room, alone, '', g, used, per_task=4) if record['question_type'] != 'room_size_estimation']
                questions = shuffled(ask_2d(rooms, room, surface[room, view], g) + questions, g)[:self.QUESTIONS]
                questions = [in_words(record) if record['question_type'] != 'letter' and draw([True, False], g) else record for record in questions]
                prompt, overview = ask_map(rooms, room, alone, cameras[room, view])
                asked.append([(record['question_type'], vsi_prompt(record), record['ground_truth']) for record in questions] + [('map', prompt, overview)])
        images, seen = torch.cat(images).flatten(0, 1).numpy(), torch.cat(seen).flatten(0, 1)                 # (rooms x views, ...)
        slides = torch.arange(len(asked)).view(-1, self.VIEWS)
        for view in range(self.VIEWS):
            slides[:, view] = slides[:, view].roll(view)                                  # six rooms, if there are as many
        for picture, turns in enumerate(asked):
            self.items.append(([picture], turns))
        for number, row in enumerate(slides.tolist()):
            questions = ask_slides([shown[i] for i in row], step_generator(seed, number, 12, split != 'train'), used)
            self.items.append((row, [(record['question_type'], vsi_prompt(record), record['ground_truth']) for record in questions]))
        self.images, self.seen, self.stand = images, seen, torch.stack(stand)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        pictures, turns = self.items[i]
        stand = self.stand[pictures[0]] if len(pictures) == 1 else torch.full((len(CATEGORIES), 3), math.nan)
        return dict(images=[Image.fromarray(self.images[j]) for j in pictures], seen=self.seen[pictures], stand=stand, kinds=[kind for kind, _, _ in turns],
                    conversations=to_turns('<image>' * len(pictures), [turn[1:] for turn in turns]))


def to_turns(before, turns):
    """[(question, answer)] -> conversations; `before` stands in front of the first question."""
    conversations = []
    for question, answer in turns:
        conversations += [{'from': 'human', 'value': before + question}, {'from': 'gpt', 'value': answer}]
        before = ''
    return conversations


class Conversations(torch.utils.data.Dataset):
    """Records of instruction data from JSON and JSONL files, in the format of LLaVA, VSI-590K and the VG-LLM mix.

    files: paths, with an optional share after a colon ('vsi_590k.jsonl:0.25' takes a quarter, the same one every time).
    A record: `conversations`, and `image` or `images` (a path or a list) or `video` (a file or a folder of frames), paths
    relative to `media`. <video>, and a single <image> before a video, stand for all its frames. `spar_info`: markers to
    be drawn on the images. All records are looked at beforehand; a faulty one stops with a sentence that names file and
    record, or with `skip_bad` is counted and left out.
    """

    def __init__(self, files, media, num_frames=8, skip_bad=False, seed=0, say=print):
        self.media, self.num_frames, self.records = media, num_frames, []
        exists = functools.lru_cache(maxsize=None)(os.path.exists)
        for file in files:
            path, _, share = file.rpartition(':') if re.fullmatch(r'.*:[0-9.]+', file) else (file, '', '1')
            faults, kept = [], []
            for number, record, fault in read_records(path):
                fault = fault or record_fault(record, media, exists)
                if fault:
                    faults.append(f'{path}, record {number}: {fault}')
                else:
                    kept.append(dict(record, where=f'{path}, record {number}'))
            if faults and not skip_bad:
                raise InputError(faults[0] + (f' ({len(faults)} such records of {len(faults) + len(kept)}; --skip-bad leaves them out)'))
            if faults:
                say(f'{path}: {len(faults)} of {len(faults) + len(kept)} records left out; the first: {faults[0]}')
            if not 0 < float(share) <= 1:
                raise InputError(f'{file}: the share after the colon lies between 0 and 1')
            some = torch.randperm(len(kept), generator=step_generator(seed, 8))[:round(float(share) * len(kept))]
            self.records += [kept[i] for i in sorted(some.tolist())] if float(share) < 1 else kept
        if not self.records:
            raise InputError(f'no usable record in {" ".join(files)}')

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self.records[i]
        try:
            if record.get('video'):
                images = read_video(os.path.join(self.media, record['video']), self.num_frames, every=2.0)
            else:
                images = [open_picture(os.path.join(self.media, path)) for path in media_paths(record)]
            if record.get('spar_info'):
                images = draw_markers(images, record['spar_info'])
        except InputError as error:
            raise InputError(f'{record["where"]}: {error}') from error
        turns = []
        for turn in record['conversations']:
            text = turn['value']
            if record.get('video'):
                # VSI-590K writes <image> before videos too
                text = re.sub(r'<(video|image)>\n?', lambda match: '<image>' * len(images), text, count=1)
            turns.append({'from': turn['from'], 'value': text.replace('<image>\n', '<image>')})
        return dict(images=images, conversations=turns)


def read_records(path):
    """Yields (number from 1, record, fault) of a .jsonl file, or of a .json file that holds one list."""
    try:
        with open(path, encoding='utf-8') as file:
            if path.endswith('.jsonl'):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        try:
                            yield number, json.loads(line), None
                        except ValueError as error:
                            yield number, None, f'not JSON ({error})'
                return
            records = json.load(file)
    except FileNotFoundError as error:
        raise InputError(f'no file {path}') from error
    except (OSError, ValueError) as error:
        raise InputError(f'{path} cannot be read as JSON: {error}') from error
    if not isinstance(records, list):
        raise InputError(f'{path} holds a {type(records).__name__}, not a list of records')
    for number, record in enumerate(records, 1):
        yield number, record, None


def media_paths(record):
    paths = record.get('images') or record.get('image') or []
    return [paths] if isinstance(paths, str) else list(paths)


def record_fault(record, media, exists=os.path.exists):
    """What is wrong with a record of instruction data, or None."""
    turns = record.get('conversations') if isinstance(record, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return 'no list of at least two turns under "conversations"'
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get('from') not in ('human', 'gpt'):
            return f'turn {i + 1} is from {turn.get("from")!r}, not "human" or "gpt"' if isinstance(turn, dict) else f'turn {i + 1} is not an object'
        if turn['from'] != ('human', 'gpt')[i % 2]:
            return f'turn {i + 1} is from {turn["from"]!r}; human and gpt take turns, human first'
        if not isinstance(turn.get('value'), str) or turn['from'] == 'gpt' and not turn['value'].strip():
            return f'turn {i + 1} has an empty answer' if turn['from'] == 'gpt' else f'turn {i + 1} has no text under "value"'
    if len(turns) % 2:
        return 'the last turn is a question without an answer'
    text = ''.join(turn['value'] for turn in turns)
    videos = record.get('video')
    if videos is not None:
        if not isinstance(videos, str):
            return '"video" is not one path'
        if text.count('<video>') + text.count('<image>') != 1:
            return f'{text.count("<video>") + text.count("<image>")} <video> tokens for one video'
        paths = [videos]
    else:
        paths = media_paths(record)
        if text.count('<video>'):
            return 'a <video> token, but no "video"'
        if text.count('<image>') != len(paths):
            return f'{text.count("<image>")} <image> tokens for {len(paths)} images'
    if record.get('spar_info'):
        try:
            draw_markers([Image.new('RGB', (8, 8))] * max(1, len(paths)), record['spar_info'])
        except (ValueError, TypeError, AttributeError) as error:
            return f'"spar_info" cannot be read ({error})'
    lost = [path for path in paths if not exists(os.path.join(media, path))]
    if lost:
        return f'missing {os.path.join(media, lost[0])}' + (f' and {len(lost) - 1} more' if len(lost) > 1 else '')


MARKER_COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255), 'yellow': (255, 255, 0)}


def draw_markers(images, spar_info):
    """The points and boxes that SPAR's questions speak of ("the red point"), drawn on copies of the images.

    spar_info: JSON text: <colour>_point [[x, y], ...] and <colour>_bbox [[x0, y0, x1, y1], ...] in thousandths of the image,
    point_img_idx / bbox_img_idx [[...]]: on which image each of them lies, in the order of the keys.
    """
    info = json.loads(spar_info) if isinstance(spar_info, str) else spar_info
    images = [image.copy() for image in images]
    for kind in ('point', 'bbox'):
        where = np.ravel(info.get(f'{kind}_img_idx', [])).astype(int).tolist()
        marks = [(name.split('_')[0], mark) for name, marks in info.items() if name.endswith(f'_{kind}') for mark in marks]
        for i, (colour, mark) in enumerate(marks):
            image = images[where[i] if i < len(where) and where[i] < len(images) else 0]
            draw, (W, H) = ImageDraw.Draw(image), image.size
            x = [value * (W, H)[j % 2] / 1000 for j, value in enumerate(mark)]
            paint, width = MARKER_COLOURS.get(colour, (255, 0, 0)), max(2, round(max(W, H) / 200))
            if kind == 'point':
                draw.ellipse([x[0] - 2 * width, x[1] - 2 * width, x[0] + 2 * width, x[1] + 2 * width], fill=paint)
            else:
                draw.rectangle(x, outline=paint, width=width)
    return images


# -----------------------------------------------------------------------------
# the four benchmarks, as the hub has them

def read_benchmark(name, root):
    """Questions of a benchmark from a folder with the hub's files.

    name: vsibench, cvbench, sparbench, viewspatial. -> list of dicts: the document's own fields, `key` (which tells one
    question from another) and `media`: the path of a video, or a list of pictures (paths, or bytes as in parquet files).
    """
    docs = {'vsibench': read_vsibench, 'cvbench': read_cvbench, 'sparbench': read_sparbench, 'viewspatial': read_viewspatial}[name](root)
    fields = {'vsibench': ('question_type', 'question', 'ground_truth'), 'cvbench': ('task', 'source', 'prompt', 'choices', 'answer'),
              'sparbench': ('task', 'question', 'answer'), 'viewspatial': ('question_type', 'question', 'choices', 'answer')}[name]
    for doc in docs:
        lacking = [field for field in fields if doc.get(field) is None]
        if lacking:
            raise InputError(f'{root}: question {doc["key"]} of {name} has no {" nor ".join(lacking)}; it has {", ".join(map(str, doc))}')
    return docs


def download_benchmark(name):
    """A dataset's id on the hub -> the folder with its files, fetched once."""
    if name.count('/') != 1 or name.startswith(('.', '/')):
        raise InputError(f'no folder {name}')
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        return snapshot_download(name, repo_type='dataset')
    except (RepositoryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f'no folder {name}, and it could not be fetched from the hub ({str(error).strip().splitlines()[0]})') from error


def read_parquet(paths):
    """Rows of parquet files as dicts. Needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f'{paths[0]}: reading parquet files takes pyarrow (pip install pyarrow)') from error
    rows = []
    for path in paths:
        try:
            rows += pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f'{path} cannot be read as parquet: {str(error).strip().splitlines()[0]}') from error
    return rows


def find_parquet(root, *patterns):
    for pattern in patterns:
        paths = sorted(glob.glob(os.path.join(root, pattern)))
        if paths:
            return paths
    raise InputError(f'no {" nor ".join(patterns)} in {root}')


def read_lines(path):
    records = []
    for number, record, fault in read_records(path):
        if fault or not isinstance(record, dict):
            raise InputError(f'{path}, record {number}: {fault or "not an object"}')
        records.append(record)
    return records


def read_vsibench(root):
    path = os.path.join(root, 'test.jsonl')
    docs = read_lines(path) if os.path.isfile(path) else read_parquet(find_parquet(root, 'test-*.parquet', 'test*.parquet'))
    for i, doc in enumerate(docs):
        for field in ('dataset', 'scene_name'):
            if field not in doc:
                raise InputError(f'{root}: question {i} has no {field}')
        doc.update(key=str(doc.get('id', i)), media=os.path.join(root, doc['dataset'], f'{doc["scene_name"]}.mp4'))
    return docs


def read_cvbench(root):
    path = [os.path.join(root, name) for name in ('test_2d.jsonl', 'test_3d.jsonl')]
    if glob.glob(os.path.join(root, 'test*.parquet')):
        docs = read_parquet(find_parquet(root, 'test.parquet', 'test-*.parquet', 'test_*.parquet'))
    else:
        docs = [doc for file in path if os.path.isfile(file) for doc in read_lines(file)]
    if not docs:
        raise InputError(f'neither test*.parquet nor test_2d.jsonl and test_3d.jsonl in {root}')
    for i, doc in enumerate(docs):
        picture = doc.pop('image', None)
        doc.update(key=f'{doc.get("type", "")}{doc.get("idx", i)}', media=[picture['bytes'] if picture else os.path.join(root, doc.get('filename', ''))])
    return docs


def read_sparbench(root):
    docs = read_parquet(find_parquet(root, 'data/test-*.parquet', 'test-*.parquet'))
    for i, doc in enumerate(docs):
        doc.update(key=str(doc.get('id', i)), media=[picture['bytes'] if isinstance(picture, dict) else picture for picture in doc.pop('image', None) or []])
    return docs


def read_viewspatial(root):
    path = os.path.join(root, 'ViewSpatial-Bench.json')
    docs = read_lines(path)
    for i, doc in enumerate(docs):
        paths = doc.get('image_path') or []
        doc.update(key=str(i), media=[os.path.join(root, path.removeprefix('ViewSpatial-Bench/')) for path in paths])
    return docs


def open_media(media, num_frames):
    """`media` of a question -> list of PIL images: all pictures, or `num_frames` of a video."""
    if isinstance(media, str):
        return read_video(media, num_frames)
    return [open_picture(io.BytesIO(picture) if isinstance(picture, bytes) else picture) for picture in media]


# -----------------------------------------------------------------------------

def check(root, sample=3):
    """What is in a data set, and what is missing or broken, from a few pictures of each scene."""
    if not os.path.isdir(root):
        raise InputError(f'no folder {root}')
    layout, scenes, splits = find_scenes(root)
    if not scenes:
        raise InputError(f'no pictures in {root}: it takes <scene>/color/ (ScanNet), data/<scene>/dslr/undistorted_images/ (ScanNet++), sub-folders, or videos')
    counts = sorted(map(len, scenes.values()))
    lines = [f'{root}: layout {layout}, {len(scenes)} scenes, {sum(counts)} pictures ({counts[0]} to {counts[-1]} a scene, median {counts[len(counts) // 2]})']
    sizes, broken = collections.Counter(), []
    for pictures in list(scenes.values())[:500]:
        for i in even_frames(len(pictures), sample):
            try:
                with Image.open(pictures[i]) as picture:
                    sizes[picture.size] += 1
                fault = reading_fault(pictures[i], os.stat(pictures[i]).st_mtime_ns)
                broken += [fault] if fault else []
            except (OSError, SyntaxError) as error:
                broken.append(f'{pictures[i]} cannot be read: {error}')
    lines.append('sizes: ' + ', '.join(f'{w} x {h} ({n} of those looked at)' for (w, h), n in sizes.most_common(3)))
    lines.append(f'unreadable: {len(broken)} of {sum(sizes.values())} looked at' + ''.join(f'\n  {fault}' for fault in broken[:5]))
    for split, names in splits.items():
        lost = [name for name in names if name not in scenes]
        lines.append(f'{split} list: {len(names)} scenes, {len(names) - len(lost)} of them here' + (f'; missing: {", ".join(lost[:3])}{" ..." * (len(lost) > 3)}' if lost else ''))
    if layout in ('ScanNet', 'ScanNet++'):
        if 'train' not in splits:
            name = 'scannetv2_train.txt and scannetv2_val.txt' if layout == 'ScanNet' else 'splits/nvs_sem_train.txt and nvs_sem_val.txt'
            lines.append(f'no list of the training scenes ({name}): without it a tenth is held out, and scenes that VSI-Bench asks about may be trained on')
        else:
            unlisted = [name for name in scenes if name not in set().union(*splits.values())]
            lines += [f'on no list, not used: {len(unlisted)} scenes ({", ".join(unlisted[:3])})'] * bool(unlisted)
    return '\n'.join(lines)


if __name__ == '__main__':
    if len(sys.argv) != 3 or sys.argv[1] != 'check':
        sys.exit('usage: python data.py check FOLDER')
    try:
        print(check(sys.argv[2]))
    except InputError as error:
        sys.exit(f'error: {error}')
