"""Packing: every sequence in one row, no row over its capacity, little padding, and spans come out as they went in."""

import random

import pytest
import torch

from lenvm_rl.pretraining.batches import pack_lengths, padding_share, row_offsets, unpack


def test_rows_of_a_small_case_by_hand():
    # Two rows do. Dealt out, the longest first: 7 | 5, then 3 to the 5, 2 to the 7, 2 to the 5 + 3.
    assert sorted(pack_lengths([3, 7, 2, 5, 2], capacity=10)) == [[0, 3, 4], [1, 2]]


def test_rows_are_evened_out():
    # Best fit alone would fill one row with 4 + 4 and leave the other at 2 + 2.
    rows = pack_lengths([4, 4, 2, 2], capacity=8)
    assert [sum([4, 4, 2, 2][i] for i in row) for row in rows] == [6, 6]
    assert padding_share(rows, [4, 4, 2, 2]) == 0.0


def test_best_fit_is_kept_where_even_rows_do_not_fit():
    # Dealt out evenly, 5 5 | 4 4 4 takes 4 + 5 + 4 = 13 in one row of two; best fit finds 10 and 12.
    lengths = [5, 5, 4, 4, 4]
    rows = pack_lengths(lengths, capacity=12)
    assert sorted(sum(lengths[i] for i in row) for row in rows) == [10, 12]


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_row_within_capacity(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 60) for _ in range(300)]
    rows = pack_lengths(lengths, capacity=64)
    assert sorted(index for row in rows for index in row) == list(range(300))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    # Best-fit decreasing never needs more than 11/9 of the fewest rows, plus one.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) * 1.1 + 1
    assert rows == pack_lengths(lengths, capacity=64)


def test_ragged_batches_lose_little_to_padding():
    draw = random.Random(0)
    lengths = [20 + min(180, int(draw.expovariate(1 / 25))) for _ in range(64)]
    packed = padding_share(pack_lengths(lengths, 2 * max(lengths)), lengths)
    assert packed < 0.06 < 0.5 < 1 - sum(lengths) / (64 * max(lengths))


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_a_sequence_that_fits_no_row_is_refused(lengths):
    with pytest.raises(ValueError, match="Sequence 1 has"):
        pack_lengths(lengths, capacity=10)


def test_spans_come_out_of_rows_as_they_went_in():
    lengths = [3, 7, 2, 5, 2]
    rows = pack_lengths(lengths, capacity=10)
    row_of, first = row_offsets(rows, lengths)
    packed = torch.full((len(rows), 10), float("nan"))
    for index, length in enumerate(lengths):
        packed[row_of[index], first[index] : first[index] + length] = 100.0 * index + torch.arange(length)
    spans = unpack(packed, row_of, first, torch.tensor(lengths))
    assert spans.shape == (5, 7)
    for index, length in enumerate(lengths):
        assert spans[index, :length].tolist() == [100.0 * index + step for step in range(length)]
        assert spans[index, length:].tolist() == [0.0] * (7 - length)
