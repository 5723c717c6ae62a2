"""The page of a comparison: one file of HTML with its frontier, curves, table and samples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.pages import save_page, six_digits


def write_page(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write the page of a report, which needs no other file.

    Args:
        report (mapping): what [`~eval.compare.report.make_report`] makes: `world`, `cells`, `frontier`. Two more are
            shown where they are there. `decoding`: entries `{"name", "kind", "tokens", "accuracy"}`, the last two with
            `estimate`, `low`, `high`; points of a kind are joined by a line, and the kind `"base"` stands for the base
            policy. `samples`: entries `{"prompt", "rows"}`, of which a row is `{"name", "text", "waste", "correct"}`,
            with a truth value for each token of the text, whose tokens are set apart by blanks.
        path (`str` or path): the file.
    """
    save_page(path, Path(__file__).parent, six_digits(dict(report)))
