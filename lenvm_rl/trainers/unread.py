"""What the device of a run has worked out and its host has not read yet.

To read a number of a GPU makes the host wait until all is done that the GPU has to do, so the trainers read once per
optimizer step: metrics, what decides about batches to come, and whether something was at fault, all in one transfer
right before the weights move (under DeepSpeed, whose backward pass moves them, right after). An evaluation is read
batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lenvm_rl.trainers.metrics import BatchMetrics, for_sums

if TYPE_CHECKING:
    from lenvm_rl.trainers.base import LenVMTrainer


class Unread:
    """Sums of this process, each with what is to be done about its total over all processes once that is read.

    All processes add the same, in the same order, and read at the same time.

    Args:
        reduce (`Callable`): sums a tensor over processes, such as `accelerator.reduce(…, reduction="sum")`.
        process (`int`, *optional*, defaults to `0`), processes (`int`, *optional*, defaults to `1`): which one this is,
            and how many there are.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], process: int = 0, processes: int = 1):
        self._reduce, self._process, self._processes = reduce, process, processes
        self._entries: list[tuple[Callable[[], Tensor], Callable[[list[float]], None]]] = []

    def add(self, sums: Tensor, use: Callable[[list[float]], None]) -> None:
        """Take in sums, and who gets their totals.

        Args:
            sums (`torch.Tensor` of shape `(n,)`): of this process.
            use (`Callable`): called with `n` numbers; its error is the error of who reads.
        """
        kept = for_sums(sums.detach()).double()
        self._entries.append((lambda: kept, use))

    def add_own(self, numbers: Tensor, use: Callable[[list[float]], None]) -> None:
        """Take in numbers of this process, `(n,)`; `use` gets those of all processes side by side, in their order."""
        before, after = self._process, self._processes - self._process - 1
        self.add(pad(numbers, (before * len(numbers), after * len(numbers))), use)

    def add_flag(self, flag: Tensor, use: Callable[[], None]) -> None:
        """Take in whether something is so, a tensor of one element; `use` is called if it is on any process."""
        self.add(flag.reshape(1), lambda totals: use() if totals[0] else None)

    def add_metrics(self, metrics: BatchMetrics, use: Callable[[dict[str, float]], None]) -> None:
        """Take in metrics, and who gets them by name; they may go on taking in numbers until they are read."""
        self._entries.append((lambda: metrics.sums, lambda totals: use(metrics.read(totals))))

    def read(self) -> None:
        """Read all that was added, in that order, after one exchange with the other processes."""
        entries, self._entries = self._entries, []
        if entries:
            sums = [sums() for sums, _ in entries]
            totals = iter(self._reduce(torch.cat(sums)).tolist())
            for own, (_, use) in zip(sums, entries, strict=True):
                use(list(islice(totals, len(own))))


class ReadsBeforeStep(TrainerCallback):
    """Tells a trainer of `lenvm_rl` that its gradients are there, and that its weights have not moved yet."""

    def __init__(self, trainer: LenVMTrainer):
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Called by the Trainer, which has unscaled all gradients (AMP) and clipped the policy's."""
        self._trainer.before_optimizer_step()
