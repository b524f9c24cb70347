"""Measure what a model can do, alone and beside its teacher, with standard errors.

    kdtune run evaluate --config quickstart
    kdtune run evaluate checkpointer.checkpoint_dir=runs/llama/model teacher_checkpointer.checkpoint_dir=models/8B \\
        dataset.source=test.jsonl dataset.format=chat output_dir=runs/llama_evaluation
    kdtune compare runs/llama_evaluation runs/baseline_evaluation

Held-out text (`dataset`): cross-entropy, perplexity, bits per byte, accuracy, entropy, calibration; with a teacher both
KL divergences and agreement. Tasks of lm-evaluation-harness (`tasks`). Responses (`responses`): ROUGE-L of sampled
answers against references. Every number has a standard error over examples. What each example adds is written, too, so
that `kdtune compare` can say of two models which is better.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kdtune import checkpoint, config, data, devices, distributed, generation, metrics, models, preflight, tokenizers
from kdtune.config import MISSING, setting
from kdtune.evaluation import estimates, responses, results, text
from kdtune.evaluation.responses import ResponsesConfig
from kdtune.evaluation.tasks import Tasks, TasksConfig, check_tasks, run_tasks, write_samples
from kdtune.printable import TEXT, visible
from kdtune.teacher import (
    FoundTeacher,
    LiveTeacher,
    TeacherConfig,
    check_live_teacher,
    find_teacher,
    load_live_teacher,
    teacher_folders,
)
from kdtune.teacher_cache import teacher_fingerprint


@dataclass
class Config:
    """Every setting of this recipe."""

    checkpointer: checkpoint.CheckpointerConfig = setting(checkpoint.CheckpointerConfig)  # the model
    teacher_checkpointer: checkpoint.CheckpointerConfig | None = None  # held against the model on dataset; null: none
    teacher: TeacherConfig = setting(TeacherConfig)  # how the teacher is held
    tokenizer: tokenizers.TokenizerConfig = setting(tokenizers.TokenizerConfig)  # shared by both models

    dataset: data.DatasetConfig | None = None  # held-out text; null: none
    batch_size: int = setting(16, gt=0)  # rows, or prompts, that go through a model together
    num_token_examples: int = setting(8, ge=0)  # first examples of dataset that are written token by token
    tasks: TasksConfig | None = None  # tasks of lm-evaluation-harness; null: none
    responses: ResponsesConfig | None = None  # prompts with references to answer; null: none
    sample_prompts: list[str] = setting([])  # texts that teacher and model continue greedily
    sample_max_new_tokens: int = setting(64, gt=0)  # length of those continuations

    parallel: distributed.ParallelConfig = setting(distributed.ParallelConfig)  # over processes; one needs none of it
    teacher_parallel: distributed.ParallelConfig | None = None  # the same of the teacher; null: as the model
    device: str = "cuda"  # cuda, cuda:1, cpu; refused if it is not there
    dtype: devices.Dtype = "bf16"  # of weights and activations; distributions are always float32
    matmul_precision: devices.MatmulPrecision = "highest"  # of float32 products; high: TF32 on GPUs, medium: bf16
    loss_chunk_size: int | None = setting(None, gt=0)  # scored tokens whose logits exist at one time; null: automatic
    compile: bool = False  # torch.compile layers: faster after minutes; on a CPU it needs a C++ compiler

    output_dir: str = setting(MISSING, path=True)  # the results go here
    overwrite_output_dir: bool = False  # delete the run that output_dir holds


def main(cfg: Config) -> None:
    started = time.perf_counter()
    inputs = check(cfg)
    ranks = inputs.ranks
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    teacher = None if inputs.teacher is None else load_live_teacher(cfg, ranks)
    model = checkpoint.load_model(
        cfg.checkpointer.checkpoint_dir,
        dtype=devices.DTYPES[cfg.dtype],
        device=cfg.parallel.place(ranks.device),
        adapter_dir=cfg.checkpointer.adapter_dir,
        shard=distributed.sharding(ranks, cfg.parallel, trains=False),
    ).eval()
    if cfg.compile:
        models.compile_layers(model)
        if teacher is not None:
            teacher.compile()

    found: list[results.Result] = []
    examples: list[results.Example] = []
    tokens: list[results.TokenExample] = []
    said: list[results.Response] = []
    settings: dict[str, dict[str, str]] = {}
    work = Work()
    if inputs.examples is not None:
        with work:
            text_examples, tokens = measure_text(cfg, inputs, model, teacher)
        found += estimates.results("text", text_examples)
        examples += text_examples
        work.num_tokens += sum(one.num_tokens for one in text_examples)
        if inputs.teacher is not None:
            print(f"teacher: {inputs.teacher.judge(found[0].metrics['teacher_ce'].value)}")
    of_tasks = None
    if inputs.tasks is not None:
        with work:
            of_tasks = run_tasks(inputs.tasks, model, inputs.tokenizer, ranks)
        found += of_tasks.results
        examples += of_tasks.examples
        settings |= of_tasks.settings
        work.num_tokens += of_tasks.num_tokens
    if cfg.responses is not None:
        with work:
            answered, response_examples, said = measure_responses(cfg, inputs, model)
        found += answered
        examples += response_examples
        settings["responses"] = responses.settings(cfg.responses)
        work.num_tokens += sum(one.num_tokens for one in response_examples)
    samples = continue_prompts(cfg, inputs, model, teacher)

    evaluation = results.Evaluation(
        model=inputs.model,
        teacher=inputs.teacher_model,
        tokenizer=inputs.tokenizer.fingerprint,
        results=found,
        samples=samples,
        seconds=time.perf_counter() - started,
        tokens_per_second=work.num_tokens / work.seconds,
        settings=settings,
    )
    if ranks.is_first:
        output_dir = Path(cfg.output_dir)
        checkpoint.begin(output_dir)
        checkpoint.record(output_dir, config.to_yaml(cfg), recipe=Path(__file__))
        if of_tasks is not None:
            write_samples(output_dir, of_tasks)
        results.write(output_dir, evaluation, examples, tokens, said)
    for sample in samples:
        of_teacher = {} if sample.teacher is None else {"teacher": sample.teacher}
        print("\n" + generation.side_by_side(sample.prompt, {**of_teacher, "model": sample.student}))
    print(f"\n{visible(results.table(evaluation), keep=TEXT)}\n")
    print(f"{work.num_tokens:,} tokens, {evaluation.tokens_per_second:,.0f} tokens/s")
    folder = shlex.quote(cfg.output_dir)
    print(f"The results are in {cfg.output_dir}. Look at them:\n  kdtune report {folder}")
    print(f"Compare them with those of another model:\n  kdtune compare <its folder> {folder}")
    ranks.leave()


class Work:
    """The time in which models compute, and what they do in it."""

    num_tokens = 0
    seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def measure_text(
    cfg: Config, inputs: "Inputs", model: models.Decoder, teacher: LiveTeacher | None
) -> tuple[list[results.Example], list[results.TokenExample]]:
    """What each example of the held-out text adds, and the first of them token by token."""
    examples, ranks = inputs.examples, inputs.ranks
    assert examples is not None
    first = examples.ids[: cfg.num_token_examples].tolist()
    scorer = text.Scorer(model, inputs.tokenizer, wanted=first, chunk_size=cfg.loss_chunk_size)
    scored: list[text.Scored] = []
    with metrics.token_bar(examples.num_labels) as bar:
        for source, batches in inputs.batches.items():
            subset = source if len(inputs.batches) > 1 else None
            for batch in batches:
                targets = None if teacher is None else teacher(batch)
                scored += scorer(batch, targets, subset)
                bar.update(ranks.total(batch.num_labels))
    # Of processes that hold a model together, all that have the same rows found the same.
    gathered = ranks.gather(scored if ranks.is_first_of_rows else [])
    ordered = text.in_order((one for part in gathered for one in part), examples)
    tokens = [text.spell(ordered[i], *examples[i], inputs.tokenizer) for i in range(len(first))]
    return [one.example for one in ordered], tokens


def measure_responses(
    cfg: Config, inputs: "Inputs", model: models.Decoder
) -> tuple[list[results.Result], list[results.Example], list[results.Response]]:
    """How near the model's responses come to their references."""
    assert cfg.responses is not None
    ranks, prompts = inputs.ranks, inputs.prompts
    batches = responses.in_batches(prompts, cfg.batch_size)
    said: responses.Said = {}
    with metrics.progress_bar(len(prompts) * len(cfg.responses.seeds)) as bar:
        for seed in cfg.responses.seeds:
            for i in range(0, len(batches), ranks.num_replicas):  # each takes a batch
                for batch in batches[i + ranks.replica : i + ranks.replica + 1]:
                    said |= responses.respond(model, batch, cfg.responses, seed, inputs.tokenizer)
                bar.update(sum(map(len, batches[i : i + ranks.num_replicas])))
    for part in ranks.gather(said):  # those that hold a model together have said the same
        said |= part
    return responses.score(said, prompts, cfg.responses, inputs.tokenizer)


def continue_prompts(
    cfg: Config, inputs: "Inputs", model: models.Decoder, teacher: LiveTeacher | None
) -> list[results.Sample]:
    """The greedy continuations of `sample_prompts`."""
    tokenizer = inputs.tokenizer

    def texts(of: models.Decoder) -> list[str]:
        new_tokens = generation.generate(
            of,
            [tokenizer.encode(prompt) for prompt in cfg.sample_prompts],
            max_new_tokens=cfg.sample_max_new_tokens,
            stop_ids=tokenizer.eos_ids,
        )
        return [tokenizer.decode(row) for row in new_tokens]

    of_teacher = [None] * len(cfg.sample_prompts) if teacher is None else texts(teacher.model)
    return [results.Sample(*sample) for sample in zip(cfg.sample_prompts, texts(model), of_teacher, strict=True)]


@dataclass
class Inputs:
    """What is known before a weight is read."""

    ranks: distributed.Ranks
    model: results.Model
    teacher: FoundTeacher | None
    teacher_model: results.Model | None
    tokenizer: tokenizers.Tokenizer
    examples: data.Examples | data.Blend | None  # the held-out text
    batches: dict[str, data.ValBatches]  # of each of its sources; empty without
    tasks: Tasks | None  # of lm-evaluation-harness
    prompts: list[responses.Prompt]  # to answer; empty without


def check(cfg: Config) -> Inputs:
    """Find whatever can be wrong before a weight is read, and say what is going to happen.

    Raises:
        ValueError, OSError: what is wrong, why it matters and what to do.
    """
    ranks = distributed.join(cfg.parallel, cfg.device)
    preflight.check_spread(cfg, ranks)
    check_settings(cfg)
    if cfg.compile:
        devices.check_compiler(ranks.device)
    tokenizer_path = cfg.tokenizer.path or cfg.checkpointer.tokenizer_dir
    checkpoint.prepare_output_dir(
        Path(cfg.output_dir),
        resume=None,
        overwrite=cfg.overwrite_output_dir,
        sources=(cfg.checkpointer.checkpoint_dir, cfg.checkpointer.adapter_dir, *teacher_folders(cfg), tokenizer_path),
    )

    model = models.from_hf_config(checkpoint.check_model(cfg.checkpointer))
    preflight.check_split(cfg.parallel, model, "model")
    tokenizer = tokenizers.load(tokenizer_path, cfg.checkpointer.checkpoint_dir)
    vocab_size, teacher, teacher_model = model.vocab_size, None, None
    if cfg.teacher_checkpointer is None:
        preflight.check_vocabulary(tokenizer, model.vocab_size, "model")
    else:
        check_live_teacher(cfg, ranks.device)
        teacher = find_teacher(cfg)
        assert teacher.config is not None
        preflight.check_pair(tokenizer, teacher.tokenizer, model.vocab_size, teacher.vocab_size)
        vocab_size = min(vocab_size, teacher.vocab_size)
        dtype = cfg.teacher.dtype or cfg.dtype
        teacher_model = describe(cfg.teacher_checkpointer, teacher.config, dtype, cfg.teacher.quantization)

    examples, batches, rows = None, {}, None
    questions: list[responses.Prompt] = []
    max_seq_len = cfg.tokenizer.max_seq_len
    if cfg.dataset is not None:
        data.check_validation(cfg.dataset, "dataset")
        preflight.check_sequence_length(max_seq_len, "tokenizer.max_seq_len", model, "model")
        examples = data.load(cfg.dataset, tokenizer, max_seq_len, vocab_size=vocab_size)
        batches = data.batches_by_source(examples, cfg.dataset, cfg.batch_size, ranks.share)
    tasks = None if cfg.tasks is None else check_tasks(cfg.tasks, tokenizer, model)
    if cfg.responses is not None:
        rows, questions = responses.load(cfg.responses, tokenizer, max_seq_len, vocab_size)
        tokens = [prompt.tokens for prompt in questions]
        preflight.check_prompts(tokens, cfg.responses.max_new_tokens, "responses.dataset", model, "model")
    prompts = [tokenizer.encode(prompt) for prompt in cfg.sample_prompts]
    for role, one in (("model", model), ("teacher", None if teacher is None else teacher.config)):
        if one is not None:
            preflight.check_prompts(prompts, cfg.sample_max_new_tokens, "sample_prompts", one, role)

    print(f"model     {preflight.describe(cfg.checkpointer.checkpoint_dir, model)}")
    if teacher is not None:
        print(f"teacher   {teacher}")
    if examples is not None:
        print(f"data      {examples.summary()}")
    if tasks is not None:
        print(f"tasks     {tasks.describe()}")
    if rows is not None:
        print(f"prompts   {rows.summary()}")
    print(f"run       {cfg.dtype} on {ranks.describe()}, into {cfg.output_dir}")
    ranks.wait()  # so that nobody writes while another still looks at what is there
    return Inputs(
        ranks=ranks,
        model=describe(cfg.checkpointer, model, cfg.dtype),
        teacher=teacher,
        teacher_model=teacher_model,
        tokenizer=tokenizer,
        examples=examples,
        batches=batches,
        tasks=tasks,
        prompts=questions,
    )


def check_settings(cfg: Config) -> None:
    """Refuse settings that exclude each other, or would change nothing.

    Raises:
        ValueError: which settings, why and what to do.
    """
    if cfg.dataset is None and cfg.tasks is None and cfg.responses is None:
        raise ValueError(
            "Nothing is to be measured. Give dataset.source=<file or folder of held-out text>, "
            "responses.dataset.source=<prompts with references>, or tasks.names=[<tasks of lm-evaluation-harness>]."
        )
    if cfg.responses is not None:
        responses.check(cfg.responses)
    if cfg.dataset is None and cfg.teacher_checkpointer is not None and not cfg.sample_prompts:
        raise ValueError(
            "teacher_checkpointer is held against the model on dataset, and continues sample_prompts, and there is "
            "neither. Give one of them, or leave the teacher out."
        )
    for name in ("cache_dir", "compare_quantization"):
        if value := getattr(cfg.teacher, name):
            raise ValueError(f"teacher.{name}={value} is for training; here the teacher is asked. Leave it out.")
    if cfg.teacher_checkpointer is None:
        given = {"teacher": cfg.teacher != TeacherConfig(), "teacher_parallel": cfg.teacher_parallel is not None}
        for section in (name for name, is_given in given.items() if is_given):
            raise ValueError(
                f"{section} says how a teacher is held, and there is none. Give teacher_checkpointer.checkpoint_dir="
                "<its folder>, or leave it out."
            )
    if cfg.parallel.context > 1:
        raise ValueError(
            f"parallel.context={cfg.parallel.context} gives processes slices of rows, and results are those of "
            "examples. Take parallel.tensor or parallel.data_shard for a model that is too large for one process."
        )
    preflight.check_without_backward(cfg.parallel, "parallel")


def describe(
    checkpointer: checkpoint.CheckpointerConfig, model: models.ModelConfig, dtype: str, quantization: str | None = None
) -> results.Model:
    """A model, as results name it."""
    folders = (checkpointer.checkpoint_dir, checkpointer.adapter_dir)
    return results.Model(
        name=" + ".join(filter(None, folders)),
        parameters=models.num_parameters(model),
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        dtype=dtype,
        quantization=quantization,
        fingerprint=teacher_fingerprint(*folders),
    )
