"""A length value model says the same padded and unpadded, before and after saving, and refuses to guess."""

import math
import os
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    assert_same_logits,
    assert_same_weights,
    tiny_gpt2,
    tiny_length_value_model,
    tiny_llama,
    tiny_qwen2,
    tiny_qwen3,
    tiny_tokenizer,
    tokens,
)
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig

from lenvm_rl.modeling.heads import LengthValueHead
from lenvm_rl.modeling.length_value_model import LengthValueConfig, LengthValueModel
from lenvm_rl.tokenization import check_same_tokenizer, tokenizer_fingerprint

BACKBONES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3, "gpt2": tiny_gpt2}


@pytest.fixture(params=BACKBONES)
def model(request):
    return tiny_length_value_model(BACKBONES[request.param]())


# ---- what it computes


def test_the_value_is_minus_the_sigmoid_of_the_head_on_the_last_hidden_state(model):
    ids = tokens(2, 5)
    hidden = model.backbone(ids).last_hidden_state
    first, last = model.head.hidden, model.head.output
    inner = hidden @ first.weight.T + first.bias
    expected = (inner * inner.sigmoid()) @ last.weight.T + last.bias
    output = model(ids)
    assert output.logits.shape == output.values.shape == (2, 5)
    torch.testing.assert_close(output.logits, expected.squeeze(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.values, -1 / (1 + torch.exp(-output.logits)), rtol=0, atol=1e-6)
    assert output.past_key_values is None


def test_the_decoder_of_a_causal_model_gives_the_hidden_states_of_that_model(model):
    policy = BACKBONES[model.config.backbone_config.model_type]()
    ids = tokens(2, 6)
    hidden = policy(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model.backbone(ids).last_hidden_state, hidden)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_no_value_whatever_stands_in_it(model, side):
    sequences = [tokens(1, n, seed=n)[0] for n in (1, 4, 7)]
    width = 11
    ids, mask = torch.full((3, width), 63), torch.zeros(3, width, dtype=torch.long)
    starts = []
    for row, sequence in enumerate(sequences):
        free = width - len(sequence)
        starts.append({"left": free, "right": 0, "both": free // 2}[side])
        ids[row, starts[-1] : starts[-1] + len(sequence)] = sequence
        mask[row, starts[-1] : starts[-1] + len(sequence)] = 1
    padded = model(ids, attention_mask=mask).values
    poisoned = model(torch.where(mask.bool(), ids, 17), attention_mask=mask).values
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        there = slice(start, start + len(sequence))
        alone = model(sequence[None]).values[0]
        torch.testing.assert_close(padded[row, there], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(poisoned[row, there], padded[row, there], rtol=0, atol=1e-6)
    assert padded[mask.bool()].std() > 0.05, "values that are all alike would pass this test for any positions"


def test_packed_sequences_do_not_see_each_other(model):
    first, second = tokens(1, 4, seed=1), tokens(1, 6, seed=2)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed = model(torch.cat([first, second], dim=1), position_ids=positions).values
    alone = torch.cat([model(first).values, model(second).values], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_a_mask_that_positions_cannot_be_read_off_needs_positions(model):
    ids = tokens(1, 4)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, attention_mask=causal)
    given = model(ids, attention_mask=causal, position_ids=torch.arange(4)[None]).values
    torch.testing.assert_close(given, model(ids).values, rtol=0, atol=1e-5)


def test_no_value_depends_on_what_comes_later_or_is_masked(model):
    embeds = model.get_input_embeddings()(tokens(1, 6)).detach().requires_grad_()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    model(inputs_embeds=embeds, attention_mask=mask).logits[0, 3].backward()
    sizes = embeds.grad[0].abs().sum(dim=-1)
    assert (sizes[1:4] > 0).all() and (sizes[[0, 4, 5]] == 0).all()


# ---- where a new one starts


def test_a_new_head_says_minus_one_half_and_lets_the_decoder_learn_at_once():
    model = LengthValueModel.from_backbone(tiny_llama(hidden=32), gamma=0.99)
    output = model(tokens(16, 12))
    assert (output.values + 0.5).abs().max() < 0.08
    assert 0.01 < output.logits.std() < 0.12
    (output.values + 1).square().mean().backward()
    assert model.backbone.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    # gamma = 0.01^(1/L) covers L to 99 %, and -1/2 = -(1 - gamma^n) is n = 15 % of L.
    assert math.log(0.5) / math.log(0.01) == pytest.approx(0.1505, abs=1e-4)


def test_the_same_seed_makes_the_same_head():
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        heads.append(LengthValueModel.from_backbone(tiny_llama(), gamma=0.99).head.state_dict())
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])


# ---- the head is float32


CASTS = [lambda m: m.bfloat16(), lambda m: m.to(torch.half), lambda m: nn.ModuleList([m]).half()]


@pytest.mark.parametrize("cast", CASTS)
def test_casting_the_model_leaves_the_head_in_float32_to_the_bit(cast):
    model = tiny_length_value_model()
    before = {key: weight.clone() for key, weight in model.head.state_dict().items()}
    cast(model)
    assert {weight.dtype for weight in model.backbone.parameters()} <= {torch.bfloat16, torch.float16}
    after = model.head.state_dict()
    assert all(after[key].dtype == torch.float32 and torch.equal(after[key], before[key]) for key in before)


def test_a_model_in_bfloat16_computes_its_head_in_float32_also_under_autocast():
    model = tiny_length_value_model().to(torch.bfloat16)
    ids = tokens(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids)
        hidden = model.backbone(ids).last_hidden_state
    assert hidden.dtype == torch.bfloat16 and output.logits.dtype == output.values.dtype == torch.float32
    assert torch.equal(output.logits, model.head(hidden.float()))


def test_the_head_follows_to_another_device_but_not_to_another_dtype():
    for target in ({"device": "meta"}, {"device": "meta", "dtype": torch.bfloat16}):
        weights = list(LengthValueHead(4).to(**target).parameters())
        assert {(weight.device.type, weight.dtype) for weight in weights} == {("meta", torch.float32)}


def test_a_head_made_where_bfloat16_is_the_default_is_float32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        head = LengthValueHead(4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in head.parameters()} == {torch.float32}


# ---- saving and loading


@pytest.mark.parametrize("loader", [LengthValueModel, AutoModel])
def test_a_saved_model_comes_back_bit_for_bit(model, loader, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is LengthValueModel and not loaded.training
    assert_same_weights(model, loaded)
    assert_same_logits(model, loaded)


@pytest.mark.parametrize("shards", ["50GB", "4KB"])
def test_a_bfloat16_decoder_and_its_float32_head_come_back_bit_for_bit(shards, tmp_path):
    model = tiny_length_value_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = LengthValueModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and loaded.head.output.weight.dtype == torch.float32
    assert_same_weights(model, loaded)


def test_loading_in_bfloat16_leaves_the_head_as_it_was_saved(tmp_path):
    model = tiny_length_value_model()
    model.save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.backbone.parameters()} == {torch.bfloat16}
    assert_same_weights(model.head, loaded.head)


@pytest.mark.parametrize("gamma", [0.997, 0.9998, 0.1 + 0.2, math.nextafter(1, 0), math.nextafter(0, 1)])
def test_gamma_comes_back_exactly(gamma, tmp_path):
    LengthValueConfig(backbone_config=tiny_llama().config, gamma=gamma).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).gamma == gamma


def test_what_the_config_knows_comes_back(tmp_path):
    tokenizer = tiny_tokenizer()
    known = {
        "gamma_fit": {"quantile": 0.99, "coverage": 0.99, "lengths": 10000, "note": "γ"},
        "generator": "sandbox/policy",
        "truncated_share": 0.03125,
    }
    model = LengthValueModel.from_backbone(tiny_qwen2(), gamma=0.997, tokenizer=tokenizer, **known)
    model.config.a_field_of_mine = [1, {"two": 2.5}]
    model.save_pretrained(tmp_path)
    config = LengthValueModel.from_pretrained(tmp_path).config
    assert {key: getattr(config, key) for key in known} == known
    assert config.gamma == 0.997 and config.a_field_of_mine == [1, {"two": 2.5}]
    assert config.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    check_same_tokenizer(config.tokenizer_fingerprint, tokenizer)
    assert config.backbone_config.to_dict() == model.config.backbone_config.to_dict()


def test_generic_code_finds_the_decoder_behind_the_config():
    config = LengthValueConfig(backbone_config=tiny_llama().config, gamma=0.9, generator="some policy")
    assert config.get_text_config() is config.get_text_config(decoder=True) is config.backbone_config
    assert isinstance(config.backbone_config, LlamaConfig)


def test_the_choice_of_attention_reaches_the_decoder_and_is_the_same_before_and_after_saving(tmp_path):
    model = tiny_length_value_model()
    assert model.backbone.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert LengthValueModel.from_pretrained(tmp_path).backbone.config._attn_implementation == "sdpa"
    eager = LengthValueModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.backbone.config._attn_implementation == "eager"
    ids = tokens(2, 6)
    torch.testing.assert_close(eager(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    config = LengthValueConfig(backbone_config=tiny_llama().config, gamma=0.9, attn_implementation="eager")
    assert LengthValueModel(config).backbone.config._attn_implementation == "eager"


def test_a_model_made_from_its_config_alone_is_random_and_complete():
    config = LengthValueConfig(backbone_config=tiny_llama(hidden=64).config.to_dict(), gamma=0.9)
    model = LengthValueModel(config)
    assert model.backbone.embed_tokens.weight.std() > 0.1 and (model.head.hidden.bias == 0).all()
    # 1 / sqrt(64) and a tenth of that, not the initializer_range of 0.2 that the decoder's own layers have.
    assert model.head.hidden.weight.std().item() == pytest.approx(0.125, rel=0.05)
    assert model.head.output.weight.std().item() == pytest.approx(0.0125, rel=0.3)
    assert model(tokens(1, 3)).values.isfinite().all()


# ---- what does not load


def test_a_model_without_gamma_does_not_load_until_it_is_given_one(tmp_path):
    model = tiny_length_value_model()
    model.config.gamma = None
    model.save_pretrained(tmp_path)
    for load in (LengthValueModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="gamma"):
            load(tmp_path)
    config = LengthValueConfig.from_pretrained(tmp_path, gamma=0.997)
    loaded = LengthValueModel.from_pretrained(tmp_path, config=config)
    assert loaded.config.gamma == 0.997
    assert_same_weights(model, loaded)


def test_gamma_cannot_be_changed_while_loading(tmp_path):
    tiny_length_value_model(gamma=0.9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gamma"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.99)


@pytest.mark.parametrize("gamma", [0, 1, 0.0, 1.0, 1.5, -0.5, math.nan, math.inf, True, "0.9", 1 - 1e-17])
def test_gamma_is_a_number_strictly_between_0_and_1(gamma, tmp_path):
    with pytest.raises(ValueError, match="gamma"):
        LengthValueConfig(gamma=gamma)
    with pytest.raises(ValueError, match="gamma"):
        LengthValueModel.from_backbone(tiny_llama(layers=1), gamma=gamma)


def test_any_real_number_becomes_a_python_float():
    gamma = LengthValueConfig(gamma=Fraction(1, 2)).gamma
    assert type(gamma) is float and gamma == 0.5


@pytest.mark.parametrize("gone", ["head.output.weight", "head.hidden.bias", "backbone.norm.weight"])
def test_a_checkpoint_that_lacks_weights_is_refused_instead_of_filled_at_random(gone, tmp_path):
    tiny_length_value_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights, which would be random: {gone}"):
        LengthValueModel.from_pretrained(tmp_path)


def test_a_policy_is_not_loaded_as_a_value_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone_config"):
        LengthValueModel.from_pretrained(tmp_path)


def test_only_safetensors_are_loaded(tmp_path):
    model = tiny_length_value_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors"):
        LengthValueModel.from_pretrained(tmp_path, use_safetensors=False)
    os.remove(tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        LengthValueModel.from_pretrained(tmp_path)


# ---- training and freezing


def test_every_parameter_learns():
    model = tiny_length_value_model(tiny_qwen2()).train()
    model(tokens(2, 6)).values.square().mean().backward()
    assert not [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_length_value_model().train()
        if checkpointing:
            # The second name is the one before transformers 5.23.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            getattr(model, next(name for name in names if hasattr(model, name)))({"use_reentrant": False})
            assert model.backbone.layers[0].gradient_checkpointing
        model(tokens(2, 6)).values.square().mean().backward()
        gradients.append(model.backbone.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-7)


def test_frozen_means_no_gradient_and_no_dropout_even_inside_a_parent_that_trains():
    ids, critic = tokens(2, 6), tiny_length_value_model(tiny_llama(attention_dropout=0.5))
    parent = nn.ModuleDict({"critic": critic, "policy": nn.Linear(1, 1)})
    parent.train()
    assert not critic.frozen and not torch.equal(critic(ids).values, critic(ids).values), "dropout is at work"
    assert critic.freeze() is critic and critic.frozen
    parent.train()
    assert parent.training and parent["policy"].training
    assert not any(module.training for module in critic.modules())
    values = critic(ids).values
    assert torch.equal(values, critic(ids).values)
    assert not values.requires_grad and not any(weight.requires_grad for weight in critic.parameters())


def test_a_frozen_model_is_the_same_after_the_training_of_its_parent():
    parent = nn.ModuleDict({"critic": tiny_length_value_model().freeze(), "policy": nn.Linear(1, 1)}).train()
    before = {key: weight.clone() for key, weight in parent["critic"].state_dict().items()}
    optimizer = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        loss = parent["policy"](parent["critic"](tokens(4, 3)).values[..., None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(before[key], weight) for key, weight in parent["critic"].state_dict().items())
    assert {id(weight) for weight in optimizer.state} == {id(weight) for weight in parent["policy"].parameters()}


def test_freezing_is_not_saved(tmp_path):
    tiny_length_value_model().freeze().save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path)
    assert not loaded.frozen and all(weight.requires_grad for weight in loaded.parameters())
