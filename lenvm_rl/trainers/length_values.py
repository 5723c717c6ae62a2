"""The frozen length value model of a run: its place, what it says of a batch, its re-fits, and what is saved of it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from lenvm_rl.backbones import check_embeds
from lenvm_rl.modeling import LengthValueModel, is_shared
from lenvm_rl.tokenization import check_same_tokenizer
from lenvm_rl.trainers import checks
from lenvm_rl.trainers.drift import Drift
from lenvm_rl.trainers.metrics import value_metrics
from lenvm_rl.trainers.pictures import check_sees_pictures, check_text_only_arguments
from lenvm_rl.trainers.refresh import LengthValueRefresh
from lenvm_rl.trainers.sharding import place_sharded
from lenvm_rl.trainers.shared_base import is_reference_forward, on_shared_base, reference_states
from lenvm_rl.trainers.streams import Completions


def place_length_value_model(model_or_path, trainer):
    """The length value model of a run, frozen, on its device, wrapped or sharded as TRL does it with its reference.

    Args:
        model_or_path ([`LengthValueModel`] or `str`):
            What [`~lenvm_rl.trainers.checks.load_length_value_model`] gave.
        trainer (`trl.GRPOTrainer`): constructed.

    Raises:
        `ValueError`: it does not fit the policy (its tokenizer, its pictures), or has no frozen base in this run.
    """
    model = on_shared_base(model_or_path, trainer) if is_shared(model_or_path) else model_or_path
    if trainer._is_vlm:
        check_sees_pictures(model, trainer, "length value model")
        check_text_only_arguments(trainer.args)
    check_same_tokenizer(model.config.tokenizer_fingerprint, trainer._tokenizer)
    # Padding is masked, and read as another token.
    check_embeds(trainer._tokenizer, model, "the length value model", ordinary=True, padding=False)
    model.freeze()
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return place_sharded(model, trainer)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


class LengthValues:
    """What a run asks of its length value model.

    Args:
        model (`torch.nn.Module`): as [`place_length_value_model`] gives it.
        trainer ([`~lenvm_rl.trainers.base.LenVMTrainer`]): constructed but for what needs this.

    Attributes:
        gamma (`float`): of the length return.
    """

    def __init__(self, model, trainer):
        self._model, self._trainer = model, trainer
        bare: LengthValueModel = trainer.accelerator.unwrap_model(model)
        self.gamma = bare.config.gamma
        self._reference = reference_states(bare, trainer)
        self._drift = Drift(trainer.args)
        self._refresh = None
        if trainer.args.refresh_steps > 0:
            self._refresh = LengthValueRefresh(bare, trainer.args, trainer.accelerator)

    def reading(self, model, logits_to_keep: int):
        """A context for a forward of TRL's: inside, a head alone reads along if `model` runs as the reference."""
        if self._reference is None or not is_reference_forward(model, self._trainer):
            return contextlib.nullcontext()
        return self._reference.caught(logits_to_keep + 1)

    def logits(self, batch: dict) -> Tensor:
        """At every state of a generation batch, `(B, T + 1)`: read off the reference's forward where they can be."""
        caught = None if self._reference is None else self._reference.take()
        if caught is None:
            return self._trainer._value_logits(self._model, batch, "length value model")
        exists = torch.nn.functional.pad(batch["completion_mask"].bool(), (1, 0), value=True)
        logits = torch.where(exists, caught, 0.0)
        checks.check_finite(logits, "length value model", batch, self._trainer)
        return logits

    def refresh_if_due(self) -> dict[str, float]:
        """Re-fit the model if the run asks for it and it is time. Before there are completions: what the model says of
        them then does not depend on how they turn out. Returns the metrics of the re-fit."""
        if self._refresh is None:
            return {}
        trainer = self._trainer
        measured = self._refresh.run_if_due(
            self._model, trainer.state.global_step, trainer.args.per_device_train_batch_size
        )
        if measured:
            self._drift.reset()
        return measured

    def measure(
        self, logits: Tensor, batch: dict, completions: Completions, correct: Tensor, train: bool
    ) -> dict[str, float]:
        """Metrics `lenvm/…` of a generation batch; one of training is watched for drift and kept for a refresh."""
        measured = value_metrics(logits, completions, self.gamma, self._trainer._sum_over_processes)
        if not train:
            return measured
        if self._refresh is not None:
            self._refresh.add(batch, completions, correct)
        return {**measured, **self._drift.observe(measured)}

    def save(self, folder: str, should_save: bool) -> None:
        """Write into a checkpoint what a resumed run needs: every process calls this."""
        if should_save:
            self._drift.save(folder)
        if self._refresh is not None:
            self._refresh.save(folder, should_save)

    def load(self, folder: str) -> None:
        """Go on from a checkpoint."""
        self._drift.load(folder)
        if self._refresh is not None:
            self._refresh.load(folder)
