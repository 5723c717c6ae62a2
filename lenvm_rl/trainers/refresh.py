"""Refresh: the frozen length value model is re-fitted on recent completions between two phases, and frozen again.

The policy drifts away from the one that the model was fitted on. At lambda 1 and ungated a stale model costs variance
only; with a gate, with lambda below 1 and at cuts its error reaches the gradient (docs/mathematics.md). A re-fit before
completions are sampled, on completions of earlier batches, leaves it a baseline for those to come. It is the value
pretraining of arXiv 2604.27039, section 3.3, in small: a mean over tokens of the squared error of the discounted
return, cut completions going on with the model's own value.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lenvm_rl.advantages import length_advantage
from lenvm_rl.files import atomic_file
from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.length_value_model import LengthValueModel, is_shared
from lenvm_rl.returns import wide_dtype
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.streams import Completions

logger = logging.getLogger(__name__)

REFRESH_FOLDER = "refresh"
MODEL_FOLDER = "length_value_model"
# As `transformers.Trainer` does by default; the return lies in (-1, 0), so the gradient is small anyway.
MAX_GRAD_NORM = 1.0
# Completions to an optimizer step, of all processes.
BATCH_SIZE = 64


@dataclass(frozen=True)
class Row:
    """One completion, without padding.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(P,)`), completion_ids (`torch.LongTensor` of shape `(L,)`): tokens.
        actions (`torch.BoolTensor` of shape `(L,)`): where the policy chose the token.
        finished (`bool`): whether the last token ends the sequence.
        correct (`bool`): whether the gate's reward says so.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    actions: Tensor
    finished: bool
    correct: bool


def rows_of(batch: dict, completions: Completions, correct: Tensor) -> list[Row]:
    """The completions of a generation batch, on the CPU; those that were left out of the loss have no tokens, and go.

    Args:
        batch (`dict`): with `prompt_ids`, `prompt_mask`, `completion_ids`.
        completions ([`~lenvm_rl.trainers.streams.Completions`]): of the batch.
        correct (`torch.BoolTensor` of shape `(B,)`): of the batch.
    """
    prompt_ids, prompt_mask, completion_ids = (
        batch[name].cpu() for name in ("prompt_ids", "prompt_mask", "completion_ids")
    )
    mask, actions = completions.mask.cpu(), completions.actions.cpu()
    finished, correct = completions.finished.tolist(), correct.tolist()
    return [
        Row(
            prompt_ids[i][prompt_mask[i].bool()],
            completion_ids[i][mask[i]],
            actions[i][mask[i]],
            finished[i],
            correct[i],
        )
        for i in range(len(mask))
        if bool(mask[i].any())
    ]


def pad_rows(rows: list[Row], device) -> tuple[dict, Completions, Tensor]:
    """Rows as a batch of TRL's layout, what its completions are, and which are correct `(B,)`."""
    prompts = pad_sequence([row.prompt_ids for row in rows], batch_first=True, padding_side="left")
    sizes = torch.tensor([len(row.prompt_ids) for row in rows]).unsqueeze(1)
    prompt_mask = torch.arange(prompts.shape[1]) >= prompts.shape[1] - sizes
    ids = pad_sequence([row.completion_ids for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.completion_ids) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    actions = pad_sequence([row.actions for row in rows], batch_first=True)
    finished, correct = (torch.tensor([getattr(row, name) for row in rows]) for name in ("finished", "correct"))
    batch = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    mask, actions, finished, lengths = (tensor.to(device) for tensor in (mask, actions, finished, lengths))
    return batch, Completions(mask, actions, finished, lengths - finished.long()), correct.to(device)


def squared_errors(model, rows: list[Row], gamma: float, device) -> tuple[Tensor, Tensor]:
    """``(V(s_t) - G_t)^2`` of every token that the policy chose, and where there is one: two tensors `(B, T)`.

    ``G_t`` is the realised return; after a cut it goes on with ``V(s_L)``, without gradient.
    """
    batch, completions, _ = pad_rows(rows, device)
    values = -torch.sigmoid(completion_logits(model, **batch))
    with torch.no_grad():
        fixed = values.detach()
        advantage = length_advantage(
            fixed[:, :-1], completions.mask, gamma, 1.0, completions.following(fixed), completions.actions
        )
        returns = fixed[:, :-1] + advantage
    errors = torch.where(completions.actions, (values[:, :-1] - returns).square(), 0.0)
    return errors, completions.actions


def refit(
    model: LengthValueModel,
    placed,
    rows: list[Row],
    args: LenVMConfig,
    *,
    seed: int,
    chunk_size: int,
    num_processes: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> list[float]:
    """Fit a length value model to completions, every process to its own with the gradients of all.

    Args:
        model ([`LengthValueModel`]): changed in place; frozen as before when it is done.
        placed (`Callable`): the same model as the run calls it, under its mixed precision.
        rows (`list[Row]`): of this process.
        args ([`~lenvm_rl.trainers.config.LenVMConfig`]): how.
        seed (`int`): of the order.
        chunk_size (`int`): completions per forward.
        num_processes (`int`, *optional*, defaults to `1`): how many take part.
        reduce (`Callable`, *optional*): sums a tensor over processes; a single process needs none.

    Returns:
        `list[float]`: the loss of every optimizer step, a mean over its tokens, before the step.
    """
    device = model.device
    per_process = max(1, BATCH_SIZE // num_processes)
    # Processes may hold different numbers of completions, and take the same number of steps.
    total = int(reduce(torch.tensor([float(len(rows))], device=device)).item())
    steps = max(1, -(-total // (per_process * num_processes)))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with model.thawed():
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=args.refresh_learning_rate, weight_decay=0.0)
        for part in torch.randperm(len(rows), generator=generator).tensor_split(steps):
            drawn = [rows[i] for i in part.tolist()]
            losses.append(_step(placed, drawn, model.config.gamma, optimizer, weights, chunk_size, reduce))
        optimizer.zero_grad()
    return losses


def _step(placed, rows, gamma, optimizer, weights, chunk_size, reduce) -> float:
    """One optimizer step on the token mean over all processes; its rows were drawn at random, its chunks by length."""
    device = weights[0].device
    optimizer.zero_grad()
    rows = sorted(rows, key=lambda row: len(row.completion_ids))
    total = torch.zeros(2, device=device, dtype=wide_dtype(device))
    for first in range(0, len(rows), chunk_size):
        errors, actions = squared_errors(placed, rows[first : first + chunk_size], gamma, device)
        errors.sum().backward()
        total += torch.stack([errors.detach().to(total.dtype).sum(), actions.to(total.dtype).sum()])
    loss, tokens = reduce(total).tolist()
    tokens = max(tokens, 1.0)
    for weight in weights:
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad = reduce(gradient) / tokens
    torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
    optimizer.step()
    return loss / tokens


class LengthValueRefresh:
    """The refresh of a run: its recent completions, when a re-fit is due, and its state in checkpoints.

    Args:
        model ([`LengthValueModel`]): of the run, unwrapped.
        args ([`~lenvm_rl.trainers.config.LenVMConfig`]): of the run.
        accelerator (`accelerate.Accelerator`): of the run.

    Raises:
        `ValueError`: the model's weights are not float32, in which small steps would be lost; or the run is sharded, or
            in float16.
    """

    def __init__(self, model: LengthValueModel, args: LenVMConfig, accelerator):
        check_can_refresh(model, args, accelerator)
        self.model, self.args, self._accelerator = model, args, accelerator
        share = -(-args.refresh_completions // accelerator.num_processes)
        self.rows: deque[Row] = deque(maxlen=share)
        self.last_step = 0

    def add(self, batch: dict, completions: Completions, correct: Tensor) -> None:
        """Take in a generation batch of this process, for refreshes to come."""
        self.rows.extend(rows_of(batch, completions, correct))

    def _sum(self, sums: Tensor) -> Tensor:
        return self._accelerator.reduce(sums, reduction="sum")

    def run_if_due(self, placed, step: int, chunk_size: int) -> dict[str, float]:
        """Re-fit the model if `refresh_steps` have passed since the last time.

        Args:
            placed (`Callable`): the model as the run calls it.
            step (`int`): optimizer steps of the run so far.
            chunk_size (`int`): completions per forward.

        Returns:
            `dict[str, float]`: empty if it is not due; otherwise `refresh/completions`, `refresh/loss_first` and
            `refresh/loss_last`, of the first and the last optimizer step of the re-fit.
        """
        args = self.args
        if step - self.last_step < args.refresh_steps:
            return {}
        self.last_step = step
        rows = [row for row in self.rows if row.correct or not args.refresh_only_correct]
        count = torch.tensor([float(len(rows))], device=self.model.device)
        completions = int(self._sum(count).item())
        if completions == 0:
            logger.warning(
                "refresh at step %d: none of the last %d completions is correct, so the length value model stays as it "
                "is", step, len(self.rows),
            )  # fmt: skip
            return {"refresh/completions": 0.0}
        losses = refit(
            self.model,
            placed,
            rows,
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
        with atomic_file(self._rows_file(folder)) as file:
            file.write(save(_as_tensors(list(self.rows))))
        if is_main_process:
            self.model.save_pretrained(os.path.join(folder, MODEL_FOLDER))

    def state_dict(self) -> dict[str, int]:
        """When the last re-fit was."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        """Go on from a state; [`LengthValueRefresh.load`] has found that there is one."""
        self.last_step = state["last_step"]

    def load(self, checkpoint: str) -> None:
        """Go on from a checkpoint.

        Raises:
            `FileNotFoundError`: it was written without refresh, or by fewer processes.
        """
        folder = os.path.join(checkpoint, REFRESH_FOLDER)
        if not os.path.isfile(self._rows_file(folder)):
            raise FileNotFoundError(
                f"The checkpoint '{checkpoint}' has no file '{os.path.relpath(self._rows_file(folder), checkpoint)}': "
                "it was written with refresh_steps=0, or by fewer processes. Resume with the settings of that run, or "
                "start a new run from its weights."
            )
        base = self.model.backbone if is_shared(self.model) else None
        saved = LengthValueModel.from_pretrained(os.path.join(folder, MODEL_FOLDER), base=base)
        self.model.load_state_dict(saved.state_dict())
        self.rows.clear()
        self.rows.extend(_from_tensors(load_file(self._rows_file(folder))))

    def _rows_file(self, folder: str) -> str:
        return os.path.join(folder, f"completions_rank{self._accelerator.process_index}.safetensors")


def check_can_refresh(model: LengthValueModel, args: LenVMConfig, accelerator) -> None:
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


def _as_tensors(rows: list[Row]) -> dict[str, Tensor]:
    empty = torch.zeros(0, dtype=torch.long)
    return {
        "prompt_ids": torch.cat([empty, *(row.prompt_ids for row in rows)]),
        "prompt_lengths": torch.tensor([len(row.prompt_ids) for row in rows], dtype=torch.long),
        "completion_ids": torch.cat([empty, *(row.completion_ids for row in rows)]),
        "completion_lengths": torch.tensor([len(row.completion_ids) for row in rows], dtype=torch.long),
        "actions": torch.cat([empty.bool(), *(row.actions for row in rows)]),
        "finished": torch.tensor([row.finished for row in rows], dtype=torch.bool),
        "correct": torch.tensor([row.correct for row in rows], dtype=torch.bool),
    }


def _from_tensors(tensors: dict[str, Tensor]) -> list[Row]:
    prompts = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
    lengths = tensors["completion_lengths"].tolist()
    completions, actions = tensors["completion_ids"].split(lengths), tensors["actions"].split(lengths)
    flags = zip(tensors["finished"].tolist(), tensors["correct"].tolist(), strict=True)
    return [Row(*parts, *both) for *parts, both in zip(prompts, completions, actions, flags, strict=True)]
