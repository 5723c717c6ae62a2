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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from reward.group_rules import (
    alp_length_reward,
    arora_length_reward,
    gr3_length_reward,
    kimi_length_reward,
    laser_d_length_reward,
    shorter_better_length_reward,
)
from reward.length_reward import LengthReward
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


class LinearLengthReward(LengthReward):
    """[`linear_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Args:
        task_reward, threshold, num_generations, eos_token_ids: see [`LengthReward`].
        alpha (`float`): share of the reward lost at `max_length`.
        max_length (`int`): tokens at which it is lost; `max_completion_length` is a natural choice.
    """

    name = "linear"
    penalty = staticmethod(linear_length_reward)
    scope = "completion"


class TruncationLengthReward(LengthReward):
    """[`truncation_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Its one knob is `limit`. See [`LengthReward`] for the other arguments.
    """

    name = "truncation"
    penalty = staticmethod(truncation_length_reward)
    scope = "completion"


class SoftOverlongLengthReward(LengthReward):
    """[`soft_overlong_length_reward`] as a TRL reward function: the penalty alone, to stand beside the task reward.

    Knobs: `max_length`, `cache`, `penalize_wrong`. Where all answers are to pay, TRL's `get_soft_overlong_punishment`
    is the same. See [`LengthReward`] for the other arguments.
    """

    name = "soft_overlong"
    penalty = staticmethod(soft_overlong_length_reward)
    scope = "completion"


class CosineLengthReward(LengthReward):
    """[`cosine_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Knobs: `max_length`, `shortest_correct`, `longest_correct`, `shortest_wrong`, `longest_wrong`, `penalize_wrong`. For
    mathematics with `penalize_wrong`, TRL's `get_cosine_scaled_reward` is the same. See [`LengthReward`] for the other
    arguments.
    """

    name = "cosine"
    penalty = staticmethod(cosine_length_reward)
    scope = "completion"


class KimiLengthReward(LengthReward):
    """[`kimi_length_reward`] as a TRL reward function: the length term alone, to stand beside the task reward.

    Args:
        task_reward, threshold, num_generations, eos_token_ids: see [`LengthReward`].
        penalize_wrong (`bool`, *optional*, defaults to `False`): whether wrong answers lose by their length.
    """

    name = "kimi"
    penalty = staticmethod(kimi_length_reward)
    least_generations = 2


class AroraLengthReward(LengthReward):
    """[`arora_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Its one knob is `alpha`. See [`LengthReward`] for the other arguments.
    """

    name = "arora"
    penalty = staticmethod(arora_length_reward)
    least_generations = 2


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
    least_generations = 2


class GR3LengthReward(LengthReward):
    """[`gr3_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Its one knob is `alpha`. See [`LengthReward`] for the other arguments.
    """

    name = "gr3"
    penalty = staticmethod(gr3_length_reward)
    least_generations = 2


class LaserLengthReward(LengthReward):
    """[`laser_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Knobs: `target_length`, `bonus`. See [`LengthReward`] for the other arguments, and
    [`reward.stateful_penalties.LaserDLengthReward`] for targets that follow the policy.
    """

    name = "laser"
    penalty = staticmethod(laser_length_reward)
    scope = "completion"


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
    scope = "completion"

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
