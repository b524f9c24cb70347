"""How big models are, read from the Hugging Face folders that a run names; of weights the headers alone."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """What is known without loading a weight; None where a folder does not say."""

    name: str  # the last parts of its path
    layers: int | None = None
    width: int | None = None
    heads: str | None = None  # of queries and of keys and values
    vocab_size: int | None = None
    parameters: int | None = None
    dtype: str | None = None  # of the saved weights
    num_bytes: int | None = None  # of the saved weights
    note: str = ""


def count(parameters: int) -> str:
    """In thousands, millions or billions."""
    size, unit = next(pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (0, "")) if parameters >= pair[0])
    return f"{parameters / size:.{2 if unit == 'B' else 1}f} {unit}" if size else str(parameters)


def of_student(folder: Path, settings: Mapping[str, Any]) -> Model | None:
    """What the run wrote, or else what it started from."""
    if (folder / "model" / "config.json").is_file():
        return _read(folder / "model")
    start = settings.get("checkpointer.checkpoint_dir")
    found = _read(Path(start)) if isinstance(start, str) and (Path(start) / "config.json").is_file() else None
    if found is None:
        return None
    if (folder / "adapter").is_dir():
        return _changed(found, f"with the adapter of rank {settings.get('lora.rank', '?')}")
    layers = settings.get("checkpointer.keep_layers")
    if isinstance(layers, list):
        return Model(found.name, len(layers), found.width, found.heads, found.vocab_size, note="not written yet")
    return _changed(found, "not written yet; this is what it starts from")


def of_teacher(settings: Mapping[str, Any]) -> Model | None:
    """The live teacher, or what the card of a cache says of the one that was asked."""
    folder = settings.get("teacher_checkpointer.checkpoint_dir")
    if isinstance(folder, str):
        path = Path(folder)
        if (path / "config.json").is_file():
            return _read(path)
        return Model(_short(path), note="its folder is no longer there")
    cache = settings.get("teacher.cache_dir")
    if not isinstance(cache, str):
        return None
    try:
        card = json.loads((Path(cache) / "card.json").read_text(encoding="utf-8"))
        teacher, store = card["teacher"], card["store"]
        kind = f"{store['kind']} {store.get('top_k') or store.get('num_samples') or ''}".strip()
        return Model(
            str(teacher["name"]),
            vocab_size=card["vocab_size"],
            dtype=str(teacher["dtype"]),
            note=f"its answers come from the cache {_short(Path(cache))}: {kind}",
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Model(_short(Path(cache)), note="a cache that is no longer there")


def _changed(model: Model, note: str) -> Model:
    return Model(**{**model.__dict__, "note": note})


def _read(folder: Path) -> Model:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Model(_short(folder), note="its config.json cannot be read")
    if not isinstance(config, dict):
        return Model(_short(folder), note="its config.json cannot be read")

    def number(key: str) -> int | None:
        value = config.get(key)
        return value if isinstance(value, int) else None

    heads = number("num_attention_heads")
    keys = number("num_key_value_heads") or heads
    parameters, num_bytes, dtypes = _weights(folder)
    quantized = isinstance(config.get("quantization_config"), dict)
    return Model(
        _short(folder),
        layers=number("num_hidden_layers"),
        width=number("hidden_size"),
        heads=f"{heads} / {keys}" if heads else None,
        vocab_size=number("vocab_size"),
        parameters=None if quantized else parameters,  # packed weights are fewer numbers than parameters
        dtype=" and ".join(dtypes) or None,
        num_bytes=num_bytes,
        note="quantised" if quantized else "",
    )


def _weights(folder: Path) -> tuple[int | None, int | None, list[str]]:
    """Numbers, bytes and types of all tensors, from the headers of the safetensors files."""
    parameters, num_bytes, dtypes = 0, 0, dict[str, None]()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 10**8)))
            header.pop("__metadata__", None)
            for tensor in header.values():
                parameters += math.prod(tensor["shape"])
                num_bytes += tensor["data_offsets"][1] - tensor["data_offsets"][0]
                dtypes[str(tensor["dtype"]).lower()] = None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, None, []
    return parameters or None, num_bytes or None, list(dtypes)


def _short(path: Path) -> str:
    """As much of a path as tells models apart: runs/quickstart/model rather than model."""
    return "/".join(path.parts[-3:] if path.name == "model" else path.parts[-2:])
