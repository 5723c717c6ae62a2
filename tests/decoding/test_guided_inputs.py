"""What `generate_guided` is given: both models see the same prompt, or what only one would see is refused by name."""

import pytest
import torch
from test_backbones_vlm import picture_inputs, tiny_vlm
from tiny import tiny_gpt2, tiny_length_value_model, tiny_llama
from transformers import DynamicCache, GenerationConfig, T5Config, T5ForConditionalGeneration, WatermarkingConfig

from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.sandbox.scripted import EOS, PAD, START, ScriptedLengthValue, ScriptedPolicy, geometric_chain

GUIDANCE = LengthGuidance(strength=5.0, top_k=4, temperature=0)


def models():
    policy = tiny_llama()
    return policy, tiny_length_value_model(tiny_llama(), 0.9, 1).freeze()


def prompts_read(run):
    """The rows that the last scorer at work was given, as lists; and what `run` returns."""
    given, add = [], SlotScorer.add

    def spied(scorer, token_ids):
        given.append((scorer, token_ids))
        return add(scorer, token_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotScorer, "add", spied)
        result = run()
    return [ids for scorer, ids in given if scorer is given[-1][0]], result


class TestPadding:
    """Without a mask, `generate` takes pad tokens for padding unless they are ends as well."""

    def seen(self, ids, pad, **arguments):
        policy, value = models()
        ids = torch.tensor(ids)
        read, out = prompts_read(
            lambda: generate_guided(policy, value, ids, GUIDANCE, pad_token_id=pad, max_new_tokens=3, **arguments)
        )
        return read, out[:, ids.shape[1] :]

    def test_an_end_at_the_start_of_a_prompt_is_read_where_pad_is_the_end(self):
        read, _ = self.seen([[EOS, 7, 8, 9]], EOS)
        assert read == [[EOS, 7, 8, 9]]
        read, _ = self.seen([[EOS, 7, 8, 9]], 5, eos_token_id=[EOS, 5])
        assert read == [[EOS, 7, 8, 9]]

    def test_ends_in_a_prompt_are_tokens_like_others(self):
        read, _ = self.seen([[EOS, 7, EOS, 9], [6, EOS, EOS, 8]], PAD)
        assert read == [[EOS, 7, EOS, 9], [6, EOS, EOS, 8]]

    @pytest.mark.parametrize("pad", [PAD, 5])
    def test_a_pad_token_of_its_own_is_padding_wherever_it_stands(self, pad):
        read, out = self.seen([[pad, pad, 8, 9], [6, pad, 7, 8]], pad)
        assert read == [[8, 9], [6, 7, 8]]
        mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]])
        again, expected = self.seen([[pad, pad, 8, 9], [6, pad, 7, 8]], pad, attention_mask=mask)
        assert again == read and torch.equal(out, expected)

    @pytest.mark.parametrize("pad", [PAD, EOS])
    def test_a_mask_settles_it_in_either_place(self, pad):
        ids, mask = torch.tensor([[EOS, EOS, 8, 9]]), torch.tensor([[0, 1, 1, 1]])
        policy, value = models()
        for given in (({"input_ids": ids, "attention_mask": mask}, {}), (ids, {"attention_mask": mask})):
            inputs, arguments = given
            read, _ = prompts_read(
                lambda inputs=inputs, arguments=arguments: generate_guided(
                    policy, value, inputs, GUIDANCE, pad_token_id=pad, max_new_tokens=2, **arguments
                )
            )
            assert read == [[EOS, 8, 9]]

    def test_the_processor_alone_follows_the_same_rule(self):
        _, value = models()
        for pad, expected in ((EOS, [[EOS, 7, 8]]), (7, [[EOS, 8]]), (None, [[EOS, 7, 8]])):
            processor = LengthGuidedLogitsProcessor(value, GUIDANCE, eos_token_id=[9, EOS], pad_token_id=pad)
            read, _ = prompts_read(
                lambda processor=processor: processor(torch.tensor([[EOS, 7, 8]]), torch.zeros(1, 64))
            )
            assert read == expected


class TestWhatOnlyThePolicyWouldSee:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("token_type_ids", torch.ones(2, 5, dtype=torch.long)),
            ("position_ids", torch.arange(5).expand(2, -1) + 7),
            ("encoder_hidden_states", torch.zeros(2, 3, 16)),
            ("pixel_values", torch.zeros(2, 3, 4, 4)),
            ("something_new", torch.zeros(2)),
        ],
    )
    def test_other_inputs_are_refused_by_name(self, name, value):
        policy, length_value_model = tiny_gpt2(), models()[1]
        ids = torch.randint(6, 64, (2, 5))
        for inputs, arguments in (({"input_ids": ids, name: value}, {}), (ids, {name: value})):
            with pytest.raises(ValueError, match=name):
                generate_guided(policy, length_value_model, inputs, GUIDANCE, max_new_tokens=2, **arguments)

    def test_what_does_not_matter_without_guidance_is_passed_on(self):
        policy, value = tiny_gpt2(), models()[1]
        ids, types = torch.randint(6, 64, (2, 5)), torch.full((2, 5), 9)
        greedy = LengthGuidance(temperature=0)
        plain, typed = (
            generate_guided(policy, value, inputs, greedy, max_new_tokens=6)
            for inputs in (ids, {"input_ids": ids, "token_type_ids": types})
        )
        assert torch.equal(
            typed, policy.generate(ids, token_type_ids=types, max_new_tokens=6, do_sample=False, pad_token_id=EOS)
        )
        assert not torch.equal(plain, typed)

    def test_pictures(self):
        policy = tiny_vlm()
        value = tiny_length_value_model(tiny_vlm(), 0.9).freeze()
        inputs = picture_inputs([[7, 8, 9]])
        with pytest.raises(ValueError, match="image_grid_thw, mm_token_type_ids, pixel_values"):
            generate_guided(policy, value, inputs, GUIDANCE, max_new_tokens=2)
        # Text alone is read by both.
        ids = torch.tensor([[7, 8, 9]])
        outputs = []
        for scoring in ("cached", "full"):
            outputs.append(generate_guided(policy, value, ids, GUIDANCE, scoring=scoring, max_new_tokens=8))
        assert torch.equal(*outputs)

    def test_a_cache_that_holds_something(self):
        policy, value = models()
        ids, cache = torch.randint(6, 64, (1, 5)), DynamicCache()
        out = generate_guided(policy, value, ids, GUIDANCE, past_key_values=cache, max_new_tokens=4)
        assert torch.equal(out, generate_guided(policy, value, ids, GUIDANCE, max_new_tokens=4))
        with pytest.raises(ValueError, match="past_key_values"):
            generate_guided(policy, value, out, GUIDANCE, past_key_values=cache, max_new_tokens=4)

    def test_embeddings_in_place_of_ids_and_encoders(self):
        policy, value = models()
        with pytest.raises(ValueError, match="inputs_embeds.*input_ids"):
            generate_guided(policy, value, {"inputs_embeds": torch.zeros(1, 3, 16)}, GUIDANCE, max_new_tokens=2)
        with pytest.raises(ValueError, match="inputs_embeds"):
            generate_guided(
                policy, value, torch.tensor([[7, 8]]), GUIDANCE, inputs_embeds=torch.zeros(1, 2, 16), max_new_tokens=2
            )
        config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        config.decoder_start_token_id, config.eos_token_id = PAD, EOS
        with pytest.raises(ValueError, match="encoder-decoder"):
            generate_guided(
                T5ForConditionalGeneration(config), value, torch.tensor([[7, 8]]), GUIDANCE, max_new_tokens=2
            )

    @pytest.mark.parametrize(
        "inputs",
        [
            torch.tensor([7, 8, 9]),
            torch.zeros(2, 3),
            torch.zeros(2, 0, dtype=torch.long),
            [[7, 8, 9]],
            "w7 w8",
            {"input_ids": [[7, 8, 9]]},
        ],
    )
    def test_what_is_no_batch_of_ids(self, inputs):
        with pytest.raises(ValueError, match="input_ids"):
            generate_guided(*models(), inputs, GUIDANCE, max_new_tokens=2)

    def test_what_is_given_twice(self):
        ids = torch.tensor([[7, 8, 9]])
        with pytest.raises(ValueError, match="attention_mask"):
            generate_guided(
                *models(),
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                GUIDANCE,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=2,
            )


class TestModes:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("watermarking_config", WatermarkingConfig()),
            ("prompt_lookup_num_tokens", 2),
            ("assistant_early_exit", 1),
            ("penalty_alpha", 0.6),
            ("dola_layers", "high"),
            ("token_healing", True),
            ("num_beams", 2),
            ("top_h", 0.4),
        ],
    )
    def test_what_cannot_be_guided_is_refused_wherever_it_is_set(self, name, value):
        policy, value_model = models()
        ids = torch.tensor([[7, 8, 9]])
        with pytest.raises(ValueError, match=name):
            generate_guided(policy, value_model, ids, GUIDANCE, max_new_tokens=2, **{name: value})
        with pytest.raises(ValueError, match=name):
            config = GenerationConfig(max_new_tokens=2, **{name: value})
            generate_guided(policy, value_model, ids, GUIDANCE, generation_config=config)
        setattr(policy.generation_config, name, value)
        with pytest.raises(ValueError, match=name):
            generate_guided(policy, value_model, ids, GUIDANCE, max_new_tokens=2)

    def test_continuous_batching(self):
        with pytest.raises(ValueError, match="continuous batching"):
            generate_guided(*models(), torch.tensor([[7]]), GUIDANCE, max_new_tokens=2, cache_implementation="paged")

    def test_a_watermark_of_the_policys_scores_is_a_processor_like_others(self):
        policy, value = models()
        ids = torch.randint(6, 64, (2, 5))
        mark = WatermarkingConfig(bias=8.0, greenlist_ratio=0.5).construct_processor(64, "cpu")
        marked = generate_guided(policy, value, ids, GUIDANCE, logits_processor=[mark], max_new_tokens=10)
        assert not torch.equal(marked, generate_guided(policy, value, ids, GUIDANCE, max_new_tokens=10))


class TestAssistedGeneration:
    """It asks for the scores of tokens that it may take back."""

    @pytest.mark.parametrize("draft", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_llama(seed=9)}])
    def test_the_processor_refuses_it_when_it_shows(self, draft):
        policy, value = models()
        guidance = LengthGuidance(mode="equal_to", target_length=6, enforce=True, top_k=4)
        processor = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS)
        ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
        with pytest.raises(ValueError, match="assisted generation"):
            policy.generate(ids, logits_processor=[processor], max_new_tokens=12, do_sample=False, **draft)

    def test_a_jump_ahead(self):
        value = ScriptedLengthValue.from_chain(geometric_chain(0.1), 0.9)
        processor = LengthGuidedLogitsProcessor(value, LengthGuidance(strength=1.0), eos_token_id=EOS)
        rows, scores = torch.tensor([[3, 4, 5, 3, 4, 5]]), torch.zeros(1, 6)
        processor(rows[:, :2], scores)
        processor(rows[:, :3], scores)
        with pytest.raises(ValueError, match="by one token"):
            processor(rows[:, :5], scores)
        with pytest.raises(ValueError, match="by one token"):
            processor(torch.tensor([[3, 4, 2]]), scores)

    def test_new_prompts_and_new_turns_start_afresh(self):
        value = ScriptedLengthValue.from_chain(geometric_chain(0.1), 0.9)
        guidance = LengthGuidance(mode="at_least", target_length=3, enforce=True)
        processor = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS)
        scores = torch.zeros(1, 6)

        def bars_end(ids):
            return bool(processor(torch.tensor([ids]), scores)[0, EOS] == -torch.inf)

        assert bars_end([3, 4]) and bars_end([3, 4, 5]) and bars_end([3, 4, 5, 5]) and not bars_end([3, 4, 5, 5, 3])
        # The same prompt, another one, one that is longer than all before; then a chat goes on behind its end.
        assert bars_end([3, 4]) and bars_end([5, 4]) and bars_end([5, 5, 5, 5, 5, 5, 5])
        assert bars_end([5, 5, 5, 5, 5, 5, 5, 3])
        assert bars_end([5, 5, 5, 5, 5, 5, 5, 3, EOS, 4, 4])


class TestRoom:
    def test_without_a_maximum_there_is_the_one_of_generate(self):
        policy, value = ScriptedPolicy.from_chain(geometric_chain(0.01)), None
        value = ScriptedLengthValue.from_chain(geometric_chain(0.01), 0.9)
        ids = torch.full((2, 3), START)
        for target in (5, 19):
            guidance = LengthGuidance(mode="equal_to", target_length=target, enforce=True)
            out, report = generate_guided(policy, value, ids, guidance, return_report=True)
            assert report.lengths.tolist() == [target, target]
        with pytest.raises(ValueError, match="target_length=20.*max_new_tokens"):
            generate_guided(policy, value, ids, LengthGuidance(mode="equal_to", target_length=20))
        assert generate_guided(policy, value, ids, LengthGuidance(strength=-1e4)).shape[1] == 3 + 20

    def test_other_names_of_a_maximum(self):
        policy = ScriptedPolicy.from_chain(geometric_chain(0.01))
        value = ScriptedLengthValue.from_chain(geometric_chain(0.01), 0.9)
        ids = torch.full((1, 3), START)
        guidance = LengthGuidance(mode="at_most", target_length=30, enforce=True)
        for settings in (
            {"max_length": 34},
            {"generation_config": GenerationConfig(max_length=34)},
            {"generation_config": GenerationConfig(max_new_tokens=31)},
        ):
            generate_guided(policy, value, ids, guidance, **settings)
        policy.generation_config.max_length = 33
        with pytest.raises(ValueError, match="got 30"):
            generate_guided(policy, value, ids, guidance)

    @pytest.mark.parametrize("mode", ["equal_to", "at_most"])
    @pytest.mark.parametrize("name", ["min_new_tokens", "min_length"])
    def test_a_minimum_beyond_the_target_is_refused(self, mode, name):
        policy = ScriptedPolicy.from_chain(geometric_chain(0.1))
        value = ScriptedLengthValue.from_chain(geometric_chain(0.1), 0.9)
        ids, prompt = torch.full((4, 3), START), 3 if name == "min_length" else 0
        guidance = LengthGuidance(mode=mode, target_length=5, enforce=True)
        with pytest.raises(ValueError, match=f"{name}.*target_length"):
            generate_guided(policy, value, ids, guidance, max_new_tokens=20, **{name: prompt + 6})
        out, report = generate_guided(
            policy, value, ids, guidance, max_new_tokens=20, return_report=True, **{name: prompt + 5}
        )
        assert report.lengths.tolist() == [5] * 4 and bool((out[:, 8] == EOS).all())
