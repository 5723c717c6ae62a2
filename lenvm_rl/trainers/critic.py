"""The task critic of PPO: a decoder with a scalar head that estimates the task return at every token."""

import copy
import os
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import ModelOutput

from lenvm_rl.backbones import copy_decoder, decoder_config_from_dict, load_decoder, load_model
from lenvm_rl.modeling import LengthValueConfig, LengthValueHead, LengthValueModel
from lenvm_rl.positions import decoder_positions


class TaskCriticConfig(PretrainedConfig):
    """Configuration of a [`TaskCritic`].

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of the decoder. A critic cannot be made without it.
    """

    model_type = "lenvm_task_critic"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config=None, **kwargs):
        self.backbone_config = None
        super().__init__(**kwargs)
        # Set only now: the inherited method would overwrite the decoder's choice of attention.
        if isinstance(backbone_config, dict):
            backbone_config = decoder_config_from_dict(backbone_config)
        self.backbone_config = backbone_config
        if "attn_implementation" in kwargs:
            self._attn_implementation = kwargs["attn_implementation"]


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


class TaskCritic(PreTrainedModel):
    """A decoder with a [`TaskCriticHead`]. Saved and loaded like any model of transformers.

    Args:
        config ([`TaskCriticConfig`]): with `backbone_config`.
        backbone (`PreTrainedModel`, *optional*): the decoder to use as it is; a random one from the config if omitted.
    """

    config_class = TaskCriticConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["head.hidden", "head.output"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TaskCriticConfig, backbone: PreTrainedModel | None = None):
        if config.backbone_config is None:
            raise ValueError("The config has no `backbone_config`: make a critic with `TaskCritic.from_backbone`.")
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.head = TaskCriticHead(config.backbone_config.get_text_config(decoder=True).hidden_size)
        if backbone is None:
            self.post_init()
        else:
            # The decoder's weights are given, and the head has drawn its own.
            with no_init_weights():
                self.post_init()

    def _init_weights(self, module):
        if isinstance(module, TaskCriticHead):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_backbone(cls, model_or_path) -> "TaskCritic":
        """A trainable float32 critic with the decoder of another model and a new head.

        Args:
            model_or_path (`PreTrainedModel` or `peft.PeftModel` or `str`):
                A causal language model, a decoder, or a [`LengthValueModel`], whose weights are copied; adapters are
                merged into the copy (of a shared decoder, those of the length value model alone). Or a folder or hub
                id to load a decoder from (safetensors only).
        """
        if isinstance(model_or_path, (str, os.PathLike)):
            backbone = load_decoder(model_or_path, torch.float32)
        elif isinstance(model_or_path, LengthValueModel):
            backbone = model_or_path.copied_decoder(torch.float32)
        else:
            backbone = copy_decoder(_merged(model_or_path), torch.float32)
        return cls(TaskCriticConfig(backbone_config=backbone.config), backbone=backbone).to(backbone.device)

    def forward(self, input_ids, attention_mask=None, position_ids=None, **backbone_kwargs) -> TaskCriticOutput:
        """Values at every position; `(B, S)` arguments.

        Positions are counted from the mask where none are given, or made by a decoder that sees pictures, which takes
        all else that the processor returns.
        """
        position_ids = decoder_positions(self.backbone, input_ids, attention_mask, position_ids, None, backbone_kwargs)
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **backbone_kwargs,
        )
        return TaskCriticOutput(logits=self.head(outputs.last_hidden_state))


def make_critic(critic, critic_init: str, policy, length_value_model) -> TaskCritic | None:
    """The task critic that `LenVMPPOTrainer(…, critic=)` asks for.

    Args:
        critic (`str` or `PreTrainedModel`):
            `"learned"`: a new head on the decoder that `critic_init` names. `"lenvm"`: none. A [`TaskCritic`] or the
            folder of one (such as `checkpoint-100/critic`): trained on. Any other model, folder or hub id: a new head
            on a copy of its decoder.
        critic_init (`str`): `"policy"`, `"lenvm"`, or a folder or hub id.
        policy (`PreTrainedModel` or `peft.PeftModel`): the policy.
        length_value_model ([`LengthValueModel`], *optional*): the frozen one.

    Returns:
        [`TaskCritic`], or `None` for `"lenvm"`.

    Raises:
        `ValueError`: `"lenvm"` is asked for and there is none.
        `FileNotFoundError`: a path does not exist.
    """
    if length_value_model is None and (critic == "lenvm" or (critic == "learned" and critic_init == "lenvm")):
        raise ValueError(
            "critic='lenvm' and critic_init='lenvm' need a length value model: pass `length_value_model=`, or use "
            "critic='learned' with critic_init='policy'."
        )
    if isinstance(critic, str) and critic == "lenvm":
        return None
    if isinstance(critic, TaskCritic):
        return critic.requires_grad_(True)
    if isinstance(critic, str) and critic == "learned":
        critic = {"policy": policy, "lenvm": length_value_model}.get(critic_init, critic_init)
    if isinstance(critic, (str, os.PathLike)):
        config = load_model(AutoConfig.from_pretrained, critic)
        if isinstance(config, TaskCriticConfig):
            return load_critic(critic)
        if isinstance(config, LengthValueConfig):
            critic = LengthValueModel.from_pretrained(critic)
    return TaskCritic.from_backbone(critic)


def load_critic(folder) -> TaskCritic:
    """The critic that was saved in `folder`, in float32."""
    return load_model(TaskCritic.from_pretrained, folder, use_safetensors=True, dtype=torch.float32)


def _merged(model):
    """The model itself, or a copy with its adapters merged: the policy keeps its own."""
    if not hasattr(model, "peft_config"):
        return model
    if hasattr(model.get_base_model(), "quantization_method"):
        raise ValueError(
            "The policy is quantised, and a critic cannot be trained from a copy of it: name a model for the critic to "
            "start from with `critic_init=`, or use critic='lenvm'."
        )
    return copy.deepcopy(model).merge_and_unload()


AutoConfig.register(TaskCriticConfig.model_type, TaskCriticConfig, exist_ok=True)
AutoModel.register(TaskCriticConfig, TaskCritic, exist_ok=True)
