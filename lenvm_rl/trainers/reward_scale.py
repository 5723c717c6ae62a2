"""What the critic of PPO is given for the rewards that were paid: a penalty for cuts, a running scale, and bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.returns import wide_dtype
from lenvm_rl.trainers.config import LenVMPPOConfig

# Added to a variance, so that equal rewards stay finite.
EPSILON = 1e-8


class RewardScale:
    """Rewards of completions as PPO learns from them: ``clip((r - penalty of a cut - mean) / std)``.

    Mean and standard deviation are those of all completions that were scored since the run began, of all processes,
    this batch included. Without any of its settings, rewards pass as they are. (TRL 1.12's `missing_eos_penalty`, and
    OpenRLHF's `--normalize_reward` and `--reward_clip_range`.)

    Args:
        args ([`LenVMPPOConfig`]): `missing_eos_penalty`, `reward_normalization` and `reward_clip`.
    """

    def __init__(self, args: LenVMPPOConfig):
        self._args = args
        self._sums: Tensor | None = None

    def __call__(
        self, rewards: Tensor, scored: Tensor, cut: Tensor, reduce: Callable[[Tensor], Tensor], learn: bool
    ) -> Tensor:
        """The rewards to learn from, `(B,)`.

        Args:
            rewards (`torch.Tensor` of shape `(B,)`): weighted sums, 0 where nothing was scored.
            scored, cut (`torch.BoolTensor` of shape `(B,)`): which were scored, and which have no end.
            reduce (`Callable`): sums a tensor over processes.
            learn (`bool`): whether they count in mean and deviation; in evaluations they do not.
        """
        args = self._args
        if args.missing_eos_penalty is not None:
            rewards = rewards - args.missing_eos_penalty * cut.to(rewards.dtype)
        if args.reward_normalization:
            if learn:
                counted = torch.where(scored, rewards, 0.0).to(wide_dtype(rewards.device))
                sums = reduce(torch.stack([scored.to(counted.dtype), counted, counted**2]).sum(dim=1))
                self._sums = sums if self._sums is None else self._sums.to(sums) + sums
            if self._sums is not None:
                count, total, squares = self._sums.to(rewards.device)
                mean = total / count
                deviation = ((squares / count - mean**2).clamp(min=0.0) + EPSILON).sqrt()
                scaled = (rewards - mean.to(rewards.dtype)) / deviation.to(rewards.dtype)
                rewards = torch.where(count > 0, scaled, rewards)
        if args.reward_clip is not None:
            rewards = rewards.clamp(-args.reward_clip, args.reward_clip)
        return torch.where(scored, rewards, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": [0.0] * 3 if self._sums is None else self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """From a checkpoint; one without a state is of a run that had no scale."""
        self._sums = None if state is None else torch.tensor(state["sums"], dtype=torch.float64)
