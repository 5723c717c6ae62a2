"""A task critic of form adapter or head: on the frozen base of the run, held once, the values of a full one."""

import pytest
import torch
from critic_parts import critic as full_critic
from critic_parts import reward_model
from peft import LoraConfig
from test_sharing import make_model
from test_trainers_forms import LORA, base_policy, saved_policy, unique_weights, with_adapters
from tiny import tiny_llama, tiny_tokenizer
from trainer_parts import (
    VOCAB,
    batch_of,
    counts_of_w8,
    first_is_w8,
    logged,
    ppo,
    random_lenvm,
    same_weights,
    scripted,
    settings,
    weights,
)

from lenvm_rl.modeling.critic import TaskCritic, load_critic
from lenvm_rl.trainers import LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.reading import value_logits

FORMS = ("adapter", "head")
# Hidden states of 16 numbers: 16 * 16 + 16 of the first layer, 16 + 1 of the second.
HEAD_SIZE = 289
# Rank 16 on every linear layer of the two of the decoder: q and o (16, 16), k and v (16, 8), three of the MLP (16, 32).
ADAPTER_SIZE = 2 * 16 * (2 * 32 + 2 * 24 + 3 * 48)
SIZES = {"head": HEAD_SIZE, "adapter": HEAD_SIZE + ADAPTER_SIZE}


def with_peft(*arguments, **options):
    """A trainer that puts the adapters on, whose reference is then the base without any."""
    torch.manual_seed(2)
    return LenVMPPOTrainer(*arguments, peft_config=LoraConfig(**LORA, init_lora_weights=False), **options)


def run(folder, form="head", base="adapters", rewards=counts_of_w8, **changes):
    """A trainer whose critic shares the base that is named: under adapters, or the reference's of either kind."""
    torch.manual_seed(2)
    if base == "adapters":
        changes = {"policy": with_adapters(base_policy(), init_lora_weights=False), **changes}
    elif base == "adapters and reference":
        changes = {"policy": base_policy(), "trainer": with_peft, "beta": 0.1, **changes}
    else:
        changes = {"policy": saved_policy(folder / "policy"), "beta": 0.1, **changes}
    return ppo(folder / "run", rewards, critic_form=form, **{"critic_learning_rate": 1e-2, **changes})


BASES = ("adapters", "adapters and reference", "reference model")


def say_something(critic):
    """Draw all that learns of a critic, in place."""
    with torch.no_grad():
        for weight in critic.parameters():
            weight.normal_(std=0.3)


def full_like(critic):
    """A full critic on a copy of the base, the adapter merged into it, with the same head."""
    base = TaskCritic(critic.config.__class__(critic.backbone.config), backbone=critic._shared.copy(torch.float32))
    base.head.load_state_dict(critic.head.state_dict())
    return base


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_its_values_are_those_of_a_full_critic_on_the_base(tmp_path, form, base):
    trainer = run(tmp_path, form, base)
    assert float(batch_of(trainer)["critic_values"].abs().max()) == 0.0
    say_something(trainer.critic)
    batch = batch_of(trainer)
    expected = value_logits(full_like(trainer.critic), "task critic", batch, trainer)
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(batch["critic_values"], expected[:, :-1], atol=1e-5, rtol=1e-5)
    # What the steps learn from says the same.
    torch.testing.assert_close(trainer._values(batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_a_head_makes_one_forward_per_batch_or_none(tmp_path, base):
    trainer = run(tmp_path, "head", base, num_iterations=2, max_steps=4)
    calls, own = [], base == "adapters"
    assert trainer._states.reads_along() != own
    trainer.critic._shared.seen_alone = counting(trainer.critic._shared.seen_alone, calls)
    trainer.train()
    # Two generation batches of two steps each.
    assert len(calls) == (2 if own else 0) and len(logged(trainer, "critic/value_loss")) == 4
    batch = batch_of(trainer)
    rows, tokens = batch["completion_ids"].shape
    assert batch["critic_states"].shape == (rows, tokens + 1, 16)


def counting(function, calls):
    def counted(*arguments):
        calls.append(1)
        return function(*arguments)

    return counted


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_only_what_it_adds_to_the_base_learns_from_the_value_loss(tmp_path, form, base):
    trainer = run(tmp_path, form, base, critic_warmup_steps=3, max_steps=3)
    policy, own = weights(trainer.model), weights(trainer.critic)
    shared = weights(trainer.critic.backbone)
    trainer.train()
    assert same_weights(policy, weights(trainer.model)) and same_weights(shared, weights(trainer.critic.backbone))
    after = weights(trainer.critic)
    assert {name for name in own if torch.equal(own[name], after[name])} == set()
    assert not any(name.startswith("backbone") for name in own)


@pytest.mark.parametrize("form", FORMS)
def test_the_policy_learns_what_it_learns_beside_a_full_critic_that_says_the_same(tmp_path, form):
    """At a learning rate of next to nothing the values stay 0, so the critic's form must not be seen in the policy."""
    results = []
    for each in (form, "full"):
        trainer = run(tmp_path / each, each, critic_learning_rate=1e-30)
        start = weights(trainer.model)
        # Another critic has drawn other numbers.
        torch.manual_seed(0)
        trainer.train()
        results.append(weights(trainer.model))
    assert same_weights(*results) and not same_weights(start, results[0])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_policy_reference_length_value_model_and_critic_hold_the_base_once(tmp_path, form, base):
    policy = base_policy()
    size = sum(weight.numel() for weight in policy.parameters())
    if base == "reference model":
        lenvm, changes = None, {}
    else:
        lenvm = make_model(form, policy, tokenizer=tiny_tokenizer(VOCAB))
        changes = {"policy": policy if base != "adapters" else with_adapters(policy), "length_coef": 0.5}
    trainer = run(tmp_path, form, base, lenvm=lenvm, **changes)
    parts = (trainer.model, trainer.ref_model, lenvm, trainer.critic, trainer.critic.backbone)
    adapters = sum(weight.numel() for name, weight in trainer.model.named_parameters() if "lora" in name)
    own = 0 if lenvm is None else sum(weight.numel() for weight in lenvm.parameters())
    models = 2 if base == "reference model" else 1
    assert unique_weights(*parts) == models * size + adapters + own + SIZES[form]
    assert sum(weight.numel() for weight in trainer.critic.parameters()) == SIZES[form]
    trainer.train()


@pytest.mark.parametrize("form", FORMS)
def test_it_learns_to_say_what_is_paid(tmp_path, form):
    """The first of three tokens decides: no state before it can tell, and the two after it can, which is two thirds."""
    trainer = run(
        tmp_path, form, rewards=first_is_w8, trainer=scripted(LenVMPPOTrainer, [[8, 8, 8], [9, 9, 9]] * 4),
        critic_warmup_steps=40, max_steps=40, cliprange_value=None, critic_learning_rate=3e-2,
    )  # fmt: skip
    trainer.train()
    explained = logged(trainer, "critic/explained_variance")
    assert explained[0] == 0.0 and 0.4 < explained[-1] < 0.7


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_saved_alone_taken_up_again_and_resumed(tmp_path, form, base):
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "cliprange_value": 0.01}
    whole = run(tmp_path, form, base, **saved)
    whole.train()
    folder = tmp_path / "run" / "checkpoint-2"
    loaded = load_critic(folder / "critic", base=base_policy())
    assert sum(weight.numel() for weight in loaded.parameters()) == SIZES[form] and loaded.config.form == form
    resumed = run(tmp_path, form, base, **saved)
    resumed.train(resume_from_checkpoint=str(folder))
    assert same_weights(weights(resumed.critic), weights(whole.critic))
    assert same_weights(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "critic/value_loss") == logged(whole, "critic/value_loss")
    # Another run takes it as it is: the same, which learns, or one that is read alone.
    again = run(tmp_path, "full", base, critic=str(folder / "critic"))
    assert same_weights(weights(again.critic), weights(loaded)) and again.critic.config.form == form
    still = run(tmp_path, form, base, critic=str(folder / "critic"), critic_learning_rate=0.0)
    still.train()
    assert same_weights(weights(still.critic), weights(loaded)) and not logged(still, "critic/value_loss")
    assert "critic_states" not in batch_of(still)


def test_an_object_on_the_base_of_the_policy_is_used_itself(tmp_path):
    policy = with_adapters(base_policy())
    given = TaskCritic.from_backbone(policy, form="head")
    trainer = run(tmp_path, "full", policy=policy, critic=given)
    assert trainer.critic is given and given.backbone is policy.get_base_model().model
    trainer.train()
    # The policy itself stands for "learned".
    assert run(tmp_path, "head", policy=policy, critic=policy).critic.config.form == "head"


def test_activations_made_again_are_the_policys_alone(tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer = run(tmp_path, "adapter", gradient_checkpointing=checkpointing, max_steps=2)
        torch.manual_seed(0)
        trainer.train()
        results.append(weights(trainer.critic))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_a_head_learns_what_a_full_critic_on_a_frozen_decoder_learns(tmp_path, base):
    results = []
    for form in ("head", "full"):
        given = "learned"
        if form == "full":
            given = TaskCritic.from_backbone(base_policy())
            given.backbone.requires_grad_(False)
        trainer = run(tmp_path / form, form, base, critic=given, max_steps=4, num_iterations=2, steps_per_generation=2)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for weight in trainer.critic.head.parameters():
                weight.normal_(std=0.3, generator=generator)
        start = weights(trainer.critic.head)
        torch.manual_seed(0)
        trainer.train()
        results.append(weights(trainer.critic.head) | weights(trainer.model))
    assert not torch.allclose(start["output.weight"], results[0]["output.weight"], atol=1e-3)
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_on_a_base_in_bfloat16_what_learns_is_float32(tmp_path, form):
    policy = with_adapters(base_policy().bfloat16())
    trainer = run(tmp_path, form, policy=policy, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    batch = batch_of(trainer)
    assert {weight.dtype for weight in trainer.critic.parameters()} == {torch.float32}
    assert trainer.critic.backbone.dtype == torch.bfloat16 and batch["critic_values"].dtype == torch.float32
    assert float(batch["critic_values"].std()) > 0.0
    if form == "head":
        assert batch["critic_states"].dtype == torch.bfloat16
    loaded = load_critic(tmp_path / "run" / "checkpoint-2" / "critic", base=policy)
    assert same_weights(weights(loaded), weights(trainer.critic))


# ---- what is refused


def trained_whole(tmp_path, form):
    return {"policy": base_policy()}


def trained_biases(tmp_path, form):
    return {"policy": with_adapters(tiny_llama(VOCAB, seed=1, attention_bias=True), bias="all")}


def moving_reference(tmp_path, form):
    return {"policy": saved_policy(tmp_path / "policy"), "beta": 0.1, "sync_ref_model": True}


def another_form(tmp_path, form):
    return {"policy": with_adapters(base_policy()), "critic": full_critic()}


def a_reward_model(tmp_path, form):
    return {"policy": with_adapters(base_policy()), "critic": reward_model()}


def none_at_all(tmp_path, form):
    return {"policy": with_adapters(base_policy()), "critic": "lenvm", "lenvm": random_lenvm()}


def another_base(tmp_path, form):
    TaskCritic.from_backbone(tiny_llama(VOCAB, hidden=24), form=form).save_pretrained(tmp_path / "critic")
    return {"policy": with_adapters(base_policy()), "critic": str(tmp_path / "critic")}


REFUSED = {
    trained_whole: "use_peft.*beta.*critic_form='full'",
    trained_biases: "bias='none'.*critic_form='full'",
    moving_reference: "sync_ref_model=False.*critic_form='full'",
    another_form: "critic_form.*form 'full'",
    a_reward_model: "critic_form.*form 'full'",
    none_at_all: "critic_form",
    another_base: "hidden_size 24 there and 16 here",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_what_has_no_such_critic_is_refused(tmp_path, case, form):
    with pytest.raises(ValueError, match=REFUSED[case]):
        ppo(tmp_path / "run", critic_form=form, **case(tmp_path, form))


def test_a_form_that_is_none_or_starts_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match="critic_form"):
        LenVMPPOConfig(**settings(tmp_path, critic_form="lora"))
    with pytest.raises(ValueError, match="critic_init"):
        LenVMPPOConfig(**settings(tmp_path, critic_form="head", critic_init="lenvm"))


def test_a_run_does_not_go_on_with_a_critic_of_another_form(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run(tmp_path, "head", **saved).train()
    for form in ("adapter", "full"):
        with pytest.raises(ValueError, match=f"form 'head' there and '{form}' here"):
            run(tmp_path, form, **saved).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
