"""Train a small byte-level BPE tokenizer on the columns of a JSON-lines file and write it as a Hugging Face folder.

The tokenizer of the embedded quickstart was made by:

    python scripts/train_tokenizer.py kdtune/assets/quickstart/train.jsonl.gz kdtune/assets/quickstart/teacher \\
        --columns question answer --vocab-size 2048
"""

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# Words with their leading space, digits one by one (arithmetic is learned more easily so), runs of other signs.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ 'Answer: ' + message.content + eos_token }}"
    "{% else %}{{ 'Question: ' + message.content + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries, two of them for the begin and the end of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[str]:
    """The text of the columns, row by row."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            row = json.loads(line)
            yield from (row[column] for column in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="JSON lines, perhaps .gz")
    parser.add_argument("folder", type=Path, help="where tokenizer.json and tokenizer_config.json go")
    parser.add_argument("--columns", nargs="+", required=True)
    parser.add_argument("--vocab-size", type=int, default=2048)
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train(read_columns(arguments.data, arguments.columns), arguments.vocab_size)
    tokenizer.save(str(arguments.folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (arguments.folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
