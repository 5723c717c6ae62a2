"""Gold answers that a reward function cannot grade by, named before a run starts."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lenvm_rl.reward_functions import judge_of, unwrapped
from reward.exact_match import ExactMatchReward

# Task rewards by module and name, each with the columns that it reads gold answers from: the first that is there. The
# module has a function `unreadable_golds`.
GRADERS = {("reward.gsm8k", "gsm8k_reward"): ("answer",), ("reward.mathematics", "math_reward"): ("answer", "solution")}
# How many of the bad rows an error shows.
SHOWN = 5


def check_golds(reward_funcs: Iterable[Any], columns: Dataset | Mapping[str, Sequence]) -> None:
    """Raise an error if a reward function cannot grade by a gold answer of a dataset.

    For a program to call before its first stage: a reward function meets a gold answer only when its row is sampled.
    Length penalties are asked about the task reward inside them. Functions not of this package, and reward models, are
    passed over.

    Args:
        reward_funcs (iterable): what TRL takes for `reward_funcs`.
        columns (`datasets.Dataset`, or mapping of `str` to sequences): the dataset, or its columns by name.

    Raises:
        ValueError: a column is absent, or gold answers cannot be read: it names the function, the column and the rows.
    """
    names = columns.column_names if isinstance(columns, Dataset) else list(columns)
    for reward in reward_funcs:
        name, wanted, unreadable_golds = _grader(reward)
        if unreadable_golds is None:
            continue
        column = next((column for column in wanted if column in names), None)
        if column is None:
            raise ValueError(
                f"{name} reads gold answers from the column {' or '.join(map(repr, wanted))}, but the dataset has "
                f"{names}: rename the column that holds them."
            )
        golds = list(columns[column])
        unreadable = set(unreadable_golds(golds))
        if unreadable:
            rows = [row for row, gold in enumerate(golds) if str(gold) in unreadable]
            shown = ", ".join(f"row {row}: {str(golds[row])[-80:]!r}" for row in rows[:SHOWN])
            raise ValueError(
                f"{name} cannot grade by {len(rows)} of {len(golds)} gold answers in the column {column!r} ({shown}"
                f"{', …' if len(rows) > SHOWN else ''}): write them in another way, or leave these rows out."
            )


def _grader(reward: Any) -> tuple[str, Sequence[str], Callable[[Iterable], list[str]] | None]:
    """The name of a task reward, the columns that may hold its gold answers, and what finds bad ones, if known."""
    reward = unwrapped(judge_of(reward))
    if isinstance(reward, ExactMatchReward):
        return reward.__name__, (reward.column,), reward.unreadable_golds
    key = (reward.__module__, reward.__qualname__) if inspect.isfunction(reward) else None
    if key not in GRADERS:
        return "", (), None
    return reward.__name__, GRADERS[key], importlib.import_module(key[0]).unreadable_golds
