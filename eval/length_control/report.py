"""Numbers of a length-control comparison: scores of each cell, and of each arm and mode over all targets.

With the length ``L`` of an output, end-of-sequence not counted, and the target ``T``, the length deviation is
``LD = (L - T) / T``, and LIFEBench's length score (arXiv 2505.16234) is 100 where the constraint holds, else

    LS = 100 * exp(5 * LD) for LD < 0,    LS = 100 * exp(-2 * LD) for LD > 0.

Too short costs more than too long. "At most" holds for ``LD <= 0``, "at least" for ``LD >= 0``, "equal to" for
``LD = 0``. Every output counts, also an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from numpy.typing import ArrayLike

from eval.length_control.sampler import Completion
from eval.report import Column, Entry, as_entry, draw_intervals, legend_below, save_figure
from eval.statistics import mean_interval, statistic_interval
from lenvm_rl.decoding.guidance import AT_LEAST, AT_MOST, EQUAL_TO

SCORED_MODES = (EQUAL_TO, AT_MOST, AT_LEAST)
# Decay of the score in units of the target: below it, and above it.
TOO_SHORT, TOO_LONG = 5.0, 2.0
ALL = "all"
COLUMNS = [
    Column("target", "target"),
    Column("arm", "arm", left=True),
    Column("tokens", "tokens"),
    Column("score", "length_score"),
    Column("deviation %", "deviation_percent"),
    Column("exact %", "exact", 0, scale=100),
    Column("ended %", "natural", 0, scale=100, ends=False),
    Column("cut %", "unfinished", 0, scale=100),
    Column("empty", "empty"),
    Column("forced", "forced_steps", 2),
    Column("perplexity", "perplexity"),
    Column("NLL", "nll", 2, ends=False),
    Column("end NLL", "end_nll", ends=False),
    Column("repeated %", "repetition", scale=100, ends=False),
]
ACCURACY = Column("accuracy", "accuracy", 2)
COLORS = {
    "base": "#000000",
    "prompt": "#ff7f0e",
    "guided": "#1f77b4",
    "guided+prompt": "#2ca02c",
    "enforced": "#9467bd",
    "enforced+prompt": "#8c564b",
}


def length_deviation(lengths: ArrayLike, target: ArrayLike) -> np.ndarray:
    """Relative length deviation ``LD = (L - T) / T``.

    Args:
        lengths (array of shape `(N,)`): tokens of each output, end-of-sequence not counted.
        target (`int` or array of shape `(N,)`): tokens asked for.

    Returns:
        Array of shape `(N,)`, at least -1.
    """
    length, wanted = np.asarray(lengths, dtype=float), np.asarray(target, dtype=float)
    if (wanted < 1).any() or (length < 0).any():
        raise ValueError("target must be at least 1 token and lengths not negative.")
    return (length - wanted) / wanted


def length_score(lengths: ArrayLike, target: ArrayLike, mode: str) -> np.ndarray:
    """Length score of each output, in [0, 100].

    Returns:
        Array of shape `(N,)`.
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
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def summarise_cell(
    completions: Sequence[Completion],
    targets: Sequence[int],
    mode: str,
    correct: Sequence[bool] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of a cell. Every completion counts, also an empty one and one that was cut.

    Args:
        completions (sequence of [`Completion`]): all of them.
        targets (sequence of `int`): tokens asked of each.
        mode (`str`): `"equal_to"`, `"at_most"` or `"at_least"`.
        correct (sequence of `bool`, *optional*): whether each answer is right, where that can be told.
        seed (`int`): of the bootstrap.

    Returns:
        `dict`: intervals (95 %, bootstrapped over prompts) as `{"estimate", "low", "high"}`, shares and counts.
        `exact` is the share that has exactly the target. `perplexity` is ``exp`` of the mean over all tokens of all
        texts; `nll` the mean over texts of the mean over a text's tokens, in nats; neither includes the end, whose own
        cost is `end_nll`. A text without tokens has no `nll`, an unfinished one no `end_nll`: `empty` and `unfinished`
        say how many those are.
    """
    prompt = np.array([each.prompt for each in completions])
    lengths = np.array([each.length for each in completions])
    finished = np.array([each.finished for each in completions])

    def interval(values: Any, weights: Any = None) -> Entry:
        return as_entry(mean_interval(np.asarray(values, float), prompt, weights, seed=seed))

    row: dict[str, Any] = {
        "completions": len(completions),
        "empty": int((lengths == 0).sum()),
        "unfinished": float(1 - finished.mean()),
        "tokens": interval(lengths),
        "length_score": interval(length_score(lengths, targets, mode)),
        "deviation_percent": interval(100 * np.abs(length_deviation(lengths, targets))),
        "exact": float((lengths == np.asarray(targets)).mean()),
        "natural": interval([each.natural for each in completions]),
        "forced_steps": float(np.mean([each.forced for each in completions])),
        "repetition": interval([repetition_rate(each.text_ids) for each in completions]),
        "perplexity": None,
        "nll": None,
        "end_nll": None,
        "accuracy": None if correct is None else interval(correct),
    }
    mean_nll = np.array([float(np.mean(each.nll[: each.length])) if each.length else 0.0 for each in completions])
    if lengths.any():
        row["nll"] = interval(mean_nll, (lengths > 0).astype(float))
        row["perplexity"] = as_entry(statistic_interval(mean_nll, np.exp, prompt, lengths.astype(float), seed=seed))
    if finished.any():
        row["end_nll"] = interval([each.nll[-1] if each.finished else 0.0 for each in completions], finished * 1.0)
    return row


def plot_length_control(
    rows: Sequence[dict[str, Any]], cells: Mapping[tuple[str, str, int], Sequence[Completion]], path: Path
) -> None:
    """Length score of each arm against the target, a panel per mode, above the lengths themselves.

    Completions that were cut are hollow triangles: they would have been longer.
    """
    modes, arms = (list(dict.fromkeys(row[name] for row in rows)) for name in ("mode", "arm"))
    targets = sorted({target for _, _, target in cells})
    figure = Figure(figsize=(4.6 * len(modes) + 0.6, 7.4), layout="constrained")
    axes = figure.subplots(2, len(modes), squeeze=False, sharey="row")
    generator = np.random.default_rng(0)
    for (above, below), mode in zip(axes.T, modes, strict=True):
        for number, arm in enumerate(arms):
            # Arms stand side by side at each target.
            width = 0.8 / len(arms)
            places = np.arange(len(targets)) + (number - (len(arms) - 1) / 2) * width
            own = [row for row in rows if (row["arm"], row["mode"], row["language"]) == (arm, mode, ALL)]
            scores = {row["target"]: row["length_score"] for row in own}
            look = {"color": COLORS[arm], "marker": "o", "markersize": 5, "label": arm}
            draw_intervals(above, places, [scores[target] for target in targets], **look)
            for place, target in zip(places, targets, strict=True):
                cell = cells[arm, mode, target]
                _draw_lengths(below, place + generator.uniform(-0.3, 0.3, len(cell)) * width, cell, COLORS[arm])
        for place, target in enumerate(targets):
            below.plot([place - 0.45, place + 0.45], [target, target], color="#d62728", linewidth=1)
        above.set(title=mode.replace("_", " "), ylim=(-2, 104))
        below.set_yscale("symlog", base=2, linthresh=1)
        below.yaxis.set(major_formatter=ScalarFormatter(), minor_locator=NullLocator())
        below.set_xlabel("target, tokens")
        for axis in (above, below):
            axis.set_xticks(range(len(targets)), [str(target) for target in targets])
            axis.set_xlim(-0.6, len(targets) - 0.4)
            axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("length score, 95 % intervals over prompts")
    axes[1, 0].set_ylabel("tokens of each completion (red: target)")
    if any(not one.finished for cell in cells.values() for one in cell):
        look = {"marker": "^", "facecolors": "none", "edgecolors": "#555555"}
        axes[0, 0].scatter([], [], **look, label="cut at the cap: would have been longer")
    legend_below(figure, axes[0, 0], ncols=len(arms) + 1)
    save_figure(path, figure)


def _draw_lengths(axis: Axes, across: np.ndarray, cell: Sequence[Completion], color: str) -> None:
    lengths = np.array([one.length for one in cell], dtype=float)
    ended = np.array([one.finished for one in cell], dtype=bool)
    axis.scatter(across[ended], lengths[ended], s=6, alpha=0.5, linewidths=0, color=color)
    look = {"marker": "^", "facecolors": "none", "edgecolors": color, "lw": 0.6}
    axis.scatter(across[~ended], lengths[~ended], s=12, alpha=0.7, **look)
