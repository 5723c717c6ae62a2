"""A completions server whose model is a function of prompt and seed, and which fails by a script."""

import json
import random
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tiny import EOS

FIRST_WORD, VOCABULARY = 6, 64


def sampled(prompt, seed, most):
    """What the scripted model samples: words, and an end of sequence with a chance of 1/8 at each step."""
    draw = random.Random(f"{prompt}:{seed}")
    ids = []
    while len(ids) < most and EOS not in ids:
        ids.append(EOS if draw.random() < 1 / 8 else draw.randrange(FIRST_WORD, VOCABULARY))
    return ids


def openai_answer(ids, prompt_tokens, **choice):
    """An answer of the completions endpoint; the last of `ids` decides why it ended."""
    text = " ".join(f"w{token}" for token in ids if token >= FIRST_WORD)
    reason = "stop" if ids[-1] == EOS else "length"
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids)}
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason, **choice}], "usage": usage}


def vllm_answer(request):
    """As vLLM answers when asked for token ids."""
    assert request["return_token_ids"] is True and isinstance(request["prompt"], list)
    ids = sampled(request["prompt"], request["seed"], request["max_tokens"])
    return openai_answer(ids, len(request["prompt"]), token_ids=ids, stop_reason=None)


def text_answer(request):
    """As a server answers that takes and gives text."""
    assert isinstance(request["prompt"], str)
    ids = sampled(request["prompt"], request["seed"], request["max_tokens"])
    return openai_answer(ids, len(request["prompt"].split()))


class ScriptedServer(ThreadingHTTPServer):
    """Answers a POST by `answer(request)`, unless `script(number, times)` says that it fails.

    `number` counts requests, `times` how often the same one was sent before. A failure is `(status,
    headers)`, `"hang"` (no answer), `"half"` (a body that breaks off), `"garbage"` (no JSON), `"abort"` (another reason
    for the end) or `None`.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer=vllm_answer, script=lambda number, times: None, delay=0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.script, self.delay = answer, script, delay
        self.lock, self.requests, self.paths, self.headers = threading.Lock(), [], [], []
        self.under_way = self.most_under_way = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            failure = server.script(len(server.requests), server.requests.count(request))
            server.requests.append(request)
            server.paths.append(self.path)
            server.headers.append(dict(self.headers))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            time.sleep(server.delay)
            self._respond(request, failure)
        finally:
            with server.lock:
                server.under_way -= 1

    def _respond(self, request, failure):
        if failure == "hang":
            time.sleep(2.5)
            self.close_connection = True
            return
        if isinstance(failure, tuple):
            return self._send(failure[0], b'{"error": "scripted"}', failure[1])
        answer = self.server.answer(request)
        if failure == "abort":
            answer["choices"][0]["finish_reason"] = "abort"
        body = json.dumps(answer).encode()
        if failure == "garbage":
            return self._send(200, body[: len(body) // 2], {})
        if failure == "half":
            self._send(200, body[: len(body) // 2], {}, length=len(body))
            self.close_connection = True
            return
        self._send(200, body, {})

    def _send(self, status, body, headers, length=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def scripted_server(*args, **options):
    """A [`ScriptedServer`] that is running."""
    server = ScriptedServer(*args, **options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
