"""What people hand over to the trainers: by position as in TRL, and under the names of older trainers."""

import inspect
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, counts_of_w8, first_is_w8, grpo, ppo, prompts, same_weights, settings, weights
from transformers import TrainerCallback
from trl import GRPOTrainer

from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.checks import _OF_CONFIGS, _OF_TRAINERS

TRAINERS = [(LenVMGRPOTrainer, LenVMGRPOConfig), (LenVMPPOTrainer, LenVMPPOConfig)]
# By position in TRL 1.16; what a version lacks is left out.
POSITIONS = [
    "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class", "reward_processing_classes",
    "callbacks", "optimizers", "quantization_config", "peft_config", "tools", "rollout_func", "environment_factory",
]  # fmt: skip


@pytest.mark.parametrize(("trainer", "config"), TRAINERS)
def test_every_argument_can_be_given_by_its_position_in_trl(tmp_path, trainer, config):
    class Marked(TrainerCallback):
        pass

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    given = {
        "model": tiny_llama(VOCAB), "reward_funcs": first_is_w8, "args": config(**settings(tmp_path)),
        "train_dataset": prompts(), "eval_dataset": prompts(3), "processing_class": tiny_tokenizer(VOCAB),
        "callbacks": [Marked()], "optimizers": (optimizer, None), "peft_config": LoraConfig(target_modules=["q_proj"]),
    }  # fmt: skip
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]
    assert [name for name in POSITIONS if name in names] == names
    trainer = trainer(*(given.get(name) for name in names))
    assert len(trainer.eval_dataset) == 3 and trainer.optimizer is optimizer
    assert any(isinstance(each, Marked) for each in trainer.callback_handler.callbacks)
    assert [*trainer.model.peft_config] == ["default"]


@pytest.mark.parametrize(("trainer", "config"), TRAINERS)
def test_too_many_positions_and_arguments_given_twice(tmp_path, trainer, config):
    args = config(**settings(tmp_path))
    with pytest.raises(TypeError, match="length_value_model="):
        trainer(tiny_llama(VOCAB), first_is_w8, args, prompts(), *[None] * 20)
    with pytest.raises(TypeError, match=f"a {config.__name__} was given: the order is .* model, reward_funcs, args"):
        trainer(args, tiny_llama(VOCAB), None, tiny_tokenizer(VOCAB))
    with pytest.raises(TypeError, match="callbacks"):
        trainer(tiny_llama(VOCAB), first_is_w8, args, prompts(), None, None, None, [], callbacks=[])


@pytest.mark.parametrize(("trainer", "config"), TRAINERS)
@pytest.mark.parametrize("name", ["ref_model", "value_model", "reward_model", "config", "tokenizer", "policy"])
def test_arguments_of_older_trainers_say_what_stands_for_them(tmp_path, trainer, config, name):
    with pytest.raises(TypeError, match=f"{trainer.__name__} takes no `{name}`: "):
        trainer(
            tiny_llama(VOCAB), first_is_w8, config(**settings(tmp_path)), prompts(),
            processing_class=tiny_tokenizer(VOCAB), **{name: None},
        )  # fmt: skip


def test_grpo_has_no_critic(tmp_path):
    with pytest.raises(TypeError, match="`critic`"):
        LenVMGRPOTrainer(tiny_llama(VOCAB), first_is_w8, LenVMGRPOConfig(**settings(tmp_path)), critic="learned")


def test_the_names_of_older_trainers_are_none_of_ours():
    taken = set(inspect.signature(GRPOTrainer.__init__).parameters) | {"length_value_model", "critic"}
    assert taken & _OF_TRAINERS.keys() == {"critic"}
    assert not set(LenVMPPOConfig.__dataclass_fields__) & _OF_CONFIGS.keys()


@pytest.mark.parametrize("config", [LenVMGRPOConfig, LenVMPPOConfig])
@pytest.mark.parametrize("name", ["gamma", "lam", "cliprange", "num_ppo_epochs", "kl_coef", "response_length"])
def test_fields_of_older_configs_say_what_stands_for_them(tmp_path, config, name):
    with pytest.raises(TypeError, match=f"{config.__name__} has no `{name}`: set `"):
        config(**settings(tmp_path), **{name: 1})
    with pytest.raises(TypeError, match="nonsense"):
        config(**settings(tmp_path), nonsense=1)


@pytest.mark.parametrize("make", [grpo, ppo])
def test_a_tokenized_dataset_is_called_that(tmp_path, make):
    tokenized = Dataset.from_dict({"input_ids": [[6, 7]] * 8, "attention_mask": [[1, 1]] * 8})
    for data in (tokenized, tokenized.to_iterable_dataset()):
        with pytest.raises(ValueError, match="training set.*`prompt`"):
            make(tmp_path, data=data)
    with pytest.raises(ValueError, match="evaluation set.*`prompt`"):
        ppo(tmp_path, eval_data={"a": prompts(2), "b": tokenized})


def padded_tokenizer(size=VOCAB):
    """A tokenizer whose pad token was added behind the `size` tokens of its model."""
    tokenizer = tiny_tokenizer(size)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == size
    return tokenizer


def trainer_with(tokenizer, policy, folder, **changes):
    return LenVMPPOTrainer(
        policy, counts_of_w8, LenVMPPOConfig(**settings(folder, max_steps=1, **changes)), prompts(),
        processing_class=tokenizer,
    )  # fmt: skip


def test_a_pad_token_without_a_row_in_the_policy(tmp_path):
    with pytest.raises(ValueError, match=r"the policy embeds 16 tokens.*'\[PAD\]'.*resize_token_embeddings"):
        trainer_with(padded_tokenizer(), tiny_llama(VOCAB), tmp_path)
    resized = tiny_llama(VOCAB)
    resized.resize_token_embeddings(VOCAB + 1)
    trainer_with(padded_tokenizer(), resized, tmp_path).train()


def test_a_pad_token_without_a_row_in_the_reference(tmp_path):
    tiny_llama(VOCAB).save_pretrained(tmp_path / "policy")
    policy = type(tiny_llama(VOCAB)).from_pretrained(tmp_path / "policy")
    policy.resize_token_embeddings(VOCAB + 1)
    with pytest.raises(ValueError, match=r"the reference policy.*embeds 16 tokens.*'\[PAD\]'.*save_pretrained"):
        trainer_with(padded_tokenizer(), policy, tmp_path, beta=0.1)


def test_tokens_that_stand_for_pictures_need_no_row(tmp_path, caplog):
    tokenizer = tiny_tokenizer(VOCAB)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    trainer_with(tokenizer, tiny_llama(VOCAB), tmp_path).train()
    assert "The policy embeds 16 tokens" in caplog.text and "<picture>" in caplog.text
    # A chat template writes its own tokens into every prompt.
    tokenizer.chat_template = "{{ messages }}<picture>"
    with pytest.raises(ValueError, match="the policy embeds 16 tokens.*'<picture>'"):
        trainer_with(tokenizer, tiny_llama(VOCAB), tmp_path)


@pytest.mark.parametrize("make", [grpo, ppo])
def test_a_policy_that_is_not_the_reference_is_said_to_be_none(tmp_path, make, caplog):
    caplog.set_level(logging.WARNING, logger="lenvm_rl")
    tiny_llama(VOCAB, seed=1).save_pretrained(tmp_path / "policy")
    loaded = [type(tiny_llama()).from_pretrained(tmp_path / "policy") for _ in range(2)]
    make(tmp_path, policy=loaded[0], beta=0.1)
    make(tmp_path, policy=str(tmp_path / "policy"), beta=0.1)
    assert "reference policy" not in caplog.text
    with torch.no_grad():
        loaded[1].model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    trainer = make(tmp_path, policy=loaded[1], beta=0.1)
    assert "1 of 21 weights differ (model.layers.1.mlp.up_proj.weight)" in caplog.text
    # As with TRL's own trainer: said, and left alone.
    assert same_weights(weights(trainer.ref_model), weights(tiny_llama(VOCAB, seed=1)))


@pytest.mark.parametrize("make", [grpo, ppo])
def test_a_policy_made_in_memory_has_no_reference(tmp_path, make):
    with pytest.raises(ValueError, match="beta=0.1.*made in memory.*save_pretrained"):
        make(tmp_path, policy=tiny_llama(VOCAB, seed=1), beta=0.1)
    # Which has no beta that the user has set.
    with pytest.raises(ValueError, match="kl_reward_coef=0.1.*made in memory.*set kl_reward_coef=0"):
        ppo(tmp_path, policy=tiny_llama(VOCAB, seed=1), kl_reward_coef=0.1)
    policy = tiny_llama(VOCAB, seed=1)
    policy.config._name_or_path = str(tmp_path / "gone" / "policy")
    with pytest.raises(FileNotFoundError, match="reference policy"):
        make(tmp_path, policy=policy, beta=0.1)
