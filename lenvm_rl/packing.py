"""Packing: several short sequences in one row, so that ragged batches carry (almost) no padding.

As in Krell et al., "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027): rows are filled with
whole sequences, position ids restart with each of them, and attention stays inside a sequence. No model is needed here.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch


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
