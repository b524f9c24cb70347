"""The part of a report that shows evaluations: metrics with errors, continuations, tokens by their divergence."""

import math
from collections.abc import Iterator, Sequence

from kdtune.evaluation import results
from kdtune.reporting.markup import Markup, element, escape, table
from kdtune.reporting.material import Evaluated

_EDGES = (0.05, 0.2, 0.5, 1.0, 2.0)  # nats at which the colour of a token changes
_MOST_PLACES = 12  # in the list of the tokens that differ most


def sections(evaluations: Sequence[Evaluated]) -> list[tuple[str, str, str]]:
    """Id, heading and markup of each; none without evaluations."""
    found = []
    if evaluations:
        found.append(("evaluation", "Evaluation", _metrics(evaluations)))
    if any(one.evaluation.samples for one in evaluations):
        found.append(("continuations", "Continuations", _samples(evaluations)))
    if any(one.tokens for one in evaluations):
        found.append(("tokens", "Token by token", _tokens(evaluations)))
    return found


def sentences(evaluations: Sequence[Evaluated]) -> list[Markup]:
    """The main facts."""
    return []


# Metrics.


def _metrics(evaluations: Sequence[Evaluated]) -> str:
    rows = [list(_metric_row(evaluations, *key)) for key in _keys(evaluations)]
    head = ["", *(one.name for one in evaluations), "unit"]
    about = "± standard error over examples. " + "Bold: the best of a row." * (len(evaluations) > 1)
    return table(head, rows) + element("p", about, class_="about") + "\n" + _about_models(evaluations)


def _keys(evaluations: Sequence[Evaluated]) -> list[tuple[str, str | None, str]]:
    """Task, subset and metric, each once."""
    return list(
        dict.fromkeys(
            (result.task, result.subset, name)
            for one in evaluations
            for result in one.evaluation.results
            for name in result.metrics
        )
    )


def _metric(one: Evaluated, task: str, subset: str | None, name: str) -> results.Metric | None:
    for result in one.evaluation.results:
        if (result.task, result.subset) == (task, subset):
            return result.metrics.get(name)
    return None


def _metric_row(evaluations: Sequence[Evaluated], task: str, subset: str | None, name: str) -> Iterator[object]:
    found = [_metric(one, task, subset, name) for one in evaluations]
    known = [metric for metric in found if metric is not None]
    yield Markup(f"{element('small', task if subset is None else f'{task}: {subset}')} {escape(name)}")
    finite = [metric.value for metric in known if not math.isnan(metric.value)]
    best = None
    if len(finite) > 1 and known[0].better:
        best = min(finite) if known[0].better == "lower" else max(finite)
    for metric in found:
        if metric is None:
            yield "-"
            continue
        value, stderr = results.rounded(metric.value, metric.stderr)
        text = Markup(f"{value}{element('small', f' ± {stderr}') if stderr else ''}")
        yield element("b", text) if metric.value == best else text
    yield known[0].unit


def _about_models(evaluations: Sequence[Evaluated]) -> str:
    rows = [
        [
            Markup(f"{escape(one.name)} {element('small', role)}"),
            model.name,
            f"{model.parameters / 1e6:,.1f} M",
            model.num_layers,
            model.hidden_size,
            f"{model.vocab_size:,}",
            model.dtype if model.quantization is None else f"{model.dtype}, {model.quantization}",
        ]
        for one in evaluations
        for role, model in (("", one.evaluation.model), ("its teacher", one.evaluation.teacher))
        if model is not None
    ]
    head = ["", "folder", "parameters", "layers", "width", "vocabulary", "computed in"]
    return element("details", element("summary", "The models that were evaluated"), table(head, rows)) + "\n"


# Continuations.


def _samples(evaluations: Sequence[Evaluated]) -> str:
    prompts = dict.fromkeys(sample.prompt for one in evaluations for sample in one.evaluation.samples)
    return "".join(map(lambda prompt: _sample(evaluations, prompt), prompts))


def _sample(evaluations: Sequence[Evaluated], prompt: str) -> str:
    """What each model made of a prompt; a teacher that said the same to all once."""
    said: dict[tuple[str, str], None] = {}
    students: list[tuple[str, str]] = []
    for one in evaluations:
        for sample in one.evaluation.samples:
            if sample.prompt == prompt:
                students.append((one.name if len(evaluations) > 1 else "student", sample.student))
                if sample.teacher is not None:
                    said[("teacher", sample.teacher)] = None
    cards = [
        element("div", element("h4", who), element("pre", escape(text, keep="\n")), class_="card")
        for who, text in [*said, *students]
    ]
    return element("h3", escape(prompt, keep="\n"), class_="prompt") + f'\n<div class="cards">{"".join(cards)}</div>\n'


# Tokens.


def _tokens(evaluations: Sequence[Evaluated]) -> str:
    parts = [_scale(any(example.kl is not None for one in evaluations for example in one.tokens))]
    for one in evaluations:
        if len(evaluations) > 1:
            parts.append(element("h3", one.name) + "\n")
        parts.append(_furthest(one.tokens))
        texts = "\n".join(map(_example, one.tokens))
        parts.append(texts if one is evaluations[0] else f"<details><summary>Texts</summary>{texts}</details>\n")
    return "".join(parts)


def _scale(has_teacher: bool) -> str:
    what = "KL to the teacher" if has_teacher else "cross-entropy"
    edges = [0.0, *_EDGES]
    steps = "".join(
        f'<span class="token k{i}">{low:g}{f" to {edges[i + 1]:g}" if i + 1 < len(edges) else " and more"}</span> '
        for i, low in enumerate(edges)
    )
    return (
        f'<p class="about">{what} at each token, in nats: {steps}. Point at a token, or tap it, for its numbers.</p>\n'
    )


def _level(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f" k{sum(value >= edge for edge in _EDGES)}"


def _furthest(examples: Sequence[results.TokenExample]) -> str:
    """The tokens at which student and teacher differ most."""
    places = [
        (value, example, i)
        for example in examples
        for i, value in enumerate(example.kl or [])
        if value is not None and not math.isnan(value)
    ]
    if not places:
        return ""
    places.sort(key=lambda place: -place[0])
    rows = []
    for value, example, i in places[:_MOST_PLACES]:
        before = ("".join(example.tokens[max(0, i - 8) : i]) or example.context)[-40:]
        teacher = example.teacher_top[i] if example.teacher_top else None
        text = [f"{value:.2f}", _code(teacher), _code(example.student_top[i]), _code(example.tokens[i])]
        rows.append([Markup(f'<span class="before">{_shown(before)}</span>'), *text])
    head = ["where they differ most: the text before", "KL", "teacher's choice", "student's choice", "the text"]
    return table(head, rows)


def _code(text: str | None) -> Markup:
    return escape("-") if text is None else element("code", _shown(text))


def _shown(text: str) -> Markup:
    return Markup(escape(text, keep="\n").replace("\n", "↵"))


def _example(example: results.TokenExample) -> str:
    spans = "".join(_token(example, i) for i in range(len(example.tokens)))
    values = [v for v in example.kl or example.ce if v is not None and not math.isnan(v)]
    mean = f"mean of {len(values)} tokens {sum(values) / len(values):.3f} nats" if values else ""
    context = Markup(escape(example.context, keep="\n").replace("\n", "↵\n"))
    return (
        f'<article>\n<p class="about">{mean}</p>\n'
        f'<pre class="tokens"><span class="context">{context}</span>{spans}</pre>\n</article>'
    )


def _token(example: results.TokenExample, i: int) -> str:
    ce = example.ce[i]
    kl = example.kl[i] if example.kl else None
    said = [f"KL {kl:.3f}"] * (kl is not None) + [f"cross-entropy {ce:.3f}"] * (ce is not None)
    student, teacher = example.student_top[i], example.teacher_top[i] if example.teacher_top else None
    for who, top in (("student", student), ("teacher", teacher)):
        said += [f"{who} says {_visible_token(top)}"] * (top is not None)
    text = Markup(escape(example.tokens[i], keep="\n").replace("\n", "↵\n"))
    level = _level(kl if example.kl else ce)
    tip = f"{_visible_token(example.tokens[i])}: {', '.join(said)}" if said else None
    return element("span", text, class_=f"token{level}", title=tip)


def _visible_token(text: str | None) -> str:
    return "" if text is None else f"“{text.replace(chr(10), '↵')}”"
