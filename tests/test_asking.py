"""What is kept of a teacher's distributions, compared with them in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdtune import checkpoint, data, tokenizers
from kdtune.teacher import LiveTeacher, ask
from kdtune.teacher_cache import Samples, StoreConfig, TopK


@pytest.mark.parametrize("sharpness", [1, 8, 40])
def test_what_is_kept_is_that_of_the_whole_distribution(sharpness: float, tiny: Path) -> None:
    """Also where all but a few tokens have no probability to speak of."""
    model = checkpoint.load_model(tiny / "teacher", dtype=torch.float32, device="cpu")
    teacher = LiveTeacher(model)
    teacher.head = torch.nn.Linear(*model.head.weight.T.shape, bias=False)
    teacher.head.weight = torch.nn.Parameter(model.head.weight * sharpness, requires_grad=False)
    examples = data.load(
        data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion"), tokenizers.load(tiny / "student"), 64
    )
    batch = data.collate([examples[i] for i in range(4)])
    scored = batch.labels != data.IGNORE
    log_p = (teacher(batch).hidden[scored].double() @ teacher.head.weight.double().T).log_softmax(-1)  # [t, v]
    top, ids = log_p.topk(5)
    expected = {
        "log_probs": top,
        "log_rest": log_p.scatter(1, ids, -torch.inf).logsumexp(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "label_log_probs": log_p.gather(1, batch.labels[scored][:, None])[:, 0],
    }
    found = [answers for _, answers in ask(teacher, batch, StoreConfig("top_k", top_k=5), chunk_size=7)]
    for name, values in expected.items():
        kept = np.concatenate([getattr(answers, name) for answers in found])
        np.testing.assert_allclose(kept, values, 1e-4, 2e-5, err_msg=name)
    assert all(isinstance(answers, TopK) for answers in found)

    draws = [answers for _, answers in ask(teacher, batch, StoreConfig("samples", num_samples=12, sampling_power=0.7))]
    p = log_p.exp().numpy()
    proposal = (0.7 * log_p).log_softmax(-1).exp().numpy()
    rows = np.arange(len(p))[:, None]
    start = 0
    for answers in draws:
        assert isinstance(answers, Samples)
        here = rows[start : start + len(answers)]
        start += len(answers)
        drawn = answers.counts > 0
        ratio = np.log(p[here, answers.ids] / proposal[here, answers.ids])
        np.testing.assert_allclose(answers.log_ratios[drawn], ratio[drawn], 1e-4, 2e-5)
