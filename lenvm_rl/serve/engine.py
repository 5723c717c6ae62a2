"""What stands behind `lenvm_rl.serve`: a bounded queue, a thread that reads requests, and one that generates.

Requests join those under way between two tokens, up to `max_choices` choices: a step is one forward of the policy for
all of them and one of the length value model, and each is drawn, followed and ended as if it were alone.
"""

from __future__ import annotations

import copy
import logging
import math
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.policy import policy_reader
from lenvm_rl.decoding.processor import SCORERS
from lenvm_rl.decoding.scoring import Scorer
from lenvm_rl.decoding.step import GuidedRow, guide_rows
from lenvm_rl.endings import end_token_ids, own_length
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.prediction import boundary_logits, lengths_from_logits
from lenvm_rl.serve.protocol import ChatRequest, GenerationRequest, RequestError, read_request
from lenvm_rl.tokenization import check_same_tokenizer, tokenize_prompts

logger = logging.getLogger(__name__)

# A token of a prompt is a few characters, and JSON may spell a character in twelve bytes. The last is for no context.
BODY_BYTES_PER_TOKEN, SMALLEST_BODY_LIMIT, TOKENS_WITHOUT_CONTEXT = 64, 2**20, 2**16
# What stands for a character of which not all bytes are there.
REPLACEMENT = "\ufffd"


class IncrementalText:
    """Turns token ids into text, piece by piece: no character is split, and nothing of a stop string gets out.

    The pieces together are the text of all tokens, special ones skipped, up to the first stop string. `stopped` says
    whether a stop string occurred.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._told = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` was chosen; often a token more or less."""
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        if not self.stopped and added is not None and added.special and added.content in self._stop:
            # It is no text, and can be named as a stop string all the same.
            text, self.stopped = self.finish(), True
            return text
        self._ids.append(token_id)
        return self.finish(last=False)

    def finish(self, last: bool = True) -> str:
        """What was held back, now that no token follows."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not last:
            text = text.rstrip(REPLACEMENT)
            starts = [size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
            text = text[: len(text) - max(starts, default=0)]
        piece = text[self._told :]
        self._told += len(piece)
        return piece


@dataclass(eq=False)
class Choice:
    """One completion, as far as it has come: `text` without special tokens and stop strings, `token_ids` as chosen.

    `length` (end-of-sequence not counted) and `forced` (steps at which the hard bound overruled the choice) are known
    at the end. `finish_reason`, `"stop"` or `"length"`, is set last, so that all else is final where it is set.
    """

    index: int
    pieces: IncrementalText
    slots: dict[Scorer, int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    length: int = 0
    forced: int = 0
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
        max_new_tokens_limit (`int`, *optional*, defaults to the context): most tokens of a choice.
        max_waiting (`int`, *optional*, defaults to `64`): requests that may wait while others are served.
        max_choices (`int`, *optional*, defaults to `16`): most choices that are generated together.
        scoring (`str`, *optional*, defaults to `"cached"`): see [`~lenvm_rl.decoding.LengthGuidedLogitsProcessor`].

    Raises:
        ValueError: the tokenizers differ, nothing ends a completion, the length value model cannot be scored with,
            there is neither a context nor a limit, or a setting is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        length_value_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        max_new_tokens_limit: int | None = None,
        max_waiting: int = 64,
        max_choices: int = 16,
        scoring: str = "cached",
    ):
        if max_waiting < 0 or max_choices < 1 or (max_new_tokens_limit is not None and max_new_tokens_limit < 1):
            raise ValueError("max_new_tokens_limit and max_choices must be at least 1, max_waiting at least 0.")
        if scoring not in SCORERS:
            raise ValueError(f"scoring must be one of {sorted(SCORERS)}, got {scoring!r}.")
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
        both = (model, length_value_model)
        self.context = min((context for one in both if (context := context_of(one.config)) is not None), default=None)
        if self.context is None and max_new_tokens_limit is None:
            raise ValueError("The models' configs name no max_position_embeddings: give max_new_tokens_limit.")
        self.length_value_model, self.name = length_value_model, name
        self.eos_token_ids = end_token_ids(tokenizer, model.generation_config)
        if not self.eos_token_ids:
            raise ValueError("Nothing ends a completion: set `tokenizer.eos_token`, or name the ids that do.")
        # A prompt is read by both.
        self.vocab_size = min(one.get_input_embeddings().weight.shape[0] for one in both)
        self._longest_token = max(len(token) for token in tokenizer.get_vocab())
        self.max_new_tokens_limit, self.max_waiting, self.max_choices = max_new_tokens_limit, max_waiting, max_choices
        self.max_body_bytes = max(SMALLEST_BODY_LIMIT, BODY_BYTES_PER_TOKEN * (self.context or TOKENS_WITHOUT_CONTEXT))
        self.policy = policy_reader(model.eval(), self.context or TOKENS_WITHOUT_CONTEXT)
        self.scorer = SCORERS[scoring](length_value_model)
        # A fast tokenizer must not be used by two threads: this one encodes, its copy decodes in the worker.
        self.tokenizer, self._decoder = tokenizer, copy.deepcopy(tokenizer)
        self._changed = threading.Condition()
        self._reading, self._closed = 0, False
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._reader = ThreadPoolExecutor(1, "lenvm_rl.serve.reader")
        self._worker = threading.Thread(target=self._work, name="lenvm_rl.serve.worker", daemon=True)
        self._worker.start()

    def submit(self, body: bytes, kind: type[GenerationRequest], notify: Callable[[], None]) -> Future[Job]:
        """The [`Job`] of a request once it is read, in a thread of its own, and waits; or a
        [`~lenvm_rl.serve.protocol.RequestError`] that says what to change. Raises one itself, with status 429 if the
        queue is full, with 503 if the engine is closed."""
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
            prompt_ids = self._tokenize(request)
            room = self._room(request, len(prompt_ids))
            jobs = [Job(request, prompt_ids, room, request.guidance(room, self.vocab_size), notify)]
        finally:
            with self._changed:
                self._reading -= 1
                self._waiting += jobs
                self._changed.notify()
        return jobs[0]

    def _tokenize(self, request: GenerationRequest) -> list[int]:
        prompt, place, chat = request.prompt, request.prompt_field, isinstance(request, ChatRequest)
        if chat or isinstance(prompt, str):
            characters = sum(len(message["content"]) for message in prompt) if chat else len(prompt)
            # A million take seconds to read. The longest tokens that there are would not make more of them fit.
            if self.context is not None and characters > (most := self.context * self._longest_token):
                message = f"The prompt has {characters} characters, the context holds {most} at most: shorten {place}."
                raise RequestError(message, place, "context_length_exceeded")
            try:
                prompt = tokenize_prompts(self.tokenizer, [prompt])[0]
            except ValueError as error:
                raise RequestError(f"The prompt cannot be read: {error}", place) from error
        wrong = [token for token in prompt if not 0 <= token < self.vocab_size]
        if wrong:
            raise RequestError(f"{wrong[0]} is no token id: the vocabulary has {self.vocab_size} tokens.", place)
        return prompt

    def _room(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """Most new tokens of a choice, where there is room for them."""
        limit, asked = self.max_new_tokens_limit or math.inf, request.max_tokens
        if asked is not None and asked > limit:
            raise RequestError(f"max_tokens is {asked}, the server's limit {limit}: lower it.", "max_tokens")
        if request.n > self.max_choices:
            raise RequestError(f"n must be at most {self.max_choices}, got {request.n}.", "n")
        left = math.inf if self.context is None else self.context - prompt_tokens
        room = asked or min(limit, request.default_tokens or max(left, 1))
        if left < room:
            message = (
                f"The prompt has {prompt_tokens} tokens and {room} more are asked for, but the model's context is "
            )
            message += f"{self.context}: shorten {request.prompt_field} or lower max_tokens."
            raise RequestError(message, request.prompt_field, "context_length_exceeded")
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
        going = [job for job in jobs if not job.cancelled]
        try:
            scores = self._scores(going)
            for job, own in zip(going, scores, strict=True):
                self._take(job, own)
        except Exception as error:
            for job in going:
                if len(going) > 1:
                    self._step([job])
                else:
                    _leave(job.living)
                    job.future.set_exception(error)
        for job in jobs:
            if not job.future.done() and (job.cancelled or not job.living):
                _leave(job.living)
                job.future.set_result(job)
            elif job.request.stream:
                job.notify()

    def _begin(self, job: Job) -> None:
        logits = boundary_logits(self.length_value_model, [job.prompt_ids])
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the length value model gave NaN or infinity: check its weights and its dtype.")
        job.predicted_length = float(lengths_from_logits(logits, self.length_value_model.config.gamma))
        if job.guidance.temperature > 0:
            seed = secrets.randbits(63) if job.request.seed is None else job.request.seed
            job.draws = torch.Generator(self.policy.device).manual_seed(seed)
        readers = [self.policy, self.scorer] if job.guidance.needs_values else [self.policy]
        for index in range(job.request.n):
            slots = {reader: reader.add(job.prompt_ids) for reader in readers}
            job.choices.append(Choice(index, IncrementalText(self._decoder, job.request.stop), slots))

    def _scores(self, jobs: Sequence[Job]) -> Sequence[Tensor]:
        """Of each job, the scores `(living, V)` that its next tokens are drawn from."""
        for job in jobs:
            if not job.choices:
                self._begin(job)
        rows = [(job.guidance, choice) for job in jobs for choice in job.living]
        if not rows:
            return []
        logits = self.policy.last([choice.slots[self.policy] for _, choice in rows])
        scores = logits / torch.tensor([[guidance.temperature or 1.0] for guidance, _ in rows], device=logits.device)
        at = [row for row, (guidance, _) in enumerate(rows) if guidance.needs_values or guidance.truncates]
        if at:
            # An id that the policy has no score for ends nothing.
            ends = tuple(end for end in self.eos_token_ids if end < logits.shape[1])
            chosen = [rows[row] for row in at]
            guided = [
                GuidedRow(guidance, ends, len(choice.token_ids), choice.slots.get(self.scorer))
                for guidance, choice in chosen
            ]
            step = guide_rows(guided, logits[at], self.scorer, self.length_value_model.config.gamma)
            scores[at] = step.scores
            for (_, choice), overruled in zip(chosen, step.overruled.tolist(), strict=True):
                choice.forced += overruled > 0.5
        return scores.split([len(job.living) for job in jobs])

    def _take(self, job: Job, scores: Tensor) -> None:
        """Draws as `generate` does: of a job's random numbers, choices that are over take their share."""
        living = job.living
        if job.draws is None:
            tokens = scores.argmax(dim=1)
        else:
            weights, at = scores.new_ones(job.request.n, scores.shape[1]), [choice.index for choice in living]
            weights[at] = scores.softmax(dim=1)
            tokens = torch.multinomial(weights, 1, generator=job.draws)[at, 0]
        for choice, token in zip(living, tokens.tolist(), strict=True):
            choice.token_ids.append(token)
            ends = token in self.eos_token_ids
            choice.text += "" if ends else choice.pieces.push(token)
            stops = ends or choice.pieces.stopped
            if stops or len(choice.token_ids) == job.max_new_tokens:
                choice.text += choice.pieces.finish()
                choice.length = own_length(choice.token_ids, self.eos_token_ids)
                _leave([choice])
                choice.finish_reason = "stop" if stops else "length"
            else:
                for reader, slot in choice.slots.items():
                    reader.append(slot, [token])


def _leave(choices: Sequence[Choice]) -> None:
    """Forgets the rows of choices."""
    for choice in choices:
        while choice.slots:
            reader, slot = choice.slots.popitem()
            reader.remove(slot)
