"""What guidance did to each row of a generation: how long it is, what ended it, and what was overruled.

[`GuidanceReport`] is what a caller reads; [`RowLog`] writes it token by token, and [`WatchedCriteria`] tells it which
rows a stopping criterion has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

_EOS, _CRITERION, _LENGTH = "eos", "criterion", "length"


@dataclass
class GuidanceReport:
    """What guidance did to each row.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`, int64): tokens of each completion, end-of-sequence not counted.
        forced (`torch.Tensor` of shape `(B,)`, int64): steps at which more than half of the guided probability was
            overruled, because the end was barred or put.
        overruled (`torch.Tensor` of shape `(B,)`): the overruled probability, summed over steps: the expected number
            of choices that enforcement changed.
        log_probs (`torch.Tensor` of shape `(B, T)`): log-probability of each token under the guided distribution that
            it was drawn from; 0 after the end. (Greedy choices are certain; what is told is the distribution's.)
        policy_log_probs (`torch.Tensor` of shape `(B, T)`): the same under the policy at the guidance's temperature,
            without guidance and candidate rule. The importance ratio of a token is ``exp(policy - guided)``.
        finish_reason (list of `str`): what ended each row: `"eos"` (an end-of-sequence id), `"criterion"` (a stopping
            criterion, such as a stop string) or `"length"` (nothing: it was cut). Empty before `finish`.
    """

    lengths: Tensor
    forced: Tensor
    overruled: Tensor
    log_probs: Tensor
    policy_log_probs: Tensor
    finish_reason: list[str] = field(default_factory=list)


class RowLog:
    """Follows the rows of a generation, token by token: `finished` `(B,)` says which are over, `report` the rest.

    Args:
        rows (`int`): how many there are.
        end_ids (list of `int`): ids that end a row.
        pad_token_id (`int`, *optional*): what fills a row that is over, where it is known.
        device (`torch.device`): of the scores.
    """

    def __init__(self, rows: int, end_ids: list[int], pad_token_id: int | None, device: torch.device):
        self.ends = torch.tensor(end_ids, dtype=torch.long, device=device)
        self.pad_token_id = pad_token_id
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._ended_by_id = self.finished
        self.report = GuidanceReport(
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            forced=torch.zeros(rows, dtype=torch.int64, device=device),
            overruled=torch.zeros(rows, dtype=torch.float64, device=device),
            log_probs=torch.zeros(rows, 0, device=device),
            policy_log_probs=torch.zeros(rows, 0, device=device),
        )

    def take(self, chosen: Tensor, guided: Tensor, policy: Tensor | None, stopped: Tensor | None) -> None:
        """Adds the tokens that were drawn last.

        Args:
            chosen (`torch.Tensor` of shape `(B,)`): their ids; padding where a row was over before.
            guided (`torch.Tensor` of shape `(B, V)`): log-probabilities, up to a constant, that they were drawn from.
            policy (`torch.Tensor` of shape `(B, V)`, *optional*): the policy's; the report then keeps both.
            stopped (`torch.Tensor` of shape `(B,)`, *optional*): rows that a stopping criterion has ended by now.
        """
        chosen = chosen.to(self.finished.device)
        self.finished = self.finished | self._is_padding(chosen, guided)
        if policy is not None:
            # What fills a row that is over may be any id.
            tokens = chosen.masked_fill(self.finished, 0).unsqueeze(1)
            for name, scores in (("log_probs", guided), ("policy_log_probs", policy)):
                column = scores.log_softmax(dim=1).gather(1, tokens).masked_fill(self.finished.unsqueeze(1), 0.0)
                setattr(self.report, name, torch.cat([getattr(self.report, name), column], dim=1))
        live, ends = ~self.finished, torch.isin(chosen, self.ends)
        self.report.lengths += (live & ~ends).long()
        self._ended_by_id = self._ended_by_id | (live & ends)
        self.finished = self.finished | ends
        if stopped is not None:
            self.finished = self.finished | stopped.to(self.finished.device)

    def force(self, rows: Tensor | slice, overruled: Tensor) -> None:
        """Adds the probability that enforcement overruled in some rows, those that are over left out."""
        overruled = overruled.masked_fill(self.finished[rows], 0.0)
        self.report.forced[rows] += (overruled > 0.5).long()
        self.report.overruled[rows] += overruled.double()

    def close(self) -> GuidanceReport:
        """The report, with the reason why each row is over."""
        by_id, finished = self._ended_by_id.tolist(), self.finished.tolist()
        self.report.finish_reason = [
            _EOS if ended else _CRITERION if over else _LENGTH for ended, over in zip(by_id, finished, strict=True)
        ]
        return self.report

    def _is_padding(self, chosen: Tensor, guided: Tensor) -> Tensor:
        """Rows that are known to have been over before: their pad token cannot have been drawn from the scores."""
        if self.pad_token_id is None:
            return torch.zeros_like(self.finished)
        beyond = chosen >= guided.shape[1]
        barred = guided.gather(1, chosen.masked_fill(beyond, 0).unsqueeze(1)).squeeze(1) == -torch.inf
        return (chosen == self.pad_token_id) & (beyond | barred)


# `generate` makes these itself, and takes one that it is given in place of its own. Budgets cut all rows at once, and
# an end is seen in the ids.
MADE_BY_GENERATE = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


class WatchedCriteria(StoppingCriteria):
    """Says what other criteria say, and remembers which rows they have ended: `ended` `(B,)`, `None` before a token."""

    def __init__(self, criteria: Sequence[StoppingCriteria] = ()):
        # A stop string depends on the ids alone, so it may be looked for twice.
        own = [each for each in criteria if type(each) not in MADE_BY_GENERATE or type(each) is StopStringCriteria]
        self.criteria = StoppingCriteriaList(own)
        self.ended: Tensor | None = None
        self._as_they_are = [each for each in criteria if type(each) in MADE_BY_GENERATE]

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor] | None, **kwargs: Any) -> Tensor:
        """Which rows of `input_ids` `(B, S)` are over, `(B,)` bool."""
        ended = self.criteria(input_ids, scores, **kwargs)
        self.ended = ended if self.ended is None else self.ended | ended
        return ended

    def for_generate(self) -> StoppingCriteriaList:
        """What `generate` is to be given in place of the criteria."""
        return StoppingCriteriaList([*self._as_they_are, self])
