"""The command line of the recipes: the fields of dataclasses, by name or from a YAML file, read in one way."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import yaml
from trl import TrlParser

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
