"""Arguments of the recipes: what comes before training, and what stands in for arguments that are not given."""

from __future__ import annotations

import sys
from collections.abc import Set
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from trl import ModelConfig
from trl.trainer.utils import get_quantization_config

from lenvm_rl.modeling.sharing import FORMS, FULL
from lenvm_rl.programs import ProgramParser, read_yaml
from lenvm_rl.sandbox import PolicySettings

CONFIGS = Path(__file__).parent / "configs"


@dataclass(kw_only=True)
class DataArguments:
    """Which prompts there are, and how they become tokens."""

    _argument_group_name = "Prompts"

    dataset_name: str | None = HfArg(
        default=None,
        help="Prompts: a hub id or a .jsonl, .json, .parquet, .csv or .tsv file. Default: the built-in sandbox.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a hub dataset.")
    dataset_split: str = HfArg(default="train", help="Split of a hub dataset.")
    prompt_column: str = HfArg(default="prompt", help="Column with the prompt: text, or a list of messages.")
    chat: bool = HfArg(default=False, help="Wrap text prompts as a user's message, for the model's chat template.")
    pad_token: str | None = HfArg(
        default=None,
        help="Pad token, for a tokenizer that has none or pads with its end-of-sequence token: a token that the "
        "model never writes.",
    )


@dataclass(kw_only=True)
class StageArguments(DataArguments):
    """What comes before training: data, rewards, rollouts of the policy, and its length value model."""

    _argument_group_name = "Rewards, rollouts and the length value model"

    length_value_model: str | None = HfArg(
        default=None,
        help="Pretrained length value model (folder or hub id). Default: sample rollouts and pretrain one.",
    )
    reward_funcs: list[str] | None = HfArg(
        default=None,
        help="Dotted paths of reward functions, which get the other columns of the data. gate_reward names the one "
        "that says what is correct. Default: the sandbox's, reward.sandbox.sandbox_reward.",
    )
    policy_tokens: int = HfArg(
        default=PolicySettings.train_tokens, help="Sandbox: teacher tokens the policy is fitted on."
    )
    policy_passes: float = HfArg(
        default=PolicySettings.passes,
        help="Sandbox: passes of checking that the teacher writes behind a chain, on average: the waste. A multiple of "
        "0.5. Completions have 14 tokens at 0, and about 10 more for each pass.",
    )
    policy_repeats: int = HfArg(
        default=PolicySettings.repeats, help="Sandbox: how often a pass writes each value: longer passes, no more."
    )
    policy_start: str | None = HfArg(default=None, help="Sandbox: a fitted policy that the fit goes on from.")
    sample_prompts: int = HfArg(default=480, help="Prompts to sample rollouts for.")
    sample_num_samples: int = HfArg(default=16, help="Completions per prompt.")
    sample_batch_size: int = HfArg(default=256, help="Completions per generate call.")
    pretrain_form: str = HfArg(
        default=FULL,
        help="What is fitted: full, a copy of the policy's decoder and a head; adapter, LoRA and a head, or head, a "
        "head alone, on the policy's frozen decoder (with --use_peft true, or beta above 0).",
        metadata={"choices": list(FORMS)},
    )
    pretrain_layers: list[int] | None = HfArg(
        default=None,
        help="With form head: the layers of the decoder that it reads together, such as 10 20 -1. Default: the last.",
    )
    pretrain_epochs: float = HfArg(default=2.0, help="Passes over the rollouts.")
    pretrain_learning_rate: float = HfArg(default=2e-5, help="Learning rate of the length value model.")
    pretrain_batch_size: int = HfArg(default=32, help="Completions per optimizer step and process.")
    pretrain_only_correct: bool = HfArg(
        default=False,
        help="Fit the length value model on correct completions only, a remedy for length_gate='correct'.",
    )
    train_prompts: int | None = HfArg(
        default=None, help="Training prompts. Default: all of the dataset; 2048 of the sandbox."
    )
    trained_name: str | None = HfArg(
        default=None,
        help="Subfolder of output_dir for the trained policy, so that several runs can share the earlier "
        "stages. Default: the algorithm's name.",
    )
    prepare_only: bool = HfArg(
        default=False, help="Stop before training, with policy, rollouts and length value model made."
    )
    smoke: bool = HfArg(default=False, help="Run every stage at a size that only shows that it runs.")

    def __post_init__(self) -> None:
        if self.reward_funcs is None and self.dataset_name is None:
            self.reward_funcs = ["reward.sandbox.sandbox_reward"]
        if self.smoke:
            self.policy_tokens, self.sample_prompts, self.sample_num_samples = 40_000, 16, 4
            self.pretrain_epochs, self.train_prompts = 1.0, 32


def read_arguments(config_class: type, sandbox_config: str, *more: type, description: str) -> tuple[Any, ...]:
    """Arguments from the command line and from `--config`.

    Without a model, a dataset and a config of one's own, the sandbox's config stands in; on a machine without a GPU,
    `use_cpu` is on and `bf16` off unless they are given.

    Returns:
        `tuple`: [`StageArguments`], the trainer's config, `trl.ModelConfig`, and what `more` holds.
    """

    def defaults(given: Set[str], config: str | None) -> dict[str, Any]:
        of_sandbox = config is None and not given & {"model_name_or_path", "dataset_name"}
        found = read_yaml(str(CONFIGS / sandbox_config)) if of_sandbox else {}
        if not torch.cuda.is_available():
            found |= {"use_cpu": True, "bf16": False}
        return {name: value for name, value in found.items() if name not in given}

    usage = f"accelerate launch recipes/{Path(sys.argv[0]).name} [--OPTION VALUE ...] [--config FILE]"
    parser = ProgramParser(
        (StageArguments, config_class, ModelConfig, *more), defaults, usage=usage, description=description
    )
    parsed = parser.parse_args_and_config()
    args, config, model = parsed[:3]
    if model.model_name_or_path is None and args.dataset_name is None and config.shuffle_dataset:
        raise ValueError(
            "Without --model_name_or_path this is the sandbox, whose batches are stratified by difficulty: set "
            f"shuffle_dataset: false, or start your config from recipes/configs/{sandbox_config}."
        )
    check_setup(args, model)
    return parsed


def check_setup(args: StageArguments, model: ModelConfig) -> None:
    """Raise a `ValueError` on half a setup, or on a model option that the recipes do not carry out."""
    if args.dataset_name is None and model.model_name_or_path is not None:
        raise ValueError("A model of your own needs prompts: give --dataset_name (a hub id or a local file).")
    if args.dataset_name is not None and model.model_name_or_path is None:
        raise ValueError("A dataset of your own needs a policy: give --model_name_or_path.")
    if args.reward_funcs is None:
        raise ValueError("A dataset of your own needs a reward: give --reward_funcs (module.function).")
    if not holds_few_bits(model):
        return
    if not model.use_peft:
        raise ValueError(
            "load_in_4bit and load_in_8bit hold the policy in weights that do not learn: set use_peft=true, which "
            "trains adapters on them."
        )


def check_packages(config: TrainingArguments, model: ModelConfig) -> None:
    """Raise a `ValueError` if a setting needs a package that is not installed: stages before training take long."""
    if holds_few_bits(model) and find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes.")
    if config.use_vllm and find_spec("vllm") is None:
        raise ValueError("use_vllm needs vLLM, which is not installed: pip install vllm, or leave use_vllm out.")
    # Refuses a name that transformers does not know.
    get_reporting_integration_callbacks(config.report_to)
    # transformers leaves azure_ml out of the list where MLflow is there too, which it works with.
    installed = {*get_available_reporting_integrations(), "azure_ml"}
    if missing := [name for name in config.report_to if name not in installed]:
        raise ValueError(f"report_to names what is not installed: pip install {' '.join(missing)}, or leave it out.")


def holds_few_bits(model: ModelConfig) -> bool:
    """Whether the policy is to be loaded in 4 or 8 bits a weight."""
    return model.load_in_4bit or model.load_in_8bit


def model_kwargs(model: ModelConfig) -> dict[str, Any]:
    """How the policy is loaded, in every stage: the arguments of `from_pretrained` that are set."""
    dtype = model.dtype if model.dtype in ("auto", None) else getattr(torch, model.dtype)
    settings = {"dtype": dtype, "attn_implementation": model.attn_implementation, "revision": model.model_revision}
    settings["quantization_config"] = get_quantization_config(model)
    return {name: value for name, value in settings.items() if value is not None}
