"""How a length value model's error depends on its size, its data and its training, on the sandbox.

    python recipes/scaling_study.py --policy outputs/policy --output_dir outputs/scaling

Along model size, prompts and samples per prompt, and in three ablations of the paper (arXiv 2604.27039, section 5:
shuffled or length-grouped optimiser steps, gamma, precision of the head), every model sees the same number of
tokens: what differs is what an axis is named after, not the time in training. All are measured on the same held-out
prompts, in the same space. Each result is kept in `<output_dir>/cells`; killed and started again, the study goes on.
At the end, and at any time with `--report true`, `results.md` and two figures are written. `--boundary true` trains one
model for longer and measures its error at the prompt beside the noise of what it is measured against.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from lenvm_rl.files import atomic_file
from lenvm_rl.pretraining.trainer import (
    LengthValueTrainer,
    LengthValueTrainingArguments,
    completion_lengths,
    fit_gamma_to_rollouts,
    make_length_value_model,
)
from lenvm_rl.programs import choose_threads, run_program
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.local import sample_to_file
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.sandbox import PolicySettings, distinct_problems, fit_policy
from recipes.command_line import ProgramParser
from recipes.scaling_cells import Cell, GroupedTrainer, RoundedHead, make_axes, rate_factor
from recipes.scaling_report import write_report
from recipes.stage_records import run_stage

logger = logging.getLogger(__name__)
console = Console(width=120, highlight=False)

# What is kept of an evaluation, without the Trainer's prefix.
METRICS = (
    "loss",
    "explained_variance",
    "kendall_tau",
    "consistent_mre",
    *(f"length_mre_at_{point}" for point in (0, 25, 50, 75)),
    *(f"length_mae_at_{point}" for point in (0, 25, 50, 75)),
)
# The same of a model that is measured at the prompt.
BOUNDARY_METRICS = ("half_mre", "reference_half_mre", "consistent_mre", "consistent_prompts", "length_mre_at_0")


@dataclass
class ScalingArguments:
    """Sizes of the study. The defaults take about twelve minutes on one core."""

    output_dir: str = HfArg(default="outputs/scaling", help="Where everything is written.")
    policy: str | None = HfArg(
        default=None, help="The sandbox's policy: a folder. Default: one is fitted, which takes minutes."
    )
    policy_tokens: int = HfArg(default=5_000_000, help="Tokens that a policy is fitted on.")
    train_tokens: int = HfArg(
        default=400_000, help="Tokens that every model is trained on, prompts counted, padding not."
    )
    hidden_sizes: list[int] = HfArg(
        default_factory=lambda: [4, 8, 16, 32, 64],
        help="Model sizes: widths of decoders of two layers, fitted to the sandbox's text beforehand.",
    )
    backbone_tokens: int = HfArg(default=1_000_000, help="Tokens of text that each of these decoders is fitted on.")
    prompts: list[int] = HfArg(
        default_factory=lambda: [32, 128, 512],
        help="Numbers of training prompts, ascending, multiples of 4; the last is that of other axes.",
    )
    samples: list[int] = HfArg(
        default_factory=lambda: [1, 2, 4, 8, 16],
        help="Completions per prompt, ascending; the last is that of the other axes.",
    )
    horizons: list[float] = HfArg(
        default_factory=lambda: [0.25, 1.0, 4.0],
        help="Values of gamma: multiples of the horizon 1 / (1 - gamma) that is fitted to the rollouts.",
    )
    seeds: int = HfArg(default=3, help="Seeds of each cell: weights, order, and which data is used.")
    held_out_prompts: int = HfArg(default=120, help="Prompts to evaluate on; a multiple of 4.")
    held_out_samples: int = HfArg(default=16, help="Completions of each of them.")
    max_new_tokens: int = HfArg(default=128, help="Longest completion, end-of-sequence counted.")
    batch_size: int = HfArg(default=32, help="Completions per optimiser step.")
    learning_rate: float = HfArg(
        default=2e-3, help="Peak learning rate at a width of 64; for others it goes with 1 / width, up to ten times."
    )
    boundary: bool = HfArg(
        default=False, help="Instead of the study: train one model for longer, and measure it at the prompt."
    )
    boundary_tokens: int = HfArg(default=1_600_000, help="Tokens that this one is trained on.")
    boundary_prompts: int = HfArg(default=2048, help="Its training prompts.")
    boundary_samples: int = HfArg(default=8, help="Completions of each of them.")
    boundary_batch_size: int = HfArg(default=128, help="Completions per optimiser step.")
    boundary_held_out_samples: int = HfArg(
        default=64, help="Completions per held-out prompt that it is measured against."
    )
    report: bool = HfArg(default=False, help="Only write the report of what is there already.")
    smoke: bool = HfArg(default=False, help="A size that only shows that it runs.")

    def __post_init__(self) -> None:
        if self.smoke:
            self.policy_tokens, self.backbone_tokens, self.train_tokens = 20_000, 5_000, 1_500
            self.boundary_tokens, self.boundary_prompts, self.boundary_held_out_samples = 3_000, 8, 4
            self.hidden_sizes, self.prompts, self.samples, self.horizons = [8, 16], [4, 8], [1, 2], [1.0, 4.0]
            self.seeds, self.held_out_prompts, self.held_out_samples = 2, 4, 2
        for name in ("hidden_sizes", "prompts", "samples"):
            if not getattr(self, name) or sorted(set(getattr(self, name))) != getattr(self, name):
                raise ValueError(f"{name} must be ascending and hold at least one number, got {getattr(self, name)}.")


@dataclass
class Study:
    """What all cells share: the policy, and rollouts of training and of held-out prompts."""

    args: ScalingArguments
    policy: str
    train: Dataset
    held_out: Dataset
    metadata: RolloutMetadata
    gamma: float

    def gamma_of(self, cell: Cell) -> float:
        """The fitted gamma, with its horizon ``1 / (1 - gamma)`` scaled."""
        return 1 - (1 - self.gamma) / cell.horizon

    def rollouts_of(self, cell: Cell) -> Dataset:
        """A random part of the training rollouts: whole blocks of prompts, one of each difficulty, and samples."""
        order = torch.Generator().manual_seed(cell.seed)
        blocks = torch.randperm(self.args.prompts[-1] // 4, generator=order)[: cell.prompts // 4].tolist()
        prompts = {4 * block + place for block in blocks for place in range(4)}
        samples = set(torch.randperm(self.args.samples[-1], generator=order)[: cell.samples].tolist())
        groups, count = self.train["group"][:], self.args.samples[-1]
        rows = [row for row, group in enumerate(groups) if group in prompts and row % count in samples]
        return self.train.select(rows)

    def steps_of(self, rollouts: Dataset) -> int:
        """Optimiser steps in which `train_tokens` tokens are seen."""
        held = int(completion_lengths(rollouts).sum() + completion_lengths(rollouts, "prompt_ids").sum())
        return max(1, round(self.args.train_tokens * len(rollouts) / (held * self.args.batch_size)))

    def backbone_of(self, cell: Cell) -> str:
        """Path of the decoder that a cell starts from."""
        return self.policy if cell.hidden_size is None else str(backbone_path(self.args, cell.hidden_size))

    def settings_of(self, cell: Cell) -> dict[str, Any]:
        """Everything that a cell's result depends on."""
        names = ["train_tokens", "batch_size", "held_out_prompts", "held_out_samples"]
        names += [] if cell.hidden_size is None else ["backbone_tokens"]
        shared = {name: getattr(self.args, name) for name in names}
        rate = self.args.learning_rate * (1.0 if cell.hidden_size is None else rate_factor(cell.hidden_size))
        plan = self.metadata.sampling["plan"]
        return {**asdict(cell), **shared, "plan": plan, "gamma": self.gamma_of(cell), "learning_rate": rate}

    def train_cell(self, cell: Cell) -> LengthValueTrainer:
        """Trains the model of a cell."""
        rollouts, settings = self.rollouts_of(cell), self.settings_of(cell)
        arguments = LengthValueTrainingArguments(
            output_dir=self.args.output_dir,
            max_steps=self.steps_of(rollouts),
            learning_rate=settings["learning_rate"],
            per_device_train_batch_size=self.args.batch_size,
            per_device_eval_batch_size=256,
            gamma=settings["gamma"],
            seed=cell.seed,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        backbone, tokenizer = self.backbone_of(cell), AutoTokenizer.from_pretrained(self.policy)
        set_seed(cell.seed)
        model = make_length_value_model(backbone, rollouts, self.metadata, arguments, tokenizer)
        if cell.rounded_head:
            head = RoundedHead(model.head.hidden.in_features)
            head.load_state_dict(model.head.state_dict())
            model.head = head
        trainer_class = GroupedTrainer if cell.grouped else LengthValueTrainer
        trainer = trainer_class(
            model, arguments, train_dataset=rollouts, eval_dataset=self.held_out, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer

    def run(self, cell: Cell) -> dict[str, Any]:
        """Trains and evaluates the model of a cell."""
        start = time.perf_counter()
        trainer = self.train_cell(cell)
        measured = trainer.evaluate()
        return {
            "settings": self.settings_of(cell),
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "steps": trainer.state.global_step,
            "epochs": trainer.state.global_step * self.args.batch_size / len(trainer.train_dataset),
            "seconds": time.perf_counter() - start,
            "metrics": {name: measured[f"eval_{name}"] for name in METRICS},
        }


def find_policy(args: ScalingArguments) -> str:
    """Path of the policy: the one that is given, or one that is fitted on first use."""
    if args.policy is not None:
        return args.policy
    path = Path(args.output_dir) / "policy"
    fit_decoder("fitting a policy", path, PolicySettings(train_tokens=args.policy_tokens))
    return str(path)


def prepare_study(args: ScalingArguments) -> Study:
    """Samples what the cells share; what is there already is used."""
    policy = find_policy(args)
    train, metadata = _sample(args, policy, "train", args.prompts[-1], args.samples[-1], seed=1)
    held_out, _ = _sample(args, policy, "evaluation", args.held_out_prompts, args.held_out_samples, seed=0)
    gamma, _ = fit_gamma_to_rollouts(train)
    return Study(args, policy, train, held_out, metadata, gamma)


def fit_decoder(title: str, path: Path, settings: PolicySettings) -> None:
    """Fits a decoder to the sandbox's text, unless it is there."""
    run_stage(title, path, asdict(settings), lambda: fit_policy(str(path), settings, use_cpu=True, disable_tqdm=True))


def backbone_path(args: ScalingArguments, hidden_size: int) -> Path:
    """Where the decoder of a width is kept."""
    return Path(args.output_dir) / "backbones" / f"h{hidden_size}"


def fit_backbones(args: ScalingArguments) -> None:
    """Fits the decoders of all sizes."""
    for width in args.hidden_sizes:
        settings = PolicySettings(
            hidden_size=width,
            num_heads=max(1, width // 16),
            train_tokens=args.backbone_tokens,
            learning_rate=3e-3 * rate_factor(width),
        )
        fit_decoder(f"fitting a decoder of width {width}", backbone_path(args, width), settings)


def _sample(
    args: ScalingArguments, policy: str, split: str, prompts: int, samples: int, seed: int
) -> tuple[Dataset, RolloutMetadata]:
    problems = distinct_problems(prompts, seed, split)
    rollouts, metadata = sample_to_file(
        Path(args.output_dir) / f"{split}.jsonl",
        AutoModelForCausalLM.from_pretrained(policy),
        AutoTokenizer.from_pretrained(policy),
        [problem.prompt for problem in problems],
        SamplingSettings(samples, args.max_new_tokens, batch_size=256),
        seed=seed,
        generator=policy,
    )
    if metadata.sampling["set_aside"]:
        raise ValueError(f"{metadata.sampling['set_aside']} completions of {policy} are no valid rollouts.")
    return rollouts, metadata


def run_cells(study: Study, cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yields every cell with its result: read if it is there, else made and written.

    Raises:
        ValueError: if a result is there that was made with other settings.
    """
    folder = Path(study.args.output_dir) / "cells"
    for number, cell in enumerate(cells, start=1):
        path = folder / f"{cell.name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["settings"] != study.settings_of(cell):
                raise ValueError(
                    f"{path} was made with other settings ({result['settings']}; now {study.settings_of(cell)}). Give "
                    "another --output_dir, or remove it to run it again."
                )
        else:
            result = study.run(cell)
            with atomic_file(path) as file:
                file.write(json.dumps(result, indent=1).encode())
            loss, seconds = result["metrics"]["loss"], result["seconds"]
            console.print(f"{number}/{len(cells)} {cell.name}: loss {loss:.5f}, {seconds:.1f} s")
        yield cell, result


def measure_at_the_prompt(args: ScalingArguments) -> None:
    """Trains one model on more prompts, and writes its metrics at the prompt, intervals aside, to `boundary.json`.

    What the prompt alone says about a length is little beside what the completion says later, so it takes many prompts,
    rather than many completions of each, to learn it.
    """
    folder = Path(args.output_dir) / "boundary"
    own = copy(args)
    own.output_dir, own.policy = str(folder), find_policy(args)
    own.prompts, own.samples, own.batch_size = (
        [args.boundary_prompts],
        [args.boundary_samples],
        args.boundary_batch_size,
    )
    own.train_tokens, own.held_out_samples = args.boundary_tokens, args.boundary_held_out_samples
    study = prepare_study(own)
    cell = Cell(own.prompts[-1], own.samples[-1], seed=0)
    model, report = folder / "length_value_model", folder / "boundary.json"

    def make() -> None:
        trainer = study.train_cell(cell)
        measured = trainer.evaluate()
        with atomic_file(report) as file:
            file.write(json.dumps({name: measured[f"eval_{name}"] for name in BOUNDARY_METRICS}, indent=1).encode())
        trainer.save_model(str(model))

    run_stage("training a length value model", model, study.settings_of(cell), make)
    found = json.loads(report.read_text(encoding="utf-8"))
    console.print(f"relative error at the prompt against one half of the completions: {found['half_mre']:.3f}")
    console.print(f"relative error between the halves: {found['reference_half_mre']:.3f}")
    command = f"python -m eval.length_prediction --rollouts {folder}/evaluation.jsonl --length_value_model {model}"
    console.print(f"With intervals: {command}", soft_wrap=True)


def main(args: ScalingArguments) -> None:
    """Runs what is missing, and writes the report."""
    if args.boundary:
        measure_at_the_prompt(args)
        return
    study = prepare_study(args)
    if not args.report:
        fit_backbones(args)
    axes = make_axes(args.prompts, args.samples, args.hidden_sizes, args.horizons)
    seeds = range(args.seeds)
    cells = list(
        dict.fromkeys(replace(c, seed=seed) for seed in seeds for axis in axes.values() for c in axis.values())
    )
    if args.report:
        cells = [cell for cell in cells if (Path(args.output_dir) / "cells" / f"{cell.name}.json").exists()]
    results = dict(run_cells(study, cells))
    rows = {
        axis: {
            label: [results[one] for one in (replace(cell, seed=seed) for seed in seeds) if one in results]
            for label, cell in labelled.items()
        }
        for axis, labelled in axes.items()
    }
    console.print(write_report(rows, Path(args.output_dir)), soft_wrap=True)


def make_parser() -> ProgramParser:
    """The command line: every field of [`ScalingArguments`], also read from YAML with `--config`."""
    return ProgramParser(ScalingArguments, description=__doc__.partition("\n")[0])


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.disable_progress_bar()
    choose_threads(1)
    run_program(lambda: main(*make_parser().parse_args_and_config()))
