"""What `eval.tradeoff` says of its arms: numbers with intervals, a table, and remarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.arms import Arm
from eval.report import Entry, as_entry, cell_text
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
