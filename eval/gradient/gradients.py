"""From a policy to gradients, and from gradients to what independent batches say about the expected one.

All of it follows from inner products. Let ``g_1 … g_B`` be the gradients of an estimator in B independent batches,
``mu`` their expectation.

- Signal ``|mu|^2``: split the batches into halves at random and take the product of the two means. Noise that is in one
  half is not in the other, so nothing has to be subtracted; the mean over *all* splits is
  ``S(g, g) = sum_{i != j} g_i . g_j / (B (B - 1))``, which is computed here.
- Noise ``tr Cov(g)``: ``sum_i |g_i - mean|^2 / (B - 1) = sum_{i != j} |g_i - g_j|^2 / (2 B (B - 1))``.
- Signal-to-noise ratio ``SNR = S(g, g) / tr Cov(g)``: both unbiased. It is the ratio for one batch, and proportional to
  the number of completions in it: at 1, the mean gradient is as long as its noise.
- Cosine of two estimators' expected gradients, ``S(g, h) / sqrt(S(g, g) S(h, h))``: what is left when noise is taken
  out, so it may lie beyond 1 by chance, and is not defined where a signal is lost in the noise.

Intervals are bootstraps over batches. A resample holds some batches several times; a batch with itself makes no two
halves, so such pairs are left out of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.gradient.estimators import GradedBatch, LengthValues
from eval.statistics import Interval, percentile_interval, quotient, resample_counts
from lenvm_rl.endings import own_length
from lenvm_rl.modeling.completions import completion_logits, pad_left, pad_right, token_log_probs
from lenvm_rl.trainers.streams import Completions

# Entries of gradients held at once while their inner products are taken.
CHUNK_ENTRIES = 2**25


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
        """Some of the rows, as long as the longest completion among them, on a device."""
        part = TokenBatch(*(part[rows].to(device) for part in self))
        longest = int(part.completion_mask.sum(dim=1).max())
        return part._replace(
            completion_ids=part.completion_ids[:, :longest], completion_mask=part.completion_mask[:, :longest]
        )


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
        values = -torch.sigmoid(logits.double()).cpu()
        # Of states behind the end nobody asks.
        room = batch.completion_mask.shape[1] + 1 - values.shape[1]
        found.append(nn.functional.pad(values, (0, room)))
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

    Where every completion's advantage is the same number at all of its tokens, its gradient is that number times the
    gradient of the completion's log-probability, which is taken once for all such estimators.

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
    count, of_rows = advantages.shape[1], partial(gradients_of_rows, policy, parameters, batch, temperature)
    first, mask = advantages[:, :, 0], batch.completion_mask.bool()
    whole = ((advantages == first.unsqueeze(2)) | ~mask).flatten(1).all(dim=1)
    total = torch.zeros(len(advantages), sum(parameter.numel() for parameter in parameters))
    for start in range(0, count, forward_size) if not whole.all() else ():
        rows = slice(start, start + forward_size)
        total[~whole] += of_rows(rows, advantages[~whole, rows])
    for row in range(count) if whole.any() else ():
        rows = slice(row, row + 1)
        total[whole] += first[whole, rows].float() * of_rows(rows, mask[None, rows].double())
    return total / normaliser


def gradients_of_rows(
    policy: PreTrainedModel,
    parameters: Sequence[nn.Parameter],
    batch: TokenBatch,
    temperature: float,
    rows: slice,
    advantages: Tensor,
) -> Tensor:
    """What some rows of a batch, with their advantages `(E, n, T)`, add to its gradients, `(E, D)`: not normalised."""
    part = batch.rows(rows, policy.device)
    outputs, per_token = token_outputs(policy, parameters, part, temperature)
    found = []
    for index, weights in enumerate(advantages[:, :, : part.completion_mask.shape[1]].to(per_token)):
        last = index == len(advantages) - 1
        weights = weights if per_token.dim() == 2 else weights.unsqueeze(2)
        parts = torch.autograd.grad(outputs, parameters, weights * per_token, retain_graph=not last)
        found.append(torch.cat([gradient.flatten() for gradient in parts]).float().cpu())
    return torch.stack(found)


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


def inner_products(gradients: np.ndarray) -> np.ndarray:
    """Inner products of all gradients.

    Args:
        gradients (`numpy.ndarray` of shape `(E, B, D)`): of E estimators in B batches; may be mapped from a file.

    Returns:
        `numpy.ndarray` of shape `(E, E, B, B)`, float64: entry `[e, f, i, j]` is of estimator `e` in batch `i` with
        estimator `f` in batch `j`.
    """
    count, batches, size = gradients.shape
    total = np.zeros((count * batches, count * batches))
    step = max(1, CHUNK_ENTRIES // (count * batches))
    for start in range(0, size, step):
        part = np.ascontiguousarray(gradients[:, :, start : start + step]).reshape(count * batches, -1)
        total += part @ part.T
    return total.reshape(count, batches, count, batches).transpose(0, 2, 1, 3)


@dataclass(frozen=True)
class GradientStatistics:
    """Signal, noise and cosines with intervals, of several estimators in the same batches.

    Args:
        products (`numpy.ndarray` of shape `(E, E, B, B)`): see [`inner_products`].
        seed (`int`, *optional*, defaults to `0`): seed of the resamples, the same for every statistic.
        num_resamples (`int`, *optional*, defaults to `2000`): R.
    """

    products: np.ndarray
    seed: int = 0
    num_resamples: int = 2000

    def __post_init__(self) -> None:
        if self.products.ndim != 4 or self.products.shape[-1] < 2:
            raise ValueError(
                f"Noise is what differs between batches, so there must be two; products are {self.products.shape}."
            )

    def snr(self, index: int) -> Interval:
        """Signal-to-noise ratio of one estimator."""
        return self._interval(lambda counts: self._snr(index, counts))

    def signal_and_noise(self, index: int) -> tuple[float, float]:
        """``S(g, g)`` and ``tr Cov(g)`` of one estimator; the former may be negative where there is no signal."""
        return float(self._signal(index, index, self._once)[0]), float(self._noise(index, self._once)[0])

    def cosine(self, first: int, second: int) -> Interval:
        """Cosine of two estimators' expected gradients; NaN at both ends if some resample has a signal below 0."""
        return self._interval(lambda counts: self._cosine(first, second, counts))

    def cosines(self) -> np.ndarray:
        """Cosines of all pairs of estimators, `(E, E)`, NaN where there is none."""
        every = range(len(self.products))
        return np.array([[self._cosine(first, second, self._once)[0] for second in every] for first in every])

    def snr_ratio(self, index: int, others: list[int]) -> Interval:
        """An estimator's SNR over the best of several others', the best being chosen anew in every resample."""
        # Those that have none are no rivals.
        return self._interval(
            lambda counts: quotient(
                self._snr(index, counts), np.fmax.reduce([self._snr(other, counts) for other in others])
            )
        )

    @property
    def _once(self) -> np.ndarray:
        """How often each batch counts in the estimate, `(1, B)`."""
        return np.ones((1, self.products.shape[-1]))

    def _interval(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """From how often each batch counts, `(R, B)`: once each for the estimate, then in the resamples."""
        resamples = resample_counts(self.products.shape[-1], self.num_resamples, self.seed)
        return percentile_interval(float(statistic(self._once)[0]), statistic(resamples))

    def _signal(self, first: int, second: int, counts: np.ndarray) -> np.ndarray:
        products = self.products[first, second]
        same = counts**2 @ np.diagonal(products)
        return quotient(((counts @ products) * counts).sum(axis=1) - same, _pairs(counts))

    def _noise(self, index: int, counts: np.ndarray) -> np.ndarray:
        products = self.products[index, index]
        squares = counts.sum(axis=1) * (counts @ np.diagonal(products))
        return quotient(squares - ((counts @ products) * counts).sum(axis=1), _pairs(counts))

    def _snr(self, index: int, counts: np.ndarray) -> np.ndarray:
        return quotient(self._signal(index, index, counts), self._noise(index, counts))

    def _cosine(self, first: int, second: int, counts: np.ndarray) -> np.ndarray:
        signals = [self._signal(index, index, counts) for index in (first, second)]
        lengths = np.sqrt(np.maximum(signals[0], 0.0) * np.maximum(signals[1], 0.0))
        return quotient(self._signal(first, second, counts), lengths)


def _pairs(counts: np.ndarray) -> np.ndarray:
    """Number of ordered pairs of different batches in each resample, `(R,)`."""
    return counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
