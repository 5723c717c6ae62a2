"""How fast value pretraining is: this trainer, a padded loop with full logits, and the bare backbone.

- `trainer`: [`~lenvm_rl.pretraining.LengthValueTrainer`] as it is, optimizer, data loading and all.
- `shared`: the same with `share_prompts`.
- `padded`: completions padded to the longest of their batch, a forward with the logits of the whole vocabulary and
  every hidden state, a value head on the last of those, backward, AdamW.
- `limit`: forward and backward of the backbone alone, without head, loss or optimizer, on rows full of tokens that are
  as long as the trainer's.

Tokens are those that are processed, padding not counted; a prompt that several completions share counts once.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers.hf_argparser import HfArg

from eval.report import Column
from eval.speed.harness import GAMMA, WARM_UP, Measurement, Program, Sizes, make_policy, now, random_ids
from eval.speed.trainers import Clock, common_arguments
from lenvm_rl.modeling.heads import LengthValueHead
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.loss import IGNORED, length_value_loss
from lenvm_rl.pretraining.trainer import LengthValueCollator, LengthValueTrainer, LengthValueTrainingArguments
from lenvm_rl.returns import discounted_return

CASES = {
    "trainer": "LengthValueTrainer",
    "shared": "LengthValueTrainer, share_prompts",
    "padded": "padded loop, full logits",
    "limit": "bare backbone, dense",
}
LONGEST = 256


@dataclass
class PretrainingSizes(Sizes):
    """A model and random, ragged rollouts."""

    prompts: int = HfArg(default=64, help="Random prompts.")
    samples: int = HfArg(default=16, help="Completions of each.")
    prompt_tokens: int = HfArg(default=32, help="Tokens of a prompt: half to twice as many.")
    median_tokens: int = HfArg(default=48, help="Median length of completions, in tokens.")
    batch: int = HfArg(default=64, help="Completions in a batch.")
    updates: int = HfArg(default=20, help="Optimizer steps that are timed each time.")


def make_rollouts(sizes: PretrainingSizes) -> list[dict]:
    """Ragged rollouts: lengths are log-normal, with a median of each prompt's own."""
    draw = torch.Generator().manual_seed(sizes.seed)

    def ids(count: int) -> list[int]:
        return torch.randint(2, sizes.vocab, (count,), generator=draw).tolist()

    rollouts = []
    for group in range(sizes.prompts):
        prompt = ids(max(1, round(sizes.prompt_tokens * 2.0 ** float(torch.rand((), generator=draw) * 2 - 1))))
        center, *spread = torch.randn(sizes.samples + 1, generator=draw).tolist()
        for each in spread:
            length = round(sizes.median_tokens * math.exp(0.5 * center + 0.4 * each))
            completion = [*ids(min(LONGEST, max(2, length)) - 1), 1]
            rollout = {"prompt_ids": prompt, "completion_ids": completion, "finish_reason": "stop", "group": group}
            rollouts.append(rollout)
    return rollouts


class _MeteredTrainer(LengthValueTrainer):
    """Remembers what its steps processed: tokens and completions."""

    def training_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`."""
        sequences = inputs["sequences"]
        tokens = inputs["blocks"].ge(0).sum() if "blocks" in inputs else (sequences[:, 2] + sequences[:, 5] - 1).sum()
        self.processed.append((int(tokens), len(sequences)))
        return super().training_step(model, inputs, *args, **kwargs)


def run_trainer(sizes: PretrainingSizes, share_prompts: bool) -> tuple[list[float], list[tuple[int, int]]]:
    """Optimizer steps of the trainer, one micro-batch each: when each ended, and what it processed."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = LengthValueTrainingArguments(
            **common_arguments(sizes, folder) | {"bf16": False},
            max_steps=sizes.updates + WARM_UP,
            share_prompts=share_prompts,
        )
        trainer = _MeteredTrainer(
            LengthValueModel.from_backbone(make_policy(sizes), gamma=GAMMA),
            args,
            train_dataset=Dataset.from_list(make_rollouts(sizes)),
            callbacks=[clock],
        )
        trainer.processed = []
        trainer.train()
    return clock.ends, trainer.processed


def padded_step(sizes: PretrainingSizes) -> Callable[[], tuple[int, int]]:
    """A step of a plain loop over random batches, each padded to its longest completion."""
    rollouts, policy = make_rollouts(sizes), make_policy(sizes).train()
    head = LengthValueHead(policy.config.hidden_size).to(policy.device)
    optimizer = torch.optim.AdamW([*policy.parameters(), *head.parameters()], lr=1e-5)
    collate, draw = LengthValueCollator(packing=False), torch.Generator().manual_seed(sizes.seed)

    def step() -> tuple[int, int]:
        chosen = torch.randperm(len(rollouts), generator=draw)[: sizes.batch].tolist()
        batch = {name: each.to(policy.device) for name, each in collate([rollouts[row] for row in chosen]).items()}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = policy(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
        targets = discounted_return(batch["labels"].clamp(min=0).float(), GAMMA)
        length_value_loss(-torch.sigmoid(head(hidden)), targets, batch["labels"] != IGNORED).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(batch["attention_mask"].sum()), len(chosen)

    return step


def limit_step(sizes: PretrainingSizes) -> Callable[[], tuple[int, int]]:
    """Forward and backward of the backbone on rows without padding, of the shape that the trainer's rows have."""
    rollouts, backbone = make_rollouts(sizes), make_policy(sizes).base_model
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(sizes.seed))
    rows, width = LengthValueCollator()([rollouts[row] for row in order[: sizes.batch].tolist()])["input_ids"].shape
    ids = random_ids(sizes, rows, width)

    def step() -> tuple[int, int]:
        backbone(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        backbone.zero_grad()
        return rows * width, 0

    return step


def measure_pretraining(case: str, sizes: PretrainingSizes) -> Measurement:
    """One of the cases, in this process, with completions per second beside it."""
    if case in ("trainer", "shared"):
        ends, processed = run_trainer(sizes, share_prompts=case == "shared")
    else:
        step = padded_step(sizes) if case == "padded" else limit_step(sizes)
        ends, processed = zip(*[(step(), now())[::-1] for _ in range(sizes.updates + WARM_UP)], strict=True)
    seconds = ends[-1] - ends[WARM_UP - 1]
    tokens, completions = (sum(column) for column in zip(*processed[WARM_UP:], strict=True))
    return Measurement(tokens, seconds, completions / seconds)


PRETRAINING = Program(
    "pretraining",
    __doc__,
    PretrainingSizes,
    CASES,
    measure_pretraining,
    {"time over backbone": "limit", "over padded loop": "padded"},
    [Column("completions/s", "count")],
)
