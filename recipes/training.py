"""What the training recipes share: reading the command line, the stages before training, training, and its record."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config

from eval.arms import load_object
from lenvm_rl.trainers.configs import LenVMConfig
from recipes.stages import TRAIN_SEED, Run, StageArguments, console, run_stage

CONFIGS = Path(__file__).parent / "configs"
# Settings that say where a run writes and reports, not what it computes.
NOT_PART_OF_A_RUN = ("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "resume_from_checkpoint")


def read_arguments(config_class: type, sandbox_config: str, *more: type, description: str) -> tuple[Any, ...]:
    """Arguments from the command line and from `--config`.

    Without a model and a config of one's own, the sandbox's config stands in; on a machine without a GPU, `use_cpu` is
    on and `bf16` off unless they are given.

    Returns:
        `tuple`: [`~recipes.stages.StageArguments`], the trainer's config, `trl.ModelConfig`, and those of `more`.
    """
    given = sys.argv[1:]
    names = {argument.split("=", 1)[0] for argument in given}
    if not names & {"--config", "--model_name_or_path", "--help", "-h"}:
        given = ["--config", str(CONFIGS / sandbox_config), *given]
    if not torch.cuda.is_available() and "--use_cpu" not in names:
        given += ["--use_cpu", "true"]
        given += [] if "--bf16" in names else ["--bf16", "false"]
    parser = TrlParser((StageArguments, config_class, ModelConfig, *more), description=description)
    return parser.parse_args_and_config(given)


def prepare_process(sandbox: bool) -> None:
    """Library messages to the console, on the main process, and the threads of a single process on a CPU.

    The sandbox runs in one thread: for models of its size that is as fast as two, and gives the same numbers on any
    machine of the kind. A model of one's own gets all cores: `accelerate launch` would leave it one.
    """
    logging.basicConfig(level=logging.INFO if PartialState().is_main_process else logging.ERROR, format="%(message)s")
    for noisy in ("httpx", "datasets", "fsspec", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if PartialState().num_processes == 1 and not torch.cuda.is_available():
        torch.set_num_threads(1 if sandbox else len(os.sched_getaffinity(0)))


def smoke_sizes(config: LenVMConfig) -> None:
    """The sizes of a smoke run, in place."""
    config.max_steps, config.max_completion_length = 2, 32
    config.per_device_train_batch_size, config.gradient_accumulation_steps = 8, 1
    config.generation_batch_size, config.steps_per_generation = 8, 1
    config.num_generations = min(config.num_generations, 4)


def make_run(args: StageArguments, config: LenVMConfig, model: ModelConfig) -> Run:
    """The run that the arguments describe, with every stage before training done."""
    if args.smoke:
        smoke_sizes(config)
    run = Run(
        args=args,
        output_dir=Path(config.output_dir),
        model_name_or_path=model.model_name_or_path,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        seed=config.seed,
        precision={"bf16": config.bf16, "fp16": config.fp16, "use_cpu": config.use_cpu},
    )
    run.make_policy()
    run.make_length_value_model()
    return run


def train_stage(
    algorithm: str, run: Run, config: LenVMConfig, model: ModelConfig, make_trainer: Callable[..., Any], **settings: Any
) -> None:
    """Train a policy into `<output_dir>/<trained_name>`, going on from its last checkpoint if there is one.

    Args:
        algorithm (`str`): name of the run's subfolder and of the trained policy in run.json, unless one is given.
        run ([`~recipes.stages.Run`]): what was made before.
        config (`LenVMGRPOConfig` or `LenVMPPOConfig`): the trainer's settings.
        model (`trl.ModelConfig`): adapter settings.
        make_trainer (callable): takes the trainer's keyword arguments, returns the trainer.
        settings: further settings that the result depends on.
    """
    name = run.args.trained_name or algorithm
    target = run.output_dir / name
    config.output_dir = str(target)

    def train() -> None:
        trainer = make_trainer(
            model=run.policy,
            args=config,
            reward_funcs=[load_object(path) for path in run.args.reward_funcs],
            train_dataset=run.prompts(run.args.train_prompts, TRAIN_SEED),
            length_value_model=run.length_value_model,
            peft_config=get_peft_config(model),
        )
        checkpoint = get_last_checkpoint(str(target)) if target.is_dir() else None
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(target))

    depends = {key: value for key, value in config.to_dict().items() if key not in NOT_PART_OF_A_RUN}
    stages = {key: value for key, value in vars(run.args).items() if key not in ("smoke", "trained_name")}
    run_stage("training", target, {**depends, **stages, **settings, "policy": run.policy, "peft": vars(model)}, train)
    if PartialState().is_main_process:
        run.record(name, target)
        show_progress(target / "metrics.jsonl")


def show_progress(path: Path) -> None:
    """Print reward and length of the first and the last fifth of the training log."""
    logs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    logs = [entry for entry in logs if "reward" in entry]
    part = max(1, len(logs) // 5)
    for title, entries in (("first", logs[:part]), ("last", logs[-part:])):
        shown = {
            key: sum(entry[key] for entry in entries) / len(entries)
            for key in ("reward", "length/mean", "length/truncated")
            if all(key in entry for entry in entries)
        }
        text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        console.print(f"{title} {part} of {len(logs)} logged steps: {text}")
