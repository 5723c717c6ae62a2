"""How far an arm is from the base policy: Kullback-Leibler divergences of completions, in nats.

By the chain rule, the divergence of two distributions of completions is the mean, over completions of the first, of the
sum over the states that they visit of the divergence of the next token. So each completion's sum of *exact* divergences
of the next token, over all candidates, is an unbiased estimate, with less variance than the log-ratio of the sampled
tokens, whose conditional expectation it is (Rao & Blackwell). It counts up to the end or the cut: it is the divergence
of completions of at most `max_new_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor
from lenvm_rl.modeling.completions import choice_logits, pad_left, pad_right

# Logits held at once by one forward: 128 MiB in float32.
LOGITS_AT_ONCE = 2**25


def token_divergence(scores: Tensor, reference: Tensor) -> Tensor:
    """``KL(p || q)`` of the softmaxes `p` of `scores` and `q` of `reference`, `(..., V)`, in float64: `(...)`."""
    p, q = (each.double().log_softmax(dim=-1) for each in (scores, reference))
    return torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(dim=-1)


class DivergenceMeter(LogitsProcessor):
    """A tilt that sums up how far it leads away: the divergence of the guided from the unguided distribution.

    Both are over the candidates of the guidance's own rule, at its temperature: what is sampled, and what would be
    sampled at strength 0.

    Args:
        processor ([`~lenvm_rl.decoding.generation.LengthGuidedLogitsProcessor`]): the tilt, for one call of `generate`.
        guidance ([`~lenvm_rl.decoding.generation.LengthGuidance`]): its guidance, the same for all rows.
        eos_token_ids (sequence of `int`): tokens that end a completion.

    Attributes:
        total (`torch.Tensor` of shape `(rows,)`): in float64, each completion's sum so far.
    """

    def __init__(self, processor: LengthGuidedLogitsProcessor, guidance: LengthGuidance, eos_token_ids: Sequence[int]):
        self.processor, self.temperature, self.rule = processor, guidance.temperature, guidance.warpers()
        self.eos_token_ids = list(eos_token_ids)
        self.total: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The processor's scores, unchanged."""
        guided = self.processor(input_ids, scores)
        step = token_divergence(guided, self.rule(input_ids, scores / self.temperature))
        if self.total is None:
            self.total, self._alive = torch.zeros_like(step), torch.ones_like(step, dtype=torch.bool)
        else:
            ends = torch.tensor(self.eos_token_ids, device=input_ids.device)
            self._alive = self._alive & ~torch.isin(input_ids[:, -1], ends)
        self.total = self.total + step * self._alive
        return guided


def policy_divergence(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    completions: Sequence[list[int]],
    temperature: float,
    reference_prompt_ids: Sequence[list[int]] | None = None,
    sampled: bool = False,
) -> np.ndarray:
    """Divergence of a policy from a reference at the states of sampled completions, `(N,)`, by a forward of both.

    The distributions are over all tokens: a candidate rule (top-k, top-p, min-p) is left out of both, since a
    token that it bars in one of them alone would make the divergence infinite. So it is exact without such a rule. With
    one, completions sampled under it say which states are visited, and the divergence is the policies'.

    Args:
        policy (`PreTrainedModel`), reference (`PreTrainedModel`): with one vocabulary.
        prompt_ids (sequence of lists of `int`): each completion's prompt.
        completions (sequence of lists of `int`): sampled from the policy, end-of-sequence kept.
        temperature (`float`): of both, positive.
        reference_prompt_ids (sequence of lists of `int`, *optional*): prompts that the reference has seen instead.
        sampled (`bool`, *optional*, defaults to `False`):
            Sum the log-ratios of the sampled tokens instead of exact divergences: what is to be added where the
            completions come from a distribution whose divergence from the policy is known.
    """
    pairs = zip(
        row_logits(policy, prompt_ids, completions),
        row_logits(reference, reference_prompt_ids or prompt_ids, completions),
        completions,
        strict=True,
    )
    found = []
    for ours, theirs, completion in pairs:
        ours, theirs = ours / temperature, theirs / temperature
        if sampled:
            chosen = torch.tensor(completion, device=ours.device).unsqueeze(1)
            ratio = ours.double().log_softmax(dim=-1) - theirs.double().log_softmax(dim=-1)
            found.append(float(ratio.gather(1, chosen).sum()))
        else:
            found.append(float(token_divergence(ours, theirs).sum()))
    return np.array(found)


@torch.no_grad()
def row_logits(
    policy: PreTrainedModel, prompt_ids: Sequence[list[int]], completions: Sequence[list[int]]
) -> Iterator[Tensor]:
    """Logits `(T, V)` of the states in which each completion's `T` tokens were chosen, completion by completion."""
    width = max(len(prompt) + len(row) for prompt, row in zip(prompt_ids, completions, strict=True))
    size = max(1, LOGITS_AT_ONCE // (width * policy.get_input_embeddings().weight.shape[0]))
    for start in range(0, len(completions), size):
        prompts, rows = prompt_ids[start : start + size], completions[start : start + size]
        batch = (*pad_left(prompts, device=policy.device), *pad_right(rows, device=policy.device))
        for logits, row in zip(choice_logits(policy, *batch), rows, strict=True):
            yield logits[: len(row)]
