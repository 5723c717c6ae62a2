"""Task reward for GSM8K (arXiv 2110.14168): 1 where the final number is right, else 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from reward.length_penalties import KimiLengthReward, LinearLengthReward

FINAL_MARK = "####"
BOXED = "\\boxed{"
FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A minus after a digit, a letter or a closing bracket is a subtraction or a hyphen. A digit after ^ is an exponent.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])-)?(?<!\^)(?<!\^\{)(?<![\d.])(?:\d+(?:\.\d+)?|\.\d+)(?:/0*[1-9]\d*(?![\d.]))?", re.ASCII
)


def gsm8k_reward(completions: Sequence, answer: Sequence[str], **columns) -> list[float]:
    """1.0 where the completion's final number equals the gold one, else 0.0: a correctness flag.

    Args:
        completions (sequence of `str`, or of lists of messages): texts, or conversations whose last message is graded.
        answer (sequence of `str`): the dataset's `answer` column: the gold number, alone or after ``####``.
        columns: whatever else TRL passes; not used.

    Returns:
        `list` of `float`: one reward for each completion.

    Raises:
        ValueError: if a gold answer holds no number.
    """
    return [
        float(final_number(completion_text(completion)) == gold_number(gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def completion_text(completion: str | Sequence[Mapping]) -> str:
    """The text of a completion as TRL passes it: a string, or the last message of a conversation."""
    if isinstance(completion, str):
        return completion
    if not completion:
        return ""
    content = completion[-1]["content"]
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part["type"] == "text")


def gold_number(answer: str) -> Fraction:
    """The number after the last ``####`` of a GSM8K answer, or in all of it where there is no such mark."""
    numbers = _numbers(answer.rpartition(FINAL_MARK)[2])
    if len(numbers) != 1:
        raise ValueError(
            f"a gold answer must hold exactly one number, alone or after '{FINAL_MARK}', but this one does not: "
            f"{answer[-80:]!r}. Pass GSM8K's answer column as it is."
        )
    return numbers[0]


def final_number(text: str) -> Fraction | None:
    """The number that a completion ends on, or `None`.

    It is the last one in the last ``\\boxed{}``, or else the first one after the last ``####``, or else the last one in
    the text. Thousands commas, ``$``, ``%`` and a full stop after it do not matter; ``3/4`` and ``\\frac{3}{4}`` are
    0.75.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return next(iter(_numbers(boxed)[-1:]), None)
    if FINAL_MARK in text:
        return next(iter(_numbers(text.rpartition(FINAL_MARK)[2])), None)
    return next(iter(_numbers(text)[-1:]), None)


def _numbers(text: str) -> list[Fraction]:
    text = text.replace("\u2212", "-").replace("\\$", "").replace("$", "").replace("{,}", ",").replace("\\!", "")
    text = THOUSANDS_COMMA.sub("", FRACTION.sub(r"\1/\2", text))
    numbers = []
    for match in NUMBER.finditer(text):
        above, _, under = match.group().partition("/")
        numbers.append(Fraction(above) / Fraction(under or 1))
    return numbers


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{}`` that is closed, braces inside it matched."""
    begin = text.rfind(BOXED)
    while begin >= 0:
        depth = 1
        for position in range(begin + len(BOXED), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin + len(BOXED) : position]
        begin = text.rfind(BOXED, 0, begin)
    return None


# Ready for `reward_funcs`, as `reward.gsm8k.gsm8k_linear`: correct answers earn 1 down to 0.6 at 512 tokens, so that
# the default gate_threshold of 0.5 still tells them from wrong ones, which earn 0.
gsm8k_linear = LinearLengthReward(gsm8k_reward, alpha=0.4, max_length=512)
# Kimi's length term alone: give it beside `reward.gsm8k.gsm8k_reward`, weighted by `reward_weights`.
gsm8k_kimi = KimiLengthReward(gsm8k_reward)
