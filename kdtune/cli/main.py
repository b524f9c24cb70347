"""The entry point: finds the command, and turns a user's mistake into one message."""

import importlib
import os
import sys
from collections.abc import Sequence

import kdtune
from kdtune.cli import catalog
from kdtune.cli.terminal import visible

# Each is a module of this package, with _ for -, that has `main(argv)`; only the one that is called is imported.
COMMANDS = {
    "run": "run a recipe",
    "ls": "list the recipes and their configs",
    "cp": "copy a recipe or a config, to change it",
    "cat": "print a recipe or a config",
    "validate": "check a config against its recipe's settings",
    "convert-config": "bring a config of torchtune's or Model Optimizer's",
    "sweep": "run a recipe with every combination of some values",
    "plan": "say what memory and time a run would take",
    "data": "look at what a run would train on",
    "compare": "say whether models are better than a baseline",
    "report": "show what came out of runs, as a page",
    "download": "fetch a model from the Hugging Face hub",
}

_HELP = """\
usage: kdtune <command> ...

Distil a big language model into a small one. A recipe is one Python file; a config is a YAML file of its settings.

{commands}

  kdtune <command> --help        how to call it
  kdtune run <recipe> --help     every setting of a recipe
  kdtune --version

A mistake in what you give ends in a message and exit status 2; KDTUNE_TRACEBACK=1 shows where it was found."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: the arguments after `kdtune`; those of the process unless given.

    Raises:
        SystemExit: 2 for a mistake of the user, after a message on stderr; 130 for Ctrl-C.
    """
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nkdtune: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of `kdtune ls | head` has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("KDTUNE_TRACEBACK") == "1":
            raise
        print(f"kdtune: error: {visible(str(error), keep=chr(10))}", file=sys.stderr)  # it may quote a row
        raise SystemExit(2) from None


def _dispatch(argv: list[str]) -> None:
    command, *rest = argv or [""]
    if command in ("-h", "--help", "help"):
        print(_help())
    elif command in ("-V", "--version"):
        print(f"kdtune {kdtune.__version__}")
    elif command in COMMANDS:
        importlib.import_module(f"kdtune.cli.{command.replace('-', '_')}").main(rest)
    elif not command:
        print(_help(), file=sys.stderr)
        raise SystemExit(2)
    else:
        raise ValueError(f"No command {command!r}. {catalog.nearest(command, COMMANDS)}")


def _help() -> str:
    return _HELP.format(commands="\n".join(f"  {name:<16}{what}" for name, what in COMMANDS.items()))


if __name__ == "__main__":
    main()
