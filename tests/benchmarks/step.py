"""Measure whole training steps: both bodies forward, the loss, backward, clipping, AdamW.

    python tests/benchmarks/step.py

A pair of random Llamas is written as Hugging Face folders, which kdtune and transformers both load, and every variant
takes the same steps on the same batches: a quarter of a row's length is its prompt, and up to half of it is padding;
neither is scored. The objective is forward KL alone, which is what TRL has; equal losses after several steps show that
the same was computed. Memory is above the loaded models: gradients, AdamW's moments, activations and the loss. A few
minutes on two cores.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Answer, Meter, Variant
from torch import Tensor, nn

from kdtune import checkpoint, devices, losses, optim

IGNORE = losses.IGNORE
LR, CLIP = 1e-4, 1.0


def write_model(folder: Path, width: int, layers: int, vocabulary: int, seed: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = checkpoint.load_model(folder, dtype=torch.float32, device="cpu", random_weights=True, seed=seed)
    checkpoint.save_model(model, folder, config=config)


def batches(settings: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, labels before the shift, and attention mask, [b, s] each; padded on the right, one row full."""
    generator = torch.Generator().manual_seed(0)
    rows, length = settings.rows, settings.seq_len
    while True:
        tokens = torch.randint(2, settings.vocabulary, (rows, length), generator=generator)
        ends = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
        ends[0] = length
        mask = torch.arange(length) < ends
        scored = mask & (torch.arange(length) >= length // 4)
        yield tokens, torch.where(scored, tokens, IGNORE), mask.long()


def kdtune(settings: argparse.Namespace, compile: bool) -> Callable[[], float]:
    """The loop of `recipes/knowledge_distillation.py`."""
    dtype, device = devices.DTYPES[settings.dtype], devices.resolve(settings.device)
    student = checkpoint.load_model(settings.models / "student", dtype=dtype, device=device)
    teacher = checkpoint.load_model(settings.models / "teacher", dtype=dtype, device=device).requires_grad_(False)
    optimizer = optim.build_optimizer(student, optim.OptimizerConfig(lr=LR, weight_decay=0.0, beta2=0.999))
    if compile:
        harness.load_compiler()
    stream = batches(settings)

    def step() -> float:
        tokens, unshifted, _ = (tensor.to(device) for tensor in next(stream))
        labels = nn.functional.pad(unshifted[:, 1:], (0, 1), value=IGNORE)  # [b, s]
        positions = torch.arange(settings.seq_len, device=device).expand_as(tokens)
        with torch.no_grad():
            targets = losses.Targets(teacher.hidden(tokens, positions), teacher.head)
        loss = losses.distillation_loss(
            student.hidden(tokens, positions),
            student.head,
            labels,
            int((labels != IGNORE).sum()),
            targets,
            ce_weight=0.0,
            kd_weight=1.0,
            compile=compile,
        )
        loss.total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.total.item()

    return step


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
        loss = trainer.training_step(trainer.model, inputs(tokens, labels, mask), count)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad(set_to_none=True)
        return loss.item()

    return step


def any_tokenizer() -> Any:
    """The trainers want one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def variant(title: str, make_step: Callable[[argparse.Namespace], Callable[[], float]]) -> Variant:
    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        step = make_step(settings)
        return partial(Meter(devices.resolve(settings.device)), step)

    return Variant(title, make)


VARIANTS = {
    "kdtune": variant("kdtune", partial(kdtune, compile=False)),
    "kdtune-compiled": variant("kdtune, compile=True", partial(kdtune, compile=True)),
    "trl-gkd": variant("TRL GKDTrainer", trl_gkd),
    "trl-distillation": variant("TRL DistillationTrainer", trl_distillation),
}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a row")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=256, help="width of the student")
    parser.add_argument("--teacher-hidden", type=int, default=512, help="width of the teacher")
    parser.add_argument("--layers", type=int, default=4, help="of either model")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    settings = harness.parse(parser, VARIANTS)

    positions = settings.rows * settings.seq_len
    print(harness.describe_machine(settings))
    print(
        f"{settings.rows} rows of {settings.seq_len} tokens, vocabulary {settings.vocabulary:,}, width "
        f"{settings.hidden:,} / {settings.teacher_hidden:,}, {settings.layers} layers, {settings.rounds} rounds\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"student": settings.hidden, "teacher": settings.teacher_hidden}
        for seed, (name, width) in enumerate(sizes.items()):
            write_model(Path(folder, name), width, settings.layers, settings.vocabulary, seed)
        answers = harness.run(settings, VARIANTS, ["--models", folder])
    first = next(iter(answers.values()))
    rows = [
        [
            VARIANTS[name].title,
            f"{positions / harness.median(found, 'wall_s'):,.0f}",
            f"{harness.median(found, 'cpu_s'):.3g}",
            f"{harness.ratio(found, first, 'wall_s'):.2f}",
            f"{harness.median(found, 'memory_mib'):,.0f}",
            f"{found[-1]['loss']:.6f}",
        ]
        for name, found in answers.items()
    ]
    last = f"loss of step {settings.rounds + 1}"
    harness.print_table(["", "tokens/s", "CPU-s a step", "s, to the first's", "memory, MiB", last], rows)


if __name__ == "__main__":
    main()
