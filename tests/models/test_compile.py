"""Compiled layers: as few pieces of code as there are kinds of layers, whatever the batch, and the same results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from kdtune import generation, models
from kdtune.context_parallel import slice_rows
from kdtune.documents import Documents
from kdtune.models import Decoder, ModelConfig, RopeConfig

MODES = ["none", "selective", "full"]


def build(
    width: int = 16, windows: tuple[int | None, ...] = (None, None, None), mode: str = "none", head_dim: int = 8
) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=len(windows),
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        max_seq_len=64,
        windows=windows,
        rope=RopeConfig(),
    )
    model = Decoder(config)
    if mode != "none":
        models.enable_activation_checkpointing(model, mode)
    return model


@pytest.fixture(autouse=True)
def no_code_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs a graph as it is, and keeps it to be counted."""

    def __init__(self) -> None:
        self.made: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.made.append(graph)
        return graph.forward


def batch(rows: int, length: int, packed: bool) -> tuple[Tensor, Tensor, Documents | None]:
    """Tokens, positions and documents; packed rows have one, two or three of differing lengths, and padding."""
    tokens = torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(0))
    if not packed:
        return tokens, torch.arange(length).expand_as(tokens), None
    cuts = [[length // 3, length // 4, length - length // 3 - length // 4 - 1][: 1 + i % 3] for i in range(rows)]
    documents = Documents.in_rows(cuts, length)
    return tokens, documents.positions(), documents


SHAPES = [(2, 17), (3, 40), (5, 24), (4, 12), (2, 64), (7, 16)]


@pytest.mark.parametrize("packed", [False, True])
def test_one_graph_for_all_layers_and_batches(packed: bool) -> None:
    """With gradients and without; a window makes layers of another kind, another width those of another model."""
    windows = (None, 5, None) if packed else (None, None, None)
    student, teacher, graphs = build(windows=windows, mode="full"), build(32), Graphs()
    for model in (student, teacher):
        models.compile_layers(model, graphs)
    found = []
    for rows, length in SHAPES:
        with torch.no_grad():
            (student if packed else teacher).hidden(*batch(rows, length, packed))
        student.hidden(*batch(rows, length, packed)).square().mean().backward()
        found.append(len(graphs.made))
    assert found == [4 if packed else 2] * len(SHAPES)
    assert not torch._dynamo.utils.counters["graph_break"]
    # A single row is a shape of its own, and the only one.
    found = []
    for length in (9, 20, 33):
        with torch.no_grad():
            student.hidden(*batch(1, length, packed))
        found.append(len(graphs.made))
    assert len(set(found)) == 1


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_layers_that_several_processes_hold_are_one_piece(packed: bool, alone: dist.ProcessGroup) -> None:
    """Of sharded weights and sliced rows; a number that belongs to a sharded layer may change, for the compiler."""
    model, expected = build(), build()
    slice_rows(model, alone)
    for layer in model.model.layers:
        fully_shard(layer)
    graphs = Graphs()
    models.compile_layers(model, backend=graphs)
    for rows, length in SHAPES:
        hidden, other = (one.hidden(*batch(rows, length, packed)) for one in (model, expected))
        torch.testing.assert_close(hidden, other)
        gradients = torch.autograd.grad(hidden.square().sum(), model.model.embed_tokens.weight)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(other.square().sum(), expected.model.embed_tokens.weight)
        )
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(graphs.made) == 1


def test_a_cache_is_not_compiled_for() -> None:
    model, graphs = build(), Graphs()
    prompts = [[1, 2, 3], [4, 5]]

    def generate() -> list[list[int]]:
        return generation.generate(model, prompts, max_new_tokens=4)

    expected = generate()
    models.compile_layers(model, graphs)
    assert generate() == expected
    assert not graphs.made


def test_names_stay() -> None:
    plain, compiled = build(), build()
    models.compile_layers(compiled, Graphs())
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in plain.named_modules()]


def frozen(kind: models.Quantization, dtype: torch.dtype = torch.float32) -> Decoder:
    model = build(128, (None, None), head_dim=64).to(dtype).requires_grad_(False)  # sizes that nf4 takes
    for name in models.quantized_shapes(model.config):
        models.quantize_linear(model, name.removesuffix(".weight"), model.get_parameter(name), kind)
    return model


def with_adapters(
    kind: models.Quantization, dtype: torch.dtype = torch.float32, cfg: models.LoraConfig | None = None
) -> Decoder:
    model = frozen(kind, dtype)
    models.add_lora(model, cfg or models.LoraConfig(rank=2), seed=0)
    torch.nn.init.ones_(model.model.layers[0].mlp.down_proj.lora_B.weight)
    models.enable_activation_checkpointing(model, "selective")
    return model


def rounded(dtype: torch.dtype = torch.float32, cfg: models.QATConfig | None = None) -> Decoder:
    model = build(32, (None, None)).to(dtype)
    models.prepare_qat(model, cfg or models.QATConfig(activations="int8"))
    return model


def streamed(dtype: torch.dtype = torch.float32) -> Decoder:
    model = build().to(dtype).requires_grad_(False)
    models.stream_layers(model, torch.device("cpu"))
    return model


def results(model: Decoder) -> list[Tensor]:
    """Hidden states, and the gradients of what is trained."""
    model.zero_grad()
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    with torch.set_grad_enabled(is_trained), torch.inference_mode(not is_trained):
        hidden = model.hidden(*batch(2, 17, packed=False))
    if is_trained:
        # Not their squares, whose sum is the same for all that comes out of a norm.
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        pytest.param(lambda: frozen("int4"), 1, id="quantised teacher"),
        pytest.param(lambda: with_adapters("int8"), 2, id="adapters"),  # the first layer's input has no gradient
        pytest.param(rounded, 1, id="quantisation-aware"),
        pytest.param(streamed, 1, id="streamed teacher"),
    ],
)
def test_models_in_other_forms(make: Callable[[], Decoder], kinds: int) -> None:
    model, graphs = make(), Graphs()
    expected = results(model)
    models.compile_layers(model, graphs)
    for found, wanted in zip(results(model), expected, strict=True):
        assert torch.equal(found, wanted)
    assert len(graphs.made) == kinds
    assert not torch._dynamo.utils.counters["graph_break"]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm().clamp(min=1e-30))


FORMS: dict[str, Callable[[torch.dtype], Decoder]] = {
    **{f"{kind} teacher": functools.partial(frozen, kind) for kind in ("int8", "int8_dynamic", "fp8", "int4", "nf4")},
    "streamed teacher": streamed,
    "adapters": functools.partial(with_adapters, "int8"),
    "DoRA": functools.partial(with_adapters, "nf4", cfg=models.LoraConfig(rank=2, use_dora=True)),
    "rounded": functools.partial(rounded, cfg=models.QATConfig()),
    "rounded activations": rounded,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_code_for_models_in_other_forms(form: str, dtype: torch.dtype) -> None:
    """Activations on the edge between two integers may fall to either side: one is 1/127 of the largest."""
    model = FORMS[form](dtype)
    expected = results(model)
    models.compile_layers(model)
    rounds_activations = form in ("int8_dynamic teacher", "rounded activations")
    tolerance = 0.03 if rounds_activations else 1e-5 if dtype == torch.float32 else 0.02
    hidden, *gradients = results(model)
    assert relative_error(hidden, expected[0]) < tolerance
    # Layer by layer, rounding to bf16 adds up.
    tolerance = 0.1 if dtype == torch.bfloat16 else tolerance
    assert all(relative_error(*pair) < tolerance for pair in zip(gradients, expected[1:], strict=True))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_eager_layers(mode: str) -> None:
    plain, compiled = build(), build(mode=mode)
    models.compile_layers(compiled)
    for packed in (False, True):
        for rows, length in SHAPES[:3]:
            for model in (plain, compiled):
                model.zero_grad()
                model(*batch(rows, length, packed)).log_softmax(-1)[..., 0].mean().backward()
            for expected, found in zip(plain.parameters(), compiled.parameters(), strict=True):
                assert expected.grad is not None
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
