"""When a length value model counts as stale, and what of it is measured: hand-worked numbers."""

import math

import pytest
import torch
from trainer_parts import grpo, logged, random_lenvm

from lenvm_rl.trainers import LenVMGRPOConfig
from lenvm_rl.trainers.metrics import Moments, value_metrics
from lenvm_rl.trainers.refresh import Drift
from lenvm_rl.trainers.streams import Completions

GOOD = {
    "lenvm/explained_variance": 0.8,
    "lenvm/calibration_slope": 1.0,
    "lenvm/predicted_length": 9.0,
    "lenvm/realised_length": 9.0,
}


def drift(**changes):
    return Drift(LenVMGRPOConfig("out", use_cpu=True, bf16=False, num_generations=2, **changes))


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


def test_it_can_recover_and_is_told_again(caplog):
    bad = {"lenvm/explained_variance": -1.0}
    seen = verdicts(drift(), [bad] * 5 + [{}] * 20 + [bad] * 10)
    assert seen[4] == 1.0 and seen[24] == 0.0 and seen[-1] == 1.0
    assert caplog.text.count("has become stale") == 2


def test_what_is_not_defined_is_left_out():
    nothing = dict.fromkeys(GOOD, math.nan)
    watch = drift()
    assert verdicts(watch, [nothing] * 6) == [0.0] * 6 and watch.averages == {}


def test_thresholds_are_arguments():
    assert verdicts(drift(stale_factor=1.1), [{"lenvm/calibration_slope": 1.2}] * 5)[-1] == 1.0
    assert verdicts(drift(stale_explained_variance=0.9), [{}] * 5)[-1] == 1.0
    assert verdicts(drift(stale_explained_variance=-2.0), [{"lenvm/explained_variance": -1.0}] * 5)[-1] == 0.0


def test_its_state_comes_back(tmp_path):
    first, second = drift(), drift()
    verdicts(first, [{"lenvm/calibration_slope": 4.0}] * 6)
    first.save(str(tmp_path))
    second.load(str(tmp_path))
    assert vars(first) | {"_args": None} == vars(second) | {"_args": None} and second.stale
    second.reset()
    assert (second.averages, second.batches, second.stale) == ({}, 0, False)
    # A checkpoint of a run without a length value model has none.
    second.load(str(tmp_path / "nowhere"))


def test_the_slope_by_hand():
    """Points (y, x) = (0, 0), (1, 1), (2, 4): the regression line of x on y has slope 2."""
    moments = Moments(lambda sums: sums)
    everywhere = torch.ones(4)
    everywhere[3] = 0
    moments.add("x", torch.tensor([0.0, 1.0, 4.0, 99.0]), everywhere, torch.tensor([0.0, 1.0, 2.0, -7.0]))
    moments.add("flat", torch.tensor([0.0, 1.0, 4.0, 99.0]), everywhere, torch.full((4,), 0.3))
    moments.exchange()
    assert moments.slope("x") == pytest.approx(2.0) and math.isnan(moments.slope("flat"))


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
    measured = value_metrics(logits, completions, gamma, lambda sums: sums)
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
