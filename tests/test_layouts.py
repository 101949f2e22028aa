"""Miniatures of real data sets, in exactly their layouts: pre-training data, and the four benchmarks from file to table."""
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
from adapter import SpatialVLM, build_tokenizer, mini_vlm, save_mini_vlm, save_spatial_vlm
from data import PhotoFolder, check, find_scenes, read_benchmark, read_video
from model import InputError


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'INDEX', str(tmp_path / 'index'))


def picture(i=0, size=(64, 48)):
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def png(i=0):
    file = io.BytesIO()
    picture(i).save(file, 'PNG')
    return file.getvalue()


def make_scannet(root, scenes=('scene0000_00', 'scene0001_00', 'scene0002_00'), frames=12, lists=True):
    """As SensReader exports it: unpadded names."""
    for scene in scenes:
        for kind in ('color', 'depth', 'pose', 'intrinsic'):
            (root / 'scans' / scene / kind).mkdir(parents=True)
        for i in range(frames):
            picture(i).save(root / 'scans' / scene / 'color' / f'{i}.jpg')
            (root / 'scans' / scene / 'pose' / f'{i}.txt').write_text('1 0 0 0\n')
    if lists:
        (root / 'scannetv2_train.txt').write_text('scene0000_00\nscene0002_00\nscene0009_00\n')
        (root / 'scannetv2_val.txt').write_text('scene0001_00\n')
    return root


def make_video(path, frames=20, size=(64, 48), rate=10):
    av = pytest.importorskip('av')
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mpeg4', rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, 'yuv420p'
        for i in range(frames):
            frame = av.VideoFrame.from_image(Image.new('RGB', size, (12 * i, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def names(pictures):
    return [os.path.basename(path) for path in pictures]


def test_scannet(tmp_path):
    root = make_scannet(tmp_path / 'data')
    layout, scenes, splits = find_scenes(str(root))
    assert layout == 'ScanNet' and names(scenes['scene0000_00']) == [f'{i}.jpg' for i in range(12)]     # 2 before 10
    train, val = [PhotoFolder(str(root), split, 0, 28, 14, 4) for split in ('train', 'val')]
    assert len(train.scenes) == 2 and len(val.scenes) == 1 and 'scene0001_00' in val.scenes[0][0]
    assert not any('scene0001_00' in path for scene in train.scenes for path in scene)                  # never a val scene
    report = check(str(root))
    assert '3 scenes, 36 pictures' in report and 'train list: 3 scenes, 2 of them here; missing: scene0009_00' in report


def test_scannet_without_lists(tmp_path):
    report = check(str(make_scannet(tmp_path / 'data', lists=False)))
    assert 'no list of the training scenes' in report


def test_scannetpp(tmp_path):
    root = tmp_path / 'pp'
    for scene in ('0a7cc12c0e', '1ada7a0617', 'ffffffffff'):
        folder = root / 'data' / scene / 'dslr' / 'undistorted_images'
        folder.mkdir(parents=True)
        (root / 'data' / scene / 'dslr' / 'resized_images').mkdir()
        for i in range(5):
            picture(i).save(folder / f'DSC{i + 1:05d}.JPG')
    (root / 'splits').mkdir()
    (root / 'splits' / 'nvs_sem_train.txt').write_text('0a7cc12c0e\n')
    (root / 'splits' / 'nvs_sem_val.txt').write_text('1ada7a0617\n')
    train, val = [PhotoFolder(str(root), split, 0, 28, 14, 4) for split in ('train', 'val')]
    assert len(train.scenes) == len(val.scenes) == 1 and '0a7cc12c0e' in train.scenes[0][0]
    assert 'on no list, not used: 1 scenes (ffffffffff)' in check(str(root))


def test_index_notices_change(tmp_path):
    root = make_scannet(tmp_path / 'data', lists=False)
    assert len(find_scenes(str(root))[1]['scene0000_00']) == 12
    assert len(list((tmp_path / 'index').iterdir())) == 1
    picture().save(root / 'scans' / 'scene0000_00' / 'color' / '12.jpg')
    os.utime(root / 'scans' / 'scene0000_00' / 'color', ns=(1, 1))
    assert len(find_scenes(str(root))[1]['scene0000_00']) == 13
    assert not [path for path in root.rglob('*') if path.suffix in ('.json', '.pkl')]                   # nothing of ours in their folder


def test_broken_pictures_are_reported(tmp_path):
    root = make_scannet(tmp_path / 'data', lists=False)
    (root / 'scans' / 'scene0000_00' / 'color' / '0.jpg').write_bytes(b'no picture')
    assert 'unreadable: 1 of' in check(str(root))


def test_videos(tmp_path):
    make_video(tmp_path / 'v' / 'walk.mp4')
    frames = read_video(str(tmp_path / 'v' / 'walk.mp4'), 5)
    assert len(frames) == 5 and frames[0].getpixel((30, 20))[0] < 20 < 200 < frames[-1].getpixel((30, 20))[0]     # the first and the last
    make_video(tmp_path / 'v' / 'other.mp4')
    layout, scenes, _ = find_scenes(str(tmp_path / 'v'))
    assert layout == 'videos' and [len(pictures) for pictures in scenes.values()] == [4, 4]              # two seconds, two a second
    source = PhotoFolder(str(tmp_path / 'v'), 'train', 0, 28, 14, 4)
    assert source.batch(0, 1, 4)['images'].shape == (1, 4, 3, 14, 28)


def test_truncated_video(tmp_path):
    path = make_video(tmp_path / 'walk.mp4')
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    with pytest.raises(InputError, match='walk.mp4'):
        read_video(str(path), 5)


# -----------------------------------------------------------------------------
# benchmarks

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A fine-tuned VLM, as small as can be."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('run')
    vlm, chat = mini_vlm(build_tokenizer(['A B C D'], ['table']), width=64, depth=1)
    save_mini_vlm(vlm, chat, str(folder / 'mini.safetensors'), dict(width=64, depth=1))
    settings = dict(vlm=str(folder / 'mini.safetensors'), latents='none', encoder='', num_frames=4, max_pixels=64 * 64)
    save_spatial_vlm(SpatialVLM(vlm), chat, str(folder / 'checkpoint'), settings, with_vlm=False)
    return str(folder)


def make_vsibench(root):
    docs = [dict(id=i, dataset='scannet', scene_name=f'scene{i % 2:04d}_00', question_type=kind, question='Which?', options=options, ground_truth=truth, pruned=False)
            for i, (kind, options, truth) in enumerate([('object_counting', None, '3'), ('object_rel_distance', ['A. bed', 'B. tv'], 'B'), ('route_planning', ['A. x', 'B. y'], 'A')])]
    root.mkdir()
    (root / 'test.jsonl').write_text('\n'.join(map(json.dumps, docs)))
    for scene in (0, 1):
        make_video(root / 'scannet' / f'scene{scene:04d}_00.mp4', 6)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def make_cvbench(root):
    rows = [dict(idx=i, type=kind, task=task, image=dict(bytes=png(i), path=None), question='Which?', choices=['1', '2'], answer='(A)',
                 prompt='Which? Select from the following choices.\n(A) 1\n(B) 2', filename='', source=source)
            for i, (kind, task, source) in enumerate([('2D', 'Count', 'ADE20K'), ('2D', 'Relation', 'COCO'), ('3D', 'Depth', 'Omni3D')])]
    write_parquet(root / 'test.parquet', rows)


def make_sparbench(root):
    rows = [dict(id=i, img_type='multi_view', format_type='fill', task=task, source='scannet', image=[dict(bytes=png(j), path=None) for j in range(3)], question='How far?', answer=answer)
            for i, (task, answer) in enumerate([('distance_prediction_oo_mv', '2.4'), ('view_change_infer', 'move_right:0.3'), ('spatial_imagination_oo', 'C')])]
    write_parquet(root / 'data' / 'test-00000-of-00001.parquet', rows)


def make_viewspatial(root):
    docs = [dict(question_type=kind, image_path=[f'ViewSpatial-Bench/scannetv2_val/s/original_images/{i}.jpg' for i in range(count)], question='Where?', answer='B. back', choices='A. front\nB. back')
            for kind, count in (('Camera perspective - Relative Direction', 1), ('Person perspective - Scene Simulation Relative Direction', 2))]
    (root / 'scannetv2_val' / 's' / 'original_images').mkdir(parents=True)
    for i in range(2):
        picture(i).save(root / 'scannetv2_val' / 's' / 'original_images' / f'{i}.jpg')
    (root / 'ViewSpatial-Bench.json').write_text(json.dumps(docs))


MAKE = dict(vsibench=make_vsibench, cvbench=make_cvbench, sparbench=make_sparbench, viewspatial=make_viewspatial)


@pytest.mark.parametrize('name', list(MAKE))
def test_from_files_to_table(name, run, tmp_path, capsys):
    MAKE[name](tmp_path / 'bench')
    docs = read_benchmark(name, str(tmp_path / 'bench'))
    command = [name, '--data', str(tmp_path / 'bench'), '--run', run, '--out', str(tmp_path), '--frames', '3', '--batch', '2', '--device', 'cpu', '--max-pixels', '4096']
    evaluation.main([*command, '--limit', '1'])
    evaluation.main(command)                                  # goes on behind the first
    shown = capsys.readouterr().out
    assert f'{len(docs) - 1} questions to ask, 1 answered before' in shown and f'{name}, {len(docs)} questions' in shown and 'Spa3-VLM-4B' in shown
    answers = [json.loads(line) for line in open(next(tmp_path.glob(f'{name}-*.jsonl')))]
    assert sorted(answer['key'] for answer in answers) == sorted(doc['key'] for doc in docs)

    # somebody else's answers, without any model: all right
    right = dict(vsibench='ground_truth').get(name, 'answer')
    (tmp_path / 'gold.jsonl').write_text('\n'.join(json.dumps(dict(key=doc['key'], output=doc[right])) for doc in docs))
    evaluation.main([name, '--data', str(tmp_path / 'bench'), '--predictions', str(tmp_path / 'gold.jsonl'), '--device', 'cpu'])
    assert f'{"this run":24s}{"measured":16s}    100.00' in capsys.readouterr().out


def test_every_picture_of_a_question_is_fed(run, tmp_path):
    make_sparbench(tmp_path / 'bench')
    doc = read_benchmark('sparbench', str(tmp_path / 'bench'))[0]
    assert len(data.open_media(doc['media'], 32)) == 3


def test_faults_of_benchmarks(run, tmp_path, capsys):
    make_vsibench(tmp_path / 'bench')
    command = ['vsibench', '--data', str(tmp_path / 'bench'), '--run', run, '--out', str(tmp_path), '--frames', '2', '--device', 'cpu', '--max-pixels', '4096']
    (tmp_path / 'bench' / 'scannet' / 'scene0001_00.mp4').unlink()
    evaluation.main(command)
    assert '1 of 3 questions are left out' in capsys.readouterr().out
    with pytest.raises(InputError, match='--tasks nothing: vsibench has'):
        evaluation.main([*command, '--tasks', 'nothing'])
    (tmp_path / 'bench' / 'scannet' / 'scene0000_00.mp4').unlink()
    with pytest.raises(InputError, match='none of the 3 questions has its pictures'):
        evaluation.main(command)
    (tmp_path / 'bench' / 'scannet.zip').write_bytes(b'')
    with pytest.raises(InputError, match='unpack them there'):
        evaluation.main(command)
    with pytest.raises(InputError, match='no folder nowhere'):
        evaluation.main(['vsibench', '--data', 'nowhere', '--run', run])
    write_parquet(tmp_path / 'wrong' / 'test.parquet', [dict(idx=1, text='x')])
    with pytest.raises(InputError, match='has no task nor source'):
        read_benchmark('cvbench', str(tmp_path / 'wrong'))
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'test.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(InputError, match='cannot be read as parquet'):
        read_benchmark('cvbench', str(tmp_path / 'broken'))
    assert evaluation.score('vsibench', dict(question_type='a new type', ground_truth='B'), 'B') == 1          # unknown types count as letters
