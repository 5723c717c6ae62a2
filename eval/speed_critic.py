"""What a frozen length value model costs a step of GRPO, in each of its forms, in time and in memory.

A step is all of it: completions, rewards, values, loss, backward, optimiser. Steps with and without the model alternate
in one process, on the same prompts and with completions of one length, so that what else the machine does reaches both;
the ratio is that of the medians over pairs, with a 95 % bootstrap interval. On a CPU, time is that of the process
(one thread). `forward` is one bare forward of the model along the same batch.

- `full`: a model of the policy's size, beside a policy that is trained whole. Asked: at most 1.05 times the plain step
  and one bare forward.
- `adapter`: a LoRA adapter and a head on the base of a policy with adapters.
- `head`: a head alone on the reference's forward, with a reference model and with a policy with adapters (`beta` > 0 in
  the plain step, too). Asked: at most 1.03 times the plain step.

Memory is the most that a process of its own holds beyond what it held before its first model: of a policy with adapters
and a reference (`beta` > 0), without a length value model and with one in each form; beside it, the numbers that all
models together hold, shared ones counted once.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from eval.measurement import Measurement, Meter, add_settings, measure_in_process, read_settings, report, setting
from eval.speed_pretraining import GAMMA, make_policy
from eval.speed_pretraining import Settings as ModelSettings
from lenvm_rl.modeling.backbones import load_model
from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.loading import load_tokenizer
from lenvm_rl.programs import run_program
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer

BETA = 0.04
ADAPTERS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass
class Settings:
    """What is measured: a Llama with random weights, or the model in a folder, on random prompts."""

    model: str = setting("", "A policy, folder or hub id; without one, a Llama with random weights of the sizes here.")
    hidden: int = setting(128, "Hidden size.")
    layers: int = setting(4, "Layers.")
    vocab: int = setting(8192, "Tokens of the vocabulary.")
    prompt_tokens: int = setting(32, "Tokens of a prompt.")
    completion_tokens: int = setting(64, "Tokens of a completion; all are of one length.")
    batch: int = setting(16, "Completions in a batch.")
    steps: int = setting(12, "Pairs of steps that are timed.")
    memory_hidden: int = setting(512, "Hidden size of the model whose memory is measured.")
    memory_layers: int = setting(8, "Layers of that model.")
    memory_batch: int = setting(4, "Completions in a batch of that model.")
    threads: int = setting(1, "Threads of the processor.")
    seed: int = setting(0, "Seed of weights and data.")


@dataclass(frozen=True)
class Case:
    """A form of length value model and the run that it is measured in.

    Args:
        form (`str`): of the model; `"none"` for no model at all.
        adapters (`bool`): whether the policy is trained through adapters.
        beta (`float`): of TRL's divergence from the reference.
        title (`str`): in the table.
        asked (`float`, *optional*): most that the ratio may be.
        adds_forward (`bool`, *optional*): whether it is asked against the plain step and a bare forward.
    """

    form: str
    adapters: bool
    beta: float
    title: str
    asked: float | None = None
    adds_forward: bool = False


CASES = (
    Case("full", False, 0.0, "full, policy trained whole", 1.05, adds_forward=True),
    Case("adapter", True, 0.0, "adapter, policy with adapters"),
    Case("head", False, BETA, "head, reference model", 1.03),
    Case("head", True, BETA, "head, policy with adapters", 1.03),
)
MEMORY = ("none", "full", "adapter", "head")


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for each id; 0 pads, 1 ends."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def save_model(settings: Settings, folder: Path) -> None:
    """The policy on disk, from where TRL loads its reference."""
    if settings.model:
        load_model(AutoModelForCausalLM.from_pretrained, settings.model, dtype=torch.float32).save_pretrained(folder)
        load_tokenizer(settings.model).save_pretrained(folder)
        return
    shape = ModelSettings(hidden=settings.hidden, layers=settings.layers, vocab=settings.vocab, seed=settings.seed)
    make_policy(shape).save_pretrained(folder)
    make_tokenizer(settings.vocab).save_pretrained(folder)


def first_token_reward(completion_ids, **kwargs) -> list[float]:
    """A reward that costs nothing and differs inside a group: parity of the first token."""
    return [float(ids[0] % 2) for ids in completion_ids]


def make_trainer(settings: Settings, case: Case, folder: Path) -> LenVMGRPOTrainer:
    """The run of a case, ready for its first step."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = torch.Generator().manual_seed(settings.seed)
    words = [torch.randint(2, settings.vocab, (settings.prompt_tokens,), generator=draw).tolist() for _ in range(64)]
    texts = [tokenizer.decode([i % len(tokenizer) for i in ids]) for ids in words]
    args = LenVMGRPOConfig(
        str(folder / "run"),
        per_device_train_batch_size=settings.batch,
        num_generations=4,
        max_completion_length=settings.completion_tokens,
        generation_kwargs={"min_new_tokens": settings.completion_tokens},
        beta=case.beta,
        length_coef=0.0 if case.form == "none" else 0.1,
        length_gate="all",
        loss_type="dr_grpo",
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        seed=settings.seed,
    )
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lenvm = None
    if case.form != "none":
        # Of a reference model's base, the trainer finds it by the path.
        base = policy if case.adapters or case.form == "full" else str(folder)
        lenvm = LengthValueModel.from_backbone(base, gamma=GAMMA, tokenizer=tokenizer, form=case.form)
        if case.form == "head" and not case.adapters:
            lenvm.save_pretrained(folder / "head")
            lenvm = str(folder / "head")
    return LenVMGRPOTrainer(
        policy,
        first_token_reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        length_value_model=lenvm,
        peft_config=LoraConfig(**ADAPTERS) if case.adapters else None,
    )


class Stepper:
    """A run that is taken step by step from outside, all inputs given.

    Args:
        trainer ([`LenVMGRPOTrainer`]): not yet trained.
    """

    def __init__(self, trainer: LenVMGRPOTrainer):
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        self._first = itertools.count(step=trainer.args.per_device_train_batch_size // trainer.num_generations)
        self.batch: dict = {}
        inner = trainer._generate_and_score_completions

        def remember(inputs):
            self.batch = inner(inputs)
            return dict(self.batch)

        trainer._generate_and_score_completions = remember

    def step(self) -> float:
        """One optimiser step; returns its seconds."""
        trainer, data = self.trainer, self.trainer.train_dataset
        first, group = next(self._first), trainer.num_generations
        rows = trainer.args.per_device_train_batch_size
        inputs = [dict(data[(first + row // group) % len(data)]) for row in range(rows)]
        start = now()
        trainer.training_step(trainer.model, inputs, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return now() - start

    def forward(self) -> float:
        """One bare forward of the length value model along the last batch; returns its seconds."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        start = now()
        with torch.no_grad():
            completion_logits(self.trainer.length_value_model, *(self.batch[name] for name in names))
        return now() - start


def now() -> float:
    """Seconds: of the device's clock where there is a GPU, of this process otherwise."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def median_ratio(above: list[float], below: list[float], seed: int) -> tuple[float, float, float]:
    """Ratio of the medians of paired numbers, and its 95 % bootstrap interval over pairs."""
    above, below = np.array(above), np.array(below)
    drawn = np.random.default_rng(seed).integers(0, len(above), (2000, len(above)))
    ratios = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    return (float(np.median(above) / np.median(below)), *map(float, np.quantile(ratios, [0.025, 0.975])))


def measure_time(settings: Settings, case: Case, progress: tqdm) -> dict[str, list[float]]:
    """Seconds of steps without the model, with it, and of its bare forward, taken in turns."""
    plain = Case("none", case.adapters, case.beta, "")
    seconds: dict[str, list[float]] = {"plain": [], "with": [], "forward": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(settings, folder)
        without, beside = (Stepper(make_trainer(settings, each, folder)) for each in (plain, case))
        for number in range(settings.steps + 2):
            # In turns who is first: the second finds the caches as the first has left them.
            pair = {}
            for key, stepper in [("plain", without), ("with", beside)][:: 1 if number % 2 else -1]:
                pair[key] = stepper.step()
            pair["forward"] = beside.forward()
            progress.update()
            if number >= 2:
                for key, value in pair.items():
                    seconds[key].append(value)
    return seconds


def held_numbers(trainer: LenVMGRPOTrainer) -> int:
    """How many numbers the weights of policy, reference and length value model hold, shared ones once."""
    lenvm = trainer.length_value_model
    parts = [trainer.model, trainer.ref_model, lenvm, None if lenvm is None else lenvm.backbone]
    weights = {p.data_ptr(): p.numel() for part in parts if part is not None for p in part.parameters()}
    return sum(weights.values())


def measure_memory(settings: Settings, form: str) -> Measurement:
    """Two steps of a policy with adapters and a reference, in this process; `tokens` are the numbers held."""
    case = Case(form, True, BETA, "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Before anything of the run exists, and without leaving a high-water mark of its own: a run's is far higher.
        meter = Meter(0.0, warmup=1)
        save_model(settings, folder)
        stepper = Stepper(make_trainer(settings, case, folder))
        held = held_numbers(stepper.trainer)
        for _ in range(2):
            stepper.step()
            meter.add(held, 1)
        return meter.result()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of [`Settings`]."""
    add_settings(parser, Settings)


def show_time(measured: dict[Case, dict[str, list[float]]], settings: Settings, console: Console) -> None:
    """The table of times, and what was asked for beside what was measured."""
    table = Table("length value model", title="time of a step of GRPO")
    for column in ("plain, ms", "with it, ms", "bare forward, ms", "with / plain", "with / (plain + forward)"):
        table.add_column(column, justify="right")
    verdicts = []
    for case, seconds in measured.items():
        both = [a + b for a, b in zip(seconds["plain"], seconds["forward"], strict=True)]
        ratios = {
            False: median_ratio(seconds["with"], seconds["plain"], settings.seed),
            True: median_ratio(seconds["with"], both, settings.seed),
        }
        cells = [f"{1000 * float(np.median(seconds[key])):.0f}" for key in ("plain", "with", "forward")]
        table.add_row(case.title, *cells, *(f"{r:.3f} [{low:.3f}, {high:.3f}]" for r, low, high in ratios.values()))
        if case.asked is not None:
            ratio = ratios[case.adds_forward][0]
            against = "plain step + one bare forward" if case.adds_forward else "plain step with the same beta"
            met = "met" if ratio <= case.asked else "not met"
            verdicts.append(f"{case.title}, over the {against}: {ratio:.3f} (asked <= {case.asked}: {met})")
    console.print(table)
    for verdict in verdicts:
        console.print(verdict)


def show_memory(measured: dict[str, Measurement], console: Console) -> None:
    """The table of memory."""
    table = Table("length value model", title="memory, policy with adapters, reference and length value model")
    for column in ("weights held, millions", "peak memory, MiB"):
        table.add_column(column, justify="right")
    for form, result in measured.items():
        table.add_row(form, f"{result.tokens / result.steps / 1e6:.2f}", f"{result.peak_bytes / 2**20:.0f}")
    console.print(table)


def run(args: argparse.Namespace) -> None:
    """Measures times in this process and memory in processes of their own, and prints them."""
    settings, console = read_settings(args, Settings), Console(width=140)
    torch.set_num_threads(settings.threads)
    what = settings.model or f"Llama, hidden size {settings.hidden}, {settings.layers} layers"
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {settings.threads} thread(s), float32"
    )
    console.print(
        f"{what}; {settings.batch} completions a step, prompts of {settings.prompt_tokens} tokens, completions of "
        f"{settings.completion_tokens}; {settings.steps} pairs of steps; {device}"
    )
    larger = {**asdict(settings), "hidden": settings.memory_hidden, "layers": settings.memory_layers}
    larger["batch"] = settings.memory_batch
    shape = what if settings.model else f"hidden size {settings.memory_hidden}, {settings.memory_layers} layers"
    larger = {name: value for name, value in larger.items() if value != ""}
    # First: a process starts with the high-water mark of the one that it was started from.
    memory = {form: measure_in_process(__name__, {"form": form, **larger}) for form in MEMORY}
    with tqdm(total=len(CASES) * (settings.steps + 2), desc="pairs of steps") as progress:
        times = {case: measure_time(settings, case, progress) for case in CASES}
    show_time(times, settings, console)
    console.print(f"memory: {shape}, {settings.memory_batch} completions a step")
    show_memory(memory, console)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures the memory of one form and reports it as a line of JSON.")
    parser.add_argument("--form", choices=MEMORY, required=True)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run_program(lambda: report(measure_memory(read_settings(arguments, Settings), arguments.form)))
