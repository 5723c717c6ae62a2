"""A decoder is copied or loaded whole, from a model that stays as it was, and what cannot be one is refused."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    assert_same_logits,
    assert_same_weights,
    tiny_length_value_model,
    tiny_llama,
    tiny_qwen2,
    tiny_tokenizer,
)
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lenvm_rl.modeling.backbones import check_causal
from lenvm_rl.modeling.length_value_model import LengthValueConfig, LengthValueModel

# `LlamaForCausalLM` with dropout, tied embeddings, or neither.
LLAMAS = {"plain": {}, "dropout": {"attention_dropout": 0.5}, "tied": {"tie_word_embeddings": True}}
LOADS = [LengthValueModel.from_pretrained, lambda path: LengthValueModel.from_backbone(path, gamma=0.9)]


@pytest.mark.parametrize("kind", LLAMAS)
@pytest.mark.parametrize("source", ["causal", "decoder", "path"])
def test_a_backbone_comes_from_a_policy_a_decoder_or_a_path_and_reloads(kind, source, tmp_path):
    policy = tiny_llama(**LLAMAS[kind])
    policy.save_pretrained(tmp_path / "policy")
    given = {"causal": policy, "decoder": policy.model, "path": tmp_path / "policy"}[source]
    model = LengthValueModel.from_backbone(given, gamma=0.9)
    assert_same_weights(model.backbone, policy.model)
    assert not [name for name, _ in model.named_modules() if "lm_head" in name]
    assert not model.training and all(weight.requires_grad for weight in model.parameters())
    model.save_pretrained(tmp_path / "lenvm")
    loaded = LengthValueModel.from_pretrained(tmp_path / "lenvm")
    assert_same_weights(model, loaded)
    assert_same_logits(model, loaded)


def test_the_policy_is_left_as_it_was():
    policy = tiny_llama().train()
    policy.model.embed_tokens.weight.requires_grad_(False)
    policy.enable_input_require_grads()
    before, config = {key: weight.clone() for key, weight in policy.state_dict().items()}, policy.config.to_dict()
    model = LengthValueModel.from_backbone(policy, gamma=0.9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    model.config.backbone_config.hidden_act = "relu"
    assert policy.training and policy.config.to_dict() == config
    assert not policy.model.embed_tokens.weight.requires_grad and policy.lm_head.weight.requires_grad
    assert all(torch.equal(before[key], weight) for key, weight in policy.state_dict().items())
    assert model.get_input_embeddings().weight.requires_grad
    assert not model.get_input_embeddings()._forward_hooks, "a hook of the policy would give a frozen model a gradient"


def test_a_policy_in_bfloat16_gives_a_decoder_in_float32_with_the_same_numbers():
    policy = tiny_qwen2().to(torch.bfloat16)
    model = LengthValueModel.from_backbone(policy, gamma=0.9)
    assert model.dtype == model.config.dtype == model.config.backbone_config.dtype == torch.float32
    assert torch.equal(model.backbone.embed_tokens.weight, policy.model.embed_tokens.weight.float())
    kept = LengthValueModel.from_backbone(policy, gamma=0.9, dtype=torch.bfloat16)
    assert kept.dtype == torch.bfloat16 and kept.head.hidden.weight.dtype == torch.float32
    assert policy.dtype == torch.bfloat16


def test_a_policy_with_resized_embeddings_keeps_them(tmp_path):
    policy = tiny_llama()
    policy.resize_token_embeddings(70)
    model = LengthValueModel.from_backbone(policy, gamma=0.9, tokenizer=tiny_tokenizer(vocab_size=70))
    model.save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, policy.get_input_embeddings().weight)


def test_a_layer_that_was_replaced_in_a_given_decoder_keeps_its_weights():
    decoder = tiny_llama().model
    decoder.layers[0].mlp.up_proj = nn.Linear(16, 32, bias=False)
    weight = decoder.layers[0].mlp.up_proj.weight.clone()
    LengthValueModel(LengthValueConfig(backbone_config=decoder.config, gamma=0.9), backbone=decoder)
    assert torch.equal(decoder.layers[0].mlp.up_proj.weight, weight)


def test_what_is_no_plain_decoder_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    lenvm = tiny_length_value_model()
    lenvm.save_pretrained(tmp_path)
    for given, message in (
        (adapted, "merge its adapters"),
        (adapted.base_model.model, "LlamaForCausalLM"),
        (nn.DataParallel(tiny_llama()), "unwrap it"),
        (None, "NoneType"),
        (encoder_decoder, "encoder-decoder"),
        (lenvm, "length value model already"),
        (tmp_path, "length value model already"),
    ):
        with pytest.raises(ValueError, match=message):
            LengthValueModel.from_backbone(given, gamma=0.9)
    with pytest.raises(ValueError, match=r"\['revision'\] say how to load"):
        LengthValueModel.from_backbone(tiny_llama(), gamma=0.9, revision="main")


def test_a_decoder_that_could_not_be_loaded_again_is_refused():
    class OtherModel(LlamaModel):
        pass

    policy = tiny_llama()
    policy.model = OtherModel(policy.config)
    with pytest.raises(ValueError, match="OtherModel.*LlamaModel"):
        LengthValueModel.from_backbone(policy, gamma=0.9)


def tiny_bert(**config):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, intermediate_size=32, **config)).eval()


def tiny_gemma3(**config):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 32, "sliding_window": 8}
    return Gemma3TextModel(Gemma3TextConfig(**sizes, **config)).eval()


@pytest.mark.parametrize("form", ["full", "adapter", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_that_looks_ahead_is_refused(form, dtype):
    settings = {"dtype": dtype} if form == "full" else {}
    for encoder, name in ((tiny_bert(), "BertModel"), (tiny_gemma3(use_bidirectional_attention=True), "Gemma3")):
        with pytest.raises(ValueError, match=f"In {name}.*causal"):
            LengthValueModel.from_backbone(encoder.to(getattr(torch, dtype)), gamma=0.9, form=form, **settings)
    for decoder in (tiny_bert(is_decoder=True), tiny_gemma3()):
        LengthValueModel.from_backbone(decoder.to(getattr(torch, dtype)), gamma=0.9, form=form, **settings)


def test_asking_whether_a_decoder_is_causal_leaves_it_as_it_was():
    decoder = tiny_bert(is_decoder=True, hidden_dropout_prob=0.5).train()
    decoder.encoder.layer[0].eval()
    before, state = [module.training for module in decoder.modules()], torch.get_rng_state()
    check_causal(decoder)
    assert [module.training for module in decoder.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_decoder_without_its_weights_is_not_asked():
    with torch.device("meta"):
        check_causal(BertModel(BertConfig(num_hidden_layers=1)))


def rewrite(folder, change):
    """Changes what a saved model's file holds."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("both", [False, True])
def test_tied_embeddings_that_are_stored_as_the_output_are_found(tmp_path, both):
    policy = tiny_llama(tie_word_embeddings=True)
    policy.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"].clone()}))
    if not both:
        rewrite(tmp_path, lambda stored: stored.pop("model.embed_tokens.weight"))
    model = LengthValueModel.from_backbone(tmp_path, gamma=0.9)
    assert_same_weights(model.backbone, policy.model)


@pytest.mark.parametrize(
    ("tied", "lost"),
    [
        (False, "embed_tokens.weight"),
        (True, "embed_tokens.weight"),
        (False, "norm.weight"),
        (True, "layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_decoder_that_lacks_weights_is_refused_not_filled_at_random(tmp_path, tied, lost):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: stored.pop(f"model.{lost}"))
    with pytest.raises(ValueError, match=f"lacks weights, which would be random: {lost}[.] The checkpoint"):
        LengthValueModel.from_backbone(tmp_path, gamma=0.9)


def test_a_checkpoint_of_adapters_or_of_another_model_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: [stored.update({f"other.{name}": stored.pop(name)}) for name in list(stored)])
    with pytest.raises(ValueError, match="lacks weights, which would be random: embed_tokens.weight, layers.0"):
        LengthValueModel.from_backbone(tmp_path, gamma=0.9)


def test_only_safetensors_of_a_policy_are_loaded(tmp_path):
    policy = tiny_llama()
    policy.config.save_pretrained(tmp_path)
    torch.save(policy.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        LengthValueModel.from_backbone(tmp_path, gamma=0.9)


def test_adapters_merged_into_a_policy_are_in_the_decoder():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    merged = adapted.merge_and_unload()
    weight = LengthValueModel.from_backbone(merged, gamma=0.9).backbone.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, merged.model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(weight, tiny_llama().model.layers[0].self_attn.q_proj.weight)


def test_a_tokenizer_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="64"):
        LengthValueModel.from_backbone(tiny_llama(), gamma=0.9, tokenizer=tiny_tokenizer(vocab_size=65))


@pytest.mark.parametrize("load", LOADS)
def test_a_path_that_does_not_exist_is_called_that_and_never_asked_of_the_hub(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("outputs")
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "../none", "~/none", "a/b/c", "outputs/none"):
        with pytest.raises(FileNotFoundError, match=r"There is no model at '.*' \(looked from .*\): check the path"):
            load(path)


@pytest.mark.parametrize("load", LOADS)
def test_a_name_that_may_be_a_hub_id_is_said_to_be_no_folder_first(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^There is no folder 'someone/lenvm' .* and as a hub id"):
        load("someone/lenvm")


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_length_value_model()
    model.save_pretrained(tmp_path / "lenvm")
    assert_same_weights(model, LengthValueModel.from_pretrained("~/lenvm"))


def test_a_decoder_of_a_type_nobody_knows_is_called_by_its_name():
    with pytest.raises(ValueError, match="nonsense"):
        LengthValueConfig(backbone_config={"model_type": "nonsense"}, gamma=0.9)
    with pytest.raises(ValueError, match="model_type"):
        LengthValueConfig(backbone_config={"hidden_size": 3}, gamma=0.9)
