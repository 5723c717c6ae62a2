"""Files of completions that other tools write, read row by row into one kind of item, [`SourceCompletion`].

One function per format, all with the same first arguments (the file, and the policy's tokenizer); their further ones
are the options of that format. They say what the file says and no more: what has to be assumed is
`lenvm_rl.rollouts.text`'s part. An item that cannot be used carries its `problem`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv as arrow_csv
from transformers import PreTrainedTokenizerBase

from lenvm_rl.rollouts.record import FINISH_REASONS, iterate_jsonl, iterate_parquet
from lenvm_rl.tokenization import Prompt, tokenize_prompts

logger = logging.getLogger(__name__)

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
OPEN, CLOSE = "<think>", "</think>"
_CSV_BLOCK = 2**31 - 1  # bytes: a row has to fit into one


@dataclass
class SourceCompletion:
    """One completion, as a file tells it.

    Args:
        line (`int`), source (`Any`): where it stands, and what stands there, should it be set aside.
        problem (`str`, *optional*): why it cannot be used; the rest then says nothing.
        prompt (`str` or `list[dict]`): text, or messages that the tokenizer's chat template is applied to.
        template_applied (`bool`): the prompt is text in which the template's own stands already.
        text (`str`, *optional*), completion_ids (`list[int]`, *optional*): the completion; ids go before the text.
        prompt_ids (`list[int]`, *optional*): the prompt's ids, if the file has them.
        finished (`bool`, *optional*): whether it ended; `None` where the file does not say.
        sampled (`int`, *optional*): number of tokens that were sampled, if the file says.
        settings (`dict`): what the file says of the sampling: `model_name`, `max_tokens`, `temperature`, …
        columns (`dict`): further columns of the record.
    """

    line: int
    source: Any
    problem: str | None = None
    prompt: Prompt = ""
    template_applied: bool = False
    text: str | None = None
    completion_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    finished: bool | None = None
    sampled: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)


def iterate_text(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    chat: bool = False,
) -> Iterator[SourceCompletion]:
    """Rows with a prompt and a completion (`.jsonl`, `.json` list, `.parquet`, `.csv`).

    The completion is text, or a list of one assistant message, as TRL's data sets have it. Where a row has
    `finish_reason` (`stop` or `length`), `completion_ids` or `prompt_ids`, they are taken. The columns that are left go
    into `source_fields` (JSON).

    Args:
        path (`Path`): the file.
        tokenizer (`PreTrainedTokenizerBase`): not needed here.
        prompt_column, completion_column (`str`): their names.
        chat (`bool`): prompts are questions, put as a user's message into the chat template.
    """
    suffixes, needed = (".jsonl", ".json", ".parquet", ".csv"), ([prompt_column], [completion_column, "completion_ids"])
    own = (prompt_column, completion_column, "finish_reason", "completion_ids", "prompt_ids")
    for number, row, problem in _checked_rows(path, suffixes, *needed):
        problem = problem or _row_problem(row, completion_column)
        if problem is not None:
            yield SourceCompletion(number, row, problem)
            continue
        prompt, ids, reason = row.get(prompt_column), row.get("completion_ids"), row.get("finish_reason")
        if chat and not isinstance(prompt, str):
            raise ValueError(f"{path}, row {number}: the prompt is no text, so leave `chat` out: it is for texts.")
        yield SourceCompletion(
            number,
            row,
            prompt=[{"role": "user", "content": prompt}] if chat else prompt,
            text=None if ids is not None else _completion_of(row.get(completion_column)),
            completion_ids=ids,
            prompt_ids=row.get("prompt_ids"),
            finished=None if not reason else reason == "stop",
            columns={"source_fields": _rest_of(row, own)},
        )


def iterate_verl(
    path: Path, tokenizer: PreTrainedTokenizerBase, prompts: str | None = None
) -> Iterator[SourceCompletion]:
    """What verl (github.com/volcengine/verl) writes: its dump of rollouts, or its generation's parquet.

    - `.jsonl`, one file per step in `trainer.rollout_data_dir` (`_dump_generations`, later `_write_generations`, in
      `verl/trainer/ppo/ray_trainer.py`): `input`, `output`, `gts`, `score`, `step` and what the reward function adds.
      `input` and `output` are decoded without special tokens, so the text of `input` lacks those of the chat template.
      With `prompts` (the parquet that verl trained on, with messages in `prompt`), the messages are found again: those
      that, put into the template and decoded so, are the `input`. Without, the text is tokenised as it is and nothing
      is added to it.
    - `.parquet` of `verl/trainer/main_generation.py` and `main_generation_server.py`: the data set's columns (`prompt`
      as messages, `data_source`, `reward_model`, `extra_info`) and `responses`, a list of texts per row.

    Neither says which completions ended. Columns that are left go into `source_fields` (JSON).
    """
    if Path(path).suffix == ".parquet":
        if prompts is not None:
            raise ValueError(f"{path} has its prompts as messages: leave `prompts` out.")
        yield from _verl_generations(path)
        return
    known = None if prompts is None else _verl_prompts(Path(prompts), tokenizer)
    for number, row, problem in _checked_rows(path, (".jsonl",), ["input"], ["output"]):
        problem = problem or _text_problem(row, ("input", "output"))
        if problem is None and known is not None and row["input"] not in known:
            problem = f"`input` is none of the prompts of {prompts}, put into the tokenizer's chat template"
        if problem is not None:
            yield SourceCompletion(number, row, problem)
            continue
        yield SourceCompletion(
            number,
            row,
            prompt=row["input"] if known is None else known[row["input"]],
            template_applied=known is None,
            text=row["output"],
            columns={"source_fields": _rest_of(row, ("input", "output"))},
        )


def iterate_sharegpt(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[SourceCompletion]:
    """Conversations of the paper's released code, `.jsonl` or a `.json` list.

    One object per completion: `conversations` (`{"from": "human" | "gpt" | "system", "value": …}`, the last one the
    completion) and `meta_info` with `answer_token_length`, the number of tokens that the server sampled, and
    `lenvm_idx`, the prompt's number, unique within one data set only.
    """
    for number, source, problem in _checked_rows(path, (".jsonl", ".json")):
        problem = problem or _conversation_problem(source)
        if problem is not None:
            yield SourceCompletion(number, source, problem)
            continue
        *turns, last = source["conversations"]
        meta = source["meta_info"]
        yield SourceCompletion(
            number,
            source,
            prompt=[{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns],
            text=last["value"],
            sampled=meta["answer_token_length"],
            settings=meta,
            columns={
                "answer_token_length": meta["answer_token_length"],
                "lenvm_idx": meta.get("lenvm_idx"),
                "dataset_name": meta.get("dataset_name"),
                "source_fields": json.dumps(source.get("source_fields", {})),
            },
        )


def iterate_traces(
    path: Path, tokenizer: PreTrainedTokenizerBase, models: Sequence[str] | None = None
) -> Iterator[SourceCompletion]:
    """Answers of reasoning models, as the MisguidedAttention evaluation publishes them.

    The files (github.com/cpldcpu/MisguidedAttention, CC0) are JSON with a list `results`, one object per prompt and
    model: `prompt_id`, `prompt`, `llm`, `output` (one text per sample) and, for models that think, `thinking` (as many,
    or null). The thinking is put between ``<think>`` and ``</think>``, as the models' templates have it. A completion
    with an answer is called finished, one that thinks and never answers is not (nearly all of these break off in a
    sentence): this is assumed, too.

    Args:
        path (`Path`): the file.
        tokenizer (`PreTrainedTokenizerBase`): its chat template says whether the prompt opens the thinking already.
        models (`Sequence[str]`, *optional*): keep the completions of these, by `llm`; must be given if the file has
            several. Groups are prompts, so keep one model for rollouts of one policy.
    """
    results = _results(path)
    kept = _chosen_models(results, models, path)
    others: Counter[str] = Counter()
    for number, source in enumerate(results, start=1):
        if isinstance(source, dict) and isinstance(source.get("llm"), str) and source["llm"] not in kept:
            others[source["llm"]] += 1
            continue
        problem = _answers_problem(source)
        if problem is not None:
            yield SourceCompletion(number, source, problem)
            continue
        messages = [{"role": "user", "content": source["prompt"]}]
        opened = tokenizer.decode(tokenize_prompts(tokenizer, [messages])[0]).rstrip().endswith(OPEN)
        thoughts = source.get("thinking") or [None] * len(source["output"])
        for sample, (thinking, output) in enumerate(zip(thoughts, source["output"], strict=True)):
            named = {name: source[name] for name in ("prompt_id", "prompt", "llm")}
            whole = {**named, "sample": sample, "thinking": thinking, "output": output}
            problem = _sample_problem(thinking, output, opened)
            if problem is not None:
                yield SourceCompletion(number, whole, problem)
                continue
            yield SourceCompletion(
                number,
                whole,
                prompt=messages,
                text=completion_text(thinking if (thinking or "").strip() else None, output, opened),
                finished=bool(output.strip()),
                settings={"model_name": ", ".join(kept)},
                columns={"model": source["llm"], "prompt_id": source["prompt_id"], "sample": sample},
            )
    if others:
        logger.warning("%s: objects of other models are not read: %s", path, dict(others))


SOURCE_FORMATS: dict[str, Callable[..., Iterator[SourceCompletion]]] = {
    "text": iterate_text,
    "verl": iterate_verl,
    "sharegpt": iterate_sharegpt,
    "traces": iterate_traces,
}


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


def _rows_of(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (line or place in the file, row or text, problem)."""
    if path.suffix == ".jsonl":
        yield from iterate_jsonl(path)
    elif path.suffix == ".parquet":
        yield from iterate_parquet(path)
    else:
        rows = _csv_in(path) if path.suffix == ".csv" else _json_in(path)
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a list of objects, but holds a {type(rows).__name__}.")
        yield from ((number, row, None) for number, row in enumerate(rows, start=1))


def _checked_rows(path: Path, suffixes: tuple[str, ...], *columns: list[str]) -> Iterator[tuple[int, Any, str | None]]:
    """The rows of a file of one of these kinds. The first object must have one of each `columns`, or is refused."""
    if path.suffix not in suffixes:
        raise ValueError(f"This format comes as {', '.join(suffixes)}, but the path is {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    checked = not columns
    for number, row, problem in _rows_of(path):
        if not checked and isinstance(row, dict):
            missing = [" or ".join(names) for names in columns if not set(names) & set(row)]
            if missing:
                raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, row))}.")
            checked = True
        yield number, row, problem


def _json_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def _csv_in(path: Path) -> list[dict[str, str]]:
    """Rows of a file with a header, every cell as the text that it is."""
    read = {
        "read_options": arrow_csv.ReadOptions(block_size=min(max(path.stat().st_size, 1), _CSV_BLOCK)),
        "parse_options": arrow_csv.ParseOptions(newlines_in_values=True),
    }
    try:
        names = arrow_csv.open_csv(path, **read).schema.names
        types = arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        return arrow_csv.read_csv(path, **read, convert_options=types).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no CSV with a header, or a damaged one: {error}") from error


def _rest_of(row: dict[str, Any], names: Sequence[str]) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in names}, default=str)


def _text_problem(row: Any, names: Sequence[str]) -> str | None:
    if not isinstance(row, dict):
        return f"not an object but a {type(row).__name__}"
    wrong = [name for name in names if not isinstance(row.get(name), str)]
    return f"no text `{wrong[0]}`" if wrong else None


def _row_problem(row: Any, completion_column: str) -> str | None:
    if not isinstance(row, dict):
        return f"not an object but a {type(row).__name__}"
    if row.get("finish_reason") not in (None, "", *FINISH_REASONS):
        return f"`finish_reason` is {row['finish_reason']!r}, not one of {', '.join(FINISH_REASONS)}"
    if row.get("completion_ids") is None and _completion_of(row.get(completion_column)) is None:
        return f"`{completion_column}` is neither a text nor one assistant message"
    return None


def _completion_of(value: Any) -> str | None:
    """The text of a completion, or of its only message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        message = value[0]
        value = message.get("content") if message.get("role") == "assistant" else None
    return value if isinstance(value, str) else None


def _verl_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[dict[str, Any]]]:
    """The messages of verl's data, by what its dump writes of them."""
    rows = [row["prompt"] for _, row, _ in _checked_rows(path, (".parquet",), ["prompt"])]
    ids = tokenize_prompts(tokenizer, rows)
    texts = (tokenizer.decode(one, skip_special_tokens=True) for one in ids)
    return dict(zip(texts, rows, strict=True))


def _verl_generations(path: Path) -> Iterator[SourceCompletion]:
    for number, row, _ in _checked_rows(path, (".parquet",), ["prompt"], ["responses"]):
        rest = _rest_of(row, ("prompt", "responses"))
        if not isinstance(row["responses"], list) or not row["responses"]:
            yield SourceCompletion(number, row, "no list `responses`")
            continue
        for sample, text in enumerate(row["responses"]):
            if not isinstance(text, str):
                yield SourceCompletion(number, row, f"response {sample} (the first is 0) is not a text")
                continue
            columns = {"sample": sample, "source_fields": rest}
            yield SourceCompletion(number, row, prompt=row["prompt"], text=text, columns=columns)


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


def _sample_problem(thinking: Any, output: Any, opened: bool) -> str | None:
    if output is None:
        return "`output` is null"
    if not isinstance(output, str) or not isinstance(thinking, str | None):
        return "`output` or `thinking` is not a text"
    thought = bool((thinking or "").strip())
    if not output.strip() and not thought:
        return "there is no text"
    if opened and not thought:
        return f"it did not think, but the chat template opens {OPEN}: give another template"
    return None
