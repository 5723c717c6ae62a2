"""How tokens read: the text that each one adds to a completion, and names for tokens that stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lenvm_rl.modeling.loading import has_tokenizer, load_tokenizer
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.tokenization import check_same_tokenizer

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
BLANK, LINE_END, TAB = "␣", "↵", "⇥"
MOST_BYTES = 4  # of a character in UTF-8


@dataclass(frozen=True)
class Piece:
    """What a token adds to the text.

    Args:
        text (`str`): its text; empty where it holds only a part of a character that later tokens complete.
        part (`int`): which of the tokens that share a character it is, from 1.
        parts (`int`): tokens that share the character: 1 for nearly all tokens.
        special (`bool`): whether it is no text, and `text` is its name.
    """

    text: str
    part: int = 1
    parts: int = 1
    special: bool = False


def tokenizer_of_rollouts(metadata: RolloutMetadata, given: str | None, *places: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a rollout file.

    Args:
        metadata ([`~lenvm_rl.rollouts.RolloutMetadata`]): of the rollouts.
        given (`str`, *optional*): folder or hub id that was named for it.
        places (`str`, *optional*): where it lies otherwise: the first that has one.

    Raises:
        FileNotFoundError: what was named has none.
        ValueError: no place has one, or it is another.
    """
    found = given or next((place for place in places if place is not None and has_tokenizer(place)), None)
    if found is None:
        raise ValueError(
            f"No tokenizer lies at {', '.join(filter(None, places))}: name the one that the completions of "
            f"{metadata.generator} were sampled with, with --tokenizer_name_or_path."
        )
    tokenizer = load_tokenizer(found)
    check_same_tokenizer(tokenizer, metadata.tokenizer_fingerprint, "the tokenizer", "the rollouts")
    return tokenizer


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int] = ()) -> list[Piece]:
    """The text of each token in its place; the texts together are the text of all tokens.

    A character that a byte-level vocabulary spreads over several tokens stands at the last of them: half a character
    cannot be shown.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes them.
        ids (`Sequence[int]`): the tokens.
        before (`Sequence[int]`, *optional*): tokens before them: whether a word begins with a blank can depend on it.

    Returns:
        `list[Piece]`: one for each token.
    """
    special = _special_ids(tokenizer)
    pieces: list[Piece] = []
    context = [token for token in before[-1:] if token not in special]
    waiting: list[int] = []
    for token in ids:
        if token in special:
            pieces += _shared(tokenizer, context, waiting)
            pieces.append(Piece(tokenizer.convert_ids_to_tokens(token), special=True))
            context, waiting = [], []
            continue
        waiting.append(token)
        if not _added(tokenizer, context, waiting).endswith(REPLACEMENT):
            pieces += _shared(tokenizer, context, waiting)
            context, waiting = waiting, []
        elif len(waiting) == MOST_BYTES:
            # A character would be whole by now, so the first of them is no part of one.
            pieces += _shared(tokenizer, context, waiting[:1])
            context, waiting = waiting[:1], waiting[1:]
    return pieces + _shared(tokenizer, context, waiting)


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text where nothing stands around it, blanks and line ends made visible.

    A token that is no text on its own (a part of a character, a special token) has the name that the vocabulary gives
    it.
    """
    name = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if token in _special_ids(tokenizer) or not text or REPLACEMENT in text:
        return name
    # Such vocabularies write a blank as this sign, and decoding strips the blank of the first word.
    if name.startswith("\u2581") and not text.startswith(" "):
        text = " " + text
    return visible(text)


def visible(text: str) -> str:
    """The text on one line: signs stand for line ends and tabs, and for blanks at its ends."""
    text = text.replace("\r\n", LINE_END).replace("\n", LINE_END).replace("\r", LINE_END).replace("\t", TAB)
    core = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    return BLANK * left + core + BLANK * (len(text) - left - len(core))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return added | set(tokenizer.all_special_ids)


def _shared(tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int]) -> list[Piece]:
    if not tokens:
        return []
    count = len(tokens)
    parts = [Piece("", number, count) for number in range(1, count)]
    return [*parts, Piece(_added(tokenizer, context, tokens), count, count)]


def _added(tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int]) -> str:
    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode([*context, *tokens])[len(decode(context)) :] if context else decode(tokens)
