"""The optimizer of a critic in a run under FSDP2 or DeepSpeed, whose own one knows the policy's weights alone.

What the critic adds to a decoder is whole in every process, and its gradients are averaged over the processes once per
optimizer step. A decoder of its own is cut up by FSDP2, as accelerate cuts up the policy, which averages its gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler
from trl import GRPOTrainer


class CriticOptimizer:
    """An optimizer of the kind that the run has, of the critic's weights that learn, and its schedule.

    Args:
        critic (`torch.nn.Module`): placed.
        groups (list of `dict`): parameter groups, as an optimizer takes them.
        trainer (`trl.GRPOTrainer`): of the run.
    """

    def __init__(self, critic: nn.Module, groups: list[dict], trainer: GRPOTrainer):
        args = trainer.args
        kind, options = trainer.optimizer_cls_and_kwargs or Trainer.get_optimizer_cls_and_kwargs(args, critic)
        # What is cut up and what is not goes apart: one operation takes a group as a whole.
        parted = [
            {**group, "params": [weight for weight in group["params"] if isinstance(weight, DTensor) == cut]}
            for group in groups
            for cut in (True, False)
        ]
        self.optimizer: torch.optim.Optimizer = kind([group for group in parted if group["params"]], **options)
        self._reduce: Callable = trainer.accelerator.reduce
        self.schedule = None

    @property
    def _weights(self) -> list[Tensor]:
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def follow(self, kind: str, warmup: int, steps: int, options: dict[str, Any] | None) -> None:
        """Set the schedule, see `transformers.get_scheduler`; a `ValueError` unless it follows from the step alone."""
        self.schedule = get_scheduler(kind, self.optimizer, warmup, steps, scheduler_specific_kwargs=options)
        if not isinstance(self.schedule, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type='{kind}' reacts to what is measured of the policy, and under FSDP or DeepSpeed a "
                "critic has a schedule of its own: set critic_lr_scheduler_type, or another lr_scheduler_type."
            )

    def average_gradients(self) -> None:
        """Average over the processes the gradients that no engine averages."""
        found = [weight.grad for weight in self._weights if weight.grad is not None and not isinstance(weight, DTensor)]
        if found:
            flat = self._reduce(torch.cat([gradient.flatten() for gradient in found]), reduction="mean")
            for gradient, mean in zip(found, flat.split([each.numel() for each in found]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def clip(self, bound: float) -> Tensor:
        """Scale the gradients down to a norm of `bound` where it is larger; gives back what it was."""
        found = [weight.grad for weight in self._weights if weight.grad is not None]
        cut = [gradient.to_local() for gradient in found if isinstance(gradient, DTensor)]
        squares = sum((gradient.square().sum() for gradient in found if not isinstance(gradient, DTensor)), 0.0)
        if cut:
            squares = squares + self._reduce(sum(gradient.square().sum() for gradient in cut), reduction="sum")
        norm = torch.as_tensor(squares).sqrt()
        # As `torch.nn.utils.clip_grad_norm_`.
        scale = (bound / (norm + 1e-6)).clamp(max=1.0)
        for gradient in found:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)
        return norm

    def save(self, folder: str, process: int) -> None:
        """Write what this process holds of the state."""
        state = self.optimizer.state_dict()
        state["state"] = {
            index: {name: value.to_local() if isinstance(value, DTensor) else value for name, value in each.items()}
            for index, each in state["state"].items()
        }
        os.makedirs(folder, exist_ok=True)
        torch.save({"optimizer": state, "schedule": self.schedule.state_dict()}, _file(folder, process))

    def load(self, folder: str, process: int) -> None:
        """Take up what [`~CriticOptimizer.save`] wrote in a run of as many processes."""
        saved = torch.load(_file(folder, process), map_location="cpu", weights_only=True)
        weights = self._weights
        for index, state in saved["optimizer"]["state"].items():
            weight = weights[index]
            if isinstance(weight, DTensor):
                local = weight.to_local()
                for name, value in state.items():
                    if value.shape == local.shape and value.dim():
                        state[name] = DTensor.from_local(
                            value.to(local.device), weight.device_mesh, weight.placements,
                            shape=weight.shape, stride=weight.stride(),
                        )  # fmt: skip
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])


def _file(folder: str, process: int) -> str:
    return os.path.join(folder, f"critic_optimizer_rank{process}.pt")
