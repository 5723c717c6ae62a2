"""What is read off a training curve: the criteria of `eval.compare`, fixed before any run.

A curve is a list of points, each an evaluation of the policy on the same prompts: `rollouts` that the training has
sampled so far, and the means `accuracy`, `tokens` and `excess` (tokens above what the cheapest good way of answering
needs at each difficulty: the waste).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Shares of the base policy's waste that have to be gone.
HALF, MOST = 0.5, 0.9
# Accuracy is kept where it is not further below the base policy's than this.
TOLERATED = 0.01
# A run is unsafe if it ever falls below this share of the base policy's accuracy.
SAFE = 0.9
# Evaluations that are averaged for what holds at the end.
LAST = 3

Point = Mapping[str, float]


@dataclass(frozen=True)
class Judged:
    """What a curve comes to.

    Args:
        until_half (`float`, *optional*): rollouts until half of the waste is gone at kept accuracy; `None` if never.
        until_most (`float`, *optional*): rollouts until nine tenths of it are.
        end_accuracy, end_tokens, end_excess (`float`): means of the last evaluations.
        kept (`bool`): whether the accuracy at the end is kept.
        unsafe (`bool`): whether it ever fell too far.
        critic_explained, end_critic_explained (`float`, *optional*): share of the returns' variance that the task
            critic explained, along the whole run, and at the end, where most returns are equal.
    """

    until_half: float | None
    until_most: float | None
    end_accuracy: float
    end_tokens: float
    end_excess: float
    kept: bool
    unsafe: bool
    critic_explained: float | None = None
    end_critic_explained: float | None = None


def rollouts_until(curve: Sequence[Point], start: Point, gone: float) -> float | None:
    """Rollouts until a share of the waste is gone, at the first evaluation that shows it at kept accuracy.

    Waste is taken to fall linearly between two evaluations, so the answer may lie before that evaluation; but not where
    the one before it had lost accuracy, for what was gone then was not gone at kept accuracy.

    Args:
        curve (sequence of mappings): the evaluations in order, without the start.
        start (mapping): the base policy, at 0 rollouts.
        gone (`float`): the share, in (0, 1).

    Example: waste 10 at the start, 6 after 100 rollouts and 2 after 200. Half of it is gone after 125.
    """
    target = (1.0 - gone) * start["excess"]
    lowest = start["accuracy"] - TOLERATED
    before = {**start, "rollouts": 0.0}
    for point in curve:
        if point["excess"] <= target and point["accuracy"] >= lowest:
            if before["excess"] <= target or before["accuracy"] < lowest:
                return point["rollouts"]
            share = (before["excess"] - target) / (before["excess"] - point["excess"])
            return before["rollouts"] + share * (point["rollouts"] - before["rollouts"])
        before = point
    return None


def judge_curve(curve: Sequence[Point], start: Point) -> Judged:
    """All criteria of a curve; `start` is the base policy's point."""
    last = curve[-LAST:]
    accuracy, tokens, excess = (
        sum(point[name] for point in last) / len(last) for name in ("accuracy", "tokens", "excess")
    )
    return Judged(
        until_half=rollouts_until(curve, start, HALF),
        until_most=rollouts_until(curve, start, MOST),
        end_accuracy=accuracy,
        end_tokens=tokens,
        end_excess=excess,
        kept=accuracy >= start["accuracy"] - TOLERATED,
        unsafe=any(point["accuracy"] < SAFE * start["accuracy"] for point in curve),
        critic_explained=_explained(curve),
        end_critic_explained=_explained(last),
    )


def _explained(points: Sequence[Point]) -> float | None:
    known = [point["critic_explained"] for point in points if "critic_explained" in point]
    return sum(known) / len(known) if known else None


def tokens_until(curve: Sequence[Point], start: Point, rollouts: float) -> float:
    """Tokens that a training has sampled after so many rollouts, the mean length between evaluations being linear.

    Example: 30 tokens at the start and 20 after 100 rollouts are 2500 tokens, and 27.5 x 50 = 1375 after 50 of them.
    """
    total, before = 0.0, {**start, "rollouts": 0.0}
    for point in curve:
        span = min(point["rollouts"], rollouts) - before["rollouts"]
        if span <= 0:
            break
        slope = (point["tokens"] - before["tokens"]) / (point["rollouts"] - before["rollouts"])
        total += span * (before["tokens"] + slope * span / 2)
        before = point
    return total


def answers_to_break_even(forwards: float, base_tokens: float, tokens: float) -> float | None:
    """Answers after which a training has paid for itself, in forwards of a model of the policy's size over a token.

    Each answer of the trained policy saves the tokens that the base policy's has more; `None` if it has none.

    Example: 160 000 forwards, 30 tokens to an answer before and 14 after: 10 000 answers.
    """
    saved = base_tokens - tokens
    return forwards / saved if saved > 0 else None


def area_between(curve: Sequence[tuple[float, float]], rival: Sequence[tuple[float, float]]) -> float | None:
    """How much more accurate one curve is than another at the same mean length: the mean over the lengths of both.

    Args:
        curve, rival (sequences of pairs): tokens and accuracy of each point, in any order. Between points accuracy is
            linear in tokens, and points of the same tokens are one, at the mean of their accuracies.

    Returns:
        `float`: the area between the curves over the tokens that both reach, divided by the range of these; `None`
        where they reach none in common.

    Example: (10, 0.8) and (20, 1) beside (15, 0.6) and (30, 0.6). From 15 to 20 the first rises from 0.9 to 1, so it is
    0.35 above the other.
    """
    (tokens, accuracy), (other_tokens, other_accuracy) = map(_as_function, (curve, rival))
    low, high = max(tokens[0], other_tokens[0]), min(tokens[-1], other_tokens[-1])
    if low >= high:
        return None
    knots = np.unique(np.clip(np.concatenate([tokens, other_tokens]), low, high))
    above = np.interp(knots, tokens, accuracy) - np.interp(knots, other_tokens, other_accuracy)
    return float(np.trapezoid(above, knots) / (high - low))


def _as_function(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in their order, each once, and the mean accuracy at each."""
    tokens, accuracy = np.array(points, dtype=float).T
    every, place = np.unique(tokens, return_inverse=True)
    return every, np.bincount(place, accuracy) / np.bincount(place)
