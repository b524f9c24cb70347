"""Fine-tune a model on labels alone: prepares a teacher, and is the baseline that a distilled student must beat.

    loss = ce = - log q(label)

It is summed over the labelled tokens of the whole optimizer step and divided by their number once, so a step means the
same however its rows are split into micro-batches. `knowledge_distillation` with kd_ratio=0 takes the same steps.

    kdtune run finetune --config quickstart
    kdtune run finetune checkpointer.checkpoint_dir=models/Llama-3.1-8B dataset.source=rows.jsonl output_dir=runs/8B
    kdtune run --nproc-per-node 8 finetune checkpointer.checkpoint_dir=models/Llama-3.1-8B ...

With checkpointer.random_weights=true it trains a model of the shape in config.json from nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
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


@dataclass
class Config:
    """Every setting of this recipe."""

    checkpointer: checkpoint.StartCheckpointerConfig = setting(checkpoint.StartCheckpointerConfig)  # the model
    lora: models.LoraConfig | None = None  # train an adapter instead of the weights; null: the weights
    qat: models.QATConfig | None = None  # round weights in training, for a model of few bits; null: not
    tokenizer: tokenizers.TokenizerConfig = setting(tokenizers.TokenizerConfig)  # of the model
    ce_loss: losses.CELossConfig = setting(losses.CELossConfig)  # the cross-entropy on the labels
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
    device: str = "cuda"  # cuda, cuda:1, cpu; refused if it is not there
    dtype: devices.Dtype = "bf16"  # of weights and gradients; losses are always float32
    matmul_precision: devices.MatmulPrecision = "highest"  # of float32 products; high: TF32 on GPUs, medium: bf16
    enable_activation_checkpointing: bool = False  # recompute activations in the backward: less memory, a third slower
    activation_checkpointing_mode: models.CheckpointingMode = "full"  # recompute: full: all; selective: no products
    enable_activation_offloading: bool = False  # what checkpointing keeps goes to host memory until it is needed
    loss_chunk_size: int | None = setting(None, gt=0)  # labelled tokens whose logits exist at one time; null: automatic
    compile: bool = False  # torch.compile layers and loss: faster after a minute; on a CPU it needs a C++ compiler

    output_dir: str = setting(MISSING, path=True)  # metrics, checkpoints and the finished model go here
    save_dtype: devices.Dtype | None = None  # of the finished model's weights; null: dtype
    save_every_n_steps: int = setting(0, ge=0)  # optimizer steps between checkpoints to resume from; 0: none
    save_in_background: bool = False  # write checkpoints while training goes on, from a copy in host memory
    resume_from_checkpoint: bool = False  # continue the run in output_dir from its newest checkpoint
    overwrite_output_dir: bool = False  # if not resuming, delete the run that output_dir holds
    run_val_every_n_steps: int = setting(0, ge=0)  # optimizer steps between validations; 0: only before and after
    log_every_n_steps: int = setting(1, gt=0)  # optimizer steps between lines in metrics.jsonl
    metric_logger: metrics.MetricLoggerConfig = setting(metrics.MetricLoggerConfig)  # other places for metrics
    profiler: profiling.ProfilerConfig = setting(profiling.ProfilerConfig)  # a record of what some steps do
    sample_prompts: list[str] = setting([])  # texts that the model continues greedily at the end
    sample_max_new_tokens: int = setting(64, gt=0)  # length of those continuations


def main(cfg: Config) -> None:
    inputs = check(cfg)
    ranks = inputs.ranks
    torch.set_float32_matmul_precision(cfg.matmul_precision)

    model, optimizer = build(cfg, ranks, inputs.resume_from)

    writer = checkpoint.ModelWriter(model, cfg, inputs.model_config, inputs.companions, optimizer.master, ranks)
    torch.manual_seed(cfg.seed + ranks.rank)  # of dropout; a run that is resumed gets its own states back
    run = checkpoint.Run(Path(cfg.output_dir), inputs.resume_from, writer, optimizer=optimizer, loader=inputs.loader)
    run.record(config.to_yaml(cfg), recipe=Path(__file__))
    logger = metrics.MetricLogger(run.output_dir, cfg.metric_logger, dataclasses.asdict(cfg), run.step, ranks.is_first)

    if inputs.val_batches and run.step == 0:
        logger.log(0, validate(cfg, inputs, model))

    throughput = metrics.Throughput()
    profiler = profiling.Profiler(cfg.profiler, run.output_dir / "profile" / ranks.folder, ranks.device, run.step)
    with Interrupt(ranks.any) as interrupt, metrics.progress_bar(inputs.num_steps, run.step) as bar, profiler, run:
        for step in range(run.step + 1, inputs.num_steps + 1):
            # The whole step is fetched first: its label count normalises every micro-batch.
            micro_batches = inputs.loader.next_step()
            num_tokens = ranks.total(data.count_labels(micro_batches))
            optim.set_lr(optimizer, inputs.lr_schedule(step))
            loss_sum = forward_backward(cfg, model, micro_batches, num_tokens)
            norm = optimizer.clip_grad_norm(cfg.clip_grad_norm)
            throughput.add(num_tokens)
            last = step == inputs.num_steps
            if last or step % cfg.log_every_n_steps == 0:
                # Reading the numbers waits for the device, which is why it is not done in every step.
                loss_value, grad_norm = ranks.all_sum(loss_sum[None])[0], norm.item()
                if not math.isfinite(loss_value + grad_norm):
                    raise run.not_finite(step, loss_value, grad_norm, applied=cfg.optimizer_in_bwd)
                values = {
                    "loss": loss_value,
                    **{f"epochs/{source}": epochs for source, epochs in inputs.loader.source_epochs().items()},
                    "lr": inputs.lr_schedule(step),
                    "grad_norm": grad_norm,
                    "num_tokens": num_tokens,
                    "tokens_per_second": throughput.read(),
                    **metrics.peak_memory(ranks),
                }
                logger.log(step, values)
                bar.set_postfix_str("loss {loss:.3f}, {tokens_per_second:.0f} tokens/s".format(**values), refresh=False)

            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step = step
            profiler.step()
            bar.update()

            if inputs.val_batches and (last or (cfg.run_val_every_n_steps and step % cfg.run_val_every_n_steps == 0)):
                values = validate(cfg, inputs, model)
                logger.log(step, values)
                bar.write(f"step {step}: validation loss {values['val_loss']:.3f}")
                throughput.restart()
            if interrupt.has_come() or (cfg.save_every_n_steps and (last or step % cfg.save_every_n_steps == 0)):
                folder = run.save(in_background=cfg.save_in_background and not interrupt.received)
                throughput.restart()
                if interrupt.received and not last:
                    bar.close()
                    print(f"{interrupt.received.name}: saved {folder}; continue with resume_from_checkpoint=true")
                    raise SystemExit(interrupt.exit_code)

    found_by = writer.finish(run, devices.DTYPES[cfg.save_dtype or cfg.dtype])
    before, after = (logger.logged(step, "val_loss") for step in (0, run.step))
    if before and after:
        print(f"validation loss {before['val_loss']:.3f} before, {after['val_loss']:.3f} after")
    logger.close()
    print(generation.compare({"model": model.eval()}, inputs.tokenizer, cfg.sample_prompts, cfg.sample_max_new_tokens))
    print(f"The model is in {run.output_dir}. Try it:\n{writer.commands(found_by)}")
    ranks.leave()


def build(cfg: Config, ranks: distributed.Ranks, resume_from: Path | None = None) -> tuple[models.Decoder, optim.AdamW]:
    """Model and optimizer, in the order in which they are changed into what is trained."""
    dtype = devices.DTYPES[cfg.dtype]
    shard = distributed.sharding(ranks, cfg.parallel, trains=True)
    model = checkpoint.load_start(cfg, resume_from, dtype=dtype, device=cfg.parallel.place(ranks.device), shard=shard)
    if cfg.enable_activation_checkpointing:
        mode = cfg.activation_checkpointing_mode
        models.enable_activation_checkpointing(model, mode, cfg.enable_activation_offloading)
    if cfg.compile:
        models.compile_layers(model)
    if cfg.gradient_accumulation_steps > 1 and ranks.size == 1:  # FSDP adds up in float32 by itself
        optim.accumulate_in_float32(model)
    optimizer = optim.build_optimizer(model, cfg.optimizer, seed=cfg.seed)
    if cfg.optimizer_in_bwd:
        optimizer.step_in_backward()
    return model, optimizer


def forward_backward(
    cfg: Config, model: models.Decoder, micro_batches: Sequence[data.Batch], num_tokens: int
) -> Tensor:
    """Gradients of one optimizer step, and its loss.

    Args:
        micro_batches: all of the step, on the host.
        num_tokens: labels of all of them.
    """
    device = model.device
    loss_sum = torch.zeros((), device=device)
    losses_of: dict[int, Tensor] = {}  # micro-batches that went forward and not yet backward: one, without a pipeline
    for direction, i in pipeline_parallel.schedule(model, len(micro_batches)):
        if direction == "backward":
            with record_function("backward"):
                losses_of.pop(i).backward()
            continue
        batch = micro_batches[i].to(device)
        with record_function("model"):
            hidden = model.hidden(batch.tokens, batch.positions, batch.documents)  # [b, s, d]
        with record_function("loss"):
            loss = objective(cfg, hidden, model.head, batch, num_tokens)
        losses_of[i] = loss.total
        loss_sum += loss.total.detach()
    return loss_sum


@dataclass
class Inputs:
    """What is known before a weight is read."""

    ranks: distributed.Ranks
    model_config: dict[str, Any]  # the model's config.json
    tokenizer: tokenizers.Tokenizer
    companions: dict[str, bytes]  # files to save beside the weights
    loader: data.Loader | data.StreamLoader
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
        sources=(cfg.checkpointer.checkpoint_dir, cfg.checkpointer.adapter_dir, start_from, tokenizer_path),
    )

    model_config = checkpoint.check_start(cfg.checkpointer, resume_from, cfg.lora)
    model = models.from_hf_config(model_config)
    check_settings(cfg, ranks.device)

    tokenizer = load_tokenizer(cfg)
    template = data.trained_template(tokenizer, cfg.dataset, cfg.dataset_val)
    companions = checkpoint.read_companions(cfg.checkpointer.checkpoint_dir, tokenizer_path, template)
    preflight.check_vocabulary(tokenizer, model.vocab_size, "model")
    prompts = [tokenizer.encode(prompt) for prompt in cfg.sample_prompts]
    preflight.check_prompts(prompts, cfg.sample_max_new_tokens, "sample_prompts", model, "model")

    saving = preflight.check_saving(cfg, ranks, model)

    loaded = load_data(cfg, tokenizer, model.vocab_size, ranks)
    profiling.check_profiler(cfg.profiler, loaded.num_steps)
    done = checkpoint.check_resume(resume_from, loaded.loader, loaded.num_steps)
    lr_schedule = optim.lr_schedule(cfg.optimizer.lr, cfg.lr_scheduler, loaded.num_steps)

    print(f"model     {preflight.describe_trained(cfg, model)}")
    print(f"data      {loaded.summary()}")
    steps = f"{loaded.num_steps} steps, {cfg.dtype} on {ranks.describe()}"
    print(f"run       {steps}, into {output_dir}, {done} done{saving}")
    print(f"memory    {planning.describe(cfg, build, forward_backward, ranks)}")
    ranks.wait()  # so that nobody writes while another still looks at what is there
    return Inputs(
        ranks=ranks,
        model_config=model_config,
        tokenizer=tokenizer,
        companions=companions,
        loader=loaded.loader,
        val_batches=loaded.val_batches,
        num_steps=loaded.num_steps,
        lr_schedule=lr_schedule,
        resume_from=resume_from,
    )


def check_settings(cfg: Config, device: torch.device) -> None:
    """Refuse settings that exclude each other, or do not go with the model. `kdtune plan` asks, too.

    Args:
        cfg: the settings; of the model `config.json` is read.
        device: where the run computes; `meta` is any GPU.

    Raises:
        ValueError, OSError: which settings, why and what to do.
    """
    model = models.from_hf_config(cfg.checkpointer.read_config())
    preflight.check_training(cfg, device, model)
    preflight.check_sequence_length(cfg.tokenizer.max_seq_len, "tokenizer.max_seq_len", model, "model")
    preflight.check_split(cfg.parallel, model, "model")


def load_tokenizer(cfg: Config) -> tokenizers.Tokenizer:
    """The model's own, unless another is named."""
    return tokenizers.load(cfg.tokenizer.path or cfg.checkpointer.tokenizer_dir)


def load_data(
    cfg: Config,
    tokenizer: tokenizers.Tokenizer,
    vocab_size: int | None = None,
    ranks: distributed.Ranks = distributed.ALONE,
) -> data.RunData:
    """What the run trains and validates on. `kdtune data` calls it, too, and so shows what the run will see.

    Args:
        vocab_size: ids that the model has; None: as many as the tokenizer.
    """
    return data.load_run(cfg, tokenizer, vocab_size, ranks.share)


def objective(cfg: Config, hidden: Tensor, head: nn.Linear, batch: data.Batch, num_tokens: int) -> losses.Loss:
    """loss = ce with its weight, for one micro-batch of a step with `num_tokens` labels."""
    return losses.distillation_loss(
        hidden,
        head,
        batch.labels,
        num_tokens,
        scored=batch.scored,
        ce_weight=cfg.ce_loss.weight,
        label_smoothing=cfg.ce_loss.label_smoothing,
        z_loss=cfg.ce_loss.z_loss,
        chunk_size=cfg.loss_chunk_size,
        compile=cfg.compile,
    )


@torch.no_grad()
def validate(cfg: Config, inputs: Inputs, model: models.Decoder) -> dict[str, float]:
    """Mean over the labelled tokens of the validation rows, in nats; of a blend also of each: val_loss/<name>."""
    found = {}
    model.eval()
    for source, batches in inputs.val_batches.items():
        loss_sum, num_tokens = torch.zeros((), device=inputs.ranks.device), batches.num_labels
        for batch in batches:
            batch = batch.to(inputs.ranks.device)
            hidden = model.hidden(batch.tokens, batch.positions, batch.documents)  # [b, s, d]
            loss_sum += objective(cfg, hidden, model.head, batch, num_tokens).ce
        found[source] = {"val_loss": inputs.ranks.all_sum(loss_sum[None])[0]}, num_tokens
    model.train()
    return metrics.pool(found)
