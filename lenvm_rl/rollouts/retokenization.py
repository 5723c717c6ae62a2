"""Completions of which only the text is left: token ids made from it again, and what that cost.

A text has many spellings in tokens, and a policy samples any of them; special tokens that it samples are usually left
out of the text. So ids made from text can differ in number from those that were sampled, and with them every label of
a value model. Whoever has no ids gets these, marked as such: the records carry what the number of tokens is off by,
and the metadata how often it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Columns of a record whose ids were made from text.
TEXT_COLUMN, ERROR_COLUMN, CHANGED_COLUMN = "completion_text", "length_error", "text_changed"


def retokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], bool]:
    """Token ids of a completion's text, none added at either end.

    A special token that stands in the text is read as plain text: had it been sampled, it would not be there.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        text (`str`): what the policy's tokens were decoded to, special tokens left out.

    Returns:
        `tuple[list[int], bool]`: the ids, and whether decoding them gives another text.
    """
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return ids, tokenizer.decode(ids, skip_special_tokens=True) != text


def retokenization_columns(text: str, length_error: int | None, text_changed: bool) -> dict[str, Any]:
    """Further columns of a record whose ids were made from text.

    Args:
        text (`str`): the text, so that nothing is lost.
        length_error (`int`, *optional*): tokens made minus tokens sampled, 0 if they agree; `None` if the number of
            sampled tokens is not known.
        text_changed (`bool`): whether the ids decode to another text.
    """
    return {TEXT_COLUMN: text, ERROR_COLUMN: length_error, CHANGED_COLUMN: text_changed}


def retokenization_report(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the metadata of such rollouts says, and the log as a warning.

    Args:
        records (iterable of `dict`): records with the columns of [`retokenization_columns`].

    Returns:
        `dict`: `completions`; `unchecked` (those whose number of sampled tokens is not known), `wrong_length` and
        `mean_length_error` (among the checked ones, in tokens), `changed_text`.
    """
    records = list(records)
    errors = [record[ERROR_COLUMN] for record in records if record[ERROR_COLUMN] is not None]
    report = {
        "completions": len(records),
        "unchecked": len(records) - len(errors),
        "wrong_length": sum(error != 0 for error in errors),
        "mean_length_error": sum(errors) / len(errors) if errors else None,
        "changed_text": sum(record[CHANGED_COLUMN] for record in records),
    }
    logger.warning(
        "the token ids of %d completions were made from their text: %d have another number of tokens than was sampled "
        "(column %s says by how many), %d could not be checked, %d decode to another text",
        report["completions"],
        report["wrong_length"],
        ERROR_COLUMN,
        report["unchecked"],
        report["changed_text"],
    )
    return report
