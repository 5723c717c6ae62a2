"""Ways of writing a completion: what the teacher shows the policy, and how a completion is read back.

- *direct*: ``A v``. The risky short path: all operations at once.
- *plain*: one written value for every two operations, ``a v f v ... A v``.
- *careful*: every operation copied and carried out, ``c +5 v a *2 v ... A v``.
- *detours*, on any path with steps: ``wait`` tokens, and steps written again behind ``redo``. They buy nothing.

All are correct derivations; none is chosen by difficulty. What is worth its tokens is for the policy to find out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lenvm_rl.sandbox.task import ANSWER, EOS, LABELS, OPERATIONS, REDO, VALUES, WAIT, Problem

STYLES = ("direct", "plain", "careful")
STYLE_WEIGHTS = (0.15, 0.35, 0.5)
# Chance of a detour after each step: none, some, or many, drawn once per completion.
DETOUR_LEVELS = (0.0, 0.2, 0.5)
DETOUR_WEIGHTS = (0.4, 0.4, 0.2)
MAX_WAITS = 3


def clean_steps(problem: Problem, style: str) -> list[list[str]]:
    """The steps of a style without detours, a list of tokens each; the answer not included."""
    running = [str(value) for value in problem.running]
    if style == "direct":
        return []
    if style == "careful":
        return [list(step) for step in zip(problem.labels, problem.operations, running, strict=True)]
    if style == "plain":
        ends = [min(start + 1, problem.difficulty - 1) for start in range(0, problem.difficulty, 2)]
        return [[problem.labels[end], running[end]] for end in ends]
    raise ValueError(f"style must be one of {STYLES}, got {style!r}.")


def clean_length(difficulty: int, style: str) -> int:
    """Tokens of a completion of a style without detours, end-of-sequence not counted."""
    steps = {"direct": 0, "plain": 2 * ((difficulty + 1) // 2), "careful": 3 * difficulty}
    return steps[style] + 2


def draw_completion(rng: random.Random, problem: Problem) -> list[str]:
    """A teacher's completion: a random style with a random amount of detours, end-of-sequence included."""
    style = rng.choices(STYLES, STYLE_WEIGHTS)[0]
    detour = rng.choices(DETOUR_LEVELS, DETOUR_WEIGHTS)[0]
    tokens: list[str] = []
    for step in clean_steps(problem, style):
        tokens += step
        while rng.random() < detour:
            tokens += [WAIT] * rng.randint(1, MAX_WAITS) if rng.random() < 0.5 else [REDO, *step]
    return [*tokens, ANSWER, problem.answer, EOS]


@dataclass(frozen=True)
class Reading:
    """What a completion turned out to be.

    Args:
        style (`str`): `"direct"`, `"plain"`, `"careful"`, or `"mixed"` (both kinds of step, or neither form).
        detour_tokens (`int`): tokens spent on waiting and on steps written again.
    """

    style: str
    detour_tokens: int


def read_completion(tokens: Sequence[str]) -> Reading:
    """Tell a completion's style and how many of its tokens are detours, from its tokens alone."""
    kinds: set[str] = set()
    detours, position, redoing = 0, 0, False
    while position < len(tokens) and tokens[position] not in (ANSWER, EOS):
        token, rest = tokens[position], tokens[position + 1 :]
        if token in (WAIT, REDO):
            detours, position, redoing = detours + 1, position + 1, token == REDO
            continue
        if token in LABELS and len(rest) > 1 and rest[0] in OPERATIONS and rest[1] in VALUES:
            kind, size = "careful", 3
        elif token in LABELS and rest and rest[0] in VALUES:
            kind, size = "plain", 2
        else:
            kind, size = "mixed", 1
        kinds.add(kind)
        if redoing:
            detours += size
        position, redoing = position + size, False
    style = "direct" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"
    return Reading(style, detours)
