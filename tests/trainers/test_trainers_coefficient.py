"""`length_coef` that moves: warmed up, steered toward a mean length, steered along a floor of accuracy."""

import json
import math
import re
import shutil

import pytest
import torch
from places import ROOT
from test_trainers_grpo import LENGTH, MASK, REWARDS, TASK, scripted_grpo
from tiny import tiny_llama
from trainer_parts import (  # fmt: skip
    VOCAB,
    batch_of,
    first_is_w8,
    grpo,
    logged,
    no_reward,
    ppo,
    prompts,
    random_lenvm,
    same_weights,
    scripted_lenvm,
    settings,
    weights,
)
from trl import GRPOTrainer

from eval.steering import judge
from lenvm_rl.trainers import LenVMGRPOConfig, coefficient

STATE = "lenvm_state_rank0.json"
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
# The scripted completions are 2, 1, 3 and 1 tokens long, and two of four are correct.
MEAN_LENGTH, ACCURACY = 1.75, 0.5
# Half as long again as wanted, the end of sequence counted, or three quarters as long: the target, and the error.
TOO_LONG, ERROR = 2.75 / 1.5 - 1, math.log(1.5)
TOO_SHORT, SHORTAGE = 2.75 / 0.75 - 1, -math.log(0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length_target": 5.0, "accuracy_floor": 0.5}, "both steer length_coef"),
        ({"length_target": 5.0, "length_coef": 0.1, "length_coef_warmup_steps": 3}, "length_coef_warmup_steps"),
        ({"accuracy_floor": 0.5, "length_coef": 0.1, "length_coef_warmup_steps": 3}, "length_coef_warmup_steps"),
        ({"length_coef_warmup_steps": 3}, "set length_coef"),
        ({"length_coef": 0.1, "length_coef_warmup_steps": -1}, "length_coef_warmup_steps=-1"),
        ({"length_target": -1.0}, "length_target=-1.0"),
        ({"length_target": 6.5, "max_completion_length": 6}, "length_target=6.5 .* max_completion_length"),
        ({"length_target": 5.0, "length_coef_rate": 0.0}, "length_coef_rate=0.0"),
        ({"length_target": 5.0, "length_coef": 2.0}, r"length_coef=2.0, where .* is not in .* = \[-1.0, 1.0\]"),
        ({"accuracy_floor": 0.5, "length_coef": -0.1}, r"length_coef=-0.1, where .* is not in .* = \[0.0, 1.0\]"),
        ({"length_target": 5.0, "length_coef_min": math.nan}, "length_coef_min=nan"),
        ({"length_target": 5.0, "length_coef_proportional": -1.0}, "length_coef_proportional=-1.0"),
        ({"accuracy_floor": 1.5}, "accuracy_floor=1.5"),
        # It can never be exceeded.
        ({"accuracy_floor": 1.0}, "accuracy_floor=1.0"),
        ({"accuracy_floor": 0.5, "length_coef_min": -1.0}, "would pay for length"),
        (
            {"length_coef": 0.1, "length_coef_max": 2.0},
            "length_coef_max=2.0 is read with length_target or accuracy_floor",
        ),
        ({"length_coef": 0.1, "length_coef_rate": 0.1}, "length_coef_rate=0.1"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        LenVMGRPOConfig(**settings(tmp_path, **changes))


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length_value_model"):
        grpo(tmp_path, length_target=5.0)
    with pytest.raises(ValueError, match="rollout_guidance"):
        grpo(tmp_path, lenvm=random_lenvm(), length_target=5.0, rollout_guidance={"strength": 1.0})


def test_a_steered_coefficient_knows_what_losses_need(tmp_path):
    """It starts at 0, yet advantages differ from token to token later on."""
    with pytest.raises(ValueError, match="set loss_type='dr_grpo'"):
        grpo(tmp_path, lenvm=random_lenvm(), length_target=5.0, loss_type="luspo")


def test_linear_warm_up(tmp_path):
    trainer = grpo(
        tmp_path, lenvm=random_lenvm(), length_coef=0.8, length_coef_warmup_steps=2,
        max_steps=4,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "length/coef") == [0.0, 0.4, 0.8, 0.8]


def test_a_constant_coefficient_is_logged_too(tmp_path):
    trainer = grpo(tmp_path, lenvm=random_lenvm(), length_coef=0.3, max_steps=2)
    trainer.train()
    assert logged(trainer, "length/coef") == [0.3, 0.3]


def test_steering_toward_a_mean_length_by_hand(tmp_path):
    """s grows by 0.5 * 0.405 = 0.203 per batch, up to 0.45, and weighs the batch after."""
    trainer = scripted_grpo(
        tmp_path, length_target=TOO_LONG, length_coef=0.1, length_coef_rate=0.5, length_coef_max=0.45,
        length_gate="all", length_coef_proportional=0.0,
    )  # fmt: skip
    expected = (0.1, 0.1 + 0.5 * ERROR, 0.45, 0.45)
    for weight in expected:
        torch.testing.assert_close(batch_of(trainer)["advantages"], (TASK + weight * LENGTH) * MASK)
    assert trainer._metrics["train"]["length/coef"] == pytest.approx(expected)
    assert trainer._metrics["train"]["length/mean"] == [MEAN_LENGTH] * 4


def test_the_proportional_part_lasts_as_long_as_the_error(tmp_path):
    trainer = scripted_grpo(
        tmp_path, length_target=TOO_LONG, length_coef=0.1, length_coef_rate=0.5, length_coef_proportional=0.25
    )
    for _ in range(3):
        batch_of(trainer)
    assert trainer._metrics["train"]["length/coef"] == pytest.approx([0.1, 0.1 + 0.75 * ERROR, 0.1 + 1.25 * ERROR])


def test_a_target_lengthens_and_a_budget_does_not(tmp_path):
    changes = {
        "length_target": TOO_SHORT, "length_coef": 0.1, "length_coef_rate": 0.5, "length_coef_proportional": 0.0,
        "length_coef_max": 0.2,
    }  # fmt: skip
    target = scripted_grpo(tmp_path, **changes)
    budget = scripted_grpo(tmp_path, length_coef_min=0.0, **changes)
    for trainer, expected in ((budget, [0.1, 0.0, 0.0]), (target, [0.1, 0.1 - 0.5 * SHORTAGE, 0.1 - SHORTAGE, -0.2])):
        for _ in expected:
            batch_of(trainer)
        assert trainer._metrics["train"]["length/coef"] == pytest.approx(expected)


def test_a_target_does_not_wind_up_behind_a_closed_gate(tmp_path):
    """Nobody is paid, so no length answers the coefficient: wound up, it would fall on the first correct answers."""
    rewards = [0.0] * 4
    trainer = scripted_grpo(
        tmp_path, rewards=rewards, length_target=TOO_LONG, length_coef_rate=0.5, length_coef_proportional=0.25,
        length_coef_max=9.0,
    )  # fmt: skip
    trainer.reward_funcs = [lambda completions, **kwargs: list(rewards)]
    for _ in range(9):
        batch_of(trainer)
    coefficients = trainer._metrics["train"]["length/coef"]
    assert coefficients == pytest.approx([0.0] + [0.25 * ERROR] * 8)
    rewards[:] = REWARDS
    for _ in range(2):
        batch_of(trainer)
    assert coefficients[9:] == pytest.approx([0.25 * ERROR, 0.75 * ERROR])


def test_steering_along_a_floor_of_accuracy_by_hand(tmp_path, monkeypatch):
    """Half-life 1; accuracies 1, .5, .5 average to 1, 2/3, 4/7, against .65 at rate 1."""
    monkeypatch.setattr(coefficient, "HALF_LIFE", 1.0)
    rewards = [1.0] * 4
    trainer = scripted_grpo(
        tmp_path, rewards=rewards, accuracy_floor=0.65,
        length_coef_rate=1.0, length_coef_proportional=0.0,
    )  # fmt: skip

    def reward(completions, **kwargs):
        return list(rewards)

    trainer.reward_funcs = [reward]
    batch_of(trainer)
    rewards[:] = REWARDS
    for _ in range(3):
        batch_of(trainer)
    metrics = trainer._metrics["train"]
    assert metrics["length/correct"] == [1.0, ACCURACY, ACCURACY, ACCURACY]
    assert metrics["steering/accuracy"] == pytest.approx([1.0, 2 / 3, 4 / 7, 8 / 15])
    grown = 0.35 + (2 / 3 - 0.65)
    assert metrics["length/coef"] == pytest.approx([0.0, 0.35, grown, grown + 4 / 7 - 0.65])


def test_evaluation_reads_the_coefficient_and_moves_nothing(tmp_path):
    trainer = scripted_grpo(
        tmp_path, length_target=TOO_LONG, length_coef=0.1, length_coef_rate=0.5, length_coef_proportional=0.0
    )
    trainer.num_generations_eval = 4
    for _ in range(2):
        batch_of(trainer, "eval")
    assert trainer._metrics["eval"]["length/coef"] == [0.1, 0.1]
    batch_of(trainer)
    batch_of(trainer, "eval")
    assert trainer._metrics["eval"]["length/coef"][-1] == pytest.approx(0.1 + 0.5 * ERROR)


def test_an_evaluation_stays_one_where_sampling_leaves_the_model_in_training_mode(tmp_path, monkeypatch):
    """As TRL's continuous batching of transformers does."""
    sample = GRPOTrainer._generate_single_turn

    def left_in_training_mode(self, *args, **kwargs):
        sampled = sample(self, *args, **kwargs)
        self.model.train()
        return sampled

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", left_in_training_mode)
    trainer = grpo(tmp_path, first_is_w8, random_lenvm(), length_target=2.0, length_gate="all", length_coef=0.1)
    batch_of(trainer, "eval")
    assert not trainer.model.training and trainer._coefficient.at(0) == 0.1 and trainer._frozen.drift.batches == 0
    batch_of(trainer)
    assert trainer.model.training and trainer._coefficient.at(0) != 0.1 and trainer._frozen.drift.batches == 1


@pytest.mark.parametrize("make", [grpo, ppo])
@pytest.mark.parametrize("steering", [{"length_target": 3.0}, {"accuracy_floor": 0.05}])
def test_resuming_goes_on_with_the_coefficient_exactly(tmp_path, make, steering):
    changes = {
        "lenvm": random_lenvm(), "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "length_coef_rate": 0.3,
        "length_coef": 0.2, **steering,
    }  # fmt: skip
    whole = make(tmp_path / "whole", **changes)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    part = make(tmp_path / "part", **changes)
    part.train(resume_from_checkpoint=True)
    coefficients = logged(whole, "length/coef")
    assert logged(part, "length/coef") == coefficients and len(set(coefficients)) >= 3
    assert logged(part, "steering/accuracy") == logged(whole, "steering/accuracy")
    assert same_weights(weights(part.model), weights(whole.model))
    states = [json.loads((tmp_path / run / "checkpoint-4" / STATE).read_text()) for run in ("whole", "part")]
    assert states[0] == states[1] and states[0]["length_coef"]["updates"] == 4


def test_a_checkpoint_of_another_steering_is_refused(tmp_path):
    changes = {"lenvm": random_lenvm(), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    grpo(tmp_path / "plain", length_coef=0.1, **changes).train()
    assert json.loads((tmp_path / "plain/checkpoint-1" / STATE).read_text())["length_coef"] is None
    grpo(tmp_path / "target", length_target=3.0, **changes).train()
    floor = grpo(tmp_path, accuracy_floor=0.5, **changes)
    with pytest.raises(ValueError, match="length_coef was steered by None there"):
        floor.train(resume_from_checkpoint=str(tmp_path / "plain/checkpoint-1"))
    with pytest.raises(ValueError, match="length_coef was steered by target there"):
        floor.train(resume_from_checkpoint=str(tmp_path / "target/checkpoint-1"))


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    """What it added up was another error."""
    changes = {"lenvm": random_lenvm(), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    grpo(tmp_path, length_target=3.0, **changes).train()
    path = tmp_path / "checkpoint-1" / STATE
    state = {"steering": "target", "setting": 0.1, "integral": 0.1, "updates": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"length_coef": state}))
    with pytest.raises(ValueError, match="length_coef.*level, trend"):
        grpo(tmp_path, length_target=3.0, **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_policy_is_brought_to_a_mean_length_and_held_there(tmp_path, seed):
    """With no reward that pulls at the length, and no setting but the target: from ten tokens to five. (`eval.steering`
    has more targets, learning rates and steps.)"""
    trainer = ppo(
        tmp_path, no_reward, scripted_lenvm({}, gamma=0.9, default=-0.6), length_target=5.0, length_gate="all",
        policy=tiny_llama(VOCAB, seed=seed, initializer_range=0.05), seed=seed,
        max_completion_length=20, max_steps=80, per_device_train_batch_size=32, loss_type="dr_grpo",
        learning_rate=3e-3,
    )  # fmt: skip
    trainer.train()
    found = judge(logged(trainer, "length/mean"), 5.0)
    assert found["met"] and 8.0 < logged(trainer, "length/mean")[0] < 13.0
    # Up where completions are too long, down where they are too short, in the same batches.
    coefficients = logged(trainer, "length/coef")
    assert max(coefficients[:5]) == 1.0 and min(coefficients[found["approach"] :][:10]) < 0.0


@pytest.mark.slow
def test_a_floor_brings_accuracy_back_that_the_same_bound_alone_would_spend(tmp_path, monkeypatch):
    """Correct are completions of five tokens and more: what shortens them in the end makes them wrong."""
    monkeypatch.setattr(coefficient, "HALF_LIFE", 2.0)

    def long_enough(completion_ids, **kwargs):
        return [float(len(ids) >= 5) for ids in completion_ids]

    def train(**changes):
        trainer = ppo(
            tmp_path, long_enough, scripted_lenvm({}, gamma=0.9, default=-0.6), length_gate="all", whiten="none",
            policy=tiny_llama(VOCAB, seed=1, initializer_range=0.05), max_completion_length=20, max_steps=60,
            per_device_train_batch_size=32, loss_type="dr_grpo", learning_rate=3e-3, critic_learning_rate=1e-2,
            **changes,
        )  # fmt: skip
        trainer.train()
        return (logged(trainer, f"length/{name}") for name in ("correct", "coef"))

    steered, coefficients = train(
        accuracy_floor=0.7, length_coef_rate=1.0, length_coef_proportional=5.0,
        length_coef_max=20.0,
    )  # fmt: skip
    spent, _ = train(length_coef=20.0)
    # It swings about the floor: the average lags, and the policy answers late.
    assert max(coefficients) > 1.0 and min(coefficients[10:]) == 0.0
    assert sum(steered[-40:]) / 40 > 0.6 and sum(spent[-20:]) / 20 < 0.1


def table(section):
    """Names in the table of a section of the page."""
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^\| `([^`]+)` \|", body, re.MULTILINE))


def test_the_page_lists_what_steering_logs(tmp_path):
    lines = []
    for steering in ({"length_coef": 0.1}, {"accuracy_floor": 0.5}):
        trainer = grpo(tmp_path, lenvm=random_lenvm(), max_steps=1, **steering)
        trainer.train()
        trainer.evaluate(prompts(4))
        lines.append([set(entry) for entry in trainer.state.log_history])
    (plain, *_, plain_eval), (steered, *_, steered_eval) = lines
    assert steered - plain == table("Steering") and plain <= steered and plain_eval == steered_eval
