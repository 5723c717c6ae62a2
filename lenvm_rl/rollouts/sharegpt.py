"""Rollouts of the paper's released code: ShareGPT conversations, of which the token ids and the ends are lost.

One object per completion, in a `.jsonl` file or a `.json` list: `conversations` (`{"from": "human" | "gpt" | "system",
"value": …}`, the last one the completion) and `meta_info` with `answer_token_length`, the number of tokens that the
server sampled, and `lenvm_idx`, the prompt's number. Two things that a value model is fitted on are not there:

- the sampled token ids: they are made from the text again, and the records say where their number is another than
  `answer_token_length` (see `lenvm_rl.rollouts.retokenization`);
- whether a completion ended or was cut: it has to be assumed, and the metadata keeps what was assumed.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lenvm_rl.rollouts.job import tokenize_prompts
from lenvm_rl.rollouts.record import RolloutMetadata, count_rollouts, find_problem, set_aside
from lenvm_rl.rollouts.retokenization import retokenization_columns, retokenization_report, retokenize
from lenvm_rl.tokenization import tokenizer_fingerprint

logger = logging.getLogger(__name__)

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
ASSUMPTIONS = ("all_finished", "cut_at_max_tokens")
# What the current version of the released code writes beside the two fields; older files lack it.
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "max_tokens")


def read_sharegpt(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    assume: str,
    max_tokens: int | None = None,
    generator: str | None = None,
    eos_token_id: int | None = None,
) -> tuple[Dataset, RolloutMetadata]:
    """Reads a file of the released code; `write_rollouts(new_path, *read_sharegpt(…))` makes a rollout file of it.

    A record that cannot be used (images, an unknown role, not valid JSON, …) is logged and set aside in
    `<name>.rejected.jsonl` beside the file, as `read_rollouts` does.

    Args:
        path (`str` or `os.PathLike`): a `.jsonl` or `.json` file.
        tokenizer (`PreTrainedTokenizerBase`): the generator's, with the chat template that its server applied.
        assume (`str`): which completions ended, since the file does not say. `"all_finished"`: every one; cut ones
            then look short, as in the released code. `"cut_at_max_tokens"`: those with fewer than `max_tokens` tokens.
        max_tokens (`int`, *optional*): most tokens that the server allowed, where `meta_info` does not say.
        generator (`str`, *optional*, defaults to the `model_name` of `meta_info`): the policy.
        eos_token_id (`int`, *optional*, defaults to the tokenizer's): the end put after a finished completion.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: records in file order with the further columns `completion_text`,
        `length_error`, `text_changed`, `answer_token_length`, `lenvm_idx` (unique within one data set only, so groups
        are equal prompts), `dataset_name` and `source_fields` (JSON).

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for another assumption or file type, a tokenizer without chat template, an unknown generator or
            `max_tokens` where it is needed, or no usable record.
    """
    path = Path(path)
    reader = _Reader(tokenizer, assume, max_tokens, eos_token_id)
    records, rejected, sources = [], [], []
    for number, source, problem in _read_objects(path):
        problem, record = (problem, None) if problem else reader.convert(source)
        if problem is None:
            records.append(record)
            sources.append(source["meta_info"])
        else:
            rejected.append({"file": path.name, "line": number, "reason": problem, "record": source})
    set_aside(path, rejected, len(records) + len(rejected))
    if not records:
        raise ValueError(f"{path} holds no usable completion ({len(rejected)} records read, all set aside).")
    logger.warning("%s: which completions ended is not in the file; assumed: %s", path, assume.replace("_", " "))
    dataset = Dataset.from_list(records)
    return dataset, RolloutMetadata(
        generator=generator or _generator(sources, path),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        sampling={
            **reader.sampling(sources),
            "retokenization": retokenization_report(records),
            "set_aside": len(rejected),
        },
        seed=None,
        eos_token_ids=[reader.eos_token_id],
        **count_rollouts(dataset),
    )


def _read_objects(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (line or place in the list, object or text, problem)."""
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"ShareGPT rollouts are kept as .json or .jsonl, but the path is {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}).") from error
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of objects, but holds a {type(content).__name__}.")
        for number, item in enumerate(content, start=1):
            yield number, item, None
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line), None
            except ValueError as error:
                yield number, line.decode("utf-8", errors="replace").rstrip("\n"), f"not valid JSON ({error})"


class _Reader:
    """Turns objects of one file into records; equal prompts get one group and are tokenised once."""

    def __init__(self, tokenizer, assume, max_tokens, eos_token_id):
        if assume not in ASSUMPTIONS:
            raise ValueError(f"The file does not say which completions ended: assume one of {', '.join(ASSUMPTIONS)}.")
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template, so the prompts' tokens are not known: set one.")
        self.eos_token_id = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        if self.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token: give `eos_token_id`.")
        self.tokenizer, self.assume, self.max_tokens = tokenizer, assume, max_tokens
        self.groups: dict[str, int] = {}
        self.prompt_ids: list[list[int]] = []

    def convert(self, source: Any) -> tuple[str | None, dict[str, Any] | None]:
        """(problem, record): one of the two is `None`."""
        problem = _find_problem(source)
        if problem:
            return problem, None
        *turns, last = source["conversations"]
        meta = source["meta_info"]
        prompt = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
        group = self._group(prompt)
        ids, changed = retokenize(self.tokenizer, last["value"])
        length = meta["answer_token_length"]
        finished = self._finished(length, meta)
        ids = [*ids, self.eos_token_id] if finished else ids
        record = {
            "prompt": prompt,
            "prompt_ids": self.prompt_ids[group],
            "completion_ids": ids,
            "finish_reason": "stop" if finished else "length",
            "group": group,
            **retokenization_columns(last["value"], None if length is None else len(ids) - length, changed),
            "answer_token_length": length,
            "lenvm_idx": meta.get("lenvm_idx"),
            "dataset_name": meta.get("dataset_name"),
            "source_fields": json.dumps(source.get("source_fields", {})),
        }
        problem = find_problem(record, max(self.tokenizer.get_vocab().values()) + 1, [self.eos_token_id])
        return problem, None if problem else record

    def sampling(self, sources: list[dict[str, Any]]) -> dict[str, Any]:
        """What is known, and what was assumed, of how the completions were sampled."""
        return {
            **_uniform(sources, SAMPLING_FIELDS),
            "backend": "sharegpt",
            "token_ids": "retokenized",
            "finish_reason": {"assumed": self.assume, "max_tokens": self.max_tokens},
        }

    def _group(self, prompt: list[dict[str, str]]) -> int:
        key = json.dumps(prompt)
        if key not in self.groups:
            self.groups[key] = len(self.groups)
            self.prompt_ids += tokenize_prompts(self.tokenizer, [prompt])
        return self.groups[key]

    def _finished(self, length: int | None, meta: dict[str, Any]) -> bool:
        if self.assume == "all_finished":
            return True
        most = meta.get("max_tokens") if self.max_tokens is None else self.max_tokens
        if most is None or length is None:
            raise ValueError(
                "assume='cut_at_max_tokens' compares a completion's `answer_token_length` with the most tokens that "
                "were allowed, and a record lacks one of the two: give `max_tokens`, or assume 'all_finished'."
            )
        return length < most


def _find_problem(source: Any) -> str | None:
    if not isinstance(source, dict) or not isinstance(source.get("conversations"), list):
        return "no list `conversations`"
    meta = source.get("meta_info")
    if not isinstance(meta, dict) or "answer_token_length" not in meta:
        return "no `meta_info` with an `answer_token_length`"
    if meta["answer_token_length"] is not None and type(meta["answer_token_length"]) is not int:
        return "`answer_token_length` is not a number of tokens"
    if source.get("images"):
        return "it has images, whose tokens a tokenizer does not make"
    turns = source["conversations"]
    if len(turns) < 2:
        return "no prompt before the completion"
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            return f"a turn is not one of {', '.join(ROLES)} with a text as `value`"
    return None if turns[-1]["from"] == "gpt" else "the last turn is not the completion (`gpt`)"


def _uniform(sources: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Sampling settings that the file has: one value, or all values where they differ."""
    found = {}
    for name in names:
        values = list(dict.fromkeys(source[name] for source in sources if name in source))
        if values:
            found[name] = values[0] if len(values) == 1 else values
    return found


def _generator(sources: list[dict[str, Any]], path: Path) -> str:
    names = Counter(source.get("model_name") for source in sources)
    if len(names) > 1 or None in names:
        raise ValueError(
            f"{path} does not name one policy for all its completions (found: {dict(names)}): give `generator`."
        )
    return next(iter(names))
