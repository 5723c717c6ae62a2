"""Where in a completion its final answer stands: the one place that every grader of texts asks.

What a model thinks between ``<think>`` and ``</think>`` is set aside ([`completion_texts`]). In the rest the answer is
([`find_answer`]) the last ``\\boxed{}``, or else what follows the last ``####`` that is no heading, or else what the
last "answer is" or "Answer:" names. All of it takes time linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from reward.numerals import plain

FINAL_MARK = "####"
# As reasoning models and their templates write them.
NAMES = "think|thinking|thoughts?|reasoning|scratchpad"
THINKING = re.compile(rf"[<◁]\s?(?P<ends>/)?\s?(?:{NAMES})\s?[>▷]|\[(?P<closes>/)?THINK\]", re.IGNORECASE)
OPENED = re.compile(rf"(?:[<◁](?:{NAMES})[>▷]|\[THINK\])\s*\Z", re.IGNORECASE)
TAG = re.compile(r"<(?P<ends>/)?answer>", re.IGNORECASE)
# A text that was unescaped once too often has a backspace for \b. An escaped brace is none.
BRACE = re.compile(
    r"(?P<box>(?:\\?b|\x08)oxed\s{0,9}\{|\\fbox\s{0,9}\{)|(?P<escaped>\\[\s\S])|(?P<open>\{)|(?P<close>\})"
)
MARK = re.compile(r"(?<!#)####(?!#)([^\n#]*(?:#(?!###)[^\n#]*)*)")
# What introduces an answer, with emphasis or without: "the answer to this is", "**Answer:**", "final answer =".
SAYS = (
    r"\b(?:answer|ans)\b[*_` ]{0,4}(?:[^\n.:=]{0,80}?\b(?:is|are|be|equals)\b[*_` ]{0,4}:?|[:=]|-(?=\s))[*_` ]{0,4}"
    r"(?:(?:therefore|thus|then|simply|just|exactly|about|approximately)\s){0,2}"
)
SAID = re.compile(SAYS, re.IGNORECASE)
INTRODUCED = re.compile(
    rf"(?:(?:the|my|so|final|short)\s){{0,3}}(?:answer\W*\Z|{SAYS}|result[*_` ]{{0,4}}[:=][*_` ]{{0,4}})", re.IGNORECASE
)
TAKEN_BACK = re.compile(r"\b(?:wait|hold on|actually|correction|scratch that|oops|sorry|on second thought)\b", re.I)
SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z]|\s*\Z)|\.(?=\s+[a-z])|,?\s(?:because|since)\b")
# Words that a heading begins with, and an answer does not.
HEADING = re.compile(
    r"(?:(?:step|part|case|phase|stage|section|question|problem|task|example|method|approach|strategy|solution|proof|"
    r"explanation|reasoning|analysis|calculations?|computation|derivation|verification|verify|checks?|checking|result|"
    r"conclusion|summary|notes?|remarks?|final|given|find|identify|determine|calculate|compute|understand|solve|setup|"
    r"simplify|using|let|first|second|third|next|finally|therefore|thus|overview|details?|formula|hints?)\b"
    r"|[a-z]+ing\s+\w+\s)",
    re.IGNORECASE,
)
NUMBERED = re.compile(r"(\d{1,2})[.)]\s+\W*[^\W\d_]")
BULLET = re.compile(r"\A[-*•]\s+")
NAMED = re.compile(r"[^\W\d_][\w ]*?\d+\W*\Z")
BEFORE_LINE = re.compile(r"(?:\s|\$\$|\\\[)*")
WORD = re.compile(r"[^\W\d_]{2,}")
LETTER = re.compile(r"\A\(([A-Za-z])\)\Z")


class FinalAnswer(NamedTuple):
    """A final answer and what shows it: `"boxed"`, `"mark"` (``####``), `"said"` ("The answer is"), or `"nothing"`.

    With `"nothing"`, `text` is all that was written.
    """

    text: str
    shown_by: str


def text_of_completion(completion: str | Sequence[Mapping]) -> str:
    """The text of a completion as TRL passes it: a string, or the last message of a conversation.

    Empty where the last message is not the assistant's: what a tool or an environment wrote is no answer.
    """
    if isinstance(completion, str):
        return completion
    if not completion or completion[-1].get("role", "assistant") != "assistant":
        return ""
    return _content(completion[-1])


def completion_texts(completions: Sequence[str | Sequence[Mapping]], columns: Mapping[str, Any]) -> list[str | None]:
    """What each completion, as TRL passes it, says outside of its thinking, and `None` where that has no end.

    `columns` is what else TRL passes. Where the text of a prompt in `prompts` ends in ``<think>``, its completion
    begins inside. A ``<think>`` that a chat template adds to messages is not seen here: a completion that is cut before
    ``</think>`` then looks like any other text.
    """
    prompts = columns.get("prompts") or [None] * len(completions)
    return [
        outside_thinking(text_of_completion(completion), opened=_opens_thinking(prompt))
        for completion, prompt in zip(completions, prompts, strict=True)
    ]


def outside_thinking(text: str, *, opened: bool = False) -> str | None:
    """`text` without its thinking, or `None` where that has no end; with `opened`, it begins inside.

    A closing tag without an opening one ends thinking that began before the text.
    """
    parts, begin, inside = [], 0, opened
    for tag in THINKING.finditer(text):
        if tag["ends"] or tag["closes"]:
            if not inside:
                parts.clear()
            begin, inside = tag.end(), False
        elif not inside:
            parts.append(text[begin : tag.start()])
            inside = True
    return None if inside else "\n".join([*parts, text[begin:]])


def find_answer(text: str) -> FinalAnswer:
    """The final answer in a text without thinking. Where there are ``<answer>`` tags, only what they hold is read."""
    text = _tagged(text)
    boxed = last_boxed(text)
    if boxed is not None:
        return FinalAnswer(boxed, "boxed")
    marked = _marked(text)
    return FinalAnswer(marked, "mark") if marked is not None else _said(text)


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{}`` that is closed and not empty, braces inside it matched."""
    opened: list[tuple[bool, int]] = []
    last = (-1, -1)
    for brace in BRACE.finditer(text):
        if brace.lastgroup in ("box", "open"):
            opened.append((brace.lastgroup == "box", brace.end()))
        elif brace.lastgroup == "close" and opened:
            is_box, begin = opened.pop()
            if is_box and begin > last[0] and text[begin : brace.start()].strip():
                last = (begin, brace.start())
    return None if last[0] < 0 else text[slice(*last)]


def bare(text: str) -> str:
    """`text` in plain characters, without Markdown, blanks and a full stop at its ends."""
    text = plain(text).strip("*_` \n\r\t")
    kept = text.rstrip("*_` \n\r\t.,;")
    # A dot may belong to \right, a comma to a LaTeX blank, and dots may say that digits go on.
    end = text[len(kept) :]
    if end.startswith("..."):
        return kept + "..."
    return kept + end[0] if end and kept.endswith(("\\right", "\\")) else kept


def _content(message: Mapping) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")


def _opens_thinking(prompt: str | Sequence[Mapping] | None) -> bool:
    if prompt and not isinstance(prompt, str):
        prompt = _content(prompt[-1]) if prompt[-1].get("role") == "assistant" else ""
    return bool(prompt) and OPENED.search(prompt[-40:]) is not None


def _tagged(text: str) -> str:
    """What the last ``<answer>`` that is not empty holds, up to its end tag or the end; else all of the text."""
    begin, found = None, ""
    for tag in TAG.finditer(text):
        if not tag["ends"]:
            begin = tag.end()
        elif begin is not None:
            found, begin = text[begin : tag.start()].strip() or found, None
    return (begin is not None and text[begin:].strip()) or found or text


def _marked(text: str) -> str | None:
    """What the last ``####`` marks that does not begin a heading."""
    marks = list(MARK.finditer(text))
    numbers = [NUMBERED.match(mark[1].strip("*_` ")) for mark in marks]
    steps = {0} | {int(number[1]) for number in numbers if number}
    # Lines of words: one may be a name, several are headings.
    titles = sum(line[:1].isalpha() and not HEADING.match(line) for line in (bare(mark[1]) for mark in marks))
    end = len(text.rstrip())
    for mark, number in zip(reversed(marks), reversed(numbers), strict=True):
        line, after = bare(_sentence(mark[1])), mark.end()
        introduced = INTRODUCED.match(line)
        if number and int(number[1]) - 1 in steps:
            continue
        if introduced or not line:
            line = bare(line[introduced.end() :]) if introduced else ""
            if not line:
                line, after = _first_line(text, after)
                line = bare(_sentence(INTRODUCED.sub("", line, count=1)))
            if line and not line.startswith("#") and not (after < end and _is_prose(line)):
                return line
        elif HEADING.match(line) or line.endswith(":"):
            continue
        elif after == end or not (_is_prose(line) or NAMED.match(line) or (titles > 1 and line[0].isalpha())):
            return line
    return None


def _sentence(line: str) -> str:
    """`line` up to where a sentence ends in it, but not without a last exclamation mark, which may be a factorial."""
    end = SENTENCE_END.search(line)
    return line[: end.start()] if end and line[end.start() :].strip() != "!" else line


def _is_prose(line: str) -> bool:
    return line[0].isalpha() and ":" not in line and len(WORD.findall(line)) > 2


def _said(text: str) -> FinalAnswer:
    """What the last "answer is" names: a number, an expression or a letter, or whatever ends the text."""
    *_, last = [None, *SAID.finditer(text)]
    if last is None:
        return FinalAnswer(text, "nothing")
    taken_back = TAKEN_BACK.search(text, last.end())
    if taken_back:
        return FinalAnswer(text[taken_back.start() :], "nothing")
    line, after = _first_line(text, last.end())
    end = SENTENCE_END.search(line)
    said = bare(line[: end.start()] if end else line)
    goes_on = bool((line[end.end() :] if end else "").strip() or text[after:].strip())
    if said and (not said[0].isalpha() or len(said) == 1 or not goes_on):
        return FinalAnswer(said, "said")
    return FinalAnswer(text, "nothing")


def _first_line(text: str, begin: int) -> tuple[str, int]:
    """The first line from `begin` that holds more than delimiters of a formula, and where it ends."""
    begin = BEFORE_LINE.match(text, begin).end()
    end = text.find("\n", begin)
    end = len(text) if end < 0 else end
    return BULLET.sub("", text[begin:end]).strip(), end


class ExactMatchReward:
    """A TRL reward function: 1.0 where a completion's answer is the gold one, else 0.0: a correctness flag. Picklable.

    Whitespace, Markdown emphasis and a full stop at the ends never matter, nor do brackets around a single letter. A
    run of whitespace counts as one space.

    Args:
        marker (`str`, *optional*):
            The answer is the line after its last occurrence, such as ``"####"`` or ``"Answer:"``; a completion without
            it is wrong. A gold answer may have it or not.
        last_line (`bool`, *optional*, defaults to `False`):
            Whether the answer is the last line that is not empty. Not together with `marker`.
        ignore_case (`bool`, *optional*, defaults to `False`): whether ``Paris`` is ``paris``.
        column (`str`, *optional*, defaults to `"answer"`):
            The dataset's column of gold answers: a text, or a list of texts of which one has to match.
        name (`str`, *optional*, defaults to `"exact_match"`): what it is called in logs.
    """

    def __init__(
        self,
        *,
        marker: str | None = None,
        last_line: bool = False,
        ignore_case: bool = False,
        column: str = "answer",
        name: str = "exact_match",
    ):
        if marker is not None and last_line:
            raise ValueError("Give either marker or last_line: the answer stands in one place.")
        if marker is not None and not marker.strip():
            raise ValueError("marker is blank, and would be found everywhere: leave it out, or name what stands there.")
        self.marker = marker
        self.last_line = last_line
        self.ignore_case = ignore_case
        self.column = column
        self.__name__ = name

    def __call__(self, completions: Sequence, **columns: Any) -> list[float]:
        """One reward for each completion: texts, or conversations whose last message is graded."""
        if self.column not in columns:
            raise ValueError(f"{self.__name__} needs the dataset's column {self.column!r} of gold answers.")
        rewards = []
        texts = completion_texts(completions, columns)
        for text, gold in zip(texts, columns[self.column], strict=True):
            answers = self._golds(gold)
            if not answers or "" in answers:
                raise ValueError(f"A gold answer in column {self.column!r} is empty: {gold!r}. Leave such rows out.")
            rewards.append(float(self._answer(text) in answers))
        return rewards

    @property
    def gold_columns(self) -> tuple[str, ...]:
        """For [`lenvm_rl.reward_functions.check_golds`]."""
        return (self.column,)

    def unreadable_golds(self, golds: Iterable) -> list[str]:
        """The gold answers that are empty, or are no texts."""
        return [str(gold) for gold in golds if not (answers := self._golds(gold)) or "" in answers]

    def _golds(self, gold: str | Sequence[str] | None) -> set[str]:
        golds = [gold] if isinstance(gold, str) else gold or []
        return {self._gold(one) if isinstance(one, str) else "" for one in golds}

    def _answer(self, text: str | None) -> str | None:
        if text is None:
            return None
        if self.marker is not None:
            before, marker, text = text.rpartition(self.marker)
            if not marker:
                return None
            text = text.strip().partition("\n")[0]
        elif self.last_line:
            text = (text.strip().splitlines() or [""])[-1]
        return self._normal(text)

    def _gold(self, text: str) -> str:
        return self._normal(text if self.marker is None else text.rpartition(self.marker)[2])

    def _normal(self, text: str) -> str:
        text = " ".join(text.split())
        text = LETTER.sub(r"\1", bare(text) or text)
        return text.casefold() if self.ignore_case else text


# Ready for `reward_funcs`, as `reward.answers.exact_match`: the whole completion, its last line, or what follows
# the last "Answer:".
exact_match = ExactMatchReward()
exact_match_last_line = ExactMatchReward(last_line=True, ignore_case=True, name="exact_match_last_line")
exact_match_marked = ExactMatchReward(marker="Answer:", ignore_case=True, name="exact_match_marked")
