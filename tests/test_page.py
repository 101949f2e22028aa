"""The page in the browser: what it computes, what it refuses, and that it works in Chromium."""
import itertools
import json
import math
import os
import shutil
import socket
import statistics
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from common import InputError
from draw import PAINT
from page import Page, export, main, make_handler, make_parser, make_world
from model import invert_pose
from psfm import load_psfm
from rooms import CLASSES
from test_data import make_folder
from tiny import TINY_PSFM, options, picture, refuse, save_tiny_vlm
from walk import RoomWorld, attention_to_latents, level_camera

SHIPPED = 'weights/psfm_small.safetensors'
VIEW = dict(room=0, context='0,2,4,6', x=0.2, y=-0.3, yaw=0.5, pitch=-0.2, whose='own', off='')
AT = dict(room=0, context=(0, 2, 4, 6), x=0.2, y=-0.3, yaw=0.5, pitch=-0.2)


@pytest.fixture(scope='module')
def world():
    return RoomWorld(*load_psfm(SHIPPED))


@pytest.fixture(scope='module')
def server(world):
    """-> (Page, address) of a running server."""
    page = Page(world)
    with ThreadingHTTPServer(('127.0.0.1', 0), make_handler(page, ('127.0.0.1',))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield page, f'http://127.0.0.1:{running.server_port}'
        running.shutdown()


def get(address, host=None, **values):
    """-> status, text"""
    query = '?' + urllib.parse.urlencode(values) if values else ''
    request = urllib.request.Request(address + query, headers={'Host': host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# -----------------------------------------------------------------------------
# what is computed

def test_shares_are_those_of_the_fused_kernel(world, monkeypatch):
    """... and with those of registers and rays they are all that a patch attends to."""
    seen, fused = [], F.scaled_dot_product_attention

    def watch(q, k, v):
        seen.append((q, k))
        return fused(q, k, v)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', watch)
    z = world.look(0, (0, 2))[0]
    extrinsics, intrinsics = torch.eye(3, 4)[None, None], torch.tensor([[[
        [40.0, 0, 32], [0, 40, 32], [0, 0, 1]]]])
    with torch.no_grad():
        result, shares = attention_to_latents(
            world.psfm, lambda: world.psfm.decode(z, extrinsics, intrinsics, (64, 64), (8, 8)))
    assert result.shape == (1, 1, 64, 256) and shares.shape == (1, 64, 32)
    q, k = seen[-1]
    expected = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    assert torch.allclose(shares, expected[..., 4:36], atol=1e-5)
    assert (shares.sum(-1) < 1).all() and shares.min() >= 0


def test_what_latents_do(world):
    own = world.view(**AT)
    assert own['r2'] > own['r2_camera']
    none = world.view(**AT, off=tuple(range(32)))
    average = world.view(**AT, whose='average')
    assert none['tiles']['predicted'] == average['tiles']['predicted']
    assert none['r2'] == pytest.approx(own['r2_camera'], abs=1e-5)
    other = world.view(**AT, whose='other')
    assert other['r2'] < own['r2']
    one = world.view(**AT, off=(3,))
    assert one['tiles']['predicted'] != own['tiles']['predicted']
    for view in (none, average, other, one):   # the truth stays
        assert view['picture'] == own['picture']
        assert view['tiles']['features'] == own['tiles']['features']
    assert own['r2'] != world.view(**dict(AT, context=(0,)))['r2']


def test_the_first_picture_is_seen_from_its_camera(world):
    shown = world.room(0)
    assert len(shown['pictures']) == 8 and shown['questions'] == []
    assert {piece['name'] for piece in shown['pieces']} <= set(CLASSES)
    camera = dict(shown['cameras'][2], pitch=-0.3)
    view = world.view(0, (0, 2, 4, 6), **camera)
    away = world.view(0, (0, 2, 4, 6), **dict(camera, yaw=camera['yaw'] + 3))
    assert view['r2'] > 0.5                       # a view that the encoder saw
    assert view['tiles'] != away['tiles']


def test_photographs(tmp_path):
    for i in range(6):
        picture(tmp_path / 'photos' / f'{i}.jpg', (64, 48))
    out = tmp_path / 'run'
    train.main([*TINY_PSFM, '--data', str(tmp_path / 'photos'), '--out', str(out), '--workers',
                '0', '--depth-probe'])
    arguments = ['--run', str(out), '--device', 'cpu']
    args = make_parser().parse_args([*arguments, '--images', str(tmp_path / 'photos')])
    world = make_world(args, 'cpu')
    assert world.views == 6
    shown = world.room(0, (1, 3))
    extrinsics = world.look((1, 3))[1].extrinsics[0, 4]
    camera = dict(shown['cameras'][4], pitch=-math.asin(extrinsics[2, 1]))
    view = world.view(0, (1, 3), **camera)
    height = invert_pose(extrinsics)[1, 3].item()
    level = level_camera(camera['x'], height, camera['y'], camera['yaw'], camera['pitch'])
    assert torch.allclose(invert_pose(level)[:, 2:], invert_pose(extrinsics)[:, 2:], atol=1e-4)
    assert torch.allclose(level[:, :3].det(), torch.tensor(1.0))
    assert set(view['tiles']) == {'features', 'predicted', 'depth', 'depth predicted'}
    assert view['tiles']['predicted'] != world.view(0, (1,), **camera)['tiles']['predicted']
    assert 'const START = {"kind":"photographs"' in Page(world).html
    with pytest.raises(InputError, match='there is no VLM'):
        world.ask(0, 0)
    with pytest.raises(InputError, match='--images or --vlm'):
        make_world(make_parser().parse_args(['--images', 'a', '--vlm', 'b']), 'cpu')
    with pytest.raises(InputError, match='show it a scene with --images'):
        make_world(make_parser().parse_args(arguments), 'cpu')
    with pytest.raises(InputError, match='--export takes rooms'):
        main([*arguments, '--images', str(tmp_path / 'photos'), '--export', 'x.html'])


def test_ask(tmp_path):
    import finetune
    vlm = save_tiny_vlm(tmp_path / 'vlm')
    finetune.main(options(vlm, tmp_path, '--steps', '1', '--ground-steps', '0', '--map-steps', '0'))
    args = make_parser().parse_args(['--vlm', str(tmp_path / 'run'), '--device', 'cpu'])
    world = make_world(args, 'cpu')
    questions = world.room(1)['questions']
    assert len(questions) > 3
    answer = world.ask(1, 0)
    assert answer['truth'] == world.questions.questions[1][0]['ground_truth']
    assert 'truth' not in questions[0] and isinstance(answer['answer'], str)
    assert isinstance(world.ask(1, -1)['map'], list)
    with pytest.raises(InputError, match='question 900: this room has'):
        world.ask(1, 900)


# -----------------------------------------------------------------------------
# the server

def test_it_answers(server):
    page, address = server
    status, html = get(address + '/')
    assert status == 200 and 'const START = {' in html and 'const WALK = null' in html
    status, text = get(address + '/room', room=0)
    assert status == 200 and len(json.loads(text)['cameras']) == 8
    status, text = get(address + '/view', **VIEW)
    assert status == 200 and json.loads(text) == json.loads(json.dumps(page.world.view(**AT)))


@pytest.mark.parametrize('change,sentence', [
    (dict(room='96'), 'room is a number from 0 to 95'), (dict(room='x'), "not 'x'"),
    (dict(room='1e2'), 'room is a number'), (dict(x='nan'), 'x is a number from -100 to 100'),
    (dict(yaw='inf'), 'yaw is a number'), (dict(pitch='2'), 'pitch is a number from -1.5 to 1.5'),
    (dict(context=''), 'context is different whole numbers'), (dict(context='0,0'), 'different'),
    (dict(context='8'), 'from 0 to 7'), (dict(off='32'), 'off is different whole numbers'),
    (dict(whose='mine'), 'whose is own or other or average'), (dict(more='1'), 'unknown: more'),
    (dict(room='9' * 5000), 'room is'), (dict(context=','.join('1' * 900)), 'context is')])
def test_a_bad_parameter_is_a_sentence(server, change, sentence):
    status, text = get(server[1] + '/view', **{**VIEW, **change})
    assert status == 400 and sentence in text and len(text) < 200


def test_what_is_not_there_and_who_may_not_ask(server):
    _, address = server
    for path in ('/page.py', '/../README.md', '/%2e%2e/README.md', '//etc/passwd', '/view/x'):
        assert get(address + path)[0] == 404
    assert get(address + '/', host='evil.example')[0] == 403
    status, text = get(address + '/ask', room=0, question=0)
    assert status == 400 and 'start with --vlm RUN' in text
    assert 'missing: context' in get(address + '/view', **{
        name: value for name, value in VIEW.items() if name != 'context'})[1]


def test_a_crash_stops_one_request(server, monkeypatch, capsys):
    page, address = server
    monkeypatch.setattr(page.world, 'view', lambda **_: 1 / 0)
    assert get(address + '/view', **VIEW)[0] == 500
    assert 'ZeroDivisionError' in capsys.readouterr().err
    monkeypatch.undo()
    assert get(address + '/view', **VIEW)[0] == 200


def test_whoever_leaves_in_the_middle_is_not_spoken_of(server, capsys):
    _, address = server
    where = urllib.parse.urlsplit(address)
    for request in (b'GET / HTTP/1.1', b'GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n',
                    b'GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n'):
        visitor = socket.create_connection((where.hostname, where.port))
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        visitor.sendall(request)
        visitor.close()                # at once, which resets the connection
    assert get(address + '/')[0] == 200
    time.sleep(0.2)
    assert capsys.readouterr().err == ''


def memory_now():
    """Bytes that this process holds at the moment."""
    if not os.path.exists('/proc/self/statm'):
        pytest.skip('no /proc on this system')
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def test_twenty_at_once(server):
    _, address = server

    def ask(i):
        return get(address + '/view', **dict(VIEW, x=i / 160))[0]

    memory = []
    with ThreadPoolExecutor(20) as pool:
        for first in range(0, 160, 20):  # from other places in every round
            assert set(pool.map(ask, range(first, first + 20))) == {200}
            memory.append(memory_now())
    # what is kept would be added in every round; a warm-up fades
    assert min(after - before for before, after in itertools.pairwise(memory)) < 8e6
    assert get(address + '/view', **VIEW)[0] == 200


def test_options(capsys, tmp_path):
    refuse('no weights at', main, ['--run', 'nowhere.safetensors'], capsys)
    refuse('--port', main, ['--port', '70000'], capsys)
    refuse('nowhere', main, ['--images', 'nowhere'], capsys)
    refuse('cannot be opened', main, ['--host', 'a\0', '--port', '0'], capsys)
    folder = make_folder(tmp_path / 'one', 1, 1)
    refuse('holds one picture', main, ['--images', str(folder)], capsys)


# -----------------------------------------------------------------------------
# in a browser

@pytest.fixture(scope='module')
def browser():
    """Chromium, driven by Playwright."""
    api = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium:
        pytest.skip('no chromium on the PATH')
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield running
        running.close()


def visit(browser, address, width=1280, height=800):
    """-> a page that has drawn itself, and the errors that it will have met."""
    visited, errors = browser.new_page(viewport=dict(width=width, height=height)), []
    visited.on('console', lambda message: message.type == 'error' and errors.append(message.text))
    visited.on('pageerror', lambda error: errors.append(str(error)))
    visited.goto(address)
    visited.wait_for_function('document.body.dataset.drawn')
    return visited, errors


def drawn(visited):
    """What the canvases show, once the page has drawn what was asked for last."""
    visited.wait_for_function('Number(document.body.dataset.drawn) === turn')
    return {name: visited.evaluate('name => document.getElementById(name).toDataURL()', name)
            for name in ('picture', 'features', 'predicted', 'categories predicted')}


def drag(visited, selector, dx, dy):
    box = visited.locator(selector).bounding_box()
    x, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    visited.mouse.move(x, y)
    visited.mouse.down()
    visited.mouse.move(x + dx, y + dy, steps=4)
    visited.mouse.up()


def test_in_a_browser(server, browser, capsys):
    visited, errors = visit(browser, server[1])
    first = drawn(visited)
    drag(visited, '#plan', 60, 20)                # walk
    walked = drawn(visited)
    assert all(first[name] != walked[name] for name in first)
    drag(visited, '#picture', 80, 0)              # turn
    turned = drawn(visited)
    assert turned['picture'] != walked['picture']
    visited.keyboard.press('w')
    assert drawn(visited)['picture'] != turned['picture']

    before = drawn(visited)
    visited.locator('#latents button').nth(4).click()
    forgotten = drawn(visited)
    assert forgotten['predicted'] != before['predicted']
    assert forgotten['picture'] == before['picture']
    visited.locator('#forget').click()
    alone = drawn(visited)
    visited.locator('#remember').click()
    assert drawn(visited) == before
    visited.locator('input[value=average]').click()
    assert drawn(visited)['predicted'] == alone['predicted']
    visited.locator('input[value=own]').click()

    visited.locator('#predicted').hover()         # which latents does this patch read?
    shares = visited.evaluate("[...document.querySelectorAll('#latents button')].map("
                              "button => Number(button.style.getPropertyValue('--share')))")
    assert len(shares) == 32 and max(shares) > 0.1
    visited.locator('#pictures button').nth(1).click()
    assert drawn(visited)['predicted'] != before['predicted']
    for i in (3, 5):                              # more than training showed
        visited.locator('#pictures button').nth(i).click()
    assert 'training showed the encoder 2 to 4' in visited.locator('#note').inner_text()
    visited.locator('#another').click()
    visited.wait_for_function("document.body.dataset.room === '1'")
    assert drawn(visited)['picture'] != before['picture']

    # many moves at once: what was overtaken is never asked for
    requests = []
    visited.on('request', lambda request: requests.append(request.url))
    visited.evaluate('for (let i = 0; i < 40; i++) walkTo(0.02 * i, 0)')
    drawn(visited)
    assert 1 <= len(requests) <= 3 and 'x=0.78' in requests[-1]

    # from a move to its pixels
    times = [visited.evaluate('''async i => {
        const start = performance.now()
        walkTo(-1 + 0.04 * i, 0.3)
        while (Number(document.body.dataset.drawn) < turn) await new Promise(requestAnimationFrame)
        return performance.now() - start
    }''', i) for i in range(50)]
    with capsys.disabled():
        print(f'\nfrom a move to its pixels: {statistics.median(times):.0f} ms, median of 50')
    assert errors == []
    visited.close()


@pytest.mark.parametrize('width,height', [(1280, 800), (390, 844)])
def test_it_fits(server, browser, width, height):
    visited, errors = visit(browser, server[1], width, height)
    size = visited.evaluate('[document.documentElement.scrollWidth, '
                            'document.documentElement.scrollHeight]')
    assert size[0] <= width
    assert size[1] <= height or width < 1000
    assert errors == []
    visited.close()


def test_a_copy_without_a_server(world, browser, tmp_path):
    path = tmp_path / 'walk.html'
    export(Page(world), str(path), places=2, turns=4)
    text = path.read_text()
    assert 'http' not in text
    visited, errors = visit(browser, path.as_uri())
    first = drawn(visited)
    visited.keyboard.press('q')
    turned = drawn(visited)
    assert turned['picture'] != first['picture'] and turned['predicted'] != first['predicted']
    visited.locator('input[value=other]').click()
    other = drawn(visited)
    assert other['predicted'] != turned['predicted'] and other['picture'] == turned['picture']
    visited.locator('#predicted').hover()         # shares are kept for this room's own z alone
    assert visited.evaluate("document.querySelector('#latents button').style"
                            ".getPropertyValue('--share')") == '0'
    assert errors == []
    visited.close()


@pytest.mark.slow
def test_the_copy_is_small_enough_for_mail(world, tmp_path, capsys):
    path = tmp_path / 'walk.html'
    export(Page(world), str(path))
    assert 1e6 < path.stat().st_size < 5e6
    assert '300 views' in capsys.readouterr().out


def test_what_a_server_that_is_gone_leaves_behind(world, browser):
    page = Page(world)
    running = ThreadingHTTPServer(('127.0.0.1', 0), make_handler(page, ('127.0.0.1',)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    visited, _ = visit(browser, f'http://127.0.0.1:{running.server_port}')
    running.shutdown()
    running.server_close()
    visited.locator('#another').click()
    visited.wait_for_function("document.getElementById('error').textContent !== ''")
    assert 'does not answer' in visited.locator('#error').inner_text()
    assert visited.evaluate('state.room') == 0    # what is shown is of one room
    visited.close()


def test_keys_do_not_take_what_belongs_to_others(server, browser):
    visited, errors = visit(browser, server[1])
    visited.locator('input[value=own]').focus()
    visited.keyboard.press('ArrowDown')           # the next radio button, not a step
    assert visited.evaluate('state.whose') == 'other'
    place = visited.evaluate('[state.x, state.y]')
    visited.locator('#plan').focus()
    visited.keyboard.press('ArrowUp')
    assert visited.evaluate('[state.x, state.y]') != place
    visited.locator('#latents button').nth(2).focus()
    for forgotten in ('true', 'false'):           # the focus stays
        visited.keyboard.press('Enter')
        assert visited.locator('#latents button').nth(2).get_attribute('aria-pressed') == forgotten
    assert errors == []
    visited.close()


def test_colours_are_named():
    start = Page.start(SimpleNamespace(world=SimpleNamespace(
        kind='rooms', views=8, num_latents=32, width=128, answerer=None, whose=RoomWorld.whose,
        psfm=SimpleNamespace(mask_ratio=0.5),
        config=SimpleNamespace(min_views=4, max_views=8, data='rooms'))))
    assert len(start['colours']) == len(PAINT) == len(CLASSES)
    assert start['trained'] == [2, 4]
