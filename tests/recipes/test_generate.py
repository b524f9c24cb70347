"""`generate`: what it continues, how, where it writes it, and what it refuses before it loads weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import torch

from kdtune import checkpoint, tokenizers
from kdtune.cli.main import main

Generate = Callable[..., list[dict[str, str]]]


@pytest.fixture
def generate(trained: Path, tmp_path: Path) -> Generate:
    """`generate("prompt=Tom")`: prompts and continuations that it wrote."""

    def run(*overrides: str) -> list[dict[str, str]]:
        output_file = tmp_path / "out.jsonl"
        folder = f"checkpointer.checkpoint_dir={trained}"
        settings = [folder, "max_new_tokens=12", "device=cpu", "dtype=fp32", f"output_file={output_file}"]
        main(["run", "generate", *settings, *overrides])
        return [json.loads(line) for line in output_file.read_text(encoding="utf-8").splitlines()]

    return run


def greedy(folder: Path, ids: list[int], count: int) -> str:
    """Without a cache, token by token."""
    model = checkpoint.load_model(folder, dtype=torch.float32, device="cpu")
    tokenizer = tokenizers.load(folder)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count and (not new or new[-1] not in tokenizer.eos_ids):
            new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return tokenizer.decode(new)


PROMPT = "Question: Tom has 10 apples and buys one. How many?\nAnswer: "


def test_greedy(generate: Generate, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = greedy(trained, tokenizers.load(trained).encode(PROMPT), 12)
    assert expected
    assert generate(f"prompt={json.dumps(PROMPT)}") == [{"prompt": PROMPT, "continuation": expected}]
    out = capsys.readouterr().out
    assert f"--- {PROMPT}\n{expected}\n" in out
    assert "tokens/s" in out


def test_a_terminal_obeys_nothing_of_a_prompt(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Question:\x1b[2J"
    assert generate(f"prompt={json.dumps(prompt)}")[0]["prompt"] == prompt
    assert "--- Question:\\x1b[2J\n" in capsys.readouterr().out


def test_prompts_of_a_file_do_not_depend_on_each_other(generate: Generate, tmp_path: Path) -> None:
    prompts = ["Question: Tom", "Tom has 3 apples and", "Wie groß? 你好", "apples", "He"]
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    for settings in ([], ["temperature=0.9", "top_p=0.9", "seed=5"]):
        together = generate(f"prompts_file={file}", *settings)
        assert [result["prompt"] for result in together] == prompts
        assert generate(f"prompts_file={file}", "batch_size=2", *settings) == together
    assert generate(f"prompt='{prompts[1]}'")[0] == generate(f"prompts_file={file}")[1]


def test_sampling_is_the_seed_s(generate: Generate) -> None:
    settings = ["prompt=Tom", "temperature=1.5", "num_samples=3"]
    first = generate(*settings, "seed=3")
    assert generate(*settings, "seed=3") == first
    assert generate(*settings, "seed=77") != first
    assert len({result["continuation"] for result in first}) == 3, "samples of one prompt differ"
    assert generate("prompt=Tom", "temperature=0.8", "top_k=1") == generate("prompt=Tom")


def test_chat(generate: Generate, trained: Path) -> None:
    tokenizer = tokenizers.load(trained)
    text = "<|begin_of_text|>Question: Be brief.\nQuestion: Tom has 3 apples\nAnswer: "
    expected = greedy(trained, tokenizer.encode(text, bos=False), 12)
    result = generate("prompt=Tom has 3 apples", "chat=true", "system_prompt=Be brief.")
    assert result == [{"prompt": "Tom has 3 apples", "continuation": expected}]


def test_bf16(generate: Generate) -> None:
    (result,) = generate(f"prompt={json.dumps(PROMPT)}", "dtype=bf16")
    assert result["continuation"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "Give prompt=... (one text) or prompts_file=..."),
        (["prompt=a", "prompts_file=b"], "and not both"),
        (["prompts_file=nowhere.txt"], "prompts_file=nowhere.txt"),
        (["prompts_file=empty.txt"], "empty.txt is empty"),
        (["prompt=a", "top_p=0.9"], "temperature=0 takes the likeliest token"),
        (["prompt=a", "top_k=3"], "temperature=0 takes the likeliest token"),
        (["prompt=a", "num_samples=2"], "temperature=0 takes the likeliest token"),
        (["prompt=a", "system_prompt=b"], "give chat=true"),
        (["prompt=a", "parallel.tensor=2"], "there is 1 process"),
        (["prompt=a", "parallel.reshard_after_forward=false"], "for its backward, and this model has none"),
        (["prompt=a", "max_new_tokens=128"], "prompt: prompt 1 with 128 new tokens is 1"),
        (["prompt=a", "top_p=1.5", "temperature=1"], "top_p"),
        (["prompt=a", "temperature=-1"], "temperature"),
        (["prompt=a", "output_file=nowhere/out.jsonl"], "output_file=nowhere/out.jsonl"),
        (["prompt=a", "checkpointer.checkpoint_dir=nowhere"], "nowhere is not a folder"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_refusals(
    overrides: list[str],
    message: str,
    generate: Generate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdtune.checkpoint.source.read_into", None)
    Path("empty.txt").touch()
    with pytest.raises(SystemExit) as end:
        generate(*overrides)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_no_chat_template(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_runs.write_model(tmp_path / "model", seed=0)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        main(["run", "generate", f"checkpointer.checkpoint_dir={folder}", "device=cpu", "prompt=Hello", "chat=true"])
    assert "has no chat template" in capsys.readouterr().err


def test_a_prompt_without_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_runs.write_model(tmp_path / "model", seed=0)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    (tmp_path / "prompts.txt").write_text("one\n\nthree\n")
    monkeypatch.setattr("kdtune.checkpoint.source.read_into", None)
    arguments = [f"checkpointer.checkpoint_dir={folder}", f"prompts_file={tmp_path / 'prompts.txt'}"]
    with pytest.raises(SystemExit):
        main(["run", "generate", *arguments, "device=cpu", "max_new_tokens=8"])
    assert "prompts_file: prompt 2 is empty" in capsys.readouterr().err
