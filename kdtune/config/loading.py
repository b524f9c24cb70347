"""A YAML file and `key=value` read into the dataclass of a recipe."""

import dataclasses
import difflib
import json
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from kdtune.config.schema import BOUNDS, Field, fields_of, keys_of

T = TypeVar("T")

ASSETS = Path(__file__).resolve().parents[1] / "assets"
_NULLS = ("null", "None", "~")
# What follows an interpolation's `${`: another setting, or a shipped file. OmegaConf itself would take any resolver,
# also under a name that is put together inside (`${${name}:HOME}`).
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*(\$\{(?!\s*(?:[\w.]+|asset:[\w./-]+)\s*\})[^}]*\}?)")


def load(schema: type[T], config: Path | None, overrides: Sequence[str]) -> T:
    """The settings of one run: the schema's defaults, then the YAML file, then `key=value`, later wins.

    The text of an override is read by the type of its setting: for a text setting it is the value as it stands
    (quotes around all of it are dropped), for any other it is YAML. `null`, `None` and `~` all mean null; `key=` is
    the empty text. Maps and sections are merged, lists are replaced.

    Raises:
        ValueError: unknown keys (with the nearest right one), wrong types, values out of range, settings that are
            missing, interpolations that lead nowhere, bad YAML; all that are found at once, one per line.
        FileNotFoundError: no such config file.
    """
    _register_asset_resolver()
    cfg = OmegaConf.structured(schema)
    problems: list[str] = []
    if config is not None:
        _merge(cfg, schema, read_yaml(config), "", _Reading(schema, f" ({config})", problems))
    for key, text in split_overrides(overrides):
        value: Any = _Text(text)
        for name in reversed(key.split(".")):
            value = {name: value}
        _merge(cfg, schema, value, "", _Reading(schema, "", problems))
    _fail_if(problems)

    missing: list[str] = []
    for key, node, field in _walk(cfg, schema):
        _check(key, node, field, schema, problems, missing)
    if missing:
        problems.append(
            f"no value for {', '.join(missing)}. The recipe cannot guess {'it' if len(missing) == 1 else 'them'}: "
            f"give {missing[0]}=... on the command line, or name a config that has it."
        )
    _fail_if(problems)
    return typing.cast(T, OmegaConf.to_object(cfg))


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """`key=value` arguments as (key, value); everything after the first `=` is the value.

    Raises:
        ValueError: an argument of another form, with the form that was probably meant.
    """
    pairs = []
    for i, argument in enumerate(overrides):
        key, equals, text = argument.partition("=")
        if equals and re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) and not key.startswith("-"):
            pairs.append((key, text))
            continue
        if argument.startswith("~"):
            advice = f"A setting cannot be removed; {argument[1:]}=null switches off what can be."
        elif argument.startswith("--") and equals:
            advice = f"Did you mean {key.lstrip('-')}={text}?"
        else:
            following = overrides[i + 1] if i + 1 < len(overrides) else "..."
            value = following if argument.startswith("-") and "=" not in following else "..."
            advice = f"Did you mean {key.strip('-=') or 'key'}={value}?"
        raise ValueError(f"{argument!r} is no setting: settings are given as key=value. {advice}")
    return pairs


def to_yaml(cfg: Any) -> str:
    """The settings as YAML with every interpolation resolved; `load` reads it back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(dataclasses.asdict(cfg))))


# Giving values.


class _Text(str):
    """The right side of an override: what it means depends on the setting's type."""


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Where values come from, and where complaints about them go."""

    schema: Any  # the whole recipe's, for the nearest right key
    origin: str  # " (file)", or "" for the command line
    problems: list[str]


def read_yaml(path: Path) -> Mapping[Any, Any]:
    """What a YAML file holds, as data: interpolations stay texts, and no tag makes an object.

    Raises:
        ValueError: not YAML, or not a map.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No config file {path}.")
    try:
        values = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        why = str(error.problem or error.context).rstrip(".")
        raise ValueError(f"{place}: not YAML: {why}.") from error
    except RecursionError:
        raise ValueError(f"{path}: not YAML: nested too deeply.") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {_first_line(error)}.") from error
    except OSError as error:
        # OmegaConf raises a bare OSError for a file that holds a single word or number.
        raise ValueError(f"{path}: cannot be read as settings: {_first_line(error)}.") from error
    if isinstance(values, ListConfig):
        raise ValueError(f"{path}: a config holds lines of the form `key: value`, this is a list.")
    return typing.cast(Mapping[Any, Any], OmegaConf.to_container(values, resolve=False))


def _merge(node: DictConfig, section: Any, values: Mapping[Any, Any], prefix: str, reading: _Reading) -> None:
    """Put values into `node`, which is a `section`; what does not fit becomes a line of the reading's problems."""
    fields = fields_of(section)
    for name, given in values.items():
        key = f"{prefix}{name}"
        field = fields.get(name)
        if field is None:
            reading.problems.append(f"unknown setting {key}{reading.origin}. {_nearest(key, reading.schema)}")
            continue
        value = _parse(given, field)
        if field.is_path and isinstance(value, str):
            value = os.path.expanduser(value)
            if not value:
                reading.problems.append(f"{key} is a place on the disk and cannot be empty{reading.origin}.")
                continue
        refusal = _refusal(value, field)
        if refusal is None and field.section and isinstance(value, Mapping):
            if not OmegaConf.is_interpolation(node, name):
                if node[name] is None:
                    node[name] = field.section
                _merge(node[name], field.section, value, f"{key}.", reading)
                continue
            refusal = "is a copy of another section, which is where its values are set"
        if refusal is None and field.named_section and isinstance(value, Mapping):
            for entry, inner in value.items():
                if not isinstance(entry, str) or not re.fullmatch(r"[\w-]+", entry) or not isinstance(inner, Mapping):
                    reading.problems.append(
                        f"{key} wants sections by name, got {_show({entry: inner})}{reading.origin}. Write "
                        f"{key}.<name>.{next(iter(fields_of(field.named_section)))}=... with a name of letters."
                    )
                    continue
                if entry not in node[name]:
                    node[name][entry] = field.named_section
                _merge(node[name][entry], field.named_section, inner, f"{key}.{entry}.", reading)
            continue
        if refusal is None:
            try:
                OmegaConf.update(node, name, value, merge=True)
            except OmegaConfBaseException:
                refusal = f"wants {field.wanted()}, got {_show(value)}"
        if refusal:
            reading.problems.append(f"{key} {refusal}{reading.origin}. {_advice(key, value, field)}".rstrip())


def _parse(value: Any, field: Field) -> Any:
    if field.is_map and isinstance(value, Mapping):
        return {name: str(item) if isinstance(item, _Text) else item for name, item in value.items()}
    if not isinstance(value, _Text):
        return None if value == "None" else value
    if value in _NULLS:
        return None
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if value == "" or (field.is_text and not is_quoted):
        return str(value)
    try:
        # OmegaConf's reader, not yaml.safe_load, for which 1e-3 is a string.
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        return str(value)
    return typing.cast(dict[str, Any], parsed)["value"]


def _refusal(value: Any, field: Field) -> str | None:
    """What OmegaConf would let through, or would refuse in words about itself."""
    for text in _strings(value):
        if unknown := _INTERPOLATION.search(text):
            known = "a config knows ${other.setting} and ${asset:<path>} only"
            return f"uses {unknown[1]}; {known}, and \\${{ for a text that has these two signs"
    wanted = f"wants {field.wanted()}, got {_show(value)}"
    maps = typing.get_origin(next(iter(typing.get_args(field.type)), None)) is dict  # a list of them
    if isinstance(value, Mapping) and not field.section and not field.named_section:
        if not field.is_map:
            return f"is {field.wanted()} and has no setting {next(iter(value), '{}')} inside"
        if any(isinstance(item, (Mapping, list)) for item in value.values()):
            return wanted
    if isinstance(value, list) and any(isinstance(item, list) or isinstance(item, Mapping) != maps for item in value):
        return wanted
    if field.type is bool and type(value) is int and value not in (0, 1):
        return wanted
    if field.is_text and isinstance(value, bool):
        return f"{wanted}, which YAML reads as true or false: quote it"
    return None


def _advice(key: str, value: Any, field: Field) -> str:
    if field.choices:
        near = difflib.get_close_matches(str(value), map(str, field.choices), 1, cutoff=0.5)  # float32: fp32
        return f"Did you mean {near[0]}?" if near else ""
    if field.section:
        names = list(fields_of(field.section))
        return f"Set the values inside: {', '.join(f'{key}.{name}' for name in names[:3])} ..."
    if value == "":
        return "Write null for no value." if field.optional else ""
    if typing.get_origin(field.type) is list and isinstance(value, (str, int, float)):
        if str(value).startswith("["):
            return "Close each bracket, and put quotes around each text that has brackets or a colon."
        return f"Write {key}=[{value}] for a list."
    if field.type == list[str] and isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return "Put quotes around each text that has a colon in it."
    if field.is_map and isinstance(value, Mapping) and None in value.values():
        return "Write a space behind each colon: {a: b}."
    return ""


def _nearest(key: str, schema: Any) -> str:
    keys = list(keys_of(schema))
    if key in keys:
        section, _, last = key.rpartition(".")
        return f"Write {last} under {section}, indented."
    if key.endswith("_component_"):
        return "kdtune configs name no classes: a choice is a name out of a closed list (--help lists them)."
    last = key.rpartition(".")[2]
    near = [known for known in keys if known.rpartition(".")[2] == last] or difflib.get_close_matches(key, keys, 1)
    if not near:
        by_last = {known.rpartition(".")[2]: known for known in reversed(keys)}
        near = [by_last[name] for name in difflib.get_close_matches(last, by_last, 1)]
    return f"Did you mean {' or '.join(near[:3])}?" if near else "--help lists the settings."


# Looking at the result.


def _walk(node: DictConfig, schema: Any, prefix: str = "") -> Iterator[tuple[str, DictConfig, Field]]:
    for name, field in fields_of(schema).items():
        key = prefix + name
        if field.section and not OmegaConf.is_interpolation(node, name):
            if node[name] is not None:
                yield from _walk(node[name], field.section, f"{key}.")
        elif field.named_section:
            for entry in node[name]:
                yield from _walk(node[name][entry], field.named_section, f"{key}.{entry}.")
        else:
            yield key, node, field


def _check(key: str, node: DictConfig, field: Field, schema: Any, problems: list[str], missing: list[str]) -> None:
    if OmegaConf.is_missing(node, field.name):
        missing.append(key)
        return
    try:
        value = node[field.name]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
    except InterpolationToMissingValueError:
        return  # reported as the missing setting that it is
    except InterpolationKeyError:
        written = _written(node, field)
        names = [name for text in _strings(written) for name in re.findall(r"\$\{([\w.]+)\}", text)]
        unknown = [name for name in names if name not in keys_of(schema)]
        advice = _nearest(unknown[0], schema) if unknown else "It lies in a section that is null."
        problems.append(f"{key}={_show(written)} leads nowhere. {advice}")
        return
    except OmegaConfBaseException as error:
        reason = _first_line(error).removeprefix("ValueError raised while resolving interpolation: ")
        problems.append(f"{key} wants {field.wanted()}, got {_show(_written(node, field))}: {reason}.")
        return
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float) and not math.isfinite(item):
            problems.append(f"{key} must be a finite number, got {_show(item)}.")
        elif isinstance(item, (int, float)) and not all(_holds(item, *bound) for bound in field.bounds.items()):
            limits = " and ".join(f"{BOUNDS[name]} {limit}" for name, limit in field.bounds.items())
            problems.append(f"{key} must be {limits}, got {_show(item)}.")


def _written(node: DictConfig, field: Field) -> Any:
    """The value before interpolation."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))[field.name]


def _holds(value: float, bound: str, limit: float) -> bool:
    return {"gt": value > limit, "ge": value >= limit, "lt": value < limit, "le": value <= limit}[bound]


def _escape(value: Any) -> Any:
    """A text that came out as `${...}`, because it was given as `\\${...}`, must not be interpolated when read back."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _show(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _fail_if(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _register_asset_resolver() -> None:
    OmegaConf.register_resolver("asset", _asset, replace=True)


def _asset(path: str) -> str:
    found = (ASSETS / path).resolve()
    if not found.is_relative_to(ASSETS) or not found.exists():
        shipped = sorted(file.relative_to(ASSETS).as_posix() for file in ASSETS.rglob("*") if file.is_file())
        near = difflib.get_close_matches(path, [*shipped, *{Path(name).parent.as_posix() for name in shipped}], 1)
        raise ValueError(f"kdtune ships no {path}" + (f"; did you mean {near[0]}?" if near else ""))
    return str(found)
