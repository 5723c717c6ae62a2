"""What a request to `lenvm_rl.serve` may say: the OpenAI fields that are honoured, and the knobs of length guidance.

Every field is checked, and none is ignored: what the server cannot do is refused by name, unless it is asked for at the
value at which it does nothing. The guidance stands in a field of its own, where the `extra_body` of OpenAI's client
puts it: ``"length_guidance": {"mode": "equal_to", "target_length": 50, "top_k": 64}``.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from typing import Any

from lenvm_rl.guidance import LengthGuidance

# `temperature` and `top_p` are OpenAI's own and stay at the top of the request.
KNOBS = tuple(field.name for field in fields(LengthGuidance) if field.name not in ("temperature", "top_p"))
# As the completions endpoint of OpenAI; a chat goes on as far as context and limit allow.
DEFAULT_COMPLETION_TOKENS = 16
MAX_STOP_STRINGS = 4
MAX_TEMPERATURE = 2.0
# Beyond these, float32 scores overflow; the distribution has been on one token for long.
MIN_TEMPERATURE = 1e-6
SEEDS = (-(2**63), 2**63 - 1)

SAMPLING_FIELDS = ("model", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")
STREAM_FIELDS = ("stream", "stream_options", "return_token_ids")
# They say who asks, and change no answer.
CALLER_FIELDS = ("user", "safety_identifier", "prompt_cache_key")
HONOURED = (*SAMPLING_FIELDS, *STREAM_FIELDS, *CALLER_FIELDS, "length_guidance")
# Fields of OpenAI's that are not supported, with the values at which they do nothing; null always does nothing.
NEUTRAL = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
NEUTRAL_COMPLETION = {**NEUTRAL, "best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",)}
NEUTRAL_CHAT = {
    **NEUTRAL,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
ROLES = ("system", "user", "assistant")


class RequestError(ValueError):
    """A request that is not served, told in OpenAI's words.

    Args:
        message (`str`): what to change.
        param (`str`, *optional*): the field at fault.
        code (`str`, *optional*): a name for programs.
        status (`int`, *optional*, defaults to `400`): HTTP status.
        kind (`str`, *optional*, defaults to `"invalid_request_error"`): what OpenAI calls the type of the error.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.param, self.code, self.status, self.kind = param, code, status, kind

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class GenerationRequest:
    """One request, checked as far as it can be without the models.

    Args:
        prompt (`str`, list of `int` or list of `dict`): text, token ids, or messages.
        chat (`bool`): whether the prompt is messages.
        guidance ([`~lenvm_rl.guidance.LengthGuidance`]): with the request's temperature and top-p.
        n (`int`): choices.
        max_tokens (`int`, *optional*): most tokens of a choice, end-of-sequence counted.
        max_tokens_field (`str`): what the request calls it.
        seed (`int`, *optional*): makes the answer reproducible.
        stop (tuple of `str`): strings that end a choice.
        stream (`bool`): whether to answer in pieces.
        include_usage (`bool`): whether the pieces end with token counts.
        return_token_ids (`bool`): whether to give the ids of prompt and choices.
    """

    prompt: Any
    chat: bool
    guidance: LengthGuidance
    n: int = 1
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False

    @property
    def prompt_field(self) -> str:
        """What the request calls its prompt."""
        return "messages" if self.chat else "prompt"


def read_json(body: bytes) -> dict[str, Any]:
    """The request as JSON says it; a [`RequestError`] if it is no JSON object."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request's body is not JSON ({error}): send a JSON object.") from error
    if not isinstance(request, dict):
        raise RequestError('The request\'s body must be a JSON object, such as {"model": …, "prompt": …}.')
    return request


def read_request(body: dict[str, Any], *, chat: bool, max_choices: int) -> GenerationRequest:
    """A request that is understood.

    Args:
        body (`dict`): the request's JSON.
        chat (`bool`): whether it is one of the chat endpoint.
        max_choices (`int`): largest `n`.

    Raises:
        RequestError: on a field that is unknown, unsupported or of the wrong type or size, with its name.
    """
    n = _integer(body, "n", 1, 1, max_choices)
    _check_fields(body, chat, n)
    max_tokens, max_tokens_field = _max_tokens(body, chat)
    stream = _boolean(body, "stream")
    return GenerationRequest(
        prompt=_messages(body) if chat else _prompt(body),
        chat=chat,
        guidance=_guidance(body),
        n=n,
        max_tokens=max_tokens,
        max_tokens_field=max_tokens_field,
        seed=_integer(body, "seed", None, *SEEDS),
        stop=_stop(body),
        stream=stream,
        include_usage=_include_usage(body, stream),
        return_token_ids=_boolean(body, "return_token_ids"),
    )


def read_model(body: dict[str, Any], served: str) -> None:
    """Raises a [`RequestError`] unless the request is for the model that is served."""
    model = body.get("model")
    if not isinstance(model, str):
        raise RequestError(f"model must be a string, got {_shown(model)}: say {served!r}.", "model")
    if model != served:
        raise RequestError(
            f"The model {_shown(model)} is not served here: say {served!r}.", "model", "model_not_found", status=404
        )


def _check_fields(body: dict[str, Any], chat: bool, n: int) -> None:
    neutral = NEUTRAL_CHAT if chat else {**NEUTRAL_COMPLETION, "best_of": (1, n)}
    for name, value in body.items():
        if name in HONOURED or name == ("messages" if chat else "prompt"):
            continue
        if name in KNOBS:
            raise RequestError(f"{name} is a knob of length guidance: write it into length_guidance.", name)
        if name not in neutral:
            raise RequestError(f"The field {_shown(name)} is unknown here: leave it out.", name, "unknown_parameter")
        if value is not None and not any(type(value) is type(one) and value == one for one in neutral[name]):
            raise RequestError(
                f"{name} is not supported by this server: leave it out (got {_shown(value)}).",
                name,
                "unsupported_parameter",
            )
    for name in CALLER_FIELDS:
        if not isinstance(body.get(name), str | None):
            raise RequestError(f"{name} must be a string, got {_shown(body[name])}.", name)


def _max_tokens(body: dict[str, Any], chat: bool) -> tuple[int | None, str]:
    names = ("max_completion_tokens", "max_tokens")
    given = [name for name in names if body.get(name) is not None]
    if len(given) == 2 and body[names[0]] != body[names[1]]:
        raise RequestError("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
    name = given[0] if given else "max_tokens"
    return _integer(body, name, None if chat else DEFAULT_COMPLETION_TOKENS, 1, SEEDS[1]), name


def _guidance(body: dict[str, Any]) -> LengthGuidance:
    temperature = _number(body, "temperature", 1.0, 0.0, MAX_TEMPERATURE)
    if 0 < temperature < MIN_TEMPERATURE:
        raise RequestError(f"temperature is {temperature}: say 0 for greedy decoding.", "temperature")
    top_p = _number(body, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise RequestError("top_p must be above 0: say temperature 0 for greedy decoding.", "top_p")
    knobs = body.get("length_guidance")
    knobs = {} if knobs is None else knobs
    if not isinstance(knobs, dict):
        raise RequestError(
            f'length_guidance must be an object such as {{"strength": 5}}, got {_shown(knobs)}.', "length_guidance"
        )
    for name, value in knobs.items():
        if name in ("temperature", "top_p"):
            raise RequestError(f"{name} belongs at the top of the request, beside model.", f"length_guidance.{name}")
        if name not in KNOBS:
            raise RequestError(
                f"length_guidance has no field {_shown(name)}: its fields are {', '.join(KNOBS)}.",
                f"length_guidance.{name}",
                "unknown_parameter",
            )
        if isinstance(value, int) and not SEEDS[0] <= value <= SEEDS[1]:
            raise RequestError(f"{name} is out of range: write a smaller number.", f"length_guidance.{name}")
    knobs = {name: value for name, value in knobs.items() if value is not None}
    try:
        return LengthGuidance(temperature=float(temperature), top_p=float(top_p), **knobs)
    except ValueError as error:
        # Its messages begin with the name of the field.
        first = re.match(r"\w*", str(error)).group()
        raise RequestError(str(error), f"length_guidance.{first}" if first in KNOBS else "length_guidance") from error


def _prompt(body: dict[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _text(prompt, "prompt")
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"prompt must be a text or a list of token ids, got {_shown(prompt)}.", "prompt")
    if isinstance(prompt[0], str | list):
        raise RequestError("prompt holds several prompts: send one request for each.", "prompt")
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in prompt):
        raise RequestError("prompt must be a text or a list of token ids (integers).", "prompt")
    return prompt


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages must be a list of at least one message, got {_shown(messages)}.", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"{place} must be an object with role and content, got {_shown(message)}.", place)
    if message.get("role") not in ROLES:
        raise RequestError(
            f"{place}.role must be one of {', '.join(ROLES)}, got {_shown(message.get('role'))}.", f"{place}.role"
        )
    for name, value in message.items():
        if name not in ("role", "content") and value is not None:
            raise RequestError(f"{place}.{name} is not supported by this server: leave it out.", f"{place}.{name}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}.content") for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{place}.content must be a text, got {_shown(content)}.", f"{place}.content")
    return {"role": message["role"], "content": _text(content, f"{place}.content")}


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RequestError(f"{place} may hold parts of type text only, got {_shown(part)}.", place)


def _text(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{place} is not valid Unicode ({error.reason}): send UTF-8.", place) from error
    return text


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    several = [] if stop is None else [stop] if isinstance(stop, str) else stop
    good = isinstance(several, list) and len(several) <= MAX_STOP_STRINGS
    if not (good and all(isinstance(one, str) and one for one in several)):
        raise RequestError(
            f"stop must be a text that is not empty, or a list of at most {MAX_STOP_STRINGS}, got {_shown(stop)}.",
            "stop",
        )
    return tuple(several)


def _include_usage(body: dict[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options is for streams: set stream to true, or leave it out.", "stream_options")
    if not isinstance(options, dict):
        raise RequestError(f"stream_options must be an object, got {_shown(options)}.", "stream_options")
    for name, value in options.items():
        if name != "include_usage" and not (name == "include_obfuscation" and value in (None, False)):
            raise RequestError(
                f"stream_options.{name} is not supported by this server: leave it out.", f"stream_options.{name}"
            )
    return _boolean(options, "include_usage", "stream_options.")


def _boolean(body: dict[str, Any], name: str, place: str = "") -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise RequestError(f"{place}{name} must be true or false, got {_shown(value)}.", place + name)
    return bool(value)


def _integer(body: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}, got {_shown(value)}.", name)
    return value


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {_shown(value)}.", name)
    return value


def _shown(value: Any) -> str:
    """A value in an error, cut where it is long; NaN and infinity as JSON writers spell them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "an infinite number"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else text[:77] + "…"
