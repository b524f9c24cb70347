"""The objective: cross-entropy on the labels blended with a divergence to the teacher, computed chunk by chunk."""

from kdtune.losses.chunked import IGNORE, Loss, distillation_loss

__all__ = ["IGNORE", "Loss", "distillation_loss"]
