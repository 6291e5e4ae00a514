"""Matrix products on a CPU by oneDNN, which convolutions use anyway, where torch's are MKL's.

On AMD's processors MKL takes 1.2 times as long with AVX2, and 2.4 times as long with AVX512.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__: list[str] = []

_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.mkl.is_available()  # elsewhere oneDNN was not measured
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)
"""Whether torch.mm is MKL's and this torch has the private operators for products by oneDNN."""

LEAST = 2**22
"""Multiply-adds from which on `linear` is oneDNN's; with fewer, calling it takes as long."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` of matrices; equal to it but for rounding.

    Args:
        x: (n, d).
        weight: (m, d).
        bias: (m,).

    Returns:
        (n, m), differentiable any number of times. Transforms of torch.func, forward-mode
        derivatives, compilers and tracers get `F.linear`, which they know.
    """
    if _is_eager(x, weight, bias) and x.numel() * weight.shape[0] >= LEAST and takes_onednn(x):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


def takes_onednn(a: Tensor) -> bool:
    """Whether a's products are to be oneDNN's instead of torch.mm's."""
    fits = a.device.type == "cpu" and a.dtype == torch.float32 and a.numel() > 0
    return _ONEDNN and fits and bool(torch.backends.mkldnn.enabled)


def by_onednn(a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gives a @ w.T + bias, without a graph."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, w, bias, "none", [], "")
    return result


def product(a: Tensor, b: Tensor) -> Tensor:
    """Gives a @ b, without a graph."""
    if takes_onednn(a):
        # With gaps between b's rows it takes a hundred times as long
        return by_onednn(a, b.contiguous().t())
    return torch.mm(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        # What is not saved may be changed in place before the backward pass
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        return by_onednn(x.contiguous(), weight.contiguous(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _differentiable(gradient, weight) if to_x else None,
            # A product with the gradient's transpose would lay it out anew
            _differentiable(x.t(), gradient).t() if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        to_a, to_b = ctx.needs_input_grad
        ctx.save_for_backward(a if to_b else None, b if to_a else None)
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
    """Gives a @ b."""
    if _is_eager(a, b) and takes_onednn(a):
        result: Tensor = _Product.apply(a, b)
        return result
    return a @ b


def _is_eager(*tensors: Tensor) -> bool:
    """Whether nothing traces or transforms, so that an autograd function can call the operator."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    )
