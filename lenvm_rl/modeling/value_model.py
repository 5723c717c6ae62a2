"""What every value model here is: a decoder of any kind under a head that gives one float32 number at every position.

[`~lenvm_rl.modeling.LengthValueModel`] and [`~lenvm_rl.modeling.critic.TaskCritic`] are made of this: the config that
holds the decoder's, and the model with what is common in making, loading and running it, its forms included
([`lenvm_rl.modeling.sharing`]).
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lenvm_rl.modeling.backbones import cache_keyword, decoder_config_from_dict, load_model, save_code, with_code
from lenvm_rl.modeling.completions import position_ids_from_mask
from lenvm_rl.modeling.heads import LengthValueHead, states_of_layers
from lenvm_rl.modeling.sharing import ADAPTER, FULL, SharedDecoder, check_form, check_same_architecture, shared_decoder

_PICTURES = ("image_grid_thw", "video_grid_thw")


class ValueModelConfig(PretrainedConfig):
    """What the configs of all value models hold.

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): the decoder's; no model can be made without it.
        form (`str`, *optional*, defaults to `"full"`): `"full"`: a decoder and a head; `"adapter"`: a LoRA adapter and
            a head on a base that is shared; `"head"`: a head alone on a base that is shared.
        lora (`dict`, *optional*): settings of the adapter, see [`~lenvm_rl.modeling.sharing.lora_settings`].
    """

    sub_configs = {"backbone_config": AutoConfig}
    # Layers of the decoder that the head reads, where a model has a choice: the last alone.
    layers = None

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict | None = None,
        form: str = FULL,
        lora: dict | None = None,
        **kwargs: Any,
    ):
        self.backbone_config = None
        super().__init__(**kwargs)
        check_form(form, lora)
        self.form, self.lora = form, lora
        # Set only now: the inherited method hands its own settings to every sub-configuration, so the decoder's choice
        # of attention would be lost, and a model would compute otherwise before saving than after loading.
        if isinstance(backbone_config, dict):
            backbone_config = decoder_config_from_dict(backbone_config)
        self.backbone_config = backbone_config
        if "attn_implementation" in kwargs:
            self._attn_implementation = kwargs["attn_implementation"]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The decoder's text configuration, where generic code looks for the hidden size, the vocabulary and the like.

        (The inherited method would take a field called `generator` for a sub-configuration.)
        """
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


class _Uncopied:
    """A model on its way through `from_pretrained`, which makes a deep copy of its arguments to read a config."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __deepcopy__(self, memo: dict) -> _Uncopied:
        return self


class ValueModel(PreTrainedModel):
    """A decoder, `backbone`, and a `head` on its last hidden state; no language-model head.

    Saved and loaded like any model of transformers, only as safetensors and never with weights missing. A decoder
    whose code came with its weights is saved with that code.
    """

    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["head.hidden", "head.output"]
    # Which attention implementations work is for the decoder to say, which checks for itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # The decoder of somebody else, in the forms that have none of their own.
    _shared = None

    def _share(self, base) -> None:
        """Take a decoder that belongs to somebody else as `backbone`, in the forms that have none of their own."""
        form = self.config.form
        if form == FULL:
            raise ValueError("A model of form='full' has a decoder of its own and takes no `base`: leave it out.")
        if base is None:
            raise ValueError(
                f"A {type(self).__name__} of form={form!r} holds no decoder: give the one that it was fitted on, "
                f"`{type(self).__name__}.from_pretrained(path, base=model_or_path)`."
            )
        base = base.model if isinstance(base, _Uncopied) else base
        check_same_architecture(self.config, base)
        self._shared = SharedDecoder(base, self.config.lora)
        self.config.lora = self._shared.lora
        if form == ADAPTER:
            self.adapter = self._shared.adapter
        # Not registered: the base is not saved, trained, frozen or cast with this model.
        object.__setattr__(self, "backbone", base)
        # Recomputed in the backward pass, a layer would have the adapters of that moment.
        self.supports_gradient_checkpointing = False

    def run_by(self, whole: nn.Module) -> None:
        """Run a shared decoder by way of the model that it is a part of, whose weights are held in shards."""
        self._shared.whole = whole

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = self.head.output.weight.device
        moves = self._shared is not None and self._shared.whole is None
        if moves and device.type != "meta" and device != self.backbone.device:
            self.backbone.to(device)
        return self

    def _complete(self, given: bool) -> None:
        """What follows when decoder and head are there. If the decoder was given, no weight is drawn: initialisation
        spares only modules that carry its mark, and a layer that was replaced in that decoder would be drawn anew."""
        with no_init_weights() if given else nullcontext():
            self.post_init()

    def _init_weights(self, module):
        # Asked about its layers: outside of transformers, modules without weights of their own are never passed here.
        if isinstance(self.head, LengthValueHead) and module in (self.head.hidden, self.head.output):
            self.head.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        base: PreTrainedModel | str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        """Load a model, in eval mode; see the classes for what they add.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder that `save_pretrained` wrote, or a hub id.
            base (`PreTrainedModel`, `peft.PeftModel`, `str` or `os.PathLike`, *optional*): for the forms `"adapter"`
                and `"head"`: the model that they were fitted on, whose decoder is shared and not copied, with its
                adapters if it has any; or where to load it from.
            kwargs: as for any model of transformers.

        Raises:
            `FileNotFoundError`: the path does not exist.
            `ValueError`: weights are missing, which would be random; or other files than safetensors are asked for.
        """
        path = pretrained_model_name_or_path
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Only safetensors are loaded (other files can run code): drop `use_safetensors=False`.")
        if base is not None:
            settings = {name: kwargs.pop(name) for name in ("dtype", "attn_implementation") if name in kwargs}
            kwargs["base"] = base = _Uncopied(shared_decoder(base, **settings))
        kwargs = load_model(partial(with_code, cls.config_class), path, kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.update(use_safetensors=True, output_loading_info=True)
        model, info = load_model(super().from_pretrained, path, *model_args, **kwargs)
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if lacking:
            raise ValueError(
                f"The model at '{path}' lacks weights, which would be random: {', '.join(lacking[:6])}. Save it again "
                f"with `save_pretrained`, or make a new one with `{cls.__name__}.from_backbone`."
            )
        if base is not None:
            model.to(model.backbone.device)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """As for any model of transformers; a base that is shared is not saved."""
        if is_main_process and "backbone" in self._modules:
            save_code(self.backbone, save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head reads of the decoder at ids `(B, S)`: its last hidden states `(B, S, H)`, or those of
        `config.layers` side by side. Arguments as of the model."""
        return self._decode(input_ids, attention_mask, position_ids, None, None, False, {})[0]

    def _decode(
        self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, backbone_kwargs
    ):
        """What the head reads, the decoder's outputs, and how far its next position is ahead of the number of tokens
        `(B, 1)`, if it is one that places pictures on a grid and has just made its own positions."""
        layers = self.config.layers
        if layers is not None:
            backbone_kwargs = {**backbone_kwargs, "output_hidden_states": True}
        cache = cache_keyword(self.backbone, past_key_values)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        position_ids = self._positions(inputs, attention_mask, position_ids, past_key_values, backbone_kwargs)
        shared = self._shared
        with nullcontext() if shared is None else shared.seen_alone():
            outputs = (self.backbone if shared is None else shared.run)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **cache,
                **backbone_kwargs,
            )
            made_its_own = position_ids is None and self._places_on_grid
            read = outputs.last_hidden_state if layers is None else states_of_layers(outputs.hidden_states, layers)
            return read, outputs, self.backbone.rope_deltas if made_its_own else None

    @property
    def _places_on_grid(self) -> bool:
        return hasattr(self.backbone, "get_rope_index")

    def _positions(self, inputs, attention_mask, position_ids, past_key_values, backbone_kwargs):
        """Position ids `(B, S)`: the caller's, or counted from the mask; `None` where the decoder makes its own; and
        `(4, B, S)` for text without a mask in a decoder with multimodal positions, which keeps packed sequences apart.
        """
        cached = past_key_values is not None and past_key_values.get_seq_length() > 0
        if self._places_on_grid and position_ids is None:
            if any(backbone_kwargs.get(name) is not None for name in _PICTURES):
                _check_pictures(inputs, cached, backbone_kwargs)
                return None
            if cached:
                raise ValueError(
                    "With a cache, positions after a picture cannot be counted from the mask: give `position_ids`, the "
                    "number of tokens before plus the output's `rope_deltas` (0 without pictures)."
                )
            if attention_mask is None:
                position_ids = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])
        if position_ids is None and attention_mask is not None:
            position_ids = position_ids_from_mask(attention_mask)[:, -inputs.shape[1] :]
        if self._places_on_grid and attention_mask is None and past_key_values is None and position_ids.ndim == 2:
            return position_ids.expand(4, *position_ids.shape)
        return position_ids


def _check_pictures(inputs, cached, backbone_kwargs) -> None:
    if inputs.is_floating_point() or backbone_kwargs.get("mm_token_type_ids") is None:
        raise ValueError(
            "A picture's place is found in `input_ids` and `mm_token_type_ids`: give the model everything that the "
            "processor returns."
        )
    if cached:
        raise ValueError("Pictures come with the prompt, and not after a cache: give the whole sequence.")
