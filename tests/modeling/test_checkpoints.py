"""Released checkpoints: the same values as a forward by hand, and nothing guessed."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EOS, assert_same_logits, assert_same_weights, tiny_llama, tiny_qwen2, tiny_tokenizer, tokens

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.released import HEAD_FILE, load_released_checkpoint
from lenvm_rl.tokenization import tokenizer_fingerprint

HIDDEN = 16


def head_weights(linear=False, hidden=HIDDEN, dtype=torch.float32):
    draw = torch.Generator().manual_seed(3)
    shapes = {"summary.weight": (1, hidden), "summary.bias": (1,), "fc.weight": (hidden, hidden), "fc.bias": (hidden,)}
    names = list(shapes)[: 2 if linear else 4]
    return {f"v_head.{name}": torch.randn(shapes[name], generator=draw).to(dtype) for name in names}


def released(folder, policy, weights, tokenizer=True):
    """A folder as the released code writes it."""
    policy.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    save_file(weights, os.path.join(folder, HEAD_FILE), metadata={"format": "pt"})
    return folder


def values_by_hand(policy, weights, ids):
    """V = -sigmoid(summary(SiLU(fc(h)))) in float64, h being what the language-model head reads."""
    with torch.no_grad():
        h = policy(ids, output_hidden_states=True).hidden_states[-1].double()
    weights = {name: weight.double() for name, weight in weights.items()}
    if "v_head.fc.weight" in weights:
        h = h @ weights["v_head.fc.weight"].T + weights["v_head.fc.bias"]
        h = h / (1 + torch.exp(-h))
    z = (h @ weights["v_head.summary.weight"].T + weights["v_head.summary.bias"]).squeeze(-1)
    return -1 / (1 + torch.exp(-z))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_values_are_those_of_a_forward_by_hand(tmp_path, make, linear):
    policy, weights, ids = make(), head_weights(linear), tokens(3, 7)
    model = load_released_checkpoint(released(tmp_path, policy, weights), gamma=0.997, generator="a policy")
    with torch.no_grad():
        values = model(ids).values
    expected = values_by_hand(policy, weights, ids)
    assert expected.std() > 0.05
    assert (values - expected).abs().max() < 1e-6
    assert model.config.gamma == 0.997 and model.config.generator == "a policy"
    assert model.config.tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    assert not model.training


def test_what_was_imported_is_saved_and_loaded_bit_for_bit(tmp_path):
    model = load_released_checkpoint(released(tmp_path / "theirs", tiny_llama(), head_weights()), gamma=0.9998)
    model.save_pretrained(tmp_path / "ours")
    again = LengthValueModel.from_pretrained(tmp_path / "ours")
    assert_same_weights(model, again)
    assert_same_logits(model, again)
    assert again.config.gamma == 0.9998


def test_an_imported_linear_head_can_still_learn_in_every_unit(tmp_path):
    model = load_released_checkpoint(released(tmp_path, tiny_llama(), head_weights(linear=True)), gamma=0.9)
    model(tokens(2, 5)).logits.sum().backward()
    assert (model.head.output.weight.grad != 0).all()


def test_a_head_in_half_precision_becomes_float32_without_loss(tmp_path):
    weights = head_weights(dtype=torch.bfloat16)
    model = load_released_checkpoint(released(tmp_path, tiny_llama(), weights), gamma=0.9)
    assert model.head.hidden.weight.dtype == torch.float32
    assert torch.equal(model.head.hidden.weight, weights["v_head.fc.weight"].float())


def test_tied_embeddings_under_the_name_of_the_output_are_found(tmp_path):
    """Loaded as a bare decoder, such a checkpoint would get random embeddings."""
    policy, ids = tiny_llama(tie_word_embeddings=True), tokens(2, 5)
    folder = released(tmp_path, policy, head_weights())
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_released_checkpoint(folder, gamma=0.9)
    with torch.no_grad():
        assert (model(ids).values - values_by_hand(policy, head_weights(), ids)).abs().max() < 1e-6

    del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights, which would be random: embed_tokens.weight"):
        load_released_checkpoint(folder, gamma=0.9)


def test_untied_embeddings_are_never_taken_from_the_output(tmp_path):
    folder = released(tmp_path, tiny_llama(), head_weights())
    stored = load_file(folder / "model.safetensors")
    del stored["model.embed_tokens.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights, which would be random: embed_tokens.weight"):
        load_released_checkpoint(folder, gamma=0.9)


@pytest.mark.parametrize("gamma", [None, 0.0, 1.0, 1.5, "0.9", float("nan")])
def test_gamma_has_to_be_known(tmp_path, gamma):
    with pytest.raises(ValueError, match="gamma"):
        load_released_checkpoint(released(tmp_path, tiny_llama(), head_weights()), gamma=gamma)


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        load_released_checkpoint(tmp_path / "nothing", gamma=0.9)
    folder = released(tmp_path / "a", tiny_llama(), head_weights())
    os.rename(folder / HEAD_FILE, folder / "value_head.bin")
    with pytest.raises(FileNotFoundError, match="value_head.bin"):
        load_released_checkpoint(folder, gamma=0.9)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop("v_head.fc.bias"), "has the weights"),
        (lambda w: w.update({"v_head.other": torch.zeros(1)}), "v_head.other"),
        (lambda w: w.update(head_weights(hidden=8)), "reads 8 numbers per token, but its decoder gives 16"),
    ],
)
def test_a_head_of_another_shape_is_refused(tmp_path, change, problem):
    weights = head_weights()
    change(weights)
    with pytest.raises(ValueError, match=problem):
        load_released_checkpoint(released(tmp_path, tiny_llama(), weights), gamma=0.9)


def test_the_tokenizer_is_the_given_one_or_the_checkpoints_or_none(tmp_path):
    folder = released(tmp_path / "a", tiny_llama(), head_weights())
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<eos>"}), encoding="utf-8")
    # Most base models pad with their end; the one that is handed over counts.
    assert load_released_checkpoint(folder, gamma=0.9).config.tokenizer_fingerprint["pad_token_id"] == EOS
    model = load_released_checkpoint(folder, gamma=0.9, tokenizer=tiny_tokenizer())
    assert model.config.tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())

    bare = released(tmp_path / "b", tiny_llama(), head_weights(), tokenizer=False)
    assert load_released_checkpoint(bare, gamma=0.9).config.tokenizer_fingerprint is None
    with pytest.raises(ValueError, match="99"):
        load_released_checkpoint(bare, gamma=0.9, tokenizer=tiny_tokenizer(100))
