"""The snapshot of the allocator, and segments that grow, on a CUDA device.

pytest -m gpu tests/gpu
"""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from kdtune.profiling import Profiler, ProfilerConfig

pytestmark = pytest.mark.gpu


def test_snapshot_and_kernels(tmp_path, capsys):
    cfg = ProfilerConfig(enabled=True, wait_steps=1, warmup_steps=1, active_steps=1, profile_memory=True)
    x = torch.randn(512, 512, device="cuda")
    with Profiler(cfg, tmp_path / "profile", torch.device("cuda"), done=0) as profiler:
        for _ in range(4):
            (x @ x).sum()
            profiler.step()
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        "steps_3_to_3.json.gz",
        "steps_3_to_3_memory.pickle",
    }
    with open(tmp_path / "profile" / "steps_3_to_3_memory.pickle", "rb") as file:
        snapshot = pickle.load(file)
    actions = {entry["action"] for trace in snapshot["device_traces"] for entry in trace}
    assert "alloc" in actions
    assert "gemm" in capsys.readouterr().out.lower(), "kernels are listed by what they took on the device"


def test_torch_reads_what_the_launcher_sets():
    code = (
        "from kdtune.cli.run import _choose_allocator; assert _choose_allocator(); import torch; "
        "torch.zeros(1, device='cuda'); "
        "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "True"
