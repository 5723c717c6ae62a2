"""vLLM's offline engine, by a stand-in for the module: ids as sampled, settings named, broken runs resumed."""

import logging
import os
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scripted_server import sampled
from tiny import EOS, tiny_tokenizer

from lenvm_rl.rollouts.job import SamplingSettings, sample_to_file
from lenvm_rl.rollouts.vllm import VLLMJob, engine_defaults, import_vllm

PROMPTS = ["w6 w7", "w12", "w20 w21 w22"]
SETTINGS = SamplingSettings(num_samples=3, max_new_tokens=8, batch_size=4, temperature=0.7, top_p=0.9, top_k=5)


def sample(path, *job, seed=1, **engine_arguments):
    return sample_to_file(path, VLLMJob(*job, engine_arguments, seed=seed))


@pytest.fixture
def engine(monkeypatch):
    """A module `vllm` whose engine samples as the scripted server does; gives what it was called with."""
    calls = SimpleNamespace(
        engines=[], batches=[], fail_after=None, config=SimpleNamespace(max_model_len=64, dtype=torch.bfloat16)
    )

    class SamplingParams(SimpleNamespace):
        pass

    class LLM:
        def __init__(self, **arguments):
            calls.engines.append(arguments)
            self.llm_engine = SimpleNamespace(model_config=calls.config)
            random.seed(arguments["seed"])
            np.random.seed(arguments["seed"])
            torch.manual_seed(arguments["seed"])

        def generate(self, prompts, sampling_params, use_tqdm=True):
            if calls.fail_after is not None and len(calls.batches) == calls.fail_after:
                raise RuntimeError("out of memory")
            calls.batches.append((prompts, sampling_params))
            rows = []
            for prompt, params in zip(prompts, sampling_params, strict=True):
                ids = tuple(sampled(prompt["prompt_token_ids"], params.seed, params.max_tokens))
                reason = "stop" if ids[-1] == EOS else "length"
                rows.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=reason, text="")]))
            return rows

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = LLM, SamplingParams, "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    return calls


def test_ids_are_as_sampled_and_every_setting_is_named(engine, tmp_path):
    dataset, metadata = sample(
        tmp_path / "r.jsonl", "m", tiny_tokenizer(), PROMPTS, SETTINGS, seed=1, tensor_parallel_size=2
    )
    assert engine.engines == [{"model": "m", "seed": 1, **engine_defaults(), "tensor_parallel_size": 2}]
    assert [len(prompts) for prompts, _ in engine.batches] == [4, 4, 1]
    params = engine.batches[0][1][0]
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 0.7, 0.9, 5, 8)
    assert (params.min_p, params.repetition_penalty, params.stop_token_ids) == (0.0, 1.0, [EOS])
    job = VLLMJob("m", tiny_tokenizer(), PROMPTS, SETTINGS, seed=1)
    for number, row in enumerate(dataset.to_list()):
        assert row["completion_ids"] == sampled(row["prompt_ids"], job.seed_of(number), 8)
        assert row["finish_reason"] == ("stop" if row["completion_ids"][-1] == EOS else "length")
        assert row["group"] == number // 3
    assert {row["finish_reason"] for row in dataset.to_list()} == {"stop", "length"}
    assert metadata.sampling["backend"] == "vllm" and metadata.sampling["token_ids"] == "sampled"


def test_a_broken_run_goes_on_where_it_was_in_batches_of_another_size(engine, tmp_path):
    path, tokenizer = tmp_path / "r.jsonl", tiny_tokenizer()
    whole, _ = sample(tmp_path / "whole.jsonl", "m", tokenizer, PROMPTS, SETTINGS, seed=1)
    engine.batches.clear()
    engine.fail_after = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(path, "m", tokenizer, PROMPTS, SETTINGS, seed=1)
    engine.fail_after = None
    smaller = SamplingSettings(3, 8, 2, temperature=0.7, top_p=0.9, top_k=5)
    dataset, _ = sample(path, "m", tokenizer, PROMPTS, smaller, seed=1)
    assert [len(prompts) for prompts, _ in engine.batches] == [4, 2, 2, 1]
    assert dataset.to_list() == whole.to_list()
    assert len(engine.engines) == 3
    # What is complete needs no engine.
    engines = len(engine.engines)
    sample(path, "m", tokenizer, PROMPTS, SETTINGS, seed=1)
    assert len(engine.engines) == engines


def test_the_metadata_say_what_the_engine_made_of_the_settings(engine, tmp_path):
    given = (tiny_tokenizer(), PROMPTS, SETTINGS)
    _, metadata = sample(tmp_path / "r.jsonl", "m", *given, seed=1)
    assert (metadata.sampling["dtype"], metadata.sampling["vllm_version"]) == ("bfloat16", "0.32.0")
    assert sample(tmp_path / "r.jsonl", "m", *given, seed=1)[1] == metadata
    # Another dtype by request is another job, and one that came about by itself is no other plan.
    engine.config.dtype = torch.float32
    _, other = sample(tmp_path / "s.jsonl", "m", *given, seed=1)
    assert other.sampling["dtype"] == "float32" and other.sampling["plan"] == metadata.sampling["plan"]


@pytest.mark.parametrize("change", ["dtype", "version"])
def test_a_job_goes_on_in_the_dtype_that_it_was_begun_in(engine, tmp_path, change, monkeypatch, caplog):
    path, job = tmp_path / "r.jsonl", ("m", tiny_tokenizer(), PROMPTS, SETTINGS)
    engine.fail_after = 1
    with pytest.raises(RuntimeError):
        sample(path, *job, seed=1)
    engine.fail_after = None
    if change == "dtype":
        engine.config.dtype = torch.float16
        with pytest.raises(ValueError, match="dtype='bfloat16'"):
            sample(path, *job, seed=1)
        return
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.33.0")
    with caplog.at_level(logging.WARNING):
        _, metadata = sample(path, *job, seed=1)
    assert "0.32.0" in caplog.text and "0.33.0" in caplog.text and metadata.sampling["vllm_version"] == "0.32.0"


@pytest.mark.parametrize("asked", [10, None, -1])
def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_sampled(engine, tmp_path, asked):
    engine.config.max_model_len = 10
    options = {} if asked is None else {"max_model_len": asked}
    with pytest.raises(ValueError, match="Prompt 2 .* 3 .* 10"):
        sample(tmp_path / "r.jsonl", "m", tiny_tokenizer(), PROMPTS, SETTINGS, seed=1, **options)
    # What is known from the arguments takes no engine.
    assert len(engine.engines) == (0 if asked == 10 else 1) and not engine.batches
    engine.config.max_model_len = 11
    sample(tmp_path / "r.jsonl", "m", tiny_tokenizer(), PROMPTS, SETTINGS, seed=1)


def test_the_callers_random_numbers_are_left_alone(engine, tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seeded():
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seeded()
    expected = draw()
    seeded()
    sample(tmp_path / "r.jsonl", "m", tiny_tokenizer(), PROMPTS, SETTINGS, seed=1)
    assert engine.engines and draw() == expected


def test_without_top_k_every_token_is_kept(engine, tmp_path):
    sample(tmp_path / "r.jsonl", "m", tiny_tokenizer(), PROMPTS, SamplingSettings(1, 8, 4), seed=1)
    assert engine.batches[0][1][0].top_k == -1


def test_without_vllm_the_error_says_what_else_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vLLM"):
        import_vllm()


@pytest.mark.parametrize("accelerated", [False, True])
def test_on_a_cpu_prompts_are_read_whole_and_no_second_process_is_started(accelerated, engine, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerated)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    import_vllm()
    assert os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == (None if accelerated else "0")
    assert engine_defaults() == ({} if accelerated else {"enable_chunked_prefill": False})
