"""Exact policy gradients on an enumerable world: three tokens (0, 1, end), the end forced at the fourth step."""

import itertools

import pytest
import torch

from lenvm_rl.advantages import combine, gae, length_advantage
from lenvm_rl.returns import discounted_return
from lenvm_rl.shaping import potential_shaping

END, GAMMA, STEPS = 2, 0.8, 4
STATES = [state for length in range(STEPS) for state in itertools.product((0, 1), repeat=length)]
INDEX = {state: number for number, state in enumerate(STATES)}
COMPLETIONS = [(*state, END) for state in STATES]
LENGTHS = torch.tensor([len(completion) for completion in COMPLETIONS])
MASK = torch.arange(STEPS) < LENGTHS.unsqueeze(1)


def log_probabilities(logits):
    """`(15, 4)` log-probabilities of every token of every completion, 0 where there is none."""
    forced = torch.zeros_like(logits)
    forced[[INDEX[state] for state in STATES if len(state) == STEPS - 1], :END] = -torch.inf
    table = torch.log_softmax(logits + forced, dim=-1)
    out = torch.zeros(len(COMPLETIONS), STEPS, dtype=logits.dtype)
    for row, completion in enumerate(COMPLETIONS):
        for t, token in enumerate(completion):
            out[row, t] = table[INDEX[completion[:t]], token]
    return out


def on_states(table):
    """`(15,)` numbers per state laid out as `(15, 4)` values of the states that each completion passes."""
    out = torch.zeros(len(COMPLETIONS), STEPS, dtype=table.dtype)
    for row, completion in enumerate(COMPLETIONS):
        for t in range(len(completion)):
            out[row, t] = table[INDEX[completion[:t]]]
    return out


@pytest.fixture
def logits():
    return torch.randn(len(STATES), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def probabilities(logits):
    return log_probabilities(logits).sum(dim=1).exp()


def expected_gradient(logits, advantages):
    """E[sum_t grad log pi(a_t | s_t) * A_t], summed exactly over all completions."""
    log_probs = log_probabilities(logits)
    weights = log_probs.sum(dim=1).exp().detach()
    surrogate = (weights.unsqueeze(1) * log_probs * advantages * MASK).sum()
    return torch.autograd.grad(surrogate, logits)[0]


def conditional_value(logits, gate):
    """V(s) = E[G_t | s_t = s, gate]: the value fitted on the completions that pass a gate."""
    weights = probabilities(logits).detach() * gate
    returns = discounted_return((LENGTHS.unsqueeze(1) - torch.arange(STEPS)).clamp(min=0).double(), GAMMA)
    table = torch.zeros(len(STATES), dtype=torch.float64)
    for state, number in INDEX.items():
        through = torch.tensor([completion[: len(state)] == state for completion in COMPLETIONS])
        mass = (weights * through).sum()
        if mass > 0:
            table[number] = (weights * through * returns[:, len(state)].nan_to_num()).sum() / mass
    return on_states(table)


def random_values(seed):
    return on_states(-torch.rand(len(STATES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_probabilities_sum_to_one(logits):
    assert float(probabilities(logits).detach().sum()) == pytest.approx(1.0)


def test_ungated_gradient_is_the_same_for_any_baseline(logits):
    without = expected_gradient(logits, length_advantage(torch.zeros(15, 4, dtype=torch.float64), MASK, GAMMA))
    for seed in range(3):
        torch.testing.assert_close(
            expected_gradient(logits, length_advantage(random_values(seed), MASK, GAMMA)), without
        )
    # With lambda below 1 an arbitrary V does enter: the identity above can fail.
    biased = expected_gradient(logits, length_advantage(random_values(0), MASK, GAMMA, 0.5))
    assert float((biased - without).abs().max()) > 1e-3


def test_discount_weighted_gradient_is_the_derivative_of_the_expected_return(logits):
    weights = GAMMA ** torch.arange(STEPS, dtype=torch.float64)
    gradient = expected_gradient(logits, weights * length_advantage(random_values(1), MASK, GAMMA))
    expected_return = (probabilities(logits) * discounted_return(LENGTHS.double(), GAMMA)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected_return, logits)[0])


CORRECT = torch.tensor([float(len(completion) >= 3) for completion in COMPLETIONS], dtype=torch.float64)


def gated_push(logits, advantages):
    """Directional derivative of the chance to be correct along the gated length gradient."""
    chance = torch.autograd.grad((probabilities(logits) * CORRECT).sum(), logits)[0]
    task = torch.zeros(15, dtype=torch.float64)
    return float((chance * expected_gradient(logits, combine(task, advantages, MASK, 1.0, gate=CORRECT))).sum())


def test_gated_gradient_depends_on_the_baseline_and_lowers_accuracy_where_correct_is_longer(logits):
    everyone = conditional_value(logits, torch.ones(15, dtype=torch.float64))
    gradients = [
        expected_gradient(logits, CORRECT.unsqueeze(1) * length_advantage(values, MASK, GAMMA))
        for values in (everyone, random_values(2))
    ]
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-2
    # Correct completions are the longer ones, and V knows all of them: G - V is negative on average where it counts.
    assert gated_push(logits, length_advantage(everyone, MASK, GAMMA)) < 0


def test_a_baseline_fitted_on_correct_completions_leaves_no_mean_in_any_state(logits):
    values = conditional_value(logits, CORRECT)
    advantages = length_advantage(values, MASK, GAMMA)
    weights = probabilities(logits).detach() * CORRECT
    for state in STATES:
        through = torch.tensor([completion[: len(state)] == state for completion in COMPLETIONS])
        assert float((weights * through * advantages[:, len(state)]).sum()) == pytest.approx(0.0, abs=1e-12)
    everyone = conditional_value(logits, torch.ones(15, dtype=torch.float64))
    before = gated_push(logits, length_advantage(everyone, MASK, GAMMA))
    assert gated_push(logits, advantages) > before


def best_actions(rewards, terminal):
    """Greedy actions of exact dynamic programming for per-transition rewards and a reward per completion."""
    values, actions = {}, {}
    for state in sorted(STATES, key=len, reverse=True):
        choices = {END: rewards[state, END] + terminal[COMPLETIONS.index((*state, END))]}
        if len(state) < STEPS - 1:
            choices |= {token: rewards[state, token] + values[(*state, token)] for token in (0, 1)}
        actions[state] = max(choices, key=choices.get)
        values[state] = choices[actions[state]]
    return actions


def test_the_optimal_policy_is_unchanged_by_shaping():
    generator = torch.Generator().manual_seed(3)
    terminal = torch.rand(15, generator=generator, dtype=torch.float64).tolist()
    potential = torch.randn(len(STATES), generator=generator, dtype=torch.float64) * 5
    shaping = potential_shaping(on_states(potential), MASK, 1.0)
    plain = {(state, token): 0.0 for state in STATES for token in range(3)}
    shaped, paid = dict(plain), dict(plain)
    for row, completion in enumerate(COMPLETIONS):
        for t, token in enumerate(completion):
            shaped[completion[:t], token] = float(shaping[row, t])
            paid[completion[:t], token] = -1.0
    assert best_actions(shaped, terminal) == best_actions(plain, terminal)
    assert best_actions(paid, terminal) != best_actions(plain, terminal)


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_shaping_with_a_critic_that_has_absorbed_it_leaves_the_gradient(logits, lam):
    rewards = torch.nn.functional.one_hot(LENGTHS - 1, STEPS).double() * CORRECT.unsqueeze(1)
    values, potential = random_values(5), random_values(6)
    shaped = gae(rewards + potential_shaping(potential, MASK, 1.0), values - potential, MASK, 1.0, lam)
    plain = gae(rewards, values, MASK, 1.0, lam)
    torch.testing.assert_close(expected_gradient(logits, shaped), expected_gradient(logits, plain))
