"""An engine of vLLM in this process that samples the arms of an evaluation, guided by a length value model or not.

vLLM is none of this project's requirements: run a program with `--backend vllm` by the Python of an environment that
has it (`make test-vllm` makes `.venv-vllm`). The candidate rule of a request that is not guided is applied by the
processor too, so that it is the same in every arm. What a processor cannot hand back is not known of its completions:
what a hard bound overruled, and how far a tilt led away.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from peft import AutoPeftModelForCausalLM
from transformers.hf_argparser import HfArg

from eval.runs import CandidateArguments
from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.requests import MOST_CANDIDATES, keys_of_guidance
from lenvm_rl.modeling.loading import ADAPTER_FILE, load_tokenizer
from lenvm_rl.rollouts.vllm import engine_defaults, import_vllm, random_states_kept, read_engine_arguments

TRANSFORMERS, VLLM = "transformers", "vllm"
PROCESSOR = "lenvm_rl.decoding.vllm:LengthGuidanceProcessor"
# Read by vLLM when it is imported.
ENGINE_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Tokens in one step of the engine, where a prompt is not read in parts.
READ_AT_ONCE = 2048
# Of a GPU's memory, where --engine_arguments do not say: the length value model and what scores texts need the rest.
GPU_SHARE = 0.5


def engine_in_process() -> ModuleType:
    """The module `vllm`, whose engines run in this process and on the cores that it has."""
    for name, value in ENGINE_VARIABLES.items():
        os.environ.setdefault(name, value)
    return import_vllm()


@contextmanager
def whole_model(path: str) -> Iterator[str]:
    """Where a model lies whole: at the path itself, or while the context lasts, adapters merged into their base."""
    if not (Path(path).expanduser() / ADAPTER_FILE).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        model = AutoPeftModelForCausalLM.from_pretrained(path).merge_and_unload()
        for part in (model, load_tokenizer(path)):
            part.save_pretrained(folder)
        yield folder


@dataclass
class SamplingArguments(CandidateArguments):
    """Arguments of a program whose arms are sampled by transformers or by vLLM."""

    _argument_group_name = "Backend"

    backend: str = HfArg(
        default=TRANSFORMERS,
        help="What samples: transformers, or vllm in this process (to be installed by itself), where batch_size "
        "requests decode together.",
        metadata={"choices": [TRANSFORMERS, VLLM]},
    )
    dtype: str = HfArg(default="float32", help="vllm: dtype of the policy while it samples, such as bfloat16.")
    value_dtype: str = HfArg(default="float32", help="vllm: dtype of the length value model's decoder.")
    engine_arguments: str | None = HfArg(
        default=None, help="vllm: further arguments of vllm.LLM as JSON, e.g. '{\"gpu_memory_utilization\": 0.7}'."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend not in (TRANSFORMERS, VLLM):
            raise ValueError(f"backend must be {TRANSFORMERS} or {VLLM}, got {self.backend!r}.")
        if self.backend == VLLM and not 1 <= self.top_k <= MOST_CANDIDATES:
            raise ValueError(f"top_k must lie in [1, {MOST_CANDIDATES}] with --backend vllm, got {self.top_k}.")
        read_engine_arguments(self.engine_arguments)

    def make_engine(self, longest: Callable[[], int]) -> GuidedEngine | None:
        """The engine of complete arguments, for prompts and completions of `longest()` tokens together; `None` where
        transformers samples."""
        if self.backend == TRANSFORMERS:
            return None
        return GuidedEngine(
            policy=self.policy,
            length_value_model=self.length_value_model,
            base=self.base or self.policy,
            max_model_len=longest(),
            places=self.batch_size,
            dtype=self.dtype,
            value_dtype=self.value_dtype,
            engine_arguments=read_engine_arguments(self.engine_arguments),
        )


@dataclass(frozen=True)
class EngineRequest:
    """One completion to be sampled: after which ids, guided how, of at most how many tokens (the end counted)."""

    prompt_ids: list[int]
    guidance: LengthGuidance
    max_new_tokens: int
    seed: int


@dataclass
class GuidedEngine:
    """`vllm.LLM` with the project's logits processor, loaded when the first completion is needed.

    Args:
        policy (`str`), length_value_model (`str`): folders or hub ids; adapters of a policy are merged into it.
        base (`str`): what a length value model of form adapter or head was fitted on.
        max_model_len (`int`): tokens of the longest prompt with its completion.
        places (`int`): requests that decode together.
        dtype (`str`), value_dtype (`str`): of the policy, and of the length value model's decoder.
        engine_arguments (`dict`): further arguments of `vllm.LLM`; they go before these.
    """

    policy: str
    length_value_model: str
    base: str
    max_model_len: int
    places: int
    dtype: str
    value_dtype: str
    engine_arguments: dict[str, Any]

    def __post_init__(self) -> None:
        self._llm: Any = None

    @property
    def description(self) -> dict[str, Any]:
        """What completions depend on beside the requests and the weights."""
        return {"backend": VLLM, "dtype": self.dtype, "value_dtype": self.value_dtype, **self.engine_arguments}

    def complete(
        self, requests: Sequence[EngineRequest], eos_token_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """Number and token ids of each request's completion, as soon as it is over: it is cut, or the last of its
        tokens is one of `eos_token_ids`."""
        if not requests:
            return
        vllm, engine = engine_in_process(), self._load().llm_engine
        for number, request in enumerate(requests):
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            engine.add_request(str(number), prompt, self._params(vllm, request, eos_token_ids))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    # vLLM may add to a request's name.
                    yield int(output.request_id.split("-")[0]), list(output.outputs[0].token_ids)

    def _load(self) -> Any:
        if self._llm is None:
            vllm = engine_in_process()
            settings = {
                "dtype": self.dtype,
                "max_model_len": self.max_model_len,
                "max_num_seqs": self.places,
                "generation_config": "vllm",
                "gpu_memory_utilization": GPU_SHARE,
                "enable_prefix_caching": False,
                "logits_processors": [PROCESSOR],
                "additional_config": {
                    "length_value_model": self.length_value_model,
                    "length_value_base": self.base,
                    "length_value_dtype": self.value_dtype,
                },
            }
            defaults = engine_defaults()
            if not defaults.get("enable_chunked_prefill", True):
                # A prompt that is read at once needs room for all of it.
                settings["max_num_batched_tokens"] = max(READ_AT_ONCE, self.max_model_len)
            with random_states_kept(), whole_model(self.policy) as policy:
                self._llm = vllm.LLM(policy, **(defaults | settings | self.engine_arguments))
        return self._llm

    def _params(self, vllm: ModuleType, request: EngineRequest, eos_token_ids: Sequence[int]) -> Any:
        """Temperature and candidate rule are the guidance's own; nothing comes from the model's generation config."""
        return vllm.SamplingParams(
            temperature=request.guidance.temperature,
            max_tokens=request.max_new_tokens,
            seed=request.seed % 2**31,
            stop_token_ids=list(eos_token_ids),
            detokenize=False,
            extra_args=keys_of_guidance(request.guidance),
        )
