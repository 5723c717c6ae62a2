"""Sampling: tokens as the policy chose them, ends and cuts told apart, only the given settings, the same every time."""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from places import PATHS, ROOT
from tiny import EOS, tiny_length_value_model, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lenvm_rl.endings import end_token_ids
from lenvm_rl.prediction import predict_length, weights_fingerprint
from lenvm_rl.rollouts import job as jobs
from lenvm_rl.rollouts import local as sampling
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import find_problem, read_rollouts, write_rollouts
from lenvm_rl.tokenization import load_prompts

PROMPTS = ["w6 w7 w8 w9 w10 w11", "w12", "w20 w21 w22", "w30 w31 w32 w33"]


def sample_rollouts(model, tokenizer, prompts, seed, extra_columns=None, length_value_model=None, **settings):
    own = extra_columns, length_value_model
    return jobs.sample_rollouts(TransformersJob(model, tokenizer, prompts, SamplingSettings(**settings), seed, *own))


def sample_to_file(path, *policy, **options):
    return jobs.sample_to_file(path, TransformersJob(*policy, **options))


@pytest.fixture
def policy():
    # Nearly uniform: every token has a chance of about 1/64, EOS too.
    return tiny_llama(initializer_range=0.02), tiny_tokenizer()


def sample(policy, **changes):
    settings = {"num_samples": 4, "max_new_tokens": 40, "batch_size": 5, "seed": 1, **changes}
    return sample_rollouts(*policy, PROMPTS, **settings)


def test_records_are_valid_ordered_and_carry_extra_columns(policy):
    records = sample(policy, extra_columns={"answer": ["a", "b", "c", "d"]})
    assert [record["group"] for record in records] == [group for group in range(4) for _ in range(4)]
    assert {record["finish_reason"] for record in records} == {"stop", "length"}
    for record in records:
        assert find_problem(record, vocab_size=64, eos_token_ids=[EOS]) is None
        assert record["prompt"] == PROMPTS[record["group"]]
        assert record["prompt_ids"] == policy[1](record["prompt"])["input_ids"]
        assert record["answer"] == "abcd"[record["group"]]
        assert len(record["completion_ids"]) == 40 or record["finish_reason"] == "stop"


def test_the_seed_decides_and_the_global_random_state_is_left_alone(policy):
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    first = sample(policy)
    assert torch.rand(1) == expected_draw
    assert sample(policy) == first
    assert sample(policy, seed=2) != first
    # Samples of one prompt differ, also across batches.
    assert len({tuple(record["completion_ids"]) for record in first}) == len(first)


def test_settings_of_the_generation_config_do_not_leak(policy):
    expected = sample(policy)
    leaky = GenerationConfig(
        repetition_penalty=9.0, top_k=1, min_p=0.5, suppress_tokens=[7], max_length=3, eos_token_id=EOS
    )
    policy[0].generation_config = leaky
    policy[0].train()
    assert sample(policy) == expected
    assert policy[0].generation_config is leaky
    assert policy[0].training


def test_samples_follow_the_policy_over_the_whole_vocabulary(policy):
    model, tokenizer = policy
    records = sample_rollouts(
        model, tokenizer, PROMPTS[:1], num_samples=6400, max_new_tokens=1, batch_size=1600, seed=0, temperature=2.0
    )
    counts = torch.bincount(torch.tensor([record["completion_ids"][0] for record in records]), minlength=64)
    with torch.no_grad():
        logits = model(torch.tensor([records[0]["prompt_ids"]])).logits[0, -1]
    # A standard deviation of a cell is about 10 counts; a default top-k of 50 would leave 14 cells at 0.
    assert (counts - 6400 * torch.softmax(logits / 2.0, 0)).abs().max() < 50


def test_batching_and_left_padding_do_not_change_greedy_completions():
    policy = tiny_llama(), tiny_tokenizer()
    together = sample(policy, num_samples=1, temperature=0.0, batch_size=4)
    alone = sample(policy, num_samples=1, temperature=0.0, batch_size=1)
    assert together == alone
    assert len({tuple(record["completion_ids"]) for record in together}) > 1


def test_prompts_of_similar_length_share_a_batch(policy):
    sampler = TransformersJob(*policy, PROMPTS, SamplingSettings(2, 8, 3), seed=0)
    # Numbers 2 and 3 are the samples of prompt 1.
    assert sampler.plan() == [[2, 3, 4], [5, 6, 7], [0, 1]]


@pytest.fixture
def predictor():
    return tiny_length_value_model(tokenizer=tiny_tokenizer())


def test_rollouts_say_what_they_depend_on(policy, tmp_path):
    """Another precision, or other weights under the same name, make another job: its file is refused, not taken."""
    settings = SamplingSettings(4, 40, 5)
    _, metadata = jobs.sample_to_file(tmp_path / "r.jsonl", TransformersJob(*policy, PROMPTS, settings, 1))
    about = metadata.sampling
    assert about.pop("plan") and about.pop("weights") == weights_fingerprint(policy[0])
    assert about == {
        **{"num_samples": 4, "max_new_tokens": 40, "batch_size": 5, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
        **{"backend": "transformers", "dtype": "float32", "set_aside": 0},
    }
    rounded, other = copy.deepcopy(policy[0]).to(torch.bfloat16), tiny_llama(initializer_range=0.02, seed=1)
    for model, named in ((rounded, "dtype float32, now bfloat16"), (other, "weights")):
        with pytest.raises(ValueError, match=named):
            jobs.sample_to_file(tmp_path / "r.jsonl", TransformersJob(model, policy[1], PROMPTS, settings, 1))


def test_rollouts_in_two_formats_do_not_take_each_others_metadata(policy, tmp_path):
    job, other = (TransformersJob(*policy, PROMPTS, SamplingSettings(1, 8, 4), seed) for seed in (0, 1))
    rollouts, metadata = jobs.sample_to_file(tmp_path / "r.jsonl", job)
    for write in (jobs.sample_to_file, lambda path, job: write_rollouts(path, rollouts, job.metadata("policy"))):
        with pytest.raises(ValueError, match="r.jsonl"):
            write(tmp_path / "r.parquet", other)
    assert write_rollouts(tmp_path / "r.parquet", rollouts, metadata) == metadata


def test_ids_may_leave_gaps(policy, tmp_path):
    """Fifty-nine tokens, the last of them number 63: what is sampled of the last is in the vocabulary."""
    words = {token: index for token, index in policy[1].get_vocab().items() if index not in range(56, 61)}
    core = Tokenizer(models.WordLevel(words, unk_token="w6"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    gaps = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    assert len(gaps.get_vocab()) == 59
    records = TransformersJob(policy[0], gaps, PROMPTS, SamplingSettings(8, 40, 5), 0)
    rollouts, metadata = jobs.sample_to_file(tmp_path / "r.jsonl", records)
    assert max(max(ids) for ids in rollouts["completion_ids"]) > 59 and metadata.sampling["set_aside"] == 0


def test_prompts_of_similar_predicted_length_share_a_batch(policy, predictor):
    predicted = predict_length(predictor, policy[1], PROMPTS).tolist()
    order = sorted(range(4), key=lambda index: -predicted[index])
    assert len(set(predicted)) == 4 and order not in ([1, 2, 3, 0], [0, 3, 2, 1])
    sampler = TransformersJob(*policy, PROMPTS, SamplingSettings(2, 8, 3), 0, length_value_model=predictor)
    numbers = [2 * prompt + sample for prompt in order for sample in range(2)]
    assert sampler.plan() == [numbers[:3], numbers[3:6], numbers[6:]]
    assert sampler.step_sizes() == [3, 3, 2]


def test_records_stay_in_the_order_of_the_prompts(policy, predictor):
    records = sample(policy, length_value_model=predictor)
    assert [record["group"] for record in records] == [group for group in range(4) for _ in range(4)]
    assert all(record["prompt"] == PROMPTS[record["group"]] for record in records)
    assert records == sample(policy, length_value_model=predictor) != sample(policy)
    # What is greedy does not depend on the batches.
    greedy = {"num_samples": 1, "temperature": 0.0, "batch_size": 3}
    policy = tiny_llama(), tiny_tokenizer()
    assert sample(policy, length_value_model=predictor, **greedy) == sample(policy, **greedy)


def test_a_length_value_model_for_other_tokens_is_refused(policy, predictor):
    with pytest.raises(ValueError, match="tokenizers"):
        sample(policy, length_value_model=tiny_length_value_model(tokenizer=tiny_tokenizer(60)))
    with pytest.raises(ValueError, match="training mode"):
        sample(policy, length_value_model=predictor.train())


def test_a_job_goes_on_with_the_predictions_that_it_was_begun_with(policy, predictor, tmp_path, monkeypatch):
    settings = SamplingSettings(num_samples=4, max_new_tokens=40, batch_size=5)
    path = tmp_path / "r.jsonl"
    whole = sample(policy, length_value_model=predictor)
    original = TransformersJob._sample_batch

    def killed(self, index, batch):
        if index == 2:
            raise KeyboardInterrupt
        return original(self, index, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersJob, "_sample_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            sample_to_file(path, *policy, PROMPTS, settings, seed=1, length_value_model=predictor)
    # Other batches, and batches by another model, are other jobs.
    other = tiny_length_value_model(seed=1, tokenizer=policy[1])
    for wrong in (None, other):
        with pytest.raises(ValueError, match="r.journal"):
            sample_to_file(path, *policy, PROMPTS, settings, seed=1, length_value_model=wrong)

    def other_by_rounding(*args):
        raise AssertionError("predicted again: the plan could change by the last bit of a prediction")

    monkeypatch.setattr(sampling, "boundary_logits", other_by_rounding)
    dataset, metadata = sample_to_file(path, *policy, PROMPTS, settings, seed=1, length_value_model=predictor)
    assert dataset.to_list() == whole
    assert metadata.sampling["length_value_model"] == weights_fingerprint(predictor)
    assert metadata.sampling["batches_by"] == "predicted length"
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "r.metadata.json"]
    # The finished file is read; nothing is predicted for that.
    again = sample_to_file(path, *policy, PROMPTS, settings, seed=1, length_value_model=predictor)[0]
    assert again.to_list() == whole
    with pytest.raises(ValueError, match="r.jsonl"):
        sample_to_file(path, *policy, PROMPTS, settings, seed=1, length_value_model=other)


def test_messages_go_through_the_chat_template(policy):
    tokenizer = tiny_tokenizer(chat=True)
    prompt = [{"role": "user", "content": "w6"}]
    (record,) = sample_rollouts(policy[0], tokenizer, [prompt], num_samples=1, max_new_tokens=4, batch_size=1, seed=0)
    assert record["prompt"] == prompt
    assert tokenizer.convert_ids_to_tokens(record["prompt_ids"]) == ["<|user|>", "w6", "<|assistant|>"]


def test_every_end_of_sequence_id_of_the_model_ends_a_completion(policy):
    model, tokenizer = policy
    model.generation_config.eos_token_id = [9, 4]
    assert end_token_ids(tokenizer, model.generation_config) == [EOS, 4, 9]
    ends = {
        record["completion_ids"][-1] for record in sample(policy, num_samples=40) if record["finish_reason"] == "stop"
    }
    assert ends == {EOS, 4, 9}
    # As Qwen's instruct models have it: the pad token is one of the model's further ends, not the tokenizer's.
    model.generation_config.eos_token_id = [EOS, tokenizer.pad_token_id]
    for record in sample(policy, num_samples=40):
        stop = [token in (EOS, tokenizer.pad_token_id) for token in record["completion_ids"]]
        assert not any(stop[:-1]) and stop[-1] == (record["finish_reason"] == "stop")


@pytest.mark.parametrize("name", ["group", "completion_ids", "finish_reason"])
def test_columns_that_would_overwrite_a_rollout_are_refused(policy, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        sample(policy, extra_columns={name: [1, 2]})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"temperature": 0.0}, "equal completions"),
        ({"max_new_tokens": 507}, "Prompt 0 has 6 tokens.*context of 512"),
        ({"extra_columns": {"answer": [1]}}, "'answer' has 1 entries for 4 prompts"),
    ],
)
def test_bad_settings_are_refused(policy, change, problem):
    with pytest.raises(ValueError, match=problem):
        sample(policy, **change)


def test_bad_prompts_and_tokenizers_are_refused(policy):
    model, tokenizer = policy
    settings = {"num_samples": 1, "max_new_tokens": 4, "batch_size": 1, "seed": 0}
    with pytest.raises(ValueError, match="no prompt"):
        sample_rollouts(model, tokenizer, [], **settings)
    with pytest.raises(ValueError, match="Prompt 1 "):
        sample_rollouts(model, tokenizer, ["w6", ""], **settings)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token"):
        sample_rollouts(model, tokenizer, ["w6"], **settings)


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_a_tokenizer_that_pads_with_its_end_or_not_at_all_samples_the_same(policy, pad):
    expected = [record["completion_ids"] for record in sample(policy)]
    policy[1].pad_token = pad
    assert [record["completion_ids"] for record in sample(policy)] == expected


def test_a_file_is_sampled_once_and_goes_on_from_its_journal(policy, tmp_path, monkeypatch):
    settings = SamplingSettings(num_samples=4, max_new_tokens=40, batch_size=5)
    path = tmp_path / "r.jsonl"
    whole = sample(policy)

    calls = []
    original = TransformersJob._sample_batch

    def counted(self, index, batch):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(index)
        return original(self, index, batch)

    monkeypatch.setattr(TransformersJob, "_sample_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        sample_to_file(path, *policy, PROMPTS, settings, seed=1)
    journal = path.with_suffix(".journal")
    assert not path.exists()
    # What a kill in the middle of a write leaves behind:
    journal.write_bytes(journal.read_bytes() + b'{"batch": 2, "rec')
    with pytest.raises(ValueError, match="r.journal"):
        sample_to_file(path, *policy, PROMPTS, settings, seed=2)

    calls.clear()
    monkeypatch.setattr(TransformersJob, "_sample_batch", lambda *a: calls.append(a[1]) or original(*a))
    dataset, metadata = sample_to_file(path, *policy, PROMPTS, settings, seed=1)
    assert calls == [2, 3]
    assert dataset.to_list() == whole
    assert metadata.truncated_share == sum(record["finish_reason"] == "length" for record in whole) / 16
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "r.metadata.json"]

    calls.clear()
    assert sample_to_file(path, *policy, PROMPTS, settings, seed=1)[0].to_list() == whole
    assert calls == []
    with pytest.raises(ValueError, match="r.jsonl"):
        sample_to_file(path, *policy, PROMPTS, settings, seed=2)


KILLED = """
import sys, time

sys.path[:0] = {paths!r}
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from lenvm_rl.rollouts.job import SamplingSettings, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
original = TransformersJob._sample_batch
TransformersJob._sample_batch = lambda *a: (time.sleep(0.2), original(*a))[1]
policy = tiny_llama(initializer_range=0.02), tiny_tokenizer()
predictor = tiny_length_value_model(tokenizer=policy[1]) if {predicted} else None
job = TransformersJob(*policy, {prompts!r}, SamplingSettings(4, 40, 1), seed=1, length_value_model=predictor)
sample_to_file({path!r}, job)
"""


@pytest.mark.parametrize("predicted", [False, True])
def test_a_killed_run_ends_with_the_records_of_an_unbroken_one(policy, predictor, tmp_path, predicted):
    path = tmp_path / "r.jsonl"
    journal = path.with_suffix(".journal")
    code = KILLED.format(paths=PATHS, path=str(path), prompts=PROMPTS, predicted=predicted)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not path.exists()
    option = {"length_value_model": predictor if predicted else None}
    dataset, _ = sample_to_file(path, *policy, PROMPTS, SamplingSettings(4, 40, 1), seed=1, **option)
    assert dataset.to_list() == sample(policy, batch_size=1, **option)
    assert read_rollouts(path)[0].to_list() == dataset.to_list()


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
def test_prompts_are_loaded_from_a_local_file(tmp_path, name):
    from datasets import Dataset

    rows = [{"prompt": "a\u2028b", "answer": 1}, {"prompt": "c", "answer": 2}]
    dataset = Dataset.from_list(rows)
    path = str(tmp_path / name)
    if name.endswith(".parquet"):
        dataset.to_parquet(path)
    else:
        dataset.to_json(path, lines=name.endswith("l"), force_ascii=False)
    assert load_prompts(path).to_list() == rows
    assert load_prompts(path, limit=1).to_list() == rows[:1]
    with pytest.raises(ValueError, match="no rows"):
        load_prompts(path, limit=0)
    with pytest.raises(FileNotFoundError, match="There is no data file"):
        load_prompts(str(tmp_path / "q.jsonl"))
