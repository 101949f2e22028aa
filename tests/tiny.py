"""What several test files need: tiny models, options of tiny runs, pictures, videos, records."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import run_script
from mini_vlm import build_tokenizer, build_vlm, save_mini_vlm
from probe import Sight
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


def picture(path, size=(80, 60), mode='RGB', value=None, **options):
    noise = np.random.RandomState(len(str(path)))
    pixels = noise.randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels if value is None else np.full_like(pixels, value))
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 200)
    elif mode != 'RGB':
        image = image.convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def make_video(path, frames=20, size=(64, 48), rate=10, draw=None, prepare=None, codec='mpeg4'):
    """Ten frames a second, from black to red, or what `draw` makes of a number. `prepare` may
    set what it likes of the stream."""
    av = pytest.importorskip('av')
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, 'yuv420p'
        if prepare:
            prepare(stream)
        for i in range(frames):
            image = draw(i) if draw else Image.new('RGB', size, (12 * i, 0, 0))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    return path


def names_of(paths):
    return [os.path.basename(path) for path in paths]


def turns(*pairs):
    return [{'from': who, 'value': text} for who, text in pairs]


GOOD = dict(image='a.png', conversations=turns(('human', '<image>\nWhat is it?'), ('gpt', 'red')))


def write(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path = folder / 'data.jsonl'
    path.write_text('\n'.join(lines))
    return str(path)
