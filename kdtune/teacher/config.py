"""Settings of the teacher: how a live one is held, or where its answers are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdtune import devices
from kdtune.config import setting
from kdtune.models import Quantization


@dataclass
class TeacherConfig:
    """Where the teacher's answers come from; how a live one is held does not change the student."""

    cache_dir: str | None = setting(None, path=True)  # its answers, by cache_teacher_logits; null: a model is asked
    dtype: devices.Dtype | None = None  # of its weights and activations; null: as the student's
    device: str | None = setting(None)  # where it computes, such as cuda:1 or cpu; null: beside the student
    quantization: Quantization | None = None  # store its layers' weights in few bits; null: as they are
    compare_quantization: bool = False  # before training, print how far quantisation moved its predictions
    offload: bool = False  # its layers stay in host memory, and come to the device one ahead of the computation

    def place(self, device: torch.device) -> torch.device:
        """Where it computes if the student is on `device`; in a plan, that is `meta` for a GPU."""
        if self.device is None:
            return device
        if device.type == "meta":
            return torch.device("cpu") if torch.device(self.device).type == "cpu" else device
        return devices.resolve(self.device, "teacher.device")
