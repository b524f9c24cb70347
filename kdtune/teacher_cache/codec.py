"""The answers of one example as bytes. docs/teacher_cache_format.md says what is where.

Numbers are taken apart into planes, all lowest bytes, then all second ones: what is random in an id is then apart from
what is not, and each plane has the Huffman code that fits it. Their concatenation is one raw deflate stream, so that a
reader needs zlib and a cumulative sum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdtune.teacher_cache.answers import NONE, Answers, Hidden, Samples, TopK
from kdtune.teacher_cache.config import Bits, HiddenDtype, StoreConfig

MAX_NATS = 25.0  # what is further from 0 is stored as this: a probability of 1.4e-11
_ABOVE_ONE = 1e-3  # nats by which the rounding of a teacher may lift a probability above 1
_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)  # one or the other makes least of nearly every plane
_END = b"\x03\x00"  # an empty last block
HIDDEN_TYPES: dict[HiddenDtype, np.dtype[Any]] = {"bf16": np.dtype("<u2"), "fp32": np.dtype("<f4")}


class Codec:
    """Answers of one kind to bytes and back.

    Args:
        store: what is kept.
        vocab_size: of the teacher.
        hidden_size: of the teacher; store.kind=hidden only.
    """

    def __init__(self, store: StoreConfig, vocab_size: int, hidden_size: int | None = None):
        self.store = store
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self._id_bytes = bytes_for(vocab_size - 1)
        # One more: a server adds the label to its likeliest tokens, and a likeliest token need not be drawn.
        self._most = store.num_samples + 1 if store.kind == "samples" else min(vocab_size, store.top_k + 1)

    def encode(self, answers: Answers) -> bytes:
        """The bytes of an example.

        Raises:
            ValueError: what the teacher says is no distribution, or not of this kind.
        """
        kind = {TopK: "top_k", Samples: "samples", Hidden: "hidden"}[type(answers)]
        if kind != self.store.kind:
            raise ValueError(f"These are answers of kind {kind}; the cache keeps {self.store.kind}.")
        if isinstance(answers, Hidden):
            return self._encode_hidden(answers)
        columns = self._top_k_columns(answers) if isinstance(answers, TopK) else self._sample_columns(answers)
        return b"".join(columns) + _END

    def decode(self, data: bytes | memoryview, num_tokens: int) -> Answers:
        """What `encode` was given, in `store.bits`.

        Args:
            data: of one example.
            num_tokens: its labelled tokens.
        """
        if self.store.kind == "hidden":
            assert self.hidden_size is not None
            hidden = np.frombuffer(data, HIDDEN_TYPES[self.store.hidden_dtype])
            return Hidden(hidden.reshape(num_tokens, self.hidden_size), self.store.hidden_dtype)
        planes = _Planes(zlib.decompress(data, -zlib.MAX_WBITS))
        rows = _Rows(planes.take(num_tokens, bytes_for(self._most)))
        return self._read_top_k(planes, rows) if self.store.kind == "top_k" else self._read_samples(planes, rows)

    def _encode_hidden(self, answers: Hidden) -> bytes:
        dtype = HIDDEN_TYPES[self.store.hidden_dtype]
        if answers.dtype != self.store.hidden_dtype or answers.hidden.dtype != dtype:
            raise ValueError(f"These hidden states are {answers.dtype}; the cache keeps {self.store.hidden_dtype}.")
        if answers.hidden.shape[1:] != (self.hidden_size,):
            raise ValueError(
                f"Hidden states are {list(answers.hidden.shape)}; the cache keeps {self.hidden_size} each."
            )
        return np.ascontiguousarray(answers.hidden).tobytes()

    def _top_k_columns(self, answers: TopK) -> Iterator[bytes]:
        bits = self.store.bits
        order, columns = self._ids(answers.ids, answers.log_probs.argmax(1))
        yield from columns
        filled = np.take_along_axis(answers.ids, order, 1) >= 0
        codes = quantize(np.where(filled, -np.take_along_axis(answers.log_probs, order, 1), 0), bits)
        rest = [quantize(nats, bits) for nats in (-answers.log_rest, answers.entropy, -answers.label_log_probs)]
        if bits != 32:
            # The unlikeliest are many and much alike: as steps from the last they are small numbers.
            last = codes.max(1, initial=0)
            codes = last[:, None] - codes
            rest.insert(0, last)
        yield _deflate(codes[filled], bits // 8)
        yield _deflate(np.concatenate(rest), bits // 8)

    def _sample_columns(self, answers: Samples) -> Iterator[bytes]:
        if answers.num_samples != self.store.num_samples or (answers.counts.sum(1) != answers.num_samples).any():
            raise ValueError(f"The draws of a token are not {self.store.num_samples}, which the cache keeps.")
        if (answers.log_ratios is not None) != (self.store.sampling_power != 1):
            raise ValueError(f"Draws from p^{self.store.sampling_power} have log_ratios if that is not p itself.")
        is_top = answers.ids == answers.top_ids[:, None]
        if not is_top.any(1).all():
            raise ValueError("The likeliest token must be among the sampled ids, with count 0 if it was not drawn.")
        order, columns = self._ids(answers.ids, is_top.argmax(1))
        yield from columns
        filled = np.take_along_axis(answers.ids, order, 1) >= 0
        counts = np.take_along_axis(answers.counts, order, 1)[filled]
        yield _deflate(counts, bytes_for(self.store.num_samples))
        if answers.log_ratios is not None:
            ratios = np.take_along_axis(answers.log_ratios, order, 1)[filled]
            yield _deflate(ratios.astype("<f2").view("<u2"), 2)
        rest = [quantize(nats, self.store.bits) for nats in (answers.entropy, -answers.label_log_probs)]
        yield _deflate(np.concatenate(rest), self.store.bits // 8)

    def _ids(self, ids: np.ndarray, top: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
        """The order in which a row's entries are stored, and columns: how many, their ids, where the likeliest is."""
        if ids.shape[1] > self._most:
            raise ValueError(f"A token has {ids.shape[1]:,} ids; this cache keeps at most {self._most:,}.")
        order = np.where(ids < 0, self.vocab_size, ids).argsort(1)
        ids = np.take_along_axis(ids, order, 1).astype(np.int32)
        filled = ids >= 0
        steps = ids.copy()
        steps[:, 1:] -= ids[:, :-1] + 1
        if (steps[filled] < 0).any() or ids.max(initial=0) >= self.vocab_size or not filled[:, :1].all():
            raise ValueError(
                f"The teacher's ids are not one or more different ones of its {self.vocab_size:,} for each token."
            )
        columns = [
            _deflate(filled.sum(1), bytes_for(self._most)),
            _deflate(steps[filled], self._id_bytes, has_matches=True),
            _deflate((order == top[:, None]).argmax(1), bytes_for(self._most)),
        ]
        return order, columns

    def _read_ids(self, planes: _Planes, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
        """[t, k], and where the likeliest is: [t, 1]."""
        ids = rows.spread(planes.take(rows.num_entries, self._id_bytes), 0)
        ids += 1
        np.cumsum(ids, 1, out=ids)
        ids -= 1
        return rows.clear(ids, NONE), planes.take(len(rows), bytes_for(self._most))[:, None]

    def _read_top_k(self, planes: _Planes, rows: _Rows) -> TopK:
        (ids, top), bits = self._read_ids(planes, rows), self.store.bits
        codes = rows.spread(planes.take(rows.num_entries, bits // 8), 0)
        num_rest = 3 if bits == 32 else 4
        rest = planes.take(num_rest * len(rows), bits // 8).reshape(num_rest, len(rows))
        if bits != 32:
            codes = rest[0, :, None] - codes
        log_probs = rows.clear(-dequantize(codes, bits), -np.inf)
        log_rest, entropy, label_log_probs = dequantize(rest[-3:], bits)
        log_rest = -log_rest
        log_rest[rows.sizes == self.vocab_size] = -np.inf  # there is no other token
        if bits != 32:
            log_mass = np.log(np.exp(log_probs).sum(1) + np.exp(log_rest))
            log_probs -= log_mass[:, None]
            log_rest -= log_mass
        # Of equal ones the first is the likeliest, and in few bits more are equal.
        for values in (ids, log_probs):
            first = values[:, :1].copy()
            values[:, :1] = np.take_along_axis(values, top, 1)
            np.put_along_axis(values, top, first, 1)
        return TopK(ids, log_probs, log_rest, entropy, -label_log_probs)

    def _read_samples(self, planes: _Planes, rows: _Rows) -> Samples:
        (ids, top), bits = self._read_ids(planes, rows), self.store.bits
        counts = rows.spread(planes.take(rows.num_entries, bytes_for(self.store.num_samples)), 0)
        log_ratios = None
        if self.store.sampling_power != 1:
            ratios = planes.take(rows.num_entries, 2).astype("<u2").view("<f2")
            log_ratios = rows.spread(ratios.astype(np.float32), 0)
        entropy, label_log_probs = dequantize(planes.take(2 * len(rows), bits // 8), bits).reshape(2, len(rows))
        top_ids = np.take_along_axis(ids, top, 1)[:, 0]
        return Samples(ids, counts, log_ratios, self.store.num_samples, entropy, -label_log_probs, top_ids)


class _Rows:
    """Of each token some entries, fewer or more, one behind the other in a column."""

    def __init__(self, sizes: np.ndarray):
        self.sizes = sizes
        self.num_entries = int(sizes.sum())
        self._width = int(sizes.max(initial=1))
        is_even = self.num_entries == self._width * len(sizes)
        self._filled = None if is_even else np.arange(self._width) < sizes[:, None]

    def __len__(self) -> int:
        return len(self.sizes)

    def spread(self, values: np.ndarray, fill: float) -> np.ndarray:
        """[t, k] of a column."""
        if self._filled is None:
            return values.reshape(len(self), self._width)
        spread = np.full(self._filled.shape, fill, values.dtype)
        spread[self._filled] = values
        return spread

    def clear(self, values: np.ndarray, fill: float) -> np.ndarray:
        """[t, k], with `fill` where there is no entry."""
        if self._filled is not None:
            values[~self._filled] = fill
        return values


def estimate_bytes(store: StoreConfig, vocab_size: int, hidden_size: int | None = None) -> float:
    """Bytes of a labelled token, rather too many: ids are taken to be spread evenly, and top_p to leave none out.

    How many different tokens are drawn depends on the teacher: 1.5 n^0.75 of n draws are those of one that is not sure.

    Args:
        store: what is kept.
        vocab_size: of the teacher.
        hidden_size: of the teacher; store.kind=hidden only.
    """
    if store.kind == "hidden":
        assert hidden_size is not None
        return float(hidden_size * HIDDEN_TYPES[store.hidden_dtype].itemsize)
    count = 1.5 * store.num_samples**0.75 if store.kind == "samples" else store.top_k
    id_bits = math.log2(math.e * max(1, vocab_size / count))  # of one of `count` ids in ascending order
    code_bits = {8: 5.5, 16: 13.5, 32: 26.0}[store.bits]  # what deflate leaves of a log-probability
    if store.kind == "samples":
        count_bits = 2 + 16 * (store.sampling_power != 1)
        return (count * (id_bits + count_bits) + 16 + 2 * store.bits) / 8
    return (count * (id_bits + code_bits) + 4 * store.bits) / 8


def quantize(nats: np.ndarray, bits: Bits) -> np.ndarray:
    """Codes of numbers from 0 on: as unsigned integers of `bits`.

    The steps grow with the root of the number, so that a likely token is more precise than an unlikely one.

    Raises:
        ValueError: a number is NaN or below 0 by more than rounding explains.
    """
    if not (nats >= -_ABOVE_ONE).all():
        raise ValueError(
            f"The teacher's answers hold {np.count_nonzero(np.isnan(nats)):,} NaN and probabilities up to "
            f"exp({-np.nanmin(nats, initial=0):.3g}). Its logits are damaged: check its weights and dtype."
        )
    if bits == 32:
        return nats.astype("<f4").view("<u4")
    most = 2**bits - 1
    codes = np.sqrt(np.clip(nats, 0, MAX_NATS) / MAX_NATS) * most
    return np.rint(codes).astype(f"<u{bits // 8}")


def dequantize(codes: np.ndarray, bits: Bits) -> np.ndarray:
    """float32 numbers of codes."""
    if bits == 32:
        return codes.astype("<u4").view("<f4")
    return _TABLES[bits][codes]


_TABLES = {bits: (np.arange(2**bits) ** 2 * (MAX_NATS / (2**bits - 1) ** 2)).astype(np.float32) for bits in (8, 16)}


def bytes_for(largest: int) -> int:
    return max(1, (largest.bit_length() + 7) // 8)


def _deflate(values: np.ndarray, num_bytes: int, has_matches: bool = False) -> bytes:
    """A column's planes, the lowest bytes first, as parts of a raw deflate stream.

    Each plane has blocks of its own, which end on a byte, with the strategy that makes least of it.

    Args:
        values: [n].
        num_bytes: of a value.
        has_matches: of ids, which may repeat from token to token. Only the lowest plane is searched for that: in the
            others runs are all there is, and to look for more there takes half of the time.
    """
    parts = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    best = []
    for i in range(num_bytes):
        strategies = (zlib.Z_DEFAULT_STRATEGY, *_STRATEGIES) if has_matches and i == 0 else _STRATEGIES
        plane = parts[:, i].tobytes()
        best.append(min((_compress(plane, strategy) for strategy in strategies), key=len))
    return b"".join(best)


def _compress(plane: bytes, strategy: int) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    return compressor.compress(plane) + compressor.flush(zlib.Z_FULL_FLUSH)


class _Planes:
    """Reads one column after the other."""

    def __init__(self, data: bytes):
        self._bytes = np.frombuffer(data, np.uint8)
        self._start = 0

    def take(self, count: int, num_bytes: int) -> np.ndarray:
        """[count] int32 from so many planes."""
        end = self._start + count * num_bytes
        planes = self._bytes[self._start : end].reshape(num_bytes, count)
        self._start = end
        if num_bytes == 1:
            return planes[0].astype(np.int32)
        joined = np.zeros((count, 4), np.uint8)
        joined[:, :num_bytes] = planes.T
        return joined.view("<i4")[:, 0]
