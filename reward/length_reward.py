"""The base of the length penalties as TRL reward functions: what is called, counted, grouped and brought together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from lenvm_rl.endings import end_token_ids, own_length
from lenvm_rl.reward_functions import (
    accepted,
    callable_at,
    check_returned,
    is_asynchronous,
    name_of,
    number_of_processes,
)
from reward.processes import Part, Runs, knobs_of_all, parts_of_all, run_starts

logger = logging.getLogger(__name__)


class LengthReward:
    """A TRL reward function made of a task reward and a length penalty. Picklable where the task reward is.

    Completions of one prompt must stand together, as TRL has them: runs of equal prompts are the groups, unless their
    size is known (`num_generations`). A group may span processes: a penalty that looks at more than one completion
    (its `scope`) brings the rows of all together, so every process has to call it.

    Lengths are counted in `completion_ids`. End-of-sequence counts unless `eos_token_ids` are given: a reward function
    is not told what ends a completion, so without them a target of 100 tokens leaves room for 99 and an end.

    Tool output and environment text are not the policy's, and do not count where it is known which tokens they are: the
    trainers of `lenvm_rl` say so with the keyword `tool_mask`, and a `rollout_func` may return a list of that name.
    TRL's own `GRPOTrainer` does not tell reward functions, so there they count; where messages of a tool can be seen in
    the completions, a warning says so.

    Attributes:
        unshaped_flags (list of `float` or `None`):
            What the task reward said in the last call on this process: 1 for correct, 0 for wrong, `None` where it does
            not apply; `None` before any call ([`lenvm_rl.reward_functions.ShapedReward`]).

    Args:
        task_reward (`Callable` or `str`):
            TRL reward function, or its dotted path, that returns 0 or 1 for each completion, or `None` where it does
            not apply; such completions get `None` and are left out of their group. Functions, lambdas, bound methods,
            `functools.partial`s and objects that can be called will do; asynchronous ones will not.
        threshold (`float`, *optional*):
            For a task reward that is not 0 or 1: a completion is correct where it is above this. The penalty then pays
            for being correct, not for the number.
        num_generations (`int`, *optional*):
            Size of each group, which keeps two equal prompts in a row apart. Prompts that do not come in whole groups
            of this size are an error. The trainers of `lenvm_rl` say the size with each call, in evaluation the one of
            evaluation, and what they say counts.
        eos_token_ids (`int` or collection of `int`, *optional*):
            Tokens that end a completion; where the policy chose one as the last, it is not counted.
        knobs: keyword arguments of the penalty.

    A penalty of your own is a subclass with a `name`, a `penalty`, and if they differ from these a `scope` and a
    `least_generations`.
    """

    name = "length"
    penalty: Callable[..., Tensor]
    # What a completion's reward depends on: itself alone ("completion"; `group` is then `None`), the completions of its
    # prompt ("group"), or a state that all completions of a batch move ("batch").
    scope: Literal["completion", "group", "batch"] = "group"
    # With fewer completions of a prompt, length makes no difference.
    least_generations = 1

    def __init__(
        self,
        task_reward: Callable | str,
        *,
        threshold: float | None = None,
        num_generations: int | None = None,
        eos_token_ids: int | Collection[int] | None = None,
        **knobs,
    ):
        task_reward = callable_at(task_reward) if isinstance(task_reward, str) else task_reward
        if not callable(task_reward) or isinstance(task_reward, (type, torch.nn.Module)):
            kind = task_reward.__name__ if isinstance(task_reward, type) else type(task_reward).__name__
            raise ValueError(f"task_reward must be a TRL reward function that returns flags, got {kind}.")
        if is_asynchronous(task_reward):
            raise ValueError("task_reward is asynchronous: a length penalty needs an ordinary function.")
        self.task_reward = task_reward
        self.threshold = threshold
        self.num_generations = num_generations
        self.eos_token_ids = frozenset(end_token_ids(None, eos_token_ids))
        self.knobs = knobs
        self.unshaped_flags: list[float | None] | None = None
        self.__name__ = f"{name_of(task_reward)}_{self.name}"
        self._warned: set[str] = set()
        if num_generations is not None and num_generations < self.least_generations:
            raise ValueError(
                f"num_generations must be at least {self.least_generations} for {type(self).__name__}, "
                f"got {num_generations}{self._alone}."
            )
        # Wrong knobs are an error here rather than in the first training step.
        empty = torch.zeros(0)
        type(self).penalty(empty, empty, empty.long(), **self._knobs([], {}))

    def __call__(self, prompts: Sequence, completions: Sequence, completion_ids: Sequence, **columns) -> list:
        """Rewards of the completions, in order; `None` where the task reward is `None`."""
        self.unshaped_flags = None

        def own() -> Part:
            return self._part(prompts, completions, completion_ids, columns)

        parts, index = ([own()], 0) if self.scope == "completion" else parts_of_all(own)
        lengths = [length for part in parts for length in part.lengths]
        flags = [flag for part in parts for flag in part.flags]
        counted = [row for row, flag in enumerate(flags) if flag is not None]
        group = None
        if self.scope == "group":
            groups = self._groups(len(flags), run_starts([part.prompts for part in parts]), columns)
            group = torch.tensor([groups[row] for row in counted], dtype=torch.long)
        rewards = self._shaped(
            torch.tensor([lengths[row] for row in counted]),
            torch.tensor([flags[row] for row in counted]),
            group,
            knobs_of_all(parts),
        )
        self._move(lengths)
        result: list[float | None] = [None] * len(flags)
        for row, reward in zip(counted, rewards.tolist(), strict=True):
            result[row] = reward
        first = sum(len(part.flags) for part in parts[:index])
        return result[first : first + len(parts[index].flags)]

    def _part(self, prompts: Sequence, completions: Sequence, completion_ids: Sequence, columns: Mapping) -> Part:
        """What this process's completions bring."""
        further = {name: columns[name] for name in ("num_generations", "tool_mask") if name in columns}
        told = {name: column for name, column in columns.items() if name not in further}
        told |= accepted(self.task_reward, further)
        returned = self.task_reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **told)
        paid = check_returned(returned, name_of(self.task_reward), len(completion_ids))
        paid = [None if flag is None else float(flag) for flag in paid]
        flags = paid
        if self.threshold is not None:
            flags = [None if flag is None else float(flag > self.threshold) for flag in paid]
        self.unshaped_flags = list(flags)
        scored = [flag for flag in paid if flag is not None]
        if scored:
            # TRL averages over what all processes log: so often that each completion counts once.
            times = 1 if number_of_processes() == 1 else len(scored)
            self._log(columns, "unshaped", sum(scored) / len(scored), times)
        return Part(
            self._lengths(completions, completion_ids, columns.get("tool_mask")),
            flags,
            Runs.of(prompts if self.scope == "group" and self._size_by_place(columns) is None else []),
            self._knobs([row for row, flag in enumerate(flags) if flag is not None], columns),
        )

    def _shaped(self, lengths: Tensor, correct: Tensor, group: Tensor | None, knobs: Mapping[str, Any]) -> Tensor:
        """Rewards of the counted completions, of all processes unless the scope is a completion."""
        return type(self).penalty(lengths, correct, group, **knobs)

    def _move(self, lengths: Sequence[int]) -> None:
        """Called after each call with the lengths of all completions in its scope, those without a flag too."""

    def _knobs(self, counted: Sequence[int], columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keyword arguments of the penalty for this process's counted completions; for none, before there are any."""
        return self.knobs

    def _lengths(self, completions: Sequence, completion_ids: Sequence, tool_mask: Sequence | None) -> list[int]:
        """Tokens of each completion that the policy wrote."""
        if tool_mask is None:
            if any(_has_tool_output(completion) for completion in completions):
                self._warn(
                    "tool_mask",
                    "the completions hold messages of a tool, which count as length since no `tool_mask` says which "
                    "tokens are the policy's: train with LenVMGRPOTrainer or LenVMPPOTrainer, which pass it.",
                )
            return [own_length(ids, self.eos_token_ids) for ids in completion_ids]
        tokens, mask = [len(ids) for ids in completion_ids], [len(row) for row in tool_mask]
        if tokens != mask:
            raise ValueError(
                f"tool_mask must hold a 0 or 1 for each token of each completion, {tokens} of them, but holds {mask}."
            )
        return [own_length(ids, self.eos_token_ids, row) for ids, row in zip(completion_ids, tool_mask, strict=True)]

    def _size_by_place(self, columns: Mapping[str, Any]) -> int | None:
        """Size of the groups where it is the places of rows, not their prompts, that say which group they are of."""
        told = columns.get("num_generations")
        # A column of the dataset may be called the same.
        if isinstance(told, int):
            return told
        # What environments write into the prompts may differ within a group.
        return self.num_generations if "environments" in columns else None

    def _groups(self, rows: int, starts: Sequence[bool], columns: Mapping[str, Any]) -> list[int]:
        """The number of the group that each of `rows` completions stands in."""
        by_place = self._size_by_place(columns)
        size = self.num_generations if by_place is None else by_place
        if size is None:
            groups = [number - 1 for number in accumulate(map(int, starts))]
            sizes = sorted(set(Counter(groups).values()))
            if len(sizes) > 1 or "environments" in columns:
                self._warn(
                    "sizes",
                    f"groups are told apart by their prompts, and have {', '.join(map(str, sizes))} completions: equal "
                    "prompts side by side are taken for one group, and one whose prompts differ, for several. Give "
                    "num_generations.",
                )
        else:
            if rows % size or (by_place is None and any(starts[row] for row in range(rows) if row % size)):
                raise ValueError(
                    f"The completions do not come in whole groups of num_generations={size}: TRL has those of a prompt "
                    "together, over all processes, so do not reorder them. If it is an evaluation that has groups of "
                    "another size, leave num_generations out."
                )
            groups = [row // size for row in range(rows)]
        if self.least_generations > 1 and rows and len(set(groups)) == rows:
            self._warn("alone", f"there is one completion of each prompt{self._alone}.")
        return groups

    @property
    def _alone(self) -> str:
        compares = self.least_generations > 1
        return ", which has nothing to be compared with, so that its length makes no difference" if compares else ""

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s: %s", self.__name__, message)

    def _log(self, columns: Mapping[str, Any], name: str, value: float, times: int = 1) -> None:
        # TRL's trainers pass `log_metric`; other callers, such as the programs under eval/, have no log.
        if "log_metric" in columns:
            for _ in range(times):
                columns["log_metric"](f"{self.__name__}/{name}", value)


def _has_tool_output(completion: Any) -> bool:
    chat = completion if isinstance(completion, Sequence) and not isinstance(completion, str) else []
    return any(isinstance(message, Mapping) and message.get("role") == "tool" for message in chat)
