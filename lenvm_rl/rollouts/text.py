"""Rollouts of which only the text is left: token ids are made from it again, and what was assumed is said aloud, once.

A text has many spellings in tokens, and a policy samples any of them; special tokens that it samples are usually left
out of the text. So ids made from text can differ in number from the sampled ones, and with them every label of a value
model. Records of such ids carry what their number is off by, and the metadata how often it is. Most files do not say
either which completions ended, and some not which tokens the prompt had. [`import_completions`] assumes what it has to,
and reports it with counts: one warning, and `finish_reason`, `retokenization` and `prompts` in the metadata's
`sampling`. The files' formats are in `lenvm_rl.rollouts.formats`.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lenvm_rl.rollouts.formats import SOURCE_FORMATS, SourceCompletion
from lenvm_rl.rollouts.record import RolloutMetadata, build_table, count_rollouts, find_problem, set_aside
from lenvm_rl.tokenization import tokenize_prompts, tokenizer_fingerprint

logger = logging.getLogger(__name__)

# Columns of a record whose ids were made from text; the last counts the tokens left out because of `max_tokens`.
TEXT_COLUMN, ERROR_COLUMN, CHANGED_COLUMN = "completion_text", "length_error", "text_changed"
CUT_COLUMN = "tokens_left_out"

ASSUMPTIONS = ("all_finished", "cut_at_max_tokens")
FINISHED_IF_ANSWERED = "finished_if_answered"  # of traces, whose files tell what was thought from what was answered
# What a file may say of its sampling.
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "max_tokens")
PROMPT_TOKENS = {
    "chat_template": "from messages, by the tokenizer's chat template",
    "text": "from text as it is, without a chat template",
    "decoded_text": "from text that a chat template was applied to, nothing added; special tokens are lost where the "
    "text was decoded without them",
    "file": "as the file has them",
}


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
    """What the metadata of rollouts with the columns of [`retokenization_columns`] says; others are left out.

    Returns:
        `dict`: `completions`; `unchecked` (their number of sampled tokens is not known), `wrong_length` and
        `mean_length_error` (among the checked ones, in tokens), `changed_text`.
    """
    records = [record for record in records if CHANGED_COLUMN in record]
    errors = [record[ERROR_COLUMN] for record in records if record[ERROR_COLUMN] is not None]
    return {
        "completions": len(records),
        "unchecked": len(records) - len(errors),
        "wrong_length": sum(error != 0 for error in errors),
        "mean_length_error": sum(errors) / len(errors) if errors else None,
        "changed_text": sum(record[CHANGED_COLUMN] for record in records),
    }


def retokenization_sentence(report: dict[str, Any]) -> str:
    """What [`retokenization_report`] found, for the log."""
    return (
        f"the token ids of {report['completions']} completions were made from their text: {report['wrong_length']} "
        f"have another number of tokens than was sampled (column {ERROR_COLUMN} says by how many), "
        f"{report['unchecked']} could not be checked, {report['changed_text']} decode to another text"
    )


def import_completions(
    path: str | os.PathLike,
    source_format: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    assume: str | None = None,
    max_tokens: int | None = None,
    generator: str | None = None,
    eos_token_id: int | None = None,
    rejected_beside: str | os.PathLike | None = None,
    **options: Any,
) -> tuple[Dataset, RolloutMetadata]:
    """Reads a file of another tool; `write_rollouts(new_path, *import_completions(…))` makes a rollout file of it.

    What cannot be used is logged and set aside in `<name>.rejected.jsonl`, as `read_rollouts` does.

    Args:
        path (`str` or `os.PathLike`): the file.
        source_format (`str`): a name in [`~lenvm_rl.rollouts.formats.SOURCE_FORMATS`].
        tokenizer (`PreTrainedTokenizerBase`): the policy's, with the chat template that its server applied.
        assume (`str`, *optional*): which completions ended, where the file does not say (a text that ends in the
            end-of-sequence token, or ids that do, say so; for traces it is always assumed that those with an answer
            did). `"all_finished"`: every one; cut ones then look short, as in the released code. `"cut_at_max_tokens"`:
            those with fewer than `max_tokens` tokens, counted by the sampler or else made from the text.
        max_tokens (`int`, *optional*): with `assume="cut_at_max_tokens"`, the most tokens that the sampler allowed, if
            the file does not say. Without, completions with more tokens, end-of-sequence counted, are cut to this many
            and marked as cut; the text is kept whole.
        generator (`str`, *optional*, defaults to what the file says): the policy's name.
        eos_token_id (`int`, *optional*, defaults to the tokenizer's): the end put after a finished completion.
        rejected_beside (`str` or `os.PathLike`, *optional*, defaults to `path`): the file that bad ones are set aside
            beside.
        options: further arguments of the format's function in `lenvm_rl.rollouts.formats`.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: records in file order with the format's further columns and, where
        ids were made from text, `completion_text`, `length_error` (tokens made minus sampled, `None` if the latter are
        not known), `text_changed` and `tokens_left_out` (because of `max_tokens`).
    """
    if source_format not in SOURCE_FORMATS:
        raise ValueError(f"source_format must be one of {', '.join(SOURCE_FORMATS)}, got {source_format!r}.")
    if source_format == "traces":
        if assume is not None:
            raise ValueError(f"Leave `assume` out for traces: it is {FINISHED_IF_ANSWERED!r} there.")
        assume = FINISHED_IF_ANSWERED
    elif assume not in (None, *ASSUMPTIONS):
        raise ValueError(f"assume must be one of {', '.join(ASSUMPTIONS)}, got {assume!r}.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
    path = Path(path)
    converter = _Converter(path, tokenizer, eos_token_id, assume, max_tokens)
    for item in tqdm(SOURCE_FORMATS[source_format](path, tokenizer, **options), desc=path.name, unit="completion"):
        if generator is None and item.problem is None and item.settings.get("model_name") is None:
            raise ValueError(f"{path} does not name the policy (the first is at {item.line}): give `generator`.")
        problem = item.problem or converter.add(item)
        if problem is not None:
            converter.reject(item, problem)
    set_aside(path if rejected_beside is None else rejected_beside, converter.rejected, converter.total)
    if not converter.records:
        raise ValueError(f"{path} holds no usable completion ({converter.total} read, all set aside).")
    return converter.result(generator, source_format)


class _Converter:
    """Makes records of one file's items; equal prompts get one group and are tokenised once."""

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_id: int | None,
        assume: str | None,
        max_tokens: int | None,
    ):
        self.eos_token_id = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        if self.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token: give `eos_token_id`.")
        self.path, self.tokenizer, self.assume, self.max_tokens = path, tokenizer, assume, max_tokens
        self.end = tokenizer.decode([self.eos_token_id])
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.prompts: dict[str, tuple[int, list[int]]] = {}
        self.records: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self.settings: list[dict[str, Any]] = []
        self.ends: Counter[str] = Counter()
        self.prompt_tokens: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Completions read."""
        return len(self.records) + len(self.rejected)

    def add(self, item: SourceCompletion) -> str | None:
        """Keeps a completion, unless there is a problem with it, which is returned."""
        origin = _prompt_origin(item)
        if origin == "chat_template" and isinstance(item.prompt, list) and self.tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template, so the prompts' tokens are not known: set one.")
        try:
            group, prompt_ids = self._prompt(item)
        except ValueError as error:
            return str(error).replace("Prompt 0", "the prompt", 1)
        if item.completion_ids is None:
            whole, finished, how, columns = self._from_text(item)
        else:
            whole, columns = item.completion_ids, {}
            ended = isinstance(whole, list) and whole[-1:] == [self.eos_token_id]
            finished, how = (ended if item.finished is None else item.finished), "in_file"
        cut_here = isinstance(whole, list) and self.assume != "cut_at_max_tokens"
        kept = whole[: self.max_tokens] if cut_here else whole
        record = {
            "prompt": item.prompt,
            "prompt_ids": prompt_ids,
            "completion_ids": kept,
            "finish_reason": "stop" if finished and kept == whole else "length",
            "group": group,
            **columns,
            CUT_COLUMN: len(whole) - len(kept) if cut_here else 0,
            **item.columns,
        }
        kind = type(self.records[0]["prompt"]) if self.records else None
        problem = find_problem(record, self.vocab_size, [self.eos_token_id], kind)
        if problem is None:
            self.records.append(record)
            self.settings.append(item.settings)
            self.prompt_tokens[origin] += 1
            self.ends.update([how, *(["cut_here"] if record[CUT_COLUMN] else [])])
        return problem

    def reject(self, item: SourceCompletion, problem: str) -> None:
        """Notes what cannot be used."""
        self.rejected.append({"file": self.path.name, "line": item.line, "reason": problem, "record": item.source})

    def result(self, generator: str | None, source_format: str) -> tuple[Dataset, RolloutMetadata]:
        """The records, and where they come from; what was assumed is reported."""
        dataset = Dataset(build_table(self.records))
        ends = {name: self.ends[name] for name in ("in_file", "assumed_finished", "assumed_cut", "cut_here")}
        made = retokenization_report(self.records)
        sampling = {
            **_uniform(self.settings, SAMPLING_FIELDS),
            "backend": source_format,
            "finish_reason": {"assumed": self.assume, "max_tokens": self.max_tokens, **ends},
            "token_ids": "retokenized" if made["completions"] else "sampled",
            "retokenization": made,
            "prompts": {name: self.prompt_tokens[name] for name in PROMPT_TOKENS},
            "set_aside": len(self.rejected),
        }
        metadata = RolloutMetadata(
            generator=generator or _generator(self.settings, self.path),
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            sampling=sampling,
            seed=None,
            eos_token_ids=[self.eos_token_id],
            **count_rollouts(dataset),
        )
        logger.warning("%s: what was assumed of its %d completions\n%s", self.path, len(dataset), _told(sampling))
        return dataset, metadata

    def _prompt(self, item: SourceCompletion) -> tuple[int, list[int]]:
        """Group and ids of a prompt."""
        key = json.dumps([item.prompt, item.prompt_ids], default=str)
        if key not in self.prompts:
            if item.prompt_ids is not None:
                ids = item.prompt_ids
            elif item.template_applied:
                ids = list(self.tokenizer(item.prompt, add_special_tokens=False)["input_ids"])
            else:
                ids = tokenize_prompts(self.tokenizer, [item.prompt])[0]
            self.prompts[key] = len(self.prompts), ids
        return self.prompts[key]

    def _from_text(self, item: SourceCompletion) -> tuple[list[int], bool, str, dict[str, Any]]:
        """Ids made from the text, whether it ended, how that is known, and the columns that tell of it."""
        # Decoded with its special tokens, a finished completion ends in the end-of-sequence token, and says so.
        text = item.text.removesuffix(self.end)
        ids, changed = retokenize(self.tokenizer, text)
        if self.assume == FINISHED_IF_ANSWERED:
            finished, how = item.finished, "assumed_finished" if item.finished else "assumed_cut"
        elif item.finished is not None or text != item.text:
            finished, how = item.finished is not False, "in_file"
        else:
            finished = self._is_assumed_finished(item, len(ids))
            how = "assumed_finished" if finished else "assumed_cut"
        whole = [*ids, self.eos_token_id] if finished else ids
        error = None if item.sampled is None else len(whole) - item.sampled
        return whole, finished, how, retokenization_columns(item.text, error, changed)

    def _is_assumed_finished(self, item: SourceCompletion, made: int) -> bool:
        if self.assume is None:
            raise ValueError(
                f"{self.path} does not say which completions ended (the first is at {item.line}): assume one of "
                f"{', '.join(ASSUMPTIONS)}."
            )
        if self.assume == "all_finished":
            return True
        most = item.settings.get("max_tokens") if self.max_tokens is None else self.max_tokens
        if most is None:
            raise ValueError(
                "assume='cut_at_max_tokens' needs the most tokens that were allowed, and the file does not say: give "
                "`max_tokens`, or assume 'all_finished'."
            )
        return (made if item.sampled is None else item.sampled) < most


def _prompt_origin(item: SourceCompletion) -> str:
    """Where the ids of a prompt come from: a name in [`PROMPT_TOKENS`]."""
    if item.prompt_ids is not None:
        return "file"
    if item.template_applied:
        return "decoded_text"
    return "text" if isinstance(item.prompt, str) else "chat_template"


def _told(sampling: dict[str, Any]) -> str:
    """What the metadata says of assumptions, in lines for the log."""
    ends, made = sampling["finish_reason"], sampling["retokenization"]
    lines = [f"how they ended: {ends['in_file']} as the file says"]
    if ends["assumed_finished"] or ends["assumed_cut"]:
        rule = ends["assumed"].replace("_", " ")
        lines[0] += f"; assumed ({rule}): {ends['assumed_finished']} finished, {ends['assumed_cut']} cut"
    if ends["cut_here"]:
        most = f"more than {ends['max_tokens']} tokens"
        lines.append(f"{ends['cut_here']} completions have {most}, and are cut: their rest is left out")
    if made["completions"]:
        lines.append(retokenization_sentence(made))
    lines += [
        f"the token ids of the prompts of {count} completions are {PROMPT_TOKENS[name]}"
        for name, count in sampling["prompts"].items()
        if count
    ]
    return "\n".join(f"- {line}" for line in lines)


def _uniform(settings: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Sampling settings that the file has: one value, or all values where they differ."""
    found = {name: list(dict.fromkeys(each[name] for each in settings if name in each)) for name in names}
    return {name: values[0] if len(values) == 1 else values for name, values in found.items() if values}


def _generator(settings: list[dict[str, Any]], path: Path) -> str:
    names = Counter(each["model_name"] for each in settings)
    if len(names) > 1:
        raise ValueError(f"{path} has completions of several policies ({dict(names)}): give `generator`.")
    return next(iter(names))
