"""The arms of `eval.tradeoff`: the base policy, what can be had from it without training, and trained policies."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from eval.arms import Arm, Sampler, SampleStore, value_scale
from eval.datasets import sandbox_prompts
from eval.style_frontier import StyleFrontier, measure_points
from eval.tradeoff.arguments import Comparison, TradeoffArguments, check_data
from eval.tradeoff.divergence import policy_divergence
from lenvm_rl.decoding.generation import LengthGuidance
from lenvm_rl.modeling.loading import has_tokenizer, load_length_value_model, load_policy, load_tokenizer
from lenvm_rl.reward_functions import check_columns, load_reward
from lenvm_rl.sandbox import clean_length, read_completion
from lenvm_rl.tokenization import check_same_tokenizer, tokenize_prompts

logger = logging.getLogger(__name__)

# Prompts that the style frontier is measured on, 8 completions each.
FRONTIER_PROMPTS = 480


def make_sampler(comparison: Comparison, output_dir: Path) -> Sampler:
    """The sampler of the base policy's arms: models, prompts and reward, checked against each other.

    Raises:
        ValueError: see [`~eval.tradeoff.arguments.check_data`]; tokenizers differ, or the reward function needs a
            column that is not there.
    """
    args = comparison.args
    tokenizer = load_tokenizer(args.policy, comparison.pad_token)
    check_data(args, tokenizer)
    reward = load_reward(args.reward)
    check_columns(reward, comparison.columns, args.dataset_name or "the sandbox")
    model = load_length_value_model(args.length_value_model, args.base or args.policy, tokenizer=tokenizer)
    return Sampler(
        tokenizer=tokenizer,
        length_value_model=model,
        prompts=comparison.prompts,
        columns=comparison.columns,
        reward=reward,
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        guidance=LengthGuidance(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p),
        seed=args.seed,
        kept=SampleStore(output_dir / "samples"),
    )


def collect_arms(comparison: Comparison, output_dir: Path) -> tuple[list[Arm], float, StyleFrontier | None]:
    """Sample every arm. Returns them with the unit of the tilt's strengths and, on the sandbox, the style frontier.

    What is sampled is kept in `samples/` of the folder, so that an interrupted comparison goes on where it was.
    """
    args = comparison.args
    sampler = make_sampler(comparison, output_dir)
    # Before hours of sampling, not in their middle.
    of_trained = {name: trained_sampler(sampler, name, path) for name, path in comparison.trained.items()}
    base = load_policy(args.policy)
    arms = [sampler.sample("base", "base", base)]
    unit = tilt_unit(sampler, arms[0])
    arms += base_arms(sampler, base, arms[0], args)
    frontier = fit_frontier(sampler, base) if comparison.difficulties is not None else None
    for strength in args.strengths if "base" in args.tilt else ():
        arms.append(sampler.sample(f"tilt {strength:+g}", "tilt", base, strength * unit))
    for name, own in of_trained.items():
        policy = load_policy(comparison.trained[name])
        arms.append(measure_trained(own, own.sample(name, "trained", policy), policy, base, sampler))
        for strength in args.strengths if name in args.tilt else ():
            arm = own.sample(f"{name} tilt {strength:+g}", f"tilt of {name}", policy, strength * unit)
            arms.append(measure_trained(own, arm, policy, base, sampler))
    return arms, unit, frontier


def trained_sampler(sampler: Sampler, name: str, path: str) -> Sampler:
    """The sampler of a trained policy, which reads messages through its own tokenizer's chat template.

    Raises:
        ValueError: its vocabulary is another than the base policy's.
    """
    if not has_tokenizer(path):
        logger.info("%s: no tokenizer lies there, so the base policy's is taken", path)
        return sampler
    tokenizer = load_tokenizer(path)
    check_same_tokenizer(tokenizer, sampler.tokenizer, f"the trained policy {name!r}", "the base policy")
    return replace(sampler, tokenizer=tokenizer)


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
        graded=base.is_graded[picked],
    )


def measure_trained(
    sampler: Sampler, arm: Arm, policy: PreTrainedModel, base: PreTrainedModel, of_base: Sampler | None = None
) -> Arm:
    """The arm of a trained policy, tilted or not, with its divergence from the base policy.

    Untilted, the exact divergence of both policies at the states that its completions visit. Tilted, the divergence of
    the tilt from the trained policy, which the arm has, plus the log-ratio of trained and base policy at the sampled
    tokens: ``log p'/p + log p/q``. See [`~eval.tradeoff.divergence.policy_divergence`] on the candidate rule.

    Args:
        sampler ([`~eval.arms.Sampler`]): of the trained policy.
        arm ([`~eval.arms.Arm`]): sampled by it.
        policy (`PreTrainedModel`), base (`PreTrainedModel`): both policies.
        of_base ([`~eval.arms.Sampler`], *optional*): of the base policy, if that is asked in other words.
    """
    temperature = sampler.guidance.temperature
    if temperature == 0:
        return replace(arm, kl=None)

    def prompts_of(own: Sampler) -> list[list[int]]:
        ids = tokenize_prompts(own.tokenizer, own.prompts)
        return [ids[index] for index in arm.prompt]

    prompts, reference = prompts_of(sampler), prompts_of(of_base or sampler)
    tilted = arm.kind != "trained"
    found = policy_divergence(policy, base, prompts, arm.completions, temperature, reference, sampled=tilted)
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
