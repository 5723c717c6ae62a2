"""Variants of the trainers that only a comparison needs: an oracle, and controls of the length value model.

Each is a mixin before [`~lenvm_rl.trainers.LenVMGRPOTrainer`] or [`~lenvm_rl.trainers.LenVMPPOTrainer`] that changes
what the streams are made of, and nothing else.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from eval.gradient.estimators import of_next_in_group
from lenvm_rl.returns import discounted_return
from lenvm_rl.sandbox import read_completion
from lenvm_rl.sandbox.task import TOKENS
from lenvm_rl.trainers.streams import Batch, Streams, length_gate, with_length_stream


class WasteOracle:
    """Charges the tokens of waste alone, each at itself, in correct completions: what a judge of redundancy can reach.

    The ceiling of token-level methods such as DECS (arXiv 2509.25827), since the sandbox knows its waste. The strength
    is `charge`.
    """

    charge: float
    # Otherwise GRPO without a length stream would leave the batch as TRL made it.
    always_dense = True

    def _collect(self, batch: dict) -> Batch:
        read = super()._collect(batch)
        self._waste = wasted_tokens(batch["completion_ids"], read.completions.actions)
        return read

    def _streams(self, read: Batch) -> Streams:
        streams = super()._streams(read)
        charged = self.charge * read.outcomes.correct.unsqueeze(1) * self._waste
        return replace(streams, advantages=streams.advantages - charged)


def wasted_tokens(completion_ids: Tensor, mask: Tensor) -> Tensor:
    """Where completions of the sandbox `(B, T)` have a token of waste: 1, else 0."""
    waste = torch.zeros(completion_ids.shape)
    for row, (ids, exists) in enumerate(zip(completion_ids.tolist(), mask.tolist(), strict=True)):
        reading = read_completion([TOKENS[token] for token, there in zip(ids, exists, strict=True) if there])
        waste[row, : len(reading.wasted)] = torch.tensor(reading.wasted, dtype=waste.dtype)
    return waste


class ConstantValues:
    """One V at every state: the mean over the batch, so that a baseline is left that knows neither prompt nor token."""

    def _collect(self, batch: dict) -> Batch:
        read = super()._collect(batch)
        mean = read.length_logits_bt1[:, :-1][read.completions.mask].mean()
        return replace(read, length_logits_bt1=torch.full_like(read.length_logits_bt1, float(mean)))


class BorrowedValues:
    """V of another rollout of the prompt at the same place, or at its end: what a prompt says, without the tokens."""

    def _collect(self, batch: dict) -> Batch:
        read = super()._collect(batch)
        logits = of_next_in_group(read.length_logits_bt1, read.completions.mask, read.processes.group_size)
        return replace(read, length_logits_bt1=logits)


class SequenceReturn:
    """The length return of the whole completion less the mean of its group's others, at every token: the dense stream's
    strength without a model and without density. (Less the mean of all, itself included, it would be half of that in
    pairs.)
    """

    def _streams(self, read: Batch) -> Streams:
        task = super()._streams(read).task
        completions = read.completions
        whole = discounted_return(completions.mask.sum(dim=1), read.gamma)
        size = read.processes.group_size
        others = (whole.view(-1, size).sum(dim=1).repeat_interleave(size) - whole) / (size - 1)
        length = torch.where(completions.actions, (whole - others).unsqueeze(1), 0.0).to(task.dtype)
        gate = length_gate(self.args.length_gate, read.outcomes, read.processes)
        return with_length_stream(self.args, read, task, length, gate)


# By name.
VARIANTS: dict[str, type] = {
    "waste": WasteOracle,
    "constant": ConstantValues,
    "borrowed": BorrowedValues,
    "sequence": SequenceReturn,
}
