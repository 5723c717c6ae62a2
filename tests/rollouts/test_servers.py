"""Clients of servers: failures that pass are outlasted, others are told; each kind is asked in its own words."""

import json
import threading

import pytest
from scripted_server import sampled, scripted_server, text_answer
from tiny import EOS

from lenvm_rl.rollouts import server as server_module
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.server import SERVERS, ServerError, connect

SETTINGS = SamplingSettings(num_samples=1, max_new_tokens=40, batch_size=1)
QUICK = {"timeout": 1.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_DELAY", 0.05)


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
    with pytest.raises(ServerError, match="3 times"):
        client.complete(ask(client))


def test_a_server_that_keeps_failing_is_given_up():
    with scripted_server(script=lambda number, times: (500, {})) as server:
        client = connect("vllm", server.url, "m", max_retries=3, **QUICK)
        with pytest.raises(ServerError, match="4 times.* 500.*scripted"):
            client.complete(ask(client))
        assert len(server.requests) == 4


def test_no_address_is_told_at_once_and_an_abandoned_job_repeats_nothing(caplog):
    with pytest.raises(ServerError, match="http://\\["):
        (broken := connect("vllm", "http://[::1", "m", **QUICK)).complete(ask(broken))
    with pytest.raises(ServerError, match="api key") as told:
        (broken := connect("vllm", "http://127.0.0.1:9/v1", "m", api_key="secret\n", **QUICK)).complete(ask(broken))
    assert "secret" not in str(told.value)
    abandoned = threading.Event()
    abandoned.set()
    with scripted_server(script=lambda number, times: (500, {})) as server:
        client = connect("vllm", server.url, "m", max_retries=3, **QUICK)
        with pytest.raises(ServerError):
            client.complete(ask(client), abandoned)
        assert len(server.requests) == 1
        with pytest.raises(ServerError):
            (again := connect("vllm", server.url, "m", max_retries=3, **QUICK)).complete(ask(again))
    # Who waits is told why.
    assert caplog.text.count("answered 500. Trying again") == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_repeated(status):
    with scripted_server(script=lambda number, times: (status, {})) as server:
        client = connect("vllm", server.url, "m", **QUICK)
        with pytest.raises(ServerError, match=f"{status}.*scripted"):
            client.complete(ask(client))
        assert len(server.requests) == 1


def test_waits_double_up_to_a_longest_and_obey_the_server(monkeypatch):
    waits = []
    monkeypatch.setattr(server_module, "FIRST_DELAY", 1.0)
    monkeypatch.setattr(server_module, "LONGEST_DELAY", 4.0)
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    headers = [{}, {}, {}, {}, {}, {"Retry-After": "7"}, {}]
    with scripted_server(script=lambda number, times: (503, headers[number])) as server:
        client = connect("vllm", server.url, "m", max_retries=6)
        with pytest.raises(ServerError, match="7 times"):
            client.complete(ask(client))
    # Nobody waits before the first repetition.
    assert [wait for wait in waits if wait] == [1, 2, 4, 4, 7]


@pytest.mark.parametrize("failure", ["half", "garbage", "abort", "hang"])
def test_a_server_that_keeps_spoiling_its_answers_is_given_up(failure):
    with scripted_server(script=lambda number, times: failure) as server:
        client = connect("vllm", server.url, "m", max_retries=1, timeout=0.3)
        with pytest.raises(ServerError, match="2 times"):
            client.complete(ask(client))
        assert len(server.requests) == 2


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
    assert request["max_tokens"] == 41
    # Penalties and min-p, under whatever name, do nothing.
    assert all(request[name] == 0 for name in request.keys() & {"min_p", "frequency_penalty", "presence_penalty"})
    assert request.get("repetition_penalty", 1) == 1
    assert request.keys() & {"repetition_penalty", "presence_penalty"}


def test_no_top_k_means_every_token():
    def top_k(kind):
        request = ask(connect(kind, "http://host/v1", "m"))
        request.update(json.loads(request.pop("generation_config", "{}")))
        return request.get("top_k")

    assert {kind: top_k(kind) for kind in SERVERS} == {"vllm": -1, "transformers": 0, "openai": None}
    with pytest.raises(ValueError, match="top_k"):
        ask(connect("openai", "http://host/v1", "m"), settings=SamplingSettings(1, 40, 1, top_k=5))


def test_transformers_is_told_to_sample_or_to_be_greedy():
    client = connect("transformers", "http://host/v1", "m")
    config = json.loads(ask(client)["generation_config"])
    assert config["do_sample"] is True and config["eos_token_id"] == [EOS]
    greedy = json.loads(ask(client, settings=SamplingSettings(1, 40, 1, temperature=0.0))["generation_config"])
    assert greedy["do_sample"] is False and "temperature" not in greedy


def test_a_server_of_text_gives_text():
    with scripted_server(text_answer) as server:
        client = connect("openai", server.url, "m")
        answer = client.complete(client.request("w7 w8", SETTINGS, 40, 5, [EOS]))
    assert answer.token_ids is None and answer.text.startswith("w")


@pytest.mark.parametrize(
    ("kind", "url", "options", "problem"),
    [
        ("tgi", "http://host/v1", {}, "tgi"),
        ("vllm", "host:8000", {}, "url"),
        ("vllm", "http://host/v1", {"max_retries": -1}, "max_retries"),
        ("vllm", "http://host/v1", {"timeout": 0.0}, "timeout"),
    ],
)
def test_bad_arguments_are_refused(kind, url, options, problem):
    with pytest.raises(ValueError, match=problem):
        connect(kind, url, "m", **options)
