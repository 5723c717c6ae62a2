"""How fast PPO is: `LenVMPPOTrainer` beside TRL's own PPO trainer, which TRL had up to 1.12.

    make .venv-legacy/.installed
    .venv-legacy/bin/python -m eval.speed ppo

The same policy, lengths of prompts and of completions, batches, passes over them and learning rates, with a reference
model in all of them. Tokens are those of the completions.

- `trl`: TRL's PPO trainer, with a value model of the policy's size; its reward model is the smallest there can be (one
  layer of hidden size 16), where the others call a function.
- `critic`: `LenVMPPOTrainer`, a learned critic of the policy's size, no length value model.
- `critic_lenvm`: the same, and a frozen length value model of the policy's size.
- `lenvm`: no task critic (`critic="lenvm"`), a frozen length value model of the policy's size.
- `head`: no task critic, and a length value model that is a head alone on the reference's forward.

Three things differ besides: TRL's trainer takes the probabilities of the old policy from sampling, the other, with more
than one pass, from one forward more; TRL's takes a step without gradient clipping; and where it has as many prompts as
completions, the other has half as many with two completions each, the fewest that TRL's GRPO takes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, Trainer
from transformers.hf_argparser import HfArg

from eval.speed.harness import WARM_UP, Measurement, random_ids
from eval.speed.training import TrainingSizes, common_arguments, make_trainer, save_policy, time_updates
from lenvm_rl.trainers import LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.legacy import legacy_ppo

CASES = {
    "trl": "TRL's PPOTrainer",
    "critic": "LenVMPPOTrainer, learned critic",
    "critic_lenvm": "LenVMPPOTrainer, learned critic and LenVM",
    "lenvm": "LenVMPPOTrainer, LenVM alone",
    "head": "LenVMPPOTrainer, LenVM as a head alone",
}
FORMS = {"critic": None, "critic_lenvm": "full", "lenvm": "full", "head": "head"}
BASELINES = {"time over TRL's": "trl"}
BETA = 0.05


@dataclass
class Settings(TrainingSizes):
    """A Llama and random prompts."""

    epochs: int = HfArg(default=2, help="Passes over a batch.")

    def __post_init__(self) -> None:
        legacy_ppo()  # which says so where TRL has no PPO trainer to compare with


def make_legacy(settings: Settings, folder: Path) -> Trainer:
    """TRL's PPO trainer, which never stops at the end of sequence: its completions have one length."""
    trainer_class, config_class = legacy_ppo()
    tokenizer = save_policy(settings, folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    config = policy.config
    config.num_labels = 1
    value_model = LlamaForSequenceClassification(config)
    value_model.model.load_state_dict(policy.model.state_dict())
    small = type(config)(**{**config.to_dict(), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16})  # fmt: skip
    prompts = settings.batch * (settings.updates + WARM_UP)
    args = config_class(
        **common_arguments(settings, folder),
        temperature=1.0,
        num_ppo_epochs=settings.epochs,
        num_mini_batches=1,
        total_episodes=prompts,
        response_length=settings.completion_tokens,
        local_rollout_forward_batch_size=settings.batch,
        num_sample_generations=0,
        kl_coef=BETA,
    )
    data = Dataset.from_dict({"input_ids": random_ids(settings, prompts, settings.prompt_tokens).tolist()})
    return trainer_class(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=LlamaForSequenceClassification(small),
        value_model=value_model,
        train_dataset=data,
        eval_dataset=data,
    )


def measure(case: str, settings: Settings) -> Measurement:
    """One of the cases, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        if case == "trl":
            return time_updates(make_legacy(settings, Path(folder)), settings)
        options = {"beta": BETA, "generations": 2, "epochs": settings.epochs}
        options["critic"] = "learned" if case.startswith("critic") else "lenvm"
        kinds = (LenVMPPOTrainer, LenVMPPOConfig)
        trainer = make_trainer(kinds, settings, Path(folder), FORMS[case], **options)
        return time_updates(trainer, settings, steps=settings.epochs)
