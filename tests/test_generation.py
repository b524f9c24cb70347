"""Generation against transformers, and against itself: a row never depends on its neighbours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdtune.checkpoint import load_model
from kdtune.generation import generate, sample, side_by_side
from kdtune.models import Decoder

PROMPTS = [[1, 17, 4], [1, 9, 33, 60, 71, 8, 90, 12, 13], [5], [1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture
def model(hf_folder: Callable[..., Path]) -> Decoder:
    return load_model(hf_folder("qwen3"), dtype=torch.float32, device="cpu")


@torch.no_grad()
def test_greedy_equals_transformers(variant: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path]) -> None:
    expected = [
        oracle(variant).generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=[2, 3]
        )[0, len(prompt) :]
        for prompt in PROMPTS
    ]
    model = load_model(hf_folder(variant), dtype=torch.float32, device="cpu")
    assert generate(model, PROMPTS, max_new_tokens=20, stop_ids={2, 3}) == [row.tolist() for row in expected]


def test_sampled_rows_do_not_depend_on_neighbours(model: Decoder) -> None:
    settings = {"max_new_tokens": 15, "temperature": 1.0, "top_k": 40, "top_p": 0.95}
    together = generate(model, PROMPTS, seed=5, **settings)
    alone = [generate(model, [prompt], seed=5, rows=[row], **settings)[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together == generate(model, PROMPTS, seed=5, **settings)
    assert together != generate(model, PROMPTS, seed=6, **settings)


def test_rows_of_one_seed_are_not_those_of_the_next(model: Decoder) -> None:
    prompts = [[5, 6, 7]] * 6
    settings = {"max_new_tokens": 12, "temperature": 1.0}
    zero, one = (generate(model, prompts, seed=seed, **settings) for seed in (0, 1))
    rows = [tuple(row) for row in zero + one]
    assert len(set(rows)) == len(rows)
    assert generate(model, prompts[:2], seed=1, rows=[4, 5], **settings) == one[4:]


def test_sampling_leaves_the_global_random_state(model: Decoder) -> None:
    state = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_token_ends_its_own_row(model: Decoder) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12)
    stop = free[0][4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, stop_ids={stop})
    for full, cut in zip(free, stopped, strict=True):
        assert cut == (full[: full.index(stop) + 1] if stop in full else full)


def test_rows_end_where_the_caller_says(model: Decoder) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12, stop_ids={2})
    end = free[0][3]
    steps = []
    model.model.register_forward_hook(lambda *_: steps.append(1))

    def ends(tokens: list[int]) -> bool:
        return end in tokens or len(tokens) == 7

    found = generate(model, PROMPTS, max_new_tokens=12, stop_ids={2}, ends=ends)
    for full, cut in zip(free, found, strict=True):
        assert cut == (full[: full.index(end) + 1] if end in full[:7] else full[:7])
    assert len(steps) <= 7


def test_one_token_and_no_prompts(model: Decoder) -> None:
    assert generate(model, PROMPTS, max_new_tokens=1) == [row[:1] for row in generate(model, PROMPTS, max_new_tokens=4)]
    assert generate(model, [], max_new_tokens=4) == []


PROBABILITIES = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.15, 0.1])


def frequencies(num_draws: int = 20_000, **settings: Any) -> torch.Tensor:
    """How often each token comes, with draws spread evenly over [0, 1)."""
    draws = torch.arange(num_draws) / num_draws
    tokens = sample(PROBABILITIES.log().expand(num_draws, -1), draws, **settings)
    return torch.bincount(tokens, minlength=len(PROBABILITIES)) / num_draws


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, [0, 1, 3, 4, 5]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 100}, [0, 1, 3, 4, 5]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 3, 4, 5]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # 0.4 and 0.3 of 0.85
    ],
)
def test_sampling_follows_the_probabilities_of_the_allowed(settings: dict[str, Any], allowed: list[int]) -> None:
    expected = torch.zeros_like(PROBABILITIES)
    expected[allowed] = PROBABILITIES[allowed]
    torch.testing.assert_close(frequencies(**settings), expected / expected.sum(), atol=2e-4, rtol=0.0)


def test_largest_draw_stays_among_the_allowed() -> None:
    largest = torch.tensor([1 - 2**-24])
    for top_p in torch.linspace(0.01, 1.0, 100).tolist():
        token = sample(PROBABILITIES.log()[None], largest, top_p=top_p)
        assert frequencies(100, top_p=top_p)[token] > 0


def test_top_p_allows_what_transformers_allows() -> None:
    from transformers.generation import logits_process as warpers

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
    draws = torch.arange(4000) / 4000
    for top_k, top_p in ((10, 0.7), (50, 0.9), (20, 0.3)):
        kept = warpers.TopPLogitsWarper(top_p)(None, warpers.TopKLogitsWarper(top_k)(None, logits))
        expected = kept[0].softmax(-1)
        drawn = sample(logits.expand(4000, -1), draws, top_k=top_k, top_p=top_p)
        torch.testing.assert_close(torch.bincount(drawn, minlength=50) / 4000, expected, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [[1], []]}, "Prompt 1 has no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str, model: Decoder) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": PROMPTS, "max_new_tokens": 4, **settings})


def test_a_terminal_obeys_nothing_that_a_model_says() -> None:
    shown = side_by_side("a\x1b[2Jb", {"teacher": "1\n\t2\r3", "model": "\u202egood \u0645\u06cc\u200c"})
    assert shown.split("\n") == [
        "prompt:  a\\x1b[2Jb",
        "teacher: 1",
        "\t2\\r3",
        "model:   \\u202egood \u0645\u06cc\u200c",
    ]
