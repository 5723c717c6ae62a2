"""What a length value model says along completions that are already sampled: lengths, values and shifts of each token.

Arrays follow lenvm_rl.returns: entry ``t`` belongs to the state before token ``t`` was chosen, and a shift to the token
itself, positive where it made the completion longer than expected. After a chosen end-of-sequence token nothing
follows: its value is exactly 0 and so is the length. After the last token of a cut completion the model is asked once
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lenvm_rl.decoding.scoring import check_scorable
from lenvm_rl.modeling.completions import state_logits
from lenvm_rl.returns import horizon_shift, remaining_from_logits


@dataclass(frozen=True)
class TokenValues:
    """A completion of L tokens as the model sees it; all arrays float64 on the CPU.

    Args:
        remaining (`torch.Tensor` of shape `(L,)`): predicted tokens still to come before each token, end-of-sequence
            counted.
        values (`torch.Tensor` of shape `(L,)`): ``V(s_t)`` in (-1, 0).
        horizon_shift (`torch.Tensor` of shape `(L,)`): of each token, in value (arXiv 2604.27039, eq. 16).
        shift_in_tokens (`torch.Tensor` of shape `(L,)`): ``n(s_{t+1}) + 1 - n(s_t)``: by how many tokens the whole
            completion is expected to be longer for this token.
    """

    remaining: Tensor
    values: Tensor
    horizon_shift: Tensor
    shift_in_tokens: Tensor


@torch.no_grad()
def token_values(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    finished: Sequence[bool],
    max_tokens: int = 16384,
) -> list[TokenValues]:
    """Runs the model once along every completion.

    Args:
        model (`LengthValueModel`): in eval mode, fitted to the length return.
        prompt_ids (`Sequence[Sequence[int]]`): each completion's prompt.
        completion_ids (`Sequence[Sequence[int]]`): sampled ids, the end-of-sequence token of a finished one included.
        finished (`Sequence[bool]`): whether the last token is end-of-sequence (else the completion was cut).
        max_tokens (`int`, *optional*, defaults to `16384`): most tokens in a forward, padding counted; more where one
            completion is longer. Completions of similar length share a forward.

    Returns:
        `list[TokenValues]`: one for each completion, in the order given.

    Raises:
        ValueError: if the numbers of prompts, completions and ends differ, a prompt or a completion is empty,
            max_tokens is below 1, or the model is in training mode or was fitted to no values.
    """
    check_scorable(model)
    if not len(prompt_ids) == len(completion_ids) == len(finished):
        raise ValueError(
            f"There are {len(prompt_ids)} prompts, {len(completion_ids)} completions and {len(finished)} ends: give "
            "one of each for every completion."
        )
    for name, rows in (("prompt", prompt_ids), ("completion", completion_ids)):
        empty = [index for index, row in enumerate(rows) if not len(row)]
        if empty:
            raise ValueError(f"The {name} of completions {empty[:10]} has no tokens, so there is no state to read.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
    found: dict[int, TokenValues] = {}
    for batch, states in state_logits(model, prompt_ids, completion_ids, finished=finished, max_tokens=max_tokens):
        for index, logits in zip(batch, states, strict=True):
            found[index] = _values(logits.double(), bool(finished[index]), model.config.gamma)
    return [found[index] for index in range(len(completion_ids))]


def _values(logits: Tensor, finished: bool, gamma: float) -> TokenValues:
    """From the logits of all states that the model was asked about: L if finished, else L + 1."""
    remaining, values = remaining_from_logits(logits, gamma), -torch.sigmoid(logits)
    nothing = torch.zeros(1, dtype=logits.dtype)
    after = nothing if finished else remaining[-1:]
    steps = len(logits) if finished else len(logits) - 1
    inside = values[None, :steps]
    shift = horizon_shift(inside, torch.ones_like(inside), gamma, None if finished else values[-1:])[0]
    following = torch.cat([remaining[1:steps], after])
    return TokenValues(remaining[:steps], values[:steps], shift, following + 1 - remaining[:steps])
