"""Accuracy against length: base policy, hard truncation, tilted decoding and trained policies on the same prompts.

    python -m eval.tradeoff                                   # what recipes/ppo_shaped.py left in outputs/sandbox
    python -m eval.tradeoff --run_dir outputs/mine --dataset_name questions.jsonl --reward reward.gsm8k.gsm8k_reward

Prints one table and writes tradeoff.json and tradeoff.png. Every arm uses the same prompts, the same candidate rule and
the same length: tokens without end-of-sequence. Intervals are 95 % bootstraps over prompts.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel
from transformers.utils import logging as transformers_logging

from eval.arms import Arm, Sampler, load_object, value_scale
from eval.figures import plot_tradeoff
from eval.statistics import Interval, mean_interval, statistic_interval
from eval.style_frontier import StyleFrontier, measure_points
from lenvm_rl.decoding import LengthGuidance
from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.rollouts import atomic_file
from lenvm_rl.sampling import load_prompts
from lenvm_rl.sampling_jobs import tokenize_prompts
from lenvm_rl.sandbox import DIFFICULTIES, clean_length, distinct_problems, read_completion

logger = logging.getLogger(__name__)

# Prompts that the style frontier is measured on, 8 completions each.
FRONTIER_PROMPTS = 480


@dataclass
class TradeoffArguments:
    """What to compare, on which prompts, and where to write it."""

    run_dir: str = field(
        default="outputs/sandbox",
        metadata={
            "help": "Folder of a recipe's run; its run.json names policy, length value model and trained policies."
        },
    )
    policy: str | None = field(default=None, metadata={"help": "Base policy. Default: the run's."})
    length_value_model: str | None = field(default=None, metadata={"help": "Length value model. Default: the run's."})
    trained: list[str] = field(
        default_factory=list,
        metadata={"help": "Trained policies as NAME=PATH. Default: all that the run lists."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts: a hub id or a .jsonl, .json, .parquet or .csv file. Default: the sandbox's."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    chat: bool = field(default=False, metadata={"help": "Wrap text prompts as a user's message."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a hub dataset."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt, text or messages."})
    reward: str = field(
        default="reward.sandbox.sandbox_reward",
        metadata={"help": "Dotted path of the reward function; above 0.5 is correct."},
    )
    num_prompts: int = field(default=320, metadata={"help": "Evaluation prompts."})
    num_samples: int = field(default=4, metadata={"help": "Completions per prompt and arm."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion, end-of-sequence counted."})
    batch_size: int = field(default=256, metadata={"help": "Completions per generate call."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of every arm."})
    top_k: int = field(default=0, metadata={"help": "Candidate rule of every arm: top-k, 0 for none."})
    top_p: float = field(default=1.0, metadata={"help": "Candidate rule of every arm: top-p, 1 for none."})
    min_p: float = field(default=0.01, metadata={"help": "Candidate rule of every arm: min-p, 0 for none."})
    strengths: list[float] = field(
        default_factory=lambda: [-1.0, 0.25, 0.5, 1.0, 2.0, 4.0],
        metadata={"help": "Tilt strengths in units of 1/std(V), the spread of values over the base completions."},
    )
    budget_quantiles: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.85, 0.95],
        metadata={"help": "Hard limits, as quantiles of the base policy's lengths."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling and bootstrap."})
    output_dir: str | None = field(default=None, metadata={"help": "Where to write. Default: RUN_DIR/tradeoff."})


@dataclass
class Comparison:
    """The prompts of a comparison, and what is known about their difficulty."""

    prompts: list[Any]
    columns: dict[str, list[Any]]
    difficulties: list[int] | None


def load_comparison(args: TradeoffArguments) -> Comparison:
    """The evaluation prompts: a dataset's, or the sandbox's evaluation split."""
    if args.dataset_name is None:
        problems = distinct_problems(args.num_prompts, args.seed, "evaluation")
        difficulties = [problem.difficulty for problem in problems]
        columns = {"answer": [problem.answer for problem in problems]}
        return Comparison([problem.prompt for problem in problems], columns, difficulties)
    dataset = load_prompts(args.dataset_name, args.dataset_config, args.dataset_split, args.num_prompts)
    if args.prompt_column not in dataset.column_names:
        raise ValueError(f"{args.dataset_name} has no column {args.prompt_column!r}; it has {dataset.column_names}.")
    columns = {name: dataset[name][:] for name in dataset.column_names if name != args.prompt_column}
    prompts = dataset[args.prompt_column][:]
    if args.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Comparison(prompts, columns, None)


def read_run(args: TradeoffArguments) -> tuple[str, str, dict[str, str]]:
    """Paths of the base policy, the length value model and the trained policies, from arguments or from run.json."""
    path = Path(args.run_dir) / "run.json"
    if not path.exists() and not (args.policy and args.length_value_model):
        raise ValueError(
            f"{path} does not exist: run `accelerate launch recipes/ppo_shaped.py` first, name its folder with "
            "--run_dir, or give --policy and --length_value_model."
        )
    run = json.loads(path.read_text()) if path.exists() else {"trained": {}}
    trained = dict(entry.split("=", 1) for entry in args.trained) if args.trained else run["trained"]
    return args.policy or run["policy"], args.length_value_model or run["length_value_model"], trained


def collect_arms(args: TradeoffArguments, comparison: Comparison) -> tuple[list[Arm], float, StyleFrontier | None]:
    """Sample every arm. Returns them with the unit of the tilt's strengths and, on the sandbox, the style frontier."""
    policy_path, value_path, trained = read_run(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    policy = AutoModelForCausalLM.from_pretrained(policy_path).to(device).eval()
    sampler = Sampler(
        tokenizer=tokenizer,
        length_value_model=LengthValueModel.from_pretrained(value_path).to(device).freeze(),
        prompts=comparison.prompts,
        columns=comparison.columns,
        reward=load_object(args.reward),
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        guidance=LengthGuidance(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p),
        seed=args.seed,
    )
    base = sampler.sample("base", "base", policy)
    prompt_ids = tokenize_prompts(tokenizer, comparison.prompts)
    some = range(0, len(base.completions), max(1, len(base.completions) // 256))
    unit = 1.0 / value_scale(
        sampler.length_value_model, [prompt_ids[base.prompt[i]] for i in some], [base.completions[i] for i in some]
    )
    budgets = sorted({int(np.quantile(base.lengths, quantile)) for quantile in args.budget_quantiles})
    arms = [base, *(sampler.truncate(base, budget) for budget in budgets)]
    for strength in args.strengths:
        arms.append(sampler.sample(f"tilt {strength:+g}", "tilt", policy, strength * unit))
    for name, path in trained.items():
        arms.append(sampler.sample(name, "trained", AutoModelForCausalLM.from_pretrained(path).to(device).eval()))
    frontier = fit_frontier(sampler, policy) if comparison.difficulties is not None else None
    return arms, unit, frontier


def fit_frontier(sampler: Sampler, policy: PreTrainedModel) -> StyleFrontier | None:
    """The style frontier of the sandbox's base policy, under the same candidate rule as every arm.

    From completions without detours on *validation* prompts: picking the best style on the evaluation prompts
    themselves would flatter it. `None` if the policy writes no readable style at some difficulty (a smoke run's).
    """
    problems = distinct_problems(FRONTIER_PROMPTS, sampler.seed, "validation")
    columns = {"answer": [problem.answer for problem in problems]}
    sampler = replace(sampler, prompts=[problem.prompt for problem in problems], columns=columns, num_samples=8)
    found = sampler.sample("frontier", "base", policy)
    rows = []
    for ids, right, prompt in zip(found.completions, found.correct, found.prompt, strict=True):
        reading = read_completion(sampler.tokenizer.convert_ids_to_tokens(ids))
        if reading.style != "mixed" and reading.detour_tokens == 0:
            difficulty = problems[prompt].difficulty
            rows.append((difficulty, reading.style, clean_length(difficulty, reading.style), right))
    missing = {problem.difficulty for problem in problems} - {row[0] for row in rows}
    if missing:
        logger.warning("no style frontier: no style is written without detours at difficulty %s", sorted(missing))
        return None
    return StyleFrontier.from_points(measure_points(*zip(*rows, strict=True)))


def summarise(arm: Arm, frontier: StyleFrontier | None, difficulties: list[int] | None, seed: int) -> dict[str, Any]:
    """One arm as a dictionary of numbers and [low, high] intervals."""

    def interval(result: Interval) -> dict[str, float]:
        return {"estimate": result.estimate, "low": result.low, "high": result.high}

    lengths, correct = arm.lengths.astype(float), arm.correct.astype(float)
    row = {
        "name": arm.name,
        "kind": arm.kind,
        "setting": arm.setting,
        "completions": len(lengths),
        "tokens": interval(mean_interval(lengths, arm.prompt, seed=seed)),
        "accuracy": interval(mean_interval(correct, arm.prompt, seed=seed)),
        "tokens_correct": None,
        "unfinished": float(1.0 - arm.finished.mean()),
    }
    if correct.any():
        row["tokens_correct"] = interval(mean_interval(lengths, arm.prompt, correct, seed=seed))
    if frontier is not None:
        level = np.array(difficulties)[arm.prompt]
        floor = np.array([frontier.floors[difficulty] for difficulty in level])
        both = np.stack([lengths, correct], axis=1)
        gap = statistic_interval(both, lambda m: frontier.accuracy(m[:, 0]) - m[:, 1], arm.prompt, seed=seed)
        row["frontier_gap"] = interval(gap)
        row["excess_tokens"] = interval(mean_interval(lengths - floor, arm.prompt, seed=seed))
        row["by_difficulty"] = {
            str(difficulty): {
                "tokens": float(lengths[level == difficulty].mean()),
                "accuracy": float(correct[level == difficulty].mean()),
                "excess_tokens": float((lengths - floor)[level == difficulty].mean()),
            }
            for difficulty in sorted(set(difficulties))
        }
    return row


def print_table(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """One line per arm: tokens, accuracy, and the distance to the style frontier where there is one."""

    def cell(entry: dict[str, float] | None, digits: int) -> str:
        if entry is None:
            return "–"
        return f"{entry['estimate']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"

    table = Table(title=title)
    with_frontier = "frontier_gap" in rows[0]
    for column in ("arm", "tokens", "accuracy", "tokens if correct", "unfinished"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    if with_frontier:
        table.add_column("below frontier", justify="right", no_wrap=True)
        table.add_column("excess tokens", justify="right", no_wrap=True)
    for row in rows:
        cells = [row["name"], cell(row["tokens"], 1), cell(row["accuracy"], 3), cell(row["tokens_correct"], 1)]
        cells.append(f"{row['unfinished']:.1%}")
        if with_frontier:
            cells += [cell(row["frontier_gap"], 3), cell(row["excess_tokens"], 1)]
        table.add_row(*cells, end_section=row["name"] == "base")
    console.print(table)


def main(args: TradeoffArguments) -> list[dict[str, Any]]:
    """Sample, grade, print and write the comparison."""
    transformers_logging.set_verbosity_error()
    if args.dataset_name is None:
        # For models of the sandbox's size one thread is as fast as two, and the numbers do not depend on the cores.
        torch.set_num_threads(1)
    comparison = load_comparison(args)
    arms, unit, frontier = collect_arms(args, comparison)
    rows = [summarise(arm, frontier, comparison.difficulties, args.seed) for arm in arms]
    output_dir = Path(args.output_dir or Path(args.run_dir) / "tradeoff")
    output_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"arguments": asdict(args), "strength_unit": unit, "arms": rows}
    if frontier is not None:
        report["style_frontier"] = {
            "tokens": frontier.tokens.tolist(),
            "accuracy": frontier.accuracies.tolist(),
            "floors": {str(difficulty): floor for difficulty, floor in frontier.floors.items()},
            "points": {str(difficulty): styles for difficulty, styles in frontier.points.items()},
        }
    with atomic_file(output_dir / "tradeoff.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    plot_tradeoff(rows, frontier, output_dir / "tradeoff.png")
    title = (
        f"{len(comparison.prompts)} prompts x {args.num_samples} completions, seed {args.seed}, min-p {args.min_p:g}"
    )
    console = Console(width=150)
    print_table(rows, title, console)
    if frontier is not None:
        described = ", ".join(f"{frontier.floors[d]:.0f} at {d} operations" for d in DIFFICULTIES)
        console.print(f"Fewest tokens of a style that is good enough: {described}.")
    console.print(
        f"Tilt strengths are in units of 1/std(V) = {unit:.2f}. Written to {output_dir}/tradeoff.json and .png"
    )
    return rows


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(HfArgumentParser(TradeoffArguments).parse_args_into_dataclasses()[0])
