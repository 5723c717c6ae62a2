"""The length value model: any decoder of transformers with a head that says how much of a completion is to come.

The value at a token is `V = -sigmoid(z)`, an estimate of the return `G = -(1 - gamma^n)`, where n tokens follow, the
end of sequence counted: 0 is the end itself, -1 is infinitely far from it (arXiv 2604.27039, §3.1). The config, written
beside the weights, says what the values mean: gamma, and what the model was fitted on.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModel, Cache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.modeling.backbones import (
    cache_of,
    check_causal,
    copy_decoder,
    decoder_from_config,
    fitting_fingerprint,
    load_model,
    shared_config,
)
from lenvm_rl.modeling.card import write_model_card
from lenvm_rl.modeling.heads import LengthValueHead, check_layers
from lenvm_rl.modeling.sharing import ADAPTER, FULL, HEAD, check_form, decoder_for, lora_settings
from lenvm_rl.modeling.value_model import ValueModel, ValueModelConfig

HOW_TO_ADD_GAMMA = (
    "If a model's config lacks it and you know it: `LengthValueModel.from_pretrained(path, "
    "config=LengthValueConfig.from_pretrained(path, gamma=…))`, then `save_pretrained`."
)


class LengthValueConfig(ValueModelConfig):
    """Configuration of a [`LengthValueModel`]: its decoder, and what its values mean.

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): the decoder's. No model can be made without it.
        gamma (`float`, *optional*): discount of the length return, in (0, 1). It belongs to the weights: a value says
            nothing without it, so no model can be made or loaded without it.
        gamma_fit (`dict`, *optional*): what gamma was fitted on (quantile, coverage, number of lengths …): free form.
        tokenizer_fingerprint (`dict`, *optional*): see [`~lenvm_rl.tokenization.tokenizer_fingerprint`]. Without it, no
            policy can be compared with it.
        generator (`str`, *optional*): the policy whose completions the model was fitted on.
        truncated_share (`float`, *optional*): share of those completions that were cut before their end, in [0, 1].
        sampling (`dict`, *optional*): the settings that those completions were sampled with: free form.
        metrics (`dict`, *optional*): what the model reached, for its card: `{domain: {metric: number}}`.
        layers (list of `int`, *optional*): for form="head": the layers of the decoder whose hidden states the head
            reads, see [`~lenvm_rl.modeling.heads.check_layers`]. By default the last.
        form, lora: see [`~lenvm_rl.modeling.value_model.ValueModelConfig`].

    Raises:
        `ValueError`: gamma is not in (0, 1), there is no such form, transformers does not know the decoder's type, or
            the model was fitted to another target than the return (a retired ablation).
    """

    model_type = "length_value"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict | None = None,
        gamma: float | None = None,
        gamma_fit: dict | None = None,
        tokenizer_fingerprint: dict | None = None,
        generator: str | None = None,
        truncated_share: float | None = None,
        sampling: dict | None = None,
        metrics: dict | None = None,
        layers: list[int] | None = None,
        form: str = FULL,
        lora: dict | None = None,
        **kwargs: Any,
    ):
        # Models of earlier versions say what they were fitted to.
        target, _ = kwargs.pop("target", "return"), kwargs.pop("target_scale", None)
        if target != "return":
            raise ValueError(
                f"This model was fitted to target={target!r}, an ablation that has no values: pretrain one on the "
                "length return."
            )
        super().__init__(backbone_config, form, lora, **kwargs)
        self.gamma = None if gamma is None else checked_gamma(gamma)
        self.gamma_fit = gamma_fit
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.generator = generator
        self.truncated_share = truncated_share
        self.sampling = sampling
        self.metrics = metrics
        if layers is not None and form != HEAD:
            raise ValueError(f"layers are for form='head', whose decoder does not learn, not for form={form!r}.")
        # A config without a decoder is asked for by transformers itself, for the differences to the defaults.
        text = self.get_text_config(decoder=True)
        self.layers = layers if self.backbone_config is None else check_layers(layers, text.num_hidden_layers)


def checked_gamma(gamma: float) -> float:
    """Gamma as a float; a `ValueError` unless it is a number strictly between 0 and 1."""
    if isinstance(gamma, numbers.Real) and not isinstance(gamma, bool) and 0 < float(gamma) < 1:
        return float(gamma)
    raise ValueError(
        f"gamma is {gamma!r}, but the discount of the length return is a number strictly between 0 and 1: fit it to "
        "the lengths of the rollouts with `lenvm_rl.returns.fit_gamma`."
    )


def check_complete(config: LengthValueConfig) -> None:
    """Raise a `ValueError` unless a model can be made from the config: with a decoder, a gamma and a known form."""
    if config.backbone_config is None:
        raise ValueError(
            "The config has no `backbone_config`, so this is not a length value model. To make one from a decoder, use "
            "`LengthValueModel.from_backbone(model_or_path, gamma=…)`."
        )
    if config.gamma is None:
        raise ValueError(
            "The config has no gamma, and values mean nothing without the discount that they were fitted with. "
            + HOW_TO_ADD_GAMMA
        )
    checked_gamma(config.gamma)
    check_form(config.form, config.lora)


class LengthValueOutput(NamedTuple):
    """What a [`LengthValueModel`] says about a batch, in float32.

    A tuple, not a `ModelOutput`: that is a dictionary, and a field called `values` would hide its method, which tree
    utilities of torch (and so DDP and FSDP) call.

    Args:
        logits (`torch.FloatTensor` of shape `(B, S)`): the head's output z. Remaining length is read off it, never off
            the value: `n = -softplus(z) / ln(gamma)`.
        values (`torch.FloatTensor` of shape `(B, S)`): `-sigmoid(z)`, in (-1, 0): the value of the state that ends in
            the token at this position.
        past_key_values (`Cache`, *optional*): the decoder's cache, if `use_cache=True` was given.
        rope_deltas (`torch.LongTensor` of shape `(B, 1)`, *optional*): with pictures, in a decoder that places them on
            a grid: how far the next position is ahead of the number of tokens.
    """

    logits: torch.FloatTensor
    values: torch.FloatTensor
    past_key_values: object | None = None
    rope_deltas: torch.LongTensor | None = None


class LengthValueModel(ValueModel):
    """A decoder with a [`LengthValueHead`] on its last hidden state, and no language-model head.

    Made by [`~LengthValueModel.from_backbone`]; saved and loaded like any model of transformers, also through
    `AutoModel.from_pretrained` once this module is imported.

    Args:
        config ([`LengthValueConfig`]): with `backbone_config` and `gamma`.
        backbone (`PreTrainedModel`, *optional*): the decoder to use, as it is. Without it, one with random weights is
            made from `config.backbone_config`.
        base (`PreTrainedModel`, *optional*): for the forms `"adapter"` and `"head"`: the decoder to share. It is
            `.backbone`, but none of its weights are among the model's parameters, and nothing but a change of device
            reaches it.

    Raises:
        `ValueError`: the config has no decoder or no gamma, or its form needs a base and there is none.
    """

    config_class = LengthValueConfig
    model_tags = ["length-value-model"]
    # Sharding then wraps the head apart from the decoder, whose dtype may be another.
    _no_split_modules = ["LengthValueHead"]

    _frozen = False

    def __init__(
        self, config: LengthValueConfig, backbone: PreTrainedModel | None = None, base: PreTrainedModel | None = None
    ):
        check_complete(config)
        super().__init__(config)
        if config.form != FULL or base is not None:
            self._share(base)
        else:
            self.backbone = decoder_from_config(config.backbone_config) if backbone is None else backbone
        hidden_size = config.get_text_config(decoder=True).hidden_size
        self.head = LengthValueHead(hidden_size, hidden_size * len(config.layers or [None]))
        self._complete(given=backbone is not None or base is not None)

    @classmethod
    def from_backbone(
        cls,
        model_or_path: PreTrainedModel | str | os.PathLike,
        gamma: float,
        tokenizer: PreTrainedTokenizerBase | None = None,
        gamma_fit: dict | None = None,
        generator: str | None = None,
        truncated_share: float | None = None,
        dtype: str | torch.dtype | None = None,
        sampling: dict | None = None,
        form: str = FULL,
        lora: LoraConfig | dict | None = None,
        layers: list[int] | None = None,
        **load_kwargs: Any,
    ) -> LengthValueModel:
        """A length value model to be trained: the decoder of an existing model under a new head.

        Args:
            model_or_path (`PreTrainedModel` or `str` or `os.PathLike`): a causal language model or bare decoder; or a
                folder or hub id to load the decoder from (only safetensors). A language-model head is left behind. For
                form="full", the weights of a model are copied, and it is left as it was; in the other forms its decoder
                is shared, and may have adapters.
            gamma (`float`): discount of the length return: fit it to the rollouts with `lenvm_rl.returns.fit_gamma`.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the rollouts'. The config keeps its fingerprint, without
                which no policy can be checked.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): of a decoder that is copied or loaded,
                float32 because training comes next. Head and adapter are float32 in any case.
            gamma_fit, generator, truncated_share, sampling, form, layers: for the config, see [`LengthValueConfig`].
            lora (`peft.LoraConfig` or `dict`, *optional*): the adapter, for form="adapter"; see
                [`~lenvm_rl.modeling.sharing.lora_settings`].
            load_kwargs: further arguments of `AutoModel.from_pretrained`, for a path.

        Returns:
            [`LengthValueModel`]: in eval mode, with every parameter trainable.

        Raises:
            `FileNotFoundError`: the path does not exist.
            `ValueError`: gamma is not in (0, 1), the tokenizer has ids that the decoder lacks, or the model is no
                plain causal decoder, see [`~lenvm_rl.modeling.backbones.check_decoder`] and `check_causal` there.
        """
        gamma = checked_gamma(gamma)
        backbone = decoder_for(form, model_or_path, dtype, **load_kwargs)
        check_causal(backbone)
        config = cls.config_class(
            backbone_config=backbone.config if form == FULL else shared_config(backbone),
            gamma=gamma,
            gamma_fit=gamma_fit,
            tokenizer_fingerprint=fitting_fingerprint(tokenizer, backbone),
            generator=generator,
            truncated_share=truncated_share,
            sampling=sampling,
            layers=layers,
            form=form,
            lora=lora_settings(lora) if form == ADAPTER or lora is not None else None,
            dtype=backbone.dtype if form == FULL else torch.float32,
        )
        return cls(config, **{"backbone" if form == FULL else "base": backbone}).to(backbone.device).eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        base: PreTrainedModel | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> LengthValueModel:
        """Load a length value model: `PreTrainedModel.from_pretrained` without guessing, and only from safetensors.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder that `save_pretrained` wrote, or a hub id.
            base (`PreTrainedModel`, `peft.PeftModel`, `str` or `os.PathLike`, *optional*): for the forms `"adapter"`
                and `"head"`: the model that they were fitted on, whose decoder is shared and not copied, with its
                adapters if it has any; or where to load it from.
            kwargs: as for any model of transformers. `dtype` is the decoder's; head and adapter are float32 in any
                case. `trust_remote_code=True` runs the code of a decoder that came with its own.

        Returns:
            [`LengthValueModel`]: in eval mode.

        Raises:
            `FileNotFoundError`: the path does not exist.
            `ValueError`: what is there is not a length value model, has no gamma, or lacks weights, which would be
                random; or gamma is given here, though it belongs to the weights.
        """
        if "gamma" in kwargs:
            raise ValueError(f"gamma belongs to the weights and is read from the model's config. {HOW_TO_ADD_GAMMA}")
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, base=base, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As for any model of transformers, with a model card; a base that is shared is not saved."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_model_card(save_directory, self.config)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # The way of everything to the hub; what transformers has put there by now is a card that says nothing.
        write_model_card(working_dir, self.config, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @property
    def frozen(self) -> bool:
        """Whether [`~LengthValueModel.freeze`] was called."""
        return self._frozen

    def freeze(self) -> LengthValueModel:
        """For good: no parameter takes a gradient, and `train()`, even of a parent, leaves the model in eval mode."""
        self._frozen = True
        return self.requires_grad_(False).eval()

    @contextmanager
    def thawed(self) -> Iterator[LengthValueModel]:
        """For a re-fit: inside, every parameter takes a gradient (a shared base has none of them); afterwards, none.

        The model stays in eval mode, so dropout stays off.
        """
        frozen = self._frozen
        self._frozen = False
        self.requires_grad_(True)
        try:
            yield self
        finally:
            self._frozen = frozen
            if frozen:
                self.requires_grad_(False)

    def train(self, mode: bool = True) -> LengthValueModel:
        """As for any module, but a frozen model stays in eval mode."""
        return super().train(mode and not self._frozen)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool = False,
        hidden_states: torch.FloatTensor | None = None,
        **backbone_kwargs: Any,
    ) -> LengthValueOutput:
        """Logit and value at every position.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): exactly one of these and `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*): `(B, S)`, or `(B, past + S)` with a cache: 1 for tokens, 0 for
                padding on either side. A mask of any other shape needs `position_ids`.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): by default counted from the first unmasked
                token, so that padding on either side gives the values of the sequence alone, or made by a decoder that
                sees pictures. For packed sequences, give them and no mask.
            past_key_values (`Cache`, *optional*): the decoder's cache of the tokens before; a `ValueError` if it holds
                a recurrent state.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, H)`, *optional*): embedded tokens.
            use_cache (`bool`, *optional*, defaults to `False`): whether to return the cache, with these tokens added.
            hidden_states (`torch.FloatTensor` of shape `(B, S, H)`, *optional*): for a head alone, in the place of all
                above, see [`~LengthValueModel.from_hidden_states`].
            backbone_kwargs: further arguments of the decoder: for pictures, all else that the processor returns.

        Returns:
            [`LengthValueOutput`]: what stands at masked positions means nothing.
        """
        if hidden_states is not None:
            return self.from_hidden_states(hidden_states)
        hidden_states, outputs, deltas = self._decode(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, backbone_kwargs
        )
        return self._output(hidden_states, cache_of(self.backbone, outputs) if use_cache else None, deltas)

    def copied_decoder(self, dtype: str | torch.dtype) -> PreTrainedModel:
        """A decoder of the caller's own, with this model's weights and its adapter, if any, merged into them."""
        return copy_decoder(self.backbone, dtype) if self._shared is None else self._shared.copy(dtype)

    def from_hidden_states(self, hidden_states: torch.FloatTensor) -> LengthValueOutput:
        """What a head alone says about hidden states that another forward has computed, such as a reference's.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, S, H)`): the base's last hidden state, after its final norm
                and with no adapter active (`output_hidden_states=True` gives it as `hidden_states[-1]`); of a head that
                reads several layers, what [`~LengthValueModel.hidden_states`] gives. No gradient goes back through it.
        """
        if self.config.form != HEAD:
            raise ValueError(
                f"Only a head alone reads hidden states of others; this model is of form={self.config.form!r}, whose "
                "hidden states are its own: call it with `input_ids`."
            )
        return self._output(hidden_states.detach())

    def _output(self, hidden_states, cache=None, rope_deltas=None):
        logits = self.head(hidden_states)
        return LengthValueOutput(logits, -torch.sigmoid(logits), cache, rope_deltas)


def is_shared(model_or_path: PreTrainedModel | str | os.PathLike) -> bool:
    """Whether a length value model, or the one at a path, is of a form that shares its decoder."""
    if isinstance(model_or_path, (str, os.PathLike)):
        return load_model(LengthValueConfig.from_pretrained, model_or_path).form != FULL
    return isinstance(model_or_path, LengthValueModel) and model_or_path.config.form != FULL


AutoConfig.register(LengthValueConfig.model_type, LengthValueConfig, exist_ok=True)
AutoModel.register(LengthValueConfig, LengthValueModel, exist_ok=True)
