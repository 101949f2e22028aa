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
import torch

from rooms import make_intrinsics, make_rooms, make_walk, render, room_seed, surface_classes

CELL = 4      # pixels a side: depth and classes are kept at this resolution


def step_generator(*numbers):
    """A CPU generator that is a pure function of a few whole numbers (seed, step, rank, ...)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2 ** 63   # an LCG's multiplier and increment
    return torch.Generator().manual_seed(mixed)


def views_per_scene(step, seed, low, high):
    """The number of views of every sample in batch `step`: uniform in low .. high, the same on every process."""
    return int(torch.randint(low, high + 1, (1,), generator=step_generator(seed, step, 1)))


class RoomPool:
    """Rooms rendered once into memory, a window that slides over an endless row of them.

    At step s the pool holds rooms `s * new_rooms` .. `+ num_rooms` of its split, eight views each: rendering stays a
    small part of a step, and no room is seen so often that it could be learned by heart.
    """
    BLOCK = 4           # rooms are made and rendered so many at a time
    VIEWS = 8

    def __init__(self, split, seed, num_rooms, new_rooms=0.0, image_size=(64, 64), device='cpu', rank=0, world_size=1):
        self.split, self.seed, self.new_rooms, self.size, self.device = split, seed, new_rooms, image_size, device
        self.rank, self.world_size = rank, world_size
        self.num_blocks = max(1, num_rooms // self.BLOCK)
        self.blocks = {}                                      # index of a block -> its views; the pool in use, in order
        self.pool = None

    def render_block(self, index):
        seed = room_seed(self.split, self.seed, index * self.world_size + self.rank)
        rooms = make_rooms(self.BLOCK, seed)
        extrinsics = make_walk(rooms, self.VIEWS, seed)
        intrinsics = make_intrinsics(self.size, self.BLOCK, self.VIEWS)
        rooms, extrinsics, intrinsics = rooms.to(self.device), extrinsics.to(self.device), intrinsics.to(self.device)
        views = render(rooms, extrinsics, intrinsics, self.size)
        # a cell's depth is that of the ray through its centre: a render of its own, at the cells' resolution
        cells = self.size[0] // CELL, self.size[1] // CELL
        coarse = render(rooms, extrinsics, intrinsics / intrinsics.new_tensor([[CELL], [CELL], [1]]), cells)
        return dict(images=views['image'], depth=coarse['depth'], classes=surface_classes(rooms, coarse['surface']).to(torch.uint8),
                    extrinsics=extrinsics, intrinsics=intrinsics)

    def advance(self, step, progress=lambda blocks: blocks):
        """Brings the window to where `step` wants it. Block b lives in slot b % num_blocks."""
        first = int(step * self.new_rooms) // self.BLOCK
        due = [b for b in range(first, first + self.num_blocks) if self.blocks.get(b % self.num_blocks) != b]
        for index in progress(due):
            block, slot = self.render_block(index), index % self.num_blocks
            if self.pool is None:
                self.pool = {name: x.new_empty(self.num_blocks * self.BLOCK, *x.shape[1:]) for name, x in block.items()}
            for name, x in block.items():
                self.pool[name][slot * self.BLOCK:(slot + 1) * self.BLOCK] = x
            self.blocks[slot] = index

    def batch(self, step, num_scenes, num_views, neighbours=0.0, keep_closest=1.0):
        """Batch `step` of `num_scenes` scenes x `num_views` views, in random order.

        `neighbours`: share of the samples whose views follow each other on the walk (the others: any views).
        `keep_closest`: draw num_scenes / keep_closest samples and keep those whose first two views differ least.
        """
        self.advance(step)
        g = step_generator(self.seed, step, self.rank, self.split != 'train')
        n, V = round(num_scenes / keep_closest), num_views
        room = torch.randint(self.num_blocks * self.BLOCK, (n,), generator=g)
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
