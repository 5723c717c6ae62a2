"""What `eval.compare` runs, in which order, and how settings are chosen: pure functions of the records of runs.

A cell is a budget: completions per step, how many of them share a prompt, and steps. In each cell an arm is first run
at three learning rates with its middle strength, then at its two other strengths with the best rate, all on seeds that
are not reported; then on the reported seeds with the best of the five settings. Controls take over the settings of the
arm that they are a control of.

Best, fixed before any run, is the first by this order: fewest unsafe runs; fewest whose accuracy at the end is not
kept; fewest rollouts until most of the waste is gone, the mean over seeds; least waste at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.compare.arms import ARMS, BY_NAME, LENVM, LENVM_95, TASK_ONLY, TrainingArm
from eval.compare.measures import Judged

# Seeds that settings are chosen on; a cell takes so many of them as it says.
CHOICE_SEEDS = (100, 101)


@dataclass(frozen=True)
class TrainingCell:
    """A budget.

    Args:
        completions (`int`): of a step.
        group_size (`int`): completions of a prompt; 1 is PPO with a learned critic, more are GRPO.
        steps (`int`): optimizer steps.
        learning_rates (tuple of `float`): what every arm is tried at, the first guess in the middle.
        choices (`int`): seeds that settings are chosen on: small batches differ more from seed to seed.
        every_arm (`bool`): whether all arms run here, or those of [`few_arms`].
    """

    completions: int
    group_size: int
    steps: int
    learning_rates: tuple[float, ...]
    choices: int
    every_arm: bool = False

    @property
    def name(self) -> str:
        """Completions by group size."""
        return f"{self.completions} x {self.group_size}"

    @property
    def algorithm(self) -> str:
        """What trains."""
        return "PPO" if self.group_size == 1 else "GRPO"


# Those that matter come first, then the others.
LOW_RATES, HIGH_RATES = (1e-4, 2e-4, 4e-4), (2e-4, 4e-4, 8e-4)
CELLS: Sequence[TrainingCell] = (
    TrainingCell(16, 2, 120, LOW_RATES, choices=2, every_arm=True),
    TrainingCell(256, 8, 20, HIGH_RATES, choices=1, every_arm=True),
    TrainingCell(16, 1, 120, LOW_RATES, choices=2, every_arm=True),
    TrainingCell(16, 8, 120, LOW_RATES, choices=2),
    TrainingCell(256, 2, 20, HIGH_RATES, choices=1),
    TrainingCell(256, 1, 20, HIGH_RATES, choices=1),
    TrainingCell(64, 2, 50, LOW_RATES, choices=2),
    TrainingCell(64, 8, 50, LOW_RATES, choices=2),
    TrainingCell(64, 1, 50, LOW_RATES, choices=2),
)


@dataclass(frozen=True)
class Run:
    """One training run: everything that its record depends on, beside the models of its seed."""

    cell: TrainingCell
    arm: str
    learning_rate: float
    strength: float | None
    seed: int

    @property
    def name(self) -> str:
        """A name for files. All that a run is told by is in it: one with a record of this name is never run again."""
        cell = f"{self.cell.completions}x{self.cell.group_size}x{self.cell.steps}"
        strength = "" if self.strength is None else f"_{self.strength:g}"
        arm = "".join(letter if letter.isalnum() else "-" for letter in self.arm)
        return f"{cell}_{arm}_{self.learning_rate:g}{strength}_{self.seed}"


# A learning rate and a strength.
Settings = tuple[float, float | None]


def trials(cell: TrainingCell, arm: TrainingArm, settings: Settings) -> list[Run]:
    """The runs that settings are judged by."""
    return [Run(cell, arm.name, *settings, seed) for seed in CHOICE_SEEDS[: cell.choices]]


def settings_order(found: Sequence[Judged]) -> tuple:
    """The order of settings by their trials, the best first."""
    until = [math.inf if one.until_most is None else one.until_most for one in found]
    return (
        sum(one.unsafe for one in found),
        sum(not one.kept for one in found),
        sum(until) / len(until),
        sum(one.end_excess for one in found) / len(found),
    )


def best_settings(
    cell: TrainingCell, arm: TrainingArm, tried: Sequence[Settings], judged: Mapping[Run, Judged]
) -> Settings | None:
    """The best of some settings, `None` until all of their trials are judged; the first among equals."""
    runs = {settings: trials(cell, arm, settings) for settings in tried}
    if not all(run in judged for each in runs.values() for run in each):
        return None
    return min(tried, key=lambda settings: settings_order([judged[run] for run in runs[settings]]))


def tried_settings(cell: TrainingCell, arm: TrainingArm, judged: Mapping[Run, Judged]) -> list[Settings]:
    """Settings that an arm is tried at, as far as they can be known: rates first, strengths when rates are judged."""
    strengths = arm.tried(cell.group_size)
    middle = strengths[1] if strengths else None
    rates = [(rate, middle) for rate in cell.learning_rates]
    best = best_settings(cell, arm, rates, judged)
    others = [strength for strength in strengths if strength != middle]
    return rates if best is None else rates + [(best[0], strength) for strength in others]


def chosen_settings(cell: TrainingCell, arm: TrainingArm, judged: Mapping[Run, Judged]) -> Settings | None:
    """The settings that are reported of an arm, `None` until all of its trials are judged."""
    if arm.settings_of is not None:
        return chosen_settings(cell, BY_NAME[arm.settings_of], judged)
    tried = tried_settings(cell, arm, judged)
    whole = len(cell.learning_rates) + max(0, len(arm.tried(cell.group_size)) - 1)
    return best_settings(cell, arm, tried, judged) if len(tried) == whole else None


def reported_runs(
    cell: TrainingCell, arm: TrainingArm, judged: Mapping[Run, Judged], seeds: Sequence[int]
) -> list[Run]:
    """The runs that are reported of an arm, none until its settings are chosen."""
    chosen = chosen_settings(cell, arm, judged)
    return [] if chosen is None else [Run(cell, arm.name, *chosen, seed) for seed in seeds]


def few_arms(cells: Sequence[TrainingCell], judged: Mapping[Run, Judged], seeds: Sequence[int]) -> list[str]:
    """The arms of the cells that do not run all: task only, both LenVMs, and the two best penalties of the first that
    does, once they are known; where none of `cells` does, of the first of [`CELLS`].
    """
    always = [TASK_ONLY, LENVM, LENVM_95]
    first = next(cell for cell in (*cells, *CELLS) if cell.every_arm)
    scores: dict[str, float] = {}
    for arm in (arm for arm in ARMS if arm.kind == "penalty" and arm.serves(first.group_size)):
        runs = reported_runs(first, arm, judged, seeds)
        if not runs or not all(run in judged for run in runs):
            return always
        until = sorted(math.inf if judged[run].until_most is None else judged[run].until_most for run in runs)
        scores[arm.name] = until[len(until) // 2]
    return [*always, *sorted(scores, key=lambda name: scores[name])[:2]]


def arms_of(cell: TrainingCell, few: Sequence[str], named: Sequence[str] | None = None) -> list[TrainingArm]:
    """The arms that run in a cell, in order: those `named`, else all or few."""
    serving = [arm for arm in ARMS if arm.serves(cell.group_size)]
    if named is not None:
        return [arm for arm in serving if arm.name in named]
    # As the only critic, the model is of a cell of single completions.
    usual = [arm for arm in serving if arm.kind != "critic"]
    return [arm for arm in usual if cell.every_arm or arm.ppo_only or arm.name in few]


def open_runs(
    cells: Sequence[TrainingCell], judged: Mapping[Run, Judged], seeds: Sequence[int], arms: Sequence[str] | None = None
) -> Iterator[Run]:
    """Runs that can start now and have no record, in the order in which they are wanted.

    With `arms`, of these alone, in every cell; a control brings the trials of the arm whose settings it takes.
    """
    few = few_arms(cells, judged, seeds)
    for cell in cells:
        wanted: list[Run] = []
        for arm in arms_of(cell, few, arms):
            original = BY_NAME[arm.settings_of or arm.name]
            for settings in tried_settings(cell, original, judged):
                wanted += trials(cell, original, settings)
            wanted += reported_runs(cell, arm, judged, seeds)
        yield from (run for run in dict.fromkeys(wanted) if run not in judged)


def as_record(run: Run) -> dict[str, Any]:
    """What a record says of its run."""
    return {
        "completions": run.cell.completions,
        "group_size": run.cell.group_size,
        "steps": run.cell.steps,
        "arm": run.arm,
        "learning_rate": run.learning_rate,
        "strength": run.strength,
        "seed": run.seed,
    }
