"""Measure the way from rows to batches: tokens a second, and how many of a batch's positions are tokens.

    python tests/benchmarks/data.py
    python tests/benchmarks/data.py --datasets gsm8k.yaml chats.yaml --tokenizers checkpoints/a checkpoints/b
    python tests/benchmarks/data.py --max-seq-len 4096 --batch-size 8 --examples 20000

Two tables. The first is of the whole way, from the files to the last packed batch of an epoch, tokenised by the process
itself and by others, for each data set with each tokenizer: a YAML file has the settings of a recipe's `dataset`; what
is embedded, GSM8K with the quickstart's tokenizer, is taken where none is named.

The second is of batches alone, beside other tools, from tokens in memory. Two sets of lengths: GSM8K's, of the embedded
rows, and those of chats, drawn: half below 500 tokens, one in twenty cut at 2,048.

Some two minutes on two cores with all peers.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Answer, Variant

import kdtune
from kdtune import config, data, tokenizers
from kdtune.data import DatasetConfig, Examples
from kdtune.tokenizers import Tokenizer

ASSETS = Path(kdtune.__file__).parent / "assets" / "quickstart"
GSM8K = DatasetConfig(
    source=str(ASSETS / "train.jsonl.gz"),
    column_map={"output": "answer"},
    prompt_template="Question: {question}\nAnswer:\n",
)


def from_rows(settings: argparse.Namespace, num_workers: int) -> Callable[[], Answer]:
    """Seconds of tokenising, on the clock and of processors, and of the whole way, for each set and tokenizer."""
    inputs = list(pairs(settings))

    def measure() -> Answer:
        answer: Answer = {}
        for name, cfg, tokenizer in inputs:
            start, before = time.perf_counter(), os.times()
            examples = data.load(replace(cfg, num_workers=num_workers), tokenizer, settings.max_seq_len)
            answer[f"{name} tokenising"], after = time.perf_counter() - start, os.times()
            answer[f"{name} own"] = after.user + after.system - before.user - before.system
            answer[f"{name} workers"] = (
                after.children_user + after.children_system - before.children_user - before.children_system
            )
            computed = sum(tokens.numel() for tokens in ours(settings, examples, packed=True))
            answer[f"{name} seconds"] = time.perf_counter() - start
            answer[f"{name} tokens"] = examples.num_tokens
            answer[f"{name} packed"] = examples.num_tokens / computed
            for how in ("grouped", "random"):
                computed = sum(tokens.numel() for tokens in ours(settings, examples, group_by_length=how == "grouped"))
                answer[f"{name} {how}"] = examples.num_tokens / computed
        return answer

    return measure


def pairs(settings: argparse.Namespace) -> Iterator[tuple[str, DatasetConfig, Tokenizer]]:
    """Each data set with each tokenizer, and a name for the two."""
    sets = {path.stem: config.load(DatasetConfig, path, []) for path in settings.datasets}
    sets = sets or {"GSM8K": replace(GSM8K, split=f"[:{settings.examples}]")}
    for folder in settings.tokenizers or [ASSETS / "teacher"]:
        tokenizer = tokenizers.load(folder)
        for name, cfg in sets.items():
            yield f"{name}, {folder.name if settings.tokenizers else 'quickstart'}", cfg, tokenizer


@cache
def gsm8k(max_seq_len: int, count: int) -> Examples:
    return data.load(replace(GSM8K, split=f"[:{count}]"), tokenizers.load(ASSETS / "teacher"), max_seq_len)


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


FROM_ROWS = {
    "here": Variant("this process", partial(from_rows, num_workers=0)),
    "workers": Variant("2 workers", partial(from_rows, num_workers=2)),
}
FROM_TOKENS = {
    "padded": variant("kdtune, group_by_length=false", partial(ours, group_by_length=False)),
    "grouped": variant("kdtune", ours),
    "packed": variant("kdtune, packed=true", partial(ours, packed=True)),
    "trl": variant("TRL", partial(trl, packed=False), peer=True),
    "trl-packed": variant("TRL, packed (bfd, without padding)", partial(trl, packed=True), peer=True),
    "torchtune": variant("torchtune", partial(torchtune, packed=False), peer=True),
    "torchtune-packed": variant("torchtune, packed", partial(torchtune, packed=True), peer=True),
}
VARIANTS = FROM_ROWS | FROM_TOKENS


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=3, has_models=False)
    parser.add_argument("--datasets", type=Path, nargs="+", default=[], metavar="FILE", help="of the first table")
    parser.add_argument("--tokenizers", type=Path, nargs="+", default=[], metavar="FOLDER", help="of the first table")
    parser.add_argument("--max-seq-len", type=int, default=2048, help="positions of a packed row, and of the longest")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch; a step has one batch")
    parser.add_argument("--examples", type=int, default=7473, help="of GSM8K, which has no more, and of chats")
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings))
    print(f"rows of {settings.max_seq_len:,}, batches of {settings.batch_size}, {settings.rounds} rounds\n")
    answers = harness.run(settings, VARIANTS)
    print_from_rows({name: answers[name] for name in FROM_ROWS if name in answers})
    print_from_tokens({name: answers[name] for name in FROM_TOKENS if name in answers})


def print_from_rows(answers: dict[str, list[Answer]]) -> None:
    if not answers:
        return
    first, *others = answers.values()
    rows = []
    for name in [key.removesuffix(" tokens") for key in first[0] if key.endswith(" tokens")]:
        tokens = first[0][f"{name} tokens"] / 1e6
        rows.append([name, f"{tokens:.2f}"])
        for found in answers.values():
            rows[-1].append(f"{tokens / harness.median(found, f'{name} seconds'):.2f}")
            own, workers = (harness.median(found, f"{name} {who}") for who in ("own", "workers"))
            rows[-1].append(f"{own:.2f}" + (f" + {workers:.2f}" if workers else ""))
        rows[-1] += [f"{harness.ratio(first, found, f'{name} tokenising'):.2f}" for found in others]
        rows[-1] += [f"{first[0][f'{name} {how}']:.1%}" for how in ("packed", "grouped", "random")]
    rates = [cell for name in answers for cell in (f"millions/s, {FROM_ROWS[name].title}", "CPU-s of tokenising")]
    ratios = ["s of tokenising, ratio"] * len(others)
    harness.print_table(["", "million tokens", *rates, *ratios, "packed", "grouped", "random order"], rows)
    print()


def print_from_tokens(answers: dict[str, list[Answer]]) -> None:
    if not answers:
        return
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
