"""Tables and figures of what scripts/study.sh has run, for docs/study.md.

    python scripts/study.py runs/study
    python scripts/study.py runs/study --figures docs

Every setting is compared with the student of the teacher alone (kd_ratio=1 of `main`, or of `tuned` at the other
learning rate), seed by seed: runs of one seed see the same rows in the same order. `--figures` also draws (it takes
matplotlib).
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdtune.cli.sweep import SEED, last_values, spread

Values = dict[str, float]
METRICS = {"val_ce_loss": "cross-entropy", "val_kd_loss": "KL to the teacher", "val_agreement": "top-1 agreement"}
REFERENCE, LABELS = "teacher alone", "labels alone"
MAIN = {"main": "learning rate 2e-3, the quickstart's", "tuned": "1e-3, better for both"}


@dataclass(frozen=True)
class Part:
    """Sweeps that answer one question.

    Attributes:
        title: of its table.
        name: of a variant, from the values of its axes.
        sweeps: folders.
        reference: the sweep with the student of the teacher alone that they are compared with; None: theirs is another
            task.
        is_sorted: whether rows are in the order of their names, not of the runs.
    """

    title: str
    name: Callable[[str, Mapping[str, str]], str]
    sweeps: tuple[str, ...]
    reference: str | None = "main"
    is_sorted: bool = False


def by_ratio(kd_ratio: str) -> str:
    return {"0": LABELS, "1": REFERENCE}.get(kd_ratio, f"kd_ratio {kd_ratio}")


LEARNING_RATES = {"main": "2e-3", "tuned": "1e-3"}  # of sweeps that have one


def by_rate(sweep: str, values: Mapping[str, str]) -> str:
    rate = LEARNING_RATES.get(sweep) or values["optimizer.lr"]
    return f"{by_ratio(values['kd_ratio'])}, lr {float(rate):g}"


def by_divergence(_: str, values: Mapping[str, str]) -> str:
    return values["kd_loss.name"]


def of_pair(sweep: str, values: Mapping[str, str]) -> str:
    teacher, student = (
        "fine-tuned" if "task" in values.get(f"{which}checkpointer.checkpoint_dir", "task") else "plain"
        for which in ("teacher_", "")
    )
    return f"{student} student, " + ("labels alone" if sweep == "plain_labels" else f"{teacher} teacher")


def of_hidden(sweep: str, values: Mapping[str, str]) -> str:
    what = "logits and hidden states" if values.get("kd_loss.weight") == "1" else "hidden states alone"
    return f"{what}, layer by layer" if "layerwise" in sweep else what


START = {"random": "random weights", "random_hidden": "random weights", "narrow": "pruned to a narrow MLP"}


def of_start(sweep: str, values: Mapping[str, str]) -> str:
    what = by_ratio(values["kd_ratio"]) if "kd_ratio" in values else of_hidden(sweep, values)
    return f"{START[sweep]}: {what}"


PARTS = (
    Part("The teacher or the labels", lambda _, values: by_ratio(values["kd_ratio"]), ("main",)),
    Part("With a better learning rate", lambda _, values: by_ratio(values["kd_ratio"]), ("tuned",)),
    Part(
        "More steps on labels",
        lambda _, values: f"labels alone, for as long, lr {values['optimizer.lr']}",
        ("compute",),
    ),
    Part("kd_ratio", lambda _, values: by_ratio(values["kd_ratio"]), ("ratio",)),
    Part("Learning rate", by_rate, ("main", "tuned", "lr"), is_sorted=True),
    Part("Divergence", by_divergence, ("divergence",)),
    Part("Divergence, with the better learning rate", by_divergence, ("divergence_tuned",), reference="tuned"),
    Part("Temperature", lambda _, values: f"temperature {values['kd_loss.temperature']}", ("temperature",)),
    Part("Hidden states", of_hidden, ("hidden", "layerwise")),
    Part(
        "Size of the student",
        lambda _, values: f"layers {values['checkpointer.keep_layers']}: {by_ratio(values['kd_ratio'])}",
        ("size",),
    ),
    Part("Start of the student", of_start, tuple(START)),
    Part("Another task: fine-tuned or plain", of_pair, ("plain", "plain_labels"), reference=None),
)


def read(study: Path, part: Part) -> dict[str, dict[str, Values]]:
    """What the finished runs of each variant ended with, by seed."""
    found: dict[str, dict[str, Values]] = {}
    for sweep in part.sweeps:
        path = study / sweep / "sweep.json"
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else ():
            values = last_values(study / sweep / run["name"])
            if run["state"] == "done" and "val_ce_loss" in values:
                found.setdefault(part.name(sweep, run["values"]), {})[run["values"][SEED]] = values
    return dict(sorted(found.items())) if part.is_sorted else found


def reference_of(study: Path, part: Part) -> dict[str, Values]:
    """What the students of the teacher alone ended with, by seed; empty without."""
    of_sweep = next((one for one in PARTS if one.sweeps == (part.reference,)), None)
    return read(study, of_sweep).get(REFERENCE, {}) if of_sweep is not None else {}


def differences(runs: Mapping[str, Values], others: Mapping[str, Values], key: str = "val_ce_loss") -> list[float]:
    """Of the seeds that both have."""
    return [runs[seed][key] - others[seed][key] for seed in runs if seed in others]


def with_error(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    if len(values) < 2:
        return f"{values[0]:+.3f}" if values else ""
    return f"{statistics.fmean(values):+.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def tables(study: Path) -> Iterator[str]:
    """Markdown."""
    for part in PARTS:
        found, reference = read(study, part), reference_of(study, part)
        if not found:
            continue
        head = ["", "seeds", *METRICS.values()]
        head += ["cross-entropy, to the teacher alone"] if part.reference else []
        yield f"\n### {part.title}\n\n| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}"
        for name, runs in found.items():
            cells = [name, str(len(runs)), *(spread([run[key] for run in runs.values()]) for key in METRICS)]
            if part.reference:
                cells.append("" if runs == reference else with_error(differences(runs, reference)))
            yield f"| {' | '.join(cells)} |"


def curves(study: Path, sweep: str) -> dict[str, dict[int, list[float]]]:
    """Validation cross-entropies of the seeds by step, with the teacher and without; empty if it was not run."""
    found: dict[str, dict[int, list[float]]] = {}
    path = study / sweep / "sweep.json"
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else ():
        if run["state"] != "done":
            continue
        by_step = found.setdefault(by_ratio(run["values"]["kd_ratio"]), {})
        metrics = study / sweep / run["name"] / "metrics.jsonl"
        for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
            if "val_ce_loss" in line:
                by_step.setdefault(line["step"], []).append(line["val_ce_loss"])
    return found


def claim(study: Path, sweep: str) -> str:
    """How much earlier and better the student of the teacher is than that of the labels."""
    found = read(study, next(part for part in PARTS if part.sweeps == (sweep,)))
    ahead = [-difference for difference in differences(found[REFERENCE], found[LABELS])]
    if len(ahead) < 2:
        return "It takes two seeds to say by how much one is ahead."
    mean, error = statistics.fmean(ahead), statistics.stdev(ahead) / math.sqrt(len(ahead))
    of_labels = curves(study, sweep)[LABELS]
    last = max(of_labels)
    goal = statistics.fmean(of_labels[last])
    means = {step: statistics.fmean(values) for step, values in curves(study, sweep)[REFERENCE].items()}
    reached = min((step for step, value in means.items() if value <= goal), default=None)
    when = f"has been reached with the teacher by step {reached}" if reached else "is never reached with the teacher"
    return (
        f"After {last} steps the student of the teacher is {mean:.3f} nats ahead, standard error {error:.4f} over "
        f"{len(ahead)} seeds: {mean / error:.0f} of them. What the labels reach then, {goal:.3f}, {when}."
    )


def draw(study: Path, folder: Path) -> None:
    """study_curves.svg and study_settings.svg."""
    import matplotlib

    matplotlib.use("Agg")
    # The salt makes it the same file each time.
    matplotlib.rcParams.update({"svg.hashsalt": "kdtune", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    shown = {title: found for sweep, title in MAIN.items() if (found := curves(study, sweep))}
    figure, all_axes = pyplot.subplots(
        1, len(shown), figsize=(4 * len(shown), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, found) in zip(all_axes[0], shown.items(), strict=True):
        for color, (name, by_step) in zip(("C0", "C1"), found.items(), strict=True):
            steps = sorted(by_step)
            means = [statistics.fmean(by_step[step]) for step in steps]
            spreads = [statistics.stdev(by_step[step]) if len(by_step[step]) > 1 else 0.0 for step in steps]
            axis.plot(steps, means, "o-", color=color, label=name, markersize=3)
            low, high = ([mean + sign * one for mean, one in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            if name == LABELS:
                axis.axhline(means[-1], color=color, linewidth=0.8, linestyle=":")
        axis.set(xlabel="step", title=title)
    all_axes[0, 0].set_ylabel("cross-entropy, nats")
    all_axes[0, 0].legend(frameon=False)
    save(figure, folder / "study_curves.svg")

    rows: list[tuple[str, list[float]]] = []
    for part in PARTS:
        if reference := reference_of(study, part):
            found = {name: runs for name, runs in read(study, part).items() if runs != reference}
            rows += [(part.title, [])] * bool(found)
            rows += [(name, differences(runs, reference)) for name, runs in found.items()]
    figure, axis = pyplot.subplots(figsize=(6.5, 0.6 + 0.19 * len(rows)), layout="constrained")
    for height, (_, values) in zip(range(len(rows), 0, -1), rows, strict=True):
        axis.plot(values, [height] * len(values), "o", color="C0", alpha=0.4, markersize=3)
        if values:
            axis.plot([statistics.fmean(values)], [height], "|", color="C3", markersize=9)
    axis.axvline(0, color="C1", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=0.1, linscale=2)
    ticks = [-0.1, -0.05, 0, 0.05, 0.1, 1, 5]
    axis.set_xticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axis.set_yticks(range(len(rows), 0, -1), [name for name, _ in rows])
    for label, (_, values) in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_weight("normal" if values else "bold")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", linewidth=0.4)
    axis.set_xlabel("cross-entropy beside the teacher alone, nats")
    save(figure, folder / "study_settings.svg")


def save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    figure.savefig(path, metadata={"Date": None})
    print(f"drew {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=Path("runs/study"))
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw into this folder")
    settings = parser.parse_args()
    if not (settings.study / "main" / "sweep.json").exists():
        raise SystemExit(f"{settings.study} has no main/sweep.json: run `bash scripts/study.sh main` first.")
    for sweep, title in MAIN.items():
        if (settings.study / sweep / "sweep.json").exists():
            print(f"{title}: {claim(settings.study, sweep)}")
    print("\n".join(tables(settings.study)))
    if settings.figures is not None:
        draw(settings.study, settings.figures)


if __name__ == "__main__":
    main()
