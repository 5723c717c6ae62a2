"""What a length value model is made of and what its values mean: the part of it that is written in `config.json`."""

import numbers

from transformers import AutoConfig, PretrainedConfig

from lenvm_rl.modeling.backbones import decoder_config_from_dict
from lenvm_rl.modeling.sharing import FULL, check_form


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
        sampling (`dict`, *optional*):
            The settings that those completions were sampled with: free form, JSON.
        metrics (`dict`, *optional*):
            What the model reached, for its card: `{domain: {metric: number}}`.
        form (`str`, *optional*, defaults to `"full"`):
            `"full"`: a decoder and a head; `"adapter"`: a LoRA adapter and a head on a base that is shared; `"head"`: a
            head alone on a base that is shared.
        lora (`dict`, *optional*):
            Settings of the adapter, see [`~lenvm_rl.modeling.sharing.lora_settings`].

    Raises:
        `ValueError`: gamma is not a number strictly between 0 and 1, there is no such form, transformers does not know
            the decoder's type, or the model was fitted to another target than the return.
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
        sampling=None,
        metrics=None,
        form=FULL,
        lora=None,
        **kwargs,
    ):
        self.backbone_config = None
        # Models of earlier versions say what they were fitted to; those of an ablation have no values.
        target, _ = kwargs.pop("target", "return"), kwargs.pop("target_scale", None)
        if target != "return":
            raise ValueError(
                f"This model was fitted to target={target!r}, an ablation that has no values: pretrain one on the "
                "length return."
            )
        super().__init__(**kwargs)
        # Set only now: the inherited method hands its own settings to every sub-configuration, so the decoder's choice
        # of attention would be lost, and a model would compute otherwise before saving than after loading.
        if isinstance(backbone_config, dict):
            backbone_config = decoder_config_from_dict(backbone_config)
        self.backbone_config = backbone_config
        if "attn_implementation" in kwargs:
            self._attn_implementation = kwargs["attn_implementation"]
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

    def get_text_config(self, decoder=None, encoder=None):
        """The decoder's text configuration, where generic code looks for the hidden size, the vocabulary and the like.

        (The inherited method would take the field `generator` for a sub-configuration.)
        """
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


HOW_TO_ADD_GAMMA = (
    "If a model's config lacks it and you know it: `LengthValueModel.from_pretrained(path, "
    "config=LengthValueConfig.from_pretrained(path, gamma=…))`, then `save_pretrained`."
)


def checked_gamma(gamma) -> float:
    """Gamma as a float; a `ValueError` unless it is a number strictly between 0 and 1."""
    if isinstance(gamma, numbers.Real) and not isinstance(gamma, bool) and 0 < float(gamma) < 1:
        return float(gamma)
    raise ValueError(
        f"gamma is {gamma!r}, but the discount of the length return is a number strictly between 0 and 1: fit it to "
        "the lengths of the rollouts with `lenvm_rl.returns.fit_gamma`."
    )


def check_complete(config) -> None:
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
