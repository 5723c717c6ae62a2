"""Models as programs load them: every form with its base, tokenizers compared first, errors that say what to change."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import assert_same_logits, tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer, read_config
from lenvm_rl.prediction import weights_fingerprint
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.record import read_rollouts
from lenvm_rl.tokenization import tokenizer_fingerprint
from recipes.sample_rollouts import SampleArguments
from recipes.sample_rollouts import main as sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with its tokenizer, and a length value model of each form that was fitted on it."""
    path, base, tokenizer = tmp_path_factory.mktemp("models"), tiny_llama(), tiny_tokenizer()
    base.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    for form in ("full", "adapter", "head"):
        model = LengthValueModel.from_backbone(
            tiny_llama(), gamma=0.9, tokenizer=tokenizer, form=form, generator="the generator"
        )
        with torch.no_grad():
            for weight in (model.head if form == "full" else model).parameters():
                weight.normal_(std=0.3)
        model.save_pretrained(path / form)
    return path


@pytest.mark.parametrize("form", ["full", "adapter", "head"])
def test_every_form_is_loaded_with_the_base_that_a_program_knows(folder, form):
    found = load_length_value_model(folder / form, str(folder / "base"), tokenizer=tiny_tokenizer())
    by_hand = LengthValueModel.from_pretrained(folder / form, base=None if form == "full" else folder / "base")
    assert_same_logits(found, by_hand)
    assert found.frozen and not found.training and not any(each.requires_grad for each in found.parameters())


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_rollouts_are_sampled_in_batches_by_its_predictions(folder, form, tmp_path):
    rows = [{"prompt": f"w{6 + n} w{7 + n}"} for n in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"dataset_name": str(tmp_path / "data.jsonl"), "length_value_model": str(folder / form)}
    options["output"] = str(tmp_path / "r.jsonl")
    settings = SamplingSettings(num_samples=1, max_new_tokens=4)
    sample(SampleArguments(model_name_or_path=str(folder / "base"), **options), settings)
    rollouts, metadata = read_rollouts(tmp_path / "r.jsonl")
    assert len(rollouts) == 6
    model = load_length_value_model(folder / form, folder / "base")
    assert metadata.sampling["length_value_model"] == weights_fingerprint(model)


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_a_form_without_a_base_says_which_option_names_it(folder, form):
    with pytest.raises(ValueError, match="--base.*the generator"):
        load_length_value_model(folder / form)


def test_tokenizers_are_compared_before_weights_are_read(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "full" / "config.json").read_text())
    other = tokenizer_fingerprint(tiny_tokenizer(63))
    with pytest.raises(ValueError, match="tokenizers.*the rollouts"):
        load_length_value_model(tmp_path, tokenizer=other, tokenizer_name="the rollouts")


def test_adapters_of_a_policy_are_a_policy(folder, tmp_path):
    policy = get_peft_model(
        load_policy(folder / "base"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    policy.save_pretrained(tmp_path)
    ids = torch.tensor([[6, 7, 8]])
    torch.testing.assert_close(load_policy(tmp_path)(ids).logits, policy.eval()(ids).logits)
    assert not load_policy(tmp_path).training


def test_what_is_no_model_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="not a length value model"):
        read_config(folder / "base")
    with pytest.raises(ValueError, match="is a length value model"):
        load_policy(folder / "full")
    for load in (load_policy, load_tokenizer, read_config):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            load(tmp_path)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load(tmp_path / "nowhere")


def test_a_pad_token_is_set_if_there_is_such_a_token(folder):
    assert load_tokenizer(folder / "base", "w7").pad_token_id == 7
    assert load_tokenizer(folder / "base").pad_token == "<pad>"
    with pytest.raises(ValueError, match="pad_token '<nothing>'"):
        load_tokenizer(folder / "base", "<nothing>")


def test_a_config_says_how_the_rollouts_were_sampled(tmp_path):
    model = tiny_length_value_model()
    model.config.sampling = {"max_new_tokens": 77, "temperature": 0.5}
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path).sampling == {"max_new_tokens": 77, "temperature": 0.5}
    assert json.loads((tmp_path / "config.json").read_text())["sampling"]["max_new_tokens"] == 77
