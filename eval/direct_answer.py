"""Can the sandbox's policy learn to do without steps? GRPO on prompts that make it answer at once.

    python -m eval.direct_answer

Every prompt ends in the answer token, so the completion is a value and the end. If a network of this size could learn
the chain without writing it down, this would teach it. Prints accuracy per difficulty before and after, beside chance.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, HfArgumentParser

from eval.statistics import mean_interval
from lenvm_rl.rollouts import atomic_file
from lenvm_rl.sampling import sample_rollouts
from lenvm_rl.sandbox import DIFFICULTIES, distinct_problems, sandbox_tokenizer
from lenvm_rl.sandbox.task import ANSWER, EOS, MODULUS
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer


@dataclass
class DirectAnswerArguments:
    """Which policy is trained to answer at once, and for how long."""

    policy: str = field(default="outputs/sandbox/policy", metadata={"help": "The sandbox's fitted policy."})
    steps: int = field(default=100, metadata={"help": "GRPO steps."})
    batch_size: int = field(default=256, metadata={"help": "Completions per step."})
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate."})
    num_prompts: int = field(default=400, metadata={"help": "Evaluation prompts, all difficulties alike."})
    num_samples: int = field(default=4, metadata={"help": "Completions per evaluation prompt."})
    seed: int = field(default=0, metadata={"help": "Seed."})
    output_dir: str = field(default="outputs/direct_answer", metadata={"help": "Where to write the result."})


def direct_reward(completion_ids: list[list[int]], answer: list[str], **columns: object) -> list[float]:
    """1 for a completion that is the right value and the end, else 0."""
    tokenizer = sandbox_tokenizer()
    right = [tokenizer.convert_tokens_to_ids([value, EOS]) for value in answer]
    return [float(list(ids) == target) for ids, target in zip(completion_ids, right, strict=True)]


def direct_prompts(count: int, seed: int, split: str) -> Dataset:
    """Prompts that end in the answer token, stratified by difficulty."""
    problems = distinct_problems(count, seed, split)
    return Dataset.from_list(
        [{"prompt": f"{p.prompt} {ANSWER}", "answer": p.answer, "difficulty": p.difficulty} for p in problems]
    )


def accuracy(model: torch.nn.Module, args: DirectAnswerArguments) -> dict[int, dict[str, float]]:
    """Accuracy per difficulty with a 95 % interval over prompts."""
    prompts = direct_prompts(args.num_prompts, args.seed, "evaluation")
    records = sample_rollouts(
        model,
        sandbox_tokenizer(),
        prompts["prompt"][:],
        num_samples=args.num_samples,
        max_new_tokens=2,
        batch_size=512,
        seed=args.seed,
        extra_columns={name: prompts[name][:] for name in ("answer", "difficulty")},
    )
    columns = {
        name: [record[name] for record in records] for name in ("completion_ids", "answer", "difficulty", "group")
    }
    correct = np.array(direct_reward(columns["completion_ids"], columns["answer"]))
    level, group = np.array(columns["difficulty"]), np.array(columns["group"])
    found = {}
    for difficulty in DIFFICULTIES:
        chosen = level == difficulty
        result = mean_interval(correct[chosen], group[chosen], seed=args.seed)
        found[difficulty] = {"estimate": result.estimate, "low": result.low, "high": result.high}
    return found


def main(args: DirectAnswerArguments) -> dict[str, dict[int, dict[str, float]]]:
    """Measure, train, measure again, and print both."""
    torch.set_num_threads(1)  # as fast as two at this size, and the same numbers on any number of cores
    model = AutoModelForCausalLM.from_pretrained(args.policy).eval()
    report = {"before": accuracy(model, args)}
    trainer = LenVMGRPOTrainer(
        model=model,
        reward_funcs=direct_reward,
        processing_class=sandbox_tokenizer(),
        train_dataset=direct_prompts(2048, args.seed, "train"),
        args=LenVMGRPOConfig(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            num_generations=args.num_generations,
            shuffle_dataset=False,
            max_completion_length=2,
            temperature=1.0,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            beta=0.0,
            loss_type="dr_grpo",
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            seed=args.seed,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    report["after"] = accuracy(trainer.model.eval(), args)
    table = Table(title=f"answering at once, {args.steps} GRPO steps of {args.batch_size}, seed {args.seed}")
    for name in ("operations", "before", "after", "chance"):
        table.add_column(name, justify="right")
    for difficulty in DIFFICULTIES:
        cells = [
            f"{r['estimate']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            for r in (report["before"][difficulty], report["after"][difficulty])
        ]
        table.add_row(str(difficulty), *cells, f"{1 / MODULUS:.3f}")
    Console(width=120).print(table)
    with atomic_file(Path(args.output_dir) / "direct_answer.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    return report


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(HfArgumentParser(DirectAnswerArguments).parse_args_into_dataclasses()[0])
