"""The stages of a training recipe, each with an artefact on disk that the next run reuses.

policy (the sandbox's, or given) -> rollouts -> length value model (with gamma from the rollouts) -> trained policy. The
settings of a stage hold the settings of the stages that it was made from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from lenvm_rl.files import last_complete_checkpoint, read_json, read_metrics, write_json
from lenvm_rl.modeling.backbones import load_model
from lenvm_rl.modeling.loading import ADAPTER_FILE, check_policy, load_tokenizer, model_type, read_config
from lenvm_rl.modeling.sharing import FULL
from lenvm_rl.pretraining.trainer import LengthValueTrainingArguments, pretrain
from lenvm_rl.programs import choose_threads
from lenvm_rl.reward_functions import are_correct, call_reward, check_golds, load_reward, name_of
from lenvm_rl.rollouts.job import SamplingSettings, find_column_problem, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import REQUIRED_COLUMNS, read_rollouts, split_by_prompt
from lenvm_rl.sandbox import DIFFICULTIES, PolicySettings, distinct_problems, fit_policy
from lenvm_rl.sandbox.styles import check_passes
from lenvm_rl.sandbox.task import sandbox_tokenizer
from lenvm_rl.tokenization import check_context, check_prompts, check_same_tokenizer, load_prompts
from lenvm_rl.trainers import checks
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.fields import changed_fields
from lenvm_rl.trainers.rewards import gate_index
from recipes.arguments import StageArguments, check_packages, holds_few_bits, model_kwargs
from recipes.pretrain_lenvm import print_comparison
from recipes.reward_trial import try_rewards
from recipes.sample_rollouts import make_prompts
from recipes.stage_records import console, is_made, make_apart, run_stage, say, say_next

logger = logging.getLogger(__name__)

# The sandbox's seeds, so that no stage repeats another's draw.
ROLLOUT_SEED, TRAIN_SEED = 1, 2
RECORD = "run.json"
# Settings that say where a run writes and reports, not what it computes.
NOT_PART_OF_A_RUN = ("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "resume_from_checkpoint")


def gate_reward_path(args: StageArguments, config: LenVMConfig) -> str:
    """The dotted path of the reward function that says what is correct; the first one where nothing needs to know."""
    functions = [load_reward(path) for path in args.reward_funcs]
    users = ["pretrain_only_correct"] if args.pretrain_only_correct else []
    index = gate_index(config, functions, [name_of(function) for function in functions], users)
    return args.reward_funcs[index or 0]


class StagedRun:
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

        self._revision = {name: value for name, value in self.load_kwargs.items() if name == "revision"}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, padding with `pad_token` if one is given."""
        return load_tokenizer(self.policy, self.args.pad_token, **self._revision)

    @cached_property
    def dataset(self) -> Dataset:
        """A dataset of one's own, in its order: column `prompt`, and what the rewards need."""
        name, column = self.args.dataset_name, self.args.prompt_column
        dataset = load_prompts(name, self.args.dataset_config, self.args.dataset_split)
        if column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {dataset.column_names}. Set --prompt_column.")
        prompts = dataset[column][:]
        check_prompts(prompts, f"{name}, column {column!r}", chat=self.args.chat)
        if column != "prompt" and "prompt" in dataset.column_names:
            dataset = dataset.remove_columns("prompt")
        if not self.args.chat:
            return dataset if column == "prompt" else dataset.rename_column(column, "prompt")
        # The new column comes before the old one goes: without any column there would be no rows.
        dataset = dataset.rename_column(column, "text of the prompt")
        dataset = dataset.add_column("prompt", make_prompts(prompts, self.args.chat, None))
        return dataset.remove_columns("text of the prompt")

    def prompts(self, count: int | None, seed: int) -> Dataset:
        """Training prompts: column `prompt` and what the rewards need, in random order (sandbox: stratified)."""
        seed += 10 * self.config.seed
        if self.sandbox:
            problems = distinct_problems(count or 2048, seed, "train")
            rows = [{"prompt": p.prompt, "answer": p.answer, "difficulty": p.difficulty} for p in problems]
            return Dataset.from_list(rows)
        dataset = self.dataset.shuffle(seed=seed)
        return dataset if count is None else dataset.select(range(min(count, len(dataset))))

    def check(self) -> None:
        """Look at all that a person handed over, before the first stage spends time on it."""
        rewards = [load_reward(path) for path in self.args.reward_funcs]
        if self.sandbox:
            name, tokenizer, dataset = "the sandbox", sandbox_tokenizer(), self.prompts(4, TRAIN_SEED)
            check_sandbox_settings(self.args)
        else:
            check_policy(self.policy)
            name, tokenizer, dataset = self.args.dataset_name, self.tokenizer, self.dataset
            source, prompts = f"{name}, column {self.args.prompt_column!r}", dataset["prompt"][:]
            check_prompts(prompts, source, tokenizer)
            check_context(prompts, source, tokenizer, self.config.max_completion_length, self._context())
            check_golds(rewards, dataset)
        checks.check_dataset(self.prompts(self.args.train_prompts, TRAIN_SEED), self.config)
        try_rewards(rewards, dataset, tokenizer, self.config, name)
        form = self.args.pretrain_form
        if self.args.length_value_model is not None:
            config = read_config(self.args.length_value_model)
            form = config.form
            check_same_tokenizer(config.tokenizer_fingerprint, tokenizer)
        if form != FULL and not self.model.use_peft and self.config.beta == 0.0:
            raise ValueError(
                f"A length value model of form {form!r} shares a decoder that has to stay as it is, and this policy's "
                "is trained: set use_peft=true (then its base stays) or beta above 0 (the reference does), or take "
                "form 'full'."
            )
        self._earlier_record()

    def _context(self) -> int | None:
        """Most tokens of a prompt and its completion, `None` if nothing says it, as for adapters alone."""
        bounds = []
        if model_type(self.policy, ADAPTER_FILE) is not None:
            config = load_model(AutoConfig.from_pretrained, self.policy, **self._revision).get_text_config()
            bounds += [getattr(config, "max_position_embeddings", None)]
        bounds += [self.config.vllm_max_model_length] if self.config.use_vllm else []
        return min((bound for bound in bounds if bound is not None), default=None)

    def policy_settings(self) -> dict[str, Any]:
        """What the base policy depends on."""
        if self.sandbox:
            return asdict(
                PolicySettings(
                    train_tokens=self.args.policy_tokens,
                    seed=self.config.seed,
                    passes=self.args.policy_passes,
                    repeats=self.args.policy_repeats,
                    start=self.args.policy_start,
                )
            )
        settings = {"path": self.policy, "pad_token": self.args.pad_token, **self.load_kwargs}
        if holds_few_bits(self.model):
            settings["quantization_config"] = self.load_kwargs["quantization_config"].to_dict()
        return settings

    def artefacts(self) -> list[Path]:
        """What the stages before training make."""
        own = [self.output_dir / "policy"] if self.sandbox else []
        return own + ([self.output_dir / "length_value_model"] if self.args.length_value_model is None else [])

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
        own = {"sample_prompts": self.args.sample_prompts, "seed": self.config.seed, "policy": self.policy_settings()}
        return {**asdict(self.sampling()), **self.data_settings(), **own}

    def data_settings(self) -> dict[str, Any]:
        """Where prompts come from."""
        names = ("dataset_name", "dataset_config", "dataset_split", "prompt_column", "chat")
        return {name: getattr(self.args, name) for name in names}

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
            job = TransformersJob(
                self._load_policy(),
                self.tokenizer,
                dataset["prompt"][:],
                self.sampling(),
                seed=self.config.seed,
                extra_columns=self._kept_columns(dataset),
            )
            sample_to_file(self.rollouts, job, self.policy)

        run_stage("sampling rollouts of the policy", self.rollouts, self.rollout_settings(), make)

    def _load_policy(self) -> PreTrainedModel:
        model = load_model(AutoModelForCausalLM.from_pretrained, self.policy, **self.load_kwargs)
        if not holds_few_bits(self.model):
            # What is quantised is quantised on the device.
            model = model.to("cuda" if torch.cuda.is_available() and not self.config.use_cpu else "cpu")
        return model.eval()

    def _kept_columns(self, dataset: Dataset) -> dict[str, list[Any]]:
        """Columns that are kept with the rollouts: those that a file of rollouts holds, if nobody needs the others."""
        columns = {name: dataset[name][:] for name in dataset.column_names if name != "prompt"}
        if self.args.pretrain_only_correct:
            return columns
        kept = {
            name: column
            for name, column in columns.items()
            if name not in REQUIRED_COLUMNS and find_column_problem(name, column) is None
        }
        if len(kept) < len(columns):
            logger.info("columns not kept with the rollouts: %s", ", ".join(sorted(set(columns) - set(kept))))
        return kept

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
        target = self.output_dir / "length_value_model"
        # Rollouts are large, and need not stay where they have served.
        if self.rollouts.exists() or not is_made(target):
            self.make_rollouts()
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
            form=args.pretrain_form,
            layers=args.pretrain_layers,
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
        # What shares a decoder reads the hidden states that it has in as many bits as training holds it in.
        shares = args.pretrain_form != FULL and holds_few_bits(self.model)
        base = self._load_policy() if shares else self.policy
        model, metrics = pretrain(base, train, metadata, arguments, self.tokenizer, eval_rollouts=held_out)
        print_comparison(metrics, console)

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
        names = ("dataset_name", "dataset_config", "prompt_column", "chat", "pad_token")
        content = {
            "policy": self._recorded_policy,
            "length_value_model": self._portable(self.length_value_model),
            "trained": {**self._earlier_record()["trained"], name: self._portable(str(path))},
            "data": {key: getattr(self.args, key) for key in names},
            "reward": gate_reward_path(self.args, self.config),
            "temperature": self.config.temperature,
            "max_new_tokens": self.config.max_completion_length,
        }
        write_json(self.output_dir / RECORD, content)

    def _earlier_record(self) -> dict[str, Any]:
        """What earlier runs wrote into run.json; a `ValueError` if they were of another policy."""
        path = self.output_dir / RECORD
        found = read_json(path) if path.exists() else {"trained": {}}
        if found.get("policy", self._recorded_policy) != self._recorded_policy:
            raise ValueError(f"{path} belongs to the policy {found['policy']}: give another --output_dir.")
        return found

    @property
    def _recorded_policy(self) -> str:
        return "policy" if self.sandbox else self._portable(self.policy)

    def _portable(self, path: str) -> str:
        """Paths that exist, relative to the run's folder; hub ids as they are."""
        return os.path.relpath(path, self.output_dir) if os.path.exists(path) else path


def prepare_process(sandbox: bool) -> None:
    """Library messages to the console, on the main process, and the threads of a single process on a CPU.

    The sandbox runs in one thread: for models of its size that is as fast as two, and gives the same numbers on any
    machine of the kind. A model of one's own gets all cores. What the environment says about threads goes before both.
    """
    logging.basicConfig(level=logging.INFO if PartialState().is_main_process else logging.ERROR, format="%(message)s")
    for noisy in ("httpx", "datasets", "fsspec", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if PartialState().num_processes == 1 and not torch.cuda.is_available():
        choose_threads(1 if sandbox else None)


def smoke_sizes(config: LenVMConfig) -> None:
    """The sizes of a smoke run, in place."""
    config.max_steps, config.max_completion_length = 2, 32
    config.per_device_train_batch_size, config.gradient_accumulation_steps = 8, 1
    config.generation_batch_size, config.steps_per_generation = 8, 1
    config.num_generations = min(config.num_generations, 4)


def check_sandbox_settings(args: StageArguments) -> None:
    """Raises a `ValueError`, by the name of the option, if the sandbox cannot be made as asked."""
    for name in ("sample_prompts", "train_prompts"):
        if (count := getattr(args, name)) is not None and count % len(DIFFICULTIES):
            raise ValueError(f"{name}={count}: the sandbox has {len(DIFFICULTIES)} difficulties, give a multiple.")
    check_passes(args.policy_passes, "policy_passes")


def check_before(args: StageArguments, config: LenVMConfig, model: ModelConfig, dense: bool) -> None:
    """What training would refuse, refused before the first stage spends time.

    Args:
        args ([`~recipes.arguments.StageArguments`]), config, model: as parsed.
        dense (`bool`): whether advantages differ from token to token even with both coefficients at 0.
    """
    gate_reward_path(args, config)
    check_packages(config, model)
    checks.check_model_path(model.model_name_or_path, "the policy")
    checks.check_model_path(args.length_value_model, "the length value model")
    if dense or config.needs_length_value_model:
        checks.check_loss(config)
    if config.eval_strategy != "no":
        raise ValueError(
            "The recipes train only: leave eval_strategy at 'no', and compare with `python -m eval.tradeoff`."
        )


def begin_run(args: StageArguments, config: LenVMConfig, model: ModelConfig, dense: bool = False) -> StagedRun:
    """The run that the arguments describe, with every stage before training done."""
    check_before(args, config, model, dense)
    if args.smoke:
        smoke_sizes(config)
    run = StagedRun(args, config, model)
    run.check()
    made = run.artefacts()
    if PartialState().num_processes > 1 and not all(map(is_made, made)):
        make_apart(made)
    run.make_policy()
    run.make_length_value_model()
    if args.prepare_only:
        raise SystemExit(0)
    return run


def train_stage(algorithm: str, run: StagedRun, make_trainer: Callable[..., Any], **settings: Any) -> None:
    """Train a policy into `<output_dir>/<trained_name>`, going on from its last checkpoint if there is one.

    Args:
        algorithm (`str`): name of the run's subfolder and of the trained policy in run.json, unless one is given.
        run ([`~recipes.stages.StagedRun`]): what was made before.
        make_trainer (callable): takes the trainer's keyword arguments, returns the trainer.
        settings: further settings that the result depends on.
    """
    config = run.config
    name = run.args.trained_name or algorithm
    target = run.output_dir / name
    config.output_dir = str(target)
    config.model_init_kwargs = {**(config.model_init_kwargs or {}), **run.load_kwargs} or None

    def train() -> None:
        rewards = [load_reward(path) for path in run.args.reward_funcs]
        trainer = make_trainer(
            model=run.policy,
            args=config,
            reward_funcs=rewards,
            train_dataset=run.prompts(run.args.train_prompts, TRAIN_SEED),
            processing_class=run.tokenizer,
            length_value_model=run.length_value_model,
            peft_config=get_peft_config(run.model),
        )
        checkpoint = config.resume_from_checkpoint or last_complete_checkpoint(target)
        if checkpoint is not None:
            say(f"going on from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint)
        done, wanted = trainer.state.global_step, trainer.state.max_steps
        if done < wanted:
            # As on SIGTERM with enable_jit_checkpoint: the stage is not finished.
            raise SystemExit(
                f"Training was stopped after {done} of {wanted} steps: run the same command again, and it goes on."
            )
        trainer.save_model(str(target))
        if config.refresh_steps > 0 and PartialState().is_main_process:
            # The run's own knows the base policy, and stays; this one knows the trained policy.
            bare = trainer.accelerator.unwrap_model(trainer.length_value_model)
            bare.save_pretrained(str(target / "length_value_model"))

    depends = {key: value for key, value in config.to_dict().items() if key not in NOT_PART_OF_A_RUN}
    stages = {"reward_funcs": run.args.reward_funcs, "train_prompts": run.args.train_prompts}
    # Defaults are left out, as in the records from before these were compared.
    stages |= {name: getattr(run.args, name) for name in changed_fields(run.args, tuple(run.data_settings()))}
    made_from = {"policy": run.policy_settings(), "length_value_model": run.value_settings(), "peft": vars(run.model)}
    run_stage("training", target, {**depends, **stages, **settings, **made_from}, train)
    if PartialState().is_main_process:
        run.record(name, target)
        show_progress(target / "metrics.jsonl")
        data = [] if run.sandbox else ["--dataset_name", "TEST_PROMPTS"]
        say_next("python", "-m", "eval.tradeoff", "--run_dir", str(run.output_dir), *data)


def show_progress(path: Path) -> None:
    """Print reward and length of the first and the last fifth of the training log."""
    logs = [entry for entry in read_metrics(path) if "reward" in entry]
    if not logs:
        say(f"no step was logged (logging_steps is above the number of steps): see {path}")
        return
    part = max(1, len(logs) // 5)
    for title, entries in (("first", logs[:part]), ("last", logs[-part:])):
        shown = {
            key: sum(entry[key] for entry in entries) / len(entries)
            for key in ("reward", "length/mean", "length/truncated")
            if all(key in entry for entry in entries)
        }
        text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        say(f"{title} {part} of {len(logs)} logged steps: {text}")
