"""What a cache is: card.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from kdtune import __version__
from kdtune.teacher_cache.config import StoreConfig, settings_of_kind

FORMAT = "kdtune teacher cache"
VERSION = 1
_END_SIZE = 2**16

EntropyOf = Literal["whole", "bucket"]


@dataclass(frozen=True)
class Teacher:
    """Which model answered.

    Attributes:
        name: for people; not compared.
        fingerprint: of its weights, see `teacher_fingerprint`; of a served one, whatever tells it from others.
        dtype: in which it computed.
        quantization: how its weights were held; None: not quantised.
    """

    name: str
    fingerprint: str
    dtype: str
    quantization: str | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set whose examples were answered, for people and for those who make the cache again."""

    settings: dict[str, Any]
    max_seq_len: int
    num_examples: int


@dataclass(frozen=True)
class Card:
    """What a cache is.

    Attributes:
        store: what is kept of each labelled token.
        vocab_size: of the teacher.
        teacher: who answered.
        tokenizer: fingerprint of the tokenizer that made the examples.
        hidden: store.kind=hidden only: `size` of a hidden state.
        entropy_of: what `entropy` is of: the whole distribution, or, where a server tells no more than its likeliest
            tokens, of them and one bucket for all others, which is less.
        datasets: what was answered so far; grows.
        kdtune: version that began it.
    """

    store: StoreConfig
    vocab_size: int
    teacher: Teacher
    tokenizer: str
    hidden: dict[str, Any] | None = None
    entropy_of: EntropyOf = "whole"
    datasets: tuple[Dataset, ...] = ()
    kdtune: str = field(default=__version__)

    @property
    def identity(self) -> dict[str, Any]:
        """What every answer of a cache has in common, by names as in card.json; what is null is left out."""
        teacher = {name: value for name, value in asdict(self.teacher).items() if name != "name" and value is not None}
        identity = {
            "version": VERSION,
            "store": settings_of_kind(self.store),
            "vocab_size": self.vocab_size,
            "teacher": teacher,
            "tokenizer": self.tokenizer,
            "hidden": self.hidden,
            "entropy_of": self.entropy_of,
        }
        return {name: value for name, value in identity.items() if value is not None}

    @property
    def hash(self) -> str:
        """Of `identity`, 16 hex digits: each shard carries it."""
        return hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        """The content of card.json."""
        entries = {"format": FORMAT, "version": VERSION, **asdict(self), "store": settings_of_kind(self.store)}
        return json.dumps({**entries, "hash": self.hash}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Card:
        """What `to_json` made.

        Raises:
            ValueError: it is something else, of a later version, or was changed.
        """
        try:
            entries = json.loads(text)
            found = entries.pop("format"), entries.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError("it is no card of a teacher cache") from None
        if found != (FORMAT, VERSION):
            raise ValueError(f"it is of {found[0]} {found[1]}, and this kdtune reads {FORMAT} {VERSION}")
        try:
            recorded = entries.pop("hash")
            card = cls(
                **{
                    **entries,
                    "store": StoreConfig(**entries["store"]),
                    "teacher": Teacher(**entries["teacher"]),
                    "datasets": tuple(Dataset(**dataset) for dataset in entries["datasets"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"it lacks an entry or has one too many ({error})") from None
        if recorded != card.hash or card.entropy_of not in get_args(EntropyOf):
            raise ValueError("it was changed by hand: its hash is that of other entries")
        return card

    def with_datasets(self, datasets: tuple[Dataset, ...]) -> Card:
        """The card with those of `datasets` that it does not have yet."""
        return replace(self, datasets=self.datasets + tuple(new for new in datasets if new not in self.datasets))

    def differences(self, other: Card) -> list[str]:
        """In words, what keeps the other's answers out of this cache; none: they are alike."""
        ours, theirs = _flat(self.identity), _flat(other.identity)
        return [
            f"{name} is {ours.get(name)} in the cache and {theirs.get(name)} here"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]


def _flat(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in entries.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def teacher_fingerprint(folder: str | Path, adapter: str | Path | None = None) -> str:
    """Tells the weights of a Hugging Face folder from others, and equals that of a copy on another machine.

    It is of config.json and, of each file of weights, of its name, its size and its first and last 64 KiB: to read all
    of a large teacher once more would take minutes. The first hold every tensor's name and shape.

    Args:
        folder: of the model.
        adapter: folder of what is merged into it; None: nothing is.
    """
    digest = hashlib.blake2b(digest_size=16)
    folders = [Path(one) for one in (folder, adapter) if one is not None]
    for path in (path for one in folders for path in sorted(one.iterdir())):
        if path.suffix != ".safetensors" and path.name not in ("config.json", "adapter_config.json"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_END_SIZE))
            file.seek(max(0, size - _END_SIZE))
            digest.update(file.read(_END_SIZE))
    return digest.hexdigest()
