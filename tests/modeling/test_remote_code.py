"""Decoders whose code lies beside their weights: taken from a policy that has them, saved with it, run when asked."""

import json

import pytest
from tiny import assert_same_weights, tiny_length_value_model, tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, grpo, ppo, same_weights, weights
from transformers import AutoModelForCausalLM, dynamic_module_utils

from lenvm_rl.modeling.critic import load_critic
from lenvm_rl.modeling.length_value_model import LengthValueModel

CONFIG = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL = """
from transformers import LlamaForCausalLM, LlamaModel
from .configuration_own import OwnConfig
class OwnModel(LlamaModel):
    config_class = OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""
RUN = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "critic_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a policy with code of its own."""
    folder = tmp_path_factory.mktemp("own")
    tiny_llama(VOCAB, seed=1).save_pretrained(folder)
    tiny_tokenizer(VOCAB).save_pretrained(folder)
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(MODEL)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    # As most of them do, it names no class for the decoder alone.
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
        patch.syspath_prepend(modules)
        yield str(folder)


def test_a_critic_has_the_class_of_the_policy_and_a_run_goes_on_exactly(tmp_path, policy):
    trainer = ppo(tmp_path / "run", policy=policy, trust_remote_code=True, **RUN)
    assert type(trainer.critic.backbone) is type(trainer.model.model) and not hasattr(trainer.critic, "lm_head")
    assert same_weights(weights(trainer.critic.backbone), weights(tiny_llama(VOCAB, seed=1).model))
    trainer.train()
    resumed = ppo(tmp_path / "run", policy=policy, trust_remote_code=True, **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same_weights(weights(resumed.critic), weights(trainer.critic))

    folder = tmp_path / "run" / "checkpoint-2" / "critic"
    assert {path.name for path in folder.glob("*.py")} == {"configuration_own.py", "modeling_own.py"}
    with pytest.raises(ValueError, match="'own'.*trust_remote_code=True"):
        load_critic(folder)
    loaded = load_critic(folder, trust_remote_code=True)
    assert type(loaded.backbone).__name__ == "OwnModel"
    assert_same_weights(loaded, trainer.critic)
    with pytest.raises(ValueError, match="trust_remote_code"):
        ppo(tmp_path / "again", critic=str(folder))
    for options in ({"trust_remote_code": True}, {"model_init_kwargs": {"trust_remote_code": True}}):
        again = ppo(tmp_path / "again", policy=policy, critic=str(folder), **options)
        assert_same_weights(again.critic, trainer.critic)


def test_an_already_loaded_policy_needs_no_word_again(tmp_path, policy):
    loaded = AutoModelForCausalLM.from_pretrained(policy, trust_remote_code=True)
    trainer = ppo(tmp_path, policy=loaded, max_steps=1)
    assert type(trainer.critic.backbone) is type(loaded.model)
    trainer.train()


def test_a_critic_starts_from_a_folder_with_code(tmp_path, policy):
    with pytest.raises(ValueError, match="trust_remote_code"):
        ppo(tmp_path, critic_init=policy)
    trainer = ppo(tmp_path, critic_init=policy, trust_remote_code=True, max_steps=1)
    assert type(trainer.critic.backbone).__name__ == "OwnModel"
    assert same_weights(weights(trainer.critic.backbone), weights(tiny_llama(VOCAB, seed=1).model))
    trainer.train()


def test_a_length_value_model_of_such_a_policy_is_saved_with_the_code(tmp_path, policy):
    loaded = AutoModelForCausalLM.from_pretrained(policy, trust_remote_code=True)
    lenvm = tiny_length_value_model(loaded, tokenizer=tiny_tokenizer(VOCAB))
    assert type(lenvm.backbone) is type(loaded.model)
    lenvm.save_pretrained(tmp_path / "lenvm")
    with pytest.raises(ValueError, match="'own'.*trust_remote_code=True"):
        LengthValueModel.from_pretrained(tmp_path / "lenvm")
    again = LengthValueModel.from_pretrained(tmp_path / "lenvm", trust_remote_code=True)
    assert type(again.backbone).__name__ == "OwnModel" and again.config.gamma == lenvm.config.gamma
    assert_same_weights(again, lenvm)
    # Saved again, with the code.
    again.save_pretrained(tmp_path / "second")
    assert_same_weights(LengthValueModel.from_pretrained(tmp_path / "second", trust_remote_code=True), lenvm)
    trainer = grpo(
        tmp_path / "run", lenvm=str(tmp_path / "lenvm"), policy=policy, length_coef=0.1, max_steps=1,
        trust_remote_code=True,
    )  # fmt: skip
    assert type(trainer.length_value_model.backbone).__name__ == "OwnModel"
    trainer.train()
    loaded = LengthValueModel.from_backbone(policy, gamma=0.9, trust_remote_code=True)
    assert type(loaded.backbone).__name__ == "OwnModel"


def test_a_decoder_of_transformers_own_brings_no_code(tmp_path):
    tiny_length_value_model(tiny_llama(VOCAB)).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert_same_weights(
        LengthValueModel.from_pretrained(tmp_path, trust_remote_code=True), LengthValueModel.from_pretrained(tmp_path)
    )
