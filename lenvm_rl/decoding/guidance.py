"""How decoding is guided by predicted length: the settings, and the rules that turn values into a choice of tokens.

At a state `s` with `t` tokens written, a candidate `x` leads to a completion of about ``t + n(s + x)`` tokens, where
``n`` is the number of tokens still to come that the length value model predicts there. The end-of-sequence token
leads to the end itself: its value and its ``n`` are exactly 0; any other token has at least the end still to come,
``n >= 1``. So lengths come out as people count them, end-of-sequence left out.

- `"tilt"` (arXiv 2604.27039, equation 12 and appendix G): ``p'(x) ∝ p(x) * exp(strength * V(s + x))``, the maximiser of
  ``strength * E[V] - KL(p' || p)``. A positive strength leans towards the end: `V` is nearer 0 the nearer the end is.
  (The paper writes the same rule with ``beta = -strength`` over ``u = -V``.) With a `candidate_mass`, only the most
  probable candidates that carry it are scored and tilted; the others keep the probability that `p` gives them.
- `"equal_to"`, `"at_most"`, `"at_least"` a `target_length` T, with ``r = T - t`` tokens left, by one of three rules:

  - `rule="paper"`, the hard decoding of the paper and its code: one candidate, by its ``n`` alone, so that only the
    candidate rule keeps the text sensible. `"equal_to"`: the one whose ``n`` is nearest to ``r``; `"at_most"`: the
    smallest ``n``, always; `"at_least"`: the largest ``n`` while ``r > 0``, then the smallest. Of equal candidates the
    most probable.
  - `rule="feasible"`: the base distribution over the candidates that satisfy the constraint by prediction
    (``|n - r| <= tolerance * r``; ``n <= r``; ``n >= r``), and the paper's rule only where none does.
  - `rule="patient"`, for `"equal_to"`: as `"feasible"`, but where no candidate fits, the nearest of those that do not
    fall short (``n >= r``), and the largest ``n`` only if all do. ``n`` is how long the *unguided* policy would go on.
    A guided one can still cut a rest that is too long, but cannot take back an end, or an answer that leads to it.

`p` is the policy after temperature and after the guidance's own top-k, top-p and min-p, at every strength: strength 0
without truncation is the base model exactly.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

TILT, EQUAL_TO, AT_MOST, AT_LEAST = "tilt", "equal_to", "at_most", "at_least"
MODES = (TILT, EQUAL_TO, AT_MOST, AT_LEAST)
PAPER, FEASIBLE, PATIENT = "paper", "feasible", "patient"
RULES = (PAPER, FEASIBLE, PATIENT)
DEFAULT_TOLERANCE = 0.1
# Far beyond this, scores would overflow in float32; far below it, only one candidate is left.
MAX_STRENGTH = 1e9
# Scores over a temperature below the first would overflow, and above the second nothing is left of them.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-9, 1e9
# Predictions this near, relative to their size, are the same: float32 does not tell them apart.
TIE = 1e-5


@dataclass(frozen=True)
class LengthGuidance:
    """How decoding is guided.

    Args:
        mode (`str`, *optional*, defaults to `"tilt"`): `"tilt"`, `"equal_to"`, `"at_most"` or `"at_least"`.
        strength (`float`, *optional*, defaults to `0.0`): for `"tilt"`: positive leans towards the end, negative away
            from it; 0 leaves the policy as it is. A natural unit is one over the standard deviation of `V` among the
            candidates of a state.
        target_length (`int`, *optional*): for the other modes: tokens, end-of-sequence not counted. Generation needs
            room for one token more.
        rule (`str`, *optional*, defaults to `"feasible"`): for the other modes: `"feasible"`, `"paper"` or, for
            `"equal_to"`, `"patient"`: see `lenvm_rl.decoding.guidance`.
        tolerance (`float`, *optional*, defaults to `0.1`): for `"equal_to"` with `"feasible"` or `"patient"`: how far
            the predicted rest may be from the rest that is asked for, as a share of the latter, in [0, 1).
        temperature (`float`, *optional*, defaults to `1.0`): of the policy, before the guidance. 0 means greedy: the
            most probable token of the guided distribution, formed at temperature 1. Else it lies in [1e-9, 1e9].
        top_k (`int`, *optional*, defaults to `0`): only so many most probable tokens are candidates; 0 for all.
        top_p (`float`, *optional*, defaults to `1.0`): only the smallest set of most probable tokens with at least this
            probability; 1 for all.
        min_p (`float`, *optional*, defaults to `0.0`): only tokens with at least this share of the probability of the
            most probable one; 0 for all.
        candidate_mass (`float`, *optional*, defaults to `1.0`): for `"tilt"`, to save forwards: only the most probable
            candidates that carry this share of the probability, in (0, 1], are scored and tilted; the others keep the
            probability that the policy gives them. Where one token carries it, the length value model is not asked. 1
            scores every candidate. (For the other modes, `top_p` is what leaves improbable candidates out.)
        enforce (`bool`, *optional*, defaults to `False`): for the other modes: make the bound hard. The end is barred
            before `target_length` (`"equal_to"`, `"at_least"`) and put there (`"equal_to"`, `"at_most"`).

    A field that means nothing to the mode is a `ValueError`.
    """

    mode: str = TILT
    strength: float = 0.0
    target_length: int | None = None
    rule: str | None = None
    tolerance: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    candidate_mass: float = 1.0
    enforce: bool | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if not (_is_number(self.strength) and abs(self.strength) <= MAX_STRENGTH):
            raise ValueError(
                f"strength must be a number of at most {MAX_STRENGTH:g} either way, got {self.strength!r}."
            )
        if self.mode == TILT:
            for name in ("target_length", "rule", "tolerance", "enforce"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} means nothing to mode='tilt': leave it out, and set strength.")
        else:
            self._check_target()
        check_temperature("temperature", self.temperature, greedy=True)
        if not (_is_integer(self.top_k) and self.top_k >= 0):
            raise ValueError(f"top_k must be an integer of at least 0 (0 for all tokens), got {self.top_k!r}.")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must lie in (0, 1] (1 for all tokens), got {self.top_p!r}.")
        if not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must lie in [0, 1] (0 for all tokens), got {self.min_p!r}.")
        if not (_is_number(self.candidate_mass) and 0 < self.candidate_mass <= 1):
            raise ValueError(f"candidate_mass must lie in (0, 1] (1 for all candidates), got {self.candidate_mass!r}.")

    def _check_target(self) -> None:
        if self.strength != 0:
            raise ValueError(f"strength means nothing to mode={self.mode!r}: leave it out, and set target_length.")
        if self.candidate_mass != 1:
            raise ValueError(f"candidate_mass is for mode='tilt'; for {self.mode!r}, leave candidates out by top_p.")
        if not (_is_integer(self.target_length) and self.target_length >= 0):
            raise ValueError(
                f"mode={self.mode!r} needs target_length, a whole number of tokens without end-of-sequence, got "
                f"{self.target_length!r}."
            )
        if self.rule not in (None, *RULES):
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}.")
        if self.rule == PATIENT and self.mode != EQUAL_TO:
            raise ValueError(f"rule='patient' is for mode='equal_to'; for {self.mode!r} use 'feasible' or 'paper'.")
        if self.enforce not in (None, True, False):
            raise ValueError(f"enforce must be True or False, got {self.enforce!r}.")
        if self.tolerance is not None:
            if self.mode != EQUAL_TO or self.rule == PAPER:
                raise ValueError("tolerance belongs to mode='equal_to' with 'feasible' or 'patient': leave it out.")
            if not (_is_number(self.tolerance) and 0 <= self.tolerance < 1):
                raise ValueError(f"tolerance is a share of the length in [0, 1), got {self.tolerance!r}.")

    @property
    def truncates(self) -> bool:
        """Whether any token is barred from being a candidate."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def truncates_among(self, vocab_size: int) -> bool:
        """Whether any of so many tokens is barred from being a candidate: `top_k` may be as large."""
        return 0 < self.top_k < vocab_size or self.top_p < 1 or self.min_p > 0

    @property
    def needs_values(self) -> bool:
        """Whether the length value model has any say."""
        return self.mode != TILT or self.strength != 0

    @property
    def forces(self) -> bool:
        """Whether the bound is hard."""
        return bool(self.enforce)

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

    def weighed(self, scores: Tensor) -> Tensor:
        """The candidates that are weighed by value, `(B, V)`: all whose score is finite, or those of `candidate_mass`.

        Args:
            scores (`torch.Tensor` of shape `(B, V)`): log-probabilities of `p` up to a constant; ``-inf`` bars a token.
        """
        return torch.isfinite(scores) if self.candidate_mass == 1 else most_probable(scores, self.candidate_mass)

    def bars_end(self, written: int) -> bool:
        """Whether the end is barred after `written` tokens."""
        return self.forces and self.mode in (EQUAL_TO, AT_LEAST) and written < self.target_length

    def puts_end(self, written: int) -> bool:
        """Whether the end is put after `written` tokens."""
        return self.forces and self.mode in (EQUAL_TO, AT_MOST) and written >= self.target_length

    def guide(self, scores: Tensor, values: Tensor, remaining: Tensor, written: int) -> Tensor:
        """Scores of the guided distribution.

        Args:
            scores (`torch.Tensor` of shape `(B, V)`): log-probabilities of `p` up to a constant; ``-inf`` bars a token.
            values (`torch.Tensor` of shape `(B, V)`): value of the state after each token, 0 at end-of-sequence;
                anything finite where barred. Only `"tilt"` reads it.
            remaining (`torch.Tensor` of shape `(B, V)`): tokens still to come there, 0 at end-of-sequence. Only the
                other modes read it.
            written (`int`): tokens that stand already.

        Returns:
            `torch.Tensor` of shape `(B, V)`: log-probabilities up to a constant, ``-inf`` where barred.
        """
        if self.mode == TILT:
            if self.candidate_mass < 1:
                return tilt_most_probable(scores, values, self.strength, self.candidate_mass)
            return tilt(scores, values, self.strength) if self.strength else scores
        left = self.target_length - written
        if self.rule == PAPER:
            return select_nearest(scores, remaining, self.mode, left)
        tolerance = DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance
        return keep_feasible(scores, remaining, self.mode, left, tolerance, patient=self.rule == PATIENT)


def tilt(log_probs: Tensor, values: Tensor, strength: float) -> Tensor:
    """The tilted distribution ``p'(x) ∝ p(x) * exp(strength * V(s + x))``, as log-probabilities up to a constant.

    It maximises ``strength * E_p'[V] - KL(p' || p)``, and its derivative ``dE_p'[V] / dstrength = Var_p'(V)`` is not
    negative (arXiv 2604.27039, appendix G).

    Args:
        log_probs (`torch.Tensor` of shape `(..., V)`): log-probabilities or logits of `p`; ``-inf`` bars a token.
        values (`torch.Tensor` of shape `(..., V)`): value of the state after each token; anything finite where barred.
        strength (`float`): positive leans towards the end.

    Returns:
        `torch.Tensor` of shape `(..., V)`: ``-inf`` where barred.
    """
    return log_probs + strength * values


def tilt_most_probable(log_probs: Tensor, values: Tensor, strength: float, mass: float) -> Tensor:
    """The tilt among the most probable tokens that carry a share of the probability; the rest keep theirs exactly.

    With `W` these tokens and `q` the tilted distribution among them, ``p'(x) = p(W) * q(x)`` in `W`, and ``p(x)``
    outside. Of the probability, at most ``1 - mass`` is not tilted; where one token carries `mass`, ``p' = p``.

    Args:
        log_probs, strength: as in [`tilt`].
        values (`torch.Tensor` of shape `(B, V)`): value after each token of `W`; anything finite elsewhere.
        mass (`float`): the share, in (0, 1].

    Returns:
        `torch.Tensor` of shape `(B, V)`: ``-inf`` where barred.
    """
    weighed = most_probable(log_probs, mass)
    own = log_probs.masked_fill(~weighed, -math.inf)
    tilted = tilt(own, values, strength)
    kept = own.logsumexp(dim=-1, keepdim=True) - tilted.logsumexp(dim=-1, keepdim=True)
    return torch.where(weighed, tilted + kept, log_probs)


def most_probable(log_probs: Tensor, mass: float) -> Tensor:
    """The smallest set of most probable tokens with at least a share of the probability, `(B, V)` bool, as for top-p.

    Args:
        log_probs (`torch.Tensor` of shape `(B, V)`): log-probabilities up to a constant; ``-inf`` bars a token.
        mass (`float`): the share, in (0, 1].
    """
    possible = torch.isfinite(log_probs).sum(dim=-1)
    ordered, tokens = log_probs.float().topk(max(1, int(possible.max())), dim=-1)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    return torch.zeros_like(log_probs, dtype=torch.bool).scatter_(-1, tokens, (before < mass) & torch.isfinite(ordered))


def select_nearest(scores: Tensor, remaining: Tensor, mode: str, left: int, patient: bool = False) -> Tensor:
    """The paper's rule: all but one candidate barred.

    Args:
        scores (`torch.Tensor` of shape `(B, V)`): log-probabilities of `p` up to a constant; ``-inf`` bars a token.
        remaining (`torch.Tensor` of shape `(B, V)`): tokens still to come after each token, 0 at end-of-sequence.
        mode (`str`): `"equal_to"`, `"at_most"` or `"at_least"`.
        left (`int`): tokens up to the target, r; negative beyond it.
        patient (`bool`, *optional*, defaults to `False`): for `"equal_to"`, prefer whatever does not fall short.

    Returns:
        `torch.Tensor` of shape `(B, V)`: the score of the chosen token, ``-inf`` elsewhere.
    """
    sign = -1.0 if mode == AT_LEAST and left > 0 else 1.0
    cost = (remaining - left).abs() if mode == EQUAL_TO else sign * remaining
    candidate = scores > -math.inf
    if patient:
        enough = candidate & (remaining >= left - TIE * (1.0 + abs(left)))
        candidate = torch.where(enough.any(dim=-1, keepdim=True), enough, candidate)
    cost = cost.masked_fill(~candidate, math.inf)
    best = cost.amin(dim=-1, keepdim=True)
    tied = cost <= best + TIE * (1.0 + abs(left) + best.abs())
    chosen = scores.masked_fill(~tied, -math.inf).argmax(dim=-1, keepdim=True)
    return torch.full_like(scores, -math.inf).scatter_(-1, chosen, scores.gather(-1, chosen))


def keep_feasible(
    scores: Tensor, remaining: Tensor, mode: str, left: int, tolerance: float, patient: bool = False
) -> Tensor:
    """The base distribution over the candidates that satisfy the constraint; where none does, the paper's rule.

    Args:
        scores, remaining, mode, left, patient: as in [`select_nearest`].
        tolerance (`float`): for `"equal_to"`, share of `left` by which ``n`` may miss it.

    Returns:
        `torch.Tensor` of shape `(B, V)`: the scores of the feasible candidates, ``-inf`` elsewhere.
    """
    slack = TIE * (1.0 + abs(left))
    fits = {
        EQUAL_TO: (remaining - left).abs() <= tolerance * max(left, 0) + slack,
        AT_MOST: remaining <= left + slack,
        AT_LEAST: remaining >= left - slack,
    }[mode] & (scores > -math.inf)
    kept = scores.masked_fill(~fits, -math.inf)
    fallback = select_nearest(scores, remaining, mode, left, patient)
    return torch.where(fits.any(dim=-1, keepdim=True), kept, fallback)


def as_list(guidance: LengthGuidance | Sequence[LengthGuidance]) -> list[LengthGuidance]:
    """One guidance as a list, and several as they are; a `ValueError` if there is none."""
    several = [guidance] if isinstance(guidance, LengthGuidance) else list(guidance)
    if not several:
        raise ValueError("no guidance is given: give one, or one for each prompt.")
    return several


def check_temperature(name: str, temperature: float, greedy: bool) -> None:
    """Raises a `ValueError` unless scores can be divided by a temperature; 0 is allowed where it means greedy."""
    if greedy and _is_number(temperature) and temperature == 0:
        return
    if not (_is_number(temperature) and MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
        raise ValueError(
            f"{name} must {'be 0 (greedy) or ' if greedy else ''}lie between {MIN_TEMPERATURE:g} and "
            f"{MAX_TEMPERATURE:g}, got {temperature!r}."
        )


def _is_number(value) -> bool:
    # Integers are compared as they are: a huge one has no float.
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
