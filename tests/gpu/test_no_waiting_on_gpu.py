"""A step on a CUDA device during which torch itself refuses whatever waits for the device.

pytest -m gpu tests/gpu
"""

import pytest
import tiny_runs
import torch

from kdtune import data
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.config import load
from kdtune.distributed import Ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("packed", ["true", "false"])
@pytest.mark.parametrize("more", [[], ["enable_activation_checkpointing=true", "enable_activation_offloading=true"]])
def test_a_step_waits_for_nothing(dtype, packed, more, tiny):
    name = "knowledge_distillation"
    recipe = load_module(catalog.find_recipe(name))
    settings = ["device=cuda", f"dtype={dtype}", f"dataset.packed={packed}", "kd_loss.balance=true", *more]
    cfg = load(recipe.Config, None, tiny_runs.arguments(tiny, tiny, *settings, recipe=name)[2:])
    student, teacher, optimizer = recipe.build(cfg, Ranks(torch.device("cuda")))
    loader = recipe.load_data(cfg, recipe.load_tokenizer(cfg)).loader
    try:
        for step in range(4):
            micro_batches = loader.next_step()
            num_tokens = data.count_labels(micro_batches)
            if step == 1:  # the first one makes the optimizer's state and starts libraries
                torch.cuda.set_sync_debug_mode("error")
            recipe.forward_backward(cfg, student, teacher, micro_batches, num_tokens, 0.5)
            optimizer.clip_grad_norm(cfg.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_batch_arrives_whole():
    rows = [[(torch.arange(length), torch.arange(length) + 1) for length in (30, 70)] for _ in range(64)]
    for _ in range(20):
        batch = data.collate_packed(rows)
        moved = batch.to("cuda")
        expected = batch.to("cpu")
        for name in ("tokens", "labels", "positions", "scored"):
            assert torch.equal(getattr(moved, name).cpu(), getattr(expected, name))
        assert torch.equal(moved.documents.starts.cpu(), expected.documents.starts)
