"""
What all other files stand on: errors that say what to do, options, the machine, weights, and what
training loops share (processes, checkpoints, logs). The method is not here.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

PROCESSES = os.environ.get('WORLD_SIZE', '1')  # that torchrun started


class InputError(Exception):
    """The user's input is at fault. Scripts print the sentence and stop: no traceback."""


def run_script(main):
    """Runs `main` and turns every error that is not our bug into one sentence."""
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what cannot be printed
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    keep_freed_memory()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:           # nobody reads on; Python must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError, SafetensorError) as error:
        # the error of a data worker arrives with the worker's traceback in front of it
        sentence = str(error).split('common.InputError: ')[-1]
        sys.exit('error: ' + ' '.join(sentence.split()))
    except (RuntimeError, MemoryError) as error:
        message = str(error)
        if isinstance(error, MemoryError) or re.search(
                "out of memory|can't allocate memory|not enough memory", message):
            sys.exit('error: too little memory: take a smaller batch (--images-per-batch, --batch, '
                     '--images), fewer rooms (--num-rooms), or --checkpointing')
        if re.search(r'shared memory\(shm\)|DataLoader worker \(pid', message):
            sys.exit('error: a process that reads pictures was killed, or has too little memory '
                     '(/dev/shm; in Docker --shm-size): take fewer --workers, 0 for none')
        raise                         # our bug
    except KeyboardInterrupt:
        print('stopped; a training goes on from its last checkpoint with --resume', file=sys.stderr)
        sys.exit(130)


def command_of(script, argv=None):
    """The command line that makes something from its beginning: `argv`, or this process's own."""
    argv = sys.argv[1:] if argv is None else argv
    return shlex.join(['python', script, *(word for word in argv if word != '--resume')])


def first_line(error):
    """Of an error's message, or else its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def step_generator(*numbers):
    """A CPU generator that is a pure function of a few whole numbers (seed, step, rank, ...).
    Of up to four numbers, zeros at the end do not count: (1, 5) and (1, 5, 0, 0) are one stream."""
    seed = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


def find_file(path):
    """A path that exists as given, or else beside this file: shipped weights are found anywhere."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    return path if os.path.exists(path) or not os.path.exists(beside) else beside


def is_hub_id(name):
    """Whether a name that is no path here may be one of the hub: user/name."""
    return name.count('/') == 1 and not os.path.exists(name.split('/')[0]) \
        and not name.startswith(('.', '/', '~', 'out/', 'weights/')) \
        and not name.endswith(('.safetensors', '.ckpt', '/'))


def fetch(name, file=None, kind='model'):
    """A hub id -> the path of one file of it, or of a folder with all of them; fetched once."""
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        if file:
            return hf_hub_download(name, file, repo_type=kind)
        return snapshot_download(name, repo_type=kind)
    except Exception as error:
        raise InputError(f'{name} is neither a file nor a folder here, and the hub did not give it '
                         f'({type(error).__name__}: {first_line(error)}): check name, network and '
                         'access') from error


def read_json(path):
    """-> dict. Raises InputError with the path if the file is missing or holds no JSON object."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{path} cannot be read as JSON ({error})') from error
    if not isinstance(content, dict):
        raise InputError(f'{path} holds a {type(content).__name__}, not an object')
    return content


def write_json(path, content):
    """Replaces the file in one step: there is always a whole one, the old or the new."""
    with open(f'{path}.part', 'w', encoding='utf-8') as file:
        json.dump(content, file, indent=1)
    os.replace(f'{path}.part', path)


# -----------------------------------------------------------------------------
# options: the fields of a dataclass, each with its help and its range

def opt(default, help, low=None, high=None, choices=None, group=None):
    """A field of a Config. `group` is the title of the group of options that begins here."""
    metadata = dict(help=help, low=low, high=high, choices=choices, group=group)
    return dataclasses.field(default=default, metadata=metadata)


def check_value(option, value, low=None, high=None, choices=None):
    """Raises InputError if `value` is not one of `choices`, not a number in low .. high, or if it
    is a text with bytes that are not UTF-8."""
    if choices and value not in choices:
        raise InputError(f'{option} takes {" or ".join(choices)}, not {value}')
    if low is not None and not value >= low:  # also true of NaN
        raise InputError(f'{option} must be at least {low}, not {value}')
    if high is None:
        high = 10 ** 12 if isinstance(value, int) else 1e38  # what fits into the computer's numbers
    if low is not None and value > high:
        raise InputError(f'{option} must be at most {high}, not {value}')
    if isinstance(value, str) and value != value.encode('utf-8', 'ignore').decode():
        raise InputError(f'{option} {value} holds bytes that are not UTF-8; write it in UTF-8')


def number(kind, low=None, high=None):
    """The `type` of an argparse option that is a number between `low` and `high`."""
    def convert(text):
        value = kind(text)
        try:
            check_value('it', value, low, high)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value
    convert.__name__ = kind.__name__  # in argparse's "invalid int value"
    return convert


class Parser(argparse.ArgumentParser):
    """Keeps the line breaks of the script's docstring; says what an unknown option may mean."""

    def __init__(self, **settings):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=layout, **settings)

    def error(self, message):
        if message.startswith('unrecognized arguments: '):
            word = message.removeprefix('unrecognized arguments: ').split(' ')[0].split('=')[0]
            commands = [action.choices.values() for action in self._actions
                        if action.nargs == argparse.PARSER]
            parsers = [self, *itertools.chain(*commands)]
            known = {name for parser in parsers for name in parser._option_string_actions}
            near = difflib.get_close_matches(word, sorted(known), 3)
            hint = f'did you mean {" or ".join(near)}?' if near else 'see --help'
            message = f'no option {word}; {hint}'
        self.exit(2, f'error: {message}\n')


def parse_options(argv, doc, Config, presets, default='small'):
    """Command line -> (name of the preset, Config): the preset's values, then the given options.
    Raises InputError if a value is out of the range that its field declares."""
    parser = Parser(description=doc)
    parser.add_argument('--config', default=default, metavar='NAME',
                        help=f'a preset: {", ".join(presets)} (default: {default})')
    own = presets[default]
    for f in dataclasses.fields(Config):
        if f.metadata['group']:
            group = parser.add_argument_group(f.metadata['group'])
        kind = dict(type=f.type, metavar=f.type.__name__)
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        text = f'{f.metadata["help"]} (default: {own.get(f.name, f.default)!r})'.replace('%', '%%')
        group.add_argument('--' + f.name.replace('_', '-'), dest=f.name, help=text,
                           default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    name = given.pop('config')
    if name not in presets:
        near = difflib.get_close_matches(name, presets, 1)
        hint = f', did you mean {near[0]}?' if near else ''
        raise InputError(f'no preset {name!r}{hint}; there are {", ".join(presets)}')
    config = Config(**{**presets[name], **given})
    for f in dataclasses.fields(Config):
        allowed = {key: f.metadata[key] for key in ('low', 'high', 'choices')}
        check_value('--' + f.name.replace('_', '-'), getattr(config, f.name), **allowed)
    return name, config


# -----------------------------------------------------------------------------
# the machine

def pick_device(name):
    """'auto', or a name that torch knows and that is usable here -> torch.device."""
    if name == 'auto':
        has_mps = torch.backends.mps.is_available()
        name = 'cuda' if torch.cuda.is_available() else 'mps' if has_mps else 'cpu'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(f'--device {name} cannot be used here; take auto, cpu, cuda, cuda:1, ... '
                         'or mps, or leave it out to run on what there is') from error
    return device


def pick_dtype(name, device):
    """Autocast dtype, and the reason for it: bfloat16 where it is fast, measured on a CPU."""
    if name != 'auto':
        return getattr(torch, name), 'as asked, or as the run began'
    if device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, 'the GPU has it'
    if device.type != 'cpu':
        return torch.float32, f'bf16 is for GPUs that have it, and not for {device.type}'
    from torch.utils.benchmark import Timer  # takes a while to import
    # median time of a matrix product of the size that `small` spends its time in
    median = {}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = dict(a=torch.randn(2048, 128, dtype=dtype), b=torch.randn(128, 512, dtype=dtype))
        timer = Timer('a @ b', globals=tensors, num_threads=torch.get_num_threads())
        median[dtype] = timer.blocked_autorange(min_run_time=0.05).median
    ratio = median[torch.float32] / median[torch.bfloat16]
    dtype = torch.bfloat16 if ratio > 1.3 else torch.float32
    return dtype, f'measured: bf16 matrices are {ratio:.1f} x as fast as fp32 here'


# dense bf16 TFLOP/s by device name; the first match wins
PEAKS = [('GH200', 989), ('H200 NVL', 835), ('H200', 989), ('H100 NVL', 835), ('H100 PCIe', 756),
         ('H100', 989), ('A100', 312), ('L40S', 362), ('4090', 165), ('3090', 71)]


def peak_flops(device):
    """Peak FLOP/s, or None where it is not known. (An RTX A1000 is no A100.)"""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    found = [peak for key, peak in PEAKS if re.search(rf'\b{key}\b', name)]
    return 1e12 * found[0] if found else None


def autocast_on(device, dtype):
    """The autocast context of a run; does nothing for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Bytes at most: of the GPU, or of the process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == 'win32':
        return 0
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


def keep_freed_memory():
    """Linux gives freed memory back to the system, and each step pays for fresh pages: a tenth of
    its time on a CPU. This asks glibc to keep up to 2 GiB; other systems are left as they are."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 25)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def count_parameters(model):
    """-> how many are trained, how many are frozen"""
    return [sum(p.numel() for p in model.parameters() if p.requires_grad == is_trained)
            for is_trained in (True, False)]


def join_processes(device):
    """Joins the processes that torchrun started. -> rank, number of processes, own device."""
    if PROCESSES != '1' and 'MASTER_ADDR' not in os.environ:
        raise InputError(f'WORLD_SIZE is {PROCESSES}, but torchrun did not start this: start it '
                         'with torchrun, or unset WORLD_SIZE')
    rank, world_size = int(os.environ.get('RANK', 0)), int(PROCESSES)
    if world_size > 1 and device.startswith(('auto', 'cuda')) and torch.cuda.is_available():
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    device = pick_device(device)
    if world_size > 1 and device.type == 'cuda':
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # one process evaluates and writes while the others wait for it
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world_size, device


def leave_processes():
    """Waits for the others first: a thread of gloo still at work can make Python abort at exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# weights

def read_weights(path):
    """A .safetensors file -> state (name -> tensor), metadata. InputError if it is not whole."""
    try:
        with safe_open(find_file(path), 'pt') as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f'{path} is not a .safetensors file, or not whole ({error})') from error
    except OSError as error:
        raise InputError(f'no weights at {path} ({error})') from error


def without_prefix(state, prefix):
    """The part of a state whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def some(names):
    """A few of many names, for a message."""
    shown = ', '.join(sorted(names)[:4])
    return f'{shown}, ... ({len(names)} in all)' if len(names) > 4 else shown or 'none'


def load_strictly(module, state, source, skip=(), assign=False):
    """Loads `state` (name -> tensor): every name must match, but those that begin with `skip`.

    Raises InputError with the names that are missing or unexpected, or whose shapes differ.
    `source` is what the message calls the weights.
    """
    own = {name: x for name, x in module.state_dict().items() if not name.startswith(skip)}
    state = {name: x for name, x in state.items() if not name.startswith(skip)}
    misfit = f'{source} does not fit this {type(module).__name__}'
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unexpected:
        raise InputError(f'{misfit}: missing {some(missing)}; unexpected {some(unexpected)}')
    shapes = [name for name in own if state[name].shape != own[name].shape]
    if shapes:
        raise InputError(f'{misfit}: other shapes for {some(shapes)}')
    module.load_state_dict(state, strict=False, assign=assign)


# -----------------------------------------------------------------------------
# checkpoints: a folder with weights, optimizer.pt and state.json

def flush_to_disk(folder):
    """Waits until every file below `folder` is on the disk."""
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), 'r+b') as file:  # Windows flushes no other
                os.fsync(file.fileno())


def write_checkpoint(run, step, optimizers, config, dtype, metrics, save_model):
    """Writes `run`/checkpoint beside the one before, then swaps them: a whole one always exists.
    `save_model(folder)` writes the weights. `optimizers`: themselves, or their states."""
    folder, new, old = [os.path.join(run, f'checkpoint{end}') for end in ('', '.new', '.old')]
    state = dict(step=step, dtype=str(dtype).removeprefix('torch.'), processes=PROCESSES,
                 config=dataclasses.asdict(config), metrics=metrics)
    try:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)
        save_model(new)
        states = [optimizer if isinstance(optimizer, dict) else optimizer.state_dict()
                  for optimizer in optimizers]
        torch.save(states, os.path.join(new, 'optimizer.pt'))
        write_json(os.path.join(new, 'state.json'), state)
        flush_to_disk(new)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        hint = ('the one before is still there: make room, then --resume' if find_checkpoint(run)
                else 'make room, then start again')
        raise InputError(f'could not write the checkpoint of step {step} to {folder} ({error}); '
                         f'{hint}') from error
    # without `folder`, .old is the only whole checkpoint: it is deleted last
    if os.path.isdir(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    for before in (old, f'{folder}.earlier'):
        shutil.rmtree(before, ignore_errors=True)


def find_checkpoint(run):
    """The newest whole checkpoint of a run's folder, or None."""
    paths = [os.path.join(run, name) for name in ('checkpoint', 'checkpoint.old')]
    return next(filter(os.path.isdir, paths), None)


# options that may change between a run and its continuation
FREE = {'resume', 'out', 'device', 'eval_every', 'log_every', 'compile', 'steps', 'dtype',
        'workers', 'cache', 'checkpointing', 'skip_bad'}


def check_same(folder, theirs, config, free):
    """Raises InputError if what is in `folder` had other options; `free` ones may differ."""
    default = {field.name: field.default for field in dataclasses.fields(config)}
    theirs = {**default, **theirs}    # defaults of options that were added after the run
    differs = [f'{key} {theirs[key]} there, {ours} here'
               for key, ours in dataclasses.asdict(config).items()
               if key not in free and theirs[key] != ours]
    if differs:
        raise InputError(f'{folder} was trained with another configuration '
                         f'({"; ".join(differs[:4])}): give the same options, or another --out')


def read_state(config):
    """The state.json to resume from, with 'folder'; without --resume, the state of a new run.
    Refuses a finished run, and a checkpoint of another configuration: it says what differs."""
    if not config.resume:
        return dict(step=0, metrics={}, dtype=config.dtype, folder=None)
    folder = find_checkpoint(config.out)
    if not folder:
        raise InputError(f'--resume: no checkpoint in {config.out}; leave --resume out to begin')
    state = read_json(os.path.join(folder, 'state.json'))
    kinds = dict(step=int, dtype=str, config=dict, metrics=dict)
    is_state = all(type(state.get(key)) is kinds[key] for key in kinds)
    if not is_state or state['step'] < 0 or state['dtype'] not in ('float32', 'bfloat16') \
            or not isinstance(state['metrics'].get('seconds', 0), (int, float)):
        raise InputError(f'--resume: {folder}/state.json is not the state of a run')
    check_same(folder, state['config'], config, FREE)
    theirs = state.get('processes', '1')
    if theirs != PROCESSES:  # each draws its own samples
        raise InputError(f'--resume: {config.out} was trained by {theirs} processes, '
                         f'these are {PROCESSES}: start as many')
    if state['step'] >= (config.steps or state['config'].get('steps', 0)):
        raise InputError(f'--resume: {config.out} has had all {state["step"]} steps: '
                         'give a larger --steps')
    asked = dict(dtype=config.dtype) if config.dtype != 'auto' else {}
    return {**state, **asked, 'folder': folder}


# -----------------------------------------------------------------------------
# logs

def quiet(text):
    """Says nothing: `say` of every process but the first."""


def open_run(config, first, is_main):
    """A run's folder, with config.json, and log.jsonl with only the readable records up to step
    `first`. -> the log, open for writing. Refuses a folder that another run is writing to."""
    if not is_main:
        return open(os.devnull, 'w')
    os.makedirs(config.out, exist_ok=True)
    log = open(os.path.join(config.out, 'log.jsonl'), 'a+', 1, encoding='utf-8', errors='replace')
    try:
        import fcntl
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process closes log.jsonl
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f'another run is writing to {config.out}: take another --out') from error
    except (ImportError, OSError):    # Windows, or a file system without locks
        pass
    earlier = find_checkpoint(config.out)
    if first == 0 and earlier:        # of another run: set aside, until this one has its own
        aside = os.path.join(config.out, 'checkpoint.earlier')
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(earlier, aside)
        shutil.rmtree(os.path.join(config.out, 'checkpoint.old'), ignore_errors=True)
    kept = []
    log.seek(0)
    for line in log:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)['step'] <= first:
                kept.append(line)
    log.truncate(0)
    log.writelines(kept)
    write_json(os.path.join(config.out, 'config.json'), dataclasses.asdict(config))
    return log


def check_finite(losses, norm, parameters, step, config):
    """-> the losses as numbers. Stops before broken weights can replace good ones."""
    values = {key: value.item() for key, value in losses.items()}
    weights = sum(p.detach().float().sum() for p in parameters)
    weights = weights.full_tensor() if hasattr(weights, 'full_tensor') else weights  # of all shards
    if not math.isfinite(values['loss'] + norm.item() + weights.item()):
        raise InputError(f'step {step}: loss {values["loss"]}, gradient norm {norm.item()}, sum of '
                         f'the weights {weights.item()}: begin anew with a lower --lr, or go on '
                         f'from {config.out}/checkpoint with --resume --dtype float32')
    return values
