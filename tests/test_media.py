"""Pictures, videos and records of conversations: every kind that people have, and every fault."""
import json
import math
import os
import shutil
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import media
from backbone import fit_picture
from common import InputError
from media import (PICTURES, extract_frames, list_files, natural_order, open_picture,
                   read_video)
from records import Conversations, Part, draw_markers, record_fault
from tiny import GOOD, make_video, names_of, picture, turns, write


@pytest.fixture(autouse=True)
def own_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(media, 'FRAMES', str(tmp_path / 'frames'))


def read_picture(path, width, multiple):
    return fit_picture(open_picture(path, width), width, multiple)


# -----------------------------------------------------------------------------
# pictures

def test_natural_order(tmp_path):
    names = ['10.jpg', '2.jpg', '1.jpg', 'b2.png', 'b10.png', 'a.webp', 'notes.txt', '.hidden.jpg']
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / 'folder.jpg').mkdir()
    assert names_of(list_files(tmp_path, PICTURES)) \
        == ['1.jpg', '2.jpg', '10.jpg', 'a.webp', 'b2.png', 'b10.png']
    assert sorted(['frame-000010', 'frame-000002'], key=natural_order)[0] == 'frame-000002'
    assert sorted(['a1', '1a'], key=natural_order) == ['1a', 'a1']  # numbers and words together


@pytest.mark.parametrize('name,mode', [
    ('a.jpg', 'RGB'), ('a.jpg', 'L'), ('a.jpg', 'CMYK'), ('a.png', 'RGBA'), ('a.png', 'P'),
    ('a.png', 'LA'), ('a.png', 'I;16'), ('a.png', '1'), ('a.webp', 'RGB'), ('a.tif', 'I;16'),
    ('a.tiff', 'RGB'), ('a.bmp', 'RGB')])
def test_every_kind_of_picture(tmp_path, name, mode):
    picture(tmp_path / name, mode=mode)
    array = read_picture(str(tmp_path / name), 32, 8)
    assert array.shape == (24, 32, 3) and array.dtype == np.uint8 and array.std() > 1


def test_a_phones_200_megapixels_are_read_and_bombs_are_not(tmp_path, monkeypatch):
    path = str(tmp_path / 'large.jpg')
    Image.new('RGB', (16_000, 12_500), 'red').save(path)
    for width, size in ((32, (2000, 1563)), (None, (8000, 6250))):
        assert open_picture(path, width).size == size
    bomb = str(tmp_path / 'bomb.png')
    Image.new('1', (16_000, 12_500)).save(bomb)
    with pytest.raises(InputError, match='bomb.png .*16000 x 12500 pixels, more than the 180 mill'):
        open_picture(bomb)


@pytest.mark.parametrize('size', [(1, 300), (4000, 10)])
def test_strips_are_no_pictures(tmp_path, size):
    picture(tmp_path / 'a.png', size=size)
    with pytest.raises(InputError, match='a.png cannot be read: .*thinner than 1 : 200'):
        open_picture(str(tmp_path / 'a.png'))


def test_numbers_that_are_none_and_pictures_of_one_value(tmp_path):
    values = np.full((40, 60), np.nan, np.float32)
    values[:20, :30], values[:20, 30:] = 5, np.inf
    values[0, 0] = 7
    Image.fromarray(values).save(tmp_path / 'a.tif')
    shown = np.asarray(open_picture(str(tmp_path / 'a.tif')))[..., 0]
    assert shown[0, 0] == shown[0, 40] == 255 and shown[10, 10] == shown[30, 30] == 0
    Image.fromarray(np.full((40, 60), 30_000, np.uint16)).save(tmp_path / 'b.png')
    assert (np.asarray(open_picture(str(tmp_path / 'b.png'))) == 127).all()


def test_readers_that_raise_anything(tmp_path, monkeypatch):
    picture(tmp_path / 'a.jpg')

    def read_exif(picture):
        raise struct.error('a width that is a text')
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8))
    image.save(tmp_path / 'b.avif')
    content = bytearray((tmp_path / 'b.avif').read_bytes())
    start = content.index(b'mdat') + 4
    content[start:start + 50] = bytes(50)
    (tmp_path / 'b.avif').write_bytes(content)
    with pytest.raises(InputError, match='b.avif cannot be read'):
        open_picture(str(tmp_path / 'b.avif'))
    monkeypatch.setattr(media.ImageOps, 'exif_transpose', read_exif)
    with pytest.raises(InputError, match='a.jpg cannot be read: a width that is a text'):
        open_picture(str(tmp_path / 'a.jpg'))


def test_a_format_without_a_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)  # as if not installed
    monkeypatch.setattr(media.features, 'check', lambda name: False)
    for name, remedy in (('a.HEIC', 'pip install pillow-heif'), ('a.avif', 'pip install -U pil')):
        (tmp_path / name).write_bytes(b'as a phone writes it')
        with pytest.raises(InputError, match=f'{name} cannot be read: {remedy}'):
            open_picture(str(tmp_path / name))


def test_sixteen_bits_keep_their_contrast(tmp_path):
    ramp = np.linspace(1000, 3000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / 'a.png')
    array = read_picture(str(tmp_path / 'a.png'), 32, 8)
    assert array.min() < 10 and array.max() > 245


def test_exif_rotation_and_portrait_crop(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: stored lying, shown upright
    wide = np.zeros((400, 800, 3), dtype=np.uint8)
    wide[:, :400] = 255  # bright on the left as stored, on top as shown
    Image.fromarray(wide).save(tmp_path / 'a.jpg', exif=exif)
    array = read_picture(str(tmp_path / 'a.jpg'), 32, 8)
    assert array.shape == (32, 32, 3) and array[2].mean() > 240 and array[-3].mean() < 15


def test_a_faulty_exif_tag_does_not_hide_which_way_is_up(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011a] = 72.0
    exif = exif.tobytes().replace(b'\x01\x1a\x00\x05', b'\x01\x1a\x00\x02')  # said to be a text
    Image.new('RGB', (80, 40)).save(tmp_path / 'a.jpg', exif=exif)
    assert open_picture(str(tmp_path / 'a.jpg')).size == (40, 80)


def test_transparency_is_white(tmp_path):
    Image.new('RGBA', (40, 40), (255, 0, 0, 0)).save(tmp_path / 'a.png')
    assert (read_picture(str(tmp_path / 'a.png'), 16, 8) == 255).all()


# -----------------------------------------------------------------------------
# videos

def test_another_video_under_the_same_name_has_other_frames(tmp_path):
    path = make_video(tmp_path / 'walk.mp4')
    folder = extract_frames(str(path))
    assert extract_frames(str(path)) == folder
    make_video(path, frames=30)
    other = extract_frames(str(path))
    assert other != folder
    assert [len(list_files(x, PICTURES)) for x in (folder, other)] == [4, 6]
    for picture in list_files(other, PICTURES):
        os.remove(picture)
    assert len(list_files(extract_frames(str(path)), PICTURES)) == 6


def test_two_processes_take_frames_out_of_the_same_video(tmp_path, monkeypatch):
    path = str(make_video(tmp_path / 'walk.mp4'))
    folder = Path(extract_frames(path))
    shutil.rmtree(folder)

    def read(*arguments, **options):
        frames = list(read_video(*arguments, **options))
        folder.mkdir()  # the other one is ready first
        (folder / '000000.jpg').touch()
        return frames

    monkeypatch.setattr(media, 'read_video', read)
    assert extract_frames(path) == str(folder)
    assert list((tmp_path / 'frames').iterdir()) == [folder]


def test_truncated_video(tmp_path):
    path = make_video(tmp_path / 'walk.mp4')
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    with pytest.raises(InputError, match='walk.mp4'):
        list(read_video(str(path), 5))


def test_a_trimmed_video_has_the_frames_that_a_player_shows(tmp_path):
    """Packets before the trim are decoded, but not shown: an edit list hides them."""
    av = pytest.importorskip('av')
    whole, trimmed = make_video(tmp_path / 'whole.mp4', frames=20), tmp_path / 'trimmed.mp4'
    with av.open(str(whole)) as source, av.open(str(trimmed), 'w') as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts -= 12 * packet.duration      # the first twelve lie before zero
                packet.dts -= 12 * packet.duration
                packet.stream = stream
                target.mux(packet)
    shown = [image.getpixel((30, 20))[0] for image in read_video(str(trimmed), 5)]
    assert len(shown) == 5
    assert shown == sorted(shown)
    assert abs(shown[0] - 12 * 12) < 20 and shown[-1] > 200


QUADRANTS = np.zeros((48, 64, 3), np.uint8)
QUADRANTS[:24, :32] = 255, 0, 0
QUADRANTS[:24, 32:] = 0, 255, 0
QUADRANTS[24:, :32] = 0, 0, 255


@pytest.mark.parametrize('degrees', [0, 90, 180, 270])
@pytest.mark.parametrize('flips', [{}, dict(hflip=True), dict(vflip=True)])
def test_a_video_is_shown_as_the_phone_was_held(tmp_path, degrees, flips):
    path = make_video(tmp_path / 'v.mp4', draw=lambda i: Image.fromarray(QUADRANTS),
                      prepare=lambda stream: stream.set_display_rotation(degrees, **flips))
    shown = np.rot90(QUADRANTS, degrees // 90)      # counter-clockwise, then mirrored
    shown = shown[:, ::-1] if 'hflip' in flips else shown
    shown = shown[::-1] if 'vflip' in flips else shown
    frame = np.asarray(next(read_video(str(path), 4)), dtype=int)
    assert frame.shape == shown.shape
    assert np.abs(frame - shown).mean() < 20        # another orientation: 63 or more


def test_pixels_that_are_not_square_become_square(tmp_path):
    def prepare(stream):
        stream.sample_aspect_ratio = Fraction(3, 2)

    path = make_video(tmp_path / 'v.mp4', prepare=prepare)
    assert next(read_video(str(path), 4)).size == (96, 48)


def test_frames_are_even_in_time_where_the_rate_varies(tmp_path):
    """Half of the frames in the first second, the other half in the following nine."""
    av = pytest.importorskip('av')
    whole, path = make_video(tmp_path / 'whole.mp4', frames=20), tmp_path / 'varying.mp4'
    with av.open(str(whole)) as source, av.open(str(path), 'w') as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(video=0)):
            if packet.dts is not None:
                seconds = i / 10 if i < 10 else i - 9
                packet.pts = packet.dts = round(seconds / packet.time_base)
                packet.stream = stream
                target.mux(packet)
    shown = [image.getpixel((30, 20))[0] / 12 for image in read_video(str(path), 99, every=2)]
    assert np.abs(np.array(shown) - [0, 11, 14, 16, 19]).max() < 1.5
    assert len(list(read_video(str(path), 6))) == 6     # by number, as benchmarks want it


def test_a_film_that_begins_in_the_middle_of_a_group(tmp_path):
    """What comes before the first key frame cannot be shown; the others keep their places."""
    av = pytest.importorskip('av')

    def every_eight(stream):
        stream.codec_context.gop_size = 8

    whole = make_video(tmp_path / 'whole.ts', frames=20, prepare=every_eight, codec='libx264')
    with av.open(str(whole)) as source, av.open(str(tmp_path / 'cut.ts'), 'w') as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [x for x in source.demux(video=0) if x.dts is not None][4:]:
            packet.stream = stream
            target.mux(packet)
    shown = [image.getpixel((30, 20))[0] / 12 for image in read_video(str(tmp_path / 'cut.ts'), 4)]
    assert len(shown) == 4 and shown == sorted(shown)
    assert abs(shown[0] - 8) < 0.7 and abs(shown[-1] - 19) < 0.7 and len(set(shown)) == 4


def test_films_that_are_strips_and_names_that_are_no_unicode(tmp_path):
    thin = make_video(tmp_path / 'thin.mp4', size=(600, 2))
    with pytest.raises(InputError, match='thin.mp4 cannot be read: 600 x 2 pixels, thinner'):
        list(read_video(str(thin), 4))
    name = os.fsdecode(b'caf\xe9.mp4')
    make_video(tmp_path / 'a.mp4').rename(tmp_path / name)
    assert len(list_files(extract_frames(str(tmp_path / name)), PICTURES)) == 4


def test_depth_maps_are_no_frames(tmp_path):
    for i in range(4):
        picture(tmp_path / f'frame-{i}.color.png', value=200)
        picture(tmp_path / f'frame-{i}.depth.png', mode='I;16', value=3)
    assert all(image.getpixel((3, 3))[0] == 200 for image in read_video(str(tmp_path), 10))


def test_what_is_no_video(tmp_path):
    av = pytest.importorskip('av')
    with av.open(str(tmp_path / 'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=44_100, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
        frame.rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / 'empty.mp4').touch()
    for name, fault in (('sound.mp4', 'has no pictures, only sound'),
                        ('empty.mp4', 'cannot be read as a video')):
        with pytest.raises(InputError, match=f'{name} {fault}'):
            list(read_video(str(tmp_path / name), 4))


def test_frames_come_one_by_one(tmp_path, monkeypatch):
    made, as_shown = [], media.as_shown
    monkeypatch.setattr(media, 'as_shown', lambda *args: made.append(0) or as_shown(*args))
    frames = read_video(str(make_video(tmp_path / 'walk.mp4')), 5)
    assert next(frames).size == (64, 48) and len(made) == 1
    assert len(list(frames)) == 4 and len(made) == 5


# -----------------------------------------------------------------------------
# conversations

@pytest.fixture
def folder(tmp_path):
    Image.new('RGB', (64, 48), 'red').save(tmp_path / 'a.png')
    (tmp_path / 'frames').mkdir()
    for i in range(12):
        Image.new('RGB', (64, 48), (20 * i, 0, 0)).save(tmp_path / 'frames' / f'{i}.png')
    return tmp_path


@pytest.mark.parametrize('record, fault', [
    (dict(GOOD, image='gone.png'), 'missing .*gone.png'),
    (dict(GOOD, image=['a.png', 'a.png']), '1 <image> tokens for 2 images'),
    (dict(GOOD, conversations=turns(('human', '<image><image> x'), ('gpt', 'y'))),
     '2 <image> tokens for 1 images'),
    (dict(GOOD, conversations=turns(('human', '<image> x'), ('gpt', ' '))), 'empty answer'),
    (dict(GOOD, conversations=turns(('human', '<image> x'), ('robot', 'y'))), "'robot', not"),
    (dict(GOOD, conversations=turns(('gpt', '<image> x'), ('human', 'y'))), 'human first'),
    (dict(GOOD, conversations=turns(('human', '<image> x'), ('gpt', 'y'), ('human', 'z'))),
     'without an answer'),
    (dict(image='a.png'), 'no list of at least two turns'),
    (dict(GOOD, conversations=turns(('human', '<image> \ud800'), ('gpt', 'y'))), 'half a char'),
    (dict(GOOD, conversations=turns(('human', '<image> x'), ('gpt', ['y']))), 'no text under'),
    (dict(GOOD, conversations=turns(('human', '<image> x'), ('gpt', math.nan))), 'no text under'),
    (dict(GOOD, image=7), 'not a path'),
    (dict(video='', conversations=turns(('human', '<video> x'), ('gpt', 'y'))), 'not one path'),
    (dict(GOOD, spar_info=dict(red_point=[[1, 2]], point_img_idx=[[10 ** 30]])), 'spar_info'),
    (dict(GOOD, spar_info=dict(red_point=[[1, 2]], point_img_idx=[[1]])), 'there is no image 1'),
    (dict(GOOD, spar_info='[' * 100_000), 'spar_info'),
    (dict(conversations=turns(('human', 'Hello'), ('gpt', 'Hi')),
          spar_info=dict(red_point=[[1, 2]])), 'there is no image 0'),
    (dict(video='gone', conversations=turns(('human', '<video> x'), ('gpt', 'y'))),
     'missing .*gone'),
    (dict(video='frames', conversations=turns(('human', '<video><video> x'), ('gpt', 'y'))),
     '2 <video> or <image> tokens for one video'),
    (dict(GOOD, conversations=turns(('human', '<video> x'), ('gpt', 'y'))), 'no "video"'),
    (dict(GOOD, spar_info='{'), '"spar_info" cannot be read'),
    ('{"conversations": [', 'not JSON')])
def test_faulty_records(folder, record, fault):
    path = write(folder, GOOD, record, GOOD)
    with pytest.raises(InputError, match=f'data.jsonl, record 2: .*{fault}'):
        Conversations([path], str(folder))
    said = []
    assert len(Conversations([path], str(folder), skip_bad=True, say=said.append)) == 2
    assert '1 of 3 records left out' in said[0]


def test_a_good_record_has_no_fault(folder):
    assert record_fault(GOOD, str(folder)) is None
    counted = dict(GOOD, conversations=turns(('human', '<image>\nHow many?'), ('gpt', 3)))
    data = Conversations([write(folder, counted)], str(folder))
    assert data[0]['conversations'][1]['value'] == '3'
    assert 'missing' in record_fault(GOOD, str(folder / 'elsewhere'))


def test_files_are_looked_at_before_training(folder):
    (folder / 'empty.mp4').touch()
    (folder / 'text.png').write_text('no picture')
    picture(folder / 'thin.png', size=(1000, 2))
    for name, fault in (('empty.mp4', 'is empty'), ('frames', 'is a folder'), ('thin.png', 'thin'),
                        ('text.png', 'not a picture'), ('.', 'is a folder')):
        kind = 'video' if 'mp4' in name else 'image'
        record = dict(conversations=turns(('human', f'<{kind}> x'), ('gpt', 'y')), **{kind: name})
        assert fault in record_fault(record, str(folder)), name
    video = dict(conversations=turns(('human', '<video> x'), ('gpt', 'y')), video='frames')
    assert record_fault(video, str(folder)) is None


def test_records_that_break_when_they_are_read_are_skipped(folder):
    """Headers do not tell that the rest of a picture is missing."""
    whole = folder / 'b.png'
    picture(whole, size=(400, 300))
    whole.write_bytes(whole.read_bytes()[:5000])
    path = write(folder, GOOD, dict(GOOD, image='b.png'), GOOD, dict(GOOD, image='b.png'))
    said = []
    data = Conversations([path], str(folder), skip_bad=True, say=said.append)
    assert len(data) == 4 and said == []
    part = Part(data, [3, 2, 1], skip_bad=True, say=said.append)
    for _ in range(2):
        places = [part[i]['where'] for i in range(3)]
        assert [where[-1] for where in places] == ['3', '3', '3']
    assert len(list(part)) == 3
    assert len(said) == 2 and 'record 4: ' in said[0] and '(2 so far ' in said[1]
    with pytest.raises(InputError, match='record 4: .*b.png cannot be read.*--skip-bad'):
        Part(data, [3, 2])[0]
    with pytest.raises(InputError, match='none of the records can be read'):
        Part(data, [1, 3], skip_bad=True, say=said.append)[0]


def test_no_usable_record(folder):
    with pytest.raises(InputError, match='no usable record'):
        Conversations([write(folder, dict(image='x'))], str(folder), skip_bad=True)
    with pytest.raises(InputError, match='no file'):
        Conversations(['nowhere.json'], str(folder))


@pytest.mark.parametrize('token', ['<video>', '<image>'])  # VSI-590K has <image> before videos too
def test_videos_and_their_tokens(folder, token):
    conversation = turns(('human', f'{token}\nHow many?'), ('gpt', '3'))
    path = write(folder, dict(video='frames', conversations=conversation))
    item = Conversations([path], str(folder), num_frames=8)[0]
    assert len(item['images']) == 6  # twelve seconds, one frame in two
    assert item['conversations'][0]['value'] == '<image>' * 6 + 'How many?'


def test_shares_of_files(folder):
    path = write(folder, *[GOOD] * 20)
    assert len(Conversations([f'{path}:0.25', path], str(folder))) == 25
    with pytest.raises(InputError, match='above 0 and at most 1'):
        Conversations([f'{path}:7'], str(folder))
    for share in ('0.2.5', '.'):
        with pytest.raises(InputError, match='no file'):
            Conversations([f'{path}:{share}'], str(folder))


# -----------------------------------------------------------------------------
# markers

def test_markers_are_drawn():
    images = [Image.new('RGB', (200, 100), 'white') for _ in range(3)]
    info = dict(red_point=[[500, 500]], blue_point=[[250, 500]], point_img_idx=[[0, 2]],
                green_bbox=[[100, 100, 900, 900]], bbox_img_idx=[[1]])
    drawn = draw_markers(images, json.dumps(info))
    assert drawn[0].getpixel((100, 50)) == (255, 0, 0)
    assert drawn[2].getpixel((50, 50)) == (0, 0, 255)
    assert drawn[1].getpixel((20, 50)) == (0, 255, 0)
    assert drawn[1].getpixel((100, 50)) == (255, 255, 255)
    assert images[0].getpixel((100, 50)) == (255, 255, 255)
