"""The server's program: its arguments, its endpoints, and how they answer."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError(f"The server needs FastAPI and uvicorn ({error}): pip install 'lenvm-rl[serving]'") from error
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_rl.modeling.loading import load_length_value_model
from lenvm_rl.serve.engine import Choice, Engine, Job
from lenvm_rl.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, RequestError

logger = logging.getLogger(__name__)

# Seconds between two looks at whether a client is still there, and those that answers are given when the server stops;
# the status of an answer to a client that has gone.
PATIENCE, GRACE, NOBODY_READS = 0.1, 5, 499


@dataclass
class ServeArguments:
    """What to serve, and where."""

    model: str = field(metadata={"help": "Policy: a folder or hub id."})
    length_value_model: str = field(metadata={"help": "Length value model: a folder or hub id."})
    base: str | None = field(default=None, metadata={"help": "What an adapter or head was fitted on, if not --model."})
    served_model_name: str | None = field(default=None, metadata={"help": "What requests call it. Default: --model."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of both models: float32, float16 or bfloat16."})
    device: str = field(default="cpu", metadata={"help": "Device of both models, e.g. cuda."})
    max_waiting: int = field(default=64, metadata={"help": "Requests that may wait while others are served."})
    max_choices: int = field(default=16, metadata={"help": "Most choices generated together; the largest n."})
    scoring: str = field(default="cached", metadata={"help": "'full' where the value model's cache cannot be shared."})


def load_engine(args: ServeArguments) -> Engine:
    """The models of the arguments, loaded and checked against each other."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, use_safetensors=True).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = model if args.base in (None, args.model) else args.base
    kind = {"device": args.device, "dtype": args.dtype}
    value = load_length_value_model(args.length_value_model, base, tokenizer=tokenizer, **kind)
    bounds = {"max_waiting": args.max_waiting, "max_choices": args.max_choices, "scoring": args.scoring}
    return Engine(model, value, tokenizer, args.served_model_name or args.model, **bounds)


def create_app(engine: Engine) -> FastAPI:
    """The web application around an engine, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="lenvm_rl.serve", lifespan=lifespan, openapi_url=None)

    @app.get("/v1/models")
    async def models() -> dict:
        card = {"id": engine.name, "object": "model", "created": 0, "owned_by": "lenvm_rl"}
        return {"object": "list", "data": [card]}

    app.add_route("/v1/completions", partial(answer, engine, CompletionRequest), methods=["POST"])
    app.add_route("/v1/chat/completions", partial(answer, engine, ChatRequest), methods=["POST"])

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else {}
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=NOBODY_READS))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # The framework raises the error again once this is sent, and the server then drops the connection: a client
        # that is not told would send its next request into a closed one.
        return JSONResponse(server_error(error).body(), status_code=500, headers={"Connection": "close"})

    return app


class Answer:
    """Writes the answer to one job, whole, or in chunks: what is new, and the counts if they are `counted`. Lengths are
    in tokens, end-of-sequence not counted, but in `usage`; `forced` counts the steps that a hard bound overruled."""

    def __init__(self, job: Job, model: str):
        self.job, self.request, self.chat = job, job.request, isinstance(job.request, ChatRequest)
        self._head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.counted = self.request.stream_options.get("include_usage")
        # Of each choice: characters and tokens that are sent.
        self._sent = [(0, 0)] * self.request.n
        self._finished: set[int] = set()

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, when the job is done."""
        choices = [self._choice(each, "message", each.text, each.token_ids, each) for each in self.job.choices]
        return {**self._head, "choices": choices, "usage": self.usage(), **self._about_all()}

    def news(self) -> Iterator[dict[str, Any]]:
        """A chunk for each choice that went on; the one that finishes the last choice says what guidance did."""
        for choice in [choice for choice in self.job.choices if choice.index not in self._finished]:
            # Read before the rest, which may grow meanwhile.
            over = choice if choice.finish_reason else None
            characters, tokens = self._sent[choice.index]
            text, ids = choice.text[characters:], choice.token_ids[tokens:]
            if text or over:
                self._sent[choice.index] = characters + len(text), tokens + len(ids)
                self._finished |= {choice.index} if over else set()
                about = self._about_all() if len(self._finished) == self.request.n else {}
                piece = self._choice(choice, "delta", text, ids, over)
                if self.chat and tokens:
                    del piece["delta"]["role"]
                yield {**self.chunk(piece), **about}

    def _choice(self, choice: Choice, kind: str, text: str, ids: list[int], over: Choice | None) -> dict[str, Any]:
        content = {kind: {"role": "assistant", "content": text}} if self.chat else {"text": text}
        ids = {"token_ids": ids} if self.request.return_token_ids else {}
        about = {"length_guidance": {"length": over.length, "forced": over.forced}} if over else {}
        reason = over.finish_reason if over else None
        return {"index": choice.index, **content, "finish_reason": reason, "logprobs": None, **ids, **about}

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        """A chunk with pieces of choices."""
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        usage = {"usage": None} if self.counted else {}
        return {**self._head, **kind, "choices": list(choices), **usage}

    def usage(self) -> dict[str, int]:
        """The counts of tokens."""
        prompt, written = len(self.job.prompt_ids), sum(len(choice.token_ids) for choice in self.job.choices)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _about_all(self) -> dict[str, Any]:
        forced = sum(choice.forced for choice in self.job.choices)
        about = {"length_guidance": {"predicted_length": self.job.predicted_length, "forced": forced}}
        return about | ({"prompt_token_ids": self.job.prompt_ids} if self.request.return_token_ids else {})


async def answer(engine: Engine, kind: type[GenerationRequest], request: Request) -> Response:
    """Serve one request, whole or in pieces; a client that goes away ends its generation."""
    body = await read_body(request, engine.max_body_bytes)
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    job = await asyncio.wrap_future(engine.submit(body, kind, lambda: loop.call_soon_threadsafe(news.set)))
    if job.request.stream:
        return StreamingResponse(stream(job, engine.name, news), media_type="text/event-stream")
    try:
        while not job.future.done():
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), PATIENCE)
            if await request.is_disconnected():
                return Response(status_code=NOBODY_READS)
        check_not_failed(job)
        return JSONResponse(Answer(job, engine.name).whole())
    finally:
        job.cancel()


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request; a [`RequestError`] with status 413 as soon as it is known to exceed `most` bytes."""
    message = f"The request's body is longer than {most} bytes, more than the model's context needs: shorten it."
    too_long = RequestError(message, code="request_too_large", status=413)
    if int(request.headers.get("Content-Length", 0)) > most:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_long
    return bytes(body)


async def stream(job: Job, name: str, news: asyncio.Event) -> AsyncIterator[str]:
    """The server-sent events of a streamed answer."""
    writer, done = Answer(job, name), False
    try:
        while not done:
            await news.wait()
            news.clear()
            done = job.future.done()
            for chunk in writer.news():
                yield event(chunk)
        check_not_failed(job)
        if writer.counted:
            yield event({**writer.chunk(), "usage": writer.usage()})
        yield "data: [DONE]\n\n"
    except RequestError as error:
        # The status is sent already, so the error comes as an event.
        yield event(error.body())
    finally:
        job.cancel()


def event(body: dict) -> str:
    """A server-sent event; in ASCII, since some clients take other characters than newlines for ends of lines."""
    return f"data: {json.dumps(body)}\n\n"


def check_not_failed(job: Job) -> None:
    """Raises a [`RequestError`] if a job ended because the server is being stopped, or its generation failed."""
    if job.cancelled:
        raise RequestError("The server was stopped: try again later.", status=503)
    if (failure := job.future.exception()) is not None:
        logger.error("An answer failed.", exc_info=failure)
        raise server_error(failure)


def server_error(error: BaseException) -> RequestError:
    """What a client is told when generation fails."""
    message = f"Generation failed ({type(error).__name__}: {error}). The server goes on; its log says more."
    return RequestError(message, status=500)


def main(args: ServeArguments) -> None:
    """Load the models and serve until interrupted."""
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(create_app(load_engine(args)), host=args.host, port=args.port, timeout_graceful_shutdown=GRACE)
