"""Shaping in the rewards and shaping as an offset of the critic: one algorithm, told in two ways."""

import pytest
import torch
from trainer_parts import batch_of, counts_of_w8, grpo, logged, ppo, random_lenvm, weights

COMMON = {"shaping_coef": 2.0, "task_gamma": 0.9, "max_steps": 4}
SETTINGS = [
    {"task_lam": 1.0},
    {"task_lam": 0.6, "truncation": "bootstrap"},
    {"task_lam": 0.95, "critic_lam": 1.0, "shaping_potential": "length"},
]


def pair(make, tmp_path, **changes):
    """The same run in both forms."""
    forms = ("rewards", "critic_offset")
    return [make(tmp_path / form, counts_of_w8, random_lenvm(), shaping_form=form, **changes) for form in forms]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_ppo_takes_the_same_steps(tmp_path, changes):
    """MATH: GAE(r + F, u) = GAE(r, u + Phi) for every lambda, at ends and at cuts; so whole runs agree to rounding."""
    first, second = pair(ppo, tmp_path, max_completion_length=4, **COMMON, **changes)
    start = weights(first.model)
    for trainer in (first, second):
        torch.manual_seed(0)
        trainer.train()
    for ours, theirs in ((first.model, second.model), (first.critic, second.critic)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    moved = max(float((a - start[name]).abs().max()) for name, a in first.model.state_dict().items())
    assert moved > 1e-2
    assert 0.0 < max(logged(first, "length/truncated")) < 1.0
    # What the critic's metrics speak of is what differs: the shaped return, or the task's own.
    shaped, plain = (logged(trainer, "critic/return_mean")[0] for trainer in (first, second))
    assert abs(shaped - plain) > 0.1


def test_without_shaping_the_advantages_would_be_others(tmp_path):
    shaped, _ = pair(ppo, tmp_path, **{**COMMON, "task_lam": 0.6})
    plain = ppo(tmp_path / "plain", counts_of_w8, random_lenvm(), task_gamma=0.9, task_lam=0.6)
    assert (batch_of(shaped)["advantages"] - batch_of(plain)["advantages"]).abs().max() > 0.1


@pytest.mark.parametrize("make", [grpo, lambda *args, **kwargs: ppo(*args, critic="lenvm", **kwargs)])
@pytest.mark.parametrize("lam", [1.0, 0.6])
def test_without_a_critic_the_offset_is_to_zero(tmp_path, make, lam):
    first, second = pair(make, tmp_path, task_lam=lam, **COMMON)
    torch.manual_seed(0)
    ours = batch_of(first)
    torch.manual_seed(0)
    theirs = batch_of(second)
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    torch.testing.assert_close(ours["advantages"], theirs["advantages"], atol=1e-5, rtol=1e-5)


def test_a_discount_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set shaping_form='rewards'"):
        grpo(
            tmp_path, lenvm=random_lenvm(), shaping_coef=1.0, shaping_form="critic_offset", shaping_gamma=0.5,
            allow_gamma_mismatch=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match="shaping_form='offset' is unknown"):
        grpo(tmp_path, lenvm=random_lenvm(), shaping_coef=1.0, shaping_form="offset")
