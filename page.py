"""
Walk through the field: a page in the browser. Stand in a room, and see what an encoder that was
shown a few pictures of it believes is there.

    python page.py                                   # the shipped encoder, held-out rooms
    python page.py --vlm out/vlm-small               # ... and a fine-tuned VLM to ask
    python page.py --run out/photos --images photos/kitchen/     # your own scene
    python page.py --export walk.html                # one file that needs no server

The page is page.html. It asks for /room, /view and /ask, which walk.py computes, and fetches
nothing from elsewhere.
"""
import contextlib
import itertools
import json
import math
import os
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from tqdm import tqdm

from common import InputError, Parser, find_file, number, pick_device, run_script
from draw import PAINT, rgb
from eval import SHIPPED, load_answerer
from measure import knows_rooms
from media import even_frames, find_scenes_or_say_why, open_picture
from psfm import load_psfm, random_view_mask
from rooms import CLASSES
from walk import NUM_ROOMS, PhotoWorld, RoomWorld


# -----------------------------------------------------------------------------
# the server

def parameters_of(world):
    """{path: {parameter: (kind, lowest, highest)}}: what the page may ask for. Kind tuple: whole
    numbers with commas between them; kind str: one of the names that follow."""
    room = dict(room=(int, 0, NUM_ROOMS - 1))
    context = dict(context=(tuple, 0, world.views - 1))
    camera = dict(x=(float, -100, 100), y=(float, -100, 100), yaw=(float, -100, 100),
                  pitch=(float, -1.5, 1.5))
    return {'/room': room if world.kind == 'rooms' else {**room, **context},
            '/view': dict(room, **context, **camera, off=(tuple, 0, world.num_latents - 1),
                          whose=(str, *world.whose)),
            '/ask': dict(room, question=(int, -1, 1000))}


def read_parameter(name, text, kind, *allowed):
    """A value that is allowed. InputError says which are."""
    said = f'not {text[:40]!r}'
    if kind is str:
        if text not in allowed:
            raise InputError(f'{name} is {" or ".join(allowed)}, {said}')
        return text
    low, high = allowed
    words = text.split(',') if kind is tuple else [text]
    try:
        values = [float(word) if kind is float else int(word) for word in words if word]
    except ValueError:
        values = [math.nan]
    if not all(low <= value <= high for value in values) or len(set(values)) < len(values) \
            or (not values and name != 'off'):
        many = 'different whole numbers, with commas,' if kind is tuple else 'a number'
        raise InputError(f'{name} is {many} from {low} to {high}, {said}')
    return tuple(values) if kind is tuple else values[0]


def read_parameters(query, wanted):
    """The part of an address after the ? -> keyword arguments. InputError says what is wrong."""
    given = dict(parse_qsl(query, keep_blank_values=True))
    strange = given.keys() - wanted.keys()
    missing = wanted.keys() - given.keys()
    if strange or missing:
        raise InputError(f'parameters missing: {", ".join(sorted(missing)) or "none"}; '
                         f'unknown: {", ".join(sorted(strange))[:80] or "none"}')
    return {name: read_parameter(name, given[name], *check) for name, check in wanted.items()}


class Page:
    """Answers requests, one after the other. (A page never has two /view under way: what was
    overtaken is never asked for.)"""

    def __init__(self, world):
        self.world, self.checks = world, parameters_of(world)
        self.lock = threading.Lock()
        self.html = page_with(self.start())

    def start(self):
        """What the page must know from the beginning."""
        world = self.world
        colours = {name: rgb(colour) for name, colour in zip(CLASSES, PAINT)}
        # the fewest and the most context views that training showed
        trained = [random_view_mask(1, n, world.psfm.mask_ratio)[1] for n in
                   (world.config.min_views, world.config.max_views)]
        return dict(kind=world.kind, rooms=NUM_ROOMS, views=world.views, latents=world.num_latents,
                    width=world.width, whose=world.whose, colours=colours, trained=trained,
                    asks=bool(world.answerer), knows_photos=world.config.data != 'rooms')

    def answer(self, path, query):
        """-> what the world says. InputError if it was asked wrongly."""
        values = read_parameters(query, self.checks[path])
        with self.lock:
            return getattr(self.world, path[1:])(**values)


def page_with(start, walk=None):
    """page.html with what it needs in the place of its two nulls."""
    with open(find_file('page.html'), encoding='utf-8') as file:
        html = file.read()
    for name, value in (('START', start), ('WALK', walk)):
        text = json.dumps(value, separators=(',', ':')).replace('<', '\\u003c')
        html = html.replace(f'const {name} = null', f'const {name} = {text}')
    return html


def make_handler(page, hosts):
    """`hosts`: names that the page may be asked for by, so that another site's script cannot reach
    a server on loopback under a name of its own. None: any."""
    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def handle(self):
            with contextlib.suppress(ConnectionError):  # nobody is waiting any more
                super().handle()

        def reply(self, status, text, kind='text/plain'):
            body = text.encode()
            self.send_response(status)
            self.send_header('Content-Type', f'{kind}; charset=utf-8')
            self.send_header('Content-Length', str(len(body)))
            self.send_header('Cache-Control', 'no-store')
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            name = self.headers.get('Host', '').rsplit(':', 1)[0].lower()
            try:
                address = urlsplit(self.path)
            except ValueError:
                return self.reply(400, 'this is no address')
            if hosts is not None and name not in hosts:
                self.reply(403, f'this page is at {" or ".join(hosts)}')
            elif address.path == '/':
                self.reply(200, page.html, 'text/html')
            elif address.path not in page.checks:
                self.reply(404, 'there is only /, /room, /view and /ask')
            else:
                self.answer(address)

        def answer(self, address):
            try:
                answer = page.answer(address.path, address.query)
                self.reply(200, json.dumps(answer), 'application/json')
            except InputError as error:
                self.reply(400, str(error))
            except (ConnectionError, TimeoutError):
                pass
            except Exception:         # our fault: said here, and the server goes on
                traceback.print_exc()
                self.reply(500, 'this request failed; the server says why')

        def log_message(self, *_):
            """Silence: a line a move would bury what matters."""

    return Handler


# -----------------------------------------------------------------------------
# one file that needs no server

def export(page, path, room=5, context=(0, 2, 4, 6), places=5, turns=12):
    """Writes the page with a grid of views of one room: places x places x turns, for every z."""
    open(path, 'a').close()           # if it cannot be written, now and not in minutes
    world = page.world
    shown = world.room(room)
    grid = [[side * ((i + 0.5) / places - 0.5) for i in range(places)] for side in shown['sides']]
    views = {}
    every = itertools.product(world.whose, range(places), range(places), range(turns))
    for whose, i, j, k in tqdm(list(every), 'looking', leave=False, disable=None):
        yaw = 2 * math.pi * k / turns
        view = world.view(room, context, grid[0][i], grid[1][j], yaw, -0.25, whose=whose)
        if whose != 'own':            # what is true is there once
            tiles = {name: tile for name, tile in view['tiles'].items() if 'predicted' in name}
            view = dict(r2=view['r2'], tiles=tiles)
        views[f'{whose} {i} {j} {k}'] = view
    walk = dict(room=shown, context=context, x=grid[0], y=grid[1], turns=turns, views=views)
    with open(f'{path}.part', 'w', encoding='utf-8') as file:
        file.write(page_with(page.start(), walk))
    os.replace(f'{path}.part', path)  # an earlier one stays whole until then
    print(f'wrote {path}, {os.path.getsize(path) / 1e6:.1f} MB, {places ** 2 * turns} views')


# -----------------------------------------------------------------------------

def make_world(args, device):
    psfm, config = load_psfm(args.run, device)
    if config.num_latents == 0 or config.decoder_depth == 0:
        raise InputError(f'{args.run} has no latents, or no block that attends to them: there is '
                         'nothing to see')
    if args.images:
        if args.vlm:
            raise InputError('--images or --vlm (which knows rooms): one of them')
        scenes = find_scenes_or_say_why(args.images).scenes
        name, paths = next(iter(scenes.items()))
        if len(scenes) > 1:
            print(f'{args.images} holds {len(scenes)} scenes; this page shows {name}')
        paths = [paths[i] for i in even_frames(len(paths), args.views)]
        pictures = [open_picture(path, config.image_width) for path in paths]
        if len(pictures) < 2:
            raise InputError(f'{args.images} holds one picture; two are the least')
        return PhotoWorld(psfm, config, pictures)
    if not knows_rooms(psfm, config):
        raise InputError(f'{args.run} was trained on {config.data}: show it a scene with --images '
                         'FOLDER, or a video')
    answerer = load_answerer(args.vlm, device)[0] if args.vlm else None
    return RoomWorld(psfm, config, answerer)


def make_parser():
    parser = Parser(description=__doc__)
    parser.add_argument('--run', default=SHIPPED, help=f'of train.py (default: {SHIPPED})')
    parser.add_argument('--vlm', default='', help='a run of finetune.py, to ask about rooms')
    parser.add_argument('--images', default='', help='one scene: a folder of pictures, or a video')
    parser.add_argument('--views', type=number(int, 2, 32), default=8,
                        help='pictures of --images to take (8)')
    parser.add_argument('--export', default='', metavar='FILE', help='writes one file and ends')
    parser.add_argument('--host', default='127.0.0.1', help='(default: 127.0.0.1, this machine)')
    parser.add_argument('--port', type=number(int, 0, 65535), default=8000, help='(8000)')
    parser.add_argument('--device', default='auto', help='auto | cpu | cuda | mps (auto)')
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    page = Page(make_world(args, pick_device(args.device)))
    if args.export:
        if page.world.kind != 'rooms':
            raise InputError('--export takes rooms: leave --images out')
        return export(page, args.export)
    is_local = args.host in ('127.0.0.1', 'localhost')
    hosts = ('127.0.0.1', 'localhost') if is_local else None
    try:
        server = ThreadingHTTPServer((args.host, args.port), make_handler(page, hosts))
    except (OSError, TypeError, UnicodeError) as error:  # the last two: no name of a host
        raise InputError(f'--host {args.host} --port {args.port} cannot be opened ({error}): take '
                         'another --host or --port') from error
    if not is_local:
        print(f'warning: --host {args.host} shows this page to everyone who can reach this '
              'machine', file=sys.stderr)
    try:
        with server:
            print(f'http://{args.host}:{server.server_port}/ (Ctrl-C ends)', flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        page.lock.acquire(timeout=10)  # torch does not like to be left in the middle
        print()


if __name__ == '__main__':
    run_script(main)
