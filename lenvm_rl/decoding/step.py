"""One step of guided decoding, for rows that each have a guidance, ends and a slot of their own.

Whoever decodes, `generate` or an engine, hands over the policy's scores of its rows and gets the guided ones back:
[`guide_rows`] makes candidates of them, has the candidates scored, and weighs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_rl.decoding.guidance import TILT, LengthGuidance
from lenvm_rl.decoding.scoring import Scorer
from lenvm_rl.endings import likeliest_end
from lenvm_rl.returns import remaining_from_logits

# In these, strength times value would overflow, or be rounded away.
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GuidedRow:
    """A row of a step.

    Args:
        guidance ([`LengthGuidance`]): its own.
        ends (tuple of `int`): tokens that end it, all of them among the scores.
        written (`int`): tokens of its completion that stand already.
        slot (`int`, *optional*): of the scorer. Without one, as for a row that is over, no candidate is scored, and
            what comes out is of no use where `guidance.needs_values`.
    """

    guidance: LengthGuidance
    ends: tuple[int, ...]
    written: int
    slot: int | None = None

    @property
    def kind(self) -> tuple:
        """What rows share that are guided by the same operations."""
        return self.guidance, self.ends, None if self.guidance.mode == TILT else self.written


@dataclass(frozen=True)
class GuidedScores:
    """What a step gives back.

    Args:
        scores (`torch.Tensor` of shape `(B, V)`): log-probabilities up to a constant, ``-inf`` where a token is no
            candidate. At temperature 1: the guidance's own temperature is in them.
        overruled (`torch.Tensor` of shape `(B,)`): the probability of the end that a hard bound took away or put there;
            0 where none did.
    """

    scores: Tensor
    overruled: Tensor


@dataclass
class _Candidates:
    """Candidates of rows of one kind: ids `(R, K)` ascending and scores, padded with ``-inf``; where the end is barred,
    `without` has the scores as they are without it."""

    rows: Tensor
    ids: Tensor
    scores: Tensor
    without: Tensor | None


def guide_rows(rows: Sequence[GuidedRow], scores: Tensor, scorer: Scorer, gamma: float) -> GuidedScores:
    """Guides one step.

    Args:
        rows (sequence of [`GuidedRow`], B of them): what is known of each row.
        scores (`torch.Tensor` of shape `(B, V)`): the policy's, as it gives them.
        scorer ([`~lenvm_rl.decoding.scoring.Scorer`]): holds the rows in their slots, up to their last token.
        gamma (`float`): of the length value model.

    Raises:
        FloatingPointError: the length value model gives NaN or infinity.
    """
    guided = torch.full_like(scores, -math.inf)
    overruled = torch.zeros(len(rows), dtype=torch.float32, device=scores.device)
    kinds: dict[tuple, list[int]] = {}
    for number, row in enumerate(rows):
        kinds.setdefault(row.kind, []).append(number)
    groups = [(rows[own[0]], _candidates(rows[own[0]], own, scores, scorer.vocab_size)) for own in kinds.values()]
    values = _values(rows, groups, scorer)
    for (row, each), logits in zip(groups, values, strict=True):
        _weigh(row, each, logits, gamma, scores, guided, overruled)
    return GuidedScores(guided, overruled)


def _candidates(row: GuidedRow, members: list[int], scores: Tensor, known: int) -> _Candidates:
    """Candidates of the rows `members`, all of the kind of `row`: the policy after temperature and candidate rule."""
    guidance = row.guidance
    warpers = guidance.warpers()
    at = torch.tensor(members, device=scores.device)
    ends = torch.tensor(row.ends, dtype=torch.long, device=scores.device)
    own = (scores[at].float() if scores.dtype in HALF else scores[at]) / (guidance.temperature or 1.0)
    if guidance.needs_values:
        own = _bar_unknown(own, known, ends)
    policy, without = warpers(None, own), None
    if guidance.bars_end(row.written):
        barred = own.index_fill(1, ends, -math.inf)
        # Where nothing but the end is left to choose, it stays.
        possible = torch.isfinite(barred).any(dim=1, keepdim=True)
        without = warpers(None, torch.where(possible, barred, own))
    union = policy if without is None else torch.maximum(policy, without)
    width = max(1, int(torch.isfinite(union).sum(dim=1).max()))
    ids = union.topk(width, dim=1).indices.sort(dim=1).values
    return _Candidates(at, ids, policy.gather(1, ids), None if without is None else without.gather(1, ids))


def _bar_unknown(scores: Tensor, known: int, ends: Tensor) -> Tensor:
    """Bars what the length value model's smaller table has no row for, except ends, whose value is known."""
    if scores.shape[1] <= known:
        return scores
    barred = scores.clone()
    barred[:, known:] = -math.inf
    barred[:, ends] = scores[:, ends]
    # Where nothing else can be chosen, scoring will say so.
    return torch.where(torch.isfinite(barred).any(dim=1, keepdim=True), barred, scores)


def _values(
    rows: Sequence[GuidedRow], groups: Sequence[tuple[GuidedRow, _Candidates]], scorer: Scorer
) -> list[Tensor | None]:
    """For each group, the logits `(R, K)` of the states after its candidates, 0 where none was asked for; `None` where
    values have no say. All groups share one forward."""
    asked = [(row, each) for row, each in groups if row.guidance.needs_values]
    if not asked:
        return [None] * len(groups)
    width = max(each.ids.shape[1] for _, each in asked)
    slots, ids, valid = [], [], []
    for row, each in asked:
        wanted = row.guidance.weighed(each.scores)
        if each.without is not None:
            wanted = wanted | row.guidance.weighed(each.without)
        # The only candidate of a row is chosen whatever its value; its forward waits until one is needed.
        wanted &= wanted.sum(dim=1, keepdim=True) > 1
        wanted &= ~torch.isin(each.ids, torch.tensor(row.ends, device=each.ids.device))
        room = (0, width - each.ids.shape[1])
        slots += [rows[number].slot for number in each.rows.tolist()]
        ids.append(torch.nn.functional.pad(each.ids, room))
        valid.append(torch.nn.functional.pad(wanted, room))
    live = torch.tensor([slot is not None for slot in slots], device=ids[0].device)
    whole = torch.cat(ids)
    scored = torch.zeros(whole.shape, dtype=torch.float32, device=whole.device)
    there = [slot for slot in slots if slot is not None]
    if there:
        scored[live] = scorer.score(there, whole[live], torch.cat(valid)[live])
    if not bool(torch.isfinite(scored).all()):
        raise FloatingPointError("the length value model gave NaN or infinity: check its weights and its dtype.")
    parts = iter(scored.split([len(each.rows) for _, each in asked]))
    return [next(parts)[:, : each.ids.shape[1]] if row.guidance.needs_values else None for row, each in groups]


def _weigh(
    row: GuidedRow,
    each: _Candidates,
    logits: Tensor | None,
    gamma: float,
    scores: Tensor,
    guided: Tensor,
    overruled: Tensor,
) -> None:
    """Writes the guided scores of a group, with the hard bound on top."""
    guidance, written = row.guidance, row.written
    ends = torch.isin(each.ids, torch.tensor(row.ends, device=each.ids.device))

    def weighed(policy: Tensor) -> Tensor:
        if logits is None:
            return policy
        # The end's own are known, and any other token has at least the end still to come.
        values = (-logits.sigmoid()).masked_fill(ends, 0.0)
        remaining = remaining_from_logits(logits, gamma).clamp(min=1.0).to(values.dtype).masked_fill(ends, 0.0)
        return guidance.guide(policy, values, remaining, written)

    def end_mass(weights: Tensor) -> Tensor:
        return (weights.softmax(dim=1) * ends).sum(dim=1).float()

    chosen = weighed(each.scores)
    if each.without is not None:
        with_end, chosen = chosen, weighed(each.without)
        overruled[each.rows] = end_mass(with_end) - end_mass(chosen)
    elif guidance.puts_end(written):
        overruled[each.rows] = 1.0 - end_mass(chosen)
        guided[each.rows, likeliest_end(scores[each.rows], row.ends)] = 0.0
        return
    guided[each.rows.unsqueeze(1), each.ids] = chosen.to(guided.dtype)
