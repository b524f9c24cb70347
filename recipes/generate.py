"""Continue prompts with a model: greedily, or by sampling.

    kdtune run generate --config quickstart prompt="Question: Tom has 3 apples"
    kdtune run generate checkpointer.checkpoint_dir=runs/llama/model prompts_file=prompts.txt chat=true \\
        temperature=0.7 top_p=0.9
    kdtune run --nproc-per-node 8 generate checkpointer.checkpoint_dir=models/70B prompt=Hello parallel.tensor=8

All prompts go through the model together, with cached keys and values; a row never depends on its neighbours.

Temperature, top-k and top-p (nucleus) sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration",
arXiv:1904.09751.
"""

import json
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from kdtune import checkpoint, devices, distributed, generation, models, preflight, tokenizers
from kdtune.config import setting
from kdtune.printable import TEXT, visible


@dataclass
class Config:
    """Every setting of this recipe."""

    prompt: str | None = None  # text to continue, or with chat=true the user's turn
    prompts_file: str | None = setting(None, path=True)  # a text file with one prompt per line, instead of prompt
    chat: bool = False  # put each prompt into the model's chat template
    system_prompt: str | None = None  # first turn of the chat; null: none

    checkpointer: checkpoint.CheckpointerConfig = setting(checkpoint.CheckpointerConfig)  # the model

    max_new_tokens: int = setting(128, gt=0)  # length at which a continuation is cut
    temperature: float = setting(0.0, ge=0)  # divides the logits before sampling; 0 takes the likeliest token each time
    top_k: int | None = setting(None, gt=0)  # sample among the k likeliest tokens; null: all
    top_p: float | None = setting(None, gt=0, le=1)  # sample among the likeliest tokens that hold this mass; null: all
    num_samples: int = setting(1, gt=0)  # continuations of each prompt
    batch_size: int = setting(16, gt=0)  # prompts that go through the model together
    seed: int = setting(0, ge=0)  # of the sampling

    parallel: distributed.ParallelConfig = setting(distributed.ParallelConfig)  # over processes; one needs none of it
    device: str = "cuda"  # cuda, cuda:1, cpu; refused if it is not there
    dtype: devices.Dtype = "bf16"  # of the weights
    output_file: str | None = setting(None, path=True)  # JSON lines {"prompt", "continuation"} go here, too; null: none


def main(cfg: Config) -> None:
    inputs = check(cfg)
    ranks = inputs.ranks
    model = checkpoint.load_model(
        cfg.checkpointer.checkpoint_dir,
        dtype=devices.DTYPES[cfg.dtype],
        device=cfg.parallel.place(ranks.device),
        adapter_dir=cfg.checkpointer.adapter_dir,
        shard=distributed.sharding(ranks, cfg.parallel, trains=False),
    ).eval()

    results: list[dict[str, str]] = []
    num_tokens, started = 0, time.perf_counter()
    for start in range(0, len(inputs.rows), cfg.batch_size * ranks.num_replicas):
        first = start + cfg.batch_size * ranks.replica  # each of them takes a batch
        rows = inputs.rows[first : first + cfg.batch_size]
        new_tokens = generation.generate(
            model,
            [row.tokens for row in rows],
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            stop_ids=inputs.tokenizer.eos_ids,
            seed=cfg.seed,
            rows=range(first, first + len(rows)),  # each has its own random numbers, whatever the batch size
        )
        found = dict(ranks.gather((first, new_tokens)))  # those that hold a model together found the same
        for tokens in chain(*(found[first] for first in sorted(found))):
            prompt = inputs.rows[len(results)].prompt
            results.append({"prompt": prompt, "continuation": inputs.tokenizer.decode(tokens)})
            print(visible(f"--- {prompt}\n{results[-1]['continuation']}\n", keep=TEXT), flush=True)
            num_tokens += len(tokens)
    print(f"{num_tokens} tokens, {num_tokens / (time.perf_counter() - started):.0f} tokens/s")

    if cfg.output_file is not None and ranks.is_first:
        lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
        Path(cfg.output_file).write_text("".join(lines), encoding="utf-8")
    ranks.leave()


@dataclass
class Row:
    """One continuation to make."""

    prompt: str
    tokens: list[int]


@dataclass
class Inputs:
    """What is known before a weight is read."""

    ranks: distributed.Ranks
    tokenizer: tokenizers.Tokenizer
    rows: list[Row]


def check(cfg: Config) -> Inputs:
    """Find whatever can be wrong before a weight is read.

    Raises:
        ValueError, OSError: what is wrong, why it matters and what to do.
    """
    ranks = distributed.join(cfg.parallel, cfg.device)
    if cfg.parallel.context > 1:
        raise ValueError(
            f"parallel.context={cfg.parallel.context} gives processes slices of rows, and a row that is continued "
            "comes token by token. Take parallel.tensor or parallel.data_shard for a model that is too large for one "
            "process, and parallel.data_replicate for many prompts."
        )
    preflight.check_without_backward(cfg.parallel, "parallel")
    preflight.check_offloading(cfg.parallel, ranks, "parallel")
    if cfg.temperature == 0 and (cfg.top_k or cfg.top_p or cfg.num_samples > 1):
        raise ValueError(
            "temperature=0 takes the likeliest token each time, so top_k, top_p and num_samples change nothing. Sample "
            "with a temperature above 0, or leave them out."
        )
    if cfg.system_prompt is not None and not cfg.chat:
        raise ValueError("system_prompt is a turn of a chat: give chat=true with it, or put the text into the prompt.")
    if (cfg.prompt is None) == (cfg.prompts_file is None):
        raise ValueError("Give prompt=... (one text) or prompts_file=... (one prompt per line), and not both.")
    if cfg.output_file is not None and cfg.output_file == cfg.prompts_file:
        raise ValueError(f"output_file and prompts_file are both {cfg.output_file}: results would replace the prompts.")
    if cfg.output_file is not None and not Path(cfg.output_file).absolute().parent.is_dir():
        raise FileNotFoundError(f"output_file={cfg.output_file} is in a folder that does not exist. Make it first.")
    prompts = [cfg.prompt] if cfg.prompt is not None else read_prompts(cfg.prompts_file or "")

    model = models.from_hf_config(checkpoint.check_model(cfg.checkpointer))
    tokenizer = tokenizers.load(cfg.checkpointer.tokenizer_dir, cfg.checkpointer.checkpoint_dir)
    preflight.check_vocabulary(tokenizer, model.vocab_size, "model")
    preflight.check_split(cfg.parallel, model, "model")

    rows = [Row(prompt, encode(cfg, tokenizer, prompt)) for prompt in prompts for _ in range(cfg.num_samples)]
    setting = "prompt" if cfg.prompts_file is None else "prompts_file"
    different = [row.tokens for row in rows[:: cfg.num_samples]]
    preflight.check_prompts(different, cfg.max_new_tokens, setting, model, "model")
    print(preflight.describe(cfg.checkpointer.checkpoint_dir, model))
    print(f"{len(rows)} continuation{'s' * (len(rows) > 1)}, {cfg.dtype} on {ranks.describe()}\n")
    return Inputs(ranks, tokenizer, rows)


def read_prompts(path: str) -> list[str]:
    """One prompt per line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompts_file={path}: no such file (from {Path.cwd()}).")
    prompts = Path(path).read_text(encoding="utf-8").splitlines()
    if not prompts:
        raise ValueError(f"prompts_file={path} is empty: there is nothing to continue.")
    return prompts


def encode(cfg: Config, tokenizer: tokenizers.Tokenizer, prompt: str) -> list[int]:
    """The ids that the model continues."""
    if not cfg.chat:
        return tokenizer.encode(prompt)
    system = [{"role": "system", "content": cfg.system_prompt}] if cfg.system_prompt is not None else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": prompt}], add_generation_prompt=True)
