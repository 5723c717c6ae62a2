"""Lambda of the policy and lambda of the critic's targets, by hand; lambda by length."""

import pytest
import torch
from test_trainers_ppo import MASK, REWARDS, VALUES, scripted_ppo
from trainer_parts import batch_of, logged, ppo, random_lenvm, same_weights, settings, weights

from lenvm_rl.advantages import gae
from lenvm_rl.trainers import LenVMPPOConfig
from lenvm_rl.trainers.streams import Completions, length_adaptive_lambda

KEYS = ("advantages", "critic_returns", "critic_values")


def completions_of(lengths, width):
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return Completions(mask, mask, torch.ones(len(lengths), dtype=torch.bool), mask.sum(dim=1))


def test_policy_and_critic_by_hand(tmp_path):
    # gamma 1, row one: values 1/4, 1/2, 3/4 and reward 1, so every delta is 1/4. Lambda 1/2 sums to 7/16, 3/8, 1/4,
    # and lambda 1 gives the critic the return, 1.
    batch = batch_of(scripted_ppo(tmp_path, task_lam=0.5, critic_lam=1.0))
    torch.testing.assert_close(batch["advantages"][0], torch.tensor([0.4375, 0.375, 0.25]))
    torch.testing.assert_close(batch["critic_returns"] * MASK, torch.tensor(REWARDS).unsqueeze(1) * MASK)
    # The other way round: targets 1/4 + 7/16, 1/2 + 3/8, 3/4 + 1/4.
    batch = batch_of(scripted_ppo(tmp_path, task_lam=1.0, critic_lam=0.5))
    torch.testing.assert_close(batch["advantages"], (torch.tensor(REWARDS).unsqueeze(1) - VALUES) * MASK)
    torch.testing.assert_close(batch["critic_returns"][0], torch.tensor([0.6875, 0.875, 1.0]))


@pytest.mark.parametrize("lam", [1.0, 0.7])
def test_the_critic_has_the_policys_lambda_by_default(tmp_path, lam):
    plain, stated = (batch_of(scripted_ppo(tmp_path, task_lam=lam, **more)) for more in ({}, {"critic_lam": lam}))
    assert all(torch.equal(plain[key], stated[key]) for key in KEYS)
    assert torch.equal(plain["critic_returns"] * MASK, (plain["advantages"] + VALUES) * MASK)


def test_a_run_with_the_defaults_spelt_out_is_the_same_bit_for_bit(tmp_path):
    runs = []
    for more in ({}, {"critic_lam": 0.9, "whiten": "task", "length_coef_warmup_steps": 0}):
        trainer = ppo(tmp_path, lenvm=random_lenvm(), length_coef=0.2, task_lam=0.9, max_steps=2, **more)
        trainer.train()
        runs.append((logged(trainer, "loss"), weights(trainer.model), weights(trainer.critic)))
    (losses, policy, critic), others = runs
    assert losses == others[0] and same_weights(policy, others[1]) and same_weights(critic, others[2])


def test_lambda_by_length():
    # alpha 1/20: 1 - 20 / 100, 1 - 20 / 40; nothing at 20 tokens and below, and none without tokens.
    lam = length_adaptive_lambda(completions_of([100, 40, 20, 7, 0], 100), 0.05)
    torch.testing.assert_close(lam, torch.tensor([0.8, 0.5, 0.0, 0.0, 0.0]))


def test_tokens_that_nobody_chose_do_not_lengthen_a_completion():
    completions = completions_of([40], 40)
    actions = completions.mask & (torch.arange(40) % 2 == 0)
    lam = length_adaptive_lambda(Completions(completions.mask, actions, completions.finished, None), 0.1)
    assert lam.tolist() == [0.5]


def test_each_completion_has_the_advantage_of_its_own_lambda():
    completions = completions_of([6, 4], 6)
    rewards, values, end = torch.randn(2, 6), torch.randn(2, 6), torch.zeros(2)
    each = torch.tensor([[0.3], [0.8]]).expand(2, 6)
    both = gae(rewards, values, completions.mask, 0.9, each, end)
    for row, lam in enumerate([0.3, 0.8]):
        torch.testing.assert_close(both[row], gae(rewards, values, completions.mask, 0.9, lam, end)[row])


def test_adaptive_advantages_by_hand(tmp_path):
    # alpha 2/3: lambda 1 - 1 / 2 in rows of three tokens, 1 - 3 / 4 in rows of two. Deltas of row two are 1/4, -1/2.
    batch = batch_of(scripted_ppo(tmp_path, length_adaptive_alpha=2 / 3))
    torch.testing.assert_close(batch["advantages"][0], torch.tensor([0.4375, 0.375, 0.25]))
    torch.testing.assert_close(batch["advantages"][1], torch.tensor([0.25 - 0.5 / 4, -0.5, 0.0]))
    # The critic's own stays at task_lam, 1.
    torch.testing.assert_close(batch["critic_returns"] * MASK, torch.tensor(REWARDS).unsqueeze(1) * MASK)
    targets = batch_of(scripted_ppo(tmp_path, length_adaptive_alpha=0.05, critic_lam=0.0))["critic_returns"]
    torch.testing.assert_close(targets[0], torch.tensor([0.5, 0.75, 1.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic_lam": 1.5}, "critic_lam=1.5"),
        ({"length_adaptive_alpha": 0.1, "task_lam": 0.9}, "task_lam"),
        ({"length_adaptive_alpha": 0.0}, "length_adaptive_alpha=0.0"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        LenVMPPOConfig(**settings(tmp_path, **changes))


@pytest.mark.parametrize("changes", [{"critic_lam": 0.9}, {"length_adaptive_alpha": 0.05}])
def test_without_a_critic_there_is_no_lambda_of_its_own(tmp_path, changes):
    with pytest.raises(ValueError, match="needs a learned critic"):
        ppo(tmp_path, lenvm=random_lenvm(), critic="lenvm", **changes)
