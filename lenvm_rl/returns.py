"""The length return and its inverse: what a Length Value Model predicts, in value, logit and token space.

Conventions, the same everywhere in this library (Length Value Model, arXiv 2604.27039, sections 3.1 and 5.3):

- State ``s_t`` is the prompt and the first ``t`` tokens of a completion; ``n_t = L - t`` tokens are still to come, the
  end-of-sequence token counted. Every token costs ``1 - gamma``: reward ``r_t = -(1 - gamma)``.
- The return ``G_t = r_t + gamma * G_{t+1} = -(1 - gamma**n_t)`` lies in (-1, 0]; nearer 0 is nearer the end, and the
  state after a chosen end-of-sequence token is terminal with a value of exactly 0.
- A model's logit ``z`` gives the value ``V = -sigmoid(z)`` and the length ``n = -softplus(z) / ln(gamma)``.
- Arrays are `(B, T)`, aligned with the completion's tokens: entry ``t`` of ``values`` is the value *before* token ``t``
  was chosen. ``mask`` is 1 where token ``t`` exists, a prefix of ones in every row. What stands at masked slots does
  not matter; outputs are 0 there and keep the dtype of their input.

The paper's text writes the same quantity with two signs; here a larger value always means a nearer end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

_MASKS_ARE_TRUSTED = ContextVar("masks_are_trusted", default=False)


@contextmanager
def trusted_masks() -> Iterator[None]:
    """A context in which the layout of masks is taken for granted, as a trainer's that has padded the rows itself: to
    look at a mask on a GPU makes the host wait until all is done that the GPU has to do."""
    before = _MASKS_ARE_TRUSTED.set(True)
    try:
        yield
    finally:
        _MASKS_ARE_TRUSTED.reset(before)


def is_laid_out(*misplaced: Tensor) -> bool:
    """Whether none of these boolean tensors is true anywhere; not looked at inside [`trusted_masks`]."""
    return _MASKS_ARE_TRUSTED.get() or not any(bool(each.any()) for each in misplaced)


def to_device(numbers: Sequence, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A list of the host as a tensor on the device of another; the host does not wait for the copy."""
    return torch.tensor(numbers, dtype=dtype).to(like.device, non_blocking=True)


def check_gamma(gamma: float) -> float:
    """Return `gamma` as a Python float, or raise a `ValueError` if it is not strictly between 0 and 1."""
    gamma = float(gamma)
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma must lie strictly between 0 and 1, got {gamma}; fit it with `fit_gamma(lengths)`.")
    return gamma


def check_mask(mask: Tensor) -> Tensor:
    """Return `mask` as a boolean `(B, T)` tensor, or raise a `ValueError` if a row is not a prefix of ones."""
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape (B, T), got {tuple(mask.shape)}.")
    exists = mask.bool()
    if not is_laid_out(exists[:, 1:] & ~exists[:, :-1]):
        rows = (exists[:, 1:] & ~exists[:, :-1]).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"mask must be a prefix of ones in every row, but rows {rows} have a 1 after a 0. Align the arrays with "
            "the completion (prompt and left padding removed); mark tokens that are not actions with `action_mask`."
        )
    return exists


def next_values(
    values: Tensor, mask: Tensor, bootstrap: Tensor | None = None, action_mask: Tensor | None = None
) -> Tensor:
    """Value of the state *after* each token, ``V(s_{t+1})``; after an action, of the next state that decides.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): ``V(s_t)`` before each token.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where the token exists.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*): value after the last token; 0 (terminal) when omitted.
        action_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 where the policy chose the token. The transition from one action to the next then spans the tool output
            or environment text between them, whose own states count for nothing.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 at masked slots.
    """
    exists = check_mask(mask)
    rows, steps = values.shape
    zero = torch.zeros_like(values)
    end = values.new_zeros(rows) if bootstrap is None else bootstrap.to(values.dtype)
    extended = torch.cat([torch.where(exists, values, zero), end.unsqueeze(1)], dim=1)
    decides = exists if action_mask is None else exists & action_mask.bool()
    # The slot of the next state that decides; `steps`, the slot of the end, where none follows.
    slots = torch.where(decides, torch.arange(steps, device=values.device), steps)
    slots = torch.cat([slots, slots.new_full((rows, 1), steps)], dim=1)[:, 1:]
    following = slots.flip(1).cummin(dim=1).values.flip(1)
    return torch.where(exists, extended.gather(1, following), zero)


def discounted_sums(x: Tensor, discount: Tensor) -> Tensor:
    """``y_t = x_t + discount_t * y_{t+1}`` along rows `(B, T)`, in log2(T) steps instead of T.

    Each step doubles the number of terms that a slot has summed up (a prefix scan, Hillis and Steele, 1986).
    """
    reach = 1
    while reach < x.shape[1]:
        x = x + discount * F.pad(x[:, reach:], (0, reach))
        discount = discount * F.pad(discount[:, reach:], (0, reach))
        reach *= 2
    return x


def discounted_return(remaining: Tensor, gamma: float) -> Tensor:
    """Length return ``G = -(1 - gamma**n)`` for `n` tokens still to come (arXiv 2604.27039, section 3.1).

    Computed as ``expm1(n * ln(gamma))`` with ``ln(gamma)`` in double precision: ``-(1 - gamma**n)`` in float32 loses
    most digits of the return at gamma = 0.9998.

    Args:
        remaining (`torch.Tensor` of any shape): tokens still to come, end-of-sequence counted; infinite is allowed.
        gamma (`float`): discount of the length return, in (0, 1).

    Returns:
        `torch.Tensor` of the same shape in (-1, 0]; the default float dtype for integer input.
    """
    if not remaining.is_floating_point():
        remaining = remaining.to(torch.get_default_dtype())
    return torch.expm1(remaining * math.log(check_gamma(gamma)))


def remaining_from_logits(logits: Tensor, gamma: float) -> Tensor:
    """Tokens still to come that a logit stands for, ``n = -softplus(z) / ln(gamma)`` (any shape, same dtype).

    Exact where ``log(1 + V)`` is not: a float32 value cannot tell two long lengths apart, its logit can.
    """
    return F.softplus(logits) / -math.log(check_gamma(gamma))


def logits_from_remaining(remaining: Tensor, gamma: float) -> Tensor:
    """Logit of a remaining length, the inverse of [`remaining_from_logits`]; -inf for 0 tokens.

    With ``x = -n * ln(gamma)`` this is ``log(exp(x) - 1) = x + log(-expm1(-x))``, which neither overflows for a long
    length nor cancels for a short one.
    """
    if not remaining.is_floating_point():
        remaining = remaining.to(torch.get_default_dtype())
    x = remaining * -math.log(check_gamma(gamma))
    return x + torch.log(-torch.expm1(-x))


def remaining_from_value(value: Tensor, gamma: float) -> Tensor:
    """Tokens still to come that a value stands for, ``n = ln(1 + V) / ln(gamma)``; infinite for a value of -1.

    For means of returns (the *return-consistent* length, arXiv 2604.27039, section 4.4) and for plots. A model's own
    lengths come from its logits: see [`remaining_from_logits`].
    """
    return torch.log1p(value) / math.log(check_gamma(gamma))


def fit_gamma(lengths: Tensor | Sequence[int], quantile: float = 0.99, coverage: float = 0.99) -> float:
    """Discount for which the returns of observed lengths fill (-1, 0) (arXiv 2604.27039, section 5.3).

    ``gamma = (1 - coverage)**(1 / L_q)``: a completion as long as the `quantile` of the lengths has the return
    ``-coverage``.

    Args:
        lengths (`torch.Tensor` or sequence of `int`): lengths in tokens, end-of-sequence counted, all >= 1.
        quantile (`float`, *optional*, defaults to `0.99`): which quantile of the lengths is covered, in (0, 1].
        coverage (`float`, *optional*, defaults to `0.99`): magnitude of the return there, in (0, 1).

    Returns:
        `float`: gamma, a Python float (double precision).

    Example: lengths whose 99th percentile is 100 give ``0.01**(1/100) = 0.9550``.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.float64).flatten()
    if lengths.numel() == 0:
        raise ValueError("fit_gamma needs at least one length; the rollouts hold no finished completion.")
    if not 0.0 < quantile <= 1.0 or not 0.0 < coverage < 1.0:
        raise ValueError(f"quantile must be in (0, 1] and coverage in (0, 1), got {quantile} and {coverage}.")
    if not bool(torch.isfinite(lengths).all()) or float(lengths.min()) < 1:
        raise ValueError("lengths must be finite and at least 1 token (the end-of-sequence token counts).")
    # Sorted by hand: torch.quantile refuses more than 16 million entries.
    position = quantile * (lengths.numel() - 1)
    ordered = lengths.sort().values
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    longest = float(low + (high - low) * (position - math.floor(position)))
    return (1.0 - coverage) ** (1.0 / longest)


def td_residual(
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    bootstrap: Tensor | None = None,
    action_mask: Tensor | None = None,
) -> Tensor:
    """Temporal-difference residual ``d_t = -(1 - gamma) + gamma * V(s_{t+1}) - V(s_t)`` of the length return.

    Positive: token `t` brought the end nearer than the model expected. (The paper's equation 16 calls positive
    "longer"; it is written for ``-V``. See [`horizon_shift`].)

    Args:
        values (`torch.Tensor` of shape `(B, T)`): ``V(s_t)`` in (-1, 0).
        mask (`torch.Tensor` of shape `(B, T)`): 1 where the token exists.
        gamma (`float` or `torch.Tensor` of shape `(B, T)`): discount of the length return.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*): value after the last token; 0 (finished) when omitted.
        action_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 where the policy chose the token, see
            [`next_values`]; the others have no residual.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 at masked slots and at tokens that are not actions.
    """
    exists = check_mask(mask)
    if isinstance(gamma, Tensor):
        gamma = torch.where(exists, gamma.to(values.dtype), torch.ones_like(values))
    residual = -(1.0 - gamma) + gamma * next_values(values, mask, bootstrap, action_mask) - values
    counts = exists if action_mask is None else exists & action_mask.bool()
    return torch.where(counts, residual, torch.zeros_like(values))


def horizon_shift(
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    bootstrap: Tensor | None = None,
    action_mask: Tensor | None = None,
) -> Tensor:
    """``-td_residual``: positive where a token made the completion longer than expected (arXiv 2604.27039, eq. 16).

    Arguments and shape as in [`td_residual`].
    """
    return -td_residual(values, mask, gamma, bootstrap, action_mask)


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, and float32 on Apple's MPS, which has no other."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
