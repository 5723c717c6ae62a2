"""What ends a completion, and what counts as its length: the one place that the whole library asks.

- A completion *ends* with one of several ids: the tokenizer's end of sequence, what the policy's generation
  settings name, and what a run adds ([`end_token_ids`]). Chat models have two as a rule, one of a turn and one of a
  document.
- It is *finished* if its last token is such an id and the policy chose it; if who sampled it says so (a stop string, an
  environment whose episode is over); or if it stopped short of its budget, because then something ended it. It is *cut*
  otherwise ([`finished_rows`]). Nothing follows a finished completion, so its value after the last token is 0; a cut
  one would have gone on.
- Tokens that the policy did not choose (tool output, environment text) end nothing and have no length, and an end id
  does not count as length for people ([`own_length`], [`own_lengths`]).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.returns import to_device


def end_token_ids(tokenizer: Any, *settings: Any) -> list[int]:
    """Every id that ends a completion, ascending.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its `eos_token_id` ends a completion, if it has one.
        settings: further ends: a `GenerationConfig` (its `eos_token_id`), an id, several ids, or `None`.

    Returns:
        `list[int]`: empty where nothing ends a completion but its budget.
    """
    ids = set() if tokenizer is None else _as_ids(tokenizer.eos_token_id)
    for each in settings:
        ids |= _as_ids(each)
    return sorted(ids)


def padding_id(tokenizer: Any, end_ids: Sequence[int]) -> int:
    """What fills a batch: the tokenizer's pad token, or an end where it has none.

    One token may be both, as in most base models: what exists is said by masks, and a completion is over at its first
    end, so what stands behind it is read by nobody.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the policy.
        end_ids (`Sequence[int]`): ids that end a completion, at least one.
    """
    if not end_ids:
        raise ValueError("Nothing ends a completion: set `tokenizer.eos_token`, or name the ids that do.")
    return end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def strip_completion(row: Sequence[int], end_ids: Collection[int], max_new_tokens: int) -> tuple[list[int], str]:
    """A generated row without the padding after its end, and its finish reason.

    Args:
        row (`Sequence[int]`): generated ids, padded to the width of the batch.
        end_ids (`Collection[int]`): ids that end a completion; the first of them is kept.
        max_new_tokens (`int`): width of a row that was cut.

    Returns:
        `tuple[list[int], str]`: the ids as sampled, and `"stop"` or `"length"`. An error, where a row without an end is
        shorter than `max_new_tokens`: something else stopped it.
    """
    ids = through_first_end(row, end_ids)
    if ids and ids[-1] in end_ids:
        return ids, "stop"
    if len(ids) != max_new_tokens:
        raise ValueError(
            f"A completion stopped after {len(ids)} of {max_new_tokens} tokens without any of the end-of-sequence ids "
            f"{sorted(end_ids)}; remove the stopping criterion that did it, or add its token to the ids."
        )
    return ids, "length"


def through_first_end(row: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """The ids of a row up to its first end, which is kept; all of them where there is none."""
    for place, token in enumerate(row):
        if token in end_ids:
            return list(row[: place + 1])
    return list(row)


def finished_rows(
    completion_ids: Tensor,
    mask: Tensor,
    end_ids: Collection[int],
    action_mask: Tensor | None = None,
    budget: int | Tensor | None = None,
    said: Tensor | None = None,
) -> Tensor:
    """Whether each completion finished; the others were cut.

    Args:
        completion_ids (`torch.LongTensor` of shape `(B, T)`): tokens, padded on the right.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where a token exists.
        end_ids (`Collection[int]`): ids that end a completion.
        action_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 where the policy chose the token; everywhere when
            omitted. An end id in the text of an environment is no end.
        budget (`int` or `torch.LongTensor` of shape `(B,)`, *optional*): tokens, tool output included, at which a row
            is cut. A row that stopped before it was ended by something; when omitted, an end id alone ends a row.
        said (`torch.Tensor` of shape `(B,)`, *optional*): word from who sampled the rows, which settles it.

    Returns:
        `torch.BoolTensor` of shape `(B,)`: `False` for rows without a token.
    """
    lengths = mask.bool().sum(dim=1)
    if said is not None:
        return said.to(mask.device).bool() & (lengths > 0)
    finished = ends_by_id(completion_ids, mask, end_ids, action_mask)
    if budget is not None:
        finished = finished | (lengths < (budget.to(mask.device) if isinstance(budget, Tensor) else budget))
    return finished & (lengths > 0)


def ends_by_id(
    completion_ids: Tensor, mask: Tensor, end_ids: Collection[int], action_mask: Tensor | None = None
) -> Tensor:
    """Whether the last token of each row is an end id that the policy chose, `(B,)`; arguments as in
    [`finished_rows`]."""
    exists = mask.bool()
    actions = exists if action_mask is None else exists & action_mask.bool()
    if not mask.shape[1]:
        return torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    last = (exists.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    ends = torch.isin(completion_ids, to_device(sorted(end_ids), mask, torch.long))
    return (ends & actions).gather(1, last).squeeze(1)


def own_lengths(
    completion_ids: Tensor, mask: Tensor, end_ids: Collection[int], action_mask: Tensor | None = None
) -> Tensor:
    """Tokens that the policy wrote in each row, its end not counted: `torch.LongTensor` of shape `(B,)`.

    Arguments as in [`finished_rows`]. A row that finished without an end id has all its tokens.
    """
    exists = mask.bool()
    actions = exists if action_mask is None else exists & action_mask.bool()
    return actions.sum(dim=1) - ends_by_id(completion_ids, mask, end_ids, action_mask).long()


def own_length(ids: Sequence[int], end_ids: Collection[int] = (), actions: Sequence[int] | None = None) -> int:
    """Tokens that the policy wrote in one completion without padding, its end not counted.

    Args:
        ids (`Sequence[int]`): of the completion.
        end_ids (`Collection[int]`, *optional*): ids that end a completion; without any, an end counts.
        actions (`Sequence[int]`, *optional*): 1 where the policy chose the token; everywhere when omitted.

    Example: ids ``[8, 9, 4, 4, 1]`` with actions ``[1, 1, 0, 0, 1]`` are 3 tokens, and 2 if 1 is an end.
    """
    if actions is None:
        actions = [1] * len(ids)
    ended = len(ids) > 0 and bool(actions[-1]) and int(ids[-1]) in end_ids
    return sum(bool(action) for action in actions) - int(ended)


def likeliest_end(scores: Tensor, end_ids: Sequence[int]) -> Tensor:
    """The end that each row would most likely choose: ids, `torch.LongTensor` of shape `(B,)`.

    Args:
        scores (`torch.Tensor` of shape `(B, V)`): logits or log-probabilities of the policy.
        end_ids (`Sequence[int]`): ids that end a completion, at least one; of equal ones, the first.
    """
    ends = torch.tensor(list(end_ids), dtype=torch.long, device=scores.device)
    return ends[scores[:, ends].argmax(dim=1)]


def _as_ids(end: object) -> set[int]:
    if end is None:
        return set()
    if isinstance(end, int):
        return {end}
    if isinstance(end, Tensor):
        return set(end.reshape(-1).tolist())
    if isinstance(end, Iterable):
        return {int(each) for each in end}
    return _as_ids(end.eos_token_id)
