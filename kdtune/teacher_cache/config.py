"""The settings of what is kept of a teacher."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from kdtune.config import setting

Kind = Literal["top_k", "samples", "hidden"]
Bits = Literal[8, 16, 32]
HiddenDtype = Literal["bf16", "fp32"]


@dataclass
class StoreConfig:
    """What is kept of the teacher for each labelled token."""

    kind: Kind = "samples"  # random draws; the likeliest tokens; or the final hidden states, with the head beside them
    top_k: int = setting(64, gt=0)  # top_k: how many of the likeliest tokens are kept at most
    top_p: float | None = setting(None, gt=0, lt=1)  # top_k: as many as reach this probability together; null: top_k
    num_samples: int = setting(200, gt=0, le=65_535)  # samples: draws for each token, with replacement
    sampling_power: float = setting(1.0, gt=0)  # samples: draw from p^this; below 1 unlikely tokens come more often
    bits: Bits = 8  # of a stored log-probability; 32: exact
    hidden_dtype: HiddenDtype = "bf16"  # hidden: of a stored hidden state


_ONLY_OF = {
    "top_k": ("top_k",),
    "top_p": ("top_k",),
    "num_samples": ("samples",),
    "sampling_power": ("samples",),
    "bits": ("top_k", "samples"),
    "hidden_dtype": ("hidden",),
}


def settings_of_kind(cfg: StoreConfig) -> dict[str, Any]:
    """What tells its answers from others: the settings that its kind has, without those that are null.

    A later version's new settings, of other kinds or null by default, leave it as it is.
    """
    settings = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    return {
        name: value
        for name, value in settings.items()
        if value is not None and cfg.kind in _ONLY_OF.get(name, (cfg.kind,))
    }


def check_store(cfg: StoreConfig, vocab_size: int | None = None) -> None:
    """Refuse settings that would change nothing, or ask for more than there is.

    Args:
        cfg: the settings.
        vocab_size: of the teacher; None: not known yet.

    Raises:
        ValueError: says which, and what to do.
    """
    for field in fields(cfg):
        kinds = _ONLY_OF.get(field.name, (cfg.kind,))
        value = getattr(cfg, field.name)
        if cfg.kind not in kinds and value != field.default:
            raise ValueError(
                f"store.{field.name}={value} is about store.kind={' or '.join(kinds)}, and this is "
                f"store.kind={cfg.kind}, of which it changes nothing. Leave it out, or choose that kind."
            )
    if vocab_size is not None and cfg.kind == "top_k" and cfg.top_k > vocab_size:
        raise ValueError(
            f"store.top_k={cfg.top_k:,} asks for more tokens than the teacher's vocabulary has, {vocab_size:,}. "
            f"Set store.top_k={vocab_size} to keep all of them, or fewer."
        )
