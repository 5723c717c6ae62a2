"""Value models in a run whose weights are cut into shards, by FSDP2 or DeepSpeed.

What a value model adds to a decoder (its head, an adapter) stays whole and float32 in every process: an engine would
cast it to the precision of training, which does not tell the values of neighbouring states apart. A decoder of its own
goes the way of TRL's reference model; one that is shared is run by way of the model that it is a part of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled, set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import strtobool
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp

from lenvm_rl.modeling.value_model import ValueModel

# Where nothing is cut into shards: one process, or several with DDP.
NO_ENGINE = "none"


def is_sharded(trainer: GRPOTrainer) -> bool:
    """Whether an engine runs the policy that cuts up its weights, its gradients or the state of its optimizer."""
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


def engine_of(trainer: GRPOTrainer) -> str:
    """The engine of a run by name, `"none"` for one process and for DDP."""
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        return f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
    return f"FSDP{state.fsdp_plugin.fsdp_version}" if trainer.is_fsdp_enabled else NO_ENGINE


def check_engine(written_by: str | None, checkpoint: str, trainer: GRPOTrainer) -> None:
    """Raise a `ValueError` if a checkpoint was written under another engine than the one that is to go on.

    Args:
        written_by (`str`, *optional*): of [`engine_of`]; `None` if the checkpoint does not say.
        checkpoint (`str`): named by the error.
        trainer (`trl.GRPOTrainer`): of the run.
    """
    ours = engine_of(trainer)
    if written_by not in (None, ours):
        named = [f"under {name}" if name != NO_ENGINE else "without shards" for name in (written_by, ours)]
        raise ValueError(
            f"The checkpoint '{checkpoint}' was written {named[0]}, and this run goes on {named[1]}, which cannot read "
            "the state of its optimizer: launch as before, or start a new run from its weights (`model=`)."
        )


@contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """Inside, models are loaded whole: ZeRO-3 would cut them up as they are loaded, and cast a head with the rest."""
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


def check_shards(trainer: GRPOTrainer) -> None:
    """Raise a `ValueError` if the run was launched to be sharded and is not: accelerate says nothing on a CPU."""
    for engine, variable, enabled in (
        ("FSDP", "ACCELERATE_USE_FSDP", trainer.is_fsdp_enabled),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", trainer.is_deepspeed_enabled),
    ):
        if strtobool(os.environ.get(variable, "false")) and not enabled:
            raise ValueError(
                f"This run was launched with a config for {engine} ({variable}), but on a CPU accelerate leaves it "
                "out, and every process has all weights: launch with torchrun for DDP, or on GPUs."
            )


def place_sharded(model: ValueModel, trainer: GRPOTrainer, what: str) -> ValueModel:
    """Place a value model in a run under an engine: whole as it is, and afterwards the same object.

    Args:
        model ([`~lenvm_rl.modeling.value_model.ValueModel`]): with a decoder of its own, which is replaced by the
            engine's, or with one that it shares with the policy or its reference.
        trainer (`trl.GRPOTrainer`): constructed.
        what (`str`): what errors call it.

    Raises:
        `ValueError`: ZeRO-3 has cut it up already, or the engine is one that cannot share a decoder.
    """
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(
            f"DeepSpeed cut up the {what} when it was loaded, and cast its float32 head to the precision of the run: "
            "give the trainer its path, or load it before the config of the run is made."
        )
    if "backbone" in model._modules:
        prepare = prepare_deepspeed if trainer.is_deepspeed_enabled else prepare_fsdp
        model.backbone = prepare(model.backbone, trainer.accelerator)
    else:
        _share_shards(model, trainer, what)
    for part in added_parts(model):
        part.to(trainer.accelerator.device)
        for weight in part.parameters():
            # Under DDP they are the first process's as well.
            torch.distributed.broadcast(weight.data, src=0)
    return model


def added_parts(model: ValueModel) -> list[nn.Module]:
    """What a value model adds to a decoder, and every process holds whole."""
    return [part for name, part in model.named_children() if name != "backbone"]


def _share_shards(model: ValueModel, trainer: GRPOTrainer, what: str) -> None:
    """Let a shared decoder be run by way of the policy or the reference, whichever it is a part of."""
    if engine_of(trainer) == "FSDP1":
        raise ValueError(
            f"fsdp_version=1 lays the weights of the base that the {what} shares end to end, out of its layers: set "
            "`fsdp_version: 2` in the config of the launch, or use DDP."
        )
    if trainer.is_fsdp_enabled:
        # DeepSpeed gathers the weights of each layer as that is run, whoever asks for it.
        parts = [each for each in (trainer.ref_model, trainer.model) if each is not None]
        models = map(trainer.accelerator.unwrap_model, parts)
        weights = {id(weight) for weight in model.backbone.parameters()}
        model.run_by(next(each for each in models if any(id(weight) in weights for weight in each.parameters())))
    if trainer.ref_model is not None:
        # It is read alone, and what an engine has once gathered to take a gradient goes on taking one.
        trainer.ref_model.requires_grad_(False)
