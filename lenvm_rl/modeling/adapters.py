"""Adapters of PEFT in a model: found, merged into a copy, or kept with the settings to put them there again.

A model has adapters if it is a `peft.PeftModel`, or if somebody has put their layers into it
(`peft.inject_adapter_in_model`, `model.add_adapter`). What counts is what it computes: adapters that are switched off,
or inactive, are as if they were not there.
"""

from __future__ import annotations

import copy
import enum
import logging
from collections.abc import Iterator
from typing import Any

from peft import PeftModel, get_peft_config, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

logger = logging.getLogger(__name__)

# Fields that say which layers an adapter is in, where its layers are named one by one; and what concerns no layer.
_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_ELSEWHERE = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version")


def bare_model(model: nn.Module) -> nn.Module:
    """The model under a `PeftModel`, its layers being what they are; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapted_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """`(parent, name, layer)` for every layer with adapters, the outer one where they are nested."""
    for name, child in module.named_children():
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield module, name, child
        else:
            yield from adapted_layers(child)


def merged_copy(model: nn.Module) -> nn.Module:
    """The decoder of a model as it computes, with no adapters: itself if there are none, else a float32 copy.

    Adapters that cannot be merged (a prompt in front of the tokens, routed ones) are left out, which is logged; an
    error is raised where they cannot be taken out either. The model is left as it was.
    """
    decoder, left_out = bare_model(model).base_model, []
    for config in adapter_configs(model).values():
        if config.is_adaption_prompt:
            raise ValueError(
                f"Adapters of the type {config.peft_type.value} can neither be merged nor taken out: name a model to "
                "start from (`critic_init=` or `critic=` of LenVMPPOTrainer)."
            )
        if config.is_prompt_learning:
            left_out.append(config.peft_type.value)
    if any(adapted_layers(decoder)):
        decoder = copy.deepcopy(decoder).float()
        for parent, name, layer in [*adapted_layers(decoder)]:
            parent._modules[name] = _merged(layer, left_out)
    if left_out:
        logger.warning(
            "The adapters of the model (%s) cannot be merged, so the copy is of its base.",
            ", ".join(sorted(set(left_out))),
        )
    return decoder


def _merged(layer: nn.Module, left_out: list[str]) -> nn.Module:
    while isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        off = layer.disable_adapters or not layer.active_adapters
        if isinstance(layer, AuxiliaryTrainingWrapper):
            if off:
                layer = layer.original_module
            else:
                layer = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            continue
        if not off and not layer.merged:
            try:
                layer.merge()
            except NotImplementedError:
                left_out.append(type(layer).__name__)
        layer = layer.base_layer
    return layer


def adapter_configs(model: nn.Module) -> dict:
    """PEFT's configs of the adapters in a model, by name; empty if there are none."""
    if isinstance(model, PeftModel):
        return model.peft_config
    return vars(model).get("peft_config", {}) if any(adapted_layers(model)) else {}


def keep_active(model: nn.Module, configs: dict) -> dict:
    """Reduce a model, in place, to the adapters that are active; modules that were copied to be trained take the place
    of what they are a copy of. Gives back which of the `configs` (of [`adapter_configs`]) remain.
    """
    remaining = set()
    for parent, name, layer in [*adapted_layers(model)]:
        off = layer.disable_adapters or not layer.active_adapters
        if isinstance(layer, ModulesToSaveWrapper):
            trained = [each for each in layer.active_adapters if each in layer.modules_to_save]
            parent._modules[name] = layer.original_module if off or not trained else layer.modules_to_save[trained[0]]
        elif isinstance(layer, BaseTunerLayer):
            if layer.merged:
                raise ValueError(f"An adapter is merged into the weights of {name!r}: unmerge it (`unmerge_adapter`).")
            if off:
                parent._modules[name] = layer.get_base_layer()
                continue
            active = set(layer.active_adapters)
            for other in configs.keys() - active:
                layer.delete_adapter(other)
            remaining |= active
    return {name: config for name, config in configs.items() if name in remaining}


def adapter_settings(model: nn.Module, configs: dict) -> dict[str, dict]:
    """Settings of the adapters in a model, whose configs are given by name, as JSON for [`add_adapters`]."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    found = {}
    for name, config in configs.items():
        default, settings = type(config)().to_dict(), config.to_dict()
        settings = {
            key: as_json(value)
            for key, value in settings.items()
            if key not in (*_SELECTION, *_ELSEWHERE) and value != default.get(key)
        }
        own = [(path, layer) for path, layer in layers if _holds(layer, name)]
        settings |= {"peft_type": config.peft_type.value, "target_modules": [path for path, _ in own]}
        if "feedforward_modules" in config.to_dict():
            settings["feedforward_modules"] = [path for path, layer in own if layer.is_feedforward]
        if all(isinstance(layer, LoraLayer) for _, layer in own):
            # Starting weights are none of these, and some are computed from the layer's.
            settings.pop("init_lora_weights", None)
            settings["rank_pattern"] = {path: layer.r[name] for path, layer in own if layer.r[name] != config.r}
            settings["alpha_pattern"] = {
                path: layer.lora_alpha[name] for path, layer in own if layer.lora_alpha[name] != config.lora_alpha
            }
        found[name] = settings
    return found


def add_adapters(model: nn.Module, settings: dict[str, dict]) -> None:
    """Put adapters into a model, in place, with random weights, all of them active; see [`adapter_settings`]."""
    for name, each in settings.items():
        inject_adapter_in_model(get_peft_config(copy.deepcopy(each)), model, name)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([name for name in settings if _holds(layer, name)])


def _holds(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, weights) for weights in layer.adapter_layer_names)


def as_json(value: Any) -> Any:
    """A field of a config of PEFT as JSON."""
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value
