"""Value of the state after each of many candidate tokens, ``V(s + x)``, for every row of a batch.

Two scorers with one interface: `start` with the prompts, then `score` and `advance` for each generated token.

- [`CandidateScorer`]: one forward for each generated token. The candidates of a row are siblings: they stand at the
  same position, see the cached prefix and themselves, and not each other. The keys and values of the chosen candidate
  become part of the prefix, so that no second forward is needed. Tokens that were chosen without being scored wait, and
  join the prefix in the forward of the next candidates.
- [`FullRowScorer`]: runs each candidate as a complete row. Slow; works with any backbone, and serves as the reference.

Cached scoring is right only where a token's key and value depend on nothing that comes later. Some position schemes
break it (frequencies that change with the length of a row, distances counted in slots of the cache), from the start or
beyond some length. So it is compared with full rows: a few short forwards when a model is first used, and again before
rows get longer than what was compared.
"""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lenvm_rl.modeling.backbones import context_of, window_sizes
from lenvm_rl.modeling.completions import check_in_eval_mode, position_ids_from_mask
from lenvm_rl.modeling.length_value_model import LengthValueModel

MASKABLE_ATTENTION = ("eager", "sdpa")
# Tokens before the candidates where cached scoring is compared with full rows, and rows that are no longer short.
_PREFIX, _SHORT = 6, 16
# Candidates side by side, and which of them are compared: slots of the cache matter more the further they are.
_CANDIDATES, _COMPARED = 32, [0, 15, 31]
# How a decoder says that it cannot do what it is asked for.
_REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
# Up to how many tokens cached scoring is known to be right, for each model.
_CHECKED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class Scorer:
    """What both scorers share: a model in eval mode, and the most tokens in one forward, all rows together."""

    def __init__(self, length_value_model: nn.Module, max_tokens: int = 16384):
        check_in_eval_mode(length_value_model)
        self.model = length_value_model
        self.max_tokens = max_tokens
        self.vocab_size = length_value_model.get_input_embeddings().weight.shape[0]
        self.context = context_of(length_value_model.config)
        # Of the longest row that goes on.
        self._length = 0

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _measure(self, attention_mask: Tensor) -> None:
        """Take down how long the prompts are, which must leave room for a token."""
        self._sizes = attention_mask.sum(dim=1).long().cpu()
        self._length = int(self._sizes.max())
        self.check_length(self._length + 1)

    def _grow(self, live: Tensor) -> None:
        """A token more for each live row: a long one that has ended no longer counts as the longest."""
        live = live.bool().cpu()
        self._sizes = self._sizes + live
        if bool(live.any()):
            self._length = int(self._sizes[live].max())

    def check_length(self, tokens: int) -> None:
        """Raises a `ValueError` unless rows of so many tokens, prompt included, can be scored."""
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"rows of {tokens} tokens, prompt included, go beyond the length value model's context of "
                f"{self.context}: lower max_new_tokens, shorten the prompts, or use a length value model with a longer "
                "context."
            )


class CandidateScorer(Scorer):
    """Scores candidates as siblings against a cached prefix: one forward for each generated token.

    Args:
        length_value_model (`LengthValueModel`): or any model whose forward takes `input_ids`, a 4D additive
            `attention_mask`, `position_ids`, `past_key_values` and `use_cache`, and returns `.logits` `(B, S)` and
            `.past_key_values`.
        max_tokens (`int`, *optional*, defaults to `16384`): the most candidate tokens in one forward; more candidates
            are scored in several.

    Raises:
        ValueError: the model is in training mode, its attention takes no custom mask, its cache holds anything but full
            attention (sliding windows, recurrent states), or cached scoring gives other values than full rows.
    """

    def __init__(self, length_value_model: nn.Module, max_tokens: int = 16384):
        super().__init__(length_value_model, max_tokens)
        for module in length_value_model.modules():
            if isinstance(module, PreTrainedModel):
                attention = module.config._attn_implementation
                if attention is not None and attention not in MASKABLE_ATTENTION:
                    raise ValueError(
                        f"{type(module).__name__} uses the attention {attention!r}, which takes no custom mask: load "
                        "it with attn_implementation='sdpa', or score with scoring='full'."
                    )
        self.check_length(1)

    def check_length(self, tokens: int) -> None:
        """Raises a `ValueError` unless rows of so many tokens, prompt included, can be scored against a cache."""
        super().check_length(tokens)
        checked = _CHECKED.get(self.model, 0)
        if tokens <= checked:
            return
        # Twice as far if that is right, so that rows which grow token by token are compared a few times only.
        limit = max(tokens, 2 * checked, _SHORT)
        limit = limit if self.context is None else min(limit, self.context)
        while True:
            try:
                self._compare(checked, limit)
                break
            except ValueError:
                if limit <= max(tokens, _SHORT):
                    raise
                limit = (max(tokens, _SHORT) + limit) // 2
        _CHECKED[self.model] = limit

    def _compare(self, checked: int, limit: int) -> None:
        """Compares with full rows what may differ between rows of `checked` and of `limit` tokens."""
        if not checked:
            _compare_with_full_rows(self, _PREFIX, _PREFIX)
        if limit > _SHORT:
            # A few tokens, then a leap to the end: no position in between has to be computed.
            _compare_with_full_rows(self, _PREFIX, limit - 2)
        for window in window_sizes(self.model.config):
            # Siblings lie further out in the cache than they stand.
            if checked < 2 * window and window < 2 * limit:
                _compare_with_full_rows(self, window, window)

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Reads the prompts, forgetting whatever came before.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`): prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(B, S)`): 1 where a prompt token exists.
        """
        self._measure(attention_mask)
        self.read(input_ids, attention_mask)

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor, leap: int = 0) -> None:
        """[`CandidateScorer.start`] without its check; the next token stands `leap` positions further than it would."""
        device = self._device
        self._sizes = attention_mask.sum(dim=1).long().cpu()
        self._exists = attention_mask.to(device).bool()
        self._rows = torch.arange(input_ids.shape[0], device=device)
        self._next_position = self._exists.sum(dim=1) + leap
        self._siblings: list[tuple[Tensor, Tensor]] | None = None
        # Chosen tokens that are not in the cache yet: ids `(R, m)`, and which of them exist.
        self._waiting = torch.zeros(input_ids.shape[0], 0, dtype=torch.long, device=device)
        self._waiting_exists = self._waiting.bool()
        # Padding may be any id, even one that this model lacks.
        ids = input_ids.to(device).masked_fill(~self._exists, 0)
        _check_ids(ids, self.vocab_size)
        output = self.model(input_ids=ids, attention_mask=self._exists.long(), use_cache=True)
        self.cache = output.past_key_values

    def score(self, candidates: Tensor, valid: Tensor) -> Tensor:
        """Logits of the states after each candidate.

        Args:
            candidates (`torch.Tensor` of shape `(B, k)`): token ids; distinct within a row.
            valid (`torch.Tensor` of shape `(B, k)`): 1 where a slot holds a candidate; finished rows hold none.

        Returns:
            `torch.Tensor` of shape `(B, k)`: float32 logits; 0 where not valid.
        """
        self.check_length(self._length + 1)
        return self.score_unchecked(candidates, valid)

    @torch.no_grad()
    def score_unchecked(self, candidates: Tensor, valid: Tensor) -> Tensor:
        """[`CandidateScorer.score`] without its check."""
        scored = torch.zeros(candidates.shape, dtype=torch.float32, device=self._device)
        self._siblings = None
        valid_rows = valid.to(self._device)[self._rows].bool()
        if not bool(valid_rows.any()):
            return scored.to(candidates.device)
        ids = candidates.to(self._device)[self._rows].masked_fill(~valid_rows, 0)
        _check_ids(ids, self.vocab_size)
        width = max(1, self.max_tokens // max(1, ids.shape[0]))
        chunks = [self._forward_siblings(chunk) for chunk in ids.split(width, dim=1)]
        self._sibling_ids = ids.masked_fill(~valid_rows, -1)
        self._siblings = [_join(layer) for layer in zip(*(cached for _, cached in chunks), strict=True)]
        logits = torch.cat([chunk_logits for chunk_logits, _ in chunks], dim=1)
        scored[self._rows] = logits.masked_fill(~valid_rows, 0.0)
        return scored.to(candidates.device)

    @torch.no_grad()
    def advance(self, chosen: Tensor, live: Tensor) -> None:
        """Appends the chosen tokens to the prefixes.

        Args:
            chosen (`torch.Tensor` of shape `(B,)`): token ids. One that is not among the candidates scored last
                (another processor forced it, or there was nothing to choose) waits for the next forward.
            live (`torch.Tensor` of shape `(B,)`): 0 for rows that have finished; they stay finished.
        """
        self._grow(live)
        chosen, live = chosen.to(self._device)[self._rows], live.to(self._device)[self._rows].bool()
        if not bool(live.any()):
            self._rows = self._rows[:0]
            return
        scored = self._append_scored(chosen, live)
        if not bool(scored[live].all()):
            # A finished row may hold any padding id, even one that this model lacks.
            waits = live & ~scored
            ids = chosen.masked_fill(~waits, 0)
            _check_ids(ids, self.vocab_size)
            self._waiting = torch.cat([self._waiting, ids.unsqueeze(1)], dim=1)
            self._waiting_exists = torch.cat([self._waiting_exists, waits.unsqueeze(1)], dim=1)
        self._siblings = None
        # Finished rows cost as much as live ones; dropping them costs a copy of the cache, as each forward does anyway.
        if 8 * int(live.sum()) <= 7 * live.shape[0]:
            self._keep(live.nonzero().squeeze(1))

    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are kept: of the prefixes alone, whatever was scored."""
        kept = [each for layer in self.cache.layers for each in (layer.keys, layer.values)]
        return sum(each.numel() * each.element_size() for each in kept)

    def _append_scored(self, chosen: Tensor, live: Tensor) -> Tensor:
        """Puts chosen candidates into the cache; says for which rows, `(R,)`."""
        if self._siblings is None:
            return torch.zeros_like(live)
        match = self._sibling_ids == chosen.unsqueeze(1)
        found = match.any(dim=1) & live
        if bool(found.any()):
            place = match.int().argmax(dim=1)
            rows = torch.arange(place.shape[0], device=self._device)
            for index, (keys, values) in enumerate(self._siblings):
                self.cache.update(keys[rows, :, place].unsqueeze(2), values[rows, :, place].unsqueeze(2), index)
            self._exists = torch.cat([self._exists, found.unsqueeze(1)], dim=1)
            self._next_position = self._next_position + found
        return found

    def _forward_siblings(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits `(R, k)` of `ids` `(R, k)`, and their keys and values in each layer.

        Tokens that wait come first in the same forward, each seeing those before it, and stay in the cache.
        """
        width, waiting = ids.shape[1], self._waiting.shape[1]
        rows = ids.shape[0]
        order = torch.ones(waiting, waiting, dtype=torch.bool, device=self._device).tril()
        among = torch.zeros(rows, waiting + width, waiting + width, dtype=torch.bool, device=self._device)
        among[:, :waiting, :waiting] = order & self._waiting_exists.unsqueeze(1)
        among[:, waiting:, :waiting] = self._waiting_exists.unsqueeze(1)
        among[:, waiting:, waiting:] = torch.eye(width, dtype=torch.bool, device=self._device)
        seen = torch.cat([self._exists.unsqueeze(1).expand(-1, waiting + width, -1), among], dim=2)
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=self._device).masked_fill(~seen, torch.finfo(dtype).min)
        before = self._next_position.unsqueeze(1) + self._waiting_exists.cumsum(dim=1) - self._waiting_exists.long()
        self._next_position = self._next_position + self._waiting_exists.sum(dim=1)
        output = self.model(
            input_ids=torch.cat([self._waiting, ids], dim=1),
            attention_mask=mask.unsqueeze(1),
            position_ids=torch.cat([before, self._next_position.unsqueeze(1).expand(-1, width)], dim=1),
            past_key_values=self.cache,
            use_cache=True,
        )
        added = [(layer.keys[:, :, -width:], layer.values[:, :, -width:]) for layer in self.cache.layers]
        self.cache.crop(-width)
        self._exists = torch.cat([self._exists, self._waiting_exists], dim=1)
        self._waiting, self._waiting_exists = self._waiting[:, :0], self._waiting_exists[:, :0]
        return output.logits[:, -width:].float(), added

    def _keep(self, kept: Tensor) -> None:
        """Drops all rows but `kept`, indices into the rows still held."""
        self.cache.batch_select_indices(kept)
        self._rows, self._exists = self._rows[kept], self._exists[kept]
        self._next_position = self._next_position[kept]
        self._waiting, self._waiting_exists = self._waiting[kept], self._waiting_exists[kept]


class FullRowScorer(Scorer):
    """Scores each candidate as a complete row, prompt included: slow, but right for any backbone.

    Args:
        length_value_model (`LengthValueModel`): or any model whose forward takes `input_ids` and `attention_mask` and
            returns `.logits`, all `(B, S)`.
        max_tokens (`int`, *optional*, defaults to `16384`): the most tokens in one forward, all rows together.
    """

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Reads the prompts, as [`CandidateScorer.start`] does."""
        self._measure(attention_mask)
        self._exists = attention_mask.to(self._device).bool()
        self._ids = input_ids.to(self._device).masked_fill(~self._exists, 0)
        _check_ids(self._ids, self.vocab_size)

    @torch.no_grad()
    def score(self, candidates: Tensor, valid: Tensor) -> Tensor:
        """Logits of the states after each candidate, as [`CandidateScorer.score`] gives them."""
        self.check_length(self._length + 1)
        row, slot = valid.to(self._ids.device).nonzero(as_tuple=True)
        ids = candidates.to(self._ids.device)[row, slot]
        _check_ids(ids, self.vocab_size)
        scored = torch.zeros(candidates.shape, dtype=torch.float32, device=self._ids.device)
        size = max(1, self.max_tokens // (self._ids.shape[1] + 1))
        for part in torch.arange(ids.shape[0], device=ids.device).split(size):
            rows = torch.cat([self._ids[row[part]], ids[part].unsqueeze(1)], dim=1)
            exists = torch.cat([self._exists[row[part]], torch.ones_like(part).bool().unsqueeze(1)], dim=1)
            logits = self.model(input_ids=rows, attention_mask=exists.long()).logits[:, -1]
            scored[row[part], slot[part]] = logits.float()
        return scored.to(candidates.device)

    def advance(self, chosen: Tensor, live: Tensor) -> None:
        """Appends the chosen tokens to the prefixes, as [`CandidateScorer.advance`] does."""
        self._grow(live)
        live = live.to(self._ids.device).bool()
        chosen = chosen.to(self._ids.device).masked_fill(~live, 0)
        self._ids = torch.cat([self._ids, chosen.unsqueeze(1)], dim=1)
        self._exists = torch.cat([self._exists, live.unsqueeze(1)], dim=1)


def _join(chunks: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, its chunks of siblings side by side."""
    if len(chunks) == 1:
        return chunks[0]
    keys, values = zip(*chunks, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise ValueError(
            f"token {int(ids.max())} is outside the length value model's vocabulary of {vocab_size}: policy "
            "and length value model must share a tokenizer."
        )


@torch.no_grad()
def _compare_with_full_rows(scorer: CandidateScorer, prefix: int, position: int) -> None:
    """Raises unless a scorer says what full rows say, for two rows (one of them padded) and two tokens in turn.

    Args:
        scorer ([`CandidateScorer`]): left as it was.
        prefix (`int`): tokens in the cache.
        position (`int`): of the first candidates. Further than `prefix`, it is a leap: what a position far out means
            for the tokens before it shows without computing what lies between.
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
    candidates = (torch.arange(2 * _CANDIDATES, device=device).view(2, _CANDIDATES) + 3) % vocabulary
    compared, chosen = candidates[:, _COMPARED], candidates[:, 0]
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
    except _REFUSALS as error:
        # Full rows went through, so it is the cache that cannot be shared.
        raise ValueError(
            f"candidates cannot be scored against a cache of {_name(model)} ({error}): score with scoring='full'."
        ) from error
    if position > prefix:
        # Frequencies that grow with the furthest position seen are put back by a near one.
        model(input_ids=ids[:, :1], attention_mask=torch.ones_like(ids[:, :1]))
    difference = float((cached[:, :, _COMPARED] - full).abs().max())
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
