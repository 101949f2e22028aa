"""Rooms, photographs, videos, and miniatures of real data sets in exactly their layouts."""
import itertools
import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import data
import media
from backbone import fit_pictures
from common import InputError, step_generator
from data import PhotoFolder, RoomPool, check, make_source
from media import find_scenes, read_video
from tiny import make_video, names_of, picture
from train import parse_config


@pytest.fixture(autouse=True)
def own_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(media, 'FRAMES', str(tmp_path / 'frames'))


def make_folder(root, scenes=3, frames=6):
    for scene in range(scenes):
        for frame in range(frames):
            picture(root / f'scene{scene}' / f'{frame}.jpg', value=40 * scene + 5 * frame)
    return root


def source(root, split='train', **settings):
    """-> PhotoFolder, the list of what it says"""
    said = []
    settings = {'min_views': 3, 'say': said.append, **settings}
    return PhotoFolder(str(root), split, 0, 32, 8, **settings), said


# -----------------------------------------------------------------------------
# rooms

def test_a_batch_is_a_function_of_its_number():
    a, b = [RoomPool('train', 0, 8, new_rooms=1.5) for _ in range(2)]
    for step in range(7):
        late = a.batch(step, 2, 3)
    early = b.batch(6, 2, 3)  # the window jumps straight to step 6
    assert all(torch.equal(late[name], early[name]) for name in late)
    assert not torch.equal(a.batch(7, 2, 3)['images'], late['images'])


def test_the_window_moves():
    pool = RoomPool('train', 0, 8, new_rooms=2)
    pool.advance(0)
    first = dict(pool.blocks)
    pool.advance(4)  # eight rooms on: all of them are others
    assert all(pool.blocks[slot] != first[slot] for slot in first)


def test_splits_and_ranks_see_different_rooms():
    pools = [RoomPool('train', 0, 4), RoomPool('val', 0, 4),
             RoomPool('train', 0, 4, rank=1, world_size=2), RoomPool('train', 1, 4)]
    images = [pool.render_block(0)[1]['images'] for pool in pools]
    for i in range(len(images)):
        for j in range(i):
            assert not torch.equal(images[i], images[j])


def test_closest_pairs_are_closer():
    pool = RoomPool('train', 0, 16)

    def likeness(batch):
        first, second = batch['extrinsics'][:, 0, :, :3], batch['extrinsics'][:, 1, :, :3]
        return (first * second).sum((1, 2)).mean()

    closest = pool.batch(0, 8, 2, neighbours=1, keep_closest=1 / 3)
    assert likeness(closest) > likeness(pool.batch(0, 8, 2)) + 0.5


# -----------------------------------------------------------------------------
# photographs

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

    def note(path, *_):
        frames.append(int(os.path.basename(path)[:-4]))
        return Image.new('RGB', (8, 8))

    monkeypatch.setattr(data, 'open_picture', note)
    photos.scenes = [scene for scene in photos.scenes if len(scene) == 60]
    for step in range(40):
        photos.sample(4, step_generator(step))
    gaps = np.diff(np.array(frames).reshape(40, 4))
    assert gaps.min() >= 5 and gaps.max() == 9


def test_batches_of_photographs(tmp_path):
    photos, said = source(make_folder(tmp_path))
    images = photos.batch(3, 2, 4)['images']
    assert images.shape == (2, 4, 3, 24, 32) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(images, source(tmp_path)[0].batch(3, 2, 4)['images'])
    assert said == []
    assert photos.batch(0, 1, 99)['images'].shape[1] == 6  # no more views than a scene has

    held_out = source(tmp_path, 'val')[0]
    assert not set(sum(photos.scenes, [])) & set(sum(held_out.scenes, []))
    picture(tmp_path / 'scene0' / '3.jpg', size=(80, 40))  # mixed shapes: cropped to the lowest
    mixed = source(tmp_path, gap=(1, 1))[0]
    assert mixed.batch(0, 8, 5)['images'].shape[-2:] == (16, 32)


def test_a_panorama_does_not_cut_its_neighbours(tmp_path):
    make_folder(tmp_path, scenes=1, frames=16)
    alone = source(tmp_path, gap=(1, 1))[0].batch(0, 2, 12)['images']
    picture(tmp_path / 'scene0' / '5.jpg', size=(300, 75))
    beside = source(tmp_path, gap=(1, 1))[0].batch(0, 2, 12)['images']
    assert beside.shape == alone.shape == (2, 12, 3, 24, 32)
    assert torch.equal(beside[:, :5], alone[:, :5])
    assert torch.equal(beside[:, 6:], alone[:, 6:])
    ramp = np.tile(np.arange(300, dtype=np.uint8)[None, :, None] // 2 + 50, (75, 1, 3))
    tall, wide = Image.new('RGB', (300, 225), 'red'), Image.fromarray(ramp)
    images = fit_pictures([tall, tall, wide, tall], 32, 8)
    assert images.shape == (4, 3, 24, 32)
    left, right = images[2, 0, 12, [0, -1]].tolist()
    assert 95 < left < right < 155                  # its middle third, not squeezed


def test_a_strip_one_pixel_wide_takes_no_gigabyte():
    tracemalloc.start()
    images = fit_pictures([Image.new('RGB', (1, 20_000), 'red')], 518, 14)
    assert images.shape == (1, 3, 518, 518)
    assert (images == torch.tensor([255, 0, 0]).view(3, 1, 1)).all()
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


def test_one_flat_folder_is_one_scene(tmp_path):
    for frame in range(16):
        picture(tmp_path / f'{frame}.jpg')
    train, val = source(tmp_path)[0], source(tmp_path, 'val')[0]
    assert (len(train.scenes[0]), len(val.scenes[0])) == (12, 4)
    assert val.held_out_text == '4 pictures of the only scene, from 12.jpg on'
    assert not set(train.scenes[0]) & set(val.scenes[0])


def test_few_pictures_cannot_be_held_out_and_it_says_so(tmp_path):
    for frame in range(5):
        picture(tmp_path / f'{frame}.jpg')
    held_out = source(tmp_path, 'val')[0].held_out_text
    assert held_out.startswith('nothing, for the one scene has fewer than 12 pictures')


def test_what_was_held_out_stays_so_when_a_picture_is_deleted(tmp_path):
    for frame in range(12):
        picture(tmp_path / f'{frame:02d}.jpg')
    reserved = source(tmp_path)[0].reserved
    (tmp_path / '00.jpg').unlink()
    train, val = [source(tmp_path, split, reserved=reserved)[0] for split in ('train', 'val')]
    assert [os.path.basename(path) for path in val.scenes[0]] == ['09.jpg', '10.jpg', '11.jpg']
    assert len(train.scenes[0]) == 8 and train.reserved == val.reserved == reserved
    (tmp_path / '09.jpg').unlink()
    (held_out, _) = source(tmp_path, 'val', reserved=reserved)
    assert held_out.held_out_text == '2 pictures of the only scene, from 10.jpg on'
    (tmp_path / '10.jpg').unlink()
    with pytest.raises(InputError, match='lacks what this run held out'):
        source(tmp_path, 'val', reserved=reserved)


def test_other_views_stand_in_for_pictures_that_turn_out_to_be_unreadable(
        tmp_path, monkeypatch, capsys):
    """Large sets are not opened one by one beforehand."""
    monkeypatch.setattr(PhotoFolder, 'CHECKED', 5)
    make_folder(tmp_path, scenes=1)
    path = tmp_path / 'scene0' / '1.jpg'
    whole = source(tmp_path, gap=(1, 1))[0]
    wanted = [whole.batch(step, 2, 3)['images'] for step in range(8)]
    path.write_text('this is no picture')
    photos, said = source(tmp_path, gap=(1, 1))
    batches = [photos.batch(step, 2, 3)['images'] for step in range(8)]
    assert said == [] and f'{path} cannot be read: not a picture' in capsys.readouterr().out
    kept = [torch.equal(*pair) for pair in zip(batches, wanted)]
    assert any(kept) and not all(kept)
    again = source(tmp_path, gap=(1, 1))[0]  # a resumed run sees the same
    assert torch.equal(again.batch(7, 2, 3)['images'], batches[7])

    for path in tmp_path.rglob('*.jpg'):
        path.write_text('this is no picture')
    with pytest.raises(InputError, match='not a picture.* in 10 draws of views'):
        photos.batch(0, 2, 3)


def test_short_scenes_are_left_out_by_name(tmp_path):
    make_folder(tmp_path)
    picture(tmp_path / 'lonely' / '0.jpg')
    said = source(tmp_path)[1]
    assert said == [f'scene lonely of {tmp_path} is left out: 1 picture, --min-views asks for 3']


def test_all_of_a_folder_is_held_out_where_one_scene_is_long_enough(tmp_path, capsys):
    make_folder(tmp_path, scenes=1, frames=16)
    picture(tmp_path / 'lonely' / '0.jpg')
    _, config = parse_config(['--config', 'small', '--data', str(tmp_path)])
    for photos in data.make_sources(config, 8, 'cpu', all_held_out=True):
        assert [len(scene) for scene in photos.scenes] == [16]
    assert capsys.readouterr().out.count('lonely') == 1  # both sources look, one of them says it


def test_bad_pictures_are_named_and_left_out(tmp_path):
    make_folder(tmp_path, scenes=1)
    (tmp_path / 'scene0' / '1.jpg').write_text('this is no picture')
    whole = tmp_path / 'scene0' / '2.jpg'
    picture(whole, size=(400, 300))
    whole.write_bytes(whole.read_bytes()[:3000])
    photos, said = source(tmp_path, min_views=2)
    assert names_of(photos.scenes[0]) == ['0.jpg', '3.jpg', '4.jpg', '5.jpg']
    for step in range(10):
        images = photos.batch(step, 2, 3)['images']
        assert images.shape[:2] == (2, 3)
        for b in range(2):  # no view twice
            for i, j in ((0, 1), (0, 2), (1, 2)):
                assert not torch.equal(images[b, i], images[b, j])
    first, second = sorted(said)
    assert '1.jpg cannot be read: not a picture; left out' in first
    assert '2.jpg cannot be read' in second and 'truncated' in second


def no_picture(root):
    pass


def one_picture(root):
    picture(root / 'a.jpg')


def four_texts(root):
    for i in range(4):
        (root / f'{i}.jpg').write_text('text')


def no_video(root):
    (root / 'a.mp4').write_text('no video')


@pytest.mark.parametrize('make,message', [
    (no_picture, 'no pictures in'),
    (no_video, r'no videos; not used: videos that cannot be read \(1\)'),
    (one_picture, 'no scene of .* has the 3 pictures'),
    (four_texts, 'no scene of .* has the 3 pictures'),
])
def test_hopeless_folders(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        source(tmp_path)[0].batch(0, 1, 3)


def test_missing_folder_and_odd_width():
    with pytest.raises(InputError, match='no folder nowhere'):
        source('nowhere')
    with pytest.raises(InputError, match='no folder nowhere'):
        check('nowhere')
    _, config = parse_config(['--config', 'small', '--image-width', '60'])
    message = '--image-width 60 is not a multiple of the patch size 8: take 56 or 64'
    with pytest.raises(InputError, match=message):
        make_source(config, 'train', 8)


# -----------------------------------------------------------------------------
# data sets in their own layouts

def make_scannet(root, lists=True, inside='scans'):
    """As SensReader exports it, three scenes of twelve frames: unpadded names."""
    for scene in ('scene0000_00', 'scene0001_00', 'scene0002_00'):
        for kind in ('color', 'depth', 'pose', 'intrinsic'):
            (root / inside / scene / kind).mkdir(parents=True)
        for i in range(12):
            picture(root / inside / scene / 'color' / f'{i}.jpg', size=(64, 48))
            (root / inside / scene / 'pose' / f'{i}.txt').write_text('1 0 0 0\n')
    if lists:
        (root / 'scannetv2_train.txt').write_text('scene0000_00\nscene0002_00\nscene0009_00\n')
        (root / 'scannetv2_val.txt').write_text('scene0001_00\n')
    return root


def test_of_many_scenes_the_last_and_every_tenth_before_it_are_held_out(tmp_path):
    for scene, frame in itertools.product(range(12), range(3)):
        picture(tmp_path / f'scene{scene}' / f'{frame}.jpg')
    assert source(tmp_path, 'val')[0].held_out_text == 'scene scene11, scene1'
    assert len(source(tmp_path, 'train')[0].scenes) == 10


def test_what_is_held_out_is_looked_at_alike_whatever_the_seed(tmp_path):
    folder = make_folder(tmp_path / 'photos', scenes=4, frames=12)
    for split, is_alike in ('val', True), ('train', False):
        one, other = [make_source(parse_config(['--config', 'photos', '--data', str(folder),
                                                '--seed', seed])[1], split, 14).batch(0, 4, 4)
                      for seed in ('0', '1')]
        is_same_shape = one['images'].shape == other['images'].shape
        assert (is_same_shape and torch.equal(one['images'], other['images'])) == is_alike


@pytest.mark.parametrize('inside', ['scans', 'scans_test', '.'])
def test_scannet(tmp_path, inside):
    root = make_scannet(tmp_path / 'data', inside=inside)
    found = find_scenes(str(root))
    assert found.layout == 'ScanNet'
    assert found.unused == {'depth/': 3, 'pose/': 3, 'intrinsic/': 3}
    assert names_of(found.scenes['scene0000_00']) == [f'{i}.jpg' for i in range(12)]  # 2 before 10
    train, val = [PhotoFolder(str(root), split, 0, 28, 14, 4) for split in ('train', 'val')]
    assert len(train.scenes) == 2 and len(val.scenes) == 1
    assert all('scene0001_00' in path for path in val.scenes[0])
    assert not any('scene0001_00' in path for path in sum(train.scenes, []))  # never a val scene
    report = check(str(root))
    assert '3 scenes, 36 pictures' in report
    assert 'train list: 3 scenes, 2 of them here; missing: scene0009_00' in report


def seven_scenes(root):
    for i in range(4):
        picture(root / 'chess' / 'seq-01' / f'frame-{i:06d}.color.png')
        picture(root / 'chess' / 'seq-01' / f'frame-{i:06d}.depth.png', mode='I;16')
        (root / 'chess' / 'seq-01' / f'frame-{i:06d}.pose.txt').touch()


def sun3d(root):
    for i in range(4):
        picture(root / 'hotel' / 'room' / 'scan1' / 'image' / f'{i:07d}-0000.jpg')
        picture(root / 'hotel' / 'room' / 'scan1' / 'depth' / f'{i:07d}-0000.png', mode='I;16')


def scannet_frames(root):
    for i in range(4):
        picture(root / 'scene0000_00' / 'frames' / 'color' / f'{i}.jpg')
        picture(root / 'scene0000_00' / 'frames' / 'depth' / f'{i}.png', mode='I;16')


def iphone(root):
    for i in range(4):
        picture(root / 'data' / '0a7cc12c0e' / 'iphone' / 'rgb' / f'frame_{i:06d}.jpg')
        picture(root / 'data' / '0a7cc12c0e' / 'iphone' / 'depth' / f'frame_{i:06d}.png')


def colmap(root):
    for i in range(4):
        picture(root / 'garden' / 'images' / f'{i}.JPG')
        picture(root / 'garden' / 'images_4' / f'{i}.JPG')
        (root / 'garden' / 'sparse').mkdir(exist_ok=True)


def flat_with_depth(root):
    for i in range(4):
        picture(root / 'color' / f'{i}.jpg')
        picture(root / 'depth' / f'{i}.png', mode='I;16')


def together(root):
    for i in range(4):
        picture(root / f'rgb_{i}.png')
        picture(root / f'depth_{i}.png', mode='I;16')
        picture(root / f'{i}_mask.png')


@pytest.mark.parametrize('make, name, unused', [
    (seven_scenes, 'chess/seq-01', {'pictures named depth, mask, ...': 4}),
    (sun3d, 'hotel/room/scan1', {'depth/': 1}),
    (scannet_frames, 'scene0000_00', {}), (iphone, '0a7cc12c0e', {}),
    (colmap, 'garden', {'images_4/': 1, 'sparse/': 1}),
    (flat_with_depth, 'kitchen', {'depth/': 1}),
    (together, 'kitchen', {'pictures named depth, mask, ...': 8})])
def test_layouts(tmp_path, make, name, unused):
    tmp_path = tmp_path / 'kitchen'
    make(tmp_path)
    found = find_scenes(str(tmp_path))
    assert list(found.scenes) == [name]
    assert len(found.scenes[name]) == 4
    assert not any('depth' in path or 'mask' in path or 'images_4' in path
                   for path in names_of(found.scenes[name]))
    assert found.unused == unused
    assert 'unreadable: 0 of 4 looked at' in check(str(tmp_path))


def test_no_two_scenes_have_one_name(tmp_path):
    root = tmp_path / 'kitchen'
    for folder in ('.', 'kitchen', 'data/sink', 'scans/sink'):
        picture(root / folder / '1.jpg')
    assert sorted(find_scenes(str(root)).scenes) == ['kitchen', 'kitchen/kitchen',
                                                     'kitchen/scans/sink', 'sink']


def test_nothing_is_passed_over_silently(tmp_path):
    make_folder(tmp_path, scenes=1)
    (tmp_path / 'scene0' / 'raw.DNG').touch()
    (tmp_path / 'scene0' / 'phone.heic').write_bytes(b'as phones write it')
    picture(tmp_path / 'depth' / '1.png', mode='I;16')
    said = source(tmp_path)[1]
    assert said[0] == f'{tmp_path}: not used: depth/ (1), .dng (1)'
    assert 'phone.heic cannot be read: pip install pillow-heif; left out' in said[1]


def test_a_ring_of_links_shows_nothing_twice(tmp_path):
    make_folder(tmp_path, scenes=2)
    (tmp_path / 'scene0' / 'back').symlink_to(tmp_path)
    (tmp_path / 'again').symlink_to(tmp_path / 'scene1')
    found = find_scenes(str(tmp_path))
    assert sorted(found.scenes) == ['again', 'scene0']      # scene1 under its first name
    assert '2 scenes, 12 pictures' in check(str(tmp_path))


def test_what_was_written_is_no_data(tmp_path, monkeypatch):
    make_folder(tmp_path, scenes=1)
    make_folder(tmp_path / 'out' / 'frames', scenes=2)
    monkeypatch.chdir(tmp_path)
    assert list(find_scenes('.').scenes) == ['scene0']
    assert len(find_scenes('out').scenes) == 2     # unless it is asked for


def test_scenes_of_one_name_are_two_scenes(tmp_path):
    for i, folder in enumerate(('kitchen', 'data/kitchen', 'scans/kitchen')):
        make_folder(tmp_path / folder, scenes=1, frames=3 + i)
        (tmp_path / folder / 'scene0').rename(tmp_path / folder / 'color')
    scenes = find_scenes(str(tmp_path)).scenes
    assert sorted(map(len, scenes.values())) == [3, 4, 5]


def test_what_is_on_both_lists_is_held_out(tmp_path, capsys):
    root = make_scannet(tmp_path / 'data')
    (root / 'scannetv2_train.txt').write_bytes(b'\xef\xbb\xbfscene0000_00 scene0001_00 \xff')
    train, val = [PhotoFolder(str(root), split, 0, 28, 14, 4) for split in ('train', 'val')]
    assert len(train.scenes) == len(val.scenes) == 1
    assert 'scene0001_00' in val.scenes[0][0] and 'scene0000_00' in train.scenes[0][0]
    assert 'on both lists, and held out: scene0001_00 (1 in all)' in capsys.readouterr().out


@pytest.mark.parametrize('split, held_out', [('train', 1), ('val', 1)])
def test_one_list_is_enough(tmp_path, split, held_out):
    root = make_scannet(tmp_path / 'data')
    (root / f'scannetv2_{split}.txt').unlink()              # the other list is left
    train, val = [PhotoFolder(str(root), part, 0, 28, 14, 4) for part in ('train', 'val')]
    assert len(val.scenes) == held_out
    assert len(train.scenes) == (2 if split == 'train' else 1)
    assert not set(sum(train.scenes, [])) & set(sum(val.scenes, []))
    assert f'no list of the {"training" if split == "train" else "val"} scenes' in check(str(root))


def test_more_that_is_not_passed_over_silently(tmp_path):
    for i in range(3):
        picture(tmp_path / 'a' / f'{i}.jpg')
        picture(tmp_path / 'a' / 'images' / f'{i}.jpg')
    (tmp_path / 'a' / 'images' / 'x.DNG').touch()
    (tmp_path / 'a' / 'gone.jpg').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'a' / 'itself.jpg').symlink_to('itself.jpg')
    (tmp_path / 'a' / 'film.mp4').touch()
    picture(tmp_path / 'b' / '1.jpg')
    picture(tmp_path / 'b' / 'depth of field.jpg')
    picture(tmp_path / '1' / '2' / '3' / '4' / '5' / '6' / '7' / '8' / '1.jpg')
    assert find_scenes(str(tmp_path)).unused == {
        'pictures': 3, '.dng': 1, 'broken links': 2, '.mp4': 1,
        'pictures named depth, mask, ...': 1, 'folders more than 6 deep': 1}


def test_sizes_are_as_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / 'a.jpg', size=(80, 60), exif=exif)
    assert 'sizes: 60 x 80 (1 of' in check(str(tmp_path))


def test_scannet_without_lists(tmp_path):
    report = check(str(make_scannet(tmp_path / 'data', lists=False)))
    assert 'no list of the training scenes' in report


def test_scannetpp(tmp_path):
    root = tmp_path / 'pp'
    for scene in ('0a7cc12c0e', '1ada7a0617', 'ffffffffff'):
        dslr = root / 'data' / scene / 'dslr'
        for i in range(5):
            picture(dslr / 'undistorted_images' / f'DSC{i + 1:05d}.JPG', size=(64, 48))
        (dslr / 'resized_images').mkdir()
    (root / 'splits').mkdir()
    (root / 'splits' / 'nvs_sem_train.txt').write_text('0a7cc12c0e\n')
    (root / 'splits' / 'nvs_sem_val.txt').write_text('1ada7a0617\n')
    assert find_scenes(str(root)).layout == 'ScanNet++'
    train, val = [PhotoFolder(str(root), split, 0, 28, 14, 4) for split in ('train', 'val')]
    assert len(train.scenes) == len(val.scenes) == 1
    assert '0a7cc12c0e' in train.scenes[0][0] and '1ada7a0617' in val.scenes[0][0]
    assert 'on no list, not used: 1 scenes (ffffffffff)' in check(str(root))


def test_nothing_of_ours_is_written_into_their_folder(tmp_path):
    root = make_scannet(tmp_path / 'data', lists=False)
    videos = tmp_path / 'videos'
    make_video(videos / 'walk.mp4')
    make_video(videos / 'other.mp4')
    before = sorted(path for folder in (root, videos) for path in folder.rglob('*'))
    for folder in (root, videos):
        check(str(folder))
        PhotoFolder(str(folder), 'train', 0, 28, 14, 4).batch(0, 1, 4)
    assert sorted(path for folder in (root, videos) for path in folder.rglob('*')) == before
    assert len(list((tmp_path / 'frames').iterdir())) == 2  # of two videos, once each


def test_new_pictures_are_found(tmp_path):
    root = make_scannet(tmp_path / 'data', lists=False)
    assert len(find_scenes(str(root)).scenes['scene0000_00']) == 12
    picture(root / 'scans' / 'scene0000_00' / 'color' / '12.jpg')
    assert len(find_scenes(str(root)).scenes['scene0000_00']) == 13


def test_broken_pictures_are_reported(tmp_path):
    root = make_scannet(tmp_path / 'data', lists=False)
    (root / 'scans' / 'scene0000_00' / 'color' / '0.jpg').write_bytes(b'no picture')
    assert 'unreadable: 1 of' in check(str(root))


def test_check_prints_the_report(tmp_path, capsys):
    data.main(['check', str(make_folder(tmp_path / 'photos'))])
    said = capsys.readouterr().out
    assert 'layout folders, 3 scenes, 18 pictures (6 to 6 a scene, median 6)' in said
    assert 'sizes: 80 x 60 (18 of those looked at)' in said and 'unreadable: 0 of 18' in said


@pytest.mark.parametrize('name', ['a.jpg', 'a.tif', 'a.png'])
def test_sizes_are_those_of_upright_pictures(tmp_path, name):
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (40, 20)).save(tmp_path / name, exif=exif)
    path = str(tmp_path / name)
    assert data.shown_size(path) == data.open_picture(path).size == (20, 40)


# -----------------------------------------------------------------------------
# videos

def test_videos(tmp_path):
    path = str(make_video(tmp_path / 'v' / 'walk.mp4'))
    frames = list(read_video(path, 5))
    first, last = frames[0].getpixel((30, 20))[0], frames[-1].getpixel((30, 20))[0]
    assert len(frames) == 5 and first < 20 < 200 < last
    make_video(tmp_path / 'v' / 'other.mp4')
    found = find_scenes(str(tmp_path / 'v'))
    assert found.layout == 'videos'
    # two seconds, two a second
    assert [len(pictures) for pictures in found.scenes.values()] == [4, 4]
    photos = PhotoFolder(str(tmp_path / 'v'), 'train', 0, 28, 14, 4)
    assert photos.batch(0, 1, 4)['images'].shape == (1, 4, 3, 14, 28)


def test_a_broken_video_is_left_out_by_name(tmp_path, capsys):
    for name in ('a.mp4', 'c.mp4'):
        make_video(tmp_path / name)
    (tmp_path / 'b.mp4').write_bytes(b'no video')
    assert list(find_scenes(str(tmp_path)).scenes) == ['a.mp4', 'c.mp4']
    assert f'{tmp_path}/b.mp4 cannot be read as a video' in capsys.readouterr().out


def test_one_film_is_a_data_set(tmp_path, capsys):
    path = str(make_video(tmp_path / 'film.MP4', frames=80))
    found = find_scenes(path)
    assert found.layout == 'videos' and len(found.scenes['film.MP4']) == 16
    assert capsys.readouterr().out == ''
    train, val = [PhotoFolder(path, split, 0, 28, 14, 4) for split in ('train', 'val')]
    assert (len(train.scenes[0]), len(val.scenes[0])) == (12, 4)
    assert 'layout videos, 1 scenes, 16 pictures' in check(path)
    for name, fault in (('a.jpg', 'is no video'), ('b.mp4', 'cannot be read as a video')):
        (tmp_path / name).write_bytes(b'no film')
        with pytest.raises(InputError, match=fault):
            PhotoFolder(str(tmp_path / name), 'train', 0, 28, 14, 4)
