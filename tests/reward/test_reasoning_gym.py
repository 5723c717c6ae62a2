"""The tasks of reasoning-gym with their own scorers."""

import json

import pytest

pytest.importorskip("reasoning_gym", reason="an extra of its own: pip install 'lenvm-rl[reasoning-gym]'")

from reward.length_reward import LengthReward
from reward.reasoning_gym import reasoning_gym_correct, reasoning_gym_reward, reasoning_gym_rows


def columns_of(rows):
    """The columns of some rows, as TRL passes them, after the way through a JSON file."""
    rows = [json.loads(json.dumps(row)) for row in rows]
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "letter_counting", "zebra_puzzles", "sudoku"])
def test_an_example_of_a_right_answer_has_the_full_score_and_a_wrong_one_not(task):
    rows = reasoning_gym_rows(task, 2, seed=4)
    columns = columns_of(rows)
    right = [f"Let me see.\n<answer>{row['answer']}</answer>" for row in rows]
    assert reasoning_gym_reward(right, **columns) == reasoning_gym_correct(right, **columns) == [1.0, 1.0]
    wrong = ["<answer>no such thing</answer>"] * 2
    assert all(score < 0.5 for score in reasoning_gym_reward(wrong, **columns))
    assert reasoning_gym_correct(wrong, **columns) == [0.0, 0.0]


def test_a_task_with_many_right_answers_is_scored_by_what_it_was_made_from():
    columns = columns_of(
        reasoning_gym_rows("graph_color", 1, seed=4, min_num_vertices=3, max_num_vertices=3, edge_probability=0.9)
    )
    assert columns["answer"] == [None]
    colourings = [{"0": a, "1": b, "2": c} for a in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2, 3)]
    scores = []
    for colouring in colourings:
        scores += reasoning_gym_reward([f"<answer>{json.dumps(colouring)}</answer>"], **columns)
    # 0.01 for what is a colouring, but no right one.
    assert {1.0, 0.01} == set(scores)


def test_only_what_stands_in_the_last_answer_tags_counts():
    rows = reasoning_gym_rows("chain_sum", 4, seed=0, min_terms=2, max_terms=2)
    answers = [row["answer"] for row in rows]
    completions = [
        answers[0],
        f"<answer>no</answer><answer> {answers[1]} </answer>",
        [{"role": "assistant", "content": f"<answer>{answers[2]}</answer>"}],
        f"<answer>{answers[3]}",
    ]
    assert reasoning_gym_correct(completions, **columns_of(rows)) == [0.0, 1.0, 1.0, 0.0]


def test_rows_hold_what_their_task_is_made_from():
    rows = reasoning_gym_rows("chain_sum", 2, seed=0, max_digits=2)
    again = reasoning_gym_rows("chain_sum", 2, seed=0, max_digits=2)
    other = reasoning_gym_rows("chain_sum", 2, seed=1, max_digits=2)
    assert rows == again and rows[0]["answer"] != other[0]["answer"]
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]
    assert json.loads(rows[0]["reasoning_gym_settings"]) == {"seed": 0, "size": 2, "max_digits": 2}
    text = reasoning_gym_rows("chain_sum", 1, seed=0, chat=False)[0]["prompt"]
    assert "<answer>" in text and text.endswith("\n")
    with pytest.raises(ValueError, match="not registered"):
        reasoning_gym_rows("no_such_task", 1, seed=0)
    with pytest.raises(ValueError, match="terms"):
        reasoning_gym_rows("chain_sum", 1, seed=0, terms=(1, 2))


def test_a_penalty_over_a_mixture_of_tasks():
    rows = reasoning_gym_rows("chain_sum", 1, seed=0) * 2 + reasoning_gym_rows("letter_counting", 1, seed=0) * 2
    completions = [f"<answer>{row['answer']}</answer>" for row in rows]
    rewards = LengthReward("gr3", reasoning_gym_correct, alpha=1.0)(
        prompts=[row["prompt"] for row in rows],
        completions=completions,
        completion_ids=[[1] * length for length in (50, 150, 10, 10)],
        **columns_of(rows),
    )
    assert rewards == pytest.approx([1 / 1.5, 1 / 2.5, 0.5, 0.5])
