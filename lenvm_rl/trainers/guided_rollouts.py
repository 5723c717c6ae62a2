"""Rollouts that are guided in length: what they are drawn from, and how a loss for the policy corrects for it.

Guided completions are *off-policy*: token t is drawn from the guided distribution p', not from the policy p. The policy
gradient of a token is weighed by ``p(a_t | s_t) / p'(a_t | s_t)``, truncated from above, as TRL weighs the tokens of an
inference engine whose probabilities differ from the trainer's. That corrects each token given its prefix; the prefixes
remain those of guided completions, so the gradient is not that of the policy's own completions, and the nearer p' is to
p the less it matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lenvm_rl.decoding import GuidanceReport, LengthGuidance, generate_guided


def read_guidance(args) -> LengthGuidance | None:
    """The guidance of a run's rollouts, `None` where there is none.

    Temperature and candidate rule are those of the run, as for rollouts without guidance.

    Args:
        args (`LenVMConfig`): `rollout_guidance` and TRL's settings of sampling.

    Raises:
        `ValueError`: the settings make no guidance, or set what the run sets.
    """
    if args.rollout_guidance is None:
        return None
    owned = {"temperature": args.temperature, "top_k": args.top_k or 0, "top_p": args.top_p, "min_p": args.min_p or 0.0}
    stated = sorted(set(args.rollout_guidance) & set(owned))
    if stated:
        raise ValueError(
            f"rollout_guidance sets {', '.join(stated)}: leave that to the trainer's argument of that name."
        )
    unknown = sorted(set(args.rollout_guidance) - set(LengthGuidance.__dataclass_fields__))
    if unknown:
        raise ValueError(f"rollout_guidance has {', '.join(unknown)}, which no LengthGuidance has: check the spelling.")
    return LengthGuidance(**args.rollout_guidance, **owned)


def check_guided_rollouts(trainer) -> None:
    """Raise a `ValueError` where completions do not come from `generate` in this process, which alone can be guided."""
    args = trainer.args
    if args.use_vllm:
        raise ValueError(
            "rollout_guidance guides transformers' generate, not vLLM: set use_vllm=False or leave it out."
        )
    if trainer.use_transformers_continuous_batching:
        raise ValueError("rollout_guidance needs plain generate: leave continuous batching out.")
    if trainer.rollout_func is not None:
        raise ValueError("rollout_guidance and rollout_func both say how to generate: give one of them.")
    if trainer.tools:
        raise ValueError("rollout_guidance counts the tokens of one completion, which tool calls interrupt: drop one.")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("rollout_guidance is not supported with FSDP or DeepSpeed: use DDP or one process.")


@contextmanager
def guided_generation(
    model: PreTrainedModel, length_value_model: nn.Module, guidance: LengthGuidance
) -> Iterator[list[GuidanceReport]]:
    """While it lasts, `model.generate` is guided; gives the list of the reports of its calls.

    Args:
        model (`PreTrainedModel`): the policy, unwrapped.
        length_value_model (`LengthValueModel`): frozen, unwrapped, its tokenizer compared with the policy's.
        guidance ([`~lenvm_rl.decoding.LengthGuidance`]): how to guide.
    """
    reports: list[GuidanceReport] = []

    def generate(input_ids: Tensor, attention_mask: Tensor, generation_config, **arguments) -> Tensor:
        # The class's own method, which generate_guided is to find.
        del model.generate
        try:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            sequences, report = generate_guided(
                model,
                length_value_model,
                inputs,
                guidance,
                generation_config=generation_config,
                return_report=True,
                **arguments,
            )
        finally:
            model.generate = generate
        reports.append(report)
        return sequences

    model.generate = generate
    try:
        yield reports
    finally:
        del model.generate


def importance_ratio(report: GuidanceReport, mask: Tensor, maximum: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight of each token, ``min(p / p', maximum)``, and the sums that its metrics are made of.

    Args:
        report ([`~lenvm_rl.decoding.GuidanceReport`]): of the completions.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where a token exists.
        maximum (`float`): truncation.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: weights `(B, T)`, 1 where no token is; and `tokens`, `ratio` and
        `truncated`, sums over tokens.
    """
    exists, width = mask.bool(), mask.shape[1]
    difference = report.policy_log_probs - report.log_probs
    # TRL cuts off columns that hold padding only.
    difference = F.pad(difference, (0, max(0, width - difference.shape[1])))[:, :width]
    ratio = torch.where(exists, difference.exp(), 1.0)
    over = (ratio > maximum) & exists
    sums = {
        "tokens": exists.sum().float(),
        "ratio": (ratio * exists).sum(),
        "truncated": over.sum().float(),
    }
    return ratio.clamp(max=maximum), sums
