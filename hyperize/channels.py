"""The family of channels: a kernel comes from the product of its two channels' embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperize.config import HyperConfig
from hyperize.cp import NOISE, Member, OutputFit, Outputs, TransposedOutputs, solve_blocks
from hyperize.family import (
    Factors,
    Family,
    Geometry,
    Metric,
    Net,
    Site,
    by_kernel,
    kernel_sizes,
    mean_sides,
    product_in,
    widened,
    with_column,
    with_ones,
)
from hyperize.tiling import Grid, Head, Stack, channels

__all__: list[str] = []


class Channels(Family):
    """A kernel comes from the product of its two channels' embeddings: a CP decomposition.

    All layers share the factor over the kernel. Embeddings are those of the rows, then those of the
    columns.
    """

    name, embeddings, degree, closed = "channels", "channel", 2, True
    unit = "channel"

    def geometries(
        self, shapes: Mapping[tuple[int, ...], int], config: HyperConfig
    ) -> Iterator[Geometry]:
        yield (
            1,
            tuple(Head(kernel, 1, elements) for kernel, elements in kernel_sizes(shapes).items()),
        )

    def grid(self, shape: Sequence[int], lead: int, head: Head, axis: int) -> Grid:
        rows, columns = channels(shape, axis)
        return Grid(head.kernel, tuple(shape), axis, 1, rows, 1, columns, rows + columns)

    def factorized_macs(self, grid: Grid, size: int) -> tuple[int, int] | None:
        deep = grid.elements > 1
        macs = grid.tiles + (grid.elements if deep else 0)
        return macs * size, 2 * size if deep else size

    def factors(self, net: Net, site: Site) -> Factors:
        z, (scale, offset), grid = site
        weight, bias = net.head(grid.kernel)
        rows, columns = z[: grid.rows], z[grid.rows :]
        # (columns, 1, Nz) * (k, Nz) -> (columns * k, Nz)
        kernels = (columns[:, None] * weight).flatten(0, 1)
        return rows * scale, kernels, (bias * scale + offset).repeat(len(columns))

    def together(self, net: Net, sites: Sequence[Site], dtype: torch.dtype) -> list[Tensor]:
        """One product for each weight, of factors that are made together for each head."""
        weights: dict[int, Tensor] = {}
        for kernel, members in by_kernel(sites).items():
            z, constants, grids = zip(*(sites[at] for at in members), strict=True)
            stack = Stack(grids)
            sides = stack.collect(z).split([n for grid in grids for n in (grid.rows, grid.width)])
            rows, columns = torch.cat(sides[::2]), torch.cat(sides[1::2])
            ends = torch.cat([c.expand(g.rows, 2) for c, g in zip(constants, grids, strict=True)])
            weight, bias = net.head(kernel)
            # The sum over [s u, s, o] * [v, 1, 1] * [W, B, 1] is s (W (u * v) + B) + o
            left = torch.cat([rows * ends[:, :1], ends], 1)
            columns = torch.cat([columns, columns.new_ones(len(columns), 2)], 1)
            kernels = torch.cat([weight, bias[:, None], bias.new_ones(len(bias), 1)], 1)
            # (columns, 1, d + 2) * (k, d + 2) -> (columns * k, d + 2)
            right = (columns[:, None] * kernels).flatten(0, 1)
            lefts = left.split([grid.rows for grid in grids])
            rights = right.split([grid.width * grid.elements for grid in grids])
            for number, (at, a, b) in enumerate(zip(members, lefts, rights, strict=True)):
                weights[at] = stack.mark(number, grids[number].join(product_in(a, b, dtype)))
        return [weights[at] for at in range(len(sites))]

    def squares(self, net: Net, sites: Sequence[Site]) -> Tensor | None:
        total = []
        for site in sites:
            # (out, D), (in, D), (*kernel, D) -> three of (D, D)
            flat = [widened(f).reshape(-1, f.shape[-1]) for f in self.thin_factors(net, site)]
            out, into, kernel = (f.t() @ f for f in flat)
            total.append((out * into * kernel).sum())
        return torch.stack(total).sum()

    def head_metrics(
        self, net: Net, kernel: str, sites: Sequence[Site]
    ) -> tuple[list[list[Metric]], Metric]:
        weight, _ = net.head(kernel)
        of_kernel = weight.t() @ weight
        own, both = [], []
        for z, (scale, _), grid in sites:
            rows, columns = (f.t() @ f for f in z.split(self.split(grid)))
            weights = math.prod(grid.shape)
            of_rows = Metric(columns * of_kernel, (grid.rows, weights / grid.rows), scale)
            of_columns = Metric(rows * of_kernel, (grid.width, weights / grid.width), scale)
            own.append([of_rows, of_columns])
            both.append(rows * columns * scale.square())
        return own, Metric(torch.stack(both).mean(0), mean_sides(len(weight), sites))

    def thin_factors(self, net: Net, site: Site) -> tuple[Tensor, ...]:
        z, (scale, offset), grid = site
        weight, bias = net.head(grid.kernel)
        sides = with_ones(z[: grid.rows]), with_ones(z[grid.rows :])
        out, into = sides[::-1] if grid.axis else sides
        kernel = with_column(weight, bias + offset / scale)  # (k, Nz + 1)
        # The inputs are multiplied first, so that the scale belongs there
        return out, into * scale, kernel.view(*grid.shape[2:], -1)

    def embeddings_at(self, z: Tensor, grid: Grid, first: Tensor, second: Tensor) -> Tensor:
        rows, columns = (second, first) if grid.axis else (first, second)
        return z[rows] * z[grid.rows + columns]

    def silence(self, z: Tensor, grid: Grid) -> None:
        z[: grid.rows] = 0  # gradients of these are not zero, as those of the others would be

    def split(self, grid: Grid) -> list[int]:
        return [grid.rows, grid.width]

    def sweep(self, problem: Any) -> float:
        below = 0.0
        for kernel in problem.net.heads:
            members = [at for at, grid in enumerate(problem.grids) if grid.kernel == kernel]
            if members:  # all layers of a kernel size may have been replaced since
                parts = (_member(problem, at) for at in members)
                below += solve_blocks(parts, *problem.net.head(kernel))
        return float(problem.centred) - below

    def penalty(self, problem: Any, at: int) -> float:
        (u, v), (weight, _) = problem.z[at], problem.net.head(problem.grids[at].kernel)
        u, v, w = (factor.square().sum(0) for factor in (u, v, weight))
        return NOISE * float((u * v * w).sum())

    def outputs(self, problem: Any, at: int) -> OutputFit | None:
        grid, (scale, offset) = problem.grids[at], problem.constants[at]
        weight, bias = problem.net.head(grid.kernel)
        moments, length = problem.moments[at], weight.shape[1]
        groups, _, columns = moments.values.shape
        if groups > 1 and columns <= length and not moments.transposed:
            return None  # equations of the length of an embedding, for each of many groups
        one, two = problem.z[at] if grid.axis == 0 else problem.z[at][::-1]
        target = (problem.targets[at] - offset) / scale
        # (n, m, *kernel) -> (n, m, k) -> (n, m * k), of the channels along the weight's first axes
        target = (target.view(len(one), len(two), -1) - bias).flatten(1)
        if moments.transposed:
            return TransposedOutputs(target, two, one, weight, moments)
        return Outputs(target, one, two, weight, moments)


def _member(problem: Any, at: int) -> Member:
    """A weight of channels as the fit takes it."""
    rows = problem.grids[at].cut(problem.targets[at])
    (u, v), (scale, offset) = problem.z[at], problem.constants[at]
    return Member(rows, u, v, scale, offset, problem.pull(at))
