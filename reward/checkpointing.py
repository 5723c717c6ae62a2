"""The callback that keeps the state of reward functions in a trainer's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lenvm_rl.rollouts import atomic_file
from reward.stateful_penalties import StatefulLengthReward

FILE_NAME = "reward_states.json"


class RewardStates(TrainerCallback):
    """Saves the state of stateful reward functions with each checkpoint, and takes it up when a run is resumed.

    A run that starts anew resets them: a ready-made one may have served an earlier run of the same process. What an
    evaluation moves is undone after it. Reward functions without a state are left alone, so all of a trainer's may be
    given:

        trainer = LenVMGRPOTrainer(model, rewards, config, callbacks=[RewardStates(rewards)], ...)

    Args:
        reward_funcs (sequence of callables): the very objects that the trainer has.
        checkpoint (`str` or path, *optional*):
            Folder of the checkpoint to resume from, where it is not one of the run's own in `output_dir`.

    Raises:
        ValueError: two stateful reward functions have the same name.
    """

    def __init__(self, reward_funcs: Sequence[Callable], checkpoint: str | PathLike | None = None):
        stateful = [reward for reward in reward_funcs if isinstance(reward, StatefulLengthReward)]
        names = [reward.__name__ for reward in stateful]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Stateful reward functions need names of their own, but there are {', '.join(sorted(names))}: set "
                "`__name__` of one of them."
            )
        self.rewards = dict(zip(names, stateful, strict=True))
        self.checkpoint = checkpoint
        self._kept = self._states()

    def on_train_begin(self, args, state, control, **kwargs):
        """Called by the Trainer: begins anew, or takes up the states of the checkpoint that the run goes on from."""
        if not self.rewards:
            return
        if state.global_step == 0:
            for reward in self.rewards.values():
                reward.reset()
        else:
            self._load(Path(self.checkpoint or _folder(args, state)))
        self._kept = self._states()

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after each optimiser step: notes the states, for when an evaluation is over."""
        self._kept = self._states()

    def on_evaluate(self, args, state, control, **kwargs):
        """Called by the Trainer after each evaluation: back to before it."""
        for name, reward in self.rewards.items():
            reward.load_state_dict(self._kept[name])

    def on_save(self, args, state, control, **kwargs):
        """Called by the Trainer when it has written a checkpoint; the first process adds the file."""
        if state.is_world_process_zero:
            self.save_in_checkpoint(_folder(args, state))

    def save_in_checkpoint(self, folder: str | PathLike) -> None:
        """Called by the trainers of `lenvm_rl` before a checkpoint counts as complete; it then has the file."""
        if self.rewards:
            with atomic_file(Path(folder) / FILE_NAME) as file:
                file.write((json.dumps(self._states(), indent=2, allow_nan=False) + "\n").encode())

    def _states(self) -> dict[str, Any]:
        return {name: reward.state_dict() for name, reward in self.rewards.items()}

    def _load(self, folder: Path) -> None:
        path = folder / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {FILE_NAME}, so the state of {', '.join(self.rewards)} is lost. Name the folder that "
                "the run is resumed from, RewardStates(..., checkpoint=...), or start a new run."
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


def _folder(args, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
