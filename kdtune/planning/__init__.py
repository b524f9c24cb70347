"""What a run will take, before a byte of it is loaded: its own step, run on tensors without data."""

from kdtune.planning.accelerators import ACCELERATORS, NETWORK, SIZES, USABLE, Accelerator, fits, seconds, sending
from kdtune.planning.budget import Change, changes_to_fit
from kdtune.planning.plan import Message, Plan, describe, plan, shown
from kdtune.planning.tracker import Peak, Tracker

__all__ = [
    "ACCELERATORS",
    "NETWORK",
    "SIZES",
    "USABLE",
    "Accelerator",
    "Change",
    "Message",
    "Peak",
    "Plan",
    "Tracker",
    "changes_to_fit",
    "describe",
    "fits",
    "plan",
    "seconds",
    "sending",
    "shown",
]
