"""What programs share that grade completions: prompts of a task or of one's own, and the reward that grades them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from eval.datasets import sandbox_problems
from eval.runs import RecipeRun, RunArguments, check_sandbox, find_run
from lenvm_rl.reward_functions import (
    BY_TRL,
    NO_COLUMNS,
    call_reward,
    check_columns,
    correctness_values,
    load_reward,
    name_of,
)
from lenvm_rl.tokenization import as_chats, find_prompt_problem, load_prompts

logger = logging.getLogger(__name__)

SANDBOX_TASK = "sandbox"
SANDBOX_REWARD = "reward.sandbox.sandbox_reward"


@dataclass(frozen=True)
class Task:
    """How a known dataset is put to a policy and graded: columns, dotted path of the reward, whether it is a chat."""

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
    """`count` prompts of a split of the sandbox, always the same."""
    problems = sandbox_problems(count, split=split)
    return EvaluationPrompts(
        [problem.prompt for problem in problems],
        {"answer": [problem.answer for problem in problems]},
        [problem.difficulty for problem in problems],
    )


@dataclass
class GradedArguments(RunArguments):
    """Arguments of a program that grades completions: how the rows of a dataset are put to a policy and graded."""

    task: str | None = HfArg(
        default=None,
        help="'gsm8k' or 'math500': sets prompt_column, answer_column, chat and reward for --dataset_name, and adds "
        "the arms that ask for brevity or choose among samples; 'sandbox' for the built-in task.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a hub dataset.")
    dataset_split: str = HfArg(default="test", help="Split of a hub dataset.")
    prompt_column: str | None = HfArg(default=None, help="Column with the prompt. Default: the task's or the run's.")
    answer_column: str | None = HfArg(
        default=None, help="Column that the reward function gets as 'answer'. Default: the task's."
    )
    chat: bool | None = HfArg(
        default=None, help="Wrap text prompts as a user's message. Default: as in the run, or the task's."
    )
    reward: str | None = HfArg(
        default=None,
        help="Dotted path of the reward function, such as my_rewards.exact_match; above 0.5 is correct. Default: the "
        "task's, or the run's.",
    )
    max_new_tokens: int | None = HfArg(
        default=None,
        help="Longest completion, end-of-sequence counted. Default: as in the run, or in the rollouts that the length "
        "value model was fitted on, else 256.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in (None, SANDBOX_TASK, *TASKS):
            raise ValueError(f"task must be one of {[SANDBOX_TASK, *TASKS]}, got {self.task!r}.")
        if self.task in TASKS and self.dataset_name is None:
            raise ValueError(f"task {self.task!r} needs its data: name a hub id or a local file with --dataset_name.")
        if self.task == SANDBOX_TASK and self.dataset_name is not None:
            raise ValueError("task 'sandbox' makes its own prompts: leave dataset_name out.")

    def defaults(self, run: RecipeRun) -> dict[str, Any]:
        """What the task, or else the run, says of the arguments that are not given."""
        task, data = TASKS.get(self.task), run.data
        if task is None:
            reward = run.record.get("reward", SANDBOX_REWARD)
            own = {"prompt_column": data.get("prompt_column", "prompt"), "answer_column": None, "reward": reward}
        else:
            own = {name: getattr(task, name) for name in ("prompt_column", "answer_column", "reward")}
        # A run on data of its own says whether its policy was trained on messages; the task, what is in its columns.
        own_data = task is None or data.get("dataset_name") is not None
        return own | {"chat": data.get("chat", False) if own_data else task.chat}

    def load_prompts(self, count: int) -> EvaluationPrompts:
        """The first `count` prompts of the dataset, or as many of the sandbox's; the arguments must be complete."""
        if self.dataset_name is None:
            return sandbox_prompts(count)
        name, prompt_column = self.dataset_name, self.prompt_column
        dataset = load_prompts(name, self.dataset_config, self.dataset_split)
        for option in ("prompt_column", "answer_column"):
            column = getattr(self, option)
            if column is not None and column not in dataset.column_names:
                raise ValueError(f"{name} has no column {column!r}; it has {dataset.column_names}. Set --{option}.")
        if len(dataset) > count:
            logger.info("%s: the first %d of %d prompts", name, count, len(dataset))
            dataset = dataset.select(range(count))
        prompts = dataset[prompt_column][:]
        for row, prompt in enumerate(prompts):
            problem = find_prompt_problem(prompt)
            if problem is None and self.chat and not isinstance(prompt, str):
                problem = "holds messages already, which --chat would wrap once more: give --chat false"
            if problem is not None:
                raise ValueError(
                    f"{name}, column {prompt_column!r}: row {row} (the first is 0) {problem}. Mend or remove such "
                    "rows, or name another column with --prompt_column."
                )
        # What a trainer would not hand to a reward function either, or hands it of its own.
        kept = set(dataset.column_names) - {prompt_column} - NO_COLUMNS - BY_TRL
        columns = {column: dataset[column][:] for column in dataset.column_names if column in kept}
        if self.answer_column is not None:
            columns["answer"] = dataset[self.answer_column][:]
        if self.chat:
            prompts = as_chats(prompts)
        return EvaluationPrompts(prompts, columns)


def read_run(args: GradedArguments, among_trained: bool = False) -> tuple[Any, RecipeRun]:
    """The arguments completed by what run.json says, but for what only the models know; and the run."""
    run = find_run(args.run_dir, args.policy, args.length_value_model, among_trained)
    data = run.data.get("dataset_name")
    complete = args.from_run(run, **args.defaults(run))
    if args.dataset_name is None and data is not None:
        raise ValueError(
            f"{run.folder} was trained on {data}: name prompts to evaluate on with --dataset_name (for a hub id its "
            "--dataset_split, 'test' by default; a local file of other prompts)."
        )
    return complete, run


def find_reward(
    args: GradedArguments, tokenizer: PreTrainedTokenizerBase, data: EvaluationPrompts
) -> Callable[..., Sequence[float]]:
    """The reward function of complete arguments, if the policy can read the prompts and it can grade their answers."""
    if args.dataset_name is None:
        instead = "Name prompts to evaluate on with --dataset_name, and a --reward."
        check_sandbox(tokenizer, args.policy, "The prompts are", instead)
    elif args.reward == SANDBOX_REWARD:
        instead = "Name a function that grades your data with --reward, or a --task."
        check_sandbox(tokenizer, args.policy, "The reward function is", instead)
    reward = load_reward(args.reward)
    check_columns(reward, data.columns, args.dataset_name or "the sandbox")
    return reward


def grade(
    reward: Callable[..., Sequence[float]],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    completions: Sequence[list[int]],
    rows: Sequence[int],
    num_samples: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Which completions are correct, and which were graded at all, `(N,)` each; see `lenvm_rl.reward_functions`.

    What is no flag (0 or 1) is remarked in the log: the limit between right and wrong may be another one there.

    Args:
        reward (callable): a TRL reward function.
        tokenizer (`PreTrainedTokenizerBase`): decodes the completions.
        prompts (sequence): texts or lists of messages.
        columns (mapping): one list per column of the dataset, an entry per prompt.
        completions (sequence of lists of `int`): N completions.
        rows (sequence of `int`): index of each completion's prompt.
        num_samples (`int`): completions of each prompt, side by side.
    """
    own = {name: [column[row] for row in rows] for name, column in columns.items()}
    several = num_samples if num_samples > 1 else None
    paid = call_reward(reward, tokenizer, [prompts[row] for row in rows], completions, own, several)
    found, threshold = correctness_values(reward, paid)
    values = np.array([np.nan if value is None else float(value) for value in found])
    graded = ~np.isnan(values)
    others = sorted(set(values[graded].tolist()) - {0.0, 1.0})
    if others:
        logger.warning(
            "%s gives other values than 0 and 1, from %g to %g: above %g counts as correct",
            name_of(reward), others[0], others[-1], threshold,
        )  # fmt: skip
    return np.where(graded, values, -np.inf) > threshold, graded
