"""Arithmetic questions in words: answers that the reward reads, and test numbers that no training question has."""

import json
import re

import pytest

from eval.graded import TASKS
from recipes import arithmetic_questions
from recipes.arithmetic_questions import KINDS_OF_QUESTIONS, draw_questions
from reward.gsm8k import gsm8k_reward


def write(folder, *options):
    line = ["--output_dir", str(folder), *options]
    arithmetic_questions.main(*arithmetic_questions.make_parser().parse_args_and_config(line))
    texts = {split: (folder / f"{split}.jsonl").read_text() for split in ("train", "test")}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


def numbers(row):
    return row["kind"], *sorted(map(int, re.findall(r"\d+", row["question"])))


def test_the_numbers_of_the_test_are_new(tmp_path):
    rows = write(tmp_path, "--train", "300", "--test", "50")
    assert {split: len(found) for split, found in rows.items()} == {"train": 300, "test": 50}
    assert not {numbers(row) for row in rows["train"]} & {numbers(row) for row in rows["test"]}
    assert len({row["question"] for found in rows.values() for row in found}) == 350
    assert {row["kind"] for row in rows["test"]} == set(KINDS_OF_QUESTIONS)
    again = write(tmp_path / "again", "--train", "300", "--test", "50")
    assert again == rows != write(tmp_path / "other", "--train", "300", "--test", "50", "--seed", "1")


def test_answers_are_what_the_words_say(tmp_path):
    signs = {"times": "*", "plus": "+", "buys": "+"}
    for row in write(tmp_path)["test"]:
        one, other = (int(each) for each in re.findall(r"\d+", row["question"]))
        value = {"*": one * other, "+": one + other}[signs[row["kind"]]]
        assert row["answer"] == str(value) and value > 0
        texts = [f"Let us see. The answer is {value}.", f"{value + 1}"]
        assert gsm8k_reward(texts, [row["answer"]] * 2) == [1.0, 0.0]
        assert TASKS["gsm8k"].prompt_column in row and TASKS["gsm8k"].answer_column in row


def test_what_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kinds"):
        write(tmp_path, "--kinds", "roots")
    with pytest.raises(ValueError, match="--test"):
        list(draw_questions("times", "test", 0))
