"""How every command reads its arguments."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are raised like every other mistake of the user."""

    def __init__(self, command: str, description: str, **options: str | bool | None) -> None:
        super().__init__(
            prog=f"kdtune {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}. `{self.prog} --help` says how to call it.")
