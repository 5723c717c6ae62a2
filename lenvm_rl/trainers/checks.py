"""What the trainers refuse, each with what to change: at construction, and where a step meets numbers that are none."""

import logging
import os
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from lenvm_rl.modeling.backbones import check_embeds

logger = logging.getLogger(__name__)

# Loss types of TRL that average over a completion's own tokens before they average over completions.
LENGTH_NORMALISED_LOSSES = ("grpo", "sapo")
# Optimizers that step inside the backward pass or hold one optimizer per layer: they take no further parameter group.
CLOSED_OPTIMIZERS = ("lomo", "adalomo", "layerwise")


def check_model_path(name_or_path, what: str) -> None:
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


def check_not_tokenized(dataset, what: str) -> None:
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


def check_dataset(train_dataset, args, has_environment: bool = False) -> None:
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


def check_loss(args) -> None:
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


def check_config_class(args, config_class) -> None:
    """Raise a `ValueError` unless `args` is of `config_class`: a plain `GRPOConfig` lacks what the trainer reads."""
    if not isinstance(args, config_class):
        raise ValueError(
            f"`args` is a {type(args).__name__}; this trainer needs a {config_class.__name__}, which takes all "
            "arguments of trl.GRPOConfig and adds its own."
        )


def check_optimizer(args) -> None:
    """Raise a `ValueError` if the optimizer takes no second model, as a learned critic is."""
    name = args.optim.value
    if any(part in name for part in CLOSED_OPTIMIZERS):
        raise ValueError(
            f"optim='{name}' steps layer by layer and takes no parameter group for the learned critic: use another, "
            "such as 'adamw_torch', or critic='lenvm'."
        )


def check_no_critic(args) -> None:
    """Raise a `ValueError` if something is set that a learned critic reads, where there is none (`LenVMPPOConfig`)."""
    fields = ("critic_lam", "length_adaptive_alpha", "critic_warmup_steps", "kl_reward_coef")
    changed = [name for name in fields if getattr(args, name) != type(args).__dataclass_fields__[name].default]
    if changed:
        raise ValueError(f"{', '.join(changed)} needs a learned critic, and critic='lenvm' has none: leave it out.")


_SHOWN = 3


def check_reference_path(policy, args, keywords: dict[str, Any]) -> None:
    """Raise unless the reference can be loaded, before TRL tries.

    Args:
        policy (`PreTrainedModel`, `peft.PeftModel` or `str`): as given to the trainer.
        args (`trl.GRPOConfig`): of the run.
        keywords (`dict`): of the trainer.

    Raises:
        `ValueError`: `beta` is above 0 and the policy comes from nowhere.
        `FileNotFoundError`: the folder that it came from is gone.
    """
    if args.beta == 0.0 or not isinstance(policy, PreTrainedModel) or keywords.get("peft_config") is not None:
        return
    path = get_config_model_id(policy.config)
    if not path:
        raise ValueError(
            f"beta={args.beta} compares with a reference policy, which TRL loads from where the policy came from, and "
            "this one was made in memory: save it (`save_pretrained`) and give its path as `model=`, train adapters "
            "(`peft_config=`), or set beta=0."
        )
    check_model_path(path, "the reference policy, which beta > 0 loads from where the policy came from")


def warn_of_another_reference(policy, trainer) -> None:
    """Warn if the reference that TRL has loaded is not the policy that was handed over.

    Weights that are cut into shards are not compared.

    Args:
        policy (`PreTrainedModel` or `str`): as given to the trainer; a path is loaded twice, so it needs no look.
        trainer (`trl.GRPOTrainer`): constructed.

    Raises:
        `ValueError`: the reference cannot read the tokens of the policy.
    """
    if trainer.ref_model is None or isinstance(policy, str):
        return
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
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
