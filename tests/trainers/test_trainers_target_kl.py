"""A policy that has moved far from the one that sampled a batch rests until the next, and its critic goes on."""

import math

import pytest
import torch
from test_trainers_coefficient import table
from trainer_parts import first_is_w8, ppo, random_lenvm
from transformers import TrainerCallback

from lenvm_rl.trainers.divergence import BatchDivergence, approximate_kl, beyond_clip
from lenvm_rl.trainers.metrics import BatchMetrics, add_divergence
from lenvm_rl.trainers.unread import Unread


def test_the_estimate_by_hand():
    found = approximate_kl(torch.log(torch.tensor([0.5, 0.25, 0.25])), torch.log(torch.tensor([0.25, 0.5, 0.25])))
    torch.testing.assert_close(found, torch.tensor([1 - math.log(2), math.log(2) - 0.5, 0.0]))


@pytest.mark.parametrize(("target", "stops"), [(0.21, False), (0.19, True)])
def test_a_step_decides_over_all_of_its_micro_batches_and_processes(target, stops):
    """Two micro-batches of 3 tokens with sums .3 and .9, as on another process: the mean is 1.2 / 6 = .2."""
    unread, divergence, mask = Unread(lambda sums: 2 * sums), BatchDivergence(target), torch.tensor([[1, 1, 1, 0]])

    def micro_batch(step, each):
        found = torch.tensor([[each, each, each, 50.0]])
        add_divergence(step, found, found, None, mask, None)

    def begin():
        step = BatchMetrics()
        unread.add_metrics(step, lambda read: divergence.observe(read["policy/approx_kl"]))
        return step

    step = begin()
    micro_batch(step, 0.1)
    assert not divergence.stopped
    micro_batch(step, 0.3)
    unread.read()
    assert divergence.stopped == stops
    # A batch that it stopped in stays so until the next.
    micro_batch(begin(), 0.0)
    unread.read()
    assert divergence.stopped == stops
    divergence.begin()
    assert not divergence.stopped


class Weights(TrainerCallback):
    """Keeps a weight of the policy and of the critic after every optimizer step."""

    def __init__(self):
        self.kept = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.kept.append([part.detach().clone() for part in self.parts()])


def run(folder, **settings):
    kept = Weights()
    rates = {"learning_rate": 0.02, "critic_learning_rate": 0.02}
    settings = {"num_iterations": 4, "max_steps": 8, "logging_steps": 1} | rates | settings
    trainer = ppo(folder, first_is_w8, random_lenvm(), **settings)
    kept.parts = lambda: (
        [next(trainer.model.parameters())]
        + ([] if trainer.critic is None else [trainer.accelerator.unwrap_model(trainer.critic).head.output.weight])
    )
    trainer.add_callback(kept)
    trainer.train()
    moved = [
        [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        for before, after in zip(kept.kept, kept.kept[1:], strict=False)
    ]
    return trainer, [each[0] for each in moved], [each[-1] for each in moved]


def test_the_policy_rests_and_the_critic_learns(tmp_path):
    trainer, policy, critic = run(tmp_path, target_kl=1e-6)
    # The first step of a batch moves; the second, which is the first to see how far, moves too; then it rests.
    assert policy == [True, False, False, True, True, False, False]
    assert all(critic)
    stopped = [entry["policy/stopped"] for entry in trainer.state.log_history if "policy/stopped" in entry]
    assert stopped == [0, 0, 1, 1, 0, 0, 1, 1]
    divergence = [entry["policy/approx_kl"] for entry in trainer.state.log_history if "policy/approx_kl" in entry]
    assert divergence[0] == pytest.approx(0.0, abs=1e-6) and divergence[1] > 1e-6
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith("policy/")}
    promised = table("Divergence within a batch")
    assert names == {name.replace("<k>", str(number)) for name in promised for number in (1, 2, 3, 4)}


def test_passes_can_be_told_apart_however_often_a_run_logs(tmp_path):
    """A line for two batches of four passes has each pass's mean over the two, and over all the mean of the passes."""
    lines = []
    for every in (1, 8):
        trainer, _, _ = run(tmp_path, logging_steps=every, num_generations=1, epsilon=0.01)
        lines.append([entry for entry in trainer.state.log_history if "policy/approx_kl" in entry])
    steps, (line,) = lines
    wholes = {"approx_kl": "policy/approx_kl", "ratio": "policy/ratio", "clip_fraction": "clip_ratio/region_mean"}
    for name, whole in wholes.items():
        passes = [line[f"policy/pass_{number}/{name}"] for number in (1, 2, 3, 4)]
        for number in (1, 2, 3, 4):
            of_pass = [entry[whole] for entry in steps[number - 1 :: 4]]
            assert len(of_pass) == 2 and passes[number - 1] == pytest.approx(sum(of_pass) / 2, rel=1e-5, abs=1e-7)
        assert line[whole] == pytest.approx(sum(passes) / 4, rel=1e-5, abs=1e-7)
    # The first pass is on-policy, and each goes further.
    moved = [line[f"policy/pass_{number}/approx_kl"] for number in (1, 2, 3, 4)]
    assert moved[0] == pytest.approx(0.0, abs=1e-6) and moved == sorted(moved)
    assert line["policy/pass_4/clip_fraction"] > 0


def test_where_the_clipped_loss_has_no_gradient():
    ratio, advantages = torch.tensor([0.7, 0.7, 1.4, 1.4, 1.1]), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert beyond_clip(ratio, advantages, 0.2, 0.3).tolist() == [False, True, True, False, False]


def test_without_a_target_or_within_it_every_step_moves(tmp_path):
    for target in (None, 1e9):
        _, policy, _ = run(tmp_path, target_kl=target)
        assert all(policy)


def test_without_a_learned_critic_nothing_moves_while_it_rests(tmp_path):
    _, policy, _ = run(tmp_path, target_kl=1e-6, critic="lenvm", length_coef=0.5, length_gate="all")
    assert policy == [True, False, False, True, True, False, False]
