"""Bounds of arguments: each raises a `ValueError` that names the argument and what it may be."""

import math


def require_finite(config, *names: str) -> None:
    """The arguments of these names are finite numbers."""
    for name in names:
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name}={getattr(config, name)} is not a finite number.")


def require_unit(config, *names: str) -> None:
    """They are in [0, 1]."""
    for name in names:
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"{name}={getattr(config, name)} is not in [0, 1].")


def require_positive(config, *names: str) -> None:
    """They are finite numbers above 0."""
    for name in names:
        if not 0.0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} is not a finite number above 0.")


def require_choice(config, name: str, choices: tuple[str, ...]) -> None:
    """The argument is one of `choices`."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}='{getattr(config, name)}' is unknown; choose one of {', '.join(choices)}.")
