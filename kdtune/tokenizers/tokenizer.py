"""One tokenizer for every folder: the library that reads its files is an inner matter."""

import copy
import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final

from kdtune.config import setting
from kdtune.tokenizers import chat
from kdtune.tokenizers.backends import (
    JsonBackend,
    SentencePieceBackend,
    TiktokenBackend,
    from_model_file,
    from_tokenizer_json,
    from_vocab_and_merges,
)
from kdtune.tokenizers.folder import Settings, read_settings

Message = Mapping[str, Any]  # role, content, perhaps tool_calls

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")

# Names by which a vocabulary says that an entry means nothing yet.
_PLACEHOLDER = re.compile(rb"reserved|unused|extra_id|placeholder", re.IGNORECASE)


@dataclass
class TokenizerConfig:
    path: str | None = setting(None, path=True)  # tokenizer's folder or file; null: the student's checkpoint folder
    max_seq_len: int = setting(2048, gt=0)  # tokens a row may have as input; longer rows are truncated


@final
class Tokenizer:
    """Text to ids and back, with the special tokens, the bos rule and the chat template of its folder.

    Attributes:
        vocab_size: rows that an embedding needs for it: the highest id + 1. A model often has some more, as padding.
        bos_id: begins a text; None if the tokenizer has no such token.
        adds_bos: whether a text begins with bos unless the caller says otherwise. tokenizer_config.json's add_bos_token
            decides; else what tokenizer.json's post-processor does; else a sentencepiece or tiktoken model adds it.
        eos_ids: end a text: first the tokenizer's own (it is the one to append), then those of generation_config.json,
            at any of which generation stops. Empty if there is none.
        special_ids: ids that are no text, left out by `decode`.
    """

    def __init__(
        self, backend: JsonBackend | SentencePieceBackend | TiktokenBackend, settings: Settings, source: Path
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._templates = settings.chat_templates
        self._pieces = backend.pieces()
        self.source = source
        self.vocab_size = max(self._pieces) + 1
        ids = {piece: id for id, piece in self._pieces.items()}
        named = {name: ids.get(content.encode()) for name, content in settings.named.items()}
        known = {"bos": backend.bos, "eos": backend.eos}
        own = {name: ids.get(content.encode()) for name, content in known.items() if content is not None}

        self.bos_id: int | None = _first(named.get("bos_token"), own.get("bos"))
        eos_id = _first(named.get("eos_token"), own.get("eos"))
        candidates = ([] if eos_id is None else [eos_id]) + [id for id in settings.eos_ids if id in self._pieces]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(candidates))
        adds_bos = backend.adds_bos if settings.add_bos is None else settings.add_bos
        self.adds_bos = adds_bos and self.bos_id is not None
        self.special_ids = backend.special | {id for id in (self.bos_id, *self.eos_ids) if id is not None}
        # What a template may print; transformers passes the same names.
        self._variables = {name: self.piece(id) for name, id in named.items() if id is not None}
        for name, id in (("bos_token", self.bos_id), ("eos_token", eos_id)):
            if id is not None:
                self._variables.setdefault(name, self.piece(id))

    def encode(self, text: str, *, bos: bool | None = None, eos: bool = False, continues: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids.

        Args:
            text: any text, also empty.
            bos: whether to begin with `bos_id`; None: the tokenizer's own rule (`adds_bos`).
            eos: whether to append the first of `eos_ids`.
            continues: `text` goes on after other tokens, so it gets no bos and none of the space that some tokenizers
                put before a text: encode(a) + encode(b, continues=True) decodes to a + b.

        Raises:
            ValueError: bos or eos is asked for and the tokenizer has none.
        """
        ids = self._backend.encode(text, continues)
        if (self.adds_bos and not continues) if bos is None else bos:
            if self.bos_id is None:
                raise ValueError(f"the tokenizer in {self.source} has no bos token to begin a text with.")
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_parts(self, parts: Sequence[str], is_answer: Sequence[bool] | None = None) -> list[list[int]]:
        """The ids of the parts' concatenation, without bos, grouped by part.

        A token that covers the border of two parts belongs to the answer of the two, else to the later one. (A
        sentencepiece model that normalises its input cannot tell where a token came from; there each part is encoded by
        itself.)
        """
        return self._backend.encode_parts(list(parts), list(is_answer or [False] * len(parts)))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are no valid UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = [int(id) for id in ids]
        unknown = [id for id in ids if id not in self._pieces]
        if unknown:
            raise ValueError(
                f"id {unknown[0]} is not in the vocabulary of {self.source} (highest id {self.vocab_size - 1})."
            )
        return self._backend.decode([id for id in ids if not (skip_special_tokens and id in self.special_ids)])

    @property
    def eos_id(self) -> int:
        """The token to append to a finished text.

        Raises:
            ValueError: the folder names none; a model trained without it would never stop.
        """
        if not self.eos_ids:
            raise ValueError(
                f"the tokenizer in {self.source} names no eos token, so nothing would mark the end of an answer. "
                "Put an eos_token into tokenizer_config.json, or an eos_token_id into generation_config.json."
            )
        return self.eos_ids[0]

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._templates

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Sources of the templates by name: "default", and perhaps "tool_use", which is taken where there are tools."""
        return dict(self._templates)

    def with_chat_template(self, name: str) -> "Tokenizer":
        """The same tokenizer with another chat template: a named one (chatml, llama3, ...), or a .jinja file.

        Raises:
            ValueError: there is no such template, it is not valid jinja, or it is a named one and needs tokens that the
                vocabulary does not have.
        """
        template = chat.read(name)
        variables = sorted({"bos_token", "eos_token"} & chat.names(template) - set(self._variables))
        wanted = chat.NAMED.get(name, chat.literal_tokens(template))
        missing = [token for token in wanted if len(self._backend.encode(token, True)) != 1]
        if name in chat.NAMED and (missing or variables):
            raise ValueError(
                f"the chat template {name} writes {', '.join(missing + variables)}, and the tokenizer in {self.source} "
                "has no such special token: the model would read its letters and could not end a turn with it. Use a "
                "template whose tokens it has (llama2 and mistral_v1 need bos and eos only), or a tokenizer and "
                "models with these."
            )
        if missing or variables:
            warnings.warn(
                f"the chat template {name} writes {', '.join(missing + variables)}, which the tokenizer in "
                f"{self.source} does not have as special tokens: the model will read letters, or nothing where a "
                "variable is meant.",
                stacklevel=1,  # one place: said once
            )
        other = copy.copy(self)
        other._templates = {"default": template}
        return other

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        date: datetime | None = None,
    ) -> str:
        """The text that the chat template makes of `messages` (with its bos, if the template writes one).

        Args:
            messages: dicts with `role` and `content`.
            add_generation_prompt: end with the header of an assistant's turn.
            tools: json schemas of functions that the assistant may call.
            date: the day for a template that tells it to the model. None: today.

        Raises:
            ValueError: there is no template, or it refuses the messages, or it would leave out tools or their calls.
        """
        return self.render_answers(messages, add_generation_prompt=add_generation_prompt, tools=tools, date=date).text

    def render_answers(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        date: datetime | None = None,
    ) -> chat.Rendered:
        """As `render_chat`, with the places of what the template itself marks as the assistant's."""
        if not self.has_chat_template:
            raise ValueError(
                f"the tokenizer in {self.source} has no chat template, so messages cannot be turned into text. Put a "
                "chat_template.jinja into the folder (instruction-tuned checkpoints come with one), name a template "
                f"to train with (dataset.chat_template: {', '.join(chat.NAMED)} or a file), or use rows of another "
                "format."
            )
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates[name]
        if tools and "tools" not in chat.names(template):
            raise ValueError(
                f"the chat template has no place for tools, and {len(tools)} are given that the model would not see. "
                "Use a template that has (qwen, mistral), or leave them out."
            )
        if "tool_calls" not in chat.names(template) and any(message.get("tool_calls") for message in messages):
            raise ValueError(
                "the chat template has no place for tool calls, and would leave them out. Use one that has "
                "(qwen, mistral)."
            )
        variables = {
            **self._variables,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return chat.render(template, messages, date=date, **variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of the rendered messages. No bos beyond the one that the template itself writes."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self.encode(text, bos=False)

    @property
    def fingerprint(self) -> str:
        """Changes when a file of the vocabulary, a setting beside it or the chat template does."""
        digest = hashlib.blake2b(repr((self._settings, sorted(self._templates.items()))).encode(), digest_size=16)
        folder = self.source if self.source.is_dir() else self.source.parent
        for path in sorted({self.source, *(folder / name for name in _VOCABULARY_FILES)}):
            if path.is_file():
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
        return digest.hexdigest()

    def ids(self) -> list[int]:
        """All ids that stand for something, ascending; there may be gaps."""
        return sorted(self._pieces)

    def piece(self, id: int) -> str:
        """What an id stands for, readable; a part of a UTF-8 character shows as U+FFFD."""
        return self._pieces[id].decode(errors="replace")

    def piece_bytes(self, id: int) -> bytes:
        """What an id stands for, exactly, and alike for every kind of tokenizer file."""
        return self._pieces[id]


def load(path: str | Path, model_dir: str | Path | None = None) -> Tokenizer:
    """Loads the tokenizer of a checkpoint folder, or a tokenizer file (the settings are read from beside it).

    Of several files in a folder the first of tokenizer.json, tokenizer.model, vocab.json with merges.txt is taken.

    Args:
        path: the folder or the file.
        model_dir: the model's folder if it is another one, for what only that knows: the ids that end a text.

    Raises:
        FileNotFoundError: nothing there that could be a tokenizer.
        ValueError: a file is broken or of an unknown kind.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no tokenizer at {path}: no such file or folder. If this is a name on the Hugging Face hub, fetch it "
            f"first: kdtune download {path} --output-dir <folder>"
        )
    folder = path if path.is_dir() else path.parent
    settings = read_settings(folder, None if model_dir is None else Path(model_dir))
    backend: JsonBackend | SentencePieceBackend | TiktokenBackend
    if path.is_file():
        is_json = path.suffix == ".json" and path.name != "vocab.json"
        if path.name in ("vocab.json", "merges.txt"):
            backend = from_vocab_and_merges(folder / "vocab.json", folder / "merges.txt", settings)
        else:
            backend = from_tokenizer_json(path, settings) if is_json else from_model_file(path, settings)
    elif (folder / "tokenizer.json").is_file():
        backend = from_tokenizer_json(folder / "tokenizer.json", settings)
    elif (folder / "tokenizer.model").is_file():
        backend = from_model_file(folder / "tokenizer.model", settings)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = from_vocab_and_merges(folder / "vocab.json", folder / "merges.txt", settings)
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt; there "
            f"are {', '.join(sorted(entry.name for entry in folder.iterdir())[:20]) or 'no files'}."
        )
    return Tokenizer(backend, settings, path)


def difference(a: Tokenizer, b: Tokenizer) -> str | None:
    """The first id that stands for different things in `a` and `b`, in words; None if they agree on all shared ids.

    Ids that only one of them has do not count, nor do entries that a vocabulary itself calls reserved or unused.
    Agreement is about what ids mean: the two may still cut a text differently.
    """
    for id in sorted(set(a.ids()) & set(b.ids())):
        piece_a, piece_b = a.piece_bytes(id), b.piece_bytes(id)
        if piece_a != piece_b and not (_PLACEHOLDER.search(piece_a) or _PLACEHOLDER.search(piece_b)):
            return f"id {id} is {a.piece(id)!r} in {a.source} and {b.piece(id)!r} in {b.source}"
    return None


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)
