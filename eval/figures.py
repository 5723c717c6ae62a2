"""Figures of the evaluation programs."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

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

    In the left panel, points that are away from the base policy have their divergence from it beside them, in nats.

    Args:
        rows (list of `dict`): the arms, as `eval.tradeoff` summarises them.
        frontier ([`~eval.style_frontier.StyleFrontier`], *optional*): drawn in the left panel.
        path (`pathlib.Path`): where to write the PNG.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, title in zip(
        axes,
        ("tokens", "tokens_correct"),
        ("mean tokens, all completions", "mean tokens, correct completions"),
        strict=True,
    ):
        for kind, look in LOOKS.items():
            _draw([row for row in rows if row["kind"] == kind and row[key]], key, axis, line=kind != "base", **look)
        trained = [row for row in rows if row["kind"] == "trained"]
        for row, color in zip(trained, cycle(TRAINED_COLORS), strict=False):
            tilted = [other for other in rows if other["kind"] == f"tilt of {row['name']}" and other[key]]
            _draw(tilted, key, axis, line=True, color=color, marker="o", label=f"{row['name']}, tilted")
            if row[key]:
                _draw([row], key, axis, line=False, color=color, marker="*", label=f"trained: {row['name']}")
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        axis.set_ylim(0, min(1.02, 1.25 * max(row["accuracy"]["high"] for row in rows) + 0.01))
    if frontier is not None:
        longest = max(row["tokens"]["high"] for row in rows)
        tokens = np.append(frontier.tokens, max(longest, frontier.tokens[-1]))
        axes[0].plot(
            tokens, frontier.accuracy(tokens), color="#bbbbbb", linestyle="--", label="style frontier", zorder=1
        )
    for row in rows:
        if row["kl"] is not None and row["kind"] != "base":
            place = (row["tokens"]["estimate"], row["accuracy"]["estimate"])
            text = f"{row['kl']['estimate']:.2g}"
            axes[0].annotate(text, place, (4, -9), textcoords="offset points", fontsize=6, color="#555555")
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def _draw(rows: list[dict[str, Any]], key: str, axis: Any, line: bool, color: str, marker: str, label: str) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row[key]["estimate"])
    x, y = ([row[name]["estimate"] for row in rows] for name in (key, "accuracy"))
    errors = [_half_widths([row[name] for row in rows]) for name in (key, "accuracy")]
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


def _half_widths(entries: list[dict[str, float | None]]) -> list[list[float]]:
    """Distances of intervals' ends from their estimates; 0 where there is no interval, or by rounding none."""
    sides = []
    for name, sign in (("low", 1.0), ("high", -1.0)):
        ends = [entry["estimate"] if entry[name] is None else entry[name] for entry in entries]
        sides.append([max(0.0, sign * (entry["estimate"] - end)) for entry, end in zip(entries, ends, strict=True)])
    return sides
