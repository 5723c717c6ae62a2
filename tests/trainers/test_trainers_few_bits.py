"""Value models on a base that is held in few bits: a stand-in for bitsandbytes refuses what its layers cannot do."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from trainer_parts import VOCAB, counts_of_w8, grpo, ppo, same_weights, weights

from lenvm_rl.modeling.critic import TaskCritic, load_critic
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.sharing import FULL

LORA = {"target_modules": ["q_proj", "up_proj"], "r": 2}
FORMS = ("adapter", "head")


class FewBits(nn.Linear):
    """A linear layer of weights in 8 bits: they take no gradient, are neither cast nor copied, and are read by the
    layer's own forward alone, through which gradients reach its input."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale, persistent=False)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden_states):
        weight = self.weight.float() * self.scale
        return nn.functional.linear(hidden_states.float(), weight, self.bias).to(hidden_states.dtype)

    def _apply(self, fn, recurse=True):
        assert fn(torch.empty(0, dtype=torch.float16)).dtype == torch.float16, "weights in few bits are not cast"
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo):
        raise AssertionError("weights in few bits are not copied")


def few_bits(seed=1):
    """A policy whose linear layers are held in few bits, with the marks of transformers."""
    model = tiny_llama(VOCAB, seed=seed).requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in [*part.named_children()]:
                if isinstance(child, nn.Linear):
                    setattr(part, name, FewBits(child))
    model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    return model


@pytest.mark.parametrize("form", FORMS)
def test_policy_length_value_model_and_critic_learn_on_one_base_in_few_bits(tmp_path, form):
    base = few_bits()
    before = weights(base)
    lenvm = LengthValueModel.from_backbone(base, 0.9, tiny_tokenizer(VOCAB), form=form)
    trainer = ppo(
        tmp_path, counts_of_w8, lenvm, policy=get_peft_model(base, LoraConfig(**LORA)), length_coef=0.5,
        critic_form=form, critic_learning_rate=1e-2, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    own, adapters = weights(trainer.critic), weights(trainer.model)
    trainer.train()
    after = weights(trainer.critic)
    assert not any(torch.equal(own[name], after[name]) for name in own)
    assert {weight.dtype for part in (trainer.critic, lenvm) for weight in part.parameters()} == {torch.float32}
    assert not same_weights(adapters, weights(trainer.model))
    held = {name.replace(".base_layer", ""): weight for name, weight in weights(base).items() if "lora" not in name}
    assert same_weights(before, held)
    assert not any(weight.requires_grad or weight.grad is not None for name, weight in base.named_parameters()
                   if "lora" not in name)  # fmt: skip
    # What is saved does not say how many bits its base was held in, and is taken up on it again.
    loaded = load_critic(tmp_path / "checkpoint-3" / "critic", base=few_bits())
    assert same_weights(weights(loaded), after)
    assert not hasattr(loaded.config.backbone_config, "quantization_config")


@pytest.mark.parametrize("form", FORMS)
def test_a_length_value_model_has_the_values_of_the_base_in_few_bits(tmp_path, form):
    base, ids = few_bits(), torch.tensor([[6, 7, 8, 9]])
    model = LengthValueModel.from_backbone(base, 0.9, tiny_tokenizer(VOCAB), form=form)
    with torch.no_grad():
        expected = model.head(base.model(ids).last_hidden_state)
        torch.testing.assert_close(model(ids).logits, expected)
    trainer = grpo(tmp_path, counts_of_w8, model, policy=get_peft_model(base, LoraConfig(**LORA)), length_coef=0.5)
    with torch.no_grad():
        torch.testing.assert_close(trainer.length_value_model(ids).logits, expected)


@pytest.mark.parametrize("kind", [LengthValueModel, TaskCritic])
def test_a_copy_of_a_base_in_few_bits_is_refused(kind):
    with pytest.raises(ValueError, match="quantised.*form='head'"):
        kind.from_backbone(few_bits(), form=FULL, **({"gamma": 0.9} if kind is LengthValueModel else {}))
