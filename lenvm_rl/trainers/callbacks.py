"""Callbacks that the trainers add by themselves: the metrics file, and the gradients of the critic."""

import json
import math
import os
from pathlib import Path

from transformers import TrainerCallback

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends everything that is logged to `output_dir/metrics.jsonl`, one JSON object per line.

    Every line has `step`. A run starts with a line ``{"event": "train_begin", "step": …}``: after a resumed run, the
    lines before it with a larger step belong to what was lost. NaN and infinity are written as null.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._append(args, {"event": "train_begin", "step": state.global_step})

    def on_log(self, args, state, control, **kwargs):
        # Not `logs`: the progress bar takes entries out of it.
        if state.is_world_process_zero:
            self._append(args, {key: _plain(value) for key, value in state.log_history[-1].items()})

    @staticmethod
    def _append(args, entry) -> None:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(os.path.join(folder, METRICS_FILE), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


class CriticGradientReset(TrainerCallback):
    """Clears the critic's gradients after each step: `Trainer` clears only those of the model it knows.

    Args:
        critic (`torch.nn.Module`): the task critic, as it is trained.
    """

    def __init__(self, critic):
        self.critic = critic

    def on_step_end(self, args, state, control, **kwargs):
        self.critic.zero_grad()


def _plain(value):
    """A number or string that JSON can hold."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
