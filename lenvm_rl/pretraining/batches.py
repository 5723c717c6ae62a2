"""From rollouts to batches: rows of tokens, and at every state the number of tokens to come."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.loss import CUT, ENDLESS, FINISHED, IGNORED

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
            to_come = torch.arange(length, 0, -1)
            if "action_mask" in rollouts[index]:
                chosen = torch.tensor(rollouts[index]["action_mask"])
                to_come = torch.where(chosen.bool(), chosen.flip(0).cumsum(0).flip(0), IGNORED)
                ends = batch.setdefault("ends", torch.zeros_like(batch["labels"]))
                ends[row, state : state + length] = state + length
            batch["labels"][row, state : state + length] = to_come
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


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Decides which sequences share a row.

    Best-fit decreasing finds a small number of rows. The sequences are then dealt out again over that many rows, the
    longest first and each to the emptiest row. Rows dealt this way are nearly even, so a batch cropped to its longest
    row has little padding; they are kept if they fit.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each sequence, all at least 1 and at most `capacity`.
        capacity (`int`):
            The most tokens that a row may hold.

    Returns:
        `list[list[int]]`: the indices into `lengths` in each row, ascending within a row; every index occurs exactly
        once. The same input always gives the same rows.

    Raises:
        ValueError: if a length is below 1 or above `capacity`.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"Sequence {index} has {length} tokens, but a row holds from 1 to {capacity}: raise the capacity, or "
                "leave out the sequence."
            )
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    rows = _best_fit(lengths, longest_first, capacity)
    even = _deal(lengths, longest_first, len(rows))
    if all(sum(lengths[index] for index in row) <= capacity for row in even):
        rows = even
    return [sorted(row) for row in rows]


def _best_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each sequence where it leaves the least room. `with_room[r]`: the rows with `r` tokens left."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    open_rooms: list[int] = []  # the keys of with_room that have rows, ascending
    for index in order:
        length = lengths[index]
        place = bisect_left(open_rooms, length)
        if place == len(open_rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = open_rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del open_rooms[place]
        rows[row].append(index)
        left = room - length
        if not with_room.get(left):
            insort(open_rooms, left)
        with_room.setdefault(left, []).append(row)
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


def row_offsets(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each sequence begins once the rows are laid out.

    Args:
        rows (`Sequence[Sequence[int]]`):
            The sequences in each row, as [`pack_lengths`] returns them.
        lengths (`Sequence[int]`):
            Tokens of each sequence.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: row and first column of every sequence, both `(len(lengths),)` int64.
    """
    row_of = torch.zeros(len(lengths), dtype=torch.long)
    first_column = torch.zeros(len(lengths), dtype=torch.long)
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


def unpack(rows: torch.Tensor, row_of: torch.Tensor, first_column: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Takes spans out of packed or padded rows.

    Args:
        rows (`torch.Tensor` of shape `(R, C)`):
            Anything that has an entry per column.
        row_of, first_column, lengths (`torch.Tensor` of shape `(B,)`, int64):
            Row, first column and number of columns of each span.

    Returns:
        `torch.Tensor` of shape `(B, max(lengths))`: span b in the first `lengths[b]` entries, 0 after them.
    """
    steps = torch.arange(int(lengths.max()), device=rows.device)
    inside = steps < lengths.unsqueeze(1)
    columns = torch.where(inside, first_column.unsqueeze(1) + steps, torch.zeros_like(steps))
    return torch.where(inside, rows[row_of.unsqueeze(1), columns], torch.zeros_like(rows[:1, :1]))


class StepSampler(Sampler[int]):
    """Indices of completions, epoch by epoch; a data loader cuts them into micro-batches.

    Which completions make an optimiser step never depends on their lengths: a step made of one length bucket would
    shift what values converge to. Only inside a step, whose loss is one mean over tokens however it is cut, the longest
    come first, so that micro-batches need little padding.

    Args:
        sizes (`Sequence[int]`): tokens of each completion with its prompt.
        step_size (`int`): completions in an optimiser step, over all micro-batches and processes.
        seed (`int`): of the first epoch; equal on all processes.
        epoch (`Callable[[], int]`): which epoch begins, so that a resumed run draws what an unbroken one does.
        groups (`Sequence`, *optional*): the prompt of each completion. When given, whole prompts are drawn: the
            completions of one follow each other, and steps are not sorted.
    """

    def __init__(
        self, sizes: Sequence[int], step_size: int, seed: int, epoch: Callable[[], int], groups: Sequence | None = None
    ):
        self.sizes, self.step_size, self.seed, self.epoch = list(sizes), step_size, seed, epoch
        self.members: dict | None = None
        if groups is not None:
            self.members = {}
            for index, group in enumerate(groups):
                self.members.setdefault(group, []).append(index)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.members is not None:
            groups = list(self.members.values())
            for place in torch.randperm(len(groups), generator=draw).tolist():
                yield from groups[place]
            return
        order = torch.randperm(len(self.sizes), generator=draw).tolist()
        for start in range(0, len(order), self.step_size):
            yield from sorted(order[start : start + self.step_size], key=lambda index: -self.sizes[index])


class SortedSampler(Sampler[int]):
    """All indices once, the longest first: for evaluation, where the order does not matter.

    Args:
        sizes (`Sequence[int]`): tokens of each.
    """

    def __init__(self, sizes: Sequence[int]):
        self.order = sorted(range(len(sizes)), key=lambda index: -sizes[index])

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)
