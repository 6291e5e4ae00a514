"""The families of tiles, which are linear functions of embeddings, or the paper's two layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperize.config import HyperConfig
from hyperize.family import (
    Factors,
    Family,
    Geometry,
    Metric,
    Net,
    Site,
    eigh,
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
from hyperize.tiling import Grid, Head, Stack, channels, first, kernel_name

__all__: list[str] = []

LEAD = 16
"""Tile channels along the trunk axis, the paper's, unless the request needs another number."""
MAX_HIDDEN = 64
"""The paper's hidden size; generation costs about this many multiply-adds per weight and more."""
TILE_WEIGHTS = (256, 1152)
"""Fewest and most weights of a tile.

Tiles that are too small spend the parameters on embeddings. Tiles that are too large make
generation slow: a weight costs as many multiply-adds as an embedding is long, and the planner gives
larger tiles longer embeddings (at compression 10, a tenth of the tile's weights). Tiles of half the
size that fits best leave about a tenth more of the squared error.
"""
SLENDER = 0.85
"""Factor on the size of a tile of one row, from the size at which the matrix of tiles is square.

It makes tiles of 64 kernels in ResNet-20 and ResNet-56 on CIFAR-10. Of 8 to 128 kernels, about 64
trained fastest from scratch, and fitted trained weights best, or nearly, by `fit_` with data. With
Muon they are ahead of 16, 256 and 1024 kernels in ResNet-20 and in WRN 40-1 (docs/compression.md).
"""
EXPONENTS = sorted(range(-6, 9), key=abs)
"""Powers of two by which tiles differ from the preferred size, the nearest first."""


class OneLayer(Family):
    """A tile is one row of kernels, a linear function of its embedding."""

    name, embeddings = "one layer", "tile"

    def serves(self, config: HyperConfig) -> bool:
        return super().serves(config) and not config.hidden_dim and config.leads in (set(), {1})

    def geometries(
        self, shapes: Mapping[tuple[int, ...], int], config: HyperConfig
    ) -> Iterator[Geometry]:
        """The matrix of tiles of each kernel size should be near square.

        Embeddings and head, of (tiles + weights per tile) * Nz parameters in all, then hold the
        longest embedding for their size.
        """
        if config.tile is not None:
            yield _given(shapes, config)
            return
        rows = _rows(shapes, config.trunk_axis)
        square = _square(rows)
        sizes = {k: SLENDER * min(square, math.sqrt(of.total())) for k, of in rows.items()}
        elements = kernel_sizes(shapes)
        for exponent in EXPONENTS:
            trails = {k: size * 2.0**exponent / elements[k] for k, size in sizes.items()}
            yield 1, _heads(trails, elements, rows if config.factorized else {})

    def factorized_macs(self, grid: Grid, size: int) -> tuple[int, int] | None:
        if grid.blocks is None:
            return None
        parts, folds = grid.blocks
        macs = parts * grid.width * grid.elements + grid.rows * grid.parts * folds
        return macs * size, parts * folds * size + (grid.turned[0] if folds > 1 else 0)

    def hidden(self, net: Net, z: Tensor, scale: Tensor | None, grid: Grid) -> Tensor:
        """What the head multiplies, (R * P, d), scaled where the numbers are still few."""
        return z if scale is None else z * scale

    def factors(self, net: Net, site: Site) -> Factors:
        z, (scale, offset), grid = site
        weight, bias = _used(net, grid)
        return self.hidden(net, z, scale, grid), weight, bias * scale + offset

    def together(self, net: Net, sites: Sequence[Site], dtype: torch.dtype) -> list[Tensor]:
        """One product for each head, of all embeddings, with scales and offsets as columns."""
        weights: dict[int, Tensor] = {}
        for members, stack, left, right in self.stacks(net, sites):
            weights.update(zip(members, stack.divide(product_in(left, right, dtype)), strict=True))
        return [weights[at] for at in range(len(sites))]

    def squares(self, net: Net, sites: Sequence[Site]) -> Tensor | None:
        if any(grid.padding and grid.parts > 1 for *_, grid in sites):
            return None  # there is padding in every row
        total = []
        for _, stack, left, right in self.stacks(net, sites):
            left, right = widened(left), widened(right)
            total.append((left.t() @ left * (right.t() @ right)).sum())
            rows = left.split([grid.rows * grid.parts for grid in stack.grids])
            for grid, of_site in zip(stack.grids, rows, strict=True):
                weights = math.prod(grid.shape) - (len(of_site) - 1) * len(right)  # of the last row
                if weights < len(right):
                    total.append(-(right[weights:] @ of_site[-1]).square().sum())
        return torch.stack(total).sum()

    def head_metrics(
        self, net: Net, kernel: str, sites: Sequence[Site]
    ) -> tuple[list[list[Metric]], Metric]:
        own: list[list[Metric]] = []
        rows, grams = [], dict[int, Tensor]()
        for z, (scale, _), grid in sites:
            weight, _ = _used(net, grid)
            if len(weight) not in grams:
                grams[len(weight)] = self.embedding_gram(net, weight.t() @ weight, grid)
            sides = grid.tiles, math.prod(grid.shape) / grid.tiles
            own.append([Metric(grams[len(weight)], sides, scale)])
            rows.append(self.hidden(net, z, scale, grid))
        return own, Metric(mean_gram(rows), mean_sides(len(net.head(kernel)[0]), sites))

    def embedding_gram(self, net: Net, gram: Tensor, grid: Grid) -> Tensor:
        """The Gram matrix (Nz, Nz) of what embeddings are multiplied by.

        Args:
            net: The hypernetwork.
            gram: That of what the head's inputs are multiplied by, (d, d).
            grid: How the weight is cut.
        """
        n = net.embedding_dim
        # Each component alone, and none of them, made on the device, as a CUDA graph wants it
        z = torch.eye(n + 1, n, dtype=gram.dtype, device=gram.device)
        inputs = self.hidden(net, z, None, grid)
        carried = inputs[:-1] - inputs[-1]  # (Nz, d), of the affine map before the head
        return carried @ gram @ carried.t()

    def stacks(
        self, net: Net, sites: Sequence[Site]
    ) -> Iterator[tuple[list[int], Stack, Tensor, Tensor]]:
        """The last products of several weights, those of a head and a width together.

        Yields:
            Numbers of the sites, their stack, and the two matrices whose product left @ right.T has
            the rows of all: (sum of R * P, d + 2) and (w * k, d + 2).
        """

        def form(grid: Grid) -> tuple[str, int]:
            whole = len(net.head(grid.kernel)[1])
            # A weight of one row may be the beginning of a longer row
            width = whole if grid.rows * grid.parts == 1 else grid.width * grid.elements
            return grid.kernel, width

        for (kernel, width), members in grouped(form(grid) for *_, grid in sites).items():
            z, constants, grids = zip(*(sites[at] for at in members), strict=True)
            stack = Stack(grids)
            hidden, columns = self.stacked(net, stack, z, constants)
            weight, bias = (t[:width] for t in net.head(kernel))
            # [s a, s, o] @ [W, B, 1].T = s (W a + B) + o, for each row a with its own s and o
            left = torch.cat([hidden, columns], 1)
            right = torch.cat([weight, bias[:, None], bias.new_ones(width, 1)], 1)
            yield members, stack, left, right

    def stacked(
        self, net: Net, stack: Stack, z: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What the head multiplies: the scaled rows of all (R, d), their scales and offsets (R, 2).

        Args:
            net: The hypernetwork.
            stack: Of the weights.
            z: Their embeddings.
            constants: Their scales and offsets.
        """
        columns = torch.cat([c.expand(len(e), 2) for c, e in zip(constants, z, strict=True)])
        return stack.collect(z) * columns[:, :1], columns

    def thin_factors(self, net: Net, site: Site) -> tuple[Tensor, ...]:
        z, (scale, offset), grid = site
        assert grid.blocks is not None
        parts, folds = grid.blocks
        weight, bias = _used(net, grid)
        # A layer multiplies with the second factor first where rows are outputs (axis 0). The scale
        # is in the factor that comes first, so that what lies between fits into half precision.
        outer = with_ones(self.hidden(net, z, scale if grid.axis else None, grid))
        inner = with_column(weight if grid.axis else weight * scale, bias * scale + offset)
        return (
            outer.view(-1, parts, outer.shape[-1]),  # (rows, parts, d + 1)
            inner.view(folds, -1, *grid.shape[2:], inner.shape[-1]),  # (folds, w, *k, d + 1)
        )

    def start(self, problem: Any) -> None:
        """By the truncated decomposition of the tiles, padding taken as zero."""
        for kernel, members in grouped(grid.kernel for grid in problem.grids).items():
            weight, bias = problem.net.head(kernel)
            bias.copy_(problem.decompose({at: problem.rows(at) for at in members}, weight))


class TwoLayers(OneLayer):
    """The paper's: a trunk, shared by all weights, makes the head's input of each row."""

    name = "two layers"

    def serves(self, config: HyperConfig) -> bool:
        rows = bool(config.hidden_dim) or config.leads != {1}
        return Family.serves(self, config) and config.hidden_dim != 0 and rows

    def geometries(
        self, shapes: Mapping[tuple[int, ...], int], config: HyperConfig
    ) -> Iterator[Geometry]:
        """The matrix of all tiles should be near square, and tiles have about `LEAD` rows."""
        if config.tile is not None:
            yield _given(shapes, config)
            return
        elements, rows = kernel_sizes(shapes), _rows(shapes, config.trunk_axis)
        square = _square(rows)
        candidates = sorted(
            (abs(math.log2(lead / LEAD)) + abs(exponent), lead, square * 2.0**exponent)
            for lead in (1, 2, 4, 8, 16, 32, 64)
            for exponent in EXPONENTS
            if lead > 1 or config.hidden_dim
        )
        for _, lead, size in candidates:
            trails = {k: size / (lead * n) for k, n in elements.items()}
            yield lead, _heads(trails, elements, rows if config.factorized and lead == 1 else {})

    def hidden_dims(self, tiles: int, geometry: Geometry, config: HyperConfig) -> Sequence[int]:
        if config.hidden_dim is not None:
            return [config.hidden_dim]
        # The trunk balances the embeddings where lead * d ~ tiles; a larger d than the widest
        # head's output would be redundant, one above MAX_HIDDEN slow.
        lead, heads = geometry
        top = min(power_of_two(tiles / lead), MAX_HIDDEN)
        powers = [2**e for e in range(max(head.width for head in heads).bit_length() + 1)]
        return sorted(powers, key=lambda d: (d > MAX_HIDDEN, abs(math.log2(d / top))))

    def shared(self, lead: int, hidden: int, nz: Any) -> dict[str, tuple[Any, Any]]:
        return {"trunk": (nz, lead * hidden)}

    def fan_in(self, hidden: int, nz: Any) -> Any:
        return hidden

    def hidden(self, net: Net, z: Tensor, scale: Tensor | None, grid: Grid) -> Tensor:
        weight, bias = net.layer("trunk")
        # (tiles, Nz) @ (Nz, lead * d)
        a = linear(z, weight, bias) if scale is None else linear(z * scale, weight, bias * scale)
        return grid.unstack(a)

    def metrics(
        self, net: Net, sites: Sequence[Site]
    ) -> tuple[list[list[Metric]], dict[str, Metric]] | None:
        told = super().metrics(net, sites)
        lefts = {kernel: (w := net.head(kernel)[0]).t() @ w for kernel in net.heads}
        left = torch.stack([lefts[grid.kernel] for *_, grid in sites]).mean(0)
        right = mean_gram([z * scale for z, (scale, _), _ in sites])
        width = sum(grid.width * grid.elements for *_, grid in sites) / len(sites)
        if told is not None:
            told[1]["trunk.weight"] = Metric(right, mean_sides(width, sites), left=left)
        return told

    def embedding_gram(self, net: Net, gram: Tensor, grid: Grid) -> Tensor:
        trunk = net.layer("trunk")[0]
        parts = trunk.view(grid.lead, -1, trunk.shape[1])  # (lead * d, Nz) -> (lead, d, Nz)
        return (parts.mT @ (gram @ parts)).sum(0)  # (lead, Nz, d) @ (lead, d, Nz), over the lead

    def stacked(
        self, net: Net, stack: Stack, z: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        scaled, columns = super().stacked(net, stack, z, constants)
        weight, bias = net.layer("trunk")
        # (tiles, Nz + 1) @ (Nz + 1, lead * d)
        left, right = torch.cat([scaled, columns[:, :1]], 1), with_column(weight, bias)
        tiles = product_in(left, right, scaled.dtype).split([len(e) for e in z])
        rows = torch.cat([g.unstack(t) for g, t in zip(stack.grids, tiles, strict=True)])
        counts = [grid.rows * grid.parts for grid in stack.grids]
        return rows, torch.cat([c.expand(n, 2) for c, n in zip(constants, counts, strict=True)])

    def readers(self, net: Net, block: int) -> list[nn.Module]:
        return [net.get_submodule("trunk")]

    def start(self, problem: Any) -> None:
        """By the decomposition of the tiles' rows, then that of what it leaves of the tiles."""
        rows = {}
        for kernel in problem.net.heads:
            members = [at for at, grid in enumerate(problem.grids) if grid.kernel == kernel]
            weight, bias = problem.net.head(kernel)
            gram = weight.new_zeros(len(weight), len(weight))
            for at in members:
                x = problem.rows(at)
                gram[: x.shape[1], : x.shape[1]] += x.t() @ x * problem.pull(at)
            basis = eigh(gram)[1].flip(1)[:, : weight.shape[1]]
            basis = F.pad(basis, (0, weight.shape[1] - basis.shape[1]))
            weight.copy_(basis)
            bias.zero_()
            for at in members:
                x = problem.rows(at)
                # (R * P, w * k) @ (w * k, d) -> (tiles, lead * d)
                rows[at] = problem.grids[at].stack(x @ basis[: x.shape[1]])
        weight, bias = problem.net.layer("trunk")
        bias.copy_(problem.decompose(rows, weight))


def _used(net: Net, grid: Grid) -> tuple[Tensor, Tensor]:
    """The part of a head that a weight uses, which may be narrower than a tile."""
    weight, bias = net.head(grid.kernel)
    used = grid.width * grid.elements
    return first(weight, used), first(bias, used)


def _rows(shapes: Mapping[tuple[int, ...], int], axis: int) -> dict[str, Counter[int]]:
    """Kernel size -> channels of a row -> weights that have such rows."""
    rows: dict[str, Counter[int]] = {}
    for shape, count in shapes.items():
        of = rows.setdefault(kernel_name(shape), Counter())
        of[channels(shape, axis)[1]] += math.prod(shape) * count
    return rows


def _square(rows: Mapping[str, Counter[int]]) -> int:
    """Weights of a tile with which the matrix of all tiles would be square, within bounds."""
    smallest, largest = TILE_WEIGHTS
    return min(max(math.isqrt(sum(of.total() for of in rows.values())), smallest), largest)


def _given(shapes: Mapping[tuple[int, ...], int], config: HyperConfig) -> Geometry:
    """The tiles that the request names, of which the other sites have been set aside."""
    lead, heads = 0, []
    for kernel, elements in kernel_sizes(shapes).items():
        tile = config.tile_of(kernel)
        assert tile is not None
        lead = tile[config.trunk_axis]  # the same for all, which HyperConfig sees to
        heads.append(Head(kernel, tile[1 - config.trunk_axis], elements))
    return lead, tuple(heads)


def _heads(
    trails: Mapping[str, float], elements: Mapping[str, int], rows: Mapping[str, Counter[int]]
) -> tuple[Head, ...]:
    """Heads whose trails are near the values given; lined up with rows, where these are given."""
    return tuple(
        Head(k, _lined_up(trail, rows[k]) if rows else power_of_two(trail), elements[k])
        for k, trail in trails.items()
    )


def _lined_up(trail: float, columns: Mapping[int, int]) -> int:
    """The trail near a value whose tiles end with the rows of most weights.

    Args:
        trail: The value; not more than half of an octave away from it.
        columns: Channels of a row -> number of weights that have such rows.
    """
    low = max(1, math.ceil(trail / math.sqrt(2)))
    trails = np.arange(low, max(low, int(trail * math.sqrt(2))) + 1)
    lengths, weights = (np.array(side) for side in zip(*columns.items(), strict=True))
    many, few = trails[:, None], lengths[None]
    ends = ((few % many == 0) | (many % few == 0)) @ weights
    return int(min(trails[ends == ends.max()], key=lambda near: abs(math.log(near / trail))))
