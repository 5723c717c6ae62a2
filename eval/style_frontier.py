"""The style frontier of the sandbox: the best accuracy at each mean length over mixtures of the policy's own styles.

Each difficulty offers a few points: tokens without waste, and accuracy of the fitted policy when it writes in that
style. Every mixture of them per difficulty is a point of the plot; the frontier is the upper edge of all of these
mixtures. It says what the *fitted* policy could reach by choosing well and wasting nothing. Training may move the
accuracies themselves, so a trained policy can lie above it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from eval.graded import sandbox_prompts
from eval.tradeoff.sampler import Sampler
from lenvm_rl.sandbox import clean_length, read_completion
from lenvm_rl.sandbox.styles import STYLES
from lenvm_rl.sandbox.task import ANSWER, is_correct

logger = logging.getLogger(__name__)

# Prompts that the frontier is measured on, and completions of each.
FRONTIER_PROMPTS, FRONTIER_SAMPLES = 240, 32
# Answers at once of each: few of the policy's own completions are, and a floor must not rest on a few answers.
DIRECT_SAMPLES = 64
# A style counts as good enough for a difficulty if its accuracy is within this of the difficulty's best style.
FLOOR_TOLERANCE = 0.01

Point = tuple[float, float]
DIRECT = STYLES[0]


def upper_hull(points: Sequence[Point]) -> list[Point]:
    """Corners of the upper concave hull, from the cheapest point to the most accurate one, both coordinates rising.

    Example: (0, 0), (1, .5), (2, .6), (3, 1) give (0, 0), (1, .5), (3, 1): the third lies below the line around it.
    """
    hull: list[Point] = []
    for tokens, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if hull and accuracy <= hull[-1][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2], hull[-1]
            if (y1 - y0) * (tokens - x1) > (accuracy - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((tokens, accuracy))
    return hull


@dataclass(frozen=True)
class StyleFrontier:
    """The frontier over a set of difficulties that are equally frequent.

    Args:
        tokens (`numpy.ndarray`): mean tokens at the corners, ascending; end-of-sequence not counted.
        accuracies (`numpy.ndarray`): accuracy at the corners, ascending.
        floors (`dict`): per difficulty, the tokens of the cheapest style that is good enough for it.
        points (`dict`): per difficulty and style, (tokens, accuracy).
    """

    tokens: np.ndarray
    accuracies: np.ndarray
    floors: dict[int, float]
    points: dict[int, dict[str, Point]]

    @classmethod
    def from_points(cls, points: Mapping[int, Mapping[str, Point]]) -> StyleFrontier:
        """Enumerate the frontier from (tokens, accuracy) of each style at each difficulty.

        An empty completion, (0, 0), is always on offer. The steps between the corners of each difficulty's hull are
        taken in the order of what they gain per token: the upper edge of a sum of concave functions.
        """
        hulls = {difficulty: upper_hull([(0.0, 0.0), *styles.values()]) for difficulty, styles in points.items()}
        steps = [
            (after[0] - before[0], after[1] - before[1])
            for hull in hulls.values()
            for before, after in zip(hull, hull[1:], strict=False)
        ]
        steps.sort(key=lambda step: -step[1] / step[0])
        corners = np.cumsum([(0.0, 0.0), *steps], axis=0) / len(points)
        floors = {}
        for difficulty, styles in points.items():
            best = max(accuracy for _, accuracy in styles.values())
            floors[difficulty] = min(
                tokens for tokens, accuracy in styles.values() if accuracy >= best - FLOOR_TOLERANCE
            )
        return cls(corners[:, 0], corners[:, 1], floors, {d: dict(styles) for d, styles in points.items()})

    def accuracy(self, tokens: float | np.ndarray) -> float | np.ndarray:
        """Best accuracy at a mean number of tokens (>= 0); flat beyond the last corner."""
        return np.interp(tokens, self.tokens, self.accuracies)


def measure_points(
    difficulties: Sequence[int], styles: Sequence[str], clean_tokens: Sequence[int], correct: Sequence[bool]
) -> dict[int, dict[str, Point]]:
    """Tokens and mean accuracy of each style at each difficulty, from completions without waste.

    Args: of each completion, its difficulty and style, the style's tokens at that difficulty (end-of-sequence not
        counted), and whether it is correct.
    """
    outcomes: dict[tuple[int, str], list[bool]] = defaultdict(list)
    tokens: dict[tuple[int, str], int] = {}
    for difficulty, style, length, right in zip(difficulties, styles, clean_tokens, correct, strict=True):
        outcomes[difficulty, style].append(bool(right))
        tokens[difficulty, style] = length
    points: dict[int, dict[str, Point]] = defaultdict(dict)
    for (difficulty, style), results in sorted(outcomes.items()):
        points[difficulty][style] = (float(tokens[difficulty, style]), float(np.mean(results)))
    return dict(points)


def fit_frontier(sampler: Sampler, policy: PreTrainedModel) -> StyleFrontier | None:
    """The style frontier of the sandbox's base policy, under the same candidate rule as every arm.

    From completions without waste on *validation* prompts: picking the best style on the evaluation prompts
    themselves would flatter it. Answers at once are sampled behind the token that begins an answer. `None` if the
    policy writes no readable style at some difficulty (a smoke run's).
    """
    data = sandbox_prompts(FRONTIER_PROMPTS, "validation")
    sampler = replace(sampler, prompts=data.prompts, columns=data.columns, num_samples=FRONTIER_SAMPLES)
    levels, tokens_of = data.difficulties, sampler.tokenizer.convert_ids_to_tokens
    found = sampler.sample("frontier", "base", policy)
    rows, readable = [], set()
    for ids, right, prompt in zip(found.completions, found.correct, found.prompt, strict=True):
        reading = read_completion(tokens_of(ids))
        if reading.style != "mixed" and reading.waste_tokens == 0:
            readable.add(levels[prompt])
            rows += [(levels[prompt], reading.style, right)] if reading.style != DIRECT else []
    missing = set(levels) - readable
    if missing:
        missed = sorted(missing)
        logger.warning("no style frontier: the policy writes no style without waste at difficulty %s", missed)
        return None
    begun = [f"{prompt} {ANSWER}" for prompt in data.prompts]
    sampler = replace(sampler, prompts=begun, num_samples=DIRECT_SAMPLES, max_new_tokens=2)
    found = sampler.sample("frontier, answers at once", "base", policy)
    for ids, prompt in zip(found.completions, found.prompt, strict=True):
        right = is_correct([ANSWER, *tokens_of(ids)], data.columns["answer"][prompt])
        rows.append((levels[prompt], DIRECT, right))
    difficulties, styles, correct = zip(*rows, strict=True)
    tokens = [clean_length(level, style) for level, style, _ in rows]
    return StyleFrontier.from_points(measure_points(difficulties, styles, tokens, correct))
