"""The rules of length guidance, by hand, and the guided completions of worlds in which every length is known."""

import math

import pytest
import torch
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.decoding.guidance import keep_feasible, select_nearest
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.sandbox.scripted import (
    EOS,
    PAD,
    START,
    ScriptedLengthValue,
    ScriptedPolicy,
    countdown_chain,
    geometric_chain,
)

BARRED = -math.inf
# Four tokens: the end, and three that leave 3, 5 and 9 tokens to come.
REMAINING = torch.tensor([[0.0, 3.0, 5.0, 9.0]])
SCORES = torch.tensor([[1.0, 4.0, 2.0, 3.0]])


def kept(scores):
    return (scores > BARRED).nonzero()[:, 1].tolist()


class TestRules:
    @pytest.mark.parametrize(
        ("mode", "left", "chosen"),
        [
            ("equal_to", 5, 2),  # exactly
            ("equal_to", 7, 3),  # 5 and 9 are equally near, 9 is more probable
            ("equal_to", 4, 1),  # 3 and 5 are equally near, 3 is more probable
            ("equal_to", 1, 0),
            ("equal_to", 0, 0),
            ("equal_to", -4, 0),  # too long already: the nearest is the end
            ("at_most", 100, 0),
            ("at_least", 1, 3),
            ("at_least", 0, 0),  # satisfied: the paper's code then ends as soon as it can
        ],
    )
    def test_the_papers(self, mode, left, chosen):
        assert kept(select_nearest(SCORES, REMAINING, mode, left)) == [chosen]

    @pytest.mark.parametrize(
        ("mode", "left", "tolerance", "expected"),
        [
            ("equal_to", 4, 0.25, [1, 2]),
            ("equal_to", 4, 0.2, [1]),  # none: the paper's rule
            ("equal_to", 9, 0.5, [2, 3]),
            ("equal_to", 0, 0.5, [0]),
            ("at_most", 5, 0.0, [0, 1, 2]),
            ("at_most", 0, 0.0, [0]),
            ("at_most", -1, 0.0, [0]),  # none: the smallest
            ("at_least", 5, 0.0, [2, 3]),
            ("at_least", 10, 0.0, [3]),  # none: the largest
            ("at_least", 0, 0.0, [0, 1, 2, 3]),
        ],
    )
    def test_feasible(self, mode, left, tolerance, expected):
        guided = keep_feasible(SCORES, REMAINING, mode, left, tolerance)
        assert kept(guided) == expected
        assert torch.equal(guided[:, expected], SCORES[:, expected])

    def test_barred_candidates_are_never_chosen(self):
        scores = torch.tensor([[BARRED, 4.0, BARRED, 3.0]])
        assert kept(select_nearest(scores, REMAINING, "at_most", 5)) == [1]
        assert kept(keep_feasible(scores, REMAINING, "equal_to", 5, 0.0)) == [1]

    @pytest.mark.parametrize(
        ("left", "patient", "nearest"),
        [
            (1, [1], [0]),  # 3 is too many by 2, the end falls short by 1
            (2, [1], [1]),
            (4, [2], [1]),  # 3 falls short, 5 is as near and does not
            (6, [3], [2]),  # 9 is too many by 3, 5 falls short by 1
            (10, [3], [3]),  # all fall short: the largest
            (0, [0], [0]),
            (-2, [0], [0]),
        ],
    )
    def test_patience_falls_short_only_where_everything_does(self, left, patient, nearest):
        assert kept(keep_feasible(SCORES, REMAINING, "equal_to", left, 0.0, patient=True)) == patient
        assert kept(keep_feasible(SCORES, REMAINING, "equal_to", left, 0.0)) == nearest

    def test_patience_bows_to_what_is_all_there_is(self):
        guidance = LengthGuidance(mode="equal_to", target_length=10, rule="patient")
        alone = torch.tensor([[1.0, BARRED, BARRED, BARRED]])
        assert kept(guidance.guide(alone, None, REMAINING, 3)) == [0]
        # What fits by the tolerance keeps the base distribution, also where it falls short by a little.
        assert kept(guidance.guide(SCORES, None, REMAINING + torch.tensor([0, 6.5, 5.5, 10]), 0)) == [1, 2]

    def test_rows_decide_for_themselves(self):
        scores, remaining = SCORES.repeat(2, 1), torch.cat([REMAINING, REMAINING + 100])
        guided = keep_feasible(scores, remaining, "at_most", 5, 0.0)
        assert (guided > BARRED).tolist() == [[True, True, True, False], [True, False, False, False]]


def countdown(gamma=0.9, longest=8):
    chain = countdown_chain([1.0 / longest] * longest)
    return ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, gamma)


def lengths_of(output, width=1):
    tokens = output[:, width:]
    return ((tokens != PAD) & (tokens != EOS)).sum(dim=1).tolist()


# The scripted policy gives what cannot follow a tiny probability, not none: the candidate rule leaves it out.
POSSIBLE = {"min_p": 1e-6}


def starts(rows=1):
    return torch.full((rows, 1), START)


class TestExactWorld:
    """Theorem 14: what is to come is known for certain after each token, so targets are met to the token."""

    @pytest.mark.parametrize("gamma", [0.5, 0.9, 0.9998])
    @pytest.mark.parametrize("rule", ["paper", "feasible", "patient"])
    @pytest.mark.parametrize("target", [1, 2, 5, 8])
    def test_equal_to_is_exact(self, gamma, rule, target):
        policy, value = countdown(gamma)
        guidance = LengthGuidance(mode="equal_to", target_length=target, rule=rule, **POSSIBLE)
        out = generate_guided(policy, value, starts(16), guidance, max_new_tokens=9)
        assert set(lengths_of(out)) == {target}

    def test_bounds(self):
        policy, value = countdown()
        found = {}
        for mode in ("at_most", "at_least"):
            for rule in ("paper", "feasible"):
                guidance = LengthGuidance(mode=mode, target_length=3, rule=rule, **POSSIBLE)
                out = generate_guided(policy, value, starts(400), guidance, max_new_tokens=9)
                found[mode, rule] = set(lengths_of(out))
        assert found["at_most", "paper"] == {1} and found["at_least", "paper"] == {8}
        # The base policy's own lengths, of which the constraint leaves those that satisfy it.
        assert found["at_most", "feasible"] == {1, 2, 3} and found["at_least", "feasible"] == {3, 4, 5, 6, 7, 8}

    def test_feasible_keeps_the_base_distribution(self):
        chain = countdown_chain([0.1, 0.2, 0.3, 0.4])
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)
        guidance = LengthGuidance(mode="at_most", target_length=3, **POSSIBLE)
        processor = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS)
        scores = processor(starts(), policy(starts()).logits[:, -1])
        probabilities = scores.softmax(dim=1)[0, START + 1 :]
        torch.testing.assert_close(probabilities, torch.tensor([0.1, 0.2, 0.3, 0.0]) / 0.6)

    def test_each_row_has_a_guidance_of_its_own(self):
        policy, value = countdown()
        several = [
            LengthGuidance(mode="equal_to", target_length=6, **POSSIBLE),
            LengthGuidance(mode="at_most", target_length=2, rule="paper", **POSSIBLE),
            LengthGuidance(mode="at_least", target_length=7, rule="paper", **POSSIBLE),
            LengthGuidance(strength=1e4, **POSSIBLE),
            LengthGuidance(mode="equal_to", target_length=3, temperature=0.0, **POSSIBLE),
        ]
        out = generate_guided(policy, value, starts(5), several, max_new_tokens=9, num_return_sequences=2)
        assert lengths_of(out) == [6, 6, 1, 1, 8, 8, 1, 1, 3, 3]

    def test_greedy_rows_stay_greedy_beside_sampled_ones(self):
        policy, value = tiny_llama(), tiny_length_value_model(tiny_llama(), 0.9).freeze()
        ids = torch.randint(6, 64, (4, 5))
        alone = generate_guided(policy, value, ids, LengthGuidance(temperature=0.0), max_new_tokens=8)
        several = [LengthGuidance(temperature=0.0), LengthGuidance(strength=3.0)] * 2
        mixed = generate_guided(policy, value, ids, several, max_new_tokens=8)
        width = min(alone.shape[1], mixed.shape[1])
        assert torch.equal(mixed[::2, :width], alone[::2, :width])
        assert not torch.equal(mixed[1::2, :width], alone[1::2, :width])

    def test_what_is_told_of_a_greedy_row_is_the_same_beside_sampled_ones(self):
        policy, value = tiny_llama(), tiny_length_value_model(tiny_llama(), 0.9).freeze()
        ids = torch.randint(6, 64, (2, 5))
        greedy, sampled = LengthGuidance(strength=3.0, temperature=0.0), LengthGuidance(strength=3.0)
        told = []
        for rows, guidance in ((1, greedy), (2, [greedy, sampled])):
            options = {"max_new_tokens": 5, "min_new_tokens": 5, "return_report": True}
            told.append(generate_guided(policy, value, ids[:rows], guidance, **options)[1].log_probs[0])
        torch.testing.assert_close(told[0], told[1])
        assert bool((told[0] < 0).any())


class TestGeometricWorld:
    """The rest is random, V is the same at every state: what MATH.md, theorem 14, says of the paper's rule."""

    @pytest.mark.parametrize(("gamma", "length"), [(0.9, 24), (0.97, 20), (0.99, 17)])
    def test_the_papers_rule_stops_early_where_the_future_is_random(self, gamma, length):
        # EOS with chance 1/30 at every step, so that the rest is 30 tokens on average, wherever one is.
        chain = geometric_chain(1 / 30)
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, gamma)
        guidance = LengthGuidance(mode="equal_to", target_length=30, rule="paper", **POSSIBLE)
        out = generate_guided(policy, value, starts(3), guidance, max_new_tokens=60)
        # It ends as soon as half of the predicted rest is nearer to the target than all of it.
        predicted = math.log1p(-(1 - gamma) / (1 - gamma * 29 / 30)) / math.log(gamma)
        assert set(lengths_of(out)) == {length} == {math.ceil(30 - predicted / 2)}

    def test_patience_is_exact_where_the_end_is_always_possible(self):
        """The same world, no force: the end can be had at any step, so it can wait until it is due."""
        chain = geometric_chain(1 / 30)
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.97)
        guidance = LengthGuidance(mode="equal_to", target_length=30, rule="patient", **POSSIBLE)
        out, report = generate_guided(policy, value, starts(50), guidance, max_new_tokens=60, return_report=True)
        assert set(lengths_of(out)) == {30} and report.forced.max() == 0

    @pytest.mark.parametrize("mode", ["equal_to", "at_most", "at_least"])
    def test_enforced_bounds_hold_and_force_is_counted(self, mode):
        chain = geometric_chain(0.2)
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)
        guidance = LengthGuidance(mode=mode, target_length=4, enforce=True, **POSSIBLE)
        out, report = generate_guided(policy, value, starts(300), guidance, max_new_tokens=40, return_report=True)
        lengths = torch.tensor(lengths_of(out))
        low, high = {"equal_to": (4, 4), "at_most": (0, 4), "at_least": (4, 40)}[mode]
        assert low == int(lengths.min()) and int(lengths.max()) <= high
        if mode == "at_most":
            # Not barred, only put: where the completion is 4 tokens long, though nearer ends were feasible before.
            assert report.forced.max() == 0
        assert bool((report.overruled >= 0).all()) and report.forced.dtype == torch.int64

    def test_the_force_that_was_needed(self):
        """Exact V of a fixed hazard: n is 4.2, so the paper's rule wants the end with 2 tokens left, and 1."""
        chain = geometric_chain(0.2)
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)
        predicted = math.log1p(-0.1 / (1 - 0.9 * 0.8)) / math.log(0.9)
        wanted = sum(left < predicted / 2 for left in range(1, 11))
        guidance = LengthGuidance(mode="equal_to", target_length=10, rule="paper", enforce=True, **POSSIBLE)
        out, report = generate_guided(policy, value, starts(2), guidance, max_new_tokens=11, return_report=True)
        assert lengths_of(out) == report.lengths.tolist() == [10, 10]
        assert report.forced.tolist() == [wanted] * 2 and report.overruled.tolist() == [float(wanted)] * 2
        assert wanted == 2

    def test_the_force_that_the_only_candidate_takes(self):
        """Nothing but the end is left to choose: barring it is force, though other tokens would be feasible."""
        policy, value = countdown(longest=3)
        guidance = LengthGuidance(mode="at_least", target_length=6, top_k=1, enforce=True)
        out, report = generate_guided(policy, value, starts(2), guidance, max_new_tokens=9, return_report=True)
        assert bool((out[:, 1:7] != EOS).all())
        # A countdown of at most 3 comes to its end at least once in 6 tokens.
        assert report.forced.min() >= 1

    def test_the_end_is_put_where_it_is_no_candidate(self):
        chain = geometric_chain(0.01)
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)
        guidance = LengthGuidance(mode="at_most", target_length=5, top_k=2, enforce=True)
        out, report = generate_guided(policy, value, starts(2), guidance, max_new_tokens=9, return_report=True)
        assert lengths_of(out) == [5, 5] and out[:, -1].tolist() == [EOS, EOS] and report.forced.tolist() == [1, 1]

    def test_without_enforce_nothing_is_forced(self):
        chain = geometric_chain(0.01)
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)
        guidance = LengthGuidance(mode="at_most", target_length=5, top_k=2)
        out, report = generate_guided(policy, value, starts(2), guidance, max_new_tokens=9, return_report=True)
        assert lengths_of(out) == report.lengths.tolist() == [9, 9] and report.forced.tolist() == [0, 0]


class TestForwards:
    def test_no_forward_where_there_is_nothing_to_choose(self):
        policy, tokenizer = tiny_llama(), tiny_tokenizer(64)
        value = tiny_length_value_model(policy, 0.9, 1, tokenizer).freeze()
        # What is asked of a model once, when it is first used, is none of the forwards of a generation.
        SlotScorer(value).check_length(32)
        calls = []
        value.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True)
        ids = torch.randint(6, 64, (1, 5))
        guidance = LengthGuidance(strength=4.0, top_k=1)
        guided = generate_guided(policy, value, ids, guidance, max_new_tokens=12)
        assert torch.equal(guided, policy.generate(ids, max_new_tokens=12, do_sample=False))
        assert calls == []

    def test_a_token_in_doubt_takes_those_along_that_were_not(self):
        """A minimum length leaves one candidate at some steps; cached and full scoring still agree."""
        policy, value = tiny_llama(), tiny_length_value_model(tiny_llama(), 0.9, 1).freeze()
        ids = torch.randint(6, 64, (6, 5))
        outputs = []
        for scoring in ("cached", "full"):
            torch.manual_seed(0)
            guidance = LengthGuidance(strength=6.0, min_p=0.5)
            outputs.append(generate_guided(policy, value, ids, guidance, scoring=scoring, max_new_tokens=25))
        assert torch.equal(*outputs)


class TestRoom:
    @pytest.mark.parametrize("mode", ["equal_to", "at_most", "at_least"])
    def test_a_target_needs_room_for_its_end(self, mode):
        policy, value = countdown()
        guidance = LengthGuidance(mode=mode, target_length=8)
        with pytest.raises(ValueError, match="max_new_tokens"):
            generate_guided(policy, value, starts(), guidance, max_new_tokens=8)
        generate_guided(policy, value, starts(), guidance, max_new_tokens=9)
        generate_guided(policy, value, starts(), guidance, max_length=10)

    def test_guidances_that_do_not_fit_the_prompts(self):
        policy, value = countdown()
        with pytest.raises(ValueError, match="2 guidances do not fit 3 prompts"):
            generate_guided(policy, value, starts(3), [LengthGuidance()] * 2, max_new_tokens=4)
        with pytest.raises(ValueError, match="guided differently"):
            several = [LengthGuidance(), LengthGuidance(strength=1.0)]
            generate_guided(policy, value, starts(2), several, max_new_tokens=4, top_k=3)
