"""`eval.length_control` and `eval.tradeoff` with a real engine: greedy, their arms are those of transformers."""

import json

import pytest
from test_engine_rollouts import no_engine_left

from eval.length_control.__main__ import LengthControlArguments
from eval.length_control.__main__ import main as compare_lengths
from eval.tradeoff.__main__ import main as compare_arms
from eval.tradeoff.arms import TradeoffArguments

SHARED = {"temperature": 0.0, "batch_size": 16, "engine_arguments": json.dumps({"enforce_eager": True})}


def texts(folder):
    return sorted((folder / "completions.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_the_cells_are_those_of_transformers(models, tmp_path):
    length = " Answer in {word_count} {word_count_type}."
    tasks = [{"id": n, "category": "create", "lang": "en", "task": f"w{7 + 5 * n} w8.{length}"} for n in range(3)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    given = {"policy": models[0], "length_value_model": models[1], "dataset_name": str(tmp_path / "tasks.jsonl")}
    given |= {"targets": [4, 8], "cap_extra": 8, "rule": "patient", **SHARED}
    found = {}
    for backend in ("vllm", "transformers"):
        out = tmp_path / backend
        with no_engine_left():
            found[backend] = compare_lengths(LengthControlArguments(**given, backend=backend, output_dir=str(out)))
    assert texts(tmp_path / "vllm") == texts(tmp_path / "transformers")
    for ours, theirs in zip(found["vllm"]["cells"], found["transformers"]["cells"], strict=True):
        assert ours["length_score"] == theirs["length_score"] and ours["natural"] == theirs["natural"]


@pytest.mark.slow
def test_the_arms_are_those_of_transformers(models, tmp_path):
    rows = [{"question": f"w{7 + 5 * n} w{8 + n}", "answer": str(n)} for n in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"policy": models[0], "length_value_model": models[1], "dataset_name": str(tmp_path / "test.jsonl")}
    given |= {"task": "gsm8k", "num_samples": 1, "max_new_tokens": 20, "strengths": [2.0], "budget_quantiles": [0.5]}
    found = {}
    for backend in ("vllm", "transformers"):
        args = TradeoffArguments(**given, **SHARED, backend=backend, output_dir=str(tmp_path / backend))
        with no_engine_left():
            found[backend] = compare_arms(args)
    for ours, theirs in zip(found["vllm"], found["transformers"], strict=True):
        for known in ("name", "tokens", "accuracy", "unfinished"):
            assert ours[known] == theirs[known]
