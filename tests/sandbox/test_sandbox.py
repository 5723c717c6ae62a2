"""The sandbox: arithmetic, splits, styles, reading back, and the exact verifier."""

import random
from itertools import islice

import pytest
import torch

from lenvm_rl.sandbox import (
    DIFFICULTIES,
    STYLES,
    Overthinking,
    PolicySettings,
    Problem,
    Reading,
    clean_length,
    distinct_problems,
    draw_completion,
    fit_policy,
    is_correct,
    read_completion,
    sandbox_tokenizer,
    stream_problems,
    task,
)
from lenvm_rl.sandbox.policy import TeacherRows
from lenvm_rl.sandbox.styles import clean_steps
from lenvm_rl.sandbox.task import TOKENS, VALUES
from reward.sandbox import sandbox_reward

# 3 -> +2 = 5 -> *2 = 10, which is 3 modulo 7 -> +3 = 6.
PROBLEM = Problem(start=3, labels=("c", "a", "f"), operations=("+2", "*2", "+3"))
RUNNING = (5, 3, 6)


def test_arithmetic_by_hand():
    assert PROBLEM.running == RUNNING
    assert PROBLEM.answer == str(RUNNING[-1])
    assert PROBLEM.prompt == "3 c +2 a *2 f +3 ?"
    assert PROBLEM.difficulty == 3


def test_styles_by_hand():
    values = [str(value) for value in RUNNING]
    assert clean_steps(PROBLEM, "direct") == []
    assert clean_steps(PROBLEM, "careful") == [["c", "+2", values[0]], ["a", "*2", values[1]], ["f", "+3", values[2]]]
    with pytest.raises(ValueError, match="style must be one of"):
        clean_steps(PROBLEM, "fast")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_clean_length_counts_steps_and_answer_without_the_end(style, difficulty):
    problem = task.draw_problem(random.Random(0), difficulty, "train")
    assert clean_length(difficulty, style) == sum(len(step) for step in clean_steps(problem, style)) + 2


def test_reading_a_completion_by_hand():
    tokens = "c +2 1 wait wait redo c +2 1 a *2 2 f +3 5 redo c 1 a 2 f 5 wait A 5 <eos>".split()
    reading = read_completion(tokens)
    assert reading.style == "careful"
    # Two waits and a step behind redo; then a pass of 1 + 6 tokens and its wait.
    assert reading.wasted == (*[False] * 3, *[True] * 6, *[False] * 6, *[True] * 8)
    assert reading.waste_tokens == 14
    # Each value twice: no less waste.
    assert read_completion("c +2 1 redo c 1 1 A 1 <eos>".split()).wasted == (*[False] * 3, *[True] * 4)
    # A step with a label that was written before is waste without redo, too.
    assert read_completion("c +2 1 c +2 1 A 1 <eos>".split()).wasted == (*[False] * 3, *[True] * 3)
    assert read_completion("A 4 <eos>".split()) == Reading("direct", ())
    assert read_completion("c 1 a *2 4 A 4 <eos>".split()).style == "mixed"
    assert read_completion("c 1 A 4 <eos>".split()).style == "mixed"
    assert read_completion("c c A 4 <eos>".split()).style == "mixed"
    assert read_completion("c +2 1 redo c".split()) == Reading("careful", (*[False] * 3, True, True))


@pytest.mark.parametrize("passes", [-0.5, 0.25, 1.2, 1.75])
def test_half_passes_are_the_smallest(passes):
    with pytest.raises(ValueError, match="passes"):
        Overthinking(passes=passes)


def test_teacher_is_always_right_and_reads_back_to_its_clean_length():
    rng = random.Random(1)
    seen = set()
    for overthinking in (Overthinking(), Overthinking(passes=3.0, repeats=3), Overthinking(passes=0.0)):
        for problem in islice(stream_problems(1, "validation"), 400):
            completion = draw_completion(rng, problem, overthinking)
            reading = read_completion(completion)
            seen.add(reading.style)
            assert is_correct(completion, problem.answer)
            assert len(completion) - 1 - reading.waste_tokens == clean_length(problem.difficulty, reading.style)
    assert seen == set(STYLES)


@pytest.mark.parametrize(("passes", "repeats"), [(0.0, 1), (0.5, 1), (2.0, 3), (10.0, 1)])
def test_passes_are_as_many_as_asked_and_none_is_likelier(passes, repeats):
    problem, rng = task.draw_problem(random.Random(0), 7, "train"), random.Random(3)
    overthinking = Overthinking(passes, repeats)
    drawn = [draw_completion(rng, problem, overthinking) for _ in range(4000)]
    # Detours inside of the chain write redo before a label and an operation.
    counts = [sum(a == "redo" and c in VALUES for a, c in zip(row, row[2:], strict=False)) for row in drawn]
    careful = [count for count, row in zip(counts, drawn, strict=True) if row[0] != "A"]
    assert max(careful) == overthinking.most_passes == 2 * passes
    assert sum(careful) / len(careful) == pytest.approx(passes, rel=0.05)
    # 23 tokens and an end; each pass writes redo, seven labels, seven values per repeat, and up to three waits.
    assert overthinking.longest_completion == 24 + 2 * passes * (8 + 7 * repeats + 3)


def test_verifier_wants_the_answer_and_an_end():
    assert is_correct(["A", "4", "<eos>"], "4")
    for wrong in (["A", "5", "<eos>"], ["A", "4"], ["4", "<eos>"], ["A", "4", "<eos>", "<eos>"], []):
        assert not is_correct(wrong, "4")


def test_reward_reads_token_ids():
    ids = {token: index for index, token in enumerate(TOKENS)}
    completions = [[ids[token] for token in text.split()] for text in ("A 4 <eos>", "A 4", "a 4 A 3 <eos>")]
    assert sandbox_reward(completion_ids=completions, answer=["4", "4", "4"], prompts=None) == [1.0, 0.0, 0.0]


def test_splits_are_disjoint_stratified_and_reproducible():
    drawn = {split: distinct_problems(240, 0, split) for split in task.SPLITS}
    prompts = {split: {problem.prompt for problem in problems} for split, problems in drawn.items()}
    assert all(len(found) == 240 for found in prompts.values())
    assert not prompts["train"] & prompts["evaluation"] and not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["evaluation"]
    for problems in drawn.values():
        assert [problem.difficulty for problem in problems] == list(DIFFICULTIES) * (240 // len(DIFFICULTIES))
    assert drawn["train"] == distinct_problems(240, 0, "train")
    assert drawn["train"] != distinct_problems(240, 1, "train")


def test_too_few_distinct_problems_is_an_error():
    with pytest.raises(ValueError, match="multiple of"):
        distinct_problems(len(DIFFICULTIES) + 1, 0, "train")
    with pytest.raises(ValueError, match="difficulty 1"):
        distinct_problems(5_000, 0, "evaluation", difficulties=(1,))


def test_tokenizer_round_trips_prompts_and_completions():
    tokenizer = sandbox_tokenizer()
    completion = draw_completion(random.Random(2), PROBLEM, Overthinking())
    text = f"{PROBLEM.prompt} {' '.join(completion)}"
    ids = tokenizer(text)["input_ids"]
    assert [TOKENS[token] for token in ids] == text.split()
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == list(TOKENS)


def test_teacher_rows_hold_whole_examples_with_restarting_positions():
    tokenizer = sandbox_tokenizer()
    for row in islice(TeacherRows(PolicySettings(), tokenizer), 50):
        ids, labels, positions = (row[name].tolist() for name in ("input_ids", "labels", "position_ids"))
        assert len(ids) == len(labels) == len(positions) == 256
        starts = [index for index, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], 256], strict=True):
            tokens = tokenizer.convert_ids_to_tokens(ids[start:end])
            if tokens[0] == tokenizer.pad_token:
                assert set(tokens) == {tokenizer.pad_token} and set(labels[start:end]) == {-100}
                continue
            prompt = tokens.index("?") + 1
            assert labels[start:end] == [-100] * prompt + ids[start + prompt : end]
            assert tokens[-1] == tokenizer.eos_token


def test_a_fit_goes_on_from_another(tmp_path):
    small = {"hidden_size": 16, "num_heads": 2, "train_tokens": 1, "batch_tokens": 512}
    first = fit_policy(str(tmp_path / "first"), PolicySettings(**small), use_cpu=True)
    start = {"start": str(tmp_path / "first"), "learning_rate": 0.0, "passes": 3.0}
    again = fit_policy(str(tmp_path / "again"), PolicySettings(**small, **start), use_cpu=True)
    moved = fit_policy(
        str(tmp_path / "moved"), PolicySettings(**small, **start | {"learning_rate": 1e-2}), use_cpu=True
    )
    for one, two, three in zip(first.parameters(), again.parameters(), moved.parameters(), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three)


@pytest.mark.parametrize(("passes", "repeats"), [(0.0, 1), (1.5, 1), (4.0, 12), (42.0, 1)])
def test_a_row_of_a_fit_holds_the_longest_completion(passes, repeats):
    settings = PolicySettings(passes=passes, repeats=repeats)
    # A start, seven labels and operations, and the question mark.
    longest = settings.overthinking.longest_completion + 16
    assert settings.row_tokens >= max(256, longest) and settings.batch_rows >= 1
    assert settings.batch_rows == 1 or settings.batch_rows * settings.row_tokens <= settings.batch_tokens
