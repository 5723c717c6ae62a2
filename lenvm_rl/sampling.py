"""Where rollouts come from: a policy samples completions of prompts, and the token ids are kept exactly as sampled.

The work is cut into batches by a plan that depends on the prompts and the settings only, and every batch has a seed of
its own. So a run gives the same records every time, and [`sample_to_file`], killed at any moment and started again,
ends with the records of an unbroken run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.journal import Journal
from lenvm_rl.rollouts import REQUIRED_COLUMNS, RolloutMetadata, read_rollouts, write_rollouts
from lenvm_rl.tokenization import check_pad_is_not_eos, tokenizer_fingerprint

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class SamplingSettings:
    """Everything that a completion depends on beside the policy, the prompt and the seed.

    Args:
        num_samples (`int`): completions per prompt.
        max_new_tokens (`int`): most tokens per completion, the end-of-sequence token counted.
        batch_size (`int`): completions per `generate` call.
        temperature (`float`, *optional*, defaults to `1.0`): 0 is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`): nucleus; 1 keeps every token.
        top_k (`int`, *optional*, defaults to `0`): most probable tokens kept; 0 keeps every token.
    """

    num_samples: int
    max_new_tokens: int
    batch_size: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

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


def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int,
    seed: int,
    extra_columns: dict[str, Sequence[Any]] | None = None,
) -> list[dict[str, Any]]:
    """Samples completions with transformers' `generate`.

    The settings given here are the only ones: what the model's generation config holds (a repetition penalty, top-k
    50, ...) is ignored, except for its end-of-sequence ids.

    Args:
        model (`PreTrainedModel`): the policy; its mode, its generation config and the global random state are left
            as they were.
        tokenizer (`PreTrainedTokenizerBase`): with a pad token that is not an end-of-sequence token.
        prompts (`Sequence[str | list[dict]]`): texts (tokenised as they are) or lists of messages (the chat template
            is applied, with the generation prompt).
        num_samples, max_new_tokens, temperature, top_p, top_k, batch_size: see [`SamplingSettings`].
        seed (`int`): the same seed, prompts, settings, model and hardware give the same records.
        extra_columns (`dict[str, Sequence]`, *optional*): further columns, one entry per prompt.

    Returns:
        `list[dict]`: rollout records (see `lenvm_rl.rollouts`), `num_samples` for each prompt, in the order of the
        prompts. `group` is the index of the prompt.

    Raises:
        ValueError: if pad is an end-of-sequence token, a prompt has no tokens or leaves no room for `max_new_tokens`
            in the model's context, there is no prompt, or an extra column has another length.
    """
    settings = SamplingSettings(num_samples, max_new_tokens, batch_size, temperature, top_p, top_k)
    sampler = RolloutSampler(model, tokenizer, prompts, settings, seed, extra_columns)
    records = [record for _, batch in sampler.run() for record in batch]
    return sampler.in_order(records)


def sample_to_file(
    path: str | os.PathLike,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    seed: int,
    extra_columns: dict[str, Sequence[Any]] | None = None,
    generator: str | None = None,
) -> tuple[Dataset, RolloutMetadata]:
    """[`sample_rollouts`] into a file, in steps that survive being killed.

    Every finished batch is appended to `<name>.journal` as one line. Started again with the same arguments, the batches
    found there are not sampled again; a half-written last line is. When all are there, the rollouts and their metadata
    are written under `path` and the journal is removed. If the finished file exists already, it is read, not sampled.

    Args:
        path (`str` or `os.PathLike`): a name that ends in `.jsonl` or `.parquet`.
        model, tokenizer, prompts, seed, extra_columns: as in [`sample_rollouts`].
        settings (`SamplingSettings`): how to sample.
        generator (`str`, *optional*, defaults to the model's `name_or_path`): what the metadata calls the policy.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: as `read_rollouts` gives them.

    Raises:
        ValueError: as [`sample_rollouts`]; also if a finished file or a journal under this name was begun with other
            arguments.
    """
    path = Path(path)
    sampler = RolloutSampler(model, tokenizer, prompts, settings, seed, extra_columns)
    metadata = sampler.metadata(generator)
    if path.exists():
        dataset, found = read_rollouts(path)
        if found.sampling != metadata.sampling or found.seed != seed:
            raise ValueError(
                f"{path} exists and was sampled with other arguments (then {found.sampling}, seed {found.seed}; now "
                f"{metadata.sampling}, seed {seed}). Give another path, or remove it to sample again."
            )
        logger.info("%s is complete: %d completions, nothing to sample", path, len(dataset))
        return dataset, found
    journal = Journal(path.with_suffix(".journal"), metadata.sampling["plan"])
    done = journal.open()
    for index, batch in sampler.run(done):
        journal.append(index, batch)
        done[index] = batch
    records = sampler.in_order([record for index in sorted(done) for record in done[index]])
    write_rollouts(path, records, metadata)
    journal.remove()
    return read_rollouts(path)


def load_prompts(
    name_or_path: str, config: str | None = None, split: str = "train", limit: int | None = None
) -> Dataset:
    """Loads a data set of prompts, from the hub or from a local file.

    Args:
        name_or_path (`str`): a path that ends in `.jsonl`, `.json`, `.parquet` or `.csv`, or a hub id.
        config (`str`, *optional*): configuration of a data set from the hub.
        split (`str`, *optional*, defaults to `"train"`): split of a data set from the hub; a file has no splits.
        limit (`int`, *optional*): keep the first so many rows.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if there is no row.
    """
    suffix = Path(name_or_path).suffix
    builders = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    if suffix in builders:
        if not Path(name_or_path).is_file():
            raise FileNotFoundError(f"There is no data file {name_or_path}.")
        with open(name_or_path, "rb") as file:
            if not file.read(4096).strip():
                raise ValueError(f"{name_or_path} is empty: it needs a row per prompt.")
        dataset = load_dataset(builders[suffix], data_files=str(name_or_path), split="train")
    else:
        dataset = load_dataset(name_or_path, config, split=split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise ValueError(f"{name_or_path} holds no rows (limit {limit}).")
    return dataset


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: text as it is, messages through the chat template with the generation prompt."""
    ids = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            row = tokenizer(prompt)["input_ids"]
        else:
            row = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not row:
            raise ValueError(f"Prompt {index} has no tokens ({prompt!r}): the first value is read at its last token.")
        ids.append(list(row))
    return ids


def generation_eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those of the model's generation config, ascending."""
    configured = model.generation_config.eos_token_id
    ids = set(configured) if isinstance(configured, list) else {configured}
    return sorted((ids | {tokenizer.eos_token_id}) - {None})


class RolloutSampler:
    """A sampling job: the plan of its batches, and their sampling with transformers' `generate`.

    Arguments as in [`sample_rollouts`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        seed: int,
        extra_columns: dict[str, Sequence[Any]] | None = None,
    ):
        check_pad_is_not_eos(tokenizer)
        if not len(prompts):
            raise ValueError("There is no prompt to sample from.")
        self.model, self.tokenizer, self.settings, self.seed = model, tokenizer, settings, seed
        self.prompts = list(prompts)
        self.extra_columns = {name: list(column) for name, column in (extra_columns or {}).items()}
        reserved = sorted(set(self.extra_columns) & set(REQUIRED_COLUMNS))
        if reserved:
            raise ValueError(f"Columns {reserved} have the names of a rollout's own fields: rename or remove them.")
        for name, column in self.extra_columns.items():
            if len(column) != len(self.prompts):
                raise ValueError(f"Column {name!r} has {len(column)} entries for {len(self.prompts)} prompts.")
        self.prompt_ids = tokenize_prompts(tokenizer, self.prompts)
        # A pad token among the model's further end ids is harmless: a completion is over at the first end id.
        self.eos_token_ids = generation_eos_ids(model, tokenizer)
        self._check_room()

    def _check_room(self) -> None:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(range(len(self.prompts)), key=lambda index: len(self.prompt_ids[index]))
        needed = len(self.prompt_ids[longest]) + self.settings.max_new_tokens
        if context is not None and needed > context:
            raise ValueError(
                f"Prompt {longest} has {len(self.prompt_ids[longest])} tokens; with max_new_tokens "
                f"{self.settings.max_new_tokens} it exceeds the model's context of {context}. Lower max_new_tokens or "
                "leave out the prompt: prompts are never cut."
            )

    def plan(self) -> list[list[tuple[int, int]]]:
        """The (prompt, sample) pairs of each batch: prompts of similar length together, in an order that is fixed."""
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompt_ids[index]))
        pairs = [(prompt, sample) for prompt in order for sample in range(self.settings.num_samples)]
        size = self.settings.batch_size
        return [pairs[start : start + size] for start in range(0, len(pairs), size)]

    def metadata(self, generator: str | None = None) -> RolloutMetadata:
        """What a file of these rollouts says about itself. `sampling["plan"]` tells two different jobs apart."""
        settings = asdict(self.settings)
        generator = generator or self.model.config.name_or_path or f"{type(self.model).__name__} in memory"
        job = [generator, settings, self.seed, self.eos_token_ids, self.prompt_ids, self.prompts, self.extra_columns]
        plan = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
        return RolloutMetadata(
            generator=generator,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            sampling={**settings, "backend": "transformers", "plan": plan},
            seed=self.seed,
            eos_token_ids=self.eos_token_ids,
        )

    def run(self, done: dict[int, Any] | None = None) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yields (index of the batch, its records) for every batch of the plan that is not in `done`."""
        plan = self.plan()
        todo = [index for index in range(len(plan)) if index not in (done or {})]
        tokens = cut = completions = 0
        start = time.perf_counter()
        with tqdm(total=sum(len(plan[index]) for index in todo), desc="sampling", unit="completion") as progress:
            for index in todo:
                records = self._sample_batch(index, plan[index])
                tokens += sum(len(record["completion_ids"]) for record in records)
                cut += sum(record["finish_reason"] == "length" for record in records)
                completions += len(records)
                rate = tokens / (time.perf_counter() - start)
                progress.set_postfix_str(f"{rate:.0f} tokens/s, {cut / completions:.1%} truncated", refresh=False)
                progress.update(len(records))
                yield index, records
        if completions:
            share = 100 * cut / completions
            logger.info("sampled %d completions, %d tokens, %.1f%% truncated", completions, tokens, share)

    def in_order(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Records by prompt; samples of one prompt stay in the order of the plan."""
        return sorted(records, key=lambda record: record["group"])

    def _sample_batch(self, index: int, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        rows = self._generate([self.prompt_ids[prompt] for prompt, _ in pairs], index)
        records = []
        for (prompt, _), row in zip(pairs, rows, strict=True):
            completion, finish_reason = strip_completion(row, self.eos_token_ids, self.settings.max_new_tokens)
            extra = {name: column[prompt] for name, column in self.extra_columns.items()}
            records.append(
                {
                    "prompt": self.prompts[prompt],
                    "prompt_ids": self.prompt_ids[prompt],
                    "completion_ids": completion,
                    "finish_reason": finish_reason,
                    "group": prompt,
                    **extra,
                }
            )
        return records

    @torch.no_grad()
    def _generate(self, prompt_ids: list[list[int]], index: int) -> list[list[int]]:
        width = max(len(row) for row in prompt_ids)
        pad = self.tokenizer.pad_token_id
        device = self.model.device
        input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompt_ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids], device=device)
        with _bare_generation(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch_seed(self.seed, index))
            output = self.model.generate(input_ids, attention_mask=mask, generation_config=self._generation_config())
        return output[:, width:].tolist()

    def _generation_config(self) -> GenerationConfig:
        settings = self.settings
        common = {
            "max_new_tokens": settings.max_new_tokens,
            "eos_token_id": self.eos_token_ids,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if settings.temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k, **common
        )


def strip_completion(row: Sequence[int], eos_token_ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], str]:
    """A generated row without the padding after its end, and its finish reason.

    Args:
        row (`Sequence[int]`): generated ids, padded to the width of the batch.
        eos_token_ids (`Sequence[int]`): ids that end a completion; the first of them is kept.
        max_new_tokens (`int`): width of a row that was cut.

    Returns:
        `tuple[list[int], str]`: the ids as sampled, and `"stop"` or `"length"`.

    Raises:
        ValueError: if a row without an end is shorter than `max_new_tokens`: something else stopped it.
    """
    ends = set(eos_token_ids)
    for place, token in enumerate(row):
        if token in ends:
            return list(row[: place + 1]), "stop"
    if len(row) != max_new_tokens:
        raise ValueError(
            f"A completion stopped after {len(row)} of {max_new_tokens} tokens without any of the end-of-sequence ids "
            f"{sorted(ends)}; remove the stopping criterion that did it, or add its token to the ids."
        )
    return list(row), "length"


def batch_seed(seed: int, index: int) -> int:
    """A seed for batch `index`; hashed, so that neighbouring seeds and batches share no random stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1


@contextmanager
def _bare_generation(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills whatever a config leaves open from the model's own generation config: that one is put aside."""
    kept, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = kept
        model.train(training)
