"""The facts that probes are asked for."""
import itertools

import torch

from probe import room_facts
from rooms import CATEGORIES, SEEN, K


def test_facts_of_rooms_are_those_of_their_object_lists(world):
    rooms, extrinsics, _, views = world
    surface = views['surface'][:, :5]
    facts = room_facts(rooms, surface, extrinsics[:, :5])
    for r in range(6):
        seen = [k for k in range(K) if (surface[r] == 6 + k).sum() >= SEEN]
        kinds = [CATEGORIES[rooms.category[r, k]] for k in seen]
        assert facts['objects'][r].item() == len(seen) > 0
        assert facts['sides'][r].tolist() == sorted(rooms.size[r, :2].tolist())
        assert facts['count'][r].tolist() == [kinds.count(name) for name in CATEGORIES]
        assert facts['presence'][r].tolist() == [name in kinds for name in CATEGORIES]

        # where the only piece of a category stands, in the first camera's frame
        places = {}
        for name, place in zip(CATEGORIES, facts['place'][r].view(-1, 3), strict=True):
            if kinds.count(name) == 1:
                center = rooms.center[r, seen[kinds.index(name)]]
                places[name] = extrinsics[r, 0] @ torch.cat([center, torch.ones(1)])
                assert torch.allclose(place, places[name], atol=1e-5)
            else:
                assert place.isnan().all()
        pairs = itertools.combinations(CATEGORIES, 2)
        for (a, b), distance in zip(pairs, facts['distance'][r], strict=True):
            if a in places and b in places:
                assert torch.isclose(distance, (places[a] - places[b]).norm(), atol=1e-5)
            else:
                assert distance.isnan()
