"""How every command reads its arguments."""

import argparse
import difflib
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are raised like every other mistake of the user."""

    def __init__(self, command: str, description: str, *, usage: str | None = None, add_help: bool = True) -> None:
        super().__init__(
            prog=f"kdtune {command}",
            description=description,
            usage=usage,
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}. `{self.prog} --help` says how to call it.")

    def nearest_option(self, argument: str) -> str | None:
        """The option that a misspelt one was probably meant to be."""
        near = difflib.get_close_matches(argument, self._option_string_actions, 1, cutoff=0.8)
        return near[0] if near else None
