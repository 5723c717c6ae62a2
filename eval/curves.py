"""Mean length and accuracy along training, run beside run, from what each wrote to its `metrics.jsonl`.

    python -m eval.curves --runs "task only=outputs/task" "length stream=outputs/lenvm"

A name may be given to several runs: they are seeds of one arm. Curves are means over five lines of a run's log (a line
is a step with `--logging_steps 1` and one pass over a batch, as in the recipes), of the completions that it trained on,
sampled at its temperature from its own prompts: what a run costs and how it goes, not how well the trained policy does,
which `eval.tradeoff` measures on other prompts.

Prints for each arm where it begins and ends, the means of its first and last five lines, and the step from which on it
has half of the tokens that it began with: means over seeds, with the lowest and the highest. Writes curves.json and
curves.png.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from transformers.hf_argparser import HfArg

from eval.report import Column, Entry, as_label, legend_below, mean_and_range, print_table, save_figure, save_json
from eval.runs import STARTS_OVER, check_writable, run_evaluation
from lenvm_rl.files import read_metrics

logger = logging.getLogger(__name__)

TOKENS, ACCURACY = "length/mean", "length/correct"
# Lines of a mean.
WINDOW = 5
COLUMNS = (
    Column("arm", "arm"),
    Column("seeds", "seeds"),
    Column("steps", "steps"),
    Column("tokens, first", "first_tokens"),
    Column("last", "last_tokens"),
    Column("accuracy, first", "first_accuracy", 3),
    Column("last", "last_accuracy", 3),
    Column("half from step", "half_from", 0),
    Column("seeds there", lambda row: f"{row['halved']} of {row['seeds']}"),
)


@dataclass
class CurvesArguments:
    """Which runs."""

    runs: list[str] = HfArg(help="NAME=FOLDER of each run, with metrics.jsonl; runs of one name are seeds of one arm.")
    steps: int | None = HfArg(default=None, help="Leave out what comes after this step.")
    output_dir: str = HfArg(default="outputs/curves", help="Where curves.json and curves.png go.")

    def __post_init__(self) -> None:
        without = [run for run in self.runs if not all(run.partition("="))]
        if without:
            raise ValueError(f"runs must be NAME=FOLDER, got {', '.join(without)}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}.")


def read_curve(folder: str, steps: int | None = None) -> dict[str, list[float | None]]:
    """`step`, `tokens` and `accuracy` of a run, a number for each line of its metrics that tells of completions.

    Accuracy is `None` where none was judged.

    Raises:
        `ValueError`: the run did not train with a trainer of `lenvm_rl`, or has not begun.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"runs: {path} does not exist: name the folder that a trainer of policies wrote.")
    lines = [line for line in read_metrics(path) if line.get(TOKENS) is not None]
    lines = [line for line in lines if steps is None or line["step"] <= steps]
    if not lines:
        raise ValueError(f"runs: no line of {path} has {TOKENS}: the run has not made a step.")
    at = [line["step"] for line in lines]
    apart = max(np.diff(at), default=1)
    if apart > 1:
        logger.warning("%s: up to %d steps from line to line, so a mean of %d is over more steps", path, apart, WINDOW)
    return {"step": at, "tokens": [line[TOKENS] for line in lines], "accuracy": [line.get(ACCURACY) for line in lines]}


def moving_mean(numbers: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """The places, and the mean of each and those before it, NaN where one is not known; of fewer numbers than that,
    their mean alone."""
    window = min(WINDOW, len(numbers))
    means = np.convolve(np.array(numbers, dtype=float), np.ones(window) / window, "valid")
    return np.arange(len(means)) + window - 1, means


def half_from(tokens: Sequence[float | None]) -> int | None:
    """The place from which on means of five are at most half of the first such mean; `None` where there is none."""
    places, means = moving_mean(tokens)
    above = np.flatnonzero(means > means[0] / 2)
    first = int(above[-1]) + 1 if above.size else len(places)
    return int(places[first]) if first < len(places) else None


def over_seeds(values: Sequence[float | None]) -> Entry:
    """The mean over seeds, the lowest and the highest; of one seed, its value alone."""
    found = mean_and_range(values)
    return found if len(values) > 1 else {**found, "low": None, "high": None}


def summarise(curves: Mapping[str, Sequence[Mapping[str, list[float | None]]]]) -> list[dict[str, Any]]:
    """A row for each arm; `half_from` is the mean over the `halved` seeds that got there."""
    rows = []
    for arm, seeds in curves.items():
        row: dict[str, Any] = {"arm": arm, "seeds": len(seeds), "steps": min(curve["step"][-1] for curve in seeds)}
        for key in ("tokens", "accuracy"):
            for name, part in (("first", slice(WINDOW)), ("last", slice(-WINDOW, None))):
                known = [mean_and_range(curve[key][part])["estimate"] for curve in seeds]
                row[f"{name}_{key}"] = over_seeds(known)
        places = [half_from(curve["tokens"]) for curve in seeds]
        row["halved"] = sum(place is not None for place in places)
        row["half_from"] = over_seeds(
            [None if place is None else curve["step"][place] for curve, place in zip(seeds, places, strict=True)]
        )
        rows.append(row)
    return rows


def plot_training(curves: Mapping[str, Sequence[Mapping[str, list[float | None]]]], path: Path) -> None:
    """Tokens beside accuracy, step by step: a colour for each arm, a line for each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, title in zip(axes, ("tokens", "accuracy"), ("mean length, tokens", "accuracy"), strict=True):
        for number, (arm, seeds) in enumerate(curves.items()):
            for place, curve in enumerate(seeds):
                at, means = moving_mean(curve[key])
                label = as_label(arm) if place == 0 and key == "tokens" else None
                axis.plot(np.array(curve["step"])[at], means, color=f"C{number}", linewidth=1.2, label=label)
        axis.set_xlabel(f"optimizer step (means of {WINDOW} lines)")
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    legend_below(figure, axes[0])
    save_figure(path, figure)


def main(args: CurvesArguments) -> dict[str, Any]:
    """Prints the table, writes it with the curves, and draws them."""
    curves: dict[str, list[dict[str, list[float | None]]]] = {}
    for run in args.runs:
        arm, _, folder = run.partition("=")
        curves.setdefault(arm, []).append(read_curve(folder, args.steps))
    check_writable(args.output_dir)
    report = {"arms": summarise(curves), "curves": curves}
    print_table(Console(width=190, highlight=False), report["arms"], COLUMNS)
    save_json(Path(args.output_dir) / "curves.json", report)
    plot_training(curves, Path(args.output_dir) / "curves.png")
    return report


if __name__ == "__main__":
    run_evaluation(CurvesArguments, main, "eval.curves", __doc__, STARTS_OVER)
