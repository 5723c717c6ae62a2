"""What `eval.tradeoff` says of its arms: numbers with intervals, a table, and a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.arms import Arm
from eval.statistics import Interval, mean_interval, statistic_interval
from eval.style_frontier import StyleFrontier
from lenvm_rl.rollouts import atomic_file

INTERVALS = ("tokens", "accuracy", "tokens_correct", "sampled_tokens", "kl", "frontier_gap", "excess_tokens")


def summarise(arm: Arm, frontier: StyleFrontier | None, difficulties: list[int] | None, seed: int) -> dict[str, Any]:
    """One arm as a dictionary of numbers and [low, high] intervals."""

    def interval(result: Interval) -> dict[str, float | None]:
        ends = {"low": result.low, "high": result.high}
        # Too few prompts for an interval leave none; JSON has no NaN.
        known = {name: value if np.isfinite(value) else None for name, value in ends.items()}
        return {"estimate": result.estimate, **known}

    sampled = arm.lengths if arm.sampled is None else arm.sampled
    lengths, correct = arm.lengths.astype(float), arm.correct.astype(float)
    row = {
        "name": arm.name,
        "kind": arm.kind,
        "setting": arm.setting if np.isfinite(arm.setting) else None,
        "completions": len(lengths),
        "tokens": interval(mean_interval(lengths, arm.prompt, seed=seed)),
        "accuracy": interval(mean_interval(correct, arm.prompt, seed=seed)),
        "tokens_correct": None,
        "unfinished": float(1.0 - arm.finished.mean()),
        "sampled_tokens": interval(mean_interval(sampled.astype(float), arm.prompt, seed=seed)),
        "kl": None if arm.kl is None else interval(mean_interval(arm.kl, arm.prompt, seed=seed)),
        "kl_bound": arm.kl_bound,
    }
    if correct.any():
        row["tokens_correct"] = interval(mean_interval(lengths, arm.prompt, correct, seed=seed))
    if frontier is not None:
        level = np.array(difficulties)[arm.prompt]
        floor = np.array([frontier.floors[difficulty] for difficulty in level])
        both = np.stack([lengths, correct], axis=1)
        gap = statistic_interval(both, lambda m: frontier.accuracy(m[:, 0]) - m[:, 1], arm.prompt, seed=seed)
        row["frontier_gap"] = interval(gap)
        excess = np.maximum(lengths - floor, 0.0)
        row["excess_tokens"] = interval(mean_interval(excess, arm.prompt, seed=seed))
        row["by_difficulty"] = {
            str(difficulty): {
                "tokens": float(lengths[level == difficulty].mean()),
                "accuracy": float(correct[level == difficulty].mean()),
                "excess_tokens": float(excess[level == difficulty].mean()),
            }
            for difficulty in sorted(set(difficulties))
        }
    return row


def print_table(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """One line per arm: tokens, accuracy, divergence, and the distance to the style frontier where there is one."""
    table = Table(title=title)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "arm": lambda row: row["name"],
        "tokens": lambda row: _cell(row["tokens"], 1),
        "accuracy": lambda row: _cell(row["accuracy"], 3),
        "tokens if correct": lambda row: _cell(row["tokens_correct"], 1),
        "unfinished": lambda row: f"{row['unfinished']:.1%}",
    }
    if any(row["sampled_tokens"] != row["tokens"] for row in rows):
        columns["sampled tokens"] = lambda row: _cell(row["sampled_tokens"], 1)
    columns["KL to base"] = _divergence
    if "frontier_gap" in rows[0]:
        columns["below frontier"] = lambda row: _cell(row["frontier_gap"], 3)
        columns["excess tokens"] = lambda row: _cell(row["excess_tokens"], 1)
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()), end_section=row["name"] == "base")
    console.print(table)


def _cell(entry: dict[str, float | None] | None, digits: int) -> str:
    if entry is None:
        return "–"
    if entry["low"] is None:
        return f"{entry['estimate']:.{digits}f}"
    return f"{entry['estimate']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def _divergence(row: dict[str, Any]) -> str:
    return _cell(row["kl"], 2) if row["kl_bound"] is None else f"≤ {row['kl_bound']:.2f}"


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """One line per arm: an interval fills three columns, the unknown stays empty, nested entries are left to JSON.

    Args:
        rows (list of `dict`): the arms, as [`summarise`] gives them.
        path (`pathlib.Path`): the file.
    """
    flat = [dict(_flat(row)) for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in flat for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def _flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, entry in row.items():
        if name in INTERVALS:
            ends = {} if entry is None else entry
            for end, suffix in (("estimate", ""), ("low", "_low"), ("high", "_high")):
                yield name + suffix, ends.get(end)
        elif not isinstance(entry, dict):
            yield name, entry
