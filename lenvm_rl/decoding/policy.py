"""Guided decoding of rows that come and go: the policy's in slots, as [`lenvm_rl.decoding.scoring`] scores candidates.

A [`GuidedDecoder`] gives the scores that the next tokens of rows are drawn from, at one forward of each model; who uses
it draws, ends rows and puts new ones beside those under way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.processor import SCORERS
from lenvm_rl.decoding.scoring import Scorer, SlotScorer
from lenvm_rl.decoding.step import GuidedRow, guide_rows
from lenvm_rl.modeling.backbones import cache_keyword, cache_of
from lenvm_rl.prediction import boundary_logits, lengths_from_logits

logger = logging.getLogger(__name__)


class SingleRowReader(Scorer):
    """Gives the scores of next tokens for rows of any policy: one after the other, each with the cache that the policy
    makes for it, or from its first token where that holds anything but keys and values. No candidates are scored.

    Args:
        policy (`PreTrainedModel`): in eval mode.
    """

    def __init__(self, policy: PreTrainedModel):
        super().__init__(policy)
        self._caches: dict[int, tuple[Any, int]] = {}

    def remove(self, slot: int) -> None:
        """Forgets a row and its cache."""
        super().remove(slot)
        self._caches.pop(slot, None)

    @torch.no_grad()
    def last(self, slots: Sequence[int]) -> Tensor:
        """Scores of the next token of each row, `(R, V)`, float32."""
        found = []
        for slot in slots:
            ids = self._rows[slot].ids
            # Out of the way, since a forward that fails may leave it half written.
            cache, read = self._caches.pop(slot, (None, 0))
            new = torch.tensor([ids[read:] or ids], device=self.device)
            output = self.model(
                input_ids=new, use_cache=True, **cache_keyword(self.model, cache if read < len(ids) else None)
            )
            # Several decoders go on from other caches with other scores than the whole row has.
            with suppress(ValueError):
                self._caches[slot] = cache_of(self.model, output), len(ids)
            found.append(output.logits[0, -1].float())
        return torch.stack(found)


def policy_reader(policy: PreTrainedModel, tokens: int) -> SlotScorer | SingleRowReader:
    """What reads rows of up to so many tokens of a policy: all in one forward if its cache can be packed, and else one
    after the other."""
    try:
        reader = SlotScorer(policy)
        reader.check_length(tokens)
    except ValueError as error:
        logger.warning("Rows are decoded one after the other: %s", error)
        return SingleRowReader(policy)
    return reader


@dataclass(eq=False)
class DecodedRow:
    """A completion as it grows: `token_ids` as chosen, `forced` the steps at which the hard bound overruled the choice,
    and `slots` its places in the readers of the decoder."""

    guidance: LengthGuidance
    token_ids: list[int] = field(default_factory=list)
    forced: int = 0
    slots: dict[Scorer | SingleRowReader, int] = field(default_factory=dict)


class GuidedDecoder:
    """Decodes rows, each with a guidance of its own.

    Args:
        policy (`PreTrainedModel`): in eval mode.
        length_value_model (`LengthValueModel`): frozen, of the same tokenizer.
        end_ids (sequence of `int`): tokens that end a completion.
        tokens (`int`): the most tokens of a row.
        scoring (`str`, *optional*, defaults to `"cached"`): see [`~lenvm_rl.decoding.LengthGuidedLogitsProcessor`].
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        length_value_model: nn.Module,
        end_ids: Sequence[int],
        tokens: int,
        scoring: str = "cached",
    ):
        if scoring not in SCORERS:
            raise ValueError(f"scoring must be one of {sorted(SCORERS)}, got {scoring!r}.")
        self.policy, self.scorer = policy_reader(policy, tokens), SCORERS[scoring](length_value_model)
        self.length_value_model, self.gamma, self.end_ids = length_value_model, length_value_model.config.gamma, end_ids

    def add(self, row: DecodedRow, prompt_ids: Sequence[int]) -> None:
        """A row begins, after a prompt."""
        for reader in (self.policy, self.scorer) if row.guidance.needs_values else (self.policy,):
            row.slots[reader] = reader.add(prompt_ids)

    def predict(self, prompt_ids: Sequence[int]) -> float:
        """The predicted length of a completion, end-of-sequence not counted."""
        logits = boundary_logits(self.length_value_model, [list(prompt_ids)])
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the length value model gave NaN or infinity: check its weights and its dtype.")
        return float(lengths_from_logits(logits, self.gamma))

    def append(self, row: DecodedRow, token: int) -> None:
        """The token that was chosen."""
        row.token_ids.append(token)
        for reader, slot in row.slots.items():
            reader.append(slot, [token])

    def remove(self, row: DecodedRow) -> None:
        """A row is over."""
        while row.slots:
            reader, slot = row.slots.popitem()
            reader.remove(slot)

    def scores(self, rows: Sequence[DecodedRow]) -> Tensor:
        """What the next tokens of rows, at least one, are drawn from at temperature 1: log-probabilities `(R, V)`."""
        logits = self.policy.last([row.slots[self.policy] for row in rows])
        scores = logits / torch.tensor([[row.guidance.temperature or 1.0] for row in rows], device=logits.device)
        at = [place for place, row in enumerate(rows) if row.guidance.needs_values or row.guidance.truncates]
        if at:
            # An id that the policy has no score for ends nothing.
            ends = tuple(end for end in self.end_ids if end < logits.shape[1])
            chosen = [rows[place] for place in at]
            guided = [GuidedRow(row.guidance, ends, len(row.token_ids), row.slots.get(self.scorer)) for row in chosen]
            step = guide_rows(guided, logits[at], self.scorer, self.gamma)
            scores[at] = step.scores
            for row, overruled in zip(chosen, step.overruled.tolist(), strict=True):
                row.forced += overruled > 0.5
        return scores


def draw_as_generate(scores: Tensor, rows: Sequence[int], count: int, generator: torch.Generator | None) -> Tensor:
    """Tokens `(R,)`, the most probable ones without a generator, and else drawn as `generate` does from so many rows of
    which only `rows` go on: those that are over take their share of the random numbers. Scores `(R, V)`."""
    if generator is None:
        return scores.argmax(dim=1)
    weights = scores.new_ones(count, scores.shape[1])
    weights[rows] = scores.softmax(dim=1)
    return torch.multinomial(weights, 1, generator=generator)[rows, 0]
