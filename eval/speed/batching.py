"""How many decode steps a batch's rows spend waiting for its longest, by the order that batches are made in.

    python -m eval.speed batching --rollouts held_out.jsonl --length_value_model outputs/length_value_model

Nothing is sampled: the lengths of a rollout file are replayed, each completion taking the steps that it took, under
batches made from

- `random`: completions in random order; `random prompts`: prompts in random order, a prompt's completions side by side;
- `prompt length`: prompts by their own length, what recipes/sample_rollouts.py does by itself;
- `predicted length`: prompts by the length value model's prediction, what its `--length_value_model` does;
- `realised length`: completions by the length that they turn out to have. Nobody knows it before; it is the best order.

`generate calls' steps` is the sum over batches of the longest completion; `padding steps` the sum over rows of what
they wait. Random orders are means over shuffles; the others are fixed by the data. Padding of the prompts is not
counted: a prompt is read in one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from transformers.hf_argparser import HfArg

from eval.report import Column, print_table
from eval.runs import is_sandbox, set_threads
from lenvm_rl.modeling.loading import load_length_value_model
from lenvm_rl.prediction import boundary_logits, length_aware_batches, lengths_from_logits, padding_steps
from lenvm_rl.rollouts.record import read_rollouts

RANDOM, RANDOM_PROMPTS = "random", "random prompts"
PROMPT, PREDICTED, REALISED = "prompt length", "predicted length", "realised length"


@dataclass
class BatchingArguments:
    """What is replayed."""

    rollouts: str = HfArg(help="A rollout file of prompts that the model was not fitted on.")
    length_value_model: str = HfArg(help="Length value model: folder or hub id.")
    base: str | None = HfArg(
        default=None,
        help="The model that a length value model of form adapter or head was fitted on: folder or hub id.",
    )
    batch_size: int = HfArg(default=64, help="Completions in a batch.")
    shuffles: int = HfArg(default=200, help="Random orders that are averaged.")
    seed: int = HfArg(default=0, help="Seed of the shuffles and the bootstrap.")

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shuffles < 2:
            raise ValueError(f"batch_size must be at least 1 and shuffles 2, got {self.batch_size}, {self.shuffles}.")


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
) -> dict[str, dict[str, float]]:
    """What every order costs.

    Args:
        lengths, groups, prompt_tokens, predicted (arrays of shape `(N,)`): of each completion, its tokens (the
            end-of-sequence token counted: it takes a step), its prompt, the prompt's tokens, and the predicted length.
        batch_size, shuffles, seed (`int`): see [`BatchingArguments`].

    Returns:
        `dict`: by the name of the order, `steps`, `padding`, and the latter over the `random`, `prompt length` and
        `realised length` orders'; NaN where those waste nothing.
    """
    draw = np.random.default_rng(seed)
    _, place = np.unique(groups, return_inverse=True)
    orders = {
        RANDOM: [draw.permutation(len(lengths)) for _ in range(shuffles)],
        RANDOM_PROMPTS: [
            np.argsort(draw.permutation(int(place.max()) + 1)[place], kind="stable") for _ in range(shuffles)
        ],
        PROMPT: [np.lexsort((groups, prompt_tokens))],
    }
    batches = {
        name: [[order[at : at + batch_size] for at in range(0, len(order), batch_size)] for order in drawn]
        for name, drawn in orders.items()
    }
    batches[PREDICTED] = [length_aware_batches(predicted.tolist(), batch_size)]
    batches[REALISED] = [length_aware_batches(lengths.tolist(), batch_size)]
    costs = {
        name: {
            "steps": float(np.mean([decode_steps(lengths, each) for each in drawn])),
            "padding": float(np.mean([padding_steps(lengths, each) for each in drawn])),
        }
        for name, drawn in batches.items()
    }
    for own in costs.values():
        for other in (RANDOM, PROMPT, REALISED):
            own[other] = own["padding"] / costs[other]["padding"] if costs[other]["padding"] else float("nan")
    return costs


def measure_batching(args: BatchingArguments) -> dict[str, dict[str, float]]:
    """Reads the rollouts, predicts each prompt's length, and replays."""
    rollouts, metadata = read_rollouts(args.rollouts)
    set_threads(is_sandbox(metadata.tokenizer_fingerprint))
    model = load_length_value_model(
        args.length_value_model, args.base, tokenizer=metadata.tokenizer_fingerprint, tokenizer_name="the rollouts"
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
        args.batch_size,
        args.shuffles,
        args.seed,
    )


def main(args: BatchingArguments) -> None:
    """Replays, and prints a line for each order."""
    rows = [{"order": name, **cost} for name, cost in measure_batching(args).items()]
    columns = [
        Column("batches by", "order"),
        Column("generate calls' steps", "steps", 0),
        Column("padding steps", "padding", 0),
        *(Column(f"over {name}", name, 3) for name in (RANDOM, PROMPT, REALISED)),
    ]
    title = f"{args.rollouts}, batches of {args.batch_size}"
    print_table(Console(width=140, highlight=False), rows, columns, title)
