"""How fast `lenvm_rl.serve` answers guided requests that are there at once, beside one after the other.

- `alone`: each request waits for the answer to the one before.
- `together`: all are there from the start.
- `floor_alone`, `floor_together`: per step one bare forward of the policy, for one row or for all of them, and one of
  the length value model for `candidates` candidates of each, with nothing around them.

The length value model is of the policy's size: its decoder under a random head. Requests are chats that go on for
`tokens` tokens, and are handed to the engine behind the server, not sent over HTTP. Tokens count from the second on:
the time to read prompts is taken off. `min_p` and `candidate_mass` leave candidates out, or unscored; the bare forwards
read `candidates` in any case.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.hf_argparser import HfArg

from eval.speed.decoding import DecodingSizes, time_floor
from eval.speed.harness import Measurement, Program, now
from eval.speed.vllm import PROMPTS, save_length_value_model

if TYPE_CHECKING:
    from lenvm_rl.serve.engine import Engine, Job

CASES = {
    "alone": "one after the other",
    "together": "all at once",
    "floor_alone": "bare forwards, one row",
    "floor_together": "bare forwards, all rows",
}


@dataclass
class ServingSizes(DecodingSizes):
    """A policy with a tokenizer and a chat template, and what requests ask for."""

    prefix: int = HfArg(default=64, help="Tokens that stand before what the bare forwards read.")
    rows: int = HfArg(default=8, help="Requests.")
    min_p: float | None = HfArg(default=None, help="Only candidates with so much of the most probable one's mass.")
    candidate_mass: float | None = HfArg(default=None, help="Only the most probable, with so much mass, are scored.")
    temperature: float = HfArg(default=0.7, help="Temperature of the sampling.")
    dtype: str = HfArg(default="float32", help="Dtype of both models.")

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("Give --model, a folder of a policy with its tokenizer: `make smollm2` makes one.")

    def body(self, number: int, tokens: int) -> bytes:
        """A request, as it comes over HTTP."""
        guidance = {"strength": 1.0, "top_k": self.candidates, "min_p": self.min_p}
        told = {
            "model": self.model,
            "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
            "length_guidance": guidance | {"candidate_mass": self.candidate_mass},
            "max_tokens": tokens,
            "temperature": self.temperature,
            "seed": self.seed + number,
        }
        return json.dumps(told).encode()


def answer_all(engine: Engine, bodies: Sequence[bytes], together: bool) -> list[Job]:
    """Hands requests to an engine, each when the one before is answered unless they come together."""
    from lenvm_rl.serve.protocol import ChatRequest

    def ask(body: bytes) -> Future[Job]:
        return engine.submit(body, ChatRequest, lambda: None)

    if not together:
        return [ask(body).result().future.result() for body in bodies]
    jobs = [each.result() for each in map(ask, bodies)]
    return [job.future.result() for job in jobs]


def time_answers(engine: Engine, sizes: ServingSizes, together: bool) -> Measurement:
    """All requests, less the time that answers of one token take."""
    # No token that is ever drawn, so that all go on.
    engine.eos_token_ids = engine.decoder.end_ids = [engine.vocab_size - 1]

    def seconds(tokens: int) -> float:
        start = now()
        answer_all(engine, [sizes.body(number, tokens) for number in range(sizes.rows)], together)
        return now() - start

    seconds(2)
    first = seconds(1)
    return Measurement(sizes.rows * sizes.tokens, seconds(sizes.tokens + 1) - first)


def measure_serving(case: str, sizes: ServingSizes) -> Measurement:
    """One of the cases, in this process."""
    # Of an extra of its own, which the other programs do without.
    from lenvm_rl.serve.app import ServeArguments, load_engine

    kind, _, how = case.rpartition("_")
    with tempfile.TemporaryDirectory() as folder:
        path = save_length_value_model(sizes, Path(folder), quarter=False)
        engine = load_engine(ServeArguments(sizes.model, path, dtype=sizes.dtype))
    try:
        if kind != "floor":
            return time_answers(engine, sizes, together=how == "together")
        rows = sizes.rows if how == "together" else 1
        decoder = engine.decoder
        return Measurement(rows, time_floor(sizes, decoder.policy.model, decoder.length_value_model, rows))
    finally:
        engine.close()


SERVING = Program(
    "serving",
    __doc__,
    ServingSizes,
    CASES,
    measure_serving,
    {
        "time over all at once": {"alone": "together", "floor_alone": "floor_together"},
        "over bare forwards": {"alone": "floor_alone", "together": "floor_together"},
    },
)
