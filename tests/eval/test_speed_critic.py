"""What a length value model costs: every case is the run that it says it is, and the verdict is the ratio's."""

import io

import pytest
from rich.console import Console
from tqdm import tqdm

from eval import speed
from eval.measurement import Measurement
from eval.speed_critic import (
    CASES,
    Case,
    Settings,
    Stepper,
    held_numbers,
    make_trainer,
    measure_time,
    median_ratio,
    save_model,
    show_memory,
    show_time,
)

TINY = Settings(hidden=32, layers=1, vocab=64, prompt_tokens=4, completion_tokens=4, batch=4, steps=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_model(TINY, folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_every_case_is_the_run_that_it_says(saved, case):
    trainer = make_trainer(TINY, case, saved)
    assert trainer.length_value_model.config.form == case.form
    assert hasattr(trainer.model, "peft_config") == case.adapters
    # Only a head on a reference's forward makes none of its own.
    assert (trainer._length_values._reference is not None) == (case.form == "head")
    stepper = Stepper(trainer)
    assert stepper.step() > 0.0 and stepper.forward() > 0.0
    lengths = stepper.batch["completion_mask"].sum(dim=1).tolist()
    assert lengths == [TINY.completion_tokens] * TINY.batch


def test_weights_that_are_shared_count_once(saved):
    plain, *others = (held_numbers(make_trainer(TINY, Case(form, True, 0.1, ""), saved)) for form in
                      ("none", "full", "adapter", "head"))  # fmt: skip
    full, adapter, head = (number - plain for number in others)
    assert head == 32 * 32 + 32 + 32 + 1
    # All linear layers of the decoder get a pair of rank 16.
    assert head < adapter < full


def test_times_are_taken_in_pairs():
    with tqdm(total=4, file=io.StringIO()) as progress:
        seconds = measure_time(TINY, CASES[0], progress)
    assert {name: len(values) for name, values in seconds.items()} == {"plain": 2, "with": 2, "forward": 2}
    assert progress.n == 4


def test_a_ratio_of_medians_by_hand():
    assert median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], 0)[0] == 2.0
    assert median_ratio([3.0] * 5, [2.0] * 5, 0) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(("with_it", "verdict"), [(1.05, "met"), (1.25, "not met")])
def test_the_verdict_is_against_the_plain_step_and_a_forward(with_it, verdict):
    seconds = {"plain": [1.0] * 4, "with": [with_it] * 4, "forward": [0.1] * 4}
    console = Console(file=io.StringIO(), width=160)
    show_time({CASES[0]: seconds}, TINY, console)
    told = console.file.getvalue()
    assert f"{with_it / 1.1:.3f} (asked <= 1.05: {verdict})" in told and f"{with_it:.3f} [" in told


def test_memory_is_told_in_mebibytes_and_millions():
    console = Console(file=io.StringIO(), width=120)
    show_memory({"head": Measurement(3_000_000, 2, 1.0, 2, 5 * 2**20)}, console)
    assert "1.50" in console.file.getvalue() and " 5 " in console.file.getvalue()


def test_both_are_subcommands():
    parser = speed.make_parser()
    assert parser.parse_args(["critic", "--hidden", "64"]).hidden == 64
    assert parser.parse_args(["ppo", "--epochs", "3"]).epochs == 3
