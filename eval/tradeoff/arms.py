"""The arms of `eval.tradeoff`: the base policy, what can be had from it without training, and trained policies.

A kind of arm is an entry of [`KINDS`], with the function that makes its arms and how it is drawn. What it is told on
the command line is a field of [`TradeoffArguments`].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from eval.engine import VLLM, SamplingArguments
from eval.graded import TASKS, EvaluationPrompts, GradedArguments, find_reward
from eval.runs import RecipeRun
from eval.style_frontier import StyleFrontier, fit_frontier
from eval.tradeoff.budgets import Grade, budget_curves
from eval.tradeoff.sampler import Arm, Sampler, SampleStore, policy_divergence, value_scale
from lenvm_rl.modeling.loading import has_tokenizer, load_length_value_model, load_policy, load_tokenizer
from lenvm_rl.tokenization import check_same_tokenizer, tokenize_prompts

logger = logging.getLogger(__name__)


@dataclass
class TradeoffArguments(GradedArguments, SamplingArguments):
    """What to compare, on which prompts, and where to write it."""

    trained: list[str] = HfArg(
        default_factory=list, help="Trained policies as NAME=PATH. Default: all that the run lists."
    )
    tilt: list[str] = HfArg(
        default_factory=lambda: ["base"], help="Policies whose decoding is tilted: 'base' and names of trained ones."
    )
    num_prompts: int = HfArg(default=320, help="Evaluation prompts: the first so many of the dataset.")
    num_samples: int = HfArg(default=4, help="Completions per prompt and arm.")
    strengths: list[float] = HfArg(
        default_factory=lambda: [0.25, 0.5, 1.0, 2.0],
        help="Tilt strengths in units of 1/std(V), the spread of values over the base completions.",
    )
    budget_quantiles: list[float] = HfArg(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.85, 0.95],
        help="Hard limits, as quantiles of the base policy's lengths.",
    )
    prompt_only: bool | None = HfArg(
        default=None, help="Ask for the same budgets in the prompt. Default: for a task that is not the sandbox."
    )
    budget_request: str = HfArg(
        default="\n\nAnswer in at most {budget} tokens.",
        help="What is appended to the prompt (to its last message) for that; {budget} is the number.",
    )
    best_of: list[int] | None = HfArg(
        default=None,
        help="Shortest finished of n samples, for each n: divisors of num_samples. Default: 2, 4 and 8 where they are, "
        "for a task that is not the sandbox, else none.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= quantile <= 1 for quantile in self.budget_quantiles):
            raise ValueError(f"budget_quantiles must lie in [0, 1], got {self.budget_quantiles}.")
        if not all("=" in entry for entry in self.trained):
            raise ValueError(f"trained takes NAME=PATH, got {self.trained}.")
        if self.prompt_only and self.dataset_name is None:
            raise ValueError("The sandbox's policies read no words, so prompt_only means nothing there: leave it out.")
        if self.backend == VLLM and self.trained:
            raise ValueError("trained: vLLM samples one policy in a process; name a trained one as --policy.")
        if "{budget}" not in self.budget_request:
            raise ValueError(f"budget_request must hold {{budget}}, got {self.budget_request!r}.")
        if not all(count > 1 and self.num_samples % count == 0 for count in self.best_of or ()):
            raise ValueError(
                f"best_of chooses among the {self.num_samples} samples of a prompt: each must be a divisor of "
                f"num_samples above 1, got {self.best_of}."
            )

    def defaults(self, run: RecipeRun) -> dict[str, Any]:
        """Defaults by the task and the run, with the baselines that a task adds."""
        task = self.task in TASKS
        counts = [count for count in (2, 4, 8) if task and self.num_samples % count == 0]
        return {**super().defaults(run), "prompt_only": task, "best_of": counts}


@dataclass
class Comparison:
    """What arms are made of: arguments, the base policy and its sampler, and samplers and paths of trained policies."""

    args: TradeoffArguments
    sampler: Sampler
    policy: PreTrainedModel
    trained: dict[str, tuple[Sampler, str]]

    @cached_property
    def base(self) -> Arm:
        """The base policy's own completions."""
        return self.sampler.sample("base", "base", self.policy)

    @cached_property
    def unit(self) -> float:
        """Of a tilt's strength: one over the standard deviation of V, over the states of some 256 base completions."""
        ids, base = self.sampler.prompt_ids, self.base
        some = range(0, len(base.completions), max(1, len(base.completions) // 256))
        prompts, completions = [ids[base.prompt[index]] for index in some], [base.completions[index] for index in some]
        return 1.0 / value_scale(self.sampler.length_value_model, prompts, completions)

    @property
    def budgets(self) -> dict[float, int]:
        """The budget in tokens at each quantile of the base policy's lengths."""
        return {quantile: int(np.quantile(self.base.lengths, quantile)) for quantile in self.args.budget_quantiles}


def base_arms(comparison: Comparison) -> Iterator[Arm]:
    """The base policy itself."""
    yield comparison.base


def truncated_arms(comparison: Comparison) -> Iterator[Arm]:
    """The base policy's completions, cut off at each budget."""
    for quantile, budget in comparison.budgets.items():
        yield truncate(comparison.sampler, comparison.base, f"cut at q{quantile:g}", budget)


def truncate(sampler: Sampler, base: Arm, name: str, budget: int) -> Arm:
    """The base arm with every completion cut off after `budget` tokens: the baseline of a hard limit.

    A completion of exactly `budget` tokens still ends: lengths do not count the end-of-sequence token.
    """
    kept = base.lengths <= budget
    completions = [ids if whole else ids[:budget] for ids, whole in zip(base.completions, kept, strict=True)]
    correct, graded = sampler.grade(completions, base.prompt.tolist())
    lengths, finished = np.minimum(base.lengths, budget), base.finished & kept
    return Arm(name, "truncation", float(budget), completions, lengths, finished, correct, base.prompt, graded=graded)


def asked_arms(comparison: Comparison) -> Iterator[Arm]:
    """The base policy, asked for each budget in words."""
    for quantile, budget in comparison.budgets.items() if comparison.args.prompt_only else ():
        request = comparison.args.budget_request.format(budget=max(1, budget))
        yield ask(comparison.sampler, comparison.policy, f"asked for q{quantile:g}", request, max(1, budget))


def ask(sampler: Sampler, policy: PreTrainedModel, name: str, request: str, budget: int) -> Arm:
    """The policy with a request appended to each prompt; its divergence is from the policy without it, and not measured
    where an engine samples, so that it is there for all arms or for none."""
    asking = replace(sampler, prompts=[appended(prompt, request) for prompt in sampler.prompts])
    arm = asking.sample(name, "prompt", policy)
    kl, temperature = None, sampler.guidance.temperature
    if sampler.engine is not None:
        return replace(arm, setting=float(budget), kl=None)
    if temperature > 0:
        seen, without = ([each.prompt_ids[index] for index in arm.prompt] for each in (asking, sampler))
        kl = policy_divergence(policy, policy, seen, arm.completions, temperature, without)
    return replace(arm, setting=float(budget), kl=kl)


def appended(prompt: str | list[dict[str, Any]], request: str) -> str | list[dict[str, Any]]:
    """A prompt with a request at its end, or at the end of its last message."""
    if isinstance(prompt, str):
        return prompt + request
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + request}]


def chosen_arms(comparison: Comparison) -> Iterator[Arm]:
    """The shortest of several samples of the base policy."""
    for count in comparison.args.best_of:
        yield shortest_of(comparison.base, count)


def shortest_of(base: Arm, count: int) -> Arm:
    """The shortest finished one of every `count` samples of a prompt; where none finished, the first of them.

    The samples of a prompt are taken `count` at a time, so all of them serve. The divergence from the base policy is at
    most ``log n - (n - 1) / n`` (Beirami et al., 2024, arXiv 2401.01879), whatever is chosen by.
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
        kl_bound=math.log(count) - (count - 1) / count,
        sampled=np.array(sampled),
        graded=base.is_graded[picked],
        **{each: getattr(base, each)[picked] for each in ("lengths", "finished", "correct", "prompt")},
    )


def tilted_arms(comparison: Comparison) -> Iterator[Arm]:
    """The base policy, tilted by each strength."""
    for strength in comparison.args.strengths if "base" in comparison.args.tilt else ():
        yield comparison.sampler.sample(f"tilt {strength:+g}", "tilt", comparison.policy, strength * comparison.unit)


def trained_arms(comparison: Comparison) -> Iterator[Arm]:
    """Every trained policy and, where that is asked for, its tilts."""
    for name, (sampler, path) in comparison.trained.items():
        policy = load_policy(path)
        arm = sampler.sample(name, "trained", policy)
        yield measure_trained(sampler, arm, policy, comparison.policy, comparison.sampler)
        for strength in comparison.args.strengths if name in comparison.args.tilt else ():
            arm = sampler.sample(f"{name} tilt {strength:+g}", f"tilt of {name}", policy, strength * comparison.unit)
            yield measure_trained(sampler, arm, policy, comparison.policy, comparison.sampler)


def measure_trained(
    sampler: Sampler, arm: Arm, policy: PreTrainedModel, base: PreTrainedModel, of_base: Sampler | None = None
) -> Arm:
    """The arm of a trained policy, tilted or not, with its divergence from the base policy.

    Untilted, the exact divergence of both policies at the states that its completions visit. Tilted, the divergence of
    the tilt from the trained policy, which the arm has, plus the log-ratio of trained and base policy at the sampled
    tokens: ``log p'/p + log p/q``. See [`~eval.tradeoff.sampler.policy_divergence`] on the candidate rule. `of_base`
    is the sampler of the base policy, if that is asked in other words.
    """
    temperature = sampler.guidance.temperature
    if temperature == 0:
        return replace(arm, kl=None)
    prompts, reference = ([each.prompt_ids[index] for index in arm.prompt] for each in (sampler, of_base or sampler))
    tilted = arm.kind != "trained"
    found = policy_divergence(policy, base, prompts, arm.completions, temperature, reference, sampled=tilted)
    return replace(arm, kl=arm.kl + found)


@dataclass(frozen=True)
class ArmKind:
    """A kind of arm: what makes its arms, and how the figure shows them, joined by a line or not."""

    make: Callable[[Comparison], Iterator[Arm]]
    label: str
    color: str
    marker: str
    line: bool = True


# In the order of the table. Each trained policy has a colour of its own.
KINDS = {
    "base": ArmKind(base_arms, "base policy", "#000000", "D", line=False),
    "truncation": ArmKind(truncated_arms, "hard truncation", "#888888", "s"),
    "prompt": ArmKind(asked_arms, "budget in the prompt", "#17becf", "^"),
    "best_of": ArmKind(chosen_arms, "shortest of n", "#bcbd22", "v"),
    "tilt": ArmKind(tilted_arms, "tilted decoding", "#1f77b4", "o"),
    "trained": ArmKind(trained_arms, "trained", "", "*", line=False),
}


def collect_arms(
    args: TradeoffArguments, run: RecipeRun, data: EvaluationPrompts, output_dir: Path
) -> tuple[list[Arm], float, StyleFrontier | None, dict[str, Any]]:
    """Sample every arm. Returns them with the unit of the tilt's strengths, on the sandbox the style frontier, and the
    accuracies within token budgets.

    What is sampled is kept in `samples/` of the folder, so that an interrupted comparison goes on where it was. What
    cannot be compared is refused before anything is sampled, not in the middle of hours.
    """
    sampler = make_sampler(args, run, data, output_dir)
    trained = {name: (trained_sampler(sampler, name, path), path) for name, path in find_trained(args, run).items()}
    comparison = Comparison(args, sampler, load_policy(args.policy), trained)
    unit = comparison.unit
    arms = [arm for kind in KINDS.values() for arm in kind.make(comparison)]
    frontier = fit_frontier(sampler, comparison.policy) if data.difficulties is not None else None

    def grader(arm: Arm) -> Grade:
        # Of several samples one was chosen, so that fewer are side by side.
        return replace(sampler, num_samples=len(arm.lengths) // len(data.prompts)).grade

    return arms, unit, frontier, budget_curves(arms, grader, args.seed)


def make_sampler(args: TradeoffArguments, run: RecipeRun, data: EvaluationPrompts, output_dir: Path) -> Sampler:
    """The sampler of the base policy's arms: models, prompts and reward, checked against each other."""
    tokenizer = load_tokenizer(args.policy, run.data.get("pad_token"))
    reward = find_reward(args, tokenizer, data)
    return Sampler(
        tokenizer=tokenizer,
        length_value_model=load_length_value_model(
            args.length_value_model, args.base or args.policy, tokenizer=tokenizer
        ),
        prompts=data.prompts,
        columns=data.columns,
        reward=reward,
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        guidance=args.candidates,
        seed=args.seed,
        kept=SampleStore(output_dir / "samples"),
        engine=args.make_engine(lambda: longest_row(args, tokenizer, data)),
    )


def longest_row(args: TradeoffArguments, tokenizer: PreTrainedTokenizerBase, data: EvaluationPrompts) -> int:
    """Tokens of the longest prompt, with a request where there are any, and of a completion."""
    # A request for the largest budget has the most digits.
    request = args.budget_request.format(budget=args.max_new_tokens) if args.prompt_only else ""
    prompts = tokenize_prompts(tokenizer, [appended(prompt, request) for prompt in data.prompts])
    return max(map(len, prompts)) + args.max_new_tokens


def find_trained(args: TradeoffArguments, run: RecipeRun) -> dict[str, str]:
    """Name and path of every trained policy, of which `tilt` names some."""
    trained = dict(entry.split("=", 1) for entry in args.trained) or run.trained
    if args.backend == VLLM and trained:
        logger.info("trained policies are left out, for vLLM samples one policy in a process")
        trained = {}
    unknown = set(args.tilt) - {"base", *trained}
    if unknown:
        raise ValueError(f"tilt names {sorted(unknown)}, but there are only 'base' and {sorted(trained)}.")
    return trained


def trained_sampler(sampler: Sampler, name: str, path: str) -> Sampler:
    """The sampler of a trained policy, which reads messages through its own tokenizer's chat template."""
    if not has_tokenizer(path):
        logger.info("%s: no tokenizer lies there, so the base policy's is taken", path)
        return sampler
    tokenizer = load_tokenizer(path)
    check_same_tokenizer(tokenizer, sampler.tokenizer, f"the trained policy {name!r}", "the base policy")
    return replace(sampler, tokenizer=tokenizer)
