"""Runs that must resume exactly, as a function and as a program to be killed: `python resume_runs.py "{…}"`."""

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[1:3]]

import torch
from datasets import Dataset
from tiny import tiny_llama
from trainer_parts import VOCAB, counts_of_w8, first_is_w8, grpo, logged, ppo, prompts, random_lenvm
from transformers.trainer_callback import TrainerState

from reward.length_reward import LengthReward

KILL_AT, SAVED_AT = 12, 20


def stateful():
    """Two reward functions whose knobs move with what they are given."""
    return [
        LengthReward("leash", first_is_w8, target_length=2, multiplier=0.5, rate=0.5),
        LengthReward("laser_d", first_is_w8, candidates=[1, 2, 4, 6], every=3),
    ]


def on_disk(folder):
    """The path of a policy, of which TRL then loads a reference."""
    tiny_llama(VOCAB, seed=1).save_pretrained(folder / "policy")
    return str(folder / "policy")


def stream(folder):
    """Sixty prompts that come one by one."""
    return Dataset.from_list(list(prompts(60))).to_iterable_dataset()


# By name: the settings of a run. `make`, `rewards`, `policy` and `data` are functions, the last two of the folder.
CASES = {
    "ppo_length_target": {
        "make": ppo, "length_target": 2.0, "length_coef": 0.2, "length_coef_rate": 0.3, "length_gate": "all",
        "shaping_coef": 0.5, "lr_scheduler_type": "linear",
    },
    "ppo_accuracy_floor_two_iterations": {
        "make": ppo, "rewards": lambda: [first_is_w8], "accuracy_floor": 0.2, "length_coef": 0.1,
        "length_coef_rate": 0.5, "num_iterations": 2, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4, "critic_warmup_steps": 4, "beta": 0.1, "policy": on_disk,
    },
    # A head on the reference's forward, whose hidden states two iterations and two steps of each share.
    "ppo_critic_head": {
        "make": ppo, "critic_form": "head", "num_iterations": 2, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4, "critic_warmup_steps": 4, "beta": 0.1, "policy": on_disk,
    },
    "ppo_critic_adapter": {"make": ppo, "critic_form": "adapter", "length_coef": 0.3, "beta": 0.1, "policy": on_disk},
    # Six optimizer steps in an epoch of sixteen batches, the last of one batch; four batches of a generation.
    "grpo_uneven_accumulation": {
        "make": grpo, "length_coef": 0.3, "gradient_accumulation_steps": 3, "steps_per_generation": 4,
        "per_device_train_batch_size": 4, "save_steps": 6, "save_at": 18, "data": lambda folder: prompts(16),
    },
    "grpo_stateful_rewards": {"make": grpo, "rewards": stateful, "logging_steps": 3, "length_coef": 0.1},
    # Refreshed after steps 3, 6, 9, 12, on completions of which some are older than the checkpoint.
    "ppo_refresh": {
        "make": ppo, "length_coef": 0.5, "length_gate": "all", "refresh_steps": 3, "refresh_completions": 20,
        "refresh_learning_rate": 1e-2,
    },
    # The same on two processes, each with a group and with random numbers and completions of its own.
    "ppo_refresh_two_processes": {
        "make": ppo, "length_coef": 0.5, "length_gate": "all", "refresh_steps": 3, "refresh_completions": 20,
        "refresh_learning_rate": 1e-2, "per_device_train_batch_size": 4, "ddp_backend": "gloo",
    },
    "grpo_moving_reference": {
        "make": grpo, "policy": on_disk, "beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 3,
        "ref_model_mixup_alpha": 0.5,
    },
    "grpo_stream": {"make": grpo, "length_coef": 0.3, "data": stream},
}  # fmt: skip


def dying(trainer_class, where, saved_at):
    """`trainer_class` that kills its process in a loss, or while a checkpoint is written."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying(trainer_class):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            if where == "loss" and self.state.global_step == KILL_AT and self.accelerator.sync_gradients:
                die()
            return loss

        def _save_optimizer_and_scheduler(self, output_dir):
            if where == "checkpoint" and self.state.global_step == saved_at:
                die()
            super()._save_optimizer_and_scheduler(output_dir)

        def _save_rng_state(self, output_dir):
            super()._save_rng_state(output_dir)
            if where == "trainer_state" and self.state.global_step == saved_at:
                # The last file, of which half is written.
                whole = self.state

                class Half(TrainerState):
                    def save_to_json(self, path):
                        whole.save_to_json(path)
                        os.truncate(path, os.path.getsize(path) // 2)
                        die()

                self.state = Half(stateful_callbacks=whole.stateful_callbacks)

    return Dying


def run(case, folder, resume=None, dies=None):
    """Train, and return everything that must be the same in the end.

    Args:
        case (`str`): of `CASES`.
        folder (`str` or path): `output_dir`.
        resume (`bool` or `str`, *optional*): as in `Trainer.train`.
        dies (`str`, *optional*): `"loss"`, `"checkpoint"` or `"trainer_state"`.
    """
    folder = Path(folder)
    changes = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10, **CASES[case]}
    make, rewards = changes.pop("make"), changes.pop("rewards", lambda: [counts_of_w8])()
    saved_at = changes.pop("save_at", SAVED_AT)
    for name in ("policy", "data"):
        if name in changes:
            changes[name] = changes[name](folder)
    if dies is not None:
        changes["trainer"] = dying(make.__kwdefaults__ or make.__defaults__[2], dies, saved_at)
    trainer = make(folder, rewards, random_lenvm(), **changes)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer, rewards)


def outcome(trainer, rewards):
    """Weights, states and logs, times left out."""
    coefficient, drift = trainer._coefficient.controller, trainer._frozen.drift
    found = {
        "policy": trainer.model.state_dict(),
        "length_value_model": trainer.length_value_model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "coefficient": None if coefficient is None else coefficient.state_dict(),
        "rewards": [reward.state_dict() for reward in rewards if reward not in (counts_of_w8, first_is_w8)],
        "drift": [drift.averages, drift.batches, drift.stale],
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "losses": logged(trainer, "loss"),
        "log": [
            # `train_loss` is the mean over the steps of one process.
            {key: value for key, value in entry.items() if not is_time(key) and key != "train_loss"}
            for entry in trainer.state.log_history
        ],
    }
    if getattr(trainer, "critic", None) is not None:
        found["critic"] = trainer.critic.state_dict()
    return found


def is_time(key):
    return key.startswith("profiling/") or key.endswith(("_time", "_runtime", "_per_second"))


def differences(first, second, where=""):
    """Paths at which two outcomes are not the same to the bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        pairs = [(key, first.get(key), second.get(key)) for key in keys]
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        pairs = [(i, *pair) for i, pair in enumerate(zip(first, second, strict=True))]
    elif isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [where]
    else:
        # NaN is the same as NaN.
        return [] if repr(first) == repr(second) else [where]
    return [path for key, *pair in pairs for path in differences(*pair, f"{where}/{key}")]


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(arguments.pop("threads"))
    result = arguments.pop("result")
    # Of the first process, or the only one; the file of any other has its number.
    rank = os.environ.get("RANK", "0")
    torch.save(run(**arguments), result if rank == "0" else f"{result}.{rank}")
