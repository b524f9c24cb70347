"""Chats with the tokenizers of published models, where a folder of them is at hand: ids and labels as by transformers.

The environment variable KDTUNE_TEST_DATA names the folder. Tokenizers of real size have what small ones do not: a
hundred thousand merges, tokens that swallow line breaks, pieces of emoji.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kdtune import tokenizers
from kdtune.data import DatasetConfig
from kdtune.data.chats import read_messages
from kdtune.data.formats import row_encoder
from kdtune.tokenizers import chat

DATA = Path(os.environ.get("KDTUNE_TEST_DATA", "/nowhere"))
pytestmark = pytest.mark.skipif(
    not (DATA / "tok").is_dir(), reason="KDTUNE_TEST_DATA names no folder of published tokenizers"
)

FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
PIECES = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "legacy": False,
}
# What lies in a folder, its settings (None: among the files), and the templates whose tokens it has.
KINDS: dict[str, tuple[dict[str, str], dict[str, Any] | None, list[str]]] = {
    "llama2": ({"llama2/tokenizer.model": "tokenizer.model"}, PIECES, ["llama2", "mistral_v1"]),
    "mistral_v1": ({"mistral/tokenizer.model.v1": "tokenizer.model"}, PIECES, ["llama2", "mistral_v1"]),
    "mistral_v3": (
        {"mistral/mistral_instruct_tokenizer_240323.model.v3": "tokenizer.model"},
        PIECES,
        ["llama2", "mistral", "mistral_v1"],
    ),
    "olmo": (
        {"olmo/allenai_dolma2.json": "tokenizer.json"},
        FAST | {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        ["chatml", "llama2", "mistral_v1", "qwen"],
    ),
    "phi3": (
        {"phi-3-mini/tokenizer.json": "tokenizer.json"},
        FAST | {"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": False},
        ["llama2", "mistral_v1", "phi3"],
    ),
    "qwen": (
        {f"qwen1.5/{name}": name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")},
        None,
        ["chatml", "qwen"],
    ),
}
HARD = [
    {"role": "user", "content": "naïve <s> café\n\n"},
    {"role": "assistant", "content": "  42. \n"},
    {"role": "user", "content": "你好 & <b> 🦙"},
    {"role": "assistant", "content": "it's 🧙‍♂️\n"},
]
ENDS = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "phi3": "<|end|>"}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    files, settings, _ = KINDS[request.param]
    path = tmp_path_factory.mktemp("tokenizers") / request.param
    path.mkdir()
    for source, name in files.items():
        shutil.copy(DATA / "tok" / source, path / name)
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def conversations() -> list[Any]:
    rows = json.loads((DATA / "text/chat/fastchat_dummy_conversation.json").read_text())
    return [*[row["conversations"] for row in rows[::25]], HARD, [{"role": "system", "content": "Be brief."}, *HARD]]


def samples() -> list[tuple[str, Any]]:
    """The requests of mistral-common's tests, by name."""
    paths = sorted((DATA / "ref/tokens/mistral_samples").glob("*__sample.json"))
    return [(path.name.removesuffix("__sample.json"), json.loads(path.read_text())) for path in paths]


def test_templates_that_a_tokenizer_has_the_tokens_of(folder: Path) -> None:
    tokenizer = tokenizers.load(folder)
    for name in chat.NAMED:
        if name in KINDS[folder.name][2]:
            tokenizer.with_chat_template(name)
        else:
            with pytest.raises(ValueError, match="no such special token"):
                tokenizer.with_chat_template(name)


def test_chats_are_encoded_and_labelled_as_by_transformers(folder: Path) -> None:
    import transformers

    oracle, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), tokenizers.load(folder)
    for name in KINDS[folder.name][2]:
        encode = row_encoder(DatasetConfig(format="chat"), tokenizer.with_chat_template(name), "dataset")
        rows = [{"messages": messages} for messages in conversations()]
        if name == "qwen":
            rows += [{"messages": request["messages"], "tools": request.get("tools")} for _, request in samples()]
        for row in rows:
            messages, encoded = read_messages(row["messages"], "messages"), encode(row)
            settings = {"chat_template": chat.read(name), "tools": row.get("tools")}
            if name == "mistral":
                if len(encoded) == 1:  # no system text, which would make one example per turn
                    found = oracle.apply_chat_template(messages, return_dict=False, **settings)
                    assert encoded[0][0] == found
            else:
                found = oracle.apply_chat_template(messages, return_assistant_tokens_mask=True, **settings)
                assert encoded == [(found["input_ids"], list(map(bool, found["assistant_masks"])))]
            for ids, is_label in encoded:
                ends = [i for i, (a, b) in enumerate(zip(is_label, [*is_label[1:], False], strict=True)) if a and not b]
                assert ends
                assert {tokenizer.piece(ids[i]) for i in ends} == {ENDS.get(name, tokenizer.piece(tokenizer.eos_id))}


@pytest.mark.parametrize(("version", "name"), [("v1", "mistral_v1"), ("v3", "mistral")])
def test_mistral_writes_what_mistral_common_does(version: str, name: str, tmp_path: Path) -> None:
    files, settings, _ = KINDS[f"mistral_{version}"]
    for source in files:
        shutil.copy(DATA / "tok" / source, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizers.load(tmp_path).with_chat_template(name)
    compared = 0
    for sample, request in samples():
        golden = DATA / f"ref/tokens/mistral_samples/{sample}__tokens_{version}.json"
        if not golden.is_file():
            continue
        messages = read_messages(request["messages"], "messages")
        for message in messages:
            if message["role"] == "tool" and message["content"].startswith("{"):
                message["content"] = json.dumps(json.loads(message["content"]))  # mistral-common's spaces
        ids = tokenizer.encode_chat(messages, tools=request.get("tools"))
        assert ids == json.loads(golden.read_text())["tokens"], sample
        compared += 1
    assert compared == {"v1": 1, "v3": 6}[version]
