"""Refresh: the frozen length value model is re-fitted on recent completions between two phases, and frozen again.

The policy drifts away from the one that the model was fitted on. At lambda 1 and ungated a stale model costs variance
only; with a gate, with lambda below 1 and at cuts its error reaches the gradient (docs/mathematics.md). A re-fit before
completions are sampled, on completions of earlier batches, leaves it a baseline for those to come. It is value
pretraining ([`lenvm_rl.pretraining`]) in small: the same rows, the same targets, the same loss.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import Tensor

from lenvm_rl.files import atomic_file
from lenvm_rl.modeling.length_value_model import LengthValueModel, is_shared
from lenvm_rl.pretraining.batches import LengthValueCollator
from lenvm_rl.pretraining.loss import IGNORED, length_value_loss, value_targets
from lenvm_rl.returns import wide_dtype
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.streams import Completions

logger = logging.getLogger(__name__)

REFRESH_FOLDER, MODEL_FOLDER = "refresh", "length_value_model"
# As `transformers.Trainer` does by default; the return lies in (-1, 0), so the gradient is small anyway.
MAX_GRAD_NORM = 1.0
# Completions to an optimizer step, of all processes.
BATCH_SIZE = 64
# One completion to a row: what a run samples is not packed.
COLLATE = LengthValueCollator(truncated="bootstrap", packing=False)

Rollout = dict[str, Any]
# What is held in arrays, by their type code.
_TOKENS = {"prompt_ids": "i", "completion_ids": "i", "action_mask": "b"}


def rollouts_of(batch: dict, completions: Completions, correct: Tensor) -> list[Rollout]:
    """The completions of a generation batch as rollouts; those that were left out of the loss have no tokens, and go.

    Args:
        batch (`dict`): with `prompt_ids`, `prompt_mask`, `completion_ids`.
        completions ([`~lenvm_rl.trainers.streams.Completions`]): of the batch.
        correct (`torch.BoolTensor` of shape `(B,)`): of the batch.

    Returns:
        `list[dict]`: the columns of a rollout that [`~lenvm_rl.pretraining.LengthValueCollator`] reads, and `correct`.
        Tokens are arrays of 4 bytes each, since many completions are kept.
    """
    parts = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids")]
    parts += [completions.mask, completions.actions, completions.finished.unsqueeze(1), correct.unsqueeze(1)]
    # One transfer from the device for all of them.
    whole = torch.cat([part.long() for part in parts], dim=1).cpu()
    prompts, exists, ids, mask, actions, finished, correct = whole.split([part.shape[1] for part in parts], dim=1)
    exists, mask = exists.bool(), mask.bool()
    return [
        {
            "prompt_ids": array("i", prompts[row][exists[row]].tolist()),
            "completion_ids": array("i", ids[row][mask[row]].tolist()),
            "action_mask": array("b", actions[row][mask[row]].tolist()),
            "finish_reason": "stop" if finished[row] else "length",
            "group": 0,
            "correct": bool(correct[row]),
        }
        for row in range(len(mask))
        if bool(mask[row].any())
    ]


def _stored(rollout: Rollout) -> Rollout:
    return {name: list(value) if name in _TOKENS else value for name, value in rollout.items()}


def squared_errors(
    placed: Callable, rollouts: list[Rollout], gamma: float, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The sum of ``(V(s_t) - G_t)^2`` over the tokens that the policy chose, and how many there are.

    ``G_t`` is the realised return; after a cut it goes on with ``V(s_L)``, without gradient.
    """
    batch = {name: tensor.to(device) for name, tensor in COLLATE(rollouts).items()}
    values = placed(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).values
    targets = value_targets(values, batch["labels"], batch["endings"], gamma, ends=batch.get("ends"))
    scored = batch["labels"] != IGNORED
    return length_value_loss(values, targets, scored, num_items=1), scored.sum()


def refit(
    model: LengthValueModel,
    placed: Callable,
    rollouts: list[Rollout],
    args: LenVMConfig,
    *,
    seed: int,
    chunk_size: int,
    num_processes: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> list[float]:
    """Fit a length value model to completions, every process to its own with the gradients of all.

    Args:
        model ([`LengthValueModel`]), placed: changed in place, and frozen again; as the run calls it.
        rollouts (`list[dict]`): of this process.
        args ([`~lenvm_rl.trainers.config.LenVMConfig`]), seed (`int`): how, and in which order.
        chunk_size (`int`), num_processes (`int`), reduce: completions per forward; as in
            [`~lenvm_rl.trainers.streams.Processes`].

    Returns:
        `list[float]`: the loss of every optimizer step, a mean over its tokens, before the step.
    """
    device = model.device
    per_process = max(1, BATCH_SIZE // num_processes)
    # Processes may hold different numbers of completions, and take the same number of steps.
    total = int(reduce(torch.tensor([float(len(rollouts))], device=device)).item())
    steps = max(1, -(-total // (per_process * num_processes)))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with model.thawed():
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=args.refresh_learning_rate, weight_decay=0.0)
        for part in torch.randperm(len(rollouts), generator=generator).tensor_split(steps):
            # A step's rows are drawn at random, its chunks are by length.
            drawn = sorted((rollouts[i] for i in part.tolist()), key=lambda one: len(one["completion_ids"]))
            optimizer.zero_grad()
            sums = torch.zeros(2, device=device, dtype=wide_dtype(device))
            for first in range(0, len(drawn), chunk_size):
                errors, count = squared_errors(placed, drawn[first : first + chunk_size], model.config.gamma, device)
                errors.backward()
                sums += torch.stack([errors.detach().to(sums.dtype), count.to(sums.dtype)])
            loss, tokens = reduce(sums).tolist()
            tokens = max(tokens, 1.0)
            for weight in weights:
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = reduce(gradient) / tokens
            torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            optimizer.step()
            losses.append(loss / tokens)
        optimizer.zero_grad()
    return losses


class LengthValueRefresh:
    """The refresh of a run: its recent completions, when a re-fit is due, and its state in checkpoints.

    Raises:
        `ValueError`: the model's weights are not float32, in which small steps would be lost; or the run is sharded, or
            in float16.
    """

    def __init__(self, model: LengthValueModel, args: LenVMConfig, accelerator: Accelerator):
        check_can_refresh(model, args, accelerator)
        self.model, self.args, self._accelerator = model, args, accelerator
        share = -(-args.refresh_completions // accelerator.num_processes)
        self.rollouts: deque[Rollout] = deque(maxlen=share)
        self.last_step = 0

    def add(self, batch: dict, completions: Completions, correct: Tensor) -> None:
        """Take in a generation batch of this process, for refreshes to come."""
        self.rollouts.extend(rollouts_of(batch, completions, correct))

    def _sum(self, sums: Tensor) -> Tensor:
        return self._accelerator.reduce(sums, reduction="sum")

    def run_if_due(self, placed: Callable, step: int, chunk_size: int) -> dict[str, float]:
        """Re-fit the model if `refresh_steps` have passed since the last time.

        Returns:
            `dict[str, float]`: empty if it is not due; otherwise `refresh/completions`, `refresh/loss_first` and
            `refresh/loss_last`, of the first and the last optimizer step of the re-fit.
        """
        args = self.args
        if step < self.last_step:
            # `train` was called again, and counts anew.
            self.last_step = 0
        if step - self.last_step < args.refresh_steps:
            return {}
        self.last_step = step
        rollouts = [one for one in self.rollouts if one["correct"] or not args.refresh_only_correct]
        count = torch.tensor([float(len(rollouts))], device=self.model.device)
        completions = int(self._sum(count).item())
        if completions == 0:
            logger.warning(
                "refresh at step %d: none of the last %d completions is correct, so the length value model stays as it "
                "is", step, len(self.rollouts),
            )  # fmt: skip
            return {"refresh/completions": 0.0}
        losses = refit(
            self.model,
            placed,
            rollouts,
            args,
            seed=args.seed + step,
            chunk_size=chunk_size,
            num_processes=self._accelerator.num_processes,
            reduce=self._sum,
        )
        return {
            "refresh/completions": float(completions),
            "refresh/loss_first": losses[0],
            "refresh/loss_last": losses[-1],
        }

    def save(self, checkpoint: str, is_main_process: bool) -> None:
        """Write the model (once) and the completions (of every process) into a checkpoint."""
        folder = os.path.join(checkpoint, REFRESH_FOLDER)
        with atomic_file(self._rollouts_file(folder)) as file:
            pq.write_table(pa.Table.from_pylist([_stored(one) for one in self.rollouts]), file)
        if is_main_process:
            self.model.save_pretrained(os.path.join(folder, MODEL_FOLDER))

    def state_dict(self) -> dict[str, int]:
        """When the last re-fit was."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        """Go on from a state; [`LengthValueRefresh.load`] has found that there is one."""
        self.last_step = state["last_step"]

    def load_model(self, checkpoint: str) -> None:
        """Take the length value model of a checkpoint."""
        base = self.model.backbone if is_shared(self.model) else None
        saved = LengthValueModel.from_pretrained(os.path.join(checkpoint, REFRESH_FOLDER, MODEL_FOLDER), base=base)
        self.model.load_state_dict(saved.state_dict())

    def load(self, checkpoint: str) -> None:
        """Go on from a checkpoint.

        Raises:
            `FileNotFoundError`: it was written without refresh, or by fewer processes.
        """
        folder = os.path.join(checkpoint, REFRESH_FOLDER)
        path = self._rollouts_file(folder)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"The checkpoint '{checkpoint}' has no file '{os.path.relpath(path, checkpoint)}': it was written with "
                "refresh_steps=0, or by fewer processes. Resume with the settings of that run, or start a new run from "
                "its weights."
            )
        self.load_model(checkpoint)
        self.rollouts.clear()
        self.rollouts.extend(
            {name: array(_TOKENS[name], value) if name in _TOKENS else value for name, value in one.items()}
            for one in pq.read_table(path).to_pylist()
        )

    def _rollouts_file(self, folder: str) -> str:
        return os.path.join(folder, f"completions_rank{self._accelerator.process_index}.parquet")


def check_can_refresh(model: LengthValueModel, args: LenVMConfig, accelerator: Accelerator) -> None:
    """Raise a `ValueError` where a re-fit between phases is not possible, see [`LengthValueRefresh`]."""
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        raise ValueError(
            f"refresh_steps={args.refresh_steps} trains the length value model beside the policy, which is not done "
            "under FSDP or DeepSpeed: launch with DDP, or set refresh_steps=0 and pretrain again now and then."
        )
    if args.fp16:
        raise ValueError("refresh_steps with fp16=True would lose the small gradients of values: use bf16, or neither.")
    if args.rollout_guidance is not None:
        raise ValueError(
            "refresh_steps would fit the length value model to guided completions, which are not the policy's: leave "
            "rollout_guidance or refresh_steps out."
        )
    small = sorted({str(weight.dtype) for weight in model.parameters() if weight.dtype != torch.float32})
    if small:
        raise ValueError(
            f"refresh_steps={args.refresh_steps} trains the length value model, whose weights are {', '.join(small)}: "
            "load it in float32 (`LengthValueModel.from_pretrained(path, dtype='float32')`)."
        )
