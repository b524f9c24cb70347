"""`evaluate`: its numbers are those of transformers in float64, however rows are batched; and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdtune import checkpoint, data, tokenizers
from kdtune.cli.main import main
from kdtune.evaluation import results
from kdtune.evaluation.rouge import rouge_l
from kdtune.generation import generate

Evaluate = Callable[..., Path]
PADDED = 2100  # entries of a vocabulary that has more than the tokenizer


@pytest.fixture(scope="module")
def student(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that knows a part of the rows, so that it often agrees with `trained`."""
    run = tmp_path_factory.mktemp("student") / "run"
    return tiny_runs.finetune(tiny, run, "epochs=5", "optimizer.lr=0.02") / "model"


@pytest.fixture(scope="module")
def padded_teacher(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trained`, with entries in its vocabulary that mean nothing, and are not unlikely."""
    folder = tmp_path_factory.mktemp("padded") / "teacher"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": PADDED}))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(PADDED - len(embedding), embedding.shape[1], generator=generator) * embedding.std()
    weights["model.embed_tokens.weight"] = torch.cat([embedding, more])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def evaluate(tiny: Path, tmp_path: Path) -> Evaluate:
    """`evaluate("batch_size=2")`: the student of `tiny` on its rows; returns the folder of the results."""

    def run(*overrides: str) -> Path:
        settings = [
            f"checkpointer.checkpoint_dir={tiny / 'student'}",
            "tokenizer.max_seq_len=64",
            f"dataset.source={tiny / 'rows.jsonl'}",
            "dataset.format=completion",
            "num_token_examples=2",
            "device=cpu",
            "dtype=fp32",
            f"output_dir={tmp_path / 'evaluation'}",
            "overwrite_output_dir=true",
        ]
        main(["run", "evaluate", *settings, *overrides])
        return tmp_path / "evaluation"

    return run


def metrics(folder: Path, task: str = "text", subset: str | None = None) -> dict[str, float]:
    (found,) = [one for one in results.read(folder).results if (one.task, one.subset) == (task, subset)]
    return {name: metric.value for name, metric in found.metrics.items()}


def expected_tokens(folder: Path, tiny: Path) -> list[dict[str, np.ndarray]]:
    """Of each row by itself what transformers predicts in float64: log-probabilities of its labels' positions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    cfg = data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    examples = data.load(cfg, tokenizers.load(tiny / "student"), 64)
    found = []
    for tokens, labels in (examples[i] for i in range(len(examples))):
        scored = labels != data.IGNORE
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, scored]
        found.append({"logits": logits.numpy(), "labels": labels[scored].numpy()})
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def test_numbers_are_those_of_transformers(evaluate: Evaluate, tiny: Path, student: Path, padded_teacher: Path) -> None:
    models = [
        f"checkpointer.checkpoint_dir={student}",
        f"teacher_checkpointer.checkpoint_dir={padded_teacher}",
    ]
    folder = evaluate(*models, "batch_size=4", "loss_chunk_size=7")
    by_row, teachers = (expected_tokens(one, tiny) for one in (student, padded_teacher))
    logits, of_teacher = (np.concatenate([row["logits"] for row in rows]) for rows in (by_row, teachers))
    labels = np.concatenate([row["labels"] for row in by_row])
    t, n = np.arange(len(labels)), len(labels)
    log_q, log_p = log_softmax(logits), log_softmax(of_teacher[:, : logits.shape[1]])
    p, q = np.exp(log_p), np.exp(log_q)
    top, teacher_top, confidence = q.argmax(1), p.argmax(1), q.max(1)
    right = top == labels
    tokenizer = tokenizers.load(tiny / "student")
    text = "".join(tokenizer.decode(row["labels"]) for row in by_row)
    ce = -log_q[t, labels].mean()
    bins = np.digitize(confidence, np.arange(1, 15) / 15)
    gaps = [abs(confidence[bins == b].sum() - right[bins == b].sum()) for b in range(15)]
    expected = {
        "ce": ce,
        "perplexity": math.exp(ce),
        "bits_per_byte": ce * n / math.log(2) / len(text.encode()),
        "accuracy": right.mean(),
        "entropy": -(q * log_q).sum(1).mean(),
        "ece": sum(gaps) / n,
        "kl_from_teacher": (p * (log_p - log_q)).sum(1).mean(),
        "kl_to_teacher": (q * (log_q - log_p)).sum(1).mean(),
        "top1_agreement": (top == teacher_top).mean(),
        "top5_agreement": (np.argsort(-q, 1)[:, :5] == teacher_top[:, None]).any(1).mean(),
        "teacher_ce": -log_p[t, labels].mean(),
        "teacher_entropy": -(p * log_p).sum(1).mean(),
        "teacher_accuracy": (teacher_top == labels).mean(),
    }
    assert list(metrics(folder)) == list(expected)
    assert metrics(folder) == pytest.approx(expected, rel=2e-5)
    assert 0 < expected["top1_agreement"] < expected["top5_agreement"] < 1, "so that they can be wrong"

    found = results.read(folder)
    assert (found.results[0].num_examples, found.results[0].num_tokens) == (10, n)
    examples = results.read_examples(folder)
    sums = [-log_softmax(row["logits"])[np.arange(len(row["labels"])), row["labels"]].sum() for row in by_row]
    assert [one.sums["ce"] for one in examples] == pytest.approx(sums, rel=1e-5), "in the order of the rows"

    tokens = results.read_tokens(folder)
    assert [one.id for one in tokens] == [one.id for one in examples[:2]]
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    assert tokens[1].context == rows[1]["prompt"]
    assert "".join(tokens[1].tokens[:-1]) == rows[1]["completion"]
    first, stop = (sum(len(row["labels"]) for row in by_row[:i]) for i in (1, 2))
    assert tokens[1].ce == pytest.approx(-log_q[t, labels][first:stop], rel=1e-4)
    assert tokens[1].kl == pytest.approx((p * (log_p - log_q)).sum(1)[first:stop], rel=1e-3)
    assert tokens[1].student_top == [tokenizer.piece(id) for id in top[first:stop]]
    assert tokens[1].teacher_top == [tokenizer.piece(id) for id in teacher_top[first:stop]]


def test_batches_do_not_matter(evaluate: Evaluate, tiny: Path) -> None:
    teacher = f"teacher_checkpointer.checkpoint_dir={tiny / 'teacher'}"
    one_by_one = results.read_examples(evaluate(teacher, "batch_size=1"))
    for settings in (["batch_size=7"], ["dataset.packed=true"], ["dataset.group_by_length=false", "batch_size=3"]):
        found = results.read_examples(evaluate(teacher, *settings))
        assert [one.id for one in found] == [one.id for one in one_by_one]
        for one, expected in zip(found, one_by_one, strict=True):
            assert one.sums == pytest.approx(expected.sums, rel=1e-5)
            np.testing.assert_allclose(one.calibration, expected.calibration, atol=1e-4)


def test_what_is_written(evaluate: Evaluate, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluate(r'sample_prompts=["\eHow many apples"]', "sample_max_new_tokens=3")
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "recipe.py", "versions.json"),
        *("evaluation.json", "examples.jsonl", "tokens.json", "evaluation.md"),
    }
    printed = capsys.readouterr().out
    assert (folder / "evaluation.md").read_text() in printed
    assert "\n169 tokens, " in printed
    assert "\nprompt: \\x1bHow many apples\nmodel:  " in printed
    assert " tokens/s" in printed
    found = results.read(folder)
    assert (found.model.name, found.model.dtype, found.model.num_layers) == (str(tiny / "student"), "fp32", 1)
    assert found.teacher is None
    assert list(found.results[0].metrics) == ["ce", "perplexity", "bits_per_byte", "accuracy", "entropy", "ece"]
    (sample,) = found.samples
    assert sample.student
    assert sample.teacher is None
    (tokens, _) = results.read_tokens(folder)
    assert tokens.kl is None
    assert tokens.teacher_top is None


def test_samples_of_both(evaluate: Evaluate, tiny: Path) -> None:
    teacher = tiny / "teacher"
    settings = ["sample_prompts=[Tom has 10 apples,He]", "sample_max_new_tokens=5"]
    found = results.read(evaluate(f"teacher_checkpointer.checkpoint_dir={teacher}", *settings)).samples
    as_model = results.read(evaluate(f"checkpointer.checkpoint_dir={teacher}", *settings)).samples
    assert [sample.prompt for sample in found] == ["Tom has 10 apples", "He"]
    assert [sample.teacher for sample in found] == [sample.student for sample in as_model]
    assert [sample.teacher for sample in found] != [sample.student for sample in found]


def test_an_adapter_is_the_merged_model(evaluate: Evaluate, tiny: Path, tmp_path: Path) -> None:
    lora = ["lora.rank=4", "lora.save_merged=true", "max_steps=4", "optimizer.lr=0.05"]
    run = tiny_runs.finetune(tiny, tmp_path / "run", *lora)
    adapted = metrics(evaluate(f"checkpointer.adapter_dir={run / 'adapter'}"))
    assert results.read(tmp_path / "evaluation").model.name == f"{tiny / 'student'} + {run / 'adapter'}"
    assert adapted == pytest.approx(metrics(evaluate(f"checkpointer.checkpoint_dir={run / 'model'}")), rel=1e-4)
    assert adapted["ce"] < metrics(evaluate())["ce"] - 0.005


def test_two_models_are_compared(
    evaluate: Evaluate, tiny: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = f"teacher_checkpointer.checkpoint_dir={tiny / 'teacher'}"
    folders = [
        evaluate(teacher, f"checkpointer.checkpoint_dir={folder}", f"output_dir={tmp_path / name}", "batch_size=3")
        for name, folder in (("untrained", tiny / "student"), ("trained", student))
    ]
    assert folders
    capsys.readouterr()
    main(["compare", str(tmp_path / "untrained"), str(tmp_path / "trained")])
    lines = [line.split("|")[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("| text")]
    verdicts = {cells[0].strip(): cells[-2].strip() for cells in lines}
    assert verdicts["ce"] == verdicts["accuracy"] == verdicts["bits_per_byte"] == "better"
    assert verdicts["entropy"] == "lower"
    assert {"kl_from_teacher", "top5_agreement"} < verdicts.keys()
    assert "teacher_ce" not in verdicts, "it is the same for both"


def test_a_quantised_teacher(evaluate: Evaluate, tiny: Path) -> None:
    teacher = tiny / "teacher"
    models = [f"checkpointer.checkpoint_dir={teacher}", f"teacher_checkpointer.checkpoint_dir={teacher}"]
    folder = evaluate(*models, "teacher.quantization=int8")
    assert results.read(folder).teacher.quantization == "int8"
    found, same = metrics(folder), metrics(evaluate(*models))
    assert 1e-6 < found["kl_from_teacher"] < 1e-2
    assert abs(same["kl_from_teacher"]) < 1e-7
    assert same["teacher_ce"] == pytest.approx(same["ce"], rel=1e-6)
    assert same["top5_agreement"] == 1


def test_a_blend_has_rows_for_its_sources(evaluate: Evaluate, tiny: Path, tmp_path: Path) -> None:
    rows = (tiny / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join([*rows[:3], rows[0]]))  # one row twice, and three in both
    blend = []
    for name, source in (("a", tiny / "rows.jsonl"), ("b", tmp_path / "other.jsonl")):
        blend += [f"dataset.sources.{name}.source={source}", f"dataset.sources.{name}.format=completion"]
    folder = evaluate("dataset.source=null", "dataset.format=instruct", *blend)
    found = results.read(folder).results
    assert [(one.subset, one.num_examples) for one in found] == [(None, 14), ("a", 10), ("b", 4)]
    assert metrics(folder, subset="a") == pytest.approx(metrics(evaluate()), rel=1e-5)
    tokens = [one.num_tokens for one in found]
    ce = [one.metrics["ce"].value * one.num_tokens for one in found]
    assert tokens[0] == tokens[1] + tokens[2]
    assert ce[0] == pytest.approx(ce[1] + ce[2])


RESPONSES = ["responses.dataset.format=completion", "responses.max_new_tokens=6", "responses.seeds=[3,4]"]


@pytest.fixture
def answer(evaluate: Evaluate, tiny: Path, trained: Path) -> Evaluate:
    """`answer("batch_size=2")`: the model that knows the rows answers their prompts."""
    of_rows = f"responses.dataset.source={tiny / 'rows.jsonl'}"
    return lambda *overrides: evaluate(
        "dataset=null", f"checkpointer.checkpoint_dir={trained}", of_rows, *RESPONSES, *overrides
    )


def test_responses_are_those_of_generate(answer: Evaluate, tiny: Path, trained: Path) -> None:
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    found = results.read_responses(answer())
    assert [one.reference for one in found] == [row["completion"] for row in rows]
    assert [one.prompt for one in found] == ["<|begin_of_text|>" + row["prompt"] for row in rows]
    model = checkpoint.load_model(trained, dtype=torch.float32, device="cpu")
    tokenizer = tokenizers.load(trained)
    for row, one in zip(rows, found, strict=True):
        for seed, text, rouge in zip((3, 4), one.responses, one.rouge_l, strict=True):
            settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": seed, "rows": [int(one.id, 16)]}
            (tokens,) = generate(model, [tokenizer.encode(row["prompt"])], stop_ids=tokenizer.eos_ids, **settings)
            assert text == tokenizer.decode(tokens)
            assert rouge == rouge_l(text, row["completion"])
    assert len({text for one in found for text in one.responses}) > 3


def test_metrics_of_responses(answer: Evaluate) -> None:
    folder = answer()
    rouge = np.array([one.rouge_l for one in results.read_responses(folder)])  # [rows, seeds]
    assert rouge.max() > 0
    (whole, *of_seeds) = results.read(folder).results
    assert [one.subset for one in (whole, *of_seeds)] == [None, "seed 3", "seed 4"]
    metric = whole.metrics["rouge_l"]
    assert metric.value == pytest.approx(rouge.mean())
    assert metric.stderr == pytest.approx(rouge.mean(1).std(ddof=1) / math.sqrt(len(rouge)))
    assert [one.metrics["rouge_l"].value for one in of_seeds] == pytest.approx(rouge.mean(0))
    assert whole.num_tokens == pytest.approx(whole.metrics["response_tokens"].value * 2 * len(rouge))
    examples = results.read_examples(folder)
    assert [one.values["rouge_l"] for one in examples] == pytest.approx(rouge.mean(1))
    sampled = {"max_new_tokens": "6", "temperature": "1.0", "top_k": "null", "top_p": "null", "seeds": "[3, 4]"}
    assert results.read(folder).settings == {"responses": sampled}


def test_responses_do_not_depend_on_batches_and_other_rows(answer: Evaluate) -> None:
    found = results.read_responses(answer("batch_size=1"))
    assert results.read_responses(answer("batch_size=4")) == found
    assert results.read_responses(answer("responses.dataset.split=[3:7]", "batch_size=3")) == found[3:7]


def test_greedy_responses_end_by_themselves(answer: Evaluate) -> None:
    """The model was trained on these rows."""
    greedy = ["responses.temperature=0", "responses.seeds=[0]", "responses.max_new_tokens=40"]
    found = metrics(answer(*greedy), task="responses")
    assert found["ended"] > 0.5
    assert found["rouge_l"] > 0.5


def test_the_last_turn_of_a_chat_is_the_reference(answer: Evaluate, tmp_path: Path) -> None:
    turns = ["Tom has 3 apples", "He has 3.", "And one more?", "He has 4 apples."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    chat = [f"responses.dataset.source={tmp_path / 'chat.jsonl'}", "responses.dataset.format=chat"]
    (found,) = results.read_responses(answer(*chat))
    assert found.reference.strip() == turns[-1]
    assert turns[1] in found.prompt
    assert found.prompt.rstrip().endswith("Answer:")


def test_a_blend_of_prompts(answer: Evaluate, tiny: Path) -> None:
    blend = []
    for name, split in (("a", "[:4]"), ("b", "[2:5]")):  # two rows are in both
        section = f"responses.dataset.sources.{name}"
        blend += [f"{section}.source={tiny / 'rows.jsonl'}", f"{section}.format=completion", f"{section}.split={split}"]
    folder = answer("responses.dataset.source=null", "responses.dataset.format=instruct", *blend)
    found = [(one.subset, one.num_examples) for one in results.read(folder).results]
    assert found == [(None, 7), ("a", 4), ("b", 3), ("seed 3", 7), ("seed 4", 7)]


def test_the_tiny_config(tmp_path: Path) -> None:
    main(["run", "evaluate", "--config", "tiny", f"output_dir={tmp_path / 'run'}"])
    found = metrics(tmp_path / "run")
    assert 0 < found["kl_from_teacher"] < 0.01
    assert found["ce"] < 2


ASKED = ["responses.dataset.source={rows}", "responses.dataset.format=completion"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=null"], "Nothing is to be measured"),
        (["dataset.source=nowhere.jsonl"], "dataset.source=nowhere.jsonl: no file or folder"),
        (["dataset.source=empty.jsonl"], "empty.jsonl has no rows"),
        (["dataset.format=instruct"], "no column 'instruction'; there are: prompt, completion"),
        (["dataset.streaming=true"], "dataset.streaming=true"),
        (["checkpointer.checkpoint_dir=nowhere"], "nowhere is not a folder"),
        (["teacher_checkpointer.checkpoint_dir=nowhere"], "nowhere is not a folder"),
        (["teacher_checkpointer.checkpoint_dir=other"], "do not share a tokenizer"),
        (["teacher.quantization=int8"], "teacher says how a teacher is held, and there is none"),
        (["teacher_parallel.tensor=1"], "teacher_parallel says how a teacher is held"),
        (["teacher_checkpointer.checkpoint_dir=t", "teacher.cache_dir=c"], "teacher.cache_dir=c is for training"),
        (["tokenizer.max_seq_len=512"], "the model was built for 128 positions"),
        (["sample_prompts=[a]", "sample_max_new_tokens=128"], "sample_prompts: prompt 1 with 128 new tokens"),
        (["dataset=null", "responses.dataset.split=[:3]"], "responses.dataset has no rows: give"),
        ([*ASKED, "responses.seeds=[]"], "responses.seeds=[]: give at least one"),
        ([*ASKED, "responses.seeds=[1,1]"], "and each once"),
        ([*ASKED, "responses.temperature=0"], "more than one of seeds change nothing"),
        ([*ASKED, "responses.dataset.train_on_input=true"], "makes a reference of the prompt"),
        ([*ASKED, "responses.dataset.format=text"], "responses.dataset.format=text has no prompts"),
        ([*ASKED, "responses.dataset.too_long=truncate"], "cuts references"),
        ([*ASKED, "responses.dataset.packed=true"], "prompts are answered in batches of their length"),
        ([*ASKED, "responses.dataset.format=instruct"], "no column 'instruction'; there are: prompt, completion"),
        (ASKED, "responses.dataset: prompt 1 with 256 new tokens"),
        (
            [*ASKED, "dataset=null", "responses.max_new_tokens=5", "teacher_checkpointer.checkpoint_dir=t"],
            "continues sample_prompts, and there is neither",
        ),
        (["parallel.context=2"], "there is 1 process"),
        (["parallel.reshard_after_forward=false"], "for its backward, and this model has none"),
        (["output_dir={tiny}", "checkpointer.checkpoint_dir={tiny}/model"], "is part of the run in output_dir"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_refusals(
    overrides: list[str],
    message: str,
    evaluate: Evaluate,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdtune.checkpoint.source.read_into", None)
    Path("empty.jsonl").touch()
    other = tiny_runs.write_model(tmp_path / "other", seed=0)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    pieces = vocabulary["model"]["vocab"]
    (a, i), (b, j) = sorted(pieces.items(), key=lambda item: item[1])[-2:]
    vocabulary["model"]["vocab"] |= {a: j, b: i}
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    run = tmp_path / "run"
    tiny_runs.write_model(run / "model", seed=0)
    (run / "versions.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        evaluate(*(one.format(tiny=run, rows=tiny / "rows.jsonl") for one in overrides))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_results_are_not_overwritten_unasked(evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate()
    with pytest.raises(SystemExit):
        evaluate("overwrite_output_dir=false")
    assert "already holds a run (examples.jsonl" in capsys.readouterr().err.replace("evaluation.json, ", "")


def test_tasks_beside_text(evaluate: Evaluate, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are written into one folder, and what was asked and answered if that is wanted."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kdtune[eval]'")
    docs = Path(__file__).resolve().parents[2] / "docs" / "tasks"
    settings = ["tasks.names=[capitals]", f"tasks.include_path={docs}"]
    folder = evaluate(*settings, "tasks.log_samples=true")
    assert "tasks     capitals (6)" in capsys.readouterr().out
    assert [one.task for one in results.read(folder).results] == ["text", "capitals"]
    assert set(metrics(folder, "capitals")) == {"acc", "acc_norm"}
    assert results.read(folder).settings == {"capitals": {"requests cut": "none"}}
    examples = [one for one in results.read_examples(folder) if one.task == "capitals"]
    assert np.mean([one.values["acc"] for one in examples]) == metrics(folder, "capitals")["acc"]
    questions = [json.loads(line) for line in (docs / "capitals.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (folder / "tasks" / "capitals.jsonl").read_text().splitlines()]
    assert [one["doc"] for one in samples] == questions
    evaluate("dataset=null", *settings)
    assert [one.task for one in results.read(folder).results] == ["capitals"]
    assert not (folder / "tasks").exists(), "of the run before"
