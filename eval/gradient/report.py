"""What `eval.gradient` says: numbers, a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from eval.gradient.estimators import (
    CONTROL,
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
from eval.gradient.gradients import GradientStatistics
from eval.report import (
    MANY_CUT,
    Column,
    as_entry,
    cell_text,
    draw_intervals,
    half_widths,
    is_known,
    legend_below,
    print_table,
    save_figure,
)

# What the kinds are called in the figure, and their colours.
KIND_LOOKS = {
    TASK: ("task", "#000000"),
    SEQUENCE: ("one number per completion", "#d62728"),
    PLAIN: ("return of each token, no baseline", "#888888"),
    GROUP: ("baseline of the group", "#ff7f0e"),
    LENVM: ("length value model as baseline", "#1f77b4"),
    CONTROL: ("other values as baseline", "#2ca02c"),
    GATE: ("gated by correctness", "#9467bd"),
}
# Cosines are not shown beyond this: their estimates have no bound.
WIDEST = 1.6
COLUMNS = (
    Column("estimator", "name"),
    Column("kind", "kind", left=True),
    Column("SNR of a batch", "snr", 2),
    Column("LenVM over it", "lenvm_over_it", 2),
    Column("over best penalty", "over_best_penalty", 2),
    Column("cosine to task", "cosine_to_task", 2),
    Column("cosine to length", "cosine_to_length", 2),
)


def summarise_gradients(found: Sequence[Estimator], statistics: GradientStatistics, batch_size: int) -> dict[str, Any]:
    """The numbers of all estimators.

    Returns:
        `dict`: `estimators`, one dictionary each, the highest signal-to-noise ratio first; `penalties`, the ratio of
        the frozen model at lambda 1 over the best sequence-level penalty, of all and of those in tokens; `cosines` of
        every two expected gradients, without intervals.
    """
    names = [each.name for each in found]
    ours, task, length = (names.index(name) for name in (LENVM_GRADIENT, TASK_GRADIENT, LENGTH_GRADIENT))
    ratios = [statistics.snr(index) for index in range(len(found))]
    penalties = [index for index, each in enumerate(found) if each.kind == SEQUENCE]
    rows = []
    for index, (estimator, snr) in enumerate(zip(found, ratios, strict=True)):
        signal, noise = statistics.signal_and_noise(index)
        row = {"name": estimator.name, "kind": estimator.kind, "snr": as_entry(snr), "signal": signal, "noise": noise}
        # The ratio is proportional to the number of completions.
        row["completions_for_snr_1"] = batch_size / snr.estimate if snr.estimate > 0 else None
        row["lenvm_over_it"] = as_entry(statistics.snr_ratio(ours, [index]))
        row["over_best_penalty"] = as_entry(statistics.snr_ratio(index, penalties))
        row["cosine_to_task"] = as_entry(statistics.cosine(index, task))
        row["cosine_to_lenvm"] = as_entry(statistics.cosine(index, ours))
        row["cosine_to_length"] = as_entry(statistics.cosine(index, length))
        rows.append(row)
    known = np.array([ratio.estimate if np.isfinite(ratio.estimate) else -np.inf for ratio in ratios])
    in_tokens = [index for index in penalties if names[index] != VALUE_SPACE]
    compared = {}
    for title, others in (("all", penalties), ("in_tokens", in_tokens)):
        best = max(others, key=lambda index: known[index])
        ratio = as_entry(statistics.snr_ratio(ours, others))
        compared[title] = {"best": names[best] if np.isfinite(known[best]) else None, "ratio": ratio}
    table = [[float(x) if np.isfinite(x) else None for x in row] for row in statistics.cosines()]
    return {
        "estimators": [rows[index] for index in np.argsort(-known, kind="stable")],
        "penalties": compared,
        "cosines": {name: dict(zip(names, row, strict=True)) for name, row in zip(names, table, strict=True)},
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """The table, and the comparison with the penalties below it."""
    args, about = report["arguments"], report["measured_on"]
    title = (
        f"{args['policy']}: {args['num_batches']} batches of {args['batch_size']} completions, groups of "
        f"{args['group_size']}; {about['parameters']} parameters; seed {args['seed']}"
    )
    print_table(console, report["estimators"], COLUMNS, title)
    console.print(
        f"Completions: {about['mean_tokens']:.1f} tokens, {about['correct']:.1%} correct, {about['cut']:.1%} cut. The "
        f"length value model explains {cell_text(about['explained_variance'], 3)} of the variance of their returns. "
        f"'LenVM over it' is the SNR of {LENVM_GRADIENT!r} over the line's. Cosines are to the gradients of "
        f"{TASK_GRADIENT!r} and {LENGTH_GRADIENT!r}."
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
        console.print(f"SNR of {LENVM_GRADIENT!r} over the best of {words} ({best}): {cell_text(entry['ratio'], 2)}")


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
        color=[KIND_LOOKS[row["kind"]][1] for _, row in known],
        error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
    )
    for kind in dict.fromkeys(row["kind"] for row in reversed(rows)):
        label, color = KIND_LOOKS[kind]
        left.barh(0, 0, color=color, label=label)
    left.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    left.set_ylim(-0.7, len(rows) - 0.3)
    left.set_xlabel("signal-to-noise ratio of a batch's gradient\n(95 % intervals over batches)")
    shown = []
    for key, color, marker, label in (
        ("cosine_to_task", "#000000", "o", "cosine to the task gradient"),
        ("cosine_to_length", "#1f77b4", "s", "cosine to the plain length gradient"),
    ):
        entries = [row[key] for row in rows]
        shown += [end for entry in entries for end in entry.values() if end is not None]
        draw_intervals(right, entries, places, color=color, marker=marker, markersize=4, label=label)
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
    legend_below(figure, left, right)
    save_figure(path, figure)
