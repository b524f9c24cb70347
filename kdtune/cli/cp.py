"""`kdtune cp`: a recipe or a config of one's own, to change."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from kdtune.cli import catalog
from kdtune.cli.parser import Parser


def main(argv: Sequence[str]) -> None:
    parser = Parser("cp", "Copy a recipe or a config, to change it. The copy runs from anywhere, by its path.")
    parser.add_argument("name", help="a recipe's or a config's name, or a path")
    parser.add_argument("to", help="a file (the suffix is added if it is missing), or a folder, which keeps the name")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    parser.add_argument("--make-parents", action="store_true", help="create the folders that are missing")
    arguments = parser.parse_args(argv)

    source = catalog.find(arguments.name, "cp")
    to = _destination(source, arguments.to)
    if arguments.make_parents:
        to.parent.mkdir(parents=True, exist_ok=True)
    elif not to.parent.is_dir():
        raise FileNotFoundError(f"No folder {to.parent}. Create it, or give --make-parents.")
    if to.exists() and to.samefile(source):
        raise ValueError(f"{to} is the file itself.")
    try:
        with to.open("wb" if arguments.force else "xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise FileExistsError(
            f"{to} is there already and may hold your changes. Give --force to overwrite it."
        ) from None
    print(f"Copied to {to}. Run it with:\n  {_launch_line(source, to)}")


def _destination(source: Path, to: str) -> Path:
    path = Path(to).expanduser()
    if path.is_dir() or to.endswith("/"):
        return path / source.name
    return path if path.suffix == source.suffix else path.with_name(path.name + source.suffix)


def _launch_line(source: Path, to: Path) -> str:
    file = shlex.quote(str(to))
    if source.suffix != ".py":
        return f"kdtune run {catalog.launched_by(source) or '<recipe>'} --config {file}"
    configs = sorted(catalog.configs(source.stem), key=lambda config: "quickstart" not in config.path.parts)
    # A copy under another name needs the config's full name: the short one goes by the recipe's.
    full = [config.path.relative_to(catalog.folder() / "configs").with_suffix("") for config in configs]
    return f"kdtune run {file} --config {full[0].as_posix() if full else '<config>'}"
