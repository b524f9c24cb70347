"""Tasks of local files, whose figures are those of lm-evaluation-harness with transformers' model, or known."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdtune import tokenizers
from kdtune.checkpoint import load_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kdtune[eval]'")

import torch
import yaml

from kdtune.evaluation.results import Metric
from kdtune.evaluation.tasks import Found, TasksConfig, check_tasks, run_tasks
from kdtune.models import Decoder
from kdtune.tokenizers import Tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs"
MEAN = {"aggregation": "mean", "higher_is_better": True}
BASE = {"dataset_path": "json", "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:"}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric, **MEAN} for metric in ("acc", "acc_norm", "acc_bytes")],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, **MEAN}],
        "filter_list": [
            {"name": "whole", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]},
        ],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices | join(' ')}}",
        "metric_list": [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "last_words": {
        "output_type": "loglikelihood",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc", **MEAN}],
    },
}
WORDS = ["apples", "buys", "seven", "the", "Große", "東京", "12", "half as many", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks on twelve questions, one so long that it does not fit into a row, and a group of two."""
    folder, random_ = tmp_path_factory.mktemp("tasks"), random.Random(0)
    rows = []
    for i in range(12):
        question = " ".join(random_.choices(WORDS, k=60 if i == 5 else 6))
        choices = [" ".join(random_.choices(WORDS, k=k)) for k in (1, 2, 3)]
        rows.append({"question": question, "choices": choices, "answer": i % 3})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        text = yaml.safe_dump({"task": name, **BASE, "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, **task})
        (folder / f"{name}.yaml").write_text(text)
    group = {"group": "both", "task": ["choices", "last_words"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def model(tiny: Path) -> Decoder:
    return load_model(tiny / "teacher", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return tokenizers.load(tiny / "teacher")


def given(model: Decoder, tokenizer: Tokenizer, folder: Path, *names: str, **settings: Any) -> Found:
    cfg = TasksConfig(list(names), include_path=str(folder), **settings)
    return run_tasks(check_tasks(cfg, tokenizer, model.config), model, tokenizer)


@pytest.mark.parametrize(("num_fewshot", "is_chat"), [(0, False), (2, False), (1, True)])
def test_figures_are_those_of_the_harness(
    num_fewshot: int,
    is_chat: bool,
    model: Decoder,
    tokenizer: Tokenizer,
    folder: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = given(model, tokenizer, folder, *TASKS, num_fewshot=num_fewshot, apply_chat_template=is_chat)
    assert "are longer than the 128 tokens of a row" in capsys.readouterr().out
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float32)
    expected = simple_evaluate(
        HFLM(theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(tiny / "teacher"), batch_size=4),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        num_fewshot=num_fewshot,
        apply_chat_template=is_chat,
        bootstrap_iters=1000,
    )
    assert expected is not None
    assert [one.task for one in found.results] == [*TASKS]
    assert {"max_new_tokens": "6", "temperature": "0.0"}.items() <= found.settings["answers"].items()
    assert all(one["requests cut"].endswith(" to 128 tokens") for one in found.settings.values())
    for result in found.results:
        figures = expected["results"][result.task]
        names = {key for key in figures if "," in key and "_stderr" not in key}
        ours = {name if "," in name else f"{name},none" for name in result.metrics}
        assert ours - names == ({"ce,none", "perplexity,none"} if result.task == "texts" else set())
        assert result.num_examples == 12
        for name in names:
            metric = result.metrics[name.removesuffix(",none")]
            assert metric.value == pytest.approx(figures[name], rel=1e-5), name
            if isinstance(stderr := figures[name.replace(",", "_stderr,")], float):
                assert metric.stderr == pytest.approx(stderr, rel=1e-5), name
    # Pairs of evaluations are compared example by example.
    for task in ("choices", "answers"):
        ours = [one.values for one in found.examples if one.task == task]
        for metric in ours[0]:
            name, _, chosen = metric.partition(",")
            of_filter = [one for one in expected["samples"][task] if one["filter"] == (chosen or "none")]
            assert [one[metric] for one in ours] == [one[name] for one in of_filter]
    assert sum(one.num_tokens for one in found.results) == found.num_tokens


def by_name(found: Found) -> dict[str, Mapping[str, Metric]]:
    return {one.task: one.metrics for one in found.results}


def test_counting_and_normalisation(tiny: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A model that finds all tokens equally likely takes the choice of the fewest tokens, by what they are counted."""
    model = load_model(tiny / "teacher", dtype=torch.float32, device="cpu")
    torch.nn.init.zeros_(model.model.norm.weight)
    choices = ["a", "apples", "東京東京", "a a a a a"]
    counts = np.array([len(tokenizer.encode(f" {choice}", bos=False)) for choice in choices])
    picked = {
        "acc": counts,
        "acc_norm": counts / [len(choice) for choice in choices],
        "acc_bytes": counts / [len(choice.encode()) for choice in choices],
    }
    assert len({int(numbers.argmin()) for numbers in picked.values()}) > 1, "it matters by what they are counted"
    rows = [{"question": "?", "choices": choices, "answer": answer} for answer in (0, 1, 1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("choices", "texts"):
        task = {"task": name, **BASE, "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, **TASKS[name]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    found = given(model, tokenizer, tmp_path, "choices", "texts")
    for metric, numbers in picked.items():
        expected = [float(row["answer"] == numbers.argmin()) for row in rows]
        assert [one.values[metric] for one in found.examples if one.task == "choices"] == expected
        assert by_name(found)["choices"][metric].value == np.mean(expected)
        assert by_name(found)["choices"][metric].stderr == pytest.approx(np.std(expected, ddof=1) / math.sqrt(5))
        assert by_name(found)["choices"][metric].better == "higher"
    text = f"? {' '.join(choices)}"
    num_tokens = len(tokenizer.encode(text))
    metrics = by_name(found)["texts"]
    assert metrics["ce"].value == pytest.approx(math.log(2048), rel=1e-6)
    assert metrics["bits_per_byte"].value == pytest.approx(11 * num_tokens / len(text.encode()), rel=1e-6)
    assert metrics["word_perplexity"].value == pytest.approx(2048 ** (num_tokens / len(text.split())), rel=1e-4)
    assert (metrics["ce"].better, metrics["word_perplexity"].better) == ("lower", "lower")
    assert [one.num_tokens for one in found.examples if one.task == "texts"] == [num_tokens] * 5


def test_examples_pair_by_what_was_asked(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    found = given(model, tokenizer, folder, "choices", "answers", limit=7)
    again, behind_another = (given(model, tokenizer, folder, "choices", num_fewshot=n) for n in (0, 1))
    some, every, others = (
        [one.id for one in which.examples if one.task == "choices"] for which in (found, again, behind_another)
    )
    assert some == every[:7]
    assert len({*every, *others}) == 24
    assert [one.num_examples for one in found.results] == [7, 7]


def test_groups(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    found = by_name(given(model, tokenizer, folder, "both", "texts"))
    assert [*found] == ["choices", "last_words", "texts", "both"]
    assert found["both"]["acc"].value == pytest.approx(
        (found["choices"]["acc"].value + found["last_words"]["acc"].value) / 2
    )
    assert [*by_name(given(model, tokenizer, folder, "choi*"))] == ["choices"]


def test_samples_are_kept_if_asked_for(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    assert given(model, tokenizer, folder, "answers").samples == {}
    samples = given(model, tokenizer, folder, "answers", log_samples=True, system_prompt="Be brief. ").samples[
        "answers"
    ]
    assert len(samples) == 12 * 2
    assert samples[0]["arguments"][0][0].startswith("Be brief. Question: ")
    json.dumps(samples)


def test_the_documented_task(model: Decoder, tokenizer: Tokenizer) -> None:
    found = by_name(given(model, tokenizer, DOCS / "tasks", "capitals"))
    assert 0 <= found["capitals"]["acc"].value <= 1
    page = (DOCS / "evaluate.md").read_text(encoding="utf-8")
    assert (DOCS / "tasks" / "capitals.yaml").read_text(encoding="utf-8") in page


def test_nobody_elses_random_numbers_change(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    random.seed(7)
    np.random.seed(7)
    expected = random.random(), np.random.rand()
    random.seed(7)
    np.random.seed(7)
    given(model, tokenizer, folder, "answers", num_fewshot=1)
    assert (random.random(), np.random.rand()) == expected


def refusal(folder: Path, tokenizer: Tokenizer, model: Decoder, **settings: Any) -> str:
    cfg = TasksConfig(**{"names": ["odd"], "include_path": str(folder), **settings})
    with pytest.raises((ValueError, OSError)) as refused:
        check_tasks(cfg, tokenizer, model.config)
    return str(refused.value)


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        ({"names": []}, {}, "tasks.names is empty"),
        ({"include_path": "nowhere"}, {}, "tasks.include_path=nowhere: no such folder"),
        ({"max_seq_len": 129}, {}, "tasks.max_seq_len=129, and the model was built for 128"),
        ({}, {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, "no.jsonl.*looked for from"),
        ({}, {"dataset_path": "somebody/something"}, "task odd: .*Hugging Face hub.*tasks.download=true"),
        ({}, {"metric_list": [{"metric": "rouge"}]}, "task odd cannot be loaded: KeyError"),
        ({}, {"test_split": "nothing"}, "task odd cannot be loaded: .*nothing"),
        ({}, {"generation_kwargs": {"num_beams": 2}}, "task odd: its generation_kwargs have num_beams"),
        ({}, {"generation_kwargs": {"max_gen_toks": 128}}, "task odd has 128 new tokens generated, and a row has 128"),
        ({"max_seq_len": 6}, {}, "task odd has 6 new tokens generated, and a row has 6"),
        ({}, {"unsafe_code": True}, "runs code that the model writes"),
    ],
)
def test_refusals(
    settings: dict[str, Any],
    task: dict[str, Any],
    message: str,
    folder: Path,
    tokenizer: Tokenizer,
    model: Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("nobody asked for the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    files = {"data_files": {"test": str(folder / "rows.jsonl")}}
    odd = {"task": "odd", **BASE, "dataset_kwargs": files, **TASKS["answers"], **task}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(odd))
    found = refusal(tmp_path, tokenizer, model, **settings)
    assert re.search(message, found, re.DOTALL), found


def test_chats_need_a_template(folder: Path, tiny: Path, model: Decoder, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny / "teacher" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    tokenizer = tokenizers.load(tmp_path)
    message = refusal(folder, tokenizer, model, names=["choices"], apply_chat_template=True)
    assert "tasks.apply_chat_template=true" in message
    without = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**without, "post_processor": None}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "neither bos nor eos" in refusal(folder, tokenizers.load(tmp_path), model, names=["choices"])


def test_without_the_harness(
    folder: Path, tokenizer: Tokenizer, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    assert "pip install 'kdtune[eval]'" in refusal(folder, tokenizer, model)


@pytest.mark.slow  # the list of all tasks takes ten seconds
def test_unknown_task(folder: Path, tokenizer: Tokenizer, model: Decoder) -> None:
    message = refusal(folder, tokenizer, model, names=["choices", "hellaswg"])
    assert "there is no task hellaswg in lm-evaluation-harness nor in " in message
    assert "Did you mean hellaswag" in message
