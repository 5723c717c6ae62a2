"""Whether candidates scored against a cache get the values of full rows: asked of the model itself, by short forwards.

The name of a decoder does not tell. What breaks it: positions whose frequencies change with the length of a row,
distances and windows counted in slots of the cache (where siblings stand side by side), a mask of its own, a state
beside keys and values.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lenvm_rl.completions import position_ids_from_mask
from lenvm_rl.modeling import LengthValueModel

# How a decoder says that it cannot do what it is asked for.
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
# Candidates side by side, and which of them are compared: slots of the cache matter more the further they are.
CANDIDATES, COMPARED = 32, [0, 15, 31]


@torch.no_grad()
def compare_with_full_rows(scorer, prefix: int, position: int) -> None:
    """Raises unless a scorer says what full rows say, for two rows (one of them padded) and two tokens in turn.

    Args:
        scorer ([`~lenvm_rl.scoring.CandidateScorer`]): left as it was.
        prefix (`int`): tokens in the cache.
        position (`int`): of the first candidates. Further than `prefix`, it is a leap: what a position far out means
            for the tokens before it shows without computing those in between.

    Raises:
        ValueError: on other values, or where the decoder cannot be asked so.
    """
    model, vocabulary = scorer.model, scorer.vocab_size
    if scorer.context is not None:
        prefix, position = min(prefix, scorer.context - 2), min(position, scorer.context - 2)
    if prefix < 1:
        return
    device = model.get_input_embeddings().weight.device
    ids = (7 * torch.arange(2 * prefix, device=device) + 1).view(2, prefix) % vocabulary
    exists = torch.ones_like(ids)
    exists[1, : prefix // 3] = 0
    candidates = (torch.arange(2 * CANDIDATES, device=device).view(2, CANDIDATES) + 3) % vocabulary
    compared, chosen = candidates[:, COMPARED], candidates[:, 0]
    full, noise = [], 0.0
    for rows in (ids, torch.cat([ids, chosen.unsqueeze(1)], dim=1)):
        mask = torch.cat([exists, exists.new_ones(2, rows.shape[1] - prefix)], dim=1)
        logits, rounding = _full_rows(model, rows, mask, compared, prefix, position - prefix)
        full.append(logits)
        noise = max(noise, rounding)
    full = torch.stack(full)
    try:
        cached = torch.stack(list(_cached(copy.copy(scorer), ids, exists, candidates, position - prefix)))
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        # Full rows went through, so it is the cache that cannot be shared.
        raise ValueError(
            f"candidates cannot be scored against a cache of {_name(model)} ({error}): score with scoring='full'."
        ) from error
    if position > prefix:
        # Frequencies that grow with the furthest position seen are put back by a near one.
        model(input_ids=ids[:, :1], attention_mask=torch.ones_like(ids[:, :1]))
    difference = float((cached[:, :, COMPARED] - full).abs().max())
    if difference > max(8 * noise, max(1e-3, 16 * _rounding(model)) * float(full.std())) + 1e-5:
        raise ValueError(
            f"candidates scored against a cache of {_name(model)} get other values than in full rows (at position "
            f"{position}, a logit differs by {difference:.2g}): its positions or its attention depend on how long a "
            "row is. Score with scoring='full'."
        )


def _cached(scorer, ids: Tensor, exists: Tensor, candidates: Tensor, leap: int):
    scorer.read(ids, exists, leap)
    kinds = {type(scorer.cache).__name__}
    if type(scorer.cache) is DynamicCache:
        kinds = {type(layer).__name__ for layer in scorer.cache.layers} - {DynamicLayer.__name__}
    if kinds:
        raise ValueError(
            f"it holds {', '.join(sorted(kinds))}, but siblings can share a prefix only in full attention, without a "
            "sliding window or a recurrent state"
        )
    everyone = torch.ones_like(candidates)
    yield scorer.score_unchecked(candidates, everyone)
    scorer.advance(candidates[:, 0], everyone[:, 0])
    yield scorer.score_unchecked(candidates, everyone)


def _full_rows(
    model: nn.Module, ids: Tensor, exists: Tensor, candidates: Tensor, prefix: int, leap: int
) -> tuple[Tensor, float]:
    """Logits `(2, k)` of candidates as complete rows, whose positions leap after `prefix` tokens.

    And how far rounding may move them: by what further tokens behind a candidate change, which should change nothing.
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
    return alone.view(candidates.shape), float((again - alone).abs().max())


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
