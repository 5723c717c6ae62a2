"""Draws instruction prompts from several public sets into one file, the input of recipes/sample_rollouts.py.

    python recipes/instruction_prompts.py --data_dir path/to/data --output outputs/instructions/prompts.jsonl

The data folder holds the published files: ifeval/input_data.jsonl, mt_bench/question.jsonl (the first turn),
self_instruct/user_oriented_instructions.jsonl and seed_tasks.jsonl (the instruction with its input) and
gsm8k/train.jsonl. Each prompt keeps the name of its set in the column `domain`, by which recipes/pretrain_lenvm.py
reports its metrics too; `--domains` takes some of the sets, each with how many prompts if that is not the same for all.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from lenvm_rl.files import write_json_lines
from lenvm_rl.programs import AGAIN, ProgramParser, run_program
from recipes.stage_records import say_next

logger = logging.getLogger(__name__)


def _with_input(row: dict) -> str:
    given = row["instances"][0]["input"]
    return f"{row['instruction']}\n\n{given}" if given else row["instruction"]


# For each domain, its file and where the prompt stands in a row.
SOURCES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "ifeval": ("ifeval/input_data.jsonl", lambda row: row["prompt"]),
    "mt_bench": ("mt_bench/question.jsonl", lambda row: row["turns"][0]),
    "self_instruct": ("self_instruct/user_oriented_instructions.jsonl", _with_input),
    "seed_tasks": ("self_instruct/seed_tasks.jsonl", _with_input),
    "gsm8k": ("gsm8k/train.jsonl", lambda row: row["question"]),
}


@dataclass
class PromptArguments:
    """Which prompts, and where to."""

    data_dir: str = HfArg(help="Folder with the published files.")
    output: str = HfArg(help="The file to write, one JSON object a line.")
    domains: list[str] = HfArg(
        default_factory=lambda: ["ifeval", "mt_bench", "self_instruct"],
        help=f"Sets, of {', '.join(SOURCES)}; one that takes another number of prompts as NAME=NUMBER.",
    )
    per_domain: int = HfArg(default=60, help="Prompts of each set, or all that it has if fewer.")
    max_characters: int = HfArg(default=1500, help="Longer prompts are left out, and counted.")
    seed: int = HfArg(default=0, help="Which prompts are drawn, and in which order they stand.")


def published_prompts(data_dir: Path, domain: str) -> list[str]:
    """All prompts of a domain, in the order of its file."""
    name, prompt_of = SOURCES[domain]
    path = data_dir / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: --data_dir needs the published files {sorted(SOURCES)} under it.")
    prompts = []
    # By newline only: U+2028 occurs inside strings.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            prompts += [prompt_of(json.loads(line))] if line.strip() else []
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"Line {number} of {path} is none of the published file: {error!r}.") from error
    return prompts


def wanted_sets(domains: list[str], per_domain: int) -> dict[str, int]:
    """How many prompts of each set, from `NAME` or `NAME=NUMBER`."""
    wanted = {}
    for name, _, number in (each.partition("=") for each in domains):
        if name not in SOURCES or name in wanted or not (number or "1").isdigit() or number == "0":
            raise ValueError(
                f"domains must be some of {', '.join(SOURCES)}, each once, as NAME or NAME=NUMBER; got {domains}."
            )
        wanted[name] = int(number or per_domain)
    return wanted


def draw_prompts(args: PromptArguments) -> list[dict[str, str]]:
    """`{"prompt", "domain"}` of the drawn prompts, in random order."""
    drawn = []
    for domain, count in wanted_sets(args.domains, args.per_domain).items():
        prompts = published_prompts(Path(args.data_dir), domain)
        short = [prompt for prompt in prompts if len(prompt) <= args.max_characters]
        chosen = random.Random(args.seed).sample(short, min(count, len(short)))
        logger.info("%s: %d of %d prompts, %d too long", domain, len(chosen), len(prompts), len(prompts) - len(short))
        drawn += [{"prompt": prompt, "domain": domain} for prompt in chosen]
    random.Random(args.seed).shuffle(drawn)
    return drawn


def main(args: PromptArguments) -> None:
    """Draws and writes."""
    write_json_lines(args.output, draw_prompts(args))
    sample = ("python", "recipes/sample_rollouts.py", "--dataset_name", args.output, "--keep_columns", "domain")
    say_next(*sample, "--chat", "true", "--model_name_or_path", "MODEL", "--output", "rollouts.jsonl")


def make_parser() -> ProgramParser:
    """The command line: every field of [`PromptArguments`], also read from YAML with `--config`."""
    return ProgramParser(PromptArguments, description=__doc__.partition("\n")[0])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_program(lambda: main(*make_parser().parse_args_and_config()), AGAIN)
