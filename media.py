"""
What people bring: pictures, videos, and folders of them in many layouts.

They come out upright, RGB, as a viewer or a player shows them. What cannot be read raises an
InputError that names the file.
"""
import functools
import hashlib
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps, features

from common import InputError

PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.avif', '.heic', '.heif')
VIDEOS = ('.mp4', '.mov', '.m4v', '.avi', '.mkv', '.webm', '.3gp', '.ts', '.mts', '.mpg', '.mpeg')
NEEDS = {'.heic': 'pip install pillow-heif', '.heif': 'pip install pillow-heif',
         '.avif': 'pip install -U pillow'}
OUTPUT = 'out'                      # where all that is written goes; no data is looked for there
FRAMES = f'{OUTPUT}/frames'         # what is taken out of videos; nothing is written into data sets

# the largest picture in pixels: a JPEG can be decoded at a fraction of its size, others cannot
Image.MAX_IMAGE_PIXELS = None       # Pillow's own limit is one for all
MOST_PIXELS = 180_000_000
MOST_PIXELS_OF_JPEG = 500_000_000
THINNEST = 200                      # times as long as wide: no photograph, and no VLM takes it


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


def list_files(folder, endings):
    """Paths of the files directly in `folder` whose names end so, in natural order."""
    return [entry.path for entry in list_visible(folder)
            if entry.name.lower().endswith(endings) and os.path.isfile(entry.path)]


# a word in a name that says: measured or computed, no photograph
NO_PHOTO = {'depth', 'disparity', 'mask', 'masks', 'label', 'labels', 'instance', 'semantic',
            'segmentation', 'normal', 'normals', 'confidence'}


def is_photo(name):
    return NO_PHOTO.isdisjoint(re.split('[^a-z]+', name.lower()))


def list_photos(folder):
    """The pictures directly in a folder; depth maps and the like only if there is nothing else."""
    pictures = list_files(folder, PICTURES) if os.path.isdir(folder) else []
    photos = [path for path in pictures if is_photo(os.path.basename(path))]
    return photos or pictures


# -----------------------------------------------------------------------------
# pictures

def check_shape(picture, path):
    short, long = sorted(picture.size)
    if long > THINNEST * short:
        raise InputError(f'{path} cannot be read: {picture.width} x {picture.height} pixels, '
                         f'thinner than 1 : {THINNEST}')


def name_of(path):
    """A file is called by its path; a file object holds a picture out of a parquet file."""
    return path if isinstance(path, str) else 'a picture'


def open_file(path):
    """PIL image, of which only the header is read. Raises InputError with the path."""
    name = name_of(path)
    ending = os.path.splitext(name)[1].lower()
    if ending in ('.heic', '.heif'):
        try:
            import pillow_heif
            pillow_heif.register_heif_opener()
        except ImportError as error:
            raise InputError(f'{name} cannot be read: {NEEDS[ending]}') from error
    try:
        picture = Image.open(path)
    except Image.UnidentifiedImageError as error:
        can_read = ending != '.avif' or features.check('avif')
        reason = 'not a picture' if can_read else NEEDS[ending]
        raise InputError(f'{name} cannot be read: {reason}') from error
    except Exception as error:  # of spoiled files, Pillow's readers raise whatever there is
        raise InputError(f'{name} cannot be read: {error}') from error
    check_shape(picture, name)
    most = MOST_PIXELS_OF_JPEG if picture.format in ('JPEG', 'MPO') else MOST_PIXELS
    if picture.width * picture.height > most:
        raise InputError(f'{name} cannot be read: {picture.width} x {picture.height} pixels, more '
                         f'than the {most // 10 ** 6} million that a {picture.format} may have')
    return picture


def open_picture(path, width=None):
    """A picture file (or a file object) -> PIL image, upright, RGB.

    Any mode will do: grey, palette, alpha (on white), CMYK, 16 bits. `width`: what it will be
    resized to: a large JPEG is then decoded at a half, a quarter or an eighth of its size.
    Raises InputError with the path if it cannot be read to its end.
    """
    try:
        with open_file(path) as picture:
            picture.draft('RGB', (width or 4096, width or 4096))  # JPEG: decodes at 1/2, 1/4, 1/8
            picture.getexif()                 # read here and taken away, or exif_transpose would
            picture.info.pop('exif', None)    # write it anew, and fail where it is faulty
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith(('I', 'F')):  # 16 bits and more: stretched to 8
                picture = Image.fromarray(stretch(np.asarray(picture, dtype=np.float64)))
            elif picture.mode in ('LA', 'PA', 'RGBA') or 'transparency' in picture.info:
                white = Image.new('RGBA', picture.size, 'white')
                picture = Image.alpha_composite(white, picture.convert('RGBA'))
            return picture.convert('RGB')
    except InputError:
        raise
    except Exception as error:  # as in open_file
        raise InputError(f'{name_of(path)} cannot be read: {error}') from error


def stretch(values):
    """Numbers of any range -> 0 .. 255; what is no number is black, a uniform picture grey."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return (255 * share).astype(np.uint8)


@functools.lru_cache(maxsize=None)
def fault_of_state(path, changed):
    try:
        open_picture(path, 32)
    except InputError as error:
        return str(error)


def reading_fault(path):
    """Why a picture cannot be read, or None. It is read once, until the file changes."""
    return fault_of_state(path, os.stat(path).st_mtime_ns)


def media_fault(path, is_video=False, with_header=True):
    """What is wrong with a file, as far as one sees without decoding it, or None."""
    if not os.path.exists(path):
        return f'missing {path}'
    if os.path.isdir(path):
        fault = 'is a folder without frames' if is_video else 'is a folder, not a picture'
        return None if is_video and list_photos(path) else f'{path} {fault}'
    if os.path.getsize(path) == 0:
        return f'{path} is empty'
    if is_video or not with_header:
        return None
    try:
        open_file(path).close()
    except InputError as error:
        return str(error)


# -----------------------------------------------------------------------------
# videos

def even_frames(count, num_frames):
    """Indices of `num_frames` frames spread evenly over `count`, first and last among them."""
    return np.linspace(0, count - 1, min(num_frames, count)).astype(int).tolist()


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
    pictures = list_photos(path)
    if not pictures:
        raise InputError(f'no frames in the folder {path} ({" ".join(PICTURES)})')
    for i in choose_frames(range(len(pictures)), num_frames, every):
        yield open_picture(pictures[i])


@functools.lru_cache(maxsize=1)
def frames_of_video(path, num_frames):
    """read_video's frames as a list, decoded once for questions that follow each other."""
    return list(read_video(path, num_frames))


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

    moment, done = -1.0, 0
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise InputError(f'{path} has no pictures, only sound')
            times, has_times = shown_times(container)
        if not times:
            raise InputError(f'{path} has no pictures that could be decoded')
        wanted = [times[i] for i in choose_frames(times, num_frames, every)]
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = 'AUTO'
            aspect = stream.sample_aspect_ratio
            for i, frame in enumerate(container.decode(stream)):
                moment = frame.time if has_times else times[min(i, len(times) - 1)]
                if moment > wanted[done] - 1e-4:
                    last = as_shown(frame, aspect)
                    check_shape(last, path)
                    yield last
                    done += 1
                if done == len(wanted):
                    return
    except (av.error.FFmpegError, IndexError, ValueError, TypeError) as error:
        raise InputError(f'{path} cannot be read as a video, or not to its end: {error}') from error

    if moment < times[0] + 0.9 * (wanted[-1] - times[0]):
        raise InputError(f'{path} ends early: {done} of {len(wanted)} frames were read')
    for _ in wanted[done:]:  # there may be a few more packets than frames: the last stands in
        yield last


def shown_times(container):
    """When the frames of a video are shown, from its packets: headers are often wrong.

    What comes before the first key frame cannot be decoded, and what a trim hides is not shown.
    -> seconds, rising; whether the file itself tells them
    """
    stream = container.streams.video[0]
    packets = [x for x in container.demux(stream) if x.size > 0 and not x.is_discard]
    while packets and not packets[0].is_keyframe:
        packets.pop(0)
    if any(x.pts is None for x in packets):  # not every format says when a frame is shown
        rate = float(stream.average_rate or 30)
        return [i / rate for i in range(len(packets))], False
    times = [float(x.pts * x.time_base) for x in packets]
    return sorted(time for time in times if time >= times[0]), True


def extract_frames(path):
    """Frames of a video, two a second, as JPEGs in a folder of ours, once for each state of the
    file. Their shorter side has 518 pixels at most."""
    stat = os.stat(path)
    state = f'{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns} 518'
    folder = os.path.join(FRAMES, hashlib.sha256(os.fsencode(state)).hexdigest()[:16])
    if os.path.isdir(folder) and os.listdir(folder):  # cleaners may empty it
        return folder
    unfinished = f'{folder}.{os.getpid()}'
    os.makedirs(unfinished, exist_ok=True)
    try:
        for i, frame in enumerate(read_video(path, 10 ** 6, every=0.5)):
            scale = min(1, 518 / min(frame.size))
            frame = frame.resize((round(scale * frame.width), round(scale * frame.height)))
            frame.save(os.path.join(unfinished, f'{i:06d}.jpg'), quality=92)
        os.replace(unfinished, folder)
    except OSError:
        if not os.path.isdir(folder):  # or another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


# -----------------------------------------------------------------------------
# data sets: which scenes are in a folder

# where the pictures of a scene are, below its folder: what such a data set is called, and the lists
# of its splits. Of several that a scene has, the first is taken: the others show the same.
SCANNET = {'train': 'scannetv2_train.txt', 'val': 'scannetv2_val.txt'}
SCANNETPP = {'train': 'splits/nvs_sem_train.txt', 'val': 'splits/nvs_sem_val.txt'}
LAYOUTS = {'dslr/undistorted_images': ('ScanNet++', SCANNETPP),
           'iphone/rgb': ('ScanNet++ (iPhone)', SCANNETPP),
           'color': ('ScanNet', SCANNET),
           'frames/color': ('ScanNet', SCANNET),
           'images': ('folders with images/, as COLMAP has them', {}),
           'image': ('folders with image/, as SUN3D has them', {}),
           'rgb': ('folders with rgb/', {}),
           '.': ('folders', {})}
BASES = ('data', 'scans', 'scans_test')     # folders of scenes: no part of a scene's name
DEEPEST = 6                                 # folders in folders

UNREAD = ('.gif', '.ppm', '.jp2', '.jxl', '.exr', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.raf',
          '.rw2', '.orf', '.wmv', '.flv', '.mxf')     # pictures and videos that we cannot read


def scene_name(folder, root):
    """A folder's path below the root of its data set, and the root's own name for itself."""
    parts = os.path.relpath(folder, root).split(os.sep)
    if len(parts) > 1 and parts[0] in BASES and not os.path.isdir(os.path.join(root, *parts[1:])):
        parts = parts[1:]
    return '/'.join(parts) if parts != ['.'] else os.path.basename(os.path.abspath(root))


@dataclass
class Found:
    """What is in a data set. `unused` counts kinds of files and folders that are passed over."""
    scenes: dict = field(default_factory=dict)     # name -> its pictures in order
    layout: str = 'folders'                        # what it is called
    lists: dict = field(default_factory=dict)      # split -> the file that may name its scenes
    splits: dict = field(default_factory=dict)     # split -> names of its scenes, if it is there
    unused: Counter = field(default_factory=Counter)

    def say_unused(self):
        kinds = [f'{kind} ({n})' for kind, n in self.unused.most_common(8)]
        return f'not used: {", ".join(kinds)}'


def photos_inside(folder):
    """-> the key of LAYOUTS that says where a folder has its photographs, and these; or None, []"""
    for inside in LAYOUTS:
        photos = list_photos(os.path.join(folder, inside) if inside != '.' else folder)
        if photos:
            return inside, photos
    return None, []


def add_videos(found, folder, root, say):
    """Every video directly in a folder is a scene."""
    for path in list_files(folder, VIDEOS):
        try:
            frames = list_files(extract_frames(path), PICTURES)
            found.scenes[os.path.relpath(path, root)] = frames
        except InputError as error:
            found.unused['videos that cannot be read'] += 1
            say(f'{error}; left out')


def count_unused(found, folder, photos, with_videos):
    """Counts what in a folder is passed over: unreadable kinds, depth maps, broken links; beside a
    scene's own folder of pictures, all pictures."""
    taken = {os.path.basename(path) for path in photos}
    for entry in list_visible(folder):
        ending = os.path.splitext(entry.name)[1].lower()
        if not os.path.exists(entry.path):
            found.unused['broken links'] += 1
        elif ending in UNREAD:
            found.unused[ending] += 1
        elif ending in PICTURES and os.path.isfile(entry.path) and entry.name not in taken:
            named = 'pictures' if is_photo(entry.name) else 'pictures named depth, mask, ...'
            found.unused[named] += 1
        elif ending in VIDEOS and with_videos:
            found.unused[ending] += 1


def read_splits(root, lists):
    """{split: names of scenes}, as far as the files of `lists` are there."""
    splits = {}
    for split, name in lists.items():
        for folder in ('.', *BASES):
            path = os.path.join(root, folder, name)
            if split not in splits and os.path.isfile(path):
                with open(path, encoding='utf-8-sig', errors='replace') as file:
                    splits[split] = list(dict.fromkeys(file.read().split()))
    return splits


def find_scenes(root, say=print):
    """Scenes in a folder, at any depth: pictures as in LAYOUTS, and videos. -> Found"""
    found, insides = Found(), Counter()
    if os.path.isfile(root):
        found.scenes[os.path.basename(root)] = list_files(extract_frames(root), PICTURES)
    seen = set()

    def cannot_list(error):
        say(f'{error.filename} cannot be listed ({error.strerror}); left out')

    walk = os.walk(root, followlinks=True, onerror=cannot_list) if os.path.isdir(root) else ()
    for folder, below, _ in walk:
        if os.path.realpath(folder) in seen:  # links lead back
            below.clear()
            continue
        seen.add(os.path.realpath(folder))
        name = scene_name(folder, root)
        if name in found.scenes:
            name = os.path.relpath(folder, os.path.join(root, os.pardir))
        inside, photos = photos_inside(folder)
        if inside:
            found.scenes[name] = photos
            insides[inside] += 1
            seen.add(os.path.realpath(os.path.join(folder, inside)))
        # `below` is where the walk goes on
        below[:] = sorted((x for x in below if not x.startswith('.')
                           and os.path.abspath(os.path.join(folder, x)) != os.path.abspath(OUTPUT)),
                          key=natural_order)
        found.unused.update(f'{x}/' for x in below if not is_photo(x))
        below[:] = filter(is_photo, below)
        if inside in (None, '.'):
            count_unused(found, folder, photos, False)
            add_videos(found, folder, root, say)
        else:                         # beside it lie the same pictures in other sizes
            count_unused(found, folder, [], True)
            count_unused(found, os.path.join(folder, inside), photos, False)
            found.unused.update(f'{x}/' for x in below if x != inside.split('/')[0])
            below.clear()
        if name.count('/') >= DEEPEST and below:
            found.unused[f'folders more than {DEEPEST} deep'] += len(below)
            below.clear()
    insides['videos'] = len(found.scenes) - insides.total()
    most = insides.most_common(1)[0][0]
    found.layout, found.lists = LAYOUTS.get(most, ('videos', {}))
    found.splits = read_splits(root, found.lists)
    held_out = found.splits.get('val', ())
    both = [name for name in found.splits.get('train', ()) if name in held_out]
    if both:
        say(f'{root}: on both lists, and held out: {", ".join(both[:5])} ({len(both)} in all)')
        found.splits['train'] = [x for x in found.splits['train'] if x not in held_out]
    return found


def check_path(root):
    """Raises InputError if `root` is neither a folder nor a video."""
    if os.path.isfile(root) and not root.lower().endswith(VIDEOS):
        raise InputError(f'{root} is no video ({" ".join(VIDEOS)}): take a folder of pictures')
    if not os.path.exists(root):
        raise InputError(f'no folder {root}, and no such video: it takes a folder of pictures, of '
                         'sub-folders with pictures, or of videos')


def find_scenes_or_say_why(root, say=print):
    """As find_scenes. Raises InputError if there is nothing to find."""
    check_path(root)
    found = find_scenes(root, say)
    if not found.scenes:
        raise InputError(f'no pictures in {root} nor below it ({" ".join(PICTURES)}), no videos'
                         + f'; {found.say_unused()}' * bool(found.unused))
    return found
