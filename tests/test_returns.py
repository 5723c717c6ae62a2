"""Laws of the length return: Bellman, round trips, gamma from data, temporal differences."""

import math

import pytest
import torch

from lenvm_rl.returns import (
    check_mask,
    discounted_return,
    fit_gamma,
    horizon_shift,
    logits_from_remaining,
    next_values,
    remaining_from_logits,
    remaining_from_value,
    td_residual,
)


def test_return_has_the_hand_worked_values():
    # gamma = 1/2: -(1 - 1/2), -(1 - 1/4), -(1 - 1/8); nothing to come is worth exactly 0.
    returns = discounted_return(torch.tensor([0, 1, 2, 3]), 0.5)
    assert returns.tolist() == pytest.approx([0.0, -0.5, -0.75, -0.875], abs=1e-7)
    assert float(returns[0]) == 0.0


@pytest.mark.parametrize("gamma", [0.9, 0.997, 0.9998])
def test_return_obeys_bellman(gamma):
    remaining = torch.arange(1, 32_769, dtype=torch.float64)
    returns, following = discounted_return(remaining, gamma), discounted_return(remaining - 1, gamma)
    torch.testing.assert_close(returns, -(1 - gamma) + gamma * following, rtol=0, atol=1e-12)


def test_return_keeps_its_digits_in_float32():
    exact = discounted_return(torch.arange(1, 33, dtype=torch.float64), 0.9998)
    single = discounted_return(torch.arange(1, 33), 0.9998).double()
    assert float(((single - exact) / exact).abs().max()) < 3e-7
    naive = -(1 - torch.tensor(0.9998) ** torch.arange(1, 33)).double()
    assert float(((naive - exact) / exact).abs().max()) > 1e-5


@pytest.mark.parametrize("gamma", [0.95, 0.997, 0.9998])
def test_length_and_logit_round_trip_in_float32(gamma):
    lengths = torch.arange(1, 32_769, dtype=torch.float32)
    back = remaining_from_logits(logits_from_remaining(lengths, gamma), gamma)
    assert float(((back - lengths) / lengths).abs().max()) < 1e-5
    assert torch.equal(back.round(), lengths)


def test_length_survives_bfloat16_logits_within_its_precision():
    # bfloat16 keeps 8 bits: a relative error of 2^-9 of the logit z moves softplus(z) by at most sigma(z) * |z| * 2^-9.
    gamma = 0.9998
    lengths = torch.arange(1, 32_769, dtype=torch.float32)
    logits = logits_from_remaining(lengths, gamma)
    back = remaining_from_logits(logits.bfloat16().float(), gamma)
    bound = torch.sigmoid(logits + logits.abs() * 2**-8) * logits.abs() * 2**-8 / -math.log(gamma)
    assert bool(((back - lengths).abs() <= bound + 1e-3 * lengths).all())


def test_logit_gives_the_value_of_its_length():
    lengths = torch.tensor([1.0, 7.0, 300.0], dtype=torch.float64)
    values = -torch.sigmoid(logits_from_remaining(lengths, 0.99))
    torch.testing.assert_close(values, discounted_return(lengths, 0.99))
    torch.testing.assert_close(remaining_from_value(values, 0.99), lengths)
    assert torch.isinf(remaining_from_value(torch.tensor(-1.0), 0.99))
    assert float(logits_from_remaining(torch.tensor(0), 0.99)) == -math.inf


def test_gamma_covers_the_quantile():
    lengths = list(range(1, 102))  # the 99th percentile of 1..101 is 100
    gamma = fit_gamma(lengths)
    assert isinstance(gamma, float)
    assert gamma == pytest.approx(0.01 ** (1 / 100), abs=1e-15)
    assert 1 - gamma**100 == pytest.approx(0.99, abs=1e-12)
    # Linear interpolation between order statistics: 0.5 between 10 and 20 is 15.
    assert fit_gamma(torch.tensor([10, 20]), quantile=0.5, coverage=0.75) == pytest.approx(0.25 ** (1 / 15))


@pytest.mark.parametrize("lengths", [[], [0, 3], [float("inf"), 2], [float("nan")]])
def test_gamma_refuses_lengths_without_meaning(lengths):
    with pytest.raises(ValueError):
        fit_gamma(lengths)


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_gamma_outside_the_unit_interval_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        discounted_return(torch.tensor([1]), gamma)


def test_mask_must_be_a_prefix_of_ones():
    assert check_mask(torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [[True, True, False], [False] * 3]
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        check_mask(torch.tensor([[1, 0, 0], [1, 0, 1]]))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_next_values_put_the_bootstrap_after_the_last_token(kind):
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, math.nan], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).to(kind)
    bootstrap = torch.tensor([10.0, 20.0, 30.0])
    assert next_values(values, mask).tolist() == [[2, 3, 0], [5, 0, 0], [0, 0, 0]]
    assert next_values(values, mask, bootstrap).tolist() == [[2, 3, 10], [5, 20, 0], [0, 0, 0]]


def test_td_residual_by_hand():
    # gamma = 1/2: d = -1/2 + V'/2 - V. Row 0 finishes after 2 tokens, row 1 is cut after 1 with a value of -0.5 there.
    values = torch.tensor([[-0.75, -0.25], [-0.5, 999.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    bootstrap = torch.tensor([0.0, -0.5])
    expected = [[-0.5 - 0.125 + 0.75, -0.5 + 0.25], [-0.5 - 0.25 + 0.5, 0.0]]
    assert td_residual(values, mask, 0.5, bootstrap).tolist() == expected
    assert (-horizon_shift(values, mask, 0.5, bootstrap)).tolist() == expected


def test_perfect_values_have_no_td_residual():
    lengths = torch.tensor([5, 3, 1])
    remaining = (lengths.unsqueeze(1) - torch.arange(5)).clamp(min=0)
    mask = remaining > 0
    values = discounted_return(remaining.double(), 0.97)
    torch.testing.assert_close(
        td_residual(values, mask, 0.97), torch.zeros(3, 5, dtype=torch.float64), atol=1e-15, rtol=0
    )


def test_poison_at_masked_slots_reaches_neither_output_nor_gradient():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    clean = torch.rand(2, 3)
    for poison in (math.nan, math.inf, 999.0):
        values = torch.where(mask.bool(), clean, poison).requires_grad_()
        gamma = torch.where(mask.bool(), 0.9, poison)
        out = td_residual(values, mask, gamma, torch.tensor([0.0, -0.3]))
        reference = td_residual(clean, mask, 0.9, torch.tensor([0.0, -0.3]))
        torch.testing.assert_close(out, reference)
        out.sum().backward()
        assert bool(torch.isfinite(values.grad).all()) and bool((values.grad[mask == 0] == 0).all())
