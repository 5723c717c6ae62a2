"""Pages that programs write: one file of HTML with its script and its data inside, which asks for nothing.

A program's folder holds `template.html`, in which `__DATA__` and `__SCRIPT__` stand where the two belong, and its
scripts. They follow each other in the order of their names, after `eval/pages.js`, which holds what all pages share.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lenvm_rl.files import atomic_file

SHARED_SCRIPT = Path(__file__).with_suffix(".js")


def save_page(path: str | os.PathLike, folder: Path, data: Any) -> None:
    """Write the page of a program's folder, atomically."""
    with atomic_file(path) as file:
        file.write(fill_page(folder, data).encode("utf-8"))


def fill_page(folder: Path, data: Any) -> str:
    """The page of a program's folder: template, scripts and data in one text."""
    # Inside a script element only these can end it or begin a comment; JSON may write them as escapes.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    head, tail = (folder / "template.html").read_text(encoding="utf-8").split("__DATA__")
    middle, end = tail.split("__SCRIPT__")
    scripts = [path.read_text(encoding="utf-8") for path in (SHARED_SCRIPT, *sorted(folder.glob("*.js")))]
    return "".join([head, text, middle, *scripts, end])


def six_digits(value: Any) -> Any:
    """The same with six digits for every float, however nested: what a page can show, in a third of the room."""
    if isinstance(value, dict):
        return {name: six_digits(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [six_digits(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
