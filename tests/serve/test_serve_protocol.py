"""What a request may not say: each is answered with status 400 and a sentence that says what to change."""

import json

import openai
import pytest
import requests
from test_serve import MESSAGES, complete, scripted_engine, serving, tiny_engine
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.sandbox.scripted import geometric_chain
from lenvm_rl.serve.engine import Engine


@pytest.fixture(scope="module")
def client():
    with serving(tiny_engine(max_choices=4)) as client:
        yield client
        # Whatever was asked, the server is there and answers as ever.
        assert complete(client, temperature=0).choices[0].finish_reason in ("stop", "length")


def post(client, body, endpoint="completions"):
    """The answer to a body as it is; the client itself would refuse to send some."""
    text = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body})
    answer = requests.post(f"{client.base_url}{endpoint}", data=text, timeout=20)
    return answer.status_code, answer.json()["error"]


def check_sentence(message, name):
    assert name[:80] in message and len(message) < 500
    assert message.rstrip().endswith((".", ")", "…")) and " " in message


KNOBS = [
    ({"mode": "shorter"}, "mode"),
    ({"mode": 5}, "mode"),
    ({"mode": ["tilt"]}, "mode"),
    ({"strenght": 5}, "strenght"),
    ({"strength": "5"}, "strength"),
    ({"strength": True}, "strength"),
    ({"strength": float("nan")}, "strength"),
    ({"strength": float("-inf")}, "strength"),
    ({"strength": 1e39}, "strength"),
    ({"strength": 10**400}, "strength"),
    ({"strength": [1]}, "strength"),
    ({"target_length": 5}, "target_length"),
    ({"rule": "paper"}, "rule"),
    ({"enforce": True}, "enforce"),
    ({"mode": "at_most"}, "mode"),
    ({"mode": "at_most", "target_length": -1}, "mode"),
    ({"mode": "at_most", "target_length": 5.5}, "mode"),
    ({"mode": "at_most", "target_length": "5"}, "mode"),
    ({"mode": "at_most", "target_length": 2**70}, "target_length"),
    ({"mode": "x" * 5000}, "mode"),
    ({"\ud800": 1}, "\\ud800"),
    ({"mode": "equal_to", "target_length": 16}, "target_length"),
    ({"mode": "at_most", "target_length": 2**62}, "target_length"),
    ({"mode": "equal_to", "target_length": 5, "strength": 1}, "strength"),
    ({"mode": "equal_to", "target_length": 5, "rule": "best"}, "rule"),
    ({"mode": "equal_to", "target_length": 5, "rule": 1}, "rule"),
    ({"mode": "equal_to", "target_length": 5, "tolerance": 1.5}, "tolerance"),
    ({"mode": "equal_to", "target_length": 5, "tolerance": "a"}, "tolerance"),
    ({"mode": "at_most", "target_length": 5, "tolerance": 0.1}, "tolerance"),
    ({"mode": "equal_to", "target_length": 5, "enforce": "yes"}, "enforce"),
    ({"mode": "equal_to", "target_length": 5, "enforce": {}}, "enforce"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 2.0}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"min_p": float("nan")}, "min_p"),
    ({"top_k": 5}, "strength"),
    ({"strength": 1, "top_p": 1.5}, "top_p"),
    ({"temperature": 0.5}, "temperature"),
    ("strong", None),
    ([], None),
    (True, None),
]


@pytest.mark.parametrize(("knobs", "field"), KNOBS)
def test_bad_knobs_are_refused(client, knobs, field):
    status, error = post(client, {"prompt": "w6", "length_guidance": knobs})
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == ("length_guidance" if field is None else f"length_guidance.{field}")
    check_sentence(error["message"], field or "length_guidance")
    status, streamed = post(
        client,
        {"messages": MESSAGES, "max_tokens": 16, "stream": True} | {"length_guidance": knobs},
        "chat/completions",
    )
    assert (status, streamed) == (400, error)


@pytest.mark.parametrize(
    ("knobs", "param", "problem"),
    [
        ({"mode": "nonsense"}, "length_guidance.mode", "mode"),
        ({"mode": "at_least", "target_length": 20}, "length_guidance.target_length", "target_length=20.*max_tokens"),
    ],
)
def test_the_client_raises_what_it_raises_for_openai(client, knobs, param, problem):
    with pytest.raises(openai.BadRequestError, match=problem) as caught:
        complete(client, guidance=knobs, max_tokens=20)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="max_tokens of at least 21"):
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_completion_tokens=20,
            extra_body={"length_guidance": {"mode": "at_least", "target_length": 20}},
        )


FIELDS = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": 1e-40}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"n": 1.0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**80}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [5]}, "stop[0]"),
    ({"stop": {}}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": 5}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"user": 5}, "user"),
    ({"top_k": 5}, "top_k"),
    ({"beam_width": 4}, "beam_width"),
    ({"stop": ["a", None]}, "stop[1]"),
    ({"length_guidance": "strong"}, "length_guidance"),
    ({"max_completion_tokens": "7"}, "max_tokens"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"ééé": 4}, "ééé"),
    ({"x" * 500: 4}, "x" * 500),
]


@pytest.mark.parametrize(("fields", "param"), FIELDS)
@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_bad_fields_are_refused(client, endpoint, fields, param):
    asked = {"messages": MESSAGES} if endpoint.startswith("chat") else {"prompt": "w6"}
    status, error = post(client, asked | fields, endpoint)
    assert status == 400 and error["param"] == param
    check_sentence(error["message"], param)


UNSUPPORTED = [
    *(
        (False, {name: value})
        for name, value in {
            "best_of": 2,
            "echo": True,
            "logprobs": 0,
            "suffix": "end",
            "logit_bias": {"5": 1},
            "presence_penalty": 0.5,
            "frequency_penalty": -1,
            "metadata": {"a": "b"},
            "store": True,
            "service_tier": "flex",
        }.items()
    ),
    *(
        (True, {name: value})
        for name, value in {
            "tools": [{"type": "function"}],
            "tool_choice": "required",
            "functions": [{}],
            "logprobs": True,
            "top_logprobs": 3,
            "response_format": {"type": "json_object"},
            "modalities": ["text", "audio"],
            "parallel_tool_calls": False,
            "prediction": {},
            "reasoning_effort": "high",
            "audio": {},
            "verbosity": "low",
            "web_search_options": {},
            "logit_bias": {"5": 1},
            "function_call": "auto",
            "moderation": {},
        }.items()
    ),
]


@pytest.mark.parametrize(("chat", "option"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(client, chat, option):
    (name,) = option
    asked = {"messages": MESSAGES} if chat else {"prompt": "w6"}
    status, error = post(client, asked | option, "chat/completions" if chat else "completions")
    assert status == 400 and error["param"].startswith(name)
    check_sentence(error["message"], name)


NEUTRAL = {"logit_bias": {}, "store": False, "service_tier": "auto", "frequency_penalty": 0}
NEUTRAL |= {"presence_penalty": 0.0, "user": "me", "length_guidance": None}


def test_an_unsupported_option_does_nothing_at_its_neutral_value(client):
    plain = complete(client, seed=1).choices[0].text
    body = {"model": "tiny", "prompt": "w6 w7 w8", "seed": 1, **NEUTRAL, "best_of": 1, "echo": False}
    answer = requests.post(f"{client.base_url}completions", json=body, timeout=20).json()
    assert answer["choices"][0]["text"] == plain
    chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **NEUTRAL}
    chat |= {"tool_choice": "none", "tools": [], "logprobs": False, "top_logprobs": 0}
    chat |= {"parallel_tool_calls": True, "response_format": {"type": "text"}}
    assert requests.post(f"{client.base_url}chat/completions", json=chat, timeout=20).status_code == 200
    nothing = dict.fromkeys([*chat.keys() - {"model", "messages"}, "audio", "verbosity"])
    assert requests.post(f"{client.base_url}chat/completions", json={**chat, **nothing, "max_tokens": 4}, timeout=20).ok


PROMPTS = [None, "", "  ", [], {}, ["w6", "w7"], [[6], [7]], [6, "w7"], [6, True], [6, 64], [6, -1], "w6 \ud800"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_bad_prompts_are_refused(client, prompt):
    status, error = post(client, {"prompt": prompt})
    assert (status, error["param"], error["code"]) == (400, "prompt", None)


@pytest.mark.parametrize(("words", "told"), [(497, "497 tokens"), (5000, "5000 tokens")])
def test_a_prompt_that_does_not_fit_is_refused(client, words, told):
    status, error = post(client, {"prompt": "w6 " * words})
    assert (status, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
    check_sentence(error["message"], told)


def test_a_knob_of_guidance_in_the_wrong_place_is_told_where_it_belongs(client):
    status, error = post(client, {"prompt": "w6", "top_k": 5})
    assert (status, error["param"], error["code"]) == (400, "top_k", "unknown_parameter")
    check_sentence(error["message"], "length_guidance")


def test_a_text_part_that_is_no_unicode_is_refused_where_it_stands(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]
    status, error = post(client, {"messages": messages}, "chat/completions")
    assert status == 400 and error["param"].startswith("messages[0].content")


def test_a_prompt_that_just_fits_is_served(client):
    assert complete(client, "w6 " * 496).usage.prompt_tokens == 496
    assert complete(client, ["w6 w7"]).usage.prompt_tokens == complete(client, [[6, 7]]).usage.prompt_tokens == 2


CHATS = [
    (None, "messages"),
    ([], "messages"),
    (["w6"], "messages[0]"),
    ([{"content": "w6"}], "messages[0].role"),
    ([*MESSAGES, {"role": "tool", "content": "w6"}], "messages[2].role"),
    ([{"role": ["user"], "content": "w6"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
    ([{"role": "user", "content": "\udfff"}], "messages[0].content"),
    ([{"role": "user", "content": "w6", "name": "Ada"}], "messages[0].name"),
    ([{"role": "user", "content": "w6 " * 600}], "messages"),
]


@pytest.mark.parametrize(("messages", "param"), CHATS)
def test_bad_chats_are_refused(client, messages, param):
    status, error = post(client, {"messages": messages}, "chat/completions")
    assert status == 400 and error["param"] == param
    check_sentence(error["message"], param)


def test_an_answer_can_be_sent_back(client):
    """What the client gives of a message holds fields that are null."""
    said = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4).choices[0].message
    messages = [*MESSAGES, said.model_dump(), {"role": "user", "content": "w8"}]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=4).choices


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"\xff\xfe\x00", None),
        (b"[" * 100_000, None),
        (b'{"n": ' + b"9" * 5000 + b"}", None),
        (b"[]", None),
        (b'"hello"', None),
        (b"{}", "model"),
        (b'{"model": 5}', "model"),
    ],
)
def test_bodies_that_say_nothing_are_refused(client, body, param):
    for endpoint in ("completions", "chat/completions"):
        status, error = post(client, body, endpoint)
        assert status == 400 and error["param"] == param


def test_other_models_and_places_are_not_found(client):
    with pytest.raises(openai.NotFoundError, match="'gpt-4'.*'tiny'") as caught:
        client.completions.create(model="gpt-4", prompt="w6")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="w6")


def test_a_vocabulary_too_large_to_score_needs_truncation():
    tokenizer = tiny_tokenizer(5000)
    value = tiny_length_value_model(tiny_llama(5000), tokenizer=tokenizer).freeze()
    with serving(Engine(tiny_llama(5000), value, tokenizer, "tiny")) as client:
        with pytest.raises(openai.BadRequestError, match=r"top_k.*\[1, 256\]"):
            complete(client, guidance={"strength": 1.0})
        assert complete(client, guidance={"strength": 1.0, "top_k": 8}).choices
        assert complete(client, guidance={"strength": 0}, top_p=0.5).choices
        assert complete(client).choices


def test_chats_need_a_template_that_takes_them():
    error = pytest.raises(openai.BadRequestError, match="chat template")
    with serving(scripted_engine(geometric_chain(0.5))) as client, error:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    engine = tiny_engine()
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with serving(engine) as client, pytest.raises(openai.BadRequestError, match="template.*roles must alternate"):
        client.chat.completions.create(model="tiny", messages=MESSAGES)


class TestStart:
    """What cannot work is told before the first request."""

    def test_tokenizers(self):
        value = tiny_length_value_model(tokenizer=tiny_tokenizer()).freeze()
        with pytest.raises(ValueError, match="tokenizers"):
            Engine(tiny_llama(), value, tiny_tokenizer(60), "tiny")
        with pytest.raises(ValueError, match="tokenizer_fingerprint"):
            Engine(tiny_llama(), tiny_length_value_model().freeze(), tiny_tokenizer(), "tiny")

    def test_settings(self):
        tokenizer = tiny_tokenizer()
        models = tiny_llama(), tiny_length_value_model(tokenizer=tokenizer).freeze(), tokenizer, "tiny"
        for name in ("max_choices", "max_waiting"):
            with pytest.raises(ValueError, match=name):
                Engine(*models, **{name: -1})
        with pytest.raises(ValueError, match="scoring"):
            Engine(*models, scoring="quick")
        models[1].train()
        unfrozen = tiny_length_value_model(tokenizer=tokenizer).train()
        with pytest.raises(ValueError, match="training mode"):
            Engine(models[0], unfrozen, tokenizer, "tiny")


class TestFlatKeys:
    """Guidance under the keys that go to vLLM, beside the other fields."""

    def test_they_say_what_the_object_says(self, client):
        knobs = {"mode": "at_most", "target_length": 9, "rule": "feasible", "top_k": 12, "min_p": 0.01, "enforce": True}
        flat = {f"length_{name.removesuffix('_length')}": value for name, value in knobs.items()}
        asked = {"model": "tiny", "prompt": "w6 w7", "seed": 3, "n": 3}
        answers = [client.completions.create(**asked, extra_body=body) for body in ({"length_guidance": knobs}, flat)]
        assert answers[0].choices == answers[1].choices and max(map(len, (c.text for c in answers[1].choices)))
        chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "extra_body": {**flat, "length_enforce": 1}}
        assert client.chat.completions.create(**chat).choices[0].length_guidance["length"] <= 9

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"length_strength": "5", "length_top_k": 5}, "length_strength"),
            ({"length_strenght": 5}, "length_strenght"),
            ({"length_top_k": 5}, "length_strength"),
            ({"length_target": 5}, "length_target"),
            ({"length_mode": "at_most", "length_target": 20}, "length_target"),
            ({"length_strength": 1, "length_guidance": {"strength": 1}}, "length_strength"),
            ({"length_strength": 1, "length_top_p": 0.5, "top_p": 0.6}, "top_p"),
            ({"length_temperature": 1}, "length_temperature"),
        ],
    )
    def test_what_makes_no_sense_is_refused_by_its_key(self, client, fields, param):
        status, error = post(client, {"prompt": "w6", **fields})
        assert (status, error["param"]) == (400, param)
