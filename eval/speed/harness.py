"""Measuring how fast something is and how much memory it takes, beside others.

Each case of a program is measured in a process of its own, so that nobody else's caches, threads or high-water mark
have a say; the cases take turns, so that what else the machine does reaches all of them. Ratios are of medians over
the repetitions, with 95 % bootstrap intervals over them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.hf_argparser import HfArg

from eval.report import Column, print_table
from eval.statistics import Interval, percentile_interval
from lenvm_rl.modeling.loading import default_device, load_policy

MARK = "measured: "  # before the line of a process that holds its result
GAMMA = 0.98
WARM_UP = 2  # steps that are not timed


@dataclass
class Sizes:
    """The policy that is measured, and how: a Llama with random weights, or the model in a folder."""

    model: str | None = HfArg(
        default=None, help="A policy, folder or hub id; without one, a Llama with random weights of the sizes here."
    )
    hidden: int = HfArg(default=128, help="Hidden size.")
    layers: int = HfArg(default=4, help="Layers.")
    vocab: int = HfArg(default=8192, help="Tokens of the vocabulary that texts are drawn from.")
    cases: list[str] = HfArg(default_factory=list, help="Names of cases to measure; all of them by default.")
    repetitions: int = HfArg(default=3, help="Times that every case is measured, in turns.")
    threads: int = HfArg(default=1, help="Threads of the processor.")
    seed: int = HfArg(default=0, help="Seed of weights and data.")


@dataclass(frozen=True)
class Measurement:
    """What a process measured: tokens without padding, in how many seconds, what the program counts beside them, and
    the most memory that it held beyond what it held before."""

    tokens: int
    seconds: float
    count: float = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Program:
    """What is measured beside what.

    Args:
        name (`str`), text (`str`): of the subcommand, and what it measures.
        sizes (`type`): dataclass of its options, a kind of [`Sizes`].
        cases (mapping): names and titles.
        measure (callable): `measure(case, sizes)` measures one of them in this process.
        baselines (mapping): titles of columns, and the case over whose time others' is given: one, or one for each.
        columns (sequence of [`~eval.report.Column`], *optional*): further ones, of `count`.
        memory_baselines (mapping, *optional*): as `baselines`, for the most memory that was held.
    """

    name: str
    text: str
    sizes: type[Sizes]
    cases: Mapping[str, str]
    measure: Callable[[str, Any], Measurement]
    baselines: Mapping[str, str | Mapping[str, str]]
    columns: Sequence[Column] = ()
    memory_baselines: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)

    def run(self, sizes: Sizes) -> None:
        """Measures every case, forwards and backwards in turns, and prints them."""
        console = Console(width=180, highlight=False)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        console.print(f"{device}; " + ", ".join(f"{key} {value}" for key, value in asdict(sizes).items()))
        if set(sizes.cases) - set(self.cases):
            raise ValueError(f"cases must be among {', '.join(self.cases)}, got {', '.join(sizes.cases)}.")
        wanted = [case for case in self.cases if not sizes.cases or case in sizes.cases]
        measured: dict[str, list[Measurement]] = {case: [] for case in wanted}
        order = [case for turn in range(sizes.repetitions) for case in wanted[:: -1 if turn % 2 else 1]]
        for case in tqdm(order, desc="measuring", unit="process"):
            measured[case].append(measure_in_process(self.name, case, sizes))
        columns = [Column("what", "title"), Column("tokens/s", "speed")]
        columns += [Column(title, title, 3) for title in self.baselines]
        columns.append(Column("peak memory, MiB", "peak_bytes", 0, scale=2.0**-20))
        columns += [*(Column(title, title, 3) for title in self.memory_baselines), *self.columns]
        print_table(console, self.compare(measured, sizes.seed), columns, title=self.text.partition("\n")[0])

    def compare(self, measured: Mapping[str, Sequence[Measurement]], seed: int = 0) -> list[dict[str, Any]]:
        """A row for each case: its tokens per second, its time over the baselines', and so its memory."""
        times = {case: [each.seconds / each.tokens for each in found] for case, found in measured.items()}
        peaks = {case: [float(each.peak_bytes) for each in found] for case, found in measured.items()}
        compared = [(times, self.baselines), (peaks, self.memory_baselines)]
        rows = []
        for case, found in measured.items():
            row = {"title": self.cases[case], "speed": 1 / median(times[case])}
            row |= {name: float(median(getattr(each, name) for each in found)) for name in ("count", "peak_bytes")}
            for numbers, baselines in compared:
                for title, baseline in baselines.items():
                    below = baseline if isinstance(baseline, str) else baseline.get(case)
                    other = below != case and below in measured
                    row[title] = median_ratio(numbers[case], numbers[below], seed) if other else None
            rows.append(row)
        return rows

    def measure_here(self, case: str, sizes: Sizes) -> None:
        """Measures a case in this process, and prints it for the process that asked for it."""
        torch.set_num_threads(sizes.threads)
        before = peak_memory()
        found = self.measure(case, sizes)
        print(MARK + json.dumps(asdict(replace(found, peak_bytes=peak_memory() - before))), flush=True)


def measure_in_process(name: str, case: str, sizes: Sizes) -> Measurement:
    """Measures a case of the program `name` in a process of its own; what ends that one ends this one, too."""
    given = {"case": case, **asdict(sizes)}
    given = {name: value for name, value in given.items() if name != "cases" and value is not None}
    command = ["-m", "eval.speed", name, *(text for key, value in given.items() for text in (f"--{key}", str(value)))]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        _, said, sentence = done.stderr.rpartition("\nerror: ")
        raise RuntimeError(f"python {' '.join(command)} failed:\n{sentence if said else done.stderr[-2000:]}")
    return Measurement(**json.loads(lines[-1].removeprefix(MARK)))


def median_ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Interval:
    """Ratio of the medians of paired numbers, with its interval over pairs; a single pair has none."""
    drawn = np.random.default_rng(seed).integers(0, len(above), (2000, len(above)))
    medians = np.median(np.array([above, below])[:, drawn], axis=2)
    ratios = medians[0] / medians[1] if len(above) > 1 else np.array([np.nan])
    return percentile_interval(median(above) / median(below), ratios)


def make_policy(sizes: Sizes) -> PreTrainedModel:
    """The policy, float32, in eval mode."""
    if sizes.model is not None:
        return load_policy(sizes.model, dtype=torch.float32)
    torch.manual_seed(sizes.seed)
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.hidden // 32),
        num_key_value_heads=max(1, sizes.hidden // 64),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(default_device()).eval()


def random_ids(sizes: Sizes, *shape: int) -> torch.Tensor:
    """Ids of words, always the same: 0 pads and 1 ends, so neither is among them."""
    draw = torch.Generator().manual_seed(sizes.seed)
    return torch.randint(2, sizes.vocab, shape, generator=draw).to(default_device())


def now() -> float:
    """Seconds: of the device's clock where there is a GPU, of this process where it has one thread."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
