"""Length value models that share their decoder with the policy or its reference: which base, and whether it holds.

The forms `"adapter"` and `"head"` (see [`lenvm_rl.forms`]) hold no decoder. In a run, the decoder is that of TRL's
reference model, or the base under a policy's adapters: policy, reference and critic then hold its weights once. A head
alone needs no forward of its own where the reference runs in any case (`beta > 0`): it reads that forward's hidden
states.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lenvm_rl.forms import HEAD, shared_decoder
from lenvm_rl.modeling import LengthValueModel

logger = logging.getLogger(__name__)

# How far two tokens are moved to tell relative positions from absolute ones, and what rounding may do to them.
_SHIFT = 7
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_OF_HALF = 5e-2


def on_shared_base(model_or_path, trainer) -> LengthValueModel:
    """A length value model of the form `"adapter"` or `"head"`, on a decoder that this run keeps frozen.

    Args:
        model_or_path ([`LengthValueModel`], `str` or `os.PathLike`):
            A model, on the base that it was given; or a path, whose base is the run's: the reference model's decoder,
            or without one the base of a policy with adapters.
        trainer (`trl.GRPOTrainer`): constructed.

    Raises:
        `ValueError`: the run keeps no decoder frozen, or not this one; the reason is named.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "A length value model on a shared base does not run under FSDP or DeepSpeed, which cut the base into "
            "shards: launch with DDP, or give one of form='full'."
        )
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model_or_path, (str, os.PathLike)):
        model = LengthValueModel.from_pretrained(model_or_path, base=_frozen_base(policy, trainer))
    else:
        model = model_or_path
    if model.backbone is shared_decoder(policy):
        _check_policy_base(policy, model.backbone)
    elif trainer.ref_model is not None and trainer.args.sync_ref_model:
        raise ValueError(
            "sync_ref_model=True moves the reference model, on which a length value model of form="
            f"'{model.config.form}' would move along: set sync_ref_model=False, or give one of form='full'."
        )
    return model


def _frozen_base(policy, trainer):
    """The reference model, or without one the policy, whose base is the reference where it has adapters."""
    if trainer.ref_model is not None:
        return trainer.accelerator.unwrap_model(trainer.ref_model)
    return policy


def _check_policy_base(policy, decoder) -> None:
    """Raise unless the policy trains adapters only, so that its base stays that of the length value model."""
    adapted = [module for module in decoder.modules() if isinstance(module, BaseTunerLayer)]
    if not adapted:
        raise ValueError(
            "The length value model shares the decoder that this run trains. Its base has to stay frozen: train the "
            "policy through adapters (`peft_config=`), set beta > 0 and give the length value model's *path* (the "
            "reference model is its base then), or give one of form='full'."
        )
    saved = [name for name, module in policy.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if saved:
        raise ValueError(
            f"The policy trains {', '.join(saved[:3])} itself (`modules_to_save` or `trainable_token_indices` of its "
            "adapter), so its base is no longer that of the length value model: leave that out, or give a length value "
            "model of form='full'."
        )
    own = {id(weight) for module in adapted for part in _adapters_of(module) for weight in part.parameters()}
    trained = [name for name, weight in decoder.named_parameters() if weight.requires_grad and id(weight) not in own]
    if trained:
        raise ValueError(
            f"Weights of the policy's base are trained beside its adapters ({', '.join(trained[:3])}), and the length "
            "value model shares them: set `bias='none'` in `peft_config` and freeze them, or give one of form='full'."
        )


def _adapters_of(layer: BaseTunerLayer) -> list[nn.Module]:
    """Parts of a layer that belong to its adapters, not to what it wraps."""
    return [child for name, child in layer.named_children() if name != "base_layer"]


class ReferenceStates:
    """What a head alone says about the hidden states of the reference's forward, caught as they pass by.

    Args:
        model ([`LengthValueModel`]): of form `"head"`, on the decoder that the reference runs.
    """

    def __init__(self, model: LengthValueModel):
        self._model = model
        self._logits: list[Tensor] = []

    @contextmanager
    def caught(self, states: int) -> Iterator[None]:
        """Reads the last `states` positions of every forward of the decoder that is made inside."""
        self._logits = []

        def read(module, inputs, outputs) -> None:
            self._logits.append(self._model.from_hidden_states(outputs.last_hidden_state[:, -states:]).logits)

        hook = self._model.backbone.register_forward_hook(read)
        try:
            yield
        finally:
            hook.remove()

    def take(self) -> Tensor | None:
        """Logits `(B, T + 1)` of what was caught since the last time, masked slots included; `None` if nothing was."""
        logits, self._logits = self._logits, []
        return torch.cat(logits) if logits else None


def reference_states(model, trainer) -> ReferenceStates | None:
    """Where a length value model can read the reference's forward; `None` where it makes one of its own.

    It can if it is a head alone on the decoder that the reference runs, and that forward is what its own would be: no
    dropout, and positions that count from anywhere (TRL gives none, so in rows padded on the left they start late,
    which rotary positions do not see).

    Args:
        model ([`LengthValueModel`]): of the run, unwrapped.
        trainer (`trl.GRPOTrainer`): constructed.
    """
    if model.config.form != HEAD or trainer.beta == 0.0:
        return None
    policy = trainer.accelerator.unwrap_model(trainer.model)
    decoder = shared_decoder(_frozen_base(policy, trainer))
    if model.backbone is not decoder:
        reason = "its base is not the reference's"
    elif trainer.ref_model is None and "ref" in policy.peft_config:
        reason = "the reference has adapters of its own"
    elif _has_dropout(decoder):
        reason = "the reference has dropout"
    elif not _is_shift_invariant(decoder):
        reason = "its base has absolute positions"
    else:
        return ReferenceStates(model)
    logger.info("the length value model (form='head') makes a forward of its own: %s", reason)
    return None


def is_reference_forward(model, trainer) -> bool:
    """Whether TRL asks a model for probabilities as the reference: by its own model, or with adapters switched off."""
    if trainer.ref_model is not None:
        return model is trainer.ref_model
    layers = [layer for layer in trainer.length_value_model.backbone.modules() if isinstance(layer, BaseTunerLayer)]
    return all(layer.disable_adapters for layer in layers)


def _has_dropout(decoder) -> bool:
    # That of adapters is off with them.
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
def _is_shift_invariant(decoder) -> bool:
    ids = torch.zeros(2, 2, dtype=torch.long, device=decoder.device)
    ids[:, 1] = 1
    positions = torch.tensor([[0, 1], [_SHIFT, _SHIFT + 1]], device=decoder.device)
    first, second = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float()
    tolerance = _ROUNDING.get(decoder.dtype, _ROUNDING_OF_HALF)
    return bool((first - second).abs().max() <= tolerance * (1.0 + first.abs().max()))
