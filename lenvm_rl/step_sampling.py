"""The order in which completions are drawn: optimiser steps at random, and what stands together inside a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


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
        self,
        sizes: Sequence[int],
        step_size: int,
        seed: int,
        epoch: Callable[[], int],
        groups: Sequence | None = None,
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
