"""Measure how a set of many short rows is tokenised, and how it is found again in the cache.

    python tests/benchmarks/large_set.py
    python tests/benchmarks/large_set.py --rows 100000 --workers 2

Each line is a process of its own: seconds of `data.load` and from there to the first optimizer step's batches, and the
largest memory that was no file's (RssAnon), with what the imports alone need. Files that are mapped into memory are not
counted: the system takes their pages back when it needs them. Some three minutes on two cores.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import kdtune

ASSETS = Path(kdtune.__file__).parent / "assets" / "quickstart" / "teacher"
WORDS = "the a of to and he she has have apples books cost many more sells each day week total gives friend".split()  # noqa: SIM905


def write_rows(path: Path, count: int) -> None:
    generator = random.Random(0)
    with open(path, "w") as file:
        for i in range(count):
            prompt, answer = (" ".join(generator.choices(WORDS, k=generator.randint(4, 20))) for _ in range(2))
            file.write(json.dumps({"prompt": f"Question {i}: {prompt}", "completion": answer}) + "\n")


def rss_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The largest memory from its start until it is asked."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = rss_mib()
        self.start()

    def run(self) -> None:
        while True:
            self.mib = max(self.mib, rss_mib())
            time.sleep(0.02)


def measure(folder: str, workers: str, what: str) -> None:
    """One process: prints a line, beside what `data.load` says."""
    from kdtune import data, tokenizers

    cfg = data.DatasetConfig(
        source=f"{folder}/rows.jsonl",
        format="completion",
        num_workers=int(workers),
        cache_dir=f"{folder}/cache",
    )
    tokenizer = tokenizers.load(ASSETS)
    base, peak, start = rss_mib(), Peak(), time.perf_counter()
    examples = data.load(cfg, tokenizer, 512)
    loaded, mib = time.perf_counter(), peak.mib
    loader = data.Loader(examples, batch_size=32)
    loader.next_step()
    first = time.perf_counter()
    print(f"{what:<17}{loaded - start:8.2f} s, first step after {first - loaded:5.2f} s more;", end=" ")
    print(f"{base:5.0f} MiB before, {mib:5.0f} MiB while loading, {peak.mib:5.0f} MiB at the first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, settings.rows)
        print(f"{settings.rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB", flush=True)
        for what in ("into the cache", "out of the cache"):
            subprocess.run([sys.executable, __file__, "--process", folder, str(settings.workers), what], check=True)
        size = sum(file.stat().st_size for file in (Path(folder) / "cache").rglob("*.npy"))
        print(f"the cache has {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        measure(*sys.argv[2:])
    else:
        main()
