"""What requests to `lenvm_rl.serve` may say, and the bodies of its answers: OpenAI's, and what length guidance adds.

No field is ignored: what the server cannot do is refused by name, unless it is asked for at the value at which it does
nothing. The guidance stands in a field of its own, where the `extra_body` of OpenAI's client puts it:
``"length_guidance": {"mode": "equal_to", "target_length": 50, "top_k": 64}``.

An answer's `length_guidance` holds `predicted_length`, what the length value model predicted at the prompt, and
`forced`, the steps at which the hard bound overruled the choice, over all choices; each choice has its own `length` and
`forced`. Lengths are in tokens, end-of-sequence not counted; `usage` counts it.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lenvm_rl.decoding.guidance import LengthGuidance

if TYPE_CHECKING:
    from lenvm_rl.serve.engine import Choice, Job

# `temperature` and `top_p` are OpenAI's own and stay at the top of the request.
KNOBS = tuple(field.name for field in fields(LengthGuidance) if field.name not in ("temperature", "top_p"))
# Below this, float32 scores overflow; the distribution has been on one token for long.
COLDEST = 1e-6
MAX_INTEGER = 2**63 - 1
# Characters of an error, which may quote what it is about.
MAX_MESSAGE = 400
# What OpenAI calls the type of an error, by its status.
TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class RequestError(Exception):
    """A request that is not served, told in OpenAI's words."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…")
        # A name that is no Unicode cannot be sent.
        param = None if param is None else param.encode("utf-8", "backslashreplace").decode()
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        message = str(self).encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def _without_nulls(data: Any) -> Any:
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


def _one_prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError("holds several prompts: send one request for each")
        prompt = prompt[0]
    if isinstance(prompt, str):
        # What is no Unicode raises an error that is a `ValueError`.
        prompt.encode()
    elif not isinstance(prompt, list) or {*map(type, prompt)} != {int}:
        raise ValueError("must be a text or a list of token ids (integers)")
    return prompt


def _joined(content: Any) -> Any:
    if isinstance(content, str):
        content.encode()
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError("may hold parts of type text only, each with its text")
    joined = "".join(texts)
    joined.encode()
    return joined


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
StopString = Annotated[str, Field(min_length=1)]
# For fields of OpenAI's that are not supported, which may stand at the values at which they do nothing.
Zero = Annotated[float, Field(ge=0, le=0)]
EmptyObject = Annotated[dict, Field(max_length=0)]
EmptyList = Annotated[list, Field(max_length=0)]


class Body(BaseModel):
    """A JSON object with the fields that are named and no others, each of its own type; null says nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")
    _nulls = model_validator(mode="before")(_without_nulls)


class Message(Body):
    """A message of a chat; its content may come in parts of text."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]


class StreamOptions(Body):
    """How a stream is written."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ResponseFormat(Body):
    """The one format that there is."""

    type: Literal["text"]


class GenerationRequest(Body):
    """What both endpoints take; `max_tokens` and `max_completion_tokens` are two names for one."""

    model: str
    n: Count = 1
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)] | None = None
    stop: Annotated[list[StopString], Field(max_length=4), BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    # The other fields of `LengthGuidance`.
    length_guidance: dict[str, Any] = {}
    # They say who asks, and change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0
    logit_bias: EmptyObject = {}
    metadata: EmptyObject = {}
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    @property
    def max_tokens_field(self) -> str:
        """What the request calls the most tokens of a choice."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @cached_property
    def guidance(self) -> LengthGuidance:
        """How to guide; a [`RequestError`] where that makes no sense."""
        for name in self.length_guidance:
            if name not in KNOBS:
                place = "stands at the top of the request" if name in ("temperature", "top_p") else "is no such field"
                message = f"length_guidance: {name!r} {place}; its fields are {', '.join(KNOBS)}."
                raise RequestError(message, f"length_guidance.{name}", "unknown_parameter")
        try:
            knobs = _without_nulls(self.length_guidance)
            return LengthGuidance(temperature=self.temperature, top_p=self.top_p, **knobs)
        except ValueError as error:
            # Its messages begin with the name of the field.
            first = re.match(r"\w*", str(error)).group()
            place = f"length_guidance.{first}" if first in KNOBS else "length_guidance"
            raise RequestError(str(error), place) from error

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        most = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(most) == 2:
            raise RequestError("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams: set stream to true, or leave it out.", "stream_options")
        if 0 < self.temperature < COLDEST:
            raise RequestError(f"temperature is {self.temperature}: say 0 for greedy decoding.", "temperature")
        return self


class CompletionRequest(GenerationRequest):
    """A request of the completions endpoint: its prompt is a text, or token ids."""

    prompt_field: ClassVar[str] = "prompt"
    # As at OpenAI; a chat goes on as far as context and limit allow.
    default_tokens: ClassVar[int | None] = 16
    prompt: Annotated[Any, BeforeValidator(_one_prompt)]
    best_of: Count | None = None
    echo: Literal[False] = False
    suffix: Literal[""] = ""

    @model_validator(mode="after")
    def _check_best(self) -> CompletionRequest:
        if self.best_of not in (None, 1, self.n):
            raise RequestError("best_of is not supported: leave it out, or say n.", "best_of")
        return self


class ChatRequest(GenerationRequest):
    """A request of the chat endpoint."""

    prompt_field: ClassVar[str] = "messages"
    default_tokens: ClassVar[int | None] = None
    messages: Annotated[list[Message], Field(min_length=1)]
    function_call: Literal["none"] = "none"
    functions: EmptyList = []
    tool_choice: Literal["none", "auto"] = "auto"
    tools: EmptyList = []
    parallel_tool_calls: Literal[True] = True
    logprobs: Literal[False] = False
    top_logprobs: Zero = 0
    modalities: list[Literal["text"]] = ["text"]
    reasoning_effort: Literal["none"] = "none"
    response_format: ResponseFormat | None = None

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages, as chat templates take them."""
        return [message.model_dump() for message in self.messages]


def read_request(body: bytes, kind: type[GenerationRequest], served: str) -> GenerationRequest:
    """The request of a kind that a body holds as JSON, for the model that is served; or a [`RequestError`]."""
    try:
        request = kind.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
        if not place:
            raise RequestError("The request's body must be a JSON object.") from error
        if first["type"] == "extra_forbidden" and place in KNOBS:
            message = f"{place} is a knob of length guidance: write it into length_guidance."
            raise RequestError(message, place, "unknown_parameter") from error
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else None
        shown = json.dumps(first["input"], default=str)[:80]
        raise RequestError(f"{place[:80]}: {first['msg']} (got {shown}).", place, code) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request's body is not JSON ({error}): send a JSON object.") from error
    check_model(request.model, served)
    return request


def check_model(name: str, served: str) -> None:
    """Raises a [`RequestError`] unless the model is the one that is served."""
    if name != served:
        raise RequestError(f"The model {name!r} is not served here: say {served!r}.", "model", "model_not_found", 404)


class Answer:
    """Writes the answer to one job, whole, or in chunks: the first ones, then what is new, then the last ones."""

    def __init__(self, job: Job, model: str):
        self.job, self.request, self.chat = job, job.request, isinstance(job.request, ChatRequest)
        self._head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        # Of each choice: characters and tokens that are sent.
        self._sent = [(0, 0)] * self.request.n
        self._finished: set[int] = set()

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, when the job is done."""
        choices = []
        for choice in self.job.choices:
            said = {"role": "assistant", "content": choice.text, "refusal": None}
            content = {"message": said} if self.chat else {"text": choice.text}
            choices.append(self._choice(choice.index, content, choice.token_ids, choice))
        return {**self._head, "choices": choices, "usage": self._usage(), **self._about_all()}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece: in a chat, they say who speaks."""
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(self._choice(index, said, [])) for index in range(self.request.n if self.chat else 0)]

    def news(self) -> Iterator[dict[str, Any]]:
        """A chunk for each choice that went on; the one that finishes the last choice says what guidance did."""
        for choice in [choice for choice in self.job.choices if choice.index not in self._finished]:
            # Read before the rest, which may grow meanwhile.
            over = choice if choice.finish_reason else None
            characters, tokens = self._sent[choice.index]
            text, ids = choice.text[characters:], choice.token_ids[tokens:]
            if text or over:
                self._sent[choice.index] = characters + len(text), tokens + len(ids)
                self._finished |= {choice.index} if over else set()
                content = {"delta": {"content": text}} if self.chat else {"text": text}
                about = self._about_all() if len(self._finished) == self.request.n else {}
                yield {**self._chunk(self._choice(choice.index, content, ids, over)), **about}

    def closing(self) -> list[dict[str, Any]]:
        """Chunks after the last piece: the counts, if they are asked for."""
        return [{**self._chunk(), "usage": self._usage()}] if self.request.include_usage else []

    def _choice(self, index: int, content: dict, ids: list[int], over: Choice | None = None) -> dict[str, Any]:
        ids = {"token_ids": ids} if self.request.return_token_ids else {}
        about = {"length_guidance": {"length": over.length, "forced": over.forced}} if over else {}
        reason = over.finish_reason if over else None
        return {"index": index, **content, "finish_reason": reason, "logprobs": None, **ids, **about}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._head, **kind, "choices": list(choices), **usage}

    def _usage(self) -> dict[str, int]:
        prompt, written = len(self.job.prompt_ids), sum(len(choice.token_ids) for choice in self.job.choices)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _about_all(self) -> dict[str, Any]:
        forced = sum(choice.forced for choice in self.job.choices)
        about = {"length_guidance": {"predicted_length": self.job.predicted_length, "forced": forced}}
        return about | ({"prompt_token_ids": self.job.prompt_ids} if self.request.return_token_ids else {})
