"""What would cost the server much is refused early, and what is slow does not hold up the rest."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest
import requests
import torch
from test_serve import MESSAGES, complete, ids_of, scripted_engine, serving, tiny_engine, wait_until
from test_serve_batches import together
from tiny import EOS, tiny_length_value_model, tiny_llama, tiny_tokenizer

import lenvm_rl.serve.app
from lenvm_rl.sandbox.scripted import START, geometric_chain
from lenvm_rl.serve.engine import Engine


@pytest.fixture(scope="module")
def tiny():
    engine = tiny_engine()
    with serving(engine) as client:
        yield engine, client
        assert not engine.jobs and complete(client, temperature=0).choices


def connect(client):
    url = urlsplit(str(client.base_url))
    return socket.create_connection((url.hostname, url.port), timeout=10)


def begin(client, *headers, endpoint="completions"):
    """A connection on which the head of a request has been sent, and nothing of its body."""
    connection = connect(client)
    lines = [f"POST /v1/{endpoint} HTTP/1.1", "Host: here", "Content-Type: application/json", *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


def status_and_error(connection):
    answer = b""
    while b"}}" not in answer:
        part = connection.recv(65536)
        assert part, answer
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


class TestBodies:
    def test_the_limit_grows_with_the_context(self):
        engines = [tiny_engine(), scripted_engine(geometric_chain(0.5))]
        assert [engine.max_body_bytes for engine in engines] == [2**20, 2**22]
        tokenizer = tiny_tokenizer()
        value = tiny_length_value_model(tiny_llama(max_position_embeddings=2**17), tokenizer=tokenizer).freeze()
        large = Engine(tiny_llama(max_position_embeddings=2**17), value, tokenizer, "large")
        assert large.max_body_bytes == 2**23
        for engine in (*engines, large):
            engine.close()

    @pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
    def test_a_body_that_says_that_it_is_too_long_is_not_read(self, tiny, endpoint):
        engine, client = tiny
        with begin(client, f"Content-Length: {engine.max_body_bytes + 1}", endpoint=endpoint) as connection:
            status, error = status_and_error(connection)
        assert status == 413 and error["code"] == "request_too_large" and "shorten" in error["message"]

    def test_a_body_without_a_length_is_read_up_to_the_limit(self, tiny):
        engine, client = tiny
        with begin(client, "Transfer-Encoding: chunked") as connection:
            chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
            for _ in range(engine.max_body_bytes // 2**16 + 1):
                connection.sendall(chunk)
            assert status_and_error(connection)[0] == 413

    def test_just_below_the_limit(self, tiny):
        engine, client = tiny
        body = json.dumps({"model": "tiny", "prompt": "w6", "max_tokens": 2}).encode()
        for size, status in ((engine.max_body_bytes, 200), (engine.max_body_bytes + 1, 413)):
            for data in (body.ljust(size), iter([body.ljust(size)])):
                assert requests.post(f"{client.base_url}completions", data=data, timeout=20).status_code == status

    def test_the_client_is_told(self, tiny):
        _, client = tiny
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(openai.APIStatusError) as caught:
                complete(client, "w6 " * 2_000_000)
            assert caught.value.status_code == 413
        assert time.monotonic() - began < 10 and complete(client, max_tokens=2).choices

    def test_who_leaves_in_the_middle_of_a_body_is_no_failure_of_the_server(self, tiny, monkeypatch):
        engine, client = tiny
        failures, ended, read = [], [], lenvm_rl.serve.app.read_body

        async def noted(*inputs):
            try:
                return await read(*inputs)
            finally:
                ended.append(inputs)

        monkeypatch.setattr("lenvm_rl.serve.app.read_body", noted)
        monkeypatch.setattr("lenvm_rl.serve.app.server_error", failures.append)
        with begin(client, "Content-Length: 1000") as connection:
            connection.sendall(b'{"model":')
        wait_until(lambda: ended, 10)
        assert complete(client, max_tokens=2).choices and not failures and engine._reading == 0


class TestPrompts:
    @pytest.mark.parametrize("chat", [False, True])
    def test_what_cannot_fit(self, tiny, chat):
        _, client = tiny
        with pytest.raises(openai.BadRequestError, match="shorten") as caught:
            if chat:
                messages = [{"role": "user", "content": "w6 " * 9}, {"role": "user", "content": "w6 " * 503}]
                client.chat.completions.create(model="tiny", messages=messages)
            else:
                complete(client, "w6 " * 512)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == ("messages" if chat else "prompt")

    def test_a_prompt_of_ids_that_is_too_long(self, tiny):
        _, client = tiny
        with pytest.raises(openai.BadRequestError, match="prompt") as caught:
            complete(client, [6] * 513)
        assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")

    def test_a_prompt_is_made_into_tokens_once(self, monkeypatch):
        import lenvm_rl.serve.engine as module

        calls, tokenize = [], module.tokenize_prompts
        monkeypatch.setattr(module, "tokenize_prompts", lambda *inputs: calls.append(inputs) or tokenize(*inputs))
        engine = tiny_engine()
        kind, read = type(engine.tokenizer), type(engine.tokenizer).__call__
        monkeypatch.setattr(kind, "__call__", lambda *inputs, **rest: calls.append(inputs) or read(*inputs, **rest))
        with serving(engine) as client:
            complete(client, n=3, max_tokens=2)
            assert len(calls) == 2
            client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
        assert len(calls) == 4

    def test_the_server_answers_while_a_prompt_is_read(self, monkeypatch):
        engine, goes_on = tiny_engine(max_waiting=1), threading.Event()
        tokenize = engine._tokenize
        monkeypatch.setattr(engine, "_tokenize", lambda *asked: goes_on.wait(20) and tokenize(*asked))
        with serving(engine) as client, ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(complete, client, max_tokens=2) for _ in range(2)]
            wait_until(lambda: engine._reading == 2)
            assert client.models.list().data
            # Who is being read has a place in the queue.
            with pytest.raises(openai.RateLimitError, match="1 more requests wait: try again later"):
                complete(client, max_tokens=2)
            goes_on.set()
            assert all(job.result(20).choices for job in jobs)

    def test_the_smaller_context_of_the_two_counts(self):
        tokenizer = tiny_tokenizer()
        value = tiny_length_value_model(tiny_llama(max_position_embeddings=20), tokenizer=tokenizer).freeze()
        with serving(Engine(tiny_llama(), value, tokenizer, "tiny")) as client:
            answer = complete(client, "w6 " * 12, {"strength": -9.0, "top_k": 9}, max_tokens=8, seed=1)
            assert answer.usage.total_tokens == 20
            with pytest.raises(openai.BadRequestError, match="context is 20"):
                complete(client, "w6 " * 13, max_tokens=8)


class TestPadding:
    """A batch is padded with any token: what exists is said by masks."""

    @pytest.mark.parametrize("pad", ["<eos>", None])
    def test_no_pad_token_is_needed(self, pad):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = pad
        value = tiny_length_value_model(tiny_llama(seed=1), tokenizer=tokenizer).freeze()
        engine = Engine(tiny_llama(), value, tokenizer, "tiny")
        # Ids of an end stand in the first prompt as any other token.
        prompts = [[EOS, 7, 8, EOS], [6], [EOS], [9, 10, 11]]
        expected = [
            tiny_llama().generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=9
            )
            for ids in prompts
        ]
        expected = [[row[0, len(ids) :].tolist()] for row, ids in zip(expected, prompts, strict=True)]
        guided = {"guidance": {"strength": -3.0, "top_k": 8}, "temperature": 0, "max_tokens": 9}
        with serving(engine) as client:
            assert [ids_of(complete(client, ids, temperature=0, max_tokens=9)) for ids in prompts] == expected
            alone = [ids_of(complete(client, ids, **guided)) for ids in prompts]
            with together(engine, 4) as (pool, rows):
                jobs = [pool.submit(complete, client, ids, **guided) for ids in prompts]
                assert [ids_of(job.result()) for job in jobs] == alone != expected and rows[0] == 4

    def test_something_has_to_end_a_completion(self):
        tokenizer = tiny_tokenizer()
        value = tiny_length_value_model(tokenizer=tokenizer).freeze()
        tokenizer.eos_token = None
        value.config.tokenizer_fingerprint["eos_token_id"] = None
        policy = tiny_llama()
        policy.generation_config.eos_token_id = None
        with pytest.raises(ValueError, match="eos_token"):
            Engine(policy, value, tokenizer, "tiny")


def test_who_sends_a_request_and_leaves_at_once_is_forgotten():
    engine = scripted_engine(geometric_chain(1e-9, 20))
    body = {"model": "tiny", "prompt": [START], "max_tokens": 50_000}
    with serving(engine) as client:
        for count in range(12):
            data = json.dumps({**body, "stream": count % 2 == 0}).encode()
            with begin(client, f"Content-Length: {len(data)}") as connection:
                connection.sendall(data)
        wait_until(lambda: engine._reading == 0 and not engine.jobs, 10)
        assert complete(client, [START], max_tokens=3).usage.completion_tokens == 3


def test_many_choices_of_many_tokens_are_bounded_by_context_and_server():
    with serving(tiny_engine(max_choices=4)) as client:
        for fields in ({"n": 5}, {"n": 2**40}, {"n": 4, "max_tokens": 2**40}, {"n": 4, "max_tokens": 511}):
            with pytest.raises(openai.BadRequestError) as caught:
                complete(client, "w6 w7", **fields)
            assert caught.value.param == ("prompt" if "max_tokens" in fields else "n")
        assert len(ids_of(complete(client, "w6 w7", n=4, max_tokens=510, guidance={"strength": 90.0}))) == 4
