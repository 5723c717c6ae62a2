"""How fast value pretraining is: this trainer, a padded loop with full logits, and the bare backbone.

- `trainer`: [`~lenvm_rl.pretraining.LengthValueTrainer`] as it is, optimiser, data loading and all.
- `shared`: the same with `share_prompts`.
- `padded`: completions padded to the longest of their batch, a forward with the logits of the whole vocabulary and
  every hidden state, a value head on the last of those, backward, AdamW.
- `limit`: forward and backward of the backbone alone, without head, loss or optimiser, on rows full of tokens that are
  as long as the trainer's.

Tokens are those that are processed, padding not counted; a prompt that several completions share counts once.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from eval.measurement import (
    Measurement,
    Meter,
    add_settings,
    measure_in_process,
    read_settings,
    report,
    run_steps,
    setting,
)
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.value_model import LengthValueHead
from lenvm_rl.pretraining.batches import padding_share
from lenvm_rl.pretraining.loss import IGNORED, length_value_loss
from lenvm_rl.pretraining.trainer import LengthValueCollator, LengthValueTrainer, LengthValueTrainingArguments
from lenvm_rl.programs import run_program
from lenvm_rl.returns import discounted_return

CASES = ("trainer", "shared", "padded", "limit")
TITLES = {
    "trainer": "LengthValueTrainer",
    "shared": "LengthValueTrainer, share_prompts",
    "padded": "padded loop, full logits",
    "limit": "bare backbone, dense",
}
GAMMA = 0.98


@dataclass
class Settings:
    """What is measured: a Llama with random weights on random rollouts.

    The vocabulary is 64 times the hidden size, as in small released models (85 times in SmolLM2-135M, 170 times in
    Qwen2.5-0.5B).
    """

    hidden: int = setting(128, "Hidden size.")
    layers: int = setting(4, "Layers.")
    vocab: int = setting(8192, "Tokens of the vocabulary.")
    prompts: int = setting(64, "Random prompts.")
    samples: int = setting(16, "Completions of each.")
    prompt_tokens: int = setting(32, "Tokens of a prompt.")
    median_tokens: int = setting(48, "Median length of completions, in tokens.")
    longest: int = setting(256, "Longest completion, in tokens.")
    batch: int = setting(64, "Completions in a batch.")
    seconds: float = setting(8.0, "How long each case is measured.")
    threads: int = setting(1, "Threads of the processor.")
    seed: int = setting(0, "Seed of weights and data.")


def make_rollouts(settings: Settings) -> list[dict]:
    """Ragged rollouts: lengths are log-normal, with a median of each prompt's own; prompts are half to twice as long
    as `prompt_tokens`."""
    draw = torch.Generator().manual_seed(settings.seed)

    def ids(count: int) -> list[int]:
        return torch.randint(2, settings.vocab, (count,), generator=draw).tolist()

    rollouts = []
    for group in range(settings.prompts):
        tokens = settings.prompt_tokens * 2.0 ** float(torch.rand((), generator=draw) * 2 - 1)
        prompt, center = ids(max(1, round(tokens))), float(torch.randn((), generator=draw)) * 0.5
        for _ in range(settings.samples):
            scale = 2.718281828 ** (center + 0.4 * float(torch.randn((), generator=draw)))
            length = min(settings.longest, max(2, round(settings.median_tokens * scale)))
            completion = [*ids(length - 1), 1]
            rollout = {"prompt_ids": prompt, "completion_ids": completion, "finish_reason": "stop", "group": group}
            rollouts.append(rollout)
    return rollouts


def make_policy(settings: Settings) -> LlamaForCausalLM:
    """The policy whose decoder is trained."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.hidden // 32),
        num_key_value_heads=max(1, settings.hidden // 64),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


class _MeteredTrainer(LengthValueTrainer):
    """Remembers what its last steps processed."""

    processed = (0, 0)

    def training_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`."""
        sequences = inputs["sequences"]
        tokens = inputs["blocks"].ge(0).sum() if "blocks" in inputs else (sequences[:, 2] + sequences[:, 5] - 1).sum()
        self.processed = (int(tokens), len(sequences))
        return super().training_step(model, inputs, *args, **kwargs)


class _Stopwatch(TrainerCallback):
    def __init__(self, meter: Meter):
        self.meter, self.trainer = meter, None

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer."""
        control.should_training_stop = self.meter.add(*self.trainer.processed)


def measure_trainer(settings: Settings, share_prompts: bool) -> Measurement:
    """Optimiser steps of the trainer, one micro-batch each."""
    rollouts = Dataset.from_list(make_rollouts(settings))
    model = LengthValueModel.from_backbone(make_policy(settings), gamma=GAMMA)
    with tempfile.TemporaryDirectory() as folder:
        args = LengthValueTrainingArguments(
            folder,
            per_device_train_batch_size=settings.batch,
            num_train_epochs=1000,
            share_prompts=share_prompts,
            learning_rate=1e-4,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        meter = Meter(settings.seconds)
        watch = _Stopwatch(meter)
        watch.trainer = _MeteredTrainer(model, args, train_dataset=rollouts, callbacks=[watch])
        watch.trainer.train()
    return meter.result()


def measure_padded(settings: Settings) -> Measurement:
    """Steps of a plain loop over random batches, each padded to its longest completion."""
    rollouts, policy = make_rollouts(settings), make_policy(settings)
    head = LengthValueHead(settings.hidden)
    optimizer = torch.optim.AdamW([*policy.parameters(), *head.parameters()], lr=1e-4)
    collate = LengthValueCollator(packing=False)
    draw = torch.Generator().manual_seed(settings.seed)

    def step(number: int) -> tuple[int, int]:
        chosen = torch.randperm(len(rollouts), generator=draw)[: settings.batch].tolist()
        batch = collate([rollouts[index] for index in chosen])
        outputs = policy(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        )
        values = -torch.sigmoid(head(outputs.hidden_states[-1]))
        targets = discounted_return(batch["labels"].clamp(min=0).float(), GAMMA)
        length_value_loss(values, targets, batch["labels"] != IGNORED).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(batch["attention_mask"].sum()), len(chosen)

    return run_steps(step, Meter(settings.seconds))


def measure_limit(settings: Settings) -> Measurement:
    """Forward and backward of the backbone on rows without padding, of the shape that the trainer's rows have."""
    rollouts, backbone = make_rollouts(settings), make_policy(settings).model
    draw = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randperm(len(rollouts), generator=draw)[: settings.batch].tolist()
    rows, width = LengthValueCollator()([rollouts[index] for index in chosen])["input_ids"].shape
    ids = torch.randint(2, settings.vocab, (rows, width), generator=draw)

    def step(number: int) -> tuple[int, int]:
        backbone(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        backbone.zero_grad()
        return rows * width, rows

    return run_steps(step, Meter(settings.seconds))


def measure(case: str, settings: Settings) -> Measurement:
    """One of the cases, in this process."""
    torch.set_num_threads(settings.threads)
    if case == "padded":
        return measure_padded(settings)
    return measure_limit(settings) if case == "limit" else measure_trainer(settings, share_prompts=case == "shared")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of [`Settings`]."""
    add_settings(parser, Settings)


def print_measurements(measured: dict[str, Measurement], settings: Settings, console: Console) -> None:
    """Prints the table, and what was asked for beside what was measured."""
    sizes = [len(each["prompt_ids"]) + len(each["completion_ids"]) - 1 for each in make_rollouts(settings)]
    drawn = sizes[:: max(1, len(sizes) // settings.batch)][: settings.batch]
    padding = padding_share([[index] for index in range(len(drawn))], drawn)
    console.print(
        f"Llama, hidden size {settings.hidden}, {settings.layers} layers, vocabulary {settings.vocab}; "
        f"{settings.prompts} prompts x {settings.samples} completions, {settings.batch} per batch, "
        f"{sum(sizes) / len(sizes):.0f} tokens each (longest {max(sizes)}; padded, {padding:.0%} of a batch is "
        f"padding); {settings.threads} thread(s), float32"
    )
    table = Table("what", title="value pretraining")
    for column in ("tokens/s", "of the limit", "completions/s", "peak memory, MiB", "steps"):
        table.add_column(column, justify="right")
    limit = measured["limit"].tokens_per_second
    for case, result in measured.items():
        table.add_row(
            TITLES[case],
            f"{result.tokens_per_second:.0f}",
            f"{result.tokens_per_second / limit:.2f}",
            "–" if case == "limit" else f"{result.items_per_second:.1f}",
            f"{result.peak_bytes / 2**20:.0f}",
            str(result.steps),
        )
    console.print(table)
    ours, padded = measured["trainer"], measured["padded"]
    asked = {
        "tokens/s over the limit's": (ours.tokens_per_second / limit, ">=", 0.9),
        "tokens/s over the padded loop's": (ours.tokens_per_second / padded.tokens_per_second, ">=", 3.0),
        "peak memory over the padded loop's": (ours.peak_bytes / padded.peak_bytes, "<=", 0.5),
    }
    for name, (value, sign, bound) in asked.items():
        met = value >= bound if sign == ">=" else value <= bound
        console.print(f"{name}: {value:.2f} (asked {sign} {bound}: {'met' if met else 'not met'})")


def run(args: argparse.Namespace) -> None:
    """Measures every case in a process of its own and prints them."""
    settings = read_settings(args, Settings)
    measured = {case: measure_in_process(__name__, {"case": case, **asdict(settings)}) for case in CASES}
    print_measurements(measured, settings, Console(width=120))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures one case and reports it as a line of JSON.")
    parser.add_argument("--case", choices=CASES, required=True)
    add_arguments(parser)
    arguments = parser.parse_args()
    run_program(lambda: report(measure(arguments.case, read_settings(arguments, Settings))))
