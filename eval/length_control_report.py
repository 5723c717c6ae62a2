"""Numbers of a length-control comparison: one row per cell, and one per arm and mode over all targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.length_control_cells import Completion
from eval.length_scores import distinct_share, length_deviation, length_score, repetition_rate
from eval.report import Entry, as_entry, cell_text, estimate_text
from eval.statistics import mean_interval, statistic_interval

ALL = "all"


def summarise_cell(
    completions: Sequence[Completion],
    targets: Sequence[int],
    mode: str,
    correct: Sequence[bool] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of a cell. Every completion counts, also an empty one and one that was cut.

    Args:
        completions (sequence of [`Completion`]): all of them.
        targets (sequence of `int`): tokens asked of each.
        mode (`str`): `"equal_to"`, `"at_most"` or `"at_least"`.
        correct (sequence of `bool`, *optional*): whether each answer is right, where that can be told.
        seed (`int`): of the bootstrap.

    Returns:
        `dict`: intervals (95 %, bootstrapped over prompts) as `{"estimate", "low", "high"}`, shares and counts.
        `exact` is the share that has exactly the target. `perplexity` is ``exp`` of the mean over all tokens of all
        texts; `nll` the mean over texts of the mean over a text's tokens, in nats; neither includes the end, whose own
        cost is `end_nll`. A text without tokens has no `nll`, an unfinished one no `end_nll`: `empty` and `unfinished`
        say how many those are.
    """
    prompt = np.array([each.prompt for each in completions])
    lengths = np.array([each.length for each in completions])
    finished = np.array([each.finished for each in completions])
    natural = np.array([each.natural for each in completions])

    def interval(values: Any, weights: Any = None) -> Entry:
        return as_entry(mean_interval(np.asarray(values, float), prompt, weights, seed=seed))

    row: dict[str, Any] = {
        "completions": len(completions),
        "empty": int((lengths == 0).sum()),
        "unfinished": float(1 - finished.mean()),
        "tokens": interval(lengths),
        "length_score": interval(length_score(lengths, targets, mode)),
        "deviation_percent": interval(100 * np.abs(length_deviation(lengths, targets))),
        "exact": float((lengths == np.asarray(targets)).mean()),
        "natural": interval(natural),
        "forced_steps": float(np.mean([each.forced for each in completions])),
        "repetition": interval([repetition_rate(each.text_ids) for each in completions]),
        "distinct_2": distinct_share([each.text_ids for each in completions]),
        "perplexity": None,
        "nll": None,
        "end_nll": None,
        "accuracy": None if correct is None else interval(correct),
    }
    mean_nll = np.array([float(np.mean(each.nll[: each.length])) if each.length else 0.0 for each in completions])
    if lengths.any():
        row["nll"] = interval(mean_nll, (lengths > 0).astype(float))
        row["perplexity"] = as_entry(statistic_interval(mean_nll, np.exp, prompt, lengths.astype(float), seed=seed))
    if finished.any():
        row["end_nll"] = interval([each.nll[-1] if each.finished else 0.0 for each in completions], finished * 1.0)
    return row


def print_tables(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """One table per mode, all languages together: a line per target and arm, then a line per arm over all targets."""
    console.print(title)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        table = Table(title=mode.replace("_", " "))
        graded = any(row["accuracy"] is not None for row in rows)
        columns = [
            "tokens",
            "score",
            "deviation %",
            "exact %",
            "ended %",
            "cut %",
            "empty",
            "forced",
            "perplexity",
            "NLL",
        ]
        columns += ["end NLL", "repeated %"] + (["accuracy"] if graded else [])
        for column in ("target", "arm", *columns):
            table.add_column(column, justify="left" if column in ("target", "arm") else "right", no_wrap=True)
        shown = [row for row in rows if row["mode"] == mode and row["language"] == ALL]
        for row, following in zip(shown, [*shown[1:], None], strict=True):
            cells = [cell_text(row["tokens"], 1), cell_text(row["length_score"], 1)]
            cells += [cell_text(row["deviation_percent"], 1), f"{100 * row['exact']:.0f}"]
            cells += [estimate_text(row["natural"], 0, 100)]
            cells += [f"{100 * row['unfinished']:.0f}", str(row["empty"]), f"{row['forced_steps']:.2f}"]
            cells += [cell_text(row["perplexity"], 1), estimate_text(row["nll"], 2), estimate_text(row["end_nll"], 1)]
            cells += [estimate_text(row["repetition"], 1, 100)] + ([cell_text(row["accuracy"], 2)] if graded else [])
            last = following is None or following["target"] != row["target"]
            table.add_row(str(row["target"]), row["arm"], *cells, end_section=last)
        console.print(table)
    console.print(
        "Ended: by itself, neither cut nor put there. Perplexity, NLL and end NLL: under the base policy without a "
        "length instruction. All intervals are in the files."
    )
