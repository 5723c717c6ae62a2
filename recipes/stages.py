"""The stages before reinforcement learning, each with an artefact on disk that the next run reuses.

policy (the sandbox's, or given) -> rollouts -> length value model (with gamma from the rollouts). A stage is finished
when the record of its settings stands beside its artefact; a later run with the same settings reuses it, one with
other settings is refused, since artefacts that other stages were made from must not change under them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.arms import load_object
from lenvm_rl.pretraining import LengthValueTrainingArguments, pretrain
from lenvm_rl.rollouts import atomic_file, read_rollouts, split_by_prompt
from lenvm_rl.sampling import load_prompts, sample_to_file
from lenvm_rl.sampling_jobs import SamplingSettings
from lenvm_rl.sandbox import PolicySettings, distinct_problems, fit_policy

logger = logging.getLogger(__name__)
console = Console(width=120, highlight=False)

# The sandbox's seeds, so that no stage repeats another's draw.
ROLLOUT_SEED, TRAIN_SEED = 1, 2


@dataclass
class StageArguments:
    """What comes before training: data, rewards, rollouts of the policy, and its length value model."""

    length_value_model: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained length value model (folder or hub id). Default: sample rollouts and pretrain one."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a hub id or a .jsonl, .json, .parquet or .csv file. Default: the built-in sandbox."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column with the prompt, text or messages; other columns go to the rewards."},
    )
    chat: bool = field(
        default=False, metadata={"help": "Wrap text prompts as a user's message, for the model's chat template."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["reward.sandbox.sandbox_reward"],
        metadata={"help": "Dotted paths of reward functions. The first says what is correct, unless gate_reward does."},
    )
    policy_tokens: int = field(default=5_000_000, metadata={"help": "Sandbox: tokens the policy is fitted on."})
    sample_prompts: int = field(default=480, metadata={"help": "Prompts to sample rollouts for."})
    sample_num_samples: int = field(default=16, metadata={"help": "Completions per prompt."})
    sample_batch_size: int = field(default=256, metadata={"help": "Completions per generate call."})
    pretrain_epochs: float = field(default=3.0, metadata={"help": "Passes over the rollouts."})
    pretrain_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the length value model."})
    pretrain_batch_size: int = field(default=32, metadata={"help": "Completions per optimiser step and process."})
    pretrain_only_correct: bool = field(
        default=False,
        metadata={
            "help": "Fit the length value model on correct completions only, a remedy for length_gate='correct'."
        },
    )
    train_prompts: int | None = field(
        default=None, metadata={"help": "Training prompts. Default: all of the dataset; 2048 of the sandbox."}
    )
    trained_name: str | None = field(
        default=None,
        metadata={
            "help": "Subfolder of output_dir for the trained policy, so that several runs can share the earlier "
            "stages. Default: the algorithm's name."
        },
    )
    smoke: bool = field(default=False, metadata={"help": "Run every stage at a size that only shows that it runs."})


def shrink(args: StageArguments) -> None:
    """The sizes of a smoke run, in place."""
    args.policy_tokens, args.sample_prompts, args.sample_num_samples = 40_000, 16, 4
    args.pretrain_epochs, args.train_prompts = 1.0, 32


def json_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, so that a record read from disk can be compared."""
    return json.loads(json.dumps(settings, sort_keys=True, default=str))


def run_stage(title: str, artefact: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> None:
    """Make an artefact unless it is there already.

    Args:
        title (`str`): what the stage does, for the console.
        artefact (`pathlib.Path`): the file or folder that `make` writes.
        settings (mapping): everything that the artefact depends on; kept in `<artefact>.stage.json`.
        make (callable): writes the artefact.

    Raises:
        ValueError: the artefact was made with other settings, or several processes would make it at once.
    """
    record = artefact.with_name(artefact.name + ".stage.json")
    settings = json_settings(settings)
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found != settings:
            changed = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
            raise ValueError(
                f"{artefact} was made with other settings ({', '.join(changed)} differ). Give another --output_dir, or "
                f"remove {artefact} and {record} to make it again."
            )
        console.print(f"[bold]{title}[/bold]: done before, {artefact}")
        return
    if PartialState().num_processes > 1 and title != "training":
        raise ValueError(
            f"{artefact} is not there yet, and this stage runs in one process: run recipes/sample_rollouts.py and "
            "recipes/pretrain_lenvm.py first and give --length_value_model, or start once with one process."
        )
    console.print(f"[bold]{title}[/bold] -> {artefact}")
    make()
    if PartialState().is_main_process:
        with atomic_file(record) as file:
            file.write(json.dumps(settings, indent=1, sort_keys=True).encode())


@dataclass
class Run:
    """One run of a recipe: where its artefacts are, and the settings they were made with.

    Args:
        args ([`StageArguments`]): settings of the stages.
        output_dir (`pathlib.Path`): folder of the artefacts.
        model_name_or_path (`str`, *optional*): a person's own policy; `None` for the sandbox's.
        max_completion_length (`int`): longest completion, end-of-sequence counted.
        temperature (`float`): sampling temperature of rollouts and training.
        seed (`int`): seed of every stage.
        precision (`dict`): `bf16`, `fp16` and `use_cpu` of the trainer, for the other stages too: one process has one
            mixed precision.
    """

    args: StageArguments
    output_dir: Path
    model_name_or_path: str | None
    max_completion_length: int
    temperature: float
    seed: int
    precision: dict[str, bool]

    def __post_init__(self) -> None:
        if self.args.dataset_name is None and self.model_name_or_path is not None:
            raise ValueError("A model of your own needs prompts: give --dataset_name (a hub id or a local file).")
        if self.args.dataset_name is not None and self.model_name_or_path is None:
            raise ValueError("A dataset of your own needs a policy: give --model_name_or_path.")
        if self.args.smoke:
            shrink(self.args)

    @property
    def policy(self) -> str:
        """Path of the base policy."""
        return self.model_name_or_path or str(self.output_dir / "policy")

    @property
    def length_value_model(self) -> str:
        """Path of the length value model."""
        return self.args.length_value_model or str(self.output_dir / "length_value_model")

    @property
    def device(self) -> str:
        """Where the rollouts are sampled."""
        return "cuda" if torch.cuda.is_available() and not self.precision["use_cpu"] else "cpu"

    @property
    def rollouts(self) -> Path:
        """File of the rollouts."""
        return self.output_dir / "rollouts.jsonl"

    def prompts(self, count: int | None, seed: int) -> Dataset:
        """Training prompts: column `prompt` and what the rewards need, in random order (sandbox: stratified)."""
        if self.args.dataset_name is None:
            problems = distinct_problems(count or 2048, 10 * self.seed + seed, "train")
            rows = [{"prompt": p.prompt, "answer": p.answer, "difficulty": p.difficulty} for p in problems]
            return Dataset.from_list(rows)
        dataset = load_prompts(self.args.dataset_name, self.args.dataset_config, self.args.dataset_split)
        column = self.args.prompt_column
        if column not in dataset.column_names:
            raise ValueError(f"{self.args.dataset_name} has no column {column!r}; it has {dataset.column_names}.")
        dataset = dataset.rename_column(column, "prompt") if column != "prompt" else dataset
        dataset = dataset.shuffle(seed=self.seed + seed)
        if count is not None:
            dataset = dataset.select(range(min(count, len(dataset))))
        if self.args.chat:
            dataset = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        return dataset

    def make_policy(self) -> None:
        """Stage 1: fit the sandbox's policy to its teacher."""
        if self.model_name_or_path is not None:
            return
        settings = PolicySettings(train_tokens=self.args.policy_tokens, seed=self.seed)
        target = self.output_dir / "policy"
        run_stage(
            "fitting a policy to the sandbox's teacher",
            target,
            asdict(settings),
            lambda: fit_policy(str(target), settings, **self.precision),
        )

    def make_rollouts(self) -> None:
        """Stage 2: sample completions of the policy; an interrupted run goes on where it was."""
        args = self.args
        settings = SamplingSettings(
            num_samples=args.sample_num_samples,
            max_new_tokens=self.max_completion_length,
            batch_size=args.sample_batch_size,
            temperature=self.temperature,
        )

        def make() -> None:
            dataset = self.prompts(args.sample_prompts, ROLLOUT_SEED)
            extra = {name: dataset[name][:] for name in dataset.column_names if name != "prompt"}
            model = AutoModelForCausalLM.from_pretrained(self.policy).to(self.device).eval()
            tokenizer = AutoTokenizer.from_pretrained(self.policy)
            sample_to_file(
                self.rollouts,
                model,
                tokenizer,
                dataset["prompt"][:],
                settings,
                seed=self.seed,
                extra_columns=extra,
                generator=self.policy,
            )

        depends = {**asdict(settings), "prompts": args.sample_prompts, **self._data_settings(), "policy": self.policy}
        run_stage("sampling rollouts of the policy", self.rollouts, depends, make)

    def make_length_value_model(self) -> None:
        """Stage 3: fit gamma to the rollouts and pretrain a length value model from the policy's decoder."""
        args = self.args
        if args.length_value_model is not None:
            return
        self.make_rollouts()
        target = self.output_dir / "length_value_model"
        settings = {name: value for name, value in asdict(args).items() if name.startswith(("pretrain_", "sample_"))}
        run_stage(
            "fitting gamma and pretraining the length value model",
            target,
            {**settings, "seed": self.seed, "policy": self.policy},
            lambda: self._pretrain(target),
        )

    def _pretrain(self, target: Path) -> None:
        args = self.args
        rollouts, metadata = read_rollouts(self.rollouts)
        if args.pretrain_only_correct:
            rollouts = self._grade(rollouts)
        train, held_out = split_by_prompt(rollouts, 0.1, seed=self.seed)
        arguments = LengthValueTrainingArguments(
            output_dir=str(target),
            num_train_epochs=args.pretrain_epochs,
            learning_rate=args.pretrain_learning_rate,
            per_device_train_batch_size=args.pretrain_batch_size,
            per_device_eval_batch_size=args.pretrain_batch_size,
            only_correct=args.pretrain_only_correct,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=self.seed,
            **self.precision,
        )
        tokenizer = AutoTokenizer.from_pretrained(self.policy)
        model, metrics = pretrain(self.policy, train, metadata, arguments, tokenizer, eval_rollouts=held_out)
        fit = model.config.gamma_fit
        console.print(
            f"gamma {model.config.gamma:.5f} from {fit['completions']} completions, "
            f"percentiles of their lengths in tokens {fit['percentiles']}"
        )
        console.print({name: round(value, 4) for name, value in metrics.items() if isinstance(value, float)})

    def _grade(self, rollouts: Dataset) -> Dataset:
        reward = load_object(self.args.reward_funcs[0])
        columns = {
            name: rollouts[name][:] for name in rollouts.column_names if name not in ("prompt", "completion_ids")
        }
        tokenizer = AutoTokenizer.from_pretrained(self.policy)
        ids = rollouts["completion_ids"][:]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = reward(
            prompts=rollouts["prompt"][:], completions=chats if self.args.chat else texts, completion_ids=ids, **columns
        )
        return rollouts.add_column("correct", [reward is not None and reward > 0.5 for reward in rewards])

    def _data_settings(self) -> dict[str, Any]:
        names = ("dataset_name", "dataset_config", "dataset_split", "prompt_column", "chat")
        return {"seed": self.seed, **{name: getattr(self.args, name) for name in names}}

    def record(self, name: str, path: Path) -> None:
        """Write what `eval.tradeoff` needs into run.json: policy, length value model, and each trained policy."""
        target = self.output_dir / "run.json"
        trained = json.loads(target.read_text(encoding="utf-8"))["trained"] if target.exists() else {}
        trained[name] = str(path)
        content = {"policy": self.policy, "length_value_model": self.length_value_model, "trained": trained}
        with atomic_file(target) as file:
            file.write(json.dumps(content, indent=1).encode())
