"""How fast guided decoding is: plain `generate`, guided, and the floor under it.

- `plain`: `generate` without guidance.
- `guided`: [`~lenvm_rl.decoding.generate_guided`] with `candidates` candidates and a length value model of the policy's
  size: the policy's own decoder under a new head.
- `floor`: per token one forward of the policy for one token and one of the length value model for all candidates, both
  on their caches, with nothing around them: no sampling, no candidate rule, no cache to keep.

Tokens of all rows count, at prefixes of `prefix` tokens: the prompt is that long less half of the tokens generated,
and the time to read it is taken off.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

from eval.speed.harness import GAMMA, Measurement, Program, Sizes, make_policy, now, random_ids
from lenvm_rl.decoding.generation import LengthGuidance, generate_guided
from lenvm_rl.modeling.length_value_model import LengthValueModel

CASES = {"plain": "generate, not guided", "guided": "generate_guided", "floor": "two bare forwards"}


@dataclass
class DecodingSizes(Sizes):
    """A policy, a length value model of its size, and random prompts."""

    candidates: int = HfArg(default=15, help="Candidates that a guided step scores.")
    prefix: int = HfArg(default=256, help="Tokens that stand before what is timed.")
    tokens: int = HfArg(default=32, help="Tokens that are generated.")
    rows: int = HfArg(default=1, help="Rows of a batch.")


def time_generation(sizes: DecodingSizes, policy: PreTrainedModel, value: LengthValueModel, guided: bool) -> float:
    """Seconds per step: a long generation less one of a single token."""
    prompts = random_ids(sizes, sizes.rows, sizes.prefix - sizes.tokens // 2)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    guidance = LengthGuidance(strength=1.0, top_k=sizes.candidates)

    def seconds(tokens: int) -> float:
        torch.manual_seed(sizes.seed)
        start = now()
        # Rows that ended would be cheaper.
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        if guided:
            generate_guided(policy, value, inputs, guidance, **length)
        else:
            policy.generate(**inputs, do_sample=True, top_k=sizes.candidates, **length)
        return now() - start

    seconds(2)
    return (seconds(sizes.tokens + 1) - seconds(1)) / sizes.tokens


@torch.no_grad()
def time_floor(sizes: DecodingSizes, policy: PreTrainedModel, value: LengthValueModel, rows: int) -> float:
    """Seconds per step of the two forwards alone, on caches of `prefix` tokens; the median of the steps."""
    ids = random_ids(sizes, rows, sizes.prefix)
    policy_cache = policy(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    cache = value(input_ids=ids, use_cache=True).past_key_values
    k, prefix = sizes.candidates, sizes.prefix
    seen = torch.cat([torch.ones(k, prefix), torch.eye(k)], dim=1).bool()
    mask = torch.zeros(seen.shape, dtype=policy.dtype).masked_fill(~seen, torch.finfo(policy.dtype).min)
    mask = mask.expand(rows, 1, -1, -1).to(ids.device)
    positions = torch.full((rows, k), prefix, device=ids.device)
    candidates = ids[:, :1].expand(-1, k)
    times = []
    for _ in range(sizes.tokens):
        start = now()
        policy(input_ids=ids[:, :1], past_key_values=policy_cache, use_cache=True)
        value(input_ids=candidates, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        times.append(now() - start)
        policy_cache.crop(-1)
        cache.crop(-k)
    return median(times)


def measure_decoding(case: str, sizes: DecodingSizes) -> Measurement:
    """One of the cases, in this process."""
    policy = make_policy(sizes)
    value = LengthValueModel.from_backbone(policy, gamma=GAMMA).freeze()
    if case == "floor":
        seconds = time_floor(sizes, policy, value, sizes.rows)
    else:
        seconds = time_generation(sizes, policy, value, guided=case == "guided")
    return Measurement(sizes.rows, seconds)


BASELINES = {"time over bare forwards": "floor", "over plain": "plain"}
DECODING = Program("decoding", __doc__, DecodingSizes, CASES, measure_decoding, BASELINES)
