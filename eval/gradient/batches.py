"""From a policy to gradients: completions sampled in batches, and the gradient of each batch for every estimator."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.gradient.estimators import GradedBatch, LengthValues
from lenvm_rl.endings import own_length
from lenvm_rl.modeling.completions import completion_logits, pad_left, pad_right, token_log_probs
from lenvm_rl.trainers.streams import Completions


class TokenBatch(NamedTuple):
    """N prompts padded on the left and completions padded on the right, as TRL has them.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(N, P)`): prompts.
        completion_ids, completion_mask (`torch.Tensor` of shape `(N, T)`): completions.
        finished (`torch.BoolTensor` of shape `(N,)`): whether nothing follows the last token.
        lengths (`torch.LongTensor` of shape `(N,)`): tokens of each completion, an end id not counted.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    finished: Tensor
    lengths: Tensor

    @classmethod
    def from_rows(
        cls,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        finished: Sequence[bool],
        end_ids: Collection[int],
    ) -> TokenBatch:
        """A batch of rows of ids, none of them empty; `end_ids` are the ids that end a completion."""
        lengths = torch.tensor([own_length(row, end_ids) for row in completions])
        return cls(*pad_left(prompts), *pad_right(completions), torch.tensor(finished, dtype=torch.bool), lengths)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What models read along completions, see [`lenvm_rl.modeling.completions`]."""
        return self[:4]

    @property
    def completions(self) -> Completions:
        """What the streams of advantage read; every token is an action."""
        mask = self.completion_mask.bool()
        return Completions(mask, mask, self.finished, self.lengths)

    def rows(self, rows: slice, device: torch.device | str) -> TokenBatch:
        """Some of the rows, on a device."""
        return TokenBatch(*(part[rows].to(device) for part in self))


def read_batches(rollouts: Dataset, batch_size: int, end_ids: Collection[int]) -> Iterator[TokenBatch]:
    """Consecutive batches of rollouts, whose completions end with one of `end_ids`; the last one must be whole."""
    for start in range(0, len(rollouts), batch_size):
        part = rollouts[start : start + batch_size]
        ended = [reason == "stop" for reason in part["finish_reason"]]
        yield TokenBatch.from_rows(part["prompt_ids"], part["completion_ids"], ended, end_ids)


@torch.no_grad()
def length_values(model: nn.Module, batch: TokenBatch, forward_size: int) -> LengthValues:
    """V of a length value model at every state of a batch, float64 on the CPU."""
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(batch.finished), forward_size):
        part = batch.rows(slice(start, start + forward_size), device)
        logits = completion_logits(model, *part.inputs)
        found.append(-torch.sigmoid(logits.double()).cpu())
    return LengthValues(torch.cat(found), model.config.gamma)


def select_parameters(policy: nn.Module, pattern: str | None) -> list[nn.Parameter]:
    """Parameters of the policy whose name holds a regular expression; the others are frozen."""
    named = dict(policy.named_parameters())
    chosen = [name for name in named if pattern is None or re.search(pattern, name)]
    if not chosen:
        raise ValueError(f"No parameter's name holds {pattern!r}; there are {list(named)[:8]} and more.")
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return [named[name] for name in chosen]


def batch_gradients(
    policy: PreTrainedModel,
    parameters: Sequence[nn.Parameter],
    batch: TokenBatch,
    advantages: Tensor,
    temperature: float,
    normaliser: float,
    forward_size: int,
) -> Tensor:
    """Gradients of ``sum_t A_t log pi(a_t | s_t) / normaliser`` over a batch, one for each estimator's advantages.

    Args:
        policy (`PreTrainedModel`): in eval mode.
        parameters (sequence of `torch.nn.Parameter`): with respect to which, D numbers in all.
        batch ([`TokenBatch`]): N completions.
        advantages (`torch.Tensor` of shape `(E, N, T)`): of E estimators.
        temperature (`float`): at which the completions were sampled.
        normaliser (`float`): a constant: the tokens of the batch in its place would correlate with the lengths.
        forward_size (`int`): completions per forward.

    Returns:
        `torch.Tensor` of shape `(E, D)`, float32 on the CPU.
    """
    total = torch.zeros(len(advantages), sum(parameter.numel() for parameter in parameters))
    for start in range(0, advantages.shape[1], forward_size):
        rows = slice(start, start + forward_size)
        outputs, per_token = token_outputs(policy, parameters, batch.rows(rows, policy.device), temperature)
        for index, weights in enumerate(advantages[:, rows].to(per_token)):
            last = index == len(advantages) - 1
            weights = weights if per_token.dim() == 2 else weights.unsqueeze(2)
            parts = torch.autograd.grad(outputs, parameters, weights * per_token, retain_graph=not last)
            total[index] += torch.cat([part.flatten() for part in parts]).float().cpu()
    return total / normaliser


def token_outputs(
    policy: PreTrainedModel, parameters: Sequence[nn.Parameter], batch: TokenBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """What the gradients of single tokens go back from, and the gradient of each token's log-probability there.

    If the output embeddings are among the parameters, or there are none, those are log-probabilities `(N, T)` and 1.
    Otherwise they are the hidden states before the output embeddings `(N, T, H)` and, as a token's log-probability
    depends on no other position's, its derivative there: the way back through a large vocabulary is then gone once, and
    not by every estimator.
    """
    head = policy.get_output_embeddings()
    if head is None or any(weight is parameter for weight in head.parameters() for parameter in parameters):
        log_probs = token_log_probs(policy, *batch.inputs, temperature)
        return log_probs, torch.ones_like(log_probs)
    seen: list[Tensor] = []

    def cut(module, inputs):
        seen.extend([inputs[0], inputs[0].detach().requires_grad_()])
        return (seen[1],)

    hook = head.register_forward_pre_hook(cut)
    try:
        log_probs = token_log_probs(policy, *batch.inputs, temperature)
    finally:
        hook.remove()
    hidden, leaf = seen
    (derivative,) = torch.autograd.grad(log_probs.sum(), leaf)
    # The last of the states is behind the last token.
    return hidden[:, :-1], derivative[:, :-1]


def explained_variance(batches: Sequence[GradedBatch]) -> float | None:
    """How much of the variance of ``G_t`` over the tokens of finished completions V explains: 1 is all, 0 is none.

    `None` where all returns are equal, or none is known.
    """
    returns, errors = [], []
    for batch in batches:
        kept = batch.completions.mask & batch.completions.finished.unsqueeze(1)
        returns.append(batch.returns[kept])
        errors.append((batch.returns - batch.length.states[:, :-1])[kept])
    variance = float(torch.cat(returns).var(correction=0)) if any(map(len, returns)) else 0.0
    return 1.0 - float(torch.cat(errors).var(correction=0)) / variance if variance > 0 else None
