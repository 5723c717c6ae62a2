"""What programs share: how their command line is read and shown, with how many threads they compute, how they end."""

from lenvm_rl.programs.command_line import HelpGroup, ProgramParser, read_yaml
from lenvm_rl.programs.running import (
    AGAIN,
    INTERRUPTED,
    THREAD_VARIABLES,
    TRACEBACK_VARIABLE,
    choose_threads,
    run_program,
    sentence_of,
    usable_cores,
)

__all__ = [
    "AGAIN",
    "INTERRUPTED",
    "THREAD_VARIABLES",
    "TRACEBACK_VARIABLE",
    "HelpGroup",
    "ProgramParser",
    "choose_threads",
    "read_yaml",
    "run_program",
    "sentence_of",
    "usable_cores",
]
