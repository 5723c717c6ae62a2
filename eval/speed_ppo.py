"""How fast PPO is: `LenVMPPOTrainer` beside TRL's own PPO trainer, which TRL had up to 1.12.

    make .venv-legacy/.installed
    .venv-legacy/bin/python -m eval.speed ppo

The same policy, lengths of prompts and of completions, batches, passes over them and learning rates, with a reference
model in all of them; each case in a process of its own, and all in one run. Tokens are those of the completions. On a
CPU, time is that of the process (one thread).

- `trl`: TRL's PPO trainer, with a value model of the policy's size; its reward model is the smallest there can be (one
  layer of hidden size 16), where the others call a function.
- `critic`: `LenVMPPOTrainer`, a learned critic of the policy's size, no length value model. Asked: at least as fast.
- `critic+lenvm`: the same, and a frozen length value model of the policy's size.
- `lenvm`: no task critic (`critic="lenvm"`), a frozen length value model of the policy's size.
- `head`: no task critic, and a length value model that is a head alone on the reference's forward. Asked: at least 1.4
  times as fast.

Three things differ besides: TRL's trainer takes the probabilities of the old policy from sampling, the other, with more
than one pass, from one forward more; TRL's takes a step without gradient clipping; and where it has as many prompts as
completions, the other has half as many with two completions each, the fewest that TRL's GRPO takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, TrainerCallback

from eval.measurement import (
    Measurement,
    add_settings,
    measure_in_process,
    read_settings,
    report,
    resident_peak,
    setting,
)
from eval.speed_critic import Settings as ModelSettings
from eval.speed_critic import first_token_reward, now, save_model
from eval.speed_pretraining import GAMMA
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.programs import run_program
from lenvm_rl.trainers import LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.legacy import legacy_ppo

CASES = {
    "trl": ("TRL's PPOTrainer", None),
    "critic": ("LenVMPPOTrainer, learned critic", 1.0),
    "critic+lenvm": ("LenVMPPOTrainer, learned critic and LenVM", None),
    "lenvm": ("LenVMPPOTrainer, LenVM alone", None),
    "head": ("LenVMPPOTrainer, LenVM as a head alone", 1.4),
}
WARM_UP = 1
BETA = 0.05


@dataclass
class Settings:
    """What is measured: a Llama with random weights, or the model in a folder, on random prompts."""

    model: str = setting("", "A policy, folder or hub id; without one, a Llama with random weights of the sizes here.")
    hidden: int = setting(128, "Hidden size.")
    layers: int = setting(4, "Layers.")
    vocab: int = setting(8192, "Tokens of the vocabulary.")
    prompt_tokens: int = setting(32, "Tokens of a prompt.")
    completion_tokens: int = setting(48, "Tokens of a completion; all are of one length.")
    batch: int = setting(16, "Completions in a batch.")
    epochs: int = setting(2, "Passes over a batch.")
    updates: int = setting(5, "Updates that are timed.")
    threads: int = setting(1, "Threads of the processor.")
    seed: int = setting(0, "Seed of weights and data.")


class _Clock(TrainerCallback):
    """When each optimiser step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Called by either trainer."""
        self.ends.append(now())


def _common(settings: Settings, folder: Path) -> dict:
    return {
        "output_dir": str(folder / "run"),
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
        "temperature": 1.0,
    }


def _prompts(settings: Settings) -> list[list[int]]:
    draw = torch.Generator().manual_seed(settings.seed)
    count = settings.batch * (settings.updates + WARM_UP)
    return torch.randint(2, settings.vocab, (count, settings.prompt_tokens), generator=draw).tolist()


def make_legacy(settings: Settings, folder: Path, clock: _Clock):
    """TRL's PPO trainer, which never stops at the end of sequence: its completions have one length."""
    trainer_class, config_class = legacy_ppo()
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = policy.config
    config.num_labels = 1
    value_model = LlamaForSequenceClassification(config)
    value_model.model.load_state_dict(policy.model.state_dict())
    small = type(config)(**{**config.to_dict(), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16})  # fmt: skip
    args = config_class(
        **_common(settings, folder),
        num_ppo_epochs=settings.epochs,
        num_mini_batches=1,
        total_episodes=settings.batch * (settings.updates + WARM_UP),
        response_length=settings.completion_tokens,
        local_rollout_forward_batch_size=settings.batch,
        num_sample_generations=0,
        kl_coef=BETA,
    )
    data = Dataset.from_dict({"input_ids": _prompts(settings)})
    return trainer_class(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=LlamaForSequenceClassification(small),
        value_model=value_model,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[clock],
    )


def make_ours(settings: Settings, case: str, folder: Path, clock: _Clock) -> LenVMPPOTrainer:
    """`LenVMPPOTrainer`, whose completions cannot end before their one length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = _prompts(settings)
    # Two completions of a prompt are the fewest that TRL takes; the batch has as many as the other's.
    words = [tokenizer.decode(ids) for ids in rows[: len(rows) // 2]]
    args = LenVMPPOConfig(
        **_common(settings, folder),
        max_steps=settings.epochs * (settings.updates + WARM_UP),
        num_generations=2,
        num_iterations=settings.epochs,
        max_completion_length=settings.completion_tokens,
        generation_kwargs={"min_new_tokens": settings.completion_tokens},
        beta=BETA,
        length_coef=0.0 if case == "critic" else 0.1,
        length_gate="all",
        loss_type="dr_grpo",
    )
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lenvm = None
    if case in ("critic+lenvm", "lenvm"):
        lenvm = LengthValueModel.from_backbone(policy, gamma=GAMMA, tokenizer=tokenizer)
    elif case == "head":
        model = LengthValueModel.from_backbone(str(folder), gamma=GAMMA, tokenizer=tokenizer, form="head")
        model.save_pretrained(folder / "head")
        lenvm = str(folder / "head")
    return LenVMPPOTrainer(
        policy,
        first_token_reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": words}),
        processing_class=tokenizer,
        length_value_model=lenvm,
        critic="learned" if case.startswith("critic") else "lenvm",
        callbacks=[clock],
    )


def measure(case: str, settings: Settings) -> Measurement:
    """One of the cases, in this process: tokens of completions after the warm-up."""
    torch.set_num_threads(settings.threads)
    shape = {name: getattr(settings, name) for name in ("model", "hidden", "layers", "vocab", "seed")}
    clock, before = _Clock(), resident_peak()
    with tempfile.TemporaryDirectory() as name:
        save_model(ModelSettings(**shape), Path(name))
        if case == "trl":
            trainer, steps = make_legacy(settings, Path(name), clock), 1
        else:
            trainer, steps = make_ours(settings, case, Path(name), clock), settings.epochs
        trainer.train()
    updates = clock.ends[steps - 1 :: steps]
    if len(updates) != settings.updates + WARM_UP:
        raise RuntimeError(f"{case}: {len(updates)} updates were taken instead of {settings.updates + WARM_UP}.")
    items = settings.batch * settings.updates
    seconds = updates[-1] - updates[WARM_UP - 1]
    tokens = items * settings.completion_tokens
    return Measurement(tokens, items, seconds, settings.updates, resident_peak() - before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of [`Settings`]."""
    add_settings(parser, Settings)


def print_measurements(measured: dict[str, Measurement], settings: Settings, console: Console) -> None:
    """Prints the table, and what was asked for beside what was measured."""
    what = (
        settings.model or f"Llama, hidden size {settings.hidden}, {settings.layers} layers, vocabulary {settings.vocab}"
    )
    device = "bfloat16 (autocast) on a GPU" if torch.cuda.is_available() else "float32 on a CPU"
    console.print(
        f"{what}; {settings.batch} completions an update, prompts of {settings.prompt_tokens} tokens, completions of "
        f"{settings.completion_tokens}, {settings.epochs} passes; {settings.updates} updates, {settings.threads} "
        f"thread(s), {device}"
    )
    table = Table("what", title="PPO")
    for column in ("tokens/s", "of TRL's", "seconds per update"):
        table.add_column(column, justify="right")
    theirs = measured["trl"].tokens_per_second
    for case, result in measured.items():
        speed = result.tokens_per_second
        table.add_row(CASES[case][0], f"{speed:.0f}", f"{speed / theirs:.2f}", f"{result.seconds / result.steps:.2f}")
    console.print(table)
    for case, (title, asked) in CASES.items():
        if asked is not None:
            ratio = measured[case].tokens_per_second / theirs
            met = "met" if ratio >= asked else "not met"
            console.print(f"{title}: {ratio:.2f} times TRL's tokens/s (asked >= {asked}: {met})")


def run(args: argparse.Namespace) -> None:
    """Measures every case in a process of its own and prints them."""
    legacy_ppo()
    settings = read_settings(args, Settings)
    given = {name: value for name, value in asdict(settings).items() if value != ""}
    start = time.perf_counter()
    measured = {case: measure_in_process(__name__, {"case": case, **given}) for case in CASES}
    print_measurements(measured, settings, Console(width=120))
    Console().print(f"measured in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures one case and reports it as a line of JSON.")
    parser.add_argument("--case", choices=CASES, required=True)
    add_arguments(parser)
    arguments = parser.parse_args()
    run_program(lambda: report(measure(arguments.case, read_settings(arguments, Settings))))
