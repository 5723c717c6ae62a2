"""What a length value model may be fitted to: the length return, or one of three alternatives for ablation.

The alternatives are those that arXiv 2604.27039, section 5.1, compares the return with. Each is an activation on the
head's logit z and the same function of the number n of tokens to come; both ends are here, so that a length can be read
off every model. Values, in the sense of reinforcement learning, exist for the return only.

| target | what is predicted | what it is fitted to |
| --- | --- | --- |
| `return` | `V = -sigmoid(z)` | `G = -(1 - gamma^n)` |
| `length` | `softplus(z)` | `n` |
| `normalized_length` | `sigmoid(z)` | `n / scale`, at most 1 |
| `log_length` | `softplus(z)` | `ln(1 + n)` |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lenvm_rl.returns import discounted_return, logits_from_remaining, remaining_from_logits

RETURN = "return"
TARGETS = (RETURN, "length", "normalized_length", "log_length")


def check_target(target: str, scale: float | None) -> None:
    """Raises a `ValueError` for an unknown target, and for a scale where it does not belong or is missing."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}.")
    if (target == "normalized_length") != (scale is not None):
        raise ValueError(
            f"target={target!r} with target_scale={scale!r}: the scale, in tokens, belongs to 'normalized_length' and "
            "to nothing else."
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"target_scale is the length that is normalised to 1, so above 0 tokens, not {scale}.")


def check_return_target(target: str, use: str) -> None:
    """Raises a `ValueError` unless the target is the return.

    Args:
        target (`str`): a model's, from its config.
        use (`str`): what the model was wanted for, for the error.
    """
    if target != RETURN:
        raise ValueError(
            f"This model was fitted to target={target!r}, an ablation that predicts lengths and has no values; {use} "
            "needs a model of the length return: pretrain one with target='return'."
        )


@dataclass(frozen=True)
class TargetSpace:
    """One row of the table above, for one model.

    Args:
        target (`str`): one of `TARGETS`.
        gamma (`float`): discount of the length return.
        scale (`float`, *optional*): tokens that are 1 in the space of `normalized_length`.
    """

    target: str
    gamma: float
    scale: float | None = None

    def __post_init__(self) -> None:
        check_target(self.target, self.scale)

    def predict(self, logits: Tensor) -> Tensor:
        """Predictions from logits, of any shape."""
        if self.target == RETURN:
            return -torch.sigmoid(logits)
        return torch.sigmoid(logits) if self.target == "normalized_length" else F.softplus(logits)

    def encode(self, remaining: Tensor) -> Tensor:
        """What is predicted for a number of tokens to come, floating, of any shape."""
        if self.target == RETURN:
            return discounted_return(remaining, self.gamma)
        if self.target == "normalized_length":
            return (remaining / self.scale).clamp(max=1.0)
        return torch.log1p(remaining) if self.target == "log_length" else remaining

    def remaining(self, logits: Tensor) -> Tensor:
        """Tokens to come that logits stand for, of any shape."""
        if self.target == RETURN:
            return remaining_from_logits(logits, self.gamma)
        if self.target == "normalized_length":
            return torch.sigmoid(logits) * self.scale
        return torch.expm1(F.softplus(logits)) if self.target == "log_length" else F.softplus(logits)

    def return_logits(self, logits: Tensor) -> Tensor:
        """Logits with which a model of the return would say the same lengths: one set of metrics for every target."""
        return logits if self.target == RETURN else logits_from_remaining(self.remaining(logits), self.gamma)
