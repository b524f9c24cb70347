"""Configs of other tools in kdtune's words: torchtune's distillation and fine-tuning, Model Optimizer's distillation.

They are read as data: names of classes in them are looked up in tables, and nothing is imported. A setting is carried
over, or told of with the reason; none is dropped silently.
"""

from collections.abc import Mapping
from typing import Any

from kdtune.conversion import model_optimizer, torchtune
from kdtune.conversion.given import Converted, resolve

__all__ = ["Converted", "convert"]


def convert(values: Mapping[Any, Any]) -> Converted:
    """Settings of `knowledge_distillation`, or of `finetune`, that mean what the given ones mean.

    Args:
        values: the content of their YAML file.

    Raises:
        ValueError: not a config of a kind that is known, or an interpolation in it that cannot be resolved.
    """
    values = resolve(values)
    for origin in (torchtune, model_optimizer):
        if origin.recognises(values):
            return origin.convert(values)
    if torchtune.names_classes(values):
        raise ValueError(
            "This config names classes (_component_), as torchtune's do, but neither a teacher (teacher_model, "
            "kd_loss) nor a model, a dataset, an optimizer and the cross-entropy as its loss. Known are those of "
            "torchtune's recipes knowledge_distillation, full_finetune and lora_finetune."
        )
    keys = ", ".join(str(name) for name in list(values)[:8])
    raise ValueError(
        f"Whose config is this? It has {keys or 'nothing in it'}. Known are those of torchtune's distillation "
        "and fine-tuning recipes (with _component_ in model, dataset and loss) and Model Optimizer's distillation YAML "
        f"({', '.join(model_optimizer.KEYS[:5])}, ...; in Megatron Bridge under model.kd_config)."
    )
