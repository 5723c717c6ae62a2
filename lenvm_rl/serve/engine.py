"""What stands behind `lenvm_rl.serve`: a bounded queue, a thread that reads requests, and one that generates.

Requests join those under way between two tokens, up to `max_choices` choices: a step is one forward of the policy for
all of them and one of the length value model, and each is drawn, followed and ended as if it were alone.
"""

from __future__ import annotations

import copy
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.policy import DecodedRow, GuidedDecoder, draw_as_generate
from lenvm_rl.endings import end_token_ids, own_length
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.serve.protocol import ChatRequest, GenerationRequest, RequestError, read_request
from lenvm_rl.tokenization import IncrementalText, check_same_tokenizer, tokenize_prompts

# A token of a prompt is a few characters, and JSON may spell a character in twelve bytes. The last is for no context.
BODY_BYTES_PER_TOKEN, SMALLEST_BODY_LIMIT, TOKENS_WITHOUT_CONTEXT = 64, 2**20, 2**16


@dataclass(eq=False, kw_only=True)
class Choice(DecodedRow):
    """One completion, as far as it has come: `text` without special tokens and stop strings, `length` without the end.
    `finish_reason`, `"stop"` or `"length"`, is set last, so that all else is final where it is set."""

    index: int
    pieces: IncrementalText
    text: str = ""
    length: int = 0
    finish_reason: str | None = None


@dataclass(eq=False)
class Job:
    """A request on its way: `choices` is empty until generation begins, and `future` done when it is over. `notify` is
    called in the worker's thread when there is more to read in a stream, and at the end."""

    request: GenerationRequest
    prompt_ids: list[int]
    max_new_tokens: int
    guidance: LengthGuidance
    notify: Callable[[], None]
    choices: list[Choice] = field(default_factory=list)
    predicted_length: float | None = None
    draws: torch.Generator | None = None
    future: Future = field(default_factory=Future)
    cancelled: bool = False

    def __post_init__(self):
        self.future.add_done_callback(lambda future: self.notify())

    def cancel(self) -> None:
        """Stop after the token under way, or never begin; a finished job stays as it is."""
        self.cancelled = True
        self.future.cancel()

    @property
    def living(self) -> list[Choice]:
        """The choices that go on."""
        return [choice for choice in self.choices if choice.finish_reason is None]


class Engine:
    """A policy and a length value model that serve requests.

    Args:
        model (`PreTrainedModel`): the policy; of its generation config, only the ends of sequence are read.
        length_value_model (`LengthValueModel`): frozen, with the fingerprint of the same tokenizer.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        name (`str`): what requests call the model.
        max_waiting (`int`, *optional*, defaults to `64`): requests that may wait while others are served.
        max_choices (`int`, *optional*, defaults to `16`): most choices that are generated together.
        scoring (`str`, *optional*, defaults to `"cached"`): see [`~lenvm_rl.decoding.LengthGuidedLogitsProcessor`].

    Raises:
        ValueError: the tokenizers differ, nothing ends a completion, or a model or a setting cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        length_value_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        max_waiting: int = 64,
        max_choices: int = 16,
        scoring: str = "cached",
    ):
        if max_waiting < 0 or max_choices < 1:
            raise ValueError("max_choices must be at least 1, max_waiting at least 0.")
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
        both = (model, length_value_model)
        self.context = min((context_of(one.config) or TOKENS_WITHOUT_CONTEXT) for one in both)
        self.eos_token_ids = end_token_ids(tokenizer, model.generation_config)
        if not self.eos_token_ids:
            raise ValueError("Nothing ends a completion: set `tokenizer.eos_token`, or name the ids that do.")
        # A prompt is read by both.
        self.vocab_size = min(one.get_input_embeddings().weight.shape[0] for one in both)
        self.name, self.max_waiting, self.max_choices = name, max_waiting, max_choices
        self.max_body_bytes = max(SMALLEST_BODY_LIMIT, BODY_BYTES_PER_TOKEN * self.context)
        self.decoder = GuidedDecoder(model.eval(), length_value_model, self.eos_token_ids, self.context, scoring)
        # A fast tokenizer must not be used by two threads: this one encodes, its copy decodes in the worker.
        self.tokenizer, self._decoding = tokenizer, copy.deepcopy(tokenizer)
        self._changed = threading.Condition()
        self._reading, self._closed = 0, False
        self._waiting, self._running = deque[Job](), list[Job]()
        self._reader = ThreadPoolExecutor(1, "lenvm_rl.serve.reader")
        self._worker = threading.Thread(target=self._work, name="lenvm_rl.serve.worker", daemon=True)
        self._worker.start()

    def submit(self, body: bytes, kind: type[GenerationRequest], notify: Callable[[], None]) -> Future[Job]:
        """The [`Job`] of a request once it is read, in a thread of its own, and waits; or a [`RequestError`], raised at
        once with status 429 if the queue is full, with 503 if the engine is closed."""
        with self._changed:
            if self._closed:
                raise RequestError("The server was stopped: try again later.", status=503)
            waiting = self._reading + sum(not job.cancelled for job in self._waiting)
            if waiting >= self.max_waiting + (not self._running):
                message = f"The server is busy and {self.max_waiting} more requests wait: try again later."
                raise RequestError(message, code="queue_full", status=429)
            self._reading += 1
        return self._reader.submit(self._read, body, kind, notify)

    @property
    def jobs(self) -> list[Job]:
        """What runs and what waits."""
        with self._changed:
            return [job for job in (*self._running, *self._waiting) if not job.future.done()]

    def close(self) -> None:
        """Stop what runs, drop what waits, and end the threads."""
        with self._changed:
            self._closed = True
        self._reader.shutdown()
        for job in self.jobs:
            job.cancel()
        with self._changed:
            self._changed.notify()
        self._worker.join()

    def _read(self, body: bytes, kind: type[GenerationRequest], notify: Callable[[], None]) -> Job:
        jobs = []
        try:
            request = read_request(body, kind, self.name)
            place = "messages" if isinstance(request, ChatRequest) else "prompt"
            prompt_ids = self._tokenize(request, place)
            room = self._room(request, len(prompt_ids), place)
            jobs = [Job(request, prompt_ids, room, request.guidance(room, self.vocab_size), notify)]
        finally:
            with self._changed:
                self._reading -= 1
                self._waiting += jobs
                self._changed.notify()
        return jobs[0]

    def _tokenize(self, request: GenerationRequest, place: str) -> list[int]:
        prompt = [each.model_dump() for each in request.messages] if place == "messages" else request.prompt
        if place == "messages" or isinstance(prompt, str):
            try:
                prompt = tokenize_prompts(self.tokenizer, [prompt])[0]
            except ValueError as error:
                raise RequestError(f"The prompt cannot be read: {error}", place) from error
        wrong = [token for token in prompt if not 0 <= token < self.vocab_size]
        if wrong:
            raise RequestError(f"{wrong[0]} is no token id: the vocabulary has {self.vocab_size} tokens.", place)
        return prompt

    def _room(self, request: GenerationRequest, prompt_tokens: int, place: str) -> int:
        """Most new tokens of a choice, where there is room for them: by default 16 as at OpenAI, in a chat all."""
        if request.n > self.max_choices:
            raise RequestError(f"n must be at most {self.max_choices}, got {request.n}.", "n")
        left = self.context - prompt_tokens
        room = request.max_tokens or (16 if place == "prompt" else max(left, 1))
        if left < room:
            message = f"{prompt_tokens} tokens and {room} more do not fit: the model's context is {self.context}: "
            message += f"shorten {place} or lower max_tokens."
            raise RequestError(message, place, "context_length_exceeded")
        return room

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._closed or self._fits())
                while self._fits():
                    job = self._waiting.popleft()
                    self._running += [job] if job.future.set_running_or_notify_cancel() else []
                if self._closed and not (self._waiting or self._running):
                    return
            self._step(self._running)
            with self._changed:
                self._running = [job for job in self._running if not job.future.done()]

    def _fits(self) -> bool:
        """Whether there is room for the request that has waited longest."""
        taken = sum(len(job.living) or job.request.n for job in self._running)
        return bool(self._waiting) and taken + self._waiting[0].request.n <= self.max_choices

    @torch.no_grad()
    def _step(self, jobs: list[Job]) -> None:
        """A token for each choice that goes on. A job that fails is told so; where several ran, the others go on."""
        going = [job for job in jobs if not job.cancelled and (job.living or not job.choices)]
        try:
            for job, scores in zip(going, self._scores(going), strict=True):
                self._take(job, scores)
        except Exception as error:
            for job in going:
                if len(going) > 1:
                    self._step([job])
                else:
                    self._end(job, partial(job.future.set_exception, error))
        for job in jobs:
            if job.cancelled or not job.living:
                self._end(job, partial(job.future.set_result, job))
            elif job.request.stream:
                job.notify()

    def _end(self, job: Job, tell: Callable[[], None]) -> None:
        if not job.future.done():
            for choice in job.choices:
                self.decoder.remove(choice)
            tell()

    def _scores(self, jobs: Sequence[Job]) -> Sequence[Tensor]:
        """Of each job, the scores `(living, V)` that its next tokens are drawn from."""
        for job in jobs:
            if job.choices:
                continue
            job.predicted_length = self.decoder.predict(job.prompt_ids)
            if job.guidance.temperature > 0:
                seed = secrets.randbits(63) if job.request.seed is None else job.request.seed
                job.draws = torch.Generator(self.decoder.policy.device).manual_seed(seed)
            for index in range(job.request.n):
                pieces = IncrementalText(self._decoding, job.request.stop)
                job.choices.append(Choice(guidance=job.guidance, index=index, pieces=pieces))
                self.decoder.add(job.choices[-1], job.prompt_ids)
        rows = [choice for job in jobs for choice in job.living]
        return self.decoder.scores(rows).split([len(job.living) for job in jobs]) if rows else []

    def _take(self, job: Job, scores: Tensor) -> None:
        living = job.living
        tokens = draw_as_generate(scores, [choice.index for choice in living], job.request.n, job.draws)
        for choice, token in zip(living, tokens.tolist(), strict=True):
            if ends := token in self.eos_token_ids:
                # It need not be in the length value model's vocabulary.
                self.decoder.remove(choice)
            self.decoder.append(choice, token)
            choice.text += "" if ends else choice.pieces.push(token)
            stops = ends or choice.pieces.stopped
            if stops or len(choice.token_ids) == job.max_new_tokens:
                choice.text += choice.pieces.finish()
                choice.length = own_length(choice.token_ids, self.eos_token_ids)
                self.decoder.remove(choice)
                choice.finish_reason = "stop" if stops else "length"
