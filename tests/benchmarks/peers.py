"""Steps of distillation as torchtune and TRL take them, on the batches of `pair`."""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pair import CLIP, IGNORE, LORA, LR, batches
from safetensors.torch import load_file
from torch import Tensor, nn

from kdtune import checkpoint, devices


def torchtune(
    settings: argparse.Namespace, lora: bool, compile: bool = False, checkpointing: bool = False
) -> Callable[[], float]:
    """The model, the `_loss_step` and the loop of torchtune 0.6.1's `knowledge_distillation_single_device`.

    That trains LoRA alone. All weights are trained by the same code with a student that has none.
    """
    from torchtune import training
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    recipe = tune_recipe(settings)
    recipe._model = tune_student(recipe, settings, lora, compile, checkpointing)
    recipe._teacher_model = recipe._setup_teacher_model(*tune_model(settings, "teacher"))
    recipe._loss_fn, recipe._kd_loss_fn = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()
    if compile:
        recipe._loss_fn = training.compile_loss(recipe._loss_fn)
        recipe._kd_loss_fn = training.compile_loss(recipe._kd_loss_fn)
    for model in (recipe._model, recipe._teacher_model):
        model.set_num_output_chunks(recipe._loss_fn.num_output_chunks)
    recipe.ignore_labels_cache = torch.full((settings.rows, 1), IGNORE, device=recipe._device)
    optimizer = torch.optim.AdamW(recipe._model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    stream = batches(settings)

    def step() -> float:
        tokens, labels, _ = (tensor.to(recipe._device) for tensor in next(stream))
        ce, kd = recipe._loss_step({"tokens": tokens, "labels": labels})
        (0 * ce + kd).backward()
        # Its loop divides by the number of tokens here, by which both losses are divided already.
        training.scale_grads(recipe._model, torch.tensor(1.0))
        norm = nn.utils.clip_grad_norm_(recipe._model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()

    return step


def tune_recipe(settings: argparse.Namespace) -> Any:
    """Before its set-up, which reads a tokenizer and rows."""
    import torchtune
    from omegaconf import OmegaConf

    # Its folder of recipes refuses to be imported as a package.
    path = Path(torchtune.__file__).parents[1] / "recipes/knowledge_distillation_single_device.py"
    spec = importlib.util.spec_from_file_location("torchtune_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = {"device": settings.device, "dtype": settings.dtype, "output_dir": "unwritten", "seed": 0, "epochs": 1}
    cfg |= {"max_steps_per_epoch": None, "resume_from_checkpoint": False, "gradient_accumulation_steps": 1}
    return module.KDRecipeSingleDevice(OmegaConf.create(cfg))


def tune_model(settings: argparse.Namespace, name: str, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """What torchtune's functions call a model's config, and its weights."""
    from omegaconf import OmegaConf
    from torchtune.models.convert_weights import hf_to_tune

    hf = checkpoint.read_config(settings.models / name)
    heads, kv_heads, width = hf["num_attention_heads"], hf["num_key_value_heads"], hf["hidden_size"]
    cfg = {
        "_component_": "torchtune.models.llama3.llama3",
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "embed_dim": width,
        "intermediate_dim": hf["intermediate_size"],
        "max_seq_len": settings.seq_len,
    }
    weights = load_file(settings.models / name / "model.safetensors")
    return OmegaConf.create(cfg | changes), hf_to_tune(weights, heads, kv_heads, width)


def tune_student(recipe: Any, settings: argparse.Namespace, lora: bool, compile: bool, checkpointing: bool) -> Any:
    """With adapters by the recipe's own function; without, by its function for teachers, then changed likewise."""
    from torchtune import modules, training

    if lora:
        adapters = {
            "_component_": "torchtune.models.llama3.lora_llama3",
            "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": LORA.rank,
            "lora_alpha": LORA.alpha,
        }
        cfg, weights = tune_model(settings, "student", **adapters)
        return recipe._setup_model(cfg, checkpointing, compile, weights, tune_adapter(settings))
    model = recipe._setup_teacher_model(*tune_model(settings, "student")).train()
    if compile:
        training.compile_model(model)
    if checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    return model


def tune_adapter(settings: argparse.Namespace) -> dict[str, Tensor]:
    """The adapter that kdtune begins with, by torchtune's names."""
    names = {
        "base_model.model.model.": "",
        "self_attn.": "attn.",
        "o_proj": "output_proj",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
        "lora_A": "lora_a",
        "lora_B": "lora_b",
    }
    adapter = {}
    for name, weight in load_file(settings.models / "adapter/adapter_model.safetensors").items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        adapter[name] = weight
    return adapter


def trl_gkd(settings: argparse.Namespace) -> Callable[[], float]:
    """TRL's `GKDTrainer`, off-policy (lmbda = 0), forward KL (beta = 0)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    trainer = trl_trainer(settings, GKDTrainer, GKDConfig, lmbda=0.0, max_length=None)

    def inputs(tokens: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens, "labels": labels, "attention_mask": mask}

    return trl_step(settings, trainer, inputs)


def trl_distillation(settings: argparse.Namespace) -> Callable[[], float]:
    """TRL's `DistillationTrainer` with beta = 0, on these batches instead of ones that it would generate."""
    from trl import DistillationConfig, DistillationTrainer

    trainer = trl_trainer(settings, DistillationTrainer, DistillationConfig)
    trainer._prepare_inputs = lambda inputs: inputs  # which would generate them
    prompt = settings.seq_len // 4

    def inputs(tokens: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {
            "prompt_ids": tokens[:, :prompt],
            "prompt_mask": mask[:, :prompt],
            "completion_ids": tokens[:, prompt:],
            "completion_mask": mask[:, prompt:],
            "num_items_in_batch": mask[:, prompt:].sum().float(),
        }

    return trl_step(settings, trainer, inputs)


def trl_trainer(settings: argparse.Namespace, trainer_class: Any, config_class: Any, **options: Any) -> Any:
    """A trainer with its optimizer, before the first step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(settings.models / name, dtype=devices.DTYPES[settings.dtype])
        for name in ("student", "teacher")
    )
    config = config_class(
        output_dir=str(settings.models / "unused"),
        beta=0.0,
        temperature=1.0,
        learning_rate=LR,
        max_grad_norm=CLIP,
        per_device_train_batch_size=settings.rows,
        use_cpu=settings.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * settings.rows}),
        processing_class=any_tokenizer(),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_step(
    settings: argparse.Namespace, trainer: Any, inputs: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
) -> Callable[[], float]:
    """What `Trainer.train` does for a step, without its logging."""
    stream = batches(settings)

    def step() -> float:
        tokens, labels, mask = (tensor.to(trainer.args.device) for tensor in next(stream))
        count = (labels[:, 1:] != IGNORE).sum()
        trainer.training_step(trainer.model, inputs(tokens, labels, mask), count)
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad(set_to_none=True)
        return norm.item()

    return step


def any_tokenizer() -> Any:
    """The trainers want one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")
