"""`kdtune run`: a recipe with its settings; and `kdtune run <recipe> --help`, what those are."""

import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kdtune.cli import catalog, launch, rank, recipe
from kdtune.cli.parser import Parser

if TYPE_CHECKING:
    from kdtune.config import Setting

_DESCRIPTION = """\
Run a recipe: a shipped one by its name, or any file by its path. Its settings are the defaults in the recipe, then the
config, then every key=value, later wins. `kdtune run <recipe> --help` lists them.

With --nproc-per-node, and torchrun's other options for several machines, that many processes run it together."""


def main(argv: Sequence[str]) -> None:
    usage = f"kdtune run [--nproc-per-node N ...] {recipe.USAGE} [--dry-run]"
    parser = Parser("run", _DESCRIPTION, usage=usage, add_help=False)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print it, and train nothing")
    launch.add_options(parser)
    call = recipe.parse(parser, argv)
    if call is None:
        parser.print_help()
    elif options := launch.options(call):
        launch.run(call, options)
    elif rank.is_one():
        with rank.speaking_once():
            _run(call)
    else:
        _run(call)


def _run(call: recipe.Call) -> None:
    has_chosen = _choose_allocator()
    module = recipe.load_module(call.recipe)
    if call.options.help:
        print("\n".join(_help(call, module)))
        return
    cfg = recipe.settings(module, call)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of code that it came from
    if has_chosen and str(getattr(cfg, "device", "")).startswith("cuda"):
        print(f"allocator {_ALLOCATOR}={os.environ[_ALLOCATOR]}, which an environment variable of your own replaces")
    if call.options.dry_run:
        module.check(cfg)
        print("Dry run: everything is in order, nothing was trained.")
    else:
        module.main(cfg)


_ALLOCATOR = "PYTORCH_ALLOC_CONF"  # torch 2.11 to 2.13 also read the two older names


def _choose_allocator() -> bool:
    """Let torch grow the segments of memory that it has on CUDA, so that batches of many lengths leave no gaps in it.

    torch reads the environment once, so this comes before it is imported.

    Returns:
        Whether it was left to us.
    """
    names = (_ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform != "linux" or any(name in os.environ for name in names):
        return False
    os.environ[_ALLOCATOR] = "expandable_segments:True"
    return True


def _help(call: recipe.Call, module: ModuleType) -> Iterator[str]:
    from kdtune import config

    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    usage = f"usage: kdtune run {call.name} [--config <name | file.yaml>] [key=value ...] [--dry-run]"
    yield from textwrap.wrap(usage, width, subsequent_indent="  ", break_on_hyphens=False)
    yield ""
    yield from textwrap.wrap((module.__doc__ or "").strip().partition("\n\n")[0], width)
    configs = [shipped.name for shipped in catalog.configs(catalog.bare_name(call.recipe.stem))]
    if configs:
        yield ""
        yield from textwrap.wrap(
            f"Configs: {', '.join(configs)}", width, subsequent_indent="  ", break_on_hyphens=False
        )
    yield ""
    yield "Settings, as key=default:"
    section = ""
    for setting in config.describe(module.Config):
        if setting.is_section:
            section = f"{setting.key}."
            is_optional = setting.type != "section" and "null" not in setting.comment
            comment = f"{setting.comment}; null unless one of its settings is given" if is_optional else setting.comment
            yield ""
            yield from textwrap.wrap(f"{setting.key}: {comment}", width, subsequent_indent="  ")
            continue
        if section and not setting.key.startswith(section):
            section = ""
            yield ""
        yield from _describe(setting, width)


def _describe(setting: "Setting", width: int) -> list[str]:
    value = "..." if setting.required else _yaml(setting.default)
    kind = ", ".join(part for part in (setting.type, setting.range, "required" if setting.required else "") if part)
    head = f"  {setting.key}={value}"
    lines = textwrap.wrap(f"{head:<42}  {kind}", width, subsequent_indent=" " * 8, break_on_hyphens=False)
    return lines + textwrap.wrap(setting.comment, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _yaml(value: Any) -> str:
    """A value as it is written behind `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return str(value)
