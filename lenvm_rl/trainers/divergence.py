"""How far a policy moves: from the one that its batch was sampled from, where it stops learning from that batch, and
from the reference, where the weight of that divergence in the reward is steered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.controllers import MultiplicativeController
from lenvm_rl.trainers.config import LenVMPPOConfig
from lenvm_rl.trainers.unread import Unread

# Loss types of TRL that clip the ratio at epsilon.
RATIO_CLIPPING_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


def approximate_kl(log_probs: Tensor, old: Tensor) -> Tensor:
    """``(r - 1) - log r`` of each token, ``r = pi / pi_old``: an estimate of KL(pi_old || pi) that is never negative
    (J. Schulman, Approximating KL Divergence, 2020).

    Args:
        log_probs, old (`torch.Tensor` of shape `(B, T)`): of the sampled tokens, now and when they were sampled.
    """
    log_ratio = log_probs - old
    return log_ratio.exp() - 1 - log_ratio


def beyond_clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Where the clipped surrogate has no gradient: the ratio is out of ``[1 - low, 1 + high]`` on the side that the
    advantage asks for (Schulman et al., arXiv 1707.06347, equation 7).

    Args:
        ratio, advantages (`torch.Tensor` of shape `(B, T)`), low, high (`float`): `epsilon` and `epsilon_high`.
    """
    return ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))


class KLRewardCoefficient:
    """`kl_reward_coef` of a run: a constant, or steered toward `kl_reward_target`; all processes hold the same.

    Args:
        args ([`~lenvm_rl.trainers.config.LenVMPPOConfig`]): of the run.
    """

    def __init__(self, args: LenVMPPOConfig):
        self._constant, self._controller = args.kl_reward_coef, None
        if args.kl_reward_target is not None:
            gain = args.generation_batch_size / args.kl_reward_horizon
            self._controller = MultiplicativeController(args.kl_reward_target, gain, args.kl_reward_coef)

    @property
    def value(self) -> float:
        """The coefficient of the batch to come."""
        return self._constant if self._controller is None else self._controller.setting

    def observe(self, divergence: float) -> None:
        """Move the coefficient of the batches to come by a batch's `kl_reward/per_token`; NaN moves nothing."""
        if self._controller is not None and not math.isnan(divergence):
            self._controller.update(divergence)

    def state_dict(self) -> dict[str, Any] | None:
        """The state of a steered coefficient."""
        return None if self._controller is None else self._controller.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state; a `ValueError` if there is none and this one is steered."""
        if self._controller is None:
            return
        if state is None:
            raise ValueError(
                "kl_reward_coef was a constant there, and kl_reward_target steers it here: resume with the settings of "
                "that run, or start a new run from its weights."
            )
        self._controller.load_state_dict(state)


class BatchDivergence:
    """The mean divergence of the last optimizer step on a generation batch, and whether it went beyond the target.

    Args:
        target (`float`, *optional*): `target_kl`; without it, nothing is exchanged and nothing stops.
        unread ([`~lenvm_rl.trainers.unread.Unread`]): tells the divergence when it is read.
    """

    def __init__(self, target: float | None, unread: Unread):
        self._target, self._unread = target, unread
        self._sums: Tensor | None = None
        self.stopped = False

    def begin(self) -> None:
        """Another generation batch is there."""
        self.stopped, self._sums = False, None

    def add(self, divergence: Tensor, mask: Tensor, last: bool) -> None:
        """Take in a micro-batch; the last one of an optimizer step decides once it is read, alike on all processes.

        Args:
            divergence, mask (`torch.Tensor` of shape `(B, T)`): of each token, and which of them count.
            last (`bool`): whether the optimizer step ends with it.
        """
        if self._target is None:
            return
        sums = torch.stack([torch.where(mask.bool(), divergence, 0.0).sum(), mask.sum().to(divergence.dtype)])
        self._sums = sums if self._sums is None else self._sums + sums
        if last:
            self._unread.add(self._sums, self._decide)
            self._sums = None

    def _decide(self, totals: list[float]) -> None:
        total, count = totals
        self.stopped = self.stopped or (count > 0 and total / count > self._target)
