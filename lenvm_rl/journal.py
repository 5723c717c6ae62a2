"""Files that grow line by line: the finished batches of a long job, and the metrics of a training run."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


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
        """Starts the journal, or goes on with it.

        Returns:
            `dict[int, list[dict]]`: records of each finished batch, and notes.

        Raises:
            ValueError: if the file holds batches of another job, or is damaged.
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


def read_json(path: str | os.PathLike) -> Any:
    """What a small file of this library holds; a `ValueError` names one that is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and what it describes.") from error


class MetricsFile(TrainerCallback):
    """Appends everything that a Trainer logs to `metrics.jsonl` in its `output_dir`, one JSON object a line.

    Every line has `step`. A run starts with ``{"event": "train_begin", "step": ...}``: after a resumed run, lines
    before it with a larger step belong to what was lost. NaN and infinity are null, JSON has no other word for them.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Called by the Trainer; only the first process writes."""
        if state.is_world_process_zero:
            self._cut_half_line(args)
            self._append(args, {"event": "train_begin", "step": state.global_step})

    def on_log(self, args, state, control, **kwargs):
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


def _plain(value: Any) -> Any:
    """What JSON can hold: a tensor of one number becomes that number."""
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
