"""The command line of every program: how it is read, with YAML beside it, and what `--help` shows of it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import yaml
from trl import TrlParser

CONFIG_HELP = "--config FILE reads any of these options from YAML; the command line overrides it."
# Of the options that a program takes over from other libraries, those that are set most.
SET_MOST = (
    "model_name_or_path", "dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha", "lora_target_modules",
    "output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "num_generations", "steps_per_generation", "num_iterations", "max_completion_length", "temperature", "top_p",
    "top_k", "beta", "epsilon", "loss_type", "scale_rewards", "reward_weights", "mask_truncated_completions",
    "use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "bf16", "use_cpu", "seed", "logging_steps", "save_steps",
    "save_total_limit", "report_to",
)  # fmt: skip
# More choices than these are in the whole text alone.
MOST_CHOICES = 6
_KINDS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL", dict: "JSON"}
# A text that says itself what the default is.
_TOLD = re.compile(r"\b[Dd]efault(s to\b|:)")
_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)[.:](?=\s+[A-Z'\"(]|$)")
_DEFAULT = re.compile(r"Default: .*")


@dataclasses.dataclass(frozen=True)
class HelpGroup:
    """Options that `--help` shows together.

    Args:
        title (`str`): what they are about.
        names (tuple of `str`): in the order in which they are shown.
    """

    title: str
    names: tuple[str, ...]


class ProgramParser(TrlParser):
    """`trl.TrlParser` for a program: names may be spelled with dashes or underscores, in YAML too.

    `--help` shows the fields of this project, those of each class under its `_argument_group_name`, then what is set
    most of other libraries: the first sentence of each and what follows "Default:". `--help_all` shows all options with
    their whole texts.

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
        program = "python " + os.path.relpath(sys.argv[0] or "program")
        given = {"prog": program, "epilog": CONFIG_HELP, "formatter_class": ProgramHelp, "add_help": False} | kwargs
        super().__init__(types, **given)
        if self.usage is None:
            self.usage = f"{self.prog} [--OPTION VALUE ...] [--config FILE]"
        kinds = {field.name: _kind(field.type) for field in self._fields}
        for action in self._actions:
            if action.metavar is None and not action.choices and action.nargs != 0:
                action.metavar = kinds.get(action.dest)
        self.add_argument("-h", "--help", action=_ShowHelp, help="Show the options that are set most, and end.")
        self.add_argument("--help_all", "--help-all", action=_ShowHelp, whole=True, help="Show every option, and end.")
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

    def format_help(self, whole: bool = False) -> str:
        """What `--help` shows, or with `whole` what `--help_all` shows."""
        shown = help_groups(self.dataclass_types)
        rest = self._rest(shown)
        if whole and rest:
            shown = [*shown, HelpGroup("Every other option", tuple(rest))]
        formatter = self._get_formatter()
        # Nothing is cut where nothing else would say it.
        formatter.brief = bool(rest) and not whole
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        actions = {action.dest: action for action in reversed(self._actions) if action.help != argparse.SUPPRESS}
        for group in shown:
            formatter.start_section(group.title)
            formatter.add_arguments([actions[name] for name in group.names])
            formatter.end_section()
        formatter.add_text(self.epilog)
        if rest and not whole:
            formatter.add_text(f"--help_all shows these in full, and {len(rest)} further options.")
        return formatter.format_help()

    def _rest(self, shown: Iterable[HelpGroup]) -> list[str]:
        named = {name for group in shown for name in group.names}
        return [field.name for field in self._fields if field.name not in named]

    @property
    def _fields(self) -> list[dataclasses.Field]:
        return [field for each in self.dataclass_types for field in dataclasses.fields(each) if field.init]

    def _suggest(self, text: str) -> str:
        name = text.split("=", 1)[0].lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, [field.name for field in self._fields], n=1)
        return f"{text} (did you mean --{near[0]}?)" if text.startswith("-") and near else text


def help_groups(types: Sequence[type]) -> list[HelpGroup]:
    """The options of programs in the order of their help: this project's by the class that tells them, then the others.

    Of other libraries' options those are left out that are not in [`SET_MOST`].
    """
    own: dict[type, list[str]] = {}
    others: list[str] = []
    for kind in types:
        own |= {each: [] for each in reversed(kind.__mro__) if _is_own(each)}
        for field in dataclasses.fields(kind):
            # A field belongs to the last class that says what it is.
            teller = next(each for each in kind.__mro__ if field.name in each.__dict__.get("__annotations__", {}))
            if field.init:
                (own[teller] if _is_own(teller) else others).append(field.name)
    found = [HelpGroup(_title(teller), tuple(names)) for teller, names in own.items() if names]
    often = tuple(name for name in SET_MOST if name in others)
    return found + ([HelpGroup("What is set most of TRL and transformers", often)] if often else [])


def _is_own(kind: type) -> bool:
    return kind is not object and kind.__module__.split(".")[0] not in ("trl", "transformers")


def _kind(annotation: Any) -> str:
    """What a field takes, in a word."""
    inner = [each for part in typing.get_args(annotation) for each in (part, *typing.get_args(part))]
    return next((_KINDS[each] for each in (annotation, *inner) if isinstance(each, type) and each in _KINDS), "VALUE")


def _title(kind: type) -> str:
    text = kind.__dict__.get("_argument_group_name") or (kind.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(text.split()).rstrip(".")


class ProgramHelp(argparse.RawDescriptionHelpFormatter):
    """One spelling and a kind for each option, its help, and a default that says something."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 30, **options})
        self.brief = False

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [each for each in action.option_strings if each.startswith("--")] or action.option_strings
        if action.nargs == 0:
            return names[0]
        few = action.choices is not None and len(action.choices) <= MOST_CHOICES
        kind = "|".join(map(str, action.choices)) if few else action.metavar or "TEXT"
        return f"{names[0]} {kind}" + (" ..." if action.nargs == "+" else "")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split())
        if self.brief and (end := _SENTENCE.search(text)):
            told = _DEFAULT.search(text, end.start())
            text = f"{text[: end.start()]}." + (f" {told[0]}" if told else "")
        # Where a default depends on other arguments, the help says on which.
        if action.required:
            return f"{text} (required)"
        if action.default in (None, [], argparse.SUPPRESS) or _TOLD.search(text):
            return text
        return f"{text} (default: %(default)s)"


class _ShowHelp(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, whole: bool = False, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self._whole = whole

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        sys.stdout.write(parser.format_help(self._whole))
        parser.exit()


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


def _as_number(field: dataclasses.Field, kind: type, value: Any) -> Any:
    """An entry of a list of a YAML file, which takes 1e-3 for text."""
    if kind not in (int, float) or not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError as error:
        name, wanted = field.name, kind.__name__
        raise ValueError(f"{name} in the file for --config must hold {wanted} only, got {value!r}.") from error


def _as_typed(field: dataclasses.Field, value: Any) -> Any:
    """A value of a YAML file, where argparse would take over any; text it converts by itself."""
    if value is None:
        return None
    if typing.get_origin(field.type) is list:
        (kind,) = typing.get_args(field.type)
        return [_as_number(field, kind, each) for each in (value if isinstance(value, list) else [value])]
    if field.type in (int, float, bool) and isinstance(value, (list, dict)):
        raise ValueError(f"{field.name} in the file for --config must be one {field.type.__name__}, got {value!r}.")
    if field.type is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{field.name} in the file for --config must be a whole number, got {value!r}.")
    choices = field.metadata.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(f"{field.name} in the file for --config must be one of {choices}, got {value!r}.")
    return value
