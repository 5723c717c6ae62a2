"""Stopping on SIGTERM (`enable_jit_checkpoint`) where a run can be gone on from exactly."""

import torch
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class StopBetweenGenerations(JITCheckpointCallback):
    """Saves and stops at the end of the first step after SIGTERM that leaves no completions over.

    The callback of transformers, which this one replaces, saves at once. In the middle of a step, that step's
    completions are lost, and what they moved (random numbers, a steered coefficient) is saved; after a step, those
    completions are lost that `num_iterations` or `steps_per_generation` still had a use for.

    Args:
        replaced (`JITCheckpointCallback`): its handler of the signal is taken over.
        trainer ([`~lenvm_rl.trainers.resuming.ResumableTrainer`]): knows where completions are used up.
    """

    def __init__(self, replaced: JITCheckpointCallback, trainer):
        super().__init__()
        self.trainer, self.jit_manager = trainer, replaced.jit_manager

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Not here: the step goes on to its end."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Not here: the step before may have left completions over."""

    def on_epoch_end(self, args, state, control, **kwargs):
        """Not here: the last step of the epoch has ended already."""

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer, on every process; they stop together, whenever each got the signal."""
        asked = torch.tensor([self.jit_manager.is_checkpoint_requested], device=self.trainer.accelerator.device)
        everywhere = self.trainer.accelerator.gather(asked)
        if bool(everywhere.any()) and self.trainer._generations.are_used_up(state.global_step):
            control.should_save = control.should_training_stop = True


def stop_between_generations(trainer) -> None:
    """Replace the callback of `enable_jit_checkpoint`, if there is one, by [`StopBetweenGenerations`]."""
    replaced = trainer.pop_callback(JITCheckpointCallback)
    if replaced is not None:
        trainer.add_callback(StopBetweenGenerations(replaced, trainer))
