"""Signal and noise of the policy gradient under every way to price length: one policy, one batch size, no training.

    python -m eval.gradient                            # the base policy of outputs/sandbox and its length value model
    python -m eval.gradient --policy ppo               # the same model, gone stale: the policy after training
    python -m eval.gradient --policy MODEL --length_value_model LENVM --task gsm8k --dataset_name gsm8k_test.jsonl \
        --parameters 'layers\\.29\\.mlp' --num_batches 32 --forward_size 4

Batches are sampled once, and every estimator (`eval.gradient.estimators`) turns each of them into one gradient, with
the same constant normaliser. The signal-to-noise ratio of a batch is the squared length of the expected gradient, as
the product of the means of two halves of the batches, over the trace of the covariance between batches; the formulas
are in `eval.gradient.signal`. Beside it stand the cosines of the expected gradient to that of the task and to that
of the plain length return: what a gate, and its remedies, take from the task. Intervals are 95 % bootstraps over
batches. Prints one table and writes gradient.json, .csv and .png.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from eval.arms import read_grades
from eval.command_line import run
from eval.datasets import EvaluationPrompts
from eval.gradient.batches import ExplainedVariance, batch_gradients, length_values, read_batches, select_parameters
from eval.gradient.estimators import LENGTH_GRADIENT, TASK_GRADIENT, GradedBatch, estimators
from eval.gradient.report import all_cosines, compare_penalties, plot_gradients, print_report, summarise
from eval.gradient.signal import GradientStatistics, inner_products
from eval.report import save_csv, save_json
from eval.runs import OUTPUTS, SANDBOX_RUN, output_folder, set_threads
from eval.tradeoff.arguments import TradeoffArguments, check_data, read_run, sampled_as_fitted
from lenvm_rl.endings import own_length
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer
from lenvm_rl.prediction import weights_fingerprint
from lenvm_rl.reward_functions import call_reward, check_columns, load_reward
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.local import sample_to_file
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.sandbox import DIFFICULTIES, stream_problems

logger = logging.getLogger(__name__)

# What a measurement is about: results about others are not written over.
MODELS = ("policy", "length_value_model")


@dataclass
class GradientArguments:
    """Which policy, on which prompts, in which batches, and where to write it."""

    run_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a recipe's run; its run.json says what was trained, on what, and how it samples. "
            f"Default: {SANDBOX_RUN}, or none where --policy is a model of one's own."
        },
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "The name of a trained policy of the run; or folder or hub id, which needs --length_value_model "
            "and --dataset_name. Default: the run's base."
        },
    )
    length_value_model: str | None = field(
        default=None, metadata={"help": "Length value model, folder or hub id. Default: the run's."}
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "The model that length value models of form adapter or head were fitted on. Default: the run's "
            "base, or --policy where that is none of the run's."
        },
    )
    correct_lenvm: str | None = field(
        default=None,
        metadata={"help": "A length value model fitted to correct completions only (--only_correct), for its gate."},
    )
    task: str | None = field(default=None, metadata={"help": "As for eval.tradeoff: 'gsm8k', 'math500' or 'sandbox'."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a hub id or a local .jsonl, .json, .parquet or .csv file, shuffled. Default: the "
            "sandbox's, for its own policies."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a hub dataset."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the prompt. Default: the task's or the run's."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column that the reward gets as 'answer'. Default: the task's."}
    )
    chat: bool | None = field(
        default=None, metadata={"help": "Wrap text prompts as a user's message. Default: as in the run, or the task's."}
    )
    reward: str | None = field(
        default=None,
        metadata={"help": "Dotted path of the reward; above 0.5 is correct. Default: the task's, or the run's."},
    )
    num_batches: int = field(default=160, metadata={"help": "Independent batches."})
    batch_size: int = field(default=64, metadata={"help": "Completions in a batch: the ratio is proportional to it."})
    group_size: int = field(default=8, metadata={"help": "Completions of a prompt."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest completion, end-of-sequence counted. Default: as in the run, or in the rollouts that the "
            "length value model was fitted on."
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Of sampling, above 0. Default: like that of max_new_tokens."}
    )
    parameters: str | None = field(
        default=None,
        metadata={"help": "Regular expression: only parameters whose name holds it. Default: all of the policy's."},
    )
    pass_threshold: float = field(
        default=0.5, metadata={"help": "Share of correct completions at which the hard gate by groups opens."}
    )
    sampling_batch_size: int = field(default=256, metadata={"help": "Completions per generate call."})
    forward_size: int = field(default=64, metadata={"help": "Completions per forward of a gradient."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, sampling and bootstrap."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where to write. Default: RUN_DIR/gradient, or RUN_DIR/gradient_POLICY; for models of no run, in "
            "outputs."
        },
    )

    def __post_init__(self) -> None:
        if self.num_batches < 2 or min(self.batch_size, self.sampling_batch_size, self.forward_size) < 1:
            raise ValueError("Two batches are the least, and batch_size and the other sizes must be at least 1.")
        if self.group_size < 2 or self.batch_size % self.group_size:
            raise ValueError(
                f"A group is two completions or more, and a batch whole groups: batch_size {self.batch_size} and "
                f"group_size {self.group_size} do not fit."
            )
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"A policy gradient needs sampling: temperature must be above 0, got {self.temperature}.")
        if not 0 < self.pass_threshold <= 1:
            raise ValueError(f"pass_threshold is a share in (0, 1], got {self.pass_threshold}.")


def complete(args: GradientArguments) -> tuple[GradientArguments, EvaluationPrompts, str | None]:
    """The arguments completed by what the run says of itself, the prompts of all batches, and the run's pad token.

    Raises:
        ValueError: the dataset has too few rows for all batches, or completions would not be sampled.
    """
    count = args.num_batches * args.batch_size // args.group_size
    own = args.dataset_name is not None
    shared = {each.name for each in fields(TradeoffArguments)} & {each.name for each in fields(GradientArguments)}
    asked = {name: value for name, value in asdict(args).items() if name in shared}
    asked["batch_size"] = args.sampling_batch_size
    # All rows of a dataset, to shuffle them; of the sandbox's distinct prompts none is used.
    asked["num_prompts"] = 2**31 if own else len(DIFFICULTIES)
    comparison = read_run(TradeoffArguments(**asked), among_trained=True)
    found = sampled_as_fitted(comparison.args)
    if found.temperature <= 0:
        raise ValueError(f"A policy gradient needs sampling: temperature must be above 0, got {found.temperature}.")
    trained = comparison.trained.get(found.policy)
    default_dir = "gradient" if args.policy is None else f"gradient_{Path(args.policy).name}"
    args = replace(
        args,
        **{name: getattr(found, name) for name in shared - {"policy", "base", "batch_size", "output_dir"}},
        policy=trained or found.policy,
        # A trained policy is no longer what its run's length value model was fitted on.
        base=args.base or (comparison.run.model("policy") if trained else found.policy),
        output_dir=args.output_dir or str(Path(comparison.run.folder or OUTPUTS) / default_dir),
    )
    if not own:
        # Independent draws with the sandbox's equal share of difficulties, from prompts that nothing was fitted to.
        problems = list(islice(stream_problems(args.seed, "evaluation"), count))
        answers = {"answer": [problem.answer for problem in problems]}
        return args, EvaluationPrompts([problem.prompt for problem in problems], answers), comparison.pad_token
    if len(comparison.prompts) < count:
        raise ValueError(
            f"{args.num_batches} batches take {count} prompts, and {args.dataset_name} has {len(comparison.prompts)}: "
            "take fewer batches or larger groups."
        )
    chosen = np.random.default_rng(args.seed).permutation(len(comparison.prompts))[:count].tolist()
    columns = {name: [column[index] for index in chosen] for name, column in comparison.columns.items()}
    return args, EvaluationPrompts([comparison.prompts[index] for index in chosen], columns), comparison.pad_token


def sample(
    args: GradientArguments, data: EvaluationPrompts, policy: PreTrainedModel, tokenizer: Any, reward: Callable
) -> tuple[Dataset, RolloutMetadata]:
    """Completions of all batches with their grades, `rollouts.jsonl` in the output folder; reused if it is there.

    Raises:
        ValueError: some completion makes no valid record, or is not graded, so that batches would not be whole.
    """
    rollouts, metadata = sample_to_file(
        Path(args.output_dir) / "rollouts.jsonl",
        policy,
        tokenizer,
        data.prompts,
        SamplingSettings(args.group_size, args.max_new_tokens, args.sampling_batch_size, args.temperature),
        seed=args.seed,
        # A policy trained again under the same name is another one.
        generator=f"{args.policy} {weights_fingerprint(policy)[:12]}",
    )
    if len(rollouts) != args.num_batches * args.batch_size:
        raise ValueError(
            f"{len(rollouts)} of {args.num_batches * args.batch_size} completions are valid; see the rejected ones "
            f"beside {args.output_dir}/rollouts.jsonl, and take another seed or policy."
        )
    groups = rollouts["group"][:]
    reward = load_reward(args.reward)
    paid = call_reward(
        reward,
        tokenizer,
        [data.prompts[group] for group in groups],
        rollouts["completion_ids"][:],
        {name: [column[group] for group in groups] for name, column in data.columns.items()},
        args.group_size,
    )
    correct, graded = read_grades(reward, paid)
    if not graded.all():
        raise ValueError(
            f"{args.reward} did not grade {int((~graded).sum())} of {len(graded)} completions (it returned None), so "
            "batches would not be whole: take prompts that it grades, or another --reward."
        )
    return rollouts.add_column("correct", correct.astype(float).tolist()), metadata


def measure(args: GradientArguments, data: EvaluationPrompts, pad_token: str | None) -> dict[str, Any]:
    """Sample, take all gradients, and return the report."""
    tokenizer = load_tokenizer(args.policy, pad_token)
    check_data(args, tokenizer)
    reward = load_reward(args.reward)
    check_columns(reward, data.columns, args.dataset_name or "the sandbox")
    values, of_correct = (
        None if path is None else load_length_value_model(path, args.base, tokenizer=tokenizer)
        for path in (args.length_value_model, args.correct_lenvm)
    )
    policy = load_policy(args.policy)
    rollouts, metadata = sample(args, data, policy, tokenizer, reward)
    parameters = select_parameters(policy, args.parameters)
    found = estimators(args.pass_threshold, of_correct is not None)
    shape = (len(found), args.num_batches, sum(parameter.numel() for parameter in parameters))
    explained, correct = ExplainedVariance(), torch.tensor(rollouts["correct"][:], dtype=torch.float64)
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
                length_of_correct=None if of_correct is None else length_values(of_correct, batch, args.forward_size),
            )
            explained.add(graded)
            advantages = torch.stack([estimator.advantages(graded) for estimator in found])
            gradients[:, number] = batch_gradients(
                policy,
                parameters,
                batch,
                advantages,
                args.temperature,
                args.batch_size * args.max_new_tokens,
                args.forward_size,
            ).numpy()
        logger.info("inner products of %d gradients of %d numbers", shape[0] * shape[1], shape[2])
        statistics = GradientStatistics(inner_products(gradients), args.seed)
        del gradients
    names = [estimator.name for estimator in found]
    task, length = names.index(TASK_GRADIENT), names.index(LENGTH_GRADIENT)
    cut = sum(reason != "stop" for reason in rollouts["finish_reason"])
    tokens = sum(own_length(ids, ends) for ids in rollouts["completion_ids"])
    return {
        "arguments": asdict(args),
        "measured_on": {
            "parameters": shape[2],
            "gamma": values.config.gamma,
            "mean_tokens": tokens / len(rollouts),
            "correct": float(correct.mean()),
            "cut": cut / len(rollouts),
            "explained_variance": explained.result(),
        },
        "estimators": summarise(found, statistics, args.batch_size, task, length),
        "penalties": compare_penalties(found, statistics),
        "cosines": all_cosines(found, statistics),
    }


def main(args: GradientArguments) -> dict[str, Any]:
    """Measure, print, and write `gradient.json`, `.csv` and `.png`."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=args.dataset_name is None)
    given = args.output_dir
    args, data, pad_token = complete(args)
    output_dir = output_folder(given, args.output_dir, "gradient.json", asdict(args), MODELS)
    report = measure(args, data, pad_token)
    save_json(output_dir / "gradient.json", report)
    save_csv(output_dir / "gradient.csv", report["estimators"])
    plot_gradients(report["estimators"], output_dir / "gradient.png")
    console = Console(width=150, highlight=False)
    print_report(report, console)
    console.print(f"Written to {output_dir}/gradient.json, .csv and .png")
    return report


if __name__ == "__main__":
    run(GradientArguments, main, "eval.gradient", __doc__)
