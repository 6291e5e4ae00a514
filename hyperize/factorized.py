"""Products of a layer's input with the factors of a weight, in the place of the weight.

A generated weight is a product of two matrices (of three for embeddings of channels, a CP form), so
a convolution with it is a chain of smaller ones: with the head's rows as filters, each of which
serves many output channels, and a mixture of their results by the embeddings. Tucker and CP layers
are computed like this, see Kim et al. 2016 (arXiv 1511.06530) and Lebedev et al. 2015 (arXiv
1412.6553). A separable weight is a depthwise convolution and a pointwise one (Chollet 2017, arXiv
1610.02357).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperize.tensors import CHANNELS_LAST

__all__: list[str] = []

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


LARGE = 2**22
"""On an accelerator, weights with fewer elements than this are made: they take fewer launches."""
HUGE = 2**24
"""A compiler, which does not know the size of inputs, takes factors from this number on."""


class Factoring(NamedTuple):
    """What decides between a layer's weight and the factors of it.

    Attributes:
        weights: Elements of the weight.
        between: Numbers between the products with the factors, for each position of the output.
    """

    weights: int
    between: int

    def is_possible(self, device: torch.device) -> bool:
        """Whether factors pay for some inputs on a device."""
        return device.type == "cpu" or self.weights >= LARGE

    def pays(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether factors pay for an input, as against a weight that is made with others.

        On a CPU they do, as they take fewer multiply-adds. On an accelerator memory and launches
        count: the numbers between the products have to be fewer than half of the weight's.
        """
        if x.device.type == "cpu":
            return True
        if torch.compiler.is_compiling():
            return self.weights >= HUGE
        if isinstance(layer, nn.Linear):
            positions = x.numel() // layer.in_features
        else:
            assert isinstance(layer, _CONVOLUTIONS)
            positions = x.numel() // (layer.in_channels * math.prod(layer.stride))
        return self.weights >= LARGE and 2 * positions * self.between <= self.weights


def multiply(layer: nn.Module, x: Tensor, factors: tuple[Tensor, ...], axis: int) -> Tensor:
    """What a plain layer computes, of its weight's factors.

    Args:
        layer: One whose `Site.plain` is true; its weight is not read.
        x: Its input, batched or not.
        factors: Of tiles, (R, P, D) and (Q, w, *kernel, D). The R * Q combinations of the first
            letters are the weight's channels along `axis`, the P * w others those along its other
            axis; surplus channels at the end are left out. P or Q is 1. Of embeddings of channels,
            (out, D), (in, D) and (*kernel, D). Of a separable weight, its pointwise numbers (R, w),
            its depthwise kernels (w, *kernel) and its offset ().
        axis: The weight's axis along which the first factor goes.

    Returns:
        The output, in the memory format of `x`.
    """
    form: _Form
    if isinstance(layer, nn.Linear):
        form = _Linear(layer)
    else:
        assert isinstance(layer, _CONVOLUTIONS)
        form = _Convolution(layer)
    y = _order(factors, axis)(form, form.prepare(x), *factors)
    return y if y.ndim == x.ndim else y.squeeze(0)


def expand(factors: tuple[Tensor, ...], shape: Sequence[int], axis: int) -> Tensor:
    """The weight, of its factors.

    Args:
        factors: As in `multiply`.
        shape: The weight's.
        axis: As in `multiply`.
    """
    if factors[-1].ndim == 0:
        numbers, kernels, offset = factors
        turned = shape[axis], shape[1 - axis], *shape[2:]
        # (R, w, 1) * (w, k) -> (R, w, k), of which the first are the weight in memory order
        weight = numbers[..., None] * kernels.flatten(1) + offset
        weight = weight.flatten()[: math.prod(shape)].view(turned)
        return weight.transpose(0, 1) if axis else weight
    if len(factors) == 3:
        out, into, kernel = factors
        # (in, 1, D) * (k, D) -> (in * k, D)
        kernels = (into[:, None] * kernel.reshape(-1, kernel.shape[-1])).flatten(0, 1)
        return F.linear(out, kernels).view(*shape)  # (out, in * k) -> shape
    outer, inner = factors
    rows, parts, _ = outer.shape
    folds, width, *sides, _ = inner.shape
    weight = F.linear(outer.flatten(0, 1), inner.flatten(0, -2))  # (R * P, Q * w * k)
    weight = weight.view(rows, parts, folds, width, *sides).transpose(1, 2)
    weight = weight.reshape(rows * folds, parts * width, *sides)
    weight = weight[: shape[axis], : shape[1 - axis]]
    return weight.transpose(0, 1) if axis else weight


def _order(factors: tuple[Tensor, ...], axis: int) -> Callable[..., Tensor]:
    """What multiplies with factors of such a form, one after the other."""
    if factors[-1].ndim == 0:  # the offset of a separable weight
        return (_depthwise_first, _pointwise_first)[axis]
    if len(factors) == 3:
        return _through_channels
    return (_filters_first, _mixture_first)[axis]


def _filters_first(form: _Form, x: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    rows, parts, size = outer.shape
    folds, width, *kernel, _ = inner.shape
    # (Q, w, *kernel, D) -> (Q * D, w, *kernel)
    filters = inner.movedim(-1, 1).reshape(folds * size, width, *kernel)
    mixture = outer.reshape(rows, parts * size)  # (R, P, D) -> (R, P * D)
    u = form.convolve(form.split(form.pad(x, parts * width), parts), filters)  # (N * P, Q * D)
    u = form.join(u, parts)  # (N, P * Q * D)
    if folds == 1:
        return form.mix(u, mixture, form.bias)
    y = form.mix(form.split(u, folds), mixture)  # (N * Q, R)
    return form.finish(form.join(y, folds, turned=True))  # (N, R * Q)


def _mixture_first(form: _Form, x: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    rows, parts, size = outer.shape
    folds, width, *kernel, _ = inner.shape
    mixture = outer.permute(1, 2, 0).reshape(parts * size, rows)  # (R, P, D) -> (P * D, R)
    # (Q, w, *kernel, D) -> (w, Q * D, *kernel)
    filters = inner.movedim(-1, 1).movedim(2, 0).reshape(width, folds * size, *kernel)
    x = form.split(form.pad(x, rows * folds), folds, turned=True)  # (N * Q, R)
    if math.prod(kernel) == 1:  # a stride comes first then, where it spares work
        first, then = form.convolve, form.mix
        mixture, filters = mixture.view(parts * size, rows, *kernel), filters.flatten(1)
    else:
        first, then = form.mix, form.convolve
    u = form.split(form.join(first(x, mixture), folds), parts)  # (N * P, Q * D)
    if parts == 1:
        return then(u, filters, form.bias)
    return form.finish(form.join(then(u, filters), parts))  # (N, P * w)


def _through_channels(form: _Form, x: Tensor, out: Tensor, into: Tensor, kernel: Tensor) -> Tensor:
    *sides, size = kernel.shape
    if math.prod(sides) == 1:
        u = form.convolve(x, into.t().reshape(size, -1, *sides))
        return form.mix(u, out * kernel.flatten(), form.bias)
    u = form.mix(x, into.t())
    u = form.convolve(u, kernel.movedim(-1, 0)[:, None])  # depthwise, of (D, 1, *kernel)
    return form.mix(u, out, form.bias)


def _depthwise_first(
    form: _Convolution, x: Tensor, numbers: Tensor, kernels: Tensor, offset: Tensor
) -> Tensor:
    """Rows are outputs: output r * f + q is a mixture of the q-th kernels' results."""
    rows, width = numbers.shape
    folds = width // x.shape[1]
    u = torch.cat([x] * folds, 1) if folds > 1 else x  # (N, f * c)
    u = form.depthwise(u, kernels)
    # (R, f * c) -> (f * R, c)
    mixture = numbers.view(rows, folds, -1).transpose(0, 1).flatten(0, 1)
    y = form.mix(u, mixture)  # (N, f * R)
    return form.shifted(form.join(form.split(y, folds), folds, turned=True), x, kernels, offset)


def _pointwise_first(
    form: _Convolution, x: Tensor, numbers: Tensor, kernels: Tensor, offset: Tensor
) -> Tensor:
    """Rows are inputs: input r * f + q is mixed into what the q-th kernels multiply."""
    rows, width = numbers.shape
    out = form.layer.out_channels
    folds = width // out
    # (N, R * f) -> (N, f * R)
    u = form.join(form.split(form.pad(x, rows * folds), folds, turned=True), folds)
    u = form.depthwise(form.mix(u, numbers.t()), kernels)  # (f * out, R), in f groups
    if folds > 1:
        u = _in_format_of(u, u.unflatten(1, (folds, out)).sum(1))  # (N, f * out) -> (N, out)
    return form.shifted(u, x, kernels, offset)


class _Linear:
    """Products along the last axis; groups of channels are an axis before it."""

    def __init__(self, layer: nn.Linear) -> None:
        self.bias = layer.bias
        self.out = layer.out_features

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def pad(self, x: Tensor, channels: int) -> Tensor:
        spare = channels - x.shape[-1]
        return F.pad(x, (0, spare)) if spare else x

    def mix(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    convolve = mix

    def split(self, x: Tensor, groups: int, turned: bool = False) -> Tensor:
        """(..., groups * c) -> (..., groups, c); turned, of (..., c * groups)."""
        if groups == 1:
            return x
        c = x.shape[-1] // groups
        turn: Tensor = x.unflatten(-1, (c, groups) if turned else (groups, c))
        return turn.mT if turned else turn

    def join(self, x: Tensor, groups: int, turned: bool = False) -> Tensor:
        """The inverse of `split`."""
        if groups == 1:
            return x
        return (x.mT if turned else x).flatten(-2)

    def finish(self, y: Tensor) -> Tensor:
        """Less spare channels, with the bias."""
        y = y[..., : self.out]
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Convolution:
    """Products along the axis after the batch's; groups of channels are more of a batch."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.bias = layer.bias
        self.layer = layer
        self.axes = len(layer.kernel_size)
        self.function = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]

    def prepare(self, x: Tensor) -> Tensor:
        """With an axis for the batch, and padded where it is not with zeros."""
        x = x if x.ndim == self.axes + 2 else x[None]
        if self.layer.padding_mode == "zeros":
            return x
        return F.pad(x, self.layer._reversed_padding_repeated_twice, self.layer.padding_mode)

    def pad(self, x: Tensor, channels: int) -> Tensor:
        spare = channels - x.shape[1]
        return F.pad(x, (*(0, 0) * self.axes, 0, spare)) if spare else x

    def mix(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        groups = x.shape[1] // weight.shape[1]
        return self.function(x, weight[(..., *(None,) * self.axes)], bias, groups=groups)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = None
    ) -> Tensor:
        layer = self.layer
        padding: Any = layer.padding if layer.padding_mode == "zeros" else 0
        groups = x.shape[1] // weight.shape[1]
        strides = stride or layer.stride
        return self.function(x, weight, bias, strides, padding, layer.dilation, groups)

    def depthwise(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Each channel convolved with its own kernel."""
        stride = self.layer.stride
        lowered = torch.is_autocast_enabled(x.device.type) or kernels.dtype.itemsize < 4
        if max(stride) == 1 or x.device.type != "cpu" or not lowered:
            return self.convolve(x, kernels[:, None])
        # On CPUs the backward pass of a strided one in bfloat16 takes ten times as long as this
        y = self.convolve(x, kernels[:, None], stride=1)
        steps: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
        return y[steps]

    def split(self, x: Tensor, groups: int, turned: bool = False) -> Tensor:
        """(N, groups * c, ...) -> (N * groups, c, ...); turned, of (N, c * groups, ...)."""
        if groups == 1:
            return x
        c = x.shape[1] // groups
        y = x.unflatten(1, (c, groups)).transpose(1, 2) if turned else x.unflatten(1, (groups, c))
        return _in_format_of(x, y.flatten(0, 1))

    def join(self, x: Tensor, groups: int, turned: bool = False) -> Tensor:
        """The inverse of `split`."""
        if groups == 1:
            return x
        y = x.unflatten(0, (x.shape[0] // groups, groups))
        return _in_format_of(x, (y.transpose(1, 2) if turned else y).flatten(1, 2))

    def finish(self, y: Tensor) -> Tensor:
        """Less spare channels, with the bias."""
        y = y[:, : self.layer.out_channels]
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype).view(-1, *(1,) * self.axes)

    def shifted(self, y: Tensor, x: Tensor, kernels: Tensor, offset: Tensor) -> Tensor:
        """Finished, with what the offset of all weights makes of the input."""
        box = offset.expand(1, 1, *kernels.shape[1:])
        return self.finish(y + self.convolve(x.sum(1, keepdim=True), box))


_Form = _Linear | _Convolution


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """`y` in the memory format of `x`. Rearranging channels does not keep channels_last."""
    last = CHANNELS_LAST.get(x.ndim)
    if last and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return y.contiguous(memory_format=last)
    return y
