"""The named chat templates, written out as their models' authors document them; marks of the template itself."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders as folders

from kdtune import tokenizers
from kdtune.tokenizers import chat

SPECIAL = [*dict.fromkeys(token for tokens in chat.NAMED.values() for token in tokens)]
BOS, EOS = "<|endoftext|>", "<|im_end|>"

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "Yes, it is."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<b> 'é'", "parameters": {}}}]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "a23456789", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}},
            {"id": "b23456789", "type": "function", "function": {"name": "weather", "arguments": {}}},
        ],
    },
    {"role": "tool", "tool_call_id": "a23456789", "content": "sun"},
    {"role": "tool", "tool_call_id": "b23456789", "content": '{"rain": true}'},
    {"role": "assistant", "content": "No."},
]

# What each writes for TURNS, and for SYSTEM (None: it refuses); what the assistant says stands in double brackets.
WRITTEN = {
    "chatml": (
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n[[Yes, it is.<|im_end|>]]\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n[[Yes, it is.<|im_end|>]]\n",
    ),
    "qwen": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n[[Yes, it is.<|im_end|>]]\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n[[Yes, it is.<|im_end|>]]\n",
    ),
    "llama2": (
        "<bos>[INST] What is 12 + 30? [/INST][[ 42 <eos>]]<bos>[INST] Is it? [/INST][[ Yes, it is. <eos>]]",
        "<bos>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 12 + 30? [/INST][[ 42 <eos>]]"
        "<bos>[INST] Is it? [/INST][[ Yes, it is. <eos>]]",
    ),
    "llama3": (
        "<bos><|start_header_id|>user<|end_header_id|>\n\nWhat is 12 + 30?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[42<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes, it is.<|eot_id|>]]",
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 12 + 30?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[42<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes, it is.<|eot_id|>]]",
    ),
    "mistral": (
        "<bos>[INST] What is 12 + 30?[/INST][[ 42<eos>]][INST] Is it?[/INST][[ Yes, it is.<eos>]]",
        # System text stands before the last question, so that each answer is an example of its own.
        "<bos>[INST] What is 12 + 30?[/INST] 42<eos>[INST] Be brief.\n\nIs it?[/INST][[ Yes, it is.<eos>]]",
    ),
    "mistral_v1": (
        "<bos> [INST] What is 12 + 30? [/INST][[ 42<eos>]] [INST] Is it? [/INST][[ Yes, it is.<eos>]]",
        "<bos> [INST] Be brief.\n\nWhat is 12 + 30? [/INST][[ 42<eos>]] [INST] Is it? [/INST][[ Yes, it is.<eos>]]",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nWhat is 12 + 30?<end_of_turn>\n<start_of_turn>model\n[[42<end_of_turn>]]\n"
        "<start_of_turn>user\nIs it?<end_of_turn>\n<start_of_turn>model\n[[Yes, it is.<end_of_turn>]]\n",
        None,
    ),
    "phi3": (
        "<|user|>\nWhat is 12 + 30?<|end|>\n<|assistant|>\n[[42<|end|>]]\n"
        "<|user|>\nIs it?<|end|>\n<|assistant|>\n[[Yes, it is.<|end|>]]\n<eos>",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 12 + 30?<|end|>\n<|assistant|>\n[[42<|end|>]]\n"
        "<|user|>\nIs it?<|end|>\n<|assistant|>\n[[Yes, it is.<|end|>]]\n<eos>",
    ),
}


def oracle(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that has the special tokens of every named template."""
    path = tmp_path_factory.mktemp("tokenizer")
    return folders.qwen(path, bos_token=BOS, chat_template=None, additional_special_tokens=SPECIAL)


def expected(name: str, with_system: bool = False) -> str | None:
    written = WRITTEN[name][with_system]
    return written and written.replace("<bos>", BOS).replace("<eos>", EOS)


def plain(marked: str) -> str:
    return marked.replace("[[", "").replace("]]", "")


@pytest.mark.parametrize("name", chat.NAMED)
@pytest.mark.parametrize("with_system", [False, True])
def test_named_templates_write_what_is_documented(name: str, with_system: bool, folder: Path) -> None:
    tokenizer = tokenizers.load(folder).with_chat_template(name)
    text = expected(name, with_system)
    messages = SYSTEM if with_system else TURNS
    if text is None:
        with pytest.raises(ValueError, match="refuses this conversation: it has no place for a system turn"):
            tokenizer.render_chat(messages)
        return
    assert tokenizer.render_chat(messages) == plain(text)
    # A prompt is the beginning of the text with the answer: what is asked later is what was trained on.
    prompt = tokenizer.render_chat(messages[:-1], add_generation_prompt=True)
    assert prompt == plain(text[: text.rindex("[[")])


@pytest.mark.parametrize("name", sorted(set(chat.NAMED) - {"mistral"}))
def test_marks_are_what_the_assistant_says(name: str, folder: Path) -> None:
    rendered = tokenizers.load(folder).with_chat_template(name).render_answers(TURNS)
    said = [part.partition("]]")[0] for part in (expected(name) or "").split("[[")[1:]]
    assert [rendered.text[start:end] for start, end in rendered.answers or []] == said
    assert len(said) == 2


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        *[(name, messages) for name in chat.NAMED for messages in (TURNS, TURNS[:3])],
        *[(name, SYSTEM) for name in chat.NAMED if name != "gemma"],
        ("qwen", CALLS),
        ("mistral", CALLS),
    ],
)
def test_named_templates_are_rendered_and_marked_as_by_transformers(
    name: str, messages: list[dict[str, Any]], folder: Path
) -> None:
    tokenizer = tokenizers.load(folder).with_chat_template(name)
    tools = TOOLS if messages is CALLS else None
    settings = {"chat_template": chat.read(name), "tools": tools}
    text, answers = tokenizer.render_answers(messages, tools=tools)
    assert text == oracle(folder).apply_chat_template(messages, tokenize=False, **settings)
    if answers is None:
        assert name == "mistral"
        return
    found = oracle(folder).apply_chat_template(messages, return_assistant_tokens_mask=True, **settings)
    borders = [0, *[border for answer in answers for border in answer], len(text)]
    parts = [text[start:end] for start, end in pairwise(borders)]
    groups = tokenizer.encode_parts(parts, [i % 2 == 1 for i in range(len(parts))])
    assert [id for ids in groups for id in ids] == found["input_ids"]
    assert [i % 2 for i, ids in enumerate(groups) for _ in ids] == found["assistant_masks"]


def test_mistral_with_tools(folder: Path) -> None:
    """As in the samples of mistral-common: tools before the last question, results as json."""
    tokenizer = tokenizers.load(folder).with_chat_template("mistral")
    first = f"{BOS}[INST] Hi![/INST] Yes?{EOS}"
    calls = (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}, "id": "a23456789"}, '
        f'{{"name": "weather", "arguments": {{}}, "id": "b23456789"}}]{EOS}'
    )
    results = (
        '[TOOL_RESULTS] {"content": "sun", "call_id": "a23456789"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": {"rain": true}, "call_id": "b23456789"}[/TOOL_RESULTS]'
    )
    tools = f"[AVAILABLE_TOOLS] {json.dumps(TOOLS, ensure_ascii=False)}[/AVAILABLE_TOOLS]"
    hello = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Yes?"}]
    assert (
        tokenizer.render_chat([*hello, *CALLS], tools=TOOLS)
        == f"{first}{tools}[INST] Rain?[/INST]{calls}{results} No.{EOS}"
    )
    for content, written in [("22", "22"), ("-1.5e3", "-1.5e3"), ("true", "true"), ("22 °C", '"22 °C"'), ("", '""')]:
        message = {"role": "tool", "tool_call_id": "a23456789", "content": content}
        text = tokenizer.render_chat([*CALLS[:2], message])
        assert text.endswith(f'[TOOL_RESULTS] {{"content": {written}, "call_id": "a23456789"}}[/TOOL_RESULTS]')


def test_qwen_with_tools(folder: Path) -> None:
    text = tokenizers.load(folder).with_chat_template("qwen").render_chat(CALLS, tools=TOOLS)
    assert f"<tools>\n{json.dumps(TOOLS[0], ensure_ascii=False)}\n</tools>" in text
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response>\n"
        '<tool_response>\n{"rain": true}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\nNo.<|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["gemma", "llama2", "mistral", "mistral_v1"])
@pytest.mark.parametrize("messages", [TURNS[1:], [TURNS[0], *TURNS], [*TURNS[:2], TURNS[1]]])
def test_roles_in_the_wrong_order(name: str, messages: list[dict[str, Any]], folder: Path) -> None:
    with pytest.raises(ValueError, match=r"refuses this conversation: .*must alternate, beginning with the user"):
        tokenizers.load(folder).with_chat_template(name).render_chat(messages)


@pytest.mark.parametrize("name", sorted(set(chat.NAMED) - {"mistral", "qwen"}))
def test_what_a_template_has_no_place_for_is_not_left_out(name: str, folder: Path) -> None:
    tokenizer = tokenizers.load(folder).with_chat_template(name)
    with pytest.raises(ValueError, match="no place for tools, and 1 are given"):
        tokenizer.render_chat(TURNS, tools=TOOLS)
    with pytest.raises(ValueError, match="no place for tool calls"):
        tokenizer.render_chat(CALLS)


def test_a_named_template_without_its_tokens_is_refused(tmp_path: Path) -> None:
    qwen = tokenizers.load(folders.qwen(tmp_path / "qwen"))
    with pytest.raises(ValueError, match=r"the chat template phi3 writes <\|system\|>, .* no such special token"):
        qwen.with_chat_template("phi3")
    with pytest.raises(ValueError, match="the chat template llama2 writes bos_token,"):
        qwen.with_chat_template("llama2")
    assert qwen.with_chat_template("chatml").render_chat(TURNS) == plain(expected("chatml") or "")
    llama2 = tokenizers.load(folders.llama2(tmp_path / "llama2"))
    for name in sorted(set(chat.NAMED) - {"llama2", "mistral_v1"}):
        with pytest.raises(ValueError, match=f"the chat template {name} writes"):
            llama2.with_chat_template(name)


def test_a_template_in_a_file(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(folders.qwen(tmp_path / "t"))
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}")
    assert tokenizer.with_chat_template(str(path)).render_chat(TURNS[:1]) == "user: What is 12 + 30?<|im_end|>\n"
    assert tokenizer.render_chat(TURNS[:1]).startswith("<|im_start|>user\n"), "the tokenizer itself is as it was"
    path.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content + '<|end|>' }}{% endfor %}")
    with pytest.warns(UserWarning, match=r"mine.jinja writes <\|end\|>, which the tokenizer in .* does not have"):
        tokenizer.with_chat_template(str(path))
    path.write_text("{% for %}")
    with pytest.raises(ValueError, match="not valid jinja: line 1"):
        tokenizer.with_chat_template(str(path))
    with pytest.raises(ValueError, match="the chat template alpaca is neither a file nor one of chatml, gemma, llama2"):
        tokenizer.with_chat_template("alpaca")


def test_a_named_template_replaces_the_one_for_tools(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    tokenizer = tokenizers.load(folders.qwen(tmp_path, chat_template=templates))
    assert "<tools>" in tokenizer.with_chat_template("qwen").render_chat(TURNS, tools=TOOLS)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("a{% generation %}{% endgeneration %}b", [""]),
        ("a{%- generation -%} x {%- endgeneration -%} b", ["x"]),
        ("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}-{% endfor %}", ["user", "assistant"]),
        ("{% if false %}{% generation %}x{% endgeneration %}{% endif %}", []),
        # Written later than it is met: where it stands is not known, and turns are found by rendering.
        ("{% set x %}b{% generation %}x{% endgeneration %}{% endset %}aa{{ x }}", None),
    ],
)
def test_marks(template: str, answers: list[str] | None, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(folders.qwen(tmp_path, chat_template=template))
    text, found = tokenizer.render_answers(TURNS[:2])
    assert (None if found is None else [text[start:end] for start, end in found]) == answers
    assert text == oracle(tmp_path).apply_chat_template(TURNS[:2], tokenize=False)


def test_a_token_that_takes_a_line_break_along_belongs_to_the_answer(tmp_path: Path) -> None:
    """Phi-3's <|end|> strips what is on its right, so that it ends behind the mark."""
    end = {"content": "<|end|>", "special": True, "rstrip": True, "lstrip": False, "normalized": False}
    more = [token for token in chat.NAMED["phi3"] if token != "<|end|>"]
    settings: dict[str, Any] = {"added_tokens_decoder": {"503": end}, "additional_special_tokens": more}
    folder = folders.qwen(tmp_path, chat_template=chat.read("phi3"), **settings)
    tokenizer = tokenizers.load(folder)
    text, answers = tokenizer.render_answers(TURNS[:2])
    ((start, stop),) = answers or []
    groups = tokenizer.encode_parts([text[:start], text[start:stop], text[stop:]], [False, True, False])
    assert tokenizer.decode(groups[1], skip_special_tokens=False) == "42<|end|>"
    expected = oracle(folder).apply_chat_template(TURNS[:2], return_assistant_tokens_mask=True)
    assert [id for group in groups for id in group] == expected["input_ids"]
    assert expected["assistant_masks"] == [0] * len(groups[0]) + [1] * len(groups[1]) + [0] * len(groups[2])


def test_every_named_template_is_a_file_of_the_package() -> None:
    assert sorted(path.stem for path in Path(chat.__file__).parent.glob("templates/*")) == sorted(chat.NAMED)
