"""The three forms of a length value model as critic in both trainers: same values, frozen, and the base held once."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_sharing import make_model
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, batch_of, counts_of_w8, grpo, logged, ppo, random_lenvm, same_weights, weights
from trl import GRPOConfig

from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.critic import TaskCritic
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOTrainer, LenVMPPOTrainer, sharding
from lenvm_rl.trainers.frozen import place_length_value_model
from lenvm_rl.trainers.reading import value_logits

TRAINERS = {"grpo": grpo, "ppo": ppo}
LORA = {"target_modules": ["q_proj", "up_proj"], "r": 2}


def base_policy(seed=1):
    return tiny_llama(VOCAB, seed=seed)


def with_adapters(base, **changes):
    return get_peft_model(base, LoraConfig(**{**LORA, **changes}))


def lenvm_on(base, form):
    """A length value model whose head, and adapter, say something."""
    return make_model(form, base, tokenizer=tiny_tokenizer(VOCAB))


def saved_policy(folder):
    """A policy on disk, from where TRL loads its reference."""
    policy = base_policy()
    policy.save_pretrained(folder)
    tiny_tokenizer(VOCAB).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("form", ["adapter", "head"])
@pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS)
def test_a_policy_with_adapters_and_its_length_value_model_learn_on_one_base(tmp_path, make, form, beta):
    base = base_policy()
    lenvm = lenvm_on(base, form)
    before, own = weights(base), weights(lenvm)
    trainer = make(tmp_path, counts_of_w8, lenvm, policy=with_adapters(base), length_coef=0.5, beta=beta, max_steps=2)
    trainer.train()
    assert same_weights(own, weights(lenvm))
    after = weights(trainer.model.get_base_model())
    shared = {name.replace(".base_layer", ""): tensor for name, tensor in after.items() if "lora" not in name}
    assert same_weights(before, shared)
    assert all(torch.isfinite(torch.tensor(logged(trainer, "advantage/length_std"))))
    assert max(abs(p).max() for n, p in trainer.model.named_parameters() if "lora_B" in n) > 0


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_its_values_are_those_of_the_base_alone_whatever_the_policy_has_learnt(tmp_path, form):
    base = base_policy()
    lenvm = lenvm_on(base, form)
    apart = lenvm_on(base_policy(), form)
    apart.load_state_dict(lenvm.state_dict())
    trainer = grpo(
        tmp_path, no_length, lenvm, policy=with_adapters(base, init_lora_weights=False), length_coef=0.5, beta=0.1
    )
    batch = batch_of(trainer)
    seen = spy_on_logits(trainer)
    again = batch_of(trainer)
    expected = completion_logits(
        apart, *(again[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
    )
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)
    assert float(expected.std()) > 0.05 and len(batch["advantages"]) == len(expected)


def no_length(completion_ids, **kwargs):
    return [float(ids[0] % 2) for ids in completion_ids]


def spy_on_logits(trainer):
    """What the trainer reads as the logits of its length value model, batch by batch."""
    seen, inner = [], trainer._frozen.logits

    def logits(*arguments):
        seen.append(inner(*arguments))
        return seen[-1]

    trainer._frozen.logits = logits
    return seen


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "reference model"])
def test_a_head_reads_the_forward_of_the_reference_and_makes_none(tmp_path, adapters):
    make_trainer = LenVMGRPOTrainer
    if adapters:
        policy = base_policy()
        lenvm = lenvm_on(policy, "head")
        # A policy that comes with adapters has a reference with adapters of its own.
        make_trainer = partial(make_trainer, peft_config=LoraConfig(**LORA, init_lora_weights=False))
    else:
        policy = saved_policy(tmp_path / "policy")
        lenvm_on(base_policy(), "head").save_pretrained(tmp_path / "lenvm")
        lenvm = str(tmp_path / "lenvm")
    trainer = grpo(tmp_path / "run", no_length, lenvm, trainer=make_trainer, policy=policy, length_coef=0.5, beta=0.1)
    model, calls = trainer.length_value_model, []
    assert trainer._frozen._reference is not None
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    seen = spy_on_logits(trainer)
    batch = batch_of(trainer)
    assert calls == []
    hook.remove()
    own = value_logits(model, "length value model", batch, trainer)
    torch.testing.assert_close(seen[0], own, atol=1e-5, rtol=1e-5)
    assert seen[0][:, 1:][~batch["completion_mask"].bool()].abs().sum() == 0
    if not adapters:
        assert model.backbone is trainer.ref_model.base_model


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["no reference", "a reference with adapters"])
def test_without_a_forward_of_its_base_a_head_makes_one(tmp_path, beta):
    base = base_policy()
    trainer = grpo(tmp_path, no_length, lenvm_on(base, "head"), policy=with_adapters(base), length_coef=0.5, beta=beta)
    assert trainer._frozen._reference is None


@pytest.mark.parametrize("decoder", ["absolute positions", "dropout", "neither"])
def test_a_reference_whose_forward_is_another_is_not_read(tmp_path, decoder):
    base, targets = base_policy(), LORA
    if decoder == "dropout":
        base.model.layers[0].self_attn.attention_dropout = 0.5
    if decoder == "absolute positions":
        base, targets = tiny_gpt2(VOCAB), {"target_modules": ["c_attn"], "fan_in_fan_out": True}
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    trainer = partial(LenVMGRPOTrainer, peft_config=LoraConfig(**targets))
    made = grpo(tmp_path, no_length, lenvm_on(base, "head"), trainer=trainer, policy=base, length_coef=0.5, beta=0.1)
    assert (made._frozen._reference is None) == (decoder != "neither")


def unique_weights(*models):
    """How many numbers the models hold together, what they share counted once."""
    held = {p.data_ptr(): p.numel() for model in models if model is not None for p in model.parameters()}
    return sum(held.values())


@pytest.mark.parametrize("form", ["full", "adapter", "head"])
def test_policy_reference_and_critic_hold_the_base_once(tmp_path, form):
    base = base_policy()
    size = sum(p.numel() for p in base.parameters())
    lenvm = random_lenvm(seed=1) if form == "full" else lenvm_on(base, form)
    own = sum(p.numel() for p in lenvm.parameters())
    trainer = ppo(
        tmp_path, no_length, lenvm, trainer=partial(LenVMPPOTrainer, peft_config=LoraConfig(**LORA)), policy=base,
        critic="lenvm", length_coef=0.5, beta=0.1,
    )  # fmt: skip
    adapters = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora" in n)
    decoder = lenvm.backbone
    held = unique_weights(trainer.model, trainer.ref_model, trainer.length_value_model, decoder)
    assert held == size + adapters + own
    assert trainer.ref_model is None
    # Of form "full" it holds a second decoder, of the others none.
    embedding = base.get_input_embeddings().weight
    assert (decoder.get_input_embeddings().weight is embedding) == (form != "full")


def test_the_base_of_a_path_is_the_reference_model(tmp_path):
    policy = saved_policy(tmp_path / "policy")
    lenvm_on(base_policy(), "adapter").save_pretrained(tmp_path / "lenvm")
    trainer = ppo(tmp_path / "run", no_length, str(tmp_path / "lenvm"), policy=policy, beta=0.1, length_coef=0.5)
    before = weights(trainer.ref_model)
    trainer.train()
    assert trainer.length_value_model.backbone is trainer.ref_model.base_model
    assert same_weights(before, weights(trainer.ref_model))


# ---- what is refused


def case_full_fine_tuning(tmp_path):
    base = base_policy()
    return {"policy": base, "lenvm": lenvm_on(base, "adapter")}


def case_path_without_reference(tmp_path):
    lenvm_on(base_policy(), "head").save_pretrained(tmp_path / "lenvm")
    return {"policy": base_policy(), "lenvm": str(tmp_path / "lenvm")}


def case_modules_to_save(tmp_path):
    base = base_policy()
    lenvm = lenvm_on(base, "head")
    return {"policy": with_adapters(base, modules_to_save=["embed_tokens"]), "lenvm": lenvm}


def case_trained_biases(tmp_path):
    base = tiny_llama(VOCAB, seed=1, attention_bias=True)
    lenvm = lenvm_on(base, "head")
    return {"policy": with_adapters(base, bias="all"), "lenvm": lenvm}


def case_moving_reference(tmp_path):
    lenvm_on(base_policy(), "head").save_pretrained(tmp_path / "lenvm")
    policy = saved_policy(tmp_path / "policy")
    return {"policy": policy, "lenvm": str(tmp_path / "lenvm"), "beta": 0.1, "sync_ref_model": True}


REFUSED = {
    case_full_fine_tuning: "shares the decoder that this run trains",
    case_path_without_reference: "shares the decoder that this run trains",
    case_modules_to_save: "embed_tokens",
    case_trained_biases: "bias='none'",
    case_moving_reference: "sync_ref_model=False",
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_a_base_that_does_not_stay_frozen_is_refused(tmp_path, case):
    with pytest.raises(ValueError, match=REFUSED[case]):
        grpo(tmp_path / "run", no_length, length_coef=0.5, **case(tmp_path))


def test_a_base_whose_weights_are_laid_end_to_end_is_refused(tmp_path, monkeypatch):
    base = base_policy()
    trainer = grpo(tmp_path, no_length, policy=with_adapters(base))
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(sharding, "engine_of", lambda trainer: "FSDP1")
    with pytest.raises(ValueError, match="fsdp_version"):
        place_length_value_model(lenvm_on(base, "head"), trainer)


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_a_learned_critic_starts_from_a_shared_backbone_with_its_adapter(tmp_path, form):
    base = base_policy()
    lenvm = lenvm_on(base, form)
    policy = with_adapters(base, init_lora_weights=False)
    trainer = ppo(tmp_path, no_length, lenvm, policy=policy, critic_init="lenvm", length_coef=0.5)
    ids = torch.tensor([[6, 7, 8, 9]])
    hidden = trainer.critic.backbone(ids).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(trainer.critic.head(hidden), torch.zeros(1, 4))
        expected = lenvm(ids).logits
        torch.testing.assert_close(lenvm.head(hidden), expected, atol=1e-5, rtol=1e-5)
    assert not {p.data_ptr() for p in trainer.critic.parameters()} & {p.data_ptr() for p in base.parameters()}
    assert isinstance(trainer.critic, TaskCritic) and isinstance(trainer.args, GRPOConfig)
    assert isinstance(lenvm, LengthValueModel)
