"""What the training recipes share: checks before the first stage, the stages, training, and its record."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import ModelConfig, get_peft_config

from lenvm_rl.files import last_complete_checkpoint
from lenvm_rl.programs import choose_threads
from lenvm_rl.reward_functions import load_reward
from lenvm_rl.trainers import checks
from lenvm_rl.trainers.config import LenVMConfig
from recipes.arguments import StageArguments
from recipes.stage_records import console, run_stage
from recipes.stages import TRAIN_SEED, Run, gate_reward_path

# Settings that say where a run writes and reports, not what it computes.
NOT_PART_OF_A_RUN = ("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "resume_from_checkpoint")


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


def check_before(args: StageArguments, config: LenVMConfig, model: ModelConfig, dense: bool) -> None:
    """What training would refuse, refused before the first stage spends time.

    Args:
        args ([`~recipes.arguments.StageArguments`]), config, model: as parsed.
        dense (`bool`): whether advantages differ from token to token even with both coefficients at 0.
    """
    gate_reward_path(args, config)
    checks.check_model_path(model.model_name_or_path, "the policy")
    checks.check_model_path(args.length_value_model, "the length value model")
    if dense or config.needs_length_value_model:
        checks.check_loss(config)
    if config.eval_strategy != "no":
        raise ValueError(
            "The recipes train only: leave eval_strategy at 'no', and compare with `python -m eval.tradeoff`."
        )


def make_run(args: StageArguments, config: LenVMConfig, model: ModelConfig, dense: bool = False) -> Run:
    """The run that the arguments describe, with every stage before training done."""
    check_before(args, config, model, dense)
    if args.smoke:
        smoke_sizes(config)
    run = Run(args, config, model)
    run.check()
    run.make_policy()
    run.make_length_value_model()
    return run


def train_stage(algorithm: str, run: Run, make_trainer: Callable[..., Any], **settings: Any) -> None:
    """Train a policy into `<output_dir>/<trained_name>`, going on from its last checkpoint if there is one.

    Args:
        algorithm (`str`): name of the run's subfolder and of the trained policy in run.json, unless one is given.
        run ([`~recipes.stages.Run`]): what was made before.
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
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or last_complete_checkpoint(target))
        done, wanted = trainer.state.global_step, trainer.state.max_steps
        if done < wanted:
            # As on SIGTERM with enable_jit_checkpoint: the stage is not finished.
            raise SystemExit(
                f"Training was stopped after {done} of {wanted} steps: run the same command again, and it goes on."
            )
        trainer.save_model(str(target))
        if config.refresh_steps > 0 and PartialState().is_main_process:
            # The run's own is that of the base policy, and stays; this one knows the trained policy.
            bare = trainer.accelerator.unwrap_model(trainer.length_value_model)
            bare.save_pretrained(str(target / "length_value_model"))

    depends = {key: value for key, value in config.to_dict().items() if key not in NOT_PART_OF_A_RUN}
    stages = {"reward_funcs": run.args.reward_funcs, "train_prompts": run.args.train_prompts}
    made_from = {"policy": run.policy_settings(), "length_value_model": run.value_settings(), "peft": vars(run.model)}
    run_stage("training", target, {**depends, **stages, **settings, **made_from}, train)
    if PartialState().is_main_process:
        run.record(name, target)
        show_progress(target / "metrics.jsonl")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that belong to the run as it ended: those of lost steps are left out.

    So is a last line that the run could not write to its end.
    """
    kept: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        entry = json.loads(line)
        if entry.get("event") == "train_begin":
            kept = [before for before in kept if before["step"] <= entry["step"]]
        elif "step" in entry:
            kept.append(entry)
    return kept


def show_progress(path: Path) -> None:
    """Print reward and length of the first and the last fifth of the training log."""
    logs = [entry for entry in read_log(path) if "reward" in entry]
    if not logs:
        console.print(f"no step was logged (logging_steps is above the number of steps): see {path}")
        return
    part = max(1, len(logs) // 5)
    for title, entries in (("first", logs[:part]), ("last", logs[-part:])):
        shown = {
            key: sum(entry[key] for entry in entries) / len(entries)
            for key in ("reward", "length/mean", "length/truncated")
            if all(key in entry for entry in entries)
        }
        text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        console.print(f"{title} {part} of {len(logs)} logged steps: {text}")
