"""`kdtune data`: what it shows is what a run trains on, and nothing in the rows gets at the terminal or the page."""

import io
import itertools
import json
import re
import sys
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch

from kdtune import data, tokenizers
from kdtune.cli import data as command
from kdtune.cli import data_page, data_text, terminal
from kdtune.data import view

from .conftest import Run

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \u202eback \r<script>alert(1)</script> & \"quoted\" 'single' \u27e6mark\u27e7"


def argv(tiny: Path, *more: str, recipe: str = "finetune") -> list[str]:
    """`kdtune data` with the settings of a tiny run: ten rows, in steps of 4, 4 and 2."""
    arguments = tiny_runs.arguments(tiny, tiny / "never", recipe=recipe)
    return ["data", *arguments[1:], *more]


def rows_file(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bodies(out: str) -> list[str]:
    """The text of each document, as it is shown without colour."""
    found = re.findall(r"^(?:row|-- document) .*\n((?:  .*\n|  \n)+)", out, re.MULTILINE)
    return ["\n".join(line[2:] for line in body.splitlines()) for body in found]


def read(body: str) -> tuple[str, str]:
    """What is shown without and with a label, as text again."""
    text = body.replace("↵\n", "\n").replace("⟪", "").replace("⟫", "")
    return "".join(re.split(r"⟦.*?⟧", text, flags=re.DOTALL)), "".join(re.findall(r"⟦(.*?)⟧", text, re.DOTALL))


def fact(out: str, name: str) -> str:
    (value,) = re.findall(rf"^{name}  +(.*)", out, re.MULTILINE)
    return str(value)


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\b[\d,]+\b(?![.%])", text)]


@pytest.mark.parametrize("recipe", ["finetune", "knowledge_distillation"])
def test_every_row_is_shown_with_its_labels(recipe: str, tiny: Path, kdtune: Run) -> None:
    status, out, err = kdtune(*argv(tiny, "--rows", "99", recipe=recipe))
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    expected = {("<|begin_of_text|>" + row["prompt"], row["completion"] + "<|end_of_text|>") for row in rows}
    assert {read(body) for body in bodies(out)} == expected
    assert len(bodies(out)) == len(rows)
    assert "⟪<|begin_of_text|>⟫" in out
    origins = [int(number) for number in re.findall(r"from line (\d+) of rows.jsonl$", out, re.MULTILINE)]
    assert [read(body)[1] for body in bodies(out)] == [
        rows[number - 1]["completion"] + "<|end_of_text|>" for number in origins
    ]


def test_length_and_labels_of_a_row(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(tiny / "student")
    source = rows_file(tmp_path / "one.jsonl", ("What is 2+2? ", "4"))
    num_prompt, num_answer = len(tokenizer.encode("What is 2+2? ")), len(tokenizer.encode("4", continues=True)) + 1
    _, out, _ = kdtune(*argv(tiny, f"dataset.source={source}"))
    counts = f"{num_prompt + num_answer - 1} tokens, {num_answer} with a label"
    assert f"row 1 (step 1, micro-batch 1): {counts}, from line 1 of one.jsonl\n" in out


def test_numbers_are_those_of_the_run(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    tiny_runs.finetune(tiny, tmp_path / "run")
    per_step = [step["num_tokens"] for step in tiny_runs.steps(tmp_path / "run")][:3]
    _, out, _ = kdtune(*argv(tiny))
    assert numbers(fact(out, "labels per step")) == sorted(per_step)
    assert fact(out, "rows") == "10 read, 0 lost, 0 truncated; 10 examples"
    assert fact(out, "steps") == "3 per epoch, 9 in the run (3 epochs)"
    assert fact(out, "batches").startswith("10 rows in 3 steps of an epoch; ")
    num_tokens = int(fact(out, "tokens").partition(";")[0].replace(",", ""))
    assert f"; {sum(per_step) / num_tokens:.1%} with a label, " in fact(out, "tokens")


def test_a_run_that_ends_in_its_first_epoch(tiny: Path, kdtune: Run) -> None:
    _, out, _ = kdtune(*argv(tiny, "max_steps=2"))
    assert fact(out, "batches").startswith("8 rows in 2 steps of the run; ")
    assert fact(out, "steps") == "3 per epoch, 2 in the run (0.67 epochs)"


def test_a_stream_is_looked_at_as_far_as_it_is_read(tiny: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_STREAM_STEPS", 2)
    tokenizer = tokenizers.load(tiny / "student")
    cfg = data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    loader = data.Loader(data.load(cfg, tokenizer, 64), batch_size=2)
    stream = SimpleNamespace(examples=loader.examples, steps_per_epoch=None, next_step=loader.next_step)
    loaded = SimpleNamespace(loader=stream, num_steps=1000, examples_val=None, val_batches={})
    facts = dict(command.look(loaded, tokenizer, 1, 3, is_val=False).facts)
    assert facts["batches"].startswith("4 rows in 2 steps of the stream; ")
    assert facts["steps"] == "1,000 in the run; how many an epoch would have is not known"
    assert facts["first rows"].startswith("10 read")


def test_a_stream_of_a_real_loader(kdtune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = ["dataset.streaming=true", "dataset.split=null", "dataset.shuffle_buffer=5"]
    status, out, err = kdtune("data", "finetune", "--config", "tiny", *stream, "--rows", "2")
    assert (status, len(err.splitlines())) == (0, 2)
    assert err.startswith("warning: dataset (first rows): of its rows 100.0% are truncated to 64 tokens.")
    assert fact(out, "first rows").startswith("256 read, ")
    assert fact(out, "batches").startswith("16 rows in 4 steps of the run; ")
    assert fact(out, "steps") == "4 in the run; how many an epoch would have is not known"
    assert "length of the first 256 examples: " in out
    assert len(bodies(out)) == 2


def test_padding(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    # The prompts have no label and two lengths, so that one row of each two is padded by their difference.
    source = rows_file(tmp_path / "two.jsonl", ("a", "b"), ("a a a a a", "b"))
    tokenizer = tokenizers.load(tiny / "student")
    short, long = (
        len(tokenizer.encode(text)) + len(tokenizer.encode("b", continues=True)) for text in ("a", "a a a a a")
    )
    _, out, _ = kdtune(*argv(tiny, f"dataset.source={source}"))
    fill = (short + long) / (2 * long)
    assert fact(out, "batches") == f"2 rows in 1 step of an epoch; {fill:.1%} filled, {1 - fill:.1%} padding"


def test_padding_says_of_which_steps_it_is(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    told = kdtune("run", *argv(tiny)[1:], f"output_dir={tmp_path}", "--dry-run")[1]
    (padding,) = re.findall(r"(\S+% padding) in an epoch", told)
    of_epoch = fact(kdtune(*argv(tiny))[1], "batches")
    assert re.search(rf"in 3 steps of an epoch; .*% filled, {padding}$", of_epoch)
    ended = fact(kdtune(*argv(tiny, "max_steps=2"))[1], "batches")
    assert re.search(r"in 2 steps of the run; .* padding \(kdtune run tells that of a whole epoch\)$", ended)


def test_packed_rows_show_their_documents(tiny: Path, kdtune: Run) -> None:
    _, out, _ = kdtune(*argv(tiny, "dataset.packed=true", "tokenizer.max_seq_len=128", "--rows", "99"))
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    shown = {read(body)[1] for body in bodies(out)}
    assert shown == {row["completion"] + "<|end_of_text|>" for row in rows}
    assert re.search(
        r"^row 1 \(step 1, micro-batch 1\): [2-9] documents, \d+ tokens\n-- document 1: ", out, re.MULTILINE
    )
    assert "-- document 2: " in out
    batches = fact(out, "batches")
    assert re.match(r"\d rows of 10 documents in 1 step of an epoch; .*% of max_seq_len filled, .*% padding$", batches)


def test_packed_rows_are_as_full_as_the_run_says(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    packed = argv(tiny, "dataset.packed=true", "tokenizer.max_seq_len=128")
    told = kdtune("run", *packed[1:], f"output_dir={tmp_path}", "--dry-run")[1]
    ((num_rows, fill),) = re.findall(r"packed into 128 x (\d+) rows an epoch, (\S+%) filled", told)
    batches = fact(kdtune(*packed)[1], "batches")
    assert batches.startswith(f"{num_rows} rows of 10 documents in ")
    assert f"; {fill} of max_seq_len filled, " in batches


def table(out: str) -> list[dict[str, str]]:
    """The sources of a blend."""
    header, *lines = re.findall(r"^source  .*\n(?:.+\n)*", out, re.MULTILINE)[0].splitlines()
    return [dict(zip(header.split(), line.split(), strict=True)) for line in lines]


@pytest.mark.parametrize("steps", [["epochs=2"], ["max_steps=1"], ["dataset.packed=true"]])
def test_sources_of_a_blend(steps: list[str], tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    """Shares and epochs are those that the run logs."""
    short = rows_file(tmp_path / "short.jsonl", *[("a b", "c")] * 4, ("none", ""))
    blend = ["dataset.source=null", "dataset.format=instruct"]
    for name, source, weight in (("long", tiny / "rows.jsonl", 1), ("short", short, 3)):
        section = f"dataset.sources.{name}"
        blend += [f"{section}.source={source}", f"{section}.format=completion", f"{section}.weight={weight}"]
    blend += ["dataset.sources.short.on_error=skip", *steps]
    _, out, _ = kdtune(*argv(tiny, *blend))
    rows = table(out)
    assert [(row["source"], row["draws"]) for row in rows] == [("long", "25.0%"), ("short", "75.0%")]
    counts = [[row[key] for key in ("rows", "lost", "cut", "examples")] for row in rows]
    assert counts == [["10", "0", "0", "10"], ["5", "1", "0", "4"]]
    tokenizer = tokenizers.load(tiny / "student")
    num_answer = len(tokenizer.encode("c", continues=True)) + 1
    num_tokens = len(tokenizer.encode("a b")) + num_answer - 1
    assert re.search(
        r"^(row|-- document) 1.*, from (long, line \d+ of rows|short, line [1-4] of short)\.jsonl$", out, re.MULTILINE
    )
    assert (rows[1]["tokens"], rows[1]["labelled"]) == (str(4 * num_tokens), str(4 * num_answer))

    tiny_runs.finetune(tiny, tmp_path / "run", *blend)
    last = tiny_runs.steps(tmp_path / "run")[-1]
    epochs = [last["epochs/long"], last["epochs/short"]]
    assert [float(row["epochs"]) for row in rows] == pytest.approx(epochs, abs=0.006)
    labels = [number * int(row["labelled"]) for number, row in zip(epochs, rows, strict=True)]
    shares = [float(row["labels"].rstrip("%")) / 100 for row in rows]
    assert shares == pytest.approx([number / sum(labels) for number in labels], abs=0.001)


def test_sources_to_validate_on(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    blend = []
    for name in "ab":
        blend += [f"dataset_val.sources.{name}.{key}" for key in (f"source={tiny / 'rows.jsonl'}", "format=completion")]
    arguments = argv(tiny, *blend, "dataset_val.sources.a.split=[:3]", "--val")
    rows = table(kdtune(*arguments)[1])
    assert [(row["source"], row["rows"], "epochs" in row) for row in rows] == [("a", "3", False), ("b", "10", False)]
    path = tmp_path / "look.html"
    kdtune(*arguments, "--html", str(path))
    text = path.read_text(encoding="utf-8")
    assert '<tr><th scope="row">b</th><td>10</td><td>0</td><td>0</td><td>10</td>' in text
    Page(text)


def test_warnings_come_once_and_last(tiny: Path, kdtune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = tokenizers.load

    def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
        for _ in range(2):
            warnings.warn("odd \x1b[2J rows", stacklevel=1)
        return load(folder)

    monkeypatch.setattr(tokenizers, "load", load_tokenizer)
    status, _, err = kdtune(*argv(tiny))
    assert (status, err) == (0, "warning: odd \\x1b[2J rows\n")
    path = tmp_path / "look.html"
    assert kdtune(*argv(tiny, "--html", str(path)))[2] == err
    assert '<p class="warning">odd \\x1b[2J rows</p>' in path.read_text(encoding="utf-8")
    assert kdtune(*argv(tiny, "dataset.source=nowhere.jsonl"))[2].startswith(err + "kdtune: error: ")


def test_validation_rows(tiny: Path, kdtune: Run) -> None:
    status, out, _ = kdtune(*argv(tiny, *tiny_runs.validated_on(tiny), "--val", "--rows", "99"))
    assert status == 0
    assert out.startswith("finetune: dataset_val, ")
    assert fact(out, "rows") == "3 read, 0 lost, 0 truncated; 3 examples"
    assert fact(out, "batches").startswith("3 rows in 2 batches; ")
    assert len(bodies(out)) == 3
    assert "step" not in out
    places = re.findall(r"^row \d+ \((.*)\): ", out, re.MULTILINE)
    assert places == ["batch 1", "batch 1", "batch 2"]
    assert "--val: these settings have no dataset_val" in kdtune(*argv(tiny, "--val"))[2]


def test_rows_and_start(tiny: Path, kdtune: Run) -> None:
    every = bodies(kdtune(*argv(tiny, "--rows", "99"))[1])
    assert bodies(kdtune(*argv(tiny))[1]) == every[:3]
    assert bodies(kdtune(*argv(tiny, "--rows", "2", "--start", "9"))[1]) == every[8:10]
    assert bodies(kdtune(*argv(tiny, "--rows", "0"))[1]) == []
    assert (
        "--start 11: there are 10 rows in 3 steps of an epoch, counted from 1."
        in kdtune(*argv(tiny, "--start", "11"))[2]
    )
    ended = kdtune(*argv(tiny, "--start", "9", "max_steps=2"))[2]
    assert "--start 9: there are 8 rows in 2 steps of the run," in ended
    validation = [*tiny_runs.validated_on(tiny), "--val"]
    assert "--start 4: there are 3 rows in 2 batches," in kdtune(*argv(tiny, *validation, "--start", "4"))[2]


def test_no_model_is_read(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tiny / "student" / name).exists():
            (tmp_path / name).write_bytes((tiny / "student" / name).read_bytes())
    missing = [f"tokenizer.path={tmp_path}", "checkpointer.checkpoint_dir=none", "device=cuda"]
    arguments = argv(tiny, *missing, "teacher_checkpointer.checkpoint_dir=none", recipe="knowledge_distillation")
    assert kdtune(*arguments)[0] == 0
    assert not (tiny / "never").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rows", "-1"], "--rows -1"),
        (["--rows", "x"], "argument --rows: invalid int value: 'x'"),
        (["--start", "0"], "--start 0: rows are counted from 1."),
        (["--start", "2", "--rows", "0"], "--start 2 is the first row to show, and --rows 0 shows none."),
        (["--html", "rows.jsonl"], "give a file that ends in .html"),
        (["--html", "no/such/folder/a.html"], "a folder that exists"),
        (["--row", "3"], "Did you mean --rows?"),
        (["dataset.sorce=x"], "Did you mean dataset.source"),
        (["dataset.source=nowhere.jsonl"], "dataset.source=nowhere.jsonl: no file or folder"),
    ],
)
def test_mistakes(more: list[str], words: str, tiny: Path, kdtune: Run) -> None:
    status, out, err = kdtune(*argv(tiny, *more))
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_templates_that_differ_are_refused_as_by_a_run(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    source = tmp_path / "chats.jsonl"
    source.write_text(json.dumps({"messages": turns}) + "\n")
    settings = [f"{name}.{key}" for name in ("dataset", "dataset_val") for key in (f"source={source}", "format=chat")]
    differing = argv(tiny, *settings, "dataset.chat_template=chatml", "dataset_val.chat_template=llama3")
    refused = kdtune(*differing)
    assert refused[:2] == (2, "")
    assert "but a model has one" in refused[2]
    assert refused == kdtune("run", *differing[1:], "--dry-run")


def test_recipes_that_read_no_data(kdtune: Run, shipped: Path) -> None:
    status, _, err = kdtune("data", "distil", "--config", "tiny")
    assert status == 2
    assert "distil.py has no load_tokenizer and no load_data" in err


def test_generate_reads_no_data(kdtune: Run) -> None:
    assert kdtune("data", "generate", "--config", "tiny") == (
        2,
        "",
        "kdtune: error: generate reads no data set, so there is nothing to look at.\n",
    )


# Colour.


def test_colour_on_a_terminal_only(tiny: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b" not in kdtune(*argv(tiny))[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, out, _ = kdtune(*argv(tiny, "--rows", "99"))
    assert "⟦" not in out
    # What is green or cyan is what has a label.
    painted = re.findall(r"\x1b\[(\d+(?:;\d+)*)m([^\x1b]*)\x1b\[0m", out.partition("\nrows  ")[0])
    legend = 3
    labelled = "".join(text for code, text in painted[legend:] if code.startswith("1;3"))
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    assert sorted(labelled.split("<|end_of_text|>")[:-1]) == sorted(row["completion"] for row in rows)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "\x1b" not in kdtune(*argv(tiny))[1]


# What rows must not do.


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_in_a_row_reaches_the_terminal(
    is_terminal: bool, tiny: Path, kdtune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    source = rows_file(tmp_path / "bad.jsonl", (HOSTILE + "\nrow 7: forged\n", HOSTILE))
    _, out, _ = kdtune(*argv(tiny, f"dataset.source={source}", "tokenizer.max_seq_len=4096"))
    ours = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert [char for char in ours if not char.isprintable() and char != "\n"] == []
    for escaped in (r"\x1b[31mred\x1b]0;title\x07", r"\u202eback", r"\r<script>"):
        assert ours.count(escaped) == 2
    assert not re.search(r"^row 7", ours, re.MULTILINE)
    if not is_terminal:
        assert out.count("⟦") == 2  # the legend's and one run of labels: none out of the row
        assert r"\u27e6mark\u27e7" in out


def test_visible() -> None:
    every = "".join(chr(code) for code in range(0x110000))
    shown = terminal.visible(every, keep="\n")
    assert {char for char in shown if not char.isprintable()} == {"\n"}
    assert terminal.visible("plain ä 漢 🙂") == "plain ä 漢 🙂"


def test_messages_hold_no_escape_sequences(kdtune: Run, shipped: Path) -> None:
    (shipped / "distil.py").write_text("raise ValueError('\\x1b[2Jgone\\nline')")
    assert kdtune("run", "distil")[2] == "kdtune: error: \\x1b[2Jgone\nline\n"


# Without Unicode.


def test_a_stream_without_unicode(tiny: Path, kdtune: Run) -> None:
    token = view.Token
    document = view.Document([token("é\n", (1,), False, False), token("</s>", (2,), True, True)], 1, 1, "")
    looked = command.View("t", [view.Row(1, "step 1", [document])], [], [], [view.Bin(1, 10, 3)], "", "")
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", newline="\n")
    data_text.write(looked, stream)
    stream.flush()
    assert b"  \\xe9\\n\n  [[{{</s>}}]]\n" in raw.getvalue()


# Lengths.


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_histogram_fits(columns: str, tiny: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = kdtune(*argv(tiny, "--rows", "0"))
    lines = out[out.index("length of 10 examples") :].splitlines()
    assert max(map(len, lines)) <= min(80, int(columns))
    bars = [re.fullmatch(r" *([\d,]+) - ([\d,]+) +(\d+)(?:  (#+))?", line) for line in lines[1:-1]]
    assert all(bars)
    assert sum(int(bar[3]) for bar in bars if bar) == 10
    assert lines[-1].startswith("-- max_seq_len 64: no row is cut --")


def test_rows_that_were_cut_are_counted_at_the_limit(tiny: Path, kdtune: Run) -> None:
    _, out, _ = kdtune(*argv(tiny, "tokenizer.max_seq_len=30", "--rows", "0"))
    num_cut = int(re.findall(r"(\d+) truncated", out)[0])
    assert num_cut > 0
    assert f"-- max_seq_len 30: {num_cut} rows cut here --" in out
    assert re.search(r"^ *\d+ - 30 ", out, re.MULTILINE)
    assert re.search(r"min (\d+), .*\n *\1 - ", out), "the first line of the histogram is of the smallest length"


def test_rows_that_are_split_or_left_out(tiny: Path, kdtune: Run) -> None:
    short = argv(tiny, "tokenizer.max_seq_len=30", "--rows", "99")
    num_long = int(re.findall(r"(\d+) truncated", kdtune(*short)[1])[0])
    _, out, _ = kdtune(*short, "dataset.too_long=split")
    assert fact(out, "rows") == f"10 read, 0 lost, 0 truncated, {num_long} split; {10 + num_long} examples"
    assert f"-- max_seq_len 30: {num_long} rows cut here --" in out
    assert len(re.findall(r"from line \d+ of rows.jsonl, example [12] of 2$", out, re.MULTILINE)) == 2 * num_long
    assert len(re.findall(r"from line \d+ of rows.jsonl$", out, re.MULTILINE)) == 10 - num_long
    _, out, _ = kdtune(*short, "dataset.too_long=drop")
    assert (
        fact(out, "rows")
        == f"10 read, {num_long} lost ({num_long} longer than max_seq_len), 0 truncated; {10 - num_long} example"
    )
    assert f"-- max_seq_len 30: {num_long} rows longer and lost --" in out


def test_rows_that_are_skipped(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    source = rows_file(tmp_path / "rows.jsonl", ("a", "b"), ("c", "d"))
    source.write_text('\n{"prompt": "no answer", "\\u001b[2J": 1}\n' + source.read_text())
    status, out, err = kdtune(*argv(tiny, f"dataset.source={source}", "dataset.on_error=skip", "shuffle=false"))
    assert status == 0
    assert fact(out, "rows") == "3 read, 1 lost (1 missing column), 0 truncated; 2 examples"
    assert f"line 2 of {source}" in fact(out, "first skipped")
    assert "\\x1b[2J" in fact(out, "first skipped")
    assert "\x1b" not in out
    assert re.findall(r"from (line .*)$", out, re.MULTILINE) == ["line 3 of rows.jsonl", "line 4 of rows.jsonl"]
    assert err == "warning: dataset: of its rows 33.3% are lost (1 missing column). Look at them.\n"


def test_joined_documents_are_of_no_row(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": f"row {i} of the text"}) + "\n" for i in range(9)))
    text = argv(tiny, f"dataset.source={source}", "dataset.format=text", "shuffle=false", "tokenizer.max_seq_len=30")
    _, out, _ = kdtune(*text, "dataset.join_documents=true")
    assert re.findall(r"from (.*)$", out, re.MULTILINE) == ["example 1", "example 2", "example 3"]


def test_bins_hold_every_length_once() -> None:
    generator = np.random.default_rng(0)
    for shortest, longest in itertools.product((1, 2, 10, 64, 99, 100), (1, 2, 15, 16, 64, 99, 384, 2048, 100_000)):
        if shortest > longest:
            continue
        lengths = generator.integers(shortest, longest + 1, 200)
        bins = view.histogram(lengths, longest)
        assert len(bins) <= 15
        assert bins[0].first == lengths.min()
        assert bins[0].count
        for one in bins:
            assert one.count == ((lengths >= one.first) & (lengths <= one.last)).sum()
        assert sum(one.count for one in bins) == 200
        assert [two.first - one.last for one, two in itertools.pairwise(bins)] == [1] * (len(bins) - 1)


# Spelling.


def test_a_character_of_several_tokens_is_shown_whole(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(tiny / "student")
    ids = tokenizer.encode("🦜", continues=True)
    assert len(ids) > 1, "the vocabulary is without it"
    source = rows_file(tmp_path / "bird.jsonl", ("a 🦜\n", "漢字 🦜"))
    _, out, _ = kdtune(*argv(tiny, f"dataset.source={source}"))
    assert "a 🦜↵\n  ⟦漢字 🦜⟪<|end_of_text|>⟫⟧" in out


def test_half_a_character_shows_as_bytes(tiny: Path) -> None:
    tokenizer = tokenizers.load(tiny / "student")
    bird, a = tokenizer.encode("🦜", continues=True), tokenizer.encode("a", continues=True)
    half = bird[:-1]

    def spelled(ids: list[int], is_label: list[bool] | None = None) -> list[str]:
        found = list(view.spell(ids, is_label or [True] * len(ids), tokenizer, frozenset(tokenizer.ids())))
        assert [id for token in found for id in token.ids] == ids
        return [token.text for token in found]

    shown = spelled(half)
    assert shown[0].startswith("\\x") or shown[0].startswith(" \\x")
    assert spelled([*half, *a]) == [*shown, "a"]
    assert spelled([*half, *bird]) == [*shown, "🦜"]
    assert spelled([*bird, *half]) == ["🦜", *shown]
    assert spelled([*half, tokenizer.eos_id, 10**6]) == [*shown, "<|end_of_text|>", "<id 1000000>"]
    # A label on a part of a character is shown where it is.
    assert "🦜" not in spelled(bird, [False] * len(half) + [True])


# The page.


class Page(HTMLParser):
    """Elements that are open and closed in order, and the tokens among them."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tokens: list[tuple[str, str, str]] = []  # class, title, text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        given = dict(attrs)
        if "title" in given:
            self.tokens.append((given["class"] or "", given["title"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "span" and self.tokens:
            kind, title, text = self.tokens[-1]
            self.tokens[-1] = (kind, title, text + data)


def test_the_page(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    source = rows_file(tmp_path / "rows.jsonl", ("Say 🦜:\n", HOSTILE))
    path = tmp_path / "look.html"
    arguments = argv(tiny, f"dataset.source={source}", "tokenizer.max_seq_len=4096", "--html", str(path))
    assert kdtune(*arguments) == (0, f"The page is in {path}.\n", "")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "a", "object", "base", "form"}
    assert not page.attributes & {"src", "href", "onload", "onclick", "onerror"}
    assert "url(" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert [char for char in text if not char.isprintable() and char != "\n"] == []

    tokenizer = tokenizers.load(tiny / "student")
    prompt, answer = tokenizer.encode("Say 🦜:\n"), tokenizer.encode(HOSTILE, continues=True)
    ids = [int(id) for _, title, _ in page.tokens for id in re.findall(r"\d+", title)]
    assert ids == [*prompt, *answer, tokenizer.eos_id]
    shown = "".join(text for kind, _, text in page.tokens if "label" not in kind)
    assert shown == "<|begin_of_text|>Say 🦜:↵\n"
    labelled = "".join(text for kind, _, text in page.tokens if "label" in kind)
    assert labelled == terminal.visible(HOSTILE) + "<|end_of_text|>"
    assert all(("label" in kind) == title.endswith("label") for kind, title, _ in page.tokens)
    for name in ("rows", "tokens", "batches", "labels per step", "steps"):
        assert f"<dt>{name}</dt>" in text


def test_a_page_shows_packed_documents(tiny: Path, kdtune: Run, tmp_path: Path) -> None:
    path = tmp_path / "look.html"
    kdtune(*argv(tiny, "dataset.packed=true", "--html", str(path)))
    assert path.read_text(encoding="utf-8").count("<pre>") == 10
    assert "document 2: " in path.read_text(encoding="utf-8")


def test_titles_and_places_are_escaped() -> None:
    document = view.Document([view.Token("a", (1,), False, False)], 1, 0, "<b>")
    looked = command.View(
        "<i>",
        [view.Row(1, "step 1", [document])],
        [("<u>", "<s>")],
        [["<em>"], ["<tt>"]],
        [view.Bin(1, 2, 1)],
        "<b>",
        "<q>",
        ["<b>"],
    )
    text = data_page.render(looked)
    for tag in ("<b>", "<i>", "<u>", "<s>", "<q>", "<em>", "<tt>"):
        assert tag not in text


def test_padding_of_a_rectangle_is_not_shown() -> None:
    none = [view.IGNORE] * 3
    labels = torch.tensor([[view.IGNORE, 5, view.IGNORE], [6, view.IGNORE, 7], none])
    batch = view.Batch(torch.zeros_like(labels), labels, labels)
    assert view._documents(batch) == [[2], [3], []]
