"""Adapters between PEFT and kdtune: the same logits from the same files, and one clear message for each defect."""

from __future__ import annotations

import json
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdtune import models
from kdtune.checkpoint import (
    CheckpointerConfig,
    StartCheckpointerConfig,
    adapters,
    check_lora,
    check_start,
    load_adapter,
    load_model,
    read_adapter,
    read_config,
    save_adapter,
    save_model,
)
from kdtune.checkpoint.weights import StoredTensor, read_into
from kdtune.models import Decoder, LoraConfig, from_hf_config

TOKENS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}  # on logits of about 3
EVERYWHERE = {"target_modules": ["all-linear", "embed_tokens", "lm_head"]}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few": {"target_modules": ["q_proj", r"model\.layers\.[12]\.mlp\.down_proj"], "alpha": 3.5},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding and head": EVERYWHERE,
    "whole": {"modules_to_save": ["embed_tokens", "lm_head", "model.norm", "input_layernorm"]},
}
# Each kind with biases everywhere, and with one weight for embedding and head; other families have other layers.
CASES = [(family, kind) for family in ("llama-biases", "qwen2") for kind in KINDS]
CASES += [("qwen3", "plain"), ("mistral-sliding", "plain")]


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Decoder:
    return load_model(folder, dtype=dtype, device="cpu", **settings)


@torch.no_grad()
def randomise(parameters: Any) -> None:
    """Move each parameter by as much as makes a difference."""
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def adapted(folder: Path, lora: LoraConfig) -> Decoder:
    """A model with an adapter that does something."""
    model = load(folder)
    models.add_lora(model, lora, seed=0)
    randomise(models.trained_parameters(model).values())
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(TOKENS)
    return out if isinstance(out, Tensor) else out.logits


def theirs(model: Any, path: Path, **config: Any) -> Any:
    """PEFT's adapter of a transformers model, which does something, saved to `path`."""
    import peft  # late: it takes seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings
        torch.manual_seed(3)  # PEFT draws from the global generator
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **config))
        randomise(parameter for parameter in model.parameters() if parameter.requires_grad)
        model.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_peft_reads_ours(
    family: str, kind: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    lora = LoraConfig(rank=4, **KINDS[kind])
    folder = hf_folder(family)
    model = adapted(folder, lora)
    save_adapter(model, tmp_path, lora, base=str(folder))
    found = peft.PeftModel.from_pretrained(oracle(family), tmp_path)
    expected = logits(model)
    assert (expected - logits(load(folder))).abs().max() > 0.1
    torch.testing.assert_close(logits(found), expected, **TOLERANCE)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_merged_applied_read_and_saved_are_the_same_model(
    family: str, kind: str, hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    lora = LoraConfig(rank=4, **KINDS[kind])
    folder = hf_folder(family)
    model = adapted(folder, lora)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", lora, base=str(folder))
    torch.testing.assert_close(logits(load(folder, adapter_dir=tmp_path / "adapter")), expected, **TOLERANCE)
    save_model(model, tmp_path / "model", config=read_config(folder))
    torch.testing.assert_close(logits(load(tmp_path / "model")), expected, **TOLERANCE)
    again = load(folder)
    models.add_lora(again, lora, seed=1)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), expected)


THEIRS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"k_proj": 20, r"layers\.0\.mlp\.\w+": 2},
    },
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "embedding, dora": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "head, dora": {"target_modules": ["lm_head", "v_proj"], "use_dora": True},
    "whole": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
    "whole head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "embedding with the head's A and B, dora": {
        "target_modules": ["v_proj", "embed_tokens"],
        "use_dora": True,
        "ensure_weight_tying": True,
    },
    "embedding with the head's A and B, another alpha": {
        "target_modules": ["v_proj", "embed_tokens"],
        "alpha_pattern": {"embed_tokens": 30},
        "ensure_weight_tying": True,
    },
    "tied": {"target_modules": ["v_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied whole": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("family", ["llama-biases", "qwen3-tied_biases"])
def test_we_read_those_of_peft(
    family: str, kind: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where embedding and head were one weight and no longer are."""
    model = theirs(oracle(family), tmp_path, **THEIRS[kind])
    folder = hf_folder(family)
    found = load(folder, adapter_dir=tmp_path)
    assert (logits(model) - logits(load(folder))).abs().max() > 0.05
    torch.testing.assert_close(logits(found), logits(model), **TOLERANCE)
    touched = kind.startswith(("embedding", "head", "whole"))
    assert found.config.tie_embeddings == (family == "qwen3-tied_biases" and not touched)


@pytest.mark.parametrize("family", ["llama-biases", "llama-tied"])
def test_a_base_that_comes_with_the_adapter(
    family: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT stores an adapted embedding as it was before, too: its rows may have been set by hand for new tokens."""
    changed = oracle(family)
    changed.get_input_embeddings().weight.data[90:] = 0.1
    model = theirs(changed, tmp_path, target_modules=["embed_tokens", "v_proj"])
    folder = hf_folder(family)
    torch.testing.assert_close(logits(load(folder, adapter_dir=tmp_path)), logits(model), **TOLERANCE)
    ours = load(folder)
    models.add_lora(ours, LoraConfig(rank=4, alpha=7, target_modules=["embed_tokens", "v_proj"]), seed=0)
    config = from_hf_config(read_config(folder) | {"vocab_size": 96})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \[97, 64\], and should have \[96, 64\]"):
        read_adapter(tmp_path, config)
    with pytest.raises(ValueError, match=r"trained beside another model\.embed_tokens\.weight than the model's"):
        load_adapter(ours, tmp_path)


TRAINABLE = {
    "all-linear": {},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "tied": {"target_modules": ["v_proj", "embed_tokens"]},
    "tied whole": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("kind", TRAINABLE)
def test_training_goes_on_from_those_of_peft(
    kind: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = theirs(oracle("qwen2"), tmp_path, **THEIRS[kind])
    lora = LoraConfig(rank=4, alpha=7, start_from=str(tmp_path), **TRAINABLE[kind])
    check_start(StartCheckpointerConfig(str(hf_folder("qwen2"))), None, lora)
    ours = load(hf_folder("qwen2"))
    models.add_lora(ours, lora, seed=0)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours.eval()), logits(model), **TOLERANCE)


# Reading.


def test_merging_is_in_float32_and_rounds_once(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, lora = hf_folder("llama"), LoraConfig(rank=4)
    model = adapted(folder, lora)
    save_adapter(model, tmp_path, lora, base=str(folder))
    for name, weight in load(folder, torch.bfloat16, adapter_dir=tmp_path).named_parameters():
        assert torch.equal(weight, models.merged(model, name).bfloat16())


def test_merging_holds_one_weight_more(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is wider than the model, when a weight is read, there is nothing else."""
    folder, lora = hf_folder("llama"), LoraConfig(rank=4, **EVERYWHERE)
    save_adapter(adapted(folder, lora), tmp_path, lora, base=str(folder))
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    held: list[list[torch.Size]] = []

    def watch(stored: StoredTensor, target: Tensor, buffer: Tensor) -> None:
        if target.dtype == torch.float32:
            alive.add(target)
        held.append([tensor.shape for tensor in alive])
        read_into(stored, target, buffer)

    monkeypatch.setattr(adapters, "read_into", watch)
    load(folder, torch.bfloat16, adapter_dir=tmp_path)
    assert len(held) == 3 * (3 * 7 + 2), "each weight, its A and its B"
    assert all(sum(4 not in shape for shape in shapes) == 1 for shapes in held)
    assert max(map(len, held)) == 3


def test_the_folder_is_that_of_peft(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    import peft

    folder = hf_folder("llama")
    for lora, expected in (
        (LoraConfig(), ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (LoraConfig(target_modules=["layers.1.mlp.up_proj"]), ["model.layers.1.mlp.up_proj"]),
    ):
        save_adapter(adapted(folder, lora), tmp_path, lora, base=str(folder))
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert written["target_modules"] == expected
        assert (
            peft.LoraConfig.from_pretrained(tmp_path).to_dict().items()
            >= {**written, "target_modules": set(expected)}.items()
        )
        assert not {path.stat().st_mode & 0o044 for path in tmp_path.iterdir()} - {0o044}, "others may read it"


def test_a_template_travels_with_the_adapter(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    lora = LoraConfig(rank=2)
    folder = hf_folder("llama")
    cfg = CheckpointerConfig(str(folder), str(tmp_path))
    assert cfg.tokenizer_dir == str(folder)
    companions = {"tokenizer_config.json": b"{}", "additional_chat_templates/tool.jinja": b"{{ messages }}"}
    save_adapter(adapted(folder, lora), tmp_path, lora, base=str(folder), companions=companions)
    assert {name: (tmp_path / name).read_bytes() for name in companions} == companions
    assert cfg.tokenizer_dir == str(tmp_path)


# What is refused.


@pytest.fixture
def adapter(hf_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """One of q_proj and v_proj of the tiny Llama."""
    lora = LoraConfig(rank=4, alpha=7, target_modules=["q_proj", "v_proj"])
    save_adapter(adapted(hf_folder("llama"), lora), tmp_path / "adapter", lora, base="llama")
    return tmp_path / "adapter"


def read(folder: Path, hf_folder: Callable[..., Path], **config: Any) -> Any:
    return read_adapter(folder, from_hf_config(read_config(hf_folder("llama")) | config))


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, 'peft_type="IA3"'),
        ({"bias": "lora_only"}, 'bias="lora_only"'),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ({"some_new_kind": {"beta": 1}}, 'some_new_kind={"beta": 1}'),
    ],
)
def test_another_kind_of_adapter(
    settings: dict[str, Any], said: str, adapter: Path, hf_folder: Callable[..., Path]
) -> None:
    change(adapter, **settings)
    with pytest.raises(ValueError, match=re.escape(said)):
        read(adapter, hf_folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 2}, "model.layers.2.self_attn.q_proj.lora_A.weight, for which there is no place"),
        ({"head_dim": 8}, r"q_proj.lora_B.weight has shape [64, 4], and should have [32, 4]"),
    ],
)
def test_an_adapter_of_another_model(
    config: dict[str, Any], said: str, adapter: Path, hf_folder: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match="the adapter of another model: .*" + re.escape(said)):
        read(adapter, hf_folder, **config)


def test_damage(adapter: Path, hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    change(adapter, use_dora=True)
    with pytest.raises(ValueError, match=r"q_proj.lora_magnitude_vector, .* should be there and is not"):
        read(adapter, hf_folder)
    change(adapter, use_dora=False, r=8)
    with pytest.raises(ValueError, match=r"lora_A.weight has shape \[4, 64\], and should have \[8, 64\]"):
        read(adapter, hf_folder)
    change(adapter, r=4)
    rewrite(adapter, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    with pytest.raises(ValueError, match="stored as I8"):
        read(adapter, hf_folder)
    rewrite(adapter, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.lora_B.weight should be there and is not"):
        read(adapter, hf_folder)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin, an older format which can run code"):
        read(adapter, hf_folder)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        read(adapter, hf_folder)
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not a JSON object"):
        read(adapter, hf_folder)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="lacks r, lora_alpha"):
        read(adapter, hf_folder)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json, .* It has a whole model"):
        read(hf_folder("llama"), hf_folder)
    with pytest.raises(FileNotFoundError, match=rf"There is one in {adapter}\."):
        read(adapter.parent, hf_folder)


def test_a_name_on_the_hub_is_to_be_fetched(hf_folder: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match="kdtune download owner/adapter --output-dir"):
        read(Path("owner/adapter"), hf_folder)


def test_numbers_that_are_none_are_not_written(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    lora = LoraConfig(rank=4)
    model = adapted(hf_folder("llama"), lora)
    next(iter(models.trained_parameters(model).values())).data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"q_proj\.lora_A\.weight hold numbers that are not finite"):
        save_adapter(model, tmp_path / "adapter", lora, base="llama")
    assert not (tmp_path / "adapter").exists()


SAME = {"rank": 4, "alpha": 7, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 8}, "lora.rank=8, but the adapter in .* has 4. .* give lora.rank=4"),
        ({"alpha": 8.5}, "lora.alpha=8.5, but the adapter in .* has 7"),
        ({"use_rslora": True}, "lora.use_rslora=true, but .* give lora.use_rslora=false"),
        ({"use_dora": True}, "lora.use_dora=true, but"),
        ({"target_modules": ["q_proj", "k_proj"]}, "only one of the two has model.layers.0.self_attn.k_proj.lora_A"),
        ({"modules_to_save": ["norm"]}, "only one of the two has model.norm.weight"),
    ],
)
def test_training_goes_on_with_the_same_adapter(
    lora: dict[str, Any], said: str, adapter: Path, hf_folder: Callable[..., Path]
) -> None:
    cfg = StartCheckpointerConfig(str(hf_folder("llama")))
    check_start(cfg, None, LoraConfig(start_from=str(adapter), **SAME))
    with pytest.raises(ValueError, match=said):
        check_start(cfg, None, LoraConfig(start_from=str(adapter), **{**SAME, **lora}))


def test_adapters_that_can_only_be_merged(
    oracle: Callable[..., Any], hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    cfg = StartCheckpointerConfig(str(hf_folder("llama-tied")))
    for kind, said in (("head", "a head apart from its embedding"), ("patterns", "layers of another alpha")):
        theirs(oracle("llama-tied"), tmp_path / kind, **THEIRS[kind])
        with pytest.raises(ValueError, match=f"{said}, which cannot be trained further here. Merge it"):
            check_start(cfg, None, LoraConfig(rank=4, alpha=7, start_from=str(tmp_path / kind)))
    change(tmp_path / kind, alpha_pattern={})
    with pytest.raises(ValueError, match="Adapters of several ranks"):
        check_start(cfg, None, LoraConfig(rank=4, alpha=7, start_from=str(tmp_path / kind)))


@pytest.mark.parametrize(
    ("start", "lora", "said"),
    [
        ({"random_weights": True}, {}, "makes them random"),
        ({"keep_layers": [0, 2]}, {}, "keep_layers makes a model that is in no folder, .* lora.save_merged=true"),
        ({"adapter_dir": "adapter"}, {}, "adapter_dir makes a model that is in no folder"),
        ({"adapter_dir": "adapter"}, {"start_from": "x", "save_merged": True}, "Leave one of them out"),
    ],
)
def test_starts_that_exclude_each_other(
    start: dict[str, Any], lora: dict[str, Any], said: str, hf_folder: Callable[..., Path]
) -> None:
    cfg = StartCheckpointerConfig(str(hf_folder("llama")), **start)
    config = from_hf_config(read_config(cfg.checkpoint_dir))
    with pytest.raises(ValueError, match=said):
        check_lora(LoraConfig(**lora), cfg, config, torch.float32, torch.device("cpu"), merged_dtype=None)
    with pytest.raises(ValueError, match="reads none"):
        check_start(StartCheckpointerConfig("x", "x", random_weights=True), None)


def test_some_layers_of_a_merged_model(adapter: Path, hf_folder: Callable[..., Path]) -> None:
    """The adapter is that of the whole model in the folder."""
    whole = dict(load(hf_folder("llama"), adapter_dir=adapter).named_parameters())
    for name, weight in load(hf_folder("llama"), adapter_dir=adapter, keep_layers=[2]).named_parameters():
        assert torch.equal(weight, whole[name.replace("layers.0.", "layers.2.")])
