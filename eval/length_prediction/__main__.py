"""How well a length value model predicts lengths: at the prompt, and a quarter, half and three quarters of the way.

    python -m eval.length_prediction --rollouts held_out.jsonl --length_value_model outputs/length_value_model \
        --domain_column domain --output_dir outputs/length_prediction

Metrics are as in value pretraining (`lenvm_rl.pretraining.metrics`), overall and for each domain, with 95 % bootstrap
intervals over prompts, beside what needs no model (`lenvm_rl.pretraining.references`): the mean of all lengths, a line
on the prompt's own length, and as a floor the median of the very completions that are to be predicted. Added are the
slope of the calibration and the order at each point: Kendall's tau-b, and the pairwise accuracy, which is the share of
pairs of completions of two different prompts, unequal in length, whose order is predicted (a tie counts half).

Lengths count the end-of-sequence token. Cut completions have no known length: they count in `truncated_share` alone.
Writes length_prediction.json, .csv and .png. Without `--rollouts`, completions of the sandbox's evaluation prompts are
sampled of `--policy`. Killed and started again, it goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from eval.datasets import RolloutArguments, find_rollouts
from eval.length_prediction.measures import (
    ALONG,
    CompletionStatistics,
    boundary_lengths,
    length_metrics,
    read_statistics,
)
from eval.report import (
    Column,
    Entry,
    as_entry,
    as_label,
    half_widths,
    is_known,
    legend_below,
    number_decades,
    print_table,
    save_figure,
    save_report,
)
from eval.runs import run_evaluation
from lenvm_rl.pretraining.metrics import POINTS
from lenvm_rl.returns import remaining_from_logits

logger = logging.getLogger(__name__)

ALL = "all"
# Completions of a domain that are drawn as dots of a size to be seen one by one.
FEW = 5000
# What is predicted from in the table at the prompt, with the metrics of its columns.
BOUNDARY = ("MAE, tokens", "MRE, %", "pairs in order, %", "consistent MRE, %", "MRE to halves, %")
REFERENCES: dict[str, tuple[str | None, ...]] = {
    "length value model": (
        "length_mae_at_0",
        "length_mre_at_0",
        "pairwise_accuracy_at_0",
        "consistent_mre",
        "half_mre",
    ),
    **{
        title: (
            f"reference_{name}_length_mae",
            f"reference_{name}_length_mre",
            None,
            f"reference_{name}_consistent_mre",
        )
        for title, name in (("mean of all lengths", "mean"), ("line on the prompt's tokens", "regression"))
    },
    "prompt's own median (floor)": tuple(
        f"reference_median_{name}" for name in ("length_mae", "length_mre", "pairwise_accuracy")
    ),
    "prompt's other half (noise)": (None, None, None, None, "reference_half_mre"),
    "the model's error over that": (None, None, None, None, "half_ratio"),
}
ALONG_COLUMNS = [
    Column("domain", "domain"),
    Column("point", "point"),
    Column("MAE, tokens", "length_mae"),
    Column("MRE, %", "length_mre", scale=100),
    Column("bias, tokens", "length_bias"),
    Column("explained", "explained_variance", 2),
    Column("slope", "calibration_slope", 2),
    Column("tau-b", "kendall_tau", 2),
    Column("pairs in order, %", "pairwise_accuracy", scale=100),
]


@dataclass
class PredictionArguments(RolloutArguments):
    """Which model is measured, against which completions, and where to write it."""

    domain_column: str | None = HfArg(
        default=None, help="Column of the rollouts whose values are measured apart, e.g. domain, or difficulty."
    )
    num_resamples: int = HfArg(default=2000, help="Bootstrap resamples of the prompts.")


def split_domains(rollouts: Dataset, column: str | None) -> dict[str, Tensor]:
    """Rows of all domains together, then of each; a prompt belongs to one domain."""
    everything = {ALL: torch.arange(len(rollouts))}
    if column is None:
        return everything
    if column not in rollouts.column_names:
        raise ValueError(
            f"The rollouts have no column {column!r} for --domain_column; they have {rollouts.column_names}."
        )
    rows: dict[str, list[int]] = {}
    domain_of: dict[int, str] = {}
    for row, (name, group) in enumerate(zip(rollouts[column][:], rollouts["group"][:], strict=True)):
        if domain_of.setdefault(group, str(name)) != str(name):
            raise ValueError(f"Prompt {group} is in the domains {domain_of[group]!r} and {name!r}: it must be in one.")
        rows.setdefault(str(name), []).append(row)
    if ALL in rows:
        raise ValueError(f"A domain may not be called {ALL!r}: that is what all of them together are called.")
    return everything | {name: torch.tensor(rows[name]) for name in sorted(rows)}


def print_tables(domains: Mapping[str, Mapping[str, Entry]], console: Console) -> None:
    """A table of the errors at the prompt beside the references, and one of the way."""
    boundary, along = [], []
    for domain, found in domains.items():
        count, cut = (found[name]["estimate"] for name in ("completions", "truncated_share"))
        boundary.append({"domain": domain, "label": f"{domain}: {count:.0f} completions, {100 * cut:.1f}% cut"})
        for label, names in REFERENCES.items():
            cells = {title: found.get(name) for title, name in zip(BOUNDARY, names, strict=False)}
            boundary.append({"domain": domain, "label": f"  {label}", **cells})
        for percent in POINTS:
            cells = {name: found.get(f"{name}_at_{percent}") for name in ALONG}
            along.append({"domain": domain, "point": f"{percent}%", **cells})
    columns = [Column(title, title, scale=100 if place else 1) for place, title in enumerate(BOUNDARY)]
    columns = [Column("predicted from", "label"), *columns]
    for title, rows, shown in (("at the prompt", boundary, columns), ("along the way", along, ALONG_COLUMNS)):
        print_table(console, rows, shown, title, sections=lambda row: row["domain"])


def plot_prediction(
    data: CompletionStatistics, domains: Mapping[str, Tensor], report: Mapping[str, Any], path: Path
) -> None:
    """Predicted against true lengths at the prompt, and the relative error along the way, as a PNG."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    lengths, errors = figure.subplots(1, 2)
    shown = [name for name in domains if name != ALL] or [ALL]
    wheel = colormaps["tab10"].colors if len(shown) <= 10 else colormaps["turbo"].resampled(len(shown)).colors
    colors = dict(zip(shown, wheel, strict=False))
    for name in shown:
        _scatter(lengths, data.select(domains[name]), colors[name])
    # The line has no say in how far the axes reach.
    lengths.set(xlim=lengths.get_xlim(), ylim=lengths.get_ylim())
    lengths.axline((1, 1), (2, 2), color="#888888", linewidth=0.8, zorder=0, label="as predicted")
    lengths.set(xlabel="predicted at the prompt, tokens", ylabel="true length, tokens")
    looks = [("o", 9, "completions"), ("o", 36, "return-consistent length of each prompt")]
    if not bool(data.finished.all()):
        looks.append((r"$\vartriangle$", 25, "cut completions: longer than shown"))
    for marker, size, text in looks:
        lengths.scatter([], [], s=size, marker=marker, color="#555555", label=text)
    lengths.legend(fontsize=8, loc="upper left")
    for name in (name for name in report if is_known(report[name].get("length_mre_at_0"))):
        entries = [report[name][f"length_mre_at_{percent}"] for percent in POINTS]
        middle = [entry["estimate"] for entry in entries]
        below, above = half_widths(entries)
        color = "#000000" if name == ALL else colors[name]
        errors.plot(POINTS, middle, marker="o", color=color, label=as_label(name))
        errors.fill_between(POINTS, np.subtract(middle, below), np.add(middle, above), color=color, alpha=0.15, lw=0)
    errors.set(xlabel="% of the completion that stands", ylabel="mean relative error", xticks=POINTS)
    errors.set_ylim(bottom=0)
    if errors.lines:
        legend_below(figure, errors, ncols=8)
    else:
        errors.text(0.5, 0.5, "no completion ended", ha="center", transform=errors.transAxes)
    save_figure(path, figure)


def _scatter(axis: Axes, data: CompletionStatistics, color: Any) -> None:
    """A domain's completions, those that were cut as hollow triangles, and the lengths of its prompts as discs."""
    axis.set(xscale="log", yscale="log")
    predicted, ended = remaining_from_logits(data.at(0)[0], data.gamma), data.finished.bool()
    size, alpha = (9, 0.35) if len(predicted) <= FEW else (4, 0.15)
    axis.scatter(predicted[ended], data.lengths[ended], s=size, alpha=alpha, color=color, linewidths=0)
    look = {"marker": "^", "facecolors": "none", "edgecolors": color, "lw": 0.6, "alpha": 0.5}
    axis.scatter(predicted[~ended], data.lengths[~ended], s=14, **look)
    axis.scatter(*boundary_lengths(data), s=24, color=color, edgecolors="white", linewidths=0.6, zorder=3)
    for side in (axis.xaxis, axis.yaxis):
        number_decades(side)


def main(args: PredictionArguments) -> dict[str, Any]:
    """Samples or reads, measures, prints, and writes length_prediction.json, .csv and .png."""
    args = args.in_folder("length_prediction", "length_prediction.json")
    rollouts, _ = find_rollouts(args)
    domains = split_domains(rollouts, args.domain_column)
    model = args.load_reader()
    data = read_statistics(model, rollouts, args.forward_tokens)
    measured: dict[str, dict[str, Entry]] = {}
    for name, rows in tqdm(domains.items(), desc="measuring", unit="domain"):
        found = length_metrics(data.select(rows), args.num_resamples, args.seed)
        measured[name] = {metric: as_entry(interval) for metric, interval in found.items()}
        if found["truncated_share"].estimate == 1:
            logger.warning("%s: none of its %d completions ended, so no length is known", name, len(rows))
    prompts = {name: len(set(data.groups[rows].tolist())) for name, rows in domains.items()}
    report = {"arguments": asdict(args), "gamma": data.gamma, "prompts": prompts, "domains": measured}
    lines = [
        {"domain": domain, "metric": name, **entry}
        for domain, found in measured.items()
        for name, entry in found.items()
    ]
    save_report(args.output_dir, "length_prediction", report, lines)
    plot_prediction(data, domains, measured, Path(args.output_dir) / "length_prediction.png")
    console = Console(width=170, highlight=False)
    print_tables(measured, console)
    if prompts[ALL] == 1:
        console.print("There is one prompt, so no number has an interval: give rollouts of more prompts.")
    console.print(
        f"{prompts[ALL]} prompts, gamma {data.gamma:.5f}; 95 % intervals over prompts. Written to "
        f"{args.output_dir}/length_prediction.json, .csv and .png"
    )
    return report


if __name__ == "__main__":
    run_evaluation(PredictionArguments, main, "eval.length_prediction", __doc__)
