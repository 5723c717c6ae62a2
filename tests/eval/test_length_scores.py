"""LIFEBench's scores against numbers worked by hand, and what counts as repetition."""

import math

import numpy as np
import pytest

from eval.length_scores import distinct_share, length_deviation, length_score, repetition_rate


def test_deviation_by_hand():
    assert length_deviation([0, 16, 32, 48, 96], 32).tolist() == [-1.0, -0.5, 0.0, 0.5, 2.0]
    assert length_deviation([10, 10], [20, 5]).tolist() == [-0.5, 1.0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Lengths 0, 24, 30, 32, 40, 64 for a target of 32: LD is -1, -1/4, -1/16, 0, 1/4, 1.
        ("equal_to", [0.6738, 28.6505, 73.1616, 100.0, 60.6531, 13.5335]),
        ("at_most", [100.0, 100.0, 100.0, 100.0, 60.6531, 13.5335]),
        ("at_least", [0.6738, 28.6505, 73.1616, 100.0, 100.0, 100.0]),
    ],
)
def test_scores_by_hand(mode, expected):
    np.testing.assert_allclose(length_score([0, 24, 30, 32, 40, 64], 32, mode), expected, atol=1e-4)


def test_too_short_costs_more_than_too_long():
    short, long = length_score([90, 110], 100, "equal_to")
    assert short == pytest.approx(100 * math.exp(-0.5)) and long == pytest.approx(100 * math.exp(-0.2))


@pytest.mark.parametrize(("lengths", "target"), [([3], 0), ([-1], 5)])
def test_impossible_lengths_are_refused(lengths, target):
    with pytest.raises(ValueError, match="at least 1 token"):
        length_deviation(lengths, target)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of equal_to"):
        length_score([3], 3, "tilt")


def test_repetition_by_hand():
    # 4-grams of abcabcab: abca bcab cabc abca bcab; two of five stood there before.
    assert repetition_rate([1, 2, 3, 1, 2, 3, 1, 2]) == pytest.approx(2 / 5)
    assert repetition_rate([7] * 10, n=1) == pytest.approx(0.9)
    assert repetition_rate([1, 2, 3, 4]) == 0.0
    assert repetition_rate([1, 1, 1]) == repetition_rate([]) == 0.0


def test_distinct_share_counts_over_all_texts():
    # Bigrams 12 23 and 12: two distinct of three.
    assert distinct_share([[1, 2, 3], [1, 2], [9]]) == pytest.approx(2 / 3)
    assert distinct_share([[], [5]]) is None
