"""The arms of `eval.tradeoff`: the base policy, what can be had from it without training, and trained policies."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eval.arms import Arm, Sampler, load_length_value_model, load_reward, value_scale
from eval.datasets import sandbox_prompts
from eval.style_frontier import StyleFrontier, measure_points
from eval.tradeoff_arguments import Comparison, TradeoffArguments
from eval.tradeoff_kl import policy_divergence
from lenvm_rl.decoding import LengthGuidance
from lenvm_rl.sampling_jobs import tokenize_prompts
from lenvm_rl.sandbox import clean_length, read_completion

logger = logging.getLogger(__name__)

# Prompts that the style frontier is measured on, 8 completions each.
FRONTIER_PROMPTS = 480


def collect_arms(comparison: Comparison) -> tuple[list[Arm], float, StyleFrontier | None]:
    """Sample every arm. Returns them with the unit of the tilt's strengths and, on the sandbox, the style frontier."""
    args = comparison.args
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    if comparison.pad_token is not None:
        tokenizer.pad_token = comparison.pad_token
    policies = {"base": args.policy, **comparison.trained}
    sampler = Sampler(
        tokenizer=tokenizer,
        length_value_model=load_length_value_model(args.length_value_model, args.policy).to(device),
        prompts=comparison.prompts,
        columns=comparison.columns,
        reward=load_reward(args.reward),
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        guidance=LengthGuidance(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p),
        seed=args.seed,
    )
    arms: list[Arm] = []
    unit, frontier = 0.0, None
    for name, path in policies.items():
        policy = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
        if name == "base":
            base = policy
            arms.append(sampler.sample(name, "base", policy))
            unit = tilt_unit(sampler, arms[0])
            arms += base_arms(sampler, base, arms[0], args)
            frontier = fit_frontier(sampler, policy) if comparison.difficulties is not None else None
        else:
            arms.append(measure_trained(sampler, sampler.sample(name, "trained", policy), policy, base))
        for strength in args.strengths if name in args.tilt else ():
            title = f"tilt {strength:+g}" if name == "base" else f"{name} tilt {strength:+g}"
            kind = "tilt" if name == "base" else f"tilt of {name}"
            arm = sampler.sample(title, kind, policy, strength * unit)
            arms.append(arm if name == "base" else measure_trained(sampler, arm, policy, base))
    return arms, unit, frontier


def base_arms(sampler: Sampler, policy: PreTrainedModel, base: Arm, args: TradeoffArguments) -> list[Arm]:
    """What the base policy gives without a length value model: cut, asked for the same budgets, or chosen among."""
    budgets = {quantile: int(np.quantile(base.lengths, quantile)) for quantile in args.budget_quantiles}
    arms = [sampler.truncate(base, f"cut at q{quantile:g}", budget) for quantile, budget in budgets.items()]
    if args.prompt_only:
        for quantile, budget in budgets.items():
            request = args.budget_request.format(budget=max(1, budget))
            arms.append(ask(sampler, policy, f"asked for q{quantile:g}", request, max(1, budget)))
    return arms + [shortest_of(base, count) for count in args.best_of]


def ask(sampler: Sampler, policy: PreTrainedModel, name: str, request: str, budget: int) -> Arm:
    """The policy with a request appended to each prompt; its divergence is from the policy without it."""

    def appended(prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(prompt, str):
            return prompt + request
        return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + request}]

    asking = replace(sampler, prompts=[appended(prompt) for prompt in sampler.prompts])
    arm = asking.sample(name, "prompt", policy)
    kl = None
    if sampler.guidance.temperature > 0:
        with_request, without = (tokenize_prompts(each.tokenizer, each.prompts) for each in (asking, sampler))
        kl = policy_divergence(
            policy,
            policy,
            [with_request[index] for index in arm.prompt],
            arm.completions,
            sampler.guidance.temperature,
            reference_prompt_ids=[without[index] for index in arm.prompt],
        )
    return replace(arm, setting=float(budget), kl=kl)


def shortest_of(base: Arm, count: int) -> Arm:
    """The shortest finished one of every `count` samples of a prompt; where none finished, the first of them.

    The samples of a prompt are taken `count` at a time, so all of them serve. The divergence from the base policy is at
    most ``log n - (n - 1) / n`` (Beirami et al., 2024, arXiv 2401.01879),
    whatever is chosen by.
    """
    chosen, sampled = [], []
    for prompt in dict.fromkeys(base.prompt.tolist()):
        for block in np.flatnonzero(base.prompt == prompt).reshape(-1, count):
            finished = block[base.finished[block]]
            chosen.append(finished[base.lengths[finished].argmin()] if len(finished) else block[0])
            sampled.append(base.lengths[block].sum())
    picked = np.array(chosen)
    return Arm(
        name=f"shortest of {count}",
        kind="best_of",
        setting=float(count),
        completions=[base.completions[index] for index in chosen],
        lengths=base.lengths[picked],
        finished=base.finished[picked],
        correct=base.correct[picked],
        prompt=base.prompt[picked],
        kl_bound=math.log(count) - (count - 1) / count,
        sampled=np.array(sampled),
    )


def measure_trained(sampler: Sampler, arm: Arm, policy: PreTrainedModel, base: PreTrainedModel) -> Arm:
    """The arm of a trained policy, tilted or not, with its divergence from the base policy.

    Untilted, the exact divergence of both policies at the states that its completions visit. Tilted, the divergence of
    the tilt from the trained policy, which the arm has, plus the log-ratio of trained and base policy at the sampled
    tokens: ``log p'/p + log p/q``. See [`~eval.tradeoff_kl.policy_divergence`] on the candidate rule.
    """
    temperature = sampler.guidance.temperature
    if temperature == 0:
        return replace(arm, kl=None)
    prompt_ids = tokenize_prompts(sampler.tokenizer, sampler.prompts)
    prompts, tilted = [prompt_ids[index] for index in arm.prompt], arm.kind != "trained"
    found = policy_divergence(policy, base, prompts, arm.completions, temperature, sampled=tilted)
    return replace(arm, kl=arm.kl + found)


def tilt_unit(sampler: Sampler, base: Arm) -> float:
    """One over the standard deviation of V, over the states of some 256 completions of the base arm."""
    prompt_ids = tokenize_prompts(sampler.tokenizer, sampler.prompts)
    some = range(0, len(base.completions), max(1, len(base.completions) // 256))
    return 1.0 / value_scale(
        sampler.length_value_model,
        [prompt_ids[base.prompt[index]] for index in some],
        [base.completions[index] for index in some],
    )


def fit_frontier(sampler: Sampler, policy: PreTrainedModel) -> StyleFrontier | None:
    """The style frontier of the sandbox's base policy, under the same candidate rule as every arm.

    From completions without detours on *validation* prompts: picking the best style on the evaluation prompts
    themselves would flatter it. `None` if the policy writes no readable style at some difficulty (a smoke run's).
    """
    data = sandbox_prompts(FRONTIER_PROMPTS, "validation")
    sampler = replace(sampler, prompts=data.prompts, columns=data.columns, num_samples=8)
    found = sampler.sample("frontier", "base", policy)
    rows = []
    for ids, right, prompt in zip(found.completions, found.correct, found.prompt, strict=True):
        reading = read_completion(sampler.tokenizer.convert_ids_to_tokens(ids))
        if reading.style != "mixed" and reading.detour_tokens == 0:
            difficulty = data.difficulties[prompt]
            rows.append((difficulty, reading.style, clean_length(difficulty, reading.style), right))
    missing = set(data.difficulties) - {row[0] for row in rows}
    if missing:
        logger.warning(
            "no style frontier: the policy writes no style without detours at difficulty %s", sorted(missing)
        )
        return None
    return StyleFrontier.from_points(measure_points(*zip(*rows, strict=True)))
