"""Rollouts of which only the text is left: token ids are made from it again, and what was lost is said aloud.

A text has many spellings in tokens, and a policy samples any of them; special tokens that it samples are usually left
out of the text. So ids made from text can differ in number from the sampled ones, and with them every label of a value
model. Records of such ids carry what their number is off by, and the metadata how often it is. Whether a completion
ended is not in such files either: it is assumed, and the metadata says how.

- [`read_sharegpt`]: conversations of the paper's released code.
- [`read_traces`]: published answers of reasoning models, what they thought included.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lenvm_rl.rollouts.record import RolloutMetadata, count_rollouts, find_problem, iterate_jsonl, set_aside
from lenvm_rl.tokenization import tokenize_prompts, tokenizer_fingerprint

logger = logging.getLogger(__name__)

# Columns of a record whose ids were made from text; the last counts the tokens left out because of `max_tokens`.
TEXT_COLUMN, ERROR_COLUMN, CHANGED_COLUMN = "completion_text", "length_error", "text_changed"
CUT_COLUMN = "tokens_left_out"

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
ASSUMPTIONS = ("all_finished", "cut_at_max_tokens")
# What the current version of the released code writes into `meta_info`; older files lack it.
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "max_tokens")

OPEN, CLOSE = "<think>", "</think>"


def retokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], bool]:
    """Token ids of a completion's text, none added at either end, and whether decoding them gives another text.

    A special token that stands in the text is read as plain text: had it been sampled, it would not be there.
    """
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return ids, tokenizer.decode(ids, skip_special_tokens=True) != text


def retokenization_columns(text: str, length_error: int | None, text_changed: bool) -> dict[str, Any]:
    """Further columns of a record whose ids were made from text, which is kept so that nothing is lost.

    The error is tokens made minus tokens sampled, `None` if the latter are not known; the text is changed where the ids
    decode to another one.
    """
    return {TEXT_COLUMN: text, ERROR_COLUMN: length_error, CHANGED_COLUMN: text_changed}


def retokenization_report(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the metadata of rollouts with the columns of [`retokenization_columns`] says, and the log as a warning.

    Returns:
        `dict`: `completions`; `unchecked` (their number of sampled tokens is not known), `wrong_length` and
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
        report["completions"], report["wrong_length"], ERROR_COLUMN, report["unchecked"], report["changed_text"],
    )  # fmt: skip
    return report


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

    One object per completion: `conversations` (`{"from": "human" | "gpt" | "system", "value": …}`, the last one the
    completion) and `meta_info` with `answer_token_length`, the number of tokens that the server sampled, and
    `lenvm_idx`, the prompt's number. A record that cannot be used (images, an unknown role, not valid JSON, …) is
    logged and set aside in `<name>.rejected.jsonl` beside the file, as `read_rollouts` does.

    Args:
        path (`str` or `os.PathLike`): a `.jsonl` file, or a `.json` list.
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
    """
    if assume not in ASSUMPTIONS:
        raise ValueError(f"The file does not say which completions ended: assume one of {', '.join(ASSUMPTIONS)}.")
    path = Path(path)
    reader, metas = _Reader(path, tokenizer, eos_token_id), []
    for number, source, problem in _conversations(path):
        problem = problem or _conversation_problem(source)
        if problem is None:
            *turns, last = source["conversations"]
            meta = source["meta_info"]
            problem = reader.add(
                [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns],
                last["value"],
                finished=assume == "all_finished" or _is_below_the_limit(meta, max_tokens),
                sampled=meta["answer_token_length"],
                answer_token_length=meta["answer_token_length"],
                lenvm_idx=meta.get("lenvm_idx"),
                dataset_name=meta.get("dataset_name"),
                source_fields=json.dumps(source.get("source_fields", {})),
            )
        if problem is None:
            metas.append(meta)
        else:
            reader.reject(number, problem, source)
    reader.set_aside()
    logger.warning("%s: which completions ended is not in the file; assumed: %s", path, assume.replace("_", " "))
    sampling = {
        **_uniform(metas, SAMPLING_FIELDS),
        "backend": "sharegpt",
        "finish_reason": {"assumed": assume, "max_tokens": max_tokens},
    }
    return reader.result(generator or _generator(metas, path), sampling)


def read_traces(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    models: Sequence[str] | None = None,
    max_tokens: int | None = None,
    eos_token_id: int | None = None,
    rejected_beside: str | os.PathLike | None = None,
) -> tuple[Dataset, RolloutMetadata]:
    """Reads a file of answers; `write_rollouts(new_path, *read_traces(…))` makes a rollout file of it.

    The files come from the MisguidedAttention evaluation (github.com/cpldcpu/MisguidedAttention, CC0): JSON with a
    list `results`, one object per prompt and model: `prompt_id`, `prompt`, `llm`, `output` (one text per sample) and,
    for models that think, `thinking` (as many, or null). The thinking is put between ``<think>`` and ``</think>``, as
    the models' templates have it. A completion with an answer is taken for finished, one that thinks and never answers
    for cut while thinking (nearly all of these break off in a sentence). With another tokenizer than the model's,
    lengths are in that one's tokens.

    A sample that cannot be used (no text, numbers of samples that disagree, …) is logged and set aside in
    `<name>.rejected.jsonl`, with the place of its object in the list as `line`.

    Args:
        path (`str` or `os.PathLike`): a `.json` file.
        tokenizer (`PreTrainedTokenizerBase`): makes the ids; its chat template makes the prompts.
        models (`Sequence[str]`, *optional*): keep the completions of these, by `llm`; must be given if the file has
            several. Groups are prompts, so keep one model for rollouts of one policy.
        max_tokens (`int`, *optional*): completions with more tokens, end-of-sequence counted, are cut to this many and
            marked as cut; the text is kept whole.
        eos_token_id (`int`, *optional*, defaults to the tokenizer's): the end put after a finished completion.
        rejected_beside (`str` or `os.PathLike`, *optional*, defaults to `path`): the file that bad samples are set
            aside beside.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: records in file order with the further columns `model`, `prompt_id`,
        `sample`, `completion_text`, `length_error` (`None`: the numbers of sampled tokens are not known),
        `text_changed` and `tokens_left_out` (because of `max_tokens`).
    """
    path = Path(path)
    results = _results(path)
    kept = _chosen_models(results, models, path)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
    reader, ends, others = _Reader(path, tokenizer, eos_token_id), Counter(), Counter()
    for number, source in enumerate(tqdm(results, desc=path.name, unit="object"), start=1):
        if isinstance(source, dict) and isinstance(source.get("llm"), str) and source["llm"] not in kept:
            others[source["llm"]] += 1
            continue
        for sample, problem in _samples(source):
            problem = problem or _add_trace(reader, sample, max_tokens, ends)
            if problem is not None:
                reader.reject(number, problem, sample)
    reader.set_aside(rejected_beside)
    if others:
        logger.warning("%s: objects of other models are not read: %s", path, dict(others))
    counts = {name: ends[name] for name in ("answered", "cut_while_thinking", "cut_at_max_tokens")}
    logger.warning(
        "which completions ended is not in the file; assumed: the %(answered)d with an answer did, the "
        "%(cut_while_thinking)d without one were cut while thinking",
        counts,
    )
    if max_tokens is not None:
        cut = counts["cut_at_max_tokens"]
        logger.warning("%d completions have more than %d tokens, and are cut: their rest is left out", cut, max_tokens)
    assumed = {"assumed": "finished_if_answered", "max_tokens": max_tokens, **counts}
    return reader.result(", ".join(kept), {"backend": "text", "finish_reason": assumed})


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


class _Reader:
    """Makes records of one file's prompts and texts; equal prompts get one group and are tokenised once."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, eos_token_id: int | None):
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template, so the prompts' tokens are not known: set one.")
        self.eos_token_id = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        if self.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token: give `eos_token_id`.")
        self.path, self.tokenizer = path, tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.prompts: dict[str, tuple[int, list[int]]] = {}
        self.records: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []

    def prompt(self, messages: list[dict[str, str]]) -> tuple[int, list[int]]:
        """Group and ids of a prompt."""
        key = json.dumps(messages)
        if key not in self.prompts:
            self.prompts[key] = len(self.prompts), tokenize_prompts(self.tokenizer, [messages])[0]
        return self.prompts[key]

    def add(
        self,
        messages: list[dict[str, str]],
        text: str,
        finished: bool,
        sampled: int | None = None,
        max_tokens: int | None = None,
        **columns: Any,
    ) -> str | None:
        """Keeps a completion, unless there is a problem with it, which is returned."""
        group, prompt_ids = self.prompt(messages)
        ids, changed = retokenize(self.tokenizer, text)
        whole = [*ids, self.eos_token_id] if finished else ids
        kept = whole[:max_tokens]
        record = {
            "prompt": messages,
            "prompt_ids": prompt_ids,
            "completion_ids": kept,
            "finish_reason": "stop" if finished and len(kept) == len(whole) else "length",
            "group": group,
            **retokenization_columns(text, None if sampled is None else len(whole) - sampled, changed),
            CUT_COLUMN: len(whole) - len(kept),
            **columns,
        }
        problem = find_problem(record, self.vocab_size, [self.eos_token_id])
        if problem is None:
            self.records.append(record)
        return problem

    def reject(self, number: int, problem: str, source: Any) -> None:
        """Notes what cannot be used."""
        self.rejected.append({"file": self.path.name, "line": number, "reason": problem, "record": source})

    def set_aside(self, beside: str | os.PathLike | None = None) -> None:
        """Writes what cannot be used; a `ValueError` if nothing else is there."""
        total = len(self.records) + len(self.rejected)
        set_aside(self.path if beside is None else beside, self.rejected, total)
        if not self.records:
            raise ValueError(f"{self.path} holds no usable completion ({total} read, all set aside).")

    def result(self, generator: str, sampling: dict[str, Any]) -> tuple[Dataset, RolloutMetadata]:
        """The records, and where they come from."""
        report = retokenization_report(self.records)
        dataset = Dataset.from_list(self.records)
        known = {"token_ids": "retokenized", "retokenization": report, "set_aside": len(self.rejected)}
        return dataset, RolloutMetadata(
            generator=generator,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            sampling={**sampling, **known},
            seed=None,
            eos_token_ids=[self.eos_token_id],
            **count_rollouts(dataset),
        )


def _json_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def _conversations(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (line or place in the list, object or text, problem)."""
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"ShareGPT rollouts are kept as .json or .jsonl, but the path is {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".jsonl":
        yield from iterate_jsonl(path)
        return
    content = _json_in(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of objects, but holds a {type(content).__name__}.")
    for number, item in enumerate(content, start=1):
        yield number, item, None


def _conversation_problem(source: Any) -> str | None:
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


def _is_below_the_limit(meta: dict[str, Any], max_tokens: int | None) -> bool:
    most, length = meta.get("max_tokens") if max_tokens is None else max_tokens, meta["answer_token_length"]
    if most is None or length is None:
        raise ValueError(
            "assume='cut_at_max_tokens' compares a completion's `answer_token_length` with the most tokens that were "
            "allowed, and a record lacks one of the two: give `max_tokens`, or assume 'all_finished'."
        )
    return length < most


def _uniform(metas: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Sampling settings that the file has: one value, or all values where they differ."""
    found = {name: list(dict.fromkeys(meta[name] for meta in metas if name in meta)) for name in names}
    return {name: values[0] if len(values) == 1 else values for name, values in found.items() if values}


def _generator(metas: list[dict[str, Any]], path: Path) -> str:
    names = Counter(meta.get("model_name") for meta in metas)
    if len(names) > 1 or None in names:
        raise ValueError(
            f"{path} does not name one policy for all its completions (found: {dict(names)}): give `generator`."
        )
    return next(iter(names))


def _results(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    content = _json_in(path)
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
        raise ValueError(f"{path} has no completions of {missing or 'no model'}; it has {', '.join(there)} in models.")
    return [name for name in there if name in models]


def _samples(source: Any) -> Iterator[tuple[Any, str | None]]:
    """Each sample of an object, or the whole object, with its problem."""
    problem = _answers_problem(source)
    if problem:
        yield source, problem
        return
    thoughts = source.get("thinking") or [None] * len(source["output"])
    named = {name: source.get(name) for name in ("prompt_id", "prompt", "llm")}
    for number, (thinking, output) in enumerate(zip(thoughts, source["output"], strict=True)):
        yield {**named, "sample": number, "thinking": thinking, "output": output}, _sample_problem(thinking, output)


def _answers_problem(source: Any) -> str | None:
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


def _sample_problem(thinking: Any, output: Any) -> str | None:
    if output is None:
        return "`output` is null"
    if not isinstance(output, str) or not isinstance(thinking, str | None):
        return "`output` or `thinking` is not a text"
    if not output.strip() and not (thinking or "").strip():
        return "there is no text"
    return None


def _add_trace(reader: _Reader, sample: dict[str, Any], max_tokens: int | None, ends: Counter[str]) -> str | None:
    """Keeps a sample and counts how it ended, or returns its problem."""
    messages = [{"role": "user", "content": sample["prompt"]}]
    opened = reader.tokenizer.decode(reader.prompt(messages)[1]).rstrip().endswith(OPEN)
    thinking = sample["thinking"] if (sample["thinking"] or "").strip() else None
    if thinking is None and opened:
        return f"it did not think, but the chat template opens {OPEN}: give another template"
    answered = bool(sample["output"].strip())
    problem = reader.add(
        messages,
        completion_text(thinking, sample["output"], opened),
        answered,
        max_tokens=max_tokens,
        model=sample["llm"],
        prompt_id=sample["prompt_id"],
        sample=sample["sample"],
    )
    if problem is None:
        ends["answered" if answered else "cut_while_thinking"] += 1
        ends["cut_at_max_tokens"] += reader.records[-1][CUT_COLUMN] > 0
    return problem
