"""Sequence-level length penalties: what people use today to shorten reasoning, and so the baselines to compare with.

Each is a pure function ``(lengths, correct, group, **knobs) -> rewards`` over `N` completions (`reward.length_rules`,
`reward.group_rules`; all can be had from here), and a TRL reward function that wraps a task reward and calls it. The
task reward must be a correctness flag, 0 or 1: a shaped number in its place would silently change what is penalised.

Ready-made ones are in `reward.baselines`. With knobs of your own, write a module and give its dotted path:

    from reward.gsm8k import gsm8k_reward
    from reward.length_penalties import GR3LengthReward

    gsm8k_gr3 = GR3LengthReward(gsm8k_reward, alpha=0.2)

Keep the unshaped reward in view: give TRL the task reward too (with weight 0 in `reward_weights` where the penalty
already contains it), and filter and evaluate on that. Each penalty also logs its mean, as `<name>/unshaped`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reward.group_rules import (
    alp_length_reward,
    arora_length_reward,
    gr3_length_reward,
    kimi_length_reward,
    laser_d_length_reward,
    shorter_better_length_reward,
)
from reward.length_rules import (
    cosine_length_reward,
    l1_exact_length_reward,
    l1_max_length_reward,
    laser_length_reward,
    leash_length_reward,
    linear_length_reward,
    soft_overlong_length_reward,
    truncation_length_reward,
)

__all__ = [
    "ALPLengthReward",
    "AroraLengthReward",
    "CosineLengthReward",
    "GR3LengthReward",
    "KimiLengthReward",
    "L1ExactLengthReward",
    "L1MaxLengthReward",
    "LaserLengthReward",
    "LengthReward",
    "LinearLengthReward",
    "ShorterBetterLengthReward",
    "SoftOverlongLengthReward",
    "TruncationLengthReward",
    "alp_length_reward",
    "arora_length_reward",
    "cosine_length_reward",
    "gr3_length_reward",
    "kimi_length_reward",
    "l1_exact_length_reward",
    "l1_max_length_reward",
    "laser_d_length_reward",
    "laser_length_reward",
    "leash_length_reward",
    "linear_length_reward",
    "shorter_better_length_reward",
    "soft_overlong_length_reward",
    "truncation_length_reward",
]


class LengthReward:
    """A TRL reward function made of a task reward and a length penalty. Picklable; called as TRL calls any.

    Completions of one prompt must stand together, as TRL has them: runs of equal prompts are the groups. A call sees
    the completions of one process only, so choose a per-device batch that is a multiple of `num_generations` where the
    penalty compares within a group.

    Lengths are counted in `completion_ids`. End-of-sequence counts unless `eos_token_ids` are given: a reward function
    is not told what ends a completion, so without them a target of 100 tokens leaves room for 99 and an end.

    Args:
        task_reward (`Callable` or `str`):
            TRL reward function, or its dotted path, that returns 0 or 1 for each completion, or `None` where it does
            not apply; such completions get `None` and are left out of their group.
        threshold (`float`, *optional*):
            For a task reward that is not 0 or 1: a completion is correct where it is above this. The penalty then pays
            for being correct, not for the number.
        num_generations (`int`, *optional*):
            Size of each group. Runs of equal prompts are then cut into groups of this size, which keeps two equal
            prompts in a row apart, and a run that does not fit is an error.
        eos_token_ids (collection of `int`, *optional*):
            Tokens that end a completion; where one stands last, it is not counted.
        knobs: keyword arguments of the penalty.
    """

    name = "length"
    penalty: Callable[..., Tensor]

    def __init__(
        self,
        task_reward: Callable | str,
        *,
        threshold: float | None = None,
        num_generations: int | None = None,
        eos_token_ids: Collection[int] = (),
        **knobs,
    ):
        task_reward = _function(task_reward) if isinstance(task_reward, str) else task_reward
        if not callable(task_reward):
            raise ValueError(f"task_reward must be a TRL reward function, got {type(task_reward).__name__}.")
        if inspect.iscoroutinefunction(task_reward) or inspect.iscoroutinefunction(type(task_reward).__call__):
            raise ValueError("task_reward is asynchronous: a length penalty needs an ordinary function.")
        if num_generations is not None and num_generations < 1:
            raise ValueError(f"num_generations must be at least 1, got {num_generations}.")
        self.task_reward = task_reward
        self.threshold = threshold
        self.num_generations = num_generations
        self.eos_token_ids = frozenset(eos_token_ids)
        self.knobs = knobs
        self.__name__ = f"{task_reward.__name__}_{self.name}"
        # Wrong knobs are an error here rather than in the first training step.
        empty = torch.zeros(0)
        type(self).penalty(empty, empty, empty.long(), **self._knobs([], {}))

    def __call__(self, prompts: Sequence, completions: Sequence, completion_ids: Sequence, **columns) -> list:
        """Rewards of the completions, in order; `None` where the task reward is `None`."""
        flags = self.task_reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        if len(flags) != len(completion_ids):
            raise ValueError(
                f"{self.task_reward.__name__} gave {len(flags)} rewards for {len(completion_ids)} completions: it must "
                "return one for each."
            )
        counted = [index for index, flag in enumerate(flags) if flag is not None]
        groups = _groups(prompts, self.num_generations)
        paid = torch.tensor([float(flags[index]) for index in counted])
        rewards = self._shaped(
            torch.tensor([self._length(completion_ids[index]) for index in counted]),
            paid if self.threshold is None else (paid > self.threshold).float(),
            torch.tensor([groups[index] for index in counted], dtype=torch.long),
            self._knobs(counted, columns),
        )
        if counted:
            self._log(columns, "unshaped", float(paid.mean()))
        result: list[float | None] = [None] * len(flags)
        for index, reward in zip(counted, rewards.tolist(), strict=True):
            result[index] = reward
        return result

    def _shaped(self, lengths: Tensor, correct: Tensor, group: Tensor, knobs: Mapping[str, Any]) -> Tensor:
        return type(self).penalty(lengths, correct, group, **knobs)

    def _knobs(self, counted: Sequence[int], columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keyword arguments of the penalty for the completions that are counted; for none, before there are any."""
        return self.knobs

    def _length(self, ids: Sequence[int]) -> int:
        return len(ids) - (len(ids) > 0 and ids[-1] in self.eos_token_ids)

    def _log(self, columns: Mapping[str, Any], name: str, value: float) -> None:
        # TRL's trainers pass `log_metric`; other callers, such as the programs under eval/, have no log.
        if "log_metric" in columns:
            columns["log_metric"](f"{self.__name__}/{name}", value)


class LinearLengthReward(LengthReward):
    """[`linear_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Args:
        task_reward, threshold, num_generations, eos_token_ids: see [`LengthReward`].
        alpha (`float`): share of the reward lost at `max_length`.
        max_length (`int`): tokens at which it is lost; `max_completion_length` is a natural choice.
    """

    name = "linear"
    penalty = staticmethod(linear_length_reward)


class TruncationLengthReward(LengthReward):
    """[`truncation_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Its one knob is `limit`. See [`LengthReward`] for the other arguments.
    """

    name = "truncation"
    penalty = staticmethod(truncation_length_reward)


class SoftOverlongLengthReward(LengthReward):
    """[`soft_overlong_length_reward`] as a TRL reward function: the penalty alone, to stand beside the task reward.

    Knobs: `max_length`, `cache`, `penalize_wrong`. Where all answers are to pay, TRL's `get_soft_overlong_punishment`
    is the same. See [`LengthReward`] for the other arguments.
    """

    name = "soft_overlong"
    penalty = staticmethod(soft_overlong_length_reward)


class CosineLengthReward(LengthReward):
    """[`cosine_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Knobs: `max_length`, `shortest_correct`, `longest_correct`, `shortest_wrong`, `longest_wrong`, `penalize_wrong`. For
    mathematics with `penalize_wrong`, TRL's `get_cosine_scaled_reward` is the same. See [`LengthReward`] for the other
    arguments.
    """

    name = "cosine"
    penalty = staticmethod(cosine_length_reward)


class KimiLengthReward(LengthReward):
    """[`kimi_length_reward`] as a TRL reward function: the length term alone, to stand beside the task reward.

    Args:
        task_reward, threshold, num_generations, eos_token_ids: see [`LengthReward`].
        penalize_wrong (`bool`, *optional*, defaults to `False`): whether wrong answers lose by their length.
    """

    name = "kimi"
    penalty = staticmethod(kimi_length_reward)


class AroraLengthReward(LengthReward):
    """[`arora_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Its one knob is `alpha`. See [`LengthReward`] for the other arguments.
    """

    name = "arora"
    penalty = staticmethod(arora_length_reward)


class ALPLengthReward(LengthReward):
    """[`alp_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Knobs: `beta`, `penalize_wrong`. See [`LengthReward`] for the other arguments.
    """

    name = "alp"
    penalty = staticmethod(alp_length_reward)


class ShorterBetterLengthReward(LengthReward):
    """[`shorter_better_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Knobs: `alpha`, `beta`, `penalize_wrong`. See [`LengthReward`] for the other arguments.
    """

    name = "shorter_better"
    penalty = staticmethod(shorter_better_length_reward)


class GR3LengthReward(LengthReward):
    """[`gr3_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Its one knob is `alpha`. See [`LengthReward`] for the other arguments.
    """

    name = "gr3"
    penalty = staticmethod(gr3_length_reward)


class LaserLengthReward(LengthReward):
    """[`laser_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Knobs: `target_length`, `bonus`. See [`LengthReward`] for the other arguments, and
    [`reward.stateful_penalties.LaserDLengthReward`] for targets that follow the policy.
    """

    name = "laser"
    penalty = staticmethod(laser_length_reward)


class L1ExactLengthReward(LengthReward):
    """[`l1_exact_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Args:
        task_reward, threshold, num_generations, eos_token_ids: see [`LengthReward`].
        target_length (`int`, *optional*):
            Wanted length in tokens of every completion. By default it is the dataset's column `target_column` that says
            it, prompt by prompt: the prompt has to name it, or the policy cannot know.
        target_column (`str`, *optional*, defaults to `"target_length"`): name of that column.
        alpha, penalize_wrong: see [`l1_exact_length_reward`].
    """

    name = "l1_exact"
    penalty = staticmethod(l1_exact_length_reward)

    def __init__(
        self,
        task_reward: Callable | str,
        *,
        target_length: int | None = None,
        target_column: str = "target_length",
        **options,
    ):
        self.target_length = target_length
        self.target_column = target_column
        super().__init__(task_reward, **options)

    def _knobs(self, counted: Sequence[int], columns: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.target_length is not None:
            return {**self.knobs, "target_length": self.target_length}
        if counted and self.target_column not in columns:
            raise ValueError(
                f"{self.__name__} needs the dataset's column {self.target_column!r} of wanted lengths: add it, name "
                "another one in target_column, or give one target_length for all."
            )
        return {**self.knobs, "target_length": torch.tensor([columns[self.target_column][row] for row in counted])}


class L1MaxLengthReward(L1ExactLengthReward):
    """[`l1_max_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Args:
        task_reward, threshold, num_generations, eos_token_ids: see [`LengthReward`].
        target_length, target_column: see [`L1ExactLengthReward`]; here the length is a budget.
        alpha, delta: see [`l1_max_length_reward`].
    """

    name = "l1_max"
    penalty = staticmethod(l1_max_length_reward)


def _function(path: str) -> Callable:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{path!r} is not a dotted path; write it like reward.gsm8k.gsm8k_reward.")
    found = vars(importlib.import_module(module))
    if name not in found:
        raise ValueError(f"There is no {name!r} in {module}: check the dotted path of the task reward.")
    return found[name]


def _groups(prompts: Sequence, size: int | None) -> list[int]:
    """The number of the group that each prompt stands in: a, a, b, b, b -> 0, 0, 1, 1, 1."""
    groups, current, length = [], -1, 0
    for index, prompt in enumerate(prompts):
        goes_on = index > 0 and prompt == prompts[index - 1] and length != size
        if not goes_on and size is not None and index > 0 and length != size:
            break
        current, length = (current, length + 1) if goes_on else (current + 1, 1)
        groups.append(current)
    if size is not None and length != size and prompts:
        raise ValueError(
            f"{length} completions of a prompt stand together where num_generations={size} was given: make the "
            "per-device batch a multiple of it, and do not reorder the completions."
        )
    return groups
