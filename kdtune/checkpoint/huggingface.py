"""Hugging Face folders in and out: `config.json`, safetensors weights, tokenizer files."""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdtune import pipeline_parallel
from kdtune.checkpoint.adapters import read_adapter
from kdtune.checkpoint.scaled import (
    PART,
    QUANTIZATION_KEYS,
    check_format,
    compressed_config,
    compressed_parts,
    refusal,
    with_scales,
)
from kdtune.checkpoint.source import Source
from kdtune.checkpoint.weights import (
    DTYPES,
    StoredTensor,
    check_finite,
    has_data,
    read_header,
    some_of,
    write_tensors,
)
from kdtune.distributed import ALONE, Ranks, trained_weights
from kdtune.dtensors import held, local, whole
from kdtune.models import (
    Decoder,
    ModelConfig,
    QATConfig,
    Quantization,
    from_hf_config,
    merged,
    parameter_shapes,
    quantize_linear,
    quantized_shapes,
)
from kdtune.tokenizers import ChatTemplate

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_SIZE = 5 * 10**9  # bytes, as the hub recommends

# What belongs to a checkpoint besides weights and config.json; it travels as it is.
GENERATION_CONFIG = "generation_config.json"
_PAIR = ("vocab.json", "merges.txt")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", *_PAIR)
COMPANIONS = (
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Tables that old exporters stored among the weights; computed here.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        FileNotFoundError: no such folder, or no `config.json` in it.
        ValueError: not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        message = f"{folder} is not a folder; a checkpoint is a folder with config.json and *.safetensors."
        if folder.name == "model":
            message += (
                f" A run with output_dir={folder.parent} writes it at its end: do that run first, or give another "
                f"folder (from {Path.cwd()})."
            )
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            message += (
                " If this is a name on the Hugging Face hub, fetch it first: "
                f"kdtune download {folder} --output-dir <folder>"
            )
        raise FileNotFoundError(message)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so its architecture is unknown. Is it the right folder?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download it again, or correct it.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, and should hold a JSON object.")
    return config


def select_layers(config: Mapping[str, Any], keep_layers: Sequence[int] | None) -> dict[str, Any]:
    """The `config.json` of a model that has only some layers of another, a family that kdtune has; None keeps all.

    Raises:
        ValueError: not an increasing list of layers that the model has.
    """
    config = dict(config)
    if keep_layers is None:
        return config
    total = config["num_hidden_layers"]
    kept = list(keep_layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        raise ValueError(
            f"keep_layers={kept} must name layers of the model in increasing order, each once: it has 0 to {total - 1}."
        )
    config["num_hidden_layers"] = len(kept)
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][index] for index in kept]
    if config.get("max_window_layers") is not None:  # the first so many layers have no sliding window
        config["max_window_layers"] = sum(index < config["max_window_layers"] for index in kept)
    return config


def check_files(folder: str | Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Prove that the folder holds the weights of `config` completely, reading headers alone.

    Args:
        folder: the checkpoint.
        config: its own architecture, as from its `config.json` (all layers).

    Returns:
        Where each parameter is stored, by name.

    Raises:
        FileNotFoundError: no weights in safetensors, or a shard is missing.
        ValueError: a truncated file; a tensor that is missing, unexpected, of another shape, or of numbers that mean
            nothing by themselves.
    """
    folder = Path(folder)
    method, blocks = check_format(folder, read_config(folder))
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        stored |= read_header(file)
    shapes = parameter_shapes(config)
    stored = with_scales(folder, stored, shapes, blocks)
    ignored = {name for name in stored if _IGNORED.search(name)}
    if config.tie_embeddings:
        ignored.add("lm_head.weight")  # some exporters write the tied head too
    if parts := [name for name in stored if PART.search(name)]:
        raise ValueError(refusal(folder, f"{method or 'in a format of its own'}, with {some_of(parts)}"))
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise ValueError(
            f"{folder} lacks {some_of(missing)}, which its config.json calls for. Either a download was incomplete, or "
            "config.json belongs to another model."
        )
    if unexpected := [name for name in stored if name not in shapes and name not in ignored]:
        raise ValueError(
            f"{folder} has {some_of(unexpected)}, for which the model of its config.json has no place. Leaving out "
            "trained weights would change the model: check model_type, num_hidden_layers and the bias settings there."
        )
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(stored[name].shape)}, and config.json calls for {list(shape)}. "
                "The two belong to different models."
            )
        if stored[name].dtype not in DTYPES and stored[name].scale is None:
            raise ValueError(
                f"{folder}: {name} is stored as {stored[name].dtype}, and kdtune reads {', '.join(DTYPES)}. "
                "Use the checkpoint before its quantisation."
            )
    return {name: stored[name] for name in shapes}


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    adapter_dir: str | Path | None = None,
    keep_layers: Sequence[int] | None = None,
    quantization: Quantization | None = None,
    random_weights: bool = False,
    seed: int = 0,
    shard: Callable[[Decoder], None] | None = None,
) -> Decoder:
    """Build the model of a folder and fill it; beside it are held a small buffer and what rounding a weight takes.

    Args:
        folder: a Hugging Face checkpoint; `config.json` is enough for `random_weights`.
        dtype: of the weights in memory, whatever the files have.
        device: where each weight is put as soon as it is read. On `meta`, and for a plan, nothing is read but
            `config.json` and the adapter's header.
        adapter_dir: an adapter of the folder's model, merged into each weight as it is read. None: none.
        quantization: of the linear layers' weights, each as soon as it is there; None: as they are.
        keep_layers: layers of the folder's model to keep, increasing; the first becomes layer 0. None: all.
        random_weights: draw the weights instead of reading them: normal with the config's `initializer_range`, norms
            1, biases 0.
        seed: of `random_weights`; the same weights on any device, and no global random state is touched.
        shard: spreads the model, while it is on `meta`, over several processes, each of which reads its own part of
            every weight; what it adds to the model is left to be filled. None: this process holds all of it.

    Raises:
        FileNotFoundError, ValueError: as `read_config`, `from_hf_config`, `select_layers`, `check_files` and
            `read_adapter`.
    """
    hf_config = read_config(folder)
    whole = from_hf_config(hf_config)
    adapter = read_adapter(adapter_dir, whole) if adapter_dir is not None else None
    if adapter is not None:
        hf_config = adapter.merged_config(hf_config)
    config = from_hf_config(select_layers(hf_config, keep_layers))
    is_filled = has_data(torch.empty(0, device=device))
    stored = {} if random_weights or not is_filled else check_files(folder, whole)
    quantized = quantized_shapes(config) if quantization else {}
    source = Source(stored, adapter, keep_layers, config.initializer_range, torch.Generator().manual_seed(seed))
    with torch.device("meta"):
        model = Decoder(config)
    if shard is not None:
        shard(model.to(dtype))
        if torch.device(device).type != "meta":
            computes = model.compute_device or device  # with what no file has
            model._apply(lambda t: torch.empty_like(t, device=device if isinstance(t, nn.Parameter) else computes))
        # Adapters are in no folder.
        here = {model.in_checkpoint(name): parameter for name, parameter in model.named_parameters()}
        for name, shape in parameter_shapes(config).items() if is_filled else ():
            if (parameter := here.get(name)) is not None:
                source.fill_part(name, local(parameter.detach()), held(parameter), shape)
            elif random_weights:  # another stage has it; those that follow are drawn as if it were here
                source.fill(name, torch.empty(shape, dtype=dtype))
        return model
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        if quantization == "fp8" and name in quantized and is_filled and source.is_fp8(name):
            weight = source.fp8(name, weight)
        elif is_filled:
            source.fill(name, weight)
            if name in quantized and not weight.isfinite().all():
                raise ValueError(f"{folder}: {name} holds numbers that are not finite, which rounding could hide.")
        if quantization is not None and name in quantized:
            quantize_linear(model, name.removesuffix(".weight"), weight, quantization)
            del weight
            _give_back_freed_memory()
        else:
            _assign(model, name, weight)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def save_model(
    model: Decoder,
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    companions: Mapping[str, bytes] | None = None,
    dtype: torch.dtype | None = None,
    qat: QATConfig | None = None,
    master: Callable[[Tensor], Tensor] = Tensor.detach,
    trained: Mapping[str, Tensor] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    ranks: Ranks = ALONE,
) -> None:
    """Write a folder that this module, transformers and everything compatible with it can open.

    Several ranks that hold a model together call it at the same time. Each writes some of the files, all at a time,
    and none holds more than one of them and a weight.

    Args:
        model: what to write; if it has adapters, they are merged.
        folder: new or empty; made if need be.
        config: the `config.json` that the model was built from (after `select_layers`); its dtype is replaced, and what
            it says of a quantisation left out.
        companions: other files of the folder, by name, as from `read_companions`.
        dtype: of the written weights. None: as they are in memory.
        qat: write the integers that training rounds weights to, in the format compressed-tensors. None: the weights.
        master: the weight that steps change, of a parameter that is less precise than `dtype`.
        trained: values of all parameters by name, if they are not those that the model has now.
        max_shard_size: bytes; weights beyond it are spread over several files with an index.
        ranks: the processes that write together.

    Raises:
        FloatingPointError: a weight is not a number. Nothing could be done with such a folder.
        OSError: the disk is full or not writable.
    """
    assert from_hf_config(config) == model.config, "config describes another model"
    folder = Path(folder)
    quantized = {} if qat is None else quantized_shapes(model.config)
    dtype = dtype or model.head.weight.dtype
    is_wider = dtype.itemsize > model.head.weight.dtype.itemsize
    config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    dtype_key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[dtype_key] = str(dtype).removeprefix("torch.")
    if qat is not None:
        config[QUANTIZATION_KEYS[0]] = compressed_config(qat)
    with ranks.together():
        values = trained_weights(model) if trained is None else trained
        check_finite(values, "model")
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.is_first:
            for name, content in (companions or {}).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
            _write_json(folder / "config.json", config)

    shapes = parameter_shapes(model.config)
    stage, count = (0, 1) if model.stage is None else (model.stage.index, model.stage.count)
    by_stage = pipeline_parallel.weights_of_stages(model.config, count)

    def stored(name: str, is_written: bool) -> dict[str, Tensor]:
        if name not in by_stage[stage]:
            return {name: torch.empty(shapes[name], dtype=dtype, device="meta")}
        value = merged(model, name, master if is_wider else Tensor.detach) if trained is None else trained[name]
        weight = whole(value)
        if not is_written:
            weight = weight.to("meta")
        if qat is not None and name in quantized:
            return compressed_parts(name, weight, qat, dtype)
        return {name: weight.to("cpu" if is_written else "meta", dtype).contiguous()}

    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    max_size = min(max_shard_size, -(-sum(sizes.values()) // ranks.size))
    shards: list[_Shard] = []
    for number, names in enumerate(by_stage):
        num_writers = ranks.size // count
        for i, shard in enumerate(_split({name: sizes[name] for name in names}, max_size)):
            shards.append(_Shard(shard, num_writers * number + i % num_writers, turn=i // num_writers))
    _write_weights(folder, shards, stored, ranks)


class _Shard(NamedTuple):
    """What goes into a file."""

    names: Sequence[str]
    writer: int  # the rank that writes it
    turn: int  # in which all writers write one file each


def _write_weights(
    folder: Path, shards: Sequence[_Shard], stored: Callable[[str, bool], dict[str, Tensor]], ranks: Ranks
) -> None:
    """A file for each shard, and an index of several. `stored` makes the tensors of a weight, on `meta` if told so."""
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    total_size = 0
    for turn in range(1 + max(shard.turn for shard in shards)):
        own: dict[str, dict[str, Tensor]] = {}
        for file_name, shard in zip(names, shards, strict=True):
            if shard.turn != turn:
                continue
            tensors: dict[str, Tensor] = {}
            for name in shard.names:
                tensors |= stored(name, shard.writer == ranks.rank)
            if shard.writer == ranks.rank:
                own[file_name] = tensors
            weight_map |= dict.fromkeys(tensors, file_name)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
        with ranks.together():
            for file_name, tensors in own.items():
                write_tensors(folder / file_name, tensors)
    with ranks.together():
        if len(shards) > 1 and ranks.is_first:
            _write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def read_companions(
    folder: str | Path, tokenizer: str | Path | None = None, template: ChatTemplate | None = None
) -> dict[str, bytes]:
    """What belongs beside a model's weights: the tokenizer with its settings, and the generation config.

    Read at the start of a run, so that a folder which is gone at its end does not leave a model without a tokenizer.

    Args:
        folder: checkpoint of the model.
        tokenizer: another folder for the tokenizer; or a tokenizer's file, whose settings lie beside it. That file gets
            the name by which a folder's tokenizer is found.
        template: replaces the chat template, and the token that it ends an answer with stops a generation; None: as
            they are.

    Returns:
        Contents by the name of the file, as far as the files exist.
    """
    source = Path(tokenizer or folder)
    beside = source.parent if source.is_file() else source
    if source.is_file() and source.name not in _PAIR:
        files = {"tokenizer.json" if source.suffix == ".json" else "tokenizer.model": source}
    else:
        files = {name: beside / name for name in (_PAIR if source.is_file() else VOCABULARIES)}
    files |= {name: beside / name for name in COMPANIONS}
    files |= {f"{path.parent.name}/{path.name}": path for path in beside.glob("additional_chat_templates/*.jinja")}
    if (Path(folder) / GENERATION_CONFIG).is_file():  # of the model, not of the tokenizer
        files[GENERATION_CONFIG] = Path(folder) / GENERATION_CONFIG
    contents = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    return contents if template is None else _with_template(contents, template, Path(folder))


def _with_template(contents: dict[str, bytes], template: ChatTemplate, folder: Path) -> dict[str, bytes]:
    kept = {name: content for name, content in contents.items() if "chat_template" not in name}  # all of its places
    kept["chat_template.jinja"] = template.source.encode()
    if b'"chat_template"' in kept.get("tokenizer_config.json", b""):  # where older programs look
        settings = json.loads(kept["tokenizer_config.json"]) | {"chat_template": template.source}
        kept["tokenizer_config.json"] = _json_bytes(settings)
    model = read_config(folder)
    # Where there is no generation config, transformers takes these from the model's.
    defaults = {key: model[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in model}
    generation = json.loads(kept[GENERATION_CONFIG]) if GENERATION_CONFIG in kept else defaults
    stops = generation.get("eos_token_id", defaults.get("eos_token_id"))
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    if template.stop_id is not None and template.stop_id not in stops:
        kept[GENERATION_CONFIG] = _json_bytes(generation | {"eos_token_id": [*stops, template.stop_id]})
    return kept


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        message = f"{folder} has neither {WEIGHTS} nor {INDEX}, so there are no weights to load."
        if any(folder.glob("pytorch_model*.bin")):
            message += (
                " Its weights are in the older pytorch_model.bin format, which can run code when it is opened. Convert "
                "it once with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
            )
        raise FileNotFoundError(message)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not a valid index of shards. Download it again.") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {some_of(missing)} of the {len(names)} shards that {INDEX} lists. "
            "Download the missing ones again."
        )
    return [folder / name for name in names]


def _assign(model: nn.Module, name: str, weight: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(weight))


def _give_back_freed_memory() -> None:
    """To the host. glibc 2.36 keeps what lies between tensors that stay: two to three times a teacher in few bits."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _split(sizes: Mapping[str, int], max_size: int) -> list[list[str]]:
    """Names by shard, in order, each shard within `max_size` bytes unless a single weight is larger."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > max_size:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_bytes(_json_bytes(content))


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
