"""What every program does around its work: the threads that it computes with, and how it ends when something is wrong.

if __name__ == "__main__":
    run_program(main)
"""

from __future__ import annotations

import dis
import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import HfArgumentParser

logger = logging.getLogger(__name__)

# Set to anything, it makes a program that fails show the whole traceback instead of a sentence.
TRACEBACK_VARIABLE = "LENVM_TRACEBACK"
INTERRUPTED = "Interrupted. What was finished is kept: run the same command again, and it goes on from there."
AGAIN = "Interrupted. Run the same command again: it starts over."

# Who sets one of these has said how many threads a process is to have. In the order in which torch asks them.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

# Seconds that a process leaves the first one of its launch to fail of the same thing.
SECONDS_OF_THE_FIRST = 10.0
_OURS = tuple(str(Path(__file__).parents[2] / name) + os.sep for name in ("lenvm_rl", "reward", "eval", "recipes"))
_DELIBERATE = (ValueError, TypeError, RuntimeError, ImportError, FloatingPointError)
_FORBIDDEN = "this user may not read or write there: give another path, or change who may"
_ADVICE = {
    errno.ENOENT: "there is no such file or folder: check the path",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: "it lies on a disk that cannot be written: give another path",
    errno.EEXIST: "something is there already: give another path, or move it away",
    errno.ENOTDIR: "a part of the path is a file where a folder is needed: check the path",
    errno.EISDIR: "it is a folder where a file is needed: check the path",
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the room that this user has on the disk is used up: make room",
    errno.EFBIG: "it grew larger than a file may be here: make room",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ECONNREFUSED: "nobody answers at that address: check it, and whether the server runs",
    errno.EADDRINUSE: "another program has that address: give another port",
}


def run_program(main: Callable[[], Any], interrupted: str = INTERRUPTED) -> None:
    """Call `main`. What it refuses or cannot reach ends the program with a sentence on stderr, and exit status 1.

    Sentences are the errors that this project raises on purpose, those about the command line, and what the system, a
    disk or a hub answered. Any other error is a defect and keeps its traceback, and so does every error where the
    environment variable `LENVM_TRACEBACK` is set. Of several processes of a launch the first speaks: the launcher ends
    the others while they wait, and one that failed alone speaks after that.

    Args:
        main (callable): the program, without arguments.
        interrupted (`str`, *optional*): what Ctrl-C leaves and how to go on, said with exit status 130.
    """
    try:
        main()
        _leave_the_others()
    except SystemExit as stopped:
        # Processes of a launch stop together, and the first says why.
        raise SystemExit(1 if isinstance(stopped.code, str) and not _is_first() else stopped.code) from None
    except KeyboardInterrupt:
        if TRACEBACK_VARIABLE in os.environ:
            raise
        # On a line of its own: a progress bar may stand in this one.
        sys.stderr.write(f"\n{interrupted}\n")
        raise SystemExit(130) from None
    except Exception as error:
        if not _is_first():
            time.sleep(SECONDS_OF_THE_FIRST)
        sentence = sentence_of(error)
        if sentence is None or TRACEBACK_VARIABLE in os.environ:
            raise
        said = [f"error: {sentence}", *getattr(error, "__notes__", ()), f"({TRACEBACK_VARIABLE}=1 shows where.)"]
        raise SystemExit("\n" + "\n".join(said)) from None


def _leave_the_others() -> None:
    # One that ends with its group alive may abort: a thread of the group that waits for the interpreter is cut off.
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.destroy_process_group()


def _is_first() -> bool:
    """Whether this is the only process of its launch, or the one that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def sentence_of(error: Exception) -> str | None:
    """What a person needs to know of an error, or `None` if it is a defect, of which the traceback tells more."""
    if isinstance(error, OSError):
        return _sentence_of_the_system(error)
    if isinstance(error, (ValueError, TypeError)) and _while_arguments_were_read(error):
        return str(error)
    return str(error) if isinstance(error, _DELIBERATE) and _raised_on_purpose(error.__traceback__) else None


def _sentence_of_the_system(error: OSError) -> str | None:
    if error.errno is None:
        # transformers, datasets and the hub's client say in words what they did not find.
        return str(error) or None
    if error.errno not in _ADVICE:
        return None
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{_ADVICE[error.errno]} ({error.strerror})."


def _while_arguments_were_read(error: Exception) -> bool:
    # By its name: TRL has a copy of the class.
    reader = HfArgumentParser.parse_args_into_dataclasses.__qualname__
    return any(frame.f_code.co_qualname == reader for frame, _ in traceback.walk_tb(error.__traceback__))


def _raised_on_purpose(trace: TracebackType | None) -> bool:
    """Whether an error comes of a `raise` in this project's code, rather than of an operation that failed there."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return code.co_filename.startswith(_OURS) and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def choose_threads(threads: int | None = None) -> int:
    """Set with how many threads torch computes on a CPU. What the environment says about it holds.

    Returns:
        `int`: with how many it computes now.
    """
    cores = usable_cores()
    name = next((name for name in THREAD_VARIABLES if os.environ.get(name, "").isdigit()), None)
    if name is not None:
        threads = int(os.environ[name])
        if threads < cores:
            logger.info(
                "%s=%d, of %d cores (`accelerate launch` sets it to 1 where nobody did: start with %s=%d for all).",
                name, threads, cores, name, cores,
            )  # fmt: skip
    torch.set_num_threads(max(1, cores if threads is None else threads))
    return torch.get_num_threads()


def usable_cores(root: str | os.PathLike = "/") -> int:
    """Cores that this process can keep busy: those it may run on, and no more than its control groups give time for."""
    # macOS tells nobody on which cores a process may run.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Of a broken number the whole cores: the last thread would make all others wait.
    return max(1, min([cores, *map(int, _quotas(Path(root)))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that the control groups of this process allow, each with all that it lies in."""
    listing = root / "proc/self/cgroup"
    if not listing.is_file():
        return
    for line in listing.read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = {root / "sys/fs/cgroup" / name for name in (controllers, "cpu" if controllers else "unified")}
        # In a container the group's path can be one outside of it: what is mounted is then the group itself.
        inside = PurePosixPath(group.lstrip("/"))
        for folder in {mount / part for mount in mounts for part in (inside, *inside.parents)}:
            quota = _quota(folder)
            if quota is not None:
                yield quota


def _quota(folder: Path) -> float | None:
    """Cores' worth of time of one control group, of version 2 or 1; `None` if it sets no limit."""
    second, first = folder / "cpu.max", folder / "cpu.cfs_quota_us"
    if second.is_file():
        quota, period = second.read_text(encoding="ascii").split()
    elif first.is_file():
        quota, period = (file.read_text(encoding="ascii") for file in (first, folder / "cpu.cfs_period_us"))
    else:
        return None
    return None if quota.strip() in ("max", "-1") else int(quota) / int(period)
