"""Length penalties with a memory: Leash's multiplier, and LASER-D's targets, which both follow the policy.

Their state moves with every call. It is the same on every process, since the completions of all of them move it. The
callback [`reward.checkpointing.RewardStates`], which the trainers of `lenvm_rl` add themselves, keeps the state in the
checkpoints, takes it up on resuming, starts every new run from the beginning, and undoes what evaluation moved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reward.group_rules import TIERS, difficulty, laser_d_length_reward
from reward.length_penalties import LengthReward
from reward.length_rules import check_not_negative, check_tokens, leash_length_reward


def leash_multiplier(
    multiplier: float, mean_length: float, *, target_length: float, rate: float, bounds: tuple[float, float]
) -> float:
    """The multiplier after a batch: ``lam <- clip(lam + rate * (mean(L) / L_t - 1), bounds)``.

    Dual ascent on the constraint that the mean length is at most `L_t` (Leash, arXiv 2512.21540): a batch that is
    longer makes length dearer, a shorter one cheaper.

    Worked example: lam = 0.5, rate 0.1, L_t = 100: a mean of 150 gives 0.55, one of 80 gives 0.48.
    """
    low, high = bounds
    return min(max(multiplier + rate * (mean_length / target_length - 1.0), low), high)


def adaptive_targets(
    within: Tensor, completions: Tensor, candidates: Sequence[int], num_generations: int, expected_correct: int = 1
) -> list[int | None]:
    """For each difficulty, the smallest target that still lets enough correct answers be expected.

    LASER-D (arXiv 2505.15612) expects ``ECR = P(L <= l) * n`` correct answers within `l` tokens, `n` being the fewest
    of the `K` completions of a prompt that its tier has correct: ``floor(2K/3)`` of an easy one, ``floor(K/3)`` of a
    medium one, 1 of a hard one, as in its released code (at least 1 here, which matters below K = 3). The target is the
    smallest candidate whose ECR reaches `expected_correct`.

    Worked example: K = 6, so n = 4, 2, 1. Of 8 completions each, 2, 4 and 4 stay within 100 tokens and all within 200:
    ECR(100) = 1, 1 and 0.5: the targets are 100, 100, 200.

    Args:
        within (`torch.LongTensor` of shape `(3, M)`): completions of each tier that stay within each candidate.
        completions (`torch.LongTensor` of shape `(3,)`): completions of each tier.
        candidates (sequence of `M` `int`): target lengths to choose from, ascending.
        num_generations (`int`): `K`.
        expected_correct (`int`, *optional*, defaults to 1): correct answers to be expected.

    Returns:
        `list` of `int` or `None`: one target for each of [`~reward.group_rules.TIERS`]; `None` for a tier without
        completions, or where no candidate is long enough.
    """
    fewest = (max(1, 2 * num_generations // 3), max(1, num_generations // 3), 1)
    targets: list[int | None] = []
    for tier, count in enumerate(completions.tolist()):
        # In whole numbers: share * n >= expected.
        enough = [
            length
            for length, inside in zip(candidates, within[tier].tolist(), strict=True)
            if count and inside * fewest[tier] >= expected_correct * count
        ]
        targets.append(enough[0] if enough else None)
    return targets


class StatefulLengthReward(LengthReward, ABC):
    """A [`~reward.length_penalties.LengthReward`] with a state that can be saved, taken up and begun anew."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state, as JSON can hold it."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` gave; a `ValueError` if it is another penalty's."""

    @abstractmethod
    def reset(self) -> None:
        """Go back to the state of a new run."""

    def _check_state(self, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the state lacks something or was made with other settings."""
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"This is no state of {self.__name__}: it has no {', '.join(missing)}.")
        for name, value in expected.items():
            if state[name] != value:
                raise ValueError(
                    f"The state of {self.__name__} was made with {name}={state[name]}, but it is {value} now: take the "
                    "setting back, or start a new run."
                )


class LeashLengthReward(StatefulLengthReward):
    """[`~reward.length_rules.leash_length_reward`] with its multiplier, as a TRL reward function.

    Contains the task reward, as 1 and -1, so use it in its place. Each call first pays with the multiplier as it
    stands, then moves it by the mean length of all that was sampled ([`leash_multiplier`]). It is logged as
    `<name>/multiplier`.

    Args:
        task_reward, threshold, num_generations, eos_token_ids: see [`~reward.length_penalties.LengthReward`].
        target_length (`int`): wanted mean length in tokens; the paper's runs use 4000, 8000 and 12000.
        multiplier (`float`, *optional*, defaults to 0.01): at the start.
        rate (`float`, *optional*, defaults to 0.02): how fast it moves.
        bounds (pair of `float`, *optional*, defaults to `(0, 2)`): what it is kept within.

    The defaults of the last three are those of a public implementation of the rule for DAPO, not checked against the
    paper's own runs.
    """

    name = "leash"
    penalty = staticmethod(leash_length_reward)
    scope = "batch"

    def __init__(
        self,
        task_reward: Callable | str,
        *,
        target_length: int,
        multiplier: float = 0.01,
        rate: float = 0.02,
        bounds: tuple[float, float] = (0.0, 2.0),
        **options,
    ):
        check_not_negative("rate", rate)
        if not 0 <= bounds[0] <= multiplier <= bounds[1]:
            raise ValueError(f"multiplier={multiplier} must lie within bounds={bounds}, which begin at 0 or above.")
        # Plain numbers, which a checkpoint can hold.
        target_length = int(target_length) if float(target_length).is_integer() else float(target_length)
        self.start = self.multiplier = float(multiplier)
        self.rate = float(rate)
        self.bounds = (float(bounds[0]), float(bounds[1]))
        super().__init__(task_reward, target_length=target_length, **options)

    def _knobs(self, counted, columns):
        return {**self.knobs, "multiplier": self.multiplier}

    def __call__(self, prompts: Sequence, completions: Sequence, completion_ids: Sequence, **columns) -> list:
        """As [`~reward.length_penalties.LengthReward`]; then the multiplier moves."""
        self._log(columns, "multiplier", self.multiplier)
        return super().__call__(prompts, completions, completion_ids, **columns)

    def _move(self, lengths):
        if lengths:
            self.multiplier = leash_multiplier(
                self.multiplier,
                sum(lengths) / len(lengths),
                target_length=self.knobs["target_length"],
                rate=self.rate,
                bounds=self.bounds,
            )

    def state_dict(self) -> dict[str, Any]:
        """The multiplier, and the target that it belongs to."""
        return {"multiplier": self.multiplier, "target_length": self.knobs["target_length"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of `state_dict`; a `ValueError` if it is for another target."""
        self._check_state(state, {"target_length": self.knobs["target_length"]})
        self.multiplier = float(state["multiplier"])

    def reset(self) -> None:
        """Back to the multiplier of the start."""
        self.multiplier = self.start


class LaserDLengthReward(StatefulLengthReward):
    """[`~reward.group_rules.laser_d_length_reward`] with targets that follow the policy, as a TRL reward function.

    Contains the task reward, so use it in its place. It counts, by difficulty, how many completions stay within each
    candidate, and after every `every` calls takes the smallest candidate that still lets a correct answer be expected
    ([`adaptive_targets`]). A difficulty that did not occur keeps its target; one that no candidate is long enough for
    takes the longest. Targets are logged as `<name>/target_easy` and so on.

    The code that the paper released counts on 500 training problems, sampled anew every 20 steps; a reward function
    cannot sample, so here the training batches since the last change are counted.

    Args:
        task_reward, threshold, num_generations, eos_token_ids: see [`~reward.length_penalties.LengthReward`]. `K` is
            the mean size of the groups that were counted, rounded down.
        candidates (sequence of `int`): target lengths to choose from, ascending; 4096 to 16384 by 1024 in
            that code. The longest should be `max_completion_length`; all targets start there.
        every (`int`, *optional*, defaults to 20): calls between two changes, from there.
        bonus (`float`, *optional*, defaults to 0.5): see [`~reward.group_rules.laser_d_length_reward`].
    """

    name = "laser_d"
    penalty = staticmethod(laser_d_length_reward)

    def __init__(self, task_reward: Callable | str, *, candidates: Sequence[int], every: int = 20, **options):
        self.candidates = [int(length) for length in candidates]
        if not self.candidates or any(b <= a for a, b in zip(self.candidates, self.candidates[1:], strict=False)):
            raise ValueError(f"candidates must be ascending lengths, at least one, got {self.candidates}.")
        check_tokens("the shortest candidate", self.candidates[0])
        if every < 1:
            raise ValueError(f"every must be at least 1 call, got {every}.")
        self.every = every
        self.reset()
        super().__init__(task_reward, **options)

    def _knobs(self, counted, columns):
        return {**self.knobs, "targets": self.targets}

    def __call__(self, prompts: Sequence, completions: Sequence, completion_ids: Sequence, **columns) -> list:
        """As [`~reward.length_penalties.LengthReward`]; then the completions are counted, and targets may change."""
        for tier, target in zip(TIERS, self.targets, strict=True):
            self._log(columns, f"target_{tier}", float(target))
        return super().__call__(prompts, completions, completion_ids, **columns)

    def _move(self, lengths):
        self.calls += 1
        if self.calls == self.every:
            self._change()

    def _shaped(self, lengths, correct, group, knobs):
        rewards = super()._shaped(lengths, correct, group, knobs)
        tier = difficulty(correct, group)
        of_tier = torch.nn.functional.one_hot(tier, len(TIERS)).long()
        inside = (lengths[:, None] <= torch.tensor(self.candidates)).long()
        groups = torch.bincount(torch.unique(torch.stack([group, tier]), dim=1)[1], minlength=len(TIERS))
        counts = torch.cat([of_tier.T @ inside, of_tier.sum(0)[:, None], groups[:, None]], dim=1)
        self.counts = (torch.tensor(self.counts) + counts).tolist()
        return rewards

    def _change(self) -> None:
        within, completions, groups = torch.tensor(self.counts).split([len(self.candidates), 1, 1], dim=1)
        if groups.any():
            size = int(completions.sum() // groups.sum())
            found = adaptive_targets(within, completions[:, 0], self.candidates, size)
            for tier, target in enumerate(found):
                if groups[tier]:
                    self.targets[tier] = self.candidates[-1] if target is None else target
        self._start_counting()

    def _start_counting(self) -> None:
        self.calls = 0
        # By tier: completions that stay within each candidate, all completions, and their groups.
        self.counts = [[0] * (len(self.candidates) + 2) for _ in TIERS]

    def state_dict(self) -> dict[str, Any]:
        """Targets, counts since they changed, and the candidates that both belong to."""
        return {
            "targets": list(self.targets),
            "calls": self.calls,
            "counts": [list(row) for row in self.counts],
            "candidates": list(self.candidates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of `state_dict`; a `ValueError` if it is for other candidates."""
        self._check_state(state, {"candidates": self.candidates})
        self.targets = list(state["targets"])
        self.calls = state["calls"]
        self.counts = [list(row) for row in state["counts"]]

    def reset(self) -> None:
        """Back to the longest targets, nothing counted."""
        self.targets = [self.candidates[-1]] * len(TIERS)
        self._start_counting()
