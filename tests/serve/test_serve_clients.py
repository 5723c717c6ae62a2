"""The server and its clients: several at once, some that leave, one too many; and how the server starts and stops."""

import importlib.util
import math
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from places import ROOT
from test_serve import complete, ids_of, lengths_of, scripted_engine, serving, tiny_engine, wait_until
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.sandbox.scripted import START, geometric_chain
from lenvm_rl.serve.app import ServeArguments, load_engine


@pytest.fixture(scope="module")
def tiny_client():
    with serving(tiny_engine()) as client:
        yield client


@pytest.fixture(scope="module")
def endless():
    """A policy that hardly ever ends: engine and client."""
    engine = scripted_engine(geometric_chain(1e-9, 20), max_waiting=1, max_choices=1)
    with serving(engine) as client:
        yield engine, client


class TestClients:
    def test_pieces_come_while_generation_goes_on(self, endless):
        engine, client = endless
        with complete(client, [START], stream=True, max_tokens=50_000) as stream:
            next(iter(stream))
            assert engine.jobs
        wait_until(lambda: not engine.jobs)

    def test_many_at_once_each_get_their_own(self, tiny_client):
        fields = {"max_tokens": 15, "guidance": {"strength": 0.5, "top_k": 20}}
        jobs = [(f"w{6 + i} w{7 + i}", seed, seed % 2 == 0) for i in range(2) for seed in (1, 2)]

        def ask(job):
            prompt, seed, streams = job
            answer = complete(tiny_client, prompt, seed=seed, stream=streams, **fields)
            return "".join(chunk.choices[0].text for chunk in answer) if streams else answer.choices[0].text

        alone = [ask(job) for job in jobs]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, jobs)) == alone
        assert len(set(alone)) == 4

    def test_who_leaves_a_stream_stops_its_generation(self, endless):
        engine, client = endless
        stream = complete(client, [START], stream=True, max_tokens=50_000)
        next(iter(stream))
        (job,) = engine.jobs
        stream.close()
        wait_until(lambda: not engine.jobs, 5)
        assert 0 < len(job.choices[0].token_ids) < 50_000 and job.choices[0].finish_reason is None
        assert lengths_of(complete(client, [START], max_tokens=3)) == [3]

    def test_who_does_not_wait_for_an_answer_stops_it_too(self, endless):
        engine, client = endless
        with pytest.raises(openai.APITimeoutError):
            complete(client.with_options(timeout=0.3), [START], max_tokens=50_000)
        wait_until(lambda: not engine.jobs, 5)
        assert lengths_of(complete(client, [START], max_tokens=3)) == [3]

    def test_the_queue_is_bounded_and_who_leaves_it_makes_room(self, endless):
        engine, client = endless
        stream = complete(client, [START], stream=True, max_tokens=50_000)
        next(iter(stream))
        with pytest.raises(openai.APITimeoutError):
            complete(client.with_options(timeout=0.3), [START], max_tokens=3)
        wait_until(lambda: len(engine.jobs) == 1)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(complete, client, [START], max_tokens=3)
            wait_until(lambda: len(engine.jobs) == 2)
            for streams in (False, True):
                with pytest.raises(openai.RateLimitError, match="1 more requests wait: try again later"):
                    complete(client, [START], max_tokens=3, stream=streams)
            assert not waiting.done()
            stream.close()
            assert lengths_of(waiting.result(10)) == [3]

    def test_a_generation_that_fails_is_told_and_the_server_goes_on(self):
        engine = scripted_engine(geometric_chain(0.5))
        engine.decoder.length_value_model.table.weight[START + 1] = math.nan
        with serving(engine) as client:
            for _ in range(2):
                with pytest.raises(openai.InternalServerError, match="gave NaN or infinity"):
                    complete(client, [START], {"strength": 1.0})
                with pytest.raises(openai.APIError, match="gave NaN or infinity"):
                    list(complete(client, [START], {"strength": 1.0}, stream=True))
                assert complete(client, [START]).choices[0].finish_reason == "stop"

    def test_a_failure_that_nobody_foresaw_ends_its_connection_and_says_so(self, monkeypatch):
        """The server drops that connection, so a client that kept it would lose its next request."""
        engine = scripted_engine(geometric_chain(0.5))
        monkeypatch.setattr(engine, "_tokenize", lambda *asked: 1 / 0)
        with serving(engine) as client:
            for _ in range(2):
                with pytest.raises(openai.InternalServerError, match="ZeroDivisionError") as error:
                    complete(client, [START])
                assert error.value.response.headers["connection"] == "close"

    def test_stopping_the_server_tells_who_waits(self):
        engine = scripted_engine(geometric_chain(1e-9, 20), max_choices=1)
        with ThreadPoolExecutor(2) as pool, serving(engine) as client:
            stream = complete(client, [START], stream=True, max_tokens=50_000)
            next(iter(stream))
            waiting = pool.submit(complete, client, [START], max_tokens=3)
            wait_until(lambda: len(engine.jobs) == 2)
            engine.close()
            with pytest.raises(openai.APIError, match="stopped: try again later"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="stopped: try again later"):
                waiting.result(10)


def test_the_models_of_a_folder_are_served(tmp_path):
    arguments = saved(tmp_path)
    engine = load_engine(arguments)
    assert engine.context == 512 and engine.decoder.length_value_model.frozen
    with serving(engine) as client:
        expected = tiny_llama().generate(torch.tensor([[6, 7, 8]]), do_sample=False, max_new_tokens=10)[0, 3:].tolist()
        answer = client.completions.create(
            model=arguments.model,
            prompt="w6 w7 w8",
            temperature=0,
            max_tokens=10,
            extra_body={"return_token_ids": True},
        )
        assert ids_of(answer) == [expected]


def saved(folder):
    tokenizer = tiny_tokenizer(chat=True)
    tiny_llama().save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    tiny_length_value_model(tokenizer=tokenizer).save_pretrained(folder / "value")
    return ServeArguments(str(folder / "policy"), str(folder / "value"))


@pytest.mark.slow
def test_the_program(tmp_path):
    """`python -m lenvm_rl.serve` serves until it is interrupted."""
    arguments = saved(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lenvm_rl.serve", "--model", arguments.model]
    command += [
        "--length_value_model",
        arguments.length_value_model,
        "--port",
        str(port),
        "--served_model_name",
        "tiny",
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def answers():
            assert process.poll() is None
            try:
                return client.models.list()
            except openai.APIConnectionError:
                return False

        wait_until(answers, 120)
        answer = complete(client, guidance={"mode": "at_most", "target_length": 4, "enforce": True}, max_tokens=20, n=8)
        assert max(lengths_of(answer)) <= 4
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, -signal.SIGINT)


def test_without_fastapi_the_import_says_what_to_install(monkeypatch):
    import lenvm_rl.serve.app

    monkeypatch.setitem(sys.modules, "fastapi", None)
    spec = importlib.util.spec_from_file_location("app_again", lenvm_rl.serve.app.__file__)
    with pytest.raises(ImportError, match=r"pip install 'lenvm-rl\[serving\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
