"""What `eval.gradient` says: numbers, a table and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from eval.gradient.estimators import (
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
from eval.gradient.signal import GradientStatistics
from eval.report import as_entry, cell_text, half_widths, is_known, save_figure

# Share of the completions that may be cut without a word.
MANY_CUT = 0.1
# What the kinds are called in the figure.
KINDS = {
    TASK: "task",
    SEQUENCE: "one number per completion",
    PLAIN: "return of each token, no baseline",
    GROUP: "baseline of the group",
    LENVM: "length value model as baseline",
    GATE: "gated by correctness",
}
# Cosines are not shown beyond this: their estimates have no bound.
WIDEST = 1.6
COLORS = {TASK: "#000000", SEQUENCE: "#d62728", PLAIN: "#888888", GROUP: "#ff7f0e", LENVM: "#1f77b4", GATE: "#9467bd"}


def summarise(
    found: list[Estimator], statistics: GradientStatistics, batch_size: int, task: int, length: int
) -> list[dict[str, Any]]:
    """A dictionary for each estimator, the highest signal-to-noise ratio first.

    Args:
        found (list of [`~eval.gradient.estimators.Estimator`]): as their gradients are numbered.
        statistics ([`~eval.gradient.signal.GradientStatistics`]): of these gradients.
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
            cell_text(row["snr"], 2),
            cell_text(row["lenvm_over_it"], 2),
            cell_text(row["cosine_to_task"], 2),
            cell_text(row["cosine_to_length"], 2),
        )
    console.print(table)
    explained = about["explained_variance"]
    console.print(
        f"Completions: {about['mean_tokens']:.1f} tokens, {about['correct']:.1%} correct, {about['cut']:.1%} cut. The "
        f"length value model explains {'–' if explained is None else f'{explained:.3f}'} of the variance of their "
        f"returns. 'LenVM over it' is the SNR of {LENVM_GRADIENT!r} over that of the line. Cosines are to the "
        f"gradients of {TASK_GRADIENT!r} and {LENGTH_GRADIENT!r}."
    )
    if about["cut"] > MANY_CUT:
        console.print(
            f"{about['cut']:.0%} of the completions were cut at {args['max_new_tokens']} tokens: beyond the cut the "
            "length stream knows what the model says, and the task what is paid for half an answer. See "
            "--max_new_tokens."
        )
    for title, words in (("all", "all sequence-level penalties"), ("in_tokens", "those that count tokens")):
        entry = report["penalties"][title]
        best = "none is measured" if entry["best"] is None else entry["best"]
        console.print(
            f"SNR of {LENVM_GRADIENT!r} over the best of {words} ({best}): {cell_text(entry['ratio'], 2)} (asked on "
            "the sandbox: at least 5)"
        )


def plot_gradients(rows: list[dict[str, Any]], path: Path) -> None:
    """Signal-to-noise ratios as bars with intervals, and beside them the cosines to task and length."""
    rows = rows[::-1]
    figure = Figure(figsize=(11, 0.34 * len(rows) + 2.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    known = [(place, row) for place, row in zip(places, rows, strict=True) if is_known(row["snr"])]
    left.barh(
        [place for place, _ in known],
        [row["snr"]["estimate"] for _, row in known],
        xerr=half_widths([row["snr"] for _, row in known]),
        color=[COLORS[row["kind"]] for _, row in known],
        error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
    )
    for kind in dict.fromkeys(row["kind"] for row in reversed(rows)):
        left.barh(0, 0, color=COLORS[kind], label=KINDS[kind])
    left.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    left.set_ylim(-0.7, len(rows) - 0.3)
    left.set_xlabel("signal-to-noise ratio of a batch's gradient\n(95 % intervals over batches)")
    shown = []
    for key, color, marker, label in (
        ("cosine_to_task", "#000000", "o", "cosine to the task gradient"),
        ("cosine_to_length", "#1f77b4", "s", "cosine to the plain length gradient"),
    ):
        measured = [(place, row[key]) for place, row in zip(places, rows, strict=True) if is_known(row[key])]
        shown += [entry[end] for _, entry in measured for end in entry if entry[end] is not None]
        right.errorbar(
            [entry["estimate"] for _, entry in measured],
            [place for place, _ in measured],
            xerr=half_widths([entry for _, entry in measured]),
            color=color,
            marker=marker,
            markersize=4,
            linestyle="none",
            elinewidth=0.8,
            label=label,
        )
    for place, color in ((0, "#bbbbbb"), (-1, "#dddddd"), (1, "#dddddd")):
        right.axvline(place, color=color, linewidth=0.8, zorder=0)
    right.set_xlim(max(-WIDEST, min([-1.1, *shown])) - 0.05, min(WIDEST, max([1.1, *shown])) + 0.05)
    right.set_xlabel("cosine of expected gradients")
    right.set_title(
        "unbiased estimates: one beyond 1 says about 1; without a bar, the\nsignal is too weak for an interval",
        fontsize=8,
    )
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="x")
        axis.set_axisbelow(True)
    handles = [axis.get_legend_handles_labels() for axis in (left, right)]
    figure.legend(
        *(one + other for one, other in zip(*handles, strict=True)), loc="outside lower center", ncols=4, fontsize=8
    )
    save_figure(path, figure)
