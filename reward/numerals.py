"""Numbers as people write them: one spelling for many ([`canonical`]), and the value of a short text ([`value_of`]).

``1,234``, ``1\\,234``, ``1 234`` and ``1.234,00`` are one number; so are ``1\\frac{1}{2}``, ``1 1/2``, ``1½`` and
``3/2``, or ``1.5e3``, ``1.5 x 10^3`` and ``1500``. Values are exact and bounded: what has more than [`MOST_DIGITS`]
digits is no number here.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

# Python converts at most 4300 digits, and a model that writes so many repeats itself.
MOST_DIGITS = 1000
# Longest text, in characters, that is read for its value.
LONGEST_TEXT = 2000

SPELLINGS = {
    "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "÷": "\\div ", "⁄": "/", "∕": "/", "−": "-",
    "≈": "\\approx ", "≅": "\\approx ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∞": "\\infty ",
    "π": "\\pi ", "√": "\\sqrt ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∈": "\\in ", "°": "^\\circ ",
    "’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "⋯": "...",
}  # fmt: skip
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


class _Spellings(dict):
    """What `str.translate` puts for each character, worked out when one is first met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        spelled = SPELLINGS.get(character, character)
        if category == "Nd":
            spelled = str(unicodedata.decimal(character))
        elif 0xFF01 <= code <= 0xFF5E:
            spelled = chr(code - 0xFEE0)
        elif category == "Pd":
            spelled = "-"
        elif category == "Zs":
            spelled = " "
        elif category in ("Cf", "Cs", "Co", "Cn") or (category == "Cc" and character not in "\n\t\r\b"):
            spelled = ""
        elif category == "No" and "⁄" in unicodedata.normalize("NFKC", character):
            above, _, under = unicodedata.normalize("NFKC", character).partition("⁄")
            spelled = f"\\frac{{{above}}}{{{under}}}"
        self[code] = spelled
        return spelled


_SPELLINGS = _Spellings()


def plain(text: str) -> str:
    """`text` in ASCII digits, hyphens, blanks and LaTeX commands where Unicode has characters of its own.

    Characters that stand for nothing (NUL, what has no width, lone surrogates) are dropped.
    """
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda found: f"^{{{found.group().translate(RAISED)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda found: f"_{{{found.group().translate(LOWERED)}}}", text)
    return text.translate(_SPELLINGS)


NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
BLANK = r"(?:\s|~|\\[,;:! ])"
# 1 234, 1\,234, 1{,}234, 1'234 and 1_234. A fraction after it makes the last three digits a numerator.
GROUPED = re.compile(
    r"(?<![\w.,^])([1-9]\d{0,2})(\{,\}|\{\\,\}|\\[,;: ]|~| |'|_)(\d{3}(?:\2\d{3})*)(?!\d|\s*/\s*\d|\s*\\[dtc]?frac)",
    re.ASCII,
)
# Inside brackets a comma may divide the entries of a list.
COMMAS = re.compile(r"(?<![\w.,(\[{^])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)", re.ASCII)
DOTS = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:\.\d{3})+,\d{1,2})(?![\d,]|\.\d)", re.ASCII)
RECURRING = re.compile(r"(?<![\d.])(\d{1,9})\.(\d{0,9})\\(?:overline|bar|dot)\s*(?:\{(\d{1,9})\}|(\d))", re.ASCII)
GOING_ON = re.compile(r"(?<![\d.])(\d{1,9})\.(\d{0,4}?)(\d{1,6}?)\3{2,}\s?(?:\.\.\.|\\[lc]?dots)", re.ASCII)
EXPONENT = r"(?:\{\s*([-+]?\d{1,4})\s*\}|\(\s*([-+]?\d{1,4})\s*\)|([-+]?\d{1,4}))"
SCIENTIFIC = re.compile(
    rf"(?<![\w.^\\])({NUMBER})(?:[eE]([-+]?\d{{1,4}})"
    rf"|{BLANK}*(?:[xX*]|\\times|\\cdot){BLANK}*10{BLANK}*(?:\^|\*\*){BLANK}*{EXPONENT})(?!\w|\.\d)",
    re.ASCII,
)
FRACTION = r"\\(?:[dtc]?frac|nicefrac|sfrac|flatfrac)(?![a-zA-Z])\s*"
# LaTeX takes a single digit without braces for an argument.
HALF_BRACED = re.compile(rf"{FRACTION}(\d|\{{[^{{}}]*\}})\s*(\d(?!\d)|\{{[^{{}}]*\}})", re.ASCII)
OVER = re.compile(r"\{([^{}\\]*)\\over(?![a-zA-Z])\s*([^{}\\]*)\}")
WHOLE = rf"(?<![\w.^/])(\d{{1,9}})(?:{BLANK}*|\s+and\s+|{BLANK}*\\text\s*\{{\s*and\s*\}}\s*)"
MIXED_LATEX = re.compile(rf"{WHOLE}\\frac\{{\s*(\d{{1,9}})\s*\}}\{{\s*(\d{{1,9}})\s*\}}", re.ASCII)
MIXED_PLAIN = re.compile(
    rf"(?<![\w.^/])(\d{{1,9}})(?:{BLANK}+|\s+and\s+)(\d{{1,9}})\s?/\s?(\d{{1,9}})(?![\w/]|\.\d)", re.ASCII
)
BRACED_BASE = re.compile(r"(?<![\w}])\{(\d+)\}(?=\s*\^)", re.ASCII)
SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALED = re.compile(
    rf"(?<![\w.,^])({NUMBER}){BLANK}*(?:({'|'.join(SCALES)})\b|\\text\s*\{{\s*({'|'.join(SCALES)})\s*\}})",
    re.I | re.ASCII,
)
POWER = re.compile(r"(?<=[\d)])\s*\*\*\s*(?=[-\d(])", re.ASCII)


def canonical(text: str) -> str:
    """`text` with each number in one spelling: ``1234``, ``1500``, ``\\frac{3}{2}``. It may be prose or LaTeX."""
    text = BRACED_BASE.sub(r"\1", re.sub(r"\\!\s*", "", plain(text)))
    text = GROUPED.sub(lambda found: found.group(1) + found.group(3).replace(found.group(2), ""), text)
    text = COMMAS.sub(lambda found: found.group().replace(",", ""), text)
    text = DOTS.sub(lambda found: found.group().replace(".", "").replace(",", "."), text)
    text = POWER.sub("^", text)
    text = SCALED.sub(lambda found: _shifted(found.group(1), SCALES[(found.group(2) or found.group(3)).lower()]), text)
    text = SCIENTIFIC.sub(_written_out, text)
    text = RECURRING.sub(_recurring, GOING_ON.sub(_recurring, text))
    text = HALF_BRACED.sub(lambda found: "\\frac" + "".join(f"{{{part.strip('{}')}}}" for part in found.groups()), text)
    text = OVER.sub(lambda found: f"\\frac{{{found.group(1).strip()}}}{{{found.group(2).strip()}}}", text)
    return MIXED_PLAIN.sub(_improper, MIXED_LATEX.sub(_improper, text))


def _shifted(number: str, exponent: int) -> str:
    if abs(exponent) > MOST_DIGITS // 2 or len(number) > MOST_DIGITS // 2:
        return f"{number} \\times 10^{{{exponent}}}"
    return f"{Decimal(f'{number}e{exponent}'):f}"


def _written_out(found: re.Match) -> str:
    return _shifted(found.group(1), int(next(part for part in found.groups()[1:] if part)))


def _recurring(found: re.Match) -> str:
    whole, fixed, *repeated = (part for part in found.groups() if part is not None)
    nines = 10 ** len(repeated[0]) - 1
    above = int(whole + fixed) * nines + int(repeated[0])
    return _fraction(Fraction(above, nines * 10 ** len(fixed)))


def _improper(found: re.Match) -> str:
    whole, above, under = (int(part) for part in found.groups())
    return _fraction(Fraction(whole * under + above, under)) if 0 < above < under else found.group()


def _fraction(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


WORDED = re.compile(
    r"\\(?:text(?:normal|bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt|normal)|mbox|operatorname|boldsymbol|bm|boxed|emph)"
    r"\s*\{([^{}]*)\}"
)
INNERMOST = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
PLAIN_NUMBER = re.compile(rf"\s*-?{NUMBER}\s*", re.ASCII)
UNSIGNED = re.compile(NUMBER, re.ASCII)
INDIAN = re.compile(r"(?<![\w.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])", re.ASCII)
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))", re.ASCII)
CURRENCY = re.compile(r"(?:\b(?:US|CA|AU|NZ|HK))?\\?\$|[€£¥₹₩₽₺₫¢]|\b(?:USD|EUR|GBP|Rs\.?|INR)(?=\s*\d)")
NO_SIGN = r"left|right|displaystyle|q?quad|[Bb]igg?[lr]?|bf|it|rm|[lL]arge|LARGE|[hH]uge"
SYMBOLS = (
    (re.compile(rf"\\(?:{NO_SIGN})(?![a-zA-Z])|\\[,;: !()\[\]]|~"), " "),
    (re.compile(r"\^\s*\{?\\circ\}?|\\(?:circ|degree)(?![a-zA-Z])|\\?%"), " "),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])|(?<=[\d)])\s*[xX]\s*(?=[\d(])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\\(?:approx|simeq|equiv|Rightarrow|rightarrow|to|implies)(?![a-zA-Z])|=>|->|:="), "="),
    (re.compile(r"\^\s*\{([^{}]*)\}"), r"^(\1)"),
)
# A minus after a digit, a letter or a closing bracket is a subtraction or a hyphen. A digit after ^ is an exponent, and
# one after _ an index.
ATOM = re.compile(
    r"(?:(?<![\w)\]}.^(])-|(?<=[^\w^]\()-)?(?<![\d.^])(?<!\^[({-])(?<!\^[({]-)(?<![^\W_]_)(?<![^\W_]_\{)"
    rf"{NUMBER}(?:\s?\^\s?(?:\(\s?-?\d+\s?\)|-?\d+))?(?:/0*[1-9]\d*(?![\d.]))?",
    re.ASCII,
)
RUN = re.compile(r"(?:[-+(]\s*){0,9}(?<![\w^])(?:\.\d|\d)[\d\s.+\-*/^()]*", re.ASCII)
# Between two numbers: they are a list, a choice or a ratio, and not a number with something said about it.
SEVERAL = re.compile(r"\W*(?:\b(?:and|to)\b\W*)?|\s*[^\W\d_]+,?\s+and\s+|.*\bor\b.*", re.DOTALL)
# A sign in words, and no subtraction.
WORD_SIGN = re.compile(r"(?<![\d)] )(?<!-)\b(?:minus|negative)\s+(?=[\d.])", re.I)
# How tightly each sign binds; ~ is the minus of one number.
BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, "~": 3, "^": 4}


def numbers_in(text: str) -> list[Fraction | None]:
    """The numbers in a text, in order, and `None` for each that is too long.

    No sums are worked out, but a fraction or a power is one number.
    """
    return [evaluate(found.group()) for found in ATOM.finditer(_arithmetic(text))]


def last_number(text: str) -> Fraction | None:
    """The last number in a text of any length, as in [`numbers_in`]; `None` where there is none, or it is too long."""
    text = plain(text)
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    if not end:
        return None
    window = text[max(0, end - LONGEST_TEXT) : end + 40]
    return next(iter(numbers_in(window)[-1:]), None)


def value_of(text: str, *, strict: bool = False) -> Fraction | None:
    """The one number that a short text gives as an answer: ``5 + 13 = 18 apples`` is 18, and so is ``$18``.

    Arithmetic is worked out. Of ``5 or 6``, ``5, 6``, ``3:4`` and ``5 dollars and 25 cents`` none is the value:
    `None`. With `strict`, there may be nothing but words of two letters or more beside it: no variable, no function, no
    percent sign.
    """
    if len(text) > LONGEST_TEXT or (strict and ("%" in text or "\\circ" in text or "°" in text)):
        return None
    *before, side = [part for part in _arithmetic(text).split("=") if part.strip()] or [""]
    if any(re.search(r"[,;]|\b(?:or|and)\b", part) for part in before[1:] + ([side] if len(before) > 1 else [])):
        return None
    if before and not re.search(r"\d", side):
        side = before[-1]
    runs = list(RUN.finditer(side))
    if not runs:
        return None
    at_start = not side[: runs[0].start()].strip(" *_`\"'([")
    run, other = (runs[0], runs[1:2]) if at_start else (runs[-1], runs[-2:-1])
    if other:
        begin, end = sorted((run, other[0]), key=re.Match.start)
        if SEVERAL.fullmatch(side[begin.end() : end.start()]):
            return None
    if VARIABLE_BEFORE.search(side[: run.start()]) or VARIABLE_AFTER.match(side, run.end()) or FUNCTION.search(side):
        return None
    if strict and not _only_words(side[: run.start()] + " " + side[run.end() :]):
        return None
    return evaluate(run.group())


FUNCTION = re.compile(r"\\(?:sqrt|pi|log|ln|sin|cos|tan|binom|sum|int|prod|infty)(?![a-zA-Z])")
VARIABLE_BEFORE = re.compile(r"(?<![A-Za-z])[A-Za-z][ ]?\Z")
VARIABLE_AFTER = re.compile(r"[\^_{]|[xyzn](?![A-Za-z])")
RATE = re.compile(r"\b(?:[A-Za-z]{2,}\s?/\s?[A-Za-z]+|m/s)\b")
MATHEMATICAL = frozenset(("pi", "sqrt", "log", "ln", "exp", "mod", "inf", "infinity", "sin", "cos", "tan", "cot"))


def _only_words(text: str) -> bool:
    text = RATE.sub(" ", text)
    words = re.findall(r"[^\W_]+", text)
    return not re.search(r"[\\^_{}<>|=+*!]", text) and all(
        len(word) > 1 and word.isalpha() and word.lower() not in MATHEMATICAL for word in words
    )


def _arithmetic(text: str) -> str:
    """`text` with numbers and signs as they are typed: no LaTeX but what has no such form."""
    text = canonical(text)
    text = INDIAN.sub(lambda found: found.group().replace(",", ""), CURRENCY.sub("", text))
    text = WORD_SIGN.sub("-", THOUSANDS.sub("", text))
    # Each pass takes away one layer of braces.
    for _ in range(20):
        before = text
        text = INNERMOST.sub(_divided, WORDED.sub(r" \1 ", text))
        for symbol, typed in SYMBOLS:
            text = symbol.sub(typed, text)
        if text == before:
            break
    return text


def _divided(found: re.Match) -> str:
    above, under = (part.strip() for part in found.groups())
    typed = (
        f"{above}/{under}" if PLAIN_NUMBER.fullmatch(above) and UNSIGNED.fullmatch(under) else f"(({above})/({under}))"
    )
    # A letter before it is no part of the number; a sign is.
    return typed if found.string[found.start() - 1 : found.start()] == "-" else f" {typed} "


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression in numbers, ``+ - * / ^`` and brackets; `None` where it has none, or too long.

    What trails off (``18 -``, ``18.``) does not count, and neither does a remark in brackets after a blank.
    """
    expression = re.split(r"(?<=[\d)])\s+\(", expression.strip(), maxsplit=1)[0].rstrip(" .+-*/^(")
    if expression.count("(") < expression.count(")"):
        expression = expression.rstrip(" )")
    if expression.count("(") > expression.count(")"):
        expression = expression.lstrip("( ")
    values: list[Fraction] = []
    pending: list[str] = []
    operand_next = True
    try:
        for token in re.findall(rf"{NUMBER}\.?|[-+*/^()]", expression, re.ASCII):
            if token in "+-" and operand_next:
                pending += ["~"] if token == "-" else []
            elif token == "(":
                if not operand_next:
                    return None
                pending.append(token)
            elif token == ")":
                while pending[-1] != "(":
                    _apply(pending.pop(), values)
                pending.pop()
            elif token in BINDS:
                if operand_next:
                    return None
                while pending and pending[-1] != "(" and BINDS[pending[-1]] >= BINDS[token] + (token == "^"):
                    _apply(pending.pop(), values)
                pending.append(token)
                operand_next = True
            else:
                if not operand_next or len(token) > MOST_DIGITS:
                    return None
                values.append(Fraction(token.rstrip(".")))
                operand_next = False
        while pending:
            _apply(pending.pop(), values)
    except (IndexError, ZeroDivisionError, OverflowError):
        return None
    return values[0] if len(values) == 1 else None


def _apply(sign: str, values: list[Fraction]) -> None:
    right = values.pop()
    values.append(-right if sign == "~" else SIGNS[sign](values.pop(), right))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or bits * abs(exponent) > 4 * MOST_DIGITS:
        raise OverflowError
    return base ** int(exponent)


SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": _power}
