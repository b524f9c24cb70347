"""Model Optimizer's distillation YAML: Megatron-LM's --export-kd-cfg, Megatron Bridge's model.kd_config.

Keys and defaults of its `DistillationConfig`: of version 0.47, where skip_lm_loss and kd_loss_scale say how losses are
combined, and of its repository at commit 02151b337, where kd_loss_alpha does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdtune.conversion.given import Converted, Given

KEYS = (
    *("logit_layers", "intermediate_layer_pairs", "skip_lm_loss", "kd_loss_scale", "logit_kl_temperature"),
    *("kd_loss_alpha", "logit_kl_topk", "logit_kl_top_p", "logit_kl_top_p_min_k", "criterion", "loss_balancer"),
)

_LAYER = re.compile(r"(?:decoder|model)\.layers\.(\d+)(?:\.(\w+))?")
# Megatron-Core's names, and those of Hugging Face models, which are kdtune's.
_MODULES = {
    "embedding": "model.embed_tokens",
    "embedding.word_embeddings": "model.embed_tokens",
    "model.embed_tokens": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "model.norm": "model.norm",
}
_PARTS = {
    "": "",
    "input_layernorm": ".input_layernorm",
    "self_attention": ".self_attn",
    "self_attn": ".self_attn",
    "pre_mlp_layernorm": ".post_attention_layernorm",
    "post_attention_layernorm": ".post_attention_layernorm",
    "mlp": ".mlp",
}
_COMPARED = (
    "it knows those of model.embed_tokens, model.norm, model.layers.N, and of a layer's input_layernorm, self_attn, "
    "post_attention_layernorm and mlp."
)


def recognises(values: Mapping[Any, Any]) -> bool:
    return bool(set(KEYS) & _section(values).keys())


def convert(values: Mapping[Any, Any]) -> Converted:
    result = Converted("Model Optimizer")
    result.wanted += [
        "checkpointer.checkpoint_dir",
        "teacher_checkpointer.checkpoint_dir",
        "dataset.source",
        "output_dir",
    ]
    given = Given(values, result)
    if _section(values) is values:
        _distillation(given)
    else:
        model = given.section("model")
        _distillation(model.section("kd_config"))
        model.close(
            "model folders are named instead: checkpointer.checkpoint_dir, teacher_checkpointer.checkpoint_dir."
        )
    given.close("it is no setting of the distillation. kdtune run knowledge_distillation --help lists kdtune's.")
    return result


def _section(values: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Where the keys are: Megatron Bridge has them in model.kd_config."""
    model = values.get("model")
    inner = model.get("kd_config") if isinstance(model, Mapping) else None
    return inner if isinstance(inner, Mapping) else values


def _distillation(given: Given) -> None:
    settings = given.result.settings
    pairs = _pairs(given)
    _combination(given, has_pairs=bool(pairs))
    temperature = given.take("logit_kl_temperature", 1.0)
    if temperature != 1:
        settings |= {"kd_loss.temperature": temperature, "kd_loss.scale_by_temperature_squared": False}
    if pairs:
        settings |= {"hidden_loss.pairs": pairs, "hidden_loss.balance": True}
        why = "models of different widths need hidden_loss.projection=shared, which Model Optimizer takes by itself."
        given.note("different", "intermediate_layer_pairs", f"{len(pairs)} pairs", why)
    _top_k(given)
    heads = given.peek("logit_layers")
    is_head = isinstance(heads, list) and all(head in ("output_layer", "lm_head") for head in heads)
    given.tell("unneeded" if is_head else "lost", "logit_layers", "the heads' logits are compared, and no others.")
    given.tell("unneeded", "_target_", "no class is looked up: what is known of it are its settings.")
    for name in ("criterion", "loss_balancer"):
        if given.peek(name) is None:
            given.tell("unneeded", name, "the losses are those that the other settings name.")
    given.close()


def _combination(given: Given, *, has_pairs: bool) -> None:
    """How the cross-entropy LM, the divergence L and the mean of the pairs I become one loss (sg: without gradient).

    kd_loss_alpha: (1 - alpha) LM + alpha (L + I sg(L / I)). Up to 0.47, with KD = L + I sg(L / I): KD alone, or
    LM + kd_loss_scale KD sg(LM / KD), in which L and I have half of the scale each.
    """
    settings = given.result.settings
    if given.peek("kd_loss_alpha") is not None:
        given.copy("kd_loss_alpha", "kd_ratio")
        for name in ("skip_lm_loss", "kd_loss_scale"):
            given.tell("lost", name, "kd_loss_alpha says it; Model Optimizer refuses both together.")
        return
    given.tell("unneeded", "kd_loss_alpha", "it is 1 unless given.")
    if given.take("skip_lm_loss", True):
        settings["kd_ratio"] = 1.0
        given.tell("unneeded", "kd_loss_scale", "the student learns from the teacher alone: it is not read there.")
        return
    scale = given.take("kd_loss_scale", 1.0)
    if not isinstance(scale, (int, float)):
        raise ValueError(f"kd_loss_scale wants a number, got {scale!r}.")
    settings |= {"kd_ratio": 0.5, "ce_loss.weight": 2.0, "kd_loss.balance": True}
    settings["kd_loss.weight"] = float(scale if has_pairs else 2 * scale)
    if has_pairs:
        settings["hidden_loss.weight"] = float(scale)


def _top_k(given: Given) -> None:
    """A teacher's top k, which kdtune has of cached teachers only."""
    k, p = given.peek("logit_kl_topk"), given.peek("logit_kl_top_p")
    why = "the whole vocabulary is compared."
    if k is not None:
        store = f"store.kind=top_k store.top_k={k}" + (f" store.top_p={p}" if p is not None else "")
        why = (
            "a teacher that is asked in the run is compared by its whole vocabulary, which takes no more memory here. "
            f"For a top k: kdtune run cache_teacher_logits {store}, then teacher.cache_dir. What Model Optimizer does "
            "up to 0.47 is kd_loss.top_k_convention=renormalised; what it does since is bucket, the default."
        )
    for name in ("logit_kl_topk", "logit_kl_top_p"):
        given.tell("unneeded" if given.peek(name) is None else "lost", name, why)
    kept = given.peek("logit_kl_top_p_min_k")
    given.tell("unneeded" if kept in (None, 1) else "lost", "logit_kl_top_p_min_k", "one is kept at least.")


def _pairs(given: Given) -> list[dict[str, str]]:
    """Pairs of modules whose outputs are compared."""
    entries = given.take("intermediate_layer_pairs") or []
    pairs = []
    for entry in entries if isinstance(entries, list) else [entries]:
        is_pair = isinstance(entry, list) and len(entry) in (2, 3)
        student, teacher, distance = [*entry, "cosine"][:3] if is_pair else [None] * 3
        ours = [_module(student), _module(teacher)]
        if distance not in ("cosine", "mse"):
            why = "a pair is [student's module, teacher's module], and may have a third entry, cosine or mse."
        elif None in ours:
            unknown = [str(name) for name, found in zip((student, teacher), ours, strict=True) if found is None]
            why = f"kdtune does not compare the outputs of {' and '.join(unknown)}: {_COMPARED}"
        else:
            pairs.append({"student": str(ours[0]), "teacher": str(ours[1]), "loss": distance})
            continue
        given.note("lost", "intermediate_layer_pairs", entry, why)
    return pairs


def _module(name: Any) -> str | None:
    """What kdtune calls a module; None if its output is not to be had."""
    if ours := _MODULES.get(str(name)):
        return ours
    layer = _LAYER.fullmatch(str(name))
    part = _PARTS.get(layer[2] or "") if layer else None
    return f"model.layers.{layer[1]}{part}" if layer and part is not None else None
