"""Text of a completion while its tokens come: characters are never split, and nothing of a stop string gets out."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# What a decoder writes for bytes that are no character, or not yet one.
REPLACEMENT = "\ufffd"
# Tokens that an unfinished character may have: it has four bytes at most, and a token one at least.
UNFINISHED = 3


class IncrementalText:
    """Turns token ids into text, piece by piece; the pieces together are the text of all tokens.

    That is `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`, except that bytes
    which never become a character may be replaced otherwise.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes; used by one thread at a time.
        stop (sequence of `str`, *optional*): strings that end the text; the text ends before the first that occurs.

    Attributes:
        stopped (`bool`): whether a stop string occurred.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._special = special_ids(tokenizer)
        # How a token reads depends on the one before it (blanks between words), so the tokens of the last piece are
        # decoded again with each new one.
        self._ids: list[int] = []
        self._decoded = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` was chosen; often a token more or less."""
        if self.stopped:
            return ""
        if token_id in self._special:
            # It is no text, and can be named as a stop string all the same.
            ends = self._tokenizer.convert_ids_to_tokens(token_id) in self._stop
            text, self.stopped = self.finish() if ends else "", self.stopped or ends
            return text
        self._ids.append(token_id)
        certain = len(self._ids)
        text = self._new_text(certain)
        if text.endswith(REPLACEMENT):
            certain = max(self._decoded, certain - UNFINISHED)
            text = self._new_text(certain)
        if not text:
            return ""
        self._ids, self._decoded = self._ids[self._decoded :], certain - self._decoded
        return self._without_stop(text, last=False)

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        if self.stopped:
            return ""
        text, self._decoded = self._new_text(len(self._ids)), len(self._ids)
        return self._without_stop(text, last=True)

    def _new_text(self, end: int) -> str:
        """What the tokens up to `end` add to those that are decoded."""
        return self._decode(self._ids[:end])[len(self._decode(self._ids[: self._decoded])) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _without_stop(self, text: str, last: bool) -> str:
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        kept = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        sure = self._held[: len(self._held) - kept]
        self._held = self._held[len(sure) :]
        return sure


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that are no text."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
