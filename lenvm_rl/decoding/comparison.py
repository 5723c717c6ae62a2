"""Whether cached scoring of a model says what full rows say: compared before it is trusted.

It is right only where a token's key and value depend on nothing that comes later, and where the model's attention is
the one that is put in its place. Some position schemes break the first (frequencies that change with the length of a
row), from the start or beyond some length. So a few short forwards are compared when a model is first used, and again
before rows get longer than what was compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lenvm_rl.modeling.backbones import window_sizes
from lenvm_rl.modeling.completions import position_ids_from_mask
from lenvm_rl.modeling.length_value_model import LengthValueModel

if TYPE_CHECKING:
    from lenvm_rl.decoding.scoring import SlotScorer

# Tokens before the candidates where cached scoring is compared with full rows, and rows that are no longer short.
_PREFIX, _SHORT = 6, 16
# In 16 bits rounding carries one text or another far off, at any length, and a scheme of positions carries off all:
# what counts are medians over so many texts. It is wrong beyond so many roundings of a product, and such a share of
# what the last bit of every embedding moves (SmolLM2, which is right: at most 0.37 of it at 19 lengths; frequencies
# that change with the length: 0.7 at 118 tokens).
_TEXTS, _ROUNDINGS, _SHARE = 5, 2.0, 0.45
# Candidates side by side, and which of them are compared.
_CANDIDATES, _COMPARED = 32, [0, 15, 31]
# How a decoder says that it cannot do what it is asked for.
_REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
# Up to how many tokens cached scoring is known to be right, for each model.
_CHECKED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def check_against_full_rows(scorer: SlotScorer, tokens: int) -> None:
    """Raises a `ValueError` unless a scorer says what full rows say, for rows of so many tokens, prompt included."""
    checked = _CHECKED.get(scorer.model, 0)
    if tokens <= checked:
        return
    # Twice as far if that is right, so that rows which grow token by token are compared a few times only.
    limit = max(tokens, 2 * checked, _SHORT)
    limit = limit if scorer.context is None else min(limit, scorer.context)
    while True:
        try:
            _compare(scorer, checked, limit)
            break
        except ValueError:
            if limit <= max(tokens, _SHORT):
                raise
            limit = (max(tokens, _SHORT) + limit) // 2
    _CHECKED[scorer.model] = limit


def _compare(scorer: SlotScorer, checked: int, limit: int) -> None:
    """Compares what may differ between rows of `checked` and of `limit` tokens."""
    if not checked:
        _compare_with_full_rows(scorer, _PREFIX, _PREFIX)
    if limit > _SHORT:
        # A few tokens, then a leap to the end: no position in between has to be computed.
        _compare_with_full_rows(scorer, _PREFIX, limit - 2)
    for window in window_sizes(scorer.model.config):
        if checked < 2 * window and window < 2 * limit:
            _compare_with_full_rows(scorer, window, window)


def _compare_with_full_rows(scorer: SlotScorer, prefix: int, position: int) -> None:
    """Raises unless a scorer says what full rows say: of one text, in 16 bits in the median of several.

    Args:
        scorer ([`~lenvm_rl.decoding.scoring.SlotScorer`]): left as it was.
        prefix (`int`): tokens in the cache.
        position (`int`): of the first candidates. Further than `prefix`, it is a leap: what a position far out means
            for the tokens before it shows without computing what lies between.
    """
    model = scorer.model
    if scorer.context is not None:
        prefix, position = min(prefix, scorer.context - 2), min(position, scorer.context - 2)
    if prefix < 1:
        return
    half = torch.finfo(model.get_input_embeddings().weight.dtype).bits == 16
    found = [_compare_text(scorer, prefix, position, text) for text in range(_TEXTS if half else 1)]
    if half:
        errors, noises = (statistics.median(each) for each in zip(*(one[1:] for one in found), strict=True))
        wrong = errors > max(_ROUNDINGS, _SHARE * noises)
    else:
        wrong = found[0].error > 1.0
    if wrong:
        raise ValueError(
            f"candidates scored against a cache of {_name(model)} get other values than in full rows (at position "
            f"{position}, a logit differs by {max(one.difference for one in found):.2g}): its positions or its "
            "attention depend on how long a row is. Score with scoring='full'."
        )


class _Compared(NamedTuple):
    """One text: by how much a logit differs; in 32 bits the same over what is allowed, in 16 bits the root mean square
    over the rounding of a product, and over the same what the last bit of every embedding moves."""

    difference: float
    error: float
    noise: float = 0.0


@torch.no_grad()
def _compare_text(scorer: SlotScorer, prefix: int, position: int, text: int) -> _Compared:
    """What a scorer says beside what full rows say, for two rows (one of them shorter) and two tokens in turn."""
    model, vocabulary = scorer.model, scorer.vocab_size
    device, first = model.get_input_embeddings().weight.device, 501 * text
    ids = (7 * torch.arange(2 * prefix, device=device) + 1 + first).view(2, prefix) % vocabulary
    exists = torch.ones_like(ids)
    exists[1, : prefix // 3] = 0
    candidates = (torch.arange(2 * _CANDIDATES, device=device).view(2, _CANDIDATES) + 3 + first) % vocabulary
    compared, chosen = candidates[:, _COMPARED], candidates[:, 0]
    full, noise, noise_of_half = [], 0.0, None
    for rows in (ids, torch.cat([ids, chosen.unsqueeze(1)], dim=1)):
        mask = torch.cat([exists, exists.new_ones(2, rows.shape[1] - prefix)], dim=1)
        logits, rounding, of_half = _full_rows(model, rows, mask, compared, prefix, position - prefix)
        full.append(logits)
        noise = max(noise, rounding)
        if of_half is not None:
            noise_of_half = max(noise_of_half or 0.0, of_half)
    full = torch.stack(full)
    try:
        cached = torch.stack(list(_cached(scorer, ids, exists, candidates, position - prefix)))
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        # Full rows went through, so it is the cache that cannot be shared.
        raise ValueError(
            f"candidates cannot be scored against a cache of {_name(model)} ({error}): score with scoring='full'."
        ) from error
    if position > prefix:
        # Frequencies that grow with the furthest position seen are put back by a near one.
        model(input_ids=ids[:, :1], attention_mask=torch.ones_like(ids[:, :1]))
    errors = (cached[:, :, _COMPARED] - full).abs()
    difference, spread = float(errors.max()), float(full.std())
    if noise_of_half is None:
        allowed = max(8 * noise, max(1e-3, 16 * _rounding(model)) * spread) + 1e-5
        return _Compared(difference, difference / allowed)
    rounding = _rounding(model) * spread + 1e-6
    return _Compared(difference, float(errors.square().mean().sqrt()) / rounding, noise_of_half / rounding)


def _cached(scorer: SlotScorer, ids: Tensor, exists: Tensor, candidates: Tensor, leap: int) -> Iterator[Tensor]:
    """Logits `(2, k)` of candidates, and of the same after the first of them, against a cache."""
    model = scorer.model
    own = model(input_ids=ids, attention_mask=exists, use_cache=True).past_key_values
    kinds = {type(own).__name__}
    if type(own) is DynamicCache:
        kinds = {type(layer).__name__ for layer in own.layers} - {DynamicLayer.__name__}
    if kinds:
        raise ValueError(
            f"it holds {', '.join(sorted(kinds))}, but siblings can share a prefix only in full attention, without a "
            "sliding window or a recurrent state"
        )
    twin = scorer.uncompared()
    slots = [twin.add(row[keep.bool()].tolist()) for row, keep in zip(ids, exists, strict=True)]
    everyone = torch.ones_like(candidates)
    # What is cached was read while the row was short.
    twin.score(slots, candidates[:, :1], everyone[:, :1])
    twin.leap = leap
    yield twin.score(slots, candidates, everyone)
    for slot, token in zip(slots, candidates[:, 0].tolist(), strict=True):
        twin.append(slot, [token])
    yield twin.score(slots, candidates, everyone)


def _full_rows(
    model: nn.Module, ids: Tensor, exists: Tensor, candidates: Tensor, prefix: int, leap: int
) -> tuple[Tensor, float, float | None]:
    """Logits `(2, k)` of candidates as complete rows, whose positions leap after `prefix` tokens.

    And how far rounding may move them: by what further tokens behind a candidate change, which should change nothing;
    and in 16 bits by what the last bit of every embedding changes, of which deep decoders make much.
    """
    count = candidates.shape[1]
    rows, mask = (torch.cat([each, each[:, -1:]], 1).repeat_interleave(count, 0) for each in (ids, exists))
    rows[:, -1] = candidates.flatten()
    positions = position_ids_from_mask(mask)
    positions[:, prefix:] += leap
    inputs = {"input_ids": rows, "attention_mask": mask, "position_ids": positions}
    longer = {name: torch.cat([each, each[:, -1:].expand(-1, 3)], dim=1) for name, each in inputs.items()}
    alone = model(**inputs).logits[:, -1].float()
    again = model(**longer).logits[:, rows.shape[1] - 1].float()
    noise, of_half = float((again - alone).abs().max()), None
    embedded = model.get_input_embeddings()(rows)
    if torch.finfo(embedded.dtype).bits == 16:
        sign = 1 - 2 * (torch.arange(embedded.numel(), device=rows.device).view(embedded.shape) * 7 // 5 % 2)
        moved = (embedded.float() * (1 + sign * torch.finfo(embedded.dtype).eps)).to(embedded.dtype)
        nudged = model(**{**inputs, "input_ids": None}, inputs_embeds=moved).logits[:, -1].float()
        of_half = float((nudged - alone).abs().max())
    return alone.view(*candidates.shape, *alone.shape[1:]), noise, of_half


def _name(model: nn.Module) -> str:
    return type(model.backbone if isinstance(model, LengthValueModel) else model).__name__


def _rounding(model: nn.Module) -> float:
    """Relative error of a product of matrices, as torch is set up."""
    weight = model.get_input_embeddings().weight
    kind, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    coarse = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-8}[torch.get_float32_matmul_precision()]
    return max(torch.finfo(dtype).eps, coarse)
