"""How fast recipes/sample_rollouts.py samples: `--backend vllm` beside transformers, for the same prompts.

Each of both in float32 and in bfloat16, the completions as long as the policy writes them, `batch` of them under way at
once. Tokens of completions count, their ends included, over the time to sample all of them, prompts read. Loading is
not in it, and stands beside it in seconds by the clock: vLLM's is the longer one. Run it with the Python of an
environment that has vLLM (`make test-vllm` makes `.venv-vllm`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from transformers import GenerationConfig
from transformers.hf_argparser import HfArg

from eval.engine import engine_in_process
from eval.report import Column
from eval.speed.harness import Measurement, Program, Sizes, now
from lenvm_rl.endings import end_token_ids
from lenvm_rl.modeling.loading import load_policy, load_tokenizer
from lenvm_rl.rollouts.job import SamplingJob, SamplingSettings
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.vllm import VLLMJob
from lenvm_rl.tokenization import as_chats, load_prompts

CASES = {
    "transformers": "transformers, float32",
    "vllm": "vLLM, float32",
    "transformers_half": "transformers, bfloat16",
    "vllm_half": "vLLM, bfloat16",
}


@dataclass
class RolloutSizes(Sizes):
    """Who samples, from which prompts, and how much."""

    dataset_name: str | None = HfArg(default=None, help="A file or hub id of prompts, column prompt.")
    chat: bool = HfArg(default=False, help="Wrap text prompts as a user's message.")
    prompts: int = HfArg(default=32, help="The first so many prompts, a completion of each.")
    batch: int = HfArg(default=32, help="Completions under way at once.")
    tokens: int = HfArg(default=128, help="Most tokens of a completion.")
    temperature: float = HfArg(default=0.7, help="Temperature of the sampling.")
    context: int = HfArg(default=1536, help="vLLM: tokens of the longest prompt with its completion (max_model_len).")

    def __post_init__(self) -> None:
        if self.model is None or self.dataset_name is None:
            raise ValueError("Give --model, a folder of a policy with its tokenizer, and --dataset_name, its prompts.")


def make_job(case: str, sizes: RolloutSizes) -> SamplingJob:
    """The job that the recipe makes, and what it samples with, loaded."""
    backend, _, half = case.partition("_")
    dtype = "bfloat16" if half else "float32"
    tokenizer = load_tokenizer(sizes.model)
    texts = load_prompts(sizes.dataset_name, None, "train", sizes.prompts)["prompt"][:]
    prompts = as_chats(texts) if sizes.chat else texts
    settings = SamplingSettings(1, sizes.tokens, sizes.batch, sizes.temperature)
    if backend == "transformers":
        return TransformersJob(load_policy(sizes.model, dtype=dtype), tokenizer, prompts, settings, seed=sizes.seed)
    engine_in_process()
    engine = {"dtype": dtype, "max_model_len": sizes.context, "max_num_seqs": sizes.batch}
    ends = end_token_ids(tokenizer, GenerationConfig.from_pretrained(sizes.model))
    job = VLLMJob(sizes.model, tokenizer, prompts, settings, engine, seed=sizes.seed, eos_token_ids=ends)
    job.prepare()
    return job


def measure_rollouts(case: str, sizes: RolloutSizes) -> Measurement:
    """One of the cases, in this process."""
    began = time.perf_counter()
    job = make_job(case, sizes)
    loaded = time.perf_counter() - began
    start = now()
    steps = list(job.sample(range(len(job.step_sizes()))))
    tokens = sum(len(record["completion_ids"]) for _, records in steps for record in records)
    return Measurement(tokens, now() - start, loaded)


ROLLOUTS = Program(
    "rollouts",
    __doc__,
    RolloutSizes,
    CASES,
    measure_rollouts,
    {
        "time over vLLM": {"transformers": "vllm", "transformers_half": "vllm_half"},
        "over float32": {"transformers_half": "transformers", "vllm_half": "vllm"},
    },
    [Column("to load, s", "count", 1)],
)
