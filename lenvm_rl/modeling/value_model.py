"""What every value model here is: a decoder of any kind under a head that gives one float32 number at every position.

[`~lenvm_rl.modeling.LengthValueModel`] and [`~lenvm_rl.modeling.critic.TaskCritic`] are made of this: the heads, the
config that holds the decoder's, and the model with what is common in making, loading and running it.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lenvm_rl.modeling.backbones import cache_keyword, decoder_config_from_dict, load_model, save_code, with_code
from lenvm_rl.modeling.completions import position_ids_from_mask

_PICTURES = ("image_grid_thw", "video_grid_thw")


class Float32Module(nn.Module):
    """A module whose weights stay float32 when it, or a parent, is cast; to another device they follow."""

    def to_float32(self) -> Float32Module:
        """Cast whatever is of another dtype; weights without data (on the device "meta") are left."""
        return super()._apply(lambda weight: weight if weight.is_meta else weight.float())

    def _apply(self, fn, recurse=True):
        # `.to()`, `.half()`, `.bfloat16()` of any parent come through here: follow to the device, not to the dtype.
        def to_device_only(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(to_device_only, recurse)


class LengthValueHead(Float32Module):
    """`z = W2 SiLU(W1 h + b1) + b2` on the decoder's last hidden state h (arXiv 2604.27039, §3.1).

    Weights and arithmetic are float32 whatever the dtype of the decoder or of autocast, and stay so when the whole
    model is cast: with gamma near 1, one token more changes the logit by less than bfloat16 resolves.

    A new head says `z ≈ 0`, hence `V ≈ -1/2`, at every state. That is the middle of the range of the return and the
    steepest point of the sigmoid, so an error either way is corrected at the same speed. In tokens it is
    `ln 2 / -ln(gamma)`: 15 % of the length that gamma covers to 99 %. The last layer starts small (z spreads by about
    0.06 for hidden states of unit size) but not at zero, so that the decoder learns from the first step on.

    Args:
        hidden_size (`int`): size of h and of the layer between.
    """

    OUTPUT_SCALE = 0.1

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.output = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw starting weights as described above."""
        std = 1 / math.sqrt(self.hidden.in_features)
        nn.init.normal_(self.hidden.weight, std=std)
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.output.weight, std=self.OUTPUT_SCALE * std)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states `(…, H)` of any floating dtype to logits `(…)` in float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.output(nn.functional.silu(self.hidden(hidden_states.float()))).squeeze(-1)


class ScoreHead(Float32Module):
    """`v = w h + b`, float32: the head of a reward model, whose score of a whole text is read at its last token."""

    def __init__(self, hidden_size: int, bias: bool):
        super().__init__()
        self.output = nn.Linear(hidden_size, 1, bias=bias, dtype=torch.float32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states `(…, H)` of any floating dtype to values `(…)` in float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.output(hidden_states.float()).squeeze(-1)


class ValueModelConfig(PretrainedConfig):
    """What the configs of all value models hold.

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): the decoder's; no model can be made without it.
    """

    sub_configs = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config: PretrainedConfig | dict | None = None, **kwargs: Any):
        self.backbone_config = None
        super().__init__(**kwargs)
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
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args, **kwargs):
        """Load a model, in eval mode; see the classes for what they add.

        Raises:
            `FileNotFoundError`: the path does not exist.
            `ValueError`: weights are missing, which would be random; or other files than safetensors are asked for.
        """
        path = pretrained_model_name_or_path
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Only safetensors are loaded (other files can run code): drop `use_safetensors=False`.")
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
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """As for any model of transformers."""
        if is_main_process and "backbone" in self._modules:
            save_code(self.backbone, save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def _decode(
        self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, backbone_kwargs
    ):
        """The decoder's outputs, and how far its next position is ahead of the number of tokens `(B, 1)`, if it is one
        that places pictures on a grid and has just made its own positions."""
        cache = cache_keyword(self.backbone, past_key_values)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        position_ids = self._positions(inputs, attention_mask, position_ids, past_key_values, backbone_kwargs)
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **cache,
            **backbone_kwargs,
        )
        made_its_own = position_ids is None and self._places_on_grid
        return outputs, self.backbone.rope_deltas if made_its_own else None

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
