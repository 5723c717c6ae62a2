"""What `eval.compare` says of its records: a table for each cell, a figure, and what the page is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from eval.compare.arms import ARMS, LENVM, LENVM_95, TASK_ONLY, TrainingArm
from eval.compare.measures import Judged, answers_to_break_even, area_between, judge_curve, tokens_until
from eval.compare.page import write_page
from eval.compare.plan import CELLS, CHOICE_SEEDS, Run, TrainingCell, reported_runs
from eval.compare.records import Collected, judge_record, recorded_runs
from eval.compare.samples import TASK_TILTED, TILTED
from eval.report import Column, cell_text, mean_and_range, print_table, save_figure, save_json

# Work over a token, in forwards of a model of the policy's size.
SAMPLE, READ, LEARN = 1, 1, 3
# Entries of a curve's points that are drawn.
DRAWN = ("excess", "accuracy", "tokens")
ORACLE = "oracle: waste alone"
COLORS = {TASK_ONLY: "#000000", LENVM: "#d62728", LENVM_95: "#ff7f0e", ORACLE: "#888888"}
PENALTY_COLORS = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#bcbd22")
# Penalties that a cell shows.
BEST = 3
# Kinds of decoding that make a curve of accuracy over tokens beside which a training's is held.
RIVALS = {"over_tilt": ("base", TILTED), "over_task_tilt": (TASK_TILTED,)}


def make_report(collected: Collected) -> dict[str, Any]:
    """The report of records: the world, and of every cell each arm's settings, curves and criteria."""
    worlds = list(collected["worlds"].values())
    # The frontier and the decoding that are shown are of one policy.
    shown = next(iter(collected["worlds"]), None)
    by_run = recorded_runs(collected)
    cells = [{**cell_entry(cell), "arms": report_arms(cell, by_run, collected)} for cell in CELLS]
    return {
        "world": {
            **{f"base_{name}": mean_and_range([one["start"][name] for one in worlds]) for name in DRAWN if worlds},
            "times_floor": mean_and_range([times_floor(one) for one in worlds]),
            "floors": worlds[0]["floors"] if worlds else {},
            "policies": len(worlds),
        },
        "cells": [cell for cell in cells if cell["arms"]],
        "frontier": worlds[0]["frontier"] if worlds else None,
        "decoding": [arm for arm in collected.get("decoding", []) if arm["policy"] == shown],
        "samples": collected.get("samples", []),
    }


def times_floor(world: Mapping[str, Any]) -> float:
    """The base policy's tokens over those of the cheapest good ways, the mean over difficulties."""
    floors = world["floors"].values()
    return world["start"]["tokens"] / (sum(floors) / len(floors))


def cell_entry(cell: TrainingCell) -> dict[str, Any]:
    """What a report says of a cell itself."""
    return {
        "name": cell.name,
        "completions": cell.completions,
        "group_size": cell.group_size,
        "algorithm": cell.algorithm,
    }


def report_arms(
    cell: TrainingCell, by_run: Mapping[Run, Mapping[str, Any]], collected: Collected
) -> list[dict[str, Any]]:
    """The arms of a cell that have reported runs, in the order of the list of arms."""
    arms = []
    judged = {run: judge_record(record, collected) for run, record in by_run.items()}
    seeds = sorted({run.seed for run in by_run if run.seed not in CHOICE_SEEDS})
    for arm in ARMS:
        runs = [run for run in reported_runs(cell, arm, judged, seeds) if run in by_run]
        if runs:
            reported = report_arm(arm, cell, [by_run[run] for run in runs], collected)
            arms.append({"name": arm.name, "kind": arm.kind, "strength": runs[0].strength, **reported})
    reference = next((arm for arm in arms if arm["name"] == LENVM), None)
    for arm in arms:
        arm["times_lenvm"] = paired_ratio(arm, reference)
    return arms


def report_arm(
    arm: TrainingArm, cell: TrainingCell, records: Sequence[Mapping[str, Any]], collected: Collected
) -> dict[str, Any]:
    """An arm of the report, over the seeds of its records."""
    worlds = [collected["worlds"][record["policy"]] for record in records]
    curves, starts = [record["curve"] for record in records], [world["start"] for world in worlds]
    found = [judge_curve(curve, start) for curve, start in zip(curves, starts, strict=True)]
    gaps = [
        float(np.interp(one.end_tokens, world["frontier"]["tokens"], world["frontier"]["accuracy"])) - one.end_accuracy
        for one, world in zip(found, worlds, strict=True)
    ]
    even = [
        break_even(arm, cell, one, record["curve"], world)
        for one, record, world in zip(found, records, worlds, strict=True)
        # What the values of a control would cost, or a critic of another form, no record says.
        if arm.kind not in ("control", "critic")
    ]
    return {
        "learning_rate": records[0]["learning_rate"],
        "seeds": len(records),
        "seeds_run": [record["seed"] for record in records],
        "rollouts": [0.0, *(point["rollouts"] for point in curves[0])],
        **{name: curve_band(curves, starts, name) for name in DRAWN},
        "until_half": median_and_range([one.until_half for one in found]),
        "until_most": median_and_range([one.until_most for one in found]),
        **{f"end_{name}": mean_and_range([getattr(one, f"end_{name}") for one in found]) for name in DRAWN},
        "frontier_gap": mean_and_range(gaps),
        **{name: mean_and_range(areas_over(kinds, records, collected)) for name, kinds in RIVALS.items()},
        "break_even": median_and_range(even) if even else None,
        "critic_explained": mean_and_range([one.critic_explained for one in found]),
        "end_critic_explained": mean_and_range([one.end_critic_explained for one in found]),
        "unsafe": sum(one.unsafe for one in found) / len(found),
        "kept": sum(one.kept for one in found) / len(found),
    }


def areas_over(kinds: Sequence[str], records: Sequence[Mapping[str, Any]], collected: Collected) -> list[float | None]:
    """For each record, the area between its curve and the decoding of the given kinds from the same base policy."""
    areas = []
    for record in records:
        curve = [collected["worlds"][record["policy"]]["start"], *record["curve"]]
        rival = [
            (arm["tokens"]["estimate"], arm["accuracy"]["estimate"])
            for arm in collected.get("decoding", [])
            if arm["policy"] == record["policy"] and arm["kind"] in kinds
        ]
        points = [(point["tokens"], point["accuracy"]) for point in curve]
        areas.append(area_between(points, rival) if rival else None)
    return areas


def break_even(
    arm: TrainingArm, cell: TrainingCell, judged: Judged, curve: Sequence[Mapping[str, float]], world: Mapping[str, Any]
) -> float | None:
    """Answers until the training up to the point where most of the waste is gone has paid for itself.

    Over each token of a rollout go a forward that samples, a forward and a backward (two forwards' work) that learn, a
    forward of the length value model where there is one, and as much again as the learning and a reading for PPO's
    critic. A length value model costs the tokens of its own rollouts, and forward and backward over them in each epoch.
    """
    if judged.until_most is None:
        return None
    reads = arm.kind == "LenVM"
    has_critic = cell.group_size == 1 and not arm.ppo_only
    per_token = SAMPLE + LEARN + (READ if reads else 0) + (READ + LEARN if has_critic else 0)
    forwards = per_token * tokens_until(curve, world["start"], judged.until_most)
    if reads:
        made = world["pretraining"]
        forwards += made["tokens"] * (SAMPLE + LEARN * made["epochs"])
    return answers_to_break_even(forwards, world["start"]["tokens"], judged.end_tokens)


def curve_band(
    curves: Sequence[Sequence[Mapping[str, float]]], starts: Sequence[Mapping[str, float]], name: str
) -> dict[str, list[float]]:
    """Mean, lowest and highest of an entry over runs, at the start and at every evaluation."""
    values = np.array(
        [[start[name], *(point[name] for point in curve)] for start, curve in zip(starts, curves, strict=True)]
    )
    return {
        "mean": values.mean(axis=0).tolist(),
        "low": values.min(axis=0).tolist(),
        "high": values.max(axis=0).tolist(),
    }


def median_and_range(values: Sequence[float | None]) -> dict[str, Any]:
    """Median, lowest and highest over seeds, `None` for what was never reached, and how often that was so."""
    ordered = sorted(math.inf if value is None else value for value in values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    finite = {
        name: value if math.isfinite(value) else None
        for name, value in (("median", middle), ("low", ordered[0]), ("high", ordered[-1]))
    }
    return {**finite, "missed": sum(map(math.isinf, ordered)), "seeds": len(ordered), "each": list(values)}


def paired_ratio(arm: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rollouts of an arm over those of the reference, over the seeds that both have: median and range, or `None`.

    One that is never there takes infinitely longer than one that is: the ratio is infinite (`None`), or 0. Of two that
    are never there, nothing can be said: those seeds are left out.
    """
    if reference is None:
        return None
    until, theirs = (dict(zip(one["seeds_run"], one["until_most"]["each"], strict=True)) for one in (arm, reference))
    pairs = [(until[seed], theirs[seed]) for seed in until if seed in theirs]
    numbers = [[math.inf if value is None else value for value in pair] for pair in pairs]
    ratios = [ours / other for ours, other in numbers if math.isfinite(ours) or math.isfinite(other)]
    if not ratios:
        return None
    found = median_and_range([ratio if math.isfinite(ratio) else None for ratio in ratios])
    return {name: found[name] for name in ("median", "low", "high", "missed")}


def reached_text(until: Mapping[str, Any] | None, digits: int = 0) -> str:
    """`"120 [90, 150]"`, with `"never"` for what was not reached."""
    if until is None:
        return "–"
    median, low, high = (
        "never" if until[name] is None else f"{until[name]:.{digits}f}" for name in ("median", "low", "high")
    )
    return median if low == high else f"{median} [{low}, {high}]"


# How soon, and where to.
PACE_COLUMNS = (
    Column("arm", "name"),
    Column("rate", lambda row: f"{row['learning_rate']:g}"),
    Column("strength", lambda row: "–" if row["strength"] is None else f"{row['strength']:g}"),
    Column("until 50 %", lambda row: reached_text(row["until_half"])),
    Column("until 90 %", lambda row: reached_text(row["until_most"])),
    Column("x LenVM", lambda row: reached_text(row["times_lenvm"], 2)),
    Column("break-even", lambda row: reached_text(row["break_even"])),
)
END_COLUMNS = (
    Column("arm", "name"),
    Column("accuracy", "end_accuracy", 3),
    Column("tokens", "end_tokens"),
    Column("waste", "end_excess"),
    Column("below frontier", "frontier_gap", 3, ends=False),
    Column("unsafe", "unsafe", 0, scale=100, unit="%"),
    Column("critic explains", "critic_explained", 2),
    Column("at the end", "end_critic_explained", 2),
    Column("over tilted base", "over_tilt", 3, sign="+"),
    Column("over tilted task only", "over_task_tilt", 3, sign="+"),
)


def print_cells(report: Mapping[str, Any], console: Console) -> None:
    """Print two tables for each cell. "Over": along training, above tilted decoding of the same mean tokens."""
    world = report["world"]
    if not report["cells"]:
        console.print("No reported run yet.")
        return
    accuracy, tokens, waste = (
        cell_text(world[f"base_{name}"], digits) for name, digits in (("accuracy", 3), ("tokens", 1), ("excess", 1))
    )
    ratio = cell_text(world["times_floor"], 2)
    console.print(
        f"Base: {accuracy} accuracy, {tokens} tokens, {waste} of them waste; {ratio} times the tokens of "
        f"the cheapest good ways (means over {world['policies']} policies)."
    )
    for cell in report["cells"]:
        counts = sorted({arm["seeds"] for arm in cell["arms"]})
        seeds = f"{counts[-1]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        title = f"{cell['completions']} completions a step in groups of {cell['group_size']}, {cell['algorithm']}"
        for columns in (PACE_COLUMNS, END_COLUMNS):
            print_table(console, cell["arms"], columns, f"{title}; {seeds} seeds", sections=lambda arm: arm["kind"])


def best_penalties(cell: Mapping[str, Any], count: int) -> list[str]:
    """The penalties of a cell that get most of the waste out first, by the median over seeds."""

    def until(arm: Mapping[str, Any]) -> float:
        median = arm["until_most"]["median"]
        return math.inf if median is None else median

    penalties = [arm for arm in cell["arms"] if arm["kind"] == "penalty"]
    return [arm["name"] for arm in sorted(penalties, key=until)[:count]]


def plot_curves(report: Mapping[str, Any], path: str | Path) -> None:
    """Waste and accuracy along training: task only, LenVM, oracle, and the best penalties of each cell.

    Two rows of panels for each number of completions a step, a column for each group size.
    """
    cells = report["cells"]
    sizes, groups = (sorted({cell[name] for cell in cells}) for name in ("completions", "group_size"))
    figure = Figure(figsize=(max(5.0, 4.0 * len(groups)), 1.6 + 3.8 * len(sizes)), layout="constrained")
    axes = figure.subplots(2 * len(sizes), len(groups), sharey="row", squeeze=False, height_ratios=(3, 2) * len(sizes))
    empty = set(axes.flat)
    best = {cell["name"]: best_penalties(cell, BEST) for cell in cells}
    # One colour for a penalty in all cells.
    seen = dict.fromkeys(name for names in best.values() for name in names)
    colors = {**COLORS, **{name: PENALTY_COLORS[k % len(PENALTY_COLORS)] for k, name in enumerate(seen)}}
    for cell in cells:
        row = 2 * sizes.index(cell["completions"])
        above, below = axes[row : row + 2, groups.index(cell["group_size"])]
        empty -= {above, below}
        above.sharex(below)
        above.tick_params(labelbottom=False, labelleft=True)
        below.tick_params(labelleft=True)
        for arm in cell["arms"]:
            if arm["name"] not in COLORS and arm["name"] not in best[cell["name"]]:
                continue
            for axis, name in ((above, "excess"), (below, "accuracy")):
                color = colors[arm["name"]]
                axis.plot(arm["rollouts"], arm[name]["mean"], color=color, linewidth=1.2, label=arm["name"])
                axis.fill_between(arm["rollouts"], arm[name]["low"], arm[name]["high"], color=color, alpha=0.12, lw=0)
        above.set_title(
            f"{cell['completions']} a step, groups of {cell['group_size']}, {cell['algorithm']}", fontsize=9
        )
        above.axhline(0.1 * report["world"]["base_excess"]["estimate"], color="black", linewidth=0.6, linestyle=":")
        below.axhline(report["world"]["base_accuracy"]["estimate"], color="black", linewidth=0.6, linestyle=":")
        below.set_xlabel("rollouts")
        above.set_ylabel("waste, tokens")
        above.set_ylim(bottom=0)
        below.set_ylabel("accuracy")
    for axis in empty:
        axis.set_axis_off()
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(path, figure)


def write_comparison(report: Mapping[str, Any], collected: Collected, output_dir: str | Path) -> None:
    """Write `compare.json` (the records, from which all else is made), `compare.png` and `compare.html`."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "compare.json", collected)
    if report["cells"]:
        plot_curves(report, folder / "compare.png")
        write_page(report, folder / "compare.html")
