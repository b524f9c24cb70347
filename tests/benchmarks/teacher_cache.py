"""Measure what a cached teacher takes on disk and how fast it is written and read, beside the formats of other tools.

    python tests/benchmarks/teacher_cache.py
    python tests/benchmarks/teacher_cache.py --sources 128256 --variants kdtune-8 megatron

Per labelled token, the 64 likeliest tokens in 8, 16 or 32 bits, 12, 50 or 200 draws, or hidden states of width 4,096 in
bf16. The sources are made-up teachers of several vocabularies, by their sizes, and the quickstart's with its validation
rows. A made-up logit is minus the log of the token's frequency rank plus a normal number, whose spread differs from
token to token; ids are in random order, as no tokenizer has them.

Written is from arrays to files, read from files to arrays, in seconds of one core; kdtune's examples are read in random
order with their checksums, the others once from the front. KL is that of the 64 tokens, both sides made to add up to 1,
from the teacher to what is read. Of the others, which need not be installed, formats and settings are done again here:

* NeMo-Aligner (0.7): a line of JSON for each example: logits, which were bf16, their ids, and the log of the sum.
* Megatron-LM (core 0.16): float16 log-probabilities, uint16 ids and a 17th bit; torch.save, then zstd at level 3.
* DistillKit (main of 2025-12): ids of as few bits as the vocabulary needs, in the order of their probability; the
  first log-probability in bf16, and of the others float32 coefficients of 1, i and sqrt(i), by least squares (its
  "budget pick"). What it recommends has 16 in bf16 and three powers more. It keeps 50 and 128 tokens then, here 64.

None of these three has the entropy or the label's log-probability, and the probability of all other tokens is what
rounding leaves of 1 minus a sum.

A minute or two on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Answer, Variant
from torch import Tensor

import kdtune
from kdtune import checkpoint, data, tokenizers
from kdtune.teacher_cache import Card, Hidden, Samples, StoreConfig, Teacher, TeacherCache, TopK, Writer

K, MOST_SAMPLES, HIDDEN_SIZE = 64, 200, 4096
QUICKSTART = Path(kdtune.__file__).parent / "assets" / "quickstart"

Arrays = dict[str, np.ndarray]


class Format(ABC):
    """One way to keep a teacher's answers in a folder."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    @abstractmethod
    def write(self, folder: Path, examples: list[Arrays]) -> None: ...

    @abstractmethod
    def read(self, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
        """Ids and log-probabilities [t, k] of examples; None: of another kind."""


class Ours(Format):
    store = StoreConfig("top_k", top_k=K)

    def write(self, folder: Path, examples: list[Arrays]) -> None:
        hidden = {"size": HIDDEN_SIZE} if self.store.kind == "hidden" else None
        card = Card(self.store, self.vocab_size, Teacher("made up", "0", "fp32"), "0", hidden)
        with Writer(folder, card) as writer:
            for example_id, example in enumerate(examples):
                writer.add(example_id, self.answers(example))

    def answers(self, example: Arrays) -> TopK | Samples | Hidden:
        statistics = {name: example[name] for name in ("entropy", "label_log_probs")}
        return TopK(example["ids"], example["log_probs"], example["log_rest"], **statistics)

    def read(self, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
        cache = TeacherCache(folder)
        for example_id in np.random.default_rng(0).permutation(cache.ids).tolist():
            answers = cache.read(example_id)
            yield (answers.ids, answers.log_probs) if isinstance(answers, TopK) else None


class Ours16(Ours):
    store = StoreConfig("top_k", top_k=K, bits=16)


class Ours32(Ours):
    store = StoreConfig("top_k", top_k=K, bits=32)


class OurSamples(Ours):
    store = StoreConfig(num_samples=200)

    def answers(self, example: Arrays) -> Samples:
        statistics = {name: example[name] for name in ("entropy", "label_log_probs")}
        draws = example["draws"][:, : self.store.num_samples]
        return Samples.from_draws(draws, None, top_ids=example["ids"][:, 0], **statistics)


class OurSamples50(OurSamples):
    store = StoreConfig(num_samples=50)


class OurSamples12(OurSamples):
    store = StoreConfig(num_samples=12)


class OurHidden(Ours):
    store = StoreConfig(kind="hidden")

    def answers(self, example: Arrays) -> Hidden:
        return Hidden(np.zeros((len(example["ids"]), HIDDEN_SIZE), np.uint16), "bf16")


class NeMoAligner(Format):
    def write(self, folder: Path, examples: list[Arrays]) -> None:
        with open(folder / "train_0.jsonl", "w") as file:
            for example in examples:
                logits = torch.from_numpy(example["logits"]).bfloat16().float()
                row = {
                    "topk_logits": logits.tolist(),
                    "topk_token_ids": example["ids"].tolist(),
                    "log_sum_exp_logits": example["log_sums"].tolist(),
                }
                file.write(json.dumps(row) + "\n")

    def read(self, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with open(folder / "train_0.jsonl") as file:
            for line in file:
                row = json.loads(line)
                logits, log_sums = (np.array(row[name], np.float32) for name in ("topk_logits", "log_sum_exp_logits"))
                yield np.array(row["topk_token_ids"]), logits - log_sums[:, None]


class Megatron(Format):
    def write(self, folder: Path, examples: list[Arrays]) -> None:
        if self.vocab_size > 2**17:
            raise ValueError("Megatron-LM has no more than 17 bits for an id")
        ids, log_probs = (np.concatenate([example[name] for example in examples]) for name in ("ids", "log_probs"))
        low, high = (ids & 0xFFFF).astype(np.uint16), ids >> 16 != 0
        tensors = map(torch.from_numpy, (log_probs.astype(np.float16), low, high))
        buffer = BytesIO()
        torch.save(dict(zip(("values", "indices_low", "bit_17"), tensors, strict=True)), buffer)
        import pyarrow

        size = str(buffer.tell()).zfill(12).encode()
        (folder / "0.pt.zst").write_bytes(size + pyarrow.Codec("zstd", 3).compress(buffer.getvalue(), asbytes=True))

    def read(self, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        import pyarrow

        content = (folder / "0.pt.zst").read_bytes()
        plain = pyarrow.Codec("zstd", 3).decompress(content[12:], int(content[:12]), asbytes=True)
        found = torch.load(BytesIO(plain))
        yield (
            found["indices_low"].int().numpy() + found["bit_17"].int().numpy() * 2**16,
            found["values"].float().numpy(),
        )


class DistillKit(Format):
    num_exact = 1
    powers: tuple[float, ...] = (0, 1, 0.5)

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.bits = math.ceil(math.log2(vocab_size))
        self.terms = np.arange(K - self.num_exact, dtype=np.float64)[:, None] ** self.powers
        self.fit = np.linalg.pinv(self.terms)

    def write(self, folder: Path, examples: list[Arrays]) -> None:
        with open(folder / "rows.bin", "wb") as file:
            for example in examples:
                bits = (example["ids"][:, :, None] >> np.arange(self.bits) & 1).astype(np.uint8)
                ids = np.packbits(bits.reshape(len(bits), -1), 1)
                exact, rest = np.split(example["log_probs"], [self.num_exact], 1)
                rounded = torch.from_numpy(np.ascontiguousarray(exact)).bfloat16().view(torch.uint8).numpy()
                terms = (rest @ self.fit.T).astype(np.float32)
                file.write(np.concatenate([ids, rounded, terms.view(np.uint8)], 1).tobytes())

    def read(self, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        sizes = [-(-K * self.bits // 8), 2 * self.num_exact, 4 * len(self.powers)]
        rows = np.fromfile(folder / "rows.bin", np.uint8).reshape(-1, sum(sizes))
        ids, rounded, terms = map(np.ascontiguousarray, np.split(rows, np.cumsum(sizes)[:-1], 1))
        bits = np.unpackbits(ids, 1, K * self.bits).reshape(len(rows), K, self.bits)
        exact = torch.from_numpy(rounded).view(torch.bfloat16).float().numpy()
        rest = (terms.view(np.float32) @ self.terms.T).astype(np.float32)
        yield bits @ (1 << np.arange(self.bits, dtype=np.int32)), np.concatenate([exact, rest], 1)


class DistillKitMore(DistillKit):
    num_exact = 16
    powers = (0, 1, 2, 3, 4, 0.5)


FORMATS: dict[str, tuple[str, type[Format]]] = {
    "kdtune-8": ("kdtune, 8 bits", Ours),
    "kdtune-16": ("kdtune, 16 bits", Ours16),
    "kdtune-32": ("kdtune, 32 bits", Ours32),
    "kdtune-200": ("kdtune, 200 draws", OurSamples),
    "kdtune-50": ("kdtune, 50 draws", OurSamples50),
    "kdtune-12": ("kdtune, 12 draws", OurSamples12),
    "kdtune-hidden": ("kdtune, hidden states", OurHidden),
    "distillkit": ("DistillKit, 1 exact", DistillKit),
    "distillkit-16": ("DistillKit, 16 exact", DistillKitMore),
    "megatron": ("Megatron-LM", Megatron),
    "nemo-aligner": ("NeMo-Aligner", NeMoAligner),
}


def variant(title: str, kind: type[Format]) -> Variant:
    def start(settings: argparse.Namespace) -> Callable[[], Answer]:
        sources = {path.stem: load(path) for path in sorted(Path(settings.data).iterdir())}

        def measure() -> Answer:
            found: Answer = {}
            for source, (vocab_size, examples) in sources.items():
                found |= {
                    f"{source} {name}": value for name, value in measure_format(kind(vocab_size), examples).items()
                }
            return found

        return measure

    return Variant(title, start)


def measure_format(form: Format, examples: list[Arrays]) -> Answer:
    folder = Path(tempfile.mkdtemp())
    num_tokens = sum(len(example["ids"]) for example in examples)
    try:
        before = time.process_time()
        form.write(folder, examples)
        written = time.process_time()
        read = [part for part in form.read(folder) if part is not None]
        ended = time.process_time()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "card.json")
    except ValueError:  # a vocabulary that the format cannot have
        return {}
    finally:
        shutil.rmtree(folder)
    found = {
        "bytes": size / num_tokens,
        "write": num_tokens / (written - before),
        "read": num_tokens / (ended - written),
    }
    return {**found, "kl": divergence(read, examples)} if read else found


def divergence(read: list[tuple[np.ndarray, np.ndarray]], examples: list[Arrays]) -> float:
    """The mean over tokens. Examples come in another order, or all at once: a row is found by its ids."""

    def rows(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        ids, log_probs = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = ids.argsort(1)
        ids, log_probs = np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1).astype(np.float64)
        log_probs -= np.log(np.exp(log_probs).sum(1, keepdims=True))
        return log_probs[np.lexsort(ids.T)]

    teacher = rows([(example["ids"], example["log_probs"]) for example in examples])
    return float((np.exp(teacher) * (teacher - rows(read))).sum(1).mean())


# Teachers.


def save(path: Path, vocab_size: int, examples: list[Arrays]) -> None:
    sizes = np.array([len(example["ids"]) for example in examples])
    columns = {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}
    np.savez(path, vocab_size=vocab_size, sizes=sizes, **columns)


def load(path: Path) -> tuple[int, list[Arrays]]:
    with np.load(path) as file:
        columns = dict(file)
    vocab_size, ends = int(columns.pop("vocab_size")), columns.pop("sizes").cumsum()[:-1]
    split = {name: np.split(column, ends) for name, column in columns.items()}
    return vocab_size, [dict(zip(split, rows, strict=True)) for rows in zip(*split.values(), strict=True)]


def answers(logits: Tensor, labels: Tensor) -> Arrays:
    """Of [t, v]."""
    log_probs = logits.log_softmax(-1)
    top, ids = log_probs.topk(K)
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)
    made: dict[str, Any] = {
        "ids": ids.int(),
        "log_probs": top,
        "log_rest": rest,
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "label_log_probs": log_probs.gather(1, labels[:, None])[:, 0],
        "draws": torch.multinomial(log_probs.exp(), MOST_SAMPLES, replacement=True).int(),
        "logits": logits.gather(1, ids),
        "log_sums": logits.logsumexp(-1),
    }
    return {name: tensor.numpy() for name, tensor in made.items()}


def make_up(vocab_size: int, settings: argparse.Namespace) -> Iterator[Arrays]:
    frequency = -(torch.randperm(vocab_size) + 3).float().log()
    for _ in range(settings.examples):
        spread = torch.exp(1.4 + 0.3 * torch.randn(settings.tokens, 1))
        logits = frequency + spread * torch.randn(settings.tokens, vocab_size)
        yield answers(logits, torch.multinomial(logits.softmax(-1), 1)[:, 0])


def ask_quickstart(settings: argparse.Namespace) -> Iterator[Arrays]:
    cfg = data.DatasetConfig(
        source=str(QUICKSTART / "validation.jsonl.gz"),
        split=f"[:{settings.examples * 2}]",
        column_map={"output": "answer"},
        prompt_template="Question: {question}\nAnswer: ",
        train_on_input=True,
    )
    examples = data.load(cfg, tokenizers.load(QUICKSTART / "teacher"), 384)
    model = checkpoint.load_model(QUICKSTART / "teacher", dtype=torch.float32, device="cpu")
    for tokens, labels in (examples[i] for i in range(len(examples))):
        hidden = model.hidden(tokens[None], torch.arange(len(tokens))[None])
        is_scored = labels != data.IGNORE
        yield answers(model.head(hidden)[0, is_scored], labels[is_scored])


def main() -> None:
    variants = {name: variant(*what) for name, what in FORMATS.items()}
    parser = harness.make_parser(__doc__, rounds=3, has_models=False)
    parser.add_argument("--sources", nargs="+", default=["32000", "128256", "151936", "262144", "quickstart"])
    parser.add_argument("--tokens", type=int, default=200, help="labelled tokens of a made-up example")
    parser.add_argument(
        "--examples", type=int, default=5, help="of a made-up teacher; the quickstart's has twice as many"
    )
    parser.add_argument("--data", help=argparse.SUPPRESS)
    settings = harness.parse(parser, variants)
    print(harness.describe_machine(settings), flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        torch.manual_seed(0)
        for source in settings.sources:
            path = Path(folder) / f"{source}.npz"
            if source == "quickstart":
                examples = list(ask_quickstart(settings))
                save(path, 2048, examples)
            else:
                examples = list(make_up(int(source), settings))
                save(path, int(source), examples)
            entropy = np.concatenate([example["entropy"] for example in examples]).mean()
            rest = np.exp(np.concatenate([example["log_rest"] for example in examples])).mean()
            print(f"{source}: entropy {entropy:.2f} nats, {rest:.1%} outside of the {K} likeliest", flush=True)
        found = harness.run(settings, variants, ["--data", folder])
    print_tables(settings.sources, found)


def print_tables(sources: list[str], found: dict[str, list[Answer]]) -> None:
    def cell(name: str, key: str, form: str) -> str:
        return format(harness.median(found[name], key), form) if key in found[name][0] else ""

    main = "128256" if "128256" in sources else sources[0]  # of which there is room for more than bytes
    kl = [source for source in sources if source in (main, "quickstart")]
    header = ["", *(f"bytes, {source}" for source in sources), f"to kdtune, 8 bits, {main}"]
    header += [f"tokens/s written, {main}", "read", *(f"KL, {source}" for source in kl)]
    rows = []
    for name, answers in found.items():
        row = [FORMATS[name][0], *(cell(name, f"{source} bytes", ",.1f") for source in sources)]
        has_ratio = "kdtune-8" in found and f"{main} bytes" in answers[0]
        row.append(f"{harness.ratio(answers, found['kdtune-8'], f'{main} bytes'):.2f}" if has_ratio else "")
        row += [cell(name, f"{main} write", ",.0f"), cell(name, f"{main} read", ",.0f")]
        rows.append([*row, *(cell(name, f"{source} kl", ".1e") for source in kl)])
    harness.print_table(header, rows)


if __name__ == "__main__":
    main()
