"""The built-in task: follow a chain of modular operations, with or without writing the steps down.

A prompt gives a start value and labelled operations, ``3 c +5 a *2 f +6 ?``; the answer is the value after all of them,
modulo [`MODULUS`]. Additions and multiplications do not commute, so the answer cannot be tallied: a small network needs
written steps once the chain is long. The number of operations is the difficulty, known for every prompt.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MODULUS = 7
LABELS = tuple("abcdefghijklmnopqrst")
VALUES = tuple(str(value) for value in range(MODULUS))
OPERATIONS = ("+1", "+2", "+3", "*2", "*3", "*4")
DIFFICULTIES = (1, 3, 5, 7)
SPLITS = ("train", "validation", "evaluation")

QUESTION, ANSWER, WAIT, REDO = "?", "A", "wait", "redo"
PAD, EOS = "<pad>", "<eos>"


def apply(value: int, operation: str) -> int:
    """The value after one operation, modulo [`MODULUS`]: ``apply(3, "*5") == 15 % MODULUS``."""
    number = int(operation[1:])
    return (value + number if operation[0] == "+" else value * number) % MODULUS


@dataclass(frozen=True)
class Problem:
    """One prompt of the sandbox.

    Args:
        start (`int`): value before the first operation.
        labels (`tuple` of `str`): a distinct letter for each operation, in order.
        operations (`tuple` of `str`): the operations, in order.
    """

    start: int
    labels: tuple[str, ...]
    operations: tuple[str, ...]

    @property
    def difficulty(self) -> int:
        """Number of operations."""
        return len(self.operations)

    @property
    def running(self) -> tuple[int, ...]:
        """The value after each operation."""
        values, value = [], self.start
        for operation in self.operations:
            value = apply(value, operation)
            values.append(value)
        return tuple(values)

    @property
    def answer(self) -> str:
        """The value after the last operation, as a token."""
        return str(self.running[-1])

    @property
    def prompt(self) -> str:
        """The prompt's text; tokens are separated by spaces."""
        steps = " ".join(f"{label} {operation}" for label, operation in zip(self.labels, self.operations, strict=True))
        return f"{self.start} {steps} {QUESTION}"

    @property
    def split(self) -> str:
        """The split of this prompt, by a hash of its text: 60 % train, 20 % validation, 20 % evaluation."""
        bucket = int.from_bytes(hashlib.sha256(self.prompt.encode()).digest()[:4], "big") % 5
        return SPLITS[max(0, bucket - 2)]


def draw_problem(rng: random.Random, difficulty: int, split: str) -> Problem:
    """Draw a random problem of a difficulty from a split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    if not 1 <= difficulty <= len(LABELS):
        raise ValueError(f"difficulty must be between 1 and {len(LABELS)} operations, got {difficulty}.")
    while True:
        problem = Problem(
            start=rng.randrange(MODULUS),
            labels=tuple(rng.sample(LABELS, difficulty)),
            operations=tuple(rng.choice(OPERATIONS) for _ in range(difficulty)),
        )
        if problem.split == split:
            return problem


def stream_problems(seed: int, split: str, difficulties: Sequence[int] = DIFFICULTIES) -> Iterator[Problem]:
    """Endless problems of a split, stratified: every run of ``len(difficulties)`` holds each difficulty once."""
    rng = random.Random(f"{seed}-{split}")
    while True:
        for difficulty in difficulties:
            yield draw_problem(rng, difficulty, split)


def distinct_problems(count: int, seed: int, split: str, difficulties: Sequence[int] = DIFFICULTIES) -> list[Problem]:
    """The first `count` distinct problems of [`stream_problems`], still stratified by difficulty."""
    if count % len(difficulties):
        raise ValueError(f"count must be a multiple of the {len(difficulties)} difficulties, got {count}.")
    rng = random.Random(f"{seed}-{split}")
    seen: set[Problem] = set()
    problems = []
    for _ in range(count // len(difficulties)):
        for difficulty in difficulties:
            for _ in range(10_000):
                problem = draw_problem(rng, difficulty, split)
                if problem not in seen:
                    break
            else:
                raise ValueError(f"the {split} split has too few distinct problems of difficulty {difficulty}.")
            seen.add(problem)
            problems.append(problem)
    return problems


def is_correct(completion: Sequence[str], answer: str) -> bool:
    """Whether a completion's tokens (end-of-sequence included) finish with the right answer, ``A <answer> <eos>``."""
    return list(completion[-3:]) == [ANSWER, answer, EOS]


TOKENS = (PAD, EOS, QUESTION, ANSWER, WAIT, REDO, *VALUES, *OPERATIONS, *LABELS)


def sandbox_tokenizer() -> PreTrainedTokenizerFast:
    """A `PreTrainedTokenizerFast` over [`TOKENS`], words split at spaces; pads on the left, as generation needs it."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, padding_side="left", clean_up_tokenization_spaces=False
    )
