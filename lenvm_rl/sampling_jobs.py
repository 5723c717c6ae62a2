"""A sampling job in steps that survive being killed, wherever its completions come from.

[`SamplingJob`] is the part that every engine shares: which completions there are to sample, what the metadata says
about them, and the progress bar. [`run_to_file`] runs one into a rollout file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lenvm_rl.journal import Journal
from lenvm_rl.rollouts import RolloutMetadata, find_problem, read_rollouts, set_aside, write_rollouts
from lenvm_rl.sampling import Prompt, SamplingSettings, batch_seed, tokenize_prompts
from lenvm_rl.tokenization import check_pad_is_not_eos, tokenizer_fingerprint

logger = logging.getLogger(__name__)


class SamplingJob(ABC):
    """Completions to sample, numbered by prompt and sample: number i is sample `i % num_samples` of its prompt.

    Every completion has a seed of its own, so what it is does not depend on which others are sampled beside it or
    before it, as far as the engine keeps to seeds.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        prompts (`Sequence[str | list[dict]]`): texts (tokenised as they are) or lists of messages (the chat template
            is applied, with the generation prompt).
        settings ([`~lenvm_rl.sampling.SamplingSettings`]): `batch_size` is how many completions are under way at once;
            the result does not depend on it.
        seed (`int`): decides the seed of every completion.
        extra_columns (`dict[str, Sequence]`, *optional*): further columns of the records, one entry per prompt.
        eos_token_ids (`Sequence[int]`, *optional*, defaults to the tokenizer's): every id that ends a completion.

    Raises:
        ValueError: if there is no prompt, a prompt has no tokens, an extra column has another length, or the tokenizer
            pads with an end-of-sequence token.
    """

    engine = ""

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
        check_pad_is_not_eos(tokenizer)
        if not len(prompts):
            raise ValueError("There is no prompt to sample from.")
        self.tokenizer, self.settings, self.seed = tokenizer, settings, seed
        self.prompts = list(prompts)
        self.extra_columns = {name: list(column) for name, column in (extra_columns or {}).items()}
        for name, column in self.extra_columns.items():
            if len(column) != len(self.prompts):
                raise ValueError(f"Column {name!r} has {len(column)} entries for {len(self.prompts)} prompts.")
        self.eos_token_ids = sorted({tokenizer.eos_token_id} if eos_token_ids is None else set(eos_token_ids))
        if tokenizer.pad_token_id in self.eos_token_ids:
            raise ValueError(
                f"pad token {tokenizer.pad_token_id} is one of the end-of-sequence ids {self.eos_token_ids}: give the "
                "tokenizer another pad token, or padding cannot be told from an end."
            )
        self.prompt_ids = tokenize_prompts(tokenizer, self.prompts)

    def __len__(self) -> int:
        """Number of completions."""
        return len(self.prompts) * self.settings.num_samples

    @abstractmethod
    def sample(self, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number, record) for each of the numbers, in any order: what an engine has to say."""

    def description(self) -> dict[str, Any]:
        """What the engine adds to the metadata's `sampling`; part of what tells two jobs apart."""
        return {}

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
        """The rollout record of a completion."""
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
        settings = {name: value for name, value in asdict(self.settings).items() if name != "batch_size"}
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

    def run(self, done: Sequence[int] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number, record) for every completion that is not in `done`, with a progress bar."""
        finished = set(done)
        todo = [number for number in range(len(self)) if number not in finished]
        tokens = cut = count = 0
        start = time.perf_counter()
        with tqdm(total=len(self), initial=len(self) - len(todo), desc="sampling", unit="completion") as progress:
            for count, (number, record) in enumerate(self.sample(todo), start=1):
                tokens += len(record["completion_ids"])
                cut += record["finish_reason"] == "length"
                rate = tokens / (time.perf_counter() - start)
                progress.set_postfix_str(f"{rate:.0f} tokens/s, {cut / count:.1%} truncated", refresh=False)
                progress.update()
                yield number, record
        if count:
            logger.info("sampled %d completions, %d tokens, %.1f%% truncated", count, tokens, 100 * cut / count)


def run_to_file(path: str | os.PathLike, job: SamplingJob, generator: str) -> tuple[Dataset, RolloutMetadata]:
    """Runs a job into a rollout file; killed at any moment and started again, it goes on where it was.

    Every finished completion is appended to `<name>.journal` as one line. When all are there, the rollouts and their
    metadata are written under `path` and the journal is removed. If the finished file exists already, it is read.

    Args:
        path (`str` or `os.PathLike`): a name that ends in `.jsonl` or `.parquet`.
        job ([`SamplingJob`]): what to sample.
        generator (`str`): what the metadata calls the policy.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: as `read_rollouts` gives them. A completion that makes no valid
        record is set aside in `<name>.rejected.jsonl`, logged, and counted in `sampling["set_aside"]`.

    Raises:
        ValueError: if a finished file or a journal under this name was begun with other arguments, or no completion
            makes a valid record.
    """
    path = Path(path)
    metadata = job.metadata(generator)
    plan = metadata.sampling["plan"]
    journal = Journal(path.with_suffix(".journal"), plan)
    if path.exists():
        dataset, found = read_rollouts(path)
        if found.sampling.get("plan") != plan:
            raise ValueError(
                f"{path} exists and was sampled with other prompts or settings (then {found.sampling}; now "
                f"{metadata.sampling}). Give another path, or remove it to sample again."
            )
        # A kill between the last two steps leaves it behind.
        journal.path.unlink(missing_ok=True)
        logger.info("%s is complete: %d completions, nothing to sample", path, len(dataset))
        return dataset, found
    done = journal.open()
    for number, record in job.run(list(done)):
        journal.append(number, [record])
        done[number] = [record]
    records = [record for number in sorted(done) for record in done[number]]
    good, rejected = [], []
    for number, record in enumerate(records, start=1):
        reason = find_problem(record, metadata.vocab_size, metadata.eos_token_ids)
        entry = {"file": path.name, "line": number, "reason": reason, "record": record}
        good.append(record) if reason is None else rejected.append(entry)
    set_aside(path, rejected, len(records))
    sampling = {**metadata.sampling, **job.report(records), "set_aside": len(rejected)}
    write_rollouts(path, good, replace(metadata, sampling=sampling))
    journal.remove()
    return read_rollouts(path)
