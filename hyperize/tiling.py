"""How a weight is cut into the tiles that a hypernetwork generates, and joined again.

A tile spans `lead` channels along one axis of the weight, the trunk axis, and `trail` channels
along the other, times the kernel (arXiv 1609.09106, sec. 3.1, with 16 by 16 channels). A weight
with fewer than `trail` channels has several of its rows folded into one, so that depthwise and
narrow layers fill their tiles; one with more is cut into parts of equal width. Tiles of lead 1 go
over the weight in its memory order, across the ends of rows.

Letters of shapes: R rows (channels along the trunk axis, after folding), P parts, w channels of a
part, k elements of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__: list[str] = []


@dataclass(frozen=True)
class Head:
    """The hypernetwork's output layer for one kernel size.

    Attributes:
        kernel: Kernel size as in "3x3"; "1" for all kernels of one element, dense layers included.
        trail: Channels of a tile along the other axis than the trunk's.
        kernel_elements: Elements k of the kernel.
    """

    kernel: str
    trail: int
    kernel_elements: int

    @property
    def width(self) -> int:
        """Weights that the head writes per row of a tile."""
        return self.trail * self.kernel_elements


class Grid(NamedTuple):
    """How one weight is cut into tiles.

    Attributes:
        kernel: Which head writes it.
        shape: The weight's shape.
        axis: The trunk axis.
        lead: Rows of a tile.
        rows: Rows R, after folding.
        parts: Tiles P along the other axis.
        width: Channels w of each part.
        tiles: Number of embeddings: tiles, or channels along both axes.
    """

    kernel: str
    shape: tuple[int, ...]
    axis: int
    lead: int
    rows: int
    parts: int
    width: int
    tiles: int

    @property
    def turned(self) -> tuple[int, ...]:
        """The weight's shape with the trunk axis first."""
        rows, columns = channels(self.shape, self.axis)
        return rows, columns, *self.shape[2:]

    @property
    def elements(self) -> int:
        """Elements k of the kernel."""
        return math.prod(self.shape[2:])

    @property
    def blocks(self) -> tuple[int, int] | None:
        """How many tiles make a row, and how many rows make a tile; one of the two is 1.

        None where rows end in the middle of tiles, so that neither is a whole number.
        """
        columns = self.turned[1]
        if self.parts > 1:
            return self.parts, 1
        if self.width % columns == 0:
            return 1, self.width // columns
        return (columns // self.width, 1) if columns % self.width == 0 else None

    @property
    def padding(self) -> int:
        """How many numbers of the rows are no weights."""
        return self.rows * self.parts * self.width * self.elements - math.prod(self.shape)

    @property
    def is_flat(self) -> bool:
        """Whether the rows, one behind the other, are the weight in memory, and then padding."""
        return self.axis == 0 and self.parts == 1

    def join(self, rows: Tensor) -> Tensor:
        """The weight, contiguous, of its rows, (R * P, w * k), less what pads them."""
        turned = self.turned
        if self.parts > 1:
            # (R * P, w * k) -> (R, P * w * k) -> (R, columns * k) -> turned
            columns = math.prod(turned[1:])
            weight = rows.view(self.rows, -1)[:, :columns].contiguous().view(turned)
        else:
            weight = first(rows.view(-1), math.prod(turned)).view(turned)  # (R, w * k) -> turned
        if self.axis == 1:
            weight = weight.transpose(0, 1).contiguous()
        return weight if weight.ndim == len(self.shape) else weight.view(self.shape)

    def cut(self, weight: Tensor) -> Tensor:
        """The inverse of `join`: the rows of a weight, (R * P, w * k), padded with zeros.

        They share the weight's memory where they can.
        """
        if self.axis == 1 and weight.ndim > 1:
            weight = weight.transpose(0, 1)
        width = self.width * self.elements
        lines, row = (self.rows, self.parts * width) if self.parts > 1 else (1, self.rows * width)
        flat = weight.reshape(lines, -1)  # turned -> (R, columns * k), or one line for all
        if spare := row - flat.shape[1]:
            flat = F.pad(flat, (0, spare))
        return flat.reshape(-1, width)  # (lines, row) -> (R * P, w * k)

    def tiles_at(self, first: Tensor, second: Tensor) -> Tensor:
        """Numbers of the tiles that hold channels, given by their numbers along axis 0 and 1."""
        row, column = (second, first) if self.axis else (first, second)
        if self.parts > 1:
            return row // self.lead * self.parts + column // self.width
        return (row * self.turned[1] + column) // self.width // self.lead

    def unstack(self, tiles: Tensor) -> Tensor:
        """From tiles to rows: (tiles, lead * n) -> (R * P, n).

        Rearranging it before the last product, while it is small, lets that product write the
        weight in its memory order.
        """
        if self.lead == 1:
            return tiles
        # (row tiles * P, lead * n) -> (row tiles * lead, P, n), less the spare rows
        tiles = tiles.view(-1, self.parts, self.lead, tiles.shape[1] // self.lead).transpose(1, 2)
        n = tiles.shape[-1]
        rows = first(tiles.reshape(-1, self.parts, n), self.rows)
        return rows.reshape(-1, n)  # (R, P, n) -> (R * P, n)

    def stack(self, rows: Tensor) -> Tensor:
        """The inverse of `unstack`: (R * P, n) -> (tiles, lead * n), padded with zeros."""
        n = rows.shape[1]
        rows = rows.view(self.rows, self.parts, n)  # (R * P, n) -> (R, P, n)
        rows = F.pad(rows, (0, 0, 0, 0, 0, -self.rows % self.lead))
        # (row tiles * lead, P, n) -> (row tiles, P, lead, n) -> (tiles, lead * n)
        rows = rows.view(-1, self.lead, self.parts, n).transpose(1, 2)
        return rows.reshape(-1, self.lead * n)


def make_grid(shape: Sequence[int], lead: int, head: Head, axis: int) -> Grid:
    """Cuts a weight of the given shape into tiles of `lead` x `head.trail` channels."""
    rows, columns = channels(shape, axis)
    if lead == 1:  # a row's end need not be a tile's, so that all tiles but the last are full
        width = min(rows * columns, head.trail)
        rows, parts = -(-rows * columns // width), 1
    elif columns <= head.trail:
        fold = min(rows, head.trail // columns)
        rows, parts, width = -(-rows // fold), 1, fold * columns
    else:
        parts = -(-columns // head.trail)
        width = -(-columns // parts)
    tiles = -(-rows // lead) * parts
    return Grid(head.kernel, tuple(shape), axis, lead, rows, parts, width, tiles)


def kernel_name(shape: Sequence[int]) -> str:
    """Name of a weight's kernel size: "3x3", or "1" for one element and for no kernel at all."""
    kernel = shape[2:]
    return "1" if math.prod(kernel) == 1 else "x".join(map(str, kernel))


def channels(shape: Sequence[int], axis: int) -> tuple[int, int]:
    """Channels along an axis and along the other; a vector is a matrix of one column."""
    both = shape[0], (shape[1] if len(shape) > 1 else 1)
    return both[axis], both[1 - axis]


def first(x: Tensor, length: int) -> Tensor:
    """The first rows of `x`; `x` itself, if these are all.

    The backward pass of a slice fills a tensor with zeros and copies, even if nothing is cut off.
    """
    return x if len(x) == length else x[:length]


class Stack:
    """Weights that are made together: their embeddings in one matrix, and the weights apart again.

    A weight that the loss does not reach leaves its embeddings without a gradient, as it would if
    it were made by itself. An optimizer then leaves them alone.

    Args:
        grids: Of the weights.
    """

    def __init__(self, grids: Sequence[Grid]) -> None:
        self.grids = grids
        # Which weights the running backward pass has reached; all, if nothing tells of single ones
        self._unknown = [True] * len(grids)
        self.reached = list(self._unknown)

    def collect(self, embeddings: Sequence[Tensor]) -> Tensor:
        """The embeddings, one weight's below the other's: (sum of tiles, Nz)."""
        result: Tensor = _Collect.apply(self, *embeddings)
        return result

    def divide(self, rows: Tensor) -> list[Tensor]:
        """The weights, of the rows of all, (sum of R * P, w * k).

        All grids have one width, or a single row that is not longer than the others'.
        """
        return list(_Divide.apply(self, rows))

    def mark(self, at: int, weight: Tensor) -> Tensor:
        """A weight that was not made by `divide`."""
        self._unknown[at] = self.reached[at] = False
        result: Tensor = _Mark.apply(self, at, weight)
        return result

    def told(self) -> list[bool]:
        """Which weights the backward pass that ends has reached; forgotten for the next one."""
        reached, self.reached = self.reached, list(self._unknown)
        return reached

    def _unite(self, gradients: Sequence[Tensor | None], shape: torch.Size) -> Tensor:
        """The gradient of the rows; zero where weights have none, and where rows have padding."""
        pieces: list[Tensor | None] = []
        gaps: list[int] = []  # behind each piece
        for grid, gradient in zip(self.grids, gradients, strict=True):
            flat = None
            if gradient is not None:
                flat = (gradient if grid.is_flat else grid.cut(gradient)).reshape(-1)
            pieces.append(flat)
            size = grid.rows * grid.parts * shape[1]
            gaps.append(size if flat is None else size - len(flat))
        like = next(piece for piece in pieces if piece is not None)
        zeros = like.new_zeros(max(gaps))  # the same memory serves all gaps
        filled = (part for p, gap in zip(pieces, gaps, strict=True) for part in (p, zeros[:gap]))
        return torch.cat([part for part in filled if part is not None and len(part)]).view(shape)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Stack, *embeddings: Tensor) -> Tensor:
        ctx.stack, ctx.sizes = stack, [len(z) for z in embeddings]
        return torch.cat(embeddings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(gradient.split(ctx.sizes), ctx.stack.told(), strict=True)
        return None, *(part if was else None for part, was in parts)


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Stack, rows: Tensor) -> tuple[Tensor, ...]:
        ctx.stack, ctx.shape = stack, rows.shape
        ctx.set_materialize_grads(False)
        parts = rows.split([grid.rows * grid.parts for grid in stack.grids])
        weights = (grid.join(part) for grid, part in zip(stack.grids, parts, strict=True))
        # cuDNN has slower kernels for weights that are not aligned
        return tuple(w.clone() if w.is_cuda and not _is_aligned(w) else w for w in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None]:
        ctx.stack.reached = [gradient is not None for gradient in gradients]
        united = ctx.stack._unite(gradients, ctx.shape) if any(ctx.stack.reached) else None
        return None, united


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Stack, at: int, weight: Tensor) -> Tensor:
        ctx.stack, ctx.at = stack, at
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        ctx.stack.reached[ctx.at] = True
        return None, None, gradient


def _is_aligned(part: Tensor) -> bool:
    """Whether a part of an allocation begins at a whole multiple of 16 bytes, as cuDNN wants it."""
    return bool(part.storage_offset() * part.element_size() % 16 == 0)
