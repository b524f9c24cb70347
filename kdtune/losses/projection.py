"""Logits that are made some positions at a time, and the products of their gradient.

These products are what a distillation loss costs at least, and here their precision is decided. Logits rounded to bf16
destroy the gradient of the divergence when student and teacher are close, and a sum over many chunks loses its last
digits in bf16: so logits and sums are float32 whatever the models are. What is multiplied may be bf16, whose products
are exact in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdtune.losses.rows import Activation
from kdtune.losses.vocabulary import Vocabulary

# Of weights in float32 at a time, where a device does not multiply bf16 into float32; small enough to be reused.
_BLOCK_BYTES = 16 * 2**20


class Projection:
    """logits = head(hidden), as the factors of a product that is made where it is needed.

    Args:
        hidden: [..., d].
        head: an `nn.Linear`; or a module with its `weight` [v, d] and `bias` ([v] or None) and a method
            `factors(hidden)`, which lists the pairs ([..., d_i], [v, d_i]) whose products `forward` adds up: one for a
            plain head, two for one with a low-rank adapter. What `forward` does after that is said by the attributes
            `logit_scale` and `soft_cap`, floats, if it has them (see `Activation`).

    Raises:
        ValueError: a head that computes something of its own, and does not say what.
    """

    def __init__(self, hidden: Tensor, head: Any):
        if not hasattr(head, "factors") and getattr(type(head), "forward", None) is not nn.Linear.forward:
            raise ValueError(
                f"the head is a {type(head).__name__}, whose forward may be more than a product with its weight, which "
                "would be ignored here. Give it a method factors(hidden), as kdtune.losses.Projection describes."
            )
        factors = head.factors(hidden) if hasattr(head, "factors") else [(hidden, head.weight)]
        self.inputs: list[Tensor] = [x.flatten(0, -2) for x, _ in factors]  # [t, d_i]
        self.weights: list[Tensor] = [weight for _, weight in factors]  # [v, d_i]
        self.bias: Tensor | None = head.bias  # [v]
        self.activation = Activation(getattr(head, "logit_scale", 1.0), getattr(head, "soft_cap", None))

    @property
    def vocab_size(self) -> int:
        return self.weights[0].shape[0]

    @property
    def tensors(self) -> list[Tensor | None]:
        """All that the logits depend on: inputs, weights, bias."""
        return [*self.inputs, *self.weights, self.bias]

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """The logits before the activation, [n, v], of positions `rows`, [n], in the first rows of `out`."""
        out = out[: len(rows)]
        for i, (x, weight) in enumerate(zip(self.inputs, self.weights, strict=True)):
            _add_product(out, x[rows], weight, beta=min(i, 1))
        return out if self.bias is None else out.add_(self.bias)


class Gradients:
    """Gradients of a projection's inputs, weights and bias, those that are needed, filled in chunk by chunk.

    Args:
        projection: of the student.
        needed: for each of its inputs, then of its weights, then for the bias.
        sum_dtype: of what is added up over chunks.
        vocabulary: how ranks split it, if they do: gradients of inputs are then added up over them.
    """

    def __init__(
        self,
        projection: Projection,
        needed: Sequence[bool],
        sum_dtype: torch.dtype,
        vocabulary: Vocabulary | None = None,
    ):
        inputs, weights, bias = projection.inputs, projection.weights, projection.bias
        self.projection = projection
        self.vocabulary = vocabulary
        # Of the last chunk: what is on its way, where it goes, and the share that becomes the sum.
        self._unfinished: list[tuple[dist.Work, Tensor, Tensor, Tensor]] = []
        self.inputs = [
            torch.zeros_like(x, dtype=self._stored(x.dtype, sum_dtype)) if need else None
            for x, need in zip(inputs, needed, strict=False)
        ]
        self.weights = [
            torch.zeros_like(weight, dtype=sum_dtype) if need else None
            for weight, need in zip(weights, needed[len(inputs) :], strict=False)
        ]
        self.bias = torch.zeros_like(bias, dtype=sum_dtype) if bias is not None and needed[-1] else None

    def add(self, rows: Tensor, logits_grad: Tensor, buffer: Tensor) -> None:
        """Add what positions `rows`, [n], with gradient `logits_grad`, [n, v], contribute.

        `buffer`, [>= n, any], is overwritten; where it is wide enough, it saves memory.
        """
        self._wait()
        projection = self.projection
        rounded = logits_grad
        if any(weight.dtype == torch.bfloat16 for weight in projection.weights):
            n, v = logits_grad.shape
            buffer = buffer.view(torch.bfloat16)
            rounded = buffer[:n, :v].copy_(logits_grad) if buffer.shape[1] >= v else logits_grad.to(torch.bfloat16)
        for x, weight, x_grad, weight_grad in zip(
            projection.inputs, projection.weights, self.inputs, self.weights, strict=True
        ):
            if x_grad is not None:
                share = _times(rounded if weight.dtype == rounded.dtype else logits_grad, weight)
                if self.vocabulary is None:
                    x_grad[rows] = share.to(x_grad.dtype)
                else:  # while the next products are made; before it is rounded
                    self._unfinished.append((self.vocabulary.start_sum(share), x_grad, rows, share))
            if weight_grad is not None:
                _add_outer(weight_grad, logits_grad, rounded, x[rows])
        if self.bias is not None:
            self.bias += logits_grad.sum(0)

    def finish(self) -> list[Tensor | None]:
        """All of them, in the order of the projection's `tensors`."""
        self._wait()
        grads = [*self.inputs, *self.weights, self.bias]
        return [
            None if grad is None or x is None else grad.to(self._stored(x.dtype, grad.dtype))
            for grad, x in zip(grads, self.projection.tensors, strict=True)
        ]

    def _wait(self) -> None:
        for work, x_grad, rows, total in self._unfinished:
            work.wait()
            x_grad[rows] = total.to(x_grad.dtype)
        self._unfinished.clear()

    @staticmethod
    def _stored(dtype: torch.dtype, sum_dtype: torch.dtype) -> torch.dtype:
        # float16 has to wait for the factor that the backward brings, without which small gradients are 0 in it.
        return sum_dtype if dtype == torch.float16 else dtype


def _add_product(out: Tensor, x: Tensor, weight: Tensor, beta: int) -> None:
    """out = beta * out + x @ weight.T, [n, v] from [n, d] and [v, d], with `out` in float32 or wider."""
    if x.dtype == weight.dtype == out.dtype:
        torch.addmm(out, x, weight.T, beta=beta, out=out)
    elif x.dtype == weight.dtype and _widens(x):
        torch.addmm(out, x, weight.T, out_dtype=out.dtype, beta=beta, out=out)
    else:
        with _bf16_products(x.dtype == weight.dtype == torch.bfloat16):
            x = x.to(out.dtype)
            block = _rows_at_a_time(weight, out.dtype)
            for columns, rows in zip(out.split(block, dim=1), weight.split(block), strict=True):
                torch.addmm(columns, x, rows.to(out.dtype).T, beta=beta, out=columns)


def _times(logits_grad: Tensor, weight: Tensor) -> Tensor:
    """logits_grad @ weight, [n, d] from [n, v] and [v, d]."""
    if logits_grad.dtype == weight.dtype:
        if _widens(weight) and weight.dtype == torch.bfloat16:  # its parts might be added in bf16 otherwise
            return torch.mm(logits_grad, weight, out_dtype=torch.float32)
        return logits_grad @ weight
    out = logits_grad.new_zeros(len(logits_grad), weight.shape[1])
    block = _rows_at_a_time(weight, out.dtype)
    for columns, rows in zip(logits_grad.split(block, dim=1), weight.split(block), strict=True):
        torch.addmm(out, columns, rows.to(out.dtype), out=out)
    return out


def _add_outer(out: Tensor, logits_grad: Tensor, rounded: Tensor, x: Tensor) -> None:
    """out += logits_grad.T @ x, [v, d] from [n, v] and [n, d], with `out` in float32 or wider."""
    if _widens(x) and x.dtype == rounded.dtype != out.dtype:
        torch.addmm(out, rounded.T, x, out_dtype=out.dtype, out=out)
    else:
        with _bf16_products(x.dtype == torch.bfloat16):
            torch.addmm(out, logits_grad.T, x.to(out.dtype), out=out)


def _widens(x: Tensor) -> bool:
    """Whether products of 16-bit numbers come out in float32 there: on CUDA, for which meta stands in a plan."""
    return x.is_cuda or x.is_meta


def _rows_at_a_time(weight: Tensor, dtype: torch.dtype) -> int:
    return max(1, _BLOCK_BYTES // (dtype.itemsize * weight.shape[1]))


@contextmanager
def _bf16_products(wanted: bool) -> Iterator[None]:
    """Let the CPU multiply float32 tensors as bf16 and add in float32: exact for values that came from bf16."""
    if not wanted:
        yield
        return
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before
