"""Task reward for mathematics: 1 where math-verify holds the final answer equal to the gold one, else 0.

math-verify parses LaTeX and plain expressions with sympy and compares what they mean: `\\frac{14}{3}` is
`4\\frac{2}{3}`, a set is the same in any order, and units, degree signs, currency signs and thousands commas do not
matter. It is lenient where people are: `50\\%` equals both 50 and 0.5, `x = 5` equals 5, the open interval or point
`(-2,1)` equals the list `-2,1`, and a number in base 8 may leave out its base (naming another base is wrong).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from reward.gsm8k import FINAL_MARK, completion_text, last_boxed

# Longest time that one answer may take to be parsed, and one pair to be compared.
TIME_LIMIT_SECONDS = 5
# A longer line, in characters, is prose: as LaTeX it would only take long to parse.
LONGEST_BARE_ANSWER = 200
# What sets LaTeX off from prose; \$ is a dollar sign.
DELIMITER = re.compile(r"(?<!\\)\$|\\[(\[]")
# The base that a number names at its end, as 52_8 or 4210_{5}.
BASE = re.compile(r"\b[0-9A-Z]*\d[0-9A-Z]*_\{?(\d+)\}?$")


def math_reward(
    completions: Sequence[str | Sequence[Mapping]],
    answer: Sequence[str] | None = None,
    solution: Sequence[str] | None = None,
    **columns,
) -> list[float]:
    """1.0 where a completion's final answer equals the gold one, else 0.0: a correctness flag.

    For `reward_funcs`, as `reward.mathematics.math_reward`.

    Args:
        completions (sequence of `str`, or of lists of messages): texts, or conversations whose last message is graded.
        answer (sequence of `str`, *optional*): the dataset's column of gold answers, see [`grade`].
        solution (sequence of `str`, *optional*): used where there is no `answer` column.
        columns: whatever else TRL passes; not used.

    Returns:
        `list` of `float`: one reward for each completion.

    Raises:
        ValueError: if there is neither column, or gold answers cannot be read: all of them are named.
    """
    golds = solution if answer is None else answer
    if golds is None:
        raise ValueError("math_reward needs the dataset's column of gold answers: name it 'answer' or 'solution'.")
    unreadable = sorted({gold for gold in golds if not parsed_gold(gold)})
    if unreadable:
        raise ValueError(_unreadable(unreadable))
    return [
        float(grade(completion_text(completion), gold)) for completion, gold in zip(completions, golds, strict=True)
    ]


def grade(completion_text: str, gold_text: str) -> bool:
    """Whether the final answer of a completion equals the gold one.

    A completion's final answer is the last closed ``\\boxed{}``, or else the line after the last ``####``, or else the
    last expression, in LaTeX between its delimiters or plain. A line that is nothing but the answer needs no mark;
    at the end of a sentence, a text answer such as a name does.

    An answer that takes longer than 5 s to be parsed or compared (a power tower, say) counts as wrong, and math-verify
    logs a warning. It measures that with `SIGALRM`, which only the main thread can receive (an alarm of the program's
    own is cancelled by it). In any other thread there is no such limit: it says so in the log, and one such answer
    keeps that thread for good.

    Args:
        completion_text (`str`): the completion.
        gold_text (`str`): LaTeX, a number or a text; alone, in the last ``\\boxed{}``, or after ``####``.

    Raises:
        ValueError: if the gold answer cannot be read.
    """
    gold = parsed_gold(gold_text)
    if not gold:
        raise ValueError(_unreadable([gold_text]))
    return any(_equal(gold, found) for found in _answers(completion_text))


@lru_cache(maxsize=4096)
def parsed_gold(text: str) -> list:
    """What math-verify reads in a gold answer: a sympy expression and its LaTeX, or nothing."""
    boxed = last_boxed(text)
    found = _parse_latex(_marked_line(text).strip("$") if boxed is None else boxed)
    return [] if all(isinstance(part, str) for part in found) else found


def _unreadable(golds: Sequence[str]) -> str:
    return (
        f"{len(golds)} gold answers hold nothing that can be read, such as {list(golds[:5])}: give LaTeX, a number or "
        "a text, alone, in the last \\boxed{}, or after '####'."
    )


def _answers(text: str) -> Iterator[list]:
    """What a completion's final answer can be read as: each as [`parsed_gold`], or the LaTeX alone, or nothing."""
    boxed = last_boxed(text)
    if boxed is not None:
        yield _parse_latex(boxed)
        return
    line = _marked_line(text)
    yield _parse(line, [LatexExtractionConfig(), ExprExtractionConfig()])
    if len(line) <= LONGEST_BARE_ANSWER and "\n" not in line and not DELIMITER.search(line):
        yield _parse_latex(line)


def _marked_line(text: str) -> str:
    """The line after the last ``####``, without dollar signs, or the whole text."""
    if FINAL_MARK in text:
        return text.rpartition(FINAL_MARK)[2].strip().partition("\n")[0].replace("\\$", "").replace("$", "")
    return text.strip()


def _parse_latex(latex: str) -> list:
    return _parse(f"\\boxed{{{latex}}}", [LatexExtractionConfig()])


def _parse(text: str, extraction: list) -> list:
    found = parse(text, extraction, parsing_timeout=_time_limit())
    # Expressions lose the base, and plain numbers end before it, so the text has the last word.
    named = BASE.search(text.rstrip(" .$}"))
    return [*found, named.group()] if found and named else found


def _equal(gold: list, found: list) -> bool:
    bases = {match.group(1) for match in (BASE.search(str(parts[-1])) for parts in (gold, found) if parts) if match}
    # The order of gold and found matters: math-verify solves an equation for what the gold one says, not the other way.
    return len(bases) < 2 and verify(gold, found, timeout_seconds=_time_limit())


def _time_limit() -> int | None:
    return TIME_LIMIT_SECONDS if threading.current_thread() is threading.main_thread() else None
