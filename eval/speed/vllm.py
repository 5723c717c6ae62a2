"""How fast length guidance is inside vLLM, beside plain vLLM, for requests that decode together.

- `plain`: no guidance.
- `exact`: every one of `candidates` candidates is scored, at every step.
- `min_p`: of these, only tokens with at least `min_p` of the most probable one's probability are candidates: as exact,
  for another candidate rule.
- `mass`: of these, the most probable that carry `mass` of the probability are scored, the others left as they are.
- `small`: as `min_p`, by a length value model with a quarter of the layers.
- `floor`: plain, and one bare forward of the length value model for `exact`'s candidates.

The length value model is of the policy's size: its decoder under a new head. Tokens of all requests count, from the
second on: the time to read prompts is taken off. Run it with the Python of an environment that has vLLM (`make
test-vllm` makes `.venv-vllm`).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.hf_argparser import HfArg

from eval.engine import PROCESSOR, engine_in_process
from eval.speed.harness import GAMMA, Measurement, Program, Sizes, make_policy, now
from lenvm_rl.decoding.requests import PREFIX
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.loading import load_tokenizer
from lenvm_rl.tokenization import as_chats

CASES = {
    "plain": "vLLM, not guided",
    "exact": "guided, all candidates",
    "min_p": "guided, min_p",
    "mass": "guided, candidate_mass",
    "small": "guided, min_p, a quarter of the layers",
    "floor": "plain and a bare forward",
}
PROMPTS = (
    "What is the capital of France?", "Write a short story about a dog.", "Explain why the sky is blue.",
    "List three fruits.", "What is 7 times 8?", "How do I boil an egg?", "Tell me about Rome.", "How to sleep well?",
)  # fmt: skip


@dataclass
class EngineSizes(Sizes):
    """A policy with a tokenizer and a chat template, and how requests are decoded."""

    candidates: int = HfArg(default=15, help="Candidates that are offered at every step (top-k).")
    min_p: float = HfArg(default=0.1, help="For the cases min_p and small.")
    mass: float = HfArg(default=0.9, help="For the case mass.")
    temperature: float = HfArg(default=0.7, help="Temperature of the sampling.")
    requests: int = HfArg(default=8, help="Requests that decode together.")
    tokens: int = HfArg(default=48, help="Tokens of each.")
    policy_dtype: str = HfArg(default="float32", help="Dtype of the policy.")
    value_dtype: str = HfArg(default="float32", help="Dtype of the length value model's decoder.")

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("Give --model, a folder of a policy with its tokenizer: `make smollm2` makes one.")


def save_length_value_model(sizes: Sizes, folder: Path, quarter: bool) -> str:
    """A length value model on the policy's decoder, or on a quarter of its layers; its values differ between states."""
    policy = make_policy(sizes)
    if quarter:
        layers = policy.config.num_hidden_layers // 4
        policy.model.layers = policy.model.layers[:layers]
        policy.config.num_hidden_layers = layers
    model = LengthValueModel.from_backbone(policy, gamma=GAMMA, tokenizer=load_tokenizer(sizes.model))
    nn.init.normal_(model.head.output.weight, std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def asked(case: str, sizes: EngineSizes) -> dict[str, Any] | None:
    """What a request of a case asks for."""
    if case in ("plain", "floor"):
        return None
    further = {"min_p": {"min_p": sizes.min_p}, "small": {"min_p": sizes.min_p}, "mass": {"candidate_mass": sizes.mass}}
    fields = {"strength": 1.0, "top_k": sizes.candidates, **further.get(case, {})}
    return {PREFIX + name: value for name, value in fields.items()}


@torch.no_grad()
def time_forward(sizes: EngineSizes, path: str) -> float:
    """Seconds of a forward of the length value model for all candidates of a step, by the kernels that vLLM has."""
    from lenvm_rl.decoding.vllm import use_kernels

    model = LengthValueModel.from_pretrained(path, dtype=sizes.value_dtype).freeze()
    if not torch.cuda.is_available():
        use_kernels(model.backbone)
    ids = torch.arange(sizes.requests * sizes.candidates)[None] + 100
    times = []
    for _ in range(6):
        start = now()
        model(ids)
        times.append(now() - start)
    return min(times)


def measure_engine(case: str, sizes: EngineSizes) -> Measurement:
    """One of the cases, in this process."""
    vllm = engine_in_process()
    with tempfile.TemporaryDirectory() as folder:
        path = save_length_value_model(sizes, Path(folder), quarter=case == "small")
        llm = vllm.LLM(
            sizes.model,
            dtype=sizes.policy_dtype,
            max_model_len=512,
            enforce_eager=True,
            generation_config="vllm",
            max_num_seqs=sizes.requests,
            logits_processors=[PROCESSOR],
            additional_config={"length_value_model": path, "length_value_dtype": sizes.value_dtype},
        )
        bare = time_forward(sizes, path) if case == "floor" else 0.0
    extra = asked(case, sizes)
    chats = as_chats(PROMPTS[n % len(PROMPTS)] for n in range(sizes.requests))

    def seconds(tokens: int) -> float:
        options = {"temperature": sizes.temperature, "max_tokens": tokens, "min_tokens": tokens, "extra_args": extra}
        params = [vllm.SamplingParams(seed=sizes.seed + n, **options) for n in range(sizes.requests)]
        start = now()
        llm.chat(chats, params, use_tqdm=False)
        return now() - start

    seconds(2)
    first = seconds(1)
    whole = seconds(sizes.tokens + 1) - first + bare * sizes.tokens
    return Measurement(sizes.requests * sizes.tokens, whole)


ENGINE = Program(
    "vllm", __doc__, EngineSizes, CASES, measure_engine, {"time over plain": "plain", "over the floor": "floor"}
)
