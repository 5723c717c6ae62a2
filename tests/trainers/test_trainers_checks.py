"""What the trainers refuse, and that each refusal says what to change; faults of a run are in faults.py."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from trainer_parts import (
    VOCAB,
    counts_of_w8,
    first_is_w8,
    grpo,
    ppo,
    prompts,
    random_lenvm,
    scripted,
    scripted_lenvm,
    settings,
    weights,
)
from transformers import HfArgumentParser
from trl import GRPOConfig

from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer, TaskCritic
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.critic import check_settings
from lenvm_rl.trainers.frozen import place_length_value_model
from lenvm_rl.trainers.rewards import check_rewards


@pytest.mark.parametrize(
    ("config_class", "changes", "message"),
    [
        (LenVMGRPOConfig, {"length_coef": math.nan}, "length_coef=nan"),
        (LenVMGRPOConfig, {"shaping_coef": math.inf}, "shaping_coef=inf"),
        (LenVMGRPOConfig, {"length_lam": 1.1}, "length_lam=1.1"),
        (LenVMGRPOConfig, {"task_lam": -0.1}, "task_lam=-0.1"),
        (LenVMGRPOConfig, {"task_gamma": 0.0}, "task_gamma=0.0"),
        (LenVMGRPOConfig, {"shaping_gamma": 1.5}, "shaping_gamma=1.5"),
        (LenVMGRPOConfig, {"shaping_gamma": 0.9}, "differs from task_gamma=1.0.*allow_gamma_mismatch"),
        (LenVMGRPOConfig, {"length_gate": "right"}, "length_gate='right'"),
        (LenVMGRPOConfig, {"shaping_potential": "tokens"}, "shaping_potential"),
        (LenVMGRPOConfig, {"length_gate": "all", "length_gate_center": True}, "length_gate_center"),
        (LenVMGRPOConfig, {"length_gate_center": True, "length_lam": 0.9}, "length_gate_center"),
        (LenVMPPOConfig, {"critic_learning_rate": -1e-5}, "critic_learning_rate=-1e-05"),
        (LenVMPPOConfig, {"critic_learning_rate": 0.0, "critic_warmup_steps": 2}, "critic_warmup_steps=2"),
        (LenVMPPOConfig, {"vf_coef": -1.0}, "vf_coef=-1.0"),
        (LenVMPPOConfig, {"cliprange_value": 0.0}, "cliprange_value=0.0"),
        (LenVMPPOConfig, {"truncation": "drop"}, "truncation"),
        (LenVMPPOConfig, {"task_baseline": "none"}, "task_baseline"),
    ],
)
def test_values_out_of_bounds(tmp_path, config_class, changes, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings(tmp_path, **changes))


def test_a_gamma_mismatch_can_be_asked_for(tmp_path):
    config = LenVMGRPOConfig(**settings(tmp_path, shaping_gamma=0.9, allow_gamma_mismatch=True))
    assert config.shaping_discount == 0.9
    assert LenVMGRPOConfig(**settings(tmp_path, task_gamma=0.8)).shaping_discount == 0.8


@pytest.mark.parametrize("config_class", [LenVMGRPOConfig, LenVMPPOConfig])
def test_every_field_of_our_own_has_a_help_text_and_comes_from_the_command_line(config_class, tmp_path):
    fields = config_class.__dataclass_fields__
    own = [name for name in fields if name not in GRPOConfig.__dataclass_fields__]
    assert len(own) >= 11 and all(len(fields[name].metadata["help"]) > 20 for name in own)
    parser = HfArgumentParser(config_class)
    assert "length_gate_center" in parser.format_help()
    arguments = f"--output_dir {tmp_path} --use_cpu --bf16 False --length_coef 0.25 --length_gate all --gate_reward x"
    (config,) = parser.parse_args_into_dataclasses(arguments.split())
    assert (config.length_coef, config.length_gate, config.gate_reward, config.task_lam) == (0.25, "all", "x", 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance_sampling_level": "sequence"}, "set importance_sampling_level='token'"),
        ({"loss_type": "luspo"}, "set loss_type='dr_grpo'"),
        ({"loss_type": "vespo"}, "set loss_type='dr_grpo'"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold drops a whole completion"),
    ],
)
def test_losses_without_a_meaning_for_advantages_per_token(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        grpo(tmp_path, lenvm=random_lenvm(), length_coef=0.1, **changes)
    with pytest.raises(ValueError, match=message):
        grpo(tmp_path, lenvm=random_lenvm(), shaping_coef=0.1, **changes)
    with pytest.raises(ValueError, match=message):
        ppo(tmp_path, **changes)
    # Without a stream per token they are TRL's own affair.
    grpo(tmp_path, lenvm=random_lenvm(), max_steps=1, **changes).train()


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "bnpo", "cispo", "grpo", "sapo"])
def test_losses_that_take_advantages_per_token(tmp_path, loss_type, caplog):
    trainer = grpo(tmp_path, lenvm=random_lenvm(), length_coef=0.1, length_gate="all", loss_type=loss_type, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    # Those that divide by each length are let through with a warning.
    assert ("divides by each completion's own length" in caplog.text) == (loss_type in ("grpo", "sapo"))


@pytest.mark.parametrize("make", [grpo, ppo])
@pytest.mark.parametrize("coefficient", ["length_coef", "shaping_coef"])
def test_a_coefficient_without_a_length_value_model(tmp_path, make, coefficient):
    with pytest.raises(ValueError, match="`length_value_model=`"):
        make(tmp_path, **{coefficient: -0.5})


def test_a_length_value_model_without_gamma(tmp_path):
    import json

    random_lenvm().save_pretrained(tmp_path / "lenvm")
    config = tmp_path / "lenvm" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in content.items() if key != "gamma"}))
    with pytest.raises(ValueError, match="no gamma"):
        grpo(tmp_path, lenvm=str(tmp_path / "lenvm"), length_coef=0.1)


def test_a_length_value_model_is_loaded_from_its_path(tmp_path):
    lenvm = random_lenvm()
    lenvm.save_pretrained(tmp_path / "lenvm")
    trainer = grpo(tmp_path, lenvm=str(tmp_path / "lenvm"), length_coef=0.1, max_steps=1)
    trainer.train()
    assert trainer.length_value_model.frozen
    assert all(torch.equal(value, weights(lenvm)[name]) for name, value in weights(trainer.length_value_model).items())


def test_something_that_is_no_length_value_model(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        grpo(tmp_path, lenvm=tiny_llama(VOCAB))


def test_paths_that_do_not_exist(tmp_path):
    nowhere = str(tmp_path / "no" / "such" / "model")
    with pytest.raises(FileNotFoundError, match="for the policy"):
        grpo(tmp_path, policy=nowhere)
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        grpo(tmp_path, lenvm=nowhere)
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        ppo(tmp_path, critic_init=nowhere)
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        ppo(tmp_path, critic=nowhere)


def test_datasets_too_small_for_a_step(tmp_path):
    with pytest.raises(ValueError, match="training set is empty"):
        LenVMPPOTrainer(
            tiny_llama(VOCAB), first_is_w8, LenVMPPOConfig(**settings(tmp_path)),
            Dataset.from_dict({"prompt": []}), processing_class=tiny_tokenizer(VOCAB),
        )  # fmt: skip
    with pytest.raises(ValueError, match="generation_batch_size"):
        grpo(tmp_path, data=prompts(1))


def test_a_gate_reward_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"gate_reward='nobody'.*\(counts_of_w8, first_is_w8\).*none of them"):
        grpo(tmp_path, [counts_of_w8, first_is_w8], gate_reward="nobody")
    with pytest.raises(ValueError, match="gate_reward"):
        grpo(tmp_path, [first_is_w8, first_is_w8], gate_reward="first_is_w8")
    assert grpo(tmp_path, [counts_of_w8, first_is_w8], gate_reward="first_is_w8")._gate.index == 1


def test_arguments_of_another_trainer(tmp_path):
    with pytest.raises(ValueError, match="LenVMGRPOConfig"):
        LenVMGRPOTrainer(tiny_llama(VOCAB), first_is_w8, GRPOConfig(**settings(tmp_path)), prompts())
    with pytest.raises(ValueError, match="needs a LenVMPPOConfig"):
        LenVMPPOTrainer(tiny_llama(VOCAB), first_is_w8, LenVMGRPOConfig(**settings(tmp_path)), prompts())


def test_a_critic_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="critic_init='lenvm'"):
        ppo(tmp_path, critic="lenvm")
    with pytest.raises(ValueError, match="length_value_model"):
        ppo(tmp_path, critic_init="lenvm")
    with pytest.raises(ValueError, match="truncation='terminal'"):
        ppo(tmp_path, lenvm=random_lenvm(), critic="lenvm", truncation="bootstrap")
    with pytest.raises(ValueError, match="optim='"):
        ppo(tmp_path, optim="galore_adamw_layerwise", optim_target_modules=["q_proj"])
    with pytest.raises(ValueError, match="multi_objective_aggregation"):
        ppo(tmp_path, multi_objective_aggregation="normalize_then_sum")
    without = ppo(tmp_path, lenvm=random_lenvm(), critic="lenvm", multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ValueError, match="multi_objective_aggregation.*task_baseline='group'"):
        ppo(
            tmp_path, lenvm=random_lenvm(), critic="lenvm", multi_objective_aggregation="normalize_then_sum",
            task_baseline="batch",
        )  # fmt: skip
    lenvm = random_lenvm()
    for refresh_steps in (0, 1):
        critic = TaskCritic.from_backbone(lenvm.backbone, form="head")
        with pytest.raises(ValueError, match="refresh_steps") if refresh_steps else nullcontext():
            ppo(tmp_path, lenvm=lenvm, critic=critic, refresh_steps=refresh_steps)
    with pytest.raises(ValueError, match="there is none to save"):
        without.save_critic(str(tmp_path / "critic"))
    optimizer = torch.optim.SGD(without.model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match=r"pass `optimizers=\(optimizer, None\)`"):
        LenVMPPOTrainer(
            without.model, first_is_w8, LenVMPPOConfig(**settings(tmp_path)), prompts(),
            processing_class=tiny_tokenizer(VOCAB), optimizers=(optimizer, scheduler),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("unread", "read"),
    [
        ({"task_baseline": "batch"}, {"task_baseline": "batch", "critic": "lenvm"}),
        ({"critic": "lenvm", "task_lam": 0.9}, {"task_lam": 0.9}),
        ({"critic": "lenvm", "task_lam": 0.9}, {"critic": "lenvm", "task_lam": 0.9, "shaping_coef": 0.1}),
        ({"critic": "lenvm", "task_gamma": 0.9}, {"critic": "lenvm", "task_gamma": 0.9, "shaping_coef": 0.1}),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(tmp_path, unread, read):
    [name] = [name for name in unread if name.startswith("task_")]
    with pytest.raises(ValueError, match=name):
        ppo(tmp_path, lenvm=random_lenvm(), **unread)
    ppo(tmp_path, lenvm=random_lenvm(), **read)


@pytest.mark.parametrize("without", [{"critic": "lenvm"}, {"critic_learning_rate": 0.0}])
def test_a_stop_of_the_policy_alone_needs_an_engine_that_waits(tmp_path, without, monkeypatch):
    """`GradScaler.step` asserts that something has a gradient, and DeepSpeed makes a step of every loss."""
    trainer = ppo(tmp_path, lenvm=random_lenvm(), target_kl=0.1, **without)
    check_settings(without.get("critic", "learned"), trainer)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match="target_kl.*DeepSpeed"):
        check_settings(without.get("critic", "learned"), trainer)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", False)
    monkeypatch.setattr(trainer.args, "fp16", True)
    with pytest.raises(ValueError, match="target_kl.*fp16"):
        check_settings(without.get("critic", "learned"), trainer)
    monkeypatch.setattr(trainer.args, "target_kl", None)
    check_settings(without.get("critic", "learned"), trainer)


def test_a_multimodal_policy_beside_a_length_value_model(tmp_path):
    trainer = grpo(tmp_path)
    trainer._is_vlm = True
    with pytest.raises(ValueError, match="`length_value_model`"):
        place_length_value_model(random_lenvm(), trainer)


def test_rewards_of_a_batch():
    trainer = SimpleNamespace(reward_funcs=[len, len], reward_func_names=["a", "b"])
    # One silent function beside another is a mixture of tasks.
    check_rewards(torch.tensor([[math.nan, 1.0], [math.nan, 0.0]]), trainer)
    # TRL warns of a batch that nobody scored, and goes on.
    check_rewards(torch.full((2, 2), math.nan), trainer)
    with pytest.raises(ValueError, match="reward of b"):
        check_rewards(torch.tensor([[1.0, 0.0], [1.0, -math.inf]]), trainer)


def test_nan_from_the_length_value_model_stops_the_step_and_keeps_the_batch(tmp_path):
    lenvm = scripted_lenvm({})
    lenvm.table[7] = math.nan
    trainer = grpo(tmp_path / "out", lenvm=lenvm, length_coef=0.1, data=prompts(12))
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="The length value model gave NaN or infinity at step 0.*safetensors") as error:
        trainer.train()
    (file,) = (tmp_path / "out").glob("nonfinite_length_value_model_step0_rank0.safetensors")
    assert str(file) in str(error.value)
    saved = load_file(file)
    assert set(saved) == {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "values"}
    ids = torch.cat([saved["prompt_ids"][:, -1:], saved["completion_ids"]], dim=1)
    exists = torch.cat([torch.ones(len(ids), 1), saved["completion_mask"]], dim=1).bool()
    assert torch.equal(torch.isnan(saved["values"]), (ids == 7) & exists) and bool(((ids == 7) & exists).any())
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())


def test_what_stands_at_masked_slots_of_the_length_value_model_does_not_matter(tmp_path):
    # The pad token is read at masked slots only.
    lenvm, completions = scripted_lenvm({}), [[8, 9, 9, 1], [8, 1], [9, 9, 9, 9, 9, 9], [10, 1]]
    lenvm.table[0] = math.nan
    trainer = grpo(
        tmp_path, lenvm=lenvm, trainer=scripted(LenVMGRPOTrainer, completions), data=prompts(1), length_coef=0.1,
        length_gate="all", per_device_train_batch_size=4, max_steps=2,
    )  # fmt: skip
    trainer.train()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


def test_the_common_part_is_no_trainer(tmp_path):
    from lenvm_rl.trainers.base import LenVMTrainer

    trainer = LenVMTrainer(
        tiny_llama(VOCAB), first_is_w8, LenVMConfig(**settings(tmp_path)), prompts(), None, tiny_tokenizer(VOCAB)
    )
    with pytest.raises(TypeError, match="use LenVMGRPOTrainer or LenVMPPOTrainer"):
        trainer.train()
