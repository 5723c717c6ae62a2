"""How far a policy moves: from the one that its batch was sampled from, where it stops learning from that batch, and
from the reference, where the weight of that divergence in the reward is steered.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lenvm_rl.controllers import MultiplicativeController
from lenvm_rl.trainers.config import LenVMPPOConfig

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
    """Whether the policy has gone further from the one that sampled a generation batch than it may.

    Args:
        target (`float`, *optional*): `target_kl`; without it, nothing stops.
    """

    def __init__(self, target: float | None):
        self._target = target
        self.stopped = False

    def begin(self) -> None:
        """Another generation batch is there."""
        self.stopped = False

    def observe(self, divergence: float) -> None:
        """Take in `policy/approx_kl` of an optimizer step; NaN stops nothing."""
        self.stopped = self.stopped or (self._target is not None and divergence > self._target)
