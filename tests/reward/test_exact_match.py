"""Exact match, and the adapter of reasoning-gym where that is not installed, or a stand-in for it is."""

import importlib
import pickle
import sys

import pytest

from reward import timed_calls
from reward.answers import ExactMatchReward, exact_match, exact_match_last_line, exact_match_marked


@pytest.mark.parametrize(
    ("reward", "completion", "gold", "expected"),
    [
        (exact_match, " Paris\n", "Paris", 1.0),
        (exact_match, "New \n York", "New York", 1.0),
        (exact_match, "paris", "Paris", 0.0),
        (exact_match, "It is Paris", "Paris", 0.0),
        (exact_match, "", "Paris", 0.0),
        (exact_match, "two", ["2", "two"], 1.0),
        (exact_match_last_line, "I think of France.\n\nPARIS\n", "Paris", 1.0),
        (exact_match_last_line, "Paris\nor not", "Paris", 0.0),
        (exact_match_last_line, "  ", "Paris", 0.0),
        (exact_match_marked, "Answer: Rome. No.\nAnswer: paris\nI am sure.", "Paris", 1.0),
        (exact_match_marked, "Answer:\nParis", "Answer: Paris", 1.0),
        (exact_match_marked, "Paris", "Paris", 0.0),
        (exact_match_marked, "Answer:", "Paris", 0.0),
    ],
)
def test_exact_match(reward, completion, gold, expected):
    chat = [{"role": "assistant", "content": completion}]
    assert reward([completion, chat], answer=[gold, gold], prompts=None) == [expected, expected]
    assert pickle.loads(pickle.dumps(reward))([completion], answer=[gold]) == [expected]


def test_exact_match_says_what_is_wrong():
    with pytest.raises(ValueError, match="'answer'"):
        exact_match(["x"])
    for gold in ("", " ", [], ["x", ""]):
        with pytest.raises(ValueError, match="'answer'"):
            exact_match(["x"], answer=[gold])
    with pytest.raises(ValueError, match="'answer'"):
        exact_match_marked(["x"], answer=["Answer:"])
    with pytest.raises(ValueError, match="marker.*last_line"):
        ExactMatchReward(marker="A:", last_line=True)
    with pytest.raises(ValueError, match="marker"):
        ExactMatchReward(marker=" ")
    assert ExactMatchReward(column="gold", name="mine").__name__ == "mine"
    assert ExactMatchReward(column="gold")(["x"], gold=["x"], answer=["y"]) == [1.0]


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "reward.reasoning_gym", raising=False)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        importlib.import_module("reward.reasoning_gym")


STAND_IN = """
import time

SYSTEM_PROMPTS = {"default": "Answer between tags."}


def extract_answer(text):
    return text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else None


class create_dataset:
    def __init__(self, name, **settings):
        if name != "double":
            raise ValueError("not registered")

    def __getitem__(self, index):
        return {"question": str(index), "answer": str(2 * index)}

    def score_answer(self, answer, entry):
        if answer == "slow":
            time.sleep(60)
        return 1.0 if int(answer) == int(entry["answer"]) else 0.01
"""


@pytest.fixture
def adapter(monkeypatch, tmp_path):
    """`reward.reasoning_gym` over a stand-in for the package, and processes that see it."""
    package = tmp_path / "reasoning_gym"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "utils.py").write_text("from reasoning_gym import SYSTEM_PROMPTS, extract_answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(timed_calls, "_workers", {})
    names = ("reward.reasoning_gym", "reasoning_gym", "reasoning_gym.utils")
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield importlib.import_module("reward.reasoning_gym")
    for workers in timed_calls._workers.values():
        workers.close()
    for name in names:
        sys.modules.pop(name)
    sys.modules.update(kept)


def test_an_answer_that_a_scorer_cannot_take_is_wrong_and_stops_nothing(adapter, monkeypatch, caplog):
    monkeypatch.setattr(adapter, "TIME_LIMIT_SECONDS", 0.5)

    def columns(task, count):
        made_from = {"reasoning_gym_task": task, "reasoning_gym_settings": "{}", "reasoning_gym_index": 3}
        return {name: [value] * count for name, value in made_from.items()}

    answers = ["<answer>6</answer>", "<answer>7</answer>", "<answer>slow</answer>", "<answer>six</answer>", "6"]
    answers += ["<think><answer>6</answer></think>", "<think><answer>6</answer>", "<think>7</think><answer>6</answer>"]
    expected = [1.0, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert adapter.reasoning_gym_reward(answers, **columns("double", 8)) == expected
    assert "took more than 0.5 s" in caplog.text and "ValueError" in caplog.text
    assert adapter.reasoning_gym_correct(answers[:2], **columns("double", 2)) == [1.0, 0.0]
    # A task that cannot be made is a mistake in the data, not in an answer.
    with pytest.raises(ValueError, match="not registered"):
        adapter.reasoning_gym_reward(answers[:1], **columns("other", 1))
