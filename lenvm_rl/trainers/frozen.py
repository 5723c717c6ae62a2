"""The frozen length value model of a run: where it is placed, and what the run asks of it.

In the forms `"adapter"` and `"head"` it shares a decoder that this run keeps frozen
([`lenvm_rl.trainers.shared_base`]). Under FSDP2 and DeepSpeed, see [`lenvm_rl.trainers.sharding`].
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from lenvm_rl.modeling.backbones import check_embeds
from lenvm_rl.modeling.length_value_model import LengthValueModel, is_shared
from lenvm_rl.tokenization import check_same_tokenizer
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.reading import check_finite, check_sees_pictures, check_text_only_arguments, value_logits
from lenvm_rl.trainers.refresh import LengthValueRefresh
from lenvm_rl.trainers.sharding import is_sharded, loaded_whole, place_sharded
from lenvm_rl.trainers.shared_base import (
    CaughtStates,
    check_base_stays_frozen,
    is_reference_forward,
    reads_reference,
    run_base,
)
from lenvm_rl.trainers.streams import Completions

logger = logging.getLogger(__name__)

NAME, _INSTEAD = "length value model", "give one of form='full'"
# Drift: what is watched, the generation batches after which a batch counts half, those before there is a verdict, and
# the bounds beyond which the model counts as stale.
WATCHED = ("explained_variance", "calibration_slope", "predicted_length", "realised_length")
HALF_LIFE, FIRST_VERDICT = 5.0, 5
STALE_EXPLAINED_VARIANCE, STALE_FACTOR = 0.0, 2.0


def length_value_model_of(model_or_path: LengthValueModel | str | os.PathLike | None, args: LenVMConfig):
    """The length value model of a run, loaded if it is a path, or `None` where none is needed and none is given.

    A path to one that shares its decoder is left a path: its base is known when the trainer is made.

    Raises:
        `ValueError`: a coefficient needs one and there is none, or what was given is another kind of model.
        `FileNotFoundError`: the path does not exist.
    """
    if model_or_path is None:
        if args.needs_length_value_model:
            raise ValueError(
                f"length_coef={args.length_coef}, shaping_coef={args.shaping_coef} and rollout_guidance="
                f"{args.rollout_guidance} need a length value model: pass `length_value_model=` (a LengthValueModel or "
                "its path), or set the coefficients to 0 and leave guidance, length_target and accuracy_floor out."
            )
        return None
    if isinstance(model_or_path, (str, os.PathLike)):
        if is_shared(model_or_path):
            return model_or_path
        with loaded_whole(args):
            model_or_path = LengthValueModel.from_pretrained(model_or_path, trust_remote_code=args.runs_remote_code)
    if not isinstance(model_or_path, LengthValueModel):
        raise ValueError(
            f"`length_value_model` is a {type(model_or_path).__name__}; it has to be a LengthValueModel or the path of "
            "one. Make one with `LengthValueModel.from_backbone` and pretrain it on rollouts of the policy."
        )
    return model_or_path


def place_length_value_model(model_or_path: LengthValueModel | str | os.PathLike, trainer: GRPOTrainer):
    """The length value model of a run, frozen, on its device, wrapped or sharded as TRL does it with its reference.

    Raises:
        `ValueError`: it does not fit the policy (its tokenizer, its pictures), or has no frozen base in this run.
    """
    model = model_or_path
    if is_shared(model_or_path):
        if isinstance(model_or_path, (str, os.PathLike)):
            with loaded_whole(trainer.args):
                model = LengthValueModel.from_pretrained(model_or_path, base=run_base(trainer))
        check_base_stays_frozen(model, trainer, NAME, _INSTEAD)
    if trainer._is_vlm:
        check_sees_pictures(model, trainer, "length value model")
        check_text_only_arguments(trainer.args)
    check_same_tokenizer(model.config.tokenizer_fingerprint, trainer._tokenizer)
    # Padding is masked, and read as another token.
    check_embeds(trainer._tokenizer, model, "the length value model", ordinary=True, padding=False)
    model.freeze()
    if is_sharded(trainer):
        return place_sharded(model, trainer, NAME)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


class FrozenLengthValues:
    """What a run asks of its length value model: its logits of a batch, its re-fits, and how far it has drifted.

    Attributes:
        gamma (`float`): of the length return.
    """

    def __init__(self, model: nn.Module, trainer: GRPOTrainer):
        self._model, self._trainer = model, trainer
        bare: LengthValueModel = trainer.accelerator.unwrap_model(model)
        self.gamma = bare.config.gamma
        self.drift, self.refresh = Drift(), None
        if trainer.args.refresh_steps > 0:
            self.refresh = LengthValueRefresh(bare, trainer.args, trainer.accelerator)

    @cached_property
    def _reference(self) -> CaughtStates | None:
        bare: LengthValueModel = self._trainer.accelerator.unwrap_model(self._model)
        if not reads_reference(bare, self._trainer, NAME):
            return None
        return CaughtStates(bare.backbone, lambda states: bare.from_hidden_states(states).logits)

    def reads_along(self) -> bool:
        """Whether the reference's forward is read. Found out by a forward, so asked when nothing else runs; and not
        before a batch, since an engine has no weights of the policy at hand before it runs."""
        return self._reference is not None

    def reading(self, model: nn.Module, logits_to_keep: int) -> contextlib.AbstractContextManager:
        """A context for a forward of TRL's: inside, a head alone reads along if `model` runs as the reference."""
        decoder = self._trainer.accelerator.unwrap_model(self._model).backbone
        if self._reference is None or not is_reference_forward(model, decoder, self._trainer):
            return contextlib.nullcontext()
        return self._reference.caught(logits_to_keep + 1)

    @torch.no_grad()
    def logits(self, batch: dict, chunk_size: int) -> Tensor:
        """At every state of a generation batch, `(B, T + 1)`: read off the reference's forward where they can be."""
        caught = None if self._reference is None else self._reference.take()
        if caught is None:
            return value_logits(self._model, NAME, batch, self._trainer, chunk_size)
        exists = torch.nn.functional.pad(batch["completion_mask"].bool(), (1, 0), value=True)
        logits = torch.where(exists, caught, 0.0)
        check_finite(logits, NAME, batch, self._trainer)
        return logits

    def refresh_if_due(self, step: int, chunk_size: int) -> dict[str, float]:
        """Re-fit the model if the run asks for it and it is time. Before there are completions: what the model says of
        them then does not depend on how they turn out. Returns the metrics of the re-fit."""
        measured = {} if self.refresh is None else self.refresh.run_if_due(self._model, step, chunk_size)
        if measured.get("refresh/completions"):
            self.drift.reset()
        return measured

    def observe(self, measured: dict, batch: dict, completions: Completions, correct: Tensor) -> dict[str, float]:
        """Take in a batch of training and what was measured on it, for drift and for refreshes to come."""
        if self.refresh is not None:
            self.refresh.add(batch, completions, correct)
        return self.drift.observe(measured)


class Drift:
    """Moving averages of how well a length value model fits the completions of a run, and the verdict on it.

    It counts as stale while it explains less than `STALE_EXPLAINED_VARIANCE` of the variance of the return, or while
    its calibration slope, or predicted over realised length, is above `STALE_FACTOR` or below its inverse.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything: the model has just been re-fitted."""
        self.averages: dict[str, float] = {}
        self.batches, self.stale = 0, False

    def observe(self, metrics: dict[str, float]) -> dict[str, float]:
        """Take in what a training batch measured.

        Returns:
            `dict[str, float]`: `lenvm/stale`, 1 while the model counts as stale; a warning is logged when it begins to.
        """
        keep = 0.5 ** (1.0 / HALF_LIFE)
        for name in WATCHED:
            value = metrics[f"lenvm/{name}"]
            if not math.isnan(value):
                before = self.averages.get(name, value)
                self.averages[name] = keep * before + (1.0 - keep) * value
        self.batches += 1
        reasons = self.reasons() if self.batches >= FIRST_VERDICT else []
        if reasons and not self.stale:
            logger.warning(
                "the length value model has become stale: %s. Set refresh_steps, or sample from the policy of today "
                "and pretrain it again.",
                "; ".join(reasons),
            )
        self.stale = bool(reasons)
        return {"lenvm/stale": float(self.stale)}

    def reasons(self) -> list[str]:
        """Why the model counts as stale; empty if it does not."""
        found = []
        explained = self.averages.get("explained_variance", math.inf)
        if explained < STALE_EXPLAINED_VARIANCE:
            found.append(
                f"it explains {explained:.2f} of the variance of the return (stale below {STALE_EXPLAINED_VARIANCE:g})"
            )
        slope = self.averages.get("calibration_slope", 1.0)
        if not 1.0 / STALE_FACTOR <= slope <= STALE_FACTOR:
            found.append(f"its calibration slope is {slope:.2f} (stale beyond a factor of {STALE_FACTOR:g})")
        predicted, realised = (self.averages.get(f"{name}_length", 0.0) for name in ("predicted", "realised"))
        # The end of sequence counted, so that a policy that writes nothing else divides by 1.
        ratio = (predicted + 1.0) / (realised + 1.0)
        if not 1.0 / STALE_FACTOR <= ratio <= STALE_FACTOR:
            found.append(
                f"it predicts {predicted:.1f} tokens where {realised:.1f} are written (stale beyond a "
                f"factor of {STALE_FACTOR:g})"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """The averages and the verdict."""
        return {"averages": self.averages, "batches": self.batches, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state; a checkpoint that was written without a length value model has none."""
        if state is None:
            logger.info("the checkpoint does not say how the length value model has drifted: starting anew")
            return
        self.averages, self.batches, self.stale = state["averages"], state["batches"], state["stale"]
