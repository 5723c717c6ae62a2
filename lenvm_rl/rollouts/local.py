"""Rollouts from a policy in this process, with transformers; the token ids are kept exactly as sampled.

The work is cut into batches by a plan that depends on the prompts and the settings only, and every batch has a seed of
its own. So a run gives the same records every time, and one that is killed at any moment and started again ends with
the records of an unbroken run. That holds too where a length value model groups the prompts: its weights belong to the
settings, and its predictions are kept in the journal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.endings import end_token_ids, strip_completion
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.completions import check_in_eval_mode, pad_left
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.prediction import boundary_logits, length_aware_batches, lengths_from_logits, weights_fingerprint
from lenvm_rl.rollouts.job import SamplingJob, SamplingSettings, batch_seed
from lenvm_rl.tokenization import Prompt, check_same_tokenizer


class TransformersJob(SamplingJob):
    """A sampling job with transformers' `generate`; a step is a batch, whose completions share a random stream.

    The settings given here are the only ones: what the model's generation config holds (a repetition penalty, top-k
    50, ...) is ignored, except for its end-of-sequence ids.

    Args:
        model (`PreTrainedModel`): the policy; its mode, its generation config and the global random state are left
            as they were.
        tokenizer, prompts, settings, extra_columns: see [`~lenvm_rl.rollouts.job.SamplingJob`].
        seed (`int`): the same seed, prompts, settings, model and hardware give the same records.
        length_value_model (`LengthValueModel`, *optional*): groups prompts into batches by the length that it predicts,
            longest first, instead of by the length of the prompt. Other batches, other random streams: completions
            differ, their distribution does not.
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
        self.policy_name = model.config.name_or_path or f"{type(model).__name__} in memory"
        self._predicted: list[float] | None = None
        self.check_room(context_of(model.config))
        if length_value_model is not None:
            check_in_eval_mode(length_value_model)
            check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)

    def description(self) -> dict[str, Any]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.description`]."""
        about = {"dtype": str(self.model.dtype).removeprefix("torch."), "weights": weights_fingerprint(self.model)}
        if self.length_value_model is None:
            return about
        planned = {"batches_by": "predicted length", "length_value_model": weights_fingerprint(self.length_value_model)}
        return {**about, **planned}

    def prepare(self, kept: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
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

    def plan(self) -> list[list[int]]:
        """The completions of each batch, by number: prompts of similar length together, in an order that is fixed.

        With a length value model it is the completions that are of similar length, as far as it can tell.
        """
        size = self.settings.batch_size
        if self.length_value_model is not None:
            if self._predicted is None:
                self.prepare()
            return length_aware_batches([self._predicted[self.prompt_of(number)] for number in range(len(self))], size)
        order = sorted(range(len(self)), key=lambda number: len(self.prompt_ids[self.prompt_of(number)]))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def step_sizes(self):
        """See [`~lenvm_rl.rollouts.job.SamplingJob.step_sizes`]."""
        return [len(batch) for batch in self.plan()]

    def sample(self, steps: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.sample`]."""
        plan = self.plan()
        for index in steps:
            yield index, self._sample_batch(index, plan[index])

    def _sample_batch(self, index: int, batch: list[int]) -> list[dict[str, Any]]:
        rows = self._generate([self.prompt_ids[self.prompt_of(number)] for number in batch], index)
        return [
            self.record(number, *strip_completion(row, self.eos_token_ids, self.settings.max_new_tokens))
            for number, row in zip(batch, rows, strict=True)
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
        settings, sampling = self.settings, {"do_sample": False}
        if settings.temperature > 0:
            sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
            sampling["do_sample"] = True
        ends = {"eos_token_id": self.eos_token_ids, "pad_token_id": self.pad_token_id}
        return GenerationConfig(max_new_tokens=settings.max_new_tokens, **ends, **sampling)


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
