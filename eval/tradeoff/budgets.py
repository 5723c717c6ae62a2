"""Accuracy under a token budget: how many answers are right where every completion is cut off after so many tokens.

The base policy under a budget is what a hard limit makes of it, at every limit; the other arms are cut at the same
limits. What is left of a completion is graded anew: the answer may stand in it already, or be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.report import as_entry
from eval.statistics import mean_interval
from eval.tradeoff.sampler import Arm

# Arms that are looked at under budgets of their own.
CUT_ALREADY = "truncation"
NUM_BUDGETS = 10

Grade = Callable[[Sequence[list[int]], Sequence[int]], tuple[np.ndarray, np.ndarray]]


def budget_grid(arms: Sequence[Arm], count: int = NUM_BUDGETS) -> list[int]:
    """Budgets in even steps of their logarithm, from half the shortest arm's median to the longest completion."""
    shortest = max(1.0, min(np.median(arm.lengths) for arm in arms) / 2)
    longest = max(shortest, max(arm.lengths.max() for arm in arms))
    return sorted({int(round(budget)) for budget in np.geomspace(shortest, longest, count)})


def graded_within(arm: Arm, budget: int, grade: Grade) -> tuple[np.ndarray, np.ndarray]:
    """Which completions are right and which are graded, cut off after `budget` tokens; one of exactly so many still
    ends, since lengths do not count the end.

    Args:
        arm ([`~eval.tradeoff.sampler.Arm`]): its completions.
        budget (`int`): tokens.
        grade (`Callable`): grades ids of completions of prompts, see [`~eval.graded.grade`].

    Returns:
        Two boolean arrays of shape `(N,)`.
    """
    kept = arm.lengths <= budget
    if kept.all():
        return arm.correct, arm.is_graded
    cut = [ids if whole else ids[:budget] for ids, whole in zip(arm.completions, kept, strict=True)]
    return grade(cut, arm.prompt.tolist())


def budget_curves(arms: Sequence[Arm], graders: Callable[[Arm], Grade], seed: int) -> dict[str, Any]:
    """`{"budgets", "accuracy"}`: for each arm, by name, the accuracy within each budget, with intervals over prompts.

    Args:
        arms (sequence of [`~eval.tradeoff.sampler.Arm`]): arms of a hard limit are left out, being the base's curve.
        graders (`Callable`): what grades the completions of an arm.
        seed (`int`): of the bootstrap.
    """
    whole = [arm for arm in arms if arm.kind != CUT_ALREADY]
    budgets = budget_grid(whole)
    accuracy = {}
    for arm in whole:
        found = [graded_within(arm, budget, graders(arm)) for budget in budgets]
        accuracy[arm.name] = [
            as_entry(mean_interval(correct.astype(float), arm.prompt, graded.astype(float), seed=seed))
            for correct, graded in found
        ]
    return {"budgets": budgets, "accuracy": accuracy}


def widest_lead(curves: dict[str, Any], names: Sequence[str], over: str) -> tuple[str, int] | None:
    """The arm among `names`, and the budget, at which accuracy is furthest above that of the arm `over`; `None` where
    it never is."""
    theirs = [entry["estimate"] for entry in curves["accuracy"][over]]
    leads = [
        (entry["estimate"] - other, name, budget)
        for name in names
        for entry, other, budget in zip(curves["accuracy"][name], theirs, curves["budgets"], strict=True)
        if entry["estimate"] is not None and other is not None
    ]
    best = max(leads, key=lambda lead: lead[0], default=(0.0, "", 0))
    return best[1:] if best[0] > 0 else None
