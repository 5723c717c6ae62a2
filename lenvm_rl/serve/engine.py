"""What stands behind `lenvm_rl.serve`: a bounded queue, a thread that reads requests, and one that generates.

Requests that wait when the models become free are generated together, up to `max_choices` rows: each row is drawn,
followed and ended as if it were alone, and each request is answered as soon as its own rows are over.
"""

from __future__ import annotations

import copy
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.processor import MAX_UNTRUNCATED_VOCABULARY, LengthGuidedLogitsProcessor
from lenvm_rl.endings import end_token_ids, own_length, padding_id
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.completions import pad_left
from lenvm_rl.prediction import boundary_logits, lengths_from_logits
from lenvm_rl.serve.protocol import ChatRequest, GenerationRequest, RequestError, read_request
from lenvm_rl.tokenization import check_same_tokenizer, tokenize_prompts

logger = logging.getLogger(__name__)

# Seconds that requests wait for company, as long as more keep coming: those sent at once do not arrive at once.
GATHER = 0.01
# A token of a prompt is a few characters, and JSON may spell a character in twelve bytes. The last is for no context.
BODY_BYTES_PER_TOKEN, SMALLEST_BODY_LIMIT, TOKENS_WITHOUT_CONTEXT = 64, 2**20, 2**16
# Rotary positions with these frequencies say something else to all rows once the longest is beyond a length.
ROPE_OF_THE_LONGEST_ROW = ("dynamic", "longrope")


@dataclass
class Choice:
    """One completion, as far as it has come: `text` without special tokens and stop strings, `token_ids` as chosen.

    `length` (end-of-sequence not counted) and `forced` (steps at which the hard bound overruled the choice) are known
    at the end. `finish_reason`, `"stop"` or `"length"`, is set last, so that all else is final where it is set.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    length: int = 0
    forced: int = 0
    finish_reason: str | None = None


@dataclass(eq=False)
class Job:
    """A request on its way.

    Args:
        request ([`~lenvm_rl.serve.protocol.GenerationRequest`]): what is asked.
        prompt_ids (list of `int`): its prompt.
        max_new_tokens (`int`): most tokens of a choice, end-of-sequence counted.
        notify (callable): called in the worker's thread when there is more to read in a stream, and at the end.
        choices (list of [`Choice`]): what there is so far; empty until the worker has begun.
        predicted_length (`float`, *optional*): in tokens, end-of-sequence not counted, at the prompt.
        future (`Future`): done when the job is.
    """

    request: GenerationRequest
    prompt_ids: list[int]
    max_new_tokens: int
    notify: Callable[[], None]
    choices: list[Choice] = field(default_factory=list)
    predicted_length: float | None = None
    future: Future = field(default_factory=Future)
    cancelled: bool = False

    def __post_init__(self):
        self.future.add_done_callback(lambda future: self.notify())

    def cancel(self) -> None:
        """Stop after the token under way, or never begin; a finished job stays as it is."""
        self.cancelled = True
        self.future.cancel()

    @property
    def over(self) -> bool:
        """Whether nothing more is to be written."""
        return self.cancelled or all(choice.finish_reason for choice in self.choices)

    @property
    def sent(self) -> bool:
        """Whether a client may have read some of it."""
        return self.request.stream and any(choice.text or choice.finish_reason for choice in self.choices)


class IncrementalText:
    """Turns token ids into text, piece by piece: no character is split, and nothing of a stop string gets out.

    The pieces together are the text of all tokens, special ones skipped, up to the first stop string. `stopped` says
    whether a stop string occurred.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded, self._held = 0, ""

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` was chosen; often a token more or less."""
        if self.stopped:
            return ""
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        if added is not None and added.special and added.content in self._stop:
            # It is no text, and can be named as a stop string all the same.
            text, self.stopped = self.finish(), True
            return text
        self._ids.append(token_id)
        piece = self._decoder.step(self._tokenizer.backend_tokenizer, token_id) or ""
        self._decoded += len(piece)
        return self._without_stop(piece, last=False)

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self._without_stop(whole[self._decoded :], last=True)

    def _without_stop(self, text: str, last: bool) -> str:
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        starts = [stop[:size] for stop in self._stop for size in range(1, len(stop))]
        kept = 0 if last else max((len(start) for start in starts if self._held.endswith(start)), default=0)
        sure = self._held[: len(self._held) - kept]
        self._held = self._held[len(sure) :]
        return sure


class Draw(LogitsProcessor):
    """Chooses the next tokens of sampled requests, each from a random stream of its own, and bars all others.

    So a seed gives what `generate` draws after `torch.manual_seed`, whatever is generated beside it.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device):
        self._streams, end = [], 0
        for job in jobs:
            start, end = end, end + job.request.n
            if job.request.guidance.temperature > 0:
                seed = secrets.randbits(63) if job.request.seed is None else job.request.seed
                self._streams.append((slice(start, end), torch.Generator(device).manual_seed(seed)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(B, V)`: 0 for the token that was drawn, ``-inf`` for the others; greedy rows stay as they are."""
        scores = scores.clone()
        for rows, generator in self._streams:
            drawn = torch.multinomial(scores[rows].softmax(dim=-1), 1, generator=generator)
            scores[rows] = torch.full_like(scores[rows], -torch.inf).scatter_(1, drawn, 0.0)
        return scores


class Watcher(StoppingCriteria):
    """Follows a generation token by token: fills the choices, ends rows, and says when a job is done.

    A row is over at an end, at a stop string, at its own most tokens, and when nobody waits for it any more.
    """

    def __init__(self, jobs: Sequence[Job], processor: LengthGuidedLogitsProcessor, tokenizer: PreTrainedTokenizerBase):
        self.jobs, self.processor = jobs, processor
        self._rows = [
            (job, choice, IncrementalText(tokenizer, job.request.stop)) for job in jobs for choice in job.choices
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """Which rows of `input_ids` `(B, S)` are over, `(B,)` bool."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            job, choice, text = self._rows[row]
            if choice.finish_reason is None and not job.cancelled:
                self._take(row, token, job, choice, text)
        for job in self.jobs:
            if job.over and not job.future.done():
                job.future.set_result(job)
            elif job.request.stream:
                job.notify()
        over = [job.over or choice.finish_reason is not None for job, choice, _ in self._rows]
        return torch.tensor(over, device=input_ids.device)

    def _take(self, row: int, token: int, job: Job, choice: Choice, text: IncrementalText) -> None:
        choice.token_ids.append(token)
        ends = token in self.processor.eos_token_ids
        choice.text += "" if ends else text.push(token)
        if ends or text.stopped or len(choice.token_ids) == job.max_new_tokens:
            choice.text += text.finish()
            choice.length = own_length(choice.token_ids, self.processor.eos_token_ids)
            choice.forced = int(self.processor.report.forced[row])
            choice.finish_reason = "stop" if ends or text.stopped else "length"


class Engine:
    """A policy and a length value model that serve requests.

    Args:
        model (`PreTrainedModel`): the policy. It belongs to the engine from now on: of its generation config, only the
            ends of sequence are kept, since requests say everything else.
        length_value_model (`LengthValueModel`): frozen, with the fingerprint of the same tokenizer.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        name (`str`): what requests call the model.
        max_new_tokens_limit (`int`, *optional*, defaults to the context): most tokens of a choice.
        max_waiting (`int`, *optional*, defaults to `64`): requests that may wait while others are served.
        max_choices (`int`, *optional*, defaults to `16`): most choices that are generated together, of one request or
            of several.
        scoring (`str`, *optional*, defaults to `"cached"`): see [`~lenvm_rl.decoding.LengthGuidedLogitsProcessor`].

    Raises:
        ValueError: the tokenizers differ, nothing ends a completion, the length value model cannot be scored with,
            there is neither a context nor a limit, or a number is out of range.
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
        if not tokenizer.is_fast:
            raise ValueError("Text is streamed by the tokenizers library: give a tokenizer whose `is_fast` is True.")
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
        both = (model, length_value_model)
        self.context = min((context for one in both if (context := context_of(one.config)) is not None), default=None)
        if self.context is None and max_new_tokens_limit is None:
            raise ValueError("The models' configs name no max_position_embeddings: give max_new_tokens_limit.")
        self.model, self.length_value_model, self.name = model.eval(), length_value_model, name
        self.eos_token_ids = end_token_ids(tokenizer, model.generation_config)
        self.pad_token_id = padding_id(tokenizer, self.eos_token_ids)
        # A prompt is read by both.
        self.vocab_size = min(one.get_input_embeddings().weight.shape[0] for one in both)
        self._longest_token = max(len(token) for token in tokenizer.get_vocab())
        self.max_new_tokens_limit, self.max_waiting, self.max_choices = max_new_tokens_limit, max_waiting, max_choices
        self.scoring = scoring
        self.max_body_bytes = max(SMALLEST_BODY_LIMIT, BODY_BYTES_PER_TOKEN * (self.context or TOKENS_WITHOUT_CONTEXT))
        # What cannot be scored is refused now, not at the first request.
        LengthGuidedLogitsProcessor(length_value_model, LengthGuidance(), eos_token_id=0, scoring=scoring)
        model.generation_config = GenerationConfig()
        self.widest = widest_batch(model, length_value_model, self.pad_token_id)
        if not self.widest:
            logger.warning("Padding changes what these models say, so requests are served one after the other.")
        # A fast tokenizer must not be used by two threads: this one encodes, its copy decodes in the worker.
        self.tokenizer, self._decoder = tokenizer, copy.deepcopy(tokenizer)
        self._reader = ThreadPoolExecutor(1, "lenvm_rl.serve.reader")
        self._worker = ThreadPoolExecutor(1, "lenvm_rl.serve.worker")
        self._lock = threading.Lock()
        self._reading, self._closed = 0, False
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []

    def submit(self, body: bytes, kind: type[GenerationRequest], notify: Callable[[], None]) -> Future[Job]:
        """Read a request in a thread of its own, and put it in the queue.

        Returns:
            `Future`: the [`Job`] once it waits, or a [`~lenvm_rl.serve.protocol.RequestError`] that says what to
            change.

        Raises:
            RequestError: with status 429 if the queue is full, with 503 if the engine is closed.
        """
        with self._lock:
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
        with self._lock:
            return [job for job in (*self._running, *self._waiting) if not job.future.done()]

    def close(self) -> None:
        """Stop what runs, drop what waits, and end the threads."""
        with self._lock:
            self._closed = True
        self._reader.shutdown()
        for job in self.jobs:
            job.cancel()
        self._worker.shutdown()

    def _read(self, body: bytes, kind: type[GenerationRequest], notify: Callable[[], None]) -> Job:
        job = None
        try:
            request = read_request(body, kind, self.name)
            prompt_ids = self._tokenize(request)
            job = Job(request, prompt_ids, self._room(request, len(prompt_ids)), notify)
        finally:
            with self._lock:
                self._reading -= 1
                self._waiting += [] if job is None else [job]
        self._worker.submit(self._turn)
        return job

    def _tokenize(self, request: GenerationRequest) -> list[int]:
        prompt, place, chat = request.prompt, request.prompt_field, isinstance(request, ChatRequest)
        if chat and self.tokenizer.chat_template is None:
            raise RequestError("This model's tokenizer has no chat template: use /v1/completions.", place)
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
        """Most new tokens of a choice, where the request can be served."""
        limit, name, guidance = self.max_new_tokens_limit, request.max_tokens_field, request.guidance
        asked = request.max_completion_tokens or request.max_tokens
        if asked is not None and limit is not None and asked > limit:
            raise RequestError(f"{name} is {asked}, and this server generates at most {limit} tokens: lower it.", name)
        if asked is None and request.default_tokens is not None:
            asked = min(request.default_tokens, limit or request.default_tokens)
        left = math.inf if self.context is None else self.context - prompt_tokens
        if left < (asked or 1):
            message = f"The prompt has {prompt_tokens} tokens and {asked or 1} more are asked for, but the model's "
            message += f"context is {self.context}: shorten {request.prompt_field} or lower {name}."
            raise RequestError(message, request.prompt_field, "context_length_exceeded")
        room, target = asked or min(left, limit or math.inf), guidance.target_length
        if target is not None and room <= target:
            message = f"target_length={target} needs {name} of at least {target + 1} (the end is one more), not {room}."
            raise RequestError(message, "length_guidance.target_length")
        if guidance.needs_values and not guidance.truncates and self.vocab_size > MAX_UNTRUNCATED_VOCABULARY:
            message = f"Without truncation, all {self.vocab_size} tokens are scored at every step: set top_k (e.g. 64) "
            raise RequestError(f"{message}or min_p in length_guidance, or top_p.", "length_guidance.top_k")
        if request.n > self.max_choices:
            raise RequestError(f"n must be at most {self.max_choices}, got {request.n}.", "n")
        return room

    def _turn(self) -> None:
        """Generate for what waits. There is a turn for each job; if a job went with another, its turn does nothing."""
        seen = 0
        while seen < len(self._waiting) < self.max_choices:
            seen = len(self._waiting)
            time.sleep(GATHER)
        with self._lock:
            while self._waiting and self._fit([*self._running, self._waiting[0]]):
                job = self._waiting.popleft()
                self._running += [job] if job.future.set_running_or_notify_cancel() else []
        if self._running:
            self._run(self._running)
        with self._lock:
            self._running = []

    def _fit(self, jobs: Sequence[Job]) -> bool:
        """Whether no row of these jobs makes a difference to another's, and there are not too many."""
        width = max(len(job.prompt_ids) for job in jobs) + max(job.max_new_tokens for job in jobs)
        return len(jobs) == 1 or (width <= self.widest and sum(job.request.n for job in jobs) <= self.max_choices)

    def _run(self, jobs: Sequence[Job]) -> None:
        try:
            self._generate(jobs)
        except Exception as error:
            # It goes to who waits for it. Where several ran, all but one are innocent: each runs once more, alone.
            for job in jobs:
                if len(jobs) > 1 and not (job.future.done() or job.sent):
                    self._run([job])
                elif not job.future.done():
                    job.future.set_exception(error)

    @torch.no_grad()
    def _generate(self, jobs: Sequence[Job]) -> None:
        logits = boundary_logits(self.length_value_model, [job.prompt_ids for job in jobs])
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the length value model gave NaN or infinity: check its weights and its dtype.")
        predicted = lengths_from_logits(logits, self.length_value_model.config.gamma).tolist()
        for job, job.predicted_length in zip(jobs, predicted, strict=True):
            job.choices = [Choice(index) for index in range(job.request.n)]
        rows = [job.prompt_ids for job in jobs for _ in job.choices]
        prompts, mask = pad_left(rows, self.pad_token_id, self.model.device)
        processor = LengthGuidedLogitsProcessor(
            self.length_value_model,
            [job.request.guidance for job in jobs for _ in job.choices],
            eos_token_id=self.eos_token_ids,
            attention_mask=mask,
            scoring=self.scoring,
            same_tokenizer=True,
        )
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(job.max_new_tokens for job in jobs),
            eos_token_id=self.eos_token_ids,
            # Rows that are over for another reason are filled with it: so guidance learns that they are.
            pad_token_id=self.eos_token_ids[0],
        )
        self.model.generate(
            prompts,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([processor, Draw(jobs, self.model.device)]),
            stopping_criteria=StoppingCriteriaList([Watcher(jobs, processor, self._decoder)]),
        )


@torch.no_grad()
def widest_batch(model: PreTrainedModel, length_value_model: nn.Module, pad_token_id: int) -> float:
    """The width up to which rows padded on the left say what they say alone: 0 for never, infinity for always.

    Decoders that take no mask read padding. A row that is over is fed until the last one is, which fails past the end
    of a table of positions; and some rotary frequencies belong to the longest row.
    """
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    said, widths = [], []
    for rows in ([[0, 1]], [[0, 1], [0, 1, 0, 1]]):
        prompts, mask = pad_left(rows, pad_token_id, model.device)
        output = model.generate(prompts, attention_mask=mask, pad_token_id=pad_token_id, **options)
        said.append([output.logits[0][0], boundary_logits(length_value_model, rows)[0]])
    for own, alone, beside in zip((model, length_value_model), *said, strict=True):
        slack = torch.finfo(own.dtype).eps ** 0.5 * float(alone[alone.isfinite()].abs().max())
        if not torch.allclose(alone, beside, rtol=0.0, atol=slack):
            return 0
        text = own.config.get_text_config(decoder=True)
        rope, limit = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
        for kind in (rope, *rope.values()) if rope else ({},):
            if not rope or (isinstance(kind, dict) and kind.get("rope_type") in ROPE_OF_THE_LONGEST_ROW):
                widths.append(kind.get("original_max_position_embeddings", limit))
    return min((width for width in widths if width is not None), default=math.inf)
