"""Checkpoints of the PPO trainer hold its critic: a resumed run is the unbroken one, a best model brings its critic."""

import json
import shutil

import pytest
from trainer_parts import grpo, logged, ppo, ppo_whose_first_is_best, random_lenvm, same_weights, weights

from lenvm_rl.modeling.critic import load_critic


def test_resuming_restores_the_critic_and_goes_on_exactly(tmp_path):
    changes = {
        "lenvm": random_lenvm(), "length_coef": 0.5, "shaping_coef": 0.5, "max_steps": 4, "save_strategy": "steps",
        "save_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
        "lr_scheduler_type": "linear",
    }  # fmt: skip
    whole = ppo(tmp_path / "whole", **changes)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    part = ppo(tmp_path / "part", **changes)
    start = weights(part.critic)
    part.train(resume_from_checkpoint=True)
    assert logged(part, "loss") == logged(whole, "loss")
    first_line = (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first_line) == {"event": "train_begin", "step": 2}
    assert same_weights(weights(part.critic), weights(whole.critic))
    assert same_weights(weights(part.model), weights(whole.model))
    assert not same_weights(weights(part.critic), start)


def test_a_steered_entropy_coefficient_is_in_every_complete_checkpoint(tmp_path):
    changes = {
        "lenvm": random_lenvm(), "length_coef": 0.1, "length_gate": "all", "use_adaptive_entropy": True,
        "entropy_target": 50.0, "entropy_coef_delta": 0.01, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    whole = grpo(tmp_path / "whole", **changes)
    whole.train()
    assert logged(whole, "entropy_coef") == pytest.approx([0.01, 0.02, 0.03, 0.04])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    # TRL writes it last: a run may die before.
    (tmp_path / "part" / "checkpoint-2" / "entropy_ctrl_state.json").unlink()
    part = grpo(tmp_path / "part", **changes)
    part.train(resume_from_checkpoint=True)
    assert logged(part, "entropy_coef") == logged(whole, "entropy_coef")


def test_a_saved_policy_has_its_critic_beside_it(tmp_path):
    trainer = ppo(tmp_path / "run", max_steps=1, critic_learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.save_model()
    for folder in (tmp_path / "saved", tmp_path / "run"):
        assert same_weights(weights(load_critic(folder / "critic")), weights(trainer.critic))
        assert (folder / "model.safetensors").is_file()
    grpo(tmp_path / "grpo").save_model(str(tmp_path / "grpo"))
    ppo(tmp_path / "lenvm", lenvm=random_lenvm(), critic="lenvm").save_model(str(tmp_path / "lenvm"))
    assert not [*tmp_path.glob("*/critic/model*")][2:]


def test_a_checkpoint_without_a_critic_is_refused(tmp_path):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    grpo(tmp_path, **changes).train()
    with pytest.raises(FileNotFoundError, match="has no folder 'critic'"):
        ppo(tmp_path, **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_best_model_comes_with_the_critic_of_its_step(tmp_path):
    trainer = ppo_whose_first_is_best(tmp_path, every=1, critic_learning_rate=1e-2)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first, last = (weights(load_critic(tmp_path / f"checkpoint-{step}" / "critic")) for step in (1, 2))
    assert same_weights(weights(trainer.critic), first) and not same_weights(first, last)
