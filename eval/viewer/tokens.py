"""How tokens of completions read, and what a length value model says at each of them.

Arrays follow `lenvm_rl.returns`: entry ``t`` belongs to the state before token ``t`` was chosen, and a shift to the
token itself, positive where it made the completion longer than expected. After a chosen end-of-sequence token nothing
follows: its value is exactly 0 and so is the length. After the last token of a cut completion the model is asked once
more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lenvm_rl.modeling.completions import check_in_eval_mode, state_logits
from lenvm_rl.modeling.loading import has_tokenizer, load_tokenizer
from lenvm_rl.returns import horizon_shift, remaining_from_logits
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
        part, parts (`int`): which of how many tokens that share a character it is, from 1; nearly always 1 of 1.
        special (`bool`): whether it is no text, and `text` is its name.
    """

    text: str
    part: int = 1
    parts: int = 1
    special: bool = False


def tokenizer_of_rollouts(metadata: RolloutMetadata, given: str | None, *places: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a rollout file: the given one, or else the first that lies at one of the places."""
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
    cannot be shown. Whether a word begins with a blank can depend on the tokens `before`.
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


@dataclass(frozen=True)
class TokenValues:
    """A completion of L tokens as the model sees it; all arrays float64 on the CPU.

    Args:
        remaining (`torch.Tensor` of shape `(L,)`): predicted tokens still to come before each token, end-of-sequence
            counted.
        values (`torch.Tensor` of shape `(L,)`): ``V(s_t)`` in (-1, 0).
        horizon_shift (`torch.Tensor` of shape `(L,)`): of each token, in value (arXiv 2604.27039, eq. 16).
        shift_in_tokens (`torch.Tensor` of shape `(L,)`): ``n(s_{t+1}) + 1 - n(s_t)``: by how many tokens the whole
            completion is expected to be longer for this token.
    """

    remaining: Tensor
    values: Tensor
    horizon_shift: Tensor
    shift_in_tokens: Tensor


@torch.no_grad()
def token_values(model: nn.Module, records: Iterable[Mapping[str, Any]], max_tokens: int = 16384) -> list[TokenValues]:
    """Runs a length value model in eval mode once along every completion.

    Args:
        model (`LengthValueModel`): what reads them.
        records (iterable of mappings): rollouts, of which `prompt_ids`, `completion_ids` and `finish_reason` count.
        max_tokens (`int`, *optional*, defaults to `16384`): see `state_logits`.

    Returns:
        `list[TokenValues]`: one for each completion, in the order given.
    """
    check_in_eval_mode(model)
    rows = [(each["prompt_ids"], each["completion_ids"], each["finish_reason"] == "stop") for each in records]
    for place, name in enumerate(("prompt_ids", "completion_ids")):
        empty = [index for index, row in enumerate(rows) if not len(row[place])]
        if empty:
            raise ValueError(f"The {name} of completions {empty[:10]} have no tokens, so there is no state to read.")
    prompts, completions, finished = zip(*rows, strict=True)
    found: dict[int, TokenValues] = {}
    for batch, states in state_logits(model, prompts, completions, finished=finished, max_tokens=max_tokens):
        for index, logits in zip(batch, states, strict=True):
            found[index] = _values(logits.double(), finished[index], model.config.gamma)
    return [found[index] for index in range(len(rows))]


def _values(logits: Tensor, finished: bool, gamma: float) -> TokenValues:
    """From the logits of all states that are read: L if finished, else L + 1."""
    remaining, values = remaining_from_logits(logits, gamma), -torch.sigmoid(logits)
    nothing = torch.zeros(1, dtype=logits.dtype)
    after = nothing if finished else remaining[-1:]
    steps = len(logits) if finished else len(logits) - 1
    inside = values[None, :steps]
    shift = horizon_shift(inside, torch.ones_like(inside), gamma, None if finished else values[-1:])[0]
    following = torch.cat([remaining[1:steps], after])
    return TokenValues(remaining[:steps], values[:steps], shift, following + 1 - remaining[:steps])
