"""Figures of the evaluation programs."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report import as_label, half_widths, is_known, save_figure
from eval.style_frontier import StyleFrontier

LOOKS = {
    "truncation": {"color": "#888888", "marker": "s", "label": "hard truncation"},
    "prompt": {"color": "#17becf", "marker": "^", "label": "budget in the prompt"},
    "best_of": {"color": "#bcbd22", "marker": "v", "label": "shortest of n"},
    "tilt": {"color": "#1f77b4", "marker": "o", "label": "tilted decoding"},
    "base": {"color": "#000000", "marker": "D", "label": "base policy"},
}
TRAINED_COLORS = ("#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def plot_tradeoff(rows: list[dict[str, Any]], frontier: StyleFrontier | None, path: Path) -> None:
    """Accuracy against mean tokens with 95 % intervals: over all completions, and against the tokens of correct ones.

    In the left panel, points that are away from the base policy have their divergence from it beside them, in nats. An
    arm whose accuracy is not known is left out.

    Args:
        rows (list of `dict`): the arms, as `eval.tradeoff` summarises them.
        frontier ([`~eval.style_frontier.StyleFrontier`], *optional*): drawn in the left panel.
        path (`pathlib.Path`): where to write the PNG.
    """
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    known = [row for row in rows if is_known(row["accuracy"])]
    for axis, key, title in zip(
        axes,
        ("tokens", "tokens_correct"),
        ("mean tokens, all completions", "mean tokens, correct completions"),
        strict=True,
    ):
        for kind, look in LOOKS.items():
            _draw([row for row in known if row["kind"] == kind], key, axis, line=kind != "base", **look)
        trained = [row for row in known if row["kind"] == "trained"]
        for row, color in zip(trained, cycle(TRAINED_COLORS), strict=False):
            name = as_label(row["name"])
            tilted = [other for other in known if other["kind"] == f"tilt of {row['name']}"]
            _draw(tilted, key, axis, line=True, color=color, marker="o", label=f"{name}, tilted")
            _draw([row], key, axis, line=False, color=color, marker="*", label=f"trained: {name}")
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    highest = max([row["accuracy"]["high"] or row["accuracy"]["estimate"] for row in known], default=0.0)
    # Room for points on the axis, and where nobody is right, an axis that says so.
    top = min(1.04, 1.25 * highest) if highest > 0 else 1.04
    axes[0].set_ylim(-0.04 * top, top)
    if frontier is not None:
        longest = max(row["tokens"]["high"] or row["tokens"]["estimate"] for row in rows)
        tokens = np.append(frontier.tokens, max(longest, frontier.tokens[-1]))
        axes[0].plot(
            tokens,
            frontier.accuracy(tokens),
            color="#bbbbbb",
            linestyle="--",
            label="style frontier: best mixture of the base policy's own styles",
            zorder=1,
        )
    _write_divergences([row for row in known if is_known(row["kl"]) and row["kind"] != "base"], axes[0])
    if not any(row["tokens_correct"] for row in known):
        nobody = "no completion is correct" if known else "no completion was graded"
        axes[1].text(0.5, 0.5, nobody, ha="center", transform=axes[1].transAxes)
    axes[0].set_ylabel("accuracy, 95 % intervals over prompts")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(path, figure)


def _write_divergences(rows: list[dict[str, Any]], axis: Axes) -> None:
    for row in rows:
        axis.annotate(
            f"{row['kl']['estimate']:.2g}",
            (row["tokens"]["estimate"], row["accuracy"]["estimate"]),
            (5, -11),
            textcoords="offset points",
            fontsize=7,
            color="#444444",
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            zorder=4,
        )
    if rows:
        axis.set_title("small numbers: KL to the base policy, nats per completion", fontsize=8, color="#444444")


def _draw(rows: list[dict[str, Any]], key: str, axis: Axes, line: bool, color: str, marker: str, label: str) -> None:
    rows = sorted((row for row in rows if is_known(row[key])), key=lambda row: row[key]["estimate"])
    if not rows:
        return
    x, y = ([row[name]["estimate"] for row in rows] for name in (key, "accuracy"))
    errors = [half_widths([row[name] for row in rows]) for name in (key, "accuracy")]
    axis.errorbar(
        x,
        y,
        xerr=errors[0],
        yerr=errors[1],
        color=color,
        marker=marker,
        markersize=13 if marker == "*" else 6,
        linestyle="-" if line else "none",
        linewidth=1,
        elinewidth=0.8,
        label=label,
        zorder=3,
    )
