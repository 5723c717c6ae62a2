"""Rows of token ids: padded on the left as a policy takes them, how many it can read, and what ends them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from lenvm_rl.endings import end_token_ids
from lenvm_rl.rollouts.record import RolloutMetadata


def left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(B, S)` of rows padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def end_ids_of(metadata: RolloutMetadata) -> list[int]:
    """The ids that end the completions of a rollout file: those recorded, or else the tokenizer's own."""
    return end_token_ids(None, metadata.eos_token_ids or metadata.tokenizer_fingerprint.get("eos_token_id"))


def context_of(policy: PreTrainedModel) -> int | None:
    """Most tokens that a policy can read, as its config says; `None` if it says nothing."""
    return getattr(policy.config.get_text_config(), "max_position_embeddings", None)
