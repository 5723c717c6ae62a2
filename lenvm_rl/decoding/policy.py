"""How a policy's rows are decoded that come and go: in slots, as [`lenvm_rl.decoding.scoring`] scores candidates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lenvm_rl.decoding.scoring import Scorer, SlotScorer
from lenvm_rl.modeling.backbones import cache_keyword, cache_of

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
