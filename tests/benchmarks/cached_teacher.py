"""Measure steps with a cached teacher, and what it takes to ask one: the quickstart's pair.

    python tests/benchmarks/cached_teacher.py
    python tests/benchmarks/cached_teacher.py --threads 1 --variants finetune live top-64
    python tests/benchmarks/cached_teacher.py --threads 1 --rounds 12 --steps 1 --variants live pair projected

The same student takes the same steps on the same rows, as the recipes take them: the next rows, the teacher, forward,
loss, backward, clipping, AdamW. The caches are made first. Ratios are of processor seconds, among which are those of
the thread that reads ahead.

Then, of so many rows: what the teacher's bare forward takes, its head included; what asking takes, from rows to files;
and reading what was written, from files to what the loss is given. Five minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Answer, Meter, Variant

from kdtune import config, data, teacher_cache
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.distributed import Ranks
from kdtune.teacher import CachedTeacher, ask, load_live_teacher

CPU = torch.device("cpu")
STORES = {
    "top-64": ("top 64", "store.kind=top_k"),
    "samples-200": ("200 draws", "store.kind=samples"),
    "hidden": ("hidden states", "store.kind=hidden"),
}
TEACHER = "teacher_checkpointer.checkpoint_dir=${asset:quickstart/teacher}"


def load(recipe_name: str, settings: argparse.Namespace, *more: str) -> tuple[Any, Any]:
    """A recipe, and its settings for the rows of all rounds."""
    recipe = load_module(catalog.find_recipe(recipe_name))
    num_rows = settings.rows * settings.steps * (settings.rounds + 1)
    given = [
        "tokenizer.max_seq_len=384",
        "dataset.source=${asset:quickstart/train.jsonl.gz}",
        f"dataset.split=[:{num_rows}]",
        "dataset.column_map={output: answer}",
        'dataset.prompt_template="Question: {question}\\nAnswer: "',
        "dataset.train_on_input=true",
        *("device=cpu", "dtype=fp32", "output_dir=unwritten"),
    ]
    return recipe, config.load(recipe.Config, None, [*given, *more])


def cache_of(name: str, settings: argparse.Namespace) -> Path:
    return Path(settings.caches, name)


def steps(recipe_name: str, *teacher: str, cache: str = "") -> Callable[[argparse.Namespace], Callable[[], Answer]]:
    """Of a recipe, with these settings of the teacher."""

    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        student = ["checkpointer.checkpoint_dir=${asset:quickstart/teacher}", "checkpointer.keep_layers=[0,3]"]
        step = [f"batch_size={settings.rows // 2}", "gradient_accumulation_steps=2"]
        where = [f"teacher.cache_dir={cache_of(cache, settings)}"] if cache else []
        recipe, cfg = load(recipe_name, settings, *student, *step, *teacher, *where)
        model, *teachers, optimizer = recipe.build(cfg, Ranks(CPU))
        loader = recipe.load_data(cfg, recipe.load_tokenizer(cfg)).loader
        for one in teachers:
            one.follow(loader)

        def take() -> float:
            for _ in range(settings.steps):
                micro_batches = loader.next_step()
                recipe.forward_backward(cfg, model, *teachers, micro_batches, data.count_labels(micro_batches))
                norm = optimizer.clip_grad_norm(cfg.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return norm.item()

        return partial(Meter(CPU), take)

    return make


def asking(*store: str) -> Callable[[argparse.Namespace], Callable[[], Answer]]:
    """The rows of a call, from the teacher's forward to files; without a store the bare forward."""

    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        few = f"dataset.split=[:{settings.rows * settings.steps}]"
        recipe, cfg = load("cache_teacher_logits", settings, TEACHER, few, *store)
        inputs = recipe.check(cfg)
        batches, teacher = list(inputs.batches), load_live_teacher(cfg, inputs.ranks)

        def answer() -> None:
            with tempfile.TemporaryDirectory() as folder, teacher_cache.Writer(folder, inputs.card) as writer:
                for batch in batches:
                    for example, answers in ask(teacher, batch, cfg.store, seed=cfg.seed):
                        writer.add(example, answers)

        @torch.inference_mode()
        def forward() -> None:
            for batch in batches:
                teacher.head(teacher(batch).hidden[batch.labels != data.IGNORE])

        return measured(answer if store else forward, inputs.num_tokens)

    return make


def reading(name: str) -> Callable[[argparse.Namespace], Callable[[], Answer]]:
    """The rows of a call, from files to what the loss is given."""

    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        few = f"dataset.split=[:{settings.rows * settings.steps}]"
        recipe, cfg = load("cache_teacher_logits", settings, TEACHER, few)
        inputs = recipe.check(cfg)
        batches = list(inputs.batches)
        teacher = CachedTeacher(
            teacher_cache.TeacherCache(cache_of(name, settings)), device=CPU, head=torch.nn.Linear(1, 1)
        )

        def read() -> None:
            for batch in batches:
                teacher(batch)

        return measured(read, inputs.num_tokens)

    return make


def measured(call: Callable[[], None], num_tokens: int) -> Callable[[], Answer]:
    meter = Meter(CPU)
    return lambda: {**meter(call), "tokens": num_tokens}


QKV = [f"model.layers.1.self_attn.{name}" for name in ("queries", "keys", "values")]
PAIR = "hidden_loss.pairs=[{student: model.layers.0, teacher: model.layers.1}]"
HEADS = f"hidden_loss.pairs=[{','.join(f'{{student: {x}, teacher: {x}}}' for x in QKV)}]"
RELATION = "hidden_loss.name=relation"
BLOCKS = "hidden_loss.pairs=[{student: 'model.layers.{0..1}', teacher: 'model.layers.{1..3..2}'}]"
VARIANTS = {
    "finetune": Variant("finetune", steps("finetune")),
    "live": Variant("live", steps("knowledge_distillation", "kd_ratio=1", TEACHER)),
    "pair": Variant("live, a pair of layers", steps("knowledge_distillation", "kd_ratio=1", TEACHER, PAIR)),
    "projected": Variant(
        "live, a projected pair",
        steps("knowledge_distillation", "kd_ratio=1", TEACHER, PAIR, "hidden_loss.projection=shared"),
    ),
    "relations": Variant(
        "live, relations of a layer", steps("knowledge_distillation", "kd_ratio=1", TEACHER, HEADS, RELATION)
    ),
    "layerwise": Variant(
        "live, layer by layer",
        steps("knowledge_distillation", "kd_ratio=1", TEACHER, BLOCKS, "hidden_loss.inputs=teacher"),
    ),
    **{
        name: Variant(f"cached, {title}", steps("knowledge_distillation", "kd_ratio=1", cache=name))
        for name, (title, _) in STORES.items()
    },
    "forward": Variant("bare forward", asking()),
    **{f"ask-{name}": Variant(f"asked, {title}", asking(store)) for name, (title, store) in STORES.items()},
    **{f"read-{name}": Variant(f"read, {title}", reading(name)) for name, (title, _) in STORES.items()},
}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5, has_models=False)
    parser.add_argument("--rows", type=int, default=8, help="of a step, in two micro-batches")
    parser.add_argument("--steps", type=int, default=4, help="of a call")
    parser.add_argument("--caches", help=argparse.SUPPRESS)
    settings = harness.parse(parser, VARIANTS)
    print(harness.describe_machine(settings), flush=True)
    with tempfile.TemporaryDirectory() as settings.caches:
        for name, (_, store) in STORES.items():
            recipe, cfg = load("cache_teacher_logits", settings, TEACHER, store)
            cfg.output_dir = str(cache_of(name, settings))
            with contextlib.redirect_stdout(io.StringIO()):
                recipe.main(cfg)
        answers = harness.run(settings, VARIANTS, ["--caches", settings.caches])
    print_steps(settings, {name: found for name, found in answers.items() if "tokens" not in found[0]})
    print_rates({name: found for name, found in answers.items() if "tokens" in found[0]})


def print_steps(settings: argparse.Namespace, answers: dict[str, list[Answer]]) -> None:
    if not answers:
        return
    rows = []
    for name, found in answers.items():
        row = [VARIANTS[name].title]
        row += [f"{harness.median(found, key) / settings.steps:.3f}" for key in ("cpu_s", "wall_s")]
        for floor in ("finetune", "live"):
            row.append(f"{harness.ratio(found, answers[floor], 'cpu_s'):.2f}" if floor in answers else "")
        rows.append([*row, f"{found[-1]['result']:.5f}"])
    header = ["", "CPU-s a step", "seconds a step", "to finetune", "to live", "norm of the last gradient"]
    harness.print_table(header, rows)
    print()


def print_rates(answers: dict[str, list[Answer]]) -> None:
    if not answers:
        return
    rows = []
    for name, found in answers.items():
        rate = found[0]["tokens"] / harness.median(found, "cpu_s")
        more = harness.ratio(found, answers["forward"], "cpu_s") if "forward" in answers else None
        rows.append([VARIANTS[name].title, f"{rate:,.0f}", "" if more is None else f"{more:.3f}"])
    harness.print_table(["", "tokens a CPU-second", "time, to the bare forward"], rows)


if __name__ == "__main__":
    main()
