"""Length-guided decoding: exactness at strength 0, guidance inside `generate`, and what is refused."""

import math

import pytest
import torch
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig, LogitsProcessorList

from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.decoding.guidance import tilt
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.sandbox.scripted import (
    EOS,
    PAD,
    START,
    ScriptedConfig,
    ScriptedLengthValue,
    ScriptedPolicy,
    countdown_chain,
    geometric_chain,
)

GAMMA = 0.9


def scripted(chain):
    return ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, GAMMA)


def transformer(seed=1, vocab_size=64):
    policy, tokenizer = tiny_llama(vocab_size=vocab_size, seed=seed), tiny_tokenizer(vocab_size)
    return tiny_length_value_model(policy, GAMMA, seed, tokenizer).freeze()


def prompts(rows=6):
    ids = torch.randint(6, 64, (rows, 5))
    mask = torch.ones_like(ids)
    ids[::2, :2] = PAD
    mask[::2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


class TestStrengthZero:
    """The base model, token for token, at the same seed."""

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"temperature": 0.7},
            {"temperature": 1.3, "top_k": 5},
            {"top_p": 0.8},
            {"min_p": 0.05, "top_k": 20, "temperature": 0.9},
        ],
    )
    def test_generate_guided_is_generate(self, settings):
        policy, value, inputs = tiny_llama(), transformer(), prompts()
        torch.manual_seed(3)
        stock = policy.generate(**inputs, max_new_tokens=12, **{"do_sample": True, "top_k": 0, **settings})
        torch.manual_seed(3)
        guided = generate_guided(policy, value, inputs, LengthGuidance(**settings), max_new_tokens=12)
        assert torch.equal(guided, stock)

    def test_greedy_and_no_matter_what_the_model_config_says(self):
        policy, value, inputs = tiny_llama(), transformer(), prompts()
        stock = policy.generate(**inputs, max_new_tokens=12, do_sample=False)
        policy.generation_config = GenerationConfig(
            do_sample=True, temperature=0.3, top_k=4, top_p=0.5, min_p=0.2, eos_token_id=EOS, pad_token_id=PAD
        )
        guided = generate_guided(policy, value, inputs, LengthGuidance(temperature=0), max_new_tokens=12)
        assert torch.equal(guided, stock)

    def test_the_processor_leaves_the_scores_alone_whatever_generate_does_next(self):
        processor = LengthGuidedLogitsProcessor(
            transformer(), LengthGuidance(temperature=0.7), eos_token_id=EOS, generation_temperature=0.7
        )
        scores = torch.randn(2, 64)
        assert torch.equal(processor(torch.full((2, 3), 7), scores), scores)


class TestGenerate:
    def test_guided_tokens_are_drawn_from_the_tilted_policy(self):
        """Every step's scores against separate full forwards of both models, padding and finished rows included."""
        policy, value, inputs = tiny_llama(), transformer(), prompts()
        guidance = LengthGuidance(strength=8.0, temperature=0.8, top_k=7)
        out = generate_guided(
            policy, value, inputs, guidance, max_new_tokens=10, output_scores=True, return_dict_in_generate=True
        )
        checked = 0
        for row in range(6):
            prefix = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            for step, token in enumerate(out.sequences[row, 5:]):
                kept = out.scores[step][row].isfinite().nonzero().squeeze(1)
                logits = policy(prefix.unsqueeze(0)).logits[0, -1] / 0.8
                assert set(kept.tolist()) == set(logits.topk(7).indices.tolist())
                states = torch.stack([torch.cat([prefix, candidate.view(1)]) for candidate in kept])
                values = value(states).values[:, -1].masked_fill(kept == EOS, 0.0)
                expected = tilt(logits[kept], values, 8.0).log_softmax(-1)
                torch.testing.assert_close(out.scores[step][row, kept].log_softmax(-1), expected, rtol=0, atol=1e-4)
                prefix = torch.cat([prefix, token.view(1)])
                checked += 1
                if token == EOS:
                    break
        assert 20 <= checked < 60

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_cached_and_full_scoring_agree(self, temperature):
        policy, value, inputs = tiny_llama(), transformer(), prompts()
        guidance = LengthGuidance(strength=5.0, temperature=temperature, top_p=0.9)
        results = []
        for scoring in ("cached", "full"):
            torch.manual_seed(1)
            results.append(generate_guided(policy, value, inputs, guidance, scoring=scoring, max_new_tokens=15))
        assert torch.equal(*results)

    def test_greedy_decoding_is_guided(self):
        policy, value = scripted(countdown_chain([0.3, 0.4, 0.3]))
        lengths = []
        for strength in (-20.0, 0.0, 20.0):
            guidance = LengthGuidance(strength=strength, temperature=0)
            out = generate_guided(policy, value, torch.tensor([[START]]), guidance, max_new_tokens=9)
            lengths.append(int(((out[:, 1:] != PAD) & (out[:, 1:] != EOS)).sum()))
        assert lengths == [3, 2, 1]

    def test_several_samples_of_a_prompt_and_reuse_of_one_processor(self):
        policy, value, inputs = tiny_llama(), transformer(), prompts(3)
        guidance = LengthGuidance(strength=4.0, top_k=6)
        torch.manual_seed(2)
        grouped = generate_guided(policy, value, inputs, guidance, num_return_sequences=2, max_new_tokens=8)
        repeated = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in inputs.items()}
        processor = LengthGuidedLogitsProcessor(
            value, guidance, eos_token_id=EOS, attention_mask=repeated["attention_mask"]
        )
        for _ in range(2):
            torch.manual_seed(2)
            alone = policy.generate(**repeated, logits_processor=[processor], do_sample=True, top_k=0, max_new_tokens=8)
            assert torch.equal(alone, grouped)

    def test_new_prompts_one_token_longer_are_not_taken_for_a_continuation(self):
        value, guidance = transformer(), LengthGuidance(strength=5.0)
        scores = torch.randn(2, 64)
        used = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS)
        used(torch.randint(6, 64, (2, 4)), scores)
        other = torch.randint(6, 64, (2, 5))
        fresh = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS)
        torch.testing.assert_close(used(other, scores), fresh(other, scores))

    def test_padding_is_told_by_the_mask_or_by_the_pad_token_and_matters(self):
        value, guidance, inputs = transformer(), LengthGuidance(strength=5.0), prompts()
        scores = torch.randn(6, 64)

        def guided(**padding):
            processor = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS, **padding)
            return processor(inputs["input_ids"], scores)

        by_mask = guided(attention_mask=inputs["attention_mask"])
        assert torch.equal(guided(pad_token_id=PAD), by_mask)
        changed = (guided() - by_mask).abs().amax(dim=1)
        assert changed[::2].min() > 0.1 and changed[1::2].max() < 1e-4

    def test_one_forward_for_each_token_though_rows_finish(self):
        policy, value, inputs = tiny_llama(), transformer(), prompts(40)
        # What is asked of a model once, when it is first used, is none of the forwards of a generation.
        SlotScorer(value).check_length(64)
        calls = []
        value.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True)
        guidance = LengthGuidance(strength=2.0, top_k=8)
        _, report = generate_guided(policy, value, inputs, guidance, max_new_tokens=30, return_report=True)
        assert report.lengths.min() < 10 and report.lengths.max() == 30
        assert len(calls) == 30
        # After the prompts, no more tokens than the candidates of the rows that go on.
        for step, call in enumerate(calls[1:], 1):
            assert call.shape[0] == 1 and call.numel() <= 8 * int((report.lengths >= step).sum())
        assert 0 < calls[-1].numel() < 8 * 20

    def test_the_temperature_of_generate_can_be_accounted_for(self):
        policy, value, inputs = tiny_llama(), transformer(), prompts()
        guidance = LengthGuidance(strength=4.0, temperature=0.6, top_k=6)
        torch.manual_seed(2)
        expected = generate_guided(policy, value, inputs, guidance, max_new_tokens=8)
        processor = LengthGuidedLogitsProcessor(
            value, guidance, eos_token_id=EOS, pad_token_id=PAD, generation_temperature=0.5
        )
        torch.manual_seed(2)
        given = policy.generate(
            **inputs, logits_processor=[processor], do_sample=True, top_k=0, temperature=0.5, max_new_tokens=8
        )
        assert torch.equal(given, expected)

    def test_other_processors_act_on_the_policy_before_the_tilt(self):
        policy, value, inputs = tiny_llama(), transformer(), prompts()

        def bar_even_tokens(input_ids, scores):
            return scores.index_fill(1, torch.arange(0, 64, 2), -math.inf)

        out = generate_guided(
            policy,
            value,
            inputs,
            LengthGuidance(strength=3.0),
            logits_processor=LogitsProcessorList([bar_even_tokens]),
            max_new_tokens=6,
        )
        drawn = out[:, 5:]
        assert bool(((drawn % 2 == 1) | (drawn == PAD)).all())

    def test_a_minimum_length_holds_although_the_tilt_wants_the_end(self):
        policy, value = scripted(geometric_chain(0.5))
        out = generate_guided(
            policy, value, torch.tensor([[START]] * 8), LengthGuidance(strength=1e4), min_new_tokens=4, max_new_tokens=9
        )
        assert ((out[:, 1:] != PAD).sum(1) == 5).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mode": "beta"}, "mode must be one of tilt, equal_to, at_most, at_least"),
            ({"mode": "equal_to"}, "needs target_length"),
            ({"mode": "equal_to", "target_length": 3.5}, "whole number"),
            ({"mode": "equal_to", "target_length": -1}, "whole number"),
            ({"mode": "at_most", "target_length": 3, "strength": 1.0}, "strength means nothing"),
            ({"mode": "at_most", "target_length": 3, "rule": "best"}, "paper, feasible, patient"),
            ({"mode": "at_most", "target_length": 3, "rule": "patient"}, "is for mode=.equal_to"),
            ({"mode": "at_most", "target_length": 3, "tolerance": 0.1}, "tolerance belongs to"),
            ({"mode": "equal_to", "target_length": 3, "rule": "paper", "tolerance": 0.1}, "tolerance belongs to"),
            ({"mode": "equal_to", "target_length": 3, "tolerance": 1.0}, "in .0, 1."),
            ({"mode": "equal_to", "target_length": 3, "enforce": "yes"}, "enforce must be"),
            ({"rule": "paper"}, "rule means nothing"),
            ({"target_length": 30}, "target_length"),
            ({"enforce": False}, "enforce"),
            ({"strength": math.nan}, "strength"),
            ({"strength": 1e39}, "strength must be a number of at most 1e.09"),
            ({"strength": 10**400}, "strength must be"),
            ({"strength": True}, "strength must be"),
            ({"temperature": -1.0}, "temperature"),
            ({"top_k": -1}, "top_k"),
            ({"top_p": 0.0}, "top_p"),
            ({"min_p": 1.5}, "min_p"),
        ],
    )
    def test_guidance_that_makes_no_sense(self, fields, message):
        with pytest.raises(ValueError, match=message):
            LengthGuidance(**fields)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"temperature": 0.5}, "contradicts"),
            ({"do_sample": False}, "contradicts"),
            ({"top_k": 50}, "contradicts"),
            ({"generation_config": GenerationConfig(top_p=0.9)}, "contradicts"),
            ({"typical_p": 0.9}, "typical_p"),
            ({"num_beams": 2}, "beam"),
            ({"assistant_model": object()}, "assistant_model"),
        ],
    )
    def test_arguments_that_guidance_cannot_be_combined_with(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            generate_guided(tiny_llama(), transformer(), prompts(), LengthGuidance(strength=1.0), **arguments)

    def test_arguments_that_say_the_same_are_welcome(self):
        guidance = LengthGuidance(strength=1.0, temperature=0.5, top_k=3)
        out = generate_guided(
            tiny_llama(), transformer(), prompts(), guidance, temperature=0.5, top_k=3, do_sample=True, max_new_tokens=2
        )
        assert out.shape == (6, 7)

    def test_tokenizers_that_differ(self):
        policy, value, inputs = tiny_llama(), transformer(), prompts()
        guidance = LengthGuidance(strength=1.0)
        generate_guided(policy, value, inputs, guidance, tokenizer=tiny_tokenizer(64), max_new_tokens=1)
        with pytest.raises(ValueError, match="tokenizer"):
            generate_guided(policy, value, inputs, guidance, tokenizer=tiny_tokenizer(48), max_new_tokens=1)
        with pytest.raises(ValueError, match="share a tokenizer"):
            generate_guided(tiny_llama(vocab_size=70), value, inputs, guidance, max_new_tokens=1)
        nameless = ScriptedLengthValue.from_chain(geometric_chain(0.1, vocab_size=64), GAMMA)
        with pytest.raises(ValueError, match="tokenizer"):
            generate_guided(policy, nameless, inputs, guidance, tokenizer=tiny_tokenizer(64), max_new_tokens=1)

    def test_embedding_tables_padded_to_other_sizes_are_fine_for_one_tokenizer(self):
        policy, value = tiny_llama(vocab_size=80), transformer()
        guidance = LengthGuidance(strength=1.0, top_k=2)
        processor = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS, same_tokenizer=True)
        scores = torch.zeros(1, 80)
        scores[0, 20:22] = 5.0
        assert set(processor(torch.tensor([[7]]), scores).isfinite().nonzero()[:, 1].tolist()) == {20, 21}
        # A padding row of the policy's table is the likeliest: it is no candidate, and takes no candidate's place.
        scores[0, 75] = 9.0
        assert set(processor(torch.tensor([[8]]), scores).isfinite().nonzero()[:, 1].tolist()) == {20, 21}
        out = generate_guided(policy, value, prompts(), LengthGuidance(temperature=0), max_new_tokens=1)
        assert out.shape == (6, 6)

    def test_right_padding(self):
        inputs = {"input_ids": torch.tensor([[7, 8, PAD]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        with pytest.raises(ValueError, match="padding_side"):
            generate_guided(tiny_llama(), transformer(), inputs, LengthGuidance(strength=1.0), max_new_tokens=2)
        processor = LengthGuidedLogitsProcessor(
            transformer(), LengthGuidance(strength=1.0), eos_token_id=EOS, attention_mask=torch.ones(2, 3)
        )
        with pytest.raises(ValueError, match="each batch"):
            processor(torch.full((3, 3), 7), torch.zeros(3, 64))

    def test_a_large_vocabulary_without_truncation(self):
        value = ScriptedLengthValue(ScriptedConfig(vocab_size=5000, gamma=GAMMA)).freeze()
        processor = LengthGuidedLogitsProcessor(value, LengthGuidance(strength=1.0), eos_token_id=EOS)
        with pytest.raises(ValueError, match="top_k"):
            processor(torch.tensor([[START]]), torch.zeros(1, 5000))

    def test_a_broken_value_model_stops_generation(self):
        value = transformer()
        with torch.no_grad():
            value.head.output.bias.fill_(math.nan)
        with pytest.raises(FloatingPointError, match="NaN"):
            generate_guided(tiny_llama(), value, prompts(), LengthGuidance(strength=1.0), max_new_tokens=2)

    def test_a_policy_without_an_end(self):
        policy = tiny_llama()
        policy.generation_config.eos_token_id = None
        with pytest.raises(ValueError, match="eos_token_id"):
            generate_guided(policy, transformer(), prompts(), LengthGuidance(strength=1.0), max_new_tokens=2)
