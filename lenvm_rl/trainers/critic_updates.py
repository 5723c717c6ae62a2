"""How a critic learns beside the policy: its groups in the optimizer, its schedule, the bound of its gradient, and the
updates of an optimizer step in which it learns alone.

A policy's optimizer leaves a weight alone that has no gradient. So an update of the critic alone is a step of the same
optimizer after the policy's gradients are cleared; its moments are kept, saved and resumed with all others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from lenvm_rl.trainers.critic_optimizer import CriticOptimizer
from lenvm_rl.trainers.sharding import is_sharded

if TYPE_CHECKING:
    from lenvm_rl.trainers.ppo import LenVMPPOTrainer

# Of `critic_lr_scheduler_type`.
AS_POLICY = "policy"


def add_critic_groups(optimizer: torch.optim.Optimizer, critic: nn.Module, trainer: LenVMPPOTrainer) -> None:
    """Add the critic's weights that learn to the optimizer of a run, unless they are there.

    Args:
        optimizer (`torch.optim.Optimizer`), critic (`torch.nn.Module`): of the run, the critic as it is placed.
        trainer ([`LenVMPPOTrainer`]): says which of them decay.
    """
    if not critic_groups(optimizer, critic):
        for group in groups_of_critic(critic, trainer):
            optimizer.add_param_group(group)


def groups_of_critic(critic: nn.Module, trainer: LenVMPPOTrainer) -> list[dict]:
    """The critic's weights that learn as parameter groups of an optimizer; arguments as of [`add_critic_groups`]."""
    args = trainer.args
    named = [(name, weight) for name, weight in critic.named_parameters() if weight.requires_grad]
    decayed = set(trainer.get_decay_parameter_names(critic))
    own = args.weight_decay if args.critic_weight_decay is None else args.critic_weight_decay
    return [
        {
            "params": [weight for name, weight in named if (name in decayed) == wanted],
            "lr": args.critic_learning_rate,
            "weight_decay": weight_decay,
        }
        for weight_decay, wanted in ((own, True), (0.0, False))
    ]


def critic_groups(optimizer: torch.optim.Optimizer, critic: nn.Module) -> list[int]:
    """Which parameter groups of an optimizer hold weights of the critic."""
    own = {id(weight) for weight in critic.parameters()}
    groups = enumerate(optimizer.param_groups)
    return [index for index, group in groups if any(id(weight) in own for weight in group["params"])]


def set_critic_schedule(scheduler: LambdaLR, critic: nn.Module, trainer: LenVMPPOTrainer, steps: int) -> None:
    """Let the critic's groups follow `critic_lr_scheduler_type` instead of the policy's schedule.

    Args:
        scheduler (`torch.optim.lr_scheduler.LambdaLR`): of the run, which has made no step.
        critic (`torch.nn.Module`), trainer ([`LenVMPPOTrainer`]): of the run.
        steps (`int`): optimizer steps of the run.

    Raises:
        `ValueError`: the policy's schedule is none of the step alone.
    """
    args = trainer.args
    if args.critic_lr_scheduler_type == AS_POLICY:
        return
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"critic_lr_scheduler_type='{args.critic_lr_scheduler_type}' goes beside a schedule that follows from the "
            f"step, and lr_scheduler_type='{args.lr_scheduler_type}' reacts to what is measured: leave one of them out."
        )
    alone = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    own = get_scheduler(args.critic_lr_scheduler_type, alone, args.get_warmup_steps(steps), steps)
    for index in critic_groups(scheduler.optimizer, critic):
        scheduler.lr_lambdas[index] = own.lr_lambdas[0]
        rate = scheduler.base_lrs[index] * own.lr_lambdas[0](0)
        scheduler.optimizer.param_groups[index]["lr"] = scheduler._last_lr[index] = rate


class CriticUpdates(TrainerCallback):
    """What an optimizer step is for a critic: its gradient is clipped by itself, and cleared; where
    `critic_updates_per_step` is above 1, it learns from the same mini-batch again, alone.

    Args:
        critic (`torch.nn.Module`): placed.
        trainer ([`LenVMPPOTrainer`]): of the run.
    """

    def __init__(self, critic: nn.Module, trainer: LenVMPPOTrainer):
        self.critic, self.trainer = critic, trainer
        self.own: CriticOptimizer | None = None
        self._micro_batches: list[dict] = []

    def take_optimizer(self) -> None:
        """Make an optimizer of the critic's own, once, or put its weights into the one of the run, where that takes
        them."""
        trainer = self.trainer
        if not is_sharded(trainer):
            add_critic_groups(trainer.optimizer, self.critic, trainer)
        elif self.own is None:
            self.own = CriticOptimizer(self.critic, groups_of_critic(self.critic, trainer), trainer)

    def take_schedule(self, steps: int) -> None:
        """Set the critic's schedule, where it is not the one of the run, whose number of optimizer steps this is."""
        args, trainer = self.trainer.args, self.trainer
        if self.own is None:
            set_critic_schedule(trainer.lr_scheduler, self.critic, trainer, steps)
            return
        as_policy = args.critic_lr_scheduler_type == AS_POLICY
        kind = args.lr_scheduler_type if as_policy else args.critic_lr_scheduler_type
        self.own.follow(kind, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs if as_policy else None)

    def keep(self, inputs: dict) -> None:
        """Take in a micro-batch of the optimizer step under way."""
        if self.trainer.args.critic_updates_per_step > 1:
            self._micro_batches.append(inputs)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Called by the Trainer after the step of the policy, and before the schedule goes on."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if self.own is not None:
            self.own.optimizer.step()
        optimizer = trainer.optimizer if self.own is None else self.own.optimizer
        group = optimizer.param_groups[critic_groups(optimizer, self.critic)[0]]
        # As the Trainer logs the policy's: the last one.
        trainer._metrics["train"]["critic/learning_rate"] = [group["lr"]]
        micro_batches, self._micro_batches = self._micro_batches, []
        if micro_batches:
            trainer.model.zero_grad()
        for _ in range(args.critic_updates_per_step - 1):
            self.critic.zero_grad()
            trainer.begin_update()
            for inputs in micro_batches:
                with trainer.compute_loss_context_manager():
                    loss = args.vf_coef * trainer._value_loss(inputs, is_last=inputs is micro_batches[-1])
                # DeepSpeed would make a step of the policy's.
                (accelerator.backward if self.own is None else torch.Tensor.backward)(loss)
            if self.own is None:
                accelerator.unscale_gradients()
            self.clip()
            optimizer.step()
        # What comes next is another update, also where nothing is read before.
        trainer.begin_update()
        if self.own is not None:
            self.own.schedule.step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Called by the Trainer, which clears the gradients of the model that it knows."""
        self.critic.zero_grad()

    def clip(self) -> None:
        """Scale the gradient down to its bound; it has been unscaled (AMP)."""
        args = self.trainer.args
        bound = args.max_grad_norm if args.critic_max_grad_norm is None else args.critic_max_grad_norm
        if self.own is None:
            norm = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), bound or math.inf).detach()
        else:
            self.own.average_gradients()
            norm = self.own.clip(bound or math.inf)
        self.trainer.step_metrics.mean("critic/grad_norm", norm.view(1), torch.ones_like(norm).view(1))
