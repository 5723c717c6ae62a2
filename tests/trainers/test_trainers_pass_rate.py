"""The length stream gated by the share of a prompt's completions that are correct, by hand."""

import pytest
import torch
from datasets import Dataset
from test_trainers_grpo import COMPLETIONS, LENGTH, MASK, VALUES
from trainer_parts import batch_of, grpo, scripted, scripted_lenvm, settings

from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer
from lenvm_rl.trainers.streams import Outcomes, Processes, group_pass_rate

# Two groups of four, of the same completions: one of the first is correct, three of the second.
REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
TASK = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25]).unsqueeze(1)
LENGTHS, MASKS = LENGTH.repeat(2, 1), MASK.repeat(2, 1)
CORRECT = torch.tensor(REWARDS).unsqueeze(1)


def rows(first, second):
    return torch.tensor([first] * 4 + [second] * 4).unsqueeze(1)


def run(folder, rewards=REWARDS, **changes):
    def reward(completions, **kwargs):
        return list(rewards)

    trainer = grpo(
        folder, reward, scripted_lenvm(VALUES), trainer=scripted(LenVMGRPOTrainer, COMPLETIONS * 2),
        # Both end in w6, the token that the first value is read at.
        data=Dataset.from_dict({"prompt": ["w6 w6", "w7 w6"]}),
        max_completion_length=3, scale_rewards="none", length_coef=2.0, **changes,
    )  # fmt: skip
    return batch_of(trainer)["advantages"]


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({"length_gate": "pass_rate"}, rows(0.25, 0.75)),
        ({"length_gate": "correct"}, CORRECT),
        ({"length_gate": "all"}, rows(1.0, 1.0)),
    ],
)
def test_by_hand(tmp_path, changes, gate):
    torch.testing.assert_close(run(tmp_path, **changes), (TASK + 2.0 * gate * LENGTHS) * MASKS)


def test_what_nobody_scored_is_not_in_the_rate_and_not_paid(tmp_path):
    # Of the first group two are scored and one of them is correct; of the second three and two.
    advantages = run(tmp_path, [1.0, None, 0.0, None, 1.0, 1.0, 0.0, None], length_gate="pass_rate")
    scored = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0], [1.0], [1.0], [0.0]])
    third = 1 / 3
    task = torch.tensor([0.5, 0.0, -0.5, 0.0, third, third, -2 * third, 0.0]).unsqueeze(1)
    torch.testing.assert_close(advantages, (task + 2.0 * rows(1 / 2, 2 / 3) * scored * LENGTHS) * MASKS)


def test_a_process_reads_its_own_rows_of_groups_that_span_processes():
    correct = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    scored = torch.tensor([1, 1, 1, 1, 0, 1]).bool()
    everyone = torch.stack([correct & scored, scored], dim=1).long()

    def rate(mine, judged=scored, **processes):
        nothing = torch.zeros(6)[mine]
        return group_pass_rate(Outcomes(nothing, judged[mine], correct[mine], judged[mine]), Processes(3, **processes))

    whole = rate(slice(None))
    assert whole.tolist() == [2 / 3] * 3 + [1 / 2] * 3
    for first in (0, 2, 4):
        mine = slice(first, first + 2)
        found = rate(mine, gather=lambda mine: everyone, first_row=first)
        assert torch.equal(found, whole[mine])
    assert rate(slice(None), torch.zeros(6).bool()).tolist() == [0.0] * 6


def test_the_part_of_the_others_leaves_the_values_a_baseline_and_the_own_part_does_not():
    """Pairs of one token, enumerated: E[p (G - V) grad log pi] with p = (C + C of the other) / 2."""
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    returns, correct = torch.tensor([-0.2, -0.5, -0.9]).double(), torch.tensor([0.0, 1.0, 1.0]).double()
    log_chance = logits.log_softmax(0)
    chance = log_chance.detach().exp()

    def gradient(value, own, others):
        gate = own * correct + others * (chance * correct).sum()
        return torch.autograd.grad((chance * gate * (returns - value) * log_chance).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient(-0.1, 0.0, 0.5), gradient(-0.8, 0.0, 0.5))
    assert float((gradient(-0.1, 0.5, 0.5) - gradient(-0.8, 0.5, 0.5)).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length_gate": "pass_rate", "length_gate_center": True}, "length_gate_center"),
        ({"length_gate": "often"}, "length_gate"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        LenVMGRPOConfig(**settings(tmp_path, **changes))
