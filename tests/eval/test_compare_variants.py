"""What variants of the trainers make of a batch, by hand: the oracle's charge, and controls of the value model."""

import itertools
import math

import pytest
import torch

from eval.compare.variants import BorrowedValues, ConstantValues, SequenceReturn, WasteOracle, wasted_tokens
from eval.gradient.estimators import of_next_in_group
from lenvm_rl.sandbox.task import TOKENS
from lenvm_rl.trainers import LenVMGRPOConfig
from lenvm_rl.trainers.grpo import grpo_streams
from lenvm_rl.trainers.streams import Batch, Completions, Outcomes, Processes

IDS = {token: index for index, token in enumerate(TOKENS)}
COEFFICIENT = 2.0


class Given:
    """A trainer that is given what it would collect."""

    def __init__(self, read, length_coef=COEFFICIENT):
        self.read = read
        self.args = LenVMGRPOConfig("unused", length_coef=length_coef, use_cpu=True, bf16=False)

    def _collect(self, batch):
        return self.read

    def _streams(self, read):
        return grpo_streams(self.args, read)


def streams_of(variant, read, batch=None, **options):
    trainer = type("Varied", (variant, Given), {"charge": 0.25})(read, **options)
    return trainer._streams(trainer._collect(batch))


def read_of(lengths, correct, group_size, logits=None, relative=None):
    """Finished completions of these lengths, of gamma 1/2; V = -1/2 where no logits `(B, T + 1)` are given."""
    lengths = torch.tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    correct, known = torch.tensor(correct), torch.ones(len(lengths), dtype=torch.bool)
    return Batch(
        completions=Completions(mask, mask, known, lengths - 1),
        outcomes=Outcomes(correct.float(), known, correct, known),
        processes=Processes(group_size),
        relative=torch.zeros(len(lengths)) if relative is None else torch.tensor(relative),
        length_coef=COEFFICIENT,
        gamma=0.5,
        length_logits_bt1=torch.zeros(len(lengths), mask.shape[1] + 1) if logits is None else torch.tensor(logits),
    )


def test_wasted_tokens_by_hand():
    rows = ["c +2 1 redo c 1 wait A 1 <eos>".split(), "A 4 <eos> <pad> <pad> <pad> <pad> <pad> <pad> <pad>".split()]
    ids = torch.tensor([[IDS[token] for token in row] for row in rows])
    mask = torch.tensor([[1] * 10, [1] * 3 + [0] * 7]).bool()
    assert wasted_tokens(ids, mask).tolist() == [[0, 0, 0, 1, 1, 1, 1, 0, 0, 0], [0] * 10]


def test_the_oracle_charges_each_wasted_token_of_correct_completions_at_itself():
    text = "c +2 1 wait A 1 <eos>".split()
    ids = torch.tensor([[IDS[token] for token in text]] * 2)
    read = read_of([7, 7], [True, False], 2, relative=[0.7, -0.7])
    charged = streams_of(WasteOracle, read, {"completion_ids": ids}, length_coef=0.0).advantages
    expected = torch.tensor([[0.7] * 7, [-0.7] * 7])
    expected[0, text.index("wait")] -= 0.25
    torch.testing.assert_close(charged, expected)


class TestControls:
    def test_one_value_is_the_mean_over_states_that_exist(self):
        read = read_of([2, 1], [True, True], 2, logits=[[1.0, 3.0, 9.0], [2.0, 9.0, 9.0]])
        found = type("Varied", (ConstantValues, Given), {})(read)._collect(None)
        assert (found.length_logits_bt1 == 2.0).all() and found.completions is read.completions

    def test_values_of_the_next_row_of_the_group(self):
        values = torch.arange(12.0).view(4, 3)
        mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
        # Row 1 ends after one token, so its first value is held.
        expected = [[3, 3, 3], [0, 1, 1], [9, 10, 10], [6, 7, 7]]
        assert of_next_in_group(values, mask, 2).tolist() == expected
        read = read_of([2, 1, 2, 2], [True] * 4, 2, logits=values.tolist())
        assert type("Varied", (BorrowedValues, Given), {})(read)._collect(None).length_logits_bt1.tolist() == expected

    def test_the_return_of_the_whole_less_that_of_the_others(self):
        # Returns -(1 - 1/2^n) of 1, 2 and 3 tokens are -1/2, -3/4 and -7/8; the means of the others -13/16, -11/16 and
        # -5/8. The third is wrong, so it is not paid, but it is among the others.
        found = streams_of(SequenceReturn, read_of([1, 2, 3], [True, True, False], 3, relative=[0.1, 0.2, -0.3]))
        assert found.length.tolist() == [[0.3125, 0, 0], [-0.0625, -0.0625, 0], [0, 0, 0]]
        paid = [[0.725, 0, 0], [0.075, 0.075, 0], [-0.3, -0.3, -0.3]]
        torch.testing.assert_close(found.advantages, torch.tensor(paid))

    @pytest.mark.parametrize("size", [2, 3])
    @pytest.mark.parametrize("variant", [SequenceReturn, ConstantValues])
    def test_controls_have_the_gradient_of_the_expected_return_at_full_strength(self, variant, size):
        """Over all groups of a policy that stops after one token with probability p, else after two.

        The gradient of the expected return with respect to the first token's logit is p (1 - p) (-1/2 + 3/4).
        """
        p, total = 0.3, 0.0
        for group in itertools.product((1, 2), repeat=size):
            read = read_of(list(group), [True] * size, size)
            first = streams_of(variant, read).advantages[:, 0]
            score = torch.tensor([1 - p if length == 1 else -p for length in group])
            total += math.prod(p if length == 1 else 1 - p for length in group) * float((first * score).mean())
        assert total == pytest.approx(COEFFICIENT * p * (1 - p) * 0.25)
