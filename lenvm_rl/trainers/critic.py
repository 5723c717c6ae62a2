"""Where a task critic comes from: what a person hands over, and what a run keeps of it.

What is given as `critic=` is taken as it is: a linear score head is the value head, adapters stay adapters, and what is
frozen stays frozen. What learns is held in float32, in which small steps are not lost to rounding; what does not keeps
its dtype, so that a large base is not made larger. Where there is no head, a new one is put on, which is said in the
log.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file
from trl import GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from lenvm_rl.modeling.adapters import adapted_layers, adapter_configs, adapter_settings, bare_model, keep_active
from lenvm_rl.modeling.backbones import check_causal, check_decoder, check_embeds, load_model
from lenvm_rl.modeling.critic import (
    LINEAR,
    TaskCritic,
    TaskCriticConfig,
    TaskCriticHead,
    freeze_modules,
    load_critic,
    renew_buffers,
    unset_like,
)
from lenvm_rl.modeling.heads import ScoreHead
from lenvm_rl.modeling.length_value_model import LengthValueConfig, LengthValueModel
from lenvm_rl.modeling.sharing import FULL, SAME_ARCHITECTURE
from lenvm_rl.trainers import checks, sharding
from lenvm_rl.trainers.config import LEARNING
from lenvm_rl.trainers.fields import changed_fields
from lenvm_rl.trainers.reading import check_sees_pictures
from lenvm_rl.trainers.sharding import check_critic_engine, copy_whole, is_sharded, place_sharded
from lenvm_rl.trainers.shared_base import check_base_stays_frozen

logger = logging.getLogger(__name__)

LEARNED, NO_CRITIC = "learned", "lenvm"
TASK_CRITIC = "task critic"
# Models with a head that scores, by the end of the name of their class.
_SCORERS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
_OF_TASK = {TaskType.SEQ_CLS: AutoModelForSequenceClassification, TaskType.TOKEN_CLS: AutoModelForTokenClassification}


def make_critic(
    critic: PreTrainedModel | PeftModel | str,
    critic_init: str,
    policy: PreTrainedModel | PeftModel,
    length_value_model: LengthValueModel | None,
    trust_remote_code: bool = False,
    form: str = FULL,
    base: PreTrainedModel | PeftModel | None = None,
):
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
        form (`str`, *optional*, defaults to `"full"`): of a critic that starts here. One that is given has its own.
        base (`PreTrainedModel` or `peft.PeftModel`, *optional*, defaults to the policy): the model whose decoder a
            critic of the other forms shares.

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
        critic = _loaded(critic, trust_remote_code, policy if base is None else base)
    elif not isinstance(critic, (PreTrainedModel, PeftModel)):
        raise ValueError(
            f"`critic` is a {type(critic).__name__}; it has to be 'learned', 'lenvm', a model of transformers (with "
            "adapters or without), or the path of one."
        )
    elif bare_model(critic) is bare_model(policy):
        return TaskCritic.from_backbone(base if form != FULL and base is not None else policy, form=form)
    elif not isinstance(critic, (TaskCritic, LengthValueModel)) or _has_new_adapters(critic):
        critic = copy.deepcopy(critic)
    given = critic.config.form if isinstance(critic, TaskCritic) else FULL
    if form not in (FULL, given):
        raise ValueError(
            f"critic_form='{form}' is of a critic that starts with this run (critic='learned', critic_init='policy'), "
            f"and the one that is given is of form '{given}': leave critic_form at 'full', which takes it as it is."
        )
    if given != FULL:
        return critic
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


def _loaded(path, trust_remote_code: bool, base):
    """The model at a path, whatever it is; adapters learn, on a frozen base. A critic may share the one of `base`."""
    settings = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    if load_model(find_adapter_config_file, path) is not None:
        return _with_adapters(path, settings)
    config = load_model(AutoConfig.from_pretrained, path, trust_remote_code=trust_remote_code)
    if isinstance(config, TaskCriticConfig):
        return load_critic(path, trust_remote_code, None if config.form == FULL else base)
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


def check_settings(critic: Any, trainer: GRPOTrainer) -> None:
    """Raise a `ValueError` if a run with this critic, or without one, could not do what its settings say."""
    args, without = trainer.args, isinstance(critic, str) and critic == "lenvm"
    if args.multi_objective_aggregation != "sum_then_normalize" and not (without and args.task_baseline == "group"):
        raise ValueError(
            f"multi_objective_aggregation='{args.multi_objective_aggregation}' normalises rewards over groups, which "
            "neither a critic nor task_baseline='batch' reads: leave it at 'sum_then_normalize', or use "
            "critic='lenvm' with task_baseline='group'."
        )
    if without:
        _check_without(args)
        sharding.check_policy_can_wait(trainer)
        return
    if changed_fields(args, ("task_baseline",)):
        raise ValueError("task_baseline is for critic='lenvm': leave it out, a learned critic is a baseline itself.")
    if args.kl_reward_coef > 0.0 and trainer._is_vlm:
        raise ValueError("kl_reward_coef reads text only, and the policy has pictures: use beta alone.")
    if args.critic_learning_rate == 0.0:
        sharding.check_policy_can_wait(trainer)
        return
    checks.check_optimizer(args)
    check_critic_engine(args.critic_form if _is(critic, LEARNED) else None, trainer)
    if args.refresh_steps > 0 and args.shaping_coef != 0.0:
        raise ValueError(
            "refresh_steps changes the potential of shaping, which is a part of what a learned critic has learnt: "
            "set shaping_coef=0 or refresh_steps=0, or use critic='lenvm'."
        )
    if trainer.lr_scheduler is not None:
        raise ValueError(
            "A learning rate scheduler in `optimizers=` is made for the policy's parameter groups, and a learned "
            "critic adds its own: pass `optimizers=(optimizer, None)` and set `lr_scheduler_type`."
        )


def _check_without(args) -> None:
    if args.truncation == "bootstrap":
        raise ValueError(
            "truncation='bootstrap' goes on with the task critic's value, and critic='lenvm' has none: set "
            "truncation='terminal', or learn a critic."
        )
    unread = ("critic_form", "critic_init", "critic_lam", "length_adaptive_alpha", "kl_reward_coef", *LEARNING)
    # Shaping makes a return of several rewards, which has a discount and a lambda.
    unread += ("task_gamma", "task_lam") if args.shaping_coef == 0.0 else ()
    if changed := changed_fields(args, unread):
        raise ValueError(f"{', '.join(changed)} needs a learned critic, and critic='lenvm' has none: leave it out.")
    scaled = [name for name in ("missing_eos_penalty", "reward_normalization", "reward_clip") if getattr(args, name)]
    if scaled and args.task_baseline == "group":
        raise ValueError(
            f"{scaled[0]} changes rewards that task_baseline='group' does not read: TRL compares those of a group as "
            "they are. Set task_baseline='batch', learn a critic, or do it in the reward function."
        )
    if args.num_generations == 1 and args.task_baseline == "group":
        raise ValueError(
            "task_baseline='group' compares the completions of a prompt, and num_generations=1 samples one of "
            "each: set task_baseline='batch', or num_generations to 2 or more."
        )


def place_critic(critic: TaskCritic, trainer: GRPOTrainer):
    """A critic on the device of the run, without dropout, wrapped as what is trained or as what is only read.

    Raises:
        `ValueError`: the critic cannot read what the policy writes, or there is nothing in it that learns.
    """
    args = trainer.args
    if critic.config.form != FULL:
        check_base_stays_frozen(critic, trainer, TASK_CRITIC, "set critic_form='full'")
    if trainer._is_vlm:
        check_sees_pictures(critic, trainer, TASK_CRITIC)
    # Padding is masked, and read as another token.
    check_embeds(trainer._tokenizer, critic, "the task critic", ordinary=True, padding=False)
    check_causal(critic.backbone)
    disable_dropout_in_model(critic)
    for module in critic.modules():
        _switch_off_dropout(module)
    if args.critic_learning_rate == 0.0:
        if isinstance(critic.head, TaskCriticHead) and not bool(critic.head.output.weight.any()):
            logger.warning(
                "The critic has a new head and critic_learning_rate=0, so it says 0 of everything: give one that has "
                "learned (`critic=`), or set a learning rate."
            )
        if is_sharded(trainer):
            return place_sharded(critic.eval(), trainer, TASK_CRITIC)
        return trainer.accelerator.prepare_model(critic.eval(), evaluation_mode=True)
    check_critic_engine(critic.config.form, trainer)
    freeze_modules(critic, args.critic_frozen or ())
    if not any(weight.requires_grad for weight in critic.parameters()):
        raise ValueError(
            "Nothing in the critic learns, since all of it is frozen (`requires_grad`, critic_frozen): unfreeze what "
            "is to learn, or set critic_learning_rate=0, which takes it as it is."
        )
    critic.train()
    if critic.config.form == FULL:
        # Layers that keep their inputs for the backward pass alone do so in training mode only.
        critic.backbone.train(args.gradient_checkpointing)
        if args.gradient_checkpointing:
            _checkpoint_activations(critic, args.gradient_checkpointing_kwargs)
    if is_sharded(trainer):
        return place_sharded(critic, trainer, TASK_CRITIC, learns=True)
    return trainer.accelerator.prepare_model(critic)


def _switch_off_dropout(module: nn.Module) -> None:
    """Set the dropout rates that a module keeps as numbers to 0; TRL sees to dropout layers."""
    for name, value in vars(module).items():
        if isinstance(value, float) and ("dropout" in name or name in ("layerdrop", "drop_path")):
            setattr(module, name, 0.0)


def _checkpoint_activations(critic, options: dict | None) -> None:
    # The second name is the one before transformers 5.23.
    renamed = hasattr(critic, "activation_checkpointing_enable")
    enable = critic.activation_checkpointing_enable if renamed else critic.gradient_checkpointing_enable
    enable(options)
    if (options or {}).get("use_reentrant") and not critic.get_input_embeddings().weight.requires_grad:
        # What is computed again has a gradient only if its input asks for one.
        critic.enable_input_require_grads()


CRITIC_FOLDER = "critic"
_SHOWN = 3


def check_same_critic(checkpoint: str, critic: TaskCritic | None) -> None:
    """Raise unless the critic in a checkpoint is the one that this run has, weights aside.

    Args:
        checkpoint (`str`): a folder.
        critic ([`TaskCritic`], *optional*): of the run, `None` if it has none.

    Raises:
        `FileNotFoundError`: the run has a critic and the checkpoint none.
        `ValueError`: the run has none, or one of another shape; what differs is named.
    """
    folder = Path(checkpoint, CRITIC_FOLDER)
    if critic is None and folder.is_dir():
        raise ValueError(
            f"The checkpoint '{checkpoint}' has a task critic, and this run has none (critic='lenvm'): resume with the "
            "`critic=` that it was written with, or start a new run from its weights (`model=`)."
        )
    if critic is None:
        return
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The checkpoint '{checkpoint}' has no folder '{CRITIC_FOLDER}', so it was not written by LenVMPPOTrainer "
            "with a learned critic: resume from one that was, or start a new run from its weights."
        )
    differences = _differences(folder, critic)
    if differences:
        raise ValueError(
            f"The task critic in '{folder}' is of another shape than this run's: {'; '.join(differences)}. Resume with "
            f"the `critic=` (and critic_init) that it was written with, or start a new run with critic='{folder}'."
        )


def _differences(folder: Path, critic: TaskCritic) -> list[str]:
    there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    here = critic.config.to_dict()
    found = [
        f"{name} {theirs} there and {ours} here"
        for name in SAME_ARCHITECTURE
        for theirs, ours in [(_of_decoder(each, name) for each in (there, here))]
        if theirs != ours
    ]
    if there.get("form", FULL) != here["form"]:
        found.append(f"form '{there.get('form', FULL)}' there and '{here['form']}' here")
    if there.get("head", "mlp") != here["head"]:
        found.append(f"a head of kind '{there.get('head', 'mlp')}' there and '{here['head']}' here")
    adapters = [sorted(each.get("adapters") or {}) for each in (there, here)]
    if adapters[0] != adapters[1]:
        found.append(f"adapters {adapters[0]} there and {adapters[1]} here")
    frozen = {name for name, weight in critic.named_parameters() if not weight.requires_grad}
    moved = sorted(frozen ^ (there.get("frozen") or {}).keys())
    if moved and not found:
        kind = "learn there and not" if moved[0] in frozen else "are frozen there and not"
        found.append(f"{len(moved)} weights, such as {', '.join(moved[:_SHOWN])}, {kind} here")
    shapes, ours = _shapes(folder), {name: list(weight.shape) for name, weight in critic.state_dict().items()}
    others = sorted(name for name in shapes if shapes[name] != ours.get(name))
    if others and not found:
        found.append(f"weights of other names or sizes, such as {', '.join(others[:_SHOWN])}")
    return found


def _of_decoder(settings: dict, name: str):
    decoder = settings["backbone_config"]
    return decoder.get(name, (decoder.get("text_config") or {}).get(name))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _shapes(folder: Path) -> dict[str, list[int]]:
    found = {}
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def _place(weight: torch.Tensor) -> int:
    return (weight.to_local() if isinstance(weight, DTensor) else weight).data_ptr()


@torch.no_grad()
def read_critic(checkpoint: str, critic: TaskCritic) -> None:
    """Take up the weights of the critic in a checkpoint, of which [`check_same_critic`] has found it to be the same."""
    weights, read = critic.state_dict(), set()
    for path in _files(Path(checkpoint, CRITIC_FOLDER)):
        with safe_open(path, "pt", device=str(critic.device)) as file:
            for name in file.keys():  # noqa: SIM118
                copy_whole(file.get_tensor(name), weights[name])
                read.add(_place(weights[name]))
    # Names of one tensor are saved once.
    lacking = [name for name, weight in weights.items() if _place(weight) not in read]
    if lacking:
        raise ValueError(
            f"The critic in '{os.path.join(checkpoint, CRITIC_FOLDER)}' lacks weights: {', '.join(lacking[:_SHOWN])}."
        )
