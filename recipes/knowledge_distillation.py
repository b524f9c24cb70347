"""Distil a teacher's next-token distributions into a smaller student.

    loss = (1 - kd_ratio) * ce + kd_ratio * (kd + hidden)

    ce = - log q(label)                       at temperature 1
    kd = T^2 * D(p, q)                        p = softmax(teacher / T), q = softmax(student / T)

D is the forward KL, sum_v p (log p - log q), or another divergence of `kd_loss.name`. With `hidden_loss`, hidden is
the distance between hidden states of both, of any pairs of modules; else it is not there.

Both are summed over the labelled tokens of the whole optimizer step and divided by their number once, so a step means
the same however its rows are split into micro-batches.

    kdtune run knowledge_distillation --config quickstart
    kdtune run knowledge_distillation --config llama3_2/8B_to_1B_KD kd_ratio=1 kd_loss.temperature=2
    kdtune run --nproc-per-node 8 knowledge_distillation --config llama3_2/8B_to_1B_KD

The teacher must share the student's tokenizer (padding at the end of either vocabulary is fine). Nothing of it is
trained. The finished student is an ordinary Hugging Face folder, `output_dir/model`.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from kdtune import (
    checkpoint,
    config,
    data,
    devices,
    distributed,
    generation,
    losses,
    metrics,
    models,
    optim,
    pipeline_parallel,
    planning,
    preflight,
    profiling,
    tokenizers,
)
from kdtune.config import MISSING, setting
from kdtune.interrupt import Interrupt
from kdtune.teacher import (
    FoundTeacher,
    Teacher,
    TeacherConfig,
    add_hidden_loss,
    check_teacher,
    compare_hidden,
    count_compared,
    find_teacher,
    load_teacher,
    run_student,
    teacher_folders,
)


@dataclass
class Config:
    """Every setting of this recipe."""

    kd_ratio: float = setting(0.5, ge=0, le=1)  # weight of the teacher; 0 is plain fine-tuning, 1 ignores the labels
    kd_loss: losses.KDLossConfig = setting(losses.KDLossConfig)  # the divergence to the teacher
    hidden_loss: losses.HiddenLossConfig | None = None  # distances between hidden states; null: none
    ce_loss: losses.CELossConfig = setting(losses.CELossConfig)  # the cross-entropy on the labels

    checkpointer: checkpoint.StartCheckpointerConfig = setting(checkpoint.StartCheckpointerConfig)  # the student
    teacher_checkpointer: checkpoint.CheckpointerConfig | None = None  # the teacher; null: its answers are cached
    teacher: TeacherConfig = setting(TeacherConfig)  # how the teacher is held, or where its answers are
    lora: models.LoraConfig | None = None  # train an adapter of the student instead of its weights; null: the weights
    qat: models.QATConfig | None = None  # round weights in training, for a model of few bits; null: not
    tokenizer: tokenizers.TokenizerConfig = setting(tokenizers.TokenizerConfig)  # shared by both models
    dataset: data.DatasetConfig = setting(data.DatasetConfig)  # rows to train on
    dataset_val: data.DatasetConfig | None = None  # rows to validate on; null: no validation

    batch_size: int = setting(4, gt=0)  # rows per micro-batch
    gradient_accumulation_steps: int = setting(1, gt=0)  # micro-batches per optimizer step
    epochs: int = setting(1, gt=0)  # passes over the rows
    max_steps_per_epoch: int | None = setting(None, gt=0)  # optimizer steps that end an epoch early; null: all rows
    max_steps: int | None = setting(None, gt=0)  # optimizer steps that end the run early; null: all epochs
    optimizer: optim.OptimizerConfig = setting(optim.OptimizerConfig)  # AdamW
    lr_scheduler: optim.LRSchedulerConfig = setting(optim.LRSchedulerConfig)  # learning rate over the run
    optimizer_in_bwd: bool = False  # step of each weight in the backward, its gradient then freed; no sums, no clipping
    clip_grad_norm: float | None = setting(1.0, gt=0)  # largest norm of the gradient; null: not clipped
    seed: int = setting(0, ge=0)  # of the rows' order and of random weights
    shuffle: bool = True  # a new order of the rows in each epoch

    parallel: distributed.ParallelConfig = setting(distributed.ParallelConfig)  # over processes; one needs none of it
    teacher_parallel: distributed.ParallelConfig | None = None  # the same of the teacher; null: as the student
    device: str = "cuda"  # cuda, cuda:1, cpu; refused if it is not there
    dtype: devices.Dtype = "bf16"  # of weights and gradients; losses are always float32
    matmul_precision: devices.MatmulPrecision = "highest"  # of float32 products; high: TF32 on GPUs, medium: bf16
    enable_activation_checkpointing: bool = False  # recompute activations in the backward: less memory, more work
    activation_checkpointing_mode: models.CheckpointingMode = "full"  # recompute: full: all; selective: no products
    enable_activation_offloading: bool = False  # what checkpointing keeps goes to host memory until it is needed
    loss_chunk_size: int | None = setting(None, gt=0)  # labelled tokens whose logits exist at one time; null: automatic
    compile: bool = False  # torch.compile layers and loss: faster after minutes; on a CPU it needs a C++ compiler

    output_dir: str = setting(MISSING, path=True)  # metrics, checkpoints and the finished student go here
    save_dtype: devices.Dtype | None = None  # of the finished student's weights; null: dtype
    save_every_n_steps: int = setting(0, ge=0)  # optimizer steps between checkpoints to resume from; 0: none
    save_in_background: bool = False  # write checkpoints while training goes on, from a copy in host memory
    resume_from_checkpoint: bool = False  # continue the run in output_dir from its newest checkpoint
    overwrite_output_dir: bool = False  # if not resuming, delete the run that output_dir holds
    run_val_every_n_steps: int = setting(0, ge=0)  # optimizer steps between validations; 0: only before and after
    log_every_n_steps: int = setting(1, gt=0)  # optimizer steps between lines in metrics.jsonl
    metric_logger: metrics.MetricLoggerConfig = setting(metrics.MetricLoggerConfig)  # other places for metrics
    profiler: profiling.ProfilerConfig = setting(profiling.ProfilerConfig)  # a record of what some steps do
    sample_prompts: list[str] = setting([])  # texts that teacher and student continue greedily at the end
    sample_max_new_tokens: int = setting(64, gt=0)  # length of those continuations


def main(cfg: Config) -> None:
    inputs = check(cfg)
    ranks = inputs.ranks
    torch.set_float32_matmul_precision(cfg.matmul_precision)

    student, teacher, optimizer = build(cfg, ranks, inputs.resume_from, inputs.first_batch)
    writer = checkpoint.ModelWriter(student, cfg, inputs.student_config, inputs.companions, optimizer.master, ranks)
    torch.manual_seed(cfg.seed + ranks.rank)  # of dropout; a run that is resumed gets its own states back
    parts = {**checkpoint.beside(student), "optimizer": optimizer, "loader": inputs.loader}
    run = checkpoint.Run(Path(cfg.output_dir), inputs.resume_from, writer, **parts)
    run.record(config.to_yaml(cfg), recipe=Path(__file__))
    logger = metrics.MetricLogger(run.output_dir, cfg.metric_logger, dataclasses.asdict(cfg), run.step, ranks.is_first)

    prove_teacher(cfg, inputs, student, teacher)
    teacher.follow(inputs.loader)
    if inputs.val_batches and run.step == 0:
        logger.log(0, validate(cfg, inputs, student, teacher))

    throughput = metrics.Throughput()
    profiler = profiling.Profiler(cfg.profiler, run.output_dir / "profile" / ranks.folder, ranks.device, run.step)
    with Interrupt(ranks.any) as interrupt, metrics.progress_bar(inputs.num_steps, run.step) as bar, profiler, run:
        for step in range(run.step + 1, inputs.num_steps + 1):
            # The whole step is fetched first: its label count normalises every micro-batch.
            micro_batches = inputs.loader.next_step()
            num_tokens = ranks.total(data.count_labels(micro_batches))
            optim.set_lr(optimizer, inputs.lr_schedule(step))
            num_compared = count_compared(student, micro_batches, ranks, num_tokens)
            done = step / inputs.num_steps
            sums = forward_backward(cfg, student, teacher, micro_batches, num_tokens, done, num_compared)
            norm = optimizer.clip_grad_norm(cfg.clip_grad_norm)
            throughput.add(num_tokens)
            last = step == inputs.num_steps
            if last or step % cfg.log_every_n_steps == 0:
                # Reading the numbers waits for the device, which is why it is not done in every step.
                (loss_value, ce_loss, kd_loss, balanced_kd, *hidden), grad_norm = ranks.all_sum(sums), norm.item()
                if not math.isfinite(loss_value + grad_norm):
                    raise run.not_finite(step, loss_value, grad_norm, applied=cfg.optimizer_in_bwd)
                values = {
                    "loss": loss_value,
                    "ce_loss": ce_loss,
                    "kd_loss": kd_loss,
                    **{f"epochs/{source}": epochs for source, epochs in inputs.loader.source_epochs().items()},
                    **({"kd_factor": balanced_kd / (kd_loss or 1)} if cfg.kd_loss.balance else {}),
                    **(student.beside.describe(hidden, balance=cfg.hidden_loss.balance) if cfg.hidden_loss else {}),
                    "lr": inputs.lr_schedule(step),
                    "grad_norm": grad_norm,
                    "num_tokens": num_tokens,
                    "tokens_per_second": throughput.read(),
                    **metrics.peak_memory(ranks),
                }
                logger.log(step, values)
                shown = "loss {loss:.3f}, ce {ce_loss:.3f}, kd {kd_loss:.3f}, {tokens_per_second:.0f} tokens/s"
                bar.set_postfix_str(shown.format(**values), refresh=False)

            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step = step
            profiler.step()
            bar.update()

            if inputs.val_batches and (last or (cfg.run_val_every_n_steps and step % cfg.run_val_every_n_steps == 0)):
                values = validate(cfg, inputs, student, teacher)
                logger.log(step, values)
                bar.write(
                    f"step {step}: validation ce {values['val_ce_loss']:.3f}, KL to the teacher "
                    f"{values['val_kd_loss']:.3f}, top-1 agreement {values['val_agreement']:.1%}"
                )
                throughput.restart()
            if interrupt.has_come() or (cfg.save_every_n_steps and (last or step % cfg.save_every_n_steps == 0)):
                folder = run.save(in_background=cfg.save_in_background and not interrupt.received)
                throughput.restart()
                if interrupt.received and not last:
                    bar.close()
                    print(f"{interrupt.received.name}: saved {folder}; continue with resume_from_checkpoint=true")
                    raise SystemExit(interrupt.exit_code)

    found_by = writer.finish(run, devices.DTYPES[cfg.save_dtype or cfg.dtype])
    show(cfg, inputs, student, teacher, logger)
    logger.close()
    print(f"The student is in {run.output_dir}. Try it:\n{writer.commands(found_by)}")
    ranks.leave()


def build(
    cfg: Config, ranks: distributed.Ranks, resume_from: Path | None = None, first_batch: data.Batch | None = None
) -> tuple[models.Decoder, Teacher, optim.AdamW]:
    """Student, teacher and optimizer, in the order in which they are changed into what is trained."""
    dtype = devices.DTYPES[cfg.dtype]
    teacher = load_teacher(cfg, ranks, first_batch)
    shard = distributed.sharding(ranks, cfg.parallel, trains=True)
    student = checkpoint.load_start(cfg, resume_from, dtype=dtype, device=cfg.parallel.place(ranks.device), shard=shard)
    add_hidden_loss(student, cfg, ranks)
    if cfg.enable_activation_checkpointing:
        mode = cfg.activation_checkpointing_mode
        models.enable_activation_checkpointing(student, mode, cfg.enable_activation_offloading)
    if cfg.compile:
        models.compile_layers(student)
        teacher.compile()
    if cfg.gradient_accumulation_steps > 1 and ranks.size == 1:  # FSDP adds up in float32 by itself
        optim.accumulate_in_float32(student)
    optimizer = optim.build_optimizer(student, cfg.optimizer, seed=cfg.seed)
    if cfg.optimizer_in_bwd:
        optimizer.step_in_backward()
    return student, teacher, optimizer


def forward_backward(
    cfg: Config,
    student: models.Decoder,
    teacher: Teacher,
    micro_batches: Sequence[data.Batch],
    num_tokens: int,
    progress: float = 0.0,
    num_compared: int | None = None,
) -> Tensor:
    """Gradients of one optimizer step, and what is logged of it, as `losses.Loss.logged`: [4], or with pairs more.

    Args:
        micro_batches: all of the step, on the host.
        num_tokens: labels of all of them.
        progress: share of the run that is done, 0 to 1.
        num_compared: positions of all of them with hidden states that are compared; None: `num_tokens`.
    """
    of_teacher = student.beside.of_teacher if student.beside else ()
    logged: list[Tensor] = []
    losses_of: dict[int, Tensor] = {}  # micro-batches that went forward and not yet backward: one, without a pipeline
    for direction, i in pipeline_parallel.schedule(student, len(micro_batches)):
        if direction == "backward":
            with record_function("backward"):
                losses_of.pop(i).backward()
            continue
        # The teacher goes first: its activations are gone before the student's are kept for the backward.
        with record_function("teacher"):
            targets = teacher(micro_batches[i], of_teacher)
        batch = micro_batches[i].to(student.device)
        with record_function("student"):
            hidden, captured = run_student(student, batch, targets)
        with record_function("loss"):
            distances = compare_hidden(student, captured, targets, batch, num_compared or num_tokens)
            loss = objective(cfg, hidden, student.head, targets, batch, num_tokens, progress, distances)
        del captured, targets  # or the backward could free nothing of them
        losses_of[i] = loss.total
        logged.append(loss.logged())
    return torch.stack(logged).sum(0)


@dataclass
class Inputs:
    """What is known before a weight is read."""

    ranks: distributed.Ranks
    student_config: dict[str, Any]  # the student's config.json
    teacher: FoundTeacher
    tokenizer: tokenizers.Tokenizer
    companions: dict[str, bytes]  # files to save beside the weights
    loader: data.Loader | data.StreamLoader
    first_batch: data.Batch  # of it, to show what the teacher knows
    val_batches: dict[str, data.ValBatches]  # of each source; empty without dataset_val
    num_steps: int  # optimizer steps of the whole run
    lr_schedule: Callable[[int], float]  # step, from 1 -> learning rate
    resume_from: Path | None  # checkpoint of this run


def check(cfg: Config) -> Inputs:
    """Find whatever can be wrong before a weight is read, and say what is going to happen.

    Raises:
        ValueError, OSError: what is wrong, why it matters and what to do.
    """
    ranks = distributed.join(cfg.parallel, cfg.device)
    preflight.check_spread(cfg, ranks)
    if cfg.compile:
        devices.check_compiler(ranks.device)
    metrics.check_sinks(cfg.metric_logger)
    output_dir = Path(cfg.output_dir)
    tokenizer_path = cfg.tokenizer.path or cfg.checkpointer.tokenizer_dir
    start_from = None if cfg.lora is None else cfg.lora.start_from
    resume_from = checkpoint.prepare_output_dir(
        output_dir,
        resume=cfg.resume_from_checkpoint or checkpoint.is_started_again(output_dir, ranks),
        overwrite=cfg.overwrite_output_dir,
        sources=(
            *(cfg.checkpointer.checkpoint_dir, cfg.checkpointer.adapter_dir, start_from),
            *(*teacher_folders(cfg), tokenizer_path),
        ),
    )

    student_config = checkpoint.check_start(cfg.checkpointer, resume_from, cfg.lora)
    student = models.from_hf_config(student_config)
    check_settings(cfg, ranks.device)
    teacher = find_teacher(cfg)

    tokenizer = load_tokenizer(cfg)
    template = data.trained_template(tokenizer, cfg.dataset, cfg.dataset_val)
    companions = checkpoint.read_companions(cfg.checkpointer.checkpoint_dir, tokenizer_path, template)
    preflight.check_pair(tokenizer, teacher.tokenizer, student.vocab_size, teacher.vocab_size)
    prompts = [tokenizer.encode(prompt) for prompt in cfg.sample_prompts]
    for role, model in (("student", student), ("teacher", teacher.config)):
        if model is not None:
            preflight.check_prompts(prompts, cfg.sample_max_new_tokens, "sample_prompts", model, role)

    saving = preflight.check_saving(cfg, ranks, student)

    vocab_size = min(student.vocab_size, teacher.vocab_size)  # the student's tokenizer may know more than the teacher
    loaded = load_data(cfg, tokenizer, vocab_size, ranks)
    teacher.check_rows(loaded)
    profiling.check_profiler(cfg.profiler, loaded.num_steps)
    done = checkpoint.check_resume(resume_from, loaded.loader, loaded.num_steps)
    lr_schedule = optim.lr_schedule(cfg.optimizer.lr, cfg.lr_scheduler, loaded.num_steps)

    print(f"student   {preflight.describe_trained(cfg, student)}")
    print(f"teacher   {teacher}")
    print(f"data      {loaded.summary()}")
    steps = f"{loaded.num_steps} steps, {cfg.dtype} on {ranks.describe()}"
    print(f"run       {steps}, into {output_dir}, {done} done{saving}")
    print(f"memory    {planning.describe(cfg, build, forward_backward, ranks)}")
    ranks.wait()  # so that nobody writes while another still looks at what is there
    return Inputs(
        ranks=ranks,
        student_config=student_config,
        teacher=teacher,
        tokenizer=tokenizer,
        companions=companions,
        loader=loaded.loader,
        first_batch=next(data.batches(loaded.loader.examples, cfg.batch_size, ranks.share)),
        val_batches=loaded.val_batches,
        num_steps=loaded.num_steps,
        lr_schedule=lr_schedule,
        resume_from=resume_from,
    )


def check_settings(cfg: Config, device: torch.device) -> None:
    """Refuse settings that exclude each other, or do not go with the models. `kdtune plan` asks, too.

    Args:
        cfg: the settings; of each model `config.json` is read.
        device: where the run computes; `meta` is any GPU.

    Raises:
        ValueError, OSError: which settings, why and what to do.
    """
    student = models.from_hf_config(cfg.checkpointer.read_config())
    preflight.check_training(cfg, device, student)
    preflight.check_sequence_length(cfg.tokenizer.max_seq_len, "tokenizer.max_seq_len", student, "student")
    preflight.check_split(cfg.parallel, student, "student")
    check_teacher(cfg, device)


def load_tokenizer(cfg: Config) -> tokenizers.Tokenizer:
    """The student's own, unless another is named."""
    return tokenizers.load(cfg.tokenizer.path or cfg.checkpointer.tokenizer_dir)


def load_data(
    cfg: Config,
    tokenizer: tokenizers.Tokenizer,
    vocab_size: int | None = None,
    ranks: distributed.Ranks = distributed.ALONE,
) -> data.RunData:
    """What the run trains and validates on. `kdtune data` calls it, too, and so shows what the run will see.

    Args:
        vocab_size: ids that the models have; None: as many as the tokenizer.
    """
    return data.load_run(cfg, tokenizer, vocab_size, ranks.share)


def objective(
    cfg: Config,
    hidden: Tensor,
    head: nn.Linear,
    targets: losses.Targets | losses.SparseTargets,
    batch: data.Batch,
    num_tokens: int,
    progress: float,
    distances: Tensor | None = None,
) -> losses.Loss:
    """loss = (1 - kd_ratio) * ce + kd_ratio * (kd + hidden), each with its weight, of a part of `num_tokens` labels."""
    kd = cfg.kd_loss
    loss = losses.distillation_loss(
        hidden,
        head,
        batch.labels,
        num_tokens,
        targets,
        scored=batch.scored,
        ce_weight=(1 - cfg.kd_ratio) * cfg.ce_loss.weight,
        kd_weight=cfg.kd_ratio * kd.weight,
        divergence=losses.build_divergence(kd),
        temperature=kd.temperature,
        teacher_temperature=kd.teacher_temperature,
        scale_by_temperature_squared=kd.scale_by_temperature_squared,
        teacher_share=kd.initial_teacher_share + (1 - kd.initial_teacher_share) * progress,
        label_margin=kd.label_margin,
        balance=kd.balance,
        label_smoothing=cfg.ce_loss.label_smoothing,
        z_loss=cfg.ce_loss.z_loss,
        chunk_size=cfg.loss_chunk_size,
        compile=cfg.compile,
    )
    if cfg.hidden_loss is None or distances is None:
        return loss
    return losses.add_hidden(loss, distances, cfg.kd_ratio * cfg.hidden_loss.weight, balance=cfg.hidden_loss.balance)


def validate(cfg: Config, inputs: Inputs, student: models.Decoder, teacher: Teacher) -> dict[str, float]:
    """Means over the labelled tokens of the validation rows; of a blend also of each source: val_ce_loss/<name>."""
    return metrics.pool(
        {
            source: (evaluate(cfg, inputs, batches, student, teacher), batches.num_labels)
            for source, batches in inputs.val_batches.items()
        }
    )


@torch.no_grad()
def evaluate(
    cfg: Config, inputs: Inputs, batches: Iterable[data.Batch], student: models.Decoder, teacher: Teacher
) -> dict[str, float]:
    """Means over the labelled tokens of `batches`, in nats; always of the forward KL at temperature 1."""
    sums, num_tokens = torch.zeros(6, device=inputs.ranks.device), 0  # of this rank
    student.eval()
    for batch in batches:
        num_tokens += batch.num_labels
        targets = teacher(batch)
        batch = batch.to(inputs.ranks.device)
        hidden = student.hidden(batch.tokens, batch.positions, batch.documents)  # [b, s, d]
        # Of one token: sums, divided once at the end.
        loss = losses.distillation_loss(
            hidden,
            student.head,
            batch.labels,
            1,
            targets,
            scored=batch.scored,
            chunk_size=cfg.loss_chunk_size,
            with_metrics=True,
        )
        values = (loss.ce, loss.kd, loss.agreement, loss.student_entropy, loss.teacher_ce, loss.teacher_entropy)
        sums += torch.stack(values)
    student.train()
    names = ("val_ce_loss", "val_kd_loss", "val_agreement", "val_entropy", "val_teacher_ce_loss", "val_teacher_entropy")
    total = inputs.ranks.total(num_tokens)
    return dict(zip(names, (value / total for value in inputs.ranks.all_sum(sums)), strict=True))


def prove_teacher(cfg: Config, inputs: Inputs, student: models.Decoder, teacher: Teacher) -> None:
    """Show on the first rows that the teacher knows the text, and say loudly if it does not."""
    num_rows = len(inputs.first_batch.tokens)
    values = evaluate(cfg, inputs, [inputs.first_batch], student, teacher)
    print(f"teacher check on {num_rows} row{'s' * (num_rows > 1)}:", end=" ")
    print(f"KL(teacher, student) {values['val_kd_loss']:.3f}, {inputs.teacher.judge(values['val_teacher_ce_loss'])}")


def show(cfg: Config, inputs: Inputs, student: models.Decoder, teacher: Teacher, logger: metrics.MetricLogger) -> None:
    """Print what training has changed, and what both models make of `sample_prompts`."""
    before, after = (logger.logged(step, "val_ce_loss") for step in (0, inputs.num_steps))
    if before and after:
        print(metrics.closing_table(before, after))
    sampled = {"teacher": teacher.model} if teacher.model else {}
    sampled["student"] = student.eval()
    print(generation.compare(sampled, inputs.tokenizer, cfg.sample_prompts, cfg.sample_max_new_tokens))
