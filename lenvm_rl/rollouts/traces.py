"""Answers of reasoning models that were published as text, with what they thought, for rollouts of real length.

The files are those of the MisguidedAttention evaluation (github.com/cpldcpu/MisguidedAttention, CC0): JSON with a list
`results`, one object per prompt and model: `prompt_id`, `prompt`, `llm`, `output` (one text per sample) and, for models
that think, `thinking` (as many, or null). Three things that a value model is fitted on are not there:

- the sampled token ids: they are made from the text again (see `lenvm_rl.rollouts.retokenization`), with whichever
tokenizer is
  given, so the numbers of tokens are those of that tokenizer;
- the tags around the thinking: it is put between ``<think>`` and ``</think>``, as the models' templates have it;
- whether a completion ended: one with an answer is taken for finished, one that thinks and never answers for cut while
  thinking (nearly all of these break off in a sentence). The metadata says how many there are of either.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lenvm_rl.rollouts.job import tokenize_prompts
from lenvm_rl.rollouts.record import RolloutMetadata, count_rollouts, find_problem, set_aside
from lenvm_rl.rollouts.retokenization import retokenization_columns, retokenization_report, retokenize
from lenvm_rl.tokenization import tokenizer_fingerprint

logger = logging.getLogger(__name__)

OPEN, CLOSE = "<think>", "</think>"
# Column of a record: tokens of its text that were left out because of `max_tokens`.
CUT_COLUMN = "tokens_left_out"


def read_traces(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    models: Sequence[str] | None = None,
    max_tokens: int | None = None,
    eos_token_id: int | None = None,
    rejected_beside: str | os.PathLike | None = None,
) -> tuple[Dataset, RolloutMetadata]:
    """Reads a file; `write_rollouts(new_path, *read_traces(…))` makes a rollout file of it.

    A sample that cannot be used (no text, numbers of samples that disagree, …) is logged and set aside in
    `<name>.rejected.jsonl`, with the place of its object in the list as `line`.

    Args:
        path (`str` or `os.PathLike`): a `.json` file.
        tokenizer (`PreTrainedTokenizerBase`): makes the ids; its chat template makes the prompts.
        models (`Sequence[str]`, *optional*): keep the completions of these, by `llm`; must be given if the file has
            several. Groups are prompts, so keep one model for rollouts of one policy.
        max_tokens (`int`, *optional*): completions with more tokens, end-of-sequence counted, are cut to this many and
            marked as cut (`"length"`). How many were is logged and in the metadata, how much of each in the column
            `tokens_left_out`; the text is kept whole.
        eos_token_id (`int`, *optional*, defaults to the tokenizer's): the end put after a finished completion.
        rejected_beside (`str` or `os.PathLike`, *optional*, defaults to `path`): the file that bad samples are set
            aside beside.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: records in file order with the further columns `model`, `prompt_id`,
        `sample`, `completion_text`, `length_error` (`None`: the numbers of sampled tokens are not known),
        `text_changed` and `tokens_left_out`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for another kind of file, a tokenizer without chat template or end, several models and no choice, a
            model that is not there, a max_tokens below 1, or no usable sample.
    """
    path = Path(path)
    results = _read_results(path)
    kept = _chosen_models(results, models, path)
    reader = _Reader(tokenizer, max_tokens, eos_token_id)
    records, rejected, other = _convert(results, kept, reader, path)
    set_aside(path if rejected_beside is None else rejected_beside, rejected, len(records) + len(rejected))
    if not records:
        raise ValueError(f"{path} holds no usable completion ({len(rejected)} samples read, all set aside).")
    if other:
        logger.warning("%s: objects of other models are not read: %s", path, dict(other))
    dataset = Dataset.from_list(records)
    sampling = {**reader.sampling(), "retokenization": retokenization_report(records), "set_aside": len(rejected)}
    return dataset, RolloutMetadata(
        generator=", ".join(kept),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        sampling=sampling,
        seed=None,
        eos_token_ids=[reader.eos_token_id],
        **count_rollouts(dataset),
    )


def _convert(
    results: list[Any], kept: Sequence[str], reader: _Reader, path: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Records of the models that are kept, bad samples, and how many objects are of other models."""
    records: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    other: Counter[str] = Counter()
    for number, source in enumerate(tqdm(results, desc=path.name, unit="object"), start=1):
        if isinstance(source, dict) and isinstance(source.get("llm"), str) and source["llm"] not in kept:
            other[source["llm"]] += 1
            continue
        for problem, sample, record in reader.convert(source):
            if problem is None:
                records.append(record)
            else:
                rejected.append({"file": path.name, "line": number, "reason": problem, "record": sample})
    return records, rejected, other


def completion_text(thinking: str | None, output: str, opened: bool = False) -> str:
    """One text of what a model thought and answered, as its tokens would read.

    Args:
        thinking (`str`, *optional*): what it thought, if it did.
        output (`str`): its answer; an empty one leaves the thinking open, for it was cut there.
        opened (`bool`, *optional*, defaults to `False`): whether the prompt ends in the opening tag already.
    """
    if thinking is None:
        return output
    begun = thinking.lstrip() if opened else f"{OPEN}\n{thinking.lstrip()}"
    return f"{begun.rstrip()}\n{CLOSE}\n\n{output.lstrip()}" if output.strip() else begun


def _read_results(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), list):
        raise ValueError(f"{path} must hold an object with a list `results`, as the MisguidedAttention files do.")
    return content["results"]


def _chosen_models(results: list[Any], models: Sequence[str] | None, path: Path) -> list[str]:
    names = [source.get("llm") for source in results if isinstance(source, dict)]
    there = list(dict.fromkeys(name for name in names if isinstance(name, str)))
    if models is None:
        if len(there) > 1:
            raise ValueError(f"{path} has completions of several models, {', '.join(there)}: say which with `models`.")
        return there
    missing = sorted(set(models) - set(there))
    if missing or not models:
        raise ValueError(f"{path} has no completions of {missing or 'no model'}; it has those of {', '.join(there)}.")
    return [name for name in there if name in models]


class _Reader:
    """Turns objects of one file into records; equal prompts get one group and are tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, eos_token_id: int | None):
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template, so the prompts' tokens are not known: set one.")
        self.eos_token_id = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        if self.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token: give `eos_token_id`.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.groups: dict[str, int] = {}
        self.prompt_ids: list[list[int]] = []
        self.opened: list[bool] = []
        self.ends: Counter[str] = Counter()

    def convert(self, source: Any) -> Iterator[tuple[str | None, Any, dict[str, Any] | None]]:
        """(problem, sample, record) of each sample of an object; the problem or the record is `None`."""
        problem = _find_problem(source)
        if problem:
            yield problem, source, None
            return
        thoughts = source.get("thinking") or [None] * len(source["output"])
        named = {name: source.get(name) for name in ("prompt_id", "prompt", "llm")}
        for number, (thinking, output) in enumerate(zip(thoughts, source["output"], strict=True)):
            sample = {**named, "sample": number, "thinking": thinking, "output": output}
            problem = _find_text_problem(thinking, output)
            if problem is None:
                problem, record = self._record(sample)
            yield problem, sample, None if problem else record

    def sampling(self) -> dict[str, Any]:
        """What is known, and what was assumed, of how the completions were sampled; says so in the log, too."""
        logger.warning(
            "which completions ended is not in the file; assumed: the %d with an answer did, the %d without one were "
            "cut while thinking",
            self.ends["answered"],
            self.ends["cut_while_thinking"],
        )
        if self.max_tokens is not None:
            logger.warning(
                "%d completions have more than %d tokens: the rest is left out and they are marked as cut",
                self.ends["cut_at_max_tokens"],
                self.max_tokens,
            )
        return {
            "backend": "text",
            "token_ids": "retokenized",
            "finish_reason": {
                "assumed": "finished_if_answered",
                "max_tokens": self.max_tokens,
                **{name: self.ends[name] for name in ("answered", "cut_while_thinking", "cut_at_max_tokens")},
            },
        }

    def _record(self, sample: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        prompt = [{"role": "user", "content": sample["prompt"]}]
        group = self._group(prompt)
        output = sample["output"]
        thinking = sample["thinking"] if (sample["thinking"] or "").strip() else None
        if thinking is None and self.opened[group]:
            return f"it did not think, but the chat template opens {OPEN}: give another template", {}
        text = completion_text(thinking, output, self.opened[group])
        ids, changed = retokenize(self.tokenizer, text)
        answered = bool(output.strip())
        whole = [*ids, self.eos_token_id] if answered else ids
        kept = whole[: self.max_tokens]
        record = {
            "prompt": prompt,
            "prompt_ids": self.prompt_ids[group],
            "completion_ids": kept,
            "finish_reason": "stop" if answered and len(kept) == len(whole) else "length",
            "group": group,
            "model": sample["llm"],
            "prompt_id": sample["prompt_id"],
            "sample": sample["sample"],
            **retokenization_columns(text, None, changed),
            CUT_COLUMN: len(whole) - len(kept),
        }
        problem = find_problem(record, self.vocab_size, [self.eos_token_id])
        if problem is None:
            self.ends["answered" if answered else "cut_while_thinking"] += 1
            self.ends["cut_at_max_tokens"] += len(kept) < len(whole)
        return problem, record

    def _group(self, prompt: list[dict[str, str]]) -> int:
        key = prompt[0]["content"]
        if key not in self.groups:
            self.groups[key] = len(self.groups)
            self.prompt_ids += tokenize_prompts(self.tokenizer, [prompt])
            self.opened.append(self.tokenizer.decode(self.prompt_ids[-1]).rstrip().endswith(OPEN))
        return self.groups[key]


def _find_problem(source: Any) -> str | None:
    if not isinstance(source, dict):
        return f"not an object but a {type(source).__name__}"
    for name in ("prompt_id", "prompt", "llm"):
        if not isinstance(source.get(name), str) or not source[name].strip():
            return f"no text `{name}`"
    output, thinking = source.get("output"), source.get("thinking")
    if not isinstance(output, list) or not output:
        return "no list `output`"
    if thinking is not None and (not isinstance(thinking, list) or len(thinking) != len(output)):
        return "`thinking` is not a list with an entry for each `output`"
    return None


def _find_text_problem(thinking: Any, output: Any) -> str | None:
    if output is None:
        return "`output` is null"
    if not isinstance(output, str) or not isinstance(thinking, str | None):
        return "`output` or `thinking` is not a text"
    if not output.strip() and not (thinking or "").strip():
        return "there is no text"
    return None
