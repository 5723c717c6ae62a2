"""What requests to `lenvm_rl.serve` may say: what OpenAI's may, and how length guidance is asked for.

No field is ignored: what the server cannot do is refused by name, unless it is asked for at the value at which it does
nothing. Guidance, from the `extra_body` of OpenAI's client, stands in a field of its own or under the flat keys of
[`lenvm_rl.decoding.requests`]:

    {"length_guidance": {"mode": "equal_to", "target_length": 50, "top_k": 15}}
    {"length_mode": "equal_to", "length_target": 50, "length_top_k": 15}
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.requests import KEYS, PREFIX, guidance_of_request

# From field to flat key.
FLAT = {name: key for key, name in KEYS.items()}
# Fields of OpenAI's that are not supported, which may stand at the values, in JSON, at which they do nothing.
DOES_NOTHING = {
    "best_of": ["1"], "echo": ["false"], "logit_bias": ["{}"], "store": ["false"], "frequency_penalty": ["0", "0.0"],
    "presence_penalty": ["0", "0.0"], "service_tier": ['"auto"', '"default"'], "logprobs": ["false"], "tools": ["[]"],
    "top_logprobs": ["0"], "tool_choice": ['"none"', '"auto"'], "parallel_tool_calls": ["true"],
    "response_format": ['{"type": "text"}'],
}  # fmt: skip
MAX_INTEGER = 2**63 - 1
# Characters of an error, which may quote what it is about.
MAX_MESSAGE = 400


class RequestError(Exception):
    """A request that is not served, told in OpenAI's words."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…")
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        # What is no Unicode cannot be sent.
        message, param = (t and t.encode("utf-8", "backslashreplace").decode() for t in (str(self), self.param))
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def _without_nulls(data: Any) -> Any:
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


def _tidied(data: Any) -> Any:
    """Without what says nothing, and with flat keys in the place of an object of guidance."""
    told = _without_nulls(data)
    if isinstance(told, dict):
        for name in DOES_NOTHING.keys() & told.keys():
            if json.dumps(told[name]) in DOES_NOTHING[name]:
                del told[name]
        if "length_guidance" not in told:
            told["length_guidance"] = {name: told.pop(name) for name in list(told) if name.startswith(PREFIX)}
        # Two names for one.
        if (most := told.get("max_completion_tokens")) == told.setdefault("max_tokens", most):
            told.pop("max_completion_tokens", None)
    return told


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
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise ValueError("may hold parts of type text only, each with its text")
        content = "".join(texts)
    if isinstance(content, str):
        content.encode()
    return content


class Message(BaseModel):
    """A message of a chat; its content may come in parts of text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]


Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
StopString = Annotated[str, Field(min_length=1)]
AsList = BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)


class GenerationRequest(BaseModel):
    """What both endpoints take, each field of its own type, and no other; null says nothing. `max_completion_tokens` is
    another name for `max_tokens`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    _tidy = model_validator(mode="before")(_tidied)
    model: str
    n: Count = 1
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)] | None = None
    stop: Annotated[list[StopString], Field(max_length=4), AsList] = []
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = {}
    return_token_ids: bool = False
    length_guidance: dict[str, Any] = {}
    user: str | None = None

    def guidance(self, max_tokens: float, vocab_size: int) -> LengthGuidance:
        """How to guide completions of at most so many tokens; a [`RequestError`] where that makes no sense."""
        given = _without_nulls(self.length_guidance)
        flat = any(name.startswith(PREFIX) for name in given)
        stated = {FLAT.get(name, PREFIX + name.removeprefix(PREFIX)): value for name, value in given.items()}
        if stated and self.top_p < 1 and stated.setdefault(FLAT["top_p"], self.top_p) != self.top_p:
            raise RequestError("top_p and the top_p of length guidance differ: leave one out.", "top_p")
        try:
            guidance = guidance_of_request(stated, self.temperature, max_tokens, vocab_size=vocab_size)
            return guidance or LengthGuidance(temperature=self.temperature, top_p=self.top_p)
        except ValueError as error:
            # Its messages begin with the name of a field or of its key.
            first = re.match(r"[^\s=]*", str(error)).group()
            key = FLAT.get(first, first)
            name = key if flat else KEYS.get(key, key.removeprefix(PREFIX))
            place = name if flat or first == "temperature" else f"length_guidance.{name}"
            raise RequestError(str(error).replace(key, name), place) from error


class CompletionRequest(GenerationRequest):
    """A request of the completions endpoint: its prompt is a text, or token ids."""

    prompt: Annotated[Any, BeforeValidator(_one_prompt)]


class ChatRequest(GenerationRequest):
    """A request of the chat endpoint."""

    messages: Annotated[list[Annotated[Message, BeforeValidator(_without_nulls)]], Field(min_length=1)]


def read_request(body: bytes, kind: type[GenerationRequest], served: str) -> GenerationRequest:
    """The request of a kind that a body holds as JSON, for the model that is served; or a [`RequestError`]."""
    try:
        request = kind.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors()[0]
        parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"] if part != "[key]"]
        place = "".join(parts)[1:]
        if not place:
            raise RequestError("The request's body must be a JSON object.") from error
        unknown = first["type"] == "extra_forbidden"
        message = f"{place[:80]}: {first['msg']} (got {json.dumps(first['input'], default=str)[:80]})."
        if unknown and place in KEYS.values():
            message = f"{place} is a setting of length guidance: write it into length_guidance."
        raise RequestError(message, place, "unknown_parameter" if unknown else None) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request's body is not JSON ({error}): send a JSON object.") from error
    if request.model != served:
        raise RequestError(f"{request.model!r} is not served here: say {served!r}.", "model", "model_not_found", 404)
    return request
