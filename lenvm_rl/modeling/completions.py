"""What a model says along completions: the one reading of values and of log-probabilities, and the layout of a batch.

A batch is laid out as TRL has it: prompts `(B, P)` padded on the left, completions `(B, T)` padded on the right. A
value model has `T + 1` states along a completion, from before the first token to after the last; a policy has chosen
`T` tokens. What stands at masked slots does not matter, not even an id outside the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lenvm_rl.returns import is_laid_out


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask `(B, S)` of rows of ids, padded on the left."""
    return _padded(rows, "left", pad_token_id, device)


def pad_right(
    rows: Sequence[Sequence[int]], pad_token_id: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask `(B, S)` of rows of ids, padded on the right."""
    return _padded(rows, "right", pad_token_id, device)


def _padded(rows, side, filler, device) -> tuple[Tensor, Tensor]:
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    exists = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, filler, side).to(device), pad_sequence(exists, True, 0, side).to(device)


def prompt_mask(
    input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None, end_ids: Sequence[int]
) -> Tensor:
    """Which prompt tokens exist: what is given, or else what `generate` makes of the ids, so that both see the same.

    There, every pad token is padding, unless it is an end as well: then all tokens count, for nobody can tell.

    Args:
        input_ids (`torch.Tensor` of shape `(B, S)`): prompts.
        attention_mask (`torch.Tensor`, *optional*): `(B, S)`, or one row for each prompt of which there are several.
        pad_token_id (`int`, *optional*), end_ids (`Sequence[int]`): of the generation.

    Returns:
        `torch.Tensor` of shape `(B, S)`.
    """
    if attention_mask is None:
        if pad_token_id is None or pad_token_id in end_ids:
            return torch.ones_like(input_ids)
        return (input_ids != pad_token_id).long()
    rows, width = input_ids.shape
    if attention_mask.dim() != 2 or attention_mask.shape[1] != width or rows % attention_mask.shape[0]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but the prompts {tuple(input_ids.shape)}: make "
            "one processor for each batch of prompts."
        )
    return attention_mask.to(input_ids.device).repeat_interleave(rows // attention_mask.shape[0], dim=0)


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions counted from each row's first token, so that padding on the left moves nothing.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, S)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.LongTensor` of shape `(B, S)`: 0 at padding before the tokens, the last token's position after them.
    """
    if attention_mask.ndim != 2:
        raise ValueError(
            f"Positions are counted from a mask of shape (B, S), and this one is {tuple(attention_mask.shape)}: "
            "give `position_ids`."
        )
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def completion_logits(
    model: Callable,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    chunk_size: int | None = None,
    further_inputs: Callable[[slice], dict] | None = None,
) -> Tensor:
    """The logits of a value model at every state of a batch of completions, with gradients if the caller has them on.

    Args:
        model (`Callable`): `model(input_ids=…, attention_mask=…)` returns an object with `.logits` of shape `(B, S)`;
            positions are counted from the mask.
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(B, P)`): prompts, padded on the left.
        completion_ids, completion_mask (`torch.Tensor` of shape `(B, T)`): completions, padded on the right.
        chunk_size (`int`, *optional*): rows per forward; all at once by default.
        further_inputs (`Callable`, *optional*): gives the model's further keyword arguments for a `slice` of rows,
            such as their pictures.

    Returns:
        `torch.FloatTensor` of shape `(B, T + 1)`: entry t is the logit of the state before token t, so entry 0 is read
        at the last prompt token and the entry at the row's length after its last token. Entries beyond that are 0.

    Raises:
        `ValueError`: the batch is laid out otherwise, or the model does not give one number per position.
    """
    _check_layout(prompt_ids, prompt_mask, completion_ids, completion_mask)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is the number of rows per forward, so at least 1, not {chunk_size}.")
    mask = torch.cat([prompt_mask.long(), completion_mask.long()], dim=1)
    ids = torch.cat([prompt_ids, completion_ids], dim=1).masked_fill(mask == 0, 0)
    size = len(ids) if chunk_size is None else chunk_size
    chunks = []
    for index, (rows, rows_mask) in enumerate(zip(ids.split(size), mask.split(size), strict=True)):
        further = {} if further_inputs is None else further_inputs(slice(index * size, (index + 1) * size))
        logits = model(input_ids=rows, attention_mask=rows_mask, **further).logits
        if logits.shape != rows.shape:
            raise ValueError(
                f"A value model gives one logit per position, here {tuple(rows.shape)}, but this model gives "
                f"{tuple(logits.shape)}: make one with `LengthValueModel.from_backbone`."
            )
        chunks.append(logits[:, prompt_ids.shape[1] - 1 :].float())
    exists = nn.functional.pad(completion_mask.bool(), (1, 0), value=True)
    return torch.where(exists, torch.cat(chunks), 0.0)


def check_in_eval_mode(model: nn.Module) -> None:
    """Raises a `ValueError` if a length value model has its dropout on."""
    if model.training:
        raise ValueError("the length value model is in training mode: call `.freeze()` or `.eval()` on it first.")


@torch.no_grad()
def state_logits(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    finished: Sequence[bool],
    max_tokens: int = 16384,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """[`completion_logits`] of any number of rows of ids, forward by forward, the longest completions first.

    Args:
        model (`LengthValueModel`): in eval mode.
        prompt_ids, completion_ids (sequence of sequences of `int`): each completion, end-of-sequence kept, and its
            prompt.
        finished (`Sequence[bool]`): whether the last token is an end, after which nothing is read.
        max_tokens (`int`, *optional*, defaults to `16384`): most tokens in a forward, padding counted; more where one
            row is longer.

    Yields:
        `tuple[list[int], list[torch.Tensor]]`: indices of the completions of a forward, and for each the logits of its
        states `(L,)`, or `(L + 1,)` if it was cut, on the CPU.
    """
    rows = [
        [*prompt, *(completion[:-1] if ended else completion)]
        for prompt, completion, ended in zip(prompt_ids, completion_ids, finished, strict=True)
    ]
    with tqdm(total=len(rows), desc="reading", unit="completion") as progress:
        for batch in _longest_first([len(row) for row in rows], max_tokens):
            ids, mask = pad_right([rows[index] for index in batch], device=model.device)
            logits = model(input_ids=ids, attention_mask=mask).logits.cpu()
            yield (
                batch,
                [row[len(prompt_ids[index]) - 1 : len(rows[index])] for index, row in zip(batch, logits, strict=True)],
            )
            progress.update(len(batch))


def _longest_first(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows that share a forward, the longest first: what is too large for the memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def bootstrap_values(values: Tensor, mask: Tensor, finished: Tensor) -> Tensor:
    """The value after each row's last token: exactly 0 where the completion finished, because nothing follows the end.

    Args:
        values (`torch.Tensor` of shape `(B, T + 1)`): one number per state, as [`completion_logits`] lays them out.
            The 0 of a finished row is a value; as a logit it would not say "nothing follows".
        mask (`torch.Tensor` of shape `(B, T)`): 1 where a token exists: ones, then zeros, in each row.
        finished (`torch.Tensor` of shape `(B,)`): True where nothing follows, False where the completion was cut.

    Returns:
        `torch.Tensor` of shape `(B,)`, in the dtype of values.
    """
    rows, steps = mask.shape
    if values.shape != (rows, steps + 1) or finished.shape != (rows,):
        raise ValueError(
            f"With a mask of shape (B, T) = {(rows, steps)}, values are (B, T + 1) and finished is (B,); these are "
            f"{tuple(values.shape)} and {tuple(finished.shape)}."
        )
    _check_padded_on_the_right(mask)
    last = values.gather(1, mask.long().sum(dim=1, keepdim=True)).squeeze(1)
    return torch.where(finished.bool(), 0.0, last)


def choice_logits(
    policy: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """The policy's logits `(B, T, V)` that each token of a batch of completions was chosen by; arguments as in
    [`completion_logits`]."""
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    return policy(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=mask,
        position_ids=position_ids_from_mask(mask),
        logits_to_keep=completion_ids.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]


def token_log_probs(
    policy: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """``log pi(a_t | s_t)`` of every token of a batch of completions, all tokens being candidates.

    Args:
        policy (`PreTrainedModel`): gradients go back to it if the caller has them on.
        prompt_ids, prompt_mask, completion_ids, completion_mask: as in [`completion_logits`].
        temperature (`float`, *optional*, defaults to `1.0`): of the policy, positive.

    Returns:
        `torch.FloatTensor` of shape `(B, T)`: 0 at padding.
    """
    batch = (prompt_ids, prompt_mask, completion_ids, completion_mask)
    scores = choice_logits(policy, *batch).float() / temperature
    chosen = scores.gather(2, completion_ids.unsqueeze(2)).squeeze(2) - scores.logsumexp(dim=2)
    return torch.where(completion_mask.bool(), chosen, 0.0)


def _check_layout(prompt_ids, prompt_mask, completion_ids, completion_mask) -> None:
    shapes = [tuple(array.shape) for array in (prompt_ids, prompt_mask, completion_ids, completion_mask)]
    prompt, completion = shapes[0], shapes[2]
    if shapes != [prompt, prompt, completion, completion] or [len(prompt), len(completion)] != [2, 2]:
        raise ValueError(f"Prompt ids and mask are (B, P), completion ids and mask (B, T); these are {shapes}.")
    if prompt[0] != completion[0]:
        raise ValueError(f"There are {prompt[0]} prompts and {completion[0]} completions: give one row of each.")
    tokens = prompt_mask.bool()
    if prompt[1] == 0 or not is_laid_out(~tokens[:, -1], tokens[:, :-1] & ~tokens[:, 1:]):
        raise ValueError(
            "A prompt has at least one token and is padded on the left, so a row of prompt_mask is zeros, then ones."
        )
    _check_padded_on_the_right(completion_mask)


def _check_padded_on_the_right(mask) -> None:
    tokens = mask.bool()
    if not is_laid_out(tokens[:, 1:] & ~tokens[:, :-1]):
        raise ValueError("A completion is padded on the right, so a row of its mask is ones, then zeros.")
