"""The reference policy that TRL loads by name, and the policy that was handed over: are they one?

With `beta` above 0 and no adapters, TRL loads the reference from the path that the policy's config names. A policy that
was changed in memory, or made there, is then compared with other weights.
"""

import logging
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from lenvm_rl.backbones import check_embeds
from lenvm_rl.trainers.checks import check_model_path

logger = logging.getLogger(__name__)

SHOWN = 3


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
            ", ".join(differing[:SHOWN]),
            ", …" if len(differing) > SHOWN else "",
            trainer.beta,
        )


def _same(weight: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or weight.shape != other.shape:
        return False
    return torch.equal(weight, other.to(weight))
