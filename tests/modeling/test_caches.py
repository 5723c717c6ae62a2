"""A decoder's cache behind a length value model: whole sequences and their parts say the same, or it is refused."""

import warnings

import pytest
import torch
from tiny import assert_same_logits, tiny_gpt2, tiny_length_value_model, tiny_llama, tiny_qwen2, tiny_qwen3, tokens
from transformers import DynamicCache, JambaConfig, JambaModel, MambaConfig, MambaModel, MiniMaxConfig, MiniMaxModel

from lenvm_rl.modeling.length_value_model import LengthValueModel

BACKBONES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3, "gpt2": tiny_gpt2}


@pytest.fixture(params=BACKBONES)
def model(request):
    return tiny_length_value_model(BACKBONES[request.param]())


def test_a_cache_gives_the_values_of_the_whole_sequence_padding_included(model):
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).values
    start = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    rest = model(ids[:, 5:], attention_mask=mask, past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([start.values, rest.values], dim=1)[:, 3:], whole[:, 3:], rtol=0, atol=1e-5)
    assert rest.past_key_values.get_seq_length() == 8
    assert model(ids[:, :1], past_key_values=rest.past_key_values).past_key_values is None, "none was asked for"


def test_the_cache_goes_by_the_name_that_the_decoder_has_for_it(model):
    """Whatever transformers calls it: a name that the decoder does not know would be swallowed without a word."""
    ids = tokens(1, 6)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        rest = model(ids[:, 5:], past_key_values=cache)
    torch.testing.assert_close(rest.values[0, 0], model(ids).values[0, 5], rtol=0, atol=1e-5)


@pytest.fixture
def recurrent():
    """On a decoder without attention, which keeps a state and no `past_key_values`."""
    config = MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.2, pad_token_id=0
    )
    return tiny_length_value_model(MambaModel(config).eval())


def test_a_recurrent_decoder_has_values_but_no_cache(recurrent, tmp_path):
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    output = recurrent(ids, attention_mask=mask)
    assert output.past_key_values is None and output.logits.std() > 0.1
    torch.testing.assert_close(output.logits[0, 2:], recurrent(ids[:1, 2:]).logits[0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="MambaModel.*past_key_values"):
        recurrent(ids, use_cache=True)
    # A state that somebody made otherwise is refused as well, and not left out without a word.
    with pytest.raises(ValueError, match="MambaModel.*past_key_values"):
        recurrent(ids[:, :1], past_key_values=DynamicCache(config=recurrent.backbone.config))
    recurrent.save_pretrained(tmp_path)
    assert_same_logits(recurrent, LengthValueModel.from_pretrained(tmp_path))


def hybrids():
    """Decoders whose cache holds a recurrent state beside keys and values, and what it is called."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 32}
    jamba = JambaConfig(**sizes, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4)
    layers = ["linear_attention", "full_attention"]
    minimax = MiniMaxConfig(**sizes, head_dim=8, num_local_experts=2, layer_types=layers)
    return [(JambaModel(jamba), "LinearAttentionLayer"), (MiniMaxModel(minimax), "MiniMaxCache")]


def test_a_cache_that_holds_more_than_keys_and_values_is_refused_by_name():
    """Going on from it gives other values (Jamba with two tokens more, MiniMax with one), without a word."""
    for decoder, kind in hybrids():
        model, ids = tiny_length_value_model(decoder.eval()), tokens(2, 6)
        assert model(ids).logits.std() > 0.01
        with pytest.raises(ValueError, match=f"{type(decoder).__name__}.*{kind}.*scoring='full'"):
            model(ids[:, :4], use_cache=True)
