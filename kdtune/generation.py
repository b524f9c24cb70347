"""Continue prompts, many at a time, with keys and values cached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kdtune.documents import Documents
from kdtune.models import Decoder, KVCache
from kdtune.printable import TEXT, visible
from kdtune.tokenizers import Tokenizer


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    ends: Callable[[list[int]], bool] | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt until one of `stop_ids`, until it `ends`, or to `max_new_tokens`.

    A row's continuation depends on its own prompt alone, and when sampling on `seed` and its number: rows are padded on
    the right, and each has its own random numbers.

    Args:
        model: in any dtype, on any device.
        prompts: token ids, of any lengths.
        max_new_tokens: > 0.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens only. None: all.
        top_p: sample among the fewest likeliest tokens whose probabilities add up to this (nucleus sampling, Holtzman
            et al. 2019), after `temperature` and `top_k`. None: all.
        stop_ids: tokens that end a row.
        ends: whether the new tokens of a row, of which the last has just come, are all of it.
        seed: of the sampling, >= 0.
        rows: numbers of the prompts, >= 0, by which they have their random numbers; None: counted from 0.

    Returns:
        The new tokens of each row; the last is that which ended it, if one did.

    Raises:
        ValueError: an empty prompt, or a setting out of range.
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    if not prompts:
        return []
    device = model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [b]
    longest = int(lengths.max())
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    cache = KVCache(longest + max_new_tokens - 1)
    # Not seed + row: the second row of one seed would be the first of the next.
    generators = [np.random.default_rng([seed, row]) for row in (range(len(prompts)) if rows is None else rows)]
    stops = torch.tensor(sorted(stop_ids), device=device, dtype=torch.int64)

    # Marking the padding costs the fast causal attention, and only dynamic rope looks at the length of a row.
    documents = None
    if model.config.rope.type == "dynamic":
        documents = Documents.in_rows([len(prompt)] for prompt in prompts).to(device)
    hidden = model.hidden(tokens, documents=documents, cache=cache)  # [b, s, d]
    hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # [b, d], the last of each prompt

    stopped = torch.zeros_like(lengths, dtype=torch.bool)
    sizes: list[int | None] = [None] * len(prompts)  # of rows that have ended
    steps = []  # of [b]
    for position in range(max_new_tokens):
        logits = model.head(hidden).float()  # [b, v]
        if temperature == 0:
            chosen = logits.argmax(dim=-1)  # [b]
        else:
            draws = torch.tensor([generator.random(dtype=np.float32) for generator in generators])
            chosen = sample(logits / temperature, draws.to(logits.device), top_k=top_k, top_p=top_p)
        steps.append(chosen)
        stopped |= torch.isin(chosen, stops)
        if ends is not None:
            for row, tokens_of_row in enumerate(torch.stack(steps, dim=1).tolist()):
                if sizes[row] is None and ends(tokens_of_row):
                    sizes[row] = len(tokens_of_row)
            stopped |= torch.tensor([size is not None for size in sizes], device=device)
        if position == max_new_tokens - 1 or ((stop_ids or ends) and bool(stopped.all())):
            break
        hidden = model.hidden(chosen[:, None], positions=(lengths + position)[:, None], cache=cache)[:, 0]  # [b, d]
    of_all = torch.stack(steps, dim=1).tolist()
    return [_until_stop(row[:size], stop_ids) for row, size in zip(of_all, sizes, strict=True)]


def sample(logits: Tensor, draws: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Pick one token per row by inverting the cumulative distribution, likeliest token first.

    Args:
        logits: [b, v], already divided by the temperature.
        draws: [b], uniform in [0, 1): the randomness of each row.
        top_k: as in `generate`.
        top_p: as in `generate`.

    Returns:
        [b], int64.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)  # [b, v]
    if top_k is not None:
        ordered, ids = ordered[:, :top_k], ids[:, :top_k]
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)  # [b, k]
    total = cumulative[:, -1:].contiguous()
    if top_p is not None:
        total = total.clamp(max=top_p)
    # The first token that brings the sum to `total` is the last that may be drawn.
    last = torch.searchsorted(cumulative, total)  # [b, 1]
    total = cumulative.gather(1, last)
    picked = torch.searchsorted(cumulative, draws[:, None] * total, right=True)
    picked = torch.minimum(picked, last)  # the product may round up to `total`
    return ids.gather(1, picked)[:, 0]


def compare(
    named_models: Mapping[str, Decoder], tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> str:
    """Greedy continuations of each prompt, those of the models below each other, as text to print."""
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    continuations = {
        name: generate(model, tokens, max_new_tokens=max_new_tokens, stop_ids=tokenizer.eos_ids)
        for name, model in named_models.items()
    }
    return "\n".join(
        "\n" + side_by_side(prompt, {name: tokenizer.decode(new[row]) for name, new in continuations.items()})
        for row, prompt in enumerate(prompts)
    )


def side_by_side(prompt: str, continuations: Mapping[str, str]) -> str:
    """A prompt and what models made of it, below each other, with nothing in it that a terminal would obey.

    Args:
        prompt: text.
        continuations: text by the model's name.
    """
    texts = {"prompt": prompt, **continuations}
    width = max(map(len, texts)) + 2
    return "\n".join(f"{name + ':':<{width}}{visible(text, keep=TEXT)}" for name, text in texts.items())


def _until_stop(row: list[int], stop_ids: Collection[int]) -> list[int]:
    for index, token in enumerate(row):
        if token in stop_ids:
            return row[: index + 1]
    return row


def _check(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if empty := [row for row, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"Prompt {empty[0]} has no tokens, and there is nothing to continue. Give it at least a bos.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (the likeliest token each time) or above.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or null for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or null for all tokens.")
