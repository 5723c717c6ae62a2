"""Task reward for answers that can be compared as text: 1 where the two are the same, else 0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from reward.answers import bare, completion_texts

LETTER = re.compile(r"\A\(([A-Za-z])\)\Z")


class ExactMatchReward:
    """A TRL reward function: 1.0 where a completion's answer is the gold one, else 0.0: a correctness flag. Picklable.

    Whitespace, Markdown emphasis and a full stop at the ends never matter, nor do brackets around a single letter. A
    run of whitespace counts as one space. What a model thinks between ``<think>`` and ``</think>`` is no answer; where
    that has no end, there is none.

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

    def __call__(self, completions: Sequence, **columns) -> list[float]:
        """One reward for each completion: texts, or conversations whose last message is graded.

        Raises:
            ValueError: the column of gold answers is absent, or one of them is empty.
        """
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


# Ready for `reward_funcs`, as `reward.exact_match.exact_match`: the whole completion, its last line, or what follows
# the last "Answer:".
exact_match = ExactMatchReward()
exact_match_last_line = ExactMatchReward(last_line=True, ignore_case=True, name="exact_match_last_line")
exact_match_marked = ExactMatchReward(marker="Answer:", ignore_case=True, name="exact_match_marked")
