"""What every program prints and writes: tables, JSON, CSV and figures, with intervals among their cells.

A program describes its table once, as [`Column`]s over rows that are dictionaries (or anything else), and prints it
with [`print_table`]; [`save_report`] writes the same rows as CSV, beside a JSON of everything. An interval in a row is
an [`Entry`], `{"estimate", "low", "high"}`; what is not defined is null, since JSON has no NaN, and a dash in a table.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.statistics import Interval
from lenvm_rl.files import atomic_file, write_json

Entry = dict[str, float | None]
ENDS = ("estimate", "low", "high")
# Share of completions that may be cut without a word.
MANY_CUT = 0.1
# Decades of an axis that take labels at 1, 2 and 5 without one running into the next.
FULL_DECADES = 3


def as_entry(interval: Interval) -> Entry:
    """An interval for JSON: null for what is not defined, such as the ends of a single prompt's."""
    values = {name: float(getattr(interval, name)) for name in ENDS}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def mean_and_range(values: Sequence[float | None]) -> Entry:
    """The mean of a few values, the lowest and the highest, of those that are known: no better interval in so few."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return dict.fromkeys(ENDS)
    return {"estimate": float(np.mean(known)), "low": min(known), "high": max(known)}


def is_known(entry: Entry | None) -> bool:
    """Whether there is a number to show."""
    return entry is not None and entry["estimate"] is not None


def cell_text(
    value: Any, digits: int = 1, scale: float = 1.0, sign: str = "", unit: str = "", ends: bool = True
) -> str:
    """A cell of a table.

    Args:
        value (`Any`): an interval (an [`Entry`] or an `Interval`) gives "estimate [low, high]", without ends where it
            has none; a float is rounded, a whole number, a truth value or a text stands as it is; what is missing or
            not a number is a dash.
        digits (`int`, *optional*, defaults to `1`): decimals.
        scale (`float`, *optional*, defaults to `1.0`): factor of what is shown, 100 for percent.
        sign (`str`, *optional*): `"+"` shows the sign of positive numbers too.
        unit (`str`, *optional*): follows each number.
        ends (`bool`, *optional*, defaults to `True`): whether an interval's ends are shown.
    """
    if isinstance(value, Interval):
        value = as_entry(value)
    if isinstance(value, Mapping):
        numbers = [value[name] for name in (ENDS if ends else ENDS[:1])]
    elif isinstance(value, float):
        numbers = [value if math.isfinite(value) else None]
    else:
        return "–" if value is None else str(value)
    if numbers[0] is None:
        return "–"
    shown = [f"{scale * number:{sign}.{digits}f}{unit}" for number in numbers if number is not None]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0]


@dataclass(frozen=True)
class Column:
    """A column of a printed table.

    Args:
        title (`str`): its head.
        value (`str` or `Callable`): the key of the rows' cell, dashes where it is missing; or what makes it of a row.
        digits, scale, sign, unit, ends: as in [`cell_text`].
        left (`bool`, *optional*, defaults to `False`): whether it stands on the left side, as the first column does.
    """

    title: str
    value: str | Callable[[Any], Any]
    digits: int = 1
    scale: float = 1.0
    sign: str = ""
    unit: str = ""
    ends: bool = True
    left: bool = False

    def cell(self, row: Any) -> str:
        """The cell of a row, as rich's markup."""
        value = self.value(row) if callable(self.value) else row.get(self.value)
        return escape(cell_text(value, self.digits, self.scale, self.sign, self.unit, self.ends))


def print_table(
    console: Console,
    rows: Sequence[Any],
    columns: Sequence[Column],
    title: str | None = None,
    sections: Callable[[Any], Any] | None = None,
) -> None:
    """Prints a line for each row, and a rule wherever `sections` of a row and of the next one differ."""
    table = Table(title=title and escape(title))
    for place, column in enumerate(columns):
        left = column.left or place == 0
        table.add_column(column.title, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = sections is not None and following is not None and sections(row) != sections(following)
        table.add_row(*(column.cell(row) for column in columns), end_section=last)
    console.print(table)


def save_report(
    folder: str | os.PathLike, name: str, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Writes `NAME.json` into a folder and, where there are rows, `NAME.csv`."""
    save_json(Path(folder) / f"{name}.json", report)
    if rows is not None:
        save_csv(Path(folder) / f"{name}.csv", rows)


def save_json(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """A report as JSON, atomically."""
    write_json(path, report, allow_nan=False)


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


def draw_intervals(axis: Axes, x: Sequence[Any], y: Sequence[Any], **look: Any) -> None:
    """Points with error bars; `x` and `y` hold entries or bare numbers, and a point of an unknown entry is left out.

    Nothing is drawn, and nothing stands in the legend, where no point is known. `look` is what `Axes.errorbar` takes.
    """
    points = [
        pair for pair in zip(x, y, strict=True) if all(not isinstance(v, dict | None) or is_known(v) for v in pair)
    ]
    if not points:
        return
    places, errors = [], []
    for values in zip(*points, strict=True):
        bare = not isinstance(values[0], dict)
        places.append(values if bare else [value["estimate"] for value in values])
        errors.append(None if bare else half_widths(values))
    axis.errorbar(*places, xerr=errors[0], yerr=errors[1], **{"linestyle": "none", "elinewidth": 0.8, **look})


def half_widths(entries: Sequence[Entry]) -> list[list[float]]:
    """Distances of the intervals' ends from their estimates, for error bars: below, above.

    0 where there is no interval, or where an end lies on the wrong side of its estimate by rounding.
    """
    sides = []
    for name, sign in (("low", 1.0), ("high", -1.0)):
        ends = [entry["estimate"] if entry[name] is None else entry[name] for entry in entries]
        sides.append([max(0.0, sign * (entry["estimate"] - end)) for entry, end in zip(entries, ends, strict=True)])
    return sides


def legend_below(figure: Figure, *axes: Axes, ncols: int = 4) -> None:
    """One legend of several panels under all of them, where it hides no point."""
    handles, labels = zip(*(axis.get_legend_handles_labels() for axis in axes), strict=True)
    figure.legend(sum(handles, []), sum(labels, []), loc="outside lower center", ncols=ncols, fontsize=8)


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
