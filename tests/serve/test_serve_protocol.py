"""What a request may not say: each is answered with status 400 and a sentence that says what to change."""

import json

import openai
import pytest
import requests
from test_serve import MESSAGES, complete, scripted_engine, serving, tiny_engine
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.sandbox.scripted import ScriptedLengthValue, ScriptedPolicy, geometric_chain
from lenvm_rl.serve.engine import Engine
from lenvm_rl.serve.protocol import NEUTRAL_CHAT, NEUTRAL_COMPLETION


@pytest.fixture(scope="module")
def client():
    with serving(tiny_engine(max_new_tokens_limit=300, max_choices=4)) as client:
        yield client
        # Whatever was asked, the server is there and answers as ever.
        assert complete(client, temperature=0).choices[0].finish_reason in ("stop", "length")


def post(client, body, endpoint="completions"):
    """The answer to a body as it is; the client itself would refuse to send some."""
    text = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body})
    answer = requests.post(f"{client.base_url}{endpoint}", data=text, timeout=20)
    return answer.status_code, answer.json()["error"]


def check_sentence(message, problem):
    assert problem in message and len(message) < 500
    assert message.rstrip().endswith((".", ")", "…")) and " " in message


KNOBS = [
    ({"mode": "shorter"}, "mode", "mode must be one of tilt, equal_to, at_most, at_least, got 'shorter'"),
    ({"mode": 5}, "mode", "mode must be one of"),
    ({"mode": ["tilt"]}, "mode", "mode must be one of"),
    ({"strenght": 5}, "strenght", 'no field "strenght": its fields are mode, strength, target_length'),
    ({"strength": "5"}, "strength", "strength must be a number of at most 1e+09 either way, got '5'"),
    ({"strength": True}, "strength", "strength must be a number of at most 1e+09 either way"),
    ({"strength": float("nan")}, "strength", "strength must be a number of at most 1e+09 either way, got nan"),
    ({"strength": float("-inf")}, "strength", "strength must be a number of at most 1e+09 either way, got -inf"),
    ({"strength": 1e39}, "strength", "strength must be a number of at most 1e+09 either way, got 1e+39"),
    ({"strength": 10**400}, "strength", "strength must be a number of at most 1e+09 either way"),
    ({"strength": [1]}, "strength", "strength must be a number of at most 1e+09 either way"),
    ({"target_length": 5}, "target_length", "target_length means nothing to mode='tilt'"),
    ({"rule": "paper"}, "rule", "rule means nothing to mode='tilt'"),
    ({"enforce": True}, "enforce", "enforce means nothing to mode='tilt'"),
    ({"mode": "at_most"}, "mode", "mode='at_most' needs target_length"),
    ({"mode": "at_most", "target_length": -1}, "mode", "needs target_length, a whole number"),
    ({"mode": "at_most", "target_length": 5.5}, "mode", "needs target_length, a whole number"),
    ({"mode": "at_most", "target_length": "5"}, "mode", "needs target_length, a whole number"),
    ({"mode": "at_most", "target_length": 2**70}, "target_length", "needs max_tokens of at least"),
    ({"mode": "x" * 5000}, "mode", "mode must be one of"),
    ({"\ud800": 1}, "\\ud800", "no field"),
    ({"mode": "equal_to", "target_length": 16}, "target_length", "needs max_tokens of at least 17"),
    ({"mode": "at_most", "target_length": 2**62}, "target_length", "needs max_tokens of at least"),
    ({"mode": "equal_to", "target_length": 5, "strength": 1}, "strength", "strength means nothing to"),
    ({"mode": "equal_to", "target_length": 5, "rule": "best"}, "rule", "rule must be one of paper, feasible"),
    ({"mode": "equal_to", "target_length": 5, "rule": 1}, "rule", "rule must be one of paper, feasible"),
    ({"mode": "equal_to", "target_length": 5, "tolerance": 1.5}, "tolerance", "tolerance is a share of the length"),
    ({"mode": "equal_to", "target_length": 5, "tolerance": "a"}, "tolerance", "tolerance is a share of the length"),
    ({"mode": "at_most", "target_length": 5, "tolerance": 0.1}, "tolerance", "tolerance belongs to mode='equal_to'"),
    ({"mode": "equal_to", "target_length": 5, "enforce": "yes"}, "enforce", "enforce must be True or False"),
    ({"mode": "equal_to", "target_length": 5, "enforce": {}}, "enforce", "enforce must be True or False"),
    ({"top_k": -1}, "top_k", "top_k must be an integer of at least 0 (0 for all tokens), got -1"),
    ({"top_k": 2.0}, "top_k", "top_k must be an integer of at least 0"),
    ({"min_p": 1.1}, "min_p", "min_p must lie in [0, 1]"),
    ({"min_p": float("nan")}, "min_p", "min_p must lie in [0, 1]"),
    ({"temperature": 0.5}, "temperature", "temperature belongs at the top of the request"),
    ({"top_p": 0.5}, "top_p", "top_p belongs at the top of the request"),
    ("strong", None, "length_guidance must be an object"),
    ([], None, "length_guidance must be an object"),
    (True, None, "length_guidance must be an object"),
]


@pytest.mark.parametrize(("knobs", "field", "problem"), KNOBS)
def test_bad_knobs_are_refused(client, knobs, field, problem):
    status, error = post(client, {"prompt": "w6", "length_guidance": knobs})
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == ("length_guidance" if field is None else f"length_guidance.{field}")
    check_sentence(error["message"], problem)
    status, streamed = post(
        client,
        {"messages": MESSAGES, "max_tokens": 16, "stream": True} | {"length_guidance": knobs},
        "chat/completions",
    )
    assert (status, streamed) == (400, error)


@pytest.mark.parametrize(
    ("knobs", "param", "problem"),
    [
        ({"mode": "nonsense"}, "length_guidance.mode", "mode must be one of"),
        ({"mode": "at_least", "target_length": 20}, "length_guidance.target_length", "raise max_tokens or lower"),
    ],
)
def test_the_client_raises_what_it_raises_for_openai(client, knobs, param, problem):
    with pytest.raises(openai.BadRequestError, match=problem) as caught:
        complete(client, guidance=knobs, max_tokens=20)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="of at least 21.*raise max_completion_tokens"):
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_completion_tokens=20,
            extra_body={"length_guidance": {"mode": "at_least", "target_length": 20}},
        )


FIELDS = [
    ({"temperature": "hot"}, "temperature", 'temperature should be a valid number, got "hot"'),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0, got -0.1"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2, got 2.5"),
    ({"temperature": float("nan")}, "temperature", "less than or equal to 2, got NaN"),
    ({"temperature": 1e-40}, "temperature", "say 0 for greedy decoding"),
    ({"temperature": True}, "temperature", "a valid number, got true"),
    ({"top_p": 0}, "top_p", "greater than 0, got 0"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1, got 1.5"),
    ({"n": 0}, "n", "greater than or equal to 1, got 0"),
    ({"n": 5}, "n", "n must be at most 4, got 5"),
    ({"n": 1.0}, "n", "a valid integer, got 1.0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
    ({"max_tokens": 301}, "max_tokens", "this server generates at most 300 tokens"),
    ({"max_tokens": 2**80}, "max_tokens", "less than or equal to"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ: give one of them"),
    ({"seed": "x"}, "seed", "a valid integer"),
    ({"seed": 2**64}, "seed", "less than or equal to"),
    ({"stop": ""}, "stop", "stop must be a text that is not empty"),
    ({"stop": ["a"] * 5}, "stop", "a list of at most 4"),
    ({"stop": [5]}, "stop", "stop must be a text"),
    ({"stop": {}}, "stop", "stop must be a text"),
    ({"stream": "yes"}, "stream", "stream must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    ({"stream": True, "stream_options": 5}, "stream_options", "stream_options must be an object"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "must be true or false"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown or not supported here"),
    ({"user": 5}, "user", "user must be a text"),
    ({"top_k": 5}, "top_k", "top_k is a knob of length guidance: write it into length_guidance"),
    ({"beam_width": 4}, "beam_width", 'The field "beam_width" is unknown or not'),
    ({"stop": ["a", None]}, "stop", "stop must be a text"),
    ({"length_guidance": "strong"}, "length_guidance", "must be an object"),
    ({"max_completion_tokens": "7"}, "max_completion_tokens", "a valid integer"),
    ({"return_token_ids": 1}, "return_token_ids", "must be true or false"),
    ({"ééé": 4}, "ééé", "is unknown or not supported here"),
    ({"x" * 500: 4}, "x" * 500, "is unknown or not supported here"),
]


@pytest.mark.parametrize(("fields", "param", "problem"), FIELDS)
@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_bad_fields_are_refused(client, endpoint, fields, param, problem):
    asked = {"messages": MESSAGES} if endpoint.startswith("chat") else {"prompt": "w6"}
    status, error = post(client, asked | fields, endpoint)
    assert status == 400 and error["param"] == param
    check_sentence(error["message"], problem)


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
    assert (status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    check_sentence(error["message"], f"{name} is not supported by this server: leave it out")


def test_every_unsupported_option_is_covered_and_does_nothing_at_its_neutral_value(client):
    assert {name for chat, option in UNSUPPORTED if not chat for name in option} == set(NEUTRAL_COMPLETION)
    assert {name for chat, option in UNSUPPORTED if chat for name in option} | {
        "metadata",
        "store",
        "service_tier",
        "presence_penalty",
        "frequency_penalty",
    } == set(NEUTRAL_CHAT)
    plain = complete(client, seed=1).choices[0].text
    for place in range(2):
        neutral = {name: values[place] if place < len(values) else None for name, values in NEUTRAL_COMPLETION.items()}
        body = {"model": "tiny", "prompt": "w6 w7 w8", "seed": 1, "user": "me", "length_guidance": None, **neutral}
        answer = requests.post(f"{client.base_url}completions", json=body, timeout=20).json()
        assert answer["choices"][0]["text"] == plain
        neutral = {name: values[place] if place < len(values) else None for name, values in NEUTRAL_CHAT.items()}
        chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **neutral}
        assert requests.post(f"{client.base_url}chat/completions", json=chat, timeout=20).status_code == 200
    assert requests.post(f"{client.base_url}completions", json={**body, "n": 3, "best_of": 3}, timeout=20).ok


PROMPTS = [
    (None, "prompt is missing"),
    ("", "has no tokens"),
    ("  ", "has no tokens"),
    ([], "prompt must be a text or a list of token ids"),
    ({}, "prompt must be a text or a list of token ids"),
    (["w6", "w7"], "send one request for each"),
    ([[6], [7]], "send one request for each"),
    ([6, "w7"], "prompt must be a text or a list of token ids (integers)"),
    ([6, True], "prompt must be a text or a list of token ids (integers)"),
    ([6, 64], "64 is no token id: the vocabulary has 64 tokens"),
    ([6, -1], "-1 is no token id"),
    ("w6 \ud800", "prompt is not valid Unicode"),
    ("w6 " * 497, "The prompt has 497 tokens and 16 more are asked for, but the model's context is 512: shorten"),
    ("w6 " * 5000, "The prompt has 15000 characters, the context holds 6656 at most"),
]


@pytest.mark.parametrize(("prompt", "problem"), PROMPTS)
def test_bad_prompts_are_refused(client, prompt, problem):
    status, error = post(client, {"prompt": prompt})
    assert status == 400 and error["param"] == "prompt"
    assert (error["code"] == "context_length_exceeded") == ("context" in problem)
    check_sentence(error["message"], problem)


def test_a_prompt_that_just_fits_is_served(client):
    assert complete(client, "w6 " * 496).usage.prompt_tokens == 496
    assert complete(client, ["w6 w7"]).usage.prompt_tokens == complete(client, [[6, 7]]).usage.prompt_tokens == 2


CHATS = [
    (None, "messages", "messages is missing"),
    ([], "messages", "messages must not be empty"),
    (["w6"], "messages[0]", "messages[0] must be an object"),
    ([{"content": "w6"}], "messages[0].role", "messages[0].role is missing"),
    ([*MESSAGES, {"role": "tool", "content": "w6"}], "messages[2].role", 'got "tool"'),
    ([{"role": ["user"], "content": "w6"}], "messages[0].role", "should be 'system', 'user' or 'assistant'"),
    ([{"role": "user"}], "messages[0].content", "messages[0].content is missing"),
    ([{"role": "user", "content": 5}], "messages[0].content", "content must be a text, got 5"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content", "parts of type text only"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content", "parts of type text only"),
    ([{"role": "user", "content": "\udfff"}], "messages[0].content", "is not valid Unicode"),
    ([{"role": "user", "content": "w6", "name": "Ada"}], "messages[0].name", "unknown or not supported here"),
    ([{"role": "user", "content": "w6 " * 600}], "messages", "shorten messages or lower max_tokens"),
]


@pytest.mark.parametrize(("messages", "param", "problem"), CHATS)
def test_bad_chats_are_refused(client, messages, param, problem):
    status, error = post(client, {"messages": messages}, "chat/completions")
    assert status == 400 and error["param"] == param
    check_sentence(error["message"], problem)


def test_an_answer_can_be_sent_back(client):
    """What the client gives of a message holds fields that are null."""
    said = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4).choices[0].message
    messages = [*MESSAGES, said.model_dump(), {"role": "user", "content": "w8"}]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=4).choices


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"hello"', "must be a JSON object"),
        (b"{}", "model is missing"),
        (b'{"model": 5}', "model must be a text, got 5"),
    ],
)
def test_bodies_that_say_nothing_are_refused(client, body, problem):
    for endpoint in ("completions", "chat/completions"):
        status, error = post(client, body, endpoint)
        assert status == 400
        check_sentence(error["message"], problem)


def test_other_models_and_places_are_not_found(client):
    with pytest.raises(openai.NotFoundError, match="The model \"gpt-4\" is not served here: say 'tiny'") as caught:
        client.completions.create(model="gpt-4", prompt="w6")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("some/other")
    with pytest.raises(openai.NotFoundError, match="There is no POST /v1/embeddings here"):
        client.embeddings.create(model="tiny", input="w6")
    assert requests.get(f"{client.base_url}completions", timeout=20).status_code == 405


def test_a_vocabulary_too_large_to_score_needs_truncation():
    tokenizer = tiny_tokenizer(5000)
    value = tiny_length_value_model(tiny_llama(5000), tokenizer=tokenizer).freeze()
    with serving(Engine(tiny_llama(5000), value, tokenizer, "tiny")) as client:
        with pytest.raises(openai.BadRequestError, match="all 5000 tokens are scored.*set top_k"):
            complete(client, guidance={"strength": 1.0})
        assert complete(client, guidance={"strength": 1.0, "top_k": 8}).choices
        assert complete(client, guidance={"strength": 1.0}, top_p=0.5).choices
        assert complete(client).choices


def test_chats_need_a_template_that_takes_them():
    problem = "no chat template: use /v1/completions"
    with serving(scripted_engine(geometric_chain(0.5))) as client, pytest.raises(openai.BadRequestError, match=problem):
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    engine = tiny_engine()
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with serving(engine) as client, pytest.raises(openai.BadRequestError, match="template.*roles must alternate"):
        client.chat.completions.create(model="tiny", messages=MESSAGES)


class TestStart:
    """What cannot work is told before the first request."""

    def test_tokenizers(self):
        value = tiny_length_value_model(tokenizer=tiny_tokenizer()).freeze()
        with pytest.raises(ValueError, match="tokenizers of the length value model and the policy differ"):
            Engine(tiny_llama(), value, tiny_tokenizer(60), "tiny")
        with pytest.raises(ValueError, match="tokenizer of the length value model is not known"):
            Engine(tiny_llama(), tiny_length_value_model().freeze(), tiny_tokenizer(), "tiny")

    def test_settings(self):
        tokenizer = tiny_tokenizer()
        models = tiny_llama(), tiny_length_value_model(tokenizer=tokenizer).freeze(), tokenizer, "tiny"
        for name in ("max_new_tokens_limit", "max_choices", "max_waiting"):
            with pytest.raises(ValueError, match=f"{name}.* at least"):
                Engine(*models, **{name: -1})
        with pytest.raises(ValueError, match="scoring must be one of"):
            Engine(*models, scoring="quick")
        chain = geometric_chain(0.5)
        scripted = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)
        scripted[1].config.tokenizer_fingerprint = models[1].config.tokenizer_fingerprint
        with pytest.raises(ValueError, match="give max_new_tokens_limit"):
            Engine(*scripted, tokenizer, "tiny")
        models[1].train()
        unfrozen = tiny_length_value_model(tokenizer=tokenizer).train()
        with pytest.raises(ValueError, match="training mode"):
            Engine(models[0], unfrozen, tokenizer, "tiny")
