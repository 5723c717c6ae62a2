"""Requests that are generated together: each row is drawn, followed and ended as if it were alone."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from lenvm_rl.decoding.generation import LengthGuidedLogitsProcessor
from lenvm_rl.endings import own_length
from lenvm_rl.serve.protocol import GenerationRequest
from lenvm_rl.serve.text import IncrementalText


@dataclass
class Choice:
    """One completion, as far as it has come.

    Args:
        index (`int`): its place in the answer.
        text (`str`): without special tokens, and without a stop string and what follows it.
        token_ids (list of `int`): as chosen, the end included.
        length (`int`): tokens, end-of-sequence not counted; known at the end, as is the next.
        forced (`int`): steps at which the hard bound overruled the choice.
        finish_reason (`str`, *optional*): `"stop"` or `"length"`; set last, so that all else is final where it is set.
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
        predicted_length (`float`, *optional*): tokens, end-of-sequence not counted, that the length value model
            predicts at the prompt.
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

    Args:
        jobs (sequence of [`Job`]): in the order of the rows.
        processor ([`~lenvm_rl.decoding.generation.LengthGuidedLogitsProcessor`]): knows the ends, and what was forced.
        tokenizer (`PreTrainedTokenizerBase`): decodes.
    """

    def __init__(self, jobs: Sequence[Job], processor: LengthGuidedLogitsProcessor, tokenizer: PreTrainedTokenizerBase):
        self.jobs, self.processor = jobs, processor
        self._rows = [
            (job, choice, IncrementalText(tokenizer, job.request.stop)) for job in jobs for choice in job.choices
        ]

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
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
