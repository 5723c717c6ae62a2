"""The pool of keys and values, and which rows share a call of the attention."""

import random
from array import array

import pytest
import torch

from lenvm_rl.decoding.token_cache import FEW_CELLS, PADDING, PackedForward, Segment, TokenCache


def segment(read, follow, candidates, start=1):
    return Segment(array("q", range(start, start + read + follow + candidates)), read, follow, candidates)


def test_what_each_token_sees():
    """A prefix of two, two tokens that follow and two candidates: places 1 to 6, and what stands at 0 is padding."""
    (group,) = PackedForward([segment(2, 2, 2), segment(3, 0, 1, start=10)], torch.device("cpu")).groups
    assert group.keys.tolist() == [[1, 2, 3, 4, 5, 6], [10, 11, 12, 13, 0, 0]]
    assert group.queries.tolist() == [[0, 1, 2, 3], [4, 0, 0, 0]]
    assert group.cells.tolist() == [0, 1, 2, 3, 4] and group.places.tolist() == [0, 1, 2, 3, 4]
    assert group.seen[0].int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 1],
    ]
    assert group.seen[1, 0].int().tolist() == [1, 1, 1, 1, 0, 0]
    # Queries that do not exist see something, so that nothing is divided by zero.
    assert bool(group.seen.any(dim=2).all())


@pytest.mark.parametrize("seed", range(20))
def test_the_padding_of_a_call_is_bounded(seed):
    random.seed(seed)
    sizes = [(random.choice([0, 30, 800]), random.choice([0, 0, 3, 200]), random.randint(1, 16)) for _ in range(40)]
    segments = [segment(*size) for size in sizes]
    groups = PackedForward(segments, torch.device("cpu")).groups
    needed = []
    for group in groups:
        cells = int((group.keys.ne(0).sum(dim=1) * _queries(group)).sum())
        needed.append(cells)
        assert group.seen.numel() <= max(FEW_CELLS, PADDING * cells)
    assert sum(needed) == sum((follow + few) * (read + follow + few) for read, follow, few in sizes)
    # Every token is asked for once.
    asked = torch.cat([group.places for group in groups])
    assert sorted(asked.tolist()) == list(range(sum(follow + few for _, follow, few in sizes)))


def _queries(group):
    width = group.queries.shape[1]
    return torch.bincount(group.cells // width, minlength=group.queries.shape[0])


def test_rows_of_one_size_share_a_call():
    assert len(PackedForward([segment(500, 0, 15)] * 64, torch.device("cpu")).groups) == 1


def test_places_are_given_once():
    cache, taken = TokenCache(torch.nn.Linear(1, 1), max_tokens=300), []
    random.seed(0)
    for _ in range(200):
        if taken and random.random() < 0.5:
            cache.give_back(taken.pop(random.randrange(len(taken))))
        elif cache.left >= 40:
            taken.append(cache.take(random.randint(1, 40)))
        held = [place for places in taken for place in places]
        assert len(held) == len(set(held)) == cache.held == 300 - cache.left
        assert all(1 <= place < cache.capacity <= 301 for place in held)
