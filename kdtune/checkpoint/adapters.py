"""Adapters in and out, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtune.checkpoint.weights import (
    DTYPES,
    PIECE,
    StoredTensor,
    check_finite,
    has_data,
    read_header,
    read_into,
    some_of,
    write_tensors,
)
from kdtune.distributed import ALONE, Ranks, trained_weights
from kdtune.dtensors import held, local, whole
from kdtune.models import (
    Decoder,
    LoraConfig,
    ModelConfig,
    from_hf_config,
    merge,
    parameter_shapes,
    trained_parameters,
    trained_shapes,
)
from kdtune.models.lora import EMBEDDING, HEAD

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# PEFT has these matrices the other way round, and calls them by the other letter.
_TRANSPOSED = {
    f"{EMBEDDING}.lora_A.weight": f"{EMBEDDING}.lora_embedding_B",
    f"{EMBEDDING}.lora_B.weight": f"{EMBEDDING}.lora_embedding_A",
}
# Settings that are read here, say what the tensors say, or matter in training alone. Others, if they are set, are about
# something else than the adapters that there are here.
_KNOWN = {
    *("peft_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"),
    *("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    *("ensure_weight_tying", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "runtime_config", "megatron_core", "qalora_group_size", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "auto_mapping", "peft_version"),
}
# With others (PiSSA, OLoRA, CorDA, LoftQ) the base weights are changed as well.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder, and where its tensors are: by the names that `add_lora` gives them."""

    folder: Path
    settings: Mapping[str, Any]  # adapter_config.json
    stored: Mapping[str, StoredTensor]
    # Weights that PEFT stores beside the adapters of embedding and head: they need not be those of the base's folder.
    bases: Mapping[str, StoredTensor]

    def shape(self, name: str) -> tuple[int, ...]:
        shape = (self.stored.get(name) or self.bases[name]).shape
        return shape[::-1] if name in _TRANSPOSED else shape

    def read(self, name: str, like: Tensor, buffer: Tensor) -> Tensor:
        """A tensor in the dtype and on the device of `like`; `buffer` as for `read_into`."""
        stored = self.stored.get(name) or self.bases[name]
        tensor = torch.empty(stored.shape, dtype=like.dtype, device=like.device)
        read_into(stored, tensor, buffer)
        return tensor.T if name in _TRANSPOSED else tensor

    def changes(self, name: str) -> bool:
        """Whether a parameter of the model is another one with the adapter."""
        names = {name, f"{name.removesuffix('.weight')}.lora_A.weight"}
        return not names.isdisjoint({*self.stored, *self.bases})

    def read_merged(self, name: str, base: StoredTensor, target: Tensor, buffer: Tensor) -> None:
        """Fill `target` with a parameter that it changes, merged in float32 and rounded once.

        Beside it, one weight in float32 is held.

        Args:
            name: of the parameter.
            base: where the weight without the adapter is stored.
            target: contiguous, of the weight's shape.
            buffer: as for `read_into`.
        """
        base = self.stored.get(name) or self.bases.get(name, base)
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in self.stored:
            return read_into(base, target, buffer)
        weight = target.to(torch.promote_types(target.dtype, torch.float32))
        read_into(base, weight, buffer)
        a, b = (self.read(f"{module}.{part}.weight", weight, buffer) for part in ("lora_A", "lora_B"))
        length = f"{module}.lora_magnitude_vector"
        magnitude = self.read(length, weight, buffer) if length in self.stored else None
        merge(weight, a, b, self._scale(module), magnitude, dim=0 if module == EMBEDDING else 1)
        target.copy_(weight)

    def unties(self, config: ModelConfig) -> bool:
        """Whether a model with one weight for embedding and head has two of them with this adapter."""
        touched = {name for name in self.stored if _module(name) in (EMBEDDING, HEAD)}
        # A and B alone are tied: scales can differ, and DoRA has lengths of an embedding's columns and a head's rows.
        alike = self._scale(EMBEDDING) == self._scale(HEAD) and f"{HEAD}.lora_magnitude_vector" not in touched
        return config.tie_embeddings and bool(touched) and not (self.settings.get("ensure_weight_tying") and alike)

    def merged_config(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The `config.json` of the model that the merged weights make."""
        untied = self.unties(from_hf_config(hf_config))
        return {**hf_config, "tie_word_embeddings": False} if untied else {**hf_config}

    def rank(self, module: str) -> int:
        return self._setting(module, "rank_pattern", "r")

    def _scale(self, module: str) -> float:
        rank, alpha = self.rank(module), self._setting(module, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _setting(self, module: str, patterns: str, default: str) -> Any:
        """That of the first pattern which a module's name ends with, as PEFT has it."""
        found = (self.settings.get(patterns) or {}).items()
        matching = (value for pattern, value in found if re.match(rf"(.*\.)?({pattern})$", module))
        return next(matching, self.settings[default])


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in a folder, once it is known to fit a model. Reads headers alone.

    Args:
        folder: written by kdtune or PEFT.
        config: architecture of the model that it is for.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is of another kind or for another model, or damaged.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    stored, bases = {}, {}
    names = {key: name for name, key in _TRANSPOSED.items()}
    for key, place in read_header(folder / WEIGHTS).items():
        name = key.removeprefix(_PREFIX)
        if name.endswith(".base_layer.weight"):
            bases[name.replace(".base_layer.", ".")] = place
        else:
            stored[names.get(name, name)] = place
    if config.tie_embeddings and f"{EMBEDDING}.weight" in bases:
        bases.setdefault(f"{HEAD}.weight", bases[f"{EMBEDDING}.weight"])
    adapter = Adapter(folder, settings, stored, bases)

    shapes = {**parameter_shapes(config)}
    shapes.setdefault(f"{HEAD}.weight", shapes[f"{EMBEDDING}.weight"])
    expected: dict[str, tuple[int, ...]] = {}
    places = bases | stored
    for name in places:
        weight = f"{_module(name)}.weight" if ".lora_" in name else name
        if weight not in shapes:
            raise ValueError(_other_model(folder, f"it has {name}, for which there is no place"))
        expected |= _parts(adapter, _module(name), shapes[weight]) if ".lora_" in name else {name: shapes[weight]}
    if different := sorted(expected.keys() ^ places.keys()):
        raise ValueError(f"{folder}: {some_of(different)} should be there and is not, or the reverse. Copy it again.")
    for name, place in places.items():
        if adapter.shape(name) != expected[name]:
            shapes_said = f"{list(adapter.shape(name))}, and should have {list(expected[name])}"
            raise ValueError(_other_model(folder, f"{name} has shape {shapes_said}"))
        if place.dtype not in DTYPES:
            raise ValueError(f"{folder}: {name} is stored as {place.dtype}; kdtune reads {', '.join(DTYPES)}.")
    return adapter


def check_adapter(folder: str | Path, config: ModelConfig, lora: LoraConfig) -> None:
    """Prove that training can go on with an adapter.

    Args:
        folder: the adapter's.
        config: architecture of the model without it.
        lora: the adapter that is going to be trained.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is of another kind or for another model, or is not the one that `lora` describes.
    """
    adapter = read_adapter(folder, config)
    written = _settings(lora)
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        setting = {"r": "rank", "lora_alpha": "alpha"}.get(key, key)
        found = adapter.settings.get(key, False)
        if found != written[key]:
            raise ValueError(
                f"lora.{setting}={json.dumps(written[key])}, but the adapter in {folder} has {json.dumps(found)}. It "
                f"is trained further as it is: give lora.{setting}={json.dumps(found)}."
            )
    if adapter.unties(config) or adapter.settings.get("alpha_pattern"):
        what = "a head apart from its embedding" if adapter.unties(config) else "layers of another alpha"
        raise ValueError(
            f"{folder} has {what}, which cannot be trained further here. Merge it with checkpointer.adapter_dir, and "
            "train a new one."
        )
    shapes = {twin: shape for name, shape in trained_shapes(config, lora).items() for twin in _twins(name, config)}
    if different := sorted(shapes.keys() ^ adapter.stored.keys()):
        raise ValueError(
            f"{folder} is not the adapter that lora.target_modules={lora.target_modules} and lora.modules_to_save="
            f"{lora.modules_to_save} describe: only one of the two has {some_of(different)}. Give the settings that it "
            "was trained with."
        )
    for name, shape in shapes.items():
        if adapter.shape(name) != shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(adapter.shape(name))}, and with lora.rank={lora.rank} it would be "
                f"{list(shape)}. Adapters of several ranks cannot be trained further here."
            )


def load_adapter(model: Decoder, folder: str | Path | None) -> None:
    """Fill what `add_lora` added to a model, as `check_adapter` has proved to be possible; None: it stays new.

    Raises:
        ValueError: the adapter brings frozen weights along, and they are not the model's.
    """
    if folder is None or not has_data(model.head.weight):
        return
    adapter = read_adapter(folder, model.config)
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    for name in adapter.bases:
        weight = model.get_parameter(name)
        if not torch.equal(adapter.read(name, local(weight), buffer)[held(weight)], local(weight)):
            raise ValueError(
                f"{folder} was trained beside another {name} than the model's, and brings it along. Merge the two with "
                "checkpointer.adapter_dir, and train a new adapter."
            )
    for name, parameter in trained_parameters(model).items():
        part = local(parameter.detach())
        part.copy_(adapter.read(name, part, buffer)[held(parameter)])


def save_adapter(
    model: Decoder,
    folder: Path,
    cfg: LoraConfig,
    *,
    base: str,
    companions: Mapping[str, bytes] | None = None,
    trained: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write what `add_lora` added to a model. Processes that hold it together all call, and one of them writes.

    Args:
        model: with it.
        folder: new or empty; made if need be.
        cfg: what `add_lora` was given.
        base: folder of the model without it.
        companions: other files for the folder, by name, as from `read_companions`.
        trained: its values by name, if they are not those that the model has now.
        ranks: the processes that hold it together.

    Raises:
        FloatingPointError: a number is not finite. Nothing could be done with such an adapter.
        OSError: the disk is full or not writable.
    """
    with ranks.together():
        trained = trained_weights(model) if trained is None else trained
        check_finite(trained, "adapter")
    tensors = {}
    for name, value in trained.items():
        gathered = whole(value)
        for twin in _twins(name, model.config) if ranks.is_first else ():
            tensor = gathered.T if twin in _TRANSPOSED else gathered
            tensors[_PREFIX + _TRANSPOSED.get(twin, twin)] = tensor.to("cpu", copy=True).contiguous()
    adapted = {_module(twin) for name in trained if ".lora_" in name for twin in _twins(name, model.config)}
    trained_whole = {_module(twin) for name in trained if ".lora_" not in name for twin in _twins(name, model.config)}
    settings = {
        **_settings(cfg),
        "base_model_name_or_path": str(Path(base).absolute()),
        "target_modules": _ends(adapted, model),
        "modules_to_save": sorted(trained_whole) or None,
        "ensure_weight_tying": model.config.tie_embeddings and EMBEDDING in adapted | trained_whole,
    }
    with ranks.together():
        if not ranks.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (companions or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        write_tensors(folder / WEIGHTS, tensors)


def _settings(cfg: LoraConfig) -> dict[str, Any]:
    """What PEFT calls the settings, without those that the model decides about."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": cfg.rank,
        "lora_alpha": int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha,  # as others write it
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.use_rslora,
        "use_dora": cfg.use_dora,
        "bias": "none",
    }


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        hint = ""
        if inside := sorted(folder.glob(f"*/{SETTINGS}")):
            hint = f" There is one in {inside[0].parent}."
        elif (folder / "config.json").is_file():
            hint = " It has a whole model: give it as checkpoint_dir."
        elif not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            hint = f" A name on the hub is fetched by kdtune download {folder} --output-dir <folder>."
        raise FileNotFoundError(f"{folder} has no {SETTINGS}, so there is no adapter.{hint}")
    if not (folder / WEIGHTS).is_file():
        hint = ""
        if (folder / "adapter_model.bin").is_file():
            hint = (
                " Its weights are in adapter_model.bin, an older format which can run code when it is opened. Convert "
                "it once with PEFT: PeftModel.from_pretrained(model, folder).save_pretrained(new_folder)."
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}, so there are no weights to load.{hint}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(settings, dict)
    except (ValueError, AssertionError):
        raise ValueError(f"{path} is not a JSON object. Copy it again.") from None
    unusual = {key: value for key, value in settings.items() if value and key not in _KNOWN}
    for key, usual in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("init_lora_weights", _INITS)):
        if settings.get(key, usual[0]) not in usual:
            unusual[key] = settings[key]
    if unusual:
        said = ", ".join(f"{key}={json.dumps(value)}" for key, value in unusual.items())
        raise ValueError(
            f"{path} says {said}, and kdtune has LoRA, rsLoRA and DoRA as they are. Without that the model would be "
            "another. Merge it with PEFT (merge_and_unload) and use the merged folder."
        )
    if missing := [key for key in ("r", "lora_alpha") if key not in settings]:
        raise ValueError(f"{path} lacks {', '.join(missing)}, without which the adapter's scale is unknown.")
    return settings


def _module(name: str) -> str:
    """The module that a parameter of an adapter belongs to."""
    return name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]


def _parts(adapter: Adapter, module: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Name and shape of all that the adapter of one module has, beside a weight [o, i]."""
    down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    rank = adapter.rank(module)
    parts: dict[str, tuple[int, ...]] = {down: (rank, weight[1]), up: (weight[0], rank)}
    if adapter.settings.get("use_dora"):
        parts[f"{module}.lora_magnitude_vector"] = (weight[1] if module == EMBEDDING else weight[0],)
    return parts


def _twins(name: str, config: ModelConfig) -> list[str]:
    """A parameter's names: those of a tied embedding are written for the head as well, as PEFT's models want them."""
    is_tied = config.tie_embeddings and _module(name) == EMBEDDING
    return [name, HEAD + name.removeprefix(EMBEDDING)] if is_tied else [name]


def _ends(modules: Iterable[str], model: Decoder) -> list[str]:
    """The ends of modules' names if they mean these and no others, else the names."""
    modules = set(modules)
    ends = {name.rpartition(".")[2] for name in modules}
    same = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if same == modules else modules)


def _other_model(folder: Path, why: str) -> str:
    return f"{folder} is the adapter of another model: {why}. Use it with the model that it was trained on."
