"""What a model's errors stand beside, against hand counts on ragged batches."""

import math
from itertools import combinations

import pytest
import torch
from test_value_metrics import GAMMA

from lenvm_rl.pretraining.metrics import length_value_metrics
from lenvm_rl.pretraining.references import half_returns, reference_metrics, regression
from lenvm_rl.returns import logits_from_remaining


def consistent(*lengths):
    return math.log(sum(GAMMA**length for length in lengths) / len(lengths)) / math.log(GAMMA)


def relative(first, second):
    return (abs(first - second) / first + abs(first - second) / second) / 2


# Prompt 7 (3 tokens): completions of 1, 4. Prompt 2 (5 tokens): 2, 2 and one cut after 3. Prompt 9 (9 tokens): 6, 3.
LENGTHS = torch.tensor([1, 2, 4, 6, 2, 3, 3])
PROMPTS = torch.tensor([3, 5, 3, 9, 5, 5, 9])
FINISHED = torch.tensor([1, 1, 1, 1, 1, 0, 1])
GROUPS = torch.tensor([7, 2, 7, 9, 2, 2, 9])


def test_references_by_hand():
    metrics = reference_metrics(LENGTHS, PROMPTS, FINISHED, GROUPS, GAMMA)
    realised = [1, 2, 4, 6, 2, 3]
    mean = sum(realised) / 6
    assert metrics["reference_mean_length_mae"] == pytest.approx(sum(abs(mean - n) for n in realised) / 6)
    assert metrics["reference_mean_length_mre"] == pytest.approx(sum(abs(mean - n) / n for n in realised) / 6)
    first, last = consistent(1, 4), consistent(6, 3)
    middle = (first + last) / 2
    expected = (abs(middle - first) / first + abs(middle - last) / last) / 2
    assert metrics["reference_mean_consistent_mre"] == pytest.approx(expected)
    # A line through two prompts goes through both; the six completions: 3 -> 1, 4; 5 -> 2, 2; 9 -> 6, 3.
    assert metrics["reference_regression_consistent_mre"] == pytest.approx(0, abs=1e-12)
    x = [3, 5, 3, 9, 5, 9]
    center = sum(x) / 6
    slope = sum((a - center) * b for a, b in zip(x, realised, strict=True)) / sum((a - center) ** 2 for a in x)
    errors = [abs(mean + slope * (a - center) - b) for a, b in zip(x, realised, strict=True)]
    assert metrics["reference_regression_length_mae"] == pytest.approx(sum(errors) / 6)
    # Any number from 1 to 4, 2 to 2 and 3 to 6 is a median: errors 3, 0, 3 in all.
    assert metrics["reference_median_length_mae"] == pytest.approx(6 / 6)
    # Halves of one completion each; the prompt with a cut completion is left out.
    assert metrics["reference_half_mre"] == pytest.approx((relative(1, 4) + relative(6, 3)) / 2)
    assert (metrics["reference_half_samples"], metrics["reference_half_prompts"]) == (1, 2)


def test_the_order_of_the_data_does_not_matter():
    lengths = torch.randint(1, 40, (90,))
    groups, prompts = torch.arange(90) // 9, torch.arange(90) // 9 + 3
    expected = reference_metrics(lengths, prompts, torch.ones(90), groups, 0.9)
    order = torch.argsort(lengths)
    again = reference_metrics(lengths[order], prompts[order], torch.ones(90), groups[order], 0.9)
    assert again == pytest.approx(expected)
    assert (expected["reference_half_samples"], expected["reference_half_prompts"]) == (4, 10)


def test_halves_are_disjoint_equal_and_random():
    lengths = torch.tensor([1, 2, 3, 4, 9])
    halves = half_returns(lengths, torch.tensor([0, 0, 0, 0, 1]), GAMMA, splits=60)
    assert halves.shape == (60, 2, 2) and bool(halves[:, :, 1].isnan().all())
    returns = {length: -(1 - GAMMA**length) for length in (1, 2, 3, 4)}
    pairs = {round((returns[a] + returns[b]) / 2, 9): {a, b} for a, b in combinations(returns, 2)}
    drawn = [[pairs[round(float(mean), 9)] for mean in split] for split in halves[:, :, 0]]
    assert all(first | second == {1, 2, 3, 4} for first, second in drawn)
    assert {frozenset(first) for first, _ in drawn} == {frozenset(pair) for pair in pairs.values()}


def test_an_exact_model_is_nearer_to_a_half_than_the_other_half():
    """Lengths of 20 to 60 tokens with a spread: one half is uncertain, between two both are, 1 to root 2."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.linspace(20, 60, 300)
    groups = torch.arange(300).repeat_interleave(32)
    lengths = (mean[groups] + 5 * torch.randn(len(groups), generator=draw)).round().long().clamp(min=1)
    gamma = 0.95
    # exp of a normal: the return-consistent length of N(m, s) is m + s^2 ln(gamma) / 2.
    exact = mean + 25 * math.log(gamma) / 2
    logits = logits_from_remaining(exact[groups].unsqueeze(1), gamma).expand(-1, int(lengths.max()))
    metrics = length_value_metrics(logits, lengths, torch.ones(len(groups)), groups, gamma)
    noise = reference_metrics(lengths, groups, torch.ones(len(groups)), groups, gamma)["reference_half_mre"]
    assert metrics["half_mre"] / noise == pytest.approx(math.sqrt(0.5), rel=0.05)
    assert 0.98 < metrics["prompt_explained_variance"] < 1
    # A model that is 15 % off for every prompt is far outside the noise.
    worse = logits_from_remaining(1.15 * exact[groups].unsqueeze(1), gamma).expand(-1, int(lengths.max()))
    assert length_value_metrics(worse, lengths, torch.ones(len(groups)), groups, gamma)["half_mre"] > 2 * noise


def test_between_prompt_variance_by_hand():
    # Prompts with completions (1, 4), (2) and (6, 3), and a value for each.
    values = torch.tensor([-0.5, -0.75, -0.9])
    group = torch.tensor([0, 0, 1, 2, 2])
    lengths = torch.tensor([1, 4, 2, 6, 3])
    logits = torch.logit(-values)[group].unsqueeze(1).expand(-1, 6)
    metrics = length_value_metrics(logits, lengths, torch.ones(5), group, GAMMA)
    returns = torch.tensor([-(0.5 + 0.9375) / 2, -0.75, -((1 - 0.5**6) + 0.875) / 2])
    expected = 1 - (returns - values).var() / returns.var()
    assert metrics["prompt_explained_variance"] == pytest.approx(float(expected), abs=1e-5)
    # Within: (0.5, 0.9375) and (1 - 1/64, 0.875), a degree of freedom each; the means are of 2, 1 and 2.
    within = ((0.9375 - 0.5) ** 2 / 2 + (1 - 1 / 64 - 0.875) ** 2 / 2) / 2
    ceiling = 1 - within * (0.5 + 1 + 0.5) / 3 / float(returns.var(correction=0))
    assert metrics["prompt_explained_ceiling"] == pytest.approx(ceiling, abs=1e-5)


def test_regression_says_at_least_one_token():
    assert regression(torch.tensor([1, 2, 3]), torch.tensor([1, 1, 7])).tolist() == pytest.approx([1.0, 3.0, 6.0])
    assert regression(torch.tensor([2, 2]), torch.tensor([1, 7])).tolist() == [4.0, 4.0]


def test_nothing_to_compare_is_nan():
    metrics = reference_metrics(torch.tensor([3, 4]), torch.tensor([1, 1]), torch.tensor([1, 0]), torch.zeros(2), 0.9)
    for name in ("reference_mean_consistent_mre", "reference_half_mre", "reference_half_samples"):
        assert math.isnan(metrics[name])
    assert (metrics["reference_half_prompts"], metrics["reference_median_length_mae"]) == (0, 0)
