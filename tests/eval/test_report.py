"""What the programs write: intervals without ends, CSV, cells, and axes and labels of figures."""

import csv
import json
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.report import as_entry, as_label, cell_text, half_widths, number_decades, save_csv, save_json
from eval.statistics import Interval

UNKNOWN = {"estimate": None, "low": None, "high": None}


def overlapping(labels, renderer):
    """Whether any two of the texts that are shown share room."""
    boxes = [label.get_window_extent(renderer) for label in labels if label.get_text() and label.get_visible()]
    return any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def test_entries_and_cells():
    assert as_entry(Interval(0.5, 0.25, math.nan)) == {"estimate": 0.5, "low": 0.25, "high": None}
    assert as_entry(Interval(math.nan, -math.inf, math.nan)) == UNKNOWN
    assert cell_text({"estimate": 0.5, "low": 0.25, "high": 0.75}, 1, 100) == "50.0 [25.0, 75.0]"
    assert cell_text({"estimate": 0.5, "low": None, "high": None}, 2, sign="+") == "+0.50"
    assert [cell_text(value) for value in (None, UNKNOWN, math.nan)] == ["–"] * 3
    assert cell_text(Interval(0.5, 0.25, 0.75), 0, 100, unit="%", ends=False) == "50%"
    assert [cell_text(value, 2) for value in (0.125, 7, "a")] == ["0.12", "7", "a"]


def test_error_bars_have_no_width_where_there_is_no_interval():
    entries = [
        {"estimate": 2.0, "low": 1.5, "high": 3.0},
        {"estimate": 2.0, "low": None, "high": None},
        {"estimate": 2.0, "low": 2.0 + 1e-12, "high": 2.0},
    ]
    assert half_widths(entries) == [[0.5, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_intervals_fill_three_columns_wherever_one_is_known(tmp_path):
    interval = {"estimate": 1.5, "low": 1.0, "high": None}
    rows = [{"name": "a,b", "kl": None, "nested": {"x": 1}}, {"name": "c", "kl": interval, "nested": {}}]
    save_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["name", "kl", "kl_low", "kl_high"],
            ["a,b", "", "", ""],
            ["c", "1.5", "1.0", ""],
        ]


def test_json_never_holds_what_json_cannot(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_json(tmp_path / "r.json", {"x": math.nan})
    assert not (tmp_path / "r.json").exists()
    save_json(tmp_path / "r.json", {"x": None})
    assert json.loads((tmp_path / "r.json").read_text()) == {"x": None}


def test_names_are_shown_as_they_are():
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], label=as_label("_mine $x^2$"))
    (text,) = axis.legend().get_texts()
    assert text.get_text() == "\u200b_mine \\$x^2\\$"


@pytest.mark.parametrize("high", [4.0, 9.0, 30.0, 200.0, 3000.0, 40_000.0, 2e6])
def test_logarithmic_axes_of_any_span_have_plain_numbers_that_do_not_overlap(high):
    figure = Figure(figsize=(5.5, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.scatter(np.geomspace(3, high, 20), np.geomspace(3, high, 20))
    axis.set(xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        number_decades(side)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for side in (axis.xaxis, axis.yaxis):
        low, high_end = side.get_view_interval()
        shown = [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high_end]
        assert len(shown) >= 3
        assert not overlapping(shown, canvas.get_renderer())
        assert all(float(label.get_text().replace("\N{MINUS SIGN}", "-")) > 0 for label in shown)
        assert not any(tick.label1.get_text() for tick in side.get_minor_ticks())
