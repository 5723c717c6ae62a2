"""How many decode steps a batch's rows spend waiting for its longest, by the order that batches are made in.

    python -m eval.speed batching --rollouts held_out.jsonl --length_value_model outputs/length_value_model

Nothing is sampled: the lengths of a rollout file are replayed, each completion taking the steps that it took, under
batches made from

- `random`: completions in random order; `random prompts`: prompts in random order, a prompt's completions side by side;
- `prompt length`: prompts by their own length, what recipes/sample_rollouts.py does by itself;
- `predicted length`: prompts by the length value model's prediction, what its `--length_value_model` does;
- `realised length`: completions by the length that they turn out to have. Nobody knows it before; it is the best order.

`generate calls' steps` is the sum over batches of the longest completion; `padding steps` the sum over rows of what
they wait. Ratios to a random order are to the mean over shuffles, with 95 % bootstrap intervals over the shuffles; the
other orders are fixed by the data. Padding of the prompts is not counted: a prompt is read in one forward.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from eval.runs import is_sandbox, set_threads
from eval.statistics import Interval, mean_interval, statistic_interval
from lenvm_rl.modeling.loading import load_length_value_model
from lenvm_rl.prediction import boundary_logits, length_aware_batches, lengths_from_logits, padding_steps
from lenvm_rl.rollouts.record import read_rollouts

RANDOM, RANDOM_PROMPTS = "random", "random prompts"
PROMPT, PREDICTED, REALISED = "prompt length", "predicted length", "realised length"


@dataclass
class Settings:
    """What is replayed.

    Args:
        rollouts (`str`): a rollout file, of prompts that the model was not fitted on.
        length_value_model (`str`): folder or hub id.
        base (`str`, *optional*): what a model of form adapter or head was fitted on.
        batch_size (`int`): completions in a batch.
        shuffles (`int`): random orders that are averaged.
        seed (`int`): of the shuffles and the bootstrap.
    """

    rollouts: str
    length_value_model: str
    base: str | None = None
    batch_size: int = 64
    shuffles: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shuffles < 2:
            raise ValueError(f"batch_size must be at least 1 and shuffles 2, got {self.batch_size}, {self.shuffles}.")


@dataclass(frozen=True)
class Cost:
    """What an order costs.

    Args:
        steps (`Interval` or `float`): decode steps of all batches.
        padding (`Interval` or `float`): steps that rows wait.
        ratios (`dict[str, Interval | float]`): `padding` over that of other orders; NaN where those waste nothing.
    """

    steps: Interval | float
    padding: Interval | float
    ratios: dict[str, Interval | float]


def cut_batches(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Consecutive batches of an order."""
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def decode_steps(lengths: np.ndarray, batches: Sequence[Sequence[int]]) -> int:
    """Steps of the generate calls: each goes on until its longest completion ends."""
    return int(sum(lengths[batch].max() for batch in batches))


def replay(
    lengths: np.ndarray,
    groups: np.ndarray,
    prompt_tokens: np.ndarray,
    predicted: np.ndarray,
    batch_size: int,
    shuffles: int = 200,
    seed: int = 0,
) -> dict[str, Cost]:
    """Steps under every order.

    Args:
        lengths, groups, prompt_tokens, predicted (arrays of shape `(N,)`): of each completion, its tokens (the
            end-of-sequence token counted: it takes a step), its prompt, the prompt's tokens, and the predicted length.
        batch_size, shuffles, seed (`int`): see [`Settings`].

    Returns:
        `dict[str, Cost]`: by the name of the order; intervals wherever shuffles are averaged.
    """
    fixed = {
        PROMPT: cut_batches(np.lexsort((groups, prompt_tokens)), batch_size),
        PREDICTED: length_aware_batches(predicted.tolist(), batch_size),
        REALISED: length_aware_batches(lengths.tolist(), batch_size),
    }
    draw = np.random.default_rng(seed)
    _, place = np.unique(groups, return_inverse=True)
    drawn = {RANDOM: np.zeros((shuffles, 2)), RANDOM_PROMPTS: np.zeros((shuffles, 2))}
    for shuffle in tqdm(range(shuffles), desc="shuffling", unit="order"):
        orders = {
            RANDOM: draw.permutation(len(lengths)),
            RANDOM_PROMPTS: np.argsort(draw.permutation(int(place.max()) + 1)[place], kind="stable"),
        }
        for name, order in orders.items():
            batches = cut_batches(order, batch_size)
            drawn[name][shuffle] = decode_steps(lengths, batches), padding_steps(lengths, batches)
    padding = {name: padding_steps(lengths, batches) for name, batches in fixed.items()}

    def ratio(own: np.ndarray | int, other: np.ndarray | int) -> Interval | float:
        """Of fixed numbers or, as `(shuffles,)` columns, of means over shuffles."""
        if not np.all(other):
            return float("nan")
        if np.ndim(own) == np.ndim(other) == 0:
            return own / other
        columns = np.stack(np.broadcast_arrays(own, other), axis=1)
        return statistic_interval(columns, lambda means: means[:, 0] / means[:, 1], seed=seed)

    columns = {**{name: entry[:, 1] for name, entry in drawn.items()}, **padding}
    ratios = {
        name: {other: ratio(own, columns[other]) for other in (RANDOM, PROMPT, REALISED)}
        for name, own in columns.items()
    }
    costs = {
        name: Cost(*(mean_interval(entry[:, side], seed=seed) for side in (0, 1)), ratios[name])
        for name, entry in drawn.items()
    }
    for name, batches in fixed.items():
        costs[name] = Cost(decode_steps(lengths, batches), padding[name], ratios[name])
    return costs


def measure(settings: Settings) -> dict[str, Cost]:
    """Reads the rollouts, predicts each prompt's length, and replays."""
    rollouts, metadata = read_rollouts(settings.rollouts)
    set_threads(is_sandbox(metadata.tokenizer_fingerprint))
    model = load_length_value_model(
        settings.length_value_model,
        settings.base,
        tokenizer=metadata.tokenizer_fingerprint,
        tokenizer_name="the rollouts",
    )
    groups, prompts = np.array(rollouts["group"][:]), rollouts["prompt_ids"][:]
    _, first, place = np.unique(groups, return_index=True, return_inverse=True)
    logits = boundary_logits(model, [prompts[row] for row in first])
    predicted = lengths_from_logits(logits, model.config.gamma).numpy()[place]
    return replay(
        np.array([len(ids) for ids in rollouts["completion_ids"][:]]),
        groups,
        np.array([len(ids) for ids in prompts]),
        predicted,
        settings.batch_size,
        settings.shuffles,
        settings.seed,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of [`Settings`]."""
    parser.add_argument("--rollouts", required=True, help="A rollout file of prompts that the model was not fitted on.")
    parser.add_argument("--length_value_model", required=True, help="Length value model: folder or hub id.")
    parser.add_argument(
        "--base", help="The model that a length value model of form adapter or head was fitted on: folder or hub id."
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Completions in a batch. (default: 64)")
    parser.add_argument("--shuffles", type=int, default=200, help="Random orders that are averaged. (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the shuffles and the bootstrap. (default: 0)")


def print_costs(costs: dict[str, Cost], settings: Settings, console: Console) -> None:
    """Prints the table, and in words what the predicted order saves."""

    def cell(value: Interval | float, digits: int) -> str:
        ends = (value.estimate, value.low, value.high) if isinstance(value, Interval) else (value,)
        shown = [f"{end:.{digits}f}" for end in ends]
        if value != value:
            return "–"
        return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"

    table = Table("batches by", title=f"{settings.rollouts}, batches of {settings.batch_size}")
    for column in ("generate calls' steps", "padding steps", "over random", "over prompt length", "over the best"):
        table.add_column(column, justify="right")
    for name, cost in costs.items():
        ratios = [cell(cost.ratios[other], 3) for other in (RANDOM, PROMPT, REALISED)]
        table.add_row(name, cell(cost.steps, 0), cell(cost.padding, 0), *ratios)
    console.print(table)
    ours = costs[PREDICTED].ratios
    console.print(
        f"Padding steps of the predicted order: {cell(ours[RANDOM], 3)} of a random order's, {cell(ours[PROMPT], 3)} "
        f"of today's ({PROMPT}), {cell(ours[REALISED], 3)} of the best."
    )


def run(args: argparse.Namespace) -> dict[str, Cost]:
    """Replays and prints."""
    settings = Settings(**{entry.name: getattr(args, entry.name) for entry in fields(Settings)})
    costs = measure(settings)
    print_costs(costs, settings, Console(width=140, highlight=False))
    return costs
