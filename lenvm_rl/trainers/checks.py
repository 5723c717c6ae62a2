"""What the trainers refuse at construction, each with what to change, and what stands for arguments of older ones."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from lenvm_rl.modeling.backbones import check_embeds
from lenvm_rl.trainers.sharding import is_sharded

logger = logging.getLogger(__name__)

# Loss types of TRL that average over a completion's own tokens before they average over completions.
LENGTH_NORMALISED_LOSSES = ("grpo", "sapo")
# Optimizers that step inside the backward pass or hold one optimizer per layer: they take no further parameter group.
CLOSED_OPTIMIZERS = ("lomo", "adalomo", "layerwise")


def check_model_path(name_or_path: Any, what: str) -> None:
    """Raise a `FileNotFoundError` if `name_or_path` can only be a local folder and is none.

    Args:
        name_or_path (`str` or any): a model is let through, and so is a name that may be a hub id (`name`, `org/name`).
        what (`str`): what the error calls it.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        return
    path = os.path.expanduser(os.fspath(name_or_path))
    is_path = path.startswith((".", "/", "\\")) or path.count("/") > 1 or "\\" in path
    if is_path and not os.path.isdir(path):
        raise FileNotFoundError(f"There is no folder '{path}' for {what} (looked from {os.getcwd()}): check the path.")


def check_not_tokenized(dataset: Any, what: str) -> None:
    """Raise a `ValueError` if a set of prompts holds token ids, as older PPO trainers take them.

    Args:
        dataset (`Dataset`, `IterableDataset`, a `dict` of them, or any): others are let through.
        what (`str`): what the error calls it, such as `"training set"`.
    """
    for each in dataset.values() if isinstance(dataset, dict) else [dataset]:
        columns = (each.column_names or []) if isinstance(each, (Dataset, IterableDataset)) else []
        if "prompt" not in columns and "input_ids" in columns:
            raise ValueError(
                f"The {what} is tokenized (it has a column `input_ids` and none called `prompt`), and TRL tokenizes "
                "prompts itself: give their texts or messages in a column `prompt`."
            )


def check_dataset(train_dataset: Any, args: GRPOConfig, has_environment: bool = False) -> None:
    """Raise a `ValueError` if the training set holds too few prompts for a single step.

    Args:
        train_dataset (`datasets.Dataset` or any): only a dataset with a length can be checked.
        args (`trl.GRPOConfig`): says how many prompts one generation batch takes.
        has_environment (`bool`, *optional*, defaults to `False`): whether an environment may write the prompts.
    """
    if not isinstance(train_dataset, Dataset):
        return
    if len(train_dataset) == 0:
        raise ValueError("The training set is empty: give at least one row with a `prompt`.")
    if "prompt" not in train_dataset.column_names and not has_environment:
        raise ValueError(f"The training set has no column `prompt`, only {train_dataset.column_names}: rename one.")
    prompts = args.generation_batch_size // args.num_generations
    if len(train_dataset) < prompts:
        raise ValueError(
            f"The training set has {len(train_dataset)} prompts, one generation batch takes {prompts} different ones "
            f"(generation_batch_size={args.generation_batch_size}, num_generations={args.num_generations}), so there "
            "would be no step at all: add prompts, lower per_device_train_batch_size, or raise num_generations."
        )


def check_loss(args: GRPOConfig) -> None:
    """Raise a `ValueError` where TRL's loss gives advantages per token no meaning.

    - `importance_sampling_level="sequence"`: the ratio is one number per completion, so its gradient spreads the mean
      of the advantages over all tokens, and the credit of each token is lost.
    - `loss_type="luspo"` is made for that ratio; with a ratio per token it is `"dr_grpo"` up to a constant.
    - `loss_type="vespo"` picks the weight of a whole completion by the sign of *its* advantage.
    - `off_policy_mask_threshold` drops a completion by the sign of *its* advantage; with one sign per token it would
      drop the discouraged tokens of a completion and keep the encouraged ones.

    Args:
        args (`trl.GRPOConfig`): of a run whose advantages differ from token to token.
    """
    if args.importance_sampling_level == "sequence":
        raise ValueError(
            "importance_sampling_level='sequence' gives every token of a completion the same weight, so advantages per "
            "token lose their meaning: set importance_sampling_level='token'."
        )
    if args.loss_type == "luspo":
        raise ValueError(
            "loss_type='luspo' weighs whole completions, and with a ratio per token it is 'dr_grpo' times "
            "max_completion_length: set loss_type='dr_grpo'."
        )
    if args.loss_type == "vespo":
        raise ValueError(
            "loss_type='vespo' weighs a whole completion by the sign of its one advantage, which advantages per token "
            "do not have: set loss_type='dr_grpo' (or 'dapo', 'bnpo', 'cispo')."
        )
    if args.off_policy_mask_threshold is not None:
        raise ValueError(
            "off_policy_mask_threshold drops a whole completion by the sign of its one advantage, which advantages per "
            "token do not have: leave it unset."
        )
    if args.loss_type in LENGTH_NORMALISED_LOSSES:
        logger.warning(
            "loss_type='%s' divides by each completion's own length: a length bias beside the length stream, and with "
            "it the length value model is no pure baseline. loss_type='dr_grpo' has neither.",
            args.loss_type,
        )


def check_config_class(args: Any, config_class: type) -> None:
    """Raise a `ValueError` unless `args` is of `config_class`: a plain `GRPOConfig` lacks what the trainer reads."""
    if not isinstance(args, config_class):
        raise ValueError(
            f"`args` is a {type(args).__name__}; this trainer needs a {config_class.__name__}, which takes all "
            "arguments of trl.GRPOConfig and adds its own."
        )


def check_optimizer(args: GRPOConfig) -> None:
    """Raise a `ValueError` if the optimizer takes no second model, as a learned critic is."""
    name = args.optim.value
    if any(part in name for part in CLOSED_OPTIMIZERS):
        raise ValueError(
            f"optim='{name}' steps layer by layer and takes no parameter group for the learned critic: use another, "
            "such as 'adamw_torch', or critic='lenvm'."
        )


_SHOWN = 3


def check_reference_path(policy: Any, args: GRPOConfig, keywords: dict[str, Any]) -> None:
    """Raise unless the reference can be loaded, before TRL tries.

    Raises:
        `ValueError`: `beta` is above 0 and the policy comes from nowhere.
        `FileNotFoundError`: the folder that it came from is gone.
    """
    if args.beta == 0.0 or not isinstance(policy, PreTrainedModel) or keywords.get("peft_config") is not None:
        return
    path = get_config_model_id(policy.config)
    if not path:
        # Where it is what needs the reference, beta is negligible and none of the user's.
        coefficient = getattr(args, "kl_reward_coef", 0.0)
        needs = f"kl_reward_coef={coefficient}" if coefficient > 0.0 else f"beta={args.beta}"
        raise ValueError(
            f"{needs} compares with a reference policy, which TRL loads from where the policy came from, and this one "
            "was made in memory: save it (`save_pretrained`) and give its path as `model=`, train adapters "
            f"(`peft_config=`), or set {needs.partition('=')[0]}=0."
        )
    check_model_path(path, "the reference policy, which beta > 0 loads from where the policy came from")


def warn_of_another_reference(policy: Any, trainer: GRPOTrainer) -> None:
    """Warn if the reference that TRL has loaded is not the policy that was handed over.

    Weights that are cut into shards are not compared.

    Args:
        policy (`PreTrainedModel` or `str`): as given to the trainer; a path is loaded twice, so it needs no look.
        trainer (`trl.GRPOTrainer`): constructed.

    Raises:
        `ValueError`: the reference cannot read the tokens of the policy.
    """
    if trainer.ref_model is None or isinstance(policy, str) or is_sharded(trainer):
        return
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    path = get_config_model_id(reference.config)
    check_embeds(
        trainer._tokenizer,
        reference,
        f"the reference policy, which TRL loaded from '{path}',",
        remedy="save the policy and its tokenizer (`save_pretrained`) and give their path as `model=`",
    )
    theirs = dict(reference.named_parameters())
    ours = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    differing = [name for name, weight in ours.items() if not _same(weight, theirs.get(name))]
    differing += sorted(theirs.keys() - ours.keys())
    if differing:
        logger.warning(
            "The reference policy was loaded from '%s', and the policy was changed since it came from there: %d of %d "
            "weights differ (%s%s), so beta=%g measures the divergence from other weights than the policy starts with. "
            "If it is to start at 0, save the policy (`save_pretrained`) and give its path as `model=`.",
            path,
            len(differing),
            len(ours),
            ", ".join(differing[:_SHOWN]),
            ", …" if len(differing) > _SHOWN else "",
            trainer.beta,
        )


def _same(weight: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or weight.shape != other.shape:
        return False
    return torch.equal(weight, other.to(weight))


_REFERENCE = (
    "set `beta` above 0 in `args`: TRL then loads the reference from the path of the policy, or takes the base under "
    "its adapters"
)
# Arguments of the PPO trainers of TRL up to 1.12, and of `Trainer`, by what stands for them here.
_OF_TRAINERS = {
    "policy": "pass it as `model=`",
    "policy_model": "pass it as `model=`",
    "ref_model": _REFERENCE,
    "ref_policy": _REFERENCE,
    "reward_model": "pass it in `reward_funcs=`, which takes functions, models and paths",
    "reward_fn": "pass it in `reward_funcs=`, which takes functions, models and paths",
    "value_model": "pass it as `critic=` to LenVMPPOTrainer: a model, with a score head or without, or a path",
    "config": "pass it as `args=`",
    "tokenizer": "pass it as `processing_class=`",
    "dataset": "pass it as `train_dataset=`, with texts or messages in a column `prompt`",
    "data_collator": "leave it out and give texts or messages in a column `prompt`, which TRL tokenizes and pads",
    "optimizer": "pass `optimizers=(optimizer, None)`",
    "lr_scheduler": "set `lr_scheduler_type` in `args`",
    "num_shared_layers": "freeze layers of the model that is passed as `critic=`: what is frozen stays frozen",
    "model_init": "make the model and pass it as `model=`",
    "compute_metrics": "measure in a function of `reward_funcs=`, with a weight of 0 in `reward_weights` of `args`",
    # Of LenVMPPOTrainer alone, which never asks about it here.
    "critic": "LenVMPPOTrainer has one; this trainer compares the completions of a group",
    "critic_model": "pass it as `critic=` to LenVMPPOTrainer",
}
# Fields of their configs.
_OF_CONFIGS = {
    "response_length": "set `max_completion_length`",
    "max_new_tokens": "set `max_completion_length`",
    "stop_token": "leave it out: every end of sequence that the model declares ends a completion",
    "stop_token_id": "leave it out: every end of sequence that the model declares ends a completion",
    "total_episodes": "set `max_steps` or `num_train_epochs`",
    "num_total_batches": "set `max_steps`",
    "steps": "set `max_steps`",
    "num_ppo_epochs": "set `num_iterations`",
    "ppo_epochs": "set `num_iterations`",
    "num_mini_batches": "set `steps_per_generation` to the batches that one generation is split into",
    "batch_size": "set `generation_batch_size`",
    "mini_batch_size": "set `per_device_train_batch_size` and `gradient_accumulation_steps`",
    "micro_batch_size": "set `per_device_train_batch_size`",
    "local_batch_size": "set `per_device_train_batch_size` and `steps_per_generation`",
    "local_mini_batch_size": "set `per_device_train_batch_size` and `gradient_accumulation_steps`",
    "local_rollout_forward_batch_size": "leave it out: models that only score run in chunks of "
    "`per_device_train_batch_size`",
    "num_sample_generations": "set `log_completions=True`",
    "cliprange": "set `epsilon` for the policy; `cliprange_value` is the critic's",
    "gamma": "set `task_gamma` for the task; the length value model brings its own",
    "lam": "set `task_lam` for the task, `length_lam` for the length stream",
    "kl_coef": "set `beta`, the weight of the divergence in the loss; in LenVMPPOConfig `kl_reward_coef` puts "
    "it into the reward",
    "init_kl_coef": "set `beta`, the weight of the divergence in the loss; in LenVMPPOConfig `kl_reward_coef` puts "
    "it into the reward",
    "kl_estimator": "leave it out: the loss has the estimator k3, the reward k1",
    "kl_penalty": "leave it out: the loss has the estimator k3, the reward k1",
    "whiten_rewards": "set `whiten` of LenVMPPOConfig, which acts on the advantages",
    "sft_model_path": "pass the path as `model=` to the trainer",
    "model_name": "pass the path as `model=` to the trainer",
    "reward_model_path": "pass the path in `reward_funcs=` to the trainer",
    "model_adapter_name": "make that adapter the active one of the model (`set_adapter`)",
    "ref_adapter_name": "leave it out: with `beta` above 0 the reference is the base, or a copy of the adapters that "
    "the policy comes with",
    "exp_name": "set `run_name`",
    "log_with": "set `report_to`",
}


def trainer_keywords(trainer: str, model: Any, first: int, further: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for `trl.GRPOTrainer`: those given, and those given by their position there.

    Raises:
        `TypeError`: an argument is one of an older trainer, is given twice or in its old place, or there are too many.
    """
    _refuse(f"{trainer} takes no", _OF_TRAINERS, keywords)
    if isinstance(model, TrainingArguments):
        raise TypeError(
            f"The first argument of {trainer} is the policy, and a {type(model).__name__} was given: the order is that "
            "of trl.GRPOTrainer, model, reward_funcs, args, train_dataset."
        )
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]
    if first + len(further) > len(names):
        raise TypeError(
            f"{trainer} takes {len(names)} arguments by position, as trl.GRPOTrainer does, and {first + len(further)} "
            "were given: pass `length_value_model=` and `critic=` by name."
        )
    placed = dict(zip(names[first:], further, strict=False))
    twice = sorted(placed.keys() & keywords.keys())
    if twice:
        raise TypeError(f"{trainer} was given {', '.join(twice)} by position and by name: give each once.")
    return {**placed, **keywords}


def check_config_names(config: str, names: Iterable[str]) -> None:
    """Raise a `TypeError` if a field is one of an older trainer's config, saying what stands for it."""
    _refuse(f"{config} has no", _OF_CONFIGS, names)


def _refuse(start: str, table: dict[str, str], names: Iterable[str]) -> None:
    found = [name for name in names if name in table]
    if found:
        raise TypeError("; ".join(f"{start} `{name}`: {table[name]}" for name in found) + ".")
