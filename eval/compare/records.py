"""Records of runs and of worlds: a JSON file for each, so that a comparison goes on and processes share its work.

All of them together, `{"worlds": {fingerprint: ...}, "records": [...]}`, are what a report is made of.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.compare.measures import Judged, judge_curve
from eval.compare.plan import CELLS, Run, as_record
from eval.compare.training import World
from lenvm_rl.files import read_json, write_json

Collected = dict[str, Any]
# Digits of the numbers of a curve that are kept.
DIGITS = 4


class Records:
    """The records of a comparison in a folder.

    Args:
        folder (`str` or path): made if it is not there; records lie in `runs/`.
    """

    def __init__(self, folder: str | Path):
        self.runs, self.worlds = Path(folder) / "runs", Path(folder) / "worlds"
        self.runs.mkdir(parents=True, exist_ok=True)
        self._read: dict[Path, dict[str, Any]] = {}

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Whether this process may run it: no other one does, and it has no record. A claim ends with the process."""
        with open(self.runs / f"{run.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not self._path(run).exists()

    def keep(self, run: Run, curve: Sequence[Mapping[str, float]], world: World, seconds: float) -> dict[str, Any]:
        """Write the record of a run, and return it."""
        record = {
            **as_record(run),
            "seconds": round(seconds, 1),
            "policy": world.fingerprint,
            "curve": [rounded(point) for point in curve],
        }
        place = self.worlds / f"{world.fingerprint}.json"
        if not place.exists():
            self.worlds.mkdir(exist_ok=True)
            write_json(place, world.described())
        write_json(self._path(run), record)
        return record

    def collected(self) -> Collected:
        """All records there are."""
        worlds, runs = (self._files(folder) for folder in (self.worlds, self.runs))
        return {"worlds": {path.stem: world for path, world in worlds.items()}, "records": list(runs.values())}

    def _files(self, folder: Path) -> dict[Path, dict[str, Any]]:
        paths = sorted(folder.glob("*.json"))
        self._read |= {path: read_json(path) for path in paths if path not in self._read}
        return {path: self._read[path] for path in paths}

    def judged(self) -> dict[Run, Judged]:
        """What every recorded run came to."""
        collected = self.collected()
        return {run: judge_record(record, collected) for run, record in recorded_runs(collected).items()}

    def _path(self, run: Run) -> Path:
        return self.runs / f"{run.name}.json"


def judge_record(record: Mapping[str, Any], collected: Collected) -> Judged:
    """What a record's run came to."""
    return judge_curve(record["curve"], collected["worlds"][record["policy"]]["start"])


def recorded_runs(collected: Collected) -> dict[Run, Mapping[str, Any]]:
    """The runs of records; those of cells that are no more are left out."""
    cells = {(cell.completions, cell.group_size, cell.steps): cell for cell in CELLS}
    found = {}
    for record in collected["records"]:
        cell = cells.get((record["completions"], record["group_size"], record["steps"]))
        if cell is not None:
            run = Run(cell, record["arm"], record["learning_rate"], record["strength"], record["seed"])
            found[run] = record
    return found


def rounded(point: Mapping[str, float]) -> dict[str, float]:
    """A point with as many digits as mean something."""
    return {name: round(value, DIGITS) for name, value in point.items()}
