"""The bodies of answers, as OpenAI's endpoints write them, with what length guidance adds.

An answer's `length_guidance` holds `predicted_length`, what the length value model predicted at the prompt, and
`forced`, the steps at which the hard bound overruled the choice, over all choices. That of a choice holds its `length`
and its own `forced`. Lengths are in tokens, end-of-sequence not counted; `usage` counts it.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from lenvm_rl.serve.engine import Choice, Job, Piece

DONE = "data: [DONE]\n\n"


class Answer:
    """Writes the answer to one job.

    Args:
        job ([`~lenvm_rl.serve.engine.Job`]): what is answered.
        model (`str`): the model's name.
    """

    def __init__(self, job: Job, model: str):
        self.job, self.chat = job, job.request.chat
        self._head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._finished = 0

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, when the job is done."""
        body = {**self._head, "choices": [self._choice(choice) for choice in self.job.choices], "usage": self._usage()}
        body["length_guidance"] = self._guidance()
        if self.job.request.return_token_ids:
            body["prompt_token_ids"] = self.job.prompt_ids
        return body

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece: in a chat, they say who speaks."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([self._chunk_choice(index, delta, None)]) for index in range(self.job.request.n)]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """The chunk of one piece; the one that finishes the last choice says what guidance did."""
        choice = self._chunk_choice(piece.index, {"content": piece.text} if self.chat else piece.text, piece)
        if piece.finish_reason is None:
            return self._chunk([choice])
        self._finished += 1
        choice["length_guidance"] = _choice_guidance(self.job.choices[piece.index])
        chunk = self._chunk([choice])
        if self._finished == self.job.request.n:
            chunk["length_guidance"] = self._guidance()
            if self.job.request.return_token_ids:
                chunk["prompt_token_ids"] = self.job.prompt_ids
        return chunk

    def closing(self) -> list[dict[str, Any]]:
        """Chunks after the last piece: the counts, if they are asked for."""
        if not self.job.request.include_usage:
            return []
        return [{**self._chunk([]), "usage": self._usage()}]

    def _choice(self, choice: Choice) -> dict[str, Any]:
        said = {"role": "assistant", "content": choice.text, "refusal": None}
        body = {
            "index": choice.index,
            **({"message": said} if self.chat else {"text": choice.text}),
            "finish_reason": choice.finish_reason,
            "logprobs": None,
            "length_guidance": _choice_guidance(choice),
        }
        if self.job.request.return_token_ids:
            body["token_ids"] = choice.token_ids
        return body

    def _chunk_choice(self, index: int, content: Any, piece: Piece | None) -> dict[str, Any]:
        body = {
            "index": index,
            **({"delta": content} if self.chat else {"text": content}),
            "finish_reason": None if piece is None else piece.finish_reason,
            "logprobs": None,
        }
        if self.job.request.return_token_ids and piece is not None:
            body["token_ids"] = piece.token_ids
        return body

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "choices": choices}
        if self.chat:
            chunk["object"] = "chat.completion.chunk"
        if self.job.request.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, int]:
        prompt, written = len(self.job.prompt_ids), sum(len(choice.token_ids) for choice in self.job.choices)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _guidance(self) -> dict[str, Any]:
        forced = sum(choice.forced for choice in self.job.choices)
        return {"predicted_length": self.job.predicted_length, "forced": forced}


def event(body: dict[str, Any]) -> str:
    """A server-sent event; in ASCII, since some clients take other characters than newlines for ends of lines."""
    return f"data: {json.dumps(body, ensure_ascii=True)}\n\n"


def _choice_guidance(choice: Choice) -> dict[str, int]:
    return {"length": choice.length, "forced": choice.forced}
