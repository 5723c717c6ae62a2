"""What `eval.tradeoff` says of its arms: numbers with intervals, a table, remarks, and a figure."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from eval.report import (
    MANY_CUT,
    Column,
    Entry,
    as_entry,
    as_label,
    cell_text,
    draw_intervals,
    is_known,
    legend_below,
    save_figure,
)
from eval.statistics import mean_interval, statistic_interval
from eval.style_frontier import StyleFrontier
from eval.tradeoff.arms import KINDS
from eval.tradeoff.budgets import widest_lead
from eval.tradeoff.sampler import Arm

TRAINED_COLORS = ("#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def summarise_arm(
    arm: Arm, frontier: StyleFrontier | None, difficulties: list[int] | None, seed: int
) -> dict[str, Any]:
    """One arm as a dictionary of numbers and intervals, see `eval.report`.

    Accuracy is the share of correct ones among the completions that were graded; it is unknown if none was.
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
        level, every = np.array(difficulties)[arm.prompt], np.ones_like(graded)
        floor = np.array([frontier.floors[difficulty] for difficulty in level])
        both, weights = np.stack([lengths, correct], axis=1), np.stack([every, graded], axis=1)
        gap = statistic_interval(both, lambda m: frontier.accuracy(m[:, 0]) - m[:, 1], arm.prompt, weights, seed=seed)
        excess = np.maximum(lengths - floor, 0.0)
        row |= {"frontier_gap": as_entry(gap), "excess_tokens": interval(excess)}
        columns = {"tokens": (lengths, every), "accuracy": (correct, graded)}
        columns["excess_tokens"] = (excess, every)
        row["by_difficulty"] = {
            str(each): {name: _mean(*(part[level == each] for part in pair)) for name, pair in columns.items()}
            for each in sorted(set(difficulties))
        }
    return row


def _mean(values: np.ndarray, weights: np.ndarray) -> float | None:
    return float(np.average(values, weights=weights)) if weights.any() else None


def table_columns(rows: list[dict[str, Any]]) -> list[Column]:
    """Tokens, accuracy, divergence, and the distance to the style frontier where there is one."""
    columns = [
        Column("arm", "name"),
        Column("tokens", "tokens"),
        Column("accuracy", "accuracy", 3),
        Column("tokens if correct", "tokens_correct"),
        Column("unfinished", "unfinished", scale=100, unit="%"),
    ]
    if any(row["sampled_tokens"] != row["tokens"] for row in rows):
        columns.append(Column("sampled tokens", "sampled_tokens"))
    columns.append(Column("KL to base", _divergence))
    if "frontier_gap" in rows[0]:
        columns += [Column("below frontier", "frontier_gap", 3), Column("excess tokens", "excess_tokens")]
    return columns


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


def budget_remark(rows: list[dict[str, Any]], curves: dict[str, Any]) -> list[str]:
    """At which token budget tilted decoding is furthest above the base policy cut off there, if it is."""
    found = widest_lead(curves, [row["name"] for row in rows if row["kind"] == "tilt"], rows[0]["name"])
    if found is None:
        return []
    name, budget = found
    ours, theirs = (
        cell_text(curves["accuracy"][each][curves["budgets"].index(budget)], 0, 100, unit=" %")
        for each in (name, rows[0]["name"])
    )
    return [f"Cut off after {budget} tokens, where it leads most: {name} {ours} right, the base policy {theirs}."]


def plot_tradeoff(
    rows: list[dict[str, Any]], frontier: StyleFrontier | None, path: Path, curves: dict[str, Any] | None = None
) -> None:
    """Accuracy against mean tokens with 95 % intervals and, of `curves` (see `eval.tradeoff.budgets`), within token
    budgets. An arm whose accuracy is not known is left out.
    """
    panels = 1 if curves is None else 2
    figure = Figure(figsize=(5.5 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    known = [row for row in rows if is_known(row["accuracy"])]
    _draw_arms(known, axes[0])
    axes[0].set(xlabel="mean tokens", ylabel="accuracy, 95 % intervals over prompts")
    axes[0].grid(alpha=0.3)
    highest = max([row["accuracy"]["high"] or row["accuracy"]["estimate"] for row in known], default=0.0)
    # Room for points on the axis, and where nobody is right, an axis that says so.
    top = min(1.04, 1.25 * highest) if highest > 0 else 1.04
    axes[0].set_ylim(-0.04 * top, top)
    if frontier is not None:
        longest = max(row["tokens"]["high"] or row["tokens"]["estimate"] for row in rows)
        tokens = np.append(frontier.tokens, max(longest, frontier.tokens[-1]))
        label = "style frontier: best mixture of the base policy's own styles"
        axes[0].plot(tokens, frontier.accuracy(tokens), color="#bbbbbb", linestyle="--", label=label, zorder=1)
    if not known:
        axes[0].text(0.5, 0.5, "no completion was graded", ha="center", transform=axes[0].transAxes)
    if curves is not None:
        _draw_curves(known, curves, axes[1])
    legend_below(figure, axes[0])
    save_figure(path, figure)


def _draw_curves(rows: list[dict[str, Any]], curves: dict[str, Any], axis: Axes) -> None:
    """Accuracy within each budget: a line for each arm in its kind's colour, paler for the first of a kind."""
    colors = {name: look.color for name, look in KINDS.items()}
    trained = [row["name"] for row in rows if row["kind"] == "trained"]
    by_name = dict(zip(trained, cycle(TRAINED_COLORS), strict=False))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row["name"] for row in rows if row["kind"] == kind and row["name"] in curves["accuracy"]]
        for number, name in enumerate(own, start=1):
            color = by_name.get(name) or by_name.get(kind.removeprefix("tilt of ")) or colors[kind]
            look = {"color": color, "linestyle": "-", "linewidth": 2 if kind == "base" else 1.2, "marker": "."}
            look |= {"alpha": 0.3 + 0.7 * number / len(own), "zorder": 4 if kind == "base" else 3}
            draw_intervals(axis, curves["budgets"], curves["accuracy"][name], **look)
    axis.set(xscale="log", xlabel="budget: every completion is cut off after so many tokens")
    axis.xaxis.set(major_formatter=ScalarFormatter(), minor_formatter=NullFormatter())
    axis.set_xticks(curves["budgets"][::3], [str(budget) for budget in curves["budgets"][::3]])
    axis.set_title("stronger colour: stronger tilt, larger budget asked for, more samples", fontsize=8, color="#444444")
    axis.grid(alpha=0.3)


def _draw_arms(rows: list[dict[str, Any]], axis: Axes) -> None:
    """Every kind of arm, the base policy over the others; each trained policy has a colour, which its tilts share."""
    trained, colors = [row for row in rows if row["kind"] == "trained"], cycle(TRAINED_COLORS)
    looks = {kind: look for kind, look in KINDS.items() if kind not in ("base", "trained")} | {"base": KINDS["base"]}
    drawn = [([row for row in rows if row["kind"] == kind], look) for kind, look in looks.items()]
    for row, color in zip(trained, colors, strict=False):
        name, tilts = as_label(row["name"]), [other for other in rows if other["kind"] == f"tilt of {row['name']}"]
        drawn.append((tilts, replace(KINDS["tilt"], label=f"{name}, tilted", color=color)))
        drawn.append(([row], replace(KINDS["trained"], label=f"trained: {name}", color=color)))
    for own, look in drawn:
        own = sorted(own, key=lambda row: row["tokens"]["estimate"])
        points = [row["tokens"] for row in own], [row["accuracy"] for row in own]
        size, line = 11 if look.marker == "*" else 6, "-" if look.line else "none"
        shape = {"color": look.color, "marker": look.marker, "markersize": size, "linestyle": line, "linewidth": 1}
        draw_intervals(axis, *points, label=look.label, zorder=3, **shape)
