"""The objective: cross-entropy on the labels blended with a divergence to the teacher, computed chunk by chunk."""

from kdtune.losses.chunked import IGNORE, Loss, block_rows, default_chunk_size, distillation_loss
from kdtune.losses.config import CELossConfig, KDLossConfig, build_divergence, check_targets
from kdtune.losses.divergences import (
    Divergence,
    DivergenceName,
    adaptive_kl,
    by_autograd,
    divergence,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from kdtune.losses.hidden import DISTANCES, HiddenLoss, WidthProjection, add_hidden
from kdtune.losses.logits import logits_of
from kdtune.losses.pairs import HiddenLossConfig, Pair, pairs_of
from kdtune.losses.targets import Convention, SampledTargets, SparseTargets, Targets, TopKTargets
from kdtune.losses.vocabulary import Vocabulary

__all__ = [
    "DISTANCES",
    "IGNORE",
    "CELossConfig",
    "Convention",
    "Divergence",
    "DivergenceName",
    "HiddenLoss",
    "HiddenLossConfig",
    "KDLossConfig",
    "Loss",
    "Pair",
    "SampledTargets",
    "SparseTargets",
    "Targets",
    "TopKTargets",
    "Vocabulary",
    "WidthProjection",
    "adaptive_kl",
    "add_hidden",
    "block_rows",
    "build_divergence",
    "by_autograd",
    "check_targets",
    "default_chunk_size",
    "distillation_loss",
    "divergence",
    "forward_kl",
    "jsd",
    "logits_of",
    "pairs_of",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
    "total_variation",
]
