"""Rollouts from a server: many requests at once, each repeated until it is answered, token ids kept where they are.

Where a server gives text only, its ids are made from the text again. That has to be asked for (`retokenize=True`), is
checked against the number of tokens that the server counts, and is reported (see `lenvm_rl.rollouts.retokenization`).
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import requests
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lenvm_rl.endings import strip_completion
from lenvm_rl.rollouts.job import Prompt, SamplingJob, SamplingSettings, run_to_file
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.rollouts.retokenization import retokenization_columns, retokenization_report, retokenize


def sample_from_server(
    path: str | os.PathLike,
    server: CompletionServer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    seed: int,
    extra_columns: dict[str, Sequence[Any]] | None = None,
    eos_token_ids: Sequence[int] | None = None,
    retokenize: bool = False,
    generator: str | None = None,
) -> tuple[Dataset, RolloutMetadata]:
    """Samples completions of a server's model into a rollout file.

    Killed at any moment and started again with the same arguments (the address and `batch_size` may change), it asks
    for no finished completion again.

    Args:
        path (`str` or `os.PathLike`): a name that ends in `.jsonl` or `.parquet`.
        server ([`~lenvm_rl.rollouts.server.CompletionServer`]): as `lenvm_rl.rollouts.server.connect` makes it.
        tokenizer (`PreTrainedTokenizerBase`): that of the server's model.
        prompts, extra_columns: see [`~lenvm_rl.rollouts.job.SamplingJob`].
        settings ([`~lenvm_rl.rollouts.SamplingSettings`]): `batch_size` is the number of requests under way at
            once.
        seed (`int`): decides the seed of every request. The same completions come back only from a server that keeps
            to seeds, and few do whatever else they are computing at the time.
        eos_token_ids (`Sequence[int]`, *optional*, defaults to the tokenizer's): every id that ends a completion.
        retokenize (`bool`, *optional*, defaults to `False`): make token ids from text if the server gives none. The
            records then have the columns `completion_text`, `length_error` and `text_changed`.
        generator (`str`, *optional*, defaults to the model's name on the server): what the metadata calls the policy.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: as `read_rollouts` gives them.

    Raises:
        ValueError: see [`ServerJob`] and [`~lenvm_rl.rollouts.job.run_to_file`].
        ServerError: if the server refuses a request or keeps failing; what was finished before is kept.
    """
    job = ServerJob(
        server,
        tokenizer,
        prompts,
        settings,
        seed=seed,
        extra_columns=extra_columns,
        eos_token_ids=eos_token_ids,
        retokenize=retokenize,
    )
    return run_to_file(path, job, generator or server.model)


class ServerJob(SamplingJob):
    """A sampling job whose completions come from a server.

    Args:
        server, retokenize: see [`sample_from_server`].
        others: see [`~lenvm_rl.rollouts.job.SamplingJob`].

    Raises:
        ValueError: also if the server gives no token ids and `retokenize` is not set, or takes prompts as text and
            there is no text that it would turn into a prompt's ids.
    """

    engine = "server"

    def __init__(
        self,
        server: CompletionServer,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        retokenize: bool = False,
        **others: Any,
    ):
        super().__init__(tokenizer, prompts, settings, **others)
        self.server = server
        if not server.gives_token_ids and not retokenize:
            raise ValueError(
                f"A server of the kind {server.kind!r} gives text, not the token ids that were sampled, and labels "
                "made from a text's tokens can be off. Use a server that gives ids (vllm, sglang, llama.cpp), or set "
                "retokenize=True and look at sampling['retokenization'] in the metadata."
            )
        self.requested: list[str] | list[list[int]] = self.prompt_ids
        if not server.takes_token_ids:
            self.requested = [self._prompt_text(index) for index in range(len(self.prompts))]

    def description(self):
        """See [`~lenvm_rl.rollouts.job.SamplingJob.description`]."""
        token_ids = "sampled" if self.server.gives_token_ids else "retokenized"
        return {"server": self.server.kind, "model": self.server.model, "token_ids": token_ids}

    def report(self, records):
        """See [`~lenvm_rl.rollouts.job.SamplingJob.report`]."""
        return {} if self.server.gives_token_ids else {"retokenization": retokenization_report(records)}

    def sample(self, steps: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.sample`]; the records come in the order of the answers."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[int, ServerAnswer | Exception]] = queue.SimpleQueue()
        abandoned = threading.Event()
        for number in steps:
            waiting.put(number)

        def work() -> None:
            while not abandoned.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers.put((number, self.server.complete(self._request(number), abandoned)))
                except Exception as error:  # raised again below, by the thread that consumes
                    answers.put((number, error))

        # Daemons, so that nobody who stops the program waits for requests that are under way.
        for _ in range(min(self.settings.batch_size, len(steps))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in steps:
                number, answer = answers.get()
                if isinstance(answer, Exception):
                    answer.add_note(f"This was for a completion of prompt {self.prompt_of(number)}.")
                    raise answer
                yield number, [self._record(number, answer)]
        finally:
            abandoned.set()

    def _prompt_text(self, index: int) -> str:
        """What to send so that the server, which adds its tokenizer's special tokens, sees the prompt's ids."""
        prompt = self.prompts[index]
        if not isinstance(prompt, str):
            prompt = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for text in (prompt, prompt.removeprefix(self.tokenizer.bos_token or "")):
            if list(self.tokenizer(text)["input_ids"]) == self.prompt_ids[index]:
                return text
        raise ValueError(
            f"Prompt {index} cannot be sent as text: the server would read other tokens than the chat template gives. "
            f"Use a server that takes token ids; {self.server.kind!r} does not."
        )

    def _request(self, number: int) -> dict[str, Any]:
        # Without ids, an end at the last allowed token cannot be told from a cut. One token more, and it can.
        most = self.settings.max_new_tokens + (not self.server.gives_token_ids)
        prompt = self.requested[self.prompt_of(number)]
        return self.server.request(prompt, self.settings, most, self.seed_of(number), self.eos_token_ids)

    def _record(self, number: int, answer: ServerAnswer) -> dict[str, Any]:
        prompt = self.prompt_of(number)
        if answer.prompt_tokens not in (None, len(self.prompt_ids[prompt])):
            raise ValueError(
                f"The server counts {answer.prompt_tokens} tokens in prompt {prompt}, the tokenizer "
                f"{len(self.prompt_ids[prompt])}: give the tokenizer of the server's model."
            )
        make = self._from_ids if self.server.gives_token_ids else self._from_text
        ids, finish_reason, columns = make(answer)
        return self.record(number, ids, finish_reason, **columns)

    def _from_ids(self, answer: ServerAnswer) -> tuple[list[int], str, dict[str, Any]]:
        if answer.token_ids is None:
            raise ServerError(
                f"The server gave no token ids, so it is no {self.server.kind} that knows how to: use a newer version, "
                "or the kind 'openai' with retokenize=True."
            )
        ids, count = answer.token_ids, answer.completion_tokens
        ended = bool(ids) and ids[-1] in self.eos_token_ids
        if answer.finish_reason == "stop" and not ended and count == len(ids) + 1:
            # It counts the end of sequence and leaves it out.
            ids = [*ids, answer.end_token if answer.end_token in self.eos_token_ids else self.tokenizer.eos_token_id]
        return *strip_completion(ids, self.eos_token_ids, self.settings.max_new_tokens), {}

    def _from_text(self, answer: ServerAnswer) -> tuple[list[int], str, dict[str, Any]]:
        limit, count = self.settings.max_new_tokens, answer.completion_tokens
        if count is None:
            raise ServerError(
                "The server does not say how many tokens it sampled (`usage`), so ids made from its text cannot be "
                "checked: use another server."
            )
        if answer.finish_reason == "length" and count <= limit:
            raise ServerError(
                f"The server cut a completion after {count} tokens, though {limit + 1} were allowed: its context is "
                "too small for prompt and completion. Raise it, or lower max_new_tokens."
            )
        ids, changed = retokenize(self.tokenizer, answer.text)
        if count <= limit:
            ids = [*ids, self.tokenizer.eos_token_id]
            return ids, "stop", retokenization_columns(answer.text, len(ids) - count, changed)
        # The token one too many is in the text, unless it is the end. transformers calls an end there a cut too; that
        # looks like a special token left out of the text and is marked as an error, rather than miss those.
        error = len(ids) + (answer.finish_reason == "stop") - count
        return ids[:limit], "length", retokenization_columns(answer.text, error, changed)


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
