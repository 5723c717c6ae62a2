"""Calls in processes of their own: their values, their ends, and who may ask."""

import logging
import os
import subprocess
import sys
import threading
import time

import pytest
import slow_calls
from places import PATHS

from reward import timed_calls
from reward.timed_calls import call_all


@pytest.fixture(autouse=True)
def own_workers(monkeypatch):
    """Workers that are started here, and see this folder."""
    monkeypatch.setattr(timed_calls, "_workers", {})
    yield
    for workers in timed_calls._workers.values():
        workers.close()


def test_values_come_back_in_order():
    values = ["a", "\x00\ud800é\n", 1.5, None, [1, {"b": []}]] * 20
    assert call_all(slow_calls.echo, [[value] for value in values], limit=5, otherwise="late") == values
    assert call_all(slow_calls.echo, [], limit=5, otherwise="late") == []


def test_timed_calls_stay_and_what_libraries_print_is_no_reply():
    first = call_all(slow_calls.whisper, [[]], limit=5, otherwise=None)
    assert first == call_all(slow_calls.whisper, [[]], limit=5, otherwise=None) != [os.getpid()]


@pytest.mark.parametrize("call", [(slow_calls.hold_the_interpreter, []), (slow_calls.hold, [60])])
def test_a_call_that_takes_too_long_ends_on_time_in_any_thread(call, caplog):
    function, given = call
    results = []
    call_all(slow_calls.echo, [[0]], limit=5, otherwise=None)
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="reward.timed_calls"):
        thread = threading.Thread(
            target=lambda: results.extend(call_all(function, [given], limit=0.5, otherwise="late"))
        )
        thread.start()
        thread.join(timeout=30)
    assert results == ["late"] and time.monotonic() - begin < 10
    assert f"slow_calls:{function.__name__} took more than 0.5 s" in caplog.text
    assert call_all(slow_calls.echo, [[1]], limit=5, otherwise="late") == [1]


def test_one_slow_call_does_not_spoil_the_others():
    given = [[0], [60], [0], [0.01], [60], [0]]
    assert call_all(slow_calls.hold, given, limit=0.5, otherwise=-1) == [0, -1, 0, 0.01, -1, 0]


def test_what_fails_is_logged_and_stands_for_nothing(caplog):
    with caplog.at_level(logging.WARNING, logger="reward.timed_calls"):
        assert call_all(slow_calls.fail, [["x"], ["y"]], limit=5, otherwise=-1) == [-1, -1]
        assert call_all(slow_calls.recurse, [[]], limit=5, otherwise=-1) == [-1]
        assert call_all(slow_calls.leave, [[]], limit=5, otherwise=-1) == [-1]
    assert "KeyError: 'x'" in caplog.text and "RecursionError" in caplog.text and "slow_calls:leave" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux alone")
def test_memory_is_bounded():
    assert call_all(slow_calls.take, [[10**11], [10]], limit=5, otherwise=-1) == [-1, 10]


def test_a_process_that_died_between_calls_is_replaced():
    (pid,) = call_all(slow_calls.whisper, [[]], limit=5, otherwise=None)
    (worker,) = timed_calls._workers[os.getpid()].idle
    assert worker.process.pid == pid
    worker.process.kill()
    worker.process.wait()
    (other,) = call_all(slow_calls.whisper, [[]], limit=5, otherwise=None)
    assert other not in (None, pid)


def test_a_function_that_is_not_there_is_an_error():
    def gone():
        pass

    with pytest.raises(RuntimeError, match="cannot call test_timed_calls:.*gone"):
        call_all(gone, [[]], limit=5, otherwise=None)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_script_without_a_main_guard_and_its_forks_may_ask(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path[:0] = {PATHS!r}\n"
        "import slow_calls\n"
        "from reward.timed_calls import call_all\n"
        "print('once', flush=True)\n"
        "assert call_all(slow_calls.echo, [[1], [2]], limit=5, otherwise=0) == [1, 2]\n"
        "if os.fork() == 0:\n"
        "    os._exit(call_all(slow_calls.echo, [[3]], limit=5, otherwise=0) != [3])\n"
        "assert os.wait()[1] == 0\n"
        "assert call_all(slow_calls.echo, [[4]], limit=5, otherwise=0) == [4]\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "once\n", "")
