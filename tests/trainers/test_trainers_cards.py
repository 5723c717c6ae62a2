"""What the card says that stands beside a trained policy."""

import pytest
from tiny import tiny_llama
from trainer_parts import VOCAB, grpo, ppo


@pytest.mark.parametrize("make", [grpo, ppo])
@pytest.mark.parametrize("kind", ["in memory", "in a folder", "on a hub"])
def test_a_card_names_what_was_trained(make, kind, tmp_path):
    policy = tiny_llama(VOCAB)
    if kind == "in a folder":
        policy.save_pretrained(tmp_path / "policy")
        policy.config._name_or_path = str(tmp_path / "policy")
    if kind == "on a hub":
        policy.config._name_or_path = "org/policy"
    trainer = make(tmp_path, policy=policy)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "None" not in card and str(tmp_path) not in card
    expected = "[org/policy](https://huggingface.co/org/policy)" if kind == "on a hub" else "a model of type `llama`"
    assert f"fine-tuned version of {expected}" in card
