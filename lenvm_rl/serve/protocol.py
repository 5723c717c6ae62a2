"""What a request to `lenvm_rl.serve` may say: the OpenAI fields that are honoured, and the knobs of length guidance.

Every field is checked, and none is ignored: what the server cannot do is refused by name, unless it is asked for at the
value at which it does nothing. The guidance stands in a field of its own, where the `extra_body` of OpenAI's client
puts it: ``"length_guidance": {"mode": "equal_to", "target_length": 50, "top_k": 64}``.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lenvm_rl.decoding.guidance import LengthGuidance

# `temperature` and `top_p` are OpenAI's own and stay at the top of the request.
KNOBS = tuple(field.name for field in fields(LengthGuidance) if field.name not in ("temperature", "top_p"))
MAX_STOP_STRINGS = 4
# Below this, float32 scores overflow; the distribution has been on one token for long.
MIN_TEMPERATURE = 1e-6
INTEGERS = (-(2**63), 2**63 - 1)

# Fields of OpenAI's that are not supported, with the values at which they do nothing; null always does nothing.
NEUTRAL = {"logit_bias": ({},), "metadata": ({},), "store": (False,), "service_tier": ("auto", "default")}
NEUTRAL |= {"frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0)}
NEUTRAL_COMPLETION = {**NEUTRAL, "best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",)}
NEUTRAL_CHAT = NEUTRAL | dict.fromkeys(("audio", "moderation", "prediction", "verbosity", "web_search_options"), ())
NEUTRAL_CHAT |= {"function_call": ("none",), "functions": ([],), "tool_choice": ("none", "auto"), "tools": ([],)}
NEUTRAL_CHAT |= {"logprobs": (False,), "modalities": (["text"],), "parallel_tool_calls": (True,)}
NEUTRAL_CHAT |= {"reasoning_effort": ("none",), "response_format": ({"type": "text"},), "top_logprobs": (0,)}
# Characters of an error, which may quote what it is about.
MAX_MESSAGE = 400
# What OpenAI calls the type of an error, by its status.
TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
# In place of pydantic's words, which are those of Python.
SENTENCES = {"bool_type": "must be true or false", "string_type": "must be a text", "too_short": "must not be empty"}
SENTENCES |= dict.fromkeys(("model_type", "dict_type"), "must be an object")


class RequestError(ValueError):
    """A request that is not served, told in OpenAI's words.

    Args:
        message (`str`): what to change.
        param (`str`, *optional*): the field at fault.
        code (`str`, *optional*): a name for programs.
        status (`int`, *optional*, defaults to `400`): HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…")
        # A name that is no Unicode cannot be sent.
        param = None if param is None else param.encode("utf-8", "backslashreplace").decode()
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _without_nulls(data: Any) -> Any:
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


def _unicode(text: str) -> str:
    if re.search("[\ud800-\udfff]", text):
        raise ValueError("is not valid Unicode (send UTF-8)")
    return text


def _one_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError("holds several prompts (send one request for each)")
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _unicode(prompt)
    if not isinstance(prompt, list) or {*map(type, prompt)} != {int}:
        raise ValueError("must be a text or a list of token ids (integers)")
    return prompt


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError("may hold parts of type text only, each with its text")
    return "".join(texts)


def _stop_strings(stop: Any) -> list[str]:
    several = [stop] if isinstance(stop, str) else stop
    texts = isinstance(several, list) and all(isinstance(one, str) and one for one in several)
    if not texts or len(several) > MAX_STOP_STRINGS:
        raise ValueError(f"must be a text that is not empty, or a list of at most {MAX_STOP_STRINGS}")
    return several


Count = Annotated[int, Field(ge=1, le=INTEGERS[1])]


class Body(BaseModel):
    """A JSON object with the fields that are named and no others, each of its own type; null says nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")
    _nulls = model_validator(mode="before")(_without_nulls)


class Message(Body):
    """A message of a chat; its content may come in parts of text."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined), AfterValidator(_unicode)]


class StreamOptions(Body):
    """How a stream is written."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(Body):
    """What both endpoints take, checked as far as it can be without the models.

    Args:
        model (`str`): what the policy is called here.
        n (`int`): choices.
        max_tokens, max_completion_tokens (`int`): most tokens of a choice, end-of-sequence counted; two names for one.
        temperature, top_p (`float`): as in [`~lenvm_rl.decoding.LengthGuidance`].
        seed (`int`): makes the answer reproducible.
        stop (`str` or list of them): strings that end a choice.
        stream, stream_options: whether to answer in pieces, and whether these end with token counts.
        return_token_ids (`bool`): whether to give the ids of prompt and choices.
        length_guidance (`dict`): the other fields of [`~lenvm_rl.decoding.LengthGuidance`].
        user, safety_identifier, prompt_cache_key (`str`): they say who asks, and change no answer.
    """

    model: str
    n: Count = 1
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=INTEGERS[0], le=INTEGERS[1])] | None = None
    stop: Annotated[list[str], BeforeValidator(_stop_strings)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    length_guidance: dict[str, Any] = {}
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def max_tokens_field(self) -> str:
        """What the request calls the most tokens of a choice."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @cached_property
    def guidance(self) -> LengthGuidance:
        """How to guide; a [`RequestError`] where that makes no sense."""
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise RequestError(f"temperature is {self.temperature}: say 0 for greedy decoding.", "temperature")
        for name in self.length_guidance:
            if name not in KNOBS:
                message = f"length_guidance has no field {_shown(name)}: its fields are {', '.join(KNOBS)}."
                if name in ("temperature", "top_p"):
                    message = f"{name} belongs at the top of the request, beside model."
                raise RequestError(message, f"length_guidance.{name}", "unknown_parameter")
        try:
            knobs = _without_nulls(self.length_guidance)
            return LengthGuidance(temperature=self.temperature, top_p=self.top_p, **knobs)
        except ValueError as error:
            # Its messages begin with the name of the field.
            first = re.match(r"\w*", str(error)).group()
            place = f"length_guidance.{first}" if first in KNOBS else "length_guidance"
            raise RequestError(str(error), place) from error


class CompletionRequest(GenerationRequest):
    """A request of the completions endpoint: its prompt is a text, or token ids."""

    prompt_field: ClassVar[str] = "prompt"
    neutral: ClassVar[dict[str, tuple]] = NEUTRAL_COMPLETION
    # As at OpenAI; a chat goes on as far as context and limit allow.
    default_tokens: ClassVar[int | None] = 16
    prompt: Annotated[Any, AfterValidator(_one_prompt)]


class ChatRequest(GenerationRequest):
    """A request of the chat endpoint."""

    prompt_field: ClassVar[str] = "messages"
    neutral: ClassVar[dict[str, tuple]] = NEUTRAL_CHAT
    default_tokens: ClassVar[int | None] = None
    messages: Annotated[list[Message], Field(min_length=1)]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages, as chat templates take them."""
        return [message.model_dump() for message in self.messages]


def read_request(body: bytes, kind: type[GenerationRequest], served: str) -> GenerationRequest:
    """The request of a kind that a body holds as JSON, for the model that is served.

    Raises:
        RequestError: on a field that is unknown, unsupported or of the wrong type or size, with its name; on another
            model.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request's body is not JSON ({error}): send a JSON object.") from error
    if not isinstance(request, dict):
        raise RequestError('The request\'s body must be a JSON object, such as {"model": …, "prompt": …}.')
    try:
        asked = kind.model_validate(_supported(_without_nulls(request), kind.neutral))
    except ValidationError as error:
        raise _refusal(error.errors()[0]) from error
    check_model(asked.model, served)
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise RequestError("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
    if "stream_options" in asked.model_fields_set and not asked.stream:
        raise RequestError("stream_options is for streams: set stream to true, or leave it out.", "stream_options")
    return asked


def check_model(name: str, served: str) -> None:
    """Raises a [`RequestError`] unless the model is the one that is served."""
    if name != served:
        message = f"The model {_shown(name)} is not served here: say {served!r}."
        raise RequestError(message, "model", "model_not_found", status=404)


def _supported(body: dict[str, Any], neutral: dict[str, tuple]) -> dict[str, Any]:
    """The fields that a request may have, without those that do nothing."""
    neutral = {**neutral, "best_of": (1, body.get("n"))} if "best_of" in neutral else neutral
    for name in body.keys() & {*neutral, *KNOBS}:
        if name in KNOBS:
            raise RequestError(f"{name} is a knob of length guidance: write it into length_guidance.", name)
        if not any(type(body[name]) is type(one) and body[name] == one for one in neutral[name]):
            message = f"{name} is not supported by this server: leave it out (got {_shown(body[name])})."
            raise RequestError(message, name, "unsupported_parameter")
    return {name: value for name, value in body.items() if name not in neutral}


def _refusal(error: dict[str, Any]) -> RequestError:
    """What pydantic found, as a sentence that begins with the field."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])[1:]
    if error["type"] == "extra_forbidden":
        message = f"The field {_shown(place)} is unknown or not supported here: leave it out."
        return RequestError(message, place, "unknown_parameter")
    if error["type"] == "missing":
        return RequestError(f"{place} is missing: say it.", place)
    problem = SENTENCES.get(error["type"]) or error["msg"].replace("Input", "").replace("Value error,", "").strip()
    return RequestError(f"{place} {problem}, got {_shown(error['input'])}.", place)


def _shown(value: Any) -> str:
    """A value in an error, cut where it is long."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else text[:77] + "…"
