"""Sampling rollouts, wherever their completions come from, in steps that survive being killed.

[`SamplingJob`] is what every engine shares: which completions there are to sample, in which steps, what the metadata
says about them, and the progress bar. The engines are [`~lenvm_rl.rollouts.local.TransformersJob`],
[`~lenvm_rl.rollouts.vllm.VLLMJob`] and [`~lenvm_rl.rollouts.server.ServerJob`]:

    job = TransformersJob(model, tokenizer, prompts, SamplingSettings(num_samples=4), seed=0)
    rollouts, metadata = sample_to_file("rollouts.jsonl", job)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from lenvm_rl.endings import end_token_ids, padding_id
from lenvm_rl.files import Journal
from lenvm_rl.rollouts.record import (
    REQUIRED_COLUMNS,
    RolloutMetadata,
    as_column,
    check_alone,
    check_suffix,
    find_problem,
    read_rollouts,
    set_aside,
    warn_of_cuts,
    write_rollouts,
)
from lenvm_rl.tokenization import Prompt, check_room, tokenize_prompts, tokenizer_fingerprint

logger = logging.getLogger(__name__)

# Under which number a journal keeps what was prepared for the steps; steps are numbered from 0.
PREPARATION = -1


@dataclass(frozen=True)
class SamplingSettings:
    """Everything that a completion depends on beside the policy, the prompt and the seed."""

    _argument_group_name = "Sampling"

    num_samples: int = HfArg(default=4, help="Completions per prompt.")
    max_new_tokens: int = HfArg(
        default=1024,
        help="Most tokens per completion, end-of-sequence counted; a longer one is cut and marked as truncated.",
    )
    batch_size: int = HfArg(
        default=64, help="Completions under way at once, in a generate call or on a server. Thousands keep vLLM busy."
    )
    temperature: float = HfArg(default=1.0, help="Sampling temperature; 0 is greedy decoding.")
    top_p: float = HfArg(default=1.0, help="Nucleus sampling; 1 keeps every token.")
    top_k: int = HfArg(default=0, help="Keep only so many of the most probable tokens; 0 keeps every one.")

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                "temperature and top_k must not be negative and top_p must be in (0, 1], got "
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}."
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("temperature 0 gives num_samples equal completions; set num_samples to 1.")


class SamplingJob(ABC):
    """Completions to sample, numbered by prompt and sample: number i is sample `i % num_samples` of its prompt.

    A job is done in steps, numbered from 0. A step is one completion, with a seed of its own, so that what it is does
    not depend on which others are sampled beside it or before it, as far as the engine keeps to seeds; an engine whose
    completions do depend on their batch has batches for steps.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        prompts (`Sequence[str | list[dict]]`): texts (tokenised as they are) or lists of messages (the chat template
            is applied, with the generation prompt).
        settings ([`SamplingSettings`]): the result does not depend on `batch_size` unless `depends_on_batch_size`.
        seed (`int`): decides the seed of every step.
        extra_columns (`dict[str, Sequence]`, *optional*): further columns of the records, one entry per prompt.
        eos_token_ids (`Sequence[int]`, *optional*, defaults to the tokenizer's): every id that ends a completion, such
            as the policy's generation config has them.
    """

    engine = ""
    depends_on_batch_size = False
    # What the metadata calls the policy unless it is said.
    policy_name = ""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        seed: int,
        extra_columns: dict[str, Sequence[Any]] | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ):
        if not len(prompts):
            raise ValueError("There is no prompt to sample from.")
        self.prompt_ids = tokenize_prompts(tokenizer, prompts)
        self.tokenizer, self.settings, self.seed = tokenizer, settings, seed
        self.prompts = list(prompts)
        self.extra_columns = {name: list(column) for name, column in (extra_columns or {}).items()}
        reserved = sorted(set(self.extra_columns) & set(REQUIRED_COLUMNS))
        if reserved:
            raise ValueError(f"Columns {reserved} have the names of a rollout's own fields: rename or remove them.")
        for name, column in self.extra_columns.items():
            if len(column) != len(self.prompts):
                raise ValueError(f"Column {name!r} has {len(column)} entries for {len(self.prompts)} prompts.")
            problem = find_column_problem(name, column)
            if problem is not None:
                raise ValueError(f"{problem}: leave the column out, or make text or numbers of it.")
        self.eos_token_ids = end_token_ids(tokenizer if eos_token_ids is None else None, eos_token_ids)
        self.pad_token_id = padding_id(tokenizer, self.eos_token_ids)

    def __len__(self) -> int:
        """Number of completions."""
        return len(self.prompts) * self.settings.num_samples

    @abstractmethod
    def sample(self, steps: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yields (step, its records) for each of the steps, in any order: what an engine has to say."""

    def check_room(self, context: int | None) -> None:
        """Raise a `ValueError` if a prompt leaves no room for a completion in the `context` of the engine, if known."""
        check_room([len(ids) for ids in self.prompt_ids], self.settings.max_new_tokens, context)

    def step_sizes(self) -> list[int]:
        """Number of completions in each step."""
        return [1] * len(self)

    def description(self) -> dict[str, Any]:
        """What the engine adds to the metadata's `sampling`; part of what tells two jobs apart."""
        return {}

    def prepare(self, kept: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """What the steps are planned by and [`SamplingJob.description`] cannot pin down to the last bit.

        The journal keeps what is returned, and a job that goes on gets it as `kept`, to be used again.
        """
        return []

    def report(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """What the engine adds to the metadata's `sampling` once the completions are there."""
        return {}

    def prompt_of(self, number: int) -> int:
        """Index of the prompt that a completion belongs to."""
        return number // self.settings.num_samples

    def seed_of(self, number: int) -> int:
        """The seed of a completion, in [0, 2^31): what every engine takes."""
        return batch_seed(self.seed, number) % 2**31

    def record(self, number: int, completion_ids: list[int], finish_reason: str, **columns: Any) -> dict[str, Any]:
        """The rollout record of a completion, by its number."""
        prompt = self.prompt_of(number)
        return {
            "prompt": self.prompts[prompt],
            "prompt_ids": self.prompt_ids[prompt],
            "completion_ids": completion_ids,
            "finish_reason": finish_reason,
            "group": prompt,
            **{name: column[prompt] for name, column in self.extra_columns.items()},
            **columns,
        }

    def metadata(self, generator: str) -> RolloutMetadata:
        """What a file of these rollouts says about itself. `sampling["plan"]` tells two different jobs apart."""
        settings = asdict(self.settings)
        if not self.depends_on_batch_size:
            del settings["batch_size"]
        sampling = {**settings, "backend": self.engine, **self.description()}
        job = [generator, sampling, self.seed, self.eos_token_ids, self.prompt_ids, self.prompts, self.extra_columns]
        plan = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
        return RolloutMetadata(
            generator=generator,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            sampling={**sampling, "plan": plan},
            seed=self.seed,
            eos_token_ids=self.eos_token_ids,
        )

    def run(self, done: Collection[int] = ()) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yields (step, its records) for every step that is not in `done`, with a progress bar."""
        sizes = self.step_sizes()
        todo = [step for step in range(len(sizes)) if step not in done]
        tokens = cut = completions = 0
        before = len(self) - sum(sizes[step] for step in todo)
        start = time.perf_counter()
        with tqdm(total=len(self), initial=before, desc="sampling", unit="completion") as progress:
            for step, records in self.sample(todo):
                tokens += sum(len(record["completion_ids"]) for record in records)
                cut += sum(record["finish_reason"] == "length" for record in records)
                completions += len(records)
                rate = tokens / (time.perf_counter() - start)
                progress.set_postfix_str(f"{rate:.0f} tokens/s, {cut / completions:.1%} truncated", refresh=False)
                progress.update(len(records))
                yield step, records
        if completions:
            share = 100 * cut / completions
            logger.info("sampled %d completions, %d tokens, %.1f%% truncated", completions, tokens, share)


def in_order(steps: Mapping[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records of all steps by prompt, for each prompt in the order of the steps."""
    records = [record for step in sorted(steps) for record in steps[step]]
    return sorted(records, key=lambda record: record["group"])


def sample_rollouts(job: SamplingJob) -> list[dict[str, Any]]:
    """Runs a job: rollout records, `num_samples` for each prompt, in the order of the prompts."""
    return in_order(dict(job.run()))


def sample_to_file(
    path: str | os.PathLike, job: SamplingJob, generator: str | None = None
) -> tuple[Dataset, RolloutMetadata]:
    """Runs a job into a rollout file; killed at any moment and started again, it goes on where it was.

    Every finished step is appended to `<name>.journal` as one line; a half-written last line is done again. What the
    steps were planned by (predicted lengths) is the first line there, so that the plan stays what it was. When all
    are there, the rollouts and their metadata are written under `path` and the journal is removed. If the finished file
    exists already, it is read; one that was begun with other arguments is refused.

    Args:
        path (`str` or `os.PathLike`): a name that ends in `.jsonl` or `.parquet`.
        job ([`SamplingJob`]): what to sample.
        generator (`str`, *optional*, defaults to `job.policy_name`): what the metadata calls the policy.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: as `read_rollouts` gives them. A completion that makes no valid
        record is set aside in `<name>.rejected.jsonl`, logged, and counted in `sampling["set_aside"]`.
    """
    path = check_suffix(path)
    metadata = job.metadata(generator or job.policy_name)
    plan = metadata.sampling["plan"]
    check_alone(path, metadata)
    journal = Journal(path.with_suffix(".journal"), plan)
    if path.exists():
        dataset, found = read_rollouts(path)
        if found.sampling.get("plan") != plan:
            raise ValueError(
                f"{path} exists and was sampled with other arguments ({_differences(found, metadata)}). Give another "
                "path, or remove it to sample again."
            )
        # A kill between the last two steps leaves it behind.
        journal.path.unlink(missing_ok=True)
        logger.info("%s is complete: %d completions, nothing to sample", path, len(dataset))
        return dataset, found
    done = journal.open()
    kept = done.pop(PREPARATION, None)
    if done:
        there = sum(map(len, done.values()))
        logger.info("going on: %d of %d completions are in %s", there, len(job), journal.path)
    prepared = job.prepare(kept)
    if prepared and kept is None:
        journal.append(PREPARATION, prepared)
    for step, batch in job.run(set(done)):
        journal.append(step, batch)
        done[step] = batch
    records = in_order(done)
    good, rejected = [], []
    for number, record in enumerate(records, start=1):
        reason = find_problem(record, metadata.vocab_size, metadata.eos_token_ids)
        entry = {"file": path.name, "line": number, "reason": reason, "record": record}
        good.append(record) if reason is None else rejected.append(entry)
    set_aside(path, rejected, len(records))
    sampling = {**metadata.sampling, **job.report(records), "set_aside": len(rejected)}
    write_rollouts(path, good, replace(metadata, sampling=sampling))
    journal.remove()
    warn_of_cuts([record["finish_reason"] for record in good])
    return read_rollouts(path)


def _differences(then: RolloutMetadata, now: RolloutMetadata) -> str:
    """Which settings of two jobs differ."""
    before, after = ({"seed": each.seed, "policy": each.generator, **each.sampling} for each in (then, now))
    names = [name for name in after if name != "plan" and before.get(name) != after[name]]
    return ", ".join(f"{name} {before.get(name)}, now {after[name]}" for name in names) or "other prompts or columns"


def find_column_problem(name: str, column: Sequence[Any]) -> str | None:
    """Why a column cannot be kept with rollouts, in words, or `None`."""
    for index, entry in enumerate(column):
        if not is_json(entry):
            return f"Column {name!r} holds a {type(entry).__name__} at prompt {index}, and a rollout file cannot"
    try:
        as_column(name, list(column))
    except ValueError as error:
        return str(error).rstrip(".")
    return None


def is_json(value: Any) -> bool:
    """Whether JSON holds a value as it is: text, numbers, truth values, `None`, and lists and mappings of those."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and is_json(each) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_json, value))
    return value is None or isinstance(value, (str, int, float, bool))


def batch_seed(seed: int, index: int) -> int:
    """A seed for step `index`; hashed, so that neighbouring seeds and steps share no random stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1
