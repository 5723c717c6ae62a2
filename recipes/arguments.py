"""Arguments of the recipes: how a command line and `--config` are read, and what comes before training."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.hf_argparser import HfArg
from trl import ModelConfig, TrlParser

from lenvm_rl.sandbox import PolicySettings

CONFIG_HELP = "--config FILE reads any of these options from YAML; the command line overrides it."


class ProgramParser(TrlParser):
    """`trl.TrlParser` for a program: names may be spelled with dashes or underscores, in YAML too.

    Args:
        dataclass_types (dataclass or several): whose fields are options.
        defaults (callable, *optional*):
            From the names that were given, on the command line or in YAML, and the YAML file's path or `None`, to
            defaults that replace the dataclasses' own.
        kwargs: further arguments of `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        dataclass_types: type | Iterable[type],
        defaults: Callable[[Set[str], str | None], dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        super().__init__(types, **{"epilog": CONFIG_HELP, **kwargs})
        self._conditional, self._config, self._configured = defaults, None, set()

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options: Any) -> tuple[Any, ...]:
        """As in TRL; an option that is not known, or cannot be what the YAML file says, is refused."""
        own = argparse.ArgumentParser(prog=self.prog, usage=self.usage, add_help=False, allow_abbrev=False)
        own.add_argument("--config", action="append", default=[], metavar="FILE")
        found, rest = own.parse_known_args(sys.argv[1:] if args is None else list(args))
        if len(found.config) > 1:
            raise ValueError(f"--config takes one file, got {', '.join(found.config)}: put them into one.")
        if found.config:
            [self._config] = found.config
            read_yaml(self._config)
            rest = ["--config", self._config, *rest]
        *parsed, unknown = super().parse_args_and_config(rest, **{**options, "return_remaining_strings": True})
        if unknown:
            raise ValueError(f"Unknown arguments: {', '.join(map(self._suggest, unknown))}. See --help.")
        return tuple(parsed)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """As in TRL, for what a YAML file says."""
        config = {name.replace("-", "_"): value for name, value in config.items()}
        self._configured |= set(config)
        known = {field.name: field for field in self._fields}
        return super().set_defaults_with_config(
            **{name: _as_typed(known[name], value) if name in known else value for name, value in config.items()}
        )

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse, with the defaults that hold beside what is given."""
        if self._conditional is not None:
            # argparse leaves alone what a namespace holds already, unless it is given.
            unset = object()
            names = {field.name for field in self._fields}
            seen, _ = super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(names, unset)))
            given = {name for name in names if getattr(seen, name) is not unset} | self._configured
            super().set_defaults_with_config(**self._conditional(given, self._config))
        return super().parse_known_args(args, namespace)

    @property
    def _fields(self) -> list[dataclasses.Field]:
        return [field for each in self.dataclass_types for field in dataclasses.fields(each) if field.init]

    def _suggest(self, text: str) -> str:
        name = text.split("=", 1)[0].lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, [field.name for field in self._fields], n=1)
        return f"{text} (did you mean --{near[0]}?)" if text.startswith("-") and near else text


def read_yaml(path: str) -> dict[str, Any]:
    """What a YAML file of options says: names and values."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file '{path}' for --config (looked from {os.getcwd()}): check the path.")
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The file '{path}' for --config is no YAML: {error}") from error
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"The file '{path}' for --config must hold lines like `name: value`.")
    return config


def _as_typed(field: dataclasses.Field, value: Any) -> Any:
    """A value of a YAML file, where argparse would take over any; text it converts by itself."""
    if value is None:
        return None
    is_list = typing.get_origin(field.type) is list
    if is_list and not isinstance(value, list):
        return [value]
    if field.type in (int, float, bool) and isinstance(value, (list, dict)):
        raise ValueError(f"{field.name} in the file for --config must be one {field.type.__name__}, got {value!r}.")
    if field.type is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{field.name} in the file for --config must be a whole number, got {value!r}.")
    choices = field.metadata.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(f"{field.name} in the file for --config must be one of {choices}, got {value!r}.")
    return value


CONFIGS = Path(__file__).parent / "configs"


@dataclass(kw_only=True)
class DataArguments:
    """Which prompts there are, and how they become tokens."""

    dataset_name: str | None = HfArg(
        default=None, help="Prompts: a hub id or a .jsonl, .json, .parquet or .csv file. Default: the built-in sandbox."
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

    length_value_model: str | None = HfArg(
        default=None,
        help="Pretrained length value model (folder or hub id). Default: sample rollouts and pretrain one.",
    )
    reward_funcs: list[str] = HfArg(
        default_factory=lambda: ["reward.sandbox.sandbox_reward"],
        help="Dotted paths of reward functions, which get the other columns of the data. gate_reward names the one "
        "that says what is correct.",
    )
    policy_tokens: int = HfArg(
        default=PolicySettings.train_tokens, help="Sandbox: teacher tokens the policy is fitted on."
    )
    policy_passes: float = HfArg(
        default=PolicySettings.passes,
        help="Sandbox: passes of checking that the teacher writes behind a chain, on average: the waste. Completions "
        "have 14 tokens at 0, and about 10 more for each pass.",
    )
    policy_repeats: int = HfArg(
        default=PolicySettings.repeats, help="Sandbox: how often a pass writes each value: longer passes, no more."
    )
    policy_start: str | None = HfArg(default=None, help="Sandbox: a fitted policy that the fit goes on from.")
    sample_prompts: int = HfArg(default=480, help="Prompts to sample rollouts for.")
    sample_num_samples: int = HfArg(default=16, help="Completions per prompt.")
    sample_batch_size: int = HfArg(default=256, help="Completions per generate call.")
    pretrain_epochs: float = HfArg(default=2.0, help="Passes over the rollouts.")
    pretrain_learning_rate: float = HfArg(default=2e-5, help="Learning rate of the length value model.")
    pretrain_batch_size: int = HfArg(default=32, help="Completions per optimiser step and process.")
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
    smoke: bool = HfArg(default=False, help="Run every stage at a size that only shows that it runs.")

    def __post_init__(self) -> None:
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

    parser = ProgramParser((StageArguments, config_class, ModelConfig, *more), defaults, description=description)
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
    if model.load_in_4bit or model.load_in_8bit:
        raise ValueError(
            "Quantised policies are not supported by the recipes: leave out load_in_4bit and load_in_8bit."
        )


def model_kwargs(model: ModelConfig) -> dict[str, Any]:
    """How the policy is loaded, in every stage: the arguments of `from_pretrained` that are set."""
    dtype = model.dtype if model.dtype in ("auto", None) else getattr(torch, model.dtype)
    settings = {"dtype": dtype, "attn_implementation": model.attn_implementation, "revision": model.model_revision}
    return {name: value for name, value in settings.items() if value is not None}
