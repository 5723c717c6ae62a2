"""The length value model: any decoder of transformers with a head that says how much of a completion is to come.

The value at a token is `V = -sigmoid(z)`, an estimate of the return `G = -(1 - gamma^n)`, where n tokens follow, the
end of sequence counted: 0 is the end itself, -1 is infinitely far from it (arXiv 2604.27039, §3.1).
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from lenvm_rl.modeling.backbones import (
    cache_keyword,
    cache_of,
    check_causal,
    copy_decoder,
    decoder_from_config,
    decoder_positions,
    fitting_fingerprint,
    grid_offsets,
    load_model,
    save_code,
    with_code,
)
from lenvm_rl.modeling.card import write_model_card
from lenvm_rl.modeling.configuration import HOW_TO_ADD_GAMMA, LengthValueConfig, check_complete, checked_gamma
from lenvm_rl.modeling.heads import LengthValueHead
from lenvm_rl.modeling.sharing import (
    ADAPTER,
    FULL,
    HEAD,
    SharedDecoder,
    check_same_architecture,
    decoder_for,
    lora_settings,
    shared_decoder,
)


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
        rope_deltas (`torch.LongTensor` of shape `(B, 1)`, *optional*):
            With pictures, in a decoder that places them on a grid: how far the next position is ahead of the number of
            tokens.
    """

    logits: torch.FloatTensor
    values: torch.FloatTensor
    past_key_values: object | None = None
    rope_deltas: torch.LongTensor | None = None


class LengthValueModel(PreTrainedModel):
    """A decoder with a [`LengthValueHead`] on its last hidden state, and no language-model head.

    Made by [`~LengthValueModel.from_backbone`]; saved and loaded like any model of transformers, also through
    `AutoModel.from_pretrained` once this module is imported.

    Args:
        config ([`LengthValueConfig`]):
            With `backbone_config` and `gamma`.
        backbone (`PreTrainedModel`, *optional*):
            The decoder to use, as it is. Without it, one with random weights is made from `config.backbone_config`.
        base (`PreTrainedModel`, *optional*):
            For the forms `"adapter"` and `"head"`: the decoder to share. It is `.backbone`, but none of its weights are
            among the model's parameters, and nothing but a change of device reaches it.

    Raises:
        `ValueError`: the config has no decoder or no gamma, or its form needs a base and there is none.
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
    _shared = None

    def __init__(self, config: LengthValueConfig, backbone: PreTrainedModel | None = None, base=None):
        check_complete(config)
        super().__init__(config)
        if config.form != FULL or base is not None:
            self._share(base)
            backbone = base
        else:
            self.backbone = decoder_from_config(config.backbone_config) if backbone is None else backbone
        self.head = LengthValueHead(config.get_text_config(decoder=True).hidden_size)
        if backbone is None:
            self.post_init()
        else:
            # Initialisation spares only modules that carry its mark: a layer that was replaced in the given decoder
            # would be drawn anew.
            with no_init_weights():
                self.post_init()

    def _share(self, base) -> None:
        form = self.config.form
        if base is None or form == FULL:
            raise ValueError(
                "A model of form='full' has a decoder of its own and takes no `base`: leave it out."
                if form == FULL
                else f"A length value model of form={form!r} holds no decoder: give the one that it was fitted on, "
                "`LengthValueModel.from_pretrained(path, base=model_or_path)`."
            )
        check_same_architecture(self.config, base)
        self._shared = SharedDecoder(base, self.config.lora)
        self.config.lora = self._shared.lora
        if form == ADAPTER:
            self.adapter = self._shared.adapter
        # Not registered: the base is not saved, trained, frozen or cast with this model.
        object.__setattr__(self, "backbone", base)
        # Recomputed in the backward pass, a layer would have the adapters of that moment.
        self.supports_gradient_checkpointing = False

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = self.head.output.weight.device
        if self._shared is not None and device.type != "meta" and device != self.backbone.device:
            self.backbone.to(device)
        return self

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
        dtype=None,
        sampling=None,
        form=FULL,
        lora=None,
        **load_kwargs,
    ) -> "LengthValueModel":
        """A length value model to be trained: the decoder of an existing model under a new head.

        Args:
            model_or_path (`PreTrainedModel` or `str` or `os.PathLike`):
                A causal language model or bare decoder; or a folder or hub id to load the decoder from (only
                safetensors). A language-model head is left behind. For form="full", the weights of a model are copied,
                and it is left as it was; in the other forms its decoder is shared, and may have adapters.
            gamma (`float`):
                Discount of the length return, in (0, 1): fit it to the rollouts with `lenvm_rl.returns.fit_gamma`.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                That of the rollouts. The config keeps its fingerprint, without which no policy can be checked.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
                Dtype of a decoder that is copied or loaded, float32 because training comes next. Head and adapter are
                float32 in any case.
            gamma_fit, generator, truncated_share, sampling, form:
                For the config, see [`LengthValueConfig`].
            lora (`peft.LoraConfig` or `dict`, *optional*):
                The adapter, for form="adapter"; see [`~lenvm_rl.modeling.sharing.lora_settings`].
            load_kwargs:
                Further arguments of `AutoModel.from_pretrained`, for a path.

        Returns:
            [`LengthValueModel`]: in eval mode, with every parameter trainable.

        Raises:
            `FileNotFoundError`: the path does not exist.
            `ValueError`: gamma is not in (0, 1), the tokenizer has ids that the decoder lacks, or the model is a length
                value model, has adapters (form="full"), or is no plain decoder: see
                [`~lenvm_rl.modeling.backbones.check_decoder`] and [`~lenvm_rl.modeling.backbones.check_causal`].
        """
        gamma = checked_gamma(gamma)
        backbone = decoder_for(form, model_or_path, dtype, **load_kwargs)
        check_causal(backbone)
        config = cls.config_class(
            backbone_config=backbone.config if form == FULL else copy.deepcopy(backbone.config),
            gamma=gamma,
            gamma_fit=gamma_fit,
            tokenizer_fingerprint=fitting_fingerprint(tokenizer, backbone),
            generator=generator,
            truncated_share=truncated_share,
            sampling=sampling,
            form=form,
            lora=lora_settings(lora) if form == ADAPTER or lora is not None else None,
            dtype=backbone.dtype if form == FULL else torch.float32,
        )
        return cls(config, **{"backbone" if form == FULL else "base": backbone}).to(backbone.device).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, base=None, **kwargs):
        """Load a length value model: `PreTrainedModel.from_pretrained` without guessing, and only from safetensors.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder written by `save_pretrained`, or a hub id.
            base (`PreTrainedModel`, `peft.PeftModel`, `str` or `os.PathLike`, *optional*):
                For the forms `"adapter"` and `"head"`: the model that they were fitted on, whose decoder is shared and
                not copied, with its adapters if it has any; or where to load it from.
            kwargs:
                As for any model of transformers. `dtype` is the decoder's; head and adapter are float32 in any case.
                `trust_remote_code=True` runs the code of a decoder that came with its own.

        Returns:
            [`LengthValueModel`]: in eval mode.

        Raises:
            `FileNotFoundError`: the path does not exist.
            `ValueError`: what is there is not a length value model, has no gamma, or lacks weights, which would be
                random; or gamma is given here, though it belongs to the weights.
        """
        if "gamma" in kwargs:
            raise ValueError(f"gamma belongs to the weights and is read from the model's config. {HOW_TO_ADD_GAMMA}")
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Only safetensors are loaded (other files can run code): drop `use_safetensors=False`.")
        if base is not None:
            settings = {name: kwargs.pop(name) for name in ("dtype", "attn_implementation") if name in kwargs}
            kwargs["base"] = shared_decoder(base, **settings)
        kwargs = load_model(partial(with_code, cls.config_class), pretrained_model_name_or_path, kwargs)
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
        if base is not None:
            model.to(model.backbone.device)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """As for any model of transformers, with a model card; a base that is shared is not saved."""
        if is_main_process and self._shared is None:
            save_code(self.backbone, save_directory)
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

    def freeze(self) -> "LengthValueModel":
        """For good: no parameter takes a gradient, and `train()`, even of a parent, leaves the model in eval mode."""
        self._frozen = True
        return self.requires_grad_(False).eval()

    @contextmanager
    def thawed(self) -> Iterator["LengthValueModel"]:
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
                the sequence alone, or made by a decoder that sees pictures. For packed sequences, give them and no
                mask.
            past_key_values (`Cache`, *optional*):
                The decoder's cache of the tokens before; a `ValueError` if it holds a recurrent state.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, H)`, *optional*):
                Embedded tokens.
            use_cache (`bool`, *optional*, defaults to `False`):
                Whether to return the cache, with these tokens added.
            backbone_kwargs:
                Further arguments of the decoder: for pictures, all else that the processor returns.

        Returns:
            [`LengthValueOutput`]: what stands at masked positions means nothing.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        position_ids = decoder_positions(
            self.backbone, inputs, attention_mask, position_ids, past_key_values, backbone_kwargs
        )
        shared = self._shared
        # The owner may have made the embeddings ask for gradients by a hook.
        detached = self.config.form == HEAD or (shared is not None and self.frozen)
        with nullcontext() if shared is None else shared.seen_alone(), torch.no_grad() if detached else nullcontext():
            outputs = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **cache_keyword(self.backbone, past_key_values),
                **backbone_kwargs,
            )
            deltas = grid_offsets(self.backbone) if position_ids is None else None
        return self._output(outputs.last_hidden_state, cache_of(self.backbone, outputs) if use_cache else None, deltas)

    def copied_decoder(self, dtype) -> PreTrainedModel:
        """A decoder of the caller's own, with the weights of this model's and its adapter, if any, merged into them."""
        return copy_decoder(self.backbone, dtype) if self._shared is None else self._shared.copy(dtype)

    def from_hidden_states(self, hidden_states: torch.FloatTensor) -> LengthValueOutput:
        """What a head alone says about hidden states that another forward has computed, such as a reference's.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, S, H)`):
                The base's last hidden state, after its final norm and with no adapter active
                (`output_hidden_states=True` gives it as `hidden_states[-1]`). No gradient goes back through it.

        Returns:
            As [`~LengthValueModel.forward`].

        Raises:
            `ValueError`: the model has another form, so that the hidden states of another forward are not its own.
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


def is_shared(model_or_path) -> bool:
    """Whether a length value model, or the one at a path, is of a form that shares its decoder."""
    if isinstance(model_or_path, (str, os.PathLike)):
        return load_model(LengthValueConfig.from_pretrained, model_or_path).form != FULL
    return isinstance(model_or_path, LengthValueModel) and model_or_path.config.form != FULL


AutoConfig.register(LengthValueConfig.model_type, LengthValueConfig, exist_ok=True)
AutoModel.register(LengthValueConfig, LengthValueModel, exist_ok=True)
