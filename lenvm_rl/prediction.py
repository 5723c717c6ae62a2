"""Lengths before a token is sampled: predictions from the prompt or any later state, and batches made from them.

[`predict_length`] and everything else that a person reads here is in tokens without the end-of-sequence token;
[`predict_remaining`] and [`boundary_logits`] count as the model does, the end-of-sequence token included.

    predicted = predict_length(length_value_model, tokenizer, prompts)
    for batch in length_aware_batches(predicted.tolist(), batch_size=64):
        ...                                                          # the prompts batch[0], batch[1], ... together

A prediction is one number, read off the expected return: below the mean length wherever lengths vary (Jensen's
inequality). How far completions stray from it is for [`LengthQuantiles`] to say, fitted on rollouts of other prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lenvm_rl.files import write_json
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.completions import check_in_eval_mode, pad_left
from lenvm_rl.modeling.length_value_model import LengthValueConfig
from lenvm_rl.modeling.sharing import FULL
from lenvm_rl.returns import remaining_from_logits
from lenvm_rl.tokenization import Prompt, check_same_tokenizer, tokenize_prompts

logger = logging.getLogger(__name__)

ORDERS = ("descending", "ascending", "random")
# Sums of weights that should reach a level miss it by rounding.
_TOLERANCE = 1e-9


def predict_length(
    length_value_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
) -> Tensor:
    """The length that a completion of each prompt is expected to have.

    Args:
        length_value_model (`LengthValueModel`): in eval mode; its config names the tokenizer that it was fitted with.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        prompts (`Sequence[str | list[dict]]`): texts (tokenised as they are) or lists of messages (the chat template
            is applied, with the generation prompt), as in sampling. A single one is refused: give a list of it.
        batch_size (`int`, *optional*, defaults to `64`): prompts per forward.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32: tokens, the end-of-sequence token not counted, at least 0.
    """
    check_in_eval_mode(length_value_model)
    check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
    logits = boundary_logits(length_value_model, tokenize_prompts(tokenizer, prompts), batch_size)
    return lengths_from_logits(logits, length_value_model.config.gamma)


def lengths_from_logits(logits: Tensor, gamma: float) -> Tensor:
    """Lengths without the end-of-sequence token that logits at prompts stand for, at least 0; any shape."""
    return (remaining_from_logits(logits, gamma) - 1.0).clamp(min=0.0)


@torch.no_grad()
def boundary_logits(length_value_model: nn.Module, prompt_ids: Sequence[list[int]], batch_size: int = 256) -> Tensor:
    """The logit at the last token of each prompt.

    Returns:
        `torch.Tensor` of shape `(P,)`, float32, on the CPU.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    sizes, context = [len(row) for row in prompt_ids], context_of(length_value_model.config)
    for index, size in enumerate(sizes):
        if not size:
            raise ValueError(f"Prompt {index} has no tokens: the first value is read at its last token.")
        if context is not None and size > context:
            raise ValueError(
                f"Prompt {index} has {size} tokens, but the length value model's context is {context}: leave it out, "
                "or use another model. Prompts are never cut."
            )
    logits = torch.zeros(len(sizes))
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc="predicting", unit="batch", disable=len(batches) < 2):
        ids, mask = pad_left([prompt_ids[index] for index in batch], device=length_value_model.device)
        output = length_value_model(input_ids=ids, attention_mask=mask)
        logits[batch] = output.logits[:, -1].float().cpu()
    return logits


@torch.no_grad()
def predict_remaining(length_value_model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Tokens that are still to come after each position, the end-of-sequence token counted.

    Entry `i` of a row is read at token `i`: what is to come once that token stands. So the entry at the last token of a
    prompt is the length of the whole completion, one more than [`predict_length`] says. A model is fitted from there
    on: entries inside the prompt, and at an end-of-sequence token, after which nothing comes, mean nothing.

    Args:
        length_value_model (`LengthValueModel`): in eval mode.
        input_ids (`torch.Tensor` of shape `(B, S)`): prompts and completions, padded on either side.
        attention_mask (`torch.Tensor` of shape `(B, S)`): 1 where a token exists.

    Returns:
        `torch.Tensor` of shape `(B, S)`, float32, on the device of `input_ids`: 0 where no token exists.
    """
    check_in_eval_mode(length_value_model)
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids and attention_mask have shape (B, S), got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}."
        )
    device, exists = length_value_model.device, attention_mask.bool()
    # Padding may be any id, even one that this model lacks.
    ids = input_ids.masked_fill(~exists, 0).to(device)
    logits = length_value_model(input_ids=ids, attention_mask=exists.long().to(device)).logits
    remaining = remaining_from_logits(logits.float(), length_value_model.config.gamma).to(input_ids.device)
    return torch.where(exists, remaining, 0.0)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, a shared base's included: the same for the same predictions."""
    weights = dict(model.state_dict())
    if isinstance(model.config, LengthValueConfig) and model.config.form != FULL:
        weights.update({f"base.{name}": weight for name, weight in model.backbone.state_dict().items()})
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def length_aware_batches(
    predicted_lengths: Sequence[float] | Tensor, batch_size: int, *, order: str = "descending", seed: int | None = None
) -> list[list[int]]:
    """Batches of prompts whose completions are expected to be about equally long.

    A batch goes on until its longest completion ends, so that rows of like length waste the fewest decode steps
    ([`padding_steps`]).

    Args:
        predicted_lengths (sequence or `torch.Tensor` of shape `(N,)`): such as [`predict_length`] gives. Equal ones
            stay in their order.
        batch_size (`int`): most prompts in a batch; the last one made may be smaller.
        order (`str`, *optional*, defaults to `"descending"`): of the batches. `"descending"`: the longest first, so
            that running out of memory shows at once and the estimate of the time left is on the safe side;
            `"ascending"`; `"random"`: the batches of `"descending"`, shuffled.
        seed (`int`, *optional*): of the shuffle, for `"random"` and nothing else.

    Returns:
        `list[list[int]]`: indices into `predicted_lengths`, each exactly once.
    """
    lengths = torch.as_tensor(predicted_lengths, dtype=torch.double)
    if lengths.dim() != 1 or bool(lengths.isnan().any()):
        raise ValueError("predicted_lengths must be (N,) and hold no NaN; look at what the model predicts.")
    if batch_size < 1 or order not in ORDERS:
        raise ValueError(
            f"batch_size must be at least 1 and order one of {', '.join(ORDERS)}, got {batch_size} and {order!r}."
        )
    if (order == "random") != (seed is not None):
        raise ValueError(f"order={order!r} with seed={seed!r}: the seed belongs to order='random' and to nothing else.")
    indices = torch.argsort(lengths, descending=order != "ascending", stable=True).tolist()
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    if order == "random":
        shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = [batches[index] for index in shuffled]
    return batches


def padding_steps(lengths: Sequence[int] | Tensor, batches: Sequence[Sequence[int]]) -> int:
    """Decode steps that rows spend waiting for the longest of their batch: the sum of ``rows * max - sum`` of lengths.

    Args:
        lengths (sequence or `torch.Tensor` of shape `(N,)`): tokens that each completion takes.
        batches (`Sequence[Sequence[int]]`): indices, each exactly once.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.long)
    if sorted(index for batch in batches for index in batch) != list(range(len(lengths))):
        raise ValueError(f"batches must hold every index below {len(lengths)} exactly once.")
    return sum(int(lengths[list(batch)].max()) * len(batch) for batch in batches if len(batch)) - int(lengths.sum())


def kaplan_meier(
    times: Tensor, observed: Tensor, weights: Tensor | None = None, beyond: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Share that survives each event, where some are only known to have survived until they were lost sight of.

    The product-limit estimate (Kaplan & Meier 1958, Journal of the American Statistical Association 53), weighted: at
    each time it falls by the weight of the events over the weight of all that are still in sight. Who is lost at the
    time of an event has survived it.

    Args:
        times (`torch.Tensor` of shape `(N,)`): of the event, or of the last sight.
        observed (`torch.Tensor` of shape `(N,)`): whether it is an event.
        weights (`torch.Tensor` of shape `(N,)`, *optional*): above 0; 1 when omitted.
        beyond (`float`, *optional*, defaults to `0.0`): further weight whose event comes after every time.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: times of the events `(E,)`, ascending, and the shares `(E,)`, float64.
    """
    weights = torch.ones(len(times)) if weights is None else weights
    points, place = torch.unique(times.double(), return_inverse=True)

    def total(column: Tensor) -> Tensor:
        return torch.zeros(len(points), dtype=torch.double).index_add(0, place, column.double())

    events, everyone = total(weights * observed.bool()), total(weights)
    in_sight = everyone.flip(0).cumsum(0).flip(0) + beyond
    survival = torch.cumprod(1.0 - events / in_sight, 0)
    return points[events > 0], survival[events > 0]


@dataclass(frozen=True)
class LengthQuantiles:
    """Quantiles of a completion's length given its prediction, calibrated on rollouts of held-out prompts.

    What is calibrated is the ratio of true to predicted length: the quantile at a level is ``n * exp(q)`` with `n` the
    prediction and `q` the quantile of ``log(L) - log(n)`` over the calibration rollouts, all with the end-of-sequence
    token counted. Each prompt has the same weight there, however many completions it has, and one more prompt counts
    as infinitely long: split conformal prediction for data in groups (Lee, Barber & Willett, arXiv 2306.06342).

    What that guarantees: if the prompts of calibration and use are exchangeable (drawn alike, none of them seen by the
    length value model in its fitting) and no completion was cut, one completion of a new prompt is at most as long as
    the quantile with a probability of at least the level, *on average over prompts* and over calibration sets. It is
    no promise for any one prompt or domain; there coverage may be lower or higher.

    Cut completions are not dropped, which would make lengths look short: they count as longer than where they were cut
    (right-censored, [`kaplan_meier`]). The guarantee is then an approximation for many prompts, and rests on the cut
    saying nothing about the ratio, which fails where predictions are worse for long completions. Where more than
    ``1 - level`` of the weight lies beyond the last completion seen to end, the quantile is infinite.

    Args:
        levels (`tuple[float, ...]`): in (0, 1), ascending.
        log_ratios (`tuple[float, ...]`): the quantile `q` of each level; may be infinite.
        prompts, completions (`int`): how many it was calibrated on.
        censored_share (`float`): share of those completions that were cut.
    """

    levels: tuple[float, ...]
    log_ratios: tuple[float, ...]
    prompts: int
    completions: int
    censored_share: float

    @classmethod
    def fit(
        cls, predicted: Tensor, lengths: Tensor, finished: Tensor, groups: Tensor, levels: Sequence[float] = (0.5, 0.9)
    ) -> LengthQuantiles:
        """Calibrates on completions of prompts that the length value model was not fitted on.

        Args:
            predicted (`torch.Tensor` of shape `(N,)`): prediction for each completion, as [`predict_length`] gives it.
            lengths (`torch.Tensor` of shape `(N,)`): tokens, the end-of-sequence token not counted; where a completion
                was cut, the tokens that it has.
            finished (`torch.Tensor` of shape `(N,)`): whether it ended (else it was cut).
            groups (`torch.Tensor` of shape `(N,)`): the prompt that it belongs to.
            levels (sequence of `float`, *optional*, defaults to `(0.5, 0.9)`): ascending; the highest needs enough
                prompts, 9 for 0.9.
        """
        if predicted.dim() != 1 or not predicted.shape == lengths.shape == finished.shape == groups.shape:
            raise ValueError("predicted, lengths, finished and groups must all be (N,).")
        ended = finished.bool()
        n, tokens = predicted.double() + 1.0, lengths.double() + ended
        if not bool((torch.isfinite(n) & torch.isfinite(tokens) & (n >= 1) & (tokens >= 1)).all()):
            raise ValueError("predictions and lengths must be finite and not negative; a cut completion has a token.")
        _, group, count = torch.unique(groups, return_inverse=True, return_counts=True)
        _check_levels(levels, len(count))
        # A completion of k tokens that was cut has more than k, the end counted: it is lost sight of at k.
        weights = 1.0 / ((len(count) + 1) * count[group].double())
        times, survival = kaplan_meier(tokens.log() - n.log(), ended, weights, beyond=1.0 / (len(count) + 1))
        reached = [(1.0 - survival >= level - _TOLERANCE).nonzero().flatten() for level in levels]
        log_ratios = tuple(float(times[where[0]]) if len(where) else math.inf for where in reached)
        censored = float((~ended).double().mean())
        logger.info("%d completions of %d prompts, %.1f%% cut (censored)", len(n), len(count), 100 * censored)
        beyond = [level for level, ratio in zip(levels, log_ratios, strict=True) if ratio == math.inf]
        if beyond:
            logger.warning("levels %s lie beyond the last completion seen to end: infinite quantiles", beyond)
        return cls(tuple(levels), log_ratios, len(count), len(n), censored)

    def predict(self, predicted: Tensor) -> Tensor:
        """Quantiles of the length, `(N, Q)` float64, from predictions `(N,)`; neither counts the end of sequence."""
        ratios = torch.tensor(self.log_ratios, dtype=torch.double).exp()
        return ((predicted.double().unsqueeze(1) + 1.0) * ratios - 1.0).clamp(min=0.0)

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything as JSON, atomically; an infinite quantile is null."""
        fields = asdict(self)
        fields["log_ratios"] = [None if ratio == math.inf else ratio for ratio in self.log_ratios]
        write_json(path, fields, allow_nan=False)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LengthQuantiles:
        """Reads what [`LengthQuantiles.save`] wrote."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        fields["levels"] = tuple(fields["levels"])
        fields["log_ratios"] = tuple(math.inf if ratio is None else ratio for ratio in fields["log_ratios"])
        return cls(**fields)


def _check_levels(levels: Sequence[float], prompts: int) -> None:
    """Raises a `ValueError` unless levels ascend strictly in (0, 1) and there are prompts enough for the highest."""
    levels = list(levels)
    if not levels or levels != sorted(set(levels)) or not 0.0 < levels[0] <= levels[-1] < 1.0:
        raise ValueError(f"levels must ascend strictly in (0, 1), got {levels}.")
    # The weight of the one prompt more is what no level may reach into.
    if (prompts + 1) * (1.0 - levels[-1]) < 1.0 - _TOLERANCE:
        needed = math.ceil(levels[-1] / (1.0 - levels[-1]) - _TOLERANCE)
        raise ValueError(
            f"The level {levels[-1]} takes {needed} prompts to calibrate on, and there are {prompts}: give rollouts "
            "of more held-out prompts (more completions of the same prompts do not help), or a lower level."
        )
