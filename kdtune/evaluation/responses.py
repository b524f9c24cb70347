"""Responses to prompts that have references: what a model says, sampled with several seeds, and how near that comes.

As Super-NaturalInstructions, MiniLLM (Gu et al. 2023, arXiv:2306.08543) and DistiLLM (Ko et al. 2024, arXiv:2402.03898)
do: at temperature 1 with five seeds, ROUGE-L against the reference, its mean over prompts and seeds. The standard error
is over prompts, each with the mean of its seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kdtune.config import setting
from kdtune.data import IGNORE, Blend, DatasetConfig, Examples, check_validation
from kdtune.data import load as load_examples
from kdtune.data.config import SourceConfig, WeightedSourceConfig
from kdtune.evaluation import estimates
from kdtune.evaluation.results import Example, Response, Result, named_settings
from kdtune.evaluation.rouge import rouge_l
from kdtune.generation import generate
from kdtune.models import Decoder
from kdtune.tokenizers import Tokenizer

_SECTION = "responses.dataset"


@dataclass
class ResponsesConfig:
    """Prompts, and how they are answered."""

    dataset: DatasetConfig = setting(DatasetConfig)  # rows of prompt and reference: instruct, completion or chat
    max_new_tokens: int = setting(256, gt=0)  # length at which a response is cut
    temperature: float = setting(1.0, ge=0)  # divides the logits before sampling; 0 takes the likeliest token each time
    top_k: int | None = setting(None, gt=0)  # sample among the k likeliest tokens; null: all
    top_p: float | None = setting(None, gt=0, le=1)  # sample among the likeliest tokens that hold this mass; null: all
    seeds: list[int] = setting([10, 20, 30, 40, 50], ge=0)  # of the sampling; a response to each prompt for each


@dataclass(frozen=True)
class Prompt:
    """One of them.

    Attributes:
        id: a hash of prompt and reference, as in `Examples.ids`.
        tokens: what the model continues.
        reference: what it should say.
        subset: the source of a blend; None: there is one.
    """

    id: int
    tokens: list[int]
    reference: str
    subset: str | None


AnySource = TypeVar("AnySource", DatasetConfig, WeightedSourceConfig)
Said = dict[tuple[str | None, int, int], list[int]]  # subset, id and seed -> new tokens


def check(cfg: ResponsesConfig) -> None:
    """Refuse settings that exclude each other, or say nothing here.

    Raises:
        ValueError: which, why and what to do.
    """
    if not cfg.seeds or len(set(cfg.seeds)) < len(cfg.seeds):
        raise ValueError(f"responses.seeds={cfg.seeds}: give at least one, and each once.")
    if cfg.temperature == 0 and (cfg.top_k or cfg.top_p or len(cfg.seeds) > 1):
        raise ValueError(
            "responses.temperature=0 takes the likeliest token each time, so top_k, top_p and more than one of seeds "
            "change nothing. Leave them out (responses.seeds=[0]), or sample with a temperature above 0."
        )
    check_validation(cfg.dataset, _SECTION)
    if cfg.dataset.packed or cfg.dataset.group_by_length is not None:
        raise ValueError(
            f"{_SECTION}.packed and {_SECTION}.group_by_length are about rows of a batch, and prompts are answered in "
            "batches of their length. Leave them out."
        )
    sections: dict[str, SourceConfig] = {
        f"{_SECTION}.sources.{name}": source for name, source in cfg.dataset.sources.items()
    }
    for name, source in (sections or {_SECTION: cfg.dataset}).items():
        for setting_name, is_wrong, why in (
            ("format", source.format == "text", "has no prompts: take instruct, completion or chat"),
            ("train_on_input", source.train_on_input, "makes a reference of the prompt. Leave it out"),
            (
                "too_long",
                source.too_long in ("truncate", "split"),
                "cuts references: rows that are too long are left out",
            ),
        ):
            if is_wrong:
                raise ValueError(f"{name}.{setting_name}={getattr(source, setting_name)} {why}.")


def load(
    cfg: ResponsesConfig, tokenizer: Tokenizer, max_seq_len: int, vocab_size: int
) -> tuple[Examples | Blend, list[Prompt]]:
    """The rows, and the prompts with references in them.

    Of a chat the last turn is the reference. Rows of more than max_seq_len tokens are left out.

    Raises:
        FileNotFoundError, ValueError: as `data.load`.
    """
    dataset = dataclasses.replace(
        cfg.dataset if cfg.dataset.sources else _whole(cfg.dataset),
        sources={name: _whole(source) for name, source in cfg.dataset.sources.items()},
    )
    examples = load_examples(dataset, tokenizer, max_seq_len, name=_SECTION, vocab_size=vocab_size)
    named: Iterable[tuple[str | None, Examples]] = [(None, examples)] if isinstance(examples, Examples) else []
    if isinstance(examples, Blend):
        named = examples.sources.items()
    return examples, [prompt for name, one in named for prompt in _prompts(one, name, tokenizer)]


def _whole(source: AnySource) -> AnySource:
    """Settings of a source whose references are neither cut nor more than one in a row."""
    return dataclasses.replace(source, too_long="drop", train_on_last_turn=source.format == "chat")


def _prompts(examples: Examples, subset: str | None, tokenizer: Tokenizer) -> Iterator[Prompt]:
    for i, id in enumerate(examples.ids.tolist()):
        inputs, labels = examples[i]
        ids = [*inputs.tolist(), int(labels[-1])]
        unlabelled = (labels == IGNORE).nonzero()[:, 0]
        start = 1 + (int(unlabelled[-1]) + 1 if len(unlabelled) else 0)  # of the last run of labels
        yield Prompt(id, ids[:start], tokenizer.decode(ids[start:]), subset)


def in_batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Prompts of similar length, the longest first."""
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.id))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def respond(model: Decoder, prompts: Sequence[Prompt], cfg: ResponsesConfig, seed: int, tokenizer: Tokenizer) -> Said:
    """Have a model answer some prompts together, which does not change what it says to each.

    Random numbers are those of the seed and of the prompt's content, whatever its place.
    """
    new_tokens = generate(
        model,
        [prompt.tokens for prompt in prompts],
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop_ids=tokenizer.eos_ids,
        seed=seed,
        rows=[prompt.id for prompt in prompts],
    )
    return {(one.subset, one.id, seed): tokens for one, tokens in zip(prompts, new_tokens, strict=True)}


def settings(cfg: ResponsesConfig) -> dict[str, str]:
    """What responses depend on beside model and prompt, as in `Evaluation`."""
    return named_settings({name: value for name, value in vars(cfg).items() if name != "dataset"})


def score(
    said: Said, prompts: Sequence[Prompt], cfg: ResponsesConfig, tokenizer: Tokenizer
) -> tuple[list[Result], list[Example], list[Response]]:
    """Metrics, of all seeds, of each subset and of each seed; what each prompt adds; and the texts."""
    responses: list[Response] = []
    by_seed: list[list[Example]] = [[] for _ in cfg.seeds]
    examples: list[Example] = []
    for prompt in prompts:
        id = f"{prompt.id:016x}"
        tokens = [said[prompt.subset, prompt.id, seed] for seed in cfg.seeds]
        texts = [tokenizer.decode(one) for one in tokens]
        scores = [rouge_l(text, prompt.reference) for text in texts]
        of_seeds = [
            {"rouge_l": value, "response_tokens": float(len(one)), "ended": float(one[-1] in tokenizer.eos_ids)}
            for value, one in zip(scores, tokens, strict=True)
        ]
        for found, values, one in zip(by_seed, of_seeds, tokens, strict=True):
            found.append(Example("responses", id, None, len(one), values=values))
        means = {name: sum(values[name] for values in of_seeds) / len(of_seeds) for name in of_seeds[0]}
        examples.append(Example("responses", id, prompt.subset, sum(map(len, tokens)), values=means))
        text = tokenizer.decode(prompt.tokens, skip_special_tokens=False)
        responses.append(Response(id, text, prompt.reference, texts, scores))
    results = estimates.results("responses", examples)
    if len(cfg.seeds) > 1:
        results += [
            estimates.result("responses", found, f"seed {seed}") for seed, found in zip(cfg.seeds, by_seed, strict=True)
        ]
    return results, examples, responses
