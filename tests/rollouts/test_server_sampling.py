"""Rollouts from servers: ids as sampled, text's ids made again and checked, nothing lost and nothing twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from places import PATHS, ROOT
from scripted_server import openai_answer, sampled, scripted_server, text_answer, vllm_answer
from tiny import EOS, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig

from lenvm_rl.rollouts import server as server_module
from lenvm_rl.rollouts.job import SamplingSettings, sample_rollouts, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import find_problem, read_rollouts, rejected_path
from lenvm_rl.rollouts.server import ServerError, ServerJob, connect

PROMPTS = ["w6 w7 w8 w9 w10 w11", "w12", "w20 w21 w22"]
SETTINGS = SamplingSettings(num_samples=4, max_new_tokens=8, batch_size=3)
QUICK = {"timeout": 2.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_DELAY", 0.05)


def job_of(kind, url="http://host/v1", tokenizer=None, settings=SETTINGS, prompts=PROMPTS, **others):
    others = {"seed": 1, "retokenize": kind in ("openai", "transformers"), **others}
    return ServerJob(connect(kind, url, "m", **QUICK), tokenizer or tiny_tokenizer(), prompts, settings, **others)


def sample(path, server, kind="vllm", **changes):
    arguments = {"seed": 1, "retokenize": kind in ("openai", "transformers"), **changes}
    settings = arguments.pop("settings", SETTINGS)
    client = connect(kind, server.url, "m", **QUICK)
    return sample_to_file(path, ServerJob(client, tiny_tokenizer(), PROMPTS, settings, **arguments))


def expected_records(job, most):
    """What the scripted model samples of each completion, as records without further columns."""
    records = []
    for number in range(len(job)):
        prompt = job.prompt_of(number)
        ids = sampled(job.requested[prompt], job.seed_of(number), most)[: SETTINGS.max_new_tokens]
        records.append(job.record(number, ids, "stop" if ids[-1] == EOS else "length"))
    return records


def fails_often(number, times):
    """Each request fails twice before it is served, in all ways that pass."""
    return None if times >= 2 else [(500, {}), "half", "garbage", (429, {"Retry-After": "0"})][number % 4]


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_records_are_what_was_sampled_whatever_fails(tmp_path, kind):
    answer, most = (vllm_answer, 8) if kind == "vllm" else (text_answer, 9)
    with scripted_server(answer, fails_often) as server:
        dataset, metadata = sample(tmp_path / "r.jsonl", server, kind, extra_columns={"answer": ["a", "b", "c"]})
    expected = expected_records(job_of(kind, extra_columns={"answer": ["a", "b", "c"]}), most)
    names = list(expected[0])
    assert dataset.select_columns(names).to_list() == expected
    assert {record["finish_reason"] for record in expected} == {"stop", "length"}
    assert all(find_problem(record, 64, [EOS]) is None for record in expected)
    # Samples of one prompt differ: each request has a seed of its own (two may both be the end alone).
    assert len({tuple(record["completion_ids"]) for record in expected}) >= 10
    assert metadata.truncated_share == sum(record["finish_reason"] == "length" for record in expected) / 12
    assert metadata.generator == "m" and metadata.seed == 1 and metadata.sampling["set_aside"] == 0
    assert metadata.sampling["token_ids"] == ("sampled" if kind == "vllm" else "retokenized")
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "r.metadata.json"]
    if kind == "openai":
        assert dataset["length_error"][:] == [0] * 12 and not any(dataset["text_changed"][:])
        report = {"completions": 12, "unchecked": 0, "wrong_length": 0, "mean_length_error": 0.0, "changed_text": 0}
        assert metadata.sampling["retokenization"] == report


def test_requests_under_way_are_bounded_and_do_not_change_the_records(tmp_path):
    with scripted_server(delay=0.02) as server:
        together, _ = sample(tmp_path / "a.jsonl", server, settings=SamplingSettings(4, 8, 5))
        assert 2 <= server.most_under_way <= 5
        alone, metadata = sample(tmp_path / "b.jsonl", server, settings=SamplingSettings(4, 8, 1))
    assert together.to_list() == alone.to_list()
    assert "batch_size" not in metadata.sampling


def test_what_a_failing_server_answered_before_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    with (
        scripted_server(script=lambda number, times: (400, {}) if number >= 7 else None) as server,
        pytest.raises(ServerError, match="status 400") as caught,
    ):
        sample(path, server, settings=SamplingSettings(4, 8, 1))
    assert caught.value.__notes__ == ["This was for a completion of prompt 1."]
    assert path.with_suffix(".journal").read_bytes().count(b"\n") == 8
    with scripted_server() as server:
        # The address and the number of requests under way may change, the seed may not.
        with pytest.raises(ValueError, match="begun with other"):
            sample(path, server, seed=2)
        dataset, _ = sample(path, server)
        assert len(server.requests) == 5
        assert sample(path, server)[0].to_list() == dataset.to_list()
        assert len(server.requests) == 5
        with pytest.raises(ValueError, match="r.jsonl"):
            sample(path, server, seed=2)
    assert dataset.to_list() == expected_records(job_of("vllm"), 8)


KILLED = """
import sys

sys.path[:0] = {paths!r}
from test_server_sampling import PROMPTS, SETTINGS, ServerJob, connect, sample_to_file, tiny_tokenizer
job = ServerJob(connect("vllm", {url!r}, "m"), tiny_tokenizer(), PROMPTS, SETTINGS, seed=1)
sample_to_file({path!r}, job)
"""


def test_a_killed_run_ends_with_the_records_of_an_unbroken_one(tmp_path):
    path = tmp_path / "r.jsonl"
    journal = path.with_suffix(".journal")
    gate = threading.Event()

    def answers_seven_until_the_kill(request):
        if len(server.requests) > 7:
            gate.wait(60)
        return vllm_answer(request)

    with scripted_server(answers_seven_until_the_kill) as server:
        code = KILLED.format(paths=PATHS, path=str(path), url=server.url)
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        gate.set()
        assert not path.exists()
        kept = journal.read_bytes().count(b"\n") - 1
        asked = len(server.requests)
        dataset, _ = sample(path, server)
        assert 3 <= kept <= 7 and len(server.requests) - asked == 12 - kept
    assert dataset.to_list() == expected_records(job_of("vllm"), 8)
    assert read_rollouts(path)[0].to_list() == dataset.to_list()


def test_a_kill_between_the_last_two_steps_leaves_a_complete_file(tmp_path):
    path = tmp_path / "r.jsonl"
    with scripted_server() as server:
        dataset, _ = sample(path, server)
        path.with_suffix(".journal").write_bytes(b'{"job": "whatever"}\n')
        assert sample(path, server)[0].to_list() == dataset.to_list()
        assert len(server.requests) == 12
    assert not path.with_suffix(".journal").exists()


def test_a_text_of_other_tokens_is_kept_counted_and_marked(tmp_path):
    def skips_a_special_token(request):
        answer = text_answer(request)
        # As if the second token had been a special one: sampled and counted, but left out of the text.
        choice = answer["choices"][0]
        words = choice["text"].split()
        choice["text"] = " ".join(words[:1] + words[2:])
        return answer

    with scripted_server(skips_a_special_token) as server:
        dataset, metadata = sample(tmp_path / "r.jsonl", server, "openai")
    report = metadata.sampling["retokenization"]
    assert report["wrong_length"] == sum(error != 0 for error in dataset["length_error"][:]) > 0
    for row in dataset.to_list():
        words = row["completion_text"].split()
        assert row["completion_ids"][: len(words)] == [int(word[1:]) for word in words[:8]]


def test_a_completion_without_tokens_is_set_aside_not_lost(tmp_path):
    def silent_at_first(request):
        if request["prompt"] == PROMPTS[1]:
            answer = openai_answer([3] * 9, 1)
            assert answer["choices"][0]["text"] == "" and answer["choices"][0]["finish_reason"] == "length"
            return answer
        return text_answer(request)

    path = tmp_path / "r.jsonl"
    with scripted_server(silent_at_first) as server:
        dataset, metadata = sample(path, server, "openai")
    assert len(dataset) == 8 and metadata.sampling["set_aside"] == 4
    rejected = [json.loads(line) for line in rejected_path(path).read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == [5, 6, 7, 8]
    assert {entry["reason"] for entry in rejected} == {"completion_ids is empty"}


def from_text(text, reason, counted, limit=4, **options):
    job = job_of("openai", settings=SamplingSettings(1, limit, 1), **options)
    answer = openai_answer([7], 1)
    answer["choices"][0].update(text=text, finish_reason=reason)
    answer["usage"]["completion_tokens"] = counted
    ids, finish_reason, columns = job._from_text(server_module._read(answer))
    return ids, finish_reason, columns["length_error"]


def test_an_end_at_the_last_token_is_told_from_a_cut():
    """One token more than allowed is asked for: counted 5 at a limit of 4 is a cut, however the fifth reads."""
    assert from_text("w7 w8 w9", "stop", 4) == ([7, 8, 9, EOS], "stop", 0)
    assert from_text("w7 w8 w9", "stop", 5) == ([7, 8, 9], "length", -1)
    assert from_text("w7 w8 w9 w10", "stop", 5) == ([7, 8, 9, 10], "length", 0)
    # The end one too late, which transformers serve calls a cut, looks like a special token that was left out.
    assert from_text("w7 w8 w9 w10", "length", 5) == ([7, 8, 9, 10], "length", -1)
    assert from_text("w7 w8 w9 w10 w11", "length", 5) == ([7, 8, 9, 10], "length", 0)
    assert from_text("w7 w8 w9 w10 w11 w12", "length", 5) == ([7, 8, 9, 10], "length", 1)
    assert from_text("w7 w8", "stop", 4) == ([7, 8, EOS], "stop", -1)
    assert from_text("", "stop", 1) == ([EOS], "stop", 0)
    # The end is one of those that were asked for: the tokenizer's own where it is.
    assert from_text("w7 w8", "stop", 3, eos_token_ids=[9, EOS]) == ([7, 8, EOS], "stop", 0)
    assert from_text("w7 w8", "stop", 3, eos_token_ids=[9]) == ([7, 8, 9], "stop", 0)


def test_a_completion_that_the_servers_context_cut_is_refused():
    with pytest.raises(ServerError, match="max_new_tokens"):
        from_text("w7 w8 w9", "length", 3)
    with pytest.raises(ServerError, match="usage"):
        from_text("w7 w8 w9", "length", None)


def test_ids_end_where_one_of_the_ends_is_or_the_server_says_why():
    job = job_of("vllm", eos_token_ids=[EOS, 9], settings=SamplingSettings(1, 4, 1))

    def from_ids(ids, **choice):
        answer = openai_answer([7] * len(ids or [7]), 6, token_ids=ids, **choice)
        record = job._record(0, server_module._read(answer))
        return record["completion_ids"], record["finish_reason"]

    assert from_ids([7, 8, 9]) == ([7, 8, 9], "stop")
    assert from_ids([7, 8, 6, 6]) == ([7, 8, 6, 6], "length")
    with pytest.raises(ValueError, match="2 of 4 tokens"):
        from_ids([7, 8], stop_reason=33)
    with pytest.raises(ServerError, match="token ids"):
        from_ids(None)


def test_text_instead_of_ids_has_to_be_asked_for():
    with pytest.raises(ValueError, match="retokenize"):
        job_of("transformers", retokenize=False)


def test_another_tokenizer_than_the_servers_is_noticed(tmp_path):
    def adds_a_token(request):
        return openai_answer([7, EOS], len(request["prompt"]) + 1, token_ids=[7, EOS])

    with scripted_server(adds_a_token) as server, pytest.raises(ValueError, match="7 tokens in prompt 0"):
        sample(tmp_path / "r.jsonl", server, settings=SamplingSettings(1, 8, 1))


def test_messages_are_sent_as_the_ids_or_the_text_of_the_chat_template():
    tokenizer = tiny_tokenizer(chat=True)
    messages = [{"role": "user", "content": "w6 w7"}]
    ids = tokenizer.convert_tokens_to_ids(["<|user|>", "w6", "w7", "<|assistant|>"])
    assert job_of("vllm", tokenizer=tokenizer, prompts=[messages]).requested == [ids]
    assert job_of("openai", tokenizer=tokenizer, prompts=[messages]).requested == ["<|user|> w6 w7 <|assistant|>"]


def with_bos(tokenizer, template):
    """The tokenizer adds `<|system|>` as beginning of sequence, and so does the chat template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 5)]
    )
    tokenizer.chat_template = template + tokenizer.chat_template
    return tokenizer


def test_a_server_of_text_is_not_made_to_begin_twice():
    messages = [{"role": "user", "content": "w6"}]
    tokenizer = with_bos(tiny_tokenizer(chat=True), "<|system|>")
    job = job_of("openai", tokenizer=tokenizer, prompts=[messages])
    assert job.prompt_ids == [[5, 3, 6, 4]] and job.requested == ["<|user|> w6 <|assistant|>"]
    tokenizer = with_bos(tiny_tokenizer(chat=True), "")
    with pytest.raises(ValueError, match="Prompt 0"):
        job_of("openai", tokenizer=tokenizer, prompts=[messages])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["w6", ""]}, "Prompt 1 has no tokens"),
        ({"extra_columns": {"a": [1]}}, "'a' has 1 entries for 3 prompts"),
        ({"extra_columns": {"group": [1, 2, 3]}}, "'group'.*rename or remove"),
    ],
)
def test_bad_jobs_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        job_of("vllm", **changes)


@pytest.fixture(scope="module")
def transformers_server(tmp_path_factory):
    """`transformers serve` with a tiny random policy on localhost: (policy, folder, address)."""
    folder = str(tmp_path_factory.mktemp("policy"))
    policy = tiny_llama(initializer_range=0.02, seed=2)
    policy.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", folder, "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu", "--dtype", "float32"], cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield policy, folder, f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_a_real_server_gives_the_tokens_of_a_local_run(transformers_server, tmp_path):
    """With the same seeds, one request at a time: what `generate` samples here, token for token."""
    policy, folder, url = transformers_server
    tokenizer, settings = tiny_tokenizer(), SamplingSettings(8, 12, 1)
    client = connect("transformers", url, folder)
    job = ServerJob(client, tokenizer, PROMPTS, settings, seed=1, retokenize=True)
    dataset, metadata = sample_to_file(tmp_path / "r.jsonl", job, "tiny")
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=13, eos_token_id=[EOS], pad_token_id=0)
    wrong = 0
    for number, row in enumerate(dataset.to_list()):
        torch.manual_seed(job.seed_of(number))
        prompt = torch.tensor([row["prompt_ids"]])
        ids = policy.generate(prompt, generation_config=config)[0, prompt.shape[1] :].tolist()
        wanted = (ids, "stop") if ids[-1] == EOS and len(ids) <= 12 else (ids[:12], "length")
        # Special tokens are not in the server's text: then the count does not agree, and the record says so.
        missing = sum(token < 6 for token in (ids[:-1] if wanted[1] == "stop" else ids))
        assert row["length_error"] == -missing and row["finish_reason"] == wanted[1]
        assert missing or row["completion_ids"] == wanted[0]
        wrong += missing > 0
    assert 0 < wrong < 24 and metadata.sampling["retokenization"]["wrong_length"] == wrong


@pytest.mark.slow
def test_a_real_server_under_many_requests_gives_each_its_own_completion(transformers_server, tmp_path):
    """Greedy decoding needs no seeds, so concurrent requests must give exactly the local completions."""
    policy, folder, url = transformers_server
    tokenizer, settings = tiny_tokenizer(), SamplingSettings(1, 12, 4, temperature=0.0)
    prompts = [f"w{i} w{i + 1}" for i in range(6, 30)]
    client = connect("transformers", url, folder)
    job = ServerJob(client, tokenizer, prompts, settings, seed=1, retokenize=True)
    dataset, _ = sample_to_file(tmp_path / "r.jsonl", job)
    local = sample_rollouts(
        TransformersJob(policy, tokenizer, prompts, SamplingSettings(1, 12, 1, temperature=0.0), seed=1)
    )
    exact = 0
    for ours, theirs in zip(dataset.to_list(), local, strict=True):
        if all(token >= 6 or token == EOS for token in theirs["completion_ids"]):
            assert ours["completion_ids"] == theirs["completion_ids"]
            assert ours["finish_reason"] == theirs["finish_reason"]
            exact += 1
    assert exact >= 12
