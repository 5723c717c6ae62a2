"""Reward functions are tried on the data before the first stage, so that none fails after hours of sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState
from trl import GRPOConfig

from lenvm_rl.endings import end_token_ids
from lenvm_rl.reward_functions import (
    NO_COLUMNS,
    StatefulReward,
    check_columns,
    is_asynchronous,
    judge_of,
    name_of,
    unwrapped,
)

# What a policy might write.
COMPLETION = "The answer is 0."


def try_rewards(
    functions: Sequence[Callable], dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: GRPOConfig, source: str
) -> None:
    """Call every reward function as a trainer would, on the first row, and on the first that lacks something.

    Asynchronous ones are not called; what they take is looked at.

    Args:
        functions (sequence of callables): the reward functions.
        dataset (`datasets.Dataset`): as it is trained on, in the order of its source.
        tokenizer (`PreTrainedTokenizerBase`): of the policy.
        config (`trl.GRPOConfig`): of the run.
        source (`str`): what the errors call the dataset.

    Raises:
        ValueError: a function needs a column that is not there. Its own errors pass, with a note on what it was given.
    """
    columns = [name for name in dataset.column_names if name != "prompt"]
    rows = sorted({0, *first_gaps(dataset, columns)})
    for function in functions:
        for each in {id(one): one for one in (function, judge_of(function))}.values():
            check_columns(each, columns, source)
        if is_asynchronous(function):
            continue
        for number in rows:
            where = f"row {number} (the first is 0) of {source}"
            with _remembering(unwrapped(function)), _naming(function, dataset[number], where):
                function(**trial_arguments(dataset[number], tokenizer, config))


def first_gaps(dataset: Dataset, columns: Sequence[str]) -> list[int]:
    """For each column with a `None` in it, the first such row."""
    rows = []
    for name in columns:
        nulls = dataset.select_columns(name).with_format("arrow")[:][name].is_null().to_pylist()
        rows += [nulls.index(True)] if True in nulls else []
    return rows


def trial_arguments(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, config: GRPOConfig) -> dict[str, Any]:
    """What a trainer calls a reward function with, for one prompt and equal completions."""
    ids = [*tokenizer(COMPLETION, add_special_tokens=False)["input_ids"], *end_token_ids(tokenizer)[:1]]
    completion = COMPLETION if isinstance(row["prompt"], str) else [{"role": "assistant", "content": COMPLETION}]
    given = {name: value for name, value in row.items() if name not in NO_COLUMNS}
    given |= {"prompts": row["prompt"], "completions": completion, "completion_ids": ids}
    return {
        **{name: [value] * config.num_generations for name, value in given.items()},
        "trainer_state": TrainerState(max_steps=max(1, config.max_steps), epoch=0.0),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }


@contextlib.contextmanager
def _remembering(function: Callable) -> Iterator[None]:
    """A function with a memory forgets what is called inside."""
    state = function.state_dict() if isinstance(function, StatefulReward) else None
    try:
        yield
    finally:
        if isinstance(function, StatefulReward):
            function.load_state_dict(state)


@contextlib.contextmanager
def _naming(function: Callable, row: Mapping[str, Any], where: str) -> Iterator[None]:
    """Errors that are raised inside say whose they are; a column that is not there is an error of its own."""
    tried = f"The reward function '{name_of(function)}', tried on {where} before the first stage,"
    try:
        yield
    except Exception as error:
        if isinstance(error, KeyError) and isinstance(error.args[0], str) and error.args[0] not in row:
            raise ValueError(
                f"{tried} looked for '{error.args[0]}', and the columns are {', '.join(row)}: rename the one it means."
            ) from error
        kind = "text" if isinstance(row["prompt"], str) else "messages"
        error.add_note(f"{tried} failed so. The completions were {kind}, {COMPLETION!r}; the row is {str(row)[:400]}.")
        raise
