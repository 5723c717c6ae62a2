"""How programs end, and with how many threads they compute."""

import ast
import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from places import ROOT
from transformers import AutoConfig, HfArgumentParser

from lenvm_rl import programs
from lenvm_rl.programs import TRACEBACK_VARIABLE, choose_threads, run_program, sentence_of, usable_cores
from lenvm_rl.returns import fit_gamma


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (TRACEBACK_VARIABLE, *programs.THREAD_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def caught(action):
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def ours(source):
    """A function `run` of a module that would lie among this project's, from its source."""
    namespace = {}
    exec(compile(source, str(Path(programs.__file__).with_name("imaginary.py")), "exec"), namespace)
    return namespace["run"]


@dataclass
class Arguments:
    size: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}.")


def parse(*line):
    return HfArgumentParser(Arguments).parse_args_into_dataclasses(list(line), look_for_args_file=False)


RAISED_FROM = """
def run():
    try:
        int('x')
    except ValueError as error:
        raise ValueError('give x') from error
"""


@pytest.mark.parametrize(
    "action, said",
    [
        (lambda: fit_gamma([]), "at least one length"),
        (ours(RAISED_FROM), "give x"),
        (ours("def run():\n    raise ImportError('install vllm')"), "install vllm"),
        (lambda: parse("--size", "0"), "size must be at least 1"),
        (lambda: parse("--seize", "1"), "--seize"),
        (Path("/nowhere/at/all").read_text, "/nowhere/at/all: there is no such file or folder"),
        (Path("/").read_text, "/: it is a folder where a file is needed"),
        (lambda: AutoConfig.from_pretrained("/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_what_a_person_can_change_is_told_in_a_sentence(action, said):
    assert said in sentence_of(caught(action))


@pytest.mark.parametrize(
    "action",
    [
        ours("def run():\n    int('x')"),
        ours("def run():\n    [one] = [1, 2]"),
        ours("def run():\n    import torch\n    torch.zeros(2) + torch.zeros(3)"),
        ours("def run():\n    raise KeyError('x')"),
        ours("def run():\n    assert False"),
        lambda: torch.nn.Linear(2, 2)(torch.zeros(3)),
        lambda: os.close(10**6),
    ],
)
def test_a_defect_keeps_its_traceback(action):
    error = caught(action)
    assert sentence_of(error) is None
    with pytest.raises(type(error)):
        run_program(action)


def test_an_error_of_the_persons_own_function_keeps_its_traceback():
    def reward():
        raise ValueError("of the person's own")

    with pytest.raises(ValueError, match="person's own"):
        run_program(reward)


@pytest.mark.parametrize("processes, fails, left", [(2, False, 1), (1, False, 0), (2, True, 0)])
def test_processes_of_a_launch_leave_their_group_once_all_is_done(monkeypatch, processes, fails, left):
    calls = []
    for name, fake in {
        "is_initialized": lambda: True,
        "get_world_size": lambda: processes,
        "destroy_process_group": lambda: calls.append("left"),
    }.items():
        monkeypatch.setattr(torch.distributed, name, fake)

    def main():
        calls.append("done")
        if fails:
            # Another process may still wait for this one.
            raise SystemExit(1)

    if fails:
        with pytest.raises(SystemExit):
            run_program(main)
    else:
        run_program(main)
    assert calls == ["done"] + ["left"] * left


def test_the_sentence_the_notes_and_the_way_to_the_traceback(monkeypatch):
    def main():
        error = PermissionError(errno.EACCES, "Permission denied", "/out")
        error.add_note("This was for prompt 3.")
        raise error

    with pytest.raises(SystemExit) as stop:
        run_program(main)
    lines = stop.value.code.strip().split("\n")
    assert lines[0].startswith("error: /out: ") and lines[1:] == [
        "This was for prompt 3.",
        "(LENVM_TRACEBACK=1 shows where.)",
    ]
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(PermissionError):
        run_program(main)


def test_an_interrupted_program_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_program(main, "go on with --resume")
    assert stop.value.code == 130 and "go on with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("rank, waits", [(None, []), ("0", []), ("3", [programs.running.SECONDS_OF_THE_FIRST])])
def test_the_first_process_of_a_launch_speaks_first(rank, waits, monkeypatch):
    waited = []
    monkeypatch.setattr(programs.running.time, "sleep", waited.append)
    monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
    # What one process alone runs into is told by it all the same.
    with pytest.raises(SystemExit, match="at least one length"):
        run_program(lambda: fit_gamma([]))
    assert waited == waits

    def stopped():
        raise SystemExit("stopped after 3 steps")

    with pytest.raises(SystemExit) as stop:
        run_program(stopped)
    assert stop.value.code == (1 if waits else "stopped after 3 steps")


def test_a_failed_program_has_status_1_and_no_traceback():
    source = (
        "from lenvm_rl.programs import run_program\n"
        "from lenvm_rl.returns import fit_gamma\n"
        "run_program(lambda: fit_gamma([]))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr


def second(folder, quota, period=100_000):
    """The files of a control group of version 2."""
    return {f"{folder}cpu.max": f"{quota} {period}\n"}


def first(folder, quota, period=100_000):
    """The files of a control group of version 1."""
    return {f"{folder}cpu.cfs_quota_us": f"{quota}\n", f"{folder}cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/", second("", "max"), 64),
        ("0::/", second("", 300_000), 3),
        ("0::/", second("", 175_000, 50_000), 3),
        ("0::/", second("", 50_000), 1),
        # The tightest of a group and all that it lies in.
        ("0::/a/b", second("a/b/", "max") | second("a/", 400_000) | second("", "max"), 4),
        ("0::/a/b", second("a/b/", 200_000) | second("a/", 400_000), 2),
        # The path is one of the machine, and what is mounted is the container's own.
        ("0::/../../docker/1", second("", 500_000), 5),
        ("4:cpu,cpuacct:/docker/1\n0::/", first("cpu,cpuacct/", 600_000), 6),
        ("4:cpu:/a\n2:memory:/b", first("cpu/a/", 700_000), 7),
        ("4:cpu:/", first("cpu/", -1), 64),
        # Of a group that this process is not in.
        ("0::/a", second("b/", 100_000), 64),
        ("2:memory:/a", first("a/", 100_000), 64),
    ],
)
def test_no_more_cores_than_there_is_time_for(groups, files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": f"{groups}\n"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cores(tmp_path) == cores


def test_the_cores_that_a_process_may_run_on_count_and_macos_has_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(tmp_path) == 16


@pytest.fixture
def threads(monkeypatch):
    """What torch was told, without telling it."""
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(programs.running, "usable_cores", lambda: 12)
    return told


@pytest.mark.parametrize(
    "variables, asked, expected",
    [
        ({}, None, 12),
        ({}, 1, 1),
        ({"OMP_NUM_THREADS": "3"}, None, 3),
        ({"OMP_NUM_THREADS": "3"}, 1, 3),
        ({"MKL_NUM_THREADS": "2"}, None, 2),
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2"}, None, 3),
        ({"OMP_NUM_THREADS": ""}, None, 12),
    ],
)
def test_the_environment_says_how_many_threads(variables, asked, expected, threads, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    choose_threads(asked)
    assert threads == [expected]


PROGRAMS = sorted(path for path in (ROOT / "recipes").glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_ends_so(path):
    [start] = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    ]
    last = start.body[-1]
    assert isinstance(last, ast.Expr) and ast.unparse(last.value).startswith("run_program(")
