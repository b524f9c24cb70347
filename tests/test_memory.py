"""The estimate of memory against bytes that are counted: parameters, moments, saved activations, a step's peak."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdtune import losses, memory, models, optim
from kdtune.documents import Documents
from kdtune.models import Decoder, ModelConfig

CHUNK = 32
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "wide": {"intermediate_size": 1024},
    "all heads": {"num_kv_heads": 4},
    "q/k norm": {"qk_norm": True, "head_dim": 64},
    "biases": {"qkv_bias": True},
    "tied": {"tie_embeddings": True, "vocab_size": 2048},
    "untied": {"vocab_size": 2048},
    "deep": {"num_layers": 8},
}


def make_config(**changes: Any) -> ModelConfig:
    config = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_seq_len": 512,
        **changes,
    }
    return ModelConfig(windows=(None,) * config["num_layers"], **config)


def estimate(config: ModelConfig, teacher: ModelConfig | None = None, **changes: Any) -> memory.Estimate:
    settings = {
        "dtype": torch.float32,
        "optimizer": optim.OptimizerConfig(),
        "optimizer_in_bwd": False,
        "gradient_accumulation_steps": 1,
        "batch_size": 2,
        "seq_len": 128,
        "activation_checkpointing": False,
        "loss_chunk_size": CHUNK,
        "device": torch.device("cpu"),
        **changes,
    }
    return memory.estimate(config, teacher, **settings)


def saved_bytes(model: nn.Module, *inputs: Any, start: Any = None) -> int:
    """What autograd keeps of a forward, each storage once, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = (start or model)(*inputs)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_those_that_autograd_saves(variant: str, dtype: torch.dtype) -> None:
    config = make_config(**VARIANTS[variant])
    model = Decoder(config).to(dtype)
    tokens = torch.randint(0, config.vocab_size, (2, 128))
    counted = saved_bytes(model, tokens, start=model.hidden)
    assert estimate(config, dtype=dtype).activations == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_adds_nothing(variant: str, dtype: torch.dtype) -> None:
    config = make_config(**VARIANTS[variant])
    model = Decoder(config).to(dtype)
    tokens = torch.randint(0, config.vocab_size, (2, 128))
    documents = Documents.in_rows([[30, 30, 30, 30, 8]] * 2)
    counted = saved_bytes(model, tokens, None, documents, start=model.hidden)
    for device in ("cpu", "cuda") if dtype == torch.bfloat16 else ("cpu",):
        found = estimate(config, dtype=dtype, device=torch.device(device), packed=True)
        assert found.activations == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_activations_are_the_inputs_and_one_layer(variant: str, dtype: torch.dtype) -> None:
    config = make_config(**VARIANTS[variant])
    model = Decoder(config).to(dtype)
    x = torch.randn(2, 128, config.hidden_size, dtype=dtype, requires_grad=True)
    cos, sin = (part.to(dtype)[:, None] for part in model.model.rope(torch.arange(128)[None], None))
    layer = saved_bytes(model, x, cos, sin, None, None, start=model.model.layers[0])
    last = saved_bytes(model, x, start=model.model.norm)
    counted = config.num_layers * x.nbytes + layer + last
    assert estimate(config, dtype=dtype, activation_checkpointing=True).activations == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_gradients_and_moments_are_exact(variant: str, dtype: torch.dtype) -> None:
    config = make_config(**VARIANTS[variant])
    model = Decoder(config).to(dtype)
    optimizer = optim.build_optimizer(model, optim.OptimizerConfig())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    expected = estimate(config, make_config(hidden_size=256), dtype=dtype)
    assert expected.student == sum(parameter.nbytes for parameter in model.parameters())
    assert expected.gradients == sum(
        parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None
    )
    moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    assert expected.optimizer == sum(tensor.nbytes for tensor in moments)
    teacher = Decoder(make_config(hidden_size=256)).to(dtype)
    assert expected.teacher == sum(parameter.nbytes for parameter in teacher.parameters())
    assert estimate(config).teacher == 0


def test_gradients_that_are_sums_or_not_kept() -> None:
    config = make_config(vocab_size=2048)
    count = models.num_parameters(config)
    assert estimate(config, dtype=torch.bfloat16).gradients == 2 * count
    assert estimate(config, dtype=torch.bfloat16, gradient_accumulation_steps=2).gradients == 4 * count
    assert estimate(config, dtype=torch.bfloat16, optimizer_in_bwd=True).gradients == 2 * 2048 * config.hidden_size
    assert estimate(config, optimizer=optim.OptimizerConfig(offload=True)).optimizer == 0


def peak_of_step(model: Decoder, teacher: Decoder | None, dtype: torch.dtype) -> int:
    """Bytes that a training step holds at most beyond weights and moments, by the allocator's own record."""
    optimizer = optim.build_optimizer(model, optim.OptimizerConfig())
    tokens = torch.randint(0, 512, (2, 128))

    def step() -> None:
        with torch.no_grad():
            targets = None if teacher is None else losses.Targets(teacher.hidden(tokens), teacher.head)
        loss = losses.distillation_loss(
            model.hidden(tokens),
            model.head,
            tokens,
            tokens.numel(),
            targets,
            kd_weight=0.0 if teacher is None else 0.5,
            chunk_size=CHUNK,
        )
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("variant", ["grouped", "untied", "deep"])
def test_peak_of_a_step(variant: str, taught: bool, checkpointing: bool, dtype: torch.dtype) -> None:
    """An upper bound, since gradients grow while activations go; no more than about twice as much."""
    config = make_config(**VARIANTS[variant])
    teacher_config = make_config(vocab_size=config.vocab_size, num_layers=4, hidden_size=192) if taught else None
    model = Decoder(config).to(dtype)
    if checkpointing:
        models.enable_activation_checkpointing(model)
    teacher = None if teacher_config is None else Decoder(teacher_config).to(dtype)
    expected = estimate(config, teacher_config, dtype=dtype, activation_checkpointing=checkpointing)
    bound = expected.gradients + expected.activations + expected.loss
    peak = peak_of_step(model, teacher, dtype)
    assert peak <= 1.02 * bound
    assert bound <= 2.1 * peak


def test_total() -> None:
    assert memory.Estimate(student=1, gradients=2, optimizer=4, teacher=8, activations=16, loss=32).total == 63


def test_disk() -> None:
    config = make_config()
    bf16 = 2 * models.num_parameters(config)
    nearest = optim.OptimizerConfig(precision="nearest")
    assert memory.disk(config, torch.bfloat16, torch.float32, nearest, keeps_checkpoints=False) == 2 * bf16
    kept = bf16 + 2 * (bf16 + 2 * bf16)
    assert memory.disk(config, torch.bfloat16, torch.bfloat16, nearest, keeps_checkpoints=True) == kept
    kept = bf16 + 2 * (bf16 + 5 * bf16)
    assert memory.disk(config, torch.bfloat16, torch.bfloat16, optim.OptimizerConfig(), keeps_checkpoints=True) == kept


def test_disk_of_an_adapter() -> None:
    config = make_config()
    lora = models.LoraConfig(rank=2)
    adapter = 4 * sum(math.prod(shape) for shape in models.trained_shapes(config, lora).values())
    sizes = (torch.bfloat16, torch.bfloat16, optim.OptimizerConfig())
    assert memory.disk(config, *sizes, keeps_checkpoints=True, lora=lora) == adapter + 2 * 3 * adapter
    lora.save_merged = True
    merged = 2 * models.num_parameters(config)
    assert memory.disk(config, *sizes, keeps_checkpoints=False, lora=lora) == adapter + merged


def test_it_reads_well() -> None:
    text = str(memory.Estimate(student=2**31, gradients=0, optimizer=2**20, teacher=0, activations=1536, loss=3))
    assert text == "2.0 GiB (student 2.0 GiB, optimizer 1 MiB, activations 2 KiB, loss 3 B)"
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1610612736: "1.5 GiB", 5 * 2**40: "5120.0 GiB"}
    assert {count: memory.format_bytes(count) for count in sizes} == sizes
