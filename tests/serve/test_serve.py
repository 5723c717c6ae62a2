"""The server against the real OpenAI client: what it generates, streams, counts and reports."""

import math
import threading
import time
import urllib.request
from contextlib import contextmanager

import openai
import pytest
import torch
import uvicorn
from tiny import EOS, tiny_length_value_model, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig

from lenvm_rl.sandbox.scripted import START, ScriptedLengthValue, ScriptedPolicy, countdown_chain, geometric_chain
from lenvm_rl.serve.app import create_app
from lenvm_rl.serve.engine import Engine
from lenvm_rl.tokenization import tokenizer_fingerprint

GAMMA, LONGEST = 0.97, 40
MESSAGES = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w6 w7"}]


@contextmanager
def serving(engine):
    """A real server of the engine on a free port, and a client of it."""
    config = uvicorn.Config(
        create_app(engine), host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tiny_engine(seed=0, **options):
    """Random models of 64 words that know a chat template; the policy ends now and then."""
    tokenizer = tiny_tokenizer(chat=True)
    value = tiny_length_value_model(tiny_llama(seed=seed + 1), tokenizer=tokenizer).freeze()
    return Engine(tiny_llama(seed=seed), value, tokenizer, "tiny", **options)


def scripted_engine(chain, policy_chain=None, **options):
    """A policy that plays a chain, and the exact values of the chain."""
    tokenizer = tiny_tokenizer(max(chain.vocab_size, 6))
    value = ScriptedLengthValue.from_chain(chain, GAMMA)
    value.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    return Engine(ScriptedPolicy.from_chain(policy_chain or chain), value, tokenizer, "tiny", **options)


def complete(client, prompt="w6 w7 w8", guidance=None, **fields):
    extra = {"return_token_ids": True} | ({} if guidance is None else {"length_guidance": guidance})
    return client.completions.create(model="tiny", prompt=prompt, **fields, extra_body=extra)


def ids_of(answer):
    return [choice.token_ids for choice in answer.choices]


def lengths_of(answer):
    return [choice.length_guidance["length"] for choice in answer.choices]


@pytest.fixture(scope="module")
def tiny_client():
    with serving(tiny_engine()) as client:
        yield client


@pytest.fixture(scope="module")
def countdown():
    """The completion's length is the first choice, most probably 20."""
    start = torch.full((LONGEST,), 1.0, dtype=torch.float64)
    start[19] = 5.0
    chain = countdown_chain((start / start.sum()).tolist())
    with serving(scripted_engine(chain)) as client:
        yield chain, client


class TestCompletions:
    def test_greedy_at_strength_zero_is_generate(self, tiny_client):
        tokenizer = tiny_tokenizer()
        for prompt in ("w6 w7 w8", "w30", "w11 w12 w50 w51"):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            expected = tiny_llama().generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
            answer = complete(tiny_client, prompt, {"strength": 0}, temperature=0, max_tokens=20)
            assert ids_of(answer) == [expected]
            assert answer.prompt_token_ids == ids[0].tolist()
            assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
            ended = expected[-1] == EOS
            assert answer.choices[0].finish_reason == ("stop" if ended else "length")
            assert lengths_of(answer) == [len(expected) - ended]
            usage = answer.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (ids.shape[1], len(expected))
            assert usage.total_tokens == ids.shape[1] + len(expected)

    def test_sampling_is_generate_at_the_same_seed(self, tiny_client):
        ids = tiny_tokenizer()("w6 w7 w8", return_tensors="pt").input_ids
        config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=16)
        torch.manual_seed(5)
        expected = tiny_llama().generate(ids, generation_config=config)[0, 3:].tolist()
        assert ids_of(complete(tiny_client, seed=5, temperature=0.7, top_p=0.9)) == [expected]
        assert ids_of(complete(tiny_client, [6, 7, 8], seed=5, temperature=0.7, top_p=0.9)) == [expected]

    def test_a_seed_reproduces_and_no_seed_does_not(self, tiny_client):
        state = torch.random.get_rng_state()
        fields = {"guidance": {"strength": 3.0, "top_k": 20}, "n": 3, "max_tokens": 12}
        first, again, other = (complete(tiny_client, seed=seed, **fields) for seed in (7, 7, -8))
        assert ids_of(first) == ids_of(again) != ids_of(other)
        assert len({tuple(ids) for ids in ids_of(first)}) == 3
        assert ids_of(complete(tiny_client, **fields)) != ids_of(complete(tiny_client, **fields))
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_the_models_own_generation_config_says_nothing_but_the_ends(self):
        engine = tiny_engine()
        engine.close()
        policy = tiny_llama()
        policy.generation_config = GenerationConfig(
            do_sample=True, repetition_penalty=5.0, temperature=0.1, top_k=2, eos_token_id=[EOS, 9], max_length=7
        )
        other = Engine(policy, engine.decoder.length_value_model, tiny_tokenizer(), "tiny")
        assert other.eos_token_ids == [EOS, 9]
        with serving(other) as client:
            answers = [complete(client, temperature=0, max_tokens=40, prompt=f"w{i}") for i in range(6, 14)]
        ids = [row for answer in answers for row in ids_of(answer)]
        plain = [
            tiny_llama().generate(torch.tensor([[i]]), do_sample=False, max_new_tokens=40, eos_token_id=[EOS, 9])
            for i in range(6, 14)
        ]
        assert ids == [row[0, 1:].tolist() for row in plain]

    def test_stop_strings(self, tiny_client):
        whole = complete(tiny_client, temperature=0, max_tokens=12)
        words = whole.choices[0].text.split()
        assert len(words) > 4
        place = next(i for i in range(1, len(words)) if words[i] not in words[:i])
        stopped = complete(tiny_client, temperature=0, max_tokens=12, stop=["never", f" {words[place]}"])
        assert stopped.choices[0].text == " ".join(words[:place])
        assert stopped.choices[0].finish_reason == "stop"
        ids = ids_of(stopped)[0]
        assert ids == ids_of(whole)[0][: len(ids)] and tiny_tokenizer().decode(ids[-1:]) == words[place]
        assert stopped.usage.completion_tokens == len(ids) == lengths_of(stopped)[0]

    def test_rows_that_a_stop_string_ends_leave_the_others_alone(self, tiny_client):
        fields = {"guidance": {"strength": -2.0, "top_k": 30}, "n": 6, "seed": 3, "max_tokens": 20}
        whole = complete(tiny_client, **fields)
        word = whole.choices[0].text.split()[2]
        stopped = complete(tiny_client, stop=word, **fields)
        for plain, cut in zip(whole.choices, stopped.choices, strict=True):
            assert plain.text.partition(word)[0] == cut.text
            assert cut.finish_reason == ("stop" if word in plain.text else plain.finish_reason)

    def test_max_tokens(self, tiny_client):
        guidance = {"strength": -50.0}
        assert len(ids_of(complete(tiny_client, guidance=guidance, seed=1))[0]) == 16
        assert len(ids_of(complete(tiny_client, guidance=guidance, seed=1, max_tokens=3))[0]) == 3
        assert complete(tiny_client, guidance=guidance, seed=1, max_tokens=3).choices[0].finish_reason == "length"

    def test_the_model_is_listed(self, tiny_client):
        assert [model.id for model in tiny_client.models.list()] == ["tiny"]


class TestChat:
    def test_a_chat_goes_through_the_template(self, tiny_client):
        ids = tiny_tokenizer(chat=True).apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        expected = tiny_llama().generate(ids, do_sample=False, max_new_tokens=9)[0, ids.shape[1] :].tolist()
        answer = tiny_client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0,
            max_completion_tokens=9,
            extra_body={"return_token_ids": True},
        )
        assert answer.prompt_token_ids == ids[0].tolist() and ids_of(answer) == [expected]
        message = answer.choices[0].message
        assert message.role == "assistant"
        assert message.content == tiny_tokenizer().decode(expected, skip_special_tokens=True)
        assert answer.object == "chat.completion" and answer.length_guidance["predicted_length"] >= 0

    def test_parts_of_text_are_joined(self, tiny_client):
        parts = [{"type": "text", "text": "w6 "}, {"type": "text", "text": "w7"}]
        answers = [
            tiny_client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], seed=1, max_tokens=8
            )
            for content in ("w6 w7", parts)
        ]
        assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
        assert answers[0].usage == answers[1].usage

    def test_a_chat_without_max_tokens_goes_on_to_the_context(self):
        tokenizer = tiny_tokenizer(chat=True)
        value = tiny_length_value_model(tiny_llama(max_position_embeddings=40), tokenizer=tokenizer).freeze()
        with serving(Engine(tiny_llama(), value, tokenizer, "tiny")) as client:
            answer = client.chat.completions.create(
                model="tiny", messages=MESSAGES, seed=1, extra_body={"length_guidance": {"strength": -200}}
            )
        assert answer.usage.total_tokens == 40 and answer.choices[0].finish_reason == "length"


class TestStreams:
    @pytest.mark.parametrize("guidance", [None, {"strength": 2.0, "top_k": 30}])
    @pytest.mark.parametrize("stop", [None, ["w1", "w2"]])
    def test_the_pieces_together_are_the_answer(self, tiny_client, guidance, stop):
        fields = {"guidance": guidance, "n": 3, "seed": 13, "max_tokens": 20, "stop": stop}
        whole = complete(tiny_client, **fields)
        chunks = list(complete(tiny_client, stream=True, stream_options={"include_usage": True}, **fields))
        # Few tokens may reach a slow client in one piece.
        assert len(chunks) > 4 or stop
        for choice in whole.choices:
            own = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
            assert "".join(one.text for one in own) == choice.text
            assert [token for one in own for token in one.token_ids] == choice.token_ids
            assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
            assert own[-1].length_guidance == choice.length_guidance
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
        assert chunks[-2].length_guidance == whole.length_guidance
        assert chunks[-2].prompt_token_ids == whole.prompt_token_ids
        assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}

    def test_a_chat_in_pieces(self, tiny_client):
        fields = {"model": "tiny", "messages": MESSAGES, "n": 2, "seed": 4, "max_tokens": 15}
        whole = tiny_client.chat.completions.create(**fields)
        chunks = list(tiny_client.chat.completions.create(stream=True, **fields))
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert all(chunk.usage is None for chunk in chunks)
        for choice in whole.choices:
            own = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
            assert [one.delta.role for one in own] == ["assistant"] + [None] * (len(own) - 1)
            assert "".join(one.delta.content for one in own) == choice.message.content
            assert own[-1].finish_reason == choice.finish_reason

    def test_the_events_are_those_of_the_protocol(self, tiny_client):
        body = b'{"model": "tiny", "prompt": "w6", "stream": true, "max_tokens": 4, "temperature": 0}'
        request = urllib.request.Request(f"{tiny_client.base_url}completions", body)
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            events = answer.read().decode("ascii").split("\n\n")
        assert all(event.startswith("data: {") for event in events[:-2])
        assert events[-2:] == ["data: [DONE]", ""]


class TestGuidance:
    @pytest.mark.parametrize("strength", [-300.0, -30.0, 0.0, 2.0, 4.0, 30.0])
    def test_strength_shifts_the_length_as_the_tilt_says(self, countdown, strength):
        chain, client = countdown
        scores = chain.transition[START].log() + strength * chain.value(GAMMA)
        expected = int(scores.argmax()) - START
        answer = complete(client, [START], {"strength": strength}, temperature=0, max_tokens=LONGEST + 1)
        assert lengths_of(answer) == [expected] and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == expected + 1

    def test_greedy_lengths_cover_all_there_is(self, countdown):
        _, client = countdown
        answers = [
            complete(client, [START], {"strength": strength}, temperature=0, max_tokens=LONGEST + 1)
            for strength in (-300.0, 0.0, 30.0)
        ]
        assert [lengths_of(answer)[0] for answer in answers] == [LONGEST, 20, 1]

    def test_sampled_lengths_have_the_mean_of_the_tilted_law(self, countdown):
        chain, client = countdown
        law = chain.tilted(4.0, chain.value(GAMMA)).transition[START]
        lengths = torch.arange(chain.vocab_size).double() - START
        mean = float(law @ lengths)
        spread = math.sqrt(float(law @ (lengths - mean) ** 2))
        drawn = [
            length
            for seed in range(8)
            for length in lengths_of(complete(client, [START], {"strength": 4.0}, n=16, seed=seed, max_tokens=41))
        ]
        base = float(chain.transition[START] @ lengths)
        assert abs(sum(drawn) / 128 - mean) < 3 * spread / math.sqrt(128) < base - mean

    @pytest.mark.parametrize("rule", ["paper", "feasible"])
    @pytest.mark.parametrize("target", [1, 7, 31, 40])
    def test_the_target_is_reached(self, countdown, rule, target):
        _, client = countdown
        knobs = {"mode": "equal_to", "target_length": target, "rule": rule}
        knobs |= {"tolerance": 0.0} if rule == "feasible" else {}
        answer = complete(client, [START], knobs, n=4, seed=1, max_tokens=target + 1)
        assert lengths_of(answer) == [target] * 4 and answer.length_guidance["forced"] == 0
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}

    def test_bounds_hold(self, countdown):
        _, client = countdown
        for mode, holds in (("at_most", lambda n: n <= 6), ("at_least", lambda n: n >= 33)):
            drawn = set()
            for seed in range(2):
                knobs = {"mode": mode, "target_length": 6 if mode == "at_most" else 33}
                drawn |= set(lengths_of(complete(client, [START], knobs, n=16, seed=seed, max_tokens=41)))
            assert all(holds(length) for length in drawn) and len(drawn) >= 4

    def test_the_prediction_at_the_prompt_is_reported(self, countdown):
        chain, client = countdown
        for first, expected in ((START + 9, 9.0), (START, float(chain.value(GAMMA)[START].log1p()) / math.log(GAMMA))):
            answer = complete(client, [first], temperature=0, max_tokens=41)
            # The end is not counted.
            assert answer.length_guidance["predicted_length"] == pytest.approx(expected - 1, rel=1e-4)

    @pytest.mark.parametrize(
        ("hazard", "knobs", "forced", "free"),
        [
            # With a hundred tokens to come, the end is nearer to five than any token is: it is barred five times.
            (0.01, {"mode": "equal_to", "min_p": 0.1}, 5, 0),
            # The end is no candidate, and put once.
            (1e-9, {"mode": "equal_to", "top_k": 4, "rule": "paper"}, 1, 11),
        ],
    )
    def test_force_is_counted(self, hazard, knobs, forced, free):
        with serving(scripted_engine(geometric_chain(hazard, 20))) as client:
            knobs = {"target_length": 5, "enforce": True, **knobs}
            answer = complete(client, [START], knobs, n=3, seed=2, max_tokens=11)
            assert lengths_of(answer) == [5] * 3
            assert [choice.length_guidance["forced"] for choice in answer.choices] == [forced] * 3
            assert answer.length_guidance["forced"] == 3 * forced
            streamed = list(complete(client, [START], knobs, n=3, seed=2, max_tokens=11, stream=True))
            assert streamed[-1].length_guidance == answer.length_guidance
            answer = complete(client, [START], {**knobs, "enforce": False}, n=3, seed=2, max_tokens=11)
            assert lengths_of(answer) == [free] * 3 and answer.length_guidance["forced"] == 0
