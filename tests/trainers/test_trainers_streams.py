"""Streams of advantage are those of the policy's own tokens: what nobody chose is as if it were not there."""

import pytest
import torch

from lenvm_rl.advantages import gae
from lenvm_rl.returns import td_residual
from lenvm_rl.shaping import potential_shaping
from lenvm_rl.trainers.streams import Completions

# Tool output in the middle, at the start, at the end, and none; 1 for tokens that the policy chose.
ACTIONS = [[1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
FINISHED = torch.tensor([True, False, False, True])
GAMMA = 0.8


def make_completions():
    width = max(map(len, ACTIONS))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ACTIONS]).bool()
    actions = torch.tensor([row + [0] * (width - len(row)) for row in ACTIONS]).bool()
    return Completions(mask, actions, FINISHED, actions.sum(dim=1))


def rows_alone(completions, *arrays):
    """Each row's arrays at its actions, `(1, n)`, with a mask of ones."""
    for row, actions in enumerate(completions.actions):
        yield row, actions, [array[row, actions][None] for array in arrays], torch.ones(1, int(actions.sum()))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [GAMMA, 1.0])
def test_advantages_across_tool_output_are_those_without_it(lam, gamma):
    completions, states = make_completions(), torch.randn(4, 7)
    values, following = states[:, :-1], completions.following(states)
    rewards = torch.where(completions.actions, torch.randn(4, 6), 0.0)
    # What stands where no action is, a reward too, does not matter.
    paid = torch.where(completions.actions, rewards, 7.0)
    found = gae(paid, values, completions.mask, gamma, lam, following, completions.actions)
    assert bool((found[~completions.actions] == 0).all())
    for row, actions, (paid, read), mask in rows_alone(completions, rewards, values):
        expected = gae(paid, read, mask, gamma, lam, following[row : row + 1])
        torch.testing.assert_close(found[row, actions], expected[0])


def test_residuals_and_shaping_across_tool_output_are_those_without_it():
    completions, states = make_completions(), torch.randn(4, 7)
    values, following = states[:, :-1], completions.following(states)
    mask, actions = completions.mask, completions.actions
    residuals = td_residual(values, mask, GAMMA, following, actions)
    for terminal_cut in (False, True):
        after = torch.zeros(4) if terminal_cut else following
        shaped = potential_shaping(values, completions.mask, GAMMA, after, completions.actions)
        for row, actions, (read,), mask in rows_alone(completions, values):
            end = slice(row, row + 1)
            torch.testing.assert_close(residuals[row, actions], td_residual(read, mask, GAMMA, following[end])[0])
            torch.testing.assert_close(shaped[row, actions], potential_shaping(read, mask, GAMMA, after[end])[0])
        assert bool((shaped[~completions.actions] == 0).all())
    assert bool((residuals[~completions.actions] == 0).all())
