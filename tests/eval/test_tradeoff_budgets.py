"""Accuracy under a token budget, by hand."""

import numpy as np
import pytest

from eval.tradeoff.budgets import budget_curves, budget_grid, graded_within, widest_lead
from eval.tradeoff.report import budget_remark
from eval.tradeoff.sampler import Arm

END, RIGHT = 1, 42


def grade(completions, rows):
    """Right is what holds token 42, but for a prompt of number 9, whose answers are not graded."""
    graded = np.array(rows) != 9
    return np.array([RIGHT in ids for ids in completions]) & graded, graded


def an_arm(name, kind, completions, prompt, finished=True):
    lengths = np.array([len(ids) - (ids[-1] == END) for ids in completions])
    ends = np.array([ids[-1] == END for ids in completions])
    correct, graded = grade(completions, prompt)
    return Arm(name, kind, float("nan"), completions, lengths, ends, correct, np.array(prompt), graded=graded)


# Right from the second token on, from the fourth, never, and at the sixth and last, without an end.
BASE = an_arm(
    "base", "base", [[7, RIGHT, END], [7, 7, 7, RIGHT, 7, END], [7, END], [7, 7, 7, 7, 7, RIGHT]], [0, 0, 1, 1]
)
TILT = an_arm("tilt +1", "tilt", [[RIGHT, END], [7, RIGHT, END], [END], [7, END]], [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("budget", "right"), [(1, [0, 0, 0, 0]), (2, [1, 0, 0, 0]), (3, [1, 0, 0, 0]), (4, [1, 1, 0, 0]), (6, [1, 1, 0, 1])]
)
def test_what_stands_within_the_budget_counts(budget, right):
    correct, graded = graded_within(BASE, budget, grade)
    assert correct.tolist() == [bool(each) for each in right] and graded.all()


def test_what_is_not_graded_is_in_no_share():
    arm = an_arm("base", "base", [[7, RIGHT, END], [7, RIGHT, 7, END], [7, 7, END]], [0, 9, 1])
    curves = budget_curves([arm], lambda _: grade, seed=0)
    assert [entry["estimate"] for entry in curves["accuracy"]["base"]] == [0.0, 0.5, 0.5]
    assert curves["budgets"] == [1, 2, 3]


def test_budgets_are_even_steps_of_the_logarithm():
    # From half of the tilt's median of 1, which is no budget: from 1 to 6.
    assert budget_grid([BASE, TILT], 3) == [1, 2, 6]
    # From half of 3.5.
    assert budget_grid([BASE], 3) == [2, 3, 6]


def test_curves_leave_out_what_is_cut_already_and_say_where_the_tilt_leads():
    cut = an_arm("cut", "truncation", [[7], [7], [7], [7]], [0, 0, 1, 1])
    curves = budget_curves([BASE, cut, TILT], lambda _: grade, seed=0)
    assert set(curves["accuracy"]) == {"base", "tilt +1"}
    shares = {name: [entry["estimate"] for entry in entries] for name, entries in curves["accuracy"].items()}
    # Budgets 1 to 6: the first of the tilt's two right answers stands in its first token.
    assert curves["budgets"] == [1, 2, 3, 4, 5, 6]
    assert shares["base"] == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75]
    assert shares["tilt +1"] == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert widest_lead(curves, ["tilt +1"], "base") == ("tilt +1", 1)
    assert widest_lead(curves, ["base"], "tilt +1") == ("base", 6)
    assert widest_lead(curves, [], "base") is None and widest_lead(curves, ["base"], "base") is None
    [said] = budget_remark([{"name": "base", "kind": "base"}, {"name": "tilt +1", "kind": "tilt"}], curves)
    assert said.startswith("Cut off after 1 tokens") and "25 %" in said and "0 %" in said
    assert budget_remark([{"name": "base", "kind": "base"}], curves) == []
