"""Task reward for GSM8K (arXiv 2110.14168): 1 where the final number is right, else 0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from reward.answers import FINAL_MARK, completion_texts, find_answer
from reward.numerals import LONGEST_TEXT, last_number, numbers_in, value_of


def gsm8k_reward(completions: Sequence[str | Sequence[Mapping]], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where the completion's final number equals the gold one, else 0.0: a correctness flag.

    Args:
        completions (sequence of `str`, or of lists of messages): texts, or conversations whose last message is graded.
        answer (sequence of `str`):
            The dataset's `answer` column: the gold number, alone or after ``####``; a `ValueError` where it holds none.
        columns: whatever else TRL passes. Of `prompts`, see [`reward.answers.completion_texts`].

    Returns:
        `list` of `float`: one reward for each completion, 0 for thinking that has no end.
    """
    texts = completion_texts(completions, columns)
    return [
        float(text is not None and final_number(text) == gold_number(gold))
        for text, gold in zip(texts, answer, strict=True)
    ]


def gold_number(answer: str | float) -> Fraction:
    """The number after the last ``####`` of a GSM8K answer, or in all of it where there is no such mark."""
    text = str(answer) if isinstance(answer, (str, int, float)) else ""
    text = text.rpartition(FINAL_MARK)[2]
    numbers = numbers_in(text) if len(text) <= LONGEST_TEXT else []
    if len(numbers) != 1 or numbers[0] is None:
        raise ValueError(
            f"a gold answer must hold exactly one number, alone or after '{FINAL_MARK}', but this one does not: "
            f"{str(answer)[-80:]!r}. Pass GSM8K's answer column as it is."
        )
    return numbers[0]


def final_number(text: str) -> Fraction | None:
    """The number that a text without thinking ends on, or `None`.

    It is the value of its answer ([`reward.answers.find_answer`], [`reward.numerals.value_of`]), or the last number in
    the text where nothing shows an answer, or what shows it holds no digit. Thousands commas, ``$``, ``%``, units and a
    full stop after it do not matter; ``3/4`` and ``\\frac{3}{4}`` are 0.75.
    """
    answer = find_answer(text)
    if answer.shown_by == "nothing" or (answer.shown_by != "boxed" and not re.search(r"\d", answer.text)):
        return last_number(text if answer.shown_by != "nothing" else answer.text)
    return value_of(answer.text)


def _unreadable_golds(golds: Iterable[Any]) -> list[str]:
    """The gold answers, each once, that do not hold exactly one number."""
    unreadable = {}
    for gold in golds:
        try:
            gold_number(gold)
        except ValueError:
            unreadable[str(gold)] = None
    return list(unreadable)


# For `lenvm_rl.reward_functions.check_golds`.
gsm8k_reward.gold_columns = ("answer",)
gsm8k_reward.unreadable_golds = _unreadable_golds
