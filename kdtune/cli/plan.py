"""`kdtune plan`: what a run with these settings would take, before a byte of it is loaded."""

import dataclasses
import json
import math
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
every position of it with a label.

With --nproc-per-node the plan is of one of so many processes, and says what it sends to the others."""


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
    usage = f"kdtune plan [--nproc-per-node N [--nnodes N]] {recipe.USAGE} [--budget SIZE] [--json]"
    parser = Parser("plan", _DESCRIPTION, usage=usage, add_help=False)
    for name, meaning in (("nproc-per-node", "processes on each machine, one for each GPU"), ("nnodes", "machines")):
        names = f"--{name}", f"--{name.replace('-', '_')}"
        parser.add_argument(*names, metavar="N", type=_number, default=None, help=meaning)
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
    processes = _processes(call, cfg)
    plan = _plan(module, cfg, processes)
    fitted = None if budget is None else _fit(module, call, cfg, processes, plan, budget)
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


def _number(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError
    return int(text)


_number.__name__ = "number"  # argparse puts it into "invalid ... value"


def _processes(call: recipe.Call, cfg: Any) -> tuple[int, int]:
    """How many on a node, and how many nodes."""
    per_node, nodes = call.options.nproc_per_node, call.options.nnodes
    if nodes is not None and per_node is None:
        raise ValueError(f"--nnodes={nodes} without --nproc-per-node: say how many processes there are on a machine.")
    if per_node is not None and not hasattr(cfg, "parallel"):
        raise ValueError(f"{call.name} has no setting `parallel`: all processes would do the same. Plan one of them.")
    return per_node or 1, nodes or 1


def _plan(module: ModuleType, cfg: Any, processes: tuple[int, int]) -> "Plan":
    from kdtune import planning

    check = getattr(module, "check_settings", None)
    per_node, nodes = processes
    try:
        return planning.plan(cfg, module.build, module.forward_backward, check, per_node=per_node, nodes=nodes)
    except FileNotFoundError as error:
        if re.search(r"(?<!adapter_)config\.json", str(error)) is None:
            raise
        raise FileNotFoundError(
            f"{error}\nA plan needs config.json alone: "
            "kdtune download <owner/model> --output-dir <folder> --allow-patterns config.json"
        ) from None


def _fit(
    module: ModuleType, call: recipe.Call, cfg: Any, processes: tuple[int, int], plan: "Plan", budget: float
) -> _Fitted:
    from tqdm import tqdm

    from kdtune import planning

    def changed(changes: "Sequence[Change]") -> Any:
        return recipe.settings(module, dataclasses.replace(call, overrides=call.overrides + _overrides(changes)))

    def plan_with(changes: "Sequence[Change]") -> "Plan":
        tried.update()
        return _plan(module, changed(changes), processes)

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
    yield f"{'at least, on':<15}{'GB':>5}{'fits':>6}{'s a step':>10}{'tokens/s':>11}" + f"{'s sending':>11}" * bool(
        plan.sent
    )
    for accelerator in planning.ACCELERATORS:
        seconds, sending = planning.seconds(plan, accelerator), planning.sending(plan, accelerator)
        fits = "yes" if planning.fits(plan, accelerator.memory_gb) else "no"
        floor = f"{'-':>10}{'-':>11}"
        if seconds is not None:
            seconds = max(seconds, sending)
            floor = f" {seconds:>9.3g} {plan.num_tokens * plan.num_data_ranks / seconds:>10,.0f}"
        floor += f" {sending:>10.3g}" * bool(plan.sent)
        yield f"{accelerator.name:<15}{accelerator.memory_gb:>5}{fits:>6}{floor}"
    yield ""
    yield f"A plan fits if it leaves {1 - planning.USABLE:.0%} for the CUDA context, workspaces and fragmentation."
    formats = " and ".join(plan.formats)
    if any(planning.seconds(plan, accelerator) is None for accelerator in planning.ACCELERATORS):
        yield f"-: its hardware does not multiply {formats}."
    yield f"Times are those of the products at the full rate of {formats}: no run is faster than that."
    if plan.sent:
        yield "Sending is on paper: at the full rate of NVLink, Infinity Fabric or PCIe within a node, between nodes at"
        yield f"{planning.NETWORK} GB/s for each GPU, at best beside the products. Tokens are those of all processes."


_WORK = {"teacher": "teacher's body", "student": "student's body", "heads": "heads"}


def _summary(cfg: Any, plan: "Plan") -> Iterator[str]:
    from kdtune import planning

    num_rows, s = plan.num_micro_batches * cfg.batch_size, cfg.tokenizer.max_seq_len
    micro_batches = f"{plan.num_micro_batches:,} micro-batch{'es' * (plan.num_micro_batches > 1)}"
    if plan.layout:
        degrees = ", ".join(f"{name} {degree}" for name, degree in plan.layout.items() if degree > 1)
        yield f"processes {math.prod(plan.layout.values())}: {degrees}; of number {plan.rank}, which holds most:"
    all_rows = f"; {num_rows * plan.num_data_ranks:,} rows in all" * (plan.num_data_ranks > 1)
    yield f"step      {num_rows:,} x {s:,} tokens in {micro_batches}, {cfg.dtype}{all_rows}"
    yield from _peak("memory", "the CPU" if cfg.device == "cpu" else "the GPU", plan.device)
    if plan.host.total > 2**20:
        yield from _peak("host", "the host", plan.host)
    teachers = getattr(getattr(cfg, "teacher", None), "device", None)
    if teachers not in (None, "cpu", cfg.device):
        yield f"teacher   counted above and below as if {teachers} were the student's GPU"
    total = sum(plan.flops.values())
    shares = ", ".join(f"{name} {plan.flops[part] / total:.0%}" for part, name in _WORK.items() if part in plan.flops)
    yield f"work      {total / 1e12:,.4g} TFLOP: {shares}; {total / plan.floor:.2f} times the least that there can be"
    if plan.sent:
        total = sum(plan.sent.values())
        yield f"sends     {total / 1e9:.3g} GB a step, and gets as much:"
        for message, num_bytes in sorted(plan.sent.items(), key=lambda item: -item[1]):
            if num_bytes < total / 500:
                break
            on = f"{message.size} processes" + f" on {message.nodes} nodes" * (message.nodes > 1)
            yield f"{'':<12}{f'{message.kind} of {message.part}':<30}{num_bytes / 1e9:>10.3g} GB  {on}"
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
    given = (("--nproc-per-node", call.options.nproc_per_node), ("--nnodes", call.options.nnodes))
    launch = [word for option, number in given if number is not None for word in (option, str(number))]
    yield f"run       {shlex.join(['kdtune', 'run', *launch, call.name, *config, *kept, *changed])}"


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
                "seconds_sending": planning.sending(plan, accelerator),
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
        "rank": plan.rank,
        "layout": plan.layout,
        "num_data_ranks": plan.num_data_ranks,
        "sent_bytes": [message._asdict() | {"bytes": num_bytes} for message, num_bytes in plan.sent.items()],
    }


def _budget_record(fitted: _Fitted) -> dict[str, Any]:
    return {
        "gb": fitted.budget,
        "fits": fitted.fits,
        "changes": [dataclasses.asdict(change) for change in fitted.changes],
        **_plan_record(fitted.plan),
    }
