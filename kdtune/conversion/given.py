"""Somebody's settings, of which each is answered for: carried over, or told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# What became of a setting: it has no counterpart and did something; it has one that means something else; or kdtune
# needs no such setting.
Kind = Literal["lost", "different", "unneeded"]

UNKNOWN = "kdtune has no such setting."
_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")
_MOST_LOOKUPS = 10_000  # a few lines that each name the one before twice would else fill the memory


@dataclass
class Converted:
    """What a config of another tool is in kdtune's words.

    Attributes:
        origin: the tool.
        recipe: kdtune's, whose settings they are.
        settings: by kdtune's full keys, in the order of the file to be written.
        notes: (what became of it, `key=value` as it was given, why).
        wanted: settings that the file says nothing about and that a run needs.
    """

    origin: str
    recipe: str = "knowledge_distillation"
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[Kind, str, str]] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)

    def sections(self) -> dict[str, Any]:
        """The settings, nested."""
        tree: dict[str, Any] = {}
        for key, value in self.settings.items():
            *sections, name = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        return tree


class Given:
    """A section of the given settings. What is taken out of it is the taker's to answer for; `close` tells the rest."""

    def __init__(self, values: Mapping[Any, Any], result: Converted, prefix: str = "") -> None:
        self.result = result
        self._values = {str(name): value for name, value in values.items()}
        self.prefix = prefix

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = None) -> Any:
        return self._values.pop(name, default)

    def peek(self, name: str) -> Any:
        """The value, left where it is; None if it is not given."""
        return self._values.get(name)

    def copy(self, name: str, key: str | None = None) -> None:
        """Carry a setting over as it is, under kdtune's key; null is no setting."""
        value = self.take(name)
        if value is not None:
            self.result.settings[key or f"{self.prefix}{name}"] = value

    def tell(self, kind: Kind, name: str, why: str) -> None:
        """Take a setting, if it is given, and say why it is not carried over, or what is different."""
        if name in self:
            self.note(kind, name, self.take(name), why)

    def note(self, kind: Kind, name: str, value: Any, why: str) -> None:
        """Say something about a setting that is taken, or of which the default is meant."""
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        self.result.notes.append((kind, f"{self.prefix}{name}={shown}", why))

    def section(self, name: str) -> Given:
        """A section inside; empty if there is none. A value in its place stays here, to be told."""
        inner = self._values.get(name)
        values = self.take(name) if isinstance(inner, Mapping) else {}
        return Given(values, self.result, f"{self.prefix}{name}.")

    def close(self, why: str = UNKNOWN) -> None:
        """Tell of everything that nobody took."""
        for name in list(self._values):
            if isinstance(self._values[name], Mapping) and self._values[name]:
                self.section(name).close(why)
            else:
                self.tell("lost", name, why)


def resolve(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Replace each `${other.setting}` by the other's value.

    Raises:
        ValueError: one that leads nowhere, or in a circle, or that is more than the name of a setting; far too many.
    """
    num_lookups = 0

    def look_up(key: str, trail: tuple[str, ...]) -> Any:
        nonlocal num_lookups
        num_lookups += 1
        if num_lookups > _MOST_LOOKUPS:
            raise ValueError(f"Settings lead to others in more than {_MOST_LOOKUPS:,} places, as ${{{key}}} does.")
        if key in trail:
            raise ValueError(f"${{{key}}} leads back to itself, by way of {', '.join(trail)}.")
        node: Any = values
        for name in key.split("."):
            if not isinstance(node, Mapping) or name not in node:
                raise ValueError(f"${{{key}}} leads nowhere: there is no setting {key}.")
            node = node[name]
        return resolved(node, (*trail, key))

    def resolved(value: Any, trail: tuple[str, ...] = ()) -> Any:
        if isinstance(value, Mapping):
            return {name: resolved(item, trail) for name, item in value.items()}
        if isinstance(value, list):
            return [resolved(item, trail) for item in value]
        if not isinstance(value, str):
            return value
        if whole := _INTERPOLATION.fullmatch(value):
            return look_up(whole[1], trail)
        text = _INTERPOLATION.sub(lambda found: str(look_up(found[1], trail)), value)
        if "${" in text:
            raise ValueError(f"{value!r} is not resolved: a setting's name alone can be, as in ${{output_dir}}.")
        return text

    return {name: resolved(value) for name, value in values.items()}
