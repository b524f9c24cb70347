"""torchtune's data set builders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdtune.conversion.given import Converted, Given

# The turns that a tokenizer of torchtune's puts around a question, by the module that it is in.
_TURNS = {
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    **dict.fromkeys(("qwen2", "qwen2_5", "qwen3"), "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
    **dict.fromkeys(("llama2", "mistral"), "[INST] {} [/INST]"),
}
# Alpaca's prompt for rows without an input, which stands where there is an empty line.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n{input}\n### Response:\n"
)


@dataclass(frozen=True)
class _Builder:
    """What a builder stands for, and its defaults."""

    form: Literal["alpaca", "pairs", "chat", "text"]
    source: str | None = None
    name: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


_BUILDERS = {
    "alpaca_dataset": _Builder("alpaca", "tatsu-lab/alpaca"),
    "alpaca_cleaned_dataset": _Builder("alpaca", "yahma/alpaca-cleaned"),
    "instruct_dataset": _Builder("pairs"),
    "grammar_dataset": _Builder("pairs", "liweili/c4_200m"),
    "samsum_dataset": _Builder("pairs", "Samsung/samsum", columns={"input": "dialogue", "output": "summary"}),
    "chat_dataset": _Builder("chat"),
    "slimorca_dataset": _Builder("chat", "Open-Orca/SlimOrca-Dedup"),
    "text_completion_dataset": _Builder("text"),
    "wikitext_dataset": _Builder(
        "text", "EleutherAI/wikitext_document_level", "wikitext-103-v1", columns={"text": "page"}
    ),
    "cnn_dailymail_articles_dataset": _Builder("text", "ccdv/cnn_dailymail", "3.0.0", columns={"text": "article"}),
}


def convert_dataset(rows: Any, result: Converted, turns: str, section: str = "dataset") -> None:
    """The section of that name, and `tokenizer.max_seq_len` if a builder alone has a length.

    Args:
        rows: what is given: a builder with its arguments, or a list of such.
        result: is added to.
        turns: the module of torchtune's tokenizer, which knows the turns that questions are put into.
    """
    packed = []
    for number, one in enumerate(rows if isinstance(rows, list) else [rows], 1):
        theirs = f"{section}.{number - 1}." if isinstance(rows, list) else f"{section}."
        ours = f"{section}.sources.rows_{number}." if isinstance(rows, list) else f"{section}."
        given = Given(one if isinstance(one, Mapping) else {}, result, theirs)
        if not isinstance(one, Mapping):
            result.wanted.append(f"{ours}source")
            given.note("lost", "_component_", one, "it names no builder of torchtune's.")
            continue
        packed.append(bool(given.take("packed", False)))
        _convert_one(given, ours, turns)
        if "tokenizer.max_seq_len" not in result.settings:
            given.copy("max_seq_len", "tokenizer.max_seq_len")
        given.tell(
            "different", "max_seq_len", "rows are cut to tokenizer.max_seq_len, whatever data set they are from."
        )
        given.close()
    if packed:
        result.settings[f"{section}.packed"] = any(packed)
    if len(set(packed)) > 1:
        why = "some of the data sets are packed there; here all of a blend are, or none."
        result.notes.append(("different", f"{section}.packed={packed}", why))


def _convert_one(given: Given, ours: str, turns: str) -> None:
    settings = given.result.settings
    path = given.take("_component_")
    builder = _BUILDERS.get(str(path).rpartition(".")[2])
    if builder is None:
        why = "kdtune reads rows by dataset.source and dataset.format (instruct, chat, completion, text, tokens)."
        given.note("lost", "_component_", path, why)
        builder = _Builder("pairs")
    _source(given, ours, builder)
    settings[f"{ours}format"] = {"alpaca": "instruct", "pairs": "instruct"}.get(builder.form, builder.form)
    columns = _columns(given, builder)
    if renamed := {name: column for name, column in columns.items() if name != column}:
        settings[f"{ours}column_map"] = renamed
    around = _TURNS.get(turns, "{}")
    if builder.form == "pairs":
        settings[f"{ours}prompt_template"] = around.format("{input}")
    elif builder.form == "alpaca" and around != "{}":  # without turns kdtune's default is Alpaca's prompt
        settings[f"{ours}prompt_template"] = around.format(_ALPACA)
        why = (
            "its prompt is put into the turns of torchtune's tokenizer. Alpaca has another wording for rows with an "
            "input; here the input follows the instruction, since a template is one text."
        )
        given.note("different", "_component_", path, why)
    elif builder.form == "chat":
        why = "chats are written by the chat template of the student's tokenizer; dataset.chat_template names another."
        given.note("different", "_component_", path, why)
    _masking(given, ours, builder)
    if not given.peek("split_across_pack"):
        given.tell("unneeded", "split_across_pack", "a row that does not fit begins the next one here, too.")
    for name in ("filter_fn", "new_system_prompt"):
        if given.peek(name) is None:
            given.tell("unneeded", name, "there is none.")
    where = "add a turn of the system's to the rows" if builder.form == "chat" else "write it into prompt_template"
    given.tell("lost", "new_system_prompt", f"kdtune has no such setting: {where}.")


def _columns(given: Given, builder: _Builder) -> dict[str, Any]:
    """kdtune's name of a column -> the column in the rows."""
    columns: dict[str, Any] = dict(builder.columns)
    if isinstance(given.peek("column_map"), Mapping):
        columns |= given.take("column_map")
    elif given.peek("column_map") is None:
        given.tell("unneeded", "column_map", "there is none.")
    if builder.form == "text":
        columns = {"text": given.take("column") or columns.get("text", "text")}
        for name in ("add_bos", "add_eos"):
            if given.peek(name) is not False:
                given.tell("unneeded", name, "the tokenizer's bos is added if it has one, and eos always.")
    elif builder.form == "chat":
        given.tell("unneeded", "conversation_style", "both styles are told from each other by their keys.")
        column = given.take("conversation_column") or columns.get("conversations") or columns.get("messages")
        columns = {"messages": column} if column not in (None, "conversations") else {}
    return columns


def _source(given: Given, ours: str, builder: _Builder) -> None:
    """Where the rows are: datasets.load_dataset's path, or its data_files."""
    settings = given.result.settings
    split = given.take("split", "train")
    if "data_files" in given:
        split = str(split).removeprefix("train")
        given.tell("unneeded", "source", "data_files names the file, whose ending says what it is.")
    source = given.take("data_files", given.take("source", builder.source))
    if isinstance(source, str):
        settings[f"{ours}source"] = source
    else:
        given.result.wanted.append(f"{ours}source")
        if source is not None:
            given.note("lost", "source", source, "it is one file or folder here; several are dataset.sources.")
    name = given.take("name", given.take("subset", builder.name))
    if name is not None:
        settings[f"{ours}name"] = name
    if split not in ("train", "", None):
        settings[f"{ours}split"] = split


def _masking(given: Given, ours: str, builder: _Builder) -> None:
    """Which tokens have labels."""
    settings = given.result.settings
    if builder.form == "text":
        return
    strategy = given.take("masking_strategy")
    on_input = given.take("train_on_input")
    if strategy is None:
        on_input = builder.form == "alpaca" if on_input is None else on_input
    else:
        on_input = strategy == "train_on_all"
        if strategy == "train_on_last" and builder.form == "chat":
            settings[f"{ours}train_on_last_turn"] = True
    settings[f"{ours}train_on_input"] = on_input
