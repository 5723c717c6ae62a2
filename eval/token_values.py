"""What a length value model says along completions that are already sampled: lengths, values and shifts of each token.

Arrays follow lenvm_rl.returns: entry ``t`` belongs to the state before token ``t`` was chosen, and a shift to the token
itself, positive where it made the completion longer than expected. After a chosen end-of-sequence token nothing
follows: its value is exactly 0 and so is the length. After the last token of a cut completion the model is asked once
more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lenvm_rl.decoding.scoring import check_scorable
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


@torch.no_grad()
def state_logits(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    finished: Sequence[bool],
    max_tokens: int,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Logits of all states along completions, forward by forward, the longest completions first.

    Args:
        model, prompt_ids, completion_ids, finished, max_tokens: as in [`token_values`]; the model may be of any target.

    Yields:
        `tuple[list[int], list[torch.Tensor]]`: indices of the completions of a forward, and for each the logits of its
        states `(L,)`, or `(L + 1,)` if it was cut, on the CPU.
    """
    # Nothing is read after an end-of-sequence token, so it is not run.
    rows = [
        [*prompt, *(completion[:-1] if ended else completion)]
        for prompt, completion, ended in zip(prompt_ids, completion_ids, finished, strict=True)
    ]
    with tqdm(total=len(rows), desc="reading", unit="completion") as progress:
        for batch in _batches([len(row) for row in rows], max_tokens):
            logits = _run(model, [rows[index] for index in batch])
            yield (
                batch,
                [row[len(prompt_ids[index]) - 1 : len(rows[index])] for index, row in zip(batch, logits, strict=True)],
            )
            progress.update(len(batch))


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows that share a forward, the longest first: what is too large for the memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _run(model: nn.Module, rows: Sequence[list[int]]) -> Tensor:
    """Logits of rows padded on the right, on the CPU."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    return output.logits.cpu()


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
