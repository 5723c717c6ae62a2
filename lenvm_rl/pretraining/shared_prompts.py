"""Completions of one prompt in one row, so that a long prompt is computed once and not once per completion.

A row holds blocks. A block is a prompt without its last token, then siblings, each the prompt's last token and a
completion. (The last token is repeated, since the state before the first token belongs to every sibling, with another
length to come in each.) Positions go on from the prompt in every sibling; an attention mask lets a token see the tokens
before it of the prompt and of its own sibling. What a token sees, and where, is thus what it sees in its completion
alone, and so values and gradients are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.batches import (
    LengthValueCollator,
    blank_batch,
    pack_lengths,
    read_tokens,
    row_offsets,
    write_labels,
)
from lenvm_rl.pretraining.loss import IGNORED

# Decoders and attention implementations for which equality with completions alone is tested.
MODEL_TYPES = ("llama", "qwen2", "qwen3")
ATTENTION = ("eager", "sdpa")
# What a model takes of a batch.
MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask", "hidden_states")
_SHARED = 0  # sibling number of a prompt's tokens


@dataclass
class SharedPromptCollator:
    """Rollouts as rows of blocks: a prompt once, and completions of it.

    Completions share where their prompts have the same tokens and they come in one micro-batch. If a prompt's
    do not fit in a row, the prompt is repeated in another.

    Args:
        pad_token_id, truncated: as in [`LengthValueCollator`].
        row_length (`int`, *optional*): most tokens in a row (more where one completion with its prompt is longer).
            Twice the longest when omitted: attention costs the square of a row.

    Returns:
        `dict[str, torch.Tensor]`: as [`LengthValueCollator`] with `position_ids`, and `blocks` and `siblings`
        `(R, C)`, of which [`sibling_mask`] makes the attention mask.
    """

    pad_token_id: int = 0
    truncated: str = "bootstrap"
    row_length: int | None = None

    def __call__(self, rollouts: list[dict[str, Any]]) -> dict[str, Tensor]:
        # The prompt's last token and what is read of the completion.
        tails = [rollout["prompt_ids"][-1:] + read_tokens(rollout, self.truncated) for rollout in rollouts]
        longest = max(len(rollout["prompt_ids"]) - 1 + len(tail) for rollout, tail in zip(rollouts, tails, strict=True))
        capacity = 2 * longest if self.row_length is None else max(longest, self.row_length)
        blocks = _blocks(rollouts, [len(tail) for tail in tails], capacity)
        heads = [rollouts[block[0]]["prompt_ids"][:-1] for block in blocks]
        sizes = [len(head) + sum(len(tails[i]) for i in block) for head, block in zip(heads, blocks, strict=True)]
        rows = pack_lengths(sizes, capacity)
        width = max(sum(sizes[index] for index in row) for row in rows)
        batch = blank_batch(len(rows), width, len(rollouts), self.pad_token_id)
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
        # What is left of a row is a block of its own, so that no softmax is left without a column.
        batch["blocks"] = torch.full_like(batch["input_ids"], -1)
        batch["siblings"] = torch.full_like(batch["input_ids"], _SHARED)
        row_of, first = (each.tolist() for each in row_offsets(rows, sizes))
        for number, (block, head) in enumerate(zip(blocks, heads, strict=True)):
            row, column = row_of[number], first[number]
            _write(batch, row, column, number, _SHARED, head, 0)
            column += len(head)
            for sibling, index in enumerate(block, start=1):
                _write(batch, row, column, number, sibling, tails[index], len(head))
                write_labels(batch, row, column, index, rollouts[index], self.truncated)
                column += len(tails[index])
        return batch


def _blocks(rollouts: list[dict[str, Any]], sizes: list[int], capacity: int) -> list[list[int]]:
    """Completions of one prompt that fit in a row with it."""
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, rollout in enumerate(rollouts):
        of_prompt.setdefault(tuple(rollout["prompt_ids"]), []).append(index)
    blocks = []
    for prompt, members in of_prompt.items():
        rows = pack_lengths([sizes[index] for index in members], capacity - len(prompt) + 1)
        blocks.extend([members[place] for place in row] for row in rows)
    return blocks


def _write(
    batch: dict[str, Tensor], row: int, start: int, block: int, sibling: int, ids: list[int], position: int
) -> None:
    place = row, slice(start, start + len(ids))
    batch["input_ids"][place] = torch.tensor(ids, dtype=torch.long)
    batch["position_ids"][place] = torch.arange(position, position + len(ids))
    batch["blocks"][place] = block
    batch["siblings"][place] = sibling


def sibling_mask(blocks: Tensor, siblings: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """Who sees whom: earlier tokens of the same block, of its prompt or of the same sibling.

    Args:
        blocks, siblings (`torch.Tensor` of shape `(R, C)`): block and sibling of each token; 0 is the block's prompt.
        attention (`str`): `"sdpa"` takes booleans, `"eager"` numbers to add.
        dtype (`torch.dtype`): of the numbers.

    Returns:
        `torch.Tensor` of shape `(R, 1, C, C)`: entry `(q, k)` says whether token q sees token k.
    """
    same_block = blocks.unsqueeze(2) == blocks.unsqueeze(1)
    visible = (siblings.unsqueeze(1) == _SHARED) | (siblings.unsqueeze(2) == siblings.unsqueeze(1))
    allowed = (same_block & visible).tril().unsqueeze(1)
    if attention == "sdpa":
        return allowed
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


@torch.no_grad()
def check_sharing(model: LengthValueModel) -> None:
    """Raises a `ValueError` unless the completions of a prompt can share a row of this model, which is left as it was.

    Decoders and attention implementations are known by name, sliding windows are not among what is tested; and one row
    is compared with its completions alone.
    """
    config = model.backbone.config
    attention = config._attn_implementation
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if config.model_type not in MODEL_TYPES or attention not in ATTENTION or windows:
        raise ValueError(
            f"share_prompts works with {', '.join(MODEL_TYPES)} and the attention {' or '.join(ATTENTION)}, without "
            f"sliding windows; this is {config.model_type} with {attention}{' and windows' if windows else ''}: set "
            "share_prompts=False (--share_prompts false)."
        )
    vocabulary = config.vocab_size
    completions = [[(step * place) % vocabulary for place in range(4, 7)] for step in (1, 3)]
    rollouts = [
        {"prompt_ids": [1, 2, 3], "completion_ids": ids, "finish_reason": "length", "group": 0} for ids in completions
    ]
    training = model.training
    model.eval()
    shared = SharedPromptCollator(row_length=16)(rollouts)
    alone = LengthValueCollator(packing=False)(rollouts)
    logits = []
    for batch in (shared, alone):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        outputs = model(**model_inputs(batch, model))
        states = batch["labels"] != IGNORED
        logits.append(outputs.logits[states])
    model.train(training)
    if not torch.allclose(*logits, rtol=1e-4, atol=1e-4):
        difference = float((logits[0] - logits[1]).abs().max())
        raise ValueError(
            f"In a row of completions that share a prompt, a logit of this backbone moved by {difference:.1e}: set "
            "share_prompts=False (--share_prompts false)."
        )


def model_inputs(batch: dict[str, Tensor], model: LengthValueModel) -> dict[str, Tensor]:
    """What an unwrapped model takes of a batch of either collator, with the attention mask of shared prompts made."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if "siblings" in batch:
        attention = model.backbone.config._attn_implementation
        inputs["attention_mask"] = sibling_mask(batch["blocks"], batch["siblings"], attention, model.backbone.dtype)
    return inputs
