"""Where a run computes and in which number format."""

import os
import platform
import shutil
from typing import Literal

import torch

Dtype = Literal["bf16", "fp32"]
MatmulPrecision = Literal["highest", "high", "medium"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve(device: str) -> torch.device:
    """The device named `device`, once it is known to be there.

    Raises:
        ValueError: no such kind of device, or this machine has none of it. Nothing falls back to the CPU by itself.
    """
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device={device} is not a device that torch {torch.__version__} knows: use cuda or cpu."
        ) from None
    if resolved.type == "cpu":
        return resolved
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != resolved.type:
        found = "no accelerator" if accelerator is None else f"only {accelerator.type}"
        raise ValueError(
            f"device={device}, but torch {torch.__version__} finds {found} on this machine. "
            "Train on the CPU with device=cpu, or install a torch build and driver for the device."
        )
    count = torch.accelerator.device_count()
    if (resolved.index or 0) >= count:
        raise ValueError(f"device={device}, but there are {count} such devices here, numbered from 0.")
    return resolved


def check_compiler(device: torch.device) -> None:
    """Find out whether torch.compile has what it needs.

    Raises:
        ValueError: it would write C++ for the CPU, and there is no compiler.
    """
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError(
            f"compile=true makes C++ code for the CPU, but there is no {' or '.join(compilers)} to compile it. "
            "Install one or name one in the environment variable CXX, or train with compile=false."
        )


def describe(device: torch.device) -> str:
    """A name a person recognises, such as the model of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
