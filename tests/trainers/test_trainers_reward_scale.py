"""What PPO makes of rewards before the critic sees them: by hand, over batches, processes and checkpoints."""

import math

import pytest
import torch
from test_trainers_ppo import MASK, REWARDS, VALUES, scripted_ppo
from trainer_parts import batch_of

from lenvm_rl.trainers import LenVMPPOConfig
from lenvm_rl.trainers.reward_scale import RewardScale

YES = torch.tensor([True, True, True, True])
CUT = torch.tensor([False, False, True, False])


def scale(**settings):
    return RewardScale(LenVMPPOConfig("out", use_cpu=True, bf16=False, **settings))


def scaled(each, rewards, scored=YES, cut=CUT, reduce=lambda sums: sums, learn=True):
    return each(torch.tensor(rewards), scored, cut, reduce, learn).tolist()


def test_without_a_setting_rewards_pass():
    assert scaled(scale(), REWARDS) == REWARDS


def test_a_cut_costs_first_and_bounds_come_last():
    """1, 0, 1 - 0.4, 1/2, of which the third has no end; then within 0.55."""
    assert scaled(scale(missing_eos_penalty=0.4), REWARDS) == pytest.approx([1.0, 0.0, 0.6, 0.5])
    both = scale(missing_eos_penalty=0.4, reward_clip=0.55)
    assert scaled(both, REWARDS) == pytest.approx([0.55, 0.0, 0.55, 0.5])
    assert scaled(both, [-3.0, 0.0, 0.0, 0.0]) == pytest.approx([-0.55, 0.0, -0.4, 0.0])


def test_the_scale_is_of_all_completions_so_far():
    """First 1, 1, 3, 3: mean 2, deviation 1. Then 6, 6, 6, 6: over all eight mean 4, deviation sqrt(20 - 16 + 1/2)."""
    each = scale(reward_normalization=True)
    assert scaled(each, [1.0, 1.0, 3.0, 3.0]) == pytest.approx([-1.0, -1.0, 1.0, 1.0], abs=1e-6)
    squares = (2 * 1 + 2 * 9 + 4 * 36) / 8
    assert scaled(each, [6.0] * 4) == pytest.approx([2 / math.sqrt(squares - 16)] * 4, abs=1e-6)
    # An evaluation is measured by it, and adds nothing; what nobody scored neither.
    before = each.state_dict()
    scaled(each, [100.0] * 4, learn=False)
    nothing = torch.zeros(4, dtype=torch.bool)
    assert scaled(each, [0.0] * 4, scored=nothing) == [0.0] * 4
    assert each.state_dict() == before
    # A resumed run goes on with it.
    again = scale(reward_normalization=True)
    again.load_state_dict(before)
    assert scaled(again, [5.0] * 4) == scaled(each, [5.0] * 4)


def test_processes_share_the_scale():
    """Two processes with 0 and 2 each: the sums of both, mean 1 and deviation 1, on either."""
    whole = torch.tensor([4.0, 4.0, 8.0])
    for rewards in ([0.0, 2.0], [2.0, 0.0]):
        each = scale(reward_normalization=True)
        found = scaled(each, rewards, YES[:2], CUT[:2], lambda sums: whole.to(sums))
        assert found == pytest.approx([reward - 1.0 for reward in rewards], abs=1e-6)


def test_the_critic_learns_from_what_comes_out(tmp_path):
    """At lambda 1, targets are the scaled rewards; who is correct is told by the rewards as they were."""
    trainer = scripted_ppo(tmp_path, missing_eos_penalty=0.75, length_coef=1.0)
    batch = batch_of(trainer)
    rewards = torch.tensor([[1.0], [0.0], [0.25], [0.5]])
    torch.testing.assert_close(batch["critic_returns"] * MASK, rewards * MASK)
    assert trainer._metrics["train"]["length/correct"] == [pytest.approx(0.5)]
    plain = scripted_ppo(tmp_path, missing_eos_penalty=0.75)
    torch.testing.assert_close(batch_of(plain)["advantages"], (rewards - VALUES) * MASK)


@pytest.mark.parametrize(
    "setting", [{"missing_eos_penalty": 1.0}, {"reward_clip": 1.0}, {"reward_normalization": True}]
)
def test_a_group_baseline_reads_rewards_as_they_are(setting, tmp_path):
    [name] = setting
    with pytest.raises(ValueError, match=f"{name}.*task_baseline"):
        scripted_ppo(tmp_path, critic="lenvm", task_baseline="group", **setting)
    scripted_ppo(tmp_path, critic="lenvm", task_baseline="batch", **setting)


@pytest.mark.parametrize("setting", [{"missing_eos_penalty": -1.0}, {"reward_clip": 0.0}])
def test_bounds_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        scale(**setting)
