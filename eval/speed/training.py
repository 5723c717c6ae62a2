"""What the speed of trainers is measured on: a policy on disk, random prompts, completions of one length, a clock."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from transformers.hf_argparser import HfArg

from eval.speed.harness import GAMMA, WARM_UP, Measurement, Sizes, make_policy, now, random_ids
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.loading import load_tokenizer

ADAPTERS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass
class TrainingSizes(Sizes):
    """A policy, random prompts, and how many updates are timed."""

    prompt_tokens: int = HfArg(default=32, help="Tokens of a prompt.")
    completion_tokens: int = HfArg(default=64, help="Tokens of a completion; all are of one length.")
    batch: int = HfArg(default=16, help="Completions in a batch.")
    updates: int = HfArg(default=6, help="Updates that are timed each time; the median counts.")


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for each id; 0 pads, 1 ends."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def save_policy(settings: Sizes, folder: Path) -> PreTrainedTokenizerBase:
    """Writes the policy, and its tokenizer, to where TRL loads its reference from."""
    make_policy(settings).save_pretrained(folder)
    tokenizer = make_tokenizer(settings.vocab) if settings.model is None else load_tokenizer(settings.model)
    tokenizer.save_pretrained(folder)
    return tokenizer


def first_token_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs inside a group: parity of the first token."""
    return [float(ids[0] % 2) for ids in completion_ids]


def common_arguments(settings: Any, folder: str | os.PathLike) -> dict[str, Any]:
    """What the configs of all trainers say; `settings` are sizes with a `batch`."""
    return {
        "output_dir": str(Path(folder) / "run"),
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": settings.seed,
    }


def make_trainer(
    kinds: tuple[type[Trainer], type],
    settings: TrainingSizes,
    folder: Path,
    form: str | None,
    *,
    beta: float,
    generations: int,
    epochs: int = 1,
    adapters: bool = False,
    **options: Any,
) -> Trainer:
    """A run of this library, ready for its first step, whose completions cannot end before their one length.

    Args:
        kinds (`tuple[type, type]`): classes of the trainer and of its config.
        settings ([`TrainingSizes`]), folder (`pathlib.Path`): what is trained, and where it is written to.
        form (`str`, *optional*): of the length value model, which has the policy's size; `None` for no model.
        beta (`float`): of the divergence from the reference; 0 for none.
        generations (`int`), epochs (`int`, *optional*, defaults to `1`): completions of a prompt, passes over a batch.
        adapters (`bool`, *optional*, defaults to `False`): whether the policy is trained through LoRA.
        options: further arguments of the trainer.
    """
    tokenizer = save_policy(settings, folder)
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
    updates = settings.updates + WARM_UP
    args = kinds[1](
        **common_arguments(settings, folder),
        max_steps=epochs * updates,
        num_generations=generations,
        num_iterations=epochs,
        max_completion_length=settings.completion_tokens,
        generation_kwargs={"min_new_tokens": settings.completion_tokens},
        beta=beta,
        length_coef=0.0 if form is None else 0.1,
        length_gate="all",
        loss_type="dr_grpo",
    )
    ids = random_ids(settings, updates * settings.batch // generations, settings.prompt_tokens) % len(tokenizer)
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


class Clock(TrainerCallback):
    """When each optimiser step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Called by every trainer."""
        self.ends.append(now())


def time_updates(trainer: Trainer, settings: TrainingSizes, steps: int = 1) -> Measurement:
    """Trains, and measures an update, which takes so many optimiser steps; tokens are those of its completions."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    ends = clock.ends[steps - 1 :: steps]
    if len(ends) != settings.updates + WARM_UP:
        raise RuntimeError(f"{len(ends)} updates were taken instead of {settings.updates + WARM_UP}.")
    return Measurement(settings.batch * settings.completion_tokens, float(np.median(np.diff(ends[WARM_UP - 1 :]))))
