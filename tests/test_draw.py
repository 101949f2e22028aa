"""The path of cameras that a film is seen from."""
import torch

from draw import make_path
from model import invert_pose
from rooms import make_intrinsics, make_rooms, render


def test_a_path_stays_inside_clear_of_furniture_and_closes():
    rooms = make_rooms(40, seed=11)
    extrinsics = make_path(rooms, 36)
    eye = invert_pose(extrinsics)[..., 3]
    assert (eye[..., :2].abs() < rooms.size[:, None, :2] / 2 - 0.3).all()
    stride = (eye - eye.roll(1, 1)).norm(dim=-1)  # the last step leads back to the first
    assert 0.01 < stride.min() and stride.max() < 0.8
    is_tall = rooms.present & (rooms.center[..., 2] + rooms.half[..., 2] > 1.2)
    gap = torch.cdist(eye[..., :2], rooms.center[..., :2])
    gap = gap - rooms.half[:, None, :, :2].norm(dim=-1)
    is_blocked = (gap.masked_fill(~is_tall[:, None], 9.0) < 0).flatten(1).any(1)
    assert is_blocked.float().mean() < 0.2  # a room can be too full for any ellipse
    views = render(rooms, extrinsics, make_intrinsics((8, 8), 40, 36), (8, 8))
    assert (views['depth'] > 0.05).all()
