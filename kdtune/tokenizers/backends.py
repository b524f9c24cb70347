"""The three libraries behind a `Tokenizer`, brought to one small interface.

Each back end has
    encode(text, continues)   ids; special tokens written in the text are found; no bos, no eos
    encode_parts(parts, is_answer)  the ids of the joined text, grouped by the part that they end in, answers first
    decode(ids)               text, special tokens included
    pieces()                  id -> the bytes that it stands for
    special                   ids that are no text
    bos, eos                  contents of the tokens that begin and end a text, as far as the file itself knows
    adds_bos                  what the file itself says about a bos at the start

`continues` is for text that goes on after other tokens: tokenizers that put a space before a text must not do so then.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import tokenizers

from kdtune.tokenizers.folder import Settings

# Sets normalizer_spec.add_dummy_prefix (field 3 of field 3) to false: in protobuf's wire format the last value wins.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# Llama 3's split pattern and special tokens (Meta's llama-models, models/llama3/tokenizer.py).
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NUM_RANKS = 128_000
_LLAMA3_NUM_SPECIAL = 256
_LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<|reserved_special_token_0|>",
    3: "<|reserved_special_token_1|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|reserved_special_token_2|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


class JsonBackend:
    """`tokenizer.json`, or anything else that the `tokenizers` library can hold."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_missing(tokenizer, settings)
        self._tokenizer = tokenizer
        self._continuing = _without_prefix_space(tokenizer)
        self._added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(id for id, token in self._added.items() if token.special)
        # The post-processor is a program; what it puts before and after a text is found by asking it.
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        processed = tokenizer.encode("a").ids
        prefix = processed[: processed.index(plain[0])] if plain and plain[0] in processed else []
        self.adds_bos = bool(prefix)
        self.bos = tokenizer.id_to_token(prefix[0]) if len(prefix) == 1 else None
        self.eos: str | None = None

    def encode(self, text: str, continues: bool) -> list[int]:
        tokenizer = self._continuing if continues else self._tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_parts(self, parts: list[str], is_answer: list[bool]) -> list[list[int]]:
        encoding = self._tokenizer.encode("".join(parts), add_special_tokens=False)
        return _group(encoding.ids, encoding.offsets, [len(part) for part in parts], is_answer)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def pieces(self) -> dict[int, bytes]:
        decoder = self._tokenizer.decoder
        spell = (
            _spell_byte_level if decoder is not None and b"ByteLevel" in decoder.__getstate__() else _spell_metaspace
        )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return {
            id: piece.encode() if id in self._added else spell(piece)
            for piece, id in sorted(vocabulary.items(), key=lambda item: item[1])
        }


class SentencePieceBackend:
    """A sentencepiece model; its control symbols and the folder's added tokens are found in the text, as in Llama 2."""

    def __init__(self, path: Path, settings: Settings) -> None:
        from sentencepiece import SentencePieceProcessor

        proto = path.read_bytes()
        self._model = SentencePieceProcessor(model_proto=proto)
        self._continuing = SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
        self._legacy = settings.legacy
        model = self._model
        self._pieces = {id: _spell_metaspace(model.id_to_piece(id)) for id in range(model.get_piece_size())}
        found = {model.id_to_piece(id): id for id in self._pieces if model.is_control(id) or model.is_unknown(id)}
        found.update(_place_added(settings, found, lambda content: _known_piece(model, content), len(self._pieces)))
        self._added = found
        self._pieces.update({id: content.encode() for content, id in found.items()})
        plain = {id for id, token in settings.added.items() if not token.special}
        self.special = frozenset(found.values()) - plain
        # Longest first, so that a token is not hidden by one that it begins with.
        self._split = _splitter(found)
        self._prefix_space = model.encode("a") != self._continuing.encode("a")
        self.adds_bos = model.bos_id() >= 0
        self.bos = model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else None
        self.eos = model.id_to_piece(model.eos_id()) if model.eos_id() >= 0 else None

    def encode(self, text: str, continues: bool) -> list[int]:
        ids: list[int] = []
        for i, chunk in enumerate(self._split(text)):
            if chunk in self._added:
                ids.append(self._added[chunk])
            elif chunk:
                goes_on = continues or (i > 0 and not self._legacy)
                ids += (self._continuing if goes_on else self._model).encode(chunk)
        return ids

    def encode_parts(self, parts: list[str], is_answer: list[bool]) -> list[list[int]]:
        text = "".join(parts)
        ids: list[int] = []
        ends: list[int] = []
        position = 0  # in bytes
        for i, chunk in enumerate(self._split(text)):
            if chunk in self._added:
                ids.append(self._added[chunk])
                ends.append(position + len(chunk.encode()))
            elif chunk:
                prefixed = self._prefix_space and (i == 0 or self._legacy)
                new = (self._model if prefixed else self._continuing).encode(chunk)
                spelled = b"".join(self._pieces[id] for id in new)
                if spelled != b" " * prefixed + chunk.encode():
                    # The model normalises its input, so that pieces do not tell where they came from.
                    return [self.encode(part, continues=k > 0) for k, part in enumerate(parts)]
                ids += new
                ends += [position + end - prefixed for end in accumulate(len(self._pieces[id]) for id in new)]
            position += len(chunk.encode())
        return _group(ids, list(pairwise([0, *ends])), [len(part.encode()) for part in parts], is_answer)

    def decode(self, ids: list[int]) -> str:
        text = b"".join(self._pieces[id] for id in ids).decode(errors="replace")
        return text[1:] if self._prefix_space and text.startswith(" ") else text

    def pieces(self) -> dict[int, bytes]:
        return dict(self._pieces)


class TiktokenBackend:
    """A tiktoken rank file in the layout of Llama 3: 256 special tokens after the ranks."""

    def __init__(self, path: Path, settings: Settings) -> None:
        import tiktoken

        ranks = read_ranks(path)
        is_llama3 = len(ranks) == _LLAMA3_NUM_RANKS or settings.model_type in ("llama", "mllama")
        if not is_llama3:
            raise ValueError(
                f"{path} is a tiktoken rank file with {len(ranks):,} ranks. Such a file says neither how text is split "
                f"nor which special tokens there are, and kdtune knows both for Llama 3 only ({_LLAMA3_NUM_RANKS:,} "
                'ranks, or "model_type": "llama" in config.json). Put the tokenizer.json of this model into the folder.'
            )
        self._added = {
            _LLAMA3_SPECIAL.get(i, f"<|reserved_special_token_{i - 8}|>"): len(ranks) + i
            for i in range(_LLAMA3_NUM_SPECIAL)
        }
        for id, token in settings.added.items():
            self._added = {content: other for content, other in self._added.items() if other != id} | {
                token.content: id
            }
        # Built here and not by tiktoken.load, which keeps a copy in a shared temporary folder and goes on serving it
        # after the file has changed.
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=_LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self._added
        )
        self._pieces = {rank: piece for piece, rank in ranks.items()}
        self._pieces.update({id: content.encode() for content, id in self._added.items()})
        self.special = frozenset(self._added.values())
        self.adds_bos = True
        self.bos: str | None = _LLAMA3_SPECIAL[0]
        self.eos: str | None = _LLAMA3_SPECIAL[1]

    def encode(self, text: str, continues: bool) -> list[int]:
        return self._encoding.encode(text, allowed_special="all", disallowed_special=())

    def encode_parts(self, parts: list[str], is_answer: list[bool]) -> list[list[int]]:
        ids = self.encode("".join(parts), continues=False)
        ends = list(accumulate(len(self._pieces[id]) for id in ids))
        return _group(ids, list(pairwise([0, *ends])), [len(part.encode()) for part in parts], is_answer)

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def pieces(self) -> dict[int, bytes]:
        return dict(self._pieces)


def from_tokenizer_json(path: Path, settings: Settings) -> JsonBackend:
    """Raises ValueError if the file is not one that the `tokenizers` library reads."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__}: {error}. Either the file is incomplete "
            "(fetch it again) or it needs a newer tokenizers library (pip install -U tokenizers)."
        ) from None
    return JsonBackend(tokenizer, settings)


def from_vocab_and_merges(vocab: Path, merges: Path, settings: Settings) -> JsonBackend:
    """The byte-level BPE of GPT-2 and Qwen as they were shipped before tokenizer.json.

    Raises:
        ValueError: the folder belongs to another kind of tokenizer, whose split pattern is not in these files.
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    kind = (settings.tokenizer_class or settings.model_type or "gpt2").lower()
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{vocab} and {merges.name} cannot be read: {error}. Fetch the files again.") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    if kind.startswith("qwen2"):
        pattern = tokenizers.Regex(_LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif kind.startswith("gpt2"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        raise ValueError(
            f"{vocab.parent} holds vocab.json and merges.txt of a {kind!r} tokenizer, which do not say how text is "
            "split; kdtune knows this for GPT-2 and Qwen 2 only. Convert the folder once, with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes a tokenizer.json."
        )
    return JsonBackend(tokenizer, settings)


def from_model_file(path: Path, settings: Settings) -> SentencePieceBackend | TiktokenBackend:
    """A `tokenizer.model` is sentencepiece's protobuf or tiktoken's text; only the content tells.

    Raises:
        ValueError: it is neither.
    """
    first_line = path.open("rb").readline(4096).split()
    if len(first_line) == 2 and first_line[1].isdigit():
        return TiktokenBackend(path, settings)
    try:
        return SentencePieceBackend(path, settings)
    except (RuntimeError, OSError) as error:
        if path.stat().st_size < 1024 and first_line[:1] == [b"version"]:
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file itself. Fetch it with `git lfs pull`."
            ) from None
        raise ValueError(
            f"{path} is neither a sentencepiece model ({error}) nor a tiktoken rank file. Fetch the file again."
        ) from None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a tiktoken rank file: a base64 piece and its rank in each line.

    Raises:
        ValueError: a line is broken (file and line are named).
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: expected a base64 piece and its rank. Fetch the file again."
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks repeat or have gaps ({len(ranks):,} pieces). Fetch the file again.")
    return ranks


def _group(
    ids: list[int], spans: Sequence[tuple[int, int]], lengths: list[int], is_answer: list[bool]
) -> list[list[int]]:
    """The ids by part, from where each begins and ends in the joined text."""
    ends = [end for _, end in spans]
    groups: list[list[int]] = []
    first = 0
    for border, is_said in zip(accumulate(lengths[:-1]), is_answer, strict=False):
        # A token over a border goes to the later part, which it has text of, unless the model says it in the earlier
        # one: some end-of-turn tokens take the line break behind them along.
        last = bisect_right(ends, border, first)
        while is_said and last < len(ids) and spans[last][0] < border:
            last += 1
        groups.append(ids[first:last])
        first = last
    return [*groups, ids[first:]]


def _add_missing(tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
    """Adds what only the other files of the folder know, in the order of transformers: by id, then the rest."""
    for id, token in sorted(settings.added.items()):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([tokenizers.AddedToken(**vars(token))])
        if tokenizer.token_to_id(token.content) != id:
            raise ValueError(
                f"tokenizer_config.json or added_tokens.json gives id {id} to {token.content!r}, the vocabulary has it "
                f"at {tokenizer.token_to_id(token.content)}. The files of this folder do not belong together."
            )
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    rest = [content for content in (*settings.named.values(), *settings.special) if content not in added]
    tokenizer.add_special_tokens([tokenizers.AddedToken(content, normalized=False) for content in dict.fromkeys(rest)])


def _place_added(settings: Settings, found: dict[str, int], id_of: Any, size: int) -> dict[str, int]:
    """Ids for the folder's added tokens in a vocabulary of `size` pieces that has some of them already."""
    placed = {token.content: id for id, token in settings.added.items()}
    for content in (*settings.named.values(), *settings.special):
        if content in found or content in placed:
            continue
        id = id_of(content)
        placed[content] = max([size - 1, *placed.values()]) + 1 if id is None else id
    return placed


def _known_piece(model: Any, content: str) -> int | None:
    id = model.piece_to_id(content)
    return id if model.id_to_piece(id) == content else None


def _splitter(added: dict[str, int]) -> Any:
    pattern = re.compile("(" + "|".join(re.escape(content) for content in sorted(added, key=len, reverse=True)) + ")")
    return pattern.split if added else lambda text: [text]


def _without_prefix_space(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer without the step that puts a space before a text; itself if it has no such step."""
    steps = [tokenizer.normalizer, tokenizer.pre_tokenizer]
    states = [json.loads(step.__getstate__()) if step is not None else None for step in steps]
    changed = [_drop_prefix(state) for state in states]
    if changed == states:
        return tokenizer
    pipeline = json.loads(tokenizer.to_str())
    pipeline["normalizer"], pipeline["pre_tokenizer"] = changed
    return tokenizers.Tokenizer.from_str(json.dumps(pipeline))


def _drop_prefix(step: Any) -> Any:
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    step = dict(step)
    for steps in ("normalizers", "pretokenizers"):
        if steps in step:
            step[steps] = [kept for kept in map(_drop_prefix, step[steps]) if kept is not None]
    if step.get("type") == "Metaspace":
        step["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        step["add_prefix_space"] = False
    return step


def _spell_metaspace(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _spell_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


def _byte_of() -> dict[int, int]:
    # GPT-2 writes each byte as one printable character: itself where it is printable, else one from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    # A byte as it is stands for nothing where a character from 256 on does; it becomes what no byte is.
    return {byte: sys.maxunicode for byte in rest} | {256 + i: byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_of()
