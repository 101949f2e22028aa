"""
What people bring: pictures, videos, and conversations about them.

Pictures and frames come out upright, RGB, as a viewer or a player shows them. What cannot be read
raises an InputError that names the file, and of a list of records also the record.
"""
import functools
import hashlib
import json
import os
import re
import shutil

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from common import InputError, step_generator

PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.avif', '.heic', '.heif')
VIDEOS = ('.mp4', '.mov', '.m4v', '.avi', '.mkv', '.webm', '.3gp', '.ts', '.mts', '.mpg', '.mpeg')
NEEDS = {'.heic': 'pip install pillow-heif', '.heif': 'pip install pillow-heif',
         '.avif': 'pip install -U pillow'}
FRAMES = 'out/frames'               # what is taken out of videos; nothing is written into data sets

# the largest picture in pixels: a JPEG can be decoded at a fraction of its size, others cannot
Image.MAX_IMAGE_PIXELS = None       # Pillow's own limit is one for all
MOST_PIXELS = 180_000_000
MOST_PIXELS_OF_JPEG = 500_000_000
THINNEST = 200                      # more times as long as wide: no photograph, and no VLM takes it


# -----------------------------------------------------------------------------
# folders

def natural_order(name):
    """Sort key with numbers as numbers: 2.jpg before 10.jpg."""
    parts = re.split(r'(\d+)', name)
    return [int(part) if part.isdecimal() else part.lower() for part in parts]


def list_visible(folder):
    """What is directly in `folder` and not hidden, in natural order. -> entries of os.scandir"""
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith('.')]
    return sorted(entries, key=lambda entry: natural_order(entry.name))


def list_files(folder, endings=''):
    """Paths of the files directly in `folder` whose names end so, in natural order."""
    return [entry.path for entry in list_visible(folder)
            if entry.name.lower().endswith(endings) and entry.is_file()]


def list_folders(folder):
    """Names of the folders directly in `folder`, in natural order."""
    return [entry.name for entry in list_visible(folder) if entry.is_dir()]


# -----------------------------------------------------------------------------
# pictures

def open_file(path):
    """PIL image, of which only the header is read. Raises InputError, or Pillow's own errors."""
    ending = os.path.splitext(path)[1].lower() if isinstance(path, str) else ''
    if ending in ('.heic', '.heif'):
        try:
            import pillow_heif
            pillow_heif.register_heif_opener()
        except ImportError as error:
            raise InputError(f'{path} cannot be read: {NEEDS[ending]}') from error
    try:
        picture = Image.open(path)
    except Image.UnidentifiedImageError as error:
        reason = NEEDS.get(ending, 'not a picture')
        raise InputError(f'{path} cannot be read: {reason}') from error
    short, long = sorted(picture.size)
    if long > THINNEST * short:
        raise InputError(f'{path} cannot be read: {picture.width} x {picture.height} pixels, '
                         f'thinner than 1 : {THINNEST}')
    most = MOST_PIXELS_OF_JPEG if picture.format in ('JPEG', 'MPO') else MOST_PIXELS
    if short * long > most:
        raise InputError(f'{path} cannot be read: {picture.width} x {picture.height} pixels, more '
                         f'than the {most // 10 ** 6} million that a {picture.format} may have')
    return picture


def open_picture(path, width=None):
    """A picture file (or a file object) -> PIL image, upright, RGB.

    Any mode will do: grey, palette, alpha (on white), CMYK, 16 bits. `width`: what it will be
    resized to, so that a large JPEG need not be decoded in full; without it, beyond 8192 pixels.
    Raises InputError with the path if it cannot be read to its end.
    """
    try:
        with open_file(path) as picture:
            picture.draft('RGB', (width or 4096, width or 4096))  # JPEG: decodes at 1/2, 1/4, 1/8
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith(('I', 'F')):  # 16 bits and more: stretched to 8
                values = np.asarray(picture, dtype=np.float64)
                low, high = values.min(), values.max()
                values = (values - low) * (255 / max(high - low, 1e-9))
                picture = Image.fromarray(values.astype(np.uint8))
            elif picture.mode in ('LA', 'PA', 'RGBA') or 'transparency' in picture.info:
                white = Image.new('RGBA', picture.size, 'white')
                picture = Image.alpha_composite(white, picture.convert('RGBA'))
            return picture.convert('RGB')
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f'{path} cannot be read: {error}') from error


@functools.lru_cache(maxsize=None)
def reading_fault(path, changed):
    """Why a picture cannot be read, or None. Asked once of a file, until it is `changed`."""
    try:
        open_picture(path, 32)
    except InputError as error:
        return str(error)


def media_fault(path, is_video=False, with_header=True):
    """What can be said against a file at a glance, without decoding it, or None."""
    if not os.path.exists(path):
        return f'missing {path}'
    if os.path.isdir(path):
        return None if is_video and list_files(path, PICTURES) else f'{path} is a folder'
    if os.path.getsize(path) == 0:
        return f'{path} is empty'
    if is_video or not with_header:
        return None
    try:
        open_file(path).close()
    except InputError as error:
        return str(error)
    except (OSError, SyntaxError, ValueError) as error:
        return f'{path} cannot be read: {error}'


# -----------------------------------------------------------------------------
# videos

def even_frames(count, num_frames):
    """Indices of `num_frames` frames spread evenly over `count`, first and last among them."""
    places = np.linspace(0, count - 1, min(num_frames, count))
    return sorted(set(places.astype(int).tolist()))


def choose_frames(times, num_frames, every):
    """Which of the frames that are shown at `times` (in seconds, rising) to take. -> indices

    Without `every`: num_frames, evenly by number, as the benchmarks do it. With it: one in so many
    seconds, at least 4 and at most num_frames, evenly in time, where rates may vary.
    """
    if not every:
        return even_frames(len(times), num_frames)
    seconds = (times[-1] - times[0]) * len(times) / max(1, len(times) - 1)  # the last is shown too
    n = min(num_frames, len(times), max(4, round(seconds / every)))
    moments = np.linspace(times[0], times[-1], n) + 1e-6
    return sorted(set((np.searchsorted(times, moments, side='right') - 1).tolist()))


def read_video(path, num_frames, every=None):
    """Yields frames of a video file, or of a folder of frames (taken as one a second), PIL images.

    Which: see choose_frames. Files need PyAV (pip install av). InputError with the path.
    """
    if not os.path.isdir(path):
        yield from decode_video(path, num_frames, every)
        return
    pictures = list_files(path, PICTURES)
    if not pictures:
        raise InputError(f'no frames in the folder {path} ({" ".join(PICTURES)})')
    for i in choose_frames(range(len(pictures)), num_frames, every):
        yield open_picture(pictures[i])


def as_shown(frame, aspect):
    """A decoded frame of PyAV -> PIL image as a player shows it: square pixels, upright.

    `aspect`: of a stored pixel. The display matrix says how the camera was held: (x, y) of the
    stored picture is shown at (a x + c y, b x + d y).
    """
    picture = frame.to_image()
    if aspect and aspect != 1:
        picture = picture.resize((max(1, round(frame.width * aspect)), frame.height))
    matrix = frame.side_data.get('DISPLAYMATRIX')
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):  # x and y change places
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture


def decode_video(path, num_frames, every):
    """Yields the chosen frames of a file, as they are shown. Needs PyAV."""
    if not os.path.isfile(path):
        raise InputError(f'no video at {path}')
    try:
        import av
    except ImportError as error:
        raise InputError(f'{path}: video files need PyAV (pip install av)') from error

    i, done = -1, 0
    try:
        with av.open(path) as container:  # headers are often wrong: count what a player shows
            stream = container.streams.video[0]
            packets = [x for x in container.demux(stream) if x.size > 0 and not x.is_discard]
            times = sorted(float(x.pts * x.time_base) for x in packets if x.pts is not None)
            if len(times) < len(packets):  # not every format says when a frame is shown
                times = [j / float(stream.average_rate or 30) for j in range(len(packets))]
        wanted = choose_frames(times, num_frames, every)
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = 'AUTO'
            aspect = stream.sample_aspect_ratio
            for i, last in enumerate(container.decode(stream)):
                if i == wanted[done]:
                    yield as_shown(last, aspect)
                    done += 1
                if i >= wanted[-1]:
                    break
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise InputError(f'{path} cannot be read as a video, or not to its end: {error}') from error

    if not wanted or i < 0.9 * wanted[-1]:
        raise InputError(f'{path} ends early: {done} of {len(wanted)} frames were read')
    for _ in wanted[done:]:  # there may be a few more packets than frames: the last stands in
        yield as_shown(last, aspect)


def extract_frames(path, per_second=2, height=518):
    """Frames of a video, as JPEGs in a folder of ours, once for each state of the file."""
    stat = os.stat(path)
    state = f'{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}'
    folder = os.path.join(FRAMES, hashlib.sha256(state.encode()).hexdigest()[:16])
    if os.path.isdir(folder):
        return folder
    unfinished = f'{folder}.{os.getpid()}'
    os.makedirs(unfinished, exist_ok=True)
    try:
        for i, frame in enumerate(read_video(path, 10 ** 6, every=1 / per_second)):
            frame = frame.resize((max(1, frame.width * height // frame.height), height))
            frame.save(os.path.join(unfinished, f'{i:06d}.jpg'), quality=92)
        if not os.path.isdir(folder):  # or another process was faster
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


# -----------------------------------------------------------------------------
# what a benchmark's pictures must show

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
            on = where[i] if i < len(where) and where[i] < len(images) else 0
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
# conversations about pictures, from files

def read_records(path):
    """Yields (number from 1, record, fault) of a .jsonl file, or of a .json file with one list."""
    try:
        with open(path, encoding='utf-8-sig') as file:  # with or without a byte-order mark
            if path.endswith('.jsonl'):
                lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
            else:
                records = json.load(file)
    except FileNotFoundError as error:
        raise InputError(f'no file {path}') from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{path} cannot be read as JSON: {error}') from error
    if not path.endswith('.jsonl'):
        if not isinstance(records, list):
            raise InputError(f'{path} holds a {type(records).__name__}, not a list of records')
        yield from ((number, record, None) for number, record in enumerate(records, 1))
        return
    for number, line in lines:
        try:
            yield number, json.loads(line), None
        except (ValueError, RecursionError) as error:
            yield number, None, f'not JSON ({error})'


class Conversations(torch.utils.data.Dataset):
    """Records of instruction data from JSON and JSONL files, as in LLaVA, VSI-590K, VG-LLM.

    files: paths, with an optional share after a colon ('vsi_590k.jsonl:0.25' takes a quarter, the
    same one every time). A record: `conversations`, and `image` or `images` (a path or a list) or
    `video` (a file or a folder of frames), paths relative to `media`. <video>, and a single
    <image> before a video, stand for all its frames. `spar_info`: markers to draw on the images.
    All records are looked at beforehand, and their pictures' headers in the first CHECKED. A faulty
    one raises an error that names file and record, or with `skip_bad` is counted and left out.
    """
    CHECKED = 20_000

    def __init__(self, files, media, num_frames=8, skip_bad=False, say=print):
        self.media, self.num_frames, self.records = media, num_frames, []
        fault_of = functools.lru_cache(maxsize=None)(media_fault)  # many ask about one picture
        for file in files:
            path, share = file, 1.0
            if re.fullmatch(r'.*:[0-9.]+', file):
                path, _, share = file.rpartition(':')
            if not 0 < float(share) <= 1:
                raise InputError(f'{file}: the share after the colon must be between 0 and 1')
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
            chosen = sorted(lot[:round(float(share) * len(kept))].tolist())
            self.records += [kept[i] for i in chosen]
        if not self.records:
            raise InputError(f'no usable record in {" ".join(files)}')

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
        except InputError as error:
            raise InputError(f'{record["where"]}: {error}') from error
        turns = []
        for turn in record['conversations']:
            text = str(turn['value'])
            if video:                 # VSI-590K writes <image> before videos too
                frames = '<image>' * len(images)
                text = re.sub(r'<(video|image)>\n?', lambda _: frames, text, count=1)
            turns.append({'from': turn['from'], 'value': text.replace('<image>\n', '<image>')})
        return dict(images=images, conversations=turns, where=record['where'])


def media_paths(record):
    paths = record.get('images') or record.get('image') or []
    return paths if isinstance(paths, list) else [paths]


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
        if turn['from'] == 'gpt' and type(value) in (int, float):
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
        if not isinstance(video, str):
            return '"video" is not one path'
        if num_videos + num_images != 1:
            return f'{num_videos + num_images} <video> tokens for one video'
    elif num_videos:
        return 'a <video> token, but no "video"'
    elif num_images != len(paths):
        return f'{num_images} <image> tokens for {len(paths)} images'
    if record.get('spar_info'):
        try:
            draw_markers([Image.new('RGB', (8, 8))] * max(1, len(paths)), record['spar_info'])
        except (ValueError, TypeError, AttributeError, LookupError) as error:
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
        self.bad = set()

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
                    self.say(f'{error}; the next record stands in for it ({len(self.bad)} so far)')
        raise InputError('none of the records can be read; the last fault is named above')
