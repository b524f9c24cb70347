"""`kdtune convert-config`: a config of another tool in kdtune's settings."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

import kdtune
from kdtune.cli.parser import Parser
from kdtune.cli.terminal import visible

_DESCRIPTION = """\
Print a config of another tool as one of kdtune's, and say on stderr what it could not carry over, key by key. It knows
the configs of torchtune's distillation and fine-tuning recipes, and Model Optimizer's distillation YAML (Megatron-LM,
Megatron Bridge). They are read as data: nothing in them is imported or run."""
_TITLES = {
    "lost": "Not carried over",
    "different": "Carried over, with another meaning or a choice made",
    "unneeded": "Not needed here",
}


class _Dumper(yaml.SafeDumper):
    """Lists of names in one line, and line breaks as \\n."""


_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=not any(isinstance(item, dict) for item in items)
    ),
)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


def main(argv: Sequence[str]) -> None:
    parser = Parser("convert-config", _DESCRIPTION)
    parser.add_argument("file", help="their YAML file")
    parser.add_argument("--output", metavar="FILE", help="write it there instead of to the terminal")
    parser.add_argument("--force", action="store_true", help="overwrite FILE if it is there")
    arguments = parser.parse_args(argv)
    from kdtune import config, conversion

    source = Path(arguments.file).expanduser()
    theirs = config.read_yaml(source)
    try:
        found = conversion.convert(theirs)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    output = Path(arguments.output).expanduser() if arguments.output else None
    launch = f"kdtune run {found.recipe} --config {shlex.quote(str(output or 'FILE'))}"
    launch += "".join(f" {key}=..." for key in found.wanted)
    text = (
        f"# Converted from {found.origin}'s {visible(source.name)} by kdtune {kdtune.__version__}.\n"
        f"# {launch}\n{yaml.dump(found.sections(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)}"
    )
    if output is None:
        sys.stdout.write(text)
    else:
        _write(output, text, arguments.force)
        print(f"Written to {output}. Check it, then run it with:\n  {launch}")
    for kind, title in _TITLES.items():
        lines = [f"  {visible(what)}: {visible(why)}" for its, what, why in found.notes if its == kind]
        if lines:
            print("\n".join([f"{title}:", *lines]), file=sys.stderr)
    if found.wanted:
        print("To be given, since the file does not say it: " + ", ".join(found.wanted), file=sys.stderr)


def _write(output: Path, text: str, force: bool) -> None:
    if not output.parent.is_dir():
        raise FileNotFoundError(f"No folder {output.parent}. Create it.")
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{output} is there already. Give --force to overwrite it.") from None
