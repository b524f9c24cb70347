"""From what each example adds to the metrics of a set, and their standard errors.

A set has a few totals: its examples, tokens and bytes, sums over tokens, sums of values of examples, and calibration
bins. Every metric is a function of totals:

    ce, entropy, kl_from_teacher, top1_agreement, ...   sum over tokens / tokens
    perplexity                                          exp(ce)
    bits_per_byte                                       sum of ce / (log 2 * bytes)
    ece                                                 sum over bins |confidences - right ones| / tokens
    rouge_l, acc, ...                                   mean over examples

Tokens of one example are not independent, so errors are over examples, which are clusters of tokens: delete-one
jackknife (Efron and Stein 1981, "The Jackknife Estimate of Variance"; of clusters, Cameron and Miller 2015, "A
Practitioner's Guide to Cluster-Robust Inference", section VI.A). Of a mean over examples it is their standard deviation
over the square root of their number, exactly; of a ratio of sums nearly what the delta method gives.

Expected calibration error: predictions in bins of equal width of their top-1 confidence, the mean of |accuracy -
confidence| over bins, weighted by tokens (Guo et al. 2017, "On Calibration of Modern Neural Networks",
arXiv:1706.04599, equation 3; 15 bins there, too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdtune.evaluation.results import Example, Metric, Result

NUM_BINS = 15


@dataclass(frozen=True)
class Definition:
    """What a metric is, in words and for a table."""

    meaning: str
    unit: str
    better: Literal["lower", "higher"] | None


# In the order of tables. p is the teacher's distribution, q the student's, both over the tokens that both models know.
DEFINITIONS = {
    "ce": Definition("cross-entropy of the text", "nats/token", "lower"),
    "perplexity": Definition("exp(ce)", "", "lower"),
    "bits_per_byte": Definition("cross-entropy by the bytes of the scored text", "bits/byte", "lower"),
    "accuracy": Definition("the most likely token is that of the text", "share", "higher"),
    "entropy": Definition("of the predicted distribution", "nats/token", None),
    "ece": Definition("expected calibration error of the most likely token", "share", "lower"),
    "kl_from_teacher": Definition("KL(p || q), the forward KL", "nats/token", "lower"),
    "kl_to_teacher": Definition("KL(q || p), the reverse KL", "nats/token", "lower"),
    "top1_agreement": Definition("teacher and student find the same token most likely", "share", "higher"),
    "top5_agreement": Definition("the teacher's most likely token is among the student's five", "share", "higher"),
    "teacher_ce": Definition("cross-entropy of the text under the teacher", "nats/token", None),
    "teacher_entropy": Definition("of the teacher's distribution", "nats/token", None),
    "teacher_accuracy": Definition("the teacher's most likely token is that of the text", "share", None),
    "rouge_l": Definition("F-measure of the longest common subsequence with the reference", "share", "higher"),
    "response_tokens": Definition("length of a response", "tokens", None),
    "ended": Definition("the response ended by itself, and was not cut", "share", None),
}


class Additions:
    """What examples add to the totals of a set, [n, c]: one column for each total.

    Args:
        examples: of one task, each with the same names; at least one.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        first = examples[0]
        self.sums, self.values = [*first.sums], [*first.values]
        self._has_bytes = any(one.num_bytes for one in examples)
        self._has_bins = bool(first.calibration)
        self.columns = np.array(
            [
                [1, one.num_tokens, one.num_bytes]
                + [one.sums[name] for name in self.sums]
                + [one.values[name] for name in self.values]
                + [number for numbers in one.calibration for number in numbers]
                for one in examples
            ],
            dtype=float,
        )

    def metrics(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics of sets, [...], from their totals, [..., c], such as sums of `columns`, or of some of them."""
        examples, tokens, num_bytes, *sums = np.moveaxis(totals, -1, 0)[: 3 + len(self.sums)]
        found: dict[str, np.ndarray] = {}
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            for name, value in zip(self.sums, sums, strict=True):
                found[name] = value / tokens
            if "ce" in found:
                found["perplexity"] = np.exp(found["ce"])
                if self._has_bytes:
                    found["bits_per_byte"] = found["ce"] * tokens / (math.log(2) * num_bytes)
            start = 3 + len(self.sums)
            for i, name in enumerate(self.values, start=start):
                found[name] = totals[..., i] / examples
            if self._has_bins:
                bins = totals[..., start + len(self.values) :]
                bins = bins.reshape(*bins.shape[:-1], -1, 3)  # tokens, confidences, right ones
                found["ece"] = np.abs(bins[..., 1] - bins[..., 2]).sum(-1) / tokens
        known = [name for name in DEFINITIONS if name in found]
        return {name: found[name] for name in [*known, *(name for name in found if name not in DEFINITIONS)]}

    def estimate(self) -> dict[str, tuple[float, float | None]]:
        """Each metric of the whole set with its standard error; None if there is one example."""
        totals = self.columns.sum(0)
        values, n = self.metrics(totals), len(self.columns)
        if n == 1:
            return {name: (float(value), None) for name, value in values.items()}
        with np.errstate(invalid="ignore"):
            left_out = self.metrics(totals - self.columns)  # [n]
        return {
            name: (float(value), math.sqrt((n - 1) / n * ((left_out[name] - left_out[name].mean()) ** 2).sum()))
            for name, value in values.items()
        }


def result(
    task: str, examples: Sequence[Example], subset: str | None = None, others: Mapping[str, Definition] | None = None
) -> Result:
    """The metrics of examples of a task.

    Args:
        task: which.
        examples: at least one.
        subset: which part of the task's they are; None: all.
        others: of metrics that are not in `DEFINITIONS`.
    """
    known = {**DEFINITIONS, **(others or {})}
    metrics = {
        name: Metric(value, stderr, known[name].unit, known[name].better)
        for name, (value, stderr) in Additions(examples).estimate().items()
    }
    return Result(task, subset, len(examples), sum(one.num_tokens for one in examples), metrics)


def results(task: str, examples: Sequence[Example], others: Mapping[str, Definition] | None = None) -> list[Result]:
    """Those of all examples of a task, and if they are of several subsets of each, in their order."""
    subsets = dict.fromkeys(one.subset for one in examples)
    found = [result(task, examples, None, others)]
    for subset in subsets if len(subsets) > 1 else ():
        found.append(result(task, [one for one in examples if one.subset == subset], subset, others))
    return found
