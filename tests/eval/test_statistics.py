"""Bootstrap intervals: known standard errors, coverage, clusters."""

import numpy as np
import pytest

from eval.statistics import Interval, mean_interval, percentile_interval, resampled_means, statistic_interval


def half_width(interval):
    return (interval.high - interval.low) / 2


def test_the_bootstrap_standard_error_of_a_mean_is_the_plug_in_one():
    values = np.random.default_rng(1).normal(size=400)
    draws = resampled_means(values, num_resamples=20_000)
    assert draws.std() == pytest.approx(values.std() / np.sqrt(400), rel=0.03)
    assert draws.mean() == pytest.approx(values.mean(), abs=3 * values.std() / np.sqrt(400 * 20_000))


def test_the_interval_covers_a_normal_mean_as_often_as_it_says():
    generator = np.random.default_rng(2)
    intervals = [mean_interval(generator.normal(3.0, 2.0, size=60), num_resamples=400) for _ in range(600)]
    covered = np.mean([interval.low <= 3.0 <= interval.high for interval in intervals])
    # Three standard errors of the count, and the percentile interval's known shortfall at 60 points.
    assert 0.91 <= covered <= 0.975
    narrow = [mean_interval(generator.normal(size=60), confidence=0.5, num_resamples=400) for _ in range(600)]
    assert 0.43 <= np.mean([interval.low <= 0.0 <= interval.high for interval in narrow]) <= 0.57


def test_duplicated_data_fool_the_naive_interval_but_not_the_clustered_one():
    values = np.random.default_rng(3).normal(size=100)
    prompts = np.arange(100)
    single = mean_interval(values, prompts, num_resamples=8000)
    copied = mean_interval(np.repeat(values, 9), np.repeat(prompts, 9), num_resamples=8000)
    naive = mean_interval(np.repeat(values, 9), num_resamples=8000)
    assert half_width(copied) == pytest.approx(half_width(single), rel=1e-9)
    assert half_width(naive) == pytest.approx(half_width(single) / 3, rel=0.06)


def test_groups_of_one_are_no_groups_and_names_do_not_matter():
    values = np.random.default_rng(4).normal(size=50)
    names = [f"prompt {index:02d}" for index in range(50)]
    assert mean_interval(values, names) == mean_interval(values)


def test_weights_leave_entries_out():
    lengths, correct = np.tile([10.0, 20.0, 999.0, 30.0], 10), np.tile([1, 1, 0, 1], 10)
    interval = mean_interval(lengths, weights=correct, num_resamples=500)
    assert interval.estimate == 20.0
    assert 10.0 <= interval.low < interval.high <= 30.0


def test_too_few_weighted_entries_give_an_estimate_without_an_interval():
    interval = mean_interval([5.0, 7.0, 7.0], weights=[1, 0, 0], num_resamples=200)
    assert interval.estimate == 5.0 and np.isnan(interval.low) and np.isnan(interval.high)
    assert np.isnan(mean_interval([5.0, 7.0], weights=[0, 0]).estimate)


def test_one_prompt_has_no_interval_however_many_completions_it_has():
    lengths, prompt = [3.0, 5.0, 10.0, 2.0], [7, 7, 7, 7]
    interval = mean_interval(lengths, prompt)
    assert interval.estimate == 5.0 and np.isnan([interval.low, interval.high]).all()
    assert np.isnan(mean_interval([3.0]).low)
    # With two prompts there is one again: from 4, both times the first, to 6.
    two = mean_interval([3.0, 5.0, 10.0, 2.0], [0, 0, 1, 1])
    assert (two.low, two.estimate, two.high) == (4.0, 5.0, 6.0)


def test_a_statistic_of_several_means_is_resampled_jointly():
    generator = np.random.default_rng(5)
    base = generator.normal(10.0, 1.0, size=(300, 1))
    both = np.hstack([base, 2 * base])
    ratio = statistic_interval(both, lambda means: means[:, 1] / means[:, 0], num_resamples=300)
    assert ratio.estimate == pytest.approx(2.0) and half_width(ratio) < 1e-9
    with pytest.raises(ValueError, match="statistic"):
        statistic_interval(both, lambda means: means)


def test_the_seed_decides_and_chunks_change_nothing_else(monkeypatch):
    values = np.random.default_rng(7).normal(size=30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    whole = resampled_means(values, num_resamples=50)
    monkeypatch.setattr("eval.statistics.CHUNK_ENTRIES", 7 * 30)
    np.testing.assert_allclose(resampled_means(values, num_resamples=50), whole)


def test_percentiles_by_hand():
    assert percentile_interval(50.0, np.arange(101.0), 0.5) == Interval(50.0, 25.0, 75.0, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "values"),
        (([1.0, float("nan")],), "values"),
        (([1.0, 2.0], [1]), "groups"),
        (([1.0, 2.0], None, [1.0]), "weights"),
        (([1.0, 2.0], None, [1.0, -1.0]), "weights"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(*arguments)
