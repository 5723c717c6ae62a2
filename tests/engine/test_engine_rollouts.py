"""Rollouts from a real vLLM: a job that is killed and started again, greedy completions, and contexts without room."""

import gc
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import vllm
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from lenvm_rl.files import Journal
from lenvm_rl.rollouts import SamplingSettings, VLLMJob, read_rollouts, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob

PROMPTS = ["w6 w7", "w12", "w20 w21 w22 w23"]
SETTINGS = SamplingSettings(num_samples=4, max_new_tokens=24, batch_size=5, temperature=0.8, top_p=0.95, top_k=40)
# Loads fast.
ENGINE = {"enforce_eager": True, "max_num_seqs": 16}


def a_job(policy, settings=SETTINGS, **engine):
    return VLLMJob(policy, AutoTokenizer.from_pretrained(policy), PROMPTS, settings, {**ENGINE, **engine}, seed=3)


@contextmanager
def no_engine_left():
    """A process has room for one engine at a time."""
    yield
    gc.collect()
    cleanup_dist_env_and_memory()


def die_after(steps):
    """Has this process killed, as a machine that fails does it, when so many steps are in the journal."""
    append, written = Journal.append, []

    def appending(self, batch, records):
        append(self, batch, records)
        written.append(batch)
        # One of them is what was prepared for the steps.
        if len(written) == steps + 1:
            signal.raise_signal(signal.SIGKILL)

    Journal.append = appending


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_as_an_unbroken_one(models, tmp_path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    state = torch.random.get_rng_state()
    with no_engine_left():
        records, metadata = sample_to_file(whole, a_job(models[0], dtype="float32"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {row["finish_reason"] for row in records} == {"stop", "length"}
    assert len({tuple(row["completion_ids"]) for row in records}) == len(records) == 12
    assert metadata.sampling["dtype"] == "float32" and metadata.sampling["vllm_version"] == vllm.__version__
    # Seven of twelve completions: the second batch is broken off.
    command = [sys.executable, __file__, models[0], str(broken), "7"]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    journal = broken.with_suffix(".journal")
    assert not broken.exists() and len(journal.read_text().splitlines()) == 2 + 7
    with no_engine_left():
        assert sample_to_file(broken, a_job(models[0], dtype="float32"))[1] == metadata
    assert not journal.exists() and broken.read_text() == whole.read_text()
    # What is complete is read, without an engine.
    assert read_rollouts(broken)[0].to_list() == sample_to_file(broken, a_job(models[0], dtype="float32"))[0].to_list()


def test_greedy_completions_are_those_of_transformers(models, tmp_path):
    greedy = SamplingSettings(num_samples=1, max_new_tokens=24, batch_size=8, temperature=0.0)
    with no_engine_left():
        found, _ = sample_to_file(tmp_path / "vllm.jsonl", a_job(models[0], greedy, dtype="float32"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]), AutoTokenizer.from_pretrained(models[0])
    expected, _ = sample_to_file(tmp_path / "transformers.jsonl", TransformersJob(model, tokenizer, PROMPTS, greedy, 3))
    assert found.to_list() == expected.to_list()


def test_a_context_without_room_is_refused_before_anything_is_sampled(models, tmp_path):
    """Where it is asked for, and where it is the model's own (256), of which the engine tells when it is loaded."""
    with pytest.raises(ValueError, match="max_new_tokens.*context of 20"):
        a_job(models[0], max_model_len=20)
    path = tmp_path / "r.jsonl"
    with no_engine_left(), pytest.raises(ValueError, match="context of 256"):
        sample_to_file(path, a_job(models[0], SamplingSettings(max_new_tokens=254)))
    assert not path.exists() and not Journal(path.with_suffix(".journal"), "").has_batches()


if __name__ == "__main__":
    die_after(int(sys.argv[3]))
    sample_to_file(Path(sys.argv[2]), a_job(sys.argv[1], dtype="float32"))
