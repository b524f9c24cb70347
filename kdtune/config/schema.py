"""What the dataclass of a recipe says about its settings: types, defaults, ranges and comments."""

import ast
import copy
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from omegaconf import MISSING

BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def setting(
    default: Any = MISSING,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    path: bool = False,
) -> Any:
    """A field of a config dataclass, with the range of values that it takes.

    Args:
        default: MISSING (the user must give it) unless said otherwise. Lists and dicts are copied for each instance;
            for a section it is its dataclass.
        gt: the value must be greater than this; `ge`, `lt` and `le` likewise. Elements of a list are held to it
            one by one; null is always in range.
        path: the value is a place on the disk: a `~` at its start becomes the home folder. The shell leaves it alone
            behind `key=`.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    metadata = {"bounds": {name: bound for name, bound in bounds.items() if bound is not None}, "path": path}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One line of a recipe's help: a setting, or the section that the settings after it belong to."""

    key: str  # full key: optimizer.lr
    type: str  # as a person writes it: "int", "str or null", "section"
    default: Any  # MISSING if the user must give it
    comment: str  # the comment beside the field, or above it
    range: str  # "> 0, <= 1", or ""
    choices: tuple[Any, ...]  # the closed list of values, or ()

    @property
    def is_section(self) -> bool:
        return self.type.startswith("section")

    @property
    def required(self) -> bool:
        return bool(self.default == MISSING)


def describe(schema: type) -> list[Setting]:
    """Every setting of a config dataclass in the source's order; a section comes before the settings inside it."""
    return list(_describe(schema, _instance(schema), ""))


@dataclasses.dataclass(frozen=True)
class Field:
    """A field's annotation, taken apart."""

    name: str
    type: Any  # without the `| None`
    optional: bool
    bounds: Mapping[str, float]
    is_path: bool

    @property
    def section(self) -> Any:
        return self.type if dataclasses.is_dataclass(self.type) else None

    @property
    def named_section(self) -> Any:
        """The dataclass of each entry, if this is a map of sections that the user names."""
        args = typing.get_args(self.type)
        return args[1] if self.is_map and len(args) == 2 and dataclasses.is_dataclass(args[1]) else None

    @property
    def choices(self) -> tuple[Any, ...]:
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def is_text(self) -> bool:
        return self.type is str or (bool(self.choices) and all(isinstance(choice, str) for choice in self.choices))

    @property
    def is_map(self) -> bool:
        return typing.get_origin(self.type) is dict or self.type is dict

    def wanted(self) -> str:
        if self.section:
            name = "section"
        elif self.named_section:
            name = "sections by name"
        elif self.choices:
            name = "one of " + ", ".join(map(str, self.choices))
        else:
            name = (
                self.type.__name__ if isinstance(self.type, type) and not typing.get_args(self.type) else str(self.type)
            )
        return f"{name} or null" if self.optional else name


@functools.cache
def fields_of(schema: Any) -> Mapping[str, Field]:
    """The fields of a dataclass by their names."""
    hints = typing.get_type_hints(schema)
    fields = {}
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        inner = hint
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            rest = tuple(arg for arg in typing.get_args(hint) if arg is not type(None))
            inner = rest[0] if len(rest) == 1 else typing.Union[rest]  # noqa: UP007 (built from a tuple)
        optional = inner is not hint and type(None) in typing.get_args(hint)
        bounds, is_path = field.metadata.get("bounds", {}), field.metadata.get("path", False)
        fields[field.name] = Field(field.name, inner, optional, bounds, is_path)
    return fields


def keys_of(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, field in fields_of(schema).items():
        yield prefix + name
        if field.section:
            yield from keys_of(field.section, f"{prefix}{name}.")
        if field.named_section:
            yield from keys_of(field.named_section, f"{prefix}{name}.<name>.")


def _instance(schema: Any) -> Any:
    """The dataclass with its defaults, MISSING for fields that have none."""
    bare = [
        field.name
        for field in dataclasses.fields(schema)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return schema(**dict.fromkeys(bare, MISSING))


def _describe(schema: Any, defaults: Any, prefix: str) -> Iterator[Setting]:
    comments = _comments(schema)
    for name, field in fields_of(schema).items():
        limits = ", ".join(f"{BOUNDS[bound]} {limit}" for bound, limit in field.bounds.items())
        default = getattr(defaults, name)
        key = prefix + name
        yield Setting(
            key, field.wanted(), None if field.section else default, comments.get(name, ""), limits, field.choices
        )
        if field.section:
            inner = default if dataclasses.is_dataclass(default) else _instance(field.section)
            yield from _describe(field.section, inner, f"{key}.")
        if field.named_section:
            yield from _describe(field.named_section, _instance(field.named_section), f"{key}.<name>.")


@functools.cache
def _comments(schema: Any) -> Mapping[str, str]:
    """Comment of each field: behind it, else on the lines right above it."""
    comments: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(typing.cast(type, base)))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        at_line = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        alone = {line for line, token in at_line.items() if not token.line[: token.start[1]].strip()}
        definition = typing.cast(ast.ClassDef, ast.parse(source).body[0])
        for statement in definition.body:
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            first, last = statement.lineno, statement.end_lineno or statement.lineno
            lines = [line for line in range(first, last + 1) if line in at_line]
            above = first - 1
            while above in alone and (not lines or lines[0] < first):
                lines.insert(0, above)
                above -= 1
            comments[statement.target.id] = " ".join(at_line[line].string.lstrip("# ").rstrip() for line in lines)
    return comments
