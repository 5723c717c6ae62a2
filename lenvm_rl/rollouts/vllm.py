"""Rollouts from vLLM in this process: the fastest engine on a machine with GPUs.

vLLM is none of this library's requirements and of none of its extras, because it insists on a torch version of its
own: install it as its documentation says, in an environment where this library's requirements still hold.

Run for real with vLLM 0.32 on a CPU (`tests/engine/test_engine_rollouts.py`).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lenvm_rl.endings import strip_completion
from lenvm_rl.rollouts.job import SamplingJob, SamplingSettings
from lenvm_rl.tokenization import Prompt

logger = logging.getLogger(__name__)


def import_vllm():
    """The module `vllm`; where it is not installed, the error says what to do. On a CPU its engines run in this process
    unless the environment says otherwise: one of its own takes a core to wait in."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            "vLLM is not installed here. Install it on a machine with a GPU as its documentation says, or sample with "
            "transformers (`lenvm_rl.rollouts.local`) or from a server (`lenvm_rl.rollouts.server`)."
        ) from error


def read_engine_arguments(text: str | None) -> dict[str, Any]:
    """Further arguments of `vllm.LLM` from the JSON of a command line; a `ValueError` if that is no object."""
    try:
        given = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"engine_arguments must be a JSON object ({error}): {text}") from error
    if not isinstance(given, dict):
        raise ValueError(f"engine_arguments must be a JSON object, got {text}.")
    return given


class VLLMJob(SamplingJob):
    """A sampling job whose completions come from `vllm.LLM`, which is loaded when the first is needed.

    Killed, it loses what was under way: `batch_size` completions at most. The metadata's `sampling` says with which
    version of vLLM (`vllm_version`) and in which `dtype` they were sampled; what was begun in one dtype goes on in no
    other.

    Args:
        model (`str`): folder or hub id of the policy.
        tokenizer, prompts, settings, job (`seed`, `extra_columns`, `eos_token_ids`): see
            [`~lenvm_rl.rollouts.job.SamplingJob`]. `batch_size` is the number of completions per call; some thousands
            keep the engine busy.
        engine_arguments (`dict`, *optional*): further arguments of `vllm.LLM` (`tensor_parallel_size`, `dtype`,
            `max_model_len`, ...). Left to itself, vLLM computes in 16 bits where the checkpoint has 32.
    """

    engine = "vllm"

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        engine_arguments: dict[str, Any] | None = None,
        **job: Any,
    ):
        super().__init__(tokenizer, prompts, settings, **job)
        self.model = self.policy_name = model
        self.engine_arguments = dict(engine_arguments or {})
        # What is asked for, before the engine takes its minutes to load; without a word, it says itself what it takes.
        asked = self.engine_arguments.get("max_model_len")
        self.check_room(asked if isinstance(asked, int) and asked > 0 else None)
        self._llm: Any = None
        self._facts: dict[str, str] | None = None

    def description(self) -> dict[str, Any]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.description`]."""
        return {"model": self.model, "token_ids": "sampled", "engine_arguments": self.engine_arguments}

    def prepare(self, kept: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """What the engine made of the settings: of no influence on the steps, but known only once it is loaded."""
        if kept is None:
            self._load()
        else:
            [self._facts] = kept
        return [self._facts]

    def report(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.report`]."""
        return dict(self._facts or {})

    def _load(self) -> Any:
        """The engine, loaded when it is needed first, without a trace in the caller's random numbers."""
        if self._llm is not None:
            return self._llm
        vllm = import_vllm()
        with random_states_kept():
            self._llm = vllm.LLM(model=self.model, seed=self.seed, **(engine_defaults() | self.engine_arguments))
        config = self._llm.llm_engine.model_config
        self.check_room(config.max_model_len)
        facts = {"vllm_version": vllm.__version__, "dtype": str(config.dtype).removeprefix("torch.")}
        begun = self._facts or facts
        if begun["dtype"] != facts["dtype"]:
            raise ValueError(
                f"These rollouts were begun in {begun['dtype']}, and vLLM would go on in {facts['dtype']}: give "
                f"dtype={begun['dtype']!r} (with --engine_arguments), or start over under another path."
            )
        if begun != facts:
            logger.warning("begun with vLLM %s, goes on with %s", begun["vllm_version"], facts["vllm_version"])
        self._facts = begun
        logger.info("vLLM %s computes in %s", facts["vllm_version"], facts["dtype"])
        return self._llm

    def sample(self, steps: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.sample`]."""
        if not steps:
            return
        vllm, llm = import_vllm(), self._load()
        size = self.settings.batch_size
        for start in range(0, len(steps), size):
            batch = steps[start : start + size]
            prompts = [{"prompt_token_ids": self.prompt_ids[self.prompt_of(number)]} for number in batch]
            params = [self._params(vllm, number) for number in batch]
            with random_states_kept():
                outputs = llm.generate(prompts, params, use_tqdm=False)
            for number, output in zip(batch, outputs, strict=True):
                ids = list(output.outputs[0].token_ids)
                ended = strip_completion(ids, self.eos_token_ids, self.settings.max_new_tokens)
                yield number, [self.record(number, *ended)]

    def _params(self, vllm, number: int):
        """Every setting by name, so that nothing comes from the model's generation config."""
        settings = self.settings
        return vllm.SamplingParams(
            n=1,
            temperature=settings.temperature,
            top_p=settings.top_p,
            # Understood as every token by old and new versions alike.
            top_k=settings.top_k or -1,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            max_tokens=settings.max_new_tokens,
            seed=self.seed_of(number),
            stop_token_ids=self.eos_token_ids,
            detokenize=False,
        )


def engine_defaults() -> dict[str, Any]:
    """Settings of the engine where nobody gives them: on a CPU, a seed and a prompt that is read in parts end
    vLLM 0.32, whose generators there have no offset to go back to."""
    return {} if torch.accelerator.is_available() else {"enable_chunked_prefill": False}


@contextmanager
def random_states_kept() -> Iterator[None]:
    """vLLM seeds the random numbers of the process that it is loaded in, and on a CPU draws from them beside the seeds
    of requests: they are put back."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    # A GPU that nobody used yet has no state, and must not be touched before vLLM starts processes of its own.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
