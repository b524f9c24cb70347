"""Where a run computes and in which number format."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Dtype = Literal["bf16", "fp32"]
MatmulPrecision = Literal["highest", "high", "medium"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve(device: str, setting: str = "device") -> torch.device:
    """The device named `device`, once it is known to be there; `setting` is what names it.

    Raises:
        ValueError: no such kind of device, or this machine has none of it. Nothing falls back to the CPU by itself.
    """
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"{setting}={device} is not a device that torch {torch.__version__} knows: use cuda or cpu."
        ) from None
    if resolved.type == "cpu":
        return resolved
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != resolved.type:
        found = "no accelerator" if accelerator is None else f"only {accelerator.type}"
        raise ValueError(
            f"{setting}={device}, but torch {torch.__version__} finds {found} on this machine. "
            f"Take the CPU with {setting}=cpu, or install a torch build and driver for the device."
        )
    count = torch.accelerator.device_count()
    if (resolved.index or 0) >= count:
        raise ValueError(f"{setting}={device}, but there are {count} such devices here, numbered from 0.")
    return resolved


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; if it comes from the host, no one waits for the copy."""
    target = torch.device(device)
    if tensor.is_cpu and target.type not in ("cpu", "meta"):
        tensor = tensor.pin_memory()  # which the device reads by itself
    return tensor.to(target, non_blocking=target.type != "cpu")


def for_plan(device: str) -> torch.device:
    """The device of a plan for `device`, which this machine need not have: the CPU, or `meta` for any other."""
    return torch.device("cpu" if torch.device(device).type == "cpu" else "meta")


def check_compiler(device: torch.device) -> None:
    """Find out whether torch.compile has what it needs.

    Raises:
        ValueError: there is no compiler for the C++ that it writes on the CPU, or no triton on a GPU.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compile=true needs the package triton on a GPU. Install it, or train with compile=false.")
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["clang++" if sys.platform == "darwin" else "g++"])[0]
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"compile=true makes C++ code for the CPU, but there is no {compiler} to compile it. Install it or name a "
            "compiler in the environment variable CXX, or train with compile=false."
        )


def memory(device: torch.device) -> int:
    """Bytes that the device has, whoever uses them now."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.accelerator.get_memory_info(device)[1]


def free_host_memory() -> int:
    """Bytes of the host that a process can get without pushing out another's."""
    known = Path("/proc/meminfo")
    if known.exists() and (found := re.search(r"^MemAvailable:\s+(\d+) kB", known.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return memory(torch.device("cpu"))


def describe(device: torch.device) -> str:
    """A name a person recognises, such as the model of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
