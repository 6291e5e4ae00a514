"""The separable family: a kernel is the kernel of its column times a number of its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperize.config import HyperConfig
from hyperize.family import (
    Family,
    Geometry,
    Metric,
    Net,
    Site,
    by_kernel,
    grouped,
    kernel_sizes,
    mean_gram,
    mean_sides,
    power_of_two,
    product_in,
    widened,
    with_column,
    with_ones,
)
from hyperize.products import linear
from hyperize.tiling import Grid, Head, Stack, channels, kernel_name

__all__: list[str] = []

STORED = (16, 64)
"""Shortest and longest embeddings of separable weights whose numbers are stored as they are.

Between them, they are as long as kernels are, so that these can be any.
"""
MOSTLY = 0.9
"""Share of all weights that kernels of several elements have where numbers are stored.

Weights with kernels of one element do not become smaller by that, and stay dense.
"""
LEARNED = "3x3"
"""The kernel size for which separable weights have been found to learn better than tiles."""
LEADS = (64, 128, 32, 256)
"""Numbers of a tile, where they are generated, from the preferred one on."""
POWERS = 30
"""Steps of the power iteration by which a fit finds the kernel that serves a column best."""


class Separable(Family):
    """A kernel is the kernel of its column times a number of its own; both are generated.

    Where that is small enough, the numbers are stored as they are, cut into embeddings.

    A convolution with such a weight is a depthwise one and a pointwise one, one after the other
    (Chollet 2017, arXiv 1610.02357). Weights with more rows than columns have several kernels for
    each column, which their rows take in turn, so that there are as many kernels as rows.
    Embeddings are those of the pointwise numbers, then those of the depthwise kernels.

    It is what the planner takes by itself, for one network, where nine tenths of the weights are in
    3x3 kernels, the stored numbers meet the request, and use two thirds of what it allows. There it
    learns better than tiles (docs/compression.md, "Separable weights").
    """

    name, embeddings, degree = "separable", "separable", 2
    share = 2 / 3

    def serves(self, config: HyperConfig) -> bool:
        if config.embeddings is not None:
            return super().serves(config)
        sizes = config.tile, config.hidden_dim, config.embedding_dim
        several = config.conditions, config.condition_dim
        return all(value is None for value in (*sizes, *several))

    def geometries(
        self, shapes: Mapping[tuple[int, ...], int], config: HyperConfig
    ) -> Iterator[Geometry]:
        """Numbers are stored if that is small enough; else they are compressed as kernels are."""
        elements = kernel_sizes(shapes)
        length = _stored_length(elements.values())
        leads = [lead for lead in LEADS if lead > length and lead >= (config.embedding_dim or 1)]
        if config.embeddings is None:
            leads = [length] if _mostly_kernels(shapes, LEARNED) else []
        elif _mostly_kernels(shapes) and config.embedding_dim in (None, length):
            leads.insert(0, length)
        elif not leads:
            leads = [power_of_two(config.embedding_dim or 1) * 2]
        for lead in leads:
            # Of kernels of one element there are few to a weight, and a narrow head will do
            trails = {kernel: -(-lead // max(size, 4)) for kernel, size in elements.items()}
            yield lead, tuple(Head(k, trail, elements[k]) for k, trail in trails.items())

    def lengths(self, geometry: Geometry, shapes: Mapping[tuple[int, ...], int]) -> tuple[int, int]:
        lead, heads = geometry
        if not _mostly_kernels(shapes):
            return 1, lead // 2  # so that kernels of one element become smaller as well
        stored = lead == _stored_length(head.kernel_elements for head in heads)
        return (lead, lead) if stored else (1, lead - 1)

    def grid(self, shape: Sequence[int], lead: int, head: Head, axis: int) -> Grid:
        rows, columns = channels(shape, axis)
        folds = -(-rows // columns)
        rows, width = -(-rows // folds), columns * folds
        tiles = -(-rows * width // lead) + -(-width // head.trail)
        return Grid(head.kernel, tuple(shape), axis, lead, rows, 1, width, tiles)

    def shared(self, lead: int, hidden: int, nz: Any) -> dict[str, tuple[Any, Any]]:
        if isinstance(nz, int):
            return {"pointwise": (nz, lead)} if nz < lead else {}
        return {"pointwise": (nz, np.where(nz < lead, lead, 0))}

    def macs(self, grid: Grid, hidden: int, nz: int) -> int:
        numbers, kernels = grid.rows * grid.width, grid.width * grid.elements
        return (numbers + kernels) * nz + grid.rows * kernels

    def factorized_macs(self, grid: Grid, size: int) -> tuple[int, int] | None:
        if grid.elements == 1:
            return None
        # The last is the offset's, which all outputs have in common
        return grid.width * (grid.elements + grid.rows) + grid.elements, grid.width

    def factors(self, net: Net, site: Site) -> None:
        return None

    def weight(self, net: Net, site: Site) -> Tensor:
        _, (_, offset), grid = site
        numbers, kernels = self.thin(net, site)
        rows = torch.addcmul(offset, numbers[..., None], kernels)  # (R, w, 1) * (w, k)
        return grid.join(rows.flatten(1))  # (R, w, k) -> (R, w * k)

    def thin(self, net: Net, site: Site) -> tuple[Tensor, Tensor]:
        """The pointwise numbers of a weight, (R, w), and its depthwise kernels, (w, k), scaled."""
        z, (scale, _), grid = site
        of_numbers, of_kernels = z.split(self.split(grid))
        weight, bias = net.head(grid.kernel)
        numbers = of_numbers
        if not _is_stored(net, grid):
            numbers = linear(of_numbers, *net.layer("pointwise"))  # (tiles, lead)
        kernels = linear(of_kernels * scale, weight, bias * scale)  # (tiles, trail * k)
        return _laid(numbers, grid.rows, grid.width), _laid(kernels, grid.width, grid.elements)

    def together(self, net: Net, sites: Sequence[Site], dtype: torch.dtype) -> list[Tensor]:
        """Two products for each head, and one of numbers and kernels for weights of each size."""
        weights: dict[int, Tensor] = {}
        # Sums over many tiles would overflow a float16 in the backward pass
        inner = dtype if dtype == torch.bfloat16 else sites[0][0].dtype
        for kernel, unsorted in by_kernel(sites).items():
            members = sorted(unsorted, key=lambda at: _size(sites[at][2]))
            z, constants, grids = zip(*(sites[at] for at in members), strict=True)
            stack = Stack(grids)
            counts = [self.split(grid) for grid in grids]
            parts = stack.collect(z).split([n for both in counts for n in both])
            scales = [c[:1].expand(n, 1) for c, (_, n) in zip(constants, counts, strict=True)]
            scale, of_kernels = torch.cat(scales), torch.cat(parts[1::2])
            # [s z, s] @ [W, B].T = s (W z + B), for each row z with its own s
            left = torch.cat([of_kernels * scale, scale], 1)
            kernels = product_in(left, with_column(*net.head(kernel)), inner)
            numbers = torch.cat(parts[::2])
            if not _is_stored(net, grids[0]):
                right = with_column(*net.layer("pointwise"))
                numbers = product_in(with_ones(numbers), right, inner)
            offsets = torch.stack(constants)[:, 1].to(inner)
            alike = grouped(map(_size, grids))  # the sizes follow each other
            points = numbers.to(inner).split([sum(counts[n][0] for n in g) for g in alike.values()])
            depths = kernels.split([sum(counts[n][1] for n in g) for g in alike.values()])
            of_sizes = zip(alike.items(), points, depths, strict=True)
            for ((r, w, k), group), point, depth in of_sizes:
                of_group = offsets[group[0] : group[-1] + 1]
                made = _Products.apply(
                    of_group, _laid(point, len(group), r, w), _laid(depth, len(group), w, k)
                )
                made = made.to(dtype).flatten(2)  # (n, r, w, k) -> (n, r, w * k)
                for number, rows in zip(group, made.unbind(), strict=True):
                    weights[members[number]] = stack.mark(number, grids[number].join(rows))
        return [weights[at] for at in range(len(sites))]

    def squares(self, net: Net, sites: Sequence[Site]) -> Tensor | None:
        if any(grid.padding for *_, grid in sites):
            return None
        total = []
        for site in sites:
            numbers, kernels = (widened(part) for part in self.thin(net, site))
            offset = widened(site[1][1])
            # Of (p d + o)^2, the parts summed up over rows and elements
            total.append(numbers.square().sum(0) @ kernels.square().sum(1))
            total.append(2 * offset * (numbers.sum(0) @ kernels.sum(1)))
            total.append(offset.square() * numbers.numel() * kernels.shape[1])
        return torch.stack(total).sum()

    def metrics(
        self, net: Net, sites: Sequence[Site]
    ) -> tuple[list[list[Metric]], dict[str, Metric]]:
        """All columns of a weight count alike, as they nearly do in training."""
        stored = _is_stored(net, sites[0][2])
        of_numbers = None if stored else (w := net.layer("pointwise")[0]).t() @ w
        of_kernels = {kernel: (w := net.head(kernel)[0]).t() @ w for kernel in net.heads}
        own = []
        rows: dict[str, list[tuple[Tensor, Site]]] = {}
        for site in sites:
            z, (scale, _), grid = site
            counts = self.split(grid)
            numbers, kernels = self.thin(net, site)
            # What a number moves the weight by, and what a kernel does
            number = kernels.square().sum() / grid.width
            kernel = numbers.square().sum() * scale.square() / grid.width
            weights = math.prod(grid.shape)
            first, second = z.split(counts)
            if of_numbers is None:
                shape = grid.rows, grid.width
                sides = grid.rows, weights / grid.rows
                of_first = Metric(None, sides, number.sqrt(), shape=shape)
            else:
                of_first = Metric(of_numbers * number, (counts[0], weights / counts[0]))
                rows.setdefault("pointwise.weight", []).append((first * number.sqrt(), site))
            gram = of_kernels[grid.kernel] * kernel
            own.append([of_first, Metric(gram, (counts[1], weights / counts[1]))])
            path = f"heads.{grid.kernel}.weight"
            rows.setdefault(path, []).append((second * kernel.sqrt(), site))
        shared = {}
        for path, members in rows.items():
            matrices, of_sites = zip(*members, strict=True)
            side = len(net.get_parameter(path))
            shared[path] = Metric(mean_gram(matrices), mean_sides(side, of_sites))
        return own, shared

    def start(self, problem: Any) -> None:
        """By the nearest products of numbers and kernels, if numbers are stored; else at random."""
        if not _is_stored(problem.net, problem.grids[0]):
            problem.randomise()
            return
        for kernel, members in grouped(grid.kernel for grid in problem.grids).items():
            weight, bias = problem.net.head(kernel)
            columns, kernels = {}, {}
            for at in members:
                grid = problem.grids[at]
                # (R, w * k) -> (R, w, k) -> (w, R, k)
                of_column = problem.rows(at).view(grid.rows, grid.width, -1).transpose(0, 1)
                columns[at] = of_column.contiguous()
                flat = _principal(columns[at]).flatten()
                spare = len(problem.z[at][1]) * len(weight) - len(flat)
                kernels[at] = F.pad(flat, (0, spare)).view(-1, len(weight))  # (tiles, trail * k)
            bias.copy_(problem.decompose(kernels, weight, 1))
            for at, of_column in columns.items():
                made = linear(problem.z[at][1], weight, bias)  # (tiles, trail * k)
                made = _laid(made, *of_column.shape[::2])  # (w, k)
                squares = made.square().sum(1).clamp_min(torch.finfo(made.dtype).tiny)
                numbers = (of_column @ made[..., None]).squeeze(2) / squares[:, None]  # (w, R)
                z = problem.z[at][0].zero_()
                z.view(-1)[: numbers.numel()] = numbers.t().flatten()

    def thin_factors(self, net: Net, site: Site) -> tuple[Tensor, ...]:
        numbers, kernels = self.thin(net, site)
        return numbers, kernels.view(len(kernels), *site[2].shape[2:]), site[1][1]

    def embeddings_at(self, z: Tensor, grid: Grid, first: Tensor, second: Tensor) -> Tensor:
        row, column = (second, first) if grid.axis else (first, second)
        return z[(row * grid.turned[1] + column) // grid.lead]

    def silence(self, z: Tensor, grid: Grid) -> None:
        z[: self.split(grid)[0]] = 0  # of the numbers; gradients of these are not zero

    def absorb(self, net: Net, z: Tensor, grid: Grid, scale: float) -> float:
        if not _is_stored(net, grid):
            return scale
        z[: self.split(grid)[0]] *= scale
        return 1.0

    def split(self, grid: Grid) -> list[int]:
        numbers = -(-grid.rows * grid.width // grid.lead)
        return [numbers, grid.tiles - numbers]

    def readers(self, net: Net, block: int) -> list[nn.Module]:
        if block:
            return list(net.heads.children())
        return [layer for name, layer in net.named_children() if name == "pointwise"]


def _stored_length(elements: Iterable[int]) -> int:
    """The length of embeddings with which kernels of these sizes can be any, within bounds."""
    shortest, longest = STORED
    return min(max(shortest, 1 << (max(elements) - 1).bit_length()), longest)


def _mostly_kernels(shapes: Mapping[tuple[int, ...], int], kernel: str | None = None) -> bool:
    """Whether kernels of one size, or all of several elements, have nearly all weights."""
    counts = Counter[str]()
    for shape, count in shapes.items():
        counts[kernel_name(shape)] += math.prod(shape) * count
    deep = counts.total() - counts["1"] if kernel is None else counts[kernel]
    return deep >= MOSTLY * counts.total()


def _is_stored(net: Net, grid: Grid) -> bool:
    """Whether a separable weight's embeddings are its pointwise numbers, which no layer makes."""
    return net.embedding_dim >= grid.lead


def _laid(tiles: Tensor, *shape: int) -> Tensor:
    """Tiles as a matrix (rows, columns), or as n of them, each the first numbers of its tiles."""
    flat, numbers = tiles.view(*shape[:-2], -1), math.prod(shape[-2:])
    return (flat if flat.shape[-1] == numbers else flat[..., :numbers]).reshape(shape)


def _size(grid: Grid) -> tuple[int, int, int]:
    """Rows, columns and elements of a separable weight."""
    return grid.rows, grid.width, grid.elements


class _Products(torch.autograd.Function):
    """Several weights of one size, of their offsets, (n,), numbers, (n, r, w), and kernels.

    Its backward pass has three products, where torch's own would have six.
    """

    @staticmethod
    def forward(ctx: Any, offsets: Tensor, numbers: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(numbers, kernels)
        offsets = offsets[:, None, None, None]
        return torch.addcmul(offsets, numbers[..., None], kernels[:, None])  # (n, r, w, k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        numbers, kernels = ctx.saved_tensors
        of_columns = gradient.transpose(1, 2).contiguous()  # (n, w, r, k)
        to_numbers = of_columns @ kernels[..., None]  # (n, w, r, 1)
        to_kernels = numbers.mT[:, :, None] @ of_columns  # (n, w, 1, k)
        return None, to_numbers.squeeze(3).mT, to_kernels.squeeze(2)


def _principal(matrices: Tensor) -> Tensor:
    """The first principal components of matrices' rows, scaled by their deviations.

    Args:
        matrices: (w, R, k).

    Returns:
        (w, k).
    """
    largest = matrices.square().sum(2).argmax(1)
    d = matrices[torch.arange(len(matrices), device=matrices.device), largest][..., None]
    for _ in range(POWERS):
        d = F.normalize(matrices.mT @ (matrices @ d), dim=1)  # (w, k, 1)
    deviations = (matrices @ d).square().mean(1)  # (w, R, 1) -> (w, 1)
    return d.squeeze(2) * deviations.sqrt()
