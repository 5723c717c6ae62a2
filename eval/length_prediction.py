"""How well a length value model predicts lengths: at the prompt, and a quarter, half and three quarters of the way.

    python -m eval.length_prediction --rollouts held_out.jsonl --length_value_model outputs/length_value_model \
        --domain_column domain --output_dir outputs/length_prediction

The metrics are those of value pretraining (`lenvm_rl.pretraining.metrics`), overall and for each domain, with 95 %
bootstrap intervals over prompts, beside what needs no model (`lenvm_rl.pretraining.references`): the mean of all
lengths, a line on the prompt's own length, and as a floor the median of the very completions that are to be predicted.
Added are the slope of the calibration and the order at each point: Kendall's tau-b, and the pairwise accuracy, which
is the share of pairs of completions of two different prompts, unequal in length, whose order is predicted (a tie
counts half).

Lengths count the end-of-sequence token. Cut completions have no known length: they count in `truncated_share` alone.
Writes length_prediction.json, .csv and .png. Without `--rollouts`, completions of the sandbox's evaluation prompts are
sampled of `--policy`. Killed and started again, it goes on.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from eval.command_line import run
from eval.datasets import RolloutArguments, find_rollouts
from eval.length_measures import ALONG, Completions, boundary_table, measure, read_completions
from eval.report import (
    Entry,
    as_entry,
    as_label,
    cell_text,
    half_widths,
    is_known,
    number_decades,
    save_csv,
    save_figure,
    save_json,
)
from eval.statistics import Interval
from lenvm_rl.modeling.loading import load_length_value_model
from lenvm_rl.pretraining.metrics import POINTS
from lenvm_rl.returns import remaining_from_logits

logger = logging.getLogger(__name__)

ALL = "all"
# Completions of a domain that are drawn as dots of a size to be seen one by one.
FEW = 5000
# What is predicted from in the table at the prompt, and the metrics that stand in its columns.
REFERENCES = {
    "length value model": (
        "length_mae_at_0",
        "length_mre_at_0",
        "pairwise_accuracy_at_0",
        "consistent_mre",
        "half_mre",
    ),
    **{
        title: (f"reference_{name}_length_mae", f"reference_{name}_length_mre", None)
        + (f"reference_{name}_consistent_mre", None)
        for title, name in (("mean of all lengths", "mean"), ("line on the prompt's tokens", "regression"))
    },
    "prompt's own median (floor)": tuple(
        f"reference_median_{kind}" for kind in ("length_mae", "length_mre", "pairwise_accuracy")
    )
    + (None, None),
    "prompt's other half (noise)": (None, None, None, None, "reference_half_mre"),
    "the model's error over that": (None, None, None, None, "half_ratio"),
}


@dataclass
class PredictionArguments(RolloutArguments):
    """Which model is measured, against which completions, and where to write it."""

    domain_column: str | None = field(
        default=None,
        metadata={"help": "Column of the rollouts whose values are measured apart, e.g. domain, or difficulty."},
    )
    num_resamples: int = field(default=2000, metadata={"help": "Bootstrap resamples of the prompts."})
    forward_tokens: int = field(default=16384, metadata={"help": "Most tokens in a forward, padding counted."})


def split_domains(rollouts: Dataset, column: str | None) -> dict[str, Tensor]:
    """Rows of each domain, after those of all of them; a prompt belongs to one domain.

    Raises:
        ValueError: if there is no such column, a prompt has two domains, or one is called `all`.
    """
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


def report_of(measured: dict[str, dict[str, Interval]]) -> dict[str, dict[str, Entry]]:
    """Numbers for JSON: null stands for what is not defined, and for ends that were not computed."""
    return {domain: {name: as_entry(entry) for name, entry in found.items()} for domain, found in measured.items()}


def print_tables(domains: dict[str, dict[str, Entry]], console: Console) -> None:
    """A table of the errors at the prompt beside the references, and one of the way."""
    boundary = Table(title="at the prompt")
    boundary.add_column("predicted from", no_wrap=True)
    for column in ("MAE, tokens", "MRE, %", "pairs in order, %", "consistent MRE, %", "MRE to halves, %"):
        boundary.add_column(column, justify="right", no_wrap=True)
    along = Table(title="along the way")
    along.add_column("domain", no_wrap=True)
    along.add_column("point", no_wrap=True, justify="right")
    for column in ("MAE, tokens", "MRE, %", "bias, tokens", "explained", "slope", "tau-b", "pairs in order, %"):
        along.add_column(column, justify="right")
    for domain, found in domains.items():
        title = f"{escape(domain)}: {found['completions']['estimate']:.0f} completions"
        boundary.add_row(f"[bold]{title}, {found['truncated_share']['estimate']:.1%} cut[/bold]")
        for label, names in REFERENCES.items():
            cells = [cell_text(found.get(name), 1, 100 if place else 1) for place, name in enumerate(names)]
            boundary.add_row(f"  {label}", *cells, end_section=label == list(REFERENCES)[-1])
        for percent in POINTS:
            entries = [found.get(f"{name}_at_{percent}") for name in ALONG]
            digits, scales = (1, 1, 1, 2, 2, 2, 1), (1, 100, 1, 1, 1, 1, 100)
            cells = [cell_text(*each) for each in zip(entries, digits, scales, strict=True)]
            along.add_row(
                escape(domain) if percent == 0 else "", f"{percent}%", *cells, end_section=percent == POINTS[-1]
            )
    console.print(boundary)
    console.print(along)


def plot(data: Completions, domains: dict[str, Tensor], report: dict[str, Any], path: Path) -> None:
    """Predicted against true lengths at the prompt, and the relative error along the way, as a PNG."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    lengths, errors = figure.subplots(1, 2)
    shown = [name for name in domains if name != ALL] or [ALL]
    wheel = (
        [f"C{place}" for place in range(10)]
        if len(shown) <= 10
        else list(colormaps["turbo"].resampled(len(shown)).colors)
    )
    colors = dict(zip(shown, wheel, strict=False))
    for name in shown:
        _scatter(lengths, data.select(domains[name]), colors[name])
    # The line has no say in how far the axes reach.
    lengths.set(xlim=lengths.get_xlim(), ylim=lengths.get_ylim())
    lengths.axline((1, 1), (2, 2), color="#888888", linewidth=0.8, zorder=0)
    lengths.set(xlabel="predicted at the prompt, tokens", ylabel="true length, tokens")
    looks = [("o", 3, "completions"), ("o", 6, "return-consistent length of each prompt")]
    if not bool(data.finished.all()):
        looks.append((r"$\vartriangle$", 5, "cut completions: longer than shown"))
    handles = [Line2D([], [], marker=m, markersize=size, color="#555555", linestyle="none") for m, size, _ in looks]
    handles.append(Line2D([], [], color="#888888", linewidth=0.8))
    lengths.legend(handles, [*(text for *_, text in looks), "as predicted"], fontsize=8, loc="upper left")
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
        figure.legend(*errors.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    else:
        errors.text(0.5, 0.5, "no completion ended", ha="center", transform=errors.transAxes)
    save_figure(path, figure)


def _scatter(axis: Axes, data: Completions, color: Any) -> None:
    """A domain's completions, those that were cut as hollow triangles, and the lengths of its prompts as discs."""
    axis.set(xscale="log", yscale="log")
    predicted, ended = remaining_from_logits(data.at(0)[0], data.gamma), data.finished.bool()
    few = len(predicted) <= FEW
    axis.scatter(
        predicted[ended], data.lengths[ended], s=9 if few else 4, alpha=0.35 if few else 0.15, color=color, linewidths=0
    )
    axis.scatter(
        predicted[~ended],
        data.lengths[~ended],
        s=14,
        marker="^",
        facecolors="none",
        edgecolors=color,
        lw=0.6,
        alpha=0.5,
    )
    axis.scatter(*boundary_table(data), s=24, color=color, edgecolors="white", linewidths=0.6, zorder=3)
    for side in (axis.xaxis, axis.yaxis):
        number_decades(side)


def save_metrics(path: Path, report: dict[str, dict[str, Entry]]) -> None:
    """A line for each domain and metric."""
    rows = [
        {"domain": domain, "metric": name, **entry} for domain, found in report.items() for name, entry in found.items()
    ]
    save_csv(path, rows)


def main(args: PredictionArguments) -> dict[str, Any]:
    """Samples or reads, measures, prints, and writes length_prediction.json, .csv and .png."""
    args = args.in_folder("length_prediction", "length_prediction.json")
    rollouts, _ = find_rollouts(args)
    domains = split_domains(rollouts, args.domain_column)
    model = load_length_value_model(args.length_value_model, args.base or args.policy)
    data = read_completions(model, rollouts, args.forward_tokens)
    measured = {}
    for name, rows in tqdm(domains.items(), desc="measuring", unit="domain"):
        measured[name] = measure(data.select(rows), args.num_resamples, args.seed)
        if len(measured[name]) == 2:
            logger.warning("%s: none of its %d completions ended, so no length is known", name, len(rows))
    report: dict[str, Any] = {
        "arguments": asdict(args),
        "gamma": data.gamma,
        "prompts": {name: len(set(data.groups[rows].tolist())) for name, rows in domains.items()},
        "domains": report_of(measured),
    }
    folder = Path(args.output_dir)
    save_json(folder / "length_prediction.json", report)
    save_metrics(folder / "length_prediction.csv", report["domains"])
    plot(data, domains, report["domains"], folder / "length_prediction.png")
    console = Console(width=170, highlight=False)
    print_tables(report["domains"], console)
    if report["prompts"][ALL] == 1:
        console.print("There is one prompt, so no number has an interval: give rollouts of more prompts.")
    console.print(
        f"{report['prompts'][ALL]} prompts, gamma {data.gamma:.5f}; 95 % intervals over "
        f"prompts. Written to {folder}/length_prediction.json, .csv and .png"
    )
    return report


if __name__ == "__main__":
    run(PredictionArguments, main, "eval.length_prediction", __doc__)
