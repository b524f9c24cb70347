"""`kdtune download`: a model's folder from the Hugging Face hub."""

import errno
from collections.abc import Sequence
from pathlib import Path

from kdtune.cli.parser import Parser

# What a checkpoint folder needs: weights, configuration, tokenizer, licence. Folders inside a repository hold the same
# weights once more in other formats (original/, onnx/), and so does consolidated*.safetensors.
ALLOW = ["*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "*.md"]
IGNORE = ["*/*", "consolidated*"]


def main(argv: Sequence[str]) -> None:
    parser = Parser("download", "Fetch a model from the Hugging Face hub: safetensors, configuration and tokenizer.")
    parser.add_argument("repo", help="for example Qwen/Qwen2.5-0.5B")
    parser.add_argument("--output-dir", type=Path, required=True, help="the folder that a checkpoint_dir then names")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--token", "--hf-token", help="for private and gated models (default: that of `hf auth login`, or HF_TOKEN)"
    )
    parser.add_argument(
        "--allow-patterns",
        nargs="+",
        default=ALLOW,
        metavar="PATTERN",
        help=f"files to fetch (default: {' '.join(ALLOW)})",
    )
    parser.add_argument(
        "--ignore-patterns",
        nargs="*",
        default=IGNORE,
        metavar="PATTERN",
        help=f"files to leave (default: {' '.join(IGNORE)})",
    )
    arguments = parser.parse_args(argv)

    _fetch(
        arguments.repo,
        arguments.output_dir,
        arguments.revision,
        arguments.token,
        arguments.allow_patterns,
        arguments.ignore_patterns,
    )
    # The hub's client keeps its own notes in .cache/ inside the folder.
    paths = (path.relative_to(arguments.output_dir) for path in arguments.output_dir.rglob("*") if path.is_file())
    files = [arguments.output_dir / path for path in paths if path.parts[0] != ".cache"]
    if arguments.allow_patterns is ALLOW and not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(
            f"{arguments.repo} holds no *.safetensors at its top level, which is what kdtune reads. "
            "Look for a converted copy of the model or for another --revision."
        )
    size = sum(file.stat().st_size for file in files) / 1e9
    print(f"{arguments.repo} is in {arguments.output_dir}: {len(files)} files, {size:.2f} GB. Use it with:")
    is_adapter = (arguments.output_dir / "adapter_config.json").exists()
    print(f"  checkpointer.{'adapter_dir' if is_adapter else 'checkpoint_dir'}={arguments.output_dir}")


def _fetch(
    repo: str, folder: Path, revision: str | None, token: str | None, allow: list[str], ignore: list[str]
) -> None:
    """Download, with the hub's exceptions told as what happened and what to do.

    Raises:
        ValueError: the repository is not named rightly, is gated, not there or not to be reached.
        OSError: the folder cannot be written.
    """
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    try:
        huggingface_hub.snapshot_download(
            repo, revision=revision, local_dir=folder, token=token, allow_patterns=allow, ignore_patterns=ignore
        )
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is no repository's name: it has the form owner/model. {error}") from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{repo} is gated: its owner must let you in. Ask for access on {page}, "
            "then log in with `hf auth login` or give --token."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"The hub knows no model {repo}, or does not show it to you. Check the spelling; if it is private, "
            "log in with `hf auth login` or give --token."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{repo} has no revision {revision!r}. {page}/tree/main lists its branches and tags."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ValueError(
            f"The hub cannot be reached, so {repo} cannot be fetched. Check the network, HF_HUB_OFFLINE and "
            f"HF_ENDPOINT; or copy the model's folder to {folder} by hand."
        ) from error
    except errors.HfHubHTTPError as error:
        raise ValueError(f"The hub refused {repo}: {str(error).strip()}") from error
    except PermissionError as error:
        raise PermissionError(
            f"{folder} cannot be written: {error.strerror or error}. Give another --output-dir."
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"The disk that holds {folder} is full. Free some space and run this again: it continues."
        ) from error
