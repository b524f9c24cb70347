"""Folders as runs, sweeps and evaluations leave them, of a few made-up numbers, and the page that is made of them."""

import json
import math
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from kdtune.evaluation import estimates
from kdtune.evaluation.results import Evaluation, Example, Metric, Model, Response, Result, Sample, TokenExample, write
from kdtune.reporting import material, page

VOID = {"meta", "br", "hr", "input", "link", "img"}


def write_run(
    folder: Path,
    *,
    steps: int = 8,
    better: float = 0.0,
    lines: Sequence[Mapping[str, Any]] | None = None,
    finished: bool = True,
    **settings: Any,
) -> Path:
    """A run of which each number follows from its step; `better` is how much lower its losses are."""
    folder.mkdir(parents=True)
    config = {"seed": 0, "kd_ratio": 1.0, "kd_loss": {"name": "forward_kl"}, "output_dir": str(folder), **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "versions.json").write_text('{"kdtune": "0.1.0"}')
    if lines is None:
        lines = [line for step in range(steps + 1) for line in numbers(step, steps, better)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        write_model(folder / "model")
    return folder


def numbers(step: int, steps: int, better: float) -> list[dict[str, Any]]:
    """What a run logs at a step: losses, and before the first, in the middle and after the last a validation."""
    loss = 2 + math.exp(-step) - better
    found: list[dict[str, Any]] = []
    if step:
        found.append({"step": step, "loss": loss - 1, "ce_loss": loss, "kd_loss": loss - 1, "lr": 1e-3 / step})
        found[0] |= {"grad_norm": 1 / step, "num_tokens": 90, "tokens_per_second": 1e3, "peak_memory_gib": 0.5}
    if step in (0, steps // 2, steps):
        values = {"val_ce_loss": loss, "val_kd_loss": loss - 1.5, "val_agreement": 0.5 + better}
        found.append({"step": step, **values, "val_teacher_ce_loss": 1.75})
    return found


def write_model(folder: Path) -> Path:
    """A config.json and weights of a header alone: 8 x 4 numbers."""
    folder.mkdir(parents=True)
    config = {"num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 2, "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    return folder


def write_sweep(folder: Path, variants: Mapping[str, float], seeds: Sequence[int] = (0, 1, 2)) -> Path:
    """Runs of a few variants, each with a few seeds that move all of them alike, and with each seed a little more."""
    listed = []
    for number, (variant, better) in enumerate(variants.items()):
        for seed in seeds:
            name = f"{variant}-seed{seed}"
            moved = better + 0.01 * seed + 0.001 * seed * number
            write_run(folder / name, better=moved, seed=seed, kd_ratio=float(number))
            values = {"kd_loss.name": variant, "seed": str(seed)}
            listed.append({"name": name, "values": values, "overrides": [], "settings": "", "state": "done"})
    sweep = {"kdtune_sweep": 1, "recipe": "knowledge_distillation", "axes": ["kd_loss.name", "seed"], "runs": listed}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def write_evaluation(folder: Path, *, better: float = 0.0, count: int = 40, name: str = "runs/a/model") -> Path:
    """Of made-up examples whose cross-entropy is `better` lower, each in tenths of it or more; 0 differs in nothing."""
    folder.mkdir(parents=True)
    examples = [
        Example("text", f"{i:016x}", None, 10, 40, {"ce": 20 + i % 7 - better * (10 + i % 3), "kl_from_teacher": 4.0})
        for i in range(count)
    ]
    examples += [Example("quiz", f"{i:016x}", values={"acc": float(i % 3 == 0)}) for i in range(count)]
    model = Model(name, 32, 8, 2, 4, "fp32", None, "ab")
    found = [
        *estimates.results("text", examples[:count]),
        Result("quiz", None, count, 0, {"acc": Metric(0.35, 0.07, "share", "higher")}),
    ]
    samples = [Sample("Once\nupon", " a <b>time", " a while"), Sample("Why?", " Because.", None)]
    tokens = [
        TokenExample(
            "0", "Q: ", ["Hi", "\n", "<b>"], [0.1, None, 2.0], [0.01, None, 3.0], ["Hi", None, "x"], ["Ho", None, "y"]
        )
    ]
    said = [Response(str(i), f"Add {i}:", f"{i} <b>", [f"{name} {i}", "other"], [0.25, 1.0]) for i in range(12)]
    write(folder, Evaluation(model, model, "tok", found, samples, 1.0, 2.0), examples, tokens, said)
    return folder


def render(*folders: Path) -> str:
    return page.render(material.read(folders))


class Page(HTMLParser):
    """What is in a page: its tags, attributes and text; refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        values = dict(attrs)
        assert len(values) == len(attrs), "an attribute that is given twice"
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name == "href" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data
