"""Scores of many requests against each by itself, and against transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdtune.checkpoint import load_model
from kdtune.evaluation import scoring
from kdtune.evaluation.scoring import Request, Score, fit, score, windows
from kdtune.generation import generate
from kdtune.models import Decoder

RANDOM = np.random.default_rng(0)


def tokens(count: int) -> list[int]:
    return RANDOM.integers(3, 97, count).tolist()


def requests() -> list[Request]:
    """Contexts of their own, contexts with several continuations of one and more tokens, and a common beginning."""
    shots = tokens(20)
    found = [Request(tokens(int(n)), tokens(int(m))) for n, m in RANDOM.integers(1, 20, (8, 2))]
    for length in (1, 7, 18):
        context = [*shots, *tokens(length)]
        found += [Request(context, tokens(n)) for n in (1, 1, 5, 3, 8)]
        answer = tokens(4)
        found += [Request(context, answer), Request(context, answer), Request(context, [*answer, 7])]
    question = tokens(17)
    found += [Request(question, [letter]) for letter in (5, 6, 7)]
    found += [Request([*shots, *tokens(2)], tokens(2)) for _ in range(9)]
    found += [Request([1], [9, letter]) for letter in (5, 6, 7)]
    return [found[i] for i in RANDOM.permutation(len(found))]


REQUESTS = requests()


@torch.no_grad()
def one_by_one(logits: Callable[[Tensor], Tensor], requests: Sequence[Request]) -> list[Score]:
    found = []
    for context, continuation in requests:
        row = torch.tensor([[*context, *continuation]])
        log_probs = logits(row[:, :-1])[0, len(context) - 1 :].log_softmax(-1)  # [continuation, v]
        of_targets = log_probs[torch.arange(len(continuation)), torch.tensor(continuation)]
        found.append(Score(of_targets.double().sum().item(), log_probs.argmax(-1).tolist() == list(continuation)))
    return found


def assert_close(found: list[Score], expected: list[Score]) -> None:
    np.testing.assert_allclose(
        [one.log_likelihood for one in found], [one.log_likelihood for one in expected], atol=1e-5, rtol=1e-6
    )
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]


@pytest.fixture
def model(hf_folder: Callable[..., Path]) -> Decoder:
    return load_model(hf_folder("qwen3"), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_together_as_alone(model: Decoder, max_tokens: int) -> None:
    assert_close(score(model, REQUESTS, max_tokens=max_tokens, progress=False), one_by_one(model, REQUESTS))


def test_every_family_as_transformers(variant: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path]) -> None:
    expected = one_by_one(lambda row: oracle(variant)(row).logits, REQUESTS)
    model = load_model(hf_folder(variant), dtype=torch.float32, device="cpu")
    fitting = [i for i, one in enumerate(REQUESTS) if sum(map(len, one)) <= model.config.max_seq_len + 1]
    assert_close(score(model, [REQUESTS[i] for i in fitting], progress=False), [expected[i] for i in fitting])


def test_what_the_model_would_say_is_greedy(model: Decoder) -> None:
    contexts = [one.context for one in REQUESTS]
    said = generate(model, contexts, max_new_tokens=4)
    asked = [Request(context, answer) for context, answer in zip(contexts, said, strict=True)]
    asked += [Request(context, [*answer[:-1], answer[-1] - 1]) for context, answer in zip(contexts, said, strict=True)]
    found = [one.is_greedy for one in score(model, asked, max_tokens=100, progress=False)]
    assert found == [True] * len(said) + [False] * len(said)


def test_few_logits_at_a_time(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = score(model, REQUESTS, progress=False)
    monkeypatch.setattr(scoring, "_LOGITS", 3 * 97)
    sizes = []
    model.head.register_forward_hook(lambda _, args, logits: sizes.append(len(logits)))
    assert_close(score(model, REQUESTS, progress=False), expected)
    assert max(sizes) == 3


def test_contexts_are_computed_once(model: Decoder) -> None:
    shots, num_questions = tokens(24), 6
    questions = [[*shots, *tokens(10)] for _ in range(num_questions)]
    asked = [Request(question, tokens(3)) for question in questions for _ in range(4)]
    computed: list[int] = []
    model.model.register_forward_hook(lambda _, args, out: computed.append(args[0].numel()))
    score(model, asked, progress=False)
    assert sum(computed) == 24 + num_questions * (10 + 4 * 2)


def test_memory_is_bounded(model: Decoder) -> None:
    computed: list[int] = []
    model.model.register_forward_hook(lambda _, args, out: computed.append(args[0].numel()))
    score(model, REQUESTS, max_tokens=60, progress=False)
    assert max(computed) <= 60
    assert len(computed) > 10


def test_bf16(hf_folder: Callable[..., Path]) -> None:
    model = load_model(hf_folder("llama"), dtype=torch.bfloat16, device="cpu")
    found = [one.log_likelihood for one in score(model, REQUESTS, progress=False)]
    expected = [one.log_likelihood for one in one_by_one(lambda row: model(row).float(), REQUESTS)]
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 12, 13, 40])
@pytest.mark.parametrize("max_seq_len", [1, 6])
def test_windows_are_those_of_the_harness(length: int, max_seq_len: int) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed: pip install 'kdtune[eval]'")
    text = tokens(length)
    expected = map(utils.make_disjoint_window, utils.get_rolling_token_windows(text, 1, max_seq_len, 1))
    assert [(list(context), list(scored)) for context, scored in windows(text, 1, max_seq_len)] == list(expected)


def test_beginnings_are_cut_off() -> None:
    short, exact, long = Request([1, 2], [3]), Request([1, 2, 3], [4, 5]), Request([1, 2, 3, 4, 5], [6, 7])
    assert fit([short, exact, long], 4) == [short, exact, Request([3, 4, 5], [6, 7])]
    assert fit([Request([1, 2], [3, 4, 5, 6])], 4) == [Request([2], [3, 4, 5, 6])]
    with pytest.raises(ValueError, match="continuation of 5 tokens"):
        fit([short, Request([1], [2, 3, 4, 5, 6])], 4)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [3]), "Request 1 has 0 tokens of context and 1 to score"),
        (Request([3], []), "Request 1 has 1 tokens of context and 0 to score"),
        (Request([3] * 60, [4] * 6), "Request 1 is 65 tokens of input, and the model was built for 64"),
    ],
)
def test_refusals(model: Decoder, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(model, [Request([1], [2]), request_])


def test_nothing_to_score(model: Decoder) -> None:
    assert score(model, []) == []


def test_progress(model: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    score(model, REQUESTS)
    assert "100%" in capsys.readouterr().out
