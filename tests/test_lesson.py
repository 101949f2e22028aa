"""The lesson, from its first cell to its last, with few steps."""
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_lesson_runs_and_leaves_its_pictures(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / 'lesson.py'), '2'], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for step in range(1, 9):
        assert f'\n{step}. ' in f'\n{done.stdout}'
    for name in ('1-pictures', '2-features', '8-unseen', '8-unseen-shipped'):
        picture = Image.open(tmp_path / 'out' / 'lesson' / f'{name}.png')
        assert len(picture.getcolors(1 << 24)) > 100


def test_the_lesson_imports_the_method_and_the_rooms_alone():
    lines = (ROOT / 'lesson.py').read_text().splitlines()
    modules = {line.split()[1] for line in lines if line.startswith('from ')}
    assert modules <= {'optim', 'model', 'vggt', 'psfm', 'rooms', 'PIL', 'types'}
    assert len(lines) <= 200
    exercises = [line for line in lines if line.startswith('# ') and line[2:4] in
                 ('1.', '2.', '3.', '4.', '5.')]
    assert len(exercises) == 5
