"""Exact resuming: a run that was killed and goes on from a checkpoint is the unbroken one, to the last bit.

TRL and transformers keep most of what that takes, and these are the exceptions:

- Completions that were generated and are not used up, and TRL's counter of the batches that they have served. They are
  kept nowhere: checkpoints are written where none are left over, and other settings are refused, at construction where
  that can be known and on resuming where it cannot ([`Generations`]).
- The order of the prompts. TRL's sampler draws each epoch's from a generator of its own, which starts over.
- The end. `Trainer` goes one step beyond a last step that is not the end of an epoch.
- What was measured since the last log.
- A reference model that follows the policy (`sync_ref_model`), which is loaded as it was at first.
- The state of reward functions ([`lenvm_rl.trainers.rewards`]).
- Half of a checkpoint. `Trainer` takes up the last folder, though the run may have died while it was written.

Beyond reach are the random numbers of another program (vLLM), and what is asked for by name: `ignore_data_skip` starts
an epoch over, `dataloader_persistent_workers` gives every evaluation another order.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from datasets import IterableDataset
from safetensors.torch import load_model, save_model
from transformers import TrainerControl, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from lenvm_rl.files import is_complete, last_complete_checkpoint, write_json
from lenvm_rl.trainers.rewards import keep_reward_states
from lenvm_rl.trainers.sharding import engine_of, is_sharded

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"
# What held the state of a run before there was one file for it.
_OF_EARLIER = ("pending_log_rank*.json", "length_coef.json", "length_value_drift.json", "refresh/state.json")


@runtime_checkable
class SavedInCheckpoint(Protocol):
    """A callback with a state of its own, which the trainers write into a checkpoint before that counts as complete."""

    def save_in_checkpoint(self, folder: str) -> None:
        """Write the state to `folder`: called on the process that saves."""


@dataclass(frozen=True)
class Generations:
    """Where in a run, counted in optimizer steps, all completions that were generated are used up.

    Args:
        batches (`int`): batches that one generation serves, ``steps_per_generation * num_iterations``.
        accumulation (`int`): batches of an optimizer step.
        epoch (`int`, *optional*):
            Optimizer steps of a pass through the training set, the last of which may have fewer batches; none for a
            stream. A pass is a whole number of generations.
    """

    batches: int
    accumulation: int
    epoch: int | None

    @property
    def period(self) -> int:
        """Optimizer steps after which, from the start of an epoch, a generation ends with a step; 1 if each does."""
        return self.batches // math.gcd(self.batches, self.accumulation)

    def are_used_up(self, step: int) -> bool:
        """Whether nothing is left over after so many optimizer steps."""
        return (step if self.epoch is None else step % self.epoch) % self.period == 0

    def fits(self, every: int, end: int) -> bool:
        """Whether nothing is left over after every `every` steps of a run of `end` steps, its last step aside."""
        if self.epoch is None or self.epoch % self.period == 0:
            return every >= end or every % self.period == 0
        return all(self.are_used_up(step) for step in range(every, end, every))

    def next_fit(self, every: int, end: int) -> int:
        """The least number of steps above `every` that fits."""
        return next(larger for larger in itertools.count(every + 1) if self.fits(larger, end))


def check_save_steps(args: GRPOConfig, generations: Generations, end: int) -> None:
    """Raise a `ValueError` if the settings would write checkpoints that no run can go on from exactly.

    TRL's default, which nobody chose, is moved to the next number of steps that fits.

    Args:
        args (`trl.GRPOConfig`): of the run. Checkpoints that other events write are seen on resuming.
        generations ([`Generations`]): of the run.
        end (`int`): its optimizer steps.
    """
    steps = {"steps": "save_steps", "best": "eval_steps"}.get(args.save_strategy)
    if steps is None or (steps == "eval_steps" and args.eval_strategy != "steps"):
        return
    given = getattr(args, steps)
    every = math.ceil(end * given) if given < 1 else int(given)
    if every < 1:
        return
    if not generations.fits(every, end):
        if given == type(args).__dataclass_fields__[steps].default and not args.load_best_model_at_end:
            setattr(args, steps, generations.next_fit(every, end))
            logger.warning(
                "%s=%s, the default, would leave completions over, which no checkpoint keeps: set to %d.",
                *(steps, given, getattr(args, steps)),
            )
            return
        raise ValueError(
            f"{steps}={given}{f', every {every} of {end} steps,' if given < 1 else ''} leaves completions over, which "
            f"no checkpoint keeps, so that it could not be resumed exactly: they are used up every "
            f"{generations.period} optimizer steps (steps_per_generation={args.steps_per_generation} * "
            f"num_iterations={args.num_iterations} / gradient_accumulation_steps={args.gradient_accumulation_steps}, "
            f"epochs of {generations.epoch or 'unknown'} steps). Set {steps}={generations.next_fit(every, end)}."
        )
    epoch = generations.epoch
    if steps == "save_steps" and args.eval_strategy == "epoch" and epoch and math.lcm(every, epoch) < end:
        raise ValueError(
            f"save_steps={given} saves at the end of an epoch of {epoch} steps, and eval_strategy='epoch' evaluates "
            "after that, with random numbers that a resumed run would not draw: set save_strategy='epoch', or "
            "eval_strategy='steps'."
        )


def check_optimizer_fits(optimizer: torch.optim.Optimizer, checkpoint: str) -> None:
    """Raise a `ValueError` if the state of the optimizer in a checkpoint belongs to other weights."""
    path = os.path.join(checkpoint, OPTIMIZER_NAME)
    if not os.path.isfile(path):
        return
    # Mapped, so that the state itself is not read for this.
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    there, here = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if there != here:
        raise ValueError(
            f"The optimizer in '{checkpoint}' was training other weights than this run does (groups of {there} and not "
            f"of {here} weights): resume with the same `peft_config`, `critic` and `critic_learning_rate` (0 or above) "
            "and the same frozen weights, or start a new run from its weights (`model=`, and `critic=` for a "
            "critic's)."
        )


def steers_entropy(trainer: GRPOTrainer) -> bool:
    """Whether TRL steers the coefficient of its entropy bonus."""
    return getattr(trainer, "use_adaptive_entropy", False)


@contextmanager
def entropy_at_rest(trainer: GRPOTrainer) -> Iterator[None]:
    """A context in which TRL does not steer that coefficient: a policy that stands still answers none."""
    steered = steers_entropy(trainer)
    trainer.use_adaptive_entropy = False
    try:
        yield
    finally:
        trainer.use_adaptive_entropy = steered


class EntropyCoefficient:
    """TRL's steered entropy coefficient as a part that is saved: TRL writes it behind what makes a checkpoint complete.

    Args:
        trainer (`trl.GRPOTrainer`): with `use_adaptive_entropy`.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = trainer

    def state_dict(self) -> dict[str, float]:
        """The coefficient, and the entropy that it was last measured on (infinite before that)."""
        return {"coefficient": self._trainer.entropy_coef, "entropy": self._trainer._last_world_entropy}

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        """Go on from a state; of checkpoints without one TRL has read a file of its own."""
        if state is not None:
            self._trainer.entropy_coef, self._trainer._last_world_entropy = state["coefficient"], state["entropy"]


class ResumableTrainer(GRPOTrainer):
    """[`trl.GRPOTrainer`] that resumes exactly, see [`lenvm_rl.trainers.resuming`].

    Raises:
        `ValueError`: checkpoints would fall between two generations ([`check_save_steps`]); in `train`, the checkpoint
            is incomplete, or no run can go on from it exactly.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._epochs_behind = 0
        self._pending_log: dict | None = None
        self._reward_states = keep_reward_states(self)
        check_save_steps(self.args, self._generations, self._end)

    @property
    def _generations(self) -> Generations:
        args, epoch = self.args, None
        if not isinstance(self.train_dataset, IterableDataset):
            batches = len(super()._get_train_sampler()) // args.generation_batch_size
            epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
        return Generations(args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps, epoch)

    @property
    def _end(self) -> int:
        """Optimizer steps of the run. Without a length of the training set, `Trainer` insists on `max_steps`."""
        steps = self.args.max_steps
        return steps if steps > 0 else math.ceil(self.args.num_train_epochs * self._generations.epoch)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments, **options):
        """As `Trainer.train`; with `True` it goes on from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in '{self.args.output_dir}' to resume from: start without "
                    "`resume_from_checkpoint`, or give the path of one."
                )
        self._epochs_behind = 0
        if resume_from_checkpoint:
            step = self._check_checkpoint(resume_from_checkpoint)
            self._epochs_behind = step // (self._generations.epoch or self._end)
        try:
            return super().train(resume_from_checkpoint or None, *arguments, **options)
        finally:
            self._epochs_behind = 0

    def _check_checkpoint(self, checkpoint: str) -> int:
        """The step of a checkpoint, or a `ValueError` that says why the run cannot go on from it."""
        if not is_complete(checkpoint):
            earlier = last_complete_checkpoint(os.path.dirname(os.path.abspath(checkpoint)))
            raise ValueError(
                f"The checkpoint '{checkpoint}' has no whole {TRAINER_STATE_NAME}: the run died while it was written. "
                + (f"Resume from '{earlier}'." if earlier else "There is no complete one beside it: start anew.")
            )
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        step, end, generations = state.global_step, self._end, self._generations
        processes = self.accelerator.num_processes
        names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
        found = {path.name for path in Path(checkpoint).glob("rng_state*.pth")}
        problem = None
        if not found:
            problem = "holds the model alone (save_only_model=True)"
        elif found - set(names) or names[self.accelerator.process_index] not in found:
            problem = f"was not written by {processes} processes, as there are now"
        elif step < end and not generations.are_used_up(step):
            problem = (
                f"is of step {step}, between two generations, which end every {generations.period} steps, and "
                "completions that were left over are lost"
            )
        elif step < end and generations.epoch is None and state.epoch > 1:
            problem = "is of a later pass through a stream of prompts, whose length nobody knows"
        elif self._was_evaluated_later(state, end):
            problem = "was written before the evaluation at the end of its epoch (set save_strategy='epoch')"
        if problem is not None:
            raise ValueError(
                f"The checkpoint '{checkpoint}' {problem}: no run can go on from it exactly. Resume from another, or "
                "start a new run from its weights (`model=`)."
            )
        return step

    def _was_evaluated_later(self, state: TrainerState, end: int) -> bool:
        args, epoch = self.args, self._generations.epoch
        ends_an_epoch = epoch is not None and state.global_step % epoch == 0 and state.global_step < end
        return ends_an_epoch and args.eval_strategy == "epoch" and args.save_strategy != "epoch"

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._epochs_behind):
            # The order of an epoch is drawn when its first prompt is.
            next(iter(sampler), None)
        return sampler

    def _run_epoch(self, *arguments, **options):
        self._take_up_log()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def _checkpoint_folder(self, trial) -> str:
        return os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _save_checkpoint(self, model, trial):
        folder = self._checkpoint_folder(trial)
        # A checkpoint that is written over one of an earlier run is incomplete until it is whole again.
        if self.args.should_save:
            Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self._write_state(folder)
        super()._save_checkpoint(model, trial)

    def _moving_parts(self) -> dict[str, Any]:
        """What moves in the course of a run beside its models, by name: each has `state_dict` and `load_state_dict`."""
        return {"entropy_coef": EntropyCoefficient(self)} if steers_entropy(self) else {}

    def _write_state(self, folder: str) -> None:
        """Write what TRL does not: every process calls this, and what follows makes the checkpoint complete."""
        state = {name: part.state_dict() for name, part in self._moving_parts().items()}
        write_json(self._state_file(folder), state | {"log": self._pending(), "engine": engine_of(self)})
        if not self.args.should_save:
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SavedInCheckpoint):
                callback.save_in_checkpoint(folder)
        if self._reference_moves:
            os.makedirs(folder, exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.ref_model), os.path.join(folder, REFERENCE_FILE))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The last that every process writes; the trainer state comes next, and then old checkpoints are removed.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None and not is_sharded(self):
            check_optimizer_fits(self.optimizer, checkpoint)
        # Unlike `_load_from_checkpoint`, this is called whatever the model is sharded by.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._read_state(checkpoint)

    def _read_state(self, checkpoint: str) -> None:
        """Take up what `_write_state` wrote."""
        self._reward_states.resume_from(checkpoint)
        old = [name for pattern in _OF_EARLIER for name in Path(checkpoint).glob(pattern)]
        state = self._state_of(checkpoint)
        if old and not state:
            raise ValueError(
                f"The checkpoint '{checkpoint}' was written by an earlier version ({old[0].name}), whose state this "
                "one does not read: resume with that version, or start a new run from its weights (`model=`)."
            )
        for name, part in self._moving_parts().items():
            part.load_state_dict(state.get(name))
        self._pending_log = state.get("log")
        if self.args.sync_ref_model:
            path = os.path.join(checkpoint, REFERENCE_FILE)
            if not self._reference_moves or not os.path.isfile(path):
                raise ValueError(
                    f"sync_ref_model=True moves the reference model, and '{checkpoint}' does not hold it (it is saved "
                    "by these trainers, and not under FSDP or DeepSpeed): no run can go on from there exactly. Start a "
                    "new run from its weights (`model=`)."
                )
            load_model(self.accelerator.unwrap_model(self.ref_model), path)

    @property
    def _reference_moves(self) -> bool:
        return self.args.sync_ref_model and not is_sharded(self)

    def _state_file(self, folder: str) -> Path:
        return Path(folder, f"lenvm_state_rank{self.accelerator.process_index}.json")

    def _state_of(self, checkpoint: str) -> dict[str, Any]:
        path = self._state_file(checkpoint)
        # One that was written by a trainer of TRL has none.
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _pending(self) -> dict[str, Any] | None:
        """What was measured since the last log, where a checkpoint falls between two."""
        since = self._globalstep_last_logged
        if since == self.state.global_step:
            return None
        metrics = {name: [float(value) for value in values] for name, values in self._metrics["train"].items()}
        return {"metrics": metrics, "loss": self._tr_loss.item(), "since": since}

    def _take_up_log(self) -> None:
        if self._pending_log is None:
            return
        for name, values in self._pending_log["metrics"].items():
            self._metrics["train"][name].extend(values)
        self._tr_loss += self._pending_log["loss"]
        self._globalstep_last_logged = self._pending_log["since"]
        self._pending_log = None


class StopBetweenGenerations(JITCheckpointCallback):
    """Saves and stops at the end of the first step after SIGTERM that leaves no completions over.

    The callback of transformers, which this one replaces, saves at once. In the middle of a step, that step's
    completions are lost, and what they moved (random numbers, a steered coefficient) is saved; after a step, those
    completions are lost that `num_iterations` or `steps_per_generation` still had a use for.

    Args:
        replaced (`JITCheckpointCallback`): its handler of the signal is taken over.
        trainer ([`~lenvm_rl.trainers.resuming.ResumableTrainer`]): knows where completions are used up.
    """

    def __init__(self, replaced: JITCheckpointCallback, trainer: GRPOTrainer):
        super().__init__()
        self.trainer, self.jit_manager = trainer, replaced.jit_manager

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Not here: the step goes on to its end."""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Not here: the step before may have left completions over."""

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Not here: the last step of the epoch has ended already."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Called by the Trainer, on every process; they stop together, whenever each got the signal."""
        asked = torch.tensor([self.jit_manager.is_checkpoint_requested], device=self.trainer.accelerator.device)
        everywhere = self.trainer.accelerator.gather(asked)
        if bool(everywhere.any()) and self.trainer._generations.are_used_up(state.global_step):
            control.should_save = control.should_training_stop = True


def stop_between_generations(trainer: GRPOTrainer) -> None:
    """Replace the callback of `enable_jit_checkpoint`, if there is one, by [`StopBetweenGenerations`]."""
    replaced = trainer.pop_callback(JITCheckpointCallback)
    if replaced is not None:
        trainer.add_callback(StopBetweenGenerations(replaced, trainer))
