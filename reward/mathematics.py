"""Task reward for mathematics: 1 where the final answer means the same as the gold one, else 0.

Numbers, words and letters of a choice are compared here, all else by math-verify: `\\frac{14}{3}` is `4\\frac{2}{3}`, a
set is the same in any order, and units, degree signs, currency signs and thousands commas do not matter. It is lenient
where people are: `50\\%` equals both 50 and 0.5, `x = 5` equals 5, the open interval or point `(-2,1)` equals the list
`-2,1`, and a number in base 8 may leave out its base (naming another base is wrong). math-verify runs in processes that
end with an answer that takes too long (`reward.timed_calls`), so nothing that a model writes can stop a run, in
whatever thread it is graded.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from reward.answers import FINAL_MARK, FinalAnswer, bare, completion_texts, find_answer, last_boxed, outside_thinking
from reward.numerals import LONGEST_TEXT, canonical, value_of
from reward.timed_calls import call_all

try:
    import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError as error:
    raise ImportError("reward.mathematics needs math-verify: pip install 'lenvm-rl[math]'") from error

# Longest time that one answer may take to be parsed and compared.
TIME_LIMIT_SECONDS = 5
# Longest text, in characters, that is parsed: the time grows faster than the length.
LONGEST_PARSED = 1000
# Numbers of more digits are compared as they are written.
MOST_WORKED_OUT = 100_000
# Values that differ by more than this part of the larger one are two. A decimal may be rounded; sums and integrals are
# worked out to about 15 digits, all else to 100.
ROUNDED, SUMMED, EXACT = 1e-3, 1e-12, 1e-50
# What a percent sign multiplies by, in one release of math-verify or another.
PERCENT = {sympy.Rational(1, 100), sympy.UnevaluatedExpr(sympy.Rational(1, 100))}
# The base that a number names at its end, as 52_8 or 4210_{5}.
BASE = re.compile(r"\b[0-9A-Z]*\d[0-9A-Z]*_\{?(\d+)\}?$")
REWRITTEN = tuple(
    (re.compile(pattern), written)
    for pattern, written in (
        # No blank before what is no letter: math-verify takes " e }" for a unit.
        (r"(?<=[a-zA-Z])\\(?:text|math|operator)[a-z]*\s*\{\s*([ei])\s*\}", r" \1"),
        (r"\\(?:text|math|operator)[a-z]*\s*\{\s*([ei]|[-+\d.,/ ]+)\s*\}", r"\1"),
        (r"\\R(?![a-zA-Z])|\\mathbf\s*(?:\{R\}|R(?![a-zA-Z]))", r"\\mathbb{R} "),
        (r"\\(?:underline|mathbf|boldsymbol|bm|emph|textcolor\s*\{\w*\})\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:[Bb]igg?[lrm]?|limits|(?:display|text)style|(?:left|right)\.)(?![a-zA-Z])", ""),
        (r"\\(?:bf|rm|it|[lL]arge|LARGE|[hH]uge|color\s*\{\w*\})(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\\degree(?![a-zA-Z])", r"^\\circ "),
        (r"\\langle\s*([^\\]*,[^\\]*)\\rangle", r"(\1)"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<=[\d}\s])(?:mm|cm|km|in|ft|yd|mi)\s*\^\s*\{?[23]\}?\s*$", ""),
        (r"^\s*(?:=|\\approx)\s*", ""),
    )
)
# A longer line, in characters, is prose: as LaTeX it would only take long to parse.
LONGEST_BARE_ANSWER = 200
# What sets LaTeX off from prose; \$ is a dollar sign.
DELIMITED = re.compile(r"(?<!\\)\$([^$\n]+)(?<!\\)\$")
DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
TEXT_COMMAND = re.compile(r"\\(?:text[a-z]*|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}")
LABEL = re.compile(
    r"\s*(?:[A-Za-z][A-Za-z' -]+:\s+"
    r"|(?:\\text[a-z]*\s*\{)?\(\s*[A-J]\s*\)\s*\}?(?:\s|\\[ ,;:]|~|\\q?quad)+(?=[\w\\-])|[A-J][.:)]\s+)(?=\S)"
)
GOLD_CHOICE = re.compile(r"\s*\(?\s*([A-J])\s*\)?\s*")
CHOICE = re.compile(
    r"\s*(?:[Oo]ption|[Cc]hoice)?\s*"
    r"(?:[(\[]\s*([A-Ja-j])\s*[)\]]"
    r"|([A-J])(?:[.:)]+(?=\s|\Z)|\Z|(?=,?\s+(?:because|since|as|which)\b|\s+[-(]))"
    r"|([a-j])\Z)(?!\s*(?:or\b|and\b|[,/&]|\(\s*[A-J]\s*\)))"
)
CHOSEN = re.compile(r"\(([A-J])\)|\b(?:[Oo]ption|[Cc]hoice)\s+(?:is\s+)?([A-J])\b|\$([A-J])\$")
EMPHASIS = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(-])")
WORDS = re.compile(r"[^\W\d_][^\d\\^_={}<>+*/|()\[\]$]*")
ARTICLE = re.compile(r"\A(?:an?|the)\s")
LONG_WORD = re.compile(r"(?!infinity)[^\W\d_]{4}")
NUMBER_FIRST = re.compile(r"\s*(?:[-+(.\d$€£¥]|\\[dtc]?frac|\\\$|\\left)")


def math_reward(
    completions: Sequence[str | Sequence[Mapping]],
    answer: Sequence[str] | None = None,
    solution: Sequence[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 where a completion's final answer equals the gold one, else 0.0: a correctness flag.

    Args:
        completions (sequence of `str`, or of lists of messages): texts, or conversations whose last message is graded.
        answer (sequence of `str`, *optional*): the dataset's column of gold answers, see [`is_right`].
        solution (sequence of `str`, *optional*): used where there is no `answer` column.
        columns: whatever else TRL passes. Of `prompts`, see [`reward.answers.completion_texts`].

    Returns:
        `list` of `float`: one reward for each completion.

    Raises:
        ValueError: if there is neither column, or gold answers cannot be read: they are named.
    """
    golds = solution if answer is None else answer
    if golds is None:
        raise ValueError("math_reward needs the dataset's column of gold answers: name it 'answer' or 'solution'.")
    return [float(right) for right in _grade_all(completion_texts(completions, columns), golds)]


def is_right(completion_text: str, gold_text: str) -> bool:
    """Whether the final answer of a completion equals the gold one.

    [`reward.answers.find_answer`] finds the answer. Where nothing shows it, it is the last expression, in LaTeX between
    its delimiters or plain. A line that is nothing but the answer needs no mark; inside a sentence, a text answer such
    as a name does. Thinking that has no end is wrong, and so is an answer that takes longer than 5 s: the log says so.

    Args:
        completion_text (`str`): the completion.
        gold_text (`str`): LaTeX, a number or a text; alone, in the last ``\\boxed{}``, or after ``####``.

    Raises:
        ValueError: if the gold answer cannot be read.
    """
    return _grade_all([outside_thinking(completion_text)], [gold_text])[0]


def _unreadable_golds(golds: Iterable[Any]) -> list[str]:
    """The gold answers, each once, that cannot be read, do not equal themselves, or take too long."""
    texts = {str(gold): _as_text(gold) for gold in golds}
    readable = _readable(texts.values())
    return [gold for gold, text in texts.items() if not readable[text]]


# For `lenvm_rl.reward_functions.check_golds`.
math_reward.gold_columns = ("answer", "solution")
math_reward.unreadable_golds = _unreadable_golds

# What was found out about gold answers so far.
_known: dict[str, bool] = {}


def _readable(golds: Iterable[str]) -> dict[str, bool | None]:
    """Whether each gold answer can be read; `None` where that took too long."""
    golds = list(dict.fromkeys(golds))
    asked = []
    for gold in golds:
        if gold not in _known:
            shown = _gold(gold)
            if GOLD_CHOICE.fullmatch(_unworded(shown)) or _words(shown) or _gold_value(shown) is not None:
                _known[gold] = True
            else:
                asked.append(gold)
    found = call_all(is_readable, [[_gold(gold)] for gold in asked], limit=TIME_LIMIT_SECONDS, otherwise=None)
    _known.update((gold, answer) for gold, answer in zip(asked, found, strict=True) if answer is not None)
    return {gold: _known.get(gold) for gold in golds}


def _grade_all(texts: Sequence[str | None], golds: Sequence[Any]) -> list[bool]:
    """Whether each text, `None` where thinking has no end, gives its gold answer."""
    golds = [_as_text(gold) for gold in golds]
    unreadable = sorted(gold for gold, found in _readable(golds).items() if found is False)
    if unreadable:
        raise ValueError(
            f"{len(unreadable)} gold answers hold nothing that can be read, such as {unreadable[:5]}: give LaTeX, a "
            "number or a text, alone, in the last \\boxed{}, or after '####', or leave their rows out."
        )
    verdicts = [_compare(text, _gold(gold)) for text, gold in zip(texts, golds, strict=True)]
    asked = list(dict.fromkeys(verdict for verdict in verdicts if not isinstance(verdict, bool)))
    found = call_all(means_the_same, asked, limit=TIME_LIMIT_SECONDS, otherwise=False)
    answers = dict(zip(asked, found, strict=True))
    return [verdict if isinstance(verdict, bool) else answers[verdict] for verdict in verdicts]


def _as_text(gold: Any) -> str:
    """A gold answer as text; what is neither text nor number holds nothing."""
    if isinstance(gold, str):
        return gold
    return str(gold) if isinstance(gold, (int, float)) and not isinstance(gold, bool) else ""


def _gold(text: str) -> str:
    """What stands in the last ``\\boxed{}`` of a gold answer, or after its last ``####``, or all of it."""
    boxed = last_boxed(text)
    if boxed is None and FINAL_MARK in text:
        return _clean(text.rpartition(FINAL_MARK)[2].strip().partition("\n")[0])
    return _clean(text if boxed is None else boxed)


def _compare(text: str | None, gold: str) -> bool | tuple[str, tuple[tuple[str, str], ...]]:
    """Whether a text gives a gold answer, or what to ask [`means_the_same`]."""
    if text is None:
        return False
    answer = find_answer(text)
    choice, words, number = GOLD_CHOICE.fullmatch(_unworded(gold)), _words(gold), _gold_value(gold)
    if answer.shown_by in ("mark", "said") and not (choice or words) and _words(answer.text):
        # A heading or a remark, where no words are asked for.
        answer = FinalAnswer(text, "nothing")
    shown = answer.text if answer.shown_by != "nothing" else (text.strip().splitlines() or [""])[-1]
    # No gold answer is as long as that, and what else a line holds is no answer.
    shown = shown if len(shown) <= LONGEST_TEXT else ""
    formulas = DELIMITED.findall(shown)
    shown = _clean(shown)
    if shown and _spaced(shown) == _spaced(gold):
        return True
    if wholly := TEXT_COMMAND.fullmatch(shown):
        shown = _clean(wholly[1])
    if choice:
        chosen = CHOICE.match(_unworded(shown)) or [None, *CHOSEN.finditer(_unworded(answer.text))][-1]
        return chosen is not None and next(filter(None, chosen.groups())).upper() == choice[1]
    if words:
        return words in [_parts(part) for part in (shown, *formulas[-1:])]
    if answer.shown_by == "nothing":
        sentence = _clean(re.split(r"[.!?]\s+(?=[A-Z])", shown)[-1])
        if number is not None and value_of(sentence, strict=True) == number:
            return True
        readings = [("prose", answer.text[-LONGEST_PARSED * 2 // 3 :])]
        if len(shown) <= LONGEST_BARE_ANSWER and not formulas:
            readings.append(("latex", shown))
        return gold, tuple(readings)
    shown = LABEL.sub("", shown, count=1)
    value = value_of(shown, strict=True) if number is not None else None
    if value is not None:
        return _same_number(value, number, rounded="." in shown or "." in gold)
    readings = [("latex", shown)]
    if formulas and DELIMITERS.sub("", answer.text).strip() != DELIMITERS.sub("", formulas[0]).strip():
        readings.append(("prose", answer.text[-LONGEST_PARSED * 2 // 3 :]))
    return gold, tuple(readings)


def _same_number(value: Fraction, gold: Fraction, rounded: bool) -> bool:
    """Whether two numbers are equal, or, where one is a decimal, alike in six places as math-verify has it."""
    if value == gold or not rounded:
        return value == gold
    return round(value, 6) == round(gold, 6) and abs(value - gold) <= ROUNDED * max(abs(value), abs(gold))


def _gold_value(gold: str) -> Fraction | None:
    """The number that a gold answer is, with a unit or without."""
    return value_of(gold, strict=True) if "=" not in gold and NUMBER_FIRST.match(gold) else None


def _clean(text: str) -> str:
    return bare(EMPHASIS.sub("", DELIMITERS.sub("", text)))


def _spaced(text: str) -> str:
    return " ".join(canonical(_unworded(text)).split()).casefold()


def _unworded(text: str) -> str:
    return TEXT_COMMAND.sub(r" \1 ", TEXT_COMMAND.sub(r" \1 ", text)).strip()


def _words(text: str) -> tuple[str, ...] | None:
    """The names or other words that a gold answer is, in alphabetical order; `None` where it is something else."""
    unworded = _unworded(text)
    letters = sum(map(str.isalpha, unworded))
    if WORDS.fullmatch(unworded) and (LONG_WORD.search(unworded) or (unworded != text and letters > 1)):
        return _parts(text)
    return None


def _parts(text: str) -> tuple[str, ...]:
    parts = re.split(r"[,;&]|\band\b", _unworded(text).casefold())
    return tuple(sorted(filter(None, (ARTICLE.sub("", " ".join(part.split()).strip(".\"'")) for part in parts))))


# What follows runs in `reward.timed_calls`: here is no time limit. math-verify parses LaTeX and plain expressions with
# sympy. What it misreads is put into other words first (`_spelled`), and two of its verdicts are not left to it: on
# numbers so small that it rounds them to 0, and on numbers too large to be worked out.


def is_readable(gold: str) -> bool:
    """Whether math-verify reads a gold answer, and holds it equal to itself."""
    parsed = _latex(gold)
    return not all(isinstance(part, str) for part in parsed) and _equal(parsed, parsed)


def means_the_same(gold: str, readings: Sequence[Sequence[str]]) -> bool:
    """Whether one of several readings of an answer equals the gold one.

    Args:
        gold (`str`): LaTeX.
        readings (sequence of pairs): `"latex"` and the answer, or `"prose"` and a text that ends on it.
    """
    read = {"latex": _latex, "prose": _prose}
    return any(_equal(_latex(gold), read[kind](text)) for kind, text in readings)


def _spelled(text: str) -> str:
    """`text` in LaTeX that math-verify reads as it is meant."""
    text = canonical(text)
    for pattern, written in REWRITTEN:
        text = pattern.sub(written, text)
    return text


@lru_cache(maxsize=4096)
def _latex(latex: str) -> list:
    return _parse(f"\\boxed{{{_spelled(latex)}}}", [LatexExtractionConfig()])


def _prose(text: str) -> list:
    # What is said to be the answer has been looked for: math-verify takes any number near the word for it.
    text = re.sub("answer", "result", text, flags=re.IGNORECASE)
    return _parse(_spelled(text), [LatexExtractionConfig(), ExprExtractionConfig()])


def _parse(text: str, extraction: list) -> list:
    """A sympy expression and its LaTeX, or the LaTeX alone, or nothing."""
    if len(text) > LONGEST_PARSED:
        return []
    found = parse(text, extraction, parsing_timeout=None)
    # Expressions lose the base, and plain numbers end before it, so the text has the last word.
    named = BASE.search(text.rstrip(" .$}"))
    return [*found, named.group()] if found and named else found


def _equal(gold: list, found: list) -> bool:
    bases = {match.group(1) for match in (BASE.search(str(parts[-1])) for parts in (gold, found) if parts) if match}
    if len(bases) > 1 or not gold or not found:
        return False
    if max(map(_digits, (gold[0], found[0]))) > MOST_WORKED_OUT:
        return gold[0] == found[0]
    # The order of gold and found matters: math-verify solves an equation for what the gold one says, not the other way.
    return verify(gold, found, timeout_seconds=None) and not _apart(_right_side(gold[0]), _right_side(found[0]))


def _right_side(value):
    return value.rhs if isinstance(value, sympy.Eq) else value


def _apart(one, other) -> bool:
    """Whether two values that math-verify holds equal are different numbers, or hold some."""
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
        return any(itertools.starmap(_apart, zip(one.flat(), other.flat(), strict=False)))
    if isinstance(one, sympy.Interval) and isinstance(other, sympy.Interval):
        return _apart(one.start, other.start) or _apart(one.end, other.end)
    if isinstance(one, (sympy.FiniteSet, sympy.Tuple)) and isinstance(other, (sympy.FiniteSet, sympy.Tuple)):
        return any(all(_apart(mine, theirs) for theirs in other.args) for mine in one.args)
    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (one, other)):
        return False
    # 50% equals both 50 and 0.5.
    if any(PERCENT.intersection(value.args) for value in (one, other)):
        return False
    difference, *sizes = (sympy.Abs(value).evalf(20) for value in (one - other, one, other))
    if not all(value.is_Float or value.is_Integer for value in (difference, *sizes)):
        return False
    kinds = (
        (ROUNDED, sympy.Float),
        (SUMMED, (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit)),
        (EXACT, sympy.Expr),
    )
    tolerance = next(size for size, kind in kinds if one.has(kind) or other.has(kind))
    return bool(difference > tolerance * max(sizes))


def _digits(value) -> float:
    """About how many digits the largest whole number has that comes up when a value is worked out."""
    if isinstance(value, sympy.MatrixBase):
        return max((_digits(entry) for entry in value.flat()), default=0)
    if not isinstance(value, sympy.Basic):
        return 0
    if isinstance(value, sympy.Rational):
        return max(abs(value.p), value.q).bit_length() * math.log10(2)
    sizes = [_digits(part) for part in value.args]
    if isinstance(value, (sympy.Pow, sympy.exp, sympy.factorial)) and value.args[-1].is_number:
        repeated = {sympy.Pow: sizes[0], sympy.factorial: sizes[-1]}.get(type(value), 1.0)
        return max(1.0, repeated) * _size(value.args[-1], sizes[-1])
    return sum(sizes) if isinstance(value, sympy.Mul) else max(sizes, default=0)


def _size(value, digits: float) -> float:
    """About how large an exponent or the argument of a factorial is, itself of so many digits."""
    if digits > 15:
        return math.inf
    return abs(float(value)) if value.is_Rational or value.is_Float else 10**digits
