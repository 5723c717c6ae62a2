"""From rollouts to batches: which completions make a step, which share a row, and what is to come at each state.

Two layouts of rows are here, packed and padded; `lenvm_rl.pretraining.shared_prompts` has a third. All give the same
columns, so that one loss and one evaluation serve them.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.loss import CUT, ENDLESS, FINISHED, IGNORED

# The columns that a collator reads.
COLUMNS = ["prompt_ids", "completion_ids", "finish_reason", "group"]
# What a truncated completion is taken for, by the name of the rule; "drop" fits to none, and measures those held out.
TRUNCATED_ENDINGS = {"bootstrap": CUT, "infinite": ENDLESS, "finished": FINISHED, "drop": CUT}


@dataclass
class LengthValueCollator:
    """Rollouts as rows of tokens, with the number of tokens to come at every state.

    A sequence is the prompt and the completion, without the last token: the state after it is terminal or unknown. Only
    where a cut completion is bootstrapped, the last token stays, because the value at the cut is read there. Sequences
    are packed into rows (`position_ids` restart with each, no attention mask: that is how transformers knows), or put
    one to a row with an attention mask.

    Where rollouts have a column `action_mask` (1 for tokens that the policy chose), the others are no states, and do
    not count as tokens to come; `ends` then says at which column the state after the last token stands.

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

    def __call__(self, rollouts: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [rollout["prompt_ids"] for rollout in rollouts]
        tokens = [
            prompt + read_tokens(rollout, self.truncated) for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        sizes = [len(ids) for ids in tokens]
        rows = self._rows(sizes)
        filled = torch.tensor([sum(sizes[index] for index in row) for row in rows])
        width = int(filled.max())
        row_of, first = row_offsets(rows, sizes)
        if not self.packing and self.padding_side == "left":
            first = width - torch.tensor(sizes)
        batch = blank_batch(len(rows), width, len(rollouts), self.pad_token_id)
        if self.packing:
            # What is left of a row is a sequence of its own: no other sees it, and no softmax is without a column.
            batch["position_ids"] = (torch.arange(width) - filled.unsqueeze(1)).clamp(min=0)
        else:
            batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        for index, (row, start) in enumerate(zip(row_of.tolist(), first.tolist(), strict=True)):
            place = row, slice(start, start + sizes[index])
            batch["input_ids"][place] = torch.tensor(tokens[index])
            if self.packing:
                batch["position_ids"][place] = torch.arange(sizes[index])
            else:
                batch["attention_mask"][place] = 1
            write_labels(batch, row, start + len(prompts[index]) - 1, index, rollouts[index], self.truncated)
        return batch

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


def read_tokens(rollout: dict[str, Any], truncated: str) -> list[int]:
    """The completion's tokens that a value is read before or at: all but the last, or all where it reads the cut."""
    ids = rollout["completion_ids"]
    return ids if rollout["finish_reason"] != "stop" and TRUNCATED_ENDINGS[truncated] == CUT else ids[:-1]


def blank_batch(height: int, width: int, count: int, pad_token_id: int) -> dict[str, Tensor]:
    """What every layout of rows has, with nothing written: see [`LengthValueCollator`]."""
    shape = (height, width)
    return {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "endings": torch.full(shape, FINISHED),
        "sequences": torch.zeros(count, 6, dtype=torch.long),
    }


def write_labels(
    batch: dict[str, Tensor], row: int, state: int, index: int, rollout: dict[str, Any], truncated: str
) -> None:
    """Write what is to come in the rollout number `index`, whose first state stands in column `state` of a row."""
    length, finished = len(rollout["completion_ids"]), rollout["finish_reason"] == "stop"
    to_come = torch.arange(length, 0, -1)
    if "action_mask" in rollout:
        chosen = torch.tensor(rollout["action_mask"])
        to_come = torch.where(chosen.bool(), chosen.flip(0).cumsum(0).flip(0), IGNORED)
        ends = batch.setdefault("ends", torch.zeros_like(batch["labels"]))
        ends[row, state : state + length] = state + length
    batch["labels"][row, state : state + length] = to_come
    batch["endings"][row, state : state + length] = FINISHED if finished else TRUNCATED_ENDINGS[truncated]
    entry = [row, state, length, finished, rollout["group"], len(rollout["prompt_ids"])]
    batch["sequences"][index] = torch.tensor(entry)


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Decides which sequences share a row.

    Best-fit decreasing finds a small number of rows. The sequences are then dealt out again over that many rows, the
    longest first and each to the emptiest row. Rows dealt this way are nearly even, so a batch cropped to its longest
    row has little padding; they are kept if they fit.

    Args:
        lengths (`Sequence[int]`): tokens of each sequence, all at least 1 and at most `capacity`.
        capacity (`int`): the most tokens that a row may hold.

    Returns:
        `list[list[int]]`: the indices into `lengths` in each row, ascending within a row; every index occurs exactly
        once. The same input always gives the same rows.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"Sequence {index} has {length} tokens, but a row holds from 1 to {capacity}: raise the capacity, or "
                "leave out the sequence."
            )
    order = longest_first(lengths)
    rows = _best_fit(lengths, order, capacity)
    even = _deal(lengths, order, len(rows))
    fits = all(sum(lengths[index] for index in row) <= capacity for row in even)
    return [sorted(row) for row in (even if fits else rows)]


def _best_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each sequence where it leaves the least room; of rows with the same room, where it was left last."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int, int]] = []  # ascending: tokens left, minus when that came about, row
    for now, index in enumerate(order):
        place = bisect_left(rooms, (lengths[index],))
        if place == len(rooms):
            rows.append([])
        room, _, row = rooms.pop(place) if place < len(rooms) else (capacity, 0, len(rows) - 1)
        rows[row].append(index)
        insort(rooms, (room - lengths[index], -now, row))
    return rows


def _deal(lengths: Sequence[int], order: Sequence[int], num_rows: int) -> list[list[int]]:
    """Gives each sequence, in `order`, to the row that holds the fewest tokens so far."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]
    for index in order:
        filled, row = heapq.heappop(heap)
        rows[row].append(index)
        heapq.heappush(heap, (filled + lengths[index], row))
    return rows


def row_offsets(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and first column of every sequence, both `(len(lengths),)` int64, once rows of them are laid out."""
    row_of, first_column = torch.zeros(2, len(lengths), dtype=torch.long)
    for row, members in enumerate(rows):
        column = 0
        for index in members:
            row_of[index], first_column[index] = row, column
            column += lengths[index]
    return row_of, first_column


def padding_share(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """The share of slots that hold no token once the rows are cropped to the longest, in [0, 1)."""
    filled = [sum(lengths[index] for index in row) for row in rows]
    return 1.0 - sum(filled) / (len(filled) * max(filled))


def unpack(rows: Tensor, row_of: Tensor, first_column: Tensor, lengths: Tensor) -> Tensor:
    """Takes spans out of packed or padded rows.

    Args:
        rows (`torch.Tensor` of shape `(R, C)`): anything that has an entry per column.
        row_of, first_column, lengths (`torch.Tensor` of shape `(B,)`, int64): row, first column and number of columns
            of each span.

    Returns:
        `torch.Tensor` of shape `(B, max(lengths))`: span b in the first `lengths[b]` entries, 0 after them.
    """
    steps = torch.arange(int(lengths.max()), device=rows.device)
    inside = steps < lengths.unsqueeze(1)
    columns = torch.where(inside, first_column.unsqueeze(1) + steps, torch.zeros_like(steps))
    return torch.where(inside, rows[row_of.unsqueeze(1), columns], torch.zeros_like(rows[:1, :1]))


class StepSampler(Sampler[int]):
    """Indices of completions, epoch by epoch; a data loader cuts them into micro-batches.

    Which completions make an optimizer step never depends on their lengths: a step made of one length bucket would
    shift what values converge to. Only inside a step, whose loss is one mean over tokens however it is cut, the longest
    come first, so that micro-batches need little padding.

    Args:
        sizes (`Sequence[int]`): tokens of each completion with its prompt.
        step_size (`int`): completions in an optimizer step, over all micro-batches and processes.
        seed (`int`): of the first epoch; equal on all processes.
        epoch (`Callable[[], int]`): which epoch begins, so that a resumed run draws what an unbroken one does.
        groups (`Sequence`, *optional*): the prompt of each completion. When given, whole prompts are drawn: the
            completions of one follow each other, and steps are not sorted.
        multiple (`int`, *optional*, defaults to 1): a sorted epoch is filled up to a multiple of this by completions
            drawn at random. Several processes fill it up from its beginning otherwise, where the longest are.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        step_size: int,
        seed: int,
        epoch: Callable[[], int],
        groups: Sequence | None = None,
        multiple: int = 1,
    ):
        self.sizes, self.step_size, self.seed, self.epoch = list(sizes), step_size, seed, epoch
        self.fill = 0 if groups is not None else -len(self.sizes) % multiple
        self.members: dict[Any, list[int]] = {}
        for index, group in enumerate(groups or ()):
            self.members.setdefault(group, []).append(index)

    def __len__(self) -> int:
        return len(self.sizes) + self.fill

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.members:
            groups = list(self.members.values())
            for place in torch.randperm(len(groups), generator=draw).tolist():
                yield from groups[place]
            return
        order = torch.randperm(len(self.sizes), generator=draw).tolist()
        order += torch.randint(len(self.sizes), (self.fill,), generator=draw).tolist()
        for start in range(0, len(order), self.step_size):
            step = order[start : start + self.step_size]
            yield from (step[place] for place in longest_first([self.sizes[index] for index in step]))


def longest_first(sizes: Sequence[int]) -> list[int]:
    """All indices once, the longest first, equal ones in their order."""
    return sorted(range(len(sizes)), key=lambda index: -sizes[index])


@torch.no_grad()
def check_isolation(model: LengthValueModel) -> None:
    """Raises a `ValueError` if a sequence in a packed row can see the one before it; the model is left as it was.

    transformers keeps packed sequences apart where it finds position ids that restart and neither a mask nor a cache;
    a backbone with attention of its own, or with a recurrent state, may not. Two rows that differ in their first
    sequence only must give the same logits for the second.
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
    config, context = model.config.get_text_config(decoder=True), context_of(model.config)
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
