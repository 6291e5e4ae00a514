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
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperize.config import HyperConfig
from hyperize.cp import OutputFit
from hyperize.products import linear
from hyperize.tiling import Grid, Head, kernel_name, make_grid

__all__ = ["Family"]

_K = TypeVar("_K", bound=Hashable)
Geometry = tuple[int, tuple[Head, ...]]
"""The lead of all tiles, and the heads."""
Factors = tuple[Tensor, Tensor, Tensor]
"""x (R * P, d), weight (w * k, d) and bias (w * k,), of which `linear` makes a weight's rows."""
Site = tuple[Tensor, Tensor, Grid]
"""What a weight is made of beside the hypernetwork: embeddings, scale and offset (2,), grid."""


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
        for kernel, members in by_kernel(sites).items():
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

    def absorb(self, net: Net, z: Tensor, grid: Grid, scale: float) -> float:
        """Moves what it can of a weight's scale into its embeddings, in place.

        Embeddings that are numbers of the weight should be as small as these, so that optimizers
        take them at the pace of a dense weight.

        Args:
            net: The hypernetwork.
            z: The weight's embeddings.
            grid: How it is cut.
            scale: What the weight is multiplied by.

        Returns:
            The scale that is left.
        """
        return scale

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


def by_kernel(sites: Sequence[Site]) -> dict[str, list[int]]:
    """Kernel size -> numbers of the weights that have it."""
    return grouped(grid.kernel for *_, grid in sites)


def grouped(keys: Iterable[_K]) -> dict[_K, list[int]]:
    """Key -> numbers of the places where it stands, in order."""
    places: dict[_K, list[int]] = {}
    for at, key in enumerate(keys):
        places.setdefault(key, []).append(at)
    return places


def mean_gram(matrices: Sequence[Tensor]) -> Tensor:
    """The mean of the Gram matrices of matrices (any, n)."""
    stacked = torch.cat(list(matrices))
    return stacked.t() @ stacked / len(matrices)


def mean_sides(side: float, sites: Sequence[Site]) -> tuple[float, float]:
    """One side of weights seen as matrices, and the mean of the other."""
    weights = sum(math.prod(grid.shape) for *_, grid in sites) / len(sites)
    return side, weights / side


def product_in(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
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


def kernel_sizes(shapes: Mapping[tuple[int, ...], int]) -> dict[str, int]:
    """Kernel size -> its elements."""
    return {kernel_name(shape): math.prod(shape[2:]) for shape in shapes}


def power_of_two(value: float) -> int:
    """The power of two nearest to a value, on the logarithmic scale; at least 1."""
    return 1 if value <= 1 else 2 ** round(math.log2(value))
