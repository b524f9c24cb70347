"""What the small files beside a tokenizer say: special tokens, the bos rule, chat templates, ids that end a text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text before the model of the tokenizer sees it."""

    content: str
    special: bool = True  # left out of a decoded text
    lstrip: bool = False  # swallows the whitespace on its left
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Settings:
    """The settings of a tokenizer folder, empty where the folder is silent."""

    named: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, pad_token, unk_token -> content
    special: tuple[str, ...] = ()  # further special tokens, without an id of their own
    added: dict[int, AddedToken] = field(default_factory=dict)
    add_bos: bool | None = None  # None: the folder does not say
    legacy: bool = False  # sentencepiece: a space goes before the text after each special token, too
    chat_templates: dict[str, str] = field(default_factory=dict)  # "default", "tool_use", ...
    eos_ids: tuple[int, ...] = ()  # of generation_config.json
    model_type: str | None = None  # of config.json
    tokenizer_class: str | None = None


def read_settings(folder: Path, model_dir: Path | None = None) -> Settings:
    """Reads tokenizer_config.json and its companions; each of them may be missing.

    Args:
        folder: of the tokenizer.
        model_dir: where config.json and generation_config.json are read if `folder` has none.

    Raises:
        ValueError: a file is not valid json, or not an object.
    """
    config = read_json(folder / "tokenizer_config.json")
    special_map = read_json(folder / "special_tokens_map.json")
    places = [folder] if model_dir is None else [folder, model_dir]
    model, generation = (
        next(filter(None, (read_json(place / name) for place in places)), {})
        for name in ("config.json", "generation_config.json")
    )
    generation = generation or model
    added = {int(id): _added_token(token) for id, token in (config.get("added_tokens_decoder") or {}).items()}
    for content, id in read_json(folder / "added_tokens.json").items():
        added.setdefault(int(id), AddedToken(content, special=False))

    named = {}
    for name in NAMED_TOKENS:
        token = config.get(name, special_map.get(name))
        if token is not None:
            named[name] = _content(token)
    special: list[Any] = []
    for source in (config, special_map):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = source.get(key) or []
            special += tokens.values() if isinstance(tokens, dict) else tokens

    return Settings(
        named=named,
        special=tuple(dict.fromkeys(_content(token) for token in special)),
        added=added,
        add_bos=config.get("add_bos_token"),
        legacy=bool(config.get("legacy", False)),
        chat_templates=_chat_templates(folder, config.get("chat_template")),
        eos_ids=_ids(generation.get("eos_token_id")),
        model_type=model.get("model_type"),
        tokenizer_class=config.get("tokenizer_class"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a json file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid json ({error}). Fetch the file again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a json object. Fetch the file again.")
    return content


def _chat_templates(folder: Path, in_config: Any) -> dict[str, str]:
    # transformers writes the template to a file of its own since 4.50; where both exist the file is the newer one.
    templates: dict[str, str] = {}
    if isinstance(in_config, str):
        templates["default"] = in_config
    elif isinstance(in_config, list):
        templates.update({entry["name"]: entry["template"] for entry in in_config})
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def _added_token(token: Any) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token)
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return AddedToken(token["content"], **{name: bool(token[name]) for name in flags if name in token})


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
