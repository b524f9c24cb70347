"""Keep what a teacher says that runs behind a server: vLLM or SGLang, here or elsewhere. No GPU is needed here.

    vllm serve models/Llama-3.1-405B-Instruct --tensor-parallel-size 8 --max-logprobs 64 --no-enable-prefix-caching
    kdtune run cache_served_teacher server.url=http://node1:8000 teacher_dir=models/Llama-3.1-405B-Instruct \
        dataset.source=rows.jsonl dataset.format=chat output_dir=caches/405B
    kdtune run knowledge_distillation --config llama3_2/8B_to_1B_KD \
        teacher_checkpointer=null teacher.cache_dir=caches/405B

Of each labelled token the server tells the `store.top_k` likeliest and their log-probabilities, from which that of all
others together follows. Prompts are token ids, and every answer is held against them, token by token. What `output_dir`
has already is not asked again: the same command goes on after any stop, and adds further rows. The cache is of the form
of `cache_teacher_logits`; docs/cache_served_teacher.md says what of it a server cannot tell.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kdtune import checkpoint, data, metrics, preflight, teacher_cache, tokenizers
from kdtune.config import MISSING, setting
from kdtune.interrupt import Interrupt
from kdtune.memory import format_bytes
from kdtune.teacher import FoundTeacher


@dataclass
class Config:
    """Every setting of this recipe."""

    server: teacher_cache.ServerConfig = setting(teacher_cache.ServerConfig)  # what runs the teacher
    # What is kept for each labelled token: of what a server tells, top_k alone.
    store: teacher_cache.StoreConfig = dataclasses.field(
        default_factory=lambda: teacher_cache.StoreConfig(kind="top_k")
    )
    output_dir: str = setting(MISSING, path=True)  # the cache; what it has already is not asked again

    teacher_dir: str = setting(MISSING, path=True)  # config.json and tokenizer of what is served; no weights are read
    tokenizer: tokenizers.TokenizerConfig = setting(tokenizers.TokenizerConfig)  # that of the student, if it has a path
    dataset: data.DatasetConfig = setting(data.DatasetConfig)  # rows that students will be trained on
    dataset_val: data.DatasetConfig | None = None  # rows that they will be validated on; null: none


def main(cfg: Config) -> None:
    inputs = check(cfg)
    if not inputs.num_tokens:
        print("Nothing is missing.")
        return

    writer = teacher_cache.Writer(cfg.output_dir, inputs.card)
    teacher_cache.write_tokenizer(cfg.output_dir, inputs.companions)
    log_prob = 0.0  # sum over the labels
    answered = inputs.teacher.ask(questions(inputs.asked))
    with Interrupt() as interrupt, metrics.token_bar(inputs.num_tokens) as bar, writer:
        for example, answers in answered:
            writer.add(example, answers)
            log_prob += float(answers.label_log_probs.sum())
            bar.update(len(answers))
            size = inputs.num_tokens * writer.num_bytes / writer.num_tokens
            bar.set_postfix_str(f"{format_bytes(size)} in the end", refresh=False)
            if interrupt.has_come():
                break
        answered.close()  # those that are under way are waited for

    found = FoundTeacher(cfg.server.url, inputs.card.vocab_size, inputs.tokenizer, None, None)
    if writer.num_tokens:
        print(f"teacher: {found.judge(-log_prob / writer.num_tokens)}")
    print(f"{cfg.output_dir}: {teacher_cache.TeacherCache(cfg.output_dir).summary()}")
    if interrupt.received:
        print(f"{interrupt.received.name}: the same command adds what is missing.")
        raise SystemExit(interrupt.exit_code)
    print(f"Learn from it:\n  kdtune run knowledge_distillation ... teacher.cache_dir={cfg.output_dir}")


@dataclass
class Inputs:
    """What is known before an answer is asked for."""

    teacher: teacher_cache.ServedTeacher
    card: teacher_cache.Card
    tokenizer: tokenizers.Tokenizer
    companions: dict[str, bytes]  # the tokenizer's files
    asked: list[tuple[data.Examples | data.Blend, np.ndarray]]  # examples, and which of them are missing
    num_tokens: int  # labelled, of all of these


def check(cfg: Config) -> Inputs:
    """Find whatever can be wrong before an answer is asked for, and say what is going to happen.

    Raises:
        ValueError, OSError: what is wrong, why it matters and what to do.
    """
    teacher_cache.check_server(cfg.server, cfg.store)
    vocab_size = read_vocab_size(cfg.teacher_dir)
    teacher_cache.check_store(cfg.store, vocab_size)
    tokenizer_path = cfg.tokenizer.path or cfg.teacher_dir
    tokenizer = tokenizers.load(tokenizer_path)
    preflight.check_pair(tokenizer, tokenizers.load(cfg.teacher_dir), vocab_size, vocab_size)

    teacher = teacher_cache.ServedTeacher(cfg.server, cfg.store, vocab_size)
    card = teacher_cache.Card(
        store=cfg.store,
        vocab_size=vocab_size,
        teacher=teacher_cache.Teacher(teacher.model, fingerprint=f"served as {teacher.model}", dtype="unknown"),
        tokenizer=tokenizer.fingerprint,
        entropy_of="bucket",
    )
    there = teacher_cache.open_to_extend(cfg.output_dir, card)
    asked, num_tokens = [], 0
    for name, dataset in (("dataset", cfg.dataset), ("dataset_val", cfg.dataset_val)):
        if dataset is None:
            continue
        max_seq_len = cfg.tokenizer.max_seq_len
        examples = data.load(dataset, tokenizer, max_seq_len, name=name, vocab_size=vocab_size)
        longest = int(examples.lengths.max(initial=0)) + 1
        if teacher.max_seq_len is not None and longest >= teacher.max_seq_len:  # one is generated
            raise ValueError(
                f"{name} has an example of {longest:,} tokens, and {cfg.server.url} takes {teacher.max_seq_len - 1:,} "
                "at most. Lower tokenizer.max_seq_len, or let the server take more."
            )
        missing = np.unique(examples.ids, return_index=True)[1] if there is None else there.missing(examples.ids)
        asked.append((examples, missing))
        num_tokens += int(examples.label_counts[missing].sum())
        card = card.with_datasets((teacher_cache.Dataset(dataclasses.asdict(dataset), max_seq_len, len(examples)),))
        print(f"data      {examples.summary()}; {len(missing):,} examples to ask about")
    print(f"teacher   {teacher.model} at {cfg.server.url}, vocabulary {vocab_size:,}")
    size = num_tokens * teacher_cache.estimate_bytes(cfg.store, vocab_size)
    print(f"cache     {cfg.output_dir}: {num_tokens:,} labelled tokens to add, about {format_bytes(size)}")
    companions = checkpoint.read_companions(cfg.teacher_dir, tokenizer_path)
    return Inputs(teacher, card, tokenizer, companions, asked, num_tokens)


def questions(asked: list[tuple[data.Examples | data.Blend, np.ndarray]]) -> Iterator[teacher_cache.Question]:
    """Each example that is missing."""
    for examples, missing in asked:
        for i in missing.tolist():
            tokens, labels = (part.numpy() for part in examples[i])  # shifted; an example ends with its last label
            is_label = np.append(False, labels != data.IGNORE)
            yield teacher_cache.Question(int(examples.ids[i]), np.append(tokens, labels[-1]), is_label)


def read_vocab_size(folder: str) -> int:
    """Entries of the distributions of a model, which may be of a family that kdtune cannot run.

    Raises:
        FileNotFoundError, ValueError: `config.json` is not there, or does not say.
    """
    config = checkpoint.read_config(folder)
    size = (config.get("text_config") or config).get("vocab_size")
    if not isinstance(size, int):
        raise ValueError(f"{folder}/config.json has no vocab_size, by which answers are stored. Is it that of a model?")
    return size
