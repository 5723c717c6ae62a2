"""What a task reward may be, what a length penalty is told besides TRL's columns, and what it says beside its pay."""

import copy
import functools
import logging
import pickle
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from trainer_parts import VOCAB, batch_of, grpo, ppo, prompts, scripted, settings

import reward
from lenvm_rl.reward_functions import (
    ShapedReward,
    StatefulReward,
    accepted,
    check_returned,
    is_asynchronous,
    load_reward,
    name_of,
    unwrapped,
)
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.rewards import watched_rewards
from reward.length_reward import LengthReward

EOS = 1


def flag_column(completions, right, **columns):
    """A task reward that reads its flags from a column."""
    return right


def starts_low(completion_ids, level=8, **columns):
    """A task reward for the tiny policies: 1 where the first token is one of the lower half."""
    return [float(ids[0] < level) for ids in completion_ids]


class Grader:
    """A grader with a level: an object to be called, and methods."""

    def __init__(self, level):
        self.level = level

    def __call__(self, completion_ids, **columns):
        return starts_low(completion_ids, self.level)

    def score(self, completion_ids, **columns):
        return starts_low(completion_ids, self.level)

    async def later(self, completion_ids, **columns):
        return starts_low(completion_ids, self.level)


class AsynchronousGrader:
    async def __call__(self, completion_ids, **columns):
        return starts_low(completion_ids)


async def later(completion_ids, **columns):
    return starts_low(completion_ids)


grader = Grader(5)
partial_grader = functools.partial(starts_low, level=5)


def linear(task_reward=flag_column, **changes):
    return LengthReward("linear", task_reward, **{"alpha": 1.0, "max_length": 10, **changes})


EVERY = [
    linear(),
    LengthReward("truncation", flag_column, limit=3),
    LengthReward("kimi", flag_column),
    LengthReward("arora", flag_column, alpha=0.4),
    LengthReward("cosine", flag_column, max_length=20, margin=0),
    LengthReward("alp", flag_column, beta=0.01),
    LengthReward("pass_rate", flag_column),
    LengthReward("shorter_better", flag_column, beta=0.01),
    LengthReward("gr3", flag_column),
    LengthReward("laser", flag_column, target_length=3),
    LengthReward("l1_exact", flag_column, target_length=3, alpha=0.01),
    LengthReward("l1_max", flag_column, target_length=3, alpha=0.01),
    LengthReward("leash", flag_column, target_length=2, multiplier=0.1),
    LengthReward("laser_d", flag_column, candidates=[3, 4]),
]
each = pytest.mark.parametrize("penalty", EVERY, ids=lambda penalty: penalty.name)


def called(reward, ids, right, **columns):
    return reward(
        **{
            "prompts": ["p"] * len(ids),
            "completions": [""] * len(ids),
            "completion_ids": ids,
            "right": right,
            **columns,
        }
    )


# Tool output.


def test_tool_output_is_no_length():
    ids, actions = [8, 9, 10, 10, 10, EOS], [1, 1, 0, 0, 0, 1]
    assert called(linear(), [ids], [1]) == pytest.approx([0.4])
    assert called(linear(), [ids], [1], tool_mask=[actions]) == pytest.approx([0.7])
    assert called(linear(eos_token_ids=EOS), [ids], [1], tool_mask=[actions]) == pytest.approx([0.8])


def test_only_an_end_that_the_policy_chose_is_left_out():
    ids = [[8, 9, 10, EOS], [8, 9, 10, EOS], [8, EOS, 10], []]
    actions = [[1, 1, 0, 0], [1, 1, 0, 1], [1, 1, 0], []]
    # The environment's end is not the policy's, and neither is one in the middle.
    paid = called(linear(eos_token_ids=[EOS, 9]), ids, [1] * 4, tool_mask=actions)
    assert paid == pytest.approx([0.8, 0.8, 0.8, 1.0])


@each
def test_every_penalty_pays_for_own_tokens_alone(penalty):
    ids = [[8, 9, 10, 10, EOS], [8, 10, 10, 10, 9, 9], [10, 10, 10], [8, 9, 9, 9]]
    actions = [[1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 1], [0, 0, 0], [1, 1, 1, 1]]
    own = [[token for token, is_own in zip(*row, strict=True) if is_own] for row in zip(ids, actions, strict=True)]
    bare, masked, blind = copy.deepcopy(penalty), copy.deepcopy(penalty), copy.deepcopy(penalty)
    right = [1, 1, 1, 0]
    expected = called(bare, own, right)
    assert called(masked, ids, right, tool_mask=actions) == expected
    assert called(blind, ids, right) != expected, "this setting does not bite"
    if isinstance(penalty, StatefulReward):
        assert masked.state_dict() == bare.state_dict() != blind.state_dict()


def test_a_mask_of_another_shape_is_refused_and_none_is_no_mask():
    assert called(linear(), [[1, 2]], [1], tool_mask=None) == pytest.approx([0.8])
    for mask in ([[1]], [[1, 1], [1, 1]], []):
        with pytest.raises(ValueError, match="tool_mask"):
            called(linear(), [[1, 2]], [1], tool_mask=mask)


def test_tool_messages_without_a_mask_are_named_once(caplog):
    chats = [
        [{"role": "assistant", "content": "look"}, {"role": "tool", "content": "3"}, {"role": "assistant"}],
        [{"role": "assistant", "content": "3"}],
    ]
    reward = linear()
    with caplog.at_level(logging.WARNING, logger="reward"):
        called(reward, [[1], [2]], [1, 1], completions=chats[1:] * 2)
        called(reward, [[1], [2]], [1, 1], completions=chats, tool_mask=[[1], [1]])
        assert caplog.messages == []
        called(reward, [[1], [2]], [1, 1], completions=chats)
        called(reward, [[1], [2]], [1, 1], completions=chats)
    (message,) = caplog.messages
    assert "flag_column_linear" in message and "tool_mask" in message and "LenVMGRPOTrainer" in message


# Flags.


@pytest.mark.parametrize(
    "right",
    [
        [1, 0, None, 1],
        [True, False, None, True],
        (1.0, 0.0, None, 1.0),
        np.array([1.0, 0.0, None, 1.0], dtype=object),
        [np.float32(1), np.int64(0), None, np.bool_(True)],
        [torch.tensor(1), torch.tensor(0.0), None, torch.tensor(True)],
        [Fraction(1), 0, None, 1],
    ],
    ids=str,
)
def test_flags_of_any_kind_are_flags(right):
    reward = linear()
    assert reward.unshaped_flags is None
    assert called(reward, [[5]] * 4, right) == pytest.approx([0.9, 0.0, None, 0.9])
    assert reward.unshaped_flags == [1.0, 0.0, None, 1.0]
    assert all(flag is None or type(flag) is float for flag in reward.unshaped_flags)


@pytest.mark.parametrize(
    "right",
    [torch.tensor([1, 0]), np.array([True, False]), torch.tensor([[1.0], [0.0]]), iter([1, 0])],
    ids=("tensor", "array", "column", "iterator"),
)
def test_flags_may_come_in_any_container(right):
    assert called(LengthReward("kimi", flag_column), [[5], [5, 5]], right) == [0.5, 0.0]


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ([1.0, float("nan")], "nan"),
        ([1.0, 0.5], "0.5"),
        ([1.0, "yes"], "flag_column"),
        ([10**400, 1], "flag_column"),
        ([1.0], "flag_column"),
        (np.ones((2, 1)), "flag_column"),
        (torch.tensor(1.0), "flag_column"),
        (None, "flag_column"),
        ({"a": 1, "b": 0}, "flag_column"),
    ],
    ids=str,
)
def test_what_is_no_flag_is_named(right, message):
    with pytest.raises(ValueError, match=message):
        called(linear(), [[5], [5]], right)
    if message != "0.5":
        with pytest.raises(ValueError, match=message):
            called(linear(threshold=0.5), [[5], [5]], right)


@each
def test_the_unshaped_flags_are_those_of_the_last_call(penalty):
    reward = copy.deepcopy(penalty)
    called(reward, [[5], [5] * 9], [1, 0])
    assert reward.unshaped_flags == [1.0, 0.0]
    called(reward, [[5], [5] * 9, []], [None, 1, None])
    assert reward.unshaped_flags == [None, 1.0, None]
    called(reward, [], [])
    assert reward.unshaped_flags == []
    with pytest.raises(ValueError, match="flag_column"):
        called(reward, [[5]], [])
    assert reward.unshaped_flags is None


def test_with_a_threshold_the_flag_is_what_counts_as_correct():
    reward = LengthReward("truncation", flag_column, limit=1, threshold=0.3)
    assert called(reward, [[5], [5, 5], [5]], [0.4, 0.4, 0.3]) == [1.0, 0.0, 0.0]
    assert reward.unshaped_flags == [1.0, 1.0, 0.0]


def test_who_says_what_is_correct_is_seen_without_knowing_the_class():
    assert all(isinstance(penalty, ShapedReward) for penalty in EVERY)
    assert isinstance(unwrapped(functools.partial(functools.partial(EVERY[0], x=1), y=2)), ShapedReward)
    assert not isinstance(flag_column, ShapedReward) and not isinstance(grader, ShapedReward)
    assert [p.name for p in EVERY if isinstance(p, StatefulReward)] == ["leash", "laser_d"]


# Lengths and groups at the edges.


@each
def test_nothing_empty_and_unscored(penalty):
    reward = copy.deepcopy(penalty)
    assert called(reward, [], []) == []
    assert called(reward, [[5], []], [None, None]) == [None, None]
    paid = called(reward, [[], []], [1, 1])
    assert len(set(paid)) == 1 and np.isfinite(paid[0])
    assert called(reward, [[], [5], []], [1, None, 1])[1] is None


ALONE = ("kimi", "arora", "pass_rate", "shorter_better", "gr3")


@each
def test_a_group_of_one_is_refused_where_length_makes_no_difference(penalty, caplog):
    short, long = [called(copy.deepcopy(penalty), [[5] * n], [1])[0] for n in (2, 9)]
    assert (short == long) == (penalty.name in ALONE)
    warned = [message for message in caplog.messages if "nothing to be compared with" in message]
    assert len(warned) == (2 if penalty.name in ALONE else 0)
    again = {**copy.deepcopy(penalty.__dict__["knobs"]), "num_generations": 1}
    if penalty.name in ALONE:
        with pytest.raises(ValueError, match="num_generations"):
            LengthReward(penalty.name, flag_column, **again)


def test_groups_of_one_have_these_values():
    one = ([[5] * 4], [1])
    assert called(LengthReward("kimi", flag_column), *one) == [0.0]
    assert called(LengthReward("arora", flag_column, alpha=0.4), *one) == pytest.approx([0.8])
    assert called(LengthReward("shorter_better", flag_column), *one) == [2.0]
    assert called(LengthReward("gr3", flag_column, alpha=1.0), *one) == [0.5]
    assert called(LengthReward("pass_rate", flag_column), *one) == [0.75]
    # p = 1 = 1/K; correct prompts are easy ones.
    assert called(LengthReward("alp", flag_column, beta=0.1, num_generations=1), *one) == pytest.approx([0.6])
    assert called(LengthReward("laser_d", flag_column, candidates=[3, 4], num_generations=1), *one) == [1.5]


def test_groups_are_runs_of_equal_prompts_and_other_columns_pass_through():
    reward = LengthReward("kimi", flag_column)
    rewards = reward(
        prompts=["p", "p", "q", "q", "p", "p"],
        completions=[""] * 6,
        completion_ids=[[7] * length for length in (10, 30, 2, 4, 7, 8)],
        right=[1] * 6,
        trainer_state=None,
    )
    assert rewards == [0.5, -0.5, 0.5, -0.5, 0.5, -0.5]
    messages = [[{"role": "user", "content": "p"}], [{"role": "user", "content": "p"}]]
    assert reward(
        prompts=messages, completions=["", ""], completion_ids=[[7] * length for length in (1, 3)], right=[1, 1]
    ) == [0.5, -0.5]


def test_a_completion_without_a_flag_gets_none_and_leaves_its_group():
    rewards = LengthReward("kimi", flag_column)(
        prompts=["p"] * 3,
        completions=[""] * 3,
        completion_ids=[[7] * length for length in (10, 90, 20)],
        right=[1, None, 1],
    )
    assert rewards == [0.5, None, -0.5]


def test_equal_prompts_side_by_side_are_named_where_they_show(caplog):
    reward = LengthReward("kimi", flag_column)
    ids = [[5] * length for length in (10, 30, 100, 300, 1, 2)]
    called(reward, ids[:4], [1] * 4, prompts=["p", "p", "q", "q"])
    assert caplog.messages == []
    called(reward, ids, [1] * 6, prompts=["p"] * 4 + ["q"] * 2)
    called(reward, ids, [1] * 6, prompts=["p"] * 4 + ["q"] * 2)
    (message,) = caplog.messages
    assert "num_generations" in message and "2, 4" in message


def test_the_size_that_the_trainer_says_counts():
    lengths = [[5] * length for length in (10, 30, 100, 300)]
    reward = LengthReward("kimi", flag_column, num_generations=4)
    # One group; two, as in an evaluation; and a dataset with a column of that name.
    assert called(reward, lengths, [1] * 4)[0] == 0.5
    assert called(reward, lengths, [1] * 4, num_generations=2) == [0.5, -0.5, 0.5, -0.5]
    assert called(reward, lengths, [1] * 4, num_generations=[2, 2, 2, 2])[2] < 0.5
    # Prompts within a group may differ by what an environment wrote into them.
    seen = [[{"role": "user", "content": f"seed {row}"}] for row in range(4)]
    assert called(LengthReward("kimi", flag_column), lengths, [1] * 4, prompts=seen, num_generations=4)[0] == 0.5
    assert called(reward, lengths, [1] * 4, prompts=seen, environments=[None] * 4)[0] == 0.5
    with pytest.raises(ValueError, match="num_generations=4"):
        called(reward, lengths, [1] * 4, prompts=seen)
    with pytest.raises(ValueError, match="num_generations=3"):
        called(reward, lengths, [1] * 4, num_generations=3)


def test_environments_without_a_size_are_named(caplog):
    called(LengthReward("kimi", flag_column), [[5], [5, 5]], [1, 1], environments=[None, None])
    (message,) = caplog.messages
    assert "num_generations" in message


def test_ends_may_be_one_several_or_none():
    ids = [[5, 5, EOS]]
    for ends, paid in ((EOS, 0.8), ([EOS], 0.8), ({7, EOS}, 0.8), ((), 0.7), (None, 0.7), (torch.tensor([EOS]), 0.8)):
        assert called(linear(eos_token_ids=ends), ids, [1]) == pytest.approx([paid])
    assert called(linear(eos_token_ids=EOS), [torch.tensor(ids[0])], [1]) == pytest.approx([0.8])


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, torch.tensor])
def test_knobs_may_be_numbers_of_any_kind(kind):
    assert called(linear(alpha=kind(0.5), max_length=kind(10.0)), [[5] * 5], [1]) == pytest.approx([0.75])
    assert called(LengthReward("l1_exact", flag_column, target_length=kind(9.0), alpha=0.1), [[5] * 5], [1]) == (
        pytest.approx([0.6])
    )


# What a task reward may be.


CALLABLES = {
    "function": (starts_low, "starts_low"),
    "partial": (partial_grader, "starts_low"),
    "partial of a partial": (functools.partial(functools.partial(starts_low), level=5), "starts_low"),
    "object": (grader, "Grader"),
    "bound method": (grader.score, "score"),
    "partial of a method": (functools.partial(grader.score), "score"),
    "partial of an object": (functools.partial(grader), "Grader"),
    "lambda": (lambda completion_ids, **columns: starts_low(completion_ids, 5), "<lambda>"),
}


@pytest.mark.parametrize("kind", CALLABLES)
@pytest.mark.parametrize(
    "make", [linear, functools.partial(LengthReward, "kimi"), functools.partial(LengthReward, "leash", target_length=2)]
)
def test_whatever_trl_takes_is_a_task_reward(kind, make):
    task_reward, name = CALLABLES[kind]
    reward = make(task_reward)
    assert reward.__name__ == f"{name}_{reward.name}"
    ids = [[4] * 5, [9], [2]]
    flags = [float(ids[0][0] < (8 if kind == "function" else 5)), 0.0, 1.0]
    paid = called(reward, ids, None)
    assert reward.unshaped_flags == flags
    for again in (copy.deepcopy(reward), *([] if kind == "lambda" else [pickle.loads(pickle.dumps(reward))])):
        assert again.__name__ == reward.__name__ and again.unshaped_flags == flags
        assert called(again, ids, None) == called(copy.deepcopy(reward), ids, None)
    assert called(make(task_reward), ids, None) == paid


@pytest.mark.parametrize(
    ("path", "name"),
    [("starts_low", "starts_low"), ("partial_grader", "starts_low"), ("grader", "Grader"), ("grader.score", "score")],
)
def test_dotted_paths_lead_to_any_of_them(path, name):
    assert linear(f"test_length_reward.{path}").__name__ == f"{name}_linear"
    assert name_of(load_reward(f"test_length_reward.{path}")) == name


@pytest.mark.parametrize("path", ["starts_low", "test_length_reward.nothing", "nowhere.starts_low", "a b.c", ""])
def test_a_dotted_path_to_nothing_is_refused(path):
    for read in (linear, load_reward):
        with pytest.raises(ValueError, match=re.escape(repr(path))):
            read(path)


def test_a_module_that_hides_a_persons_own_is_named_with_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text("def mine(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    with pytest.raises(ValueError, match=f"{re.escape(reward.__file__)} has no 'mine'"):
        load_reward("reward.mine")
    with pytest.raises(ValueError, match=r"reward.gsm8k\.py has no 'nothing'"):
        load_reward("reward.gsm8k.nothing")
    with pytest.raises(ValueError, match="sys has no 'nothing'"):
        load_reward("sys.nothing")
    with pytest.raises(ValueError, match=f"'nowhere_at_all' is in {re.escape(str(tmp_path))}"):
        load_reward("nowhere_at_all.mine")


@pytest.mark.parametrize(
    "name, source, kind", [("a", "import nowhere_at_all", ImportError), ("b", "def f(:", SyntaxError)]
)
@pytest.mark.parametrize("inside", ["", "graders_of_"])
def test_a_module_that_cannot_be_imported_says_why_itself(name, source, kind, inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    folder = tmp_path / (inside and inside + name)
    folder.mkdir(exist_ok=True)
    (folder / f"own_{name}.py").write_text(source)
    with pytest.raises(kind):
        load_reward(".".join([*folder.relative_to(tmp_path).parts, f"own_{name}", "f"]))


@pytest.mark.parametrize("path", ["Grader", "EOS", "EVERY"])
def test_a_dotted_path_to_something_else_is_refused(path):
    with pytest.raises(ValueError, match=path):
        linear(f"test_length_reward.{path}")


@pytest.mark.parametrize("what", [Grader, 5, nn.Linear(1, 1), None])
def test_what_is_no_task_reward_is_refused(what):
    with pytest.raises(ValueError, match="task_reward"):
        linear(what)


@pytest.mark.parametrize(
    "task_reward",
    [
        later,
        AsynchronousGrader(),
        grader.later,
        functools.partial(later),
        functools.partial(AsynchronousGrader()),
        functools.partial(functools.partial(grader.later), level=5),
        "test_length_reward.later",
    ],
)
def test_asynchronous_task_rewards_are_refused(task_reward):
    assert isinstance(task_reward, str) or is_asynchronous(task_reward)
    with pytest.raises(ValueError, match="task_reward"):
        linear(task_reward)


# Keywords that TRL does not pass.


def strict(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
    """A reward function that takes what TRL passes and nothing else."""
    return [1.0] * len(completions)


def test_functions_get_the_keywords_that_they_take():
    further = {"num_generations": 8, "tool_mask": [[1]]}
    assert accepted(strict, further) == {}
    assert accepted(flag_column, further) == accepted(EVERY[0], further) == further
    assert accepted(lambda completions, *, tool_mask: 0, further) == {"tool_mask": [[1]]}
    assert accepted(lambda tool_mask, /, **columns: 0, further) == further
    assert accepted(functools.partial(flag_column, num_generations=2), further) == {"tool_mask": [[1]]}
    assert accepted(dict.fromkeys, further) == {}
    # A penalty hands on what its task reward takes.
    told = linear(lambda completions, tool_mask, **columns: [sum(tool_mask[0]) > 1, columns["num_generations"] > 4])
    assert called(told, [[5, 5], []], None, tool_mask=[[1, 1], []], num_generations=4) == pytest.approx([0.8, 0.0])
    bare = linear(lambda prompts, completions, completion_ids, right: right)
    assert called(bare, [[5, 5]], [1], tool_mask=[[1, 0]], num_generations=4) == pytest.approx([0.9])


@pytest.mark.parametrize(("make", "base"), [(grpo, LenVMGRPOTrainer), (ppo, LenVMPPOTrainer)])
def test_the_trainers_tell_the_size_of_groups_and_the_mask(tmp_path, make, base):
    heard = []

    def listens(completion_ids, **columns):
        heard.append((columns["num_generations"], columns.get("tool_mask")))
        return [float(len(ids)) for ids in completion_ids]

    completions = [[8, 9, 1]] * 4 + [[7, 1]] * 4
    rewards = [strict, listens, LengthReward("kimi", starts_low, num_generations=4)]
    trainer = make(tmp_path, rewards, trainer=scripted(base, completions), num_generations_eval=2)
    batch_of(trainer)
    batch_of(trainer, "eval")
    assert [size for size, _ in heard] == [4, 2]
    assert trainer.reward_funcs == rewards
    with watched_rewards(trainer, tool_mask=[[1, 0]]):
        for function in trainer.reward_funcs[:2]:
            function(
                prompts=["p"], completions=[""], completion_ids=[[1, 2]], trainer_state=None, log_extra=None,
                log_metric=None,
            )  # fmt: skip
    assert heard[-1][1] == [[1, 0]]


@pytest.mark.parametrize(("base", "config"), [(LenVMGRPOTrainer, LenVMGRPOConfig), (LenVMPPOTrainer, LenVMPPOConfig)])
def test_what_an_environment_wrote_is_no_length_in_training(tmp_path, base, config):
    def rollouts(given, trainer):
        return {
            "prompt_ids": [[6, 7]] * len(given),
            "completion_ids": [[8, 9, 10, 10, 10, EOS], [8, 10, 10, EOS]] * (len(given) // 2),
            "logprobs": [[0.0] * 6, [0.0] * 4] * (len(given) // 2),
            "env_mask": [[1, 1, 0, 0, 0, 1], [1, 1, 0, 0]] * (len(given) // 2),
        }

    def always(completions, **columns):
        return [1] * len(completions)

    trainer = base(
        tiny_llama(VOCAB, seed=1),
        [linear(always), linear(always, eos_token_ids=EOS)],
        config(**settings(tmp_path)),
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(VOCAB),
        rollout_func=rollouts,
    )
    batch_of(trainer)
    # Own tokens: 3 with an end, and 2 without one.
    paid = torch.tensor([[0.7, 0.8], [0.8, 0.8]] * 4)
    torch.testing.assert_close(trainer._raw_rewards, paid)


def test_a_trainer_takes_penalties_of_anything(tmp_path):
    rewards = [
        LengthReward("kimi", functools.partial(starts_low, level=5)),
        LengthReward("linear", grader, alpha=0.5, max_length=6),
        LengthReward("leash", grader.score, target_length=2),
        functools.partial(LengthReward("gr3", lambda completion_ids, **columns: starts_low(completion_ids))),
    ]
    trainer = grpo(tmp_path, rewards, max_steps=1, data=prompts(2))
    trainer.train()
    assert trainer.reward_func_names == ["starts_low_kimi", "Grader_linear", "score_leash", "<lambda>_gr3"]
    assert "starts_low_kimi/unshaped" in trainer.state.log_history[0]


def test_what_a_function_returned_is_checked_in_one_place():
    assert check_returned((one for one in (1, None)), "f", 2) == [1, None]
    with pytest.raises(ValueError, match="'f'"):
        check_returned(np.array(1.0), "f", 1)
