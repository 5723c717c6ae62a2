"""Files that survive a crash: atomic ones, journals, the metrics of a run, checkpoints and what is wrong in them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` complete or not at all, also if the disk fills or the process dies.

    It is written beside its final place, synced, and renamed. On an error what was there before stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """Writes a small file of JSON, atomically; `options` are further ones of `json.dumps`."""
    # Before the file is opened: content that is no JSON leaves what was there.
    text = json.dumps(content, indent=1, **options)
    with atomic_file(path) as file:
        file.write(text.encode("ascii") + b"\n")


def write_json_lines(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Writes a file of a JSON value on each line, atomically."""
    with atomic_file(path) as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_json(path: str | os.PathLike, remedy: str = "remove it, and what it describes") -> Any:
    """What a small file of this library holds; a `ValueError` names one that is damaged, and what to do with it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}.") from error


class Journal:
    """Finished batches of records, one JSON line each, after a first line that names the job.

    A line counts once it is whole: it is synced to disk before [`Journal.append`] returns, and a half-written last line
    is cut off by [`Journal.open`]. Batches are numbered from 0; what is kept under a number below is a note on how they
    are made, of no worth without one of them.

    Args:
        path (`Path`): the file.
        job (`str`): a name for exactly this job (a hash of its arguments), so that two jobs are never mixed.
    """

    def __init__(self, path: Path, job: str):
        self.path, self.job = path, job

    def open(self) -> dict[int, list[dict[str, Any]]]:
        """Starts the journal, or goes on with it: the records of each finished batch, and notes.

        A file that is damaged, or holds batches of another job, is refused.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        job, batches, size = self._read()
        finished = sum(number >= 0 for number in batches)
        if job != self.job:
            if finished:
                raise ValueError(
                    f"{self.path} was begun with other prompts or settings, and {finished} batches are there: finish "
                    "that job with its own arguments, or remove the file to start over."
                )
            self._write("wb", {"job": self.job})
            return {}
        os.truncate(self.path, size)
        logger.info("%s: %d batches are finished already", self.path, finished)
        return batches

    def has_batches(self) -> bool:
        """Whether there is a finished batch, of whatever job."""
        return any(number >= 0 for number in self._read()[1])

    def _read(self) -> tuple[str | None, dict[int, list[dict[str, Any]]], int]:
        """The name of the job in the file (`None` if there is none), what is kept there, and bytes of whole lines."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        entries = []
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.path} is damaged in line {number} ({error}): remove that line, whose batch is then done "
                    "again, or the file to start over."
                ) from error
        if not entries:
            return None, {}, 0
        batches = {entry["batch"]: entry["records"] for entry in entries[1:]}
        return entries[0]["job"], batches, sum(len(line) + 1 for line in lines)

    def append(self, batch: int, records: list[dict[str, Any]]) -> None:
        """Adds a finished batch."""
        self._write("ab", {"batch": batch, "records": records})

    def remove(self) -> None:
        """Deletes the file: the job is complete and its result is stored elsewhere."""
        self.path.unlink()

    def _write(self, mode: str, entry: dict[str, Any]) -> None:
        with open(self.path, mode) as file:
            file.write(json.dumps(entry).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())


class MetricsFile(TrainerCallback):
    """Appends everything that a Trainer logs to `metrics.jsonl` in its `output_dir`, one JSON object a line.

    Every line has `step`. A run starts with ``{"event": "train_begin", "step": ...}``: after a resumed run, lines
    before it with a larger step belong to what was lost. NaN and infinity are null, JSON has no other word for them.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Called by the Trainer; only the first process writes."""
        if state.is_world_process_zero:
            self._cut_half_line(args)
            self._append(args, {"event": "train_begin", "step": state.global_step})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Called by the Trainer; only the first process writes."""
        if state.is_world_process_zero:
            # Not the argument `logs`: other callbacks take entries out of it.
            self._append(args, {name: _plain(value) for name, value in state.log_history[-1].items()})

    @staticmethod
    def _path(args) -> Path:
        return Path(args.output_dir) / "metrics.jsonl"

    def _cut_half_line(self, args) -> None:
        """A line that the run before could not write to its end (its disk was full) would spoil the next one."""
        path = self._path(args)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: the half-written last line is cut off", path)
            os.truncate(path, whole)

    def _append(self, args, entry: dict[str, Any]) -> None:
        path = self._path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")
        except OSError as error:
            error.add_note(f"{path} could not be written: make room on its disk, and resume from the last checkpoint.")
            raise


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that belong to the run as it ended.

    Lines of lost steps are left out, and so is a last line that the run could not write to its end.
    """
    kept: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]:
        entry = json.loads(line)
        if entry.get("event") == "train_begin":
            kept = [before for before in kept if before["step"] <= entry["step"]]
        elif "step" in entry:
            kept.append(entry)
    return kept


def _plain(value: Any) -> Any:
    """What JSON can hold: a tensor of one number becomes that number."""
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end, which is its trainer state."""
    path = Path(checkpoint, TRAINER_STATE_NAME)
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in a run's folder, which need not be there, the one of the most steps first."""
    found = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(folder).glob("*"))
    steps = [(int(match[1]), path) for match, path in found if match]
    return [path for _, path in sorted(steps, reverse=True)]


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint of the most steps in a run's folder, which need not be there, that was written to its end."""
    for checkpoint in checkpoints_in(folder):
        if is_complete(checkpoint):
            return str(checkpoint)
        logger.warning("'%s' is passed over: the run died while it was written", checkpoint)
    return None


def damaged_files(checkpoint: str | os.PathLike) -> dict[str, str]:
    """Files in a checkpoint and its folders that end too early, by path, with what is wrong; weights are not read."""
    found = {}
    for path in sorted(Path(checkpoint).rglob("*")):
        if path.is_file() and (problem := _problem(path)) is not None:
            found[str(path.relative_to(checkpoint))] = problem
    return found


def _problem(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return None
        except SafetensorError as error:
            return str(error)
    if path.suffix == ".parquet":
        try:
            pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            return str(error)
    # What torch.save writes.
    if path.suffix in (".pt", ".pth", ".bin"):
        return None if zipfile.is_zipfile(path) else "its end is missing"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return str(error)
    return None


def check_files(checkpoint: str | os.PathLike) -> None:
    """Raise a `ValueError` if files of a checkpoint are damaged: which, and where to go on instead."""
    damaged = damaged_files(checkpoint)
    if not damaged:
        return
    files = "; ".join(f"'{name}' ({problem})" for name, problem in damaged.items())
    raise ValueError(
        f"The checkpoint '{checkpoint}' is damaged, its files were cut off or overwritten: {files}. Copy them again "
        f"from where they are whole, or {_way_out(checkpoint)}."
    )


@contextlib.contextmanager
def explained_failure(checkpoint: str) -> Iterator[None]:
    """Errors that are raised while `checkpoint` is written get a note: what is left, and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_complete(checkpoint):
            error.add_note(
                f"The checkpoint '{checkpoint}' could not be written, and is incomplete. If its disk is full, make "
                f"room (save_total_limit keeps fewer checkpoints); then {_way_out(checkpoint)}."
            )
        raise


def _way_out(checkpoint: str | os.PathLike) -> str:
    """What to do instead of going on from a checkpoint that is of no use."""
    bad = Path(checkpoint).absolute()
    for path in checkpoints_in(bad.parent):
        if path != bad and is_complete(path) and not damaged_files(path):
            return f"resume from '{path}'"
    return "start anew, since there is no complete checkpoint beside it"
