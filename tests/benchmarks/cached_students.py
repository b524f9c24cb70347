"""Compare students of cached teachers with those of the live one: the quickstart's pair, several seeds.

    python tests/benchmarks/cached_students.py
    python tests/benchmarks/cached_students.py --variants live top-8 --seeds 0 1 --output runs/few

The teacher is asked once for each cache, about as many rows as a run trains on. Every student sees each of them once,
in the order of its seed; 120 steps, `kd_ratio=1`. What is validated is the finished student beside the live teacher: a
cache of draws can only estimate the divergence. --plot also draws what the table says (it takes matplotlib). What
--output has already is not run again. Forty minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from harness import print_table

from kdtune import config, devices
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.distributed import Ranks
from kdtune.teacher_cache import TeacherCache

ROWS_PER_STEP = 8  # of the quickstart


@dataclass(frozen=True)
class Way:
    """Of knowing the teacher.

    Attributes:
        title: its name in the table.
        store: settings of the cache; None: the teacher is live.
        student: further settings of the training.
    """

    title: str
    store: tuple[str, ...] | None = None
    student: tuple[str, ...] = ()


WAYS = {
    "live": Way("live"),
    "hidden": Way("hidden states", ("store.kind=hidden",)),
    "top-256": Way("top 256", ("store.kind=top_k", "store.top_k=256")),
    "top-64": Way("top 64", ("store.kind=top_k",)),
    "top-8": Way("top 8", ("store.kind=top_k", "store.top_k=8")),
    "samples-200": Way("200 draws", ()),
    "samples-100": Way("100 draws", ("store.kind=samples", "store.num_samples=100")),
    "samples-50": Way("50 draws", ("store.kind=samples", "store.num_samples=50")),
    "samples-12": Way("12 draws", ("store.kind=samples", "store.num_samples=12")),
    "labels": Way("no teacher", student=("kd_ratio=0",)),
}
USUAL = [name for name in WAYS if name not in ("hidden", "top-256", "labels")]


def kdtune(*words: str) -> None:
    command = [sys.executable, "-m", "kdtune", "run", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}")


@functools.cache
def ask(store: tuple[str, ...], folder: Path, num_rows: int) -> float:
    """Bytes for each labelled token of a cache, which is made or completed."""
    rows = [f"dataset.split=[:{num_rows}]", "dataset_val=null"]
    kdtune("cache_teacher_logits", "--config", "quickstart", *rows, *store, f"output_dir={folder}")
    cache = TeacherCache(folder)
    return cache.num_bytes / cache.num_tokens


def train(settings: argparse.Namespace, way: Way, cache: Path | None, seed: int, folder: Path) -> None:
    rows = [f"dataset.split=[:{settings.steps * ROWS_PER_STEP}]", f"max_steps={settings.steps}"]
    quiet = ["dataset_val=null", "run_val_every_n_steps=0", "sample_prompts=[]"]
    teacher = [] if cache is None else [f"teacher.cache_dir={cache}"]
    where = [f"seed={seed}", f"output_dir={folder}"]
    kdtune("knowledge_distillation", "--config", "quickstart", *rows, *quiet, *teacher, *way.student, *where)


def validate(student: Path, split: str | None) -> dict[str, float]:
    """As the recipe does, beside the live teacher, on all validation rows or some."""
    recipe = load_module(catalog.find_recipe("knowledge_distillation"))
    given = [
        *(f"checkpointer.checkpoint_dir={student}", "checkpointer.keep_layers=null"),
        *("dataset.split=[:1]", f"dataset_val.split={split or 'null'}", "batch_size=8"),
    ]
    cfg = config.load(recipe.Config, catalog.find_config("quickstart", "knowledge_distillation"), given)
    ranks = Ranks(devices.resolve(cfg.device))
    model, teacher, _ = recipe.build(cfg, ranks)
    batches = recipe.load_data(cfg, recipe.load_tokenizer(cfg)).val_batches
    return recipe.validate(cfg, SimpleNamespace(ranks=ranks, val_batches=batches), model, teacher)


def run(settings: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """What was found for each way and seed; kept in --output."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in settings.variants}
    for seed in settings.seeds:
        for name, answers in found.items():
            way, result = WAYS[name], settings.output / f"{name}-{seed}.json"
            if not result.exists():
                cache, size = None, 0.0
                if way.store is not None:
                    cache = settings.output / "-".join(["cache", *way.store])
                    size = ask(way.store, cache, settings.steps * ROWS_PER_STEP)
                folder = settings.output / f"{name}-{seed}"
                train(settings, way, cache, seed, folder)
                result.write_text(json.dumps({"bytes": size, **validate(folder / "model", settings.val_split)}))
                print(result.read_text(), flush=True)
            answers.append(json.loads(result.read_text()))
    return found


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form).strip('+%')}"


COLUMNS = {
    "val_ce_loss": ("cross-entropy, nats per token", ".3f"),
    "val_kd_loss": ("KL to the teacher", ".4f"),
    "val_agreement": ("top-1 agreement", ".1%"),
}


def rows(found: Mapping[str, list[dict[str, float]]]) -> list[list[str]]:
    table = []
    for name, answers in found.items():
        size = answers[0]["bytes"]
        row = [WAYS[name].title, f"{size:,.0f}" if size else ""]
        for key, (_, form) in COLUMNS.items():
            row.append(spread([answer[key] for answer in answers], form))
        for key in ("val_ce_loss", "val_kd_loss"):  # of one seed, so of the same rows in the same order
            pairs = zip(answers, found["live"], strict=True) if name != "live" and "live" in found else ()
            differences = [one[key] - other[key] for one, other in pairs]
            row.append(spread(differences, "+.4f") if differences else "")
        table.append(row)
    return table


def plot(found: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """A dot for each seed; shaded is what the live teacher's seeds span."""
    import matplotlib

    matplotlib.use("Agg")
    # The salt makes it the same file each time.
    matplotlib.rcParams.update({"svg.hashsalt": "kdtune", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    shown = [name for name in found if name != "labels"]  # far away
    figure, axes = pyplot.subplots(1, 2, figsize=(7.5, 0.5 + 0.3 * len(shown)), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("val_ce_loss", "val_kd_loss"), strict=True):
        for height, name in enumerate(reversed(shown)):
            axis.plot([answer[key] for answer in found[name]], [height] * len(found[name]), "o", color="C0", alpha=0.7)
        live = [answer[key] for answer in found["live"]]
        axis.axvspan(min(live), max(live), color="C1", alpha=0.25, linewidth=0)
        axis.set_xlabel(COLUMNS[key][0])
        axis.set_ylim(-0.6, len(shown) - 0.4)
    axes[0].set_yticks(range(len(shown)), [WAYS[name].title for name in reversed(shown)])
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(WAYS), default=USUAL, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help=f"of training, {ROWS_PER_STEP} rows each")
    parser.add_argument("--val-split", help="such as [:64]; all validation rows if absent")
    parser.add_argument("--output", type=Path, default=Path("runs/cached_students"))
    parser.add_argument("--plot", type=Path, help="an svg or png file to write")
    settings = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    settings.output.mkdir(parents=True, exist_ok=True)
    found = run(settings)
    differences = ("cross-entropy, to live", "KL, to live")
    print_table(["", "bytes a token", *(title for title, _ in COLUMNS.values()), *differences], rows(found))
    if settings.plot is not None:
        plot(found, settings.plot)


if __name__ == "__main__":
    main()
