"""The part of a report that shows texts: continuations side by side, and tokens by how far the models are apart."""

import itertools
import math
from collections.abc import Sequence

from kdtune.evaluation.results import TokenExample
from kdtune.reporting.markup import Markup, element, escape, table
from kdtune.reporting.material import Evaluated

_EDGES = (0.05, 0.2, 0.5, 1.0, 2.0)  # nats at which the colour of a token changes
_MOST_PROMPTS = 8  # that were answered
_MOST_TEXTS = 3  # of the first evaluation that are not folded: those in which the models differ most
_MOST_PLACES = 12  # in the list of the tokens that differ most


def continuations(evaluations: Sequence[Evaluated]) -> str:
    """What the models made of each prompt."""
    prompts = dict.fromkeys(sample.prompt for one in evaluations for sample in one.evaluation.samples)
    return "".join(_continuations(evaluations, prompt) for prompt in prompts)


def _continuations(evaluations: Sequence[Evaluated], prompt: str) -> str:
    """Of one prompt; a teacher that said the same in all evaluations stands there once."""
    teachers: dict[str, None] = {}
    students: list[tuple[str, str]] = []
    for one in evaluations:
        for sample in one.evaluation.samples:
            if sample.prompt == prompt:
                students.append((_who(one, evaluations), sample.student))
                if sample.teacher is not None:
                    teachers[sample.teacher] = None
    return _side_by_side(prompt, [*(("teacher", text) for text in teachers), *students])


def responses(evaluations: Sequence[Evaluated]) -> str:
    """In a fold-out, the first prompts that were answered: references, and what models said with their first seed."""
    by_id = [{said.id: said for said in one.responses} for one in evaluations]
    ids = list(dict.fromkeys(id for found in by_id for id in found))
    parts = []
    for id in ids[:_MOST_PROMPTS]:
        said = {_who(one, evaluations): found[id] for one, found in zip(evaluations, by_id, strict=True) if id in found}
        answers = [(f"{who}: Rouge-L {one.rouge_l[0]:.1%}", one.responses[0]) for who, one in said.items()]
        first = next(iter(said.values()))
        parts.append(_side_by_side(first.prompt, [("reference", first.reference), *answers]))
    about = f"{len(parts)} of {len(ids):,} prompts, with the reference and the response of the first seed"
    return element("details", element("summary", about), Markup("".join(parts))) + "\n"


def _who(one: Evaluated, evaluations: Sequence[Evaluated]) -> str:
    return one.name if len(evaluations) > 1 else "student"


def _side_by_side(prompt: str, said: Sequence[tuple[str, str]]) -> str:
    cards = [
        element("div", element("h4", who), element("pre", escape(text, keep="\n")), class_="card") for who, text in said
    ]
    return element("h3", escape(prompt, keep="\n"), class_="prompt") + f'\n<div class="cards">{"".join(cards)}</div>\n'


def tokens(evaluations: Sequence[Evaluated]) -> str:
    """Texts of which each token is coloured, and the tokens that stand out."""
    has_teacher = any(example.kl is not None for one in evaluations for example in one.tokens)
    parts = [_scale("KL to the teacher" if has_teacher else "cross-entropy")]
    with_tokens = [one for one in evaluations if one.tokens]
    for one in with_tokens:
        if len(evaluations) > 1:
            parts.append(element("h3", one.name) + "\n")
        parts.append(_furthest(one.tokens))
        ranked = [_example(example) for example in sorted(one.tokens, key=_mean, reverse=True)]
        num_open = _MOST_TEXTS if one is with_tokens[0] else 0
        parts += ranked[:num_open]
        if rest := "".join(ranked[num_open:]):
            count = f"{len(ranked) - num_open} {'more' if num_open else 'texts'}"
            parts.append(f"<details><summary>{count}</summary>{rest}</details>\n")
    return "".join(parts)


def _values(example: TokenExample) -> list[float]:
    """What the tokens are coloured by, of those that have it."""
    return [value for value in example.kl or example.ce if value is not None and not math.isnan(value)]


def _mean(example: TokenExample) -> float:
    values = _values(example)
    return sum(values) / len(values) if values else 0.0


def _scale(what: str) -> str:
    edges = ["0", *(f"{edge:g}" for edge in _EDGES)]
    ranges = [f"{low} to {high}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]} and more"]
    steps = " ".join(f'<span class="token k{i}">{text}</span>' for i, text in enumerate(ranges))
    return f'<p class="about">{what} at each token, in nats: {steps}. Point at a token, or tap it, for more.</p>\n'


def _furthest(examples: Sequence[TokenExample]) -> str:
    """The tokens at which student and teacher differ most."""
    places = [
        (value, example, i)
        for example in examples
        for i, value in enumerate(example.kl or [])
        if value is not None and not math.isnan(value)
    ]
    places.sort(key=lambda place: -place[0])
    rows = []
    for value, example, i in places[:_MOST_PLACES]:
        before = ("".join(example.tokens[max(0, i - 8) : i]) or example.context)[-32:]
        teacher = example.teacher_top[i] if example.teacher_top else None
        choices = (example.tokens[i], teacher, example.student_top[i])
        cell = Markup(f'<span class="before">{_in_a_line(before)}</span>')
        rows.append([cell, *map(_code, choices), f"{value:.2f}"])
    head = ["where they differ most: after", "the text has", "the teacher says", "the student says", "KL"]
    return table(head, rows, class_="texts") if rows else ""


def _code(text: str | None) -> Markup:
    return escape("-") if text is None else element("code", _in_a_line(text))


def _in_a_line(text: str) -> Markup:
    return Markup(escape(text, keep="\n").replace("\n", "↵"))


def _with_breaks(text: str) -> Markup:
    return Markup(escape(text, keep="\n").replace("\n", "↵\n"))


def _example(example: TokenExample) -> str:
    about = f"{len(_values(example))} tokens, mean {_mean(example):.3f} nats"
    spans = "".join(_token(example, i) for i in range(len(example.tokens)))
    context = f'<span class="context">{_with_breaks(example.context)}</span>' if example.context else ""
    return f'<article>\n<p class="about">{about}</p>\n<pre class="tokens">{context}{spans}</pre>\n</article>\n'


def _token(example: TokenExample, i: int) -> str:
    ce, kl = example.ce[i], example.kl[i] if example.kl else None
    tops = (("teacher", example.teacher_top[i] if example.teacher_top else None), ("student", example.student_top[i]))
    said = [f"{who} says “{_in_a_line(top)}”" for who, top in tops if top is not None]
    said += [f"{what} {value:.3f}" for what, value in (("KL", kl), ("cross-entropy", ce)) if value is not None]
    value = kl if example.kl else ce
    level = "" if value is None or math.isnan(value) else f" k{sum(value >= edge for edge in _EDGES)}"
    tip = Markup(f"“{_in_a_line(example.tokens[i])}”: {', '.join(said)}") if said else None
    return element("span", _with_breaks(example.tokens[i]), class_=f"token{level}", title=tip)
