"""Rollouts from a server: many requests at once, each repeated until it is answered, token ids kept where they are.

Where a server gives text only, its ids are made from the text again. That has to be asked for (`retokenize=True`), is
checked against the number of tokens that the server counts, and is reported (see `lenvm_rl.rollouts.text`).
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidHeader, InvalidSchema, InvalidURL, MissingSchema
from transformers import PreTrainedTokenizerBase
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry

from lenvm_rl.endings import strip_completion
from lenvm_rl.rollouts.job import SamplingJob, SamplingSettings
from lenvm_rl.rollouts.text import retokenization_columns, retokenization_report, retokenization_sentence, retokenize
from lenvm_rl.tokenization import Prompt

logger = logging.getLogger(__name__)

# Too early, too much, or a gateway's trouble: the same request may succeed later.
RETRIED_STATUSES = (408, 409, 423, 425, 429, *range(500, 600))
# Seconds. The first repetition comes at once, the second after FIRST_DELAY, each further one after twice as long.
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0


class ServerJob(SamplingJob):
    """A sampling job whose completions come from a server.

    It goes on with another address or `batch_size`, too, and asks for no finished completion again; a [`ServerError`]
    keeps what was finished before.

    Args:
        server ([`CompletionServer`]): as [`connect`] makes it.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the server's model.
        prompts, settings, job (`seed`, `extra_columns`, `eos_token_ids`): see
            [`~lenvm_rl.rollouts.job.SamplingJob`]. `batch_size` is the number of requests under way at once. The same
            completions come back only from a server that keeps to seeds, and few do whatever else they are computing at
            the time.
        retokenize (`bool`, *optional*, defaults to `False`): make token ids from text if the server gives none. The
            records then have the columns `completion_text`, `length_error` and `text_changed`.
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
        **job: Any,
    ):
        super().__init__(tokenizer, prompts, settings, **job)
        self.server, self.policy_name = server, server.model
        if not server.gives_token_ids and not retokenize:
            raise ValueError(
                f"A server of the kind {server.kind!r} gives text, not the token ids that were sampled, and labels "
                "made from a text's tokens can be off. Use a server that gives ids (vllm), or set retokenize=True and "
                "look at sampling['retokenization'] in the metadata."
            )
        self.requested: list[str] | list[list[int]] = self.prompt_ids
        if not server.gives_token_ids:
            self.requested = [self._prompt_text(index) for index in range(len(self.prompts))]

    def description(self) -> dict[str, Any]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.description`]."""
        token_ids = "sampled" if self.server.gives_token_ids else "retokenized"
        return {"server": self.server.kind, "model": self.server.model, "token_ids": token_ids}

    def report(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """See [`~lenvm_rl.rollouts.job.SamplingJob.report`]."""
        if self.server.gives_token_ids:
            return {}
        report = retokenization_report(records)
        logger.warning(retokenization_sentence(report))
        return {"retokenization": report}

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
        if not self.server.gives_token_ids:
            ids, finish_reason, columns = self._from_text(answer)
            return self.record(number, ids, finish_reason, **columns)
        if answer.token_ids is None:
            raise ServerError(
                f"The server gave no token ids, so it is no {self.server.kind} that knows how to: use a newer version, "
                "or the kind 'openai' with retokenize=True."
            )
        ended = strip_completion(answer.token_ids, self.eos_token_ids, self.settings.max_new_tokens)
        return self.record(number, *ended)

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
            own = self.tokenizer.eos_token_id
            ids = [*ids, own if own in self.eos_token_ids else self.eos_token_ids[0]]
            return ids, "stop", retokenization_columns(answer.text, len(ids) - count, changed)
        # The token one too many is in the text, unless it is the end. transformers calls an end there a cut too; that
        # looks like a special token left out of the text and is marked as an error, rather than miss those.
        error = len(ids) + (answer.finish_reason == "stop") - count
        return ids[:limit], "length", retokenization_columns(answer.text, error, changed)


class _ToldRetry(Retry):
    """Repetitions that the log tells of, and that end once the job of the thread's request is `abandoned`."""

    def __init__(self, local: threading.local, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._local = local

    def new(self, **options: Any) -> Retry:
        """See urllib3, which makes the state of each repetition of the one before."""
        return super().new(local=self._local, **options)

    def increment(self, method=None, url=None, response=None, error=None, _pool=None, _stacktrace=None) -> Retry:
        """See urllib3."""
        left = super().increment(method, url, response, error, _pool, _stacktrace)
        if self._local.abandoned.is_set():
            raise MaxRetryError(_pool, url, error)
        problem = f"it answered {response.status}" if error is None and response is not None else error
        logger.warning("%s: %s. Trying again (%s more times at most)", url, problem, left.total)
        return left


class ServerError(RuntimeError):
    """The server refused a request, or kept failing it: what it said, and what to change."""


class ServerAnswer(NamedTuple):
    """One completion, as a server tells it: special tokens are left out of the text, and counted in the numbers."""

    text: str
    finish_reason: str
    token_ids: list[int] | None
    prompt_tokens: int | None
    completion_tokens: int | None


class CompletionServer:
    """A server with the OpenAI completions endpoint and nothing more; the other kinds say what differs.

    Used from many threads at once.

    Args:
        url (`str`): base address with the API's version, as `http://localhost:8000/v1`.
        model (`str`): the model's name on the server.
        api_key (`str`, *optional*): sent as a bearer token.
        timeout (`float`, *optional*, defaults to `600.0`): seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `8`): times that a failed request is repeated: no connection, no
            answer in time, half an answer, one of [`RETRIED_STATUSES`]. A `Retry-After` is obeyed.
    """

    kind = "openai"
    # Whether prompts and completions are ids there, or text.
    gives_token_ids = False

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, timeout: float = 600.0, max_retries: int = 8
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The server's url is {url!r}: give one like http://localhost:8000/v1.")
        if max_retries < 0 or timeout <= 0:
            raise ValueError(f"max_retries must not be negative ({max_retries}), and timeout above 0 ({timeout}).")
        self.address, self.model = f"{url.rstrip('/')}/completions", model
        self.timeout, self.max_retries = timeout, max_retries
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._local = threading.local()

    def request(
        self,
        prompt: str | list[int],
        settings: SamplingSettings,
        max_tokens: int,
        seed: int,
        eos_token_ids: Sequence[int],
    ) -> dict[str, Any]:
        """The body of a request for one completion, with nothing left to the server's own defaults.

        Args:
            prompt (`str` or `list[int]`): ids if `gives_token_ids`, else text.
            settings ([`~lenvm_rl.rollouts.SamplingSettings`]): temperature, top-p and top-k.
            max_tokens (`int`): most tokens, the end of sequence counted.
            seed (`int`): the completion's seed.
            eos_token_ids (`Sequence[int]`): ids that end the completion, for servers that can be told.
        """
        given = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "seed": seed}
        return given | self._sampling(settings, max_tokens, eos_token_ids)

    def _sampling(self, settings: SamplingSettings, max_tokens: int, eos_token_ids: Sequence[int]) -> dict[str, Any]:
        """How to sample, in the words of this kind of server."""
        if settings.top_k:
            raise ValueError(
                "The OpenAI completions endpoint has no top_k: set it to 0, or name the kind of server (vllm, "
                "transformers)."
            )
        return {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
        }

    def complete(self, request: dict[str, Any], abandoned: threading.Event | None = None) -> ServerAnswer:
        """Sends a request, as [`CompletionServer.request`] makes it, until it is answered; else a [`ServerError`].

        Once `abandoned` is set, nothing is repeated any more.
        """
        abandoned = threading.Event() if abandoned is None else abandoned
        for repeated in range(self.max_retries + 1):
            # The session repeats what fails before an answer has begun; this loop, an answer that is spoiled.
            if repeated and abandoned.wait(FIRST_DELAY):
                break
            try:
                self._local.abandoned = abandoned
                response = self._session().post(
                    self.address, json=request, headers=self._headers, timeout=(min(10.0, self.timeout), self.timeout)
                )
            except InvalidHeader:
                # Its message quotes the key.
                raise ServerError("The api key cannot be sent: take line breaks and spaces out of it.") from None
            except (InvalidURL, InvalidSchema, MissingSchema) as error:
                raise ServerError(f"{self.address} is no address: {error}. Check the server's url.") from error
            except requests.RequestException as error:
                if isinstance(error.args[0], MaxRetryError):
                    raise self._given_up(f"it gave no answer: {error}") from error
                problem = f"it broke off an answer: {error}"
                continue
            said = response.text[:500]
            if response.status_code in RETRIED_STATUSES:
                raise self._given_up(f"it answered {response.status_code}: {said}")
            if response.status_code != 200:
                raise ServerError(
                    f"{self.address} refused a request with status {response.status_code}: {said}. Check the model's "
                    "name, the length of prompt and completion, and the kind of server."
                )
            try:
                answer = _read(response.json())
            except (requests.JSONDecodeError, KeyError, TypeError, IndexError) as error:
                problem = f"it gave half an answer ({error!r}): {said}"
                continue
            if answer.finish_reason in ("stop", "length"):
                return answer
            problem = f"it ended a completion for the reason {answer.finish_reason!r}"
        raise self._given_up(problem)

    def _given_up(self, problem: str) -> ServerError:
        return ServerError(
            f"{self.address} failed a request {self.max_retries + 1} times, at last {problem}. Look at the server's "
            "log; lower batch_size if it is overloaded, or raise the timeout."
        )

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            retries = _ToldRetry(
                self._local,
                total=self.max_retries,
                allowed_methods=None,
                status_forcelist=RETRIED_STATUSES,
                raise_on_status=False,
                # The first of its delays is left out, and the second is twice this.
                backoff_factor=FIRST_DELAY / 2,
                backoff_max=LONGEST_DELAY,
            )
            self._local.session = requests.Session()
            for scheme in ("http://", "https://"):
                self._local.session.mount(scheme, HTTPAdapter(max_retries=retries))
        return self._local.session


def _read(answer: dict[str, Any]) -> ServerAnswer:
    """An answer's contents; a `KeyError`, `TypeError` or `IndexError` where it is not what was asked for."""
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return ServerAnswer(choice["text"], choice["finish_reason"], choice.get("token_ids"), *counts)


class VLLMServer(CompletionServer):
    """vLLM's server: it takes and gives ids."""

    kind = "vllm"
    gives_token_ids = True

    def _sampling(self, settings: SamplingSettings, max_tokens: int, eos_token_ids: Sequence[int]) -> dict[str, Any]:
        return {
            **super()._sampling(replace(settings, top_k=0), max_tokens, eos_token_ids),
            # -1 is every token.
            "top_k": settings.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(eos_token_ids),
            "return_token_ids": True,
        }


class TransformersServer(CompletionServer):
    """`transformers serve`.

    It refuses fields that it does not know, ignores a temperature unless told to sample, and takes both from a
    generation config in the request. A seed sets the state of the whole process, so completions follow from their
    seeds only with one request at a time (`batch_size=1`). A completion that ends with its last allowed token is
    reported as cut.
    """

    kind = "transformers"

    def _sampling(self, settings: SamplingSettings, max_tokens: int, eos_token_ids: Sequence[int]) -> dict[str, Any]:
        # What is left open here is filled from the model's own generation config.
        config = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": max_tokens}
        config |= {"eos_token_id": list(eos_token_ids), "do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            config |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
            config |= {"min_p": 0.0, "typical_p": 1.0}
        return {"generation_config": json.dumps(config)}


SERVERS = {server.kind: server for server in (VLLMServer, TransformersServer, CompletionServer)}


def connect(kind: str, url: str, model: str, **options: Any) -> CompletionServer:
    """The client of a server.

    Args:
        kind (`str`): `"vllm"`, `"transformers"` or `"openai"` (any other with the OpenAI completions endpoint).
        url, model, options: see [`CompletionServer`].
    """
    if kind not in SERVERS:
        raise ValueError(f"There is no kind of server {kind!r}: give one of {', '.join(SERVERS)}.")
    return SERVERS[kind](url, model, **options)
