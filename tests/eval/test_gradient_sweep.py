"""The sweep of `eval.gradient` over lengths and group sizes: exponents, rows over policies, and going on."""

import json
import math

import pytest

from eval.gradient import sweep
from eval.gradient.sweep import SHOWN, Scale, SweepArguments, grouped, log_slope, slopes
from lenvm_rl.sandbox import PolicySettings, fit_policy


def test_exponents_of_exact_powers():
    # 3 x^2 and 5 x^2: one exponent whatever the factor of each kind.
    points = [(x, factor * x**2, factor) for factor in (3.0, 5.0) for x in (1.0, 2.0, 8.0)]
    found = log_slope(points)
    assert found.estimate == pytest.approx(2.0) and found.low == pytest.approx(2.0) == found.high
    # Kinds that differ in x say nothing of a slope within them.
    assert math.isnan(log_slope([(1.0, 2.0, "a"), (4.0, 32.0, "b")]).estimate)
    assert math.isnan(log_slope([(30.0, 2.0, None), (31.0, 3.0, None)]).estimate)
    # By hand, without kinds: logs (0, 0), (1, 2), (2, 2): cov 2/3, var 2/3.
    points = [(math.exp(x), math.exp(y), None) for x, y in ((0, 0), (1, 2), (2, 2))]
    assert log_slope(points).estimate == pytest.approx(1.0)


def result(run, passes, group_size, tokens, ratio, repeats=1):
    entry = {name: {"estimate": ratio, "low": ratio / 2, "high": ratio * 2} for name in SHOWN}
    return {
        "run": run, "passes": passes, "repeats": repeats, "group_size": group_size, "mean_tokens": tokens,
        "explained_variance": 0.5, "cut": 0.0, "best_penalty": "linear", "over_best_penalty": entry,
        "cosine_to_length": dict.fromkeys(SHOWN, 1.0),
    }  # fmt: skip


def test_rows_are_over_policies_and_slopes_are_of_their_own_axis():
    results = [
        result(run, passes, size, tokens, factor * tokens**0.5 / size)
        for run, factor in (("a", 1.0), ("b", 1.0))
        for passes, tokens in ((0.0, 14.0), (1.5, 30.0), (4.0, 60.0))
        for size in (1, 2, 8)
    ] + [result("a", 1.5, 2, 90.0, 30.0**0.5 / 2, repeats=7)]
    rows = grouped(results)
    assert len(rows) == 10 and rows[0]["policies"] == 2 and rows[-1]["policies"] == 1
    assert rows[0][SHOWN[0]]["estimate"] == pytest.approx(14**0.5)
    found = {(row["estimator"], row["against"]): row["exponent"]["estimate"] for row in slopes(results)}
    assert found[SHOWN[0], "tokens, more passes"] == pytest.approx(0.5)
    assert found[SHOWN[0], "group size"] == pytest.approx(-1.0)
    # Three times the tokens with as many decisions, and the same ratio.
    assert found[SHOWN[0], "tokens, longer passes"] == pytest.approx(0.0, abs=1e-9)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        SweepArguments(group_sizes=[3])
    with pytest.raises(ValueError, match="completions"):
        SweepArguments(completions=100)


def test_scales_are_each_measured_once():
    assert SweepArguments(passes=[1.5], repeats=[1, 4]).scales == [Scale(1.5), Scale(1.5, 4)]


def test_a_sweep_is_measured_and_goes_on(tmp_path, monkeypatch, capsys):
    small = {"hidden_size": 16, "num_heads": 2, "train_tokens": 4000}
    fit_policy(str(tmp_path / "base" / "policy"), PolicySettings(**small), use_cpu=True, disable_tqdm=True)
    monkeypatch.setattr(sweep, "FIT", {"train_tokens": 2000, "learning_rate": 1e-3})
    monkeypatch.setattr(sweep, "FEWEST", 32)
    monkeypatch.setattr(sweep, "PRETRAINING_TOKENS", 32)
    monkeypatch.setattr(Scale, "longest", 8)
    settings = {
        "run_dirs": [str(tmp_path / "base")],
        "passes": [1.5],
        "repeats": [1],
        "output_dir": str(tmp_path / "s"),
    }
    args = SweepArguments(**settings, group_sizes=[2, 1], completions=16, batch_size=4)
    results = sweep.main(args)
    assert [one["group_size"] for one in results] == [2, 1] and "signal to noise" in capsys.readouterr().out
    saved = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert saved["results"] == results and (tmp_path / "s" / "sweep.png").exists()
    monkeypatch.setattr(sweep, "measure_gradients", None)
    assert sweep.main(args) == results
    more = SweepArguments(**settings, group_sizes=[2, 1, 4], completions=16, batch_size=4, measure=False)
    assert sweep.main(more) == results
