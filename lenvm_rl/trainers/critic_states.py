"""The hidden states that a task critic of form `"head"` reads and learns from, of one forward per generation batch."""

from __future__ import annotations

import contextlib
from functools import cached_property

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from lenvm_rl.trainers.critic import TASK_CRITIC
from lenvm_rl.trainers.reading import check_finite, value_logits
from lenvm_rl.trainers.shared_base import CaughtStates, is_reference_forward, reads_reference


class CriticStates:
    """The hidden states that a task critic of form `"head"` reads: of one forward per batch, the reference's where it
    makes one that can be read, and kept with the batch for the steps that the head learns in.

    Args:
        critic (`torch.nn.Module`): placed.
        trainer (`trl.GRPOTrainer`): of the run.
    """

    def __init__(self, critic: nn.Module, trainer: GRPOTrainer):
        self._critic, self._trainer = critic, trainer
        bare = trainer.accelerator.unwrap_model(critic)
        self._decoder = bare.backbone
        self._states = CaughtStates(self._decoder, lambda states: states.detach())

    def reads_along(self) -> bool:
        """As [`~lenvm_rl.trainers.frozen.FrozenLengthValues.reads_along`]."""
        return self._reads_reference

    @cached_property
    def _reads_reference(self) -> bool:
        return reads_reference(self._trainer.accelerator.unwrap_model(self._critic), self._trainer, TASK_CRITIC)

    def reading(self, model: nn.Module, logits_to_keep: int) -> contextlib.AbstractContextManager:
        """A context for a forward of TRL's: inside, states are kept if `model` runs as the reference."""
        if not self._reads_reference or not is_reference_forward(model, self._decoder, self._trainer):
            return contextlib.nullcontext()
        return self._states.caught(logits_to_keep + 1)

    @torch.no_grad()
    def of_batch(self, batch: dict, chunk_size: int) -> Tensor:
        """At every state of a generation batch, `(B, T + 1, H)` in the dtype of the decoder."""
        states = self._states.take()
        if states is None:
            with self._states.caught(batch["completion_ids"].shape[1] + 1):
                value_logits(self._critic, TASK_CRITIC, batch, self._trainer, chunk_size)
            states = self._states.take()
        return states


def state_values(critic: nn.Module, states: Tensor, batch: dict, trainer: GRPOTrainer, chunk_size: int | None = None):
    """What a head says of hidden states `(B, T + 1, H)`: values `(B, T + 1)`, as [`value_logits`] gives them."""
    chunks = [critic(hidden_states=rows).logits for rows in states.split(chunk_size or len(states))]
    exists = nn.functional.pad(batch["completion_mask"].bool(), (1, 0), value=True)
    values = torch.where(exists, torch.cat(chunks), 0.0)
    check_finite(values, TASK_CRITIC, batch, trainer)
    return values
