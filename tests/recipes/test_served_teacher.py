"""A teacher behind a server: its cache is the one that the model itself would have made."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from stand_in_server import StandIn, served

from kdtune import checkpoint
from kdtune.cli.main import main
from kdtune.teacher_cache import TeacherCache, TopK
from kdtune.teacher_cache import served as client

EXACT = ["store.bits=32", "store.kind=top_k", "store.top_k=40"]
KINDS = ["vllm", "sglang"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes reach the test as they were raised, at once, and by no proxy."""
    monkeypatch.setenv("KDTUNE_TRACEBACK", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)


@pytest.fixture
def server(tiny: Path) -> Iterator[tuple[StandIn, str]]:
    model = checkpoint.load_model(tiny / "teacher", dtype=torch.float32, device="cpu").eval()
    with served(model) as found:
        yield found


def ask(tiny: Path, url: str, folder: Path, *overrides: str) -> Path:
    """Run `cache_served_teacher` as the launcher does; returns `folder`."""
    main(["run", "cache_served_teacher", f"server.url={url}", "server.concurrency=3", *rows(tiny, folder), *overrides])
    return folder


def rows(tiny: Path, folder: Path) -> list[str]:
    settings = [f"teacher_dir={tiny / 'teacher'}", f"output_dir={folder}", "tokenizer.max_seq_len=64"]
    return [*settings, f"dataset.source={tiny / 'rows.jsonl'}", "dataset.format=completion"]


def cache(tiny: Path, folder: Path, *overrides: str) -> Path:
    """Run `cache_teacher_logits` on the same rows; returns `folder`."""
    teacher, *others = rows(tiny, folder)
    live = [teacher.replace("teacher_dir", "teacher_checkpointer.checkpoint_dir"), "device=cpu", "dtype=fp32"]
    main(["run", "cache_teacher_logits", *live, *others, *overrides])
    return folder


def entropy_of_bucket(answers: TopK) -> np.ndarray:
    log_p = np.concatenate([answers.log_probs, answers.log_rest[:, None]], 1)
    return -(np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0)).sum(1)


@pytest.mark.parametrize(
    "store", [EXACT, [*EXACT, "store.top_p=0.03"], ["store.bits=32", "store.kind=top_k", "store.top_k=2048"]]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_that_of_the_model(
    kind: str, store: list[str], server: tuple[StandIn, str], tiny: Path, tmp_path: Path
) -> None:
    expected = TeacherCache(cache(tiny, tmp_path / "live", *store))
    found = TeacherCache(ask(tiny, server[1], tmp_path / "served", f"server.kind={kind}", *store))
    assert found.card.entropy_of == "bucket"
    assert found.ids.tolist() == expected.ids.tolist()
    for example in expected.ids.tolist():
        mine, theirs = expected.read(example), found.read(example)
        assert isinstance(mine, TopK)
        assert isinstance(theirs, TopK)
        assert theirs.ids.tolist() == mine.ids.tolist()
        np.testing.assert_allclose(np.exp(theirs.log_probs), np.exp(mine.log_probs), rtol=1e-4)
        np.testing.assert_allclose(np.exp(theirs.log_rest), np.exp(mine.log_rest), rtol=1e-4, atol=2e-7)
        np.testing.assert_allclose(theirs.label_log_probs, mine.label_log_probs, atol=1e-5)
        np.testing.assert_allclose(theirs.entropy, entropy_of_bucket(theirs), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_learns_from_it(kind: str, server: tuple[StandIn, str], tiny: Path, tmp_path: Path) -> None:
    folders = {
        "live": cache(tiny, tmp_path / "live", *EXACT),
        "served": ask(tiny, server[1], tmp_path / "served", *EXACT, f"server.kind={kind}"),
    }
    numbers = []
    for name, folder in folders.items():
        argv = tiny_runs.arguments(tiny, tmp_path / f"run_{name}", "max_steps=3", recipe="knowledge_distillation")
        argv.remove(f"teacher_checkpointer.checkpoint_dir={tiny / 'teacher'}")
        main([*argv, f"teacher.cache_dir={folder}"])
        numbers.append([line for line in tiny_runs.numbers(tmp_path / f"run_{name}") if "loss" in line])
    for found, expected in zip(*numbers, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_tiny_config(server: tuple[StandIn, str], tmp_path: Path) -> None:
    """It has what tiny runs learn from, and are validated on."""
    stand_in, url = server
    stand_in.max_seq_len = 512
    stand_in.model = checkpoint.load_model(tiny_runs.TEACHER_ASSETS, dtype=torch.float32, device="cpu").eval()
    cache, run = tmp_path / "cache", tmp_path / "run"
    main(["run", "cache_served_teacher", "--config", "tiny", f"server.url={url}", f"output_dir={cache}"])
    assert len(TeacherCache(cache)) == 24 + 4
    learn = ["run", "knowledge_distillation", "--config", "tiny", f"teacher.cache_dir={cache}", f"output_dir={run}"]
    with pytest.raises(ValueError, match=r"served as \S+; these: .* with teacher_checkpointer=null"):
        main(learn)
    main([*learn, "teacher_checkpointer=null"])
    assert len(tiny_runs.steps(run)) == 4


def test_what_fails_is_asked_again(server: tuple[StandIn, str], tiny: Path, tmp_path: Path) -> None:
    stand_in, url = server
    stand_in.failures = ["503", "hang up", "429", "half", "500", "sleep", "hang up", "502"]
    ask(tiny, url, tmp_path / "cache", "server.timeout_s=0.3")
    assert not stand_in.failures
    assert len(TeacherCache(tmp_path / "cache")) == tiny_runs.NUM_ROWS


def test_it_gives_up_and_goes_on_later(server: tuple[StandIn, str], tiny: Path, tmp_path: Path) -> None:
    stand_in, url = server
    stand_in.failures = [*[""] * 6, *["503"] * 100]
    with pytest.raises(OSError, match=r"/v1/completions could not be asked, 3 times, at last: 503 .*not now.*is kept"):
        ask(tiny, url, tmp_path / "cache", "server.max_retries=2", "server.concurrency=1")
    kept = TeacherCache(tmp_path / "cache").ids
    assert 0 < len(kept) <= 6
    stand_in.failures, stand_in.prompts = [], []
    ask(tiny, url, tmp_path / "cache")
    assert len(stand_in.prompts) == tiny_runs.NUM_ROWS - len(kept), "nothing is asked twice"
    ask(tiny, url, tmp_path / "cache")
    assert len(stand_in.prompts) == tiny_runs.NUM_ROWS - len(kept), "nothing was missing"


def test_a_signal(server: tuple[StandIn, str], tiny: Path, tmp_path: Path) -> None:
    stand_in, url = server

    def stop(answer: Any) -> Any:
        if len(stand_in.prompts) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    stand_in.change = stop
    with pytest.raises(SystemExit) as raised:
        ask(tiny, url, tmp_path / "cache", "server.concurrency=1")
    assert raised.value.code == 128 + signal.SIGTERM
    assert 0 < len(TeacherCache(tmp_path / "cache")) < tiny_runs.NUM_ROWS
    ask(tiny, url, tmp_path / "cache")
    assert len(TeacherCache(tmp_path / "cache")) == tiny_runs.NUM_ROWS


def test_a_wait_that_the_server_asks_for(server: tuple[StandIn, str], tiny: Path, tmp_path: Path) -> None:
    stand_in, url = server
    stand_in.failures, stand_in.retry_after = ["503"], 1
    ask(tiny, url, tmp_path / "cache", "server.concurrency=1")
    assert stand_in.times[1] - stand_in.times[0] >= 0.95


def test_rate_and_concurrency(server: tuple[StandIn, str], tiny: Path, tmp_path: Path) -> None:
    stand_in, url = server
    stand_in.slowness = 0.05
    ask(tiny, url, tmp_path / "fast")
    assert 1 < stand_in.most_at_once <= 3
    stand_in.times = []
    ask(tiny, url, tmp_path / "slow", "server.requests_per_second=20")
    assert np.diff(sorted(stand_in.times)).sum() >= 0.95 * (tiny_runs.NUM_ROWS - 1) / 20


def test_a_key(server: tuple[StandIn, str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in, url = server
    stand_in.key = "secret"
    with pytest.raises(ValueError, match=r"refuses a request: 401 .*api_key_variable names"):
        ask(tiny, url, tmp_path / "cache")
    with pytest.raises(ValueError, match="no such environment variable"):
        ask(tiny, url, tmp_path / "cache", "server.api_key_variable=THE_KEY")
    monkeypatch.setenv("THE_KEY", "secret")
    ask(tiny, url, tmp_path / "cache", "server.api_key_variable=THE_KEY")
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())


def shifted(answer: Any) -> Any:
    found = answer["choices"][0]["prompt_logprobs"]
    return {"choices": [{"prompt_logprobs": [None, *found[2:], found[1]]}]}


def shorter(answer: Any) -> Any:
    return {"choices": [{"prompt_logprobs": answer["choices"][0]["prompt_logprobs"][:-1]}]}


def likelier(answer: Any) -> Any:
    for entries in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in entries.values():
            entry["logprob"] += 9
    return answer


def unknown(answer: Any) -> Any:
    for entries in answer["choices"][0]["prompt_logprobs"][1:]:
        entries["2048"] = {"logprob": -9.0}
    return answer


def of_others(answer: Any) -> Any:
    answer = copy.deepcopy(answer)
    for entry in answer["meta_info"]["input_token_logprobs"]:
        entry[1] += 1
    return answer


def later(answer: Any) -> Any:
    meta = copy.deepcopy(answer["meta_info"])
    meta["input_top_logprobs"] = [
        None,
        *[[[-1.0, id, None] for id in range(2000)]] * (len(meta["input_top_logprobs"]) - 1),
    ]
    return {"meta_info": meta}


def fewer(answer: Any) -> Any:
    answer["meta_info"]["input_top_logprobs"] = [top and top[:5] for top in answer["meta_info"]["input_top_logprobs"]]
    return answer


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("vllm", shifted, r"at place \d it lacks the token that is there"),
        ("vllm", shorter, r"an example of \d+ tokens that cannot be used: it is about \d+ tokens"),
        ("vllm", likelier, "no log-probabilities: of a token they add up to"),
        ("vllm", unknown, "token 2048 is none of the 2,048"),
        ("vllm", lambda answer: {"choices": [{"text": "x"}]}, "another form than that of server.kind=vllm"),
        ("vllm", lambda answer: {"choices": [{"prompt_logprobs": None}]}, "it is about 0 tokens"),
        ("sglang", of_others, "it is about the token"),
        ("sglang", later, r"at place \d+ its two lists disagree about the token"),
        ("sglang", fewer, "it has [56] likely tokens, and store.top_k=8 asks for 8"),
        ("sglang", lambda answer: {"text": "x"}, "another form than that of server.kind=sglang"),
    ],
)
def test_answers_that_are_no_answers(
    kind: str, change: Any, message: str, server: tuple[StandIn, str], tiny: Path, tmp_path: Path
) -> None:
    stand_in, url = server
    stand_in.change = change
    with pytest.raises(ValueError, match=message):
        ask(tiny, url, tmp_path / "cache", f"server.kind={kind}", "store.kind=top_k", "store.top_k=8")
    assert len(TeacherCache(tmp_path / "cache")) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["server.url=localhost:8000"], "is no address of a server"),
        (["server.url={}/v1"], "without /v1"),
        (["server.model=another"], "server.model=another, and http.* has the-teacher"),
        (["server.kind=sglang", "server.model=the-teacher"], "SGLang has one"),
        (["store.kind=samples"], "store.kind=samples needs the whole distribution"),
        (["store.kind=top_k", "store.top_k=5000"], "asks for more tokens than the teacher's vocabulary has"),
        (["tokenizer.max_seq_len=200", "dataset.source={long}"], "takes 127 at most"),
        (["server.url=http://127.0.0.1:9"], "models could not be asked: URLError"),
    ],
)
def test_refusals(overrides: list[str], message: str, server: tuple[StandIn, str], tiny: Path, tmp_path: Path) -> None:
    _, url = server
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "Tom has " * 70, "completion": "He does."}) + "\n")
    given = [override.replace("{long}", str(long)).replace("{}", url) for override in overrides]
    with pytest.raises((ValueError, OSError), match=message):
        ask(tiny, url, tmp_path / "cache", *given)
    assert not (tmp_path / "cache").exists()


def test_more_than_vllm_tells(server: tuple[StandIn, str], tiny: Path, tmp_path: Path) -> None:
    stand_in, url = server
    stand_in.max_logprobs = 20
    with pytest.raises(ValueError, match=r"400 .*max allowed.*runs with --max-logprobs 64"):
        ask(tiny, url, tmp_path / "cache")
