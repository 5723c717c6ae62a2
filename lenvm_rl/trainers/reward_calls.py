"""Calls of reward functions: what fails in one is named, and the completions that it failed on are kept."""

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lenvm_rl.rollouts import atomic_file


@contextlib.contextmanager
def watched_rewards(trainer) -> Iterator[None]:
    """A context in which TRL calls the reward functions of `trainer` through [`watched`]; reward models are left alone.

    Args:
        trainer (`trl.GRPOTrainer`): has the functions again afterwards, whatever happens.
    """
    functions = trainer.reward_funcs
    trainer.reward_funcs = [
        function if isinstance(function, nn.Module) else watched(function, name, trainer)
        for function, name in zip(functions, trainer.reward_func_names, strict=True)
    ]
    try:
        yield
    finally:
        trainer.reward_funcs = functions


def watched(function: Callable, name: str, trainer) -> Callable:
    """A reward function whose errors say that they are its own, and which returns one number or `None` each.

    TRL takes NaN for `None` ("not scored") from here on. A function that computes NaN has a fault, so it is stopped.

    Args:
        function (`Callable`): as TRL takes it, asynchronous ones too; it is called with keywords only.
        name (`str`): what TRL calls it.
        trainer (`trl.GRPOTrainer`): says at which step and where to keep the completions.

    Raises:
        `ValueError`: the function returned `None`, or not one reward for each completion, or a reward that is no finite
            number. Its own errors pass, with a note.
    """

    def call(**arguments):
        with _naming(name, arguments, trainer):
            return check_returned(function(**arguments), name, len(arguments["completions"]))

    async def call_asynchronously(**arguments):
        with _naming(name, arguments, trainer):
            return check_returned(await function(**arguments), name, len(arguments["completions"]))

    return call_asynchronously if _is_asynchronous(function) else call


def check_returned(returned: Any, name: str, count: int) -> list:
    """What a reward function returned, as a list; a `ValueError` if that is not `count` finite numbers or `None`s.

    Args:
        returned (any): of the function.
        name (`str`): of the function.
        count (`int`): completions that it was given.
    """
    culprit = f"The reward function '{name}' returned"
    if not isinstance(returned, Iterable) or isinstance(returned, (str, dict)):
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
    except (TypeError, ValueError, RuntimeError) as error:
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


def check_reward_models(rewards: Tensor, trainer) -> None:
    """Raise a `ValueError` if a reward model gave NaN, which TRL would take for a completion that nobody scored.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`): of all processes, one column per function or model.
        trainer (`trl.GRPOTrainer`): has the models.
    """
    for column, function, name in zip(rewards.T, trainer.reward_funcs, trainer.reward_func_names, strict=True):
        if isinstance(function, nn.Module) and bool(torch.isnan(column).any()):
            raise ValueError(
                f"The reward model '{name}' gave NaN at step {trainer.state.global_step} for "
                f"{int(torch.isnan(column).sum())} of {len(column)} completions: check its weights and its dtype "
                "(float16 overflows)."
            )


@contextlib.contextmanager
def _naming(name: str, arguments: dict[str, Any], trainer) -> Iterator[None]:
    """Errors that are raised inside get a note: whose they are, and where the completions lie."""
    try:
        yield
    except Exception as error:
        path = _keep(name, arguments, trainer)
        error.add_note(
            f"This came of the reward function '{name}' at step {trainer.state.global_step}. The completions that it "
            f"was given are in {path}: run the function on them, mend it, and resume from the last checkpoint."
        )
        raise


def _keep(name: str, arguments: dict[str, Any], trainer) -> Path:
    """Write what a reward function was given to a JSON file in `output_dir`: one object per completion."""
    given = zip(arguments["prompts"], arguments["completions"], arguments["completion_ids"], strict=True)
    rows = [{"prompt": prompt, "completion": text, "completion_ids": list(ids)} for prompt, text, ids in given]
    step, rank = trainer.state.global_step, trainer.accelerator.process_index
    path = Path(
        trainer.args.output_dir, f"failed_reward_{re.sub(r'[^A-Za-z0-9]+', '_', name)}_step{step}_rank{rank}.json"
    )
    with atomic_file(path) as file:
        # Pictures and the like are named, not written.
        file.write(json.dumps(rows, indent=1, default=repr).encode())
    return path


def _is_asynchronous(function: Callable) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
