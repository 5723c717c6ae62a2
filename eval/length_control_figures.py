"""Figure of a length-control comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, ScalarFormatter

from eval.length_control_cells import Completion
from eval.length_control_report import ALL
from eval.report import Entry, half_widths, save_figure

COLORS = {
    "base": "#000000",
    "prompt": "#ff7f0e",
    "guided": "#1f77b4",
    "guided+prompt": "#2ca02c",
    "enforced": "#9467bd",
    "enforced+prompt": "#8c564b",
}


def plot_length_control(
    rows: Sequence[dict[str, Any]], cells: Mapping[tuple[str, str, int], Sequence[Completion]], path: Path
) -> None:
    """Length score of each arm against the target, a panel per mode, above the lengths themselves.

    Completions that were cut are hollow triangles: they would have been longer.

    Args:
        rows (sequence of `dict`): the cells, as `eval.length_control` summarises them.
        cells (mapping): `(arm, mode, target)` to the completions.
        path (`pathlib.Path`): where to write the PNG.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    targets = sorted({target for _, _, target in cells})
    figure = Figure(figsize=(4.6 * len(modes) + 0.6, 7.4), layout="constrained")
    axes = figure.subplots(2, len(modes), squeeze=False, sharey="row")
    generator = np.random.default_rng(0)
    for column, mode in enumerate(modes):
        above, below = axes[:, column]
        for number, arm in enumerate(arms):
            # Arms stand side by side at each target.
            shift = (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
            places = np.arange(len(targets)) + shift
            own = [row for row in rows if (row["arm"], row["mode"], row["language"]) == (arm, mode, ALL)]
            scores = {row["target"]: row["length_score"] for row in own}
            _draw_scores([scores[target] for target in targets], places, above, COLORS[arm], arm)
            for place, target in zip(places, targets, strict=True):
                cell = cells[arm, mode, target]
                drawn = np.array([one.length for one in cell], dtype=float)
                ended = np.array([one.finished for one in cell], dtype=bool)
                across = place + generator.uniform(-0.3, 0.3, len(drawn)) * 0.8 / len(arms)
                color = COLORS[arm]
                below.scatter(across[ended], drawn[ended], s=6, alpha=0.5, linewidths=0, color=color)
                below.scatter(
                    across[~ended],
                    drawn[~ended],
                    s=12,
                    alpha=0.7,
                    marker="^",
                    facecolors="none",
                    edgecolors=color,
                    lw=0.6,
                )
        for place, target in enumerate(targets):
            below.plot([place - 0.45, place + 0.45], [target, target], color="#d62728", linewidth=1)
        above.set_title(mode.replace("_", " "))
        above.set_ylim(-2, 104)
        below.set_yscale("symlog", base=2, linthresh=1)
        below.yaxis.set_major_formatter(ScalarFormatter())
        below.yaxis.set_minor_locator(NullLocator())
        below.set_xlabel("target, tokens")
        for axis in (above, below):
            axis.set_xticks(range(len(targets)), [str(target) for target in targets])
            axis.set_xlim(-0.6, len(targets) - 0.4)
            axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("length score, 95 % intervals over prompts")
    axes[1, 0].set_ylabel("tokens of each completion (red: target)")
    legend = [*zip(*axes[0, 0].get_legend_handles_labels(), strict=True)]
    if any(not one.finished for cell in cells.values() for one in cell):
        hollow = Line2D([], [], marker="^", markerfacecolor="none", color="#555555", markersize=4, linestyle="none")
        legend.append((hollow, "cut at the cap: would have been longer"))
    figure.legend(*zip(*legend, strict=True), loc="outside lower center", ncols=len(legend), fontsize=9)
    save_figure(path, figure)


def _draw_scores(scores: Sequence[Entry], places: np.ndarray, axis: Any, color: str, label: str) -> None:
    axis.errorbar(
        places,
        [score["estimate"] for score in scores],
        yerr=half_widths(scores),
        color=color,
        marker="o",
        markersize=5,
        linestyle="none",
        label=label,
    )
