"""Each process's part of the models in host memory (`parallel.offload`), the computation on CUDA devices.

pytest -m gpu tests/gpu
"""

import os

import pytest
import ranks
import torch
import torch.distributed as dist
from steps import Training, check_same, resume, train

from kdtune import distributed
from kdtune.distributed import ParallelConfig
from kdtune.dtensors import local

pytestmark = pytest.mark.gpu
DEVICE, BACKEND = "cuda", "cpu:gloo,cuda:nccl"
WAYS = {"there": ParallelConfig(), "away": ParallelConfig(offload=True)}


def meet(parallel):
    """Processes as training has them, also a single one, which a run would leave alone."""
    number = int(os.environ["RANK"])
    if DEVICE == "cuda":
        torch.cuda.set_device(number)
    if not dist.is_initialized():
        dist.init_process_group(BACKEND)
    return distributed.arrange(parallel, torch.device(DEVICE, number))


def places(models, parallel):
    """Where things lie after a step, and how many bytes of the device all of it takes then."""
    here = meet(parallel)
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    training = Training(models, parallel, ranks=here)
    training.step(1)
    training.student.reshard()
    parameters = [local(parameter) for parameter in training.student.parameters()]
    states = training.optimizer.state.values()
    moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    held = torch.cuda.memory_allocated() - before if DEVICE == "cuda" else 0
    return {
        "parameters": sorted({tensor.device.type for tensor in parameters}),
        "moments": sorted({tensor.device.type for tensor in moments}),
        "pinned": all(tensor.is_pinned() for tensor in parameters if tensor.numel()),
        "bytes": held,
        "model": sum(tensor.nbytes for tensor in parameters),
    }


def work(models, folder):
    found = {}
    for name, parallel in WAYS.items():
        found[f"places {name}"] = places(models, parallel)
        found[name] = train(models, parallel, folder / name, ranks=meet(parallel))
    for name, parallel in WAYS.items():
        found[f"from {name}"] = resume(
            models, parallel, folder / name / "kept", folder / "resumed", ranks=meet(parallel)
        )
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_steps_are_those_of_parts_on_the_gpu(size, oracle, tmp_path):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    oracle("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path / "student")
    oracle("llama", hidden_size=128, num_key_value_heads=1).save_pretrained(tmp_path / "teacher")
    found = ranks.run(size, work, tmp_path, tmp_path, tmp_path)[0]
    there, away = found["places there"], found["places away"]
    assert (there["parameters"], there["moments"]) == (["cuda"], ["cuda"])
    assert (away["parameters"], away["moments"], away["pinned"]) == (["cpu"], ["cpu"], True)
    assert there["bytes"] - away["bytes"] >= there["model"], "and the optimizer's state"
    check_same(found, tmp_path, "away", "there")
    for name in ("from there", "from away"):
        torch.testing.assert_close(found[name], found["there"][1:], rtol=1e-9, atol=0)
