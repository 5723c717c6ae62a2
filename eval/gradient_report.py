"""What `eval.gradient` says: a table, a CSV and a figure."""

from __future__ import annotations

import csv
import io
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from eval.gradient_estimators import (
    GATE,
    GROUP,
    LENGTH_GRADIENT,
    LENVM,
    LENVM_GRADIENT,
    PLAIN,
    SEQUENCE,
    TASK,
    TASK_GRADIENT,
    VALUE_SPACE,
    Estimator,
)
from eval.gradient_statistics import GradientStatistics
from eval.statistics import Interval
from lenvm_rl.rollouts import atomic_file

INTERVALS = ("snr", "lenvm_over_it", "cosine_to_task", "cosine_to_length")
COLORS = {
    TASK: "#000000",
    SEQUENCE: "#d62728",
    PLAIN: "#888888",
    GROUP: "#ff7f0e",
    LENVM: "#1f77b4",
    GATE: "#9467bd",
}


def summarise(
    found: list[Estimator], statistics: GradientStatistics, batch_size: int, task: int, length: int
) -> list[dict[str, Any]]:
    """A dictionary for each estimator, the highest signal-to-noise ratio first.

    Args:
        found (list of [`~eval.gradient_estimators.Estimator`]): as their gradients are numbered.
        statistics ([`~eval.gradient_statistics.GradientStatistics`]): of these gradients.
        batch_size (`int`): completions in a batch.
        task (`int`), length (`int`): which of them the cosines are to.
    """
    rows = []
    ours = [estimator.name for estimator in found].index(LENVM_GRADIENT)
    for index, estimator in enumerate(found):
        snr = statistics.snr(index)
        signal, noise = statistics.signal_and_noise(index)
        rows.append(
            {
                "name": estimator.name,
                "kind": estimator.kind,
                "snr": as_entry(snr),
                "signal": signal,
                "noise": noise,
                # The ratio is proportional to the number of completions.
                "completions_for_snr_1": batch_size / snr.estimate if snr.estimate > 0 else None,
                "lenvm_over_it": as_entry(statistics.snr_ratio(ours, [index])),
                "cosine_to_task": as_entry(statistics.cosine(index, task)),
                "cosine_to_length": as_entry(statistics.cosine(index, length)),
            }
        )
    return sorted(rows, key=lambda row: _or_lowest(row["snr"]["estimate"]), reverse=True)


def compare_penalties(found: list[Estimator], statistics: GradientStatistics) -> dict[str, Any]:
    """The frozen model's ratio at lambda 1 over the best sequence-level penalty's: of all, and of those in tokens."""
    names = [each.name for each in found]
    penalties = [index for index, each in enumerate(found) if each.kind == SEQUENCE]
    in_tokens = [index for index in penalties if names[index] != VALUE_SPACE]
    ours = names.index(LENVM_GRADIENT)
    compared = {}
    for title, others in (("all", penalties), ("in_tokens", in_tokens)):
        best = max(others, key=lambda index: _or_lowest(as_entry(statistics.snr(index))["estimate"]))
        measured = np.isfinite(statistics.snr(best).estimate)
        compared[title] = {
            "best": names[best] if measured else None,
            "ratio": as_entry(statistics.snr_ratio(ours, others)),
        }
    return compared


def all_cosines(found: list[Estimator], statistics: GradientStatistics) -> dict[str, dict[str, float | None]]:
    """Cosines of every two estimators' expected gradients, without intervals."""
    table = statistics.cosines()
    names = [each.name for each in found]
    rows = [dict(zip(names, (float(x) if np.isfinite(x) else None for x in row), strict=True)) for row in table]
    return dict(zip(names, rows, strict=True))


def _or_lowest(ratio: float | None) -> float:
    return -np.inf if ratio is None else ratio


def as_entry(interval: Interval) -> dict[str, float | None]:
    """Estimate and ends; `None` for what is not defined, since JSON has no NaN."""
    ends = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return {name: value if np.isfinite(value) else None for name, value in ends.items()}


def print_report(report: dict[str, Any], console: Console) -> None:
    """The table, and the comparison with the penalties below it."""
    args, about = report["arguments"], report["measured_on"]
    table = Table(
        title=f"{args['policy']}: {args['num_batches']} batches of {args['batch_size']} completions, groups of "
        f"{args['group_size']}; {about['parameters']} parameters; seed {args['seed']}"
    )
    for name in ("estimator", "kind"):
        table.add_column(name, no_wrap=True)
    for name in ("SNR of a batch", "LenVM over it", "cosine to task", "cosine to length"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["estimators"]:
        table.add_row(
            row["name"],
            row["kind"],
            _cell(row["snr"]),
            _cell(row["lenvm_over_it"]),
            _cell(row["cosine_to_task"]),
            _cell(row["cosine_to_length"]),
        )
    console.print(table)
    explained = about["explained_variance"]
    console.print(
        f"Completions: {about['mean_tokens']:.1f} tokens, {about['correct']:.1%} correct, {about['cut']:.1%} cut. The "
        f"length value model explains {'–' if explained is None else f'{explained:.3f}'} of the variance of their "
        f"returns. 'LenVM over it' is the SNR of {LENVM_GRADIENT!r} over that of the line. Cosines are to the "
        f"gradients of {TASK_GRADIENT!r} and {LENGTH_GRADIENT!r}."
    )
    for title, words in (("all", "all sequence-level penalties"), ("in_tokens", "those that count tokens")):
        entry = report["penalties"][title]
        best = "none is measured" if entry["best"] is None else entry["best"]
        console.print(
            f"SNR of {LENVM_GRADIENT!r} over the best of {words} ({best}): {_cell(entry['ratio'])} (asked on the "
            "sandbox: at least 5)"
        )


def _cell(entry: dict[str, float | None]) -> str:
    if entry["estimate"] is None:
        return "–"
    if entry["low"] is None or entry["high"] is None:
        return f"{entry['estimate']:.2f}"
    return f"{entry['estimate']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """One line per estimator; an interval fills three columns, and what is not defined stays empty."""
    flat = [
        dict(
            chain.from_iterable(
                [(name, entry["estimate"]), (f"{name}_low", entry["low"]), (f"{name}_high", entry["high"])]
                if name in INTERVALS
                else [(name, entry)]
                for name, entry in row.items()
            )
        )
        for row in rows
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def plot_gradients(rows: list[dict[str, Any]], path: Path) -> None:
    """Signal-to-noise ratios as bars with intervals, and beside them the cosines to task and length."""
    rows = rows[::-1]
    figure = Figure(figsize=(11, 0.34 * len(rows) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    left.barh(
        places,
        [row["snr"]["estimate"] or 0.0 for row in rows],
        xerr=_half_widths([row["snr"] for row in rows]),
        color=[COLORS[row["kind"]] for row in rows],
        error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
    )
    for kind in dict.fromkeys(row["kind"] for row in reversed(rows)):
        left.barh(0, 0, color=COLORS[kind], label=kind)
    left.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    left.set_xlabel("signal-to-noise ratio of a batch's gradient")
    left.legend(fontsize=8, loc="lower right")
    for key, color, marker, label in (
        ("cosine_to_task", "#000000", "o", "to the task gradient"),
        ("cosine_to_length", "#1f77b4", "s", "to the plain length gradient"),
    ):
        known = [(place, row[key]) for place, row in zip(places, rows, strict=True) if row[key]["estimate"] is not None]
        right.errorbar(
            [entry["estimate"] for _, entry in known],
            [place for place, _ in known],
            xerr=_half_widths([entry for _, entry in known]),
            color=color,
            marker=marker,
            markersize=4,
            linestyle="none",
            elinewidth=0.8,
            label=label,
        )
    right.axvline(0, color="#bbbbbb", linewidth=0.8)
    right.set_xlim(-1.15, 1.15)
    right.set_xlabel("cosine of expected gradients")
    right.legend(fontsize=8, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=150)


def _half_widths(entries: list[dict[str, float | None]]) -> list[list[float]]:
    """Distances of intervals' ends from their estimates; 0 where there is no interval."""
    sides = []
    for name, sign in (("low", 1.0), ("high", -1.0)):
        ends = [entry["estimate"] if entry[name] is None else entry[name] for entry in entries]
        sides.append(
            [
                0.0 if end is None else max(0.0, sign * (entry["estimate"] - end))
                for entry, end in zip(entries, ends, strict=True)
            ]
        )
    return sides
