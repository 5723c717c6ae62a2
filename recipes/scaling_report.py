"""The report of the scaling study: a table in Markdown, and two figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

POINTS = (0, 25, 50, 75)
# Title of a column, its metric, and its digits.
COLUMNS = (
    ("loss x 1000", "loss", 1000, 2),
    ("MRE at the prompt", "consistent_mre", 1, 3),
    *((f"MRE at {point} %", f"length_mre_at_{point}", 1, 3) for point in POINTS),
    ("Kendall tau", "kendall_tau", 1, 3),
)
SCALES = {"model size": "parameters", "prompts": "training prompts", "samples per prompt": "completions per prompt"}
ABLATIONS = ("optimiser steps", "gamma", "precision of the head")

Rows = dict[str, dict[str, list[dict[str, Any]]]]


def write_report(rows: Rows, folder: Path) -> str:
    """Writes `results.md`, `scaling.png` and `ablations.png`.

    Args:
        rows (`dict`): axis -> label -> results of the seeds, as `recipes.scaling_study` keeps them.
        folder (`pathlib.Path`): where to write.

    Returns:
        `str`: the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {axis: {label: results for label, results in row.items() if results} for axis, row in rows.items()}
    table = make_table(rows)
    (folder / "results.md").write_text(table, encoding="utf-8")
    plot_scaling(rows).savefig(folder / "scaling.png", dpi=150)
    plot_ablations(rows).savefig(folder / "ablations.png", dpi=150)
    return table


def values(results: list[dict[str, Any]], metric: str) -> np.ndarray:
    """A metric of each seed."""
    return np.array([result["metrics"][metric] for result in results], dtype=float)


def make_table(rows: Rows) -> str:
    """One line per cell: the mean over seeds, with the lowest and the highest seed in brackets."""
    titles = ["axis", "cell", "parameters", "epochs", "seeds", *(title for title, *_ in COLUMNS)]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for axis, row in rows.items():
        for label, results in row.items():
            first = [axis, label, f"{results[0]['parameters']:,}", f"{results[0]['epochs']:.1f}", str(len(results))]
            lines.append("| " + " | ".join([*first, *(_entry(results, column) for column in COLUMNS)]) + " |")
    return "\n".join(lines) + "\n"


def _entry(results: list[dict[str, Any]], column: tuple[str, str, float, int]) -> str:
    _, metric, scale, digits = column
    found = scale * values(results, metric)
    return f"{found.mean():.{digits}f} [{found.min():.{digits}f}, {found.max():.{digits}f}]"


def plot_scaling(rows: Rows) -> Figure:
    """Held-out loss against the three sizes: a line through the means, a point for every seed."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, len(SCALES), sharey=True)
    for place, (axis, title) in zip(axes, SCALES.items(), strict=True):
        results = list(rows[axis].items())
        x = [found[0]["parameters"] if axis == "model size" else int(label) for label, found in results]
        losses = [values(found, "loss") for _, found in results]
        place.plot(x, [loss.mean() for loss in losses], color="#1f77b4", marker="o", zorder=3)
        for position, loss in zip(x, losses, strict=True):
            place.scatter([position] * len(loss), loss, color="#888888", s=14, zorder=2)
        place.set_xscale("log")
        place.set_xticks(list(x), [f"{position:,}" for position in x], rotation=30)
        place.minorticks_off()
        place.set_xlabel(title)
        place.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, (V - G)²")
    return figure


def plot_ablations(rows: Rows) -> Figure:
    """Relative error in tokens along the completion, one line per choice: means, and the range of the seeds."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    for place, axis in zip(figure.subplots(1, len(ABLATIONS), sharey=True), ABLATIONS, strict=True):
        for label, results in rows[axis].items():
            found = np.stack([values(results, f"length_mre_at_{point}") for point in POINTS])
            place.plot(POINTS, found.mean(axis=1), marker="o", label=label)
            place.fill_between(POINTS, found.min(axis=1), found.max(axis=1), alpha=0.2)
        place.set_title(axis)
        place.set_xticks(POINTS)
        place.grid(alpha=0.3)
        place.legend(fontsize=8)
    figure.supxlabel("percent of the completion that stands already")
    figure.supylabel("mean relative error of the remaining length, in tokens")
    return figure
