"""Servers that complete prompts over HTTP: what each is asked for, and what its answer says about the tokens.

| kind           | prompt goes as | sampled token ids                                              |
|----------------|----------------|----------------------------------------------------------------|
| `vllm`         | ids            | `return_token_ids` of the completions endpoint                 |
| `sglang`       | ids            | the same (since its pull request 30917, 2026)                  |
| `llama.cpp`    | ids            | `return_tokens` of its own `/completion` endpoint; its OpenAI  |
|                |                | endpoint gives ids with the log-probabilities only, and none   |
|                |                | for a token that ends inside a character                       |
| `transformers` | text           | none: the ids are made from the text again                     |
| `openai`       | text           | none; any other server with the OpenAI completions endpoint    |

Each request names every setting that changes the distribution, since servers fill what is left open from the model's
own generation config. A request asks for one completion: not every server honours more, and one that fails is then
repeated alone.

Tested against a real server: `transformers`. The other kinds follow their servers' source and documentation, and are
tested against a scripted server that answers in their form.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import requests

from lenvm_rl.sampling_jobs import SamplingSettings

logger = logging.getLogger(__name__)

# Too early, too much, or a gateway's trouble: the same request may succeed later. All of 5xx is repeated as well.
RETRIED_STATUSES = (408, 409, 423, 425, 429)


class ServerError(RuntimeError):
    """The server refused a request, or kept failing it: what it said, and what to change."""


class TemporaryServerError(ServerError):
    """A failure that may not be one the next time.

    Args:
        message (`str`): what happened.
        retry_after (`float`, *optional*, defaults to `0.0`): seconds that the server asks to wait at least.
    """

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class ServerAnswer:
    """One completion, as a server tells it.

    Args:
        text (`str`): the completion, special tokens left out.
        finish_reason (`str`): `"stop"` or `"length"`, in the server's words.
        token_ids (`list[int]`, *optional*): the sampled ids, if the server gives them.
        end_token (`int`, *optional*): the id that ended it, if the server names it.
        prompt_tokens (`int`, *optional*): tokens of the prompt, as the server counts.
        completion_tokens (`int`, *optional*): sampled tokens, the end of sequence counted.
    """

    text: str
    finish_reason: str
    token_ids: list[int] | None = None
    end_token: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class CompletionServer:
    """A server with the OpenAI completions endpoint and nothing more; the other kinds say what differs.

    Used from many threads at once.

    Args:
        url (`str`): base address with the API's version, as `http://localhost:8000/v1`.
        model (`str`): the model's name on the server.
        api_key (`str`, *optional*): sent as a bearer token.
        timeout (`float`, *optional*, defaults to `600.0`): seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `8`): times that a failed request is repeated: no connection, no
            answer in time, half an answer, a status of 408, 409, 423, 425, 429 or 5xx.
        first_delay (`float`, *optional*, defaults to `0.5`): seconds before the first repetition. Each further one
            waits twice as long, drawn between half of that and all of it so that clients do not come back together.
        longest_delay (`float`, *optional*, defaults to `30.0`): seconds that no wait exceeds, unless the server asks
            for more by `Retry-After`.
    """

    kind = "openai"
    gives_token_ids = False
    takes_token_ids = False

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 8,
        first_delay: float = 0.5,
        longest_delay: float = 30.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The server's address is {url!r}: give one like http://localhost:8000/v1.")
        if max_retries < 0 or min(timeout, first_delay, longest_delay) <= 0:
            raise ValueError(
                "max_retries must not be negative, and timeout, first_delay and longest_delay must be above 0, got "
                f"{max_retries}, {timeout}, {first_delay} and {longest_delay}."
            )
        self.url, self.model = url.rstrip("/"), model
        self.timeout, self.max_retries = timeout, max_retries
        self.first_delay, self.longest_delay = first_delay, longest_delay
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._local = threading.local()
        # Its own, so that waiting changes nobody's random numbers.
        self._random = random.Random()

    @property
    def address(self) -> str:
        """Where requests go."""
        return f"{self.url}/completions"

    def request(
        self,
        prompt: str | list[int],
        settings: SamplingSettings,
        max_tokens: int,
        seed: int,
        eos_token_ids: Sequence[int],
    ) -> dict[str, Any]:
        """The body of a request for one completion.

        Args:
            prompt (`str` or `list[int]`): ids if `takes_token_ids`, else text.
            settings (`SamplingSettings`): temperature, top-p and top-k.
            max_tokens (`int`): most tokens, the end of sequence counted.
            seed (`int`): the completion's seed.
            eos_token_ids (`Sequence[int]`): ids that end the completion, for servers that can be told.

        Raises:
            ValueError: if the server cannot be asked for one of the settings.
        """
        if settings.top_k:
            raise ValueError(
                "The OpenAI completions endpoint has no top-k: set top_k to 0, or name the kind of server "
                "(vllm, sglang, llama.cpp, transformers)."
            )
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "seed": seed,
        }

    def read(self, answer: dict[str, Any]) -> ServerAnswer:
        """An answer's contents; a `KeyError`, `TypeError` or `IndexError` where it is not what was asked for."""
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        # vLLM's name for it, and SGLang's; text where text ended the completion.
        ends = (choice.get("stop_reason"), choice.get("matched_stop"))
        return ServerAnswer(
            text=choice["text"],
            finish_reason=choice["finish_reason"],
            token_ids=choice.get("token_ids"),
            end_token=next((end for end in ends if type(end) is int), None),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
        )

    def complete(self, request: dict[str, Any], abandoned: threading.Event | None = None) -> ServerAnswer:
        """Sends a request until it is answered.

        Args:
            request (`dict`): as [`CompletionServer.request`] makes it.
            abandoned (`threading.Event`, *optional*): once set, nothing is repeated any more.

        Raises:
            ServerError: if the server refuses the request, or it failed `max_retries + 1` times.
        """
        abandoned = abandoned or threading.Event()
        for attempt in itertools.count():
            try:
                return self._try(request)
            except TemporaryServerError as error:
                if attempt == self.max_retries:
                    raise ServerError(
                        f"{self.address} failed a request {attempt + 1} times, at last: {error} Look at the server's "
                        "log; lower batch_size if it is overloaded, or raise the timeout."
                    ) from error
                delay = min(self.longest_delay, self.first_delay * 2**attempt) * self._random.uniform(0.5, 1)
                delay = max(delay, error.retry_after)
                logger.warning("%s Trying again in %.1f s (%d of %d)", error, delay, attempt + 1, self.max_retries)
                if abandoned.wait(delay):
                    raise

    def _try(self, request: dict[str, Any]) -> ServerAnswer:
        try:
            response = self._session().post(
                self.address, json=request, headers=self._headers, timeout=(min(10.0, self.timeout), self.timeout)
            )
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise TemporaryServerError(f"{self.address} gave no answer: {error}.") from error
        status, said = response.status_code, response.text[:500]
        if status >= 500 or status in RETRIED_STATUSES:
            wait = response.headers.get("Retry-After", "")
            raise TemporaryServerError(
                f"{self.address} answered {status}: {said}.", float(wait) if wait.isdigit() else 0.0
            )
        if status != 200:
            raise ServerError(
                f"{self.address} refused a request with status {status}: {said}. Check the model's name, the length of "
                "prompt and completion, and the kind of server."
            )
        try:
            answer = self.read(response.json())
        except (requests.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise TemporaryServerError(f"{self.address} gave half an answer ({error!r}): {said}.") from error
        if answer.finish_reason not in ("stop", "length"):
            raise TemporaryServerError(f"{self.address} ended a completion for the reason {answer.finish_reason!r}.")
        return answer

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        return self._local.session


class VLLMServer(CompletionServer):
    """vLLM's server."""

    kind = "vllm"
    gives_token_ids = True
    takes_token_ids = True

    def request(self, prompt, settings, max_tokens, seed, eos_token_ids):
        """See [`CompletionServer.request`]."""
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            # Both servers read -1 as every token.
            "top_k": settings.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "seed": seed,
            "stop_token_ids": list(eos_token_ids),
            "return_token_ids": True,
        }


class SGLangServer(VLLMServer):
    """SGLang's server."""

    kind = "sglang"


class LlamaCppServer(CompletionServer):
    """llama.cpp's `llama-server`; the address may end in `/v1` like the others'."""

    kind = "llama.cpp"
    gives_token_ids = True
    takes_token_ids = True

    @property
    def address(self) -> str:
        """Where requests go: beside the OpenAI endpoints, not among them."""
        return f"{self.url.removesuffix('/v1')}/completion"

    def request(self, prompt, settings, max_tokens, seed, eos_token_ids):
        """See [`CompletionServer.request`]."""
        return {
            "model": self.model,
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            # Only these, and the temperature first as everywhere else: its own order truncates before it.
            "samplers": ["temperature", "top_k", "top_p"],
            "seed": seed,
            "return_tokens": True,
        }

    def read(self, answer):
        """See [`CompletionServer.read`]."""
        reason = {"eos": "stop", "word": "stop", "limit": "length"}.get(answer["stop_type"], answer["stop_type"])
        return ServerAnswer(
            text=answer["content"],
            finish_reason=reason,
            token_ids=answer["tokens"],
            prompt_tokens=answer["tokens_evaluated"],
            completion_tokens=answer["tokens_predicted"],
        )


class TransformersServer(CompletionServer):
    """`transformers serve`.

    It refuses fields that it does not know, ignores a temperature unless told to sample, and takes both from a
    generation config in the request. A seed sets the state of the whole process, so completions follow from their
    seeds only with one request at a time (`batch_size=1`). A completion that ends with its last allowed token is
    reported as cut.
    """

    kind = "transformers"

    def request(self, prompt, settings, max_tokens, seed, eos_token_ids):
        """See [`CompletionServer.request`]."""
        sampling = {"do_sample": False}
        if settings.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
                "min_p": 0.0,
                "typical_p": 1.0,
            }
        # What is left open here is filled from the model's own generation config.
        neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": max_tokens}
        config = {**sampling, **neutral, "eos_token_id": list(eos_token_ids)}
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "seed": seed,
            "generation_config": json.dumps(config),
        }


SERVERS = {
    server.kind: server for server in (VLLMServer, SGLangServer, LlamaCppServer, TransformersServer, CompletionServer)
}


def connect(kind: str, url: str, model: str, **options: Any) -> CompletionServer:
    """The client of a server.

    Args:
        kind (`str`): `"vllm"`, `"sglang"`, `"llama.cpp"`, `"transformers"` or `"openai"` (any other).
        url, model, options: see [`CompletionServer`].

    Raises:
        ValueError: for another kind, or an address that is none.
    """
    if kind not in SERVERS:
        raise ValueError(f"There is no kind of server {kind!r}: give one of {', '.join(SERVERS)}.")
    return SERVERS[kind](url, model, **options)
