"""Sequence-level length penalties as TRL reward functions: a rule of [`reward.rules`] around a task reward.

Ready-made ones are in `reward.baselines`. With knobs of your own, write a module and give its dotted path:

    from reward.gsm8k import gsm8k_reward
    from reward.length_reward import LengthReward

    gsm8k_gr3 = LengthReward("gr3", gsm8k_reward, alpha=0.2)

Keep the unshaped reward in view: give TRL the task reward too (with weight 0 in `reward_weights` where the penalty
already contains it), and filter and evaluate on that. Each penalty also logs its mean, as `<name>/unshaped`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.endings import end_token_ids, own_length
from lenvm_rl.reward_functions import (
    accepted,
    check_returned,
    exchanged,
    fails_together,
    is_asynchronous,
    load_reward,
    name_of,
    number_of_processes,
    process_index,
)
from reward.rules import LENGTH_RULES

logger = logging.getLogger(__name__)


class LengthReward:
    """A TRL reward function made of a task reward and a length rule. Picklable where the task reward is.

    Completions of one prompt must stand together, as TRL has them: runs of equal prompts are the groups, unless their
    size is known (`num_generations`). A group may span processes: a rule that looks at more than one completion (its
    `scope`) brings the rows of all together, so every process has to call it.

    Lengths are counted in `completion_ids`. End-of-sequence counts unless `eos_token_ids` are given: a reward function
    is not told what ends a completion, so without them a target of 100 tokens leaves room for 99 and an end. Tool
    output and environment text do not count where it is known which tokens they are: the trainers of `lenvm_rl` say so
    with the keyword `tool_mask`, and a `rollout_func` may return a list of that name. TRL's own `GRPOTrainer` does not
    tell reward functions, so there they count; where messages of a tool can be seen, a warning says so.

    Where the rule has a state (LEASH's multiplier, LASER-D's targets), each call pays with the state as it stands and
    then moves it; it is a [`~lenvm_rl.reward_functions.StatefulReward`], and the state is logged as
    `<name>/multiplier` and the like. The trainers of `lenvm_rl` keep it in checkpoints; for trainers of TRL, add the
    callback [`lenvm_rl.trainers.rewards.RewardStates`].

    Attributes:
        unshaped_flags (list of `float` or `None`):
            What the task reward said in the last call on this process: 1 for correct, 0 for wrong, `None` where it does
            not apply; `None` before any call ([`lenvm_rl.reward_functions.ShapedReward`]).

    Args:
        rule (`str`): name of a rule ([`reward.rules.LENGTH_RULES`]).
        task_reward (`Callable` or `str`):
            TRL reward function, or its dotted path, that returns 0 or 1 for each completion, or `None` where it does
            not apply; such completions get `None` and are left out of their group. Functions, lambdas, bound methods,
            `functools.partial`s and objects that can be called will do; asynchronous ones will not.
        threshold (`float`, *optional*):
            For a task reward that is not 0 or 1: a completion is correct where it is above this. The rule then pays for
            being correct, not for the number.
        num_generations (`int`, *optional*):
            Size of each group, which keeps two equal prompts in a row apart. Prompts that do not come in whole groups
            of this size are an error. The trainers of `lenvm_rl` say the size with each call, in evaluation the one of
            evaluation, and what they say counts.
        eos_token_ids (`int` or collection of `int`, *optional*):
            Tokens that end a completion; where the policy chose one as the last, it is not counted.
        knobs:
            Keyword arguments of the rule and its state. A `str` is the name of a column of the dataset that holds the
            number for each prompt: `target_length="budget"`, which the prompt then has to name, too.
    """

    def __init__(
        self,
        rule: str,
        task_reward: Callable | str,
        *,
        threshold: float | None = None,
        num_generations: int | None = None,
        eos_token_ids: int | Collection[int] | None = None,
        **knobs: Any,
    ):
        if rule not in LENGTH_RULES:
            raise ValueError(f"rule must be one of {', '.join(sorted(LENGTH_RULES))}, got {rule!r}.")
        task_reward = load_reward(task_reward) if isinstance(task_reward, str) else task_reward
        if not callable(task_reward) or isinstance(task_reward, (type, torch.nn.Module)):
            kind = task_reward.__name__ if isinstance(task_reward, type) else type(task_reward).__name__
            raise ValueError(f"task_reward must be a TRL reward function that returns flags, got {kind}.")
        if is_asynchronous(task_reward):
            raise ValueError("task_reward is asynchronous: a length penalty needs an ordinary function.")
        self.name = rule
        self.rule = LENGTH_RULES[rule]
        self.task_reward = task_reward
        self.threshold = threshold
        self.num_generations = num_generations
        self.eos_token_ids = frozenset(end_token_ids(None, eos_token_ids))
        self.unshaped_flags: list[float | None] | None = None
        self.__name__ = f"{name_of(task_reward)}_{rule}"
        self._warned: set[str] = set()
        if num_generations is not None and num_generations < self.rule.least_generations:
            raise ValueError(
                f"num_generations must be at least {self.rule.least_generations} for {rule!r}, "
                f"got {num_generations}{self._alone}."
            )
        self.columns = {name: knob for name, knob in knobs.items() if isinstance(knob, str)}
        self.knobs = {name: knob for name, knob in knobs.items() if name not in self.columns}
        self.state = None
        if self.rule.state is not None:
            self.state = self.rule.state(**self.knobs)
            # Only where there is a state is this a `StatefulReward`.
            self.state_dict, self.load_state_dict = self.state.state_dict, self.state.load_state_dict
            self.reset = self.state.reset
        # Wrong knobs are an error here rather than in the first training step.
        empty = torch.zeros(0)
        self.rule.rewards(empty, empty, empty.long(), **self._knobs([], dict.fromkeys(self.columns.values(), [])))

    def __call__(self, prompts: Sequence, completions: Sequence, completion_ids: Sequence, **columns: Any) -> list:
        """Rewards of the completions, in order; `None` where the task reward is `None`."""
        self.unshaped_flags = None
        for name, value in ({} if self.state is None else self.state.shown()).items():
            self._log(columns, name, value)
        if self.rule.scope == "completion":
            parts, index = [self._part(prompts, completions, completion_ids, columns)], 0
        else:
            with fails_together("The task reward of a length penalty"):
                part = self._part(prompts, completions, completion_ids, columns)
            parts, index = exchanged(part), process_index()
        sampled = [length for part in parts for length in part.lengths]
        flags = [flag for part in parts for flag in part.flags]
        counted = [row for row, flag in enumerate(flags) if flag is not None]
        lengths = torch.tensor([sampled[row] for row in counted])
        correct = torch.tensor([flags[row] for row in counted])
        group = None
        if self.rule.scope == "group":
            groups = self._groups(len(flags), _run_starts(parts), columns)
            group = torch.tensor([groups[row] for row in counted], dtype=torch.long)
        rewards = self.rule.rewards(lengths, correct, group, **_knobs_of_all(parts))
        if self.state is not None:
            self.state.move(sampled, lengths, correct, group)
        result: list[float | None] = [None] * len(flags)
        for row, reward in zip(counted, rewards.tolist(), strict=True):
            result[row] = reward
        first = sum(len(part.flags) for part in parts[:index])
        return result[first : first + len(parts[index].flags)]

    def _part(self, prompts: Sequence, completions: Sequence, completion_ids: Sequence, columns: Mapping) -> _Part:
        """What this process's completions bring."""
        further = {name: columns[name] for name in ("num_generations", "tool_mask") if name in columns}
        told = {name: column for name, column in columns.items() if name not in further}
        told |= accepted(self.task_reward, further)
        returned = self.task_reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **told)
        paid = check_returned(returned, name_of(self.task_reward), len(completion_ids))
        flags = paid = [None if flag is None else float(flag) for flag in paid]
        if self.threshold is not None:
            flags = [None if flag is None else float(flag > self.threshold) for flag in paid]
        self.unshaped_flags = list(flags)
        scored = [flag for flag in paid if flag is not None]
        if scored:
            # TRL averages over what all processes log: so often that each completion counts once.
            times = 1 if number_of_processes() == 1 else len(scored)
            self._log(columns, "unshaped", sum(scored) / len(scored), times)
        compared = prompts if self.rule.scope == "group" and self._size_by_place(columns) is None else []
        return _Part(
            lengths=self._lengths(completions, completion_ids, columns.get("tool_mask")),
            flags=flags,
            starts=[True] * bool(len(compared)) + [now != before for before, now in pairwise(compared)],
            ends=[compared[0], compared[-1]] if len(compared) else [],
            knobs=self._knobs([row for row, flag in enumerate(flags) if flag is not None], columns),
        )

    def _knobs(self, counted: Sequence[int], columns: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the rule for this process's counted completions."""
        missing = sorted(set(self.columns.values()) - set(columns)) if counted else []
        if missing:
            raise ValueError(
                f"{self.__name__} needs the dataset's column {missing[0]!r} ({', '.join(self.columns)}): add it, or "
                "give one number for all."
            )
        read = {name: torch.tensor([columns[one][row] for row in counted]) for name, one in self.columns.items()}
        return (self.knobs if self.state is None else self.state.knobs()) | read

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
                    f"The completions do not come in whole groups of num_generations={size}: TRL has all of a prompt "
                    "together, over all processes, so do not reorder them. If it is an evaluation that has groups of "
                    "another size, leave num_generations out."
                )
            groups = [row // size for row in range(rows)]
        if self.rule.least_generations > 1 and rows and len(set(groups)) == rows:
            self._warn("alone", f"there is one completion of each prompt{self._alone}.")
        return groups

    @property
    def _alone(self) -> str:
        compares = self.rule.least_generations > 1
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


@dataclass(frozen=True)
class _Part:
    """What one process brings to a rule that looks at the completions of all: rows are in the order of processes.

    Args:
        lengths (list of `int`): tokens of each of its completions.
        flags (list of `float`): 1, 0, or `None` where the completion is not counted.
        starts (list of `bool`): whether each prompt differs from the one before; `True` at the first.
        ends (list): the first and the last prompt, or nothing: all of them may be large.
        knobs (mapping): keyword arguments of the rule; a tensor with a dimension has an entry per counted completion.
    """

    lengths: list[int]
    flags: list[float | None]
    starts: list[bool]
    ends: list[Any]
    knobs: Mapping[str, Any]


def _run_starts(parts: Sequence[_Part]) -> list[bool]:
    """Whether each prompt of all processes differs from the one before, a run that spans two of them being one."""
    starts, last = [], []
    for part in parts:
        if part.ends:
            starts += [not last or part.ends[0] != last[0], *part.starts[1:]]
            last = part.ends[1:]
    return starts


def _knobs_of_all(parts: Sequence[_Part]) -> dict[str, Any]:
    """The knobs for the counted completions of all processes."""

    def together(name: str, value: Any) -> Any:
        per_completion = isinstance(value, Tensor) and value.ndim > 0
        return torch.cat([part.knobs[name] for part in parts]) if per_completion else value

    return {name: together(name, value) for name, value in parts[0].knobs.items()}


def _has_tool_output(completion: Any) -> bool:
    chat = completion if isinstance(completion, Sequence) and not isinstance(completion, str) else []
    return any(isinstance(message, Mapping) and message.get("role") == "tool" for message in chat)
