"""What `eval.tradeoff` compares: its arguments, completed by what the run says of itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from eval.datasets import TASKS, EvaluationPrompts, dataset_prompts, sandbox_prompts
from eval.runs import CANDIDATES, SANDBOX_CANDIDATES, SANDBOX_RUN, Run, check_sandbox, find_run
from lenvm_rl.modeling.loading import read_config

logger = logging.getLogger(__name__)

SANDBOX = "sandbox"
SANDBOX_REWARD = "reward.sandbox.sandbox_reward"
# Where neither the run nor the length value model says how long completions may be.
MAX_NEW_TOKENS = 256


@dataclass
class TradeoffArguments:
    """What to compare, on which prompts, and where to write it."""

    run_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a recipe's run; its run.json says what was trained, on what, and how it samples. "
            f"Default: {SANDBOX_RUN}, or none where --policy is given."
        },
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "Base policy, folder or hub id; needs --length_value_model and --dataset_name. Default: the run's."
        },
    )
    length_value_model: str | None = field(
        default=None, metadata={"help": "Length value model, folder or hub id. Default: the run's."}
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "The model that a length value model of form adapter or head was fitted on. Default: the base "
            "policy."
        },
    )
    trained: list[str] = field(
        default_factory=list, metadata={"help": "Trained policies as NAME=PATH. Default: all that the run lists."}
    )
    tilt: list[str] = field(
        default_factory=lambda: ["base"],
        metadata={"help": "Policies whose decoding is tilted: 'base' and names of trained ones."},
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "'gsm8k' or 'math500': sets prompt_column, answer_column, chat and reward for --dataset_name, and "
            "adds prompts that ask for brevity and the shortest of several samples; 'sandbox' for the built-in task."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to evaluate on: a hub id or a local .jsonl, .json, .parquet or .csv file. Default: the "
            "sandbox's, for its own policies."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a hub dataset."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the prompt. Default: the task's or the run's."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column that the reward function gets as 'answer'. Default: the task's."}
    )
    chat: bool | None = field(
        default=None, metadata={"help": "Wrap text prompts as a user's message. Default: as in the run, or the task's."}
    )
    reward: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of the reward function, such as my_rewards.exact_match; above 0.5 is correct. "
            "Default: the task's, or the run's."
        },
    )
    num_prompts: int = field(default=320, metadata={"help": "Evaluation prompts: the first so many of the dataset."})
    num_samples: int = field(default=4, metadata={"help": "Completions per prompt and arm."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest completion, end-of-sequence counted. Default: as in the run, or in the rollouts that the "
            f"length value model was fitted on, else {MAX_NEW_TOKENS}."
        },
    )
    batch_size: int = field(default=256, metadata={"help": "Completions per generate call."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature of every arm. Default: as in the run, or in the rollouts that the length "
            "value model was fitted on, else 1."
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Candidate rule of every arm: top-k, 0 for none. Default: 15; sandbox: 0."}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Candidate rule of every arm: top-p, 1 for none. Default: 0.999; sandbox: 1."}
    )
    min_p: float | None = field(
        default=None, metadata={"help": "Candidate rule of every arm: min-p, 0 for none. Default: 0; sandbox: 0.01."}
    )
    strengths: list[float] = field(
        default_factory=lambda: [-1.0, 0.25, 0.5, 1.0, 2.0, 4.0],
        metadata={"help": "Tilt strengths in units of 1/std(V), the spread of values over the base completions."},
    )
    budget_quantiles: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.85, 0.95],
        metadata={"help": "Hard limits, as quantiles of the base policy's lengths."},
    )
    prompt_only: bool | None = field(
        default=None,
        metadata={"help": "Ask for the same budgets in the prompt. Default: for a task that is not the sandbox."},
    )
    budget_request: str = field(
        default="\n\nAnswer in at most {budget} tokens.",
        metadata={"help": "What is appended to the prompt (to its last message) for that; {budget} is the number."},
    )
    best_of: list[int] | None = field(
        default=None,
        metadata={
            "help": "Shortest finished of n samples, for each n: divisors of num_samples. Default: those of 2, 4 and 8 "
            "for a task that is not the sandbox, else none."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling and bootstrap; the prompts do not depend on it."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where to write. Default: RUN_DIR/tradeoff; for models of no run, outputs/tradeoff."},
    )

    def __post_init__(self) -> None:
        if min(self.num_prompts, self.num_samples, self.batch_size) < 1:
            raise ValueError("num_prompts, num_samples and batch_size must be at least 1.")
        if not all(0 <= quantile <= 1 for quantile in self.budget_quantiles):
            raise ValueError(f"budget_quantiles must lie in [0, 1], got {self.budget_quantiles}.")
        if not all("=" in entry for entry in self.trained):
            raise ValueError(f"trained takes NAME=PATH, got {self.trained}.")
        if self.task not in (None, SANDBOX, *TASKS):
            raise ValueError(f"task must be one of {[SANDBOX, *TASKS]}, got {self.task!r}.")
        if self.task in TASKS and self.dataset_name is None:
            raise ValueError(f"task {self.task!r} needs its data: name a hub id or a local file with --dataset_name.")
        if self.task == SANDBOX and self.dataset_name is not None:
            raise ValueError("task 'sandbox' makes its own prompts: leave dataset_name out.")
        if self.prompt_only and self.dataset_name is None:
            raise ValueError("The sandbox's policies read no words, so prompt_only means nothing there: leave it out.")
        if "{budget}" not in self.budget_request:
            raise ValueError(f"budget_request must hold {{budget}}, got {self.budget_request!r}.")
        if not all(count > 1 and self.num_samples % count == 0 for count in self.best_of or ()):
            raise ValueError(
                f"best_of chooses among the {self.num_samples} samples of a prompt: each must be a divisor of "
                f"num_samples above 1, got {self.best_of}."
            )


@dataclass
class Comparison:
    """What is compared, on which prompts: the arguments, completed by what the run says of itself.

    Args:
        args ([`TradeoffArguments`]): complete.
        run ([`~eval.runs.Run`]): the run, or none.
        trained (`dict`): name and path of every trained policy.
        data ([`~eval.datasets.EvaluationPrompts`]): the prompts, and what grading needs.
    """

    args: TradeoffArguments
    run: Run
    trained: dict[str, str]
    data: EvaluationPrompts

    @property
    def pad_token(self) -> str | None:
        """Pad token of the run, if it is not the tokenizer's own."""
        return self.run.data.get("pad_token")

    @property
    def prompts(self) -> list[Any]:
        """Evaluation prompts: texts or lists of messages."""
        return self.data.prompts

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Columns of the reward function."""
        return self.data.columns

    @property
    def difficulties(self) -> list[int] | None:
        """Difficulties of the sandbox's prompts, else `None`."""
        return self.data.difficulties


def read_run(args: TradeoffArguments, among_trained: bool = False) -> Comparison:
    """Complete the arguments from run.json, but for what only the models know, and load the evaluation prompts.

    Args:
        args ([`TradeoffArguments`]): as given.
        among_trained (`bool`, *optional*, defaults to `False`): see [`~eval.runs.find_run`].

    Raises:
        ValueError: there is no run and the models are not given, or the run has its own data and none is given here.
    """
    run = find_run(args.run_dir, args.policy, args.length_value_model, among_trained)
    record, data, task = run.record, run.data, TASKS.get(args.task)
    # A run on data of its own says whether its policy was trained on messages; the task says what is in its columns.
    chat = data.get("chat", False) if task is None or data.get("dataset_name") is not None else task.chat
    defaults = {
        "run_dir": run.folder,
        "policy": run.model("policy"),
        "length_value_model": run.model("length_value_model"),
        "prompt_column": data.get("prompt_column", "prompt") if task is None else task.prompt_column,
        "answer_column": None if task is None else task.answer_column,
        "chat": chat,
        "reward": record.get("reward", SANDBOX_REWARD) if task is None else task.reward,
        "temperature": record.get("temperature"),
        "max_new_tokens": record.get("max_new_tokens"),
        "prompt_only": task is not None,
        "best_of": [] if task is None else [count for count in (2, 4, 8) if args.num_samples % count == 0],
        **(SANDBOX_CANDIDATES if args.dataset_name is None else CANDIDATES),
    }
    complete = replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    for name in ("policy", "length_value_model"):
        if getattr(complete, name) is None:
            raise ValueError(f"the run.json of {run.folder} names no {name}: give --{name}.")
    trained = dict(entry.split("=", 1) for entry in args.trained) or run.trained
    unknown = set(args.tilt) - {"base", *trained}
    if unknown:
        raise ValueError(f"tilt names {sorted(unknown)}, but there are only 'base' and {sorted(trained)}.")
    if args.dataset_name is None and data.get("dataset_name") is not None:
        raise ValueError(
            f"{run.folder} was trained on {data['dataset_name']}: name prompts to evaluate on with --dataset_name "
            "(for a hub id its --dataset_split, 'test' by default; a local file of other prompts)."
        )
    return Comparison(complete, run, trained, load_data(complete))


def sampled_as_fitted(args: TradeoffArguments) -> TradeoffArguments:
    """Fills in how completions are sampled, where nobody said so, from what the length value model was fitted on.

    Lengths under other settings are other lengths, of which the model knows nothing.
    """
    if None not in (args.temperature, args.max_new_tokens):
        return args
    fitted = read_config(args.length_value_model).sampling or {}
    settings = {}
    for name, otherwise in (("temperature", 1.0), ("max_new_tokens", MAX_NEW_TOKENS)):
        if getattr(args, name) is None:
            known = fitted.get(name) is not None
            settings[name] = fitted[name] if known else otherwise
            where = "as in the rollouts of the length value model" if known else "for nothing says how it was sampled"
            logger.info("%s %s, %s; --%s sets another", name, settings[name], where, name)
    return replace(args, **settings)


def check_data(args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless a policy can read its prompts and its completions can be graded.

    Args:
        args ([`TradeoffArguments`], or others with its `policy`, `dataset_name` and `reward`): complete.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.

    Raises:
        ValueError: its vocabulary is not the sandbox's, but the prompts, or the reward function, are.
    """
    if args.dataset_name is None:
        instead = "Name prompts to evaluate on with --dataset_name, and a --reward."
        check_sandbox(tokenizer, args.policy, "The prompts are", instead)
    elif args.reward == SANDBOX_REWARD:
        instead = "Name a function that grades your data with --reward, or a --task."
        check_sandbox(tokenizer, args.policy, "The reward function is", instead)


def load_data(args: TradeoffArguments) -> EvaluationPrompts:
    """The evaluation prompts of complete arguments: a dataset's, or the sandbox's."""
    if args.dataset_name is None:
        return sandbox_prompts(args.num_prompts)
    return dataset_prompts(
        args.dataset_name,
        args.dataset_config,
        args.dataset_split,
        args.num_prompts,
        args.prompt_column,
        args.answer_column,
        args.chat,
    )
