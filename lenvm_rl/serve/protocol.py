"""What requests to `lenvm_rl.serve` may say, and the bodies of its answers: OpenAI's, and what length guidance adds.

No field is ignored: what the server cannot do is refused by name, unless it is asked for at the value at which it does
nothing. Guidance, from the `extra_body` of OpenAI's client, stands in a field of its own or under the flat keys of
[`lenvm_rl.decoding.requests`]:

    {"length_guidance": {"mode": "equal_to", "target_length": 50, "top_k": 15}}
    {"length_mode": "equal_to", "length_target": 50, "length_top_k": 15}

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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.requests import KEYS, PREFIX, guidance_of_request

if TYPE_CHECKING:
    from lenvm_rl.serve.engine import Choice, Job

# From field to flat key.
FLAT = {name: key for key, name in KEYS.items()}
# Fields of OpenAI's that are not supported, which may stand at the values, in JSON, at which they do nothing.
DOES_NOTHING = {
    "best_of": ["1"], "echo": ["false"], "suffix": ['""'], "logit_bias": ["{}"], "metadata": ["{}"],
    "store": ["false"], "frequency_penalty": ["0", "0.0"], "presence_penalty": ["0", "0.0"],
    "service_tier": ['"auto"', '"default"'], "logprobs": ["false"], "top_logprobs": ["0"], "tools": ["[]"],
    "tool_choice": ['"none"', '"auto"'], "functions": ["[]"], "function_call": ['"none"'],
    "parallel_tool_calls": ["true"], "modalities": ['["text"]'], "reasoning_effort": ['"none"'],
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
        texts = (text and text.encode("utf-8", "backslashreplace").decode() for text in (str(self), self.param))
        message, param = texts
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def _without_nulls(data: Any) -> Any:
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


def _tidied(data: Any) -> Any:
    """Without the fields that do nothing, and with flat keys in the place of an object of guidance."""
    if not isinstance(data, dict):
        return data
    told = {name: value for name, value in data.items() if json.dumps(value) not in DOES_NOTHING.get(name, ())}
    if "length_guidance" not in told:
        flat = [name for name in told if name.startswith(PREFIX)]
        told["length_guidance"] = {name: told.pop(name) for name in flat}
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


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
StopString = Annotated[str, Field(min_length=1)]


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


class GenerationRequest(Body):
    """What both endpoints take; `max_completion_tokens` is another name for `max_tokens`."""

    # Such validators run from the last to the first.
    _tidy = model_validator(mode="before")(_tidied)
    model: str
    n: Count = 1
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)] | None = None
    stop: Annotated[list[StopString], Field(max_length=4), BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    # By the names of its fields and by flat keys.
    length_guidance: dict[str, Any] = {}
    # They say who asks, and change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def guidance(self, max_tokens: float, vocab_size: int) -> LengthGuidance:
        """How to guide completions of at most so many tokens; a [`RequestError`] where that makes no sense."""
        given = _without_nulls(self.length_guidance)
        flat = any(name.startswith(PREFIX) for name in given)
        stated = {FLAT.get(name, name if flat else PREFIX + name): value for name, value in given.items()}
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

    prompt_field: ClassVar[str] = "prompt"
    # As at OpenAI; a chat goes on as far as context and limit allow.
    default_tokens: ClassVar[int | None] = 16
    prompt: Annotated[Any, BeforeValidator(_one_prompt)]


class ChatRequest(GenerationRequest):
    """A request of the chat endpoint."""

    prompt_field: ClassVar[str] = "messages"
    default_tokens: ClassVar[int | None] = None
    messages: Annotated[list[Message], Field(min_length=1)]

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
        unknown = first["type"] == "extra_forbidden"
        message = f"{place[:80]}: {first['msg']} (got {json.dumps(first['input'], default=str)[:80]})."
        if unknown and place in KEYS.values():
            message = f"{place} is a setting of length guidance: write it into length_guidance."
        raise RequestError(message, place, "unknown_parameter" if unknown else None) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request's body is not JSON ({error}): send a JSON object.") from error
    if request.model != served:
        message = f"The model {request.model!r} is not served here: say {served!r}."
        raise RequestError(message, "model", "model_not_found", 404)
    return request


class Answer:
    """Writes the answer to one job, whole, or in chunks: what is new, and then the last ones."""

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
                role = {} if characters or tokens else {"role": "assistant"}
                content = {"delta": {**role, "content": text}} if self.chat else {"text": text}
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
