"""Value models in a run whose weights are cut into shards, by FSDP2 or DeepSpeed.

What a value model adds to a decoder (its head, an adapter) stays whole and float32 in every process: an engine would
cast it to the precision of training, which does not tell the values of neighbouring states apart. A decoder of its own
goes the way of TRL's reference model; one that is shared is run by way of the model that it is a part of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled, set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import strtobool
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp

from lenvm_rl.modeling.sharing import ADAPTER, FULL
from lenvm_rl.modeling.value_model import ValueModel

# Where nothing is cut into shards: one process, or several with DDP.
NO_ENGINE = "none"
_NOT_FSDP1 = (
    "fsdp_version=1 lays weights end to end, out of their layers, in which a {what} can neither read nor learn: set "
    "`fsdp_version: 2` in the config of the launch, or use DDP."
)


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


def place_sharded(model: ValueModel, trainer: GRPOTrainer, what: str, learns: bool = False) -> ValueModel:
    """Place a value model in a run under an engine: whole as it is, and afterwards the same object.

    Args:
        model ([`~lenvm_rl.modeling.value_model.ValueModel`]): with a decoder of its own, which is replaced by the
            engine's, or with one that it shares with the policy or its reference.
        trainer (`trl.GRPOTrainer`): constructed.
        what (`str`): what errors call it.
        learns (`bool`, *optional*, defaults to `False`): whether a decoder of its own is to learn.

    Raises:
        `ValueError`: ZeRO-3 has cut it up already, or the engine is one that cannot share a decoder.
    """
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(
            f"DeepSpeed cut up the {what} when it was loaded, and cast its float32 head to the precision of the run: "
            "give the trainer its path, or load it before the config of the run is made."
        )
    if "backbone" in model._modules:
        model.backbone = _engine_of_decoder(trainer, learns)(model.backbone)
    else:
        _share_shards(model, trainer, what)
    for part in added_parts(model):
        part.to(trainer.accelerator.device)
        for weight in part.parameters():
            # Under DDP they are the first process's as well.
            torch.distributed.broadcast(weight.data, src=0)
    return model


def _engine_of_decoder(trainer: GRPOTrainer, learns: bool) -> Callable:
    if learns:
        # Layer by layer, as accelerate does it with the policy.
        return partial(fsdp2_prepare_model, trainer.accelerator)
    prepare = prepare_deepspeed if trainer.is_deepspeed_enabled else prepare_fsdp
    return partial(prepare, accelerator=trainer.accelerator)


def check_critic_engine(form: str | None, trainer: GRPOTrainer) -> None:
    """Raise a `ValueError` if a critic could not learn under the engine of the run.

    Args:
        form (`str`, *optional*): of the critic, once it is known.
        trainer (`trl.GRPOTrainer`): of the run.
    """
    if not is_sharded(trainer):
        return
    args, state, engine = trainer.args, trainer.accelerator.state, engine_of(trainer)
    if engine == "FSDP1":
        raise ValueError(_NOT_FSDP1.format(what="task critic"))
    if form == FULL and engine != "FSDP2":
        raise ValueError(
            f"critic_form='full' has a decoder of its own, which does not learn under {engine}: set "
            "critic_form='head' or 'adapter', or launch with FSDP2 or DDP."
        )
    if args.fp16:
        raise ValueError(f"fp16=True scales losses, which a learned critic under {engine} is not: set bf16=True.")
    waits = [name for name in ("critic_warmup_steps", "target_kl") if getattr(args, name)]
    if trainer.is_deepspeed_enabled and waits:
        raise ValueError(
            f"{', '.join(waits)} lets the critic learn in steps in which the policy does not, and DeepSpeed makes a "
            "step of the policy's from every loss: leave it out, or launch with FSDP2 or DDP."
        )
    if trainer.optimizer is not None:
        raise ValueError(
            f"`optimizers=` is made for the policy's weights, and under {engine} a learned critic has an optimizer of "
            "its own, of the same kind: set `optim`, or `optimizer_cls_and_kwargs=`."
        )
    if form == ADAPTER and trainer.is_fsdp_enabled and state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing runs layers of the base again with the adapters of that moment, which are "
            "not the critic's (critic_form='adapter'): set gradient_checkpointing=True in its place."
        )


def check_policy_can_wait(trainer: GRPOTrainer) -> None:
    """Raise a `ValueError` if the engine of a run in which nothing but the policy learns takes no step without it."""
    if trainer.args.target_kl is None:
        return
    if trainer.is_deepspeed_enabled or trainer.args.fp16:
        engine = "DeepSpeed makes a step from every loss" if trainer.is_deepspeed_enabled else "fp16 scales gradients"
        raise ValueError(
            f"target_kl leaves the policy without gradients for the rest of a batch, and {engine}, of which there are "
            "none without a critic that learns: leave it out, or launch with DDP or FSDP2 and bf16."
        )


def whole_state(model: ValueModel) -> dict[str, torch.Tensor]:
    """The weights of a value model, put together where they are cut up: all processes ask for them at once."""
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in model.state_dict().items()
    }


def copy_whole(source: torch.Tensor, weight: torch.Tensor) -> None:
    """Copy a whole tensor into a weight, of which a process may hold a part."""
    if isinstance(weight, DTensor):
        source = distribute_tensor(source, weight.device_mesh, weight.placements)
    weight.copy_(source)


def added_parts(model: ValueModel) -> list[nn.Module]:
    """What a value model adds to a decoder, and every process holds whole."""
    return [part for name, part in model.named_children() if name != "backbone"]


def _share_shards(model: ValueModel, trainer: GRPOTrainer, what: str) -> None:
    """Let a shared decoder be run by way of the policy or the reference, whichever it is a part of."""
    if engine_of(trainer) == "FSDP1":
        raise ValueError(_NOT_FSDP1.format(what=what))
    if trainer.is_fsdp_enabled:
        # DeepSpeed gathers the weights of each layer as that is run, whoever asks for it.
        parts = [each for each in (trainer.ref_model, trainer.model) if each is not None]
        models = map(trainer.accelerator.unwrap_model, parts)
        weights = {id(weight) for weight in model.backbone.parameters()}
        model.run_by(next(each for each in models if any(id(weight) in weights for weight in each.parameters())))
    if trainer.ref_model is not None:
        # It is read alone, and what an engine has once gathered to take a gradient goes on taking one.
        trainer.ref_model.requires_grad_(False)
