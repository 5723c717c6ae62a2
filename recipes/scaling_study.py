"""How a length value model's error depends on its size, its data and its training, on the sandbox.

    python recipes/scaling_study.py --policy outputs/policy --output_dir outputs/scaling

Along model size, prompts, samples per prompt and gamma (arXiv 2604.27039, section 5), every model sees the same number
of tokens: what differs is what an axis is named after, not the time in training. All are measured on the same held-out
prompts, in the same space. Each result is kept in `<output_dir>/cells`; killed and started again, the study goes on.
At the end, `results.md` and a figure are written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from lenvm_rl.files import read_json, write_json
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.trainer import (
    LengthValueTrainer,
    fit_gamma_to_rollouts,
    make_length_value_model,
    sequence_lengths,
)
from lenvm_rl.programs import ProgramParser, choose_threads, run_program
from lenvm_rl.rollouts.job import SamplingSettings, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.sandbox import PolicySettings, distinct_problems, fit_policy
from recipes.stage_records import console, run_stage

logger = logging.getLogger(__name__)

POINTS = (0, 25, 50, 75)
# Columns of the report: title, metric, scale and digits. Nothing else is kept of an evaluation, beside the errors.
COLUMNS = (
    ("loss x 1000", "loss", 1000, 2),
    ("MRE at the prompt", "consistent_mre", 1, 3),
    *((f"MRE at {point} %", f"length_mre_at_{point}", 1, 3) for point in POINTS),
    ("Kendall tau", "kendall_tau", 1, 3),
)
METRICS = (
    *(metric for _, metric, *_ in COLUMNS),
    *(f"length_mae_at_{point}" for point in POINTS),
    "explained_variance",
)
# Axes of the figure.
SIZES = {"model size": "parameters", "prompts": "training prompts", "samples per prompt": "completions per prompt"}

# Axis -> label -> results of the seeds.
Rows = dict[str, dict[str, list[dict[str, Any]]]]


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
        help="Numbers of training prompts, ascending, multiples of 4; the other axes have the last.",
    )
    samples: list[int] = HfArg(
        default_factory=lambda: [1, 2, 4, 8, 16],
        help="Completions per prompt, ascending; the other axes have the last.",
    )
    horizons: list[float] = HfArg(
        default_factory=lambda: [0.25, 1.0, 4.0],
        help="Values of gamma: multiples of the horizon 1 / (1 - gamma) that is fitted to the rollouts.",
    )
    seeds: int = HfArg(default=3, help="Seeds of each cell: weights, order, and which data is used.")
    held_out_prompts: int = HfArg(default=120, help="Prompts to evaluate on; a multiple of 4.")
    held_out_samples: int = HfArg(default=16, help="Completions of each of them.")
    max_new_tokens: int = HfArg(default=128, help="Longest completion, end-of-sequence counted.")
    batch_size: int = HfArg(default=32, help="Completions per optimizer step.")
    learning_rate: float = HfArg(
        default=2e-3, help="Peak learning rate at a width of 64; for others it goes with 1 / width, up to ten times."
    )
    smoke: bool = HfArg(default=False, help="A size that only shows that it runs.")

    def __post_init__(self) -> None:
        if self.smoke:
            self.policy_tokens, self.backbone_tokens, self.train_tokens = 20_000, 5_000, 1_500
            self.hidden_sizes, self.prompts, self.samples, self.horizons = [8, 16], [4, 8], [1, 2], [1.0, 4.0]
            self.seeds, self.held_out_prompts, self.held_out_samples = 2, 4, 2
        for name in ("hidden_sizes", "prompts", "samples"):
            if not getattr(self, name) or sorted(set(getattr(self, name))) != getattr(self, name):
                raise ValueError(f"{name} must be ascending and hold at least one number, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Cell:
    """One model of the study.

    Args:
        prompts (`int`): training prompts.
        samples (`int`): completions of each.
        seed (`int`): seed of weights and order, and of which prompts and completions are used.
        hidden_size (`int`, *optional*): width of a decoder of its own; the policy's decoder when omitted.
        horizon (`float`, *optional*, defaults to `1.0`): multiple of the fitted horizon of gamma.
    """

    prompts: int
    samples: int
    seed: int
    hidden_size: int | None = None
    horizon: float = 1.0

    @property
    def name(self) -> str:
        """Name of the file of its result."""
        backbone = "policy" if self.hidden_size is None else f"h{self.hidden_size}"
        return f"{backbone}-p{self.prompts}-n{self.samples}-x{self.horizon:g}-seed{self.seed}"


def make_axes(args: ScalingArguments) -> dict[str, dict[str, Cell]]:
    """The cells along each axis, by their label there, all with seed 0. Axes share cells, so each is trained once."""
    base = Cell(args.prompts[-1], args.samples[-1], 0)
    return {
        "model size": {str(width): replace(base, hidden_size=width) for width in args.hidden_sizes},
        "prompts": {str(count): replace(base, prompts=count) for count in args.prompts},
        "samples per prompt": {str(count): replace(base, samples=count) for count in args.samples},
        "gamma": {f"horizon x {factor:g}": replace(base, horizon=factor) for factor in args.horizons},
    }


@dataclass
class ScalingStudy:
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
        """Optimizer steps in which `train_tokens` tokens are seen."""
        held = sum(sequence_lengths(rollouts))
        return max(1, round(self.args.train_tokens * len(rollouts) / (held * self.args.batch_size)))

    def settings_of(self, cell: Cell) -> dict[str, Any]:
        """Everything that a cell's result depends on."""
        names = ["train_tokens", "batch_size", "held_out_prompts", "held_out_samples"]
        names += [] if cell.hidden_size is None else ["backbone_tokens"]
        shared = {name: getattr(self.args, name) for name in names}
        rate = self.args.learning_rate * (1.0 if cell.hidden_size is None else rate_factor(cell.hidden_size))
        plan = self.metadata.sampling["plan"]
        return {**asdict(cell), **shared, "plan": plan, "gamma": self.gamma_of(cell), "learning_rate": rate}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Trains and evaluates the model of a cell."""
        start, rollouts, settings = time.perf_counter(), self.rollouts_of(cell), self.settings_of(cell)
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
        backbone = self.policy if cell.hidden_size is None else str(backbone_path(self.args, cell.hidden_size))
        tokenizer = AutoTokenizer.from_pretrained(self.policy)
        set_seed(cell.seed)
        model = make_length_value_model(backbone, rollouts, self.metadata, arguments, tokenizer)
        trainer = LengthValueTrainer(
            model, arguments, train_dataset=rollouts, eval_dataset=self.held_out, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        measured = trainer.evaluate()
        return {
            "settings": settings,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": trainer.state.global_step,
            "epochs": trainer.state.global_step * self.args.batch_size / len(rollouts),
            "seconds": time.perf_counter() - start,
            "metrics": {name: measured[f"eval_{name}"] for name in METRICS},
        }


def rate_factor(hidden_size: int) -> float:
    """The learning rate beside the one at a width of 64: it goes with 1 / width, up to ten times."""
    return min(10.0, 64 / hidden_size)


def prepare_study(args: ScalingArguments) -> ScalingStudy:
    """Samples what the cells share, of a policy that is fitted on first use unless one is given."""
    policy = args.policy or str(Path(args.output_dir) / "policy")
    if args.policy is None:
        fit_decoder("fitting a policy", Path(policy), PolicySettings(train_tokens=args.policy_tokens))
    train, metadata = _sample(args, policy, "train", args.prompts[-1], args.samples[-1], seed=1)
    held_out, _ = _sample(args, policy, "evaluation", args.held_out_prompts, args.held_out_samples, seed=0)
    gamma, _ = fit_gamma_to_rollouts(train)
    return ScalingStudy(args, policy, train, held_out, metadata, gamma)


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
    job = TransformersJob(
        AutoModelForCausalLM.from_pretrained(policy),
        AutoTokenizer.from_pretrained(policy),
        [problem.prompt for problem in distinct_problems(prompts, seed, split)],
        SamplingSettings(samples, args.max_new_tokens, batch_size=256),
        seed=seed,
    )
    rollouts, metadata = sample_to_file(Path(args.output_dir) / f"{split}.jsonl", job, policy)
    if metadata.sampling["set_aside"]:
        raise ValueError(f"{metadata.sampling['set_aside']} completions of {policy} are no valid rollouts.")
    return rollouts, metadata


def run_cells(study: ScalingStudy, cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yields every cell with its result: read if it is there, else made and written."""
    for number, cell in enumerate(cells, start=1):
        path = Path(study.args.output_dir) / "cells" / f"{cell.name}.json"
        if path.exists():
            result = read_json(path)
            if result["settings"] != study.settings_of(cell):
                raise ValueError(
                    f"{path} was made with other settings ({result['settings']}; now {study.settings_of(cell)}). Give "
                    "another --output_dir, or remove it to run it again."
                )
        else:
            result = study.run(cell)
            write_json(path, result)
            loss, seconds = result["metrics"]["loss"], result["seconds"]
            console.print(f"{number}/{len(cells)} {cell.name}: loss {loss:.5f}, {seconds:.1f} s")
        yield cell, result


def write_report(rows: Rows, folder: Path) -> str:
    """Writes `results.md` and `scaling.png` into a folder, and returns the table."""
    table = make_table(rows)
    (folder / "results.md").write_text(table, encoding="utf-8")
    plot_sizes(rows).savefig(folder / "scaling.png", dpi=150)
    return table


def values(results: list[dict[str, Any]], metric: str) -> np.ndarray:
    """A metric of each seed."""
    return np.array([result["metrics"][metric] for result in results], dtype=float)


def make_table(rows: Rows) -> str:
    """One line per cell: the mean over seeds, with the lowest and the highest seed in brackets."""
    titles = ["axis", "cell", "parameters", "epochs", "seeds", *(title for title, *_ in COLUMNS)]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for axis, row in rows.items():
        for label, results in row.items():
            entries = [axis, label, f"{results[0]['parameters']:,}", f"{results[0]['epochs']:.1f}", str(len(results))]
            for _, metric, scale, digits in COLUMNS:
                found = scale * values(results, metric)
                shown = [f"{each:.{digits}f}" for each in (found.mean(), found.min(), found.max())]
                entries.append("{} [{}, {}]".format(*shown))
            lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def plot_sizes(rows: Rows) -> Figure:
    """Held-out loss against the three sizes: a line through the means, a point for every seed."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, len(SIZES), sharey=True)
    for place, (axis, title) in zip(axes, SIZES.items(), strict=True):
        results = list(rows[axis].items())
        x = [found[0]["parameters"] if axis == "model size" else int(label) for label, found in results]
        losses = [values(found, "loss") for _, found in results]
        place.plot(x, [loss.mean() for loss in losses], color="#1f77b4", marker="o", zorder=3)
        for position, loss in zip(x, losses, strict=True):
            place.scatter([position] * len(loss), loss, color="#888888", s=14, zorder=2)
        place.set_xscale("log")
        place.set_xticks(list(x), [f"{position:,}" for position in x], rotation=30)
        place.minorticks_off()
        place.set_xlabel(title)
        place.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, (V - G)²")
    return figure


def main(args: ScalingArguments) -> None:
    """Runs what is missing, and writes the report."""
    study = prepare_study(args)
    fit_backbones(args)
    axes, seeds = make_axes(args), range(args.seeds)
    cells = [replace(cell, seed=seed) for seed in seeds for axis in axes.values() for cell in axis.values()]
    results = dict(run_cells(study, list(dict.fromkeys(cells))))
    rows = {
        axis: {label: [results[replace(cell, seed=seed)] for seed in seeds] for label, cell in labelled.items()}
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
