"""The same comparison over several seeds: one table from the tradeoff.json of several runs.

    python -m eval.seeds outputs/seed_0 outputs/seed_1 outputs/seed_2

Prints, for every arm that all runs have, mean tokens, accuracy, distance to the style frontier and excess tokens: the
mean over runs and, in brackets, the lowest and the highest run. A few seeds give no better interval than their range.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.command_line import STARTS_OVER
from eval.report import is_known
from eval.runs import read_json
from lenvm_rl.programs import run_program

logger = logging.getLogger(__name__)

REPORT = "tradeoff.json"

# Arguments of a comparison that differ from run to run.
OF_ONE_RUN = ("run_dir", "policy", "length_value_model", "base", "trained", "output_dir", "seed")
COLUMNS = {"tokens": 1, "accuracy": 3, "frontier_gap": 3, "excess_tokens": 1}


def collect(folders: list[str]) -> dict[str, dict[str, list[float]]]:
    """Per arm and column, the estimates of all runs; arms that a run lacks are named in the log and left out.

    Raises:
        ValueError: a run was not compared yet, or with other arguments.
    """
    runs, arguments = [], []
    for folder in folders:
        places = [Path(folder) / "tradeoff" / REPORT, Path(folder) / REPORT]
        report = read_json(places[0]) or read_json(places[1])
        if report is None:
            raise ValueError(f"{places[0]} does not exist: run `python -m eval.tradeoff --run_dir {folder}` first.")
        runs.append({arm["name"]: arm for arm in report["arms"]})
        arguments.append({name: value for name, value in report["arguments"].items() if name not in OF_ONE_RUN})
        if arguments[-1] != arguments[0]:
            raise ValueError(f"{folder} was compared with other arguments than {folders[0]}: run eval.tradeoff again.")
    names = list(dict.fromkeys(name for run in runs for name in run))
    shared = [name for name in names if all(name in run for run in runs)]
    if len(shared) < len(names):
        logger.warning("not in every run, left out: %s", ", ".join(name for name in names if name not in shared))
    return {
        name: {
            column: [run[name][column]["estimate"] for run in runs]
            for column in COLUMNS
            if all(is_known(run[name].get(column)) for run in runs)
        }
        for name in shared
    }


def cell(values: list[float] | None, digits: int) -> str:
    """Mean and range of a few numbers, or a dash."""
    if values is None:
        return "–"
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def print_table(arms: dict[str, dict[str, list[float]]], runs: int, console: Any) -> None:
    """One line per arm."""
    table = Table(title=f"mean and range over {runs} runs")
    table.add_column("arm", no_wrap=True)
    for column in ("tokens", "accuracy", "below frontier", "excess tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, columns in arms.items():
        table.add_row(name, *(cell(columns.get(column), digits) for column, digits in COLUMNS.items()))
    console.print(table)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", help="Folders of runs, with tradeoff/tradeoff.json, or of comparisons, with tradeoff.json."
    )
    folders = parser.parse_args().runs
    print_table(collect(folders), len(folders), Console(width=120))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_program(main, STARTS_OVER)
