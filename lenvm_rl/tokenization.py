"""What a model's token ids stand for, and which ids a prompt becomes: all that depends on the tokenizer alone.

A value model reads token ids and nothing else: what it says about a policy's completion means something only if both
give every id the same token and stop at the same one. So tokenizers have fingerprints, which are compared. Prompts are
text, tokenised as it is, or messages, for the chat template; a data set of them is looked through before time is spent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

TokenizerOrFingerprint = PreTrainedTokenizerBase | dict[str, Any] | None
Prompt = str | list[dict[str, Any]]

logger = logging.getLogger(__name__)

SHOWN_DIFFERENCES = 5
# What stands for a character of which not all bytes are there.
REPLACEMENT = "\ufffd"
# Share of the context beyond which a prompt and its completion are near to being refused.
NEAR_CONTEXT = 0.9
# How the files that data sets come in are read: the builder of `datasets`, and its settings.
_BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MIXED = "is of another kind than row 0: one of them is text, the other holds messages"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What has to agree for two tokenizers to be the same vocabulary, small enough to live in a model's config.

    Returns:
        `dict`: `vocab_size` (the number of tokens, added ones included), `largest_id` (not below it where ids are left
        out), `eos_token_id` and `pad_token_id` (`None` where there is none), and `sha256`, the digest of the (token,
        id) pairs sorted by token.
    """
    pairs = sorted(tokenizer.get_vocab().items())
    return {
        "vocab_size": len(pairs),
        "largest_id": max((index for _, index in pairs), default=-1),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # JSON with ASCII escapes is the same text everywhere, whatever stands in a token (lone surrogates too).
        "sha256": hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode("ascii")).hexdigest(),
    }


def check_same_tokenizer(
    ours: TokenizerOrFingerprint,
    theirs: TokenizerOrFingerprint,
    ours_name: str = "the length value model",
    theirs_name: str = "the policy",
) -> None:
    """Raise a `ValueError` unless both name the same tokens by the same ids and end at the same one.

    Which token pads may differ, because padding is masked out. A vocabulary with one token more is another vocabulary
    all the same.

    Args:
        ours, theirs (`PreTrainedTokenizerBase` or `dict`): tokenizers, or what [`tokenizer_fingerprint`] gives (a model
            that was made without a tokenizer carries none, which is refused). Where both are tokenizers, the error
            names the first tokens that differ.
        ours_name, theirs_name (`str`, *optional*): what the error calls them.
    """
    mine, other = _fingerprint_of(ours, ours_name), _fingerprint_of(theirs, theirs_name)
    differences = []
    if mine["vocab_size"] != other["vocab_size"]:
        differences.append(
            f"{ours_name} has a vocabulary of {mine['vocab_size']} tokens, {theirs_name} one of {other['vocab_size']}"
        )
    if mine["sha256"] != other["sha256"]:
        differences.append(_vocabulary_difference(ours, theirs, ours_name, theirs_name))
    if mine["eos_token_id"] != other["eos_token_id"]:
        differences.append(
            f"the end of sequence is id {mine['eos_token_id']} for {ours_name}, "
            f"id {other['eos_token_id']} for {theirs_name}"
        )
    if differences:
        raise ValueError(
            f"The tokenizers of {ours_name} and {theirs_name} differ: {'; '.join(differences)}. Values are read per "
            "token id, so both have to use the same tokenizer: pretrain the length value model on rollouts of this "
            "policy, with the policy's own tokenizer, or take the policy that it was made for."
        )


def check_pad_is_not_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` unless the tokenizer has a pad token and an end-of-sequence token, and they are two.

    With one token for both, a mask made from the pad token drops the end of every completion, and with it the decision
    to stop.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    advice = (
        "set `tokenizer.pad_token` to a special token of the vocabulary that never occurs in text (many vocabularies "
        "reserve some), for the policy and the length value model alike."
    )
    if eos is None:
        raise ValueError("The tokenizer has no end-of-sequence token, so nothing ever ends: set `tokenizer.eos_token`.")
    if pad is None:
        raise ValueError(f"The tokenizer has no pad token: {advice}")
    if pad == eos:
        raise ValueError(
            f"The pad token and the end-of-sequence token are the same ({tokenizer.eos_token!r}, id {eos}), so the end "
            f"of a completion would be masked as padding: {advice}"
        )


def _fingerprint_of(side: TokenizerOrFingerprint, name: str) -> dict[str, Any]:
    if side is not None and not isinstance(side, dict):
        return tokenizer_fingerprint(side)
    if side is None or not {"vocab_size", "eos_token_id", "sha256"} <= side.keys():
        raise ValueError(
            f"The tokenizer of {name} is not known, so it cannot be compared. Give it when the model is made "
            "(`LengthValueModel.from_backbone(…, tokenizer=tokenizer)`), or set `model.config.tokenizer_fingerprint` "
            "to `tokenizer_fingerprint(tokenizer)` and save the model again."
        )
    return side


def _vocabulary_difference(
    ours: TokenizerOrFingerprint, theirs: TokenizerOrFingerprint, ours_name: str, theirs_name: str
) -> str:
    if isinstance(ours, dict) or isinstance(theirs, dict):
        return "their (token, id) pairs differ"
    mine, other = ({i: token for token, i in side.get_vocab().items()} for side in (ours, theirs))
    differing = [i for i in sorted(mine.keys() | other.keys()) if mine.get(i) != other.get(i)]
    shown = [
        f"id {i} is {mine.get(i)!r} for {ours_name} and {other.get(i)!r} for {theirs_name}"
        for i in differing[:SHOWN_DIFFERENCES]
    ]
    more = ["…"] if len(differing) > SHOWN_DIFFERENCES else []
    return f"{len(differing)} ids differ ({', '.join(shown + more)})"


def load_prompts(
    name_or_path: str, config: str | None = None, split: str = "train", limit: int | None = None
) -> Dataset:
    """Loads a data set of prompts, from the hub or from a local file.

    Args:
        name_or_path (`str`): a path that ends in `.jsonl`, `.json`, `.parquet`, `.csv` or `.tsv` (and `.gz` and the
            like), a folder of such files, or a hub id.
        config (`str`, *optional*): configuration of a data set from the hub.
        split (`str`, *optional*, defaults to `"train"`): split of a data set from the hub; a file has no splits.
        limit (`int`, *optional*): keep the first so many rows.
    """
    load = _loader(name_or_path, config, split)
    try:
        dataset = load()
    except OSError as error:
        raise FileNotFoundError(
            f"There is no file or folder {name_or_path} (looked from {os.getcwd()}), and as a hub id it could not be "
            f"loaded: {error}"
        ) from error
    except (ValueError, DatasetsError) as error:
        # What is wrong in a file is told by the error beneath.
        raise ValueError(f"{name_or_path} could not be read as a data set: {error.__cause__ or error}") from error
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise ValueError(f"{name_or_path} holds no rows (limit {limit}).")
    return dataset


def _loader(name_or_path: str, config: str | None, split: str) -> Callable[[], Dataset]:
    path = Path(name_or_path).expanduser()
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSED]
    builder, settings = _BUILDERS.get(suffixes[-1] if suffixes else "", (None, {}))
    if path.is_file():
        if builder is None:
            raise ValueError(f"{name_or_path} is no data file of a known kind: give one of {', '.join(_BUILDERS)}.")
        with open(path, "rb") as file:
            if not file.read(4096).strip():
                raise ValueError(f"{name_or_path} is empty: it needs a row per prompt.")
        return partial(load_dataset, builder, data_files=str(path), split="train", **settings)
    if builder is not None:
        raise FileNotFoundError(f"There is no data file {name_or_path} (looked from {os.getcwd()}): check the path.")
    return partial(load_dataset, str(path) if path.is_dir() else name_or_path, config, split=split)


def find_prompt_problem(prompt: Any) -> str | None:
    """What is wrong with a prompt that is neither text nor messages: the rest of a sentence, or `None`."""
    if prompt is None:
        return "is missing (None)"
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, (list, tuple)):
        return f"is a {type(prompt).__name__} ({str(prompt)[:40]}), where text or a list of messages is needed"
    if not prompt:
        return "is a list without a message"
    for place, message in enumerate(prompt):
        if not isinstance(message, Mapping):
            return f"is a list that holds a {type(message).__name__} ({str(message)[:40]}), where a message is needed"
        said = message.get("content") is not None or message.get("tool_calls")
        if not isinstance(message.get("role"), str) or not said:
            return f"has a message without a role or a content (message {place})"
    return None


def check_prompts(
    prompts: Sequence[Any], source: str, tokenizer: PreTrainedTokenizerBase | None = None, chat: bool = False
) -> None:
    """Raise a `ValueError` that names the first row of a data set which has no prompt in it, before time is spent.

    Args:
        prompts (sequence): a column of the data set, in its order.
        source (`str`): the data set and its column, for the error.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the policy; says whether empty text is a prompt.
        chat (`bool`, *optional*, defaults to `False`): whether they are to be put into messages, and so are texts.
    """
    kinds = [isinstance(prompt, str) for prompt in prompts]
    wrong = [
        (row, problem)
        for row, prompt in enumerate(prompts)
        if (problem := _problem(prompt, tokenizer, chat) or (MIXED if kinds[row] != kinds[0] else None))
    ]
    if wrong:
        row, problem = wrong[0]
        others = f", and {len(wrong) - 1} further rows are no better" if len(wrong) > 1 else ""
        raise ValueError(
            f"{source}: row {row} (the first is 0) {problem}{others}. Mend or remove such rows, or name another column "
            "with --prompt_column."
        )
    if prompts and kinds[0] and not chat and getattr(tokenizer, "chat_template", None) is not None:
        logger.warning(
            "%s: prompts are plain text, and the tokenizer has a chat template, which they do not go through. If the "
            "policy was trained to chat, set --chat true, or give lists of messages.", source,
        )  # fmt: skip


def _problem(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, chat: bool) -> str | None:
    problem = find_prompt_problem(prompt)
    if problem is not None:
        return problem
    if not isinstance(prompt, str):
        return "holds messages already: --chat is for texts, leave it out" if chat else None
    if prompt.strip():
        return None
    # A tokenizer that puts a token before every text makes a prompt of nothing.
    return "is empty" if chat or (tokenizer is not None and not tokenizer(prompt)["input_ids"]) else None


def as_chats(texts: Iterable[str], system_prompt: str | None = None) -> list[list[dict[str, str]]]:
    """Each text as a user's message, after the system prompt if there is one."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [[*system, {"role": "user", "content": text}] for text in texts]


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: text as it is, messages through the chat template with the generation prompt.

    A prompt that has no tokens, or of which the template makes none, is refused by its place.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text ({prompts[:40]!r}), and each of its letters would be one: give a list.")
    ids = []
    for index, prompt in enumerate(prompts):
        problem = find_prompt_problem(prompt)
        if problem is not None:
            raise ValueError(f"Prompt {index} {problem}.")
        row = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else _from_messages(tokenizer, prompt, index)
        if not row:
            raise ValueError(f"Prompt {index} has no tokens ({prompt!r}): the first value is read at its last token.")
        ids.append(list(row))
    return ids


def _from_messages(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Mapping[str, Any]], index: int) -> list[int]:
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(
            f"Prompt {index} is a list of messages, and the tokenizer's chat template makes no tokens of it: {error}. "
            "Give messages that the template takes, or a tokenizer with a chat template, or text (a program's `chat` "
            "makes messages of it: leave that out)."
        ) from error


def check_context(
    prompts: Sequence[Prompt], source: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, context: int | None
) -> None:
    """Raise a `ValueError` that names the longest prompt of a data set if it leaves no room for a completion.

    Those alone are tokenised that are long enough: a token stands for a byte at least, but for what a chat template
    puts around, which is taken to be no more than four times the tokens of the first prompt.
    """
    if context is None:
        return
    room = context - max_new_tokens - 4 * len(tokenize_prompts(tokenizer, prompts[:1])[0])
    rows = [row for row, prompt in enumerate(prompts) if _bytes(prompt) > room]
    lengths = [len(ids) for ids in tokenize_prompts(tokenizer, [prompts[row] for row in rows])]
    if rows:
        longest = max(range(len(rows)), key=lambda place: lengths[place])
        check_room([lengths[longest]], max_new_tokens, context, name=f"{source}: row {rows[longest]} (the first is 0)")


def _bytes(prompt: Any) -> int:
    """Bytes of all text in a prompt."""
    if isinstance(prompt, str):
        return len(prompt.encode(errors="surrogatepass"))
    if isinstance(prompt, Mapping):
        return sum(map(_bytes, prompt.values()))
    return sum(map(_bytes, prompt)) if isinstance(prompt, (list, tuple)) else 0


def check_room(lengths: Sequence[int], max_new_tokens: int, context: int | None, name: str | None = None) -> None:
    """Raise a `ValueError` that names the longest prompt if it leaves no room for a completion.

    Args:
        lengths (`Sequence[int]`): tokens of each prompt.
        max_new_tokens (`int`): most tokens of a completion.
        context (`int`, *optional*): most tokens of both; not checked when omitted.
        name (`str`, *optional*, defaults to `"Prompt"` and its place): what the error calls the longest.
    """
    longest = max(range(len(lengths)), key=lambda index: lengths[index])
    if context is None:
        return
    total = lengths[longest] + max_new_tokens
    if NEAR_CONTEXT * context < total <= context:
        logger.warning(
            "%s has %d tokens; with a completion of %d it fills %.0f%% of the model's context of %d: a longer prompt "
            "will be refused.",
            name or f"Prompt {longest}", lengths[longest], max_new_tokens, 100 * total / context, context,
        )  # fmt: skip
    if total > context:
        raise ValueError(
            f"{name or f'Prompt {longest}'} has {lengths[longest]} tokens; with a completion of {max_new_tokens} "
            f"(max_new_tokens, max_completion_length) it exceeds the model's context of {context}. Allow fewer, or "
            "leave out the prompt: prompts are never cut."
        )


class IncrementalText:
    """Turns token ids into text, piece by piece: no character is split, and nothing of a stop string gets out.

    The pieces together are the text of all tokens, special ones skipped, up to the first stop string. `stopped` says
    whether a stop string occurred.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._told = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` was chosen; often a token more or less."""
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        if not self.stopped and added is not None and added.special and added.content in self._stop:
            # It is no text, and can be named as a stop string all the same.
            text, self.stopped = self.finish(), True
            return text
        self._ids.append(token_id)
        return self.finish(last=False)

    def finish(self, last: bool = True) -> str:
        """What was held back, now that no token follows."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not last:
            text = text.rstrip(REPLACEMENT)
            starts = [size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
            text = text[: len(text) - max(starts, default=0)]
        piece = text[self._told :]
        self._told += len(piece)
        return piece
