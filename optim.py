"""
What training loops step with: the learning rate's course, AdamW, Muon; their states; FSDP2.
"""
import contextlib
import math
import os

import torch

from common import InputError, first_line


def rate_share(step, config):
    """Share of the peak at `step`: linear warm-up, flat, then a cosine from `decay_from` on."""
    warmup = min(config.warmup, config.steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, config.decay_from * config.steps)
    progress = min(1.0, max(0.0, (step - start) / max(1, config.steps - start)))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (1 - config.min_lr) * cosine


def orthogonalise(matrices):
    """Moves the singular values of (n, r, c) towards 1: Muon's quintic Newton-Schulz, 5 times."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # x <- 3.4445 x + (-4.775 g + 2.0315 g g) x, with g = x x^T
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised direction (arXiv 2502.16982), scaled to AdamW's updates.
    Unlike in torch.optim.Muon, all matrices of one shape go together, in the run's `dtype`."""

    def __init__(self, params, lr, weight_decay, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed.checkpoint passes it; never used
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """One step of matrices of one shape."""
        directions = []
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
            momentum = self.state[p]['momentum']
            momentum.lerp_(p.grad, 1 - group['momentum'])
            directions.append(p.grad.lerp(momentum, group['momentum']))  # Nesterov
        directions = torch.stack(directions).to(self.dtype)  # (n, r, c)
        if hasattr(directions, 'redistribute'):  # sharded: gathered once, not in every product
            from torch.distributed.tensor import Replicate
            directions = directions.redistribute(placements=[Replicate()])
        scale = group['lr'] * 0.2 * max(params[0].shape) ** 0.5
        for p, update in zip(params, orthogonalise(directions)):
            p.mul_(1 - group['lr'] * group['weight_decay'])
            p.sub_(update, alpha=scale)


MUON_PLACES = ('blocks.', 'layers.', 'adapter.')  # whose matrices Muon takes


def make_optimizers(model, config, device, dtype=torch.float32, rate_of=None, fused=True):
    """AdamW and, if config.muon_lr > 0, Muon for the matrices of MUON_PLACES. -> list

    `rate_of`: name of a parameter -> its peak learning rate under AdamW (default: config.lr).
    Vectors (biases, the scales of norms) have no weight decay.
    """
    adam_groups, matrices = {}, []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if config.muon_lr > 0 and p.ndim == 2 and any(place in name for place in MUON_PLACES):
            matrices.append(p)
            continue
        lr = rate_of(name) if rate_of else config.lr
        decay = config.weight_decay if p.ndim >= 2 else 0.0
        adam_groups.setdefault((lr, decay), []).append(p)
    groups = [dict(params=params, lr=lr, weight_decay=decay)
              for (lr, decay), params in adam_groups.items()]
    fused = fused and device.type in ('cuda', 'cpu')
    optimizers = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=fused))
    if matrices:
        optimizers.append(Muon(matrices, config.muon_lr, config.weight_decay, dtype=dtype))
    return optimizers


def set_rates(optimizers, share):
    """Every group of parameters gets `share` of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = share * group.setdefault('peak', group['lr'])  # kept in checkpoints too


def take_step(optimizers, parameters, clip):
    """Clips the gradients, updates, clears the gradients. -> gradient norm, a tensor"""
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


@contextlib.contextmanager
def errors_of(path):
    """Turns errors inside into one sentence about a file of optimizers."""
    try:
        yield
    except Exception as error:  # of spoiled files, pickle raises whatever there is
        raise InputError(f'{path} does not hold the optimizers of this run '
                         f'({first_line(error)})') from error


def load_optimizers(optimizers, folder):
    """The optimizers' states from a checkpoint. Raises InputError if they do not fit."""
    path = os.path.join(folder, 'optimizer.pt')
    with errors_of(path):
        states = torch.load(path, map_location='cpu', weights_only=True)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
            for p, of_p in optimizer.state.items():
                if any(x.ndim and x.shape != p.shape for x in of_p.values()):
                    raise ValueError('other shapes')


# -----------------------------------------------------------------------------
# of a model that FSDP2 has sharded over processes

def shard_model(model):
    """FSDP2: each block of the language model is gathered when it runs, the rest with the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    kind = next(model.parameters()).device.type  # (by itself it would take a GPU, if there is one)
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    for layer in model.vlm.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gather(model, optimizers):
    """Of a sharded model, on the first process: its whole state, and its optimizers' states."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions, get_model_state_dict, get_optimizer_state_dict)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # the model first: this also ends what the last forward pass gathered
    state = get_model_state_dict(model, options=options)
    states = [get_optimizer_state_dict(model, optimizer, options=options)
              for optimizer in optimizers]
    return state, states


def load_sharded_optimizers(model, optimizers, folder):
    """The optimizers' states that `gather` gave; every process takes its part of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    path = os.path.join(folder, 'optimizer.pt')
    options = StateDictOptions(full_state_dict=True)
    with errors_of(path):
        states = torch.load(path, mmap=True, weights_only=True)
        for optimizer, state in zip(optimizers, states, strict=True):
            set_optimizer_state_dict(model, optimizer, state, options=options)
