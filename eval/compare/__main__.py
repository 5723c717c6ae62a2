"""When does a dense length advantage beat a length penalty? Training curves on the built-in sandbox, arm by arm.

    python -m eval.compare --run_dirs outputs/seed_0 outputs/seed_1 outputs/seed_2
        Folders of `recipes/ppo_shaped.py --seed 0 --output_dir outputs/seed_0`, for each a base policy and its length
        value model. Runs what has no record yet, then reports. The same command in a second process takes its share;
        interrupted, it goes on.

    python -m eval.compare --report docs/results/compare.json
        Prints and draws a comparison anew from its records, without a run.

What is run is in `eval.compare.plan`, with what settings in `eval.compare.arms`, and by what it is judged in
`eval.compare.measures`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from eval.compare.arms import ARMS, BY_NAME
from eval.compare.measures import judge_curve
from eval.compare.plan import CELLS, CHOICE_SEEDS, Run, open_runs
from eval.compare.records import Records, recorded_runs
from eval.compare.report import make_report, print_cells, write_comparison
from eval.compare.samples import decoding_arms, sample_answers
from eval.compare.training import World, train_run
from eval.runs import run_evaluation, set_threads
from lenvm_rl.files import read_json

logger = logging.getLogger(__name__)

# While all that can be run is being run by other processes, look again after so many seconds.
PAUSE = 5.0


@dataclass
class CompareArguments:
    """What to run, and where records are kept."""

    run_dirs: list[str] = HfArg(
        default_factory=list, help="Folders of recipe runs on the sandbox. Settings are chosen on the first one."
    )
    cells: list[str] = HfArg(
        default_factory=lambda: [cell.name for cell in CELLS[:2]],
        help="Cells, as 'COMPLETIONS x GROUP': " + ", ".join(cell.name for cell in CELLS) + ".",
    )
    arms: list[str] = HfArg(
        default_factory=list, help="Names of arms, in every cell that they serve. Default: those of each cell."
    )
    seeds: int = HfArg(default=5, help="Seeds that are reported.")
    report: str | None = HfArg(default=None, help="Records of an earlier comparison, to be reported anew.")
    output_dir: str = HfArg(default="outputs/compare", help="Where records, tables, figures and the page go.")

    def __post_init__(self) -> None:
        known = [cell.name for cell in CELLS]
        if set(self.cells) - set(known):
            raise ValueError(f"cells must be among {', '.join(known)}, got {', '.join(self.cells)}.")
        if set(self.arms) - set(BY_NAME):
            raise ValueError(f"arms must be among {', '.join(BY_NAME)}, got {', '.join(self.arms)}.")
        if (self.report is None) != bool(self.run_dirs):
            raise ValueError("Give run_dirs to run, or report to show what was run before.")


class Worlds:
    """The world of each seed: settings are chosen on the first folder, and reported seeds take turns."""

    def __init__(self, args: CompareArguments):
        self.worlds = [World(folder) for folder in args.run_dirs]

    def of(self, seed: int) -> World:
        """The world that runs of a seed start from."""
        return self.worlds[0 if seed in CHOICE_SEEDS else seed % len(self.worlds)]


def run_open(args: CompareArguments, records: Records, worlds: Worlds) -> None:
    """Run what has no record, sharing the work with other processes."""
    cells = [cell for cell in CELLS if cell.name in args.cells]
    # Controls need models that not every folder has.
    there = {arm.name for arm in ARMS if all(Path(folder, arm.values).exists() for folder in args.run_dirs)}
    for run, record in recorded_runs(records.collected()).items():
        if record["policy"] != worlds.of(run.seed).fingerprint:
            raise ValueError(
                f"{run.name} in {args.output_dir} is of another policy than that of run_dirs for seed {run.seed}: give "
                "another --output_dir."
            )
    while True:
        found = open_runs(cells, records.judged(), range(args.seeds), args.arms or None)
        waiting = [run for run in found if run.arm in there]
        if not waiting:
            for name in dict.fromkeys(run.arm for run in found):
                model = BY_NAME[name].values
                logger.warning("%s is left out: a folder of run_dirs has no model %r to value with", name, model)
            return
        if not any(run_one(run, records, worlds.of(run.seed)) for run in waiting):
            time.sleep(PAUSE)


def run_one(run: Run, records: Records, world: World) -> bool:
    """Run one, unless another process has it or has had it: then `False`."""
    with records.claim(run) as mine:
        if not mine:
            return False
        began = time.monotonic()
        curve = train_run(run, world)
        record = records.keep(run, curve, world, time.monotonic() - began)
    logger.info("%s: %.0f s, %s", run.name, record["seconds"], judge_curve(curve, world.start))
    return True


def main(args: CompareArguments) -> dict[str, Any]:
    """Run what is missing, report all there is."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=True)
    if args.report is None:
        records, worlds = Records(args.output_dir), Worlds(args)
        run_open(args, records, worlds)
        decoding = [arm for world in worlds.worlds for arm in decoding_arms(world)]
        collected = records.collected() | {"decoding": decoding, "samples": sample_answers(worlds.worlds[0])}
    else:
        collected = read_json(args.report)
    report = make_report(collected)
    print_cells(report, Console(width=230, highlight=False))
    write_comparison(report, collected, args.output_dir)
    return report


if __name__ == "__main__":
    run_evaluation(CompareArguments, main, "eval.compare", __doc__)
