"""Calls of reward functions: they hear more than TRL tells, what fails in one is named, its completions are kept.

Functions that take them get two further keywords:

- `num_generations` (`int`): completions of each prompt in this batch, which stand together in the order of rows and of
  processes; in evaluation that of evaluation.
- `tool_mask` (list of lists of 0 or 1, one per completion, aligned with `completion_ids`): 1 where the policy chose the
  token, 0 in tool output and environment text. In runs that have such a mask.

What one may say apart from what it pays, right after a call on this process, is
[`lenvm_rl.correctness.ShapedReward.unshaped_flags`]; what it may keep from call to call,
[`lenvm_rl.reward_functions.StatefulReward`].
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lenvm_rl.processes import fails_together
from lenvm_rl.reward_functions import accepted, check_returned, is_asynchronous
from lenvm_rl.rollouts import atomic_file


@contextlib.contextmanager
def watched_rewards(trainer, tool_mask: Sequence[Sequence[int]] | None = None) -> Iterator[None]:
    """A context in which TRL calls the reward functions of `trainer` through [`watched`]; reward models are left alone.

    Args:
        trainer (`trl.GRPOTrainer`): has the functions again afterwards, whatever happens.
        tool_mask (list of lists of 0 or 1, *optional*): of this process's completions, as the functions are to get it.
    """
    functions = trainer.reward_funcs
    group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    further = {"num_generations": group} | ({} if tool_mask is None else {"tool_mask": tool_mask})
    trainer.reward_funcs = [
        function if isinstance(function, nn.Module) else watched(function, name, trainer, further)
        for function, name in zip(functions, trainer.reward_func_names, strict=True)
    ]
    try:
        yield
    finally:
        trainer.reward_funcs = functions


def watched(function: Callable, name: str, trainer, further: Mapping[str, Any] | None = None) -> Callable:
    """A reward function whose errors say that they are its own, and which returns one number or `None` each.

    Its error on one process ends the others too, unless it is asynchronous: those are in no order.

    TRL takes NaN for `None` ("not scored") from here on. A function that computes NaN has a fault, so it is stopped.

    Args:
        function (`Callable`): as TRL takes it, asynchronous ones too; it is called with keywords only.
        name (`str`): what TRL calls it.
        trainer (`trl.GRPOTrainer`): says at which step and where to keep the completions.
        further (mapping, *optional*): keywords beside TRL's, for functions that take them; a column of the dataset that
            is called the same stays.

    Raises:
        `ValueError`: the function returned `None`, or not one reward for each completion, or a reward that is no finite
            number. Its own errors pass, with a note.
    """

    further = accepted(function, further or {})

    def call(**arguments):
        with fails_together(f"The reward function '{name}'"), _naming(name, arguments, trainer):
            return check_returned(function(**(further | arguments)), name, len(arguments["completions"]))

    async def call_asynchronously(**arguments):
        with _naming(name, arguments, trainer):
            return check_returned(await function(**(further | arguments)), name, len(arguments["completions"]))

    return call_asynchronously if is_asynchronous(function) else call


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
