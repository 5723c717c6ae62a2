"""The bodies of answers, as OpenAI's endpoints write them, with what length guidance adds.

An answer's `length_guidance` holds `predicted_length`, what the length value model predicted at the prompt, and
`forced`, the steps at which the hard bound overruled the choice, over all choices. That of a choice holds its `length`
and its own `forced`. Lengths are in tokens, end-of-sequence not counted; `usage` counts it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from lenvm_rl.serve.generation import Choice, Job
from lenvm_rl.serve.protocol import ChatRequest

DONE = "data: [DONE]\n\n"


class Answer:
    """Writes the answer to one job, whole, or in chunks: the first ones, then what is new, then the last ones.

    Args:
        job ([`~lenvm_rl.serve.generation.Job`]): what is answered.
        model (`str`): the model's name.
    """

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
            choices.append(self._choice(choice, content, choice.finish_reason, choice.token_ids))
        return {**self._head, "choices": choices, "usage": self._usage(), **self._about_all()}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece: in a chat, they say who speaks."""
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(self._choice(Choice(i), said, None, [])) for i in range(self.request.n if self.chat else 0)]

    def news(self) -> Iterator[dict[str, Any]]:
        """A chunk for each choice that went on; the one that finishes the last choice says what guidance did."""
        for choice in [choice for choice in self.job.choices if choice.index not in self._finished]:
            # Read before the rest, which may grow meanwhile.
            reason = choice.finish_reason
            characters, tokens = self._sent[choice.index]
            text, ids = choice.text[characters:], choice.token_ids[tokens:]
            if text or reason:
                self._sent[choice.index] = characters + len(text), tokens + len(ids)
                self._finished |= {choice.index} if reason else set()
                content = {"delta": {"content": text}} if self.chat else {"text": text}
                about = self._about_all() if len(self._finished) == self.request.n else {}
                yield {**self._chunk(self._choice(choice, content, reason, ids)), **about}

    def closing(self) -> list[dict[str, Any]]:
        """Chunks after the last piece: the counts, if they are asked for."""
        return [{**self._chunk(), "usage": self._usage()}] if self.request.stream_options.include_usage else []

    def _choice(self, choice: Choice, content: dict, reason: str | None, ids: list[int]) -> dict[str, Any]:
        ids = {"token_ids": ids} if self.request.return_token_ids else {}
        about = {"length_guidance": {"length": choice.length, "forced": choice.forced}} if reason else {}
        return {"index": choice.index, **content, "finish_reason": reason, "logprobs": None, **ids, **about}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        usage = {"usage": None} if self.request.stream_options.include_usage else {}
        return {**self._head, **kind, "choices": list(choices), **usage}

    def _usage(self) -> dict[str, int]:
        prompt, written = len(self.job.prompt_ids), sum(len(choice.token_ids) for choice in self.job.choices)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _about_all(self) -> dict[str, Any]:
        forced = sum(choice.forced for choice in self.job.choices)
        about = {"length_guidance": {"predicted_length": self.job.predicted_length, "forced": forced}}
        return about | ({"prompt_token_ids": self.job.prompt_ids} if self.request.return_token_ids else {})


def event(body: dict[str, Any]) -> str:
    """A server-sent event; in ASCII, since some clients take other characters than newlines for ends of lines."""
    return f"data: {json.dumps(body, ensure_ascii=True)}\n\n"
