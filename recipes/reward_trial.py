"""Reward functions are tried on the data before the first stage, so that none fails after hours of sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig

from lenvm_rl.endings import end_token_ids
from lenvm_rl.reward_functions import (
    NO_COLUMNS,
    StatefulReward,
    call_reward,
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

    Asynchronous ones are not called; what they take is looked at. What one remembers of the trial, it forgets.

    Args:
        functions (sequence of callables): the reward functions.
        dataset (`datasets.Dataset`): as it is trained on, in the order of its source.
        tokenizer (`PreTrainedTokenizerBase`): of the policy.
        config (`trl.GRPOConfig`): of the run.
        source (`str`): what the errors call the dataset.

    Raises:
        ValueError: a function needs a column that is not there. Its own errors pass, with a note on what it was given.
    """
    columns = [name for name in dataset.column_names if name not in NO_COLUMNS]
    rows = sorted({0, *first_gaps(dataset, columns)})
    for function in functions:
        for each in (function, judge_of(function)):
            check_columns(each, columns, source)
        for number in [] if is_asynchronous(function) else rows:
            tried = (
                f"The reward function '{name_of(function)}', tried on row {number} (the first is 0) of {source} before "
                "the first stage,"
            )
            _try(function, dataset[number], columns, tokenizer, config, tried)


def first_gaps(dataset: Dataset, columns: Sequence[str]) -> list[int]:
    """For each column with a `None` in it, the first such row."""
    rows = []
    for name in columns:
        nulls = dataset.select_columns(name).with_format("arrow")[:][name].is_null().to_pylist()
        rows += [nulls.index(True)] if True in nulls else []
    return rows


def _try(
    function: Callable,
    row: Mapping[str, Any],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: GRPOConfig,
    tried: str,
) -> None:
    count = config.num_generations
    ids = [*tokenizer(COMPLETION, add_special_tokens=False)["input_ids"], *end_token_ids(tokenizer)[:1]]
    memory = unwrapped(function)
    state = copy.deepcopy(memory.state_dict()) if isinstance(memory, StatefulReward) else None
    try:
        call_reward(
            function, tokenizer, [row["prompt"]] * count, [ids] * count, {name: [row[name]] * count for name in columns}
        )
    except Exception as error:
        if isinstance(error, KeyError) and isinstance(error.args[0], str) and error.args[0] not in row:
            raise ValueError(
                f"{tried} looked for '{error.args[0]}', and the columns are {', '.join(row)}: rename the one it means."
            ) from error
        error.add_note(f"{tried} failed so. The completions were {COMPLETION!r}; the row is {str(row)[:400]}.")
        raise
    finally:
        if state is not None:
            memory.load_state_dict(state)
