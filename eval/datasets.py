"""What programs read length value models on: rollouts of one's own, or completions of the sandbox's problems."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from datasets import Dataset
from transformers.hf_argparser import HfArg

from eval.runs import OUTPUTS, check_sandbox, is_sandbox, output_folder, set_threads
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer, read_config
from lenvm_rl.rollouts.job import SamplingSettings, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import RolloutMetadata, read_rollouts
from lenvm_rl.sandbox import DIFFICULTIES, Problem, distinct_problems
from lenvm_rl.tokenization import check_same_tokenizer

# Seed of the sandbox's evaluation prompts: the same for every run.
EVALUATION_SEED = 0


def sandbox_problems(count: int, seed: int = EVALUATION_SEED, split: str = "evaluation") -> list[Problem]:
    """The first `count` problems of a split of the sandbox; as many of each difficulty, but for a rest below four."""
    whole = -(-count // len(DIFFICULTIES)) * len(DIFFICULTIES)
    return distinct_problems(whole, seed, split)[:count]


@dataclass
class ReadingArguments:
    """Which length value model reads which completions."""

    length_value_model: str = HfArg(help="Pretrained length value model: folder or hub id.")
    rollouts: str | None = HfArg(
        default=None,
        help="Rollouts (.jsonl or .parquet, see recipes/sample_rollouts.py), of prompts that the model was not fitted "
        "on where it is measured. Default, where there is a --policy: completions of the sandbox's evaluation prompts.",
    )
    base: str | None = HfArg(
        default=None,
        help="The model that a length value model of form adapter or head was fitted on: folder or hub id. Default: "
        "--policy, where there is one.",
    )
    value_dtype: str = HfArg(
        default="float32", help="Dtype of the decoder that it reads with, such as bfloat16; its head is float32."
    )
    forward_tokens: int = HfArg(default=16384, help="Most tokens in a forward, padding counted.")

    def load_reader(self) -> LengthValueModel:
        """The length value model, frozen."""
        return load_length_value_model(self.length_value_model, self.fitted_on, dtype=self.value_dtype)

    @property
    def fitted_on(self) -> str | None:
        """The model that it was fitted on, as far as it was named."""
        return self.base


@dataclass
class RolloutArguments(ReadingArguments):
    """The same, of completions that are sampled of the sandbox's prompts where none are named."""

    policy: str | None = HfArg(
        default=None, help="A policy of the built-in sandbox to sample, without --rollouts: folder."
    )
    num_prompts: int = HfArg(default=120, help="Sandbox prompts to sample; by fours, one of each kind.")
    num_samples: int = HfArg(default=64, help="Completions to sample per prompt.")
    max_new_tokens: int = HfArg(default=128, help="Longest completion that is sampled, end-of-sequence counted.")
    batch_size: int = HfArg(default=256, help="Completions per generate call.")
    temperature: float = HfArg(default=1.0, help="Temperature of the sampling.")
    seed: int = HfArg(default=0, help="Seed of prompts, sampling and intervals.")
    output_dir: str | None = HfArg(
        default=None,
        help="Where the results, and sampled rollouts, are written. Default: outputs/ and the program's name.",
    )

    @property
    def fitted_on(self) -> str | None:
        """That model, or the policy."""
        return self.base or self.policy

    def in_folder(self, program: str, report: str) -> Self:
        """These arguments with the folder to write to, which is made."""
        about = ("length_value_model", "rollouts", "policy")
        folder = output_folder(self.output_dir, Path(OUTPUTS) / program, report, asdict(self), about)
        return replace(self, output_dir=str(folder))


def find_rollouts(args: ReadingArguments) -> tuple[Dataset, RolloutMetadata]:
    """The rollouts that the arguments name, or completions of the sandbox's evaluation prompts."""
    fingerprint = read_config(args.length_value_model).tokenizer_fingerprint
    if args.rollouts is not None:
        rollouts, metadata = read_rollouts(args.rollouts)
        check_same_tokenizer(fingerprint, metadata.tokenizer_fingerprint, theirs_name="the rollouts")
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
    job = TransformersJob(
        load_policy(args.policy),
        tokenizer,
        [problem.prompt for problem in problems],
        settings,
        seed=args.seed,
        extra_columns={"difficulty": [problem.difficulty for problem in problems]},
    )
    return sample_to_file(Path(args.output_dir) / "rollouts.jsonl", job, args.policy)
