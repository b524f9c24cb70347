"""Better, worse, or not shown: what a paired bootstrap says of two evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdtune.cli.main import main
from kdtune.evaluation import comparing, estimates, results
from kdtune.evaluation.comparing import Difference
from kdtune.evaluation.results import Evaluation, Example, Model

MODEL = Model("runs/a/model", 1000, 97, 2, 64, "fp32", None, "f0")
Write = Callable[..., Path]


def text(shift: float = 0.0, noise: float = 0.02, count: int = 100, seed: int = 0) -> list[Example]:
    """Examples that are hard for every model alike; `shift` of the cross-entropy is the model's, and a little noise."""
    hard, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    found = []
    for i in range(count):
        n = int(hard.integers(5, 50))
        ce = hard.normal(2.0, 0.6) + shift + own.normal(0, noise)
        sums = {"ce": ce * n, "entropy": 2.0 * n, "kl_from_teacher": (0.3 + shift) * n}
        bins = [[n, 0.5 * n, float(hard.binomial(n, 0.4))]]
        found.append(Example("text", f"{i:016x}", None, n, 4 * n, sums, {}, bins))
    return found


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("a", examples)`: a folder with their evaluation."""

    def make(name: str, examples: Sequence[Example], **fields: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tasks = dict.fromkeys(one.task for one in examples)
        found = [
            result
            for task in tasks
            for result in estimates.results(task, [one for one in examples if one.task == task])
        ]
        evaluation = Evaluation(MODEL, replace(MODEL, name="teacher"), "tok", found, [], 1.0, 1.0)
        results.write(folder, replace(evaluation, **fields), examples)
        return folder

    return make


def by_metric(differences: Sequence[Difference]) -> dict[str, Difference]:
    return {one.metric: one for one in differences}


def test_a_small_difference_on_the_same_examples_is_shown(write: Write) -> None:
    """Of 0.02 nats, where the standard error of each model's own number is three times that."""
    first, second = write("a", text()), write("b", text(-0.02, seed=5)[::-1])
    assert results.read(first).results[0].metrics["ce"].stderr > 0.05
    found = by_metric(comparing.compare(first, second).differences)
    ce = found["ce"]
    assert ce.verdict == "better"
    assert ce.difference == pytest.approx(-0.02, abs=0.01)
    assert ce.low < ce.difference < ce.high < 0
    assert ce.high - ce.low < 0.02
    assert found["perplexity"].verdict == found["bits_per_byte"].verdict == found["kl_from_teacher"].verdict == "better"
    assert found["entropy"].verdict == found["ece"].verdict == "no difference shown"
    assert (found["ece"].low, found["ece"].high) == (0, 0)
    back = by_metric(comparing.compare(second, first).differences)["ce"]
    assert back.verdict == "worse"
    assert (back.low, back.high) == pytest.approx((-ce.high, -ce.low), abs=1e-12)


def test_noise_is_no_difference(write: Write) -> None:
    found = comparing.compare(write("a", text()), write("b", text(seed=3)))
    assert by_metric(found.differences)["ce"].verdict == "no difference shown"


def test_a_metric_of_which_neither_is_better(write: Write) -> None:
    more = [replace(one, sums={**one.sums, "entropy": 2.1 * one.num_tokens}) for one in text()]
    found = comparing.compare(write("a", text()), write("b", more))
    assert by_metric(found.differences)["entropy"].verdict == "higher"


def test_the_interval_is_that_of_the_mean(write: Write) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.2, (2, 400))
    pair = [
        write(name, [Example("arc", str(i), values={"rouge_l": value}) for i, value in enumerate(row)])
        for name, row in zip("ab", values.tolist(), strict=True)
    ]
    (found,) = comparing.compare(*pair).differences
    gaps = values[1] - values[0]
    half = 1.96 * gaps.std(ddof=1) / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half), abs=0.1 * half)
    again = comparing.compare(*pair).differences
    assert again == [found], "the draws are those of a seed"


def test_intervals_cover_the_true_difference() -> None:
    """In about 95 of 100 sets of 60 examples of different lengths."""
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n = rng.integers(5, 50, 60)
        hard = rng.gamma(2, 1, 60)
        sets = [
            [
                Example("text", str(i), None, int(n[i]), 0, {"ce": float((hard[i] + rng.normal(shift, 0.3)) * n[i])})
                for i in range(60)
            ]
            for shift in (0.0, 0.1)
        ]
        differences = comparing._differences("text", None, sets, {}, 500, seed)
        ce = by_metric(list(differences))["ce"]
        hits += ce.low <= 0.1 <= ce.high
    assert 0.90 <= hits / 200 <= 0.985


def test_subsets_and_rows_that_are_alike(write: Write) -> None:
    """Two rows that are the same are paired once each, and a source that got worse shows in its own row."""

    def of_sources(shifts: tuple[float, float]) -> list[Example]:
        halves = [
            [replace(one, subset=name) for one in text(shift, seed=7)] for name, shift in zip("ab", shifts, strict=True)
        ]
        return [*halves[0], halves[0][0], *halves[1]]

    found = comparing.compare(write("a", of_sources((0, 0))), write("b", of_sources((-0.2, 0.1))))
    verdicts = {one.subset: (one.num_examples, one.verdict) for one in found.differences if one.metric == "ce"}
    assert verdicts == {None: (201, "better"), "a": (101, "better"), "b": (100, "worse")}


def test_one_example_shows_nothing(write: Write) -> None:
    found = comparing.compare(write("a", text(count=1)), write("b", text(-1.0, count=1)))
    assert {one.verdict for one in found.differences} == {"no difference shown"}
    assert "nan" in comparing.table(found)


def test_what_only_one_has_is_left_out_and_told(write: Write) -> None:
    without = [replace(one, sums={"ce": one.sums["ce"]}) for one in text()]
    arc = [Example("arc", "1", values={"acc": 1.0})]
    examples = [*text(), *arc]
    first = write("a", text(), teacher=None)
    folder = first.with_name("b")
    folder.mkdir()
    found = estimates.results("text", without)
    results.write(folder, Evaluation(MODEL, None, "tok", found, [], 1.0, 1.0), [*without, *arc])
    compared = comparing.compare(first, folder)
    assert compared.left_out == [f"arc: not in {first}", f"entropy, kl_from_teacher of text: not in {folder}"]
    assert [one.metric for one in compared.differences] == ["ce", "perplexity", "bits_per_byte", "ece"]
    assert len(examples) == 101


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": text(count=99)}, r"100 examples, .*b 99, and 99 of them are the same \(by their tokens"),
        ({"examples": text(count=99), "tokenizer": "other"}, r"the same \(their tokenizers differ, too\)"),
        ({"teacher": replace(MODEL, fingerprint="f1")}, "were evaluated beside different teachers"),
        ({"teacher": replace(MODEL, quantization="int8")}, r"beside runs/a/model \(fp32, int8\)"),
        ({"examples": [Example("arc", "1", values={"rouge_l": 1.0})]}, "have no task in common"),
    ],
)
def test_refusals(change: dict[str, object], message: str, write: Write) -> None:
    first = write("a", text())
    second = write("b", change.pop("examples", text()), **change)
    with pytest.raises(ValueError, match=message):
        comparing.compare(first, second)


def test_few_examples_are_told(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    few = [Example("said", str(i), "ab"[i > 0], values={"rouge_l": 0.5}) for i in range(49)]
    folders = [str(write(name, [*text(), *few])) for name in "ab"]
    main(["compare", *folders])
    expected = "intervals of fewer than 50 examples are too narrow (said: 49, said: a: 1, said: b: 48)"
    assert expected in capsys.readouterr().out
    main(["compare", *folders, "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["caveats"] == [f"{expected}: do not rely on such a verdict"]


def test_other_settings_are_told(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    said = [Example("responses", str(i), values={"rouge_l": 0.5}) for i in range(50)]
    settings = {"responses": {"temperature": "1.0", "seeds": "[10, 20]"}}
    first, same = (write(name, [*text(), *said], settings=settings) for name in "ab")
    assert comparing.compare(first, same).caveats == []
    other = write("c", [*text(), *said], settings={"responses": {"temperature": "0.7", "seeds": "[10, 20]"}})
    line = "responses with other settings (temperature 1.0, here 0.7): a difference may come from these"
    main(["compare", str(first), str(other)])
    assert line in capsys.readouterr().out
    (caveat,) = comparing.compare(first, write("d", said)).caveats
    assert "(temperature 1.0, here unknown; seeds [10, 20], here unknown)" in caveat
    assert not comparing.compare(first, write("e", text())).caveats, "of a task that only one has"


def test_the_command(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = write("a", text()), write("b", text(-0.02, seed=5)), write("c", text(0.3))
    main(["compare", str(first), str(second), str(third)])
    printed = capsys.readouterr().out
    assert f"{second}, with {first} as the baseline:" in printed
    verdicts = [line.strip("| ").rpartition("| ")[2] for line in printed.splitlines() if line.startswith("| text ")]
    assert verdicts[:4] == ["better"] * 3 + ["no difference shown"]
    assert verdicts[6:9] == ["worse"] * 3
    assert "too narrow" not in printed
    main(["compare", str(first), str(third), "--json", "--resamples", "200"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["baseline"] == str(first)
    assert found["differences"][0]["verdict"] == "worse"
    for arguments, message in (
        ([str(first)], "required: other"),
        ([str(first), str(tmp_path)], "holds no evaluation"),
        ([str(first), str(second), "--resamples", "5"], "need at least 100"),
    ):
        with pytest.raises(SystemExit):
            main(["compare", *arguments])
        assert message in capsys.readouterr().err
