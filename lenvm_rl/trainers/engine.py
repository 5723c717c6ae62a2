"""The vLLM that TRL runs inside of the processes of training: weights that can be loaded anew, and guided rollouts.

TRL makes the engine and hands it no logits processor, so it is given one where it is made; the length value model is
the trainer's own. Which completions are guided is said request by request: those of training.

What the engine says of a token is how probable it was where it was drawn, in the guided distribution p'. TRL computes
the policy's own p of it and multiplies the token's loss by ``min(p / p', vllm_importance_sampling_clip_max)``, which is
the weight that guided rollouts need ([`lenvm_rl.trainers.rollouts`]): nothing is weighed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial

import torch
import trl.generation.vllm_generation as trl_vllm
from torch import Tensor, nn

from lenvm_rl.decoding import LengthGuidance
from lenvm_rl.decoding.requests import MOST_CANDIDATES, keys_of_guidance
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.trainers.config import LenVMConfig

# A candidate rule is part of the guidance, and would act on the guided distribution once more.
NO_RULE = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def check_guided_engine(args: LenVMConfig, guidance: LengthGuidance) -> None:
    """Raise a `ValueError` where vLLM's completions cannot be guided, or would be weighed in another way."""
    if args.vllm_mode != "colocate":
        raise ValueError(
            f"rollout_guidance needs the engine in this process, and vllm_mode='{args.vllm_mode}' asks another one, "
            "which `trl vllm-serve` starts without a logits processor: set vllm_mode='colocate', or use_vllm=False."
        )
    if args.vllm_tensor_parallel_size != 1:
        raise ValueError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} has several processes sample one completion, "
            "and with rollout_guidance each would score its candidates by itself: set it to 1, or use_vllm=False."
        )
    if not args.vllm_importance_sampling_correction or args.vllm_importance_sampling_mode != "token_truncate":
        raise ValueError(
            "rollout_guidance draws every token from another distribution than the policy's, which TRL has to weigh "
            "token by token: set vllm_importance_sampling_mode='token_truncate', and leave "
            "vllm_importance_sampling_correction=True."
        )
    if guidance.needs_values and not 0 < args.top_k <= MOST_CANDIDATES:
        raise ValueError(
            f"top_k={args.top_k}: with vLLM, rollout_guidance scores so many candidates of every completion at every "
            f"step. Set it in [1, {MOST_CANDIDATES}]; 15 is usual."
        )
    if args.repetition_penalty != 1.0:
        raise ValueError(
            f"repetition_penalty={args.repetition_penalty} would act on the guided distribution, after it is tilted: "
            "leave it or rollout_guidance out."
        )


@contextmanager
def colocated_engine(
    args: LenVMConfig, guidance: LengthGuidance | None, find_model: Callable[[], nn.Module]
) -> Iterator[None]:
    """While it lasts, TRL makes the engine of a run as the run needs it; without an engine in this process, nothing.

    Args:
        args (`LenVMGRPOConfig` or `LenVMPPOConfig`): of the run.
        guidance ([`LengthGuidance`], *optional*): of its rollouts.
        find_model (`Callable`): see [`guided_engine`].
    """
    with ExitStack() as made:
        if args.use_vllm and args.vllm_mode == "colocate" and trl_vllm.is_vllm_available():
            made.enter_context(loadable_weights())
        if args.use_vllm and guidance is not None:
            check_guided_engine(args, guidance)
            made.enter_context(guided_engine(find_model))
        yield


@contextmanager
def loadable_weights() -> Iterator[None]:
    """While it lasts, engines on a CPU keep the weights of linear layers; on a GPU they do so anyway.

    vLLM packs them for a CPU's kernels and drops them. TRL would have nothing to load the next step's into, and what
    is packed would stay as it was.
    """
    # Loads vLLM, which is an extra of TRL's.
    import vllm.model_executor.layers.utils as vllm_layers

    pack = vllm_layers.dispatch_cpu_unquantized_gemm

    def keep(layer: nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            # vLLM's own way for a layer that it does not pack.
            layer.cpu_linear = nn.functional.linear
        else:
            pack(layer, remove_weight)

    vllm_layers.dispatch_cpu_unquantized_gemm = keep
    try:
        yield
    finally:
        vllm_layers.dispatch_cpu_unquantized_gemm = pack


@contextmanager
def guided_engine(find_model: Callable[[], nn.Module]) -> Iterator[None]:
    """While it lasts, TRL makes engines with a logits processor, which leaves completions alone that ask for nothing.

    Args:
        find_model (`Callable`): gives the frozen length value model, unwrapped, once a completion is to be guided.
            Before the engine there is no device to place it on.
    """
    # Loads vLLM, which is an extra of TRL's.
    from lenvm_rl.decoding.vllm import LengthGuidanceProcessor, RequestGuide

    class TrainerGuide(RequestGuide):
        """A guide that needs its model with the first guided request."""

        def __init__(self):
            pass

        @cached_property
        def scorer(self) -> SlotScorer:
            return SlotScorer(find_model())

        @cached_property
        def gamma(self) -> float:
            return find_model().config.gamma

    class TrainerProcessor(LengthGuidanceProcessor):
        """The processor, with the model of the trainer."""

        def make_guide(self, vllm_config, device):
            return TrainerGuide()

    made = trl_vllm.LLM
    trl_vllm.LLM = partial(made, logits_processors=[TrainerProcessor])
    try:
        yield
    finally:
        trl_vllm.LLM = made


@contextmanager
def guided_requests(engine: trl_vllm.VLLMGeneration, guidance: LengthGuidance) -> Iterator[None]:
    """While it lasts, completions of TRL's engine ask for guidance."""
    given = engine.generation_kwargs
    engine.generation_kwargs = {**given, **NO_RULE, "extra_args": keys_of_guidance(guidance)}
    try:
        yield
    finally:
        engine.generation_kwargs = given


def engine_ratio(batch: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """As [`~lenvm_rl.trainers.rollouts.importance_ratio`], read off a batch of TRL's, whose loss is weighed by it."""
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).nan_to_num(nan=0.0)
    ones = torch.ones_like(difference)
    return tuple(
        torch.where(mask.bool(), ratio, ones) for ratio in (difference.exp(), batch["importance_sampling_ratio"])
    )
