"""The settings of a data set."""

from dataclasses import dataclass
from typing import Literal

from kdtune.config import setting


@dataclass
class SourceConfig:
    """Where rows are, and what becomes of them."""

    source: str | None = setting(None, path=True)  # file, folder (docs/data.md has the kinds) or owner/name on the hub
    format: Literal["instruct", "chat", "completion", "text", "tokens"] = "instruct"  # what the rows are
    split: str | None = None  # split, part of it, or both: test, train[:90%], [90%:], [:1000]; null: train, all of it
    name: str | None = None  # subset (configuration) of a hub data set; null: its default one
    column_map: dict[str, str] = setting({})  # the format's column -> the column in the rows, e.g. {output: answer}
    prompt_template: str | None = None  # instruct: text before the answer, with {columns}; null: Alpaca's
    chat_template: str | None = setting(
        None, path=True
    )  # chat: chatml, gemma, llama2, ..., or a .jinja file; null: the tokenizer's own
    train_on_input: bool = False  # label the prompt, or every turn of a chat, too
    train_on_last_turn: bool = False  # chat: label the assistant's last turn only
    separator: str | None = None  # text files: each part between two of these is a document; null: the whole file is
    too_long: Literal["truncate", "split", "drop"] | None = None  # rows above max_seq_len; null: split text, cut others
    join_documents: bool = False  # text and tokens: one after the other, cut into full rows; false: each by itself
    on_error: Literal["raise", "skip"] = "raise"  # a row that cannot be used: stop and say where, or skip and count it
    num_workers: int = setting(0, ge=0)  # processes that tokenise; 0: this one
    cache_dir: str | None = setting(None, path=True)  # folder to keep the tokenised rows in; null: in memory only
    document_end_id: int | None = setting(None, ge=0)  # .npy, .bin: the id that ends a document; null: the eos token
    token_dtype: Literal["uint16", "int32", "uint32", "int64"] | None = None  # .bin without .idx: how ids are stored


@dataclass
class WeightedSourceConfig(SourceConfig):
    """One of several sources."""

    # of its draws, relative to the others'; null for all: as many as it has; dataset_val has no weights
    weight: float | None = setting(None, gt=0)


@dataclass
class DatasetConfig(SourceConfig):
    """A data set: a source, or several that are blended."""

    sources: dict[str, WeightedSourceConfig] = setting({})  # several sources by names of one's own, instead of source
    packed: bool = False  # several documents in a row of tokenizer.max_seq_len, none of which sees another
    group_by_length: bool | None = None  # rows of similar length in a step: less padding; null: if not packed, no blend
    # tokenise rows as training asks for them, for max_steps steps; false, as dataset_val needs it: all before the run
    streaming: bool = False
    # streaming: examples among which the next one is chosen at random; null: 10,000
    shuffle_buffer: int | None = setting(None, gt=0)

    @property
    def has_chats(self) -> bool:
        """Whether it or one of its sources is of chats, so that the model is asked with their template."""
        return any(source.format == "chat" for source in (self.sources.values() or [self]))
