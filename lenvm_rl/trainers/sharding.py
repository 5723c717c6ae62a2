"""Frozen length value models in runs that cut models into shards (FSDP, DeepSpeed): how one is loaded and placed.

The decoder goes the way of TRL's reference model. The head stays whole and float32 on every process: both engines cast
what they hold to the precision of training, in which values of neighbouring states are no longer told apart.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import is_deepspeed_zero3_enabled, set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import strtobool
from trl.models import prepare_deepspeed, prepare_fsdp


@contextmanager
def loaded_whole(args) -> Iterator[None]:
    """Inside, models are loaded whole: ZeRO-3 would cut them up as they are loaded, and cast a head with the rest.

    Args:
        args (`transformers.TrainingArguments`): of the run.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    # transformers only has a weak reference, to the one of these that the arguments have made.
    config = args.deepspeed_plugin.dschf if args.deepspeed is None else args.hf_deepspeed_config
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def place_sharded(model, trainer):
    """Place a frozen length value model of form `"full"` in a run under FSDP or DeepSpeed.

    Args:
        model ([`LengthValueModel`]): frozen, whole. Its decoder is replaced by the engine's.
        trainer (`trl.GRPOTrainer`): constructed.

    Returns:
        [`LengthValueModel`]: the same.

    Raises:
        `ValueError`: ZeRO-3 has cut it up already.
    """
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(
            "DeepSpeed cut up the length value model when it was loaded, and cast its float32 head to the precision of "
            "the run: give the trainer its path, or load it before the config of the run is made."
        )
    prepare = prepare_deepspeed if trainer.is_deepspeed_enabled else prepare_fsdp
    model.backbone = prepare(model.backbone, trainer.accelerator)
    model.head.to(trainer.accelerator.device)
    return model


def check_shards(trainer) -> None:
    """Raise a `ValueError` if the run was launched to be sharded and is not: accelerate says nothing on a CPU.

    Args:
        trainer (`trl.GRPOTrainer`): constructed.
    """
    for engine, variable, enabled in (
        ("FSDP", "ACCELERATE_USE_FSDP", trainer.is_fsdp_enabled),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", trainer.is_deepspeed_enabled),
    ):
        if strtobool(os.environ.get(variable, "false")) and not enabled:
            raise ValueError(
                f"This run was launched with a config for {engine} ({variable}), but on a CPU accelerate leaves it "
                "out, and every process has all weights: launch with torchrun for DDP, or on GPUs."
            )
