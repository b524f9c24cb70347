"""A teacher behind a server that tells the likeliest tokens at each place of a prompt: vLLM or SGLang.

Prompts are token ids, so that no tokenizer stands between; what comes back is held against them token by token.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from kdtune.config import MISSING, setting
from kdtune.teacher_cache.answers import TopK
from kdtune.teacher_cache.config import StoreConfig
from kdtune.teacher_cache.likeliest import Entries, check_kind, keep_likeliest

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds before a request is sent again
_SAME = 0.01  # nats by which one number may differ from itself
_TRY_AGAIN = (408, 425, 429)  # and all from 500


@dataclass
class ServerConfig:
    """The server that runs the teacher."""

    url: str = setting(MISSING)  # where it listens, such as http://host:8000
    kind: Literal["vllm", "sglang"] = "vllm"  # whose requests it understands
    model: str | None = None  # name by which it knows the teacher; null: it has only one model
    api_key_variable: str | None = None  # environment variable with the key that it asks for; null: it asks for none
    concurrency: int = setting(16, gt=0)  # requests under way at one time
    requests_per_second: float | None = setting(None, gt=0)  # begun at most; null: as many as are answered
    timeout_s: float = setting(600.0, gt=0)  # seconds of silence after which a request is given up, and sent again
    max_retries: int = setting(8, ge=0)  # of a request that fails; the waits grow from 1 to 60 seconds


class Question(NamedTuple):
    """An example to ask about.

    Attributes:
        example: its id.
        tokens: [n] int32.
        is_label: [n] bool, which of them are to be predicted; the first is not.
    """

    example: int
    tokens: np.ndarray
    is_label: np.ndarray


class ServedTeacher:
    """Asks a server.

    Attributes:
        model: by which name it knows the teacher.
        max_seq_len: tokens of its longest context; None if it does not say.
    """

    def __init__(self, cfg: ServerConfig, store: StoreConfig, vocab_size: int):
        """Find the server and its model.

        Args:
            cfg: where it is.
            store: what is kept of its answers.
            vocab_size: of the teacher.

        Raises:
            ValueError: settings that a server cannot serve, or it has no such model.
            OSError: it does not answer.
        """
        check_server(cfg, store)
        self._cfg, self._store, self._vocab_size = cfg, store, vocab_size
        self._headers = {"Content-Type": "application/json"}
        if cfg.api_key_variable is not None:
            self._headers["Authorization"] = f"Bearer {os.environ[cfg.api_key_variable]}"
        self._lock = threading.Lock()
        self._next_start = 0.0  # of a request, by the monotonic clock
        self._stopped = threading.Event()
        try:
            models = {model["id"]: model for model in self._request("/v1/models", max_retries=0)["data"]}
        except (KeyError, TypeError):
            raise ValueError(
                f"{cfg.url}/v1/models does not list models: this is no server of vLLM or SGLang."
            ) from None
        name = cfg.model or (next(iter(models)) if len(models) == 1 else None)
        if name is None or name not in models:
            asked = "server.model is not given" if cfg.model is None else f"server.model={cfg.model}"
            raise ValueError(f"{asked}, and {cfg.url} has {', '.join(models) or 'no model'}. Name one of these.")
        self.model = name
        self.max_seq_len: int | None = models[name].get("max_model_len")

    def ask(self, questions: Iterable[Question]) -> Generator[tuple[int, TopK]]:
        """Each example's id with the teacher's answers, as they come, in any order.

        Closed before its end, it waits for what is under way, and drops it.

        Raises:
            ValueError: an answer is not of the prompt, or no distribution, or the server refuses the request.
            OSError: it does not answer.
        """
        self._stopped.clear()
        pool = ThreadPoolExecutor(self._cfg.concurrency, "asking the teacher")
        waiting: set[Future[tuple[int, TopK]]] = set()
        try:
            for question in questions:
                waiting.add(pool.submit(self._answer, question))
                if len(waiting) >= 2 * self._cfg.concurrency:  # as many are parsed, or are next
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from _results(done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from _results(done)
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)

    def _answer(self, question: Question) -> tuple[int, TopK]:
        tokens, places = question.tokens.tolist(), question.is_label.nonzero()[0].tolist()
        request = self._to_vllm(tokens) if self._cfg.kind == "vllm" else self._to_sglang(tokens, places)
        answer = self._request(*request)
        read = _of_vllm if self._cfg.kind == "vllm" else _of_sglang
        try:
            rows, labels = read(answer, tokens, places), [tokens[place] for place in places]
            return question.example, keep_likeliest(rows, labels, self._store, self._vocab_size)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            problem = (
                f"it has another form than that of server.kind={self._cfg.kind} ({type(error).__name__}: {error})."
            )
        except ValueError as error:
            problem = str(error)
        raise ValueError(
            f"{self._cfg.url} gave an answer about an example of {len(tokens)} tokens that cannot be used: {problem}"
        )

    def _to_vllm(self, tokens: Sequence[int]) -> tuple[str, dict[str, Any]]:
        body = {"model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 1.0}
        return "/v1/completions", {**body, "prompt_logprobs": self._store.top_k}

    def _to_sglang(self, tokens: Sequence[int], places: Sequence[int]) -> tuple[str, dict[str, Any]]:
        body = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}}
        of_prompt = {"return_logprob": True, "logprob_start_len": places[0] - 1, "top_logprobs_num": self._store.top_k}
        return "/generate", {**body, **of_prompt}

    def _request(self, path: str, body: dict[str, Any] | None = None, max_retries: int | None = None) -> Any:
        """What the server answers, sooner or later."""
        max_retries = self._cfg.max_retries if max_retries is None else max_retries
        url = self._cfg.url.rstrip("/") + path
        data = None if body is None else json.dumps(body).encode()
        pause, asked = _FIRST_WAIT, 0.0
        for attempt in range(max_retries + 1):
            if attempt:  # apart from the others that have failed at this moment
                self._sleep(max(asked, pause * random.uniform(0.5, 1)))
                pause, asked = min(2 * pause, _LONGEST_WAIT), 0.0
            self._wait_for_turn()
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(url, data, self._headers), timeout=self._cfg.timeout_s
                ) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    text = error.read(500).decode(errors="replace").strip()
                failure = f"{error.code} {error.reason}: {text}"
                if error.code < 500 and error.code not in _TRY_AGAIN:
                    raise ValueError(f"{url} refuses a request: {failure}{self._hint(error.code)}") from None
                given = error.headers.get("Retry-After", "")
                asked = float(given) if given.isdecimal() else 0.0  # seconds; a date is rare
            except (OSError, http.client.HTTPException, ValueError) as error:  # the last: half of an answer
                failure = f"{type(error).__name__}: {error}"
        times = f", {max_retries + 1} times, at last" if max_retries else ""
        raise OSError(
            f"{url} could not be asked{times}: {failure}. What was answered before is kept: start again when the "
            "server runs."
        )

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return ". server.api_key_variable names the variable that holds its key."
        if status == 400 and self._cfg.kind == "vllm":
            return f". vLLM tells at most 20 likely tokens unless it runs with --max-logprobs {self._store.top_k}."
        return "."

    def _wait_for_turn(self) -> None:
        if self._cfg.requests_per_second is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 1 / self._cfg.requests_per_second
        self._sleep(start - time.monotonic())

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(max(0.0, seconds)):
            raise InterruptedError("Nobody waits for the answer any more.")


def _of_vllm(answer: Any, tokens: Sequence[int], places: Sequence[int]) -> list[Entries]:
    """`prompt_logprobs` of `/v1/completions` (vLLM 0.10): for each token of the prompt, what was likely in its place.

    The token itself is there too, however unlikely.
    """
    found = answer["choices"][0]["prompt_logprobs"]
    if found is None or len(found) != len(tokens):
        raise ValueError(f"it is about {len(found or ())} tokens.")
    for place, (token, entries) in enumerate(zip(tokens, found, strict=True)):
        if place > 0 and str(token) not in entries:
            raise ValueError(f"at place {place} it lacks the token that is there, {token}.")
    return [{int(token): entry["logprob"] for token, entry in found[place].items()} for place in places]


def _of_sglang(answer: Any, tokens: Sequence[int], places: Sequence[int]) -> list[Entries]:
    """`meta_info` of `/generate` (SGLang 0.5): lists that begin one token before the first that was asked about."""
    own, top = (answer["meta_info"][f"input_{name}_logprobs"] for name in ("token", "top"))
    start = len(tokens) - len(own)
    if len(own) != len(top) or not 0 <= start < places[0]:
        raise ValueError(f"it is about {len(own)} tokens, with likely ones for {len(top)}.")
    for place, (_, token, *_) in enumerate(own, start):
        if token != tokens[place]:
            raise ValueError(f"at place {place} it is about the token {token}, and {tokens[place]} is there.")
    rows: list[Entries] = []
    for place in places:
        likely = {token: value for value, token, *_ in top[place - start]}
        value, token, *_ = own[place - start]
        if abs(likely.setdefault(token, value) - value) > _SAME:
            raise ValueError(f"at place {place} its two lists disagree about the token {token}.")
        rows.append(likely)
    return rows


def _results(done: Iterable[Future[tuple[int, TopK]]]) -> Iterator[tuple[int, TopK]]:
    """Of all that have one, and only then the error of another."""
    yield from (future.result() for future in sorted(done, key=lambda future: future.exception() is not None))


def check_server(cfg: ServerConfig, store: StoreConfig) -> None:
    """Refuse settings that a server cannot serve.

    Raises:
        ValueError: which, why and what to do.
    """
    if not cfg.url.startswith(("http://", "https://")):
        raise ValueError(f"server.url={cfg.url} is no address of a server. Give one such as http://host:8000.")
    if cfg.url.rstrip("/").endswith("/v1"):
        raise ValueError(f"server.url={cfg.url}: give the address without /v1, which not every request has.")
    if cfg.kind == "sglang" and cfg.model is not None:
        raise ValueError(
            f"server.model={cfg.model} is about vLLM, which may have several models; SGLang has one. Leave it out."
        )
    if cfg.api_key_variable is not None and cfg.api_key_variable not in os.environ:
        raise ValueError(f"server.api_key_variable={cfg.api_key_variable}: there is no such environment variable.")
    check_kind(store, "a server tells")
