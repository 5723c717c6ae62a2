"""The worker behind `lenvm_rl.serve`: requests wait in a bounded queue, and one thread generates for one at a time."""

from __future__ import annotations

import copy
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lenvm_rl.decoding import LengthGuidedLogitsProcessor
from lenvm_rl.endings import end_token_ids
from lenvm_rl.guidance import TILT, LengthGuidance
from lenvm_rl.logits_processor import MAX_UNTRUNCATED_VOCABULARY
from lenvm_rl.returns import remaining_from_logits
from lenvm_rl.sampling_jobs import tokenize_prompts
from lenvm_rl.serve.protocol import GenerationRequest, RequestError
from lenvm_rl.serve.text import IncrementalText
from lenvm_rl.tokenization import check_pad_is_not_eos, check_same_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class Choice:
    """One completion, as far as it has come.

    Args:
        index (`int`): its place in the answer.
        text (`str`): without special tokens, and without a stop string and what follows it.
        token_ids (list of `int`): as chosen, the end included.
        finish_reason (`str`, *optional*): `"stop"` or `"length"`; `None` while it goes on.
        length (`int`): tokens, end-of-sequence not counted.
        forced (`int`): steps at which the hard bound overruled the choice; known at the end.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    length: int = 0
    forced: int = 0


@dataclass(frozen=True)
class Piece:
    """What a step adds to a choice: text and ids; with a `finish_reason`, the last piece of it."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass(eq=False)
class Job:
    """A request on its way.

    Args:
        request ([`~lenvm_rl.serve.protocol.GenerationRequest`]): what is asked.
        prompt_ids (list of `int`): its prompt.
        max_new_tokens (`int`): most tokens of a choice, end-of-sequence counted.
        emit (callable): given each [`Piece`], in the worker's thread.
        choices (list of [`Choice`]): what there is so far.
        predicted_length (`float`, *optional*): tokens, end-of-sequence not counted, that the length value model
            predicts at the prompt; `None` until the worker has begun.
        future (`Future`): done when the job is; it gives the job.
    """

    request: GenerationRequest
    prompt_ids: list[int]
    max_new_tokens: int
    emit: Callable[[Piece], None]
    choices: list[Choice]
    predicted_length: float | None = None
    future: Future | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop after the token under way, or never begin; a finished job stays as it is."""
        self.cancelled.set()
        if self.future is not None:
            self.future.cancel()


class Engine:
    """A policy and a length value model that serve requests one after the other.

    Args:
        model (`PreTrainedModel`): the policy. It belongs to the engine from now on: of its generation config, only the
            ends of sequence are kept, since requests say everything else.
        length_value_model (`LengthValueModel`): frozen, with the fingerprint of the same tokenizer.
        tokenizer (`PreTrainedTokenizerBase`): the policy's, with a pad token that is not its end.
        name (`str`): what requests call the model.
        max_new_tokens_limit (`int`, *optional*): most tokens of a choice, whatever a request asks; the context by
            default.
        max_waiting (`int`, *optional*, defaults to `16`): requests that may wait while one is served.
        max_choices (`int`, *optional*, defaults to `16`): most choices of a request; they are generated together.
        scoring (`str`, *optional*, defaults to `"cached"`): see
            [`~lenvm_rl.decoding.LengthGuidedLogitsProcessor`].

    Raises:
        ValueError: the tokenizers differ, pad is the end, the length value model cannot be scored with, there is
            neither a context nor a limit, or a number is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        length_value_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        max_new_tokens_limit: int | None = None,
        max_waiting: int = 16,
        max_choices: int = 16,
        scoring: str = "cached",
    ):
        if max_waiting < 0 or max_choices < 1 or (max_new_tokens_limit is not None and max_new_tokens_limit < 1):
            raise ValueError("max_new_tokens_limit and max_choices must be at least 1, max_waiting at least 0.")
        check_pad_is_not_eos(tokenizer)
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
        contexts = [context for one in (model, length_value_model) if (context := context_of(one)) is not None]
        self.context = min(contexts, default=None)
        if self.context is None and max_new_tokens_limit is None:
            raise ValueError("The models' configs name no max_position_embeddings: give max_new_tokens_limit.")
        self.model, self.length_value_model, self.name = model.eval(), length_value_model, name
        self.eos_token_ids = end_token_ids(tokenizer, model.generation_config)
        # A prompt is read by both.
        self.vocab_size = min(one.get_input_embeddings().weight.shape[0] for one in (model, length_value_model))
        self.max_new_tokens_limit, self.max_waiting, self.max_choices = max_new_tokens_limit, max_waiting, max_choices
        self.scoring = scoring
        # What cannot be scored is refused now, not at the first request.
        self._processor(LengthGuidance())
        model.generation_config = GenerationConfig()
        # A fast tokenizer must not be used by two threads: this one encodes, its copy decodes in the worker.
        self.tokenizer, self._decoder = tokenizer, copy.deepcopy(tokenizer)
        self._worker = ThreadPoolExecutor(1, "lenvm_rl.serve")
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()

    def prepare(self, request: GenerationRequest, emit: Callable[[Piece], None] = lambda piece: None) -> Job:
        """A job that can be run: its prompt in tokens, and room for what is asked.

        Raises:
            RequestError: on a prompt that is empty or not tokens of this vocabulary, a chat that the model has no
                template for or whose template refuses it, no room in the context, or a guidance that cannot be served.
        """
        guidance = request.guidance
        if guidance.needs_values and not guidance.truncates and self.vocab_size > MAX_UNTRUNCATED_VOCABULARY:
            raise RequestError(
                f"without truncation, all {self.vocab_size} tokens are scored at every step: set top_k (e.g. 64) or "
                "min_p in length_guidance, or top_p.",
                "length_guidance.top_k",
            )
        prompt_ids = self._tokenize(request)
        max_new_tokens = self._room(request, len(prompt_ids))
        if guidance.mode != TILT and max_new_tokens < guidance.target_length + 1:
            raise RequestError(
                f"target_length={guidance.target_length} needs {request.max_tokens_field} of at least "
                f"{guidance.target_length + 1} (the end-of-sequence token is one more), and there are "
                f"{max_new_tokens}: raise {request.max_tokens_field} or lower target_length.",
                "length_guidance.target_length",
            )
        return Job(request, prompt_ids, max_new_tokens, emit, [Choice(index) for index in range(request.n)])

    def submit(self, job: Job) -> Job:
        """Put a job in the queue.

        Raises:
            RequestError: with status 429, if the queue is full.
        """
        with self._lock:
            if len(self._jobs) > self.max_waiting:
                raise RequestError(
                    f"The server is busy and {self.max_waiting} more requests wait: try again later.",
                    code="queue_full",
                    status=429,
                    kind="rate_limit_error",
                )
            self._jobs.add(job)
            job.future = self._worker.submit(self._run, job)
        job.future.add_done_callback(lambda future: self._forget(job))
        return job

    def close(self) -> None:
        """Stop what runs, drop what waits, and end the worker."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)

    def _tokenize(self, request: GenerationRequest) -> list[int]:
        prompt, place = request.prompt, request.prompt_field
        if request.chat and self.tokenizer.chat_template is None:
            raise RequestError("This model's tokenizer has no chat template: use /v1/completions.", place)
        if isinstance(prompt, str) and not self.tokenizer(prompt)["input_ids"]:
            raise RequestError("The prompt has no tokens: write something.", place)
        if isinstance(prompt, str) or request.chat:
            try:
                return tokenize_prompts(self.tokenizer, [prompt])[0]
            except (TemplateError, ValueError) as error:
                raise RequestError(f"The model's chat template refuses these messages: {error}.", place) from error
        wrong = [token for token in prompt if not 0 <= token < self.vocab_size]
        if wrong:
            raise RequestError(f"{wrong[0]} is no token id: the vocabulary has {self.vocab_size} tokens.", place)
        return prompt

    def _room(self, request: GenerationRequest, prompt_tokens: int) -> int:
        asked, limit = request.max_tokens, self.max_new_tokens_limit
        if asked is not None and limit is not None and asked > limit:
            raise RequestError(
                f"{request.max_tokens_field} is {asked}, and this server generates at most {limit} tokens: lower it.",
                request.max_tokens_field,
            )
        left = None if self.context is None else self.context - prompt_tokens
        if left is not None and left < (asked or 1):
            raise RequestError(
                f"The prompt has {prompt_tokens} tokens and {asked or 1} more are asked for, but the model's context "
                f"is {self.context}: shorten {request.prompt_field} or lower {request.max_tokens_field}.",
                request.prompt_field,
                "context_length_exceeded",
            )
        return asked or min(number for number in (limit, left) if number is not None)

    def _processor(self, guidance: LengthGuidance) -> LengthGuidedLogitsProcessor:
        return LengthGuidedLogitsProcessor(
            self.length_value_model,
            guidance,
            eos_token_id=self.eos_token_ids,
            scoring=self.scoring,
            same_tokenizer=True,
        )

    def _run(self, job: Job) -> Job:
        if not job.cancelled.is_set():
            self._generate(job)
        return job

    @torch.no_grad()
    def _generate(self, job: Job) -> None:
        request, device = job.request, self.model.device
        prompt = torch.tensor([job.prompt_ids], device=device)
        job.predicted_length = self._predicted_length(prompt)
        processor = self._processor(request.guidance)
        watcher = Watcher(job, processor, [IncrementalText(self._decoder, request.stop) for _ in job.choices])
        rows = prompt.repeat(request.n, 1)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
            self.model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                generation_config=self._generation_config(job),
                logits_processor=LogitsProcessorList([processor]),
                stopping_criteria=StoppingCriteriaList([watcher]),
            )

    def _generation_config(self, job: Job) -> GenerationConfig:
        common = {
            "max_new_tokens": job.max_new_tokens,
            "eos_token_id": self.eos_token_ids,
            # Rows that a stop string ended are filled with it: so guidance learns that they are over.
            "pad_token_id": self.eos_token_ids[0],
        }
        if job.request.guidance.temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        # Temperature and candidate rule are the guidance's.
        return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **common)

    def _predicted_length(self, prompt: Tensor) -> float:
        prompt = prompt.to(self.length_value_model.device)
        output = self.length_value_model(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        remaining = remaining_from_logits(output.logits[0, -1].float(), self.length_value_model.config.gamma)
        if not bool(torch.isfinite(remaining)):
            raise FloatingPointError("the length value model gave NaN or infinity: check its weights and its dtype.")
        # At the prompt, at least the end is still to come, and it does not count.
        return max(float(remaining) - 1.0, 0.0)


class Watcher(StoppingCriteria):
    """Follows a generation token by token: hands out its pieces, and ends rows at stop strings or when cancelled.

    Args:
        job ([`Job`]): whose choices are filled.
        processor ([`~lenvm_rl.decoding.LengthGuidedLogitsProcessor`]): knows what was forced.
        texts (list of [`~lenvm_rl.serve.text.IncrementalText`]): one for each choice.
    """

    def __init__(self, job: Job, processor: LengthGuidedLogitsProcessor, texts: list[IncrementalText]):
        self.job, self.processor, self.texts = job, processor, texts
        self._ends = set(processor.eos_token_ids)
        self._unsent: list[list[int]] = [[] for _ in texts]

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        """Which rows of `input_ids` `(B, S)` are over, `(B,)` bool."""
        cancelled = self.job.cancelled.is_set()
        if not cancelled:
            for choice, token in zip(self.job.choices, input_ids[:, -1].tolist(), strict=True):
                if choice.finish_reason is None:
                    self._take(choice, token)
        over = [cancelled or choice.finish_reason is not None for choice in self.job.choices]
        return torch.tensor(over, device=input_ids.device)

    def _take(self, choice: Choice, token: int) -> None:
        text, unsent = self.texts[choice.index], self._unsent[choice.index]
        choice.token_ids.append(token)
        unsent.append(token)
        piece = ""
        if token in self._ends:
            choice.finish_reason = "stop"
        else:
            choice.length += 1
            piece = text.push(token)
            if text.stopped:
                choice.finish_reason = "stop"
            elif len(choice.token_ids) == self.job.max_new_tokens:
                choice.finish_reason = "length"
        if choice.finish_reason is not None:
            piece += text.finish()
            choice.finish_reason = "stop" if text.stopped else choice.finish_reason
            choice.forced = int(self.processor.report.forced[choice.index])
        choice.text += piece
        if piece or choice.finish_reason is not None:
            self.job.emit(Piece(choice.index, piece, list(unsent), choice.finish_reason))
            unsent.clear()


def context_of(model: PreTrainedModel) -> int | None:
    """The most tokens that a model can read, `None` if its config names no number."""
    config = model.config.get_text_config(decoder=True)
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None
