"""What the processes of a run bring together for a penalty that looks at more than one completion.

TRL calls a reward function on each process with that process's rows, and a group may begin on one and end on the next:
rows are in the order of processes, and a group's stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.reward_functions import exchanged, fails_together, process_index


@dataclass(frozen=True)
class Part:
    """What one process brings.

    Args:
        lengths (list of `int`): tokens of each of its completions.
        flags (list of `float`): 1, 0, or `None` where the completion is not counted.
        prompts (`Runs`): of the completions.
        knobs (mapping):
            Keyword arguments of the penalty. A tensor with a dimension has an entry for each counted completion.
    """

    lengths: list[int]
    flags: list[float | None]
    prompts: Runs
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class Runs:
    """Where equal prompts stand together, without the prompts between the first and the last: they may be large.

    Args:
        starts (list of `bool`): whether each prompt differs from the one before; `True` at the first.
        ends (list): the first and the last prompt, or nothing where there are none.
    """

    starts: list[bool]
    ends: list[Any]

    @classmethod
    def of(cls, prompts: Sequence) -> Runs:
        """The runs of one process's prompts."""
        starts = [True] * bool(len(prompts)) + [now != before for before, now in pairwise(prompts)]
        return cls(starts, [prompts[0], prompts[-1]] if starts else [])


def run_starts(parts: Sequence[Runs]) -> list[bool]:
    """Whether each prompt of all processes differs from the one before, a run that spans two of them being one."""
    starts, last = [], []
    for part in parts:
        if part.ends:
            begins = not last or part.ends[0] != last[0]
            starts += [begins, *part.starts[1:]]
            last = part.ends[1:]
    return starts


def knobs_of_all(parts: Sequence[Part]) -> dict[str, Any]:
    """The knobs for the counted completions of all processes."""

    def together(name: str, value: Any) -> Any:
        per_completion = isinstance(value, Tensor) and value.ndim > 0
        return torch.cat([part.knobs[name] for part in parts]) if per_completion else value

    return {name: together(name, value) for name, value in parts[0].knobs.items()}


def parts_of_all(make: Callable[[], Part]) -> tuple[list[Part], int]:
    """What `make` gives on each process, in their order, and the index of this one; every process has to call this.

    Raises:
        RuntimeError: it failed on another process ([`~lenvm_rl.reward_functions.fails_together`]).
    """
    with fails_together("The task reward of a length penalty"):
        part = make()
    return exchanged(part), process_index()
