"""What is passed to the trainers and their configs: positions as in TRL, and what stands for names of older ones."""

import inspect
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments
from trl import GRPOTrainer

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


def trainer_keywords(trainer: str, model, first: int, further: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for `trl.GRPOTrainer`: those given, and those given by their position there.

    Args:
        trainer (`str`): name of the class, for the error.
        model (any): the first argument.
        first (`int`): arguments of `trl.GRPOTrainer` that come before `further`.
        further (`tuple`): what was given by position.
        keywords (`dict`): what was given by name.

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
    """Raise a `TypeError` if a field is one of an older trainer's config, saying what stands for it.

    Args:
        config (`str`): name of the class, for the error.
        names (`Iterable[str]`): of the keyword arguments.
    """
    _refuse(f"{config} has no", _OF_CONFIGS, names)


def _refuse(start: str, table: dict[str, str], names: Iterable[str]) -> None:
    found = [name for name in names if name in table]
    if found:
        raise TypeError("; ".join(f"{start} `{name}`: {table[name]}" for name in found) + ".")
