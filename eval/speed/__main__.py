"""How fast the parts of the library are, beside what they replace and beside the limit.

    python -m eval.speed pretraining
    python -m eval.speed pretraining --help

Every subcommand but `batching`, which replays what was sampled, has cases that `eval.speed.harness` measures.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from transformers import HfArgumentParser

from eval.runs import HelpFormatter
from eval.speed import batching
from eval.speed.decoding import DECODING
from eval.speed.pretraining import PRETRAINING
from eval.speed.trainers import CRITIC, PPO
from lenvm_rl.programs import run_program

PROGRAMS = {program.name: program for program in (PRETRAINING, DECODING, CRITIC, PPO)}


def make_parser() -> argparse.ArgumentParser:
    """The command line, with a subcommand for each of `PROGRAMS`, and for `batching`."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__.partition("\n")[0])
    subcommands = parser.add_subparsers(dest="program", required=True, parser_class=HfArgumentParser)
    told = {name: (program.text, program.sizes) for name, program in PROGRAMS.items()}
    for name, (text, options) in (told | {"batching": (batching.__doc__, batching.BatchingArguments)}).items():
        texts = {"help": text.partition("\n")[0], "description": text, "formatter_class": HelpFormatter}
        subparser = subcommands.add_parser(name, dataclass_types=options, **texts)
        subparser.set_defaults(options=options)
        if name in PROGRAMS:
            subparser.add_argument("--case", choices=PROGRAMS[name].cases, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the subcommand that the command line names; with `--case`, one of its cases, in this process."""
    args = make_parser().parse_args(arguments)
    options = args.options(**{entry.name: getattr(args, entry.name) for entry in fields(args.options)})
    if args.program == "batching":
        batching.main(options)
    elif args.case is None:
        PROGRAMS[args.program].run(options)
    else:
        PROGRAMS[args.program].measure_here(args.case, options)


if __name__ == "__main__":
    run_program(main, "Interrupted: nothing was written, and the same command measures everything again.")
