"""What GPUs have, by their makers' data sheets, and how fast a step can be on them at most."""

from __future__ import annotations

from dataclasses import dataclass

from kdtune.planning.plan import Plan
from kdtune.planning.tracker import ADAPTERS, GRADIENTS, OPTIMIZER, STUDENT_WEIGHTS, TEACHER_WEIGHTS

# Of a GPU's memory, what a plan may take. The rest is for the CUDA context (half a gigabyte and more), the workspaces
# of libraries, what is lost between blocks of different sizes, and what a data sheet's gigabytes lack of 2^30 bytes.
USABLE = 0.9
SIZES = (6, 8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 192, 256)  # of GPUs, in GB


@dataclass(frozen=True)
class Accelerator:
    """Rates of dense products with sums in float32, in TFLOP/s; None: the kind is not in its hardware."""

    name: str
    memory_gb: int
    bandwidth: float  # of its memory, TB/s
    bf16: float | None
    tf32: float | None
    fp32: float
    link: float  # to the other GPUs of a node, GB/s each way


# NVIDIA: the data sheets of T4, V100, A10, A100, L4, L40S, H100, H200 and HGX B200 (dense is half of what they give
# "with sparsity"); the appendices of the whitepapers on the GA102, Ada and RTX Blackwell architectures (of GeForce
# cards the rates with FP32 accumulation, which torch uses). AMD: the data sheets of Instinct MI300X and MI325X. Links
# are half of what these give for both ways: NVLink or Infinity Fabric of cards that come in boards of eight, else PCIe.
ACCELERATORS = (
    Accelerator("T4", 16, 0.32, None, None, 8.1, 16),
    Accelerator("V100 32 GB", 32, 0.9, None, None, 15.7, 150),
    Accelerator("A10", 24, 0.6, 125, 62.5, 31.2, 32),
    Accelerator("L4", 24, 0.3, 121, 60, 30.3, 32),
    Accelerator("RTX 3090", 24, 0.936, 71, 35.6, 35.6, 32),
    Accelerator("RTX 4090", 24, 1.008, 165.2, 82.6, 82.6, 32),
    Accelerator("RTX 5090", 32, 1.792, 209.5, 104.8, 104.8, 64),
    Accelerator("A100 40 GB", 40, 1.555, 312, 156, 19.5, 300),
    Accelerator("L40S", 48, 0.864, 362, 183, 91.6, 32),
    Accelerator("A100 80 GB", 80, 2.039, 312, 156, 19.5, 300),
    Accelerator("H100 PCIe", 80, 2.0, 756, 378, 51, 64),
    Accelerator("H100 SXM", 80, 3.35, 989, 494, 67, 450),
    Accelerator("RTX PRO 6000", 96, 1.792, 503.8, 251.9, 126, 64),
    Accelerator("H200", 141, 4.8, 989, 494, 67, 450),
    Accelerator("B200", 180, 8.0, 2250, 1100, 75, 900),
    Accelerator("MI300X", 192, 5.3, 1307, 653.7, 163.4, 448),
    Accelerator("MI325X", 256, 6.0, 1307, 653.7, 163.4, 448),
)
NETWORK = 50  # GB/s each way of one GPU to other nodes: 400 Gb/s InfiniBand for each, as a DGX H100 has (data sheet)


def fits(plan: Plan, memory_gb: float) -> bool:
    """Whether a GPU of this size holds the plan, with a tenth left."""
    return plan.device.total <= USABLE * memory_gb * 2**30


def seconds(plan: Plan, accelerator: Accelerator) -> float | None:
    """The floor of a step's time: all products at the peak rate, or all weights at the memory's rate, if that is more.

    None: a number format of the plan's products is not in the hardware.
    """
    products = 0.0
    for name, count in plan.formats.items():
        rate = _rate(accelerator, name)
        if rate is None:
            return None
        products += count / (rate * 1e12)
    held = plan.device.parts.get
    weights, adapters, teacher = held(STUDENT_WEIGHTS, 0), held(ADAPTERS, 0), held(TEACHER_WEIGHTS, 0)
    # Forward and backward read the student's weights; the optimizer reads all of its own and writes most of it.
    moved = plan.num_micro_batches * (teacher + 2 * (weights + adapters))
    moved += 2 * ((adapters or weights) + held(OPTIMIZER, 0)) + held(GRADIENTS, 0)
    return max(products, moved / (accelerator.bandwidth * 1e12))


def sending(plan: Plan, accelerator: Accelerator) -> float:
    """The floor of the time in which a step's messages cross, one after the other, at the full rate of the links.

    Of a group on several nodes, the members on one of them each have a way out of it.
    """
    total = 0.0
    for message, num_bytes in plan.sent.items():
        out = accelerator.link if message.nodes == 1 else NETWORK * message.size / message.nodes
        total += num_bytes / (min(out, accelerator.link) * 1e9)
    return total


def _rate(accelerator: Accelerator, number_format: str) -> float | None:
    if number_format in ("int8", "fp8"):  # GeForce cards multiply int8 four times as fast as bf16, others twice
        return accelerator.bf16 and 4 * accelerator.bf16
    rate: float | None = getattr(accelerator, number_format)
    return rate
