"""Reward functions in a run: how they are called, which of them says what is correct, and how their states are kept.

**Calls.** Functions that take them get two keywords beside TRL's:

- `num_generations` (`int`): completions of each prompt in this batch, which stand together in the order of rows and of
  processes; in evaluation, `num_generations_eval`.
- `tool_mask` (list of lists of 0 or 1, one per completion, aligned with `completion_ids`): 1 where the policy chose the
  token, 0 in tool output and environment text. In runs that have such a mask.

What fails in a function is named, and the completions that it was given are kept.

**The gate.** Whoever pays by correctness asks [`Gate`]: the length stream, `accuracy_floor`, a refresh on correct
completions only, the metrics of correct completions. A completion that the function did not score (`None`) is neither
correct nor wrong: it is *not judged*, and left out of every share.

**States.** [`RewardStates`] keeps them in checkpoints. The protocols stand in [`lenvm_rl.reward_functions`].
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from lenvm_rl.files import write_json
from lenvm_rl.returns import to_device
from lenvm_rl.reward_functions import (
    FLAG_THRESHOLD,
    StatefulReward,
    accepted,
    check_returned,
    correctness_values,
    fails_together,
    is_asynchronous,
    judge_of,
    name_of,
    unwrapped,
)
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.streams import Outcomes
from lenvm_rl.trainers.unread import Unread

logger = logging.getLogger(__name__)

FILE_NAME = "reward_states.json"
# Generation batches in a row after which a gate that never opens, or never closes, is worth a warning.
LONG = 20


@contextlib.contextmanager
def watched_rewards(trainer: GRPOTrainer, tool_mask: Sequence[Sequence[int]] | None = None) -> Iterator[None]:
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


def watched(function: Callable, name: str, trainer: GRPOTrainer, further: Mapping[str, Any] | None = None) -> Callable:
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


def check_rewards(rewards: Tensor, trainer: GRPOTrainer) -> None:
    """Raise a `ValueError` if a reward is infinite, or a reward model gave NaN: TRL takes that for "not scored".

    A completion that no function scored has no advantage, as in TRL, which warns of it.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`): of all processes, one column per function or model.
        trainer (`trl.GRPOTrainer`): has the functions and models.
    """
    for column, function, name in zip(rewards.T, trainer.reward_funcs, trainer.reward_func_names, strict=True):
        if bool(torch.isinf(column).any()):
            raise ValueError(f"The reward of {name} is infinite for a completion: return finite numbers.")
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
    # Pictures and the like are named, not written.
    write_json(path, rows, default=repr)
    return path


def gate_index(
    args: LenVMConfig, functions: Sequence[Callable], names: Sequence[str], users: Sequence[str] = ()
) -> int | None:
    """Which reward function says what is correct: the one called `gate_reward`, or the only one there is.

    A penalty around a task reward, beside that task reward, counts as one with it: both say the same. `None` where
    nobody says it and nothing in the run needs it.

    Args:
        args ([`~lenvm_rl.trainers.config.LenVMConfig`]): of the run.
        functions, names: the reward functions (`torch.nn.Module` for a reward model), and what TRL calls them.
        users (sequence of `str`, *optional*): further settings that need the answer.

    Raises:
        `ValueError`: `gate_reward` names none of them, or there is doubt and something needs the answer.
    """
    if args.gate_reward is not None:
        if names.count(args.gate_reward) != 1:
            found = "several of them are called that" if args.gate_reward in names else "none of them is called that"
            raise ValueError(
                f"gate_reward='{args.gate_reward}' has to name one of the reward functions ({', '.join(names)}), but "
                f"{found}."
            )
        return names.index(args.gate_reward)
    judges = [judge_of(function) for function in functions]
    doubt = _doubt(args, judges, names)
    if doubt is None:
        # The task reward itself where it is there: its numbers are the ones that TRL logs.
        return next((index for index, function in enumerate(functions) if function == judges[0]), 0)
    users = [*args.gate_users, *users]
    if users:
        raise ValueError(f"{' and '.join(users)} must know which completions are correct, {doubt}")
    logger.info("length/correct and length/mean_correct stay empty: they must know which are correct, %s", doubt)
    return None


def _doubt(args: LenVMConfig, judges: list[Callable], names: Sequence[str]) -> str | None:
    """Why these functions do not say what is correct, and what to change; `None` if they do."""
    instead = "or leave out what needs it (length_gate='all' pays every completion for length)"
    if not judges:
        return f"and there is no reward function: give one that pays 1 for correct and 0 for others, {instead}."
    if any(judge != judges[0] for judge in judges):
        return (
            f"and there are several reward functions ({', '.join(names)}): set gate_reward to the name of the one that "
            f"says it, {instead}."
        )
    if isinstance(judges[0], nn.Module) and args.gate_threshold == type(args).gate_threshold:
        return (
            f"but the reward model {names[0]} gives scores, not 0 or 1: set gate_threshold to the score above which a "
            f"completion counts as correct (gate_reward='{names[0]}' keeps {args.gate_threshold}), {instead}."
        )
    return None


class Gate:
    """What a run knows of which completions are correct; arguments as in [`gate_index`], and what the run reads later
    ([`~lenvm_rl.trainers.unread.Unread`])."""

    def __init__(self, args: LenVMConfig, functions: Sequence[Callable], names: Sequence[str], unread: Unread):
        self._args, self._names, self._unread = args, list(names), unread
        self.index = gate_index(args, functions, names)
        self._warned = False
        self._closed, self._open, self._never_closed = 0, 0, True

    def outcomes(self, rewards: Tensor, functions: Sequence[Callable], weights: Tensor, rows: slice) -> Outcomes:
        """What the reward functions said about the completions of this process.

        Args:
            rewards (`torch.Tensor` of shape `(N, F)`): raw, of all processes, NaN where a function returned `None`.
            functions, weights (`torch.Tensor` of shape `(F,)`): right after they were called; in the weighted sum.
            rows (`slice`): of this process, `B` of the `N`.
        """
        mine = rewards[rows]
        weighted = (mine * weights.to(mine.device, non_blocking=True)).nansum(dim=1)
        return Outcomes(weighted, ~torch.isnan(mine).all(dim=1), *self._correct_and_judged(mine, functions))

    def _correct_and_judged(self, rewards: Tensor, functions: Sequence[Callable]) -> tuple[Tensor, Tensor]:
        if self.index is None:
            nothing = torch.zeros(len(rewards), dtype=torch.bool, device=rewards.device)
            return nothing, nothing
        values = rewards[:, self.index]
        said, threshold = correctness_values(functions[self.index], values, self._args.gate_threshold)
        if said is not values:
            values = to_device([math.nan if value is None else value for value in said], rewards)
        judged = ~torch.isnan(values)
        # Values that are neither 0 nor 1 and that nobody said how to read.
        if not self._warned and self._args.gate_users and threshold == FLAG_THRESHOLD:
            is_odd = judged & (values != 0.0) & (values != 1.0)
            self._unread.add_flag(is_odd.any(), lambda: self._warn_of(values[is_odd], threshold))
        return values > threshold, judged

    def _warn_of(self, odd: Tensor, threshold: float) -> None:
        """Warn, once, of values of this process; another one may have found them."""
        self._warned = True
        if len(odd):
            logger.warning(
                "the reward function '%s' says what is correct, but it gives values such as %g, neither 0 nor 1; they "
                "are read as correct above %g. Set gate_threshold to the value above which a completion is correct, or "
                "gate_reward to a function that pays 1 for correct completions and 0 for others.",
                self._names[self.index],
                float(odd[0]),
                threshold,
            )

    def watch(self, correct_share: float, is_paid: bool) -> None:
        """Warn where a gate has not opened for long, or has never closed.

        Args:
            correct_share (`float`): of a generation batch of training, of all processes; NaN if none was judged.
            is_paid (`bool`): whether its length stream pays anybody.
        """
        if not self._args.gate_users:
            return
        users = " and ".join(self._args.gate_users)
        is_open = correct_share > 0.0 and is_paid
        self._closed = 0 if is_open else self._closed + 1
        self._never_closed = self._never_closed and correct_share == 1.0
        self._open = self._open + 1 if self._never_closed else 0
        if self._closed == LONG:
            logger.warning(
                "%s: in %d generation batches in a row no completion was both correct and paid for length "
                "(length/correct is %g in the last one; nan: none was judged). Check that '%s' says what is correct "
                "(gate_reward), that gate_threshold=%g fits its values, and that the policy can do the task at all.",
                users,
                LONG,
                correct_share,
                self._names[self.index],
                self._args.gate_threshold,
            )
        if self._open == LONG:
            logger.warning(
                "%s: every completion of the first %d generation batches counts as correct. If the task is not that "
                "easy, '%s' does not say what is correct: set gate_reward, or gate_threshold.",
                users,
                LONG,
                self._names[self.index],
            )


class RewardStates(TrainerCallback):
    """Saves the state of stateful reward functions with each checkpoint, and takes it up when a run is resumed.

    A run that starts anew resets them: a ready-made one may have served an earlier run of the same process. What an
    evaluation or a prediction moves is undone after it. Reward functions without a state
    ([`~lenvm_rl.reward_functions.StatefulReward`]) are left alone, so all of a trainer's may be given. The trainers of
    `lenvm_rl` add this callback themselves; for a trainer of TRL:

        trainer = GRPOTrainer(model, rewards, config, callbacks=[RewardStates(rewards)], ...)

    Args:
        reward_funcs (iterable of callables): the very objects that the trainer has, in a `functools.partial` or not.
            Those with equal names are told apart by their order.
        checkpoint (`str` or path, *optional*):
            Folder of the checkpoint to resume from, where it is not one of the run's own in `output_dir`. Trainers of
            `lenvm_rl` know it.

    Raises:
        ValueError: a state is not of plain JSON types.
    """

    def __init__(self, reward_funcs: Iterable[Callable], checkpoint: str | PathLike | None = None):
        self.rewards: dict[str, StatefulReward] = {}
        self.checkpoint = checkpoint
        self._resumed_from: str | PathLike | None = None
        for reward in stateful_among(reward_funcs):
            problem = why_not_kept(reward)
            if problem is not None:
                raise ValueError(problem)
            self._add(reward)
        self._kept = self._states()

    def include(self, reward_funcs: Iterable[Callable]) -> None:
        """Keep these too, as far as their states can be kept; a warning names the others."""
        for reward in stateful_among(reward_funcs):
            problem = why_not_kept(reward)
            if problem is not None:
                logger.warning("%s", problem)
            else:
                self._add(reward)
        self._kept = self._states()

    def resume_from(self, checkpoint: str | PathLike) -> None:
        """Called by the trainers of `lenvm_rl` before training goes on from a checkpoint, wherever that lies."""
        self._resumed_from = checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Called by the Trainer: begins anew, or takes up the states of the checkpoint that the run goes on from."""
        resumed_from, self._resumed_from = self._resumed_from, None
        if not self.rewards:
            return
        if state.global_step == 0:
            for reward in self.rewards.values():
                reward.reset()
        else:
            self._load(Path(self.checkpoint or resumed_from or _folder(args, state)))
        self._kept = self._states()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Called by the Trainer after each optimizer step: notes the states, for when an evaluation is over."""
        self._kept = self._states()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Called by the Trainer after each evaluation: back to before it."""
        self.undo()

    # After a prediction as after an evaluation.
    on_predict = on_evaluate

    def undo(self) -> None:
        """Back to the states of the last step: called where completions were rewarded of which the policy learns
        nothing."""
        for name, reward in self.rewards.items():
            reward.load_state_dict(copy.deepcopy(self._kept[name]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Called by the Trainer when it has written a checkpoint; the first process adds the file."""
        if state.is_world_process_zero:
            self.save_in_checkpoint(_folder(args, state))

    def save_in_checkpoint(self, folder: str | PathLike) -> None:
        """Called by the trainers of `lenvm_rl` before a checkpoint counts as complete; it then has the file."""
        if self.rewards:
            write_json(Path(folder) / FILE_NAME, self._states(), allow_nan=False)

    def _add(self, reward: StatefulReward) -> None:
        if any(known is reward for known in self.rewards.values()):
            return
        name, count = name_of(reward), 1
        while name in self.rewards:
            count += 1
            name = f"{name_of(reward)}_{count}"
        self.rewards[name] = reward

    def _states(self) -> dict[str, Any]:
        # Copies: an object may hand out what it goes on changing.
        return {name: copy.deepcopy(reward.state_dict()) for name, reward in self.rewards.items()}

    def _load(self, folder: Path) -> None:
        path = folder / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {FILE_NAME}, so the state of {', '.join(self.rewards)} is lost: the checkpoint was "
                "written without the callback RewardStates, or is in another folder (name it, RewardStates(..., "
                "checkpoint=...)). Otherwise start a new run."
            )
        saved = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted(set(self.rewards) - set(saved))
        if missing:
            raise ValueError(
                f"{path} holds states of {', '.join(saved) or 'nothing'}, but none of {', '.join(missing)}: resume "
                "with the reward functions that the run had."
            )
        for name, reward in self.rewards.items():
            reward.load_state_dict(saved[name])


def keep_reward_states(trainer: GRPOTrainer) -> RewardStates:
    """The callback of a trainer that keeps the states of its reward functions: the one it was given, or a new one."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RewardStates):
            break
    else:
        callback = RewardStates(())
        trainer.add_callback(callback)
    callback.include(trainer.reward_funcs)
    return callback


def stateful_among(reward_funcs: Iterable[Callable]) -> list[StatefulReward]:
    """The reward functions that have a state; the weights of a reward model, which is frozen, are none."""
    found = [unwrapped(function) for function in reward_funcs]
    return [one for one in found if isinstance(one, StatefulReward) and not isinstance(one, nn.Module)]


def why_not_kept(reward: StatefulReward) -> str | None:
    """What keeps a state from being written, in a sentence, or `None`."""
    try:
        json.dumps(reward.state_dict(), allow_nan=False)
    except (TypeError, ValueError) as error:
        return (
            f"The state of the reward function '{name_of(reward)}' is not of plain JSON types ({error}), so no "
            "checkpoint can hold it: let its state_dict return numbers, texts, lists and dicts with texts as keys."
        )
    return None


def _folder(args, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
