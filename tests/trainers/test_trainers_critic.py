"""What is handed over as `critic=` is respected: its head, its adapters, what is frozen in it; and saved as it is."""

import copy
import json
import logging
import shutil

import pytest
import torch
from critic_parts import LORA, SCORES, SHAPES, critic, frozen, reward_model
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from tiny import EOS, tiny_gpt2, tiny_llama, tiny_tokenizer
from trainer_parts import (
    VOCAB,
    batch_of,
    counts_of_w8,
    first_is_w8,
    grpo,
    logged,
    ppo,
    prompts,
    random_lenvm,
    same_weights,
    scripted,
    settings,
    weights,
)
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForSequenceClassification

from lenvm_rl.modeling.adapters import bare_model, merged_copy
from lenvm_rl.modeling.critic import load_critic
from lenvm_rl.trainers import LenVMPPOConfig, LenVMPPOTrainer, TaskCritic

RUN = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "critic_learning_rate": 1e-2, "logging_steps": 1}
IDS = torch.tensor([[3, 8, 9, 4, 15, 8], [7, 7, 3, 8, 10, 6]])


@torch.no_grad()
def values(model):
    """A critic's values. Of a copy: the last bit depends on where weights lie in memory."""
    return copy.deepcopy(model).eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@torch.no_grad()
def scores(model):
    """What a model with a score head says at every token."""
    bare = bare_model(copy.deepcopy(model)).eval()
    states = bare.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    return bare.score(states).squeeze(-1).float()


def flags(model):
    return {name: (weight.requires_grad, weight.dtype) for name, weight in model.named_parameters()}


def learning(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


# The others differ from one of these in a detail.
QUICK = (
    "a frozen decoder in bfloat16",
    "all in bfloat16",
    "a reward model",
    "a critic with adapters and its head",
    "a reward model in bfloat16 with adapters",
    "a language model with adapters",
    "two adapters",
)


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[] if shape in QUICK else pytest.mark.slow) for shape in SHAPES]
)
def test_what_is_given_is_kept_trained_saved_and_taken_up_again(tmp_path, shape):
    make, learn, total, half, adapters = SHAPES[shape]
    given = make()
    before, given_flags = weights(given), flags(given)
    trainer = ppo(tmp_path / "run", critic=given, **RUN)
    ours, start = trainer.critic, weights(trainer.critic)
    assert sum(weight.numel() for weight in learning(ours)) == learn
    assert sum(weight.numel() for weight in ours.parameters()) == total
    assert {weight.dtype for weight in learning(ours)} == {torch.float32}
    assert (torch.bfloat16 in {weight.dtype for weight in ours.parameters()}) == half
    assert [*(ours.config.adapters or {})] == adapters
    trainer.train()
    # What learns has moved, everything else has not.
    moved = {name for name, weight in weights(ours).items() if not torch.equal(weight, start[name])}
    assert moved == {name for name, weight in ours.named_parameters() if weight.requires_grad}
    if not isinstance(given, TaskCritic):
        assert same_weights(weights(given), before) and flags(given) == given_flags

    folder = tmp_path / "run" / "checkpoint-2" / "critic"
    loaded = load_critic(folder)
    assert same_weights(weights(loaded), weights(ours)) and flags(loaded) == flags(ours)
    assert torch.equal(values(loaded), values(ours))
    resumed = ppo(tmp_path / "run", critic=make(), **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same_weights(weights(resumed.critic), weights(ours)) and flags(resumed.critic) == flags(ours)
    assert same_weights(weights(resumed.model), weights(trainer.model))
    again = ppo(tmp_path / "again", critic=str(folder), **RUN)
    assert same_weights(weights(again.critic), weights(ours)) and flags(again.critic) == flags(ours)


@pytest.mark.parametrize(
    "adapters",
    [
        None,
        LoraConfig(**SCORES, target_modules="all-linear", rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 5}),
        LoraConfig(**SCORES, target_modules=["q_proj"], use_dora=True),
        IA3Config(task_type="SEQ_CLS", init_ia3_weights=False),
    ],
    ids=["plain", "lora", "dora", "ia3"],
)
def test_the_values_of_a_reward_model_are_its_scores(tmp_path, adapters):
    given = reward_model()
    if adapters is not None:
        given = get_peft_model(given, adapters)
    ours = ppo(tmp_path, critic=given).critic
    torch.testing.assert_close(values(ours), scores(given), atol=1e-5, rtol=1e-5)
    assert float(scores(given).std()) > 0.01 and "backbone.lm_head.weight" not in weights(ours)


def test_a_reward_model_is_read_from_its_folder_with_its_head(tmp_path):
    reward_model().bfloat16().save_pretrained(tmp_path / "reward")
    trainer = ppo(tmp_path / "run", critic=str(tmp_path / "reward"), max_steps=1, critic_learning_rate=1e-2)
    expected = reward_model()
    for weight in expected.parameters():
        weight.data = weight.data.bfloat16().float()
    torch.testing.assert_close(values(trainer.critic), scores(expected), atol=1e-5, rtol=1e-5)
    assert {weight.dtype for weight in trainer.critic.parameters()} == {torch.float32}
    also = ppo(tmp_path / "run", critic_init=str(tmp_path / "reward")).critic
    assert same_weights(weights(also), weights(trainer.critic)) and all(p.requires_grad for p in also.parameters())
    trainer.train()


@pytest.mark.parametrize("base", ["reward", "language"])
def test_adapters_are_read_from_their_folder_on_the_base_that_they_name(tmp_path, base):
    if base == "reward":
        reward_model().save_pretrained(tmp_path / "base")
        model, task = reward_model(), SCORES
    else:
        tiny_llama(VOCAB, seed=7).save_pretrained(tmp_path / "base")
        model, task = tiny_llama(VOCAB, seed=7), LORA
    model.config._name_or_path = str(tmp_path / "base")
    given = get_peft_model(model, LoraConfig(**task, target_modules=["q_proj"]))
    given.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    given.save_pretrained(tmp_path / "adapters")
    trainer = ppo(tmp_path / "run", critic=str(tmp_path / "adapters"), max_steps=1, critic_learning_rate=1e-2)
    learn = {name for name, weight in trainer.critic.named_parameters() if weight.requires_grad}
    assert any("lora_A" in name for name in learn) and not any("base_layer" in name for name in learn)
    if base == "reward":
        torch.testing.assert_close(values(trainer.critic), scores(given), atol=1e-5, rtol=1e-5)
        assert "head.output.weight" in learn
    else:
        assert float(values(trainer.critic).abs().max()) == 0.0 and "head.hidden.weight" in learn
    trainer.train()


def test_a_decoder_without_a_head_gets_one_and_it_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lenvm_rl")
    given = frozen(tiny_llama(VOCAB, seed=7))
    ours = ppo(tmp_path, critic=given).critic
    assert "the LlamaForCausalLM has no score head: the critic gets a new one" in caplog.text
    assert sum(weight.numel() for weight in learning(ours)) == 289
    caplog.clear()
    tiny_llama(VOCAB, seed=7).save_pretrained(tmp_path / "decoder")
    ppo(tmp_path, critic=str(tmp_path / "decoder"))
    assert f"the model at '{tmp_path / 'decoder'}' has no score head" in caplog.text
    caplog.clear()
    ppo(tmp_path, critic=reward_model())
    assert "score head" not in caplog.text


class Headless(torch.nn.Module):
    """Something that is no model of transformers."""


def encoder():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCAB, num_labels=1, **sizes))


def encoder_decoder():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForSequenceClassification(T5Config(vocab_size=VOCAB, num_labels=1, **sizes))


def two_heads():
    model = reward_model()
    model.second = torch.nn.Linear(16, 1)
    return model


def deep_head():
    model = reward_model()
    model.score = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    return model


def quantised():
    model = tiny_llama(VOCAB)
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(layer.up_proj.weight.to(torch.int8), requires_grad=False)
    return model


def merged_in():
    model = get_peft_model(reward_model(), LoraConfig(**SCORES, target_modules=["q_proj"]))
    model.merge_adapter()
    return model


REFUSED = {
    "three labels": (lambda: reward_model(3), "`score`.*gives 3 numbers.*num_labels=1"),
    "a head of several layers": (deep_head, "`score`, a Sequential.*not one linear layer"),
    "two heads": (two_heads, "more than one head.*score, second"),
    "an encoder": (lambda: encoder().bert, "sees the tokens after it"),
    "an encoder-decoder": (encoder_decoder, "encoder-decoder"),
    "quantised weights": (quantised, "quantised"),
    "no model of transformers": (Headless, "`critic` is a Headless"),
    "none": (lambda: None, "`critic` is a NoneType"),
    "a prompt in front of the tokens": (
        lambda: get_peft_model(tiny_llama(VOCAB), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "PROMPT_TUNING.*cannot be kept",
    ),
    "adapters that share weights": (
        lambda: get_peft_model(reward_model(), VeraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])),
        "adapters could not be put into it again.*LoRA",
    ),
    "adapters that are merged in": (merged_in, "merged into the weights of 'q_proj'"),
    "nothing that learns": (lambda: critic().requires_grad_(False), "critic_learning_rate=0"),
    "a frozen reward model": (lambda: reward_model().requires_grad_(False), "critic_learning_rate=0"),
    "fewer tokens than the tokenizer has": (lambda: tiny_llama(VOCAB - 1), "the task critic embeds 15 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_no_critic_is_refused_in_a_sentence(tmp_path, case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ppo(tmp_path, critic=make())


def test_a_pad_token_that_the_critic_lacks_does_not_matter(tmp_path):
    # Masked, it is read as another token; and the policy has a row for it.
    tokenizer, policy = tiny_tokenizer(VOCAB), tiny_llama(VOCAB, seed=1)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy.resize_token_embeddings(VOCAB + 1)
    args = LenVMPPOConfig(**settings(tmp_path, per_device_train_batch_size=4))
    for last in (9, 16):
        completions = [[8, EOS], [9, 9, 9, 9], [last], [10, 11, EOS]]
        trainer = scripted(LenVMPPOTrainer, completions)(
            policy, counts_of_w8, args, prompts(1), processing_class=tokenizer, critic=reward_model()
        )
        if last == 9:
            assert int(batch_of(trainer)["completion_ids"].max()) == tokenizer.pad_token_id == 16
            continue
        with pytest.raises(ValueError, match="wrote the one of id 16, and the task critic embeds 16"):
            batch_of(trainer)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_policy_as_critic_is_copied(tmp_path, adapters):
    policy = tiny_llama(VOCAB, seed=1)
    trainer = LenVMPPOTrainer(
        policy, counts_of_w8, LenVMPPOConfig(**settings(tmp_path, max_steps=1)), prompts(),
        processing_class=tiny_tokenizer(VOCAB), critic=policy,
        peft_config=LoraConfig(target_modules=["q_proj"]) if adapters else None,
    )  # fmt: skip
    known = {id(weight) for weight in trainer.model.parameters()}
    assert not any(id(weight) in known for weight in trainer.critic.parameters())
    assert same_weights(weights(trainer.critic.backbone), weights(tiny_llama(VOCAB, seed=1).model))
    assert len(learning(trainer.critic)) == len([*trainer.critic.parameters()])
    trainer.train()


def test_a_critic_on_the_very_decoder_of_the_policy_is_refused(tmp_path):
    policy = tiny_llama(VOCAB, seed=1)
    shared = TaskCritic(critic().config, backbone=policy.model)
    with pytest.raises(ValueError, match="critic shares weights"):
        ppo(tmp_path, policy=policy, critic=shared)


def test_a_model_that_also_pays_the_rewards_is_left_alone(tmp_path):
    judge = reward_model()
    before = weights(judge)
    trainer = LenVMPPOTrainer(
        tiny_llama(VOCAB, seed=1), judge, LenVMPPOConfig(**settings(tmp_path, critic_learning_rate=1e-2)), prompts(),
        processing_class=tiny_tokenizer(VOCAB), reward_processing_classes=tiny_tokenizer(VOCAB), critic=judge,
    )  # fmt: skip
    trainer.train()
    assert same_weights(weights(judge), before) and not same_weights(weights(trainer.critic.backbone), before)


def test_a_length_value_model_gives_its_decoder(tmp_path):
    lenvm = random_lenvm()
    ours = ppo(tmp_path, lenvm=lenvm, critic=lenvm).critic
    assert same_weights(weights(ours.backbone), weights(lenvm.backbone))
    assert float(values(ours).abs().max()) == 0.0 and len(learning(ours)) == len([*ours.parameters()])
    assert lenvm.frozen and not learning(lenvm)


@pytest.mark.parametrize("make", [critic, lambda: reward_model().bfloat16(), lambda: frozen(critic())])
def test_a_critic_without_a_learning_rate_is_read_and_never_trained(tmp_path, make):
    given = make()
    expected, given_flags = values(critic()) if isinstance(given, TaskCritic) else scores(given), flags(given)
    trainer = ppo(tmp_path, critic=given, **{**RUN, "critic_learning_rate": 0.0})
    start = weights(trainer.critic)
    trainer.train()
    assert same_weights(weights(trainer.critic), start) and not trainer.critic.training
    assert len(trainer.optimizer.param_groups) == 2 and all(p.grad is None for p in trainer.critic.parameters())
    torch.testing.assert_close(values(trainer.critic), expected, atol=2e-2, rtol=2e-2)
    assert len(logged(trainer, "critic/explained_variance")) == 2 and not logged(trainer, "critic/value_loss")
    # Saved as it was given, so that it can learn in another run.
    loaded = load_critic(tmp_path / "checkpoint-2" / "critic")
    assert same_weights(weights(loaded), start)
    if isinstance(given, TaskCritic):
        assert flags(loaded) == given_flags


def test_nothing_but_the_values_enters_with_a_critic_that_does_not_learn(tmp_path):
    trainer = ppo(tmp_path, critic=critic().requires_grad_(False), critic_learning_rate=0.0, whiten="none")
    batch = batch_of(trainer)
    returns = batch["critic_returns"] * batch["critic_mask"]
    torch.testing.assert_close(batch["advantages"], returns - batch["critic_values"] * batch["critic_mask"])
    assert float(batch["critic_values"].std()) > 0.1


def test_a_new_head_that_never_learns_is_worth_a_warning(tmp_path, caplog):
    ppo(tmp_path, critic_learning_rate=0.0)
    assert "says 0 of everything" in caplog.text


@pytest.mark.parametrize("adapters", [False, True])
def test_a_quantised_policy_needs_a_critic_from_elsewhere(tmp_path, adapters):
    policy = quantised()
    if adapters:
        policy = get_peft_model(policy, LoraConfig(**LORA, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="quantised.*critic_init"):
        TaskCritic.from_backbone(policy)
    plain = tiny_llama(VOCAB)
    plain.quantization_method = "gguf"
    # What was read from GGUF is plain again.
    TaskCritic.from_backbone(plain)
    for mark in ({"quantization_method": "bitsandbytes"}, {"is_loaded_in_4bit": True}, {"is_loaded_in_8bit": True}):
        marked = tiny_llama(VOCAB)
        vars(marked).update(mark)
        with pytest.raises(ValueError, match="quantised"):
            TaskCritic.from_backbone(marked)


@pytest.mark.parametrize(
    "kind",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    ],
    ids=lambda kind: type(kind).__name__,
)
def test_a_policy_behind_a_trained_prompt_has_a_critic_of_its_base(tmp_path, kind, caplog):
    policy = get_peft_model(tiny_llama(VOCAB, seed=1), copy.deepcopy(kind))
    trainer = ppo(tmp_path, policy=policy, max_steps=1)
    assert f"({policy.peft_config['default'].peft_type.value}) cannot be merged" in caplog.text
    assert same_weights(weights(trainer.critic.backbone), weights(tiny_llama(VOCAB, seed=1).model))
    trainer.train()


MERGED = {
    "lora": LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens"]),
    "dora": LoraConfig(**LORA, target_modules=["q_proj"], use_dora=True),
    "lora and copied modules": LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["norm"]),
    "lora and tokens": LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[8]),
    "tokens": TrainableTokensConfig(token_indices=[8], target_modules=["embed_tokens"]),
    "ia3": IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "vera": VeraConfig(r=2, target_modules=["q_proj"], init_weights=False),
}


@torch.no_grad()
def states(decoder):
    return copy.deepcopy(decoder).eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state


@pytest.mark.parametrize("kind", MERGED)
def test_the_copy_of_a_policy_with_adapters_is_what_the_policy_computes(kind):
    policy = get_peft_model(tiny_llama(VOCAB, seed=1), copy.deepcopy(MERGED[kind]))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "tokens" in name or "modules_to_save" in name:
                weight += 1.0
    before, decoder = weights(policy), policy.get_base_model().model
    merged = merged_copy(policy)
    assert merged.state_dict().keys() == tiny_llama(VOCAB).model.state_dict().keys()
    torch.testing.assert_close(states(merged), states(decoder), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states(merged), states(tiny_llama(VOCAB, seed=1).model), atol=1e-3)
    assert same_weights(weights(policy), before)


def test_adapters_that_are_off_or_idle_are_not_merged():
    base = states(tiny_llama(VOCAB, seed=1).model)
    policy = get_peft_model(tiny_llama(VOCAB, seed=1), LoraConfig(**LORA, target_modules=["q_proj"]))
    policy.add_adapter("idle", LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    active = states(policy.get_base_model().model)
    torch.testing.assert_close(states(merged_copy(policy)), active, atol=1e-5, rtol=1e-5)
    with policy.disable_adapter():
        torch.testing.assert_close(states(merged_copy(policy)), base, atol=1e-5, rtol=1e-5)
    policy.merge_adapter()
    torch.testing.assert_close(states(merged_copy(policy)), active, atol=1e-5, rtol=1e-5)
    # Adapters with no PeftModel around.
    plain = tiny_llama(VOCAB, seed=1)
    inject_adapter_in_model(LoraConfig(**LORA, target_modules=["q_proj"]), plain)
    torch.testing.assert_close(states(merged_copy(plain)), states(plain.model), atol=1e-5, rtol=1e-5)
    assert not isinstance(plain, PeftModel) and not torch.allclose(states(plain.model), base, atol=1e-3)


def test_adapters_that_cannot_be_merged_are_left_out_or_refused(caplog):
    routed = PolyConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], n_tasks=1, n_skills=2, n_splits=1)
    policy = get_peft_model(tiny_llama(VOCAB, seed=1), routed)
    torch.testing.assert_close(states(merged_copy(policy)), states(tiny_llama(VOCAB, seed=1).model))
    assert "cannot be merged" in caplog.text
    inserted = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    with pytest.raises(ValueError, match="ADAPTION_PROMPT.*critic_init"):
        merged_copy(get_peft_model(tiny_llama(VOCAB), inserted))


OTHERS = {
    "another size": (lambda: TaskCritic.from_backbone(tiny_llama(VOCAB, hidden=24)), "hidden_size 16 there and 24"),
    "another kind of decoder": (lambda: TaskCritic.from_backbone(tiny_gpt2(VOCAB)), "model_type llama there and gpt2"),
    "another head": (reward_model, "a head of kind 'mlp' there and 'linear' here"),
    "adapters": (
        lambda: get_peft_model(critic(), LoraConfig(**LORA, target_modules=["q_proj"])), r"adapters \[\] there"
    ),
    "other flags": (lambda: frozen(critic()), "20 weights, such as backbone.*learn there and not here"),
    "another vocabulary": (lambda: TaskCritic.from_backbone(tiny_llama(VOCAB + 4)), "weights.*backbone.embed_tokens"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic")
    ppo(folder, critic=critic(), **RUN).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_with_another_critic_does_not_go_on(checkpoint, tmp_path, case):
    make, message = OTHERS[case]
    with pytest.raises(ValueError, match=f"of another shape than this run's: {message}"):
        ppo(tmp_path, critic=make(), **RUN).train(resume_from_checkpoint=str(checkpoint))


def test_a_run_without_the_critic_or_whose_critic_does_not_learn_does_not_go_on(checkpoint, tmp_path):
    without = ppo(tmp_path, lenvm=random_lenvm(), critic="lenvm", **RUN)
    with pytest.raises(ValueError, match="critic='lenvm'"):
        without.train(resume_from_checkpoint=str(checkpoint))
    still = ppo(tmp_path, critic=critic(), **{**RUN, "critic_learning_rate": 0.0})
    with pytest.raises(ValueError, match="critic_learning_rate"):
        still.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="training other weights"):
        grpo(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train(resume_from_checkpoint=str(checkpoint))


def test_a_critic_that_lacks_weights_is_not_loaded(checkpoint, tmp_path):
    shutil.copytree(checkpoint / "critic", tmp_path / "critic")
    config = json.loads((tmp_path / "critic" / "config.json").read_text())
    config["backbone_config"]["num_hidden_layers"] = 3
    (tmp_path / "critic" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks weights, which would be random"):
        load_critic(tmp_path / "critic")


def test_a_frozen_decoder_learns_with_activations_kept_and_made_again_alike(tmp_path):
    given, results = get_peft_model(reward_model(), LoraConfig(**SCORES, target_modules=["q_proj"])), []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        trainer = ppo(
            tmp_path, first_is_w8, max_steps=2, critic_learning_rate=1e-2, gradient_checkpointing=options is not None,
            gradient_checkpointing_kwargs=options, critic=given,
        )  # fmt: skip
        start = weights(trainer.critic)
        trainer.train()
        results.append(weights(trainer.critic))
        moved = {name for name in start if not torch.equal(start[name], results[-1][name])}
        assert moved == {name for name, weight in trainer.critic.named_parameters() if weight.requires_grad}
    assert same_weights(results[0], results[1]) and same_weights(results[0], results[2])


def test_the_critic_has_no_dropout_of_any_kind(tmp_path):
    given = get_peft_model(reward_model(), LoraConfig(**SCORES, target_modules=["q_proj"], lora_dropout=0.5))
    given.get_base_model().model.layers[0].self_attn.attention_dropout = 0.5
    for checkpointing in (False, True):
        ours = ppo(tmp_path, critic=given, gradient_checkpointing=checkpointing).critic
        first, second = (ours(input_ids=IDS).logits for _ in range(2))
        assert torch.equal(first, second)
