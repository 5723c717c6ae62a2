"""Accuracy against length: base policy, hard truncation, tilted decoding and trained policies on the same prompts.

    python -m eval.tradeoff                                   # what recipes/ppo_shaped.py left in outputs/sandbox
    python -m eval.tradeoff --run_dir outputs/mine --dataset_name test.jsonl    # a run on data of your own

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

from eval.arms import Arm, Sampler, load_reward, value_scale
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
# Seed of the sandbox's evaluation prompts: the same for every run.
EVALUATION_SEED = 0


@dataclass
class TradeoffArguments:
    """What to compare, on which prompts, and where to write it."""

    run_dir: str = field(
        default="outputs/sandbox",
        metadata={"help": "Folder of a recipe's run; its run.json says what was trained, on what, and how it samples."},
    )
    policy: str | None = field(default=None, metadata={"help": "Base policy. Default: the run's."})
    length_value_model: str | None = field(default=None, metadata={"help": "Length value model. Default: the run's."})
    trained: list[str] = field(
        default_factory=list,
        metadata={"help": "Trained policies as NAME=PATH. Default: all that the run lists."},
    )
    tilt: list[str] = field(
        default_factory=lambda: ["base"],
        metadata={"help": "Policies whose decoding is tilted: 'base' and names of trained ones."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to evaluate on: a hub id or a local file. Default: the sandbox's, for its own runs."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a hub dataset."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column with the prompt. Default: the run's."})
    chat: bool | None = field(
        default=None, metadata={"help": "Wrap text prompts as a user's message. Default: as in the run."}
    )
    reward: str | None = field(
        default=None, metadata={"help": "Dotted path of the reward function; above 0.5 is correct. Default: the run's."}
    )
    num_prompts: int = field(default=320, metadata={"help": "Evaluation prompts."})
    num_samples: int = field(default=4, metadata={"help": "Completions per prompt and arm."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest completion, end-of-sequence counted. Default: as in the run."}
    )
    batch_size: int = field(default=256, metadata={"help": "Completions per generate call."})
    temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature of every arm. Default: as in the run."}
    )
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
    seed: int = field(default=0, metadata={"help": "Seed of sampling and bootstrap; the prompts do not depend on it."})
    output_dir: str | None = field(default=None, metadata={"help": "Where to write. Default: RUN_DIR/tradeoff."})

    def __post_init__(self) -> None:
        if min(self.num_prompts, self.num_samples, self.batch_size) < 1:
            raise ValueError("num_prompts, num_samples and batch_size must be at least 1.")
        if not all(0 <= quantile <= 1 for quantile in self.budget_quantiles):
            raise ValueError(f"budget_quantiles must lie in [0, 1], got {self.budget_quantiles}.")
        if not all("=" in entry for entry in self.trained):
            raise ValueError(f"trained takes NAME=PATH, got {self.trained}.")


@dataclass
class Comparison:
    """What is compared, on which prompts: the arguments, completed by what the run says of itself.

    Args:
        args ([`TradeoffArguments`]): complete.
        trained (`dict`): name and path of every trained policy.
        pad_token (`str`, *optional*): pad token of the run, if it is not the tokenizer's own.
        prompts (list), columns (`dict`): evaluation prompts, and what the reward function needs.
        difficulties (list of `int`, *optional*): of the sandbox's prompts.
    """

    args: TradeoffArguments
    trained: dict[str, str]
    pad_token: str | None
    prompts: list[Any] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    difficulties: list[int] | None = None


def read_run(args: TradeoffArguments) -> Comparison:
    """Complete the arguments from run.json, and load the evaluation prompts.

    Raises:
        ValueError: there is no run and the models are not given, or the run has its own data and none is given here.
    """
    path = Path(args.run_dir) / "run.json"
    if not path.exists() and not (args.policy and args.length_value_model):
        raise ValueError(
            f"{path} does not exist: run `accelerate launch recipes/ppo_shaped.py` first, name its folder with "
            "--run_dir, or give --policy and --length_value_model."
        )
    run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"trained": {}, "data": {}}

    def place(name: str) -> str:
        inside = Path(args.run_dir) / name
        return str(inside) if inside.exists() else name

    data = run["data"]
    defaults = {
        "policy": place(run["policy"]) if "policy" in run else None,
        "length_value_model": place(run["length_value_model"]) if "length_value_model" in run else None,
        "prompt_column": data.get("prompt_column", "prompt"),
        "chat": data.get("chat", False),
        "reward": run.get("reward", "reward.sandbox.sandbox_reward"),
        "temperature": run.get("temperature", 1.0),
        "max_new_tokens": run.get("max_new_tokens", 256),
    }
    complete = replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    trained = dict(entry.split("=", 1) for entry in args.trained)
    trained = trained or {name: place(where) for name, where in run["trained"].items()}
    unknown = set(args.tilt) - {"base", *trained}
    if unknown:
        raise ValueError(f"tilt names {sorted(unknown)}, but there are only 'base' and {sorted(trained)}.")
    if args.dataset_name is None and data.get("dataset_name") is not None:
        raise ValueError(
            f"{args.run_dir} was trained on {data['dataset_name']}: name prompts to evaluate on with --dataset_name "
            "(for a hub id its --dataset_split, 'test' by default; a local file of other prompts)."
        )
    comparison = Comparison(complete, trained, data.get("pad_token"))
    load_comparison(comparison)
    return comparison


def load_comparison(comparison: Comparison) -> None:
    """Fill in the evaluation prompts: a dataset's, or the sandbox's evaluation split, always the same."""
    args = comparison.args
    if args.dataset_name is None:
        problems = distinct_problems(args.num_prompts, EVALUATION_SEED, "evaluation")
        comparison.prompts = [problem.prompt for problem in problems]
        comparison.columns = {"answer": [problem.answer for problem in problems]}
        comparison.difficulties = [problem.difficulty for problem in problems]
        return
    dataset = load_prompts(args.dataset_name, args.dataset_config, args.dataset_split, args.num_prompts)
    if args.prompt_column not in dataset.column_names:
        raise ValueError(f"{args.dataset_name} has no column {args.prompt_column!r}; it has {dataset.column_names}.")
    prompts = dataset[args.prompt_column][:]
    comparison.prompts = [[{"role": "user", "content": prompt}] for prompt in prompts] if args.chat else prompts
    comparison.columns = {name: dataset[name][:] for name in dataset.column_names if name != args.prompt_column}


def collect_arms(comparison: Comparison) -> tuple[list[Arm], float, StyleFrontier | None]:
    """Sample every arm. Returns them with the unit of the tilt's strengths and, on the sandbox, the style frontier."""
    args = comparison.args
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    if comparison.pad_token is not None:
        tokenizer.pad_token = comparison.pad_token
    policies = {"base": args.policy, **comparison.trained}
    sampler = Sampler(
        tokenizer=tokenizer,
        length_value_model=LengthValueModel.from_pretrained(args.length_value_model).to(device).freeze(),
        prompts=comparison.prompts,
        columns=comparison.columns,
        reward=load_reward(args.reward),
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        guidance=LengthGuidance(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p),
        seed=args.seed,
    )
    arms: list[Arm] = []
    unit, frontier = 0.0, None
    for name, path in policies.items():
        policy = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
        arms.append(sampler.sample(name, "base" if name == "base" else "trained", policy))
        if name == "base":
            unit = tilt_unit(sampler, arms[0])
            for quantile in args.budget_quantiles:
                budget = int(np.quantile(arms[0].lengths, quantile))
                arms.append(sampler.truncate(arms[0], f"cut at q{quantile:g}", budget))
            frontier = fit_frontier(sampler, policy) if comparison.difficulties is not None else None
        for strength in args.strengths if name in args.tilt else ():
            title = f"tilt {strength:+g}" if name == "base" else f"{name} tilt {strength:+g}"
            arms.append(sampler.sample(title, "tilt" if name == "base" else f"tilt of {name}", policy, strength * unit))
    return arms, unit, frontier


def tilt_unit(sampler: Sampler, base: Arm) -> float:
    """One over the standard deviation of V, over the states of some 256 completions of the base arm."""
    prompt_ids = tokenize_prompts(sampler.tokenizer, sampler.prompts)
    some = range(0, len(base.completions), max(1, len(base.completions) // 256))
    return 1.0 / value_scale(
        sampler.length_value_model,
        [prompt_ids[base.prompt[index]] for index in some],
        [base.completions[index] for index in some],
    )


def fit_frontier(sampler: Sampler, policy: PreTrainedModel) -> StyleFrontier | None:
    """The style frontier of the sandbox's base policy, under the same candidate rule as every arm.

    From completions without detours on *validation* prompts: picking the best style on the evaluation prompts
    themselves would flatter it. `None` if the policy writes no readable style at some difficulty (a smoke run's).
    """
    problems = distinct_problems(FRONTIER_PROMPTS, EVALUATION_SEED, "validation")
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
        logger.warning(
            "no style frontier: the policy writes no style without detours at difficulty %s", sorted(missing)
        )
        return None
    return StyleFrontier.from_points(measure_points(*zip(*rows, strict=True)))


def summarise(arm: Arm, frontier: StyleFrontier | None, difficulties: list[int] | None, seed: int) -> dict[str, Any]:
    """One arm as a dictionary of numbers and [low, high] intervals."""

    def interval(result: Interval) -> dict[str, float | None]:
        ends = {"low": result.low, "high": result.high}
        # Too few prompts for an interval leave none; JSON has no NaN.
        known = {name: value if np.isfinite(value) else None for name, value in ends.items()}
        return {"estimate": result.estimate, **known}

    lengths, correct = arm.lengths.astype(float), arm.correct.astype(float)
    row = {
        "name": arm.name,
        "kind": arm.kind,
        "setting": arm.setting if np.isfinite(arm.setting) else None,
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
        excess = np.maximum(lengths - floor, 0.0)
        row["excess_tokens"] = interval(mean_interval(excess, arm.prompt, seed=seed))
        row["by_difficulty"] = {
            str(difficulty): {
                "tokens": float(lengths[level == difficulty].mean()),
                "accuracy": float(correct[level == difficulty].mean()),
                "excess_tokens": float(excess[level == difficulty].mean()),
            }
            for difficulty in sorted(set(difficulties))
        }
    return row


def print_table(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """One line per arm: tokens, accuracy, and the distance to the style frontier where there is one."""

    def cell(entry: dict[str, float | None] | None, digits: int) -> str:
        if entry is None:
            return "–"
        if entry["low"] is None:
            return f"{entry['estimate']:.{digits}f}"
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
    comparison = read_run(args)
    args = comparison.args
    arms, unit, frontier = collect_arms(comparison)
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
        file.write(json.dumps(report, indent=1, allow_nan=False).encode())
    plot_tradeoff(rows, frontier, output_dir / "tradeoff.png")
    console = Console(width=150)
    rule = f"temperature {args.temperature:g}, top-k {args.top_k}, top-p {args.top_p:g}, min-p {args.min_p:g}"
    prompts = (
        f"{len(comparison.prompts)} prompts x {args.num_samples} completions of at most {args.max_new_tokens} tokens"
    )
    print_table(rows, f"{prompts}; {rule}; seed {args.seed}", console)
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
