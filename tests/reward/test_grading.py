"""The table of answers, where an answer stands, thinking, what no grader may stop at, and golds checked beforehand."""

import functools
import time

import pytest
from datasets import Dataset
from grading_cases import RIGHT_MATHEMATICS, RIGHT_NUMBERS, WRONG_MATHEMATICS, WRONG_NUMBERS

from lenvm_rl.reward_functions import check_golds
from reward.answers import (
    ExactMatchReward,
    completion_texts,
    exact_match,
    exact_match_marked,
    find_answer,
    last_boxed,
    outside_thinking,
    text_of_completion,
)
from reward.baselines import gsm8k_linear
from reward.gsm8k import gsm8k_reward
from reward.mathematics import math_reward
from reward.numerals import last_number, value_of
from reward.sandbox import sandbox_reward

TABLE = [
    *((reward, *case, 1.0) for reward in (gsm8k_reward, math_reward) for case in RIGHT_NUMBERS),
    *((reward, *case, 0.0) for reward in (gsm8k_reward, math_reward) for case in WRONG_NUMBERS),
    *((math_reward, *case, 1.0) for case in RIGHT_MATHEMATICS),
    *((math_reward, *case, 0.0) for case in WRONG_MATHEMATICS),
]


@functools.cache
def graded(reward):
    """What a grader says of each of its rows of the table, asked in one call as in training."""
    rows = [(completion, gold) for grader, completion, gold, _ in TABLE if grader is reward]
    flags = reward([completion for completion, _ in rows], answer=[gold for _, gold in rows])
    return dict(zip(rows, flags, strict=True))


@pytest.mark.parametrize(("reward", "completion", "gold", "right"), TABLE)
def test_the_table(reward, completion, gold, right):
    assert graded(reward)[completion, gold] == right


def test_the_table_is_large_and_says_each_thing_once():
    rows = [row[:3] for row in TABLE]
    assert len(rows) == len(set(rows)) > 600
    assert {right for *_, right in TABLE} == {0.0, 1.0}


# Outputs of models that repeat themselves, and of some that try their luck.
DEGENERATE = {
    "4301 digits": "9" * 4301,
    "a box of 4301 digits": "\\boxed{" + "9" * 4301 + "}",
    "very many digits": "9" * (2 * 10**5),
    "very many braces": "{" * 2 * 10**5,
    "very many closing braces": "\\boxed{5" + "}" * 2 * 10**5 + "6",
    "boxes in boxes": "\\boxed{" * 10**5 + "}" * 10**5,
    "open boxes": "\\boxed{" * 10**5,
    "fractions in fractions": "\\boxed{" + "\\frac{1}{" * 10**5 + "2" + "}" * 10**5 + "}",
    "300 fractions in fractions": "\\boxed{" + "\\frac{1}{" * 300 + "2" + "}" * 300 + "}",
    "30 fractions in fractions": "\\boxed{" + "\\frac{1}{" * 30 + "2" + "}" * 30 + "}",
    "roots in roots": "\\boxed{" + "\\sqrt{" * 100 + "2" + "}" * 100 + "}",
    "brackets in brackets": "\\boxed{" + "(" * 200 + "x" + ")" * 200 + "}",
    "marks": "#### Step 1\n" * 10**4,
    "final answers": "#### Final Answer\n" * 10**4,
    "answers": "The answer is " * 10**4,
    "dollar signs": "$" * 2 * 10**5,
    "backslashes": "\\" * 2 * 10**5,
    "minus signs": "-" * 2 * 10**5,
    "blanks": "1" + " " * 2 * 10**5,
    "NUL": "\x00" * 2 * 10**5,
    "lone surrogates": "\ud800" * 10**5 + "\\boxed{\udfff}",
    "pictograms": "\U0001f389" * 10**5,
    "tags": "<answer>" * 10**4,
    "sums": "\\boxed{" + "1+" * 10**5 + "1}",
    "a power tower": "\\boxed{9^{9^{9^{9}}}}",
    "a power tower in Python": "9**9**9**9",
    "ten to the ten to the ten": "\\boxed{10^{10^{10}}}",
    "a small power tower": "\\boxed{10^{-10^{10}}}",
    "a tower of e": "\\boxed{e^{e^{e^{e^{e}}}}}",
    "factorials": "\\boxed{((10!)!)!}",
    "a large factorial": "\\boxed{99999999!}",
    "a large exponent": "\\boxed{1e999999999}",
    "a sine": "\\boxed{\\sin(10^{10^{10}})}",
    "a large matrix": "\\boxed{\\operatorname{zeros}(100000,100000)}",
    "a wide matrix": "\\boxed{\\begin{pmatrix}" + "1&" * 300 + "1\\end{pmatrix}}",
    "a long interval": "\\boxed{[1," + "9" * 900 + "]}",
    "a large binomial": "\\boxed{\\binom{1000000000}{500000000}}",
    "division by zero": "\\boxed{\\frac{0}{0}}",
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in DEGENERATE.items()])
def test_degenerate_outputs_are_wrong_and_take_little_time(text, monkeypatch):
    monkeypatch.setattr("reward.mathematics.TIME_LIMIT_SECONDS", 1)
    begin = time.process_time()
    assert gsm8k_reward([text], answer=["18"]) == [0.0]
    assert exact_match_marked([text], answer=["18"]) == [0.0]
    assert math_reward([text, text], answer=["18", "3\\sqrt{2}"]) == [0.0, 0.0]
    # Of this process; the limit above holds for the others.
    assert time.process_time() - begin < 10


def test_the_last_box_is_found_in_linear_time():
    begin = time.process_time()
    assert last_boxed("\\boxed{" * 20_000) is None and last_boxed("\\boxed{" * 20_000 + "}") is None
    # It takes 0.02 s. When each box was tried anew, a seventh of the text took 7 s, and twice the text four times that.
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{8 and \\boxed{7}", "7"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("} \\boxed{5}", "5"),
        ("{ \\boxed{5}", "5"),
        ("\\boxed{5} \\boxed{ }", "5"),
        ("\\boxed{}", None),
        ("boxed", None),
    ],
)
def test_the_last_closed_box(text, box):
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("text", "answer", "shown_by"),
    [
        ("#### Evelyn\nThat took 8 steps.", "Evelyn", "mark"),
        ("#### Week 1\n5\n#### Week 2\n13\nIn all 18.", None, "nothing"),
        ("#### Apples: 5\n#### Pears: 13\nIn all 18.", None, "nothing"),
        ("#### Answer\nFirst we add 5 and 13.\nThat is 18.", None, "nothing"),
        ("#### The answer is 5. #### 6", "6", "mark"),
        ("#### The answer is 5. That took 3 steps.", "5", "mark"),
        ("#### 5. That took 3 steps.", "5", "mark"),
        ("#### 5!", "5!", "mark"),
        ("The answer is correct. It is 5.", None, "nothing"),
        ("The answer is Evelyn.", "Evelyn", "said"),
        ("The answer is:\n- 5\n\nI hope so.", "5", "said"),
        ("The answer is 5 because 2 + 3 is.", "5", "said"),
        ("The answer is 5. Wait, no: 6.", "Wait, no: 6.", "nothing"),
        ("<answer>5</answer> and 6", "5", "nothing"),
        ("<answer>5</answer> and <answer>", "5", "nothing"),
        ("I write <answer> #### 5", "5", "mark"),
    ],
)
def test_where_the_answer_stands(text, answer, shown_by):
    assert find_answer(text) == (text if answer is None else answer, shown_by)


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        ("5", "5"),
        ("<think>5</think>6", "\n6"),
        ("5<think>6</think>7", "5\n7"),
        ("5</think>6", "6"),
        ("<think>5", None),
        ("5 <think>6</think> <think>", None),
        ("<think>5<think>6</think>7", "\n7"),
        ("<Thinking>5</Thinking>6", "\n6"),
        ("[THINK]5[/THINK]6", "\n6"),
        ("I think <b>5</b>", "I think <b>5</b>"),
    ],
)
def test_thinking_is_no_answer(text, outside):
    assert outside_thinking(text) == outside


def test_a_prompt_may_open_thinking():
    texts = ["5", "5</think>6"]
    assert completion_texts(texts, {"prompts": ["What? <think>\n"] * 2}) == [None, "6"]
    assert completion_texts(texts, {"prompts": ["Think in <think> tags."] * 2}) == ["5", "6"]
    begun = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "<think>"}]
    assert completion_texts(texts, {"prompts": [begun, begun]}) == [None, "6"]
    asked = [{"role": "user", "content": "Do <think>"}]
    assert completion_texts(texts, {"prompts": [asked, asked]}) == ["5", "6"]
    for reward in (gsm8k_reward, math_reward, exact_match):
        assert reward(["5", "</think>5"], answer=["5", "5"], prompts=["<think>"] * 2) == [0.0, 1.0]
        assert reward(["5", "<think>5", "<think>5</think>"], answer=["5"] * 3) == [1.0, 0.0, 0.0]


def test_only_what_the_assistant_wrote_is_an_answer():
    assistant = {"role": "assistant", "content": "6"}
    for role in ("tool", "user", "environment"):
        assert text_of_completion([assistant, {"role": role, "content": "5"}]) == ""
    assert text_of_completion([{"role": "tool", "content": "5"}, assistant]) == "6"
    assert text_of_completion([{"role": "assistant", "tool_calls": []}]) == ""
    assert text_of_completion([{"role": "assistant", "content": [{"type": "thinking", "thinking": "5"}]}]) == ""


def test_exact_match_looks_past_emphasis():
    completions = [
        "**Answer:** Paris",
        "Answer: **Paris**.",
        "Answer: `Paris`",
        "Answer: (a).",
        "Answer: Paris, France",
    ]
    golds = ["Paris", "Paris", "Paris", "A", "Paris"]
    assert exact_match_marked(completions, answer=golds) == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_values_are_exact_and_bounded():
    assert value_of("0.1 + 0.2") == value_of("3/10") and value_of("2^{-2}") == value_of("1/4")
    assert value_of("-2^2") == -4 and value_of("2^3^2") == 512 and value_of("(1 - 3) * 4 / 8") == -1
    assert value_of("9" * 1000) == 10**1000 - 1 and value_of("9" * 1001) is None
    assert value_of("10^4000") is None and value_of("2^0.5") is None and value_of("1/0") is None
    assert last_number("5 and " + "9" * 1500) is None and last_number("5 and 6 " + "x" * 5000) == 6


def test_golds_that_cannot_be_graded_are_named_before_a_run_starts():
    good = {"answer": ["#### 5", "1,000"], "prompt": ["a", "b"]}
    check_golds([gsm8k_reward, math_reward, gsm8k_linear, exact_match, sandbox_reward, "a/reward-model", max], good)
    check_golds([math_reward], Dataset.from_dict({"solution": ["so $\\boxed{5}$", "1-\\frac{1}{\\mathrm{e}}"]}))
    with pytest.raises(ValueError, match="gsm8k_reward .*2 of 3 .*'answer'.*row 1: 'five or six'.*row 2: 'None'"):
        check_golds([gsm8k_reward], {"answer": ["5", "five or six", None]})
    # The task reward inside a penalty is asked, and what a partial holds.
    for reward in (gsm8k_linear, functools.partial(gsm8k_linear)):
        with pytest.raises(ValueError, match="gsm8k_reward .*row 0"):
            check_golds([sandbox_reward, reward], Dataset.from_dict({"answer": ["5 or 6"]}))
    cases = "\\begin{cases} x & x > 0 \\\\ -x & x < 0 \\end{cases}"
    with pytest.raises(ValueError, match="math_reward .*2 of 8 .*'solution'.*row 6.*row 7"):
        check_golds([math_reward], {"solution": ["5"] * 6 + [cases, ""]})
    with pytest.raises(ValueError, match="math_reward .*'answer' or 'solution'.*'gold'"):
        check_golds([math_reward], {"gold": ["5"]})
    with pytest.raises(ValueError, match=r"mine .*1 of 2 .*'gold'.*row 1: '\[\]'"):
        check_golds([ExactMatchReward(column="gold", name="mine")], {"gold": ["Paris", []]})


def test_a_gold_answer_may_come_as_a_number():
    assert gsm8k_reward(["5", "0.5"], answer=[5, 0.5]) == math_reward(["5", "0.5"], answer=[5, 0.5]) == [1.0, 1.0]
