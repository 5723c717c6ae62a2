"""What `eval.tradeoff` says of its arms: numbers with intervals, a table, and remarks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from eval.arms import Arm
from eval.report import Entry, as_entry, as_label, cell_text, half_widths, is_known, save_figure
from eval.statistics import mean_interval, statistic_interval
from eval.style_frontier import StyleFrontier

# Share of the base policy's completions that may be cut without a word.
MANY_CUT = 0.1


def summarise(arm: Arm, frontier: StyleFrontier | None, difficulties: list[int] | None, seed: int) -> dict[str, Any]:
    """One arm as a dictionary of numbers and intervals, see `eval.report`.

    Accuracy is that of the completions that the reward function has graded; it is unknown if there is none.
    """

    def interval(values: np.ndarray, weights: np.ndarray | None = None) -> Entry:
        return as_entry(mean_interval(values, arm.prompt, weights, seed=seed))

    sampled = arm.lengths if arm.sampled is None else arm.sampled
    lengths, correct, graded = (each.astype(float) for each in (arm.lengths, arm.correct, arm.is_graded))
    row = {
        "name": arm.name,
        "kind": arm.kind,
        "setting": arm.setting if np.isfinite(arm.setting) else None,
        "completions": len(lengths),
        "ungraded": int((graded == 0).sum()),
        "tokens": interval(lengths),
        "accuracy": interval(correct, graded),
        "tokens_correct": interval(lengths, correct) if correct.any() else None,
        "unfinished": float(1.0 - arm.finished.mean()),
        "sampled_tokens": interval(sampled.astype(float)),
        "kl": None if arm.kl is None else interval(arm.kl),
        "kl_bound": arm.kl_bound,
    }
    if frontier is not None:
        level = np.array(difficulties)[arm.prompt]
        floor = np.array([frontier.floors[difficulty] for difficulty in level])
        both, weights = np.stack([lengths, correct], axis=1), np.stack([np.ones_like(graded), graded], axis=1)
        gap = statistic_interval(both, lambda m: frontier.accuracy(m[:, 0]) - m[:, 1], arm.prompt, weights, seed=seed)
        row["frontier_gap"] = as_entry(gap)
        excess = np.maximum(lengths - floor, 0.0)
        row["excess_tokens"] = interval(excess)
        row["by_difficulty"] = {
            str(difficulty): {
                name: _mean(values[level == difficulty], weight[level == difficulty])
                for name, values, weight in (
                    ("tokens", lengths, np.ones_like(graded)),
                    ("accuracy", correct, graded),
                    ("excess_tokens", excess, np.ones_like(graded)),
                )
            }
            for difficulty in sorted(set(difficulties))
        }
    return row


def _mean(values: np.ndarray, weights: np.ndarray) -> float | None:
    return float(np.average(values, weights=weights)) if weights.any() else None


def print_table(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """One line per arm: tokens, accuracy, divergence, and the distance to the style frontier where there is one."""
    table = Table(title=title)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "arm": lambda row: row["name"],
        "tokens": lambda row: cell_text(row["tokens"], 1),
        "accuracy": lambda row: cell_text(row["accuracy"], 3),
        "tokens if correct": lambda row: cell_text(row["tokens_correct"], 1),
        "unfinished": lambda row: f"{row['unfinished']:.1%}",
    }
    if any(row["sampled_tokens"] != row["tokens"] for row in rows):
        columns["sampled tokens"] = lambda row: cell_text(row["sampled_tokens"], 1)
    columns["KL to base"] = _divergence
    if "frontier_gap" in rows[0]:
        columns["below frontier"] = lambda row: cell_text(row["frontier_gap"], 3)
        columns["excess tokens"] = lambda row: cell_text(row["excess_tokens"], 1)
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()), end_section=row["name"] == "base")
    console.print(table)


def _divergence(row: dict[str, Any]) -> str:
    return cell_text(row["kl"], 2) if row["kl_bound"] is None else f"≤ {row['kl_bound']:.2f}"


def remarks(rows: list[dict[str, Any]], prompts: int, max_new_tokens: int) -> list[str]:
    """What a reader of the table should know before drawing conclusions from it."""
    base, found = rows[0], []
    if prompts == 1:
        found.append("There is one prompt, so no number has an interval: give more prompts.")
    if base["unfinished"] > MANY_CUT:
        found.append(
            f"{base['unfinished']:.0%} of the base policy's completions were cut at {max_new_tokens} tokens: their "
            "lengths and answers are not what they would have been. See --max_new_tokens."
        )
    ungraded = sum(row["ungraded"] for row in rows)
    if ungraded:
        total = sum(row["completions"] for row in rows)
        found.append(
            f"{ungraded} of {total} completions were not graded (the reward was None): accuracy is of the rest."
        )
    return found


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
