"""A device is there or refused; nothing falls back."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from kdtune import devices


def test_cpu() -> None:
    assert devices.resolve("cpu") == torch.device("cpu")
    assert devices.describe(torch.device("cpu"))


def test_every_choice_of_dtype_is_one() -> None:
    assert set(devices.DTYPES) == set(get_args(devices.Dtype))
    assert devices.DTYPES["bf16"] is torch.bfloat16
    assert devices.DTYPES["fp32"] is torch.float32


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with the accelerator `.type` (None: none), `.count` times."""
    machine = SimpleNamespace(type=None, count=0)
    current = lambda: machine.type and torch.device(machine.type)  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: machine.count)
    return machine


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "meta"])
def test_no_accelerator(device: str, accelerators: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=f"device={device}, but torch .* finds no accelerator.*device=cpu"):
        devices.resolve(device)


def test_another_accelerator(accelerators: SimpleNamespace) -> None:
    accelerators.type = "mps"
    with pytest.raises(ValueError, match=r"device=cuda, but torch .* finds only mps"):
        devices.resolve("cuda")


def test_too_few(accelerators: SimpleNamespace) -> None:
    accelerators.type, accelerators.count = "cuda", 2
    assert devices.resolve("cuda") == torch.device("cuda")
    assert devices.resolve("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device=cuda:2, but there are 2 such devices here, numbered from 0"):
        devices.resolve("cuda:2")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_no_such_kind(device: str) -> None:
    with pytest.raises(ValueError, match=f"device={device} is not a device"):
        devices.resolve(device)
