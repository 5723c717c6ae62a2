"""The server's program: its arguments, its endpoints, and what they answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.serve.answers import DONE, Answer, event
from lenvm_rl.serve.engine import Engine, Job, Piece
from lenvm_rl.serve.protocol import RequestError, read_json, read_model, read_request

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
except ImportError as error:
    raise ImportError(f"The server needs FastAPI and uvicorn ({error}): pip install 'lenvm-rl[serving]'") from error

logger = logging.getLogger(__name__)

# Seconds between two looks at whether a client that waits for a whole answer is still there.
PATIENCE = 0.1
# Seconds that answers under way are given when the server is told to stop.
GRACE = 5


@dataclass
class ServeArguments:
    """What to serve, and where."""

    model: str = field(metadata={"help": "Policy: a folder or hub id."})
    length_value_model: str = field(metadata={"help": "Length value model: a folder or hub id."})
    length_value_base: str | None = field(
        default=None,
        metadata={
            "help": "Model that a length value model of form 'adapter' or 'head' was fitted on; the policy's name for "
            "the policy itself."
        },
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "What requests call the model. Default: --model as given."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of both models: float32, float16 or bfloat16."})
    device: str = field(default="cpu", metadata={"help": "Device of both models, e.g. cuda."})
    max_new_tokens_limit: int | None = field(
        default=None, metadata={"help": "Most tokens of a choice, whatever a request asks. Default: the context."}
    )
    max_waiting: int = field(default=16, metadata={"help": "Requests that may wait while one is served."})
    max_choices: int = field(default=16, metadata={"help": "Largest n of a request."})
    scoring: str = field(
        default="cached",
        metadata={"help": "'cached', or 'full' for a length value model whose cache cannot be shared (slow)."},
    )


def load_engine(args: ServeArguments) -> Engine:
    """The models of the arguments, loaded and checked against each other.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: see [`~lenvm_rl.serve.engine.Engine`] and [`~lenvm_rl.modeling.LengthValueModel.from_pretrained`].
    """
    load_kwargs = {"dtype": args.dtype, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(args.model, **load_kwargs).to(args.device)
    base = model if args.length_value_base == args.model else args.length_value_base
    length_value_model = LengthValueModel.from_pretrained(args.length_value_model, base=base, dtype=args.dtype)
    return Engine(
        model,
        length_value_model.to(args.device).freeze(),
        AutoTokenizer.from_pretrained(args.model),
        args.served_model_name or args.model,
        max_new_tokens_limit=args.max_new_tokens_limit,
        max_waiting=args.max_waiting,
        max_choices=args.max_choices,
        scoring=args.scoring,
    )


def create_app(engine: Engine) -> FastAPI:
    """The web application around an engine, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="lenvm_rl.serve", lifespan=lifespan, openapi_url=None)
    started = int(time.time())
    card = {"id": engine.name, "object": "model", "created": started, "owned_by": "lenvm_rl"}

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        read_model({"model": name}, engine.name)
        return JSONResponse(card)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(engine, request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(engine, request, chat=True)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_such_endpoint(request: Request, error) -> Response:
        return error_response(
            RequestError(
                f"There is no {request.method} {request.url.path} here: see GET /v1/models, POST /v1/completions and "
                "POST /v1/chat/completions.",
                status=error.status_code,
            )
        )

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # The framework raises the error again once this is sent, and the server then drops the connection: a client
        # that is not told would send its next request into a closed one.
        response = error_response(server_error(error))
        response.headers["Connection"] = "close"
        return response

    return app


async def answer(engine: Engine, request: Request, *, chat: bool) -> Response:
    """Serve one request, whole or in pieces; a client that goes away ends its generation.

    Raises:
        RequestError: the request is refused.
    """
    body = read_json(await request.body())
    read_model(body, engine.name)
    asked = read_request(body, chat=chat, max_choices=engine.max_choices)
    if asked.stream:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

        def pass_on(piece: Piece | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = engine.submit(engine.prepare(asked, pass_on))
        job.future.add_done_callback(lambda future: pass_on(None))
        return StreamingResponse(stream(job, engine.name, pieces), media_type="text/event-stream")
    job = engine.submit(engine.prepare(asked))
    try:
        done = asyncio.wrap_future(job.future)
        # Below, a failure is read from the job: where the client has gone, nobody asks for it.
        done.add_done_callback(lambda future: future.cancelled() or future.exception())
        while not (await asyncio.wait({done}, timeout=PATIENCE))[0]:
            if await request.is_disconnected():
                # Nobody reads this.
                return Response(status_code=499)
        check_not_failed(job)
    finally:
        job.cancel()
    return JSONResponse(Answer(job, engine.name).whole())


async def stream(job: Job, name: str, pieces: asyncio.Queue) -> AsyncIterator[str]:
    """The events of a streamed answer."""
    writer = Answer(job, name)
    try:
        for chunk in writer.opening():
            yield event(chunk)
        while (piece := await pieces.get()) is not None:
            yield event(writer.chunk(piece))
        check_not_failed(job)
        for chunk in writer.closing():
            yield event(chunk)
        yield DONE
    except RequestError as error:
        # The status is sent already, so the error comes as an event.
        yield event(error.body())
    finally:
        job.cancel()


def check_not_failed(job: Job) -> None:
    """Raises a [`RequestError`] if a job ended because the server is being stopped, or its generation failed."""
    if job.cancelled.is_set():
        raise RequestError("The server was stopped: try again later.", status=503, kind="server_error")
    if (failure := job.future.exception()) is not None:
        logger.error("An answer failed.", exc_info=failure)
        raise server_error(failure)


def server_error(error: BaseException) -> RequestError:
    """What a client is told when generation fails."""
    return RequestError(
        f"Generation failed ({type(error).__name__}: {error}). The server goes on; its log says more.",
        status=500,
        kind="server_error",
    )


def error_response(error: RequestError) -> Response:
    """An answer that refuses."""
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def main(args: ServeArguments) -> None:
    """Load the models and serve until interrupted."""
    logging.basicConfig(level=logging.INFO)
    app = create_app(load_engine(args))
    uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=GRACE)
