"""The folder: what is written is read, by whomever and in whatever order, and nothing else is."""

from pathlib import Path

import numpy as np

from kdtune.teacher_cache import Card, StoreConfig, Teacher, TeacherCache, TopK, Writer

VOCAB_SIZE = 97


def make_card(**store: object) -> Card:
    cfg = StoreConfig(**{"top_k": 5, **store})  # type: ignore[arg-type]
    return Card(cfg, VOCAB_SIZE, Teacher("tiny", "0123", "fp32"), "4567")


def make_answers(example_id: int, num_tokens: int = 7) -> TopK:
    generator = np.random.default_rng(example_id)
    logits = generator.normal(0, 3, (num_tokens, VOCAB_SIZE))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = log_probs.argsort(1)[:, ::-1]
    ordered = np.take_along_axis(log_probs, ids, 1).astype(np.float32)
    log_rest = np.log(np.exp(ordered[:, 5:]).sum(1))
    entropy = -(np.exp(ordered) * ordered).sum(1)
    return TopK(ids[:, :5].astype(np.int32), ordered[:, :5], log_rest, entropy, ordered[:, 3])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with Writer(tmp_path, make_card(), shard_bytes=1000) as writer:
        for example_id in range(20):
            writer.add(example_id, make_answers(example_id))
    cache = TeacherCache(tmp_path)
    assert cache.ids.tolist() == list(range(20))
    assert cache.missing(np.array([30, 3, 31, 30])).tolist() == [0, 2]
    for example_id in (7, 0, 19):
        answers = make_answers(example_id)
        found = cache.read(example_id)
        assert isinstance(found, TopK)
        assert (found.top_ids == answers.top_ids).all()
        assert (np.sort(found.ids, 1) == np.sort(answers.ids, 1)).all()
