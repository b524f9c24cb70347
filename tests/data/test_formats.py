"""Labels, token by token, for every format; truncation and dropped rows; rows of the wrong shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders as folders

from kdtune import data, tokenizers
from kdtune.data import IGNORE, DatasetConfig
from kdtune.data.formats import ALPACA, ALPACA_WITH_INPUT

pytestmark = pytest.mark.filterwarnings("ignore:.*of its rows")  # sets of a few odd ones

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "Yes, it is."},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
    for turn in TURNS
]


@pytest.fixture(params=["llama3", "qwen", "llama2", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> tokenizers.Tokenizer:
    return tokenizers.load(getattr(folders, request.param)(tmp_path / "tokenizer"))


@pytest.fixture
def qwen(tmp_path: Path) -> tokenizers.Tokenizer:
    return tokenizers.load(folders.qwen(tmp_path / "tokenizer"))


def load(
    tmp_path: Path, rows: list[Any], tokenizer: tokenizers.Tokenizer, max_seq_len: int = 512, **settings: Any
) -> data.Examples:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    vocab_size = settings.pop("vocab_size", None)
    return data.load(DatasetConfig(source=str(path), **settings), tokenizer, max_seq_len, vocab_size=vocab_size)


def spans(example: tuple[Any, Any], tokenizer: tokenizers.Tokenizer) -> list[tuple[bool, str]]:
    """The text of an example as stretches that are predicted or not, from the inputs and the shifted labels."""
    tokens, labels = (tensor.tolist() for tensor in example)
    assert all(label in (IGNORE, following) for label, following in zip(labels, tokens[1:], strict=False))
    ids = [*tokens, labels[-1]]
    is_label = [False, *(label != IGNORE for label in labels)]
    found: list[tuple[bool, list[int]]] = []
    for id, labelled in zip(ids, is_label, strict=True):
        if not found or found[-1][0] != labelled:
            found.append((labelled, []))
        found[-1][1].append(id)
    return [(labelled, tokenizer.decode(ids, skip_special_tokens=False)) for labelled, ids in found]


def end(tokenizer: tokenizers.Tokenizer) -> str:
    return tokenizer.piece(tokenizer.eos_id)


def begin(tokenizer: tokenizers.Tokenizer) -> str:
    return tokenizer.piece(tokenizer.bos_id) if tokenizer.adds_bos and tokenizer.bos_id is not None else ""


def test_completion_labels(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "What is 12 + 30?\n", "completion": "It's 42"}]
    examples = load(tmp_path, rows, tokenizer, format="completion")
    prompt = tokenizer.encode(rows[0]["prompt"])
    answer = [*tokenizer.encode("It's 42", continues=True), tokenizer.eos_id]
    tokens, labels = examples[0]
    # The last prompt token predicts the first answer token; the last answer token predicts the eos; nothing follows.
    assert tokens.tolist() == (prompt + answer)[:-1]
    assert labels.tolist() == [IGNORE] * (len(prompt) - 1) + answer
    assert (examples.num_tokens, examples.num_labels) == (len(tokens), len(answer))


def test_an_answer_without_a_prompt_begins_once(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    examples = load(tmp_path, [{"prompt": "", "completion": "It's 42"}], tokenizer, format="completion")
    tokens, labels = examples[0]
    expected = [*tokenizer.encode("It's 42"), tokenizer.eos_id]
    assert tokens.tolist() == expected[:-1]
    assert labels.tolist() == expected[1:]


def test_completion_with_labelled_input(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "What?", "completion": " Yes"}]
    tokens, labels = load(tmp_path, rows, tokenizer, format="completion", train_on_input=True)[0]
    assert labels.tolist() == [*tokens[1:].tolist(), tokenizer.eos_id]


def test_alpaca(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add {them}.", "input": "", "output": "42"},
        {"instruction": "Add.", "input": "12 + 30", "output": "42"},
        {"instruction": "Add.", "output": "42"},
    ]
    examples = load(tmp_path, rows, tokenizer)
    prompts = [
        ALPACA.format(instruction="Add {them}."),
        ALPACA_WITH_INPUT.format(instruction="Add.", input="12 + 30"),
        ALPACA.format(instruction="Add."),
    ]
    for i, prompt in enumerate(prompts):
        text = [(False, begin(tokenizer) + prompt), (True, "42" + end(tokenizer))]
        found = spans(examples[i], tokenizer)
        assert [(labelled, part.removeprefix(begin(tokenizer)).lstrip()) for labelled, part in found] == [
            (labelled, part.removeprefix(begin(tokenizer)).lstrip()) for labelled, part in text
        ]


def test_prompt_template(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rows = [{"question": "12 + 30?", "answer": "42", "n": 3}]
    settings = {"prompt_template": "{{Q{n}}}: {question}\nAnswer:", "column_map": {"output": "answer"}}
    examples = load(tmp_path, rows, qwen, **settings)
    assert spans(examples[0], qwen) == [(False, "{Q3}: 12 + 30?\nAnswer:"), (True, "42<|im_end|>")]


def test_column_map(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rows = [{"q": "12 + 30?", "a": "42", "input": "not this"}]
    examples = load(tmp_path, rows, qwen, column_map={"instruction": "q", "input": "none", "output": "a"})
    assert spans(examples[0], qwen)[0] == (False, ALPACA.format(instruction="12 + 30?"))


def test_column_map_reaches_into_the_prompt_template(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rows = [{"q": "12 + 30?", "a": "42"}]
    settings = {"prompt_template": "{instruction}\n", "column_map": {"instruction": "q", "output": "a"}}
    assert spans(load(tmp_path, rows, qwen, **settings)[0], qwen)[0] == (False, "12 + 30?\n")


def test_an_input_of_null_is_none(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rows = [{"instruction": "12 + 30?", "input": None, "output": "42"}]
    assert spans(load(tmp_path, rows, qwen)[0], qwen)[0] == (False, ALPACA.format(instruction="12 + 30?"))


def test_text_is_all_labelled(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("The quick brown fox.")
    examples = data.load(DatasetConfig(source=str(tmp_path / "story.txt"), format="text"), tokenizer, 512)
    tokens, labels = examples[0]
    ids = tokenizer.encode("The quick brown fox.", eos=True)
    assert tokens.tolist() == ids[:-1]
    assert labels.tolist() == ids[1:]


def test_long_documents_are_cut_without_losing_a_token(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    text = " ".join(folders.CORPUS)
    ids = qwen.encode(text, eos=True)
    for max_seq_len in (7, 64, len(ids) - 1, len(ids)):
        examples = load(tmp_path, [{"text": text}], qwen, max_seq_len, format="text")
        inputs, labels = zip(*[examples[i] for i in range(len(examples))], strict=True)
        assert max(map(len, inputs)) <= max_seq_len
        assert [id for row in inputs for id in row.tolist()] == ids[:-1]
        assert [id for row in labels for id in row.tolist()] == ids[1:]
        assert (examples.num_rows, examples.counts.num_truncated) == (1, 0)


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("turns", [TURNS, SHAREGPT])
def test_chat_labels(column: str, turns: list[Any], qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    examples = load(tmp_path, [{"id": 1, column: turns}], qwen, format="chat")
    assert spans(examples[0], qwen) == [
        (
            False,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (True, "42<|im_end|>"),
        (False, "\n<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Yes, it is.<|im_end|>"),
    ]


def test_chat_ids_are_those_of_the_whole_text(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokens, labels = load(tmp_path, [{"messages": TURNS[1:]}], tokenizer, format="chat")[0]
    ids = tokenizer.encode_chat(TURNS[1:])
    assert [*tokens.tolist(), labels[-1].item()] == ids[: len(tokens) + 1]
    answers = [part for labelled, part in spans((tokens, labels), tokenizer) if labelled]
    assert [answer.strip() for answer in answers] == ["42" + end(tokenizer), "Yes, it is." + end(tokenizer)]


def test_the_same_words_in_question_and_answer(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "42<|im_end|>"}, {"role": "assistant", "content": "42"}]
    examples = load(tmp_path, [{"messages": turns}], qwen, format="chat")
    assert [part for labelled, part in spans(examples[0], qwen) if labelled] == ["42<|im_end|>"]


def test_chat_with_labelled_input(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokens, labels = load(tmp_path, [{"messages": TURNS}], qwen, format="chat", train_on_input=True)[0]
    ids = qwen.encode_chat(TURNS)
    assert tokens.tolist() == ids[:-1]
    assert labels.tolist() == ids[1:]


def test_a_template_that_rewrites_earlier_turns_makes_one_example_per_turn(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(folders.qwen(tmp_path / "t", chat_template=folders.CHATML_WITH_REASONING))
    examples = load(tmp_path, [{"messages": TURNS}], tokenizer, format="chat")
    assert (examples.num_rows, len(examples)) == (1, 2)
    assert "2 examples" in examples.summary()
    for i, answer in enumerate(["42", "Yes, it is."]):
        parts = spans(examples[i], tokenizer)
        assert [labelled for labelled, _ in parts] == [False, True]
        assert parts[0][1].endswith("<|im_start|>assistant\n")
        assert parts[1][1] == f"<think></think>\n{answer}<|im_end|>"
    assert "<think>" not in spans(examples[1], tokenizer)[0][1]


def test_a_template_with_todays_date_makes_the_same_examples_every_day(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}\n" + folders.CHATML
    tokenizer = tokenizers.load(folders.qwen(tmp_path / "t", chat_template=template))
    examples = load(tmp_path, [{"messages": TURNS[1:3]}], tokenizer, format="chat")
    assert spans(examples[0], tokenizer)[0][1].startswith("26 Jul 2024\n")
    assert not tokenizer.render_chat(TURNS[1:3]).startswith("26 Jul 2024")


def test_tools_and_tool_calls(tmp_path: Path) -> None:
    template = (
        "{% for t in tools or [] %}tool {{ t.name }}\n{% endfor %}{% for m in messages %}{{ m.role }}: "
        "{{ m.tool_calls | tojson if m.tool_calls else m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tokenizers.load(folders.qwen(tmp_path / "t", chat_template=template))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]}
    row = {"messages": [TURNS[1], call, {"role": "function", "content": "sun"}, TURNS[2]], "tools": '[{"name": "w"}]'}
    examples = load(tmp_path, [row], tokenizer, format="chat")
    assert spans(examples[0], tokenizer) == [
        (False, "tool w\nuser: What is 12 + 30?<|im_end|>assistant: "),
        (True, '[{"name": "weather"}]<|im_end|>'),
        (False, "tool: sun<|im_end|>assistant: "),
        (True, "42<|im_end|>"),
    ]


def test_text_in_parts_is_joined(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    turns = [TURNS[1], {"role": "assistant", "content": parts}]
    joined = load(tmp_path, [{"messages": turns}], qwen, format="chat")
    plain = load(tmp_path, [{"messages": TURNS[1:3]}], qwen, format="chat")
    assert joined.fingerprint == plain.fingerprint


def test_truncated_and_dropped_rows_are_counted(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    row = {"prompt": "the dog " * 5, "completion": "does not mind it"}
    prompt = len(qwen.encode(row["prompt"]))
    answer = len(qwen.encode(row["completion"], continues=True)) + 1
    rows = [row, {"prompt": "the", "completion": ""}, {"prompt": "", "completion": "fox"}]
    # The positions of the first row: its last token is predicted but is not an input.
    whole = prompt + answer - 1
    for max_seq_len, truncated, lost in [
        (whole, 0, 0),
        (whole - 1, 1, 0),
        (prompt, 1, 0),
        (prompt - 1, 0, 1),
    ]:
        examples = load(tmp_path, rows, qwen, max_seq_len, format="completion", on_error="skip")
        counts = examples.counts
        assert (counts.num_rows, counts.num_truncated, counts.num_prompt_too_long) == (3, truncated, lost)
        assert examples.counts.skipped == {"empty answer": 1}
        assert examples.lengths.max() <= max_seq_len
        if max_seq_len == prompt:
            assert examples[0][1].tolist() == [IGNORE] * (prompt - 1) + qwen.encode("does", continues=True)[:1]
    assert ", 2 rows lost (1 prompt alone longer than max_seq_len, 1 empty answer; the first" in examples.summary()
    with pytest.raises(ValueError, match=r"row 2 of .* there is no answer, .*dataset\.on_error=skip"):
        load(tmp_path, rows, qwen, format="completion")


def test_nothing_left(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    row = {"prompt": "the dog " * 5, "completion": "fox"}
    with pytest.raises(
        ValueError, match=r"the 2 rows of .* have nothing to train on: 2 are without .*tokenizer\.max_seq_len=4"
    ):
        load(tmp_path, [row, row], qwen, 4, format="completion")
    with pytest.raises(ValueError, match="has no rows"):
        load(tmp_path, [], qwen)
    with pytest.raises(ValueError, match=r"has no rows in dataset\.split=\[5:\]"):
        load(tmp_path, [row], qwen, split="[5:]")


def test_ids_outside_the_models_vocabulary(qwen: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    load(tmp_path, rows, qwen, format="completion", vocab_size=qwen.vocab_size)
    with pytest.raises(ValueError, match=r"row 1 of .*'<\|im_end\|>' with id 502, but the models have 502 ids"):
        load(tmp_path, rows, qwen, format="completion", vocab_size=502)


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({}, {"question": "a", "answer": "b"}, r"no column 'instruction'; there are: question, answer.*column_map="),
        ({}, {"instruction": "a"}, r"no column 'output'"),
        ({}, {"instruction": "a", "output": None}, r"column 'output' is null"),
        ({}, {"instruction": "a", "output": ["b"]}, r"column 'output' is a list"),
        ({}, {"prompt": "a", "completion": "b"}, r"no column 'instruction'.*They look like dataset\.format=completion"),
        ({}, {"conversations": []}, r"no column 'instruction'.*They look like dataset\.format=chat"),
        ({}, {"instruction": "a", "output": True}, r"column 'output' is a bool, expected text"),
        ({}, {"instruction": "a", "output": " \n"}, r"there is no answer, or it is empty"),
        ({"format": "completion"}, {"prompt": "a"}, r"no column 'completion'"),
        (
            {"format": "text"},
            {"content": "a"},
            r"no column 'text'; there are: content.*dataset\.column_map={text: <column>}",
        ),
        ({"prompt_template": "{q}"}, {"output": "a"}, r"no column 'q'"),
        ({"format": "chat"}, {"prompt": "a"}, r"no column 'messages'"),
        ({"format": "chat"}, {"messages": []}, r"'messages' is an empty list"),
        ({"format": "chat"}, {"messages": "hi"}, r"'messages' is a str"),
        ({"format": "chat"}, {"messages": ["hi"]}, r"message 1 in 'messages' is a str"),
        ({"format": "chat"}, {"messages": [{"text": "hi"}]}, r"has the keys text, expected role and content"),
        ({"format": "chat"}, {"messages": [{"role": "robot", "content": "hi"}]}, r"unknown role 'robot'"),
        ({"format": "chat"}, {"messages": [{"role": "user", "content": None}]}, r"message 1 .*has no content"),
        ({"format": "chat"}, {"messages": [{"role": "user", "content": 3}]}, r"content of type int"),
        ({"format": "chat"}, {"messages": [{"role": "user", "content": [{"image": 1}]}]}, r"not text"),
        ({"format": "chat"}, {"messages": TURNS, "tools": "["}, r"tools are not valid json"),
    ],
)
def test_rows_of_the_wrong_shape(
    settings: dict[str, Any], row: dict[str, Any], message: str, qwen: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^dataset: row 1 of .*rows\.json: .*{message}"):
        load(tmp_path, [row], qwen, **settings)


def test_roles_that_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(folders.llama2(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"row 1 of .*refuses this conversation: Roles must alternate"):
        load(tmp_path, [{"messages": TURNS}], tokenizer, format="chat")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"column_map": {"answer": "a"}},
            r"dataset\.column_map has 'answer', which dataset\.format=instruct does not read.*instruction, input,",
        ),
        ({"prompt_template": "{a}", "column_map": {"instruction": "b"}}, r"does not read.*the names are a, output"),
        ({"prompt_template": "{a.b}"}, r"{a.b} is not the name of a column"),
        ({"prompt_template": "{}"}, r"not the name"),
        ({"prompt_template": "{a"}, r"prompt_template"),
        (
            {"prompt_template": "{a}", "format": "completion"},
            r"dataset\.prompt_template is for dataset\.format=instruct",
        ),
        ({"train_on_input": True, "format": "text"}, r"train_on_input"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], message: str, qwen: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, [{"instruction": "a", "output": "b"}], qwen, **settings)


def test_tokenizers_that_lack_what_a_format_needs(tmp_path: Path) -> None:
    no_template = tokenizers.load(folders.qwen(tmp_path / "a", chat_template=None))
    with pytest.raises(ValueError, match="no chat template"):
        load(tmp_path, [{"messages": TURNS}], no_template, format="chat")
    no_eos = tokenizers.load(folders.qwen(tmp_path / "b", eos_token=None))
    with pytest.raises(ValueError, match="no eos token"):
        load(tmp_path, [{"text": "a"}], no_eos, format="text")
