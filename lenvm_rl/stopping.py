"""Which rows of a generation its stopping criteria have ended.

`generate` goes on until every row is over, and fills a row that is with the pad token. Logits processors see ids alone,
where a padding token may be one that the policy could have chosen; so the criteria themselves are asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

# `generate` makes these itself, and takes one that it is given in place of its own. Budgets cut all rows at once, and
# an end is seen in the ids.
MADE_BY_GENERATE = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


class WatchedCriteria(StoppingCriteria):
    """Says what other criteria say, and remembers which rows they have ended.

    Args:
        criteria (sequence of `StoppingCriteria`): as for `generate`.

    Attributes:
        ended (`torch.Tensor` of shape `(B,)` or `None`): the rows that any of them has ended so far; `None` before the
            first token.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria] = ()):
        self.criteria = StoppingCriteriaList(criteria)
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor] | None, **kwargs) -> Tensor:
        """Which rows of `input_ids` `(B, S)` are over, `(B,)` bool."""
        ended = self.criteria(input_ids, scores, **kwargs)
        self.ended = ended if self.ended is None else self.ended | ended
        return ended


def watch(criteria: Sequence[StoppingCriteria]) -> tuple[StoppingCriteriaList, WatchedCriteria]:
    """What `generate` is to be given in place of some criteria, and the criterion among it that remembers.

    Args:
        criteria (sequence of `StoppingCriteria`): as for `generate`.
    """
    as_they_are = [each for each in criteria if type(each) in MADE_BY_GENERATE]
    # A stop string depends on the ids alone, so it may be looked for twice.
    asked = [each for each in criteria if type(each) not in MADE_BY_GENERATE or type(each) is StopStringCriteria]
    watched = WatchedCriteria(asked)
    return StoppingCriteriaList([*as_they_are, watched]), watched
