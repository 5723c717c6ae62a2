"""When a length value model counts as stale, and what of it is measured: hand-worked numbers."""

import math

import pytest
import torch
from trainer_parts import grpo, logged, random_lenvm

from lenvm_rl.trainers.frozen import Drift, FrozenLengthValues
from lenvm_rl.trainers.metrics import BatchMetrics, add_values
from lenvm_rl.trainers.streams import Completions

GOOD = {
    "lenvm/explained_variance": 0.8,
    "lenvm/calibration_slope": 1.0,
    "lenvm/predicted_length": 9.0,
    "lenvm/realised_length": 9.0,
}


def drift():
    return Drift()


def verdicts(watch, batches):
    return [watch.observe({**GOOD, **each})["lenvm/stale"] for each in batches]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"lenvm/explained_variance": -0.1}, "explains -0.10 of the variance"),
        ({"lenvm/calibration_slope": 2.5}, "calibration slope is 2.50"),
        ({"lenvm/calibration_slope": 0.4}, "calibration slope is 0.40"),
        ({"lenvm/predicted_length": 20.0}, "predicts 20.0 tokens where 9.0 are written"),
        ({"lenvm/predicted_length": 3.5}, "predicts 3.5 tokens where 9.0 are written"),
    ],
)
def test_each_reason_by_itself(bad, reason, caplog):
    assert verdicts(drift(), [bad] * 6) == [0.0] * 4 + [1.0] * 2
    # Said once, and not again while it lasts.
    assert caplog.text.count("has become stale") == 1 and reason in caplog.text


def test_a_model_that_fits_is_not_stale(caplog):
    assert verdicts(drift(), [{}] * 20) == [0.0] * 20 and caplog.text == ""


def test_a_batch_counts_half_after_five(caplog):
    """Fitting until the fifth batch, then a slope of 4: after k more it is 4 - 3 * 0.5^(k / 5), above 2 from k = 3 on
    (4 - 3 * 0.66 = 2.02; k = 2 gives 1.73)."""
    assert verdicts(drift(), [{}] * 5 + [{"lenvm/calibration_slope": 4.0}] * 4) == [0.0] * 7 + [1.0] * 2


def test_a_refresh_that_fitted_nothing_leaves_the_verdict(monkeypatch):
    class Refresh:
        measured = {"refresh/completions": 0.0}

        def run_if_due(self, placed, step, chunk_size):
            return self.measured

    values = object.__new__(FrozenLengthValues)
    values.drift, values.refresh, values._model = drift(), Refresh(), None
    bad = {"lenvm/explained_variance": -1.0}
    assert verdicts(values.drift, [bad] * 5)[-1] == 1.0
    assert values.refresh_if_due(5, 4) == {"refresh/completions": 0.0} and values.drift.stale
    Refresh.measured = {"refresh/completions": 3.0}
    values.refresh_if_due(6, 4)
    assert not values.drift.stale


def test_it_can_recover_and_is_told_again(caplog):
    bad = {"lenvm/explained_variance": -1.0}
    seen = verdicts(drift(), [bad] * 5 + [{}] * 20 + [bad] * 10)
    assert seen[4] == 1.0 and seen[24] == 0.0 and seen[-1] == 1.0
    assert caplog.text.count("has become stale") == 2


def test_what_is_not_defined_is_left_out():
    nothing = dict.fromkeys(GOOD, math.nan)
    watch = drift()
    assert verdicts(watch, [nothing] * 6) == [0.0] * 6 and watch.averages == {}


def test_its_state_comes_back():
    first, second = drift(), drift()
    verdicts(first, [{"lenvm/calibration_slope": 4.0}] * 6)
    second.load_state_dict(first.state_dict())
    assert vars(first) == vars(second) and second.stale
    second.reset()
    assert (second.averages, second.batches, second.stale) == ({}, 0, False)
    # A checkpoint of a run without a length value model has none.
    second.load_state_dict(None)
    assert second.batches == 0


def test_the_slope_by_hand():
    """Points (y, x) = (0, 0), (1, 1), (2, 4): the regression line of x on y has slope 2."""
    metrics = BatchMetrics()
    everywhere = torch.ones(4)
    everywhere[3] = 0
    metrics.slope("x", torch.tensor([0.0, 1.0, 4.0, 99.0]), torch.tensor([0.0, 1.0, 2.0, -7.0]), everywhere)
    metrics.slope("flat", torch.tensor([0.0, 1.0, 4.0, 99.0]), torch.full((4,), 0.3), everywhere)
    slopes = metrics.read(metrics.sums.tolist())
    assert slopes["x"] == pytest.approx(2.0) and math.isnan(slopes["flat"])


@pytest.mark.parametrize("exaggeration", [1.0, 2.0])
def test_values_that_spread_too_far_have_a_slope_below_one(exaggeration):
    """Values that lie about the mean return as far as the returns do have slope 1, twice as far 1/2."""
    gamma, lengths = 0.5, torch.tensor([1, 2, 3])
    mask = torch.arange(3) < lengths.unsqueeze(1)
    returns = -(1 - gamma ** (lengths.unsqueeze(1) - torch.arange(3)).clamp(min=0).double())
    mean = returns[mask].mean()
    values = mean + exaggeration * (returns - mean)
    logits = torch.nn.functional.pad(torch.logit(-values.clamp(-0.999, -0.001)), (0, 1))
    completions = Completions(mask, mask, torch.ones(3, dtype=torch.bool), lengths - 1)
    metrics = BatchMetrics()
    add_values(metrics, logits, completions, gamma)
    measured = metrics.read(metrics.sums.tolist())
    clipped = values.clamp(-0.999, -0.001)[mask]
    centred = clipped - clipped.mean()
    slope = float((centred * (returns[mask] - mean)).sum() / centred.square().sum())
    assert measured["lenvm/calibration_slope"] == pytest.approx(slope, rel=1e-6)
    assert slope == pytest.approx(1.0 / exaggeration, rel=0.15)


def test_a_run_says_whether_its_model_is_stale(tmp_path, caplog):
    trainer = grpo(tmp_path, lenvm=random_lenvm(), length_coef=0.1, max_steps=6)
    trainer.train()
    stale = logged(trainer, "lenvm/stale")
    assert stale[:4] == [0.0] * 4 and stale[-1] == 1.0
    assert "has become stale" in caplog.text
