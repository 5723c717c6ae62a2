"""Calls in processes of their own, which end with a call that takes too long.

Libraries that work out what a model writes can be kept busy for ever by it, inside one operation that no signal and no
thread can interrupt. Here a process does it that ends itself on time, and is replaced. It works from any thread, needs
no `if __name__ == "__main__"`, and shares nothing with the process that asks: a worker is started, not forked.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

MOST_WORKERS = min(4, os.cpu_count() or 1)
# Memory that a worker may take beyond what it has when it starts.
MEMORY_BYTES = 2 * 1024**3
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Where this package is, also for a program that has changed its folder.
ROOT = str(Path(__file__).resolve().parents[1])
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from reward.timed_calls import serve; serve()"


def call_all(function: Callable, arguments: Sequence[Sequence], *, limit: float, otherwise: Any) -> list:
    """What `function` returns for each of `arguments`, worked out by a few processes that stay for the next call.

    A `RuntimeError` where a process cannot be started, or has no such function.

    Args:
        function (`Callable`): a function of a module, looked up there by its name.
        arguments (sequence of sequences): positional arguments of each call, which JSON can hold.
        limit (`float`): seconds that one call may take.
        otherwise (any): in place of the value of a call that took longer, ran out of memory or raised an exception; the
            log says so.

    Returns:
        `list`: one value for each call, as JSON holds it.
    """
    workers = _workers.setdefault(os.getpid(), _Workers())

    def call(given: Sequence) -> Any:
        return workers.call(function, list(given), limit, otherwise)

    if len(arguments) < 2:
        return [call(given) for given in arguments]
    with ThreadPoolExecutor(min(MOST_WORKERS, len(arguments))) as threads:
        return list(threads.map(call, arguments))


class _Workers:
    """The workers of one process: at most `MOST_WORKERS` at work at once, whatever the number of threads that ask."""

    def __init__(self):
        self.owner = os.getpid()
        self.idle: list[_Worker] = []
        self.places = threading.BoundedSemaphore(MOST_WORKERS)
        atexit.register(self.close)

    def call(self, function: Callable, given: list, limit: float, otherwise: Any) -> Any:
        name = f"{function.__module__}:{function.__qualname__}"
        with self.places:
            worker = self._take()
            try:
                reply = worker.ask({"function": name, "arguments": given, "limit": limit})
            except BaseException:
                worker.close()
                raise
            if reply is None:
                worker.close()
                logger.warning("%s took more than %g s or too much memory for %.200r.", name, limit, given)
                return otherwise
            self.idle.append(worker)
        if "missing" in reply:
            raise RuntimeError(f"A process that grades cannot call {name}: {reply['missing']}.")
        if "error" in reply:
            logger.warning("%s failed for %.200r: %s.", name, given, reply["error"])
            return otherwise
        return reply["value"]

    def _take(self) -> _Worker:
        while True:
            try:
                worker = self.idle.pop()
            except IndexError:
                return _Worker()
            if worker.process.poll() is None:
                return worker
            worker.close()

    def close(self) -> None:
        # A process that was forked from the owner has the list, but not the workers.
        while self.idle and self.owner == os.getpid():
            self.idle.pop().close()


class _Worker:
    """A process that reads one call a line and answers each with a line."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps([ROOT, *map(str, sys.path)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
            # Ctrl-C is for the process that asks.
            start_new_session=True,
        )
        if self._line() is None:
            self.close()
            raise RuntimeError(f"{sys.executable} could not start a process that grades: see its error above.")

    def ask(self, call: dict) -> dict | None:
        """The reply, or `None` where the process ended instead."""
        try:
            self.process.stdin.write(json.dumps(call).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self._line()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> dict | None:
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None


# By process id: a forked process starts workers of its own.
_workers: dict[int, _Workers] = {}


def serve() -> None:
    """Answer calls from standard input until it ends: the whole life of a worker."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # What libraries print is no reply.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable()
    _limit_memory()
    with open(os.devnull, "w") as nowhere:
        for reply in _replies(nowhere):
            print(json.dumps(reply), file=replies, flush=True)


def _replies(nowhere: TextIO) -> Iterator[dict]:
    yield {}
    for line in sys.stdin.buffer:
        call = json.loads(line)
        module, _, name = call["function"].partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            yield {"missing": str(error)}
            continue
        # Ends the process from a thread that needs no turn of the interpreter.
        faulthandler.dump_traceback_later(call["limit"], exit=True, file=nowhere)
        try:
            reply = {"value": function(*call["arguments"])}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        finally:
            faulthandler.cancel_dump_traceback_later()
        yield reply


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as pages:
            held = int(pages.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = held + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
