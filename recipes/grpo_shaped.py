"""GRPO with a frozen length value model: group-relative task advantages plus a dense length stream or shaping.

    accelerate launch recipes/grpo_shaped.py
        The built-in sandbox, with the policy, rollouts and length value model of recipes/ppo_shaped.py.

    accelerate launch recipes/grpo_shaped.py --model_name_or_path MODEL --dataset_name DATA --reward_funcs my.reward \
        [--length_value_model LENVM] [--config my.yaml]
        The same program for a model, a dataset (hub id or local file) and reward functions of your own.
"""

from __future__ import annotations

from lenvm_rl.programs import run_program
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer
from recipes.arguments import read_arguments
from recipes.stages import begin_run, prepare_process, train_stage


def main() -> None:
    """Run the stages and train."""
    args, config, model = read_arguments(LenVMGRPOConfig, "sandbox_grpo.yaml", description=__doc__.split("\n", 1)[0])
    prepare_process(sandbox=model.model_name_or_path is None)
    run = begin_run(args, config, model)
    train_stage("grpo", run, LenVMGRPOTrainer)


if __name__ == "__main__":
    run_program(main)
