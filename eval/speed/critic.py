"""What a frozen length value model costs a step of GRPO, in each of its forms, in time and in memory.

A step is all of it: completions, rewards, values, loss, backward, optimiser. Each case has a plain step beside it, the
same without the model: of a policy that is trained whole or through adapters, with a reference (`beta` > 0) or without.

- `full`: a model of the policy's size, beside a policy that is trained whole.
- `adapter`: a LoRA adapter and a head on the base of a policy with adapters.
- `head`, `head_adapters`: a head alone on the forward of a reference model, or of the base of a policy with adapters.

Memory tells best of a larger model: `--hidden 512 --layers 8 --batch 4`. Beside it stand the numbers that all models
together hold, shared ones counted once.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from eval.report import Column
from eval.speed.harness import Measurement
from eval.speed.training import TrainingSizes, make_trainer, time_updates
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer

Settings = TrainingSizes
# Form of the model, if there is one; whether the policy has adapters; whether there is a reference.
RUNS = {
    "plain": (None, False, False),
    "full": ("full", False, False),
    "plain_adapters": (None, True, False),
    "adapter": ("adapter", True, False),
    "plain_reference": (None, False, True),
    "head": ("head", False, True),
    "plain_both": (None, True, True),
    "head_adapters": ("head", True, True),
}
CASES = {
    name: f"{form or 'no model'}, policy {'with adapters' if adapters else 'trained whole'}"
    + (", reference" if reference else "")
    for name, (form, adapters, reference) in RUNS.items()
}
BASELINES = {
    "time over plain step": {
        "full": "plain",
        "adapter": "plain_adapters",
        "head": "plain_reference",
        "head_adapters": "plain_both",
    }
}
COLUMNS = (Column("weights held, millions", "count", 2, scale=1e-6),)
BETA = 0.04


def make_run(case: str, settings: Settings, folder: Path) -> LenVMGRPOTrainer:
    """The run of a case, ready for its first step."""
    form, adapters, reference = RUNS[case]
    kinds, beta = (LenVMGRPOTrainer, LenVMGRPOConfig), BETA if reference else 0.0
    return make_trainer(kinds, settings, folder, form, beta=beta, generations=4, adapters=adapters)


def held_numbers(trainer: LenVMGRPOTrainer) -> int:
    """How many numbers the weights of policy, reference and length value model hold, shared ones once."""
    lenvm = trainer.length_value_model
    parts = [trainer.model, trainer.ref_model, lenvm, None if lenvm is None else lenvm.backbone]
    weights = {p.data_ptr(): p.numel() for part in parts if part is not None for p in part.parameters()}
    return sum(weights.values())


def measure(case: str, settings: Settings) -> Measurement:
    """One of the cases, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_run(case, settings, Path(folder))
        return replace(time_updates(trainer, settings), count=held_numbers(trainer))
