"""The length value model: any decoder of transformers with a value head that says how much of a completion is still to come.

The value at a token is `V = -sigmoid(z)`, an estimate of the return `G = -(1 - gamma^n)` where n tokens follow, the end-of-sequence token
counted: -1 is infinitely far from the end, 0 is the end itself (arXiv 2604.27039, §3.1).
"""

import copy
import math
import numbers
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import ModelOutput

from .tokenization import check_pad_is_not_eos, tokenizer_fingerprint


class LengthValueConfig(PretrainedConfig):
    """Configuration of a [`LengthValueModel`]: its decoder, and what its values mean.

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of the decoder. A model cannot be made without it.
        gamma (`float`, *optional*):
            Discount of the length return, in (0, 1). It belongs to the weights: a value says nothing without it, so a model cannot be made
            or loaded without it.
        gamma_fit (`dict`, *optional*):
            What gamma was fitted on (quantile, coverage, number and quantiles of the lengths …). Free form, JSON.
        tokenizer_fingerprint (`dict`, *optional*):
            See [`tokenizer_fingerprint`]. Without it, the model cannot be checked against a policy.
        generator (`str`, *optional*):
            The policy whose completions the model was fitted on.
        truncated_share (`float`, *optional*):
            Share of those completions that were cut before their end, in [0, 1].

    Raises:
        `ValueError`: gamma is not a number strictly between 0 and 1, or the decoder is of a type that transformers does not know.
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
        if isinstance(backbone_config, dict):
            backbone_config = _backbone_config_from_dict(backbone_config)
        self.backbone_config = backbone_config
        self.gamma = None if gamma is None else _checked_gamma(gamma)
        self.gamma_fit = gamma_fit
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.generator = generator
        self.truncated_share = truncated_share
        super().__init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None):
        """The decoder's text configuration: hidden size, vocabulary size and the like live there, and generic code asks for them here.

        (The inherited method would take the field `generator` for a sub-configuration.)
        """
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


@dataclass
class LengthValueOutput(ModelOutput):
    """
    Args:
        logits (`torch.FloatTensor` of shape `(B, S)`):
            The head's output z, float32. Remaining length is read off it, not off the value: `n = -softplus(z) / ln(gamma)` tokens.
        values (`torch.FloatTensor` of shape `(B, S)`):
            `-sigmoid(z)`, float32, in (-1, 0): the value of the state that ends in the token at this position.
        past_key_values (`Cache`, *optional*):
            The decoder's cache, where `use_cache=True` was asked for.
    """

    logits: torch.FloatTensor | None = None
    values: torch.FloatTensor | None = None
    past_key_values: object | None = None


class LengthValueHead(nn.Module):
    """`z = W2 SiLU(W1 h + b1) + b2` on the decoder's last hidden state h (arXiv 2604.27039, §3.2).

    Weights and arithmetic are float32 whatever the dtype of the decoder, of autocast, or of a cast of the whole model: far from the end a
    token changes the logit by less than bfloat16 can hold.

    A new head starts near `z = 0`, hence `V = -1/2`, at every state: the middle of the range of the return, where the sigmoid is steepest and
    the gradient does not depend on which way the error goes. In tokens it is `ln 2 / -ln(gamma)`, 15 % of the length that gamma was
    fitted to cover to 99 %. The last layer's weights are small rather than zero (a spread of about 0.06 in z for hidden states of unit
    size), so that the first layer and the decoder learn from the first step.

    Args:
        hidden_size (`int`):
            Size of the hidden state, and of the layer between.
    """

    OUTPUT_SCALE = 0.1

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.output = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the starting weights described above."""
        std = 1 / math.sqrt(self.hidden.in_features)
        nn.init.normal_(self.hidden.weight, std=std)
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.output.weight, std=self.OUTPUT_SCALE * std)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states `(…, H)` of any floating dtype to logits `(…)` in float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.output(nn.functional.silu(self.hidden(hidden_states.float()))).squeeze(-1)

    def _apply(self, fn, recurse=True):
        # Every `.to()`, `.half()`, `.bfloat16()` of a parent comes through here: follow it to the device, not to the dtype.
        def to_device_only(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(to_device_only, recurse)


class LengthValueModel(PreTrainedModel):
    """A decoder with a [`LengthValueHead`] on its last hidden state. No language-model head is kept.

    Made by [`~LengthValueModel.from_backbone`], saved and loaded like any model of transformers, also by `AutoModel.from_pretrained` once this
    module is imported.

    Args:
        config ([`LengthValueConfig`]):
            With `backbone_config` and `gamma`.
        backbone (`PreTrainedModel`, *optional*):
            The decoder to use as it is. Without it, one with random weights is made from `config.backbone_config`.

    Raises:
        `ValueError`: the config has no decoder or no gamma.
    """

    config_class = LengthValueConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    model_tags = ["length-value-model"]
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["head.hidden", "head.output"]
    # Sharding then wraps the head apart from the decoder, whose dtype may be another.
    _no_split_modules = ["LengthValueHead"]
    # Whether an implementation of attention is supported is the decoder's to say: it checks for itself.
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
            # Initialisation skips only modules that carry its own mark; one that somebody replaced in the decoder would lose its weights.
            with no_init_weights():
                self.post_init()

    def _init_weights(self, module):
        # Called for the layers of the head first and for the head after them, so this has the last word.
        if isinstance(module, LengthValueHead):
            module.reset_parameters()
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
        """A trainable length value model with the decoder of an existing model and a new head.

        Args:
            model_or_path (`PreTrainedModel` or `str` or `os.PathLike`):
                A causal language model or a bare decoder, whose weights are copied (the model itself is left as it was), or a folder or hub
                id to load the decoder from (safetensors only). A language-model head is left behind.
            gamma (`float`):
                Discount of the length return, in (0, 1); fit it to the lengths of the rollouts with `returns.fit_gamma`.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                The tokenizer of the rollouts. Its fingerprint goes into the config; without it the model cannot be checked against a policy.
            gamma_fit (`dict`, *optional*):
                What gamma was fitted on, see [`LengthValueConfig`].
            generator (`str`, *optional*):
                The policy whose completions the model is to be fitted on.
            truncated_share (`float`, *optional*):
                Share of those completions that were cut before their end.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
                Dtype of the decoder's weights. float32 because training comes next; the head is float32 in any case.
            load_kwargs:
                Further arguments of `AutoModel.from_pretrained`, for a path.

        Returns:
            [`LengthValueModel`]: in eval mode, all parameters trainable.

        Raises:
            `ValueError`: gamma is not in (0, 1); the tokenizer's pad and end tokens are one, or it has ids that the decoder lacks; the model is a
                length value model already, an adapter, an encoder-decoder, or no model of transformers.
            `FileNotFoundError`: the path does not exist.
        """
        gamma = _checked_gamma(gamma)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if isinstance(model_or_path, (str, os.PathLike)):
            load_kwargs = {"use_safetensors": True, "dtype": dtype, **load_kwargs}
            backbone = _load(AutoModel.from_pretrained, model_or_path, load_kwargs)
            _check_decoder(backbone)
        elif load_kwargs:
            raise ValueError(f"{sorted(load_kwargs)} say how to load a model, but a model was given: leave them out, or give its path.")
        else:
            backbone = _copied_decoder(model_or_path, dtype)
        if tokenizer is not None:
            _check_tokenizer_fits(tokenizer, backbone)
        config = cls.config_class(
            backbone_config=backbone.config,
            gamma=gamma,
            gamma_fit=gamma_fit,
            tokenizer_fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            generator=generator,
            truncated_share=truncated_share,
            dtype=dtype,
        )
        return cls(config, backbone=backbone).to(backbone.device).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a length value model from a folder or the hub: `PreTrainedModel.from_pretrained`, with safetensors only and no guessing.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder written by `save_pretrained`, or a hub id.
            kwargs:
                As in `PreTrainedModel.from_pretrained`. `dtype` is the decoder's; the head is float32 always.

        Returns:
            [`LengthValueModel`]: in eval mode.

        Raises:
            `ValueError`: what is there is not a length value model, has no gamma, or lacks weights (a random head would look like a model); or
                gamma is given here, though it belongs to the weights.
            `FileNotFoundError`: the path does not exist.
        """
        if "gamma" in kwargs:
            raise ValueError(
                "gamma belongs to the weights and is read from the model's config, so it cannot be set while loading. If the config lacks it: "
                "`LengthValueModel.from_pretrained(path, config=LengthValueConfig.from_pretrained(path, gamma=…))`."
            )
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Only safetensors are loaded, because other weight files can run code: leave out `use_safetensors=False`.")
        want_info = kwargs.pop("output_loading_info", False)
        kwargs = {**kwargs, "use_safetensors": True, "output_loading_info": True}
        model, info = _load(super().from_pretrained, pretrained_model_name_or_path, kwargs, *model_args)
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if missing:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' lacks weights of a length value model ({', '.join(missing[:6])}), which would be random. "
                "Save the model again with `save_pretrained`; to put a new head on a decoder, use `LengthValueModel.from_backbone(path, gamma=…)`."
            )
        return (model, info) if want_info else model

    @property
    def frozen(self) -> bool:
        """Whether [`~LengthValueModel.freeze`] was called."""
        return self._frozen

    def freeze(self) -> "LengthValueModel":
        """For good: no parameter takes a gradient, and the model stays in eval mode, without dropout, even if a parent's `train()` is called."""
        self._frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LengthValueModel":
        """As for any module; a frozen model stays in eval mode."""
        return super().train(mode and not self._frozen)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
        **backbone_kwargs,
    ) -> LengthValueOutput:
        """Logit and value at every position.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Token ids; or `inputs_embeds` among the further arguments.
            attention_mask (`torch.Tensor`, *optional*):
                `(B, S)`, or `(B, past + S)` with a cache: 1 for tokens, 0 for padding on either side. Other shapes need `position_ids`.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                By default counted from the first unmasked token, so that padding on either side gives the values of the unpadded sequence. For
                packed sequences give them, and no mask.
            past_key_values (`Cache`, *optional*):
                The decoder's cache of earlier tokens.
            use_cache (`bool`, *optional*, defaults to `False`):
                Whether to return the extended cache.
            backbone_kwargs:
                Further arguments of the decoder.

        Returns:
            [`LengthValueOutput`]: at masked positions its entries mean nothing.
        """
        if position_ids is None and attention_mask is not None:
            inputs = input_ids if input_ids is not None else backbone_kwargs["inputs_embeds"]
            position_ids = position_ids_from_mask(attention_mask)[:, -inputs.shape[1] :]
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **backbone_kwargs,
        )
        logits = self.head(outputs.last_hidden_state)
        return LengthValueOutput(
            logits=logits,
            values=-torch.sigmoid(logits),
            past_key_values=outputs.past_key_values if use_cache else None,
        )


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Positions `(B, S)` counted from each row's first token; 0 at padding before it, the last token's position at padding after it.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, S)`):
            1 for tokens, 0 for padding.

    Raises:
        `ValueError`: the mask is not two-dimensional: positions cannot be read off it, so they have to be given.
    """
    if attention_mask.ndim != 2:
        raise ValueError(
            f"Positions can be counted from a mask of shape (B, S), this one is {tuple(attention_mask.shape)}: give `position_ids`."
        )
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def completion_logits(model, prompt_ids, prompt_mask, completion_ids, completion_mask, chunk_size=None) -> torch.Tensor:
    """The logits of a batch of completions at every state, from before the first token to after the last.

    Runs with gradients where the caller has them on. What stands at masked slots, even an id outside the vocabulary, does not matter.

    Args:
        model (`Callable`):
            `model(input_ids=, attention_mask=)` returns an object with `.logits` of shape `(B, S)`, and makes its positions from the mask.
        prompt_ids (`torch.LongTensor` of shape `(B, P)`):
            Prompts, padded on the left.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            1 where a prompt token exists.
        completion_ids (`torch.LongTensor` of shape `(B, T)`):
            Completions, padded on the right.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            1 where a completion token exists.
        chunk_size (`int`, *optional*):
            Rows per forward; by default all at once.

    Returns:
        `torch.FloatTensor` of shape `(B, T + 1)`: entry t is the logit of the state before token t (t = 0: read at the last prompt token; t
        = the length: after the last token). Entries past a row's length are 0.

    Raises:
        `ValueError`: shapes disagree, a prompt is empty or not padded on the left, a completion is not padded on the right, chunk_size is not
            positive, or the model's logits are not one number per position.
    """
    _check_sides(prompt_ids, prompt_mask, completion_ids, completion_mask)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is the number of rows per forward, at least 1, not {chunk_size}.")
    mask = torch.cat([prompt_mask.long(), completion_mask.long()], dim=1)
    ids = torch.cat([prompt_ids, completion_ids], dim=1).masked_fill(mask == 0, 0)
    first = prompt_ids.shape[1] - 1
    chunks = []
    for rows, row_mask in zip(ids.split(chunk_size or len(ids)), mask.split(chunk_size or len(ids)), strict=True):
        logits = model(input_ids=rows, attention_mask=row_mask).logits
        if logits.shape != rows.shape:
            raise ValueError(
                f"A value model gives one logit per position, {tuple(rows.shape)}; this model gives {tuple(logits.shape)}. "
                "Make one with `LengthValueModel.from_backbone`."
            )
        chunks.append(logits[:, first:].float())
    exists = torch.nn.functional.pad(completion_mask.bool(), (1, 0), value=True)
    return torch.where(exists, torch.cat(chunks), 0.0)


def bootstrap_values(values: torch.Tensor, mask: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
    """The value after each row's last token: exactly 0 where the completion finished, because nothing follows the end.

    Args:
        values (`torch.Tensor` of shape `(B, T + 1)`):
            Values at every state, laid out as in [`completion_logits`].
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token exists; a prefix of ones in each row.
        finished (`torch.Tensor` of shape `(B,)`):
            True where the last token is the end of the sequence, False where the completion was cut.

    Returns:
        `torch.Tensor` of shape `(B,)`, in the dtype of values.

    Raises:
        `ValueError`: shapes disagree.
    """
    rows, steps = mask.shape
    if values.shape != (rows, steps + 1) or finished.shape != (rows,):
        raise ValueError(
            f"For a mask of shape (B, T) = {(rows, steps)}, values are (B, T + 1) and finished is (B,); given are "
            f"{tuple(values.shape)} and {tuple(finished.shape)}."
        )
    last = values.gather(1, mask.long().sum(dim=1, keepdim=True)).squeeze(1)
    return torch.where(finished.bool(), 0.0, last)


def _check_sides(prompt_ids, prompt_mask, completion_ids, completion_mask) -> None:
    shapes = [tuple(array.shape) for array in (prompt_ids, prompt_mask, completion_ids, completion_mask)]
    if shapes[0] != shapes[1] or shapes[2] != shapes[3] or shapes[0][:1] != shapes[2][:1] or len(shapes[0]) != 2 or len(shapes[2]) != 2:
        raise ValueError(
            f"Prompt ids and mask are (B, P), completion ids and mask (B, T), with the same B; given are {shapes}."
        )
    prompt, completion = prompt_mask.bool(), completion_mask.bool()
    if prompt.shape[1] == 0 or not prompt[:, -1].all() or (prompt[:, :-1] & ~prompt[:, 1:]).any():
        raise ValueError("Prompts are padded on the left and hold at least one token: a row of prompt_mask is zeros, then ones.")
    if (completion[:, 1:] & ~completion[:, :-1]).any():
        raise ValueError("Completions are padded on the right: a row of completion_mask is ones, then zeros.")


def _checked_gamma(gamma) -> float:
    if isinstance(gamma, numbers.Real) and not isinstance(gamma, bool) and 0 < gamma < 1 and float(gamma) < 1:
        return float(gamma)
    raise ValueError(
        f"gamma is {gamma!r}, but the discount of the length return is a number strictly between 0 and 1: fit it to the lengths of "
        "your rollouts with `lenvm_rl.returns.fit_gamma`."
    )


def _check_complete(config) -> None:
    if config.backbone_config is None:
        raise ValueError(
            "The config has no `backbone_config`: this is not a length value model. To make one from a decoder, use "
            "`LengthValueModel.from_backbone(model_or_path, gamma=…)`."
        )
    if config.gamma is None:
        raise ValueError(
            "The config has no gamma, and values mean nothing without the discount they were fitted with. If you know it: "
            "`LengthValueModel.from_pretrained(path, config=LengthValueConfig.from_pretrained(path, gamma=…))`, then `save_pretrained`."
        )
    _checked_gamma(config.gamma)


def _backbone_config_from_dict(settings: dict) -> PretrainedConfig:
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ValueError("`backbone_config` names no `model_type`, so the decoder is unknown: add it to config.json, for example 'llama'.")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        if model_type in str(error):
            raise ValueError(
                f"The decoder is of type '{model_type}', which this transformers does not know: install one that does."
            ) from error
        raise


def _load(loader, path, kwargs, *args):
    """`loader(path, …)`, with errors that say first whether the path was taken for a folder or for a hub id."""
    path = os.path.expanduser(os.fspath(path))
    if os.path.exists(path):
        return loader(path, *args, **kwargs)
    is_hub_id = path.count("/") <= 1 and not path.startswith((".", "/")) and "\\" not in path
    parent = path.split("/")[0]
    if not is_hub_id or ("/" in path and os.path.isdir(parent)):
        raise FileNotFoundError(f"There is no model at '{path}' (looked from {os.getcwd()}): check the path.")
    try:
        return loader(path, *args, **kwargs)
    except OSError as error:
        raise FileNotFoundError(
            f"There is no folder '{path}' (looked from {os.getcwd()}), and as a hub id it could not be loaded: {error}"
        ) from error


def _check_decoder(model) -> None:
    if isinstance(model, LengthValueModel):
        raise ValueError("This is a length value model already: load it with `LengthValueModel.from_pretrained`.")
    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        raise ValueError(
            f"A decoder is copied from a plain model of transformers, not from {type(model).__name__} with wrappers or adapters: unwrap it "
            "(`accelerator.unwrap_model`) and merge its adapters (`merge_and_unload`) first."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; a length value model needs a causal decoder.")


def _copied_decoder(model, dtype) -> PreTrainedModel:
    """A decoder of its own with the weights of a model's: no shared tensors, and none of the hooks, flags or freezing of the original."""
    _check_decoder(model)
    decoder = model.base_model
    # The weights are all written over at once, so drawing random ones would cost time and the caller's random state.
    with no_init_weights():
        copied = AutoModel.from_config(copy.deepcopy(decoder.config), dtype=dtype)
    if type(copied) is not type(decoder):
        raise ValueError(
            f"{type(model).__name__} has a decoder of class {type(decoder).__name__}, but `AutoModel` makes a {type(copied).__name__} of "
            "its config, so it could not be saved and loaded: give the path of a model that `AutoModel` knows."
        )
    copied.load_state_dict(decoder.state_dict())
    return copied.to(decoder.device).eval()


def _check_tokenizer_fits(tokenizer, backbone) -> None:
    check_pad_is_not_eos(tokenizer)
    largest, embeddings = max(tokenizer.get_vocab().values()), backbone.get_input_embeddings().num_embeddings
    if largest >= embeddings:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, the model embeds {embeddings} tokens (ids 0 to {embeddings - 1}): give the model's own "
            "tokenizer, or resize the model's embeddings."
        )


AutoConfig.register(LengthValueConfig.model_type, LengthValueConfig, exist_ok=True)
AutoModel.register(LengthValueConfig, LengthValueModel, exist_ok=True)
