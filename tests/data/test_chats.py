"""Chats: which tokens are labelled, with each template and by each way of finding out; chats that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders as folders

from kdtune import checkpoint, data, tokenizers
from kdtune.data import DatasetConfig
from kdtune.data.chats import check_stop, encode_turns, read_messages, split_turns, trained_template
from kdtune.data.config import WeightedSourceConfig
from kdtune.data.encoding import RowEncoder
from kdtune.data.formats import row_encoder
from kdtune.tokenizers import chat

pytestmark = pytest.mark.filterwarnings("ignore:.*of its rows")  # sets of a few odd ones

TURNS = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "Yes, it is."},
]
SPECIAL = [*dict.fromkeys(token for tokens in chat.NAMED.values() for token in tokens)]
# The end of an answer, as a named template writes it.
ENDS = {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama2": " <|endoftext|>",
    "llama3": "<|eot_id|>",
    "mistral": "<|endoftext|>",
    "mistral_v1": "<|endoftext|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
}
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    """One that has the special tokens of every named template, and none."""
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": None}
    return tokenizers.load(folders.qwen(tmp_path_factory.mktemp("t"), additional_special_tokens=SPECIAL, **names))


def with_template(folder: Path, template: str, **config: Any) -> tokenizers.Tokenizer:
    return tokenizers.load(folders.qwen(folder, chat_template=template, **config))


def encoder(tokenizer: tokenizers.Tokenizer, **settings: Any) -> Any:
    """What turns the columns of a row into tokens and labels."""
    cfg = DatasetConfig(source="", format="chat", **settings)
    return row_encoder(cfg, RowEncoder(cfg, tokenizer, 512, "dataset", None).tokenizer, "dataset")


def said(messages: Any, tokenizer: tokenizers.Tokenizer, tools: Any = None, **settings: Any) -> list[list[str]]:
    """The labelled stretches of text, for each example that a row makes."""
    row = {"messages": messages, "tools": tools}
    found = []
    for tokens, is_label in encoder(tokenizer, **settings)(row):
        stretches: list[list[int]] = []
        for i, (token, labelled) in enumerate(zip(tokens, is_label, strict=True)):
            if labelled and not (i and is_label[i - 1]):
                stretches.append([])
            if labelled:
                stretches[-1].append(token)
        found.append([tokenizer.decode(ids, skip_special_tokens=False) for ids in stretches])
    return found


@pytest.mark.parametrize("name", chat.NAMED)
def test_labels_end_with_the_turn(name: str, tokenizer: tokenizers.Tokenizer) -> None:
    end = ENDS[name]
    answers = [answer.lstrip() for answer in said(TURNS, tokenizer, chat_template=name)[0]]
    assert answers == [f"42{end}", f"Yes, it is.{end}"]
    last = said(TURNS, tokenizer, chat_template=name, train_on_last_turn=True)
    assert [[answer.lstrip() for answer in example] for example in last] == [[f"Yes, it is.{end}"]]
    everything = said(TURNS, tokenizer, chat_template=name, train_on_input=True)
    assert everything == [[tokenizer.with_chat_template(name).render_chat(TURNS)]]
    assert tokenizer.piece(check_stop(tokenizer.with_chat_template(name)) or -1) == end.strip()


@pytest.mark.parametrize("name", sorted(set(chat.NAMED) - {"mistral"}))
def test_marks_and_rendering_agree(name: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    without = chat.read(name).replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    (tmp_path / "unmarked.jinja").write_text(without)
    unmarked = str(tmp_path / "unmarked.jinja")
    marked, rendered = (split_turns(TURNS, None, tokenizer.with_chat_template(which)) for which in (name, unmarked))
    assert (marked.is_marked, rendered.is_marked) == (True, False)
    if name != "phi3":  # what it writes behind a whole conversation makes each turn a conversation
        assert encode_turns(marked, tokenizer) == encode_turns(rendered, tokenizer)
    else:
        assert said(TURNS, tokenizer, chat_template=unmarked) == [
            ["42<|end|>\n<|endoftext|>"],
            ["Yes, it is.<|end|>\n<|endoftext|>"],
        ]


def test_marks_win(tmp_path: Path) -> None:
    """A mark around some of the answer, or around a question, is obeyed: nobody writes it by accident."""
    template = (
        "{% for m in messages %}{{ m.role + '\n' }}{% generation %}{{ m.content.split()[0] }}{% endgeneration %}"
        "\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.warns(UserWarning, match="no special token at the end"):
        assert said(TURNS, with_template(tmp_path, template)) == [["What", "42", "Is", "Yes,"]]


def test_one_rendering_is_enough_where_there_are_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = [0]
    render = chat.render

    def counted(*arguments: Any, **settings: Any) -> Any:
        count[0] += 1
        return render(*arguments, **settings)

    monkeypatch.setattr(chat, "render", counted)
    marked, unmarked = with_template(tmp_path / "a", MARKED), with_template(tmp_path / "b", folders.CHATML)
    for tokenizer, last_only, expected in [
        (marked, False, 1),
        (marked, True, 1),
        (unmarked, False, 20),
        (unmarked, True, 2),
    ]:
        encode = encoder(tokenizer, train_on_last_turn=last_only)
        count[0] = 0
        encode({"messages": TURNS * 5})
        assert count[0] == expected


def test_the_last_turn_among_marks_that_are_not_one_per_turn(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}<think></think>"
        "{% endgeneration %}--{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = with_template(tmp_path, template)
    assert said(TURNS, tokenizer, train_on_last_turn=True) == [["<think></think>", "Yes, it is.<|im_end|>"]]
    assert said(TURNS[:3], tokenizer, train_on_last_turn=True) == [["<think></think>", "42<|im_end|>"]]


@pytest.mark.parametrize("template", [MARKED, folders.CHATML])
def test_empty_answers_have_no_label(template: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, template)
    empty = {"role": "assistant", "content": ""}
    assert said([TURNS[0], empty, *TURNS[2:]], tokenizer) == [["Yes, it is.<|im_end|>"]]
    assert said([*TURNS[:3], empty], tokenizer, train_on_last_turn=True) == [["42<|im_end|>"]]
    assert said([TURNS[0], empty], tokenizer) == []


def test_the_last_turn_of_a_template_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, folders.CHATML_WITH_REASONING)
    expected = [["<think></think>\nYes, it is.<|im_end|>"]]
    assert said(TURNS, tokenizer, train_on_last_turn=True) == expected
    # All of it once, and not the first turns again for each later one.
    assert said(TURNS, tokenizer, train_on_input=True) == [[tokenizer.render_chat(TURNS)]]


def test_system_text_that_moves_makes_one_example_per_turn(tokenizer: tokenizers.Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    encoded = encoder(tokenizer, chat_template="mistral")({"messages": messages})
    texts = [tokenizer.decode(tokens, skip_special_tokens=False) for tokens, _ in encoded]
    eos = "<|endoftext|>"
    assert texts == [
        f"{eos}[INST] Be brief.\n\nWhat is 12 + 30?[/INST] 42{eos}",
        f"{eos}[INST] What is 12 + 30?[/INST] 42{eos}[INST] Be brief.\n\nIs it?[/INST] Yes, it is.{eos}",
    ]
    assert said(messages, tokenizer, chat_template="mistral") == [[f" 42{eos}"], [f" Yes, it is.{eos}"]]


def test_generation_stops_at_the_first_stop_token(tmp_path: Path) -> None:
    """What a template writes behind it, even another special token, is not the model's."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|endoftext|>' if not add_generation_prompt }}"
    )
    tokenizer = with_template(tmp_path, template, eos_token="<|im_end|>")
    assert said(TURNS[:2], tokenizer) == [["assistant: 42<|im_end|>"]]


def test_tool_calls_in_the_form_of_openai(tokenizer: tokenizers.Tokenizer) -> None:
    """Arguments are json in a string there, and templates want an object."""
    function = {"name": "weather", "arguments": '{"city": "Köln"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "a", "content": "sun"}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    for given in (tools, json.dumps(tools)):
        assert said([TURNS[0], call, result, TURNS[1]], tokenizer, given, chat_template="qwen") == [
            ['<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>', "42<|im_end|>"]
        ]
    (message,) = read_messages([call], "messages")
    assert "content" not in message, "a template would write it as None"
    assert function["arguments"] == '{"city": "Köln"}', "the row is as it was"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_have_the_names_that_transformers_gives_them(name: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}{{ m.content }}<|im_end|>{% endfor %}"
    folder = folders.qwen(tmp_path, chat_template=template)
    messages = [{"role": "assistant", "content": "42", name: "Hm. "}]
    text = tokenizers.load(folder).render_chat(read_messages(messages, "messages"))
    import transformers

    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert text == expected == "Hm. Hm. 42<|im_end|>"


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *[("human", "user"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("model", "assistant")],
        *[("system", "system"), ("developer", "developer")],
        *[("observation", "tool"), ("function", "tool"), ("ipython", "tool")],
    ],
)
def test_names_of_roles(name: str, role: str) -> None:
    for message in ({"from": name, "value": "a"}, {"role": name, "content": [{"type": "text", "text": "a"}]}):
        assert read_messages([message], "messages") == [{"role": role, "content": "a"}]


USER, ANSWER = TURNS[:2]


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([{"role": ["user"], "content": "a"}], None, r"message 1 in 'messages' has the unknown role \['user'\]"),
        ([USER, {"role": "assistant", "content": None}], None, r"message 2 in 'messages' has no content"),
        ([USER, {"role": "assistant", "tool_calls": "f()"}], None, r"tool_calls that are not a list of objects"),
        ([USER, {"role": "assistant", "content": 42}], None, r"message 2 in 'messages' has content of type int"),
        ([{"role": "user", "content": [{"type": "image"}]}], None, r"content that is not text"),
        ([USER, ANSWER], "[{]", r"the tools are not valid json"),
        ([USER, ANSWER], '{"name": "f"}', r"the tools are a dict, expected a list of objects"),
        ([USER, ANSWER], [{"name": "f"}], r"no place for tools, and 1 are given"),
        ([ANSWER, USER, ANSWER], None, r"refuses this conversation: user and assistant must alternate"),
        ([{"role": "system", "content": "a"}, USER, ANSWER], None, r"it has no place for a system turn"),
    ],
)
def test_a_chat_that_cannot_be_used(
    messages: Any, tools: Any, message: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    rows = [{"messages": TURNS}, {"messages": messages, "tools": tools}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"source": str(tmp_path / "rows.jsonl"), "format": "chat", "chat_template": "gemma"}
    with pytest.raises(ValueError, match=rf"line 2 of .*rows.jsonl: .*{message}"):
        data.load(DatasetConfig(**settings), tokenizer, 512)
    examples = data.load(DatasetConfig(**settings, on_error="skip"), tokenizer, 512)
    assert (len(examples), examples.counts.num_skipped) == (1, 1)


def test_a_template_that_needs_a_question_first(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path, "{{ messages[0].role }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"up to message 1, which is the assistant's, the chat template refuses"):
        said(TURNS[1:], tokenizer)


def test_a_template_that_does_not_say_where_to_stop(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.warns(UserWarning, match="no special token at the end of what the assistant says"):
        encoder(tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_on_input": True, "train_on_last_turn": True}, "labels every turn, .*Give one"),
        (
            {"format": "instruct", "train_on_last_turn": True},
            r"dataset\.train_on_last_turn is for dataset\.format=chat, not instruct",
        ),
        (
            {"format": "text", "chat_template": "chatml"},
            r"dataset\.chat_template is for dataset\.format=chat, not text",
        ),
        ({"chat_template": "tulu"}, r"dataset\.chat_template: .* tulu is neither a file nor one of chatml, gemma"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str, tokenizer: tokenizers.Tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        RowEncoder(DatasetConfig(**{"source": "", "format": "chat", **settings}), tokenizer, 64, "dataset", None)


def test_a_changed_template_file_is_another_data_set(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": TURNS}]))
    template = tmp_path / "mine.jinja"
    cfg = DatasetConfig(
        source=str(tmp_path / "rows.json"),
        format="chat",
        chat_template=str(template),
        cache_dir=str(tmp_path / "cache"),
    )
    tokenizer = with_template(tmp_path / "t", folders.CHATML)
    num_labels = []
    for header in ("", "Answer: "):
        template.write_text(MARKED.replace("{% generation %}", "{% generation %}" + header))
        num_labels.append(data.load(cfg, tokenizer, 512).num_labels)
    assert num_labels[1] > num_labels[0]


# The finished model.


def test_a_model_carries_the_template_that_it_was_trained_with(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old"}]
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": templates}
    folder = folders.qwen(tmp_path / "base", additional_special_tokens=SPECIAL, **names)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 500, "bos_token_id": 500, "num_layers": 2}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("old")
    tokenizer = tokenizers.load(folder)
    section = DatasetConfig(source="", format="chat", chat_template="llama3")

    template = trained_template(tokenizer, section, DatasetConfig(source="", format="text"))
    assert template is not None
    for generation in (None, {"eos_token_id": 500, "temperature": 0.5}, {"eos_token_id": [500, 501]}):
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        companions = checkpoint.read_companions(folder, template=template)
        saved = tmp_path / "saved"
        shutil.rmtree(saved, ignore_errors=True)
        saved.mkdir()
        for name, content in companions.items():
            (saved / name).write_bytes(content)
        found = tokenizers.load(saved)
        assert found.render_chat(TURNS) == tokenizer.with_chat_template("llama3").render_chat(TURNS)
        assert list(found.chat_templates) == ["default"]
        stops = [found.piece(id) for id in found.eos_ids]
        assert stops[0] == "<|endoftext|>"
        assert stops[-1] == "<|eot_id|>", "generation stops where an answer ends"
        written = json.loads(companions["generation_config.json"])
        expected = generation or {"eos_token_id": 500, "bos_token_id": 500}
        own = expected["eos_token_id"] if isinstance(expected["eos_token_id"], list) else [expected["eos_token_id"]]
        assert written == expected | {"eos_token_id": [*own, template.stop_id]}
        import transformers

        text = transformers.AutoTokenizer.from_pretrained(saved).apply_chat_template(TURNS, tokenize=False)
        assert text == found.render_chat(TURNS)
        assert json.loads(companions["tokenizer_config.json"])["chat_template"] == chat.read("llama3")


def test_a_model_has_one_template(tokenizer: tokenizers.Tokenizer) -> None:
    llama3, chatml, own = (DatasetConfig("", "chat", chat_template=name) for name in ("llama3", "chatml", None))
    assert trained_template(tokenizer, own, own) is None
    assert trained_template(tokenizer, DatasetConfig(source=""), None) is None
    for pair in ((llama3, chatml), (llama3, own), (own, chatml)):
        with pytest.raises(ValueError, match=r"dataset\.chat_template=.*, dataset_val\.chat_template=.*: but a model"):
            trained_template(tokenizer, *pair)
    chats = WeightedSourceConfig("", "chat", chat_template="llama3")
    blend = DatasetConfig(sources={"math": WeightedSourceConfig(""), "chats": chats})
    assert [section.has_chats for section in (llama3, blend, DatasetConfig(source=""))] == [True, True, False]
    assert trained_template(tokenizer, blend, llama3) is not None
    with pytest.raises(ValueError, match=r"^dataset\.sources\.chats\.chat_template=llama3, dataset_val"):
        trained_template(tokenizer, blend, own)
