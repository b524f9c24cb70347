"""What a run will take, before a byte of it is loaded: its own step, run on tensors without data."""

from kdtune.planning.accelerators import ACCELERATORS, SIZES, USABLE, Accelerator, fits, seconds
from kdtune.planning.budget import Change, changes_to_fit
from kdtune.planning.plan import Plan, describe, plan, shown
from kdtune.planning.tracker import Peak, Tracker

__all__ = [
    "ACCELERATORS",
    "SIZES",
    "USABLE",
    "Accelerator",
    "Change",
    "Peak",
    "Plan",
    "Tracker",
    "changes_to_fit",
    "describe",
    "fits",
    "plan",
    "seconds",
    "shown",
]
