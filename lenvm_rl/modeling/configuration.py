"""What a length value model is made of and what its values mean: the part of it that is written in `config.json`."""

from __future__ import annotations

import numbers
from typing import Any

from transformers import PretrainedConfig

from lenvm_rl.modeling.sharing import FULL, check_form
from lenvm_rl.modeling.value_model import ValueModelConfig

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
        form (`str`, *optional*, defaults to `"full"`): `"full"`: a decoder and a head; `"adapter"`: a LoRA adapter and
            a head on a base that is shared; `"head"`: a head alone on a base that is shared.
        lora (`dict`, *optional*): settings of the adapter, see [`~lenvm_rl.modeling.sharing.lora_settings`].

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
        super().__init__(backbone_config, **kwargs)
        self.gamma = None if gamma is None else checked_gamma(gamma)
        self.gamma_fit = gamma_fit
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.generator = generator
        self.truncated_share = truncated_share
        self.sampling = sampling
        self.metrics = metrics
        check_form(form, lora)
        self.form = form
        self.lora = lora


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
