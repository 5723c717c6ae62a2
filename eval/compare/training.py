"""One run of `eval.compare`: a trainer of the library, and evaluations of its policy along the way."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from eval.compare.arms import BY_NAME, TrainingArm
from eval.compare.plan import Run
from eval.compare.variants import VARIANTS
from eval.graded import SANDBOX_REWARD, sandbox_prompts
from eval.runs import QUIET
from eval.style_frontier import StyleFrontier, fit_frontier
from eval.tradeoff.sampler import Arm, Sampler
from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.files import read_json
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer
from lenvm_rl.prediction import weights_fingerprint
from lenvm_rl.reward_functions import load_reward
from lenvm_rl.sandbox import distinct_problems
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer

# Longest completion, prompts of an evaluation and samples of each, and evaluations of a run.
MAX_NEW_TOKENS, PROMPTS, SAMPLES, EVALUATIONS = 96, 128, 2, 10
# Samples of each prompt that the base policy's point is measured by.
BASE_SAMPLES = 16
TRAIN_PROMPTS, WARMUP_STEPS, CRITIC_FACTOR = 2048, 5, 5.0


@dataclass
class World:
    """The models that runs of a seed start from, and what the base policy does.

    Args:
        folder (`str`): of a recipe's run on the sandbox, with `policy` and `length_value_model`; and for controls,
            where there are such, `stale` (a length value model of the trained policy) and `few` (of few rollouts).
    """

    folder: str

    def path(self, name: str) -> str:
        return str(Path(self.folder) / name)

    @cached_property
    def tokenizer(self) -> Any:
        """Of all models."""
        return load_tokenizer(self.path("policy"))

    def length_value_model(self, name: str = "length_value_model") -> LengthValueModel:
        """A new copy, for a trainer freezes and places it."""
        return load_length_value_model(self.path(name), self.path("policy"), tokenizer=self.tokenizer)

    @cached_property
    def sampler(self) -> Sampler:
        """How every policy is evaluated: the same prompts, sampled as in training."""
        data = sandbox_prompts(PROMPTS)
        return Sampler(
            tokenizer=self.tokenizer,
            length_value_model=self.length_value_model(),
            prompts=data.prompts,
            columns=data.columns,
            reward=load_reward(SANDBOX_REWARD),
            num_samples=SAMPLES,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=PROMPTS * SAMPLES,
            guidance=LengthGuidance(temperature=1.0),
            seed=0,
        )

    @cached_property
    def frontier(self) -> StyleFrontier:
        """Of the base policy's styles."""
        found = fit_frontier(replace(self.sampler, batch_size=512), load_policy(self.path("policy")))
        if found is None:
            raise ValueError(
                f"The policy of {self.folder} writes no clean completion at some difficulty: fit it longer."
            )
        return found

    @cached_property
    def start(self) -> dict[str, float]:
        """The base policy's point."""
        sampler = replace(self.sampler, num_samples=BASE_SAMPLES, batch_size=512)
        return self.point(sampler.sample("base", "base", load_policy(self.path("policy"))))

    def point(self, arm: Arm) -> dict[str, float]:
        """Accuracy, tokens and tokens above the floor of an evaluation, the mean over completions."""
        levels = np.array(sandbox_prompts(PROMPTS).difficulties)[arm.prompt]
        floors = np.array([self.frontier.floors[level] for level in levels])
        excess = np.maximum(arm.lengths - floors, 0.0)
        return {
            "accuracy": float(arm.correct.mean()),
            "tokens": float(arm.lengths.mean()),
            "excess": float(excess.mean()),
        }

    def evaluate(self, policy: PreTrainedModel) -> dict[str, float]:
        """The point of a policy, whose own random numbers stay where they were."""
        training, generation = policy.training, policy.generation_config
        policy.eval()
        with torch.random.fork_rng(devices=[]):
            arm = self.sampler.sample("evaluation", "trained", policy)
        policy.generation_config = generation
        policy.train(training)
        return self.point(arm)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base policy."""
        return weights_fingerprint(load_policy(self.path("policy")))[:12]

    def described(self) -> dict[str, Any]:
        """What a report needs: the base policy's point, floors and frontier, and what the length value model cost."""
        fit = self.length_value_model().config.gamma_fit
        stage = read_json(self.path("length_value_model.stage.json"))["settings"]
        frontier = self.frontier
        return {
            "start": self.start,
            "floors": {str(level): floor for level, floor in frontier.floors.items()},
            "frontier": {"tokens": frontier.tokens.tolist(), "accuracy": frontier.accuracies.tolist()},
            "pretraining": {
                "rollouts": fit["completions"],
                "tokens": fit["completions"] * fit["mean"],
                "epochs": stage["pretrain_epochs"],
            },
        }


class CurveCallback(TrainerCallback):
    """Evaluates the policy every few steps; `points` is the curve, in which the task critic's explained variance, where
    it is logged, is the mean over the steps since the point before."""

    def __init__(self, world: World, run: Run):
        self.world, self.run, self.points = world, run, []
        self.every = max(1, run.cell.steps // EVALUATIONS)
        self.explained: list[float] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **further: Any,
    ) -> None:
        """See `TrainerCallback`."""
        if (explained := (logs or {}).get("critic/explained_variance")) is not None:
            self.explained.append(explained)
        # A step is logged after it has ended.
        rollouts = state.global_step * self.run.cell.completions
        if self.explained and self.points and self.points[-1]["rollouts"] == rollouts:
            self.points[-1]["critic_explained"] = sum(self.explained) / len(self.explained)
            self.explained = []

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **further: Any,
    ) -> None:
        if state.global_step % self.every == 0:
            rollouts = state.global_step * self.run.cell.completions
            self.points.append({"rollouts": rollouts, **self.world.evaluate(model)})


def trainer_of(run: Run, world: World, output_dir: str) -> LenVMGRPOTrainer | LenVMPPOTrainer:
    """The trainer of a run, at its start."""
    arm, cell = BY_NAME[run.arm], run.cell
    is_ppo = cell.group_size == 1
    config_class, trainer_class = (LenVMPPOConfig, LenVMPPOTrainer) if is_ppo else (LenVMGRPOConfig, LenVMGRPOTrainer)
    config = config_class(
        output_dir,
        max_steps=cell.steps,
        per_device_train_batch_size=cell.completions,
        num_generations=cell.group_size,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=1.0,
        loss_type="dr_grpo",
        learning_rate=run.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_STEPS,
        # The dataset is stratified by difficulty, and so are its batches.
        shuffle_dataset=False,
        logging_steps=1 if arm.kind == "critic" else 1000,
        seed=run.seed,
        **({"critic_learning_rate": CRITIC_FACTOR * run.learning_rate} if is_ppo else {}),
        **arm.config_fields(run.strength),
        **QUIET,
    )
    problems = distinct_problems(TRAIN_PROMPTS, 10 * run.seed + 2, "train")
    trainer = variant_of(arm, trainer_class, run.strength)(
        model=load_policy(world.path("policy")),
        reward_funcs=arm.rewards(run.strength),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems]),
        processing_class=world.tokenizer,
        length_value_model=world.length_value_model(arm.values),
        **arm.ppo_only,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def variant_of(arm: TrainingArm, trainer_class: type, strength: float | None) -> type:
    """The trainer's class, with what is different about the arm's."""
    if arm.variant is None:
        return trainer_class
    return type(f"Varied{trainer_class.__name__}", (VARIANTS[arm.variant], trainer_class), {"charge": strength})


def train_run(run: Run, world: World) -> list[dict[str, float]]:
    """Train, and return the curve."""
    set_seed(run.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(run, world, folder)
        curve = CurveCallback(world, run)
        trainer.add_callback(curve)
        trainer.train()
    return curve.points
