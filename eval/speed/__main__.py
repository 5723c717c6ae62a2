"""How fast the parts of the library are, beside what they replace and beside the limit.

    python -m eval.speed pretraining
    python -m eval.speed pretraining --help

A subcommand is a module here; its docstring says what is measured. `batching` replays what was sampled; the others have
cases, which `eval.speed.harness` measures.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from transformers import HfArgumentParser

from eval.command_line import HelpFormatter
from eval.speed import batching, critic, decoding, ppo, pretraining
from eval.speed.harness import Sizes, measure_here, run
from lenvm_rl.programs import run_program

PROGRAMS = {"pretraining": pretraining, "batching": batching, "decoding": decoding, "critic": critic, "ppo": ppo}


def make_parser() -> argparse.ArgumentParser:
    """The command line, with a subcommand for each of `PROGRAMS`."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__.partition("\n")[0])
    subcommands = parser.add_subparsers(dest="program", required=True, parser_class=HfArgumentParser)
    for name, module in PROGRAMS.items():
        texts = {"help": module.__doc__.partition("\n")[0], "description": module.__doc__}
        subparser = subcommands.add_parser(
            name, dataclass_types=module.Settings, formatter_class=HelpFormatter, **texts
        )
        if issubclass(module.Settings, Sizes):
            subparser.add_argument("--case", choices=module.CASES, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the subcommand that the command line names; with `--case`, one of its cases, in this process."""
    args = make_parser().parse_args(arguments)
    program = PROGRAMS[args.program]
    settings = program.Settings(**{entry.name: getattr(args, entry.name) for entry in fields(program.Settings)})
    if program is batching:
        batching.run(settings)
    elif args.case is None:
        run(args.program, program, settings)
    else:
        measure_here(program, args.case, settings)


if __name__ == "__main__":
    run_program(main, "Interrupted: nothing was written, and the same command measures everything again.")
