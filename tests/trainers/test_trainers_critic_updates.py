"""How a critic learns beside the policy: updates of its own, schedule, weight decay, gradient bound, frozen parts."""

import json
import shutil

import pytest
import torch
from trainer_parts import first_is_w8, logged, ppo, prompts, random_lenvm, same_weights, settings, weights

from lenvm_rl.trainers import LenVMPPOConfig
from reward.length_reward import LengthReward


def trained(folder, **changes):
    trainer = ppo(folder, **{"critic_learning_rate": 1e-2, **changes})
    trainer.train()
    return trainer


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_of_a_step_are_passes_of_a_policy_that_stands_still(tmp_path, optim, accumulation):
    """Three updates in one step are one in each of three steps on the same batch."""
    common = {"learning_rate": 0.0, "gradient_accumulation_steps": accumulation, "optim": optim, "max_grad_norm": 0.01}
    step = trained(tmp_path, critic_updates_per_step=3, max_steps=1, **common)
    steps = trained(tmp_path, num_iterations=3, max_steps=3, **common)
    for name, weight in weights(step.critic).items():
        torch.testing.assert_close(weight, weights(steps.critic)[name], atol=1e-6, rtol=1e-5)
    once = trained(tmp_path, max_steps=1, **common)
    assert not same_weights(weights(once.critic), weights(step.critic))
    # Their metrics are the means over the three, each over the tokens of all its micro-batches.
    for name in ("critic/value_loss", "critic/grad_norm"):
        assert logged(step, name)[0] == pytest.approx(sum(logged(steps, name)) / 3, rel=1e-4)


def test_what_is_steered_stands_still_with_the_policy(tmp_path):
    """The critic alone learns in two steps, which say nothing of what a coefficient or a penalty does to the policy."""
    leash = LengthReward("leash", first_is_w8, target_length=2, multiplier=0.0, rate=0.2)
    trainer = trained(
        tmp_path, rewards=leash, lenvm=random_lenvm(), length_gate="all", length_coef=0.1, critic_warmup_steps=2,
        max_steps=4, use_adaptive_entropy=True, entropy_target=50.0, entropy_coef_delta=0.01,
    )  # fmt: skip
    assert logged(trainer, "entropy_coef") == pytest.approx([0.0, 0.0, 0.01, 0.02])
    [name] = {name for entry in trainer.state.log_history for name in entry if name.endswith("/multiplier")}
    # The multiplier that a batch was paid with: the third batch is the first that moves it.
    paid = logged(trainer, name)
    assert paid[:3] == [0.0] * 3 and leash.state.multiplier > paid[3] > 0.0


def test_each_update_counts_as_much_where_a_log_spans_steps(tmp_path):
    """Two updates in each of three steps on one batch, logged together, and logged step by step."""
    common = {"learning_rate": 0.0, "critic_updates_per_step": 2, "num_iterations": 3, "max_steps": 3}
    each, together = (trained(tmp_path, logging_steps=steps, **common) for steps in (1, 3))
    for name in ("critic/value_loss", "critic/grad_norm"):
        assert logged(together, name) == pytest.approx([sum(logged(each, name)) / 3], rel=1e-5)


def test_the_policy_takes_no_part_in_them(tmp_path):
    changes = {"weight_decay": 0.1, "max_steps": 1, "lenvm": random_lenvm(), "length_coef": 0.5}
    one, three = (trained(tmp_path, critic_updates_per_step=count, **changes) for count in (1, 3))
    assert same_weights(weights(one.model), weights(three.model))
    assert not same_weights(weights(one.critic), weights(three.critic))
    assert logged(one, "grad_norm") == logged(three, "grad_norm")
    own = list(three.model.parameters())
    assert all(float(three.optimizer.state[weight]["step"]) == 1 for weight in own)
    assert all(float(three.optimizer.state[weight]["step"]) == 3 for weight in three.critic.parameters())


def test_in_steps_of_the_critic_alone_as_well(tmp_path):
    trainer = trained(tmp_path, critic_updates_per_step=2, critic_warmup_steps=2, max_steps=2)
    assert {id(weight) for weight in trainer.optimizer.state} == {id(weight) for weight in trainer.critic.parameters()}
    assert all(float(state["step"]) == 4 for state in trainer.optimizer.state.values())


def test_schedules(tmp_path):
    """Of four steps: linear is 1, 3/4, 1/2, 1/4 of the peak, and with two of warm-up 0, 1/2, 1, 1/2."""
    linear = trained(tmp_path, critic_lr_scheduler_type="linear", max_steps=4)
    assert logged(linear, "critic/learning_rate") == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert logged(linear, "learning_rate") == pytest.approx([1e-2] * 4)
    constant = trained(tmp_path, lr_scheduler_type="linear", critic_lr_scheduler_type="constant", max_steps=4)
    assert logged(constant, "critic/learning_rate") == pytest.approx([1e-2] * 4)
    assert logged(constant, "learning_rate") == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    rises = {"warmup_steps": 2, "lr_scheduler_type": "constant", "critic_learning_rate": 0.4, "max_steps": 4}
    own = trained(tmp_path, critic_lr_scheduler_type="linear", **rises)
    assert logged(own, "critic/learning_rate") == pytest.approx([0.0, 0.2, 0.4, 0.2])
    policy = trained(tmp_path, lr_scheduler_type="linear", critic_learning_rate=0.4, max_steps=4)
    assert logged(policy, "critic/learning_rate") == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_a_line_has_the_last_learning_rate(tmp_path):
    trainer = trained(tmp_path, critic_lr_scheduler_type="linear", max_steps=4, logging_steps=2)
    assert logged(trainer, "critic/learning_rate") == pytest.approx([7.5e-3, 2.5e-3])


def test_weight_decay(tmp_path):
    for own, expected in ((None, 0.2), (0.3, 0.3), (0.0, 0.0)):
        trainer = trained(tmp_path, weight_decay=0.2, critic_weight_decay=own, max_steps=1)
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.2, 0.0, expected, 0.0]


@pytest.mark.parametrize(("bound", "own"), [(0.0, 1e-3), (1.0, 1e-3), (1e-3, None)])
def test_the_bound_of_the_gradient(tmp_path, bound, own):
    """A step of gradient descent is the clipped gradient, and two of them in a row move by twice as much at most."""
    for updates in (1, 2):
        trainer = ppo(
            tmp_path, max_steps=1, optim="sgd", critic_learning_rate=1.0, max_grad_norm=bound, critic_max_grad_norm=own,
            critic_updates_per_step=updates,
        )  # fmt: skip
        before = torch.cat([weight.detach().flatten().clone() for weight in trainer.critic.parameters()])
        trainer.train()
        moved = torch.cat([weight.detach().flatten() for weight in trainer.critic.parameters()]) - before
        assert float(moved.norm()) == pytest.approx(updates * 1e-3, rel=1e-2)
        assert logged(trainer, "critic/grad_norm")[0] > 1e-3


def test_without_a_bound_the_norm_is_logged_all_the_same(tmp_path):
    free, bounded = (trained(tmp_path, max_steps=1, optim="sgd", critic_max_grad_norm=bound) for bound in (0.0, 1e9))
    assert logged(free, "critic/grad_norm") == logged(bounded, "critic/grad_norm")
    assert same_weights(weights(free.critic), weights(bounded.critic))


def test_frozen_modules_stay_and_the_others_learn(tmp_path):
    trainer = ppo(tmp_path, critic_frozen=["self_attn", "embed_tokens"], critic_learning_rate=1e-2, weight_decay=0.1)
    before = weights(trainer.critic)
    trainer.train()
    moved = {name for name, weight in weights(trainer.critic).items() if not torch.equal(weight, before[name])}
    assert moved and moved == {name for name in before if "self_attn" not in name and "embed_tokens" not in name}
    with pytest.raises(ValueError, match="critic_frozen: 'attention'.*self_attn"):
        ppo(tmp_path, critic_frozen=["attention"])
    with pytest.raises(ValueError, match="critic_frozen"):
        ppo(tmp_path, critic_frozen=["backbone", "head"])


def test_resuming_goes_on_exactly(tmp_path):
    changes = {
        "critic_lr_scheduler_type": "linear", "critic_updates_per_step": 2, "critic_frozen": ["self_attn"],
        "critic_weight_decay": 0.1, "critic_warmup_steps": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "critic_max_grad_norm": 0.1,
    }  # fmt: skip
    whole = trained(tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    part = ppo(tmp_path / "part", critic_learning_rate=1e-2, **changes)
    part.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "part/metrics.jsonl").read_text().splitlines()[0])["step"] == 2
    for name in ("loss", "critic/learning_rate", "critic/value_loss", "critic/grad_norm"):
        assert logged(part, name) == logged(whole, name)
    assert same_weights(weights(part.model), weights(whole.model))
    assert same_weights(weights(part.critic), weights(whole.critic))
    with pytest.raises(ValueError, match="frozen"):
        ppo(tmp_path / "part", **{**changes, "critic_frozen": None}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"critic_updates_per_step": 0},
        {"critic_weight_decay": -0.1},
        {"critic_max_grad_norm": -1.0},
        {"critic_lr_scheduler_type": "nonsense"},
        {"critic_updates_per_step": 2, "critic_learning_rate": 0.0},
        {"critic_frozen": ["self_attn"], "critic_learning_rate": 0.0},
        {"vf_coef": 0.1, "critic_learning_rate": 0.0},
        {"cliprange_value": None, "critic_learning_rate": 0.0},
    ],
)
def test_settings_that_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        LenVMPPOConfig(**settings(tmp_path, **changes))


def test_runs_that_are_refused(tmp_path):
    unread = {
        "critic_updates_per_step": 2,
        "critic_max_grad_norm": 1.0,
        "critic_frozen": ["mlp"],
        "vf_coef": 0.1,
        "cliprange_value": None,
        "critic_init": "lenvm",
    }
    for changes in ({name: value} for name, value in unread.items()):
        with pytest.raises(ValueError, match=next(iter(changes))):
            ppo(tmp_path, lenvm=random_lenvm(), critic="lenvm", length_coef=0.5, length_gate="all", **changes)
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 9}
    trainer = ppo(tmp_path, critic_lr_scheduler_type="linear", eval_data=prompts(4), **plateau)
    with pytest.raises(ValueError, match="critic_lr_scheduler_type"):
        trainer.train()
