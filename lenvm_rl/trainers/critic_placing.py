"""The task critic of a run: what it excludes, and how it is made ready for training."""

from __future__ import annotations

import logging

from torch import nn
from trl.trainer.utils import disable_dropout_in_model

from lenvm_rl.backbones import check_causal, check_embeds
from lenvm_rl.trainers import checks
from lenvm_rl.trainers.callbacks import CriticGradientReset
from lenvm_rl.trainers.critic import TaskCriticHead
from lenvm_rl.trainers.pictures import check_sees_pictures

logger = logging.getLogger(__name__)


def check_settings(critic, trainer) -> None:
    """Raise a `ValueError` if a run with this critic, or without one, could not do what its settings say.

    Args:
        critic (any): what was given as `critic=`.
        trainer ([`LenVMPPOTrainer`]): constructed but for its critic.
    """
    if isinstance(critic, str) and critic == "lenvm":
        _check_without(trainer.args)
        return
    args = trainer.args
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"A learned critic is not sharded, so it does not run under "
            f"{'DeepSpeed' if trainer.is_deepspeed_enabled else 'FSDP'}: launch with DDP, or use critic='lenvm' or "
            "LenVMGRPOTrainer."
        )
    if args.kl_in_reward and trainer._is_vlm:
        raise ValueError("kl_in_reward=True reads text only, and the policy has pictures: use beta alone.")
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation='{args.multi_objective_aggregation}' normalises rewards over groups, "
            "which PPO with a critic does not use: leave it at 'sum_then_normalize', or use critic='lenvm'."
        )
    if args.critic_learning_rate == 0.0:
        return
    checks.check_optimizer(args)
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
    checks.check_no_critic(args)
    if args.num_generations == 1 and args.task_baseline == "group":
        raise ValueError(
            "task_baseline='group' compares the completions of a prompt, and num_generations=1 samples one of "
            "each: set task_baseline='batch', or num_generations to 2 or more."
        )


def place_critic(critic, trainer):
    """A critic on the device of the run, without dropout, wrapped as what is trained or as what is only read.

    Args:
        critic ([`TaskCritic`]): of the run.
        trainer ([`LenVMPPOTrainer`]): constructed but for it.

    Raises:
        `ValueError`: the critic cannot read what the policy writes, or there is nothing in it that learns.
    """
    args = trainer.args
    if trainer._is_vlm:
        check_sees_pictures(critic, trainer, "task critic")
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
        return trainer.accelerator.prepare_model(critic.eval(), evaluation_mode=True)
    if not any(weight.requires_grad for weight in critic.parameters()):
        raise ValueError(
            "Nothing in the critic learns, since all of it is frozen (`requires_grad`): unfreeze what is to learn, or "
            "set critic_learning_rate=0, which takes it as it is."
        )
    critic.train()
    # Layers that keep their inputs for the backward pass alone do so in training mode only.
    critic.backbone.train(args.gradient_checkpointing)
    if args.gradient_checkpointing:
        _checkpoint_activations(critic, args.gradient_checkpointing_kwargs)
    critic = trainer.accelerator.prepare_model(critic)
    trainer.add_callback(CriticGradientReset(critic))
    return critic


def _switch_off_dropout(module: nn.Module) -> None:
    """Set the rates that a module keeps as numbers to 0; those of dropout layers are others' work."""
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
