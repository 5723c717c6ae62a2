"""Measuring how fast something is and how much memory it takes, each thing in a process of its own.

A process that is fresh has nobody else's caches, threads or high-water mark: what is measured does not depend on what
was measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

MARK = "measured: "  # before the line of a process that holds its result


@dataclass
class Measurement:
    """What a process measured.

    Args:
        tokens (`int`): tokens processed, padding not counted.
        items (`int`): completions, rows or whatever else is counted beside them.
        seconds (`float`): how long that took.
        steps (`int`): in how many steps.
        peak_bytes (`int`): most memory that was taken beyond what was taken before the first step.
    """

    tokens: int
    items: int
    seconds: float
    steps: int
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def items_per_second(self) -> float:
        """Items per second."""
        return self.items / self.seconds


def setting(default: Any, help: str) -> Any:
    """A field of a dataclass of settings, with what its option says."""
    return field(default=default, metadata={"help": help})


def add_settings(parser: argparse.ArgumentParser, settings: type, **several: Sequence[Any]) -> None:
    """An option for every field of a dataclass of settings, whose fields are [`setting`]s.

    Args:
        parser (`argparse.ArgumentParser`): gets them.
        settings (`type`): the dataclass.
        several: defaults of fields that are measured one after the other.
    """
    for entry in fields(settings):
        default = several.get(entry.name, entry.default)
        shown = (
            "" if default == "" else f" (default: {' '.join(map(str, default)) if entry.name in several else default})"
        )
        parser.add_argument(
            f"--{entry.name}",
            type=type(entry.default),
            default=default,
            nargs="+" if entry.name in several else None,
            help=entry.metadata["help"] + shown,
        )


def read_settings(args: argparse.Namespace, settings: type) -> Any:
    """The dataclass of settings that [`add_settings`] has put into a parsed command line."""
    return settings(**{entry.name: getattr(args, entry.name) for entry in fields(settings)})


def resident_peak() -> int:
    """The most memory that this process has held so far, in bytes (`ru_maxrss`)."""
    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Counts tokens and time from the end of the warm-up on.

    Args:
        seconds (`float`): when this much has been measured, [`Meter.add`] says so.
        warmup (`int`, *optional*, defaults to `2`): steps that are not measured.
    """

    def __init__(self, seconds: float, warmup: int = 2):
        self.limit, self.left = seconds, warmup
        self.tokens = self.items = self.steps = 0
        self.baseline = resident_peak()
        self.start = time.perf_counter()

    def add(self, tokens: int, items: int) -> bool:
        """After each step: what it processed. Returns whether enough was measured."""
        now = time.perf_counter()
        if self.left > 0:
            self.left -= 1
            self.start = now
            return False
        self.tokens, self.items, self.steps = self.tokens + tokens, self.items + items, self.steps + 1
        self.seconds = now - self.start
        return self.seconds >= self.limit

    def result(self) -> Measurement:
        """What was measured.

        Raises:
            RuntimeError: if no step was.
        """
        if not self.steps:
            raise RuntimeError("No step was measured: give more data, or fewer steps to warm up.")
        return Measurement(self.tokens, self.items, self.seconds, self.steps, resident_peak() - self.baseline)


def report(measurement: Measurement) -> None:
    """Prints a measurement for the process that asked for it."""
    print(MARK + json.dumps(asdict(measurement)), flush=True)


def measure_in_process(module: str, arguments: Mapping[str, Any]) -> Measurement:
    """Runs `python -m module --name value …` and returns the measurement that it [`report`]s.

    Raises:
        RuntimeError: if the process fails or reports nothing, with the sentence that it ended in, or else the end of
            what it said.
    """
    options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True, env=os.environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        _, said, sentence = done.stderr.rpartition("\nerror: ")
        raise RuntimeError(
            f"python -m {module} {' '.join(options)} failed:\n{sentence if said else done.stderr[-2000:]}"
        )
    return Measurement(**json.loads(lines[-1].removeprefix(MARK)))


def run_steps(step: Callable[[int], tuple[int, int]], meter: Meter) -> Measurement:
    """Takes steps until enough is measured; `step(number)` returns the tokens and the items that it processed."""
    number = 0
    while not meter.add(*step(number)):
        number += 1
    return meter.result()
