"""The rollout record and its file: what a policy was asked, which tokens it sampled, and how the completion ended.

One record per completion:

- ``prompt``: text, or a list of messages (``{"role": ..., "content": ...}``); the same kind throughout a file.
- ``prompt_ids``, ``completion_ids``: token ids as the policy saw and sampled them. They are never re-tokenised: the
  length return counts sampled tokens, and a re-tokenised text can be longer or shorter than what was sampled.
- ``finish_reason``: ``"stop"`` if the last of ``completion_ids`` is an end-of-sequence token (it is kept, and counts),
  ``"length"`` if the completion was cut. A cut completion's true length is unknown: it is censored, not short.
- ``group``: an integer shared by all completions of one prompt.
- any further columns (an answer, a difficulty, whether the completion is correct), carried along.

A file is JSONL or parquet, with its [`RolloutMetadata`] beside it as ``<name>.metadata.json``.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, concatenate_datasets

from lenvm_rl.endings import end_token_ids
from lenvm_rl.files import atomic_file, read_json, write_json

logger = logging.getLogger(__name__)

# Beyond this share of cut completions the limit shapes what is learned of lengths.
MANY_CUT = 0.2

REQUIRED_COLUMNS = ("prompt", "prompt_ids", "completion_ids", "finish_reason", "group")
FINISH_REASONS = ("stop", "length")
_ID_TYPE = pa.list_(pa.int32())
_LARGEST_VOCABULARY = 2**31  # what fits _ID_TYPE
_CHUNK = 4096  # records turned into one arrow chunk: bounds the memory that Python objects take while reading


@dataclass
class RolloutMetadata:
    """Where a file of rollouts comes from.

    Args:
        generator (`str`): name or path of the policy that sampled the completions.
        tokenizer_fingerprint (`dict`): what `tokenizer_fingerprint` returns for the policy's tokenizer; its
            `largest_id` (or `vocab_size`, in older files) bounds the token ids.
        sampling (`dict`): every setting that the completions depend on (temperature, top-p, most new tokens, ...).
        seed (`int` or `None`): seed of the sampling; `None` if it is not known.
        eos_token_ids (`list[int]`, *optional*, defaults to `[]`): the ids that end a completion. When given, records
            are checked against them.
        num_prompts, num_completions (`int`), truncated_share (`float`, in [0, 1]): distinct groups, records, and the
            share of cut completions; counted by [`write_rollouts`].
    """

    generator: str
    tokenizer_fingerprint: dict[str, Any]
    sampling: dict[str, Any]
    seed: int | None
    eos_token_ids: list[int] = field(default_factory=list)
    num_prompts: int = 0
    num_completions: int = 0
    truncated_share: float = 0.0

    @property
    def vocab_size(self) -> int | None:
        """What token ids of the generator's tokenizer are below, or `None` if the fingerprint does not say."""
        told = self.tokenizer_fingerprint
        return told["largest_id"] + 1 if "largest_id" in told else told.get("vocab_size")

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a completion: those recorded, or else the tokenizer's own."""
        return end_token_ids(None, self.eos_token_ids or self.tokenizer_fingerprint.get("eos_token_id"))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the metadata as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> RolloutMetadata:
        """Reads what [`RolloutMetadata.save`] wrote; a `ValueError` names a missing or an unknown field."""
        content = read_json(path)
        known = {entry.name for entry in fields(cls)}
        if not isinstance(content, dict) or not set(content) <= known:
            raise ValueError(f"{path} is not rollout metadata: it may hold only the fields {sorted(known)}.")
        missing = {"generator", "tokenizer_fingerprint", "sampling", "seed"} - set(content)
        if missing:
            raise ValueError(f"{path} lacks {sorted(missing)}: add them by hand, or sample the rollouts again.")
        return cls(**content)


def metadata_path(path: str | os.PathLike) -> Path:
    """The metadata's place: `rollouts.jsonl` has it in `rollouts.metadata.json`."""
    return Path(path).with_suffix(".metadata.json")


def rejected_path(path: str | os.PathLike) -> Path:
    """Where bad records are set aside: `rollouts.jsonl` has them in `rollouts.rejected.jsonl`."""
    return Path(path).with_suffix(".rejected.jsonl")


def find_problem(
    record: Any, vocab_size: int | None = None, eos_token_ids: Iterable[int] = (), prompt_type: type | None = None
) -> str | None:
    """What is wrong with a record, in a sentence; `None` if it is good.

    Args:
        record (`Any`): a candidate record.
        vocab_size (`int`, *optional*): token ids must be below it; not checked when omitted.
        eos_token_ids (`Iterable[int]`, *optional*, defaults to `()`): ids that end a completion. When given, one of
            them must be the last token of a `"stop"` completion, and none may stand anywhere else.
        prompt_type (`type`, *optional*): `str` or `list`, the kind of prompt that the rest of the file has.
    """
    if not isinstance(record, dict):
        return f"a record must be an object with the fields {', '.join(REQUIRED_COLUMNS)}, not {type(record).__name__}"
    missing = [name for name in REQUIRED_COLUMNS if record.get(name) is None]
    if missing:
        return f"missing {', '.join(missing)}"
    prompt, reason, completion = record["prompt"], record["finish_reason"], record["completion_ids"]
    if not isinstance(prompt, prompt_type or (str, list)):
        expected = {str: "text", list: "a list of messages", None: "text or a list of messages"}[prompt_type]
        return f"prompt must be {expected}, got {type(prompt).__name__}"
    if isinstance(prompt, list) and not all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt):
        return "every message of prompt needs a role and a content"
    for name in ("prompt_ids", "completion_ids"):
        problem = _find_id_problem(record[name], vocab_size)
        if problem:
            return f"{name} {problem}"
    if reason not in FINISH_REASONS:
        return f"finish_reason must be one of {', '.join(FINISH_REASONS)}, got {reason!r}"
    if type(record["group"]) is not int:
        return f"group must be an integer, got {record['group']!r}"
    ends = set(eos_token_ids)
    if ends and not ends.isdisjoint(completion[:-1]):
        return "completion_ids holds an end-of-sequence token before its end"
    if ends and (completion[-1] in ends) != (reason == "stop"):
        return f"finish_reason is {reason!r} but the last token is {completion[-1]} (end-of-sequence: {sorted(ends)})"
    return None


def _find_id_problem(ids: Any, vocab_size: int | None) -> str | None:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        return "must be a list of integers"
    if not ids:
        return "is empty"
    size = _LARGEST_VOCABULARY if vocab_size is None else vocab_size
    if min(ids) < 0 or max(ids) >= size:
        outside = next(token for token in ids if not 0 <= token < size)
        return f"holds token {outside}, outside the vocabulary of {size} tokens"
    return None


def write_rollouts(
    path: str | os.PathLike, records: Iterable[dict[str, Any]] | Dataset, metadata: RolloutMetadata
) -> RolloutMetadata:
    """Writes rollouts and their metadata, each file atomically; a bad record is refused, by its number from 1.

    Args:
        path (`str` or `os.PathLike`): a name that ends in `.jsonl` or `.parquet`.
        records (iterable of `dict`, or `datasets.Dataset`): one record per completion.
        metadata (`RolloutMetadata`): where they come from.

    Returns:
        `RolloutMetadata`: a copy of `metadata` with the counts.
    """
    path = check_suffix(path)
    check_alone(path, metadata)
    groups: set[int] = set()
    reasons: Counter[str] = Counter()
    find = _finder(metadata)

    def checked() -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records, start=1):
            problem = find(record)
            if problem:
                raise ValueError(f"Record {number} cannot be written to {path}: {problem}.")
            groups.add(record["group"])
            reasons[record["finish_reason"]] += 1
            yield record

    with atomic_file(path) as file:
        if path.suffix == ".jsonl":
            for record in checked():
                # Non-ASCII characters stay escaped, so that no line separator of Unicode can split a line.
                file.write(json.dumps(record).encode("ascii") + b"\n")
        else:
            pq.write_table(build_table(list(checked())), file)
        total = sum(reasons.values())
        if not total:
            raise ValueError(f"There is no record to write to {path}.")
        counts = {"num_prompts": len(groups), "num_completions": total, "truncated_share": reasons["length"] / total}
        metadata = replace(metadata, **counts)
        # On the disk, not only in a buffer: the old metadata must stay if the disk fills here.
        file.flush()
        os.fsync(file.fileno())
        metadata.save(metadata_path(path))
    return metadata


def read_rollouts(path: str | os.PathLike, metadata: RolloutMetadata | None = None) -> tuple[Dataset, RolloutMetadata]:
    """Reads and checks a file of rollouts.

    A bad record (a missing field, no tokens, an unknown finish reason, ids outside the vocabulary, a half-written
    line, ...) is logged with file and line, and set aside in `<name>.rejected.jsonl`; the file itself is not touched.

    Args:
        path (`str` or `os.PathLike`): a `.jsonl` or `.parquet` file.
        metadata (`RolloutMetadata`, *optional*): used instead of the `<name>.metadata.json` beside the file.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: the good records in file order, and where they come from, with
        the counts of what was kept.
    """
    path = check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no rollout file {path}; sample one with recipes/sample_rollouts.py.")
    if metadata is None:
        if not metadata_path(path).is_file():
            raise FileNotFoundError(
                f"{path} has no metadata beside it ({metadata_path(path).name}). Write one, or pass `metadata=`: "
                "generator, tokenizer_fingerprint, sampling and seed must be known before values are fitted."
            )
        metadata = RolloutMetadata.load(metadata_path(path))
    tables, rejected, total = _read_tables(path, metadata)
    set_aside(path, rejected, total)
    if not tables:
        raise ValueError(f"{path} holds no valid rollout ({total} records read, {len(rejected)} rejected).")
    if metadata.num_completions and metadata.num_completions != total:
        logger.warning("%s has %d records, but its metadata says %d", path, total, metadata.num_completions)
    try:
        dataset = Dataset(pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"A column of {path} changes its type within the file: {error}.") from error
    return dataset, replace(metadata, **count_rollouts(dataset))


def read_rollout_files(paths: Sequence[str | os.PathLike]) -> tuple[Dataset, RolloutMetadata]:
    """Rollouts of one policy from several files, such as one for each kind of prompt, as one.

    Args:
        paths (sequence of `str` or `os.PathLike`): see [`read_rollouts`]. Columns that only some files have are empty
            for the others.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: all records, files one after the other, all completions of a
        prompt in one group; what the files' metadata agree on, and of the sampling what they agree on.

    Raises:
        `ValueError`: the files are of different policies, tokenizers or end tokens.
    """
    if len(paths) == 1:
        return read_rollouts(paths[0])
    datasets, all_metadata = zip(*map(read_rollouts, paths), strict=True)
    first, joined = all_metadata[0], []
    group_of: dict[tuple[int, ...], int] = {}
    for path, dataset, metadata in zip(paths, datasets, all_metadata, strict=True):
        for name in ("generator", "tokenizer_fingerprint", "eos_token_ids"):
            if _told(metadata, name) != _told(first, name):
                raise ValueError(
                    f"{path} is not of the policy of {paths[0]}: {name} is {getattr(metadata, name)!r} there and "
                    f"{getattr(first, name)!r} here. Fit a length value model to one policy's rollouts."
                )
        groups = [group_of.setdefault(tuple(ids), len(group_of)) for ids in dataset["prompt_ids"][:]]
        joined.append(dataset.remove_columns("group").add_column("group", groups))
    rollouts = concatenate_datasets(joined)
    shared = {
        name: value
        for name, value in first.sampling.items()
        if all(m.sampling.get(name) == value for m in all_metadata)
    }
    seed = first.seed if all(metadata.seed == first.seed for metadata in all_metadata) else None
    return rollouts, replace(first, sampling=shared, seed=seed, **count_rollouts(rollouts))


def set_aside(path: str | os.PathLike, rejected: list[dict[str, Any]], total: int) -> None:
    """Writes bad records, if any, to `<name>.rejected.jsonl`, in place of what was there, and says so in the log.

    Args:
        path (`str` or `os.PathLike`): the file that the records come from, or would have gone into.
        rejected (`list[dict]`): `file`, `line` (from 1), `reason` and `record` of each.
        total (`int`): how many records there were, the good ones counted.
    """
    if not rejected:
        logger.info("%s: %d records, all valid", path, total)
        return
    with atomic_file(rejected_path(path)) as file:
        for entry in rejected:
            logger.warning("%s, line %d: %s", path, entry["line"], entry["reason"])
            file.write(json.dumps(entry, default=str).encode("ascii") + b"\n")
    logger.warning("%s: %d of %d records set aside in %s", path, len(rejected), total, rejected_path(path).name)


def count_rollouts(dataset: Dataset) -> dict[str, Any]:
    """`num_prompts`, `num_completions` and `truncated_share` of a dataset of rollouts."""
    reasons = Counter(dataset["finish_reason"][:])
    return {
        "num_prompts": len(set(dataset["group"][:])),
        "num_completions": len(dataset),
        "truncated_share": reasons["length"] / len(dataset),
    }


def warn_of_cuts(finish_reasons: Sequence[str]) -> None:
    """Log a warning if so many completions are cut that their limit stands for their lengths."""
    cut = sum(reason == "length" for reason in finish_reasons)
    if cut > MANY_CUT * len(finish_reasons):
        logger.warning(
            "%d of %d completions (%.0f%%) are cut: of their lengths only the limit is known, gamma is fitted to that, "
            "and predictions end near it. Sample again with a higher max_new_tokens (max_completion_length).",
            cut, len(finish_reasons), 100 * cut / len(finish_reasons),
        )  # fmt: skip


def described(dataset: Dataset, metadata: RolloutMetadata) -> str:
    """How many rollouts there are, how long they are, and how many are cut or were set aside, in words."""
    lengths = sorted(len(ids) for ids in dataset["completion_ids"][:])
    return (
        f"{len(lengths)} completions of {metadata.num_prompts} prompts, {lengths[0]} to {lengths[-1]} tokens (median "
        f"{lengths[len(lengths) // 2]}), {metadata.truncated_share:.1%} truncated, "
        f"{metadata.sampling.get('set_aside', 0)} set aside"
    )


def split_by_prompt(dataset: Dataset, held_out: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits rollouts so that no prompt is on both sides (completions of a prompt stay together).

    Args:
        dataset (`datasets.Dataset`): rollouts.
        held_out (`float`): share of the prompts to hold out, in (0, 1); at least one prompt ends on either side.
        seed (`int`, *optional*, defaults to `0`): seed of the draw.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: the rest, and the held-out part.
    """
    # A job numbers the rows of its data, in which a prompt may stand twice.
    first_of: dict[tuple[int, ...], int] = {}
    pairs = zip(dataset["prompt_ids"][:], dataset["group"][:], strict=True)
    rows = [first_of.setdefault(tuple(ids), group) for ids, group in pairs]
    groups = sorted(set(rows))
    if not 0.0 < held_out < 1.0 or len(groups) < 2:
        raise ValueError(
            f"Cannot hold out a share of {held_out} of {len(groups)} prompts: it takes two or more prompts and a share "
            "strictly between 0 and 1."
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(held_out * len(groups))), len(groups) - 1)
    out = {groups[index] for index in order[:count]}
    return (
        dataset.select([row for row, group in enumerate(rows) if group not in out]),
        dataset.select([row for row, group in enumerate(rows) if group in out]),
    )


def _finder(metadata: RolloutMetadata) -> Callable[[Any], str | None]:
    """[`find_problem`] for one file; its first good record decides the kind of the prompts."""
    kinds: list[type] = []

    def find(record: Any) -> str | None:
        problem = find_problem(record, metadata.vocab_size, metadata.eos_token_ids, *kinds)
        if problem is None and not kinds:
            kinds.append(type(record["prompt"]))
        return problem

    return find


def check_suffix(path: str | os.PathLike) -> Path:
    """The path; a `ValueError` unless a file of rollouts can have that name."""
    if Path(path).suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"Rollouts are kept as .jsonl or .parquet, but the path is {path}.")
    return Path(path)


def check_alone(path: Path, metadata: RolloutMetadata) -> None:
    """Raises a `ValueError` if rollouts of another job stand beside a path in the other format: both would share their
    metadata."""
    other = path.with_suffix({".jsonl": ".parquet", ".parquet": ".jsonl"}[path.suffix])
    if other.exists() and metadata_path(other).exists():
        theirs = RolloutMetadata.load(metadata_path(other))
        if _job_of(theirs) != _job_of(metadata):
            raise ValueError(
                f"{other} holds other rollouts, and its metadata is where those of {path.name} belong: give another "
                "path, or remove it."
            )


def _told(metadata: RolloutMetadata, name: str) -> Any:
    """What metadata says by a name, without what older files do not."""
    value = getattr(metadata, name)
    if name == "tokenizer_fingerprint":
        return {key: each for key, each in value.items() if key != "largest_id"}
    return value


def _job_of(metadata: RolloutMetadata) -> list[Any]:
    own = metadata.tokenizer_fingerprint.get("sha256")
    job = metadata.sampling.get("plan", metadata.sampling)
    return [metadata.generator, metadata.seed, metadata.eos_token_ids, own, job]


def iterate_jsonl(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (line, what it holds or its text, problem). A binary file is split at newlines only, never at U+2028."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line), None
            except ValueError as error:
                problem = f"not valid JSON ({error})" if line.endswith(b"\n") else "half-written last line"
                yield number, line.decode("utf-8", errors="replace").rstrip("\n"), problem


def iterate_parquet(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (row from 1, what it holds, `None`), a chunk of rows in memory at a time."""
    try:
        batches = pq.ParquetFile(path).iter_batches(_CHUNK)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file, or a damaged one: {error}") from error
    for number, record in enumerate((record for batch in batches for record in batch.to_pylist()), start=1):
        yield number, record, None


def _read_tables(path: Path, metadata: RolloutMetadata) -> tuple[list[pa.Table], list[dict[str, Any]], int]:
    """Good records as arrow tables, bad ones with line and reason, and the number of records read."""
    iterate: Callable = iterate_jsonl if path.suffix == ".jsonl" else iterate_parquet
    find = _finder(metadata)
    tables: list[pa.Table] = []
    good: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    total = 0
    for number, record, problem in iterate(path):
        total += 1
        problem = problem or find(record)
        if problem:
            rejected.append({"file": path.name, "line": number, "reason": problem, "record": record})
        else:
            good.append(record)
        if len(good) == _CHUNK:
            tables.append(build_table(good))
            good = []
    return [*tables, build_table(good)] if good else tables, rejected, total


def build_table(records: list[dict[str, Any]]) -> pa.Table:
    """Records as arrow columns. A column that some records lack is null there; none is dropped."""
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: as_column(name, [record.get(name) for record in records]) for name in names})


def as_column(name: str, values: list[Any]) -> pa.Array:
    """Values as an arrow column; a `ValueError` that names it if they are of several kinds."""
    try:
        return pa.array(values, type=_ID_TYPE if name in ("prompt_ids", "completion_ids") else None)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"Column {name!r} mixes types and cannot be stored as a table: {error}.") from error
