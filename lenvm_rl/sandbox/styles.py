"""Ways of writing a completion: what the teacher shows the policy, and how a completion is read back.

A completion is a chain of steps in one of two styles, then waste, then the answer:

- *direct*: no steps. The risky short path: all operations at once.
- *careful*: every operation copied and carried out, ``c +5 v a *2 v ...``.
- *passes*: the written values once more, ``redo c v a v ...``, and some ``wait``: whole passes of checking what is
  right already, as a reasoning model's second thoughts. Few detours of the same kind lie inside of the chain.

Chains are correct derivations whatever their style; none is chosen by difficulty. What is worth its tokens is for the
policy to find out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lenvm_rl.sandbox.task import ANSWER, DIFFICULTIES, EOS, LABELS, OPERATIONS, REDO, VALUES, WAIT, Problem

STYLES = ("direct", "careful")
STYLE_WEIGHTS = (0.04, 0.96)
# Chance of a detour after each step: none, some, or more, drawn once per completion.
DETOUR_LEVELS = (0.0, 0.05, 0.1)
DETOUR_WEIGHTS = (0.4, 0.4, 0.2)
MAX_WAITS = 3


def check_passes(passes: float, name: str = "passes") -> None:
    """Raises a `ValueError`, by the name of the setting, unless a mean number of passes can be drawn."""
    if passes < 0 or passes % 0.5:
        raise ValueError(f"{name}={passes} is no multiple of 0.5, from 0 on.")


@dataclass(frozen=True)
class Overthinking:
    """How much the teacher wastes.

    Args:
        passes (`float`): mean number of passes behind a chain, a multiple of 0.5. Up to twice as many are equally
            likely, so a policy that has learned it counts them, and how many are to come can be told from those that
            are there.
        repeats (`int`): how often a pass writes each value: tokens without a decision.
    """

    passes: float = 1.5
    repeats: int = 1

    def __post_init__(self) -> None:
        check_passes(self.passes)

    @property
    def most_passes(self) -> int:
        """Passes that a completion has at most."""
        return round(2 * self.passes)

    @property
    def longest_completion(self) -> int:
        """Tokens of the longest completion without detours, end-of-sequence included."""
        steps = max(DIFFICULTIES)
        return clean_length(steps, "careful") + 1 + self.most_passes * (1 + (1 + self.repeats) * steps + MAX_WAITS)


def clean_steps(problem: Problem, style: str) -> list[list[str]]:
    """The steps of a style without waste, a list of tokens each; the answer not included."""
    if style == "direct":
        return []
    if style == "careful":
        running = (str(value) for value in problem.running)
        return [list(step) for step in zip(problem.labels, problem.operations, running, strict=True)]
    raise ValueError(f"style must be one of {STYLES}, got {style!r}.")


def clean_length(difficulty: int, style: str) -> int:
    """Tokens of a completion of a style without waste, end-of-sequence not counted."""
    return {"direct": 0, "careful": 3 * difficulty}[style] + 2


def draw_completion(rng: random.Random, problem: Problem, overthinking: Overthinking) -> list[str]:
    """A teacher's completion: a random style with a random amount of waste, end-of-sequence included."""
    style = rng.choices(STYLES, STYLE_WEIGHTS)[0]
    steps = clean_steps(problem, style)
    detour = rng.choices(DETOUR_LEVELS, DETOUR_WEIGHTS)[0]
    tokens: list[str] = []
    for step in steps:
        tokens += step
        while rng.random() < detour:
            tokens += waits(rng, 1) if rng.random() < 0.5 else [REDO, *step]
    for _ in range(rng.randint(0, overthinking.most_passes) if steps else 0):
        tokens += [REDO, *(token for step in steps for token in [step[0], *[step[-1]] * overthinking.repeats])]
        tokens += waits(rng, 0)
    return [*tokens, ANSWER, problem.answer, EOS]


def waits(rng: random.Random, least: int) -> list[str]:
    """A run of at least `least` and at most [`MAX_WAITS`] tokens that say nothing."""
    return [WAIT] * rng.randint(least, MAX_WAITS)


@dataclass(frozen=True)
class Reading:
    """What a completion turned out to be.

    Args:
        style (`str`): `"direct"`, `"careful"`, or `"mixed"`, where some step has another form.
        wasted (tuple of `bool`): of each token before the answer, whether it is waste: it waits, or repeats a step.
    """

    style: str
    wasted: tuple[bool, ...]

    @property
    def waste_tokens(self) -> int:
        """Tokens of waste."""
        return sum(self.wasted)


def read_completion(tokens: Sequence[str]) -> Reading:
    """Tell a completion's style and which of its tokens are waste, from its tokens alone.

    A step is written again where its label was written before, and after ``redo``.
    """
    kinds: set[str] = set()
    seen: set[str] = set()
    wasted: list[bool] = []
    redoing = False
    while len(wasted) < len(tokens) and tokens[len(wasted)] not in (ANSWER, EOS):
        token, rest = tokens[len(wasted)], tokens[len(wasted) + 1 :]
        if token in (WAIT, REDO):
            wasted.append(True)
            redoing = token == REDO
            continue
        if token in LABELS and len(rest) > 1 and rest[0] in OPERATIONS and rest[1] in VALUES:
            kind, size = "careful", 3
        else:
            kind, size = "mixed", 2 if token in LABELS and rest and rest[0] in VALUES else 1
        again = redoing or token in seen or (size == 1 and bool(wasted) and wasted[-1])
        if not again:
            kinds.add(kind)
        seen.add(token)
        wasted += [again] * size
        redoing = False
    style = "direct" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"
    return Reading(style, tuple(wasted))
