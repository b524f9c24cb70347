"""A model behind HTTP, as vLLM and SGLang serve it, that fails now and then."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from kdtune.models import Decoder

Answer = dict[str, Any]


class StandIn:
    """Answers prompts of token ids.

    Attributes:
        prompts: all that were asked about and answered, in order.
        times: when requests came.
        failures: what is done to requests, the first to the first, instead of answering them: see `_Handler`.
        change: is given each answer, and gives what is sent.
        most_at_once: requests that were under way at one time.
        key: that requests must have; None: none.
    """

    name, max_seq_len, max_logprobs = "the-teacher", 128, 2048

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.prompts: list[list[int]] = []
        self.times: list[float] = []
        self.failures: list[str] = []
        self.change: Callable[[Answer], Answer] = lambda answer: answer
        self.under_way = self.most_at_once = 0
        self.key: str | None = None
        self.slowness = 0.0  # seconds that an answer takes
        self.retry_after = 0  # seconds that it asks for with 503
        self.lock = threading.Lock()

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """[s, v] of what comes after each."""
        with self.lock:
            self.prompts.append(tokens)
        return self.model(torch.tensor([tokens]))[0].double().log_softmax(-1)

    def vllm(self, body: Answer) -> Answer:
        """`/v1/completions`, with the k likeliest of each place, and its own token."""
        tokens, k = body["prompt"], body["prompt_logprobs"]
        log_probs = self.log_probs(tokens)
        found: list[Any] = [None]
        for place, token in enumerate(tokens[1:]):
            row = log_probs[place]
            values, ids = row.topk(k)
            likely = {**dict(zip(ids.tolist(), values.tolist(), strict=True)), token: row[token].item()}
            entries = enumerate(likely.items(), 1)
            found.append(
                {str(id): {"logprob": p, "rank": rank, "decoded_token": f"<{id}>"} for rank, (id, p) in entries}
            )
        return {"id": "cmpl-1", "object": "text_completion", "choices": [{"text": "x", "prompt_logprobs": found}]}

    def sglang(self, body: Answer) -> Answer:
        """`/generate`: lists from `logprob_start_len` on, of which the first has nothing."""
        tokens, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        log_probs = self.log_probs(tokens)
        own: list[Any] = [[None, tokens[start], None]]
        top: list[Any] = [None]
        for place in range(start + 1, len(tokens)):
            row = log_probs[place - 1]
            own.append([row[tokens[place]].item(), tokens[place], None])
            values, ids = row.topk(k)
            top.append([[value, id, None] for value, id in zip(values.tolist(), ids.tolist(), strict=True)])
        meta = {"prompt_tokens": len(tokens), "input_token_logprobs": own, "input_top_logprobs": top}
        return {"text": "x", "meta_info": meta}


@contextmanager
def served(model: Decoder) -> Iterator[tuple[StandIn, str]]:
    """A server on this machine, and its address."""
    stand_in = StandIn(model)

    class Handler(_Handler):
        teacher = stand_in

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stand_in, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    teacher: StandIn

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": self.teacher.name, "max_model_len": self.teacher.max_seq_len}]})

    def do_POST(self) -> None:
        teacher = self.teacher
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with teacher.lock:
            teacher.times.append(time.monotonic())
            teacher.under_way += 1
            teacher.most_at_once = max(teacher.most_at_once, teacher.under_way)
            failure = teacher.failures.pop(0) if teacher.failures else ""
        try:
            self._answer(body, failure)
        finally:
            with teacher.lock:
                teacher.under_way -= 1

    def _answer(self, body: Answer, failure: str) -> None:
        teacher = self.teacher
        if teacher.key is not None and self.headers["Authorization"] != f"Bearer {teacher.key}":
            return self._send(401, {"error": "Unauthorized"})
        if failure.isdecimal():
            return self._send(int(failure), {"error": {"message": "not now"}})
        if failure == "hang up":
            self.close_connection = True
            return self.connection.close()
        if failure == "sleep":
            time.sleep(0.6)
        if body.get("prompt_logprobs", 0) > teacher.max_logprobs:
            return self._send(400, {"error": {"message": "Requested prompt logprobs is greater than max allowed"}})
        time.sleep(teacher.slowness)
        answer = teacher.vllm(body) if self.path == "/v1/completions" else teacher.sglang(body)
        return self._send(200, teacher.change(answer), half=failure == "half")

    def _send(self, status: int, content: Answer, half: bool = False) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if status == 503:
            self.send_header("Retry-After", str(self.teacher.retry_after))
        self.end_headers()
        self.wfile.write(text[: len(text) // 2] if half else text)
