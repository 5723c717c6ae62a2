"""The page of a comparison: what is in it, and what choosing, toggling, pointing and sorting does in a browser."""

import copy
import math
import random

import pytest
from browser import TRICKY, check_asks_for_nothing, check_closed, data_of, drive

from eval.compare.arms import ARMS
from eval.compare.page import write_page
from eval.compare.plan import CELLS

BASE = {"tokens": 30.0, "excess": 14.0, "accuracy": 0.95}
# Other critics run where they are named alone.
SHOWN = [arm for arm in ARMS if arm.kind != "critic"]


def between(value, width):
    return {"estimate": value, "low": value - width, "high": value + width}


def reached(median, missed, seeds=5):
    """A row's rollouts until something: the slowest `missed` seeds never got there."""
    known = {"median": median if missed * 2 < seeds else None, "low": 0.8 * median if missed < seeds else None}
    return {**known, "high": None if missed else 1.3 * median, "missed": missed, "seeds": seeds}


def fake_arm(arm, cell, dice):
    """An arm whose waste decays at its own pace, and which pays for haste with accuracy."""
    pace = {"task": 0.15, "LenVM": 1.0, "oracle": 1.3, "penalty": 0.55, "control": 0.4}[arm.kind]
    pace *= dice.uniform(0.75, 1.25)
    steps = range(0, cell.steps + 1, max(1, cell.steps // 20))
    left = [math.exp(-4 * pace * step / cell.steps) for step in steps]
    cost = dice.uniform(0, 0.08) * pace
    bands = {
        "excess": [(14 * share, 0.8 + 2 * share * (1 - share)) for share in left],
        "accuracy": [(0.95 + 0.02 * (1 - share) - cost * (1 - share), 0.012) for share in left],
        "tokens": [(16 + 14 * share, 1) for share in left],
    }
    rollouts = cell.steps * cell.completions
    return {
        "name": arm.name,
        "kind": arm.kind,
        "learning_rate": dice.choice(cell.learning_rates),
        "strength": dice.choice(arm.strengths) if arm.strengths else None,
        "seeds": 5,
        "rollouts": [float(step * cell.completions) for step in steps],
        **{
            name: {
                "mean": [value for value, _ in band],
                "low": [max(0, value - width) for value, width in band],
                "high": [value + width for value, width in band],
            }
            for name, band in bands.items()
        },
        "until_half": reached(rollouts * 0.17 / pace, 5 if pace < 0.2 else 0),
        "until_most": reached(rollouts * 0.57 / pace, 0 if pace > 0.8 else 2 if pace > 0.5 else 5),
        **{f"end_{name}": between(bands[name][-1][0], min(bands[name][-1])) for name in bands},
        "times_lenvm": None if arm.kind == "task" else {"median": 1 / pace, "low": 0.9 / pace, "high": 1.2 / pace},
        "frontier_gap": between(cost, 0.01),
        "break_even": reached(4000 / pace, 0 if pace > 0.5 else 5),
        "unsafe": 0.2 if cost > 0.05 else 0.0,
    }


def fake_report(seed=0, cells=CELLS):
    """A report as `eval.compare` makes it, of every cell and arm, with curves that look like curves."""
    dice = random.Random(seed)
    tokens = [8 + k for k in range(12)]
    made = [
        {
            "name": cell.name, "completions": cell.completions, "group_size": cell.group_size,
            "algorithm": cell.algorithm,
            "arms": [fake_arm(arm, cell, dice) for arm in SHOWN if cell.every_arm or arm.kind != "control"],
        }
        for cell in cells
    ]  # fmt: skip
    tilts = [("tilt +0.25", 24, 0.945), ("tilt +0.5", 20, 0.92), ("tilt +1", 16, 0.86)]
    cuts = [("cut at 40", 27, 0.88), ("cut at 30", 24, 0.8), ("cut at 24", 21, 0.74)]
    decoding = [("tilt", *one) for one in tilts] + [("truncation", *one) for one in cuts]
    rows = [
        ("base", "first 3 + 4 = 7 then 7 * 2 = 14 wait again 3 + 4 = 7 then 7 * 2 = 14 wait wait so 14", range(12, 27)),
        ("tilted", "first 3 + 4 = 7 then 7 * 2 = 14 wait so 14", range(12, 13)),
        ("LenVM, lambda 1", "3 + 4 = 7 7 * 2 = 14 so 14", range(0)),
    ]
    samples = [
        {
            "prompt": f"start 3 ; add 4 ; times 2 ({number})",
            "rows": [
                {"name": name, "text": text, "waste": [k in wasted for k in range(len(text.split()))], "correct": True}
                for name, text, wasted in rows
            ],
        }
        for number in range(3)
    ]
    return {
        "world": {**{f"base_{name}": between(value, 0.01 * value) for name, value in BASE.items()}, "floors": {}},
        "cells": made,
        "frontier": {"tokens": tokens, "accuracy": [0.98 - 0.3 * math.exp(-0.5 * k) for k in range(12)]},
        "decoding": [
            {"name": name, "kind": kind, "tokens": between(float(at), 0.4), "accuracy": between(accuracy, 0.01)}
            for kind, name, at, accuracy in decoding
        ],
        "samples": samples,
    }


def written(report, folder):
    write_page(report, folder / "compare.html")
    return (folder / "compare.html").read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_and_holds_the_report(tmp_path):
    report = fake_report()
    page = written(report, tmp_path)
    check_closed(page)
    check_asks_for_nothing(page)
    _, data = data_of(page)
    assert [cell["name"] for cell in data["cells"]] == [cell.name for cell in CELLS]
    mean = report["cells"][0]["arms"][0]["excess"]["mean"]
    assert data["cells"][0]["arms"][0]["excess"]["mean"] == pytest.approx(mean, rel=1e-5)
    # Six digits are kept, and the report itself is as it was.
    assert max(len(str(value)) for value in data["cells"][0]["arms"][0]["excess"]["mean"]) < 10 < len(str(mean[3]))


def hostile(report):
    """The same report with names and texts that are markup, and what may be missing missing."""
    changed = copy.deepcopy(report)
    arm = changed["cells"][0]["arms"][1]
    arm["name"] = changed["decoding"][0]["name"] = changed["samples"][0]["prompt"] = TRICKY
    changed["samples"][0]["rows"][0] |= {
        "name": TRICKY,
        "text": f"a {TRICKY} b",
        "waste": [False, True],
        "correct": False,
    }
    for name in ("until_half", "until_most", "break_even"):
        arm[name] = {"median": None, "low": None, "high": None, "missed": 5, "seeds": 5}
    for name in ("end_accuracy", "frontier_gap"):
        arm[name] = dict.fromkeys(("estimate", "low", "high"))
    for side in ("mean", "low", "high"):
        arm["accuracy"][side][1] = None
    return changed


HELPERS = """
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const fire = (target, kind, options) => target.dispatchEvent(new MouseEvent(kind, { bubbles: true, ...options }));
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const tip = () => (document.getElementById("tip").hidden ? null : document.getElementById("tip").innerText);
const drawn = () => all("#frontier .point").map((point) => point.dataset.arm).filter(Boolean);
const lines = (k) => all(".line", all("#curves .plot")[k]).map((line) => line.dataset.arm);
const rows = (k) => all("tbody tr").map((row) => all("th, td", row)[k].firstChild.textContent.trim());
const header = (k) => all("thead button")[k];
const button = (name) => all("#legend [data-arm]").find((one) => one.dataset.arm === name);
const choose = (value) => { cellChoice.value = value; cellChoice.dispatchEvent(new Event("change")); };
const fits = () => document.documentElement.scrollWidth <= document.documentElement.clientWidth;
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return drive(written(fake_report(), folder), HELPERS + STEPS, folder)


STEPS = """
say("first", drawn(), lines(0), lines(1));
const linear = button("linear");
say("pressed", linear.getAttribute("aria-pressed")); linear.click();
say("pressed", linear.getAttribute("aria-pressed")); say("on", drawn(), lines(0));
linear.dispatchEvent(new PointerEvent("pointerenter", { pointerType: "mouse" }));
say("highlight", all("#curves .line:not(.dim)").map((line) => line.dataset.arm));
linear.dispatchEvent(new PointerEvent("pointerleave")); say("highlight", all(".dim").length);
linear.click(); say("off", drawn(), lines(0));
all("#legend .kind").find((one) => one.textContent === "control").click(); say("controls", drawn());
all("#legend .kind").find((one) => one.textContent === "control").click(); say("controls", drawn());
const point = all("#frontier .point").find((one) => one.dataset.arm === "LenVM, lambda 1");
say("tip", tip()); fire(point, "mouseenter"); say("tip", tip()); fire(point, "mouseleave"); say("tip", tip());
const points = all("#frontier .point");
say("stops", points.filter((one) => one.getAttribute("tabindex") === "0").length);
points[0].focus(); say("focus", points.indexOf(document.activeElement), tip() === null);
window.dispatchEvent(new Event("scroll")); say("scrolled", tip() === null);
press("ArrowRight"); press("ArrowUp"); press("ArrowLeft"); say("focus", points.indexOf(document.activeElement));
press("End"); say("focus", points.indexOf(document.activeElement) === points.length - 1, tip());
press("ArrowRight"); say("focus", points.indexOf(document.activeElement) === points.length - 1);
press("Escape"); say("tip", tip());
const curve = all("#curves .plot")[0], box = curve.getBoundingClientRect();
fire(curve, "mousemove", { clientX: box.right - 20, clientY: box.top + 30 }); say("curve", tip());
fire(curve, "mouseleave"); say("curve", tip());
say("order", rows(0).slice(0, 3)); say("number", getComputedStyle(all("tbody td")[3]).textAlign);
header(4).click(); say("sorted", rows(4), header(4).parentNode.ariaSort, document.activeElement === header(4));
header(4).click(); say("sorted", rows(4), header(4).parentNode.ariaSort);
header(0).click(); say("names", rows(0));
choose("3"); say("cell", all("h3").length, rows(0).length, all("thead th").length, drawn());
choose("all"); say("all", all("h3").length, rows(0).length, all("thead th").length, new Set(rows(1)).size);
say("key", document.getElementById("key").innerText);
say("samples", all("#samples details").length, all("#samples details")[0].open, all("#samples details")[2].open,
  all("#samples .card").length, all(".card s")[0].textContent, all(".card")[0].querySelector("p").textContent);
say("fits", fits()); say("asked", performance.getEntriesByType("resource").length);
"""
WASTED = "wait again 3 + 4 = 7 then 7 * 2 = 14 wait wait"


def test_nothing_goes_out_or_over_the_edge(driven):
    assert driven["asked"] == [[0]] and driven["fits"] == [[True]]


def test_the_arms_that_matter_are_drawn_at_first_and_others_on_demand(driven):
    ((final, waste, accuracy),) = driven["first"]
    assert set(final) == set(waste) == set(accuracy) and len(final) == 8
    kinds = {arm.name: arm.kind for arm in SHOWN}
    assert sorted(kinds[name] for name in final) == ["LenVM"] * 3 + ["oracle"] + ["penalty"] * 3 + ["task"]
    assert driven["pressed"] == [["false"], ["true"]]
    ((on, with_it),) = driven["on"]
    assert set(on) - set(final) == {"linear"} == set(with_it) - set(waste)
    assert driven["off"] == [[final, waste]]
    more, back = driven["controls"]
    assert len(more[0]) == 8 + sum(arm.kind == "control" for arm in SHOWN) and back == [final]
    assert driven["highlight"] == [[["linear", "linear"]], [0]]


def test_points_tell_what_they_are_to_the_mouse_and_to_the_keys(driven):
    before, during, after, escaped = (tip for (tip,) in driven["tip"])
    assert before is after is escaped is None
    assert during.startswith("LenVM, lambda 1")
    for said in ("accuracy 0.", "tokens 1", "16 x 2, GRPO", "learning rate", "strength", "until 90 %"):
        assert said in during
    assert driven["scrolled"] == [[False]]
    # One stop of the tabulator; two steps on and one back; none beyond the last, the base policy.
    assert driven["stops"] == [[1]] and driven["focus"][:2] == [[0, False], [1]]
    assert driven["focus"][2][0] and "base policy" in driven["focus"][2][1] and driven["focus"][3] == [True]


def test_curves_tell_the_nearest_arm(driven):
    (during,), (after,) = driven["curve"]
    waste = fake_report()["cells"][0]["arms"][0]["excess"]["mean"][-1]
    assert during.startswith("task only") and f"after 1\u202f920 rollouts: {waste:.1f} (" in during and after is None


def test_the_table_is_sorted_by_any_column_and_what_is_not_known_comes_last(driven):
    assert driven["order"] == [[["task only", "LenVM, lambda 1", "LenVM, lambda 0.95"]]]
    assert driven["number"] == [["right"]]
    (up, rising, focused), (down, falling) = driven["sorted"]
    assert (rising, falling, focused) == ("ascending", "descending", True)
    for shown, backwards in ((up, False), (down, True)):
        known = [int(text.replace("\u202f", "")) for text in shown if text != "–"]
        assert known == sorted(known, reverse=backwards) and 3 < len(known) < len(shown)
        assert shown[len(known) :] == ["–"] * (len(shown) - len(known))
    ((names,),) = driven["names"]
    assert names == sorted(names, key=str.lower)


def test_a_cell_or_all_of_them(driven):
    few = sum(arm.kind != "control" for arm in SHOWN)
    titles, rows, columns, final = driven["cell"][0]
    assert (titles, rows) == (1, few) and len(final) == 8
    # All have one more column, the cell.
    every = sum(len(SHOWN) if cell.every_arm else few for cell in CELLS)
    assert driven["all"] == [[len(CELLS), every, columns + 1, len(CELLS)]]


def test_samples_stand_side_by_side_with_their_waste_struck_out(driven):
    folded, first, third, cards, struck, text = driven["samples"][0]
    assert (folded, first, third, cards) == (3, True, False, 9)
    assert struck == WASTED and text.endswith("= 14 " + WASTED + " so 14")
    assert "tilt" in driven["key"][0][0] and "styles" in driven["key"][0][0]


def test_markup_is_text_and_what_is_missing_a_dash(tmp_path):
    report = hostile(fake_report(cells=CELLS[:1]))
    page = written(report, tmp_path)
    check_closed(page)
    steps = """
    const name = all("tbody th")[1].textContent;
    say("name", name, all("#samples summary")[0].textContent, all(".card b")[0].textContent, all("b b, h1 b").length);
    say("cells", all("td", all("tbody tr")[1]).map((cell) => cell.innerText));
    const point = all("#frontier .point").find((one) => one.getAttribute("aria-label").includes("quoted"));
    fire(point, "mouseenter"); say("tip", tip());
    say("drawn", drawn().length, lines(0).length, document.querySelector("main").innerHTML.includes("NaN"));
    say("choices", cellChoice.options.length);
    """
    found = drive(page, HELPERS + steps, tmp_path)
    assert found["name"] == [[TRICKY, TRICKY, TRICKY, 0]]
    (cells,) = found["cells"][0]
    assert cells[2].split("\n") == cells[3].split("\n") == ["–", "not reached in 5 of 5"] and cells[5] == "–"
    # An arm without an end is in the curves alone.
    assert TRICKY.split()[0] in found["tip"][0][0] and found["drawn"] == [[7, 8, False]]
    assert found["choices"] == [[1]]


def test_a_page_of_the_least(tmp_path):
    """Neither frontier nor decoding nor samples, a single seed, and no cell at all: the page says what there is."""
    report = fake_report(cells=CELLS[:1]) | {"frontier": None}
    report = {name: report[name] for name in ("world", "cells", "frontier")}
    steps = 'say("there", all("#frontier .point").length, document.getElementById("samples").hidden, fits());'
    found = drive(written(report, tmp_path), HELPERS + steps, tmp_path)
    assert found["there"] == [[9, True, True]]
    found = drive(written(report | {"cells": []}, tmp_path), HELPERS + steps, tmp_path)
    assert found["there"] == [[1, True, True]]


def test_the_page_fits_a_narrow_window(tmp_path):
    steps = """
    document.documentElement.style.width = "390px";
    drawPlots();
    say("wide", Math.max(...all("svg.plot, section, header").map((one) => one.getBoundingClientRect().right)));
    """
    found = drive(written(fake_report(cells=CELLS[:1]), tmp_path), HELPERS + steps, tmp_path, size=(500, 900))
    assert 300 < found["wide"][0][0] <= 390
