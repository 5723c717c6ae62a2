"""Rollouts from a policy in this process, and the prompts for them; the token ids are kept exactly as sampled.

From a server: `lenvm_rl.rollouts.server`; with vLLM: `lenvm_rl.rollouts.vllm`.

The work is cut into batches by a plan that depends on the prompts and the settings only, and every batch has a seed of
its own. So a run gives the same records every time, and [`sample_to_file`], killed at any moment and started again,
ends with the records of an unbroken run. That holds too where a length value model groups the prompts: its weights
belong to the settings, and its predictions are kept in the journal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.endings import end_token_ids, strip_completion
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.completions import pad_left
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.prediction import (
    boundary_logits,
    check_predictor,
    length_aware_batches,
    lengths_from_logits,
    weights_fingerprint,
)
from lenvm_rl.rollouts.job import SamplingJob, SamplingSettings, batch_seed, in_order, run_to_file
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.tokenization import Prompt, check_same_tokenizer, load_prompts

__all__ = ["RolloutSampler", "load_prompts", "sample_rollouts", "sample_to_file"]


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
    length_value_model: LengthValueModel | None = None,
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
        num_samples, max_new_tokens, temperature, top_p, top_k, batch_size: see
            [`~lenvm_rl.rollouts.SamplingSettings`].
        seed (`int`): the same seed, prompts, settings, model and hardware give the same records.
        extra_columns (`dict[str, Sequence]`, *optional*): further columns, one entry per prompt.
        length_value_model (`LengthValueModel`, *optional*): groups prompts into batches by the length that it predicts,
            longest first, instead of by the length of the prompt. Other batches, other random streams: completions
            differ, their distribution does not.

    Returns:
        `list[dict]`: rollout records (see `lenvm_rl.rollouts.record`), `num_samples` for each prompt, in the order of
        the prompts. `group` is the index of the prompt.

    Raises:
        ValueError: if pad is an end-of-sequence token, a prompt has no tokens or leaves no room for `max_new_tokens`
            in the model's context, there is no prompt, an extra column has another length, or the length value model
            cannot predict for this tokenizer (see [`~lenvm_rl.prediction.predict_length`]).
    """
    settings = SamplingSettings(num_samples, max_new_tokens, batch_size, temperature, top_p, top_k)
    sampler = RolloutSampler(model, tokenizer, prompts, settings, seed, extra_columns, length_value_model)
    return in_order(dict(sampler.run()))


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
    length_value_model: LengthValueModel | None = None,
) -> tuple[Dataset, RolloutMetadata]:
    """[`sample_rollouts`] into a file, in steps that survive being killed.

    Killed at any moment and started again with the same arguments, it goes on where it was, see
    [`~lenvm_rl.rollouts.job.run_to_file`]. If the finished file exists already, it is read, not sampled.

    Args:
        path (`str` or `os.PathLike`): a name that ends in `.jsonl` or `.parquet`.
        model, tokenizer, prompts, seed, extra_columns, length_value_model: as in [`sample_rollouts`].
        settings ([`~lenvm_rl.rollouts.SamplingSettings`]): how to sample.
        generator (`str`, *optional*, defaults to the model's `name_or_path`): what the metadata calls the policy.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: as `read_rollouts` gives them.

    Raises:
        ValueError: as [`sample_rollouts`]; also if a finished file or a journal under this name was begun with other
            arguments.
    """
    sampler = RolloutSampler(model, tokenizer, prompts, settings, seed, extra_columns, length_value_model)
    return run_to_file(path, sampler, generator or model.config.name_or_path or f"{type(model).__name__} in memory")


class RolloutSampler(SamplingJob):
    """A sampling job with transformers' `generate`; a step is a batch, whose completions share a random stream.

    Arguments as in [`sample_rollouts`].
    """

    engine = "transformers"
    depends_on_batch_size = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        seed: int,
        extra_columns: dict[str, Sequence[Any]] | None = None,
        length_value_model: LengthValueModel | None = None,
    ):
        ends = end_token_ids(tokenizer, model.generation_config)
        super().__init__(tokenizer, prompts, settings, seed=seed, extra_columns=extra_columns, eos_token_ids=ends)
        self.model, self.length_value_model = model, length_value_model
        self._predicted: list[float] | None = None
        self.check_room(context_of(model.config))
        if length_value_model is not None:
            check_predictor(length_value_model)
            check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)

    def description(self):
        """See [`~lenvm_rl.rollouts.job.SamplingJob.description`]."""
        if self.length_value_model is None:
            return {}
        return {"batches_by": "predicted length", "length_value_model": weights_fingerprint(self.length_value_model)}

    def prepare(self, kept=None):
        """The prompts' predicted lengths, if batches are made by them.

        Two forwards of one model agree but for the last bits, which is enough to swap two prompts.
        """
        if self.length_value_model is None:
            return []
        if kept is None:
            logits = boundary_logits(self.length_value_model, self.prompt_ids)
            predicted = lengths_from_logits(logits, self.length_value_model.config.gamma).tolist()
            kept = [{"predicted_length": length} for length in predicted]
        self._predicted = [entry["predicted_length"] for entry in kept]
        return kept

    def plan(self) -> list[list[tuple[int, int]]]:
        """The (prompt, sample) pairs of each batch: prompts of similar length together, in an order that is fixed.

        With a length value model it is the completions that are of similar length, as far as it can tell.
        """
        size, samples = self.settings.batch_size, self.settings.num_samples
        if self.length_value_model is not None:
            if self._predicted is None:
                self.prepare()
            lengths = [self._predicted[self.prompt_of(number)] for number in range(len(self))]
            return [[divmod(number, samples) for number in batch] for batch in length_aware_batches(lengths, size)]
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompt_ids[index]))
        pairs = [(prompt, sample) for prompt in order for sample in range(samples)]
        return [pairs[start : start + size] for start in range(0, len(pairs), size)]

    def step_sizes(self):
        """See [`~lenvm_rl.rollouts.job.SamplingJob.step_sizes`]."""
        return [len(batch) for batch in self.plan()]

    def sample(self, steps: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.sample`]."""
        plan = self.plan()
        for index in steps:
            yield index, self._sample_batch(index, plan[index])

    def _sample_batch(self, index: int, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        rows = self._generate([self.prompt_ids[prompt] for prompt, _ in pairs], index)
        return [
            self.record_of(prompt, *strip_completion(row, self.eos_token_ids, self.settings.max_new_tokens))
            for (prompt, _), row in zip(pairs, rows, strict=True)
        ]

    @torch.no_grad()
    def _generate(self, prompt_ids: list[list[int]], index: int) -> list[list[int]]:
        device = self.model.device
        input_ids, mask = pad_left(prompt_ids, self.pad_token_id, device)
        with _bare_generation(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch_seed(self.seed, index))
            output = self.model.generate(input_ids, attention_mask=mask, generation_config=self._generation_config())
        return output[:, input_ids.shape[1] :].tolist()

    def _generation_config(self) -> GenerationConfig:
        settings = self.settings
        common = {
            "max_new_tokens": settings.max_new_tokens,
            "eos_token_id": self.eos_token_ids,
            "pad_token_id": self.pad_token_id,
        }
        if settings.temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k, **common
        )


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
