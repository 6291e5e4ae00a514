"""Triton kernels that run a time step of a HyperLSTM or HyperRNN on a GPU, forward and backward.

Of a time step, only matrix products need the states of the whole batch. All else concerns one
example at a time, so it is one kernel, of which each program computes one row of the batch. With
the product, which multiplies the states before the step with both cells' recurrent weights at once,
a step is two launches, in either direction. The launches take most of the time of a step.

The equations are documented at `HyperLSTMCell` and `HyperRNNCell`, the buffers in recurrence.py,
whose loops over the steps compute the same in operations of torch. Kernels read and write the dtype
of their tensors, and compute in float32.

Triton comes with torch where it can run. Without it, or the C compiler that it needs, this module
can be imported, and `takes_triton` is False.
"""

# Kernels have no annotations but those that Triton reads, and Triton has none at all.
# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import contextlib
import os
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__: list[str] = []

try:
    import triton
    import triton.language as tl
except ImportError:  # as on most machines without a GPU
    triton = None


def _builds() -> bool:
    """Whether Triton finds what it builds the launcher of kernels with.

    That is a C compiler and the headers of Python, which a machine with a GPU may lack.
    """
    compilers = (os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))
    # As Triton does, because Debian's default is a folder for what users install
    local = sysconfig.get_default_scheme() == "posix_local"
    scheme = "posix_prefix" if local else sysconfig.get_default_scheme()
    headers = sysconfig.get_path("include", scheme=scheme)
    return any(compilers) and os.path.exists(os.path.join(headers, "Python.h"))


_BUILDS = triton is not None and _builds()

LARGEST = 4096
"""The most units of a cell. A program holds all units of a few gates in its registers."""
_TILE = 8192
"""A program reads a matrix in pieces of at most this many entries."""
_LEAST_BLOCK = 16
"""The shortest row of a program; smaller cells leave a part of it unused."""


def takes_triton(x: Tensor, *units: int) -> bool:
    """Whether these kernels can run a cell of so many units on tensors like x.

    Args:
        x: A tensor of the call, with its device and dtype. It is not read.
        *units: Units of the main and of the small cell.
    """
    return (
        _BUILDS
        and x.device.type == "cuda"
        # The kernels have never run on AMD's GPUs
        and torch.version.hip is None
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.numel() > 0
        and all(size <= LARGEST for size in units)
        # Triton compiles for hardly any older GPU; those before 8.0 lack bfloat16
        and _capability(x.device) >= ((8, 0) if x.dtype == torch.bfloat16 else (7, 5))
    )


def _ask_capability(device: torch.device) -> tuple[int, int]:
    # A tensor of FakeTensorMode may be on a GPU that is not there
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


_capability: Callable[[torch.device], tuple[int, int]] = torch.compiler.assume_constant_result(
    _ask_capability
)
"""What a GPU can do; torch.compile asks once, and does not look inside."""


def _compiled(function: Callable[..., Any]) -> Any:
    """The function as a kernel, or as a part of one.

    Triton compiles a kernel anew where an integer is 1, or divisible by 16, and was not before. The
    numbers of steps and examples are at times, so they are kept out of this.
    """
    return (
        function
        if triton is None
        else triton.jit(function, do_not_specialize=["t", "n", "at", "size"])
    )


# ------------------------------------------------------------------------ functions of one example


@_compiled
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@_compiled
def _tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))  # never overflows
    large = (1.0 - small) / (1.0 + small)
    # Near 0 that difference cancels, so there it is the series, whose next term is below rounding
    square = x * x
    series = 0.13333333333 + square * (-0.05396825397 + square * 0.02186948854)
    series = x + x * square * (-0.33333333333 + square * series)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))


@_compiled
def _activated(x, RELU: tl.constexpr):
    return tl.where(x < 0, 0.0, x) if RELU else _tanh(x)


@_compiled
def _activated_backward(grad, y, RELU: tl.constexpr):
    """The gradient of the input of `_activated`, from its result y."""
    return tl.where(y > 0, grad, 0.0) if RELU else grad * (1.0 - y * y)


@_compiled
def _read(pointer, inside):
    """In float32; 0 outside."""
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@_compiled
def _normalised(x, inside, SIZE: tl.constexpr, EPS: tl.constexpr):
    """Layer norm without gain and shift, and the inverse of the standard deviation."""
    mean = tl.sum(tl.where(inside, x, 0.0), 0) / SIZE
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / SIZE + EPS)
    return centred * rstd, rstd


@_compiled
def _normalised_backward(grad, normalised, rstd, inside, SIZE: tl.constexpr):
    """The gradient of `_normalised`'s input; `grad` and `normalised` are 0 outside."""
    mean = tl.sum(grad, 0) / SIZE
    along = tl.sum(grad * normalised, 0) / SIZE
    return tl.where(inside, (grad - mean - normalised * along) * rstd, 0.0)


# ----------------------------------------------------------------------------------------- forward


@_compiled
def _small_gate(
    Y: tl.constexpr, products, u_xs, u_norm, u_rstd, gains, shifts,
    K: tl.constexpr, EPS: tl.constexpr, SAVE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The small cell's preactivation of gate Y, with layer norm; pointers are to this example."""
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    a = _read(products + Y * K + k, inside) + _read(u_xs + Y * K + k, inside)
    a, rstd = _normalised(a, inside, K, EPS)
    if SAVE:
        tl.store(u_norm + Y * K + k, a, mask=inside)
        tl.store(u_rstd + Y, rstd)
    return _read(shifts + Y * K + k, inside) + a * _read(gains + Y * K + k, inside)


@_compiled
def _scales(
    PART: tl.constexpr, u_h, v, z_bias, zs, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The embedding z of one gate's scales, or of its bias, and what it makes of them, (H,)."""
    h, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    d = tl.zeros([BLOCK_H], dtype=tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        row = PART * E + e
        rows = _read(v + row[:, None] * K + k[None, :], (e < E)[:, None] & (k < K)[None, :])
        z = tl.sum(rows * u_h[None, :], 1) + _read(z_bias + row, e < E)
        # As it will be read in the backward pass
        z = z.to(zs.dtype.element_ty)
        if SAVE:
            tl.store(zs + row, z, mask=e < E)
        tile = (h < H)[:, None] & (e < E)[None, :]
        entries = _read(scale + (PART * H + h[:, None]) * E + e[None, :], tile)
        d += tl.sum(entries * z.to(tl.float32)[None, :], 1)
    return d


@_compiled
def _main_gate(
    Y: tl.constexpr, u_h, products, xs, hs, zs, norm, rstds,
    v, z_bias, scale, bias, gains, shifts, stride,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The main cell's preactivation of gate Y of G; `stride` is the rows between two gates."""
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    w_h = _read(products + Y * H + h, inside)
    w_x = _read(xs + Y * H + h, inside)
    if SAVE:
        tl.store(hs + Y * H + h, w_h, mask=inside)
    d_h = _scales(Y, u_h, v, z_bias, zs, scale, H, K, E, SAVE, BLOCK_H, BLOCK_K, BLOCK_E)
    d_x = _scales(G + Y, u_h, v, z_bias, zs, scale, H, K, E, SAVE, BLOCK_H, BLOCK_K, BLOCK_E)
    pre = d_h * w_h + d_x * w_x
    if P == 3:  # with a bias, which has a part that is the same in all steps
        part = 2 * G + Y
        pre += _scales(part, u_h, v, z_bias, zs, scale, H, K, E, SAVE, BLOCK_H, BLOCK_K, BLOCK_E)
        pre += _read(bias + Y * H + h, inside)
    if NORM:
        pre, rstd = _normalised(pre, inside, H, EPS)
        if SAVE:
            tl.store(norm + Y * stride * H + h, pre, mask=inside)
            tl.store(rstds + Y * stride, rstd)
        pre = _read(shifts + Y * H + h, inside) + pre * _read(gains + Y * H + h, inside)
    return pre


@_compiled
def _forward_step(
    products, u_xs, xs, mask, s, c,
    hs, zs, gates, tanhs,
    u_norm, u_rstd, u_gates, uc_norm, uc_rstd, u_tanhs,
    norm, rstd, c_norm, c_rstd,
    v, scale, vectors, t, n,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    NORM: tl.constexpr, DROPPED: tl.constexpr, SAVE: tl.constexpr, EPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Step t of both cells, for one example, after the recurrent product."""
    # In 64 bits, because a long sequence's buffers have more than 2^31 entries
    stride = n.to(tl.int64)
    example = tl.program_id(0).to(tl.int64)
    row = t * stride + example  # in buffers (T, N, ...)
    after = row + stride
    first = t * 4 * stride + example  # in buffers (T, 4, N, ...): gate 0
    h, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    is_h, is_k = h < H, k < K
    # The weights that are vectors, in the order of `_vectors`
    u_gain, u_shift, z_bias = vectors, vectors + 5 * K, vectors + 10 * K
    gain = z_bias + 4 * P * E
    shift = gain + (5 * H if NORM else 0)
    bias = shift + (5 * H if NORM else 0)

    # The small LSTM
    products += example * (4 * K + 4 * H)
    u_xs += row * 4 * K
    u_norm += row * 4 * K
    u_rstd += row * 4
    a_i = _small_gate(0, products, u_xs, u_norm, u_rstd, u_gain, u_shift, K, EPS, SAVE, BLOCK_K)
    a_f = _small_gate(1, products, u_xs, u_norm, u_rstd, u_gain, u_shift, K, EPS, SAVE, BLOCK_K)
    a_g = _small_gate(2, products, u_xs, u_norm, u_rstd, u_gain, u_shift, K, EPS, SAVE, BLOCK_K)
    a_o = _small_gate(3, products, u_xs, u_norm, u_rstd, u_gain, u_shift, K, EPS, SAVE, BLOCK_K)
    i, f, g, o = _sigmoid(a_i), _sigmoid(a_f), _tanh(a_g), _sigmoid(a_o)
    u_c = f * _read(c + row * (H + K) + H + k, is_k) + i * g
    tl.store(c + after * (H + K) + H + k, u_c, mask=is_k)
    u_c, u_deviation = _normalised(u_c, is_k, K, EPS)
    u_tanh = _tanh(_read(u_shift + 4 * K + k, is_k) + u_c * _read(u_gain + 4 * K + k, is_k))
    u_h = (o * u_tanh).to(s.dtype.element_ty)
    tl.store(s + after * (H + K) + H + k, u_h, mask=is_k)
    if SAVE:
        u_gates += row * 4 * K
        tl.store(u_gates + k, i, mask=is_k)
        tl.store(u_gates + K + k, f, mask=is_k)
        tl.store(u_gates + 2 * K + k, g, mask=is_k)
        tl.store(u_gates + 3 * K + k, o, mask=is_k)
        tl.store(uc_norm + row * K + k, u_c, mask=is_k)
        tl.store(uc_rstd + row, u_deviation)
        tl.store(u_tanhs + row * K + k, u_tanh, mask=is_k)
    u_h = tl.where(is_k, u_h.to(tl.float32), 0.0)  # what the next step and the gradients read

    # The main LSTM
    products += 4 * K
    xs += row * 4 * H
    hs += row * 4 * H
    zs += row * (4 * P * E)
    norm += first * H
    rstd += first
    a_i = _main_gate(
        0, u_h, products, xs, hs, zs, norm, rstd, v, z_bias, scale, bias, gain, shift, stride,
        4, H, K, E, P, NORM, EPS, SAVE, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    a_f = _main_gate(
        1, u_h, products, xs, hs, zs, norm, rstd, v, z_bias, scale, bias, gain, shift, stride,
        4, H, K, E, P, NORM, EPS, SAVE, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    a_g = _main_gate(
        2, u_h, products, xs, hs, zs, norm, rstd, v, z_bias, scale, bias, gain, shift, stride,
        4, H, K, E, P, NORM, EPS, SAVE, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    a_o = _main_gate(
        3, u_h, products, xs, hs, zs, norm, rstd, v, z_bias, scale, bias, gain, shift, stride,
        4, H, K, E, P, NORM, EPS, SAVE, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    i, f, g, o = _sigmoid(a_i), _sigmoid(a_f), _tanh(a_g), _sigmoid(a_o)
    if SAVE:
        gates += first * H + h
        tl.store(gates, i, mask=is_h)
        tl.store(gates + stride * H, f, mask=is_h)
        tl.store(gates + 2 * stride * H, g, mask=is_h)
        tl.store(gates + 3 * stride * H, o, mask=is_h)
    if DROPPED:
        g *= _read(mask + row * H + h, is_h)
    memory = f * _read(c + row * (H + K) + h, is_h) + i * g
    tl.store(c + after * (H + K) + h, memory, mask=is_h)
    if NORM:
        memory, deviation = _normalised(memory, is_h, H, EPS)
        if SAVE:
            tl.store(c_norm + row * H + h, memory, mask=is_h)
            tl.store(c_rstd + row, deviation)
        memory = _read(shift + 4 * H + h, is_h) + memory * _read(gain + 4 * H + h, is_h)
    tanh = _tanh(memory)
    if SAVE:
        tl.store(tanhs + row * H + h, tanh, mask=is_h)
    tl.store(s + after * (H + K) + h, o * tanh, mask=is_h)


@_compiled
def _rnn_forward_step(
    products, u_xs, xs, s, hs, zs, norm, rstd, v, scale, vectors, t, n,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    NORM: tl.constexpr, RELU: tl.constexpr, SAVE: tl.constexpr, EPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """As `_forward_step`, of a HyperRNN."""
    stride = n.to(tl.int64)
    example = tl.program_id(0).to(tl.int64)
    row = t * stride + example
    h, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    is_h, is_k = h < H, k < K
    z_bias = vectors
    gain = z_bias + P * E
    shift = gain + (H if NORM else 0)
    bias = shift + (H if NORM else 0)
    products += example * (K + H)
    s += (row + stride) * (H + K)

    a = _read(products + k, is_k) + _read(u_xs + row * K + k, is_k)
    u_h = _activated(a, RELU).to(s.dtype.element_ty)
    tl.store(s + H + k, u_h, mask=is_k)
    u_h = tl.where(is_k, u_h.to(tl.float32), 0.0)

    a = _main_gate(
        0, u_h, products + K, xs + row * H, hs + row * H, zs + row * (P * E), norm + row * H,
        rstd + row, v, z_bias, scale, bias, gain, shift, stride,
        1, H, K, E, P, NORM, EPS, SAVE, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    tl.store(s + h, _activated(a, RELU), mask=is_h)


# ---------------------------------------------------------------------------------------- backward


@_compiled
def _scales_backward(
    PART: tl.constexpr, d_d, zs, d_zs, v, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of `_scales`, writes the gradient of z, and gives that of the small cell's output.

    The scales are too large to keep, so they are computed again, and given first.
    """
    h, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    d = tl.zeros([BLOCK_H], dtype=tl.float32)
    d_u = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        row = PART * E + e
        tile = (h < H)[:, None] & (e < E)[None, :]
        entries = _read(scale + (PART * H + h[:, None]) * E + e[None, :], tile)
        d += tl.sum(entries * _read(zs + row, e < E)[None, :], 1)
        d_z = tl.sum(entries * d_d[:, None], 0)
        tl.store(d_zs + row, d_z, mask=e < E)
        rows = _read(v + row[:, None] * K + k[None, :], (e < E)[:, None] & (k < K)[None, :])
        d_u += tl.sum(rows * d_z[:, None], 0)
    return d, d_u


@_compiled
def _main_gate_backward(
    Y: tl.constexpr, d_pre, xs, hs, zs, norm, rstds,
    d_products, d_xs, d_ds, d_zs, d_ps, v, scale, gains,
    stride, d_stride,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of all that makes the preactivation of gate Y of G.

    Those of the small cell's output are given, all others written.
    """
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    if NORM:
        tl.store(d_ps + Y * stride * H + h, d_pre, mask=inside)
        normalised = _read(norm + Y * stride * H + h, inside)
        rstd = tl.load(rstds + Y * stride).to(tl.float32)
        d_pre *= _read(gains + Y * H + h, inside)
        d_pre = _normalised_backward(d_pre, normalised, rstd, inside, H)
    d_by_h = d_pre * _read(hs + Y * H + h, inside)
    d_by_x = d_pre * _read(xs + Y * H + h, inside)
    tl.store(d_ds + Y * d_stride + h, d_by_h, mask=inside)
    tl.store(d_ds + (G + Y) * d_stride + h, d_by_x, mask=inside)
    by_h, d_u = _scales_backward(Y, d_by_h, zs, d_zs, v, scale, H, K, E, BLOCK_H, BLOCK_K, BLOCK_E)
    by_x, more = _scales_backward(
        G + Y, d_by_x, zs, d_zs, v, scale, H, K, E, BLOCK_H, BLOCK_K, BLOCK_E
    )
    d_u += more
    tl.store(d_products + Y * H + h, d_pre * by_h, mask=inside)
    tl.store(d_xs + Y * H + h, d_pre * by_x, mask=inside)
    if P == 3:
        tl.store(d_ds + (2 * G + Y) * d_stride + h, d_pre, mask=inside)
        _, more = _scales_backward(
            2 * G + Y, d_pre, zs, d_zs, v, scale, H, K, E, BLOCK_H, BLOCK_K, BLOCK_E
        )
        d_u += more
    return d_u


@_compiled
def _small_gate_backward(
    Y: tl.constexpr, d_a, u_norm, u_rstd, d_us, d_products, gains,
    K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the small cell's preactivation of gate Y, after and before the layer norm."""
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    tl.store(d_us + Y * K + k, d_a, mask=inside)
    normalised = _read(u_norm + Y * K + k, inside)
    rstd = tl.load(u_rstd + Y).to(tl.float32)
    d_a *= _read(gains + Y * K + k, inside)
    d_a = _normalised_backward(d_a, normalised, rstd, inside, K)
    tl.store(d_products + Y * K + k, d_a, mask=inside)


@_compiled
def _backward_step(
    d_states, d_memories, grad_s, grad_c, mask, c,
    xs, hs, zs, gates, tanhs,
    u_norm, u_rstd, u_gates, uc_norm, uc_rstd, u_tanhs,
    norm, rstd, c_norm, c_rstd,
    d_products, d_xs, d_ds, d_zs, d_us, d_ucs, d_ps, d_mcs,
    v, scale, vectors, t, n, at, size,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    NORM: tl.constexpr, DROPPED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradients of step t of both cells, for one example, before the recurrent product.

    They go to place `at` of the chunk, which has places for `size` steps. `d_memories` has two
    halves, of which one step reads the one and writes the other.
    """
    stride = n.to(tl.int64)
    example = tl.program_id(0).to(tl.int64)
    row = t * stride + example  # in buffers (T, N, ...)
    after = row + stride
    first = t * 4 * stride + example  # in buffers (T, 4, N, ...): gate 0
    place = at * stride + example  # in the chunk's (size, N, ...)
    first_place = at * 4 * stride + example  # in the chunk's (size, 4, N, ...)
    given = (t % 2) * stride + example
    passed = ((t + 1) % 2) * stride + example
    h, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    is_h, is_k = h < H, k < K
    u_gain = vectors
    gain = vectors + 10 * K + 4 * P * E

    # The main LSTM
    d_h = _read(d_states + example * (H + K) + h, is_h)
    d_h += _read(grad_s + after * (H + K) + h, is_h)
    d_memory = _read(d_memories + given * (H + K) + h, is_h)
    d_memory += _read(grad_c + after * (H + K) + h, is_h)
    gates += first * H + h
    i = _read(gates, is_h)
    f = _read(gates + stride * H, is_h)
    g = _read(gates + 2 * stride * H, is_h)
    o = _read(gates + 3 * stride * H, is_h)
    tanh = _read(tanhs + row * H + h, is_h)
    d_tanh = d_h * o * (1.0 - tanh * tanh)
    if NORM:
        tl.store(d_mcs + place * H + h, d_tanh, mask=is_h)
        normalised = _read(c_norm + row * H + h, is_h)
        deviation = tl.load(c_rstd + row).to(tl.float32)
        d_tanh *= _read(gain + 4 * H + h, is_h)
        d_tanh = _normalised_backward(d_tanh, normalised, deviation, is_h, H)
    d_memory += d_tanh
    tl.store(d_memories + passed * (H + K) + h, d_memory * f, mask=is_h)
    seen, d_g = g, d_memory * i
    if DROPPED:
        kept = _read(mask + row * H + h, is_h)
        seen *= kept
        d_g *= kept
    d_i = d_memory * seen * i * (1.0 - i)
    d_f = d_memory * _read(c + row * (H + K) + h, is_h) * f * (1.0 - f)
    d_g *= 1.0 - g * g
    d_o = d_h * tanh * o * (1.0 - o)
    xs += row * 4 * H
    hs += row * 4 * H
    zs += row * (4 * P * E)
    norm += first * H
    rstd += first
    d_products += place * (4 * K + 4 * H)
    d_xs += place * 4 * H
    d_ds += place * H
    d_zs += place * (4 * P * E)
    d_ps += first_place * H
    d_stride = size * stride * H
    d_u = _read(d_states + example * (H + K) + H + k, is_k)
    d_u += _read(grad_s + after * (H + K) + H + k, is_k)
    d_u += _main_gate_backward(
        0, d_i, xs, hs, zs, norm, rstd, d_products + 4 * K, d_xs, d_ds, d_zs, d_ps, v, scale, gain,
        stride, d_stride, 4, H, K, E, P, NORM, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    d_u += _main_gate_backward(
        1, d_f, xs, hs, zs, norm, rstd, d_products + 4 * K, d_xs, d_ds, d_zs, d_ps, v, scale, gain,
        stride, d_stride, 4, H, K, E, P, NORM, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    d_u += _main_gate_backward(
        2, d_g, xs, hs, zs, norm, rstd, d_products + 4 * K, d_xs, d_ds, d_zs, d_ps, v, scale, gain,
        stride, d_stride, 4, H, K, E, P, NORM, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    d_u += _main_gate_backward(
        3, d_o, xs, hs, zs, norm, rstd, d_products + 4 * K, d_xs, d_ds, d_zs, d_ps, v, scale, gain,
        stride, d_stride, 4, H, K, E, P, NORM, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip

    # The small LSTM
    u_gates += row * 4 * K + k
    i, f = _read(u_gates, is_k), _read(u_gates + K, is_k)
    g, o = _read(u_gates + 2 * K, is_k), _read(u_gates + 3 * K, is_k)
    u_tanh = _read(u_tanhs + row * K + k, is_k)
    d_tanh = d_u * o * (1.0 - u_tanh * u_tanh)
    tl.store(d_ucs + place * K + k, d_tanh, mask=is_k)
    normalised = _read(uc_norm + row * K + k, is_k)
    deviation = tl.load(uc_rstd + row).to(tl.float32)
    d_tanh *= _read(u_gain + 4 * K + k, is_k)
    d_u_memory = _normalised_backward(d_tanh, normalised, deviation, is_k, K)
    d_u_memory += _read(d_memories + given * (H + K) + H + k, is_k)
    d_u_memory += _read(grad_c + after * (H + K) + H + k, is_k)
    tl.store(d_memories + passed * (H + K) + H + k, d_u_memory * f, mask=is_k)
    u_norm += row * 4 * K
    u_rstd += row * 4
    d_us += place * 4 * K
    d_i = d_u_memory * g * i * (1.0 - i)
    d_f = d_u_memory * _read(c + row * (H + K) + H + k, is_k) * f * (1.0 - f)
    d_g = d_u_memory * i * (1.0 - g * g)
    d_o = d_u * u_tanh * o * (1.0 - o)
    _small_gate_backward(0, d_i, u_norm, u_rstd, d_us, d_products, u_gain, K, BLOCK_K)
    _small_gate_backward(1, d_f, u_norm, u_rstd, d_us, d_products, u_gain, K, BLOCK_K)
    _small_gate_backward(2, d_g, u_norm, u_rstd, d_us, d_products, u_gain, K, BLOCK_K)
    _small_gate_backward(3, d_o, u_norm, u_rstd, d_us, d_products, u_gain, K, BLOCK_K)


@_compiled
def _rnn_backward_step(
    d_states, grad_s, s, xs, hs, zs, norm, rstd, d_products, d_xs, d_ds, d_zs, d_ps,
    v, scale, vectors, t, n, at, size,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    NORM: tl.constexpr, RELU: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """As `_backward_step`, of a HyperRNN."""
    stride = n.to(tl.int64)
    example = tl.program_id(0).to(tl.int64)
    row = t * stride + example
    place = at * stride + example
    h, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    is_h, is_k = h < H, k < K
    gain = vectors + P * E
    d_states += example * (H + K)
    grad_s += (row + stride) * (H + K)
    s += (row + stride) * (H + K)
    d_products += place * (K + H)

    d_h = _read(d_states + h, is_h) + _read(grad_s + h, is_h)
    d_pre = _activated_backward(d_h, _read(s + h, is_h), RELU)
    d_u = _read(d_states + H + k, is_k) + _read(grad_s + H + k, is_k)
    d_u += _main_gate_backward(
        0, d_pre, xs + row * H, hs + row * H, zs + row * (P * E), norm + row * H, rstd + row,
        d_products + K, d_xs + place * H, d_ds + place * H, d_zs + place * (P * E),
        d_ps + place * H, v, scale, gain, stride, size * stride * H,
        1, H, K, E, P, NORM, BLOCK_H, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    d_a = _activated_backward(d_u, _read(s + H + k, is_k), RELU)
    tl.store(d_products + k, d_a, mask=is_k)


# ----------------------------------------------------------------------------- loops over the steps


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _blocks(hidden: int, hyper: int, embedding: int) -> dict[str, int]:
    """How much of each axis a program reads at once, and with how many threads."""
    h, k = (max(_LEAST_BLOCK, _power_of_two(size)) for size in (hidden, hyper))
    longest = max(h, k)
    e = max(2, min(_power_of_two(embedding), _TILE // longest))
    # There are few programs, so each has many threads: two units for one, up to the 512 threads
    # with which each still has 128 registers
    warps = min(16, max(4, longest // 64))
    return {"BLOCK_H": h, "BLOCK_K": k, "BLOCK_E": e, "num_warps": warps, "num_stages": 1}


def _constants(weights: list[Tensor], **flags: Any) -> dict[str, Any]:
    """What a kernel is compiled for."""
    u_hh, scale, gain = weights[4], weights[10], weights[11]
    parts, _, h, e = scale.shape
    k = u_hh.shape[1]
    sizes = {"H": h, "K": k, "E": e, "P": parts, "NORM": gain.numel() > 0}
    return {**sizes, **flags, **_blocks(h, k, e)}


def _vectors(weights: list[Tensor]) -> Tensor:
    """All weights that are vectors, one after the other, as one argument of the kernels."""
    _, _, bias, _, _, _, u_gain, u_shift, v, v_bias, _, gain, shift = weights
    # Only the embeddings of h and x have a bias; those that make the bias get zeros
    z_bias = F.pad(v_bias, (0, v.shape[0] - v_bias.shape[0]))
    return torch.cat([t.reshape(-1) for t in (u_gain, u_shift, z_bias, gain, shift, bias)])


def _recurrent(weights: list[Tensor]) -> Tensor:
    """What multiplies h and the small cell's output, (G K + G H, H + K), with G gates.

    The rows of the small cell come first. Those of the main cell have zeros for the small cell's
    output: this is at most a quarter of the product, and saves a launch in each step.
    """
    w_hh, u_ih, u_hh = weights[1], weights[3], weights[4]
    small = torch.cat([u_ih[:, : w_hh.shape[1]], u_hh], 1)
    return torch.cat([small, F.pad(w_hh, (0, u_hh.shape[1]))])


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, so this makes it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def forward_steps(
    u_xs: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    s: Tensor,
    c: Tensor,
    tape: list[Tensor],
    save: bool,
    eps: float,
) -> None:
    """Runs all steps of a HyperLSTM cell.

    Args:
        u_xs: The small cell's products with the inputs, (T, N, 4 K), with its bias.
        mask: Factors of the candidate, (T, N, H); empty for none.
        weights: As in `recurrence.WEIGHTS`.
        s: Its first entry is read and the others are written, as in `c`; see recurrence.py.
        c: The memories.
        tape: As the operator returns it. The first, the main cell's products with the inputs, is
            read, and the others are written if they are to be saved.
        save: Whether to write the tape.
        eps: What layer norms add to the variance.
    """
    steps, n, _ = u_xs.shape
    recurrent = _recurrent(weights).t()
    products = s.new_empty(n, recurrent.shape[1])
    xs, *rest = tape
    v, scale = weights[8].contiguous(), weights[10].contiguous()
    tensors = (products, u_xs, xs, mask.contiguous(), s, c, *rest, v, scale, _vectors(weights))
    constants = _constants(weights, DROPPED=mask.numel() > 0, SAVE=save, EPS=eps)
    with _on(s):
        launch = _forward_step[(n,)]
        for t, past in enumerate(s.unbind(0)[:steps]):
            torch.mm(past, recurrent, out=products)
            launch(*tensors, t, n, **constants)


class BackwardSteps:
    """Runs the steps of the backward pass, from the last to the first, some at a time.

    Args:
        grad_s: The gradient of s, like s.
        grad_c: The gradient of c.
        mask: As in `forward_steps`.
        weights: As in `forward_steps`.
        c: The memories.
        tape: What the forward pass saved.
    """

    def __init__(
        self,
        grad_s: Tensor,
        grad_c: Tensor,
        mask: Tensor,
        weights: list[Tensor],
        c: Tensor,
        tape: list[Tensor],
    ) -> None:
        grad_s, grad_c = grad_s.contiguous(), grad_c.contiguous()
        self._first = (grad_s[0], grad_c[0])
        self._recurrent = _recurrent(weights)
        # The gradients that a step receives from the one after it. Those of the memories are there
        # twice, as a step reads the one and writes the other.
        self._d_states = torch.zeros_like(grad_s[0])
        self._d_memories = grad_c.new_zeros(2, *grad_c.shape[1:])
        states = (self._d_states, self._d_memories, grad_s, grad_c)
        self._read = (*states, mask.contiguous(), c, *tape)
        v, scale = weights[8].contiguous(), weights[10].contiguous()
        self._weights = (v, scale, _vectors(weights))
        self._constants = _constants(weights, DROPPED=mask.numel() > 0)

    def run(self, start: int, end: int, d_products: Tensor, *written: Tensor) -> None:
        """Runs the steps from the one before `end` down to `start`.

        Args:
            start: The last step to run.
            end: The step after the first one to run.
            d_products: The gradients of the recurrent products, (size, N, 4 K + 4 H), the small
                cell's first. Step t is written at t - start.
            *written: The gradients of the main cell's products with the inputs, of the scales, the
                embeddings, the small cell's normalised preactivations and memory, and of the main
                cell's, as recurrence.py describes them.
        """
        size, n, _ = d_products.shape
        tensors = (*self._read, d_products, *written, *self._weights)
        with _on(d_products):
            launch = _backward_step[(n,)]
            places = d_products.unbind(0)
            for t in range(end - 1, start - 1, -1):
                launch(*tensors, t, n, t - start, size, **self._constants)
                torch.mm(places[t - start], self._recurrent, out=self._d_states)

    def initial(self) -> tuple[Tensor, Tensor]:
        """The gradients of the states before the first step, after all steps."""
        grad_s, grad_c = self._first
        # Step 0 writes the second half
        return self._d_states + grad_s, self._d_memories[1] + grad_c


def rnn_forward_steps(
    u_xs: Tensor,
    weights: list[Tensor],
    s: Tensor,
    tape: list[Tensor],
    relu: bool,
    save: bool,
    eps: float,
) -> None:
    """Runs all steps of a HyperRNN cell.

    Args:
        u_xs: The small cell's products with the inputs, (T, N, K), with its bias.
        weights: As in `forward_steps`.
        s: Its first entry is read, and the others are written.
        tape: As in `forward_steps`.
        relu: Whether the nonlinearity is that, instead of tanh.
        save: As in `forward_steps`.
        eps: As in `forward_steps`.
    """
    steps, n, _ = u_xs.shape
    recurrent = _recurrent(weights).t()
    products = s.new_empty(n, recurrent.shape[1])
    xs, *rest = tape
    v, scale = weights[8].contiguous(), weights[10].contiguous()
    tensors = (products, u_xs, xs, s, *rest, v, scale, _vectors(weights))
    constants = _constants(weights, RELU=relu, SAVE=save, EPS=eps)
    with _on(s):
        launch = _rnn_forward_step[(n,)]
        for t, past in enumerate(s.unbind(0)[:steps]):
            torch.mm(past, recurrent, out=products)
            launch(*tensors, t, n, **constants)


class RNNBackwardSteps:
    """Runs the steps of a HyperRNN's backward pass, from the last to the first, some at a time.

    Args:
        grad_s: The gradient of s, like s.
        weights: As in `forward_steps`.
        s: The states.
        tape: What the forward pass saved.
        relu: As in `rnn_forward_steps`.
    """

    def __init__(
        self, grad_s: Tensor, weights: list[Tensor], s: Tensor, tape: list[Tensor], relu: bool
    ) -> None:
        grad_s = grad_s.contiguous()
        self._first = grad_s[0]
        self._recurrent = _recurrent(weights)
        self._d_states = torch.zeros_like(grad_s[0])
        self._read = (self._d_states, grad_s, s, *tape)
        v, scale = weights[8].contiguous(), weights[10].contiguous()
        self._weights = (v, scale, _vectors(weights))
        self._constants = _constants(weights, RELU=relu)

    def run(self, start: int, end: int, d_products: Tensor, *written: Tensor) -> None:
        """Runs the steps from the one before `end` down to `start`.

        Args:
            start: The last step to run.
            end: The step after the first one to run.
            d_products: As in `BackwardSteps.run`, (size, N, K + H).
            *written: The gradients of the main cell's products with the inputs, of the scales, the
                embeddings, and the main cell's normalised preactivations.
        """
        size, n, _ = d_products.shape
        tensors = (*self._read, d_products, *written, *self._weights)
        with _on(d_products):
            launch = _rnn_backward_step[(n,)]
            places = d_products.unbind(0)
            for t in range(end - 1, start - 1, -1):
                launch(*tensors, t, n, t - start, size, **self._constants)
                torch.mm(places[t - start], self._recurrent, out=self._d_states)

    def initial(self) -> Tensor:
        """The gradient of the states before the first step, after all steps."""
        return self._d_states + self._first
