"""Ask a teacher once, and keep what it says: students then learn from it without its weights.

    kdtune run cache_teacher_logits --config quickstart
    kdtune run cache_teacher_logits teacher_checkpointer.checkpoint_dir=models/Llama-3.1-8B-Instruct \
        tokenizer.path=models/Llama-3.2-1B-Instruct dataset.source=rows.jsonl dataset.format=chat output_dir=caches/8B
    kdtune run knowledge_distillation --config llama3_2/8B_to_1B_KD \
        teacher_checkpointer=null teacher.cache_dir=caches/8B

For each labelled token random draws of the next one are kept, the likeliest ones (`store.kind=top_k`), or the final
hidden states, from which everything can be computed (hidden). An example is known by its tokens and labels, so rows may
come in any order, packing and batches later. What `output_dir` has already is not asked again: the same command goes on
after any stop, and adds further rows. Processes write side by side.

Random draws: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
arXiv:2503.16870.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from kdtune import checkpoint, data, devices, distributed, metrics, preflight, teacher_cache, tokenizers
from kdtune.config import MISSING, setting
from kdtune.interrupt import Interrupt
from kdtune.memory import format_bytes
from kdtune.teacher import (
    FoundTeacher,
    TeacherConfig,
    ask,
    check_live_teacher,
    find_teacher,
    keep_head,
    load_live_teacher,
)

SERVES = {  # which students, by store.kind
    "samples": "kd_loss.name=forward_kl at temperature 1 (store.kind=top_k: all divergences; hidden: all objectives)",
    "top_k": "all divergences at temperature 1, all others being one token (store.kind=hidden: all objectives)",
    "hidden": "all objectives",
}


@dataclass
class Config:
    """Every setting of this recipe."""

    store: teacher_cache.StoreConfig = setting(teacher_cache.StoreConfig)  # what is kept for each labelled token
    output_dir: str = setting(MISSING, path=True)  # the cache; what it has already is not asked again

    teacher_checkpointer: checkpoint.CheckpointerConfig = setting(checkpoint.CheckpointerConfig)  # the teacher
    teacher: TeacherConfig = setting(TeacherConfig)  # how the teacher is held
    tokenizer: tokenizers.TokenizerConfig = setting(tokenizers.TokenizerConfig)  # that of the student, if it has a path
    dataset: data.DatasetConfig = setting(data.DatasetConfig)  # rows that students will be trained on
    dataset_val: data.DatasetConfig | None = None  # rows that they will be validated on; null: none

    batch_size: int = setting(8, gt=0)  # rows that go through the teacher together
    seed: int = setting(0, ge=0)  # of random draws

    parallel: distributed.ParallelConfig = setting(distributed.ParallelConfig)  # over processes; one needs none of it
    device: str = "cuda"  # cuda, cuda:1, cpu; refused if it is not there
    dtype: devices.Dtype = "bf16"  # of weights and activations; distributions are always float32
    matmul_precision: devices.MatmulPrecision = "highest"  # of float32 products; high: TF32 on GPUs, medium: bf16
    loss_chunk_size: int | None = setting(None, gt=0)  # labelled tokens whose logits exist at one time; null: automatic
    compile: bool = False  # torch.compile layers: faster after minutes; on a CPU it needs a C++ compiler


def main(cfg: Config) -> None:
    inputs = check(cfg)
    ranks = inputs.ranks
    if not (inputs.num_tokens or inputs.lacks_head):
        print("Nothing is missing.")
        ranks.leave()
        return
    torch.set_float32_matmul_precision(cfg.matmul_precision)

    writer = teacher_cache.Writer(cfg.output_dir, inputs.card)
    teacher = load_live_teacher(cfg, ranks)
    if cfg.compile:
        teacher.compile()
    if ranks.is_first:
        teacher_cache.write_tokenizer(cfg.output_dir, inputs.companions)
    if inputs.lacks_head:
        keep_head(teacher, cfg.output_dir, cfg.store.hidden_dtype, ranks)

    log_prob = torch.zeros(2, dtype=torch.float64)  # of this process: sum over the labels, and how many
    # One thread compresses what was said of a batch while the teacher is asked about the next one.
    with (
        Interrupt(ranks.any) as interrupt,
        metrics.token_bar(inputs.num_tokens) as bar,
        writer,
        ThreadPoolExecutor(1, "writing the teacher's answers") as thread,
    ):
        writing = thread.submit(write, writer, [])
        for batch in inputs.batches:
            answered = list(ask(teacher, batch, cfg.store, seed=cfg.seed, chunk_size=cfg.loss_chunk_size))
            for _, answers in answered:
                if not isinstance(answers, teacher_cache.Hidden):
                    log_prob += torch.tensor([answers.label_log_probs.sum(), len(answers)])
            writing.result()
            # Of processes that hold a teacher together all know the answers, and one of them writes.
            writing = thread.submit(write, writer, answered if ranks.is_first_of_rows else [])
            labels, num_tokens, num_bytes = ranks.all_sum([batch.num_labels, writer.num_tokens, writer.num_bytes])
            bar.update(int(labels))
            if num_tokens:
                size = int(inputs.num_tokens * num_bytes / num_tokens)
                bar.set_postfix_str(f"{format_bytes(size)} in the end", refresh=False)
            if interrupt.has_come():
                break
        writing.result()

    ranks.wait()  # until all have written what they know
    total, count = ranks.all_sum(log_prob)
    if count:
        print(f"teacher: {inputs.teacher.judge(-total / count)}")
    if ranks.is_first:
        print(f"{cfg.output_dir}: {teacher_cache.TeacherCache(cfg.output_dir).summary()}")
    if interrupt.received:
        print(f"{interrupt.received.name}: the same command adds what is missing.")
        raise SystemExit(interrupt.exit_code)
    print(f"Learn from it:\n  kdtune run knowledge_distillation ... teacher.cache_dir={cfg.output_dir}")
    ranks.leave()


def write(writer: teacher_cache.Writer, answered: Sequence[tuple[int, teacher_cache.Answers]]) -> None:
    """Keep the answers to some examples."""
    for example, answers in answered:
        writer.add(example, answers)


@dataclass
class Inputs:
    """What is known before a weight is read."""

    ranks: distributed.Ranks
    teacher: FoundTeacher
    card: teacher_cache.Card
    companions: dict[str, bytes]  # the tokenizer's files
    batches: Iterable[data.Batch]  # of what is missing
    num_tokens: int  # labelled, of all of these
    lacks_head: bool  # hidden states are to be kept, and the head that makes predictions of them is not there


def check(cfg: Config) -> Inputs:
    """Find whatever can be wrong before a weight is read, and say what is going to happen.

    Raises:
        ValueError, OSError: what is wrong, why it matters and what to do.
    """
    ranks = distributed.join(cfg.parallel, cfg.device)
    preflight.check_spread(cfg, ranks)
    preflight.check_without_backward(cfg.parallel, "parallel")
    check_settings(cfg, ranks)
    if cfg.compile:
        devices.check_compiler(ranks.device)
    teacher = find_teacher(cfg)
    assert teacher.config is not None
    teacher_cache.check_store(cfg.store, teacher.vocab_size)
    tokenizer_path = cfg.tokenizer.path or cfg.teacher_checkpointer.tokenizer_dir
    tokenizer = tokenizers.load(tokenizer_path)
    preflight.check_pair(tokenizer, teacher.tokenizer, teacher.vocab_size, teacher.vocab_size)

    card = teacher_cache.Card(
        store=cfg.store,
        vocab_size=teacher.vocab_size,
        teacher=teacher_cache.Teacher(
            name=Path(teacher.folder).resolve().name,
            fingerprint=teacher_cache.teacher_fingerprint(teacher.folder, cfg.teacher_checkpointer.adapter_dir),
            dtype=cfg.teacher.dtype or cfg.dtype,
            quantization=cfg.teacher.quantization,
        ),
        tokenizer=tokenizer.fingerprint,
        hidden={"size": teacher.config.hidden_size} if cfg.store.kind == "hidden" else None,
    )
    there = teacher_cache.open_to_extend(cfg.output_dir, card)
    # What is missing is what the first process misses: others may look while another job adds to the folder.
    known = np.empty(0, np.uint64) if there is None else there.ids
    batches, num_tokens = [], 0
    for name, dataset in (("dataset", cfg.dataset), ("dataset_val", cfg.dataset_val)):
        if dataset is None:
            continue
        max_seq_len = cfg.tokenizer.max_seq_len
        examples = data.load(dataset, tokenizer, max_seq_len, name=name, vocab_size=teacher.vocab_size)
        ids, first = np.unique(examples.ids, return_index=True)
        missing = ranks.of_first(np.sort(first[~np.isin(ids, known)]))
        known = np.union1d(known, ids)  # rows that both data sets have are asked about once
        batches.append(
            data.ValBatches(
                examples,
                cfg.batch_size,
                packed=dataset.packed,
                group_by_length=dataset.group_by_length,
                share=ranks.share,
                only=missing,
            )
        )
        num_tokens += int(examples.label_counts[missing].sum())
        card = card.with_datasets((teacher_cache.Dataset(dataclasses.asdict(dataset), max_seq_len, len(examples)),))
        print(f"data      {examples.summary()}; {len(missing):,} examples to ask about")
    print(f"teacher   {teacher}")
    size = num_tokens * teacher_cache.estimate_bytes(cfg.store, teacher.vocab_size, teacher.config.hidden_size)
    print(f"cache     {cfg.output_dir}: {num_tokens:,} labelled tokens to add, about {format_bytes(size)}")
    print(f"serves    {SERVES[cfg.store.kind]}")
    print(f"run       {cfg.dtype} on {ranks.describe()}")
    ranks.wait()  # so that nobody writes while another still looks at what is there
    return Inputs(
        ranks=ranks,
        teacher=teacher,
        card=card,
        companions=checkpoint.read_companions(cfg.teacher_checkpointer.checkpoint_dir, tokenizer_path),
        batches=chain.from_iterable(batches),
        num_tokens=num_tokens,
        lacks_head=ranks.of_first(cfg.store.kind == "hidden" and not Path(cfg.output_dir, teacher_cache.HEAD).exists()),
    )


def check_settings(cfg: Config, ranks: distributed.Ranks) -> None:
    """Refuse settings that exclude each other, or do not go with the teacher.

    Raises:
        ValueError, OSError: which settings, why and what to do.
    """
    for name in ("cache_dir", "compare_quantization"):
        if value := getattr(cfg.teacher, name):
            raise ValueError(f"teacher.{name}={value} is for students; here a teacher is asked. Leave it out.")
    if cfg.parallel.context > 1:
        raise ValueError(
            f"parallel.context={cfg.parallel.context} gives processes slices of rows, and answers are kept by example. "
            "Take parallel.tensor or parallel.data_shard for a teacher that is too large for one process."
        )
    check_live_teacher(cfg, ranks.device)
