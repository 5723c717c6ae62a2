"""Curves of training runs, by hand."""

import json

import numpy as np
import pytest

from eval.curves import CurvesArguments, half_from, main, moving_mean, read_curve


def write_run(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def of_lengths(lengths, share=1.0):
    return [{"step": step, "length/mean": x, "length/correct": share} for step, x in enumerate(lengths, 1)]


def test_means_of_five():
    places, means = moving_mean([5.0, 0.0, 0.0, 0.0, 0.0, 10.0])
    assert list(places) == [4, 5] and list(means) == [1.0, 2.0]
    places, means = moving_mean([1.0, 3.0])
    assert list(places) == [1] and list(means) == [2.0]


def test_half_is_reached_for_good():
    # Means of five: at half from the fourth on, but for the last one.
    lengths = [10.0] * 5 + [0.0] * 3 + [10.0, 0.0, 20.0]
    assert list(moving_mean(lengths)[1]) == [10, 8, 6, 4, 4, 2, 6]
    assert half_from(lengths) is None
    assert half_from([*lengths[:-1], 10.0]) == 7
    assert half_from([10.0] * 4) is None and half_from([0.0] * 6) is None


def test_lost_steps_and_other_lines_are_left_out(tmp_path):
    begun = {"event": "train_begin", "step": 0}
    lines = [begun, *of_lengths([9.0, 8.0, 7.0]), {"event": "train_begin", "step": 2}]
    lines += [{"step": 3, "length/mean": 5.0, "length/correct": None}, {"step": 3, "train_runtime": 1.0}]
    found = read_curve(write_run(tmp_path / "run", lines))
    assert found["step"] == [1, 2, 3] and found["tokens"] == [9.0, 8.0, 5.0]
    assert found["accuracy"] == [1.0, 1.0, None]


def test_a_log_that_leaves_steps_out_is_said(tmp_path, caplog):
    read_curve(write_run(tmp_path / "each", of_lengths([9.0, 8.0, 7.0])))
    assert not caplog.text
    thinned = [{**line, "step": 10 * line["step"]} for line in of_lengths([9.0, 8.0, 7.0])]
    read_curve(write_run(tmp_path / "thin", thinned))
    assert "10 steps from line to line" in caplog.text


def test_seeds_of_an_arm_are_put_together(tmp_path):
    runs = [
        f"a={write_run(tmp_path / 'a0', of_lengths([20.0] * 5 + [10.0] * 5))}",
        f"a={write_run(tmp_path / 'a1', of_lengths([20.0] * 5 + [4.0] * 7, share=0.5))}",
        f"b={write_run(tmp_path / 'b', of_lengths([20.0] * 10))}",
    ]
    output = tmp_path / "out"
    first, second = main(CurvesArguments(runs, steps=10, output_dir=str(output)))["arms"]
    assert (first["arm"], first["seeds"], first["steps"]) == ("a", 2, 10)
    assert first["last_tokens"] == {"estimate": 7.0, "low": 4.0, "high": 10.0}
    assert first["first_accuracy"] == {"estimate": 0.75, "low": 0.5, "high": 1.0}
    # 20, 16.8, 13.6, 10.4, 7.2, 4 at steps 5 to 10; the other seed is at half with its last mean.
    assert first["half_from"] == {"estimate": 9.5, "low": 9.0, "high": 10.0}
    assert second["half_from"]["estimate"] is None and (first["halved"], second["halved"]) == (2, 0)
    assert second["last_tokens"] == {"estimate": 20.0, "low": None, "high": None}
    assert json.loads((output / "curves.json").read_text())["arms"] == [first, second]
    assert (output / "curves.png").stat().st_size > 10_000


def test_accuracy_that_is_not_known(tmp_path):
    assert np.isnan(moving_mean([1.0, None, 1.0])[1]).all()
    runs = [f"a={write_run(tmp_path / 'run', of_lengths([9.0] * 7, share=None))}"]
    (row,) = main(CurvesArguments(runs, output_dir=str(tmp_path)))["arms"]
    assert row["last_accuracy"]["estimate"] is None and row["last_tokens"]["estimate"] == 9.0
    assert json.loads((tmp_path / "curves.json").read_text())["curves"]["a"][0]["accuracy"] == [None] * 7


@pytest.mark.parametrize("runs", [["folder"], ["=folder"], ["name="]])
def test_runs_have_a_name_and_a_folder(runs):
    with pytest.raises(ValueError, match="runs"):
        CurvesArguments(runs)


def test_a_run_that_is_not_there_or_has_not_begun(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl"):
        read_curve(str(tmp_path))
    with pytest.raises(ValueError, match="length/mean"):
        read_curve(write_run(tmp_path / "run", [{"event": "train_begin", "step": 0}]))
