"""Prompts: what is one, how they are read from a data set, and the token ids that a policy sees of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]

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

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it cannot be read, or there is no row.
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


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: text as it is, messages through the chat template with the generation prompt.

    Raises:
        ValueError: `prompts` is one text, or one of them is neither text nor messages, has no tokens, or does not go
            through the chat template. It is named by its place.
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
            "Give messages that the template takes, or text, or a tokenizer with a chat template."
        ) from error


def check_context(
    prompts: Sequence[Prompt], source: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, context: int | None
) -> None:
    """Raise a `ValueError` that names the longest prompt of a data set if it leaves no room for a completion.

    Those alone are tokenised that are long enough: a token stands for a byte at least, but for what a chat template
    puts around, which is taken to be no more than four times the tokens of the first prompt.

    Args:
        prompts, source, tokenizer: as in [`check_prompts`].
        max_new_tokens, context: as in [`check_room`].
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
    if context is not None and lengths[longest] + max_new_tokens > context:
        raise ValueError(
            f"{name or f'Prompt {longest}'} has {lengths[longest]} tokens; with a completion of {max_new_tokens} "
            f"(max_new_tokens, max_completion_length) it exceeds the model's context of {context}. Allow fewer, or "
            "leave out the prompt: prompts are never cut."
        )
