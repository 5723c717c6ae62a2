"""The forms of a value model that share their decoder with others: a LoRA adapter and a head, or a head alone.

A shared decoder belongs to somebody else, a policy or its reference: its weights are neither copied nor saved, no
gradient reaches them, and outside of the value model's own forward nothing about it has changed. Adapters of
others on the same decoder are out of action during that forward.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lenvm_rl.modeling.adapters import adapted_layers, as_json, bare_model
from lenvm_rl.modeling.backbones import check_decoder, copy_decoder, load_decoder
from lenvm_rl.modeling.heads import Float32Module

FULL, ADAPTER, HEAD = FORMS = ("full", "adapter", "head")
ADAPTER_NAME = "length_value"

# Other starting weights are computed from the decoder's and change those.
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")
_UNSUPPORTED = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "use_dora")
SAME_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def check_form(form: str, lora: dict | None) -> None:
    """Raise a `ValueError` unless the form is known, and has settings of LoRA if and only if it is the adapter."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
    if (form == ADAPTER) != (lora is not None):
        raise ValueError(
            f"form={form!r} with lora={lora!r}: settings of LoRA belong to form='adapter' and nothing else."
        )


def lora_settings(lora: LoraConfig | dict | None = None) -> dict:
    """Settings of LoRA as JSON: those that differ from PEFT's defaults.

    Refused is what would change the shared decoder itself, or train more than low-rank updates of its layers.
    """
    if lora is None:
        lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    lora = lora if isinstance(lora, LoraConfig) else LoraConfig(**lora)
    wanted = [name for name in _UNSUPPORTED if getattr(lora, name)]
    wanted += ["bias"] if lora.bias != "none" else []
    if wanted or lora.init_lora_weights not in _HARMLESS_STARTS:
        wanted = wanted or [f"init_lora_weights={lora.init_lora_weights!r}"]
        raise ValueError(
            f"{', '.join(wanted)} of LoRA would change a decoder that is shared, or cannot be shared: leave it out, or "
            "make a model of its own with form='full'."
        )
    default = LoraConfig().to_dict()
    return {
        name: as_json(value)
        for name, value in lora.to_dict().items()
        if value != default[name] and name not in ("base_model_name_or_path", "peft_version", "task_type")
    }


def decoder_for(
    form: str,
    model_or_path: PreTrainedModel | str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    **load_kwargs: Any,
) -> PreTrainedModel:
    """The decoder of a new value model: its own, copied or loaded, or in the other forms one to share.

    Arguments as in [`~lenvm_rl.modeling.LengthValueModel.from_backbone`].
    """
    if form != FULL or isinstance(model_or_path, (str, os.PathLike)):
        return shared_decoder(model_or_path, dtype, **load_kwargs)
    if load_kwargs:
        raise ValueError(f"{sorted(load_kwargs)} say how to load a model, but a model was given: leave them out.")
    return copy_decoder(model_or_path, "float32" if dtype is None else dtype)


def shared_decoder(
    model_or_path: PreTrainedModel | str | os.PathLike, dtype: str | torch.dtype | None = None, **load_kwargs: Any
) -> PreTrainedModel:
    """The decoder of a model, with adapters or without, the very one and not a copy; or one loaded from a path.

    The other arguments are for a path alone: `dtype`, float32 by default, and more of `AutoModel.from_pretrained`.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        return load_decoder(model_or_path, "float32" if dtype is None else dtype, **load_kwargs)
    settings = [*load_kwargs, *([] if dtype is None else ["dtype"])]
    if settings:
        raise ValueError(f"{sorted(settings)} say how to load a model, but a model to share was given: leave them out.")
    model = bare_model(model_or_path)
    check_decoder(model, shared=True)
    return model.base_model


def check_same_architecture(config: PretrainedConfig, decoder: PreTrainedModel) -> None:
    """Raise a `ValueError` unless a decoder has the architecture that the model of a config was fitted on."""
    ours, theirs = (each.get_text_config(decoder=True).to_dict() for each in (config, decoder.config))
    differing = [
        f"{name} {ours.get(name)} there and {theirs.get(name)} here"
        for name in SAME_ARCHITECTURE
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(
            f"The value model was fitted on another base than this one ({'; '.join(differing)}): give the base "
            "that it was fitted on."
        )


class SharedDecoder:
    """A decoder that belongs to somebody else, seen through one's own adapter, or through none.

    The adapter's layers stand in the decoder only while it is looked at, in the places of those that they wrap, so that
    the owner finds, trains and saves what it always had. No module, so that nothing that is done to a value
    model (`train`, `freeze`, a cast) is done to the decoder.

    Args:
        decoder (`PreTrainedModel`): the decoder.
        lora (`dict`, *optional*): settings of the adapter, see [`lora_settings`]; without them, there is none.

    Attributes:
        adapter ([`~lenvm_rl.modeling.heads.Float32Module`] or `None`): the adapter's weights, under the names of
            the decoder's layers.
        lora (`dict` or `None`): the settings, `target_modules` being resolved.
        whole (`torch.nn.Module` or `None`): the model that the decoder is a part of, by way of which it is then run: an
            engine that holds weights in shards gathers them where it has been told to, from the outermost model in.
    """

    def __init__(self, decoder: PreTrainedModel, lora: dict | None = None):
        self.decoder = decoder
        self.adapter = self.lora = self.whole = None
        self._layers = {}
        if lora is not None:
            config = LoraConfig(**copy.deepcopy(lora))
            with _bare(decoder):
                self._layers = _wrapped_layers(decoder, config)
            self.lora = lora_settings(config)
            self.adapter = _weights_of(self._layers)

    @contextmanager
    def seen_alone(self) -> Iterator[PreTrainedModel]:
        """The decoder without dropout, gradients or adapters but one's own; afterwards, all is as it was before.

        With no adapter that learns, no gradient is kept, not even where the owner made the embeddings ask for one.

        An adapter that is merged into the decoder's weights, or a layer that was replaced, is a `ValueError`.
        """
        # A policy in the middle of a generation needs its own.
        offsets = vars(self.decoder).get("rope_deltas")
        still = _switched_off(self.decoder.modules(), "training")
        learns = self.adapter is not None and any(weight.requires_grad for weight in self.adapter.parameters())
        kept = nullcontext() if learns else torch.no_grad()
        with _bare(self.decoder), still, _switched_off(self.decoder.parameters(), "requires_grad"), kept:
            try:
                for path, layer in self._layers.items():
                    self._put(path, layer.base_layer, layer)
                yield self.decoder
            finally:
                for path, layer in self._layers.items():
                    if self.decoder.get_submodule(path) is layer:
                        self._put(path, layer, layer.base_layer)
                if "rope_deltas" in vars(self.decoder):
                    self.decoder.rope_deltas = offsets

    def run(self, **inputs: Any) -> Any:
        """The decoder's outputs, see `whole`; to be called while it is [`~SharedDecoder.seen_alone`]."""
        if self.whole is None:
            return self.decoder(**inputs)
        caught = []
        hook = self.decoder.register_forward_hook(lambda module, arguments, outputs: caught.append(outputs))
        # FSDP2 gathers weights again for the backward pass when it comes to what the outermost model has put out.
        if torch.is_grad_enabled():
            inputs = {**inputs, "output_hidden_states": True}
        try:
            whole = self.whole(**inputs, logits_to_keep=1)
        finally:
            hook.remove()
        (outputs,) = caught
        if whole.hidden_states is not None:
            outputs.last_hidden_state, outputs.hidden_states = whole.hidden_states[-1], whole.hidden_states
        return outputs

    def copy(self, dtype: str | torch.dtype) -> PreTrainedModel:
        """A decoder of one's own with what is seen here: the shared weights, and one's adapter merged into them."""
        with _bare(self.decoder), torch.no_grad():
            copied = copy_decoder(self.decoder, dtype)
            for path, layer in self._layers.items():
                weight = copied.get_submodule(path).weight
                weight += layer.get_delta_weight(ADAPTER_NAME).to(weight.dtype)
        return copied

    def _put(self, path, there, instead) -> None:
        parent, _, name = path.rpartition(".")
        siblings = self.decoder.get_submodule(parent)._modules
        if siblings[name] is not there:
            raise ValueError(
                f"The layer {path!r} of the shared base was replaced since the value model was made: make or "
                "load it again on the base as it is now."
            )
        siblings[name] = instead


@contextmanager
def _bare(decoder) -> Iterator[None]:
    """A decoder with the layers that adapters have been put around, in their places."""
    adapted = [*adapted_layers(decoder)]
    for _, _, layer in adapted:
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise ValueError(
                "An adapter is merged into the weights of the shared base, so another model's values would come out: "
                "unmerge it (`unmerge_adapter`) before asking for values."
            )
    try:
        for parent, name, layer in adapted:
            is_layer = isinstance(layer, BaseTunerLayer)
            parent._modules[name] = layer.get_base_layer() if is_layer else layer.original_module
        yield
    finally:
        for parent, name, layer in adapted:
            parent._modules[name] = layer


@contextmanager
def _switched_off(things, flag: str) -> Iterator[None]:
    """A flag of modules or parameters off where it is on."""
    on = [thing for thing in things if getattr(thing, flag)]
    try:
        for thing in on:
            setattr(thing, flag, False)
        yield
    finally:
        for thing in on:
            setattr(thing, flag, True)


def _wrapped_layers(decoder, config: LoraConfig) -> dict[str, LoraLayer]:
    """New LoRA layers around layers of a bare decoder, by path; the decoder itself is left as it was."""
    known = vars(decoder).pop("peft_config", None)
    layers = {}
    with _switched_off(decoder.parameters(), "requires_grad"):
        try:
            inject_adapter_in_model(config, decoder, ADAPTER_NAME)
        finally:
            layers = {path: each for path, each in decoder.named_modules() if isinstance(each, LoraLayer)}
            for path, layer in layers.items():
                parent, _, name = path.rpartition(".")
                decoder.get_submodule(parent)._modules[name] = layer.base_layer
            vars(decoder).pop("peft_config", None)
            if known is not None:
                decoder.peft_config = known
    unfit = [path for path, layer in layers.items() if ADAPTER_NAME not in layer.lora_A]
    if unfit:
        raise ValueError(
            f"An adapter on a shared base is on linear layers only, and {', '.join(unfit[:3])} is none: see "
            "`target_modules` of LoRA."
        )
    return layers


def _weights_of(layers: dict[str, LoraLayer]) -> Float32Module:
    """The modules of an adapter in a tree of their own, with the paths that they have in the decoder."""
    root = Float32Module()
    for path, layer in layers.items():
        place = root
        for part in path.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]
        for kind in ("lora_A", "lora_B", "lora_dropout"):
            place.add_module(kind, getattr(layer, kind)[ADAPTER_NAME])
    return root.to_float32()
