"""Tilting: the closed form of a KL problem, and its effect on whole completions by exact enumeration."""

import math

import pytest
import torch

from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.decoding.guidance import tilt
from lenvm_rl.sandbox.scripted import (
    EOS,
    PAD,
    START,
    ScriptedLengthValue,
    ScriptedPolicy,
    countdown_chain,
    geometric_chain,
    random_chain,
)

GAMMA = 0.9


def scripted(chain):
    return ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, GAMMA)


def expectation(log_probs, values):
    return (log_probs.exp() * values).sum(-1)


def divergence(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class TestTilt:
    """The closed form of the problem: maximise strength * E[V] - KL(p' || p)."""

    def setup_method(self):
        generator = torch.Generator().manual_seed(0)
        self.log_probs = torch.randn(4, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
        self.values = -torch.rand(4, 9, generator=generator, dtype=torch.float64)

    def objective(self, log_candidate, strength):
        return strength * expectation(log_candidate, self.values) - divergence(log_candidate, self.log_probs)

    @pytest.mark.parametrize("strength", [-3.0, 0.7, 20.0])
    def test_nothing_near_or_far_is_better(self, strength):
        best = self.objective(tilt(self.log_probs, self.values, strength).log_softmax(-1), strength)
        # The maximum is known too: the log of the normaliser.
        normaliser = (self.log_probs + strength * self.values).logsumexp(-1)
        torch.testing.assert_close(best, normaliser)
        for scale in (1e-3, 0.1, 1.0, 10.0):
            noise = scale * torch.randn(200, 4, 9, dtype=torch.float64)
            others = (tilt(self.log_probs, self.values, strength).log_softmax(-1) + noise).log_softmax(-1)
            assert bool((self.objective(others, strength) < best).all())

    def test_a_numeric_optimizer_finds_it(self):
        logits = torch.zeros(4, 9, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], lr=0.5, max_iter=500, tolerance_change=1e-16, tolerance_grad=1e-12)

        def closure():
            optimizer.zero_grad()
            loss = -self.objective(logits.log_softmax(-1), 2.0).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        expected = tilt(self.log_probs, self.values, 2.0).log_softmax(-1).exp()
        torch.testing.assert_close(logits.detach().softmax(-1), expected, rtol=0, atol=1e-6)

    def test_the_expected_value_rises_at_the_rate_of_its_variance(self):
        strength = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        mean = expectation((self.log_probs + strength * self.values).log_softmax(-1), self.values)
        log_probs = tilt(self.log_probs, self.values, 1.3).log_softmax(-1)
        variance = expectation(log_probs, self.values**2) - expectation(log_probs, self.values) ** 2
        for row in range(4):
            (slope,) = torch.autograd.grad(mean[row], strength, retain_graph=True)
            assert float(slope) == pytest.approx(float(variance[row]))

    def test_it_tends_to_the_candidate_nearest_the_end(self):
        self.log_probs[:, 3] = -math.inf
        self.values[:, 3] = 0.0
        log_probs = tilt(self.log_probs, self.values, 1e5).log_softmax(-1)
        nearest = self.values.index_fill(1, torch.tensor([3]), -math.inf).argmax(-1)
        torch.testing.assert_close(log_probs.exp().gather(1, nearest[:, None]), torch.ones(4, 1, dtype=torch.float64))


class TestExactValue:
    """With an exact value, whole completions are known by enumeration: no sampling."""

    @pytest.mark.parametrize("seed", range(5))
    def test_the_expected_discount_rises_with_strength_from_every_state(self, seed):
        chain = random_chain(8, seed)
        base = chain.value(GAMMA)
        for strength in (0.1, 1.0, 5.0, 30.0):
            assert bool((chain.tilted(strength, base).value(GAMMA) >= base - 1e-12).all())
            assert bool((chain.tilted(-strength, base).value(GAMMA) <= base + 1e-12).all())
            assert bool((chain.tilted(strength, base).value(GAMMA)[START:] > base[START:] + 1e-6).all())

    def test_a_geometric_policy_by_hand(self):
        # V is one number v everywhere but at the end: the odds of ending grow by exp(-strength * v).
        hazard, strength = 0.1, 2.0
        chain = geometric_chain(hazard)
        value = -(1 - GAMMA) / (1 - GAMMA * (1 - hazard))
        odds = hazard / (1 - hazard) * math.exp(-strength * value)
        tilted = chain.tilted(strength, chain.value(GAMMA))
        torch.testing.assert_close(
            tilted.mean_length()[START:], torch.full((4,), (1 + odds) / odds, dtype=torch.float64)
        )

    @pytest.mark.parametrize("strength", [-4.0, 0.0, 3.0])
    def test_the_processor_gives_the_tilted_chain(self, strength):
        chain = random_chain(8, seed=4)
        policy, value = scripted(chain)
        processor = LengthGuidedLogitsProcessor(value, LengthGuidance(strength=strength), eos_token_id=EOS)
        ids = torch.arange(START, 8).unsqueeze(1)
        scores = processor(ids, policy(ids).logits[:, -1])
        expected = chain.tilted(strength, chain.value(GAMMA)).transition[START:]
        torch.testing.assert_close(scores.softmax(-1).double(), expected, rtol=0, atol=1e-6)

    def test_sampled_lengths_follow_the_tilted_chain(self):
        chain = random_chain(8, seed=5, min_hazard=0.1)
        policy, value = scripted(chain)
        tilted = chain.tilted(4.0, chain.value(GAMMA))
        ids = torch.full((4000, 1), START)
        with torch.no_grad():
            out = generate_guided(policy, value, ids, LengthGuidance(strength=4.0), max_new_tokens=80)
        lengths = (out[:, 1:] != PAD).sum(1).double()
        mean = float(tilted.mean_length()[START])
        assert abs(mean - float(chain.mean_length()[START])) > 1.0
        assert abs(float(lengths.mean()) - mean) < 4 * float(lengths.std()) / math.sqrt(4000)

    def test_an_infinite_countdown_choice_is_the_shortest_or_the_longest(self):
        policy, value = scripted(countdown_chain([0.2, 0.5, 0.2, 0.1]))
        for strength, length in ((1e4, 1), (-1e4, 4)):
            guidance = LengthGuidance(strength=strength)
            out = generate_guided(policy, value, torch.tensor([[START]] * 50), guidance, max_new_tokens=9)
            # Completions are read without their end-of-sequence token.
            assert set(((out[:, 1:] != PAD) & (out[:, 1:] != EOS)).sum(1).tolist()) == {length}
