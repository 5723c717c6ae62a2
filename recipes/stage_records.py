"""Stages of a run, each made once: what one was made with stands beside its artefact, `<artefact>.stage.json`.

A stage is finished when its record says so; a later run with the same settings reuses the artefact, one with other
settings is refused, since artefacts that other stages were made from must not change under them.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape

from lenvm_rl.files import Journal, last_complete_checkpoint, read_json, write_json

# What follows rollouts, from wherever they come.
PRETRAIN = ("accelerate", "launch", "recipes/pretrain_lenvm.py")
# Variables by which launchers tell processes of each other.
OF_A_LAUNCH = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_",
    "ACCELERATE_", "FSDP_",
)  # fmt: skip
# Seconds between two looks at whether another process is done.
WAIT = 1.0
console = Console(width=120, highlight=False)


def say(text: Any) -> None:
    """Print for a person, once for all processes."""
    if PartialState().is_main_process:
        console.print(text, soft_wrap=True)


def say_next(*command: str) -> None:
    """Print the command that a person would give next."""
    say(escape(f"next: {shlex.join(command)}"))


def run_stage(title: str, artefact: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> None:
    """Make an artefact unless it is there already.

    Args:
        title (`str`): what the stage does, for the console.
        artefact (`pathlib.Path`): the file or folder that `make` writes.
        settings (mapping): everything that the artefact depends on; kept in `<artefact>.stage.json`.
        make (callable): writes the artefact, or goes on with what an interrupted run left of it.
    """
    settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
    found = stage_record(artefact)
    changed = [] if found is None else changed_settings(found["settings"], settings)
    if changed:
        raise ValueError(
            f"{artefact} was {'made' if found['finished'] else 'begun'} with other settings ({', '.join(changed)} "
            "differ). Give another --output_dir, or another --trained_name if only training differs; or remove the "
            "artefact, its .stage.json, and what was made from it."
        )
    if found is not None and found["finished"]:
        say(f"[bold]{title}[/bold]: done before, {artefact}")
        return
    say(f"[bold]{title}[/bold] -> {artefact}" + (", which was begun before" if found is not None else ""))
    write_record(artefact, settings, finished=False)
    make()
    write_record(artefact, settings, finished=True)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ, `outer.inner` where settings hold settings. One that an earlier version did
    not have is as if it had been `None`."""
    changed = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += [f"{name}.{inner}" for inner in changed_settings(old, new)]
        elif old != new:
            changed.append(name)
    return changed


def stage_record(artefact: Path) -> dict[str, Any] | None:
    """What the record of a stage says of its artefact, `None` if there is neither that nor a part of it.

    A record alone is what a first attempt leaves that failed at once, or an artefact that somebody removed to make it
    anew: it binds nobody.
    """
    path = record_path(artefact)
    found = read_json(path) if path.exists() else None
    if found is None or (found["finished"] and artefact.exists()) or is_begun(artefact):
        return found
    return None


def is_begun(artefact: Path) -> bool:
    """Whether an interrupted stage left something to go on from: its artefact, batches of it, or a checkpoint."""
    if artefact.is_dir():
        weights = next(artefact.glob("*model*.safetensors"), None)
        return weights is not None or last_complete_checkpoint(artefact) is not None
    return artefact.exists() or Journal(artefact.with_suffix(".journal"), "").has_batches()


def is_made(artefact: Path) -> bool:
    """Whether the stage of an artefact is finished."""
    found = stage_record(artefact)
    return found is not None and found["finished"]


def make_apart(artefacts: Sequence[Path]) -> None:
    """Have the stages before training made by one process, while the others of a launch wait for its records.

    The first process starts the same command as a program of its own, which knows of no launch: what a stage trains is
    trained by one process then, and its memory is free again afterwards.

    Args:
        artefacts (sequence of `pathlib.Path`): what the stages make; all processes must see the folder.
    """
    if PartialState().is_main_process:
        say(f"making {', '.join(map(str, artefacts))} in one process; the others wait")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCH)}
        done = subprocess.run([sys.executable, *sys.argv, "--prepare_only", "true"], env=environment)
        if done.returncode:
            # It has said why.
            raise SystemExit(done.returncode)
    while not all(map(is_made, artefacts)):
        time.sleep(WAIT)


def write_record(artefact: Path, settings: Mapping[str, Any], finished: bool) -> None:
    """Write a stage's record, on the main process."""
    if PartialState().is_main_process:
        write_json(record_path(artefact), {"finished": finished, "settings": settings})


def record_path(artefact: Path) -> Path:
    """Where the record of a stage is kept."""
    return artefact.with_name(artefact.name + ".stage.json")
