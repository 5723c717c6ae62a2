"""Answers compared by what they mean, with math-verify. `reward.timed_calls` runs this: here is no time limit.

math-verify parses LaTeX and plain expressions with sympy. What it misreads is put into other words first
([`spelled`]), and two of its verdicts are not left to it: on numbers so small that it rounds them to 0, and on numbers
too large to be worked out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from functools import lru_cache

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from reward.numerals import canonical

# Longest text, in characters, that is parsed: the time grows faster than the length.
LONGEST = 1000
# Numbers of more digits are compared as they are written.
MOST_DIGITS = 100_000
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


def readable(gold: str) -> bool:
    """Whether math-verify reads a gold answer, and holds it equal to itself."""
    parsed = _latex(gold)
    return not all(isinstance(part, str) for part in parsed) and _equal(parsed, parsed)


def equal(gold: str, readings: Sequence[Sequence[str]]) -> bool:
    """Whether one of several readings of an answer equals the gold one.

    Args:
        gold (`str`): LaTeX.
        readings (sequence of pairs): `"latex"` and the answer, or `"prose"` and a text that ends on it.
    """
    read = {"latex": _latex, "prose": _prose}
    return any(_equal(_latex(gold), read[kind](text)) for kind, text in readings)


def spelled(text: str) -> str:
    """`text` in LaTeX that math-verify reads as it is meant."""
    text = canonical(text)
    for pattern, written in REWRITTEN:
        text = pattern.sub(written, text)
    return text


@lru_cache(maxsize=4096)
def _latex(latex: str) -> list:
    return _parse(f"\\boxed{{{spelled(latex)}}}", [LatexExtractionConfig()])


def _prose(text: str) -> list:
    # What is said to be the answer has been looked for: math-verify takes any number near the word for it.
    text = re.sub("answer", "result", text, flags=re.IGNORECASE)
    return _parse(spelled(text), [LatexExtractionConfig(), ExprExtractionConfig()])


def _parse(text: str, extraction: list) -> list:
    """A sympy expression and its LaTeX, or the LaTeX alone, or nothing."""
    if len(text) > LONGEST:
        return []
    found = parse(text, extraction, parsing_timeout=None)
    # Expressions lose the base, and plain numbers end before it, so the text has the last word.
    named = BASE.search(text.rstrip(" .$}"))
    return [*found, named.group()] if found and named else found


def _equal(gold: list, found: list) -> bool:
    bases = {match.group(1) for match in (BASE.search(str(parts[-1])) for parts in (gold, found) if parts) if match}
    if len(bases) > 1 or not gold or not found:
        return False
    if max(map(_digits, (gold[0], found[0]))) > MOST_DIGITS:
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
