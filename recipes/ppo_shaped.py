"""PPO with a learned task critic and a frozen length value model, from rollouts to a trained policy.

    accelerate launch recipes/ppo_shaped.py
        The built-in sandbox: a tiny policy is fitted, its rollouts are sampled, gamma is fitted and a length value
        model pretrained, and PPO trains the policy. Artefacts go to outputs/sandbox; a finished stage is reused.

    accelerate launch recipes/ppo_shaped.py --model_name_or_path MODEL --dataset_name DATA --reward_funcs my.reward \
        [--length_value_model LENVM] [--config my.yaml]
        The same program for a model, a dataset (hub id or local file) and reward functions of your own.

Then compare with tilted decoding: python -m eval.tradeoff --run_dir OUTPUT_DIR
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from lenvm_rl.modeling.loading import ADAPTER_FILE, model_type
from lenvm_rl.modeling.sharing import FULL
from lenvm_rl.programs import run_program
from lenvm_rl.trainers import LenVMPPOConfig, LenVMPPOTrainer, checks
from recipes.arguments import holds_few_bits, read_arguments
from recipes.stages import begin_run, prepare_process, train_stage


@dataclass
class CriticArguments:
    """Which task critic PPO learns with."""

    _argument_group_name = "Task critic"

    critic: str = HfArg(
        default="learned",
        help="'learned' (starts from critic_init), 'lenvm' (no task critic: a baseline for the task, the frozen "
        "length value model for length), or the path of a saved critic or of a reward model.",
    )


def main() -> None:
    """Run the stages and train."""
    args, config, model, choice = read_arguments(
        LenVMPPOConfig, "sandbox_ppo.yaml", CriticArguments, description=__doc__.split("\n", 1)[0]
    )
    critic = choice.critic
    if critic != "lenvm" and critic != "learned":
        checks.check_model_path(critic, "the critic")
        model_type(critic, ADAPTER_FILE)
    if config.critic_form != FULL and not model.use_peft and config.beta == 0.0:
        raise ValueError(
            f"critic_form='{config.critic_form}' shares a decoder that has to stay as it is, and this policy's is "
            "trained: set use_peft=true (then its base stays) or beta above 0 (the reference does), or take "
            "critic_form='full'."
        )
    if config.critic_form == FULL and critic == "learned" and config.critic_init == "policy" and holds_few_bits(model):
        raise ValueError(
            "critic_form='full' starts from a copy of the policy, which load_in_4bit and load_in_8bit do not allow: "
            "set critic_form='head' or 'adapter', which share it, or critic_init to a path."
        )
    prepare_process(sandbox=model.model_name_or_path is None)
    run = begin_run(args, config, model, dense=True)
    train_stage("ppo", run, lambda **kwargs: LenVMPPOTrainer(critic=critic, **kwargs), critic=critic)


if __name__ == "__main__":
    run_program(main)
