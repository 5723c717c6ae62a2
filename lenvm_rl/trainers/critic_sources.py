"""Where a task critic comes from: what a person hands over, and what a run keeps of it.

What is given as `critic=` is taken as it is: a linear score head is the value head, adapters stay adapters, and what is
frozen stays frozen. What learns is held in float32, in which small steps are not lost to rounding; what does not keeps
its dtype, so that a large base is not made larger. Where there is no head, a new one is put on, which is said in the
log.
"""

from __future__ import annotations

import copy
import logging
import os

import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from lenvm_rl.adapters import adapted_layers, adapter_configs, adapter_settings, bare_model, keep_active
from lenvm_rl.backbones import check_decoder, load_model
from lenvm_rl.heads import ScoreHead
from lenvm_rl.modeling import LengthValueConfig, LengthValueModel
from lenvm_rl.trainers.critic import LINEAR, TaskCritic, TaskCriticConfig, load_critic, renew_buffers, unset_like

logger = logging.getLogger(__name__)

LEARNED, NO_CRITIC = "learned", "lenvm"
# Models with a head that scores, by the end of the name of their class.
_SCORERS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
_OF_TASK = {
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: AutoModelForTokenClassification,
}


def make_critic(critic, critic_init: str, policy, length_value_model, trust_remote_code: bool = False):
    """The task critic that `LenVMPPOTrainer(…, critic=)` asks for.

    Args:
        critic (`str` or `PreTrainedModel` or `peft.PeftModel`):
            - `"learned"`: a new head on the decoder that `critic_init` names, all of which learns.
            - `"lenvm"`: none.
            - A [`TaskCritic`], which is used itself, or the folder of one (such as `checkpoint-100/critic`).
            - A model with a linear score head of one number (`AutoModelForSequenceClassification` with
              `num_labels=1`, as reward models are): a copy of it, whose values are its scores at every token.
            - Any other decoder: a copy of it with a new head, which learns.
            - Any of these with adapters of PEFT, and the folder or hub id of any of them, adapters included.

            Flags `requires_grad` count as they are. The policy itself, given here, stands for `"learned"`, and so does
            a [`LengthValueModel`] for its decoder.
        critic_init (`str`): `"policy"`, `"lenvm"`, or a folder or hub id, as above.
        policy (`PreTrainedModel` or `peft.PeftModel`): the policy.
        length_value_model ([`LengthValueModel`], *optional*): the frozen one.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with weights is run.

    Returns:
        [`TaskCritic`], or `None` for `"lenvm"`.

    Raises:
        `ValueError`: `"lenvm"` is asked for and there is none, or what is given can be no critic; the reason is named.
        `FileNotFoundError`: a path does not exist.
    """
    if length_value_model is None and _is(critic, NO_CRITIC):
        raise ValueError(_NO_LENVM)
    if _is(critic, NO_CRITIC):
        return None
    if _is(critic, LEARNED):
        if length_value_model is None and critic_init == "lenvm":
            raise ValueError(_NO_LENVM)
        critic = {"policy": policy, "lenvm": length_value_model}.get(critic_init, critic_init)
    if isinstance(critic, (str, os.PathLike)):
        critic = _loaded(critic, trust_remote_code)
    elif not isinstance(critic, (PreTrainedModel, PeftModel)):
        raise ValueError(
            f"`critic` is a {type(critic).__name__}; it has to be 'learned', 'lenvm', a model of transformers (with "
            "adapters or without), or the path of one."
        )
    elif bare_model(critic) is bare_model(policy):
        return TaskCritic.from_backbone(policy)
    elif not isinstance(critic, (TaskCritic, LengthValueModel)) or _has_new_adapters(critic):
        critic = copy.deepcopy(critic)
    if isinstance(critic, LengthValueModel):
        logger.info("the critic starts from the decoder of a length value model, with a new head")
        return TaskCritic.from_backbone(critic)
    critic = _as_task_critic(critic)
    check_apart(critic, policy)
    hold_dtypes(critic)
    return critic


_NO_LENVM = (
    "critic='lenvm' and critic_init='lenvm' need a length value model: pass `length_value_model=`, or use "
    "critic='learned' with critic_init='policy'."
)


def _is(critic, name: str) -> bool:
    return isinstance(critic, str) and critic == name


def _has_new_adapters(critic) -> bool:
    return isinstance(critic, TaskCritic) and not critic.config.adapters and any(adapted_layers(critic))


def check_apart(critic: TaskCritic, policy: nn.Module) -> None:
    """Raise a `ValueError` if the critic has a weight in common with the policy that one of them would train."""
    known = {id(weight) for weight in policy.parameters()}
    if any(id(weight) in known and weight.requires_grad for weight in critic.parameters()):
        raise ValueError(
            "The critic shares weights with the policy, and one of them would be trained through the other: give it a "
            "decoder of its own (`TaskCritic.from_backbone(policy)` copies), or freeze what they share."
        )


def _loaded(path, trust_remote_code: bool):
    """The model at a path, whatever it is; adapters learn, on a frozen base."""
    settings = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    if load_model(find_adapter_config_file, path) is not None:
        return _with_adapters(path, settings)
    config = load_model(AutoConfig.from_pretrained, path, trust_remote_code=trust_remote_code)
    if isinstance(config, TaskCriticConfig):
        return load_critic(path, trust_remote_code)
    if isinstance(config, LengthValueConfig):
        return LengthValueModel.from_pretrained(path, trust_remote_code=trust_remote_code)
    scorer = _scorer(config)
    if scorer is None:
        logger.info("the model at '%s' has no score head: the critic gets a new one", path)
        return TaskCritic.from_backbone(path, trust_remote_code)
    return load_model(scorer.from_pretrained, path, **settings)


def _scorer(config):
    """What loads a model with its score head; `None` for one that was saved without."""
    name = (config.architectures or [""])[0]
    return next((loader for kind, loader in _SCORERS.items() if name.endswith(kind)), None)


def _with_adapters(path, settings: dict) -> PeftModel:
    """The adapters at a path on the base that they name."""
    adapters = PeftConfig.from_pretrained(path)
    base = adapters.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapters at '{path}' do not say what they belong to (`base_model_name_or_path`): load base and "
            "adapters (`PeftModel.from_pretrained(base, path, is_trainable=True)`) and give the model as `critic=`."
        )
    config = load_model(AutoConfig.from_pretrained, base, trust_remote_code=settings["trust_remote_code"])
    if isinstance(config, TaskCriticConfig):
        model = load_critic(base, settings["trust_remote_code"])
    elif adapters.task_type in _OF_TASK:
        model = load_model(_OF_TASK[adapters.task_type].from_pretrained, base, num_labels=1, **settings)
    else:
        model = load_model((_scorer(config) or AutoModelForCausalLM).from_pretrained, base, **settings)
    return PeftModel.from_pretrained(model, path, is_trainable=True)


def _as_task_critic(model) -> TaskCritic:
    """A model of one's own as a critic: its decoder, its score head or a new one, and its active adapters."""
    configs = adapter_configs(model)
    if any(config.is_prompt_learning or config.is_adaption_prompt for config in configs.values()):
        raise ValueError(
            f"The critic's adapters ({', '.join(config.peft_type.value for config in configs.values())}) are none of "
            "its layers, and cannot be kept: give the model without them, or one with LoRA."
        )
    bare = bare_model(model)
    check_decoder(bare, adapters=True)
    if model is bare and isinstance(bare, TaskCritic) and (bare.config.adapters or not configs):
        if any(buffer.is_floating_point() and buffer.dtype != torch.float32 for buffer in bare.buffers()):
            renew_buffers(bare, unset_like(bare))
        return bare
    configs = keep_active(bare, configs)
    critic = bare if isinstance(bare, TaskCritic) else _with_head(bare)
    critic.config.adapters = adapter_settings(critic, configs) or None
    renew_buffers(critic, _rebuilt(critic))
    return critic


def _with_head(model: PreTrainedModel) -> TaskCritic:
    decoder = model.base_model
    name, score = _score_of(model, decoder)
    config = TaskCriticConfig(backbone_config=decoder.config)
    head = None
    if score is None:
        logger.info("the %s has no score head: the critic gets a new one", type(model).__name__)
    else:
        linear = score.get_base_layer() if isinstance(score, BaseTunerLayer) else score
        outputs = getattr(linear, "out_features", None)
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"The head of the {type(model).__name__} (`{name}`, a {type(linear).__name__}) is not one linear "
                f"layer: give its decoder (`model.{model.base_model_prefix}`), which gets a new head."
            )
        if outputs != 1:
            raise ValueError(
                f"The head of the {type(model).__name__} (`{name}`) gives {outputs} numbers, and a value is one: load "
                "it with num_labels=1, or give its decoder, which gets a new head."
            )
        config.head, config.head_bias = LINEAR, linear.bias is not None
        head = ScoreHead(linear.in_features, config.head_bias)
        head.output = score
        head.to_float32()
    return TaskCritic(config, backbone=decoder, head=head).to(decoder.device)


def _score_of(model: PreTrainedModel, decoder) -> tuple[str | None, nn.Module | None]:
    """Name and module of what a model has beside its decoder, a language-model head left out."""
    if decoder is model:
        return None, None
    beside = [
        (name, child)
        for name, child in model.named_children()
        if child is not decoder and child is not model.get_output_embeddings() and any(True for _ in child.parameters())
    ]
    if len(beside) > 1:
        raise ValueError(
            f"The {type(model).__name__} has more than one head beside its decoder ("
            f"{', '.join(name for name, _ in beside)}): give the decoder (`model.{model.base_model_prefix}`), which "
            "gets a new one."
        )
    return beside[0] if beside else (None, None)


def _rebuilt(critic: TaskCritic) -> TaskCritic:
    """A critic made from the settings of this one, as loading makes it; a `ValueError` if it has other weights."""
    remedy = "Give it with LoRA on its linear layers, or with its adapters merged."
    try:
        again = unset_like(critic)
    except ValueError as error:
        raise ValueError(f"The critic's adapters could not be put into it again: {error} {remedy}") from error
    ours, theirs = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (critic, again))
    if ours != theirs:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"The critic could not be loaded again from its settings: its adapters make weights of their own "
            f"({', '.join(differing[:3])}). {remedy}"
        )
    return again


def hold_dtypes(critic: TaskCritic) -> None:
    """Hold what learns in float32, in place; what is frozen keeps its dtype where layers of both can work together.

    Adapters and the head take any dtype in; layers of a decoder do not, so a decoder that learns in part is float32.

    Args:
        critic ([`TaskCritic`]): with its flags `requires_grad` as they are to be.
    """
    critic.head.to_float32()
    own = {
        id(weight)
        for _, _, layer in adapted_layers(critic)
        for name, part in layer.named_children()
        if name not in ("base_layer", "original_module")
        for weight in part.parameters()
    }
    in_part = any(weight.requires_grad and id(weight) not in own for weight in critic.backbone.parameters())
    for weight in critic.parameters():
        if weight.dtype == torch.float64 or ((in_part or weight.requires_grad) and weight.dtype != torch.float32):
            weight.data = weight.data.float()
