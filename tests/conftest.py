import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes more than about 8 seconds on one core')
    config.addinivalue_line('markers', 'gpu: needs a CUDA GPU')


@pytest.fixture(scope='session')
def world():
    """Six rooms and a walk through each. -> Rooms, extrinsics, intrinsics, what `render` gives"""
    from rooms import make_intrinsics, make_rooms, make_walk, render
    size = 24, 32
    rooms = make_rooms(6, seed=5)
    extrinsics = make_walk(rooms, 8, seed=5)
    intrinsics = make_intrinsics(size, 6, 8)
    return rooms, extrinsics, intrinsics, render(rooms, extrinsics, intrinsics, size)


@pytest.fixture
def restored_compiler(monkeypatch):
    """Nothing is compiled yet. After the test, undoes what compile_blocks sets globally, except
    Dynamo's options."""
    from torch import _dynamo
    from torch._functorch import config
    import model
    _dynamo.reset()
    monkeypatch.setattr(model, 'split_attention', model.split_attention)
    with config.patch(backward_pass_autocast=config.backward_pass_autocast):
        yield
