import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Batches, PhotoFolder, RoomPool, list_pictures, make_source, natural_order, read_picture, step_generator, views_per_scene
from model import InputError
from train import parse_config


def picture(path, size=(80, 60), mode='RGB', value=None, **options):
    noise = np.random.RandomState(len(str(path))).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise if value is None else np.full_like(noise, value))
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 200)
    elif mode != 'RGB':
        image = image.convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def make_folder(root, scenes=3, frames=6):
    for scene in range(scenes):
        for frame in range(frames):
            picture(root / f'scene{scene}' / f'{frame}.jpg', value=40 * scene + 5 * frame)
    return root


def source(root, split='train', **settings):
    said = []
    return PhotoFolder(str(root), split, 0, 32, 8, **{'min_views': 3, 'say': said.append, **settings}), said


# -----------------------------------------------------------------------------
# rooms

def test_a_batch_is_a_function_of_its_number():
    a, b = [RoomPool('train', 0, 8, new_rooms=1.5) for _ in range(2)]
    for step in range(7):
        late = a.batch(step, 2, 3)
    early = b.batch(6, 2, 3)                                      # the window jumps straight to step 6
    assert all(torch.equal(late[name], early[name]) for name in late)
    assert not torch.equal(a.batch(7, 2, 3)['images'], late['images'])


def test_the_window_moves():
    pool = RoomPool('train', 0, 8, new_rooms=2)
    pool.advance(0)
    first = dict(pool.blocks)
    pool.advance(4)                                               # eight rooms on: all of them are others
    assert all(pool.blocks[slot] != first[slot] for slot in first)


def test_splits_and_ranks_see_different_rooms():
    pools = [RoomPool('train', 0, 4), RoomPool('val', 0, 4), RoomPool('train', 0, 4, rank=1, world_size=2), RoomPool('train', 1, 4)]
    images = [pool.render_block(0)[1]['images'] for pool in pools]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_closest_pairs_are_closer():
    pool = RoomPool('train', 0, 16)
    turn = lambda batch: torch.einsum('bij,bij->b', batch['extrinsics'][:, 0, :, :3], batch['extrinsics'][:, 1, :, :3]).mean()
    assert turn(pool.batch(0, 8, 2, neighbours=1, keep_closest=1 / 3)) > turn(pool.batch(0, 8, 2)) + 0.5


# -----------------------------------------------------------------------------
# photographs

def test_natural_order(tmp_path):
    names = ['10.jpg', '2.jpg', '1.jpg', 'b2.png', 'b10.png', 'a.webp', 'notes.txt', '.hidden.jpg']
    for name in names:
        (tmp_path / name).touch()
    assert [path.split('/')[-1] for path in list_pictures(tmp_path)] == ['1.jpg', '2.jpg', '10.jpg', 'a.webp', 'b2.png', 'b10.png']
    assert sorted(['frame-000010', 'frame-000002'], key=natural_order)[0] == 'frame-000002'
    assert sorted(['a1', '1a'], key=natural_order)                # numbers and words can be compared


@pytest.mark.parametrize('name,mode', [('a.jpg', 'RGB'), ('a.jpg', 'L'), ('a.jpg', 'CMYK'), ('a.png', 'RGBA'), ('a.png', 'P'),
                                       ('a.png', 'LA'), ('a.png', 'I;16'), ('a.png', '1'), ('a.webp', 'RGB')])
def test_every_kind_of_picture(tmp_path, name, mode):
    picture(tmp_path / name, mode=mode)
    array = read_picture(str(tmp_path / name), 32, 8)
    assert array.shape == (24, 32, 3) and array.dtype == np.uint8 and array.std() > 1


def test_sixteen_bits_keep_their_contrast(tmp_path):
    ramp = np.linspace(1000, 3000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / 'a.png')
    array = read_picture(str(tmp_path / 'a.png'), 32, 8)
    assert array.min() < 10 and array.max() > 245


def test_exif_rotation_and_portrait_crop(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                              # the camera was turned: stored lying, shown upright
    wide = np.zeros((400, 800, 3), dtype=np.uint8)
    wide[:, :400] = 255                                           # bright on the left as stored, on top as shown
    Image.fromarray(wide).save(tmp_path / 'a.jpg', exif=exif)
    array = read_picture(str(tmp_path / 'a.jpg'), 32, 8)
    assert array.shape == (32, 32, 3) and array[2].mean() > 240 and array[-3].mean() < 15


def test_transparency_is_white(tmp_path):
    Image.new('RGBA', (40, 40), (255, 0, 0, 0)).save(tmp_path / 'a.png')
    assert (read_picture(str(tmp_path / 'a.png'), 16, 8) == 255).all()


def test_gaps_are_drawn_without_touching_the_settings(tmp_path, monkeypatch):
    """The release's sampler narrowed its gap for good after one short scene."""
    make_folder(tmp_path, scenes=3, frames=4)
    for frame in range(60):
        picture(tmp_path / 'scene1' / f'{frame}.jpg', value=frame)
    photos, _ = source(tmp_path, gap=(5, 9))
    for step in range(20):
        photos.batch(step, 2, 4)
    assert photos.gap == (5, 9)
    frames = []
    photos.scenes = [scene for scene in photos.scenes if len(scene) == 60]
    monkeypatch.setattr(data, 'read_picture', lambda path, *_: frames.append(int(path.split('/')[-1][:-4])) or np.zeros((8, 8, 3), np.uint8))
    for step in range(40):
        photos.sample(4, step_generator(step))
    gaps = np.diff(np.array(frames).reshape(40, 4))
    assert gaps.min() >= 5 and gaps.max() == 9


def test_batches_of_photographs(tmp_path):
    photos, said = source(make_folder(tmp_path))
    batch = photos.batch(3, 2, 4)
    assert batch['images'].shape == (2, 4, 3, 24, 32) and 0 <= batch['images'].min() and batch['images'].max() <= 1
    assert torch.equal(batch['images'], source(tmp_path)[0].batch(3, 2, 4)['images'])
    assert said == [] and photos.batch(0, 1, 99)['images'].shape[1] == 6          # no more views than a scene has
    held_out = source(tmp_path, 'val')[0]
    assert not {p for s in photos.scenes for p in s} & {p for s in held_out.scenes for p in s}
    picture(tmp_path / 'scene0' / '3.jpg', size=(80, 40))                         # mixed shapes: cropped to the lowest
    assert source(tmp_path, gap=(1, 1))[0].batch(0, 8, 5)['images'].shape[-2:] == (16, 32)


def test_one_flat_folder_is_one_scene(tmp_path):
    for frame in range(16):
        picture(tmp_path / f'{frame}.jpg')
    train, val = source(tmp_path)[0], source(tmp_path, 'val')[0]
    assert (len(train.scenes[0]), len(val.scenes[0])) == (12, 4) and 'last 4 pictures' in val.held_out
    assert not set(train.scenes[0]) & set(val.scenes[0])


def test_few_pictures_cannot_be_held_out_and_it_says_so(tmp_path):
    for frame in range(5):
        picture(tmp_path / f'{frame}.jpg')
    assert source(tmp_path, 'val')[0].held_out.startswith('nothing, for the one scene has fewer than 12 pictures')


def test_unchecked_pictures_stop_the_run_by_name(tmp_path, monkeypatch):
    """Large sets are not opened one by one beforehand."""
    monkeypatch.setattr(PhotoFolder, 'CHECKED', 5)
    make_folder(tmp_path, scenes=1)
    (tmp_path / 'scene0' / '1.jpg').write_text('this is no picture')
    photos, said = source(tmp_path, gap=(1, 1))
    with pytest.raises(InputError, match='1.jpg cannot be read: not a picture'):
        for step in range(20):
            photos.batch(step, 2, 3)
    assert said == []


def test_short_scenes_are_left_out_by_name(tmp_path):
    make_folder(tmp_path)
    picture(tmp_path / 'lonely' / '0.jpg')
    photos, said = source(tmp_path)
    assert said == [f'scene lonely of {tmp_path} is left out: 1 picture, --min-views asks for 3']


def test_bad_pictures_are_named_and_left_out(tmp_path):
    make_folder(tmp_path, scenes=1)
    (tmp_path / 'scene0' / '1.jpg').write_text('this is no picture')
    whole = (tmp_path / 'scene0' / '2.jpg')
    picture(whole, size=(400, 300))
    whole.write_bytes(whole.read_bytes()[:3000])
    photos, said = source(tmp_path, min_views=2)
    assert [path[-5] for path in photos.scenes[0]] == ['0', '3', '4', '5']
    for step in range(10):
        images = photos.batch(step, 2, 3)['images']
        assert images.shape[:2] == (2, 3)
        assert all(not torch.equal(images[b, i], images[b, j]) for b in range(2) for i in range(3) for j in range(i))   # no view twice
    assert len(said) == 2 and '1.jpg cannot be read: not a picture; left out' in sorted(said)[0]
    assert '2.jpg cannot be read' in sorted(said)[1] and 'truncated' in sorted(said)[1]


@pytest.mark.parametrize('make,message', [
    (lambda root: None, 'no pictures in'),
    (lambda root: picture(root / 'a.jpg'), 'no scene of .* has the 3 pictures'),
    (lambda root: [(root / f'{i}.jpg').write_text('text') for i in range(4)], 'no scene of .* has the 3 pictures'),
])
def test_hopeless_folders(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        source(tmp_path)[0].batch(0, 1, 3)


def test_missing_folder_and_odd_width():
    with pytest.raises(InputError, match='no folder nowhere'):
        source('nowhere')
    _, config = parse_config(['--config', 'small', '--image-width', '60'])
    with pytest.raises(InputError, match='--image-width 60 is not a multiple of the patch size 8: take 56 or 64'):
        make_source(config, 'train', 8)


def test_one_number_of_views_a_batch():
    _, config = parse_config(['--config', 'small', '--images-per-batch', '24'])
    batches = Batches(RoomPool('train', 0, 8), config)
    shapes = [batches[step]['images'].shape[:2] for step in range(4)]
    assert all(B == 24 // V for B, V in shapes)
    assert {views_per_scene(step, 0, 4, 8) for step in range(60)} == {4, 5, 6, 7, 8}
