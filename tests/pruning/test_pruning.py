"""What is left out counts least, and what stays is the same model: for each family, against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune import checkpoint, pruning
from kdtune.models import Decoder, ModelConfig, from_hf_config
from kdtune.pruning import DepthConfig, WidthConfig

Oracle = Callable[..., Any]
TOKENS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(7))
READ = torch.ones_like(TOKENS, dtype=torch.bool)
DIMENSIONS = ("layers", "heads", "mlp", "hidden")
# All that is cut differently; the other variants differ in their rotary embeddings and windows.
FAMILIES = ("llama-head_dim", "llama-one_kv_head_per_head", "llama-tied", "llama-biases", "qwen2", "qwen3", "mistral")


def load(model: Any, folder: Path) -> tuple[Decoder, dict[str, Any]]:
    """What transformers has, here."""
    model.save_pretrained(folder)
    return checkpoint.load_model(folder, dtype=torch.float32, device="cpu").eval(), checkpoint.read_config(folder)


def widths(dimension: str, model: ModelConfig) -> WidthConfig:
    """The sizes of a dimension, smaller."""
    sizes = {
        "hidden": {"hidden_size": 48},
        "mlp": {"intermediate_size": 60},
        "heads": {"num_kv_heads": model.num_kv_heads // 2},
    }
    names = sizes if dimension == "all" else [dimension]
    return WidthConfig(**{key: size for name in names for key, size in sizes.get(name, {}).items()})


@torch.no_grad()
def shrink(
    model: Decoder, hf_config: dict[str, Any], width: WidthConfig, num_layers: int | None = None, block: int = 1
) -> tuple[Decoder, dict[str, Any], pruning.Kept]:
    """As the recipe does: read TOKENS, choose, cut."""
    statistics = pruning.Statistics(model, aggregation=width.aggregation or "l2", block_size=block)
    with statistics.watch(READ):
        model(TOKENS)
    total = model.config.num_layers
    layers = list(range(total)) if num_layers is None else pruning.choose_layers(statistics.layers(), total, num_layers)
    config = pruning.narrow(checkpoint.select_layers(hf_config, layers), width)
    kept = pruning.choose_width(statistics, model.config, from_hf_config(config), layers)
    return pruning.prune(model, from_hf_config(config), kept), config, kept


def useless(dimension: str, model: ModelConfig) -> dict[str, list[int]]:
    """What is planted: nothing comes of these layers, key heads, MLP channels and hidden channels."""
    planted = {
        "layers": [1],
        "heads": list(range(0, model.num_kv_heads, 2)),
        "mlp": list(range(1, 73, 2)),
        "hidden": list(range(3, 64, 4)),
    }
    return planted if dimension == "all" else {dimension: planted[dimension]}


@torch.no_grad()
def plant(model: Any, config: ModelConfig, planted: dict[str, list[int]]) -> None:
    """Make them useless in a model of transformers."""

    def clear(linear: Any, rows: Sequence[int]) -> None:
        linear.weight[rows] = 0
        if linear.bias is not None:
            linear.bias[rows] = 0

    everything = list(range(config.hidden_size))
    hidden = planted.get("hidden", [])
    model.model.embed_tokens.weight[:, hidden] = 0
    for index, layer in enumerate(model.model.layers):
        rows = everything if index in planted.get("layers", []) else hidden
        clear(layer.self_attn.o_proj, rows)
        clear(layer.mlp.down_proj, rows)
        clear(layer.mlp.up_proj, planted.get("mlp", []))
        for head in planted.get("heads", []):
            clear(layer.self_attn.v_proj, list(range(head * config.head_dim, (head + 1) * config.head_dim)))


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize(
    "name",
    [name if name in ("llama-biases", "qwen3") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_what_is_useless_is_found_and_not_missed(name: str, dimension: str, oracle: Oracle, tmp_path: Path) -> None:
    leave_out(oracle, name, dimension, tmp_path)


def test_all_that_is_useless(variant: str, oracle: Oracle, tmp_path: Path) -> None:
    leave_out(oracle, variant, "all", tmp_path)


def leave_out(oracle: Oracle, variant: str, dimension: str, folder: Path) -> None:
    whole = oracle(variant, rms_norm_eps=1e-8)  # which weighs more in a mean over fewer channels, in each token anew
    config = from_hf_config(whole.config.to_dict())
    planted = useless(dimension, config)
    plant(whole, config, planted)
    model, hf_config = load(whole, folder)
    num_layers = 2 if dimension in ("layers", "all") else None
    pruned, _, kept = shrink(model, hf_config, widths(dimension, config), num_layers)

    assert kept.layers == ([0, 2] if num_layers else [0, 1, 2])
    indices = {"hidden": kept.hidden, "mlp": kept.mlp, "heads": kept.heads}
    assert {name for name, index in indices.items() if index is not None} == set(planted) - {"layers"}
    if kept.hidden is not None:
        assert not set(kept.hidden.tolist()) & set(planted["hidden"])
    for layer in kept.layers:
        if kept.mlp is not None:
            assert not set(kept.mlp[layer].tolist()) & set(planted["mlp"])
        if kept.heads is not None:
            of_one = config.num_heads // config.num_kv_heads
            assert not {head // of_one for head in kept.heads[layer].tolist()} & set(planted["heads"])
    with torch.no_grad():
        torch.testing.assert_close(pruned(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


def test_saved_folder_opens_in_transformers(variant: str, oracle: Oracle, tmp_path: Path) -> None:
    import transformers

    model, hf_config = load(oracle(variant), tmp_path / "whole")
    pruned, config, _ = shrink(model, hf_config, widths("all", model.config), num_layers=2)
    checkpoint.save_model(pruned, tmp_path / "pruned", config=config)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ours = checkpoint.load_model(tmp_path / "pruned", dtype=torch.float32, device="cpu").eval()
    with torch.no_grad():
        expected = theirs.eval()(TOKENS).logits
        torch.testing.assert_close(pruned(TOKENS), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(TOKENS), expected, atol=1e-5, rtol=1e-5)
    assert config["num_hidden_layers"] == 2
    assert pruned.config.hidden_size == 48


def test_chosen_layers_are_those_of_keep_layers(variant: str, oracle: Oracle, tmp_path: Path) -> None:
    model, hf_config = load(oracle(variant), tmp_path)
    config = checkpoint.select_layers(hf_config, [0, 2])
    pruned = pruning.prune(model, from_hf_config(config), pruning.Kept([0, 2]))
    expected = checkpoint.load_model(tmp_path, dtype=torch.float32, device="cpu", keep_layers=[0, 2])
    assert pruned.config == expected.config
    torch.testing.assert_close(pruned.state_dict(), expected.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("aggregation", ["mean", "l2"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral-sliding"])
def test_scores_are_those_of_transformers_activations(
    name: str, aggregation: str, oracle: Oracle, tmp_path: Path
) -> None:
    """Of rows alone there, and padded here."""
    theirs = oracle(name).double()
    lengths = [12, 5, 9]
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, x: Tensor) -> None:
        seen.setdefault(name, []).append(x.flatten(0, 1))  # [s, ...]

    for index, layer in enumerate(theirs.model.layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: keep(f"in{index}", args[0]))
        layer.register_forward_hook(lambda _, args, out, index=index: keep(f"out{index}", out))
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, index=index: keep(f"mlp{index}", args[0]))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, index=index: keep(f"heads{index}", args[0]))
    norms = [m for m in theirs.modules() if "RMSNorm" in type(m).__name__ and m.weight.shape == (64,)]
    assert len(norms) == 7
    of_norms: list[list[Tensor]] = [[] for _ in norms]
    for norm, outputs in zip(norms, of_norms, strict=True):
        norm.register_forward_hook(lambda _, args, out, outputs=outputs: outputs.append(out[0]))
    with torch.no_grad():
        for row, length in zip(TOKENS, lengths, strict=True):
            theirs(row[None, :length])
    everything = {key: torch.cat(parts) for key, parts in seen.items()}

    def aggregate(x: Tensor) -> Tensor:
        return x.abs().mean(0) if aggregation == "mean" else x.square().mean(0).sqrt()

    labels = torch.full_like(TOKENS, -100)
    for row, length in enumerate(lengths):
        labels[row, length // 2 : length] = 3  # the prompt has none, and counts all the same
    model, _ = load(oracle(name), tmp_path)
    statistics = pruning.Statistics(model, aggregation=aggregation)  # type: ignore[arg-type]
    with torch.no_grad():
        for rows in (slice(0, 2), slice(2, 3)):  # two batches
            with statistics.watch(pruning.read_tokens(labels[rows])):
                model(TOKENS[rows])
    assert statistics.num_tokens == sum(lengths)

    cosines = [F.cosine_similarity(everything[f"in{i}"], everything[f"out{i}"], dim=-1).mean() for i in range(3)]
    mlp = torch.stack([aggregate(everything[f"mlp{i}"]) for i in range(3)])
    by_head = [everything[f"heads{i}"].unflatten(-1, (4, -1)).norm(dim=-1) for i in range(3)]
    hidden = sum((aggregate(torch.cat(outputs)) for outputs in of_norms), torch.zeros(64))
    for found, expected in (
        (statistics.layers(), 1 - torch.stack(cosines)),
        (statistics.mlp_channels(), mlp),
        (statistics.heads(), torch.stack([aggregate(x) for x in by_head])),
        (statistics.hidden_channels(), hidden),
    ):
        torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-4)


def test_a_useless_block_is_found_as_a_whole(oracle: Oracle, tmp_path: Path) -> None:
    """Layers 2 and 3 each take back what the other adds: neither is useless alone."""
    whole = oracle("llama", num_hidden_layers=5)
    layers = whole.model.layers
    with torch.no_grad():
        for layer in layers[2:4]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model, _ = load(whole, tmp_path)
    for index, sign in ((2, 1.0), (3, -1.0)):
        layer = model.model.layers[index]
        layer.register_forward_hook(lambda _, args, out, sign=sign: out + sign)
    statistics = pruning.Statistics(model, block_size=2)
    with torch.no_grad(), statistics.watch(READ):
        model(TOKENS)
    scores = statistics.layers()
    assert scores.shape == (4,)
    assert scores[2].abs() < 1e-5
    assert pruning.choose_layers(scores, 5, 3) == [0, 1, 4]


def test_layers_are_left_out_for_a_while(oracle: Oracle, tmp_path: Path) -> None:
    model, _ = load(oracle("qwen3-layer_types"), tmp_path)
    with torch.no_grad():
        whole = model(TOKENS)
        with pruning.without_layers(model, 1, 2):
            found = model(TOKENS)
        torch.testing.assert_close(model(TOKENS), whole, atol=0, rtol=0)
        expected = checkpoint.load_model(tmp_path, dtype=torch.float32, device="cpu", keep_layers=[0]).eval()(TOKENS)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_query_heads_of_each_key_head(oracle: Oracle, tmp_path: Path) -> None:
    """Both numbers given, key heads stay and each keeps its better query head."""
    whole = oracle("llama", num_attention_heads=8)  # four for each of two key heads
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.self_attn.o_proj.weight.view(64, 8, 8)[:, [0, 2, 5, 6]] = 0
    model, hf_config = load(whole, tmp_path)
    config = pruning.narrow(hf_config, WidthConfig(num_heads=4, num_kv_heads=2))
    target = from_hf_config(config)
    assert (target.num_heads, target.num_kv_heads, target.head_dim) == (4, 2, 8)
    statistics = pruning.Statistics(model)
    with torch.no_grad(), statistics.watch(READ):
        model(TOKENS)
    kept = pruning.choose_width(statistics, model.config, target, [0, 1, 2])
    assert kept.heads is not None
    assert ((kept.heads < 4).sum(1) == 2).all()
    pruned = pruning.prune(model, target, dataclasses.replace(kept, heads=torch.tensor([[1, 3, 4, 7]] * 3)))
    with torch.no_grad():
        torch.testing.assert_close(pruned(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


def test_best_heads_by_hand(oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hf_config = load(oracle("llama", num_attention_heads=8, num_key_value_heads=4), tmp_path)
    statistics = pruning.Statistics(model)
    scores = torch.tensor([[9.0, 0, 5, 5, 1, 6, 0, 0]] * 3)  # of pairs 9, 10, 7, 0
    monkeypatch.setattr(statistics, "heads", lambda: scores)
    for sizes, expected in (
        ({"num_kv_heads": 2}, [0, 1, 2, 3]),
        ({"num_heads": 6}, [0, 1, 2, 3, 4, 5]),
        ({"num_heads": 2, "num_kv_heads": 2}, [0, 5]),
        ({"num_heads": 4, "num_kv_heads": 4}, [0, 2, 5, 6]),
    ):
        target = from_hf_config(pruning.narrow(hf_config | {"head_dim": 8, "hidden_size": 48}, WidthConfig(**sizes)))
        kept = pruning.choose_width(statistics, model.config, dataclasses.replace(target, hidden_size=64), [0, 1, 2])
        assert kept.heads is not None
        assert kept.heads.tolist() == [expected] * 3, sizes


def test_config_of_a_narrower_model(oracle: Oracle) -> None:
    whole = oracle("qwen2").config.to_dict()
    narrow = pruning.narrow(whole, WidthConfig(intermediate_size=60))
    assert narrow == whole | {"intermediate_size": 60}, "what stays is not touched"
    assert "head_dim" not in narrow
    narrow = pruning.narrow(whole, WidthConfig(hidden_size=32, num_heads=2))
    assert "head_dim" not in narrow, "32 / 2 is what it was"
    assert pruning.narrow(whole, WidthConfig(hidden_size=48))["head_dim"] == 16


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({"hidden_size": 64}, r"width\.hidden_size=64 leaves out nothing: the model has 64"),
        ({"intermediate_size": 97}, r"width\.intermediate_size=97 leaves out nothing: the model has 96"),
        ({"num_heads": 4}, r"width\.num_heads=4 leaves out nothing"),
        ({"num_kv_heads": 2}, r"width\.num_kv_heads=2 leaves out nothing: the model has 2"),
        ({"num_kv_heads": 3}, r"width\.num_kv_heads=3 leaves out nothing: the model has 2"),
        ({"num_heads": 3}, r"2 query heads share a key head.*multiple of 2, or give width\.num_kv_heads=2"),
        ({"num_heads": 3, "num_kv_heads": 2}, r"same number of query heads.*multiple of 2, up to 4"),
        ({"num_heads": 3, "num_kv_heads": 1}, r"at most the 2 that it has.*up to 2"),
        ({"hidden_size": 47, "num_kv_heads": 1}, "47 is not a multiple of 2 heads, and transformers opens no llama"),
        ({"aggregation": "l2"}, r"width\.aggregation=l2 is about how channels and heads are chosen"),
    ],
)
def test_widths_that_cannot_be(width: dict[str, Any], message: str, oracle: Oracle) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.narrow(oracle("llama").config.to_dict(), WidthConfig(**width))


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ({"keep_layers": [0], "num_layers": 2}, r"depth\.keep_layers=\[0\] says which .* Leave one of them out"),
        ({"keep_layers": [0], "importance": "cosine"}, r"depth\.importance=cosine .* depth\.keep_layers has chosen"),
        ({"keep_layers": [0], "contiguous": True}, r"depth\.contiguous=true .* depth\.keep_layers has chosen"),
        ({"importance": "perplexity"}, r"depth\.importance=perplexity .* no layer is left out"),
        ({"num_layers": 3}, r"depth\.num_layers=3 leaves out no layer: the model has 3"),
        ({"keep_layers": [0, 1, 2]}, r"depth\.keep_layers=\[0, 1, 2\] leaves out no layer: the model has 3"),
        ({"num_layers": 2, "contiguous": True}, "one layer, which is a block by itself"),
    ],
)
def test_depths_that_cannot_be(depth: dict[str, Any], message: str, oracle: Oracle) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.check_depth(DepthConfig(**depth), from_hf_config(oracle("llama").config.to_dict()))
