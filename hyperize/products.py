"""Matrix products that are computed by oneDNN where torch would compute them by MKL.

On a CPU torch has two libraries for matrix products: MKL, which torch.mm calls, and oneDNN, which
its convolutions call. On AMD's processors MKL is the slower of the two: it takes 1.2 times as long
with AVX2 and 2.4 times as long with AVX512. The functions here call oneDNN directly.

That is possible only through private functions of torch. Each is looked up once, below, and if this
version of torch lacks one of them, all products are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__: list[str] = []

_linear_pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_reorder_linear_weight = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)

_ONEDNN = (
    torch.backends.mkldnn.is_available()
    # Without MKL torch.mm calls another library, against which oneDNN was not measured
    and torch.backends.mkl.is_available()
    and _linear_pointwise is not None
    and _reorder_linear_weight is not None
    and _transforms_active is not None
    and _is_batched is not None
    and _dispatch_modes is not None
)
"""Whether torch.mm calls MKL and this torch has every private function that is needed here."""

LEAST = 2**22
"""`linear` calls oneDNN from this number of multiply-adds on.

The call itself is slower than torch's own, which outweighs the faster product below this size.
"""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `F.linear` of matrices, to which it is equal but for rounding.

    Args:
        x: (n, d).
        weight: (m, d).
        bias: (m,), or none.

    Returns:
        (n, m), differentiable any number of times. Transforms of torch.func, forward-mode
        derivatives, compilers and tracers get `F.linear`, which they know.
    """
    operands = (x, weight) if bias is None else (x, weight, bias)
    # Of a stand-in neither the device nor the size may be asked, so that check is the first
    fits = _is_concrete(*operands) and takes_onednn(x)
    if fits and x.numel() * weight.shape[0] >= LEAST and not _is_watched(*operands):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


def takes_onednn(a: Tensor) -> bool:
    """Whether a's products are to be computed by oneDNN instead of torch.mm."""
    fits = a.device.type == "cpu" and a.dtype == torch.float32 and a.numel() > 0
    return fits and _ONEDNN and bool(torch.backends.mkldnn.enabled)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func is active, or a tensor has a tangent or is a hidden batch.

    A hidden batch is what torch.autograd.grad makes of gradients with `is_grads_batched`. In all
    three cases torch has to know each operation, and it does not know those that this package
    calls. Where torch lacks the private function that tells of a case, the answer leaves it out.
    """
    if _transforms_active is not None and _transforms_active():
        return True
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return True
    # torch.compile cannot trace this question, and traces no hidden batches either
    if _is_batched is None or torch.compiler.is_compiling():
        return False
    return any(map(_is_batched, tensors))


def by_onednn(a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes a @ w.T + bias, without a graph. Only for an `a` that `takes_onednn`."""
    assert _linear_pointwise is not None
    result: Tensor = _linear_pointwise(a, w, bias, "none", [], "")
    return result


def laid_out(w: Tensor, rows: int) -> Tensor:
    """Lays w out for many calls of `by_onednn` with an `a` of that many rows."""
    assert _reorder_linear_weight is not None
    result: Tensor = _reorder_linear_weight(w, rows)
    return result


def product(a: Tensor, b: Tensor) -> Tensor:
    """Computes a @ b, of matrices or of stacks of them, without a graph."""
    if a.ndim > 2 or b.ndim > 2:
        if a.shape[:-2].numel() == b.shape[:-2].numel() == 1:
            return product(a.flatten(0, -2), b.flatten(0, -2))[None]
        return a @ b
    if takes_onednn(a):
        # If there are gaps between b's rows, oneDNN takes a hundred times as long
        return by_onednn(a, b.contiguous().t())
    return torch.mm(a, b)


def dot(a: Tensor, b: Tensor) -> float:
    """The sum of a * b: of each row in its own precision, of the rows in float64.

    A sum of all numbers in float64 would first copy them to it.
    """
    rows = (a * b).flatten(1).sum(1) if a.ndim > 1 else a * b
    return float(rows.sum(dtype=torch.float64))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        # Only what the backward pass reads is saved: torch forbids changing a saved tensor in place
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        return by_onednn(x.contiguous(), weight.contiguous(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _differentiable(gradient, weight) if to_x else None,
            # gradient.t() @ x would be the same, but oneDNN would first copy the gradient, which is
            # large, into another layout
            _differentiable(x.t(), gradient).t() if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        to_a, to_b = ctx.needs_input_grad
        ctx.save_for_backward(a if to_b else None, b if to_a else None)
        # oneDNN takes a matrix and its transpose as they are; any other layout is copied
        return product(a if a.t().is_contiguous() else a.contiguous(), b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        to_a, to_b = ctx.needs_input_grad
        return (
            _differentiable(gradient, b.t()) if to_a else None,
            _differentiable(a.t(), gradient) if to_b else None,
        )


def _differentiable(a: Tensor, b: Tensor) -> Tensor:
    """Computes a @ b, differentiable any number of times."""
    if _is_concrete(a, b) and takes_onednn(a) and not _is_watched(a, b):
        result: Tensor = _Product.apply(a, b)
        return result
    return a @ b


def _is_concrete(*tensors: Tensor) -> bool:
    """Whether these are tensors with values, rather than a tracer's or a compiler's stand-ins."""
    return (
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _is_watched(*tensors: Tensor) -> bool:
    """Whether a transform or a dispatch mode, such as a counter of operations, sees each operation.

    Neither knows oneDNN's operators. This asks private functions, so it is asked last.
    """
    return _dispatch_modes is None or _dispatch_modes() > 0 or is_transformed(*tensors)
