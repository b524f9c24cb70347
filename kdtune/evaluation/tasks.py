"""Tasks of lm-evaluation-harness: which are asked for, whether they can be run, and what comes out.

lm-eval is an extra (`pip install 'kdtune[eval]'`) and is imported where it is used. Nothing comes from the network
unless the settings say so.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdtune.config import setting
from kdtune.distributed import ALONE, Ranks
from kdtune.evaluation import estimates
from kdtune.evaluation.estimates import Definition
from kdtune.evaluation.results import Example, Metric, Result, named_settings
from kdtune.models import Decoder, ModelConfig
from kdtune.tokenizers import Tokenizer

_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc", "brier_score")


@dataclass
class TasksConfig:
    """Which tasks of lm-evaluation-harness a model is given, and how."""

    names: list[str]  # tasks, groups and tags; * stands for any letters
    include_path: str | None = setting(None, path=True)  # a folder of your own tasks' YAML files; null: none
    download: bool = False  # fetch what a task reads from the Hugging Face hub; false: only files and what was fetched
    num_fewshot: int | None = setting(None, ge=0)  # worked examples before each question; null: what the task says
    limit: int | None = setting(None, gt=0)  # first documents of each task; null: all
    system_prompt: str | None = None  # goes before everything; null: none
    apply_chat_template: bool = False  # put questions, as user's turns, into the model's chat template
    max_seq_len: int | None = setting(None, gt=1)  # tokens of a row; null: as many as the model was built for
    max_tokens: int | None = setting(None, gt=0)  # computed at a time; null: 2048 on the CPU, 8192 on an accelerator
    seed: int = setting(1234, ge=0)  # of the choice of worked examples, and of texts that are drawn
    log_samples: bool = False  # also write what was asked and answered, to tasks/<name>.jsonl


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to be run.

    Attributes:
        cfg: which and how.
        loaded: what `lm_eval.evaluator.evaluate` takes.
        max_seq_len: tokens of a row.
    """

    cfg: TasksConfig
    loaded: dict[str, Any]
    max_seq_len: int

    def describe(self) -> str:
        """One line: how many of what."""
        counts = []
        for name, task in self.loaded["tasks"].items():
            documents = len(task.eval_docs)
            counts.append(f"{name} ({min(documents, self.cfg.limit or documents):,})")
        return ", ".join(counts)


@dataclass(frozen=True)
class Found:
    """What tasks have shown.

    Attributes:
        results: of each task, then of each group.
        examples: what each document adds.
        samples: of each task, what was asked and answered, one dict for each document and filter.
        num_tokens: that were scored or generated.
        settings: of each task, as in `Evaluation`.
    """

    results: list[Result]
    examples: list[Example]
    samples: dict[str, list[dict[str, Any]]]
    num_tokens: int
    settings: dict[str, dict[str, str]]


def check_tasks(cfg: TasksConfig, tokenizer: Tokenizer, model: ModelConfig) -> Tasks:
    """Load tasks with their data, before a weight is read.

    Args:
        cfg: which and how.
        tokenizer: of the model.
        model: the architecture.

    Raises:
        ValueError, OSError: lm-eval is not installed, there is no such task or file, a task needs the network or what
            kdtune does not do.
    """
    _check_settings(cfg, tokenizer, model)
    max_seq_len = cfg.max_seq_len or model.max_seq_len
    with _network(cfg.download), _reproducible(cfg.seed):
        loaded = _load(cfg)
        for name, task in loaded["tasks"].items():
            _check_task(name, task, tokenizer, max_seq_len)
            default = task.get_config("num_fewshot")
            if cfg.num_fewshot and default == 0:
                print(f"task {name} says that it has no worked examples (num_fewshot: 0), and keeps to it")
            elif default is None or cfg.num_fewshot is not None:
                task.set_config("num_fewshot", cfg.num_fewshot or 0)
            task.set_fewshot_seed(seed=cfg.seed)
    return Tasks(cfg, loaded, max_seq_len)


def run_tasks(tasks: Tasks, model: Decoder, tokenizer: Tokenizer, ranks: Ranks = ALONE) -> Found:
    """Give a model the tasks.

    Args:
        tasks: as from `check_tasks`.
        model: on its device.
        tokenizer: of the model.
        ranks: the processes, which share the work; all of them call, and get the same.

    Raises:
        ValueError: a document that cannot be scored.
    """
    from lm_eval import evaluator

    from kdtune.evaluation.harness import HarnessModel

    cfg = tasks.cfg
    max_tokens = cfg.max_tokens or (2048 if ranks.device.type == "cpu" else 8192)
    asked = HarnessModel(
        model, tokenizer, max_seq_len=tasks.max_seq_len, max_tokens=max_tokens, seed=cfg.seed, ranks=ranks
    )
    with _network(cfg.download), _reproducible(cfg.seed):
        found: Any = evaluator.evaluate(
            asked,
            tasks.loaded,
            limit=cfg.limit,
            bootstrap_iters=1000,  # for the few metrics that are no means
            system_instruction=cfg.system_prompt,
            apply_chat_template=cfg.apply_chat_template,
            fewshot_as_multiturn=cfg.apply_chat_template,
        )
    if (num_cut := asked.num_cut.total()) and ranks.is_first:
        print(
            f"{num_cut:,} requests are longer than the {tasks.max_seq_len} tokens of a row: the model did not see the "
            "beginnings of their contexts."
        )
    results, examples, settings = [], [], {}
    for name, samples in found["samples"].items():
        task = tasks.loaded["tasks"][name]
        of_task = _examples(name, task, samples, asked.num_tokens)
        examples += of_task
        results.append(_result(name, task, of_task, found["results"][name]))
        num_cut = asked.num_cut[name]
        settings[name] = {"requests cut": f"{num_cut:,} to {tasks.max_seq_len} tokens" if num_cut else "none"}
        if task.OUTPUT_TYPE == "generate_until":
            settings[name] |= _settings_of_texts(task, tokenizer, cfg.seed)
    for name, aggregate in found.get("groups", {}).items():
        counts = [one for one in results if one.task in _members(tasks.loaded, name)]
        num_examples, num_tokens = sum(one.num_examples for one in counts), sum(one.num_tokens for one in counts)
        metrics = _reported(aggregate, found["higher_is_better"].get(name, {}))
        results.append(Result(name, None, num_examples, num_tokens, metrics))
    num_tokens = sum(asked.num_tokens.values())
    return Found(results, examples, found["samples"] if cfg.log_samples else {}, num_tokens, settings)


def write_samples(output_dir: Path, found: Found) -> None:
    """Write what was asked and answered, if that was to be kept: `tasks/<name>.jsonl` in the folder of the results."""
    for name, samples in found.samples.items():
        path = output_dir / "tasks" / f"{re.sub('[^-.0-9A-Za-z_]', '_', name)}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        path.write_text("".join(lines), encoding="utf-8")


def _check_settings(cfg: TasksConfig, tokenizer: Tokenizer, model: ModelConfig) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks are run by lm-evaluation-harness, which is not installed. Install it (pip install 'kdtune[eval]'), "
            "or leave tasks out."
        )
    if not cfg.names:
        raise ValueError("tasks.names is empty: there is nothing to run. Name a task, or leave tasks out.")
    if cfg.include_path is not None and not Path(cfg.include_path).is_dir():
        raise FileNotFoundError(
            f"tasks.include_path={cfg.include_path}: no such folder (from {Path.cwd()}). Give the one in which the "
            "YAML files of your tasks are."
        )
    if cfg.max_seq_len is not None and cfg.max_seq_len > model.max_seq_len:
        raise ValueError(
            f"tasks.max_seq_len={cfg.max_seq_len}, and the model was built for {model.max_seq_len} positions "
            f"(max_position_embeddings). Beyond them its predictions mean nothing: use at most {model.max_seq_len}."
        )
    if cfg.apply_chat_template and not tokenizer.has_chat_template:
        raise ValueError(
            f"tasks.apply_chat_template=true, and the tokenizer in {tokenizer.source} has no chat template. Leave it "
            "out, or put a chat_template.jinja into the folder."
        )
    if tokenizer.bos_id is None and not tokenizer.eos_ids:
        raise ValueError(
            f"the tokenizer in {tokenizer.source} has neither bos nor eos, so there is nothing from which the first "
            "token of a text is predicted. Name one in tokenizer_config.json."
        )


def _load(cfg: TasksConfig) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    folder = None if cfg.include_path is None else Path(cfg.include_path).absolute()
    manager = TaskManager(include_path=folder, include_defaults=False)
    names = _matching(cfg.names, manager)
    if names is None:
        print("reading the list of lm-evaluation-harness's own tasks, which takes ten seconds", flush=True)
        manager = TaskManager(include_path=folder)
        names = _matching(cfg.names, manager)
    if names is None:
        _refuse_unknown(cfg, manager)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names or []:
        try:
            # Files that a task names are beside it.
            with contextlib.nullcontext() if folder is None else _within(folder):
                found = manager.load([name])
        except Exception as error:
            raise _explained(cfg, name, error) from error
        for kind, members in loaded.items():
            members.update(found.get(kind, {}))
    return loaded


def _matching(names: Sequence[str], manager: Any) -> list[str] | None:
    """The tasks of these names; None if one of them has none."""
    found: list[str] = []
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            return None
        found += matching
    return list(dict.fromkeys(found))


def _refuse_unknown(cfg: TasksConfig, manager: Any) -> None:
    unknown = next(name for name in cfg.names if not manager.match_tasks([name]))
    near = difflib.get_close_matches(unknown, manager.all_tasks, n=3)
    where = "" if cfg.include_path is None else f" nor in {cfg.include_path}"
    raise ValueError(
        f"tasks.names: there is no task {unknown} in lm-evaluation-harness{where}. "
        + (f"Did you mean {' or '.join(near)}? " if near else "")
        + "lm_eval ls tasks lists its own; those of your files are found by tasks.include_path."
    )


def _explained(cfg: TasksConfig, name: str, error: Exception) -> Exception:
    missing = f"task {name}: {error}"
    if isinstance(error, FileNotFoundError):
        folder = cfg.include_path or Path.cwd()
        return FileNotFoundError(f"{missing}. Files that a task names are looked for from {folder}.")
    if not cfg.download and isinstance(error, (ConnectionError, OSError)):
        return ValueError(
            f"{missing}. It reads from the Hugging Face hub, and what it needs was not fetched before. Give "
            "tasks.download=true, or write a task of a file of your own (docs/evaluate.md)."
        )
    return ValueError(f"task {name} cannot be loaded: {type(error).__name__}: {error}. Mend its YAML file.")


def _check_task(name: str, task: Any, tokenizer: Tokenizer, max_seq_len: int) -> None:
    from kdtune.evaluation.harness import Generation

    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"task {name} runs code that the model writes, which kdtune does not do. Leave it out.")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"task {name} asks about more than text, which kdtune's models do not take. Leave it out.")
    if task.OUTPUT_TYPE != "generate_until":
        return
    try:
        settings = Generation.of(task.config.generation_kwargs or {}, tokenizer)
    except ValueError as error:
        raise ValueError(f"task {name}: {error} Change them in its YAML file.") from None
    if settings.max_new_tokens >= max_seq_len:
        raise ValueError(
            f"task {name} has {settings.max_new_tokens} new tokens generated, and a row has {max_seq_len}: nothing is "
            "left for the question. Give max_gen_toks in its generation_kwargs, or a larger tasks.max_seq_len."
        )


def _settings_of_texts(task: Any, tokenizer: Tokenizer, seed: int) -> dict[str, str]:
    """How a task has texts generated."""
    from kdtune.evaluation.harness import Generation

    how = asdict(Generation.of(task.config.generation_kwargs or {}, tokenizer))
    return named_settings({**how, "seed": seed} if how["temperature"] else how)


def _examples(
    name: str, task: Any, samples: Sequence[Mapping[str, Any]], num_tokens: Mapping[tuple[str, int], int]
) -> list[Example]:
    """What each document adds to those metrics that are means over documents, and to those of whole texts."""
    from lm_eval.api.metrics import mean

    aggregations = task.aggregation()
    by_document: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_document.setdefault(sample["doc_id"], []).append(sample)
    found = []
    for document, of_filters in by_document.items():
        values, sums, num_bytes = {}, {}, 0
        for sample in of_filters:
            for metric in sample["metrics"]:
                if aggregations.get(metric, mean) is mean and isinstance(sample[metric], (int, float)):
                    values[_named(metric, sample["filter"])] = float(sample[metric])
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            first = of_filters[0]
            sums["ce"] = -float(first["filtered_resps"][0])
            num_bytes = first["bits_per_byte"][1] if "bits_per_byte" in first else len(first["target"].encode())
        # The same document behind other worked examples, or in a chat, is another question.
        asked = "".join(of_filters[0][part] for part in ("doc_hash", "prompt_hash", "target_hash"))
        id = hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()
        found.append(
            Example(name, id, num_tokens=num_tokens[name, document], num_bytes=num_bytes, sums=sums, values=values)
        )
    shared = set.intersection(*(set(one.values) for one in found)) if found else set()
    kept = [{metric: value for metric, value in one.values.items() if metric in shared} for one in found]
    return [replace(one, values=values) for one, values in zip(found, kept, strict=True)]


def _result(name: str, task: Any, examples: Sequence[Example], aggregate: Mapping[str, Any]) -> Result:
    """Of one task, with the metrics that are no means as the harness gives them."""
    reported = _reported(aggregate, task.higher_is_better())
    others = {metric: Definition("", one.unit, one.better) for metric, one in reported.items()}
    found = estimates.result(name, examples, others=others)
    return replace(found, metrics={**found.metrics, **{k: v for k, v in reported.items() if k not in found.metrics}})


def _reported(aggregate: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]) -> dict[str, Metric]:
    """The metrics of a task or a group as the harness gives them: `acc,none`, and `acc_stderr,none` beside it."""
    found = {}
    for key, value in aggregate.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = aggregate.get(f"{metric}_stderr,{chosen}")
        better = {True: "higher", False: "lower"}.get(higher_is_better.get(metric))  # type: ignore[arg-type]
        unit = "share" if metric in _SHARES else ""
        known = float(stderr) if isinstance(stderr, (int, float)) else None
        found[_named(metric, chosen)] = Metric(float(value), known, unit, better)  # type: ignore[arg-type]
    return found


def _named(metric: str, chosen: str) -> str:
    """A metric's name, and that of the filter by which answers were chosen from texts if the task has some."""
    return metric if chosen == "none" else f"{metric},{chosen}"


def _members(loaded: Mapping[str, Any], group: str) -> set[str]:
    found: set[str] = set()
    for name in loaded["group_map"].get(group, []):
        found |= _members(loaded, name) if name in loaded["group_map"] else {name}
    return found


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _network(is_allowed: bool) -> Iterator[None]:
    """Let Hugging Face's libraries look for nothing outside this machine, unless it is allowed."""
    if is_allowed:
        yield
        return
    import datasets.config
    import huggingface_hub.constants

    # Of metrics that lm-eval does not have. It is imported only for these: that takes seconds.
    metrics = sys.modules.get("evaluate.config")
    hub = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    places: list[tuple[Any, str]] = [*hub, *([(metrics, "HF_EVALUATE_OFFLINE")] if metrics else [])]
    before = [getattr(*place) for place in places]
    with _environment("HF_EVALUATE_OFFLINE", "1"):
        try:
            for module, name in places:
                setattr(module, name, True)
            yield
        finally:
            for (module, name), value in zip(places, before, strict=True):
                setattr(module, name, value)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """What tasks draw is the same in each run and on each rank; and nobody else's random numbers change."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with _environment("DISABLE_MULTIPROC", "1"):  # or a process that has threads is forked for a bootstrap
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
