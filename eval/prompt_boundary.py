"""Length from the prompt alone, beside the noise of what it is measured against.

    python -m eval.prompt_boundary --policy outputs/policy --length_value_model outputs/length_value_model

Samples many completions (64) of each prompt, splits them at random into halves, and takes the return-consistent length
``ln(1 - mean_i(1 - gamma^L_i)) / ln(gamma)`` of each half (arXiv 2604.27039, section 4.4). The mean relative error
between the halves is what sampling noise alone does; that of the model is against one half as well. A model that knows
every prompt's expected return exactly has about 0.7 times the error between halves, since only one of its two sides is
noisy. Also printed: which share of the variance between prompts, of the mean return, the model's value explains; the
noise of the means puts a bound on it.

Without `--rollouts`, prompts are those of the sandbox's evaluation split. Killed and started again, it goes on.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console

from eval.command_line import run
from eval.datasets import sandbox_problems
from eval.report import as_entry, save_json
from eval.runs import OUTPUTS, check_sandbox, is_sandbox, output_folder, set_threads
from eval.statistics import Interval, statistic_interval
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer, read_config
from lenvm_rl.prediction import boundary_logits
from lenvm_rl.pretraining.references import half_returns, relative_errors
from lenvm_rl.returns import discounted_return, remaining_from_logits, remaining_from_value
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.local import sample_to_file
from lenvm_rl.rollouts.record import RolloutMetadata, read_rollouts
from lenvm_rl.tokenization import check_same_tokenizer

logger = logging.getLogger(__name__)

# Several splits into halves, averaged: the error of one split depends on the draw.
SPLITS = 32
REPORT = "boundary.json"


@dataclass
class BoundaryArguments:
    """Which model is measured, and against which completions."""

    length_value_model: str = field(metadata={"help": "Pretrained length value model: folder or hub id."})
    rollouts: str | None = field(
        default=None,
        metadata={
            "help": "Rollouts (.jsonl or .parquet, see recipes/sample_rollouts.py) of prompts that the model was not "
            "fitted on. Default: sample the sandbox's evaluation prompts of --policy."
        },
    )
    policy: str | None = field(
        default=None, metadata={"help": "A policy of the built-in sandbox to sample, without --rollouts: folder."}
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "The model that a length value model of form adapter or head was fitted on: folder or hub id. "
            "Default: --policy."
        },
    )
    num_prompts: int = field(default=120, metadata={"help": "Sandbox prompts to sample; by fours, one of each kind."})
    num_samples: int = field(default=64, metadata={"help": "Completions to sample per prompt."})
    max_new_tokens: int = field(
        default=128, metadata={"help": "Longest completion that is sampled, end-of-sequence counted."}
    )
    batch_size: int = field(default=256, metadata={"help": "Completions per generate call."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, sampling, splits and intervals."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where the results, and sampled rollouts, are written. Default: outputs/ and the program's name."
        },
    )

    def in_folder(self, program: str, report: str) -> Self:
        """These arguments with the folder to write to, which is made.

        Raises:
            ValueError: its default has results about other models or rollouts.
        """
        about = ("length_value_model", "rollouts", "policy")
        folder = output_folder(self.output_dir, Path(OUTPUTS) / program, report, asdict(self), about)
        return replace(self, output_dir=str(folder))


def prompt_lengths(rollouts: Dataset) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts and the lengths of their completions.

    Prompts with a cut completion are left out (their return-consistent length is not known), which is logged.

    Args:
        rollouts (`datasets.Dataset`): as `read_rollouts` gives them.

    Returns:
        `tuple[list[list[int]], torch.Tensor]`: P prompts' ids, and lengths `(P, N)`, float64, for the smallest number N
        of completions that a prompt has.

    Raises:
        ValueError: if fewer than two prompts are left, or one has fewer than two completions.
    """
    prompts: dict[int, list[int]] = {}
    lengths: dict[int, list[int]] = {}
    cut = set()
    columns = (rollouts[name][:] for name in ("group", "prompt_ids", "completion_ids", "finish_reason"))
    for group, prompt, completion, reason in zip(*columns, strict=True):
        prompts[group] = prompt
        lengths.setdefault(group, []).append(len(completion))
        if reason != "stop":
            cut.add(group)
    if cut:
        logger.warning("%d of %d prompts are left out: a completion of theirs was cut", len(cut), len(prompts))
    groups = [group for group in prompts if group not in cut]
    most = min((len(lengths[group]) for group in groups), default=0)
    if len(groups) < 2 or most < 2:
        raise ValueError(
            f"{len(groups)} prompts with at least {most} finished completions are not enough: it takes two of either, "
            "better 100 prompts with 64 completions."
        )
    return [prompts[group] for group in groups], torch.tensor([lengths[g][:most] for g in groups], dtype=torch.double)


def measure_boundary(logits: torch.Tensor, lengths: torch.Tensor, gamma: float, seed: int = 0) -> dict[str, Interval]:
    """Error and explained variance at the prompt, with 95 % intervals over prompts.

    Args:
        logits (`torch.Tensor` of shape `(P,)`): at the last token of each prompt.
        lengths (`torch.Tensor` of shape `(P, N)`): tokens of finished completions, end-of-sequence counted.
        gamma (`float`): discount of the length return.
        seed (`int`, *optional*, defaults to `0`): seed of the bootstrap.

    Returns:
        `dict[str, Interval]`: `model_mre` (model against one half), `halves_mre` (one half against the other), `ratio`
        of the two; of the variance between prompts of the mean return of their N completions, `explained` (1 minus the
        share that is left after the value is subtracted) and `explained_at_most` (that of a model that knows each
        prompt's expected return: N completions leave noise in the means); and `explained_without_noise`, in which that
        noise, estimated from the variance inside prompts, is taken out of both variances.
    """
    count = lengths.shape[1]
    returns = discounted_return(lengths.double(), gamma)
    group = torch.arange(len(lengths)).repeat_interleave(count)
    halves = remaining_from_value(half_returns(lengths.flatten(), group, gamma, SPLITS), gamma)
    predicted = remaining_from_logits(logits.double(), gamma)
    mean = returns.mean(dim=1)
    error = mean + torch.sigmoid(logits.double())
    columns = (
        relative_errors(predicted, halves).mean(dim=(0, 1)),
        relative_errors(halves, halves.flip(1)).mean(dim=(0, 1)),
        *(error, error**2, mean, mean**2),
        returns.var(dim=1) / count,
    )
    table = torch.stack(columns, dim=1).numpy()
    statistics = {
        "model_mre": lambda means: means[:, 0],
        "halves_mre": lambda means: means[:, 1],
        "ratio": lambda means: quotient(means[:, 0], means[:, 1]),
        "explained": lambda means: 1 - quotient(_left(means), _between(means)),
        "explained_at_most": lambda means: 1 - quotient(means[:, 6], _between(means)),
        "explained_without_noise": lambda means: (
            1 - quotient(_left(means) - means[:, 6], _between(means) - means[:, 6])
        ),
    }
    return {name: statistic_interval(table, statistic, seed=seed) for name, statistic in statistics.items()}


def quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by, as in a resample of one prompt only."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _left(means: np.ndarray) -> np.ndarray:
    return means[:, 3] - means[:, 2] ** 2


def _between(means: np.ndarray) -> np.ndarray:
    return means[:, 5] - means[:, 4] ** 2


def find_rollouts(args: BoundaryArguments) -> tuple[Dataset, RolloutMetadata]:
    """The rollouts that the arguments name, or completions of the sandbox's evaluation prompts.

    Raises:
        ValueError: the length value model, or the sandbox's prompts, do not go with the policy's tokenizer.
    """
    fingerprint = read_config(args.length_value_model).tokenizer_fingerprint
    if args.rollouts is not None:
        rollouts, metadata = read_rollouts(args.rollouts)
        check_same_tokenizer(fingerprint, metadata.tokenizer_fingerprint)
        set_threads(is_sandbox(metadata.tokenizer_fingerprint))
        return rollouts, metadata
    if args.policy is None:
        raise ValueError("Give --policy to sample completions of, or --rollouts that are there already.")
    tokenizer = load_tokenizer(args.policy)
    instead = "Sample it on prompts of its own with recipes/sample_rollouts.py, and give those --rollouts."
    check_sandbox(tokenizer, args.policy, "The prompts that are sampled here are", instead)
    check_same_tokenizer(fingerprint, tokenizer)
    set_threads(sandbox=True)
    problems = sandbox_problems(args.num_prompts, args.seed)
    settings = SamplingSettings(args.num_samples, args.max_new_tokens, args.batch_size, args.temperature)
    return sample_to_file(
        Path(args.output_dir) / "rollouts.jsonl",
        load_policy(args.policy),
        tokenizer,
        [problem.prompt for problem in problems],
        settings,
        seed=args.seed,
        extra_columns={"difficulty": [problem.difficulty for problem in problems]},
        generator=args.policy,
    )


def main(args: BoundaryArguments) -> dict[str, Interval]:
    """Samples or reads, measures, prints, and writes `boundary.json`."""
    args = args.in_folder("prompt_boundary", REPORT)
    rollouts, _ = find_rollouts(args)
    prompts, lengths = prompt_lengths(rollouts)
    model = load_length_value_model(args.length_value_model, args.base or args.policy)
    found = measure_boundary(boundary_logits(model, prompts), lengths, model.config.gamma, args.seed)
    console = Console(width=120, highlight=False)
    console.print(f"{len(prompts)} prompts, {lengths.shape[1]} completions each, gamma {model.config.gamma:.5f}")
    console.print(f"relative error at the prompt against one half of the completions: {found['model_mre']}")
    console.print(f"relative error between the halves: {found['halves_mre']}; ratio {found['ratio']}")
    console.print(
        f"variance between prompts explained: {found['explained']}, of at most "
        f"{found['explained_at_most'].estimate:.3f} for the noise of {lengths.shape[1]} completions; without that "
        f"noise {found['explained_without_noise']}"
    )
    report = {"arguments": asdict(args), "prompts": len(prompts), "gamma": model.config.gamma}
    report["measured"] = {name: as_entry(interval) for name, interval in found.items()}
    save_json(Path(args.output_dir) / REPORT, report)
    console.print(f"Written to {args.output_dir}/{REPORT}")
    return found


if __name__ == "__main__":
    run(BoundaryArguments, main, "eval.prompt_boundary", __doc__)
