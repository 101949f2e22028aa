"""The rules of the house: which module may know which, and how large all of it may be."""
import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.parent.glob('*.py'))
METHOD = {'model', 'backbone', 'vggt', 'da3', 'psfm', 'adapter', 'chat'}
SCRIPTS = {'train', 'finetune', 'lesson', 'bench', 'eval', 'ablate', 'page'}
MAY_IMPORT = {'eval': {'train', 'finetune'}, 'bench': {'train', 'finetune'},     # of the scripts
              'ablate': {'train', 'finetune', 'eval'}, 'page': {'eval'}}


def imported(text):
    """Names of the modules that a source text imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or '').split('.')[0])
    return names


MODULES = {path.stem for path in FILES}
IMPORTS = {path.stem: imported(path.read_text()) & MODULES for path in FILES}


def test_imports_are_found_wherever_they_are():
    text = 'import a.b, c\nfrom d.e import f\ndef g():\n    if h:\n        from i import j\n'
    assert imported(text) == {'a', 'c', 'd', 'i'}
    assert METHOD | SCRIPTS <= MODULES
    assert 'model' in IMPORTS['vggt'] and 'common' in IMPORTS['train']


def test_no_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**IMPORTS, 'common': {'train'}}).prepare()


@pytest.mark.parametrize('module', sorted(METHOD))
def test_the_method_stands_alone(module):
    assert IMPORTS[module] <= METHOD | {'common'}


@pytest.mark.parametrize('module', sorted(MODULES))
def test_scripts_are_not_imported(module):
    assert IMPORTS[module] & SCRIPTS <= MAY_IMPORT.get(module, set())


def test_there_are_at_most_30_files():
    assert len(FILES) <= 30


def test_help_waits_for_no_compiler():
    """What takes a second or more to import is imported where it is needed."""
    heavy = ('torch._dynamo', 'transformers', 'torch.distributed.checkpoint', 'sympy')
    scripts = ', '.join(sorted(SCRIPTS - {'lesson'}))
    code = f'import sys, {scripts}; print([name for name in {heavy} if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=FILES[0].parent, capture_output=True,
                          text=True)
    assert done.stdout == '[]\n', done.stderr


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize('path', [*FILES, *Path(__file__).parent.glob('*.py')],
                         ids=lambda path: path.name)
def test_no_line_is_long(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []
