"""The families of generators: the ways in which embeddings make a weight, one class for each.

Every family is linear in each of its parts, as the paper's is (arXiv 1609.09106, sec. 3.1). With
the embedding z of a tile, a scale s and an offset o of each weight, and the heads of kernel sizes:

    one layer     K   = s (W_out z + B_out) + o                  one row of `trail` kernels a tile
    two layers    a_i = W_i z + B_i, i = 1..lead                 the paper's eq. 4
                  K_i = s (W_out a_i + B_out) + o
    channels      K_ij = s (W_out (u_i * v_j) + B_out) + o       one kernel; u, v of its channels
    separable     p    = W z + B                                 a number for each of `lead` kernels
                  d    = W_out z' + B_out                        kernels of `trail` columns
                  K_ij = s p_ij d_j + o

A family is registered by `register_family`, and asked for by `HyperConfig.embeddings`. Planner,
hypernetwork, fit and factors know families by the methods of `Family` only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperize.config import EMBEDDINGS, ConfigError, HyperConfig
from hyperize.cp import NOISE, Member, OutputFit, Outputs, TransposedOutputs, solve_blocks
from hyperize.products import linear
from hyperize.tiling import Grid, Head, Stack, channels, first, kernel_name, make_grid

__all__ = ["Family", "register_family"]

Geometry = tuple[int, tuple[Head, ...]]
"""The lead of all tiles, and the heads."""
Factors = tuple[Tensor, Tensor, Tensor]
"""x (R * P, d), weight (w * k, d) and bias (w * k,), of which `linear` makes a weight's rows."""
Site = tuple[Tensor, Tensor, Grid]
"""What a weight is made of beside the hypernetwork: embeddings, scale and offset (2,), grid."""

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
POWERS = 30
"""Steps of the power iteration by which a fit finds the kernel that serves a column best."""
LEADS = (64, 128, 32, 256)
"""Numbers of a tile, where they are generated, from the preferred one on."""
EXPONENTS = sorted(range(-6, 9), key=abs)
"""Powers of two by which tiles differ from the preferred size, the nearest first."""


class Net(Protocol):
    """The hypernetwork, as far as a family sees it."""

    heads: nn.ModuleDict
    embedding_dim: int

    def head(self, kernel: str) -> tuple[Tensor, Tensor]: ...

    def layer(self, name: str) -> tuple[Tensor, Tensor]: ...

    def children(self) -> Iterator[nn.Module]: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...


@dataclass(frozen=True)
class Metric:
    """How far a change of a matrix of parameters moves weights.

    The squared norm of the weights' change is scale^2 * trace(left X right X^T) for a change X of
    the matrix. Of a matrix that makes several weights, it is the mean over these.

    Attributes:
        right: Gram matrix of what the rows are multiplied by, (n, n) for a matrix (m, n); None for
            the identity.
        sides: Rows and columns of the weight, seen as a matrix whose rows or columns the matrix's
            rows make.
        scale: A scalar, or None for 1.
        left: Gram matrix of what blocks of rows are multiplied by, (b, b) with b a divisor of m;
            None for the identity.
        shape: As which the first numbers of the parameters are laid out, if they are no matrix.
    """

    right: Tensor | None
    sides: tuple[float, float]
    scale: Tensor | None = None
    left: Tensor | None = None
    shape: tuple[int, int] | None = None


class Family:
    """One way to make weights from embeddings. Subclass it and override what differs.

    Attributes:
        name: What plans call it; unique.
        embeddings: The value of `HyperConfig.embeddings` that asks for it.
        degree: Number of embeddings that are multiplied with each other.
        closed: Whether the fit has closed solutions, `sweep` and `outputs`. Weights are then fitted
            to their layers' outputs one after the other.
        unit: What of a weight has an embedding, in a word.
        share: Of the parameters that a request allows, the part that it has to use so as to be
            taken where the request names no embeddings.
    """

    name: str
    embeddings: str
    degree: int = 1
    closed: bool = False
    unit: str = "tile"
    share: float = 0.0

    # ------------------------------------------------------------------------------ sizes, counts

    def serves(self, config: HyperConfig) -> bool:
        """Whether a request leaves room for this family; without embeddings named, for tiles."""
        return (config.embeddings or "tile") == self.embeddings

    def geometries(
        self, shapes: Mapping[tuple[int, ...], int], config: HyperConfig
    ) -> Iterator[Geometry]:
        """The tiles that it can have for weights of these shapes, from the preferred ones on."""
        raise NotImplementedError

    def hidden_dims(self, tiles: int, geometry: Geometry, config: HyperConfig) -> Sequence[int]:
        """Sizes of the hidden layer to try, from the preferred one on; 0 is for none."""
        return [0]

    def grid(self, shape: Sequence[int], lead: int, head: Head, axis: int) -> Grid:
        """How a weight is cut, and how many embeddings it has."""
        return make_grid(shape, lead, head, axis)

    def shared(self, lead: int, hidden: int, nz: Any) -> dict[str, tuple[Any, Any]]:
        """Layers besides the heads: name -> inputs and outputs; for arrays of nz, too."""
        return {}

    def fan_in(self, hidden: int, nz: Any) -> Any:
        """Inputs of each head."""
        return nz

    def lengths(
        self, geometry: Geometry, shapes: Mapping[tuple[int, ...], int]
    ) -> tuple[int, int | None]:
        """The shortest and the longest embedding to choose from; None if there is no longest."""
        return 1, None

    def macs(self, grid: Grid, hidden: int, nz: int) -> int:
        """Multiply-adds of generating one weight."""
        shared = sum(a * b for a, b in self.shared(grid.lead, hidden, nz).values())
        row = int(self.fan_in(hidden, nz)) * grid.width * grid.elements
        return int(grid.tiles * shared) + grid.rows * grid.parts * row

    def factorized_macs(self, grid: Grid, size: int) -> tuple[int, int] | None:
        """Multiply-adds of a layer that computes with factors, and numbers between its products.

        Args:
            grid: Of the layer's weight.
            size: Inputs of the heads, and one more for the bias.

        Returns:
            Both per position of the output; None if there are no such factors.
        """
        return None

    # --------------------------------------------------------------------------------- arithmetic

    def factors(self, net: Net, site: Site) -> Factors | None:
        """The last product of a weight, scaled and shifted, in its memory order.

        None where a weight is no such product; the family then has its own `weight`.
        """
        raise NotImplementedError

    def weight(self, net: Net, site: Site) -> Tensor:
        """A weight, contiguous, in its shape and the dtype of its head."""
        factors = self.factors(net, site)
        assert factors is not None
        return site[2].join(linear(*factors))

    def together(self, net: Net, sites: Sequence[Site], dtype: torch.dtype) -> list[Tensor]:
        """Several weights, in as few operations as the family can; here one by one.

        Args:
            net: The hypernetwork.
            sites: Of the weights.
            dtype: Of the weights. Products are made in it where its range allows.

        Returns:
            The weights, in the order of the sites.
        """
        return [self.weight(net, site).to(dtype) for site in sites]

    def squares(self, net: Net, sites: Sequence[Site]) -> Tensor | None:
        """The sum of the squares of all weights, without making them; None if it cannot be had.

        The squared norm of a product A B^T is the sum over A^T A * B^T B, of two small matrices.
        """
        return None

    def metrics(
        self, net: Net, sites: Sequence[Site]
    ) -> tuple[list[list[Metric]], dict[str, Metric]] | None:
        """How far changes of the parameters move weights, for `hyperize.HyperMuon`.

        Args:
            net: The hypernetwork.
            sites: Of the weights.

        Returns:
            For each weight, of its embeddings, divided as `split` says; and of each matrix of the
            hypernetwork that weights are made with, by its path; what is left out is trained by
            plain Muon. None if this family cannot tell.
        """
        own: dict[int, list[Metric]] = {}
        shared: dict[str, Metric] = {}
        for kernel, members in _by_kernel(sites).items():
            told = self.head_metrics(net, kernel, [sites[at] for at in members])
            if told is None:
                return None
            own.update(zip(members, told[0], strict=True))
            shared[f"heads.{kernel}.weight"] = told[1]
        return [own[at] for at in range(len(sites))], shared

    def head_metrics(
        self, net: Net, kernel: str, sites: Sequence[Site]
    ) -> tuple[list[list[Metric]], Metric] | None:
        """What `metrics` tells of the weights of one kernel size, and of their head."""
        return None

    def thin_factors(self, net: Net, site: Site) -> tuple[Tensor, ...]:
        """The weight's factors as `hyperize.factorized.multiply` takes them."""
        raise NotImplementedError

    def embeddings_at(self, z: Tensor, grid: Grid, first: Tensor, second: Tensor) -> Tensor:
        """What kernels of a weight are generated from.

        Args:
            z: The weight's embeddings.
            grid: How it is cut.
            first: Numbers of channels along axis 0.
            second: Numbers of channels along axis 1, as many.

        Returns:
            The embedding of each kernel, (kernels, Nz).
        """
        return z[grid.tiles_at(first, second)]

    def silence(self, z: Tensor, grid: Grid) -> None:
        """Sets embeddings, in place, to what makes a constant weight and still learns."""
        z.zero_()

    # ---------------------------------------------------------------------------------------- fit

    def start(self, problem: Any) -> None:
        """Sets what the fit starts from, whatever it was; here at random.

        Args:
            problem: The `hyperize.solver.Problem`, with the hypernetwork and all targets.
        """
        problem.randomise()

    def split(self, grid: Grid) -> list[int]:
        """How many of a weight's embeddings, in order, belong to each block of the fit."""
        return [grid.tiles]

    def blocks(self, net: Net, z: Mapping[Any, list[Tensor]]) -> list[list[Tensor]]:
        """Groups of tensors in each of which all weights are affine, the others held.

        Args:
            net: The hypernetwork.
            z: The embeddings of each weight, divided as `split` says.
        """
        embeddings = [list(part) for part in zip(*z.values(), strict=True)]
        layers = [list[Tensor](layer.parameters()) for layer in net.children()]
        return [*embeddings, *(layer for layer in layers if layer)]

    def sweep(self, problem: Any) -> float:
        """Sets each block in turn to its optimum for the weights as they are.

        Args:
            problem: As in `start`.

        Returns:
            The objective.
        """
        raise NotImplementedError

    def penalty(self, problem: Any, at: int) -> float:
        """What a weight adds to the objective besides its squared error, divided by its scale."""
        return 0.0

    def outputs(self, problem: Any, at: int) -> OutputFit | None:
        """What fits one weight to its layer's outputs, over its embeddings.

        Args:
            problem: As in `start`.
            at: Number of the site, which has moments.

        Returns:
            An object with methods `step` and `objective`; None to use conjugate gradients.
        """
        raise NotImplementedError

    def readers(self, net: Net, block: int) -> list[nn.Module]:
        """The layers that multiply embeddings, whose weights have one column for each component.

        Args:
            net: The hypernetwork.
            block: Number of the block, as `split` divides the embeddings of a weight.

        Returns:
            The layers; none if this block's embeddings are no vectors of components.
        """
        return list(net.heads.children())


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
        elements = _kernels(shapes)
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
            weights.update(zip(members, stack.divide(_product(left, right, dtype)), strict=True))
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
        return own, Metric(_gram(rows), _sides(len(net.head(kernel)[0]), sites))

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
        alike: dict[tuple[str, int], list[int]] = {}
        for at, (*_, grid) in enumerate(sites):
            whole = len(net.head(grid.kernel)[1])
            # A weight of one row may be the beginning of a longer row
            width = whole if grid.rows * grid.parts == 1 else grid.width * grid.elements
            alike.setdefault((grid.kernel, width), []).append(at)
        for (kernel, width), members in alike.items():
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
        for kernel in problem.net.heads:
            members = [at for at, grid in enumerate(problem.grids) if grid.kernel == kernel]
            if members:  # all layers of a kernel size may have been replaced since
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
        elements, rows = _kernels(shapes), _rows(shapes, config.trunk_axis)
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
        top = min(_power_of_two(tiles / lead), MAX_HIDDEN)
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
        right = _gram([z * scale for z, (scale, _), _ in sites])
        width = sum(grid.width * grid.elements for *_, grid in sites) / len(sites)
        if told is not None:
            told[1]["trunk.weight"] = Metric(right, _sides(width, sites), left=left)
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
        tiles = _product(left, right, scaled.dtype).split([len(e) for e in z])
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
        yield 1, tuple(Head(kernel, 1, elements) for kernel, elements in _kernels(shapes).items())

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
        for kernel, members in _by_kernel(sites).items():
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
                weights[at] = stack.mark(number, grids[number].join(_product(a, b, dtype)))
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
        return own, Metric(torch.stack(both).mean(0), _sides(len(weight), sites))

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
        elements = _kernels(shapes)
        length = _stored_length(elements.values())
        leads = [lead for lead in LEADS if lead > length and lead >= (config.embedding_dim or 1)]
        if config.embeddings is None:
            leads = [length] if _mostly_kernels(shapes, LEARNED) else []
        elif _mostly_kernels(shapes) and config.embedding_dim in (None, length):
            leads.insert(0, length)
        elif not leads:
            leads = [_power_of_two(config.embedding_dim or 1) * 2]
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
        return _separated(*self.thin(net, site), offset, grid)

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
        for kernel, unsorted in _by_kernel(sites).items():
            members = sorted(unsorted, key=lambda at: _size(sites[at][2]))
            z, constants, grids = zip(*(sites[at] for at in members), strict=True)
            stack = Stack(grids)
            counts = [self.split(grid) for grid in grids]
            parts = stack.collect(z).split([n for both in counts for n in both])
            scales = [c[:1].expand(n, 1) for c, (_, n) in zip(constants, counts, strict=True)]
            scale, of_kernels = torch.cat(scales), torch.cat(parts[1::2])
            # [s z, s] @ [W, B].T = s (W z + B), for each row z with its own s
            left = torch.cat([of_kernels * scale, scale], 1)
            kernels = _product(left, with_column(*net.head(kernel)), inner)
            numbers = torch.cat(parts[::2])
            if not _is_stored(net, grids[0]):
                right = with_column(*net.layer("pointwise"))
                numbers = _product(with_ones(numbers), right, inner)
            offsets = torch.stack(constants)[:, 1].to(inner)
            alike = Counter(map(_size, grids))  # n weights of each size, as they follow each other
            tiles = dict(zip(map(_size, grids), counts, strict=True))
            divided = [[n * tiles[size][part] for size, n in alike.items()] for part in (0, 1)]
            of_sizes = zip(
                numbers.to(inner).split(divided[0]), kernels.split(divided[1]), strict=True
            )
            before = 0
            for ((r, w, k), n), (point, depth) in zip(alike.items(), of_sizes, strict=True):
                points, depths = _laid(point, n, r, w), _laid(depth, n, w, k)
                made = _Products.apply(offsets[before : before + n], points, depths)
                made = made.to(dtype).flatten(2)  # (n, r, w, k) -> (n, r, w * k)
                for number, rows in enumerate(made.unbind(), before):
                    weights[members[number]] = stack.mark(number, grids[number].join(rows))
                before += n
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
            shared[path] = Metric(_gram(matrices), _sides(side, of_sites))
        return own, shared

    def start(self, problem: Any) -> None:
        """By the nearest products of numbers and kernels, if numbers are stored; else at random."""
        if not _is_stored(problem.net, problem.grids[0]):
            problem.randomise()
            return
        for kernel in problem.net.heads:
            weight, bias = problem.net.head(kernel)
            members = [at for at, grid in enumerate(problem.grids) if grid.kernel == kernel]
            columns, kernels = {}, {}
            for at in members:
                grid = problem.grids[at]
                # (R, w * k) -> (R, w, k) -> (w, R, k)
                of_column = problem.rows(at).view(grid.rows, grid.width, -1).transpose(0, 1)
                columns[at] = of_column.contiguous()
                flat = _principal(columns[at]).flatten()
                spare = len(problem.z[at][1]) * len(weight) - len(flat)
                kernels[at] = F.pad(flat, (0, spare)).view(-1, len(weight))  # (tiles, trail * k)
            if members:
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

    def split(self, grid: Grid) -> list[int]:
        numbers = -(-grid.rows * grid.width // grid.lead)
        return [numbers, grid.tiles - numbers]

    def readers(self, net: Net, block: int) -> list[nn.Module]:
        if block:
            return list(net.heads.children())
        return [layer for name, layer in net.named_children() if name == "pointwise"]


FAMILIES: dict[str, Family] = {}
"""Families by name, in the order in which the planner prefers them."""


def register_family(family: Family) -> Family:
    """Makes a family of generators known, to be asked for by `HyperConfig.embeddings`.

    Register it in every process that loads a model or a file with it.

    Args:
        family: An instance of a subclass of `Family`.

    Returns:
        The same.

    Raises:
        ConfigError: It is no `Family` with a name and a value of `embeddings`, or its name is
            taken.
    """
    if not isinstance(family, Family):
        raise ConfigError(f"register_family takes a Family, got {type(family).__name__}.")
    for field in ("name", "embeddings"):
        if not isinstance(getattr(family, field, None), str):
            raise ConfigError(f"{type(family).__name__}.{field} must be a string.")
    if family.name in FAMILIES:
        raise ConfigError(f"the family {family.name!r} is registered already; choose another name.")
    FAMILIES[family.name] = family
    EMBEDDINGS.add(family.embeddings)
    return family


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of a symmetric matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # many eigenvalues that only rounding tells apart
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def widened(x: Tensor) -> Tensor:
    """In float32 at least; the range of half precision is too small for squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def with_column(x: Tensor, column: Tensor) -> Tensor:
    """One more column: (n, d), (n,) -> (n, d + 1)."""
    return torch.cat([x, column[:, None]], 1)


def with_ones(x: Tensor) -> Tensor:
    """A column of ones, which the bias is multiplied by."""
    return with_column(x, x.new_ones(len(x)))


def _by_kernel(sites: Sequence[Site]) -> dict[str, list[int]]:
    """Kernel size -> numbers of the weights that have it."""
    members: dict[str, list[int]] = {}
    for at, (*_, grid) in enumerate(sites):
        members.setdefault(grid.kernel, []).append(at)
    return members


def _gram(matrices: Sequence[Tensor]) -> Tensor:
    """The mean of the Gram matrices of matrices (any, n)."""
    stacked = torch.cat(list(matrices))
    return stacked.t() @ stacked / len(matrices)


def _sides(side: float, sites: Sequence[Site]) -> tuple[float, float]:
    """One side of weights seen as matrices, and the mean of the other."""
    weights = sum(math.prod(grid.shape) for *_, grid in sites) / len(sites)
    return side, weights / side


def _member(problem: Any, at: int) -> Member:
    """A weight of channels as the fit takes it."""
    rows = problem.grids[at].cut(problem.targets[at])
    (u, v), (scale, offset) = problem.z[at], problem.constants[at]
    return Member(rows, u, v, scale, offset, problem.pull(at))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product left @ right.T in a dtype.

    A bfloat16 has the range of a float32, so that the factors can be rounded to it. A float16 has
    not, and sums over many tiles in the backward pass would overflow: only the result becomes one.
    """
    if dtype == torch.bfloat16:
        left, right = left.to(dtype), right.to(dtype)
        # Tensor cores want rows of whole multiples of 16 bytes
        spare = -left.shape[1] % 8
        if spare:
            left, right = F.pad(left, (0, spare)), F.pad(right, (0, spare))
    return linear(left, right).to(dtype)


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


def _separated(numbers: Tensor, kernels: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """The weight of pointwise numbers, (R, w), and depthwise kernels, (w, k)."""
    rows = torch.addcmul(offset, numbers[..., None], kernels)  # (R, w, 1) * (w, k)
    return grid.join(rows.flatten(1))  # (R, w, k) -> (R, w * k)


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


def _used(net: Net, grid: Grid) -> tuple[Tensor, Tensor]:
    """The part of a head that a weight uses, which may be narrower than a tile."""
    weight, bias = net.head(grid.kernel)
    used = grid.width * grid.elements
    return first(weight, used), first(bias, used)


def _kernels(shapes: Mapping[tuple[int, ...], int]) -> dict[str, int]:
    """Kernel size -> its elements."""
    return {kernel_name(shape): math.prod(shape[2:]) for shape in shapes}


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
    for kernel, elements in _kernels(shapes).items():
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
        Head(k, _lined_up(trail, rows[k]) if rows else _power_of_two(trail), elements[k])
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


def _power_of_two(value: float) -> int:
    """The power of two nearest to a value, on the logarithmic scale; at least 1."""
    return 1 if value <= 1 else 2 ** round(math.log2(value))


for _family in (Separable(), OneLayer(), TwoLayers(), Channels()):
    register_family(_family)
