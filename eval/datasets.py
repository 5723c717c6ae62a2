"""The prompts that arms are compared on: the sandbox's, those of named tasks, or a dataset of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lenvm_rl.sampling import load_prompts
from lenvm_rl.sandbox import distinct_problems

# Seed of the sandbox's evaluation prompts: the same for every run.
EVALUATION_SEED = 0


@dataclass(frozen=True)
class Task:
    """How the rows of a known dataset are put to a policy and graded.

    Args:
        prompt_column (`str`): column with the problem.
        answer_column (`str`): column with the gold answer.
        reward (`str`): dotted path of the reward function that grades it.
        chat (`bool`): whether the problem is a user's message.
    """

    prompt_column: str
    answer_column: str
    reward: str
    chat: bool


TASKS = {
    "gsm8k": Task("question", "answer", "reward.gsm8k.gsm8k_reward", chat=True),
    "math500": Task("problem", "answer", "reward.mathematics.math_reward", chat=True),
}


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompts with what grading them needs.

    Args:
        prompts (list): texts or lists of messages.
        columns (`dict`): one list per column of the reward function, an entry per prompt.
        difficulties (list of `int`, *optional*): of the sandbox's prompts.
    """

    prompts: list[Any]
    columns: dict[str, list[Any]]
    difficulties: list[int] | None = None


def sandbox_prompts(count: int, split: str = "evaluation") -> EvaluationPrompts:
    """`count` prompts of a split of the sandbox, all difficulties alike, always the same."""
    problems = distinct_problems(count, EVALUATION_SEED, split)
    return EvaluationPrompts(
        [problem.prompt for problem in problems],
        {"answer": [problem.answer for problem in problems]},
        [problem.difficulty for problem in problems],
    )


def dataset_prompts(
    name: str,
    config: str | None,
    split: str,
    count: int,
    prompt_column: str,
    answer_column: str | None = None,
    chat: bool = False,
) -> EvaluationPrompts:
    """The first `count` rows of a dataset.

    Args:
        name (`str`), config (`str`, *optional*), split (`str`): as for [`~lenvm_rl.sampling.load_prompts`].
        count (`int`): most rows.
        prompt_column (`str`): column with the prompt.
        answer_column (`str`, *optional*): handed to the reward function as `answer`.
        chat (`bool`, *optional*, defaults to `False`): wrap prompts as a user's message.

    Raises:
        ValueError: a column is missing.
    """
    dataset = load_prompts(name, config, split, count)
    for column in (prompt_column, answer_column):
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {dataset.column_names}.")
    prompts = dataset[prompt_column][:]
    columns = {column: dataset[column][:] for column in dataset.column_names if column != prompt_column}
    if answer_column is not None:
        columns["answer"] = dataset[answer_column][:]
    return EvaluationPrompts(
        [[{"role": "user", "content": prompt}] for prompt in prompts] if chat else prompts, columns
    )
