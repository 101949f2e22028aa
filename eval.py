"""
What has been learned? One command for each question.

    python eval.py field --run out/small            # metrics and field.png of a run, anew
    python eval.py field --run out/small --path     # ... and path.gif: where no picture was taken
    python eval.py field --data scenes/             # ... on scenes of another world
    python eval.py probe                            # what does z know of the room?
    python eval.py runs out/*                       # several runs side by side
    python eval.py encode photos/ --run out/photos  # a file of latents and cameras for each scene
    python eval.py backbone                         # how good the mini VGGT is
    python eval.py rooms --run out/vlm-small        # fine-tuned VLMs on held-out rooms' questions
    python eval.py ask --images a.png --question "How many table(s) are in this room?"
    python eval.py export --run out/vlm-base --out plain/   # for transformers, LoRA merged
    python eval.py vsibench --data VSI-Bench/ --run out/vlm-base      # also cvbench, sparbench,
                                                                      # viewspatial

The measures are in measure.py, probe.py and benchmarks.py, the pictures in draw.py. Experiments of
many runs are in ablate.py.
"""
import json
import math
import os
import zlib
from collections import Counter

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import finetune
from adapter import SpatialVLM, hash_of_encoder
from backbone import fit_pictures
from benchmarks import (BENCHMARKS, ask_benchmark, generate, leave_out_lost, read_answers,
                        read_benchmark, results_table)
from chat import as_text, load_vlm
from common import (InputError, Parser, autocast_on, check_value, fetch, find_checkpoint,
                    find_file, is_hub_id, number, pick_device, read_json, read_weights, run_script,
                    step_generator, write_json)
from data import RoomPool, make_sources, rendering
from draw import draw_field, draw_film, draw_walk
from measure import answer_rooms, evaluate_field, field_table, rooms_table
from media import (even_frames, find_scenes_or_say_why, open_picture, read_video,
                   reading_fault)
from mini_vggt import backbone_table, evaluate_backbone
from probe import probe_latents, probe_table
from psfm import load_psfm
from questions import KINDS, RoomQuestions, as_prompt
from release import export_spatial_vlm, open_psfm, open_spatial_vlm
from rooms import CATEGORIES, check_classes
from vggt import VGGT

SHIPPED = 'weights/psfm_small.safetensors'      # the encoder that the repository carries


def folder_beside(run):
    """Where findings about a run go: into its folder; of weights alone, into out/<their name>."""
    run = run.rstrip('/').removesuffix('/checkpoint')
    if not find_checkpoint(run):
        run = os.path.join('out', os.path.basename(run).removesuffix('.safetensors'))
    os.makedirs(run, exist_ok=True)
    return run


# -----------------------------------------------------------------------------
# the field

def field(args):
    device = pick_device(args.device)
    psfm, config = load_psfm(args.run, device)
    if args.data:  # another world
        config.data = args.data
    if args.path and config.data == 'rooms' and 'cells' not in psfm.backbone.config.heads:
        raise InputError(f'--path: the backbone of {args.run}, {config.backbone}, has no head that '
                         'reads depth off predicted features; in rooms it takes the mini VGGT')
    out = folder_beside(args.run)
    if args.data:
        out = os.path.join(out, os.path.basename(os.path.abspath(args.data)))
        os.makedirs(out, exist_ok=True)
    train_source, held_out = make_sources(config, psfm.backbone.config.patch_size, device,
                                          all_held_out=bool(args.data))
    autocast = autocast_on(device, torch.float32)
    batches = config.steps * config.accumulate  # of its training
    path = os.path.join(out, 'metrics.json')
    known = read_json(path) if os.path.isfile(path) else {}
    metrics = evaluate_field(psfm, train_source, held_out, batches, config, autocast)
    print(field_table(metrics, held_out.held_out_text))

    write_json(path, {**known, **metrics})
    draw_field(psfm, held_out, config, autocast, os.path.join(out, 'field.png'))
    print(f'wrote {out}/metrics.json and {out}/field.png')
    if args.path:
        path = os.path.join(out, 'path.gif')
        if config.data == 'rooms':
            draw_film(psfm, config, autocast, path)
        else:
            draw_walk(psfm, held_out, config, autocast, path)
        print(f'wrote {out}/path.gif')


def probe(args):
    if args.rooms % RoomPool.BLOCK or args.held_out % RoomPool.BLOCK:
        raise InputError(f'--rooms {args.rooms} --held-out {args.held_out}: multiples of '
                         f'{RoomPool.BLOCK}, because rooms are made so many at a time')
    device = pick_device(args.device)
    psfm, config = load_psfm(args.run, device)
    if config.data != 'rooms':
        raise InputError(f'{args.run} was trained on {config.data}: what is true there is not '
                         'known; probing takes a run on rooms')
    if config.num_latents == 0:
        raise InputError(f'{args.run} has no latents (--num-latents 0): there is nothing to probe')
    autocast = autocast_on(device, torch.float32)
    scores = probe_latents(psfm, config, args.rooms, args.held_out, args.views, autocast)
    print(f'{args.held_out} held-out rooms, {args.views} views each; probes fitted on {args.rooms} '
          f'other rooms. R2 (presence: accuracy), 95 % intervals\n{probe_table(scores)}')
    path = os.path.join(folder_beside(args.run), 'probe.json')
    write_json(path, scores)
    print(f'wrote {path}')


def stamp_of(path):
    try:
        return read_weights(path)[1].get('stamp')
    except InputError:                # none there, or not whole
        return None


@torch.no_grad()
def encode(args):
    """Every scene of a data set -> <out>/<scene>.safetensors, from --views of its pictures.

    A file holds z (Q, D), and the predicted cameras, extrinsics (V, 3, 4) and intrinsics (V, 3, 3)
    of pictures resized to (H, W); its metadata say which pictures, H and W, and a stamp, which
    tells one encoder from another. What is there already and is the same is not computed again.
    Pictures that cannot be read are left out by name.
    """
    device = pick_device(args.device)
    psfm, config = open_psfm(args.run, device)
    width, encoder = config.image_width, hash_of_encoder(psfm)
    found = find_scenes_or_say_why(args.folder)
    written = 0
    for name, paths in tqdm(found.scenes.items(), 'encoding', disable=None):
        paths = [paths[i] for i in even_frames(len(paths), args.views)]
        faults = [reading_fault(path) for path in paths]
        for fault in filter(None, faults):
            tqdm.write(f'{fault}; left out')
        paths = [path for path, fault in zip(paths, faults) if not fault]
        if not paths:
            tqdm.write(f'scene {name} is left out: none of its pictures can be read')
            continue
        path = os.path.join(args.out, f'{name}.safetensors')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        state = [(picture, os.stat(picture).st_mtime_ns) for picture in paths]
        metadata = dict(pictures=json.dumps(paths), stamp=f'{encoder} {width} {state}')
        if stamp_of(path) == metadata['stamp']:
            continue
        pictures = [open_picture(picture, width) for picture in paths]
        images = fit_pictures(pictures, width, psfm.backbone.config.patch_size)
        metadata['size'] = json.dumps(list(images.shape[-2:]))
        views = psfm.backbone(images[None].to(device).float() / 255)
        tensors = dict(z=psfm.encode(views.features, views.grid), extrinsics=views.extrinsics,
                       intrinsics=views.intrinsics)
        tensors = {key: x[0].float().cpu().contiguous() for key, x in tensors.items()}
        save_file(tensors, f'{path}.{os.getpid()}', metadata)
        os.replace(f'{path}.{os.getpid()}', path)
        written += 1
    print(f'{len(found.scenes)} scenes, {written} of them encoded now, in '
          f'{args.out.rstrip("/")}/')


def backbone(args):
    device = pick_device(args.device)
    vggt = VGGT.from_pretrained(args.weights).freeze().to(device)
    if 'cells' not in vggt.config.heads:
        raise InputError(f'{args.weights} is not a mini VGGT: it has no heads for depth and '
                         'categories of rooms')
    check_classes(vggt.config.classes, args.weights)
    pool = RoomPool('val', 0, args.rooms, device=device)
    metrics = evaluate_backbone(vggt, pool, args.rooms, autocast_on(device, torch.float32))
    print(backbone_table(metrics))


# options by which two runs may differ and still share a row
OF_NO_MATTER = {'seed', 'out', 'device', 'workers', 'resume', 'log_every', 'eval_every'}


def check_once(folders):
    """Raises InputError if a run is named twice: it would count as two seeds."""
    twice = [path for path, n in Counter(map(os.path.realpath, folders)).items() if n > 1]
    if twice:
        raise InputError(f'{twice[0]} is named twice; a run counts as one seed')


def runs(args):
    """A row for each configuration: what it changes from the first one, means over its seeds."""
    check_once(args.folders)
    groups = {}
    left_out = []
    for folder in args.folders:
        try:
            files = [os.path.join(folder, name) for name in ('config.json', 'metrics.json')]
            config, metrics = [read_json(path) for path in files]
            if os.path.getmtime(files[0]) > os.path.getmtime(files[1]):
                left_out.append(folder)  # a later run began here, and is not finished
                continue
            read_out = metrics.get('read_out', {}).get('psfm', {})
            values = [metrics['psfm']['r2'], metrics['camera']['r2'],
                      read_out.get('object_recall', math.nan),
                      read_out.get('depth_abs_rel', math.nan), metrics['seconds'] / 60]
            settings = {key: x for key, x in config.items() if key not in OF_NO_MATTER}
            if not all(isinstance(x, (int, float)) for x in values):
                raise TypeError
        except (InputError, KeyError, TypeError, AttributeError):
            left_out.append(folder)
            continue
        groups.setdefault(json.dumps(settings), []).append(values)
    if not groups:
        raise InputError(f'no finished PSFM run among {" ".join(args.folders)}')

    first = json.loads(next(iter(groups)))
    titles = 'R2', 'camera', 'objects', 'depth abs-rel', 'minutes'
    print(f'{"":46s}{"seeds":>6s}' + ''.join(f'{title:>15s}' for title in titles))
    for settings, of_seeds in groups.items():
        settings = json.loads(settings)
        changed = [f'{key}={settings.get(key)}' for key in {**first, **settings}
                   if first.get(key) != settings.get(key)]
        row = f'{" ".join(changed) or "(the first)":46s}{len(of_seeds):6d}'
        for values in zip(*of_seeds):
            half_range = (max(values) - min(values)) / 2
            spread = f' ±{half_range:.3f}' if len(values) > 1 else ''
            row += f'{sum(values) / len(values):.3f}{spread}'.rjust(15)
        print(row)
    if max(map(len, groups.values())) > 1:
        print('±: half the range over seeds')
    if left_out:
        print(f'left out, not a finished PSFM run: {" ".join(left_out)}')


# -----------------------------------------------------------------------------
# a Spa3-VLM and its answers

def local(run):
    """A run's folder: here, beside this file, or fetched from the hub."""
    run = find_file(run)
    return fetch(run) if not os.path.isdir(run) and is_hub_id(run) else run


def load_answerer(run, device, max_pixels=None, num_rooms=192, dtype=None):
    """-> (SpatialVLM, Chat, what finetune.open_latents returns), settings; ready to answer.

    `run`: a run of finetune.py or mini_vlm.py, a mini VLM, a Spa3-VLM folder of the release, or a
    hub id. `dtype` of the VLM: None is bf16 on a CUDA GPU, fp32 elsewhere.
    """
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == 'cuda' else torch.float32)
    run = local(run)
    if not os.path.isdir(run):
        raise InputError(f'no folder of a run at {run}: fine-tune first (python finetune.py '
                         '--config small)')
    folder = find_checkpoint(run) or run
    if os.path.isfile(os.path.join(folder, 'sight.safetensors')):  # a mini VLM, not fine-tuned
        vlm, chat = load_vlm(folder, dtype, max_pixels)
        model = SpatialVLM(vlm)
        settings = dict(vlm=folder, latents='none', num_frames=8)
    else:
        model, chat, settings = open_spatial_vlm(folder, dtype, max_pixels)
    if hasattr(model.vlm.config, 'classes'):
        check_classes(model.vlm.config.classes, run, 'python mini_vlm.py')
    config = finetune.Config(latents=settings['latents'], encoder=settings.get('encoder', ''),
                             num_rooms=0, val_scenes=num_rooms)
    as_trained = getattr(torch, settings.get('dtype', 'float32'))
    latents = finetune.open_latents(config, as_trained, settings.get('origin'))
    if latents:
        latents.to(device)
    return (model.to(device).eval(), chat, latents), settings


def rooms(args):
    device = pick_device(args.device)
    check_once(args.run)
    # all of them before anything is asked: a wrong folder costs nothing
    loaded = [load_answerer(run, device, num_rooms=args.rooms) for run in args.run]
    for run, (answerer, _) in zip(args.run, loaded):
        if args.shuffled and answerer[2] is None:
            raise InputError(f'{run} was trained without latents: there is nothing to shuffle')
    trained = loaded[0][1].get('num_rooms', 3000)  # the rooms that a prior may know
    held_out = RoomQuestions('val', 0, args.rooms)
    train_data = RoomQuestions('train', 0, trained, rendering)
    arms = {}
    for answerer, settings in loaded:
        autocast = autocast_on(device, answerer[0].vlm.dtype)
        metrics = answer_rooms(*answerer, held_out, train_data, autocast, args.shuffled, args.maps)
        arm = settings['latents'] + ', shuffled' * args.shuffled
        arms.setdefault(arm, []).append(metrics)
    print(rooms_table(arms))


def in_training_words(question, vlm, chat, settings):
    """The question as a prompt; of a VLM that was trained on rooms, in VSI-Bench's form.

    Says what a mini VLM can be asked, if it does not know the words.
    """
    is_mini = hasattr(vlm.config, 'classes')
    if settings.get('data', 'rooms' if is_mini else '') != 'rooms':
        return question
    question = as_prompt(dict(question_type='', question=question, options=None))
    tokens = chat.tokenizer(question, add_special_tokens=False).input_ids
    if is_mini and chat.tokenizer.unk_token_id in tokens:
        print(f'(This mini VLM knows {len(KINDS)} kinds of questions, as in VSI-Bench, about '
              f'{", ".join(CATEGORIES)}; your question has words that it never saw.)')
    return question


def ask(args):
    if bool(args.images) == bool(args.video):
        raise InputError('ask takes --images a.jpg b.jpg ... or --video walk.mp4')
    check_value('--question', args.question)
    if not args.question.strip():
        raise InputError('--question is empty')
    device = pick_device(args.device)
    (model, chat, latents), settings = load_answerer(args.run, device)
    if args.images:
        pictures = [open_picture(path) for path in args.images]
    else:
        pictures = list(read_video(args.video, args.frames or settings['num_frames']))
    question = in_training_words(args.question, model.vlm, chat, settings)
    turn = {'from': 'human', 'value': '<image>' * len(pictures) + as_text(question)}
    item = dict(images=pictures, conversations=[turn])
    z = latents([pictures]) if latents else None
    print(generate(model, chat, z, [item], 64)[0])


def export(args):
    folder = local(args.run)
    export_spatial_vlm(find_checkpoint(folder) or folder, args.out)
    print(f'{args.out}/vlm is a plain folder for transformers, {args.out} one for --run')


# -----------------------------------------------------------------------------
# the four benchmarks

def answers_file(name, folder, *what):
    """Where answers are kept: answers of other weights, or to other pictures, in another file."""
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f'{name}-{zlib.crc32(repr(what).encode()):08x}.jsonl')


def sample(docs, limit):
    """A sample of `limit` questions, always the same; a larger one holds the smaller."""
    lot = torch.randperm(len(docs), generator=step_generator(11))[:limit].tolist()
    return [docs[i] for i in sorted(lot)]


def select(docs, args):
    """The questions of --subset and --tasks; with --limit, a sample of them."""
    def task(doc):
        return doc.get('question_type', doc.get('task'))

    subset = getattr(args, 'subset', 'full')
    if subset != 'full':
        if any(not isinstance(doc.get('pruned'), bool) for doc in docs):
            raise InputError(f'--subset {subset}: these files are older than the subsets (no field '
                             '"pruned" in some questions)')
        docs = [doc for doc in docs if doc['pruned'] == (subset == 'pruned')]
        if not docs:
            raise InputError(f'--subset {subset}: none of the questions is in it')
    if args.tasks:
        known = sorted({task(doc) for doc in docs})
        unknown = [name for name in args.tasks if name not in known]
        if unknown:
            raise InputError(f'--tasks {" ".join(unknown)}: {args.command} has {", ".join(known)}')
        docs = [doc for doc in docs if task(doc) in args.tasks]
    return sample(docs, args.limit) if args.limit else docs


def weights_stamp(run):
    """When each file of weights was written: tells one state of a run from another."""
    return sorted((name, os.stat(os.path.join(folder, name)).st_mtime_ns)
                  for folder, _, names in os.walk(run) for name in names
                  if name.endswith('.safetensors'))


def benchmark(args):
    """Asks every question (what is answered already is not asked again) and prints the results."""
    name = args.command
    root = args.data
    if not os.path.isdir(root):
        if not is_hub_id(root):
            raise InputError(f'no folder {root}')
        root = fetch(root, kind='dataset')
    docs = select(read_benchmark(name, root), args)
    if args.predictions:
        answers = read_answers(args.predictions)
    else:
        docs = leave_out_lost(docs, root)
        answerer, settings = load_answerer(args.run, pick_device(args.device), args.max_pixels)
        path = answers_file(name, args.out or folder_beside(args.run), settings, args.frames,
                            args.max_pixels, weights_stamp(local(args.run)))
        answers = ask_benchmark(name, docs, answerer, path, args.frames, args.batch)
    answered = [doc for doc in docs if doc['key'] in answers]
    if not answered:
        theirs = next(iter(answers), 'none at all')
        raise InputError(f'none of the questions has an answer: they have ids like '
                         f'{docs[0]["key"]}, the answers have {theirs}')
    if len(answered) < len(docs):
        print(f'{len(docs) - len(answered)} of {len(docs)} questions have no answer and are not '
              'counted')
    published = read_json(find_file('assets/published.json'))[name]
    print(results_table(name, answered, answers, published))


# -----------------------------------------------------------------------------

def make_parser():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True, parser_class=Parser)

    def command(function, help, name=None):
        added = commands.add_parser(name or function.__name__, help=help)
        added.set_defaults(function=function)
        if function not in (runs, export):
            added.add_argument('--device', default='auto', help='auto | cpu | cuda | mps (auto)')
        return added

    c = command(field, 'measures and draws a trained field')
    c.add_argument('--run', default='out/small', help='a run, or a file (default: out/small)')
    c.add_argument('--data', default='', help='other scenes than those of the run: a folder')
    c.add_argument('--path', action='store_true', help='also films it from new places: path.gif')

    c = command(probe, 'reads facts of held-out rooms off the latents')
    c.add_argument('--run', default=SHIPPED, help=f'a run, or a file (default: {SHIPPED})')
    c.add_argument('--rooms', type=number(int, 200), default=2500, help='to fit on (2500)')
    c.add_argument('--held-out', type=number(int, 100), default=480, help='to ask about (480)')
    c.add_argument('--views', type=number(int, 1, RoomPool.VIEWS), default=6, help='a room (6)')

    c = command(encode, 'a folder of scenes -> a file of latents and cameras for each')
    c.add_argument('folder', help='pictures as data.py check understands them')
    c.add_argument('--run', default=SHIPPED, help=f'a run, or a file (default: {SHIPPED})')
    c.add_argument('--views', type=number(int, 1), default=8, help='of a scene, at most (8)')
    c.add_argument('--out', default='out/encoded', help='(default: out/encoded)')

    c = command(runs, 'several runs side by side; those that differ in the seed share a row')
    c.add_argument('folders', nargs='+', help='of train.py, as out/*')

    c = command(backbone, 'cameras, depth and categories of the mini VGGT on held-out rooms')
    c.add_argument('--weights', default='weights/mini_vggt.safetensors', help='(shipped)')
    c.add_argument('--rooms', type=number(int, 4), default=200, help='held-out rooms (200)')

    c = command(rooms, 'fine-tuned VLMs on the held-out rooms')
    c.add_argument('--run', nargs='+', default=['out/vlm-small'],
                   help='runs of finetune.py; those with the same latents count as seeds')
    c.add_argument('--shuffled', action='store_true', help="with another room's latents")
    c.add_argument('--maps', action='store_true', help='ask for the maps alone')
    c.add_argument('--rooms', type=number(int, 2), default=96,
                   help='held-out rooms, rounded up to fours (96)')

    c = command(ask, 'a question about your own pictures')
    c.add_argument('--run', default='out/vlm-small', help='a run of finetune.py')
    c.add_argument('--images', nargs='+', default=[], help='files')
    c.add_argument('--video', default='', help='a file (needs PyAV) or a folder of frames')
    c.add_argument('--frames', type=number(int, 0), default=0, help='(default: as in training)')
    c.add_argument('--question', required=True, help='in words that the VLM knows')

    c = command(export, 'a fine-tuned VLM as a folder for transformers, LoRA merged into it')
    c.add_argument('--run', default='out/vlm-small', help='a run of finetune.py')
    c.add_argument('--out', required=True, help='the folder to write')

    for name, of in BENCHMARKS.items():
        c = command(benchmark, f'{of.title}: a folder with the files of the hub, or its id', name)
        c.add_argument('--data', required=True, help='the folder, or an id on the hub')
        c.add_argument('--run', default='out/vlm-small', help='a run of finetune.py')
        if name == 'vsibench':
            c.add_argument('--subset', default='full', choices=['full', 'debiased', 'pruned'],
                           help='debiased: without the questions that need no looking (pruned)')
        c.add_argument('--tasks', nargs='+', default=[], help='only these')
        c.add_argument('--limit', type=number(int, 0), default=0, help='a sample of so many')
        c.add_argument('--frames', type=number(int, 1), default=32, help='of a video (32)')
        c.add_argument('--batch', type=number(int, 1), default=1, help='questions at once (1)')
        c.add_argument('--max-pixels', type=number(int, 0), default=0,
                       help='of a picture, at most (default: as in training)')
        c.add_argument('--predictions', default='',
                       help='score these answers (JSONL with key and output) without a model')
        c.add_argument('--out', default='', help='folder for the answers (default: the run)')
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.function(args)


if __name__ == '__main__':
    run_script(main)
