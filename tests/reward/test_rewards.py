"""Length penalties by hand, their TRL form, and GSM8K grading against the real data."""

import json
from fractions import Fraction

import pytest
import torch
from places import DATA

from reward.answers import completion_text
from reward.baselines import gsm8k_linear
from reward.gsm8k import final_number, gold_number, gsm8k_reward
from reward.length_reward import LengthReward
from reward.rules import kimi_length_reward

GSM8K = DATA / "gsm8k"
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_dir(), reason=f"GSM8K is not at {GSM8K}: set LENVM_RL_DATA to a folder with gsm8k/{{train,test}}.jsonl"
)


def rows_of(name):
    # Split at newlines only: the texts may hold other line separators.
    return [json.loads(line) for line in (GSM8K / name).read_text(encoding="utf-8").split("\n") if line]


def flag_column(completions, right, **columns):
    """A task reward that reads its flags from a column."""
    return list(right)


def lengths_of(*lengths):
    return [[7] * length for length in lengths]


def test_kimi_by_hand_over_two_groups_in_any_order():
    lengths = torch.tensor([10, 5, 20, 5, 30, 5])
    correct = torch.tensor([1, 1, 1, 0, 0, 1])
    group = torch.tensor([4, 9, 4, 9, 4, 9])
    rewards = kimi_length_reward(lengths, correct, group, penalize_wrong=True)
    torch.testing.assert_close(rewards, torch.tensor([0.5, 0.0, 0.0, 0.0, -0.5, 0.0]))
    spared = kimi_length_reward(lengths, correct, group)
    torch.testing.assert_close(spared, torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0, 0.0]))


def test_kimi_pays_a_short_wrong_answer_nothing():
    rewards = kimi_length_reward(torch.tensor([1, 101]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    torch.testing.assert_close(rewards, torch.tensor([0.0, -0.5]))


@pytest.mark.parametrize(
    "penalty", [LengthReward("kimi", flag_column), LengthReward("linear", flag_column, alpha=0.5, max_length=9)]
)
def test_a_shaped_number_is_not_a_flag(penalty):
    with pytest.raises(ValueError, match="0.7"):
        penalty(prompts=["p", "p"], completions=["", ""], completion_ids=lengths_of(1, 2), right=[1.0, 0.7])


def test_groups_are_runs_of_equal_prompts_and_other_columns_pass_through():
    reward = LengthReward("kimi", flag_column)
    rewards = reward(
        prompts=["p", "p", "q", "q", "p", "p"],
        completions=[""] * 6,
        completion_ids=lengths_of(10, 30, 2, 4, 7, 8),
        right=[1] * 6,
        trainer_state=None,
    )
    assert rewards == [0.5, -0.5, 0.5, -0.5, 0.5, -0.5]
    messages = [[{"role": "user", "content": "p"}], [{"role": "user", "content": "p"}]]
    assert reward(prompts=messages, completions=["", ""], completion_ids=lengths_of(1, 3), right=[1, 1]) == [0.5, -0.5]


def test_a_completion_without_a_flag_gets_none_and_leaves_its_group():
    rewards = LengthReward("kimi", flag_column)(
        prompts=["p"] * 3, completions=[""] * 3, completion_ids=lengths_of(10, 90, 20), right=[1, None, 1]
    )
    assert rewards == [0.5, None, -0.5]


def test_the_ready_made_linear_reward_by_hand():
    rewards = gsm8k_linear(
        prompts=["p"] * 3, completions=["5", "so 5", "6"], completion_ids=lengths_of(128, 1000, 3), answer=["5"] * 3
    )
    assert rewards == pytest.approx([0.9, 0.6, 0.0])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She earns $1,234.50.", Fraction("1234.5")),
        ("The answer is 18.", 18),
        ("so 36/2 = 18.00", 18),
        ("\\boxed{42} as 40 + 2 = 42, checked 7 times", 42),
        ("first \\boxed{1}, then \\boxed{\\text{about } 2{,}000}", 2000),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("a half is 1/2", Fraction(1, 2)),
        ("\\boxed{7} and \\boxed{8", 7),
        ("#### -$3\nThat took 5 steps", -3),
        ("#### $-3", -3),
        ("10-15", 15),
        ("it falls to \u22124 degrees", -4),
        ("-.5", Fraction(-1, 2)),
        ("the area is 20 m^2", 20),
        ("20 cm^{2}", 20),
        ("\\$5", 5),
        ("12%", 12),
        ("1,2,3", 3),
        ("7/0", 0),
        ("no number here", None),
        ("\\boxed{none}", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_completion(text, number):
    assert final_number(text) == number


def test_grading_takes_texts_and_conversations():
    completions = [
        "5",
        [{"role": "assistant", "content": "so 5."}],
        [{"role": "assistant", "content": [{"type": "text", "text": "5 "}, {"type": "text", "text": "apples"}]}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert gsm8k_reward(completions, answer=["#### 5"] * 5, prompts=None) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert completion_text(completions[2]) == "5 apples"


@pytest.mark.parametrize("answer", ["", "#### ", "between 5 and 6"])
def test_a_gold_answer_without_one_number_is_refused(answer):
    with pytest.raises(ValueError, match="exactly one number"):
        gold_number(answer)


@needs_gsm8k
@pytest.mark.parametrize(("name", "count"), [("test.jsonl", 1319), ("train.jsonl", 7473)])
def test_every_gold_answer_graded_against_itself_is_right(name, count):
    answers = [row["answer"] for row in rows_of(name)]
    assert len(answers) == count
    assert gsm8k_reward(answers, answer=answers) == [1.0] * count
    finals = [answer.rpartition("####")[2] for answer in answers]
    assert gsm8k_reward([f"The answer is ${final.strip()}." for final in finals], answer=answers) == [1.0] * count
    assert sum(gsm8k_reward(answers[1:] + answers[:1], answer=answers)) < 0.05 * count


@needs_gsm8k
def test_real_completions_are_graded_as_their_authors_graded_them():
    systems = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    differing = graded = 0
    for row in rows_of("example_model_solutions.jsonl"):
        for system in systems:
            (mine,) = gsm8k_reward([row[system]["solution"]], answer=[row["ground_truth"].replace("A:", "####")])
            graded += 1
            differing += bool(mine) != row[system]["is_correct"]
    assert graded == 4 * 1319
    assert differing == 0
