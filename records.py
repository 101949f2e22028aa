"""
Records of instruction data from files: conversations about pictures, as LLaVA, VSI-590K and the
VG-LLM mix have them. And the batches that a VLM learns from.

A faulty record is named by its file and its number, before the training.
"""
import functools
import json
import math
import os
import re
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import InputError, step_generator
from media import media_fault, open_picture, read_video


def read_records(path):
    """Yields (number from 1, record, fault) of a .jsonl file, or of a .json file with one list."""
    is_lines = path.endswith('.jsonl')
    try:
        with open(path, encoding='utf-8-sig') as file:  # with or without a byte-order mark
            records = list(file) if is_lines else json.load(file)
    except FileNotFoundError as error:
        raise InputError(f'no file {path}') from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{path} cannot be read as JSON: {error}') from error
    if not isinstance(records, list):
        raise InputError(f'{path} holds a {type(records).__name__}, not a list of records')
    for number, record in enumerate(records, 1):
        if not is_lines:
            yield number, record, None
        elif record.strip():
            try:
                yield number, json.loads(record), None
            except (ValueError, RecursionError) as error:
                yield number, None, f'not JSON ({error})'


def mend_last_line(path):
    """Before lines are added to a .jsonl file: drops a last line that was cut off, ends a whole
    one."""
    with open(path, 'a+b') as file:
        file.seek(0)
        last = file.read().rpartition(b'\n')[2]
        if not last:
            return
        try:
            json.loads(last)
            file.write(b'\n')
        except ValueError:
            file.truncate(file.tell() - len(last))


class Conversations(torch.utils.data.Dataset):
    """Records of instruction data from JSON and JSONL files, as in LLaVA, VSI-590K, VG-LLM.

    files: paths, with an optional share after a colon ('vsi_590k.jsonl:0.25' takes a quarter, the
    same one every time). A record: `conversations`, and `image` or `images` (a path or a list) or
    `video` (a file or a folder of frames), paths relative to `media`. In a record with a video, its
    one <video> or <image> stands for all frames. `spar_info`: markers to draw on the images.
    All records are looked at beforehand, and their pictures' headers in the first CHECKED. A faulty
    one raises an error that names file and record, or with `skip_bad` is counted and left out.
    """
    CHECKED = 20_000

    def __init__(self, files, media, num_frames=8, skip_bad=False, say=print):
        self.media, self.num_frames, self.records = media, num_frames, []
        fault_of = functools.lru_cache(maxsize=None)(media_fault)  # many ask about one picture
        for file in files:
            found = re.fullmatch(r'(.*):((?:\d*\.)?\d+)', file)
            path, share = (found[1], float(found[2])) if found else (file, 1.0)
            if not 0 < share <= 1:
                raise InputError(f'{file}: the share after the colon must be above 0 and at most 1')
            faults, kept = [], []
            for number, record, fault in read_records(path):
                with_header = number <= self.CHECKED
                fault = fault or record_fault(record, media, fault_of, with_header)
                if fault:
                    faults.append(f'{path}, record {number}: {fault}')
                else:
                    kept.append(dict(record, where=f'{path}, record {number}'))
            total = len(faults) + len(kept)
            if faults and not skip_bad:
                raise InputError(f'{faults[0]} ({len(faults)} such records of {total}; '
                                 '--skip-bad leaves them out)')
            if faults:
                say(f'{path}: {len(faults)} of {total} records left out; the first: {faults[0]}')
            lot = torch.randperm(len(kept), generator=step_generator(0, 8))
            chosen = sorted(lot[:round(share * len(kept))].tolist())
            self.records += [kept[i] for i in chosen]
        if not self.records:
            raise InputError(f'no usable record in {" ".join(files)}')
        self.stamp = zlib.crc32(json.dumps(self.records).encode())  # of these records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record, video = self.records[i], self.records[i].get('video')
        try:
            if video:
                path = os.path.join(self.media, video)
                images = list(read_video(path, self.num_frames, every=2.0))
            else:
                paths = media_paths(record)
                images = [open_picture(os.path.join(self.media, path)) for path in paths]
            if record.get('spar_info'):
                images = draw_markers(images, record['spar_info'])
        except (InputError, ValueError) as error:
            raise InputError(f'{record["where"]}: {error}') from error
        turns = []
        for turn in record['conversations']:
            text = str(turn['value'])
            if video:                 # VSI-590K writes <image> before videos too
                text = re.sub(r'<(video|image)>\n?', '<image>' * len(images), text)
            turns.append({'from': turn['from'], 'value': text.replace('<image>\n', '<image>')})
        return dict(images=images, conversations=turns, where=record['where'])


def as_list(value):
    """A list as it is, one thing as a list, nothing as none."""
    return value if isinstance(value, list) else [value] if value else []


def media_paths(record):
    return as_list(record.get('images') or record.get('image'))


def turns_fault(turns):
    """What is wrong with the turns of a record, or None."""
    if not isinstance(turns, list) or len(turns) < 2:
        return 'no list of at least two turns under "conversations"'
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return f'turn {i + 1} is not an object'
        if turn.get('from') not in ('human', 'gpt'):
            return f'turn {i + 1} is from {turn.get("from")!r}, not "human" or "gpt"'
        if turn['from'] != ('human', 'gpt')[i % 2]:
            return f'turn {i + 1} is from {turn["from"]!r}; human and gpt take turns, human first'
        value = turn.get('value')
        if turn['from'] == 'gpt' and type(value) in (int, float) and math.isfinite(value):
            continue                  # a number is an answer
        if not isinstance(value, str):
            return f'turn {i + 1} has no text under "value"'
        if turn['from'] == 'gpt' and not value.strip():
            return f'turn {i + 1} has an empty answer'
        if value != value.encode('utf-8', 'ignore').decode():
            return f'turn {i + 1} holds half a character (a lone surrogate)'
    if len(turns) % 2:
        return 'the last turn is a question without an answer'


def record_fault(record, media, fault_of=media_fault, with_header=True):
    """What is wrong with a record of instruction data, or None."""
    turns = record.get('conversations') if isinstance(record, dict) else None
    fault = turns_fault(turns)
    if fault:
        return fault
    text = ''.join(str(turn['value']) for turn in turns)
    num_videos, num_images = text.count('<video>'), text.count('<image>')
    video, paths = record.get('video'), media_paths(record)
    if video is not None:
        paths = [video]
        if not isinstance(video, str) or not video:
            return '"video" is not one path'
        if num_videos + num_images != 1:
            return f'{num_videos + num_images} <video> or <image> tokens for one video'
    elif num_videos:
        return 'a <video> token, but no "video"'
    elif num_images != len(paths):
        return f'{num_images} <image> tokens for {len(paths)} images'
    if record.get('spar_info'):
        try:
            count = 64 if video else len(paths)  # how many frames is not known yet
            draw_markers([Image.new('RGB', (8, 8))] * count, record['spar_info'])
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError,
                RecursionError) as error:
            return f'"spar_info" cannot be read ({error})'
    if not all(isinstance(path, str) for path in paths):
        return '"images" holds what is not a path'
    paths = [os.path.join(media, path) for path in paths]
    faults = [fault_of(path, video is not None, with_header) for path in paths]
    faults = list(filter(None, faults))
    if faults:
        return faults[0] + (f'; {len(faults) - 1} more of its files' if len(faults) > 1 else '')


class Part(torch.utils.data.Dataset):
    """Those records of `data` whose `indices` are given.

    With `skip_bad`, the next record of the part stands in for one that turns out to be unreadable.
    """

    def __init__(self, data, indices, skip_bad=False, say=print):
        self.data, self.indices, self.skip_bad, self.say = data, indices, skip_bad, say
        self.stamp, self.bad = data.stamp, set()

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)       # ends a loop over all
        for place in range(i, i + len(self)):
            index = self.indices[place % len(self)]
            try:
                return self.data[index]
            except InputError as error:
                if not self.skip_bad:
                    raise InputError(f'{error} (--skip-bad leaves it out)') from error
                if index not in self.bad:
                    self.bad.add(index)
                    self.say(f'{error}; the next record stands in for it ({len(self.bad)} so far '
                             'in this process)')
        raise InputError('none of the records can be read; the last fault is named above')


# -----------------------------------------------------------------------------
# markers on the pictures of SPAR's training records

MARKER_COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255),
                  'yellow': (255, 255, 0)}


def draw_markers(images, spar_info):
    """The points and boxes that SPAR's questions name ("the red point"), on copies of the images.

    spar_info: JSON: <colour>_point [[x, y], ...] and <colour>_bbox [[x0, y0,
    x1, y1], ...] in thousandths of the image; point_img_idx / bbox_img_idx
    [[...]]: on which image each of them lies, in the order of the keys.
    """
    info = json.loads(spar_info) if isinstance(spar_info, str) else spar_info
    images = [image.copy() for image in images]
    for kind in ('point', 'bbox'):
        where = np.ravel(info.get(f'{kind}_img_idx', [])).astype(int).tolist()
        marks = [(name.split('_')[0], mark) for name, marks in info.items()
                 if name.endswith(f'_{kind}') for mark in marks]
        for i, (colour, mark) in enumerate(marks):
            on = where[i] if i < len(where) else 0
            if not 0 <= on < len(images):
                raise ValueError(f'there is no image {on}')
            pen = ImageDraw.Draw(images[on])
            size = images[on].size
            x = [value * size[j % 2] / 1000 for j, value in enumerate(mark)]
            paint = MARKER_COLOURS.get(colour, (255, 0, 0))
            width = max(2, round(max(size) / 200))
            if kind == 'point':
                r = 2 * width
                pen.ellipse([x[0] - r, x[1] - r, x[0] + r, x[1] + r], fill=paint)
            else:
                pen.rectangle(x, outline=paint, width=width)
    return images


# -----------------------------------------------------------------------------
# batches

@functools.lru_cache(maxsize=4)
def epoch_order(n, epoch, seed):
    return torch.randperm(n, generator=step_generator(seed, epoch, 9)).tolist()


class Encoded(torch.utils.data.Dataset):
    """Item `number` is batch `number` for the VLM; it depends on nothing that came before it.
    The first `map_steps` steps only ask for maps, of twice as many rooms per batch: the model
    learns where things are before it answers questions about it. `fit`: SceneLatents.fit."""

    def __init__(self, data, chat, config, rank=0, world_size=1, say=print, fit=None):
        self.data, self.chat, self.config, self.say, self.fit = data, chat, config, say, fit
        self.rank, self.world_size = rank, world_size
        self.too_long = set()
        self.num_maps = config.map_steps * config.accumulate  # batches

    def indices(self, number):
        """Indices of batch `number`: one random order an epoch, dealt out to the processes."""
        B, n, seed = self.config.batch, len(self.data), self.config.seed
        turn = number * self.world_size + self.rank  # batches dealt out before this one
        maps = self.num_maps * self.world_size       # the first ones, each of 2 B samples
        first = B * (turn + min(turn, maps))
        if turn < maps:
            B = 2 * B
        return [epoch_order(n, i // n, seed)[i % n] for i in range(first, first + B)]

    def sample(self, index, item_of):
        """Sample `index`, or the next that is not too long -> what the VLM reads, the item"""
        limit, n = self.config.max_length or math.inf, len(self.data)
        for i in range(index, index + n):
            item = item_of(i % n)
            encoded = self.chat.encode(item)
            length = len(encoded['input_ids'])
            if length <= limit:
                if self.fit and item['images']:
                    item = dict(item, images=self.fit(item['images']))
                return encoded, item
            if i % n not in self.too_long:
                self.too_long.add(i % n)
                self.say(f'{item.get("where", f"room {i % n}")}: {length} tokens, --max-length '
                         f'{limit}; the next one stands in for it ({len(self.too_long)} so far in '
                         'this process)')
        raise InputError(f'--max-length {limit}: all records are longer, the last one {length}')

    def __getitem__(self, number):
        """-> [(tensors, items, share)] of Chat.batches: from eight samples on in two parts."""
        item_of = self.data.map_of if number < self.num_maps else self.data.__getitem__
        samples = [self.sample(i, item_of) for i in self.indices(number)]
        return self.chat.batches(samples, 2 if len(samples) >= 8 else 1)
