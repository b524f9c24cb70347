"""What is asked of the hub, and the hub's refusals in words. Nothing is fetched: snapshot_download is a stand-in."""

import errno
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from kdtune.cli import download

from .conftest import Run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the last call; `hub["raises"]` is raised by it, `hub["files"]` are written."""
    state: dict[str, Any] = {"raises": None, "files": ["config.json", "model.safetensors", ".cache/notes"]}

    def snapshot_download(repo: str, *, local_dir: Path, **options: Any) -> str:
        if state["raises"] is not None:
            raise state["raises"]
        for name in state["files"]:
            path = Path(local_dir, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        state.update(options, repo=repo, local_dir=local_dir)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_defaults(hub: dict[str, Any], kdtune: Run, tmp_path: Path) -> None:
    status, out, err = kdtune("download", "owner/model", "--output-dir", str(tmp_path / "model"))
    assert (status, err) == (0, "")
    assert "2 files" in out
    assert f"checkpointer.checkpoint_dir={tmp_path / 'model'}" in out
    assert (hub["repo"], hub["local_dir"], hub["revision"], hub["token"]) == (
        "owner/model",
        tmp_path / "model",
        None,
        None,
    )


def test_an_adapter_is_used_as_one(hub: dict[str, Any], kdtune: Run, tmp_path: Path) -> None:
    hub["files"] = ["adapter_config.json", "adapter_model.safetensors"]
    _, out, _ = kdtune("download", "owner/adapter", "--output-dir", str(tmp_path / "adapter"))
    assert f"checkpointer.adapter_dir={tmp_path / 'adapter'}" in out


def test_default_patterns() -> None:
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/tokenizer.model",
        "onnx/model.safetensors",
        "logo.png",
    ]
    filtered = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=download.ALLOW, ignore_patterns=download.IGNORE
    )
    assert list(filtered) == files[:5]


def test_options(hub: dict[str, Any], kdtune: Run, tmp_path: Path) -> None:
    options = ["--revision", "v1", "--token", "t", "--allow-patterns", "*.json", "*.txt", "--ignore-patterns", "a*"]
    hub["files"] = ["config.json"]
    assert kdtune("download", "owner/model", "--output-dir", str(tmp_path), *options)[0] == 0
    assert (hub["revision"], hub["token"]) == ("v1", "t")
    assert (hub["allow_patterns"], hub["ignore_patterns"]) == (["*.json", "*.txt"], ["a*"])


def test_no_safetensors(hub: dict[str, Any], kdtune: Run, tmp_path: Path) -> None:
    hub["files"] = ["config.json"]
    status, _, err = kdtune("download", "owner/model", "--output-dir", str(tmp_path))
    assert status == 2
    assert "owner/model holds no *.safetensors" in err


def test_output_dir_is_required(kdtune: Run) -> None:
    status, _, err = kdtune("download", "owner/model")
    assert status == 2
    assert "--output-dir" in err


def refused(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    # The hub's errors carry a response of whichever http client its version uses.
    error = kind.__new__(kind)
    error.args = ("403 Forbidden",)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refused(errors.GatedRepoError), "owner/model is gated"),
        (refused(errors.RepositoryNotFoundError), "The hub knows no model owner/model"),
        (refused(errors.RevisionNotFoundError), "owner/model has no revision 'v9'"),
        (refused(errors.HfHubHTTPError), "The hub refused owner/model: 403 Forbidden"),
        (errors.LocalEntryNotFoundError("offline"), "The hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "The hub cannot be reached"),
        (errors.HFValidationError("Repo id must be ..."), "no repository's name"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
    ],
)
def test_refusals(error: Exception, words: str, hub: dict[str, Any], kdtune: Run, tmp_path: Path) -> None:
    hub["raises"] = error
    status, out, err = kdtune("download", "owner/model", "--revision", "v9", "--output-dir", str(tmp_path))
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
