"""How fast the trainers are: what a length value model costs a step of GRPO, and PPO beside TRL's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from transformers.hf_argparser import HfArg

from eval.report import Column
from eval.speed.harness import GAMMA, WARM_UP, Measurement, Program, Sizes, make_policy, now, random_ids
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.loading import load_tokenizer
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.legacy import legacy_ppo

CRITIC_TEXT = """What a frozen length value model costs a step of GRPO, in each of its forms, in time and in memory.

A step is all of it: completions, rewards, values, loss, backward, optimizer. Each case has a plain step beside it, the
same without the model: of a policy that is trained whole or through adapters, with a reference (`beta` > 0), on whose
forward a head alone reads, or without. Last comes a step of PPO: a critic and a length value model, a head alone each,
beside training the same adapters with neither, nor a reference. Memory tells best of a larger model: `--hidden 512
--layers 8 --batch 4`. Beside it stand the numbers that all models together hold, shared ones counted once.
"""
PPO_TEXT = """How fast PPO is: `LenVMPPOTrainer` beside TRL's own PPO trainer, which TRL had up to 1.12.

    make .venv-legacy/.installed
    .venv-legacy/bin/python -m eval.speed ppo

The same policy, lengths of prompts and of completions, batches, passes over them and learning rates, with a reference
model in all of them. Critics and length value models of form full have the policy's size; adapter and head are on the
reference's decoder. Three things differ: TRL's trainer has a reward model (one layer of hidden size 16) where the other
calls a function, takes the probabilities of the old policy from sampling instead of a forward of their own, and has one
completion of each prompt; the other two, the fewest there.
"""
ADAPTERS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
BETA = 0.05
GRPO_KINDS, PPO_KINDS = (LenVMGRPOTrainer, LenVMGRPOConfig), (LenVMPPOTrainer, LenVMPPOConfig)


@dataclass(frozen=True)
class CriticCase:
    """A run of `critic`.

    Args:
        form (`str`, *optional*): of the length value model, if there is one.
        adapters (`bool`): whether the policy is trained through LoRA.
        reference (`bool`): whether there is a reference.
        plain (`str`, *optional*): the case that it is compared with.
        critic_form (`str`, *optional*): of PPO's learned critic; `None` for GRPO.
    """

    form: str | None = None
    adapters: bool = False
    reference: bool = False
    plain: str | None = None
    critic_form: str | None = None

    @property
    def text(self) -> str:
        """Words for the table."""
        policy = "with adapters" if self.adapters else "trained whole"
        reference, ppo = ", reference" * self.reference, ", PPO" * (self.critic_form is not None)
        return f"{self.form or 'no model'}, policy {policy}{reference}{ppo}"


CRITIC_CASES = {
    "plain": CriticCase(),
    "full": CriticCase("full", plain="plain"),
    "plain_adapters": CriticCase(adapters=True),
    "adapter": CriticCase("adapter", adapters=True, plain="plain_adapters"),
    "plain_reference": CriticCase(reference=True),
    "head": CriticCase("head", reference=True, plain="plain_reference"),
    "plain_both": CriticCase(adapters=True, reference=True),
    "head_adapters": CriticCase("head", adapters=True, reference=True, plain="plain_both"),
    "ppo_adapters": CriticCase("head", adapters=True, reference=True, plain="plain_adapters", critic_form="head"),
}
# Form of the learned critic, if there is one, and of the length value model, if there is one.
PPO_FORMS = {
    "full": ("full", None),
    "adapter": ("adapter", None),
    "head": ("head", None),
    "full_lenvm": ("full", "full"),
    "heads": ("head", "head"),
    "lenvm": (None, "full"),
    "lenvm_head": (None, "head"),
}


@dataclass
class TrainingSizes(Sizes):
    """A policy, random prompts, and how many updates are timed."""

    prompt_tokens: int = HfArg(default=32, help="Tokens of a prompt.")
    completion_tokens: int = HfArg(default=64, help="Tokens of a completion; all are of one length.")
    batch: int = HfArg(default=16, help="Completions in a batch.")
    updates: int = HfArg(default=6, help="Updates that are timed each time; the median counts.")


@dataclass
class PPOSizes(TrainingSizes):
    """The same, and passes over a batch."""

    epochs: int = HfArg(default=2, help="Passes over a batch.")

    def __post_init__(self) -> None:
        legacy_ppo()  # which says so where TRL has no PPO trainer to compare with


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
        """Called by every trainer."""
        self.ends.append(now())


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for each id; 0 pads, 1 ends."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def save_policy(sizes: Sizes, folder: Path) -> PreTrainedTokenizerBase:
    """Writes the policy, and its tokenizer, to where TRL loads its reference from."""
    make_policy(sizes).save_pretrained(folder)
    tokenizer = make_tokenizer(sizes.vocab) if sizes.model is None else load_tokenizer(sizes.model)
    tokenizer.save_pretrained(folder)
    return tokenizer


def first_token_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs inside a group: parity of the first token."""
    return [float(ids[0] % 2) for ids in completion_ids]


def common_arguments(sizes: Any, folder: str | os.PathLike) -> dict[str, Any]:
    """What the configs of all trainers say; `sizes` have a `batch`."""
    return {
        "output_dir": str(Path(folder) / "run"),
        "per_device_train_batch_size": sizes.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": sizes.seed,
    }


def make_trainer(
    kinds: tuple[type[Trainer], type],
    sizes: TrainingSizes,
    folder: Path,
    form: str | None,
    *,
    beta: float,
    generations: int,
    epochs: int = 1,
    adapters: bool = False,
    fields: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Trainer:
    """A run of this library, ready for its first step, whose completions cannot end before their one length.

    Args:
        kinds (`tuple[type, type]`): classes of the trainer and of its config.
        sizes ([`TrainingSizes`]), folder (`pathlib.Path`): what is trained, and where it is written to.
        form (`str`, *optional*): of the length value model, which has the policy's size; `None` for no model.
        beta, generations, epochs: of the reference, completions of a prompt, passes over a batch.
        adapters (`bool`, *optional*, defaults to `False`): whether the policy is trained through LoRA.
        fields (mapping, *optional*): further fields of the config.
        options: further arguments of the trainer.
    """
    tokenizer = save_policy(sizes, folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lenvm = None
    if form is not None:
        # The base of a head on a reference is found by the path.
        of_reference = form == "head" and not adapters
        base = str(folder) if of_reference else policy
        lenvm = LengthValueModel.from_backbone(base, gamma=GAMMA, tokenizer=tokenizer, form=form)
        if of_reference:
            lenvm.save_pretrained(folder / "head")
            lenvm = str(folder / "head")
    updates = sizes.updates + WARM_UP
    args = kinds[1](
        **common_arguments(sizes, folder),
        max_steps=epochs * updates,
        num_generations=generations,
        num_iterations=epochs,
        max_completion_length=sizes.completion_tokens,
        generation_kwargs={"min_new_tokens": sizes.completion_tokens},
        beta=beta,
        length_coef=0.0 if form is None else 0.1,
        length_gate="all",
        loss_type="dr_grpo",
        **fields,
    )
    ids = random_ids(sizes, updates * sizes.batch // generations, sizes.prompt_tokens) % len(tokenizer)
    return kinds[0](
        policy,
        first_token_reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(row) for row in ids.tolist()]}),
        processing_class=tokenizer,
        length_value_model=lenvm,
        peft_config=LoraConfig(**ADAPTERS) if adapters else None,
        **options,
    )


def make_legacy(sizes: PPOSizes, folder: Path) -> Trainer:
    """TRL's PPO trainer, which never stops at the end of sequence: its completions have one length."""
    trainer_class, config_class = legacy_ppo()
    tokenizer = save_policy(sizes, folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    config = policy.config
    config.num_labels = 1
    value_model = LlamaForSequenceClassification(config)
    value_model.model.load_state_dict(policy.model.state_dict())
    small = type(config)(**{**config.to_dict(), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16})  # fmt: skip
    prompts = sizes.batch * (sizes.updates + WARM_UP)
    args = config_class(
        **common_arguments(sizes, folder),
        temperature=1.0,
        num_ppo_epochs=sizes.epochs,
        num_mini_batches=1,
        total_episodes=prompts,
        response_length=sizes.completion_tokens,
        local_rollout_forward_batch_size=sizes.batch,
        num_sample_generations=0,
        kl_coef=BETA,
    )
    data = Dataset.from_dict({"input_ids": random_ids(sizes, prompts, sizes.prompt_tokens).tolist()})
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


def time_updates(trainer: Trainer, sizes: TrainingSizes, steps: int = 1) -> Measurement:
    """Trains, and measures an update, which takes so many optimizer steps; its completions' tokens count."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    ends = clock.ends[steps - 1 :: steps]
    if len(ends) != sizes.updates + WARM_UP:
        raise RuntimeError(f"{len(ends)} updates were taken instead of {sizes.updates + WARM_UP}.")
    return Measurement(sizes.batch * sizes.completion_tokens, float(np.median(np.diff(ends[WARM_UP - 1 :]))))


def make_critic_run(case: str, sizes: TrainingSizes, folder: Path) -> LenVMGRPOTrainer:
    """The run of a case of `critic`, ready for its first step."""
    one = CRITIC_CASES[case]
    kinds, fields = GRPO_KINDS, {}
    if one.critic_form is not None:
        kinds, fields = PPO_KINDS, {"critic_form": one.critic_form}
    beta = BETA if one.reference else 0.0
    return make_trainer(kinds, sizes, folder, one.form, beta=beta, generations=4, adapters=one.adapters, fields=fields)


def held_numbers(trainer: LenVMGRPOTrainer) -> int:
    """How many numbers the weights of policy, reference, length value model and critic hold, shared ones once."""
    values = [trainer.length_value_model, getattr(trainer, "critic", None)]
    parts = [trainer.model, trainer.ref_model, *values, *(each.backbone for each in values if each is not None)]
    weights = {p.data_ptr(): p.numel() for part in parts if part is not None for p in part.parameters()}
    return sum(weights.values())


def measure_critic(case: str, sizes: TrainingSizes) -> Measurement:
    """A step of GRPO, with the numbers that are held beside it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_critic_run(case, sizes, Path(folder))
        return replace(time_updates(trainer, sizes), count=held_numbers(trainer))


def measure_ppo(case: str, sizes: PPOSizes) -> Measurement:
    """An update of PPO."""
    with tempfile.TemporaryDirectory() as folder:
        if case == "trl":
            return time_updates(make_legacy(sizes, Path(folder)), sizes)
        return time_updates(make_ppo_run(case, sizes, Path(folder)), sizes, steps=sizes.epochs)


def make_ppo_run(case: str, sizes: PPOSizes, folder: Path) -> LenVMPPOTrainer:
    """The run of a case of `ppo` that is not TRL's, ready for its first step."""
    critic_form, form = PPO_FORMS[case]
    options = {"beta": BETA, "generations": 2, "epochs": sizes.epochs}
    if critic_form is None:
        return make_trainer(PPO_KINDS, sizes, folder, form, critic="lenvm", **options)
    return make_trainer(PPO_KINDS, sizes, folder, form, fields={"critic_form": critic_form}, **options)


CRITIC_PLAIN = {name: one.plain for name, one in CRITIC_CASES.items() if one.plain is not None}
CRITIC = Program(
    "critic",
    CRITIC_TEXT,
    TrainingSizes,
    {name: one.text for name, one in CRITIC_CASES.items()},
    measure_critic,
    {"time over plain step": CRITIC_PLAIN},
    [Column("weights held, millions", "count", 2, scale=1e-6)],
    {"memory over plain step": CRITIC_PLAIN},
)
PPO = Program(
    "ppo",
    PPO_TEXT,
    PPOSizes,
    {"trl": "TRL's PPOTrainer"}
    | {name: f"critic: {critic or 'none'}; LenVM: {form or 'none'}" for name, (critic, form) in PPO_FORMS.items()},
    measure_ppo,
    {"time over TRL's": "trl"},
)
