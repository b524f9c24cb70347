"""Configs of torchtune's recipes knowledge_distillation, full_finetune and lora_finetune, for one device and several.

Defaults are those of torchtune 0.6.1 and of its repository at commit bd2a0fc7c. Where kdtune's default is another one,
theirs is written out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from kdtune.conversion.given import Converted, Given
from kdtune.conversion.torchtune_data import convert_dataset

_CONFIG_JSON = "the architecture is read from config.json in the model's folder."
_FAMILIES = (
    "llama2",
    "code_llama2",
    "llama3",
    "llama3_1",
    "llama3_2",
    "llama3_3",
    "mistral",
    "qwen2",
    "qwen2_5",
    "qwen3",
)
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj", "o_proj": "o_proj"}
_MLP = ["gate_proj", "up_proj", "down_proj"]
_DIVERGENCES = {"ForwardKLLoss": "forward_kl", "ReverseKLLoss": "reverse_kl", "SymmetricKLLoss": "symmetric_kl"}
_CROSS_ENTROPIES = ("CEWithChunkedOutputLoss", "LinearCrossEntropyLoss", "CrossEntropyLoss")
_OPTIMIZERS = {
    **{"AdamW": "adamw", "PagedAdamW": "adamw", "Adam": "adamw"},
    **{"AdamW8bit": "adamw_8bit", "PagedAdamW8bit": "adamw_8bit", "AdamW4bit": "adamw_4bit", "AdamWFp8": "adamw_fp8"},
}


def names_classes(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Mapping) and "_component_" in value for value in values.values())


def recognises(values: Mapping[Any, Any]) -> bool:
    return names_classes(values) and (_has_teacher(values) or _is_fine_tuning(values))


def _has_teacher(values: Mapping[Any, Any]) -> bool:
    return bool({"teacher_model", "teacher_checkpointer", "kd_loss"} & values.keys())


def _is_fine_tuning(values: Mapping[Any, Any]) -> bool:
    """Preference training has a loss of its own, and what only generates or evaluates has none."""
    loss = values.get("loss")
    name = loss.get("_component_") if isinstance(loss, Mapping) else None
    return str(name).rpartition(".")[2] in _CROSS_ENTROPIES and {"model", "dataset", "optimizer"} <= values.keys()


def convert(values: Mapping[Any, Any]) -> Converted:
    has_teacher = _has_teacher(values)
    result = Converted("torchtune", recipe="knowledge_distillation" if has_teacher else "finetune")
    given = Given(values, result)
    model_dir = _checkpointer(given, "checkpointer", "output_dir" in given)
    if has_teacher:
        _checkpointer(given, "teacher_checkpointer")
    _student(given)
    if has_teacher:
        _teacher(given.section("teacher_model"))
    turns = _tokenizer(given, model_dir)
    convert_dataset(given.take("dataset"), result, turns)
    _validation(given, turns)
    _length(given)
    if has_teacher:
        _divergence(given)
    _cross_entropy(given)
    _optimizer(given)
    _clipping(given, has_teacher)
    _checkpointing(given, has_teacher)
    _run(given)
    _processes(given)
    _compile(given)
    _logging(given)
    given.section("quantizer").close("rounding in training is qat.weights, qat.group_size and qat.activations.")
    given.close()
    return result


def component(given: Given) -> tuple[str, str]:
    """The last two names of `_component_`: the module that a function or class is in, and its own."""
    *_, module, name = ["", "", *str(given.peek("_component_")).split(".")]
    return module, name


def listed(value: Any) -> list[str]:
    """The names of a list, of one name, or of {filename_format: ..., max_filename: ...}."""
    names = list(value.values()) if isinstance(value, Mapping) else value or []
    return [str(name) for name in (names if isinstance(names, list) else [names])]


def _checkpointer(given: Given, role: str, has_output_dir: bool = True) -> str:
    """A model's folder, returned."""
    section = given.section(role)
    folder = str(section.take("checkpoint_dir", ""))
    if folder:
        given.result.settings[f"{role}.checkpoint_dir"] = folder
    else:
        given.result.wanted.append(f"{role}.checkpoint_dir")
    if component(section)[1] == "FullModelHFCheckpointer":
        section.tell("unneeded", "_component_", "a model's folder is read as Hugging Face writes it.")
    section.tell("lost", "_component_", "kdtune reads Hugging Face folders alone: name one in checkpoint_dir.")
    names = [name for name in listed(section.peek("checkpoint_files")) if "." in name]
    if all(name.endswith(".safetensors") for name in names):
        section.tell("unneeded", "checkpoint_files", "every *.safetensors of the folder is read.")
    why = "kdtune reads the *.safetensors of the folder, and these are written by torch.save: save them again."
    section.tell("lost", "checkpoint_files", why)
    section.tell("unneeded", "model_type", _CONFIG_JSON)
    section.tell("unneeded", "safe_serialization", "a model is always written as safetensors.")
    resuming = "a run of torchtune cannot be continued; kdtune finds the newest checkpoint in output_dir by itself."
    for name in ("recipe_checkpoint", "adapter_checkpoint", "should_load_recipe_state", "resume_from_checkpoint"):
        section.tell("lost" if section.peek(name) else "unneeded", name, resuming)
    if role == "checkpointer" and not has_output_dir:
        section.copy("output_dir", "output_dir")
    section.tell("unneeded", "output_dir", "everything is written to the run's own output_dir.")
    section.close()
    return folder


def _student(given: Given) -> None:
    section = given.section("model")
    settings = given.result.settings
    builder = _architecture(section)
    if not ("lora" in builder or "lora_attn_modules" in section or "lora_rank" in section):
        section.close(f"kdtune has no such setting; {_CONFIG_JSON}")
        return
    settings["lora.rank"] = section.take("lora_rank", 8)
    settings["lora.alpha"] = section.take("lora_alpha", 16)
    section.copy("lora_dropout", "lora.dropout")
    section.copy("use_dora", "lora.use_dora")
    attention = listed(section.take("lora_attn_modules"))
    targets = [ours for name, ours in _ATTENTION.items() if name in attention]
    if unknown := [name for name in attention if name not in _ATTENTION]:
        section.note("lost", "lora_attn_modules", unknown, "no layer of attention is called so.")
    targets += _MLP if section.take("apply_lora_to_mlp", False) else []
    if len(targets) == 7:
        targets = ["all-linear"]
    settings["lora.target_modules"] = targets + (["lm_head"] if section.take("apply_lora_to_output", False) else [])
    if section.take("quantize_base", builder.startswith("qlora")):
        settings["lora.base_quantization"] = "nf4"
    settings["lora.save_merged"] = not given.take("save_adapter_weights_only", False)
    section.close(f"kdtune has no such setting; {_CONFIG_JSON}")


def _architecture(section: Given) -> str:
    """The builder's name, after telling whether kdtune has such models."""
    path = str(section.peek("_component_"))
    found = re.match(r"torchtune\.models\.(\w+)\.", path)
    if found and found[1] not in _FAMILIES:
        has = "it has Llama 1 to 3.3, Mistral, Qwen 1.5 to 3 (dense) and SmolLM2."
        section.tell("lost", "_component_", f"kdtune has no models of the family {found[1]}: {has}")
    section.tell("unneeded", "_component_", _CONFIG_JSON)
    return path.rpartition(".")[2]


def _teacher(section: Given) -> None:
    _architecture(section)
    section.close(f"kdtune reads the teacher as it is in its folder, and {_CONFIG_JSON}")


def _tokenizer(given: Given, model_dir: str) -> str:
    """Returns the module of the tokenizer, which knows the turns that it puts questions into; "" if it has none."""
    section = given.section("tokenizer")
    family, _ = component(section)
    section.tell("unneeded", "_component_", "the folder says which tokenizer it has.")
    for name in ("path", "tokenizer_json_path", "tokenizer_config_json_path", "merges_file", "special_tokens_path"):
        path = section.peek(name)
        if path is None:
            section.tell("unneeded", name, "the tokenizer's folder is read.")
        elif model_dir and PurePosixPath(str(path)).is_relative_to(model_dir):
            section.tell("unneeded", name, "the tokenizer is read from checkpointer.checkpoint_dir.")
        elif name in ("path", "tokenizer_json_path"):
            section.copy(name, "tokenizer.path")
        else:
            section.tell("unneeded", name, "it is read from beside tokenizer.path.")
    section.tell(
        "unneeded", "generation_config_path", "the ids that end a text are read from checkpointer.checkpoint_dir."
    )
    if section.peek("truncation_type") in (None, "right"):
        section.tell("unneeded", "truncation_type", "rows that are too long keep their beginning here, too.")
    is_default = "prompt_template" not in section
    template = section.peek("prompt_template")
    section.copy("max_seq_len")
    why = "a prompt's text is dataset.prompt_template, that of a chat dataset.chat_template."
    section.tell("unneeded" if template is None else "lost", "prompt_template", why)
    section.close()
    return family if is_default or family not in ("llama2", "mistral") else ""


def _validation(given: Given, turns: str) -> None:
    rows = given.take("dataset_val")
    if rows is not None:
        convert_dataset(rows, given.result, turns, "dataset_val")
        if given.peek("run_val_every_n_steps") is None:
            why = "there the rows are then not looked at; here they are before and after the run."
            given.note("different", "run_val_every_n_steps", None, why)
    given.copy("run_val_every_n_steps")
    given.tell("unneeded", "batch_size_val", "validation takes batch_size rows at a time, which changes no number.")


def _length(given: Given) -> None:
    if "tokenizer.max_seq_len" not in given.result.settings:
        why = "rows are of any length there; here tokenizer.max_seq_len is 2,048 unless given, and longer rows are cut."
        given.note("different", "tokenizer.max_seq_len", None, why)


def _divergence(given: Given) -> None:
    settings = given.result.settings
    given.copy("kd_ratio")
    loss = given.section("kd_loss")
    name = _DIVERGENCES.get(component(loss)[1].replace("WithChunkedOutput", ""))
    if name is None:
        why = (
            "kdtune has no loss of that name, and takes forward_kl; kd_loss.name has eight, and a recipe can be edited."
        )
        loss.tell("lost", "_component_", why)
    else:
        settings["kd_loss.name"] = name
    if name in ("forward_kl", "symmetric_kl"):
        why = "the teacher's entropy is not left out: same gradient, lower number, 0 when both models agree."
        loss.tell("different", "_component_", why)
    if name == "symmetric_kl":
        loss.copy("sym_kd_ratio", "kd_loss.beta")
    loss.take("_component_")
    _close_loss(loss)


def _cross_entropy(given: Given) -> None:
    loss = given.section("loss")
    is_same = component(loss)[1] in _CROSS_ENTROPIES
    loss.tell("unneeded" if is_same else "lost", "_component_", "the loss on the labels is the cross-entropy.")
    loss.copy("label_smoothing", "ce_loss.label_smoothing")
    _close_loss(loss)


def _close_loss(loss: Given) -> None:
    """What the losses have in common."""
    loss.tell("unneeded", "num_output_chunks", "loss_chunk_size is found by itself, and changes no number.")
    if loss.peek("ignore_index") == -100:
        loss.tell("unneeded", "ignore_index", "it is always -100.")
    loss.close()


def _optimizer(given: Given) -> None:
    settings = given.result.settings
    section = given.section("optimizer")
    kind = component(section)[1]
    if kind in _OPTIMIZERS:
        settings["optimizer.name"] = _OPTIMIZERS[kind]
    else:
        why = "kdtune has AdamW alone, and takes it; optimizer.name says in how many bits."
        section.tell("lost", "_component_", why)
    if kind.startswith("Paged"):
        why = "moments stay on the device. optimizer.offload=true, with optimizer.name=adamw, keeps them in the host."
        section.tell("different", "_component_", why)
    section.take("_component_")
    settings["optimizer.lr"] = section.take("lr", 1e-3)
    decay = section.take("weight_decay", 0 if kind == "Adam" else 0.01)
    settings["optimizer.weight_decay"] = decay
    if kind == "Adam" and decay:
        section.note("different", "weight_decay", decay, "Adam adds it to the gradient, AdamW takes it off the weight.")
    betas = section.peek("betas") if "betas" in section else [0.9, 0.999]
    if isinstance(betas, list) and len(betas) == 2:
        settings["optimizer.beta1"], settings["optimizer.beta2"] = betas
        section.take("betas")
    section.tell("lost", "betas", "it is no list of two numbers.")
    section.copy("eps", "optimizer.eps")
    for name in ("fused", "foreach", "capturable", "block_size"):
        section.tell("unneeded", name, "it says how the same step is computed.")
    if not section.peek("amsgrad"):
        section.tell("unneeded", "amsgrad", "it is off here, too.")
    section.close()

    schedule = given.section("lr_scheduler")
    if "_component_" not in schedule:
        settings |= {"lr_scheduler.name": "constant", "lr_scheduler.num_warmup_steps": 0}
    elif component(schedule)[1] == "get_cosine_schedule_with_warmup":
        settings["lr_scheduler.name"] = "cosine"
        schedule.take("_component_")
    schedule.tell("lost", "_component_", "kdtune has cosine, linear and constant, and takes cosine.")
    schedule.copy("num_warmup_steps")
    if schedule.peek("num_cycles") == 0.5:
        schedule.tell("unneeded", "num_cycles", "the decay is half a cosine here, too.")
    schedule.close()


def _clipping(given: Given, has_teacher: bool) -> None:
    """Written out in any case, since kdtune clips unless told otherwise."""
    given.result.settings["clip_grad_norm"] = None
    if given.peek("clip_grad_norm") in ("inf", math.inf):
        given.tell("unneeded", "clip_grad_norm", "grad_norm is always in metrics.jsonl.")
    elif has_teacher and given.peek("clip_grad_norm") is not None:
        why = (
            "torchtune's distillation recipes divide the gradient by its tokens twice, and so rarely reach a threshold "
            "(on several devices they do not read it). Here it would be reached; null is what it comes to there."
        )
        given.tell("different", "clip_grad_norm", why)
    given.copy("clip_grad_norm")


def _checkpointing(given: Given, has_teacher: bool) -> None:
    """Of activations."""
    settings = given.result.settings
    if given.peek("ac_mode") in ("full", "selective") and not given.peek("enable_activation_checkpointing"):
        settings["enable_activation_checkpointing"] = True
        given.take("enable_activation_checkpointing")
        if given.take("ac_mode") == "selective" and str(given.peek("ac_option")) != "1":
            settings["activation_checkpointing_mode"] = "selective"
            why = "some layers are recomputed there; here all are, but for their products."
            given.note("different", "ac_option", given.take("ac_option"), why)
    if given.peek("ac_mode") is None:
        given.tell("unneeded", "ac_mode", "there is none.")
    if given.peek("enable_activation_checkpointing"):
        given.tell("different", "ac_mode", "beside enable_activation_checkpointing it has nothing recomputed there.")
    given.tell("lost", "ac_mode", "kdtune knows full and selective.")
    given.tell("unneeded", "ac_option", "it says which layers of a selective ac_mode, which is not given.")
    is_checkpointing = given.peek("enable_activation_checkpointing")
    given.copy("enable_activation_checkpointing")
    if has_teacher and is_checkpointing and given.peek("enable_activation_offloading"):
        why = "torchtune's distillation recipes do not read it. Here it does what it says."
        given.note("different", "enable_activation_offloading", True, why)
    if is_checkpointing and (given.peek("enable_activation_offloading") or not has_teacher):
        given.copy("enable_activation_offloading")
    unread = "torchtune's distillation recipes do not read it; " if has_teacher else ""
    given.tell(
        "unneeded", "enable_activation_offloading", f"{unread}here it needs enable_activation_checkpointing=true."
    )


def _run(given: Given) -> None:
    settings = given.result.settings
    for name in ("batch_size", "gradient_accumulation_steps", "epochs", "max_steps_per_epoch", "optimizer_in_bwd"):
        given.copy(name)
    if given.peek("seed") is None:
        given.note("different", "seed", None, "another seed in every run there; here it is 0 unless given.")
    given.copy("seed")
    why = "kdtune does not tell torch to compute deterministically."
    mode = given.peek("cudnn_deterministic_mode")
    given.tell("unneeded" if mode is None else "lost", "cudnn_deterministic_mode", why)
    given.copy("shuffle")
    given.copy("device")
    if given.peek("dtype") in ("bf16", "fp32", None):
        given.copy("dtype")
    else:
        given.tell("lost", "dtype", "kdtune has bf16 and fp32, and takes bf16.")
    given.tell("unneeded", "low_cpu_ram", "weights are read into their places.")
    given.copy("output_dir")
    if "output_dir" not in settings:
        given.result.wanted.append("output_dir")
    given.copy("save_every_n_steps")
    given.copy("enable_async_checkpointing", "save_in_background")
    if not given.peek("resume_from_checkpoint"):
        given.copy("resume_from_checkpoint")
    why = "a run of torchtune cannot be continued. checkpointer.checkpoint_dir can be what it wrote."
    given.tell("lost", "resume_from_checkpoint", why)


def _processes(given: Given) -> None:
    """How models are spread over them."""
    if given.take("fsdp_cpu_offload", False):
        given.result.settings["parallel.offload"] = True
    given.copy("fsdp_reshard_after_forward", "parallel.reshard_after_forward")
    if given.peek("data_parallel_shard_dim") == -1:
        given.tell("unneeded", "data_parallel_shard_dim", "all processes of a group share its model here, too.")
    given.copy("data_parallel_shard_dim", "parallel.data_shard")
    given.copy("data_parallel_replicate_dim", "parallel.data_replicate")
    given.copy("context_parallel_dim", "parallel.context")
    given.tell("unneeded", "context_parallel_rotate_method", "it says how the same attention is computed.")
    given.copy("tensor_parallel_dim", "parallel.tensor")
    plan = given.section("tensor_parallel_plan")
    plan.tell("unneeded", "_component_", "how the layers of each family are split is known.")
    plan.close()
    given.tell("unneeded", "custom_sharded_layers", "weights are gathered a layer at a time.")


def _compile(given: Given) -> None:
    if isinstance(given.peek("compile"), Mapping):
        parts = given.section("compile")
        layers = parts.take("model", True)
        given.result.settings["compile"] = layers
        if parts.peek("loss") == layers:
            parts.take("loss")
        parts.tell("different", "loss", "kdtune compiles layers and loss, or neither.")
        for name in ("optimizer_step", "scale_grads", "flex_attention"):
            parts.tell("unneeded", name, "it says how the same numbers are computed.")
        parts.close()
    given.copy("compile")
    why = "kdtune multiplies in the dtype of the weights."
    for name in ("enable_fp8_training", "fp8_recipe_name"):
        given.tell("lost" if given.peek("enable_fp8_training") else "unneeded", name, why)


def _logging(given: Given) -> None:
    settings = given.result.settings
    given.copy("log_every_n_steps")
    given.tell("unneeded", "log_level", "what a run says on its way is short.")
    given.tell("unneeded", "log_peak_memory_stats", "the peak of memory is always in metrics.jsonl.")
    section = given.section("metric_logger")
    kind = component(section)[1]
    if kind == "WandBLogger":
        settings["metric_logger.wandb_project"] = section.take("project", "torchtune")
        section.take("_component_")
    elif kind == "TensorBoardLogger":
        settings["metric_logger.tensorboard"] = True
        section.take("_component_")
    is_written = kind in ("DiskLogger", "StdoutLogger")
    why = "metrics.jsonl is always written; beside it there are TensorBoard and Weights & Biases."
    section.tell("unneeded" if is_written else "lost", "_component_", why)
    for name in ("log_dir", "filename", "output_dir"):
        section.tell("unneeded", name, "metrics are written to output_dir.")
    section.close()

    section = given.section("profiler")
    section.tell("unneeded", "_component_", "there is one profiler.")
    names = ("enabled", "wait_steps", "warmup_steps", "active_steps", "record_shapes", "with_stack", "profile_memory")
    for name in names:
        section.copy(name)
    section.tell("unneeded", "output_dir", "the record is in output_dir/profile.")
    for name in ("cpu", "cuda", "xpu"):
        section.tell("unneeded", name, "the host and the device of the run are recorded.")
    if section.peek("num_cycles") in (None, 0, 1):
        section.tell("unneeded", "num_cycles", "it is recorded once.")
    if not section.peek("with_flops"):
        section.tell("unneeded", "with_flops", "kdtune plan counts the operations.")
    section.close()
