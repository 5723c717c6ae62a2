"""How fast the parts of the library are, beside what they replace and beside the limit.

    python -m eval.speed pretraining
    python -m eval.speed pretraining --help

Every subcommand has cases that `eval.speed.harness` measures, but for three: `batching` replays what was sampled,
`memory` works out what a run of some size needs, and `queue` has vLLM serve requests in three orders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eval.speed import batching, memory, queue
from eval.speed.decoding import DECODING
from eval.speed.pretraining import PRETRAINING
from eval.speed.rollouts import ROLLOUTS
from eval.speed.serving import SERVING
from eval.speed.trainers import CRITIC, PPO
from eval.speed.vllm import ENGINE
from lenvm_rl.programs import ProgramParser, run_program

PROGRAMS = {program.name: program for program in (PRETRAINING, DECODING, SERVING, ENGINE, ROLLOUTS, CRITIC, PPO)}
# What is replayed or worked out: a module with its arguments.
OTHERS = {
    "batching": (batching, batching.BatchingArguments),
    "memory": (memory, memory.MemoryArguments),
    "queue": (queue, queue.QueueArguments),
}


def make_parser(name: str) -> ProgramParser:
    """The command line of a subcommand, one of `PROGRAMS` or of `OTHERS`."""
    measured = PROGRAMS.get(name)
    prog = f"python -m eval.speed {name}"
    if measured is None:
        module, options = OTHERS[name]
        return ProgramParser(options, prog=prog, description=module.__doc__)
    parser = ProgramParser(measured.sizes, prog=prog, description=measured.text)
    parser.add_argument("--case", choices=measured.cases, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the subcommand that the command line names; with `--case`, one of its cases, in this process."""
    chooser = argparse.ArgumentParser(
        prog="python -m eval.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chooser.add_argument("program", choices=[*PROGRAMS, *OTHERS], help="What is measured.")
    line = list(sys.argv[1:] if arguments is None else arguments)
    name = chooser.parse_args(line[:1]).program
    options, *case = make_parser(name).parse_args_and_config(line[1:])
    if name in OTHERS:
        OTHERS[name][0].main(options)
    elif case[0].case is None:
        PROGRAMS[name].run(options)
    else:
        PROGRAMS[name].measure_here(case[0].case, options)


if __name__ == "__main__":
    run_program(main, "Interrupted: nothing was written, and the same command measures everything again.")
