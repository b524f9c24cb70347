"""Plans of one of several processes: against real ones, which meet over gloo, and against what is known of layouts."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import real_steps
from harness import most_allocated
from real_steps import KD, STUDENT, TEACHER
from slow import marked, wanted

from kdtune import distributed, planning
from kdtune.models import from_hf_config, parameter_shapes
from kdtune.planning import Plan

slow = partial(pytest.param, marks=pytest.mark.slow)
CHECKPOINTING = "enable_activation_checkpointing=true"
KEPT = "parallel.reshard_after_forward=false"
CASES = {
    "sharded": ["dtype=bf16", CHECKPOINTING],
    "accumulated": [KEPT, "gradient_accumulation_steps=2"],
    "tensor": ["parallel.tensor=2"],
    "context": ["parallel.context=2"],
    "pipeline": ["parallel.pipeline=2", "gradient_accumulation_steps=4", "dtype=bf16"],
}
SLOW = {"accumulated"}  # as those of the pipeline are


def settings(folder: Path, *overrides: str) -> Any:
    student, teacher = (
        real_steps.write_config(folder / role, config) for role, config in (("student", STUDENT), ("teacher", TEACHER))
    )
    return real_steps.settings(KD, student, teacher, *overrides)


def planned(folder: Path, *overrides: str, per_node: int, nodes: int = 1) -> Plan:
    recipe = real_steps.recipe(KD)
    cfg = settings(folder, *overrides)
    return planning.plan(
        cfg, recipe.build, recipe.forward_backward, recipe.check_settings, per_node=per_node, nodes=nodes
    )


def work(folder: Path, cases: Sequence[str]) -> dict[str, Any]:
    """What a process plans, what its second step takes and sends, and what the allocator records of a third."""
    found = {}
    for name in cases:
        overrides = CASES[name]
        cfg, recipe = settings(folder, *overrides), real_steps.recipe(KD)
        here = distributed.join(cfg.parallel, "cpu")
        plan = planning.plan(cfg, recipe.build, recipe.forward_backward, ranks=here)
        tracker = planning.Tracker()
        with tracker, tracker.following({}):
            built = recipe.build(cfg, here)
            real_steps.step(KD, cfg, built, here.share)
            tracker.restart()
            held = tracker.held(here.device)
            real_steps.step(KD, cfg, built, here.share)
        found[name] = {
            "planned": plan.device.total,
            "measured": tracker.peaks[here.device].total,
            "recorded": held + most_allocated(partial(real_steps.step, KD, cfg, built, here.share)),
            "sent": by_kind(tracker.sent),
        }
    return found


def by_kind(sent: Mapping[Any, float]) -> dict[str, float]:
    kinds: dict[str, float] = defaultdict(float)
    for (kind, *_), num_bytes in sent.items():
        kinds[kind] += num_bytes
    return dict(kinds)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """By case, of the first of two processes. All of them only if a slow test asks."""
    cases = wanted(CASES, SLOW, request)
    folder = tmp_path_factory.mktemp("models")
    real_steps.write_model(folder / "teacher", TEACHER)
    first: dict[str, Any] = ranks.run(2, work, folder, folder, cases)[0]
    return first


@pytest.mark.parametrize("name", marked(CASES, SLOW))
def test_a_process_holds_and_sends_what_is_planned(name: str, found: dict[str, Any], tmp_path: Path) -> None:
    plan, real = planned(tmp_path, *CASES[name], per_node=2), found[name]
    assert real["planned"] == plan.device.total, "whether the others are there or not"
    waiting = real["sent"].get("send", 0)  # at most, for the next stage of a pipeline to take it
    assert 0.999 * real["measured"] - waiting < plan.device.total < 1.001 * real["measured"]
    # gloo works on copies, which its threads let go of when they get to it.
    assert plan.device.total < real["recorded"] + 1000
    assert real["recorded"] < 1.1 * plan.device.total + waiting
    assert by_kind(plan.sent) == pytest.approx(real["sent"], rel=1e-3)


def num_bytes(config: dict[str, Any], *, layers: bool) -> int:
    """Of a model in bf16: of what is gathered layer by layer, or of what stays gathered."""
    kept = ("lm_head.weight", "model.norm.weight", *(["model.embed_tokens.weight"] * config["tie_word_embeddings"]))
    shapes = parameter_shapes(from_hf_config(config))
    return sum(2 * math.prod(shape) for name, shape in shapes.items() if (name not in kept) == layers)


@pytest.mark.parametrize("device", [slow("cpu"), "cuda"])
def test_parts_of_a_shared_model(device: str, tmp_path: Path) -> None:
    """What docs/distributed.md says of 4 processes, and of 16 on 4 nodes that hold a model each."""
    overrides = [f"device={device}", "dtype=bf16", "gradient_accumulation_steps=3"]
    plan = planned(tmp_path, *overrides, per_node=4)
    layers, rest = (num_bytes(STUDENT, layers=layers) for layers in (True, False))
    of_teacher = num_bytes(TEACHER, layers=True), num_bytes(TEACHER, layers=False)
    parts = plan.device.parts
    assert parts["student weights"] == pytest.approx((layers + rest) / 4, rel=1e-3)
    assert parts["teacher weights"] == pytest.approx(sum(of_teacher) / 4, rel=1e-3)
    assert parts["optimizer"] == pytest.approx(5 * (layers + rest) / 4, rel=1e-3)
    assert parts["gradients"] == pytest.approx(2 * (layers + rest), rel=1e-3), "they add up in float32, and are whole"
    assert parts["gathered weights"] == pytest.approx(rest + of_teacher[1], rel=1e-3), "both heads and last norms"
    assert plan.num_data_ranks == 4
    assert plan.layout["data_shard"] == 4

    expected = {
        planning.Message("all-gather", "weights", 4, 1): 3 / 4 * 3 * (2 * layers + rest + of_teacher[0]),
        planning.Message("reduce-scatter", "gradients", 4, 1): 3 / 4 * 2 * (layers + rest),
    }
    assert plan.sent == pytest.approx(expected, rel=1e-3)
    hybrid = planned(tmp_path, *overrides, "parallel.data_replicate=4", per_node=4, nodes=4)
    assert hybrid.device == plan.device
    expected[planning.Message("all-reduce", "gradients", 4, 4)] = 2 * 3 / 4 * 2 * (layers + rest) / 4
    assert hybrid.sent == pytest.approx(expected, rel=1e-3)
    kept = planned(tmp_path, *overrides, "parallel.reshard_after_forward=false", per_node=4)
    weights = planning.Message("all-gather", "weights", 4, 1)
    assert plan.sent[weights] - kept.sent[weights] == pytest.approx(3 / 4 * 3 * layers, rel=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor=2", "parallel.context=2", "dtype=fp32"],
        slow(["parallel.pipeline=2", "gradient_accumulation_steps=3"]),
        slow(["optimizer_in_bwd=true", "clip_grad_norm=null", "qat.weights=int8"]),
        slow(["lora.rank=4", "lora.use_dora=true", "checkpointer.random_weights=false"]),
    ],
)
def test_parts_in_host_memory(overrides: list[str], tmp_path: Path) -> None:
    """A step still finds all that it computes with on the GPU: tensors without data refuse to meet from two devices."""
    there, away = (
        planned(tmp_path, "device=cuda", "dtype=bf16", f"parallel.offload={offload}", *overrides, per_node=4)
        for offload in ("false", "true")
    )
    parts = ("student weights", "teacher weights", "adapters", "optimizer")
    moved = {part: there.device.parts[part] for part in parts if part in there.device.parts}
    assert {"student weights", "teacher weights", "optimizer"} <= moved.keys()
    stayed = {part: away.device.parts.get(part, 0) for part in moved}
    assert {part: away.host.parts[part] + stayed[part] for part in moved} == moved
    assert all(stayed[part] < moved[part] / 10 for part in moved), "nothing but the lengths that DoRA compares with"
    assert away.host.parts["gradients"] > 0
    assert away.device.total < there.device.total
    assert (away.flops, away.sent) == (there.flops, there.sent)


@pytest.mark.parametrize(
    ("overrides", "per_node", "message"),
    [
        ([], 1, "one process has no part.* Take teacher.offload=true and optimizer.offload=true, or start"),
        (["parallel.data_shard=1", "parallel.tensor=4"], 4, "once for each of them. Take parallel.data_shard"),
        (["optimizer.offload=true"], 4, "optimizer.offload does not go with parallel.offload=true"),
        (
            ["lora.base_quantization=int8", "teacher_parallel.offload=false"],
            4,
            "lora.base_quantization does not go with parallel.offload=true",
        ),
    ],
)
def test_refusals_of_offloading(overrides: list[str], per_node: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, "device=cuda", "parallel.offload=true", *overrides, per_node=per_node)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_work_of_a_split_model(device: str, tmp_path: Path) -> None:
    whole = planned(tmp_path, f"device={device}", "dtype=bf16", per_node=1)
    plan = planned(tmp_path, f"device={device}", "dtype=bf16", "parallel.tensor=2", per_node=4)
    assert plan.flops == pytest.approx({part: count / 2 for part, count in whole.flops.items()}, rel=0.01)
    assert plan.floor == whole.floor / 2
    assert plan.num_data_ranks == 2
    d, wider, tokens = STUDENT["hidden_size"], TEACHER["hidden_size"], 2 * 128
    num_layers, more_layers = STUDENT["num_hidden_layers"], TEACHER["num_hidden_layers"]
    # As the table of docs/distributed.md says: in a layer two each way, of the student again in the backward; before
    # the layers, after them, and that of the backward.
    gathered = 2 * tokens / 2 * (d * (2 * num_layers * 2 + 2) + wider * (2 * more_layers + 1))
    scattered = 2 * tokens / 2 * (d * (2 * num_layers * 2 + 1) + wider * (2 * more_layers + 1))
    assert plan.sent[planning.Message("all-gather", "activations", 2, 1)] == gathered
    assert plan.sent[planning.Message("reduce-scatter", "activations", 2, 1)] == scattered


def test_time_of_sending() -> None:
    gpu = planning.Accelerator("", 80, 3, 1000, 500, 60, link=200)
    far = planning.NETWORK
    messages = {
        planning.Message("all-gather", "weights", 8, 1): 200e9,
        planning.Message("all-reduce", "gradients", 2, 2): far * 1e9,
        planning.Message("all-gather", "weights", 16, 8): 2 * far * 1e9,
        planning.Message("all-gather", "weights", 64, 8): 200e9,
    }
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Plan) if field.name != "sent")
    times = [planning.sending(Plan(**nothing, sent={message: size}), gpu) for message, size in messages.items()]
    assert times == pytest.approx([1, 1, 1, 1]), "by its link; by its own way out; by two; by eight, which are more"


def test_budget_of_a_layout(tmp_path: Path) -> None:
    """Sharding over all processes comes before what changes the numbers."""
    recipe = real_steps.recipe(KD)
    overrides = ["device=cuda", "dtype=bf16", "parallel.data_replicate=4"]
    cfg, plan = settings(tmp_path, *overrides), planned(tmp_path, *overrides, per_node=4)

    def plan_with(changes: Any) -> Plan:
        changed = [f"{key}={value}" for change in changes for key, value in change.settings.items()]
        cfg = settings(tmp_path, *overrides, *changed)
        return planning.plan(cfg, recipe.build, recipe.forward_backward, recipe.check_settings, per_node=4)

    budget = 0.99 * plan.device.total / planning.USABLE / 2**30
    (change,), after = planning.changes_to_fit(cfg, plan, budget, plan_with)
    assert change.settings == {"parallel.data_replicate": "1", "parallel.data_shard": "null"}
    assert after.device.total < plan.device.total
