"""The style frontier against hand-worked mixtures and brute force."""

import itertools

import numpy as np
import pytest

from eval.style_frontier import StyleFrontier, measure_points, upper_hull


def test_hull_by_hand():
    assert upper_hull([(3, 1.0), (0, 0.0), (2, 0.6), (1, 0.5)]) == [(0, 0.0), (1, 0.5), (3, 1.0)]
    assert upper_hull([(0, 0.0), (2, 0.9), (5, 0.4)]) == [(0, 0.0), (2, 0.9)]


def test_frontier_by_hand():
    # Easy: 2 tokens give 1. Hard: 2 tokens give .2, 10 tokens give 1 (slope .1 all along).
    frontier = StyleFrontier.from_points({1: {"direct": (2.0, 1.0)}, 7: {"direct": (2.0, 0.2), "careful": (10.0, 1.0)}})
    assert frontier.tokens.tolist() == [0.0, 1.0, 6.0]
    assert frontier.accuracies.tolist() == [0.0, 0.5, 1.0]
    assert frontier.floors == {1: 2.0, 7: 10.0}
    assert frontier.accuracy(3.5) == pytest.approx(0.75)
    assert frontier.accuracy(100.0) == pytest.approx(1.0)


def test_no_mixture_lies_above_the_frontier():
    rng = np.random.default_rng(0)
    points = {d: {s: (float(rng.uniform(1, 20)), float(rng.uniform())) for s in "abc"} for d in (1, 2, 3)}
    frontier = StyleFrontier.from_points(points)
    pure = [
        np.mean(choice, axis=0) for choice in itertools.product(*(list(styles.values()) for styles in points.values()))
    ]
    for tokens, accuracy in pure:
        assert accuracy <= frontier.accuracy(tokens) + 1e-12
    for tokens, accuracy in (rng.dirichlet(np.ones(len(pure))) @ np.array(pure) for _ in range(200)):
        assert accuracy <= frontier.accuracy(tokens) + 1e-12


def test_points_are_means_per_style_and_difficulty():
    points = measure_points(
        [1, 1, 1, 3], ["direct", "direct", "plain", "plain"], [2, 2, 4, 6], [True, False, True, True]
    )
    assert points == {1: {"direct": (2.0, 0.5), "plain": (4.0, 1.0)}, 3: {"plain": (6.0, 1.0)}}
