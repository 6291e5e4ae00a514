"""Second moments of what a weight multiplies, by which a fit weighs the weight's errors.

An error E of a weight changes its layer's output by E x, whose mean square is the trace of E S E^T
for the second moments S of the inputs x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperize.products import dot, product

__all__: list[str] = []

_SHRINKAGE = 0.1
"""Share of equal and independent inputs that is added to what the samples say.

Else the weights go astray where the samples say nothing. ResNet-20 at 4x, CIFAR-10 (JPEG
re-encoded), accuracy on 1,500 test images after the fit, seed 0: with 8 images 51.7 % without,
53.8 % with 0.01, 62.0 % with 0.1, 64.7 % with 0.3; with 256 images 70.9 % without, 70.7 % with 0.1.
"""


@dataclass(frozen=True)
class Moments:
    """Second moments S, in the smaller of two forms.

    Attributes:
        values: S, (groups, columns, columns), where the weight is seen as (groups, rows, columns).
            Or samples X, (groups, samples, columns), divided so that S is X^T X.
        transposed: The weight is seen as (groups, columns, rows) instead.
        sampled: Whether the values are samples.
        ridge: What is added to the diagonal of S.
    """

    values: Tensor
    transposed: bool = False
    sampled: bool = False
    ridge: float = 0.0

    def times(self, x: Tensor) -> Tensor:
        """S x for x of (groups, columns, n)."""
        if self.sampled:
            result = product(self.values.transpose(1, 2), product(self.values, x))
        else:
            result = product(self.values, x)
        return result.add_(x, alpha=self.ridge) if self.ridge else result

    def weigh(self, error: Tensor) -> Tensor:
        """E S for an error E in the weight's shape."""
        groups, _, columns = self.values.shape
        if self.transposed:
            # (columns of all groups, ...) -> (groups, columns, rows)
            return self.times(error.reshape(groups, columns, -1)).view_as(error)
        # (rows of all groups, ...) -> (groups, rows, columns)
        seen = error.reshape(groups, -1, columns)
        if self.sampled:
            weighed = product(product(seen, self.values.transpose(1, 2)), self.values)
        else:
            weighed = product(seen, self.values)
        if self.ridge:
            weighed.add_(seen, alpha=self.ridge)
        return weighed.view_as(error)

    def norm(self, weight: Tensor) -> float:
        """Mean square of the outputs that a weight makes, summed over them."""
        return max(0.0, dot(weight, self.weigh(weight)))

    def norm_of_noise(self, weight: Tensor) -> float:
        """The expectation of `norm` for random values of unit variance in a weight's place."""
        return self._mean_square() * weight.numel()

    def marginals(self, elements: int) -> tuple[Tensor, Tensor]:
        """Factors of the Kronecker product that has the partial traces of S, summed over groups.

        Args:
            elements: Of a kernel; the columns are channels times these.

        Returns:
            Moments of channels, (channels, channels), and moments of elements, with a mean of 1 on
            the diagonal, (elements, elements).
        """
        groups, n, columns = self.values.shape
        if self.sampled:
            x = self.values.view(groups * n, -1, elements)  # (samples, channels, elements)
            channels, flat = x.new_zeros(x.shape[1], x.shape[1]), x.flatten(0, 1)
            for part in x.unbind(2):
                y = part.contiguous()
                channels += product(y.t(), y)
            kernel = product(flat.t(), flat)
        else:
            s = self.values.sum(0).view(columns // elements, elements, -1, elements)
            channels = s.diagonal(dim1=1, dim2=3).sum(-1)
            kernel = s.diagonal(dim1=0, dim2=2).sum(-1)
        trace = channels.diagonal().sum()
        channels = channels / (groups * elements)
        channels.diagonal().add_(self.ridge)
        kernel = kernel * torch.where(trace > 0, elements / trace, 1.0)
        return channels, kernel

    def shrunk(self) -> Moments:
        """The same with a share of their mean added to the diagonal (Ledoit and Wolf 2004)."""
        return replace(self, ridge=_SHRINKAGE * self._mean_square())

    def to(self, dtype: torch.dtype) -> Moments:
        """The same in another dtype."""
        return replace(self, values=self.values.to(dtype))

    def _mean_square(self) -> float:
        """The mean of the diagonal of S."""
        groups, _, columns = self.values.shape
        if self.sampled:
            trace = dot(self.values, self.values)
        else:
            trace = float(self.values.diagonal(dim1=1, dim2=2).sum())
        return trace / (groups * columns) + self.ridge


class Sum:
    """Moments as they grow.

    Args:
        transposed: As in `Moments`.
    """

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed
        self.count = 0
        self.samples: list[Tensor] = []
        """All, (groups, samples, columns), while they are fewer than the columns."""
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Counts samples, (groups, samples, columns)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.count += x.shape[1]
        if self.total is None and self.count < x.shape[2]:
            self.samples.append(x.clone())  # the model may write into what it gave the layer
            return
        for part in (*self.samples, x):
            gram = product(part.transpose(1, 2), part)
            self.total = gram if self.total is None else self.total.add_(gram)
        self.samples.clear()

    def moments(self) -> Moments:
        """The mean over all samples; these are no longer held here."""
        if self.total is not None:
            return Moments(self.total.div_(self.count), self.transposed)
        samples = torch.cat(self.samples, 1).div_(math.sqrt(self.count))
        self.samples.clear()
        return Moments(samples, self.transposed, sampled=True)
