"""What several test files need: a tiny VLM, a tiny PSFM, options of tiny runs."""
import json
from pathlib import Path

import pytest
import torch

from common import run_script
from mini_vlm import Sight, build_tokenizer, build_vlm, save_mini_vlm
from questions import ANSWER_WORDS, RoomQuestions
from rooms import CATEGORIES

WIDTH = 64     # of the tiny VLM
TINY_PSFM = ['--width', '32', '--num-heads', '2', '--encoder-depth', '1', '--decoder-depth', '1',
             '--num-latents', '4', '--num-rooms', '8', '--val-scenes', '4',
             '--images-per-batch', '8', '--steps', '1', '--device', 'cpu', '--dtype', 'float32']


def save_tiny_vlm(folder):
    """A mini VLM of one block that was never trained. -> its folder"""
    torch.manual_seed(0)
    rooms = RoomQuestions('train', 0, 8)
    texts = [turn['value'].replace('<image>', '')
             for i in range(8) for turn in rooms[i]['conversations']]
    texts += [text for pair in rooms.maps for text in pair]
    tokenizer = build_tokenizer(texts * 5, CATEGORIES + ANSWER_WORDS)
    vlm, chat = build_vlm(tokenizer, width=WIDTH, depth=1)
    save_mini_vlm(vlm, chat, Sight(WIDTH), str(folder))
    return str(folder)


def options(vlm, out, *more):
    """Options of finetune.py for a tiny run into `out`/run."""
    return ['--vlm', str(vlm), '--num-rooms', '8', '--val-scenes', '2', '--batch', '2',
            '--steps', '2', '--ground-steps', '1', '--map-steps', '1', '--log-every', '1',
            '--cache', f'{out}/latents', '--out', f'{out}/run', '--device', 'cpu',
            '--dtype', 'float32', *more]


def losses(run):
    """[(step, loss)] from the log of a run."""
    records = map(json.loads, (Path(run) / 'log.jsonl').read_text().splitlines())
    return [(record['step'], record['loss']) for record in records if 'loss' in record]


def refuse(message, main, arguments, capsys):
    """`main` stops with one sentence that holds `message`, and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: main(arguments))
    said = capsys.readouterr().err
    if isinstance(stop.value.code, str):
        said += stop.value.code
    assert stop.value.code not in (0, None)
    assert message in said
    assert len([line for line in said.splitlines() if line.startswith('error: ')]) == 1
