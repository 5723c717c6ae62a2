"""How well lengths meet what was asked for, as LIFEBench scores it (arXiv 2505.16234), and two cheap signs of bad text.

With the length ``L`` of an output, end-of-sequence not counted, and the target ``T``, the length deviation is
``LD = (L - T) / T``, and the length score is 100 where the constraint holds, else

    LS = 100 * exp(5 * LD) for LD < 0,    LS = 100 * exp(-2 * LD) for LD > 0.

Too short costs more than too long. "At most" holds for ``LD <= 0``, "at least" for ``LD >= 0``, "equal to" for
``LD = 0``. Every output counts, also an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lenvm_rl.decoding.guidance import AT_LEAST, AT_MOST, EQUAL_TO

SCORED_MODES = (EQUAL_TO, AT_MOST, AT_LEAST)
# Decay of the score in units of the target: below it, and above it.
TOO_SHORT, TOO_LONG = 5.0, 2.0


def length_deviation(lengths: ArrayLike, target: ArrayLike) -> np.ndarray:
    """Relative length deviation ``LD = (L - T) / T``.

    Args:
        lengths (array of shape `(N,)`): tokens of each output, end-of-sequence not counted.
        target (`int` or array of shape `(N,)`): tokens asked for.

    Returns:
        Array of shape `(N,)`, at least -1.

    Raises:
        ValueError: if a target is below 1 or a length below 0.
    """
    length, wanted = np.asarray(lengths, dtype=float), np.asarray(target, dtype=float)
    if (wanted < 1).any() or (length < 0).any():
        raise ValueError("targets must be at least 1 token and lengths not negative.")
    return (length - wanted) / wanted


def length_score(lengths: ArrayLike, target: ArrayLike, mode: str) -> np.ndarray:
    """Length score of each output, in [0, 100].

    Args:
        lengths, target: as in [`length_deviation`].
        mode (`str`): `"equal_to"`, `"at_most"` or `"at_least"`.

    Returns:
        Array of shape `(N,)`.

    Raises:
        ValueError: on another mode, or as [`length_deviation`].
    """
    if mode not in SCORED_MODES:
        raise ValueError(f"mode must be one of {', '.join(SCORED_MODES)}, got {mode!r}.")
    deviation = length_deviation(lengths, target)
    short = np.zeros_like(deviation) if mode == AT_MOST else np.minimum(deviation, 0.0)
    long = np.zeros_like(deviation) if mode == AT_LEAST else np.maximum(deviation, 0.0)
    return 100.0 * np.exp(TOO_SHORT * short - TOO_LONG * long)


def repetition_rate(ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that stood in it before: ``1 - distinct / all`` (seq-rep-n, arXiv 1908.04319).

    A text of fewer than `n` tokens repeats nothing: 0.
    """
    grams = _ngrams(ids, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(texts: Sequence[Sequence[int]], n: int = 2) -> float | None:
    """Distinct n-grams of all texts together over all their n-grams (arXiv 1510.03055); `None` if there is none.

    It falls with the amount of text, so it compares sets of about the same size only.
    """
    grams = [gram for ids in texts for gram in _ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else None


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
