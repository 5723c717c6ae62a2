"""Whether the files of a checkpoint are whole, and what to do where they are not."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lenvm_rl.run_checkpoints import checkpoints_in, is_complete

# What torch.save writes.
ARCHIVES = (".pt", ".pth", ".bin")


def damaged_files(checkpoint: str | os.PathLike) -> dict[str, str]:
    """Files of a checkpoint that end too early, by their path in it, with what is wrong; weights are not read.

    Args:
        checkpoint (`str` or path): a folder; those inside it, such as that of a critic, are looked through as well.
    """
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
    if path.suffix in ARCHIVES:
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
