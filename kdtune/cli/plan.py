"""`kdtune plan`: what a run with these settings would take, before a byte of it is loaded."""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kdtune.cli import recipe
from kdtune.cli.parser import Parser

if TYPE_CHECKING:
    from kdtune.planning import Change, Peak, Plan

_DESCRIPTION = """\
Say how much memory a training step takes and what for, how many operations it is made of, and how long it lasts at
least on known GPUs. The recipe's own step is run on tensors without data: of a model config.json is read and no more,
of the rows nothing, and the GPU that the plan is for need not be there. Every row counts with its full length, and
every position of it with a label."""


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A plan after settings were changed for a budget."""

    budget: float  # GB
    changes: "list[Change]"
    cfg: Any
    plan: "Plan"

    @property
    def fits(self) -> bool:
        from kdtune import planning

        return planning.fits(self.plan, self.budget)


def main(argv: Sequence[str]) -> None:
    usage = f"kdtune plan {recipe.USAGE} [--budget SIZE] [--json]"
    parser = Parser("plan", _DESCRIPTION, usage=usage, add_help=False)
    parser.add_argument(
        "--budget", metavar="SIZE", help="memory of a GPU, such as 24GB: which settings to change so that it fits"
    )
    parser.add_argument("--json", action="store_true", help="print it for programs")
    call = recipe.parse(parser, argv)
    if call is None or call.options.help:
        parser.print_help()
        return
    budget = None if call.options.budget is None else _gigabytes(call.options.budget)
    module = recipe.load_module(call.recipe)
    if not (hasattr(module, "build") and hasattr(module, "forward_backward")):
        raise ValueError(
            f"{call.name} trains nothing that could be planned. A plan runs a recipe's build(cfg, device) and "
            "forward_backward(cfg, *models, micro_batches, num_tokens), and it does not have both."
        )
    cfg = recipe.settings(module, call)
    plan = _plan(module, cfg)
    fitted = None if budget is None else _fit(module, call, cfg, plan, budget)
    if call.options.json:
        record = _record(cfg, plan) | ({} if fitted is None else {"budget": _budget_record(fitted)})
        print(json.dumps(record, indent=2))
        return
    print("\n".join(_lines(cfg, plan)))
    if fitted is not None:
        print("\n" + "\n".join(_budget_lines(call, fitted)))


def _gigabytes(text: str) -> float:
    """24GB, 24 GiB or 24 -> 24."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB|G)?", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"--budget {text}: it is the memory of a GPU, such as 24GB.")
    return float(found[1])


def _plan(module: ModuleType, cfg: Any) -> "Plan":
    from kdtune import planning

    try:
        return planning.plan(cfg, module.build, module.forward_backward, getattr(module, "check_settings", None))
    except FileNotFoundError as error:
        if re.search(r"(?<!adapter_)config\.json", str(error)) is None:
            raise
        raise FileNotFoundError(
            f"{error}\nA plan needs config.json alone: "
            "kdtune download <owner/model> --output-dir <folder> --allow-patterns config.json"
        ) from None


def _fit(module: ModuleType, call: recipe.Call, cfg: Any, plan: "Plan", budget: float) -> _Fitted:
    from tqdm import tqdm

    from kdtune import planning

    def changed(changes: "Sequence[Change]") -> Any:
        return recipe.settings(module, dataclasses.replace(call, overrides=call.overrides + _overrides(changes)))

    def plan_with(changes: "Sequence[Change]") -> "Plan":
        tried.update()
        return _plan(module, changed(changes))

    with tqdm(desc="changing settings", unit=" plans", leave=False, file=sys.stderr, disable=None) as tried:
        changes, plan = planning.changes_to_fit(cfg, plan, budget, plan_with)
    return _Fitted(budget, changes, changed(changes), plan)


def _overrides(changes: "Sequence[Change]") -> list[str]:
    """key=value; of a key that is changed twice the last value."""
    return [f"{key}={value}" for key, value in {k: v for one in changes for k, v in one.settings.items()}.items()]


# As text.


def _lines(cfg: Any, plan: "Plan") -> Iterator[str]:
    from kdtune import planning

    yield from _summary(cfg, plan)
    if cfg.device == "cpu":
        return
    yield ""
    yield f"{'at least, on':<15}{'GB':>5}{'fits':>6}{'s a step':>10}{'tokens/s':>11}"
    for accelerator in planning.ACCELERATORS:
        seconds = planning.seconds(plan, accelerator)
        fits = "yes" if planning.fits(plan, accelerator.memory_gb) else "no"
        floor = f"{'-':>10}{'-':>11}" if seconds is None else f" {seconds:>9.3g} {plan.num_tokens / seconds:>10,.0f}"
        yield f"{accelerator.name:<15}{accelerator.memory_gb:>5}{fits:>6}{floor}"
    yield ""
    yield f"A plan fits if it leaves {1 - planning.USABLE:.0%} for the CUDA context, workspaces and fragmentation."
    formats = " and ".join(plan.formats)
    if any(planning.seconds(plan, accelerator) is None for accelerator in planning.ACCELERATORS):
        yield f"-: its hardware does not multiply {formats}."
    yield f"Times are those of the products at the full rate of {formats}: no run is faster than that."


_WORK = {"teacher": "teacher's body", "student": "student's body", "heads": "heads"}


def _summary(cfg: Any, plan: "Plan") -> Iterator[str]:
    from kdtune import planning

    num_rows, s = plan.num_micro_batches * cfg.batch_size, cfg.tokenizer.max_seq_len
    micro_batches = f"{plan.num_micro_batches:,} micro-batch{'es' * (plan.num_micro_batches > 1)}"
    yield f"step      {num_rows:,} x {s:,} tokens in {micro_batches}, {cfg.dtype}"
    yield from _peak("memory", "the CPU" if cfg.device == "cpu" else "the GPU", plan.device)
    if plan.host.total > 2**20:
        yield from _peak("host", "the host", plan.host)
    teachers = getattr(getattr(cfg, "teacher", None), "device", None)
    if teachers not in (None, "cpu", cfg.device):
        yield f"teacher   counted above and below as if {teachers} were the student's GPU"
    total = sum(plan.flops.values())
    shares = ", ".join(f"{name} {plan.flops[part] / total:.0%}" for part, name in _WORK.items() if part in plan.flops)
    yield f"work      {total / 1e12:,.4g} TFLOP: {shares}; {total / plan.floor:.2f} times the least that there can be"
    if cfg.device != "cpu":
        smallest = next((size for size in planning.SIZES if planning.fits(plan, size)), None)
        nothing = f"no GPU of up to {planning.SIZES[-1]} GB"
        yield f"fits      {f'GPUs of {smallest} GB and more' if smallest else nothing}"


def _peak(name: str, place: str, peak: "Peak") -> Iterator[str]:
    from kdtune.memory import format_bytes
    from kdtune.planning import shown

    yield f"{name:<10}{format_bytes(peak.total)} of {place}, in the {peak.phase}:"
    for part in shown(peak):
        yield f"{'':<12}{part:<20}{format_bytes(peak.parts[part]):>10}"


def _budget_lines(call: recipe.Call, fitted: _Fitted) -> Iterator[str]:
    size = f"{fitted.budget:g} GB"
    if not fitted.changes:
        yield f"It fits {size} as it is." if fitted.fits else f"It does not fit {size}, and no setting helps."
        return
    if fitted.fits:
        yield f"To fit {size}, the cheapest change first:"
    else:
        yield f"It does not fit {size}. All that helps, the cheapest change first:"
    for change in fitted.changes:
        yield f"  {' '.join(_overrides([change]))}"
        yield f"    {change.price}"
    yield ""
    yield from _summary(fitted.cfg, fitted.plan)
    config = [] if call.config is None else ["--config", call.options.config[0]]
    changed = _overrides(fitted.changes)
    kept = [one for one in call.overrides if one.partition("=")[0] not in {key.partition("=")[0] for key in changed}]
    yield f"run       {shlex.join(['kdtune', 'run', call.name, *config, *kept, *changed])}"


# As a record.


def _record(cfg: Any, plan: "Plan") -> dict[str, Any]:
    from kdtune import planning

    return {
        **_plan_record(plan),
        "fits_gb": [size for size in planning.SIZES if planning.fits(plan, size)],
        "accelerators": [
            {
                **dataclasses.asdict(accelerator),
                "fits": planning.fits(plan, accelerator.memory_gb),
                "seconds_per_step": planning.seconds(plan, accelerator),
            }
            for accelerator in planning.ACCELERATORS
        ],
    }


def _plan_record(plan: "Plan") -> dict[str, Any]:
    return {
        "num_tokens": plan.num_tokens,
        "num_micro_batches": plan.num_micro_batches,
        "memory_bytes": {"device": dataclasses.asdict(plan.device), "host": dataclasses.asdict(plan.host)},
        "flops": plan.flops,
        "flops_by_format": plan.formats,
        "floor_flops": plan.floor,
    }


def _budget_record(fitted: _Fitted) -> dict[str, Any]:
    return {
        "gb": fitted.budget,
        "fits": fitted.fits,
        "changes": [dataclasses.asdict(change) for change in fitted.changes],
        **_plan_record(fitted.plan),
    }
