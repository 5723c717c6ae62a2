"""Length guidance inside vLLM, by a custom logits processor.

    vllm serve MODEL --logits-processors lenvm_rl.decoding.vllm:LengthGuidanceProcessor \
        --additional-config '{"length_value_model": "path/to/lenvm"}'

    LLM(MODEL, logits_processors=["lenvm_rl.decoding.vllm:LengthGuidanceProcessor"],
        additional_config={"length_value_model": "path/to/lenvm"})

A request asks for guidance by the keys of [`lenvm_rl.decoding.requests`], in `SamplingParams.extra_args`, over HTTP in
`vllm_xargs`; one without such keys is untouched. What a processor cannot hand back, predicted lengths and what a hard
bound overruled, is not in the answer: see [`lenvm_rl.prediction`].

Settings of the engine, in `additional_config`:

- `length_value_model`: its path. Of the forms adapter and head it is read on a decoder of its own, `length_value_base`,
  by default a second copy of the served model: vLLM's weights are laid out for its own kernels.
- `length_value_dtype`: `"float32"` (default) or `"bfloat16"`, of its decoder; the head stays float32.
- `length_value_cache_tokens`: the most tokens whose keys and values the length value model holds, see
  [`~lenvm_rl.decoding.scoring.SlotScorer`]; by default those of all live requests.

Written for the interfaces of vLLM 0.32, of both its runners: V1, which the CPU has, and V2. Name the processor in
`logits_processors` as above: with asynchronous scheduling vLLM keeps output tokens at hand only for those.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.requests import guidance_of_request
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.decoding.step import GuidedRow, guide_rows
from lenvm_rl.modeling.loading import load_length_value_model, read_config
from lenvm_rl.modeling.sharing import FULL

logger = logging.getLogger(__name__)

# What would act on the guided distribution, and the value at which it does not: the runner applies these afterwards.
NEUTRAL = {
    "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
OF_GUIDANCE = ("top_p", "min_p")


def guidance_of_params(params: SamplingParams) -> LengthGuidance | None:
    """The guidance that the parameters of a request ask for, `None` if they ask for none.

    Raises:
        ValueError: a setting of guidance is wrong, or one of sampling would act on the guided distribution.
    """
    guidance = guidance_of_request(params.extra_args or {}, params.temperature, params.max_tokens, params.min_tokens)
    if guidance is None:
        return None
    for name, neutral in NEUTRAL.items():
        if getattr(params, name) != neutral:
            instead = f" and set length_{name}" if name in OF_GUIDANCE else ""
            raise ValueError(
                f"{name}={getattr(params, name)} would act on the guided distribution: leave it out{instead}."
            )
    if params.top_k > 0:
        raise ValueError(
            f"top_k={params.top_k} would act on the guided distribution: leave it out and set length_top_k."
        )
    if params.ignore_eos and not params.stop_token_ids:
        raise ValueError(
            "ignore_eos=True leaves no token that ends a completion, and guidance is about where one ends: leave it "
            "out, or name ends in stop_token_ids."
        )
    return guidance


@dataclass(eq=False)
class GuidedRequest:
    """A guided request: what it asks for, and how many of its tokens the scorer knows."""

    guidance: LengthGuidance
    ends: tuple[int, ...]
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    known: int = 0

    @classmethod
    def of_params(cls, params: SamplingParams) -> GuidedRequest | None:
        """A request of these parameters; `None` where guidance would change nothing."""
        guidance = guidance_of_params(params)
        if guidance is None or not (guidance.needs_values or guidance.truncates):
            return None
        # Not all_stop_token_ids, in which vLLM keeps the model's own ends under ignore_eos as well.
        ends = [] if params.eos_token_id is None else [params.eos_token_id]
        return cls(guidance, tuple(ends + sorted(set(params.stop_token_ids or ()) - set(ends))))


class RequestGuide:
    """Guides the rows of a step, whichever runner they come from; holds the length value model.

    Args:
        model (`LengthValueModel`): frozen, on the device where it is to compute.
        max_cached_tokens (`int`, *optional*): see [`~lenvm_rl.decoding.scoring.SlotScorer`].
    """

    def __init__(self, model: nn.Module, max_cached_tokens: int | None = None):
        self.gamma = model.config.gamma
        self.scorer = SlotScorer(model, max_cached_tokens=max_cached_tokens)

    def forget(self, request: GuidedRequest) -> None:
        """A request that is over, or was interrupted: it comes back with all its tokens."""
        if request.slot is not None:
            self.scorer.remove(request.slot)
            request.slot, request.known = None, 0

    @torch.no_grad()
    def apply(self, logits: Tensor, rows: list[tuple[int, GuidedRequest]]) -> Tensor:
        """Puts guided scores in the place of some rows of `logits` `(B, V)`; returns `logits`."""
        if not rows:
            return logits
        guided = []
        for _, request in rows:
            if request.guidance.needs_values:
                self._catch_up(request)
            guided.append(GuidedRow(request.guidance, request.ends, len(request.output_ids), request.slot))
        at = torch.tensor([row for row, _ in rows], device=logits.device)
        step = guide_rows(guided, logits[at], self.scorer, self.gamma)
        # The runner divides by the temperature, which is in the guided scores.
        temperatures = [[request.guidance.temperature or 1.0] for _, request in rows]
        logits[at] = step.scores * torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)
        return logits

    def _catch_up(self, request: GuidedRequest) -> None:
        prompt, output = request.prompt_ids, request.output_ids
        if request.slot is None:
            request.slot = self.scorer.add(prompt + output)
        elif request.known < len(prompt) + len(output):
            self.scorer.append(request.slot, output[request.known - len(prompt) :])
        request.known = len(prompt) + len(output)


def load_guide(vllm_config: Any, device: torch.device) -> RequestGuide:
    """The guide that an engine's `additional_config` asks for.

    Args:
        vllm_config (`vllm.config.VllmConfig`): of the engine.
        device (`torch.device`): where its logits are.
    """
    settings = getattr(vllm_config, "additional_config", None) or {}
    path = settings.get("length_value_model")
    if not path:
        raise ValueError("length_value_model is missing: give --additional-config '{\"length_value_model\": PATH}'.")
    base = settings.get("length_value_base")
    if read_config(path).form != FULL and base is None:
        base = vllm_config.model_config.model
        logger.warning("the length value model has no decoder of its own: %s is loaded once more for it", base)
    default = torch.get_default_dtype()
    # vLLM makes models with another one, and a float32 head is to stay one.
    torch.set_default_dtype(torch.float32)
    try:
        model = load_length_value_model(path, base, device=device, dtype=settings.get("length_value_dtype", "float32"))
    finally:
        torch.set_default_dtype(default)
    if device.type == "cpu":
        use_kernels(model.backbone)
    return RequestGuide(model, settings.get("length_value_cache_tokens"))


def use_kernels(model: nn.Module) -> None:
    """Has the linear layers of a frozen model computed by vLLM's own kernels for CPUs, on weights that are laid out for
    them: about twice as fast for the few tokens of a step."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            layer.forward = partial(_linear, layer)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.cpu_linear(x, layer.weight, layer.bias)


class V1Rows:
    """Guided requests as rows of the persistent batch of runner V1, which tells of those that come, go and move."""

    def __init__(self, guide: RequestGuide):
        self._guide = guide
        self._requests: dict[int, GuidedRequest] = {}

    def update(self, update: BatchUpdate) -> None:
        """Follows the batch."""
        for index in update.removed:
            self._drop(index)
        for index, params, prompt_ids, output_ids in update.added:
            self._drop(index)
            request = GuidedRequest.of_params(params)
            if request is None:
                continue
            if prompt_ids is None:
                raise ValueError("length guidance reads token ids: a prompt of embeddings cannot be guided.")
            # A live list: the runner adds to it.
            request.prompt_ids, request.output_ids = prompt_ids, output_ids
            self._requests[index] = request
        for one, other, direction in update.moved:
            moved, replaced = self._requests.pop(one, None), self._requests.pop(other, None)
            if moved is not None:
                self._requests[other] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._requests[one] = replaced
            elif replaced is not None:
                self._guide.forget(replaced)

    def _drop(self, index: int) -> None:
        request = self._requests.pop(index, None)
        if request is not None:
            self._guide.forget(request)

    def rows(self, count: int) -> list[tuple[int, GuidedRequest]]:
        """The guided ones of the first `count` rows."""
        found = sorted((index, request) for index, request in self._requests.items() if index < count)
        for _, request in found:
            if request.output_ids and request.output_ids[-1] < 0:
                raise RuntimeError(
                    "vLLM has not filled in the last token (asynchronous scheduling): name this processor in "
                    "--logits-processors, for an entry point alone does not make the runner keep output tokens."
                )
        return found


class V2Rows:
    """Guided requests as slots of runner V2, which tells of a slot when it is filled and never when it is free."""

    def __init__(self, guide: RequestGuide, states: Any):
        self._guide, self._states = guide, states
        self._requests: dict[int, GuidedRequest] = {}

    def fill(self, slot: int, params: SamplingParams) -> bool:
        """A request comes into a slot; whether it is guided."""
        before = self._requests.pop(slot, None)
        if before is not None:
            self._guide.forget(before)
        request = GuidedRequest.of_params(params)
        if request is not None:
            self._requests[slot] = request
        return request is not None

    def rows(self, context: Any) -> list[tuple[int, GuidedRequest]]:
        """The guided rows of a step, but for those that read a part of their prompt only."""
        found = []
        for row, slot in enumerate(context.idx_mapping_np.tolist()):
            request = self._requests.get(slot)
            length = int(context.seq_lens_upper_bound_np[row])
            if request is None or length < int(self._states.prefill_len.np[slot]):
                continue
            have = len(request.prompt_ids) + len(request.output_ids)
            new = self._states.all_token_ids.gpu[slot, have:length].tolist()
            if not have:
                prompt = int(self._states.prompt_len.np[slot])
                request.prompt_ids, new = new[:prompt], new[prompt:]
            request.output_ids += new
            found.append((row, request))
        return found


class LengthGuidanceProcessor(LogitsProcessor, LogitsProcessorV2):
    """The logits processor, for whichever runner makes it: each asks for a subclass of its own interface only.

    Args:
        vllm_config (`vllm.config.VllmConfig`): of the engine.
        place: V1's device, or V2's states of requests.
        is_pin_memory (`bool`, *optional*): V1's; it makes no difference here.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses a request whose guidance makes no sense; over HTTP that is a 400 with the sentence."""
        try:
            guidance_of_params(sampling_params)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool | None = None):
        self._is_v1 = isinstance(place, torch.device)
        self.guide = self.make_guide(vllm_config, place if self._is_v1 else place.device)
        self._followed = V1Rows(self.guide) if self._is_v1 else V2Rows(self.guide, place)

    def make_guide(self, vllm_config: Any, device: torch.device) -> RequestGuide:
        """What guides the rows: by default with the length value model that `additional_config` names."""
        return load_guide(vllm_config, device)

    def is_argmax_invariant(self) -> bool:
        """Guidance may change which token is the most probable."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: how the batch changed."""
        if batch_update is not None:
            self._followed.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request came into a slot."""
        return self._followed.fill(req_idx, sampling_params)

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Guides the rows that ask for it."""
        # Tokens are read here: with asynchronous scheduling the lists are mended just before.
        followed = self._followed
        rows = followed.rows(logits.shape[0]) if self._is_v1 else followed.rows(context)
        return self.guide.apply(logits, rows)
