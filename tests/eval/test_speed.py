"""The program that measures speed: what it counts, what it prints, and that every case runs."""

import io
import time

import numpy as np
import pytest
import torch
from ragged import make_rollout
from rich.console import Console
from tiny import EOS, tiny_length_value_model, tiny_llama, tiny_tokenizer

from eval import speed, speed_batching, speed_pretraining
from eval.measurement import Measurement, Meter, measure_in_process, run_steps
from eval.speed_pretraining import CASES, Settings, make_rollouts, measure, print_measurements
from lenvm_rl.prediction import predict_length
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.local import RolloutSampler
from lenvm_rl.rollouts.record import RolloutMetadata, write_rollouts
from lenvm_rl.tokenization import tokenizer_fingerprint

TINY = {"hidden": 32, "layers": 1, "vocab": 64, "prompts": 4, "samples": 4, "prompt_tokens": 8, "median_tokens": 6}


def tiny(**changes):
    return Settings(
        **{**TINY, "longest": 16, "batch": 16, "seconds": 0.02, "threads": torch.get_num_threads(), **changes}
    )


def test_a_meter_counts_what_comes_after_the_warm_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = Meter(seconds=0.05, warmup=2)

    def step(number):
        clock[0] += 0.02
        return 10 + number, 1

    result = run_steps(step, meter)
    assert result.steps == 3 and result.tokens == 12 + 13 + 14 and result.items == 3
    assert result.seconds == pytest.approx(0.06)
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


def test_steps_of_every_order_by_hand():
    # Prompts of 5, 3, 4 tokens, two completions each, batches of 2.
    lengths, groups = np.array([2, 4, 9, 7, 3, 5]), np.array([0, 0, 1, 1, 2, 2])
    costs = speed_batching.replay(lengths, groups, np.array([5, 5, 3, 3, 4, 4]), np.array([6, 6, 2, 2, 4, 4.0]), 2, 400)
    # By prompt length and by prediction, a prompt's completions share a batch: 9 + 5 + 4 steps, 2 + 2 + 2 wasted.
    for name in ("prompt length", "predicted length"):
        assert (costs[name].steps, costs[name].padding) == (18, 6)
    # 9, 7 | 5, 4 | 3, 2.
    assert (costs["realised length"].steps, costs["realised length"].padding) == (17, 4)
    assert costs["predicted length"].ratios["prompt length"] == 1.0
    assert costs["predicted length"].ratios["realised length"] == 1.5
    prompts = costs["random prompts"]
    assert (prompts.steps.low, prompts.steps.high, prompts.padding.estimate) == (18, 18, 6)
    # The mean over all pairings of six: 15 pairs, each in one batch out of five: |differences| sum to 50, times 1/5.
    differences = sum(abs(int(a) - int(b)) for i, a in enumerate(lengths) for b in lengths[:i])
    random = costs["random"].padding
    assert random.low < differences / 5 < random.high and random.high - random.low < 1
    ratio = costs["predicted length"].ratios["random"]
    assert ratio.estimate == pytest.approx(6 / random.estimate) and ratio.low < ratio.estimate < ratio.high
    # Nothing to waste: no ratio to that.
    assert np.isnan(speed_batching.replay(lengths * 0 + 3, groups, lengths, lengths, 2, 3)["random"].ratios["random"])


def write_batching(folder):
    """Rollouts of 12 prompts, and a model of random weights."""
    draw = torch.Generator().manual_seed(0)
    tokenizer, model = tiny_tokenizer(), tiny_length_value_model(tokenizer=tiny_tokenizer())
    prompts = [torch.randint(6, 64, (1 + index % 5,), generator=draw).tolist() for index in range(12)]
    lengths = torch.randint(1, 40, (12, 3), generator=draw).tolist()
    rollouts = [
        make_rollout(prompts[group], [7] * length + [EOS], group=group)
        for group in range(12)
        for length in lengths[group]
    ]
    write_rollouts(folder / "r.jsonl", rollouts, RolloutMetadata("p", tokenizer_fingerprint(tokenizer), {}, 0, [EOS]))
    model.save_pretrained(folder / "lenvm")
    return [" ".join(f"w{i}" for i in prompt) for prompt in prompts], tokenizer, model, rollouts


def test_the_orders_are_those_of_the_sampler(tmp_path):
    prompts, tokenizer, model, rollouts = write_batching(tmp_path)
    settings = speed_batching.Settings(str(tmp_path / "r.jsonl"), str(tmp_path / "lenvm"), batch_size=7, shuffles=5)
    costs = speed_batching.measure(settings)
    lengths = np.array([len(each["completion_ids"]) for each in rollouts])
    for name, option in (("prompt length", None), ("predicted length", model)):
        sampler = RolloutSampler(
            tiny_llama(), tokenizer, prompts, SamplingSettings(3, 50, 7), 0, length_value_model=option
        )
        batches = sampler.plan()
        assert costs[name].steps == speed_batching.decode_steps(lengths, batches)
        assert costs[name].padding == speed_batching.padding_steps(lengths, batches)
    assert costs["predicted length"].padding != costs["prompt length"].padding
    assert len(set(predict_length(model, tokenizer, prompts).tolist())) == 12


def test_batching_is_a_subcommand(tmp_path, capsys):
    write_batching(tmp_path)
    options = ["--rollouts", str(tmp_path / "r.jsonl"), "--length_value_model", str(tmp_path / "lenvm")]
    speed.main(["batching", *options, "--batch_size", "6", "--shuffles", "8"])
    shown = capsys.readouterr().out
    for name in ("random prompts", "prompt length", "predicted length", "realised length"):
        assert name in shown
    assert "Padding steps of the predicted order: " in shown and "nan" not in shown
    with pytest.raises(SystemExit):
        speed.main(["batching", "--rollouts", "r.jsonl"])
    assert "--length_value_model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        speed.main(["batching", *options, "--batch_size", "0"])
