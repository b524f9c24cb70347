"""AdamW in several precisions, and the learning rate of its steps.

`config` has the settings, `adamw` the steps, `rounding` what becomes of bf16 weights in them and `moments` what is kept
from one to the next. What each choice costs is in docs/optimizers.md.
"""

from kdtune.optim.adamw import AdamW
from kdtune.optim.config import (
    OptimizerConfig,
    accumulate_in_float32,
    build_optimizer,
    bytes_per_weight,
    check_optimizer,
)
from kdtune.optim.schedule import LRSchedulerConfig, lr_schedule, set_lr

__all__ = [
    "AdamW",
    "LRSchedulerConfig",
    "OptimizerConfig",
    "accumulate_in_float32",
    "build_optimizer",
    "bytes_per_weight",
    "check_optimizer",
    "lr_schedule",
    "set_lr",
]
