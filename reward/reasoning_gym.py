"""Task rewards for the tasks of reasoning-gym (arXiv 2505.24760), scored by its own `score_answer`.

reasoning-gym makes its tasks from a seed, so a row of a dataset says how to make its task again: its name, its
settings, and its index. [`reasoning_gym_rows`] writes such rows:

    from datasets import Dataset
    from reward.reasoning_gym import reasoning_gym_rows

    Dataset.from_list(reasoning_gym_rows("chain_sum", 1000, seed=0)).to_json("chain_sum.jsonl")

Scorers run in processes that end with an answer that takes too long (`reward.timed_calls`). Some tasks' scorers parse
the answer as an expression with sympy, which evaluates it: train on such tasks only where running what the policy
writes is acceptable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from reward.answers import completion_texts
from reward.timed_calls import call_all

try:
    from reasoning_gym import create_dataset
    from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer
except ImportError as error:
    raise ImportError("reward.reasoning_gym needs the package reasoning-gym: pip install reasoning-gym") from error

# Scores are sums and quotients of floats.
FULL_SCORE = 1.0 - 1e-6
# Longest time that one answer may take to be scored.
TIME_LIMIT_SECONDS = 5


def reasoning_gym_rows(task: str, size: int, *, seed: int, chat: bool = True, **settings: Any) -> list[dict[str, Any]]:
    """Rows of a dataset for one task, for [`reasoning_gym_reward`]. Rows of several tasks may be mixed.

    A row has `prompt`, `answer` (a right one, or `None` where the task gives no example), and what the task is made
    from again: `reasoning_gym_task`, `reasoning_gym_settings` (JSON), `reasoning_gym_index`.

    Args:
        task (`str`): a name of reasoning-gym's, such as `"chain_sum"`.
        size (`int`): number of rows.
        seed (`int`): that they are drawn from; take another one for evaluation.
        chat (`bool`, *optional*, defaults to `True`):
            Whether prompts are messages, reasoning-gym's default instructions (to reason, then to answer between
            ``<answer>`` and ``</answer>``) being the system's, or else one text.
        settings: further settings of the task, which JSON can hold.
    """
    settings = {"seed": seed, "size": size, **settings}
    written = json.dumps(settings, sort_keys=True)
    if json.loads(written) != settings:
        raise ValueError(f"Settings must survive JSON, such as lists in place of tuples: {settings}.")
    dataset = _dataset(task, written)
    instructions = SYSTEM_PROMPTS["default"]
    rows = []
    for index in range(size):
        entry = dataset[index]
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": entry["question"]}]
        rows.append(
            {
                "prompt": messages if chat else f"{instructions}\n{entry['question']}\n",
                "answer": entry["answer"],
                "reasoning_gym_task": task,
                "reasoning_gym_settings": written,
                "reasoning_gym_index": index,
            }
        )
    return rows


def reasoning_gym_reward(
    completions: Sequence,
    reasoning_gym_task: Sequence[str],
    reasoning_gym_settings: Sequence[str],
    reasoning_gym_index: Sequence[int],
    **columns: Any,
) -> list[float]:
    """The task's own score of what stands between the last ``<answer>`` and ``</answer>``.

    In [0, 1], and 0 where a completion has no answer, or one that cannot be scored, or not in 5 s: the log says so.
    Most tasks score 1 or 0, some give part of it for an answer that is near or only well formed: length penalties need
    [`reasoning_gym_correct`] instead. The columns are written by [`reasoning_gym_rows`].
    """
    texts = completion_texts(completions, columns)
    calls = {}
    made_from = zip(texts, reasoning_gym_task, reasoning_gym_settings, reasoning_gym_index, strict=True)
    for place, (text, task, settings, index) in enumerate(made_from):
        answer = None if text is None else extract_answer(text)
        if answer is not None:
            # A task that cannot be made stops the run here; an answer that cannot be scored is worth nothing there.
            _entry(task, settings, index)
            calls[place] = (task, settings, index, answer)
    scores = call_all(score, list(calls.values()), limit=TIME_LIMIT_SECONDS, otherwise=0.0)
    found = dict(zip(calls, scores, strict=True))
    return [found.get(place, 0.0) for place in range(len(texts))]


def score(task: str, settings: str, index: int, answer: str) -> float:
    """The score of one answer, as [`reasoning_gym_reward`] asks for it in another process."""
    return float(_dataset(task, settings).score_answer(answer, _entry(task, settings, index)))


def reasoning_gym_correct(completions: Sequence, **columns: Any) -> list[float]:
    """1.0 where [`reasoning_gym_reward`] gives the full score, else 0.0: a correctness flag. Same arguments."""
    return [float(score >= FULL_SCORE) for score in reasoning_gym_reward(completions, **columns)]


@lru_cache(maxsize=64)
def _dataset(task: str, settings: str) -> Any:
    return create_dataset(task, **json.loads(settings))


@lru_cache(maxsize=4096)
def _entry(task: str, settings: str, index: int) -> dict[str, Any]:
    return _dataset(task, settings)[index]
