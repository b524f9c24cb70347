"""kdtune's models for lm-evaluation-harness, which asks them for log-likelihoods and texts.

Biderman et al. 2024, "Lessons from the Trenches on Reproducible Evaluation of Language Models", arXiv:2405.14782.
Requests are encoded, cut and scored as its own `hf` models do (lm-eval 0.4.13), so that figures can be held against
those of others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from kdtune import generation
from kdtune.distributed import ALONE, Ranks
from kdtune.evaluation import scoring
from kdtune.evaluation.scoring import Request
from kdtune.metrics import token_bar
from kdtune.models import Decoder
from kdtune.tokenizers import Tokenizer

_CUT_HERE = "kdtune_cuts_here "  # no template strips what is before it, nor lets it out


@dataclass(frozen=True)
class Generation:
    """How a task has texts generated.

    Attributes:
        until: texts that end one, and are no part of it.
        max_new_tokens: at which it is cut.
        temperature: of drawing; 0 takes the likeliest token each time.
        top_k: see `kdtune.generation.generate`; None: all.
        top_p: likewise.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], tokenizer: Tokenizer) -> Generation:
        """From a task's `generation_kwargs`.

        Raises:
            ValueError: something that kdtune does not do.
        """
        settings: dict[str, Any] = {**normalize_gen_kwargs(dict(kwargs))}
        eos = tokenizer.decode(tokenizer.eos_ids[:1], skip_special_tokens=False) or None
        until = [stop for stop in handle_stop_sequences(settings.pop("until", None), eos) if stop]
        max_new_tokens, draws = settings.pop("max_gen_toks"), settings.pop("do_sample", False)
        temperature, top_k, top_p = (settings.pop(name, None) for name in ("temperature", "top_k", "top_p"))
        if settings:
            raise ValueError(f"its generation_kwargs have {', '.join(settings)}, which kdtune does not do.")
        if draws and not temperature:
            raise ValueError("its generation_kwargs have do_sample and no temperature above 0: say which.")
        if not draws:
            return cls(tuple(until), max_new_tokens, 0.0, None, None)
        return cls(tuple(until), max_new_tokens, float(temperature), top_k or None, top_p)


class HarnessModel(TemplateLM):
    """A model for `lm_eval.evaluator.evaluate`.

    Every rank gets all requests and returns all answers; the ranks share the work among themselves.

    Attributes:
        num_tokens: that were scored or generated, by task and number of the document.
        num_cut: requests whose contexts were too long for the model and lost their beginnings, by task.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        max_tokens: int,
        seed: int = 0,
        ranks: Ranks = ALONE,
        progress: bool = True,
    ) -> None:
        """
        Args:
            model: on its device.
            tokenizer: of the model.
            max_seq_len: tokens of a row, at most those that the model was built for.
            max_tokens: that are computed at a time, see `scoring.score`.
            seed: of texts that are drawn.
            ranks: the processes.
            progress: whether the first rank shows how far it is.
        """
        super().__init__()
        self.model, self._tokenizer, self._ranks = model, tokenizer, ranks
        self.max_length, self._max_tokens, self._seed = max_seq_len, max_tokens, seed
        self._progress = progress
        self._known = frozenset(tokenizer.ids())
        self.num_tokens: Counter[tuple[Any, Any]] = Counter()
        self.num_cut: Counter[Any] = Counter()

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from."""
        return self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.source)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. No bos is put before one that it is written in."""
        prefix = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
        if add_special_tokens is None and has_bos_prefix(string, prefix):
            add_special_tokens = False
        bos = self._tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, bos=bos and self._tokenizer.adds_bos)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; without `add_generation_prompt` it ends with the last message, to be gone on with."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except ValueError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return self._render(without, add_generation_prompt)  # as the harness: some templates refuse the role

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self._tokenizer.render_chat(messages, add_generation_prompt=True)
        *before, last = messages
        text = self._tokenizer.render_chat([*before, {**last, "content": last["content"] + _CUT_HERE}])
        end = text.rindex(_CUT_HERE.strip())
        is_stripped = not text.startswith(_CUT_HERE, end)
        return text[:end].rstrip() if is_stripped else text[:end]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation behind its context, in nats; and whether it is what the model would say."""
        encoded = [self._encode(one) for one in requests]
        for one, request in zip(requests, encoded, strict=True):
            self.num_tokens[one.task_name, one.doc_id] += len(request.continuation)
            self.num_cut[one.task_name] += len(request.context) + len(request.continuation) > self.max_length + 1
        return self._score(encoded, disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._score([Request(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows where they are longer than a row."""
        parts = []  # of each text
        for one in requests:
            tokens = self.tok_encode(one.args[0])
            self.num_tokens[one.task_name, one.doc_id] += len(tokens)
            self.num_cut[one.task_name] += len(tokens) > self.max_length
            parts.append(scoring.windows(tokens, self.prefix_token_id, self.max_length))
        found = iter(self._score([window for windows in parts for window in windows], disable_tqdm))
        return [sum(next(found)[0] for _ in windows) for windows in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on from contexts."""
        by_settings: dict[Generation, list[int]] = defaultdict(list)
        prompts = []
        for number, one in enumerate(requests):
            context, kwargs = one.args
            settings = Generation.of(kwargs, self._tokenizer)
            by_settings[settings].append(number)
            tokens, room = self.tok_encode(context), self.max_length - settings.max_new_tokens
            self.num_cut[one.task_name] += len(tokens) > room
            prompts.append(tokens[-room:])
        texts = [""] * len(requests)
        bar = token_bar(len(requests), " texts") if self._shows(disable_tqdm) else None
        for settings, numbers in by_settings.items():
            for number, tokens in self._generate(settings, numbers, prompts, bar):
                texts[number] = postprocess_generated_text(self._decode(tokens), list(settings.until), None)
                self.num_tokens[requests[number].task_name, requests[number].doc_id] += len(tokens)
        if bar is not None:
            bar.close()
        return texts

    def _decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Without what a model may say of the rows that pad its vocabulary."""
        return self._tokenizer.decode([id for id in tokens if id in self._known], skip_special_tokens)

    def _encode(self, one: Instance) -> Request:
        context, continuation = one.args
        if context:
            request = Request(*self._encode_pair(context, continuation))
        else:
            tokens, prefix = self.tok_encode(continuation, add_special_tokens=False), self.prefix_token_id
            request = Request(tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else Request([prefix], tokens)
        if not request.continuation:
            raise ValueError(
                f"{one.task_name}, document {one.doc_id}: {(context + continuation)[-80:]!r} has no more tokens than "
                f"its context alone, so none are left of {continuation!r}, which is to be scored. Mend the task, or "
                "leave the document out."
            )
        return request

    def _score(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found = scoring.score(
            self.model,
            scoring.fit(requests, self.max_length),
            max_tokens=self._max_tokens,
            ranks=self._ranks,
            progress=self._progress and not disable_tqdm,
        )
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def _shows(self, disable_tqdm: bool) -> bool:
        return self._progress and self._ranks.is_first and not disable_tqdm

    def _generate(
        self, settings: Generation, numbers: list[int], prompts: Sequence[Sequence[int]], bar: Any
    ) -> Iterator[tuple[int, list[int]]]:
        """The new tokens behind each of these prompts, in any order."""
        numbers = sorted(numbers, key=lambda number: -len(prompts[number]))
        ranks, ends = self._ranks, self._ends(settings.until)
        batches = list(self._batches(settings, numbers, prompts))
        for start in range(0, len(batches), ranks.num_replicas):
            found = []
            if (mine := start + ranks.replica) < len(batches):
                new = generation.generate(
                    self.model,
                    [prompts[number] for number in batches[mine]],
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    top_p=settings.top_p,
                    stop_ids=self._tokenizer.eos_ids,
                    ends=ends,
                    seed=self._seed,
                    rows=batches[mine],
                )
                found = list(zip(batches[mine], new, strict=True))
            of_replicas = dict(ranks.gather((ranks.replica, found)))  # those that hold a model together found the same
            for part in of_replicas.values():
                yield from part
                if bar is not None:
                    bar.update(len(part))

    def _batches(
        self, settings: Generation, numbers: list[int], prompts: Sequence[Sequence[int]]
    ) -> Iterator[list[int]]:
        batch: list[int] = []
        longest = 0
        for number in numbers:
            longest = max(longest, len(prompts[number]))
            rows = len(batch) + 1
            slots = rows * (longest + settings.max_new_tokens)
            if batch and (rows * longest > self._max_tokens or slots > scoring.SLOTS * self._max_tokens):
                yield batch
                batch, longest = [], len(prompts[number])
            batch.append(number)
        if batch:
            yield batch

    def _ends(self, until: Sequence[str]) -> Callable[[list[int]], bool] | None:
        if not until:
            return None
        # So many tokens can have a part in the longest; some tokenizers swallow a space before the first.
        window = max(len(stop.encode()) for stop in until) + 2

        def ends(tokens: list[int]) -> bool:
            text = self._decode(tokens[-window:], skip_special_tokens=False)
            return any(stop in text for stop in until)

        return ends
