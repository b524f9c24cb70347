"""What an evaluation writes, and how it is read again. No torch is needed.

    output_dir/
        evaluation.json    `Evaluation`: the models, every metric with its standard error, samples
        examples.jsonl     `Example`, one a line: what each example adds to the metrics
        tokens.json        a list of `TokenExample`: some examples token by token
        responses.jsonl    with `responses`: `Response`, one a line: prompts, references and what the model said
        evaluation.md      the table of all metrics

Fields have the names of the dataclasses' here. A number that is not finite is null. `id` is a hash of an example's
content, by which two evaluations are paired whatever the order of their rows: those that are alike have the same.
"""

from __future__ import annotations

import functools
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

VERSION = 1
MAIN, EXAMPLES, TOKENS, RESPONSES, TABLE = FILES = (
    *("evaluation.json", "examples.jsonl", "tokens.json", "responses.jsonl", "evaluation.md"),
)
_MAIN_METRICS = ("ce", "kl_from_teacher", "top1_agreement", "rouge_l")
T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """A number that was measured.

    Attributes:
        value: NaN if it was not finite.
        stderr: standard error over examples; None: there is one example, or nobody gave one.
        unit: such as nats/token; "share" is from 0 to 1, "" is a number without unit.
        better: whether lower or higher is better; None: neither.
    """

    value: float
    stderr: float | None
    unit: str
    better: Literal["lower", "higher"] | None


@dataclass(frozen=True)
class Result:
    """The metrics of some examples.

    Attributes:
        task: `text`, `responses`, or a task of lm-evaluation-harness.
        subset: the part of the task's examples that these are, such as a source of a blend; None: all of them.
        num_examples: how many there are.
        num_tokens: that were scored, or generated.
        metrics: by name.
    """

    task: str
    subset: str | None
    num_examples: int
    num_tokens: int
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Model:
    """What was evaluated, or the teacher that it was held against.

    Attributes:
        name: its folder, and behind + that of its adapter.
        parameters: of the whole model.
        vocab_size: rows of its embedding.
        num_layers: of them.
        hidden_size: their width.
        dtype: of its weights and activations.
        quantization: in which its layers were stored; None: as they are.
        fingerprint: of its weights.
    """

    name: str
    parameters: int
    vocab_size: int
    num_layers: int
    hidden_size: int
    dtype: str
    quantization: str | None
    fingerprint: str


@dataclass(frozen=True)
class Sample:
    """A prompt, and how the models continue it greedily."""

    prompt: str
    student: str
    teacher: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """All that was found.

    Attributes:
        model: what was evaluated.
        teacher: None: none was asked.
        tokenizer: fingerprint of the tokenizer.
        results: of each task, first of all its examples, then of each subset.
        samples: of `sample_prompts`.
        seconds: that it took, with loading.
        tokens_per_second: scored or generated, while models computed.
        settings: by task and name, what its numbers depend on that neither the model nor `Example.id` tells: how texts
            are sampled, and how many requests were cut.
    """

    model: Model
    teacher: Model | None
    tokenizer: str
    results: list[Result]
    samples: list[Sample]
    seconds: float
    tokens_per_second: float
    settings: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """What an example adds to the metrics of its task. How they are made of it is said in `estimates`.

    Attributes:
        task: as of its result.
        id: 16 hexadecimal digits.
        subset: as of its result.
        num_tokens: that were scored, or generated.
        num_bytes: of text in the scored tokens, as UTF-8; 0 where tokens are not scored.
        sums: over its tokens, by name; the metric is the sum over examples divided by their tokens.
        values: of the whole example, by name; the metric is their mean over examples.
        calibration: [bins][3]: in bins of top-1 confidence, tokens, sum of confidences, tokens predicted rightly.
    """

    task: str
    id: str
    subset: str | None = None
    num_tokens: int = 0
    num_bytes: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    calibration: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class TokenExample:
    """An example of the held-out text, token by token from the first that is scored.

    Attributes:
        id: as in `Example`.
        context: the text before them.
        tokens: the text of each. What ends inside of a character is shown as escaped bytes.
        ce: cross-entropy of the student in nats, the same length; None for tokens that are not scored.
        kl: KL(teacher || student) in nats, likewise; None altogether without a teacher.
        student_top: text of the token that the student finds most likely, likewise.
        teacher_top: the same of the teacher; None altogether without one.
    """

    id: str
    context: str
    tokens: list[str]
    ce: list[float | None]
    kl: list[float | None] | None
    student_top: list[str | None]
    teacher_top: list[str | None] | None

    def __post_init__(self) -> None:
        for of_tokens in (self.ce, self.kl, self.student_top, self.teacher_top):
            if of_tokens is not None and len(of_tokens) != len(self.tokens):
                raise ValueError(f"{self.id} has {len(of_tokens)} values for {len(self.tokens)} tokens")


@dataclass(frozen=True)
class Response:
    """What a model said to a prompt, and how near that is to the reference.

    Attributes:
        id: as in `Example`.
        prompt: text, as it was given to the model.
        reference: the answer of the data set.
        responses: text for each seed.
        rouge_l: of each of them, from 0 to 1.
    """

    id: str
    prompt: str
    reference: str
    responses: list[str]
    rouge_l: list[float]

    def __post_init__(self) -> None:
        if not len(self.responses) == len(self.rouge_l) > 0:
            raise ValueError(f"{self.id} has {len(self.rouge_l)} scores for {len(self.responses)} responses")


def write(
    folder: Path,
    evaluation: Evaluation,
    examples: Sequence[Example],
    tokens: Sequence[TokenExample] = (),
    responses: Sequence[Response] = (),
) -> None:
    """Write all files of an evaluation, `evaluation.json` last: where it is, the others are complete.

    Args:
        folder: that is there.
        evaluation: and the rest: what was found.
    """
    _put(folder / EXAMPLES, _lines(examples))
    _put(folder / TOKENS, dumps([asdict(one) for one in tokens]) + "\n")
    if responses:
        _put(folder / RESPONSES, _lines(responses))
    _put(folder / TABLE, table(evaluation) + "\n")
    _put(folder / MAIN, dumps({"kdtune_evaluation": VERSION, **asdict(evaluation)}, indent=2) + "\n")


def read(folder: str | Path) -> Evaluation:
    """What was written into a folder.

    Raises:
        FileNotFoundError: there is no evaluation.
        ValueError: it is broken, or of another version.
    """
    path = Path(folder) / MAIN
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no evaluation: there is no {MAIN} in it. Write one with kdtune run evaluate ... "
            f"output_dir={folder}, or give the folder of another."
        )
    found = _parse(path.read_bytes(), path, dict)
    if found.pop("kdtune_evaluation", None) != VERSION:
        raise ValueError(f"{path} is of another version of kdtune, whose evaluations are not read here. Write it anew.")
    return _made(Evaluation, found, path)


def read_examples(folder: str | Path) -> list[Example]:
    """What each example adds; errors are those of `read`."""
    return _read_lines(Path(folder) / EXAMPLES, Example)


def read_responses(folder: str | Path) -> list[Response]:
    """What the model said; none if it was not asked. Errors are those of `read`."""
    path = Path(folder) / RESPONSES
    return _read_lines(path, Response) if path.is_file() else []


def read_tokens(folder: str | Path) -> list[TokenExample]:
    """Examples token by token; errors are those of `read`."""
    path = Path(folder) / TOKENS
    return [_made(TokenExample, one, path) for one in _parse(_content(path), path, list)]


def table(evaluation: Evaluation) -> str:
    """All metrics as a table in markdown, aligned so that it can be read as it is."""
    rows = [["task", "metric", "value", "standard error", "unit", "examples"]]
    for result in evaluation.results:
        task = result.task if result.subset is None else f"{result.task}: {result.subset}"
        for name, metric in result.metrics.items():
            value, stderr = rounded(metric.value, metric.stderr)
            rows.append([task, name, value, stderr, metric.unit, f"{result.num_examples:,}"])
    return markdown(rows, left=(0, 1, 4))


def main_metrics(result: Result) -> list[str]:
    """The names of those that tell most; of a task of lm-evaluation-harness of its first."""
    return [name for name in _MAIN_METRICS if name in result.metrics] or list(result.metrics)[:1]


def rounded(value: float, stderr: float | None) -> tuple[str, str]:
    """Both as text, to the second digit of the error; four digits of a value without one."""
    if stderr is None or not stderr > 0 or not math.isfinite(stderr):
        return f"{value:.4g}", "" if stderr is None or math.isnan(stderr) else f"{stderr:.2g}"
    digits = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{digits}f}", f"{stderr:.{digits}f}"


def markdown(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table with its header in the first row, whose columns are aligned.

    Args:
        rows: cells.
        left: columns of text; the others hold numbers, which stand on the right.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) if i in left else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON, in which a number that is not finite is null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def named_settings(values: Mapping[str, Any]) -> dict[str, str]:
    """Those of a task as `Evaluation` holds them."""
    return {name: dumps(value) for name, value in values.items()}


def _build(kind: Any, value: Any, at: str) -> Any:
    """A value of JSON as `kind` wants it: dataclasses of objects, and NaN of the null that stands for it.

    Args:
        kind: annotation of a field here.
        at: where it stands.

    Raises:
        ValueError: it is of another kind, or a field of a dataclass is missing or unknown.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        needed = {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
        if odd := (needed - value.keys()) | (value.keys() - hints.keys()):
            which = "missing" if odd & needed else "unknown"
            raise ValueError(f"{at}{min(odd)} is {which}")
        return kind(**{name: _build(hints[name], one, f"{at}{name}.") for name, one in value.items()})
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], one, f"{at}{i}.") for i, one in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _build(arguments[1], one, f"{at}{name}.") for name, one in value.items()}
    if type(None) in arguments:
        return None if value is None else _build(arguments[0], value, at)
    if origin is Literal and value in arguments:
        return value
    if kind is float and (value is None or type(value) in (int, float)):
        return math.nan if value is None else value
    if kind in (int, str) and type(value) is kind:
        return value
    shown = json.dumps(value, ensure_ascii=False)
    raise ValueError(f"{at.rstrip('.')} is {shown if len(shown) < 40 else shown[:40] + '...'}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _put(path: Path, text: str) -> None:
    """Aside, and renamed: what carries its name is complete."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _lines(items: Iterable[Any]) -> str:
    filled = ({key: value for key, value in asdict(item).items() if value not in ({}, [])} for item in items)
    return "".join(dumps(item) + "\n" for item in filled)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this is no folder of an evaluation, or a part of one.")
    return path.read_bytes()


def _read_lines(path: Path, kind: type[T]) -> list[T]:
    return [_made(kind, _parse(line, path, dict), path) for line in _content(path).split(b"\n") if line]


def _parse(text: bytes, path: Path, kind: type) -> Any:
    try:
        found = json.loads(text)
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is broken: {error}. Write the evaluation anew.") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path} is broken: it holds a {type(found).__name__}. Write the evaluation anew.")
    return found


def _made(kind: type[T], found: Any, path: Path) -> T:
    try:
        made: T = _build(kind, found, "")
    except ValueError as error:
        raise ValueError(f"{path} is not what kdtune writes: {error}. Write the evaluation anew.") from None
    return made
