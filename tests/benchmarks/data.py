"""Measure batches alone: how much of them are tokens, and how many tokens a second are packed and put together.

    python tests/benchmarks/data.py
    python tests/benchmarks/data.py --max-seq-len 4096 --batch-size 8 --examples 20000

Two sets of lengths: GSM8K's, of the quickstart's rows and tokenizer, and those of chats, drawn: half below 500 tokens,
one in twenty cut at 2,048. The tokens exist before the clock starts; it stops when each example was in a batch once.
Some two minutes on two cores with all peers.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Answer, Variant

import kdtune
from kdtune import data, tokenizers
from kdtune.data import Examples

ASSETS = Path(kdtune.__file__).parent / "assets" / "quickstart"


@cache
def gsm8k(max_seq_len: int, count: int) -> Examples:
    cfg = data.DatasetConfig(
        source=str(ASSETS / "train.jsonl.gz"),
        split=f"[:{count}]",
        column_map={"output": "answer"},
        prompt_template="Question: {question}\nAnswer:\n",
    )
    return data.load(cfg, tokenizers.load(ASSETS / "teacher"), max_seq_len)


@cache
def chats(max_seq_len: int, count: int) -> Examples:
    lengths = np.random.default_rng(0).lognormal(6.2, 0.9, count).clip(20, max_seq_len).astype(int)
    rows = ([([1] * (length + 1), [False, *[True] * length])] for length in lengths.tolist())
    return Examples.of("chats", max_seq_len, rows)


SETS = {"GSM8K": gsm8k, "chats": chats}


def ours(settings: argparse.Namespace, examples: Examples, **how: Any) -> Iterator[torch.Tensor]:
    loader = data.Loader(examples, batch_size=settings.batch_size, **how)
    while loader.epoch == 0:
        yield from (batch.tokens for batch in loader.next_step())


def shuffled(settings: argparse.Namespace, rows: list[Any]) -> Iterator[list[Any]]:
    """Batches in random order, as a sampler gives them to a collator."""
    order = torch.randperm(len(rows)).tolist()
    for start in range(0, len(rows), settings.batch_size):
        yield [rows[i] for i in order[start : start + settings.batch_size]]


def trl(settings: argparse.Namespace, rows: list[dict[str, list[int]]], packed: bool) -> Iterator[torch.Tensor]:
    import datasets
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    found: Any = datasets.Dataset.from_list(rows)
    if packed:
        found = pack_dataset(found, settings.max_seq_len, "bfd")
    # SFTTrainer packs without padding: a batch is one row.
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    for batch in shuffled(settings, found.with_format(None)):
        yield collate(batch)["input_ids"]


def torchtune(settings: argparse.Namespace, rows: list[dict[str, list[int]]], packed: bool) -> Iterator[torch.Tensor]:
    from torchtune.data import padded_collate_packed, padded_collate_sft
    from torchtune.datasets import PackedDataset

    rows = [{"tokens": row["input_ids"], "labels": row["labels"]} for row in rows]
    found: Any = PackedDataset(rows, max_seq_len=settings.max_seq_len).packs if packed else rows
    collate = padded_collate_packed if packed else padded_collate_sft
    for batch in shuffled(settings, found):
        yield collate(batch)["tokens"]


def variant(title: str, make_batches: Callable[..., Iterator[torch.Tensor]], *, peer: bool = False) -> Variant:
    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        def measure() -> Answer:
            answer: Answer = {}
            for name, load in SETS.items():
                examples = load(settings.max_seq_len, settings.examples)
                source: Any = examples
                if peer:
                    source = [{"input_ids": tokens.tolist(), "labels": labels.tolist()} for tokens, labels in examples]
                start = time.perf_counter()
                computed = sum(tokens.numel() for tokens in make_batches(settings, source))
                seconds = time.perf_counter() - start
                answer[f"{name} share"] = examples.num_tokens / computed
                answer[f"{name} rate"] = examples.num_tokens / seconds
            return answer

        return measure

    return Variant(title, make)


VARIANTS = {
    "padded": variant("kdtune, group_by_length=false", partial(ours, group_by_length=False)),
    "grouped": variant("kdtune", ours),
    "packed": variant("kdtune, packed=true", partial(ours, packed=True)),
    "trl": variant("TRL", partial(trl, packed=False), peer=True),
    "trl-packed": variant("TRL, packed (bfd, without padding)", partial(trl, packed=True), peer=True),
    "torchtune": variant("torchtune", partial(torchtune, packed=False), peer=True),
    "torchtune-packed": variant("torchtune, packed", partial(torchtune, packed=True), peer=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--max-seq-len", type=int, default=2048, help="positions of a packed row, and of the longest")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch; a step has one batch")
    parser.add_argument("--examples", type=int, default=7473, help="of each set; GSM8K has no more")
    harness.add_options(parser, rounds=3)
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings))
    print(f"{settings.examples:,} examples, batches of {settings.batch_size}, {settings.rounds} rounds\n")
    answers = harness.run(settings, VARIANTS)
    rows = []
    for name, found in answers.items():
        row = [VARIANTS[name].title]
        for one in SETS:
            row.append(f"{harness.median(found, f'{one} share'):.1%}")
            row.append(f"{harness.median(found, f'{one} rate') / 1e6:.2f}")
        rows.append(row)
    header = [cell for one in SETS for cell in (f"{one}: tokens of positions", "million tokens/s")]
    harness.print_table(["", *header], rows)


if __name__ == "__main__":
    main()
