"""
Sources of multi-view samples: the procedural rooms, and folders of photographs.

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
import functools
import os
import re

import numpy as np
import torch
from PIL import Image, ImageOps

from model import InputError
from rooms import make_intrinsics, make_rooms, make_walk, render, room_seed, surface_classes

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

    def render_block(self, index):
        """-> the Rooms of block `index`, and what their views show: a dict as a batch's, with `surface` ids (rooms.render) for `classes`."""
        seed = room_seed(self.split, self.seed, index * self.world_size + self.rank)
        rooms = make_rooms(self.BLOCK, seed)
        extrinsics = make_walk(rooms, self.VIEWS, seed)
        intrinsics = make_intrinsics(self.size, self.BLOCK, self.VIEWS)
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


def read_picture(path, width, multiple):
    """A picture file -> uint8 array (H, W, 3): upright, RGB, `width` pixels wide, H a multiple of `multiple`, at most `width`.

    Rows are cropped evenly above and below. Any mode will do: grey, palette, alpha (on white), CMYK, 16 bits.
    Raises InputError with the path if it cannot be read to its end.
    """
    try:
        with Image.open(path) as picture:
            picture.draft('RGB', (width, width))              # JPEG: decodes at 1/2, 1/4 or 1/8 where that is enough
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith(('I', 'F')):           # 16 bits and more: stretched to 8, since the range is anyone's
                values = np.asarray(picture, dtype=np.float64)
                low, high = values.min(), values.max()
                picture = Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
            elif picture.mode in ('LA', 'PA', 'RGBA') or 'transparency' in picture.info:
                picture = picture.convert('RGBA')
                picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
            picture = picture.convert('RGB')
            height = max(multiple, round(picture.height * width / picture.width))
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = 'not a picture' if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise InputError(f'{path} cannot be read: {reason}') from error
    keep = min(height, width) // multiple * multiple
    top = (height - keep) // 2
    return np.asarray(picture)[top:top + keep]


@functools.lru_cache(maxsize=None)
def reading_fault(path, changed):
    """Why the picture cannot be read, or None. Asked once of a file (until it is `changed`): both splits look at all of them."""
    try:
        read_picture(path, 32, 1)
    except InputError as error:
        return str(error)


class PhotoFolder:
    """Scenes of photographs: every sub-folder of `root` with pictures is a scene; pictures in `root` itself are one more.

    A tenth of the scenes is held out. Of a single scene, the last quarter of the pictures is, if enough are left.
    Pictures that cannot be read and scenes with fewer than `min_views` pictures are left out, by name. (Beyond
    CHECKED pictures only names are looked at beforehand, and an unreadable one stops the run when its turn comes.)
    """
    CHECKED = 5000

    def __init__(self, root, split, seed, width, multiple, min_views, gap=(1, 4), rank=0, say=print):
        if not os.path.isdir(root):
            raise InputError(f'no folder {root}: --data takes a folder of pictures, or of sub-folders with pictures')
        folders = sorted((entry.path for entry in os.scandir(root) if entry.is_dir()), key=natural_order)
        scenes = {os.path.basename(folder): list_pictures(folder) for folder in folders}
        scenes = {name: pictures for name, pictures in {**scenes, '(its own pictures)': list_pictures(root)}.items() if pictures}
        if not scenes:
            raise InputError(f'no pictures in {root} nor in its sub-folders ({" ".join(PICTURES)})')
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
        if len(names) > 1:
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
