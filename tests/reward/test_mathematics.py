"""Grading by math-verify: forms of an answer, what is wrong, threads and time limits, and real data."""

import json
import logging
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from places import DATA

from lenvm_rl.reward_functions import load_reward
from reward import mathematics
from reward.mathematics import is_right, math_reward

MATH500, GSM8K = DATA / "math500" / "math500_test.json", DATA / "gsm8k"
needs_math500 = pytest.mark.skipif(
    not MATH500.is_file(), reason=f"{MATH500} is absent: set LENVM_RL_DATA to a folder with math500/math500_test.json"
)
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_dir(), reason=f"GSM8K is not at {GSM8K}: set LENVM_RL_DATA to a folder with gsm8k/test.jsonl"
)
# Problems of MATH-500 whose gold answer equals another problem's though it is written differently and means something
# else. A point or an open interval against a list, and units that are dropped, are math-verify's leniency.
SAME_TO_MATH_VERIFY = {("(-2,1)", "-2,1"), ("(-2,1)", "1,-2"), ("36^\\circ", "\\$36")}


def math500():
    return json.loads(MATH500.read_text(encoding="utf-8"))


def gsm8k(name):
    return [json.loads(row) for row in (GSM8K / name).read_text(encoding="utf-8").split("\n") if row]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("4\\frac{2}{3}", "\\frac{14}{3}"),
        ("14/3", "\\frac{14}{3}"),
        ("\\dfrac{14}{3}\\text{ cm}", "\\frac{14}{3}"),
        ("0.3333333", "\\frac{1}{3}"),
        ("(3, 4]", "(3,4]"),
        ("(0,9)\\cup(9,36)", "(0,9) \\cup (9,36)"),
        ("[-2,7]", "x \\in [-2,7]"),
        ("-2, 1", "1,-2"),
        ("1+\\sqrt{19}, 1-\\sqrt{19}", "1 \\pm \\sqrt{19}"),
        ("Evelyn", "\\text{Evelyn}"),
        ("C", "\\text{(C)}"),
        ("\\begin{bmatrix} 0.2 \\\\ -3.6 \\end{bmatrix}", "\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}"),
        ("90", "90^\\circ"),
        ("\\frac{270}{7}^\\circ", "\\frac{270}7\\text{ degrees}"),
        ("50", "50\\%"),
        ("864", "864 \\mbox{ inches}^2"),
        ("32348\\text{ dollars}", "\\$32,\\!348"),
        ("4210_5", "4210_{5}"),
        ("52", "52_8"),
        ("5", "x=5"),
        ("2(k+1)", "2k+2"),
        ("-5x+7y-11z-4=0", "5x - 7y + 11z + 4 = 0"),
    ],
)
def test_one_answer_in_two_forms_is_the_same_wherever_it_stands(answer, gold):
    boxed = f"\\boxed{{{answer}}}"
    for completion in (answer, f"So ${boxed}$.", f"It is 7, no: {boxed}", f"The answer is ${answer}$."):
        assert is_right(completion, gold), completion
    assert is_right(f"reasons\n#### {answer}\nThat took 8 steps.", f"2 + 3 = ...\n#### {gold}")


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("\\boxed{0.33}", "\\frac{1}{3}"),
        ("\\boxed{[3,4]}", "(3,4]"),
        ("\\boxed{52_7}", "52_8"),
        ("It is 52_7.", "52_8"),
        ("\\boxed{Evelin}", "\\text{Evelyn}"),
        ("\\boxed{1}", "1,-2"),
        ("\\boxed{y=5}", "x=5"),
        ("\\boxed{\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("\\boxed{5} and so \\boxed{6}", "5"),
        ("\\boxed{none}, as 5 is too much", "5"),
        ("It is 5. Wait, it is 6.", "5"),
        ("Therefore \\boxed{", "5"),
        ("", "5"),
    ],
)
def test_a_wrong_answer_or_none_is_wrong(completion, gold):
    assert not is_right(completion, gold)


def test_the_reward_takes_texts_and_conversations_and_either_column():
    completions = [
        "so \\boxed{5}",
        [{"role": "assistant", "content": "so \\boxed{6}"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "it is "}, {"type": "text", "text": "$5$"}]}],
        [],
    ]
    assert math_reward(completions, answer=["5"] * 4, prompts=None) == [1.0, 0.0, 1.0, 0.0]
    assert math_reward(completions, solution=["so $\\boxed{5}$"] * 4) == [1.0, 0.0, 1.0, 0.0]
    assert math_reward(completions, answer=["6"] * 4, solution=["\\boxed{5}"] * 4) == [0.0, 1.0, 0.0, 0.0]


def test_a_dotted_path_and_a_pickle_lead_to_the_reward():
    again = pickle.loads(pickle.dumps(load_reward("reward.mathematics.math_reward")))
    assert again is math_reward and again.__name__ == "math_reward"


def test_gold_answers_that_cannot_be_read_are_named():
    unreadable = ["\\frac{1", "", "\\boxed{}", "\\begin{cases} x \\\\ y \\end{cases}", None, ["5"]]
    assert math_reward.unreadable_golds(["5", "x", *unreadable, "\\text{east}", ""]) == [
        str(gold) for gold in unreadable
    ]
    assert math_reward.unreadable_golds(["1-\\frac{1}{\\mathrm{e}}", "(C)", "x \\in [-2,7]", 5, 0.5]) == []
    with pytest.raises(ValueError, match=r"2 gold answers.*\['', '####'\]"):
        math_reward(["5"] * 4, answer=["5", "####", "", "####"])
    with pytest.raises(ValueError, match="1 gold answers"):
        is_right("5", "")
    with pytest.raises(ValueError, match="'answer' or 'solution'"):
        math_reward(["5"])


def test_what_takes_too_long_is_wrong_and_said(monkeypatch, caplog):
    monkeypatch.setattr(mathematics, "TIME_LIMIT_SECONDS", 1)
    mine = signal.getsignal(signal.SIGALRM)
    slow, right = "\\boxed{\\binom{1000000000}{500000000}}", "\\boxed{3\\sqrt{2}}"
    with caplog.at_level(logging.WARNING, logger="reward.timed_calls"):
        assert math_reward([slow, right, slow + "!"], answer=["\\sqrt{18}"] * 3) == [0.0, 1.0, 0.0]
    assert caplog.text.count("took more than 1 s") == 1 and "binom" in caplog.text
    assert signal.getsignal(signal.SIGALRM) is mine
    caplog.clear()
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING, logger="reward.timed_calls"):
        assert pool.submit(math_reward, [slow, right], answer=["\\sqrt{18}"] * 2).result(timeout=60) == [0.0, 1.0]
    assert "took more than 1 s" in caplog.text


def test_worker_threads_grade_as_the_main_thread_does():
    pairs = [(f"\\boxed{{\\frac{{{n}}}{{7}}}}", f"{n + n % 2}/7") for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: is_right(*pair), pairs))
    assert found == [is_right(*pair) for pair in pairs] == [n % 2 == 0 for n in range(40)]


@needs_math500
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_every_gold_answer_of_math500_is_right_and_the_next_ones_wrong(every):
    rows = math500()
    assert len(rows) == 500
    golds = [row["answer"] for row in rows]
    forms = [
        golds,
        [f"The answer is $\\boxed{{{gold}}}$." for gold in golds],
        [f"So it is ${gold}$." for gold in golds],
    ]
    forms += [[f"#### Final Answer\n{gold}" for gold in golds], [row["solution"] for row in rows]]
    for texts in forms:
        found = math_reward(texts[::every], answer=golds[::every])
        assert [gold for gold, right in zip(golds[::every], found, strict=True) if not right] == []
    pairs = list(zip(golds, golds[1:], strict=False))[::every]
    found = math_reward([f"\\boxed{{{other}}}" for _, other in pairs], answer=[one for one, _ in pairs])
    right = {pair for pair, flag in zip(pairs, found, strict=True) if flag}
    assert right == {(one, other) for one, other in pairs if one == other or (one, other) == ("5", "x=5")}
    assert every > 1 or right == {("5", "x=5"), ("7", "7"), ("3", "3")}


@needs_math500
@pytest.mark.slow
def test_different_gold_answers_of_math500_are_told_apart():
    # Every pair: 30102 comparisons.
    golds = sorted({row["answer"] for row in math500() if not row["answer"].removeprefix("-").isdigit()})
    pairs = [(one, other) for one in golds for other in golds if one != other]
    found = math_reward([f"\\boxed{{{other}}}" for _, other in pairs], answer=[one for one, _ in pairs])
    same = {tuple(sorted(pair)) for pair, flag in zip(pairs, found, strict=True) if flag}
    spellings = {("2 \\sqrt{5}", "2\\sqrt{5}"), ("\\frac14", "\\frac{1}{4}"), ("-2,1", "1,-2")}
    expected = {tuple(sorted(pair)) for pair in SAME_TO_MATH_VERIFY | spellings}
    assert same == expected


@needs_gsm8k
@pytest.mark.parametrize(("every", "repeated"), [(10, 1), pytest.param(1, 15, marks=pytest.mark.slow)])
def test_every_gold_answer_of_gsm8k_is_right_and_the_next_one_wrong(every, repeated):
    answers = [row["answer"] for row in gsm8k("test.jsonl")]
    assert len(answers) == 1319
    pairs = list(zip(answers, answers[1:] + answers[:1], strict=True))[::every]
    golds, others = ([pair[place] for pair in pairs] for place in (0, 1))
    finals = [gold.rpartition("####")[2].strip() for gold in golds]
    assert math_reward(golds, answer=golds) == [1.0] * len(golds)
    assert math_reward([f"The answer is ${final}." for final in finals], answer=golds) == [1.0] * len(golds)
    same = [final == other.rpartition("####")[2].strip() for final, other in zip(finals, others, strict=True)]
    assert math_reward(others, answer=golds) == [float(flag) for flag in same]
    assert sum(same) == repeated


@needs_gsm8k
@pytest.mark.parametrize(("every", "right"), [(10, 202), pytest.param(1, 2001, marks=pytest.mark.slow)])
def test_real_completions_are_graded_as_their_authors_graded_them(every, right):
    systems = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    rows = [(row, system) for row in gsm8k("example_model_solutions.jsonl")[::every] for system in systems]
    mine = math_reward(
        [row[system]["solution"] for row, system in rows],
        answer=[row["ground_truth"].replace("A:", "####") for row, _ in rows],
    )
    theirs = [float(row[system]["is_correct"]) for row, system in rows]
    assert mine == theirs and len(mine) == 4 * -(-1319 // every) and sum(theirs) == right
