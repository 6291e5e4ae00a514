"""Alternating least squares for weights of channels, each of which is a CP decomposition.

Scaled and shifted, a weight is K_ijk = sum_r u_ir v_jr W_kr + B_k, of rows i, columns j, elements k
of the kernel and components r; W and B belong to all weights of a kernel size. The Gram matrix of
the products of two factors is the product of their Gram matrices (Kolda and Bader 2009, SIAM Review
51, sec. 3.4), so that a factor has a closed solution of the price of one product with the weight.

The objective is the squared error and what `noisy` adds to it.

Letters of shapes: R rows, C columns, k elements, d components, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyperize.moments import Moments
from hyperize.products import dot, product

__all__: list[str] = []

NOISE = 1e-3
"""Variance of the relative errors that factors are to bear, independent of each other.

ResNet-20 on CIFAR-10 (JPEG re-encoded) after one epoch and some steps with the rounding, in 8 bits
and in 4, seed 0. At 4x: 78.6 % and 23.1 % with 0, 82.0 % and 60.7 % with 1e-3, 82.0 % and 74.5 %
with 1e-2. At 10x: 74.5 % and 19.0 %, 75.3 % and 50.0 %, 74.3 % and 67.3 %.
"""
_RIDGE = 1e-6
"""Share of the diagonal that is added to normal equations. What is solved for is a change, so that
the ridge shortens steps along directions of which the weights say nothing, and moves no optimum."""
_DAMPING = 1e-3
"""The same for the moments of channels in a preconditioner, which need not be exact."""


@dataclass(frozen=True)
class Member:
    """One weight and what it is made of.

    Attributes:
        weight: What is fitted, (R, C * k).
        rows: u, (R, d); written.
        columns: v, (C, d); written.
        scale: Of the weight.
        offset: Of the weight.
        pull: How much its squared error, divided by the scale, counts.
    """

    weight: Tensor
    rows: Tensor
    columns: Tensor
    scale: Tensor
    offset: Tensor
    pull: float


def solve_blocks(members: Iterable[Member], weight: Tensor, bias: Tensor) -> float:
    """Sets the factors of some weights and then their head, each to its optimum.

    Args:
        members: The weights of one kernel size.
        weight: W, (k, d); written.
        bias: B, (k,); written.

    Returns:
        By how much the objective is below that of a zero head.
    """
    k, d = weight.shape
    # Of the normal equations of the head, with the bias as its last column
    right_side, normal = weight.new_zeros(k, d + 1), weight.new_zeros(d + 1, d + 1)
    gram_w = weight.t() @ weight
    for member in members:
        u, v, scale, shift = member.rows, member.columns, member.scale, member.offset / member.scale
        # (R, C * k) @ (C * k, d), less what bias and offset contribute, which is one row
        made = (bias + shift) @ weight  # (d,)
        along = product(member.weight, pairs(v, weight)) / scale - v.sum(0) * made
        gram = noisy(gram_w * (v.t() @ v))
        u += solved(gram, along - u @ gram)
        left = _with_ones(u)
        # (d + 1, R) @ (R, C * k) -> (d + 1, C, k)
        along = product(left.t(), member.weight).view(d + 1, -1, k).div_(scale)
        gram = noisy(gram_w * (u.t() @ u))
        pulled = (along[:-1] * weight.t()[:, None]).sum(2).t() - u.sum(0) * made  # (C, d)
        v += solved(gram, pulled - v @ gram)
        right = _with_ones(v)
        pulled = (along * right.t()[..., None]).sum(1).t()  # (k, d + 1)
        right_side += member.pull * (pulled - shift * left.sum(0) * right.sum(0))
        normal += member.pull * (left.t() @ left) * (right.t() @ right)
    normal[:-1, :-1] = noisy(normal[:-1, :-1])  # the bias has no part in it
    both = torch.cat([weight, bias[:, None]], 1)
    both += solved(normal, right_side - both @ normal)
    weight.copy_(both[:, :-1])
    bias.copy_(both[:, -1])
    return dot(both, 2 * right_side - both @ normal)


class OutputFit(Protocol):
    """The fit of one weight to the outputs of its layer, for the data's inputs."""

    def step(self) -> None:
        """Lowers the objective over each block in turn."""

    def objective(self) -> float:
        """The mean square of the outputs' errors, summed over the outputs."""


class Outputs:
    """One weight, fitted by the outputs of its layer, with its head held.

    The second moments S of the layer's inputs couple all numbers of an output channel. In the
    normal equations of the outputs' factor, S is on both sides and cancels, so that it has a closed
    solution. The inputs' factor has none; it takes a step of gradient descent of exact length,
    preconditioned by the Kronecker product of S's partial traces over kernels and over channels.

    Letters of shapes besides the module's: G groups, O outputs of a group.

    Args:
        weight: Scaled, shifted and less the bias, T, (G * O, C * k).
        outputs: u, (G * O, d); written.
        inputs: v, (C, d); written.
        head: W, (k, d).
        moments: S, not transposed.
    """

    def __init__(
        self, weight: Tensor, outputs: Tensor, inputs: Tensor, head: Tensor, moments: Moments
    ) -> None:
        groups = len(moments.values)
        self.v, self.head, self.moments = inputs, head, moments
        self.u = outputs.view(groups, -1, outputs.shape[1])  # (G, O, d)
        channels, kernel = moments.marginals(len(head))
        self.channels = _cholesky(channels, _DAMPING)
        self.normal = head.t() @ (kernel @ head)  # (d, d)
        weighed = moments.weigh(weight)
        self.whole = dot(weight, weighed)
        self.weighed = weighed.view(groups, -1, weight.shape[1])  # T S, (G, O, C * k)
        self.made = moments.times(pairs(inputs, head).expand(groups, -1, -1))
        """S P of the products P of v and W, (G, C * k, d). A step adds S times the change of P."""
        self._look()

    def _look(self) -> None:
        """Sees how P has changed."""
        made = pairs(self.v, self.head)[None]
        self.along = product(self.weighed, made)  # T S P, (G, O, d)
        self.gram = product(made.mT, self.made)  # P^T S P, (G, d, d)

    def step(self) -> None:
        """Sets u, and lowers the error over v."""
        k, d = self.head.shape
        gram = noisy(self.gram)
        self.u += solved(gram, self.along - product(self.u, gram))
        gram = noisy(self.u.mT @ self.u)  # (G, d, d)
        # Half of the negative gradient over P, and over v
        pull = product(self.weighed.mT, self.u) - product(self.made, gram)  # (G, C * k, d)
        pull = (pull.sum(0).view(-1, k, d) * self.head).sum(1)  # (C, d)
        change = solved(gram.sum(0) * self.normal, pull)
        change = torch.cholesky_solve(change, self.channels)
        made = pairs(change, self.head)[None]
        moved = self.moments.times(made.expand_as(self.made))
        curvature = dot(made, product(moved, gram))
        if curvature > 0:
            length = dot(pull, change) / curvature
            self.v += length * change
            self.made += length * moved
            self._look()

    def objective(self) -> float:
        own = dot(noisy(self.gram), self.u.mT @ self.u)
        return max(0.0, self.whole - 2 * dot(self.along, self.u) + own)


class TransposedOutputs:
    """The same for a transposed convolution, of which both factors have closed solutions.

    Its moments couple input channels, along the first axis of the weight, and not kernels. Hence
    they cancel in the normal equations of the inputs' factor.

    Args:
        weight: Scaled, shifted and less the bias, T, (G * C, O * k).
        outputs: u, (O, d); written.
        inputs: v, (G * C, d); written.
        head: W, (k, d).
        moments: S, transposed.
    """

    def __init__(
        self, weight: Tensor, outputs: Tensor, inputs: Tensor, head: Tensor, moments: Moments
    ) -> None:
        self.u, self.v, self.head = outputs, inputs, head
        self.weight, self.moments = weight, moments
        self.normal = head.t() @ head  # (d, d)
        self.whole = moments.norm(weight)
        self._look()

    def _look(self) -> None:
        """Sees how v has changed."""
        k, d = self.head.shape
        made = self.moments.times(self.v.view(len(self.moments.values), -1, d)).flatten(0, 1)  # S v
        along = product(self.weight.t(), made).view(-1, k, d)
        self.along = (along * self.head).sum(1)  # (O, d)
        self.gram = self.v.t() @ made * self.normal

    def step(self) -> None:
        """Sets u, and then v."""
        gram = noisy(self.gram)
        self.u += solved(gram, self.along - self.u @ gram)
        gram = noisy(self.u.t() @ self.u * self.normal)
        along = product(self.weight, pairs(self.u, self.head))
        self.v += solved(gram, along - self.v @ gram)
        self._look()

    def objective(self) -> float:
        own = dot(noisy(self.gram), self.u.t() @ self.u)
        return max(0.0, self.whole - 2 * dot(self.along, self.u) + own)


def noisy(gram: Tensor) -> Tensor:
    """The Gram matrix of all terms, with what errors of the factors add in the mean.

    Large terms that cancel out fit a little better, but do not bear rounding. Independent relative
    errors of a factor, of variance `NOISE`, add so much of each term's square to the squared error.
    """
    return gram + NOISE * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """All products of a row of each, (n, d) and (m, d): (n * m, d)."""
    return (a[:, None] * b).flatten(0, 1)


def solved(gram: Tensor, right: Tensor) -> Tensor:
    """The change x of x @ gram = right, with a ridge: (..., d, d), (..., n, d) -> (..., n, d)."""
    wide = gram.double()
    # Each component in a unit of its own, so that rounding and ridge touch all alike
    unit = wide.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    unit = torch.where(unit > 0, 1 / unit, 0.0).unsqueeze(-2)  # (..., 1, d)
    factor = _cholesky(wide * unit * unit.mT, _RIDGE)
    change = torch.cholesky_solve((right.double() * unit).mT, factor).mT * unit
    return change.to(right.dtype)


def _cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factors of positive matrices, shares of their mean diagonals added to them."""
    added = ridge * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(added > 0, added, 1.0)[..., None, None]
    ones = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix + added * ones)
    return _cholesky(matrix, 10 * ridge) if bool(failed.any()) else factor


def _with_ones(x: Tensor) -> Tensor:
    """A column of ones, whose coefficient is the bias: (n, d) -> (n, d + 1)."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
