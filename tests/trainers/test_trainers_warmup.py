"""The critic alone learns for a while: the policy stands still to the bit, and then starts as if nothing had been."""

import json
import shutil

import pytest
from trainer_parts import logged, ppo, random_lenvm, same_weights, settings, weights

from lenvm_rl.trainers import LenVMPPOConfig


def first_word_is_even(prompts, **kwargs):
    """Reward that stands in the prompt, so that a critic can learn it from a policy that stands still."""
    return [float(prompt.split()[1] in ("w6", "w8", "w10", "w12")) for prompt in prompts]


def test_the_policy_stands_still_to_the_bit_while_the_critic_learns(tmp_path):
    trainer = ppo(
        tmp_path, first_word_is_even, max_steps=30, critic_warmup_steps=30, per_device_train_batch_size=32,
        critic_learning_rate=1e-2, weight_decay=0.1, learning_rate=1e-2,
    )  # fmt: skip
    policy, critic = weights(trainer.model), weights(trainer.critic)
    trainer.train()
    assert same_weights(weights(trainer.model), policy) and not same_weights(weights(trainer.critic), critic)
    explained, losses = logged(trainer, "critic/explained_variance"), logged(trainer, "critic/value_loss")
    assert explained[0] == pytest.approx(0.0, abs=1e-6) and sum(explained[-5:]) / 5 > 0.6
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-4) and losses[-1] < 0.3 * losses[0]
    # The optimizer has seen no step of the policy.
    seen = {id(parameter) for parameter in trainer.optimizer.state}
    assert seen == {id(parameter) for parameter in trainer.critic.parameters()}


def test_the_policy_starts_when_the_warm_up_is_over(tmp_path):
    states = []
    trainer = ppo(tmp_path, lenvm=random_lenvm(), length_coef=0.5, critic_warmup_steps=2, max_steps=3)

    before = weights(trainer.model)
    step = trainer.training_step

    def training_step(*arguments, **options):
        states.append(same_weights(weights(trainer.model), before))
        return step(*arguments, **options)

    trainer.training_step = training_step
    trainer.train()
    assert states == [True, True, True] and not same_weights(weights(trainer.model), before)
    norms = logged(trainer, "grad_norm")
    assert norms[:2] == [0.0, 0.0] and norms[2] > 0


def test_no_warm_up_is_the_default(tmp_path):
    runs = []
    for more in ({}, {"critic_warmup_steps": 0}):
        trainer = ppo(tmp_path, max_steps=2, **more)
        trainer.train()
        runs.append(weights(trainer.model))
    assert same_weights(*runs)


def test_schedules_and_steering_wait_for_the_policy(tmp_path):
    common = {"lenvm": random_lenvm(), "critic_warmup_steps": 2, "max_steps": 5}
    linear = ppo(tmp_path, length_coef=0.8, length_coef_warmup_steps=2, **common)
    linear.train()
    assert logged(linear, "length/coef") == [0.0, 0.0, 0.0, 0.4, 0.8]
    steered = ppo(tmp_path, length_coef=0.1, accuracy_floor=0.9, length_coef_rate=0.01, **common)
    steered.train()
    coefficients = logged(steered, "length/coef")
    assert coefficients[:3] == [0.1] * 3 and coefficients[3] < 0.1 and len(logged(steered, "steering/accuracy")) == 3


def test_resuming_within_the_warm_up_goes_on_exactly(tmp_path):
    changes = {"critic_warmup_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = ppo(tmp_path / "whole", **changes)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
    part = ppo(tmp_path / "part", **changes)
    part.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "part/metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert logged(part, "loss") == logged(whole, "loss")
    assert same_weights(weights(part.model), weights(whole.model))
    assert same_weights(weights(part.critic), weights(whole.critic))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="critic_warmup_steps=-1"):
        LenVMPPOConfig(**settings(tmp_path, critic_warmup_steps=-1))
    with pytest.raises(ValueError, match="critic_warmup_steps"):
        ppo(tmp_path, lenvm=random_lenvm(), critic="lenvm", critic_warmup_steps=2)
