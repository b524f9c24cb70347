"""Smaller models out of bigger ones: what in a model counts least on a text, and the same family without it.

`Statistics` watches a model read, and `choose_layers` and `choose_width` say by its scores what stays; `prune` builds
the smaller model of the weights that are left, and `narrow` its `config.json`.
"""

from kdtune.pruning.config import DepthConfig, WidthConfig, block_size, check_depth, narrow
from kdtune.pruning.cut import Kept, prune
from kdtune.pruning.importance import Statistics, choose_layers, choose_width, read_tokens, without_layers

__all__ = [
    "DepthConfig",
    "Kept",
    "Statistics",
    "WidthConfig",
    "block_size",
    "check_depth",
    "choose_layers",
    "choose_width",
    "narrow",
    "prune",
    "read_tokens",
    "without_layers",
]
