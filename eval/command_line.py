"""How an evaluation program is started: its arguments, its help, its log, and its end."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from transformers import HfArgumentParser

from lenvm_rl.programs import run_program

GOES_ON = "Interrupted. What was sampled is kept: run the same command again, and it goes on from there."
STARTS_OVER = "Interrupted before anything was written: the same command starts over."


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Where a default depends on other arguments, the help says on which.
        if action.default in (None, []) or "default" in (action.help or "").lower():
            return action.help
        return super()._get_help_string(action)


def run_evaluation(
    arguments: type, main: Callable[[Any], Any], program: str, description: str, interrupted: str = GOES_ON
) -> None:
    """Reads the command line and calls `main` with what it says; what is refused ends in a sentence.

    Args:
        arguments (`type`): dataclass of the arguments.
        main (callable): takes them.
        program (`str`), description (`str`): the program's module and its docstring.
        interrupted (`str`, *optional*): what Ctrl-C leaves.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = HfArgumentParser(
        arguments, prog=f"python -m {program}", description=description, formatter_class=HelpFormatter
    )
    run_program(lambda: main(*parser.parse_args_into_dataclasses()), interrupted)
