"""Which reward function says what is correct, what it says, and what is done with completions that it did not judge."""

import functools
import logging
import math

import pytest
import torch
from test_trainers_coefficient import ACCURACY
from test_trainers_grpo import COMPLETIONS, LENGTH, MASK, TASK, VALUES, scripted_grpo
from torch import nn
from trainer_parts import batch_of, grpo, ppo, prompts, random_lenvm, scripted, scripted_lenvm, settings

from lenvm_rl.reward_functions import are_correct
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer
from lenvm_rl.trainers.rewards import LONG, gate_index

FLAGS = [1.0, 0.0, 1.0, 0.0]
COLUMN = torch.tensor(FLAGS).unsqueeze(1)


def accuracy(completions, **kwargs):
    return list(FLAGS)


def good_format(completions, **kwargs):
    return [1.0] * len(completions)


class Penalty:
    """A penalty around a task reward: shaped numbers, all below 0.5, and the flags behind them."""

    def __init__(self, task_reward, name="penalty"):
        self.task_reward, self.__name__, self.unshaped_flags = task_reward, name, None

    def __call__(self, completions, **columns):
        self.unshaped_flags = self.task_reward(completions=completions, **columns)
        return [None if flag is None else 0.4 * flag for flag in self.unshaped_flags]


class Grader:
    """An object with a method that is a reward function."""

    def accuracy(self, completions, **columns):
        return list(FLAGS)


PENALTY = Penalty(accuracy)
GRADER, STRICT = Grader(), functools.partial(accuracy, level=2)
MODEL = nn.Linear(1, 1)
GATED = [
    {"length_coef": 0.1},
    {"length_coef": 0.1, "length_gate": "pass_rate"},
    {"length_target": 5.0},
    {"accuracy_floor": 0.5, "length_gate": "all"},
    {"refresh_steps": 1, "refresh_only_correct": True},
]
FREE = [{}, {"length_coef": 0.1, "length_gate": "all"}, {"shaping_coef": 1.0}, {"refresh_steps": 1}]


def names(functions):
    return ["model" if function is MODEL else getattr(function, "__name__", "partial") for function in functions]


def index_of(functions, folder, **changes):
    return gate_index(LenVMGRPOConfig(**settings(folder, **changes)), functions, names(functions))


@pytest.mark.parametrize("changes", GATED)
@pytest.mark.parametrize(
    ("functions", "field"),
    [
        ([good_format, accuracy], "gate_reward"),
        ([accuracy, good_format], "gate_reward"),
        ([good_format, PENALTY], "gate_reward"),
        ([MODEL, accuracy], "gate_reward"),
        # The same function may judge otherwise with other arguments.
        ([functools.partial(accuracy, level=1), functools.partial(accuracy, level=2)], "gate_reward"),
        ([Grader().accuracy, Grader().accuracy], "gate_reward"),
        ([MODEL], "gate_threshold"),
        ([], "no reward function"),
    ],
)
def test_who_says_what_is_correct_is_not_guessed(tmp_path, functions, field, changes):
    with pytest.raises(ValueError, match=field) as caught:
        index_of(functions, tmp_path, **changes)
    # The setting that needs it is named too.
    assert any(str(caught.value).count(name) for name in (*changes, "length_gate"))


@pytest.mark.parametrize("changes", FREE)
@pytest.mark.parametrize("functions", [[good_format, accuracy], [good_format, PENALTY], [MODEL], []])
def test_what_needs_no_gate_runs_without_one(tmp_path, functions, changes):
    assert index_of(functions, tmp_path, **changes) is None


@pytest.mark.parametrize(
    ("functions", "changes", "index"),
    [
        ([accuracy], {}, 0),
        ([PENALTY], {}, 0),
        # The penalty contains the other one: both say the same.
        ([accuracy, PENALTY], {}, 0),
        ([PENALTY, accuracy], {}, 1),
        ([PENALTY, Penalty(accuracy, "other")], {}, 0),
        ([functools.partial(PENALTY), accuracy], {}, 1),
        ([functools.partial(PENALTY, weight=2)], {}, 0),
        # A method is another object each time it is named.
        ([Penalty(GRADER.accuracy), GRADER.accuracy], {}, 1),
        ([Penalty(STRICT), STRICT], {}, 1),
        ([STRICT], {}, 0),
        ([good_format, accuracy], {"gate_reward": "accuracy"}, 1),
        ([good_format, PENALTY], {"gate_reward": "penalty"}, 1),
        ([MODEL], {"gate_threshold": 0.0}, 0),
        ([MODEL], {"gate_reward": "model"}, 0),
        ([good_format, MODEL], {"gate_reward": "model"}, 1),
    ],
)
def test_who_says_it_where_there_is_no_doubt(tmp_path, functions, changes, index):
    assert index_of(functions, tmp_path, length_coef=0.1, **changes) == index


@pytest.mark.parametrize("make", [grpo, ppo])
def test_the_trainers_ask_at_construction(tmp_path, make):
    with pytest.raises(ValueError, match="gate_reward"):
        make(tmp_path, [good_format, accuracy], random_lenvm(), length_coef=0.1)
    with pytest.raises(ValueError, match="gate_reward"):
        make(tmp_path, [good_format, accuracy], random_lenvm(), accuracy_floor=0.5, length_gate="all")


def four(folder, rewards, **changes):
    """GRPO on the four scripted completions of one group."""
    changes = {"max_completion_length": 3, "scale_rewards": "none", "per_device_train_batch_size": 4, **changes}
    trainer = scripted(LenVMGRPOTrainer, COMPLETIONS)
    return grpo(folder, rewards, scripted_lenvm(VALUES), trainer=trainer, data=prompts(1), **changes)


def test_without_a_gate_nobody_is_called_correct(tmp_path):
    """Not those of good format, as the first function has them."""
    trainer = four(tmp_path, [good_format, accuracy], length_coef=2.0, length_gate="all")
    torch.testing.assert_close(batch_of(trainer)["advantages"], (TASK + 2.0 * LENGTH) * MASK)
    metrics = trainer._metrics["train"]
    assert math.isnan(metrics["length/correct"][0]) and math.isnan(metrics["length/mean_correct"][0])


@pytest.mark.parametrize("rewards", [[PENALTY], [accuracy, PENALTY], [functools.partial(PENALTY)]])
def test_a_penalty_is_asked_for_its_flags(tmp_path, rewards):
    """Its numbers are 0.4 and 0, so that as a shaped number no completion would be correct."""
    trainer = four(tmp_path, rewards, length_coef=2.0, reward_weights=[0.0] * (len(rewards) - 1) + [1.0])
    advantages = batch_of(trainer)["advantages"]
    torch.testing.assert_close(advantages, (0.4 * TASK + 2.0 * LENGTH * COLUMN) * MASK)
    assert trainer._metrics["train"]["length/correct"] == [ACCURACY]
    # The correct ones are two and three tokens long.
    assert trainer._metrics["train"]["length/mean_correct"] == [2.5]


def test_flags_that_are_not_those_of_the_completions(tmp_path):
    class Forgetful(Penalty):
        def __call__(self, completions, **columns):
            return super().__call__(completions[:2], **columns)[:2] + [0.0, 0.0]

    def two(completions, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match="unshaped_flags"):
        batch_of(four(tmp_path, Forgetful(two), length_coef=1.0))


def test_flags_outside_a_run():
    """As recipes and evaluations read them."""
    penalty = Penalty(lambda completions: [1.0, None, 0.0])
    paid = penalty(completions=[1, 2, 3])
    assert paid == [0.4, None, 0.0] and are_correct(penalty, paid) == [True, False, False]
    assert are_correct(accuracy, [0.6, None, 0.4]) == [True, False, False]
    assert are_correct(accuracy, [0.6, None, 0.4], threshold=0.3) == [True, False, True]


class TestNotJudged:
    """`None` is neither correct nor wrong."""

    def test_accuracy_is_a_share_of_what_was_judged(self, tmp_path):
        """Four right and four without a reward: accuracy 1, and a floor that has nothing to take back."""
        half = [1.0, None] * 4
        trainer = scripted_grpo(
            tmp_path, [[8, 9, 1]] * 8, half, accuracy_floor=0.9, length_coef=0.2, length_coef_max=0.2,
            length_gate="all",
        )  # fmt: skip
        for _ in range(3):
            batch_of(trainer)
        metrics = trainer._metrics["train"]
        assert metrics["length/correct"] == [1.0] * 3 and metrics["steering/accuracy"] == [1.0] * 3
        assert metrics["length/coef"] == [0.2] * 3

    def test_a_wrong_one_among_three_that_were_judged(self, tmp_path):
        trainer = scripted_grpo(tmp_path, rewards=[1.0, None, 0.0, 1.0])
        batch_of(trainer)
        assert trainer._metrics["train"]["length/correct"] == [pytest.approx(2 / 3)]
        # Lengths 2 and 1.
        assert trainer._metrics["train"]["length/mean_correct"] == [1.5]

    def test_a_batch_that_was_not_judged_moves_no_floor(self, tmp_path):
        said = [1.0, 1.0, 1.0, 0.0]

        def judge(completions, **kwargs):
            return list(said)

        trainer = four(
            tmp_path, [good_format, judge], gate_reward="judge", accuracy_floor=0.5, length_coef=0.1,
            length_coef_rate=0.2, length_coef_proportional=0.0, length_gate="all",
        )  # fmt: skip
        batch_of(trainer)
        said[:] = [None] * 4
        for _ in range(2):
            batch_of(trainer)
        said[:] = [1.0, 1.0, 1.0, 0.0]
        batch_of(trainer)
        batch_of(trainer)
        metrics = trainer._metrics["train"]
        # A quarter above the floor moves it by 0.05, three times.
        assert metrics["length/coef"] == pytest.approx([0.1, 0.15, 0.15, 0.15, 0.2])
        assert metrics["steering/accuracy"] == pytest.approx([0.75] * 5)

    def test_a_floor_waits_for_the_first_judgement(self, tmp_path):
        def judge(completions, **kwargs):
            return [None] * len(completions)

        trainer = four(
            tmp_path, [good_format, judge], gate_reward="judge", accuracy_floor=0.5, length_coef=0.1, length_gate="all"
        )
        for _ in range(2):
            batch_of(trainer)
        metrics = trainer._metrics["train"]
        assert metrics["length/coef"] == [0.1, 0.1] and all(map(math.isnan, metrics["steering/accuracy"]))

    def test_they_are_not_in_the_rate_of_a_group(self, tmp_path):
        """Judged by another function than the one that pays: one of two is correct, not one of four."""

        def judge(completions, **kwargs):
            return [1.0, None, None, 0.0]

        rewards, gate = [good_format, judge], {"gate_reward": "judge", "reward_weights": [1.0, 0.0]}
        paid = four(tmp_path, rewards, length_coef=2.0, length_gate="pass_rate", **gate)
        torch.testing.assert_close(batch_of(paid)["advantages"], 2.0 * 0.5 * LENGTH * MASK)

    def test_they_are_not_in_the_mean_of_the_centred_gate(self, tmp_path):
        """The first two correct, the last one wrong. p is 1/2 for the correct ones and 1 for the wrong one, not 1/3
        and 2/3; D_L is -.275 and -.15, D_t of the tokens before 0 -.15 -.3375 | 0 -.15 | - | 0 -.025."""
        trainer = scripted_grpo(tmp_path, rewards=[1.0, 1.0, None, 0.0], length_coef=1.0, length_gate_center=True)
        task = torch.tensor([1 / 3, 1 / 3, 0.0, -2 / 3]).unsqueeze(1)
        expected = torch.tensor(
            [[-0.125, -0.125 + 0.075, -0.125 + 0.16875], [0.125, 0.125 + 0.075, 0.0], [0.0] * 3, [0.0, 0.025, 0.0]]
        )
        torch.testing.assert_close(batch_of(trainer)["advantages"], (task + expected) * MASK)

    def test_a_refresh_on_correct_completions_leaves_them_out(self, tmp_path):
        trainer = scripted_grpo(
            tmp_path, rewards=[1.0, None, 0.0, 1.0], lenvm=random_lenvm(), refresh_steps=1, refresh_only_correct=True
        )
        batch_of(trainer)
        trainer.state.global_step = 1
        batch_of(trainer)
        assert trainer._metrics["train"]["refresh/completions"] == [2.0]


class TestWarnings:
    @pytest.fixture(autouse=True)
    def _log(self, caplog):
        caplog.set_level(logging.WARNING, "lenvm_rl.trainers.rewards")
        self.caplog = caplog

    @property
    def messages(self):
        return [record.getMessage() for record in self.caplog.records if record.name == "lenvm_rl.trainers.rewards"]

    def warned(self, of):
        return sum(of in message for message in self.messages)

    def batches(self, folder, rewards, count, **changes):
        changes = {"length_coef": 0.1, **changes}
        trainer = scripted_grpo(folder, rewards=rewards, **changes)
        for _ in range(count):
            batch_of(trainer)
        return trainer

    def test_values_that_are_no_flags(self, tmp_path):
        self.batches(tmp_path, [0.9, 0.3, 0.0, 1.0], 3)
        assert self.warned("neither 0 nor 1") == 1 and self.warned("gate_threshold") == self.warned("gate_reward") == 1

    @pytest.mark.parametrize(
        ("rewards", "changes"),
        [
            ([1.0, 0.0, None, 1.0], {}),
            # Somebody said how to read them.
            ([0.9, 0.3, 0.0, 1.0], {"gate_threshold": 0.8}),
            # Nothing needs to know.
            ([0.9, 0.3, 0.0, 1.0], {"length_gate": "all"}),
        ],
    )
    def test_values_that_are_read_as_they_are_meant(self, tmp_path, rewards, changes):
        self.batches(tmp_path, rewards, 2, **changes)
        assert not self.messages

    def test_a_gate_that_does_not_open(self, tmp_path):
        trainer = self.batches(tmp_path, [0.0] * 4, LONG - 1)
        assert not self.messages
        batch_of(trainer)
        assert self.warned("gate_reward") == self.warned("gate_threshold") == 1
        for _ in range(3):
            batch_of(trainer)
        assert len(self.messages) == 1

    def test_a_gate_that_opens_now_and_then(self, tmp_path):
        rewards = [0.0] * 4

        def judge(completions, **kwargs):
            return list(rewards)

        trainer = four(tmp_path, judge, length_coef=0.1)
        for batch in range(2 * LONG - 1):
            rewards[0] = float(batch == LONG - 1)
            batch_of(trainer)
        assert not self.messages

    def test_a_gate_that_was_never_closed(self, tmp_path):
        self.batches(tmp_path, [1.0] * 4, LONG + 2)
        assert self.warned("counts as correct") == 1

    def test_a_policy_that_has_learned_the_task_is_no_fault(self, tmp_path):
        rewards = [0.0, 1.0, 1.0, 1.0]

        def judge(completions, **kwargs):
            return list(rewards)

        trainer = four(tmp_path, judge, length_coef=0.1)
        batch_of(trainer)
        rewards[:] = [1.0] * 4
        for _ in range(LONG + 2):
            batch_of(trainer)
        assert not self.messages

    def test_evaluation_is_not_watched(self, tmp_path):
        trainer = scripted_grpo(tmp_path, rewards=[0.0] * 4, length_coef=0.1)
        trainer.num_generations_eval = 4
        for _ in range(LONG):
            batch_of(trainer, "eval")
        assert not self.messages
