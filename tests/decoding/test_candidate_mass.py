"""`candidate_mass`: the tilt among the most probable candidates, the rest as the policy has it, and forwards saved."""

import math

import pytest
import torch
from tiny import tiny_length_value_model, tiny_llama

from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.decoding.guidance import most_probable, tilt, tilt_most_probable
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.sandbox.scripted import EOS, ScriptedLengthValue, random_chain


def test_the_most_probable_carry_the_mass_and_no_fewer_would():
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25, 0.0]]).log()
    for mass, expected in ((0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.76, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert most_probable(scores, mass)[0].nonzero().flatten().tolist() == expected


def test_by_hand():
    """p = (0.5, 0.3, 0.2), strength 2, V = (-0.5, -0.1): weights 0.5/e and 0.3/e^0.2 share the mass 0.8."""
    scores, values = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[-0.5, -0.1, -0.9]])
    first, second = 0.5 * math.exp(-1.0), 0.3 * math.exp(-0.2)
    expected = torch.tensor([[0.8 * first / (first + second), 0.8 * second / (first + second), 0.2]])
    torch.testing.assert_close(tilt_most_probable(scores, values, 2.0, 0.7).exp(), expected)


@pytest.mark.parametrize("strength", [-6.0, 0.5, 9.0])
@pytest.mark.parametrize("mass", [0.3, 0.8, 0.97, 1.0])
def test_the_rest_keeps_its_probability_and_the_others_the_ratios_of_the_tilt(strength, mass):
    torch.manual_seed(0)
    log_probs = (2 * torch.randn(50, 30)).log_softmax(-1).double()
    values = -torch.rand(50, 30).double()
    weighed = most_probable(log_probs, mass)
    exact, ours = (
        tilt(log_probs, values, strength).log_softmax(-1),
        tilt_most_probable(log_probs, values, strength, mass),
    )
    torch.testing.assert_close(ours.exp().sum(-1), torch.ones(50).double())
    assert torch.equal(ours[~weighed], log_probs[~weighed]) and log_probs.exp()[~weighed].sum() <= 50 * (1 - mass)
    # Given that it is one of the weighed, a token is drawn as from the exact tilt.
    for row in range(50):
        own = weighed[row]
        torch.testing.assert_close(ours[row][own].softmax(-1), exact[row][own].softmax(-1))
    # What the values of the others are does not matter: they need not be known.
    assert torch.equal(ours, tilt_most_probable(log_probs, values.masked_fill(~weighed, 0.0), strength, mass))
    if mass == 1.0:
        torch.testing.assert_close(ours, exact)


def test_the_processor_gives_this_distribution():
    chain = random_chain(9, seed=2)
    value = ScriptedLengthValue.from_chain(chain, 0.9)
    guidance = LengthGuidance(strength=8.0, top_k=6, candidate_mass=0.8)
    scores = torch.randn(4, 9)
    processor = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS)
    guided = processor(torch.tensor([[2, 3]] * 4), scores)
    policy = guidance.warpers()(None, scores)
    values = chain.value(0.9).float().expand(4, -1)
    torch.testing.assert_close(
        guided.softmax(-1), tilt_most_probable(policy, values, 8.0, 0.8).softmax(-1), rtol=0, atol=1e-5
    )


class Counted:
    """A policy with given scores at every step, and how many tokens the length value model reads."""

    def __init__(self, guidance, rows=1):
        self.value = tiny_length_value_model(tiny_llama(), 0.9, 1).freeze()
        SlotScorer(self.value).check_length(64)
        self.calls = []
        self.value.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        self.processor = LengthGuidedLogitsProcessor(self.value, guidance, eos_token_id=EOS)
        self.ids = torch.full((rows, 3), 9)

    def step(self, *probabilities):
        """The guided distribution where the tokens from 10 on have these probabilities, for each row."""
        scores = torch.full((len(probabilities), 64), -torch.inf)
        for row, own in enumerate(probabilities):
            scores[row, 10 : 10 + len(own)] = torch.tensor(own).log()
        guided = self.processor(self.ids, scores).softmax(-1)
        self.ids = torch.cat([self.ids, torch.full((len(probabilities), 1), 10)], dim=1)
        return guided[:, 10 : 10 + max(map(len, probabilities))]


def test_where_one_token_carries_the_mass_nothing_is_asked_and_nothing_changes():
    counted = Counted(LengthGuidance(strength=9.0, candidate_mass=0.9))
    for _ in range(3):
        torch.testing.assert_close(counted.step([0.92, 0.05, 0.03]), torch.tensor([[0.92, 0.05, 0.03]]))
    assert counted.calls == []
    # The prompt, three tokens that waited, and the two that are weighed.
    assert float(counted.step([0.6, 0.35, 0.05])[0, 2]) == pytest.approx(0.05)
    assert counted.calls == [3 + 3 + 2]


def test_no_candidate_is_read_that_is_not_weighed():
    """Neither in rows that have many, nor beside those that have few: by the mass, and exactly by min-p and top-p."""
    sharp, flat = [0.8, 0.15, 0.03, 0.02], [0.3, 0.3, 0.2, 0.2]
    for settings, few, many in (
        ({"candidate_mass": 0.9}, 2, 4),
        ({"top_p": 0.9}, 2, 4),
        ({"min_p": 0.1}, 2, 4),
        ({"candidate_mass": 0.6}, 0, 2),
        ({}, 4, 4),
    ):
        counted = Counted(LengthGuidance(strength=3.0, **settings), rows=2)
        counted.step(sharp, flat)
        # A prompt is read where something is weighed.
        assert counted.calls == [(3 + few if few else 0) + 3 + many], settings


def test_completions_where_all_candidates_are_weighed_are_those_of_the_exact_tilt():
    policy, value = tiny_llama(), tiny_length_value_model(tiny_llama(), 0.9, 1).freeze()
    ids, outputs = torch.randint(6, 64, (6, 5)), []
    for settings in ({}, {"candidate_mass": 1 - 1e-6}):
        torch.manual_seed(0)
        guidance = LengthGuidance(strength=6.0, min_p=0.2, **settings)
        outputs.append(generate_guided(policy, value, ids, guidance, max_new_tokens=25))
    assert torch.equal(*outputs)


def test_it_is_for_the_tilt():
    for wrong in (0.0, 1.5, "most"):
        with pytest.raises(ValueError, match="candidate_mass"):
            LengthGuidance(strength=1.0, candidate_mass=wrong)
    with pytest.raises(ValueError, match="candidate_mass.*top_p"):
        LengthGuidance(mode="at_most", target_length=9, candidate_mass=0.9)
