"""Length-guided decoding: a frozen length value model leans a policy's next token towards the end, or away from it.

Tilt (arXiv 2604.27039, equation 12 and appendix G): among the candidates `x` of a state `s`,
``p'(x) ∝ p(x) * exp(strength * V(s + x))``. It is the distribution that maximises ``strength * E[V] - KL(p' || p)``.
A positive strength leans towards the end: `V` is nearer 0 the nearer the end is. (The paper writes the same rule with
``beta = -strength`` over ``u = -V``.) The end-of-sequence token as candidate leads to the end: its value is exactly 0.

`p` is the policy after temperature and after the guidance's own top-k, top-p and min-p, at every strength: strength 0
without truncation is the base model exactly, and with truncation it is `generate` with the same truncation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lenvm_rl.scoring import CandidateScorer, FullRowScorer
from lenvm_rl.tokenization import check_same_tokenizer

SCORERS = {"cached": CandidateScorer, "full": FullRowScorer}
# What `generate` would apply after the tilt, and the value at which it does nothing.
REFUSED_WARPERS = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
REFUSED_MODES = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "penalty_alpha", "inputs_embeds")
# Above this many tokens, scoring the whole vocabulary at every step is surely a mistake.
MAX_UNTRUNCATED_VOCABULARY = 4096


@dataclass(frozen=True)
class LengthGuidance:
    """How decoding is guided.

    Args:
        mode (`str`, *optional*, defaults to `"tilt"`):
            Only `"tilt"` is available; the modes `"equal_to"`, `"at_most"` and `"at_least"` are refused.
        strength (`float`, *optional*, defaults to `0.0`):
            Positive leans towards the end, negative away from it; 0 leaves the policy as it is. A natural unit is one
            over the standard deviation of `V` among the candidates of a state.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy, before the tilt. 0 means greedy: the most probable token of the tilted
            distribution, formed at temperature 1.
        top_k (`int`, *optional*, defaults to `0`):
            Only the `top_k` most probable tokens are candidates; 0 for all.
        top_p (`float`, *optional*, defaults to `1.0`):
            Only the smallest set of most probable tokens with at least this probability; 1 for all.
        min_p (`float`, *optional*, defaults to `0.0`):
            Only tokens with at least this share of the probability of the most probable one; 0 for all.
        target_length, rule, tolerance, enforce (*optional*):
            Belong to the modes with a target length, so they must be left out.

    Raises:
        ValueError: on an unavailable mode, a field of another mode, or a number out of range.
    """

    mode: str = "tilt"
    strength: float = 0.0
    target_length: float | None = None
    rule: str | None = None
    tolerance: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    enforce: bool | None = None

    def __post_init__(self):
        if self.mode != "tilt":
            raise ValueError(f"mode {self.mode!r} is not available: guidance can only tilt. Use mode='tilt'.")
        for name in ("target_length", "rule", "tolerance", "enforce"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} means nothing to mode='tilt': leave it out, and set strength.")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and not negative (0 is greedy), got {self.temperature}.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer of at least 0 (0 for all tokens), got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (1 for all tokens), got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1] (0 for all tokens), got {self.min_p}.")

    @property
    def truncates(self) -> bool:
        """Whether any token is barred from being a candidate."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def warpers(self) -> LogitsProcessorList:
        """The candidate rule, as `generate` itself would apply it after the temperature."""
        rule = LogitsProcessorList()
        if self.top_k > 0:
            rule.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            rule.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            rule.append(MinPLogitsWarper(self.min_p))
        return rule


def tilt(log_probs: Tensor, values: Tensor, strength: float) -> Tensor:
    """Log-probabilities of the tilted distribution ``p'(x) ∝ p(x) * exp(strength * V(s + x))``.

    It maximises ``strength * E_p'[V] - KL(p' || p)``, and its derivative ``dE_p'[V] / dstrength = Var_p'(V)`` is not
    negative (arXiv 2604.27039, appendix G).

    Args:
        log_probs (`torch.Tensor` of shape `(..., V)`): log-probabilities or logits of `p`; ``-inf`` bars a token.
        values (`torch.Tensor` of shape `(..., V)`): value of the state after each token; anything finite where barred.
        strength (`float`): positive leans towards the end.

    Returns:
        `torch.Tensor` of shape `(..., V)`: normalised, ``-inf`` where barred.
    """
    return (log_probs + strength * values).log_softmax(dim=-1)


class LengthGuidedLogitsProcessor(LogitsProcessor):
    """Tilts the policy's scores inside any `model.generate(..., logits_processor=[...])`.

    transformers runs this processor *before* its own temperature, top-k and top-p. Guidance has its own, so generate
    with ``temperature=1.0, top_k=0, top_p=1.0`` (`top_k` defaults to 50 there), or use [`generate_guided`], which sets
    and checks them. A processor cannot see what `generate` does after it.

    One object serves one `generate` call at a time; it starts afresh when it meets new prompts. Beam search and
    assisted generation reorder what it remembers and are not supported.

    Args:
        length_value_model (`LengthValueModel`): frozen, in eval mode.
        guidance ([`LengthGuidance`]): how to guide.
        eos_token_id (`int` or sequence of `int`): the tokens that end a sequence: as candidates, their value is 0.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
            The prompts' mask (left padding). When omitted, leading `pad_token_id` tokens are taken as padding.
        pad_token_id (`int`, *optional*): needed if prompts are padded and no `attention_mask` is given.
        generation_temperature (`float`, *optional*, defaults to `1.0`):
            The temperature that `generate` applies afterwards; the scores are multiplied by it beforehand, so that the
            result is the guidance's distribution.
        scoring (`str`, *optional*, defaults to `"cached"`):
            `"cached"` for one forward for each token ([`CandidateScorer`]), `"full"` to run every candidate as a
            complete row ([`FullRowScorer`]): slow, for backbones whose cache cannot be shared.
        same_tokenizer (`bool`, *optional*, defaults to `False`):
            Set when the tokenizers of both models were compared: their embedding tables may then differ in padding.

    Raises:
        ValueError: at construction, on an unknown `scoring` or a model that it cannot use; at the first call, on
            vocabularies that differ, right padding, or a vocabulary too large to be scored without truncation.
        FloatingPointError: if the length value model gives NaN or infinity.
    """

    def __init__(
        self,
        length_value_model: nn.Module,
        guidance: LengthGuidance,
        *,
        eos_token_id: int | Sequence[int],
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        generation_temperature: float = 1.0,
        scoring: str = "cached",
        same_tokenizer: bool = False,
    ):
        if scoring not in SCORERS:
            raise ValueError(f"scoring must be one of {sorted(SCORERS)}, got {scoring!r}.")
        if generation_temperature <= 0:
            raise ValueError(f"generation_temperature must be positive, got {generation_temperature}.")
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("prompts are padded on the right: generation needs padding_side='left'.")
        self.guidance = guidance
        self.scorer = SCORERS[scoring](length_value_model)
        self.eos_token_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self.attention_mask = attention_mask
        self.pad_token_id = pad_token_id
        self.generation_temperature = generation_temperature
        self.same_tokenizer = same_tokenizer
        self._warpers = guidance.warpers()
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tilted scores `(B, V)`, ``-inf`` where a token is no candidate, of the prefixes `input_ids` `(B, S)`."""
        guidance = self.guidance
        temperature = guidance.temperature if guidance.temperature > 0 else 1.0
        policy = self._warpers(input_ids, scores / temperature)
        if guidance.strength != 0:
            if self._continues(input_ids):
                self._advance(input_ids)
            else:
                self._start(input_ids, scores.shape[1])
            self._seen = input_ids
            policy = policy + guidance.strength * self._values(policy)
        if self.generation_temperature == temperature and guidance.strength == 0 and not guidance.truncates:
            return scores
        return policy * self.generation_temperature

    def _continues(self, input_ids: Tensor) -> bool:
        """Whether `input_ids` are the prefixes of the last call with one more token."""
        seen = self._seen
        if seen is None or input_ids.shape != (seen.shape[0], seen.shape[1] + 1):
            return False
        return torch.equal(input_ids[:, :-1], seen)

    def _start(self, input_ids: Tensor, vocab_size: int) -> None:
        if not self.same_tokenizer and vocab_size != self.scorer.vocab_size:
            raise ValueError(
                f"the policy scores {vocab_size} tokens and the length value model knows {self.scorer.vocab_size}: "
                "they must share a tokenizer. If they do, pass it to generate_guided as tokenizer=, to be compared."
            )
        if not self.guidance.truncates and vocab_size > MAX_UNTRUNCATED_VOCABULARY:
            raise ValueError(
                f"without truncation, all {vocab_size} tokens are scored at every step: set top_k (e.g. 64), top_p or "
                "min_p in the guidance."
            )
        mask = self._prompt_mask(input_ids)
        if not bool(mask[:, -1].all()):
            raise ValueError("prompts are empty or padded on the right: generation needs padding_side='left'.")
        self._finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self._eos = torch.tensor(self.eos_token_ids, device=input_ids.device)
        self.scorer.start(input_ids, mask)

    def _prompt_mask(self, input_ids: Tensor) -> Tensor:
        mask = self.attention_mask
        if mask is None:
            if self.pad_token_id is None:
                return torch.ones_like(input_ids)
            return (input_ids != self.pad_token_id).int().cummax(dim=1).values
        rows, width = input_ids.shape
        if mask.shape[1] != width or rows % mask.shape[0]:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} but the prompts {tuple(input_ids.shape)}: make one "
                "processor for each batch of prompts."
            )
        # `num_return_sequences` repeats each prompt in place.
        return mask.to(input_ids.device).repeat_interleave(rows // mask.shape[0], dim=0)

    def _advance(self, input_ids: Tensor) -> None:
        chosen = input_ids[:, -1]
        self._finished = self._finished | torch.isin(chosen, self._eos)
        self.scorer.advance(chosen, ~self._finished)

    def _values(self, policy: Tensor) -> Tensor:
        """Value of the state after each candidate, `(B, V)`; 0 at end-of-sequence and where there is no candidate."""
        valid = torch.isfinite(policy) & ~self._finished.unsqueeze(1)
        valid[:, self._eos] = False
        values = torch.zeros_like(policy)
        width = int(valid.sum(dim=1).max())
        if width == 0:
            return values
        candidates = valid.int().topk(width, dim=1).indices
        valid = valid.gather(1, candidates)
        logits = self.scorer.score(candidates, valid)
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the length value model gave NaN or infinity: check its weights and its dtype.")
        scored = -logits.to(values.dtype).sigmoid() * valid
        return values.scatter_(1, candidates, scored)


def generate_guided(
    model: PreTrainedModel,
    length_value_model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    guidance: LengthGuidance,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scoring: str = "cached",
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    **generate_kwargs,
):
    """`model.generate` under length guidance.

    The guidance decides on sampling: `do_sample`, `temperature`, `top_k`, `top_p` and `min_p` come from it, also where
    the model's own generation config says otherwise; as arguments they are refused unless they say the same.
    Everything else (`max_new_tokens`, `num_return_sequences`, `stopping_criteria`, …) is passed on.
    `repetition_penalty` and processors given here act before the tilt and belong to the policy.

    Args:
        model (`transformers.PreTrainedModel`): the policy.
        length_value_model (`LengthValueModel`): frozen, in eval mode, with the policy's tokenizer.
        inputs (`torch.Tensor` of shape `(B, S)` or mapping): prompts padded on the left: ids, or `input_ids` with
            `attention_mask`.
        guidance ([`LengthGuidance`]): how to guide.
        tokenizer (*optional*):
            The policy's; compared with the fingerprint that the length value model keeps. When omitted, the sizes of
            the vocabularies are compared.
        scoring (`str`, *optional*, defaults to `"cached"`): see [`LengthGuidedLogitsProcessor`].
        generation_config (*optional*), logits_processor (*optional*), generate_kwargs: as for `generate`.

    Returns:
        What `generate` returns: ids `(B * num_return_sequences, S + T)`, or its output object.

    Raises:
        ValueError: on arguments that contradict the guidance or cannot go with it, or tokenizers that differ.
    """
    inputs = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    merged = _merged_generation_config(model, guidance, generation_config, generate_kwargs)
    _check_generation(guidance, merged, generation_config, {**generate_kwargs, **inputs})
    if tokenizer is not None:
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
    processor = LengthGuidedLogitsProcessor(
        length_value_model,
        guidance,
        eos_token_id=merged.eos_token_id,
        attention_mask=inputs.get("attention_mask"),
        pad_token_id=merged.pad_token_id,
        scoring=scoring,
        same_tokenizer=tokenizer is not None,
    )
    passed_on = {name: value for name, value in generate_kwargs.items() if not hasattr(merged, name)}
    if tokenizer is not None and merged.stop_strings is not None:
        passed_on["tokenizer"] = tokenizer
    return model.generate(
        **inputs,
        **passed_on,
        generation_config=merged,
        logits_processor=LogitsProcessorList([*logits_processor, processor]),
    )


def _merged_generation_config(
    model: PreTrainedModel, guidance: LengthGuidance, generation_config: GenerationConfig | None, arguments: Mapping
) -> GenerationConfig:
    """The settings that `generate` is to use: what guidance owns, then arguments, the given config, and the model's."""
    merged = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    merged.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    owned = {"do_sample": guidance.temperature > 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    # Unset, so that `generate` makes no warper for it, unless it would then fill in the model's own.
    owned["min_p"] = None if model.generation_config.min_p is None else 0.0
    merged.update(**{**arguments, **owned})
    return merged


def _check_generation(
    guidance: LengthGuidance, merged: GenerationConfig, given: GenerationConfig | None, arguments: Mapping
) -> None:
    """Refuses what contradicts the guidance, would act on the tilted scores, or breaks the order of rows."""
    owned = {"do_sample": guidance.temperature > 0, "top_k": guidance.top_k, "top_p": guidance.top_p}
    owned |= {"min_p": guidance.min_p, "temperature": guidance.temperature}
    stated = {} if given is None else {name: getattr(given, name) for name in owned}
    stated |= {name: arguments[name] for name in owned if name in arguments}
    for name, value in stated.items():
        if value is not None and value != owned[name]:
            raise ValueError(
                f"{name}={value} contradicts the guidance, which has {owned[name]}: set it in LengthGuidance only."
            )
    for name, neutral in REFUSED_WARPERS.items():
        if getattr(merged, name) not in (None, neutral):
            raise ValueError(f"{name} would act on the tilted distribution: unset it, or use top_k, top_p or min_p.")
    for name in REFUSED_MODES:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} cannot be combined with length guidance: leave it out.")
    if merged.num_beams not in (None, 1):
        raise ValueError(f"num_beams={merged.num_beams}: beam search cannot be guided, use num_beams=1.")
    if merged.eos_token_id is None:
        raise ValueError("the policy has no eos_token_id: set it in model.generation_config, or pass eos_token_id=.")
