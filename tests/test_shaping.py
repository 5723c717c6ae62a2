"""Laws of potential-based shaping: telescoping, critic offset, no effect in a group reward, gamma."""

import pytest
import torch

from lenvm_rl.advantages import gae
from lenvm_rl.returns import discounted_return
from lenvm_rl.shaping import check_shaping_gamma, length_potential, potential_shaping, value_potential

LENGTHS = torch.tensor([6, 1, 4])
MASK = torch.arange(6) < LENGTHS.unsqueeze(1)


def random_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_discounted_sum_telescopes_to_the_start(gamma):
    potential, _, _ = random_rows(0)
    shaping = potential_shaping(potential, MASK, gamma)
    weights = gamma ** torch.arange(6, dtype=torch.float64)
    torch.testing.assert_close((weights * shaping).sum(dim=1), -potential[:, 0])


def test_shaping_by_hand():
    # gamma 1/2: F = 2/2 - 4, then 0 - 2 at a terminal end or 6/2 - 2 where the task bootstraps.
    potential, mask = torch.tensor([[4.0, 2.0, 7.0]]), torch.tensor([[1, 1, 0]])
    assert potential_shaping(potential, mask, 0.5).tolist() == [[-3.0, -2.0, 0.0]]
    assert potential_shaping(potential, mask, 0.5, torch.tensor([6.0])).tolist() == [[-3.0, 1.0, 0.0]]


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("cut", [False, True])
def test_shaping_is_critic_initialisation(lam, cut):
    potential, rewards, values = random_rows(1)
    end = torch.tensor([0.3, 0.0, -0.7], dtype=torch.float64) if cut else None
    end_potential = torch.tensor([-0.2, 0.0, 0.5], dtype=torch.float64) if cut else None
    shaping = potential_shaping(potential, MASK, 0.97, end_potential)
    shaped_end = None if end is None else end - end_potential
    shaped = gae(rewards + shaping, values - potential, MASK, 0.97, lam, shaped_end)
    torch.testing.assert_close(shaped, gae(rewards, values, MASK, 0.97, lam, end))


def test_summed_into_a_group_reward_it_has_no_effect():
    # All completions of one prompt start in the same state, so they share Phi(s_0), and gamma = 1 telescopes.
    potential, _, _ = random_rows(2)
    potential[:, 0] = -0.4
    task = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    shaped = task + potential_shaping(potential, MASK, 1.0).sum(dim=1)
    torch.testing.assert_close(shaped - shaped.mean(), task - task.mean())
    torch.testing.assert_close(
        (shaped - shaped.mean()) / (shaped.std() + 1e-4), (task - task.mean()) / (task.std() + 1e-4)
    )


def test_undiscounted_gae_of_shaping_without_a_critic_is_minus_the_potential():
    potential, _, _ = random_rows(3)
    out = gae(potential_shaping(potential, MASK, 1.0), torch.zeros_like(potential), MASK, 1.0, 1.0)
    torch.testing.assert_close(out, torch.where(MASK, -potential, 0.0))


def test_a_mismatched_gamma_is_refused_because_it_pays_for_length():
    assert check_shaping_gamma(None, 1.0) == 1.0
    assert check_shaping_gamma(1.0, 1.0) == 1.0
    with pytest.raises(ValueError, match="shaping_gamma"):
        check_shaping_gamma(0.95, 1.0)
    gamma = check_shaping_gamma(0.95, 1.0, allow_gamma_mismatch=True)
    remaining = (LENGTHS.unsqueeze(1) - torch.arange(6)).clamp(min=0).double()
    shaping = potential_shaping(discounted_return(remaining, 0.95), MASK, gamma)
    torch.testing.assert_close(shaping.sum(dim=1), 0.05 * LENGTHS.double())


def test_potentials_of_a_logit():
    from lenvm_rl.returns import logits_from_remaining

    lengths = torch.tensor([[1.0, 50.0, 400.0]], dtype=torch.float64)
    logits = logits_from_remaining(lengths, 0.99)
    torch.testing.assert_close(length_potential(logits, 0.99, 200), -lengths / 200)
    torch.testing.assert_close(value_potential(logits), discounted_return(lengths, 0.99))
    with pytest.raises(ValueError, match="max_length"):
        length_potential(logits, 0.99, 0)


def test_no_gradient_passes_and_poison_does_not_matter():
    potential, _, _ = random_rows(4)
    poisoned = torch.where(MASK, potential, torch.nan).requires_grad_()
    end = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    out = potential_shaping(poisoned, MASK, 0.9, end)
    assert not out.requires_grad
    torch.testing.assert_close(out, potential_shaping(potential, MASK, 0.9))
    torch.testing.assert_close(potential_shaping(potential, MASK, torch.where(MASK, 0.9, torch.nan).double()), out)
