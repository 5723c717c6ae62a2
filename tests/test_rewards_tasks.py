"""Exact match, and what the adapter of reasoning-gym says where that is not installed."""

import importlib
import pickle
import sys

import pytest

from reward.exact_match import ExactMatchReward, exact_match, exact_match_last_line, exact_match_marked


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
    with pytest.raises(ValueError, match="column 'answer'"):
        exact_match(["x"])
    for gold in ("", " ", [], ["x", ""]):
        with pytest.raises(ValueError, match="is empty"):
            exact_match(["x"], answer=[gold])
    with pytest.raises(ValueError, match="is empty"):
        exact_match_marked(["x"], answer=["Answer:"])
    with pytest.raises(ValueError, match="either marker or last_line"):
        ExactMatchReward(marker="A:", last_line=True)
    with pytest.raises(ValueError, match="blank"):
        ExactMatchReward(marker=" ")
    assert ExactMatchReward(column="gold", name="mine").__name__ == "mine"
    assert ExactMatchReward(column="gold")(["x"], gold=["x"], answer=["y"]) == [1.0]


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "reward.reasoning_gym", raising=False)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        importlib.import_module("reward.reasoning_gym")
