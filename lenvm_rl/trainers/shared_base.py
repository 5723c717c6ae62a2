"""Value models on a decoder that this run keeps frozen: which one that is, and what reads a forward of it.

In the forms `"adapter"` and `"head"`, a length value model or a task critic shares the reference model's decoder, or
the base under a policy's adapters. A head alone makes no forward of its own where it can read the one that TRL makes of
the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from trl import GRPOTrainer

from lenvm_rl.modeling.sharing import FULL, HEAD, shared_decoder
from lenvm_rl.modeling.value_model import ValueModel

logger = logging.getLogger(__name__)

# How far two tokens are moved to tell relative positions from absolute ones, and what rounding may do to them.
_SHIFT = 7
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_OF_HALF = 5e-2


def check_base_stays_frozen(model: ValueModel, trainer: GRPOTrainer, what: str, instead: str) -> None:
    """Raise a `ValueError` unless the run keeps the decoder frozen that a value model shares; the reason is named.

    Args:
        model ([`~lenvm_rl.modeling.value_model.ValueModel`]): of the form `"adapter"` or `"head"`.
        trainer (`trl.GRPOTrainer`): constructed.
        what (`str`), instead (`str`): what errors call the model, and how to do without a shared base.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if model.backbone is shared_decoder(policy):
        _check_policy_base(policy, model.backbone, what, instead)
    elif trainer.ref_model is not None and trainer.args.sync_ref_model:
        raise ValueError(
            f"sync_ref_model=True moves the reference model, on which a {what} of form='{model.config.form}' would "
            f"move along: set sync_ref_model=False, or {instead}."
        )
    lenvm = getattr(trainer, "length_value_model", None)
    if lenvm is not None and trainer.args.refresh_steps > 0:
        lenvm = trainer.accelerator.unwrap_model(lenvm)
        if lenvm.config.form == FULL and lenvm.backbone is model.backbone:
            raise ValueError(
                f"refresh_steps re-fits the length value model's decoder, on which a {what} of "
                f"form='{model.config.form}' would move along: set refresh_steps=0, or {instead}."
            )


def run_base(trainer: GRPOTrainer) -> nn.Module:
    """The model whose decoder a run may keep frozen: the reference, or without one the policy, whose base is the
    reference where it has adapters."""
    return trainer.accelerator.unwrap_model(trainer.model if trainer.ref_model is None else trainer.ref_model)


def _check_policy_base(policy, decoder, what: str, instead: str) -> None:
    """Raise unless the policy trains adapters only, so that its base stays as the value model knows it."""
    adapted = [module for module in decoder.modules() if isinstance(module, BaseTunerLayer)]
    if not adapted:
        raise ValueError(
            f"The {what} shares the decoder that this run trains. Its base has to stay frozen: train the policy "
            f"through adapters (`peft_config=`, `use_peft` in the recipes), set beta > 0 and give no model but paths "
            f"(the reference model is its base then), or {instead}."
        )
    saved = [name for name, module in policy.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if saved:
        raise ValueError(
            f"The policy trains {', '.join(saved[:3])} itself (`modules_to_save` or `trainable_token_indices` of its "
            f"adapter), so its base is no longer what the {what} knows: leave that out, or {instead}."
        )
    own = {id(weight) for module in adapted for part in _adapters_of(module) for weight in part.parameters()}
    trained = [name for name, weight in decoder.named_parameters() if weight.requires_grad and id(weight) not in own]
    if trained:
        raise ValueError(
            f"Weights of the policy's base are trained beside its adapters ({', '.join(trained[:3])}), and the {what} "
            f"shares them: set `bias='none'` in `peft_config` and freeze them, or {instead}."
        )


def _adapters_of(layer: BaseTunerLayer) -> list[nn.Module]:
    """Parts of a layer that belong to its adapters, not to what it wraps."""
    return [child for name, child in layer.named_children() if name != "base_layer"]


class CaughtStates:
    """What is read off the hidden states of a decoder's forwards, caught as they pass by.

    Args:
        decoder (`torch.nn.Module`): which makes the forwards.
        read (`Callable`): what to keep of the states `(b, T + 1, H)` of a forward, a tensor with as many rows.
    """

    def __init__(self, decoder: nn.Module, read: Callable[[Tensor], Tensor]):
        self._decoder, self._read = decoder, read
        self._caught: list[Tensor] = []

    @contextmanager
    def caught(self, states: int) -> Iterator[None]:
        """Reads the last `states` positions of every forward of the decoder that is made inside."""
        self._caught = []

        def read(module: nn.Module, inputs: tuple, outputs: Any) -> None:
            self._caught.append(self._read(outputs.last_hidden_state[:, -states:]))

        hook = self._decoder.register_forward_hook(read)
        try:
            yield
        finally:
            hook.remove()

    def take(self) -> Tensor | None:
        """What was caught since the last time, masked slots included; `None` if nothing was."""
        caught, self._caught = self._caught, []
        return torch.cat(caught) if caught else None


def reads_reference(model: ValueModel, trainer: GRPOTrainer, what: str) -> bool:
    """Whether a value model can read the reference's forward; where it cannot, it makes one of its own, which is said.

    It can if it is a head alone on the decoder that the reference runs, and that forward is what its own would be: no
    dropout, and positions that count from anywhere (TRL gives none, so in rows padded on the left they start late,
    which rotary positions do not see).
    """
    if model.config.form != HEAD or trainer.beta == 0.0:
        return False
    policy = trainer.accelerator.unwrap_model(trainer.model)
    decoder = shared_decoder(run_base(trainer))
    if model.backbone is not decoder:
        reason = "its base is not the reference's"
    elif model.config.layers is not None:
        reason = "it reads layers of the decoder that a forward for probabilities does not give"
    elif trainer.ref_model is None and "ref" in policy.peft_config:
        reason = "the reference has adapters of its own"
    elif _has_dropout(decoder):
        reason = "the reference has dropout"
    elif not _is_shift_invariant(model):
        reason = "its base has absolute positions"
    else:
        return True
    logger.info("the %s (form='head') makes a forward of its own: %s", what, reason)
    return False


def is_reference_forward(model: nn.Module, decoder: nn.Module, trainer: GRPOTrainer) -> bool:
    """Whether TRL asks a model for probabilities as the reference: by its own model, or with adapters switched off.

    Args:
        model (`torch.nn.Module`): which TRL asks.
        decoder (`torch.nn.Module`): the reference's.
        trainer (`trl.GRPOTrainer`): of the run.
    """
    if trainer.ref_model is not None:
        return model is trainer.ref_model
    return all(layer.disable_adapters for layer in decoder.modules() if isinstance(layer, BaseTunerLayer))


def _has_dropout(decoder) -> bool:
    # Dropout in adapters is off with them.
    adapters = {
        id(part)
        for layer in decoder.modules()
        if isinstance(layer, BaseTunerLayer)
        for child in _adapters_of(layer)
        for part in child.modules()
    }
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0 and id(module) not in adapters)
        or ("attention_dropout" in vars(module) and module.attention_dropout > 0)
        for module in decoder.modules()
    )


@torch.no_grad()
def _is_shift_invariant(model: ValueModel) -> bool:
    device = model.head.output.weight.device
    ids = torch.zeros(2, 2, dtype=torch.long, device=device)
    ids[:, 1] = 1
    positions = torch.tensor([[0, 1], [_SHIFT, _SHIFT + 1]], device=device)
    states = model.hidden_states(ids, position_ids=positions)
    # The dtype that it computes in: an engine may hold the weights in another.
    tolerance = _ROUNDING.get(states.dtype, _ROUNDING_OF_HALF)
    first, second = states.float()
    return bool((first - second).abs().max() <= tolerance * (1.0 + first.abs().max()))
