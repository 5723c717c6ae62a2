"""What a TRL reward function is, and what one may be able to do besides: asked here by trainers and by rewards.

TRL takes functions, lambdas, bound methods, `functools.partial`s of any of them, and objects that can be called. Three
abilities are seen without knowing the class: to have a state that a resumed run needs ([`StatefulReward`]), to say what
is correct apart from what is paid ([`ShapedReward`]), and to say which gold answers it cannot read ([`check_golds`]).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState

# What a reward function is called with, by keyword: by TRL beside the columns of the dataset, all but some of them, and
# by the trainers of this library.
BY_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
NO_COLUMNS = {"prompt", "completion", "completion_ids"}
BY_US = {"num_generations"}
# Between the flags 0 and 1.
FLAG_THRESHOLD = 0.5
# How many bad rows an error shows.
SHOWN = 5


@runtime_checkable
class StatefulReward(Protocol):
    """A reward function with a memory, which checkpoints hold and evaluation leaves as it was.

    The state is of plain JSON types and the same on every process: the first one's is saved.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state, as JSON can hold it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Take up a state that `state_dict` gave; a `ValueError` if it does not fit."""

    def reset(self) -> Any:
        """Go back to the state of a new run."""


@runtime_checkable
class ShapedReward(Protocol):
    """A reward function that pays for more than being correct, such as a length penalty, and knows what is correct.

    Attributes:
        unshaped_flags (`list[float | None]` or `None`):
            1 where a completion of the last call in this process was correct, 0 where it was not, `None` where that
            was not judged. `None` before the first call.
    """

    unshaped_flags: list[float | None] | None


def unwrapped(function: Callable) -> Callable:
    """What is called in the end, `functools.partial` taken off: the object to ask for its abilities."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def judge_of(function: Callable) -> Callable:
    """The function that says what is correct: itself, or the `task_reward` that it wraps."""
    # A `functools.partial` stays what it is: another one of the same function may judge otherwise.
    return getattr(unwrapped(function), "task_reward", function)


def name_of(function: Callable) -> str:
    """What TRL calls a reward function: its `__name__`, or the name of its class where it has none."""
    function = unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)


def is_asynchronous(function: Callable) -> bool:
    """Whether calling it gives something to be awaited."""
    function = unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _parameters(function: Callable) -> tuple[dict[str, inspect.Parameter], bool] | None:
    """What may be given by keyword, and whether anything may; `None` where there is no signature to read."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        # Compiled functions may have none.
        return None
    named = {name: one for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return named, any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def accepted(function: Callable, further: Mapping[str, Any]) -> dict[str, Any]:
    """The further keywords that a function takes: TRL does not pass them, so it need not know them.

    Args:
        function (`Callable`): a reward function. What a `functools.partial` has bound already is left to it.
        further (mapping): keywords by name.
    """
    named, takes_all = _parameters(function) or ({}, False)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    return {name: value for name, value in further.items() if (takes_all or name in named) and name not in bound}


def load_reward(path: str) -> Callable:
    """The reward function at a dotted path, such as `reward.gsm8k.gsm8k_reward` or `module.grader.method`.

    Modules are looked for where Python looks, and in the current folder; one that fails raises its own error.

    Raises:
        ValueError: nothing is there, or a class, or something that cannot be called.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{path!r} is not a dotted path; write it like reward.gsm8k.gsm8k_reward.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found = None
    names = [".".join(parts[: place + 1]) for place in range(len(parts))]
    while names and (found is None or hasattr(found, "__path__")):
        if names[0] not in sys.modules and importlib.util.find_spec(names[0]) is None:
            break
        found = importlib.import_module(names.pop(0))
    if found is None:
        raise ValueError(
            f"There is no reward function at the dotted path {path!r}: no module {parts[0]!r} is in {os.getcwd()}, or "
            "where Python looks for modules."
        )
    for name in names:
        last = name.rpartition(".")[2]
        if not hasattr(found, last):
            place = getattr(found, "__file__", None) or getattr(found, "__name__", None) or type(found).__name__
            raise ValueError(
                f"There is no reward function at the dotted path {path!r}: {place} has no {last!r}. If that is not the "
                "module that you mean, give yours another name."
            )
        found = getattr(found, last)
    if inspect.isclass(found):
        raise ValueError(f"{path!r} is a class, not a function: name an object that was made from it, or a function.")
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, not a function: name a function inside it.")
    return found


def call_reward(
    reward: Callable[..., Sequence[float]],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    completion_ids: Sequence[list[int]],
    columns: Mapping[str, Sequence[Any]],
    num_generations: int | None = None,
) -> list[float | None]:
    """What a TRL reward function pays, called as TRL calls it and checked; what it logs is logged nowhere.

    Args:
        reward (`Callable`): the function; asynchronous ones are awaited.
        tokenizer (`PreTrainedTokenizerBase`): decodes the completions.
        prompts (sequence): one per completion, texts or lists of messages.
        completion_ids (sequence of lists of `int`): sampled ids.
        columns (mapping): one list per column of the dataset, an entry per completion.
        num_generations (`int`, *optional*): completions of each prompt, side by side, for functions that ask for it.
    """
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    conversational = bool(prompts) and not isinstance(prompts[0], str)
    state = TrainerState(max_steps=1, epoch=0.0)
    further = {"trainer_state": state, "log_extra": _log_nothing, "log_metric": _log_nothing}
    further |= {} if num_generations is None else {"num_generations": num_generations}
    paid = reward(
        prompts=list(prompts),
        completions=chats if conversational else texts,
        completion_ids=list(completion_ids),
        **(accepted(reward, further) | dict(columns)),
    )
    if is_asynchronous(reward):
        paid = asyncio.run(paid)
    return check_returned(paid, name_of(reward), len(completion_ids))


def _log_nothing(*arguments: Any, **named: Any) -> None:
    pass


def check_columns(function: Callable, columns: Iterable[str], source: str = "the dataset") -> None:
    """Raise a `ValueError` if a trainer could not call a reward function with the columns of a dataset.

    Args:
        function (`Callable`): a reward function; one without a signature can be called with anything.
        columns (iterable of `str`): of the dataset.
        source (`str`, *optional*): what the error calls it.
    """
    parameters = _parameters(function)
    if parameters is None:
        return
    named, takes_all = parameters
    columns = list(columns)
    given = BY_TRL | set(columns) - NO_COLUMNS
    needed = {name for name, one in named.items() if one.default is one.empty}
    lacking = sorted(needed - given - BY_US)
    if lacking:
        raise ValueError(
            f"The reward function '{name_of(function)}' needs {', '.join(lacking)}, and {source} has the columns "
            f"{', '.join(columns)}: rename the one that it means, or give its parameter a default."
        )
    refused = sorted(given - set(named))
    if refused and not takes_all:
        raise ValueError(
            f"The reward function '{name_of(function)}' takes no {', '.join(refused)}, and every reward function is "
            "handed all of that: end its parameters with **kwargs."
        )


def check_returned(returned: Any, name: str, count: int) -> list:
    """What a reward function returned, as a list; a `ValueError` if that is not `count` finite numbers or `None`s.

    Args:
        returned (any): of the function; lists, tuples, arrays, tensors of shape `(count,)`, generators.
        name (`str`): of the function.
        count (`int`): completions that it was given.
    """
    culprit = f"The reward function '{name}' returned"
    scalar = isinstance(returned, (np.ndarray, torch.Tensor)) and returned.ndim == 0
    if not isinstance(returned, Iterable) or isinstance(returned, (str, Mapping)) or scalar:
        raise ValueError(
            f"{culprit} {returned!r}, not one reward for each completion: return a list of {count} numbers, with None "
            "for completions that it does not apply to."
        )
    rewards = list(returned)
    if len(rewards) != count:
        raise ValueError(
            f"{culprit} {len(rewards)} rewards, but {count} were expected: return one for each completion."
        )
    try:
        numbers = torch.tensor([0.0 if reward is None else reward for reward in rewards], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{culprit} something that is no number ({error}): return numbers or None.") from error
    if numbers.dim() != 1:
        raise ValueError(f"{culprit} rewards of shape {tuple(numbers.shape)}: return one number for each completion.")
    bad = (~torch.isfinite(numbers)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{culprit} {float(numbers[bad[0]])} for completion {bad[0]} of {count} ({len(bad)} such rewards): return "
            "finite numbers, and None for completions that it does not apply to."
        )
    return rewards


def check_golds(reward_funcs: Iterable[Any], columns: Dataset | Mapping[str, Sequence]) -> None:
    """Raise a `ValueError` if a reward function cannot grade by a gold answer of a dataset.

    For a program to call before its first stage: a reward function meets a gold answer only when its row is sampled.
    Asked are functions with two attributes, `gold_columns`, the columns that it reads gold answers from (the first that
    is there), and `unreadable_golds`, a function of such a column that returns its bad entries as texts; of length
    penalties, the task reward inside them.
    """
    names = columns.column_names if isinstance(columns, Dataset) else list(columns)
    for reward in reward_funcs:
        reward = unwrapped(judge_of(reward))
        if not hasattr(reward, "unreadable_golds"):
            continue
        column = next((column for column in reward.gold_columns if column in names), None)
        if column is None:
            raise ValueError(
                f"{name_of(reward)} reads gold answers from the column {' or '.join(map(repr, reward.gold_columns))}, "
                f"but the dataset has {names}: rename the column that holds them."
            )
        golds = list(columns[column])
        unreadable = set(reward.unreadable_golds(golds))
        rows = [row for row, gold in enumerate(golds) if str(gold) in unreadable]
        if rows:
            shown = ", ".join(f"row {row}: {str(golds[row])[-80:]!r}" for row in rows[:SHOWN])
            raise ValueError(
                f"{name_of(reward)} cannot grade by {len(rows)} of {len(golds)} gold answers in the column {column!r} "
                f"({shown}{', …' if len(rows) > SHOWN else ''}): write them in another way, or leave these rows out."
            )


def correctness_values(
    function: Callable, paid: Sequence[float | None] | torch.Tensor, threshold: float = FLAG_THRESHOLD
) -> tuple[Sequence[float | None] | torch.Tensor, float]:
    """What a reward function says of the correctness of the completions that it was just called with.

    Args:
        function (`Callable`): the reward function, right after the call.
        paid (sequence of `float` or `None`, or `torch.Tensor`): what it returned, one entry per completion.
        threshold (`float`, *optional*, defaults to `0.5`): above which its rewards say that a completion is correct.

    Returns:
        `tuple[Sequence[float | None] | torch.Tensor, float]`: one value per completion, `None` where it was not
        judged, and the threshold above which a value says correct. For a [`ShapedReward`] its flags and 0.5, otherwise
        what was given.
    """
    function = unwrapped(function)
    if not isinstance(function, ShapedReward):
        return paid, threshold
    flags = function.unshaped_flags
    if flags is None or len(flags) != len(paid):
        raise ValueError(
            f"`unshaped_flags` of the reward function '{name_of(function)}' must hold one flag for each of the "
            f"{len(paid)} completions of its last call, but holds {'none' if flags is None else len(flags)}."
        )
    return flags, FLAG_THRESHOLD


def are_correct(function: Callable, paid: Sequence[float | None], threshold: float = FLAG_THRESHOLD) -> list[bool]:
    """Which completions are correct, from the arguments of [`correctness_values`]; what was not judged is not."""
    values, threshold = correctness_values(function, paid, threshold)
    return [value is not None and value > threshold for value in values]


T = TypeVar("T")


def number_of_processes() -> int:
    """How many processes work on the batches of this run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def process_index() -> int:
    """Which of them this is; rows of a batch are in their order."""
    return torch.distributed.get_rank() if number_of_processes() > 1 else 0


def exchanged(value: T) -> list[T]:
    """The value of each process, in their order; every process has to call this, with something that can be pickled."""
    if number_of_processes() == 1:
        return [value]
    everyone: list = [None] * number_of_processes()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


@contextlib.contextmanager
def fails_together(what: str) -> Iterator[None]:
    """A context in which an error on one process ends the others too, which would wait for that one in vain.

    Every process has to enter it, and to leave it before they exchange anything else. Where it failed, its own error
    passes; the others get a `RuntimeError` that says `what` failed where.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    told = exchanged(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [f"process {index} ({problem})" for index, problem in enumerate(told) if problem is not None]
    if failed:
        raise RuntimeError(f"{what} failed on {', '.join(failed)}: see what that process says.")
