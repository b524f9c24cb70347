"""Adapters against the weights that they stand for, and what they cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdtune import losses, models
from kdtune.checkpoint import load_model
from kdtune.models import Decoder, LoraConfig, ModelConfig, trained_parameters

TOKENS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
FAMILIES = ["llama-biases", "qwen2"]  # with biases everywhere, and with one weight for embedding and head
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "alpha": 3},
    "dora": {"use_dora": True},
    "embedding and head": {"target_modules": ["all-linear", "embed_tokens", "lm_head"]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
}
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=64,
    windows=(None, None),
)


def tiny(seed: int = 0, **changes: Any) -> Decoder:
    """A small decoder with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(dataclasses.replace(CONFIG, **changes))


def adapted(model: Decoder, amount: float = 0.05, **settings: Any) -> Decoder:
    """With adapters that do something."""
    models.add_lora(model, LoraConfig(**{"rank": 4, **settings}), seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in trained_parameters(model).values():
        parameter.data += amount * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


# What they compute.


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing(
    family: str, kind: str, dtype: torch.dtype, hf_folder: Callable[..., Path]
) -> None:
    model = load_model(hf_folder(family), dtype=dtype, device="cpu")
    expected = model(TOKENS)
    models.add_lora(model, LoraConfig(rank=4, dropout=0.5, **KINDS[kind]), seed=0)
    assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_changed_weights(
    family: str, kind: str, hf_folder: Callable[..., Path]
) -> None:
    """Against a model without adapters, whose weights are made of A, B and m by their definition, in float64."""
    folder = hf_folder(family)
    model = adapted(load_model(folder, dtype=torch.float64, device="cpu"), **KINDS[kind])
    plain = load_model(folder, dtype=torch.float64, device="cpu")
    trained = trained_parameters(model)
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in trained.items()}
    scale = LoraConfig(rank=4, **KINDS[kind]).scale

    def weight(name: str) -> Tensor:
        module = name.removesuffix(".weight").replace("lm_head", "model.embed_tokens" if tied else "lm_head")
        if f"{module}.lora_A.weight" not in copies:
            return copies.get(name, dict(plain.named_parameters())[name].detach())
        changed = dict(plain.named_parameters(remove_duplicate=False))[name].detach() + scale * (
            copies[f"{module}.lora_B.weight"] @ copies[f"{module}.lora_A.weight"]
        )
        if kind != "dora":
            return changed
        # The length is a constant for the backward (DoRA, section 4.3).
        return copies[f"{module}.lora_magnitude_vector"][:, None] * changed / changed.detach().norm(dim=1, keepdim=True)

    tied = plain.config.tie_embeddings
    weights = {name: weight(name) for name, _ in plain.named_parameters()}
    expected = functional_call(plain, weights, (TOKENS,), tie_weights=True)
    found = model(TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    for logits in (found, expected):
        logits.log_softmax(-1)[..., 3].mean().backward()
    for name, parameter in trained.items():
        assert copies[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, copies[name].grad, atol=1e-12, rtol=1e-8)
    for name, parameter in model.named_parameters():
        assert name in trained or parameter.grad is None


def test_rows_of_zeros_stay_zeros() -> None:
    """Their length of 0 divides nothing."""
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    models.add_lora(model, LoraConfig(rank=4, use_dora=True), seed=0)
    layer, x = model.model.layers[0].mlp.up_proj, torch.ones(1, 64)
    layer(x).sum().backward()
    assert layer(x)[0, 3] == 0
    assert not models.merged(model, "model.layers.0.mlp.up_proj.weight")[3].any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["plain", "dora", "embedding and head"])
def test_the_objective_sees_the_adapter_of_the_head(kind: str) -> None:
    """The loss makes logits by itself, of what `factors` gives it."""
    settings = KINDS[kind] | ({} if kind == "dora" else {"target_modules": ["lm_head", "q_proj"]})
    model = adapted(tiny(), **settings)
    tokens = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(0))
    model.double()
    chunked = losses.distillation_loss(model.hidden(tokens), model.head, tokens, tokens.numel(), chunk_size=4).total
    chunked.backward()
    found = {name: parameter.grad.clone() for name, parameter in trained_parameters(model).items()}
    model.zero_grad()
    whole = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    whole.backward()
    torch.testing.assert_close(chunked, whole)
    for name, parameter in trained_parameters(model).items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-12, rtol=1e-7)


# What they cost.


class Watch(TorchDispatchMode):
    """What is multiplied, and the shapes of all that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.dtype, ...]] = []
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function._overloadname in ("default", "out") and function._opname in ("mm", "addmm", "bmm"):
            self.products.append(tuple(x.dtype for x in args if isinstance(x, Tensor)))
        storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in storages:  # no view
            self.made.add(tuple(out.shape))
        return out


def objective_backward(model: Decoder, dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    labels = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    losses.distillation_loss(hidden, model.head, labels, 32).total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_costs_no_gradient_of_its_weight(dtype: torch.dtype) -> None:
    def flops_and_shapes(model: Decoder) -> tuple[int, set[tuple[int, ...]]]:
        with FlopCounterMode(display=False) as counter, Watch() as watch:
            objective_backward(model.to(dtype), dtype)
        return counter.get_total_flops(), watch.made

    product = 2 * 32 * 64 * 512
    flops, made = flops_and_shapes(tiny())
    assert flops == 3 * product
    assert (512, 64) in made
    frozen = tiny()
    models.add_lora(frozen, LoraConfig(rank=4), seed=0)
    flops, made = flops_and_shapes(frozen)
    assert flops == 2 * product
    assert dtype == torch.bfloat16 or (512, 64) not in made, "bf16 is unpacked for the product"
    with_adapter = tiny()
    models.add_lora(with_adapter, LoraConfig(rank=4, target_modules=["lm_head"]), seed=0)
    flops, made = flops_and_shapes(with_adapter)
    assert flops == 2 * product + 3 * 2 * 32 * 4 * (512 + 64), "and three products each with A and with B"
    assert dtype == torch.bfloat16 or (512, 64) not in made


@pytest.mark.parametrize("kind", ["plain", "dora", "embedding and head"])
def test_nothing_of_a_weight_s_size_is_made(kind: str) -> None:
    """Neither gradients of the frozen weights, nor a product of A and B."""
    model = adapted(tiny(), **KINDS[kind])
    tokens = torch.randint(512, (1, 10), generator=torch.Generator().manual_seed(0))
    with Watch() as watch:
        losses.distillation_loss(model.hidden(tokens), model.head, tokens, 10).total.backward()
    shapes = {shape for shape in models.parameter_shapes(model.config).values() if len(shape) == 2}
    assert (10, 64) in watch.made
    assert not shapes & watch.made


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"dropout": 0.1}])
def test_a_layer_with_adapters_is_one_graph(settings: dict[str, Any]) -> None:
    layer = adapted(tiny(), **settings).model.layers[0].eval()
    inputs = (torch.ones(1, 3, 64), *(torch.ones(1, 1, 3, 16),) * 2, None, None)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), layer(*inputs))


def test_bf16_is_multiplied_and_float32_is_trained() -> None:
    model = adapted(tiny().bfloat16(), target_modules=["all-linear", "embed_tokens", "lm_head"])
    tokens = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(0))
    with Watch() as watch:
        model(tokens).float().square().mean().backward()
    # Of the scores in attention, the CPU's own float32; of the adapters, none.
    assert set(watch.products) == {(torch.bfloat16,) * 2, (torch.bfloat16,) * 3}
    for parameter in trained_parameters(model).values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        before = parameter.detach().clone()
        parameter.data *= 1 + 1e-4  # lost in bf16
        assert not torch.equal(parameter, before)


def test_only_adapters_are_trained() -> None:
    for settings, expected in (
        ({"target_modules": ["q_proj"]}, {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ({"target_modules": ["0.mlp.up_proj"]}, {"model.layers.0.mlp.up_proj"}),
        (
            {"target_modules": [r".*\.1\..*(up|down)_proj"]},
            {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"},
        ),
        ({"target_modules": ["embed_tokens"]}, {"model.embed_tokens"}),
    ):
        model = tiny()
        models.add_lora(model, LoraConfig(rank=4, **settings), seed=0)
        parts = ("lora_A.weight", "lora_B.weight")
        assert trained_parameters(model).keys() == {f"{name}.{part}" for name in expected for part in parts}
    model = tiny()
    models.add_lora(model, LoraConfig(rank=4, use_dora=True, modules_to_save=["norm", "up_proj"]), seed=0)
    trained = trained_parameters(model)
    assert len(trained) == 2 * 6 * 3 + 1 + 2, "six of seven layers' A, B and m; one norm, two up_proj"
    assert "lm_head.weight" not in trained


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_known_before(kind: str, tied: bool) -> None:
    lora = LoraConfig(rank=4, **KINDS[kind])
    model = tiny(tie_embeddings=tied)
    state = torch.get_rng_state()
    shapes = models.trained_shapes(model.config, lora)
    models.add_lora(model, lora, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert shapes == {name: tuple(parameter.shape) for name, parameter in trained_parameters(model).items()}


def test_runs_on_meta() -> None:
    for kind in KINDS.values():
        with torch.device("meta"):
            model = Decoder(CONFIG)
            models.add_lora(model, LoraConfig(rank=4, dropout=0.1, **kind), seed=0)
            model(torch.zeros(2, 9, dtype=torch.int64)).sum().backward()
        assert all(parameter.grad is not None for parameter in trained_parameters(model).values())


# Random numbers.


def test_initialisation_is_that_of_peft_and_depends_on_the_seed_alone() -> None:
    drawn = []
    for seed, global_seed in ((0, 1), (0, 2), (3, 1)):
        model = tiny()
        torch.manual_seed(global_seed)
        models.add_lora(model, LoraConfig(rank=8, target_modules=["all-linear", "embed_tokens", "lm_head"]), seed=seed)
        drawn.append({name: parameter.detach() for name, parameter in trained_parameters(model).items()})
    for name, values in drawn[0].items():
        assert torch.equal(values, drawn[1][name])
        if "lora_B" in name:
            assert not values.any()
        else:
            assert not torch.equal(values, drawn[2][name])
            expected = torch.empty(8, values.shape[1])
            torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5))
            assert values.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.05)
            assert values.std().item() == pytest.approx(expected.std().item(), rel=0.1)


@torch.no_grad()
def test_dropout_is_for_training() -> None:
    """Of what goes into A: on average nothing is missing."""
    model = adapted(tiny(), dropout=0.25, target_modules=["q_proj", "lm_head"])
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for layer in (model.model.layers[0].self_attn.q_proj, model.head):
        exact = layer.eval()(x)
        many = layer.train()(x.expand(4000, 64))
        assert len(many.unique(dim=0)) == 4000
        torch.testing.assert_close(many.mean(0), exact[0], atol=0.02, rtol=0)
        torch.manual_seed(7)
        drawn = layer(x)
        torch.manual_seed(7)
        torch.testing.assert_close(sum(a @ b.T for a, b in layer.factors(x)), drawn)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_layers_drop_the_same_again(mode: Any) -> None:
    tokens = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, checkpointed = (adapted(tiny(), dropout=0.5) for _ in range(2))
    models.enable_activation_checkpointing(checkpointed, mode)
    for model in (plain, checkpointed):
        torch.manual_seed(7)
        model(tokens).square().mean().backward()
    for (name, expected), found in zip(
        trained_parameters(plain).items(), trained_parameters(checkpointed).values(), strict=True
    ):
        assert torch.equal(found.grad, expected.grad), name


# A base in few bits.


@pytest.mark.parametrize("kind", ["int8", "nf4", "int4", "fp8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_beside_a_quantised_base_are_those_beside_what_it_stands_for(
    kind: models.Quantization, use_dora: bool, hf_folder: Callable[..., Path]
) -> None:
    changes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 4}
    folder = hf_folder("llama", intermediate_size=128, **changes)
    quantised = load_model(folder, dtype=torch.float32, device="cpu", quantization=kind)
    plain = load_model(folder, dtype=torch.float32, device="cpu")
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(models.merged(quantised, name))
    for model in (quantised, plain):
        adapted(model, use_dora=use_dora, base_quantization=kind if model is quantised else None)
        model(TOKENS).log_softmax(-1)[..., 3].mean().backward()
    assert trained_parameters(quantised).keys() == trained_parameters(plain).keys()
    for name, expected in trained_parameters(plain).items():
        found = trained_parameters(quantised)[name]
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-7, rtol=1e-4)
    for name in models.parameter_shapes(plain.config):
        torch.testing.assert_close(models.merged(quantised, name), models.merged(plain, name), atol=1e-6, rtol=0)
    assert all("lora" in name for name in trained_parameters(quantised))


# What is refused.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["qproj"]}, "no qproj .* Did you mean q_proj?"),
        ({"target_modules": ["all_linear"]}, "no all_linear .* Did you mean all-linear?"),
        ({"target_modules": ["self_attn"]}, "no self_attn .* It has embed_tokens, q_proj"),
        ({"target_modules": ["*"]}, "neither the end of a name nor a regular expression"),
        ({"target_modules": []}, "names no layer"),
        ({"modules_to_save": ["embed"]}, "lora.modules_to_save: the model has no embed"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "both have model.layers.0.self_attn.q_proj"),
        ({"rank": 33}, r"lora.rank=33 .*k_proj, \[32, 64\].* at most 32"),
        ({"use_dora": True, "target_modules": ["lm_head"]}, "use_dora=true .* has lm_head"),
        ({"use_dora": True, "target_modules": ["all-linear", "embed_tokens"]}, "has model.embed_tokens"),
        ({"base_quantization": "nf4", "modules_to_save": ["up_proj"]}, "base_quantization=nf4 stores in few bits"),
    ],
)
def test_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        models.trained_shapes(CONFIG, LoraConfig(**{"rank": 4, **settings}))


def test_a_tied_embedding_and_its_head_have_one_adapter() -> None:
    for target in ("embed_tokens", "lm_head"):
        model = adapted(tiny(tie_embeddings=True), target_modules=[target])
        assert trained_parameters(model).keys() == {
            "model.embed_tokens.lora_A.weight",
            "model.embed_tokens.lora_B.weight",
        }
        tokens = torch.arange(6)[None]
        weight = models.merged(model, "model.embed_tokens.weight")
        torch.testing.assert_close(model.model.embed_tokens(tokens)[0], weight[:6])
        torch.testing.assert_close(model.head(torch.eye(64)), weight.T)
        whole = tiny(tie_embeddings=True)
        models.add_lora(whole, LoraConfig(rank=4, modules_to_save=[target]), seed=0)
        assert whole.head.weight is whole.model.embed_tokens.weight
        assert whole.head.weight.requires_grad
