"""Cached scoring is compared with full rows before it is trusted: which decoders it refuses, from what length on."""

from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_gpt2, tiny_length_value_model, tiny_llama, tiny_qwen3
from transformers import (
    BloomConfig,
    BloomModel,
    FalconConfig,
    FalconModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPTNeoConfig,
    GPTNeoModel,
    JambaConfig,
    JambaModel,
    MiniMaxConfig,
    MiniMaxModel,
    MistralConfig,
    MistralModel,
    MptConfig,
    MptModel,
    Phi3Config,
    Phi3Model,
)

from lenvm_rl.decoding import comparison
from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.decoding.scoring import FullRowScorer, SlotScorer
from lenvm_rl.modeling.backbones import context_of, window_sizes

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
GROUPED = SIZES | {"num_key_value_heads": 1, "intermediate_size": 32}
ORIGINAL = 40


def of(model_class, config):
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = tiny_length_value_model(model_class(config).eval(), seed=1)
    with torch.no_grad():
        for weight in model.backbone.parameters():
            if weight.dim() > 1 and weight.std() < 0.1:
                # Some decoders draw their weights without asking the config.
                weight.mul_(0.2 / weight.std())
    return model.freeze()


def longrope():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
    settings = {"max_position_embeddings": 320, "original_max_position_embeddings": ORIGINAL, "rope_parameters": rope}
    return of(Phi3Model, Phi3Config(**GROUPED, **settings))


def dynamic():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
    return tiny_length_value_model(tiny_llama(max_position_embeddings=ORIGINAL, rope_parameters=rope)).freeze()


def gpt_neo(window=ORIGINAL):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 320}
    return of(GPTNeoModel, GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=window))


def sliding(config_class, model_class, **settings):
    return of(model_class, config_class(**GROUPED, sliding_window=8, **settings))


def hybrid_jamba():
    settings = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
    return of(JambaModel, JambaConfig(**GROUPED, **settings))


def minimax():
    layers = ["linear_attention", "full_attention"]
    return of(MiniMaxModel, MiniMaxConfig(**GROUPED, head_dim=8, num_local_experts=2, layer_types=layers))


# What is wrong at once, and how the error calls it.
AT_ONCE = {
    "MPT": (lambda: of(MptModel, MptConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2)), "MptModel"),
    "Bloom": (lambda: of(BloomModel, BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)), "BloomModel"),
    "Falcon with alibi": (lambda: of(FalconModel, FalconConfig(**SIZES, alibi=True)), "FalconModel"),
    "Mistral": (lambda: sliding(MistralConfig, MistralModel), "MistralModel.*DynamicSlidingWindowLayer"),
    "Gemma 3": (
        lambda: sliding(Gemma3TextConfig, Gemma3TextModel, head_dim=8),
        "Gemma3TextModel.*DynamicSlidingWindowLayer",
    ),
    "Jamba": (hybrid_jamba, "JambaModel.*LinearAttentionLayer"),
    "GPT-Neo": (lambda: gpt_neo(), "GPTNeoModel"),
    "MiniMax": (minimax, "MiniMaxModel.*MiniMaxCache"),
}
# What is wrong beyond some length, and in words.
FROM_A_LENGTH_ON = {"longrope": longrope, "dynamic": dynamic}


def difference(model, prefix, steps=4, width=24):
    """How far cached logits are from full rows, whatever the comparison would say."""
    scorers = SlotScorer(model).uncompared(), FullRowScorer(model)
    ids = torch.randint(6, 64, (2, prefix), generator=torch.Generator().manual_seed(0)).tolist()
    slots = [[scorer.add(row) for row in ids] for scorer in scorers]
    worst = 0.0
    for step in range(steps):
        candidates = torch.arange(6 + step, 6 + step + width).expand(2, -1)
        ones, found = torch.ones_like(candidates), []
        for scorer, own in zip(scorers, slots, strict=True):
            found.append(scorer.score(own, candidates, ones))
            for slot in own:
                scorer.append(slot, [9 + step])
        worst = max(worst, float((found[0] - found[1]).abs().max()))
    return worst


@pytest.mark.parametrize("kind", AT_ONCE)
def test_what_cannot_share_a_cache_is_refused_by_name(kind):
    make, name = AT_ONCE[kind]
    with pytest.raises(ValueError, match=f"{name}.*scoring='full'"):
        SlotScorer(make())


@pytest.mark.parametrize("kind", AT_ONCE)
def test_full_rows_serve_what_is_refused(kind):
    model = AT_ONCE[kind][0]()
    policy, ids = tiny_llama(), torch.randint(6, 64, (2, 5))
    guidance = LengthGuidance(strength=3.0, top_k=4)
    out = generate_guided(policy, model, ids, guidance, scoring="full", max_new_tokens=4)
    assert out.shape[1] > 5


@pytest.mark.parametrize("kind", FROM_A_LENGTH_ON)
class TestFromALengthOn:
    def test_it_is_right_below_and_wrong_beyond(self, kind):
        model = FROM_A_LENGTH_ON[kind]()
        assert difference(model, 6, steps=2, width=8) < 1e-5
        assert difference(model, ORIGINAL - 2) > 0.05

    def test_it_is_refused_before_generation_starts_if_it_can_get_there(self, kind):
        model, policy, ids = FROM_A_LENGTH_ON[kind](), tiny_llama(), torch.randint(6, 64, (2, 5))
        guidance, short, long = LengthGuidance(strength=3.0, top_k=4), 8, 100
        steps = []
        policy.register_forward_pre_hook(lambda *_: steps.append(1))
        generate_guided(policy, model, ids, guidance, max_new_tokens=short)
        assert steps
        steps.clear()
        with pytest.raises(ValueError, match=r"other values than in full rows.*scoring='full'"):
            generate_guided(policy, model, ids, guidance, max_new_tokens=long)
        assert not steps
        # Refused again, and right again where it is right: what was asked has left no trace.
        generate_guided(policy, model, ids, guidance, max_new_tokens=short)
        assert difference(model, 6, steps=2, width=8) < 1e-5
        generate_guided(policy, model, ids, guidance, scoring="full", max_new_tokens=40)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_is_told_from_rounding(self, kind, dtype):
        model = FROM_A_LENGTH_ON[kind]().to(dtype)
        with pytest.raises(ValueError, match="other values"):
            SlotScorer(model).check_length(120)


def test_a_processor_alone_is_refused_when_it_gets_there():
    """It cannot know how far rows will go, and goes as far as is right."""
    model, policy = longrope(), tiny_llama()
    processor = LengthGuidedLogitsProcessor(model, LengthGuidance(strength=3.0, top_k=4), eos_token_id=1)
    ids = torch.randint(6, 64, (1, 5))
    settings = {"do_sample": True, "top_k": 0, "logits_processor": [processor]}
    policy.generate(ids, max_new_tokens=ORIGINAL - 5, min_new_tokens=ORIGINAL - 5, **settings)
    with pytest.raises(ValueError, match="scoring='full'"):
        policy.generate(ids + 1, max_new_tokens=ORIGINAL, min_new_tokens=ORIGINAL, **settings)


@pytest.mark.parametrize(("dtype", "far_off", "refused"), [
    (torch.float32, 1, True), (torch.bfloat16, 2, False), (torch.bfloat16, 3, True),
])  # fmt: skip
def test_in_16_bits_a_minority_of_texts_that_is_far_off_is_rounding(dtype, far_off, refused, monkeypatch):
    """As one text was at 3 of 12 lengths with SmolLM2 in bfloat16, and the others were not."""
    compare = comparison._compare_text

    def some_are_far_off(scorer, prefix, position, text):
        found = compare(scorer, prefix, position, text)
        return found._replace(error=60.0) if text < far_off else found

    monkeypatch.setattr(comparison, "_compare_text", some_are_far_off)
    model = tiny_length_value_model(tiny_llama(), seed=1).to(dtype).freeze()
    with pytest.raises(ValueError, match="other values") if refused else nullcontext():
        SlotScorer(model).check_length(120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gpt2])
def test_ordinary_decoders_are_trusted_at_any_length(make, dtype):
    model = tiny_length_value_model(make(), seed=1).to(dtype).freeze()
    SlotScorer(model).check_length(120)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_positions_that_are_stretched_for_good_are_trusted(rope):
    model = tiny_length_value_model(tiny_llama(rope_parameters={"rope_theta": 1e4, **rope}), seed=1).freeze()
    SlotScorer(model).check_length(400)
    assert difference(model, 70, steps=2) < 1e-4


def test_a_model_is_asked_once():
    model, calls = tiny_length_value_model(tiny_llama()).freeze(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    scorer = SlotScorer(model)
    first = len(calls)
    assert 0 < first < 10
    SlotScorer(model)
    assert len(calls) == first
    scorer.check_length(300)
    further = len(calls)
    assert first < further < 20
    for tokens in range(1, 300):
        SlotScorer(model).check_length(tokens)
    assert len(calls) == further


def test_rows_that_grow_token_by_token_are_compared_a_few_times_only():
    model, calls = tiny_length_value_model(tiny_llama()).freeze(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    scorer = SlotScorer(model)
    for tokens in range(1, 512):
        scorer.check_length(tokens)
    assert len(calls) < 60


class TestContext:
    """What the length value model can read is known before the first token is drawn."""

    @pytest.mark.parametrize("scoring", ["cached", "full"])
    @pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
    def test_rows_that_may_outgrow_it_are_refused_at_once(self, make, scoring):
        settings = {} if make is tiny_gpt2 else {"max_position_embeddings": 128}
        policy, value = tiny_llama(), tiny_length_value_model(make(**settings)).freeze()
        steps = []
        policy.register_forward_pre_hook(lambda *_: steps.append(1))
        inputs = {"input_ids": torch.randint(6, 64, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
        # Padding takes no position: the longest prompt has six tokens.
        inputs["attention_mask"][:, :3] = 0
        guidance = LengthGuidance(strength=1.0, top_k=3)
        with pytest.raises(ValueError, match="max_new_tokens"):
            generate_guided(policy, value, inputs, guidance, scoring=scoring, max_new_tokens=123)
        assert not steps
        generate_guided(policy, value, inputs, guidance, scoring=scoring, max_new_tokens=122, max_time=0.0)
        # Without guidance, it has no say.
        generate_guided(policy, value, inputs, LengthGuidance(), max_new_tokens=130, max_time=0.0)

    def test_up_to_its_last_position(self):
        value = tiny_length_value_model(tiny_gpt2(), seed=1).freeze()
        ids = torch.randint(6, 64, (1, 120))
        guidance = LengthGuidance(strength=-50.0, top_k=5)
        outputs = []
        for scoring in ("cached", "full"):
            torch.manual_seed(0)
            settings = {"max_new_tokens": 8, "min_new_tokens": 8}
            outputs.append(generate_guided(tiny_llama(), value, ids, guidance, scoring=scoring, **settings))
        assert torch.equal(*outputs) and outputs[0].shape[1] == 128

    @pytest.mark.parametrize("scoring", ["cached", "full"])
    def test_a_processor_alone_says_so_where_it_ends(self, scoring):
        value = tiny_length_value_model(tiny_gpt2()).freeze()
        processor = LengthGuidedLogitsProcessor(
            value, LengthGuidance(strength=1.0, top_k=3), eos_token_id=1, scoring=scoring
        )
        with pytest.raises(ValueError, match="context of 128"):
            tiny_llama().generate(
                torch.randint(6, 64, (1, 126)), logits_processor=[processor], max_new_tokens=9, min_new_tokens=9
            )

    def test_what_configs_say(self):
        assert context_of(tiny_llama().config) == 512 and context_of(tiny_gpt2().config) == 128
        assert context_of(dynamic().config) == 8 * ORIGINAL and context_of(longrope().config) == 320
        assert context_of(MptConfig()) is None
        assert window_sizes(gpt_neo(32).config) == [32] and window_sizes(tiny_llama().config) == []
