"""The length value model: any decoder of transformers with a head that says how much of a completion is to come.

The value at a token is `V = -sigmoid(z)`, an estimate of the return `G = -(1 - gamma^n)`, where n tokens follow, the
end of sequence counted: 0 is the end itself, -1 is infinitely far from it (arXiv 2604.27039, §3.1).
"""

import numbers
import os
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lenvm_rl.backbones import (
    cache_of,
    check_tokenizer_fits,
    copy_decoder,
    decoder_config_from_dict,
    load_decoder,
    load_model,
)
from lenvm_rl.completions import bootstrap_values, completion_logits, position_ids_from_mask
from lenvm_rl.heads import LengthValueHead
from lenvm_rl.tokenization import tokenizer_fingerprint as fingerprint_of

__all__ = [
    "LengthValueConfig",
    "LengthValueHead",
    "LengthValueModel",
    "LengthValueOutput",
    "bootstrap_values",
    "completion_logits",
    "position_ids_from_mask",
]


class LengthValueConfig(PretrainedConfig):
    """Configuration of a [`LengthValueModel`]: its decoder, and what its values mean.

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of the decoder. No model can be made without it.
        gamma (`float`, *optional*):
            Discount of the length return, in (0, 1). It belongs to the weights: a value says nothing without it, so no
            model can be made or loaded without it.
        gamma_fit (`dict`, *optional*):
            What gamma was fitted on (quantile, coverage, number of lengths …): free form, JSON.
        tokenizer_fingerprint (`dict`, *optional*):
            See [`~lenvm_rl.tokenization.tokenizer_fingerprint`]. Without it, no policy can be compared with it.
        generator (`str`, *optional*):
            The policy whose completions the model was fitted on.
        truncated_share (`float`, *optional*):
            Share of those completions that were cut before their end, in [0, 1].

    Raises:
        `ValueError`: gamma is not a number strictly between 0 and 1, or transformers does not know the decoder's type.
    """

    model_type = "length_value"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        backbone_config=None,
        gamma=None,
        gamma_fit=None,
        tokenizer_fingerprint=None,
        generator=None,
        truncated_share=None,
        **kwargs,
    ):
        self.backbone_config = None
        super().__init__(**kwargs)
        # Set only now: the inherited method hands its own settings to every sub-configuration, so the decoder's choice
        # of attention would be lost, and a model would compute otherwise before saving than after loading.
        if isinstance(backbone_config, dict):
            backbone_config = decoder_config_from_dict(backbone_config)
        self.backbone_config = backbone_config
        if "attn_implementation" in kwargs:
            self._attn_implementation = kwargs["attn_implementation"]
        self.gamma = None if gamma is None else _checked_gamma(gamma)
        self.gamma_fit = gamma_fit
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.generator = generator
        self.truncated_share = truncated_share

    def get_text_config(self, decoder=None, encoder=None):
        """The decoder's text configuration, where generic code looks for the hidden size, the vocabulary and the like.

        (The inherited method would take the field `generator` for a sub-configuration.)
        """
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


class LengthValueOutput(NamedTuple):
    """What a [`LengthValueModel`] says about a batch, in float32.

    A tuple, not a `ModelOutput`: that is a dictionary, and a field called `values` would hide its method, which tree
    utilities of torch (and so DDP and FSDP) call.

    Args:
        logits (`torch.FloatTensor` of shape `(B, S)`):
            The head's output z. Remaining length is read off it, never off the value: `n = -softplus(z) / ln(gamma)`.
        values (`torch.FloatTensor` of shape `(B, S)`):
            `-sigmoid(z)`, in (-1, 0): the value of the state that ends in the token at this position.
        past_key_values (`Cache`, *optional*):
            The decoder's cache, if `use_cache=True` was given.
    """

    logits: torch.FloatTensor
    values: torch.FloatTensor
    past_key_values: object | None = None


class LengthValueModel(PreTrainedModel):
    """A decoder with a [`LengthValueHead`] on its last hidden state, and no language-model head.

    Made by [`~LengthValueModel.from_backbone`]; saved and loaded like any model of transformers, also through
    `AutoModel.from_pretrained` once this module is imported.

    Args:
        config ([`LengthValueConfig`]):
            With `backbone_config` and `gamma`.
        backbone (`PreTrainedModel`, *optional*):
            The decoder to use, as it is. Without it, one with random weights is made from `config.backbone_config`.

    Raises:
        `ValueError`: the config has no decoder or no gamma.
    """

    config_class = LengthValueConfig
    base_model_prefix = "backbone"
    model_tags = ["length-value-model"]
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["head.hidden", "head.output"]
    # Sharding then wraps the head apart from the decoder, whose dtype may be another.
    _no_split_modules = ["LengthValueHead"]
    # Which attention implementations work is for the decoder to say, which checks for itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    _frozen = False

    def __init__(self, config: LengthValueConfig, backbone: PreTrainedModel | None = None):
        _check_complete(config)
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.head = LengthValueHead(config.get_text_config(decoder=True).hidden_size)
        if backbone is None:
            self.post_init()
        else:
            # Initialisation spares only modules that carry its mark: a layer that was replaced in the given decoder
            # would be drawn anew.
            with no_init_weights():
                self.post_init()

    def _init_weights(self, module):
        # Asked about its layers: outside of transformers, modules without weights of their own are never passed here.
        if module in (self.head.hidden, self.head.output):
            self.head.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_backbone(
        cls,
        model_or_path,
        gamma,
        tokenizer=None,
        gamma_fit=None,
        generator=None,
        truncated_share=None,
        dtype="float32",
        **load_kwargs,
    ) -> "LengthValueModel":
        """A length value model to be trained: the decoder of an existing model under a new head.

        Args:
            model_or_path (`PreTrainedModel` or `str` or `os.PathLike`):
                A causal language model or bare decoder, whose weights are copied and which is left as it was; or a
                folder or hub id to load the decoder from (only safetensors). A language-model head is left behind.
            gamma (`float`):
                Discount of the length return, in (0, 1): fit it to the rollouts with `lenvm_rl.returns.fit_gamma`.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                The tokenizer of the rollouts, whose fingerprint the config keeps. Without it, no policy can be checked
                against the model.
            gamma_fit (`dict`, *optional*):
                What gamma was fitted on, see [`LengthValueConfig`].
            generator (`str`, *optional*):
                The policy whose completions the model will be fitted on.
            truncated_share (`float`, *optional*):
                Share of those completions that were cut before their end.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
                Dtype of the decoder: float32, because training comes next. The head is float32 in any case.
            load_kwargs:
                Further arguments of `AutoModel.from_pretrained`, for a path.

        Returns:
            [`LengthValueModel`]: in eval mode, with every parameter trainable.

        Raises:
            `FileNotFoundError`: the path does not exist.
            `ValueError`: gamma is not in (0, 1); the tokenizer's pad and end tokens are one, or it has ids that the
                decoder lacks; the model is a length value model, has adapters, or is no plain decoder.
        """
        gamma = _checked_gamma(gamma)
        if isinstance(model_or_path, (str, os.PathLike)):
            backbone = load_decoder(model_or_path, dtype, **load_kwargs)
        elif load_kwargs:
            raise ValueError(f"{sorted(load_kwargs)} say how to load a model, but a model was given: leave them out.")
        else:
            backbone = copy_decoder(model_or_path, dtype)
        if tokenizer is not None:
            check_tokenizer_fits(tokenizer, backbone)
        config = cls.config_class(
            backbone_config=backbone.config,
            gamma=gamma,
            gamma_fit=gamma_fit,
            tokenizer_fingerprint=None if tokenizer is None else fingerprint_of(tokenizer),
            generator=generator,
            truncated_share=truncated_share,
            dtype=backbone.dtype,
        )
        return cls(config, backbone=backbone).to(backbone.device).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a length value model: `PreTrainedModel.from_pretrained` without guessing, and only from safetensors.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder written by `save_pretrained`, or a hub id.
            kwargs:
                As for any model of transformers. `dtype` is the decoder's; the head is float32 in any case.

        Returns:
            [`LengthValueModel`]: in eval mode.

        Raises:
            `FileNotFoundError`: the path does not exist.
            `ValueError`: what is there is not a length value model, has no gamma, or lacks weights, which would be
                random; or gamma is given here, though it belongs to the weights.
        """
        if "gamma" in kwargs:
            raise ValueError(f"gamma belongs to the weights and is read from the model's config. {_HOW_TO_ADD_GAMMA}")
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Only safetensors are loaded (other files can run code): drop `use_safetensors=False`.")
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.update(use_safetensors=True, output_loading_info=True)
        model, info = load_model(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if lacking:
            raise ValueError(
                f"The model at '{pretrained_model_name_or_path}' lacks weights, which would be random: "
                f"{', '.join(lacking[:6])}. Save it again with `save_pretrained`, or put a new head on a decoder with "
                "`LengthValueModel.from_backbone(path, gamma=…)`."
            )
        return (model, info) if with_info else model

    @property
    def frozen(self) -> bool:
        """Whether [`~LengthValueModel.freeze`] was called."""
        return self._frozen

    def freeze(self) -> "LengthValueModel":
        """For good: no parameter takes a gradient, and `train()`, even of a parent, leaves the model in eval mode."""
        self._frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LengthValueModel":
        """As for any module, but a frozen model stays in eval mode."""
        return super().train(mode and not self._frozen)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool = False,
        **backbone_kwargs,
    ) -> LengthValueOutput:
        """Logit and value at every position.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Token ids; exactly one of these and `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*):
                `(B, S)`, or `(B, past + S)` with a cache: 1 for tokens, 0 for padding on either side. A mask of any
                other shape needs `position_ids`.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                By default counted from the first unmasked token, so that padding on either side gives the values of
                the sequence alone. For packed sequences, give them and no mask.
            past_key_values (`Cache`, *optional*):
                The decoder's cache of the tokens before.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, H)`, *optional*):
                Embedded tokens.
            use_cache (`bool`, *optional*, defaults to `False`):
                Whether to return the cache, with these tokens added.
            backbone_kwargs:
                Further arguments of the decoder.

        Returns:
            [`LengthValueOutput`]: what stands at masked positions means nothing.
        """
        if position_ids is None and attention_mask is not None:
            inputs = input_ids if inputs_embeds is None else inputs_embeds
            position_ids = position_ids_from_mask(attention_mask)[:, -inputs.shape[1] :]
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **backbone_kwargs,
        )
        logits = self.head(outputs.last_hidden_state)
        cache = cache_of(self.backbone, outputs) if use_cache else None
        return LengthValueOutput(logits=logits, values=-torch.sigmoid(logits), past_key_values=cache)


_HOW_TO_ADD_GAMMA = (
    "If a model's config lacks it and you know it: `LengthValueModel.from_pretrained(path, "
    "config=LengthValueConfig.from_pretrained(path, gamma=…))`, then `save_pretrained`."
)


def _checked_gamma(gamma) -> float:
    if isinstance(gamma, numbers.Real) and not isinstance(gamma, bool) and 0 < float(gamma) < 1:
        return float(gamma)
    raise ValueError(
        f"gamma is {gamma!r}, but the discount of the length return is a number strictly between 0 and 1: fit it to "
        "the lengths of the rollouts with `lenvm_rl.returns.fit_gamma`."
    )


def _check_complete(config) -> None:
    if config.backbone_config is None:
        raise ValueError(
            "The config has no `backbone_config`, so this is not a length value model. To make one from a decoder, use "
            "`LengthValueModel.from_backbone(model_or_path, gamma=…)`."
        )
    if config.gamma is None:
        raise ValueError(
            "The config has no gamma, and values mean nothing without the discount that they were fitted with. "
            + _HOW_TO_ADD_GAMMA
        )
    _checked_gamma(config.gamma)


AutoConfig.register(LengthValueConfig.model_type, LengthValueConfig, exist_ok=True)
AutoModel.register(LengthValueConfig, LengthValueModel, exist_ok=True)
