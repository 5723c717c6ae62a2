"""The same comparison over several seeds: one table from the tradeoff.json of several runs.

    python -m eval.seeds --run_dirs outputs/seed_0 outputs/seed_1 outputs/seed_2

Prints, for every arm that all runs have, mean tokens, accuracy, distance to the style frontier and excess tokens: the
mean over runs and, in brackets, the lowest and the highest run. A few seeds give no better interval than their range.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers.hf_argparser import HfArg

from eval.report import Column, Entry, is_known, mean_and_range, print_table
from eval.runs import STARTS_OVER, read_report, run_evaluation

logger = logging.getLogger(__name__)

REPORT = "tradeoff.json"
# Arguments of a comparison that differ from run to run.
OF_ONE_RUN = ("run_dir", "policy", "length_value_model", "base", "trained", "output_dir", "seed")
COLUMNS = (
    Column("arm", "name"),
    Column("tokens", "tokens", 1),
    Column("accuracy", "accuracy", 3),
    Column("below frontier", "frontier_gap", 3),
    Column("excess tokens", "excess_tokens", 1),
)


def collect(folders: list[str]) -> list[dict[str, str | Entry]]:
    """A row per arm: for each column that all runs know, the mean of their estimates, the lowest and the highest.

    Arms that a run lacks are named in the log and left out. A run that was not compared yet, or with other arguments
    than the first one, is refused.
    """
    runs, arguments = [], []
    for folder in folders:
        places = [Path(folder) / "tradeoff" / REPORT, Path(folder) / REPORT]
        report = read_report(places[0]) or read_report(places[1])
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
    rows: list[dict[str, str | Entry]] = [{"name": name} for name in shared]
    for row in rows:
        for key in (column.value for column in COLUMNS[1:]):
            if all(is_known(run[row["name"]].get(key)) for run in runs):
                row[key] = mean_and_range([run[row["name"]][key]["estimate"] for run in runs])
    return rows


@dataclass
class SeedsArguments:
    """Which comparisons are put together."""

    run_dirs: list[str] = HfArg(
        help="Folders of runs, with tradeoff/tradeoff.json, or of comparisons, with tradeoff.json."
    )


def main(args: SeedsArguments) -> None:
    """Prints the table."""
    title = f"mean and range over {len(args.run_dirs)} runs"
    print_table(Console(width=120), collect(args.run_dirs), COLUMNS, title)


if __name__ == "__main__":
    run_evaluation(SeedsArguments, main, "eval.seeds", __doc__, STARTS_OVER)
