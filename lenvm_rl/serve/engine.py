"""What stands behind `lenvm_rl.serve`: a bounded queue, a thread that reads requests, and one that generates.

Requests that wait when the models become free are generated together, up to `max_choices` rows. Each is answered as
soon as its own rows are over.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from lenvm_rl.decoding.generation import LengthGuidedLogitsProcessor
from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.processor import MAX_UNTRUNCATED_VOCABULARY
from lenvm_rl.endings import end_token_ids, padding_id
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.completions import pad_left
from lenvm_rl.prediction import boundary_logits, lengths_from_logits
from lenvm_rl.serve.generation import Choice, Draw, Job, Watcher
from lenvm_rl.serve.protocol import ChatRequest, GenerationRequest, RequestError, read_request
from lenvm_rl.tokenization import check_same_tokenizer, tokenize_prompts

logger = logging.getLogger(__name__)

# Seconds that requests wait for company, as long as more keep coming: those sent at once do not arrive at once.
GATHER = 0.01
# A token of a prompt is a few characters, and JSON may spell a character in twelve bytes. The last is for no context.
BODY_BYTES_PER_TOKEN, SMALLEST_BODY_LIMIT, TOKENS_WITHOUT_CONTEXT = 64, 2**20, 2**16
# Rotary positions with these frequencies say something else to all rows once the longest is beyond a length.
ROPE_OF_THE_LONGEST_ROW = ("dynamic", "longrope")


class Engine:
    """A policy and a length value model that serve requests.

    Args:
        model (`PreTrainedModel`): the policy. It belongs to the engine from now on: of its generation config, only the
            ends of sequence are kept, since requests say everything else.
        length_value_model (`LengthValueModel`): frozen, with the fingerprint of the same tokenizer.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        name (`str`): what requests call the model.
        max_new_tokens_limit (`int`, *optional*): most tokens of a choice, whatever a request asks; the context by
            default.
        max_waiting (`int`, *optional*, defaults to `64`): requests that may wait while others are served.
        max_choices (`int`, *optional*, defaults to `16`): most choices that are generated together, those of one
            request or of several.
        scoring (`str`, *optional*, defaults to `"cached"`): see
            [`~lenvm_rl.decoding.generation.LengthGuidedLogitsProcessor`].

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
        self.max_new_tokens_limit, self.max_waiting, self.max_choices = max_new_tokens_limit, max_waiting, max_choices
        self.scoring = scoring
        self.max_body_bytes = max(SMALLEST_BODY_LIMIT, BODY_BYTES_PER_TOKEN * (self.context or TOKENS_WITHOUT_CONTEXT))
        self._longest_token = max(len(token) for token in tokenizer.get_vocab())
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
        """Read a request of a kind in a thread of its own, and put it in the queue.

        Returns:
            `Future`: the [`~lenvm_rl.serve.generation.Job`] once it waits, or a
            [`~lenvm_rl.serve.protocol.RequestError`] that says what to change.

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
            message = f"target_length={target} needs {name} of at least {target + 1} (the end-of-sequence token is one "
            message += f"more), and there are {room}: raise {name} or lower target_length."
            raise RequestError(message, "length_guidance.target_length")
        if guidance.needs_values and not guidance.truncates and self.vocab_size > MAX_UNTRUNCATED_VOCABULARY:
            message = f"without truncation, all {self.vocab_size} tokens are scored at every step: set top_k (e.g. 64) "
            raise RequestError(f"{message}or min_p in length_guidance, or top_p.", "length_guidance.top_k")
        if request.n > self.max_choices:
            raise RequestError(f"n must be at most {self.max_choices}, got {request.n}.", "n")
        return room

    def _turn(self) -> None:
        """Generate for what waits. There is a turn for each job; those of jobs that went with another do nothing."""
        seen = 0
        while seen < len(self._waiting) < self.max_choices:
            seen = len(self._waiting)
            time.sleep(GATHER)
        with self._lock:
            self._running = self._take()
        if self._running:
            self._run(self._running)
        with self._lock:
            self._running = []

    def _take(self) -> list[Job]:
        """The jobs that are next, in the order in which they came, as many as fit together."""
        taken: list[Job] = []
        while self._waiting and self._fit([*taken, self._waiting[0]]):
            job = self._waiting.popleft()
            taken += [job] if job.future.set_running_or_notify_cancel() else []
        return taken

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
    of a table of positions; and some rotary frequencies are those of the longest row.
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
        rope = getattr(text, "rope_parameters", None)
        for kind in (rope, *rope.values()) if rope else ({},):
            if not rope or (isinstance(kind, dict) and kind.get("rope_type") in ROPE_OF_THE_LONGEST_ROW):
                limit = getattr(text, "max_position_embeddings", None)
                widths.append(kind.get("original_max_position_embeddings", limit))
    return min((width for width in widths if width is not None), default=math.inf)
