"""Policies in 4 or 8 bits in the recipes: which settings are let through, and how every stage is told."""

import json
import sys

import pytest
from trl import ModelConfig

from lenvm_rl.trainers import LenVMGRPOConfig
from recipes import arguments, ppo_shaped
from recipes.arguments import StageArguments, check_packages, check_setup, model_kwargs
from recipes.stages import StagedRun

MINE = {"model_name_or_path": "mine"}
DATA = StageArguments(dataset_name="mine.jsonl", reward_funcs=["my.reward"])


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_weights_in_few_bits_learn_through_adapters(monkeypatch, bits):
    with pytest.raises(ValueError, match="use_peft"):
        check_setup(DATA, ModelConfig(**MINE, **{bits: True}))
    model = ModelConfig(**MINE, **{bits: True}, use_peft=True)
    check_setup(DATA, model)
    config = LenVMGRPOConfig(output_dir="out", use_cpu=True, bf16=False)
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="bitsandbytes"):
        check_packages(config, model)
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    check_packages(config, model)


def test_every_stage_loads_the_policy_in_as_many_bits(tmp_path):
    model = ModelConfig(**MINE, load_in_8bit=True, use_peft=True)
    assert "quantization_config" not in model_kwargs(ModelConfig(**MINE))
    assert model_kwargs(model)["quantization_config"].load_in_8bit
    run = StagedRun(DATA, LenVMGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), model)
    assert run.load_kwargs["quantization_config"].load_in_8bit
    # What the rollouts depend on is kept beside them.
    kept = json.loads(json.dumps(run.rollout_settings(), default=str))
    assert kept["policy"]["quantization_config"]["load_in_8bit"] is True


def test_a_critic_does_not_start_from_a_copy_of_weights_in_few_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    given = ["--model_name_or_path", str(tmp_path), "--dataset_name", "mine.jsonl", "--reward_funcs", "my.reward"]
    given += ["--load_in_8bit", "true", "--use_peft", "true", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["recipes/ppo_shaped.py", *given])
    with pytest.raises(ValueError, match="critic_form='head'"):
        ppo_shaped.main()
