"""Regression targets: by hand, against a loop, and untouched by what stands where no state is."""

import pytest
import torch
from ragged import random_rollouts

from lenvm_rl.pretraining.batches import LengthValueCollator
from lenvm_rl.pretraining.loss import CUT, ENDLESS, FINISHED, IGNORED, length_value_loss, value_targets

GAMMA = 0.9


def test_targets_by_hand():
    # Columns: one finished completion of 3 tokens, then one cut after 2 tokens whose last state is worth -0.4.
    remaining = torch.tensor([[IGNORED, 3, 2, 1, IGNORED, 2, 1, IGNORED]])
    values = torch.tensor([[9.0, -0.1, -0.2, -0.3, 9.0, -0.5, -0.6, -0.4]])
    endings = torch.tensor([[FINISHED] * 5 + [CUT] * 2 + [FINISHED]])
    finished = [-0.875, -0.75, -0.5]
    cut = [-0.75 - 0.25 * 0.4, -0.5 - 0.5 * 0.4]
    expected = torch.tensor([[0.0, *finished, 0.0, *cut, 0.0]])
    torch.testing.assert_close(value_targets(values, remaining, endings, 0.5), expected)
    endless = torch.where(endings == CUT, ENDLESS, endings)
    torch.testing.assert_close(value_targets(values, remaining, endless, 0.5)[0, 5:7], torch.tensor([-1.0, -1.0]))
    # One step of temporal difference: -0.5 + 0.5 V(next).
    td = [-0.5 - 0.5 * 0.2, -0.5 - 0.5 * 0.3, -0.5]
    expected = torch.tensor([[0.0, *td, 0.0, -0.5 - 0.5 * 0.6, -0.5 - 0.5 * 0.4, 0.0]])
    torch.testing.assert_close(value_targets(values, remaining, endings, 0.5, lam=0.0), expected)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 0.9999999])
@pytest.mark.parametrize("truncated", ["bootstrap", "infinite", "finished"])
def test_lambda_returns_equal_a_loop(lam, truncated):
    rollouts = random_rollouts(9, longest=40)
    batch = LengthValueCollator(truncated=truncated)(rollouts)
    values = -torch.rand(batch["labels"].shape, dtype=torch.double)
    targets = value_targets(values, batch["labels"], batch["endings"], GAMMA, lam)
    for rollout, (row, first, length, finished, _, _) in zip(rollouts, batch["sequences"].tolist(), strict=True):
        cut_value = {
            "bootstrap": values[row, min(first + length, values.shape[1] - 1)],
            "infinite": -1.0,
            "finished": 0.0,
        }
        target = 0.0 if finished else cut_value[truncated]
        following = target
        for step in reversed(range(length)):
            target = -(1 - GAMMA) + GAMMA * ((1 - lam) * following + lam * target)
            following = values[row, first + step]
            assert targets[row, first + step] == pytest.approx(float(target), abs=1e-12)
        assert length == len(rollout["completion_ids"])
    if lam > 0.99:
        torch.testing.assert_close(
            targets, value_targets(values, batch["labels"], batch["endings"], GAMMA), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_poison_where_there_is_no_state_changes_nothing(lam):
    batch = LengthValueCollator(row_length=16)(random_rollouts(7, longest=9))
    states = batch["labels"] != IGNORED
    # The value at a cut is read, though it is not fitted.
    read = states.clone()
    for row, first, length, finished, _, _ in batch["sequences"].tolist():
        if not finished:
            read[row, first + length] = True
    clean = -torch.rand(states.shape)
    losses, gradients = [], []
    for poison in (0.0, float("nan"), 999.0):
        values = torch.where(read, clean, torch.full_like(clean, poison)).requires_grad_()
        targets = value_targets(values, batch["labels"], batch["endings"], GAMMA, lam)
        assert not targets.requires_grad
        loss = length_value_loss(values, targets, states)
        loss.backward()
        losses.append(loss.item())
        gradients.append(values.grad)
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert not gradients[0][~states].any()
