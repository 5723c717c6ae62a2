"""Leash's multiplier and LASER-D's targets: how they move, and that checkpoints, evaluation and new runs respect it."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launched import run_two
from places import PATHS
from trainer_parts import grpo, logged, ppo, prompts, same_weights, weights
from transformers.trainer_utils import IntervalStrategy

from lenvm_rl.trainers import LenVMGRPOTrainer
from lenvm_rl.trainers.rewards import FILE_NAME, RewardStates
from reward.length_reward import LengthReward
from reward.rules import LeashMultiplier, adaptive_targets


def flag_column(completions, right, **columns):
    """A task reward that reads its flags from a column."""
    return list(right)


def starts_low(completion_ids, **columns):
    """A task reward for the tiny policies: 1 where the first token is one of the lower half."""
    return [float(ids[0] < 8) for ids in completion_ids]


def called(reward, lengths, right, prompts=None, **columns):
    return reward(
        prompts=prompts or ["p"] * len(lengths),
        completions=[""] * len(lengths),
        completion_ids=[[7] * length for length in lengths],
        right=right,
        **columns,
    )


def leash(**changes):
    return LengthReward("leash", flag_column, **{"target_length": 100, "multiplier": 0.5, "rate": 0.1, **changes})


def laser_d(**changes):
    return LengthReward("laser_d", flag_column, **{"candidates": [100, 200, 300], "every": 2, **changes})


def at(step, folder, first=True):
    """Arguments and state as a Trainer gives them to its callbacks."""
    return SimpleNamespace(output_dir=str(folder)), SimpleNamespace(global_step=step, is_world_process_zero=first)


@pytest.mark.parametrize(
    "start, mean, bounds, moved",
    [(0.5, 150, (0, 2), 0.55), (0.5, 80, (0, 0.52), 0.48), (0.5, 500, (0, 0.52), 0.52), (0.01, 0, (0, 2), 0.0)],
)
def test_the_multiplier_by_hand(start, mean, bounds, moved):
    state = LeashMultiplier(target_length=100, multiplier=start, rate=0.1, bounds=bounds)
    state.move([mean - mean // 10, mean + mean // 10], None, None, None)
    assert state.multiplier == pytest.approx(moved)


def test_leash_pays_with_the_multiplier_as_it_was_and_then_moves_it():
    reward, values = leash(), []

    def log(name, value):
        values.append(value) if name == "flag_column_leash/multiplier" else None

    # Mean 150: 0.5 -> 0.55 -> 0.6.
    assert called(reward, [200, 100], [1, 1], log_metric=log) == [0.5, 1.0]
    assert called(reward, [200, 100], [1, 0], log_metric=log) == pytest.approx([0.45, -1.0])
    assert reward.state.multiplier == pytest.approx(0.6) and values == pytest.approx([0.5, 0.55])
    # A completion that the task reward says nothing about is sampled all the same. Mean 0: 0.6 -> 0.5.
    assert called(reward, [0], [None]) == [None]
    assert reward.state.multiplier == pytest.approx(0.5)


def test_the_multiplier_settles_where_the_mean_length_is_the_target():
    reward, length = leash(rate=0.05), 300.0
    for _ in range(400):
        called(reward, [round(length)] * 4, [1] * 4)
        # A policy that shortens as long as length is dear, and goes back to its habit where it is not.
        length += 0.1 * (300 - 100 * reward.state.multiplier - length)
    assert reward.state.multiplier == pytest.approx(2.0, abs=0.1) and length == pytest.approx(100, rel=0.05)


def test_the_targets_by_hand():
    # K = 6: at least 4, 2 and 1 correct answers; ECR(100) = 1, 1, 0.5.
    within = torch.tensor([[2, 8], [4, 8], [4, 8]])
    assert adaptive_targets(within, torch.tensor([8, 8, 8]), [100, 200], 6) == [100, 100, 200]
    # A tier that did not occur, and one that nothing is long enough for.
    assert adaptive_targets(within, torch.tensor([0, 9, 9]), [100, 200], 2) == [None, None, None]
    assert adaptive_targets(torch.tensor([[1], [1], [1]]), torch.tensor([1, 1, 1]), [50], 1) == [50, 50, 50]


def test_laser_d_counts_for_a_while_and_then_changes_its_targets():
    reward = laser_d()
    lengths = [90, 190, 290, 350, 90, 190]
    groups = ["easy"] * 3 + ["hard"] * 3
    right = [1, 1, 1, 0, 0, 0]
    # All targets are 300 at the start.
    assert called(reward, lengths, right, groups) == [1.5, 1.5, 1.5, 0, 0, 0]
    assert reward.state.targets == [300, 300, 300] and reward.state.calls == 1
    assert reward.state.counts == [[1, 2, 3, 3, 1], [0, 0, 0, 0, 0], [1, 2, 2, 3, 1]]
    called(reward, lengths, right, groups)
    # K = 3, n = 2, 1, 1. Easy: 2/6 * 2 < 1 at 100, 4/6 * 2 >= 1 at 200. Hard: no candidate holds all.
    assert (
        reward.state.targets == [200, 300, 300] and reward.state.calls == 0 and not any(map(any, reward.state.counts))
    )
    assert called(reward, lengths, right, groups) == [1.5, 1.5, 1, 0, 0, 0]
    reward.reset()
    assert reward.state.targets == [300, 300, 300] and reward.state.calls == 0


@pytest.mark.parametrize("make", [leash, laser_d])
def test_a_state_goes_through_json_and_takes_the_penalty_on(make):
    first, second = make(), make()
    call = ([90, 190, 290, 350], [1, 1, 1, 0])
    for _ in range(3):
        called(first, *call)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(3):
        assert called(first, *call) == called(second, *call)
    assert first.state_dict() == second.state_dict() != make().state_dict()
    first.reset()
    assert first.state_dict() == make().state_dict()


def test_a_state_of_another_penalty_or_setting_is_refused():
    with pytest.raises(ValueError, match="calls, candidates, counts, targets"):
        laser_d().load_state_dict(leash().state_dict())
    with pytest.raises(ValueError, match="target_length=100.*50"):
        leash(target_length=50).load_state_dict(leash().state_dict())
    with pytest.raises(ValueError, match="candidates"):
        laser_d(candidates=[100]).load_state_dict(laser_d().state_dict())


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (leash, {"multiplier": 3.0}, "multiplier"),
        (leash, {"bounds": (-1.0, 2.0)}, "multiplier"),
        (leash, {"rate": -1.0}, "rate"),
        (leash, {"target_length": 0}, "target_length"),
        (laser_d, {"candidates": []}, "candidates"),
        (laser_d, {"candidates": [5, 5]}, "candidates"),
        (laser_d, {"candidates": [0, 5]}, "candidates"),
        (laser_d, {"every": 0}, "every"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_checkpoints_hold_the_states_and_a_resumed_run_takes_them_up(tmp_path):
    one, other = leash(), laser_d()
    callback = RewardStates([one, LengthReward("gr3", flag_column), other, flag_column])
    callback.on_train_begin(*at(0, tmp_path), None)
    called(one, [200], [1])
    called(other, [200], [1])
    saved = [one.state_dict(), other.state_dict()]
    (tmp_path / "checkpoint-3").mkdir()
    callback.on_save(*at(3, tmp_path, first=False), None)
    assert list((tmp_path / "checkpoint-3").iterdir()) == []
    callback.on_save(*at(3, tmp_path), None)
    assert [path.name for path in (tmp_path / "checkpoint-3").iterdir()] == [FILE_NAME]
    # The run goes on for a while, dies, and is taken up by new objects.
    called(one, [300], [1])
    again = leash(), laser_d()
    RewardStates(again).on_train_begin(*at(3, tmp_path), None)
    assert [reward.state_dict() for reward in again] == saved
    # From another run's checkpoint.
    elsewhere = leash(), laser_d()
    RewardStates(elsewhere, checkpoint=tmp_path / "checkpoint-3").on_train_begin(*at(3, tmp_path / "new"), None)
    assert [reward.state_dict() for reward in elsewhere] == saved


def test_a_new_run_begins_anew_and_evaluation_moves_nothing(tmp_path):
    reward = leash()
    called(reward, [300], [1])
    callback = RewardStates([reward])
    callback.on_train_begin(*at(0, tmp_path), None)
    assert reward.state.multiplier == 0.5
    called(reward, [200], [1])
    callback.on_step_end(*at(1, tmp_path), None)
    called(reward, [900], [1])
    callback.on_evaluate(*at(1, tmp_path), None)
    assert reward.state.multiplier == pytest.approx(0.6)


def test_states_that_are_not_there_are_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="flag_column_leash"):
        RewardStates([leash()]).on_train_begin(*at(3, tmp_path), None)
    RewardStates([flag_column]).on_train_begin(*at(3, tmp_path), None)
    (tmp_path / "checkpoint-3").mkdir()
    RewardStates([laser_d()]).on_save(*at(3, tmp_path), None)
    with pytest.raises(ValueError, match="flag_column_leash"):
        RewardStates([leash()]).on_train_begin(*at(3, tmp_path), None)


class Counting:
    """A reward function of somebody's own with a state, which it hands out as it is; its name is that of its class."""

    def __init__(self, start=0):
        self.start, self.state = start, {"seen": [start]}

    def __call__(self, completion_ids, **columns):
        self.state["seen"].append(len(completion_ids))
        return [float(len(self.state["seen"]))] * len(completion_ids)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def reset(self):
        self.state = {"seen": [self.start]}


class Unkept(Counting):
    """The same with a state that JSON cannot hold."""

    def state_dict(self):
        return {"seen": torch.tensor(self.state["seen"])}


def kept_by(trainer):
    """The callbacks of a trainer that keep states, and what they keep."""
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, RewardStates)]
    return found, [reward for callback in found for reward in callback.rewards.values()]


def test_the_trainers_keep_states_by_themselves(tmp_path):
    one, other, own = leash(), laser_d(), Counting()
    functions = [one, LengthReward("gr3", flag_column), other, functools.partial(own, unused=1), starts_low]
    for make in (grpo, ppo):
        (callback,), rewards = kept_by(make(tmp_path, functions))
        assert rewards == [one, other, own]
        assert list(callback.rewards) == ["flag_column_leash", "flag_column_laser_d", "Counting"]


def test_a_callback_that_was_given_is_the_one_and_keeps_the_rest_too(tmp_path):
    one, other = leash(), laser_d()
    given = RewardStates([other], checkpoint="elsewhere")

    class Given(LenVMGRPOTrainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, callbacks=[given], **options)

    found, rewards = kept_by(grpo(tmp_path, [one, other], trainer=Given))
    assert found == [given] and rewards == [other, one] and given.checkpoint == "elsewhere"


def test_equal_names_are_told_apart_by_their_order(tmp_path):
    first, second, third = leash(), leash(target_length=50), Counting()
    callback = RewardStates([first, second, first, third, Counting(7)])
    assert list(callback.rewards) == ["flag_column_leash", "flag_column_leash_2", "Counting", "Counting_2"]
    called(second, [300], [1])
    (tmp_path / "checkpoint-3").mkdir()
    callback.on_save(*at(3, tmp_path), None)
    again = leash(), leash(target_length=50), Counting(), Counting()
    RewardStates(again).on_train_begin(*at(3, tmp_path), None)
    assert [one.state_dict() for one in again] == [
        one.state_dict() for one in (first, second, third, Counting(7))
    ]  # fmt: skip
    # The settings do not fit when the order is another one.
    with pytest.raises(ValueError, match="target_length"):
        RewardStates([second, first]).on_train_begin(*at(3, tmp_path), None)


def test_a_state_that_json_cannot_hold_is_named(tmp_path, caplog):
    with pytest.raises(ValueError, match="'Unkept'.*state_dict"):
        RewardStates([leash(), Unkept()])
    # TRL would run it, so the trainers do.
    _, rewards = kept_by(grpo(tmp_path, [Unkept(), starts_low]))
    assert rewards == [] and any("'Unkept'" in message for message in caplog.messages)


def test_the_weights_of_a_model_are_no_state():
    class Resettable(torch.nn.Linear):
        def reset(self):
            self.reset_parameters()

    assert RewardStates([Resettable(1, 1)]).rewards == {}


def test_evaluations_and_predictions_move_nothing_though_the_state_is_handed_out_as_it_is(tmp_path):
    reward = Counting()
    callback = RewardStates([reward])
    callback.on_train_begin(*at(0, tmp_path), None)
    reward(completion_ids=[[1]])
    callback.on_step_end(*at(1, tmp_path), None)
    for undo in (callback.on_evaluate, callback.on_predict, callback.on_evaluate):
        reward(completion_ids=[[1]] * 5)
        undo(*at(1, tmp_path), None)
        assert reward.state == {"seen": [0, 1]}


def test_numbers_of_any_kind_are_kept():
    for kind in (np.int64, np.float32, torch.tensor, float):
        reward = leash(target_length=kind(100), rate=kind(1), multiplier=kind(1))
        called(reward, [200], [1])
        assert json.dumps(RewardStates([reward])._states()["flag_column_leash"]) == json.dumps(
            {"multiplier": 2.0, "target_length": 100}
        )
    assert leash(target_length=1.5).state_dict()["target_length"] == 1.5
    json.dumps(laser_d(candidates=np.arange(10, 40, 10)).state_dict())


def test_a_run_goes_on_from_a_checkpoint_that_lies_elsewhere(tmp_path):
    def rewards():
        return [LengthReward("laser_d", starts_low, candidates=[1, 2, 4, 6], every=2), Counting()]

    changes = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    first = rewards()
    grpo(tmp_path / "first", first, **changes).train()
    for step in (1, 3):
        second = rewards()
        trainer = grpo(tmp_path / f"second{step}", second, **changes)
        trainer.train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{step}"))
        assert [one.state_dict() for one in second] == [one.state_dict() for one in first]
    # What was resumed is not taken for a new run's checkpoint.
    trainer.train()
    assert second[1].state["seen"] == [0, 8, 8, 8]
    # A checkpoint of TRL's own trainer has no states.
    (tmp_path / "first" / "checkpoint-3" / FILE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=FILE_NAME):
        trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))


def test_a_training_run_that_was_broken_off_is_the_unbroken_one(tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}

    def trained(folder, **arguments):
        rewards = [
            LengthReward("leash", starts_low, target_length=2, multiplier=0.5, rate=0.5),
            LengthReward("laser_d", starts_low, candidates=[1, 2, 4, 6], every=3),
        ]
        trainer = grpo(folder, rewards, **changes)
        # Evaluation after every step, from the moment that there is something to evaluate on.
        trainer.eval_dataset, trainer.args.eval_strategy = prompts(4), IntervalStrategy.STEPS
        trainer.state.eval_steps = trainer.args.eval_steps = 1
        trainer.train(**arguments)
        return trainer, [reward.state_dict() for reward in rewards]

    whole, states = trained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    part, again = trained(tmp_path / "part", resume_from_checkpoint=True)
    # Four steps are four calls, and targets change after three. Evaluations call, too, and are undone.
    assert len(logged(whole, "eval_reward")) == 4
    assert again == states and states[0]["multiplier"] != 0.5 and states[1]["calls"] == 1
    moved = [value for value in logged(whole, "starts_low_leash/multiplier") if value is not None]
    assert len(set(moved)) > 2
    assert same_weights(weights(part.model), weights(whole.model))


TWO_PROCESSES = """
import sys

sys.path[:0] = {paths!r}
from accelerate import PartialState
from test_length_reward_states import called, laser_d, leash

rank = PartialState(cpu=True).process_index
reward = leash()
# 100 and 200 tokens: the mean over both processes, 150, moves the multiplier on both.
called(reward, [100 + 100 * rank], [1])
assert abs(reward.state.multiplier - 0.55) < 1e-9, reward.state.multiplier
targets = laser_d(every=1)
# Of two groups of two, half stay within 100 and all within 200. Alone, the second process would take 100.
called(targets, [90] * 3 if rank else [190] * 3, [1, 1, None], [str(rank)] * 3)
assert targets.state.targets == [200, 300, 300], targets.state.targets
# A process whose completions the task reward says nothing about takes part all the same.
called(targets, [250], [1 if rank else None], [str(rank)])
assert targets.state.targets == [300, 300, 300], targets.state.targets
# One group of four over both, not two of two: K = 4, at least 2 correct, and half stay within 100: 2/4 * 2 = 1.
targets.reset()
called(targets, [90] * 2 if rank else [190] * 2, [1, 1])
assert targets.state.targets == [100, 300, 300], targets.state.targets
"""


@pytest.mark.slow
def test_two_processes_have_one_state(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES.format(paths=PATHS))
    run_two(script)
