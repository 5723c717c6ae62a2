"""Writes small arithmetic questions in words, with answers: a task that a model of 135 M parameters solves in part.

    python recipes/arithmetic_questions.py --output_dir outputs/arithmetic

Makes train.jsonl and test.jsonl there, with GSM8K's columns `question` and `answer` (the number alone), so that
`--task gsm8k` and `reward.gsm8k.gsm8k_reward` grade them, `kind`, and the domain `arithmetic`. No pair of numbers of a
test question stands in a training question of the same kind, in either order.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from lenvm_rl.files import write_json_lines
from lenvm_rl.programs import AGAIN, ProgramParser, run_program
from recipes.stage_records import say_next

NAMES = ("Tom", "Anna", "Sam", "Lily", "Ben", "Maria", "Omar", "Grace", "Leo", "Nina", "Paul", "Ruth")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "stickers", "cards", "shells", "balls", "cookies")
# Draws of a kind's questions before all of them have surely come.
DRAWS = 50_000


@dataclass(frozen=True)
class QuestionKind:
    """Questions on two numbers: their wordings, the range of each number, and the answer."""

    wordings: tuple[str, ...]
    first: range
    second: range
    answer: Callable[[int, int], int]


KINDS_OF_QUESTIONS = {
    "times": QuestionKind(
        ("What is {a} times {b}?", "What is {a} multiplied by {b}?", "What is the product of {a} and {b}?"),
        range(2, 13), range(2, 13), lambda a, b: a * b,
    ),
    "plus": QuestionKind(
        ("What is {a} plus {b}?", "What is the sum of {a} and {b}?", "What do you get when you add {b} to {a}?"),
        range(2, 13), range(2, 13), lambda a, b: a + b,
    ),
    "buys": QuestionKind(
        (
            "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
            "{name} has {a} {things}. A friend gives {name} {b} more. How many {things} does {name} have in all?",
            "{name} finds {a} {things} in the morning and {b} in the evening. How many {things} is that together?",
        ),
        range(2, 13), range(2, 13), lambda a, b: a + b,
    ),
}  # fmt: skip


@dataclass
class ArithmeticArguments:
    """How many questions, and where to."""

    output_dir: str = HfArg(help="The folder to write train.jsonl and test.jsonl in.")
    kinds: list[str] = HfArg(
        default_factory=lambda: list(KINDS_OF_QUESTIONS), help=f"Some of {', '.join(KINDS_OF_QUESTIONS)}."
    )
    train: int = HfArg(default=768, help="Training questions.")
    test: int = HfArg(default=128, help="Test questions.")
    seed: int = HfArg(default=0, help="Of the questions, and of which numbers are for the test.")

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS_OF_QUESTIONS):
            raise ValueError(f"kinds must be some of {', '.join(KINDS_OF_QUESTIONS)}, got {self.kinds}.")


def draw_questions(kind: str, split: str, seed: int) -> Iterator[dict[str, str]]:
    """Questions of a kind, each once; those of split `"test"` have a quarter of the pairs of numbers."""
    made = KINDS_OF_QUESTIONS[kind]
    pairs = sorted({(min(a, b), max(a, b)) for a in made.first for b in made.second})
    random.Random(f"{seed} {kind}").shuffle(pairs)
    for_test = set(pairs[: len(pairs) // 4])
    draw, seen = random.Random(f"{seed} {kind} {split}"), set()
    for _ in range(DRAWS):
        a, b = draw.choice(made.first), draw.choice(made.second)
        words = {"name": draw.choice(NAMES), "things": draw.choice(THINGS)}
        question = draw.choice(made.wordings).format(a=a, b=b, **words)
        if ((min(a, b), max(a, b)) in for_test) == (split == "test") and question not in seen:
            seen.add(question)
            yield {"question": question, "answer": str(made.answer(a, b)), "kind": kind, "domain": "arithmetic"}
    raise ValueError(f"there are only {len(seen)} {split} questions of kind {kind!r}: lower --{split}.")


def main(args: ArithmeticArguments) -> None:
    """Draws, by turns from each kind, and writes."""
    for split, count in (("train", args.train), ("test", args.test)):
        sources = [draw_questions(kind, split, args.seed) for kind in args.kinds]
        rows = [next(sources[number % len(sources)]) for number in range(count)]
        write_json_lines(Path(args.output_dir) / f"{split}.jsonl", rows)
    train = str(Path(args.output_dir) / "train.jsonl")
    sample = ("python", "recipes/sample_rollouts.py", "--dataset_name", train, "--prompt_column", "question")
    say_next(*sample, "--chat", "true", "--keep_columns", "domain", "--model_name_or_path", "MODEL")


def make_parser() -> ProgramParser:
    """The command line: every field of [`ArithmeticArguments`], also read from YAML with `--config`."""
    return ProgramParser(ArithmeticArguments, description=__doc__.partition("\n")[0])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_program(lambda: main(*make_parser().parse_args_and_config()), AGAIN)
