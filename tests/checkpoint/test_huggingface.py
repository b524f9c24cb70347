"""Folders in and out: identical bits, an equal opinion from transformers, and one clear message for each defect."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdtune.checkpoint import (
    StartCheckpointerConfig,
    check_files,
    check_start,
    load_model,
    read_companions,
    read_config,
    save_model,
    select_layers,
)
from kdtune.checkpoint.weights import StoredTensor, read_header, read_into
from kdtune.models import Decoder, QuantizedLinear, dequantize, from_hf_config, quantize, quantized_shapes

TOKENS = torch.arange(24).view(2, 12)


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Decoder:
    return load_model(folder, dtype=dtype, device="cpu", **settings)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the weights of a folder in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def sharded(hf_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """The tiny Llama in many shards."""
    source = hf_folder("llama")
    folder = tmp_path / "sharded"
    save_model(
        load(source), folder, config=read_config(source), companions=read_companions(source), max_shard_size=40_000
    )
    return folder


@pytest.mark.parametrize("max_shard_size", [5 * 10**9, 40_000])
def test_saved_folder_is_the_same_model(
    variant: str, max_shard_size: int, hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    import transformers

    source, folder = hf_folder(variant), tmp_path / "saved"
    model = load(source)
    save_model(
        model, folder, config=read_config(source), companions=read_companions(source), max_shard_size=max_shard_size
    )

    again = load(folder).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    assert (folder / "model.safetensors").exists() == (max_shard_size > 40_000)
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        assert torch.equal(opened(TOKENS).logits, original(TOKENS).logits)


def test_config_keeps_what_it_does_not_know_and_its_own_name_for_dtype(
    hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = hf_folder("llama")
    model = load(source, torch.bfloat16)
    for config, key in (({"dtype": "float32"}, "dtype"), ({"torch_dtype": "float32"}, "torch_dtype"), ({}, "dtype")):
        base = {k: v for k, v in read_config(source).items() if k != "dtype"} | {"their_own": [1]}
        save_model(model, tmp_path / "saved", config=base | config)
        assert read_config(tmp_path / "saved") == base | {key: "bfloat16"}


def test_companions_travel_along(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_folder("llama")
    for name in ("tokenizer.json", "chat_template.jinja", "training_state.pt"):
        (source / name).write_text(name)
    save_model(load(source), tmp_path / "saved", config=read_config(source), companions=read_companions(source))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("tokenizer.model", ["tokenizer.model"]),
        ("other.json", ["tokenizer.json"]),
        ("ranks.tiktoken", ["tokenizer.model"]),
        ("merges.txt", ["merges.txt", "vocab.json"]),
    ],
)
def test_a_tokenizer_file_travels_with_its_settings(given: str, found: list[str], tmp_path: Path) -> None:
    """The settings beside it are what its tokenizer was read with; another vocabulary beside it is not."""
    settings = ["additional_chat_templates/tool_use.jinja", "generation_config.json", "tokenizer_config.json"]
    (tmp_path / "source/additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", given, *settings):
        (tmp_path / "source" / name).write_text(name)
    (tmp_path / "model").mkdir()
    companions = read_companions(tmp_path / "model", tmp_path / "source" / given)
    assert sorted(companions) == sorted([*found, *settings])
    if len(found) == 1:
        assert companions[found[0]].decode() == given


def test_the_generation_config_is_the_models_own(tmp_path: Path) -> None:
    for folder in ("model", "tokenizer"):
        (tmp_path / folder).mkdir()
        for name in ("tokenizer.json", "generation_config.json"):
            (tmp_path / folder / name).write_text(folder)
    companions = read_companions(tmp_path / "model", tmp_path / "tokenizer")
    assert companions == {"tokenizer.json": b"tokenizer", "generation_config.json": b"model"}


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
def test_weights_are_as_readable_as_the_config(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_folder("llama")
    save_model(load(source), tmp_path / "saved", config=read_config(source))
    config, weights = tmp_path / "saved/config.json", tmp_path / "saved/model.safetensors"
    assert weights.stat().st_mode == config.stat().st_mode


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_any_stored_dtype_to_any_wanted(
    stored: torch.dtype, wanted: torch.dtype, hf_folder: Callable[..., Path]
) -> None:
    folder = hf_folder("qwen2")
    rewrite(folder, lambda weights: weights.update({name: w.to(stored) for name, w in weights.items()}))
    expected = load_file(folder / "model.safetensors")
    for name, weight in load(folder, wanted).named_parameters():
        assert torch.equal(weight, expected[name].to(wanted))


def test_tensors_longer_than_the_buffer(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama", vocab_size=40_001)  # 10 MB of float32
    weight = load(folder).model.embed_tokens.weight
    assert torch.equal(weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


def test_keep_layers_picks_and_renumbers(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    source = hf_folder("qwen3-layer_types")
    config = select_layers(read_config(source), [0, 2])
    assert config["layer_types"] == ["sliding_attention", "sliding_attention"]
    model = load(source, keep_layers=[0, 2])
    assert model.config == from_hf_config(config)
    assert model.config.windows == (4, 4)
    save_model(model, tmp_path / "saved", config=config, companions=read_companions(source))

    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    layers = original.model.layers
    original.model.layers = torch.nn.ModuleList([layers[0], layers[2]])
    original.config.layer_types = config["layer_types"]
    original.config.num_hidden_layers = 2
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = original(TOKENS, use_cache=False).logits
        torch.testing.assert_close(opened(TOKENS).logits, expected, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(model(TOKENS), expected, atol=1e-5, rtol=0.0)


def test_keep_layers_moves_the_first_window() -> None:
    config = {"num_hidden_layers": 6, "max_window_layers": 3}
    assert select_layers(config, [0, 2, 4]) == {"num_hidden_layers": 3, "max_window_layers": 2}
    assert select_layers(config, None) == config


@pytest.mark.parametrize("kept", [[], [0, 3], [-1], [1, 0], [1, 1]])
def test_keep_layers_refusals(kept: list[int], hf_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"must name layers of the model in increasing order.*it has 0 to 2"):
        load(hf_folder("llama"), keep_layers=kept)


def test_keep_layers_of_a_family_that_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    with pytest.raises(ValueError, match="model_type 'gpt2', which kdtune does not have"):
        load(tmp_path, keep_layers=[0])
    with pytest.raises(ValueError, match="model_type 'gpt2', which kdtune does not have"):
        check_start(StartCheckpointerConfig(str(tmp_path), keep_layers=[0]), None)


def test_shards_are_measured_as_they_are_written(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_folder("llama")
    model = load(source, dtype=torch.bfloat16)
    save_model(model, tmp_path, config=read_config(source), dtype=torch.float32, max_shard_size=100_000)
    assert all(shard.stat().st_size < 110_000 for shard in tmp_path.glob("*.safetensors"))


def test_random_weights_need_config_only_and_are_the_seed_s(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("qwen2")
    (folder / "model.safetensors").unlink()
    change_config(folder, initializer_range=0.05)
    state = torch.get_rng_state()
    model, same, other = (load(folder, random_weights=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, weight), again, different in zip(
        model.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, again)
        if weight.dim() == 2:
            assert not torch.equal(weight, different)
            assert abs(weight.std().item() - 0.05) < 0.003
        else:
            assert (weight == (0 if name.endswith("bias") else 1)).all()
    assert model.head.weight is model.model.embed_tokens.weight
    rounded = load(folder, torch.bfloat16, random_weights=True, seed=1)
    assert torch.equal(rounded.head.weight, model.head.weight.bfloat16())


def test_tied_head_in_the_file_and_old_rope_tables_are_left_out(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama-tied")
    before = load(folder).state_dict()
    extra = {"lm_head.weight": torch.ones(97, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(folder, lambda weights: weights.update(extra))
    assert all(torch.equal(weight, before[name]) for name, weight in load(folder).state_dict().items())


# What can be wrong with a folder.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is not a folder; a checkpoint is a folder with config.json"),
        ("runs/mine/model", "A run with output_dir=runs/mine writes it at its end: do that run first"),
        ("meta-llama/Llama-3.2-1B", "fetch it first: kdtune download meta-llama/Llama-3.2-1B"),
    ],
)
def test_no_folder(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        read_config(name)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a list")])
def test_damaged_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_no_weights(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has neither"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="Convert it once with transformers"):
        load(folder)


def test_missing_shard(sharded: Path) -> None:
    missing = sorted(sharded.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {missing.name} of the .* shards"):
        load(sharded)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_damaged_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is not a valid index"):
        load(sharded)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_shard(size: int, sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:size])
    with pytest.raises(ValueError, match=f"{shard.name} is not a complete safetensors file: it has"):
        load(sharded)


def test_not_a_safetensors_file(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    for content in (b"version https://git-lfs.github.com/spec/v1\n", (9).to_bytes(8, "little") + b"not json!"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is not a complete safetensors file"):
            load(folder)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"a": 1}',
        '{"a": {"dtype": "F32"}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
    ],
)
def test_a_header_that_makes_no_sense(header: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(ValueError, match="its header does not say what lies where"):
        read_header(file)


def test_missing_tensors(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    rewrite(folder, lambda weights: [weights.pop(name) for name in list(weights) if "mlp" in name])
    with pytest.raises(ValueError, match=r"lacks model.layers.0.mlp.gate_proj.weight, .* and 6 more"):
        load(folder)


def test_unexpected_tensors(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    with pytest.raises(ValueError, match=r"has model.layers.0.self_attn.q_proj.bias, for which"):
        load(folder)


def test_wrong_shape(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    change_config(folder, vocab_size=101)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \[97, 64\], and config.json calls for \[101"):
        load(folder)


def test_quantised_tensor(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(97, 64, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"lm_head.weight is stored as I8"):
        load(folder)


def test_checking_reads_headers_only(hf_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_folder("llama")
    monkeypatch.setattr("kdtune.checkpoint.source.read_into", None)
    stored = check_files(folder, from_hf_config(read_config(folder)))
    assert len(stored) == 30


MEASURE = """
import re, sys, torch
from pathlib import Path
from kdtune.checkpoint import load_model
from kdtune.models import num_bytes, quantize

def resident(kind):  # bytes; getrusage would start from the parent's peak
    return 1024 * int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

for name in sys.argv[2:]:
    dtype, kind = (torch.bfloat16, name) if name == "fp8" else (getattr(torch, name), None)
    if kind is not None:
        quantize(torch.ones(64, 512), kind)  # which imports torchao
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    model = load_model(sys.argv[1], dtype=dtype, device="cpu", quantization=kind)
    print((resident("VmHWM") - before) / sum(num_bytes(parameter) for parameter in model.parameters()))
    del model
"""


def peaks(folder: Path, config: dict[str, Any], *kinds: str) -> list[float]:
    """Of the host's memory while a model is loaded, to what the model holds."""
    config = {"model_type": "llama", "num_attention_heads": 8, "tie_word_embeddings": True, **config}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder, random_weights=True, dtype=torch.bfloat16)
    save_model(model, folder, config=config)
    del model
    command = [sys.executable, "-c", MEASURE, str(folder), *kinds]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(ratio) for ratio in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_host_memory_is_the_model(tmp_path: Path) -> None:
    """Also where the weights change their type."""
    config = {
        "vocab_size": 60_000,  # one tensor of over half the model
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 2,
    }
    assert peaks(tmp_path, config, "float32", "bfloat16") == pytest.approx([1, 1], abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_host_memory_is_the_model_in_few_bits(tmp_path: Path) -> None:
    """What is taken while weights are rounded leaves no holes between them."""
    config = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24}
    assert peaks(tmp_path, config, "fp8")[0] < 1.5


# Quantised while it is read.


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8"])
def test_quantised_model_is_that_of_its_rounded_weights(kind: Any, hf_folder: Callable[..., Path]) -> None:
    import transformers

    folder = hf_folder("qwen2", intermediate_size=256, num_key_value_heads=4, hidden_size=128)
    full, model = load(folder), load(folder, quantization=kind)
    quantized = quantized_shapes(model.config)
    assert len(quantized) == 7 * model.config.num_layers
    for name, parameter in model.named_parameters():
        if name in quantized:
            assert isinstance(model.get_submodule(name.removesuffix(".weight")), QuantizedLinear)
            assert not parameter.requires_grad
            parameter = dequantize(parameter)
            assert torch.equal(parameter, dequantize(quantize(full.get_parameter(name), kind)))
            full.get_parameter(name).data = parameter
        assert torch.equal(parameter, full.get_parameter(name))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.load_state_dict(full.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), theirs(TOKENS).logits, atol=1e-5)


def test_quantising_never_holds_the_model(hf_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is read, of those before it nothing is left but few bits."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def watch(stored: StoredTensor, target: Tensor, buffer: Tensor) -> None:
        nonlocal most
        if len(stored.shape) == 2:
            alive.add(target)
            most = max(most, len(alive))
        read_into(stored, target, buffer)

    monkeypatch.setattr("kdtune.checkpoint.source.read_into", watch)
    folder = hf_folder("llama")
    gc.collect()
    model = load(folder, quantization="int8")
    del model
    # The embedding and the head, the weight that is read, and the one before it, whose name is still bound.
    assert most <= 4


def test_rounding_hides_no_broken_weight(hf_folder: Callable[..., Path]) -> None:
    folder, name = hf_folder("llama"), "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda weights: weights[name].view(-1)[3].fill_(torch.nan))
    with pytest.raises(ValueError, match=rf"{name} holds numbers that are not finite"):
        load(folder, quantization="int8")


def test_on_meta_nothing_is_read_but_the_config(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    expected = {name: parameter.shape for name, parameter in load(folder).named_parameters()}
    (folder / "model.safetensors").unlink()
    for settings in ({}, {"quantization": "int8"}, {"random_weights": True}):
        model = load_model(folder, dtype=torch.bfloat16, device="meta", **settings)
        assert {name: parameter.shape for name, parameter in model.named_parameters()} == expected
        assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        assert model(TOKENS.to("meta")).shape == (*TOKENS.shape, 97)
