"""How fast guided decoding is: plain `generate`, guided, the floor under it, and the naive way.

- `plain`: `generate` without guidance.
- `guided`: [`~lenvm_rl.decoding.generate_guided`] with `candidates` candidates and a length value model of the policy's
  size: the policy's own decoder under a new head.
- `floor`: per token one forward of the policy for one token and one of the length value model for all candidates, both
  on their caches, with nothing around them: no sampling, no candidate rule, no cache to keep.
- `naive`: per token the policy's forward, and a forward of every candidate as a complete row.

Time is per token of a row, at prefixes of `prefix` tokens: the prompt is that long less half of the tokens generated,
and the time to read it is taken off. Memory is the most that was taken beyond the two models.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from eval.measurement import (
    Measurement,
    add_settings,
    measure_in_process,
    read_settings,
    report,
    resident_peak,
    setting,
)
from eval.speed_pretraining import Settings as PretrainingSettings
from eval.speed_pretraining import make_policy
from lenvm_rl.decoding.generation import LengthGuidance, generate_guided
from lenvm_rl.decoding.scoring import CandidateScorer, FullRowScorer
from lenvm_rl.modeling.backbones import load_model
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.programs import run_program

CASES = ("plain", "guided", "floor", "naive")
TITLES = {
    "plain": "generate, not guided",
    "guided": "generate_guided",
    "floor": "two bare forwards",
    "naive": "every candidate as a row",
}
GAMMA = 0.98


@dataclass
class Settings:
    """What is measured. Without `model`, a Llama with random weights."""

    model: str = setting("", "A policy, folder or hub id; without one, a Llama with random weights of the sizes here.")
    hidden: int = setting(128, "Hidden size.")
    layers: int = setting(4, "Layers.")
    vocab: int = setting(8192, "Tokens of the vocabulary.")
    candidates: int = setting(15, "Candidates that a guided step scores.")
    prefix: int = setting(256, "Tokens that stand before what is timed.")
    tokens: int = setting(32, "Tokens that are generated.")
    naive_tokens: int = setting(4, "Tokens that the naive way is timed over.")
    rows: int = setting(1, "Rows of a batch; several numbers are measured one after the other.")
    repeats: int = setting(3, "Timings, of which the best counts.")
    threads: int = setting(1, "Threads of the processor.")
    seed: int = setting(0, "Seed of weights and data.")


def load_models(settings: Settings) -> tuple[PreTrainedModel, LengthValueModel]:
    """The policy, and a length value model of its size."""
    if settings.model:
        policy = load_model(AutoModelForCausalLM.from_pretrained, settings.model, dtype="float32").eval()
    else:
        shape = {name: getattr(settings, name) for name in ("hidden", "layers", "vocab", "seed")}
        policy = make_policy(PretrainingSettings(**shape)).eval()
    return policy, LengthValueModel.from_backbone(policy, gamma=GAMMA).freeze()


def make_prompts(settings: Settings, vocab: int) -> torch.Tensor:
    """Random prompts `(rows, prefix - tokens // 2)`."""
    draw = torch.Generator().manual_seed(settings.seed)
    width = settings.prefix - settings.tokens // 2
    return torch.randint(5, vocab, (settings.rows, width), generator=draw)


def read_prefix(settings: Settings, policy: PreTrainedModel) -> tuple[torch.Tensor, Cache]:
    """Random ids `(rows, prefix)`, and the policy's cache of them."""
    draw = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(5, policy.config.vocab_size, (settings.rows, settings.prefix), generator=draw)
    return ids, policy(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def time_generation(settings: Settings, policy: PreTrainedModel, value: LengthValueModel, guided: bool) -> float:
    """Seconds per generated token of a row: a long generation less one of a single token, the best of `repeats`."""
    prompts = make_prompts(settings, policy.config.vocab_size)
    guidance = LengthGuidance(strength=1.0 if guided else 0.0, top_k=settings.candidates)

    def seconds(tokens: int) -> float:
        torch.manual_seed(settings.seed)
        start = time.perf_counter()
        # Rows that ended would be cheaper.
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        mask = torch.ones_like(prompts)
        inputs = {"input_ids": prompts, "attention_mask": mask}
        if guided:
            generate_guided(policy, value, inputs, guidance, **length)
        else:
            policy.generate(**inputs, do_sample=True, top_k=settings.candidates, **length)
        return time.perf_counter() - start

    seconds(2)
    return min((seconds(settings.tokens + 1) - seconds(1)) / settings.tokens for _ in range(settings.repeats))


@torch.no_grad()
def time_floor(settings: Settings, policy: PreTrainedModel, value: LengthValueModel) -> float:
    """Seconds per token of the two forwards alone, on caches of `prefix` tokens."""
    ids, policy_cache = read_prefix(settings, policy)
    cache = value(input_ids=ids, use_cache=True).past_key_values
    k, prefix = settings.candidates, settings.prefix
    seen = torch.cat([torch.ones(k, prefix), torch.eye(k)], dim=1).bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).expand(settings.rows, 1, -1, -1)
    positions = torch.full((settings.rows, k), prefix)
    candidates = ids[:, :1].expand(-1, k)
    times = []
    for _ in range(settings.repeats * settings.tokens):
        start = time.perf_counter()
        policy(input_ids=ids[:, :1], past_key_values=policy_cache, use_cache=True)
        value(input_ids=candidates, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - start)
        policy_cache.crop(-1)
        cache.crop(-k)
    return sum(sorted(times)[: settings.tokens]) / settings.tokens


@torch.no_grad()
def time_naive(settings: Settings, policy: PreTrainedModel, value: LengthValueModel) -> float:
    """Seconds per token when every candidate is a complete row."""
    ids, cache = read_prefix(settings, policy)
    scorer = FullRowScorer(value)
    scorer.start(ids, torch.ones_like(ids))
    start = time.perf_counter()
    for _ in range(settings.naive_tokens):
        logits = policy(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits[:, -1]
        candidates = logits.topk(settings.candidates, dim=1).indices
        scorer.score(candidates, torch.ones_like(candidates))
        scorer.advance(candidates[:, 0], torch.ones(settings.rows))
    return (time.perf_counter() - start) / settings.naive_tokens


def cache_bytes(settings: Settings, value: LengthValueModel, candidates: int) -> int:
    """Bytes that the keys and values of the length value model take after `tokens` steps with so many candidates."""
    prompts = make_prompts(settings, value.config.get_text_config().vocab_size)
    scorer = CandidateScorer(value)
    scorer.start(prompts, torch.ones_like(prompts))
    for step in range(settings.tokens // 2):
        ids = (torch.arange(candidates) + 5 + step).expand(settings.rows, -1)
        scorer.score(ids, torch.ones_like(ids))
        scorer.advance(ids[:, 0], torch.ones(settings.rows))
    return scorer.cache_bytes()


def measure(case: str, settings: Settings) -> Measurement:
    """One of the cases, in this process."""
    torch.set_num_threads(settings.threads)
    policy, value = load_models(settings)
    if case.startswith("cache_"):
        size = cache_bytes(settings, value, int(case.removeprefix("cache_")))
        return Measurement(1, settings.rows, 1.0, 1, size)
    before = resident_peak()
    if case == "naive":
        seconds = time_naive(settings, policy, value)
    elif case == "floor":
        seconds = time_floor(settings, policy, value)
    else:
        seconds = time_generation(settings, policy, value, guided=case == "guided")
    return Measurement(1, settings.rows, seconds, 1, resident_peak() - before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of [`Settings`]; several numbers of rows are measured one after the other."""
    add_settings(parser, Settings, rows=[1, 8])


def print_measurements(measured: dict[str, Measurement], settings: Settings, console: Console) -> dict[str, float]:
    """Prints the table, and what was asked for beside what was measured; returns the latter."""
    what = settings.model or f"Llama, hidden size {settings.hidden}, {settings.layers} layers"
    table = Table(
        "what",
        title=f"guided decoding: {what}; {settings.rows} row(s), {settings.candidates} candidates, prefix of "
        f"{settings.prefix} tokens, {settings.threads} thread(s)",
    )
    for column in ("ms per token of a row", "over the floor", "peak memory, MiB"):
        table.add_column(column, justify="right")
    floor = measured["floor"].seconds
    for case in CASES:
        seconds = measured[case].seconds
        memory = f"{measured[case].peak_bytes / 2**20:.0f}"
        table.add_row(TITLES[case], f"{1e3 * seconds:.1f}", f"{seconds / floor:.2f}", memory)
    console.print(table)
    small, large = (measured[f"cache_{k}"].peak_bytes for k in (1, settings.candidates))
    asked = {
        "time over the floor's": (measured["guided"].seconds / floor, "<=", 1.15),
        "naive time over this": (measured["naive"].seconds / measured["guided"].seconds, ">=", 8.0),
        f"cache with {settings.candidates} candidates over that with 1": (large / small, "<=", 1.0),
    }
    for name, (value, sign, bound) in asked.items():
        met = value <= bound if sign == "<=" else value >= bound
        console.print(f"{name}: {value:.2f} (asked {sign} {bound}: {'met' if met else 'not met'})")
    return {name: value for name, (value, _, _) in asked.items()}


def run(args: argparse.Namespace) -> None:
    """Measures every case in a process of its own and prints them."""
    for rows in args.rows:
        settings = replace(read_settings(args, Settings), rows=rows)
        cases = (*CASES, "cache_1", f"cache_{settings.candidates}")
        given = {name: value for name, value in asdict(settings).items() if value != ""}
        measured = {case: measure_in_process(__name__, {"case": case, **given}) for case in cases}
        print_measurements(measured, settings, Console(width=120))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures one case and reports it as a line of JSON.")
    parser.add_argument("--case", required=True)
    add_arguments(parser)
    arguments = parser.parse_args()
    settings = replace(read_settings(arguments, Settings), rows=arguments.rows[0])
    run_program(lambda: report(measure(arguments.case, settings)))
