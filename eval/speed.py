"""How fast the parts of the library are, beside what they replace and beside the limit.

    python -m eval.speed pretraining
    python -m eval.speed pretraining --help

A subcommand is a module with `add_arguments(parser)` and `run(args)`; its docstring says what is measured.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from eval import speed_batching, speed_critic, speed_decoding, speed_ppo, speed_pretraining
from lenvm_rl.programs import run_program

PROGRAMS: dict[str, ModuleType] = {
    "pretraining": speed_pretraining,
    "batching": speed_batching,
    "decoding": speed_decoding,
    "critic": speed_critic,
    "ppo": speed_ppo,
}


def make_parser() -> argparse.ArgumentParser:
    """The command line, with a subcommand for each of `PROGRAMS`."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__.partition("\n")[0])
    subcommands = parser.add_subparsers(dest="program", required=True)
    for name, module in PROGRAMS.items():
        first, _, rest = module.__doc__.partition("\n")
        formatter = argparse.RawDescriptionHelpFormatter
        subparser = subcommands.add_parser(name, help=first, description=f"{first}\n{rest}", formatter_class=formatter)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the subcommand that the command line names."""
    args = make_parser().parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    run_program(main, "Interrupted: nothing was written, and the same command measures everything again.")
