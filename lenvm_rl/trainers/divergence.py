"""How far a policy moves from the one that its batch was sampled from, and where it stops learning from that batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def approximate_kl(log_probs: Tensor, old: Tensor) -> Tensor:
    """``(r - 1) - log r`` of each token, ``r = pi / pi_old``: an estimate of KL(pi_old || pi) that is never negative
    (J. Schulman, Approximating KL Divergence, 2020).

    Args:
        log_probs, old (`torch.Tensor` of shape `(B, T)`): of the sampled tokens, now and when they were sampled.
    """
    log_ratio = log_probs - old
    return log_ratio.exp() - 1 - log_ratio


class BatchDivergence:
    """The mean divergence of the last optimizer step on a generation batch, and whether it went beyond the target.

    Args:
        target (`float`, *optional*): `target_kl`; without it, nothing is exchanged and nothing stops.
        reduce (`Callable`): sums a tensor over processes.
    """

    def __init__(self, target: float | None, reduce: Callable[[Tensor], Tensor]):
        self._target, self._reduce = target, reduce
        self._sums: Tensor | None = None
        self.stopped = False

    def begin(self) -> None:
        """Another generation batch is there."""
        self.stopped, self._sums = False, None

    def add(self, divergence: Tensor, mask: Tensor, last: bool) -> None:
        """Take in a micro-batch; the last one of an optimizer step decides, alike on all processes.

        Args:
            divergence, mask (`torch.Tensor` of shape `(B, T)`): of each token, and which of them count.
            last (`bool`): whether the optimizer step ends with it.
        """
        if self._target is None:
            return
        sums = torch.stack([torch.where(mask.bool(), divergence, 0.0).sum(), mask.sum().to(divergence.dtype)])
        self._sums = sums if self._sums is None else self._sums + sums
        if last:
            total, count = self._reduce(self._sums).tolist()
            self.stopped = self.stopped or (count > 0 and total / count > self._target)
            self._sums = None
