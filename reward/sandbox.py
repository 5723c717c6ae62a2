"""The sandbox's task reward: 1 if the completion ends, with the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lenvm_rl.sandbox.task import TOKENS, is_correct


def sandbox_reward(completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **columns: Any) -> list[float]:
    """Reward function for TRL trainers on the sandbox.

    Works on the sampled token ids: the decoded text does not show whether the completion ended.

    Args:
        completion_ids (list of lists of `int`): sampled ids, end-of-sequence included.
        answer (list of `str`): the dataset's column with the right answers.
        columns: everything else that TRL passes; not used.

    Returns:
        list of `float`: 1.0 for a completion that closes with ``A <answer> <eos>``, else 0.0. A truncated completion
        has no end and gets 0.0.
    """
    return [
        float(is_correct([TOKENS[token] for token in ids[-3:]], right))
        for ids, right in zip(completion_ids, answer, strict=True)
    ]
