"""From rollouts to batches: rows of tokens, and at every state the number of tokens to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.packing import pack_lengths, padding_share, row_offsets
from lenvm_rl.targets import CUT, ENDLESS, FINISHED, IGNORED

# The columns that a collator reads.
COLUMNS = ["prompt_ids", "completion_ids", "finish_reason", "group"]
# What a truncated completion is taken for, by the name of the rule; "drop" leaves none to collate.
TRUNCATED_ENDINGS = {"bootstrap": CUT, "infinite": ENDLESS, "finished": FINISHED, "drop": FINISHED}


@dataclass
class LengthValueCollator:
    """Rollouts as rows of tokens, with the number of tokens to come at every state.

    A sequence is the prompt and the completion, without the last token: the state after it is terminal or unknown. Only
    where a cut completion is bootstrapped, the last token stays, because the value at the cut is read there. Sequences
    are packed into rows (`position_ids` restart with each, no attention mask: that is how transformers knows), or put
    one to a row with an attention mask.

    Args:
        pad_token_id (`int`, *optional*, defaults to `0`): fills what is left of a row; no sequence sees it.
        truncated (`str`, *optional*, defaults to `"bootstrap"`): see [`LengthValueTrainingArguments`].
        packing (`bool`, *optional*, defaults to `True`): whether to pack.
        row_length (`int`, *optional*): most tokens in a packed row (more where one sequence is longer). When omitted,
            the longest sequence, or twice that if rows would be left more than a tenth empty.
        flatten (`bool`, *optional*, defaults to `False`): all sequences in one row without any padding, the form that
            flash attention packs.
        padding_side (`str`, *optional*, defaults to `"right"`): side of the padding without packing.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `position_ids` or `attention_mask`, `labels` (tokens to come, or
        `IGNORED`) and `endings`, all `(R, C)`; and `sequences` `(B, 6)`: row, first state's column, states, finished,
        group and tokens of the prompt of each rollout.
    """

    pad_token_id: int = 0
    truncated: str = "bootstrap"
    packing: bool = True
    row_length: int | None = None
    flatten: bool = False
    padding_side: str = "right"

    def __call__(self, rollouts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        finished = [rollout["finish_reason"] == "stop" for rollout in rollouts]
        tokens, lengths = [], []
        for rollout, ended in zip(rollouts, finished, strict=True):
            ids = rollout["prompt_ids"] + rollout["completion_ids"]
            lengths.append(len(rollout["completion_ids"]))
            tokens.append(ids if self._reads_cut(ended) else ids[:-1])
        sizes = [len(ids) for ids in tokens]
        rows = self._rows(sizes)
        width = max(sum(sizes[index] for index in row) for row in rows)
        row_of, first = row_offsets(rows, sizes)
        if not self.packing and self.padding_side == "left":
            first = width - torch.tensor(sizes)
        batch = self._blank(len(rows), width, rows, sizes)
        for index, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
            row, start = int(row_of[index]), int(first[index])
            stop = start + len(ids)
            state = start + len(rollouts[index]["prompt_ids"]) - 1
            batch["input_ids"][row, start:stop] = torch.tensor(ids)
            if self.packing:
                batch["position_ids"][row, start:stop] = torch.arange(len(ids))
            else:
                batch["attention_mask"][row, start:stop] = 1
            batch["labels"][row, state : state + length] = torch.arange(length, 0, -1)
            ending = FINISHED if finished[index] else TRUNCATED_ENDINGS[self.truncated]
            batch["endings"][row, state : state + length] = ending
            entry = [row, state, length, finished[index], rollouts[index]["group"], len(rollouts[index]["prompt_ids"])]
            batch["sequences"][index] = torch.tensor(entry)
        return batch

    def _reads_cut(self, finished: bool) -> bool:
        return not finished and self.truncated == "bootstrap"

    def _rows(self, sizes: list[int]) -> list[list[int]]:
        if not self.packing:
            return [[index] for index in range(len(sizes))]
        if self.flatten:
            return [list(range(len(sizes)))]
        longest = max(sizes)
        if self.row_length is not None:
            return pack_lengths(sizes, max(longest, self.row_length))
        # Attention costs the square of a row, padding its length: short rows, unless they do not fill well.
        rows = pack_lengths(sizes, longest)
        return rows if padding_share(rows, sizes) < 0.1 else pack_lengths(sizes, 2 * longest)

    def _blank(self, height: int, width: int, rows: list[list[int]], sizes: list[int]) -> dict[str, torch.Tensor]:
        shape = (height, width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
            "endings": torch.full(shape, FINISHED),
            "sequences": torch.zeros(len(sizes), 6, dtype=torch.long),
        }
        if not self.packing:
            batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
            return batch
        # What is left of a row is a sequence of its own: no sequence sees it, and no softmax is left without a column.
        filled = torch.tensor([sum(sizes[index] for index in row) for row in rows])
        batch["position_ids"] = (torch.arange(width) - filled.unsqueeze(1)).clamp(min=0)
        return batch


@torch.no_grad()
def check_isolation(model: LengthValueModel) -> None:
    """Raises a `ValueError` if a sequence in a packed row can see the one before it.

    transformers keeps packed sequences apart where it finds position ids that restart and neither a mask nor a cache;
    a backbone with attention of its own, or with a recurrent state, may not. Two rows that differ in their first
    sequence only must give the same logits for the second.

    Args:
        model (`LengthValueModel`): left as it was.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    first = torch.arange(6, device=model.device)
    second = torch.arange(4, device=model.device)
    rows = [torch.cat([(first * step + step) % vocabulary, second % vocabulary]) for step in (1, 3)]
    positions = torch.cat([first, second]).unsqueeze(0)
    training = model.training
    model.eval()
    logits = [model(input_ids=row.unsqueeze(0), position_ids=positions, use_cache=False).logits[:, 6:] for row in rows]
    model.train(training)
    if not torch.allclose(*logits, rtol=1e-5, atol=1e-5):
        difference = float((logits[0] - logits[1]).abs().max())
        raise ValueError(
            f"The backbone does not keep packed sequences apart: a logit moved by {difference:.1e} with the sequence "
            "before it. Set packing=False (--packing false), or another attention implementation."
        )


def check_fits(model: LengthValueModel, rollouts: Dataset) -> None:
    """Raises a `ValueError` if a rollout has ids that the backbone has no embedding for, or exceeds its context."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    batches = rollouts.select_columns(["prompt_ids", "completion_ids"]).iter(batch_size=1024)
    pairs = (pair for batch in batches for pair in zip(batch["prompt_ids"], batch["completion_ids"], strict=True))
    for index, (prompt, completion) in enumerate(pairs):
        ids = prompt + completion
        if max(ids) >= config.vocab_size:
            raise ValueError(
                f"Rollout {index} holds token {max(ids)}, but the backbone knows {config.vocab_size} tokens: use "
                "the backbone whose tokenizer the rollouts were sampled with."
            )
        if context is not None and len(ids) > context:
            raise ValueError(
                f"Rollout {index} has {len(ids)} tokens, but the backbone's context is {context}: leave it out or use "
                "another backbone. Sequences are never cut, because a cut would change every length."
            )
