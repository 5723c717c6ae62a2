"""Hard bounds beside others who bar and force tokens, several ends, and scores at the edges of what numbers hold."""

import math

import pytest
import torch
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.sandbox.scripted import (
    EOS,
    PAD,
    START,
    ScriptedLengthValue,
    ScriptedPolicy,
    geometric_chain,
    random_chain,
)

BARRED = -math.inf
OTHER_END = 5


def world(hazard=0.1):
    chain = geometric_chain(hazard)
    return ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)


def starts(rows=1):
    return torch.full((rows, 1), START)


def kept(scores):
    return [row.isfinite().nonzero().flatten().tolist() for row in scores]


def enforced(mode="at_most", target=2, **settings):
    return LengthGuidance(mode=mode, target_length=target, enforce=True, **settings)


class TestSeveralEnds:
    def test_the_likeliest_end_of_each_row_is_put(self):
        _, value = world()
        for ends in ([EOS, OTHER_END], [OTHER_END, EOS], torch.tensor([OTHER_END, EOS])):
            processor = LengthGuidedLogitsProcessor(value, enforced(target=0), eos_token_id=ends)
            scores = torch.zeros(3, 6)
            scores[0, EOS], scores[1, OTHER_END], scores[2, 3] = 2.0, 2.0, 9.0
            # Of equal ones, the lowest id.
            assert kept(processor(starts(3), scores)) == [[EOS], [OTHER_END], [EOS]]

    def test_it_is_the_policys_and_not_the_candidate_rules(self):
        """Both ends lie below the rule: the rule says nothing of them, the policy does."""
        _, value = world()
        processor = LengthGuidedLogitsProcessor(value, enforced(target=0, top_k=1), eos_token_id=[EOS, OTHER_END])
        assert kept(processor(starts(), torch.tensor([[0.0, 1.0, 9.0, 0.0, 0.0, 2.0]]))) == [[OTHER_END]]

    def test_the_chat_models_end_of_a_turn(self):
        policy, value = tiny_llama(), tiny_length_value_model(tiny_llama(), 0.9, 1).freeze()
        with torch.no_grad():
            policy.lm_head.weight[EOS] = 0.0
            policy.lm_head.weight[OTHER_END] = 0.0
            policy.lm_head.weight[OTHER_END, :] += policy.lm_head.weight[7] * 1e-3
        config = GenerationConfig(eos_token_id=[EOS, OTHER_END], pad_token_id=PAD, max_new_tokens=9)
        ids = torch.randint(6, 64, (6, 4))
        out, report = generate_guided(
            policy, value, ids, enforced("equal_to", 5, top_k=8), generation_config=config, return_report=True
        )
        assert report.lengths.tolist() == [5] * 6 and report.finish_reason == ["eos"] * 6
        states = policy(out[:, :-1]).logits[:, -1]
        expected = torch.where(states[:, EOS] >= states[:, OTHER_END], EOS, OTHER_END)
        assert torch.equal(out[:, 9], expected) and set(expected.tolist()) == {EOS, OTHER_END}

    def test_all_ends_are_barred_before_the_target(self):
        _, value = world()
        processor = LengthGuidedLogitsProcessor(value, enforced("at_least", 3), eos_token_id=[EOS, OTHER_END])
        # Nor is the pad token a candidate: after it one token is to come, where three are left.
        assert kept(processor(starts(), torch.zeros(1, 6))) == [[2, 3, 4]]

    def test_an_id_that_the_policy_has_not_ends_nothing(self):
        _, value = world()
        processor = LengthGuidedLogitsProcessor(value, LengthGuidance(strength=3.0), eos_token_id=[-1, 99])
        plain = LengthGuidedLogitsProcessor(value, LengthGuidance(strength=3.0), eos_token_id=[])
        assert torch.equal(processor(starts(), torch.zeros(1, 6)), plain(starts(), torch.zeros(1, 6)))
        with pytest.raises(ValueError, match="eos_token_id"):
            LengthGuidedLogitsProcessor(value, enforced(), eos_token_id=[-1])(starts(), torch.zeros(1, 6))


class TestOthersWhoBar:
    @pytest.mark.parametrize("mode", ["at_least", "equal_to"])
    @pytest.mark.parametrize("rule", ["feasible", "paper"])
    def test_where_only_the_end_is_allowed_it_stays(self, mode, rule):
        """A grammar says that nothing may follow, a hard bound that something must: the text stays whole."""
        policy, value = world()

        def nothing_follows(batch, ids):
            return [EOS] if len(ids) >= 4 else [3, 4]

        out, report = generate_guided(
            policy,
            value,
            starts(8),
            enforced(mode, 6, rule=rule),
            prefix_allowed_tokens_fn=nothing_follows,
            max_new_tokens=9,
            return_report=True,
        )
        assert bool((out[:, 4] == EOS).all()) and report.lengths.tolist() == [3] * 8
        assert report.overruled.isfinite().all() and bool((report.log_probs[:, 3] == 0).all())
        assert report.forced.max() <= 3

    def test_some_rows_stay_others_are_barred(self):
        _, value = world()
        processor = LengthGuidedLogitsProcessor(value, enforced("at_least", 6, top_k=1), eos_token_id=EOS)
        scores = torch.full((3, 6), BARRED)
        scores[0, EOS] = 1.0
        scores[1, EOS], scores[1, 3] = 5.0, 0.0
        scores[2] = torch.tensor([0.0, 9.0, 1.0, 2.0, 3.0, 0.0])
        assert kept(processor(starts(3), scores)) == [[EOS], [3], [4]]
        # The first row's end is nobody's doing; the others would have ended.
        assert processor.report.forced.tolist() == [0, 1, 1]

    @pytest.mark.parametrize("mode", ["at_least", "equal_to"])
    def test_a_bound_that_a_minimum_length_serves_too(self, mode):
        policy, value = world(0.6)
        out, report = generate_guided(
            policy, value, starts(20), enforced(mode, 4), min_new_tokens=3, max_new_tokens=9, return_report=True
        )
        assert int(report.lengths.min()) >= 4 and report.overruled.isfinite().all()

    def test_without_a_bound_a_barred_end_is_no_candidate(self):
        policy, value = world(0.6)
        for mode in ("at_most", "at_least", "equal_to"):
            guidance = LengthGuidance(mode=mode, target_length=5, rule="paper")
            out, report = generate_guided(
                policy, value, starts(10), guidance, min_new_tokens=3, max_new_tokens=9, return_report=True
            )
            assert int(report.lengths.min()) >= 3 and report.log_probs.isfinite().all()

    def test_the_end_is_put_though_others_bar_it(self):
        """The bound is hard, and the processor has the last word."""
        policy, value = world()
        out, report = generate_guided(
            policy,
            value,
            starts(4),
            enforced("at_most", 3),
            logits_processor=LogitsProcessorList([SuppressTokensLogitsProcessor([EOS], device="cpu")]),
            max_new_tokens=9,
            return_report=True,
        )
        assert report.lengths.tolist() == [3] * 4 and report.forced.tolist() == [1] * 4

    @pytest.mark.parametrize(
        "settings",
        [
            {"forced_eos_token_id": EOS},
            {"suppress_tokens": [3]},
            {"begin_suppress_tokens": [3, 4]},
            {"bad_words_ids": [[3], [4, 4]]},
            {"sequence_bias": [[[3], -20.0]]},
            {"no_repeat_ngram_size": 2},
            {"repetition_penalty": 1.3},
            {"exponential_decay_length_penalty": (2, 1.5)},
            {"remove_invalid_values": True},
            {"renormalize_logits": True},
        ],
    )
    def test_settings_of_generate_act_on_the_policy(self, settings):
        """At strength 0 it is `generate`, token for token; with guidance, what they bar stays barred."""
        chain = random_chain(8, seed=2)
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)
        torch.manual_seed(1)
        stock = policy.generate(starts(20), do_sample=True, top_k=0, max_new_tokens=8, pad_token_id=PAD, **settings)
        torch.manual_seed(1)
        guided = generate_guided(policy, value, starts(20), LengthGuidance(), max_new_tokens=8, **settings)
        assert torch.equal(guided, stock)
        out, report = generate_guided(
            policy, value, starts(20), LengthGuidance(strength=-8.0), max_new_tokens=8, return_report=True, **settings
        )
        assert report.log_probs.isfinite().all()
        if "suppress_tokens" in settings:
            assert not bool((out == 3).any())
        if "forced_eos_token_id" in settings and out.shape[1] == 9:
            assert set(out[:, -1].tolist()) <= {EOS, PAD}


class TestTables:
    """Embedding tables of different size for one tokenizer."""

    def make(self, policy_rows, value_rows):
        policy, value = tiny_llama(vocab_size=policy_rows), tiny_llama(vocab_size=value_rows)
        return policy, tiny_length_value_model(value, 0.9, 1, tiny_tokenizer(60)).freeze()

    @pytest.mark.parametrize(("policy_rows", "value_rows"), [(128, 60), (128, 64), (60, 64), (64, 128)])
    @pytest.mark.parametrize("settings", [{}, {"top_k": 500}, {"top_p": 0.9}, {"top_k": 5}])
    def test_whichever_is_larger(self, policy_rows, value_rows, settings):
        policy, value = self.make(policy_rows, value_rows)
        ids = torch.randint(6, 60, (4, 5))
        for guidance in (LengthGuidance(strength=-5.0, **settings), enforced("equal_to", 6, **settings)):
            out = generate_guided(policy, value, ids, guidance, tokenizer=tiny_tokenizer(60), max_new_tokens=8)
            assert int(out.max()) < max(value_rows, 60)

    def test_a_row_without_guidance_may_use_all_of_the_policys(self):
        policy, value = self.make(128, 64)
        with torch.no_grad():
            # Whatever the policy says, it says of the rows beyond.
            policy.lm_head.weight[:64] = 0.0
            policy.lm_head.weight[64:] *= 5.0
        ids = torch.randint(6, 60, (2, 5))
        several = [LengthGuidance(top_k=4), LengthGuidance(strength=4.0, top_k=4)]
        out, report = generate_guided(
            policy, value, ids, several, tokenizer=tiny_tokenizer(60), max_new_tokens=6, return_report=True
        )
        assert int(out[0, 5:].max()) >= 64 and int(out[1].max()) < 64

    def test_an_end_beyond_the_smaller_table_is_an_end(self):
        policy, value = self.make(128, 64)
        ids, guidance = torch.randint(6, 60, (3, 5)), enforced("at_most", 4, top_k=5)
        out, report = generate_guided(
            policy,
            value,
            ids,
            guidance,
            tokenizer=tiny_tokenizer(60),
            eos_token_id=100,
            max_new_tokens=8,
            return_report=True,
        )
        assert report.lengths.tolist() == [4] * 3 and bool((out[:, 9] == 100).all())

    def test_what_only_another_processor_wants_beyond_it_is_said(self):
        policy, value = self.make(128, 64)
        with pytest.raises(ValueError, match="outside the length value model's vocabulary"):
            generate_guided(
                policy,
                value,
                torch.randint(6, 60, (1, 5)),
                LengthGuidance(strength=1.0, top_k=3),
                tokenizer=tiny_tokenizer(60),
                prefix_allowed_tokens_fn=lambda batch, ids: [90, 91],
                max_new_tokens=3,
            )

    def test_top_k_as_large_as_the_vocabulary_truncates_nothing(self):
        value = ScriptedLengthValue.from_chain(geometric_chain(0.1), 0.9)
        scores, plain = torch.randn(2, 6), LengthGuidance(strength=3.0)
        for top_k in (6, 10**6):
            guidance = LengthGuidance(strength=3.0, top_k=top_k)
            found, expected = (
                LengthGuidedLogitsProcessor(value, each, eos_token_id=EOS)(starts(2), scores)
                for each in (guidance, plain)
            )
            assert torch.equal(found, expected)
        large = ScriptedLengthValue.from_chain(geometric_chain(0.1, vocab_size=64), 0.9)
        processor = LengthGuidedLogitsProcessor(
            large, LengthGuidance(strength=1.0, top_k=10**6), eos_token_id=EOS, same_tokenizer=True
        )
        with pytest.raises(ValueError, match="top_k"):
            processor(starts(), torch.zeros(1, 5000))


class TestNumbers:
    @pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324, 1e40, 1e-10])
    def test_a_temperature_that_scores_cannot_be_divided_by(self, temperature):
        with pytest.raises(ValueError, match="temperature"):
            LengthGuidance(temperature=temperature)
        with pytest.raises(ValueError, match="generation_temperature"):
            LengthGuidedLogitsProcessor(
                world()[1], LengthGuidance(), eos_token_id=EOS, generation_temperature=temperature
            )

    @pytest.mark.parametrize("temperature", [0.0, math.nan, math.inf, -1.0, True, "1"])
    def test_a_temperature_of_generate_that_is_none(self, temperature):
        with pytest.raises(ValueError, match="generation_temperature"):
            LengthGuidedLogitsProcessor(
                world()[1], LengthGuidance(), eos_token_id=EOS, generation_temperature=temperature
            )

    @pytest.mark.parametrize("temperature", [1e-9, 1e9])
    def test_the_smallest_is_greedy_and_the_largest_flat(self, temperature):
        _, value = world()
        scores = torch.tensor([[-50.0, 3.0, 2.0, 40.0, BARRED, 39.0]])
        guided = LengthGuidedLogitsProcessor(
            value, LengthGuidance(strength=2.0, temperature=temperature), eos_token_id=EOS
        )(starts(), scores).softmax(dim=1)
        assert guided.isfinite().all()
        if temperature < 1:
            assert guided[0].tolist() == [0, 0, 0, 1, 0, 0]
        else:
            # The end leads: its value is 0, and the ordinary tokens' is the same.
            assert guided[0, 4] == 0 and guided[0, 1] == guided[0].max()
            torch.testing.assert_close(guided[0, [3, 5]], guided[0, 2:3].expand(2))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("strength", [3.0, -1e9, 1e9])
    def test_scores_of_a_loop_of_ones_own_in_half_precision(self, dtype, strength):
        chain = random_chain(8, seed=3)
        value = ScriptedLengthValue.from_chain(chain, 0.9)
        scores = torch.randn(2, 8).to(dtype)
        guided = LengthGuidedLogitsProcessor(value, LengthGuidance(strength=strength), eos_token_id=EOS)
        found = guided(starts(2), scores)
        expected = guided(starts(2), scores.float())
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        assert found.softmax(dim=1).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_policies_in_half_precision(self, dtype):
        policy, value = tiny_llama().to(dtype), tiny_length_value_model(tiny_llama(), 0.9, 1).to(dtype).freeze()
        out, report = generate_guided(
            policy,
            value,
            torch.randint(6, 64, (3, 5)),
            enforced("equal_to", 6, top_k=8),
            max_new_tokens=9,
            return_report=True,
        )
        assert report.lengths.tolist() == [6] * 3 and report.log_probs.dtype == torch.float32
