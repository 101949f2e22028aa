"""
Sources of multi-view samples: the procedural rooms, photographs, ScanNet, ScanNet++, videos.

    python data.py check FOLDER        # what is in a data set, and what is missing or broken

A source answers one question: what is batch `number`? The answer depends on nothing but the
source's settings and that number, so that a resumed run sees what the uninterrupted one would
have seen, and every process of a DDP run draws its own share.

A batch is a dict of tensors: images (B, V, 3, H, W) in [0, 1]. Rooms also know extrinsics
(B, V, 3, 4), intrinsics (B, V, 3, 3) and, for cells of 4 x 4 pixels (not the backbone's patches),
depth (B, V, H/4, W/4) in metres and classes (B, V, H/4, W/4), indices into rooms.CLASSES.
"""
import itertools
import os
from collections import Counter

import torch
from tqdm import tqdm

from backbone import fit_picture, to_one_height
from common import InputError, Parser, quiet, run_script, step_generator
from media import (even_frames, find_scenes_or_say_why, natural_order, open_file, open_picture,
                   reading_fault)
from model import full_precision
from rooms import (Style, make_intrinsics, make_rooms, make_walk, render, room_seed,
                   surface_classes)

CELL = 4                            # pixels a side: depth and classes have this resolution


def own_cores():
    """How many cores this process may use. More processes than that read pictures no faster."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


# -----------------------------------------------------------------------------
# rooms

def rendering(blocks):
    """A progress bar, for `progress` of what renders rooms."""
    return tqdm(blocks, 'rendering rooms', leave=False, disable=None)


def stream_of(source, number):
    """The random numbers of batch `number` of this process. (These four words are never those of
    one of train.py's streams.)"""
    return step_generator(source.seed, number, 16 * source.rank, source.split != 'train')


class RoomPool:
    """Rooms rendered into memory: a window that slides over an endless row of them.

    At batch b the pool holds num_rooms rooms of its split, from room b * new_rooms on, with eight
    views each. Rendering stays a small part of a step, and no room is seen often enough to be
    memorised.
    """
    held_out_text = 'rooms that training never shows'
    reserved = None  # rooms are held out by their seeds
    BLOCK = 4  # rooms are made and rendered so many at a time
    VIEWS = 8

    def __init__(self, split, seed, num_rooms, new_rooms=0.0, image_size=(64, 64), device='cpu',
                 rank=0, world_size=1, style=Style()):
        self.split, self.seed, self.new_rooms = split, seed, new_rooms
        self.size, self.device, self.style = image_size, device, style
        self.rank, self.world_size = rank, world_size
        self.num_blocks = max(1, num_rooms // self.BLOCK)
        self.blocks = {}  # slot -> index of the block that is in it
        self.pool = None  # name -> tensor of all rooms

    @torch.no_grad()
    @full_precision
    def render_block(self, index, num_views=VIEWS):
        """-> the Rooms of block `index`, and their views: a batch with uint8 images, and `surface`
        for `classes`.

        Always in fp32 without gradients, whatever the context of the caller is.
        """
        seed = room_seed(self.split, self.seed, index * self.world_size + self.rank)
        rooms = make_rooms(self.BLOCK, seed, self.style)
        extrinsics = make_walk(rooms, self.VIEWS, seed, self.style)[:, :num_views]
        extrinsics = extrinsics.to(self.device)
        intrinsics = make_intrinsics(self.size, self.BLOCK, num_views,
                                     field_of_view=self.style.field_of_view).to(self.device)
        rooms = rooms.to(self.device)
        views = render(rooms, extrinsics, intrinsics, self.size)
        # a cell's depth is that of the ray through its center: rendered at the cells' resolution
        (H, W), (h, w) = self.size, [side // CELL for side in self.size]
        shrink = intrinsics.new_tensor([[w / W], [h / H], [1]])
        cells = render(rooms, extrinsics, intrinsics * shrink, (h, w))
        return rooms, dict(images=views['image'], depth=cells['depth'], surface=cells['surface'],
                           extrinsics=extrinsics, intrinsics=intrinsics)

    def advance(self, number, progress=iter):
        """Moves the window to where `number` wants it. Block b lives in slot b % num_blocks."""
        first = int(number * self.new_rooms) // self.BLOCK
        wanted = range(first, first + self.num_blocks)
        due = [b for b in wanted if self.blocks.get(b % self.num_blocks) != b]
        for index in progress(due):
            slot = index % self.num_blocks
            rooms, block = self.render_block(index)
            block['classes'] = surface_classes(rooms, block.pop('surface')).to(torch.uint8)
            if self.pool is None:
                n = self.num_blocks * self.BLOCK
                self.pool = {name: x.new_empty(n, *x.shape[1:]) for name, x in block.items()}
            for name, x in block.items():
                self.pool[name][slot * self.BLOCK:][:self.BLOCK] = x
            self.blocks[slot] = index

    def batch(self, number, num_scenes, num_views, neighbours=0.0, keep_closest=1.0):
        """Batch `number`: `num_scenes` scenes x `num_views` views, in random order.

        `neighbours`: share of the samples whose views follow each other on the walk (the others:
        any views). `keep_closest`: num_scenes / keep_closest samples are drawn, and those are
        kept whose first two views differ least. (Both are for mini_vggt.py: near views first.)
        """
        self.advance(number)
        g = stream_of(self, number)
        n, V = round(num_scenes / keep_closest), num_views

        # which rooms: any, but of held-out ones each in turn
        num_rooms = self.num_blocks * self.BLOCK
        room = torch.randint(num_rooms, (n,), generator=g)
        if self.split != 'train':
            room = (number * n + torch.arange(n)) % num_rooms
        # which views: V of all in random order, or V neighbours in random order
        anywhere = torch.rand(n, self.VIEWS, generator=g).argsort(1)[:, :V]
        start = torch.randint(self.VIEWS - V + 1, (n, 1), generator=g)
        together = start + torch.rand(n, V, generator=g).argsort(1)
        is_together = torch.rand(n, 1, generator=g) < neighbours
        view = torch.where(is_together, together, anywhere)  # (n, V)
        room, view = room.to(self.device), view.to(self.device)
        if n > num_scenes:
            rotation = self.pool['extrinsics'][room[:, None], view[:, :2], :, :3]
            likeness = (rotation[:, 0] * rotation[:, 1]).sum((1, 2))  # (n,) trace of R1 R2^T
            closest = likeness.argsort(descending=True)[:num_scenes]
            room, view = room[closest], view[closest]
        batch = {name: x[room[:, None], view] for name, x in self.pool.items()}
        batch['images'] = batch['images'].float() / 255
        batch['classes'] = batch['classes'].long()
        return batch


# -----------------------------------------------------------------------------
# data sets of photographs

class PhotoFolder:
    """Scenes of photographs, in any layout of `find_scenes`.

    Where the data set has lists of its splits, they decide, and a scene on no list is not used.
    Else a tenth of the scenes is held out; of a single scene, its last quarter, if that is enough.
    `reserved` repeats what a run held out before the folder changed: names of scenes, or of the
    only scene's pictures (None: split now; []: nothing was held out). Pictures that cannot be read
    and scenes with fewer than `min_views` pictures are left out, by name. (Beyond CHECKED pictures
    only names are looked at beforehand; where one is unreadable, other views stand in.)
    """
    CHECKED = 5000
    DRAWS = 10

    def __init__(self, root, split, seed, width, multiple, min_views, gap=(1, 4), rank=0,
                 say=print, reserved=None):
        self.split, self.seed, self.rank, self.reserved = split, seed, rank, reserved
        self.width, self.multiple, self.gap = width, multiple, gap
        found = find_scenes_or_say_why(root, say)
        if found.unused:
            say(f'{root}: {found.say_unused()}')
        scenes = found.scenes
        if 'val' in found.splits and 'train' not in found.splits:
            found.splits['train'] = [x for x in scenes if x not in found.splits['val']]
        if found.splits:
            listed = set().union(*found.splits.values())
            scenes = {name: pictures for name, pictures in scenes.items() if name in listed}
            if not scenes:
                raise InputError(f'{root}: none of the scenes on the lists of {found.layout} is '
                                 f'there; see python data.py check {root}')
        scenes = self.leave_out(root, scenes, min_views, say)
        if 'val' in found.splits:
            self.scenes = self.split_by_lists(root, scenes, found.splits, found.layout)
        elif len(scenes) > 1 or set(scenes) <= set(reserved or ()):
            self.scenes = self.split_by_scenes(scenes)
        else:
            self.scenes = self.split_pictures(next(iter(scenes.values())), min_views)
        if max(map(len, self.scenes), default=0) < 2:  # one to see, one to predict
            raise InputError(f'{root} lacks what this run held out, or all else; use another --out')
        self.most_views = max(map(len, self.scenes))

    def leave_out(self, root, scenes, min_views, say):
        """Without unreadable pictures and scenes that are too short. -> scenes"""
        are_checked = sum(map(len, scenes.values())) <= self.CHECKED
        usable = {}
        for name, pictures in scenes.items():
            if are_checked:
                faults = [reading_fault(path) for path in pictures]
                pictures = [path for path, fault in zip(pictures, faults) if not fault]
                faults = list(filter(None, faults))
                for fault in faults[:5]:
                    say(f'{fault}; left out')
                if len(faults) > 5:
                    say(f'scene {name}: {len(faults) - 5} more pictures are left out like that')
            if len(pictures) >= min_views:
                usable[name] = pictures
                continue
            count = f'{len(pictures)} picture' + 's' * (len(pictures) != 1)
            say(f'scene {name} of {root} is left out: {count}, --min-views asks for {min_views}')
        if not usable:
            raise InputError(f'no scene of {root} has the {min_views} pictures of --min-views')
        return usable

    def split_by_lists(self, root, scenes, splits, layout):
        names = sorted(scenes, key=natural_order)
        mine = [name for name in names if name in splits.get(self.split, ())]
        if not mine:
            raise InputError(f'{root}: no scene of the {self.split} list of {layout} is there with '
                             'enough pictures')
        num_held_out = sum(name in splits.get('val', ()) for name in names)
        self.held_out_text = f'{num_held_out} scenes of the val list of {layout}'
        return [scenes[name] for name in mine]

    def split_by_scenes(self, scenes):
        names = sorted(scenes, key=natural_order)
        if self.reserved == []:
            raise InputError('when this run began there was one scene, and nothing was held out; '
                             'now there are more: begin anew in another --out')
        # the last one, and every tenth before it
        self.reserved = held_out = self.reserved or names[::-1][::10]
        few = len(held_out) < 4
        self.held_out_text = f'scene {", ".join(held_out)}' if few else f'{len(held_out)} scenes'
        return [scenes[name] for name in names if (name in held_out) == (self.split == 'val')]

    def split_pictures(self, pictures, min_views):
        if self.reserved is None:  # what a run held out stays so, however few pictures are left
            last = pictures[len(pictures) * 3 // 4:] if len(pictures) >= 4 * min_views else []
            self.reserved = [os.path.basename(path) for path in last]
        if not self.reserved:
            self.held_out_text = (f'nothing, for the one scene has fewer than {4 * min_views} '
                                  'pictures: this is measured on training views')
            return [pictures]
        held_out = [path for path in pictures if os.path.basename(path) in self.reserved]
        first = os.path.basename(next(iter(held_out), ''))
        self.held_out_text = f'{len(held_out)} pictures of the only scene, from {first} on'
        if self.split == 'val':
            return [held_out]
        return [[path for path in pictures if path not in held_out]]

    def advance(self, number, progress=iter):
        """Nothing to prepare: pictures are read when they are asked for."""

    def batch(self, number, num_scenes, num_views):
        """Batch `number`: samples x views in the order of their names, of one height."""
        g = stream_of(self, number)
        num_views = min(num_views, self.most_views)
        samples = [self.sample(num_views, g) for _ in range(num_scenes)]
        pictures = [picture for sample in samples for picture in sample]
        images = to_one_height(pictures)  # (B V, 3, H, W)
        return dict(images=images.unflatten(0, (num_scenes, num_views)).float() / 255)

    def sample(self, num_views, g):
        """Views of one scene, all readable. -> list of (H, W, 3) arrays"""
        for _ in range(self.DRAWS):
            paths = self.draw(num_views, g)
            try:
                pictures = [open_picture(path, self.width) for path in paths]
                return [fit_picture(picture, self.width, self.multiple) for picture in pictures]
            except InputError as error:
                fault = error
                tqdm.write(f'{error}; other views stand in for these')
        raise InputError(f'{fault}: in {self.DRAWS} draws of views there was always such a picture')

    def draw(self, num_views, g):
        """A random scene, a random start, random gaps. -> paths"""
        def random(low, high):
            return int(torch.randint(low, high + 1, (1,), generator=g))

        usable = [scene for scene in self.scenes if len(scene) >= num_views]
        scene = usable[random(0, len(usable) - 1)]
        # differs from the release, where one short scene narrows the gap of all that follow
        most = min(self.gap[1], (len(scene) - 1) // max(1, num_views - 1))
        gaps = [random(min(self.gap[0], most), most) for _ in range(num_views - 1)]
        frame = random(0, len(scene) - 1 - sum(gaps))
        return [scene[i] for i in itertools.accumulate(gaps, initial=frame)]


def make_source(config, split, multiple, device='cpu', rank=0, world_size=1, say=print,
                reserved=None):
    """The source that a configuration names, for split 'train' or 'val'. Pictures' sides are
    multiples of `multiple`; `reserved` as in PhotoFolder."""
    width = config.image_width
    if width < multiple or width % multiple:
        below = max(1, width // multiple) * multiple
        raise InputError(f'--image-width {width} is not a multiple of the patch size {multiple}: '
                         f'take {below} or {below + multiple}')
    if config.data == 'rooms' and split == 'train':
        return RoomPool(split, config.seed, config.num_rooms, config.new_rooms, (width, width),
                        device, rank, world_size)
    if config.data == 'rooms':
        return RoomPool(split, 0, config.val_scenes, 0, (width, width), device)
    is_train = split == 'train'  # what is held out is the same for every seed and process
    return PhotoFolder(config.data, split, config.seed if is_train else 0, width, multiple,
                       config.min_views, (config.min_gap, config.max_gap), rank if is_train else 0,
                       say, reserved)


def make_sources(config, multiple, device, all_held_out=False):
    """What a run is measured on -> its training and its held-out source. With `all_held_out`, both
    are all scenes of a folder that was not trained on."""
    reserved = getattr(config, 'kept', None)  # weights may be older than this setting
    splits = 'train', 'val'
    if all_held_out:
        found = find_scenes_or_say_why(config.data, quiet)
        names = list(found.scenes)
        reserved = names if len(names) > 1 else []
        splits = 'val', 'val'
    sources = [make_source(config, split, multiple, device, say=say, reserved=reserved)
               for split, say in zip(splits, (print, quiet))]
    if all_held_out and not found.splits:
        sources[1].held_out_text = f'all of {config.data}, none of it trained on'
    return sources


def shown_size(path):
    with open_file(path) as picture:
        # as ImageOps.exif_transpose does it; the size of a TIFF is turned already
        is_turned = picture.format != 'TIFF' and picture.getexif().get(274, 1) in (5, 6, 7, 8)
        return picture.size[::-1] if is_turned else picture.size


def check_pictures(scenes, sample):
    """Looks at `sample` pictures of each of the first 500 scenes. -> Counter of sizes, faults"""
    sizes, faults = Counter(), []
    for pictures in list(scenes.values())[:500]:
        for i in even_frames(len(pictures), sample):
            fault = reading_fault(pictures[i])
            if fault:
                faults.append(fault)
            else:
                sizes[shown_size(pictures[i])] += 1
    return sizes, faults


def check(root):
    """What is in a data set, and what is missing or broken. -> text"""
    found = find_scenes_or_say_why(root)
    layout, scenes, splits = found.layout, found.scenes, found.splits
    counts = sorted(map(len, scenes.values()))
    sizes, faults = check_pictures(scenes, 1000 if sum(counts) <= 1000 else 3)
    common = [f'{w} x {h} ({n} of those looked at)' for (w, h), n in sizes.most_common(3)]
    lines = [f'{root}: layout {layout}, {len(scenes)} scenes, {sum(counts)} pictures ({counts[0]} '
             f'to {counts[-1]} a scene, median {counts[len(counts) // 2]})',
             f'sizes: {", ".join(common)}',
             f'unreadable: {len(faults)} of {len(faults) + sizes.total()} looked at', *faults[:5]]
    for split, names in splits.items():
        lost = [name for name in names if name not in scenes]
        missing = f'; missing: {", ".join(lost[:3])}' + ' ...' * (len(lost) > 3) if lost else ''
        lines.append(f'{split} list: {len(names)} scenes, {len(names) - len(lost)} of them '
                     f'here{missing}')
    unlisted = [name for name in scenes if name not in set().union(*splits.values())]
    if 'train' in splits and unlisted:
        lines.append(f'on no list, not used: {len(unlisted)} scenes ({", ".join(unlisted[:3])})')
    if found.unused:
        lines.append(found.say_unused())
    if 'val' in splits and 'train' not in splits:
        lines.append('no list of the training scenes: all that are not on the val list are used')
    if 'train' in splits and 'val' not in splits:
        lines.append('no list of the val scenes: a tenth of those on the train list is held out')
    if not splits and found.lists:
        wanted = ' and '.join(found.lists.values())
        lines.append(f'no list of the training scenes ({wanted}): without it a tenth is held out, '
                     'and scenes that VSI-Bench asks about may be trained on')
    return '\n'.join(lines)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument('command', choices=['check'])
    parser.add_argument('folder')
    print(check(parser.parse_args(argv).folder))


if __name__ == '__main__':
    run_script(main)
