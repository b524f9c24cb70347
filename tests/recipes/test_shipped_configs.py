"""The shipped configs against folders of the true shapes: published config.json, vocabulary and tokenizer sizes."""

import dataclasses
import json
import math
import os
import re
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers

import kdtune.tokenizers
from kdtune import checkpoint, memory, planning
from kdtune.cli import catalog
from kdtune.cli.main import main
from kdtune.cli.recipe import load_module
from kdtune.config import load
from kdtune.models import from_hf_config, num_parameters, parameter_shapes

RECIPE = "knowledge_distillation"
CONFIGS = [config.name for config in catalog.configs(RECIPE) if config.name.endswith("_KD")]
ADAPTED = {config.name: config.recipe for config in catalog.configs() if config.name.endswith("lora")}

# By name on the hub: what config.json says there, and the number of parameters that the hub counts in the weights.
PUBLISHED = json.loads((Path(__file__).parent / "published_models.json").read_text())

# By the beginning of the model's name: ids of text, special tokens, some of those, and those that have a role.
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3_ROLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TOKENIZERS = {
    "Llama-3": (128_000, 256, LLAMA3, LLAMA3_ROLES),
    "Qwen2-": (151_643, 3, CHATML, QWEN_ROLES),
    "Qwen2.5-": (151_643, 22, CHATML, QWEN_ROLES),
    "Qwen3-": (151_643, 26, [*CHATML, "<think>", "</think>"], QWEN_ROLES),
    "SmolLM2-": (49_135, 17, CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}),
}


def parse(name: str, *overrides: str) -> Any:
    recipe = ADAPTED.get(name, RECIPE)
    return load(load_module(catalog.find_recipe(recipe)).Config, catalog.find_config(name, recipe), overrides)


def header(name: str) -> str:
    """The comment that a config starts with, as one line."""
    comment = re.match(r"(#.*\n)+", catalog.find_config(name, ADAPTED.get(name, RECIPE)).read_text())
    assert comment
    return " ".join(comment[0].replace("#", " ").split())


def downloads(name: str) -> dict[str, str]:
    """Folder -> name on the hub, out of the header's download lines."""
    return {folder: hub for hub, folder in re.findall(r"kdtune download (\S+) --output-dir (\S+)", header(name))}


@cache
def tokenizer_files(prefix: str) -> dict[str, str]:
    """A byte-level tokenizer of the models' real size, whose further ids never come up."""
    num_text, num_special, special, roles = TOKENIZERS[prefix]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = [*alphabet, *(f"filler{i}" for i in range(num_text - len(alphabet)))]
    special = [*special, *(f"<|special_{i}|>" for i in range(num_special - len(special)))]
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: id for id, piece in enumerate(text)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    assert tokenizer.get_vocab_size() == num_text + num_special
    settings = {**roles, "add_bos_token": "bos_token" in roles}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}


def write_tokenizer(folder: Path, hub_name: str) -> None:
    (prefix,) = [prefix for prefix in TOKENIZERS if hub_name.split("/")[1].startswith(prefix)]
    for name, text in tokenizer_files(prefix).items():
        (folder / name).write_text(text)


def write_sparse_weights(folder: Path, config: dict[str, Any]) -> None:
    """A safetensors file of full length, of which the disk holds no more than the header."""
    entries, end = {}, 0
    for name, shape in parameter_shapes(from_hf_config(config)).items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(entries).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    os.truncate(path, 8 + len(encoded) + end)


def write_rows(path: Path, count: int) -> None:
    rows = ({"instruction": f"Count to {i}.", "input": "", "output": f"1 to {i} it is."} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory, so that the relative paths of the configs lead into it."""
    monkeypatch.chdir(tmp_path)
    # Whether the tests' own disk would hold a run's checkpoints is no matter here.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**50))
    return tmp_path


def test_all_are_there() -> None:
    assert CONFIGS == [
        "llama3_2/3B_to_1B_KD",
        "llama3_2/8B_to_1B_KD",
        "qwen2/1.5B_to_0.5B_KD",
        "qwen2_5/7B_to_0.5B_KD",
        "qwen3/8B_to_0.6B_KD",
        "smollm2/1.7B_to_135M_KD",
    ]


@pytest.mark.parametrize("hub_name", PUBLISHED)
def test_published_number_of_parameters(hub_name: str) -> None:
    model = PUBLISHED[hub_name]
    assert num_parameters(from_hf_config(model["config"])) == model["parameters"]


def write_configs(name: str) -> None:
    """Folders as the header's download lines make them, of which a plan needs no more than config.json."""
    for folder, hub_name in downloads(name).items():
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text(json.dumps(PUBLISHED[hub_name]["config"]))


def plan(name: str, *overrides: str) -> planning.Plan:
    recipe = load_module(catalog.find_recipe(ADAPTED.get(name, RECIPE)))
    return planning.plan(parse(name, *overrides), recipe.build, recipe.forward_backward)


# A plan of these takes seconds, so one of them stands for the others in the default tier.
@pytest.mark.parametrize(
    "name",
    [
        name if name == "smollm2/1.7B_to_135M_KD" else pytest.param(name, marks=pytest.mark.slow)
        for name in (*CONFIGS, *ADAPTED)
    ],
)
def test_header(name: str, workplace: Path) -> None:
    """It says where the models come from, and the memory that these settings need."""
    cfg = parse(name)
    folders = {cfg.checkpointer.checkpoint_dir}
    if hasattr(cfg, "teacher_checkpointer"):
        folders.add(cfg.teacher_checkpointer.checkpoint_dir)
    assert set(downloads(name)) == folders
    assert (cfg.device, cfg.dtype) == ("cuda", "bf16")
    write_configs(name)
    planned = plan(name)
    size, *smaller = (int(size) for size in re.findall(r"for a GPU of (\d+) GB", header(name)))
    tokens = f"{cfg.batch_size} x {cfg.tokenizer.max_seq_len:,} tokens"
    assert f"Memory at {tokens}: about {planned}, for a GPU of {size} GB." in header(name)
    assert planning.fits(planned, size)
    if not cfg.enable_activation_checkpointing:
        checkpointed = plan(name, "enable_activation_checkpointing=true")
        total = memory.format_bytes(checkpointed.device.total)
        told = f"With enable_activation_checkpointing=true about {total}, for a GPU of {smaller[0]} GB."
        assert told in header(name)
        assert planning.fits(checkpointed, smaller[0])


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and student have the same tokenizer files, and a vocabulary of true size takes half a second to read."""
    load = kdtune.tokenizers.load
    found: dict[bytes, kdtune.tokenizers.Tokenizer] = {}

    def load_once(path: str | Path) -> kdtune.tokenizers.Tokenizer:
        content = Path(path, "tokenizer.json").read_bytes()
        if content not in found:
            found[content] = load(path)
        return found[content]

    monkeypatch.setattr(kdtune.tokenizers, "load", load_once)


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run(name: str, workplace: Path, read_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    """As shipped, but for the device and the rows: everything that is checked before a weight is read."""
    write_configs(name)
    for folder, hub_name in downloads(name).items():
        write_sparse_weights(Path(folder), PUBLISHED[hub_name]["config"])
        write_tokenizer(Path(folder), hub_name)
    write_rows(workplace / "rows.jsonl", 100)
    main(["run", RECIPE, "--config", name, "dataset.source=rows.jsonl", "device=cpu", "--dry-run"])

    told = capsys.readouterr().out
    for folder, hub_name in downloads(name).items():
        assert f"{folder}: {PUBLISHED[hub_name]['parameters'] / 1e6:,.1f} M parameters" in told
    assert re.search(r"^run +4 steps, bf16", told, re.MULTILINE), "98 of 100 rows, 32 in a step"
    assert not Path("runs").exists()

    cfg = parse(name)
    tokenizer = kdtune.tokenizers.load(cfg.checkpointer.checkpoint_dir)
    marks = re.findall(r"<[|/\w]+>", cfg.dataset.prompt_template)
    assert marks
    assert all(len(tokenizer.encode(mark, bos=False)) == 1 for mark in marks), "turns are marked by special tokens"


def parse_adapted(name: str) -> Any:
    recipe = ADAPTED[name]
    return load(load_module(catalog.find_recipe(recipe)).Config, catalog.find_config(name, recipe), [])


def test_adapters_are_there() -> None:
    """Of each family, with LoRA and with QLoRA."""
    pairs = {name for name in CONFIGS if name != "llama3_2/3B_to_1B_KD"}
    assert set(ADAPTED) == {f"{base}_{kind}" for base in (*pairs, "llama3_1/8B") for kind in ("lora", "qlora")}


@pytest.mark.parametrize("name", [name for name in ADAPTED if name.startswith(tuple(CONFIGS))])
def test_adapters_of_a_pair_learn_from_the_same_rows(name: str) -> None:
    """Nothing else is different, so that they can be compared."""
    found, expected = dataclasses.asdict(parse_adapted(name)), dataclasses.asdict(parse(name.rpartition("_")[0]))
    different = {key for key in expected if found[key] != expected[key]}
    assert different - {"teacher", "enable_activation_checkpointing"} == {"lora", "optimizer", "output_dir"}
    assert found["teacher"]["quantization"] == ("int8" if name.endswith("qlora") else None)
    assert bool(found["lora"]["base_quantization"]) == name.endswith("qlora")


@pytest.mark.parametrize(
    "name", [name if name.startswith("smollm2/") else pytest.param(name, marks=pytest.mark.slow) for name in ADAPTED]
)
def test_dry_run_of_an_adapter(name: str, workplace: Path, read_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = catalog.find_config(name, ADAPTED[name])
    folders = dict(
        reversed(found) for found in re.findall(r"kdtune download (\S+) --output-dir (\S+)", path.read_text())
    )
    for folder, hub_name in folders.items():
        Path(folder).mkdir(parents=True)
        config = PUBLISHED[hub_name]["config"]
        Path(folder, "config.json").write_text(json.dumps(config))
        write_sparse_weights(Path(folder), config)
        write_tokenizer(Path(folder), hub_name)
    write_rows(workplace / "rows.jsonl", 100)
    main(["run", ADAPTED[name], "--config", name, "dataset.source=rows.jsonl", "device=cpu", "--dry-run"])
    cfg = parse_adapted(name)
    layers = checkpoint.read_config(cfg.checkpointer.checkpoint_dir)["num_hidden_layers"]
    assert f"rank 16 beside {7 * layers} of its weights" in capsys.readouterr().out
    assert set(folders) == {cfg.checkpointer.checkpoint_dir} | (
        {cfg.teacher_checkpointer.checkpoint_dir} if ADAPTED[name] == RECIPE else set()
    )


def test_vocabularies_of_qwen2_5_differ_by_padding() -> None:
    """The pair of the dry run that needs more than equal sizes."""
    sizes = {name: PUBLISHED[name]["config"]["vocab_size"] for name in downloads("qwen2_5/7B_to_0.5B_KD").values()}
    assert sizes == {"Qwen/Qwen2.5-7B-Instruct": 152_064, "Qwen/Qwen2.5-0.5B-Instruct": 151_936}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_step(name: str, workplace: Path) -> None:
    """One optimizer step on the CPU at true width and vocabulary, with one layer and random weights."""
    for seed, (folder, hub_name) in enumerate(downloads(name).items()):
        Path(folder).mkdir(parents=True)
        config = PUBLISHED[hub_name]["config"] | {"num_hidden_layers": 1}
        Path(folder, "config.json").write_text(json.dumps(config))
        write_tokenizer(Path(folder), hub_name)
        model = checkpoint.load_model(folder, dtype=torch.bfloat16, device="cpu", random_weights=True, seed=seed)
        checkpoint.save_model(model, folder, config=config)
        del model
    write_rows(workplace / "rows.jsonl", 50)
    overrides = ["dataset.source=rows.jsonl", "device=cpu", "tokenizer.max_seq_len=256"]
    overrides += ["gradient_accumulation_steps=2", "lr_scheduler.num_warmup_steps=0", "max_steps=1"]
    main(["run", RECIPE, "--config", name, *overrides])

    cfg = parse(name)
    finished = Path(cfg.output_dir, "model")
    config = checkpoint.read_config(finished)
    lines = [json.loads(line) for line in Path(cfg.output_dir, "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if "loss" in line]
    # Random weights know nothing: close to a uniform guess, and not the same in teacher and student.
    assert step["ce_loss"] == pytest.approx(math.log(config["vocab_size"]), abs=1.5)
    assert 0.01 < step["kd_loss"] < 5
    assert step["loss"] == pytest.approx(0.5 * step["ce_loss"] + 0.5 * step["kd_loss"])
    assert step["grad_norm"] > 0
    checkpoint.check_files(finished, from_hf_config(config))
    before, after = (
        checkpoint.load_model(folder, dtype=torch.bfloat16, device="cpu").state_dict()
        for folder in (cfg.checkpointer.checkpoint_dir, finished)
    )
    unmoved = [key for key in before if "norm" not in key and torch.equal(before[key], after[key])]
    assert not unmoved
    shutil.rmtree(workplace)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
def test_step_of_an_adapter(name: str, workplace: Path) -> None:
    """One optimizer step on the CPU at true width and vocabulary, with one layer and random weights."""
    cfg = parse_adapted(name)
    text = catalog.find_config(name, ADAPTED[name]).read_text()
    for hub_name, folder in re.findall(r"kdtune download (\S+) --output-dir (\S+)", text):
        Path(folder).mkdir(parents=True)
        config = PUBLISHED[hub_name]["config"] | {"num_hidden_layers": 1}
        Path(folder, "config.json").write_text(json.dumps(config))
        write_tokenizer(Path(folder), hub_name)
        model = checkpoint.load_model(folder, dtype=torch.bfloat16, device="cpu", random_weights=True)
        checkpoint.save_model(model, folder, config=config)
        del model
    write_rows(workplace / "rows.jsonl", 50)
    overrides = ["dataset.source=rows.jsonl", "device=cpu", "tokenizer.max_seq_len=256"]
    overrides += ["gradient_accumulation_steps=2", "lr_scheduler.num_warmup_steps=0", "max_steps=1"]
    main(["run", ADAPTED[name], "--config", name, *overrides])
    tensors = load_file(Path(cfg.output_dir, "adapter", "adapter_model.safetensors"))
    assert len(tensors) == 14
    assert all(tensor.any() for tensor in tensors.values()), "B is no longer 0"
    checkpoint.load_model(
        cfg.checkpointer.checkpoint_dir,
        dtype=torch.bfloat16,
        device="cpu",
        adapter_dir=Path(cfg.output_dir, "adapter"),
    )
    shutil.rmtree(workplace)
