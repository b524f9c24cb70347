"""What is written of an evaluation comes back, and the numbers of a set are those of its examples."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdtune.evaluation import estimates, results
from kdtune.evaluation.results import Evaluation, Example, Metric, Model, Response, Result, Sample, TokenExample

MODEL = Model("runs/a/model", 1000, 97, 2, 64, "fp32", None, "f0")


def text_examples(count: int = 60, seed: int = 0) -> list[Example]:
    """Of two sources, with sums that depend on their length."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        n = int(rng.integers(3, 40))
        right = rng.integers(0, 2, (2, n)).sum(-1).tolist()
        bins = [[float(n), 0.4 * n, right[0]], [float(n), 0.8 * n, right[1]]]
        sums = {"ce": float(rng.gamma(2, n)), "accuracy": float(rng.binomial(n, 0.4))}
        source = "ab"[i * 2 // count]
        found.append(Example("text", f"{i:016x}", source, 2 * n, 9 * n, sums, {}, bins))
    return found


def evaluation(examples: list[Example]) -> Evaluation:
    return Evaluation(MODEL, None, "tok", estimates.results("text", examples), [Sample("a", "b")], 1.5, 200.0)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    examples = text_examples()
    examples[3].sums["ce"] = math.inf
    strange = "a line\u2028break, a \\ and |"
    tokens = [TokenExample("1", strange, [strange, "b"], [None, 0.5], [None, 0.1], [None, "x"], [None, "y"])]
    responses = [Response("1", strange, "c", ["d", strange], [0.5, 1.0])]
    written = evaluation(examples)
    results.write(tmp_path, written, examples, tokens, responses)
    found = results.read(tmp_path)
    assert found.results[0].metrics["accuracy"] == written.results[0].metrics["accuracy"]
    assert math.isnan(found.results[0].metrics["ce"].value), "null stands for what is not finite"
    assert found.model == MODEL
    assert found.samples == written.samples
    assert results.read_tokens(tmp_path) == tokens
    assert results.read_responses(tmp_path) == responses
    again = results.read_examples(tmp_path)
    assert math.isnan(again[3].sums["ce"])
    assert [one for one in again if one.id != examples[3].id] == [one for one in examples if one is not examples[3]]
    assert (tmp_path / "evaluation.md").read_text() == results.table(written) + "\n"
    assert not [path for path in tmp_path.iterdir() if path.name not in results.FILES]
    json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)


def test_table() -> None:
    metrics = {
        "ce": Metric(2.14159, 0.0123, "nats/token", "lower"),
        "acc": Metric(0.25, None, "share", "higher"),
        "tokens": Metric(1234.5, 210.0, "tokens", None),
    }
    found = Evaluation(MODEL, None, "t", [Result("a|b", "s", 1200, 5, metrics)], [], 1.0, 1.0)
    assert results.table(found).splitlines() == [
        "| task    | metric | value | standard error | unit       | examples |",
        "|---------|--------|------:|---------------:|------------|---------:|",
        "| a\\|b: s | ce     | 2.142 |          0.012 | nats/token |    1,200 |",
        "| a\\|b: s | acc    |  0.25 |                | share      |    1,200 |",
        "| a\\|b: s | tokens |  1234 |            210 | tokens     |    1,200 |",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no evaluation"),
        ("{", "evaluation.json is broken"),
        ("\xff", "evaluation.json is broken"),
        ("[]", "it holds a list"),
        ('{"kdtune_evaluation": 99}', "of another version"),
        ('{"kdtune_evaluation": 1}', "is not what kdtune writes: model is missing"),
    ],
)
def test_a_folder_without_an_evaluation(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "evaluation.json").write_text(text, encoding="latin-1")
    with pytest.raises((ValueError, OSError), match=message):
        results.read(tmp_path)


def test_examples_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").write_bytes(b'{"task": "t", "id": "0"}\n\xff\n')
    with pytest.raises(ValueError, match=r"examples\.jsonl is broken"):
        results.read_examples(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("evaluation.json", {"results": 3}, "results is 3"),
        ("evaluation.json", {"results": [{"task": "t"}]}, r"results\.0\.metrics is missing"),
        ("evaluation.json", {"samples": [{"prompt": 1, "student": "s"}]}, r"samples\.0\.prompt is 1"),
        ("evaluation.json", {"seconds": True}, "seconds is true"),
        ("evaluation.json", {"of_another": 1}, "of_another is unknown"),
        ("evaluation.json", {"teacher": ["x" * 100]}, "teacher is .{1,50}"),
        ("examples.jsonl", {"sums": [1]}, r"sums is \[1\]"),
        ("examples.jsonl", {"sums": {"ce": "1"}}, 'sums.ce is "1"'),
        ("examples.jsonl", {"id": None}, "id is null"),
        ("examples.jsonl", {"num_tokens": 1.5}, r"num_tokens is 1\.5"),
        ("tokens.json", {"tokens": "abc"}, 'tokens is "abc"'),
        ("tokens.json", {"ce": [1.0, {}]}, r"ce\.1 is \{\}"),
        ("tokens.json", {"ce": [1.0]}, "has 1 values for 2 tokens"),
        ("responses.jsonl", {"rouge_l": "0.5"}, 'rouge_l is "0.5"'),
    ],
)
def test_json_of_other_types(name: str, change: dict[str, object], message: str, tmp_path: Path) -> None:
    examples, tokens = text_examples(3), [TokenExample("1", "c", ["a", "b"], [None, 0.5], None, [None, "x"], None)]
    results.write(tmp_path, evaluation(examples), examples, tokens, [Response("1", "a", "b", ["c"], [0.5])])
    read = {
        "evaluation.json": results.read,
        "examples.jsonl": results.read_examples,
        "tokens.json": results.read_tokens,
        "responses.jsonl": results.read_responses,
    }[name]
    assert read(tmp_path)
    path = tmp_path / name
    whole = json.loads(path.read_text() if name.endswith(".json") else path.read_text().splitlines()[0])
    changed = [{**whole[0], **change}] if isinstance(whole, list) else {**whole, **change}
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=rf"{name} is not what kdtune writes: .*{message}"):
        read(tmp_path)


def test_responses_without_scores(tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text(
        '{"id": "1", "prompt": "", "reference": "", "responses": ["a"], "rouge_l": []}'
    )
    with pytest.raises(ValueError, match="1 has 0 scores for 1 responses"):
        results.read_responses(tmp_path)


def test_metrics_of_a_set_and_of_its_subsets() -> None:
    examples = text_examples()
    whole, first, second = estimates.results("text", examples)
    assert [one.subset for one in (whole, first, second)] == [None, "a", "b"]
    assert first.metrics == estimates.result("text", examples[:30]).metrics
    assert second.metrics == estimates.result("text", examples[30:]).metrics
    n, num_bytes = (sum(getattr(one, name) for one in examples) for name in ("num_tokens", "num_bytes"))
    ce = sum(one.sums["ce"] for one in examples)
    bins = np.sum([one.calibration for one in examples], 0)
    share, confidence, accuracy = bins[:, 0] / n, bins[:, 1] / bins[:, 0], bins[:, 2] / bins[:, 0]
    expected = {
        "ce": ce / n,
        "perplexity": math.exp(ce / n),
        "bits_per_byte": ce / math.log(2) / num_bytes,
        "accuracy": sum(one.sums["accuracy"] for one in examples) / n,
        "ece": (share * np.abs(confidence - accuracy)).sum(),
    }
    assert list(whole.metrics) == list(expected)
    assert {name: metric.value for name, metric in whole.metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert (whole.num_examples, whole.num_tokens) == (60, n)


def test_errors_of_a_ratio_are_those_of_the_delta_method() -> None:
    metrics = estimates.result("text", text_examples(400)).metrics
    examples = text_examples(400)
    x, n = (np.array([value(one) for one in examples]) for value in (lambda e: e.sums["ce"], lambda e: e.num_tokens))
    residuals = x - x.sum() / n.sum() * n
    expected = math.sqrt(400 / 399 * (residuals**2).sum()) / n.sum()
    assert metrics["ce"].stderr == pytest.approx(expected, rel=0.01)
    assert metrics["perplexity"].stderr == pytest.approx(expected * metrics["perplexity"].value, rel=0.02)


def test_errors_of_a_mean_are_its_own() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    examples = [Example("arc", str(i), values={"rouge_l": value}) for i, value in enumerate(values)]
    metric = estimates.result("arc", examples).metrics["rouge_l"]
    assert metric.value == pytest.approx(np.mean(values))
    assert metric.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert estimates.result("arc", examples[:1]).metrics["rouge_l"].stderr is None


def test_errors_cover_what_other_examples_give() -> None:
    """Of many sets of examples, the standard deviation of each metric is the mean of its standard errors."""
    found = [estimates.result("text", text_examples(60, seed)).metrics for seed in range(300)]
    for name in ("ce", "perplexity", "accuracy"):
        spread = np.std([metrics[name].value for metrics in found])
        assert np.mean([metrics[name].stderr for metrics in found]) == pytest.approx(spread, rel=0.15), name


@pytest.mark.parametrize("module", ["results", "estimates", "comparing"])
def test_no_torch_is_needed(module: str) -> None:
    code = f"import sys, kdtune.evaluation.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
