"""What the numbers of a run are: their names in words, units, and which end is the good one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kdtune.reporting.runs import Run

NATS = "nats per token"


@dataclass(frozen=True)
class Quantity:
    """A number that is logged over the steps."""

    key: str  # in metrics.jsonl
    title: str
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    share: bool = False  # of 1, shown in percent
    level: str | None = None  # key of the teacher's own value
    phrase: str = ""  # the title inside a sentence
    column: str = ""  # and above a column


VALIDATION = (
    Quantity(
        "val_ce_loss",
        "Cross-entropy",
        NATS,
        "lower",
        level="val_teacher_ce_loss",
        phrase="validation cross-entropy",
        column="validation CE",
    ),
    Quantity("val_kd_loss", "KL to the teacher", NATS, "lower", phrase="KL to the teacher", column="KL to teacher"),
    Quantity(
        "val_agreement",
        "Top-1 agreement",
        "with the teacher",
        "higher",
        share=True,
        phrase="top-1 agreement with the teacher",
        column="agreement",
    ),
    Quantity("val_entropy", "Entropy of the predictions", NATS, level="val_teacher_entropy"),
)
TRAINING = (
    Quantity("loss", "Loss", "what a step minimises", "lower"),
    Quantity("ce_loss", "Cross-entropy", NATS, "lower"),
    Quantity("kd_loss", "Divergence to the teacher", "kd_loss", "lower"),
    Quantity("hidden_loss", "Distance of hidden states", "hidden_loss", "lower"),
)
MACHINE = (
    Quantity("lr", "Learning rate"),
    Quantity("grad_norm", "Gradient norm", "before clipping"),
    Quantity("tokens_per_second", "Throughput", "labelled tokens/s", "higher"),
    Quantity("peak_memory_gib", "Peak memory", "GiB"),
)
_SHOWN = {one.key for one in (*VALIDATION, *TRAINING, *MACHINE)} | {one.level for one in VALIDATION}


def others(runs: Iterable[Run]) -> list[Quantity]:
    """Whatever else was logged: parts of a blend, pairs of modules, ranks, numbers of a copied recipe."""
    keys = dict.fromkeys(key for run in runs for key in run.series)
    return [Quantity(key, key) for key in keys if key not in _SHOWN]


def logged(quantities: Iterable[Quantity], runs: Iterable[Run]) -> list[Quantity]:
    """Those that some run has a number of."""
    keys = {key for run in runs for key, series in run.series.items() if any(v == v for v in series.values())}
    return [one for one in quantities if one.key in keys]
