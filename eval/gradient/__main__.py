"""Signal and noise of the policy gradient under every way to price length: one policy, one batch size, no training.

    python -m eval.gradient                            # the base policy of outputs/sandbox and its length value model
    python -m eval.gradient --policy ppo               # the same model, gone stale: the policy after training
    python -m eval.gradient --policy MODEL --length_value_model LENVM --task gsm8k --dataset_name gsm8k_test.jsonl \
        --parameters 'layers\\.29\\.mlp' --num_batches 32 --forward_size 4

Batches are sampled once, and every estimator (`eval.gradient.estimators`) turns each of them into one gradient, with
the same constant normaliser. The signal-to-noise ratio of a batch is the squared length of the expected gradient, as
the product of the means of two halves of the batches, over the trace of the covariance between batches; the formulas
are in `eval.gradient.gradients`. Beside it stand the cosines of the expected gradient to the task's and to the plain
length return's: what a gate, and its remedies, take from the task. Intervals are 95 % bootstraps over batches. Prints
one table and writes gradient.json, .csv and .png.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from eval.graded import EvaluationPrompts, GradedArguments, find_reward, grade, read_run
from eval.gradient.estimators import OF_CORRECT, GradedBatch, estimators
from eval.gradient.gradients import (
    GradientStatistics,
    batch_gradients,
    explained_variance,
    inner_products,
    length_values,
    read_batches,
    select_parameters,
)
from eval.gradient.report import plot_gradients, print_report, summarise_gradients
from eval.report import save_report
from eval.runs import OUTPUTS, output_folder, run_evaluation, set_threads
from lenvm_rl.endings import own_length
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer
from lenvm_rl.rollouts.job import SamplingSettings, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.sandbox import stream_problems

logger = logging.getLogger(__name__)

# What a measurement is about: results about others are not written over.
MODELS = ("policy", "length_value_model")


@dataclass
class GradientArguments(GradedArguments):
    """Which policy, on which prompts, in which batches, and where to write it."""

    policy: str | None = HfArg(
        default=None,
        help="The name of a trained policy of the run; or folder or hub id, which needs --length_value_model and "
        "--dataset_name. Default: the run's base.",
    )
    correct_lenvm: str | None = HfArg(
        default=None, help="A length value model fitted to correct completions only (--only_correct), for its gate."
    )
    other_lenvms: list[str] = HfArg(
        default_factory=list, help="Further length value models to compare, as NAME=PATH, with the same base."
    )
    num_batches: int = HfArg(default=160, help="Independent batches.")
    batch_size: int = HfArg(default=64, help="Completions in a batch: the ratio is proportional to it.")
    group_size: int = HfArg(default=8, help="Completions of a prompt; with 1 the batch is the baseline.")
    parameters: str | None = HfArg(
        default=None, help="Regular expression: only parameters whose name holds it. Default: all of the policy's."
    )
    estimators: str | None = HfArg(
        default=None, help="Regular expression: only estimators whose name holds it. Default: all."
    )
    sampling_batch_size: int = HfArg(default=256, help="Completions per generate call.")
    forward_size: int = HfArg(default=64, help="Completions per forward of a gradient.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_batches < 2 or min(self.sampling_batch_size, self.forward_size) < 1:
            raise ValueError("num_batches must be at least 2, sampling_batch_size and forward_size at least 1.")
        if self.group_size < 1 or self.batch_size % self.group_size or self.batch_size < 2:
            raise ValueError(
                f"A batch is whole groups, and two completions or more: batch_size {self.batch_size} and group_size "
                f"{self.group_size} do not fit."
            )
        names = [entry.partition("=")[0] for entry in self.other_lenvms]
        if not all("=" in entry for entry in self.other_lenvms) or len({*names, OF_CORRECT}) <= len(names):
            raise ValueError(
                f"other_lenvms takes NAME=PATH, each name once and none of them {OF_CORRECT!r}, got "
                f"{self.other_lenvms}."
            )
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"A policy gradient needs sampling: temperature must be above 0, got {self.temperature}.")

    def load_prompts(self, count: int) -> EvaluationPrompts:
        """`count` prompts, drawn from all of a dataset, or with an equal share of the sandbox's difficulties."""
        if self.dataset_name is None:
            # Independent draws from prompts that nothing was fitted to.
            problems = list(islice(stream_problems(self.seed, "evaluation"), count))
            answers = {"answer": [problem.answer for problem in problems]}
            return EvaluationPrompts([problem.prompt for problem in problems], answers)
        data = super().load_prompts(2**31)
        if len(data.prompts) < count:
            raise ValueError(
                f"{self.num_batches} batches take {count} prompts, and {self.dataset_name} has {len(data.prompts)}: "
                "take fewer batches or larger groups."
            )
        chosen = np.random.default_rng(self.seed).permutation(len(data.prompts))[:count].tolist()
        columns = {name: [column[index] for index in chosen] for name, column in data.columns.items()}
        return EvaluationPrompts([data.prompts[index] for index in chosen], columns)


def complete(args: GradientArguments) -> tuple[GradientArguments, EvaluationPrompts, str | None]:
    """The arguments completed by what the run says of itself, the prompts of all batches, and the run's pad token."""
    name = "gradient" if args.policy is None else f"gradient_{Path(args.policy).name}"
    args, source = read_run(args, among_trained=True)
    data = args.load_prompts(args.num_batches * args.batch_size // args.group_size)
    trained, base = source.trained.get(args.policy), source.model("policy")
    args = replace(
        # A temperature of 0 is refused, whoever said so.
        args.as_fitted(),
        policy=trained or args.policy,
        # A trained policy is no longer what its run's length value model was fitted on.
        base=args.base or (base if trained else args.policy),
        output_dir=args.output_dir or str(Path(source.folder or OUTPUTS) / name),
    )
    return args, data, source.data.get("pad_token")


def sample(
    args: GradientArguments, data: EvaluationPrompts, policy: PreTrainedModel, tokenizer: Any, reward: Callable
) -> tuple[Dataset, RolloutMetadata]:
    """Completions of all batches with their grades, `rollouts.jsonl` in the output folder; reused if it is there."""
    settings = SamplingSettings(args.group_size, args.max_new_tokens, args.sampling_batch_size, args.temperature)
    job = TransformersJob(policy, tokenizer, data.prompts, settings, seed=args.seed)
    rollouts, metadata = sample_to_file(Path(args.output_dir) / "rollouts.jsonl", job, args.policy)
    if len(rollouts) != args.num_batches * args.batch_size:
        raise ValueError(
            f"{len(rollouts)} of {args.num_batches * args.batch_size} completions are valid; see the rejected ones "
            f"beside {args.output_dir}/rollouts.jsonl, and take another seed or policy."
        )
    rows, completions = rollouts["group"][:], rollouts["completion_ids"][:]
    correct, graded = grade(reward, tokenizer, data.prompts, data.columns, completions, rows, args.group_size)
    if not graded.all():
        raise ValueError(
            f"{args.reward} did not grade {int((~graded).sum())} of {len(graded)} completions (it returned None), so "
            "batches would not be whole: take prompts that it grades, or another --reward."
        )
    return rollouts.add_column("correct", correct.astype(float).tolist()), metadata


def measure_gradients(args: GradientArguments, data: EvaluationPrompts, pad_token: str | None) -> dict[str, Any]:
    """Sample, take all gradients, and return the report."""
    tokenizer = load_tokenizer(args.policy, pad_token)
    reward = find_reward(args, tokenizer, data)
    paths = dict(entry.split("=", 1) for entry in args.other_lenvms)
    if args.correct_lenvm is not None:
        paths[OF_CORRECT] = args.correct_lenvm
    values, *others = (
        load_length_value_model(path, args.base, tokenizer=tokenizer)
        for path in (args.length_value_model, *paths.values())
    )
    policy = load_policy(args.policy)
    rollouts, metadata = sample(args, data, policy, tokenizer, reward)
    parameters = select_parameters(policy, args.parameters)
    found = estimators(args.group_size, paths, args.estimators)
    shape = (len(found), args.num_batches, sum(parameter.numel() for parameter in parameters))
    seen, correct = [], torch.tensor(rollouts["correct"][:], dtype=torch.float64)
    # All gradients of the policy of the sandbox are some 2 GB; a file that has no name is gone with the process.
    with tempfile.TemporaryFile(dir=args.output_dir) as file:
        gradients = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
        ends = metadata.end_ids
        batches = zip(read_batches(rollouts, args.batch_size, ends), correct.split(args.batch_size), strict=True)
        for number, (batch, right) in enumerate(tqdm(batches, total=args.num_batches, desc="gradients", unit="batch")):
            graded = GradedBatch(
                completions=batch.completions,
                correct=right,
                group_size=args.group_size,
                max_length=args.max_new_tokens,
                length=length_values(values, batch, args.forward_size),
                others={
                    name: length_values(model, batch, args.forward_size)
                    for name, model in zip(paths, others, strict=True)
                },
            )
            seen.append(graded)
            advantages = torch.stack([estimator.advantages(graded) for estimator in found])
            normaliser = args.batch_size * args.max_new_tokens
            made = batch_gradients(
                policy, parameters, batch, advantages, args.temperature, normaliser, args.forward_size
            )
            gradients[:, number] = made.numpy()
        logger.info("inner products of %d gradients of %d numbers", shape[0] * shape[1], shape[2])
        statistics = GradientStatistics(inner_products(gradients), args.seed)
        del gradients
    cut = sum(reason != "stop" for reason in rollouts["finish_reason"])
    tokens = sum(own_length(ids, ends) for ids in rollouts["completion_ids"])
    about = {
        "parameters": shape[2],
        "gamma": values.config.gamma,
        "mean_tokens": tokens / len(rollouts),
        "correct": float(correct.mean()),
        "cut": cut / len(rollouts),
        "explained_variance": explained_variance(seen),
    }
    return {"arguments": asdict(args), "measured_on": about, **summarise_gradients(found, statistics, args.batch_size)}


def main(args: GradientArguments) -> dict[str, Any]:
    """Measure, print, and write `gradient.json`, `.csv` and `.png`."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=args.dataset_name is None)
    given = args.output_dir
    args, data, pad_token = complete(args)
    output_dir = output_folder(given, args.output_dir, "gradient.json", asdict(args), MODELS)
    report = measure_gradients(args, data, pad_token)
    save_report(output_dir, "gradient", report, report["estimators"])
    plot_gradients(report["estimators"], output_dir / "gradient.png")
    console = Console(width=150, highlight=False)
    print_report(report, console)
    console.print(f"Written to {output_dir}/gradient.json, .csv and .png")
    return report


if __name__ == "__main__":
    run_evaluation(GradientArguments, main, "eval.gradient", __doc__)
