"""The program that measures speed: what it counts, what it prints, and that every case runs."""

import io
import time

import pytest
import torch
from rich.console import Console

from eval import speed, speed_pretraining
from eval.measurement import Measurement, Meter, measure_in_process, run_steps
from eval.speed_pretraining import CASES, Settings, make_rollouts, measure, print_measurements

TINY = {"hidden": 32, "layers": 1, "vocab": 64, "prompts": 4, "samples": 4, "prompt_tokens": 8, "median_tokens": 6}


def tiny(**changes):
    return Settings(
        **{**TINY, "longest": 16, "batch": 16, "seconds": 0.02, "threads": torch.get_num_threads(), **changes}
    )


def test_a_meter_counts_what_comes_after_the_warm_up():
    meter = Meter(seconds=0.05, warmup=2)

    def step(number):
        time.sleep(0.02)
        return 10 + number, 1

    result = run_steps(step, meter)
    assert result.steps == 3 and result.tokens == 12 + 13 + 14 and result.items == 3
    assert result.seconds == pytest.approx(0.06, abs=0.03)
    assert result.tokens_per_second == result.tokens / result.seconds
    with pytest.raises(RuntimeError, match="No step was measured"):
        Meter(seconds=1.0).result()


def test_peak_memory_is_what_was_taken_beyond_the_start():
    result = run_steps(lambda number: (len(bytearray(50_000_000 * (number == 1))), 0), Meter(seconds=0.0, warmup=2))
    assert 0 <= result.peak_bytes < 2**30
    held = []

    def step(number):
        held.append(torch.ones(20_000_000 * 4))  # 320 MB a step
        return 1, 1

    assert run_steps(step, Meter(seconds=0.0, warmup=1)).peak_bytes > 2 * 10**8


@pytest.mark.parametrize("case", CASES)
def test_every_case_runs_and_counts_its_tokens(case):
    settings = tiny()
    result = measure(case, settings)
    rollouts = make_rollouts(settings)
    assert len(rollouts) == 16 and result.steps >= 1 and result.seconds > 0
    # A batch is the whole data set, so that every step has the same tokens.
    tokens = sum(len(each["prompt_ids"]) + len(each["completion_ids"]) - 1 for each in rollouts)
    if case in ("trainer", "padded"):
        assert (result.tokens, result.items) == (result.steps * tokens, result.steps * 16)
    elif case == "shared":
        once = sum(len(rollouts[index]["prompt_ids"]) - 1 for index in range(0, 16, 4))
        each = sum(len(rollout["completion_ids"]) for rollout in rollouts)
        # Once per row: prompts are repeated where their completions do not fit in one.
        assert result.steps * (once + each) <= result.tokens < result.steps * tokens
    else:
        assert result.tokens % result.steps == 0


def test_the_table_says_what_was_asked_and_measured():
    measured = {
        "trainer": Measurement(950, 10, 1.0, 2, 2**20),
        "shared": Measurement(500, 20, 1.0, 2, 2**20),
        "padded": Measurement(400, 4, 1.0, 2, 3 * 2**20),
        "limit": Measurement(1000, 0, 1.0, 2, 2**20),
    }
    output = io.StringIO()
    print_measurements(measured, tiny(), Console(file=output, width=120))
    shown = output.getvalue()
    assert "tokens/s over the limit's: 0.95 (asked >= 0.9: met)" in shown
    assert "tokens/s over the padded loop's: 2.38 (asked >= 3.0: not met)" in shown
    assert "peak memory over the padded loop's: 0.33 (asked <= 0.5: met)" in shown


def test_a_case_is_measured_in_a_process_of_its_own(monkeypatch):
    with pytest.raises(RuntimeError, match="--case nonsense failed"):
        measure_in_process("eval.speed_pretraining", {"case": "nonsense"})
    asked = []

    def fake(module, arguments):
        asked.append((module, arguments["case"]))
        return Measurement(1, 1, 1.0, 1, 1)

    monkeypatch.setattr(speed_pretraining, "measure_in_process", fake)
    speed.main(["pretraining", "--hidden", "32"])
    assert asked == [("eval.speed_pretraining", case) for case in CASES]
