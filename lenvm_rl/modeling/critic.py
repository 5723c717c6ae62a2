"""The task critic of PPO: a decoder with a scalar head that estimates the task return at every token."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import ModelOutput

from lenvm_rl.modeling.adapters import add_adapters, bare_model, merged_copy
from lenvm_rl.modeling.backbones import (
    copy_decoder,
    decoder_from_config,
    is_quantized,
    load_decoder,
    load_model,
    shared_config,
)
from lenvm_rl.modeling.heads import LengthValueHead, ScoreHead
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.sharing import ADAPTER, FULL, lora_settings, shared_decoder
from lenvm_rl.modeling.value_model import ValueModel, ValueModelConfig

MLP, LINEAR = HEADS = ("mlp", "linear")


class TaskCriticConfig(ValueModelConfig):
    """Configuration of a [`TaskCritic`].

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): the decoder's. No critic can be made without it.
        head (`str`, *optional*, defaults to `"mlp"`): `"mlp"`: a [`TaskCriticHead`]; `"linear"`: a
            [`~lenvm_rl.modeling.heads.ScoreHead`].
        head_bias (`bool`, *optional*, defaults to `True`): whether a linear head has a bias.
        adapters (`dict`, *optional*): settings of PEFT's adapters by name, see
            [`~lenvm_rl.modeling.adapters.adapter_settings`].
        frozen (`dict`, *optional*): the weights that do not learn, by name, and the dtype that each is held in. All
            others are float32.
        form, lora: see [`~lenvm_rl.modeling.value_model.ValueModelConfig`].
    """

    model_type = "lenvm_task_critic"

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict | None = None,
        head: str = MLP,
        head_bias: bool = True,
        adapters: dict | None = None,
        frozen: dict | None = None,
        form: str = FULL,
        lora: dict | None = None,
        **kwargs: Any,
    ):
        super().__init__(backbone_config, form, lora, **kwargs)
        if head not in HEADS:
            raise ValueError(f"head='{head}' is none of a task critic; there are {', '.join(HEADS)}.")
        self.head, self.head_bias = head, head_bias
        self.adapters, self.frozen = adapters, frozen


@dataclass
class TaskCriticOutput(ModelOutput):
    """
    Args:
        logits (`torch.FloatTensor` of shape `(B, S)`):
            The value at every position, float32 and unbounded: a return has no range of its own. Called logits because
            that is the field every value model of this library answers with.
    """

    logits: torch.FloatTensor | None = None


class TaskCriticHead(LengthValueHead):
    """The two layers of [`LengthValueHead`], float32, with a last layer that starts at 0.

    A new critic says 0 everywhere: the first update of the policy is plain Monte Carlo, not the noise of a random head.
    """

    OUTPUT_SCALE = 0.0


class TaskCritic(ValueModel):
    """A decoder with a head of one number. Saved and loaded like any model of transformers.

    What of it learns is said by `requires_grad`, and kept when it is saved and loaded, as are adapters. What learns has
    to be float32; the rest may be held in another dtype.

    Args:
        config ([`TaskCriticConfig`]): with `backbone_config`.
        backbone (`PreTrainedModel`, *optional*): the decoder to use as it is; a random one from the config if omitted.
        head (`torch.nn.Module`, *optional*): the head to use as it is, of the kind that the config names.
        base (`PreTrainedModel`, *optional*): for the forms `"adapter"` and `"head"`: the decoder to share, as in
            [`LengthValueModel`].
    """

    config_class = TaskCriticConfig

    def __init__(
        self,
        config: TaskCriticConfig,
        backbone: PreTrainedModel | None = None,
        head: nn.Module | None = None,
        base: PreTrainedModel | None = None,
    ):
        if config.backbone_config is None:
            raise ValueError("The config has no `backbone_config`: make a critic with `TaskCritic.from_backbone`.")
        super().__init__(config)
        if config.form != FULL or base is not None:
            self._share(base)
        else:
            self.backbone = decoder_from_config(config.backbone_config) if backbone is None else backbone
        if head is None:
            hidden_size = config.get_text_config(decoder=True).hidden_size
            head = TaskCriticHead(hidden_size) if config.head == MLP else ScoreHead(hidden_size, config.head_bias)
        self.head = head
        if backbone is None:
            add_adapters(self, config.adapters or {})
        self._complete(given=backbone is not None or base is not None)

    @classmethod
    def from_backbone(
        cls,
        model_or_path: PreTrainedModel | str | os.PathLike,
        trust_remote_code: bool = False,
        form: str = FULL,
        lora: LoraConfig | dict | None = None,
    ) -> TaskCritic:
        """A float32 critic, all of which learns, with the decoder of another model and a new head.

        In the forms `"adapter"` and `"head"` the decoder stays the other model's, and only what is added to it learns.

        Args:
            model_or_path (`PreTrainedModel` or `peft.PeftModel` or `str`): a causal language model, a decoder, or a
                [`LengthValueModel`], whose weights are copied; adapters are merged into the copy (of a shared decoder,
                the length value model's alone). Or a folder or hub id to load a decoder from (safetensors only).
            trust_remote_code (`bool`, *optional*, defaults to `False`): for a path, whether code beside it is run.
            form, lora: as in [`LengthValueModel.from_backbone`]: `model_or_path` is a model, whose decoder is shared.

        Raises:
            `ValueError`: the weights are quantised, or see [`~lenvm_rl.modeling.backbones.check_decoder`].
        """
        if form != FULL:
            base = shared_decoder(model_or_path)
            lora = lora_settings(lora) if form == ADAPTER or lora is not None else None
            config = TaskCriticConfig(shared_config(base), form=form, lora=lora, dtype=torch.float32)
            return cls(config, base=base).to(base.device)
        if isinstance(model_or_path, (str, os.PathLike)):
            backbone = load_decoder(model_or_path, torch.float32, trust_remote_code=trust_remote_code)
        elif isinstance(model_or_path, LengthValueModel):
            backbone = model_or_path.copied_decoder(torch.float32)
        elif is_quantized(bare_model(model_or_path)):
            raise ValueError(
                "The weights are quantised, and a critic that learns cannot start from a copy of them: share them "
                "(critic_form='head' or 'adapter'), name a model to start from (`critic_init=` or `critic=` of "
                "LenVMPPOTrainer), or use critic='lenvm'."
            )
        else:
            backbone = copy_decoder(merged_copy(model_or_path), torch.float32, loadable=False)
        return cls(TaskCriticConfig(backbone_config=backbone.config), backbone=backbone).to(backbone.device)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        base: PreTrainedModel | str | os.PathLike | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> TaskCritic:
        """Load a critic, in eval mode, with what is frozen in it and the dtype that this was held in.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or hub id; only safetensors are loaded.
            base (`PreTrainedModel`, `peft.PeftModel`, `str` or `os.PathLike`, *optional*): for the forms `"adapter"`
                and `"head"`: the model whose decoder they share.
            dtype (`str` or `torch.dtype`, *optional*): one for all weights but the head's, instead.
            kwargs: as for any model of transformers.
        """
        if base is None or dtype is not None:
            kwargs["dtype"] = dtype or torch.float32
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, base=base, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        frozen = model.config.frozen or {}
        for name, weight in model.named_parameters():
            weight.requires_grad = name not in frozen
            if name in frozen and dtype is None:
                weight.data = weight.data.to(getattr(torch, frozen[name]))
        if model.config.adapters:
            renew_buffers(model, unset_like(model))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As for any model of transformers, with what is frozen at the moment."""
        frozen = {name: weight for name, weight in self.named_parameters() if not weight.requires_grad}
        self.config.frozen = {name: str(weight.dtype).removeprefix("torch.") for name, weight in frozen.items()} or None
        # Under the names that the weights have here: a run that goes on reads them into its own critic.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        hidden_states: Tensor | None = None,
        **backbone_kwargs: Any,
    ) -> TaskCriticOutput:
        """Values at every position; `(B, S)` arguments, or `hidden_states` `(B, S, H)` of the decoder in their place,
        which a head alone reads.

        Positions are counted from the mask where none are given, or made by a decoder that sees pictures, which takes
        all else that the processor returns.
        """
        if hidden_states is None:
            hidden_states, *_ = self._decode(
                input_ids, attention_mask, position_ids, None, None, False, backbone_kwargs
            )
        return TaskCriticOutput(logits=self.head(hidden_states))


def unset_like(critic: TaskCritic) -> TaskCritic:
    """A critic of the same settings, adapters included, whose weights mean nothing."""
    config, settings = critic.config, json.loads(critic.config.to_json_string())
    with no_init_weights():
        again = TaskCritic(
            TaskCriticConfig(config.backbone_config, settings["head"], settings["head_bias"]),
            backbone=type(critic.backbone)._from_config(copy.deepcopy(config.backbone_config)),
        )
        add_adapters(again, settings["adapters"] or {})
    return again


def renew_buffers(critic: TaskCritic, like: TaskCritic) -> None:
    """Take over, in place, what is computed from the settings and never saved, such as the frequencies of rotary
    positions: loading leaves such buffers of adapters unset, and a cast of the whole model rounds them.
    """
    saved = like.state_dict().keys()
    for name, buffer in like.named_buffers():
        if name not in saved:
            parent, _, leaf = name.rpartition(".")
            critic.get_submodule(parent)._buffers[leaf] = buffer.to(critic.device)


def freeze_modules(critic: TaskCritic, names: Sequence[str]) -> None:
    """Freeze the modules of a critic that go by these names, such as `"self_attn"`, wherever they stand in it.

    Raises:
        `ValueError`: there is none of a name.
    """
    by_name: dict[str, list[nn.Module]] = {}
    for path, module in critic.named_modules():
        if any(True for _ in module.parameters()):
            by_name.setdefault(path.split(".")[-1], []).append(module)
    for name in names:
        if name not in by_name:
            raise ValueError(
                f"critic_frozen: '{name}' is no module of the critic, {', '.join(sorted(by_name)[1:])} are."
            )
        for module in by_name[name]:
            module.requires_grad_(False)


def load_critic(
    folder: str | os.PathLike, trust_remote_code: bool = False, base: PreTrainedModel | None = None
) -> TaskCritic:
    """The critic that was saved in `folder`, as it was; one that shares its decoder, on that of `base`."""
    return load_model(TaskCritic.from_pretrained, folder, base=base, trust_remote_code=trust_remote_code)


AutoConfig.register(TaskCriticConfig.model_type, TaskCriticConfig, exist_ok=True)
AutoModel.register(TaskCriticConfig, TaskCritic, exist_ok=True)
