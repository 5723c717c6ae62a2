"""Value of the state after each of many candidate tokens, ``V(s + x)``, for rows that come and go.

A scorer holds rows of tokens in slots: `add` a row (a prompt, and what was written already), `append` what is chosen,
`score` candidates of any of the rows, `remove` a row that is over. A slot is a number that stands for its row wherever
the caller puts it; a row that was interrupted comes back as a new one, with all its tokens. Nothing is computed before
a row is scored: until then, its tokens wait.

- [`SlotScorer`]: one forward for each scoring. The candidates of a row are siblings: they stand at the same position,
  see the cached prefix and themselves, and not each other. The keys and values of the chosen candidate become part of
  the prefix, so that no second forward is needed; tokens that wait join it in the forward of the next candidates.
  It also says what a model gives at the [`~SlotScorer.last`] token of rows: so it decodes a policy's rows.
- [`FullRowScorer`]: runs each candidate as a complete row. Slow; works with any backbone, and serves as the reference.
"""

from __future__ import annotations

import copy
import inspect
import math
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lenvm_rl.decoding.comparison import check_against_full_rows
from lenvm_rl.decoding.token_cache import PackedForward, Segment, TokenCache
from lenvm_rl.modeling.backbones import CACHE_NAMES, context_of
from lenvm_rl.modeling.completions import check_in_eval_mode, pad_left


@dataclass
class _Row:
    """A row in its slot: `places` of the keys of the tokens that are read, `siblings` the place of each token that was
    scored after them; `used` says when. It came with its `first` tokens."""

    ids: list[int]
    places: array = field(default_factory=lambda: array("q"))
    siblings: dict[int, int] = field(default_factory=dict)
    used: int = 0
    first: int = 0


@dataclass
class _Work:
    """Candidates of a row that are still to be scored: where they stand in the result, and which they are. Without any,
    it is the row's last token whose output is wanted."""

    row: _Row
    at: list[int]
    ids: list[int]

    @property
    def unread(self) -> int:
        """Tokens of the row that are not in the cache."""
        return len(self.row.ids) - len(self.row.places)


class Scorer:
    """What both scorers share: a model in eval mode, rows in slots, and the most tokens in one forward."""

    def __init__(self, length_value_model: nn.Module, max_tokens: int = 16384):
        check_in_eval_mode(length_value_model)
        self.model = length_value_model
        self.max_tokens = max_tokens
        self.vocab_size = length_value_model.get_input_embeddings().weight.shape[0]
        self.context = context_of(length_value_model.config)
        self._rows: dict[int, _Row] = {}
        self._next_slot = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_input_embeddings().weight.device

    def check_length(self, tokens: int) -> None:
        """Raises a `ValueError` unless rows of so many tokens, prompt included, can be scored."""
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"rows of {tokens} tokens, prompt included, go beyond the length value model's context of "
                f"{self.context}: lower max_new_tokens, shorten the prompts, or use a length value model with a longer "
                "context."
            )

    def add(self, token_ids: Sequence[int]) -> int:
        """A slot for a row: its prompt, and what of a completion is there already, at least one token."""
        if not len(token_ids):
            raise ValueError("token_ids is empty: a row has at least one token before its candidates.")
        self._check_ids(token_ids)
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._rows[slot] = _Row(list(token_ids), first=len(token_ids))
        return slot

    def append(self, slot: int, token_ids: Sequence[int]) -> None:
        """Adds the next tokens of a row, chosen among its candidates or not."""
        self._check_ids(token_ids)
        self._rows[slot].ids.extend(token_ids)

    def remove(self, slot: int) -> None:
        """Forgets a row."""
        del self._rows[slot]

    def score(self, slots: Sequence[int], candidates: Tensor, valid: Tensor) -> Tensor:
        """Logits of the states after each candidate.

        Args:
            slots (sequence of `int`, R of them): rows, each named once.
            candidates (`torch.Tensor` of shape `(R, k)`): token ids; distinct within a row.
            valid (`torch.Tensor` of shape `(R, k)`): 1 where there is a candidate. A row that has none costs nothing.

        Returns:
            `torch.Tensor` of shape `(R, k)`: float32 logits; 0 where not valid.
        """
        raise NotImplementedError

    def _work(self, slots: Sequence[int], candidates: Tensor, valid: Tensor) -> list[_Work]:
        """What is to be scored, row by row; checked."""
        width, work = candidates.shape[1], []
        ids, exists = candidates.tolist(), valid.bool().tolist()
        for index, slot in enumerate(slots):
            columns = [column for column in range(width) if exists[index][column]]
            if columns:
                own = [ids[index][column] for column in columns]
                self._check_ids(own)
                work.append(_Work(self._rows[slot], [index * width + column for column in columns], own))
        if work:
            self.check_length(1 + max(len(each.row.ids) for each in work))
        return work

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            wrong = max(token_ids) if min(token_ids) >= 0 else min(token_ids)
            raise ValueError(
                f"token {wrong} is outside the length value model's vocabulary of {self.vocab_size}: policy "
                "and length value model must share a tokenizer."
            )


class SlotScorer(Scorer):
    """Scores candidates as siblings against cached prefixes, all rows packed into one forward: no token is padding.

    The cache holds every token once, and the candidates that were scored last. Where `max_cached_tokens` would be
    exceeded, the rows that were scored longest ago are dropped from it (not from their slots), and read again when they
    are scored next; rows that do not fit together are scored in several forwards. So results never depend on the bound,
    but a bound below what the rows at work need costs a prompt's reading for a token.

    Args:
        length_value_model (`LengthValueModel`): or any model whose decoder takes its attention from transformers'
            `AttentionInterface`, with a forward of `input_ids`, `position_ids`, `past_key_values` and `use_cache` that
            returns `.logits` `(B, S)`. However it was loaded, its own attention is not used. The logits of a policy are
            `(B, S, V)`, and what is `(R, k)` below is `(R, k, V)` then.
        max_tokens (`int`, *optional*, defaults to `16384`): the most tokens in one forward; more are read in several.
        max_cached_tokens (`int`, *optional*): the most tokens whose keys and values are held, candidates included.
            Without it, as many as there are. A token takes ``2 * layers * key-value heads * head size`` numbers of the
            model's dtype.

    Raises:
        ValueError: the model is in training mode, its attention cannot be replaced, its cache holds anything but full
            attention (sliding windows, recurrent states), or cached scoring gives other values than full rows.
    """

    def __init__(self, length_value_model: nn.Module, max_tokens: int = 16384, max_cached_tokens: int | None = None):
        super().__init__(length_value_model, max_tokens)
        if max_cached_tokens is not None and max_cached_tokens < 2:
            raise ValueError(f"max_cached_tokens must be at least 2, a token and a candidate, got {max_cached_tokens}.")
        self.max_cached_tokens = max_cached_tokens
        self._cache = TokenCache(length_value_model, max_cached_tokens)
        taken = inspect.signature(length_value_model.forward).parameters
        # What saves a policy the scores after tokens that nobody asks for.
        self._keeps = "logits_to_keep" in taken
        self._cache_name = next((name for name in CACHE_NAMES if name in taken), "past_key_values")
        self._time = 0
        # For the comparison: how much further out than they stand tokens are, but for those that a row came with.
        self.leap = 0
        self._compared = False
        self.check_length(1)

    def uncompared(self) -> SlotScorer:
        """A scorer of the same model, without rows and bounds, that is trusted as it is."""
        twin = copy.copy(self)
        twin.context = twin.max_cached_tokens = None
        twin._rows, twin._cache = {}, TokenCache(self.model)
        twin._compared = True
        return twin

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held now, the candidates that were scored last included."""
        return self._cache.held

    def cache_bytes(self) -> int:
        """Bytes of the keys and values for which there is room now."""
        return self._cache.bytes()

    def check_length(self, tokens: int) -> None:
        """Raises a `ValueError` unless rows of so many tokens, prompt included, can be scored against a cache."""
        super().check_length(tokens)
        if self.max_cached_tokens is not None and tokens > self.max_cached_tokens:
            raise ValueError(
                f"max_cached_tokens={self.max_cached_tokens} does not hold a row of {tokens} tokens, a candidate "
                "included: raise it."
            )
        if not self._compared:
            check_against_full_rows(self, tokens)

    def append(self, slot: int, token_ids: Sequence[int]) -> None:
        """Adds the next tokens of a row. The first is in the cache already if it was scored last; others wait."""
        row = self._rows[slot]
        waits = len(row.ids) > len(row.places)
        super().append(slot, token_ids)
        if row.siblings and len(token_ids):
            place = None if waits else row.siblings.pop(token_ids[0], None)
            if place is not None:
                row.places.append(place)
            self._forget_siblings(row)

    def remove(self, slot: int) -> None:
        """Forgets a row, whose places in the cache become free."""
        self._drop(self._rows[slot])
        super().remove(slot)

    @torch.no_grad()
    def score(self, slots: Sequence[int], candidates: Tensor, valid: Tensor) -> Tensor:
        """Logits of the states after each candidate, as [`Scorer.score`] says, in one forward if they fit into one."""
        at, logits = self._read(self._work(slots, candidates, valid))
        scored = logits.new_zeros(candidates.numel(), *logits.shape[1:])
        scored[at] = logits
        return scored.view(*candidates.shape, *logits.shape[1:]).to(candidates.device)

    @torch.no_grad()
    def last(self, slots: Sequence[int]) -> Tensor:
        """What the model gives at the last token of each row, float32: a length value model logits `(R,)`, a policy
        scores of the next token `(R, V)`. Tokens are read once, except that asking twice reads the last one again.

        Args:
            slots (sequence of `int`, R of them, at least one): rows, each named once.
        """
        work = [_Work(self._rows[slot], [index], []) for index, slot in enumerate(slots)]
        self.check_length(max(len(each.row.ids) for each in work))
        for each in work:
            if not each.unread:
                self._cache.give_back([each.row.places.pop()])
        at, logits = self._read(work)
        return torch.empty_like(logits).index_copy_(0, at, logits)

    def _read(self, work: list[_Work]) -> tuple[Tensor, Tensor]:
        """Does the work: where in the result, and the logits that belong there."""
        self._time += 1
        for each in work:
            each.row.used = self._time
            # Those that were not chosen.
            self._forget_siblings(each.row)
        left, found = deque(work), [([], torch.zeros(0, device=self.device))] if not work else []
        while left:
            found.append(self._forward(self._part(left)))
        at = torch.tensor([place for places, _ in found for place in places], dtype=torch.long, device=self.device)
        return at, torch.cat([logits for _, logits in found])

    def _part(self, work: deque[_Work]) -> list[tuple[_Work, int]]:
        """Takes from the work what fits into a forward, and with it into the cache: of each row so many tokens that
        follow, and the candidates of which a work consists."""
        part, tokens = [], self.max_tokens
        room = math.inf if self.max_cached_tokens is None else self.max_cached_tokens
        while work and tokens > 0:
            each = work[0]
            row = each.row
            if row.siblings and len(row.places) + len(row.siblings) >= room:
                # Scored a moment ago, in a forward before: their logits are known.
                self._forget_siblings(row)
            fit = int(min(tokens, room - len(row.places) - len(row.siblings)))
            if fit < 1 or (part and room - len(row.ids) < 1):
                break
            follow = min(each.unread, fit)
            read_through = follow == each.unread
            count = min(len(each.ids), fit - follow) if read_through else 0
            at = each.at[:count] if each.ids else each.at[:read_through]
            part.append((_Work(row, at, each.ids[:count]), follow))
            tokens -= follow + count
            room -= len(row.places) + len(row.siblings) + follow + count
            if count < len(each.ids) or not read_through:
                each.at, each.ids = each.at[len(at) :], each.ids[count:]
                break
            work.popleft()
        return part

    def _forward(self, part: list[tuple[_Work, int]]) -> tuple[list[int], Tensor]:
        """Reads what follows in each row, scores its candidates, and keeps both. Returns as [`_read`] does."""
        self._make_room(part)
        segments, ids, positions, at, asked = [], [], [], [], []
        for work, follow in part:
            row = work.row
            read, count = len(row.places), len(work.ids)
            places = row.places + array("q", self._cache.take(follow + count))
            segments.append(Segment(places, read, follow, count))
            # Candidates, or the token before where they would stand.
            first = len(ids) + follow - (not count)
            asked += range(first, first + len(work.at))
            ids += row.ids[read : read + follow] + work.ids
            steps = [*range(read, read + follow), *[read + follow] * count]
            positions += [step + self.leap * (step >= row.first) for step in steps]
            at += work.at
        logits = self._logits(ids, positions, segments, asked)
        for (work, _), segment in zip(part, segments, strict=True):
            known = segment.read + segment.follow
            work.row.places = segment.places[:known]
            work.row.siblings.update(zip(work.ids, segment.places[known:], strict=True))
        return at, logits

    def _logits(self, ids: list[int], positions: list[int], segments: list[Segment], asked: list[int]) -> Tensor:
        """Logits of the tokens `asked` for in a packed forward. If it fails, its places are free again, and no row has
        read anything."""
        wanted = torch.tensor(asked, dtype=torch.long, device=self.device)
        keep = {"logits_to_keep": wanted} if self._keeps else {}
        try:
            with self._cache.reading(PackedForward(segments, self.device)) as cache:
                output = self.model(
                    input_ids=torch.tensor([ids], device=self.device),
                    position_ids=torch.tensor([positions], device=self.device),
                    use_cache=True,
                    **{self._cache_name: cache},
                    **keep,
                )
        except BaseException:
            for each in segments:
                self._cache.give_back(each.places[each.read :])
            raise
        return (output.logits[0] if self._keeps else output.logits[0, wanted]).float()

    def _make_room(self, part: list[tuple[_Work, int]]) -> None:
        """Drops rows that are not at work until there is place for what is: those that were scored longest ago."""
        needed = sum(follow + len(work.ids) for work, follow in part)
        if needed <= self._cache.left:
            return
        at_work = {id(work.row) for work, _ in part}
        others = [row for row in self._rows.values() if row.places and id(row) not in at_work]
        for row in sorted(others, key=lambda row: row.used):
            self._drop(row)
            if needed <= self._cache.left:
                return

    def _drop(self, row: _Row) -> None:
        """A row's keys and values are gone; its tokens stay, and are read again when it is scored."""
        self._forget_siblings(row)
        self._cache.give_back(row.places)
        row.places = array("q")

    def _forget_siblings(self, row: _Row) -> None:
        self._cache.give_back(row.siblings.values())
        row.siblings = {}


class FullRowScorer(Scorer):
    """Scores each candidate as a complete row, prompt included: slow, but right for any backbone.

    Args:
        length_value_model (`LengthValueModel`): or any model whose forward takes `input_ids` and `attention_mask` and
            returns `.logits`, all `(B, S)`.
        max_tokens (`int`, *optional*, defaults to `16384`): the most tokens in one forward, all rows together.
    """

    @torch.no_grad()
    def score(self, slots: Sequence[int], candidates: Tensor, valid: Tensor) -> Tensor:
        """Logits of the states after each candidate, as [`Scorer.score`] says."""
        work = self._work(slots, candidates, valid)
        scored = torch.zeros(candidates.numel(), dtype=torch.float32, device=self.device)
        rows = [[*each.row.ids, candidate] for each in work for candidate in each.ids]
        at = torch.tensor([index for each in work for index in each.at], dtype=torch.long, device=self.device)
        size = max(1, self.max_tokens // max(map(len, rows), default=1))
        for start in range(0, len(rows), size):
            ids, exists = pad_left(rows[start : start + size], device=self.device)
            logits = self.model(input_ids=ids, attention_mask=exists).logits[:, -1]
            scored[at[start : start + size]] = logits.float()
        return scored.view(candidates.shape).to(candidates.device)
