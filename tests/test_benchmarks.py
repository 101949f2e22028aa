"""Equality with the official scorers (tests/scoring/cases.json: what they gave on invented
documents), and miniatures of the four benchmarks, in exactly their files, from file to table."""
import io
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
import media
from adapter import SpatialVLM, save_spatial_vlm
from benchmarks import (BENCHMARKS, aggregate, open_media, prompt, read_answers, read_benchmark,
                        relative_accuracy, results_table, score)
from common import InputError
from media import read_video
from mini_vlm import build_tokenizer, build_vlm, save_mini_vlm
from probe import Sight
from records import mend_last_line
from test_data import make_video, picture

CASES = json.loads(Path(os.environ.get(
    'SCORING', Path(__file__).parent / 'scoring' / 'cases.json')).read_text())


# -----------------------------------------------------------------------------
# prompts, scores, averages

def pairs(items):
    return [(item['doc'], item['score']) for item in items]


def approx(value):
    return pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize('name', BENCHMARKS)
def test_scores(name):
    for case in CASES[name]['cases']:
        raises = isinstance(case['score'], dict)  # where the official code raises: 0
        expected = 0.0 if raises else case['score']
        assert score(name, case['doc'], case['output']) == pytest.approx(expected, abs=1e-12), case


@pytest.mark.parametrize('name', BENCHMARKS)
def test_prompts(name):
    official = dict(cvbench='cv.lmms', viewspatial='vs.official').get(name)
    cases = [case for case in CASES[name]['prompts'] if case.get('scorer') in (None, official)]
    assert cases
    for case in cases:
        assert prompt(name, case['doc']) == case['prompt']


def test_vsibench_aggregates():
    for case in CASES['vsibench']['aggregates']:
        ours = aggregate('vsibench', pairs(case['items']))
        theirs = case['results']['vsi.thinking_in_space']
        if 'raises' in theirs:
            # a level of relative direction is missing: ours averages those present
            tasks = [value for name, value in ours.items() if name != 'overall']
            assert ours['overall'] == approx(sum(tasks) / len(tasks))
            continue
        for name, value in theirs.items():
            plain = name.split('_MRA')[0].removesuffix('_accuracy')
            is_ours = name.endswith('_accuracy') or ':' in name or name == 'overall'
            if is_ours and plain in ours:  # theirs leaves levels as tasks where one is missing
                assert ours[plain] == approx(value), (case['id'], name)


def test_cvbench_aggregates():
    for case in CASES['cvbench']['aggregates']:
        ours, theirs = aggregate('cvbench', pairs(case['items'])), case['results']
        assert ours['plain'] == approx(100 * theirs['cv.lmms.cv_bench_aggregate_results'])
        card = theirs['cv.lmms.cv_bench_default_aggregate_results']
        if not isinstance(card, dict):
            assert ours['overall'] == approx(100 * card)


def test_sparbench_aggregates():
    for case in CASES['sparbench']['aggregates']:
        ours = aggregate('sparbench', pairs(case['items']))
        theirs = case['results']['spar.official'].get('logged', {})
        for name, value in theirs.items():
            plain = name.split('_MRA')[0].removesuffix('_accuracy').removesuffix('_vci_metric')
            if plain in ours and isinstance(value, float):
                assert ours[plain] == approx(100 * value), (case['id'], name)
        tasks = 'position_matching', 'camera_motion_infer', 'view_change_infer'
        medium = [ours[task] for task in tasks if task in ours]
        assert not medium or ours['Medium'] == approx(sum(medium) / len(medium))  # as published


def test_viewspatial_aggregates():
    for case in CASES['viewspatial']['aggregates']:
        ours = aggregate('viewspatial', pairs(case['items']))
        theirs = case['results']['vs.official']
        for name, counts in {**theirs['per_type'], 'overall': theirs['overall']}.items():
            assert ours[name] == approx(100 * counts['correct'] / counts['total'])


def test_corrections():
    doc = dict(task='spatial_imagination_oo', answer='A')
    assert score('sparbench', doc, '') == 1
    assert score('sparbench', doc, '', corrected=True) == 0
    doc = dict(answer='C. front')
    assert score('viewspatial', doc, 'C\n') == 0
    assert score('viewspatial', doc, 'C\n', corrected=True) == 1


def test_the_table_shows_both_scores_where_they_differ():
    docs = [dict(key=str(i), task='spatial_imagination_oo', answer='A') for i in range(2)]
    published = dict(columns=dict(overall='avg', Low='low'), rows=[['GPT', 'theirs', [33.4]]])
    table = results_table('sparbench', docs, {'0': '', '1': 'B'}, published)
    assert 'SPAR-Bench, 2 questions' in table
    assert table.count('50.00  (corrected scorer: 0.00)') == 3  # of the task, its level, and all
    assert f'{"GPT":24s}{"theirs":16s}     33.40         -' in table
    assert f'{"this run":24s}{"measured":16s}     50.00         -' in table


def test_relative_accuracy_at_its_thresholds():
    # gold 5, answer 4: an error of 0.2 misses its own threshold in floating point
    errors = 0.0, 0.2, 0.25, 0.5, 0.51
    assert [relative_accuracy(error) for error in errors] == [1.0, 0.6, 0.6, 0.1, 0.0]


def test_unknown_types_score_nothing():
    assert score('vsibench', dict(question_type='a new type', ground_truth='B'), 'B') == 0
    assert score('sparbench', dict(task='a new task', answer='B'), 'B') == 0


def test_movements_are_case_sensitive_officially():
    doc = dict(task='view_change_infer', answer='move_right:0.5,rotate_up:20')
    assert score('sparbench', doc, 'move_right:0.5,rotate_up:20') == 1
    assert score('sparbench', doc, 'Move_Right:0.5,Rotate_Up:20') < 1
    assert score('sparbench', doc, 'move_right:0.5, rotate_up:20') < 1
    assert score('sparbench', doc, 'Move_Right:0.5, rotate_up:20', corrected=True) == 1


@pytest.mark.parametrize('output', [
    '<think>A or B? A table is near.</think>C', '<answer>C</answer>', '**C**', r'\boxed{C}',
    r'<think>x\ny</think><answer>\boxed{\text{C}}</answer>'])
@pytest.mark.parametrize('name, doc', [
    ('vsibench', dict(question_type='route_planning', ground_truth='C')),
    ('cvbench', dict(answer='(C)')),
    ('sparbench', dict(task='spatial_imagination_oo', answer='C')),
    ('viewspatial', dict(answer='C. front'))])
def test_wrapped_answers_count_when_corrected(name, doc, output):
    assert score(name, doc, output, corrected=True) == 1


def test_an_article_is_no_option():
    doc = dict(answer='A. front')
    assert score('viewspatial', doc, 'it is a chair') == 1  # officially
    assert score('viewspatial', doc, 'it is a chair', corrected=True) == 0
    right = dict(doc, answer='B. left')
    for said in ("I'd say B", 'the answer is a B', 'Option b, a chair', '(b)'):
        assert score('viewspatial', right, said, corrected=True) == 1
    assert score('viewspatial', doc, 'a', corrected=True) == 1


def test_a_last_answer_that_was_cut_off_is_passed_over(tmp_path):
    path = tmp_path / 'answers.jsonl'
    path.write_text('{"key": 1, "output": "A"}\n{"id": "two", "output": 3}\n{"key": 3, "out')
    assert read_answers(str(path)) == {'1': 'A', 'two': '3'}
    for record in ('{"key": 1}', '{"key": 1, "output": null}', '{"key": 1, "output": ["A"]}', '5'):
        path.write_text(record + '\n')
        with pytest.raises(InputError, match='record 1: an answer has "key" .* and "output", a te'):
            read_answers(str(path))
    path.write_text('{"key": 1.0, "output": 2.5}\n')  # as pandas writes numbers
    assert read_answers(str(path)) == {'1': '2.5'}


@pytest.mark.parametrize('last, kept', [
    ('', 1), ('{"key": "2", "outp', 1), ('{"key": "2", "output": "B"}', 2), ('\0\0\0', 1),
])
def test_a_file_of_answers_is_continued_again_and_again(last, kept, tmp_path):
    path = tmp_path / 'answers.jsonl'
    path.write_text('{"key": "1", "output": "A"}\n' + last)
    for _ in range(2):
        mend_last_line(str(path))
        assert len(read_answers(str(path))) == kept
        assert path.read_text().count('\n') == kept and path.read_text().endswith('\n')


def test_broken_lines_and_second_answers_are_named(tmp_path):
    path = tmp_path / 'answers.jsonl'
    path.write_text('\ufeff{"key": 1, "output": "A"}\n', encoding='utf-8')
    assert read_answers(str(path)) == {'1': 'A'}  # a byte-order mark is no fault
    path.write_text('{"key": 1, "out\n{"key": 2, "output": "A"}\n')
    with pytest.raises(InputError, match='line 1: not JSON'):
        read_answers(str(path))
    path.write_text('{"key": 1, "output": "A"}\n{"key": 1, "output": "B"}\n')
    with pytest.raises(InputError, match='line 2: a second, other answer to 1'):
        read_answers(str(path))


def test_two_questions_with_one_id_are_two_questions(tmp_path):
    doc = dict(id=7, dataset='x', scene_name='y', question_type='route_planning', question='q',
               options=['A. x'], ground_truth='A')
    other = dict(doc, question='another')
    lines = [json.dumps(x) + '\n' for x in (doc, other, other)]
    (tmp_path / 'test.jsonl').write_text(''.join(lines))
    docs = read_benchmark('vsibench', str(tmp_path))
    assert [x['key'] for x in docs] == ['7', '7 (2)', '7 (3)']
    assert [x['question'] for x in docs] == ['q', 'another', 'another']


# -----------------------------------------------------------------------------
# from files to the table

def png(i):
    file = io.BytesIO()
    Image.new('RGB', (64, 48), (40 * i, 0, 99)).save(file, 'PNG')
    return dict(bytes=file.getvalue(), path=None)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def make_vsibench(root):
    questions = [('object_counting', None, '3'),
                 ('object_rel_distance', ['A. bed', 'B. tv'], 'B'),
                 ('route_planning', ['A. x', 'B. y'], 'A')]
    docs = [dict(id=i, dataset='scannet', scene_name=f'scene{i % 2:04d}_00', question_type=kind,
                 question='Which?', options=options, ground_truth=truth, pruned=False)
            for i, (kind, options, truth) in enumerate(questions)]
    root.mkdir()
    (root / 'test.jsonl').write_text('\n'.join(map(json.dumps, docs)))
    for scene in (0, 1):
        make_video(root / 'scannet' / f'scene{scene:04d}_00.mp4', 6)


def make_cvbench(root):
    questions = [('2D', 'Count', 'ADE20K'), ('2D', 'Relation', 'COCO'), ('3D', 'Depth', 'Omni3D')]
    text = 'Which? Select from the following choices.\n(A) 1\n(B) 2'
    rows = [dict(idx=i, type=kind, task=task, image=png(i), question='Which?', choices=['1', '2'],
                 answer='(A)', prompt=text, filename='', source=source)
            for i, (kind, task, source) in enumerate(questions)]
    write_parquet(root / 'test.parquet', rows)


def make_sparbench(root):
    questions = [('distance_prediction_oo_mv', '2.4'), ('view_change_infer', 'move_right:0.3'),
                 ('spatial_imagination_oo', 'C')]
    rows = [dict(id=i, img_type='multi_view', format_type='fill', task=task, source='scannet',
                 image=[png(j) for j in range(3)], question='How far?', answer=answer)
            for i, (task, answer) in enumerate(questions)]
    write_parquet(root / 'data' / 'test-00000-of-00001.parquet', rows)


def make_viewspatial(root):
    folder = 'scannetv2_val/s/original_images'
    kinds = [('Camera perspective - Relative Direction', 1),
             ('Person perspective - Scene Simulation Relative Direction', 2)]
    docs = [dict(question_type=kind, question='Where?', choices='A. front\nB. back',
                 answer='B. back',
                 image_path=[f'ViewSpatial-Bench/{folder}/{i}.jpg' for i in range(count)])
            for kind, count in kinds]
    for i in range(2):
        picture(root / folder / f'{i}.jpg', size=(64, 48))
    (root / 'ViewSpatial-Bench.json').write_text(json.dumps(docs))


MAKE = dict(vsibench=make_vsibench, cvbench=make_cvbench, sparbench=make_sparbench,
            viewspatial=make_viewspatial)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A fine-tuned VLM, as small as can be."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('run')
    vlm, chat = build_vlm(build_tokenizer(['A B C D'], ['table']), width=64, depth=1)
    save_mini_vlm(vlm, chat, Sight(64), str(folder / 'mini'))
    settings = dict(vlm=str(folder / 'mini'), latents='none', encoder='', num_frames=4,
                    max_pixels=64 * 64)
    save_spatial_vlm(SpatialVLM(vlm), chat, str(folder / 'checkpoint'), settings, with_vlm=False)
    return str(folder)


def command_of(name, run, folder):
    return [name, '--data', str(folder / 'bench'), '--run', run, '--out', str(folder), '--frames',
            '2', '--device', 'cpu', '--max-pixels', '4096']


@pytest.mark.parametrize('name', list(MAKE))
def test_from_files_to_table(name, run, tmp_path, capsys):
    MAKE[name](tmp_path / 'bench')
    docs = read_benchmark(name, str(tmp_path / 'bench'))
    command = [*command_of(name, run, tmp_path), '--batch', '2']
    evaluation.main([*command, '--limit', '1'])
    evaluation.main(command)  # goes on behind the first
    shown = capsys.readouterr().out
    assert f'{len(docs) - 1} questions to ask, 1 answered before' in shown
    assert f'{BENCHMARKS[name].title}, {len(docs)} questions' in shown
    assert 'Spa3-VLM-4B' in shown
    path, = tmp_path.glob(f'{name}-*.jsonl')
    answers = [json.loads(line)['key'] for line in path.read_text().splitlines()]
    assert sorted(answers) == sorted(doc['key'] for doc in docs)

    # somebody else's answers, without any model: all right
    right = 'ground_truth' if name == 'vsibench' else 'answer'
    gold = [json.dumps(dict(key=doc['key'], output=doc[right])) for doc in docs]
    (tmp_path / 'gold.jsonl').write_text('\n'.join(gold))
    evaluation.main([*command, '--predictions', str(tmp_path / 'gold.jsonl')])
    assert f'{"this run":24s}{"measured":16s}    100.00' in capsys.readouterr().out


def test_every_picture_of_a_question_is_fed(tmp_path):
    make_sparbench(tmp_path / 'bench')
    doc = read_benchmark('sparbench', str(tmp_path / 'bench'))[0]
    assert len(open_media(doc['media'], 32)) == 3


def test_a_video_is_decoded_once_for_all_its_questions(run, tmp_path, monkeypatch):
    make_vsibench(tmp_path / 'bench')
    paths = []
    monkeypatch.setattr(media, 'read_video',
                        lambda path, count: paths.append(path) or read_video(path, count))
    evaluation.main([*command_of('vsibench', run, tmp_path), '--batch', '1'])
    assert [Path(path).stem for path in paths] == ['scene0000_00', 'scene0001_00']
    assert len(list((tmp_path).rglob('*.jsonl'))) == 2


def test_questions_without_their_pictures_are_left_out(run, tmp_path, capsys):
    make_vsibench(tmp_path / 'bench')
    videos = tmp_path / 'bench' / 'scannet'
    command = command_of('vsibench', run, tmp_path)
    (videos / 'scene0001_00.mp4').unlink()
    evaluation.main(command)
    assert '1 of 3 questions are left out' in capsys.readouterr().out
    with pytest.raises(InputError, match='--tasks nothing: vsibench has'):
        evaluation.main([*command, '--tasks', 'nothing'])
    with pytest.raises(InputError, match='--subset pruned: none of the questions is in it'):
        evaluation.main([*command, '--subset', 'pruned'])
    path = tmp_path / 'bench' / 'test.jsonl'
    whole = path.read_text()
    path.write_text(whole.replace('"pruned"', '"first release"'))
    with pytest.raises(InputError, match='--subset pruned: these files are older'):
        evaluation.main([*command, '--subset', 'pruned'])
    path.write_text(whole.replace('"pruned": false', '"pruned": true', 1))
    for subset, count in (('full', 2), ('debiased', 1), ('pruned', 1)):
        evaluation.main([*command, '--subset', subset])
        assert f'VSI-Bench, {count} questions' in capsys.readouterr().out
    path.write_text(whole.replace(', "pruned": false', ''))  # the hub's: a file of ids beside
    assert '"pruned"' not in path.read_text()
    (tmp_path / 'bench' / 'pruned_ids.txt').write_bytes('\ufeff2\n'.encode() + b'\xff\n')
    for subset, count in (('debiased', 1), ('pruned', 1)):
        evaluation.main([*command, '--subset', subset])
        assert f'VSI-Bench, {count} questions' in capsys.readouterr().out
    (videos / 'scene0000_00.mp4').unlink()
    with pytest.raises(InputError, match='none of the 3 questions has its pictures'):
        evaluation.main(command)
    (tmp_path / 'bench' / 'scannet.zip').write_bytes(b'')
    with pytest.raises(InputError, match='unpack them there'):
        evaluation.main(command)


def test_questions_that_cannot_be_scored_or_seen(run, tmp_path):
    def rows(**changes):
        row = dict(idx=1, type='2D', task='Count', source='COCO', image=png(0), question='Which?',
                   choices=['1', '2'], answer='(A)', prompt='Which?', filename='')
        write_parquet(tmp_path / 'cv[1]' / 'test.parquet', [dict(row, **changes)])
        return read_benchmark('cvbench', str(tmp_path / 'cv[1]'))

    assert len(rows()) == 1                                 # a folder's name is no pattern
    assert len(rows(filename=None)) == 1                    # the picture itself is there
    for changes in (dict(source='foo'), dict(task=5), dict(image=dict(bytes=None, path=None))):
        with pytest.raises(InputError, match='question 0 of cvbench is unusable'):
            rows(**changes)
    path = tmp_path / 'ViewSpatial-Bench.json'
    for content, fault in (([], 'there are no questions'), (None, 'it has no pictures')):
        doc = dict(question_type='x', question='?', choices='A. 1', answer='A. 1',
                   image_path=content)
        path.write_text(json.dumps([doc] if content is None else content))
        with pytest.raises(InputError, match=fault):
            read_benchmark('viewspatial', str(tmp_path))


def test_faults_of_benchmarks(run, tmp_path):
    with pytest.raises(InputError, match='no folder nowhere'):
        evaluation.main(['vsibench', '--data', 'nowhere', '--run', run])
    write_parquet(tmp_path / 'wrong' / 'test.parquet', [dict(idx=1, text='x')])
    with pytest.raises(InputError, match='has no task nor source'):
        read_benchmark('cvbench', str(tmp_path / 'wrong'))
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'test.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(InputError, match='cannot be read as parquet'):
        read_benchmark('cvbench', str(tmp_path / 'broken'))
