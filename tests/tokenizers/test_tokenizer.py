"""Ids, text and chats must be those of transformers, whatever file the tokenizer comes in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizer_folders as folders

from kdtune import tokenizers

KINDS: dict[str, Callable[..., Path]] = {
    "llama3": folders.llama3,
    "qwen": folders.qwen,
    "llama2": folders.llama2,
    "tiktoken": folders.tiktoken,
}
SPECIAL = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "llama2": "</s>", "tiktoken": "<|eot_id|>"}
CHATS = {
    "one turn": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Yes,  it is.\n"}],
    "question": [{"role": "user", "content": " What is 12 + 30?"}],
    "turns": [
        {"role": "user", "content": "naïve <s> café"},
        {"role": "assistant", "content": "  42\n\n"},
        {"role": "user", "content": "你好 & <b>"},
        {"role": "assistant", "content": "it's"},
    ],
}


def oracle(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2"])
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path)
    tokenizer, expected = tokenizers.load(folder), oracle(folder)
    special = SPECIAL[kind]
    texts = [*folders.TEXTS, f"a{special}b", f"{special} {special}x", f"x {special}\n{special}"]
    for text in texts:
        if kind == "llama2" and text.startswith(" "):
            continue  # transformers 5 adds no space before a space; sentencepiece does: see the next test
        assert tokenizer.encode(text) == expected.encode(text), text
        assert tokenizer.encode(text, bos=False) == expected.encode(text, add_special_tokens=False), text
    assert tokenizer.eos_ids == (expected.eos_token_id,)
    assert tokenizer.bos_id == expected.bos_token_id
    assert tokenizer.vocab_size == len(expected)


@pytest.mark.parametrize("make", [folders.llama2, folders.normalising_sentencepiece])
def test_ids_are_those_of_sentencepiece(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = tokenizers.load(folder)
    for text in folders.TEXTS:
        assert tokenizer.encode(text) == [model.bos_id(), *model.encode(text)], text


@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2"])
@pytest.mark.parametrize("skip", [True, False])
def test_decoded_text_is_that_of_transformers(kind: str, skip: bool, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path)
    tokenizer, expected = tokenizers.load(folder), oracle(folder)
    for text in [*folders.TEXTS, f"a{SPECIAL[kind]} b"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip) == expected.decode(ids, skip_special_tokens=skip), text


def test_tiktoken_agrees_with_tokenizer_json(tmp_path: Path) -> None:
    ranks, json_file = (
        tokenizers.load(folders.tiktoken(tmp_path / "a")),
        tokenizers.load(folders.llama3(tmp_path / "b")),
    )
    for text in folders.TEXTS:
        assert ranks.encode(text, bos=False) == json_file.encode(text, bos=False), text
    assert ranks.vocab_size == 500 + 256
    assert ranks.piece(ranks.encode("")[0]) == "<|begin_of_text|>"
    assert ranks.decode(ranks.encode("x<|eot_id|>y"), skip_special_tokens=False) == "<|begin_of_text|>x<|eot_id|>y"


def test_a_changed_rank_file_is_read_again(tmp_path: Path) -> None:
    # tiktoken's own loader keeps a copy in a temporary folder and serves it on.
    folder = folders.tiktoken(tmp_path)
    assert tokenizers.load(folder).vocab_size == 756
    path = folder / "tokenizer.model"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:400]))
    assert tokenizers.load(folder).vocab_size == 656


def test_decode_undoes_encode(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(KINDS[kind](tmp_path))
    for text in folders.TEXTS:
        if "\u0301" in text or (kind == "llama2" and "▁" in text):
            continue  # NFC composes the accent, and sentencepiece writes a space as the other
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_continuation_decodes_to_the_joined_text(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(KINDS[kind](tmp_path))
    for prompt in ("### Response:\n", "Question: why? Answer:", "x "):
        for answer in ("yes", " yes", "\nno", "42"):
            ids = tokenizer.encode(prompt) + tokenizer.encode(answer, continues=True)
            assert tokenizer.decode(ids) == prompt + answer
            assert tokenizer.encode(answer, continues=True)[0] != tokenizer.bos_id


def test_parts_join_to_the_ids_of_the_whole(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(KINDS[kind](tmp_path))
    parts = ["What is it?", f"{SPECIAL[kind]}\n", "", " 你好 🦙 naïve", f"{SPECIAL[kind]} it's"]
    groups = tokenizer.encode_parts(parts)
    assert [id for ids in groups for id in ids] == tokenizer.encode("".join(parts), bos=False)
    assert [len(ids) == 0 for ids in groups] == [False, False, True, False, False]
    assert SPECIAL[kind] in tokenizer.decode(groups[4], skip_special_tokens=False)


def test_a_token_over_a_border_belongs_to_the_later_part(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(folders.qwen(tmp_path))
    assert len(tokenizer.encode(" the")) == 1
    assert [len(ids) for ids in tokenizer.encode_parts(["x ", "the"])] == [1, 1]


def test_parts_of_a_normalising_model_are_encoded_one_by_one(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(folders.normalising_sentencepiece(tmp_path))
    first, second = tokenizer.encode_parts(["the  dog ", "does"])
    assert first == tokenizer.encode("the dog", bos=False)
    assert tokenizer.decode(second) == "does"


def test_bos_rule(tmp_path: Path) -> None:
    def adds_bos(make: Callable[..., Path], **config: Any) -> bool:
        tokenizer = tokenizers.load(make(tmp_path / str(len(list(tmp_path.iterdir()))), **config))
        return tokenizer.encode("the")[0] == tokenizer.bos_id

    assert adds_bos(folders.llama3)  # its post-processor does
    assert not adds_bos(folders.llama3, add_bos_token=False)
    assert not adds_bos(folders.qwen)
    assert adds_bos(folders.qwen, add_bos_token=True, bos_token="<|endoftext|>")
    assert adds_bos(folders.llama2)
    assert not adds_bos(folders.llama2, add_bos_token=False)
    assert adds_bos(folders.tiktoken)


def test_bos_and_eos_on_request(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(folders.llama3(tmp_path / "a"))
    assert tokenizer.encode("the", bos=False) == tokenizer.encode("the")[1:]
    assert tokenizer.encode("the", eos=True) == [*tokenizer.encode("the"), tokenizer.eos_ids[0]]
    with pytest.raises(ValueError, match="no bos token"):
        tokenizers.load(folders.qwen(tmp_path / "b")).encode("the", bos=True)


def test_eos_ids_of_the_generation_config_come_after_the_tokenizers_own(tmp_path: Path) -> None:
    folder = folders.llama3(tmp_path)
    own = tokenizers.load(folder).eos_ids[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [501, own, 99999]}))
    assert tokenizers.load(folder).eos_ids == (own, 501)


def test_added_tokens_that_only_the_settings_know(tmp_path: Path) -> None:
    token = {"content": "<think>", "special": False, "normalized": False, "lstrip": False, "rstrip": False}
    folder = folders.qwen(tmp_path, added_tokens_decoder={"503": token}, additional_special_tokens=["<|tool|>"])
    tokenizer, expected = tokenizers.load(folder), oracle(folder)
    text = "a<think>b <|tool|>"
    assert tokenizer.encode(text) == expected.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == "a<think>b "
    with pytest.raises(ValueError, match="do not belong together"):
        tokenizers.load(folders.qwen(tmp_path / "b", added_tokens_decoder={"777": token}))


def test_added_tokens_of_a_sentencepiece_folder(tmp_path: Path) -> None:
    folder = folders.llama2(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 460, "<|im_end|>": 461}))
    tokenizer = tokenizers.load(folder)
    assert tokenizer.vocab_size == 462
    ids = tokenizer.encode("<|im_start|>user\nthe dog<|im_end|>", bos=False)
    assert (ids[0], ids[-1]) == (460, 461)
    assert tokenizer.decode(ids) == "<|im_start|>user\nthe dog<|im_end|>"


def test_vocab_and_merges_without_tokenizer_json(tmp_path: Path) -> None:
    folder = folders.qwen(tmp_path / "a", tokenizer_class="Qwen2Tokenizer")
    reference = tokenizers.load(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(500 + i): {"content": content, "special": True} for i, content in enumerate(folders.QWEN_SPECIAL)
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(folder)
    for text in [*folders.TEXTS, "x<|im_end|>y"]:
        assert tokenizer.encode(text) == reference.encode(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "RobertaTokenizer"}))
    with pytest.raises(ValueError, match=r"roberta.*save_pretrained"):
        tokenizers.load(folder)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2"])
def test_chats_are_those_of_transformers(kind: str, chat: str, add_generation_prompt: bool, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path)
    tokenizer, expected = tokenizers.load(folder), oracle(folder)
    settings = {"add_generation_prompt": add_generation_prompt}
    text = tokenizer.render_chat(CHATS[chat], **settings)
    assert text == expected.apply_chat_template(CHATS[chat], tokenize=False, **settings)
    ids = tokenizer.encode_chat(CHATS[chat], **settings)
    assert ids == expected.apply_chat_template(CHATS[chat], tokenize=True, return_dict=False, **settings)
    assert ids.count(tokenizer.bos_id) <= 1 + (kind == "llama2" and "<s>" in text[3:])


def test_tools_are_rendered_as_transformers_does(tmp_path: Path) -> None:
    folder = folders.llama3(tmp_path)
    tools = [{"type": "function", "function": {"name": "weather", "description": "<b> & 'é'", "parameters": {}}}]
    text = tokenizers.load(folder).render_chat(CHATS["question"], tools=tools)
    assert text == oracle(folder).apply_chat_template(CHATS["question"], tools=tools, tokenize=False)
    assert "<b> & 'é'" in text


def test_template_file_wins_over_the_config(tmp_path: Path) -> None:
    folder = folders.qwen(tmp_path)
    (folder / "chat_template.jinja").write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}!")
    assert tokenizers.load(folder).render_chat(CHATS["question"]) == " What is 12 + 30?!"


def test_templates_by_name(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    tokenizer = tokenizers.load(folders.qwen(tmp_path, chat_template=templates))
    assert tokenizer.render_chat([]) == "plain"
    assert tokenizer.render_chat([], tools=[{}, {}]) == "2"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for %}", "not valid jinja"),
        ("{{ raise_exception('no system turns') }}", "refuses this conversation: no system turns"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
    ],
)
def test_bad_templates(template: str | None, message: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(folders.qwen(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match=message):
        tokenizer.render_chat(CHATS["question"])


def test_difference(tmp_path: Path) -> None:
    llama3 = tokenizers.load(folders.llama3(tmp_path / "llama3"))
    qwen = tokenizers.load(folders.qwen(tmp_path / "qwen"))
    ranks = tokenizers.load(folders.tiktoken(tmp_path / "tiktoken"))
    assert tokenizers.difference(llama3, llama3) is None
    found = tokenizers.difference(llama3, qwen)
    assert found is not None
    assert found.startswith("id ")
    # The same pieces from another kind of file, and ids that only one of them has, are no difference ...
    more = tokenizers.load(folders.qwen(tmp_path / "more", additional_special_tokens=["<|tool|>"]))
    assert tokenizers.difference(qwen, more) is None
    # ... and one that calls itself reserved means nothing yet: here <|start_header_id|> against a reserved token.
    assert "'<|start_header_id|>'" not in (tokenizers.difference(llama3, ranks) or "")
    assert all(ranks.piece_bytes(id) == llama3.piece_bytes(id) for id in range(500))


def test_pieces_spell_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(KINDS[kind](tmp_path))
    text = "the naïve 你好 🦙"
    spelled = b"".join(map(tokenizer.piece_bytes, tokenizer.encode(text, continues=True)))
    assert spelled == text.encode()
    assert tokenizer.ids()[0] == 0
    assert tokenizer.ids()[-1] == tokenizer.vocab_size - 1


def test_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"kdtune download meta-llama/Llama"):
        tokenizers.load("meta-llama/Llama-3.2-1B")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json.*weights.bin"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01nonsense" * 50)
    with pytest.raises(ValueError, match="neither a sentencepiece model"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nYg== 1\n!!! 2\n")
    with pytest.raises(ValueError, match="line 3"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nYg== 1\n")
    with pytest.raises(ValueError, match="2 ranks"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json holds a list"):
        tokenizers.load(tmp_path)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="id 9999 is not in the vocabulary"):
        tokenizers.load(folders.qwen(tmp_path)).decode([1, 9999])
