"""Checkpoints of a model on a CUDA device that are written while training goes on.

pytest -m gpu tests/gpu
"""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdtune.checkpoint import Run
from kdtune.distributed import Ranks
from kdtune.optim import OptimizerConfig, build_optimizer

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


class Model(SimpleNamespace):
    """What is trained."""

    ranks = Ranks(DEVICE)

    def trained(self):
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def write(self, folder, trained, ranks):
        self.devices = {tensor.device.type for tensor in trained.values()}
        self.pinned = all(tensor.is_pinned() for tensor in trained.values())
        torch.save({name: tensor.cpu() for name, tensor in trained.items()}, folder / "weights.pt")


def make(tmp_path, size=1000, layers=3):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(layers))).to(DEVICE, torch.bfloat16)
    optimizer = build_optimizer(model, OptimizerConfig())
    trained = Model(model=model)
    return model, optimizer, trained, Run(tmp_path, None, trained, optimizer=optimizer)


def step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def state(folder):
    return torch.load(folder / "weights.pt"), torch.load(folder / "training_state.pt", map_location="cpu")["optimizer"]


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)


def test_what_is_written_is_what_was_there(tmp_path):
    """Through memory that the device writes by itself, without waiting, while it has work to do."""
    model, optimizer, trained, run = make(tmp_path)
    for run.step in (1, 2):
        step(model, optimizer)
        expected = state(run.save())
        assert trained.devices == {"cuda"}
        torch.cuda._sleep(200_000_000)  # copies wait behind it
        folder = run.save(in_background=True)
        step(model, optimizer)
        run.wait()
        assert (trained.devices, trained.pinned) == ({"cpu"}, True)
        assert_same(state(folder), expected)


def test_saving_does_not_wait_for_the_device(tmp_path):
    model, optimizer, _, run = make(tmp_path, size=8192, layers=4)  # 3 GB
    step(model, optimizer)
    run.save(in_background=True)
    run.wait()
    torch.cuda.synchronize()
    since = time.perf_counter()
    run.save(in_background=True)
    standing = time.perf_counter() - since
    copied = torch.cuda.Event()
    copied.record()
    copied.synchronize()
    on_device = time.perf_counter() - since
    run.wait()
    written = time.perf_counter() - since
    print(f"stands still {standing:.3f} s, copied after {on_device:.3f} s, written after {written:.3f} s")
    assert standing < written / 5
