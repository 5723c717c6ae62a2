"""GSM8K: the final number of a text, and grading against the real data."""

import json
from fractions import Fraction

import pytest
from places import DATA

from reward.answers import text_of_completion
from reward.gsm8k import final_number, gold_number, gsm8k_reward

GSM8K = DATA / "gsm8k"
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_dir(), reason=f"GSM8K is not at {GSM8K}: set LENVM_RL_DATA to a folder with gsm8k/{{train,test}}.jsonl"
)


def rows_of(name):
    # Split at newlines only: the texts may hold other line separators.
    return [json.loads(line) for line in (GSM8K / name).read_text(encoding="utf-8").split("\n") if line]


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
        ("the answer is minus 5.", -5),
        ("#### Negative 5 degrees", -5),
        ("#### 12 minus 5 = 7", 7),
        ("So he has 20 minus 5", 5),
        ("a non-negative 5", 5),
        ("the answer is 5 dollars and 25 cents.", None),
        ("#### 3 boys and 4 girls", None),
        ("#### 18 and not 20", 18),
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
    assert text_of_completion(completions[2]) == "5 apples"


@pytest.mark.parametrize("answer", ["", "#### ", "between 5 and 6"])
def test_a_gold_answer_without_one_number_is_refused(answer):
    with pytest.raises(ValueError, match="gold answer"):
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
