"""The program that shows whether a target is held: what it asks of a run, by hand, and that it goes on where it was."""

import json

import pytest

from eval import steering
from eval.steering import SteeringArguments, judge


def small(folder, **changes):
    settings = {"targets": [5.0], "learning_rates": [1e-3], "seeds": 1, "steps": 3, "completions": 8, "vocab": 12}
    return SteeringArguments(**{**settings, "max_new_tokens": 12, "output_dir": str(folder), **changes})


class TestJudge:
    def test_a_run_that_arrives_and_stays(self):
        found = judge([30.0] * 20 + [10.0] * 60, 10.0)
        # The first mean of five that is all 10.
        assert found == {"end": 1.0, "approach": 20, "undershoot": 0, "met": True}

    def test_an_undershoot_as_long_as_the_way(self):
        lengths = [30.0] * 20 + [8.0] * 20 + [10.0] * 60
        assert judge(lengths, 10.0) == {"end": 1.0, "approach": 20, "undershoot": 18, "met": True}
        longer = judge([30.0] * 20 + [8.0] * 30 + [10.0] * 60, 10.0)
        assert longer["undershoot"] == 28 and not longer["met"]

    def test_an_end_that_is_too_far_off(self):
        assert not judge([30.0] * 20 + [11.5] * 60, 10.0)["met"]
        assert not judge([30.0] * 80, 10.0)["met"]

    def test_from_below_and_from_the_target_itself(self):
        assert judge([5.0] * 20 + [10.0] * 60, 10.0)["approach"] == 20
        assert judge([10.0] * 80, 10.0) == {"end": 1.0, "approach": 0, "undershoot": 0, "met": True}


def test_a_run_is_written_drawn_and_not_made_again(tmp_path, monkeypatch):
    runs = steering.main(small(tmp_path))
    assert [len(runs[0][name]) for name in ("lengths", "coefficients")] == [3, 3]
    # Eleven tokens and an end, each with the same chance, and nothing pays in the first batch.
    assert 1.0 < runs[0]["lengths"][0] < 12.0 and runs[0]["coefficients"][0] == 0.0
    assert (tmp_path / "steering.png").stat().st_size > 1000
    monkeypatch.setattr(steering, "train", None)
    assert steering.main(small(tmp_path)) == runs == json.loads((tmp_path / "steering.json").read_text())["runs"]
    with pytest.raises(ValueError, match="output_dir"):
        steering.main(small(tmp_path, steps=4))
