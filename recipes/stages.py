"""The stages before reinforcement learning, each with an artefact on disk that the next run reuses.

policy (the sandbox's, or given) -> rollouts -> length value model (with gamma from the rollouts). A stage is finished
when its record beside the artefact says so; a later run with the same settings reuses it, one with other settings is
refused, since artefacts that other stages were made from must not change under them. The settings of a stage hold those
of the stages it was made from.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from eval.arms import call_reward, load_reward
from lenvm_rl.correctness import are_correct
from lenvm_rl.pretraining import LengthValueTrainingArguments, pretrain
from lenvm_rl.reward_functions import name_of
from lenvm_rl.rollouts import atomic_file, read_rollouts, split_by_prompt
from lenvm_rl.sampling import load_prompts, sample_to_file
from lenvm_rl.sampling_jobs import SamplingSettings
from lenvm_rl.sandbox import PolicySettings, distinct_problems, fit_policy
from lenvm_rl.trainers.configs import LenVMConfig
from lenvm_rl.trainers.gate import gate_index
from recipes.arguments import StageArguments, model_kwargs
from recipes.sample_rollouts import make_prompts

logger = logging.getLogger(__name__)
console = Console(width=120, highlight=False)

# The sandbox's seeds, so that no stage repeats another's draw.
ROLLOUT_SEED, TRAIN_SEED = 1, 2


def gate_reward_path(args: StageArguments, config: LenVMConfig) -> str:
    """The dotted path of the reward function that says what is correct; of the first one where nothing needs to know.

    Raises:
        ValueError: what [`~lenvm_rl.trainers.gate.gate_index`] refuses.
    """
    functions = [load_reward(path) for path in args.reward_funcs]
    users = ["pretrain_only_correct"] if args.pretrain_only_correct else []
    index = gate_index(config, functions, [name_of(function) for function in functions], users)
    return args.reward_funcs[index or 0]


def run_stage(title: str, artefact: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> None:
    """Make an artefact unless it is there already.

    Args:
        title (`str`): what the stage does, for the console.
        artefact (`pathlib.Path`): the file or folder that `make` writes.
        settings (mapping): everything that the artefact depends on; kept in `<artefact>.stage.json`.
        make (callable): writes the artefact, or goes on with what an interrupted run left of it.

    Raises:
        ValueError: the artefact was made, or begun, with other settings, or several processes would make it at once.
    """
    record = artefact.with_name(artefact.name + ".stage.json")
    settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            before = found["settings"]
            changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
            raise ValueError(
                f"{artefact} was made with other settings ({', '.join(changed)} differ). Give another --output_dir, or "
                "another --trained_name if only training differs; or remove the artefact, its .stage.json, and what "
                "was made from it."
            )
        if found["finished"]:
            console.print(f"[bold]{title}[/bold]: done before, {artefact}")
            return
    if PartialState().num_processes > 1 and title != "training":
        raise ValueError(
            f"{artefact} is not there yet, and this stage runs in one process: run recipes/sample_rollouts.py and "
            "recipes/pretrain_lenvm.py first and give --length_value_model, or start once with one process."
        )
    console.print(f"[bold]{title}[/bold] -> {artefact}")
    write_record(record, settings, finished=False)
    make()
    write_record(record, settings, finished=True)


def write_record(record: Path, settings: Mapping[str, Any], finished: bool) -> None:
    """Write a stage's record, on the main process."""
    if PartialState().is_main_process:
        with atomic_file(record) as file:
            file.write(json.dumps({"finished": finished, "settings": settings}, indent=1, sort_keys=True).encode())


class Run:
    """One run of a recipe: where its artefacts are, and the settings they are made with.

    Args:
        args ([`~recipes.arguments.StageArguments`]): settings of the stages.
        config (`LenVMGRPOConfig` or `LenVMPPOConfig`): settings of the trainer; sampling, seed and precision hold for
            every stage.
        model (`trl.ModelConfig`): a person's own policy, or none for the sandbox's.
    """

    def __init__(self, args: StageArguments, config: LenVMConfig, model: ModelConfig):
        self.args, self.config, self.model = args, config, model
        self.output_dir = Path(config.output_dir)
        self.sandbox = model.model_name_or_path is None
        self.policy = model.model_name_or_path or str(self.output_dir / "policy")
        self.length_value_model = args.length_value_model or str(self.output_dir / "length_value_model")
        self.rollouts = self.output_dir / "rollouts.jsonl"
        # One process has one mixed precision, so the stages share the trainer's.
        self.precision = {"bf16": config.bf16, "fp16": config.fp16, "use_cpu": config.use_cpu}
        self.load_kwargs = {} if self.sandbox else model_kwargs(model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, padding with `pad_token` if one is given."""
        revision = {"revision": self.load_kwargs["revision"]} if "revision" in self.load_kwargs else {}
        tokenizer = AutoTokenizer.from_pretrained(self.policy, **revision)
        if self.args.pad_token is not None:
            if self.args.pad_token not in tokenizer.get_vocab():
                raise ValueError(f"pad_token {self.args.pad_token!r} is not in the vocabulary of {self.policy}.")
            tokenizer.pad_token = self.args.pad_token
        return tokenizer

    def prompts(self, count: int | None, seed: int) -> Dataset:
        """Training prompts: column `prompt` and what the rewards need, in random order (sandbox: stratified)."""
        seed += 10 * self.config.seed
        if self.sandbox:
            problems = distinct_problems(count or 2048, seed, "train")
            rows = [{"prompt": p.prompt, "answer": p.answer, "difficulty": p.difficulty} for p in problems]
            return Dataset.from_list(rows)
        name, column = self.args.dataset_name, self.args.prompt_column
        dataset = load_prompts(name, self.args.dataset_config, self.args.dataset_split)
        if column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {dataset.column_names}. Set --prompt_column.")
        if column != "prompt":
            if "prompt" in dataset.column_names:
                dataset = dataset.remove_columns("prompt")
            dataset = dataset.rename_column(column, "prompt")
        dataset = dataset.shuffle(seed=seed)
        if count is not None:
            dataset = dataset.select(range(min(count, len(dataset))))
        prompts = make_prompts(dataset["prompt"][:], self.args.chat, None)
        bad = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, (str, list))]
        if bad:
            raise ValueError(f"{len(bad)} prompts of {name} are neither text nor messages (column {column!r}).")
        return dataset.remove_columns("prompt").add_column("prompt", prompts)

    def policy_settings(self) -> dict[str, Any]:
        """What the base policy depends on."""
        if self.sandbox:
            return asdict(PolicySettings(train_tokens=self.args.policy_tokens, seed=self.config.seed))
        return {"path": self.policy, "pad_token": self.args.pad_token, **self.load_kwargs}

    def make_policy(self) -> None:
        """Stage 1: fit the sandbox's policy to its teacher."""
        if not self.sandbox:
            return
        settings, target = self.policy_settings(), self.output_dir / "policy"
        run_stage(
            "fitting a policy to the sandbox's teacher",
            target,
            settings,
            lambda: fit_policy(str(target), PolicySettings(**settings), **self.precision),
        )

    def rollout_settings(self) -> dict[str, Any]:
        """What the rollouts depend on."""
        names = ("dataset_name", "dataset_config", "dataset_split", "prompt_column", "chat", "sample_prompts")
        data = {name: getattr(self.args, name) for name in names}
        return {**asdict(self.sampling()), **data, "seed": self.config.seed, "policy": self.policy_settings()}

    def sampling(self) -> SamplingSettings:
        """How rollouts are sampled: as the trainer samples its own."""
        config = self.config
        if config.min_p not in (None, 0.0) or config.repetition_penalty != 1.0:
            raise ValueError(
                "min_p and repetition_penalty would make the trainer sample from another distribution than the "
                "rollouts of the length value model: leave them unset, or give --length_value_model."
            )
        return SamplingSettings(
            num_samples=self.args.sample_num_samples,
            max_new_tokens=config.max_completion_length,
            batch_size=self.args.sample_batch_size,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k or 0,
        )

    def make_rollouts(self) -> None:
        """Stage 2: sample completions of the policy; an interrupted run goes on where it was."""

        def make() -> None:
            dataset = self.prompts(self.args.sample_prompts, ROLLOUT_SEED)
            extra = {name: dataset[name][:] for name in dataset.column_names if name != "prompt"}
            device = "cuda" if torch.cuda.is_available() and not self.config.use_cpu else "cpu"
            model = AutoModelForCausalLM.from_pretrained(self.policy, **self.load_kwargs).to(device).eval()
            sample_to_file(
                self.rollouts,
                model,
                self.tokenizer,
                dataset["prompt"][:],
                self.sampling(),
                seed=self.config.seed,
                extra_columns=extra,
                generator=self.policy,
            )

        run_stage("sampling rollouts of the policy", self.rollouts, self.rollout_settings(), make)

    def value_settings(self) -> dict[str, Any]:
        """What the length value model depends on."""
        if self.args.length_value_model is not None:
            return {"path": self.args.length_value_model}
        settings = {name: value for name, value in asdict(self.args).items() if name.startswith("pretrain_")}
        if self.args.pretrain_only_correct:
            settings["correct"] = [self.args.reward_funcs, self.config.gate_reward, self.config.gate_threshold]
        return {**settings, "rollouts": self.rollout_settings()}

    def make_length_value_model(self) -> None:
        """Stage 3: fit gamma to the rollouts and pretrain a length value model from the policy's decoder."""
        if self.args.length_value_model is not None:
            return
        self.make_rollouts()
        target = self.output_dir / "length_value_model"
        run_stage(
            "fitting gamma and pretraining the length value model",
            target,
            self.value_settings(),
            lambda: self._pretrain(target),
        )

    def _pretrain(self, target: Path) -> None:
        args = self.args
        rollouts, metadata = read_rollouts(self.rollouts)
        if args.pretrain_only_correct:
            rollouts = self._grade(rollouts)
        train, held_out = split_by_prompt(rollouts, 0.1, seed=self.config.seed)
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
            seed=self.config.seed,
            **self.precision,
        )
        model, metrics = pretrain(self.policy, train, metadata, arguments, self.tokenizer, eval_rollouts=held_out)
        fit = model.config.gamma_fit
        console.print(
            f"gamma {model.config.gamma:.5f} from {fit['completions']} completions, "
            f"percentiles of their lengths in tokens {fit['percentiles']}"
        )
        console.print({name: round(value, 4) for name, value in metrics.items() if isinstance(value, float)})

    def _grade(self, rollouts: Dataset) -> Dataset:
        """Rollouts with a column `correct`, by the function and the threshold of the length gate."""
        path = gate_reward_path(self.args, self.config)
        reward = load_reward(path)
        columns = {
            name: rollouts[name][:] for name in rollouts.column_names if name not in ("prompt", "completion_ids")
        }
        paid = call_reward(reward, self.tokenizer, rollouts["prompt"][:], rollouts["completion_ids"][:], columns)
        return rollouts.add_column("correct", are_correct(reward, paid, self.config.gate_threshold))

    def record(self, name: str, path: Path) -> None:
        """Write into run.json what `eval.tradeoff` needs: the models, the trained policies, data and sampling.

        Paths inside the run's folder are kept relative to it, so that the folder can be moved.
        """
        target = self.output_dir / "run.json"
        found = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"trained": {}}
        names = ("dataset_name", "dataset_config", "prompt_column", "chat", "pad_token")
        content = {
            "policy": self._portable(self.policy),
            "length_value_model": self._portable(self.length_value_model),
            "trained": {**found["trained"], name: self._portable(str(path))},
            "data": {key: getattr(self.args, key) for key in names},
            "reward": gate_reward_path(self.args, self.config),
            "temperature": self.config.temperature,
            "max_new_tokens": self.config.max_completion_length,
        }
        if found.get("policy", content["policy"]) != content["policy"]:
            raise ValueError(f"{target} belongs to the policy {found['policy']}: give another --output_dir.")
        with atomic_file(target) as file:
            file.write(json.dumps(content, indent=1).encode())

    def _portable(self, path: str) -> str:
        """Paths that exist, relative to the run's folder; hub ids as they are."""
        return os.path.relpath(path, self.output_dir) if os.path.exists(path) else path
