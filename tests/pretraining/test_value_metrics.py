"""Metrics against hand counts on a ragged batch, and rank agreement against counting every pair."""

import math

import pytest
import torch

from lenvm_rl.pretraining.metrics import kendall_tau, length_value_metrics, point_index
from lenvm_rl.returns import logits_from_remaining

GAMMA = 0.5
POISON = float("nan")


def hand_case():
    """Completions of 1, 4 and 2 tokens and one cut after 3. The model says 2 tokens at every state.

    The first two are of one prompt, the last two of another. At gamma 0.5 the model's value is -0.75, and the returns
    of 1, 2, 3, 4 tokens are -0.5, -0.75, -0.875, -0.9375.
    """
    lengths = torch.tensor([1, 4, 2, 3])
    logits = torch.full((4, 4), float(logits_from_remaining(torch.tensor(2.0), GAMMA)))
    logits[torch.arange(4) >= lengths.unsqueeze(1)] = POISON
    finished, groups = torch.tensor([1, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    return logits, lengths, finished, groups


def test_metrics_by_hand():
    metrics = length_value_metrics(*hand_case(), GAMMA)
    # Errors V - G at the states of finished completions: 1 token: -.25 | 4: .1875 .125 0 -.25 | 2: 0 -.25
    errors = [-0.25, 0.1875, 0.125, 0.0, -0.25, 0.0, -0.25]
    assert metrics["value_mae"] == pytest.approx(sum(map(abs, errors)) / 7, abs=1e-6)
    assert metrics["value_bias"] == pytest.approx(sum(errors) / 7, abs=1e-6)
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-5)  # a constant explains nothing
    # The loss counts the cut completion too, taken for 3 tokens here: .125, 0, -.25.
    assert metrics["loss"] == pytest.approx(sum(e * e for e in [*errors, 0.125, 0.0, -0.25]) / 10, abs=1e-6)
    assert (metrics["completions"], metrics["truncated_share"]) == (4, 0.25)
    # Tokens to come at 0, 25, 50, 75 %: (1, 4, 2), (1, 3, 2), (1, 2, 1), (1, 1, 1); the model says 2.
    for point, remaining in {0: (1, 4, 2), 25: (1, 3, 2), 50: (1, 2, 1), 75: (1, 1, 1)}.items():
        errors = [2 - n for n in remaining]
        assert metrics[f"length_mae_at_{point}"] == pytest.approx(sum(map(abs, errors)) / 3, abs=1e-5)
        assert metrics[f"length_bias_at_{point}"] == pytest.approx(sum(errors) / 3, abs=1e-5)
        assert metrics[f"length_mre_at_{point}"] == pytest.approx(sum(abs(2 - n) / n for n in remaining) / 3, abs=1e-5)
        values = [-0.75 + 1 - 0.5**n for n in remaining]
        assert metrics[f"value_mae_at_{point}"] == pytest.approx(sum(map(abs, values)) / 3, abs=1e-6)
        assert metrics[f"value_bias_at_{point}"] == pytest.approx(sum(values) / 3, abs=1e-6)
    assert math.isnan(metrics["explained_variance_at_75"])  # every return is the same there
    # Group 0: mean return -.71875, hence log(.28125)/log(.5) = 1.83007 tokens. Group 1 has a cut completion.
    consistent = math.log(0.28125) / math.log(0.5)
    assert metrics["consistent_prompts"] == 1
    assert metrics["consistent_mae"] == pytest.approx(2 - consistent, abs=1e-5)
    assert metrics["consistent_mre"] == pytest.approx((2 - consistent) / consistent, abs=1e-5)
    assert math.isnan(metrics["kendall_tau"])  # every prediction is the same


def test_a_perfect_model_scores_perfectly():
    groups = torch.arange(4).repeat_interleave(2)
    lengths = torch.tensor([1, 5, 9, 3])[groups]
    remaining = (lengths.unsqueeze(1) - torch.arange(9)).clamp(min=1)
    logits = logits_from_remaining(remaining.float(), 0.9)
    metrics = length_value_metrics(logits, lengths, torch.ones(8), groups, 0.9)
    expected = {"explained_variance": 1, "calibration_slope": 1, "kendall_tau": 1, "consistent_mre": 0, "loss": 0}
    expected["prompt_explained_variance"] = 1
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name
    for name in metrics:
        if "mae" in name or "bias" in name or "mre" in name:
            assert metrics[name] == pytest.approx(0, abs=1e-4), name


def test_a_calibration_slope_by_hand():
    # Completions of 2 and 3 tokens, hence 2, 1 | 3, 2, 1 to come; the model says 1, 1 | 2, 1, 1.
    metrics = length_value_metrics(
        logits_from_remaining(torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]]), GAMMA),
        torch.tensor([2, 3]),
        torch.ones(2),
        torch.arange(2),
        GAMMA,
    )
    values, returns = [-0.5, -0.5, -0.75, -0.5, -0.5], [-0.75, -0.5, -0.875, -0.75, -0.5]
    mean_v, mean_g = sum(values) / 5, sum(returns) / 5
    slope = sum((v - mean_v) * (g - mean_g) for v, g in zip(values, returns, strict=True))
    slope /= sum((v - mean_v) ** 2 for v in values)
    assert metrics["calibration_slope"] == pytest.approx(slope, abs=1e-5)


def test_no_finished_completion_is_an_error():
    logits, lengths, _, groups = hand_case()
    with pytest.raises(ValueError, match="No completion ended"):
        length_value_metrics(logits, lengths, torch.zeros(4), groups, GAMMA)


def test_points_are_states_of_the_completion():
    lengths = torch.arange(1, 2000)
    for percent in (0, 25, 50, 75):
        index = point_index(lengths, percent)
        assert index.tolist() == [length * percent // 100 for length in lengths.tolist()]
        assert (index < lengths).all()


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),
        # Of 6 pairs 4 agree; one is tied in the first, one in the second.
        ([1, 1, 2, 3], [1, 2, 2, 3], 4 / 5),
        ([1, 1], [1, 2], math.nan),
        ([3], [3], math.nan),
        ([], [], math.nan),
    ],
)
def test_kendall_tau_by_hand(first, second, tau):
    assert kendall_tau(torch.tensor(first), torch.tensor(second)) == pytest.approx(tau, nan_ok=True)


@pytest.mark.parametrize("seed", range(4))
def test_kendall_tau_equals_counting_every_pair(seed):
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 2 + 9 * seed, (97,), generator=draw)
    second = first + torch.randint(-6, 7, (97,), generator=draw)
    a, b = (torch.sign(x.unsqueeze(0) - x.unsqueeze(1)).triu(1) for x in (first, second))
    pairs = math.sqrt(int(a.abs().sum()) * int(b.abs().sum()))
    assert kendall_tau(first, second) == pytest.approx(int((a * b).sum()) / pairs)
    assert kendall_tau(first.double() / 3, second) == pytest.approx(int((a * b).sum()) / pairs)
