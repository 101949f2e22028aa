"""README.md and RESULTS.md name commands, files and code that exist."""
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import ablate
import bench
import data
import eval as evaluation
import finetune
import mini_vggt
import mini_vlm
import page
import train
from common import InputError, parse_options, read_json, read_weights

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob('*.py'))
PAGES = {name: (ROOT / name).read_text() for name in ('README.md', 'RESULTS.md')}


# -----------------------------------------------------------------------------
# commands

def commands_of(text):
    """-> the commands of a page: in blocks of code and within sentences, each a list of words"""
    lines = [line for block in re.findall(r'```bash\n(.*?)```', text, re.S)
             for line in block.splitlines()]
    lines += re.findall(r'`((?:python|torchrun) [^`\n]*)`', text)
    commands = [shlex.split(command, comments=True)
                for line in lines for command in line.split('&&')]
    return [command for command in commands if command]


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands_of(text)]
COMMANDS += [(name, shlex.split(line.rstrip('. '), comments=True)) for name in SCRIPTS
             for line in re.findall(r'^ {4}((?:python|torchrun) .*)$',
                                    (ROOT / name).read_text().split('"""')[1], re.M)]


class Understood(Exception):
    """Every option exists and has a value that is allowed."""


def parse(script, arguments, monkeypatch):
    """Reads the options as the script does, and runs nothing."""
    def stop(*_):
        raise Understood

    if script in ('train.py', 'finetune.py'):
        dict(train=train, finetune=finetune)[script[:-3]].parse_config(arguments)
    elif script in ('mini_vggt.py', 'mini_vlm.py'):
        Config = dict(mini_vggt=mini_vggt, mini_vlm=mini_vlm)[script[:-3]].Config
        parse_options(arguments, '', Config, {'mini': {}}, default='mini')
    elif script == 'eval.py':
        evaluation.make_parser().parse_args(arguments)
    elif script == 'ablate.py':
        args, options = ablate.make_parser().parse_known_args(arguments)
        if args.command in ('field', 'scaling', 'vlm'):
            of = finetune if args.command == 'vlm' else train
            of.parse_config(['--config', args.config, *options])
        else:
            assert options == []
    elif script in ('bench.py', 'data.py'):
        monkeypatch.setattr(bench, 'pick_device', stop)
        monkeypatch.setattr(bench, 'predict', stop)
        monkeypatch.setattr(bench, 'growth', stop)
        monkeypatch.setattr(data, 'check', stop)
        with pytest.raises(Understood):
            dict(bench=bench, data=data)[script[:-3]].main(arguments)
    elif script == 'page.py':
        page.make_parser().parse_args(arguments)
    elif script == 'lesson.py':
        assert all(word.isdigit() for word in arguments)  # the number of steps
    else:
        assert script == 'rooms.py' and arguments == []


@pytest.mark.parametrize('page,command', COMMANDS, ids=[' '.join(c) for _, c in COMMANDS])
def test_a_command_is_understood(page, command, monkeypatch):
    scripts = [word for word in command if word in SCRIPTS]
    if command[0] in ('python', 'torchrun') and '-m' not in command:
        assert len(scripts) == 1
    for script in scripts:
        parse(script, command[command.index(script) + 1:], monkeypatch)
    if 'pytest' in command or 'pip' in command:
        for word in command:
            assert not word.endswith(('.py', '.txt')) or (ROOT / word).is_file()


def test_shipped_weights_say_by_which_command_they_were_made():
    made_by = [read_weights(ROOT / 'weights' / name)[1]['command']
               for name in ('mini_vggt.safetensors', 'psfm_small.safetensors')]
    made_by.append(read_json(ROOT / 'weights' / 'mini_vlm' / 'config.json')['made_by'])
    for command in made_by:
        assert ('RESULTS.md', command.split()) in COMMANDS


def test_latents_come_out_as_the_first_block_of_python_says():
    code, = [block.split('```')[0] for block in PAGES['README.md'].split('```python')
             if "load_psfm('out/small')" in block]
    found = dict(images=torch.rand(1, 2, 3, 64, 64))
    exec(code.replace("'out/small'", repr(evaluation.SHIPPED)), found)
    assert found['z'].shape == (1, found['config'].num_latents, found['config'].width)


def test_there_are_commands_to_check():
    pages = [page for page, _ in COMMANDS]
    assert pages.count('README.md') > 8 and pages.count('RESULTS.md') > 8
    for script in ('train.py', 'finetune.py', 'eval.py', 'bench.py', 'data.py', 'mini_vlm.py'):
        assert any(script in command for page, command in COMMANDS), script


@pytest.mark.parametrize('command', [
    'python train.py --confg small', 'python train.py --config smal', 'python train.py --steps 0',
    'python finetune.py --encoder', 'python eval.py fields', 'python ablate.py vlm --arm psfm',
    'python bench.py --view 8', 'python data.py chek photos/', 'python mini_vlm.py --batch 0',
    'python rooms.py 3', 'python nowhere.py'])
def test_a_wrong_command_would_be_noticed(command, monkeypatch, capsys):
    with pytest.raises((InputError, AssertionError, SystemExit)):
        test_a_command_is_understood('README.md', command.split(), monkeypatch)


def test_the_check_on_a_bare_machine_runs_lines_of_the_readme():
    lines = re.findall(r"^run '([^']+)'", (ROOT / '.ci' / 'run').read_text(), re.M)
    assert len(lines) >= 2 and set(lines) <= set(PAGES['README.md'].splitlines())


# -----------------------------------------------------------------------------
# files and code

def test_readme_names_every_file_and_stays_short():
    assert len(PAGES['README.md'].splitlines()) <= 260
    for name in SCRIPTS:
        assert f'`{name}`' in PAGES['README.md'], name


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r'\]\(([^)\s]+)\)', PAGES[page])
    assert links
    for link in links:
        if not link.startswith(('http', '#')):
            assert (ROOT / link).exists(), link
    named = re.findall(r'`((?:tests|assets|weights|\.ci)/[\w./]*)`', PAGES[page])
    for path in named:
        assert (ROOT / path).exists(), path


def test_options_that_are_named_exist():
    known = {'--config'}
    for name in ('eval.py', 'bench.py'):
        known |= set(re.findall(r"'(--[a-z-]+)'", (ROOT / name).read_text()))
    for module in (train, finetune, mini_vggt, mini_vlm):
        for field in dataclasses.fields(module.Config):
            option = field.name.replace('_', '-')
            known |= {f'--{option}', f'--no-{option}'} if field.type is bool else {f'--{option}'}
    for page, text in PAGES.items():
        named = re.findall(r'`(--[a-z-]+)', text)
        assert named and set(named) <= known, (page, set(named) - known)


@pytest.mark.parametrize('page', PAGES)
def test_code_that_is_named_exists(page):
    """`psfm.PSFM.compare` is an attribute of a class of a module of ours."""
    names = re.findall(r'`([a-z_]+)\.([A-Za-z_][\w.]*)(?:\(.*?\))?`', PAGES[page])
    names = [(module, path) for module, path in names
             if f'{module}.py' in SCRIPTS and path not in ('py', 'md', 'html')]
    assert names
    for module, path in names:
        thing = importlib.import_module(module)
        for name in path.split('.'):
            thing = getattr(thing, name, None)
            assert thing is not None, f'{module}.{path}'
