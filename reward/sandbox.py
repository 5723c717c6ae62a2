"""The sandbox's task reward: 1 if the completion ends, with the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lenvm_rl.sandbox.task import TOKENS, is_correct


def sandbox_reward(completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 for a completion that closes with ``A <answer> <eos>``, else 0.0, as for a truncated one.

    Reads the sampled ids, end-of-sequence included: the decoded text does not show whether the completion ended.
    `answer` is the dataset's column with the right answers.
    """
    return [
        float(is_correct([TOKENS[token] for token in ids[-3:]], right))
        for ids, right in zip(completion_ids, answer, strict=True)
    ]
