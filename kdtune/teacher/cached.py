"""A teacher that was asked before: what it said is read from a folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdtune import devices
from kdtune.data import Batch, Loader
from kdtune.losses import Convention, SampledTargets, Targets, TopKTargets
from kdtune.teacher_cache import Answers, Hidden, Samples, TeacherCache, concatenate, take


class CachedTeacher:
    """The answers of a model to examples, whatever their order, packing and batches are now.

    While a step is computed, a thread reads the answers of the next one.
    """

    model = None

    def __init__(
        self,
        cache: TeacherCache,
        *,
        device: torch.device,
        convention: Convention = "bucket",
        head: nn.Linear | None = None,
    ):
        """Take a cache that is open.

        Args:
            cache: it may hold more than is asked for.
            device: where the loss wants the answers.
            convention: how the likeliest tokens are compared, if they are what is there.
            head: the teacher's, on `device`, if hidden states are what is there.
        """
        self.cache = cache
        self.head = head
        self.device = device
        self.convention = convention
        self._loader: Loader | None = None
        self._place: tuple[int, int] | None = None
        self._thread = ThreadPoolExecutor(1, "reading the teacher's answers")
        self._coming: Future[dict[int, Answers]] | None = None
        self._here: dict[int, Answers] = {}  # of the present step

    def compile(self) -> None:
        """Nothing: there is no layer."""

    def follow(self, loader: object) -> None:
        """Read ahead what `loader` is going to deal out; of a stream that is not known."""
        self._loader = loader if isinstance(loader, Loader) else None

    def __call__(self, batch: Batch, wanted: Collection[str] = ()) -> Targets | TopKTargets | SampledTargets:
        """What was said at each scored position, on the student's device.

        Args:
            batch: on the host.
            wanted: modules whose outputs are asked for as well: none but `model.norm`, if that is what is there.

        Raises:
            ValueError: an example that was never asked about, or an answer that is damaged.
        """
        self._read_ahead()
        keys = batch.keys()
        starts = keys.starts()
        ids = keys.examples[starts].tolist()
        answers = [self._here[id] if id in self._here else self._read(id) for id in ids]
        found = concatenate(answers) if answers else take(self._read(int(self.cache.ids[0])), slice(0))
        first = np.cumsum([0, *map(len, answers)])[:-1]
        counts = np.diff([*starts, len(keys.places)])
        targets = self._targets(found, keys.places + np.repeat(first, counts))
        if wanted:
            assert isinstance(targets, Targets)
            assert set(wanted) == {"model.norm"}
            return replace(targets, captured={"model.norm": targets.hidden})
        return targets

    def _read_ahead(self) -> None:
        if self._loader is None or self._loader.place == self._place:
            return
        self._place = self._loader.place
        self._here = {} if self._coming is None else self._coming.result()
        self._coming = self._thread.submit(self._read_step, self._loader.copy())

    def _read_step(self, loader: Loader) -> dict[int, Answers]:
        ids: Iterable[int] = {id for batch in loader.next_step() for id in batch.keys().examples.tolist()}
        return {id: self._read(id) for id in ids}

    def _read(self, id: int) -> Answers:
        try:
            return self.cache.read(id)
        except KeyError:
            raise ValueError(
                f"teacher.cache_dir={self.cache.folder} has no answer for an example that is trained on. Run "
                "cache_teacher_logits on these rows, with the same tokenizer and max_seq_len."
            ) from None

    def _targets(self, found: Answers, rows: np.ndarray) -> Targets | TopKTargets | SampledTargets:
        def send(values: np.ndarray) -> Tensor:
            return devices.send(torch.from_numpy(values[rows]), self.device)

        if isinstance(found, Hidden):
            assert self.head is not None
            hidden = send(found.hidden)
            return Targets(hidden.view(torch.bfloat16) if found.dtype == "bf16" else hidden, self.head)
        known: dict[str, Any] = {
            "entropy": send(found.entropy),
            "label_log_probs": send(found.label_log_probs),
            "top_ids": send(found.top_ids),
            "vocab_size": self.cache.card.vocab_size,
        }
        ids = send(found.ids)
        if isinstance(found, Samples):
            return SampledTargets(ids, send(found.weights), **known)
        return TopKTargets(ids, send(found.log_probs), send(found.log_rest), convention=self.convention, **known)
