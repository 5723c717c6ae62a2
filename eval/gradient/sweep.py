"""What a length value model is worth as a baseline, over lengths and group sizes: the sandbox at many scales.

    python -m eval.gradient.sweep --run_dirs outputs/seed_0 outputs/seed_1 outputs/seed_2

The sandbox's policy wastes passes of checking; each scale has another number of them (`passes`), or longer ones with as
many decisions (`repeats`). For each run folder, whose policy the others go on from, and each scale: a policy is fitted,
its rollouts are sampled, a length value model is pretrained, and `eval.gradient` measures signal and noise at each
group size. What is measured is kept, so that the same command goes on where it was.

Prints the signal-to-noise ratio of the length stream over that of the best sequence-level penalty, the mean over
policies with the lowest and the highest, and the slope of its logarithm on those of length and group size, and writes
sweep.json and sweep.png.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from eval.gradient.__main__ import GradientArguments, measure_gradients
from eval.gradient.estimators import LAMBDAS, LENVM_GRADIENT
from eval.report import Column, as_entry, is_known, mean_and_range, number_decades, print_table, save_figure, save_json
from eval.runs import run_evaluation, set_threads
from eval.statistics import Interval, percentile_interval, quotient, resample_counts
from lenvm_rl.files import read_json, write_json
from lenvm_rl.modeling.loading import load_policy, load_tokenizer
from lenvm_rl.pretraining.trainer import LengthValueTrainingArguments, pretrain
from lenvm_rl.rollouts.job import SamplingSettings, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import split_by_prompt
from lenvm_rl.sandbox import Overthinking, PolicySettings, distinct_problems, fit_policy

logger = logging.getLogger(__name__)

# Estimators of the length stream that are shown over the best penalty.
SHOWN = (LENVM_GRADIENT, *(f"LenVM, lambda {lam:g}" for lam in LAMBDAS))
ESTIMATORS = "penalty|^LenVM, lambda|per position$|constant V|another rollout"
# The fit to another habit: a fraction of the tokens, at a fraction of the learning rate of a fit from nothing.
FIT = {"train_tokens": 1_200_000, "learning_rate": 1.5e-3}
# Rollouts of a length value model hold about so many tokens, and so many completions at least and at most.
PRETRAINING_TOKENS, FEWEST, MOST = 250_000, 512, 4096
SAMPLES_PER_PROMPT = 8
# Logarithms of lengths that differ less are of one length.
SAME = 0.1
# Tokens of a forward of a gradient, at most.
FORWARD_TOKENS = 1024


@dataclass(frozen=True)
class Scale:
    """How much a policy wastes, see [`~lenvm_rl.sandbox.Overthinking`]."""

    passes: float
    repeats: int = 1

    @property
    def name(self) -> str:
        """A name for a folder."""
        return f"passes_{self.passes:g}_{self.repeats}"

    @property
    def longest(self) -> int:
        """Most tokens that are sampled: a policy may lose count."""
        return int(1.15 * Overthinking(self.passes, self.repeats).longest_completion) + 8


@dataclass
class SweepArguments:
    """What to measure, on how many completions."""

    run_dirs: list[str] = HfArg(
        default_factory=lambda: ["outputs/sandbox"], help="Folders of recipe runs on the sandbox: the base policies."
    )
    passes: list[float] = HfArg(
        default_factory=lambda: [0.0, 1.5, 4.0, 9.0, 19.5, 40.5],
        help="Mean numbers of passes: about 14, 29, 55, 105, 195 and 355 tokens.",
    )
    repeats: list[int] = HfArg(
        default_factory=lambda: [4, 14], help="Further scales, with the sandbox's number of passes: longer passes."
    )
    group_sizes: list[int] = HfArg(default_factory=lambda: [1, 2, 4, 8, 16], help="Completions of a prompt.")
    completions: int = HfArg(default=768, help="Completions of a measurement.")
    batch_size: int = HfArg(default=16, help="Completions in a batch; every group size has to divide it.")
    parameters: str = HfArg(
        default="", help="Regular expression: parameters of the gradient. All of them, unless it is given."
    )
    measure: bool = HfArg(default=True, help="False: report what is measured, and measure nothing.")
    output_dir: str = HfArg(default="outputs/gradient_sweep", help="Where models and results go.")

    def __post_init__(self) -> None:
        if any(self.batch_size % size for size in self.group_sizes) or self.completions % self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be whole groups of {self.group_sizes}, and completions "
                f"{self.completions} whole batches."
            )

    @property
    def scales(self) -> list[Scale]:
        """Numbers of passes first, then longer passes."""
        longer = [Scale(PolicySettings.passes, each) for each in self.repeats]
        return list(dict.fromkeys([*(Scale(each) for each in self.passes), *longer]))


def make_models(base: str, scale: Scale, folder: Path, seed: int) -> None:
    """Fit the policy of a scale, sample its rollouts, and pretrain its length value model, into `folder`."""
    policy = folder / "policy"
    settings = PolicySettings(
        **FIT, seed=seed, passes=scale.passes, repeats=scale.repeats, start=str(Path(base) / "policy")
    )
    if not (policy / "model.safetensors").exists():
        quiet = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        fit_policy(str(policy), settings, **quiet)
    mean = 14 + scale.passes * (1 + 4 * (1 + scale.repeats) + 1.5)
    prompts = int(np.clip(PRETRAINING_TOKENS / mean, FEWEST, MOST)) // SAMPLES_PER_PROMPT // 4 * 4
    pretrain_on(str(policy), folder, prompts, scale.longest, seed)


def pretrain_on(policy: str, folder: Path, prompts: int, longest: int, seed: int, gamma: float | None = None) -> None:
    """Sample rollouts of a policy of the sandbox and pretrain its length value model, both in `folder`.

    Args:
        policy (`str`): its path.
        folder (`pathlib.Path`): gets `rollouts.jsonl` and `length_value_model`.
        prompts (`int`): training prompts, [`SAMPLES_PER_PROMPT`] completions each.
        longest (`int`): most tokens of a completion.
        seed (`int`): of prompts, sampling and training.
        gamma (`float`, *optional*): discount; fitted to the rollouts when omitted.
    """
    tokenizer = load_tokenizer(policy)
    problems = distinct_problems(prompts, 10 * seed + 1, "train")
    sampling = SamplingSettings(SAMPLES_PER_PROMPT, longest, 256, 1.0)
    job = TransformersJob(load_policy(policy), tokenizer, [one.prompt for one in problems], sampling, seed=seed)
    rollouts, metadata = sample_to_file(folder / "rollouts.jsonl", job, policy)
    train, held_out = split_by_prompt(rollouts, 0.1, seed=seed)
    arguments = LengthValueTrainingArguments(
        output_dir=str(folder / "length_value_model"),
        num_train_epochs=3.0,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        save_strategy="no",
        report_to="none",
        seed=seed,
        gamma=gamma,
        use_cpu=True,
        disable_tqdm=True,
    )
    pretrain(policy, train, metadata, arguments, tokenizer, eval_rollouts=held_out)


def measure_scale(args: SweepArguments, base: str, scale: Scale, group_size: int, folder: Path) -> dict[str, Any]:
    """What `eval.gradient` finds at one scale and group size."""
    gradient = GradientArguments(
        policy=str(folder / "policy"),
        length_value_model=str(folder / "length_value_model"),
        base=str(folder / "policy"),
        num_batches=args.completions // args.batch_size,
        batch_size=args.batch_size,
        group_size=group_size,
        max_new_tokens=scale.longest,
        temperature=1.0,
        parameters=args.parameters or None,
        estimators=ESTIMATORS,
        # Padding costs more than small forwards do.
        forward_size=int(np.clip(FORWARD_TOKENS // scale.longest, 1, args.batch_size)),
        reward="reward.sandbox.sandbox_reward",
        output_dir=str(folder / f"groups_{group_size}"),
    )
    Path(gradient.output_dir).mkdir(parents=True, exist_ok=True)
    count = args.completions // group_size
    report = measure_gradients(gradient, gradient.load_prompts(count), None)
    shutil.rmtree(gradient.output_dir)
    rows = {row["name"]: row for row in report["estimators"]}
    return {
        "run": Path(base).name,
        "passes": scale.passes,
        "repeats": scale.repeats,
        "group_size": group_size,
        **report["measured_on"],
        "best_penalty": report["penalties"]["all"]["best"],
        "completions": args.completions,
        "over_best_penalty": {name: rows[name]["over_best_penalty"] for name in SHOWN},
        "snr": {name: row["snr"] for name, row in rows.items()},
        "cosine_to_length": {name: row["cosine_to_length"]["estimate"] for name, row in rows.items()},
        "cosine_to_task": {name: row["cosine_to_task"]["estimate"] for name, row in rows.items()},
    }


def run_sweep(args: SweepArguments) -> list[dict[str, Any]]:
    """Measure what is not measured yet; all results."""
    results = []
    for scale in args.scales:
        for seed, base in enumerate(args.run_dirs):
            folder = Path(args.output_dir) / Path(base).name / scale.name
            for group_size in args.group_sizes:
                place = folder / f"groups_{group_size}.json"
                if not place.exists():
                    if not args.measure:
                        continue
                    if not (folder / "length_value_model" / "config.json").exists():
                        folder.mkdir(parents=True, exist_ok=True)
                        make_models(base, scale, folder, seed)
                    write_json(place, measure_scale(args, base, scale, group_size, folder))
                    logger.info("%s", place)
                results.append(read_json(place))
    return results


def log_slope(points: Sequence[tuple[float, float, Hashable]], seed: int = 0) -> Interval:
    """The exponent b of the fit ``y = a x^b`` with one a for each kind, and its 95 % bootstrap over points.

    Args:
        points (sequence of tuples): x, y and the kind of each point, x and y positive. NaN where no kind has two x.
        seed (`int`, *optional*, defaults to `0`): of the bootstrap.

    What differs within a kind by a tenth at most is one x, up to noise.
    """
    kinds = [kind for _, _, kind in points]
    points = np.log(np.array([pair[:2] for pair in points], dtype=float)).reshape(-1, 2)
    for kind in set(kinds):
        same = np.array([other == kind for other in kinds])
        points[same] -= points[same].mean(axis=0)
    if not (np.abs(points[:, 0]) > SAME).any():
        return percentile_interval(math.nan, np.full(2, math.nan))
    counts = resample_counts(len(points), 2000, seed)

    def slopes(weights: np.ndarray) -> np.ndarray:
        means = weights @ points / weights.sum(axis=1, keepdims=True)
        products = weights @ (points[:, :1] * points) / weights.sum(axis=1, keepdims=True)
        return quotient(products[:, 1] - means[:, 0] * means[:, 1], products[:, 0] - means[:, 0] ** 2)

    drawn = slopes(counts)
    return percentile_interval(float(slopes(np.ones((1, len(points))))[0]), drawn[np.isfinite(drawn)])


def ratio_of(result: Mapping[str, Any], name: str) -> float:
    """How often the signal to noise of the best penalty goes into that of an estimator."""
    found = result["over_best_penalty"][name]["estimate"]
    return math.nan if found is None else found


def grouped(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each scale and group size, over policies: mean, and in brackets the lowest and the highest."""
    keys = dict.fromkeys((one["passes"], one["repeats"], one["group_size"]) for one in results)
    rows = []
    for passes, repeats, size in keys:
        same = [one for one in results if (one["passes"], one["repeats"], one["group_size"]) == (passes, repeats, size)]
        row = {"passes": passes, "repeats": repeats, "group_size": size, "policies": len(same)}
        row |= {name: mean_and_range([one[name] for one in same]) for name in ("mean_tokens", "explained_variance")}
        row |= {name: mean_and_range([ratio_of(one, name) for one in same]) for name in SHOWN}
        row["cosine"] = mean_and_range([one["cosine_to_length"][f"LenVM, lambda {LAMBDAS[0]:g}"] for one in same])
        row["cut"] = max(one["cut"] for one in same)
        row["best_penalty"] = ", ".join(dict.fromkeys(one["best_penalty"] or "–" for one in same))
        rows.append(row)
    return rows


COLUMNS = (
    Column("passes", lambda row: f"{row['passes']:g}" + (f" x {row['repeats']}" if row["repeats"] > 1 else "")),
    Column("tokens", "mean_tokens", 0, ends=False),
    Column("group", "group_size"),
    Column("policies", "policies"),
    Column("V explains", "explained_variance", 2, ends=False),
    *(Column(name.removeprefix("LenVM, "), name, 1) for name in SHOWN),
    Column("cosine of 0.95", "cosine", 2, ends=False),
    Column("cut", "cut", 0, scale=100, unit="%"),
    Column("best penalty", lambda row: row["best_penalty"].replace(" penalty", ""), left=True),
)


def slopes(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of the ratio in length, by passes and by repeats, and in group size, for each shown estimator."""
    own, wasting = PolicySettings.passes, [one for one in results if one["passes"] > 0]
    found = []
    for name in SHOWN:
        for axis, key, kinds, chosen in (
            ("tokens, more passes", "mean_tokens", ("group_size",), [r for r in wasting if r["repeats"] == 1]),
            ("tokens, longer passes", "mean_tokens", ("group_size",), [r for r in wasting if r["passes"] == own]),
            ("group size", "group_size", ("passes", "repeats"), [r for r in wasting if r["group_size"] > 1]),
        ):
            points = [
                (one[key], ratio_of(one, name), tuple(one[kind] for kind in kinds))
                for one in chosen
                if ratio_of(one, name) > 0
            ]
            exponent = as_entry(log_slope(points))
            found.append({"estimator": name, "against": axis, "exponent": exponent, "points": len(points)})
    return found


SLOPE_COLUMNS = (
    Column("estimator", "estimator"),
    Column("ratio against", "against", left=True),
    Column("exponent", "exponent", 2, sign="+"),
    Column("points", "points"),
)


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The ratio against length, more passes solid and longer passes dashed, a panel for each shown estimator."""
    figure = Figure(figsize=(3.4 * len(SHOWN), 3.8), layout="constrained")
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    sizes = sorted({row["group_size"] for row in rows})
    for axis, name in zip(axes, SHOWN, strict=True):
        for number, size in enumerate(sizes):
            for style, chosen in (
                ("-", [row for row in rows if row["repeats"] == 1]),
                ("--", [row for row in rows if row["passes"] == PolicySettings.passes]),
            ):
                line = sorted(
                    (row for row in chosen if row["group_size"] == size and is_known(row[name])),
                    key=lambda row: row["mean_tokens"]["estimate"],
                )
                if len(line) < 2:
                    continue
                x = [row["mean_tokens"]["estimate"] for row in line]
                label = f"groups of {size}" if style == "-" else None
                axis.plot(
                    x, [row[name]["estimate"] for row in line], style, color=f"C{number}", marker="o", ms=3, label=label
                )
                if style == "-":
                    ends = ([row[name][end] for row in line] for end in ("low", "high"))
                    axis.fill_between(x, *ends, color=f"C{number}", alpha=0.12, linewidth=0)
        axis.axhline(1.0, color="black", linewidth=0.6)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("mean tokens")
        number_decades(axis.xaxis)
        number_decades(axis.yaxis)
    axes[0].set_ylabel("signal to noise over the best penalty's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sizes), fontsize=8)
    save_figure(path, figure)


def main(args: SweepArguments) -> list[dict[str, Any]]:
    """Measure, print, write."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=True)
    results = run_sweep(args)
    rows, fits = grouped(results), slopes(results)
    console = Console(width=220, highlight=False)
    print_table(console, rows, COLUMNS, "signal to noise over the best penalty's", sections=lambda row: row["passes"])
    print_table(console, fits, SLOPE_COLUMNS, "ratio = a x^b", sections=lambda row: row["estimator"])
    save_json(Path(args.output_dir) / "sweep.json", {"results": results, "slopes": fits})
    plot_sweep(rows, Path(args.output_dir) / "sweep.png")
    console.print(f"Written to {args.output_dir}/sweep.json and .png")
    return results


if __name__ == "__main__":
    run_evaluation(SweepArguments, main, "eval.gradient.sweep", __doc__)
