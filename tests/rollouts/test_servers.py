"""Clients of servers: failures that pass are outlasted, others are told; each kind is asked in its own words."""

import json
import threading
import time

import pytest
from scripted_server import sampled, scripted_server, text_answer, vllm_answer
from tiny import EOS

from lenvm_rl.rollouts.local import SamplingSettings
from lenvm_rl.rollouts.server import SERVERS, ServerError, TemporaryServerError, connect

SETTINGS = SamplingSettings(num_samples=1, max_new_tokens=40, batch_size=1)
QUICK = {"first_delay": 0.01, "longest_delay": 0.05, "timeout": 1.0}


def ask(client, prompt=(7, 8), seed=5, settings=SETTINGS):
    return client.request(list(prompt), settings, settings.max_new_tokens, seed, [EOS])


@pytest.mark.parametrize(
    "failure", [(500, {}), (503, {}), (429, {"Retry-After": "0"}), (408, {}), "hang", "half", "garbage", "abort"]
)
def test_a_failure_that_passes_is_outlasted(failure):
    with scripted_server(script=lambda number, times: failure if number < 2 else None) as server:
        answer = connect("vllm", server.url, "m", **QUICK).complete(ask(connect("vllm", server.url, "m")))
        assert len(server.requests) == 3
    assert answer.token_ids == sampled([7, 8], 5, 40)
    assert answer.prompt_tokens == 2 and answer.completion_tokens == len(answer.token_ids)


def test_no_connection_is_a_failure_that_may_pass():
    with scripted_server() as server:
        url = server.url
    client = connect("vllm", url, "m", max_retries=2, **QUICK)
    with pytest.raises(ServerError, match="failed a request 3 times.*gave no answer"):
        client.complete(ask(client))


def test_a_server_that_keeps_failing_is_given_up():
    with scripted_server(script=lambda number, times: (500, {})) as server:
        client = connect("vllm", server.url, "m", max_retries=3, **QUICK)
        with pytest.raises(ServerError, match="failed a request 4 times, at last: .*answered 500.*scripted"):
            client.complete(ask(client))
        assert len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_repeated(status):
    with scripted_server(script=lambda number, times: (status, {})) as server:
        client = connect("vllm", server.url, "m", **QUICK)
        with pytest.raises(ServerError, match=f"refused a request with status {status}.*scripted") as caught:
            client.complete(ask(client))
        assert not isinstance(caught.value, TemporaryServerError)
        assert len(server.requests) == 1


def test_waits_double_up_to_a_longest_and_obey_the_server(monkeypatch):
    waits = []

    class Clock(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    headers = [{}, {}, {}, {}, {"Retry-After": "7"}, {}]
    with scripted_server(script=lambda number, times: (503, headers[number])) as server:
        client = connect("vllm", server.url, "m", max_retries=5, first_delay=1.0, longest_delay=4.0)
        with pytest.raises(ServerError):
            client.complete(ask(client), Clock())
    for wait, longest in zip(waits, [1, 2, 4, 4], strict=False):
        assert longest / 2 <= wait <= longest
    assert waits[4] == 7 and len(waits) == 5


def test_an_abandoned_request_is_not_repeated():
    abandoned = threading.Event()
    abandoned.set()
    with scripted_server(script=lambda number, times: (500, {})) as server:
        client = connect("vllm", server.url, "m", first_delay=60.0, longest_delay=60.0)
        start = time.monotonic()
        with pytest.raises(TemporaryServerError):
            client.complete(ask(client), abandoned)
        assert time.monotonic() - start < 5 and len(server.requests) == 1


def test_the_key_is_sent_and_the_address_is_the_endpoints():
    with scripted_server() as server:
        client = connect("vllm", server.url + "/", "m", api_key="secret")
        client.complete(ask(client))
        assert server.headers[0]["Authorization"] == "Bearer secret"
        assert server.paths == ["/v1/completions"]


@pytest.mark.parametrize("kind", sorted(SERVERS))
def test_every_kind_is_told_the_settings_and_leaves_none_to_the_server(kind):
    client = connect(kind, "http://host/v1", "m")
    settings = SamplingSettings(1, 40, 1, temperature=0.7, top_p=0.9, top_k=0 if kind == "openai" else 5)
    request = client.request([7], settings, 41, 3, [EOS])
    request.update(json.loads(request.pop("generation_config", "{}")))
    assert (request["model"], request["prompt"], request["seed"]) == ("m", [7], 3)
    assert (request["temperature"], request["top_p"], request.get("top_k", 0)) == (0.7, 0.9, settings.top_k)
    assert request.get("max_tokens", request.get("n_predict")) == 41
    # Penalties and min-p, under whatever name, do nothing.
    assert all(request[name] == 0 for name in request.keys() & {"min_p", "frequency_penalty", "presence_penalty"})
    assert all(request[name] == 1 for name in request.keys() & {"repetition_penalty", "repeat_penalty"})
    assert len(request.keys() & {"repetition_penalty", "repeat_penalty", "presence_penalty"}) > 0


def test_no_top_k_means_every_token():
    def top_k(kind):
        request = ask(connect(kind, "http://host/v1", "m"))
        request.update(json.loads(request.pop("generation_config", "{}")))
        return request.get("top_k")

    assert {kind: top_k(kind) for kind in SERVERS} == {
        "vllm": -1,
        "sglang": -1,
        "llama.cpp": 0,
        "transformers": 0,
        "openai": None,
    }
    with pytest.raises(ValueError, match="has no top-k"):
        ask(connect("openai", "http://host/v1", "m"), settings=SamplingSettings(1, 40, 1, top_k=5))


def test_transformers_is_told_to_sample_or_to_be_greedy():
    client = connect("transformers", "http://host/v1", "m")
    config = json.loads(ask(client)["generation_config"])
    assert config["do_sample"] is True and config["eos_token_id"] == [EOS]
    greedy = json.loads(ask(client, settings=SamplingSettings(1, 40, 1, temperature=0.0))["generation_config"])
    assert greedy["do_sample"] is False and "temperature" not in greedy


def llama_answer(request):
    ids = sampled(request["prompt"], request["seed"], request["n_predict"])
    assert request["return_tokens"] is True
    stop_type = "eos" if ids[-1] == EOS else "limit"
    counts = {"tokens_predicted": len(ids), "tokens_evaluated": len(request["prompt"])}
    return {"content": "", "tokens": ids, "stop_type": stop_type, **counts}


@pytest.mark.parametrize("url", ["{}", "{}/", "{}/v1"])
def test_llama_cpp_is_asked_beside_its_openai_endpoints(url):
    with scripted_server(llama_answer) as server:
        client = connect("llama.cpp", url.format(server.url.removesuffix("/v1")), "m")
        answers = [client.complete(ask(client, seed=seed)) for seed in range(20)]
        assert set(server.paths) == {"/completion"}
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert [answer.token_ids for answer in answers] == [sampled([7, 8], seed, 40) for seed in range(20)]


def test_sglang_names_the_end_otherwise():
    def answer(request):
        answer = vllm_answer(request)
        answer["choices"][0].update(matched_stop=EOS, stop_reason=None)
        return answer

    with scripted_server(answer) as server:
        client = connect("sglang", server.url, "m")
        assert client.complete(ask(client)).end_token == EOS


def test_a_server_of_text_gives_text():
    with scripted_server(text_answer) as server:
        client = connect("openai", server.url, "m")
        answer = client.complete(client.request("w7 w8", SETTINGS, 40, 5, [EOS]))
    assert answer.token_ids is None and answer.text.startswith("w")


@pytest.mark.parametrize(
    ("kind", "url", "options", "problem"),
    [
        ("tgi", "http://host/v1", {}, "no kind of server 'tgi'"),
        ("vllm", "host:8000", {}, "address is 'host:8000'"),
        ("vllm", "http://host/v1", {"max_retries": -1}, "must not be negative"),
        ("vllm", "http://host/v1", {"timeout": 0.0}, "must be above 0"),
    ],
)
def test_bad_arguments_are_refused(kind, url, options, problem):
    with pytest.raises(ValueError, match=problem):
        connect(kind, url, "m", **options)
