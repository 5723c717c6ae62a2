"""Laws of the advantages: hand-worked GAE, the naive loop, poison, perfect values, streams and gates."""

import math

import pytest
import torch

from lenvm_rl.advantages import combine, gae, length_advantage
from lenvm_rl.returns import discounted_return, next_values


def naive_gae(rewards, values, lengths, gamma, lam, bootstrap):
    """The textbook double sum, element by element, with per-step gamma and lambda."""
    out = torch.zeros_like(values)
    for row, length in enumerate(lengths):
        for t in range(length):
            weight = 1.0
            for k in range(t, length):
                after = bootstrap[row] if k == length - 1 else values[row, k + 1]
                out[row, t] += weight * (rewards[row, k] + gamma[row, k] * after - values[row, k])
                weight = weight * gamma[row, k] * lam[row, k]
    return out


@pytest.mark.parametrize(
    "lam, expected",
    # rewards 0 0 1, values .5 .4 .2, gamma 1: deltas -.1 -.2 .8
    [(0.0, [-0.1, -0.2, 0.8]), (0.7, [0.152, 0.36, 0.8]), (1.0, [0.5, 0.6, 0.8])],
)
def test_gae_by_hand(lam, expected):
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]])
    assert gae(rewards, values, torch.ones(1, 3), 1.0, lam)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_gae_by_hand_discounted_and_bootstrapped():
    # gamma 1/2, lam 1/2, cut with a value of 4 after the end: deltas 1 + 1 - 1 = 1, 0 + 2 - 2 = 0; A = [1 + 0, 0].
    out = gae(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), 0.5, 0.5, torch.tensor([4.0]))
    assert out.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_gae_equals_the_naive_sum_on_ragged_random_input(kind):
    torch.manual_seed(0)
    lengths, steps = [7, 1, 4, 0, 6], 7
    mask = (torch.arange(steps) < torch.tensor(lengths).unsqueeze(1)).to(kind)
    rewards, values = torch.randn(5, steps, dtype=torch.float64), torch.randn(5, steps, dtype=torch.float64)
    gamma, lam = torch.rand(5, steps, dtype=torch.float64), torch.rand(5, steps, dtype=torch.float64)
    bootstrap = torch.randn(5, dtype=torch.float64)
    expected = naive_gae(rewards, values, lengths, gamma, lam, bootstrap)
    torch.testing.assert_close(gae(rewards, values, mask, gamma, lam, bootstrap), expected)
    scalar = naive_gae(rewards, values, lengths, torch.full_like(gamma, 0.9), torch.full_like(lam, 0.8), bootstrap)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.8, bootstrap), scalar)
    assert gae(rewards, values, mask, 0.9, 0.8).dtype == torch.float64


def test_poison_at_masked_slots_reaches_neither_output_nor_gradient():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rewards, clean, bootstrap = torch.rand(2, 3), torch.rand(2, 3), torch.tensor([0.0, -0.3])
    action = torch.tensor([[1, 0, 0], [1, 0, 0]])
    for poison in (math.nan, math.inf, 999.0):
        values = torch.where(mask.bool(), clean, poison).requires_grad_()
        poisoned = torch.where(mask.bool(), rewards, poison)
        per_step = torch.where(mask.bool(), 0.9, poison)
        pairs = [
            (
                gae(poisoned, values, mask, per_step, per_step, bootstrap),
                gae(rewards, clean, mask, 0.9, 0.9, bootstrap),
            ),
            (length_advantage(values, mask, 0.9, 1.0, bootstrap), length_advantage(clean, mask, 0.9, 1.0, bootstrap)),
            (length_advantage(values, mask, 0.9, 0.5, bootstrap), length_advantage(clean, mask, 0.9, 0.5, bootstrap)),
            (
                length_advantage(values, mask, 0.9, 0.5, bootstrap, action),
                length_advantage(clean, mask, 0.9, 0.5, bootstrap, action),
            ),
            (combine(poisoned, values, mask, 0.5), combine(rewards, clean, mask, 0.5)),
        ]
        for got, expected in pairs:
            torch.testing.assert_close(got, expected)
            assert bool((got[mask == 0] == 0).all())
        sum(got.square().sum() for got, _ in pairs).backward()
        assert bool(torch.isfinite(values.grad).all()) and bool((values.grad[mask == 0] == 0).all())


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_perfect_value_leaves_no_length_advantage(lam):
    lengths = torch.tensor([6, 2, 4])
    remaining = (lengths.unsqueeze(1) - torch.arange(6)).clamp(min=0).double()
    mask = remaining > 0
    values = discounted_return(remaining, 0.95)
    out = length_advantage(values, mask, 0.95, lam)
    torch.testing.assert_close(out, torch.zeros_like(out), atol=1e-14, rtol=0)
    # The same rows cut after two tokens, with the true value of what was cut off.
    out = length_advantage(values[:, :2], mask[:, :2], 0.95, lam, discounted_return((lengths - 2).double(), 0.95))
    torch.testing.assert_close(out, torch.zeros_like(out), atol=1e-14, rtol=0)


def test_length_advantage_closed_form_is_gae_at_lambda_one():
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor([9, 3, 5]).unsqueeze(1)
    values, bootstrap = -torch.rand(3, 9, dtype=torch.float64), torch.tensor([0.0, -0.4, 0.0], dtype=torch.float64)
    rewards = torch.full_like(values, -0.1)
    expected = gae(rewards, values, mask, 0.9, 1.0, bootstrap)
    torch.testing.assert_close(length_advantage(values, mask, 0.9, 1.0, bootstrap), expected)
    torch.testing.assert_close(length_advantage(values, mask, 0.9, torch.ones_like(values), bootstrap), expected)


def test_length_advantage_by_hand():
    # gamma 1/2, two tokens: G = -.75, -.5. A token that beats its expectation is positive.
    out = length_advantage(torch.tensor([[-0.8, -0.25]]), torch.ones(1, 2), 0.5)
    assert out[0].tolist() == pytest.approx([0.05, -0.25])


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_tokens_that_are_not_actions_do_not_count(lam):
    # With the tool's tokens cut out of the row the remaining entries are the same.
    torch.manual_seed(2)
    values = -torch.rand(2, 6, dtype=torch.float64)
    action = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 0]])
    bootstrap = torch.tensor([0.0, -0.6], dtype=torch.float64)
    out = length_advantage(values, torch.ones(2, 6), 0.9, lam, bootstrap, action)
    for row in range(2):
        kept = action[row].bool()
        alone = length_advantage(
            values[row, kept][None], torch.ones(1, int(kept.sum())), 0.9, lam, bootstrap[row : row + 1]
        )
        torch.testing.assert_close(out[row, kept], alone[0])
        assert bool((out[row, ~kept] == 0).all())


def test_what_follows_a_token_is_the_next_action_or_the_end():
    values, mask, end = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([9.0])
    assert next_values(values, mask, end).tolist() == [[2.0, 3.0, 4.0, 9.0, 0.0]]
    assert next_values(values, mask).tolist() == [[2.0, 3.0, 4.0, 0.0, 0.0]]
    actions = torch.tensor([[1, 0, 1, 0, 1]])
    assert next_values(values, mask, end, actions).tolist() == [[3.0, 3.0, 9.0, 9.0, 0.0]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1, 1), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0)])
def test_gae_of_long_rows_is_the_recursion_from_the_end(gamma, lam):
    torch.manual_seed(3)
    mask = torch.arange(700) < torch.tensor([700, 1, 513, 512]).unsqueeze(1)
    rewards, values = torch.randn(4, 700, dtype=torch.float64), torch.randn(4, 700, dtype=torch.float64)
    end = torch.tensor([0.0, 0.5, -0.5, 0.0], dtype=torch.float64)
    expected, following = torch.zeros_like(values), torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(700)):
        last = mask.sum(1) - 1 == t
        after = torch.where(last, end, values[:, t + 1] if t + 1 < 700 else end)
        following = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * torch.where(last, 0.0, following)
        following = torch.where(mask[:, t], following, 0.0)
        expected[:, t] = following
    torch.testing.assert_close(gae(rewards, values, mask, gamma, lam, end), expected)


def test_gae_takes_no_step_a_token():
    """16384 tokens are 14 doublings: fewer calls of torch than there are tokens by far, and none more at lambda 1."""

    class Count(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    rewards, values, mask = torch.zeros(2, 16384), torch.zeros(2, 16384), torch.ones(2, 16384)
    with Count():
        gae(rewards, values, mask, 0.99, 0.95)
    assert Count.calls < 400
    Count.calls = 0
    with Count():
        gae(rewards, values, mask, 1.0, 1.0)
    assert Count.calls < 50


def test_combine_adds_gated_streams():
    length = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert combine(torch.tensor([10.0, 20.0]), length, mask, 0.5).tolist() == [[10.5, 11.0], [21.5, 0.0]]
    gated = combine(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), length, mask, 0.5, gate=torch.tensor([0.0, 1.0]))
    assert gated.tolist() == [[1.0, 2.0], [4.5, 0.0]]


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 4)])
def test_per_step_arguments_must_have_the_shape_of_the_values(bad):
    with pytest.raises(ValueError, match="gamma"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), bad, 1.0)


def test_a_gate_weighs_the_length_stream_before_the_coefficient_does():
    """To the last bit, whatever share a row is paid."""
    task, length, mask = torch.randn(4, 5), torch.randn(4, 5), torch.ones(4, 5)
    gate = torch.tensor([0.0, 1 / 3, 0.7, 1.0])
    assert torch.equal(combine(task, length, mask, 0.3, gate), combine(task, gate.unsqueeze(1) * length, mask, 0.3))
