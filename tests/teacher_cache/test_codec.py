"""Bytes and back: what is exact is exact, the rest is within the bound that docs/teacher_cache_format.md states."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import made_answers
import numpy as np
import pytest

from kdtune.teacher_cache import Hidden, Samples, StoreConfig, TopK, check_store, concatenate, estimate_bytes, take
from kdtune.teacher_cache.codec import MAX_NATS, Codec, dequantize, quantize
from kdtune.teacher_cache.config import Bits

FEW_BITS: list[Bits] = [8, 16]
SHAPES = [  # tokens, k, vocabulary
    (1, 1, 97),
    (7, 97, 97),
    (3, 96, 97),
    (2, 64, 2**8),
    (2, 300, 2**8 + 257),
    (5, 64, 2**17),
    (3, 64, 2**17 + 1),
    (3, 12, 262_144),
    (0, 5, 97),
]


def bound(nats: np.ndarray, bits: Bits) -> np.ndarray:
    """How far from a number what is read may be, before rows are normalised."""
    most = 2**bits - 1
    rounding = 2e-6 * (1 + nats)  # of float32
    return 5 * np.sqrt(nats) / most + 6.25 / most**2 + rounding


def sorted_by_id(answers: TopK) -> tuple[np.ndarray, np.ndarray]:
    order = answers.ids.argsort(1)
    return np.take_along_axis(answers.ids, order, 1), np.take_along_axis(answers.log_probs, order, 1)


def round_trip(codec: Codec, answers: Any) -> Any:
    return codec.decode(codec.encode(answers), len(answers))


# Numbers.


@pytest.mark.parametrize("bits", FEW_BITS)
def test_error_of_a_number_is_within_the_bound(bits: Bits) -> None:
    nats = np.concatenate([np.linspace(0, MAX_NATS, 200_001), np.geomspace(1e-9, 1, 100_001)]).astype(np.float32)
    error = np.abs(dequantize(quantize(nats, bits), bits).astype(np.float64) - nats)
    assert (error <= bound(nats, bits)).all()
    # The bound is no larger than it must be: some numbers come close to it, small ones as well as large ones.
    for part in (nats < 1e-3, (nats > 0.1) & (nats < 1), nats > 10):
        assert (error / bound(nats, bits))[part].max() > (0.9 if bits == 8 else 0.5)


@pytest.mark.parametrize("bits", FEW_BITS)
def test_what_is_next_to_impossible_is_25_nats_away(bits: Bits) -> None:
    assert dequantize(quantize(np.array([25.1, 80, np.inf]), bits), bits).tolist() == [MAX_NATS] * 3


def test_32_bits_are_exact() -> None:
    nats = np.array([0, 1e-30, 1.1, 90, np.inf], np.float32)
    assert dequantize(quantize(nats, 32), 32).tolist() == nats.tolist()


# The likeliest tokens.


@pytest.mark.parametrize("bits", [*FEW_BITS, 32])
@pytest.mark.parametrize(("num_tokens", "k", "vocab_size"), SHAPES)
def test_top_k(num_tokens: int, k: int, vocab_size: int, bits: Bits) -> None:
    answers = made_answers.top_k(0, num_tokens, k, vocab_size)
    found = round_trip(Codec(StoreConfig("top_k", top_k=k, bits=bits), vocab_size), answers)
    check_top_k(found, answers, bits)


@pytest.mark.parametrize("bits", [*FEW_BITS, 32])
def test_as_many_as_reach_a_mass(bits: Bits) -> None:
    answers = made_answers.top_k(1, 50, 64, 1000, top_p=0.8)
    assert len(set((answers.ids >= 0).sum(1))) > 5
    found = round_trip(Codec(StoreConfig("top_k", top_p=0.8, bits=bits), 1000), answers)
    # Columns that no token of the example needs are not there.
    width = (answers.ids >= 0).sum(1).max()
    answers = replace(answers, ids=answers.ids[:, :width], log_probs=answers.log_probs[:, :width])
    check_top_k(found, answers, bits)
    assert (found.ids[:, :-1] >= 0)[found.ids[:, 1:] >= 0].all(), "what is missing is at the end"


def check_top_k(found: TopK, answers: TopK, bits: Bits) -> None:
    assert len(found) == len(answers)
    if not len(answers):
        return
    ids, log_probs = sorted_by_id(answers)
    found_ids, found_log_probs = sorted_by_id(found)
    assert found.ids.dtype == np.int32
    assert found_ids.tolist() == ids.tolist()
    assert (found.top_ids == answers.top_ids).all()
    assert (found.ids[:, :1] == answers.top_ids[:, None]).all()
    names = ("entropy", "label_log_probs")
    if bits == 32:
        assert (found_log_probs == log_probs).all()
        for name in ("log_rest", *names):
            assert (getattr(found, name) == getattr(answers, name)).all()
        return
    for name in names:
        nats = np.abs(getattr(answers, name))
        assert (np.abs(getattr(found, name) - getattr(answers, name)) <= bound(nats, bits)).all()
    outcomes = np.concatenate([log_probs, answers.log_rest[:, None]], 1).astype(np.float64)
    read = np.concatenate([found_log_probs, found.log_rest[:, None]], 1).astype(np.float64)
    is_there = np.isfinite(outcomes)
    assert (np.isfinite(read) == is_there).all()
    nats = np.where(is_there, -outcomes, 0)
    shift = np.log(np.where(is_there, np.exp(outcomes + bound(nats, bits)), 0).sum(1, keepdims=True))
    error = np.abs(read[is_there] - outcomes[is_there])
    assert (error <= (bound(nats, bits) + shift)[is_there]).all()
    np.testing.assert_allclose(np.exp(read).sum(1), 1, atol=1e-5)


def test_the_likeliest_of_equals_is_the_first() -> None:
    """As torch.topk has it; in few bits, ones that were not equal would be."""
    answers = made_answers.top_k(2, 200, 8, 97)
    close = answers.log_probs.copy()
    close[:, 1] = close[:, 0] - 1e-4
    close[::2, 1] = close[::2, 0]
    answers = replace(answers, log_probs=close)
    found = round_trip(Codec(StoreConfig("top_k", top_k=8), 97), answers)
    assert (found.log_probs[:, 0] == found.log_probs.max(1)).all()
    assert (found.top_ids == answers.ids[:, 0]).all()


def test_one_more_than_k_may_be_kept() -> None:
    """A server adds the label to its likeliest tokens."""
    answers = made_answers.top_k(3, 4, 6, 97)
    check_top_k(round_trip(Codec(StoreConfig("top_k", top_k=5), 97), answers), answers, 8)
    with pytest.raises(ValueError, match="6 ids; this cache keeps at most 5"):
        Codec(StoreConfig("top_k", top_k=4), 97).encode(answers)


# Samples.


@pytest.mark.parametrize("power", [1.0, 0.7])
@pytest.mark.parametrize(("num_tokens", "count", "vocab_size"), [(1, 1, 97), (9, 12, 2**17), (3, 300, 262_144)])
def test_samples(num_tokens: int, count: int, vocab_size: int, power: float) -> None:
    answers = made_answers.samples(0, num_tokens, count, vocab_size, power)
    store = StoreConfig(kind="samples", num_samples=count, sampling_power=power, bits=16)
    found = round_trip(Codec(store, vocab_size), answers)
    assert (found.top_ids == answers.top_ids).all()
    for row in range(num_tokens):
        assert as_dict(found, row).keys() == as_dict(answers, row).keys()
        for id, (number, weight) in as_dict(answers, row).items():
            assert as_dict(found, row)[id][0] == number
            assert as_dict(found, row)[id][1] == pytest.approx(weight, rel=0 if power == 1 else 5e-3)
    for name in ("entropy", "label_log_probs"):
        nats = np.abs(getattr(answers, name))
        assert (np.abs(getattr(found, name) - getattr(answers, name)) <= bound(nats, 16)).all()


def as_dict(answers: Samples, row: int) -> dict[int, tuple[int, float]]:
    columns = zip(answers.ids[row], answers.counts[row], answers.weights[row], strict=True)
    return {int(id): (int(number), float(weight)) for id, number, weight in columns if id >= 0}


def test_equal_draws_are_counted() -> None:
    generator = np.random.default_rng(0)
    draws = generator.integers(6, size=(100, 5))
    ratios = draws / 10 - 0.3  # one for each id
    tops = generator.integers(6, size=100)
    found = Samples.from_draws(draws, ratios, np.ones(100), -np.ones(100), tops)
    for row in range(100):
        numbers = Counter(draws[row].tolist())
        expected = {id: (n, n / 5 * np.exp(id / 10 - 0.3)) for id, n in numbers.items()}
        expected.setdefault(int(tops[row]), (0, 0.0))
        got = as_dict(found, row)
        assert got.keys() == expected.keys()
        for id, (number, weight) in expected.items():
            assert got[id] == (number, pytest.approx(weight, rel=1e-5))


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_weights_are_the_distribution_on_average(power: float) -> None:
    num_tokens, vocab_size = 20_000, 30
    log_p = np.repeat(made_answers.log_probs(0, 1, vocab_size), num_tokens, 0)
    proposal = made_answers.log_softmax(power * log_p[:1])
    draws = np.random.default_rng(0).choice(vocab_size, (num_tokens, 12), p=np.exp(proposal[0]))
    ratios = None if power == 1 else np.take_along_axis(log_p - proposal, draws, 1)
    ones = np.ones(num_tokens)
    made = Samples.from_draws(draws, ratios, ones, -ones, log_p.argmax(1))
    store = StoreConfig("samples", num_samples=12, sampling_power=power)
    found = round_trip(Codec(store, vocab_size), made)
    p = np.exp(log_p[0])
    mean = np.bincount(found.ids[found.ids >= 0], found.weights[found.ids >= 0], vocab_size) / num_tokens
    # The variance of one draw's weight for an id is p^2 / proposal - p^2.
    deviation = np.sqrt((p**2 / np.exp(proposal[0]) - p**2) / (12 * num_tokens))
    assert (np.abs(mean - p) < 5 * deviation + 1e-3 * p).all()


# Hidden states, examples together, sizes.


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", np.uint16), ("fp32", np.float32)])
def test_hidden(dtype: Any, kind: Any) -> None:
    hidden = np.random.default_rng(0).integers(0, 2**16, (5, 8)).astype(kind)
    found = round_trip(Codec(StoreConfig(kind="hidden", hidden_dtype=dtype), 97, 8), Hidden(hidden, dtype))
    assert found.dtype == dtype
    assert found.hidden.dtype == kind
    assert (found.hidden == hidden).all()


def test_examples_are_joined() -> None:
    parts = [made_answers.top_k(seed, 3 + seed, 20, 97, top_p=0.6) for seed in range(3)]
    codec = Codec(StoreConfig("top_k", top_k=20, top_p=0.6, bits=32), 97)
    parts = [round_trip(codec, part) for part in parts]
    assert len({part.ids.shape[1] for part in parts}) > 1
    joined = concatenate(parts)
    start = 0
    for part in parts:
        width = part.ids.shape[1]
        rows = slice(start, start + len(part))
        assert (joined.ids[rows, :width] == part.ids).all()
        assert (joined.ids[rows, width:] == -1).all()
        assert (joined.log_probs[rows, width:] == -np.inf).all()
        assert (joined.entropy[rows] == part.entropy).all()
        start += len(part)
    drawn = [made_answers.samples(seed, 4, 12, 97) for seed in range(2)]
    together = concatenate(drawn)
    assert together.num_samples == 12
    assert together.weights.sum() == pytest.approx(8)
    states = [Hidden(np.ones((2, 4), np.float32), "fp32")] * 2
    assert concatenate(states).hidden.shape == (4, 4)


def test_some_of_the_tokens_are_taken() -> None:
    answers = made_answers.top_k(0, 6, 5, 97)
    assert len(take(answers, slice(0))) == 0
    assert take(answers, slice(2, 4)).ids.tolist() == answers.ids[2:4].tolist()
    drawn = made_answers.samples(0, 6, 12, 97)
    some = take(drawn, np.array([5, 0]))
    assert some.num_samples == 12
    assert some.log_ratios is None
    assert some.weights.tolist() == drawn.weights[[5, 0]].tolist()


@pytest.mark.parametrize(("num_tokens", "sizes"), [(20, (155, 224, 320)), (200, (150, 218, 310))])
def test_bytes_of_a_token(num_tokens: int, sizes: tuple[int, ...]) -> None:
    """Ids that have nothing in common from token to token are the worst case."""
    vocab_size = 128_256
    answers = made_answers.top_k(0, num_tokens, 64, 2000)
    generator = np.random.default_rng(0)
    anywhere = np.stack([generator.choice(vocab_size, 64, replace=False) for _ in range(num_tokens)])
    answers = replace(answers, ids=anywhere.astype(np.int32))
    for bits, most in zip((8, 16, 32), sizes, strict=True):
        store = StoreConfig("top_k", bits=bits)  # type: ignore[arg-type]
        size = len(Codec(store, vocab_size).encode(answers)) / num_tokens
        assert size < most
        assert 0.95 < estimate_bytes(store, vocab_size) / size < 1.1
    spread = generator.choice(vocab_size, 2000, replace=False)
    for count, most in ((12, 35), (200, 140)):
        drawn = made_answers.samples(0, num_tokens, count, 2000)
        drawn = replace(drawn, ids=np.where(drawn.ids < 0, -1, spread[drawn.ids]), top_ids=spread[drawn.top_ids])
        store = StoreConfig(num_samples=count)
        size = len(Codec(store, vocab_size).encode(drawn)) / num_tokens
        assert size < most
        assert 0.8 < estimate_bytes(store, vocab_size) / size < 2


# Refusals.


TOP_K = made_answers.top_k(0, 2, 3, 97)
SAMPLES = made_answers.samples(0, 2, 12, 97)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": np.array([[-1, -2, np.nan]] * 2)}, "2 NaN"),
        ({"log_probs": np.array([[0.5, -2, -3]] * 2)}, r"up to exp\(0.5\)"),
        ({"entropy": np.array([np.nan, 1])}, "1 NaN"),
        ({"ids": np.array([[1, 2, 97]] * 2)}, "different ones of its 97"),
        ({"ids": np.array([[1, 2, 2]] * 2)}, "different ones"),
        ({"ids": np.array([[2, 1, 2]] * 2)}, "different ones"),
        ({"ids": np.full((2, 3), -1)}, "one or more"),
    ],
)
def test_what_no_teacher_says_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codec(StoreConfig("top_k", top_k=3), 97).encode(replace(TOP_K, **change))


@pytest.mark.parametrize(
    ("answers", "store", "message"),
    [
        (TOP_K, StoreConfig("samples", num_samples=12), "of kind top_k; the cache keeps samples"),
        (SAMPLES, StoreConfig(kind="samples", num_samples=6), "not 6"),
        (SAMPLES, StoreConfig("samples", num_samples=12, sampling_power=0.7), "have log_ratios"),
        (
            replace(SAMPLES, top_ids=np.array([96, 96])),
            StoreConfig("samples", num_samples=12),
            "must be among the sampled",
        ),
        (Hidden(np.ones((2, 4), np.float32), "fp32"), StoreConfig(kind="hidden"), "are fp32; the cache keeps bf16"),
        (Hidden(np.ones((2, 4), np.uint16), "bf16"), StoreConfig(kind="hidden"), "keeps 8 each"),
    ],
)
def test_answers_of_another_kind_are_refused(answers: Any, store: StoreConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codec(store, 97, 8).encode(answers)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (StoreConfig(kind="samples", top_k=5), "store.top_k=5 is about store.kind=top_k"),
        (StoreConfig(kind="hidden", bits=16), "store.bits=16 is about store.kind=top_k or samples"),
        (StoreConfig("top_k", num_samples=3), "store.num_samples=3"),
        (StoreConfig("top_k", hidden_dtype="fp32"), "store.hidden_dtype=fp32"),
        (StoreConfig("top_k", top_k=98), "store.top_k=98 .* 97"),
    ],
)
def test_settings_that_change_nothing_are_refused(store: StoreConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_store(store, 97)


def test_settings_of_the_kind_are_taken() -> None:
    check_store(StoreConfig("top_k", top_k=97, top_p=0.9, bits=16), 97)
    check_store(StoreConfig(kind="samples", num_samples=3, sampling_power=0.5, bits=32))
    check_store(StoreConfig(kind="hidden", hidden_dtype="fp32"), 97)
