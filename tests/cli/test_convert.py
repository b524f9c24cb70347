"""convert-config: configs of torchtune and of Model Optimizer in kdtune's settings."""

import copy
import functools
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdtune import config, conversion
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.data.formats import ALPACA

from .conftest import Run

# The keys and values of torchtune's llama3_2/8B_to_1B_KD_lora_single_device.
LLAMA = """
output_dir: runs/KD_lora
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 64
  lora_alpha: 128
  lora_dropout: 0.0
teacher_model:
  _component_: torchtune.models.llama3_1.llama3_1_8b
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: models/Llama-3.2-1B-Instruct/original/tokenizer.model
  max_seq_len: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: models/Llama-3.2-1B-Instruct
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
save_adapter_weights_only: False
teacher_checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: models/Llama-3.1-8B-Instruct
  checkpoint_files: [model-00001-of-00002.safetensors, model-00002-of-00002.safetensors]
  recipe_checkpoint: null
  output_dir: models/Llama-3.1-8B-Instruct
  model_type: LLAMA3
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
seed: null
shuffle: True
batch_size: 4
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  weight_decay: 0.01
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
kd_loss:
  _component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss
kd_ratio: 0.5
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
compile: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
log_peak_memory_stats: True
device: cuda
dtype: bf16
enable_activation_checkpointing: False
enable_activation_offloading: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiling_outputs
  cpu: True
  cuda: True
  profile_memory: False
  with_stack: False
  record_shapes: True
  with_flops: False
  wait_steps: 5
  warmup_steps: 3
  active_steps: 2
  num_cycles: 1
"""
# Where qwen2/1.5_to_0.5B_KD_lora_distributed says something else, and keys that its recipe reads beside.
QWEN = {
    "model": {
        "_component_": "torchtune.models.qwen2.lora_qwen2_0_5b",
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "quantize_base": True,
    },
    "teacher_model": {"_component_": "torchtune.models.qwen2.qwen2_1_5b"},
    "tokenizer": {
        "_component_": "torchtune.models.qwen2.qwen2_tokenizer",
        "path": "tokenizers/qwen2/vocab.json",
        "merges_file": "tokenizers/qwen2/merges.txt",
        "max_seq_len": 512,
    },
    "optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "betas": [0.8, 0.99], "eps": 1e-6},
    "kd_loss": {"_component_": "torchtune.modules.loss.SymmetricKLLoss", "sym_kd_ratio": 0.7, "num_output_chunks": 4},
    "dataset": {
        "_component_": "torchtune.datasets.instruct_dataset",
        "source": "json",
        "data_files": "rows.json",
        "split": "train[:95%]",
        "column_map": {"input": "question", "output": "answer"},
        "packed": True,
    },
    "clip_grad_norm": 1.0,
    "seed": 7,
    "metric_logger": {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "kd"},
    "fsdp_cpu_offload": True,
    "fsdp_reshard_after_forward": False,
    "enable_async_checkpointing": True,
    "save_every_n_steps": 50,
    "custom_sharded_layers": ["tok_embeddings", "output"],
}
# Keys of llama3_1/8B_lora that its recipes read and those of distillation do not.
LORA = {
    "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": "models/8B"}
    | {"adapter_checkpoint": None, "checkpoint_files": {"filename_format": "model-{}-of-{}.safetensors"}},
    "clip_grad_norm": 1.0,
    "enable_activation_checkpointing": True,
    "enable_activation_offloading": True,
    "tensor_parallel_dim": 2,
    "tensor_parallel_plan": {"_component_": "torchtune.models.llama3.base_llama_tp_plan"},
}
# Keys that recipes of torchtune's repository read, and those of its last release do not.
NEWER = {
    "dataset_val": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "split": "train[95%:]"},
    "run_val_every_n_steps": 100,
    "batch_size_val": 8,
    "data_parallel_shard_dim": 4,
    "data_parallel_replicate_dim": 3,
    "context_parallel_dim": 2,
    "context_parallel_rotate_method": "alltoall",
    "compile": {"model": True, "loss": False},
    "enable_fp8_training": True,
    "fp8_recipe_name": "tensorwise",
    "log_level": "INFO",
    "cudnn_deterministic_mode": None,
}
PAIRS = {
    "logit_layers": ["output_layer", "output_layer"],
    "intermediate_layer_pairs": [
        ["decoder.layers.0.input_layernorm", "decoder.layers.3.pre_mlp_layernorm"],
        ["decoder.final_layernorm", "decoder.layers.30", "mse"],
    ],
    "logit_kl_temperature": 2.0,
}


@pytest.fixture
def llama() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(LLAMA)
    return loaded


@pytest.fixture
def lora(llama: dict[str, Any]) -> dict[str, Any]:
    """A config of lora_finetune_distributed."""
    of_distillation = ("teacher_model", "teacher_checkpointer", "kd_loss", "kd_ratio")
    return {key: value for key, value in llama.items() if key not in of_distillation} | LORA


@pytest.fixture
def convert(tmp_path: Path, kdtune: Run) -> Any:
    """The nested settings that a config comes to, and what is told of it."""

    def run(theirs: dict[str, Any]) -> tuple[dict[str, Any], str]:
        path = tmp_path / "theirs.yaml"
        path.write_text(yaml.safe_dump(theirs))
        status, out, err = kdtune("convert-config", str(path))
        assert status == 0, err
        return yaml.safe_load(out), err

    return run


def load(settings: dict[str, Any], tmp_path: Path, *overrides: str, recipe: str = "knowledge_distillation") -> Any:
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(settings))
    schema = load_module(catalog.find_recipe(recipe)).Config
    return config.load(schema, path, overrides)


def test_llama_is_as_our_config_says(tmp_path: Path, llama: dict[str, Any], convert: Any) -> None:
    theirs = load(convert(llama)[0], tmp_path)
    ours = load({}, tmp_path, "checkpointer.checkpoint_dir=x", "output_dir=x")
    shipped = config.load(type(ours), catalog.find_config("llama3_2/8B_to_1B_KD_lora"), [])
    for name in ("checkpointer", "teacher_checkpointer", "teacher", "kd_ratio", "kd_loss", "ce_loss", "tokenizer"):
        assert getattr(theirs, name) == getattr(shipped, name)
    for name in ("batch_size", "gradient_accumulation_steps", "epochs", "lr_scheduler", "shuffle", "seed", "dtype"):
        assert getattr(theirs, name) == getattr(shipped, name)
    assert theirs.dataset.source == shipped.dataset.source
    turns, answer = shipped.dataset.prompt_template.split("{instruction}\n{input}")
    assert theirs.dataset.prompt_template.startswith(turns)
    assert theirs.dataset.prompt_template.endswith(answer)
    without_input = ALPACA.format(instruction="Add 1.")
    assert theirs.dataset.prompt_template.format(instruction="Add 1.", input="") == f"{turns}{without_input}{answer}"
    assert theirs.dataset.train_on_input  # torchtune's default for Alpaca
    assert (theirs.lora.rank, theirs.lora.alpha, theirs.lora.save_merged) == (64, 128, True)
    assert theirs.lora.target_modules == ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # Defaults that are not kdtune's: torch.optim.AdamW's, and no clipping.
    assert (theirs.optimizer.lr, theirs.optimizer.beta2, theirs.clip_grad_norm) == (3e-4, 0.999, None)
    assert theirs.output_dir == "runs/KD_lora"


def test_qwen_distributed(tmp_path: Path, llama: dict[str, Any], convert: Any) -> None:
    settings, told = convert(llama | QWEN)
    found = load(settings, tmp_path)
    assert (found.lora.rank, found.lora.alpha) == (8, 16)  # the builder's defaults
    assert (found.lora.target_modules, found.lora.base_quantization) == (["all-linear"], "nf4")
    assert (found.tokenizer.path, found.tokenizer.max_seq_len) == ("tokenizers/qwen2/vocab.json", 512)
    assert (found.optimizer.name, found.optimizer.beta1, found.optimizer.eps) == ("adamw_8bit", 0.8, 1e-6)
    assert (found.optimizer.lr, found.optimizer.weight_decay) == (1e-3, 0.01)
    assert (found.kd_loss.name, found.kd_loss.beta) == ("symmetric_kl", 0.7)
    rows = found.dataset
    assert (rows.source, rows.split, rows.packed, rows.train_on_input) == ("rows.json", "[:95%]", True, False)
    assert rows.prompt_template == "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"
    assert rows.column_map == {"input": "question", "output": "answer"}
    assert (found.seed, found.clip_grad_norm, found.metric_logger.wandb_project) == (7, None, "kd")
    assert (found.parallel.offload, found.parallel.reshard_after_forward) == (True, False)
    assert (found.save_in_background, found.save_every_n_steps) == (True, 50)
    assert "Not carried over" not in told
    assert "custom_sharded_layers=['tok_embeddings', 'output']: weights are gathered a layer at a time" in told
    assert "clip_grad_norm=1.0: torchtune's distillation recipes divide the gradient by its tokens twice" in told
    assert "kd_loss.num_output_chunks=4" in told


def test_fine_tuning(tmp_path: Path, lora: dict[str, Any], kdtune: Run) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(lora))
    output = tmp_path / "ours.yaml"
    status, out, told = kdtune("convert-config", str(tmp_path / "theirs.yaml"), "--output", str(output))
    assert status == 0, told
    assert out.endswith(f"  kdtune run finetune --config {output}\n")
    assert catalog.launched_by(output) == "finetune"
    found = load(yaml.safe_load(output.read_text()), tmp_path, recipe="finetune")
    assert (found.checkpointer.checkpoint_dir, found.lora.rank, found.optimizer.lr) == ("models/8B", 64, 3e-4)
    assert (found.enable_activation_checkpointing, found.enable_activation_offloading) == (True, True)
    assert (found.clip_grad_norm, found.parallel.tensor) == (1.0, 2)
    assert "distillation" not in told
    assert "teacher" not in told
    assert "Not carried over" not in told

    for given, expected in (("inf", None), (None, None), (0.5, 0.5)):
        assert conversion.convert(lora | {"clip_grad_norm": given}).settings["clip_grad_norm"] == expected
    quantizer = {"_component_": "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer"}
    told = [why for _, what, why in conversion.convert(lora | {"quantizer": quantizer}).notes if "quantizer" in what]
    assert told == ["rounding in training is qat.weights, qat.group_size and qat.activations."]
    lora["model"] = {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}
    assert not [key for key in conversion.convert(lora).settings if key.startswith("lora")]


@pytest.mark.parametrize("lacking", ["model", "dataset", "optimizer", "loss"])
def test_what_does_not_fine_tune(lacking: str, lora: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="neither a teacher"):
        conversion.convert({key: value for key, value in lora.items() if key != lacking})
    with pytest.raises(ValueError, match="neither a teacher"):
        conversion.convert(lora | {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}})


def leaves(node: Any, trail: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict):
        for name, inner in node.items():
            yield from leaves(inner, (*trail, name))
    else:
        yield trail


def changed(theirs: dict[str, Any], trail: tuple[Any, ...], value: Any) -> dict[str, Any]:
    theirs = copy.deepcopy(theirs)
    node = theirs
    for name in trail[:-1]:
        node = node[name]
    node[trail[-1]] = value
    return theirs


def answer(theirs: dict[str, Any]) -> tuple[Any, ...]:
    found = conversion.convert(theirs)
    return found.settings, found.notes, found.wanted


@pytest.mark.parametrize("name", ["llama", "qwen", "lora", "newer"])
def test_no_torchtune_key_is_dropped_silently(name: str, llama: dict[str, Any], lora: dict[str, Any]) -> None:
    theirs = {"llama": llama, "qwen": llama | QWEN, "lora": lora, "newer": llama | NEWER}[name]
    before = answer(theirs)
    for trail in leaves(theirs):
        value = functools.reduce(operator.getitem, trail, theirs)
        other = not value if isinstance(value, bool) else 12345
        if trail != ("loss", "_component_") or name != "lora":  # by which fine-tuning is known
            assert answer(changed(theirs, trail, other)) != before, trail
        if {"column_map", "checkpoint_files"} & set(trail):  # maps of which any name is taken
            continue
        unknown = changed(theirs, (*trail[:-1], "unheard_of"), 1)
        assert any("unheard_of=1" in what for _, what, _ in conversion.convert(unknown).notes), trail


@pytest.mark.parametrize("value", [None, True, -1, "x", "", [], [1, None], [["x"]], {}, {"x": {"y": 1}}])
def test_whatever_is_given_ends_in_settings_or_one_message(
    value: Any, llama: dict[str, Any], lora: dict[str, Any]
) -> None:
    for theirs in (
        llama,
        llama | QWEN,
        lora,
        llama | NEWER,
        PAIRS,
        PAIRS | {"skip_lm_loss": False, "kd_loss_scale": 2.0},
    ):
        for trail in [*leaves(theirs), *((name,) for name in theirs)]:
            try:
                conversion.convert(changed(theirs, trail, value))
            except ValueError as error:
                assert str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            {"_component_": "torchtune.datasets.chat_dataset", "source": "o/chats", "conversation_column": "dialogue"}
            | {"conversation_style": "openai", "split": "validation", "masking_strategy": "train_on_last"},
            {"source": "o/chats", "format": "chat", "split": "validation", "column_map": {"messages": "dialogue"}}
            | {"train_on_last_turn": True, "train_on_input": False},
        ),
        (
            {"_component_": "torchtune.datasets.slimorca_dataset", "train_on_input": True},
            {"source": "Open-Orca/SlimOrca-Dedup", "format": "chat", "train_on_input": True},
        ),
        (
            {"_component_": "torchtune.datasets.text_completion_dataset", "source": "allenai/c4", "column": "page"}
            | {"name": "en", "split_across_pack": True},
            {"source": "allenai/c4", "name": "en", "format": "text", "column_map": {"text": "page"}},
        ),
        (
            {"_component_": "torchtune.datasets.samsum_dataset", "train_on_input": False},
            {"source": "Samsung/samsum", "format": "instruct", "train_on_input": False}
            | {"column_map": {"input": "dialogue", "output": "summary"}, "prompt_template": "[INST] {input} [/INST]"},
        ),
        (
            {"_component_": "torchtune.datasets.alpaca_dataset", "masking_strategy": "train_on_assistant"},
            {"source": "tatsu-lab/alpaca", "format": "instruct", "train_on_input": False},
        ),
    ],
    ids=["chat", "sharegpt", "text", "pairs", "alpaca"],
)
def test_data_sets(
    rows: dict[str, Any], expected: dict[str, Any], tmp_path: Path, llama: dict[str, Any], convert: Any
) -> None:
    llama |= {"dataset": rows, "tokenizer": {"_component_": "torchtune.models.mistral.mistral_tokenizer"}}
    if "alpaca" in rows["_component_"]:
        llama["tokenizer"]["prompt_template"] = None  # no turns, so that both of Alpaca's wordings are kdtune's default
    found = convert(llama)[0]
    assert found["dataset"] == expected | {"packed": False}
    load(found, tmp_path)


def test_several_data_sets_are_a_blend(tmp_path: Path, llama: dict[str, Any], convert: Any) -> None:
    alpaca = {"_component_": "torchtune.datasets.alpaca_dataset", "packed": True}
    text = {"_component_": "torchtune.datasets.text_completion_dataset", "source": "a/b", "max_seq_len": 99}
    settings, told = convert(llama | {"dataset": [alpaca, text]})
    found = load(settings, tmp_path)
    assert {name: source.source for name, source in found.dataset.sources.items()} == {
        "rows_1": "tatsu-lab/alpaca",
        "rows_2": "a/b",
    }
    assert found.dataset.packed
    assert found.tokenizer.max_seq_len == 99
    assert "dataset.packed=[True, False]: some of the data sets are packed there" in told


def test_newer_keys(tmp_path: Path, lora: dict[str, Any], convert: Any) -> None:
    settings, told = convert(lora | NEWER)
    found = load(settings, tmp_path, recipe="finetune")
    assert (found.dataset_val.source, found.dataset_val.split) == ("yahma/alpaca-cleaned", "train[95%:]")
    assert found.dataset_val.prompt_template == found.dataset.prompt_template
    assert found.dataset_val.train_on_input
    assert found.run_val_every_n_steps == 100
    parallel = found.parallel
    assert (parallel.data_shard, parallel.data_replicate, parallel.context, parallel.tensor) == (4, 3, 2, 2)
    assert found.compile
    lost, different = told.partition("Carried over, with another meaning")[::2]
    assert "enable_fp8_training=true: " in lost
    assert "kdtune has no such setting" not in told
    assert "compile.loss=false: kdtune compiles layers and loss, or neither" in different

    as_defaults = {"data_parallel_shard_dim": -1, "compile": {}, "enable_fp8_training": False}
    settings, told = convert(lora | NEWER | as_defaults | {"run_val_every_n_steps": None})
    found = load(settings, tmp_path, recipe="finetune")
    assert found.parallel.data_shard is None
    assert found.compile
    assert found.run_val_every_n_steps == 0
    assert "Not carried over" not in told
    assert "run_val_every_n_steps=null: there the rows are then not looked at" in told
    off = {"compile": {"model": False, "loss": False, "flex_attention": True}}
    assert not load(convert(lora | off)[0], tmp_path, recipe="finetune").compile


@pytest.mark.parametrize(
    ("mode", "option", "ours"),
    [
        ("full", None, {"enable_activation_checkpointing": True}),
        ("selective", 1, {"enable_activation_checkpointing": True}),
        ("selective", "2", {"enable_activation_checkpointing": True, "activation_checkpointing_mode": "selective"}),
        (None, None, {}),
    ],
)
def test_activation_checkpointing_by_mode(
    mode: str | None, option: object, ours: dict[str, Any], lora: dict[str, Any]
) -> None:
    for key in ("enable_activation_checkpointing", "enable_activation_offloading"):
        del lora[key]
    found = conversion.convert(lora | {"ac_mode": mode, "ac_option": option})
    assert {key: value for key, value in found.settings.items() if "activation" in key} == ours
    told = [what for kind, what, _ in found.notes if kind == "different" and what.startswith("ac_")]
    assert told == (["ac_option=2"] if option == "2" else [])
    found = conversion.convert(lora | {"ac_mode": mode, "ac_option": option, "enable_activation_checkpointing": True})
    assert found.settings["enable_activation_checkpointing"]
    told = [why for _, what, why in found.notes if what == f"ac_mode={mode}"]
    assert told == (["beside enable_activation_checkpointing it has nothing recomputed there."] if mode else [])


@pytest.mark.parametrize(
    ("trail", "value", "words"),
    [
        (("model", "_component_"), "torchtune.models.gemma.lora_gemma_2b", "kdtune has no models of the family gemma"),
        (("optimizer", "_component_"), "torch.optim.SGD", "kdtune has AdamW alone, and takes it"),
        (("kd_loss", "_component_"), "mine.TopKLoss", "kdtune has no loss of that name, and takes forward_kl"),
        (("dtype",), "fp16", "kdtune has bf16 and fp32, and takes bf16"),
        (("resume_from_checkpoint",), True, "a run of torchtune cannot be continued"),
        (("teacher_checkpointer", "checkpoint_files"), ["hf_model_0001_0.pt"], "written by torch.save"),
        (("checkpointer", "_component_"), "torchtune.training.FullModelMetaCheckpointer", "Hugging Face folders alone"),
        (("dataset", "_component_"), "mine.rows", "kdtune reads rows by dataset.source and dataset.format"),
    ],
)
def test_what_is_lost_is_told(
    trail: tuple[str, ...], value: Any, words: str, llama: dict[str, Any], convert: Any
) -> None:
    title, _, told = convert(changed(llama, trail, value))[1].partition("\n")
    assert title == "Not carried over:"
    line = told.partition("\n")[0]
    assert line.startswith(f"  {'.'.join(trail)}=")
    assert words in line


def test_a_whole_student(llama: dict[str, Any]) -> None:
    llama["model"] = {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}
    assert not [key for key in conversion.convert(llama).settings if key.startswith("lora")]


def test_model_optimizer(tmp_path: Path, convert: Any) -> None:
    settings, told = convert({"logit_kl_temperature": 2.0, "logit_kl_topk": 100, "logit_layers": ["output_layer"] * 2})
    needed = ("checkpointer.checkpoint_dir=x", "teacher_checkpointer.checkpoint_dir=x", "output_dir=x")
    found = load(settings, tmp_path, *needed)
    assert (found.kd_ratio, found.kd_loss.temperature, found.kd_loss.scale_by_temperature_squared) == (1, 2, False)
    assert "logit_kl_topk=100: a teacher that is asked in the run" in told
    assert "store.kind=top_k store.top_k=100" in told
    assert all(pair.partition("=")[0] in told for pair in needed)

    found = load(convert({"skip_lm_loss": False, "kd_loss_scale": 3.0})[0], tmp_path, *needed)
    assert (1 - found.kd_ratio) * found.ce_loss.weight == 1  # LM + 3 KD sg(LM / KD)
    assert (found.kd_ratio * found.kd_loss.weight, found.kd_loss.balance) == (3, True)

    written = {"_target_": "megatron.bridge.ModelOptDistillConfig", "kd_loss_alpha": 0.9}  # as Megatron Bridge saves it
    settings, told = convert({"model": {"kd_config": written, "num_layers": 4}})
    assert settings == {"kd_ratio": 0.9}
    assert "model.num_layers=4: model folders are named instead" in told
    assert "model.kd_config._target_" not in told.partition("Not needed here:")[0]


def test_pairs_of_modules(tmp_path: Path, convert: Any) -> None:
    settings, told = convert(PAIRS)
    load(settings, tmp_path, "checkpointer.checkpoint_dir=x", "teacher_checkpointer.checkpoint_dir=x", "output_dir=x")
    assert settings["hidden_loss"] == {
        "pairs": [
            {
                "student": "model.layers.0.input_layernorm",
                "teacher": "model.layers.3.post_attention_layernorm",
                "loss": "cosine",
            },
            {"student": "model.norm", "teacher": "model.layers.30", "loss": "mse"},
        ],
        "balance": True,
    }
    assert "hidden_loss.projection=shared" in told
    fused = [["decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.mlp"], ["decoder.final_layernorm"]]
    settings, told = convert(PAIRS | {"intermediate_layer_pairs": fused})
    assert "hidden_loss" not in settings
    assert "the outputs of decoder.layers.0.self_attention.linear_qkv: it knows those of" in told
    assert "['decoder.final_layernorm']: a pair is" in told


@pytest.mark.parametrize(("ce", "kd", "hidden"), [(4.0, 1.5, 0.3), (2.0, 3.0, 9.0)])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("theirs", [{}, {"skip_lm_loss": False, "kd_loss_scale": 2.5}, {"kd_loss_alpha": 0.8}])
def test_losses_weigh_as_in_model_optimizer(
    theirs: dict[str, Any], pairs: bool, ce: float, kd: float, hidden: float
) -> None:
    """What each term is multiplied by: in Model Optimizer's balancers, and by these settings."""
    ours = conversion.convert(theirs | (PAIRS if pairs else {"logit_kl_temperature": 2.0})).settings
    ratio = ours["kd_ratio"]
    kd_factor = ce / kd if ours.get("kd_loss.balance") else 1.0
    found = [(1 - ratio) * ours.get("ce_loss.weight", 1.0), ratio * ours.get("kd_loss.weight", 1.0) * kd_factor]
    if pairs:
        assert ours["hidden_loss.balance"]  # to the size of the balanced divergence
        found.append(ratio * ours.get("hidden_loss.weight", 1.0) * kd_factor * kd / hidden)

    terms = [1.0, kd / hidden] if pairs else [1.0]
    if "kd_loss_alpha" in theirs:
        expected = [0.2, *(0.8 * term for term in terms)]
    elif "kd_loss_scale" in theirs:
        expected = [1.0, *(2.5 * ce / (kd * len(terms)) * term for term in terms)]
    else:
        expected = [0.0, *terms]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\n", "Whose config is this? It has a, b. Known are those of torchtune's distillation and"),
        ("", "It has nothing in it"),
        (
            "model: {_component_: torchtune.models.llama3_2.llama3_2_1b}\n",
            "but neither a teacher (teacher_model, kd_loss) nor",
        ),
        ("kd_loss_scale: ${oc.env:HOME}\n", "'${oc.env:HOME}' is not resolved"),
        ("kd_loss_scale: ${nope.x}\n", "${nope.x} leads nowhere"),
        ("kd_loss_scale: ${skip_lm_loss}\nskip_lm_loss: ${kd_loss_scale}\n", "leads back to itself"),
        (
            "a0: x\n" + "".join(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}\n" for i in range(1, 60)) + "kd_loss_scale: 1\n",
            "Settings lead to others in more than 10,000 places",
        ),
        ("skip_lm_loss: false\nkd_loss_scale: [1]\n", "kd_loss_scale wants a number"),
        ("a: [\n", "line 2, column 1: not YAML"),
        ("kd_loss_scale: !!python/object/apply:os.system [exit]\n", "not YAML: could not determine a constructor"),
        ("- a\n", "this is a list"),
    ],
)
def test_refused(text: str, words: str, tmp_path: Path, kdtune: Run) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    status, out, err = kdtune("convert-config", str(path))
    assert (status, out) == (2, "")
    assert words in err
    assert err.count(str(path)) == 1


def test_output(tmp_path: Path, kdtune: Run) -> None:
    (tmp_path / "theirs.yaml").write_text(LLAMA)
    output = tmp_path / "ours.yaml"
    command = ("convert-config", str(tmp_path / "theirs.yaml"), "--output", str(output))
    status, out, err = kdtune(*command)
    assert (status, out) == (
        0,
        f"Written to {output}. Check it, then run it with:\n  kdtune run knowledge_distillation --config {output}\n",
    )
    assert "Not needed here:\n" in err
    assert output.read_text().startswith("# Converted from torchtune's theirs.yaml by kdtune ")
    assert catalog.launched_by(output) == "knowledge_distillation"
    assert kdtune("validate", "knowledge_distillation", "--config", str(output))[0] == 0

    output.write_text("precious")
    assert "--force" in kdtune(*command)[2]
    assert output.read_text() == "precious"
    assert kdtune(*command, "--force")[0] == 0
    assert "No folder" in kdtune(*command[:-1], str(tmp_path / "none" / "x.yaml"))[2]
    assert "No config file" in kdtune("convert-config", "nowhere.yaml")[2]
