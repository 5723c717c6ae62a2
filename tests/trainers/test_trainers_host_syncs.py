"""The trainers make the host wait once per optimizer step: for metrics, decisions and faults in one transfer."""

import pytest
import torch
from host_syncs import counted_syncs
from tiny import tiny_llama
from trainer_parts import VOCAB, first_is_w8, grpo, ppo, random_lenvm
from transformers import TrainerCallback

from lenvm_rl.advantages import gae
from lenvm_rl.returns import trusted_masks
from lenvm_rl.trainers.unread import Unread

BASE = {"length_coef": 0.5, "length_gate": "all", "beta": 0.04}
RUNS = {
    "grpo": (grpo, {}),
    "grpo, steered, with shaping and a centred gate": (
        grpo,
        {
            "length_target": 3.0,
            "length_coef_rate": 0.1,
            "length_gate": "correct",
            "length_gate_center": True,
            "shaping_coef": 0.5,
            "mask_truncated_completions": True,
            "log_completions": True,
        },
    ),
    "ppo": (ppo, {}),
    "ppo, critic='lenvm'": (ppo, {"critic": "lenvm", "task_baseline": "batch", "length_gate": "pass_rate"}),
    "ppo, with all that reads": (
        ppo,
        {
            "target_kl": 0.1,
            "num_iterations": 2,
            "truncation": "bootstrap",
            "length_adaptive_alpha": 0.5,
            "kl_reward_coef": 0.1,
            "kl_reward_target": 0.1,
            "missing_eos_penalty": 1.0,
            "reward_normalization": True,
            "reward_clip": 3.0,
            "whiten": "streams",
            "cliprange_value": 0.2,
        },
    ),
    "ppo, critic_form='head'": (ppo, {"critic_form": "head"}),
    "ppo, several updates of the critic": (ppo, {"critic_updates_per_step": 2, "logging_steps": 2}),
}


class Steps(TrainerCallback):
    """Keeps how much was counted by the end of every optimizer step."""

    def __init__(self, found):
        self.found, self.totals = found, [0]

    def on_step_end(self, args, state, control, **kwargs):
        self.totals.append(self.found.total())


@pytest.mark.parametrize("name", RUNS)
def test_the_host_waits_once_per_optimizer_step(name, tmp_path):
    """Counted are numbers that code of lenvm_rl asks a tensor for (`.item()`, `bool()`, `tolist()`, `cpu()`), shapes
    that depend on one (`nonzero`, indexing by a mask) and lists that it makes tensors of on a named device, in
    optimizer steps with a generation batch of their own: all but the first, in which a head finds out whether it can
    read the reference's forward. An update of the critic alone is a step too. What TRL and transformers ask for
    themselves is not counted, nor what a CPU has no trace of (`.to("cpu")`, a copy that is not asynchronous).
    """
    maker, changes = RUNS[name]
    # From a path, so that there is a reference.
    tiny_llama(VOCAB, seed=1).save_pretrained(tmp_path / "policy")
    trainer = maker(tmp_path, first_is_w8, random_lenvm(), policy=str(tmp_path / "policy"), **{**BASE, **changes})
    with counted_syncs() as found:
        steps = Steps(found)
        trainer.add_callback(steps)
        trainer.train()
    counts = [after - before for before, after in zip(steps.totals, steps.totals[1:], strict=False)]
    assert counts[1:] == [changes.get("critic_updates_per_step", 1)] * 2, found


def test_what_is_counted():
    """A mask that is looked at is one wait; one that is trusted is none; a number that is read is one."""
    values, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for context, expected in ((torch.no_grad(), 1), (trusted_masks(), 0)):
        with counted_syncs() as found, context:
            gae(values, values, mask, 1.0, 1.0)
        assert found.total() == expected
    unread, told = Unread(lambda sums: 2 * sums), []
    with counted_syncs() as found:
        unread.add(torch.tensor([1.0, 2.0]), told.append)
        unread.add_flag(torch.tensor(True), lambda: told.append("a flag"))
        unread.add_flag(torch.tensor(False), lambda: told.append("none"))
        unread.read()
        unread.read()
    assert told == [[2.0, 4.0], "a flag"] and found.total() == 1


def test_numbers_of_a_process_stand_in_the_order_of_processes():
    """Process 1 of 3, where the sum over processes adds the numbers 1, 2 of process 0."""
    told = []
    unread = Unread(lambda sums: sums + torch.tensor([1.0, 2, 0, 0, 0, 0]), 1, 3)
    unread.add_own(torch.tensor([5.0, 6.0]), told.append)
    unread.read()
    assert told == [[1.0, 2.0, 5.0, 6.0, 0.0, 0.0]]
