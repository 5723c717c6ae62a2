"""What the programs write: numbers as JSON and CSV, cells of tables, and figures.

An interval is written as `{"estimate", "low", "high"}`. What is not defined is null, since JSON has no NaN, and a dash
in a table.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eval.statistics import Interval
from lenvm_rl.files import atomic_file

Entry = dict[str, float | None]
ENDS = ("estimate", "low", "high")
# Decades of an axis that take labels at 1, 2 and 5 without one running into the next.
FULL_DECADES = 3


def as_entry(interval: Interval) -> Entry:
    """An interval for JSON: null for what is not defined, such as the ends of a single prompt's."""
    values = {name: float(getattr(interval, name)) for name in ENDS}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def is_known(entry: Entry | None) -> bool:
    """Whether there is a number to show."""
    return entry is not None and entry["estimate"] is not None


def cell_text(entry: Entry | None, digits: int, scale: float = 1.0, sign: str = "") -> str:
    """An interval as "estimate [low, high]", without ends where there are none; a dash where nothing is known."""
    if not is_known(entry):
        return "–"
    shown = [f"{scale * entry[name]:{sign}.{digits}f}" for name in ENDS if entry[name] is not None]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0]


def estimate_text(entry: Entry | None, digits: int, scale: float = 1.0) -> str:
    """An interval's estimate alone; a dash where there is none."""
    return f"{scale * entry['estimate']:.{digits}f}" if is_known(entry) else "–"


def save_json(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """A report as JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(report, indent=1, allow_nan=False).encode())


def save_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV: an interval fills three columns, the unknown stays empty, what is nested is left to the JSON."""
    # A column that is an interval in one row is one in all.
    intervals = {name for row in rows for name, value in row.items() if _is_interval(value)}
    flat = [dict(_flat(row, intervals)) for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in flat for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode("utf-8", errors="backslashreplace"))


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == set(ENDS)


def _flat(row: Mapping[str, Any], intervals: set[str]) -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if name in intervals:
            ends = value or {}
            yield from ((name + suffix, ends.get(end)) for end, suffix in zip(ENDS, ("", "_low", "_high"), strict=True))
        elif not isinstance(value, Mapping):
            yield name, value


def save_figure(path: str | os.PathLike, figure: Figure) -> None:
    """A figure as a PNG, atomically."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def half_widths(entries: Sequence[Entry]) -> list[list[float]]:
    """Distances of the intervals' ends from their estimates, for error bars: below, above.

    0 where there is no interval, or where an end lies on the wrong side of its estimate by rounding.
    """
    sides = []
    for name, sign in (("low", 1.0), ("high", -1.0)):
        ends = [entry["estimate"] if entry[name] is None else entry[name] for entry in entries]
        sides.append([max(0.0, sign * (entry["estimate"] - end)) for entry, end in zip(entries, ends, strict=True)])
    return sides


def as_label(text: str) -> str:
    """A person's name for something, in a figure: no formula between dollar signs, and not hidden for an underscore."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def number_decades(axis: Axis) -> None:
    """Numbers on a logarithmic axis: even steps in a decade, 1, 2, 5, 10, … in a few, powers of ten in many."""
    low, high = axis.get_view_interval()
    if high / low < 10:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    else:
        few = high / low <= 10.0**FULL_DECADES
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=32))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
