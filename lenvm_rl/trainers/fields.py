"""How a field of a config is told once: what it may be in its annotation, what it does in its help.

An annotation is a choice (`Literal`), or `Annotated` with an interval and with names of fields without which nothing
reads it.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

# Intervals; infinity is always left out, and so is what is not a number.
UNIT, POSITIVE, NOT_NEGATIVE, NUMBER = "[0, 1]", "(0, inf)", "[0, inf)", "(-inf, inf)"
COUNT = "[1, inf)"


def setting(default: Any, text: str) -> Any:
    """A field with this default and help."""
    return field(default=default, metadata={"help": text})


def is_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as ``"(0, 1]"``."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low or (interval[0] == "[" and value == low)
    return above and (value < high or (interval[-1] == "]" and value == high))


def documented_fields(config: type) -> type:
    """Adds what a config's own fields say of themselves to its docstring; its parents have their own."""
    lines = [inspect.cleandoc(config.__doc__), "", "Args:"]
    for each in dataclasses.fields(config):
        if each.name in config.__annotations__:
            kind = each.type.removeprefix("Annotated[").split(",")[0] if "Annotated" in each.type else each.type
            lines.append(f"    {each.name} (`{kind}`, defaults to `{each.default!r}`): {each.metadata['help']}")
    config.__doc__ = "\n".join(lines)
    return config


def changed_fields(config: Any, names: tuple[str, ...]) -> list[str]:
    """Which of these fields of a config are not at their defaults."""
    return [name for name in names if getattr(config, name) != type(config).__dataclass_fields__[name].default]


def check_fields(config: Any, beside: type) -> None:
    """Raise a `ValueError` if a field of a config is not what its annotation says.

    Args:
        config (a dataclass), beside (a dataclass): its parent whose fields are left alone.
    """
    for name, annotation in get_type_hints(type(config), include_extras=True).items():
        if get_origin(annotation) in (Annotated, Literal) and name not in beside.__dataclass_fields__:
            _check_field(config, name, annotation)


def _check_field(config: Any, name: str, annotation: Any) -> None:
    value, default = getattr(config, name), type(config).__dataclass_fields__[name].default
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise ValueError(f"{name}='{value}' is unknown; choose one of {', '.join(get_args(annotation))}.")
        return
    if value is None and default is None:
        return
    for told in annotation.__metadata__:
        if isinstance(told, str) and not is_within(value, told):
            raise ValueError(f"{name}={value} is not a number in {told}.")
        readers = told if isinstance(told, tuple) else ()
        if readers and value != default and not changed_fields(config, readers):
            raise ValueError(f"{name}={value} is read with {' or '.join(readers)} only: set that too, or leave it out.")
